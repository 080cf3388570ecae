"""What each part of a head reaches on this GPU: cuBLAS, gemm_exp by tile, dX, dW, the two passes.

    python benchmarks/tile_sweep.py --out benchmarks/results/tile_sweep.json [--shape qwen2.5-7b]

The order is that of the questions: what is the ceiling (one logits GEMM by torch.mm), does the
Triton GEMM come near it and in which tile (the scaled-exp design needs 590 TF/s on an H200), which
chunk size suits the dX GEMM, what does accumulating dW in float32 cost, and do the cuBLAS head's
passes move bytes at the memory's rate. A variant is compared with float64 before it is timed; one
that is wrong, does not compile or does not fit is a line with its reason. Inputs are random.
Samples are taken in rounds as in kernel_bench.py; rates are of the median.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kernel_bench import Failure, attempt, interleaved, quantiles, shape_of, watched, write_json
from kernel_providers import head_case

from vpgea_fast.kernels import cublas
from vpgea_fast.kernels import linear_logprob as exps
from vpgea_fast.kernels._tiling import INTERPRETED, Tile
from vpgea_fast.kernels.contract import Head
from vpgea_fast.kernels.products import add_matmul_, matmul
from vpgea_fast.metrics import Console, environment

Tensor = torch.Tensor

GO_TFLOPS = 590
"""Below this rate of gemm_exp the cuBLAS head is the faster design on an H200.

Its forward and backward, with float32 logits and so as accurate, take about 82 ms at N = 16384. The
scaled-exp design does three GEMMs, two of them cuBLAS's; it takes as long when the third runs at
580 to 600 TF/s. (690 was the rate at which it reaches its own aim of 73 ms.)"""
ROWS = 8192
CHUNKS = (4096, 7168, 8192, 8448)
TILES = (
    Tile(128, 256, 64, stages=4, warps=8),
    Tile(128, 256, 64, stages=3, warps=8),
    Tile(128, 256, 64, stages=4, warps=8, group_m=4),
    Tile(128, 256, 64, stages=4, warps=8, group_m=8),
    Tile(256, 128, 64, stages=3, warps=8),
    Tile(256, 128, 64, stages=4, warps=8),
    Tile(128, 128, 64, stages=4, warps=4),
    Tile(128, 128, 64, stages=4, warps=8),
    Tile(64, 256, 64, stages=4, warps=4),
)
PASSES = ((4096, 8), (2048, 4), (8192, 8), (8192, 16))
"""(logits at once, warps) of the cuBLAS head's passes."""
TOLERANCE = 1e-3
"""Relative error of a row's sum: bf16 products are exact in float32, and are added there."""


@dataclass(frozen=True)
class Variant:
    """One thing to time. `build` makes its buffers and gives the call; `error` compares with truth.

    flop and moved: floating-point operations and bytes of one call.
    """

    step: str
    name: str
    build: Callable[[], Callable[[], Any]]
    flop: float = 0.0
    moved: float = 0.0
    error: Callable[[], float] | None = None

    @property
    def label(self) -> str:
        return f"{self.step}: {self.name}"


class Job:
    """What kernel_bench.interleaved samples."""

    loss = None

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def prepare(self) -> None:
        pass

    def __call__(self) -> None:
        self.call()


def named(tile: Tile) -> str:
    shape = f"{tile.block_m} x {tile.block_n} x {tile.block_k}"
    return f"{shape}, {tile.stages} stages, {tile.warps} warps, groups of {tile.group_m}"


class Problem:
    """One chunk of rows, shared by all variants: nothing is made before it is asked for."""

    def __init__(self, rows: int, shape: Sequence[int], args: Any) -> None:
        self.rows, self.args = rows, args
        self.case = head_case("weighted", (rows, *shape[1:]), None, args)
        self.hidden = self.case.hiddens[0].detach()
        self.weight = self.case.weight.detach()
        self.flop = 2.0 * rows * self.weight.numel()

    @functools.cached_property
    def plan(self) -> exps.Plan:
        return exps.Plan.of(Head(weight=self.weight))

    @functools.cached_property
    def logits(self) -> Tensor:
        return matmul(self.hidden, self.weight.T, torch.float32)

    @functools.cached_property
    def exps(self) -> Tensor:
        """A stand-in for E, as large and as padded; random, since zeros cost less power."""
        shape = self.rows, exps._padded(self.weight.shape[0])
        full = torch.empty(shape, dtype=self.hidden.dtype, device=self.hidden.device)
        return full.normal_()[:, : self.weight.shape[0]]

    @functools.cached_property
    def sums(self) -> Tensor:
        """Float64 sums of exp(z - z_target) over the other classes, of the first 32 rows."""
        few = slice(0, 32)
        z = self.hidden[few].double() @ self.weight.double().T
        targets = self.case.targets[few, None]
        gap = (z - z.gather(1, targets)).scatter_(1, targets, -torch.inf)
        return gap.exp().sum(1)


def gemm_exp(problem: Problem, tile: Tile, *, store: bool) -> tuple[Callable[[], None], Tensor]:
    """The launch, and the (halves of tiles, rows) sums that it fills."""
    plan = replace(problem.plan, tile=tile)
    stats = exps.new_stats(problem.case.targets, plan.head)
    tiles = exps.TileSums.new(problem.rows, plan)
    exps._launch_target_logit(problem.hidden, stats, tiles, plan)
    launch = functools.partial(
        exps._launch_gemm,
        problem.hidden,
        stats,
        tiles,
        plan,
        exps_CV=problem.exps if store else None,
        reference2=stats.target2,
    )
    return launch, tiles.sums


def gemm_error(problem: Problem, tile: Tile, *, store: bool) -> float:
    launch, partial = gemm_exp(problem, tile, store=store)
    launch()
    got = partial.sum(0)[: len(problem.sums)].double()
    return ((got - problem.sums).abs() / problem.sums).max().item()


def row_pass(problem: Problem, block: int, warps: int, *, gradient: bool) -> Callable[[], None]:
    """A pass of the cuBLAS head. The gradient's overwrites its logits: their values do not matter
    to its time, and no statistics are taken afterwards."""
    plan, sizes = problem.plan, {"block": block, "warps": warps}
    stats = exps.new_stats(problem.case.targets, plan.head)
    cublas._launch_statistics(problem.logits, stats, plan, **sizes)
    if not gradient:
        return functools.partial(cublas._launch_statistics, problem.logits, stats, plan, **sizes)
    upstream = torch.zeros(problem.rows, 3, device=problem.hidden.device)
    upstream[:, 0] = problem.case.coef
    return functools.partial(
        cublas._launch_gradient, problem.logits, stats, plan, upstream_C3=upstream, **sizes
    )


def variants(problem: Problem, chunks: Sequence[Problem]) -> Iterator[Variant]:
    """In the order of the module's questions; the passes over the logits last."""
    hidden, weight = problem.hidden, problem.weight
    half, wide = hidden.dtype, torch.float32
    flop = problem.flop
    yield Variant("1 logits", "torch.mm", lambda: lambda: hidden @ weight.T, flop)
    if half != wide:
        fp32_out = functools.partial(matmul, hidden, weight.T, wide)
        yield Variant("1 logits", "torch.mm, float32 out", lambda: fp32_out, flop)
    for tile in TILES:
        for store in (True, False):
            yield Variant(
                "2 gemm_exp",
                f"{named(tile)}, {'E stored' if store else 'sums only'}",
                lambda tile=tile, store=store: gemm_exp(problem, tile, store=store)[0],
                flop,
                error=functools.partial(gemm_error, problem, tile, store=store),
            )
    for chunk in chunks:
        yield Variant(
            "3 dX",
            f"{chunk.rows} rows, float32 out",
            lambda c=chunk: functools.partial(matmul, c.exps, weight, wide),
            chunk.flop,
        )
    total = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    for chunk in chunks:
        yield Variant(
            "4 dW",
            f"{chunk.rows} rows, added in float32",
            lambda c=chunk: functools.partial(add_matmul_, total, c.exps.T, c.hidden, 1.0),
            chunk.flop,
        )
    yield Variant(
        "4 dW",
        f"{problem.rows} rows, {half} out, not added",
        lambda: lambda: problem.exps.T @ hidden,
        flop,
    )
    logits = problem.rows * weight.shape[0]
    for gradient in (False, True):
        for block, warps in PASSES:
            yield Variant(
                "5 passes",
                f"{'gradient' if gradient else 'statistics'}, {block} logits, {warps} warps",
                lambda b=block, w=warps, g=gradient: row_pass(problem, b, w, gradient=g),
                moved=logits * (4.0 + (hidden.itemsize if gradient else 0)),
            )


def measure(step: Sequence[Variant], mm_rate: float | None, args: Any) -> list[dict[str, Any]]:
    """The lines of one step: checked, then timed in rounds."""
    built: dict[str, Any] = {}
    for variant in step:
        error = attempt(variant.error or (lambda: 0.0), args.device)
        if isinstance(error, float) and not error <= TOLERANCE:
            error = Failure("refused", f"relative error of a row's sum {error:.1e} > {TOLERANCE}")
        failed = isinstance(error, Failure)
        built[variant.label] = error if failed else attempt(variant.build, args.device)
    jobs = {k: Job(call) for k, call in built.items() if not isinstance(call, Failure)}
    with watched(args.device) as seen:
        samples = {**built, **interleaved(jobs, args)}
    rows = []
    for variant in step:
        spent, row = samples[variant.label], {"step": variant.step, "name": variant.name}
        if isinstance(spent, Failure):
            rows.append(row | vars(spent))
            continue
        p20, p50, p80 = quantiles(spent)
        row |= {
            "status": "ok",
            **seen,
            "p20_ms": 1e3 * p20,
            "p50_ms": 1e3 * p50,
            "p80_ms": 1e3 * p80,
        }
        if variant.flop:
            rate = variant.flop / p50
            row["tflops"] = rate / 1e12
            row["percent_of_mm"] = 100 * rate / mm_rate if mm_rate else 100.0
        if variant.moved:
            row["gb_per_s"] = variant.moved / p50 / 1e9
        rows.append(row)
    return rows


def run(
    args: Any, console: Console, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """All lines; `keep` is given those so far after each step."""
    problem = Problem(args.rows, args.shape, args)
    chunks = [
        problem if rows == args.rows else Problem(rows, args.shape, args) for rows in args.chunks
    ]
    steps: dict[str, list[Variant]] = {}
    for variant in variants(problem, chunks):
        steps.setdefault(variant.step, []).append(variant)
    records: list[dict[str, Any]] = []
    mm_rate = None
    for name, step in steps.items():
        rows = measure(step, mm_rate, args)
        if mm_rate is None and rows[0]["status"] == "ok":
            mm_rate = rows[0]["tflops"] * 1e12
        records += rows
        keep(records)
        show(name, rows, args, console)
    return records


def show(name: str, rows: Sequence[dict[str, Any]], args: Any, console: Console) -> None:
    keys = ("p50_ms", "p20_ms", "p80_ms", "tflops", "percent_of_mm", "gb_per_s")
    console.table(
        ("variant", "p50 ms", "p20", "p80", "TF/s", "% of mm", "GB/s"),
        [
            [r["name"], *(f"{r[k]:.4g}" if r.get(k) else "-" for k in keys)]
            if r["status"] == "ok"
            else [r["name"], r["status"], *["-"] * 4, r["reason"][:40]]
            for r in rows
        ],
        title=f"{name}, {args.rows} rows, D, V = {args.shape[1]}, {args.shape[2]}",
    )


def verdict(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest gemm_exp that stores E, and whether the scaled-exp design goes ahead."""
    stored = [
        r
        for r in records
        if r["step"] == "2 gemm_exp" and r["status"] == "ok" and "stored" in r["name"]
    ]
    if not stored:
        return {"best": None, "tflops": None, "go": False}
    best = max(stored, key=lambda r: r["tflops"])
    return {"best": best["name"], "tflops": best["tflops"], "go": best["tflops"] >= GO_TFLOPS}


def arguments(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-7b", help="N,D,V or a name of kernel_bench.py")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of steps 1, 2 and 5")
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS), help="steps 3, 4")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/tile_sweep.json"))
    parser.add_argument("--list", action="store_true", help="print the tiles and measure nothing")
    args = parser.parse_args(argv)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype, args.chunk_mib = torch.bfloat16, None
    _, args.shape = shape_of(args.shape, True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    console = Console()
    if args.list:
        for tile in TILES:
            print(f"gemm_exp: {named(tile)}")
        return 0
    if args.device.type != "cuda" and not INTERPRETED:
        print("tile_sweep: no CUDA device here: nothing to measure; see static_report.py")
        return 2
    place = environment()
    console.message(f"{place['device']}, torch {place['torch']}, commit {place['commit']}")

    def keep(records: list[dict[str, Any]]) -> None:
        result = {"environment": place, "shape": args.shape, "rows": args.rows}
        write_json(args.out, result | {"gemm_exp": verdict(records), "records": records})

    found = verdict(run(args, console, keep))
    console.message(f"gemm_exp at its best: {found['tflops'] or 0:.0f} TF/s, {found['best']}")
    console.message(f"wrote {args.out}")
    console.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

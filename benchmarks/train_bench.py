"""The train phase of one step: our packed and gated loop beside ungated, padded and TRL's.

    python benchmarks/train_bench.py                                # tiny, on a CPU
    python benchmarks/train_bench.py --model qwen2.5-7b --profile runs/trace.json    # one GPU
    torchrun --nproc-per-node 8 benchmarks/train_bench.py --model qwen2.5-7b

Random weights, nothing is downloaded; rows as VPG-EA makes them: every path a teacher row, and a
student row that has a gradient where the path passed the gate (train_variants.py).

Protocol. A small model of the same widths first runs every variant: gradients must equal those of
the gated loop, log-probs those of the padded rows, and the tokens that went through the decoder
must fall by exactly those of the gated-off rows. One of ours that misses ends the run with status
1 and no time. Then whole updates (gradient, clip, AdamW) are sampled in rounds, one of each variant
a round, the starting point rotating and every second round backwards, after unrecorded warm-up
rounds. TRL needs a model of its own: where two do not fit, it is sampled after the others.

tok/s    tokens of the given rows that enter the decoder; useful ones belong to rows with a gradient
paths/s  sampled paths whose gradient was made: all of them, whatever the variant
MFU      (6 N + 6 w sum l^2 / sum l) a token, causal half, real lengths, no embedding, recomputation
         or padding, the head on target rows alone, of the dense bf16 peak; useful as above
head     the head's forward, loss and gradients as a share of the step (TRL: its forward alone)
peak     parameters, states and all that a step adds. CUDA: the allocator's; CPU: torch's profiler
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quiet  # noqa: F401 - before torch
import torch
from kernel_bench import (
    Failure,
    attempt,
    interleaved,
    peak_bytes,
    plotted_if_possible,
    quantiles,
    version,
    watched,
    write_json,
)
from torch._dynamo.utils import counters
from train_variants import (
    MODELS,
    OURS,
    PHASES,
    VARIANTS,
    Job,
    Ours,
    Trl,
    make_rows,
    rows_of,
    through_model,
    trl_missing,
)

from vpgea_fast.config import (
    Config,
    ConfigError,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from vpgea_fast.distributed import World, open_world
from vpgea_fast.metrics import Console, ModelFlops, environment, mfu, model_flops
from vpgea_fast.packing import RankPlan, drop_zero_rows, pack_plan, plan_ranks, plan_stats
from vpgea_fast.types import TrainRow

BUDGET = {"float32": (5e-6, 1e-6, 1e-5), "bfloat16": (0.1, 2e-2, 5e-2)}
"""Largest gap of a log-prob in nats; relative Frobenius gap of the gradient, of ours and of TRL's.
bfloat16 rounds by 2e-3, and all variants order their sums differently: ten roundings. TRL's
autocast rounds in more places (1.6e-2 seen on a CPU)."""
RECOMPUTED = {"none": 0, "selective": 0.35, "full": 1}
"""Forwards of the decoder that the backward makes again; of `selective` o_proj and up_proj, 0.35 of
the products of Qwen2.5-7B. (Of `full` all but down_proj, 0.71 of them, counted as 1.)"""
FIELDS = [
    *("variant", "status", "reason", "error_logp", "error_gradient", "check_tokens", "rows"),
    *("tokens", "tokens_run", "micro_batches", "p20_s", "p50_s", "p80_s", "tokens_per_s"),
    *("useful_tokens_per_s", "paths_per_s", "tflops", "mfu", "useful_mfu", "peak_mib"),
    *(f"{phase}_s" for phase in PHASES),
    *("head_share", "times_gated"),
]


# --- correctness --------------------------------------------------------------------------------


def check(args: Any, world: World) -> dict[str, dict[str, Any]]:
    """variant -> status, reason, errors and tokens, on few rows of a model with two layers."""
    config = make_config(args, layers=min(2, args.layers))
    rows = rows_for(args, args.check_rows)
    ours, found = Ours(config, args.cfg, world), {}
    truth = gradients(ours, rows_of("gated", rows), "packed")
    for name in args.variants:
        own, layout = rows_of(name, rows), VARIANTS[name][0]
        made: Any = Failure("skipped", trl_missing(world) or "")
        if name in OURS:
            made = gradients(ours, own, layout)
        elif not made.reason:
            trl = functools.partial(trl_gradients, ours, config, args, world, rows)
            made = attempt(trl, world.device)
        if isinstance(made, Failure):
            found[name] = vars(made)
            continue
        logp, ours_gradient, trl_gradient = BUDGET[args.cfg.model.dtype]
        budget = (logp, ours_gradient if name in OURS else trl_gradient)
        found[name] = verdict(made, truth, budget, world)
        if name not in OURS:  # its step keeps its log-probs to itself
            found[name]["error_logp"] = None
        if layout == "packed" and found[name]["check_tokens"] != through_model(own):
            found[name] |= {"status": "refused", "reason": "tokens are not those of its rows"}
    return found


@dataclass(frozen=True)
class Made:
    """Gradients by parameter, log-probs by place among the rows with a gradient, tokens run."""

    gradients: dict[str, torch.Tensor]
    logps: dict[int, torch.Tensor]
    ran: int


def gradients(engine: Any, rows: Sequence[TrainRow], layout: str) -> Made:
    engine.clear()
    logps = engine.gradient(rows, layout)
    kept = [i for i, row in enumerate(rows) if row.coef.any()]
    made = {n: local(p.grad).clone() for n, p in engine.parameters() if p.grad is not None}
    engine.clear()
    return Made(made, {n: logps[i] for n, i in enumerate(kept) if i in logps}, engine.ran)


def trl_gradients(
    ours: Ours, config: Any, args: Any, world: World, rows: Sequence[TrainRow]
) -> Made:
    """TRL's, of our weights."""
    trl = make_trl(config, args, world, rows)
    trl.load(ours.weights())
    ours.clear()
    return gradients(trl, rows_of("TRL", rows), "TRL")


def verdict(made: Made, truth: Made, budget: tuple[float, float], world: World) -> dict[str, Any]:
    """Errors against the gated loop, on all processes, and whether they are within budget."""
    pairs = [(logps, truth.logps.get(n, logps[:0])) for n, logps in made.logps.items()]
    other = torch.tensor(torch.inf, dtype=torch.float64)  # not the same rows
    gaps = [(a - b).abs().max() if a.shape == b.shape else other for a, b in pairs]
    gap = torch.stack([torch.zeros((), dtype=torch.float64), *gaps]).max()  # keeps a NaN
    error = {
        "error_logp": torch.stack(world.gather_tensor(gap[None])).max().item(),
        "error_gradient": relative(made.gradients, truth.gradients, world),
    }
    over = [
        f"{key} {value:.1e} > {limit:.1e}"
        for (key, value), limit in zip(error.items(), budget, strict=True)
        if not value <= limit  # a NaN is over every budget
    ]
    return {
        "status": "refused" if over else "ok",
        "reason": ", ".join(over),
        **error,
        "check_tokens": int(world.sum(torch.tensor(made.ran))),
    }


def local(gradient: Any) -> torch.Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def relative(made: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], world: World) -> float:
    """|made - exact| / |exact| over all parameters and processes."""
    if made.keys() != exact.keys():
        return float("inf")
    squares = torch.zeros(2, dtype=torch.float64)
    for name, gradient in made.items():
        squares[0] += (gradient.float() - exact[name].float()).double().square().sum().cpu()
        squares[1] += exact[name].double().square().sum().cpu()
    gap, norm = world.sum(squares).sqrt().tolist()
    return gap / norm if norm else float("inf")


# --- time and memory ----------------------------------------------------------------------------


@dataclass
class Measured:
    """Of the variants by name; seconds of the student forward's decoder; the profile's findings;
    the device's clock and power in the last rounds."""

    variants: dict[str, dict[str, Any]]
    student_forward: float | None = None
    profile: dict[str, Any] | None = None
    device: dict[str, float | None] | None = None


def measure(
    args: Any, world: World, names: Sequence[str], keep: Callable[[Measured], None]
) -> Measured:
    """The named variants, in rounds of all of them where two models fit, else TRL after ours.

    `keep` is given what is known after each group.
    """
    config, rows = make_config(args, layers=args.layers), rows_for(args, args.rows)
    groups = [list(names)]
    if not fits_twice(config, world):
        groups = [[n for n in names if n in OURS], [n for n in names if n not in OURS]]
    measured = Measured({})
    for group in filter(None, groups):
        sample(group, config, rows, args, world, measured)
        release(world)
        keep(measured)
    return measured


def sample(
    names: Sequence[str],
    config: Any,
    rows: Sequence[TrainRow],
    args: Any,
    world: World,
    measured: Measured,
) -> None:
    """Rounds of the named variants, which are alive together; adds to `measured`."""
    ours = trl = None
    if any(name in OURS for name in names):
        ours = Ours(config, args.cfg, world)
    if any(name not in OURS for name in names):
        trl = attempt(lambda: make_trl(config, args, world, rows), world.device)
    if isinstance(trl, Failure):
        measured.variants["TRL"] = vars(trl)
    jobs: dict[str, Any] = {
        name: Job(ours if name in OURS else trl, rows_of(name, rows), VARIANTS[name][0])
        for name in names
        if name in OURS or not isinstance(trl, Failure)
    }
    if ours is not None:
        students = [row for row in drop_zero_rows(rows) if row.distilled]
        jobs["student forward"] = Job(ours, students, "forward")
    with watched(world.device) as measured.device:
        samples = interleaved(jobs, args)
    forward = samples.pop("student forward", None)
    if isinstance(forward, list):
        measured.student_forward = median_laps(jobs["student forward"], args)["decoder_forward"]
    for name, spent in samples.items():
        if isinstance(spent, Failure):
            measured.variants[name] = vars(spent)
        else:
            found = report(jobs[name], spent, rows, args, world)
            measured.variants[name] = {**found, "peak_mib": peak_mib(jobs[name], world)}
    if args.profile is not None and ours is not None:
        measured.profile = profile(jobs["gated"], args, world)


def release(world: World) -> None:
    """What an engine held; it and its hooks hold each other, so it does not go by itself."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def report(
    job: Job, spent: Sequence[float], rows: Sequence[TrainRow], args: Any, world: World
) -> dict[str, Any]:
    flops, (p20, p50, p80) = model_flops(make_config(args, layers=args.layers)), quantiles(spent)
    useful = drop_zero_rows(job.rows)
    phases = median_laps(job, args)
    work, useful_work = work_of(flops, job.rows), work_of(flops, useful)
    device = device_name(world)
    return {
        "status": "ok",
        "rows": len(job.rows),
        "tokens": through_model(job.rows),
        "tokens_run": int(world.sum(torch.tensor(job.ran))),
        "micro_batches": job.batches,
        "p20_s": p20,
        "p50_s": p50,
        "p80_s": p80,
        "tokens_per_s": through_model(job.rows) / p50,
        "useful_tokens_per_s": through_model(useful) / p50,
        "paths_per_s": (len(rows) // 2) / p50,
        "tflops": work / p50 / 1e12,
        "mfu": mfu(work, p50, device, devices=world.size),
        "useful_mfu": mfu(useful_work, p50, device, devices=world.size),
        **{f"{name}_s": value for name, value in phases.items()},
        "head_share": phases["head_loss"] / sum(phases.values()),
    }


def work_of(flops: ModelFlops, rows: Sequence[TrainRow]) -> int:
    """Operations of a forward and a backward; the head on the rows with a coefficient."""
    heads = [row.token_ids.numel() if row.coef.any() else 0 for row in rows]
    return flops.rows([row.tokens - 1 for row in rows], heads)


def median_laps(job: Job, args: Any) -> dict[str, float]:
    samples = [laps.seconds() for laps in job.history[-args.repeats :]]
    return {name: quantiles([sample[name] for sample in samples])[1] for name in PHASES}


def peak_mib(job: Any, world: World) -> float | None:
    """The largest of all processes."""
    job.prepare()
    cuda = world.device.type == "cuda"
    held = torch.cuda.memory_allocated(world.device) if cuda else held_bytes(job.engine)
    added = attempt(lambda: peak_bytes(job, world.device), world.device)
    if world.any(isinstance(added, Failure)):
        return None
    return max(world.gather((held + added) / 2**20))


def held_bytes(engine: Any) -> int:
    """Parameters and optimiser states of this process."""
    tensors = [local(p) for _, p in engine.parameters()]
    states = engine.optimizer.state
    tensors += [local(v) for s in states.values() for v in s.values() if torch.is_tensor(v)]
    return sum(t.nbytes for t in tensors)


def fits_twice(config: Any, world: World) -> bool:
    """Two models with float32 weights, gradients and moments in half of the device."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    return 2 * 16 * parameters(config) <= memory / 2


def parameters(config: Any) -> int:
    flops = model_flops(config)
    return flops.decoder + flops.head * (1 if config.tie_word_embeddings else 2)


def estimated_mib(config: Any, args: Any, world: World) -> tuple[float | None, str]:
    """Peak of the training phases by the estimator that `--dry-run` uses; or why there is none.

    The sampling replica of a run is left out: nothing samples here.
    """
    try:
        from vpgea_fast.estimate import (  # pyright: ignore[reportMissingImports]
            estimate_memory,
            model_shape,
        )
    except ImportError:
        return None, "vpgea_fast.estimate is not in this checkout"
    cuda = world.device.type == "cuda"
    found = estimate_memory(
        model_shape(config), args.cfg, world=world.size, cuda=cuda, context=1, prompt=1
    )
    phases = [
        sum(size for part, size in parts.items() if part != "sampling replica")
        for name, parts in found.phases.items()
        if name != "sampling"
    ]
    return max(phases) / 2**20, ""


def time_packing(
    flops: ModelFlops,
    *,
    rows: int = 4096,
    ranks: int = 8,
    budget: int = 32768,
    median: int = 1024,
    sigma: float = 0.8,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Seconds to plan log-normal rows for all ranks and to pack those of rank 0; with `plan_stats`.

    The least of `repeats`, on this process's threads. The rows are cut at the budget; a quarter of
    each is context.
    """
    draw = random.Random(seed)
    lengths = [
        min(budget, max(2, round(median * draw.lognormvariate(0.0, sigma)))) for _ in range(rows)
    ]
    made = []
    for length in lengths:
        context = max(1, length // 4)
        tokens = torch.zeros(length - context + 1, dtype=torch.int64)
        coef = torch.ones(tokens.numel(), dtype=torch.float64)
        made.append(
            TrainRow(
                context_ids=tokens[:1].expand(context),
                token_ids=tokens,
                coef=coef,
                stream="prior",
                view="student",
            )
        )

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def plan() -> list[RankPlan]:
        return plan_ranks([row.tokens - 1 for row in made], budget, ranks, flops.row)

    plans = plan()
    return {
        "rows": rows,
        "ranks": ranks,
        "plan_seconds": min(seconds(plan) for _ in range(repeats)),
        "pack_seconds": min(
            seconds(lambda: [batch for batch, _ in pack_plan(made, plans[0])])
            for _ in range(repeats)
        ),
        "rank_tokens": sum(lengths[i] for batch in plans[0] for i in batch),
        **plan_stats(plans, lengths, flops.row),
    }


def reuse_bound(measured: Measured, args: Any) -> dict[str, float] | None:
    """What keeping the scoring forward of the student rows could save of a step, at most.

    share_measured: time of the decoder's forward of the student rows that passed the gate over the
    time of the gated step; share_model: the same in operations, a layer run again in the backward
    counted. kept_gib: the block inputs of all student rows, which must be kept from the scoring on,
    since the gate is not known before; of this step, on all devices together.
    """
    gated, forward = measured.variants["gated"], measured.student_forward
    if gated["status"] != "ok" or forward is None:
        return None
    config, rows = make_config(args, layers=args.layers), rows_for(args, args.rows)
    flops, kept = model_flops(config), drop_zero_rows(rows)
    student = [row.tokens - 1 for row in kept if row.distilled]
    decoder = flops.forward_rows([row.tokens - 1 for row in kept], [0] * len(kept))
    head = 6 * flops.head * sum(row.token_ids.numel() for row in kept)
    again = RECOMPUTED[args.cfg.model.activation_checkpointing]
    scored = sum(row.tokens - 1 for row in rows if row.distilled)
    size = getattr(torch, args.cfg.model.dtype).itemsize
    return {
        "share_measured": forward / gated["p50_s"],
        "share_model": flops.forward_rows(student, [0] * len(student))
        / ((3 + again) * decoder + head),
        "kept_gib": config.num_hidden_layers * config.hidden_size * size * scored / 2**30,
    }


# --- profile ------------------------------------------------------------------------------------


def profile(job: Job, args: Any, world: World) -> dict[str, Any]:
    """A Chrome trace of one step of this process; its three largest operations and idle gaps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    job.prepare()
    with torch.profiler.profile(activities=activities) as taken:
        job()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    path = args.profile if world.main else args.profile.with_suffix(f".{world.rank}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    taken.export_chrome_trace(str(path))
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    busy = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if busy:
        spent: dict[str, float] = {}
        for event in busy:
            spent[event["name"]] = spent.get(event["name"], 0.0) + event["dur"] / 1e3
    else:
        spent = {e.key: e.self_cpu_time_total / 1e3 for e in taken.key_averages()}
    total = sum(spent.values())
    largest = sorted(spent, key=lambda name: -spent[name])[:3]
    return {
        "trace": str(path),
        "operations": [
            {"name": name, "ms": spent[name], "share": spent[name] / total} for name in largest
        ],
        "gaps": gaps_of(busy),
    }


def gaps_of(busy: Sequence[dict[str, Any]], count: int = 3) -> list[dict[str, Any]]:
    """The longest times in which no stream of the device worked, and what stood around them."""
    gaps, end, last = [], None, ""
    for event in sorted(busy, key=lambda e: e["ts"]):
        if end is not None and event["ts"] > end:
            gaps.append({"ms": (event["ts"] - end) / 1e3, "after": last, "before": event["name"]})
        if end is None or event["ts"] + event["dur"] > end:
            end, last = event["ts"] + event["dur"], event["name"]
    return sorted(gaps, key=lambda gap: -gap["ms"])[:count]


# --- the run ------------------------------------------------------------------------------------


def make_config(args: Any, *, layers: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**{**MODELS[args.model], "num_hidden_layers": layers})


def rows_for(args: Any, rows: int) -> list[TrainRow]:
    return make_rows(
        rows // 2,
        mean=args.mean_length,
        sigma=args.sigma,
        budget=args.budget,
        gate_rate=args.gate_rate,
        vocabulary=MODELS[args.model]["vocab_size"],
        seed=args.seed,
    )


def make_trl(config: Any, args: Any, world: World, rows: Sequence[TrainRow]) -> Trl:
    own = rows_of("TRL", rows)
    prompt = max(row.context_ids.numel() for row in own)
    completion = max(row.token_ids.numel() for row in own)
    batch = max(1, args.budget // (prompt + completion))
    return Trl(config, args.cfg, world, batch=batch, completion=completion)


def device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def show(records: Sequence[dict[str, Any]], args: Any, console: Console) -> None:
    timed = [r for r in records if r["p50_s"]]
    speed = ("p50_s", "p20_s", "p80_s", "tokens_per_s", "useful_tokens_per_s", "paths_per_s")
    speed = (*speed, "tflops", "mfu", "useful_mfu", "peak_mib", "times_gated")
    heads = ("variant", "p50 s", "p20", "p80", "tok/s", "useful", "paths/s", "TF/s", "MFU")
    heads = (*heads, "useful", "peak MiB", "x gated")
    title = f"one update of {args.rows // 2} paths, {args.model}, {args.cfg.model.dtype}"
    console.table(
        heads, [[r["variant"], *(number(r[k]) for k in speed)] for r in timed], title=title
    )
    phases = [f"{name}_s" for name in PHASES]
    console.table(
        ("variant", "micro-batches", "tokens run", "of them padding", *PHASES, "head share"),
        [
            [
                *(r["variant"], str(r["micro_batches"]), str(r["tokens_run"])),
                f"{1 - r['tokens'] / r['tokens_run']:.1%}",
                *(number(r[key]) for key in phases),
                f"{r['head_share']:.1%}",
            ]
            for r in timed
        ],
        title="seconds by phase (medians)",
    )


def show_correctness(checked: dict[str, dict[str, Any]], args: Any, console: Console) -> None:
    console.table(
        ("variant", "verdict", "log-prob", "gradient", "tokens run", "why"),
        [
            [
                *(name, found["status"], number(found.get("error_logp"))),
                *(number(found.get("error_gradient")), number(found.get("check_tokens"))),
                found["reason"],
            ]
            for name, found in checked.items()
        ],
        title=f"{args.check_rows} rows, {min(2, args.layers)} layers: gaps to the gated loop",
    )


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def say_rest(result: dict[str, Any], console: Console) -> None:
    packing, reuse = result["packing"], result["reuse_bound"]
    console.message(
        f"packing {packing['rows']} log-normal rows for {packing['ranks']} ranks: plan "
        f"{packing['plan_seconds']:.3f} s, pack one rank's {packing['pack_seconds']:.3f} s, "
        f"imbalance {packing['flops_imbalance']:.3f}, {packing['dummy_tokens']} dummy tokens"
    )
    if reuse is not None:
        console.message(
            f"reusing the scoring forward of gated student rows saves at most "
            f"{reuse['share_measured']:.1%} of the step measured, {reuse['share_model']:.1%} in "
            f"operations, and keeps {reuse['kept_gib']:.3g} GiB of block inputs"
        )
    if result["compiled_graphs"] is not None:
        console.message(f"torch.compile made {result['compiled_graphs']} graphs of the one layer")
    estimate = result["estimate"]
    if estimate["mib"] is None:
        console.message(f"no memory estimate: {estimate['reason']}")
    else:
        console.message(
            f"memory of the gated step: estimate {estimate['mib']:.0f} MiB, measured "
            f"{number(estimate['measured_mib'])} MiB"
        )
    for found in (result["profile"] or {}).get("operations", []):
        console.message(f"{found['share']:.1%} {found['ms']:.1f} ms  {found['name'][:100]}")
    for gap in (result["profile"] or {}).get("gaps", []):
        words = f"after {gap['after'][:60]}, before {gap['before'][:60]}"
        console.message(f"idle {gap['ms']:.2f} ms {words}")
    if result["profile"] and not result["profile"]["gaps"]:
        console.message("idle gaps: a CPU has no timeline of its own in the trace")


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Paths a second, and where the time goes."""
    from matplotlib.figure import Figure

    timed = [r for r in records if r["p50_s"]]
    names = [r["variant"] for r in timed]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(names, [r["paths_per_s"] for r in timed])
    left.set(title="paths whose gradient was made, a second")
    bottom = [0.0] * len(timed)
    for phase in PHASES:
        heights = [r[f"{phase}_s"] for r in timed]
        right.bar(names, heights, bottom=bottom, label=phase)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.set(title="seconds of one update")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def arguments(argv: Sequence[str] | None) -> Any:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model has")
    parser.add_argument("--rows", type=int, help="before gating, two a path; tiny: 64, else 16")
    parser.add_argument("--mean-length", type=int, help="of a path; tiny: 96, else 4096")
    parser.add_argument("--sigma", type=float, default=0.6, help="of the log of a length")
    parser.add_argument("--gate-rate", type=float, default=0.5, help="share of paths that pass")
    parser.add_argument("--budget", type=int, help="tokens a forward; tiny: 2048, else 16384")
    parser.add_argument("--dtype", choices=list(BUDGET), default="bfloat16" if cuda else "float32")
    parser.add_argument("--master-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--optimizer", default="adamw", help="optim.name")
    parser.add_argument("--attention", default="auto", help="model.attention")
    parser.add_argument("--checkpointing", choices=list(RECOMPUTED), help="tiny: none, else full")
    parser.add_argument("--compile", action="store_true", help="model.compile")
    parser.add_argument("--liger", default="auto", help="model.liger")
    parser.add_argument("--shard", default="auto", help="parallel.shard")
    parser.add_argument("--accumulate", default="sharded", help="parallel.accumulate")
    parser.add_argument("--offload", action="store_true", help="parallel.cpu_offload")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--check-rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3 if cuda else 5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of a CPU; tiny: 1, else torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="a Chrome trace of one gated step")
    parser.add_argument("--out", type=Path, default=Path("runs/train_bench.json"))
    args = parser.parse_args(argv)
    tiny, whole = args.model == "tiny", MODELS[args.model]["num_hidden_layers"]
    args.layers = args.layers or whole
    args.rows = args.rows or (64 if tiny else 16)
    args.mean_length = args.mean_length or (96 if tiny else 4096)
    args.budget = args.budget or (2048 if tiny else 16384)
    args.checkpointing = args.checkpointing or ("none" if tiny else "full")
    args.threads = args.threads or (1 if tiny else None)
    if not 0 < args.gate_rate <= 1:
        parser.error(f"--gate-rate: got {args.gate_rate}, expected a share in (0, 1]")
    if not 1 <= args.layers <= whole:
        parser.error(f"--layers: got {args.layers}, expected 1 to the model's {whole}")
    if args.budget < args.mean_length:
        parser.error(f"--budget: got {args.budget}, expected the mean length or more")
    if args.rows < 4 or args.check_rows < 4 or args.rows % 2 or args.check_rows % 2:
        parser.error("--rows, --check-rows: expected even numbers of 4 or more, two rows a path")
    args.variants = [name for name in VARIANTS if name in args.variants]
    if args.variants[0] != "gated":
        parser.error("--variants: expected gated among them, the others are compared with it")
    try:
        args.cfg = config_of(args)
    except ValueError as error:
        parser.error(str(error))
    if not cuda and 16 * parameters(make_config(args, layers=args.layers)) > free_memory():
        parser.error(f"{args.model} does not fit this machine's memory; take fewer --layers")
    return args


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def config_of(args: Any) -> Config:
    """The configuration of a run that would train so."""
    rounded = args.master_dtype == "bfloat16"
    return Config(
        model=ModelConfig(
            path=args.model,
            dtype=args.dtype,
            master_dtype=args.master_dtype,
            activation_checkpointing=args.checkpointing,
            compile=args.compile,
            liger=args.liger,
            attention=args.attention,
        ),
        parallel=ParallelConfig(
            shard=args.shard, cpu_offload=args.offload, accumulate=args.accumulate
        ),
        optim=OptimConfig(name=args.optimizer, stochastic_rounding=rounded),
        train=TrainConfig(micro_batch_tokens=args.budget),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when one of our own variants failed or missed its budget."""
    args = arguments(argv)
    try:
        world = open_world(args.cfg.parallel, args.cfg.model.device)
    except ConfigError as error:
        raise SystemExit(f"train_bench: {error}") from error
    args.device = world.device
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(silent=not world.main)
    try:
        status = run(args, world, console, sys.argv[1:] if argv is None else argv)
    finally:
        console.close()
    world.close()
    return status


def run(args: Any, world: World, console: Console, words: Sequence[str]) -> int:
    place = environment()
    place["peers"] = {name: version(name) for name in ("trl", "accelerate", "flash_attn")}
    console.message(
        f"{place['device']} x {world.size}, torch {place['torch']}, commit {place['commit']}"
    )
    checked = check(args, world)
    release(world)
    show_correctness(checked, args, console)
    wrong = [name for name in args.variants if name in OURS and checked[name]["status"] != "ok"]
    if wrong:
        console.message(f"nothing is timed: {', '.join(wrong)} must be right first")
        return 1
    good = [name for name in args.variants if checked[name]["status"] == "ok"]
    known = {
        "command": " ".join(["python benchmarks/train_bench.py", *words]),
        "environment": place,
        "processes": world.size,
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, list))},
        "packing": time_packing(model_flops(make_config_7b())),
    }

    def keep(measured: Measured) -> None:
        if world.main:
            write_json(args.out, {**known, **summary(checked, measured, args, world)})

    measured = measure(args, world, good, keep)
    result = {**known, **summary(checked, measured, args, world)}
    records = result["records"]
    show(records, args, console)
    say_rest(result, console)
    if world.main:
        console.message(f"wrote {args.out}, .csv{write(result, args.out)}")
    bad = [r for r in records if r["variant"] in OURS and r["status"] != "ok"]
    return int(bool(bad))


def summary(
    checked: dict[str, dict[str, Any]], measured: Measured, args: Any, world: World
) -> dict[str, Any]:
    """The part of the JSON that measuring fills, so far."""
    records = [
        {**dict.fromkeys(FIELDS), "variant": n, **checked[n], **measured.variants.get(n, {})}
        for n in args.variants
    ]
    base = records[0]["p50_s"]
    for row in records:
        row["times_gated"] = row["p50_s"] / base if row["p50_s"] and base else None
    estimate, reason = estimated_mib(make_config(args, layers=args.layers), args, world)
    return {
        "records": records,
        "reuse_bound": reuse_bound(measured, args),
        "estimate": {"mib": estimate, "reason": reason, "measured_mib": records[0]["peak_mib"]},
        "profile": measured.profile,
        "clock": measured.device,
        "compiled_graphs": counters["stats"]["unique_graphs"] if args.compile else None,
    }


def make_config_7b() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**MODELS["qwen2.5-7b"])


def write(result: dict[str, Any], out: Path) -> str:
    """JSON, CSV, picture; what to say of the last."""
    write_json(out, result)
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(result["records"])
    return plotted_if_possible(plot, result["records"], out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())

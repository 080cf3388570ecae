"""The head's losses against the other libraries': correctness, then time, memory and rate.

    python benchmarks/kernel_bench.py                  # what the device at hand can do in minutes
    python benchmarks/kernel_bench.py --op weighted --shape qwen2.5-7b --compare FILE.json
    python benchmarks/kernel_bench.py --op two_stream --profile runs/trace.json

Protocol. Every provider first meets float64, on the same inputs; one that misses its budget is
reported and not timed. Our backends have absolute budgets; any other may lose twice what eager
torch loses in the same dtype, eager torch itself a fixed ceiling. Then every mode is sampled in
rounds: one sample of each provider a round, the starting point rotating and every second round
backwards; unrecorded warm-up rounds first; on CUDA the L2 cache is flushed before each sample.
torch.mm of one logits GEMM is sampled in the same rounds, repeated until it lasts as long as the
median of the others (alone it is a burst of 12 ms at boost clock): rates are per cent of it. The
device's clock and power while a mode is sampled stand in its rows, where nvidia-smi tells them.
Without a GPU the default is one op, `weighted`, and its whole pass; --op and --modes take others.

forward   values with the graph kept (a one-pass provider makes its gradients here)
backward  the rest; for a one-pass provider a scaling, so it has no rate
full      both. TF/s(6) counts useful work: 2 R D V a logits GEMM, 6 R D V for the whole, R rows
          kept, whatever a provider computes beside it
scoring   values alone, under no_grad

Peak memory is what one run adds to what was alive before it; transient leaves out dX and dW, as
they are returned (providers "dW out" add dW to a float32 tensor that was alive before). CUDA: the
allocator's statistics. CPU: every allocation torch's allocator reports to its profiler, so
without scratch space of the BLAS. Running out of memory is a value of the table, not an error.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import quiet  # noqa: F401 - before torch
import torch
from kernel_providers import (
    EAGER,
    GROUP,
    PER_TOKEN,
    PROVIDERS,
    SEQUENCES,
    Case,
    GroupCase,
    Provider,
    Truth,
    group_case,
    group_truth,
    head_case,
    head_truth,
    unavailable,
)
from kernel_report import (
    ERRORS,
    HEAD_MODES,
    closing_words,
    compare,
    gate_words,
    main_mode,
    plot,
    show_correctness,
    show_times,
    skipped_words,
)
from torch.utils._python_dispatch import TorchDispatchMode

from vpgea_fast.metrics import Console, environment

Tensor = torch.Tensor

SHAPES = {"qwen2.5-7b": (16384, 3584, 152064), "qwen2.5-1.5b": (16384, 1536, 151936)}
CPU_SHAPE = (2048, 512, 32768)
"""A small model's head and rows enough: below about 64 rows every provider is overhead."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = {
    "linear_logprob": HEAD_MODES,
    "weighted": HEAD_MODES,
    "two_stream": ("full",),
    "group_advantage": ("forward",),
    "gated_kl": ("forward",),
}
GATES = (1.0, 0.5, 0.25)
MM_ROWS = 8192
# max |value - float64|, its mean, relative Frobenius errors of dX and dW.
BUDGET = {
    torch.float32: (1e-4, 1e-5, 1e-5, 1e-5),
    torch.bfloat16: (1e-3, 5e-5, 4e-3, 4e-3),
    torch.float16: (1e-3, 5e-5, 2e-3, 2e-3),
}
# Eager torch rounds its logits to the input dtype: at |z| = 25 bf16 is off by up to 0.06.
CEILING = {
    torch.float32: (1e-3, 1e-4, 1e-4, 1e-4),
    torch.bfloat16: (0.5, 0.05, 0.1, 0.1),
    torch.float16: (0.1, 0.01, 0.02, 0.02),
}
FIELDS = [
    *("op", "gate", "mode", "provider", "rows", "hidden", "vocabulary", "dtype", "status"),
    *("reason", *ERRORS, "p20_ms", "p50_ms", "p80_ms", "tflops", "percent_of_mm"),
    *("peak_mib", "transient_mib", "time_of_eager", "peak_of_eager", "launches", "ratio"),
    *("sm_mhz", "sm_mhz_low", "watts"),
]


# --- correctness --------------------------------------------------------------------------------


def errors_of(provider: Provider, case: Any, truth: Truth) -> tuple[float | None, ...]:
    """(max, mean) of |value - float64| over rows kept, relative errors of dX and dW, or None."""
    for leaf in case.leaves:
        leaf.grad = None
    if provider.accumulates:
        case.dweight_out.zero_()
    loss, value = provider.call(case)
    gaps: list[float | None] = [None] * 4
    if value is not None and value.ndim:
        gap = (value.double() - truth.value).abs()
        gap = gap[case.kept] if isinstance(case, Case) else gap
        gaps[:2] = gap.max().item(), gap.mean().item()
    elif value is not None and truth.loss is not None:
        gaps[1] = (value.double() - truth.loss).abs().item()
    if loss is not None and truth.gradients is not None:
        loss.backward()
        dweight = case.dweight_out if provider.accumulates else case.weight.grad
        made = torch.cat([h.grad for h in case.hiddens]), dweight
        gaps[2:] = [
            ((ours - exact).norm() / exact.norm()).item()
            for ours, exact in zip(made, truth.gradients, strict=True)
        ]
    return tuple(gaps)


def budget_of(
    provider: Provider, dtype: torch.dtype, eager: Sequence[float | None]
) -> tuple[float, ...]:
    if provider.ops == GROUP:
        return BUDGET[torch.float32]
    if provider.ours:
        return BUDGET[dtype]
    if provider.name == EAGER:
        return CEILING[dtype]
    pairs = zip(BUDGET[dtype], eager, strict=True)
    return tuple(max(floor, 2 * (lost or 0.0)) for floor, lost in pairs)


def check(
    providers: Sequence[Provider], case: Any, args: Any
) -> dict[str, tuple[str, str, tuple[float | None, ...]]]:
    """name -> (status, reason, errors); status is ok, refused (over budget) or a Failure's."""
    truths: dict[bool, Truth] = {}
    found: dict[str, Any] = {}
    eager: tuple[float | None, ...] = (None,) * 4
    for provider in sorted(providers, key=lambda p: p.name != EAGER):
        mine = case.uniform() if provider.mean_only else case
        if provider.mean_only not in truths:
            solve = head_truth if isinstance(case, Case) else group_truth
            truths[provider.mean_only] = solve(mine)
        gaps = attempt(lambda p=provider, c=mine: errors_of(p, c, truths[p.mean_only]), args.device)
        if isinstance(gaps, Failure):
            found[provider.name] = gaps.status, gaps.reason, (None,) * 4
            continue
        if provider.name == EAGER:
            eager = gaps
        limits = budget_of(provider, args.dtype, eager)
        over = [
            f"{name} {gap:.1e} > {limit:.1e}"
            for name, gap, limit in zip(ERRORS, gaps, limits, strict=True)
            if gap is not None and not gap <= limit  # a NaN is over every budget
        ]
        found[provider.name] = "refused" if over else "ok", ", ".join(over), gaps
    for leaf in case.leaves:
        leaf.grad = None
    return {provider.name: found[provider.name] for provider in providers}


@dataclass(frozen=True)
class Failure:
    """A run that gave no number: status "OOM", "skipped" (import) or "failed", and why."""

    status: str
    reason: str


def attempt(run: Callable[[], Any], device: torch.device) -> Any:
    """run(), or a Failure: another library's error must not end the measurement of the others."""
    try:
        return run()
    except ImportError as error:
        return Failure("skipped", str(error))
    except (torch.OutOfMemoryError, MemoryError):
        status, reason = "OOM", "out of memory"
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        oom = "can't allocate memory" in str(error)
        status, reason = "OOM" if oom else "failed", f"{type(error).__name__}: {text[0][:160]}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Failure(status, reason)


# --- time and memory ----------------------------------------------------------------------------


class Job:
    """One mode of one provider: `prepare` outside the clock, the call inside."""

    def __init__(self, call: Callable[[Any], Any], case: Any, mode: str) -> None:
        self.call, self.case, self.mode = call, case, mode
        self.loss: Tensor | None = None

    def prepare(self) -> None:
        self.loss = None
        for leaf in self.case.leaves:
            leaf.grad = None
        if self.mode == "backward":
            self.loss = self.call(self.case)[0]

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.mode != "scoring"):
            loss = self.loss if self.mode == "backward" else self.call(self.case)[0]
        if self.mode in ("backward", "full"):
            assert loss is not None
            loss.backward()


def seconds(job: Job, device: torch.device) -> float:
    job.prepare()
    if device.type != "cuda":
        start = time.perf_counter()
        job()
        return time.perf_counter() - start
    torch.empty(256 << 20, dtype=torch.int8, device=device).zero_()  # the L2 cache, cold
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(jobs: dict[str, Job], args: Any) -> dict[str, list[float] | Failure]:
    """Seconds of every job, sampled in rounds; a job that fails leaves the rounds."""
    samples: dict[str, Any] = {name: [] for name in jobs}
    for turn in range(-args.warmup, args.repeats):
        alive = [name for name in jobs if not isinstance(samples[name], Failure)]
        shift = turn % max(1, len(alive))
        order = (alive[shift:] + alive[:shift])[:: -1 if turn % 2 else 1]
        for name in order:
            spent = attempt(lambda j=jobs[name]: seconds(j, args.device), args.device)
            if isinstance(spent, Failure):
                samples[name] = spent
            elif turn >= 0:
                samples[name].append(spent)
            jobs[name].loss = None
    return samples


WATCHED = {"sm_mhz": "clocks.sm", "watts": "power.draw"}
"""Name here -> nvidia-smi's."""


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float | None]]:
    """Fill a record, when the block ends, with medians of clock and power while it ran, and the
    clock's lowest, of ten samples a second; None where nvidia-smi is missing or tells nothing."""
    found: dict[str, float | None] = dict.fromkeys((*WATCHED, "sm_mhz_low"))
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        yield found
        return
    query = [program, f"--query-gpu={','.join(WATCHED.values())}", "--format=csv,noheader,nounits"]
    # By uuid: nvidia-smi counts the devices that CUDA_VISIBLE_DEVICES hides too.
    query += [f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", "--loop-ms=100"]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(query, stdout=out, stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
            out.seek(0)
            samples = dict(zip(WATCHED, zip(*map(numbers, out), strict=False), strict=False))
            for name, values in samples.items():
                known = [value for value in values if value is not None]
                found[name] = statistics.median(known) if known else None
            found["sm_mhz_low"] = min(filter(None, samples.get("sm_mhz", ())), default=None)


def numbers(line: str) -> list[float | None]:
    """Of a line of nvidia-smi's, which may hold [N/A]."""
    fields = [field.strip() for field in line.split(",")]
    return [float(f) if f.replace(".", "", 1).isdigit() else None for f in fields]


def peak_bytes(job: Job, device: torch.device) -> int:
    """Bytes that one run adds at its highest to what was alive before it."""
    job.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    # Not torch.profiler.profile: it imports Inductor (seconds), and its events want a JSON of them.
    with torch.autograd.profiler.profile(profile_memory=True) as taken:
        job()
    assert taken.kineto_results is not None
    events = [e for e in taken.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events)
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


class _Operations(TorchDispatchMode):
    """Counts what is dispatched and is neither a view nor an allocation."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        returns = (x.alias_info for x in func._schema.returns)
        view = any(alias is not None and not alias.is_write for alias in returns)
        self.count += not view and "empty" not in func._schema.name
        return func(*args, **(kwargs or {}))


def launches(job: Job, device: torch.device) -> int:
    """Work that one run hands to the device: kernels and copies on CUDA, operations on a CPU."""
    job.prepare()
    if device.type != "cuda":
        with _Operations() as operations:
            job()
        return operations.count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize(device)
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profile.events() or ())


def useful_flop(provider: Provider, case: Any, mode: str) -> float | None:
    """Of the mode, at 2 R D V a GEMM with R rows kept; None where nothing is computed."""
    if not isinstance(case, Case):
        return None
    one_pass = case.op in provider.one_pass
    gemms = {"forward": 3 if one_pass else 1, "backward": 0 if one_pass else 2}
    count = {**gemms, "full": 3, "scoring": 1}[mode]
    return 2.0 * count * case.kept.sum().item() * case.weight.numel() or None


def mm(case: Case, times: int = 1, out: Tensor | None = None) -> tuple[None, Tensor]:
    """Of one logits GEMM, `times` over; the results before the last are freed as they are made."""
    for _ in range(times - 1):
        torch.mm(case.hiddens[0][:MM_ROWS], case.weight.T, out=out)
    return None, torch.mm(case.hiddens[0][:MM_ROWS], case.weight.T, out=out)


def logits_buffer(case: Case) -> Tensor | None:
    """Where torch.mm writes on a CPU, whose fresh pages would count as the GEMM's time. None on
    CUDA: its allocator hands the same memory out again."""
    if case.weight.is_cuda:
        return None
    return case.weight.new_empty(min(MM_ROWS, case.hiddens[0].shape[0]), case.weight.shape[0])


def mm_times(jobs: dict[str, Job], args: Any) -> int:
    """How often torch.mm must run to last as long as the median job, by the last warm-up round.

    With `args.warmup` 0 or 1 it is one more round.
    """
    once = argparse.Namespace(device=args.device, warmup=max(0, args.warmup - 1), repeats=1)
    spent = {k: v[0] for k, v in interleaved(jobs, once).items() if isinstance(v, list)}
    single = spent.pop("torch.mm", None)
    if single is None or not spent:
        return 1
    return max(1, round(statistics.median(spent.values()) / single))


def measure(providers: Sequence[Provider], case: Any, mode: str, args: Any) -> list[dict[str, Any]]:
    """Rows of one table: quantiles, rate, share of the GEMM rate, memory."""
    cases = {p.name: case.uniform() if p.mean_only else case for p in providers}
    jobs = {p.name: Job(p.call, cases[p.name], mode) for p in providers}
    times, rounds = 1, argparse.Namespace(**vars(args))
    if isinstance(case, Case):
        single = functools.partial(mm, out=logits_buffer(case))
        jobs["torch.mm"] = Job(single, case, "scoring")
        # These rounds are the warm-up: on a CPU each takes ten seconds.
        times, rounds.warmup = mm_times(jobs, args), 0
        jobs["torch.mm"] = Job(functools.partial(single, times=times), case, "scoring")
    with watched(args.device) as seen:
        samples = interleaved(jobs, rounds)
    mm_rate = None
    if isinstance(gemm := samples.pop("torch.mm", None), list):
        flop = 2.0 * min(MM_ROWS, case.hiddens[0].shape[0]) * case.weight.numel()
        mm_rate = times * flop / quantiles(gemm)[1]
    rows = []
    for provider in providers:
        spent = samples[provider.name]
        if isinstance(spent, Failure):
            rows.append({"provider": provider.name, **vars(spent)})
            continue
        flop, (p20, p50, p80) = useful_flop(provider, case, mode), quantiles(spent)
        peak = attempt(lambda j=jobs[provider.name]: peak_bytes(j, args.device), args.device)
        peak = None if isinstance(peak, Failure) else peak
        kept = case.hiddens if provider.accumulates else case.leaves
        made = sum(x.nbytes for x in kept) if mode == "full" else 0
        row: dict[str, Any] = {"provider": provider.name, "status": "ok", **seen}
        row |= {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80}
        row["tflops"] = flop and flop / p50 / 1e12
        row["percent_of_mm"] = flop and mm_rate and 100 * flop / p50 / mm_rate
        row["peak_mib"] = None if peak is None else peak / 2**20
        row["transient_mib"] = None if peak is None else max(0, peak - made) / 2**20
        if provider.ops == GROUP:
            row["launches"] = launches(jobs[provider.name], args.device)
        rows.append(row)
    eager = next((r for r in rows if r["provider"] == EAGER and r["status"] == "ok"), {})
    for row in rows:
        for ratio, of in (("time_of_eager", "p50_ms"), ("peak_of_eager", "peak_mib")):
            row[ratio] = row[of] / eager[of] if row.get(of) and eager.get(of) else None
    return rows


def quantiles(samples: Sequence[float]) -> list[float]:
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()


# --- the run ------------------------------------------------------------------------------------


def case_of(op: str, gate: float | None, shape: Sequence[int], args: Any) -> Case | GroupCase:
    if op in PER_TOKEN:
        return head_case(op, shape, gate, args)
    return group_case(op, shape, args)


def run_op(
    op: str, args: Any, console: Console, keep: Callable[[Sequence[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Correctness of every provider, printed; then, of those within budget, time and memory.

    `keep` is given all records after each table: who is stopped for time loses one at most.
    """
    records: list[dict[str, Any]] = []
    fitting: list[Provider] = []
    for provider in PROVIDERS:
        if args.providers and provider.name not in args.providers:
            continue
        reason = unavailable(provider, op, args.shape, args)
        if reason is None:
            fitting.append(provider)
        elif not reason.startswith("does not compute"):
            row = {"provider": provider.name, "status": "skipped", "reason": reason}
            records.append(record(op, args, row))
    for gate in args.gates if op == "two_stream" else (None,):
        build = functools.partial(case_of, op, gate, args=args)
        tried = check(fitting, build((min(args.check_rows, args.shape[0]), *args.shape[1:])), args)
        for name, (status, reason, gaps) in tried.items():
            extra = dict(zip(ERRORS, gaps, strict=True))
            row = {"provider": name, "status": status, "reason": reason, "gate": gate, **extra}
            records.append(record(op, args, row | {"mode": "correctness"}))
        checked = [r for r in records if r["mode"] == "correctness" and r["gate"] == gate]
        show_correctness(op, gate, checked, args, console)
        good = [p for p in fitting if tried[p.name][0] == "ok"]
        for rows in args.sweep if gate in (None, 0.5) else args.shape[:1]:
            case = build((rows, *args.shape[1:]))
            for mode in MODES[op] if rows == args.shape[0] else (main_mode(op),):
                if mode not in (args.modes or (main_mode(op),)):
                    continue
                console.message(f"timing {op}{gate_words(gate)}, {mode}, N = {rows}")
                for row in measure(good, case, mode, args):
                    extra = {"mode": mode, "gate": gate, "rows": rows}
                    records.append(record(op, args, row | extra))
                keep(records)
    for line in skipped_words(records):
        console.message(line)
    return records


def profile(records: Sequence[dict[str, Any]], args: Any) -> str:
    """A Chrome trace of one run of each timed provider: its op's main mode, at the largest N.

    Each run is a range with its name, all in `args.profile`; says where it is.
    """
    cuda = args.device.type == "cuda"
    with torch.autograd.profiler.profile(use_device="cuda" if cuda else None) as taken:
        for op, gate in dict.fromkeys((r["op"], r["gate"]) for r in records if r["p50_ms"]):
            table = (op, gate, main_mode(op), args.shape[0])
            keys = ("op", "gate", "mode", "rows")
            timed = [r for r in records if r["p50_ms"] and tuple(r[k] for k in keys) == table]
            case = case_of(op, gate, args.shape, args)
            names = {r["provider"] for r in timed}
            for provider in (p for p in PROVIDERS if p.name in names and op in p.ops):
                mine = case.uniform() if provider.mean_only else case
                job = Job(provider.call, mine, main_mode(op))
                job.prepare()
                with torch.profiler.record_function(f"{op}{gate_words(gate)}: {provider.name}"):
                    job()
                    if cuda:  # the range ends with its kernels
                        torch.cuda.synchronize(args.device)
    args.profile.parent.mkdir(parents=True, exist_ok=True)
    taken.export_chrome_trace(str(args.profile))
    return f"wrote {args.profile}, a trace for https://ui.perfetto.dev or chrome://tracing"


def record(op: str, args: Any, row: dict[str, Any]) -> dict[str, Any]:
    size = dict(zip(("rows", "hidden", "vocabulary"), args.shape, strict=True))
    size |= {"dtype": args.dtype_name}
    if op in GROUP:  # no head, and always float32
        size |= {"hidden": None, "vocabulary": None, "dtype": "fp32"}
    return {**dict.fromkeys(FIELDS), "op": op, **size, **row}


def arguments(argv: Sequence[str] | None) -> Any:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    every = list(MODES) if cuda else ["weighted"]
    parser.add_argument("--op", nargs="+", choices=list(MODES), default=every)
    parser.add_argument("--shape", help=f"N,D,V or {', '.join(SHAPES)}; by default, by device")
    parser.add_argument("--sweep", nargs="+", type=int, help="values of N; N/16, N/4 and N")
    parser.add_argument("--gates", nargs="+", type=float, default=list(GATES), help="two_stream")
    parser.add_argument(
        "--modes", nargs="+", choices=HEAD_MODES, help="CUDA: all; CPU: the whole pass alone"
    )
    parser.add_argument("--providers", nargs="+", help="names; all by default")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16" if cuda else "fp32")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)
    parser.add_argument("--warmup", type=int, default=3 if cuda else 1)
    parser.add_argument("--check-rows", type=int, help="rows of the correctness run; CPU: 256")
    parser.add_argument("--chunk-mib", type=int, help="chunk_bytes of backend torch")
    parser.add_argument("--memory-gib", type=float, help="most for full logits; CPU: half of free")
    parser.add_argument("--profile", type=Path, help="a Chrome trace of one run of each provider")
    parser.add_argument("--compare", type=Path, help="an earlier JSON: adds p50 / its p50")
    parser.add_argument("--out", type=Path, default=Path("runs/kernel_bench.json"))
    args = parser.parse_args(argv)
    if unknown := {*(args.providers or ())} - {p.name for p in PROVIDERS}:
        names = ", ".join(repr(p.name) for p in PROVIDERS)
        parser.error(f"--providers: got {', '.join(sorted(unknown))}, expected some of {names}")
    args.device = torch.device("cuda" if cuda else "cpu")
    args.dtype_name, args.dtype = args.dtype, DTYPES[args.dtype]
    for option, path in (("--out", args.out), ("--profile", args.profile)):
        if path is not None and path.is_dir():
            parser.error(f"{option}: got the folder {path}, expected a file in it")
    args.modes = args.modes or (list(HEAD_MODES) if cuda else None)
    args.note, args.shape = shape_of(args.shape, cuda)
    rows = args.shape[0]
    smaller = [max(SEQUENCES, n - n % SEQUENCES) for n in (rows // 16, rows // 4)]
    args.sweep = sorted({*(args.sweep or smaller), rows})
    if any(n < SEQUENCES or n % SEQUENCES for n in args.sweep):
        parser.error(f"N: got {args.sweep}, expected multiples of 8: the rows are 8 paths")
    args.check_rows = args.check_rows or (args.shape[0] if cuda else 256)
    if args.memory_gib is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        args.memory_gib = float("inf") if cuda else free / 2
    return args


def shape_of(text: str | None, cuda: bool) -> tuple[str, tuple[int, ...]]:
    """(what was changed, if anything; N, D, V). A CPU takes a model's shape at an eighth."""
    if text is None:
        sized = "no GPU: about two minutes at N, D, V = {}, {}, {}; --op and --modes take more"
        return ("", SHAPES["qwen2.5-7b"]) if cuda else (sized.format(*CPU_SHAPE), CPU_SHAPE)
    if text in SHAPES and not cuda:
        return f"no GPU: every dimension of {text} / 8", tuple(n // 8 for n in SHAPES[text])
    if text in SHAPES:
        return "", SHAPES[text]
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise SystemExit(f"--shape: got {text!r}, expected N,D,V or one of {', '.join(SHAPES)}")
    return "", tuple(map(int, parts))


@functools.cache
def distributions() -> Any:
    """Module -> its distributions. Reads every installed package: 0.15 s of processor time."""
    return metadata.packages_distributions()


def version(module: str) -> str | None:
    """Of the distribution that a peer's module comes from; None if it is not installed."""
    found = distributions().get(module.partition(".")[0])
    return metadata.version(found[0]) if found else None


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: whoever reads it may have stopped this process while it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(".json.part")
    made.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    made.replace(path)


def plotted_if_possible(draw: Callable[[Any, Path], None], records: Any, path: Path) -> str:
    """What to say of the picture: a borrowed machine may have no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return "; no picture: matplotlib is not installed"
    draw(records, path)
    return ", .png"


def device_words(place: dict[str, Any]) -> str:
    cpu = f"a CPU, {place['threads']} threads" if place["device"] == "cpu" else place["device"]
    return f"{cpu}, torch {place['torch']}"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when one of our own backends failed or missed its budget."""
    args = arguments(argv)
    console = Console()
    place = environment()
    console.message(f"{place['device']}, torch {place['torch']}, commit {place['commit']}")
    if args.note:
        console.message(args.note)
    place["peers"] = {p.needs: version(p.needs) for p in PROVIDERS if p.needs and not p.ours}
    words = ["python", "benchmarks/kernel_bench.py", *(sys.argv[1:] if argv is None else argv)]
    protocol = {"warmup": args.warmup, "repeats": args.repeats, "check_rows": args.check_rows}
    result = {"command": shlex.join(words), "environment": place, "protocol": protocol}
    records: list[dict[str, Any]] = []
    for op in args.op:
        before = tuple(records)
        keep = lambda made, b=before: write_json(args.out, {**result, "records": [*b, *made]})  # noqa: E731
        records += run_op(op, args, console, keep)
    told = compare(records, args.compare) if args.compare else None
    show_times(records, args, console)
    if told:
        console.message(told)
    write_json(args.out, {**result, "records": records})
    with args.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(records)
    plotted = "; no picture: nothing was timed"
    if any(r["p50_ms"] for r in records):
        draw = functools.partial(plot, device=device_words(place))
        plotted = plotted_if_possible(draw, records, args.out.with_suffix(".png"))
    if args.profile is not None:
        console.message(profile(records, args))
    console.message(f"wrote {args.out}, .csv{plotted}")
    for line in closing_words(records, PROVIDERS, args.shape[0]):
        console.message(line)
    console.close()
    our_names = {p.name for p in PROVIDERS if p.ours}
    bad = [r for r in records if r["status"] in ("refused", "failed")]
    return int(any(r["provider"] in our_names for r in bad))


if __name__ == "__main__":
    sys.exit(main())

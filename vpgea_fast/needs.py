"""What a run needs of its devices and of its time, as lines: memory, vLLM's share, hours, traffic.

The numbers come from `estimate` and `durations.py`; this room says them, and what to change
where they do not fit.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vpgea_fast import attention
from vpgea_fast.check import Target, draws, longest
from vpgea_fast.config import Config
from vpgea_fast.data import Benchmark
from vpgea_fast.durations import HOUR, Durations, Sizes, card_of, durations, rates_of
from vpgea_fast.estimate import (
    GIB,
    RESERVE,
    EngineMemory,
    Layout,
    MemoryEstimate,
    ModelShape,
    communication,
    estimate_memory,
    model_shape,
    optimizer_bytes,
)
from vpgea_fast.metrics import model_flops
from vpgea_fast.rollout.factory import positions
from vpgea_fast.types import PromptedQuestion

AWAKE = ("sampling", "scoring")
"""Phases in which a vLLM in the training processes is awake."""
HOST_PROCESS = 4 * GIB
"""Host memory of a process by itself: Python, CUDA context, pinned buffers. A choice, not a
measurement."""
EVALUATION_SHARE = 0.10
"""Above it an evaluation slows the run more than it tells."""

Say = Callable[[str], object]


def show_needs(
    cfg: Config,
    model_config: Any,
    questions: Sequence[PromptedQuestion],
    benchmarks: Mapping[str, Benchmark],
    on: Target,
    say: Say,
    *,
    stated: Mapping[str, float],
) -> None:
    """Say memory of a device and of a node, hours and traffic, and what to set where a number is
    too large. `stated` rates replace those of the card (see `durations.Rates`)."""
    prompt, row = longest(cfg, questions)
    context = max(asked + new for _, asked, new in draws(cfg, questions, benchmarks))
    shape = model_shape(model_config)
    estimate = estimate_memory(
        shape,
        cfg,
        world=on.processes,
        cuda=on.cuda,
        context=context,
        prompt=prompt,
        device_bytes=on.device_bytes,
    )
    say(
        f"memory estimate for one of {on.processes} devices: {shape.parameters / 1e6:.1f} M "
        f"parameters, {cfg.train.micro_batch_tokens} packed tokens a forward, "
        f"{cfg.rollout.max_batch} paths of up to {context} tokens side by side; GiB:"
    )
    _device(estimate, on, say)
    _host(cfg, estimate, on, say)
    sizes = _sizes(
        cfg, model_config, shape, estimate, questions=questions, benchmarks=benchmarks, on=on
    )
    if estimate.engine is not None:
        room = min(
            cfg.vllm.context or positions(cfg),
            attention.positions(model_config)[0] or sys.maxsize,
        )
        _cache(
            cfg,
            estimate.engine,
            context=context,
            room=room,
            prompt=sizes.prompt,
            on=on,
            say=say,
        )
        if on.cuda:
            _share(cfg, estimate, engine=estimate.engine, room=room, on=on, say=say)
    _accuracy(cfg, sizes, _hours(cfg, sizes, on, say, stated=stated), say)
    _traffic(cfg, shape, row=row, on=on, say=say)


def _device(estimate: MemoryEstimate, on: Target, say: Say) -> None:
    """A column a phase, a row a part; the peak, and what to lower when it is too high."""
    say(f"  {'':<17}" + "".join(f"{phase:>11}" for phase in estimate.phases))
    for part in estimate.parts:
        sizes = [parts.get(part, 0) / GIB for parts in estimate.phases.values()]
        if any(sizes):
            say(f"  {part:<17}" + "".join(f"{size:11.3f}" for size in sizes))
    totals = [sum(parts.values()) / GIB for parts in estimate.phases.values()]
    say(f"  {'total':<17}" + "".join(f"{size:11.3f}" for size in totals))
    usable = on.device_bytes * (1 - RESERVE) if on.cuda else on.device_bytes
    which = "this device" if on.here else "such a device"
    say(
        f"  peak {estimate.peak / GIB:.3f} GiB ({estimate.phase}); {which} holds "
        f"{on.device_bytes / GIB:.3f} GiB"
        + (f", {usable / GIB:.3f} beside CUDA, NCCL and gaps" if on.cuda else "")
    )
    if estimate.peak > usable:
        part, remedy = estimate.lower()
        say(f"  more than it holds; of what can be set {part!r} is largest: {remedy},")
        say("  or take larger devices")


def _host(cfg: Config, estimate: MemoryEstimate, on: Target, say: Say) -> None:
    """Host memory of a process by purpose, and of a node. On a CPU the device's table is it."""
    for part, size in estimate.host.items():
        say(f"  host memory of a process, {part}: {size / GIB:.3f} GiB")
    if not on.cuda:
        return
    own, count = sum(estimate.host.values()) + HOST_PROCESS, min(on.processes, on.node)
    needed = own * count
    say(
        f"  host memory of a node: {count} x {own / GIB:.1f} = {needed / GIB:.1f} GiB, of them "
        f"{HOST_PROCESS / GIB:.0f} a process for itself (a choice)"
    )
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if on.here and needed > there:
        ways = ["parallel.cpu_offload false"] * cfg.parallel.cpu_offload
        ways += ["checkpoint.background false"] * cfg.checkpoint.background
        say(
            f"  more than this machine's {there / GIB:.1f} GiB; "
            + " or ".join([*ways, "a machine with more"])
        )


def _sizes(
    cfg: Config,
    model_config: Any,
    shape: ModelShape,
    estimate: MemoryEstimate,
    *,
    questions: Sequence[PromptedQuestion],
    benchmarks: Mapping[str, Benchmark],
    on: Target,
) -> Sizes:
    lay, engine = Layout(shape, cfg, on.processes, on.cuda), estimate.engine
    lengths = [(q.student_ids.numel() + q.teacher_ids.numel()) / 2 for q in questions]
    group = cfg.vllm.tensor_parallel if cfg.colocated else 1
    token = 2 * len(shape.blocks) * shape.key * lay.forward
    asked = sum(len(benchmark.questions) for benchmark in benchmarks.values())
    return Sizes(
        flops=model_flops(model_config),
        parameters=shape.parameters,
        states=lay.held * lay.master + optimizer_bytes(lay),
        # On one device of an engine; the hf engine's own cache is sized by rollout.max_batch.
        token=engine.token * group if engine else token,
        cache=engine.tokens if engine else sys.maxsize,
        prompt=sum(lengths) / len(lengths) if lengths else cfg.data.max_prompt_tokens,
        evaluated=asked * (cfg.eval.samples + cfg.eval.greedy),
        world=on.processes,
    )


def _hours(
    cfg: Config, sizes: Sizes, on: Target, say: Say, *, stated: Mapping[str, float]
) -> Durations | None:
    """Say a table of the phases of a mean step and of the run, with the rates that it rests on."""
    card = on.name or card_of(on.device_bytes / GIB) if on.cuda else "CPU"
    rates = rates_of(card, stated=stated)
    if rates is None:
        what = f"a {card}" if card else f"devices of {on.device_bytes / GIB:.0f} GiB"
        say(
            f"hours: the rates of {what} are not known; state them, e.g. --rates "
            "tflops=312,bandwidth=2.04 (1e12 operations and bytes per second)"
        )
        return None
    taken = card if on.name or not on.cuda else f"taken for {card} by their size"
    say(f"time of a run by stated rates, none measured here (--rates KEY=NUMBER, ...); {taken}:")
    unused = {"offload_mfu": not cfg.parallel.cpu_offload, "train_mfu": cfg.parallel.cpu_offload}
    unused |= {"hf_decode": cfg.engine.name != "hf", "decode": cfg.engine.name == "hf"}
    used = {key: value for key, value in vars(rates).items() if value and not unused.get(key)}
    say("  " + ", ".join(f"{key} {value:g}" for key, value in used.items()))
    found = durations(cfg, rates, sizes)
    whole, run = sum(found.step.values()), found.run
    say(f"  {'':<17}{'s per step':>11}{'share':>8}{'hours':>9}{'GPU-hours':>11}")
    rows = [(phase, seconds, run[phase]) for phase, seconds in found.step.items() if run[phase]]
    for name, seconds, spent in [*rows, ("total", whole, sum(run.values()))]:
        hours, share = spent / HOUR, seconds / whole
        say(f"  {name:<17}{seconds:11.1f}{share:8.1%}{hours:9.1f}{hours * on.processes:11.1f}")
    if cfg.engine.name == "vllm" and not cfg.colocated:
        say("  engine.server: its devices are taken for as many and such as train")
    return found


def _accuracy(cfg: Config, sizes: Sizes, found: Durations | None, say: Say) -> None:
    """Where the run sees whether answers are right, and what of its time the evaluations take."""
    seen = (
        "answers are drawn and judged"
        if cfg.rollout.full_answer
        else ("not seen (rollout.full_answer false): a collapse looks like success")
    )
    say(f"accuracy: at every step {seen}")
    if not sizes.evaluated:
        say("  held out: none (eval.data is empty, or could not be asked for here)")
        return
    when = f"every {cfg.eval.every} steps" if cfg.eval.every else "before and after, not between"
    share = ""
    if found is not None:
        share = f", {found.evaluation:.0f} s each, {found.evaluation_share:.1%} of the step time"
    say(f"  held out: {sizes.evaluated} answers {when}{share}")
    if found is not None and found.evaluation_share > EVALUATION_SHARE:
        say(
            f"  above {EVALUATION_SHARE:.0%}: raise eval.every, or lower eval.limit, eval.samples "
            "or eval.max_new_tokens"
        )


def _is_share(cfg: Config, on: Target) -> bool:
    """Whether vLLM takes a share of the device, and the rest of it is its KV cache."""
    return on.cuda and cfg.vllm.kv_cache_gib is None


def _cache(
    cfg: Config,
    engine: EngineMemory,
    *,
    context: int,
    room: int,
    prompt: float,
    on: Target,
    say: Say,
) -> None:
    """How many paths vLLM's KV cache holds; prompts that paths have in common are not counted."""
    key = "engine.gpu_memory" if _is_share(cfg, on) else "engine.kv_cache_gib"
    mean = max(1, round(prompt + cfg.rollout.max_new_tokens / 2))
    paths, objective = engine.tokens // mean, cfg.objective
    step = cfg.train.questions_per_step * (objective.posterior_paths + objective.prior_paths)
    wanted = min(cfg.rollout.max_batch, -(-step * cfg.vllm.tensor_parallel // on.processes))
    say(
        f"  vLLM's KV cache: {engine.cache / GIB:.3f} GiB, {engine.token} bytes a token, "
        f"{engine.tokens} tokens: {engine.tokens // context} paths of {context} at once, or "
        f"{paths} of {mean} (half of rollout.max_new_tokens)"
    )
    if engine.tokens < room:
        say(
            f"  vLLM will not start: one path may have {room} tokens (engine.context); raise "
            f"{key}, or lower engine.context and what may be drawn"
        )
    elif paths < wanted:
        say(
            f"  fewer than the {wanted} that a step draws side by side (rollout.max_batch "
            f"{cfg.rollout.max_batch}): the rest wait or are computed again: slower, not wrong; "
            f"raise {key}, or lower rollout.max_batch"
        )


def _share(
    cfg: Config, estimate: MemoryEstimate, engine: EngineMemory, room: int, on: Target, say: Say
) -> None:
    """Whether vLLM fits beside the trainer's states, and how large it may be."""
    usable, device = on.device_bytes * (1 - RESERVE), on.device_bytes
    awake = {name: sum(estimate.phases[name].values()) for name in AWAKE if name in estimate.phases}
    phase = max(awake, key=lambda name: awake[name])
    over, whole = awake[phase] - usable, engine.least + engine.cache
    if over > 0:
        say(
            f"  {phase}: vLLM's {whole / GIB:.3f} GiB beside {(awake[phase] - whole) / GIB:.3f} of "
            f"the trainer are {over / GIB:.3f} too many; "
            + _smaller(cfg, engine, over=over, room=room, on=on)
        )
    asked = cfg.vllm.gpu_memory * device  # vLLM asks for it at its start, whatever it will take
    free = usable - estimate.phases["sampling"]["weights"]
    if asked > free > 0 and not _is_share(cfg, on):
        say(
            f"  vLLM will not start: it asks for engine.gpu_memory ({asked / GIB:.3f} GiB) of free "
            f"memory also with engine.kv_cache_gib, and {free / GIB:.3f} are free; set "
            f"engine.gpu_memory to {_floor(free / device):.2f} or less"
        )


def _smaller(cfg: Config, engine: EngineMemory, over: float, room: int, on: Target) -> str:
    """What to set so that vLLM takes `over` bytes less and still starts."""
    if engine.cache - over < room * engine.token:
        return (
            f"without a KV cache it needs {engine.least / GIB:.3f}, one path of {room} tokens "
            f"{room * engine.token / GIB:.3f}: raise engine.tensor_parallel, take more processes, "
            "or let a server draw (engine.server)"
        )
    if _is_share(cfg, on):
        return (
            f"set engine.gpu_memory to {_floor(cfg.vllm.gpu_memory - over / on.device_bytes):.2f}"
        )
    return f"set engine.kv_cache_gib to {_floor((engine.cache - over) / GIB):.2f}"


def _floor(value: float) -> float:
    return math.floor(100 * value) / 100


def _traffic(cfg: Config, shape: Any, row: int, on: Target, say: Say) -> None:
    """Bytes of a step in which every path is as long as it can be."""
    objective, budget = cfg.objective, cfg.train.micro_batch_tokens
    rows = cfg.train.questions_per_step * (2 * objective.posterior_paths or objective.prior_paths)
    scored = cfg.train.questions_per_step * (objective.posterior_paths + objective.prior_paths)
    fit = max(1, budget // (row - 1)) * on.processes
    batches = -(-rows // fit)
    moved = communication(
        shape,
        cfg,
        world=on.processes,
        node=on.node,
        micro_batches=batches,
        scoring_batches=-(-scored // fit) if objective.scores_answers else 0,
        cuda=on.cuda,
    )
    if not moved:
        return
    say(
        f"traffic of one device in a step of at most {batches} micro-batches, GiB received "
        f"({on.node} devices a node):"
    )
    for kind, traffic in moved.items():
        say(
            f"  {kind:<17}{traffic.inside / GIB:11.3f} inside a node {traffic.between / GIB:11.3f} "
            f"between nodes {traffic.calls:7d} calls"
        )

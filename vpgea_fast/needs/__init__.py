"""What a run needs of its devices and of its time, as lines: memory, vLLM's share, hours, traffic.

The numbers come from `estimate` and `durations.py`. Here, and in hours.py, they are put into words,
with what to change where they do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vpgea_fast.check import Target, host_memory
from vpgea_fast.config import Config
from vpgea_fast.data import Benchmark
from vpgea_fast.durations import rollouts_of
from vpgea_fast.estimate import (
    GIB,
    RESERVE,
    EngineMemory,
    Layout,
    MemoryEstimate,
    choose,
    communication,
    estimate_memory,
)
from vpgea_fast.needs.hours import hours
from vpgea_fast.needs.plan import Plan, plan_of
from vpgea_fast.objectives import policy_rows, reference_rows, scores_answers
from vpgea_fast.types import PromptedQuestion

AWAKE = ("sampling", "scoring")
"""Phases in which a vLLM in the training processes is awake."""
HOST_PROCESS = 4 * GIB
"""Host memory of a process by itself: Python, CUDA context, pinned buffers. A choice, not a
measurement."""


def needs(
    cfg: Config,
    model_config: Any,
    questions: Sequence[PromptedQuestion],
    benchmarks: Mapping[str, Benchmark],
    *,
    on: Target,
    stated: Mapping[str, float],
) -> Iterator[str]:
    """Say the memory of a device and of a node, hours and traffic, and what to set where a number
    is too large. `stated` rates replace those of the card (see `durations.Rates`)."""
    plan = plan_of(cfg, model_config, questions, benchmarks=benchmarks, on=on)
    choice = choose(
        lambda: plan.shape,
        cfg,
        world=on.processes,
        cuda=on.cuda,
        context=plan.context,
        prompt=plan.prompt,
        device_bytes=on.device_bytes,
    )
    if choice.reason:
        yield choice.reason
    cfg = choice.made(cfg)
    plan = replace(plan, cfg=cfg)
    estimate = estimate_memory(
        plan.shape,
        cfg,
        world=on.processes,
        cuda=on.cuda,
        context=plan.context,
        prompt=plan.prompt,
        device_bytes=on.device_bytes,
    )
    yield (
        f"memory estimate for one of {on.processes} devices: {plan.shape.parameters / 1e6:.1f} M "
        f"parameters, {cfg.train.micro_batch_tokens} packed tokens a forward "
        f"({estimate.score_tokens} without gradients), "
        f"{cfg.rollout.max_batch} paths of up to {plan.context} tokens side by side; GiB:"
    )
    if cfg.two_policies:
        yield (
            "  of two models of this size: weights, gradients and moments of both; two hand-overs "
            "to the engine more in a step"
        )
    # From what stops a run at its start to what only makes it slow.
    yield from _device(estimate, on)
    yield from _host(plan, estimate)
    if estimate.engine is not None:
        yield from _cache(plan, estimate.engine, stated)
        if on.cuda:
            yield from _share(plan, estimate, estimate.engine)
    yield from hours(plan, estimate, stated)
    yield from _traffic(plan, estimate.score_tokens)


def _device(estimate: MemoryEstimate, on: Target) -> Iterator[str]:
    """Say memory with a column per phase and a row per part; the peak, and what to lower."""
    yield f"  {'':<17}" + "".join(f"{phase:>11}" for phase in estimate.phases)
    for part in estimate.parts:
        sizes = [parts.get(part, 0) / GIB for parts in estimate.phases.values()]
        if any(sizes):
            yield f"  {part:<17}" + "".join(f"{size:11.3f}" for size in sizes)
    totals = [sum(parts.values()) / GIB for parts in estimate.phases.values()]
    yield f"  {'total':<17}" + "".join(f"{size:11.3f}" for size in totals)
    # The reserve is for what torch does not allocate on a GPU: CUDA's context, NCCL's buffers.
    usable = on.device_bytes * (1 - RESERVE) if on.cuda else on.device_bytes
    which = "this device" if on.here else "such a device"
    yield (
        f"  peak {estimate.peak / GIB:.3f} GiB ({estimate.phase}); {which} holds "
        f"{on.device_bytes / GIB:.3f} GiB"
        + (f", {usable / GIB:.3f} beside CUDA, NCCL and gaps" if on.cuda else "")
    )
    if estimate.peak > usable:
        part, remedy = estimate.lower()
        yield f"  more than it holds; of what can be set {part!r} is largest: {remedy},"
        yield "  or take larger devices"


def _host(plan: Plan, estimate: MemoryEstimate) -> Iterator[str]:
    """Say host memory of a process by purpose, and of a node. On a CPU the table above is it."""
    cfg, on = plan.cfg, plan.on
    for part, size in estimate.host.items():
        yield f"  host memory of a process, {part}: {size / GIB:.3f} GiB"
    if not on.cuda:
        return
    # A child of its own brings a second Python and a second CUDA context.
    own = cfg.colocated and cfg.vllm.process == "own"
    itself = HOST_PROCESS * (2 if own else 1)
    each, count = sum(estimate.host.values()) + itself, min(on.processes, on.node)
    whole, moment = _moment(plan, estimate.host)
    needed = each * count + whole
    yield (
        f"  host memory of a node: {count} x {each / GIB:.1f}"
        + (f" + {whole / GIB:.1f} {moment}" if whole else "")
        + f" = {needed / GIB:.1f} GiB, of them {itself / GIB:.0f} a process for itself"
        + (" and its vLLM" if own else "")
        + " (a choice)"
    )
    yield (
        "  not in it: the page cache of the model's files and of checkpoints, the checkers' "
        f"{cfg.verify.workers} processes for each, data"
    )
    # Only of the machine at hand: that of a planned node is not known.
    there = host_memory()
    if on.here and needed > there:
        ways = ["parallel.cpu_offload false"] * cfg.parallel.cpu_offload
        ways += ["checkpoint.background false"] * cfg.checkpoint.background
        yield (
            f"  more than this machine's {there / GIB:.1f} GiB; "
            + " or ".join([*ways, "a machine with more"])
        )


def _moment(plan: Plan, host: Mapping[str, int]) -> tuple[int, str]:
    """Count the bytes that a node holds for a while beside `host` of each process; say when."""
    cfg, on = plan.cfg, plan.on
    lay = Layout(plan.shape, cfg, on.processes, on.cuda)
    count = min(on.processes, on.node)
    # A model is read tensor by tensor, but a whole one without offload, which is made in host
    # memory first. Process 0 collects what it exports, when there are no gradients.
    in_parts = cfg.parallel.in_parts(on.processes, cuda=on.cuda)
    loading = 0 if in_parts else count * plan.shape.parameters * lay.master
    export = plan.shape.parameters * lay.forward if cfg.checkpoint.export else 0
    export = max(0, export - count * host.get("gradients", 0))
    return max((loading, "while it loads"), (export, "for the export"))


def _cache(plan: Plan, engine: EngineMemory, stated: Mapping[str, float]) -> Iterator[str]:
    """Say how many paths vLLM's KV cache holds, and whether a step draws more at a time."""
    cfg = plan.cfg
    key = "engine.gpu_memory" if plan.is_share else "engine.kv_cache_gib"
    given = {name: stated[name] for name in ("tokens", "answer") if name in stated}
    step = rollouts_of(cfg, prompt=plan.mean_prompt, **given)
    # By the mean: vLLM takes blocks as paths grow, and not the longest path's room at once.
    paths = int(engine.tokens / step.held)
    # Paths of one engine, rounded up: each has its share of the processes.
    mine = -(-step.paths * cfg.vllm.tensor_parallel // plan.on.processes)
    demand = min(cfg.rollout.max_batch, mine)
    yield (
        f"  vLLM's KV cache: {engine.cache / GIB:.3f} GiB, {engine.token} bytes a token, "
        f"{engine.tokens} tokens: {engine.tokens // plan.context} paths of {plan.context} at once, "
        f"or {paths} of mean length ({step.mean:.0f}, and {step.shared} share a prompt)"
    )
    if engine.tokens < plan.room:
        yield (
            f"  vLLM will not start: one path may have {plan.room} tokens (engine.context); raise "
            f"{key}, or lower engine.context and what may be drawn"
        )
    elif paths < demand:
        yield (
            f"  fewer than the {demand} that a step draws side by side (rollout.max_batch "
            f"{cfg.rollout.max_batch}): the rest wait or are computed again: slower, not wrong; "
            f"raise {key}, or lower rollout.max_batch"
        )


def _share(plan: Plan, estimate: MemoryEstimate, engine: EngineMemory) -> Iterator[str]:
    """Say where vLLM does not fit beside the trainer's states, and how large it may be."""
    usable, device = plan.on.device_bytes * (1 - RESERVE), plan.on.device_bytes
    # Its cache stands beside whatever the trainer keeps while vLLM is awake.
    awake = {name: sum(estimate.phases[name].values()) for name in AWAKE if name in estimate.phases}
    phase = max(awake, key=lambda name: awake[name])
    over, whole = awake[phase] - usable, engine.least + engine.cache
    if over > 0:
        yield (
            f"  {phase}: vLLM's {whole / GIB:.3f} GiB beside {(awake[phase] - whole) / GIB:.3f} of "
            f"the trainer are {over / GIB:.3f} too many; " + _smaller(plan, engine, over)
        )
    claim = plan.cfg.vllm.gpu_memory * device  # at its start, whatever it will take
    free = usable - sum(estimate.phases["sampling"].get(n, 0) for n in ("weights", "masters"))
    if claim > free > 0 and not plan.is_share:
        yield (
            f"  vLLM will not start: it asks for engine.gpu_memory ({claim / GIB:.3f} GiB) of free "
            f"memory also with engine.kv_cache_gib, and {free / GIB:.3f} are free; set "
            f"engine.gpu_memory to {_floor(free / device):.2f} or less"
        )


def _smaller(plan: Plan, engine: EngineMemory, over: float) -> str:
    """Say what to set so that vLLM takes `over` bytes less and still starts."""
    # vLLM refuses to start where its cache cannot hold one path of the longest kind.
    if engine.cache - over < plan.room * engine.token:
        return (
            f"without a KV cache it needs {engine.least / GIB:.3f}, one path of {plan.room} tokens "
            f"{plan.room * engine.token / GIB:.3f}: raise engine.tensor_parallel, take more "
            "processes, or let a server draw (engine.server)"
        )
    if plan.is_share:
        share = plan.cfg.vllm.gpu_memory - over / plan.on.device_bytes
        return f"set engine.gpu_memory to {_floor(share):.2f}"
    return f"set engine.kv_cache_gib to {_floor((engine.cache - over) / GIB):.2f}"


def _floor(value: float) -> float:
    # Down: what is printed is set, and must fit.
    return math.floor(100 * value) / 100


def _traffic(plan: Plan, score_tokens: int) -> Iterator[str]:
    """Say the bytes that one device receives in a step whose paths are all as long as can be."""
    cfg, on = plan.cfg, plan.on
    objective, questions = cfg.objective, cfg.train.questions_per_step
    draws = objective.draws()
    # At most: every posterior path is trained under both prompts.
    rows = 2 * draws.posterior or draws.prior
    behind = draws.targets + draws.answer_rows
    rows += (draws.posterior or draws.prior) * behind + draws.prior * draws.joint
    rows *= questions * draws.trained
    scored = questions * draws.paths if scores_answers(objective) else 0
    beside, held = (questions * rows(objective) for rows in (policy_rows, reference_rows))
    # Rows of the greatest length that one forward of all devices has room for.
    fit, fit_scored = (
        max(1, budget // (plan.row - 1)) * on.processes
        for budget in (cfg.train.micro_batch_tokens, score_tokens)
    )
    batches = -(-rows // fit)
    moved = communication(
        plan.shape,
        cfg,
        world=on.processes,
        node=on.node,
        micro_batches=batches,
        # Before the update the policy scores the rows that are held to the reference, too.
        scoring_batches=sum(-(-count // fit_scored) for count in (scored, beside, held)),
        reference_batches=-(-held // fit_scored),
        cuda=on.cuda,
    )
    # One process, or one that is not sharded, exchanges nothing.
    if not moved:
        return
    yield (
        f"traffic of one device in a step of at most {batches} micro-batches, GiB received "
        f"({on.node} devices a node):"
    )
    for kind, traffic in moved.items():
        yield (
            f"  {kind:<17}{traffic.inside / GIB:11.3f} inside a node {traffic.between / GIB:11.3f} "
            f"between nodes {traffic.calls:7d} calls"
        )

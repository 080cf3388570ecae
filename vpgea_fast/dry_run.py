"""What a run would see and need, before any GPU work: `--dry-run` shows prompts, lengths, memory
and traffic, and ends with the error that the run would end with."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from huggingface_hub import is_offline_mode

from vpgea_fast import attention, hub
from vpgea_fast.check import Target, check_config, draws, longest, target
from vpgea_fast.config import Config, DataConfig, EvalConfig, printable
from vpgea_fast.data import (
    Benchmark,
    DataError,
    Judge,
    LoadedQuestions,
    load_training,
    step_questions,
)
from vpgea_fast.estimate import (
    GIB,
    RESERVE,
    EngineMemory,
    MemoryEstimate,
    communication,
    estimate_memory,
    model_shape,
)
from vpgea_fast.intake import ALONE, open_text, read
from vpgea_fast.metrics import Console
from vpgea_fast.prompts import length_report
from vpgea_fast.rollout.factory import positions
from vpgea_fast.types import PromptedQuestion, Question
from vpgea_fast.verify import Verifier

ITEMS = 8
SAMPLE_QUESTIONS = tuple(
    Question(id=f"sample-{i}", text=text, answer=answer)
    for i, (text, answer) in enumerate(
        [
            ("What is 17 + 28?", "45"),
            ("Solve 3x = 12 for x.", "4"),
            ("What is the area of a 3 by 5 rectangle?", "15"),
            ("How many primes are below 20?", "8"),
            ("What is 1/2 + 1/4?", r"\frac{3}{4}"),
            ("Expand (x + 1)^2.", "x^2+2x+1"),
            ("What is the sum of the first 10 positive integers?", "55"),
            ("What is 2^10?", "1024"),
        ]
    )
)
AWAKE = ("sampling", "scoring")
"""Phases in which a vLLM in the training processes is awake."""

Say = Callable[[str], object]


def dry_run(cfg: Config, tell: Say = print, *, on: Target | None = None) -> None:
    """Tokenise the data, show 8 items and both prompts, report lengths, memory and traffic.

    Writes nothing but data.dropped_file, loads no weight, draws nothing. Bad input is the error
    that the run would end with; only data on a Hub that cannot be reached is replaced, loudly, by
    built-in questions.
    """
    on = on or target(cfg)

    def say(text: str) -> object:
        return tell(printable(text))

    text = open_text(cfg, on.processes, here=on.here)
    prompter, reachable = text.prompter, replace(cfg, eval=_reachable(cfg, say))
    with (
        Verifier.configured(cfg.verify) as verifier,
        closing(Console(quiet_s=math.inf)) as console,
    ):
        judge = console.watched(verifier.accepts_itself, "reference answers")
        training = functools.partial(_questions, say=say)
        intake = read(reachable, text, judge, ALONE, training=training)
    kept, benchmarks = intake.questions, intake.benchmarks
    for line in intake.lines():
        say(line)
    say(f"{intake.counts}; the first {len(kept[:ITEMS])}:")
    for item in kept[:ITEMS]:
        say(
            f"  {item.question.id}: prompt tokens student {len(item.student_ids)}, teacher "
            f"{len(item.teacher_ids)}; scored answer {prompter.shown(item.target_ids)!r}"
        )
    say(f"student prompt:\n{prompter.shown(kept[0].student_ids)}\n")
    say(f"teacher prompt:\n{prompter.shown(kept[0].teacher_ids)}\n")
    for view, lengths in length_report(kept).items():
        say(f"{view} prompt tokens: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
    if kept[0].question not in SAMPLE_QUESTIONS:  # the error that the run would end with
        batch, weights = cfg.train.questions_per_step, cfg.data.weights
        step_questions(kept, seed=cfg.run.seed, step=0, batch=batch, weights=weights)
    _say_benchmarks(benchmarks, say)
    check_config(cfg, text.config, on.processes, questions=kept, benchmarks=benchmarks, on=on)
    _needs(cfg, text.config, questions=kept, benchmarks=benchmarks, on=on, say=say)


def _questions(cfg: DataConfig, *, parseable: Judge, say: Say) -> LoadedQuestions:
    """`load_training`, or built-in questions for data on a Hub that cannot be reached."""
    remote = [file.path for file in cfg.train if file.path.startswith("hub:")]
    reason = next(filter(None, map(_unreachable, remote)), None)
    if reason is None:
        try:
            return load_training(cfg, parseable=parseable)
        except DataError as error:
            if not (remote and is_offline_mode()):
                raise
            reason = str(error)
    needed = ", ".join(remote)
    say(f"data: {reason}; {ITEMS} built-in questions stand in, the run itself needs {needed}")
    return LoadedQuestions(SAMPLE_QUESTIONS)


def _reachable(cfg: Config, say: Say) -> EvalConfig:
    """`cfg.eval` with the files that can be reached."""
    files = []
    for file in cfg.eval.data:
        reason = _unreachable(file.path)
        if reason is None and file.path.startswith("hub:") and is_offline_mode():
            reason = "the Hub is switched off"
        if reason is None:
            files.append(file)
        else:
            say(f"eval.data: {reason}; {file.path} is left out here, the run itself needs it")
    return replace(cfg.eval, data=tuple(files))


def _say_benchmarks(found: Mapping[str, Benchmark], say: Say) -> None:
    for name, benchmark in found.items():
        for line in benchmark.loaded.lines():
            say(f"benchmark {name}: {line}")
        most = max(ids.numel() for _, ids in benchmark.questions)
        say(f"benchmark {name}: {len(benchmark.questions)} questions, prompt tokens at most {most}")


def _unreachable(source: str) -> str | None:
    """Why data on a Hub cannot be asked for; in offline mode it may lie in a cache."""
    return "the Hub does not answer" if source.startswith("hub:") and hub.silent() else None


def _needs(
    cfg: Config,
    model_config: Any,
    questions: Sequence[PromptedQuestion],
    benchmarks: Mapping[str, Benchmark],
    on: Target,
    say: Say,
) -> None:
    """The tables of memory and traffic, and what to lower when it does not fit."""
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
    say(f"  {'':<17}" + "".join(f"{phase:>11}" for phase in estimate.phases))
    for part in estimate.parts:
        sizes = [parts.get(part, 0) / GIB for parts in estimate.phases.values()]
        if any(sizes):
            say(f"  {part:<17}" + "".join(f"{size:11.3f}" for size in sizes))
    totals = [sum(parts.values()) / GIB for parts in estimate.phases.values()]
    say(f"  {'total':<17}" + "".join(f"{size:11.3f}" for size in totals))
    for part, size in estimate.host.items():
        say(f"  host memory of a process, {part}: {size / GIB:.3f} GiB")
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
    if estimate.engine is not None:
        room = min(
            cfg.vllm.context or positions(cfg),
            attention.positions(model_config)[0] or sys.maxsize,
        )
        _cache(cfg, estimate.engine, context=context, room=room, say=say, share=_is_share(cfg, on))
        if on.cuda:
            _share(cfg, estimate, engine=estimate.engine, room=room, on=on, say=say)
    _traffic(cfg, shape, row=row, on=on, say=say)


def _is_share(cfg: Config, on: Target) -> bool:
    """Whether vLLM takes a share of the device, and the rest of it is its KV cache."""
    return on.cuda and cfg.vllm.kv_cache_gib is None


def _cache(
    cfg: Config, engine: EngineMemory, context: int, room: int, say: Say, *, share: bool
) -> None:
    """How many paths vLLM's KV cache holds; prompts that paths have in common are not counted."""
    key = "engine.gpu_memory" if share else "engine.kv_cache_gib"
    paths = engine.tokens // context
    say(
        f"  vLLM's KV cache: {engine.cache / GIB:.3f} GiB, {engine.token} bytes a token, "
        f"{engine.tokens} tokens: {paths} paths of {context} at once"
    )
    if engine.tokens < room:
        say(
            f"  vLLM will not start: one path may have {room} tokens (engine.context); raise "
            f"{key}, or lower engine.context and what may be drawn"
        )
    elif paths < cfg.rollout.max_batch:
        say(
            f"  fewer than rollout.max_batch {cfg.rollout.max_batch}: the rest wait or are computed"
            f" again: slower, not wrong; raise {key}, or lower rollout.max_batch"
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

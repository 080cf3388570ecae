"""What a run would see and need, before any GPU work: `check_config` refuses what cannot work, and
`--dry-run` shows prompts, lengths, memory and traffic."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import is_offline_mode

from vpgea_fast import attention, families, hub
from vpgea_fast.config import Config, ConfigError, printable
from vpgea_fast.data import (
    Benchmark,
    DataError,
    Judge,
    LoadedQuestions,
    load_benchmarks,
    load_training,
    long_targets,
    step_questions,
    unfit,
    write_dropped,
)
from vpgea_fast.distributed import check_world, pick_device
from vpgea_fast.estimate import (
    GIB,
    RESERVE,
    EngineMemory,
    MemoryEstimate,
    communication,
    estimate_memory,
    model_shape,
)
from vpgea_fast.metrics import Console
from vpgea_fast.model import (
    check_vocabulary,
    load_generation_config,
    load_tokenizer,
)
from vpgea_fast.model_dir import load_config
from vpgea_fast.optim import check_torchao
from vpgea_fast.prompts import Prompter, eos_ids, length_report
from vpgea_fast.rollout.engine import check_positions
from vpgea_fast.rollout.factory import check_engine, positions
from vpgea_fast.types import PromptedQuestion, Question, View
from vpgea_fast.verify import Verifier

ITEMS = 8
SAMPLE_QUESTIONS = tuple(
    Question(f"sample-{i}", text, answer)
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


@dataclass(frozen=True)
class Target:
    """The machines that a run is planned for: `processes`, one a device of `device_bytes`, `node`
    of them a node; `here` when they are this machine, whose packages then matter."""

    processes: int
    device_bytes: int
    cuda: bool
    node: int = 8
    here: bool = True


def target(cfg: Config, *, processes: int | None = None, device_gib: float | None = None) -> Target:
    """This machine as torchrun started it, or so many CUDA devices of `device_gib` each."""
    size = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if device_gib is not None:
        return Target(size, int(device_gib * GIB), cuda=True, here=False)
    cuda = pick_device(cfg.model.device).type == "cuda"
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    return Target(size, _device_memory(cuda), cuda, node)


def dry_run(cfg: Config, tell: Say = print, *, on: Target | None = None) -> None:
    """Tokenise the data, show 8 items and both prompts, report lengths, memory and traffic.

    Writes nothing but data.dropped_file, loads no weight, draws nothing. Bad input is the error
    that the run would end with; only data on a Hub that cannot be reached is replaced, loudly, by
    built-in questions.
    """
    on = on or target(cfg)

    def say(text: str) -> object:
        return tell(printable(text))

    check_engine(cfg, on.processes, here=on.here)
    tokenizer = load_tokenizer(cfg.model.path)
    model_config = load_config(cfg.model.path)
    prompter = Prompter(tokenizer, cfg.prompt)
    with (
        Verifier.configured(cfg.verify) as verifier,
        closing(Console(quiet_s=math.inf)) as console,
    ):
        judge = console.watched(verifier.accepts_itself, "reference answers")
        loaded = _questions(cfg, say, judge)
        benchmarks = _benchmarks(cfg, prompter, say, judge)
    kept, lost = prompter.prompt_within(
        loaded.questions, limit=cfg.data.max_prompt_tokens, policy=cfg.data.overlong
    )
    stand_in = loaded.questions is SAMPLE_QUESTIONS
    loaded = unfit(loaded, kept, lost, prompter.has_special)
    write_dropped(cfg.data.dropped_file, [loaded, *(b.loaded for b in benchmarks.values())])
    counts = ", ".join(f"{count} dropped ({why})" for why, count in loaded.dropped.items())
    for line in [*loaded.lines(), *long_targets(kept)]:
        say(line)
    say(f"{len(kept)} questions, {counts or 'none dropped'}; the first {len(kept[:ITEMS])}:")
    for item in kept[:ITEMS]:
        say(
            f"  {item.question.id}: prompt tokens student {len(item.student_ids)}, teacher "
            f"{len(item.teacher_ids)}; scored answer {prompter.shown(item.target_ids)!r}"
        )
    say(f"student prompt:\n{prompter.shown(kept[0].student_ids)}\n")
    say(f"teacher prompt:\n{prompter.shown(kept[0].teacher_ids)}\n")
    for view, lengths in length_report(kept).items():
        say(f"{view} prompt tokens: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
    if not stand_in:  # the error that the run would end with
        batch, weights = cfg.train.questions_per_step, cfg.data.weights
        step_questions(kept, seed=cfg.run.seed, step=0, batch=batch, weights=weights)
    _say_benchmarks(benchmarks, say)
    check_config(
        cfg,
        model_config,
        on.processes,
        questions=kept,
        benchmarks=benchmarks,
        tokenizer=tokenizer,
        on=on,
    )
    _needs(cfg, model_config, kept, benchmarks, on, say)


def check_config(
    cfg: Config,
    model_config: Any,
    world_size: int,
    *,
    questions: Sequence[PromptedQuestion] = (),
    benchmarks: Mapping[str, Benchmark] = MappingProxyType({}),
    tokenizer: Any = None,
    on: Target | None = None,
) -> None:
    """ValueError for what cannot work, with the key, what it got, what is expected, and what to
    do; before any weight is loaded. Lengths are those of `questions` and `benchmarks`, else the
    limits of the configuration.
    """
    on = on or target(cfg, processes=world_size)
    check_world(cfg.parallel, world_size)
    _check_model(cfg, model_config, tokenizer)
    _check_lengths(cfg, model_config, questions)
    _check_positions(cfg, model_config, questions, benchmarks)
    _check_precision(cfg, world_size, on)
    if on.here:
        device = pick_device(cfg.model.device)
        attention.choose_for(
            model_config, cfg.model.attention, device, getattr(torch, cfg.model.dtype)
        )
        _check_packages(cfg, on)


def _check_model(cfg: Config, model: Any, tokenizer: Any) -> None:
    families.measure(model)
    group = cfg.vllm.tensor_parallel
    heads = model.num_attention_heads
    keys = getattr(model, "num_key_value_heads", None) or heads
    columns = getattr(model, "intermediate_size", None) or 0  # GPT-2's kind has another name
    rest = (heads % group, columns % group, min(keys % group, group % keys))
    if cfg.colocated and any(rest):
        raise ConfigError(
            f"vllm.tensor_parallel: got {group}, expected a divisor of the model's {heads} "
            f"attention heads and {columns} MLP columns, and a divisor or a "
            f"multiple of its {keys} key heads, which vLLM deals out; set 1 or another"
        )
    if tokenizer is not None:
        check_vocabulary(tokenizer, model, cfg.model.path)
        eos_ids(tokenizer, load_generation_config(cfg.model.path, model))


def _check_lengths(cfg: Config, model: Any, questions: Sequence[PromptedQuestion]) -> None:
    """The longest row that may come must fit a micro-batch and the model."""
    thought = cfg.rollout.max_new_tokens
    _, row = longest(cfg, questions)
    packed = row - 1  # the last token of a row is only ever a target
    if packed > cfg.train.micro_batch_tokens:
        raise ConfigError(
            f"train.micro_batch_tokens: got {cfg.train.micro_batch_tokens}, but a row may have "
            f"{packed} tokens (rollout.max_new_tokens {thought}, {row - thought} around it); set "
            f"it to {packed} or more, or lower rollout.max_new_tokens or data.max_prompt_tokens"
        )
    room, source = attention.positions(model)
    if room is not None and row > room:
        raise ConfigError(
            f"rollout.max_new_tokens: got {thought}, but with {row - thought} tokens around it the "
            f"model has {room} positions ({source}); lower it, or "
            "data.max_prompt_tokens"
        )


def _check_positions(
    cfg: Config,
    model: Any,
    questions: Sequence[PromptedQuestion],
    benchmarks: Mapping[str, Benchmark],
) -> None:
    """Every path that may be drawn must fit the model, and the engine where it can be asked now: a
    server's room is known when it is there."""
    rooms = [attention.positions(model)]
    rooms.append((cfg.vllm.context if cfg.colocated else None, "vllm.context"))
    for what, prompt, new in draws(cfg, questions, benchmarks):
        for room, source in rooms:
            check_positions(what, prompt=prompt, new=new, room=room, source=source)


def draws(
    cfg: Config,
    questions: Sequence[PromptedQuestion],
    benchmarks: Mapping[str, Benchmark],
) -> list[tuple[str, int, int]]:
    """(what, tokens of its prompt, tokens drawn at most) of the longest paths of every kind."""
    rollout, objective, limit = cfg.rollout, cfg.objective, cfg.data.max_prompt_tokens
    thought, answer = rollout.max_new_tokens, rollout.max_answer_tokens

    def most(view: View) -> tuple[str, int]:
        lengths = [(f"question {q.question.id}", q.context(view).numel()) for q in questions]
        return max(lengths, key=lambda item: item[1], default=("data.max_prompt_tokens", limit))

    student, new = most("student"), thought + (answer if rollout.full_answer else 0)
    found = [(*student, new)]
    if objective.posterior_paths:
        found.append((*most("teacher"), new))
    if objective.scores_answers and cfg.scoring.u_source == "accuracy":  # behind </think>
        what, prompt = student
        found.append((f"{what}, answers after its thought", prompt + thought + 1, answer))
    for name, benchmark in benchmarks.items():
        question, ids = max(benchmark.questions, key=lambda item: item[1].numel())
        what = f"benchmark {name}, question {question.id}"
        found.append((what, ids.numel(), cfg.eval.max_new_tokens + answer))
    return found


def longest(cfg: Config, questions: Sequence[PromptedQuestion]) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest row that is trained or scored."""
    if not questions:
        limit = cfg.data.max_prompt_tokens
        return limit, limit + cfg.rollout.max_new_tokens
    prompts = [max(len(q.student_ids), len(q.teacher_ids)) for q in questions]
    tails = [0]
    if cfg.objective.scores_answers and cfg.scoring.u_source == "likelihood":  # behind </think>
        tails = [
            len(q.student_ids) + 1 + len(q.cue_ids) + max(map(len, (q.target_ids, *q.variant_ids)))
            for q in questions
        ]
    return max(prompts), max(*prompts, *tails) + cfg.rollout.max_new_tokens


def _check_precision(cfg: Config, world_size: int, on: Target) -> None:
    parallel = cfg.parallel
    sharded = parallel.shard == "always" or (
        parallel.shard == "auto" and (world_size > 1 or on.cuda)
    )
    if parallel.cpu_offload and not (on.cuda and sharded):
        raise ConfigError(
            "parallel.cpu_offload: got true "
            + ("without a CUDA device" if not on.cuda else "with parallel.shard 'never'")
            + "; it moves shards of CUDA devices to host memory: set it to false"
        )
    if cfg.model.compile and cfg.model.activation_checkpointing == "selective":
        raise ConfigError(
            "model.activation_checkpointing: got 'selective' with model.compile, whose kernels "
            "write into what it keeps; set 'full' or 'none'"
        )
    summed = sharded and parallel.accumulate == "sharded" and parallel.replicas == 1
    if cfg.model.master_dtype == "bfloat16" and summed:
        raise ConfigError(
            "parallel.accumulate: got 'sharded' with model.master_dtype 'bfloat16', which would "
            "sum the gradients of micro-batches in bfloat16 and lose small ones; set 'unsharded'"
        )


def _check_packages(cfg: Config, on: Target) -> None:
    if cfg.optim.name == "adamw_8bit":
        check_torchao()
    model = cfg.model
    if model.liger == "always" and not (on.cuda and importlib.util.find_spec("liger_kernel")):
        lack = "liger-kernel is not installed" if on.cuda else "there is no CUDA device"
        raise ConfigError(
            f"model.liger: got 'always', but {lack}; pip install vpgea_fast[liger] on a CUDA "
            "machine, or set 'auto'"
        )
    compiler = os.environ.get("CXX", "g++")
    lack = not importlib.util.find_spec("triton") if on.cuda else shutil.which(compiler) is None
    if model.compile and lack:
        what = "triton is not installed" if on.cuda else f"there is no C++ compiler ({compiler})"
        raise ConfigError(f"model.compile: got true, but {what}; install it, or set false")


def _questions(cfg: Config, say: Say, judge: Judge) -> LoadedQuestions:
    remote = [file.path for file in cfg.data.train if file.path.startswith("hub:")]
    reason = next(filter(None, map(_unreachable, remote)), None)
    if reason is None:
        try:
            return load_training(cfg.data, parseable=judge)
        except DataError as error:
            if not (remote and is_offline_mode()):
                raise
            reason = str(error)
    needed = ", ".join(remote)
    say(f"data: {reason}; {ITEMS} built-in questions stand in, the run itself needs {needed}")
    return LoadedQuestions(SAMPLE_QUESTIONS)


def _benchmarks(cfg: Config, prompter: Prompter, say: Say, judge: Judge) -> dict[str, Benchmark]:
    files = []
    for file in cfg.eval.data:
        reason = _unreachable(file.path)
        if reason is None and file.path.startswith("hub:") and is_offline_mode():
            reason = "the Hub is switched off"
        if reason is None:
            files.append(file)
        else:
            say(f"eval.data: {reason}; {file.path} is left out here, the run itself needs it")
    reachable = replace(cfg.eval, data=tuple(files))
    return load_benchmarks(reachable, cfg.data, prompter, parseable=judge)


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
        _cache(cfg, estimate.engine, context, room, say, share=_is_share(cfg, on))
        if on.cuda:
            _share(cfg, estimate, estimate.engine, room, on, say)
    _traffic(cfg, shape, row, on, say)


def _is_share(cfg: Config, on: Target) -> bool:
    """Whether vLLM takes a share of the device, and the rest of it is its KV cache."""
    return on.cuda and cfg.vllm.kv_cache_gib is None


def _cache(
    cfg: Config, engine: EngineMemory, context: int, room: int, say: Say, *, share: bool
) -> None:
    """How many paths vLLM's KV cache holds; prompts that paths have in common are not counted."""
    key = "vllm.gpu_memory" if share else "vllm.kv_cache_gib"
    paths = engine.tokens // context
    say(
        f"  vLLM's KV cache: {engine.cache / GIB:.3f} GiB, {engine.token} bytes a token, "
        f"{engine.tokens} tokens: {paths} paths of {context} at once"
    )
    if engine.tokens < room:
        say(
            f"  vLLM will not start: one path may have {room} tokens (vllm.context); raise {key}, "
            "or lower vllm.context and what may be drawn"
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
            f"the trainer are {over / GIB:.3f} too many; " + _smaller(cfg, engine, over, room, on)
        )
    asked = cfg.vllm.gpu_memory * device  # vLLM asks for it at its start, whatever it will take
    free = usable - estimate.phases["sampling"]["weights"]
    if asked > free > 0 and not _is_share(cfg, on):
        say(
            f"  vLLM will not start: it asks for vllm.gpu_memory ({asked / GIB:.3f} GiB) of free "
            f"memory also with vllm.kv_cache_gib, and {free / GIB:.3f} are free; set "
            f"vllm.gpu_memory to {_floor(free / device):.2f} or less"
        )


def _smaller(cfg: Config, engine: EngineMemory, over: float, room: int, on: Target) -> str:
    """What to set so that vLLM takes `over` bytes less and still starts."""
    if engine.cache - over < room * engine.token:
        return (
            f"without a KV cache it needs {engine.least / GIB:.3f}, one path of {room} tokens "
            f"{room * engine.token / GIB:.3f}: raise vllm.tensor_parallel, take more processes, or "
            "let a server draw (vllm.server)"
        )
    if _is_share(cfg, on):
        return f"set vllm.gpu_memory to {_floor(cfg.vllm.gpu_memory - over / on.device_bytes):.2f}"
    return f"set vllm.kv_cache_gib to {_floor((engine.cache - over) / GIB):.2f}"


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


def _device_memory(cuda: bool) -> int:
    if cuda:
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

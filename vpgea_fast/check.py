"""What a run needs of its configuration, model and machine: refused before a weight is loaded.

`check_config` is the same for a run, a dry run and a test of a large preset: it reads lengths and
shapes, and asks the machine only where the run is planned for this one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from vpgea_fast import attention, families
from vpgea_fast.config import Config, ConfigError
from vpgea_fast.data import Benchmark
from vpgea_fast.distributed import check_world, pick_device
from vpgea_fast.estimate import GIB, draws_itself
from vpgea_fast.objectives import reads_reference, scores_answers
from vpgea_fast.optim import NO_8BIT, check_torchao
from vpgea_fast.rollout.engine import check_positions
from vpgea_fast.types import PromptedQuestion, View

LONG_PATH = 2048
"""Tokens of a path from which on the hf engine is the wrong one on CUDA."""


@dataclass(frozen=True)
class Target:
    """The machines that a run is planned for.

    processes  one per device
    node       of them on each node
    here       they are this machine, whose packages then matter
    name       what CUDA calls the device; "" where it is only planned
    """

    processes: int
    device_bytes: int
    cuda: bool
    node: int = 8
    here: bool = True
    name: str = ""


def target(cfg: Config, *, processes: int | None = None, device_gib: float | None = None) -> Target:
    """Describe this machine as torchrun started it, or CUDA devices of `device_gib` each."""
    size = processes or int(os.environ.get("WORLD_SIZE", "1"))
    # A planned machine has no name, and its rates are guessed by size; this one is asked.
    if device_gib is not None:
        return Target(size, int(device_gib * GIB), cuda=True, here=False)
    cuda = pick_device(cfg.model.device).type == "cuda"
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    name = torch.cuda.get_device_name() if cuda else ""
    return Target(size, _device_memory(cuda), cuda, node, name=name)


def slow_engine(cfg: Config, *, cuda: bool) -> str | None:
    """Warn where the hf engine is asked for long paths on a GPU; else None."""
    tokens = cfg.rollout.max_new_tokens
    if not draws_itself(cfg):
        return None
    # On a CPU both engines are bound by the same memory, and hf starts at once.
    if not cuda or cfg.engine.name != "hf" or tokens < LONG_PATH:
        return None
    return (
        f"engine hf draws up to {tokens} tokens a path on CUDA, one launch-bound forward a token: "
        "by arithmetic ten times the time of vLLM; set engine vllm (pip install vpgea_fast[vllm])"
    )


def slow_layers(cfg: Config, *, attention: str, cuda: bool) -> Iterator[str]:
    """Say what a model on CUDA would train faster by and lacks; `attention` is the kind it has."""
    if not cuda or cfg.model.dtype != "bfloat16":
        return
    gain = "by arithmetic of 7B on an H200; pip install 'vpgea_fast[gpu]'"
    if cfg.model.liger == "auto" and not importlib.util.find_spec("liger_kernel"):
        yield (
            "liger-kernel is not installed: norms, rotations and SwiGLU run operation by "
            f"operation; with it training is about 10 % faster, {gain}"
        )
    if cfg.model.attention == "auto" and attention != "flash":
        yield (
            f"attention {attention}, not flash: with FlashAttention training is about 7 % faster, "
            f"{gain}"
        )


def loose_limits(cfg: Config) -> Iterator[str]:
    """Warn of numbers of tokens in the objective that no path can exceed."""
    rollout = cfg.rollout
    answers = rollout.full_answer and cfg.objective.draws().answers
    most, source = rollout.max_new_tokens, f"rollout.max_new_tokens {rollout.max_new_tokens}"
    if answers:
        most += rollout.max_answer_tokens
        source += f" and max_answer_tokens {rollout.max_answer_tokens}"
    # A class of the user's own may compare lengths with nothing, and not say so.
    for key, values in getattr(cfg.objective, "bounds", dict)().items():
        if loose := [value for value in values if value >= most]:
            yield (
                f"objective.{key} {', '.join(map(str, loose))}: a path has at most {most} tokens "
                f"({source}), so this holds none of them back; set it below that"
            )


def whole_pass(cfg: Config, questions: int) -> Iterator[str]:
    """Say how many steps go once through all questions, of a run that reads or records each."""
    draws, each = cfg.objective.draws(), cfg.train.questions_per_step
    if not (cfg.train.record or draws.given or draws.recorded):
        return
    # A run that trains has no smaller batch at the end.
    steps = -(-questions // each) if cfg.train.record else questions // each
    yield f"one pass over {questions} questions takes {steps} steps; train.steps {cfg.train.steps}"


def unread_keys(cfg: Config) -> Iterator[str]:
    """Warn of keys that were set and that change nothing, for what another section says."""
    objective, scoring = cfg.objective, cfg.scoring
    likely = scoring.u_source == "likelihood"
    no_reference = not reads_reference(objective) and "the objective reads no reference policy"
    unscored = not scores_answers(objective) and "the objective scores no answer behind a thought"
    told = objective.draws().u_norm and "the objective says itself how U is summed"
    # Answers may be sampled behind thoughts whatever U is.
    not_sampled = not cfg.answers_behind and (unscored or "scoring.u_source is 'likelihood'")
    single = cfg.train.updates == 1 and (
        "train.minibatches and train.epochs make one update of a rollout"
    )
    enough = getattr(objective, "answer_rows", 0) >= scoring.answer_samples and (
        f"scoring.answer_samples draws {scoring.answer_samples} behind a thought"
    )
    for key, because in {
        "model.reference": no_reference,
        "model.reference_path": no_reference,
        "scoring.u_source": unscored,
        "scoring.u_norm": unscored or told or (not likely and "scoring.u_source is 'accuracy'"),
        "scoring.answer_samples": not_sampled,
        "scoring.answer_temperature": not_sampled,
        "objective.answer_rows": enough,
        **{f"objective.{key}": single for key in ("clip_low", "clip_high", "ratio", "surrogate")},
    }.items():
        section, _, name = key.partition(".")
        record: Any = getattr(cfg, section)
        field = type(record).__pydantic_fields__.get(name)
        if because and field is not None and getattr(record, name) != field.default:
            yield f"{key} {getattr(record, name)!r} changes nothing: {because}"


def check_config(
    cfg: Config,
    model_config: Any,
    world_size: int,
    *,
    questions: Sequence[PromptedQuestion] = (),
    benchmarks: Mapping[str, Benchmark] = MappingProxyType({}),
    on: Target | None = None,
) -> None:
    """Raise ValueError for what cannot work, with the key, what it got, what is expected, and what
    to do; before any weight is loaded. Lengths are those of `questions` and `benchmarks`, else the
    limits of the configuration.
    """
    on = on or target(cfg, processes=world_size)
    # The family first: the lengths and shapes below are read from a config that is understood.
    check_world(cfg.parallel, world_size)
    _check_model(cfg, model_config)
    _check_lengths(cfg, model_config, questions)
    _check_positions(cfg, model_config, questions, benchmarks)
    _check_precision(cfg, world_size, on)
    # Of a planned machine nobody knows which kernels and packages it has.
    if on.here:
        device = pick_device(cfg.model.device)
        attention.choose_for(
            model_config, cfg.model.attention, device, getattr(torch, cfg.model.dtype)
        )
        _check_packages(cfg, on)


def _check_model(cfg: Config, model: Any) -> None:
    families.measure(model)
    # The embedding is gathered, so a weight that is both cannot stay where its rows are.
    if cfg.parallel.tensor == "head" and getattr(model, "tie_word_embeddings", False):
        raise ConfigError(
            "parallel.tensor: got 'head' for a model that ties its head to the embedding; set "
            "'none'"
        )
    group = cfg.processes_per_engine
    heads = model.num_attention_heads
    keys = getattr(model, "num_key_value_heads", None) or heads
    columns = getattr(model, "intermediate_size", None) or 0  # GPT-2's kind has another name
    # Fewer key heads than processes are copied, so either may divide the other.
    rest = (heads % group, columns % group, min(keys % group, group % keys))
    if any(rest):
        raise ConfigError(
            f"engine.tensor_parallel: got {group}, expected a divisor of the model's {heads} "
            f"attention heads and {columns} MLP columns, and a divisor or a "
            f"multiple of its {keys} key heads, which vLLM deals out; set 1 or another"
        )


def _check_lengths(cfg: Config, model: Any, questions: Sequence[PromptedQuestion]) -> None:
    """Refuse limits whose longest row does not fit a micro-batch or the model."""
    thought = cfg.rollout.max_new_tokens
    _, row = longest(cfg, questions)
    packed = row - 1  # the last token of a row is only ever a target
    # A row is never cut: it would lose the end of its thought, which is what stopping learns from.
    if packed > cfg.train.micro_batch_tokens:
        raise ConfigError(
            f"train.micro_batch_tokens: got {cfg.train.micro_batch_tokens}, but a row may have "
            f"{packed} tokens (rollout.max_new_tokens {thought}, {row - thought} around it); set "
            f"it to {packed} or more, or lower rollout.max_new_tokens or data.max_prompt_tokens"
        )
    if cfg.train.score_tokens is not None and packed > cfg.train.score_tokens:
        raise ConfigError(
            f"train.score_tokens: got {cfg.train.score_tokens}, but a row may have {packed} "
            "tokens; set it to that or more, or to null"
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
    """Refuse a path that may be drawn and does not fit the model or the engine.

    A server's room is not known before it can be asked.
    """
    rooms = [attention.positions(model)]
    rooms.append((cfg.vllm.context if cfg.colocated else None, "engine.context"))
    for what, prompt, new in draws(cfg, questions, benchmarks):
        for room, source in rooms:
            check_positions(what, prompt=prompt, new=new, room=room, source=source)


def draws(
    cfg: Config,
    questions: Sequence[PromptedQuestion],
    benchmarks: Mapping[str, Benchmark],
) -> list[tuple[str, int, int]]:
    """List (what, tokens of its prompt, tokens drawn at most) of the longest paths of each kind."""
    rollout, objective, limit = cfg.rollout, cfg.objective, cfg.data.max_prompt_tokens
    thought, answer = rollout.max_new_tokens, rollout.max_answer_tokens

    def most(view: View) -> tuple[str, int]:
        # A path's own values may make its prompt longer than any that was read.
        if objective.draws().fields:
            return "data.max_prompt_tokens", limit
        lengths = [(f"question {q.question.id}", q.context(view).numel()) for q in questions]
        return max(lengths, key=lambda item: item[1], default=("data.max_prompt_tokens", limit))

    # The longest of each kind is enough: every shorter one fits where it does.
    student, new = most("student"), thought + (answer if rollout.full_answer else 0)
    paths = [(*student, new)]
    if objective.draws().teacher:
        paths.append((*most("teacher"), new))
    if cfg.answers_behind:  # behind </think>
        what, prompt = max((most(view) for view in _answered_views(cfg)), key=lambda m: m[1])
        close = max([1, *(q.close_ids.numel() for q in questions)])
        paths.append((f"{what}, answers after its thought", prompt + thought + close, answer))
    for name, benchmark in benchmarks.items():
        question, ids = max(benchmark.questions, key=lambda item: item[1].numel())
        what = f"benchmark {name}, question {question.id}"
        # An evaluation judges answers, so it draws them also where training does not.
        paths.append((what, ids.numel(), cfg.eval.most(answer)))
    return paths


def _answered_views(cfg: Config) -> set[View]:
    """Views in which answers are sampled behind thoughts."""
    attempts: set[View] = {"student"} if cfg.objective.draws().attempts else set()
    if cfg.scoring.u_source != "accuracy":
        return attempts
    needs = [s for s in cfg.objective.needs() if s.part == "target" and s.who == "policy"]
    # A thought cut early has a shorter row than the whole one, and is never answered by sampling.
    scored: set[View] = {s.view for s in needs if s.view in ("teacher", "student")}
    return attempts | scored


def longest(cfg: Config, questions: Sequence[PromptedQuestion]) -> tuple[int, int]:
    """Count the tokens of the longest prompt, and of the longest row that is trained or scored."""
    # An answer is a part of the row only where the objective trains it.
    answer = cfg.rollout.full_answer and cfg.objective.draws().answers
    drawn = cfg.rollout.max_new_tokens + answer * cfg.rollout.max_answer_tokens
    limit, fields = cfg.data.max_prompt_tokens, cfg.objective.draws().fields
    if not questions:
        return limit, limit + drawn

    def room(prompt: torch.Tensor) -> int:
        # A path's own values may make its prompt longer than any that was read.
        return limit if fields else prompt.numel()

    prompts = [max(room(q.student_ids), room(q.teacher_ids)) for q in questions]
    # Behind </think>, whoever scores it; of drawn answers the policy's U needs no row.
    likely = cfg.scoring.u_source == "likelihood"
    views: set[View] = {
        s.view
        for s in cfg.objective.needs()
        if s.part == "target"
        and s.view in ("teacher", "student")
        and (likely or s.who == "reference")
    }
    if cfg.objective.draws().targets:
        views.add("student")
    tails = [0] + [
        room(q.context(v))
        + len(q.close_ids)
        + len(q.cue_ids)
        + max(map(len, (q.target_ids, *q.variant_ids)))
        for q in questions
        for v in views
    ]
    if cfg.objective.draws().answer_rows:
        tails += [room(q.student_ids) + cfg.rollout.max_answer_tokens for q in questions]
    thought = cfg.rollout.max_new_tokens
    return max(prompts), max(max(prompts) + drawn, max(tails) + thought)


def _check_precision(cfg: Config, world_size: int, on: Target) -> None:
    parallel = cfg.parallel
    # As `open_world` decides it, for machines that may not be these.
    sharded = parallel.sharded(world_size)
    if parallel.cpu_offload and not on.cuda:
        raise ConfigError(
            "parallel.cpu_offload: got true without a CUDA device, whose memory it would spare; "
            "set it to false"
        )
    if cfg.optim.name == "adamw_8bit" and not sharded:
        if parallel.cpu_offload:
            raise ConfigError(NO_8BIT["hosted"])
        if cfg.model.has_masters:
            raise ConfigError(NO_8BIT["masters"])
    if cfg.model.compile and cfg.model.activation_checkpointing == "selective":
        raise ConfigError(
            "model.activation_checkpointing: got 'selective' with model.compile, whose kernels "
            "write into what it keeps; set 'full' or 'none'"
        )
    # The gradient of a head that is cut stays in float32; no optimiser here takes two dtypes.
    if cfg.model.master_dtype == "bfloat16" and parallel.tensor == "head":
        raise ConfigError(
            "parallel.tensor: got 'head' with model.master_dtype 'bfloat16', which it does not go "
            "with yet: set 'none', or master_dtype float32"
        )
    # Unsharded gradients, and those of replicas, are summed in float32 and cast once.
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
    # Inductor writes Triton for CUDA and C++ for a CPU, and fails only at the first forward.
    compiler = os.environ.get("CXX", "g++")
    lack = not importlib.util.find_spec("triton") if on.cuda else shutil.which(compiler) is None
    if model.compile and lack:
        what = "triton is not installed" if on.cuda else f"there is no C++ compiler ({compiler})"
        raise ConfigError(f"model.compile: got true, but {what}; install it, or set false")


def _device_memory(cuda: bool) -> int:
    if cuda:
        return torch.cuda.get_device_properties(0).total_memory
    return host_memory()


def host_memory() -> int:
    """Read the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""What is read before any weight: the text of a model directory, questions, benchmarks.

A training run, a dry run, an evaluation and a pass rate all read alike:

    open_text   engine possible? -> tokenizer -> prompter -> config.json -> do they fit each other?
    read        files -> questions that can be judged -> prompts that fit; benchmarks alike
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vpgea_fast.config import Config
from vpgea_fast.data import (
    Benchmark,
    Judge,
    LoadedQuestions,
    fingerprint,
    load_benchmarks,
    load_training,
    long_targets,
    round_questions,
    unfit,
    write_dropped,
)
from vpgea_fast.distributed import World
from vpgea_fast.model_dir import check_vocabulary, load_generation_config, load_tokenizer
from vpgea_fast.objectives import at_step
from vpgea_fast.prompts import Prompter, eos_ids
from vpgea_fast.rollout.engine import prompt_digest, slot_of
from vpgea_fast.rollout.factory import check_engine
from vpgea_fast.rollout.recorded import Expected, Records
from vpgea_fast.types import PromptedQuestion
from vpgea_fast.weights import load_config

ALONE = World(torch.device("cpu"))

Training = Callable[..., LoadedQuestions]
"""`load_training`, or what stands in for it: `(cfg.data, parseable=judge)` -> questions."""


@dataclass(frozen=True)
class ModelText:
    """What a model directory says without its weights; `config` is its config.json, checked."""

    tokenizer: Any
    prompter: Prompter
    config: Any

    def decode(self, ids: torch.Tensor) -> str:
        # An answer ends with a token that stops the sampling, and a checker would read it.
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def open_text(cfg: Config, processes: int = 1, *, here: bool = True) -> ModelText:
    """Read the text side of `cfg.model.path`. It takes a second and no weight.

    Errors: ConfigError for an engine that `processes` cannot run (`here`: on this machine),
    ValueError for a model that does not think, or whose tokenizer belongs to another one.
    """
    # The engine first: that vLLM is not installed costs no second of reading to find out.
    check_engine(cfg, processes, here=here)
    tokenizer = load_tokenizer(cfg.model.path)
    prompter = Prompter(tokenizer, cfg.prompt, _fields(cfg))
    config = load_config(cfg.model.path)
    check_text(tokenizer, config, cfg.model.path)
    return ModelText(tokenizer, prompter, config)


def _fields(cfg: Config) -> dict[str, Callable[[str], str]]:
    """Every field of the objective, with its value for a question of which no path is drawn: that
    of the student's first path in step 0, so that evaluations of one run agree."""
    draws = cfg.objective.draws()

    def value(name: str, question_id: str) -> str:
        return draws.values(slot_of(question_id, "prior", 0, run_seed=cfg.run.seed, step=0))[name]

    return {name: functools.partial(value, name) for name in draws.fields}


def check_text(tokenizer: Any, config: Any, path: str) -> None:
    """Refuse a tokenizer with more tokens than the model embeds, or without an end (ModelError)."""
    # A token beyond the embedding would be an index error on a CPU, and on a GPU an assertion that
    # ends the process without naming it.
    check_vocabulary(tokenizer, config, path)
    eos_ids(tokenizer, load_generation_config(path, config))


@dataclass(frozen=True)
class Intake:
    """The questions that a run trains on, with their prompts, and its benchmarks.

    `loaded` says what was dropped and why; `fingerprint` tells whether a resumed run sees the same.
    """

    text: ModelText
    questions: Sequence[PromptedQuestion]
    loaded: LoadedQuestions
    benchmarks: Mapping[str, Benchmark]
    fingerprint: str

    @property
    def counts(self) -> str:
        """Say how many questions there are, and how many were dropped for which reason."""
        # Reasons with no row are left out: a line of zeros hides the one that counts.
        lost = [f"{n} dropped ({why})" for why, n in self.loaded.dropped.items() if n]
        return f"{len(self.questions)} questions, {', '.join(lost) or 'none dropped'}"

    def lines(self) -> Iterator[str]:
        """Say what is odd about the training files."""
        yield from self.loaded.lines()
        yield from long_targets(self.questions)


def read(
    cfg: Config, text: ModelText, judge: Judge, world: World, *, training: Training = load_training
) -> Intake:
    """Read, judge and tokenise all questions of `cfg`; write data.dropped_file.

    A collective where `judge` is one: every process reads all files and gets the same questions.
    Errors: DataError and ValueError for files that cannot be used.
    """
    loaded = training(cfg.data, parseable=judge)
    # Both before data.dropped_file is written: it lists what either of them dropped.
    benchmarks = load_benchmarks(cfg.eval, cfg.data, text.prompter, parseable=judge)
    questions, lost = text.prompter.prompt_within(
        loaded.questions, limit=cfg.data.max_prompt_tokens, policy=cfg.data.overlong
    )
    # What the prompts could not take joins what the files could not give.
    loaded = unfit(loaded, questions, lost, text.prompter.has_special)
    _list_dropped(cfg, world, [loaded, *(benchmark.loaded for benchmark in benchmarks.values())])
    return Intake(
        text=text,
        questions=questions,
        loaded=loaded,
        benchmarks=benchmarks,
        fingerprint=fingerprint([q.question for q in questions]),
    )


def read_benchmarks(cfg: Config, text: ModelText, judge: Judge) -> dict[str, Benchmark]:
    """Read as `read` does, without training questions, in one process."""
    # `judge` is no collective here, so a world of one is enough.
    benchmarks = load_benchmarks(cfg.eval, cfg.data, text.prompter, parseable=judge)
    _list_dropped(cfg, ALONE, [benchmark.loaded for benchmark in benchmarks.values()])
    return benchmarks


def read_records(cfg: Config, intake: Intake, first: int = 0) -> Records | None:
    """Read the recorded paths of engine `replay` and hold them to what the run will ask for from
    step `first` on; None for another engine.

    Errors: RecordError for files that are damaged, of other paths, or with a gap.
    """
    if cfg.engine.name != "replay":
        return None
    draws = cfg.objective.draws()
    # A path's own values decide its prompt: then it is compared when the path is asked for.
    prompts = {
        (q.question.id, stream): prompt_digest(q.context(view))
        for q in intake.questions
        for stream, view, count in draws.plan
        if count and not draws.fields
    }
    expected = Expected(
        intake.text.decode,
        vocabulary=intake.text.config.vocab_size,
        questions={q.question.id: q.question.text for q in intake.questions},
        prompts=prompts,
        temperature=None if draws.recorded else cfg.rollout.temperature,
        answer_temperature=(
            cfg.scoring.answer_temperature if draws.attempts and not draws.recorded else None
        ),
    )
    records = Records(cfg.replay, expected)
    if not draws.given:  # those paths come from the data
        records.require(_wanted(cfg, intake.questions, first))
    return records


def _wanted(
    cfg: Config, questions: Sequence[PromptedQuestion], first: int
) -> Iterator[tuple[int, str, str, int]]:
    """Step from 1, question, stream and index of every path of the steps from `first` on, but for
    questions that replace others: which those are depends on the weights."""
    for step in range(first, cfg.train.steps):
        plan = at_step(cfg.objective, step).draws().plan
        for question in round_questions(cfg, questions, step=step):
            for stream, _, count in plan:
                for index in range(count):
                    yield step + 1, question.question.id, stream, index


def _list_dropped(cfg: Config, world: World, loaded: Sequence[LoadedQuestions]) -> None:
    # All processes have read the same rows; one of them writes.
    world.on_main(functools.partial(write_dropped, cfg.data.dropped_file, loaded))

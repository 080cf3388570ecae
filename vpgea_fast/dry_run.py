"""What a run would read and need, before any GPU work: `--dry-run` shows prompts, lengths, memory
and traffic, and ends with the error that the run would end with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from types import MappingProxyType

from huggingface_hub import is_offline_mode

from vpgea_fast import hub
from vpgea_fast.check import Target, check_config, slow_engine, target, whole_pass
from vpgea_fast.config import Config, DataConfig, EvalConfig, printable
from vpgea_fast.data import (
    Benchmark,
    DataError,
    Judge,
    LoadedQuestions,
    load_training,
)
from vpgea_fast.intake import ALONE, Intake, open_text, read, read_records
from vpgea_fast.metrics import Console
from vpgea_fast.needs import needs
from vpgea_fast.prompts import length_report
from vpgea_fast.questions import check_questions
from vpgea_fast.reference import check_models
from vpgea_fast.types import Question
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
Say = Callable[[str], object]


def dry_run(
    cfg: Config,
    tell: Say = print,
    *,
    on: Target | None = None,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Tokenise the data, show 8 items and both prompts, report lengths, memory, hours and traffic.

    Writes nothing but data.dropped_file, loads no weight, draws nothing. Bad input is the error
    that the run would end with. Only data on a Hub that cannot be reached is replaced, and said to
    be, by built-in questions.
    """
    cfg = cfg.asked
    on = on or target(cfg)

    # Questions come from files of others: what steers a terminal must not reach it.
    def say(text: str) -> object:
        return tell(printable(text))

    # In the order of a run's start, so that its first error is this one's too.
    text = open_text(cfg, on.processes, here=on.here)
    # A checkpoint is kept by an evaluation, which may lose all its files here.
    any_eval = replace(cfg, checkpoint=replace(cfg.checkpoint, keep_best=None))
    prompter, reachable = text.prompter, replace(any_eval, eval=_reachable(cfg, say))
    with (
        Verifier.configured(cfg.verify) as verifier,
        closing(Console(quiet_s=math.inf)) as console,
    ):
        judge = console.watched(verifier.accepts_itself, "reference answers")
        training = functools.partial(_questions, say=say)
        intake = read(reachable, text, judge, ALONE, training=training)
        _check_questions(cfg, intake, verifier)
    # The workers that judged are gone; from here on it is arithmetic.
    questions, benchmarks = intake.questions, intake.benchmarks
    for line in intake.lines():
        say(line)
    say(f"{intake.counts}; the first {len(questions[:ITEMS])}:")
    for item in questions[:ITEMS]:
        say(
            f"  {item.question.id}: prompt tokens student {len(item.student_ids)}, teacher "
            f"{len(item.teacher_ids)}; scored answer {prompter.shown(item.target_ids)!r}"
        )
    # As decoded from the ids that a run would send: what the template adds or loses shows here.
    say(f"student prompt:\n{prompter.shown(questions[0].student_ids)}\n")
    say(f"teacher prompt:\n{prompter.shown(questions[0].teacher_ids)}\n")
    # Quantiles: one long prompt in a thousand decides the room of every path.
    for view, lengths in length_report(questions).items():
        say(f"{view} prompt tokens: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
    if not _stand_in(intake):
        records = read_records(cfg, intake)
        for line in () if records is None else records.notes:
            say(line)
    _say_benchmarks(benchmarks, say)
    for line in whole_pass(cfg, len(questions)):
        say(line)
    # After the data: lengths are checked by the prompts that there are, not by their limits.
    check_models(cfg, text.config, text.tokenizer)
    check_config(cfg, text.config, on.processes, questions=questions, benchmarks=benchmarks, on=on)
    if slow := slow_engine(cfg, cuda=on.cuda):
        say(slow)
    for line in needs(cfg, text.config, questions, benchmarks, on=on, stated=rates):
        say(line)


def _questions(cfg: DataConfig, *, parseable: Judge, say: Say) -> LoadedQuestions:
    """Load the training questions, or built-in ones for data on a Hub that cannot be reached."""
    remote = [file.path for file in cfg.train if file.path.startswith("hub:")]
    # A missing file of this machine stays an error: the run would end with it too.
    reason = next(filter(None, map(_unreachable, remote)), None)
    if reason is None:
        try:
            return load_training(cfg, parseable=parseable)
        except DataError as error:
            if not (remote and is_offline_mode()):
                raise
            reason = str(error)
    names = ", ".join(remote)
    say(f"data: {reason}; {ITEMS} built-in questions stand in, the run itself needs {names}")
    return LoadedQuestions(SAMPLE_QUESTIONS)


def _stand_in(intake: Intake) -> bool:
    return intake.questions[0].question in SAMPLE_QUESTIONS


def _check_questions(cfg: Config, intake: Intake, verifier: Verifier) -> None:
    """Raise the error that the run would end with, if these are its questions."""
    if not _stand_in(intake):
        prompter = intake.text.prompter
        known = {"prompt": prompter.prompt, "responses": prompter.responses}
        check_questions(cfg, intake.questions, **known, verify=verifier.verify)


def _reachable(cfg: Config, say: Say) -> EvalConfig:
    """Return `cfg.eval` with the files that can be reached."""
    files = []
    for file in cfg.eval.data:
        reason = _unreachable(file.path)
        # Unlike training data a benchmark is left out at once: its cache is not looked into.
        if reason is None and file.path.startswith("hub:") and is_offline_mode():
            reason = "the Hub is switched off"
        if reason is None:
            files.append(file)
        else:
            say(f"eval.data: {reason}; {file.path} is left out here, the run itself needs it")
    return replace(cfg.eval, data=tuple(files))


def _say_benchmarks(benchmarks: Mapping[str, Benchmark], say: Say) -> None:
    for name, benchmark in benchmarks.items():
        for line in benchmark.loaded.lines():
            say(f"benchmark {name}: {line}")
        most = max(ids.numel() for _, ids in benchmark.questions)
        say(f"benchmark {name}: {len(benchmark.questions)} questions, prompt tokens at most {most}")


def _unreachable(source: str) -> str | None:
    """Say why data on a Hub cannot be asked for; None also in offline mode: a cache may hold it."""
    return "the Hub does not answer" if source.startswith("hub:") and hub.silent() else None

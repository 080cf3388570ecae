"""Questions from files or the Hugging Face Hub, and which of them a step works on.

Nothing is repaired in silence: what cannot be read is an error with its place, what is dropped is
counted and named, and where an answer was found in a longer text the run says so.

    files.py    rows of files, by format, of directories and of the Hub
    rows.py     keys into a row, choices
    answers.py  the final answer and its plainest spelling; recipes.py: published data sets
    steps.py    which questions a step works on
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vpgea_fast.config import DataConfig, DataFile, EvalConfig
from vpgea_fast.data.answers import WORKED, normalise_answer
from vpgea_fast.data.files import KINDS, DataError, Row, open_rows
from vpgea_fast.data.rows import make_question
from vpgea_fast.data.steps import round_questions, step_questions, step_shares
from vpgea_fast.types import PromptedQuestion, Question

__all__ = [
    "Benchmark",
    "DataError",
    "Drop",
    "Judge",
    "LoadedQuestions",
    "check_first_rows",
    "dropped_rows",
    "fingerprint",
    "load_benchmarks",
    "load_questions",
    "load_rows",
    "load_training",
    "long_targets",
    "make_benchmark",
    "normalise_answer",
    "round_questions",
    "shown_drops",
    "step_questions",
    "step_shares",
    "unfit",
    "write_dropped",
]
SHOWN = 5  # dropped rows per reason that a run prints
LONG_TARGET = 64
"""Tokens of a scored answer above which it is probably no final answer."""

Source = tuple[str, Iterator[tuple[int, Row]]]
"""What a row is called, and the rows with their numbers, from 1."""
Judge = Callable[[list[str]], list[bool]]
"""A verifier's judgement of many answers: which of them accept themselves."""


@dataclass(frozen=True)
class Drop:
    """A row that is left out, and why."""

    question: Question
    reason: str

    def __str__(self) -> str:
        q = self.question
        return f"{q.place} ({q.id!r}): {self.reason} {_cut(q.answer)}"


@dataclass(frozen=True)
class LoadedQuestions:
    """The usable questions in the order of their source, the others, and what is to be told.

    >>> bad = Drop(Question(id="row-2", text="What?", answer=""), "empty answer")
    >>> good = Question(id="row-1", text="2 + 2 = ?", answer="4")
    >>> LoadedQuestions((good,), (bad,)).dropped
    {'empty answer': 1}
    """

    questions: tuple[Question, ...]
    drops: tuple[Drop, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def dropped(self) -> dict[str, int]:
        """How many were dropped for what."""
        return dict(Counter(drop.reason for drop in self.drops))

    def lines(self) -> list[str]:
        """What a run says of its data: the notes, and the first dropped rows of each reason."""
        return [*self.notes, *shown_drops(self.drops)]


def load_training(cfg: DataConfig, *, parseable: Judge | None = None) -> LoadedQuestions:
    """The questions of every file in `cfg.train` as one data set, in the order of the files."""
    # By name, which the configuration has checked to be the file's own.
    parts = {f.label: load_questions(f, cfg, parseable=parseable) for f in cfg.train}
    # One file alone keeps its ids and notes as they are: no label before them.
    return next(iter(parts.values())) if len(parts) == 1 else _merged(parts)


def check_first_rows(files: Iterable[DataFile], cfg: DataConfig) -> None:
    """Read the first row of each file: a wrong name or key is a DataError at once, before models
    and their libraries are. What lies on the Hub is left to the run."""
    for file in files:
        if not file.path.startswith("hub:"):
            _read(replace(cfg.filled(file), limit=1), open_rows(file.path))


def load_questions(
    source: str | DataFile, cfg: DataConfig, *, parseable: Judge | None = None
) -> LoadedQuestions:
    """Read, check and normalise the first `limit` rows of a source (see files.KINDS).

    A row needs `question_key` and `answer_key`, of the file or else of `cfg`. Its id is what
    `id_key` holds, else `row-N` for line or row N of the source. An answer that is empty, a worked
    solution without a final answer, or refused by `parseable` (a verifier's judgement of many) is
    dropped and named, or an error, by `cfg.bad_answer`. All else that is wrong is a DataError with
    its place.
    """
    file = cfg.filled(DataFile(source) if isinstance(source, str) else source)
    return _checked(file, open_rows(file.path), cfg, parseable)


def load_rows(
    rows: Iterable[Row], name: str, cfg: DataConfig, *, parseable: Judge | None = None
) -> LoadedQuestions:
    """`load_questions` of rows that a program holds; `name` says where they are from."""
    return _checked(cfg.filled(DataFile(name)), ("row", enumerate(rows, 1)), cfg, parseable)


def _checked(
    file: DataFile, source: Source, cfg: DataConfig, parseable: Judge | None
) -> LoadedQuestions:
    # The whole file before the verifier: one call of many answers costs less than many of one.
    questions, bad, notes = _read(file, source)
    bad |= _refused(questions, bad, parseable)
    # Unusable answers are one decision of the user's, so both kinds are counted together.
    drops = tuple(Drop(q, bad[q.id]) for q in questions if q.id in bad)
    if drops and cfg.bad_answer == "error":
        first = drops[0]
        raise DataError(
            f"{first.question.place}: {first.reason} {_cut(first.question.answer)} under "
            f"{file.answer_key!r} ({len(drops)} such in all); repair it"
            + (", name the final answer in data.answer_key" if first.reason == WORKED else "")
            + ", or set data.bad_answer to drop"
        )
    loaded = LoadedQuestions(tuple(q for q in questions if q.id not in bad), drops, tuple(notes))
    # Dropping all of them is the mark of a wrong answer_key, and no data set to train on.
    if not loaded.questions:
        raise DataError(
            f"{file.path}: all {len(questions)} questions have an unusable answer "
            f"({loaded.dropped}, the first is {drops[0]}); see whether data.answer_key, now "
            f"{file.answer_key!r}, names the final answer, and whether verify.name suits it"
        )
    return loaded


@dataclass(frozen=True)
class Benchmark:
    """The questions of one file with their student prompts: all that an evaluation knows. `shown`
    is what the ids of the first prompt say, `loaded` what the file held; two keys are its own."""

    questions: tuple[tuple[Question, Tensor], ...]
    loaded: LoadedQuestions
    shown: str
    samples: int | None = None  # None: eval.samples
    student: str | None = None  # None: prompt.student

    @property
    def dropped(self) -> Mapping[str, int]:
        return self.loaded.dropped


class StudentPrompts(Protocol):
    """What of a Prompter an evaluation may use: no teacher prompt can reach it."""

    def student_ids(
        self, question_texts: Sequence[str], ids: Sequence[str] | None = None
    ) -> list[Tensor]: ...

    def shown(self, ids: Tensor) -> str: ...

    def asking(self, student: str | None) -> StudentPrompts: ...


def load_benchmarks(
    cfg: EvalConfig,
    data: DataConfig,
    prompter: StudentPrompts,
    *,
    parseable: Judge | None = None,
) -> dict[str, Benchmark]:
    """name -> benchmark, of every file in `cfg.data`, with its own keys. ValueError for two of one
    name, for a prompt above data.max_prompt_tokens (the rest would be another benchmark), and if
    nothing is drawn."""
    # Found before the model is loaded: the result would be a table without rows.
    if cfg.data and not any(cfg.answers(file.samples) for file in cfg.data):
        raise ValueError(
            "eval.samples is 0 and eval.greedy is false, so no answer would be drawn; set one"
        )
    benchmarks: dict[str, Benchmark] = {}
    for file in cfg.data:
        name = file.label
        if name in benchmarks:
            raise ValueError(
                f"eval.data names two benchmarks {name!r}; give one another `name`, or rename it"
            )
        # eval.limit in the place of data.limit; a limit of the file's own still wins.
        loaded = load_questions(file, replace(data, limit=cfg.limit), parseable=parseable)
        made = make_benchmark(name, loaded, data, prompter.asking(file.student))
        benchmarks[name] = replace(made, samples=file.samples, student=file.student)
    return benchmarks


def make_benchmark(
    name: str, loaded: LoadedQuestions, data: DataConfig, prompter: StudentPrompts
) -> Benchmark:
    """The student's prompts of an evaluation's questions. ValueError for a prompt above
    data.max_prompt_tokens."""
    texts, names = ([getattr(q, key) for q in loaded.questions] for key in ("text", "id"))
    ids = prompter.student_ids(texts, names)
    questions = tuple(zip(loaded.questions, ids, strict=True))
    # An accuracy over the shorter questions alone would look like the benchmark's.
    long = [q.id for q, ids in questions if ids.numel() > data.max_prompt_tokens]
    if long:
        raise ValueError(
            f"benchmark {name}: {len(long)} prompts are longer than {data.max_prompt_tokens} "
            f"tokens (the first is question {long[0]!r}), and an evaluation leaves none out, "
            f"whatever data.overlong says (now {data.overlong!r}): the rest would be another "
            "benchmark; raise data.max_prompt_tokens, or take them out of the file"
        )
    return Benchmark(questions, loaded, prompter.shown(ids[0]))


def unfit(
    loaded: LoadedQuestions,
    kept: Sequence[PromptedQuestion],
    counts: Mapping[str, int],
    has_special: Callable[..., bool],
) -> LoadedQuestions:
    """`loaded` without what `Prompter.prompt_within` left out (`counts`, by reason)."""
    reasons = [reason for reason, count in counts.items() if count]
    fit = {item.question.id for item in kept}
    lost = [question for question in loaded.questions if question.id not in fit]

    def reason(q: Question) -> str:
        steers = has_special(q.text, q.answer, q.solution, *q.variants)
        # Two reasons are told apart by asking again; one needs no question.
        said = [r for r in reasons if ("special" in r) == steers] if len(reasons) > 1 else reasons
        return " or ".join(said)

    drops = (*loaded.drops, *(Drop(question, reason(question)) for question in lost))
    return replace(loaded, questions=tuple(item.question for item in kept), drops=drops)


def long_targets(prompted: Sequence[PromptedQuestion]) -> list[str]:
    """A line of warning where a scored answer has more than LONG_TARGET tokens."""
    # A long target makes log P(answer) a sum over many tokens, and a solution is no answer.
    long = [item for item in prompted if item.target_ids.numel() > LONG_TARGET]
    if not long:
        return []
    most = max(long, key=lambda item: item.target_ids.numel())
    line = (
        f"{len(long)} of {len(prompted)} scored answers have more than {LONG_TARGET} tokens, the "
        f"longest {most.target_ids.numel()} ({most.question.place or most.question.id}): see "
        "whether data.answer_key names the final answer"
    )
    return [line]


def write_dropped(file: str | None, loaded: Iterable[LoadedQuestions]) -> None:
    """Write every dropped row as a JSON line, if data.dropped_file names a file."""
    if file is None:
        return
    text = "".join(json.dumps(row) + "\n" for row in dropped_rows(loaded))
    # Before the open, which would empty it.
    _check_replaceable(Path(file))
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"data.dropped_file {file}: {error.strerror}; name a file in a directory that exists"
        ) from error


def _check_replaceable(file: Path) -> None:
    """Refuse a file that holds anything but dropped rows, with a DataError: it would be lost."""
    if not file.is_file() or file.stat().st_size == 0:
        return
    # One line tells: the file may be someone's data set of gigabytes.
    with file.open("rb") as opened:
        first = opened.readline(1 << 20)
    if not first.startswith(b'{"place": '):
        raise DataError(
            f"data.dropped_file {file} is there and holds something else ({first[:40]!r}); name a "
            "new file"
        )


def dropped_rows(loaded: Iterable[LoadedQuestions]) -> list[dict[str, str]]:
    """Place, reason, id and answer of every dropped row."""
    return [
        {
            "place": d.question.place,
            "reason": d.reason,
            "id": d.question.id,
            "answer": d.question.answer,
        }
        for part in loaded
        for d in part.drops
    ]


def shown_drops(drops: Sequence[Drop], file: str = "data.dropped_file") -> list[str]:
    """The first SHOWN of each reason, and how many more there are; `file` lists all."""
    # A dict keeps the order in which the reasons came up.
    by_reason: dict[str, list[Drop]] = {}
    for drop in drops:
        by_reason.setdefault(drop.reason, []).append(drop)
    lines = []
    for reason, group in by_reason.items():
        # A wrong key drops every row: a log of 40,000 lines would hide the reason.
        lines += [f"dropped: {drop}" for drop in group[:SHOWN]]
        if len(group) > SHOWN:
            lines.append(f"dropped: {len(group) - SHOWN} more ({reason}); {file} lists all")
    return lines


def fingerprint(questions: Sequence[Question]) -> str:
    """BLAKE2b over questions in their order: a resumed run must see the same ones."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        # JSON keeps the three apart: id "a" and text "bc" is not id "ab" and text "c".
        # What few data have only where it is there, so that the number of others stays what it was.
        whole: list[object] = [question.id, question.text, question.answer, *question.responses]
        whole += [[*question.variants]] if question.variants else []
        whole += [{"solution": question.solution}] if question.solution else []
        digest.update(json.dumps(whole).encode())
    return digest.hexdigest()


def _merged(parts: Mapping[str, LoadedQuestions]) -> LoadedQuestions:
    """Several files as one data set; ids that two files have get their file's name before them."""
    # Within one file ids are unique already (`_read`), so a count above 1 is a clash of two.
    counts = Counter(q.id for part in parts.values() for q in part.questions)
    # All ids change or none, so that an id tells its file throughout a run.
    clash = any(count > 1 for count in counts.values())

    def named(q: Question) -> Question:
        return replace(q, id=f"{q.file}/{q.id}") if clash else q

    return LoadedQuestions(
        tuple(named(q) for part in parts.values() for q in part.questions),
        tuple(drop for part in parts.values() for drop in part.drops),
        tuple(
            f"{name}: {line}"
            for name, part in parts.items()
            for line in (f"{len(part.questions)} questions", *part.notes)
        ),
    )


def _read(file: DataFile, source: Source) -> tuple[list[Question], dict[str, str], list[str]]:
    """Every question of a file, why the answer of some (by id) cannot be used, and the notes."""
    unit, rows = source
    questions: list[Question] = []
    bad: dict[str, str] = {}
    places: dict[str, str] = {}
    notes: Counter[str] = Counter()
    # Lazily: of JSONL or parquet of gigabytes only `limit` rows are read and parsed.
    for number, row in islice(rows, file.limit):
        place = f"{file.path}, {unit} {number}"
        question, reason = make_question(row, file, number=number, place=place, notes=notes)
        # Ids seed the samples: two questions of one id would draw the same paths.
        if question.id in places:
            raise DataError(
                f"{place}: the id {question.id!r} stands at {places[question.id]} already; make "
                f"ids unique, or name another key in data.id_key (now {file.id_key!r})"
            )
        places[question.id] = place
        questions.append(question)
        if reason is not None:
            bad[question.id] = reason
    if not questions:
        raise DataError(f"{file.path} is empty; expected {KINDS} with at least one question")
    return questions, bad, [f"{count} {what}" for what, count in notes.items()]


def _refused(
    questions: Sequence[Question], bad: Mapping[str, str], parseable: Judge | None
) -> dict[str, str]:
    """The ids of questions whose answer the verifier does not accept -> the reason."""
    if parseable is None:
        return {}
    # An answer that is refused already is not asked again: up to 5 s each.
    asked = [question for question in questions if question.id not in bad]
    verdicts = parseable([question.answer for question in asked])
    refused = [q.id for q, good in zip(asked, verdicts, strict=True) if not good]
    return dict.fromkeys(refused, "answer not accepted")


def _cut(text: str) -> str:
    """Quote at most 80 characters: an answer may be a page."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")

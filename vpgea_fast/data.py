"""Questions from JSONL, parquet or the Hugging Face Hub, and which of them a step works on.

Nothing is repaired in silence: what cannot be read is an error with its place, and what is dropped
is counted by reason.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from vpgea_fast.config import DataConfig, EvalConfig
from vpgea_fast.types import Question

HUB = re.compile(r"hub:(?P<name>[^/:]+/[^/:]+)(/(?P<config>[^:]+))?(:(?P<split>.+))?")
KINDS = "a JSONL file, a .parquet file, a directory, or hub:owner/name[/config][:split]"

Row = Mapping[str, Any]


Item = TypeVar("Item")


class DataError(ValueError):
    """Data that cannot be used; the message says where, what was got and what to do."""


@dataclass(frozen=True)
class LoadedQuestions:
    """The usable questions in the order of their source, and how many were dropped for what.

    >>> LoadedQuestions((Question("row-1", "2 + 2 = ?", "4"),), {"empty answer": 6}).dropped
    {'empty answer': 6}
    """

    questions: tuple[Question, ...]
    dropped: Mapping[str, int]


def load_questions(
    source: str,
    cfg: DataConfig,
    *,
    parseable: Callable[[list[str]], list[bool]] | None = None,
) -> LoadedQuestions:
    """Read, check and normalise the first `cfg.limit` rows of `source` (see KINDS).

    A row needs `cfg.question_key` (text) and `cfg.answer_key` (text or a number). Its id is what
    `cfg.id_key` holds, else `row-N` for line or row N of the source. An empty answer, and one that
    `parseable` (a verifier's judgement of many answers) refuses, is dropped with a count or an
    error, by `cfg.bad_answer`. All else that is wrong is a DataError with its place.
    """
    places = _read(source, cfg)
    bad = _bad_answers(list(places), parseable)
    if bad and cfg.bad_answer == "error":
        first, reason = next(iter(bad.items()))
        raise DataError(
            f"{places[first]}: {reason} {first.answer!r} under {cfg.answer_key!r} ({len(bad)} such "
            "in all); repair it, or set data.bad_answer to drop"
        )
    dropped = dict(Counter(bad.values()))
    if len(bad) == len(places):
        raise DataError(
            f"{source}: all {len(places)} questions have an unusable answer ({dropped}); see "
            f"whether data.answer_key, now {cfg.answer_key!r}, names the final answer"
        )
    return LoadedQuestions(tuple(q for q in places if q not in bad), dropped)


@dataclass(frozen=True)
class Benchmark:
    """The questions of one file with their student prompts: all that an evaluation knows. `shown`
    is what the ids of the first prompt say."""

    questions: tuple[tuple[Question, Tensor], ...]
    dropped: Mapping[str, int]
    shown: str


class StudentPrompts(Protocol):
    """What of a Prompter an evaluation may use: no teacher prompt can reach it."""

    def student_ids(self, question_texts: Sequence[str]) -> list[Tensor]: ...

    def shown(self, ids: Tensor) -> str: ...


def load_benchmarks(
    cfg: EvalConfig,
    data: DataConfig,
    prompter: StudentPrompts,
    *,
    parseable: Callable[[list[str]], list[bool]] | None = None,
) -> dict[str, Benchmark]:
    """name -> benchmark, of every file in `cfg.data`. ValueError for two of one name, for a prompt
    above data.max_prompt_tokens (the rest would be another benchmark), and if nothing is drawn."""
    if cfg.data and not (cfg.samples or cfg.greedy):
        raise ValueError(
            "eval.samples is 0 and eval.greedy is false, so no answer would be drawn; set one"
        )
    found: dict[str, Benchmark] = {}
    for source in cfg.data:
        loaded = load_questions(source, replace(data, limit=cfg.limit), parseable=parseable)
        name = Path(source).stem
        if name in found:
            raise ValueError(f"eval.data names two benchmarks {name!r}; rename one of the files")
        texts = [question.text for question in loaded.questions]
        questions = tuple(zip(loaded.questions, prompter.student_ids(texts), strict=True))
        long = [q.id for q, ids in questions if ids.numel() > data.max_prompt_tokens]
        if long:
            raise ValueError(
                f"benchmark {name}: {len(long)} prompts are longer than {data.max_prompt_tokens} "
                f"tokens (the first is question {long[0]!r}); raise data.max_prompt_tokens"
            )
        found[name] = Benchmark(questions, loaded.dropped, prompter.shown(questions[0][1]))
    return found


def step_questions(
    questions: Sequence[Item], *, seed: int | str, step: int, batch: int
) -> list[Item]:
    """The questions of step 0, 1, ...: a pure function of its arguments, so there is no state.

    An epoch is a permutation drawn from (seed, epoch) and cut into floor(n / batch) batches. The
    n mod batch questions at its end sit that epoch out, so that no batch holds a question twice.
    """
    if not 1 <= batch <= len(questions):
        raise DataError(
            f"a step takes {batch} questions and the data set holds {len(questions)}; set "
            f"train.questions_per_step to 1..{len(questions)}, or give more data"
        )
    epoch, index = divmod(step, len(questions) // batch)
    order = list(range(len(questions)))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # 40,000 questions: 20 ms
    return [questions[i] for i in order[index * batch : (index + 1) * batch]]


def fingerprint(questions: Sequence[Question]) -> str:
    """BLAKE2b over questions in their order: a resumed run must see the same ones."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        digest.update(json.dumps([question.id, question.text, question.answer]).encode())
    return digest.hexdigest()


def normalise_answer(answer: str) -> str:
    r"""The bare spelling of a final answer, as it would stand inside \boxed{}.

    Math delimiters, surrounding spaces, trailing dots, \left and \right, and an outer \boxed{} go:
    the likelihood of the answer is that of one spelling, so it should be the plainest one. `\$18`
    (dollars) and invisible delimiters (`\left.`) stay.

    >>> normalise_answer(r" $\boxed{\left(3, \frac{\pi}{2}\right)}$. ")
    '(3, \\frac{\\pi}{2})'
    """
    text = re.sub(r"(?<!\\)(\$|\\[()\[\]])", "", answer)
    if not re.search(r"\\(left|right)\s*\.", text):
        text = re.sub(r"\\(left|right)(?![a-zA-Z])", "", text)
    before = None
    while text != before:
        before = text
        text = _unboxed(re.sub(r"(?<!\\right)[.\s]+$", "", text.strip()))
    return text


def _unboxed(text: str) -> str:
    r"""The inside of a \boxed{} that holds all of `text`; any other text as it is."""
    if not text.startswith(r"\boxed{"):
        return text
    start, depth = len(r"\boxed{"), 1
    for i, char in enumerate(text[start:], start):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:i] if i == len(text) - 1 else text
    return text


def _read(source: str, cfg: DataConfig) -> dict[Question, str]:
    """Every question of the source -> its place there."""
    unit, rows = _open(source)
    places: dict[Question, str] = {}
    seen: dict[str, str] = {}
    for number, row in islice(rows, cfg.limit):
        place = f"{source}, {unit} {number}"
        question = _question(row, cfg, number=number, place=place)
        if question.id in seen:
            raise DataError(
                f"{place}: the id {question.id!r} stands at {seen[question.id]} already; make ids "
                f"unique, or name another key in data.id_key (now {cfg.id_key!r})"
            )
        places[question] = seen[question.id] = place
    if not places:
        raise DataError(f"{source} is empty; expected {KINDS} with at least one question")
    return places


def _bad_answers(
    questions: Sequence[Question], parseable: Callable[[list[str]], list[bool]] | None
) -> dict[Question, str]:
    """The questions with an unusable answer -> the reason."""
    bad = {question: "empty answer" for question in questions if not question.answer}
    if parseable is not None:
        asked = [question for question in questions if question.answer]
        verdicts = parseable([question.answer for question in asked])
        refused = [q for q, good in zip(asked, verdicts, strict=True) if not good]
        bad |= dict.fromkeys(refused, "unparseable answer")
    return bad


def _question(row: Row, cfg: DataConfig, *, number: int, place: str) -> Question:
    for setting, key in (("question_key", cfg.question_key), ("answer_key", cfg.answer_key)):
        if key not in row:
            raise DataError(
                f"{place}: no key {key!r} among {sorted(row)}; set data.{setting} to the right one"
            )
    text = row[cfg.question_key]
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{place}: expected the text of a question under {cfg.question_key!r}, got {text!r}; "
            "repair the row, or set data.question_key"
        )
    name = row.get(cfg.id_key)
    return Question(
        id=f"row-{number}" if name is None or name == "" else str(name),
        text=text,
        answer=_spelled(row[cfg.answer_key], key=cfg.answer_key, place=place),
        variants=_variants(row, cfg, place=place),
    )


def _variants(row: Row, cfg: DataConfig, *, place: str) -> tuple[str, ...]:
    if cfg.variants_key is None or row.get(cfg.variants_key) is None:
        return ()
    listed = row[cfg.variants_key]
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise DataError(
            f"{place}: expected a list of answers under {cfg.variants_key!r}, got {listed!r}; "
            "repair the row, or set data.variants_key to null"
        )
    spelled = [_spelled(value, key=cfg.variants_key, place=place) for value in listed]
    return tuple(text for text in dict.fromkeys(spelled) if text)


def _spelled(value: object, *, key: str, place: str) -> str:
    """The answer as text; what tables put for a missing one (null, NaN) as an empty text."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return normalise_answer(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise DataError(
            f"{place}: expected an answer (text or a number) under {key!r}, got {value!r}; give "
            "one reference answer, or set data.answer_key"
        )
    # A column of integers with one hole arrives as floats: 204.0 means 204.
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _open(source: str) -> tuple[str, Iterator[tuple[int, Row]]]:
    """What a row is called there, and the numbered rows."""
    path = Path(source)
    if source.startswith("hub:"):
        return "row", enumerate(_hub_rows(source), 1)
    if path.is_dir():
        return "row", enumerate(_directory_rows(path), 1)
    if not path.is_file():
        raise DataError(f"there is no file {source}; expected {KINDS}")
    if path.suffix == ".parquet":
        return "row", enumerate(_parquet_rows(path), 1)
    return "line", _json_lines(path)


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(line, place=f"{path}, line {number}")


def _json_object(line: bytes, *, place: str) -> Row:
    try:
        row = json.loads(line.rstrip().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        wrong = str(error)
    else:
        if isinstance(row, dict):
            return row
        wrong = f"a {type(row).__name__} instead of an object"
    raise DataError(
        f"{place}: {wrong}: {line[:60]!r}; expected one JSON object a line, in UTF-8"
    ) from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _directory_rows(path: Path) -> Iterable[Any]:
    """A directory that `datasets` saved, or one of data files; of several splits `train`."""
    import datasets

    try:
        if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), split="train")
        saved = datasets.load_from_disk(str(path))
        return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {error}; expected a split `train` in the directory") from error


def _hub_rows(source: str) -> Iterable[Any]:
    import datasets

    parts = HUB.fullmatch(source)
    if parts is None:
        raise DataError(f"expected hub:owner/name[/config][:split], got {source!r}")
    try:
        split = parts["split"] or "train"
        return datasets.load_dataset(parts["name"], parts["config"], split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}: {error}; expected hub:owner/name[/config][:split] of a data set that can "
            "be reached, or take a copy of it as a file"
        ) from error

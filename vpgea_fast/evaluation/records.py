"""Records of an evaluation: one JSON line per sample, in the order in which samples ended.

A folder holds `eval.json` (model, settings, question sets; written first), `samples.jsonl` (this
file's `Sample`s) and `times.jsonl` (seconds apart, so that records are repeatable bit for bit).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from vpgea_fast.book import MODES
from vpgea_fast.types import Finish

HEADER, SAMPLES, TIMES = "eval.json", "samples.jsonl", "times.jsonl"
SCHEMA = 1
"""Of the header; raised whenever an older reader would misread a folder."""

Mode = Literal["sampled", "greedy"]
Key: TypeAlias = tuple[str, str, str, int]
"""Benchmark, mode, question and index: what no two samples of an evaluation share."""
Note: TypeAlias = Callable[[str], object]


class SampleError(ValueError):
    """A folder, a header or a line that is no evaluation's; the message has place and remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One answer to one question, and its verdict.

    index, seed     which draw of the question it is (0, 1, ...), and with what seed
    ids, tokens     thought and answer as the engine drew them; how many they are, also if cut
    thought_tokens  those up to the end of the thought, think-close included
    text            of all ids; `answer_text` of those behind the thought, "" where it was cut
    prediction      the answer that the checker reads there, canonical where it can; None for none
    correct         1 if the checker accepts it, else 0
    subject, level  as the data has them, else None
    """

    benchmark: str
    mode: Mode
    question_id: str
    index: int
    seed: int
    ids: tuple[int, ...]
    text: str
    answer_text: str
    prediction: str | None
    gold: str
    tokens: int
    thought_tokens: int
    finish: Finish
    correct: int
    subject: str | None = None
    level: str | int | None = None

    @property
    def key(self) -> Key:
        return self.benchmark, self.mode, self.question_id, self.index


# In this order on every line, so that equal samples are equal bytes.
NAMES = tuple(field.name for field in fields(Sample))
TEXTS = ("benchmark", "question_id", "text", "answer_text", "gold")
COUNTS = ("index", "tokens", "thought_tokens")
REMEDY = "bring the file back from a copy, or delete the line and go on with --resume"


def line(sample: Sample) -> str:
    """Write a sample as a line of samples.jsonl, its newline included."""
    # ASCII: a gold may hold half a surrogate pair, which UTF-8 lacks and JSON escapes.
    return json.dumps({name: getattr(sample, name) for name in NAMES}) + "\n"


def read_samples(path: str | Path, note: Note | None = None) -> Iterator[Sample]:
    """Yield the samples of a samples.jsonl, or of the folder that holds one.

    A last line without its newline, of a live or a killed writer, is left out, and `note` is told.
    Raises SampleError with file and line number for any other line that is no sample, and for a
    second one of a key.
    """
    path = Path(path)
    path = path / SAMPLES if path.is_dir() else path
    if not path.is_file():
        raise SampleError(f"{path} is not there; give the folder of an evaluation")
    seen: set[Key] = set()
    # Bytes: a torn line may end inside a character.
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not text.endswith(b"\n"):
                if note is not None:
                    note(f"{where}: not finished, so left out; its writer lives or was killed")
                return
            sample = _read(text, where)
            if sample.key in seen:
                raise SampleError(f"{where}: a second sample of {sample.key}; {REMEDY}")
            seen.add(sample.key)
            yield sample


def whole_bytes(path: str | Path) -> int:
    """Count the bytes of a file up to its last newline: what an appending writer may keep."""
    size = 0
    with Path(path).open("rb") as file:
        for text in file:
            size += len(text) if text.endswith(b"\n") else 0
    return size


def read_header(folder: str | Path) -> dict[str, Any]:
    """Read eval.json: model, settings and benchmarks, as far as a reader needs their shape."""
    path = Path(folder) / HEADER
    if not path.is_file():
        raise SampleError(f"{path} is not there; give the folder of an evaluation")
    try:
        header = json.loads(path.read_bytes())
    # ValueError covers bytes that are no UTF-8 too.
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{path} is not JSON ({error}); bring it back from a copy") from error
    if not isinstance(header, dict) or "schema" not in header:
        raise SampleError(f"{path}: got no schema, expected an evaluation's; it is another file")
    if header["schema"] != SCHEMA:
        got = header["schema"]
        raise SampleError(f"{path}: got schema {got!r:.20}, expected {SCHEMA}; update vpgea_fast")
    # A mapping of mappings, the model's and the benchmarks' fingerprints among them.
    sets = header.get("benchmarks")
    parts = [header.get("model"), header.get("settings"), sets]
    parts += list(sets.values()) if isinstance(sets, dict) else []
    wrong = [part for part in parts if not isinstance(part, dict)]
    if wrong:
        raise SampleError(f"{path}: got {wrong[0]!r:.60}, expected keys and values; {REMEDY}")
    return header


def _read(text: bytes, where: str) -> Sample:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: not JSON ({error}); {REMEDY}") from error
    if not isinstance(record, dict):
        got = type(record).__name__
        raise SampleError(f"{where}: got a {got}, expected an object of a sample; {REMEDY}")
    # No key more either: joining parts writes lines anew, and would lose it.
    if record.keys() != set(NAMES):
        amiss = sorted(record.keys() ^ set(NAMES))
        what = "lacks" if amiss[0] in NAMES else "has an unknown"
        raise SampleError(f"{where}: {what} {amiss[0]!r:.40}; {REMEDY}")
    wrong = _wrong(record)
    if wrong is not None:
        got = record[wrong]
        raise SampleError(f"{where}: {wrong}: got {got!r:.60}, expected a sample's; {REMEDY}")
    return Sample(**{**record, "ids": tuple(record["ids"])})


def _wrong(record: dict[str, Any]) -> str | None:
    """Name a key whose value is no sample's; None where all are."""
    sound = {
        **{name: isinstance(record[name], str) for name in TEXTS},
        # `type`: true is an int to Python, and 1.0 is none.
        **{name: type(record[name]) is int and record[name] >= 0 for name in COUNTS},
        "seed": type(record["seed"]) is int,
        "mode": record["mode"] in MODES,
        "finish": record["finish"] in get_args(Finish),
        "correct": type(record["correct"]) is int and record["correct"] in (0, 1),
        "prediction": isinstance(record["prediction"], (str, type(None))),
        "subject": isinstance(record["subject"], (str, type(None))),
        "level": type(record["level"]) in (str, int, type(None)),
        # set() of the types: 0.1 s for 100,000 answers of 1,000 ids, a loop takes ten times that
        "ids": isinstance(record["ids"], list) and set(map(type, record["ids"])) <= {int},
    }
    wrong = next((name for name, good in sound.items() if not good), None)
    if wrong is not None:
        return wrong
    # What eps3 divides by: a count that its own ids deny is damage.
    if record["tokens"] != len(record["ids"]):
        return "tokens"
    return "thought_tokens" if record["thought_tokens"] > record["tokens"] else None

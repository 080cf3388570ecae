"""Where recorded paths stand, and what of a line is one.

`Records` needs no weight: it is read, and held to the questions of the run, before the model is.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NamedTuple, get_args

import torch

from vpgea_fast.config import ReplayEngineConfig
from vpgea_fast.types import Finish, Stream

Key = tuple[int | None, str, str, int]
"""Step from 1 (None: every step), question, stream, index."""


class RecordError(ValueError):
    """Recorded paths that cannot be used: the message says where, what was got and what to do."""


class Place(NamedTuple):
    """Where a line stands."""

    file: str
    number: int
    offset: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.number}"


@dataclass(frozen=True)
class Expected:
    """What a run asks for, as far as it is known before its first step.

    decode       token ids -> text, without special tokens
    vocabulary   tokens that the model embeds: an id beyond it is refused
    questions    id -> text
    prompts      (id, stream) -> `prompt_digest` of the prompt; none where paths have their own
    temperature  that of the log-probs, the run's own; None: not known, or nothing reads them
    answer_temperature  that of the answers behind a thought; None: nothing reads these
    """

    decode: Callable[[torch.Tensor], str]
    vocabulary: int
    questions: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[tuple[str, str], str] = field(default_factory=dict)
    temperature: float | None = None
    answer_temperature: float | None = None


class Records:
    """Where each recorded path stands. Every line is read and checked once.

    `torn` are last lines without a line break: their writer lives, or was killed in the middle.
    `notes` is what the user should hear.
    RecordError for files that are damaged, or of another model's or run's paths.
    """

    def __init__(self, cfg: ReplayEngineConfig, expected: Expected) -> None:
        self.cfg, self.expected = cfg, expected
        self.torn: list[Place] = []
        self.notes: list[str] = []
        self.index = self._read()
        # None where no line has a step: such a record does not end.
        self.last = max((step for step, *_ in self.index if step is not None), default=None)

    def find(self, key: Key) -> Place:
        """The line of a path of a step. RecordError where there is none."""
        # A line without a step stands for every step.
        place = self.index.get(key) or self.index.get((None, *key[1:]))
        if place is None:
            raise RecordError(self._missing(key))
        return place

    def read(self, place: Place) -> Mapping[str, Any]:
        """The line at `place`, checked anew: files change."""
        return _parse(_line_at(place), place)[1]

    def require(self, wanted: Iterable[Key]) -> None:
        """Look for the paths that a run will ask for, step by step. RecordError for a gap. A record
        that ends before the run is told of in `notes`: the run may end as early itself."""
        for key in wanted:
            step = key[0]
            assert step is not None
            if self.last is not None and step > self.last and (None, *key[1:]) not in self.index:
                self.notes.append(
                    f"engine.paths: the record ends with step {self.last}; the run ends there with "
                    "an error, unless a limit or an alarm has ended it: set train.steps "
                    f"{self.last}, or give more paths{self._torn()}"
                )
                return
            # For its error: a gap is told before the model is read, and not in its step.
            self.find(key)

    def require_text(self, record: Mapping[str, Any], place: Place) -> None:
        """Refuse a line whose text is not what its ids say: these are of another tokenizer."""
        for ids, name in (("ids", "text"), ("answer_ids", "answer")):
            said = record.get(name)
            if not isinstance(said, str) or ids not in record:
                continue
            decoded = self.expected.decode(torch.tensor(record[ids], dtype=torch.int64))
            # White space may be tidied by another version of the same tokenizer.
            if "".join(decoded.split()) != "".join(said.split()):
                raise RecordError(
                    f"{place}: its {ids} say {decoded!r:.60} with this model's tokenizer, and its "
                    f"{name} is {said!r:.60}; give paths of a model with the same tokenizer"
                )

    def require_prompt(self, record: Mapping[str, Any], place: Place, now: str | None) -> None:
        """Refuse a line that was drawn from another prompt than that of this digest."""
        if now is not None and record.get("prompt") not in (None, now):
            raise RecordError(
                f"{place}: the {record['stream']} path of question {record['question_id']!r} was "
                "drawn from another prompt than this run's; bring back the question, the prompt "
                "section and the objective's fields, or record the paths anew"
            )

    def _read(self) -> dict[Key, Place]:
        index: dict[Key, Place] = {}
        counts: Counter[tuple[int | None, str, str]] = Counter()
        for place, (step, number), record in self._lines():
            by_question = self.cfg.match == "question"
            # By question the steps and numbers of the run that recorded mean nothing.
            group = (None if by_question else step, record["question_id"], record["stream"])
            # Without a number of its own a line is the next of its group.
            key = (*group, counts[group] if number is None or by_question else number)
            counts[group] += 1
            if key in index:
                raise RecordError(
                    f"{place}: path {key[3]} of the {key[2]} stream of question {key[1]!r} of step "
                    f"{key[0]} stands at {index[key]} already; expected each once: take one out, "
                    "or set engine.match question"
                )
            index[key] = place
        if not index:
            raise RecordError(
                f"engine.paths: got {', '.join(self.cfg.paths)} without a line, expected recorded "
                f"paths; give the paths.jsonl of a run{self._torn()}"
            )
        return index

    def _lines(
        self,
    ) -> Iterator[tuple[Place, tuple[int | None, int | None], Mapping[str, Any]]]:
        for file in self.cfg.paths:
            try:
                # Bytes, so that a line can be sought: a place in decoded text is none in the file.
                with FilePath(file).open("rb") as lines:
                    offset = 0
                    for number, line in enumerate(lines, 1):
                        place, offset = Place(file, number, offset), offset + len(line)
                        if not line.endswith(b"\n"):
                            self.torn.append(place)
                            continue
                        found, record = _parse(line, place)
                        self._require_own(record, place)
                        yield place, found, record
            except OSError as error:
                raise RecordError(
                    f"engine.paths: cannot read {file} ({error.strerror}); expected a JSONL file "
                    "of paths"
                ) from error

    def _require_own(self, record: Mapping[str, Any], place: Place) -> None:
        """Refuse a line of another run's question, prompt, temperature or tokenizer."""
        drawn_at, now = record.get("temperature"), self.expected.temperature
        if None not in (drawn_at, now) and drawn_at != now:
            raise RecordError(
                f"{place}: drawn at temperature {drawn_at}, and rollout.temperature is {now}; set "
                f"it to {drawn_at}: log-probs of two temperatures cannot be compared"
            )
        drawn_at, now = record.get("answer_temperature"), self.expected.answer_temperature
        if None not in (drawn_at, now) and drawn_at != now:
            raise RecordError(
                f"{place}: its answers were sampled at temperature {drawn_at}, and "
                f"scoring.answer_temperature is {now}; set it to {drawn_at}"
            )
        # On a GPU the embedding would end the process without naming the token.
        behind = (token for ids in record.get("attempt_ids", ()) for token in ids)
        most = max([*record["ids"], *record.get("answer_ids", ()), *behind], default=0)
        if most >= self.expected.vocabulary:
            raise RecordError(
                f"{place}: got the token {most}, but the model embeds {self.expected.vocabulary}; "
                "give paths of the same tokenizer"
            )
        name, asked = record["question_id"], record.get("question")
        text = self.expected.questions.get(name)
        if isinstance(asked, str) and text is not None and asked != text:
            raise RecordError(
                f"{place}: question {name!r} is {asked!r:.60} there and {text!r:.60} in the data; "
                "give the data that the paths were drawn with"
            )
        self.require_prompt(record, place, self.expected.prompts.get((name, record["stream"])))
        # The first tells; each other one is decoded when it is asked for.
        if place.number == 1:
            self.require_text(record, place)

    def _torn(self) -> str:
        lines = ", ".join(map(str, self.torn))
        return f"; torn, and left out: {lines}" if lines else ""

    def _missing(self, key: Key) -> str:
        step, question, stream, index = key
        had = sum(1 for _, q, s, _ in self.index if (q, s) == (question, stream))
        steps = [step for step, *_ in self.index if step is not None]
        held = f"steps {min(steps)} to {max(steps)}" if steps else "no steps"
        return (
            f"engine.paths: got no path {index} of the {stream} stream of question {question!r} "
            f"for step {step}, expected a line for every path that the objective draws; the files "
            f"hold {had} of this question and stream, and {len(self.index)} in all, of {held}"
            f"{self._torn()}: record with metrics.paths_per_step of all paths of a step and replay "
            "with the same data, run.seed and train.questions_per_step, or set engine.match "
            "question"
        )


def _line_at(place: Place) -> bytes:
    try:
        with FilePath(place.file).open("rb") as file:
            file.seek(place.offset)
            return file.readline()
    except OSError as error:
        raise RecordError(
            f"{place}: cannot be read any more ({error.strerror}); put the file back and go on "
            "with --resume"
        ) from error


def _parse(line: bytes, place: Place) -> tuple[tuple[int | None, int | None], Mapping[str, Any]]:
    """Step and index of a line, and all of it, checked."""
    try:
        record = json.loads(line)
    # Thousands of brackets in one another end json's own recursion.
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"{place}: not JSON ({error}); expected an object of a path per line, as the "
            "paths.jsonl of a run holds them: give such a file, or take the line out"
        ) from error
    wrong = _wrong(record) if isinstance(record, dict) else f"a {type(record).__name__}"
    if wrong:
        raise RecordError(
            f"{place}: got {wrong}; expected an object with question_id, stream and ids, as a run "
            "writes it: repair the line, or take it out"
        )
    return (record.get("step"), record.get("index")), record


def _wrong(record: Mapping[str, Any]) -> str | None:
    """What of a line is no recorded path."""
    if not isinstance(record.get("question_id"), str):
        return f"question_id {record.get('question_id')!r}"
    if record.get("stream") not in get_args(Stream):
        return f"stream {record.get('stream')!r}"
    if record.get("finish", "stop") not in get_args(Finish):
        return f"finish {record['finish']!r}"
    for name, least in (("step", 1), ("index", 0)):
        value = record.get(name)
        # Not isinstance: true is an int to Python, and would be step 1.
        if value is not None and (type(value) is not int or value < least):
            return f"{name} {value!r}"
    for name in ("ids", "answer_ids"):
        if name == "ids" and name not in record:
            return "no ids"
        value = record.get(name, [])
        if not _are_ids(value):
            return f"{name} {str(value)[:40]!r}"
    for name in ("logps", "answer_logps"):
        value = record.get(name, [])
        if not isinstance(value, list):
            return f"{name} {str(value)[:40]!r}"
        wrong = [v for v in value if v is not None and not _is_logp(v)]
        if wrong:
            return f"{name} with {wrong[0]!r}, no log-prob"
    share = record.get("share")
    if share is not None and (type(share) not in (int, float) or not 0 <= share <= 1):
        return f"share {share!r}"
    return _wrong_attempts(record)


def _wrong_attempts(record: Mapping[str, Any]) -> str | None:
    """What of a line is no answers behind a thought."""
    texts, right, places = (
        record.get(name, []) for name in ("attempt_ids", "attempt_right", "attempts")
    )
    for name, value, fits in (
        ("attempt_ids", texts, _are_ids),
        ("attempt_right", right, lambda v: type(v) is bool),
        ("attempts", places, lambda v: type(v) is int and 0 <= v < len(texts)),
    ):
        if not isinstance(value, list) or not all(map(fits, value)):
            return f"{name} {str(value)[:40]!r}"
    if len(right) != len(texts):
        return f"attempt_right {str(right)[:40]!r} beside {len(texts)} attempt_ids"
    return None


def _is_logp(value: Any) -> bool:
    # The rounding of bfloat16 lifts a certain token above 0. What is clearly above it is another
    # number: as an importance weight it would scale the gradient by e^-value, and nobody would see.
    return type(value) in (int, float) and -math.inf < value < 0.1


def _are_ids(value: Any) -> bool:
    # bool is an int to Python, and no token.
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

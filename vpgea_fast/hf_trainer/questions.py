"""A dataset as questions: columns prompt and answer, plain or conversational, checked as every
other source of this project; and a reward function that judges their answers.

    Dataset -> load_rows -> prompts of both views -> Asked, whose items are the ids of its questions
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vpgea_fast.config import Config
from vpgea_fast.data import (
    Benchmark,
    DataError,
    Judge,
    LoadedQuestions,
    load_rows,
    make_benchmark,
    unfit,
)
from vpgea_fast.distributed import World
from vpgea_fast.prompts import Prompter
from vpgea_fast.types import Path, PromptedQuestion, Question

RewardFunc = Callable[..., Sequence[float]]
"""`f(prompts=, completions=, completion_ids=, **columns)`, lists of equal length -> 1 for each
right answer and 0 for each other; TRL's signature."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked(Sequence[str]):
    """The questions of a dataset. An item is a question's id: what a batch has to know of it.

    `rows` is the dataset that was given, `places` says which row a question was made of.
    `prompted` has both views of those that are trained, `benchmark` the student's alone.
    """

    name: str
    rows: Any
    ids: tuple[str, ...]
    places: Mapping[str, int]
    prompted: Mapping[str, PromptedQuestion]
    benchmark: Benchmark | None = None

    @classmethod
    def of(cls, name: str, rows: Any, questions: Iterable[Question], **views: Any) -> Asked:
        # A question's place ends in the number of its row, from 1.
        places = {q.id: int(q.place.rpartition(" ")[2]) - 1 for q in questions}
        return cls(name, rows, (*places,), places, **views)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: Any) -> Any:
        return self.ids[place]

    def row(self, question_id: str) -> Mapping[str, Any]:
        """The row that a question was made of."""
        return self.rows[self.places[question_id]]


def training_questions(
    rows: Any, name: str, cfg: Config, prompter: Prompter, accepts: Judge
) -> Asked:
    """The rows as questions with both prompts. Errors: DataError, ConfigError.

    What data.bad_answer and data.overlong let drop is dropped, and told to the log.
    """
    loaded = _loaded(rows, name, cfg, accepts)
    limit, policy = cfg.data.max_prompt_tokens, cfg.data.overlong
    # Of both views: the teacher's shows the answer, and may be too long alone.
    items, lost = prompter.prompt_within(loaded.questions, limit=limit, policy=policy)
    _tell(unfit(loaded, items, lost, prompter.has_special), name)
    prompted = {item.question.id: item for item in items}
    return Asked.of(name, rows, (item.question for item in items), prompted=prompted)


def evaluation_questions(
    rows: Any, name: str, cfg: Config, prompter: Prompter, accepts: Judge
) -> Asked:
    """The rows as questions with the student's prompt alone; none may be too long."""
    loaded = _loaded(rows, name, cfg, accepts)
    _tell(loaded, name)
    # Here nothing is dropped for its length: accuracy would be of fewer questions.
    benchmark = make_benchmark(name, loaded, cfg.data, prompter)
    return Asked.of(name, rows, loaded.questions, prompted={}, benchmark=benchmark)


def _loaded(rows: Any, name: str, cfg: Config, accepts: Judge) -> LoadedQuestions:
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise DataError(
            f"{name}: got {type(rows).__name__}, expected a Dataset with rows that have numbers; "
            "a stream has none: Dataset.from_list(list(stream))"
        )
    if not len(rows):
        raise DataError(f"{name} is empty; expected at least one row")
    columns = {*getattr(rows, "column_names", rows[0])}
    for key in ("question_key", "answer_key"):
        wanted = getattr(cfg.data, key)
        # A template or a path into a row is no column; `load_rows` checks those.
        if wanted not in columns and not any(mark in wanted for mark in "{."):
            raise DataError(
                f"{name}: no column {wanted!r} among {', '.join(sorted(columns))}; rename one, or "
                f"set sections={{'data': {{'{key}': ...}}}}"
            )
    # By number, so that a question's place leads back to its row.
    return load_rows((rows[i] for i in range(len(rows))), name, cfg.data, parseable=accepts)


def _tell(loaded: LoadedQuestions, name: str) -> None:
    for line in loaded.lines():
        log.warning("%s: %s", name, line)


class RewardJudge:
    """A reward function as the one that says which answers are right. A collective: each process
    judges its share."""

    def __init__(
        self, function: RewardFunc, decode: Callable[[torch.Tensor], str], world: World, column: str
    ) -> None:
        self.function, self.decode, self.world, self.column = function, decode, world, column
        self.name = getattr(function, "__name__", type(function).__name__)
        self.asked: Asked | None = None  # whose paths are judged

    def __call__(self, paths: Sequence[Path]) -> torch.Tensor:
        """(len(paths),) float64, 1.0 where right; a thought without an end has no answer."""
        closed = [place for place, path in enumerate(paths) if path.closed]
        right = torch.zeros(len(paths), dtype=torch.float64)
        # Cut paths left out, each process has as many to judge.
        found = self.world.spread(self._rewards, [paths[place] for place in closed])
        right[closed] = torch.tensor(found, dtype=torch.float64)
        return right

    def _rewards(self, paths: Sequence[Path]) -> list[float]:
        # A process without a share: no user's function need take empty lists.
        if not paths:
            return []
        assert self.asked is not None
        rows = [self.asked.row(path.question_id) for path in paths]
        # Rows of a plain list may differ in their columns.
        names = {name for row in rows for name in row} - {self.column, *RESERVED}
        columns = {name: [row.get(name) for row in rows] for name in names}
        prompts = [row[self.column] for row in rows]
        texts = [self.decode(path.response_ids) for path in paths]
        given = self.function(
            prompts=prompts,
            completions=[_like(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
            completion_ids=[path.response_ids.tolist() for path in paths],
            **columns,
        )
        found = [float("nan") if value is None else float(value) for value in given]
        # None, which TRL takes for no opinion, is NaN by now: every answer needs one.
        wrong = [value for value in found if value not in (0.0, 1.0)]
        if len(found) != len(paths) or wrong:
            got = f"{wrong[0]}" if wrong else f"{len(found)} numbers for {len(paths)} answers"
            raise ValueError(
                f"reward_func {self.name}: got {got}, expected 1 for each right answer and 0 for "
                "each other; the method weighs paths itself"
            )
        return found


RESERVED = ("prompts", "completions", "completion_ids")
"""Arguments of a reward function that no column may be."""


def _like(prompt: Any, text: str) -> Any:
    """A completion in the format of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

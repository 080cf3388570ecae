"""What an objective is: a frozen record of keys with three methods. Nothing else names a method.

    draws()              what a step samples
    needs()              log-probs that must be known before the objective speaks
    terms(batch, state)  scored paths -> the additive parts of the loss, one weight per path

The trainer below knows no algorithm: it draws, scores, makes a row of every path with a weight, and
steps. An objective of your own is a class with these methods (`objective.target`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Any, Literal, Protocol

from pydantic.dataclasses import dataclass

from vpgea_fast.types import Norm, Score, ScoredBatch, Stream, Terms, View
from vpgea_fast.values import STRICT, PositiveFloat


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What a step samples of each question.

    posterior, prior  paths of each stream
    posterior_view    the prompt that the posterior paths are drawn from
    verified          the sampled answers must be judged, so full answers are sampled
    """

    posterior: int = 0
    prior: int = 0
    posterior_view: View = "teacher"
    verified: bool = False
    answers: bool = False

    @property
    def paths(self) -> int:
        """Paths of a question, both streams."""
        return self.posterior + self.prior

    @property
    def plan(self) -> list[tuple[Stream, View, int]]:
        """(stream, view that it is drawn in, paths per question), posterior first."""
        return [
            ("posterior", self.posterior_view, self.posterior),
            ("prior", "student", self.prior),
        ]

    @property
    def counts(self) -> list[int]:
        """Paths per prompt, of the streams that are drawn."""
        return [count for _, _, count in self.plan if count]

    @property
    def teacher(self) -> bool:
        """Anything is drawn from the teacher's prompt."""
        return self.posterior > 0 and self.posterior_view == "teacher"


class Objective(Protocol):
    """A method. The keys of its section are the fields of the class, a frozen pydantic dataclass
    (`Keys` below has those that all of them share)."""

    @property
    def name(self) -> str: ...

    @property
    def norm(self) -> Norm: ...

    @property
    def norm_constant(self) -> float | None: ...

    @property
    def denominator(self) -> Literal["nominal", "effective"]: ...

    def draws(self) -> Draws:
        """Say what a step samples."""
        ...

    def needs(self) -> frozenset[Score]:
        """Say which log-probs `terms` reads. Of part `target` they come as `u_BP` of the stream, of
        other parts as `ScoredBatch.logps`."""
        ...

    def terms(self, batch: ScoredBatch, state: Mapping[str, Any], /) -> Terms:
        """Make the loss of a step. A pure function: `state` is the `Terms.state` of the step
        before, {} at first. It holds values that JSON has, and is saved in every checkpoint."""
        ...

    def at(self, step: int, /) -> Objective:
        """Give the objective of this step, from 0: schedules of keys go this one way."""
        ...

    def notes(self) -> Iterator[str]:
        """Say what a user should know before trusting the curves."""
        ...


@dataclass(frozen=True, config=STRICT)
class Keys:
    """Keys of every objective, and the answers of one that is the same at every step."""

    name: str = ""
    """The method."""
    norm: Norm = "const"
    """What a path's weight is divided by, besides the number of paths. `const`: norm_constant.
    `seq_sum`: nothing. `seq_mean`: its length. `token_mean`: tokens of the whole stream instead."""
    norm_constant: PositiveFloat | None = None
    """C of `const`; null: rollout.max_new_tokens / 4."""
    denominator: Literal["nominal", "effective"] = "nominal"
    """Divide by all questions of the update (`nominal`), or by those that have a gradient
    (`effective`)."""

    def at(self, _step: int, /) -> Any:
        return self

    def notes(self) -> Iterator[str]:
        return iter(())


def scores_answers(objective: Objective) -> bool:
    """The reference answer is scored behind every path: U."""
    return any(score.part == "target" for score in objective.needs())


def reads_reference(objective: Objective) -> bool:
    """Log-probs of the frozen reference policy are read."""
    return any(score.who == "reference" for score in objective.needs())

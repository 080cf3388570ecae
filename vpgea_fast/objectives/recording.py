"""An objective of which nothing is trained: its paths are drawn, or weighed, for a record.

The recipes of Variational Reasoning draw with one model, weigh with another and train a third.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vpgea_fast.names import Norm, Score
from vpgea_fast.objectives.base import Draws, Objective, Term, Terms

if TYPE_CHECKING:
    from vpgea_fast.types import ScoredBatch


@dataclass(frozen=True)
class Recording:
    """`objective` without its rows. With `weighed` its scores are recorded; without, its paths
    alone, and nothing is scored."""

    objective: Any
    weighed: bool

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def norm(self) -> Norm:
        return self.objective.norm

    @property
    def norm_constant(self) -> float | None:
        return self.objective.norm_constant

    @property
    def denominator(self) -> Literal["nominal", "effective"]:
        return self.objective.denominator

    def draws(self) -> Draws:
        draws = replace(self.objective.draws(), trained=False)
        if self.weighed:
            return draws
        behind = {
            "attempts": False,
            "answer_rows": 0,
            "targets": False,
            "by_likelihood": False,
            "u_norm": None,
        }
        return replace(draws, texts=False, stated=False, **behind)

    def needs(self) -> frozenset[Score]:
        return self.objective.needs() if self.weighed else frozenset()

    def terms(self, batch: ScoredBatch, state: Mapping[str, Any], /) -> Terms:
        if self.weighed:
            terms = self.objective.terms(batch, state)
            return terms.without(terms.alive.new_ones(terms.alive.shape))
        parts = tuple(
            Term(name="drawn", stream=stream, view=view, weight_BP=0 * own.length_BP)
            for stream, view, count in self.draws().plan
            if count and (own := batch.stream(stream))
        )
        return Terms(parts=parts)

    def at(self, step: int, /) -> Objective:
        now = self.objective.at(step)
        return self if now is self.objective else replace(self, objective=now)

    def notes(self) -> Iterator[str]:
        yield from self.objective.notes()

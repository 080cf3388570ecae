"""One rollout and the updates that are made of it: a step while it is under way.

    paths, scores, terms -> rows of every update -> one update after the other -> the step's line

A checkpoint between two updates keeps the scored paths and the log-probs that ratios compare with.
Terms, rows and live losses are made of them again: they are functions of the paths, and an
objective's own classes are in no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from vpgea_fast.metrics import PhaseTimer
from vpgea_fast.objectives import Terms
from vpgea_fast.rollout.engine import Usage
from vpgea_fast.rows import checksum
from vpgea_fast.types import (
    Attempt,
    Path,
    PathKey,
    PromptedQuestion,
    Question,
    Score,
    ScoredBatch,
    ScoredPaths,
    TrainRow,
)

Updates = list[list[TrainRow]]
"""The rows of every update of a rollout; epochs share theirs."""
RECORDS = {
    kind.__name__: kind
    for kind in (ScoredBatch, ScoredPaths, Path, Attempt, PromptedQuestion, Question)
}
KIND = "<record>"
"""Key of a record's class in its plain form: no name of a field, of the user's either."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What drawing and scoring leave for the updates of a step, and how far these have come.

    ratios   importance weights of its paths, where there are any
    updates  the rows of each update, with the log-probs that a ratio compares with
    rows     one pass over the questions, with the coefficients of the first policy
    found    metrics from before the first update
    made     metrics of each update made, and why it changed nothing, if it did not
    """

    batch: ScoredBatch
    terms: Terms
    ratios: Mapping[PathKey, Tensor] | None
    updates: Updates
    rows: list[TrainRow]
    found: dict[str, Any]
    usage: Usage
    timer: PhaseTimer
    made: tuple[tuple[dict[str, float | int], str | None], ...] = ()

    @property
    def rest(self) -> Updates:
        """The rows of the updates to come."""
        return self.updates[len(self.made) :]

    @property
    def moved(self) -> bool:
        """The policy is no more the one that drew the paths."""
        return any(reason is None for _, reason in self.made)

    @property
    def skipped(self) -> str | None:
        """Why no update of them changed anything; None if one did."""
        # One update is one: the engine needs the weights, and the run is not idle.
        return None if self.moved else self.made[0][1]

    def after(self, metrics: dict[str, float | int], reason: str | None) -> Rollout:
        """The same with one update more."""
        return replace(self, made=(*self.made, (metrics, reason)))

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of it: tensors of its own, texts and numbers."""
        return plain(
            {
                "batch": self.batch,
                # With what `collect` counted, which the objective, asked again, does not know.
                "metrics": self.terms.metrics,
                # Ratios and old log-probs are of weights that the first update has overwritten.
                "ratios": self.ratios,
                "old": [row.old for row in distinct(self.updates)],
                # By it a resume sees that code or objective gives other coefficients now.
                "rows": checksum(self.rows),
                "found": self.found,
                "usage": [*self.usage],
                "seconds": self.timer.seconds,
                "made": self.made,
            }
        )


def distinct(updates: Updates) -> list[TrainRow]:
    """Every row once, in the order of the updates."""
    # By identity: epochs repeat a row, and two equal paths are two rows.
    return [*{id(row): row for part in updates for row in part}.values()]


def rescored(updates: Updates, old: Sequence[Tensor | None]) -> Updates:
    """The rows with the `old` of each that `Rollout.kept` gave. ValueError for another number of
    rows."""
    rows = distinct(updates)
    if len(rows) != len(old):
        raise ValueError(
            f"its paths give {len(rows)} rows, and gave {len(old)} when they were drawn: the "
            "objective has changed"
        )
    # Replaced once, so that the epochs still share one object.
    known = {id(row): replace(row, old=logps) for row, logps in zip(rows, old, strict=True)}
    return [[known[id(row)] for row in part] for part in updates]


def plain(value: Any) -> Any:
    """The same of what `torch.load(weights_only=True)` gives back: records are dicts of their
    fields, and every tensor has its own memory. TypeError for a value of another kind."""
    if isinstance(value, Tensor):
        # A slice would bring all of its storage into the file.
        return value.detach().cpu().clone()
    if is_dataclass(value) and type(value).__name__ in RECORDS:
        columns = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        # By name: weights_only would refuse to unpickle the class.
        return {KIND: type(value).__name__, **columns}
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    # A named tuple loses its class here; `revived`, or who reads the key, gives it back.
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, list):
        return [plain(item) for item in value]
    # Before int, of which bool is a subclass.
    if value is None or isinstance(value, bool):
        return value
    # Of the class itself: a subclass (numpy has some) is no value that weights_only reads.
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"got a {type(value).__name__}, expected tensors, texts and numbers")


def revived(value: Any) -> Any:
    """What `plain` was given; named tuples are tuples, but for the scores of a batch."""
    if isinstance(value, dict):
        columns = {key: revived(item) for key, item in value.items() if key != KIND}
        if KIND not in value:
            return columns
        # A plain tuple would be found as a key, but has no `part` or `view` to read.
        if value[KIND] == ScoredBatch.__name__:
            columns["logps"] = {Score(*key): logps for key, logps in columns["logps"].items()}
        return RECORDS[value[KIND]](**columns)
    if isinstance(value, (tuple, list)):
        return type(value)(map(revived, value))
    return value

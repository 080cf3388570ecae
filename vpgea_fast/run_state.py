"""What changes in a run, beside parameters, optimiser states and random generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vpgea_fast.checkpoint import Checkpoint
from vpgea_fast.types import TrainRow
from vpgea_fast.updates import Rollout


@dataclass(kw_only=True)
class RunState:
    """The counts of a run, and the step that is under way. A checkpoint keeps them; `halted` and
    `offending` it does not: a resume looks again.

    step              whole steps made
    tokens            sampled so far
    method            what the objective keeps from step to step
    rollout           of the step under way, from its first update on
    skipped_in_a_row  updates whose gradient was not finite, since the last that was
    worth             checkpoint.keep_best of the evaluated steps
    halted            why the run must end before its last step
    offending         rows of the last update whose gradient was not finite
    """

    step: int = 0
    tokens: int = 0
    method: Mapping[str, Any] = field(default_factory=dict)
    rollout: Rollout | None = None
    skipped_in_a_row: int = 0
    worth: dict[int, float] = field(default_factory=dict)
    halted: str | None = None
    offending: Sequence[TrainRow] = ()

    @property
    def made(self) -> int:
        """Updates made of the step under way."""
        return 0 if self.rollout is None else len(self.rollout.made)

    def __str__(self) -> str:
        """How far the run has come."""
        if self.rollout is None:
            return f"step {self.step}"
        return f"update {self.made} of {len(self.rollout.updates)} of step {self.step + 1}"

    def kept(self, best: str | None) -> dict[str, Any]:
        """What state.json holds of it; `worth` under its name in the configuration."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "tokens": self.tokens,
            # JSON writes no mapping but a dict.
            "method": dict(self.method),
            "evaluated": {best: self.worth} if best else {},
        }

    def take(self, saved: Checkpoint) -> None:
        """Take the counts back; the rollout, and what logs tell of `worth`, come from elsewhere."""
        kept = saved.trainer_state
        self.step, self.skipped_in_a_row = saved.step, kept["skipped_in_a_row"]
        # Older checkpoints have neither.
        self.tokens, self.method = kept.get("tokens", 0), kept.get("method", {})

"""How a step begins: its paths are drawn, scored, weighed and diagnosed, and its rows are made.

    collect -> importance weights -> rows of every update -> what the paths show -> Rollout

A step that was left between two updates begins with the paths that its checkpoint kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vpgea_fast.collect import Collector
from vpgea_fast.config import Config
from vpgea_fast.gradients import Gradients
from vpgea_fast.measure import Measure
from vpgea_fast.metrics import PhaseTimer
from vpgea_fast.objectives import Terms
from vpgea_fast.rollout.engine import Usage
from vpgea_fast.rows import checksum, update_rows
from vpgea_fast.stop import Stop
from vpgea_fast.types import ScoredBatch, TrainRow
from vpgea_fast.updates import Rollout, rescored, revived
from vpgea_fast.values import merge


@dataclass(frozen=True, kw_only=True)
class StepStart:
    """Makes the rollout of a step, drawn or revived. `draw` is a collective."""

    cfg: Config
    collector: Collector
    measure: Measure
    gradients: Gradients
    stop: Stop

    def draw(self, step: int, method: Mapping[str, Any], *, known: Mapping[str, Any]) -> Rollout:
        """Collect the paths of a step, weigh them, make rows, diagnose. `known` are metrics of the
        step from before it."""
        timer = PhaseTimer(self._synchronize)
        batch, terms, usage = self.collect(step, method, timer)
        with timer("importance"):
            ratios, weighed = self.measure.importance(batch, terms)
            # Now: the first update overwrites the weights that later ones are compared with.
            updates, held = self.measure.known(update_rows(self.cfg, batch, terms, ratios))
        rows = self.measure.first_pass(updates)
        with timer("diagnose"):  # before the update: of the weights that drew the paths
            diagnosed = self.diagnose(step, batch, terms, rows)
        return Rollout(
            batch=batch,
            terms=terms,
            ratios=ratios,
            updates=updates,
            rows=rows,
            found=merge(known, diagnosed, weighed, held),
            usage=usage,
            timer=timer,
        )

    def revive(
        self,
        step: int,
        method: Mapping[str, Any],
        kept: Mapping[str, Any],
        *,
        note: Callable[[str], object],
    ) -> Rollout:
        """The rollout of a checkpoint between two of its updates, from what `Rollout.kept` gave:
        nothing is drawn or scored."""
        batch, ratios = revived(kept["batch"]), kept["ratios"]
        # What the objective says of the same paths is the same; only what was replaced is gone.
        terms = replace(self.collector.weigh(batch, step, method), metrics=kept["metrics"])
        updates = rescored(update_rows(self.cfg, batch, terms, ratios), kept["old"])
        rows = self.measure.first_pass(updates)
        if checksum(rows) != kept["rows"]:
            note(
                "its paths have other coefficients than when they were drawn (another objective, "
                "version or processor): the updates to come take the new ones"
            )
        return Rollout(
            batch=batch,
            terms=terms,
            ratios=ratios,
            updates=updates,
            rows=rows,
            found=kept["found"],
            usage=Usage(*kept["usage"]),
            timer=PhaseTimer(self._synchronize, kept["seconds"]),
            made=kept["made"],
        )

    def collect(
        self, step: int, method: Mapping[str, Any], timer: PhaseTimer
    ) -> tuple[ScoredBatch, Terms, Usage]:
        """Draw and score the paths of this step; what the engine says it took."""
        turns = self.collector.turns
        turns.usage()  # what evaluations asked for is not this step's
        batch, terms = self.collector.collect(step, timer, method)
        turns.engine.rest()  # the update has its memory
        usage = turns.usage()
        # A step that is left here is drawn again, with the same paths.
        self.stop.together()
        return batch, terms, usage

    def diagnose(
        self, step: int, batch: ScoredBatch, terms: Terms, rows: Sequence[TrainRow]
    ) -> dict[str, float]:
        """What the batch shows; every metrics.diag_every steps also what costs passes of its own:
        two heads over the posterior paths, a forward and backward of all rows."""
        every = self.cfg.metrics.diag_every
        found = self.measure.quality(batch, terms)
        if every and step % every == 0:
            divergence = self.measure.view_divergence(batch, terms)
            found = merge(found, divergence, self.gradients.norms(rows))
        return found

    @property
    def _synchronize(self) -> Callable[[], object] | None:
        return torch.cuda.synchronize if self.measure.on_cuda else None

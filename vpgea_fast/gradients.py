"""The gradient of rows, and the optimiser step that it makes.

rows -> a share of each policy -> micro-batches: forward, loss, backward -> norm, clip, step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vpgea_fast import diagnostics
from vpgea_fast.config import Config
from vpgea_fast.distributed import Stopped, World
from vpgea_fast.model import Policy
from vpgea_fast.policies import Policies, Share, joined
from vpgea_fast.rows import checksum
from vpgea_fast.stop import Stop
from vpgea_fast.types import PackedBatch, TrainRow
from vpgea_fast.values import merge


class Update(NamedTuple):
    """What an update says of itself.

    skipped    why it changed nothing; None if it did
    offending  the rows whose gradient is not finite
    """

    metrics: dict[str, float | int]
    skipped: str | None = None
    offending: Sequence[TrainRow] = ()


class Gradients:
    """Adds up gradients and steps the policies. Its methods are collectives; `stop` may end them
    between micro-batches."""

    def __init__(self, cfg: Config, *, world: World, policies: Policies, stop: Stop) -> None:
        self.cfg, self.world, self.policies, self.stop = cfg, world, policies, stop

    def update(self, rows: Sequence[TrainRow], scored: diagnostics.Scored, *, step: int) -> Update:
        """The gradient of all rows, one optimiser step with the learning rate of `step`.

        `scored` are the rows whose log-probs were taken before, for the log. No rows or a
        non-finite gradient leave parameters and optimiser state bitwise unchanged.
        """
        # With unequal rows the processes would add up other sums, or wait for ever, silently.
        self.world.require_same(checksum(rows), "rows of this step and their coefficients")
        policies, steps = self.policies, self.cfg.train.steps
        # An optimiser step without a gradient would move weights: AdamW has momentum.
        if not rows:
            metrics = merge(
                policies.metrics({}, step, steps),
                {"skipped": 1},
                diagnostics.row_metrics([], [], scored),
            )
            return Update(metrics, "no path has a gradient")
        shares = policies.shares(rows)
        logps = self.accumulate(rows, shares)
        # Norm and step read shards, and the last forward may have left whole parameters.
        policies.reshard()
        norms = policies.update(shares, step, steps)
        odd = [norm for norm in norms.values() if not math.isfinite(norm)]
        metrics = merge(
            policies.metrics(norms, step, steps),
            {"skipped": int(bool(odd))},
            diagnostics.row_metrics(rows, logps, scored),
            diagnostics.plan_metrics(joined(shares), rows, policies.passes.flops),
        )
        if not odd:
            return Update(metrics)
        numbers = [(row, torch.cat([row.coef, v])) for row, v in zip(rows, logps, strict=True)]
        # Finite numbers can have a gradient that is not: then any row may be the cause.
        offending = [row for row, n in numbers if not n.isfinite().all()] or rows
        return Update(metrics, f"the gradient norm is {odd[0]}", offending)

    def accumulate(
        self, rows: Sequence[TrainRow], shares: Sequence[Share] | None = None
    ) -> list[torch.Tensor]:
        """Add the gradient of `rows` to the parameters of their policies; per-token log-probs of
        every row. Stopped leaves no gradient."""
        policies, temperature = self.policies, self.cfg.rollout.temperature

        def backward(policy: Policy, batch: PackedBatch, last: bool) -> torch.Tensor:
            # What FSDP has accumulated cannot be thrown away.
            if not policy.sharded:
                self.stop.alone()
            policy.expect_backward(last=last)
            out = policy(batch, temperature=temperature)
            out.loss.backward()
            return out.logp.detach()

        try:
            return policies.run(backward, rows, shares)
        except Stopped:  # of a gradient in parts nothing is kept: the update is made again
            policies.drop_gradients()
            raise

    def norms(self, rows: Sequence[TrainRow]) -> dict[str, float]:
        """Gradient norm of each term alone: one more forward and backward of `rows`, a pass over
        the questions."""
        names = dict.fromkeys(row.term for row in rows)
        if len(names) <= 1:
            return {}  # it is grad_norm
        norms = {}
        for name in names:
            self.accumulate([row for row in rows if row.term == name])
            self.policies.reshard()
            # Each minibatch weighs as much as all questions do: the norm is of their mean.
            norm = self.policies.gradient_norm() / self.cfg.train.minibatches
            norms[f"grad_norm_{name}"] = norm
            # The update adds to what is there: nothing of a measurement may be left.
            self.policies.drop_gradients()
        return norms

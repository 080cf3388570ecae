"""A pass of rows through a model: planned over the processes, packed, run, and gathered again.

    rows -> one plan, the same everywhere -> each process runs its batches -> every process gets the
    log-probs of every row

Log-probs stay on the device until all batches of a pass are queued: a copy per batch would make the
host wait for each, and a GPU for the host.

All processes make the same number of forwards (and backwards), those without rows with dummies of
one token, because each of them is a collective of a sharded model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vpgea_fast.distributed import World
from vpgea_fast.metrics import ModelFlops
from vpgea_fast.packing import RankPlan, pack_plan, plan_ranks
from vpgea_fast.types import PackedBatch, TrainRow

Step = Callable[[PackedBatch, bool], torch.Tensor]
"""(batch, whether it is the pass's last here) -> (..., R): log-probs of its R targets, in order."""


@dataclass(frozen=True)
class Passes:
    """Plans, packs and runs rows over all processes.

    `budget`: tokens that one forward may have; `score_budget`: those of one without gradients
    (None: the same); `flops`: what a row costs.
    """

    world: World
    budget: int
    flops: ModelFlops
    score_budget: int | None = None

    @property
    def scoring(self) -> Passes:
        """The same for forwards without gradients."""
        return replace(self, budget=self.score_budget or self.budget)

    def plan(self, rows: Sequence[TrainRow]) -> list[RankPlan]:
        """Plan every process's batches of `rows`, the same everywhere."""
        # The last token of a row is only a target, so it takes no place in a forward.
        lengths = [row.tokens - 1 for row in rows]
        return plan_ranks(lengths, self.budget, self.world.size, self.flops.row)

    def __call__(
        self, step: Step, rows: Sequence[TrainRow], plan: Sequence[RankPlan] | None = None
    ) -> list[torch.Tensor]:
        """Run `step` over the rows; return per-token results of each, (..., len) float64, in order.

        `plan` is that of `self.plan(rows)`, if it was made before. A collective: all processes call
        it with the same rows.
        """
        plan = self.plan(rows) if plan is None else plan
        own = plan[self.world.rank]
        outputs = [
            step(batch, number + 1 == len(own))
            for number, (batch, _) in enumerate(pack_plan(rows, own))
        ]
        # (2,) for a step that gives log-prob and entropy, () for log-probs alone.
        lead = outputs[0].shape[:-1] if outputs else torch.Size()
        # One collective for all batches of all processes; a dummy's output is left out. Every
        # process gets every row: 8 bytes per target and number.
        flat = [batch.reshape(-1) for batch, members in zip(outputs, own, strict=True) if members]
        # The one place where the host waits for the device.
        mine = torch.cat(flat).cpu().double() if flat else torch.empty(0, dtype=torch.float64)
        parts = self.world.gather_tensor(mine)
        result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for batches, values in zip(plan, parts, strict=True):
            start = 0  # the sender's batches lie end to end, each (..., its targets) row by row
            for members in batches:
                counts = [rows[i].token_ids.numel() for i in members]
                end = start + sum(counts) * lead.numel()
                batch = values[start:end].view(*lead, -1) if members else values[:0]
                for i, logps in zip(members, batch.split(counts, dim=-1), strict=True):
                    result[i] = logps
                start = end
        return result

"""Whether an engine samples with the trainer's weights: after a hand-over, the log-probs of a few
greedy tokens, as the engine drew them and as the trainer scores them.

Two ways to fail, each with its own reason:

    partial   mean |engine - trainer| above the tolerance of the engine's dtype
    skipped   the trainer's log-probs changed since the last probe, the engine's are the same bits.
              This needs no tolerance: it finds a step of 1e-6 in bfloat16, where rounding hides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vpgea_fast.rollout.engine import RolloutEngine, RolloutError, Sampling
from vpgea_fast.types import SampleRequest, TrainRow

TOKENS = 16
"""Greedy tokens of each probed prompt."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Mean |difference|; other dtypes 0.05, which is NeMo-RL's bar of mean exp|difference| <= 1.05."""

Score = Callable[[Sequence[TrainRow]], Sequence[torch.Tensor]]
"""The trainer's log-probs, at temperature 1, of every row's tokens."""


class SyncProbe:
    """Call it after each hand-over, in every process; RolloutError for weights that are not there.

    prompts  probed once for each of `engines` processes, in their order, so every engine is probed
    """

    def __init__(
        self,
        engine: RolloutEngine,
        score: Score,
        prompts: Sequence[torch.Tensor],
        *,
        engines: int,
        limit: int,
        tolerance: float,
    ) -> None:
        self.engine, self.score, self.tolerance = engine, score, tolerance
        self.sampling = Sampling(min(TOKENS, limit), think_close_id=-1, eos_ids=(), temperature=0.0)
        self.requests = [
            SampleRequest(f"probe {engine}", "prior", i, prompt, seed=0)
            for engine in range(engines)
            for i, prompt in enumerate(prompts)
        ]
        self.before: tuple[list[torch.Tensor], ...] | None = None

    def __call__(self, *, updated: bool) -> dict[str, float]:
        """Mean and largest |difference|. `updated`: the weights changed since the last call."""
        paths = self.engine.generate(self.requests, self.sampling)
        self.engine.usage()
        rows = [
            TrainRow(r.prompt_ids, p.z_ids, torch.zeros(p.z_ids.numel()), "prior", "student")
            for r, p in zip(self.requests, paths, strict=True)
        ]
        ids, drawn = [path.z_ids for path in paths], [path.logps for path in paths]
        scored = [logps.cpu() for logps in self.score(rows)]
        now = (ids, drawn, scored)
        before, self.before = self.before, now
        gaps = torch.cat(
            [(a.double() - b.double()).abs() for a, b in zip(drawn, scored, strict=True)]
        )
        mean, largest = gaps.mean().item(), gaps.max().item()
        if not mean <= self.tolerance:
            raise RolloutError(
                f"after the hand-over of weights engine and trainer disagree: mean |difference| of "
                f"{gaps.numel()} log-probs {mean:.2g}, allowed {self.tolerance:.2g}, largest "
                f"{largest:.2g}; the engine has other weights than the trainer, or computes "
                "otherwise (another dtype, a scaled head): the last checkpoint is good, go on with "
                "--resume and rollout.engine 'hf', or raise rollout.probe_tolerance if the dtype "
                "explains it"
            )
        if updated and before is not None:
            for number, request in enumerate(self.requests):
                same = [torch.equal(a[number], b[number]) for a, b in zip(before, now, strict=True)]
                if same == [True, True, False]:
                    raise RolloutError(
                        f"the engine did not take over the new weights ({request.question_id}): "
                        "the trainer's log-probs changed since the last probe, the engine's are "
                        "the same bits; the last checkpoint is good: go on with --resume"
                    )
        return {"probe_mean": mean, "probe_max": largest}

"""Check after a hand-over that an engine samples with the trainer's weights.

A few greedy tokens have log-probs e, as the engine drew them, and t, as the trainer scores them. A
probe of one policy fails in one of two ways:

    partial   mean |e - t| above the tolerance of the engine's dtype
    skipped   all tokens and log-probs of an engine are the same bits as at an earlier probe, and
              the trainer has moved since: mean |t - t_then| > 4 max(mean |e_then - t_then|, least)

With two policies the trainer scores the tokens under both. The engine has the other's weights
where it is nearer to those than to its own, by more than rounding explains:

    swapped   mean |e - t| > 4 max(mean |e - t_other|, least)

The same bits alone prove nothing: a small step moves log-probs by less than a rounding, and rounds
otherwise in the trainer than in the engine. An engine with the right weights was a gap away from
the trainer then and is a gap away now. So the trainer moved by the sum of the two at most, and 4
gaps are no rounding.

A skipped hand-over of a smaller step leaves the two equal to within rounding. It is noticed when
more such steps have added up: `then` is the probe at which the engine's bits last changed. An
engine that does not repeat its own bits is watched by the first check alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vpgea_fast.names import Trained
from vpgea_fast.rollout.engine import RolloutEngine, RolloutError, Sampling
from vpgea_fast.types import Path, SampleRequest, TrainRow

TOKENS = 16
"""Greedy tokens of each probed prompt."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Mean |difference|; other dtypes 0.05, which is NeMo-RL's bar of mean exp|difference| <= 1.05."""

GAPS = 4
"""How far the trainer may move while an engine stands still, in gaps of the two."""

Score = Callable[[Sequence[TrainRow]], Sequence[torch.Tensor]]
"""The trainer's log-probs, at temperature 1, of every row's tokens."""


@dataclass(frozen=True)
class _Look:
    """What one engine drew at a probe, its prompts one after the other, and the trainer's score.

    ids (N,) int64, drawn and scored (N,) float64; others: scored by the other policies.
    """

    ids: torch.Tensor
    drawn: torch.Tensor
    scored: torch.Tensor
    others: Mapping[Trained, torch.Tensor]

    @property
    def gaps(self) -> torch.Tensor:
        return (self.drawn - self.scored).abs()

    def same_bits(self, other: _Look) -> bool:
        return torch.equal(self.ids, other.ids) and torch.equal(self.drawn, other.drawn)


class SyncProbe:
    """Called after each hand-over, in every process; RolloutError for weights that are not there.

    score      each row's log-probs under the policy that it names
    prompts    probed once for each of `engines` processes
    policies   all that are trained
    dtype      in which the engine computes
    tolerance  of the mean |difference|; None: the dtype's
    """

    def __init__(
        self,
        engine: RolloutEngine,
        score: Score,
        prompts: Sequence[torch.Tensor],
        *,
        engines: int,
        limit: int,
        dtype: torch.dtype,
        tolerance: float | None = None,
        policies: Sequence[Trained] = ("policy",),
    ) -> None:
        self.engine, self.score, self.engines = engine, score, engines
        self.policies = tuple(policies)
        self.tolerance = TOLERANCE.get(dtype, 0.05) if tolerance is None else tolerance
        # Some pairs agree to the last bit. 8 eps is the rounding of a logit; log-probs are float32
        # at best. In bfloat16 that is above the tolerance, and the second check would be idle.
        eps = max(torch.finfo(kind).eps for kind in (dtype, torch.float32))
        self.least_gap = min(8 * eps, self.tolerance / 32)
        # No stop token, and greedy: the same weights give the same tokens, and as many log-probs.
        self.sampling = Sampling(min(TOKENS, limit), think_close_id=-1, eos_ids=(), temperature=0.0)
        # All prompts for one engine, then all for the next: requests are dealt out in contiguous
        # equal shares, so every engine draws every prompt.
        self.requests = [
            SampleRequest(
                question_id=f"probe {engine}", stream="prior", index=i, prompt_ids=prompt, seed=0
            )
            for engine in range(engines)
            for i, prompt in enumerate(prompts)
        ]
        self.baselines: dict[Trained, list[_Look]] = {}
        """Of each policy and engine, the probe at which the engine's bits last changed."""

    def __call__(self, who: Trained = "policy") -> dict[str, float]:
        """Probe all engines for the weights of a policy; return the mean and the largest
        |difference|. A collective."""
        now = self._look(who)
        self._require_own(who, now)
        gaps = torch.cat([look.gaps for look in now])
        mean, largest = gaps.mean().item(), gaps.max().item()
        if not mean <= self.tolerance:  # NaN too
            raise RolloutError(
                f"after the hand-over of weights engine and trainer disagree: mean |difference| of "
                f"{gaps.numel()} log-probs {mean:.2g}, allowed {self.tolerance:.2g}, largest "
                f"{largest:.2g}; the engine has other weights than the trainer, or computes "
                "otherwise (another dtype, a scaled head): the last checkpoint is good, go on with "
                "--resume and engine.name 'hf', or raise rollout.probe_tolerance if the dtype "
                "explains it"
            )
        # An engine is compared with the probe at which its bits last changed, not with the last
        # one: steps too small to be told from rounding add up.
        before = self.baselines.get(who, now)
        kept = [old if new.same_bits(old) else new for old, new in zip(before, now, strict=True)]
        self.baselines[who] = kept
        # An engine whose bits have just changed is its own baseline: it has moved by 0.
        for number, (old, new) in enumerate(zip(kept, now, strict=True)):
            moved = (new.scored - old.scored).abs().mean().item()
            allowed = GAPS * max(old.gaps.mean().item(), self.least_gap)
            if moved > allowed:
                raise RolloutError(
                    f"the engine of process {number} did not take over the new weights: its "
                    "log-probs are the same bits as at an earlier probe, and the trainer's have "
                    f"moved since by a mean of {moved:.2g}, where rounding explains {allowed:.2g}; "
                    "the last checkpoint is good: go on with --resume"
                )
        return {"probe_mean": mean, "probe_max": largest}

    def _require_own(self, who: Trained, now: Sequence[_Look]) -> None:
        """RolloutError for an engine that has the weights of another policy."""
        for number, look in enumerate(now):
            for other, scored in look.others.items():
                own, theirs = look.gaps.mean().item(), (look.drawn - scored).abs().mean().item()
                if own > GAPS * max(theirs, self.least_gap):
                    raise RolloutError(
                        f"the engine of process {number} has the weights of the {other} where "
                        f"those of the {who} were handed over: its log-probs are {theirs:.2g} from "
                        f"the {other}'s and {own:.2g} from the {who}'s; the last checkpoint is "
                        "good: go on with --resume"
                    )

    def _look(self, who: Trained) -> list[_Look]:
        """Let every engine draw, and the trainer score what it drew: as `who`, and as others."""
        paths = self.engine.generate(self.requests, self.sampling)
        self.engine.usage()  # reset: the tokens of a probe are no part of a step's counts
        if not all(path.z_ids.numel() for path in paths):
            raise RolloutError(
                "the engine gave up a probe before its first token; raise engine.timeout_s"
            )
        scored = self._scored(paths)
        each = len(paths) // self.engines
        looks = []
        for start in range(0, len(paths), each):
            part = slice(start, start + each)
            known: dict[Trained, torch.Tensor] = {
                name: torch.cat(logps[part]) for name, logps in scored.items()
            }
            looks.append(
                _Look(
                    torch.cat([path.z_ids for path in paths[part]]),
                    torch.cat([path.logps.double() for path in paths[part]]),
                    known.pop(who),
                    known,
                )
            )
        return looks

    def _scored(self, paths: Sequence[Path]) -> dict[Trained, list[torch.Tensor]]:
        """The log-probs of every path under each policy, (tokens,) float64."""
        # Coefficients are zero: the rows are scored and never trained.
        rows = [
            TrainRow(
                context_ids=r.prompt_ids,
                token_ids=p.z_ids,
                coef=torch.zeros(p.z_ids.numel()),
                stream="prior",
                view="student",
                who=who,
            )
            for who in self.policies
            for r, p in zip(self.requests, paths, strict=True)
        ]
        # float64: the difference of two log-probs is what is judged.
        found = [logps.cpu().double() for logps in self.score(rows)]
        count = len(paths)
        return {who: found[i * count : (i + 1) * count] for i, who in enumerate(self.policies)}

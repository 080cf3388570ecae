"""VPG-EA (arXiv 2605.11019): policy gradient for the teacher, gated distillation for the student.

    loss = -(1/G) sum_i A_i log q(z_i|x, y*)
           + beta (1/G) sum_i 1[A_i > 0] (sg log q(z_i|x, y*) - log pi(z_i|x))

A and the gate are constants of the rollout batch, so the weights of a path are -A_i (teacher view)
and -beta 1[A_i > 0] (student view, the same token ids).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.book import merge
from vpgea_fast.kernels.options import GroupOptions
from vpgea_fast.names import Score
from vpgea_fast.objectives.base import Draws, GroupKeys, Term, Terms
from vpgea_fast.values import (
    STRICT,
    Exponent,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.advantage import Utility
    from vpgea_fast.types import ScoredBatch


@dataclass(frozen=True, config=STRICT)
class Vpgea(GroupKeys):
    """VPG-EA (arXiv 2605.11019). `preset` fills every key that is not given; the paper leaves most
    of them open."""

    name: Literal["vpgea"] = "vpgea"
    """VPG-EA: policy gradient for the teacher's view, gated distillation for the student's."""
    preset: Literal["paper", "robust"] = "paper"
    """Defaults of the keys that are not given. `paper`: the formulas literally. `robust`:
    log-mean-exp baseline, mixed reward, clamped U, clipped eta, a gate on groups without spread,
    and the counterfactual leak guard."""
    group_size: Annotated[int, Field(ge=2, lt=2**31)] = 8
    """G, posterior paths per question; the z-score needs two."""
    prior_samples: PositiveInt = 8
    """N, prior paths per question. They define the baseline utility and the base length."""
    alpha: Exponent = 0.5
    """Exponent of the length factor eta = (base length / length)^alpha; 0 turns it off."""
    alpha_end: Exponent | None = None
    """alpha after alpha_steps steps, reached linearly; null: alpha stays."""
    alpha_steps: PositiveInt = 100
    """Steps of the way from alpha to alpha_end."""
    beta: NonNegativeFloat = 0.5
    """Weight of the distillation loss against the policy gradient."""
    distill_denominator: Literal["same", "gated"] = "same"
    """`token_mean` only: divide distilled rows by the sampled stream's tokens (`same`), or by their
    own (`gated`)."""
    gate: Literal["indicator", "relu", "none"] = "indicator"
    """Weight of a distilled path. `indicator`: 1 for a positive advantage A, else 0. `relu`: max(0,
    A). `none`: 1, an ablation."""
    cross_view: bool = True
    """False, an ablation: R is P(answer given path) in the teacher's view, without a baseline."""
    posterior: bool = True
    """False, an ablation: the posterior paths are drawn from the student's prompt too."""
    reward: Literal["paper", "likelihood_gate", "likelihood_mix"] = "paper"
    """R of a path. `paper`: max(0, U - baseline + r_margin). `likelihood_gate`: 1 where P > 0.5.
    `likelihood_mix`: that times 1 + max(0, U - baseline)."""
    baseline: Literal["mean", "lme"] = "mean"
    """Baseline of U over the prior paths. `mean`: mean U. `lme`: log of the mean likelihood, which
    one terrible path cannot pull down."""
    r_margin: NonNegativeFloat = 0.0
    """Margin of the reward `paper`, in nats."""
    clamp_u: bool = False
    """Also lift every finite U below u_min to u_min."""
    u_min: Annotated[float, Field(lt=0.0, ge=-1e6)] = -20.0
    """Value for a U that is not finite, in nats."""
    verify: Literal["none", "gate"] = "none"
    """`gate`: accept a posterior path only if the answer sampled after it verifies (needs
    rollout.full_answer)."""
    leak_guard: Literal["none", "counterfactual", "max_kl"] = "none"
    """Reject posterior paths that lean on the answer in their prompt. `counterfactual`: log q(z|x,
    y*) - log q(z|x, y') > leak_limit, y' a wrong answer. `max_kl`: log q - log pi > leak_limit at
    some token. Each costs two forwards of these paths."""
    leak_limit: PositiveFloat = 2.0
    """Nats that the leak guard lets pass."""

    clip_high: PositiveFloat = 0.28
    """That ratio is clipped above 1 + clip_high. What is distilled has no ratio: its paths are a
    fixed sample of a forward KL."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "robust": {
            "baseline": "lme",
            "reward": "likelihood_mix",
            "clamp_u": True,
            "eta_clip": (0.25, 4.0),
            "eps": 1e-3,
            "std_gate": 0.05,
            "leak_guard": "counterfactual",
        },
    }

    def __post_init__(self) -> None:
        self.group_options()  # refuses keys that do not go together
        if self.leak_guard != "none" and not self.posterior:
            raise ValueError(
                f"leak_guard: got {self.leak_guard!r} with posterior: false, expected none: the "
                "student's own prompt holds no answer that could leak"
            )

    def group_options(self) -> GroupOptions:
        """What the utility takes of these keys: each field of `GroupOptions` is a key here."""
        # By name, so that an option is added in GroupOptions and here, and nowhere between.
        names = [field.name for field in dataclasses.fields(GroupOptions)]
        return GroupOptions(**{name: getattr(self, name) for name in names})

    def draws(self) -> Draws:
        return Draws(
            posterior=self.group_size,
            prior=self.prior_samples,
            posterior_view="teacher" if self.posterior else "student",
            verified=self.verify == "gate",
        )

    def needs(self) -> frozenset[Score]:
        # The student's prompt does not hold the answer, so a path that only leans on it makes the
        # answer no likelier there.
        own = "student" if self.cross_view else self.draws().posterior_view
        scores = {Score("posterior", own, "target"), Score("prior", "student", "target")}
        if guard := self.guard_scores():
            scores |= set(guard)
        return frozenset(scores)

    def guard_scores(self) -> tuple[Score, Score] | None:
        """The log-probs of a thought that the leak guard compares: as drawn, and without the
        answer or with a wrong one."""
        if self.leak_guard == "none":
            return None
        # Both of the trainer: over thousands of tokens the sampler's rounding would add up to nats.
        other = "counterfactual" if self.leak_guard == "counterfactual" else "student"
        return Score("posterior", "teacher", "thought"), Score("posterior", other, "thought")

    def at(self, step: int, /) -> Vpgea:
        if self.alpha_end is None:
            return self
        # A copy with another alpha: scores, gate and monitors all read the one key.
        way = min(1.0, step / self.alpha_steps)
        return dataclasses.replace(self, alpha=self.alpha + way * (self.alpha_end - self.alpha))

    def notes(self) -> Iterator[str]:
        if self.preset == "robust" and self.leak_guard == "none":
            yield "preset robust without its leak guard: a path that states the answer passes"

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        """Weights of both streams, the scores of every posterior path, and the group diagnostics.

        len_gated        mean length of the gated paths of all questions: of the groups with many
                         gated paths, not comparable with len_post
        len_gated_ratio  mean over the gated paths of len_i / mean length of its own group

        Both None where no path is gated.
        """
        from vpgea_fast.advantage import log_utility, posterior_monitors

        post, prior = batch.posterior, batch.prior
        columns = post.u_BP, prior.u_BP, post.length_BP, prior.length_BP
        u = self._utility(batch)
        bounds = {"alpha": self.alpha, "u_min": self.u_min}  # the theory knows no other option
        scores = {
            "reward": u.reward,
            "eta": u.eta,
            "utility": u.utility,
            "advantage": u.advantage,
            "u": post.u_BP,
            "log_utility": log_utility(post.u_BP, post.length_BP, u.len_base, **bounds),
        }
        gate_BG = {
            "indicator": u.gate.double(),
            "relu": u.advantage.clamp(min=0.0),
            "none": u.advantage.new_ones(u.advantage.shape),
        }[self.gate]
        view = batch.posterior_view
        # The same token ids under both prompts: only their contexts differ.
        return Terms(
            parts=(
                Term(
                    name="pg",
                    stream="posterior",
                    view=view,
                    weight_BP=-u.advantage,
                    later=self.clipped(),
                ),
                Term(
                    name="distill",
                    stream="posterior",
                    view="student",
                    weight_BP=-self.beta * gate_BG,
                    # Drawn from the student's own prompt there is no other log q to subtract.
                    distilled=view != "student",
                    counted_BP=gate_BG.ne(0) if self.distill_denominator == "gated" else None,
                ),
            ),
            path_scores={"posterior": scores, "prior": {"u": prior.u_BP}},
            metrics=merge(
                self._group_metrics(batch, u),
                self._guard_metrics(batch),
                posterior_monitors(*columns, **bounds),
            ),
        )

    def _utility(self, batch: ScoredBatch) -> Utility:
        """Utility, advantage and gate of the posterior paths."""
        from vpgea_fast.advantage import cross_view_utility, group_zscore, length_factor

        post, prior = batch.posterior, batch.prior
        columns = post.u_BP, prior.u_BP, post.length_BP, prior.length_BP
        # One kernel launch on CUDA; the monitors below it are a few (B, G) operations.
        accept_BG, options = accepted(self, batch), self.group_options()
        u = cross_view_utility(*columns, accept_BG=accept_BG, options=options)
        if self.cross_view:
            return u
        # The ablation needs no kernel: four lines of (B, G) arithmetic.
        # In its own view nearly every closed path makes the answer: a baseline would leave nothing.
        reward_BG = post.u_BP.exp().where(accept_BG, 0.0)
        clip = self.eta_clip
        eta_BG = length_factor(post.length_BP, u.len_base, alpha=self.alpha, eta_clip=clip)
        advantage_BG = group_zscore(
            reward_BG * eta_BG, eps=self.eps, ddof=self.ddof, std_gate=self.std_gate
        )
        return dataclasses.replace(
            u,
            reward=reward_BG,
            eta=eta_BG,
            utility=reward_BG * eta_BG,
            advantage=advantage_BG,
            gate=advantage_BG > 0,
        )

    def _guard_metrics(self, batch: ScoredBatch) -> dict[str, float]:
        leaked_BG = leak(self, batch)
        if leaked_BG is None:
            return {}
        caught_BG = passed(self, batch) & (leaked_BG > self.leak_limit)
        return {
            "guard_caught": caught_BG.double().mean().item(),
            "guard_nats": leaked_BG.mean().item(),
        }

    def _group_metrics(self, batch: ScoredBatch, u: Utility) -> dict[str, float | None]:
        length_BG = batch.posterior.length_BP
        # (gated paths,): ragged over questions, so the means weigh paths and not questions.
        gated = length_BG[u.gate]
        ratio = (length_BG / length_BG.mean(dim=1, keepdim=True))[u.gate]
        return {
            "accept_rate": (u.reward > 0).double().mean().item(),
            "gate_rate": u.gate.double().mean().item(),
            "len_gated": gated.mean().item() if gated.numel() else None,
            "len_gated_ratio": ratio.mean().item() if ratio.numel() else None,
            "groups_all_rejected": int((u.reward <= 0).all(dim=1).sum()),
            "groups_zero_var": int((u.advantage == 0).all(dim=1).sum()),
            "std_s": u.utility.std(dim=1, correction=self.ddof).mean().item(),
            "utility": u.utility.mean().item(),
            "u_replaced": u.n_replaced,
            "net_token_push": (u.advantage * length_BG).sum().item(),
        }


def accepted(cfg: Vpgea, batch: ScoredBatch) -> Tensor:
    """Which teacher paths may earn a reward, (B, G) bool: those that pass, and do not leak."""
    passed_BG, leaked_BG = passed(cfg, batch), leak(cfg, batch)
    return passed_BG if leaked_BG is None else passed_BG & (leaked_BG <= cfg.leak_limit)


def passed(cfg: Vpgea, batch: ScoredBatch) -> Tensor:
    """Which teacher paths pass every filter but the leak guard, (B, G) bool. They stand here.

    A rejected path has R = 0 and stays in its group's mean: it is a failure of the policy, and
    dropping it would hide it. A filter may read the columns of the stream, each (B, G): `u_BP`
    (nats), `length_BP` (tokens, the closing one included), `closed_BP`, `correct_BP` (1, 0, or NaN
    where not verified). Token ids are in `post.paths[b][i].z_ids`.
    """
    post = batch.posterior
    # Cut thoughts have no end to score, and a U that is not finite says nothing.
    filters = [post.closed_BP, post.u_BP.isfinite()]
    if cfg.verify == "gate":
        filters.append(post.correct_BP == 1.0)
    return functools.reduce(operator.and_, filters)


def leak(cfg: Vpgea, batch: ScoredBatch) -> Tensor | None:
    """How far each teacher path leans on the answer in its prompt, (B, G) nats; None without a
    guard.

    counterfactual  log q(z|x, y*) - log q(z|x, y'), summed over the thought's tokens
    max_kl          the largest log q(z_t|x, y*) - log pi(z_t|x) of a token
    """
    import torch

    if (scores := cfg.guard_scores()) is None:
        return None
    own, other = (batch.logps[score] for score in scores)
    summed = cfg.leak_guard == "counterfactual"
    values = []
    for path in batch.posterior.flat:
        gap = own[path.key] - other[path.key]
        # A path that the engine gave up may have no token, and is trained by nobody.
        values.append(gap.sum() if summed or not gap.numel() else gap.max())
    return torch.stack(values).double().view_as(batch.posterior.u_BP)

"""Policy gradients in the student view: GRPO and its kin, one machine with other defaults.

    A_i  = advantage of the reward R_i within its group; R_i = correct_i, or what the length reward
           makes of it (length_rewards.py)
    r_t  = p(token_t now) / p(token_t before the first update of this rollout)
    loss = -(1/G) sum_i w_i sum_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i)
           + kl_coef (1/G) sum_i w_i sum_t KL(now | reference)_t

The normaliser w_i is `norm`. In the first update of a rollout every ratio is 1. Sources: GRPO arXiv
2402.03300, Dr.GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585, RLOO 2402.14740.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.names import Norm, Score
from vpgea_fast.objectives.base import Draws, EtaKeys, Share, Term, Terms
from vpgea_fast.objectives.judged import Judged, Shaped
from vpgea_fast.objectives.length_rewards import Eta, LengthReward
from vpgea_fast.objectives.surrogate import Surrogate
from vpgea_fast.objectives.unread import Unread
from vpgea_fast.values import (
    STRICT,
    Exponent,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.types import ScoredBatch, ScoredPaths

Advantage = Literal["zscore", "centred", "leave_one_out", "batch", "batch_zscore"]


@dataclass(frozen=True, config=STRICT)
class PolicyGradient(EtaKeys):
    """Keys of every policy gradient in the student's view."""

    group_size: Annotated[int, Field(ge=2, lt=2**31)] = 8
    """Paths per question, which the advantage compares."""
    trains: Literal["response", "thought"] = "response"
    """Tokens with a gradient: thought and sampled answer, or the thought alone."""
    advantage: Advantage = "zscore"
    """`zscore`: (R - group mean) / (std + eps). `centred`: R - group mean. `leave_one_out`: R -
    mean of the group's others. `batch`: R - mean of all paths of the step. `batch_zscore`: that
    over their (std + eps)."""
    length_reward: LengthReward | None = None
    """What a short path earns beside being right. `name` chooses it, and with it the other keys;
    null: that of alpha, or none."""
    alpha: Exponent = 0.0
    """0: the reward is correctness. Above 0: short for the length reward `eta` with this exponent
    and eta_clip."""
    reward: Literal["verify", "likelihood", "probability"] = "verify"
    """`verify`: the sampled answer verifies (needs rollout.full_answer). `likelihood`: P(answer
    given path) > 0.5. `probability`: that probability itself, without a length reward."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of later updates of a rollout: per token, or the geometric mean over the
    path's tokens (GSPO)."""
    surrogate: Literal["clip", "truncate"] = "clip"
    """`clip`: min(r A, clip(r) A). `truncate`: A sg min(r, 1 + clip_high) log p (CISPO), with a
    gradient on every token."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the reference policy (0: none is kept)."""
    kl: Literal["k3", "low_variance"] = "k3"
    """Estimate of that KL. `k3`: exp(d) - d - 1, d = log p_reference - log p. `low_variance`: the
    same, with d held to [-20, 20] and the estimate to [-10, 10]."""
    overlong_cache: NonNegativeInt = 0
    """Soft punishment of DAPO: the reward falls linearly by 1 over the last this many tokens before
    the token limit (0: none), and by 1 for a path that was cut."""
    mask_truncated: bool = False
    """Leave paths that the token limit cut out of the loss, but not out of their group's mean."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread("eta_clip", {"alpha": (0.0,)}),
        Unread("kl", {"kl_coef": (0.0,)}),
        # Without a standard deviation.
        *(
            Unread(key, {"advantage": ("centred", "leave_one_out", "batch")})
            for key in ("eps", "ddof")
        ),
        Unread("std_gate", {"advantage": ("centred", "leave_one_out", "batch", "batch_zscore")}),
        Unread("clip_low", {"surrogate": ("truncate",)}),
    )

    def clipped(self) -> Surrogate:
        return replace(
            super().clipped(),
            ratio=self.ratio,
            truncate=self.surrogate == "truncate",
            kl_coef=self.kl_coef,
            kl_bound=10.0 if self.kl == "low_variance" else math.inf,
        )

    def draws(self) -> Draws:
        return Draws(
            prior=self.group_size,
            verified=self.reward == "verify",
            answers=self.trains == "response",
            stated=self.shaping.reads_stated,
            reference=self.shaping.reference_paths,
            fields=self.shaping.fields(),
        )

    def bounds(self) -> Mapping[str, tuple[int, ...]]:
        found = {key: getattr(self.shaping, key) for key in self.shaping.TOKENS}
        return {
            f"length_reward.{key}": value if isinstance(value, tuple) else (value,)
            for key, value in found.items()
        }

    @property
    def shaping(self) -> Eta | Any:
        """The length reward; without one, eta with the exponent 0 leaves correctness as it is."""
        return self.length_reward or Eta(alpha=self.alpha, clip=self.eta_clip)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shaping.check(self.group_size)
        # Beside another length reward nothing would read it.
        if self.length_reward and self.alpha:
            raise ValueError(
                f"got alpha {self.alpha} and a length_reward, which takes its place; leave alpha "
                "out, or choose length_reward eta"
            )
        # Their formulas are of paths that are right or wrong.
        if self.reward == "probability" and (self.length_reward or self.alpha):
            raise ValueError(
                "got reward 'probability' and a length reward, whose paths are right or wrong; "
                "choose reward likelihood, or leave length_reward and alpha out"
            )

    def needs(self) -> frozenset[Score]:
        scores = set()
        # Each score is a forward of every path: only what `terms` will read.
        if self.reward != "verify":
            scores.add(Score("prior", "student", "target"))
            if self.shaping.reference_paths:
                scores.add(Score("reference", "student", "target"))
        if self.kl_coef:
            scores.add(Score("prior", "student", self.trains, "reference"))
        return frozenset(scores)

    def terms(self, batch: ScoredBatch, state: Mapping[str, Any], /) -> Terms:
        prior, reference = batch.prior, batch.reference
        judged = Judged(
            right_BN=self._right(prior),
            length_BN=batch.token_counts("prior", self.trains),
            batch=batch,
            reference_right_BR=reference and self._right(reference),
            reference_length_BR=reference and batch.token_counts("reference", self.trains),
        )
        # By name: what another length reward kept, before a resume with this one, is not read.
        name, correct_BN = self.shaping.name, judged.right_BN
        shaped = self.shaping.shaped(judged, state.get(name, {}))
        if self.reward == "probability":
            # Of a cut thought U is scored too, but it has not arrived.
            shaped = Shaped(reward_BN=prior.u_BP.exp().where(prior.closed_BP, 0.0))
        # The punishment falls on wrong paths as well: they too run into the limit (DAPO, eq. 13).
        reward_BN = shaped.reward_BN - self._overlong(batch)
        advantage_BN = self._advantage(reward_BN)
        kept_BN = self._kept(batch)
        part = Term(
            name="pg",
            stream="prior",
            view="student",
            part=self.trains,
            # Minus: the loss is minimised, and a negative weight makes a path likelier.
            weight_BP=-advantage_BN.where(kept_BN, 0.0),
            counted_BP=kept_BN if self.mask_truncated else None,
            # The KL holds every path in the loss, those of advantage zero too.
            held_BP=kept_BN if self.kl_coef else None,
            close_BP=None if shaped.close_BN is None else -shaped.close_BN.where(kept_BN, 0.0),
            live=self.clipped(),
        )
        metrics = {
            "accept_rate": correct_BN.double().mean().item(),
            "groups_all_rejected": int((~correct_BN).all(dim=1).sum()),
            "groups_zero_var": int((advantage_BN == 0).all(dim=1).sum()),
            "std_s": reward_BN.std(dim=1, correction=self.ddof).mean().item(),
            # Before clips and normaliser: the sign says which lengths the update favours.
            "net_token_push": (advantage_BN * judged.length_BN).sum().item(),
        }
        scores = {
            "reward": reward_BN,
            "advantage": advantage_BN,
            "u": prior.u_BP,
            **shaped.scores,
        }
        return Terms(
            parts=(part,),
            path_scores={"prior": scores},
            metrics={**metrics, **shaped.metrics},
            state={name: shaped.state} if shaped.state else {},
        )

    def _right(self, columns: ScoredPaths) -> Tensor:
        """(B, P) bool: the paths of a stream that are right."""
        if self.reward == "verify":
            return columns.correct_BP == 1.0
        # P(y*|x, z) > 1/2; of a cut thought U is scored too, but it has not arrived.
        return (columns.u_BP > math.log(0.5)) & columns.closed_BP

    def _advantage(self, reward_BN: Tensor) -> Tensor:
        """(B, N) float64; a group of equal rewards is exactly 0, but for those of the batch."""
        from vpgea_fast.advantage import group_zscore

        if self.advantage == "zscore":
            options = {"eps": self.eps, "ddof": self.ddof, "std_gate": self.std_gate}
            return group_zscore(reward_BN, **options)
        # Groups of equal rewards keep a gradient here, which is what tells this from the others.
        if self.advantage == "batch":
            return reward_BN - reward_BN.mean()
        if self.advantage == "batch_zscore":
            # All paths of the step are one group.
            found_1N = group_zscore(reward_BN.view(1, -1), eps=self.eps, ddof=self.ddof)
            return found_1N.view_as(reward_BN)
        centred_BN = reward_BN - reward_BN.mean(dim=1, keepdim=True)
        # Rounding of the mean must not wake a group that has nothing to compare.
        equal_B = reward_BN.amax(dim=1) == reward_BN.amin(dim=1)
        centred_BN = centred_BN.masked_fill(equal_B[:, None], 0.0)
        # R - mean of the others = n / (n - 1) (R - mean of all): unbiased, where `centred` is
        # smaller by (n - 1) / n.
        n = reward_BN.shape[1]
        return centred_BN * (n / (n - 1)) if self.advantage == "leave_one_out" else centred_BN

    def _overlong(self, batch: ScoredBatch) -> Tensor | float:
        """DAPO's soft punishment, 0 to 1: linear over the last tokens before the limit."""
        if not self.overlong_cache:
            return 0.0
        over_BN = batch.token_counts("prior", "response") - (
            batch.token_limit - self.overlong_cache
        )
        soft_BN = (over_BN / self.overlong_cache).clamp(min=0.0, max=1.0)
        # What was cut has reached a limit, its thought's own or its answer's, whatever room the
        # other had left: DAPO's eq. 13 has -1 there.
        return soft_BN.masked_fill(_cut(batch), 1.0)

    def _kept(self, batch: ScoredBatch) -> Tensor:
        """(B, N) bool: the paths in the loss."""
        closed_BN = batch.prior.closed_BP
        if not self.mask_truncated:
            return closed_BN.new_ones(closed_BN.shape)
        return ~_cut(batch)


def _cut(batch: ScoredBatch) -> Tensor:
    """(B, N) bool: the paths that a token limit cut."""
    closed_BN = batch.prior.closed_BP
    # By `finish` and not by `closed`: an answer that was cut has a whole thought before it.
    cut = [[path.truncated for path in group] for group in batch.prior.paths]
    return closed_BN.new_tensor(cut).view_as(closed_BN)


@dataclass(frozen=True, config=STRICT)
class Grpo(PolicyGradient):
    """GRPO (arXiv 2402.03300): z-scored rewards, token ratios, the mean over each response."""

    name: Literal["grpo"] = "grpo"
    norm: Norm = "seq_mean"


@dataclass(frozen=True, config=STRICT)
class DrGrpo(PolicyGradient):
    """Dr.GRPO (arXiv 2503.20783): no division by the group's spread or by the response's length."""

    name: Literal["drgrpo"] = "drgrpo"
    norm: Norm = "const"
    advantage: Advantage = "centred"


@dataclass(frozen=True, config=STRICT)
class Dapo(PolicyGradient):
    """DAPO (arXiv 2503.14476): a higher upper clip, and the mean over all tokens of the step. Its
    dynamic sampling is train.resample_rounds, its overlong shaping overlong_cache."""

    name: Literal["dapo"] = "dapo"
    norm: Norm = "token_mean"
    # The paper's clip-higher: 0.2 below, 0.28 above.
    clip_high: PositiveFloat = 0.28


@dataclass(frozen=True, config=STRICT)
class Gspo(PolicyGradient):
    """GSPO (arXiv 2507.18071): one ratio per path, the geometric mean over its tokens."""

    name: Literal["gspo"] = "gspo"
    norm: Norm = "seq_mean"
    ratio: Literal["token", "sequence"] = "sequence"
    # The paper's range: a mean over the path's tokens strays far less than one token's ratio.
    clip_low: Share = 3e-4
    clip_high: PositiveFloat = 4e-4


@dataclass(frozen=True, config=STRICT)
class Cispo(PolicyGradient):
    """CISPO (arXiv 2506.13585): the ratio is a truncated constant, so no token loses its
    gradient."""

    name: Literal["cispo"] = "cispo"
    norm: Norm = "token_mean"
    surrogate: Literal["clip", "truncate"] = "truncate"
    clip_high: PositiveFloat = 4.0


@dataclass(frozen=True, config=STRICT)
class Rloo(PolicyGradient):
    """RLOO (arXiv 2402.14740): each reward against the mean of the group's others."""

    name: Literal["rloo"] = "rloo"
    advantage: Advantage = "leave_one_out"


@dataclass(frozen=True, config=STRICT)
class Reinforce(PolicyGradient):
    """REINFORCE: each reward against the mean of all paths of the step."""

    name: Literal["reinforce"] = "reinforce"
    advantage: Advantage = "batch"

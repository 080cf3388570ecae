"""Likelihood rewards: a path is worth what it makes of the reference answer, and nobody verifies.

    U_i  log P(y* | x, z_i) in the student's view, nats; a thought that was cut has none

VeriFree and its normalised form train the answer behind the thought too; RLT trains the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.names import Norm, PathKey, Score
from vpgea_fast.objectives.base import ClipKeys, Draws, GroupKeys, Term, Terms
from vpgea_fast.objectives.policy_gradient import Advantage, PolicyGradient
from vpgea_fast.objectives.unread import Unread
from vpgea_fast.values import STRICT, NonNegativeFloat

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.objectives.surrogate import Surrogate
    from vpgea_fast.types import ScoredBatch

GroupSize = Annotated[int, Field(ge=2, lt=2**31)]


@dataclass(frozen=True, config=STRICT)
class VeriFree(PolicyGradient):
    """VeriFree (arXiv 2505.21493): R_i = P(y* | x, z_i), 0 for a cut thought. The gradient is that
    of sum_i A_i log p(z_i | x) + R_i log p(y* | x, z_i), with A_i by leave-one-out. A cut thought
    stays in the loss, as in the authors' runs; `mask_truncated` leaves it out."""

    name: Literal["verifree"] = "verifree"
    """VeriFree."""
    trains: Literal["response", "thought"] = "thought"
    reward: Literal["verify", "likelihood", "probability"] = "probability"
    advantage: Advantage = "leave_one_out"
    target: Literal["reward", "advantage", "none"] = "reward"
    """Weight of the reference answer behind each thought: R_i as in the paper, A_i as in the
    authors' code by default, or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward != "probability":
            raise ValueError(
                f"got reward {self.reward!r}, expected 'probability'; another reward is that of "
                "objective.name rloo"
            )
        # It would be taken off the answer's weight too, and push a likely answer down.
        if self.overlong_cache:
            raise ValueError(
                f"got overlong_cache {self.overlong_cache}, expected 0: R is a likelihood, and "
                "weighs the answer behind the thought too; leave it out"
            )

    def draws(self) -> Draws:
        trained = self.target != "none"
        return replace(super().draws(), targets=trained, by_likelihood=trained)

    def terms(self, batch: ScoredBatch, state: Mapping[str, Any], /) -> Terms:
        terms = super().terms(batch, state)
        scores = terms.path_scores["prior"]
        if self.target == "none":
            return terms
        # R and A are both among the scores that the log keeps.
        weight_BN = -scores[self.target].where(self._kept(batch), 0.0)
        # The answer was not drawn, and no policy holds it: no KL.
        later = replace(self.clipped(), kl_coef=0.0)
        return Terms(
            parts=(*terms.parts, answer_term(weight_BN, later)),
            path_scores=terms.path_scores,
            metrics=terms.metrics,
        )


def answer_term(weight_BN: Tensor, later: Surrogate) -> Term:
    """The reference answer behind each of the student's thoughts, a part of the loss. Its weight is
    a likelihood under the policy that drew the thoughts, so later updates are clipped as theirs."""
    return Term(
        name="answer",
        stream="prior",
        view="student",
        part="target",
        weight_BP=weight_BN,
        later=later,
    )


@dataclass(frozen=True, config=STRICT)
class NormalisedVeriFree(ClipKeys):
    """Normalised VeriFree: the bound of Variational Reasoning (arXiv 2509.22637, appendix A.6) with
    q = sg pi. The gradient is that of sum_i w_i (log p(z_i | x) + log p(y* | x, z_i)). The weights
    of a question: w_i = exp U_i / sum_j exp U_j.

    No baseline: paths of equal U have equal weights, and not none. A question of cut thoughts alone
    has no weight.
    """

    name: Literal["verifree_normalised"] = "verifree_normalised"
    """Normalised VeriFree."""
    norm: Norm = "const"
    group_size: GroupSize = 8
    """Paths per question, which share a weight of 1."""

    # No weight is below 0, and the lower bound of a ratio holds those alone.
    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("clip_low", {"name": ("verifree_normalised",)}),)

    def draws(self) -> Draws:
        return Draws(prior=self.group_size, targets=True, by_likelihood=True)

    def needs(self) -> frozenset[Score]:
        return frozenset({Score("prior", "student", "target")})

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        prior = batch.prior
        worth_BN = prior.u_BP.where(prior.closed_BP, -math.inf)
        # In log space: U of -800 nats is 0 as a number, for every path of a hard question.
        share_BN = worth_BN.softmax(dim=1)
        share_BN = share_BN.where(worth_BN.isfinite().any(dim=1, keepdim=True), 0.0)
        # The rows divide by all paths, and these weights are a mean already.
        weight_BN = -self.group_size * share_BN
        later = self.clipped()
        thought = Term(name="pg", stream="prior", view="student", weight_BP=weight_BN, later=later)
        return Terms(
            parts=(thought, answer_term(weight_BN, later)),
            path_scores={"prior": {"u": prior.u_BP, "advantage": share_BN}},
            metrics={"groups_all_rejected": int((share_BN == 0).all(dim=1).sum())},
        )


@dataclass(frozen=True, config=STRICT)
class Rlt(GroupKeys):
    """The dense reward of Reinforcement-Learned Teachers (arXiv 2506.08388), for the teacher's own
    paths, z-scored within the question:

        R_i = mean_a + answer_min min_a - kl_coef (mean_z + kl_max max_z) - cut penalty.

    a: log p of the answer's tokens behind the thought. z: log q - log p of the thought's tokens.
    Both at the sampling temperature. q is the policy behind the teacher's prompt. p, the paper's
    student, is the frozen reference policy behind the student's.
    """

    name: Literal["rlt"] = "rlt"
    """The dense reward of Reinforcement-Learned Teachers."""
    group_size: GroupSize = 8
    """Paths of the teacher per question."""
    answer_min: NonNegativeFloat = 0.01
    """Weight of the least likely token of the answer, beside the mean of all."""
    # With kl_max: 3 mean + 0.03 max of the distance, as the authors run it.
    kl_coef: NonNegativeFloat = 3.0
    """Weight of the thought's distance from the student."""
    kl_max: NonNegativeFloat = 0.01
    """Weight of its least expected token, beside the mean of all."""
    cut: NonNegativeFloat = 1.0
    """Taken off the reward of a thought that the token limit cut."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("kl_max", {"kl_coef": (0.0,)}),)

    def draws(self) -> Draws:
        return Draws(posterior=self.group_size)

    def needs(self) -> frozenset[Score]:
        # Per path one row of the policy, and two of the reference.
        return frozenset({TEACHER, STUDENT, ANSWER})

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        from vpgea_fast.advantage import group_zscore

        post = batch.posterior
        parts = [self._parts(batch, path.key) for path in post.flat]
        # (3, B, G): answer, distance, and the reward of both.
        answer_BG, apart_BG = (
            post.length_BP.new_tensor(parts).view(*post.length_BP.shape, 2).unbind(-1)
        )
        reward_BG = answer_BG - self.kl_coef * apart_BG - self.cut * (~post.closed_BP).double()
        options = {"eps": self.eps, "ddof": self.ddof, "std_gate": self.std_gate}
        advantage_BG = group_zscore(reward_BG, **options)
        part = Term(
            name="pg",
            stream="posterior",
            view="teacher",
            weight_BP=-advantage_BG,
            later=self.clipped(),
        )
        scores = {"reward": reward_BG, "advantage": advantage_BG}
        metrics = {
            "answer_logp": answer_BG.mean().item(),
            "teacher_distance": apart_BG.mean().item(),
            "groups_zero_var": int((advantage_BG == 0).all(dim=1).sum()),
        }
        return Terms(parts=(part,), path_scores={"posterior": scores}, metrics=metrics)

    def _parts(self, batch: ScoredBatch, key: PathKey) -> tuple[float, float]:
        """What a path makes of the answer, and how far its thought is from the student's, nats per
        token each."""
        answer, teacher, student = (batch.logps[s][key] for s in (ANSWER, TEACHER, STUDENT))
        made = answer.mean() + self.answer_min * answer.min()
        gap = teacher - student
        # An empty thought is nowhere; an engine may give one up.
        apart = gap.mean() + self.kl_max * gap.max() if gap.numel() else gap.sum()
        return made.item(), apart.item()


TEACHER = Score("posterior", "teacher", "thought")
STUDENT = Score("posterior", "student", "thought", "reference")
ANSWER = Score("posterior", "student", "target", "reference")

"""Variational Reasoning (arXiv 2509.22637): the thought is a latent variable, the answer is seen.

    pi       the policy behind the student's prompt, q the policy behind the teacher's, which holds
             the hint y'
    f_k      how likely a right answer is behind the thought z_k
    rho_k    (pi(z_k|x) / q(z_k|x, y')) f_k, the ratio whole or as its mean per token
    w_k      rho_k / sum_j rho_j, within a question
    L_K      E log (1/K) sum_k rho_k <= L_(K+1) <= log P(right answer|x)

Theta ascends L_K: the gradient of sum_k w_k (log pi(z_k|x) + log P(right answer|x, z_k)), over K
paths of q. Weights are made in log space: a ratio of whole thoughts may be e^-2000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from vpgea_fast.names import Score, Stream
from vpgea_fast.objectives.base import Draws, Keys, Term, Terms
from vpgea_fast.objectives.guards import VIEWS
from vpgea_fast.values import STRICT, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.types import ScoredBatch

Estimator = Literal["accuracy", "gml", "likelihood"]


@dataclass(frozen=True, config=STRICT)
class Latent(Keys):
    """Keys of every part of Variational Reasoning."""

    estimator: Estimator = "accuracy"
    """How likely a right answer is behind a thought. `accuracy`: share of scoring.answer_samples
    sampled answers that are right. `likelihood`: P of the reference answer. `gml`: its geometric
    mean per token. A thought that was cut has none."""

    @property
    def u_norm(self) -> Literal["sum", "mean"] | None:
        """How U adds up the answer's tokens, where it is read."""
        norms: dict[str, Literal["sum", "mean"]] = {"gml": "mean", "likelihood": "sum"}
        return norms.get(self.estimator)

    def answer_scores(self, stream: Stream) -> set[Score]:
        """What the estimator reads of a stream's paths."""
        return set() if self.u_norm is None else {Score(stream, "student", "target")}

    def log_answer(self, batch: ScoredBatch, stream: Stream) -> Tensor:
        """log f of every path, (B, P); -inf where it was cut, or no sampled answer is right."""
        columns = batch.stream(stream)
        log_BP = columns.accuracy.log() if self.u_norm is None else columns.u_BP
        return log_BP.where(columns.closed_BP & log_BP.isfinite(), -math.inf)


@dataclass(frozen=True, config=STRICT)
class HintedKeys(Latent):
    """Keys of what reads paths of q, weighed by what they would be worth under pi."""

    group_size: PositiveInt = 8
    """K, hinted paths per question."""
    ratio: Literal["geometric", "exact"] = "geometric"
    """pi / q of a thought. `exact`: of the whole thought, as in the bound; its variance grows with
    the length. `geometric`: its mean per token, as the paper trains."""

    def log_rho(self, batch: ScoredBatch) -> Tensor:
        """log rho of every hinted path, (B, K) nats."""
        return self.log_answer(batch, "posterior") + self.log_ratio(batch)

    def log_ratio(self, batch: ScoredBatch) -> Tensor:
        """log pi - log q of every hinted thought, (B, K) nats: summed, or per token."""
        import torch

        teacher, student = (batch.logps[score] for score in VIEWS)
        post = batch.posterior
        gaps = [student[path.key] - teacher[path.key] for path in post.flat]
        # A path that the engine gave up may have no token, and is trained by nobody.
        exact = self.ratio == "exact"
        sums = [gap.sum() if exact or not gap.numel() else gap.mean() for gap in gaps]
        return torch.stack(sums).double().view_as(post.length_BP)


@dataclass(frozen=True, config=STRICT)
class VrTheta(HintedKeys):
    """Variational Reasoning's step of the reasoning model (arXiv 2509.22637, eq. 8): the gradient
    of the bound L_K for theta, over hinted paths. Their prompt is the teacher's."""

    name: Literal["vr_theta"] = "vr_theta"
    """Variational Reasoning: the reasoning model alone."""
    answer: Literal["sampled", "reference"] | None = None
    """What is trained behind a thought. `sampled`: its right answers, in equal shares. `reference`:
    the reference answer. null: `sampled` with the estimator accuracy, else `reference`."""

    @property
    def trains_sampled(self) -> bool:
        return (self.answer or {"accuracy": "sampled"}.get(self.estimator)) == "sampled"

    def draws(self) -> Draws:
        return Draws(
            posterior=self.group_size,
            attempts=self.trains_sampled or self.estimator == "accuracy",
            targets=not self.trains_sampled,
            u_norm=self.u_norm,
        )

    def needs(self) -> frozenset[Score]:
        return frozenset({*VIEWS, *self.answer_scores("posterior")})

    def notes(self) -> Iterator[str]:
        if self.group_size == 1:
            yield (
                "objective.group_size 1: the weight of a single path is 1, whatever it is worth; "
                "give 2 or more"
            )

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        share_BK = shares(self.log_rho(batch))
        # The rows divide by all paths, and these weights are a mean already.
        weight_BK = -self.group_size * share_BK
        hinted: dict[str, Any] = {"stream": "posterior", "view": "student", "weight_BP": weight_BK}
        return Terms(
            parts=(
                Term(name="theta", **hinted),
                Term(name="answer", part="attempts" if self.trains_sampled else "target", **hinted),
            ),
            path_scores={"posterior": {"advantage": share_BK}},
            metrics={"groups_all_rejected": int((share_BK == 0).all(dim=1).sum())},
        )


def shares(log_BP: Tensor) -> Tensor:
    """Weights that add up to 1 within a question, (B, P); all 0 where no path is worth anything."""
    share_BP = log_BP.softmax(dim=1)
    return share_BP.where(log_BP.isfinite().any(dim=1, keepdim=True), 0.0)


def log_mean(log_BP: Tensor) -> Tensor:
    """log of the mean of what these are logarithms of, (B,): of log rho, an estimate of L_K whose
    mean over draws is L_K; -inf where no path is worth anything."""
    return log_BP.logsumexp(dim=1) - math.log(log_BP.shape[1])

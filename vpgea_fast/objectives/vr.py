"""Variational Reasoning (arXiv 2509.22637): the thought is a latent variable, the answer is seen.

    pi       the policy behind the student's prompt, q the policy behind the teacher's, which holds
             the hint y': the same model, or one of its own (`Vr.share_params`)
    f_k      how likely a right answer is behind the thought z_k
    rho_k    (pi(z_k|x) / q(z_k|x, y')) f_k, the ratio whole or as its mean per token
    w_k      rho_k / sum_j rho_j, within a question
    L_K      E log (1/K) sum_k rho_k <= L_(K+1) <= log P(right answer|x)

Theta ascends L_K: the gradient of sum_k w_k (log pi(z_k|x) + log P(right answer|x, z_k)), over K
paths of q. Phi goes towards the true posterior: it ascends sum_m v_m log q(z_m|x, y'), over M paths
of pi with v_m = f_m / sum_j f_j. Weights are made in log space: a ratio of whole thoughts may be
e^-2000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.names import Score, Stream, Trained
from vpgea_fast.objectives.base import ClipKeys, Draws, Keys, Term, Terms
from vpgea_fast.objectives.bounds import (
    best,
    hinted_metrics,
    log_mean,
    shares,
    skipped,
    spread,
    unhinted_metrics,
)
from vpgea_fast.objectives.guards import VIEWS, log_ratio, views
from vpgea_fast.objectives.unread import Unread
from vpgea_fast.values import STRICT, NonNegativeInt, PositiveFloat, PositiveInt, merge

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.types import ScoredBatch

Metrics = dict[str, float | None]
Estimator = Literal["accuracy", "gml", "likelihood"]


@dataclass(frozen=True, config=STRICT)
class Latent(Keys):
    """Keys of every part of Variational Reasoning."""

    # With |Y| right answers it varies less in the worst case where P >= 1 / |Y| (theorem 1).
    estimator: Estimator = "accuracy"
    """How likely a right answer is behind a thought. `accuracy`: share of scoring.answer_samples
    sampled answers that are right. `likelihood`: P of the reference answer. `gml`: its geometric
    mean per token. A thought that was cut has none."""

    @property
    def phi_who(self) -> Trained:
        """Whose weights are behind the teacher's prompt."""
        return "policy"

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
        # What is not finite: log 0 of an accuracy, and the NaN of a U that nobody scored.
        return log_BP.where(columns.closed_BP & log_BP.isfinite(), -math.inf)


@dataclass(frozen=True, config=STRICT)
class HintedKeys(Latent):
    """Keys of what reads paths of q, weighed by what they would be worth under pi."""

    # As many thoughts per question as the paper draws.
    group_size: PositiveInt = 8
    """K, hinted paths per question."""
    thought_ratio: Literal["geometric", "exact"] = "geometric"
    """pi / q of a thought. `exact`: of the whole thought, as in the bound; its variance grows with
    the length. `geometric`: its mean per token, as the paper trains."""

    def ratio(self, batch: ScoredBatch) -> Tensor:
        """log pi - log q of every hinted thought, whole, (B, K) nats."""
        return -log_ratio(batch)

    def trained_ratio(self, batch: ScoredBatch) -> Tensor:
        """log pi - log q of every hinted thought, (B, K) nats: whole, or per token."""
        whole_BK = self.ratio(batch)
        # The mean per token is biased, but thousands of tokens do not make it 0 or infinite.
        return whole_BK if self.thought_ratio == "exact" else whole_BK / batch.posterior.length_BP

    def log_rho(self, batch: ScoredBatch) -> Tensor:
        """log rho of every hinted path, (B, K) nats."""
        return self.log_answer(batch, "posterior") + self.trained_ratio(batch)

    def hinted(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor], Metrics]:
        """The shares of the hinted paths, (B, K), their scores, and what they show."""
        share_BK, log_f_BK = shares(self.log_rho(batch)), self.log_answer(batch, "posterior")
        ratio_BK = self.ratio(batch)
        scores = {"share": share_BK, "answered": log_f_BK.exp(), "log_ratio": ratio_BK}
        return share_BK, scores, hinted_metrics(batch, log_f_BK, ratio_BK, share_BK)


@dataclass(frozen=True, config=STRICT)
class ThetaKeys(HintedKeys):
    """Keys of the reasoning model's step, and its part of the loss."""

    answer: Literal["sampled", "reference"] | None = None
    """What is trained behind a thought. `sampled`: its right answers, in equal shares. `reference`:
    the reference answer. null: `sampled` with the estimator accuracy, else `reference`."""
    # All that scoring.answer_samples draws by default.
    answer_rows: PositiveInt = 8
    """Right answers that are trained behind a thought at most, the first ones (`sampled`). Each
    that differs is a row with the whole thought in it."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread("answer_rows", {"answer": ("reference",)}),
        Unread("answer_rows", {"answer": (None,), "estimator": ("gml", "likelihood")}),
    )

    @property
    def trains_sampled(self) -> bool:
        return (self.answer or {"accuracy": "sampled"}.get(self.estimator)) == "sampled"

    def behind(self) -> dict[str, Any]:
        """What is sampled and trained behind the thoughts, as fields of `Draws`."""
        return {
            # J short requests more for every closed thought, with the thought in their prompts.
            "attempts": self.trains_sampled or self.estimator == "accuracy",
            "answer_rows": self.answer_rows * self.trains_sampled,
            "targets": not self.trains_sampled,
            # The bound's own gradient is meant, so f must be the likelihood of what is trained.
            "by_likelihood": self.estimator == "likelihood" and not self.trains_sampled,
            "u_norm": self.u_norm,
        }

    def theta_parts(self, share_BK: Tensor) -> tuple[Term, Term]:
        """Thoughts and answers, in the student's view."""
        # One weight for a thought and for what stands behind it: a path of the bound is both.
        weight_BK = -_summed(share_BK)
        hinted: dict[str, Any] = {"stream": "posterior", "view": "student", "weight_BP": weight_BK}
        behind: dict[str, Any] = {"part": "target"}
        if self.trains_sampled:
            behind = {"part": "attempts", "first": self.answer_rows}
        return Term(name="theta", **hinted), Term(name="answer", **behind, **hinted)


@dataclass(frozen=True, config=STRICT)
class PhiKeys(HintedKeys, ClipKeys):
    """Keys of the hinted policy's step, and its part of the loss."""

    phi: Literal["forward_kl", "reverse_kl", "iwae"] = "forward_kl"
    """What the hinted policy descends. `forward_kl`: KL from the true posterior, on unhinted paths
    weighed by f. `reverse_kl`: minus the ELBO, a policy gradient on hinted paths. `iwae`: minus
    L_K, on the same. The last two are the paper's ablations, and find shortcuts to the answer."""
    # A log f of -inf would make the mean of its question -inf.
    u_min: Annotated[float, Field(lt=0.0, ge=-1e6)] = -20.0
    """Least log f of a thought, and that of one without a right answer, in nats; `reverse_kl`
    alone."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread("u_min", {"phi": ("forward_kl", "iwae")}),
        # A fixed sample has no ratio to clip, and theta's part is one too.
        *(Unread(key, {"phi": ("forward_kl",)}) for key in ("clip_low", "clip_high")),
    )

    def phi_scores(self) -> set[Score]:
        """What phi's part reads."""
        if self.phi == "forward_kl":
            return self.answer_scores("prior")
        return {*views(self.phi_who), *self.answer_scores("posterior")}

    def unhinted(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor], Metrics]:
        """The shares of the unhinted paths, (B, M), their scores, and what they show."""
        log_f_BM = self.log_answer(batch, "prior")
        share_BM = shares(log_f_BM)
        scores = {"share": share_BM, "answered": log_f_BM.exp()}
        return share_BM, scores, unhinted_metrics(log_f_BM, share_BM)

    def phi_part(self, batch: ScoredBatch) -> Term:
        """Thoughts in the teacher's view."""
        stream: Stream = "posterior"
        if self.phi == "forward_kl":
            # Paths of pi, weighed towards the posterior: a fixed sample has no ratio to clip.
            gain_BP, later, stream = _summed(self.unhinted(batch)[0]), None, "prior"
        elif self.phi == "reverse_kl":
            # The ELBO's integrand, less the mean of the question's others.
            worth_BP = self.log_answer(batch, "posterior").clamp(min=self.u_min)
            worth_BP = worth_BP + self.trained_ratio(batch)
            # Leave-one-out, so unbiased; a single path has no others, and the baseline 0.
            others = worth_BP.sum(dim=1, keepdim=True) - worth_BP
            gain_BP = worth_BP - others / max(1, worth_BP.shape[1] - 1)
            later = self.clipped()
        else:
            log_rho_BK = self.log_rho(batch)
            # The gradient of L_K for phi: E sum_k (log (1/K) sum_j rho_j - w_k) grad log q(z_k).
            worth_BP = log_mean(log_rho_BK)[:, None] - shares(log_rho_BK)
            # A question without a path that is worth anything has no bound.
            gain_BP, later = _summed(worth_BP.where(worth_BP.isfinite(), 0.0)), self.clipped()
        own: dict[str, Any] = {"stream": stream, "view": "teacher", "who": self.phi_who}
        return Term(name="phi", weight_BP=-gain_BP, later=later, **own)


@dataclass(frozen=True, config=STRICT)
class VrTheta(ThetaKeys):
    """Variational Reasoning's step of the reasoning model (arXiv 2509.22637, eq. 8): the gradient
    of the bound L_K for theta, over hinted paths. Their prompt is the teacher's."""

    name: Literal["vr_theta"] = "vr_theta"
    """Variational Reasoning: the reasoning model alone."""

    # The paper's own runs draw, weigh and train one after the other, with a model each.
    log_q: Literal["policy", "recorded"] = "policy"
    """log q of a hinted thought. `policy`: of this model, behind the teacher's prompt. `recorded`:
    what its sampler said, where another model drew it (engine.name replay)."""
    weights: Literal["computed", "recorded"] = "computed"
    """`computed`: w_k of this model. `recorded`: those that stand beside the recorded paths as
    `share`, of a run with train.record weights; nothing is scored then."""
    keep: Literal["all", "best"] = "all"
    """`best`: of a question the path of the largest weight alone, as if its weight were 1."""
    originals: NonNegativeInt = 0
    """Recorded unhinted paths of a question that are imitated beside the hinted ones, thought and
    answer, with the weight 1 each. Needs recorded weights."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        # A single path has all of the weight, whatever its ratio is.
        *(Unread(key, {"group_size": (1,)}) for key in ("thought_ratio", "keep")),
        *(Unread(key, {"weights": ("recorded",)}) for key in ("thought_ratio", "log_q")),
        # Without a word on answers it says which are trained.
        Unread("estimator", {"weights": ("recorded",), "answer": ("sampled", "reference")}),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.originals and self.weights == "computed":
            raise ValueError(
                f"weights: got 'computed' with originals {self.originals}, which would imitate the "
                "policy's own paths, right or wrong; set weights recorded, or originals 0"
            )

    def draws(self) -> Draws:
        behind, with_original = self.behind(), self.originals > 0
        if self.weights == "recorded":
            scored = {"u_norm": None, "by_likelihood": False, "attempts": self.trains_sampled}
            behind |= {**scored, "recorded": True}
        return Draws(
            posterior=self.group_size,
            prior=self.originals,
            answers=with_original,
            joint=with_original,
            **behind,
        )

    def needs(self) -> frozenset[Score]:
        if self.weights == "recorded":
            return frozenset()
        # Each hinted thought under both prompts: two forwards of it, for the ratio.
        views = VIEWS if self.log_q == "policy" else VIEWS[1:]
        return frozenset({*views, *self.answer_scores("posterior")})

    def notes(self) -> Iterator[str]:
        yield from alone("group_size", self.group_size)

    def ratio(self, batch: ScoredBatch) -> Tensor:
        """See HintedKeys."""
        if self.log_q == "policy":
            return super().ratio(batch)
        student, paths = batch.logps[VIEWS[1]], batch.posterior.flat
        gaps = [(student[p.key].double() - p.logps.double()).sum().item() for p in paths]
        if lacks := next((p for p, gap in zip(paths, gaps, strict=True) if gap != gap), None):
            raise ValueError(
                f"log_q recorded: the line of path {lacks.key} has no log-probs of its sampler; "
                "record them (logps), or set log_q policy"
            )
        return batch.posterior.length_BP.new_tensor(gaps).view_as(batch.posterior.length_BP)

    def hinted(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor], Metrics]:
        """See HintedKeys."""
        if self.weights == "computed":
            return super().hinted(batch)
        share_BK = recorded_shares(batch)
        return share_BK, {"share": share_BK}, spread("vr", share_BK)

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        share_BK, scores, found = self.hinted(batch)
        kept_BK = share_BK if self.keep == "all" else best(share_BK)
        parts: tuple[Term, ...] = self.theta_parts(kept_BK)
        if self.originals:
            weight_BM = -_summed(batch.prior.length_BP.ne(0).double())
            how: dict[str, Any] = {"stream": "prior", "view": "student", "part": "response"}
            parts = (*parts, Term(name="original", weight_BP=weight_BM, **how))
        metrics = merge(found, counts(parts))
        return Terms(parts=parts, path_scores={"posterior": scores}, metrics=metrics)


def recorded_shares(batch: ScoredBatch) -> Tensor:
    """The weights that stand beside the hinted paths, (B, K). ValueError where one is missing, or
    those of a question are not a whole."""
    shares_XK = []
    for group in batch.posterior.paths:
        lacks = next((path for path in group if path.share is None), None)
        if lacks is not None:
            raise ValueError(
                f"weights recorded: the line of path {lacks.key} has no share; give the "
                "paths.jsonl of a run with train.record weights"
            )
        own = [path.share or 0.0 for path in group]
        shares_XK.append(own)
        # All are 0 where no path is right.
        if abs(sum(own) - 1) > 1e-6 and any(own):
            raise ValueError(
                f"weights recorded: those of question {group[0].question_id!r} add up to "
                f"{sum(own):.6g}, expected 1; set group_size to that of the record, or mend it"
            )
    return batch.posterior.length_BP.new_tensor(shares_XK)


@dataclass(frozen=True, config=STRICT)
class VrPhi(PhiKeys):
    """Variational Reasoning's step of the hinted policy (arXiv 2509.22637, eq. 9): the teacher's
    prompt learns what the student's own right thoughts are."""

    name: Literal["vr_phi"] = "vr_phi"
    """Variational Reasoning: the hinted policy alone."""
    group_size: PositiveInt = 8
    """Paths per question: M unhinted ones with forward_kl, K hinted ones with the others."""

    # Its paths have no ratio; beside theta's part, in `vr`, those of theta have.
    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("thought_ratio", {"phi": ("forward_kl",)}),)

    def draws(self) -> Draws:
        forward = self.phi == "forward_kl"
        return Draws(
            prior=self.group_size * forward,
            posterior=self.group_size * (not forward),
            attempts=self.estimator == "accuracy",
            u_norm=self.u_norm,
        )

    def needs(self) -> frozenset[Score]:
        return frozenset(self.phi_scores())

    def notes(self) -> Iterator[str]:
        if self.phi != "reverse_kl":
            yield from alone("group_size", self.group_size)

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        part = self.phi_part(batch)
        # A few (B, P) operations again: the forwards behind them are done.
        _, scores, found = (self.unhinted if part.stream == "prior" else self.hinted)(batch)
        metrics = merge(found, counts((part,)))
        return Terms(parts=(part,), path_scores={part.stream: scores}, metrics=metrics)


@dataclass(frozen=True, config=STRICT)
class Vr(ThetaKeys, PhiKeys):
    """Variational Reasoning (arXiv 2509.22637): both steps of its algorithm 1 in each update, on
    paths of the policies as they are. One policy is behind both prompts, or each has its own."""

    name: Literal["vr"] = "vr"
    """Variational Reasoning: reasoning model and hinted policy, one model with two prompts or two
    models."""
    share_params: bool = True
    """One model is behind both prompts. false: the hinted policy is a second model, with optimiser
    and learning rate of its own (section posterior), and draws the hinted paths."""
    prior_samples: PositiveInt = 8
    """M, unhinted paths per question, which forward_kl alone draws."""
    phi_weight: PositiveFloat = 1.0
    """Weight of the hinted policy's part of the loss; the reasoning model's has 1. A model of its
    own has a learning rate instead."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread("prior_samples", {"phi": ("reverse_kl", "iwae")}),
        Unread("thought_ratio", {"group_size": (1,), "phi": ("forward_kl",)}),
        Unread("phi_weight", {"share_params": (False,)}),
    )

    @property
    def phi_who(self) -> Trained:
        return "policy" if self.share_params else "posterior"

    def draws(self) -> Draws:
        forward = self.phi == "forward_kl"
        return Draws(
            posterior=self.group_size,
            posterior_who=self.phi_who,
            prior=self.prior_samples * forward,
            joint=forward,
            **self.behind(),
        )

    def needs(self) -> frozenset[Score]:
        own = views(self.phi_who)
        return frozenset({*own, *self.answer_scores("posterior"), *self.phi_scores()})

    def notes(self) -> Iterator[str]:
        yield from alone("group_size", self.group_size)
        if self.phi == "forward_kl":
            yield from alone("prior_samples", self.prior_samples)

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        share_BK, scores, found = self.hinted(batch)
        part = self.phi_part(batch)
        if self.share_params:  # two models have a step each, and a learning rate
            part = replace(part, weight_BP=self.phi_weight * part.weight_BP)
        path_scores: dict[Stream, dict[str, Tensor]] = {"posterior": scores}
        if part.stream == "prior":
            _, path_scores["prior"], others = self.unhinted(batch)
            found = merge(found, others)
        parts = (*self.theta_parts(share_BK), part)
        metrics = merge(found, counts(parts))
        return Terms(parts=parts, path_scores=path_scores, metrics=metrics)


def alone(key: str, paths: int) -> Iterator[str]:
    """Say that a single path is worth nothing to a weight that compares paths."""
    if paths == 1:
        yield (
            f"objective.{key} 1: the weight of a single path is 1, whatever it is worth; give 2 or "
            "more"
        )


def counts(parts: tuple[Term, ...]) -> Metrics:
    """Count the questions of which the first part has no path with a weight, and no part has."""
    silent = int((~Terms(parts=parts).alive).sum())
    return {"groups_all_rejected": skipped(parts[0].weight_BP), "groups_zero_var": silent}


def _summed(worth_BP: Tensor) -> Tensor:
    """Weights of paths whose sum is meant, since rows divide by their number."""
    return worth_BP.shape[1] * worth_BP

"""VPG-EA (arXiv 2605.11019): policy gradient for the teacher, gated distillation for the student.

    loss = -(1/G) sum_i A_i log q(z_i|x, y*)
           + beta (1/G) sum_i 1[A_i > 0] (sg log q(z_i|x, y*) - log pi(z_i|x))

A and the gate are constants of the rollout batch, so the weights of a path are -A_i (teacher view)
and -beta 1[A_i > 0] (student view, the same token ids). Two options add to that, off by default:

    prior_pg      - prior_pg (1/N) sum_j A'_j log pi(z'_j|x)              the student's own paths
    train_answer  - answer_weight (1/G) sum_i 1[A_i > 0] log pi(y*|x, z_i)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.kernels.options import GroupOptions
from vpgea_fast.names import Score, Stream
from vpgea_fast.objectives.base import Draws, EtaKeys, Term, Terms
from vpgea_fast.objectives.guards import (
    EARLY,
    VIEWS,
    accepted,
    caught,
    leak,
    log_ratio,
    passed,
)
from vpgea_fast.objectives.unread import Unread
from vpgea_fast.values import (
    STRICT,
    Exponent,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    merge,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.advantage import Utility
    from vpgea_fast.types import ScoredBatch

UNGUARDED = {"leak_guard": ("none", "counterfactual", "max_kl")}
"""The guards that compare no U with its baseline."""


@dataclass(frozen=True, config=STRICT)
class Vpgea(EtaKeys):
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
    utility: Literal["product", "elbo"] = "product"
    """S of a path. `product`: R eta. `elbo`: what the ELBO averages, U + log eta less kappa (log
    q(z|x, y*) - log pi(z|x)). There a rejected path is worth the baseline of U, and never more
    than the worst accepted one."""
    kappa: NonNegativeFloat = 0.0
    """Weight of the log-ratio of both views in `utility: elbo`; 1: the reverse-KL reward of
    arXiv 2509.22637. Above 0 it costs two forwards of the posterior paths."""
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
    leak_guard: Literal["none", "counterfactual", "max_kl", "early_answer"] = "none"
    """Reject posterior paths that lean on the answer in their prompt. `counterfactual`: log q(z|x,
    y*) - log q(z|x, y') > leak_limit, y' a wrong answer. `max_kl`: log q - log pi > leak_limit at
    some token. Both cost two forwards of these paths. `early_answer`: the answer stands in the
    first half, and the baseline exceeds U of what precedes it by more than leak_limit; one forward
    of such paths."""
    leak_limit: PositiveFloat = 2.0
    """Nats that the leak guard lets pass."""
    lexical: bool = False
    """Reject posterior paths whose decoded thought holds a match of lexical_regex."""
    lexical_regex: str = "given|provided|reference|known answer|hint"
    """Words of a thought that speaks of its hint; case does not matter."""
    len_min_frac: NonNegativeFloat = 0.0
    """Reject posterior paths shorter than this share of the base length (0: none); 0.05 is a start.
    Such a path may only state the answer."""
    prior_pg: NonNegativeFloat = 0.0
    """Weight of a policy gradient on the prior paths too (0: none): their S by the same formula and
    baselines, z-scored among themselves. Not in the paper."""
    train_answer: Literal["none", "sft"] = "none"
    """`sft`: the student also imitates the reference answer behind the distilled thoughts, as
    VeriFree does (arXiv 2505.21493)."""
    answer_weight: PositiveFloat = 1.0
    """Weight of that imitation."""

    # DAPO's, arXiv 2503.14476.
    clip_high: PositiveFloat = 0.28
    """That ratio is clipped above 1 + clip_high. What is distilled has no ratio: its paths are a
    fixed sample of a forward KL."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "robust": {
            # One prior path at -60 nats among four pulls a mean down by 15: every path would pass.
            "baseline": "lme",
            "reward": "likelihood_mix",
            "clamp_u": True,
            # Of 500 tokens on average, a path of 5 that only states the answer has eta 10.
            "eta_clip": (0.25, 4.0),
            # In nats: differences below are noise of the scores.
            "eps": 1e-3,
            # A z-score has no scale: it would blow up a group whose paths have become equal.
            "std_gate": 0.05,
            "leak_guard": "counterfactual",
        },
    }

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        # Of a logarithm, and without another view, no reward and no baseline of it is left.
        *(
            Unread(key, where, even_preset=True)
            for key in ("reward", "r_margin")
            for where in ({"utility": ("elbo",)}, {"cross_view": (False,)})
        ),
        # The gate compares P with 1/2, and a U that is lifted stays far below.
        *(
            Unread(key, {**where, **UNGUARDED})
            for key in ("baseline", "clamp_u")
            for where in (
                {"cross_view": (False,)},
                {"reward": ("likelihood_gate",), "utility": ("product",)},
            )
        ),
        Unread("leak_limit", {"leak_guard": ("none",)}),
        Unread("lexical_regex", {"lexical": (False,)}),
        Unread("answer_weight", {"train_answer": ("none",)}),
        # A schedule may end at 0, where a clip is not read any more.
        Unread("eta_clip", {"alpha": (0.0,), "alpha_end": (None,)}),
        Unread("alpha_steps", {"alpha_end": (None,)}),
        Unread("gate", {"beta": (0.0,), "train_answer": ("none",)}),
        Unread("distill_denominator", {"beta": (0.0,)}),
        Unread("distill_denominator", {"norm": ("const", "seq_sum", "seq_mean")}),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.group_options()  # refuses what the scores cannot be made with
        try:
            re.compile(self.lexical_regex)
        except re.error as error:
            raise ValueError(
                f"lexical_regex: got {self.lexical_regex!r}, expected a regular expression: {error}"
            ) from error
        if self.prior_pg and self.prior_samples < 2:
            raise ValueError(
                f"prior_pg: got {self.prior_pg} with prior_samples 1, expected 2 or more: one path "
                "has nothing to be compared with"
            )
        # `likelihood_gate` asks for P > 1/2, and a mean of likelihoods for something below it.
        if self.clamp_u and self.u_min > -2:
            raise ValueError(
                f"u_min: got {self.u_min} with clamp_u, expected at most -2: each U is lifted to "
                "it, and paths that cannot make the answer would be likely"
            )
        if self.leak_guard != "none" and not self.posterior:
            raise ValueError(
                f"leak_guard: got {self.leak_guard!r} with posterior: false, expected none: the "
                "student's own prompt holds no answer that could leak"
            )
        # It would be the ELBO of another student, who sees the answer.
        if self.utility == "elbo" and not self.cross_view:
            raise ValueError(
                "cross_view: got False with utility 'elbo', expected true: the ELBO is of the "
                "answer in the student's view"
            )
        if self.kappa and not (self.utility == "elbo" and self.posterior):
            raise ValueError(
                f"kappa: got {self.kappa} with utility {self.utility!r} and posterior "
                f"{self.posterior}, expected 0: only the ELBO of a teacher's path has a log-ratio"
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
            texts=self.lexical,
            joint=self.prior_pg > 0,
            targets=self.train_answer == "sft",
        )

    def needs(self) -> frozenset[Score]:
        early = {EARLY} if self.leak_guard == "early_answer" else set()
        return self.unguarded_needs() | early | frozenset(self.guard_scores() or ())

    def unguarded_needs(self) -> frozenset[Score]:
        """The log-probs that are read whatever the leak guard is."""
        # The student's prompt does not hold the answer, so a path that only leans on it makes the
        # answer no likelier there.
        own = "student" if self.cross_view else self.draws().posterior_view
        scores = {Score("posterior", own, "target"), Score("prior", "student", "target")}
        return frozenset(scores | (set(VIEWS) if self.kappa else set()))

    def guard_scores(self) -> tuple[Score, Score] | None:
        """The log-probs of a thought that the leak guard compares: as drawn, and without the
        answer or with a wrong one."""
        # Both of the trainer: over thousands of tokens the sampler's rounding would add up to nats.
        wrong = Score("posterior", "counterfactual", "thought")
        return {"counterfactual": (VIEWS[0], wrong), "max_kl": VIEWS}.get(self.leak_guard)

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
        u = self._utility(batch, "posterior")
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
        prior_terms, prior_scores = self._prior(batch)
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
                *self._answer_terms(gate_BG),
                *prior_terms,
            ),
            path_scores={"posterior": scores, "prior": {"u": prior.u_BP, **prior_scores}},
            metrics=merge(
                self._group_metrics(batch, u),
                self._guard_metrics(batch),
                posterior_monitors(*columns, **bounds),
            ),
        )

    def _answer_terms(self, gate_BG: Tensor) -> list[Term]:
        """The reference answer behind the distilled thoughts."""
        if self.train_answer == "none":
            return []
        # 1 where the gate is open: how far `relu` opens is for the distilled thoughts alone.
        weight_BG = -self.answer_weight * gate_BG.ne(0).double()
        return [
            Term(
                name="answer",
                stream="posterior",
                view="student",
                part="target",
                weight_BP=weight_BG,
            )
        ]

    def _prior(self, batch: ScoredBatch) -> tuple[list[Term], dict[str, Tensor]]:
        """The policy gradient of the student's own paths, and their scores for the log."""
        if not self.prior_pg:
            return [], {}
        u = self._utility(batch, "prior")
        # A weight multiplies log P in the loss, which falls: hence the sign.
        weight_BN = -self.prior_pg * u.advantage
        term = Term(
            name="prior_pg",
            stream="prior",
            view="student",
            weight_BP=weight_BN,
            later=self.clipped(),
        )
        names = ("reward", "eta", "utility", "advantage")
        return [term], {name: getattr(u, name) for name in names}

    def _utility(self, batch: ScoredBatch, stream: Stream) -> Utility:
        """Utility, advantage and gate of the paths of a stream, against the student's baselines."""
        from vpgea_fast.advantage import cross_view_utility, group_zscore

        own, prior = batch.stream(stream), batch.prior
        columns = own.u_BP, prior.u_BP, own.length_BP, prior.length_BP
        # One kernel launch on CUDA; the monitors below it are a few (B, G) operations.
        mine = stream == "posterior"
        accept_BP = accepted(self, batch) if mine else passed(self, batch, stream)
        u = cross_view_utility(*columns, accept_BG=accept_BP, options=self.group_options())
        if self.utility == "elbo":
            utility_BP = self._elbo(batch, stream, u, accept_BP)
            # Of a logarithm no reward is left but whether a path is accepted.
            u = dataclasses.replace(u, utility=utility_BP, reward=accept_BP.double())
        elif self.cross_view:
            return u
        else:
            # In its own view nearly every closed path makes the answer: a baseline would leave
            # nothing.
            reward_BP = own.u_BP.exp().where(accept_BP, 0.0)
            u = dataclasses.replace(u, reward=reward_BP, utility=reward_BP * u.eta)
        options = {"eps": self.eps, "ddof": self.ddof, "std_gate": self.std_gate}
        advantage_BP = group_zscore(u.utility, **options)
        return dataclasses.replace(u, advantage=advantage_BP, gate=advantage_BP > 0)

    def _elbo(self, batch: ScoredBatch, stream: Stream, u: Utility, accept_BP: Tensor) -> Tensor:
        """U + log eta - kappa (log q - log pi) of the accepted paths, (B, P) nats.

        A rejected one has min(baseline of U, the least of the accepted). 0 would be the best of
        all: these are logarithms. The least alone would tie a single accepted path with the
        rejected ones, and the lowest U, u_min, would leave their distance alone to be learnt.
        """
        u_BP = batch.stream(stream).u_BP
        s_BP = (u_BP.clamp(min=self.u_min) if self.clamp_u else u_BP) + u.eta.log()
        # The student's own path was drawn from pi: its log-ratio is 0.
        if self.kappa and stream == "posterior":
            s_BP = s_BP - self.kappa * log_ratio(batch)
        least_B1 = s_BP.where(accept_BP, math.inf).amin(dim=1, keepdim=True)
        return s_BP.where(accept_BP, least_B1.minimum(u.u_base[:, None]))

    def _guard_metrics(self, batch: ScoredBatch) -> dict[str, float]:
        """What each guard caught of the paths that every filter lets pass."""
        pass_BG, leaked_BG = passed(self, batch), leak(self, batch)
        shares = {
            name: (pass_BG & caught_BG).double().mean().item()
            for name, caught_BG in caught(self, batch).items()
        }
        nats = {} if leaked_BG is None else {"guard_nats": leaked_BG.mean().item()}
        ratio = {"path_kl": log_ratio(batch).mean().item()} if self.kappa else {}
        return {**shares, **nats, **ratio}

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

"""Supervised kin: imitate responses that are given, or sampled and verified.

    SFT          loss = - mean over tokens of log p(response | x)
    RFT          the same, of the sampled responses that verify
    best-of RFT  the same, of one verified response per question
    hint-RFT     the same, of verified paths that the teacher drew, in the student's view

The policy that is imitated is the current one: with one update per rollout, RFT is REINFORCE with
the reward 1[correct] and no baseline, but for its denominator. Sources: RFT arXiv 2308.01825; best
of N as a target arXiv 2309.06657; paths rationalised from the answer: STaR, arXiv 2203.14465.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.names import Norm, Score, Stream, View
from vpgea_fast.objectives.base import Draws, Keys, Term, Terms
from vpgea_fast.objectives.unread import Unread
from vpgea_fast.values import STRICT, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.types import ScoredBatch

Choice = Literal["all", "shortest", "likeliest"]


@dataclass(frozen=True, config=STRICT)
class Supervised(Keys):
    """Keys of every supervised objective."""

    # As fine-tuning usually counts: a long response weighs more than a short one.
    norm: Norm = "token_mean"
    """What a path's weight is divided by. `token_mean`: the tokens of all paths that are imitated.
    `const`, `seq_sum`, `seq_mean`: see the other methods; B P counts the others too."""
    trains: Literal["response", "thought"] = "response"
    """Tokens with a gradient: thought and answer, or the thought alone."""

    STREAM: ClassVar[Stream] = "prior"

    def needs(self) -> frozenset[Score]:
        return frozenset()

    def _imitate(self, kept_BP: Tensor, metrics: Mapping[str, float | None]) -> Terms:
        """-log p of the paths that are kept, in the student's view."""
        part = Term(
            name="pg",
            stream=self.STREAM,
            view="student",
            part=self.trains,
            weight_BP=-kept_BP.double(),
            counted_BP=kept_BP,
        )
        scores = {"reward": kept_BP.double()}
        return Terms(parts=(part,), path_scores={self.STREAM: scores}, metrics=metrics)


@dataclass(frozen=True, config=STRICT)
class Sft(Supervised):
    """Supervised fine-tuning: imitate the responses of the data (data.response_key)."""

    name: Literal["sft"] = "sft"
    """Imitate the responses of the data; nothing is sampled."""
    responses: PositiveInt = 1
    """Responses of each question that a step trains, the first ones."""
    view: View = "student"
    """Behind which prompt. `teacher`: the hinted policy of Variational Reasoning, as its authors
    train it, with `trains` thought."""

    # Every question has its responses, and with them a gradient.
    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("denominator", {"name": ("sft",)}),)

    def draws(self) -> Draws:
        return Draws(prior=self.responses, answers=self.trains == "response", given=True)

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        # Every path: a length is 1 at least.
        terms = self._imitate(batch.prior.length_BP.gt(0), {})
        return replace(terms, parts=tuple(replace(part, view=self.view) for part in terms.parts))


@dataclass(frozen=True, config=STRICT)
class Rejection(Supervised):
    """Keys of methods that imitate sampled paths which verify (needs rollout.full_answer)."""

    # 1 is enough: no path is compared with another.
    group_size: Annotated[int, Field(ge=1, lt=2**31)] = 8
    """Paths sampled per question."""
    choose: Choice = "all"
    """Which of a question's right paths are imitated. `all`; the `shortest` thought; the
    `likeliest`: largest sum of log-probs in the student's view. The first of equals."""

    # `token_mean` counts the imitated paths alone, and a question without one has no gradient.
    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("denominator", {"norm": ("token_mean",)}),)

    def draws(self) -> Draws:
        answers = self.trains == "response"
        if self.STREAM == "posterior":
            return Draws(posterior=self.group_size, verified=True, answers=answers)
        return Draws(prior=self.group_size, verified=True, answers=answers)

    def needs(self) -> frozenset[Score]:
        # A forward of every path, so only where its outcome is read.
        likely = Score(self.STREAM, "student", self.trains)
        return frozenset({likely} if self.choose == "likeliest" else ())

    def terms(self, batch: ScoredBatch, _state: Mapping[str, Any], /) -> Terms:
        columns = batch.stream(self.STREAM)
        correct_BP = columns.closed_BP & columns.correct_BP.eq(1.0)
        kept_BP = self._chosen(batch, correct_BP)
        metrics = {
            "accept_rate": correct_BP.double().mean().item(),
            "gate_rate": kept_BP.double().mean().item(),
            "groups_all_rejected": int((~correct_BP).all(dim=1).sum()),
        }
        return self._imitate(kept_BP, metrics)

    def _chosen(self, batch: ScoredBatch, correct_BP: Tensor) -> Tensor:
        """(B, P) bool: the right paths that are imitated."""
        if self.choose == "all":
            return correct_BP
        columns = batch.stream(self.STREAM)
        worth_BP = -columns.length_BP
        if self.choose == "likeliest":
            (logps,) = (batch.logps[score] for score in self.needs())
            sums = [logps[path.key].sum() for path in columns.flat]
            worth_BP = worth_BP.new_tensor(sums).view_as(worth_BP)
        worth_BP = worth_BP.where(correct_BP, -float("inf"))
        # argmax takes any of equals on some devices; the first of the largest is the same on all.
        best_BP = worth_BP.eq(worth_BP.amax(dim=1, keepdim=True)) & correct_BP
        return best_BP & best_BP.cumsum(dim=1).eq(1)


@dataclass(frozen=True, config=STRICT)
class Rft(Rejection):
    """Rejection-sampling fine-tuning (arXiv 2308.01825): imitate the sampled responses that
    verify."""

    name: Literal["rft"] = "rft"
    """Imitate the sampled responses that verify."""


@dataclass(frozen=True, config=STRICT)
class BestOfRft(Rejection):
    """Best-of-N fine-tuning: imitate one verified response per question, the shortest or the
    likeliest."""

    name: Literal["best_of_rft"] = "best_of_rft"
    """Imitate one verified response per question."""
    choose: Choice = "shortest"
    """As in rft."""


@dataclass(frozen=True, config=STRICT)
class HintRft(Rejection):
    """Imitate, in the student's view, the verified paths that the teacher drew with the answer at
    hand: plain distillation, VPG-EA's nearest rival (cf. STaR, arXiv 2203.14465)."""

    name: Literal["hint_rft"] = "hint_rft"
    """Imitate the teacher's verified paths in the student's view."""

    STREAM: ClassVar[Stream] = "posterior"

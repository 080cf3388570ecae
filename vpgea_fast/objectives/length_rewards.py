"""Length rewards: what a policy gradient pays for a short path, beside its being right.

Each is a record of keys with one formula, `shaped`. Notation, of the paths i of one question:

    c_i  1 if path i is right, else 0
    n_i  its tokens, of the part that is trained (`objective.trains`)
    R_i  its reward, which the advantage compares

A new one is a type here, a name in LengthReward, and a row in tests/test_length_rewards.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from vpgea_fast.objectives.judged import Judged, LengthKeys, Shaped
from vpgea_fast.objectives.length_limits import Laser, LaserD, LaserDe, ThinkPrune
from vpgea_fast.objectives.unread import Unread
from vpgea_fast.values import STRICT, Clip, Exponent, NonNegativeFloat, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.names import Slot

Share = Annotated[float, Field(ge=0.0, le=1.0)]

Bound = Annotated[float, Field(ge=-1e6, le=1e6)]


def _ordered(clip: tuple[float, float]) -> tuple[float, float]:
    if clip[0] > clip[1]:
        raise ValueError(f"got {list(clip)}, expected (low, high) with low <= high")
    return clip


@dataclass(frozen=True, config=STRICT)
class Eta(LengthKeys):
    """R = c (mean n / n)^alpha over the thoughts of the group: the length factor of VPG-EA (arXiv
    2605.11019), whose base length is the group's own mean."""

    name: Literal["eta"] = "eta"
    """The length factor of VPG-EA."""
    alpha: Exponent = 0.5
    """Exponent of the ratio of lengths; 0: none."""
    clip: Clip | None = None
    """Clip the factor to (low, high); null: no clip."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("clip", {"alpha": (0.0,)}),)

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        from vpgea_fast.advantage import length_factor

        length_BN = judged.batch.prior.length_BP
        # These paths are the student's own, of which VPG-EA's base length is a mean.
        base_B = length_BN.mean(dim=1)
        eta_BN = length_factor(length_BN, base_B, alpha=self.alpha, eta_clip=self.clip)
        return Shaped(reward_BN=judged.right_BN.double() * eta_BN, scores={"eta": eta_BN})


@dataclass(frozen=True, config=STRICT)
class Kimi(LengthKeys):
    """R = c + weight (l if right, else min(0, l)), l = 1/2 - (n - min n) / (max n - min n): Kimi
    k1.5 (arXiv 2501.12599, section 2.3.3). min and max are of the whole group; l = 0 where they are
    equal. So a wrong path is never paid for being short."""

    name: Literal["kimi"] = "kimi"
    """Kimi k1.5."""
    weight: NonNegativeFloat = 1.0
    """Weight of the length reward; the paper gives none, Laser's comparison takes 0.4."""

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        length_BN, right_BN = judged.length_BN, judged.right_BN
        low_B1 = length_BN.amin(dim=1, keepdim=True)
        span_B1 = length_BN.amax(dim=1, keepdim=True) - low_B1
        place_BN = 0.5 - (length_BN - low_B1) / span_B1.clamp(min=1.0)
        # Whole token counts: a span below 1 is 0, a group of equal lengths.
        place_BN = place_BN.masked_fill(span_B1 == 0, 0.0)
        paid_BN = place_BN.where(right_BN, place_BN.clamp(max=0.0))
        return Shaped(reward_BN=right_BN.double() + self.weight * paid_BN)


@dataclass(frozen=True, config=STRICT)
class Arora(LengthKeys):
    """R = c (1 - alpha sigmoid((n - m) / (s + 1e-7))): Arora and Zanette (arXiv 2502.04463). m and
    s are the mean and the standard deviation of n over the right paths of the group. s has their
    number in its denominator, so one right path alone has R = 1 - alpha / 2."""

    name: Literal["arora"] = "arora"
    """Arora and Zanette; their advantage is that of `objective.name rloo`."""
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Largest share of the reward that a long path loses."""

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        length_BN, c_BN = judged.length_BN, judged.right_BN.double()
        # In a group without a right path nothing is paid, so any mean will do.
        count_B1 = c_BN.sum(dim=1, keepdim=True).clamp(min=1.0)
        mean_B1 = (c_BN * length_BN).sum(dim=1, keepdim=True) / count_B1
        apart_BN = length_BN - mean_B1
        # From deviations: a difference of squares would lose the digits of long paths.
        std_B1 = ((c_BN * apart_BN.square()).sum(dim=1, keepdim=True) / count_B1).sqrt()
        place_BN = (apart_BN / (std_B1 + 1e-7)).sigmoid()
        return Shaped(reward_BN=c_BN * (1 - self.alpha * place_BN))


@dataclass(frozen=True, config=STRICT)
class ShorterBetter(LengthKeys):
    """R = alpha c - beta |n - n*|: ShorterBetter (arXiv 2504.21370 and the authors' reward
    manager). n* is the shortest right path of the group, or the mean of all where none is
    right."""

    name: Literal["shorter_better"] = "shorter_better"
    """ShorterBetter."""
    alpha: NonNegativeFloat = 2.0
    """Worth of being right."""
    beta: NonNegativeFloat = 1e-3
    """Price of a token more or less than n*."""

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        length_BN, right_BN = judged.length_BN, judged.right_BN
        # Infinite in a group without a right path, where the mean takes its place below.
        shortest_B1 = length_BN.where(right_BN, float("inf")).amin(dim=1, keepdim=True)
        mean_B1 = length_BN.mean(dim=1, keepdim=True)
        best_B1 = shortest_B1.where(right_BN.any(dim=1, keepdim=True), mean_B1)
        gap_BN = (length_BN - best_B1).abs()
        return Shaped(reward_BN=self.alpha * right_BN.double() - self.beta * gap_BN)


@dataclass(frozen=True, config=STRICT)
class O1Pruner(LengthKeys):
    """R = clip(mean n_ref / n - 1 + weight (c - mean c_ref), low, high), the means over paths of
    the frozen reference policy: O1-Pruner (arXiv 2501.12570). The clip is that of the authors'
    code, which z-scores R over all its data; nearest is `objective.advantage batch_zscore`, over
    those of a step."""

    name: Literal["o1_pruner"] = "o1_pruner"
    """O1-Pruner."""
    weight: NonNegativeFloat = 2.0
    """Worth of being right (lambda)."""
    clip: Annotated[tuple[Bound, Bound], AfterValidator(_ordered)] = (-2.0, 4.0)
    """Lowest and highest reward."""
    paths: PositiveInt = 8
    """Paths of the reference policy per question, drawn again in every step."""

    @property
    def reference_paths(self) -> int:
        return self.paths

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        mean_B1 = judged.reference_length_BR.mean(dim=1, keepdim=True)
        right_B1 = judged.reference_right_BR.double().mean(dim=1, keepdim=True)
        # Lengths are 1 at least, so the ratio is finite.
        reward_BN = mean_B1 / judged.length_BN - 1
        reward_BN = reward_BN + self.weight * (judged.right_BN.double() - right_B1)
        return Shaped(reward_BN=reward_BN.clamp(*self.clip))


@dataclass(frozen=True, config=STRICT)
class LcR1(LengthKeys):
    """R = c + format + weight (1 - n / max n) of the right paths, max n that of the longest right
    one; format is 1 for a thought that ended: LC-R1 (arXiv 2506.14755). Beside its advantage, the
    closing token of a right path's thought earns `close` (1 - v / z): z tokens, the first v of them
    up to where it first states the answer. Where it never does, `close` times `absent`. Their
    advantage is that of `objective.name drgrpo`."""

    # Two departures: v is found by the answer's text, where the paper asks a model (LC-Extractor)
    # and trains on the thought that it cut. The authors' code pays wrong paths for length too.

    name: Literal["lc_r1"] = "lc_r1"
    """LC-R1."""
    weight: NonNegativeFloat = 1.0
    """Weight of the length reward."""
    close: NonNegativeFloat = 1.0
    """Weight of the closing token's reward."""
    absent: Annotated[float, Field(ge=-1.0, le=0.0)] = -1.0
    """That reward where the thought never states the answer."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("absent", {"close": (0.0,)}),)

    @property
    def reads_stated(self) -> bool:
        return True

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        length_BN, right_BN = judged.length_BN, judged.right_BN
        # 1 for the wrong ones: a group of those alone must not divide by zero.
        longest_B1 = length_BN.where(right_BN, 1.0).amax(dim=1, keepdim=True)
        short_BN = (1 - length_BN / longest_B1).where(right_BN, 0.0)
        closed_BN = judged.batch.prior.closed_BP
        whole_BN = right_BN & closed_BN
        stated_BN = judged.batch.prior.stated_BP
        assert stated_BN is not None  # draws() asks for it
        ratio_BN = (1 - stated_BN / judged.batch.prior.length_BP).where(stated_BN > 0, self.absent)
        # Of the paths that the closing token pays for.
        rate = (stated_BN > 0)[whole_BN].double().mean().item() if whole_BN.any() else None
        return Shaped(
            reward_BN=right_BN.double() + closed_BN.double() + self.weight * short_BN,
            close_BN=self.close * ratio_BN.where(whole_BN, 0.0),
            metrics={"answer_stated": rate},
        )


@dataclass(frozen=True, config=STRICT)
class Budgeted(LengthKeys):
    """Keys of the two rewards of L1. The prompt asks for `{budget}` tokens, one number per question
    and step, by run.seed: both paths of a comparison had the same to do."""

    low: PositiveInt = 100
    """Smallest budget."""
    high: PositiveInt = 4000
    """Largest budget."""

    TOKENS: ClassVar[tuple[str, ...]] = ("low", "high")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(f"got low {self.low} above high {self.high}; exchange them")

    def fields(self) -> Mapping[str, Callable[[Slot], str | int]]:
        return {"budget": self._budget}

    def _budget(self, slot: Slot) -> int:
        # Of 63 bits: the remainder prefers no budget by more than 1e-9.
        return self.low + slot.group_seed % (self.high - self.low + 1)

    def _asked(self, judged: Judged) -> Tensor:
        """The budget of every path, (B, N) float64."""
        # From the prompts themselves, where a field is text.
        budgets = [float(q.fields["budget"]) for q, _ in judged.batch.pairs("prior")]
        return judged.length_BN.new_tensor(budgets).view_as(judged.length_BN)


@dataclass(frozen=True, config=STRICT)
class L1Exact(Budgeted):
    """R = c - alpha |budget - n|: L1 or LCPO-Exact (arXiv 2503.04697, eq. 1)."""

    name: Literal["l1_exact"] = "l1_exact"
    """L1, as many tokens as asked for; the prompt needs {budget}."""
    alpha: NonNegativeFloat = 3e-4
    """Price of a token more or less than the budget."""

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        budget_BN = self._asked(judged)
        gap_BN = (budget_BN - judged.length_BN).abs()
        reward_BN = judged.right_BN.double() - self.alpha * gap_BN
        return Shaped(reward_BN=reward_BN)


@dataclass(frozen=True, config=STRICT)
class L1Max(Budgeted):
    """R = c clip(alpha (budget - n) + delta, 0, 1): L1 or LCPO-Max (arXiv 2503.04697, eq. 2)."""

    name: Literal["l1_max"] = "l1_max"
    """L1, at most as many tokens as asked for; the prompt needs {budget}."""
    alpha: NonNegativeFloat = 1e-3
    """Price of a token: the slope between the clips. The paper's text has 3e-4, its code 1e-3."""
    delta: Share = 0.5
    """Reward of a right path that has the budget exactly."""

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        budget_BN = self._asked(judged)
        room_BN = self.alpha * (budget_BN - judged.length_BN) + self.delta
        reward_BN = judged.right_BN.double() * room_BN.clamp(0.0, 1.0)
        return Shaped(reward_BN=reward_BN)


LENGTH_REWARDS: dict[str, type] = {
    kind.name: kind
    for kind in (
        *(Eta, Kimi, Arora, O1Pruner, LcR1, ThinkPrune),
        *(L1Exact, L1Max, Laser, LaserD, LaserDe, ShorterBetter),
    )
}
"""Name -> its type, whose fields are the keys of the section."""
if TYPE_CHECKING:
    LengthReward = Any
else:
    LengthReward = Annotated[Union[(*LENGTH_REWARDS.values(),)], Field(discriminator="name")]
"""The section `objective.length_reward`; `name` chooses it."""

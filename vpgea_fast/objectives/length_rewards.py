"""Length rewards: what a policy gradient pays for a short path, beside its being right.

Each is a record of keys with one formula, `shaped`. Notation, of the paths i of one question:

    c_i  1 if path i is right, else 0
    n_i  its tokens, of the part that is trained (`objective.trains`)
    R_i  its reward, which the advantage compares

A new one is a type here, a name in LengthReward, and a row in tests/test_length_rewards.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.values import STRICT, Clip, Exponent, NonNegativeFloat

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.names import Slot
    from vpgea_fast.types import ScoredBatch

Share = Annotated[float, Field(ge=0.0, le=1.0)]


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What a length reward sees of a step: B questions, N paths of the student's each.

    right_BN   bool: the path is right
    length_BN  float64: tokens n of the trained part
    batch      all else, such as the thoughts alone and the reference policy's paths
    """

    right_BN: Tensor
    length_BN: Tensor
    batch: ScoredBatch


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Shaped:
    """Rewards, with what a length reward has to say beside them.

    reward_BN  float64 R
    state      kept for the next step, values that JSON has
    scores     for the log of paths alone: name -> (B, N)
    metrics    for the log of the step alone
    """

    reward_BN: Tensor
    state: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class LengthKeys:
    """Answers of a length reward that draws nothing more and keeps no state."""

    def fields(self) -> Mapping[str, Callable[[Slot], str | int]]:
        """Say what a path's prompt holds of the reward."""
        return {}

    @property
    def reference_paths(self) -> int:
        """Paths of the reference policy per question that the reward reads."""
        return 0


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

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        from vpgea_fast.advantage import length_factor

        length_BN = judged.batch.prior.length_BP
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
    """R = c (1 - alpha sigmoid((n - m) / (s + 1e-7))), m and s the mean and the standard deviation
    of n over the right paths of the group: Arora and Zanette (arXiv 2502.04463, eq. 6). s has the
    number of right paths in its denominator, so one right path alone has R = 1 - alpha / 2."""

    name: Literal["arora"] = "arora"
    """Arora and Zanette; their advantage is that of `objective.name rloo`."""
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Largest share of the reward that a long path loses."""

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        length_BN, c_BN = judged.length_BN, judged.right_BN.double()
        count_B1 = c_BN.sum(dim=1, keepdim=True).clamp(min=1.0)
        mean_B1 = (c_BN * length_BN).sum(dim=1, keepdim=True) / count_B1
        apart_BN = length_BN - mean_B1
        # From deviations: a difference of squares would lose the digits of long paths.
        std_B1 = ((c_BN * apart_BN.square()).sum(dim=1, keepdim=True) / count_B1).sqrt()
        place_BN = (apart_BN / (std_B1 + 1e-7)).sigmoid()
        return Shaped(reward_BN=c_BN * (1 - self.alpha * place_BN))


@dataclass(frozen=True, config=STRICT)
class ShorterBetter(LengthKeys):
    """R = alpha c - beta |n - n*|, n* the shortest right path of the group, or the mean of all
    where none is right: ShorterBetter (arXiv 2504.21370, eq. 3, and the authors' reward manager)."""

    name: Literal["shorter_better"] = "shorter_better"
    """ShorterBetter."""
    alpha: NonNegativeFloat = 2.0
    """Worth of being right."""
    beta: NonNegativeFloat = 1e-3
    """Price of a token more or less than n*."""

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        length_BN, right_BN = judged.length_BN, judged.right_BN
        shortest_B1 = length_BN.where(right_BN, float("inf")).amin(dim=1, keepdim=True)
        mean_B1 = length_BN.mean(dim=1, keepdim=True)
        best_B1 = shortest_B1.where(right_BN.any(dim=1, keepdim=True), mean_B1)
        gap_BN = (length_BN - best_B1).abs()
        return Shaped(reward_BN=self.alpha * right_BN.double() - self.beta * gap_BN)


LengthReward = Annotated[Eta | Kimi | Arora | ShorterBetter, Field(discriminator="name")]
"""The section `objective.length_reward`; `name` chooses it."""

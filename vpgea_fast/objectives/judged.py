"""What a length reward sees of a step, what it says, and what all of them answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from vpgea_fast.objectives.unread import Unread, refuse_unread
from vpgea_fast.values import STRICT

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.names import Slot
    from vpgea_fast.types import ScoredBatch


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What a length reward sees of a step: B questions, N paths of the student's each.

    right_BN   bool: the path is right
    length_BN  float64: tokens n of the trained part
    batch      all else, such as the thoughts alone
    reference_right_BR, reference_length_BR
               the same of R paths of the reference policy each; None where none are drawn
    """

    right_BN: Tensor
    length_BN: Tensor
    batch: ScoredBatch
    reference_right_BR: Any = None
    reference_length_BR: Any = None


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Shaped:
    """Rewards, with what a length reward has to say beside them.

    reward_BN  float64 R
    state      kept for the next step, values that JSON has
    close_BN   float64, added to the advantage on the thought's last token alone; None: none
    scores     for the log of paths alone: name -> (B, N)
    metrics    for the log of the step alone
    """

    reward_BN: Tensor
    state: Mapping[str, Any] = field(default_factory=dict)
    close_BN: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class LengthKeys:
    """Answers of a length reward that draws nothing more and keeps no state."""

    UNREAD: ClassVar[tuple[Unread, ...]] = ()
    TOKENS: ClassVar[tuple[str, ...]] = ()
    """Keys that hold numbers of tokens which a path's are compared with."""

    def __post_init__(self) -> None:
        refuse_unread(self)

    def check(self, paths: int, /) -> None:
        """Raise ValueError for keys that do not fit this number of paths per question."""

    # L1 tells the model its budget.
    def fields(self) -> Mapping[str, Callable[[Slot], str | int]]:
        """Say what a path's prompt holds of the reward."""
        return {}

    # LC-R1 pays for ending a thought soon after it has stated the answer.
    @property
    def reads_stated(self) -> bool:
        """Whether it reads where each thought states the answer."""
        return False

    # O1-Pruner measures lengths and accuracy against the policy that training began with.
    @property
    def reference_paths(self) -> int:
        """Paths of the reference policy per question that the reward reads."""
        return 0

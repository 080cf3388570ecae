"""The loss of several updates of one rollout: the policy moves, and the paths stay."""

from __future__ import annotations

import math
from dataclasses import dataclass as plain_dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Surrogate:
    """The loss of each token of a path, with A = -weight and r = exp(now - old).

    clip      -min(r A, clip(r, low, high) A)
    truncate  -A sg min(r, high) now
    sequence  r is the geometric mean over the path, with each token's own gradient: GSPO-token,
              whose sum is that of GSPO
    KL        kl_coef (exp(d) - d - 1), d = reference - now; with a finite `kl_bound`, d is held
              to [-20, 20] and the estimate to +-kl_bound
    """

    ratio: Literal["token", "sequence"] = "token"
    truncate: bool = False
    low: float = 0.8
    high: float = 1.2
    kl_coef: float = 0.0
    kl_bound: float = math.inf

    @property
    def reference(self) -> bool:
        return self.kl_coef > 0

    def __call__(
        self, weight: float | Tensor, now: Tensor, old: Tensor, reference: Tensor | None
    ) -> Tensor:
        log_ratio = now - old
        if self.ratio == "sequence":
            # now - now.detach() is 0, and carries the gradient of the token alone (eq. 14).
            log_ratio = log_ratio.mean().detach() + (now - now.detach())
        r = log_ratio.exp()
        if self.truncate:
            # For either sign of A, as MiniMax-M1 writes it: no lower bound.
            loss = weight * r.detach().clamp(max=self.high) * now
        else:
            # The clipped branch is flat. At r = 1 both are equal, and halves of the gradient add up
            # to the whole of it, bitwise.
            loss = (weight * r).maximum(weight * r.clamp(self.low, self.high))
        if not self.reference:
            return loss
        if reference is None:
            raise ValueError("KL: got no log-probs of a reference policy, expected one per token")
        gap = reference - now
        if math.isfinite(self.kl_bound):
            gap = gap.clamp(-20.0, 20.0)
        # Where a bound holds, the estimate is flat.
        estimate = (gap.exp() - gap - 1).clamp(-self.kl_bound, self.kl_bound)
        return loss + self.kl_coef * estimate

"""Weights and bounds of Variational Reasoning (arXiv 2509.22637), in log space, and what they show.

log f      how likely a right answer is behind a thought; -inf: not at all
log rho    log pi - log q + log f
shares     rho within its question, adding up to 1
log_mean   log (1/K) sum_k rho_k, whose mean over draws is the bound L_K
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.types import ScoredBatch


def shares(log_BP: Tensor) -> Tensor:
    """Weights that add up to 1 within a question, (B, P); all 0 where no path is worth anything."""
    # The softmax of nothing but -inf is NaN.
    share_BP = log_BP.softmax(dim=1)
    return share_BP.where(log_BP.isfinite().any(dim=1, keepdim=True), 0.0)


def log_mean(log_BP: Tensor) -> Tensor:
    """log of the mean of what these are logarithms of, (B,); -inf where nothing is."""
    return log_BP.logsumexp(dim=1) - math.log(log_BP.shape[1])


def skipped(weight_BP: Tensor) -> int:
    """Count the questions of which no path has a weight."""
    return int((weight_BP == 0).all(dim=1).sum())


def best(share_BP: Tensor) -> Tensor:
    """All weight to the largest of a question, the first of equals; none where none has any."""
    # argmax takes any of equals on some devices; the first of the largest is the same on all.
    most_BP = share_BP.eq(share_BP.amax(dim=1, keepdim=True)) & share_BP.gt(0)
    return (most_BP & most_BP.cumsum(dim=1).eq(1)).to(share_BP.dtype)


def hinted_metrics(
    batch: ScoredBatch, log_f_BK: Tensor, ratio_BK: Tensor, share_BK: Tensor
) -> dict[str, float | None]:
    """What the hinted paths show, `ratio_BK` the whole log pi - log q. The bounds are of whole
    ratios, whatever is trained: vr_elbo over the paths that are worth anything, vr_bound over the
    questions that have one."""
    log_rho_BK = log_f_BK + ratio_BK
    bound_B = log_mean(log_rho_BK)
    return {
        "vr_elbo": _mean(log_rho_BK[log_rho_BK.isfinite()]),
        "vr_bound": _mean(bound_B[bound_B.isfinite()]),
        "vr_log_ratio": _mean(ratio_BK / batch.posterior.length_BP),
        **_answered("vr", log_f_BK),
        **spread("vr", share_BK),
    }


def unhinted_metrics(log_f_BM: Tensor, share_BM: Tensor) -> dict[str, float | None]:
    """What the unhinted paths show."""
    counts = {"vr_phi_skipped": skipped(share_BM)}
    return {**_answered("vr_phi", log_f_BM), **spread("vr_phi", share_BM), **counts}


def _answered(name: str, log_f_BP: Tensor) -> dict[str, float | None]:
    """Mean f, and the shares of thoughts at both ends of it."""
    f_BP = log_f_BP.exp()
    return {
        f"{name}_answered": _mean(f_BP),
        f"{name}_answered_none": _mean(f_BP.eq(0).double()),
        f"{name}_answered_all": _mean(f_BP.eq(1).double()),
    }


def spread(name: str, share_BP: Tensor) -> dict[str, float | None]:
    """How evenly the weights lie within the questions that have any."""
    share_XP = share_BP[share_BP.ne(0).any(dim=1)]
    return {
        # Effective sample size, 1 where one path has all the weight, else up to their number.
        f"{name}_ess": _mean(1 / share_XP.square().sum(dim=1)),
        f"{name}_share_max": _mean(share_XP.amax(dim=1)),
    }


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if values.numel() else None

"""What the logits of a chunk become in their own memory: sums of a row, its statistics, dz.

C rows of a chunk, V classes: all of the head, or a part of them (a process's, or late ones). Then a
row's target may be another part's, and own_C1, bool, says of which rows it is this one's; None: of
all. The formulas are in chunked.py.
"""

import torch
import torch.nn.functional as F

from vpgea_fast.kernels.contract import Head
from vpgea_fast.kernels.products import matmul, weight_blocks
from vpgea_fast.kernels.shards import RowSums

Tensor = torch.Tensor


def put_logits_(
    z_CV: Tensor,
    slope_CV: Tensor | None,
    hidden_CD: Tensor,
    *,
    head: Head,
    upcast_BD: Tensor | None,
    chunk: slice,
) -> None:
    """Rewrites z_CV as the logits of `chunk` of the rows that take part; tanh's slope beside it."""
    # Block after block of classes, each into its columns of the one buffer.
    for columns, weight_BD in weight_blocks(head.weight, upcast_BD):
        matmul(hidden_CD, weight_BD.T, z_CV.dtype, out=z_CV[:, columns])
    divisor = head.temperature
    head.logits_(z_CV, slope_CV, divisor[chunk, None] if isinstance(divisor, Tensor) else divisor)


def row_sums_(
    z_CV: Tensor, plogp_CV: Tensor | None, *, targets_C1: Tensor, own_C1: Tensor | None
) -> RowSums:
    """Rewrites z as e = exp(z - peak), 0 at the target, and plogp_CV as -e log e; sums them up.

    The clamp keeps rows whose other logits are all -inf free of inf - inf. own_C1: whose target is
    among these classes; None: all.
    """
    z_target_C1 = z_CV.gather(1, targets_C1)
    # Out of the sum, and not subtracted from it later: 1 - p keeps its digits.
    _put_(z_CV, targets_C1, torch.full_like(z_target_C1, -torch.inf), own_C1)
    peak_C1 = z_CV.amax(1, keepdim=True).clamp_min(torch.finfo(z_CV.dtype).min)
    z_CV.sub_(peak_C1).exp_()
    plogp_C1 = None
    if plogp_CV is not None:
        torch.special.entr(z_CV, out=plogp_CV)  # 0 at e = 0
        plogp_C1 = plogp_CV.sum(1, keepdim=True)
    return RowSums(z_target_C1, peak_C1, z_CV.sum(1, keepdim=True), plogp_C1)


def _put_(x_CV: Tensor, targets_C1: Tensor, values_C1: Tensor, own_C1: Tensor | None) -> None:
    """x at the target becomes the value; a row whose target is another process's stays as it is."""
    if own_C1 is not None:
        values_C1 = torch.where(own_C1, values_C1, x_CV.gather(1, targets_C1))
    x_CV.scatter_(1, targets_C1, values_C1)


def statistics_of(sums: RowSums) -> Tensor:
    """(C, 3): logp, lse, entropy (0 without plogp).

    logp = log sigmoid(z_target - lse of the others) is never above 0 and keeps the digits of 1 - p;
    no term of the entropy is negative, so nothing cancels.
    """
    z_target_C1, peak_C1, others_C1, plogp_C1 = sums
    lse_others_C1 = peak_C1 + others_C1.log()
    logp_C1 = F.logsigmoid(z_target_C1 - lse_others_C1)
    lse_C1 = torch.logaddexp(z_target_C1, lse_others_C1)
    entropy_C1 = torch.zeros_like(logp_C1)
    if plogp_C1 is not None:
        scale_C1 = (peak_C1 - lse_C1).exp()
        entropy_C1 = scale_C1 * ((lse_C1 - peak_C1) * others_C1 + plogp_C1)
        # The target's own term, which e = 0 left out; the clamp keeps 0 x -inf from being NaN.
        entropy_C1 -= logp_C1.exp() * logp_C1.clamp_min(torch.finfo(logp_C1.dtype).min)
    return torch.cat((logp_C1, lse_C1, entropy_C1), dim=1)


def top1_and_mean(z_CV: Tensor, targets_C1: Tensor) -> list[Tensor]:
    """(C, 1) each: 1 where the target is the first of the largest logits, and their mean."""
    top1_C1 = z_CV.argmax(1, keepdim=True) == targets_C1
    return [top1_C1.to(z_CV.dtype), z_CV.mean(1, keepdim=True)]


def log_sum_p2(exp_CV: Tensor, peak_C1: Tensor, values_C3: Tensor) -> Tensor:
    """(C, 1): log sum_v p_v^2, of the others' exponentials and the target's own logp."""
    logp_C1, lse_C1, _ = values_C3.split(1, dim=1)
    # A norm, which squares without a (C, V) tensor of squares.
    norm_C1 = torch.linalg.vector_norm(exp_CV, dim=1, keepdim=True)
    return torch.logaddexp(2.0 * (norm_C1.log() + peak_C1 - lse_C1), 2.0 * logp_C1)


def dlogits_(
    exp_CV: Tensor,
    *,
    plogp_CV: Tensor | None,
    slope_CV: Tensor | None,
    targets_C1: Tensor,
    own_C1: Tensor | None,
    peak_C1: Tensor,
    values_C3: Tensor,
    upstream_C3: Tensor,
    smooth_C2: Tensor | None = None,
) -> None:
    """Rewrites exp(z - peak) as d loss / d a; both upstreams are divided by the temperature.

    In passes over (C, V), each in place: the row's factor, -e log e for an entropy, the mean
    logit's share, slopes.
    """
    logp_C1, lse_C1, entropy_C1 = values_C3.split(1, dim=1)
    g_logp_C1, g_lse_C1, g_entropy_C1 = upstream_C3.split(1, dim=1)
    mean_C1 = None
    if smooth_C2 is not None:
        mean_C1, square_C1 = smooth_C2.split(1, dim=1)
        g_lse_C1 = g_lse_C1 + 2.0 * square_C1 * lse_C1  # lse is known by now, and so lse^2's slope
    # A process whose classes are all -inf has e = 0 and a peak that times 0 would be NaN. The gap
    # is bounded and not the peak: lse - 1e4 is lse itself where that is large.
    gap_C1 = (peak_C1 - lse_C1).clamp_min(-1e4)
    scale_C1 = gap_C1.exp()  # p_v = scale e_v
    row_C1 = g_lse_C1 - g_logp_C1
    # expm1 keeps the digits of 1 - p where p is close to 1.
    target_C1 = -g_logp_C1 * torch.expm1(logp_C1) + g_lse_C1 * logp_C1.exp()
    if plogp_CV is not None:
        row_C1 = row_C1 - g_entropy_C1 * (entropy_C1 + gap_C1)
        surprise_C1 = entropy_C1 + logp_C1.clamp_min(torch.finfo(logp_C1.dtype).min)
        target_C1 = target_C1 - g_entropy_C1 * logp_C1.exp() * surprise_C1
        # log p_v = log e_v + (peak - lse): its constant part is in row_C1, -e log e is here.
        plogp_CV.mul_(g_entropy_C1 * scale_C1)
    exp_CV.mul_(row_C1 * scale_C1)
    if plogp_CV is not None:
        exp_CV.add_(plogp_CV)
    _put_(exp_CV, targets_C1, target_C1, own_C1)
    if mean_C1 is not None:
        exp_CV.add_(mean_C1 / exp_CV.shape[1])
    if slope_CV is not None:
        exp_CV.mul_(slope_CV)

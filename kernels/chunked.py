"""The language-model head in chunks of rows, in plain torch: one pass and no (T, V) tensor.

T tokens, K rows that take part, C rows of one chunk, D hidden, V vocabulary. With upstream
gradients (a, b, c) of (logp, lse, entropy H) of a row, its logit gradient is

    dz_v = p_v (b - a - c (log p_v + H))                 v other than the target
    dz_t = a (1 - p_t) + p_t (b - c (log p_t + H))       the target; 1 - p_t = -expm1(log p_t)

and dX = logit_scale da W, dW = logit_scale da' X, db = sum da with da = dz (1 - tanh^2) /
temperature. When a is known before the forward (the weighted loss: a = coefficient, b = c = 0) this
happens right after the logits are made: three GEMMs (6 K V D FLOP) instead of four.

Chunks have equal size and share one (C, V) buffer, rewritten in place:

    logits -> exp(z - peak), 0 at the target -> dz -> in half precision, a copy for the two GEMMs

with one more (C, V) buffer for a softcap (its slope) and one for an entropy (-e log e). They are
allocated once: new ones for every chunk cost a CPU a page fault every 4 KiB, 15 % of the logits
GEMM. C is the largest number of rows whose buffers fit in `chunk_bytes`; nothing else grows with V
except dW (fp32). A CPU has no half-precision GEMM with fp32 out: it upcasts the weight 2 MiB at a
time and rounds dz in place.

| | inputs | GEMM operands | accumulators, statistics | outputs |
|---|---|---|---|---|
| bf16 | bf16 | bf16; dz rounded once | fp32 | fp32 values and dW, bf16 dX |
| fp16 | fp16 | fp16; dz in units of its bound / 2^14 | fp32 | fp32 values, dW and dX |
| fp32, fp64 | the same | the same | the same | the same |
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

HALF = (torch.float16, torch.bfloat16)


def default_chunk_bytes(device: torch.device, row_bytes: int = 0) -> int:
    """Memory for the (C, V) buffers: on CUDA up to 4 GiB and 1/16 of the memory, on a CPU 48 MiB.

    Every chunk reads the weight twice and dW once: a CPU's GEMMs lose 3 % of their rate at 128 rows
    and 13 % at 82 (V = 152064, one core). So there are 256 rows of `row_bytes` even where they need
    more than 48 MiB.
    """
    if device.type != "cuda":
        return max(48 << 20, 256 * row_bytes)
    return min(4 << 30, torch.cuda.get_device_properties(device).total_memory // 16)


def head_pass(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_K: Tensor,
    *,
    rows_K: Tensor,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    upstream: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
    dhidden_TD: Tensor | None = None,
    dweight_VD: Tensor | None = None,
    dbias_V: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pass over the rows `rows_K` of hidden_TD: logp_K, lse_K, entropy_K (or None).

    Every backend has this signature. targets_K, temperature (a float or (K,)) and the upstream
    gradients of (logp, lse, entropy), each (K,), belong to the selected rows. With `upstream` the
    gradients are made in the same pass: rows of dhidden_TD are overwritten, dweight_VD and dbias_V
    (float32, float64 for float64 inputs) are added to; a sink that is None costs nothing. Values
    are float32, float64 for float64 inputs. No host synchronisation; validates nothing: the public
    functions in vpgea_fast.losses do.
    """
    dtype, device = hidden_TD.dtype, hidden_TD.device
    accumulator = torch.promote_types(dtype, torch.float32)
    vocabulary, rows = weight_VD.shape[0], targets_K.shape[0]
    g_logp, g_lse, g_entropy = upstream if upstream is not None else (None, None, None)
    needs_entropy = entropy or g_entropy is not None
    if rows == 0:
        none_K = torch.empty(0, dtype=accumulator, device=device)
        return none_K, none_K, none_K if entropy else None

    # Only CUDA has half-precision GEMMs with fp32 out; elsewhere the operands are upcast.
    operand = dtype if device.type == "cuda" else accumulator
    buffers = 1 + (softcap is not None) + needs_entropy
    row_bytes = vocabulary * (accumulator.itemsize * buffers + dtype.itemsize * (dtype in HALF))
    budget = default_chunk_bytes(device, row_bytes) if chunk_bytes is None else chunk_bytes
    chunks = math.ceil(rows / max(1, budget // row_bytes))
    step = math.ceil(rows / chunks)
    buffers_BCV = torch.empty(buffers, step, vocabulary, dtype=accumulator, device=device)
    temperature_K1 = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    upstream_K3 = None
    if g_logp is not None:
        zero_K = torch.zeros_like(g_logp, dtype=accumulator)
        parts = (zero_K if g is None else g.to(accumulator) for g in (g_logp, g_lse, g_entropy))
        upstream_K3 = torch.stack(list(parts), dim=1) / temperature_K1
    unit = _storage_unit(upstream_K3, vocabulary) if dtype is torch.float16 else 1.0
    sink_VD = dweight_VD
    if dweight_VD is not None and isinstance(unit, Tensor):
        # In units until the last chunk, so it cannot be added to the caller's sum on the way.
        sink_VD = torch.zeros_like(dweight_VD)

    def run(chunk: slice) -> Tensor:
        hidden_CD = hidden_TD.index_select(0, rows_K[chunk]).to(operand)
        targets_C1 = targets_K[chunk].unsqueeze(1)
        divisor = temperature_K1[chunk] if isinstance(temperature_K1, Tensor) else temperature_K1
        z_CV, *spare = buffers_BCV[:, : hidden_CD.shape[0]].unbind()
        plogp_CV = spare.pop() if needs_entropy else None
        slope_CV = spare.pop() if softcap is not None else None
        for columns, weight_BD in _weight_blocks(weight_VD, operand):
            matmul(hidden_CD, weight_BD.T, accumulator, out=z_CV[:, columns])
        _logits_(z_CV, slope_CV, bias_V, divisor, softcap, logit_scale)
        z_target_C1, peak_C1 = _exponentials_(z_CV, targets_C1)
        if plogp_CV is not None:
            torch.special.entr(z_CV, out=plogp_CV)
        values_C3 = _statistics(z_CV, plogp_CV, z_target_C1, peak_C1)
        if upstream_K3 is None:
            return values_C3
        _dlogits_(z_CV, plogp_CV, slope_CV, targets_C1, peak_C1, values_C3, upstream_K3[chunk])
        if dbias_V is not None:
            dbias_V.add_(z_CV.sum(0))
        dz_CV = (z_CV.div_(unit) if isinstance(unit, Tensor) else z_CV).to(dtype)
        if operand != dtype:
            dz_CV = z_CV.copy_(dz_CV)
        if dhidden_TD is not None:
            dhidden_CD = torch.zeros_like(hidden_CD, dtype=accumulator)
            for columns, weight_BD in _weight_blocks(weight_VD, operand):
                add_matmul_(dhidden_CD, dz_CV[:, columns], weight_BD, logit_scale)
            dhidden_CD.mul_(unit)
            dhidden_TD.index_copy_(0, rows_K[chunk], dhidden_CD.to(dhidden_TD.dtype))
        if sink_VD is not None:
            add_matmul_(sink_VD, dz_CV.T, hidden_CD, logit_scale)
        return values_C3

    values_K3 = torch.cat([run(slice(start, start + step)) for start in range(0, rows, step)])
    if dweight_VD is not None and sink_VD is not None and isinstance(unit, Tensor):
        dweight_VD.add_(sink_VD.mul_(unit))
    logp_K, lse_K, entropy_K = values_K3.unbind(1)
    return logp_K, lse_K, entropy_K if entropy else None


def _storage_unit(upstream_K3: Tensor | None, vocabulary: int) -> Tensor | float:
    """fp16 ends at 6e-8, where coefficients begin: its dz is kept in units of bound / 2^14.

    |dz_v| <= |a| + |b| + |c| (log V + 1), since |p log p| < 1 and H <= log V.
    """
    if upstream_K3 is None:
        return 1.0
    g_logp_K, g_lse_K, g_entropy_K = upstream_K3.abs().unbind(1)
    bound_K = g_logp_K + g_lse_K + (math.log(vocabulary) + 1.0) * g_entropy_K
    return bound_K.amax().clamp_min(torch.finfo(bound_K.dtype).tiny) / 2.0**14


def _weight_blocks(weight_VD: Tensor, operand: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns of z, their rows of the weight in the operands' dtype): all at once, or upcast 2 MiB
    at a time, which stay in the cache: the time of a whole float32 copy, without its memory.
    """
    if weight_VD.dtype == operand:
        yield slice(None), weight_VD
        return
    vocabulary, hidden = weight_VD.shape
    block = max(1, (2 << 20) // max(1, hidden * operand.itemsize))
    for start in range(0, vocabulary, block):
        columns = slice(start, start + block)
        yield columns, weight_VD[columns].to(operand)


def matmul(
    left: Tensor, right: Tensor, accumulator: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """left @ right in the accumulator's dtype: only CUDA has a half GEMM with fp32 out."""
    if left.dtype != accumulator and left.is_cuda:
        return torch.mm(left, right, out_dtype=accumulator, out=out)
    return torch.mm(left.to(accumulator), right.to(accumulator), out=out)


def add_matmul_(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """total += alpha left @ right, without a temporary of total's size where the device allows."""
    if left.dtype != total.dtype and left.is_cuda:
        torch.addmm(total, left, right, alpha=alpha, out_dtype=total.dtype, out=total)
        return
    total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=alpha)


def _logits_(
    a_CV: Tensor,
    slope_CV: Tensor | None,
    bias_V: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Rewrites the products a_CV as z_CV; a softcap's slope 1 - tanh^2 goes to slope_CV."""
    if logit_scale != 1.0:
        a_CV.mul_(logit_scale)
    if bias_V is not None:
        a_CV.add_(bias_V)
    if softcap is not None:
        assert slope_CV is not None
        torch.tanh(a_CV.div_(softcap), out=slope_CV)
        torch.mul(slope_CV, softcap / temperature, out=a_CV)
        slope_CV.square_().neg_().add_(1.0)
    elif isinstance(temperature, Tensor) or temperature != 1.0:
        a_CV.div_(temperature)


def _exponentials_(z_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrites z as exp(z - peak), 0 at the target; gives z_target and the others' peak, (C, 1).

    The clamp keeps rows whose other logits are all -inf free of inf - inf.
    """
    z_target_C1 = z_CV.gather(1, targets_C1)
    z_CV.scatter_(1, targets_C1, -torch.inf)
    peak_C1 = z_CV.amax(1, keepdim=True).clamp_min(torch.finfo(z_CV.dtype).min)
    z_CV.sub_(peak_C1).exp_()
    return z_target_C1, peak_C1


def _statistics(
    exp_CV: Tensor, plogp_CV: Tensor | None, z_target_C1: Tensor, peak_C1: Tensor
) -> Tensor:
    """(C, 3): logp, lse, entropy (0 without plogp).

    logp = log sigmoid(z_target - lse of the others) is never above 0 and keeps the digits of 1 - p;
    no term of the entropy is negative, so nothing cancels.
    """
    others_C1 = exp_CV.sum(1, keepdim=True)
    lse_others_C1 = peak_C1 + others_C1.log()
    logp_C1 = F.logsigmoid(z_target_C1 - lse_others_C1)
    lse_C1 = torch.logaddexp(z_target_C1, lse_others_C1)
    entropy_C1 = torch.zeros_like(logp_C1)
    if plogp_CV is not None:
        scale_C1 = (peak_C1 - lse_C1).exp()
        entropy_C1 = scale_C1 * ((lse_C1 - peak_C1) * others_C1 + plogp_CV.sum(1, keepdim=True))
        entropy_C1 -= logp_C1.exp() * logp_C1.clamp_min(torch.finfo(logp_C1.dtype).min)
    return torch.cat((logp_C1, lse_C1, entropy_C1), dim=1)


def _dlogits_(
    exp_CV: Tensor,
    plogp_CV: Tensor | None,
    slope_CV: Tensor | None,
    targets_C1: Tensor,
    peak_C1: Tensor,
    values_C3: Tensor,
    upstream_C3: Tensor,
) -> None:
    """Rewrites exp(z - peak) as d loss / d a; upstream_C3 is already divided by the temperature."""
    logp_C1, lse_C1, entropy_C1 = values_C3.split(1, dim=1)
    g_logp_C1, g_lse_C1, g_entropy_C1 = upstream_C3.split(1, dim=1)
    scale_C1 = (peak_C1 - lse_C1).exp()
    row_C1 = g_lse_C1 - g_logp_C1
    target_C1 = -g_logp_C1 * torch.expm1(logp_C1) + g_lse_C1 * logp_C1.exp()
    if plogp_CV is not None:
        row_C1 = row_C1 - g_entropy_C1 * (entropy_C1 + peak_C1 - lse_C1)
        surprise_C1 = entropy_C1 + logp_C1.clamp_min(torch.finfo(logp_C1.dtype).min)
        target_C1 = target_C1 - g_entropy_C1 * logp_C1.exp() * surprise_C1
        plogp_CV.mul_(g_entropy_C1 * scale_C1)
    exp_CV.mul_(row_C1 * scale_C1)
    if plogp_CV is not None:
        exp_CV.add_(plogp_CV)
    exp_CV.scatter_(1, targets_C1, target_C1)
    if slope_CV is not None:
        exp_CV.mul_(slope_CV)

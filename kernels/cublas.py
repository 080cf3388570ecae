"""The language-model head with cuBLAS for all GEMMs and two Triton passes over a chunk's logits.

K rows that take part, C rows of one chunk, D hidden, V vocabulary; z2 = z / log 2. Upstream
gradients (a, b, c) of (logp, lse, entropy H) of a row, as in chunked.py:

    1  torch.mm        h . w, (C, V) float32 out of half-precision operands     one GEMM
    2  row_statistics  z2_t, and over v != t: the peak, S = sum 2^(z2_v - peak)  reads (C, V)
    3  row_gradient    dz_v = p_v (b - a - c (log p_v + H))                      rewrites (C, V)
                       dz_t = a (1 - p_t) + p_t (b - c (log p_t + H))
    4  two GEMMs       dX = logit_scale da W; dW += logit_scale da' X, da = dz slope / temperature

S never holds the target, so logp = log sigmoid(z_t - lse of the others) is never above 0 and
1 - p_t = S / (S + 2^(z2_t - peak)) keeps its digits. Every row is one program: each of its lanes
keeps a running peak and a sum relative to it, with one exponential a logit (either the old sum or
the new term is scaled), and the lanes are joined at the end. No atomics, one order of every sum.

The logits buffer is the only (C, V) tensor: da in half precision takes the first half of its own
row of float32 logits, behind the program's reading position. No rows are out of range: float32
logits hold any logp.

`logits_dtype=torch.bfloat16` halves the buffer and its traffic by letting cuBLAS round the logits;
then the log-probabilities are off by up to 0.1 (half a unit of a logit of 25 is 0.06). It is for
the benchmark, which shows what that buys; no public function passes it.

| | inputs | GEMM operands | accumulators, statistics | outputs |
|---|---|---|---|---|
| bf16 | bf16 | bf16; da rounded once | fp32 | fp32 values and dW, bf16 dX |
| fp16 | fp16 | fp16; da in units of its bound / 2^14 | fp32 | fp32 values, dW and dX |
| fp32 | fp32 | fp32, TF32 as torch is set | fp32 | fp32 |

Reruns, and scoring and training, agree bitwise. Another chunk size may not: cuBLAS picks its
kernel by the number of rows. That is what linear_logprob.py is for.
"""

# Device code is Python to pyright, but Triton's types are its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import math

import torch
import triton
import triton.language as tl

from vpgea_fast.kernels._tiling import (
    INTERPRETED,
    LOWEST,
    TRITON_DTYPE,
    as_float32,
    equal_slices,
    launch,
    log_sums2,
    logit_of,
    rounded_to,
)
from vpgea_fast.kernels.chunked import (
    HALF,
    _storage_unit,
    add_matmul_,
    default_chunk_bytes,
    matmul,
)
from vpgea_fast.kernels.linear_logprob import (
    CHUNK_ROWS,
    Head,
    Rows,
    bias_sum,
    new_rows,
    values,
)

Tensor = torch.Tensor

ROWS, BLOCK = (32, 512) if INTERPRETED else (1, 4096)
"""Rows of a program and logits of a row that it holds at once: 16 a thread, four wide loads. The
interpreter pays for every program and every operation, whatever its size."""
WARPS = 8

_LN2 = tl.constexpr(math.log(2.0))
_NOTHING2 = tl.constexpr(-200.0)
"""2^-200 is 0 in float32: a bound for an exponent x that leaves 2^x x as it is and finite."""


@triton.jit
def _load_logits(
    address,
    mask,
    bias_ptr,
    offs_c,
    mask_c,
    gain,
    logit_scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """z2 at the addresses, columns offs_c, and the softcap's slope there."""
    product = as_float32(tl.load(address, mask=mask, other=0.0))
    bias = 0.0
    if BIAS:
        bias = as_float32(tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0))
    logit, slope = logit_of(product, bias, logit_scale, softcap, BIAS, SOFTCAP)
    return logit * gain, slope


@triton.jit
def row_statistics(
    logits_ptr,
    target_ptr,
    gain_ptr,
    bias_ptr,
    target2_ptr,
    total_ptr,
    shift2_ptr,
    moment_ptr,
    rows,
    vocabulary,
    logits_stride,
    logit_scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z2 of the target; over the others shift2 = peak, total = sum 2^(z2 - shift2) and
    moment = sum 2^(z2 - shift2) (z2 - shift2)."""
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < rows
    logits_r = logits_ptr + offs_r.to(tl.int64) * logits_stride
    target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    gain = tl.load(gain_ptr + offs_r, mask=mask_r, other=1.0)
    peak = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    moment = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, vocabulary, BLOCK):
        offs_c = start + tl.arange(0, BLOCK)[None, :]
        mask_c = offs_c < vocabulary
        mask = mask_r[:, None] & mask_c
        z2, _ = _load_logits(
            logits_r[:, None] + offs_c,
            mask,
            bias_ptr,
            offs_c,
            mask_c,
            gain[:, None],
            logit_scale,
            softcap,
            BIAS,
            SOFTCAP,
        )
        z2 = tl.where(mask & (offs_c != target[:, None]), z2, -float("inf"))
        gap = z2 - peak
        e = tl.exp2(-tl.abs(gap))
        rises = gap > 0
        if ENTROPY:
            gap = tl.maximum(gap, _NOTHING2)
            moment = tl.where(rises, e * (moment - total * gap), moment + e * gap)
        total = tl.where(rises, total * e + 1.0, total + e)
        peak = tl.maximum(peak, z2)
    shift2 = tl.max(peak, 1)
    lift = peak - shift2[:, None]
    tl.store(total_ptr + offs_r, tl.sum(total * tl.exp2(lift), 1), mask=mask_r)
    tl.store(shift2_ptr + offs_r, shift2, mask=mask_r)
    if ENTROPY:
        moment = (moment + total * lift) * tl.exp2(lift)
        tl.store(moment_ptr + offs_r, tl.sum(moment, 1), mask=mask_r)
    target2, _ = _load_logits(
        logits_r + target,
        mask_r,
        bias_ptr,
        target,
        mask_r,
        gain,
        logit_scale,
        softcap,
        BIAS,
        SOFTCAP,
    )
    tl.store(target2_ptr + offs_r, target2, mask=mask_r)


@triton.jit
def row_gradient(
    logits_ptr,
    dlogits_ptr,
    target_ptr,
    gain_ptr,
    bias_ptr,
    target2_ptr,
    total_ptr,
    shift2_ptr,
    moment_ptr,
    upstream_ptr,
    rows,
    vocabulary,
    logits_stride,
    dlogits_stride,
    logit_scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    NARROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """da of a row over its logits; upstream (rows, 3) is already divided by the temperature.

    NARROWS: da takes half a logit's bytes. Columns [i, i + BLOCK) are written to where columns
    [i / 2, (i + BLOCK) / 2) were, which have been read, by other threads too: hence the barrier.
    """
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < rows
    logits_r = logits_ptr + offs_r.to(tl.int64) * logits_stride
    dlogits_r = dlogits_ptr + offs_r.to(tl.int64) * dlogits_stride
    target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    gain = tl.load(gain_ptr + offs_r, mask=mask_r, other=1.0)
    target2 = tl.load(target2_ptr + offs_r, mask=mask_r, other=0.0)
    shift2 = tl.load(shift2_ptr + offs_r, mask=mask_r, other=0.0)
    total = tl.load(total_ptr + offs_r, mask=mask_r, other=0.0)
    g_logp = tl.load(upstream_ptr + offs_r * 3, mask=mask_r, other=0.0)
    g_lse = tl.load(upstream_ptr + offs_r * 3 + 1, mask=mask_r, other=0.0)
    others2, lse2 = log_sums2(target2, shift2, total)
    p_target = tl.exp2(target2 - lse2)
    factor = g_lse - g_logp
    dz_target = g_logp * tl.exp2(others2 - lse2) + g_lse * p_target
    if ENTROPY:
        g_entropy = tl.load(upstream_ptr + offs_r * 3 + 2, mask=mask_r, other=0.0)
        moment = tl.load(moment_ptr + offs_r, mask=mask_r, other=0.0)
        logp = tl.maximum(target2 - lse2, _NOTHING2) * _LN2
        others = ((lse2 - shift2) * total - moment) * _LN2
        entropy = tl.exp2(shift2 - lse2) * others - p_target * logp
        dz_target -= g_entropy * p_target * (logp + entropy)
        factor -= g_entropy * entropy
        g_entropy = g_entropy[:, None] * _LN2
    for start in tl.range(0, vocabulary, BLOCK):
        offs_c = start + tl.arange(0, BLOCK)[None, :]
        mask_c = offs_c < vocabulary
        mask = mask_r[:, None] & mask_c
        z2, slope = _load_logits(
            logits_r[:, None] + offs_c,
            mask,
            bias_ptr,
            offs_c,
            mask_c,
            gain[:, None],
            logit_scale,
            softcap,
            BIAS,
            SOFTCAP,
        )
        log2_p = z2 - lse2[:, None]
        p = tl.exp2(log2_p)
        dz = p * factor[:, None]
        if ENTROPY:
            dz -= p * tl.maximum(log2_p, _NOTHING2) * g_entropy
        dz = tl.where(offs_c == target[:, None], dz_target[:, None], dz)
        if SOFTCAP:
            dz *= slope
        if NARROWS:
            tl.debug_barrier()
        tl.store(dlogits_r[:, None] + offs_c, rounded_to(dz, DTYPE), mask=mask)


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
    logits_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The backend contract of `chunked.head_pass`: logp_K, lse_K, entropy_K (or None), float32.

    chunk_bytes bounds the logits of a chunk, at least one row. No host synchronisation.

    Not for float64 inputs or other devices than CUDA (the interpreter takes any): backends.py
    refuses these.
    """
    dtype = hidden_TD.dtype
    g_logp, g_lse, g_entropy = upstream if upstream is not None else (None, None, None)
    head = Head.of(weight_VD, bias_V, softcap, logit_scale, entropy or g_entropy is not None)
    rows = new_rows(targets_K, temperature, head)
    upstream_K3 = None
    if g_logp is not None:
        zero_K = torch.zeros_like(g_logp, dtype=torch.float32)
        parts = [zero_K if g is None else g.float() for g in (g_logp, g_lse, g_entropy)]
        upstream_K3 = torch.stack([part / temperature for part in parts], dim=1)
    unit = _storage_unit(upstream_K3, weight_VD.shape[0]) if dtype is torch.float16 else 1.0
    sink_VD = dweight_VD
    if dweight_VD is not None and isinstance(unit, Tensor):
        # In units until the last chunk, so it cannot be added to the caller's sum on the way.
        sink_VD = torch.zeros_like(dweight_VD)

    def run(chunk: slice) -> None:
        """One chunk; a function, so that its logits are free before the next one's."""
        hidden_CD = hidden_TD.index_select(0, rows_K[chunk])
        logits_CV = _products(hidden_CD, head.weight_VD, logits_dtype)
        _launch_statistics(logits_CV, rows[chunk], head)
        if upstream_K3 is None:
            return
        has_entropy = g_entropy is not None
        da_CV = _launch_gradient(
            logits_CV, rows[chunk], upstream_K3[chunk] / unit, head, dtype, entropy=has_entropy
        )
        if dbias_V is not None:
            dbias_V.add_(bias_sum(da_CV, torch.ones_like(rows.gain[chunk])).mul_(unit))
        if sink_VD is not None:
            add_matmul_(sink_VD, da_CV.T, hidden_CD, logit_scale)
        del hidden_CD
        if dhidden_TD is not None:
            dhidden_CD = matmul(da_CV, head.weight_VD, torch.float32).mul_(logit_scale * unit)
            dhidden_TD.index_copy_(0, rows_K[chunk], dhidden_CD.to(dhidden_TD.dtype))

    with torch.cuda.device_of(hidden_TD):
        for chunk in _chunks(targets_K.shape[0], head, logits_dtype, chunk_bytes):
            run(chunk)
    if dweight_VD is not None and sink_VD is not None and isinstance(unit, Tensor):
        dweight_VD.add_(sink_VD.mul_(unit))
    logp_K, lse_K, entropy_K = values(rows, head)
    return logp_K, lse_K, entropy_K if entropy else None


def _chunks(
    rows: int, head: Head, logits_dtype: torch.dtype, chunk_bytes: int | None
) -> list[slice]:
    """Chunks of equal size, whether or not there are gradients, so that their values agree.

    float32 logits are twice an E of linear_logprob.py: twice its default for the same rows.
    """
    if chunk_bytes is None:
        chunk_bytes = 2 * default_chunk_bytes(head.weight_VD.device)
    most = min(CHUNK_ROWS, chunk_bytes // (head.weight_VD.shape[0] * logits_dtype.itemsize))
    return equal_slices(rows, max(1, most), 128 if most >= 128 else 1)


def _products(hidden_CD: Tensor, weight_VD: Tensor, logits_dtype: torch.dtype) -> Tensor:
    if logits_dtype == hidden_CD.dtype:
        return hidden_CD @ weight_VD.T
    return matmul(hidden_CD, weight_VD.T, logits_dtype)


def _launch_statistics(
    logits_CV: Tensor, rows: Rows, head: Head, *, block: int = BLOCK, warps: int = WARPS
) -> None:
    launch(
        row_statistics,
        triton.cdiv(logits_CV.shape[0], ROWS),
        logits_CV,
        rows.targets,
        rows.gain,
        head.bias_V,
        rows.target2,
        rows.total,
        rows.shift2,
        rows.moment,
        *logits_CV.shape,
        logits_CV.stride(0),
        head.logit_scale,
        head.softcap or 1.0,
        BIAS=head.bias_V is not None,
        SOFTCAP=head.softcap is not None,
        ENTROPY=head.entropy,
        ROWS=ROWS,
        BLOCK=block,
        num_warps=warps,
    )


def _launch_gradient(
    logits_CV: Tensor,
    rows: Rows,
    upstream_C3: Tensor,
    head: Head,
    dtype: torch.dtype,
    *,
    entropy: bool,
    block: int = BLOCK,
    warps: int = WARPS,
) -> Tensor:
    """da (C, V) in `dtype`, over the logits: with float32 logits half of each row is left over."""
    da_CV = logits_CV.view(dtype)[:, : logits_CV.shape[1]]
    launch(
        row_gradient,
        triton.cdiv(logits_CV.shape[0], ROWS),
        logits_CV,
        da_CV,
        rows.targets,
        rows.gain,
        head.bias_V,
        rows.target2,
        rows.total,
        rows.shift2,
        rows.moment,
        upstream_C3,
        *logits_CV.shape,
        logits_CV.stride(0),
        da_CV.stride(0),
        head.logit_scale,
        head.softcap or 1.0,
        BIAS=head.bias_V is not None,
        SOFTCAP=head.softcap is not None,
        ENTROPY=entropy,
        NARROWS=logits_CV.dtype is torch.float32 and dtype in HALF,
        DTYPE=TRITON_DTYPE[dtype],
        ROWS=ROWS,
        BLOCK=block,
        num_warps=warps,
    )
    return da_CV

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
from dataclasses import replace
from typing import Any

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
    default_chunk_bytes,
    storage_unit,
    without_skipped_,
)
from vpgea_fast.kernels.contract import NO_SINKS, Head, Sinks, Upstream, Values
from vpgea_fast.kernels.linear_logprob import (
    CHUNK_ROWS,
    Plan,
    RowStats,
    bias_sum,
    bound_of,
    new_stats,
    values,
)
from vpgea_fast.kernels.products import HALF, add_matmul_, matmul, settle_weight, weight_sink

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
    address,  # (rows, columns) pointers to products h . w, or (rows,) to one of each row
    mask,
    bias_ptr,  # (V,)
    offs_c,  # the columns at these addresses
    mask_c,
    gain,
    shape,  # LogitShape: scale, and cap or None
    BIAS: tl.constexpr,
):
    """z2 at the addresses, columns offs_c, and the slope of `logit_of` there."""
    product = as_float32(tl.load(address, mask=mask, other=0.0))
    bias = 0.0
    if BIAS:
        bias = as_float32(tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0))
    logit, slope = logit_of(product, bias=bias, shape=shape, BIAS=BIAS)
    return logit * gain, slope


@triton.jit
def row_statistics(
    logits_ptr,  # (n_rows, vocabulary): products h . w
    target_ptr,  # (n_rows,) int32
    gain_ptr,  # (n_rows,) fp32: z2 = gain x the logit before the temperature
    bias_ptr,  # (vocabulary,)
    target2_ptr,  # out, (n_rows,) fp32: z2 of the target
    total_ptr,  # out, (n_rows,) fp32: sum of exp2(z2 - shift2) over the other classes
    shift2_ptr,  # out, (n_rows,) fp32: their peak
    moment_ptr,  # out with ENTROPY, (n_rows,) fp32: sum of exp2(z2 - shift2) (z2 - shift2)
    n_rows,
    vocabulary,
    logits_stride,
    shape,  # LogitShape: scale, and cap or None
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z2 of the target; over the others shift2 = peak, total = sum 2^(z2 - shift2) and
    moment = sum 2^(z2 - shift2) (z2 - shift2)."""
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < n_rows
    logits_r = logits_ptr + offs_r.to(tl.int64) * logits_stride
    target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    gain = tl.load(gain_ptr + offs_r, mask=mask_r, other=1.0)
    # A peak and a sum for each lane, joined once at the end: nothing crosses lanes in the loop.
    peak = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    moment = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, vocabulary, BLOCK):
        offs_c = start + tl.arange(0, BLOCK)[None, :]
        mask_c = offs_c < vocabulary
        mask = mask_r[:, None] & mask_c
        z2, _ = _load_logits(
            logits_r[:, None] + offs_c,
            mask=mask,
            bias_ptr=bias_ptr,
            offs_c=offs_c,
            mask_c=mask_c,
            gain=gain[:, None],
            shape=shape,
            BIAS=BIAS,
        )
        z2 = tl.where(mask & (offs_c != target[:, None]), z2, -float("inf"))
        # One exponential: it scales the old sum where the peak rises, else it is the new term.
        gap = z2 - peak
        e = tl.exp2(-tl.abs(gap))
        rises = gap > 0
        if ENTROPY:
            # -inf where the class is masked: 0 x -inf is NaN, 2^-200 x -200 is 0.
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
        mask=mask_r,
        bias_ptr=bias_ptr,
        offs_c=target,
        mask_c=mask_r,
        gain=gain,
        shape=shape,
        BIAS=BIAS,
    )
    tl.store(target2_ptr + offs_r, target2, mask=mask_r)


@triton.jit
def row_gradient(
    logits_ptr,  # (n_rows, vocabulary): products h . w
    dlogits_ptr,  # out, (n_rows, vocabulary): da, in the same memory
    target_ptr,  # (n_rows,) int32
    gain_ptr,  # (n_rows,) fp32: z2 = gain x the logit before the temperature
    bias_ptr,  # (vocabulary,)
    target2_ptr,  # (n_rows,) fp32, of row_statistics, as the next three
    total_ptr,  # (n_rows,) fp32
    shift2_ptr,  # (n_rows,) fp32
    moment_ptr,  # (n_rows,) fp32, read with ENTROPY
    upstream_ptr,  # (n_rows, 3) fp32: of logp, lse, entropy; already divided by the temperature
    n_rows,
    vocabulary,
    logits_stride,
    dlogits_stride,
    shape,  # LogitShape: scale, and cap or None
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    NARROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """da of a row over its logits.

    NARROWS: da takes half a logit's bytes. Columns [i, i + BLOCK) are written to where columns
    [i / 2, (i + BLOCK) / 2) were, which have been read, by other threads too: hence the barrier.
    """
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < n_rows
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
    # 1 - p as the share of the others: no digit lost where p is close to 1.
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
            mask=mask,
            bias_ptr=bias_ptr,
            offs_c=offs_c,
            mask_c=mask_c,
            gain=gain[:, None],
            shape=shape,
            BIAS=BIAS,
        )
        log2_p = z2 - lse2[:, None]
        p = tl.exp2(log2_p)
        dz = p * factor[:, None]
        if ENTROPY:
            dz -= p * tl.maximum(log2_p, _NOTHING2) * g_entropy
        # p here is rounded like any other class; the target's own entry was made above.
        dz = tl.where(offs_c == target[:, None], dz_target[:, None], dz)
        if shape.cap is not None:
            dz *= slope
        if NARROWS:
            tl.debug_barrier()
        tl.store(dlogits_r[:, None] + offs_c, rounded_to(dz, DTYPE), mask=mask)


def head_pass(
    hidden_TD: Tensor,
    head: Head,
    targets_K: Tensor,
    *,
    rows_K: Tensor,
    entropy: bool = False,
    statistics: bool = False,
    upstream: Upstream | None = None,
    sinks: Sinks = NO_SINKS,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
) -> Values:
    """Meets the contract of `chunked.head_pass`: logp_K, lse_K, entropy_K (or None), float32.

    chunk_bytes bounds the logits of a chunk, at least one row. No host synchronisation.
    logits_dtype: for the benchmark alone, see above.

    Not for statistics, float64 inputs or other devices than CUDA (the interpreter takes any):
    backends.py refuses these.
    """
    del statistics
    dtype = hidden_TD.dtype
    entropy_gradient = upstream is not None and upstream.entropy is not None
    plan = Plan.of(head, entropy=entropy or entropy_gradient)
    stats_K = new_stats(targets_K, head)
    upstream_K3 = None if upstream is None else upstream.by_logits(head.temperature, torch.float32)
    unit = storage_unit(upstream_K3, head.weight.shape[0]) if dtype is torch.float16 else 1.0
    sink_VD = weight_sink(sinks.weight, unit)
    skipped: list[Tensor] = []

    def run(chunk: slice) -> None:
        """Runs one chunk; a function, so that its logits are free before the next one's."""
        hidden_CD, stats_C = hidden_TD.index_select(0, rows_K[chunk]), stats_K[chunk]
        logits_CV = _products(hidden_CD, plan.head.weight, logits_dtype)
        _launch_statistics(logits_CV, stats_C, plan)
        if upstream_K3 is None or upstream is None:
            return
        rows_C, upstream_C3 = rows_K[chunk], upstream_K3[chunk] / unit
        bound_C = bound_of(upstream, stats_C, head, chunk)
        if bound_C is not None:
            skipped.append(bound_C)
            logits_CV, stats_C, hidden_CD, rows_C, upstream_C3 = without_skipped_(
                bound_C, logits_CV, stats_C, hidden_CD, rows_C, upstream_C3
            )
        # Not compiled in where only the entropy's values are wanted.
        da_CV = _launch_gradient(
            logits_CV,
            stats_C,
            replace(plan, entropy=entropy_gradient),
            upstream_C3=upstream_C3,
        )
        if sinks.bias is not None:
            sinks.bias.add_(bias_sum(da_CV, torch.ones_like(stats_C.gain)).mul_(unit))
        if sink_VD is not None:
            add_matmul_(sink_VD, da_CV.T, hidden_CD, head.logit_scale)
        del hidden_CD
        if sinks.hidden is not None:
            dhidden_CD = matmul(da_CV, plan.head.weight, torch.float32)
            dhidden_CD.mul_(head.logit_scale * unit)
            sinks.hidden.index_copy_(0, rows_C, dhidden_CD.to(sinks.hidden.dtype))

    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(hidden_TD):
        for chunk in _chunks(targets_K.shape[0], plan.head.weight, logits_dtype, chunk_bytes):
            run(chunk)
    settle_weight(sinks.weight, sink_VD, unit)
    # Made for its gradient alone, an entropy is no result.
    made = values(stats_K, entropy=plan.entropy)
    if skipped:
        made = made._replace(skipped=torch.cat(skipped))
    return made if entropy else made._replace(entropy=None)


def _chunks(
    n_rows: int, weight_VD: Tensor, logits_dtype: torch.dtype, chunk_bytes: int | None
) -> list[slice]:
    """Chunks of equal size, whether or not there are gradients, so that their values agree.

    float32 logits are twice an E of linear_logprob.py: twice its default for the same rows.
    """
    if chunk_bytes is None:
        chunk_bytes = 2 * default_chunk_bytes(weight_VD.device)
    most = min(CHUNK_ROWS, chunk_bytes // (weight_VD.shape[0] * logits_dtype.itemsize))
    return equal_slices(n_rows, max(1, most), 128 if most >= 128 else 1)


def _products(hidden_CD: Tensor, weight_VD: Tensor, logits_dtype: torch.dtype) -> Tensor:
    if logits_dtype == hidden_CD.dtype:
        return hidden_CD @ weight_VD.T
    return matmul(hidden_CD, weight_VD.T, logits_dtype)


def _launch_statistics(
    logits_CV: Tensor, stats: RowStats, plan: Plan, *, block: int = BLOCK, warps: int = WARPS
) -> None:
    """Fills target2, total, shift2 and moment of the rows."""
    _launch(row_statistics, logits_CV, stats, plan, BLOCK=block, num_warps=warps)


def _launch_gradient(
    logits_CV: Tensor,
    stats: RowStats,
    plan: Plan,
    *,
    upstream_C3: Tensor,
    block: int = BLOCK,
    warps: int = WARPS,
) -> Tensor:
    """Writes da (C, V) over the logits: with float32 logits half of each row is left over.

    plan.entropy: whether the entropy has a gradient. The dtype is the weight's.
    """
    dtype = plan.head.weight.dtype
    # The view has two halves for each float32: da is the first V of 2 V columns.
    da_CV = logits_CV.view(dtype)[:, : logits_CV.shape[1]]
    _launch(
        row_gradient,
        logits_CV,
        stats,
        plan,
        dlogits_ptr=da_CV,
        upstream_ptr=upstream_C3,
        dlogits_stride=da_CV.stride(0),
        NARROWS=logits_CV.dtype is torch.float32 and dtype in HALF,
        DTYPE=TRITON_DTYPE[dtype],
        BLOCK=block,
        num_warps=warps,
    )
    return da_CV


def _launch(kernel: Any, logits_CV: Tensor, stats: RowStats, plan: Plan, **own: Any) -> None:
    """Starts one of the two passes: a program per ROWS rows, and the arguments that both have."""
    n_rows, vocabulary = logits_CV.shape
    launch(
        kernel,
        triton.cdiv(n_rows, ROWS),
        # Products h . w as cuBLAS left them: each pass makes its own logits, neither stores them.
        logits_ptr=logits_CV,
        target_ptr=stats.targets,
        gain_ptr=stats.gain,
        bias_ptr=plan.head.bias,
        # What the first pass writes of a row, and the second reads.
        target2_ptr=stats.target2,
        total_ptr=stats.total,
        shift2_ptr=stats.shift2,
        moment_ptr=stats.moment,
        n_rows=n_rows,
        vocabulary=vocabulary,
        logits_stride=logits_CV.stride(0),
        shape=plan.head.shape,
        BIAS=plan.head.bias is not None,
        ENTROPY=plan.entropy,
        ROWS=ROWS,
        **own,
    )

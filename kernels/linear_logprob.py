"""The language-model head in Triton: exponentials relative to the target's logit, in one pass.

K rows that take part, C rows of one chunk, D hidden, V vocabulary, N halves of column tiles. With
the logits in units of log 2 (z2 = z / log 2) and per row a reference z2_ref, the target's z2:

    1  target_logit   z2_t = gain (h_t . w_target)                              K D products
    2  gemm_exp       E_v = 2^(z2_v - z2_ref), S = sum over v != target of E_v  one GEMM
    3  reduce_rows    logp = -log(1 + S), written log sigmoid(-log S)
    4  glue           E_target = -S; u = -a kappa / temperature; HS = u H       kappa = 1 / (1 + S)
    5  two GEMMs      dX = logit_scale u (E W); dW += logit_scale E' HS

because d logp / d z_v = -p_v = -kappa E_v off the target and 1 - p = kappa S at it. S never holds
the target, so 1 - p loses no digit however confident the token, logp is never above 0, and no
maximum is needed. E is the only (C, V) tensor, in the input's dtype; scoring does not store it. A
softcap multiplies what is stored by its slope 1 - tanh^2 and leaves S alone. The gradient b of lse
enters through b sum_v p_v = b 1[target] - b (1[target] - p_v): a becomes a - b and E_target gains
-b / (kappa (a - b)). The entropy comes out of the same epilogue and has no gradient here.

Range. S grows to e^-logp. A row with S > 2^46 (logp < -32) or NaN is flagged, and its row tile is
redone by three launches whose loop bounds are read on the device, so they cost a launch when
nothing is flagged: a pass with the maximum of every tile gives S relative to the true peak, then E
is written again with z2_ref = the row's own log-sum-exp, E_v = p_v. Rows of a redone tile that were
in range keep their reference and thus every bit. fp16 ends at 6e4 and takes that route for all
rows, with E_v = 2^14 p_v.

| | inputs | GEMM operands | accumulators, statistics | outputs |
|---|---|---|---|---|
| bf16 | bf16 | bf16; E and HS rounded once each | fp32 | fp32 values and dW, bf16 dX |
| fp16 | fp16 | fp16; E = 2^14 p, HS in units of max abs(a) | fp32 | fp32 values, dW and dX |
| fp32 | fp32 | fp32, no TF32 | fp32 | fp32 |

No atomics, one order of every sum, tiles that depend on device and dtype only: reruns, chunk sizes
and the presence of other rows change no bit of a row's logp; scoring and training give the same.
float64 inputs and a gradient of the entropy are for the backends `torch` and `reference`.
"""

# Device code is Python to pyright, but Triton's types are its own.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vpgea_fast.kernels._tiling import (
    LOWEST,
    TRITON_DTYPE,
    Tile,
    as_float32,
    capability_of,
    dot_transposed,
    equal_slices,
    launch,
    load_tile,
    log_sums2,
    logit_of,
    programs_of,
    rounded_to,
    store_tile,
    tile_for,
)
from vpgea_fast.kernels.chunked import add_matmul_, default_chunk_bytes, matmul

Tensor = torch.Tensor

LOG2E = 1.0 / math.log(2.0)
LN2 = math.log(2.0)
CHUNK_ROWS = 8448
"""Most rows of a training chunk: the dX GEMM fills its last wave on 132 multiprocessors."""
SCORE_ROWS = 16384
"""Most rows of a scoring chunk, which has no E: only the gathered rows and the sums per tile."""
LIST = 256
"""Most row tiles of a chunk: the flags of all of them are read at once."""
FP16_BITS = 14
"""fp16 stores 2^14 p: E_target reaches -2^14 (2^16 overflows) and p keeps 2^-38."""

_LARGEST_SUM = tl.constexpr(2.0**46)
_LIST = tl.constexpr(LIST)


# --- device code ------------------------------------------------------------------------------


@triton.jit
def _target_logit(
    hidden_ptr,
    weight_ptr,
    target_ptr,
    gain_ptr,
    bias_ptr,
    target2_ptr,
    slope_ptr,
    rows,
    width,
    hidden_stride,
    weight_stride,
    logit_scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z2 of every row's target, and with a softcap the slope there."""
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < rows
    target_r = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    hidden_r = hidden_ptr + offs_r.to(tl.int64)[:, None] * hidden_stride
    weight_r = weight_ptr + target_r.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)[None, :]
        mask = mask_r[:, None] & (offs_d < width)
        hidden = tl.load(hidden_r + offs_d, mask=mask, other=0.0)
        weight = tl.load(weight_r + offs_d, mask=mask, other=0.0)
        total += as_float32(hidden) * as_float32(weight)
    product = tl.sum(total, axis=1)
    bias = 0.0
    if BIAS:
        bias = as_float32(tl.load(bias_ptr + target_r, mask=mask_r, other=0.0))
    logit, slope = logit_of(product, bias, logit_scale, softcap, BIAS, SOFTCAP)
    if SOFTCAP:
        tl.store(slope_ptr + offs_r, slope, mask=mask_r)
    gain = tl.load(gain_ptr + offs_r, mask=mask_r, other=1.0)
    tl.store(target2_ptr + offs_r, logit * gain, mask=mask_r)


@triton.jit
def _halves(x):
    """The left and the right columns of x, without moving a register."""
    pairs = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def _epilogue(
    logit,
    exps,
    target_ptr,
    reference_ptr,
    gain_ptr,
    bias_ptr,
    sum_ptr,
    peak_ptr,
    moment_ptr,
    row,
    half_tile,
    rows,
    vocabulary,
    exps_stride,
    logit_scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    STORE: tl.constexpr,
    PEAK: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """E of the BLOCK_N columns of `half_tile`, and their row sums, from the products `logit`."""
    column = half_tile * BLOCK_N
    offs_r = row + tl.arange(0, BLOCK_M)
    offs_c = column + tl.arange(0, BLOCK_N)
    mask_r = offs_r < rows
    mask_c = offs_c < vocabulary
    target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    gain = tl.load(gain_ptr + offs_r, mask=mask_r, other=1.0)
    others = (offs_c[None, :] != target[:, None]) & mask_c[None, :]
    bias = 0.0
    if BIAS:
        bias = as_float32(tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0))[None, :]
    logit, slope = logit_of(logit, bias, logit_scale, softcap, BIAS, SOFTCAP)
    if PEAK:
        z2 = tl.where(others, logit * gain[:, None], LOWEST)
        reference = tl.maximum(tl.max(z2, axis=1), LOWEST)
    else:
        reference = tl.load(reference_ptr + offs_r, mask=mask_r, other=0.0)
    x = logit * gain[:, None] - reference[:, None]
    e = tl.exp2(x)
    counted = tl.where(others, e, 0.0)
    partial = half_tile.to(tl.int64) * rows + offs_r
    tl.store(sum_ptr + partial, tl.sum(counted, axis=1), mask=mask_r)
    if PEAK:
        tl.store(peak_ptr + partial, reference, mask=mask_r)
    if ENTROPY:
        moment = tl.sum(tl.where(counted > 0, counted * x, 0.0), axis=1)
        tl.store(moment_ptr + partial, moment, mask=mask_r)
    if STORE:
        # 0 at the target, which glue writes, and beyond V, which nobody reads.
        if SOFTCAP:
            counted *= slope
        stored = rounded_to(counted, DTYPE)
        store_tile(exps, stored, row, column, rows, vocabulary, exps_stride, BLOCK_M, BLOCK_N, TMA)


@triton.jit
def _gemm_exp(
    hidden,
    weight,
    exps,
    target_ptr,
    reference_ptr,
    gain_ptr,
    bias_ptr,
    flag_ptr,
    sum_ptr,
    peak_ptr,
    moment_ptr,
    rows,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    exps_stride,
    logit_scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    STORE: tl.constexpr,
    PEAK: tl.constexpr,
    FLAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """E of every (row tile, column tile) and its row sums over the columns that are not the target.

    Persistent: program i takes tiles i, i + programs, ... ; row tiles change fastest within groups
    of GROUP_M, so that a tile of the weight is read from L2. sum, peak and moment are (N, rows):
    S, with PEAK the reference of this tile's S, with ENTROPY the sum of E (z2 - z2_ref).
    FLAGGED: only the row tiles whose flag is 1.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(vocabulary, BLOCK_N)
    if FLAGGED:
        offs_l = tl.arange(0, _LIST)
        rank = tl.cumsum(tl.load(flag_ptr + offs_l, mask=offs_l < tiles_m, other=0), 0)
        listed = tl.max(rank, 0)
    else:
        listed = tiles_m
    for tile in tl.range(tl.program_id(0), listed * tiles_n, tl.num_programs(0)):
        group = tile // (GROUP_M * tiles_n)
        first_m = group * GROUP_M
        size_m = min(listed - first_m, GROUP_M)
        within = tile - group * GROUP_M * tiles_n
        tile_m = first_m + within % size_m
        tile_n = within // size_m
        if FLAGGED:
            tile_m = tl.sum((rank <= tile_m).to(tl.int32), 0)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            left = load_tile(hidden, row, k, rows, width, hidden_stride, BLOCK_M, BLOCK_K, TMA)
            right = load_tile(
                weight, column, k, vocabulary, width, weight_stride, BLOCK_N, BLOCK_K, TMA
            )
            total = dot_transposed(left, right, total)

        halves = _halves(total)
        for half in tl.static_range(2):
            _epilogue(
                halves[half],
                exps,
                target_ptr,
                reference_ptr,
                gain_ptr,
                bias_ptr,
                sum_ptr,
                peak_ptr,
                moment_ptr,
                row,
                tile_n * 2 + half,
                rows,
                vocabulary,
                exps_stride,
                logit_scale,
                softcap,
                BLOCK_M,
                BLOCK_N // 2,
                TMA,
                STORE,
                PEAK,
                BIAS,
                SOFTCAP,
                ENTROPY,
                DTYPE,
            )


@triton.jit
def _reduce_rows(
    sum_ptr,
    peak_ptr,
    moment_ptr,
    target2_ptr,
    flag_ptr,
    total_ptr,
    shift_ptr,
    moments_ptr,
    reference_ptr,
    kappa_ptr,
    missing_ptr,
    rows,
    tiles_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PEAK: tl.constexpr,
    FLAGGED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BITS: tl.constexpr,
):
    """Adds the N partial sums of a row and says what p_v = kappa E_v and 1 - p = kappa missing are.

    total, shift: S = total relative to 2^shift; moments likewise. reference: z2_ref of the stored
    E. Without PEAK it also flags the row tile if a sum is out of range; with FLAGGED it replaces
    the rows that are, and leaves their neighbours alone.
    """
    tile_m = tl.program_id(0)
    offs_r = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < rows
    target2 = tl.load(target2_ptr + offs_r, mask=mask_r, other=0.0)
    if FLAGGED:
        if tl.load(flag_ptr + tile_m) == 0:
            return
        before = tl.load(total_ptr + offs_r, mask=mask_r, other=0.0)
        mask_r = mask_r & ((before > _LARGEST_SUM) | (before != before))
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    total = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    if PEAK:
        shift = tl.full([BLOCK_M], LOWEST, tl.float32)
    else:
        shift = target2
    for start in range(0, tiles_n, BLOCK_N):
        mask = (start + offs_n < tiles_n) & mask_r[None, :]
        partial = (start + offs_n).to(tl.int64) * rows + offs_r[None, :]
        part = tl.load(sum_ptr + partial, mask=mask, other=0.0)
        if ENTROPY:
            part_moment = tl.load(moment_ptr + partial, mask=mask, other=0.0)
        if PEAK:
            peak = tl.load(peak_ptr + partial, mask=mask, other=LOWEST)
            higher = tl.maximum(shift, tl.max(peak, axis=0))
            lift = peak - higher[None, :]
            if ENTROPY:
                fall = tl.where(total > 0, shift - higher, 0.0)
                moment = (moment + total * fall) * tl.exp2(shift - higher)
                lifted = part_moment + tl.where(part > 0, part * lift, 0.0)
                part_moment = lifted * tl.exp2(lift)
            total *= tl.exp2(shift - higher)
            part *= tl.exp2(lift)
            shift = higher
        total += tl.sum(part, axis=0)
        if ENTROPY:
            moment += tl.sum(part_moment, axis=0)
    tl.store(total_ptr + offs_r, total, mask=mask_r)
    tl.store(shift_ptr + offs_r, shift, mask=mask_r)
    if ENTROPY:
        tl.store(moments_ptr + offs_r, moment, mask=mask_r)
    if PEAK:
        others2, lse2 = log_sums2(target2, shift, total)
        tl.store(reference_ptr + offs_r, lse2 - BITS, mask=mask_r)
        tl.store(kappa_ptr + offs_r, tl.zeros_like(lse2) + 1.0 / (1 << BITS), mask=mask_r)
        tl.store(missing_ptr + offs_r, tl.exp2(others2 - lse2 + BITS), mask=mask_r)
    else:
        bad = mask_r & ((total > _LARGEST_SUM) | (total != total))
        tl.store(flag_ptr + tile_m, tl.max(bad.to(tl.int32), 0))
        tl.store(reference_ptr + offs_r, target2, mask=mask_r)
        tl.store(kappa_ptr + offs_r, 1.0 / (1.0 + total), mask=mask_r)
        tl.store(missing_ptr + offs_r, total, mask=mask_r)


@triton.jit
def _glue(
    hidden_ptr,
    exps_ptr,
    scaled_ptr,
    u_ptr,
    target_ptr,
    pull_ptr,
    lift_ptr,
    slope_ptr,
    kappa_ptr,
    missing_ptr,
    rows,
    width,
    hidden_stride,
    exps_stride,
    LIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """u = -pull kappa, the target's entry of E, and the rows HS = u H of the dW GEMM (C, D)."""
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < rows
    kappa = tl.load(kappa_ptr + offs_r, mask=mask_r, other=1.0)
    entry = -tl.load(missing_ptr + offs_r, mask=mask_r, other=0.0)
    if LIFT:
        entry -= tl.load(lift_ptr + offs_r, mask=mask_r, other=0.0) / kappa
    if SOFTCAP:
        entry *= tl.load(slope_ptr + offs_r, mask=mask_r, other=0.0)
    target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    address = exps_ptr + offs_r.to(tl.int64) * exps_stride + target
    tl.store(address, rounded_to(entry, DTYPE), mask=mask_r)
    u = -tl.load(pull_ptr + offs_r, mask=mask_r, other=0.0) * kappa
    tl.store(u_ptr + offs_r, u, mask=mask_r)
    if SCALED:
        hidden_r = hidden_ptr + offs_r.to(tl.int64)[:, None] * hidden_stride
        scaled_r = scaled_ptr + offs_r.to(tl.int64)[:, None] * hidden_stride
        for start in range(0, width, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)[None, :]
            mask = mask_r[:, None] & (offs_d < width)
            hidden = as_float32(tl.load(hidden_r + offs_d, mask=mask, other=0.0))
            tl.store(scaled_r + offs_d, rounded_to(hidden * u[:, None], DTYPE), mask=mask)


@triton.jit
def _bias_gradient(
    exps_ptr,
    u_ptr,
    out_ptr,
    rows,
    vocabulary,
    exps_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum_r u_r E_rv of BLOCK_N columns, rows in order: E is in half precision, u is not."""
    offs_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_M):
        offs_r = start + tl.arange(0, BLOCK_M)
        mask_r = offs_r < rows
        mask = mask_r[:, None] & (offs_c < vocabulary)[None, :]
        address = exps_ptr + offs_r.to(tl.int64)[:, None] * exps_stride + offs_c[None, :]
        u = tl.load(u_ptr + offs_r, mask=mask_r, other=0.0)
        total += tl.sum(as_float32(tl.load(address, mask=mask, other=0.0)) * u[:, None], axis=0)
    tl.store(out_ptr + offs_c, total, mask=offs_c < vocabulary)


# --- host code --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """The head of one call: what does not depend on the rows."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float
    entropy: bool
    tile: Tile

    @staticmethod
    def of(
        weight_VD: Tensor,
        bias_V: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        entropy: bool = False,
    ) -> "Head":
        """With the tile of its device, dtype and softcap; rows of the weight made contiguous."""
        if weight_VD.stride(1) != 1:
            weight_VD = weight_VD.contiguous()
        device = capability_of(weight_VD.device)
        tile = tile_for(weight_VD.dtype, device, softcap=softcap is not None)
        return Head(weight_VD, bias_V, softcap, logit_scale, entropy, tile)

    @property
    def bits(self) -> int:
        """E = 2^bits p where a row is relative to its own log-sum-exp: all rows of fp16."""
        return FP16_BITS if self.weight_VD.dtype is torch.float16 else 0


@dataclass(frozen=True)
class Rows:
    """Per-row numbers, each (rows,) float32 but the int32 targets; filled by the kernels.

    One row, logits [0, log 3], target 0: target2 = 0, shift2 = 0, total = 3, reference2 = 0,
    kappa = 1/4, missing = 3: p = (1/4, 3/4).
    """

    targets: Tensor
    gain: Tensor  # (logit_scale, unless it is applied before a bias or a softcap) / T / log 2
    target2: Tensor
    slope: Tensor
    total: Tensor
    shift2: Tensor
    moment: Tensor
    reference2: Tensor
    kappa: Tensor
    missing: Tensor

    def __getitem__(self, chunk: slice) -> "Rows":
        return Rows(*(getattr(self, name)[chunk] for name in self.__dataclass_fields__))


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
    """The backend contract of `chunked.head_pass`: logp_K, lse_K, entropy_K (or None), float32.

    chunk_bytes bounds E, at least one row tile of it. No host synchronisation.

    Not for float64 inputs, a gradient of the entropy, fp16 with a gradient of lse, or other devices
    than CUDA (the interpreter takes any): backends.py refuses these.
    """
    head = Head.of(weight_VD, bias_V, softcap, logit_scale, entropy)
    rows = new_rows(targets_K, temperature, head)
    pull_K, lift_K = _pull_and_lift(upstream, temperature)
    unit = _storage_unit(pull_K, head)
    sink_VD = dweight_VD
    if dweight_VD is not None and head.bits:
        # In units until the last chunk, so it cannot be added to the caller's sum on the way.
        sink_VD = torch.zeros_like(dweight_VD)

    def run(chunk: slice) -> None:
        """One chunk; a function, so that its E is free before the next one's."""
        hidden_CD = hidden_TD.index_select(0, rows_K[chunk])
        chunk_rows = rows[chunk]
        exps_CV = _forward(hidden_CD, chunk_rows, head, store=pull_K is not None)
        if exps_CV is None or pull_K is None:
            return
        lift_C = None if lift_K is None else lift_K[chunk]
        scaled_CD = torch.empty_like(hidden_CD) if sink_VD is not None else None
        u_C = torch.empty_like(chunk_rows.kappa)
        pull_C = pull_K[chunk] / unit
        _launch_glue(hidden_CD, exps_CV, scaled_CD, u_C, pull_C, lift_C, chunk_rows, head)
        if dbias_V is not None:
            dbias_V.add_(bias_sum(exps_CV, u_C).mul_(unit))
        # dW first: the rows are free before the fp32 product of dX is made.
        if sink_VD is not None and scaled_CD is not None:
            add_matmul_(sink_VD, exps_CV.T, scaled_CD, head.logit_scale)
        del hidden_CD, scaled_CD
        if dhidden_TD is not None:
            dhidden_CD = matmul(exps_CV, head.weight_VD, torch.float32)
            dhidden_CD.mul_((u_C * (head.logit_scale * unit)).unsqueeze(1))
            dhidden_TD.index_copy_(0, rows_K[chunk], dhidden_CD.to(dhidden_TD.dtype))

    with torch.cuda.device_of(hidden_TD):
        for chunk in _chunks(targets_K.shape[0], head, pull_K is not None, chunk_bytes):
            run(chunk)
    if dweight_VD is not None and sink_VD is not None and head.bits:
        dweight_VD.add_(sink_VD.mul_(unit))
    return values(rows, head)


def new_rows(targets_K: Tensor, temperature: float | Tensor, head: Head) -> Rows:
    targets_K = targets_K.to(torch.int32)
    gain_K = torch.full_like(targets_K, LOG2E, dtype=torch.float32).div_(temperature)
    if head.bias_V is None and head.softcap is None:
        gain_K.mul_(head.logit_scale)
    blank = torch.empty(8, targets_K.shape[0], dtype=torch.float32, device=targets_K.device)
    return Rows(targets_K, gain_K, *blank.unbind(0))


def _pull_and_lift(
    upstream: tuple[Tensor, Tensor | None, Tensor | None] | None, temperature: float | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """((a - b) / temperature, b / (a - b)) of the gradients a of logp and b of lse; None: none.

    lift is what E_target needs for b; the pull of a row with a = b is kept at 1e-6 |b|, its sign
    included, so that the quotient exists.
    """
    if upstream is None:
        return None, None
    g_logp_K, g_lse_K, _ = upstream
    if g_lse_K is None:
        return g_logp_K / temperature, None
    least_K = (1e-6 * g_lse_K.abs()).clamp_min(1e-30)
    pull_K = g_logp_K - g_lse_K
    pull_K = torch.where(pull_K.abs() < least_K, least_K, pull_K)
    return pull_K / temperature, g_lse_K / pull_K


def _storage_unit(pull_K: Tensor | None, head: Head) -> Tensor | float:
    """HS = u H with |u| <= 2^-bits max|pull|: fp16 keeps it in units of that bound, a scalar."""
    if pull_K is None or not head.bits:
        return 1.0
    return pull_K.abs().amax().clamp_min(1e-30) / (1 << head.bits)


def _chunks(rows: int, head: Head, store: bool, chunk_bytes: int | None) -> list[slice]:
    """Chunks of equal size, in whole row tiles, each with an E of at most chunk_bytes."""
    block = head.tile.block_m
    most = SCORE_ROWS
    if store:
        weight = head.weight_VD
        budget = default_chunk_bytes(weight.device) if chunk_bytes is None else chunk_bytes
        most = min(CHUNK_ROWS, budget // (_padded(weight.shape[0]) * weight.itemsize))
    return equal_slices(rows, min(most, LIST * block), block)


def _padded(columns: int) -> int:
    """Columns of a row whose next row begins on 128 bytes, in any dtype."""
    return triton.cdiv(columns, 64) * 64


def _forward(hidden_CD: Tensor, rows: Rows, head: Head, *, store: bool) -> Tensor | None:
    """Fills the rows' statistics; with `store` returns E, (C, V) of a padded buffer."""
    count, vocabulary = hidden_CD.shape[0], head.weight_VD.shape[0]
    exps_CV = None
    if store:
        exps_CV = hidden_CD.new_empty(count, _padded(vocabulary))[:, :vocabulary]
    _launch_target_logit(hidden_CD, rows, head)
    tile = head.tile
    partial = torch.empty(
        3, 2 * triton.cdiv(vocabulary, tile.block_n), count, device=hidden_CD.device
    )  # sums, peaks, moments of every half column tile
    flags = torch.empty(
        triton.cdiv(count, tile.block_m), dtype=torch.int32, device=rows.gain.device
    )
    args = (hidden_CD, rows, partial, flags, head)
    if head.bits:
        _launch_gemm(*args, peak=True)
        _launch_reduce(*args[1:], peak=True)
        if exps_CV is not None:
            _launch_gemm(*args, exps_CV=exps_CV)
        return exps_CV
    _launch_gemm(*args, exps_CV=exps_CV, reference2=rows.target2)
    _launch_reduce(*args[1:])
    _launch_gemm(*args, peak=True, flagged=True)
    _launch_reduce(*args[1:], peak=True, flagged=True)
    if exps_CV is not None:
        _launch_gemm(*args, exps_CV=exps_CV, flagged=True)
    return exps_CV


def _launch_target_logit(hidden_CD: Tensor, rows: Rows, head: Head) -> None:
    count, width = hidden_CD.shape
    launch(
        _target_logit,
        triton.cdiv(count, 16),
        hidden_CD,
        head.weight_VD,
        rows.targets,
        rows.gain,
        head.bias_V,
        rows.target2,
        rows.slope,
        count,
        width,
        hidden_CD.stride(0),
        head.weight_VD.stride(0),
        head.logit_scale,
        head.softcap or 1.0,
        BIAS=head.bias_V is not None,
        SOFTCAP=head.softcap is not None,
        BLOCK_M=16,
        BLOCK_D=128,
    )


def _launch_gemm(
    hidden_CD: Tensor,
    rows: Rows,
    partial: Tensor,
    flags: Tensor,
    head: Head,
    *,
    exps_CV: Tensor | None = None,
    reference2: Tensor | None = None,
    peak: bool = False,
    flagged: bool = False,
) -> None:
    weight_VD = head.weight_VD
    tile = head.tile
    operands = [(hidden_CD, tile.block_m, tile.block_k), (weight_VD, tile.block_n, tile.block_k)]
    if exps_CV is not None:
        operands.append((exps_CV, tile.block_m, tile.block_n // 2))
    tma = capability_of(weight_VD.device) >= (9, 0) and all(_aligned(x) for x, _, _ in operands)
    sources = [_descriptor(*operand) if tma else operand[0] for operand in operands]
    count, width = hidden_CD.shape
    tiles = triton.cdiv(count, tile.block_m) * triton.cdiv(weight_VD.shape[0], tile.block_n)
    launch(
        _gemm_exp,
        min(tiles, programs_of(weight_VD.device)),
        sources[0],
        sources[1],
        sources[2] if exps_CV is not None else None,
        rows.targets,
        rows.reference2 if reference2 is None else reference2,
        rows.gain,
        head.bias_V,
        flags,
        *partial.unbind(0),
        count,
        weight_VD.shape[0],
        width,
        hidden_CD.stride(0),
        weight_VD.stride(0),
        exps_CV.stride(0) if exps_CV is not None else 0,
        head.logit_scale,
        head.softcap or 1.0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        TMA=tma,
        STORE=exps_CV is not None,
        PEAK=peak,
        FLAGGED=flagged,
        BIAS=head.bias_V is not None,
        SOFTCAP=head.softcap is not None,
        ENTROPY=head.entropy,
        DTYPE=TRITON_DTYPE[weight_VD.dtype],
        num_stages=tile.stages,
        num_warps=tile.warps,
    )


def _aligned(x: Tensor) -> bool:
    """TMA reads rows that begin on 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0


def _descriptor(x: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block_rows, block_columns])


def _launch_reduce(
    rows: Rows,
    partial: Tensor,
    flags: Tensor,
    head: Head,
    *,
    peak: bool = False,
    flagged: bool = False,
) -> None:
    launch(
        _reduce_rows,
        flags.shape[0],
        *partial.unbind(0),
        rows.target2,
        flags,
        rows.total,
        rows.shift2,
        rows.moment,
        rows.reference2,
        rows.kappa,
        rows.missing,
        partial.shape[2],
        partial.shape[1],
        BLOCK_M=head.tile.block_m,
        BLOCK_N=32,
        PEAK=peak,
        FLAGGED=flagged,
        ENTROPY=head.entropy,
        BITS=head.bits,
    )


def _launch_glue(
    hidden_CD: Tensor,
    exps_CV: Tensor,
    scaled_CD: Tensor | None,
    u_C: Tensor,
    pull_C: Tensor,
    lift_C: Tensor | None,
    rows: Rows,
    head: Head,
) -> None:
    count, width = hidden_CD.shape
    launch(
        _glue,
        triton.cdiv(count, 8),
        hidden_CD,
        exps_CV,
        scaled_CD,
        u_C,
        rows.targets,
        pull_C,
        lift_C,
        rows.slope,
        rows.kappa,
        rows.missing,
        count,
        width,
        hidden_CD.stride(0),
        exps_CV.stride(0),
        LIFT=lift_C is not None,
        SOFTCAP=head.softcap is not None,
        SCALED=scaled_CD is not None,
        DTYPE=TRITON_DTYPE[hidden_CD.dtype],
        BLOCK_M=8,
        BLOCK_D=512,
    )


def bias_sum(exps_CV: Tensor, u_C: Tensor) -> Tensor:
    count, vocabulary = exps_CV.shape
    out_V = torch.empty(vocabulary, dtype=torch.float32, device=u_C.device)
    launch(
        _bias_gradient,
        triton.cdiv(vocabulary, 128),
        exps_CV,
        u_C,
        out_V,
        count,
        vocabulary,
        exps_CV.stride(0),
        BLOCK_M=64,
        BLOCK_N=128,
    )
    return out_V


def values(rows: Rows, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """logp, lse and entropy from the sums: torch's log, exact near 1 where the hardware's is not.

    x = z_target - lse of the others; for rows relative to their target it is -log S, exactly.
    H = sum over the others of p (lse - z), minus p_target logp.
    """
    shift_K, log_total_K = rows.shift2 * LN2, rows.total.log()
    target_K = rows.target2 * LN2
    logp_K = F.logsigmoid((rows.target2 - rows.shift2) * LN2 - log_total_K)
    lse_K = torch.logaddexp(target_K, shift_K + log_total_K)
    if not head.entropy:
        return logp_K, lse_K, None
    others_K = (lse_K - shift_K) * rows.total - rows.moment * LN2
    lowest = torch.finfo(torch.float32).min
    entropy_K = (shift_K - lse_K).exp() * others_K - logp_K.exp() * logp_K.clamp_min(lowest)
    return logp_K, lse_K, entropy_K

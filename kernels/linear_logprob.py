"""The language-model head in Triton: exponentials relative to the target's logit, in one pass.

K rows that take part, C rows of one chunk, D hidden, V vocabulary, N halves of column tiles. With
the logits in units of log 2 (z2 = z / log 2) and per row a reference z2_ref, the target's z2:

    1  target_logit   z2_t = gain (h_t . w_target)                              K D products
    2  gemm_exp       E_v = 2^(z2_v - z2_ref), S = sum over v != target of E_v  one GEMM
    3  reduce_rows    logp = -log(1 + S), written log sigmoid(-log S)
    4  operands       E_target = -S; u = -a kappa / temperature; HS = u H       kappa = 1 / (1 + S)
    5  two GEMMs      dX = logit_scale u (E W); dW += logit_scale E' HS

because d logp / d z_v = -p_v = -kappa E_v off the target and 1 - p = kappa S at it. S never holds
the target, so 1 - p loses no digit however confident the token, logp is never above 0, and no
maximum is needed. E is the only (C, V) tensor, in the input's dtype; scoring does not store it. A
capped logit multiplies its entry by the slope 1 - tanh^2 and leaves S alone. The gradient b of lse
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
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

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
from vpgea_fast.kernels.chunked import (
    default_chunk_bytes,
    without_skipped_,
)
from vpgea_fast.kernels.contract import NO_SINKS, Head, Sinks, Upstream, Values
from vpgea_fast.kernels.products import add_matmul_, matmul, settle_weight, weight_sink

Tensor = torch.Tensor

LOG2E = 1.0 / math.log(2.0)
LN2 = math.log(2.0)
CHUNK_ROWS = 8448
"""Most rows of a training chunk: 66 row tiles of 128, half of an H100's 132 multiprocessors."""
SCORE_ROWS = 16384
"""Most rows of a scoring chunk, which has no E: only the gathered rows and the sums per tile."""
LIST = 256
"""Most row tiles of a chunk: the flags of all of them are read at once."""
FP16_BITS = 14
"""fp16 stores 2^14 p: E_target reaches -2^14 (2^16 overflows) and p keeps 2^-38."""

_LARGEST_SUM = tl.constexpr(2.0**46)
_LIST = tl.constexpr(LIST)


@triton.jit
def _target_logit(
    hidden_ptr,  # (n_rows, width)
    weight_ptr,  # (V, width)
    target_ptr,  # (n_rows,) int32
    gain_ptr,  # (n_rows,) fp32: z2 = gain x the logit before the temperature
    bias_ptr,  # (V,)
    target2_ptr,  # out, (n_rows,) fp32: z2 of the target
    slope_ptr,  # out with a cap, (n_rows,) fp32: 1 - tanh^2 there
    holds_ptr,  # out, (row tiles, N) int8 of zeros: 1 where a half column tile holds a target
    n_rows,
    width,
    halves,  # N
    hidden_stride,
    weight_stride,
    shape,  # LogitShape: scale, and cap or None
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,  # rows of _gemm_exp's tile
    HALF_N: tl.constexpr,  # columns of half of it
):
    """z2 of every row's target, with a cap the slope there, and the half tiles that hold one."""
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < n_rows
    # Rows beyond the last read class 0, which exists: their addresses stay inside the weight.
    target_r = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    hidden_r = hidden_ptr + offs_r.to(tl.int64)[:, None] * hidden_stride
    weight_r = weight_ptr + target_r.to(tl.int64)[:, None] * weight_stride
    # A sum for each lane, joined once at the end: one order, whatever the number of rows.
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
    logit, slope = logit_of(product, bias=bias, shape=shape, BIAS=BIAS)
    if shape.cap is not None:
        tl.store(slope_ptr + offs_r, slope, mask=mask_r)
    gain = tl.load(gain_ptr + offs_r, mask=mask_r, other=1.0)
    tl.store(target2_ptr + offs_r, logit * gain, mask=mask_r)
    # Rows with targets in the same half tile write the same 1.
    place = (offs_r // TILE_M).to(tl.int64) * halves + target_r // HALF_N
    tl.store(holds_ptr + place, tl.full([BLOCK_M], 1, tl.int8), mask=mask_r)


@triton.jit
def _halves(x):
    """The left and the right columns of x, without moving a register."""
    pairs = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def _epilogue(
    logit,  # (BLOCK_M, BLOCK_N) fp32: products h . w, without a cap plus bias / scale
    gain,  # (BLOCK_M,) fp32: z2 = gain x that, with a cap gain x `logit_of` it
    reference,  # (BLOCK_M,) fp32: z2_ref; 0 with PEAK
    masked,  # whether one of these columns is a target, or may be beyond the last class
    exps,  # out with STORE, (n_rows, vocabulary): E; descriptor or pointer
    target_ptr,  # (n_rows,) int32
    bias_ptr,  # (column tiles x BLOCK_N,) fp32 or None: bias / scale, read with a cap
    sum_ptr,  # out, (N, n_rows) fp32: sum of E over this half's columns but the target
    peak_ptr,  # out with PEAK, (N, n_rows) fp32: the z2_ref of that sum
    moment_ptr,  # out with ENTROPY, (N, n_rows) fp32: sum of E (z2 - z2_ref)
    row,
    half_tile,
    n_rows,
    vocabulary,
    exps_stride,
    shape,  # LogitShape: scale, and cap or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    TAIL: tl.constexpr,
    STORE: tl.constexpr,
    PEAK: tl.constexpr,
    ENTROPY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """E of the BLOCK_N columns of `half_tile`, and their row sums, from the products `logit`."""
    column = half_tile * BLOCK_N
    offs_r = row + tl.arange(0, BLOCK_M)
    offs_c = column + tl.arange(0, BLOCK_N)
    mask_r = offs_r < n_rows
    if bias_ptr is not None and shape.cap is not None:
        # Here, among 33 instructions for each element, it costs one and lets the loop be flat.
        logit += tl.load(bias_ptr + offs_c)[None, :]
    logit, slope = logit_of(logit, bias=0.0, shape=shape, BIAS=False)
    x = logit * gain[:, None] - reference[:, None]
    # One of ten half tiles; the others skip a compare and a select for each element.
    if masked:
        target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
        others = offs_c[None, :] != target[:, None]
        if TAIL:
            others = others & (offs_c < vocabulary)[None, :]
        x = tl.where(others, x, -float("inf"))
    if PEAK:
        # A finite peak also where every logit is -inf: no -inf - -inf in the exponent.
        reference = tl.maximum(tl.max(x, axis=1), LOWEST)
        x -= reference[:, None]
    counted = tl.exp2(x)
    partial = half_tile.to(tl.int64) * n_rows + offs_r
    tl.store(sum_ptr + partial, tl.sum(counted, axis=1), mask=mask_r)
    if PEAK:
        tl.store(peak_ptr + partial, reference, mask=mask_r)
    if ENTROPY:
        # E = 0 where x is -inf: 0, and not 0 x -inf.
        moment = tl.sum(counted * tl.maximum(x, LOWEST), axis=1)
        tl.store(moment_ptr + partial, moment, mask=mask_r)
    if STORE:
        # 0 at the target, which _gradient_operands writes, and beyond V, which nobody reads.
        if shape.cap is not None:
            counted *= slope
        store_tile(
            exps,
            rounded_to(counted, DTYPE),
            row=row,
            column=column,
            n_rows=n_rows,
            n_columns=vocabulary,
            stride=exps_stride,
            ROWS=BLOCK_M,
            COLUMNS=BLOCK_N,
            TMA=TMA,
        )


@triton.jit
def _product_tile(
    hidden,  # (n_rows, width); descriptor or pointer, as weight
    weight,  # (vocabulary, width)
    bias_ptr,  # (column tiles x BLOCK_N,) fp32 or None: bias / scale
    row,
    column,
    n_rows,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) of h . w + bias / scale in float32, from row `row`, class `column` on."""
    if bias_ptr is None:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        # Instead of zeros, for as many instructions. In the epilogue a bias would cost 1.2 more for
        # each element, and registers for 32 columns.
        bias = tl.load(bias_ptr + column + tl.arange(0, BLOCK_N))
        total = tl.broadcast_to(bias[None, :], [BLOCK_M, BLOCK_N])
    # The compiler loads num_stages - 1 steps ahead, into shared memory: no copy is written here.
    for k in range(0, width, BLOCK_K):
        # Beyond `width` both tiles are 0, so the last step may be a part of BLOCK_K.
        left = load_tile(
            hidden,
            row=row,
            column=k,
            n_rows=n_rows,
            n_columns=width,
            stride=hidden_stride,
            ROWS=BLOCK_M,
            COLUMNS=BLOCK_K,
            TMA=TMA,
        )
        # Rows of the weight are classes: D is contiguous in both operands, and the dot transposes.
        right = load_tile(
            weight,
            row=column,
            column=k,
            n_rows=vocabulary,
            n_columns=width,
            stride=weight_stride,
            ROWS=BLOCK_N,
            COLUMNS=BLOCK_K,
            TMA=TMA,
        )
        total = dot_transposed(left, right, total)
    return total


@triton.jit
def _tile_at(position, listed, tiles_n, group_m):
    """Row tile and column tile at a position of the order in which programs take them.

    Row tiles change fastest within groups of group_m, so that a tile of the weight is read from L2.
    """
    # The last group may have fewer row tiles.
    group = position // (group_m * tiles_n)
    first_m = group * group_m
    size_m = min(listed - first_m, group_m)
    within = position - group * group_m * tiles_n
    return first_m + within % size_m, within // size_m


@triton.jit
def _order(flag_ptr, tiles_m, GROUP_M: tl.constexpr, FLAGGED: tl.constexpr):
    """(rank, listed, group_m): listed row tiles have work, and group_m of them share a column tile.

    rank[i], with FLAGGED alone: the flagged tiles up to i.
    """
    rank = tiles_m
    listed = tiles_m
    if FLAGGED:
        offs_l = tl.arange(0, _LIST)
        rank = tl.cumsum(tl.load(flag_ptr + offs_l, mask=offs_l < tiles_m, other=0), 0)
        listed = tl.max(rank, 0)
    # As few groups as GROUP_M allows, evened: one of 2 row tiles would read the weight 8 times as
    # often as one of 16, which an H100's memory cannot give.
    return rank, listed, tl.cdiv(listed, tl.maximum(tl.cdiv(listed, GROUP_M), 1))


@triton.jit
def _gain_and_reference(
    gain_ptr,  # (n_rows,) fp32
    reference_ptr,  # (n_rows,) fp32
    row,
    n_rows,
    scale,  # of the gain; None: 1
    BLOCK_M: tl.constexpr,
    PEAK: tl.constexpr,
):
    """Both (BLOCK_M,) from row `row` on; the reference is 0 where the tile's peak will be it."""
    offs_r = row + tl.arange(0, BLOCK_M)
    mask_r = offs_r < n_rows
    gain = tl.load(gain_ptr + offs_r, mask=mask_r, other=1.0)
    if scale is not None:
        gain *= scale
    if PEAK:
        reference = tl.zeros([BLOCK_M], tl.float32)
    else:
        reference = tl.load(reference_ptr + offs_r, mask=mask_r, other=0.0)
    return gain, reference


@triton.jit
def _gemm_exp(
    hidden,  # (n_rows, width); descriptor or pointer, as weight and exps
    weight,  # (vocabulary, width)
    exps,  # out with STORE, (n_rows, vocabulary): E
    target_ptr,  # (n_rows,) int32
    reference_ptr,  # (n_rows,) fp32: z2_ref; not read with PEAK
    gain_ptr,  # (n_rows,) fp32: z2 = gain x the logit before the temperature
    bias_ptr,  # (column tiles x BLOCK_N,) fp32 or None: bias / scale
    flag_ptr,  # (row tiles,) int32: 1 where FLAGGED has work
    sum_ptr,  # out, (N, n_rows) fp32: S of half a column tile
    peak_ptr,  # out with PEAK, (N, n_rows) fp32: the reference of that S
    moment_ptr,  # out with ENTROPY, (N, n_rows) fp32: sum of E (z2 - z2_ref)
    holds_ptr,  # (row tiles, N) int8: 1 where a half column tile holds a target
    n_rows, vocabulary, width, hidden_stride, weight_stride, exps_stride,
    shape,  # LogitShape: scale, and cap or None
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, TAIL: tl.constexpr, STORE: tl.constexpr, PEAK: tl.constexpr,
    FLAGGED: tl.constexpr, ENTROPY: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """E of every (row tile, column tile) and its row sums over the columns that are not the target.

    Persistent: program i takes tiles i, i + programs, ... FLAGGED: only the row tiles whose flag is
    1, a number that the device knows and the host does not.
    """
    tl.assume(width > 0)
    tiles_n = tl.cdiv(vocabulary, BLOCK_N)
    rank, listed, group_m = _order(flag_ptr, tl.cdiv(n_rows, BLOCK_M), GROUP_M, FLAGGED=FLAGGED)
    # One loop over tiles and D: the next operands load under the epilogue. Not where the sums begin
    # with a bias: Triton pipelines no flat loop that loads them.
    first = bias_ptr if shape.cap is None else None
    tiles = listed * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=first is None):
        tile_m, tile_n = _tile_at(tile, listed, tiles_n, group_m)
        if FLAGGED:
            # Tiles of rank <= j lie before flagged tile j: their number is its index.
            tile_m = tl.sum((rank <= tile_m).to(tl.int32), 0)
        row = tile_m * BLOCK_M
        total = _product_tile(
            hidden,
            weight,
            bias_ptr=first,
            row=row,
            column=tile_n * BLOCK_N,
            n_rows=n_rows,
            vocabulary=vocabulary,
            width=width,
            hidden_stride=hidden_stride,
            weight_stride=weight_stride,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            TMA=TMA,
        )
        # The compiler asks for these before it waits for the product's last step.
        scale = None if first is None else shape.scale  # new_stats leaves it to a bias
        gain, reference = _gain_and_reference(
            gain_ptr, reference_ptr, row, n_rows, scale=scale, BLOCK_M=BLOCK_M, PEAK=PEAK
        )
        holds = holds_ptr + (tile_m.to(tl.int64) * tiles_n + tile_n) * 2
        masked = (tl.load(holds) != 0, tl.load(holds + 1) != 0)
        # One half after the other: the epilogue's registers come on top of 128 for the accumulator.
        halves = _halves(total)
        last = (tile_n + 1) * BLOCK_N > vocabulary
        for half in tl.static_range(2):
            _epilogue(
                halves[half],
                gain=gain,
                reference=reference,
                masked=masked[half] | last if TAIL else masked[half],
                exps=exps,
                target_ptr=target_ptr,
                bias_ptr=bias_ptr,
                sum_ptr=sum_ptr,
                peak_ptr=peak_ptr,
                moment_ptr=moment_ptr,
                row=row,
                half_tile=tile_n * 2 + half,
                n_rows=n_rows,
                vocabulary=vocabulary,
                exps_stride=exps_stride,
                shape=shape,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N // 2,
                TMA=TMA,
                TAIL=TAIL,
                STORE=STORE,
                PEAK=PEAK,
                ENTROPY=ENTROPY,
                DTYPE=DTYPE,
            )


@triton.jit
def _reduce_rows(
    sum_ptr,  # (N, n_rows) fp32, of _gemm_exp, as the next two
    peak_ptr,  # (N, n_rows) fp32, read with PEAK
    moment_ptr,  # (N, n_rows) fp32, read with ENTROPY
    target2_ptr,  # (n_rows,) fp32: z2 of the target
    flag_ptr,  # (row tiles,) int32; written without PEAK, read with FLAGGED
    total_ptr,  # out, (n_rows,) fp32: sum of exp2(z2 - shift2) over the other classes
    shift_ptr,  # out, (n_rows,) fp32: shift2, the target's z2 or with PEAK the others' peak
    moments_ptr,  # out with ENTROPY, (n_rows,) fp32: sum of exp2(z2 - shift2) (z2 - shift2)
    reference_ptr,  # out, (n_rows,) fp32: z2_ref of the stored E
    kappa_ptr,  # out, (n_rows,) fp32: p_v = kappa E_v
    missing_ptr,  # out, (n_rows,) fp32: 1 - p_target = kappa missing
    n_rows,
    tiles_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PEAK: tl.constexpr,
    FLAGGED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BITS: tl.constexpr,
):
    """Adds the N partial sums of a row and says what p_v = kappa E_v and 1 - p = kappa missing are.

    Without PEAK it also flags the row tile if a sum is out of range; with FLAGGED it replaces the
    rows that are, and leaves their neighbours alone.
    """
    tile_m = tl.program_id(0)
    offs_r = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < n_rows
    target2 = tl.load(target2_ptr + offs_r, mask=mask_r, other=0.0)
    if FLAGGED:
        if tl.load(flag_ptr + tile_m) == 0:
            return
        # total != total: a NaN, which no comparison with the limit finds.
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
        partial = (start + offs_n).to(tl.int64) * n_rows + offs_r[None, :]
        part = tl.load(sum_ptr + partial, mask=mask, other=0.0)
        if ENTROPY:
            part_moment = tl.load(moment_ptr + partial, mask=mask, other=0.0)
        if PEAK:
            # Both sides are brought to the higher peak: no exponent is positive.
            peak = tl.load(peak_ptr + partial, mask=mask, other=LOWEST)
            higher = tl.maximum(shift, tl.max(peak, axis=0))
            lift = peak - higher[None, :]
            if ENTROPY:
                # sum e (x + fall) = moment + total fall; where a sum is 0 its shift means nothing.
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
        # The next E is relative to lse2: it is p itself, times 2^BITS for fp16's range.
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
def _gradient_operands(
    hidden_ptr,  # (n_rows, width): H
    exps_ptr,  # (n_rows, V): E, whose target entries are rewritten
    scaled_ptr,  # out with SCALED, (n_rows, width): HS = u H
    u_ptr,  # out, (n_rows,) fp32
    target_ptr,  # (n_rows,) int32
    pull_ptr,  # (n_rows,) fp32: (a - b) / temperature, in storage units
    lift_ptr,  # (n_rows,) fp32, read with LIFT: b / (a - b)
    slope_ptr,  # (n_rows,) fp32, read with SLOPE: 1 - tanh^2 at the target
    kappa_ptr,  # (n_rows,) fp32: p_v = kappa E_v
    missing_ptr,  # (n_rows,) fp32: 1 - p_target = kappa missing
    n_rows,
    width,
    hidden_stride,
    exps_stride,
    LIFT: tl.constexpr,
    SLOPE: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Completes the operands of the two gradient GEMMs: E's target entry, u = -pull kappa, HS."""
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < n_rows
    kappa = tl.load(kappa_ptr + offs_r, mask=mask_r, other=1.0)  # 1: a divisor below
    entry = -tl.load(missing_ptr + offs_r, mask=mask_r, other=0.0)
    if LIFT:
        entry -= tl.load(lift_ptr + offs_r, mask=mask_r, other=0.0) / kappa
    if SLOPE:
        entry *= tl.load(slope_ptr + offs_r, mask=mask_r, other=0.0)
    target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    address = exps_ptr + offs_r.to(tl.int64) * exps_stride + target
    tl.store(address, rounded_to(entry, DTYPE), mask=mask_r)
    u = -tl.load(pull_ptr + offs_r, mask=mask_r, other=0.0) * kappa
    tl.store(u_ptr + offs_r, u, mask=mask_r)
    if SCALED:
        # u goes into H, (C, D), and not into E, (C, V): dX takes it after its GEMM, in float32.
        hidden_r = hidden_ptr + offs_r.to(tl.int64)[:, None] * hidden_stride
        scaled_r = scaled_ptr + offs_r.to(tl.int64)[:, None] * hidden_stride
        for start in range(0, width, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)[None, :]
            mask = mask_r[:, None] & (offs_d < width)
            hidden = as_float32(tl.load(hidden_r + offs_d, mask=mask, other=0.0))
            tl.store(scaled_r + offs_d, rounded_to(hidden * u[:, None], DTYPE), mask=mask)


@triton.jit
def _bias_gradient(
    exps_ptr,  # (n_rows, vocabulary): E, or da with u = 1
    u_ptr,  # (n_rows,) fp32
    out_ptr,  # out, (vocabulary,) fp32
    n_rows,
    vocabulary,
    exps_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum_r u_r E_rv of BLOCK_N columns, rows in order: E is in half precision, u is not."""
    offs_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n_rows, BLOCK_M):
        offs_r = start + tl.arange(0, BLOCK_M)
        mask_r = offs_r < n_rows
        mask = mask_r[:, None] & (offs_c < vocabulary)[None, :]
        address = exps_ptr + offs_r.to(tl.int64)[:, None] * exps_stride + offs_c[None, :]
        u = tl.load(u_ptr + offs_r, mask=mask_r, other=0.0)
        total += tl.sum(as_float32(tl.load(address, mask=mask, other=0.0)) * u[:, None], axis=0)
    tl.store(out_ptr + offs_c, total, mask=offs_c < vocabulary)


@dataclass(frozen=True)
class Plan:
    """How a head runs here: its tile, and whether the entropy is made with the sums."""

    head: Head
    tile: Tile
    entropy: bool

    @staticmethod
    def of(head: Head, *, entropy: bool = False) -> "Plan":
        """With the tile of its device, dtype and cap; rows of the weight made contiguous."""
        if head.weight.stride(1) != 1:
            head = replace(head, weight=head.weight.contiguous())
        capability = capability_of(head.weight.device)
        tile = tile_for(head.weight.dtype, capability, capped=head.capped)
        return Plan(head, tile, entropy)

    @property
    def scale(self) -> float:
        """logit_scale; with a bias at least 2^-64, which a division by it survives.

        Below that the products are 0 beside any bias that float32 can tell from 0.
        """
        scale = self.head.logit_scale
        if self.head.bias is None or abs(scale) >= 2.0**-64:
            return scale
        return math.copysign(2.0**-64, scale)

    @cached_property
    def start(self) -> Tensor | None:
        """(column tiles x block_n,) float32: what the sums of products begin with, bias / scale.

        In whole tiles, so that no load needs a mask; None without a bias.
        """
        if self.head.bias is None:
            return None
        bias_V = self.head.bias.detach().to(torch.float32) / self.scale
        return F.pad(bias_V, (0, -bias_V.shape[0] % self.tile.block_n))

    @property
    def bits(self) -> int:
        """E = 2^bits p where a row is relative to its own log-sum-exp: all rows of fp16."""
        return FP16_BITS if self.head.weight.dtype is torch.float16 else 0


@dataclass(frozen=True)
class RowStats:
    """Per-row numbers, each (rows,) float32 but the int32 targets; filled by the kernels.

    One row, logits [0, log 3], target 0: target2 = 0, shift2 = 0, total = 3, reference2 = 0,
    kappa = 1/4, missing = 3: p = (1/4, 3/4).
    """

    targets: Tensor
    gain: Tensor  # (logit_scale, unless it is applied before a bias or a cap) / T / log 2
    target2: Tensor  # z2 of the target
    slope: Tensor  # 1 - tanh^2 there, with a cap
    total: Tensor  # sum over the others of 2^(z2 - shift2)
    shift2: Tensor
    moment: Tensor  # the same sum times z2 - shift2, for the entropy
    reference2: Tensor  # z2_ref of the stored E
    kappa: Tensor  # p_v = kappa E_v
    missing: Tensor  # 1 - p_target = kappa missing

    def __getitem__(self, chunk: slice | Tensor) -> "RowStats":
        return RowStats(*(getattr(self, name)[chunk] for name in self.__dataclass_fields__))


class TileSums(NamedTuple):
    """What the GEMM leaves of each row in every half column tile, (N, C) float32, and two tables.

    17 rows, 4 classes, a tile of 16 x 2, all targets class 3: holds = [[0, 0, 0, 1], [0, 0, 0, 1]].
    """

    sums: Tensor
    peaks: Tensor
    moments: Tensor
    flags: Tensor  # (row tiles,) int32: 1 where a sum of the tile is out of range
    holds: Tensor  # (row tiles, N) int8: 1 where a half column tile holds a target of these rows

    @staticmethod
    def new(n_rows: int, plan: Plan) -> "TileSums":
        tile, (vocabulary, _) = plan.tile, plan.head.weight.shape
        device = plan.head.weight.device
        halves = 2 * triton.cdiv(vocabulary, tile.block_n)
        partial = torch.empty(3, halves, n_rows, dtype=torch.float32, device=device)
        tiles_m = triton.cdiv(n_rows, tile.block_m)
        flags = torch.empty(tiles_m, dtype=torch.int32, device=device)
        holds = torch.zeros(tiles_m, halves, dtype=torch.int8, device=device)
        return TileSums(*partial, flags=flags, holds=holds)


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
) -> Values:
    """Meets the contract of `chunked.head_pass`: logp_K, lse_K, entropy_K (or None), float32.

    chunk_bytes bounds E, at least one row tile of it. No host synchronisation.

    Not for statistics, float64 inputs, a gradient of the entropy, fp16 with a gradient of lse, or
    other devices than CUDA (the interpreter takes any): backends.py refuses these.
    """
    del statistics
    plan = Plan.of(head, entropy=entropy)
    stats_K = new_stats(targets_K, head)
    pull_K, lift_K = _pull_and_lift(upstream, head.temperature)
    unit = _storage_unit(pull_K, plan)
    sink_VD = weight_sink(sinks.weight, unit)
    skipped: list[Tensor] = []

    def run(chunk: slice) -> None:
        """Runs one chunk; a function, so that its E is free before the next one's."""
        hidden_CD = hidden_TD.index_select(0, rows_K[chunk])
        stats_C = stats_K[chunk]
        exps_CV = _forward(hidden_CD, stats_C, plan, store=pull_K is not None)
        if exps_CV is None or pull_K is None or upstream is None:
            return
        rows_C, pull_C = rows_K[chunk], pull_K[chunk] / unit
        bound_C = bound_of(upstream, stats_C, head, chunk)
        if bound_C is not None:
            skipped.append(bound_C)
            exps_CV, stats_C, hidden_CD, rows_C, pull_C = without_skipped_(
                bound_C, exps_CV, stats_C, hidden_CD, rows_C, pull_C
            )
        scaled_CD = torch.empty_like(hidden_CD) if sink_VD is not None else None
        u_C = _launch_gradient_operands(
            hidden_CD,
            exps_CV,
            scaled_CD=scaled_CD,
            pull_C=pull_C,
            lift_C=None if lift_K is None else lift_K[chunk],
            stats=stats_C,
            plan=plan,
        )
        if sinks.bias is not None:
            sinks.bias.add_(bias_sum(exps_CV, u_C).mul_(unit))
        # dW first: the rows are free before the fp32 product of dX is made.
        if sink_VD is not None and scaled_CD is not None:
            add_matmul_(sink_VD, exps_CV.T, scaled_CD, head.logit_scale)
        del hidden_CD, scaled_CD
        if sinks.hidden is not None:
            dhidden_CD = matmul(exps_CV, plan.head.weight, torch.float32)
            dhidden_CD.mul_((u_C * (head.logit_scale * unit)).unsqueeze(1))
            sinks.hidden.index_copy_(0, rows_C, dhidden_CD.to(sinks.hidden.dtype))

    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(hidden_TD):
        store = pull_K is not None
        for chunk in _chunks(targets_K.shape[0], plan, store=store, chunk_bytes=chunk_bytes):
            run(chunk)
    settle_weight(sinks.weight, sink_VD, unit)
    made = values(stats_K, entropy=entropy)
    return made._replace(skipped=torch.cat(skipped)) if skipped else made


def bound_of(upstream: Upstream, stats: RowStats, head: Head, chunk: slice) -> Tensor | None:
    """`Upstream.skipped` of a chunk whose statistics are there; None, at no cost, unless asked."""
    if not upstream.skip_below:
        return None
    return upstream.skipped(values(stats, entropy=False).logp, head.temperature, chunk)


def new_stats(targets_K: Tensor, head: Head) -> RowStats:
    targets_K = targets_K.to(torch.int32)
    gain_K = torch.full_like(targets_K, LOG2E, dtype=torch.float32).div_(head.temperature)
    if head.bias is None and not head.capped:
        gain_K.mul_(head.logit_scale)
    blank = torch.empty(8, targets_K.shape[0], dtype=torch.float32, device=targets_K.device)
    return RowStats(targets_K, gain_K, *blank.unbind(0))


def _pull_and_lift(
    upstream: Upstream | None, temperature: float | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """((a - b) / temperature, b / (a - b)) of the gradients a of logp and b of lse; None: none.

    lift is what E_target needs for b; the pull of a row with a = b is kept at 1e-6 |b|, its sign
    included, so that the quotient exists.
    """
    if upstream is None:
        return None, None
    if upstream.lse is None:
        return upstream.logp / temperature, None
    least_K = (1e-6 * upstream.lse.abs()).clamp_min(1e-30)
    pull_K = upstream.logp - upstream.lse
    pull_K = torch.where(pull_K.abs() < least_K, least_K, pull_K)
    return pull_K / temperature, upstream.lse / pull_K


def _storage_unit(pull_K: Tensor | None, plan: Plan) -> Tensor | float:
    """HS = u H with |u| <= 2^-bits max|pull|: fp16 keeps it in units of that bound, a scalar."""
    if pull_K is None or not plan.bits:
        return 1.0
    return pull_K.abs().amax().clamp_min(1e-30) / (1 << plan.bits)


def _chunks(n_rows: int, plan: Plan, *, store: bool, chunk_bytes: int | None) -> list[slice]:
    """Chunks of equal size, in whole row tiles, each with an E of at most chunk_bytes."""
    block = plan.tile.block_m
    most = SCORE_ROWS
    if store:
        weight_VD = plan.head.weight
        budget = default_chunk_bytes(weight_VD.device) if chunk_bytes is None else chunk_bytes
        most = min(CHUNK_ROWS, budget // (_padded(weight_VD.shape[0]) * weight_VD.itemsize))
    return equal_slices(n_rows, min(most, LIST * block), block)


def _padded(columns: int) -> int:
    """Columns of a row whose next row begins on 128 bytes, in any dtype."""
    return triton.cdiv(columns, 64) * 64


def _forward(hidden_CD: Tensor, stats: RowStats, plan: Plan, *, store: bool) -> Tensor | None:
    """Fills the rows' statistics; with `store` returns E, (C, V) of a padded buffer."""
    n_rows, vocabulary = hidden_CD.shape[0], plan.head.weight.shape[0]
    exps_CV = None
    if store:
        exps_CV = hidden_CD.new_empty(n_rows, _padded(vocabulary))[:, :vocabulary]
    tiles = TileSums.new(n_rows, plan)
    _launch_target_logit(hidden_CD, stats, tiles, plan)
    if plan.bits:
        # fp16: E would overflow at logp = -11. One more GEMM finds the log-sum-exp first.
        _launch_gemm(hidden_CD, stats, tiles, plan, peak=True)
        _launch_reduce(stats, tiles, plan, peak=True)
        if exps_CV is not None:
            _launch_gemm(hidden_CD, stats, tiles, plan, exps_CV=exps_CV)
        return exps_CV
    _launch_gemm(hidden_CD, stats, tiles, plan, exps_CV=exps_CV, reference2=stats.target2)
    _launch_reduce(stats, tiles, plan)
    # Three launches without work where nothing is flagged: to ask would wait for the device.
    _launch_gemm(hidden_CD, stats, tiles, plan, peak=True, flagged=True)
    _launch_reduce(stats, tiles, plan, peak=True, flagged=True)
    if exps_CV is not None:
        _launch_gemm(hidden_CD, stats, tiles, plan, exps_CV=exps_CV, flagged=True)
    return exps_CV


def _launch_target_logit(hidden_CD: Tensor, stats: RowStats, tiles: TileSums, plan: Plan) -> None:
    """Fills target2, with a cap slope, and the half tiles that hold a target."""
    (n_rows, width), head = hidden_CD.shape, plan.head
    launch(
        _target_logit,
        triton.cdiv(n_rows, 16),
        hidden_ptr=hidden_CD,
        weight_ptr=head.weight,
        target_ptr=stats.targets,
        gain_ptr=stats.gain,
        bias_ptr=head.bias,
        shape=head.shape,
        BIAS=head.bias is not None,
        target2_ptr=stats.target2,
        slope_ptr=stats.slope,
        holds_ptr=tiles.holds,
        n_rows=n_rows,
        width=width,
        halves=tiles.holds.shape[1],
        hidden_stride=hidden_CD.stride(0),
        weight_stride=head.weight.stride(0),
        BLOCK_M=16,
        BLOCK_D=128,
        TILE_M=plan.tile.block_m,
        HALF_N=plan.tile.block_n // 2,
    )


def _launch_gemm(
    hidden_CD: Tensor,
    stats: RowStats,
    tiles: TileSums,
    plan: Plan,
    *,
    exps_CV: Tensor | None = None,
    reference2: Tensor | None = None,
    peak: bool = False,
    flagged: bool = False,
) -> None:
    weight_VD, tile = plan.head.weight, plan.tile
    operands = [(hidden_CD, tile.block_m, tile.block_k), (weight_VD, tile.block_n, tile.block_k)]
    if exps_CV is not None:
        operands.append((exps_CV, tile.block_m, tile.block_n // 2))
    tma = capability_of(weight_VD.device) >= (9, 0) and all(_aligned(x) for x, _, _ in operands)
    # All or none: one constexpr chooses the loads of both operands and the store.
    sources = [_descriptor(*operand) if tma else operand[0] for operand in operands]
    (n_rows, width), vocabulary = hidden_CD.shape, weight_VD.shape[0]
    n_tiles = triton.cdiv(n_rows, tile.block_m) * triton.cdiv(vocabulary, tile.block_n)
    launch(
        _gemm_exp,
        min(n_tiles, programs_of(weight_VD.device)),
        hidden=sources[0],
        weight=sources[1],
        exps=sources[2] if exps_CV is not None else None,
        target_ptr=stats.targets,
        reference_ptr=stats.reference2 if reference2 is None else reference2,
        gain_ptr=stats.gain,
        bias_ptr=plan.start,
        shape=plan.head.shape._replace(scale=plan.scale),
        flag_ptr=tiles.flags,
        sum_ptr=tiles.sums,
        peak_ptr=tiles.peaks,
        moment_ptr=tiles.moments,
        holds_ptr=tiles.holds,
        n_rows=n_rows,
        vocabulary=vocabulary,
        width=width,
        hidden_stride=hidden_CD.stride(0),
        weight_stride=weight_VD.stride(0),
        exps_stride=exps_CV.stride(0) if exps_CV is not None else 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        TMA=tma,
        TAIL=vocabulary % tile.block_n != 0,
        STORE=exps_CV is not None,
        PEAK=peak,
        FLAGGED=flagged,
        ENTROPY=plan.entropy,
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
    stats: RowStats, tiles: TileSums, plan: Plan, *, peak: bool = False, flagged: bool = False
) -> None:
    halves, n_rows = tiles.sums.shape
    # A program per row tile, which is what a flag stands for.
    launch(
        _reduce_rows,
        tiles.flags.shape[0],
        sum_ptr=tiles.sums,
        peak_ptr=tiles.peaks,
        moment_ptr=tiles.moments,
        target2_ptr=stats.target2,
        flag_ptr=tiles.flags,
        total_ptr=stats.total,
        shift_ptr=stats.shift2,
        moments_ptr=stats.moment,
        reference_ptr=stats.reference2,
        kappa_ptr=stats.kappa,
        missing_ptr=stats.missing,
        n_rows=n_rows,
        tiles_n=halves,
        BLOCK_M=plan.tile.block_m,
        BLOCK_N=32,
        PEAK=peak,
        FLAGGED=flagged,
        ENTROPY=plan.entropy,
        BITS=plan.bits,
    )


def _launch_gradient_operands(
    hidden_CD: Tensor,
    exps_CV: Tensor,
    *,
    scaled_CD: Tensor | None,
    pull_C: Tensor,
    lift_C: Tensor | None,
    stats: RowStats,
    plan: Plan,
) -> Tensor:
    """Writes E's target entries and fills scaled_CD; returns u_C."""
    # 8 rows a program: 1056 programs for the largest chunk, 8 a multiprocessor of an H100.
    u_C = torch.empty_like(stats.kappa)
    n_rows, width = hidden_CD.shape
    launch(
        _gradient_operands,
        triton.cdiv(n_rows, 8),
        hidden_ptr=hidden_CD,
        exps_ptr=exps_CV,
        scaled_ptr=scaled_CD,
        u_ptr=u_C,
        target_ptr=stats.targets,
        pull_ptr=pull_C,
        lift_ptr=lift_C,
        slope_ptr=stats.slope,
        kappa_ptr=stats.kappa,
        missing_ptr=stats.missing,
        n_rows=n_rows,
        width=width,
        hidden_stride=hidden_CD.stride(0),
        exps_stride=exps_CV.stride(0),
        LIFT=lift_C is not None,
        SLOPE=plan.head.capped,
        SCALED=scaled_CD is not None,
        DTYPE=TRITON_DTYPE[hidden_CD.dtype],
        BLOCK_M=8,
        BLOCK_D=512,
    )
    return u_C


def bias_sum(exps_CV: Tensor, u_C: Tensor) -> Tensor:
    n_rows, vocabulary = exps_CV.shape
    out_V = torch.empty(vocabulary, dtype=torch.float32, device=u_C.device)
    launch(
        _bias_gradient,
        triton.cdiv(vocabulary, 128),
        exps_ptr=exps_CV,
        u_ptr=u_C,
        out_ptr=out_V,
        n_rows=n_rows,
        vocabulary=vocabulary,
        exps_stride=exps_CV.stride(0),
        BLOCK_M=64,
        BLOCK_N=128,
    )
    return out_V


def values(stats: RowStats, *, entropy: bool) -> Values:
    """logp, lse and entropy from the sums: torch's log, exact near 1 where the hardware's is not.

    x = z_target - lse of the others; for rows relative to their target it is -log S, exactly.
    H = sum over the others of p (lse - z), minus p_target logp.
    """
    shift_K, log_total_K = stats.shift2 * LN2, stats.total.log()
    target_K = stats.target2 * LN2
    # Subtracted in units of log 2, where a row relative to its target gives exactly 0.
    logp_K = F.logsigmoid((stats.target2 - stats.shift2) * LN2 - log_total_K)
    lse_K = torch.logaddexp(target_K, shift_K + log_total_K)
    if not entropy:
        return Values(logp_K, lse_K, None)
    others_K = (lse_K - shift_K) * stats.total - stats.moment * LN2
    # 0 x -inf is NaN where the target has no probability.
    lowest = torch.finfo(torch.float32).min
    entropy_K = (shift_K - lse_K).exp() * others_K - logp_K.exp() * logp_K.clamp_min(lowest)
    return Values(logp_K, lse_K, entropy_K)

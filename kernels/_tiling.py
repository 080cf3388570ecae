"""Tile shapes per device and dtype, and the device code that kernels share.

A tile is BLOCK_M rows by BLOCK_N columns of a product, made in steps of BLOCK_K. It depends on the
device and the dtype only, never on the number of rows: a row's result then does not depend on how
many neighbours it has.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""TRITON_INTERPRET=1 when triton was imported: kernels run on a CPU, program after program."""

_INTERPRETED = tl.constexpr(INTERPRETED)

LOWEST = tl.constexpr(-1e38)
"""Peak of no logit at all: differences with it are finite."""

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@dataclass(frozen=True)
class Tile:
    """The GEMM's tile: sizes, pipeline stages, warps; see `tile_for`.

    Tile(128, 256, 64, stages=4, warps=8): 128 rows x 256 columns, 64 of D per step.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group_m: int = 16  # most row tiles that share a column tile in L2


def tile_for(dtype: torch.dtype, capability: tuple[int, int], *, capped: bool) -> Tile:
    """The tile of the scaled-exp GEMM.

    sm_90, half precision: 128 x 256, the largest whose accumulator leaves registers for an epilogue
    that works on halves of it; the epilogue of capped logits needs more and gets 128 x 128. sm_100:
    128 x 128; Triton 3.9 fails to compile the halves of 128 x 256, and of a cap with 8 warps.
    float32 products stay float32 (no TF32), on CUDA cores. Whether E is stored does not enter: the
    sums of scoring and training are bitwise equal.
    """
    if dtype is torch.float32:
        return Tile(64, 64, 16, stages=2, warps=8)
    if (9, 0) <= capability < (10, 0):
        return Tile(128, 128 if capped else 256, 64, stages=4, warps=8)
    if (10, 0) <= capability < (12, 0):
        return Tile(128, 64 if capped else 128, 64, stages=4, warps=4 if capped else 8)
    return Tile(128, 128, 32, stages=3, warps=8)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter takes the tiles of (9, 0)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def programs_of(device: torch.device) -> int:
    """Persistent programs: one per multiprocessor. The interpreter takes 3, so that each loops."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def equal_slices(n_rows: int, most: int, block: int) -> list[slice]:
    """[0, n_rows) in the fewest slices of at most `most` rows, of equal size in whole blocks."""
    if n_rows == 0:
        return []
    blocks = triton.cdiv(n_rows, block)
    step = block * triton.cdiv(blocks, triton.cdiv(blocks, max(1, most // block)))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Starts `programs` programs of a kernel; its arguments and constants by name.

    With fused multiply-adds, which Triton 3.10 turns off.
    """
    kernel[(programs,)](enable_fp_fusion=True, **arguments)


@triton.jit
def as_float32(x):
    """x in float32. The interpreter keeps bf16 as raw uint16, on which arithmetic is garbage."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        # bf16 is the upper half of a float32: a shift, exactly.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """float32 x in `dtype`, to nearest even. The interpreter truncates to bf16, so by hand there.

    The sum of the interpreter's branch cannot carry past infinity: x is not a NaN with all its low
    bits set.
    """
    if _INTERPRETED and dtype == tl.bfloat16:
        # Half a unit less one, plus the bit that will be the last: ties go to even.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh_and_slope(x):
    """tanh x and 1 - tanh^2 x from q = exp(-2|x|): the slope of a saturated logit is not 1 - 1."""
    q = tl.exp(-2.0 * tl.abs(x))
    inverse = 1.0 / (1.0 + q)
    tanh = tl.where(x < 0, q - 1.0, 1.0 - q) * inverse
    return tanh, 4.0 * q * inverse * inverse


@triton.jit
def logit_of(product, bias, shape, BIAS: tl.constexpr):
    """(z temperature, slope of the cap or 1) of products h . w; shape: a `LogitShape`.

    Without bias and cap the caller's gain holds shape.scale: one multiplication less.
    """
    slope = 1.0
    if BIAS or shape.cap is not None:
        product = product * shape.scale
    if BIAS:
        product += bias
    if shape.cap is not None:
        tanh, slope = tanh_and_slope(product / shape.cap)
        product = shape.cap * tanh
    return product, slope


@triton.jit
def log_sums2(target2, shift2, total):
    """Log-sum-exps in units of log 2: of the others, total relative to 2^shift2, and of all.

    total is 0 when every other logit is -inf; then shift2 is the lowest float, and so must the
    others' be.
    """
    others2 = shift2 + tl.log2(tl.where(total == 0, 1.0, total))  # not -inf: see above
    higher = tl.maximum(target2, others2)
    return others2, higher + tl.log2(tl.exp2(target2 - higher) + tl.exp2(others2 - higher))


@triton.jit
def load_tile(
    source,
    row,  # of the tile's first element
    column,
    n_rows,  # of the matrix
    n_columns,
    stride,  # elements from one row to the next
    ROWS: tl.constexpr,  # of the tile
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """(ROWS, COLUMNS) of a row-major matrix from (row, column), 0 outside.

    `source` is a tensor descriptor (TMA) or a pointer; descriptors want rows of 16-byte multiples.
    """
    if TMA:
        # One thread asks, the copy engine fills shared memory: no registers for addresses or masks.
        value = source.load([row, column])
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = column + tl.arange(0, COLUMNS)
        inside = (offs_r < n_rows)[:, None] & (offs_c < n_columns)[None, :]
        # row x stride passes 2^31 elements at 14123 rows of a vocabulary of 152064.
        address = source + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :]
        value = tl.load(address, mask=inside, other=0.0)
    return value


@triton.jit
def store_tile(
    sink,
    value,
    row,  # of the tile's first element
    column,
    n_rows,  # of the matrix
    n_columns,
    stride,  # elements from one row to the next
    ROWS: tl.constexpr,  # of the tile
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """The inverse of `load_tile`; nothing outside is written."""
    if TMA:
        sink.store([row, column], value)
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = column + tl.arange(0, COLUMNS)
        inside = (offs_r < n_rows)[:, None] & (offs_c < n_columns)[None, :]
        address = sink + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :]
        tl.store(address, value, mask=inside)


@triton.jit
def dot_transposed(left, right, total):
    """total + left @ right.T in float32; float32 operands without TF32.

    The interpreter adds the products in float64: a BLAS may take another order of the sum for
    another row of the tile, which no device does and which would show in float32.
    """
    if _INTERPRETED:
        exact_left = as_float32(left).to(tl.float64)
        exact_right = as_float32(right).to(tl.float64)
        return total + tl.dot(exact_left, exact_right.T, out_dtype=tl.float64).to(tl.float32)
    return tl.dot(left, right.T, total, input_precision="ieee")

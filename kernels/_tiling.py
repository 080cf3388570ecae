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
    group_m: int = 8  # row tiles that share a column tile in L2


def tile_for(dtype: torch.dtype, capability: tuple[int, int], *, softcap: bool) -> Tile:
    """The tile of the scaled-exp GEMM.

    sm_90, half precision: 128 x 256, the largest whose accumulator leaves registers for an epilogue
    that works on halves of it; a softcap's epilogue needs more and gets 128 x 128. sm_100: 128 x
    128; Triton 3.9 fails to compile the halves of 128 x 256 and of a softcap with 8 warps.
    float32 products stay float32 (no TF32), on CUDA cores. Whether E is stored does not enter: the
    sums of scoring and training are bitwise equal.
    """
    if dtype is torch.float32:
        return Tile(64, 64, 16, stages=2, warps=8)
    if (9, 0) <= capability < (10, 0):
        return Tile(128, 128 if softcap else 256, 64, stages=4, warps=8)
    if (10, 0) <= capability < (12, 0):
        return Tile(128, 64 if softcap else 128, 64, stages=4, warps=4 if softcap else 8)
    return Tile(128, 128, 32, stages=3, warps=8)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter takes the tiles of (9, 0)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def programs_of(device: torch.device) -> int:
    """Persistent programs: one per multiprocessor. The interpreter takes 3, so that each loops."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """`programs` programs of a kernel, with fused multiply-adds, which Triton 3.10 turns off."""
    kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)


@triton.jit
def as_float32(x):
    """x in float32. The interpreter keeps bf16 as raw uint16, on which arithmetic is garbage."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
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
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_tile(
    source,
    row,
    column,
    rows,
    columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """(ROWS, COLUMNS) of a row-major matrix from (row, column), 0 outside.

    `source` is a tensor descriptor (TMA) or a pointer; descriptors want rows of 16-byte multiples.
    """
    if TMA:
        value = source.load([row, column])
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = column + tl.arange(0, COLUMNS)
        inside = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        address = source + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :]
        value = tl.load(address, mask=inside, other=0.0)
    return value


@triton.jit
def store_tile(
    sink,
    value,
    row,
    column,
    rows,
    columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """The inverse of `load_tile`; nothing outside is written."""
    if TMA:
        sink.store([row, column], value)
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = column + tl.arange(0, COLUMNS)
        inside = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
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

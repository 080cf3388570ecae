"""float32 products by a CPU's bfloat16 units: AVX512-BF16 or AMX.

oneDNN cuts float32 operands back to bfloat16 and adds in float32. Of operands that are bfloat16
values this loses nothing but subnormal numbers, and with AMX takes a third of the time.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

MKLDNN: Any = torch.backends.mkldnn  # of a type that its stubs do not have


class Units:
    """float32 products by a CPU's bfloat16 units, for operands that are bfloat16 values in float32.

    torch's switch is the process's, not the thread's. While a pass runs, another thread's products
    of float32 numbers lose digits, and `torch.get_float32_matmul_precision` is an error. Passes of
    several threads may overlap: the last one gives the switch back.
    """

    def __init__(self) -> None:
        self.lock, self.passes, self.before = threading.Lock(), 0, "none"

    def __enter__(self) -> None:
        with self.lock:
            if not self.passes:
                # What it has of its parent stays the parent's to say.
                own, parent = MKLDNN.matmul.fp32_precision, MKLDNN.fp32_precision
                self.before = "none" if own == parent else own
                MKLDNN.matmul.fp32_precision = "bf16"
            self.passes += 1

    def __exit__(self, *_error: object) -> None:
        with self.lock:
            self.passes -= 1
            if not self.passes:
                MKLDNN.matmul.fp32_precision = self.before


UNITS = Units()


def of(hidden_TD: torch.Tensor) -> AbstractContextManager[None]:
    """What a pass over hidden states runs in: `UNITS` for bfloat16 ones of such a CPU."""
    on_cpu = hidden_TD.device.type == "cpu"
    wanted = on_cpu and hidden_TD.dtype is torch.bfloat16 and _has_units()
    return UNITS if wanted else nullcontext()


@cache
def _has_units() -> bool:
    """AVX512-BF16 or AMX. With AVX512 alone oneDNN would emulate them."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

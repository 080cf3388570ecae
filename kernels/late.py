"""Classes of the head whose gradients come last, so that their dW lends its memory until then.

A pass over many rows makes its logits for C of them at a time, and the dW that it makes on a CPU is
memory without numbers (products.py). Of V classes the last L are late:

    | dW of the early classes, (V - L, D)           | dW of the late ones, (L, D): no numbers yet |
    | each chunk of rows adds its part              | the chunk's early logits, then dz (C, V - L) |

1. A chunk: late logits in the lent memory, for the sums of its rows alone; then early logits
   there, whole sums, and the early gradients.
2. After the last chunk: late logits once more, in what is left of that memory, and their gradients.

C (V - L) = L D, so the late logits, made twice, cost C / (C + D) of one GEMM in three: 0.25 at
C = 171, D = 512. The pass holds its gradients, the tile, and a few numbers per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vpgea_fast.kernels.contract import Head, Sinks
from vpgea_fast.kernels.epilogue import dlogits_, put_logits_, row_sums_
from vpgea_fast.kernels.products import add_gradients_, room_in_dweight
from vpgea_fast.kernels.shards import RowSums, placed

Tensor = torch.Tensor

ROWS = (176, 704)
"""Rows of a chunk: D / 3 between these, D / 2 at most. More make more classes late; with fewer a
CPU's products lose more than that (two cores, D of 256 to 4096)."""
LAST_ROWS = 2048
"""Most rows whose late gradients are made at once: dW of the late classes is read per so many."""
TILE = 1536 << 10
"""Most bytes of a late tile; 3 / 8 of dX where that is less."""
SMALL = 16 << 20
"""Bytes of a dW that stays in the cache: there chunks of 3 MiB are as small, and faster."""


@dataclass(frozen=True, kw_only=True)
class LateClasses:
    """The late classes of one pass over K rows, and the memory that they lend."""

    head: Head  # of all classes
    sinks: Sinks
    targets_K: Tensor
    first: int
    """The first late class."""
    rows: int
    """Rows of a chunk."""
    tile: Tensor
    """Memory of the late logits of some rows and classes."""

    @property
    def early(self) -> tuple[Head, Sinks]:
        classes = slice(0, self.first)
        return self.head.part(classes), self.sinks.part(classes)

    def room(self, rows: int, classes: int) -> Tensor:
        """(rows, classes) in dW of the late classes."""
        assert self.sinks.weight is not None
        return self.sinks.weight[self.first :].view(-1)[: rows * classes].view(rows, classes)

    def sums(self, hidden_CD: Tensor, chunk: slice) -> tuple[RowSums, Tensor]:
        """What the late logits of a chunk's rows add up to, and which targets are among them."""
        classes = slice(self.first, self.head.weight.shape[0])
        z_CL = self.room(hidden_CD.shape[0], classes.stop - classes.start)
        targets_C1, own_C1 = self._logits_(z_CL, hidden_CD, chunk, classes)
        return row_sums_(z_CL, None, targets_C1=targets_C1, own_C1=own_C1), own_C1

    def put_gradients_(
        self,
        values_K3: Tensor,
        upstream_K3: Tensor,
        read: Callable[[slice], tuple[Tensor, Any]],
    ) -> None:
        """Write dW of the late classes, and add what is theirs of dX and db.

        read: (hidden_CD, rows_C) of a slice of the rows that take part.
        """
        rows = values_K3.shape[0]
        for classes, memory in self._parts(min(rows, LAST_ROWS)):
            head, sinks = self.head.part(classes), self.sinks.part(classes)
            for start in range(0, rows, LAST_ROWS):
                chunk = slice(start, start + LAST_ROWS)
                hidden_CD, rows_C = read(chunk)
                z_CB = memory[: hidden_CD.shape[0] * head.weight.shape[0]]
                z_CB = z_CB.view(hidden_CD.shape[0], -1)
                targets_C1, own_C1 = self._logits_(z_CB, hidden_CD, chunk, classes)
                sums = row_sums_(z_CB, None, targets_C1=targets_C1, own_C1=own_C1)
                dlogits_(
                    z_CB,
                    plogp_CV=None,
                    slope_CV=None,
                    targets_C1=targets_C1,
                    own_C1=own_C1,
                    peak_C1=sums.peak,
                    values_C3=values_K3[chunk],
                    upstream_C3=upstream_K3[chunk],
                )
                add_gradients_(
                    z_CB,
                    hidden_CD,
                    rows_C,
                    head=head,
                    sinks=sinks,
                    sink_VD=sinks.weight,
                    unit=1.0,
                    upcast_BD=None,
                    begun=start > 0,
                    begun_hidden=True,
                )

    def _parts(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Some late classes after the other, with memory for their logits of so many rows: dW of
        those that still wait, and the tile where that is more."""
        assert self.sinks.weight is not None
        (end, width), start = self.sinks.weight.shape, self.first
        while start < end:
            memory, classes = self.tile, max(1, self.tile.numel() // rows)
            lent = (end - start) * width // (rows + width)
            if lent > classes:
                memory, classes = self.sinks.weight[start + lent :].view(-1), lent
            yield slice(start, min(start + classes, end)), memory
            start += classes

    def _logits_(
        self, z_CB: Tensor, hidden_CD: Tensor, chunk: slice, classes: slice
    ) -> tuple[Tensor, Tensor]:
        """Rewrites z_CB as logits of some classes; their targets, as `placed`."""
        put_logits_(
            z_CB, None, hidden_CD, head=self.head.part(classes), upcast_BD=None, chunk=chunk
        )
        return placed(self.targets_K[chunk].unsqueeze(1), range(classes.start, classes.stop))


def late_classes(head: Head, sinks: Sinks, targets_K: Tensor) -> LateClasses | None:
    """How many classes wait, in a pass that has one buffer of logits; None where none should: dW is
    small or has numbers, rows are few, or a number is rounded on its way."""
    sink_VD, rows = sinks.weight, targets_K.shape[0]
    if not sinks.fresh or sink_VD is None or sink_VD.nbytes <= SMALL:
        return None
    same = {head.weight.dtype, *(x.dtype for x in (sinks.hidden,) if x is not None)}
    if same != {sink_VD.dtype} or not sink_VD.is_contiguous():
        return None
    if room_in_dweight(sinks, rows, sink_VD.dtype) is not None:
        return None
    classes, width = sink_VD.shape
    most = min(width // 2, max(ROWS[0], min(width // 3, ROWS[1])))
    if most < 1 or rows <= most:
        return None
    step = math.ceil(rows / math.ceil(rows / most))
    late = math.ceil(classes * step / (step + width))
    # As many rows at least as a tile may have: one class is the least.
    entries = max(min(rows, LAST_ROWS), min(TILE // sink_VD.itemsize, 3 * rows * width // 8))
    return LateClasses(
        head=head,
        sinks=sinks,
        targets_K=targets_K,
        first=classes - late,
        rows=step,
        tile=sink_VD.new_empty(entries),
    )

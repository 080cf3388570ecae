"""Tensors in host memory that a device works on block by block.

    host block -> device: copied in | work on the device | device -> host block: copied out

Three streams of CUDA, so that a block is worked on while the next one comes and the one before
leaves; on a CPU the same calls, one after the other. The host's tensors are page-locked for CUDA:
others would be copied at a fraction of the rate, and the process would wait for each.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

BLOCK = 2**24
"""Elements that are worked on at a time, at most. CUDA's copies reach their full rate from a few
MB on; a larger block only takes more of the device."""
DEPTH = 3
"""Blocks on the device at once: one comes, one is worked on, one leaves."""
ALIGNED = 64
"""Elements that a tensor's place is a multiple of, so that kernels may read 16 bytes at a time."""
MEMORY = Path("/proc/meminfo")
"""What Linux says of the machine's memory. Of a container's own limit it knows nothing."""

Work = Callable[..., None]
"""Takes the device's copies of a block's tensors, (N,) each, and changes them in place."""


class _Pages(mmap.mmap):
    """Memory of the host's that CUDA has locked, or not; free again with its last tensor."""

    locked_at: int | None = None

    def __del__(self) -> None:
        # Not left to munmap: what CUDA has locked would stay taken.
        if self.locked_at is not None:
            # At the interpreter's end torch may be gone before, and in a forked child CUDA is.
            with suppress(Exception):
                cudart: Any = torch.cuda.cudart()
                cudart.cudaHostUnregister(self.locked_at)


def host_tensors(
    shapes: Iterable[torch.Size], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Make tensors of zeros in host memory, in one piece that is page-locked where `device` is
    CUDA.

    In one piece, since torch's own locked memory is rounded up to a power of two, tensor by tensor:
    up to twice of what is asked for. MemoryError, with what to do, where there is not as much.
    """
    shapes = list(shapes)
    starts, end = [], 0
    for shape in shapes:
        starts.append(end)
        end += -(-math.prod(shape) // ALIGNED) * ALIGNED
    if not end:  # of which no map can be made
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]
    size = end * dtype.itemsize
    # Linux promises more than there is, and kills the process that takes it, without a word.
    if (free := _free()) is not None and size > free:
        raise MemoryError(_refused(size, f"{free / 2**30:.1f} GiB are free"))
    # Shared, which is mmap's default: after a fork private pages would move at the next write, and
    # CUDA would copy from where they were.
    try:
        pages = _Pages(-1, size)
    except OSError as error:
        raise MemoryError(_refused(size, str(error))) from error
    # The tensors hold the pages: these go with the last of them.
    whole = torch.frombuffer(pages, dtype=dtype)
    if device.type == "cuda":
        _lock(pages, whole, size)
    return [
        whole[start : start + math.prod(shape)].view(shape)
        for start, shape in zip(starts, shapes, strict=True)
    ]


def _free() -> int | None:
    """Read the bytes that the machine could still give; None where it does not say."""
    with suppress(OSError, ValueError, LookupError, StopIteration):
        lines = MEMORY.read_text().splitlines()
        # Not MemFree: what caches files is given away when it is asked for.
        return 1024 * int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1])
    return None


def _lock(pages: _Pages, whole: torch.Tensor, size: int) -> None:
    cudart: Any = torch.cuda.cudart()
    # Brings all pages in, so it also takes what Linux has only promised: seconds for tens of GiB.
    failed = int(cudart.cudaHostRegister(whole.data_ptr(), size, 0))
    if failed:
        raise MemoryError(_refused(size, f"CUDA error {failed}"))
    pages.locked_at = whole.data_ptr()


def _refused(size: int, why: str) -> str:
    return (
        f"parallel.cpu_offload: got true, but {size / 2**30:.1f} GiB of host memory cannot be had "
        f"for it ({why}); expected as much free and lockable (ulimit -l): free it, or set false"
    )


class Blocks:
    """Room on a device for the tensors of `DEPTH` blocks: of each block one tensor per dtype, of
    `size` elements at most."""

    def __init__(self, device: torch.device, dtypes: Sequence[torch.dtype], size: int) -> None:
        # Of the stream that works; the other two are done with them when they are freed (`run`), so
        # the allocator need not know of these (`record_stream`).
        self.rooms = [
            [torch.empty(size, dtype=dtype, device=device) for dtype in dtypes]
            for _ in range(DEPTH)
        ]
        cuda = device.type == "cuda"
        self.here = _Stream(torch.cuda.current_stream(device) if cuda else None)
        # One for each way: PCIe sends and receives at once, a stream does one thing after another.
        self.coming, self.leaving = (
            _Stream(torch.cuda.Stream(device) if cuda else None) for _ in range(2)
        )

    def run(self, blocks: Iterable[tuple[Sequence[torch.Tensor], Work]]) -> None:
        """Bring every block's host tensors (N,) to the device, work, and take them back.

        At the return they are back, and the rooms are free; after an error nothing is on its way,
        and some blocks are worked on. No block may hold what another does.
        """
        # What used this memory before may still run.
        self.coming.after(self.here.mark())
        try:
            self._queue(blocks)
        finally:
            # The host reads them next, for a checkpoint, and asks no stream. And whoever catches an
            # error may free the rooms or the host's pages, which copies would still go to.
            self.coming.wait()
            self.leaving.wait()

    def _queue(self, blocks: Iterable[tuple[Sequence[torch.Tensor], Work]]) -> None:
        # Only queues: on CUDA it may be done with all blocks (739 of 7B) before the first has come.
        free: list[Any] = [None] * DEPTH
        for number, (host, work) in enumerate(blocks):
            place = number % DEPTH
            own = [room[: h.numel()] for room, h in zip(self.rooms[place], host, strict=True)]
            # A room's last tenant must have left: this alone bounds how far the copies run ahead.
            self.coming.after(free[place])
            self.coming.copy(own, host)
            self.here.after(self.coming.mark())
            work(*own)
            self.leaving.after(self.here.mark())
            self.leaving.copy(host, own)
            free[place] = self.leaving.mark()


class _Stream:
    """A stream of CUDA; on a CPU (None) everything is done when the call returns."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def mark(self) -> Any:
        """Say a point of this stream that others can wait for."""
        return None if self.stream is None else self.stream.record_event()

    def after(self, mark: Any) -> None:
        """Let what is queued here from now on wait for `mark`."""
        if mark is not None:
            self.stream.wait_event(mark)

    def copy(self, into: Sequence[torch.Tensor], of: Sequence[torch.Tensor]) -> None:
        with torch.cuda.stream(self.stream):  # of None: nothing
            for target, source in zip(into, of, strict=True):
                target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Let the process wait for all that is queued here."""
        if self.stream is not None:
            self.stream.synchronize()

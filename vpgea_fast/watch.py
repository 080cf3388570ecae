"""Says where every process of a run stands when one of them waits too long for the others.

    stack of the main thread, looked at now and then -> the same for most of the time-out
    -> a word in the store -> every process writes its stacks to stderr, and its place in the store
    -> the first one says in a line which processes wait where

At `parallel.timeout_minutes` the backend ends the job: gloo raises in the process that waits, NCCL
aborts it, and torchrun ends the others without a word. What they did is seen only before.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch._C._distributed_c10d import TCPStore

from vpgea_fast.distributed import World

LATE = 0.8
"""Share of the time-out after which a process that has not moved raises the alarm."""
LOOKS = 25
"""Looks at the stack in one time-out. The report takes four more: it is out before the end."""
ELSEWHERE = ("rollout", "verify")
"""Rooms whose waits have time-outs of their own."""
PACKAGE = Path(__file__).parent
FRAMES = 3
"""Functions of this package that a place names, the innermost first."""

Stack = tuple[tuple[Any, int], ...]
"""(code, instruction) of every frame, the innermost first."""


class Watch:
    """Watches the thread that makes it, from a thread of its own, until `close`. A collective.

    Nothing is done in a world of one process. Whatever becomes of the watch, the run goes on.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._ident, self._closed = threading.get_ident(), threading.Event()
        self._period = world.timeout.total_seconds() / LOOKS
        self._thread: threading.Thread | None = None
        if world.size == 1:
            return
        # A name of its own: torchrun's store outlives the processes of a restart.
        self._name = world.gather(uuid.uuid4().hex)[0]
        # NCCL aborts: then at least this process's stacks are seen.
        if not faulthandler.is_enabled():
            faulthandler.enable()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch; a report that is under way is finished."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(5 * self._period)

    def _run(self) -> None:
        # The store may end first, with the process that keeps it: then nobody is left to tell.
        try:
            self._look(_connection(self.world.timeout))
        except (RuntimeError, OSError):
            return

    def _look(self, store: Any) -> None:
        """Look at the thread's stack until it has stood still too long here or elsewhere."""
        stack, since = self._stack(), time.monotonic()
        late_s = LATE * self.world.timeout.total_seconds()
        while not self._closed.wait(self._period):
            now = self._stack()
            if now != stack:
                stack, since = now, time.monotonic()
            waited_s = time.monotonic() - since
            # The first to add to the number is the one that speaks.
            raised = waited_s >= late_s and self._waits(stack)
            first = raised and store.add(f"{self._name}/alarm", 1) == 1
            if raised or store.check([f"{self._name}/alarm"]):
                self._report(store, waited_s if first else None)
                return

    def _report(self, store: Any, waited_s: float | None) -> None:
        """Write this process's stacks; say where all stand, in the process that has `waited_s`."""
        _to_stderr(f"process {self.world.rank}: stacks of its threads\n{_stacks()}")
        store.set(f"{self._name}/{self.world.rank}", self._place())
        if waited_s is None:
            return
        # Each looks once a period, and writes its stacks first.
        end, missing = time.monotonic() + 3 * self._period, set(range(self.world.size))
        while missing and time.monotonic() < end:
            missing = {rank for rank in missing if not store.check([f"{self._name}/{rank}"])}
            time.sleep(self._period / 10)
        places: defaultdict[str, list[int]] = defaultdict(list)
        for rank in range(self.world.size):
            known = rank not in missing
            text = store.get(f"{self._name}/{rank}").decode() if known else "does not answer"
            places[text].append(rank)
        where = "; ".join(f"process {_numbers(ranks)}: {text}" for text, ranks in places.items())
        _to_stderr(
            f"process {self.world.rank} has not moved for {waited_s:.0f} s (the job ends at "
            f"parallel.timeout_minutes, {self.world.timeout.total_seconds():.0f} s): {where}"
        )

    def _frames(self) -> list[FrameType]:
        # A thread that has ended has no frame: the process is on its way out.
        frame, frames = sys._current_frames().get(self._ident), []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return frames

    def _stack(self) -> Stack:
        return tuple((frame.f_code, frame.f_lasti) for frame in self._frames())

    def _waits(self, stack: Stack) -> bool:
        """Whether such a stack may wait for other processes: in torch's collectives, or on a GPU in
        anything but a room with time-outs of its own."""
        files = [code.co_filename for code, _ in stack]
        if any(f"torch{os.sep}distributed" in file for file in files):
            return True
        own = [str(PACKAGE / room) for room in ELSEWHERE]
        return self.world.device.type == "cuda" and not any(
            f.startswith(r) for f in files for r in own
        )

    def _place(self) -> str:
        """Name the innermost functions of this package on the stack, or the innermost of all."""
        frames = self._frames()
        # The reader knows this package; what torch calls inside itself says little.
        inner = [f for f in frames if Path(f.f_code.co_filename).is_relative_to(PACKAGE)]
        return " < ".join(
            f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
            for frame in (inner or frames)[:FRAMES]
        )


def _connection(timeout: timedelta) -> Any:
    """Open a connection of its own to the store of torchrun: that of the collectives answers one
    thread at a time, however long its question takes."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:  # faulthandler writes to a descriptor, line by line
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(ranks: list[int]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

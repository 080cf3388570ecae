"""When a run has to leave before its last step: a signal, its clock, or a callback asks for it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from vpgea_fast.distributed import Stopped, World

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether the run was asked to end, and the two places where it may leave.

    `requested` may be set by anyone. Inside its `with` block SIGTERM and Ctrl-C set it, and `tell`
    gets a line at once; a second Ctrl-C interrupts. A thread that is not the main one hears no
    signal.
    """

    def __init__(
        self,
        world: World,
        max_minutes: float | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self.world, self.requested, self.tell = world, False, tell
        # Monotonic: a clock that is set back must not let the scheduler's limit pass unseen.
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        # Python sets handlers in the main thread only, and `fit` may be called from another.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        # `fit` may run inside a program that has handlers of its own.
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    @property
    def due(self) -> bool:
        """Whether this process was asked to leave, or its time is over."""
        return self.requested or (self.deadline is not None and time.monotonic() > self.deadline)

    def alone(self) -> None:
        """Raise Stopped in this process, if it is due: inside work whose end, or whose failure, all
        processes reach together."""
        if self.due:
            raise Stopped

    def together(self) -> None:
        """Raise Stopped in all processes, if it is due in any. A collective: a clock or a signal of
        one process is heard by all or by none."""
        if self.world.any(self.due):
            raise Stopped

    def _hear(self, number: int, _: FrameType | None) -> None:
        # A scheduler may send SIGTERM many times, and each finds the save still under way.
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.requested = not self.requested, True
        if first and self.tell is not None:
            heard = f"{signal.Signals(number).name}: saves before it ends, which may take a step"
            if number == signal.SIGINT:
                heard += "; a second Ctrl-C does not wait"
            # A handler may interrupt a print, and one thread cannot enter a stream twice.
            with contextlib.suppress(RuntimeError):  # no thread is left
                threading.Thread(target=self.tell, args=(heard,), daemon=True).start()

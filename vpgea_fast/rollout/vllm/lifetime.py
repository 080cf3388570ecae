"""Bind the processes that vLLM starts to the one that started them, and watch over them.

They end with it, and at its word alone. A trainer that waits for a dead or silent one is woken.
"""

from __future__ import annotations

import ctypes
import functools
import math
import multiprocessing.process
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path as FilePath
from typing import Any, NoReturn

LEAVE = 34
"""The signal by which a process of an engine is asked to end by the one that started it: the first
of Linux's real-time signals, which no terminal, scheduler or launcher sends."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the one that started it ends."""


def end_with_parent(number: int) -> None:
    """Have Linux send this process a signal when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def ending_with_this_process() -> Iterator[list[int]]:
    """Bind what `multiprocessing` starts meanwhile, and what that starts; yield the ids.

    They end with this process, which is for Linux the thread that is here, and at its word alone.
    vLLM 0.32 lets them outlive a killed trainer, for ever if it still waits for them to start.
    They also obey a Ctrl-C or a scheduler's SIGTERM, which come to every process of a job, before
    the trainer has saved.
    """
    start, ids = multiprocessing.process.BaseProcess.start, list[int]()

    def start_bound(process: Any) -> None:
        # A partial of a module's function: it can be pickled, which the start method `spawn` needs.
        process._target = functools.partial(_run_bound, os.getpid(), process._target)
        start(process)
        # vLLM ends its processes by `terminate`, whose SIGTERM they ignore now.
        process.terminate = functools.partial(os.kill, process.pid, LEAVE)
        ids.append(process.pid)

    multiprocessing.process.BaseProcess.start = start_bound  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield ids
    finally:
        multiprocessing.process.BaseProcess.start = start


def _run_bound(parent: int, target: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run `target`, the whole of a process; when `parent` ends, SIGKILL ends it at once.

    SIGINT and SIGTERM are ignored. What `target` would do at SIGTERM it does at LEAVE.
    """
    end_with_parent(signal.SIGKILL)
    # A parent that ended before the line above sends nothing any more.
    if os.getppid() != parent:
        os._exit(1)
    install = signal.signal
    for number in (signal.SIGINT, signal.SIGTERM):
        install(number, signal.SIG_IGN)

    def install_elsewhere(number: int, handler: Any) -> Any:
        if number == signal.SIGINT:
            return signal.SIG_IGN
        return install(LEAVE if number == signal.SIGTERM else number, handler)

    # `target` would set handlers of its own over the two above. Not by a mask: threads that torch
    # has started at its import would still take the signals.
    signal.signal = install_elsewhere
    # An engine core starts workers, which are bound to it in the same way.
    with ending_with_this_process():
        target(*args, **kwargs)


class _Interrupt(BaseException):
    """Stands for a Ctrl-C or a SIGTERM where vLLM would drop a KeyboardInterrupt."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a Ctrl-C end the block, and a SIGTERM that the program hears.

    vLLM 0.32 drops a KeyboardInterrupt while it waits for its engine to start, and waits on, for up
    to ten minutes.
    """

    def interrupt(number: int, _: object) -> NoReturn:
        raise _Interrupt(number)

    # Signals reach the main thread alone; a handler that is not Python's own is the trainer's.
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    # Of SIGTERM, one that no Python handler hears ends the process by itself.
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    except _Interrupt as error:
        raise KeyboardInterrupt(*error.args) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Guard(threading.Thread):
    """Wakes a trainer that waits for a dead engine, and kills an engine that is silent.

    vLLM 0.32's client would wait for ever, for tokens (its queue) and for answers to calls (its
    futures) alike.
    """

    def __init__(self, client: Any, engine: int) -> None:
        super().__init__(daemon=True)
        # Weak: vLLM's client shuts down when it is collected, which this thread must not delay.
        self.client, self.engine = weakref.ref(client), engine
        self.until = math.inf

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Allow the engine `seconds` for what is called in the block."""
        self.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self.until = math.inf

    def engine_runs(self) -> bool:
        """Tell whether the engine's process runs, or is stopped."""
        return _runs(self.engine)

    def run(self) -> None:
        from vllm.v1.engine.exceptions import (  # pyright: ignore[reportMissingImports]
            EngineDeadError,
        )

        # By /proc: `waitpid` would take the child's exit status away from multiprocessing.
        while self.engine_runs():
            time.sleep(0.5)
            if time.monotonic() > self.until:
                with suppress(ProcessLookupError):
                    os.kill(self.engine, signal.SIGKILL)
        if (client := self.client()) is not None:
            client.resources.engine_dead = True
            client.outputs_queue.put_nowait(EngineDeadError())
            for future in list(client.utility_results.values()):
                if not future.done():
                    future.set_exception(EngineDeadError())


def is_dead(error: BaseException) -> bool:
    """Tell whether vLLM says that its engine is dead."""
    # By name: importing the class would import vLLM.
    return type(error).__name__ == "EngineDeadError"


def _runs(process: int) -> bool:
    """Tell whether a process is neither gone nor a zombie that nobody has waited for yet."""
    try:
        stat = FilePath(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    # The name, in parentheses, may hold spaces and parentheses: the state follows the last one.
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")

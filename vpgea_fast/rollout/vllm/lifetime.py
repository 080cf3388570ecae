"""Processes that vLLM starts: they end with the one that started them, and at its word alone; and a
trainer that waits for a dead or silent one is told."""

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
    """Let this process get a signal when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def ending_with_this_process() -> Iterator[list[int]]:
    """What `multiprocessing` starts meanwhile, and what that starts, ends with this process and at
    its word alone; the ids of what was started.

    vLLM 0.32's processes outlive a trainer that is killed, for ever if it still waits for them to
    start; and they obey a Ctrl-C or a scheduler's SIGTERM, which come to every process of a job,
    before the trainer has saved. "This process" is for Linux the thread that is here.
    """
    start, started = multiprocessing.process.BaseProcess.start, list[int]()

    def start_bound(process: Any) -> None:
        process._target = functools.partial(_run_bound, os.getpid(), process._target)
        start(process)
        process.terminate = functools.partial(os.kill, process.pid, LEAVE)
        started.append(process.pid)

    multiprocessing.process.BaseProcess.start = start_bound  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield started
    finally:
        multiprocessing.process.BaseProcess.start = start


def _run_bound(parent: int, target: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run `target`, the whole of a process, which ends by SIGKILL when `parent` ends, whatever it
    is doing; SIGINT and SIGTERM are ignored, what it would do at SIGTERM it does at LEAVE."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    install = signal.signal
    for number in (signal.SIGINT, signal.SIGTERM):
        install(number, signal.SIG_IGN)

    def install_elsewhere(number: int, handler: Any) -> Any:
        if number == signal.SIGINT:
            return signal.SIG_IGN
        return install(LEAVE if number == signal.SIGTERM else number, handler)

    # Not by a mask: threads that torch has started at its import would still take the signals.
    signal.signal = install_elsewhere
    with ending_with_this_process():
        target(*args, **kwargs)


class _Interrupt(BaseException):
    """A Ctrl-C."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Hear a Ctrl-C: vLLM 0.32 drops a KeyboardInterrupt while it waits for its engine to start,
    and goes on to wait, for up to ten minutes."""

    def interrupt(*_: object) -> NoReturn:
        raise _Interrupt

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except _Interrupt:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Guard(threading.Thread):
    """Wakes a trainer that waits for a killed engine: vLLM 0.32's client would wait for ever, for
    tokens (its queue) and for answers to calls (its futures) alike. Kills one that is silent."""

    def __init__(self, client: Any, engine: int) -> None:
        super().__init__(daemon=True)
        self.client, self.engine = weakref.ref(client), engine
        self.until = math.inf

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        self.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self.until = math.inf

    def run(self) -> None:
        from vllm.v1.engine.exceptions import (  # pyright: ignore[reportMissingImports]
            EngineDeadError,
        )

        while _runs(self.engine):
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
    """By name: the class is vLLM's."""
    return type(error).__name__ == "EngineDeadError"


def _runs(process: int) -> bool:
    """Not gone, and no zombie that nobody has waited for yet."""
    try:
        stat = FilePath(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")

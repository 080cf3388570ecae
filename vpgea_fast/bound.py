"""Processes that end with the one that started them, however that ends: a killed parent would leave
processes that hold its devices and its locks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PROGRAM = """
import sys
from vpgea_fast.bound import bind
bind(int(sys.argv.pop(1)))
from vpgea_fast.cli import main
sys.exit(main())
"""
PR_SET_PDEATHSIG = 1


def bind(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Get a signal when `parent`, which has started this process, ends; SystemExit if it has."""
    # The kernel sends the signal, asked by the child: a parent that is killed can send none.
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    # Of a parent that was killed before that line.
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


def bound_command(words: Sequence[str]) -> list[str]:
    """Give the command of `vpgea WORDS` in a process that gets SIGTERM when this one ends."""
    return [sys.executable, "-c", PROGRAM, str(os.getpid()), *words]


@contextmanager
def blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Start processes that these signals do not reach; of this one they wait for the end."""
    # A mask, which children inherit: a signal meanwhile waits here, and is lost nowhere.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""One command in several processes of this machine, as torchrun would start them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import IO

from vpgea_fast.cli.words import UsageError

POLL_S, PATIENCE_S = 0.1, 10.0
"""Seconds between two looks, and for what has to end by itself."""
SHARED = "VPGEA_SHARED_COMMAND"
"""Set in these processes: what has ended one of them is said by the command that started all."""
LOST = 4
"""Exit status of such a process that lost another, and says nothing."""


def run_processes(words: Sequence[str], count: int, advice: Callable[[], str]) -> int:
    """Run `vpgea WORDS` in `count` processes, which end with this one; return the status of the
    first that failed.

    Process 0 speaks. What another says is shown when it alone has failed. `advice` says how to go
    on behind one that was killed.
    """
    # torchrun sets it: each of its processes would start as many again.
    if "RANK" in os.environ:
        raise UsageError("--processes inside torchrun; give one of the two")
    from torch._C._distributed_c10d import TCPStore

    from vpgea_fast.bound import blocked, bound_command

    # The store is this process's, as torchrun keeps it: no free port is guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(hours=1))
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # As torchrun does: each would take all cores.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        SHARED: "1",
    }
    command = bound_command(words)
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as said:
        try:
            # Each would say that a Ctrl-C has interrupted it, and this one ends them.
            with blocked(signal.SIGINT):
                for rank in range(count):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    # A file and not a pipe: unread, that would fill up and block its process.
                    out = said if rank else None
                    env = {**os.environ, **shared, **own}
                    child = subprocess.Popen(command, env=env, stdout=out, stderr=out)
                    children.append(child)
            return _wait(children, said, advice)
        finally:
            # Whatever ended the wait, a Ctrl-C too: no child may keep a device.
            for child in children:
                child.terminate()
            for child in children:
                child.wait()


def silent_if_lost(work: Callable[[], int]) -> int:
    """Do the work of one of several processes; where it loses another, `run_processes` names it."""
    from vpgea_fast.distributed import LostError

    try:
        return work()
    except LostError:
        if SHARED not in os.environ:
            raise
        return LOST


def _wait(
    children: Sequence[subprocess.Popen[bytes]], said: IO[bytes], advice: Callable[[], str]
) -> int:
    codes = _ended(children)
    failed = [code for code in codes if code]
    if not failed:
        return 0
    killed = {rank: -code for rank, code in enumerate(codes) if code and code < 0}
    for rank, number in killed.items():  # it had no time to say anything
        name = signal.Signals(number).name
        print(f"vpgea: process {rank} was ended by {name}; {advice()}", file=sys.stderr)
    # It learns of it from the broken connection, or from this one.
    try:
        children[0].wait(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        children[0].terminate()
        children[0].wait()
    # Process 0 has shown no reason of its own, so the others' words are all there is.
    if not killed and children[0].returncode in (0, LOST, -signal.SIGTERM):
        said.seek(0)
        sys.stderr.write(said.read().decode(errors="replace"))
    first = next((code for code in failed if code != LOST), LOST)
    if first == LOST:  # each has blamed another, and none has spoken
        print(f"vpgea: the processes lost each other; {advice()}", file=sys.stderr)
    # Popen gives -n for a child that signal n ended; shells call that 128 + n.
    return first if first > 0 else 128 - first


def _ended(children: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all have ended, or one has failed; behind one that lost another, for that."""
    until = math.inf
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if None not in codes or set(failed) - {LOST} or time.monotonic() > until:
            return codes
        # Its connections break before its end is seen.
        if failed and until == math.inf:
            until = time.monotonic() + PATIENCE_S
        time.sleep(POLL_S)

"""One command in several processes of this machine, as torchrun would start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import IO

from vpgea_fast.cli.words import UsageError

POLL_S = 0.1


def run_processes(words: Sequence[str], count: int) -> int:
    """Run `vpgea WORDS` in `count` processes, which end with this one; return the first status that
    is not 0.

    Process 0 speaks. What another says is shown when it alone has failed.
    """
    # torchrun sets it: each of its processes would start as many again.
    if "RANK" in os.environ:
        raise UsageError("--processes inside torchrun; give one of the two")
    from torch._C._distributed_c10d import TCPStore

    from vpgea_fast.stop import bound_command

    # The store is this process's, as torchrun keeps it: no free port is guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(hours=1))
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # As torchrun does: each would take all cores.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    command = bound_command(words)
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as said:
        try:
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A file and not a pipe: unread, that would fill up and block its process.
                out = said if rank else None
                env = {**os.environ, **shared, **own}
                children.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
            return _wait(children, said)
        finally:
            # Whatever ended the wait, a Ctrl-C too: no child may keep a device.
            for child in children:
                child.terminate()
            for child in children:
                child.wait()


def _wait(children: Sequence[subprocess.Popen[bytes]], said: IO[bytes]) -> int:
    while True:
        codes = [child.poll() for child in children]
        if all(code == 0 for code in codes):
            return 0
        if failed := [code for code in codes if code]:
            break
        time.sleep(POLL_S)
    for rank, code in enumerate(codes):
        if code and code < 0:  # it had no time to say anything
            sys.stderr.write(f"vpgea: process {rank} was ended by {signal.Signals(-code).name}\n")
    # The others learn of it from the broken connection, and say so in lines of their own.
    try:
        children[0].wait(timeout=10)
    except subprocess.TimeoutExpired:
        children[0].terminate()
    # Process 0 has not failed, so it has shown no reason: the others' words are all there is.
    if (codes[0] is None and not children[0].returncode) or codes[0] == 0:
        said.seek(0)
        sys.stderr.write(said.read().decode(errors="replace"))
    # Popen gives -n for a child that signal n ended; shells call that 128 + n.
    return failed[0] if failed[0] > 0 else 128 - failed[0]

"""The processes of runs. On a CPU one process, the server, has imported torch and the trainer once,
and forks them: imports take 4 to 6 seconds of a core, a fork hundredths.

A forked run has the numbers of `vpgea train` in a process of its own. The server computes nothing,
so no pool of threads stands; it has one thread, or forks none; and generators begin anew in a fork.
Where that does not hold, off Linux and on a GPU each run is a new process: a driver that anything
has touched, a library's import too, does not survive a fork.

Sweep and server talk over a pair of sockets, a JSON packet each way:

    {"n": 7, "words": ["train", ...]}, with log and lock   ->  {"n": 7, "is": 4711}   a process
    {"n": 8, "pid": 4711, "signal": 0}                     ->  {"n": 8, "is": null}   it runs
    {"n": 9, "pid": 4711, "signal": 15}                    ->  {"n": 9, "is": -15}    as it ended
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy
import torch

from vpgea_fast.bound import bind, blocked, bound_command
from vpgea_fast.config.schema import known_keys
from vpgea_fast.distributed import pick_device
from vpgea_fast.stop import SIGNALS, Stop
from vpgea_fast.sweep.plan import SweepError

PROGRAM = """
import gc, sys
from vpgea_fast.cli import main
from vpgea_fast.sweep.server import serve
words = serve(*map(int, sys.argv[1:]))
try:
    sys.exit(main(words))
finally:
    gc.unfreeze()  # or nanobind, at exit, takes what was frozen for leaks
"""
IMPORTED = (
    "vpgea_fast.data",
    "vpgea_fast.trainer",
    "transformers.models.qwen2.modeling_qwen2",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
"""What a run imports, down to some ten files."""
LOOK_S = 0.05
PACKET = 1 << 17
"""Bytes: words of a run are paths and numbers."""


class Starter:
    """Starts runs, which inherit `lock` and get SIGTERM when this process ends, however it does.

    At the end of its `with` block all that it has forked is stopped and waited for.
    """

    def __init__(self, stop: Stop, lock: IO[str] | None = None) -> None:
        self.stop, self.lock = stop, lock
        self._server: subprocess.Popen[bytes] | None = None
        self._numbers, self._forks = itertools.count(), False

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._line.close()  # it ends its runs then
            if not self._forks:
                self._server.kill()  # of one that still imports: it has none
            self._server.wait()
            self._said.close()
            self._server, self._forks = None, False

    def start(
        self, words: Sequence[str], log: Path, device: str
    ) -> subprocess.Popen[bytes] | Forked:
        """Run `vpgea WORDS` on a device, as model.device names it, with its output behind `log`.

        Errors: SweepError where the server has ended; Stopped when asked to leave meanwhile.
        """
        kept = [] if self.lock is None else [self.lock.fileno()]
        with log.open("ab") as file:
            if sys.platform == "linux" and pick_device(device).type == "cpu" and self._open():
                return Forked(self, self.ask([file.fileno(), *kept], words=[*words]))
            return subprocess.Popen(
                bound_command(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # Of its own, so that a Ctrl-C reaches it once, from here.
                start_new_session=True,
                # Held until the last run has ended.
                pass_fds=kept,
            )

    def ask(self, files: Sequence[int] = (), **asked: Any) -> Any:
        """Ask the server, and return what it says. SweepError where it has ended."""
        number = next(self._numbers)
        try:
            socket.send_fds(self._line, [json.dumps({"n": number, **asked}).encode()], files)
            # Of a question whose answer a Ctrl-C cut off, that is still to be read.
            while (told := self._hear())["n"] != number:
                pass
        except ConnectionError:
            raise self._lost() from None
        return told["is"]

    def _open(self) -> bool:
        """Start the server, once; whether it may fork."""
        if self._server is None:
            self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # No pipe, which fills up and blocks; and it leaves no file.
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
            # A scheduler may send SIGTERM to all: the server has to outlive the runs.
            with theirs, blocked(*SIGNALS):
                self._server = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=self._said,
                    stderr=self._said,
                    start_new_session=True,
                    pass_fds=[theirs.fileno()],
                )
            while not select.select([self._line], [], [], LOOK_S)[0]:
                self.stop.alone()
            try:
                self._forks = self._hear()["threads"] == 1
            except ConnectionError:
                raise self._lost() from None
        return self._forks

    def _hear(self) -> dict[str, Any]:
        packet = self._line.recv(PACKET)
        if not packet:
            raise ConnectionResetError
        return json.loads(packet)

    def _lost(self) -> SweepError:
        # What ended it may have asked this process to leave, too.
        self.stop.alone()
        assert self._server is not None
        status = self._server.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        return SweepError(
            f"the process that forks the runs ended with status {status}: "
            f"{said[-1] if said else '-'}; they save and end, and the same command goes on"
        )


class Forked:
    """A forked run: of `subprocess.Popen` what a sweep asks for."""

    def __init__(self, starter: Starter, pid: int) -> None:
        self.pid, self._starter = pid, starter
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status; -n for signal n; None while it runs."""
        return self._send(0)

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        self._send(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for its end; return the exit status."""
        while (status := self.poll()) is None:
            time.sleep(LOOK_S)
        return status

    def _send(self, number: int) -> int | None:
        if self.returncode is None:
            self.returncode = self._starter.ask(pid=self.pid, signal=number)
        return self.returncode


def serve(control: int, parent: int) -> list[str]:
    """Be the server; return in every process that it forks, which is to run the words.

    SIGTERM and SIGINT are blocked on entry. When the socket closes it stops its runs and waits for
    them; where its parent was killed, it is too, and they get SIGTERM.
    """
    bind(parent, signal.SIGKILL)
    for name in IMPORTED:
        importlib.import_module(name)
    known_keys()  # resolves the types of every section: 0.1 s
    gc.freeze()  # a collection in a run would touch, and so copy, all that was imported
    line, own = socket.socket(fileno=control), os.getpid()
    _say(line, threads=_threads())
    statuses: dict[int, int | None] = {}
    for asked, files in _packets(line):
        if "words" in asked:
            pid = os.fork()
            if not pid:
                line.close()
                return _begin(asked["words"], files, own)
            for file in files:
                os.close(file)
            statuses[pid] = None
        else:
            pid = asked["pid"]
            _look(statuses, pid, asked["signal"])
        _say(line, n=asked["n"], **{"is": pid if "words" in asked else statuses[pid]})
    for pid in statuses:
        _look(statuses, pid, signal.SIGTERM)
    for pid, status in statuses.items():
        if status is None:
            os.waitpid(pid, 0)
    os._exit(0)


def _threads() -> int:
    """Count the threads that a fork finds."""
    # The BLAS of NumPy ends its own before a fork, and starts them when it needs some.
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)
    return len([*Path("/proc/self/task").iterdir()])


def _packets(line: socket.socket) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """What is asked, with the files that came along, until the other end closes."""
    # Closed before it had read an answer, that is a reset.
    with suppress(ConnectionError):
        while (got := socket.recv_fds(line, PACKET, 2))[0]:
            yield json.loads(got[0]), got[1]


def _say(line: socket.socket, **told: Any) -> None:
    with suppress(BrokenPipeError):  # the next packet is the end
        line.send(json.dumps(told).encode())


def _look(statuses: dict[int, int | None], pid: int, number: int) -> None:
    """Note how a run has ended, if it has; else send it a signal, 0 for none."""
    # One that has not been waited for keeps its number: no other process gets the signal.
    if statuses[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            statuses[pid] = os.waitstatus_to_exitcode(status)
        else:
            os.kill(pid, number)


def _begin(words: list[str], files: Sequence[int], parent: int) -> list[str]:
    """Become what a new process of `vpgea WORDS` is; the first file is its log."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(files[0], stream)
    os.close(files[0])
    sys.argv[1:] = words
    # At random in every process, but by the import; Python sees to its own generator.
    torch.default_generator.seed()
    numpy.random.seed()  # noqa: NPY002 - libraries may draw from it
    # A SIGTERM that came before ends it here, as it ends a process that imports.
    bind(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return words

"""The processes of runs. On a CPU one process, the server, has imported torch and the trainer once,
and forks them: imports take 4 to 6 seconds of a core, a fork hundredths.

A forked run has the numbers of `vpgea train` in a process of its own. The server computes nothing,
so no pool of threads stands; it has one thread, or forks none; and generators begin anew in a fork.
Where that does not hold, off Linux and on a GPU each run is a new process: a driver that anything
has touched, a library's import too, does not survive a fork.

The code of a forked run is that of the server's start, and so is the commit that it records. Once a
module of the package has changed on disk, none is forked.

Sweep and server talk over a pair of sockets, a JSON packet each way:

    {"n": 7, "words": ["train", ...]}, with log and lock  ->  {"n": 7, "pid": 4711, "status": null}
    {"n": 8, "pid": 4711, "signal": 15}                   ->  {"n": 8, "pid": 4711, "status": -15}
    a fork that the system refuses                        ->  {"n": 9, "error": "why"}

Signal 0 asks alone; the status is null while the run lives. A sweep that was interrupted before it
heard its answer passes over that, by its number.
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
from vpgea_fast.metrics.machine import commit
from vpgea_fast.stop import SIGNALS, Stop
from vpgea_fast.sweep.plan import SweepError

PROGRAM = """
import atexit, os, sys
status = 1
def leave():
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
atexit.register(leave)  # the first, so the last that is called
from vpgea_fast.cli import main
from vpgea_fast.sweep.server import serve
words = serve(*map(int, sys.argv[1:]))
try:
    status = main(words)
except SystemExit as end:
    status = end.code or 0
"""
"""At its end a run calls what libraries have registered, and tears nothing down: that would touch,
and so copy, all that it shares with the server."""
PACKAGE = Path(__file__).parents[1]
HOSTS = ("integrations", "hf_trainer")
"""Rooms for other trainers, which no run opens: theirs are imports of seconds, or not there."""
LIBRARIES = (
    "transformers.models.qwen2.modeling_qwen2",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
"""What a run imports beside the package, down to some ten files."""
TASKS = Path("/proc/self/task")
LOOK_S = 0.05
ANSWER_S = 5.0
"""How long one who is asked to leave waits for an answer, which takes milliseconds."""
ENDS_S = 60.0
"""How long a server may take to end. Its runs then end by themselves, still with the lock."""
PACKET = 1 << 17
"""Bytes: words of a run are paths and numbers."""


class Starter:
    """Starts runs, which inherit `lock` and get SIGTERM when this process ends, however it does.

    At the end of its `with` block all that it has forked is stopped and waited for, up to a minute.
    """

    def __init__(self, stop: Stop, lock: IO[str] | None = None) -> None:
        self.stop, self.lock = stop, lock
        self._server: subprocess.Popen[bytes] | None = None
        self._numbers, self._forks, self._code = itertools.count(), False, written()

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._line.close()  # it ends its runs then
            try:
                # One that still imports has none.
                self._server.wait(ENDS_S if self._forks else 0)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._said.close()
            self._server, self._forks = None, False

    def start(
        self, words: Sequence[str], log: Path, device: str
    ) -> subprocess.Popen[bytes] | Forked:
        """Run `vpgea WORDS` on a device, as model.device names it, with its output behind `log`.

        Errors: SweepError where the server has ended, cannot fork or is of other code than the
        disk has now; Stopped when asked to leave meanwhile.
        """
        kept = [] if self.lock is None else [self.lock.fileno()]
        with log.open("ab") as file:
            if sys.platform == "linux" and pick_device(device).type == "cpu" and self._open():
                if changed := dict(self._code.items() ^ written().items()):
                    raise SweepError(
                        f"vpgea_fast has changed since the sweep began ({min(changed)}); run the "
                        "same command again"
                    )
                return Forked(self, self.ask([file.fileno(), *kept], words=[*words])["pid"])
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

    def ask(self, files: Sequence[int] = (), **asked: Any) -> dict[str, Any]:
        """Ask the server, and return what it says of a run: `pid`, and `status` as `poll` has it.

        Errors: SweepError where it has ended or cannot fork; Stopped when asked to leave while it
        says nothing.
        """
        number = next(self._numbers)
        try:
            socket.send_fds(self._line, [json.dumps({"n": number, **asked}).encode()], files)
            while (told := self._hear(ANSWER_S))["n"] != number:
                pass
        except ConnectionError:
            raise self._lost() from None
        if "error" in told:
            raise SweepError(
                f"no process for a run ({told['error']}); take fewer --jobs or wait for memory, "
                "and the same command goes on"
            )
        return told

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
            try:
                self._forks = self._hear(LOOK_S)["threads"] == 1
            except ConnectionError:
                raise self._lost() from None
        return self._forks

    def _hear(self, seconds: float) -> dict[str, Any]:
        while not select.select([self._line], [], [], seconds)[0]:
            self.stop.alone()
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
            self.returncode = self._starter.ask(pid=self.pid, signal=number)["status"]
        return self.returncode


def serve(control: int, parent: int) -> list[str]:
    """Be the server; return in every process that it forks, which is to run the words.

    SIGTERM and SIGINT are blocked on entry. When the socket closes it stops its runs and waits for
    them; where its parent was killed, it is too, and they get SIGTERM.
    """
    bind(parent, signal.SIGKILL)
    import_all()
    commit()  # as the code is: an hour later the disk may have another
    known_keys()  # resolves the types of every section: 0.1 s
    gc.freeze()  # a collection in a run would touch, and so copy, all that was imported
    line = socket.socket(fileno=control)
    _say(line, threads=_threads())
    words = _answer(line)
    if words is None:
        os._exit(0)
    return words


def import_all() -> None:
    """Import what a run may import: a forked one reads no module of the package from the disk."""
    for file in written():
        module = [PACKAGE.name, *Path(file).relative_to(PACKAGE).with_suffix("").parts]
        if module[-1] == "__main__" or module[1] in HOSTS:
            continue
        # Without Triton, say, some cannot be; a run that needs one says so itself.
        with suppress(ImportError):
            importlib.import_module(".".join(module).removesuffix(".__init__"))
    for name in LIBRARIES:
        importlib.import_module(name)


def written() -> dict[str, int]:
    """When each module of the package was last written: its file -> ns since 1970."""
    found: dict[str, int] = {}
    # kernels/ is a link in a checkout.
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in files:
            # One that an editor is replacing: it is there at the next look.
            with suppress(OSError):
                if file.endswith(".py"):
                    path = os.path.join(folder, file)  # noqa: PTH118 - a Path takes twice as long
                    found[path] = os.stat(path).st_mtime_ns  # noqa: PTH116
    return found


def _threads() -> int:
    """Count the threads that a fork finds; 0 where nothing says it."""
    try:
        # The BLAS of NumPy ends its own before a fork, and starts them when it needs some.
        if not (pid := os.fork()):
            os._exit(0)
        os.waitpid(pid, 0)
        return len([*TASKS.iterdir()])
    except OSError:
        return 0


def _answer(line: socket.socket) -> list[str] | None:
    """Answer until the other end closes, then end the runs; in each of them return its words."""
    server = os.getpid()
    statuses: dict[int, int | None] = {}
    for asked, files in _packets(line):
        told = {"n": asked["n"]}
        if "words" in asked:
            try:
                pid = os.fork()
            except OSError as error:
                told["error"] = error.strerror
            else:
                if not pid:
                    line.close()
                    return _begin(asked["words"], files, server)
                statuses[pid] = None
                told |= {"pid": pid, "status": None}
            for file in files:
                os.close(file)
        else:
            pid = asked["pid"]
            _look(statuses, pid, asked["signal"])
            told |= {"pid": pid, "status": statuses[pid]}
        _say(line, **told)
    # All hear it before one is waited for: a save takes seconds.
    for pid in statuses:
        _look(statuses, pid, signal.SIGTERM)
    for pid, status in statuses.items():
        if status is None:
            os.waitpid(pid, 0)
    return None


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

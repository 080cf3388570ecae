"""Run a function in N processes as torchrun would start them: gloo, one thread each.

    def work(scale):                       # a module-level function of a test file
        world = open_world(ParallelConfig(), "cpu")
        return {"rank": world.rank * scale}

    assert run_ranks(work, 2, size=2) == [{"rank": 0}, {"rank": 2}]

Arguments are pickled; results go through JSON. Warnings are errors in a rank.

Ranks are forked from one server that has imported torch, transformers and the trainer once: a call
costs tenths of a second, not the import times N. The store is the parent's, as torchrun keeps it:
no free port is guessed, and the death of rank 0 does not end it. A rank leaves by `os._exit`,
because after FSDP and gloo the interpreter aborts at exit at random, all results right; and it
leaves with its parent, whatever ends that.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SHAPE = {"vocab": 1003, "hidden": 64, "layers": 3, "heads": 2, "initializer_range": 0.1}
"""Of the models in `model_dirs`, as `random_qwen2` takes it. Two processes do not divide the
vocabulary."""
PRELOAD = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.models.qwen2.modeling_qwen2",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch.utils.serialization",
    "vpgea_fast.trainer",
    "warm",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Rank:
    """How one rank ended: its exit status (-9: killed), what the function returned, and what it
    wrote to stdout and stderr."""

    status: int
    result: Any
    output: str


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    size: int = 2,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """What `function(*args)` returned on each of `size` ranks; AssertionError, with the output of
    all that failed, if any did or had not ended after `timeout_s`."""
    ranks = watch_ranks(function, *args, size=size, timeout_s=timeout_s, env=env)
    failed = [number for number, rank in enumerate(ranks) if rank.status]
    assert not failed, _told("failed", failed, ranks)
    return [rank.result for rank in ranks]


def watch_ranks(
    function: Callable[..., Any],
    *args: Any,
    size: int = 2,
    timeout_s: float = 120.0,
    grace_s: float = 20.0,
    env: Mapping[str, str] | None = None,
) -> list[Rank]:
    """How each rank ended, for ranks that are to fail. AssertionError, with the stack of each of
    its threads, if one had not ended by itself `timeout_s` after the start or `grace_s` after the
    first failure."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        files = [Path(scratch) / str(rank) for rank in range(size)]
        processes: list[BaseProcess] = []
        try:
            for rank, file in enumerate(files):
                world = _torchrun_env(rank, size, store.port) | dict(env or {})
                process = SERVER.Process(target=_rank, args=(function, args, file, world))
                process.start()
                processes.append(process)
            late = _wait(processes, timeout_s, grace_s)
            for rank in late:  # faulthandler says where each of its threads is
                os.kill(processes[rank].pid or 0, signal.SIGABRT)
                processes[rank].join(5)
        finally:
            for process in processes:
                process.kill()
                process.join()
        ranks = [
            Rank(process.exitcode or 0, _result(file), file.with_suffix(".out").read_text())
            for process, file in zip(processes, files, strict=True)
        ]
    assert not late, _told("did not end", late, ranks)
    return ranks


class Program:
    """`python WORDS`, as "-m", module, ... or a file and its arguments: a process of its own, but
    forked from the server, without the 4 s of its imports.

    Used as a `subprocess.Popen` is, and ended by `communicate`. Warnings are errors if `strict`.
    """

    def __init__(self, *words: str | Path, cwd: Path | None = None, strict: bool = False) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="program-"))
        self._out, self._err = self._scratch / "out", self._scratch / "err"
        for file in (self._out, self._err):
            file.touch()  # one that is killed before it begins has written nothing
        how = ([*map(str, words)], str(cwd or Path.cwd()), dict(os.environ), strict)
        self._process = SERVER.Process(target=_program, args=(*how, self._out, self._err))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As of `subprocess`: -9 of a killed one, None while it runs."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 120.0) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and to stderr. It is killed after `timeout`."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
        said = self._out.read_text("utf-8"), self._err.read_text("utf-8")
        shutil.rmtree(self._scratch)
        return said


def _program(
    words: list[str], cwd: str, env: Mapping[str, str], strict: bool, *files: Path
) -> None:
    _begin(*files)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    status = 1
    try:
        with warnings.catch_warnings():
            if strict:
                warnings.simplefilter("error")
            if words[0] == "-m":
                sys.argv, sys.path[0] = words[1:], cwd
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
                runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:  # as the interpreter: no code is 0, a text is told
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    _leave(status)


def _torchrun_env(rank: int, size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {
        **{name: str(number) for name, number in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }


def _wait(processes: Sequence[BaseProcess], timeout_s: float, grace_s: float) -> list[int]:
    """The ranks that still run when time is over."""
    end, failed = time.monotonic() + timeout_s, False
    while time.monotonic() < end:
        running = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        if not running:
            return []
        if not failed and any(process.exitcode for process in processes):
            failed, end = True, min(end, time.monotonic() + grace_s)
        time.sleep(0.01)
    return [rank for rank, process in enumerate(processes) if process.exitcode is None]


def _told(what: str, numbers: Sequence[int], ranks: Sequence[Rank]) -> str:
    said = [f"rank {n} (status {ranks[n].status}):\n{ranks[n].output[-4000:]}" for n in numbers]
    return "\n".join([f"ranks {[*numbers]} of {len(ranks)} {what}", *said])


def _result(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], file: Path, env: Mapping[str, str]
) -> None:
    _begin(output := file.with_suffix(".out"), output)
    os.environ.update(env)
    status = 1
    try:
        import torch

        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(*args)
        file.write_text(json.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    _leave(status)


def _begin(out: Path, errors: Path) -> None:
    """What every forked process does first: write to files of its own, and end with its parent."""
    for number, file in ((1, out), (2, errors)):
        # Appended: of one file for both, neither writes over the other.
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.enable()
    gc.freeze()  # what the server imported would cost 0.3 s in every collection
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

"""Runs that are forked: they are what new processes are, and nothing of them outlives its use."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from ranks import Program

from vpgea_fast.bound import bound_command
from vpgea_fast.distributed import Stopped, World, pick_device
from vpgea_fast.metrics import machine
from vpgea_fast.stop import Stop
from vpgea_fast.sweep import server
from vpgea_fast.sweep.plan import SweepError
from vpgea_fast.sweep.server import Forked, Starter

TINY = str(Path(__file__).parents[1] / "configs/tiny.yaml")
PROBE = """
import gc, json, locale, logging, multiprocessing, os, resource, signal, sys, threading, warnings
import matplotlib, numpy, random, torch, transformers, vpgea_fast.trainer
ids = os.getpid(), os.getsid(0), os.getpgrp()
found = {
    "ids": [len({*ids}), os.getppid() == ids[0]],
    "environment": dict(os.environ),
    "words": sys.argv,
    "path": sys.path,
    "flags": str(sys.flags),
    "main": sorted({*vars(sys.modules["__main__"])} & {"__file__", "__spec__", "__name__"}),
    "folder": os.getcwd(),
    "mask of files": os.umask(0o22),
    "streams": [os.readlink(f"/proc/self/fd/{n}") for n in range(3)],
    "buffers": [(f.line_buffering, f.write_through, f.encoding) for f in (sys.stdout, sys.stderr)],
    "files": sorted(
        name
        for name in (os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                     if os.path.lexists(f"/proc/self/fd/{n}"))
        if ".runs" in name or "socket" in name or ".txt" in name
    ),
    "handlers": {n: str(signal.getsignal(n)).partition(" at ")[0] for n in range(1, 64)},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "limits": [resource.getrlimit(n) for n in range(16)],
    "threads": [threading.active_count(), torch.get_num_threads(), torch.get_num_interop_threads()],
    "drawn": [torch.initial_seed(), torch.rand(1).item(), random.random(), numpy.random.rand()],
    "modes": [torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()],
    "precision": [str(torch.get_default_dtype()), torch.get_float32_matmul_precision()],
    "cuda": torch.cuda.is_initialized(),
    "warnings": [str(line) for line in warnings.filters],
    "figures": {key: str(value) for key, value in matplotlib.rcParams.items()},
    "backend": matplotlib.get_backend(auto_select=False),
    "collector": [gc.isenabled(), gc.get_threshold(), gc.get_debug()],
    "logs": [logging.getLogger().level, transformers.logging.get_verbosity()],
    "start": multiprocessing.get_start_method(allow_none=True),
    "locale": locale.getlocale(),
}
print("PROBED", json.dumps(found, default=str))
raise RuntimeError("probed")
"""


def alone():
    return Stop(World(pick_device("cpu")))


@pytest.fixture
def words(tiny_words):
    """Words of `vpgea train` for a run of some steps."""
    settings = {"train.questions_per_step": 2, "checkpoint.save_every": 1}
    settings |= {"rollout.max_new_tokens": 80, "checkpoint.export": "false"}
    words = tiny_words(settings)
    return lambda name, steps, *more: ["train", TINY, *words(name, f"--train.steps={steps}", *more)]


@contextlib.contextmanager
def ending(process):
    """A process that does not outlive a test that fails."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(true, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def is_free(file):
    """Whether nobody holds the lock."""
    with file.open("a") as mine:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def is_server(pid):
    with contextlib.suppress(OSError):  # it has just ended
        return b"vpgea_fast.sweep.server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def steps_of(run):
    file = Path(run) / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def saved(run):
    return [*(Path(run) / "checkpoints").glob("step_*")]


def test_forked_runs_end_as_processes_do_and_all_with_the_server(words, tmp_path, running):
    """Exit statuses, kill -9, SIGTERM, the lock; then the server itself is killed."""
    log, file = tmp_path / "log.txt", tmp_path / ".runs"
    log.write_text("before\n")
    with file.open("a") as lock, Starter(alone(), lock) as starter:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert starter._server is None  # none, until a run wants it
        assert starter.start(["keys", "optim"], log, "cpu").wait() == 0
        assert starter.start(["train", "nowhere.yaml"], log, "cpu").wait() == 2
        told = log.read_text()
        assert told.startswith("before\n")
        assert "optim.lr" in told
        assert "vpgea: " in told.splitlines()[-1]
        (parent,) = (pid for pid in running(parent=os.getpid()) if is_server(pid))
        first, second, third = (
            starter.start(words(name, 500), tmp_path / f"{name}.txt", "cpu") for name in "abc"
        )
        assert running(parent=parent).keys() == {first.pid, second.pid, third.pid}
        # A session of its own: Ctrl-C in a terminal reaches none of them. A moment after its start.
        until(
            lambda: all(process.pid in running(session=process.pid) for process in (first, second)),
            "a session of its own for each run",
        )
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        until(lambda: all(steps_of(tmp_path / name) for name in "bc"), "a step of both")
        second.terminate()
        assert second.wait() == 143
        assert saved(tmp_path / "b")
        second.terminate()  # of one that has ended: nothing
        assert running(parent=parent).keys() == {third.pid}
        assert not Path(f"/proc/{first.pid}").exists()  # no zombie
        # A scheduler's signal to all leaves the server where it is.
        os.kill(parent, signal.SIGTERM)
        assert third.poll() is None
        os.kill(parent, signal.SIGKILL)
        with pytest.raises(
            SweepError, match=r"ended with status -9: -; they save and end, and"
        ) as e:
            until(lambda: third.poll() is not None, "the server's end")
        assert "\n" not in str(e.value)
        lock.close()
        # The run saves and ends by itself, and only then is the lock free.
        until(lambda: is_free(file), "the end of the run")
        assert not running(session=third.pid)
        assert saved(tmp_path / "c")
    assert starter._server is None
    assert not Path(f"/proc/{parent}").exists()


def test_one_that_is_asked_to_leave_while_the_server_imports_leaves_at_once(tmp_path, running):
    stop = alone()
    stop.requested = True
    with pytest.raises(Stopped), Starter(stop) as starter:
        starter.start(["keys"], tmp_path / "log.txt", "cpu")
    assert starter._server is None
    assert (tmp_path / "log.txt").read_text() == ""
    assert not any(map(is_server, running(parent=os.getpid())))


def test_a_server_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('no tensors here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SweepError) as error, Starter(alone()) as starter:
        starter.start(["keys"], tmp_path / "log.txt", "cpu")
    assert "ended with status 1: ImportError: no tensors here; " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def mute():
    """A starter whose server is this test, and a process that ends when it is killed alone."""
    starter = Starter(alone())
    starter._line, mine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    starter._said, starter._forks = tempfile.TemporaryFile(), True  # noqa: SIM115
    starter._server = subprocess.Popen(["sleep", "600"])
    with mine, ending(starter._server):
        yield starter, lambda **told: mine.send(json.dumps(told).encode())
    starter.__exit__()


def test_a_server_that_says_nothing_keeps_nobody(mute, monkeypatch):
    starter, say = mute
    monkeypatch.setattr(server, "ANSWER_S", 0.05)
    starter.stop.requested = True
    with pytest.raises(Stopped):
        starter.ask(pid=7, signal=0)
    # Its answer comes late, and is not taken for that to the next question.
    say(n=0, pid=7, status=None)
    say(n=1, pid=7, status=-15)
    assert starter.ask(pid=7, signal=0)["status"] == -15
    process = starter._server
    monkeypatch.setattr(server, "ENDS_S", 0.05)
    starter.__exit__()
    assert process.returncode == -signal.SIGKILL


def test_a_fork_that_the_system_refuses_is_one_line_and_no_end(mute, monkeypatch):
    def refuse():
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(os, "fork", refuse)
    with mine, theirs, tempfile.TemporaryFile() as log:
        for number in range(2):
            words = json.dumps({"n": number, "words": ["keys"]}).encode()
            socket.send_fds(mine, [words], [log.fileno()])
        mine.shutdown(socket.SHUT_WR)
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        assert server._answer(theirs) is None
        assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208
        said = [json.loads(mine.recv(999)) for _ in range(2)]
    assert said == [{"n": n, "error": os.strerror(errno.EAGAIN)} for n in range(2)]
    starter, say = mute
    say(**said[0])
    with pytest.raises(SweepError, match=r"^no process for a run \(Resource temp.*, and the same"):
        starter.ask(words=["keys"])
    assert server._threads() == 0  # not known: none is forked


def test_where_no_proc_says_the_threads_none_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: os.posix_spawnp("true", ["true"], {}))
    assert server._threads() >= 1
    monkeypatch.setattr(server, "TASKS", tmp_path / "proc/self/task")
    assert server._threads() == 0


def test_code_that_has_changed_is_forked_no_more(mute, tmp_path, monkeypatch):
    """Any module of the package: written again, new, gone."""
    modules = [m for name, m in sys.modules.items() if name.startswith("vpgea_fast.")]
    loaded = {getattr(module, "__file__", None) for module in modules} - {None}
    assert loaded <= server.written().keys()
    assert any("kernels" in name for name in server.written())
    package = tmp_path / "vpgea_fast"
    (package / "sweep/__pycache__").mkdir(parents=True)
    monkeypatch.setattr(server, "PACKAGE", package)
    file, new, other = (package / name for name in ("trainer.py", "sweep/new.py", "sweep/x.pyc"))
    file.touch()
    starter, _ = mute
    starter._code = server.written()
    assert starter._code.keys() == {str(file)}
    other.touch()
    (package / ".#trainer.py").symlink_to("someone@host")  # the lock of an editor
    assert server.written() == starter._code
    for change, said in (
        (lambda: os.utime(file, ns=(0, 0)), file),
        (new.touch, new),
        (file.unlink, file),
    ):
        change()
        with pytest.raises(SweepError) as error:
            starter.start(["keys"], tmp_path / "log.txt", "cpu")
        assert str(error.value) == (
            f"vpgea_fast has changed since the sweep began ({said}); run the same command again"
        )
        starter._code = server.written()


def test_a_commit_is_that_of_the_first_time(tmp_path, monkeypatch):
    """A forked run's is its server's, which asks before it forks."""
    monkeypatch.setattr(machine, "commit", machine.cache(machine.commit.__wrapped__))
    asked = []
    monkeypatch.setattr(machine, "_git", lambda _, *words: asked.append(words) or f"c{len(asked)}")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "vpgea_fast/metrics/machine.py"))
    (tmp_path / ".git").touch()
    assert [machine.environment()["commit"] for _ in range(2)] == ["c1+changes"] * 2
    assert len(asked) == 2


@pytest.mark.slow
def test_a_server_that_would_fork_threads_forks_none(tmp_path, monkeypatch):
    """Each run is a new process then: a library whose import leaves a thread."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, threading\n"
        "if 'sweep.server' in ''.join(sys.orig_argv):\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with Starter(alone()) as starter:
        process = starter.start(["keys", "optim"], tmp_path / "log.txt", "cpu")
        assert isinstance(process, subprocess.Popen)
        assert process.wait() == 0
    assert "optim.lr" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", None])
def test_a_forked_run_is_what_a_new_process_is(words, tmp_path, monkeypatch, threads):
    """All state of a process that numbers could hang on, where its own code first runs."""
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probing.py").write_text(PROBE)
    given = words("run", 1, "--objective.name=custom", "--objective.target=probing:Mine")
    found = []
    log, file = tmp_path / "log.txt", tmp_path / ".runs"
    with file.open("a") as lock, Starter(alone(), lock) as starter:
        with log.open("ab") as out:
            plain = subprocess.Popen(
                bound_command(given),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
            assert plain.wait() == 2
        (tmp_path / "log.txt").rename(tmp_path / "plain")
        logs = [tmp_path / name for name in ("plain", "first/log.txt", "second/log.txt")]
        for log in logs[1:]:
            log.parent.mkdir()
            process = starter.start(given, log, "cpu")
            assert isinstance(process, Forked)
            assert process.wait() == 2
        for text in map(Path.read_text, logs):
            (line,) = (x for x in text.splitlines() if x.startswith("PROBED "))
            found.append(json.loads(line.removeprefix("PROBED ")))
            assert "probed" in text.splitlines()[-1]
    # No state is shared: each begins with generators of its own.
    assert len({number for one in found for number in one.pop("drawn")}) == 12
    streams = [(one.pop("streams"), one.pop("files")) for one in found]
    for (names, kept), log in zip(streams, [tmp_path / "log.txt", *logs[1:]], strict=True):
        assert names == ["/dev/null", str(log), str(log)]
        assert {*kept} == {str(file), str(log)}
    assert found[0] == found[1] == found[2]
    assert found[0]["ids"] == [1, False]
    assert not found[0]["cuda"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_nothing_and_frees_its_lock(words, tmp_path, running):
    out, (_, _, *keys) = tmp_path / "out", words("unused", 400)
    keys = [*keys[2:], "--eval.data", str(tmp_path / "held.jsonl")]
    data = Path(keys[keys.index("--data.train") + 1])
    (tmp_path / "held.jsonl").write_text("".join(data.read_text().splitlines(True)[:6]))
    given = ["sweep", TINY, "--methods", "vpgea", "--rates", "1e-3", "2e-3", "--seeds", "0"]
    given += ["--out", str(out), "--jobs", "2", "--extend", "0", *keys]
    given = [word for word in given if word != "--eval.data=[]"]
    with ending(Program("-m", "vpgea_fast.cli", *given)) as sweep:
        runs = [out / "runs" / f"vpgea-{rate}-0" for rate in ("0.001", "0.002")]
        until(lambda: all(map(steps_of, runs)), "a step of both")
        (server,) = filter(is_server, running(parent=sweep.pid))
        forked = running(parent=server)
        assert len(forked) == 2
        sweep.kill()
        until(lambda: is_free(out / ".runs"), "the end of the runs")
        assert not {*forked, server} & {*running()}
        assert all(map(saved, runs))
        assert not (out / "records").exists() or not [*(out / "records").iterdir()]

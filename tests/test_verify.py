"""math-verify in killable workers: judgements, the deadline, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vpgea_fast.verify import Verifier

TOWER = r"\boxed{9^{9^{9}}}"  # 9^387420489, 370 million digits: hours in one C call


def workers_of(parent: int) -> list[int]:
    """The running children of `parent`, from /proc (a zombie has ended)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return found


def start(workers: int, timeout_s: float) -> tuple[Verifier, list[int]]:
    """A verifier whose workers are up, and their process ids."""
    others = set(workers_of(os.getpid()))
    verifier = Verifier(workers=workers, timeout_s=timeout_s)
    verifier.verify([(str(i), str(i)) for i in range(workers)])
    return verifier, sorted(set(workers_of(os.getpid())) - others)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def becomes_true(condition: Callable[[], bool], *, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1, timeout_s=20.0) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("204", r"So the sum is \boxed{204}.", True),
        ("7", r"\boxed{ 7 }", True),
        ("7", "The answer is 7", True),
        ("4", r"not \boxed{3} since that root is negative. So \boxed{4}", True),
        ("4", r"not \boxed{4} since that root is negative. So \boxed{3}", False),
        (r"\frac{3}{4}", r"\boxed{0.75}", True),
        (r"\frac34", r"\boxed{\frac{3}{4}}", True),  # a sloppy gold answer is understood
        ("0.75", r"\boxed{\frac34}", True),  # and a sloppy prediction: TeX sets the same
        ("x+1", r"\boxed{1 + x}", True),
        (r"\text{(A)}", r"\boxed{A}", True),
        ("-7", r"\boxed{7}", False),
        ("1,000", r"\boxed{1000}", True),
        ("1<x<2", r"\boxed{(1,2)}", True),
        ("(1,2)", r"\boxed{1<x<2}", False),  # gold first: the order of a pair matters
        ("7", r"\boxed{}", False),
        ("7", r"\boxed{7", False),
        ("7", "", False),
        ("7", "\ud800 \0", False),
        ("7", "(" * 5000, False),
    ],
)
def test_judgement(verifier: Verifier, gold: str, text: str, expected: bool):
    assert verifier.verify([(gold, text)]) == [expected]


def test_a_gold_answer_that_means_something_accepts_itself(verifier: Verifier):
    golds = ["204", r"\frac12", r"\text{Monday}", "", r"\frac{1}{", "x=", "???"]
    assert verifier.accepts_itself(golds) == [True, True, True, False, False, False, False]


def test_order_and_repeats_are_kept_over_several_workers():
    pairs = [(str(i % 7), rf"\boxed{{{i % 3}}}") for i in range(60)]
    with Verifier(workers=2, timeout_s=20.0) as verifier:
        assert verifier.verify(pairs) == [i % 7 == i % 3 for i in range(60)]
        assert verifier.verify(reversed(pairs)) == [i % 7 == i % 3 for i in reversed(range(60))]
        assert verifier.verify([]) == []


def test_repeated_texts_cost_nothing(verifier: Verifier):
    pairs = [(str(i % 10), r"\boxed{ 7 }") for i in range(2000)]
    verifier.verify(pairs[:1])  # the worker is up
    begin = time.monotonic()
    assert verifier.verify(pairs) == [i % 10 == 7 for i in range(2000)]
    assert time.monotonic() - begin < 0.5


def test_a_hanging_answer_is_wrong_and_its_worker_is_killed():
    verifier, [worker] = start(workers=1, timeout_s=1.0)
    with verifier:
        begin = time.monotonic()
        assert verifier.verify([("7", TOWER)]) == [False]
        assert 1.0 <= time.monotonic() - begin < 3.0
        assert (verifier.timeouts, verifier.crashes) == (1, 0)
        assert not running(worker)
        assert verifier.verify([("8", r"\boxed{8}"), ("7", TOWER)]) == [True, False]
        assert verifier.timeouts == 1  # the verdict on the tower was kept


def test_a_hanging_gold_answer_ends_at_the_deadline():
    with Verifier(workers=1, timeout_s=1.0) as verifier:
        assert verifier.verify([("9^{9^{9}}", r"\boxed{7}")]) == [False]
        assert verifier.timeouts == 1


def test_a_worker_that_died_idle_is_replaced_without_a_wrong_verdict():
    verifier, [worker] = start(workers=1, timeout_s=20.0)
    with verifier:
        os.kill(worker, signal.SIGKILL)
        assert becomes_true(lambda: not running(worker), within_s=5.0)
        assert verifier.verify([("8", r"\boxed{8}")]) == [True]
        assert (verifier.timeouts, verifier.crashes) == (0, 0)


def test_an_answer_on_which_two_workers_die_is_wrong():
    verifier, [first] = start(workers=1, timeout_s=60.0)

    def kill_when_busy(worker: int) -> None:
        assert becomes_true(lambda: cpu_seconds(worker) > 1.5, within_s=60.0)  # the import: 0.5
        os.kill(worker, signal.SIGKILL)

    def kill_both() -> None:
        others = {first, *workers_of(os.getpid())}
        kill_when_busy(first)
        assert becomes_true(lambda: not others.issuperset(workers_of(os.getpid())), within_s=10.0)
        [second] = set(workers_of(os.getpid())) - others
        kill_when_busy(second)

    with verifier, ThreadPoolExecutor(1) as executioner:
        done = executioner.submit(kill_both)
        assert verifier.verify([("7", TOWER), ("8", r"\boxed{8}")]) == [False, True]
        done.result()
        assert (verifier.timeouts, verifier.crashes) == (0, 1)


def test_interrupts_of_the_process_group_leave_workers_alone_and_torch_is_not_loaded():
    verifier, [worker] = start(workers=1, timeout_s=20.0)
    with verifier:
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        assert verifier.verify([("8", r"\boxed{8}")]) == [True]
        assert running(worker)
        assert "torch" not in Path(f"/proc/{worker}/maps").read_text()


def test_close_leaves_no_process_and_refuses_more_work():
    verifier, workers = start(workers=2, timeout_s=20.0)
    assert len(workers) == 2
    verifier.close()
    verifier.close()
    assert not any(map(running, workers))
    with pytest.raises(ValueError, match="closed"):
        verifier.verify([("7", "7")])


PARENT = """
import sys
from vpgea_fast.verify import Verifier
verifier = Verifier(workers=2, timeout_s=2.0)
verifier.verify([("1", "1"), ("2", "2"), ("3", "3"), ("4", "4")])
print("up", flush=True)
verifier.verify([("7", sys.argv[1])])
print("never", flush=True)
"""


def test_workers_end_when_the_parent_is_killed():
    """One worker is idle (its pipe ends), the other deep in a C call (its alarm rings)."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, TOWER], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        workers = workers_of(parent.pid)
        assert len(workers) == 2
        time.sleep(0.3)
        parent.kill()
        parent.wait()
        assert becomes_true(lambda: not all(map(running, workers)), within_s=2.0)
        assert becomes_true(lambda: not any(map(running, workers)), within_s=6.0)


@pytest.mark.parametrize(("workers", "timeout_s"), [(0, 1.0), (1, 0.0)])
def test_impossible_pools_are_refused(workers: int, timeout_s: float):
    with pytest.raises(ValueError, match=r"verify\.workers"):
        Verifier(workers=workers, timeout_s=timeout_s)


def test_a_worker_that_cannot_start_is_an_error_with_the_remedy(monkeypatch, tmp_path: Path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        Verifier(workers=1, timeout_s=1.0) as verifier,
        pytest.raises(RuntimeError, match=r"math-verify\[antlr4_13_2\]"),
    ):
        verifier.verify([("7", "7")])

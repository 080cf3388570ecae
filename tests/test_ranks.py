"""The launcher of the other tests tells what went wrong, and leaves nothing running."""

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
from ranks import run_ranks, watch_ranks

from vpgea_fast.config import ParallelConfig
from vpgea_fast.distributed import open_world


def say(word):
    world = open_world(ParallelConfig(), "cpu")
    return {"rank": world.rank, "all": world.gather(word + str(world.rank)), "pid": os.getpid()}


def fail_on_one(how):
    world = open_world(ParallelConfig(), "cpu")
    if world.rank == 1 and how == "raise":
        raise ValueError("rank one gives up")
    if world.rank == 1 and how == "warn":
        warnings.warn("rank one complains", stacklevel=1)
    if world.rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def wait_for_nothing():
    time.sleep(600)


HEAP = """
import ctypes
import torch
from vpgea_fast.config import ParallelConfig
from vpgea_fast.distributed import open_world

class Heap(ctypes.Structure):  # mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d mapped f g h i j".split()]

open_world(ParallelConfig(), "cpu")
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Heap
torch.empty(16 << 20, dtype=torch.uint8)  # comes and goes
before = mallinfo2().mapped
kept = torch.empty(4 << 20, dtype=torch.uint8)
print(mallinfo2().mapped - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc of 2.33 or newer")
@pytest.mark.parametrize("own", [{}, {"MALLOC_MMAP_THRESHOLD_": "33554432"}])
def test_a_cpus_tensors_are_mapped_and_lie_in_no_heap(own):
    """Unless the user has set the limit."""
    command = [sys.executable, "-c", HEAP]
    out = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=True)
    assert (int(out.stdout) >= 4 << 20) == (not own)


def is_gone(pid):
    """Also true of a process that has ended and waits for its parent to notice."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it may also end between the opening and the reading
        return True
    return status.rsplit(")", 1)[1].split()[0] == "Z"


def test_results_come_in_the_order_of_the_ranks():
    ranks = run_ranks(say, "a", size=3)
    assert [rank["rank"] for rank in ranks] == [0, 1, 2]
    assert all(rank["all"] == ["a0", "a1", "a2"] for rank in ranks)
    assert all(is_gone(rank["pid"]) for rank in ranks)


@pytest.mark.parametrize(
    ("how", "told"), [("raise", "rank one gives up"), ("warn", "rank one complains")]
)
def test_the_message_has_what_the_failing_rank_wrote(how, told):
    with pytest.raises(AssertionError, match=rf"(?s)rank 1 \(status 1\).*{told}"):
        run_ranks(fail_on_one, how)


def test_a_killed_rank_is_told_from_those_that_noticed():
    zero, one = watch_ranks(fail_on_one, "die")
    assert one.status == -signal.SIGKILL
    assert zero.status == 1
    assert "peer" in zero.output


def test_ranks_that_hang_are_ended_and_say_where():
    with pytest.raises(AssertionError, match=r"(?s)ranks \[0, 1\] of 2 did not end.*in wait_for_n"):
        watch_ranks(wait_for_nothing, timeout_s=1.0)


PARENT = """
import sys
sys.path[:0] = sys.argv[1:3]
import ranks
from test_ranks import wait_for_nothing

if __name__ == "__main__":
    ranks.SERVER.set_forkserver_preload([])
    start = ranks.SERVER.Process.start
    def start_and_tell(process):
        start(process)
        print(process.pid, flush=True)
    ranks.SERVER.Process.start = start_and_tell
    ranks.watch_ranks(wait_for_nothing)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_ranks_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    here = Path(__file__).parent
    command = [sys.executable, str(script), str(here), str(here.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    end = time.monotonic() + 60
    while not all(map(is_gone, pids)):
        assert time.monotonic() < end, "ranks outlive their parent"
        time.sleep(0.05)

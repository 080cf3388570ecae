"""A run whose processes wait for each other says where each stands before it is ended."""

import re
import time

from ranks import watch_ranks

from vpgea_fast.config import ParallelConfig
from vpgea_fast.distributed import World, open_world
from vpgea_fast.watch import Watch, _numbers

SECONDS = 6.0


def asleep(seconds):
    time.sleep(seconds)


def a_process_that_does_not_come():
    """It is late once, and in time; then it does not come at all."""
    world = open_world(ParallelConfig(timeout_minutes=SECONDS / 60), "cpu")
    watch = Watch(world)
    try:
        if world.rank == 1:
            asleep(SECONDS / 3)
        world.gather("late")
        print("came")
        if world.rank == 1:
            asleep(1.4 * SECONDS)
            return
        world.gather("never")
    finally:
        watch.close()


def test_every_process_says_where_it_stands_before_a_collective_is_given_up():
    ranks = watch_ranks(a_process_that_does_not_come, size=3, grace_s=4 * SECONDS)
    waiting, lost, _ = (rank.output for rank in ranks)
    assert [rank.status for rank in ranks] == [1, 0, 1]
    assert "LostError: another process has ended, or does not answer" in waiting
    for number, rank in enumerate(ranks):
        stacks = f"process {number}: stacks of its threads"
        assert rank.output.count(stacks) == 1
        # Not while it was late only, and before the end.
        assert rank.output.index("came") < rank.output.index(stacks)
        assert ("in _gather" in rank.output) == (number != 1)
    assert re.search(r'line \d+ in asleep\n  File "[^"]*", line \d+ in a_process', lost)
    said = [line for rank in ranks for line in rank.output.splitlines() if "has not moved" in line]
    assert len(said) == 1
    line = re.sub(r":\d+ ", ":N ", said[0])
    assert re.match(
        r"process [02] has not moved for [45] s \(the job ends at parallel.timeout_minutes, 6 s\): "
        r"process 0, 2: distributed.py:N _gather < distributed.py:N gather_bytes < "
        r"distributed.py:N gather; process 1: test_watch.py:N asleep < test_watch.py:N a_process",
        line,
    )


def test_a_process_alone_is_not_watched():
    import torch

    watch = Watch(World(torch.device("cpu")))
    assert watch._thread is None
    watch.close()


def test_neighbouring_ranks_are_said_as_one():
    assert _numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"

"""A save may be killed or refused at any file operation: what was durable before stays loadable."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from saving import (
    ALONE,
    FailAt,
    loaded_step,
    numbers,
    operations_of_a_save,
    save,
    save_with_fault,
    steps_on_disk,
)
from torch import nn

from vpgea_fast.checkpoint import (
    CheckpointError,
    Saver,
    claim_run_dir,
    find_checkpoint,
    open_checkpoint,
    put_weights,
    read_rollout,
    saved_steps,
)


@pytest.mark.parametrize("torn", [False, True], ids=["refused", "torn"])
def test_a_fault_at_every_file_operation_leaves_a_loadable_run(tmp_path, torn):
    total = operations_of_a_save(tmp_path / "count")
    assert total > 15
    for index in range(total):
        run_dir = tmp_path / str(index)
        save(run_dir, 1, keep_last=1)
        saved, message = save_with_fault(run_dir, FailAt(index, torn=torn))
        assert "No space left" in message
        assert ("cannot delete" in message) if saved else ("--resume" in message)
        assert saved or set(steps_on_disk(run_dir)) <= {"step_1", "step_2"}
        assert loaded_step(run_dir) in ((2,) if saved else (1, 2))
        save(run_dir, 3, keep_last=1)
        assert loaded_step(run_dir) == 3
        assert steps_on_disk(run_dir) == ["step_3"]


@pytest.mark.parametrize("torn", [False, True], ids=["refused", "torn"])
def test_a_fault_of_a_save_between_updates_leaves_the_whole_step(tmp_path, torn):
    total = operations_of_a_save(tmp_path / "count", step=1, updates=2)
    assert total > operations_of_a_save(tmp_path / "whole", step=2) - 3  # it deletes nothing
    for index in range(total):
        run_dir = tmp_path / str(index)
        save(run_dir, 1)
        saved, message = save_with_fault(run_dir, FailAt(index, torn=torn), step=1, updates=2)
        assert not saved
        assert re.search(r"cannot save .*step_1_2: .*No space left", message)
        # After the rename the directory is whole, and only its durability was refused.
        assert {*steps_on_disk(run_dir)} <= {"step_1", "step_1_2"}
        assert loaded_step(run_dir) == 1
        save(run_dir, 1, updates=3)
        assert steps_on_disk(run_dir) == ["step_1", "step_1_3"]
        found = find_checkpoint(run_dir, world=ALONE)
        assert (found.step, found.updates) == (1, 3)
        assert read_rollout(found, dict, world=ALONE)["paths"].tolist() == [1] * 5


def test_a_checkpoint_between_updates_goes_when_a_later_one_is_whole(tmp_path):
    for step, updates in ((1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1)):
        save(tmp_path, step, updates=updates, keep_last=2, worth={1: 5.0, 3: 1.0})
        names = steps_on_disk(tmp_path)
        # Two whole steps and the best one, beside it.
        assert [name for name in names if name.count("_") == 2] == [f"step_{step}_{updates}"] * (
            updates > 0
        )
    assert names == ["step_1", "step_2", "step_3", "step_3_1"]
    assert saved_steps(tmp_path) == [1, 2, 3]
    assert loaded_step(tmp_path) == 3
    with pytest.raises(CheckpointError, match=r"step_4: there is none; .*checkpoint: 1, 2, 3"):
        open_checkpoint(tmp_path, 4, world=ALONE)
    # A later one that is damaged is no reason to lose a good one of an earlier moment.
    save(tmp_path, 5, keep_last=2)
    os.truncate(tmp_path / "checkpoints/step_5/state.json", 1)
    save(tmp_path, 3, updates=2, keep_last=2)
    with pytest.warns(UserWarning, match="step_5"):
        found = find_checkpoint(tmp_path, world=ALONE)
    assert (found.step, found.updates) == (3, 2)


FORKING = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from saving import loaded_step, operations_of_a_save, save, steps_on_disk

torch.set_num_threads(1)  # a pool would not survive the fork

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

def die_at(index):
    seen = iter(range(10**6))
    def do(operation, *args):
        if next(seen) == index:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args)
    return do
"""


def run_forking(body, tmp_path):
    """A fresh process that may fork: this one has threads by now."""
    script = FORKING + textwrap.dedent(body)
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_at_every_operation_and_at_random_moments(tmp_path):
    out = run_forking(
        """
        root = Path(sys.argv[2])
        for index in range(operations_of_a_save(root / "count")):
            run_dir = root / str(index)
            save(run_dir, 1, keep_last=1)
            pid = in_child(lambda: save(run_dir, 2, keep_last=1, do=die_at(index)))
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            assert loaded_step(run_dir) in (1, 2), index
            assert all(name.startswith("step_") for name in steps_on_disk(run_dir))
        for index in range(operations_of_a_save(root / "between", step=1, updates=2)):
            run_dir = root / f"between {index}"
            save(run_dir, 1, keep_last=1)
            pid = in_child(lambda: save(run_dir, 1, updates=2, do=die_at(index)))
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            assert loaded_step(run_dir) == 1, index
            assert {*steps_on_disk(run_dir)} <= {"step_1", "step_1_2"}
        run_dir, rng, step = root / "random", random.Random(7), 0
        for _ in range(3):
            def save_for_ever(step=step):
                while step := step + 1:
                    save(run_dir, step, keep_last=2, size=50_000)
                    (root / f"durable_{step}").touch()
            pid = in_child(save_for_ever)
            while not (root / f"durable_{step + 1}").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.2))
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            durable = max(int(p.name.removeprefix("durable_")) for p in root.glob("durable_*"))
            step = loaded_step(run_dir, size=50_000)
            assert durable <= step <= durable + 1, (durable, step)
        print("survived", step)
        """,
        tmp_path,
    )
    assert out.startswith("survived")


def test_a_full_disk_is_a_clear_error_and_costs_nothing_that_was_saved(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (2_000, 160_500):  # no tensor fits; the weights fit, the optimiser does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=r"cannot save .*step_2.*Free disk space"):
                save(tmp_path, 2, size=40_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert steps_on_disk(tmp_path) == ["step_1"]
    assert loaded_step(tmp_path) == 1


def test_a_background_save_holds_the_moment_it_was_asked_for(tmp_path):
    kept = numbers(1)
    reached, go = threading.Event(), threading.Event()

    def slowly(operation, *args):
        reached.set()
        assert go.wait(60)
        return operation(*args)

    trainer_state = {"paths": 1}
    with Saver(tmp_path, world=ALONE, keep_last=2, background=True, do=slowly, **kept) as saver:
        saver.save(1, trainer_state)
        assert reached.wait(60)
        trainer_state["paths"] = 7
        nn.init.constant_(kept["model"].weight, 7)
        kept["optimizer"].state[kept["model"].weight]["exp_avg"].fill_(7)
        kept["optimizer"].state[kept["model"].weight]["step"].fill_(7)
        torch.rand(3)
        assert not (tmp_path / "checkpoints" / "step_1").exists()
        go.set()
        saver.wait()
        assert loaded_step(tmp_path) == 1
        saver.save(7, trainer_state)
        saver.save(8, trainer_state | {"paths": 7})  # waits for 7
        assert (tmp_path / "checkpoints/step_7").exists()
    assert steps_on_disk(tmp_path) == ["step_7", "step_8"]


def test_a_failed_background_save_is_told_at_the_next_boundary(tmp_path):
    save(tmp_path, 1)
    for boundary in ("wait", "close", "save"):
        saver = Saver(
            tmp_path, world=ALONE, keep_last=1, background=True, do=FailAt(6), **numbers(2)
        )
        saver.save(2, {"paths": 2})
        with pytest.raises(CheckpointError, match=r"cannot save .*step_2.*No space left"):
            saver.save(3, {}) if boundary == "save" else getattr(saver, boundary)()
        saver.close()
        assert steps_on_disk(tmp_path) == ["step_1"]


def test_keeps_the_last_k_by_number_not_by_name(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep_last=2)
    assert steps_on_disk(tmp_path) == ["step_10", "step_11"]
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last: got 0"):
        save(tmp_path, 12, keep_last=0)


def test_the_best_outlives_the_last_k(tmp_path):
    worth = {}
    kept = []
    for step, value in enumerate([1.0, 3.0, 2.0, 3.0, 0.5, 0.5, 0.5], start=1):
        save(tmp_path, step, keep_last=2, worth=worth)
        kept.append(steps_on_disk(tmp_path))
        worth[step] = value  # known only after the save
    assert kept[3] == ["step_2", "step_3", "step_4"]
    assert kept[4] == ["step_4", "step_5"]  # the later of equals
    assert kept[6] == ["step_4", "step_6", "step_7"]
    save(tmp_path, 8, keep_last=2, worth={2: 9.0, 99: 9.0})  # no longer there
    assert steps_on_disk(tmp_path) == ["step_7", "step_8"]


def test_the_best_survives_a_fault_at_every_operation(tmp_path):
    counting = FailAt()
    for index in range(-1, 99):
        run_dir = tmp_path / str(index)
        for step in (1, 2):
            save(run_dir, step, keep_last=1, worth={1: 5.0})
        do = counting if index < 0 else FailAt(index)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(CheckpointError):
                save(run_dir, 3, keep_last=1, worth={1: 5.0, 2: 4.0}, do=do)
        found = open_checkpoint(run_dir, 1, world=ALONE)
        assert (found.tensors()["model.weight"] == 1).all()
        assert loaded_step(run_dir) in (2, 3)
        if index == counting.count - 1:
            break
    assert counting.count > 15


def test_a_checkpoint_is_opened_by_its_step_or_refused_in_words(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "checkpoints/step_2/__0_0.distcp")
    assert saved_steps(tmp_path) == [1, 2]
    assert open_checkpoint(tmp_path, 1, world=ALONE).step == 1
    for step, fault in ((2, "the checksum of"), (3, "there is none")):
        with pytest.raises(CheckpointError, match=f"step_{step}: {fault}.*a checkpoint: 1, 2"):
            open_checkpoint(tmp_path, step, world=ALONE)
    other = nn.Linear(8, 4)
    with pytest.raises(CheckpointError, match="is of another model"):
        put_weights(open_checkpoint(tmp_path, 1, world=ALONE), other, world=ALONE)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda path: os.truncate(path / "__0_0.distcp", 100),
    "empty": lambda path: os.truncate(path / ".metadata", 0),
    "bit": lambda path: flip_a_bit(path / "__0_0.distcp"),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "torn manifest": lambda path: os.truncate(path / "manifest.json", 40),
    "odd manifest": lambda path: (path / "manifest.json").write_text("[]"),
    "lost file": lambda path: (path / "process_0.pt").unlink(),
}
DAMAGE_BETWEEN = {
    "cut rollout": lambda path: os.truncate(path / "rollout.pt", 100),
    "bit of the rollout": lambda path: flip_a_bit(path / "rollout.pt"),
    "lost rollout": lambda path: (path / "rollout.pt").unlink(),
    "unnamed rollout": lambda path: unname(path, "rollout.pt"),
    "another name": lambda path: path.rename(path.with_name("step_1_3")),
    "as a whole step": lambda path: path.rename(path.with_name("step_2")),
}


def unname(path, file):
    """Take a file out of the manifest, as if nobody had ever written it."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][file]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / file).unlink()


@pytest.mark.parametrize("damage", [*DAMAGE.values(), *DAMAGE_BETWEEN.values()])
def test_a_damaged_one_between_updates_falls_back_to_the_whole_step(tmp_path, damage):
    save(tmp_path, 1)
    damage(save(tmp_path, 1, updates=2))
    with pytest.warns(UserWarning, match=r"step_(1_2|1_3|2): .*falling back to the checkpoint"):
        found = find_checkpoint(tmp_path, world=ALONE)
    assert (found.step, found.updates) == (1, 0)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_falls_back_and_is_written_again(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints" / "step_2")
    with pytest.warns(UserWarning, match=r"step_2: .*falling back"):
        assert loaded_step(tmp_path) == 1
    save(tmp_path, 2)
    assert loaded_step(tmp_path) == 2


def test_a_damaged_later_step_never_pushes_out_a_good_one(tmp_path):
    for step in (1, 5):
        save(tmp_path, step)
    os.truncate(tmp_path / "checkpoints" / "step_5" / "state.json", 1)
    save(tmp_path, 3, keep_last=1)
    with pytest.warns(UserWarning, match="step_5"):
        assert loaded_step(tmp_path) == 3


def test_nothing_to_load_and_leftovers_go(tmp_path):
    assert loaded_step(tmp_path / "none") is None
    (tmp_path / "checkpoints" / ".tmp-step_4").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-step_4" / "__0_0.distcp").touch()
    (tmp_path / ".tmp-metrics.jsonl").touch()
    assert loaded_step(tmp_path) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]


LOST = {
    "gone": lambda folder: shutil.rmtree(folder),
    "emptied": lambda folder: [shutil.rmtree(path) for path in folder.iterdir()],
    "all damaged": lambda folder: [(path / "manifest.json").unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST.keys())
@pytest.mark.filterwarnings("ignore:.*falling back")
def test_checkpoints_that_are_lost_are_no_run_that_was_never_saved(tmp_path, lose):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / ".saved").unlink()  # as an older version left it
    assert loaded_step(tmp_path) == 2
    lose(tmp_path / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"its checkpoints are (gone|damaged: step_1, step_2)"
    ):
        loaded_step(tmp_path)


def test_a_directory_that_was_cleared_is_a_fresh_one(tmp_path):
    """`rm -rf run/*` leaves the files with a dot."""
    save(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    with claim_run_dir(tmp_path):
        assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


def test_saving_a_step_twice_keeps_the_complete_one(tmp_path):
    path = save(tmp_path, 1)
    before = (path / "manifest.json").stat().st_mtime_ns
    refuse_everything = FailAt(0)
    assert save(tmp_path, 1, do=refuse_everything) == path
    assert (path / "manifest.json").stat().st_mtime_ns == before

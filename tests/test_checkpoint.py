"""A save may be killed or refused at any file operation: what was durable before stays loadable.

transformers is imported where it is used: the process that forks imports this file, and 4 s less.
"""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, watch_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vpgea_fast.checkpoint import (
    CheckpointError,
    Saver,
    claim_run_dir,
    export_model,
    find_checkpoint,
    load_checkpoint,
    open_checkpoint,
    perform,
    put_weights,
    restore_rng,
    rng_state,
    save_checkpoint,
    saved_steps,
    truncate_jsonl,
    write_text,
)
from vpgea_fast.config import ParallelConfig
from vpgea_fast.distributed import World, full_weights, open_world, reshard

ALONE = World(torch.device("cpu"))


def numbers(step, size=8, world=ALONE):
    """A model and an optimiser of which every number is `step`; of two shards, the second has fewer
    rows of the one weight and nothing of the other."""
    model = nn.Linear(size, 3, bias=False)
    model.one = nn.Parameter(torch.empty(1))
    if world.mesh is not None:
        fully_shard(model, mesh=world.mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for weight in model.parameters():
        nn.init.constant_(weight, step)
        moment = torch.full_like(weight.detach(), step)
        optimizer.state[weight] = {"exp_avg": moment, "step": torch.tensor(float(step))}
    return {"model": model, "optimizer": optimizer}


def save(run_dir, step, *, keep_last=3, do=perform, size=8, world=ALONE, worth=None):
    """Every number of checkpoint N is N, in each of its files."""
    return save_checkpoint(
        run_dir,
        step,
        world=world,
        trainer_state={"paths": step},
        keep_last=keep_last,
        worth=worth,
        do=do,
        **numbers(step, size, world),
    )


def loaded_step(run_dir, size=8, world=ALONE):
    into = numbers(-1, size, world)
    found = load_checkpoint(run_dir, world=world, **into)
    if found is None:
        return None
    tensors = [*into["model"].parameters()]
    tensors += [tensor for state in into["optimizer"].state.values() for tensor in state.values()]
    assert len(tensors) == 6
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert (local == found.step).all()
    assert found.trainer_state["paths"] == found.step
    return found.step


def steps_on_disk(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


class FailAt:
    """Performs file operations; the n-th raises: before it, or after it with its file cut."""

    def __init__(self, index=-1, *, torn=False):
        self.index, self.torn, self.count = index, torn, 0

    def __call__(self, operation, *args):
        self.count += 1
        if self.count - 1 != self.index:
            return operation(*args)
        if self.torn:
            operation(*args)
            if args[0].is_file():
                os.truncate(args[0], args[0].stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def operations_of_a_save(run_dir):
    counting = FailAt()
    save(run_dir, 1, keep_last=1)
    save(run_dir, 2, keep_last=1, do=counting)
    return counting.count


def save_with_fault(run_dir, do, world=ALONE):
    """(saved, message) of a save that met a fault."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            save(run_dir, 2, keep_last=1, do=do, world=world)
        except CheckpointError as error:
            return False, str(error)
    return True, str(caught[0].message) if caught else ""


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


FORKING = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from test_checkpoint import loaded_step, operations_of_a_save, save, steps_on_disk

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


def test_adamw_continues_bitwise_with_the_random_numbers(tmp_path):
    def start():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3))
        return model, torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1)

    def advance(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.randn(4, 5)).square().sum() * random.random()).backward()
            optimizer.step()

    straight, straight_optimizer = start()
    random.seed(3)
    advance(straight, straight_optimizer)
    lr = 0.1 + 0.2  # no short decimal
    save_checkpoint(
        tmp_path,
        3,
        world=ALONE,
        model=straight,
        optimizer=straight_optimizer,
        trainer_state={"lr": lr},
        keep_last=1,
    )
    advance(straight, straight_optimizer)

    resumed, resumed_optimizer = start()
    found = load_checkpoint(tmp_path, world=ALONE, model=resumed, optimizer=resumed_optimizer)
    assert found is not None
    assert found.trainer_state["lr"] == lr
    advance(resumed, resumed_optimizer)
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        mine, its = (resumed_optimizer.state[ours], straight_optimizer.state[theirs])
        assert mine.keys() == its.keys() == {"exp_avg", "exp_avg_sq", "step"}
        for name, tensor in mine.items():
            assert torch.equal(tensor, its[name])


def test_a_save_changes_no_optimizer(tmp_path):
    """torch's get_state_dict has a fresh AdamW make a step, which counts in its bias correction."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    into = {"world": ALONE, "model": model, "optimizer": optimizer}
    save_checkpoint(tmp_path, 0, trainer_state={}, keep_last=1, **into)
    assert not optimizer.state
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert load_checkpoint(tmp_path, **into) is not None
    assert not optimizer.state


class HalfMoments(torch.optim.Optimizer):
    """Moments in bfloat16 beside float32 weights, and a step count that is no tensor."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            state["moment"] = (
                state.get("moment", torch.zeros_like(p, dtype=torch.bfloat16)) + p.grad
            )
            state["scale"] = torch.ones(2)


def test_optimizer_states_keep_their_dtype_and_kind(tmp_path):
    def start():
        model = nn.Linear(3, 2)
        return model, HalfMoments(model.parameters())

    model, optimizer = start()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    kept = {"world": ALONE, "model": model, "optimizer": optimizer}
    save_checkpoint(tmp_path, 1, trainer_state={}, keep_last=1, **kept)
    again, again_optimizer = start()
    assert load_checkpoint(tmp_path, world=ALONE, model=again, optimizer=again_optimizer)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        mine, its = again_optimizer.state[ours], optimizer.state[theirs]
        assert mine["count"] == its["count"] == 1
        assert mine["moment"].dtype == its["moment"].dtype
        assert torch.equal(mine["moment"], its["moment"])
        assert torch.equal(mine["scale"], its["scale"])


PASSED_ON = torch.ops.aten.detach, torch.ops.aten._to_copy, torch.ops.aten.view


class Blocks(torch.Tensor):
    """A number as its sign and its size: like torchao's 8-bit moments a tensor class of parts,
    whose `to` makes no copy."""

    @staticmethod
    def __new__(cls, sign, size):
        return torch.Tensor._make_wrapper_subclass(cls, sign.shape, dtype=size.dtype)

    def __init__(self, sign, size):
        self.sign_part, self.size_part = sign, size

    def __tensor_flatten__(self):
        return ["sign_part", "size_part"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, _context, _shape, _stride):
        return cls(parts["sign_part"], parts["size_part"])

    @classmethod
    def __torch_dispatch__(cls, function, _types, args=(), _kwargs=None):
        assert function.overloadpacket in PASSED_ON
        return cls(args[0].sign_part, args[0].size_part)


def with_blocks(world, step):
    """As `numbers`, with one more state of every weight."""
    kept = numbers(step, world=world)
    for weight, state in kept["optimizer"].state.items():
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        number = torch.full_like(local.detach(), step)
        state["blocks"] = blocks = Blocks(number.sign(), number.abs())
        if isinstance(weight, DTensor):
            state["blocks"] = DTensor.from_local(
                blocks,
                weight.device_mesh,
                weight.placements,
                shape=weight.shape,
                stride=weight.stride(),
            )
    return kept


def save_and_load_blocks(root):
    world = open_world(ParallelConfig(), "cpu")
    kept = with_blocks(world, 1)
    with Saver(root, world=world, keep_last=1, background=True, **kept) as saver:
        saver.save(1, {})
        for state in kept["optimizer"].state.values():
            blocks = state["blocks"].to_local() if world.mesh else state["blocks"]
            blocks.size_part.fill_(7)
    into = numbers(-1, world=world)
    with torch.serialization.safe_globals([Blocks]):
        assert load_checkpoint(root, world=world, **into) is not None
    for weight, state in into["optimizer"].state.items():
        blocks = state["blocks"]
        if world.mesh:
            assert blocks.shape == weight.shape
            blocks, weight = blocks.to_local(), weight.to_local()
        assert type(blocks) is Blocks
        assert blocks.shape == weight.shape
        assert (blocks.size_part == 1).all()
    nn.init.constant_(blocks.size_part, float("inf"))
    with pytest.raises(CheckpointError, match=r"optimizer\.state\..*blocks holds NaN"):
        save_checkpoint(root, 2, world=world, keep_last=1, trainer_state={}, **into)


@pytest.mark.parametrize("size", [1, 2])
def test_states_in_blocks_come_back_to_as_many_processes(tmp_path, size):
    run_ranks(save_and_load_blocks, tmp_path, size=size)
    if size == 2:
        with (
            torch.serialization.safe_globals([Blocks]),
            pytest.raises(
                CheckpointError, match="blocks of AdamW cannot be cut anew; go on with 2"
            ),
        ):
            load_checkpoint(tmp_path, world=ALONE, **numbers(5))


def test_a_state_from_a_gpu_is_refused_on_a_cpu_with_a_warning():
    state = rng_state(torch.device("cpu"))
    state["cuda"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.warns(UserWarning, match=r"a run on a GPU, this one is on cpu.*not restored"):
        restore_rng(state, torch.device("cpu"))


class Oddments(nn.Module):
    """Tied, turned, empty and scalar weights, a buffer of integers and one that is not saved."""

    def __init__(self, dtype, start):
        super().__init__()
        weight = torch.arange(start, start + 12).to(dtype).reshape(3, 4)
        self.embed = nn.Parameter(weight)
        self.head = self.embed
        self.turned = nn.Parameter(weight.T * 2)
        self.empty = nn.Parameter(torch.empty(0, 4, dtype=dtype))
        self.scalar = nn.Parameter(torch.tensor(start, dtype=dtype))
        self.register_buffer("count", torch.tensor([start, 7]))
        self.register_buffer("passing", torch.tensor([start]), persistent=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("background", [False, True])
def test_tied_transposed_empty_and_scalar_tensors_come_back(tmp_path, dtype, background):
    saved, into = Oddments(dtype, 1), Oddments(dtype, 5)
    kept = {"world": ALONE, "model": saved, "optimizer": torch.optim.SGD(saved.parameters())}
    with Saver(tmp_path, keep_last=1, background=background, **kept) as saver:
        path = saver.save(1, {})
    found = load_checkpoint(
        tmp_path, world=ALONE, model=into, optimizer=torch.optim.SGD(into.parameters())
    )
    assert found is not None
    assert found.path == path == tmp_path / "checkpoints" / "step_1"
    assert into.head is into.embed
    assert into.passing == 5
    for name, tensor in saved.state_dict().items():
        assert torch.equal(into.state_dict()[name], tensor)
    whole = found.tensors()
    assert whole.keys() == {f"model.{n}" for n in ("embed", "turned", "empty", "scalar", "count")}
    assert all(torch.equal(t, saved.state_dict()[n[6:]]) for n, t in whole.items())


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


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("named", ["model.weight", "optimizer.state.weight.exp_avg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_never_saved(tmp_path, value, named, dtype):
    save(tmp_path, 1)
    kept = numbers(2)
    weight = kept["model"].weight
    weight.data = weight.data.to(dtype)
    tensor = weight.data if named == "model.weight" else kept["optimizer"].state[weight]["exp_avg"]
    tensor[0, 3] = value
    with pytest.raises(CheckpointError, match=rf"step 2 is not saved: {named} holds NaN"):
        save_checkpoint(tmp_path, 2, world=ALONE, trainer_state={}, keep_last=1, **kept)
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(
            tmp_path, 2, world=ALONE, trainer_state={"x": value}, keep_last=1, **numbers(2)
        )
    assert loaded_step(tmp_path) == 1


def other(kind):
    """A model and optimiser that checkpoint 1 of `numbers` does not fit."""
    kept = numbers(5, size=9 if kind == "vocabulary" else 8)
    model = kept["model"]
    if kind == "layer":
        model.bias = nn.Parameter(torch.zeros(1))
    if kind == "dtype":
        model.bfloat16()
    if kind == "optimizer":
        kept["optimizer"] = torch.optim.SGD(model.parameters())
    if kind == "frozen":
        kept["optimizer"] = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
        kept["optimizer"].param_groups.clear()
    return kept


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("layer", r"another model: this one has bias, it has not; set model\.path"),
        ("vocabulary", r"model or vocabulary: weight is \(3, 8\) there, \(3, 9\) here; set model"),
        ("dtype", r"weight in torch\.float32, this run in torch\.bfloat16; set model\.dtype"),
        ("optimizer", r"states of AdamW, this run has SGD; set optim\.name"),
        ("frozen", r"a run that trained other weights \(one among them\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(tmp_path, kind, message):
    save(tmp_path, 1)
    kept = other(kind)
    weight = kept["model"].weight
    before = weight.detach().clone(), dict(kept["optimizer"].state), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, world=ALONE, **kept)
    assert torch.equal(weight, before[0])
    assert dict(kept["optimizer"].state) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


class Hostile:
    """Pickled, it is a call of os.mkdir; unpickled by a plain pickle, the call is made."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def reindexed(path, raw):
    """A checkpoint as somebody would hand it on: another index, and the manifest made to fit."""
    (path / ".metadata").write_bytes(raw)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][".metadata"] = {"bytes": len(raw), "crc32": zlib.crc32(raw)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_an_index_of_somebody_else_runs_no_code(tmp_path):
    path = save(tmp_path, 1)
    reindexed(path, pickle.dumps(Hostile(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir, which no index .* needs"):
        loaded_step(tmp_path)
    assert not (tmp_path / "made").exists()
    for raw in (b"no pickle", pickle.dumps(torch.Size([3]))):
        reindexed(path, raw)
        with pytest.raises(CheckpointError, match="is no index of a checkpoint"):
            loaded_step(tmp_path)


def test_an_index_names_no_file_elsewhere(tmp_path):
    path = save(tmp_path, 1)
    index = pickle.loads((path / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../step_9/__0_0.distcp"
    reindexed(path, pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./step_9.*lies elsewhere"):
        loaded_step(tmp_path)


def test_truncate_keeps_bytes_and_puts_aside_what_it_takes_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1, "x": 0.1}\n', '{"note":  "é", "step": 2}\n']
    odd = ['{"step": null}\n', "[1]\n", '{"x": 1}\n', "[" * 9999 + "\n", '{"step": true}\n']
    later, twice, torn = ['{"step": 3}\n', '{"step": 9}\n'], ['{"step": 1}\n'], ['{"step": 2, "x']
    raw = "".join([kept[0], *odd, kept[1], *later, *twice, *torn])
    path.write_text(raw, "utf-8")
    cut = truncate_jsonl(path, upto=2, once=True)
    assert path.read_text("utf-8") == "".join(kept)
    assert (cut.later, cut.damaged) == (2, [2, 3, 4, 5, 6, 10, 11])
    assert dict(cut.lines) == {1: 1, 2: 1}
    aside = tmp_path / "metrics.dropped.jsonl"
    assert aside.read_text("utf-8") == "".join([*odd, *later, *twice, *torn, "\n"])
    first, second = cut.words(path, 2)
    assert first.startswith(f"{path}: lines taken out: 2 of steps after 2")
    assert "7 damaged (the first was line 2)" in second
    assert f"kept in {aside}" in second
    for name in ("metrics.jsonl", "missing.jsonl"):
        cut = truncate_jsonl(tmp_path / name, upto=2)
        assert cut.words(path, 2) == []
    assert sorted(tmp_path.iterdir()) == [aside, path]


def test_a_step_has_many_paths(tmp_path):
    path = tmp_path / "paths.jsonl"
    path.write_text('{"step": 1}\n' * 3)
    assert truncate_jsonl(path, upto=1).lines == {1: 3}


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "eval.json"
    for text in ("first", "é" * 9):
        write_text(path, text)
        assert path.read_text("utf-8") == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["eval.json"]


def test_rewriting_on_a_full_disk_leaves_the_file(tmp_path):
    path = tmp_path / "paths.jsonl"
    path.write_text('{"step": 1}\n' * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot rewrite"):
            truncate_jsonl(path, upto=1)
        with pytest.raises(CheckpointError, match="cannot write"):
            write_text(path, "x" * 6_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 12_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["paths.jsonl"]


def test_an_existing_run_is_never_overwritten(tmp_path):
    run_dir = tmp_path / "a" / "run"
    with claim_run_dir(run_dir):
        pass
    with claim_run_dir(run_dir):  # claimed but never begun
        (run_dir / "config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match=r"never overwritten.*--resume .*run.*--run\.dir"):
        claim_run_dir(run_dir)
    with claim_run_dir(run_dir, resume=True):
        assert (run_dir / "config.yaml").exists()


def test_a_folder_in_the_place_of_a_log_is_refused_before_anything_changes(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "paths.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"paths\.jsonl is a directory, expected a file"):
        claim_run_dir(tmp_path, resume=True)
    assert not (tmp_path / ".lock").exists()


def test_a_start_that_failed_leaves_nothing_and_one_that_wrote_stays(tmp_path):
    for name in ("failed", "wrote"):
        claim = claim_run_dir(tmp_path / name)
        if name == "wrote":
            (tmp_path / name / "config.yaml").touch()
        claim.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["wrote"]


def test_a_start_that_failed_takes_back_what_it_made_and_no_more(tmp_path):
    claim_run_dir(tmp_path / "a/b/run").abandon()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    for there in ("elsewhere", "link", "elsewhere/../link"):
        claim_run_dir(tmp_path / there).abandon()
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "link"]


def test_directories_that_cannot_be_runs(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        claim_run_dir(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot write .*writable --run\.dir"):
        claim_run_dir(tmp_path / "file" / "run")
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"is no run .*without --resume"):
            claim_run_dir(missing, resume=True)


def test_two_processes_never_write_one_run(tmp_path):
    hold = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1], 'a+')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-S", "-c", hold, str(tmp_path / ".lock")]
    (tmp_path / "config.yaml").touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=r"cannot lock .*process unknown"):
            claim_run_dir(tmp_path, resume=True)
        other.send_signal(signal.SIGKILL)
    with claim_run_dir(tmp_path, resume=True):  # a killed owner needs no cleaning
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "BlockingIOError" in refused.stderr
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def tiny_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "2": 1, "+": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def tiny_model(*, tied, seed=0):
    """An odd vocabulary: two shards of it are unequal."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_export_loads_in_transformers_with_equal_logits(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run" / "export"
    tokenizer = tiny_tokenizer()
    export_model(tiny_model(tied=not tied), tokenizer, out, world=ALONE)
    model = tiny_model(tied=tied, seed=1).eval()
    model.generation_config.do_sample, model.generation_config.top_k = True, 7
    with pytest.raises(CheckpointError, match="not empty"):
        export_model(model, tokenizer, out, world=ALONE)
    export_model(model, tokenizer, out, world=ALONE, replace=True)
    assert [path.name for path in out.parent.iterdir()] == ["export"]
    assert {oct(path.stat().st_mode) for path in out.iterdir()} == {
        oct((out / "config.json").stat().st_mode)
    }
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    assert again.dtype == torch.float32
    assert again.generation_config.top_k == 7
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_an_export_in_another_dtype_and_in_pieces(tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = tiny_model(tied=False)
    export_model(
        model,
        tiny_tokenizer(),
        tmp_path / "a",
        world=ALONE,
        dtype=torch.bfloat16,
        max_shard_size="4KB",
    )
    assert model.dtype == torch.float32
    assert model.config.dtype != "bfloat16"
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    for name, file in index["weight_map"].items():
        assert (tmp_path / "a" / file).stat().st_size < 6_000
        with safe_open(tmp_path / "a" / file, "pt") as tensors:
            assert torch.equal(tensors.get_tensor(name), model.state_dict()[name].bfloat16())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto").dtype == torch.bfloat16
    )
    model.model.norm.weight.data[2] = 7e4  # more than float16 can hold
    with pytest.raises(CheckpointError, match=r"norm.weight holds NaN or infinity"):
        export_model(model, tiny_tokenizer(), tmp_path / "b", world=ALONE, dtype=torch.float16)


def test_an_export_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "export"
    model, tokenizer = tiny_model(tied=True), tiny_tokenizer()
    export_model(model, tokenizer, out, world=ALONE)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN"):
        export_model(model, tokenizer, out, world=ALONE, replace=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write the export"):
            export_model(tiny_model(tied=True), tokenizer, out, world=ALONE, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


class Sharded(nn.Module):
    """A policy as FSDP wants it: one forward, units for each block, embedding, head and root."""

    def __init__(self, world, *, tied=False, wrapped=False, half=False, seed=0):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__()
        self.causal_lm = tiny_model(tied=tied, seed=seed)
        self.dtype = torch.bfloat16 if half else torch.float32
        decoder, head = self.causal_lm.model, self.causal_lm.lm_head
        if wrapped:
            decoder.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in decoder.layers)
        if world.mesh is None:
            return
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
        )
        options = {"mesh": world.mesh, "mp_policy": precision}
        for layer in decoder.layers:
            fully_shard(layer, **options)
        for unit in [[decoder.embed_tokens, head]] if tied else [decoder.embed_tokens, head]:
            fully_shard(unit, reshard_after_forward=False, **options)
        fully_shard(self, **options)

    def forward(self, ids):
        hidden = self.causal_lm.model(ids).last_hidden_state
        return self.causal_lm.lm_head(hidden)


def digest(tensors):
    """Of all bits of all tensors; equal digests are equal tensors."""
    summed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        summed.update(name.encode())
        summed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return summed.hexdigest()


def advance(world, policy, optimizer, steps, *, noise):
    """Loss and gradient norm of each step; this process takes its rows of each batch."""
    told = []
    for step in steps:
        drawn = torch.randint(53, (4, 6), generator=torch.Generator().manual_seed(step))
        ids = drawn[world.rank :: world.size]
        logits = policy(ids)[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / 20
        loss = loss * (1 + noise * (torch.rand(()) + random.random()))
        (loss * world.size).backward()  # FSDP averages
        reshard(policy)
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        told.append([world.sum(loss).item(), whole.item()])
    return told


CASES = {
    "untied": {},
    "tied": {"tied": True},
    "half": {"half": True, "wrapped": True},
    "calm": {},  # no random numbers: the same on any number of processes
}
OTHER = {"1 on": ["2 on"], "1 off": ["2 on"], "2 on": ["1 on", "1 off"]}
"""Run -> runs whose checkpoints it also goes on from: processes, and whether FSDP shards them."""


def worlds():
    """The worlds of this process, by the name of the run that they make."""
    world = open_world(ParallelConfig(shard="always"), "cpu")
    return {"2 on": world} if world.size == 2 else {"1 on": world, "1 off": ALONE}


def start(world, case, *, seed):
    torch.manual_seed(100 * seed + world.rank)
    random.seed(100 * seed + world.rank)
    policy = Sharded(world, seed=seed, **case)
    return policy, torch.optim.AdamW(policy.parameters(), lr=1e-3, eps=1e-6)


def score(policy):
    """What leaves head and root unsharded, as plain tensors in the forward's dtype."""
    with torch.no_grad():
        policy(torch.arange(8).view(2, 4))


def save_and_digest(world, policy, optimizer, run_dir, step):
    """All bits of the state, as they are in the files."""
    kept = {"world": world, "model": policy, "optimizer": optimizer}
    save_checkpoint(run_dir, step, trainer_state={}, keep_last=9, **kept)
    found = find_checkpoint(run_dir, world=world)
    assert found is not None
    assert found.step == step
    return digest(found.tensors())


def straight(root):
    """Each case to step 2, saved, and on to step 4."""
    told = {}
    for run, world in worlds().items():
        for name, case in CASES.items():
            run_dir, noise = Path(root) / run / name, float(name != "calm")
            policy, optimizer = start(world, case, seed=1)
            advance(world, policy, optimizer, range(2), noise=noise)
            score(policy)
            save_and_digest(world, policy, optimizer, run_dir, 2)
            losses = advance(world, policy, optimizer, range(2, 4), noise=noise)
            end = save_and_digest(world, policy, optimizer, run_dir / "end", 4)
            told[f"{run} {name}"] = [losses, end]
    return told


def resumed(root):
    """As `straight` from step 2 on, from its checkpoint and other seeds; a model that was wrapped
    for activation checkpointing no more is, and the other way round."""
    told = {}
    for run, world in worlds().items():
        whence = [(run, name) for name in CASES] + [(other, "calm") for other in OTHER[run]]
        for source, name in whence:
            case = {**CASES[name], "wrapped": not CASES[name].get("wrapped", False)}
            policy, optimizer = start(world, case, seed=2)
            score(policy)
            kept = {"world": world, "model": policy, "optimizer": optimizer}
            moved = source[0] != run[0] and world.main
            warning = pytest.warns(UserWarning, match=f"is of {source[0]} processes, now there are")
            with warning if moved else nullcontext():
                found = load_checkpoint(Path(root) / source / name, **kept)
            assert found is not None
            assert found.step == 2
            losses = advance(world, policy, optimizer, range(2, 4), noise=float(name != "calm"))
            run_dir = Path(root) / f"{run} from {source}" / name
            end = save_and_digest(world, policy, optimizer, run_dir, 4)
            told[f"{run} from {source} {name}"] = [losses, end]
    return told


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run and case -> losses, norms and final bits of each rank; also of each run resumed."""
    root = tmp_path_factory.mktemp("runs")
    told = {}
    for work in (straight, resumed):
        for size in (1, 2):
            ranks = run_ranks(work, root, size=size)
            told |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return told


@pytest.mark.parametrize("name", ["untied", "tied", "half"])
@pytest.mark.parametrize("run", OTHER)
def test_a_resumed_run_goes_on_bitwise(runs, run, name):
    """Weights, optimiser, losses, gradient norms, random numbers; in new processes."""
    assert runs[f"{run} from {run} {name}"] == runs[f"{run} {name}"]


@pytest.mark.parametrize(("run", "source"), [(a, b) for a, others in OTHER.items() for b in others])
def test_a_run_goes_on_with_other_processes(runs, run, source):
    """Equal but for how sums round."""
    went, before = (runs[key][0][0] for key in (f"{run} from {source} calm", f"{source} calm"))
    losses, norms = (torch.tensor(went) - torch.tensor(before)).abs().T
    assert losses.max() < 5e-6
    assert norms.max() < 5e-6


def draw_after_loads(root):
    """Random numbers after each of two loads of a checkpoint that one process saved."""
    world = open_world(ParallelConfig(), "cpu")
    drawn = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match="process 1 on") if world.main else nullcontext():
            assert loaded_step(root, world=world) == 1
        drawn.append([torch.rand(()).item(), random.random()])
    return drawn


def test_a_new_process_draws_its_own_random_numbers_and_each_time_the_same(tmp_path):
    save(tmp_path, 1)
    first = [torch.rand(()).item(), random.random()]
    zero, one = run_ranks(draw_after_loads, tmp_path)
    assert zero == [first, first]
    assert one[0] == one[1]
    assert not {*one[0]} & {*first}


def outcome(world, work):
    """What every process met: the message of a CheckpointError, or ""."""
    try:
        work()
    except CheckpointError as error:
        return world.gather(str(error))
    return world.gather("")


def meet_faults(root):
    root = Path(root)
    world = open_world(ParallelConfig(), "cpu")
    counting = FailAt()
    save(root / "count", 1, keep_last=1, world=world)
    save(root / "count", 2, keep_last=1, world=world, do=counting)
    totals = world.gather(counting.count)
    for guilty, total in enumerate(totals):
        for index in range(total):
            run_dir = root / f"{guilty}-{index}"
            save(run_dir, 1, keep_last=1, world=world)
            do = FailAt(index) if world.rank == guilty else perform
            ends = world.gather(save_with_fault(run_dir, do, world))
            saved = {end[0] for end in ends}
            assert len(saved) == 1, ends
            assert all("No space left" in end[1] for end in ends if not end[0])
            step = loaded_step(run_dir, world=world)
            assert step == 2 if saved == {True} else step in (1, 2)
            assert {*world.gather(step)} == {step}
            assert world.main is False or {*steps_on_disk(run_dir)} <= {"step_1", "step_2"}
    return totals


def test_a_fault_of_one_process_is_met_by_all(tmp_path):
    zero, one = run_ranks(meet_faults, tmp_path)
    assert zero == one
    assert zero[0] > 20
    assert zero[1] >= 5


def meet_trouble(root):
    """Disk full, NaN, a cut file and a background fault, each on process 1 alone."""
    world = open_world(ParallelConfig(), "cpu")
    run_dir = Path(root)
    save(run_dir, 1, keep_last=2, world=world)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    full = outcome(world, lambda: save(run_dir, 2, world=world))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    kept = {"world": world, "keep_last": 2, **numbers(2, world=world)}
    if world.rank == 1:
        kept["model"].weight.data.to_local().fill_(float("nan"))
    nan = outcome(world, lambda: save_checkpoint(run_dir, 2, trainer_state={}, **kept))

    kept |= numbers(2, world=world)
    do = FailAt(1) if world.rank == 1 else perform
    with Saver(run_dir, background=True, do=do, **kept) as saver:
        saver.save(2, {"paths": 2})
        nn.init.constant_(kept["model"].weight, 7)
        late = outcome(world, saver.wait)
        saver.do = perform
        nn.init.constant_(kept["model"].weight, 2)
        saver.save(2, {"paths": 2})
        nn.init.constant_(kept["model"].weight, 7)
    assert loaded_step(run_dir, world=world) == 2

    if world.main:
        os.truncate(run_dir / "checkpoints" / "step_2" / "__1_0.distcp", 100)
    world.barrier()
    warning = pytest.warns(UserWarning, match=r"__1_0.distcp has 100 bytes.*falling back")
    with warning if world.main else nullcontext():
        assert loaded_step(run_dir, world=world) == 1
    save(run_dir, 2, world=world)
    assert loaded_step(run_dir, world=world) == 2
    return [full, nan, late]


def test_trouble_of_one_process_is_told_to_all(tmp_path):
    told = run_ranks(meet_trouble, tmp_path)
    assert told[0] == told[1]
    for (zero, one), words in zip(
        told[0], ("File too large", "model.weight holds NaN", "No space left"), strict=True
    ):
        assert words in one
        assert zero == f"process 1: {one}"
    assert steps_on_disk(tmp_path) == ["step_1", "step_2"]


def save_replicas(root):
    world = open_world(ParallelConfig(replicas=2), "cpu")
    save(root, 1, world=world, size=50_000)
    assert loaded_step(root, world=world, size=50_000) == 1


def test_replicas_write_each_shard_once(tmp_path):
    run_ranks(save_replicas, tmp_path, size=4)
    with pytest.warns(UserWarning, match="is of 4 processes"):
        assert loaded_step(tmp_path, size=50_000) == 1
    shards = [path.stat().st_size for path in (tmp_path / "checkpoints/step_1").glob("__*")]
    whole = 2 * 3 * 50_000 * 4  # weight and moment
    assert sum(shards) == pytest.approx(whole, rel=0.05)
    assert max(shards) == pytest.approx(whole / 3, rel=0.05)  # two rows and one


def save_on_a_gpu(root):
    world = open_world(ParallelConfig(), "cuda")

    def start(seed):
        torch.manual_seed(seed)
        model = nn.Linear(64, 48, device=world.device)
        fully_shard(model, mesh=world.mesh)
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def advance_on_gpu(model, optimizer):
        model(torch.randn(4, 64, device=world.device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start(0)
    advance_on_gpu(model, optimizer)
    kept = {"world": world, "model": model, "optimizer": optimizer}
    with Saver(root, keep_last=1, background=True, **kept) as saver:
        saver.save(1, {})
        for _ in range(3):
            advance_on_gpu(model, optimizer)
    other, other_optimizer = start(1)
    assert load_checkpoint(root, world=world, model=other, optimizer=other_optimizer)
    assert all(s["step"].device == world.device for s in other_optimizer.state.values())
    for _ in range(3):
        advance_on_gpu(other, other_optimizer)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local())


@pytest.mark.gpu
def test_a_background_save_on_a_gpu_resumes_bitwise(tmp_path):
    run_ranks(save_on_a_gpu, tmp_path, size=1)


class DieAt(FailAt):
    """Dies before the n-th file operation."""

    def __call__(self, operation, *args):
        self.count += 1
        if self.count - 1 == self.index:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args)


def die_in_a_save(root, guilty, index, background):
    world = open_world(ParallelConfig(), "cpu")
    save(root, 1, keep_last=1, world=world)
    do = DieAt(index) if world.rank == guilty else perform
    kept = {"world": world, "keep_last": 1, "do": do, **numbers(2, world=world)}
    with Saver(root, background=background, **kept) as saver:
        saver.save(2, {"paths": 2})


def survives(root, guilty, index, *, background):
    """The others end with an error, soon; one of the two checkpoints is there, without cleaning."""
    ranks = watch_ranks(die_in_a_save, root, guilty, index, background)
    assert ranks[guilty].status == -signal.SIGKILL
    with pytest.warns(UserWarning, match="is of 2 processes"):
        step = loaded_step(root)
    assert step in (1, 2)
    assert steps_on_disk(root) in ([f"step_{step}"], ["step_1", "step_2"])
    return step


def test_kill_9_of_one_process_in_a_save(tmp_path):
    assert survives(tmp_path / "first", 1, 0, background=False) == 1
    assert survives(tmp_path / "thread", 1, 2, background=True) == 1
    assert survives(tmp_path / "main", 0, 10, background=False) == 1
    assert survives(tmp_path / "renamed", 0, 20, background=True) == 2


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_kill_9_of_one_process_at_every_operation(tmp_path, background):
    totals = run_ranks(meet_faults, tmp_path / "count")[0]
    for guilty, total in enumerate(totals):
        for index in range(total):
            survives(tmp_path / f"{guilty}-{index}", guilty, index, background=background)


def export_all(root):
    """Exports of sharded policies, checked where they were made."""
    from torch.distributed.tensor.debug import CommDebugMode
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12).view(2, 6)
    for run, world in worlds().items():
        for name in ("untied", "tied", "half"):
            policy, optimizer = start(world, CASES[name], seed=3)
            score(policy)
            with CommDebugMode() as gathers:
                by_unit = {key: weight.clone() for key, weight in full_weights(policy)}
            units = 4 if name == "tied" else 5
            assert gathers.get_total_counts() == (units if world.size == 2 else 0)
            dtype = policy.dtype
            one_by_one = dict(full_weights(policy, torch.float32))
            assert by_unit.keys() == one_by_one.keys()
            assert name != "tied" or "lm_head.weight" not in by_unit
            for key, weight in by_unit.items():
                assert weight.dtype == (torch.float32 if world.mesh is None else dtype)
                assert torch.equal(weight.to(dtype), one_by_one[key].to(dtype))
            for given in (None, torch.float32):
                out = Path(root) / run / f"{name} {given}"
                export_model(policy, tiny_tokenizer(), out, world=world, dtype=given)
                again = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
                assert again.dtype == (given or dtype)
                weights = dict(again.named_parameters())
                assert weights.keys() == one_by_one.keys()
                assert all(torch.equal(w, one_by_one[k].to(w.dtype)) for k, w in weights.items())
                with torch.no_grad():
                    difference = policy(ids).float() - again(ids).logits.float()
                if again.dtype == dtype == torch.float32:
                    assert difference.abs().max() <= 1e-6
            save_and_digest(world, policy, optimizer, Path(root) / run / name, 1)
    if world.size == 2:
        fail_in_turn(world, policy, Path(root) / "failed")


def fail_in_turn(world, policy, out):
    out.mkdir(exist_ok=True)
    (out / "mine").touch()
    world.barrier()
    for message in outcome(world, lambda: export_model(policy, tiny_tokenizer(), out, world=world)):
        assert "is not empty" in message


@pytest.mark.parametrize("size", [1, 2])
def test_an_export_of_shards_is_the_model(tmp_path, size):
    """Also: from DCP to Hugging Face and back to DCP bitwise."""
    from transformers import AutoModelForCausalLM

    run_ranks(export_all, tmp_path, size=size)
    for name in ("untied", "tied", "half"):
        run = tmp_path / f"{size} on"
        model = AutoModelForCausalLM.from_pretrained(run / f"{name} torch.float32", dtype="auto")
        optimizer = torch.optim.AdamW(model.parameters())
        kept = {"world": ALONE, "model": model, "optimizer": optimizer}
        save_checkpoint(tmp_path / name, 1, trainer_state={}, keep_last=1, **kept)
        there, back = (find_checkpoint(path, world=ALONE) for path in (run / name, tmp_path / name))
        assert there is not None
        assert back is not None
        assert digest(there.tensors()) == digest(back.tensors())


def save_for_ever(root, step, guilty, delay, background):
    world = open_world(ParallelConfig(), "cpu")
    assert world.side
    if world.rank == guilty:
        threading.Timer(delay, os.kill, [os.getpid(), signal.SIGKILL]).start()
    while step := step + 1:
        kept = {"world": world, "keep_last": 2, **numbers(step, 20_000, world)}
        with Saver(root, background=background, **kept) as saver:
            saver.save(step, {"paths": step})
        if world.main:
            (root / f"durable_{step}").touch()


def killed_at_random(root, rounds):
    root.mkdir()
    chance, step = random.Random(11), 0
    for turn in range(rounds):
        ranks = watch_ranks(
            save_for_ever, root, step, turn % 2, chance.uniform(0.05, 0.5), turn % 4 > 1
        )
        assert ranks[turn % 2].status == -signal.SIGKILL
        names = [path.name for path in root.glob("durable_*")]
        durable = max([step, *(int(name.removeprefix("durable_")) for name in names)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is of 2 processes")
            step = loaded_step(root, size=20_000) or 0
        assert durable <= step <= durable + 1
    return step


def test_two_processes_killed_at_random_moments(tmp_path):
    killed_at_random(tmp_path / "run", 2)


@pytest.mark.slow
def test_two_processes_killed_at_fifty_random_moments(tmp_path):
    assert killed_at_random(tmp_path / "run", 50) > 10

"""What a checkpoint holds comes back bit for bit, or is refused before anything changes."""

import json
import os
import pickle
import random
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from saving import (
    ALONE,
    loaded_step,
    numbers,
    save,
)
from torch import nn
from torch.distributed.tensor import DTensor

from vpgea_fast.checkpoint import (
    CheckpointError,
    Saver,
    load_checkpoint,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from vpgea_fast.checkpoint.state import write_own
from vpgea_fast.config import ParallelConfig
from vpgea_fast.distributed import open_world


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
    with pytest.raises(CheckpointError, match=r"metadata names posix\.mkdir, which no index"):
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


@pytest.mark.parametrize("first", [KeyboardInterrupt, None])
def test_a_ctrl_c_in_the_zip_writer_is_no_full_disk(first, monkeypatch, tmp_path):
    """The writer cannot close a file that is half written, and says what it says of a disk."""

    def save(*_):
        try:
            if first:
                raise first
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", save)
    taken: Any = SimpleNamespace(own={})
    with pytest.raises(first or OSError):
        write_own(tmp_path / "own", taken)


def test_a_full_disk_is_one_in_a_callers_handler_of_ctrl_c(monkeypatch, tmp_path):
    def save(*_):
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", save)
    taken: Any = SimpleNamespace(own={})
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(OSError, match="unexpected pos"):
            write_own(tmp_path / "own", taken)

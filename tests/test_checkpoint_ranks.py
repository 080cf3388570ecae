"""Checkpoints of several processes: sharded, resumed on other numbers of them, killed in a save."""

import hashlib
import os
import random
import resource
import signal
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, watch_ranks
from saving import (
    ALONE,
    FailAt,
    loaded_step,
    numbers,
    save,
    save_with_fault,
    steps_on_disk,
    tiny_model,
    tiny_tokenizer,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vpgea_fast.checkpoint import (
    CheckpointError,
    Saver,
    export_model,
    find_checkpoint,
    load_checkpoint,
    perform,
    save_checkpoint,
)
from vpgea_fast.config import ParallelConfig
from vpgea_fast.distributed import full_weights, open_world, reshard


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

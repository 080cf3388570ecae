"""One device whose optimiser has its states in host memory: the numbers of FSDP2's offload and of
states on the device, bit for bit, with no weight that is copied in a forward or backward."""

import functools
import gc
import random
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_sharding import (
    ALONE,
    backward,
    leave,
    make_rows,
    passes_of,
    score,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpgea_fast import config, hosted
from vpgea_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from vpgea_fast.config import ModelConfig, OptimConfig, ParallelConfig
from vpgea_fast.distributed import full_weights, master_weights, open_world, reshard
from vpgea_fast.hosted import Blocks, host_tensors
from vpgea_fast.model import load_policy, make_replica, random_policy
from vpgea_fast.optim import ApartAdamW, apply_update, build_optimizer, gradient_norm
from vpgea_fast.policies import open_policies
from vpgea_fast.rollout.engine import Sampling
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.types import SampleRequest

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[1]
BF16, F32 = torch.bfloat16, torch.float32


# --- host memory ----------------------------------------------------------------------------------


def test_tensors_in_one_piece_of_host_memory():
    shapes = [torch.Size(shape) for shape in ((3, 5), (), (0, 4), (130,))]
    made = host_tensors(shapes, BF16, CPU)
    assert [t.shape for t in made] == shapes
    assert all(t.dtype is BF16 and not t.any() for t in made)
    assert [t.storage_offset() for t in made] == [
        0,
        64,
        128,
        128,
    ]  # each begins at a multiple of 64 elements
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert [t.unique().tolist() for t in made] == [[0], [1], [], [3]]
    assert [t.shape for t in host_tensors([torch.Size([0])], F32, CPU)] == [(0,)]


class Locks:
    """What CUDA is asked to lock, and to give free again."""

    def __init__(self, answer=0):
        self.answer, self.locked = answer, {}

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 - CUDA's name
        self.locked[address] = (size, flags)
        return self.answer

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.locked[address]


def test_cuda_locks_the_piece_once_and_as_long_as_a_tensor_of_it_lives(monkeypatch):
    locks = Locks()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: locks)
    shapes = [torch.Size([1000]), torch.Size([70])]
    first, second = host_tensors(shapes, F32, torch.device("cuda"))
    assert locks.locked == {first.data_ptr(): (4 * (1024 + 128), 0)}
    del first
    gc.collect()
    assert len(locks.locked) == 1
    assert not second.any()
    del second
    gc.collect()
    assert locks.locked == {}


@pytest.mark.parametrize("error", [RuntimeError("Cannot re-initialize CUDA"), TypeError("None")])
def test_pages_end_in_silence_where_cuda_is_gone_before_them(error, monkeypatch):
    """In a forked child, and at the interpreter's end: what is raised then stands on stderr."""
    locks, unraised = Locks(), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: locks)
    (only,) = host_tensors([torch.Size([10])], F32, torch.device("cuda"))

    def gone():
        raise error

    monkeypatch.setattr(torch.cuda, "cudart", gone)
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    assert not only.any()
    del only
    gc.collect()
    assert not unraised


def test_memory_that_is_not_free_is_refused_before_it_is_taken(monkeypatch, tmp_path):
    """Linux would give it, and kill the process that writes there."""
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:       24684096 kB\nMemFree:  9 kB\nMemAvailable:    4 kB\n")
    monkeypatch.setattr(hosted, "MEMORY", said)
    (fits,) = host_tensors([torch.Size([1024])], F32, CPU)
    assert fits.shape == (1024,)
    with pytest.raises(MemoryError, match=r"cannot be had for it \(0\.0 GiB are free\)"):
        host_tensors([torch.Size([1025])], F32, CPU)
    for other in ("", "MemAvailable:\n", "MemAvailable: many kB\n"):
        said.write_text(other)
        assert len(host_tensors([torch.Size([1025])], F32, CPU)) == 1
    said.unlink()
    assert len(host_tensors([torch.Size([1025])], F32, CPU)) == 1


def test_memory_that_cannot_be_had_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Locks(answer=2))
    words = r"parallel\.cpu_offload: got true, but 0\.0 GiB of host .* \(CUDA error 2\).*set false"
    with pytest.raises(MemoryError, match=words):
        host_tensors([torch.Size([10])], F32, torch.device("cuda"))
    with pytest.raises(MemoryError, match=r"but 1048576\.0 GiB of host memory .*ulimit -l"):
        host_tensors([torch.Size([2**48])], F32, CPU)


class Lane:
    """A stream that does what is queued when the scheduler says so, and not before."""

    def __init__(self, draw, lanes):
        self.draw, self.lanes, self.queue, self.done, self.queued = draw, lanes, deque(), 0, 0
        lanes.append(self)

    def add(self, act, ready=lambda: True):
        self.queue.append((ready, act))
        self.queued += 1

    def mark(self):
        return (self, self.queued)

    def after(self, mark):
        if mark is not None:
            lane, count = mark
            self.add(lambda: None, lambda: lane.done >= count)

    def copy(self, into, of):
        for target, source in zip(into, of, strict=True):
            self.add(lambda target=target, source=source: target.copy_(source))

    def wait(self):
        """Act in any order that the marks allow, until nothing is left here."""
        while self.queue:
            lane = self.draw.choice([x for x in self.lanes if x.queue and x.queue[0][0]()])
            lane.queue.popleft()[1]()
            lane.done += 1


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_the_streams_changes_a_block(seed):
    """Every schedule that the waits leave open: a missing wait would read or overwrite a block."""
    draw, lanes = random.Random(seed), []
    blocks = Blocks(CPU, [F32, BF16], 8)
    blocks.here, blocks.coming, blocks.leaving = (Lane(draw, lanes) for _ in range(3))
    count = 3 * hosted.DEPTH + 1
    host = [(torch.full((8 - n % 2,), n + 1.0), torch.zeros(8 - n % 2, dtype=BF16))
            for n in range(count)]  # fmt: skip

    def work(a, b):
        def act():
            b.copy_(a)
            a.mul_(10)

        blocks.here.add(act)

    blocks.run((pair, work) for pair in host)
    for number, (a, b) in enumerate(host):
        assert a.unique().tolist() == [10 * (number + 1)]
        assert b.unique().tolist() == [number + 1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("at", [0, 1, hosted.DEPTH, 2 * hosted.DEPTH])
def test_an_error_leaves_nothing_on_its_way(at, seed):
    """Whoever catches it may free the rooms and the host's pages, which a copy would still go to.
    Every block is whole: as it was, or as it should be."""
    draw, lanes = random.Random(seed), []
    blocks = Blocks(CPU, [F32], 8)
    blocks.here, blocks.coming, blocks.leaving = (Lane(draw, lanes) for _ in range(3))
    host = [(torch.full((8,), n + 1.0),) for n in range(3 * hosted.DEPTH)]

    def work(number, a):
        if number == at:
            raise torch.OutOfMemoryError("no room for the scratch")
        blocks.here.add(lambda: a.mul_(10))

    with pytest.raises(torch.OutOfMemoryError):
        blocks.run((pair, functools.partial(work, n)) for n, pair in enumerate(host))
    assert not blocks.coming.queue
    assert not blocks.leaving.queue
    for number, (a,) in enumerate(host):
        assert a.unique().tolist() == [(10 if number < at else 1) * (number + 1)]


# --- the optimiser --------------------------------------------------------------------------------

CASES = [
    (OptimConfig(lr=1e-2, weight_decay=0.1), F32, F32),
    (OptimConfig(lr=1e-2, weight_decay=0.1), torch.float64, torch.float64),
    (OptimConfig(lr=1e-2, weight_decay=0.1), BF16, F32),
    (OptimConfig(name="adamw_bf16", lr=1e-2), BF16, F32),
    (OptimConfig(name="adamw_bf16", stochastic_rounding=True, lr=1e-2), BF16, BF16),
    (OptimConfig(stochastic_rounding=True, lr=1e-2), BF16, BF16),
]


def parameters(dtype):
    torch.manual_seed(4)
    return [torch.nn.Parameter(torch.randn(*s).to(dtype)) for s in ((7, 41), (3,), (1,), (2, 2))]


def gradients_for(step, params):
    generator = torch.Generator().manual_seed(step)
    found = [torch.randn(p.shape, generator=generator) for p in params]
    found[2] = found[2] if step % 2 else None  # of a parameter that is not always trained
    return found


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(("cfg", "forward", "master"), CASES)
def test_a_step_in_blocks_is_bitwise_the_step_of_states_on_the_device(
    cfg, forward, master, where, monkeypatch
):
    monkeypatch.setattr("vpgea_fast.optim.apart.BLOCK", 64)  # 287 elements are five blocks
    exact = parameters(master)
    plain = build_optimizer(exact, cfg, seed=3)
    params = [torch.nn.Parameter(p.detach().to(forward, copy=True)) for p in exact]
    masters = {}
    if forward != master:
        made = host_tensors((p.shape for p in params), master, CPU)
        masters = {p: m.copy_(e.detach()) for p, m, e in zip(params, made, exact, strict=True)}
    ours = build_optimizer(params, cfg, seed=3, masters=masters, hosted=where == "host")
    assert isinstance(ours, ApartAdamW)
    for step in range(4):
        for group, optimizer in ((exact, plain), (params, ours)):
            for p, g in zip(group, gradients_for(step, group), strict=True):
                if g is not None:
                    p.grad_dtype = torch.promote_types(p.dtype, F32)
                    p.grad = g.to(p.grad_dtype)
                    if optimizer is plain and master is BF16:
                        p.grad, p.grad_dtype = None, BF16
                        p.grad = g.to(BF16)
        norms = [gradient_norm(plain), gradient_norm(ours)]
        norms += [apply_update(it, lr=1e-2, max_grad_norm=0.5) for it in (plain, ours)]
        assert len({*norms}) == 1
        for e, p in zip(exact, params, strict=True):
            weight = masters.get(p, p)
            assert torch.equal(weight, e)
            assert torch.equal(p, weight.to(forward))
            assert ours.state[p].keys() == plain.state[e].keys()
            for key, value in plain.state[e].items():
                assert ours.state[p][key].dtype == value.dtype
                assert torch.equal(ours.state[p][key], value), (step, key)
    # And as torch's own way of saving has it.
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = build_optimizer(
        again,
        cfg,
        seed=9,
        masters=dict(zip(again, masters.values(), strict=False)),
        hosted=where == "host",
    )
    other.load_state_dict(ours.state_dict())
    for p, q in zip(params, again, strict=True):
        for key in ours.state[p]:
            assert torch.equal(ours.state[p][key], other.state[q][key])
        if "exp_avg" in other.state[q]:
            assert other.state[q]["exp_avg"] is other.room(q, "exp_avg")


@pytest.fixture
def pieces(monkeypatch):
    """The pieces of host memory that optimisers take from now on."""
    made = []

    def counted(shapes, *args):
        made.append(None)
        return host_tensors(shapes, *args)

    monkeypatch.setattr("vpgea_fast.optim.apart.host_tensors", counted)
    return made


def test_moments_take_memory_when_they_are_asked_for(pieces):
    """28 GiB of 7B, of which a run that only records paths needs nothing."""
    optimizers = [
        build_optimizer(parameters(F32), OptimConfig(), masters={}, hosted=True) for _ in range(2)
    ]
    assert not pieces
    optimizers[0].reserve()
    optimizers[0].reserve()
    assert len(pieces) == 2
    (weight, *_) = optimizers[1].param_groups[0]["params"]
    weight.grad = torch.ones_like(weight)
    optimizers[1].step()
    assert len(pieces) == 4


@pytest.mark.parametrize(("record", "count"), [("null", 2), ("paths", 0)])
def test_a_run_reserves_what_it_will_update(record, count, tiny_words, pieces):
    words = tiny_words({"parallel.cpu_offload": "true", "train.record": record})("run")
    cfg = config.load(ROOT / "configs/tiny.yaml", words).asked
    policies = open_policies(cfg, ALONE, lambda policy: passes_of(policy, ALONE, 60))
    assert isinstance(policies["policy"].optimizer, ApartAdamW)
    assert len(pieces) == count


def test_nothing_to_step_and_eight_bits():
    (weight,) = parameters(F32)[:1]
    optimizer = build_optimizer([weight], OptimConfig(), masters={}, hosted=True)
    assert apply_update(optimizer, lr=1.0, max_grad_norm=1.0) == 0.0
    assert not optimizer.state
    with pytest.raises(ValueError, match=r"optim\.name: got 'adamw_8bit' .* set adamw_bf16, or"):
        build_optimizer([weight], OptimConfig(name="adamw_8bit"), masters={}, hosted=True)
    beside = {"masters": {weight: weight}, "hosted": False}
    with pytest.raises(ValueError, match=r"'adamw_8bit' with float32 masters beside .* set model"):
        build_optimizer([weight], OptimConfig(name="adamw_8bit"), **beside)
    with pytest.raises(ValueError, match=r"got False with bfloat16 weights"):
        build_optimizer(parameters(BF16), OptimConfig(), masters={}, hosted=True)


# --- the policy -----------------------------------------------------------------------------------

HERE = ParallelConfig(cpu_offload=True)
BESIDE = ParallelConfig()
STREAMED = ParallelConfig(cpu_offload=True, shard="always", accumulate="unsharded")
KINDS = {
    "float32": ({"dtype": "float32"}, {}),
    "masters": ({"dtype": "bfloat16"}, {}),
    "bfloat16": (
        {"dtype": "bfloat16", "master_dtype": "bfloat16"},
        {"name": "adamw_bf16", "stochastic_rounding": True},
    ),
}


def opened(path, world, parallel, kind):
    dtypes, optim = KINDS[kind]
    cfg = ModelConfig(path=path, device="cpu", activation_checkpointing="none", **dtypes)
    policy = load_policy(cfg, world, parallel)
    cfg = OptimConfig(lr=1e-3, **optim)
    apart = {"masters": policy.masters, "hosted": policy.hosted}
    return policy, build_optimizer(policy.parameters(), cfg, seed=1, **apart)


def stepped(policy, optimizer, world, steps):
    """Loss, gradient norm and log-probs of updates of several micro-batches each."""
    history = []
    for step in steps:
        rows = make_rows(7, seed=step)
        history += [logp.tolist() for logp in score(policy, world, rows)]
        logps = passes_of(policy, world, 60)(backward(policy), rows)
        reshard(policy)
        history += [
            sum((r.coef.double() * logp).sum().item() for r, logp in zip(rows, logps, strict=True)),
            gradient_norm(optimizer),
            apply_update(optimizer, lr=1e-3, max_grad_norm=0.05),
        ]
    return history


def numbers_of(policy, optimizer):
    """Every weight that is updated, and its moments, by name."""
    own = policy.causal_lm.named_parameters()
    masters = master_weights(policy)
    found = {name: masters[name].detach().clone() for name, _ in own}
    for name, p in policy.causal_lm.named_parameters():
        found |= {f"{name} {k}": v.clone() for k, v in optimizer.state[p].items()}
    return {n: v.to_local() if isinstance(v, DTensor) else v for n, v in found.items()}


def streamed_facts(path, kind, folder):
    """What FSDP2 with offload makes of two updates, its checkpoint, and of two more."""
    world = open_world(STREAMED, "cpu")
    policy, optimizer = opened(path, world, STREAMED, kind)
    facts = {"history": stepped(policy, optimizer, world, range(2))}
    save_checkpoint(
        Path(folder),
        2,
        world=world,
        model=policy,
        optimizer=optimizer,
        trainer_state={},
        keep_last=1,
    )
    facts["history"] += stepped(policy, optimizer, world, range(2, 4))
    tensors = {"numbers": numbers_of(policy, optimizer)}
    tensors["export"] = {name: w.clone() for name, w in full_weights(policy)}
    torch.save(tensors, Path(folder) / "end.pt")
    reshard(policy)
    with WeightCopies(policy) as seen:
        passes_of(policy, world, 60)(backward(policy), make_rows(7))
    facts["copies"] = seen.count
    del policy, optimizer
    leave(world)
    return facts


class WeightCopies(TorchDispatchMode):
    """Copies of whole weights of the decoder, into whatever tensor."""

    def __init__(self, policy):
        super().__init__()
        head = policy.head.weight
        self.of = {}
        for p in policy.parameters():
            local = p.to_local() if isinstance(p, DTensor) else p
            # A CPU without bfloat16 units multiplies the head in float32, a part at a time.
            if p is not head:
                self.of[local.untyped_storage().data_ptr()] = local.numel()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("copy", "clone", "cat", "all_gather")):
            flat = torch.utils._pytree.tree_leaves((args, kwargs))
            for tensor in flat:
                if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                    whole = self.of.get(tensor.untyped_storage().data_ptr())
                    self.count += whole == tensor.numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "tied", "parallel"),
    [
        ("float32", "tied", HERE),
        ("masters", "untied", HERE),
        ("bfloat16", "tied", HERE),
        ("masters", "tied", BESIDE),
        ("masters", "untied", BESIDE),
        ("bfloat16", "untied", BESIDE),
    ],
)
def test_whole_weights_train_bitwise_as_streamed_ones(kind, tied, parallel, model_dirs, tmp_path):
    """Losses, log-probs, gradient norms, weights and moments of four updates; a checkpoint of
    FSDP2's goes on, and one of ours; no weight is copied in a forward or backward."""
    (want,) = run_ranks(streamed_facts, model_dirs[tied], kind, str(tmp_path / "old"), size=1)
    want |= torch.load(tmp_path / "old/end.pt")
    policy, optimizer = opened(model_dirs[tied], ALONE, parallel, kind)
    assert (policy.sharded, policy.hosted) == (False, parallel is HERE)
    assert {p.dtype for p in policy.parameters()} == {policy.dtype}
    got = stepped(policy, optimizer, ALONE, range(2))
    save_checkpoint(
        tmp_path / "new",
        2,
        world=ALONE,
        model=policy,
        optimizer=optimizer,
        trainer_state={},
        keep_last=1,
    )
    got += stepped(policy, optimizer, ALONE, range(2, 4))
    assert got == want["history"]
    ends = [numbers_of(policy, optimizer)]
    for folder in ("old", "new"):
        other, fresh = opened(model_dirs[tied], ALONE, parallel, kind)
        stepped(other, fresh, ALONE, [9])  # what is there before must not show
        into = {"model": other, "optimizer": fresh}
        assert load_checkpoint(tmp_path / folder, world=ALONE, **into) is not None
        assert stepped(other, fresh, ALONE, range(2, 4)) == want["history"][len(got) // 2 :]
        ends.append(numbers_of(other, fresh))
    for end in ends:
        assert end.keys() == want["numbers"].keys()
        for name, value in end.items():
            assert value.dtype == want["numbers"][name].dtype
            assert torch.equal(value, want["numbers"][name]), name
    for name, weight in full_weights(policy):
        assert torch.equal(weight, want["export"][name]), name
    with WeightCopies(policy) as seen:
        passes_of(policy, ALONE, 60)(backward(policy), make_rows(7))
    assert seen.count == 0
    assert want["copies"] > 20  # what the count is of


def test_whole_bfloat16_weights_train_as_those_with_states_in_host_memory(model_dirs, tmp_path):
    """Gradients in float32 over the micro-batches, rounded once; a checkpoint of either goes on
    with the other."""
    found = []
    whole = (ParallelConfig(shard="never"), HERE)
    for number, (parallel, other) in enumerate((whole, whole[::-1])):
        policy, optimizer = opened(model_dirs["tied"], ALONE, parallel, "bfloat16")
        assert isinstance(optimizer, ApartAdamW) == (parallel is HERE)
        history = stepped(policy, optimizer, ALONE, range(2))
        save_checkpoint(
            tmp_path / str(number),
            2,
            world=ALONE,
            model=policy,
            optimizer=optimizer,
            trainer_state={},
            keep_last=1,
        )
        into, fresh = opened(model_dirs["tied"], ALONE, other, "bfloat16")
        load_checkpoint(tmp_path / str(number), world=ALONE, model=into, optimizer=fresh)
        history += stepped(into, fresh, ALONE, range(2, 4))
        found.append((history, numbers_of(into, fresh)))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


def test_a_checkpoint_holds_each_state_once(model_dirs, tmp_path):
    """Views of one piece of host memory: written as they are stored, each would bring the piece."""
    policy, optimizer = opened(model_dirs["untied"], ALONE, HERE, "masters")
    stepped(policy, optimizer, ALONE, [0])
    into = {"world": ALONE, "model": policy, "optimizer": optimizer}
    save_checkpoint(tmp_path, 1, trainer_state={}, keep_last=1, **into)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.distcp"))
    states = sum(t.nbytes for t in numbers_of(policy, optimizer).values())
    assert states <= size <= 1.2 * states


def test_what_a_checkpoint_of_another_kind_is_told(model_dirs, tmp_path):
    policy, optimizer = opened(model_dirs["untied"], ALONE, HERE, "bfloat16")
    stepped(policy, optimizer, ALONE, [0])
    into = {"world": ALONE, "model": policy}
    save_checkpoint(tmp_path, 1, trainer_state={}, keep_last=1, optimizer=optimizer, **into)
    wide = OptimConfig(stochastic_rounding=True)
    before = numbers_of(policy, optimizer)
    fresh = build_optimizer(policy.parameters(), wide, masters=policy.masters, hosted=True)
    with pytest.raises(CheckpointError, match=r"holds exp_avg.* in torch\.bfloat16.*set optim\.na"):
        load_checkpoint(tmp_path, optimizer=fresh, **into)
    other, plain = opened(model_dirs["untied"], ALONE, HERE, "masters")
    with pytest.raises(CheckpointError, match=r"in torch\.bfloat16, this run in torch\.float32"):
        load_checkpoint(tmp_path, world=ALONE, model=other, optimizer=plain)
    assert all(torch.equal(v, before[n]) for n, v in numbers_of(policy, optimizer).items())


@pytest.mark.parametrize("parallel", [HERE, BESIDE])
def test_masters_are_what_the_files_hold_and_what_a_wider_export_gives(parallel, model_dirs):
    exact = load_policy(ModelConfig(path=model_dirs["tied"], dtype="float32", device="cpu"))
    policy, _ = opened(model_dirs["tied"], ALONE, parallel, "masters")
    want = dict(exact.causal_lm.named_parameters())
    assert policy.masters is not None
    assert len(policy.masters) == len(want)
    wide, own = dict(full_weights(policy, F32)), dict(full_weights(policy))
    for name, weight in want.items():
        assert torch.equal(wide[name], weight)
        assert torch.equal(own[name], weight.to(BF16))
    embedding = policy.causal_lm.get_input_embeddings().weight
    assert policy.head.weight is embedding
    drawn = random_policy(
        policy.causal_lm.config, ModelConfig(device="cpu", dtype="bfloat16"), ALONE, parallel
    )
    assert drawn.masters is not None
    assert all(
        torch.equal(w, m.to(w.dtype)) and (m.any() or m.ndim < 2) for w, m in drawn.masters.items()
    )


@pytest.mark.parametrize("parallel", [HERE, BESIDE])
def test_it_samples_as_a_replica_of_its_weights(parallel, model_dirs):
    """The engine runs the trained module itself: no copy of the model."""
    policy, _ = opened(model_dirs["untied"], ALONE, parallel, "masters")
    assert {p.dtype for p in policy.parameters()} == {policy.dtype}
    replica = make_replica(policy, model_dirs["untied"])
    with torch.no_grad():
        for name, weight in full_weights(policy):
            dict(replica.named_parameters())[name].copy_(weight)
    sampling = Sampling(max_new_tokens=12, think_close_id=3, eos_ids=(2,))
    who = {"question_id": "q", "stream": "prior"}
    requests = [
        SampleRequest(**who, index=n, prompt_ids=torch.arange(4, 8 + n), seed=n) for n in range(3)
    ]
    found = []
    for model in (policy.causal_lm, replica):
        engine = HFEngine(model, max_batch=2)
        found.append([path.z_ids.tolist() for path in engine.generate(requests, sampling)])
    assert found[0] == found[1]
    assert len({*map(tuple, found[0])}) == 3

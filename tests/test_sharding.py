"""The sharded policy against one process: the same numbers, few collectives, and no silent trap.

Two gloo processes, float32 unless said, a vocabulary that two does not divide, and rows of unequal
length, so that ranks have unequal tokens.
"""

import gc
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import SHAPE, run_ranks, watch_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpgea_fast.checkpoint import load_checkpoint, save_checkpoint
from vpgea_fast.config import ConfigError, ModelConfig, OptimConfig, ParallelConfig
from vpgea_fast.distributed import World, full_weights, open_world, reshard
from vpgea_fast.losses import weighted_logprob_loss
from vpgea_fast.metrics import model_flops
from vpgea_fast.model import load_policy, make_replica
from vpgea_fast.model_dir import ModelError
from vpgea_fast.optim import apply_update, build_optimizer
from vpgea_fast.packing import drop_zero_rows, pack_rows
from vpgea_fast.passes import Passes
from vpgea_fast.shard import allocate
from vpgea_fast.types import TrainRow

V = SHAPE["vocab"]


def make_rows(count, seed=0, gated=0):
    """Rows of 4 context and 3 to 40 sampled tokens; the last `gated` ones have no coefficient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator)

    rows = []
    for number in range(count):
        tokens = draw(0, V, int(draw(3, 41, 1)))
        coef = torch.randn(1, generator=generator).expand(len(tokens)) / (40 * count)
        coef = torch.zeros(len(tokens)) if number >= count - gated else coef
        rows.append(
            TrainRow(
                context_ids=draw(0, V, 4),
                token_ids=tokens,
                coef=coef,
                stream="posterior",
                view="teacher",
            )
        )
    return rows


def load(path, world, *, dtype="float32", accumulate="sharded", tensor="none", **model):
    cfg = ModelConfig(
        path=path, dtype=dtype, device="cpu", **{"activation_checkpointing": "none"} | model
    )
    return load_policy(cfg, world, ParallelConfig(accumulate=accumulate, tensor=tensor))


def passes_of(policy, world, budget):
    return Passes(world, budget, model_flops(policy.causal_lm.config))


def backward(policy):
    def step(batch, last):
        policy.expect_backward(last=last)
        out = policy(batch)
        out.loss.backward()
        return out.logp

    return step


def train_pass(policy, world, rows, budget=120):
    """Gradients of `rows`; the loss."""
    logps = passes_of(policy, world, budget)(backward(policy), rows)
    reshard(policy)
    return sum(
        (row.coef.double() * logp).sum().item() for row, logp in zip(rows, logps, strict=True)
    )


def score(policy, world, rows, budget=120):
    """Log-probs of `rows`, without gradients."""
    return passes_of(policy, world, budget)(lambda batch, _: policy.logprob(batch), rows)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(policy):
    named = policy.causal_lm.named_parameters()
    return {name: whole(p.grad) for name, p in named if p.grad is not None}


def norm_of(found):
    return torch.stack([g.double().norm() for g in found.values()]).norm().item()


def error(ours, exact):
    """Largest relative Frobenius error of any parameter; biases of keys, whose true gradient is
    zero, against the largest gradient."""
    top = max(g.norm() for g in exact.values())
    return max(
        (
            (ours[name].double() - g.double()).norm() / (top if "k_proj.bias" in name else g.norm())
        ).item()
        for name, g in exact.items()
    )


class Collectives(TorchDispatchMode):
    """What FSDP sends, in order: (kind, elements of the whole tensor, dtype, is the head's).

    The embedding may have the head's size: a gather is the head's if it sends the head's shard.
    """

    def __init__(self, policy):
        super().__init__()
        self.shard = policy.head.weight.detach().to_local().flatten().clone()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "_allgather_base_" in name:
            sent = args[1][: len(self.shard)]
            heads = sent.shape == self.shard.shape and torch.equal(sent, self.shard.to(sent.dtype))
            self.seen.append(("gather", args[0].numel(), str(args[0].dtype), heads))
        if "_reduce_scatter_base_" in name:
            self.seen.append(("reduce", args[1].numel(), str(args[1].dtype), None))
        return function(*args, **(kwargs or {}))

    @property
    def head_gathers(self):
        return sum(bool(heads) for *_, heads in self.seen)

    @property
    def reduces(self):
        """Elements of every reduce-scatter, in order."""
        return [numel for kind, numel, *_ in self.seen if kind == "reduce"]

    def dtypes(self, kind):
        return sorted({dtype for k, _, dtype, _ in self.seen if k == kind})


HEAD = (V + 1) * SHAPE["hidden"]  # padded to two equal shards
ALONE = World(torch.device("cpu"))


def leave(world):
    gc.collect()
    world.close()


# --- the same numbers -----------------------------------------------------------------------------


def step_facts(path, cases):
    """For every case a scoring pass and a training pass: gradients against one process, traffic."""
    world, rows, facts = open_world(ParallelConfig(), "cpu"), make_rows(9), []
    for case in cases:
        options = dict(case)
        budget, frozen = options.pop("budget", 120), options.pop("frozen", False)
        single = load(path, ALONE, **options)
        policy = load(path, world, **options)
        for each in (single, policy):
            each.causal_lm.get_input_embeddings().weight.requires_grad_(not frozen)
        want = train_pass(single, ALONE, rows, budget)
        with Collectives(policy) as collectives:
            score(policy, world, rows, budget)
            loss = train_pass(policy, world, rows, budget)
        trained = [name for name, p in single.causal_lm.named_parameters() if p.requires_grad]
        exact = {name: g for name, g in gradients(single).items() if name in trained}
        ours = {name: g for name, g in gradients(policy).items() if name in trained}
        facts.append(
            {
                "loss": [loss, want],
                "norm": [norm_of(ours), norm_of(exact)],
                "error": error(ours, exact),
                "head_gathers": collectives.head_gathers,
                "head_reduces": collectives.reduces.count(HEAD),
                "first_reduce": collectives.reduces[0],
                "reduces": len(collectives.reduces),
                "reduced_in": collectives.dtypes("reduce"),
                "gathered_in": collectives.dtypes("gather"),
                "gradients_in": sorted({str(g.dtype) for g in ours.values()}),
                "tied": policy.head.weight is policy.causal_lm.get_input_embeddings().weight,
                "rounds": len(passes_of(policy, world, budget).plan(rows)[0]),
                "sharded": all(isinstance(p, DTensor) for p in policy.parameters()),
            }
        )
        del policy, single
    leave(world)
    return facts


CASES = [
    {},
    {"accumulate": "unsharded"},
    {"budget": 10_000},  # one micro-batch
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
]


@pytest.mark.parametrize("tied", ["tied", pytest.param("untied", marks=pytest.mark.slow)])
def test_two_processes_make_the_gradient_of_one(model_dirs, tied):
    cases = [case | ({"frozen": True} if tied == "untied" else {}) for case in CASES]
    facts, other = run_ranks(step_facts, model_dirs[tied], [*cases, CASES[0]])
    assert facts == other
    for case, fact in zip([*cases, CASES[0]], facts, strict=True):
        assert fact["sharded"], case
        assert fact["tied"] == (tied == "tied"), case
        assert fact["rounds"] == (1 if "budget" in case else 2), case
        assert fact["loss"][0] == pytest.approx(fact["loss"][1], abs=1e-6), case
        assert fact["norm"][0] == pytest.approx(fact["norm"][1], rel=2e-6), case
        assert fact["error"] < 2e-6, case
        assert fact["head_gathers"] == 1, case
        layers = SHAPE["layers"] * (1 if case.get("accumulate") == "unsharded" else fact["rounds"])
        if tied == "tied" or case.get("frozen"):
            assert fact["head_reduces"] == 1, case
            assert fact["reduces"] == layers + layers // SHAPE["layers"] + 1, case  # root, head
        if tied == "untied" and "budget" in case:
            assert fact["first_reduce"] == HEAD, case  # before the backward of any layer


BY_CLASSES = [
    {"tensor": "head"},
    {"tensor": "head", "accumulate": "unsharded"},
    {"tensor": "head", "budget": 10_000},  # one micro-batch
]


def test_a_head_cut_by_classes_makes_the_gradient_of_one(model_dirs):
    """Uneven rows on the processes, and a vocabulary that two do not divide."""
    facts, other = run_ranks(step_facts, model_dirs["untied"], BY_CLASSES)
    assert facts == other
    for case, fact in zip(BY_CLASSES, facts, strict=True):
        assert fact["sharded"]
        assert fact["loss"][0] == pytest.approx(fact["loss"][1], abs=1e-6)
        assert fact["norm"][0] == pytest.approx(fact["norm"][1], rel=2e-6)
        assert fact["error"] < 2e-6
        assert fact["head_gathers"] == 0
        # The embedding has the head's size, and is reduced with the layers.
        assert fact["head_reduces"] == (1 if "accumulate" in case else fact["rounds"])


def handed_on(policy):
    """Whole weights by name; clones, since a unit's are valid only until the next."""
    return {name: weight.clone() for name, weight in full_weights(policy)}


def cut_head_facts(paths, folder):
    """Of a policy whose head is cut: its whole weights, its steps beside one process's, its
    checkpoint in a head that is cut and in one that is not, a refusal."""
    world, facts = open_world(ParallelConfig(), "cpu"), {}
    for dtype in ("float32", "bfloat16"):
        policy = load(paths["untied"], world, dtype=dtype, tensor="head")
        own = load(paths["untied"], ALONE).causal_lm.state_dict()
        found = handed_on(policy)
        assert found.keys() == own.keys()
        facts[dtype] = all(torch.equal(w, own[n].to(w.dtype)) for n, w in found.items())
        facts[f"{dtype} given"] = sorted({str(w.dtype) for w in found.values()})
    single, policy = load(paths["untied"], ALONE), load(paths["untied"], world, tensor="head")
    histories = []
    for each, where in ((single, ALONE), (policy, world)):
        optimizer, history = build_optimizer(each.parameters(), OptimConfig(lr=1e-4)), []
        for step in range(5):
            rows = drop_zero_rows(make_rows(5, seed=step, gated=1))
            loss = train_pass(each, where, rows, 60)
            history += [loss, apply_update(optimizer, lr=1e-4, max_grad_norm=1.0)]
        histories.append([*history, *torch.cat(score(each, where, rows)).tolist()])
    facts["steps"] = histories
    save_checkpoint(
        Path(folder), 5, trainer_state={}, keep_last=1, world=world, model=each, optimizer=optimizer
    )
    for tensor in ("head", "none"):
        other = load(paths["untied"], world, tensor=tensor)
        fresh = build_optimizer(other.parameters(), OptimConfig(lr=1e-4))
        load_checkpoint(Path(folder), world=world, model=other, optimizer=fresh)
        kept = handed_on(each)
        read = handed_on(other)
        facts[f"loaded {tensor}"] = all(torch.equal(read[name], kept[name]) for name in kept)
        train_pass(other, world, make_rows(5), 60)
        apply_update(fresh, lr=1e-4, max_grad_norm=1.0)
        stepped = handed_on(other)
        facts[f"step {tensor}"] = [w.double().norm().item() for _, w in sorted(stepped.items())]
    try:
        load(paths["tied"], world, tensor="head")
    except ModelError as refused:
        facts["tied"] = str(refused)
    del policy, single, optimizer, each, other, fresh
    leave(world)
    return facts


def test_a_head_cut_by_classes_is_handed_on_whole_and_steps_as_one(model_dirs, tmp_path):
    for facts in run_ranks(cut_head_facts, model_dirs, str(tmp_path)):
        assert facts["loaded head"]
        assert facts["loaded none"]
        assert facts["step head"] == pytest.approx(facts["step none"], rel=1e-6, abs=1e-5)
        for dtype in ("float32", "bfloat16"):
            assert facts[dtype]
            assert facts[f"{dtype} given"] == [f"torch.{dtype}"]
        one, two = facts["steps"]
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
        assert facts["tied"].startswith("parallel.tensor: got 'head' for a model that ties")


def test_bfloat16_is_reduced_in_float32(model_dirs):
    """One micro-batch, where a unit with gradients in two dtypes would die; then two."""
    for tied in ("tied", "untied"):
        cases = [{"dtype": "bfloat16", "budget": 10_000}, {"dtype": "bfloat16"}]
        for fact in run_ranks(step_facts, model_dirs[tied], cases)[0]:
            assert fact["reduced_in"] == fact["gradients_in"] == ["torch.float32"]
            assert fact["gathered_in"] == ["torch.bfloat16"]
            assert fact["head_gathers"] == 1
            assert fact["norm"][0] == pytest.approx(fact["norm"][1], rel=0.03)
            assert fact["error"] < 0.1


# --- forty steps ----------------------------------------------------------------------------------


def many_steps(path, budget, sharded, count):
    """Loss and gradient norm of `count` AdamW steps on rows that change, one in five gated off."""
    world = open_world(ParallelConfig(), "cpu") if sharded else ALONE
    policy = load(path, world)
    optimizer = build_optimizer(policy.parameters(), OptimConfig(lr=1e-4))
    history = []
    for step in range(count):
        rows = drop_zero_rows(make_rows(5, seed=step, gated=1))
        loss = train_pass(policy, world, rows, budget)
        history.append([loss, apply_update(optimizer, lr=1e-4, max_grad_norm=1.0)])
        score(policy, world, rows)  # with the weights of this step, not the last one's copies
    if sharded:
        del policy, optimizer
        leave(world)
    return history


@pytest.mark.parametrize("steps", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_the_steps_on_two_processes_are_those_of_one(model_dirs, steps):
    (one,) = run_ranks(many_steps, model_dirs["untied"], 10_000, False, steps, size=1)
    for budget, count in ((10_000, 10), (60, steps)):  # one micro-batch, and several
        for ranks in run_ranks(many_steps, model_dirs["untied"], budget, True, count):
            for (loss, norm), (want, norm_one) in zip(ranks, one[:count], strict=True):
                assert loss == pytest.approx(want, abs=1e-5)
                assert norm == pytest.approx(norm_one, rel=1e-5)


# --- traps ----------------------------------------------------------------------------------------


def trap_facts(path):
    """What silently goes wrong with FSDP when it is used otherwise; one fact a trap."""
    world = open_world(ParallelConfig(), "cpu")
    rows, facts = make_rows(9), {}

    # Micro-batches whose gradients differ by orders of magnitude, in bfloat16.
    policy = load(path, world, dtype="bfloat16")
    seen = []
    policy.head.register_forward_pre_hook(lambda _, args: seen.append(args))
    many = [rows[0], *(replace(row, coef=row.coef / 300) for row in rows * 7)]
    train_pass(policy, world, many, budget=45)
    exact = torch.zeros(V, SHAPE["hidden"], dtype=torch.float64)
    weight = policy.head.weight.full_tensor().bfloat16()
    for hidden, targets, coef in seen:  # each alone, added in float64
        alone = torch.zeros(weight.shape)
        weighted_logprob_loss(hidden.detach(), weight, targets, coef, dweight_out=alone)
        exact += alone.double()
    exact = world.sum(exact)
    got = policy.head.weight.grad.full_tensor().double()
    facts["rounds"] = len(seen)
    facts["dw_error"] = ((got - exact).norm() / exact.norm()).item()
    facts["coef_dtype"] = str(seen[0][2].dtype)

    # A gradient other than 1 would miss the head, which has its own already.
    policy = load(path, world)
    policy.expect_backward(last=True)
    out = policy(pack_rows(rows[:1]))
    try:
        (0.5 * out.loss).backward()
        facts["scaled"] = "accepted"
    except ValueError as refused:
        facts["scaled"] = str(refused)

    # The layers frozen, the head trained; and a scoring pass adds nothing to its gradient.
    policy = load(path, world)
    for name, parameter in policy.causal_lm.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    train_pass(policy, world, rows)
    score(policy, world, rows)
    reshard(policy)
    single = load(path, ALONE)
    train_pass(single, ALONE, rows)
    head = {"head": single.head.weight.grad}
    facts["frozen_error"] = error({"head": policy.head.weight.grad.full_tensor()}, head)

    # Fewer rows than processes: dummies of one token, and the gradient of the one row.
    policy, single = load(path, world), load(path, ALONE)
    train_pass(policy, world, rows[:1])
    train_pass(single, ALONE, rows[:1])
    facts["one_row_error"] = error(gradients(policy), gradients(single))

    # NaN on one process only: all skip, nothing has moved, the next step is right.
    optimizer = build_optimizer(policy.parameters(), OptimConfig())
    twin = build_optimizer(single.parameters(), OptimConfig())
    for policy_, optimizer_, world_ in ((policy, optimizer, world), (single, twin, ALONE)):
        apply_update(optimizer_, lr=1e-4, max_grad_norm=1.0)
        train_pass(policy_, world_, rows)
        apply_update(optimizer_, lr=1e-4, max_grad_norm=1.0)
    before = [p.to_local().clone() for p in policy.parameters()]
    moments = [s["exp_avg"].to_local().clone() for s in optimizer.state.values()]
    poisoned = [replace(rows[0], coef=rows[0].coef * float("nan")), *rows[1:]]
    train_pass(policy, world, poisoned)
    facts["nan_norm"] = str(apply_update(optimizer, lr=1e-4, max_grad_norm=1.0))
    pairs = zip(before, policy.parameters(), strict=True)
    facts["nan_moved"] = sum(not torch.equal(a, b.to_local()) for a, b in pairs)
    states = zip(moments, optimizer.state.values(), strict=True)
    facts["nan_moments"] = sum(not torch.equal(a, b["exp_avg"].to_local()) for a, b in states)
    train_pass(policy, world, rows)
    train_pass(single, ALONE, rows)
    facts["after_nan_error"] = error(gradients(policy), gradients(single))

    # A scoring pass leaves root and head gathered: clip, step and export must not see the copies.
    score(policy, world, rows)
    reshard(policy)
    norm = apply_update(optimizer, lr=1e-4, max_grad_norm=1.0)
    facts["norm"] = [norm, apply_update(twin, lr=1e-4, max_grad_norm=1.0)]
    ours, want = (torch.cat(score(p, w, rows)) for p, w in ((policy, world), (single, ALONE)))
    facts["stale"] = (ours - want).abs().max().item()

    # Whole weights, one unit at a time, are the shards; a copy filled with them computes the same.
    replica, given = make_replica(policy, path), []
    own = dict(replica.named_parameters())
    for name, tensor in full_weights(policy):
        given.append(name)
        own[name].data.copy_(tensor)
    reshard(policy)
    state = dict(policy.causal_lm.named_parameters())
    facts["weights"] = [name for name, t in state.items() if not torch.equal(own[name], whole(t))]
    facts["names"] = sorted(given) == sorted(own)
    ids = torch.arange(20)[None]
    single.causal_lm.eval()
    with torch.no_grad():
        gap = replica(ids, use_cache=False).logits - single.causal_lm(ids, use_cache=False).logits
    facts["replica"] = gap.abs().max().item()
    del policy, single, replica, optimizer, twin, own, state
    leave(world)
    return facts


def test_no_trap_is_silent(model_dirs):
    facts, other = run_ranks(trap_facts, model_dirs["untied"])
    assert facts["rounds"] > 15
    assert facts["dw_error"] < 1e-6  # rounded to bfloat16 on its way it would be 1.7e-3
    assert facts["coef_dtype"] == "torch.float32"
    assert "must be 1" in facts["scaled"]
    assert facts["frozen_error"] < 2e-6
    assert facts["one_row_error"] < 2e-6
    assert (facts["nan_norm"], facts["nan_moved"], facts["nan_moments"]) == ("nan", 0, 0)
    assert facts["after_nan_error"] < 2e-5
    assert facts["norm"][0] == pytest.approx(facts["norm"][1], rel=2e-5)
    assert facts["stale"] < 5e-6
    assert facts["weights"] == []
    assert facts["names"]
    assert facts["replica"] < 5e-5
    agreed = ("nan_norm", "norm", "stale", "dw_error")
    assert {k: facts[k] for k in agreed} == {k: other[k] for k in agreed}


def hsdp_facts(path):
    world = open_world(ParallelConfig(replicas=2), "cpu")
    rows = make_rows(9)
    policy, single = load(path, world), load(path, ALONE)
    train_pass(policy, world, rows, budget=60)
    train_pass(single, ALONE, rows)
    names = str(world.mesh.mesh_dim_names)
    fact = {"error": error(gradients(policy), gradients(single)), "mesh": names}
    del policy
    leave(world)
    return fact


def test_two_copies_of_two_shards_make_the_same_gradient(model_dirs):
    for fact in run_ranks(hsdp_facts, model_dirs["tied"], size=4):
        assert fact == {"error": pytest.approx(0, abs=2e-6), "mesh": "('replicate', 'shard')"}


# --- variants -------------------------------------------------------------------------------------


def variant_facts(path, model, parallel, optim):
    """Two steps of a variant; what its parameters and gradients are, and that they have moved."""
    world, rows = open_world(ParallelConfig(**parallel), "cpu"), make_rows(9)
    cfg = ModelConfig(path=path, device="cpu", **{"activation_checkpointing": "none"} | model)
    if cfg.compile:  # Dynamo and Inductor warn of their own doings
        warnings.simplefilter("ignore")
    policy = load_policy(cfg, world, ParallelConfig(**parallel))
    optimizer = build_optimizer(policy.parameters(), OptimConfig(**optim))
    losses, norms = [], []
    for _ in range(2):
        losses.append(train_pass(policy, world, rows))
        norms.append(apply_update(optimizer, lr=1e-3, max_grad_norm=1.0))
    facts = {
        "losses": losses,
        "norms": norms,
        "parameters": sorted({str(p.dtype) for p in policy.parameters()}),
        "held": sum(p.to_local().numel() for p in policy.parameters()),
        "all": sum(p.numel() for p in policy.parameters()),
    }
    del policy, optimizer
    leave(world)
    return facts


def run_variant(path, model=None, parallel=None, optim=None, size=2):
    return run_ranks(variant_facts, path, model or {}, parallel or {}, optim or {}, size=size)


def test_weights_and_moments_in_bfloat16(model_dirs):
    """Each process holds half of the model; rounding is the same whatever the number of ranks."""
    half = {"dtype": "bfloat16", "master_dtype": "bfloat16"}
    optim = {"name": "adamw_bf16", "stochastic_rounding": True, "lr": 1e-3}
    want = run_variant(model_dirs["untied"], {"dtype": "bfloat16"}, optim={"lr": 1e-3})[0]
    facts = run_variant(model_dirs["untied"], half, optim=optim)
    assert facts[0]["parameters"] == ["torch.bfloat16"]
    assert sum(fact["held"] for fact in facts) == facts[0]["all"]
    assert max(fact["held"] for fact in facts) < 0.51 * facts[0]["all"]
    assert facts[0]["losses"] == pytest.approx(want["losses"], rel=0.05, abs=0.01)
    assert facts[0]["losses"][1] < facts[0]["losses"][0]


def test_whole_bfloat16_weights_keep_the_gradient_of_a_small_micro_batch(model_dirs):
    """One micro-batch, then 64 of a 1024th of it: a sum in bfloat16 would keep none of these."""
    half = {"dtype": "bfloat16", "master_dtype": "bfloat16"}
    policy = load(model_dirs["untied"], ALONE, **half)
    row, step = make_rows(1)[0], backward(policy)
    step(pack_rows([row]), last=False)
    first = {name: g.double() for name, g in gradients(policy).items()}
    for number in range(64):
        step(pack_rows([replace(row, coef=row.coef / 1024)]), last=number == 63)
    for name, gradient in gradients(policy).items():
        grown = gradient.double().norm() / first[name].norm()
        assert grown.item() == pytest.approx(1 + 64 / 1024, abs=2e-3), name


def test_states_in_host_memory_change_nothing(model_dirs):
    float32 = {"dtype": "float32"}
    want = run_variant(model_dirs["tied"], float32, optim={"lr": 1e-3})
    assert want == run_variant(model_dirs["tied"], float32, {"cpu_offload": True}, {"lr": 1e-3})


@pytest.mark.slow
def test_compiled_layers_compute_the_same(model_dirs):
    float32 = {"dtype": "float32"}
    for grade in ("none", "full"):
        given = float32 | {"activation_checkpointing": grade}
        want, got = (
            run_variant(model_dirs["untied"], given | {"compile": c}, optim={"lr": 1e-3})[0]
            for c in (False, True)
        )
        assert got["losses"] == pytest.approx(want["losses"], abs=1e-5)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-5)


def test_what_cannot_be_sharded_is_refused(random_qwen2, tmp_path, monkeypatch):
    path = str(tmp_path / "model")
    random_qwen2().save_pretrained(path)
    cfg = ModelConfig(path=path, device="cpu", dtype="float32")
    with pytest.raises(ModelError, match=r"model\.liger: got 'always'.*liger"):
        load_policy(replace(cfg, liger="always"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ConfigError, match=r"parallel\.replicas: got 2, expected a divisor of the 3"
    ):
        open_world(ParallelConfig(replicas=2), "cpu")
    with pytest.raises(ConfigError, match=r"parallel\.tensor: got 'head' with 3 processes, 3 rep"):
        open_world(ParallelConfig(tensor="head", replicas=3), "cpu")
    with pytest.raises(ConfigError, match=r"parallel\.shard: got 'never' with 3 processes"):
        open_world(ParallelConfig(shard="never"), "cpu")


def test_a_model_with_buffers_of_its_own_is_told_both_keys(random_qwen2):
    """Whole weights with states in host memory are built without storage, too."""
    model = random_qwen2()
    model.register_buffer("scale", torch.ones(1))
    words = r"holds \(scale\).* set parallel\.shard: never and parallel\.cpu_offload: false"
    with pytest.raises(ModelError, match=words):
        allocate(model, torch.device("cpu"))


def test_weights_that_do_not_fit_are_refused_by_every_process(model_dirs, tmp_path):
    def copy(name, change):
        shutil.copytree(model_dirs["untied"], tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return str(tmp_path / name)

    norm = "model.norm.weight"
    faults = {
        r"1 weights are missing \(model\.norm\.weight": copy("missing", lambda t: t.pop(norm)),
        r"model\.norm\.weight is \(3,\), config\.json says \(64,\)": copy(
            "misshapen", lambda t: t.update({norm: torch.ones(3)})
        ),
        r"model\.norm\.weight holds NaN": copy("nan", lambda t: t[norm].fill_(float("nan"))),
    }
    for message, path in faults.items():
        for rank in watch_ranks(variant_facts, path, {"dtype": "float32"}, {}, {}):
            assert rank.status == 1
            assert re.search(message, rank.output), rank.output

"""torchtitan's loss by ours, against its own ChunkedLossWrapper and against float64.

Budgets: in float32 2e-6 for the loss and 1e-5 for each gradient as one vector, against both. In
bfloat16, where torchtitan rounds the logits, ours is never further from float64 than its own.
"""

import importlib
import warnings
from importlib import metadata
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_integrations import error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.hosts
WHY = "needs torchtitan, spmd_types and tyro: pip install 'torchtitan>=0.3,<0.4'"
titan = pytest.importorskip("torchtitan.components.loss", reason=WHY, exc_type=ImportError)
config = importlib.import_module("torchtitan.config")
ours = importlib.import_module("vpgea_fast.integrations.torchtitan")

V, D, TOKENS = 67, 16, 8


class Decoder(nn.Module):
    """As torchtitan's with `_skip_lm_head`: hidden states, and a head that the loss applies."""

    def __init__(self, bias=False):
        super().__init__()
        self.tok_embeddings = nn.Embedding(V, D)
        self.layers = nn.ModuleDict({"0": nn.Linear(D, D)})
        self.norm = nn.LayerNorm(D)
        self.lm_head = nn.Linear(D, V, bias=bias)

    def forward(self, ids):
        return self.norm(self.tok_embeddings(ids) + self.layers["0"](self.tok_embeddings(ids)))


def decoder(bias=False, dtype=torch.float32):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Decoder(bias)
        model.lm_head.weight.mul_(4)
    return model.to(dtype)


def batches(count=2, rows=2, rank=0):
    """(ids, labels) of a step, some labels ignored, and the labels that count in all of them."""
    made = torch.Generator().manual_seed(1 + rank)
    found = []
    for number in range(count):
        ids, labels = (torch.randint(V, (rows, TOKENS), generator=made) for _ in range(2))
        labels[:, : 1 + number] = -100
        found.append((ids, labels))
    return found, sum((labels != -100).sum() for _, labels in found)


def wrapper(kind, head, **settings):
    inner = titan.CrossEntropyLoss.Config(global_vocab_size=V)
    if kind == "theirs":
        loss = titan.ChunkedLossWrapper.Config(num_chunks=4, loss_fn=inner).build()
    else:
        compiled = config.CompileConfig(enable=True)  # with the loss among its components
        loss = ours.FusedLoss.Config(loss_fn=inner, **settings).build(compile_config=compiled)
    loss.set_lm_head(head)
    return loss


def step(model, loss_fn, found, tokens) -> Any:
    """(loss, its gradients by name) of the micro-batches of a step, as the trainer makes them."""
    model.zero_grad()
    total: Any = 0.0
    for ids, labels in found:
        loss, metrics = loss_fn(model(ids), labels, tokens, positions=ids)
        assert metrics == {}
        loss.backward()
        total += loss.detach()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return total, {name: None if x is None else x.double() for name, x in grads.items()}


def exact(model, found, tokens):
    """The same by autograd through the full logits, in float64."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels in found:
        logits = model.lm_head(model(ids)).flatten(0, 1)
        total = total + nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    (total / tokens).backward()
    return total.detach() / tokens, {name: p.grad for name, p in model.named_parameters()}


def assert_alike(got, truth, budget=1e-5):
    assert float(got[0]) == pytest.approx(float(truth[0]), rel=2e-6)
    assert got[1].keys() == truth[1].keys()
    for name, gradient in truth[1].items():
        assert error(got[1][name], gradient) < budget, name


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_step_is_that_of_torchtitan_and_of_float64(bias):
    model, (found, tokens) = decoder(bias), batches()
    truth = exact(decoder(bias, torch.float64), found, tokens)
    theirs = step(model, wrapper("theirs", model.lm_head), found, tokens)
    got = step(model, wrapper("ours", model.lm_head), found, tokens)
    assert_alike(got, theirs)
    assert_alike(got, truth)
    assert "forward" not in vars(model.lm_head)
    assert got[0].dtype == theirs[0].dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_is_never_further_from_float64_than_torchtitan(device):
    """On CUDA by the kernels of `auto`."""
    found, tokens = batches(rows=8)
    found = [(ids.to(device), labels.to(device)) for ids, labels in found]
    model, same = (decoder(dtype=dtype).to(device) for dtype in (torch.bfloat16, torch.float64))
    wrong: Any = {}
    same.load_state_dict(model.state_dict())
    with torch.no_grad():
        hidden = [model(ids) for ids, _ in found]
    for kind in ("theirs", "ours", "exact"):
        head: Any = same.lm_head if kind == "exact" else model.lm_head
        head.zero_grad()
        leaves: list[Any] = [x.detach().to(head.weight.dtype).requires_grad_() for x in hidden]
        if kind == "exact":
            for x, (_, labels) in zip(leaves, found, strict=True):
                logits = head(x).flatten(0, 1)
                loss = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
                (loss / tokens).backward()
        else:
            loss_fn = wrapper(kind, head)
            for x, (_, labels) in zip(leaves, found, strict=True):
                loss_fn(x, labels, tokens)[0].backward()
        wrong[kind] = [x.grad.double() for x in (*leaves, head.weight)]
    pairs = zip(wrong["ours"], wrong["theirs"], wrong["exact"], strict=True)
    for mine, their, truth in pairs:
        assert mine.isfinite().all()
        assert error(mine, truth) <= error(their, truth) < 0.1


@pytest.mark.parametrize("grad_mode", [False, True])
def test_validation_is_the_sum_over_labels_and_leaves_no_gradient(grad_mode):
    model, ([(ids, labels), _], _) = decoder(), batches()
    hidden = model(ids).detach()
    values = []
    for kind in ("theirs", "ours"):
        with torch.set_grad_enabled(grad_mode):
            values.append(wrapper(kind, model.lm_head)(hidden, labels)[0])
    assert float(values[1]) == pytest.approx(float(values[0]), rel=2e-6)
    assert not values[1].requires_grad
    assert model.lm_head.weight.grad is None


def test_a_frozen_head_trains_the_decoder():
    model, (found, tokens) = decoder(), batches()
    theirs = step(model, wrapper("theirs", model.lm_head), found, tokens)
    model.lm_head.weight.requires_grad_(False)
    got = step(model, wrapper("ours", model.lm_head), found, tokens)
    assert got[1].pop("lm_head.weight") is None
    theirs[1].pop("lm_head.weight")
    assert_alike(got, theirs)


# --- configuration --------------------------------------------------------------------------------


def test_the_command_lines_override_replaces_the_loss():
    from dataclasses import dataclass, field

    class Owner(config.Configurable):
        @dataclass(kw_only=True, slots=True)
        class Config(config.Configurable.Config):
            loss: Any = field(default_factory=titan.ChunkedLossWrapper.Config)

    root = Owner.Config()
    root.loss.loss_fn.global_vocab_size = V
    target = "vpgea_fast.integrations.torchtitan.fused_loss"
    chosen = config.OverrideConfig(imports=[(target, {"backend": "reference"})])
    (line,) = config.apply_overrides(chosen, root)
    assert "ChunkedLossWrapper.Config -> FusedLoss.Config" in line
    built = root.loss.build(compile_config=None)
    assert isinstance(built, titan.ChunkedLossWrapper)
    assert (built.backend, built.classes, built.num_chunks) == ("reference", V, 1)
    plain = ours.fused_loss(titan.CrossEntropyLoss.Config(global_vocab_size=V))
    assert plain == ours.FusedLoss.Config(
        loss_fn=titan.CrossEntropyLoss.Config(global_vocab_size=V)
    )


class Scaled(nn.Linear):
    def forward(self, hidden):  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * super().forward(hidden)


def patched():
    head: Any = nn.Linear(D, V)
    head.forward = lambda hidden: hidden
    return head


def compiled():
    head: Any = nn.Linear(D, V)
    head._compiled_call_impl = head._call_impl  # as .compile() leaves it
    return head


REFUSED = {
    "loss.num_chunks: got 8": lambda: ours.FusedLoss.Config(num_chunks=8).build(),
    "loss.loss_fn: got MSELoss.Config": lambda: ours.FusedLoss.Config(
        loss_fn=titan.MSELoss.Config()
    ).build(),
    "backend": lambda: ours.FusedLoss.Config(backend="fast").build(),
    "lm_head: Scaled has a forward of its own": lambda: wrapper("ours", Scaled(D, V)),
    "lm_head: Linear has a forward of its own": lambda: wrapper("ours", patched()),
    "lm_head: Linear is compiled": lambda: wrapper("ours", compiled()),
    "lm_head: got none": lambda: ours.FusedLoss.Config().build()(
        torch.zeros(1, 2, D), torch.zeros(1, 2, dtype=torch.long)
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_served_is_an_error_with_its_name(words):
    with pytest.raises(ValueError) as caught:
        REFUSED[words]()
    assert str(caught.value).startswith(words)


def test_an_error_leaves_the_head_as_it_was():
    model, ([(ids, labels), _], tokens) = decoder(), batches()
    with pytest.raises(ValueError, match="weight_VD is"):
        wrapper("ours", model.lm_head)(model(ids).double(), labels, tokens)
    assert "forward" not in vars(model.lm_head)
    assert model.lm_head(model(ids)).shape == (2, TOKENS, V)


@pytest.mark.parametrize("change", ["version", "gone", "argument", "calls"])
def test_another_torchtitan_warns_and_a_changed_one_is_an_error(change, monkeypatch):
    base = titan.ChunkedLossWrapper
    if change == "version":
        monkeypatch.setattr(metadata, "version", lambda _: "0.4.0")
        with pytest.warns(UserWarning, match=r"torchtitan 0\.4\.0 is not tested .*>=0\.3,<0\.4 is"):
            ours._check_hooks()
        return

    def other(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        pass

    if change == "gone":
        monkeypatch.delattr(titan, "CrossEntropyLoss")
        words = "torchtitan.components.loss has no CrossEntropyLoss"
    elif change == "argument":
        monkeypatch.setattr(base, "__call__", lambda self, hidden, labels: (self, hidden, labels))
        words = "takes (self, hidden, labels), not (self, pred,"
    else:
        monkeypatch.setattr(base, "__call__", other)
        words = "does not call its lm_head"
    with pytest.raises(RuntimeError) as caught:
        ours._check_hooks()
    assert words in str(caught.value)
    assert ours.TESTED in str(caught.value)


# --- several processes ----------------------------------------------------------------------------


def sharded(model, reshard, dtype):
    """FSDP2 as torchtitan's apply_fsdp_to_decoder: norm and head together, sums and no means."""
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.tok_embeddings, [model.norm, model.lm_head], *model.layers.values(), model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    return model


def under_fsdp(reshard, dtype):
    """(error of the loss, errors of the gradients, the head's state after a step) on a rank."""
    import torch.distributed as dist
    from test_losses import process_group

    # A linear layer of (B, T, D) gives a view on a CPU; nothing here changes one in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    with process_group():
        found, tokens = batches(rank=dist.get_rank())
        dist.all_reduce(tokens)
        model = sharded(decoder(), reshard, getattr(torch, dtype))
        made, cut = {}, {}
        for kind in ("theirs", "ours"):
            loss, gradients = step(model, wrapper(kind, model.lm_head), found, tokens)
            cut[kind] = isinstance(model.lm_head.weight, DTensor)
            whole = {name: x.full_tensor() for name, x in gradients.items()}
            made[kind] = (float(loss), whole)
        rank_losses = torch.tensor([made["ours"][0], made["theirs"][0]])
        dist.all_reduce(rank_losses)
    wrong = {name: error(made["ours"][1][name], x) for name, x in made["theirs"][1].items()}
    # Every rank's labels, in one process.
    pairs, total = zip(*(batches(rank=rank) for rank in range(2)), strict=True)
    truth = exact(decoder(dtype=torch.float64), [b for found in pairs for b in found], sum(total))
    off = {name: error(made["ours"][1][name], x) for name, x in truth[1].items()}
    return {
        "cut": cut,
        "losses": rank_losses.tolist(),
        "exact loss": float(truth[0]),
        "against theirs": max(wrong.values()),
        "against float64": max(off.values()),
        "own forward": "forward" in vars(model.lm_head),
    }


@pytest.mark.parametrize(("reshard", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_fsdp2_gives_the_gradients_of_one_process(reshard, dtype):
    budget = 1e-5 if dtype == "float32" else 3e-2
    for found in run_ranks(under_fsdp, reshard, dtype):
        assert found["cut"] == {"theirs": True, "ours": True}  # resharded, as torchtitan leaves it
        assert found["losses"] == pytest.approx([found["exact loss"]] * 2, rel=budget)
        assert found["against theirs"] < budget
        assert found["against float64"] < budget
        assert not found["own forward"]


def cut_by_classes(backend, bias):
    """Errors against float64 of both wrappers under tensor parallelism of two, on a rank."""
    import torch.distributed as dist
    from test_losses import process_group

    utils = importlib.import_module("torchtitan.distributed.utils")
    meshes = importlib.import_module("torchtitan.distributed.spmd_types")
    utils.set_spmd_backend(backend)
    model, ([(ids, labels), _], tokens) = decoder(bias), batches()
    hidden = model(ids).detach()
    whole, leaf = decoder(bias, torch.float64).lm_head, hidden.double().requires_grad_()
    logits = whole(leaf).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / tokens
    loss.backward()
    expected: list[Any] = [loss.detach(), leaf.grad, *(p.grad for p in whole.parameters())]
    wrong = {}
    with process_group():
        mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
        tp = mesh["tp"]
        for kind in ("theirs", "ours"):
            head: Any = nn.Linear(D, V, bias=bias)
            for name, p in decoder(bias).lm_head.named_parameters():
                x = distribute_tensor(p.detach(), tp, [Shard(0)])
                plain = backend == "spmd_types"
                head.register_parameter(name, nn.Parameter(x.to_local() if plain else x))
            loss_fn = wrapper(kind, head)
            if backend == "spmd_types":
                x: Any = hidden.clone().requires_grad_()
                with meshes.set_current_spmd_mesh(mesh):
                    loss = loss_fn(x, labels, tokens)[0]
                    loss.backward()
                dist.all_reduce(
                    x.grad
                )  # a sum over processes, as the backward of the norm makes it
                gradients = [DTensor.from_local(p.grad, tp, [Shard(0)]) for p in head.parameters()]
                dx = x.grad
            else:
                x = DTensor.from_local(hidden, tp, [Replicate()]).requires_grad_()
                loss = loss_fn(x, labels, tokens)[0]
                loss.backward()
                gradients, dx = [p.grad for p in head.parameters()], x.grad.full_tensor()
            own = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
            rows = slice(0, 34) if dist.get_rank() == 0 else slice(34, V)  # 67 over 2
            value = loss.full_tensor() if isinstance(loss, DTensor) else loss
            got = [value.detach(), dx, *own]
            want = [*expected[:2], *(x[rows] for x in expected[2:])]
            wrong[kind] = [error(a.double(), b) for a, b in zip(got, want, strict=True)]
    return wrong


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["partial_dtensor", "spmd_types"])
def test_a_head_cut_by_classes_stays_cut(backend, bias):
    for wrong in run_ranks(cut_by_classes, backend, bias):
        assert max(wrong["theirs"]) < 1e-5
        assert max(wrong["ours"]) < 1e-5


def refused_on_ranks():
    from test_losses import process_group

    utils = importlib.import_module("torchtitan.distributed.utils")
    meshes = importlib.import_module("torchtitan.distributed.spmd_types")
    model, ([(ids, labels), _], tokens) = decoder(), batches()
    hidden = model(ids).detach()
    said = []
    with process_group():
        mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
        loss_fn = wrapper("ours", nn.Linear(D, 34, bias=False))
        loss_fn.classes = None
        with meshes.set_current_spmd_mesh(mesh), pytest.raises(ValueError) as caught:
            loss_fn(hidden, labels, tokens)
        said.append(str(caught.value))
        loss_fn.lm_head.weight = nn.Parameter(distribute_tensor(torch.ones(V, D), mesh["tp"]))
        with meshes.set_current_spmd_mesh(mesh), pytest.raises(ValueError) as caught:
            loss_fn(hidden, labels, tokens)
        said.append(str(caught.value))
        utils.set_spmd_backend("full_dtensor")
        placed = [DTensor.from_local(x, mesh["tp"], [Shard(0)]) for x in (hidden, labels)]
        with pytest.raises(ValueError) as caught:
            loss_fn(*placed, tokens)
        said.append(str(caught.value))
    return said


def test_what_is_not_served_over_processes_is_an_error_with_its_name():
    for unknown, mixed, placed in run_ranks(refused_on_ranks):
        assert unknown.startswith("loss.loss_fn.global_vocab_size: got None")
        assert mixed.startswith("lm_head: its weight is a DTensor under spmd_types")
        assert placed.startswith("pred: got a DTensor")
        assert "spmd_backend" in placed

"""The losses inside a model of transformers against the model's own `labels` path.

Budgets: in float64 1e-10 for every parameter's gradient, against cross-entropy of the model's own
logits; in float32 1e-6 for the loss and for the gradient as one vector, against transformers' loss.
"""

import contextlib
import copy
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from vpgea_fast.integrations import (
    LossModule,
    causal_lm_logprobs,
    causal_lm_loss,
    head_options,
)
from vpgea_fast.integrations.heads import head_weights

V, STEP = 67, 4  # vocabulary; micro-batches of a step
TINY = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
KINDS = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 6},
    "granite": {"logits_scaling": 8.0},
    "phi": {},  # a head with a bias
    "mixtral": {**MIXTURE, "router_aux_loss_coef": 0.05},
}
OPTIONS = {"gemma2": (1.0, 3.0), "granite": (0.125, None)}


def make(kind="llama", dtype=torch.float32, scale=1.2, **settings):
    """A tiny model with logits of a few units; `scale=0`: as its configuration draws it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**TINY, **KINDS[kind], **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            width = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter), alpha=scale * width)
    return model.to(dtype)


def padded(count=STEP) -> Iterator[dict[str, Any]]:
    """`count` micro-batches of two rows, padded on the right, prompts without a label."""
    made = torch.Generator().manual_seed(1)
    for number in range(count):
        ids = torch.randint(3, V, (2, 11), generator=made)
        mask = torch.ones_like(ids)
        mask[0, 5 + number :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : 1 + number] = -100
        yield {"input_ids": ids, "labels": labels, "attention_mask": mask}


def packed(count=STEP) -> Iterator[dict[str, Any]]:
    """The same documents, two to a row; the first token of each has no label."""
    for batch in padded(count):
        kept = batch["attention_mask"].bool()
        starts = torch.cat([torch.arange(int(n)) for n in kept.sum(1)])[None]
        ids, labels = batch["input_ids"][kept][None], batch["labels"][kept][None]
        labels = labels.masked_fill(starts == 0, -100)
        yield {"input_ids": ids, "labels": labels, "position_ids": starts}


LAYOUTS = {"padded": padded, "packed": packed}


def count(batches) -> Any:
    return sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)


def total(model, losses):
    """(the sum of some losses, the sum of their gradients by parameter)."""
    model.zero_grad()
    value = 0.0
    for loss in losses:
        loss.backward()
        value += loss.detach()
    return value, [p.grad for p in model.parameters() if p.grad is not None]


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


def flat(gradients):
    return torch.cat([x.flatten() for x in gradients])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_models_own_loss(kind, layout):
    model, batches = make(kind), list(LAYOUTS[layout]())
    items = count(batches)
    own = total(
        model, (model(**x, num_items_in_batch=items, use_cache=False).loss for x in batches)
    )
    ours = total(model, (causal_lm_loss(model, **x, num_items=items).loss for x in batches))
    assert head_options(model) == OPTIONS.get(kind, (1.0, None))
    assert float(ours[0]) == pytest.approx(float(own[0]), rel=1e-6)
    assert len(ours[1]) == len(own[1]) == len(list(model.parameters()))
    assert error(flat(ours[1]), flat(own[1])) < 1e-6


@pytest.mark.parametrize("kind", [*KINDS][:-1])  # experts take no float64
def test_every_gradient_is_that_of_the_models_logits(kind):
    """In float64, where rounding hides nothing; transformers' own loss is float32 always."""
    model, (batch,) = make(kind, torch.float64), padded(1)
    assert_exact(model, batch)


def assert_exact(model, batch, gradients=True):
    """The loss, and the gradient of each parameter that is trained."""
    unlabelled = {name: x for name, x in batch.items() if name != "labels"}
    logits = model(**unlabelled, use_cache=False).logits[:, :-1]
    own = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss = causal_lm_loss(model, **batch).loss
    assert error(loss.detach(), own.detach()) < 1e-12
    if gradients:
        truth, ours = (total(model, [x])[1] for x in (own, loss))
        assert max(error(*pair) for pair in zip(ours, truth, strict=True)) < 1e-10


@pytest.mark.parametrize("kind", ["gemma2", "granite", "phi"])
def test_label_smoothing_is_that_of_torch(kind):
    model, (batch,) = make(kind, torch.float64), padded(1)
    labels = batch.pop("labels")[:, 1:].flatten()
    z = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    square = z.logsumexp(-1).square()[labels != -100].sum()
    smoothed = cross_entropy(z, labels, label_smoothing=0.1, reduction="sum")
    truth = total(model, [(smoothed + 0.01 * square) / 14])
    (again,) = padded(1)
    ours = causal_lm_loss(model, **again, num_items=14, label_smoothing=0.1, z_loss=0.01).loss
    got = total(model, [ours])
    assert error(got[0], truth[0]) < 1e-12
    assert max(error(*pair) for pair in zip(got[1], truth[1], strict=True)) < 1e-10


@pytest.mark.parametrize("kind", ["gemma2", "granite", "phi"])
def test_logprobs_are_those_of_the_models_logits(kind):
    model, (batch,) = make(kind), packed(1)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits.double() / 0.7
    truth = logits.log_softmax(-1)[0]
    out = causal_lm_logprobs(model, **batch, labels=labels, temperature=0.7, entropy=True)
    places = (labels[0, 1:] != -100).nonzero().flatten()  # of what comes before each label
    assert out.kept[0].nonzero().flatten().tolist() == (places + 1).tolist()
    assert out.entropy is not None
    for got, expected in (
        (out.logp, truth[places, labels[0, places + 1]]),
        (out.entropy, -(truth.exp() * truth).sum(-1)[places]),
    ):
        assert float((got[out.kept] - expected).detach().abs().max()) < 1e-5
        assert not got[~out.kept].any()
    weights = torch.randn_like(out.logp)
    got = total(model, [(out.logp * weights).sum()])[1]
    expected = total(
        model, [(truth[places, labels[0, places + 1]] * weights[0, places + 1]).sum()]
    )[1]
    assert error(flat(got), flat(expected)) < 1e-5


def test_documents_do_not_see_each_other():
    """A packed row is its documents alone, also with labels for their first tokens."""
    model, (row,) = make("gemma2", torch.float64), packed(1)
    starts = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
    ids = row["input_ids"]
    whole = causal_lm_logprobs(model, ids, position_ids=row["position_ids"])
    parts = [ids[:, begin:end] for begin, end in zip(starts, [*starts[1:], None], strict=True)]
    alone = torch.cat([causal_lm_logprobs(model, part).logp for part in parts], dim=1)
    assert len(parts) == 2
    assert torch.allclose(whole.logp, alone, rtol=0, atol=1e-12)
    assert (~whole.kept).nonzero()[:, 1].tolist() == starts
    loss = causal_lm_loss(model, ids, position_ids=row["position_ids"], num_items=1).loss
    assert error(loss.detach(), -alone.detach().sum()) < 1e-12


@pytest.mark.parametrize("places", [False, True])
def test_padding_is_never_a_target_nor_predicts_one(places):
    model = make(dtype=torch.float64)
    ids = torch.randint(3, V, (1, 6))
    row = torch.cat([torch.full((1, 3), 2), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    more: dict[str, Any] = {}
    if places:
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    left = causal_lm_logprobs(model, row, attention_mask=mask, **more)
    assert left.kept.tolist() == [[False] * 4 + [True] * 5]
    right = causal_lm_logprobs(model, row.flip(1), attention_mask=mask.flip(1))
    assert right.kept.tolist() == [[False] + [True] * 5 + [False] * 3]
    alone = causal_lm_logprobs(model, ids)
    # Rotary angles are float32, and of other positions.
    assert torch.allclose(left.logp[:, 3:], alone.logp, rtol=0, atol=1e-5)


def test_normalisers():
    """None: the mean of this call. A number: the sum by it, times the ranks. No label: 0."""
    model, (batch,) = make(dtype=torch.float64), padded(1)
    mean, items = causal_lm_loss(model, **batch).loss, count([batch])
    assert int(items) == 14
    for number in (14, items, items[None].float()):
        assert torch.equal(causal_lm_loss(model, **batch, num_items=number).loss, mean)
    more = causal_lm_loss(model, **batch, num_items=28, world_size=8).loss
    assert error(more.detach(), 4 * mean.detach()) < 1e-12
    none = causal_lm_loss(model, **{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert none.loss.detach().tolist() == 0.0
    assert not flat(total(model, [none.loss])[1]).any()


def test_the_forward_is_the_models_own():
    """Its dropout too: the same draws give the same loss, and the measurement draws nothing."""
    model, (batch,) = make(attention_dropout=0.3), padded(1)
    model.train()
    torch.manual_seed(5)
    ours = causal_lm_loss(model, **batch).loss
    assert model.training
    assert all(module.training for module in model.modules())
    torch.manual_seed(5)
    own = model(**batch, use_cache=False).loss
    torch.manual_seed(6)
    other = model(**batch, use_cache=False).loss
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=1e-6)
    assert abs(float((own - other).detach())) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_of_a_new_model_is_found(dtype):
    """Its logits are below 1, where tanh does nothing; after some training it would."""
    model = make("gemma2", dtype, scale=0, final_logit_softcapping=30.0)
    assert float(model(torch.arange(3, 9)[None]).logits.detach().abs().max()) < 1.0
    assert head_options(model) == (1.0, 30.0)


def test_operands_follow_autocast():
    model, (batch,) = make(), padded(1)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        ours = causal_lm_loss(model, **batch)
    hidden = hidden.last_hidden_state.detach()[:, :-1].flatten(0, 1)
    weight, targets = model.lm_head.weight.detach(), batch["labels"][:, 1:].flatten()
    rounded = hidden.bfloat16().double() @ weight.bfloat16().double().T
    assert hidden.dtype == torch.float32
    assert float(ours.loss.detach()) == pytest.approx(
        float(cross_entropy(rounded, targets)), rel=1e-6
    )
    exact = cross_entropy(hidden.double() @ weight.double().T, targets)
    assert abs(float(ours.loss.detach() - exact)) > 1e-5
    ours.loss.backward()
    assert model.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad.dtype == torch.float32


class ScaledHead(nn.Linear):
    def forward(self, input):  # noqa: A002 - as nn.Linear calls it
        return super().forward(input) * 1.01


class ScaledLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output: Any = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output


def scaled_head():
    model = make()
    head = ScaledHead(32, V, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def scaled_llama():
    return ScaledLlama(make().config)


IDS = torch.arange(3, 11)[None]
AGAIN = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
REFUSED = [
    ("label_smoothing_factor: no input of Llama", make, {"label_smoothing_factor": 0.1}),
    ("label_smoothing: got 2.0, expected a number from 0 to 1", make, {"label_smoothing": 2.0}),
    ("num_items_in_batch: no input", make, {"num_items_in_batch": 8}),
    ("shift_labels: no input", make, {"shift_labels": IDS}),
    ("labels (1, 7): expected (B, T)", make, {"labels": IDS[:, 1:]}),
    ("begin again inside a row", make, {"position_ids": AGAIN, "attention_mask": IDS > 0}),
    *(("num_items: got", make, {"num_items": n}) for n in (0, -3, True, 2.0, torch.ones(2))),
    *(
        ("num_items: got 0, a negative number or NaN", make, {"num_items": torch.tensor(n)})
        for n in (0, -3, float("nan"))
    ),
    ("world_size: got 0", make, {"world_size": 0}),
    ("all_labels: got 'no', expected True or False", make, {"all_labels": "no"}),
    ("input_ids: got [[3, 4]], expected a tensor", make, {"input_ids": [[3, 4]]}),
    ("labels: got [3, 4], expected a tensor", make, {"labels": [3, 4]}),
    ("input_ids: got torch.float32, expected int64", make, {"input_ids": IDS.float()}),
    ("(1, 0): expected (B, T) both, of one", make, {"input_ids": IDS[:, :0]}),
    ("attention_mask: got (1, 7), expected (1, 8)", make, {"attention_mask": IDS[:, 1:] > 0}),
    # torch would broadcast it, here and in the model
    (
        "attention_mask: got (1, 8), expected (2, 8)",
        make,
        {"input_ids": IDS.expand(2, 8), "attention_mask": IDS > 0},
    ),
    ("position_ids: got (2, 8), expected (1, 8)", make, {"position_ids": AGAIN.expand(2, 8)}),
    ("position_ids: got (1, 7), expected (1, 8)", make, {"position_ids": AGAIN[:, 1:]}),
    ("pass its .model", lambda: LossModule(make()), {}),
    ("holds no model of transformers", lambda: nn.Linear(2, 2), {}),
    ("has no head", lambda: make().model, {}),
    ("does not multiply with its weight", scaled_head, {}),
    ("with any scale or softcap of its config", scaled_llama, {}),
]


@pytest.mark.parametrize(("words", "build", "inputs"), REFUSED)
def test_refusals_take_one_line_and_leave_nothing(words, build, inputs):
    model = build()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        causal_lm_loss(model, **{"input_ids": IDS, **inputs})
    assert words in str(caught.value)
    assert modes == [module.training for module in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


# torch._dynamo asks for it where a graph is broken, and hides the warning but from `error`.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_has_its_own_numbers_in_each_call():
    """Also where its own forward was compiled before, and after it."""
    model, batches = make(num_hidden_layers=1), list(padded(2))
    expected = [total(model, [causal_lm_loss(model, **x).loss]) for x in batches]
    logits = model(batches[0]["input_ids"]).logits
    model = make(num_hidden_layers=1)
    model.compile(backend="eager")
    model(batches[0]["input_ids"])
    for batch, (loss, gradients) in zip(batches, expected, strict=True):
        found = total(model, [causal_lm_loss(model, **batch).loss])
        assert error(found[0], loss) < 1e-6
        assert error(flat(found[1]), flat(gradients)) < 1e-6
    assert error(model(batches[0]["input_ids"]).logits.detach(), logits.detach()) < 1e-6
    torch.compiler.reset()


def test_what_is_no_model_is_refused():
    """Such as the other thing that accelerate's `prepare` gives back."""
    optimiser: Any = torch.optim.SGD(make().parameters())
    for call in (causal_lm_loss, causal_lm_logprobs, head_options):
        with pytest.raises(ValueError, match=r"\Amodel: got a SGD, expected a causal LM [^\n]*\Z"):
            call(optimiser, IDS)


def test_a_step_without_a_label_may_say_so():
    """The Trainer counts 0 there, and makes NaN of it."""
    model = make()
    labels, items = torch.full_like(IDS, -100), torch.tensor(0)
    loss = causal_lm_loss(model, IDS, labels, num_items=items).loss
    assert loss.item() == 0.0
    assert not flat(total(model, [loss])[1]).any()


def test_a_weight_that_is_none_is_refused():
    head = nn.Linear(4, 8)
    head.weight.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        head_weights(head)
    del head.weight.ds_id
    head.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="leave lm_head out of the quantisation"):
        head_weights(head)
    with pytest.raises(ValueError, match="offloaded"):
        head_weights(nn.Linear(4, 8, device="meta"))


class Dequantised(torch.Tensor):
    """As torchao's: its dtype is that of what it stands for."""


class OfIntegers(nn.Module):
    """As the quantisers have it that keep no `weight`."""

    def __init__(self):
        super().__init__()
        self.qweight, self.bias = nn.Buffer(torch.zeros(4, 8, dtype=torch.int32)), None

    def forward(self, hidden):
        return hidden.new_zeros(*hidden.shape[:-1], V)


@pytest.mark.parametrize("kind", ["subclass", "no weight", "method"])
def test_a_quantised_head_is_refused_in_one_line(kind):
    model: Any = make()
    if kind == "subclass":
        weight = model.lm_head.weight.detach().as_subclass(Dequantised)
        model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    else:
        model.lm_head = OfIntegers()
        if kind == "method":  # torch's own quantised layers unpack it
            model.lm_head.weight = lambda: None
    with pytest.raises(ValueError, match=r"\A[^\n]*leave lm_head out of the quantisation\Z"):
        causal_lm_loss(model, IDS)
    assert not model.lm_head._forward_hooks


def test_a_key_that_the_model_does_not_read_changes_nothing():
    model = make()
    model.config.final_logit_softcapping = 3.0
    assert head_options(model) == (1.0, None)


# --- wrappers -------------------------------------------------------------------------------------


def on_two_ranks(how):
    """How far the gradient of two ranks, each with every second micro-batch, is from that of one
    process: (of the loss, of a weighted sum of log-probs)."""
    dist.init_process_group("gloo")
    model = make("llama" if "head alone" in how else "qwen2", torch.float64)
    alone, batches = copy.deepcopy(model), list(padded())
    weights = torch.linspace(-1, 1, 11, dtype=torch.float64)
    wrapped = call = wrap(how, model)
    if not isinstance(getattr(call, "module", call), LossModule):
        call = functools.partial(causal_lm_loss, wrapped)
    items, mine = count(batches), batches[dist.get_rank() :: 2]
    total(wrapped, (call(**x, num_items=items, world_size=2).loss for x in mine))
    total(alone, (causal_lm_loss(alone, **x, num_items=items).loss for x in batches))
    errors = [distance(wrapped, alone)]
    if call is not wrapped:  # a LossModule has no log-probs
        total(wrapped, ((causal_lm_logprobs(wrapped, **x).logp * weights).sum() for x in mine))
        total(alone, ((causal_lm_logprobs(alone, **x).logp * weights).sum() / 2 for x in batches))
        errors.append(distance(wrapped, alone))
    return errors


def wrap(how, model) -> Any:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "ddp, unused":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if how == "ddp, module":
        return DistributedDataParallel(LossModule(model))
    if how.startswith("fsdp1"):
        parts = [*model.model.layers, *([model.lm_head] if "head" in how else [])]
        warnings.simplefilter("ignore")  # it is deprecated, and slow on a CPU
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=CustomPolicy(lambda module: any(module is part for part in parts)),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    cut = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (2,)))
    for layer in model.model.layers:
        cut(layer)
    if how == "head alone":
        cut(model.lm_head)
    return cut(LossModule(model) if how == "fsdp, module" else model)


def distance(wrapped, alone):
    whole: Any = contextlib.nullcontext()
    if isinstance(wrapped, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True)
    with whole:
        grads = [p.grad for p in wrapped.parameters()]
        got = flat([getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads])
    return error(got, flat([p.grad for p in alone.parameters()]))


WRAPPED = ["ddp", "ddp, unused", "ddp, module", "fsdp", "head alone", "fsdp, module"]


@pytest.mark.parametrize("how", [*WRAPPED, "fsdp1", "fsdp1, head alone"])
def test_two_ranks_are_one(how):
    for errors in run_ranks(on_two_ranks, how):
        assert len(errors) == (1 if how.endswith("module") else 2)
        assert max(errors) < 1e-10


def with_a_sharded_head():
    """Its whole gradient is the mean of the ranks', as FSDP makes it of every other weight's."""
    dist.init_process_group("gloo")
    grads, refused = [], ""
    for name in ("dp", "tp"):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
        head = nn.Linear(3, 5)
        whole = torch.arange(15.0).view(5, 3)
        head.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        try:
            weight = head_weights(head).weight
        except ValueError as refusal:
            refused = str(refusal)
            continue
        assert torch.equal(weight, whole)
        (weight.square() * (1.0 + dist.get_rank())).sum().backward()
        grad: Any = head.weight.grad
        grads.append((grad.full_tensor() / whole.clamp(min=1)).tolist())
    return grads, refused


def test_a_head_that_is_cut_over_ranks_is_gathered():
    for (grad,), refused in run_ranks(with_a_sharded_head):
        assert grad == [[0.0, 3.0, 3.0], *[[3.0] * 3] * 4]
        assert "the head is tensor-parallel" in refused


def with_accelerate():
    from accelerate import Accelerator

    (batch,) = padded(1)
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        expected = causal_lm_loss(model, **batch).loss.item()
    exact = causal_lm_loss(model, **batch).loss.item()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    return expected, exact, causal_lm_loss(prepared, **batch).loss.item()


def test_a_prepared_model_runs_in_its_own_precision():
    ((expected, exact, got),) = run_ranks(with_accelerate, size=1)
    assert got == expected
    assert abs(got - exact) > 1e-4


ADAPTERS = {
    "body": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head, rank-stable": {"target_modules": ["lm_head"], "use_rslora": True},
    "copied head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [*range(30)], "lm_head": [5, 7]},
    },
}


def adapted(kind="granite", dtype=torch.float64, **settings):
    """A model with PEFT's adapters, all of them moved off their start, where they do nothing."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(make(kind), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(dtype).train()


@pytest.mark.hosts("peft")
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_train_as_with_the_models_logits(settings):
    model, (batch,) = adapted(**settings), padded(1)
    assert_exact(model, batch)


@pytest.mark.hosts("peft")
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_are_off_merged_or_second_are_as_peft_has_them(settings):
    """After the head has been measured with the first of them on."""
    peft, model, (batch,) = importlib.import_module("peft"), adapted(**settings), padded(1)
    seen = [causal_lm_loss(model, **batch).loss.detach()]
    with model.disable_adapter():
        assert_exact(model, batch, gradients=False)
        seen.append(causal_lm_loss(model, **batch).loss.detach())
    model.merge_adapter()
    assert_exact(model, batch, gradients=False)
    model.unmerge_adapter()
    model.add_adapter("second", peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    model.set_adapter("second")
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    assert_exact(model, batch)
    seen.append(causal_lm_loss(model, **batch).loss.detach())
    assert len({round(float(loss), 3) for loss in seen}) == 3


@pytest.mark.hosts("peft")
@pytest.mark.parametrize(
    ("words", "settings"),
    [("no plain LoRA", {"use_dora": True}), ("lora_dropout", {"lora_dropout": 0.1})],
)
def test_adapters_of_the_head_that_no_weight_shows_are_refused(words, settings):
    (batch,) = padded(1)
    model = adapted(target_modules=["lm_head"], **settings)
    with pytest.raises(ValueError, match=words):
        causal_lm_loss(model, **batch)


def with_lightning():
    """How far one step of Lightning's own loop, over two micro-batches of each rank, is from the
    gradient of one process."""
    lightning = importlib.import_module("lightning")
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    model, batches = make(dtype=torch.float64), [*padded()][: 2 * size]
    alone, items, mine = copy.deepcopy(model), count(batches), batches[rank::size]

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch):
            # Lightning divides by the accumulation.
            loss = causal_lm_loss(self.model, **batch, num_items=items, world_size=size).loss
            return len(mine) * loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers and intervals
        lightning.Trainer(
            accelerator="cpu",
            devices=size,
            strategy="ddp" if size > 1 else "auto",
            max_epochs=1,
            accumulate_grad_batches=len(mine),
            use_distributed_sampler=False,
            **dict.fromkeys(quiet, False),
        ).fit(Module(), torch.utils.data.DataLoader(mine, batch_size=None))
    total(alone, (causal_lm_loss(alone, **x, num_items=items).loss for x in batches))
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    expected = [p.grad for p in alone.parameters()]
    return error(flat([(was - now).detach() for now, was in pairs]), flat(expected))


@pytest.mark.hosts("peft")
def test_virtual_tokens_are_refused():
    peft, (batch,) = importlib.import_module("peft"), padded(1)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"got 11 tokens for 8 ids; virtual tokens and cut"):
        causal_lm_loss(peft.get_peft_model(make(), config), **batch)


@pytest.mark.hosts("lightning")
@pytest.mark.parametrize("size", [1, 2])
def test_a_step_of_lightning_is_that_of_one_process(size):
    assert max(run_ranks(with_lightning, size=size)) < 1e-10

"""TRL's trainers with our head against TRL's own, and both against float64.

Budgets: log-probs, entropy and statistics within 1e-5 of TRL's and of float64 from the same
weights, gradients within 1e-5 as one vector, both in float32. In bfloat16, where TRL rounds the
logits, ours are never further from float64 than its own.
"""

import contextlib
import copy
import functools
import importlib
import json
import types
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_integrations import V, error, flat, make, padded
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from trl_oracle import Rows, Step, trainer

from vpgea_fast.integrations.trl import HOOK, OUTPUTS, STAND_INS, SWITCH, enable
from vpgea_fast.kernels import head

pytestmark = pytest.mark.hosts
trl = pytest.importorskip("trl", reason="needs TRL: pip install 'trl>=1.16,<1.17'")
utils = importlib.import_module("trl.trainer.utils")

KINDS = ["qwen2", "llama", "gemma2", "granite", "phi"]  # phi: a head with a bias
TEMPERATURE = 0.7
OWN = {name: getattr(utils, name) for name in (HOOK, SWITCH)}


@pytest.fixture(autouse=True)
def _nothing_stays():
    yield
    assert {name: getattr(utils, name) for name in OWN} == OWN


def ready(kind="llama", outputs=OUTPUTS, **more):
    model = make(kind)
    utils.add_fused_lm_head(model, temperature=TEMPERATURE, outputs=outputs, **more)
    return model


@functools.cache
def batch(kind="llama"):
    """Rows, masks and labels; the model of this kind has some of the labels on top."""
    found, exact = next(padded(1)), make(kind, torch.float64)
    logits = exact(found["input_ids"], attention_mask=found["attention_mask"]).logits
    found["labels"][1, 5:9] = logits[1, 4:8].argmax(-1)
    return found


def scored(model, kind="llama"):
    """(the output, the gradient of a signed sum of its log-probs and entropies)."""
    model.zero_grad()
    out = model(**batch(kind), fused_lm_head=True)
    sign = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
    (sign * (out.log_probs + 0.3 * out.entropy)).sum().backward()
    return out, flat([p.grad for p in model.parameters()])


def is_ours(out):
    """Whether our autograd function made these log-probs."""
    nodes, seen = [out.log_probs.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
    return any("Recompute" in node.name() for node in seen)


def truth(kind):
    """The same as `scored`, by log_softmax of the logits in float64, where there is a label."""
    exact, kept = make(kind, torch.float64), batch(kind)["labels"][:, 1:] != -100
    inputs = {name: x for name, x in batch(kind).items() if name != "labels"}
    z_BTV = exact(**inputs).logits[:, :-1] / TEMPERATURE
    logp_BTV = z_BTV.log_softmax(-1)
    labels = batch(kind)["labels"][:, 1:].clamp(min=0)[..., None]
    found = {
        "log_probs": logp_BTV.gather(-1, labels)[..., 0],
        "entropy": -(logp_BTV.exp() * logp_BTV).sum(-1),
        "log_sum_sq_probs": (2 * logp_BTV).logsumexp(-1),
        "mean_logits": z_BTV.mean(-1),
        "is_top1": z_BTV.argmax(-1, keepdim=True).eq(labels)[..., 0],
    }
    found = {name: x.masked_fill(~kept, 0) for name, x in found.items()}
    sign = torch.linspace(-1, 1, kept.numel()).view_as(kept)
    (sign * (found["log_probs"] + 0.3 * found["entropy"])).sum().backward()
    return found, flat([p.grad for p in exact.parameters()])


# --- one forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_trl_and_of_float64(kind):
    model = ready(kind)
    theirs, their_gradient = scored(model, kind)
    with enable(model):
        ours, gradient = scored(model, kind)
    exact, exact_gradient = truth(kind)
    assert is_ours(ours)
    assert not is_ours(theirs)
    for name in OUTPUTS:
        got = getattr(ours, name).detach()
        assert got.dtype == getattr(theirs, name).dtype
        for expected in (getattr(theirs, name), exact[name]):
            assert float((got.double() - expected.detach().double()).abs().max()) < 1e-5, name
    assert 0 < ours.is_top1.sum() < ours.label_mask.sum()
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert error(ours.loss.detach(), theirs.loss.detach()) < 1e-6
    assert error(gradient, their_gradient) < 1e-5
    assert error(gradient.double(), exact_gradient) < 1e-5


def test_off_is_trl_bit_for_bit():
    model = ready()
    before = scored(model)
    switch = enable(model)
    assert {name: getattr(utils, name) for name in OWN} == STAND_INS
    during = scored(model)
    switch.disable()
    switch.disable()
    after = scored(model)
    assert torch.equal(before[1], after[1])
    assert all(torch.equal(getattr(before[0], x), getattr(after[0], x)) for x in OUTPUTS)
    assert not torch.equal(before[0].log_probs, during[0].log_probs)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_only_the_models_that_were_named_are_served():
    one, other = ready(), ready("granite")
    with enable(one):
        assert [is_ours(scored(model)[0]) for model in (one, other)] == [True, False]
        with enable():
            assert [is_ours(scored(model)[0]) for model in (one, other)] == [True, True]
        # A forward that fails leaves the next one to TRL.
        with pytest.raises(TypeError):
            one(batch()["input_ids"], fused_lm_head=True)
        assert not is_ours(scored(other)[0])
    assert not is_ours(scored(one)[0])


def test_only_labelled_positions_are_scored():
    """A hidden state without a label may be anything; without one at all the loss is 0."""
    model, rows = ready(), []
    with enable(model), contextlib.ExitStack() as stack:
        real = utils._ChunkedLogProbFunction.apply
        counted = lambda hidden, *more: rows.append(len(hidden)) or real(hidden, *more)  # noqa: E731
        stack.callback(setattr, utils, HOOK, utils._ChunkedLogProbFunction)
        setattr(utils, HOOK, types.SimpleNamespace(apply=counted))
        scored(model)
        none = {**batch(), "labels": torch.full_like(batch()["labels"], -100)}
        out = model(**none, fused_lm_head=True)
        out.loss.backward()
    assert rows == [int((batch()["labels"][:, 1:] != -100).sum()), 0]
    assert out.loss.item() == 0.0
    assert not out.log_probs.any()


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("is_top1",), ("mean_logits",)])
def test_what_is_not_asked_for_is_none(outputs):
    model = ready(outputs=("log_probs", *outputs))
    with enable(model):
        out = model(**batch(), fused_lm_head=True)
    given = {name for name in OUTPUTS if getattr(out, name) is not None}
    assert given == {"log_probs", *outputs}


def rounded(call, **shape):
    """Relative errors to float64 of (log-probs, dX, dW) of 64 rows in bfloat16, float32 outside."""
    made = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 32, generator=made).requires_grad_()
    weight = (1.5 * torch.randn(500, 32, generator=made)).requires_grad_()
    targets = torch.randint(500, (64,), generator=made)
    sign = torch.randn(64, generator=made)
    results = []
    for exact in (False, True):
        x, w = (t.detach().double() if exact else t.detach() for t in (hidden, weight))
        x, w = x.requires_grad_(), w.requires_grad_()
        if exact:
            z = shape["logit_scale"] * (x @ w.T)
            z = shape["softcap"] * (z / shape["softcap"]).tanh() / TEMPERATURE
            logp = z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        else:
            with torch.autocast("cpu", torch.bfloat16):
                more = (shape["softcap"], shape["logit_scale"], ())
                logp = call(x, w, None, targets, TEMPERATURE, 32768, *more)[0]
        logp.mul(sign).sum().backward()
        results.append((logp.detach(), x.grad, w.grad))
    return [error(got.double(), expected) for got, expected in zip(*results, strict=True)]


def test_bfloat16_is_never_further_from_float64_than_trl():
    theirs = rounded(OWN[HOOK].apply, logit_scale=0.5, softcap=20.0)
    with enable():
        ours = rounded(getattr(utils, HOOK).apply, logit_scale=0.5, softcap=20.0)
    assert all(mine <= their for mine, their in zip(ours, theirs, strict=True)), (ours, theirs)
    assert max(ours) < 1e-2


def test_autocast_is_that_of_trl():
    model = ready("qwen2")
    found = []
    for switch in (contextlib.nullcontext, functools.partial(enable, model)):
        with switch(), torch.autocast("cpu", torch.bfloat16):
            found.append(scored(model))
    (theirs, their_gradient), (ours, gradient) = found
    assert is_ours(ours)
    assert error(ours.log_probs.detach(), theirs.log_probs.detach()) < 1e-2
    assert error(gradient, their_gradient) < 1e-2


@pytest.mark.parametrize("exact", [False, True])
def test_a_head_in_half_precision(exact):
    """`cast_lm_head_to_fp32` makes float32 hidden states beside a bfloat16 weight."""
    model = make("qwen2", torch.bfloat16)
    utils.add_fused_lm_head(model, TEMPERATURE, exact, ("log_probs", "entropy"))
    theirs, their_gradient = scored(model)
    with enable(model):
        ours, gradient = scored(model)
    budget = 1e-5 if exact else 2e-2
    assert gradient.dtype == torch.bfloat16
    assert error(ours.log_probs.detach(), theirs.log_probs.detach()) < budget
    assert error(gradient.double(), their_gradient.double()) < max(budget, 5e-3)


# --- one step of every trainer --------------------------------------------------------------------

STEP = Step(micro_batch=3)
GRPO = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "entropy_coef": 0.01},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.7},
}
ALIKE = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "save_strategy": "no",
}
WORDS = ["2+3=", "4*7=", "9-5=", "6+1=", "8-3=", "5*5="]
GOOD = ["5", "28 and", "4", "7", "5 so it is", "25"]
BAD = ["6 then", "27", "5", "8 no", "4", "20"]
DATA = {
    "sft": {"prompt": WORDS, "completion": GOOD},
    "dpo": {"prompt": WORDS, "chosen": GOOD, "rejected": BAD},
    "kto": {"prompt": WORDS, "completion": GOOD, "label": [True, False] * 3},
}


def rows():
    """Six rows, ragged, one of them masked, with old and reference log-probs around -3."""
    made = torch.Generator().manual_seed(2)
    lengths = (5, 9, 1, 8, 3, 6)
    ids = [torch.randint(3, 60, (n,), generator=made) for n in lengths]
    near = [[-3 + torch.randn(n, generator=made) for n in lengths] for _ in range(2)]
    return Rows(
        prompts=[torch.randint(3, 60, (n,), generator=made) for n in (4, 7, 2, 4, 9, 1)],
        completions=ids,
        advantages=torch.tensor([1.1, -0.7, 0.4, -1.3, 0.9, 0.6]),
        old=near[0],
        ref=near[1],
        masked=[i == 3 for i in range(6)],
    )


def near(model):
    """(6,) log-probs of the completions, off the model's own by up to 0.2: ratios near 1."""
    model, given, sums = model.eval(), rows(), []
    assert given.masked is not None
    each = zip(given.prompts, given.completions, given.masked, strict=True)
    for prompt, completion, gone in each:
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            z_TV = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logp_T = z_TV.log_softmax(-1).gather(-1, completion[:, None])
        sums.append(logp_T.sum() * (not gone))
    return torch.stack(sums) + torch.tensor([0.1, -0.15, 0.05, 0.0, -0.1, 0.2])


@contextlib.contextmanager
def trainer_of(method, model, tokenizer, folder, **more):
    """(a trainer of TRL, the micro-batches of one step, labels of the step)."""
    if method in GRPO:
        given = {"_prepare_inputs": lambda _, inputs: inputs}
        keys = {"max_completion_length": 9, "temperature": TEMPERATURE, **GRPO[method], **more}
        with trainer(model, tokenizer, given, STEP, 2, **keys) as made:
            yield made, STEP.split(rows()), None
        return
    from datasets import Dataset

    # A copy: TRL replaces the forward of the model that it is given.
    alike = {**ALIKE, "output_dir": str(folder), **more}
    model, name = copy.deepcopy(model), method.upper()
    if method == "rloo":
        kind, given = trl.RLOOTrainer, {"_prepare_inputs": lambda _, inputs: inputs}
        config = trl.RLOOConfig(**alike, num_generations=2, temperature=TEMPERATURE, beta=0.0)
        made = type("Given", (kind,), given)(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["?"] * 3}),
            processing_class=tokenizer,
        )
        split = zip(STEP.split(rows()), near(model).split(3), strict=True)
        parts = [{**part, "old_logps": old} for part, old in split]
    else:
        keys = {"dpo": {"use_weighting": True}}.get(method, {})
        second = {} if method == "sft" else {"ref_model": make("llama", vocab_size=len(tokenizer))}
        made = getattr(trl, f"{name}Trainer")(
            model=model,
            args=getattr(trl, f"{name}Config")(**alike, **keys),
            train_dataset=Dataset.from_dict(DATA[method]),
            processing_class=tokenizer,
            **second,
        )
        parts = list(made.get_train_dataloader())
    made.current_gradient_accumulation_steps = 2
    items = sum((p["labels"][:, 1:] != -100).sum() for p in parts) if method == "sft" else None
    yield made, parts, items


def step(made, parts, items):
    """(the loss, the gradient) of one step by TRL's own training_step."""
    made.model.zero_grad()
    made._total_train_tokens = 0  # a running total
    parts = [dict(part) for part in parts]
    loss = sum(float(made.training_step(made.model, part, items)) for part in parts)
    found = flat([p.grad for p in made.model.parameters() if p.grad is not None])
    return loss, found, {k: [*v] for k, v in made._metrics["train"].items() if "time" not in k}


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("method", [*GRPO, "rloo", "sft", "dpo", "kto"])
def test_a_step_is_that_of_trl(method, kind, tiny_tokenizer, tmp_path):
    model = make(kind, vocab_size=max(67, len(tiny_tokenizer)))
    with trainer_of(method, model, tiny_tokenizer, tmp_path) as (made, parts, items):
        theirs = step(made, parts, items)
        made._metrics["train"].clear()
        with enable(made):
            ours = step(made, parts, items)
        made._metrics["train"].clear()
        again = step(made, parts, items)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-6)
    assert error(ours[1], theirs[1]) < 1e-5
    assert not torch.equal(ours[1], theirs[1])
    assert ours[2].keys() == theirs[2].keys()
    for name, values in theirs[2].items():
        assert ours[2][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert again[0] == theirs[0]
    assert torch.equal(again[1], theirs[1])


class Exact:
    """Stands where TRL's function does: its five outputs from float64 logits of the same states."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, _, softcap=None, scale=1.0, *__):
        hidden, weight = (x + (x.bfloat16() - x).detach() for x in (hidden, weight))
        z_NV = hidden.double() @ weight.double().T
        z_NV = scale * (z_NV if bias is None else z_NV + bias.double())
        z_NV = (z_NV if softcap is None else softcap * (z_NV / softcap).tanh()) / temperature
        logp_NV = z_NV.log_softmax(-1)
        entropy = -(logp_NV.exp() * logp_NV).sum(-1)
        more = ((2 * logp_NV).logsumexp(-1), z_NV.mean(-1))
        found = (logp_NV.gather(-1, targets[:, None])[:, 0], entropy, *more)
        return *(x.float() for x in found), z_NV.argmax(-1) == targets


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("method", [*GRPO, "rloo", "sft", "dpo", "kto"])
def test_a_step_under_autocast_is_nearer_to_float64_than_trls(
    method, kind, tiny_tokenizer, tmp_path, monkeypatch
):
    """By TRL's own option. One decoder in bfloat16 is below all three heads, so the gradient of
    the head alone, where no token is one of the input, is free of its rounding."""
    model, found = make(kind, vocab_size=max(67, len(tiny_tokenizer))), []
    with trainer_of(method, model, tiny_tokenizer, tmp_path, bf16=True) as (made, parts, items):
        if not hasattr(made.model, "_original_forward"):
            made.accelerator.prepare_model(made.model)  # as train() does
        weight = made.model.get_output_embeddings().weight
        unseen = torch.ones(len(weight), dtype=torch.bool)
        unseen[torch.cat([x.flatten() for p in parts for k, x in p.items() if "ids" in k])] = False
        for head_of in ("ours", "theirs", "exact"):
            with monkeypatch.context() as patch:
                patch.setattr(utils, HOOK, Exact if head_of == "exact" else OWN[HOOK])
                with enable(made) if head_of == "ours" else contextlib.nullcontext():
                    loss, gradient, _ = step(made, parts, items)
            found.append((torch.tensor(loss), weight.grad[unseen].clone(), gradient))
    ours, theirs, exact = found
    assert unseen.sum() > 10
    errors = [[error(*pair) for pair in zip(x, exact, strict=True)] for x in (ours, theirs)]
    mine, their = errors
    assert mine[0] <= their[0]
    assert mine[0] < 1e-5
    assert mine[1] < their[1]
    assert mine[2] < 1e-2


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("method", [*GRPO, "rloo", "sft", "dpo", "kto"])
def test_twenty_steps_follow_trl(method, kind, tiny_tokenizer, tmp_path):
    """TRL's whole loop with AdamW: its curve within 1e-4."""
    curves = []
    for switch in (contextlib.nullcontext, enable):
        model = make(kind, vocab_size=max(67, len(tiny_tokenizer)))
        keys = {
            "max_steps": 20,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        with trainer_of(method, model, tiny_tokenizer, tmp_path, **keys) as (made, _, _):
            if method in (*GRPO, "rloo"):  # TRL's loop around rows that are drawn
                own = trl.RLOOTrainer if method == "rloo" else trl.GRPOTrainer
                whole = {**rows().inputs(), "num_items_in_batch": torch.tensor(rows().tokens())}
                whole |= {"old_logps": near(model)} if method == "rloo" else {}
                made._generate_and_score_completions = lambda *_, whole=whole: dict(whole)
                made._prepare_inputs = types.MethodType(own._prepare_inputs, made)
            start = flat([p.detach().clone() for p in made.model.parameters()])
            with switch():
                made.train()
            assert error(flat([p.detach() for p in made.model.parameters()]), start) > 1e-3
            curves.append([log["loss"] for log in made.state.log_history if "loss" in log])
    theirs, ours = curves
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert min(ours[1:]) < ours[0]  # of one batch, but DAPO's quantile takes other tokens of it


FORESEEN = {"sft": True, "dapo": True, "grpo": True, "dpo": False}


@pytest.mark.parametrize("method", FORESEEN)
def test_known_coefficients_make_one_pass(method, tiny_tokenizer, tmp_path, monkeypatch):
    """On policy without a penalty, and in SFT: no logits are made again, and the same gradient."""
    again = []
    real = head.logprob_backward
    monkeypatch.setattr(head, "logprob_backward", lambda **x: again.append(1) or real(**x))
    model = make("qwen2", vocab_size=max(67, len(tiny_tokenizer)))
    plain = {"beta": 0.0, "entropy_coef": 0.0, "top_entropy_quantile": 1.0}
    more = plain if method in GRPO else {}
    with trainer_of(method, model, tiny_tokenizer, tmp_path, **more) as (made, parts, items):
        if method in GRPO:
            parts = [{k: x for k, x in p.items() if k != "old_per_token_logps"} for p in parts]
        theirs = step(made, parts, items)
        with enable(made):
            ours = step(made, parts, items)
        assert "_compute_loss" not in vars(made)
        assert again == ([] if FORESEEN[method] else [1, 1])
        with enable(made.model):
            assert error(step(made, parts, items)[1], theirs[1]) < 1e-5
    assert len(again) == (2 if FORESEEN[method] else 4)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-6)
    assert error(ours[1], theirs[1]) < 1e-5


# torch._dynamo asks for it where a graph is broken, and hides the warning but from `error`.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_that_of_trl(tiny_tokenizer, tmp_path, monkeypatch):
    """Compiled by TRL's option, where the switch is on when the first graph is made."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the option sets it, for good
    counters = importlib.import_module("torch._dynamo.utils").counters
    keys = {"max_steps": 2, "logging_steps": 1, "torch_compile_backend": "eager"}
    curves = []
    for switch in (lambda _: contextlib.nullcontext(), enable):
        made = sft(tiny_tokenizer, tmp_path, learning_rate=1e-2, **keys)
        counters.clear()
        with switch(made):
            made.train()
        assert counters["stats"]["unique_graphs"] > 0
        curves.append([log["loss"] for log in made.state.log_history if "loss" in log])
    torch.compiler.reset()
    assert len(curves[1]) == 2
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_loss_of_the_users_stays_on_the_trainer(order, tiny_tokenizer, tmp_path):
    """Whichever of two switches goes first, and whoever has replaced the loss before."""
    model = make("qwen2", vocab_size=max(67, len(tiny_tokenizer)))
    with trainer_of("dapo", model, tiny_tokenizer, tmp_path) as (made, parts, _):
        own, calls = made._compute_loss, []

        def mine(model, inputs):
            calls.append(1)
            return own(model, inputs)

        made._compute_loss = mine
        switches = [enable(made), enable(made)]
        if order == "last":
            switches.reverse()
        made._compute_loss(made.model, dict(parts[0]))
        for switch in switches:
            switch.disable()
        assert made._compute_loss is mine
        assert calls == [1]
        del made._compute_loss


def test_an_error_inside_switches_off():
    model = ready()
    with pytest.raises(KeyError), enable(model):
        raise KeyError
    assert not model._forward_hooks


# --- refusals -------------------------------------------------------------------------------------


def sft(tokenizer, folder, **more):
    from datasets import Dataset

    func = more.pop("compute_loss_func", None)
    return trl.SFTTrainer(
        model=make("llama", vocab_size=max(67, len(tokenizer))),
        args=trl.SFTConfig(**ALIKE, output_dir=str(folder), **more),
        train_dataset=Dataset.from_dict(DATA["sft"]),
        processing_class=tokenizer,
        compute_loss_func=func,
    )


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # TRL's own words on them
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: with it SFTTrainer makes"),
        ({"compute_loss_func": lambda *_, **__: 0.0}, "compute_loss_func: with it SFTTrainer"),
    ],
)
def test_an_option_that_is_not_served_is_named(option, words, tiny_tokenizer, tmp_path):
    made = sft(tiny_tokenizer, tmp_path, **option)
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        enable(made)
    assert words in str(caught.value)
    assert not made.model._forward_hooks


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (make, "has no model that TRL's add_fused_lm_head has made ready"),
        (lambda: types.SimpleNamespace(model=make()), "where: SimpleNamespace has no model"),
        (dict, "where: got a dict, expected a trainer of TRL"),
        (lambda: "sft", "where: got a str, expected"),
    ],
)
def test_what_does_not_score_tokens_is_refused(where, words):
    with pytest.raises(ValueError, match=words):
        enable(where())


def test_heads_that_no_plain_weight_shows_are_refused():
    model = ready()
    with enable(model):
        model.lm_head.weight.ds_id = 3
        with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
            scored(model)
        del model.lm_head.weight.ds_id
        model.lm_head.weight = torch.nn.Parameter(
            torch.zeros(67, 32, dtype=torch.int8), requires_grad=False
        )
        with pytest.raises(ValueError, match="leave lm_head out of the quantisation"):
            scored(model)
    model = ready(outputs=("log_probs", "entropy", "kurtosis"))
    with enable(model), pytest.raises(ValueError, match="outputs: TRL asks for 'kurtosis'"):
        scored(model)


def test_a_backend_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="backend 'quack' is not available"):
        enable(backend="quack")
    model = ready()
    with enable(model, backend="reference"):
        assert is_ours(scored(model)[0])


class Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        raise NotImplementedError


def unlike():
    def _fused_forward(self):
        return _use_triton(self)  # noqa: F821 - only its name counts

    return _fused_forward


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (HOOK, None, f"trl .*: trl.trainer.utils has no {HOOK}, so its head cannot be replaced"),
        (SWITCH, None, f"has no {SWITCH}"),
        (HOOK, Moved, rf"{HOOK} takes \(hidden, weight, targets\), not \(hidden, weight, bias"),
        ("add_fused_lm_head", unlike, f"add_fused_lm_head does not call {HOOK}"),
    ],
)
def test_a_hook_that_changed_is_said(name, value, words, monkeypatch):
    with monkeypatch.context() as patch:
        if value is None:
            patch.delattr(utils, name)
        else:
            patch.setattr(utils, name, value)
        with pytest.raises(RuntimeError, match=words) as caught:
            enable()
        assert "install 'trl>=1.16,<1.17'" in str(caught.value)


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0.dev0"])
def test_a_version_that_was_not_tested_warns(version, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.warns(UserWarning, match=rf"trl {version} is not tested.*trl>=1.16,<1.17 is"):
        enable().disable()


@pytest.mark.around
def test_the_bench_checks_then_measures(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    bench = importlib.import_module("hosts_bench")
    small = {"vocabulary": 300, "hidden": 32, "layers": 1, "rows": 2, "prompt": 3, "completion": 4}
    words = [x for name, n in small.items() for x in (f"--{name}", str(n))]
    words += ["--repeats", "2", "--warmup", "0", "--device", "cpu"]
    assert bench.main([*words, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert max(found["gaps"].values()) < 1e-5
    assert found["ours"]["peak_mib"] > found["decoder"]["peak_mib"] > 0
    assert found["trl"]["seconds"][1] > 0
    assert "TRL / ours: peak" in capsys.readouterr().out
    # A head that is not TRL's is not timed.
    monkeypatch.setattr(bench, "BUDGET", 0.0)
    assert bench.main(words) == 1
    assert "no time" in capsys.readouterr().err


def with_a_head_that_nobody_gathered():
    """Rows of its own in each process, as under FSDP: each has half of the classes for them."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.randn(V, 8), mesh, [Shard(0)])
    made = torch.Generator().manual_seed(dist.get_rank())
    hidden, targets = torch.randn(6, 8, generator=made), torch.randint(V, (6,), generator=made)
    with enable():
        try:
            utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 4096)
        except ValueError as refusal:
            return str(refusal)
    return ""


def test_a_head_outside_the_hosts_gather_is_refused_on_every_rank():
    for refusal in run_ranks(with_a_head_that_nobody_gathered):
        assert "the ranks of its mesh hold other rows" in refusal
        assert "call the loss inside the forward of the module that owns the weight" in refusal
        assert "\n" not in refusal

"""The right lines of docs/hosts.md's table of traps, each held to the host's own numbers; and the
wrong ones, so that the table says what happens.

Of some rows the right line is held in tests/test_integrations.py: LoRA on the head
(`test_adapters_train_as_with_the_models_logits`), DDP, FSDP and FSDP2's head
(`test_two_ranks_are_one`, `test_a_head_that_is_cut_over_ranks_is_gathered`), accelerate
(`test_a_prepared_model_runs_in_its_own_precision`), autocast (`test_operands_follow_autocast`),
experts (`test_a_step_is_that_of_the_models_own_loss`).
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_integrations import STEP, V, adapted, error, flat, make, padded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import Trainer

from vpgea_fast.integrations import causal_lm_loss, head_options, hf
from vpgea_fast.losses import linear_logprob

pytestmark = pytest.mark.hosts
pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")


class Right(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = causal_lm_loss(
            model,
            **inputs,
            num_items=num_items_in_batch,
            world_size=self.accelerator.num_processes,
            label_smoothing=self.args.label_smoothing_factor,
        ).loss
        return (loss, {"loss": loss}) if return_outputs else loss


class Fused(hf.FusedLossMixin, Trainer):
    pass


class Wrong(Trainer):
    """A mean of the micro-batch, and nothing but that."""

    def compute_loss(self, model, inputs, **_):
        return causal_lm_loss(model, **inputs).loss


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, *_, model=None, **__):
        self.seen = flat([p.grad.clone() for p in model.parameters()])


def gradient(kind, folder, **settings):
    """(the gradient of a step of four micro-batches of other lengths, the trainer)."""
    heard = Gradient()
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=STEP,
        remove_unused_columns=False,
        **settings,
    )
    batches = list(padded())
    trainer = kind(
        model=make("qwen2"),
        args=args,
        train_dataset=batches,
        eval_dataset=batches,
        data_collator=lambda rows: dict(rows[0]),
        callbacks=[heard],
    )
    trainer.train()
    return heard.seen, trainer


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}])
def test_the_trainers_step_is_its_own(settings, tmp_path):
    expected, host = gradient(Trainer, tmp_path, **settings)
    got, ours = gradient(Right, tmp_path, **settings)
    assert error(got, expected) < 1e-5
    assert error(gradient(Fused, tmp_path, **settings)[0], expected) < 1e-5
    wrong, _ = gradient(Wrong, tmp_path, **settings)
    assert 3 < float(wrong.norm() / expected.norm()) < 5
    if settings:
        plain, _ = gradient(Right, tmp_path)
        assert error(plain, expected) > 1e-3  # ignored, it would be this
    else:
        assert ours.evaluate()["eval_loss"] == pytest.approx(host.evaluate()["eval_loss"], rel=1e-3)


def test_an_evaluation_wants_a_pair(tmp_path):
    class Alone(Trainer):
        def compute_loss(self, model, inputs, **_):
            return causal_lm_loss(model, **inputs).loss

    _, trainer = gradient(Alone, tmp_path)
    with pytest.raises(TypeError):
        trainer.evaluate()


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_options_are_the_models(kind):
    model, (batch,) = make(kind, torch.float64), padded(1)
    ids = batch["input_ids"]
    hidden = model.model(ids).last_hidden_state[0, :-1]
    expected = model(ids).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(-1, ids[0, 1:, None])[:, 0]
    given = hidden, model.lm_head.weight, ids[0, 1:]
    got = linear_logprob(*given, **head_options(model)._asdict()).logp
    assert error(got.detach(), expected.detach()) < 1e-10
    assert error(linear_logprob(*given).logp.detach(), expected.detach()) > 1e-3


def test_a_bias_is_scaled_by_who_hands_it_on():
    hidden, weight = torch.randn(6, 8).double(), torch.randn(11, 8).double()
    bias, scale = torch.randn(11).double(), 0.25
    targets = torch.arange(6)
    expected = (scale * (hidden @ weight.T + bias)).log_softmax(-1)[torch.arange(6), targets]
    options = {"logit_scale": scale}
    got = linear_logprob(hidden, weight, targets, bias=scale * bias, **options).logp
    assert error(got, expected) < 1e-12
    assert (
        error(linear_logprob(hidden, weight, targets, bias=bias, **options).logp, expected) > 0.01
    )


# --- heads that are read --------------------------------------------------------------------------


def by_weight(decoder, head, ids, **more):
    """The loss of every place, as it is written by hand."""
    hidden = decoder(ids, **more).last_hidden_state[:, :-1].flatten(0, 1)
    return -linear_logprob(hidden, head.weight, ids[:, 1:].flatten()).logp.mean()


@pytest.mark.hosts("peft")
def test_an_adapter_of_the_head_is_left_out_by_its_weight():
    model, (batch,) = adapted("llama", target_modules=["lm_head"]), padded(1)
    inner, ids = model.base_model.model, batch["input_ids"]
    right = causal_lm_loss(model, ids).loss
    assert error(right.detach(), model(ids, labels=ids, use_cache=False).loss.detach()) < 1e-6
    wrong = by_weight(inner.model, inner.lm_head, ids)
    assert error(wrong.detach(), right.detach()) > 0.01
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2
    assert not wrong.requires_grad  # and so its backward would be an error; with others it is not
    right.backward()
    assert all(p.grad.any() for p in trained)


def beside_ddp():
    """How far this rank's gradient is from the mean of both, by each line."""
    dist.init_process_group("gloo")
    ids = torch.randint(3, V, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    found = []
    for line in ("wrong", "right"):
        wrapped = DistributedDataParallel(make(dtype=torch.float64))
        inner = wrapped.module
        if line == "wrong":
            by_weight(inner.model, inner.lm_head, ids).backward()
        else:
            causal_lm_loss(wrapped, ids).loss.backward()
        gradient = flat([p.grad for p in inner.parameters()])
        mean = gradient.clone()
        dist.all_reduce(mean)
        found.append(error(gradient, mean / 2))
    return found


def test_ddp_is_not_armed_by_the_model_inside():
    for wrong, right in run_ranks(beside_ddp):
        assert wrong > 0.1
        assert right == 0.0


def beside_accelerate():
    """The loss by hand, that without autocast, and the right one."""
    from accelerate import Accelerator

    model, ids = make(), torch.arange(3, 11)[None]
    exact = causal_lm_loss(model, ids).loss.item()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    inner = prepared.module  # a rank, if an only one: DDP
    wrong = by_weight(inner.model, inner.lm_head, ids).item()
    return exact, wrong, causal_lm_loss(prepared, ids).loss.item()


def test_accelerates_autocast_is_skipped_by_the_model_inside():
    ((exact, wrong, right),) = run_ranks(beside_accelerate, size=1)
    assert wrong == pytest.approx(exact, rel=1e-6)
    assert right != pytest.approx(exact, rel=1e-5)


def of_a_gathered_head():
    """How far dW is from the mean of the ranks', by each line."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(V, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    alone = whole.clone().requires_grad_()
    linear_logprob(hidden, alone, torch.arange(6)).logp.sum().backward()
    expected = alone.grad
    assert expected is not None
    dist.all_reduce(expected)
    found = []
    for more in ({}, {"grad_placements": [Partial()]}):
        weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        gathered = weight.full_tensor(**more)  # pyright: ignore[reportAttributeAccessIssue]
        linear_logprob(hidden, gathered, torch.arange(6)).logp.sum().backward()
        found.append(error(weight.grad.full_tensor(), expected))  # pyright: ignore
    return found


def test_a_gathered_head_has_the_gradient_of_one_rank():
    for wrong, right in run_ranks(of_a_gathered_head):
        assert wrong > 0.1
        assert right < 1e-6


def test_the_load_balancing_loss_is_the_models():
    model, (batch,) = make("mixtral"), padded(1)
    ids = batch["input_ids"]
    own = model(ids, labels=ids, use_cache=False)
    right = causal_lm_loss(model, ids, output_router_logits=True)
    wrong = by_weight(model.model, model.lm_head, ids)
    assert right.aux_loss is not None
    assert error(right.loss.detach(), own.loss.detach()) < 1e-6
    missing = own.loss - wrong
    assert float(missing.detach()) == pytest.approx(float(right.aux_loss), rel=1e-3)
    assert float(right.aux_loss) > 0.01


def test_options_of_a_multi_modal_model_are_its_decoders():
    """They stand in its text configuration; its own has none of them."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {
        **{name: value for name, value in make().config.to_dict().items() if "size" in name},
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 6,
        "pad_token_id": 2,
        "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 3.0,
    }
    vision = {**shape, "num_attention_heads": 2, "image_size": 14, "patch_size": 7}
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=vision)
    model, (batch,) = AutoModelForImageTextToText.from_config(config).float(), padded(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    assert head_options(model) == (1.0, 3.0)
    assert not hasattr(config, "final_logit_softcapping")
    own = model(**batch, use_cache=False).loss
    assert error(causal_lm_loss(model, **batch).loss.detach(), own.detach()) < 1e-6


# --- the page -------------------------------------------------------------------------------------


def test_every_trap_of_the_page_has_a_test():
    """A row is known by what its host is called; a new one needs a test, and a line here."""
    tests = {
        "HF Trainer, accumulation": test_the_trainers_step_is_its_own,
        "HF Trainer, `evaluate`": test_an_evaluation_wants_a_pair,
        "HF Trainer, `label_smoothing_factor`": test_the_trainers_step_is_its_own,
        "PEFT, LoRA on `lm_head`": test_an_adapter_of_the_head_is_left_out_by_its_weight,
        "DDP, FSDP": test_ddp_is_not_armed_by_the_model_inside,
        "accelerate, Trainer in bf16": test_accelerates_autocast_is_skipped_by_the_model_inside,
        "autocast, float32 weights": "test_operands_follow_autocast",
        "FSDP2 head": test_a_gathered_head_has_the_gradient_of_one_rank,
        "mixture of experts, `output_router_logits`": test_the_load_balancing_loss_is_the_models,
        "Gemma 2, Granite, Cohere": test_options_are_the_models,
        "multi-modal models": test_options_of_a_multi_modal_model_are_its_decoders,
        "a head with bias and scale": test_a_bias_is_scaled_by_who_hands_it_on,
    }
    page = (Path(__file__).parents[1] / "docs/hosts.md").read_text(encoding="utf-8")
    table = page.partition("## Traps")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| [^|]+ \|$", table, re.M)
    assert [row for row in rows if row != "host"] == [*tests]
    others = vars(importlib.import_module("test_integrations"))
    named = re.findall(r"`(test_\w+)`", __doc__ or "")
    assert len(named) == 6
    for name in [*named, *(x for x in tests.values() if isinstance(x, str))]:
        assert callable(others[name])

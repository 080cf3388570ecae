"""The right lines of docs/hosts.md's table of traps, each held to the host's own numbers; and the
wrong ones, so that the table says what happens.

Of the other rows the tests are in tests/test_integrations.py: LoRA on the head, DDP and FSDP
(`test_two_ranks_are_one`), accelerate (`test_a_prepared_model_runs_in_its_own_precision`), autocast
(`test_operands_follow_autocast`), FSDP2's head (`test_a_head_that_is_cut_over_ranks_is_gathered`),
experts (`test_a_step_is_that_of_the_models_own_loss`).
"""

import pytest
import torch
from test_integrations import STEP, error, flat, make, padded
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import Trainer

from vpgea_fast.integrations import causal_lm_loss, head_options
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

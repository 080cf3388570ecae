"""Each adapter to another trainer works at all: one step with it, and the numbers without it.

The files marked `hosts` say the rest, and `make test-hosts` runs them; also those of PEFT,
Lightning and torchtitan, which are not installed here.
"""

import copy
import json

import pytest
import torch
from test_integrations import error, flat, make, padded

from vpgea_fast.integrations import verl

BUDGET = 1e-5
WHY = "an extra of this project: pip install 'vpgea_fast[dev]'"


def stepped(model, loss):
    """(the loss, the gradient of all weights, a name of what made the loss)."""
    model.zero_grad()
    loss.backward()
    return loss.detach(), flat([p.grad.clone() for p in model.parameters()]), loss.grad_fn.name()


def assert_alike(ours, theirs):
    """The same numbers, made in another way."""
    assert error(ours[0], theirs[0]) < BUDGET
    assert error(ours[1], theirs[1]) < BUDGET
    assert not torch.equal(ours[1], theirs[1])


def test_the_hugging_face_trainer(tmp_path):
    pytest.importorskip("accelerate", reason=WHY)
    from transformers import TrainingArguments
    from transformers.trainer import Trainer

    from vpgea_fast.integrations import hf

    model, (batch,) = make("granite"), padded(1)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_strategy="no")
    trainer, items = Trainer(model, args), (batch["labels"][:, 1:] != -100).sum()

    def step():
        return stepped(model, trainer.compute_loss(model, dict(batch), num_items_in_batch=items))

    theirs = step()
    with hf.enable(trainer):
        ours = step()
    assert_alike(ours, theirs)
    assert torch.equal(step()[1], theirs[1])


def test_trl():
    utils = pytest.importorskip("trl.trainer.utils", reason=WHY)
    from vpgea_fast.integrations import trl

    model, (batch,) = make("gemma2"), padded(1)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))

    def step():
        out = model(**batch, fused_lm_head=True)
        signs = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
        return stepped(model, (signs * (out.log_probs + 0.3 * out.entropy)).sum())

    theirs = step()
    with trl.enable(model):
        ours = step()
    assert_alike(ours, theirs)
    assert torch.equal(step()[1], theirs[1])


def test_verl():
    """Its function by its signature; verl itself is not installed here."""
    hidden, weight = torch.randn(2, 6, 16, requires_grad=True), torch.randn(67, 16)
    labels, signs = torch.randint(67, (2, 6)), torch.randn(2, 2, 6)
    logp_V = (hidden @ weight.T / 0.7).log_softmax(-1)
    expected = logp_V.gather(-1, labels[..., None])[..., 0], -(logp_V.exp() * logp_V).sum(-1)
    got = verl.FusedLinearForPPO()(hidden, weight, labels, temperature=0.7)
    grads = []
    for logp, entropy in (got, expected):
        grads += torch.autograd.grad((signs[0] * logp + signs[1] * entropy).sum(), hidden)
    assert max(error(x.detach(), y.detach()) for x, y in zip(got, expected, strict=True)) < BUDGET
    assert error(*grads) < BUDGET


def test_vpgea_trainer(tiny_model, tiny_tokenizer, tiny_world, tmp_path):
    """Its update is the gradient of its rows' log-probs, by the logits of the model."""
    pytest.importorskip("accelerate", reason=WHY)
    from vpgea_fast.hf_trainer import VPGEAConfig, VPGEATrainer

    lines = map(json.loads, tiny_world.train_path.read_text("utf-8").splitlines()[:2])
    words = {"student": "{question}", "teacher": "{question} hint {answer}"}
    words |= {"think_prefix": "<think>", "answer_cue": "\\boxed", "answer_target": "{{answer} }"}
    args = VPGEAConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=4,
        num_prior_generations=2,
        max_completion_length=40,
        max_answer_length=6,
        sections={"prompt": words, "objective": {"preset": "robust"}},
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        optim="sgd",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    rows = [{"prompt": x["question"], "answer": x["answer"]} for x in lines]
    trainer = VPGEATrainer(
        copy.deepcopy(tiny_model), args, train_dataset=rows, processing_class=tiny_tokenizer
    )
    drawn = trainer.method.draw([*trainer.train_dataset.prompted.values()], 0)
    loss = torch.zeros(())
    for row in drawn.rows:
        ids = torch.cat([row.context_ids, row.token_ids])
        logp_TV = tiny_model(ids[None]).logits[0, len(row.context_ids) - 1 : -1].log_softmax(-1)
        loss = loss + (row.coef * logp_TV.gather(-1, row.token_ids[:, None])[:, 0]).sum()
    before = flat([p.detach().clone() for p in trainer.model.parameters()])
    trainer.train()
    after = flat([p.detach() for p in trainer.model.parameters()])
    loss.backward()
    assert error((before - after) / 1e-3, flat([p.grad for p in tiny_model.parameters()])) < 1e-3

"""TRL's losses through `trl_oracle` against their formulas, row by row in float64.

The formulas are written from the papers' and TRL's documentation, and share nothing with TRL:
no padding, no masks of 0 and 1 over a rectangle, no float32 head. Shapes: T tokens of a row.
"""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback
from trl_oracle import Rows, Step, trainer, trl_coefficients, trl_step

pytestmark = pytest.mark.hosts
LIMIT = 20  # max_completion_length: longer than any row
STEP = Step(micro_batch=3)

# Keys of GRPOConfig.
METHODS = {
    "grpo": {"loss_type": "grpo"},
    "grpo, clip-higher": {"loss_type": "grpo", "epsilon": 0.15, "epsilon_high": 0.28},
    "grpo, two-sided": {"loss_type": "grpo", "epsilon": 0.2, "delta": 1.5},
    "grpo, k3": {"loss_type": "grpo", "beta": 0.04},
    "grpo, k3 as published": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dr_grpo, k3": {"loss_type": "dr_grpo", "beta": 0.3},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dapo, k3": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.3},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.25},
    "cispo, k3": {"loss_type": "cispo", "epsilon_high": 1.25, "beta": 0.3},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.03,
        "epsilon_high": 0.04,
    },
    "gspo, k3": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.03,
        "epsilon_high": 0.04,
        "beta": 0.3,
    },
    "gspo, token mean": {
        "loss_type": "dapo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.03,
        "epsilon_high": 0.04,
    },
    "luspo": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.03,
        "epsilon_high": 0.04,
    },
    # Temperatures that float32 holds exactly: TRL keeps them in it.
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.25, "sapo_temperature_neg": 0.75},
    "vespo": {"loss_type": "vespo"},
    # Rows with A < 0 that drifted by more than this drop out; their penalty stays.
    "off-policy mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.05, "beta": 0.3},
}


@pytest.fixture
def tiny_model(tiny_model):
    """In float64 all is, but TRL's head: its float32 moves a weight's gradient by 7e-6 at most."""
    return tiny_model.double()


def rows_of(model):
    """Nine rows of 1 to 13 tokens, two of them masked whole and three in part; old and reference
    log-probs near the model's own: ratios on both sides of every clip, for both signs of A."""
    made = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    lengths = [5, 13, 1, 8, 3, 11, 2, 9, 6]
    prompts = [torch.randint(vocab, (n,), generator=made) for n in (4, 7, 2, 4, 9, 1, 3, 3, 5)]
    completions = [torch.randint(vocab, (n,), generator=made) for n in lengths]
    advantages = torch.tensor([1.1, -0.7, 0.4, -1.3, 0.9, 0.6, -0.2, 0.0, -0.5])
    bare = Rows(prompts, completions, advantages)
    own = [logp.detach() for logp in logps_of(model, bare)]

    def near(spread):
        noise = [torch.randn(n, generator=made, dtype=torch.float64) for n in lengths]
        return [(o + spread * e).float() for o, e in zip(own, noise, strict=True)]

    count = [torch.ones(n, dtype=torch.int64) for n in lengths]
    count[1][3:7] = count[3][:2] = count[5][-1] = 0
    return Rows(
        prompts,
        completions,
        advantages,
        old=near(0.4),
        ref=near(0.5),
        counts=count,
        masked=[i in (4, 7) for i in range(9)],
    )


def logps_of(model, rows):
    """A row at a time, unpadded."""
    found = []
    for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
        logits_TV = model(torch.cat([prompt, completion])[None]).logits[0, prompt.numel() - 1 : -1]
        found.append(logits_TV.log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    return found


def formula(logps, rows, step, **keys):
    """The loss of one optimizer step: a sum over rows, each with its own divisor."""
    total = rows.tokens() if step.rollout_tokens is None else step.rollout_tokens
    micro_batches = -(-len(logps) // step.micro_batch)
    loss = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(logps), step.micro_batch):
        batch = range(first, min(first + step.micro_batch, len(logps)))
        kept = {i: kept_tokens(rows, i) for i in batch}
        for i, token in kept.items():
            divisor = {
                "grpo": max(len(token), 1) * len(batch) * micro_batches,
                "sapo": max(len(token), 1) * len(batch) * micro_batches,
                "bnpo": sum(map(len, kept.values())) * micro_batches,
                "dr_grpo": LIMIT * len(batch) * micro_batches,
                "luspo": len(batch) * micro_batches,
                "dapo": total / step.updates,
                "cispo": total / step.updates,
                "vespo": total / step.updates,
            }[keys["loss_type"]]
            if token:
                loss = loss + row_loss(logps[i], rows, i, token, **keys).sum() / divisor
    return loss


def kept_tokens(rows, i):
    """The places whose tokens count."""
    if rows.masked is not None and rows.masked[i]:
        return []
    count = torch.ones_like(rows.completions[i]) if rows.counts is None else rows.counts[i]
    return count.nonzero()[:, 0].tolist()


def row_loss(logp_T, rows, i, token, *, beta=0.0, **keys):
    """The losses of a row's counting tokens."""

    def column(values):
        return values[i].double()[token]

    logp_T = logp_T[token]
    old_T = logp_T.detach() if rows.old is None else column(rows.old)
    several = isinstance(rows.advantages, list)
    advantage_T = column(rows.advantages) if several else float(rows.advantages[i])
    advantage_T = torch.as_tensor(advantage_T, dtype=torch.float64).expand_as(logp_T)
    log_ratio_T = logp_T - old_T
    whole = keys.get("importance_sampling_level") == "sequence"
    ratio_T = (log_ratio_T.mean().expand_as(logp_T) if whole else log_ratio_T).exp()
    loss_T = policy_loss(logp_T, log_ratio_T, ratio_T, advantage_T, **keys)
    sampled_T = old_T if rows.sampled is None else column(rows.sampled)
    drift = float((sampled_T - logp_T.detach()).mean())
    if drift > keys.get("off_policy_mask_threshold", math.inf):
        loss_T = loss_T * (advantage_T >= 0)
    if rows.engine_ratio is not None:
        loss_T = loss_T * column(rows.engine_ratio)
    if beta:
        delta_T = column(rows.ref) - logp_T
        k3_T = delta_T.exp() - delta_T - 1
        # TRL's default, and the gradient of the factor counts: DeepSeek-V3.2's unbiased estimate.
        k3_T = k3_T * ratio_T if keys.get("use_bias_correction_kl", True) else k3_T
        loss_T = loss_T + beta * k3_T
    return loss_T


def policy_loss(logp_T, log_ratio_T, ratio_T, advantage_T, *, loss_type, epsilon=0.2, **keys):
    good_T = advantage_T > 0
    if loss_type == "vespo":
        log_w = log_ratio_T.sum().detach()
        k, lam = (2.0, 3.0) if advantage_T[0] >= 0 else (3.0, 2.0)
        return -(lam + k * log_w - lam * log_w.exp()).exp() * advantage_T * logp_T
    high = keys.get("epsilon_high", epsilon)
    if loss_type == "cispo":
        return -ratio_T.detach().clamp(max=high) * advantage_T * logp_T
    if loss_type == "sapo":
        tau_T = torch.where(good_T, keys["sapo_temperature_pos"], keys["sapo_temperature_neg"])
        tau_T = tau_T.double()
        return -4 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1)) * advantage_T
    # The minimum by cases: a wall only where it lowers the objective; delta only below A = 0.
    capped_T = ratio_T.clamp(max=1 + high)
    floored_T = ratio_T.clamp(min=1 - epsilon, max=max(keys.get("delta") or math.inf, 1 - epsilon))
    return -advantage_T * torch.where(good_T, capped_T, floored_T)


def gradients_of(model, loss_of):
    """The formula's loss and gradients, on a copy of the model."""
    exact = copy.deepcopy(model)
    loss = loss_of(exact)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in exact.named_parameters()}


def gap(ours, theirs):
    """The largest relative Frobenius gap of a weight's gradient."""
    gaps = [
        (ours[name] - theirs[name].double()).norm() / ours[name].norm()
        for name in ours
        if theirs[name] is not None
    ]
    assert len(gaps) == len(ours)
    return max(map(float, gaps))


# Not VESPO: its weight is a function of a row's summed log-probs, and amplifies how TRL's float32
# head rounds them to 1.4e-5. The test of coefficients holds it to float64.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "vespo"])
def test_the_gradient_of_every_weight(name, tiny_model, tiny_tokenizer):
    keys = METHODS[name]
    rows = rows_of(tiny_model)
    theirs, their_gradient = trl_step(
        tiny_model, tiny_tokenizer, rows, STEP, max_completion_length=LIMIT, **keys
    )
    ours, gradient = gradients_of(
        tiny_model, lambda model: formula(logps_of(model, rows), rows, STEP, **keys)
    )
    assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    assert gap(gradient, their_gradient) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_the_coefficient_of_every_log_prob_to_float64(name, tiny_model, tiny_tokenizer):
    """d loss / d logp, of `old` absent (ratio 1, still with its gradient) as well."""
    for rows in (rows_of(tiny_model), replace(rows_of(tiny_model), old=None)):
        check_coefficients(tiny_model, tiny_tokenizer, rows, STEP, METHODS[name])


def check_coefficients(model, tokenizer, rows, step, keys):
    with torch.no_grad():
        logps = logps_of(model, rows)
    theirs, coefficients = trl_coefficients(
        model, tokenizer, logps, rows, step, max_completion_length=LIMIT, **keys
    )
    leaves = [logp.clone().requires_grad_() for logp in logps]
    ours = formula(leaves, rows, step, **keys)
    expected = torch.autograd.grad(ours, leaves, materialize_grads=True)
    assert theirs == pytest.approx(ours.item(), rel=1e-12, abs=1e-13)
    torch.testing.assert_close(coefficients, list(expected), rtol=1e-12, atol=1e-14)


def test_every_clip_is_active_on_its_side(tiny_model):
    """Else the tests above would not see it: counting tokens beyond each wall, by sign of A."""
    rows = rows_of(tiny_model)
    logps = logps_of(tiny_model, rows)
    beyond = Counter()
    for i, logp_T in enumerate(logps):
        token = kept_tokens(rows, i)
        log_ratio_T = (logp_T - rows.old[i].double()).detach()[token]
        sign = float(rows.advantages[i].sign())
        for level, ratios in (("token", log_ratio_T), ("sequence", log_ratio_T.mean()[None])):
            if token:
                low, high = (0.8, 1.28) if level == "token" else (0.97, 1.04)
                beyond[level, sign, "low"] += int((ratios.exp() < low).sum())
                beyond[level, sign, "high"] += int((ratios.exp() > high).sum())
                beyond[level, sign, "delta"] += int((ratios.exp() > 1.5).sum())
    sides = [("token", s, side) for s in (1.0, -1.0) for side in ("low", "high", "delta")]
    sides += [("sequence", s, side) for s in (1.0, -1.0) for side in ("low", "high")]
    assert [side for side in sides if beyond[side] == 0] == []


def test_columns_that_only_some_users_have(tiny_model, tiny_tokenizer):
    """A token's advantage; the engine's ratio; the engine's log-probs in the off-policy mask."""
    rows = rows_of(tiny_model)
    made = torch.Generator().manual_seed(1)
    noise = [torch.randn(row.shape, generator=made) for row in rows.old]
    several = replace(rows, advantages=[0.5 - row for row in noise])
    capped = replace(rows, engine_ratio=[row.exp().clamp(max=2.0) for row in noise])
    seen = replace(rows, sampled=[a + 0.2 * b for a, b in zip(rows.old, noise, strict=True)])
    for changed, name in ((several, "dapo, k3"), (capped, "dapo, k3"), (seen, "off-policy mask")):
        check_coefficients(tiny_model, tiny_tokenizer, changed, STEP, METHODS[name])


def test_entropy_of_a_quantile_and_its_bonus(tiny_model, tiny_tokenizer):
    """The bonus is a mean over the same tokens of a micro-batch that keep their policy loss."""
    rows = rows_of(tiny_model)
    keys = {"loss_type": "dr_grpo", "top_entropy_quantile": 0.6, "entropy_coef": 0.05}
    theirs, their_gradient = trl_step(
        tiny_model, tiny_tokenizer, rows, STEP, max_completion_length=LIMIT, **keys
    )

    def with_entropy(model):
        entropies, loss = entropies_of(model, rows), 0.0
        logps, counts = logps_of(model, rows), []
        for first in range(0, 9, 3):
            token = {i: kept_tokens(rows, i) for i in range(first, first + 3)}
            found = {(i, t): entropies[i][t] for i in token for t in token[i]}
            level = torch.stack([*found.values()]).detach().quantile(0.4)
            top = [place for place, entropy in found.items() if entropy >= level]
            loss = loss - 0.05 / 3 * torch.stack([found[place] for place in top]).mean()
            counts += [
                torch.tensor([(i, t) in top for t in range(logps[i].numel())]) for i in token
            ]
        return loss + formula(logps, replace(rows, counts=counts), STEP, loss_type="dr_grpo")

    ours, gradient = gradients_of(tiny_model, with_entropy)
    assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    assert gap(gradient, their_gradient) < 1e-5


def entropies_of(model, rows):
    found = []
    for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
        logits_TV = model(torch.cat([prompt, completion])[None]).logits[0, prompt.numel() - 1 : -1]
        found.append(torch.distributions.Categorical(logits=logits_TV).entropy())
    return found


@pytest.mark.parametrize("name", ["grpo, clip-higher", "dr_grpo", "dapo"])
def test_every_update_of_a_rollout_as_trl_trains(name, tiny_model, tiny_tokenizer):
    """TRL's whole loop, only its sampling replaced: two passes over a rollout of nine rows, three
    updates each of three micro-batches. `Step` tells the same of each update's rows."""
    rows, steps = rows_of(tiny_model), []
    step = Step(micro_batch=1, updates=3, rollout_tokens=rows.tokens())
    rollout = {**rows.inputs(), "num_items_in_batch": torch.tensor(rows.tokens())}

    class Noted(TrainerCallback):
        """The weights, advantages and gradients of each update, before AdamW takes it."""

        def on_step_begin(self, *_, model, **__):
            steps.append({"model": copy.deepcopy(model.state_dict()), "advantages": []})

        def on_pre_optimizer_step(self, *_, model, **__):
            found = {name: p.grad.clone() for name, p in model.named_parameters()}
            steps[-1]["gradient"] = found

    def compute_loss(self, model, inputs, **more):
        steps[-1]["advantages"] += inputs["advantages"].tolist()
        loss = super(type(self), self).compute_loss(model, inputs, **more)
        steps[-1]["loss"] = steps[-1].get("loss", 0.0) + loss.item()
        return loss

    given = {
        "_generate_and_score_completions": lambda *_: dict(rollout),
        "compute_loss": compute_loss,
    }
    settings = {
        "num_iterations": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    keys = {"max_completion_length": LIMIT, **METHODS[name]}
    with trainer(tiny_model, tiny_tokenizer, given, step, 3, **settings, **keys) as made:
        made.add_callback(Noted())
        made.train()
    assert len(steps) == 6
    order = rows.advantages.tolist()
    for first in (0, 3):
        seen = [a for noted in steps[first : first + 3] for a in noted["advantages"]]
        assert sorted(seen) == sorted(order)  # each pass takes every row once
    for noted in steps:
        tiny_model.load_state_dict(noted["model"])
        own = rows.take([order.index(a) for a in noted["advantages"]])
        loss, gradient = trl_step(tiny_model, tiny_tokenizer, own, step, **keys)
        assert noted["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert gap(noted["gradient"], gradient) < 1e-5
        exact, expected = gradients_of(
            tiny_model,
            lambda model, own=own: formula(logps_of(model, own), own, step, **METHODS[name]),
        )
        assert noted["loss"] == pytest.approx(exact, rel=1e-5, abs=1e-6)
        assert gap(expected, noted["gradient"]) < 1e-5

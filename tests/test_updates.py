"""Our objectives over the updates of a rollout, held against TRL's own losses on the same rows.

Every update moves the policy, so ratios leave 1 and clips take hold. TRL gets our advantages:
that they are right is tested by hand elsewhere.
"""

import copy
from dataclasses import replace

import pytest
import torch
from batches import prompted, sampled, scored, whole
from test_trl import LIMIT, gap
from trl_oracle import Rows, Step, trl_coefficients, trl_step

from vpgea_fast import attention
from vpgea_fast.model import Policy
from vpgea_fast.objectives import Cispo, Dapo, DrGrpo, Grpo, Gspo
from vpgea_fast.packing import drop_zero_rows, pack
from vpgea_fast.rows import Scale, build_rows, minibatches

B, P, PARTS, EPOCHS = 4, 3, 2, 2
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
NARROW = {"clip_low": 0.03, "clip_high": 0.04}
CASES = {
    "grpo": (
        Grpo(clip_low=0.15, clip_high=0.28),
        {"loss_type": "grpo", "epsilon": 0.15, "epsilon_high": 0.28},
    ),
    "drgrpo": (DrGrpo(norm_constant=LIMIT), {"loss_type": "dr_grpo", "epsilon": 0.2}),
    "dapo": (Dapo(), {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dapo, cut paths masked": (
        Dapo(mask_truncated=True),
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    ),
    "gspo": (Gspo(**NARROW), {**SEQUENCE, "epsilon": 0.03, "epsilon_high": 0.04}),
    "cispo": (Cispo(clip_high=0.25), {"loss_type": "cispo", "epsilon_high": 1.25}),
    "grpo, k3": (
        Grpo(kl_coef=0.3),
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "dapo, masked, k3": (
        Dapo(mask_truncated=True, kl_coef=0.3),
        {
            "loss_type": "dapo",
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "beta": 0.3,
            "use_bias_correction_kl": False,
        },
    ),
}


@pytest.fixture
def model(tiny_model):
    return tiny_model.double()


def rollout(vocabulary):
    """Responses of 2 to 13 tokens; a path of the second question was cut, and has no answer."""
    made = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(vocabulary, (n,), generator=made)  # noqa: E731

    def path(b, i):
        cut = (b, i) == (1, 2)
        lengths = torch.randint(2, 10, (1,), generator=made), torch.randint(1, 5, (1,))
        thought, answer = (int(n) for n in lengths)
        who = {"question_id": f"q{b}", "stream": "prior", "index": i, "closed": not cut}
        return sampled(ids(thought), answer_ids=ids(0 if cut else answer), **who)

    nobody = {"teacher": [1], "cue": [1], "target": [1]}
    questions = [prompted(f"q{b}", student=ids(3 + b), **nobody) for b in range(B)]
    prior = tuple(tuple(path(b, i) for i in range(P)) for b in range(B))
    correct = [[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]]
    none = torch.zeros(B, 0)
    posterior = replace(
        scored(prior, torch.zeros(B, P)), paths=((),) * B, u_BP=none, length_BP=none
    )
    return whole(questions, posterior, scored(prior, torch.zeros(B, P), correct=correct))


def policy_of(model):
    """Of a copy with our attention, which TRL's forward does not know."""
    own = copy.deepcopy(model)
    own.set_attn_implementation(attention.register())
    return Policy(own, dtype=torch.float64)


def logps_of(model, rows):
    """Path -> log-probs, (n,) float64, of rows by their path."""
    policy, found = policy_of(model), {}
    with torch.no_grad():
        for packed, members in pack(rows, 40):
            counts = [rows[i].token_ids.numel() for i in members]
            logps = policy.logprob(packed).double().split(counts)
            found |= {rows[i].path: part for i, part in zip(members, logps, strict=True)}
    return found


def gradient_of(model, rows):
    policy = policy_of(model)
    for packed, _ in pack(rows, 40):
        policy(packed).loss.backward()
    return {name: p.grad for name, p in policy.causal_lm.named_parameters()}


def as_trl(batch, keys, advantage_BP, *, old, reference, masks):
    """The paths of `keys`, as TRL is given them."""
    pairs = {path.key: (question, path) for question, path in batch.pairs("prior")}
    advantages = dict(zip(pairs, advantage_BP.flatten(), strict=True))
    return Rows(
        [pairs[key][0].student_ids for key in keys],
        [pairs[key][1].response_ids for key in keys],
        torch.stack([advantages[key] for key in keys]),
        old=[old[key] for key in keys],
        ref=[reference[key] for key in keys],
        masked=[masks and pairs[key][1].truncated for key in keys],
    )


@pytest.mark.parametrize("name", CASES)
def test_four_updates_of_a_rollout_are_those_of_trl(name, model, tiny_tokenizer):
    """Coefficients to float64; the gradient of every weight within 2e-5. TRL's head is in float32:
    the products of one CPU leave it at 1.0e-5, of another at 1.004e-5."""
    objective, keys = CASES[name]
    objective = replace(objective, group_size=P)
    batch = rollout(model.config.vocab_size)
    terms = objective.terms(batch, {})
    scale = Scale(norm=objective.norm, constant=float(LIMIT), updates=PARTS)
    everyone = Grpo(group_size=P, kl_coef=1.0).terms(batch, {})  # a row for every path
    scored_rows = build_rows(batch, everyone, Scale())
    old = logps_of(model, scored_rows)
    noise = torch.Generator().manual_seed(1)
    reference = {
        key: logp + 0.3 * torch.randn(logp.shape, generator=noise, dtype=torch.float64)
        for key, logp in old.items()
    }
    rows = [
        replace(
            row, old=old[row.path], reference=reference[row.path] if objective.kl_coef else None
        )
        for row in build_rows(batch, terms, scale)
    ]
    # As the reward says it, since masked paths have no weight.
    plain = replace(objective, mask_truncated=False).terms(batch, {})
    advantage_BP = -plain.parts[0].weight_BP
    order = [path.key for _, path in batch.pairs("prior")]
    whole_rollout = as_trl(
        batch, order, advantage_BP, old=old, reference=reference, masks=objective.mask_truncated
    )
    step = Step(micro_batch=P, updates=PARTS, rollout_tokens=whole_rollout.tokens())
    moved, clipped = [], 0
    for number, part in enumerate(minibatches(batch, rows, PARTS) * EPOCHS):
        places = range((number % PARTS) * B // PARTS * P, (number % PARTS + 1) * B // PARTS * P)
        mine = [order[i] for i in places]
        theirs = as_trl(
            batch, mine, advantage_BP, old=old, reference=reference, masks=objective.mask_truncated
        )
        now = logps_of(model, scored_rows)
        at = [row.at(now[row.path]) for row in part]
        clipped += sum(int((row.coef == 0).sum()) for row in at)
        options = {"max_completion_length": LIMIT, **keys}
        _, expected = trl_coefficients(
            model, tiny_tokenizer, [now[key] for key in mine], theirs, step, **options
        )
        coefs = {row.path: row.coef for row in at}
        for key, coef in zip(mine, expected, strict=True):
            ours = coefs.get(key, torch.zeros_like(coef))
            torch.testing.assert_close(ours, coef.double(), rtol=1e-6, atol=1e-9)
        gradient = gradient_of(model, drop_zero_rows(at))
        loss, trl = trl_step(model, tiny_tokenizer, theirs, step, **options)
        assert gap(gradient, trl) < 2e-5
        ours = sum(row.loss(now[row.path]).sum().item() for row in at)
        assert ours == pytest.approx(loss, rel=1e-5, abs=1e-6)
        moved.append(max((now[key] - old[key]).abs().max().item() for key in order))
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        with torch.no_grad():
            for weight_name, weight in model.named_parameters():
                weight -= 0.3 * gradient[weight_name] / norm
    assert moved[0] == 0.0
    assert moved[-1] > 0.3
    # CISPO zeroes no token, and under a KL no coefficient is 0.
    assert clipped > 0 or "cispo" in name or objective.kl_coef


@pytest.mark.parametrize("name", CASES)
def test_the_first_update_is_bitwise_the_form_at_ratio_one(name, model):
    objective = replace(CASES[name][0], group_size=P, kl_coef=0.0)
    batch = rollout(model.config.vocab_size)
    rows = build_rows(batch, objective.terms(batch, {}), Scale(norm=objective.norm, constant=7.0))
    old = logps_of(model, rows)
    assert rows
    for row in rows:
        now = old[row.path]
        assert torch.equal(replace(row, old=now).at(now).coef, row.coef)

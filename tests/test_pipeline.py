"""The gradient of the whole way (objective -> rows -> packing -> model -> loss) against autograd of
the paper's formula."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from batches import prompted, sampled, scored, whole
from torch import nn

from vpgea_fast import attention
from vpgea_fast.model import Policy
from vpgea_fast.objectives import Grpo, Vpgea
from vpgea_fast.packing import drop_zero_rows, pack
from vpgea_fast.rows import Scale, build_rows
from vpgea_fast.types import Score

B, G, N, VOCAB, C = 3, 4, 3, 53, 11.0


@pytest.fixture(scope="module")
def causal_lm(random_qwen2):
    """Float64 through and through: Hugging Face's own norm casts to float32."""
    model = random_qwen2(dtype=torch.float64)
    model.set_attn_implementation(attention.register())
    for parent in [model.model, *model.model.layers]:
        for name, child in list(parent.named_children()):
            if name.endswith("norm"):
                setattr(
                    parent, name, nn.RMSNorm(child.weight.numel(), eps=1e-6, dtype=torch.float64)
                )
    return model


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(VOCAB, (n,), generator=generator)

    uniform = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731

    def paths(stream, count, b):
        lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
        return tuple(
            sampled(ids(n), question_id=f"q{b}", stream=stream, index=i, closed=i != 1)
            for i, n in enumerate(lengths)
        )

    questions = [
        prompted(f"q{b}", student=ids(3 + b), teacher=ids(6 + b), cue=ids(1), target=ids(1))
        for b in range(B)
    ]
    posterior = tuple(paths("posterior", G, b) for b in range(B))
    prior = tuple(paths("prior", N, b) for b in range(B))
    u_post = -3 * uniform(B, G)
    u_post[1] = -50.0  # nobody of question 1 beats its priors: all rejected

    u_prior = -3 * uniform(B, N) - 1.5
    correct = (uniform(B, N) > 0.4).double()
    return whole(questions, scored(posterior, u_post), scored(prior, u_prior, correct=correct))


def log_prob(model, context, tokens):
    return log_probs(model, context, tokens).sum()


def log_probs(model, context, tokens):
    """log p(token_t | context, tokens before t) of each t, by full logits of one document."""
    ids = torch.cat([context, tokens])
    logits = model(
        ids[None], use_cache=False, documents=attention.Documents((ids.numel(),))
    ).logits[0, context.numel() - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def weight(norm, lengths, row, counted, gated=None):
    """w of one path as the table of the paper's section on normalisation gives it; `counted`
    questions count."""
    per_path = 1 / (counted.sum() * lengths.shape[1])
    tokens = (lengths * counted[:, None]).sum() if gated is None else (lengths * gated).sum()
    return {
        "seq_sum": per_path,
        "const": per_path / C,
        "seq_mean": per_path / row,
        "token_mean": 1 / tokens,
    }[norm]


def scale(objective):
    effective = objective.denominator == "effective"
    return Scale(norm=objective.norm, constant=C, effective=effective)


def pipeline_gradient(model, batch, objective, budget):
    terms = objective.terms(batch, {})
    rows = drop_zero_rows(build_rows(batch, terms, scale(objective)))
    policy = Policy(model, dtype=torch.float64)
    model.zero_grad()
    for packed, _ in pack(rows, budget):
        policy(packed).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), rows


def formula_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("denominator", ["nominal", "effective"])
@pytest.mark.parametrize(
    ("norm", "distill"),
    [
        ("seq_sum", "same"),
        ("const", "same"),
        ("seq_mean", "same"),
        ("token_mean", "same"),
        ("token_mean", "gated"),
    ],
)
@pytest.mark.parametrize("gate", ["indicator", "relu"])
def test_vpgea_equals_autograd_of_the_formula(causal_lm, batch, norm, distill, denominator, gate):
    keys = {"norm": norm, "denominator": denominator, "distill_denominator": distill}
    objective = Vpgea(beta=0.7, gate=gate, **keys)

    # the formula, from scratch: R = max(0, U - mean U_prior), S = R eta, A = z-score, loss as in
    # section 3 of the paper
    reward = (
        torch.relu(batch.posterior.u_BP - batch.prior.u_BP.mean(1, keepdim=True))
        * batch.posterior.closed_BP
    )
    utility = (
        reward * (batch.prior.length_BP.mean(1, keepdim=True) / batch.posterior.length_BP).sqrt()
    )
    advantage = (utility - utility.mean(1, keepdim=True)) / (
        utility.std(1, correction=0, keepdim=True) + 1e-6
    )
    assert (advantage[1] == 0).all()
    assert (advantage > 0).any(dim=1).tolist() == [True, False, True]
    lengths, counted = (
        batch.posterior.length_BP,
        torch.ones(B, dtype=torch.float64)
        if denominator == "nominal"
        else (advantage != 0).any(1).double(),
    )
    gated = (advantage > 0).double() if distill == "gated" else None
    loss = torch.zeros((), dtype=torch.float64)
    for b, i in itertools.product(range(B), range(G)):
        a, z, question = advantage[b, i], batch.posterior.paths[b][i].z_ids, batch.questions[b]
        log_q = log_prob(causal_lm, question.teacher_ids, z)
        log_pi = log_prob(causal_lm, question.student_ids, z)
        strength = (a > 0).double() if gate == "indicator" else a.clamp(min=0)
        loss = loss - weight(norm, lengths, lengths[b, i], counted) * a * log_q
        loss = loss + 0.7 * weight(norm, lengths, lengths[b, i], counted, gated) * strength * (
            log_q.detach() - log_pi
        )
    expected = formula_gradient(causal_lm, loss)

    for budget in (1, 30, 10_000):
        got, rows = pipeline_gradient(causal_lm, batch, objective, budget)
        assert relative(got, expected) <= 1e-9
    assert len(rows) == int((advantage != 0).sum() + (advantage > 0).sum())


@pytest.mark.parametrize("norm", ["seq_sum", "const", "seq_mean", "token_mean"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_grpo_equals_autograd_of_the_formula(causal_lm, batch, norm, alpha):
    objective = Grpo(group_size=N, alpha=alpha, norm=norm, trains="thought")
    reward = (
        batch.prior.correct_BP
        * (batch.prior.length_BP.mean(1, keepdim=True) / batch.prior.length_BP) ** alpha
    )
    advantage = (reward - reward.mean(1, keepdim=True)) / (
        reward.std(1, correction=0, keepdim=True) + 1e-6
    )
    lengths, loss = batch.prior.length_BP, torch.zeros((), dtype=torch.float64)
    for b, i in itertools.product(range(B), range(N)):
        log_pi = log_prob(causal_lm, batch.questions[b].student_ids, batch.prior.paths[b][i].z_ids)
        loss = (
            loss
            - weight(norm, lengths, lengths[b, i], torch.ones(B, dtype=torch.float64))
            * advantage[b, i]
            * log_pi
        )
    expected = formula_gradient(causal_lm, loss)
    assert expected.norm() > 0
    for budget in (1, 10_000):
        got, _ = pipeline_gradient(causal_lm, batch, objective, budget)
        assert relative(got, expected) <= 1e-9


@pytest.mark.parametrize("norm", ["seq_mean", "token_mean"])
def test_a_k3_equals_autograd_of_the_formula(causal_lm, batch, norm):
    """exp(d) - d - 1, d = log p_reference - log p, on every token of every path, those of advantage
    zero too; the reference's log-probs walk through the batch as a run's do."""
    objective = Grpo(group_size=N, norm=norm, trains="thought", kl_coef=0.3)
    reference = copy.deepcopy(causal_lm)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.05)
    prior = batch.prior
    equal = prior.correct_BP.index_fill(0, torch.tensor([1]), 1.0)
    batch = replace(batch, prior=replace(prior, correct_BP=equal))
    pairs = batch.pairs("prior")
    with torch.no_grad():
        seen = [log_probs(reference, q.student_ids, path.z_ids) for q, path in pairs]
        old = {path.key: log_probs(causal_lm, q.student_ids, path.z_ids) for q, path in pairs}
    score = Score("prior", "student", "thought", "reference")
    assert objective.needs() == {score}
    known = {path.key: values for (_, path), values in zip(pairs, seen, strict=True)}
    terms = objective.terms(held := replace(batch, logps={score: known}), {})
    (part,) = terms.parts
    assert part.weight_BP.eq(0).any(dim=1).tolist() == [False, True, False]
    loss, lengths = torch.zeros((), dtype=torch.float64), batch.prior.length_BP
    for place, ((question, path), far) in enumerate(zip(pairs, seen, strict=True)):
        now = log_probs(causal_lm, question.student_ids, path.z_ids)
        everyone = torch.ones(B, dtype=torch.float64)
        w = weight(norm, lengths, lengths.flatten()[place], everyone)
        gap = far - now
        push = part.weight_BP.flatten()[place] * (now - old[path.key]).exp()
        loss = loss + w * (push + 0.3 * (gap.exp() - gap - 1)).sum()
    expected = formula_gradient(causal_lm, loss)
    rows = [
        replace(row, old=old[row.path]).at(old[row.path])
        for row in build_rows(held, terms, scale(objective))
    ]
    assert len(rows) == len(pairs)
    policy = Policy(causal_lm, dtype=torch.float64)
    for budget in (1, 10_000):
        causal_lm.zero_grad()
        for packed, _ in pack(rows, budget):
            policy(packed).loss.backward()
        got = torch.cat([p.grad.flatten() for p in causal_lm.parameters()])
        assert relative(got, expected) <= 1e-9


def test_every_student_row_is_the_student_prompt_and_the_sampled_ids(batch):
    rows = build_rows(batch, Vpgea().terms(batch, {}), scale(Vpgea()))
    by_ids = {
        (q.student_ids.tolist().__str__(), p.z_ids.tolist().__str__())
        for q, g in zip(batch.questions, batch.posterior.paths, strict=True)
        for p in g
    }
    student = [row for row in rows if row.view == "student"]
    assert student
    for row in student:
        assert (str(row.context_ids.tolist()), str(row.token_ids.tolist())) in by_ids
        assert row.stream == "posterior"
        assert (row.coef < 0).all()


def test_no_gradient_no_rows(batch):
    rejected = torch.full_like(batch.posterior.u_BP, -50.0)
    nothing = replace(batch, posterior=replace(batch.posterior, u_BP=rejected))
    terms = Vpgea().terms(nothing, {})
    assert build_rows(nothing, terms, scale(Vpgea())) == []
    assert terms.metrics["groups_all_rejected"] == B

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
from vpgea_fast.objectives import Grpo, Term, Terms, Vpgea
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
    """sum_t log p(token_t | context, tokens before t)."""
    return logps_of(model, context, tokens).sum()


def logps_of(model, context, tokens):
    """Of each token, by full logits of one document."""
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
    return rows_gradient(model, rows, budget), rows


def rows_gradient(model, rows, budget):
    policy = Policy(model, dtype=torch.float64)
    model.zero_grad()
    for packed, _ in pack(rows, budget):
        policy(packed).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


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
        seen = [logps_of(reference, q.student_ids, path.z_ids) for q, path in pairs]
        old = {path.key: logps_of(causal_lm, q.student_ids, path.z_ids) for q, path in pairs}
    score = Score("prior", "student", "thought", "reference")
    assert objective.needs() == {score}
    known = {path.key: values for (_, path), values in zip(pairs, seen, strict=True)}
    terms = objective.terms(held := replace(batch, logps={score: known}), {})
    (part,) = terms.parts
    assert part.weight_BP.eq(0).any(dim=1).tolist() == [False, True, False]
    loss, lengths = torch.zeros((), dtype=torch.float64), batch.prior.length_BP
    for place, ((question, path), far) in enumerate(zip(pairs, seen, strict=True)):
        now = logps_of(causal_lm, question.student_ids, path.z_ids)
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


class Doubled:
    """A live loss by hand, whose derivative is the weight and twice the distance to `old` of it."""

    reference = False

    def __call__(self, weight, now, old, _reference):
        return weight * (now + (now - old) ** 2)


CLOSE = 50
PARTS = ("thought", "response", "answer", "target")
# What each part trains, and behind what, of a path that closed and of one that was cut.
EXPECTED = {
    "thought": [([], [10, 11, 50]), ([], [12, 13])],
    "response": [([], [10, 11, 50, 20, 21]), ([], [12, 13])],
    "answer": [([10, 11, 50], [20, 21]), None],
    "target": [([10, 11, 50, 4], [5, 6, 7]), ([12, 13, 50, 4], [5, 6, 7])],
}
PROMPTS = {"student": [1, 2], "teacher": [1, 2, 3]}


def two_paths():
    """A path with an answer and one that was cut, of a question whose every id is another."""
    question = prompted(student=[1, 2], teacher=[1, 2, 3], cue=[4], target=[5, 6, 7], close=CLOSE)
    known = {
        "logps": torch.tensor([-0.1, -0.2, -0.3]),
        "answer_logps": torch.tensor([-0.4, -0.5]),
        "answer_ids": torch.tensor([20, 21]),
    }
    nothing = torch.empty(0, dtype=torch.int64)
    paths = (
        sampled([10, 11, CLOSE], **known),
        sampled([12, 13], index=1, closed=False, answer_ids=nothing),
    )
    stream = scored((paths,), [[-1.0, -2.0]])
    return whole([question], stream, scored((paths[:1],), [[-1.0]]))


def one_term(part, view, **more):
    weight_BP = torch.tensor([[-2.0, 3.0]], dtype=torch.float64)
    term = Term(name=part, stream="posterior", view=view, part=part, weight_BP=weight_BP, **more)
    return Terms(parts=(term,))


@pytest.mark.parametrize("view", ["student", "teacher"])
@pytest.mark.parametrize("part", PARTS)
def test_rows_of_a_part_by_hand(part, view):
    rows = build_rows(two_paths(), one_term(part, view), Scale(norm="seq_sum"))
    wanted = [
        ([*PROMPTS[view], *row[0]], row[1], weight / 2)
        for row, weight in zip(EXPECTED[part], (-2.0, 3.0), strict=True)
        if row is not None
    ]
    assert [(r.context_ids.tolist(), r.token_ids.tolist()) for r in rows] == [
        (context, tokens) for context, tokens, _ in wanted
    ]
    for row, (_, tokens, coef) in zip(rows, wanted, strict=True):
        assert row.coef.tolist() == [coef] * len(tokens)
        assert (row.term, row.view, row.stream) == (part, view, "posterior")
    drawn = {
        "thought": [-0.1, -0.2, -0.3],
        "response": [-0.1, -0.2, -0.3, -0.4, -0.5],
        "answer": [-0.4, -0.5],
        "target": None,  # given, not drawn
    }[part]
    if view == "student":
        drawn = None  # from the teacher's prompt
    logps = rows[0].sample_logps
    assert (None if logps is None else logps.tolist()) == (
        None if drawn is None else pytest.approx(drawn)
    )


@pytest.mark.parametrize(
    ("part", "lengths"),
    [("thought", (3, 2)), ("response", (5, 2)), ("answer", (2, 1)), ("target", (3, 2))],
)
def test_a_part_is_divided_by_its_own_tokens(part, lengths):
    """1 / (B P len) and 1 / sum of len; a part without tokens counts as one, like a thought. The
    reference answer is divided by its thought."""
    rows = {
        norm: build_rows(two_paths(), one_term(part, "student"), Scale(norm=norm))
        for norm in ("seq_mean", "token_mean")
    }
    for i, weight in enumerate((-2.0, 3.0)):
        if EXPECTED[part][i] is None:
            continue
        mean, total = rows["seq_mean"][i].coef, rows["token_mean"][i].coef
        assert mean.tolist() == pytest.approx([weight / 2 / lengths[i]] * len(mean), rel=1e-15)
        assert total.tolist() == pytest.approx([weight / sum(lengths)] * len(total), rel=1e-15)


@pytest.mark.parametrize("live", [None, Doubled()])
@pytest.mark.parametrize("part", PARTS)
def test_factors_and_ratios_fall_on_the_tokens_that_they_are_of(part, live):
    """A factor per token of the part; a ratio per token drawn, of which an answer has the last."""
    batch, view = two_paths(), "teacher"
    counts = {"thought": 3, "response": 5, "answer": 2, "target": 3}[part]
    first, second = batch.posterior.flat
    factor = torch.arange(1, counts + 1, dtype=torch.float64)
    cut = {"answer": 0, "target": 3}.get(part, 2)
    factors = {first.key: factor, second.key: torch.full((cut,), 7.0, dtype=torch.float64)}
    ratio = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    ratios = {first.key: ratio, second.key: torch.tensor([0.6, 0.7], dtype=torch.float64)}
    rows = build_rows(
        batch,
        one_term(part, view, factors=factors, live=live),
        Scale(norm="seq_sum"),
        ratios=ratios,
    )
    own = {
        "thought": [0.1, 0.2, 0.3],
        "response": [0.1, 0.2, 0.3, 0.4, 0.5],
        "answer": [0.4, 0.5],
        "target": [1.0, 1.0, 1.0],  # nobody drew it
    }[part]
    expected = [-1.0 * (t + 1) * r for t, r in enumerate(own)]
    assert rows[0].coef.tolist() == pytest.approx(expected, rel=1e-15)
    if part != "answer":
        tail = [1.0] * 3 if part == "target" else [0.6, 0.7]
        assert rows[1].coef.tolist() == pytest.approx([1.5 * 7 * r for r in tail], rel=1e-15)
    # A live loss is multiplied by the same, and of the policy that drew it is bitwise the same.
    for row in rows:
        now = torch.linspace(-2, -1, row.token_ids.numel(), dtype=torch.float64)
        assert torch.equal(row.at(now).coef, row.coef)
        moved = replace(row, old=now - 0.25).at(now).coef
        assert moved.tolist() == pytest.approx((row.coef * (1.5 if live else 1)).tolist())


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_parts_with_factors_equal_autograd(causal_lm, view):
    """All four parts in one loss, every token with a factor of its own, through packing."""
    batch, made = two_paths(), torch.Generator().manual_seed(4)
    terms, loss = [], torch.zeros((), dtype=torch.float64)
    for part, weights in zip(
        PARTS, ((-2.0, 3.0), (1.0, -0.5), (0.7, 0.0), (-0.3, 0.9)), strict=True
    ):
        factors = {}
        for path, weight, row in zip(batch.posterior.flat, weights, EXPECTED[part], strict=True):
            behind, tokens = row or ([], [])
            factor = torch.rand(len(tokens), generator=made, dtype=torch.float64)
            factors[path.key] = factor
            if tokens:
                context = torch.tensor([*PROMPTS[view], *behind])
                logps = logps_of(causal_lm, context, torch.tensor(tokens))
                loss = loss + weight / 2 * (factor * logps).sum()
        weight_BP = torch.tensor([weights], dtype=torch.float64)
        (term,) = one_term(part, view, factors=factors).parts
        terms.append(replace(term, weight_BP=weight_BP))
    expected = formula_gradient(causal_lm, loss)
    rows = build_rows(batch, Terms(parts=tuple(terms)), Scale(norm="seq_sum"))
    assert len(rows) == 7
    for budget in (1, 10_000):
        got = rows_gradient(causal_lm, rows, budget)
        assert relative(got, expected) <= 1e-9

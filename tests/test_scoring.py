"""Cross-view scoring against full logits of one sequence at a time."""

import math
from dataclasses import replace

import pytest
import torch

from vpgea_fast import attention
from vpgea_fast.model import Policy
from vpgea_fast.scoring import accuracy_utility, answer_likelihood, row_logprobs, score_row
from vpgea_fast.types import Path, PromptedQuestion, Question

CLOSE = 9
ids = torch.tensor


@pytest.fixture(scope="module")
def policy(random_qwen2):
    return Policy(random_qwen2(attn_implementation=attention.register()))


QUESTION = PromptedQuestion(
    Question("q", "?", "7"), ids([3, 4]), ids([3, 4, 5, 6]), ids([10, 11]), ids([12, 13, 14])
)


def path(z, closed):
    return Path(
        "q",
        "posterior",
        0,
        ids(z),
        torch.zeros(len(z)),
        ids([]).long(),
        closed,
        "stop" if closed else "length",
    )


def full_forward(policy, sequence, target):
    with torch.no_grad():
        logits = policy.causal_lm(sequence[None], use_cache=False).logits[0].double()
    rows = logits[-target.numel() - 1 : -1].log_softmax(-1)
    return rows.gather(1, target[:, None]).sum().item()


def test_utility_is_the_answer_in_the_student_view(policy):
    closed, cut = path([20, 21, CLOSE], True), path([20, 21, 22], False)
    got = answer_likelihood(
        policy.logprob, [(QUESTION, closed), (QUESTION, cut)], think_close_id=CLOSE, budget=64
    )
    student, tail = QUESTION.student_ids, torch.cat([QUESTION.cue_ids, QUESTION.target_ids])
    want_closed = full_forward(
        policy, torch.cat([student, closed.z_ids, tail]), QUESTION.target_ids
    )
    want_cut = full_forward(
        policy, torch.cat([student, cut.z_ids, ids([CLOSE]), tail]), QUESTION.target_ids
    )
    assert got.tolist() == pytest.approx([want_closed, want_cut], abs=1e-5)
    assert got.dtype == torch.float64
    mean = answer_likelihood(
        policy.logprob, [(QUESTION, closed)], think_close_id=CLOSE, budget=64, u_norm="mean"
    )
    assert mean.item() == pytest.approx(want_closed / 3, abs=1e-5)


def test_the_head_runs_on_the_answer_rows_only(policy):
    seen = []
    answer_likelihood(
        lambda batch: seen.append(batch.targets.numel()) or policy.logprob(batch),
        [(QUESTION, path([20] * n + [CLOSE], True)) for n in (1, 30)],
        think_close_id=CLOSE,
        budget=1000,
    )
    assert seen == [6]


def test_utility_does_not_depend_on_the_teacher_prompt(policy):
    other = PromptedQuestion(
        QUESTION.question, QUESTION.student_ids, ids([1]), QUESTION.cue_ids, QUESTION.target_ids
    )
    a, b = (
        answer_likelihood(
            policy.logprob, [(q, path([20, CLOSE], True))], think_close_id=CLOSE, budget=64
        )
        for q in (QUESTION, other)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("budget", [1, 17, 1000])
def test_row_logprobs_keep_the_order_of_the_rows(policy, budget):
    generator = torch.Generator().manual_seed(0)
    rows = [
        score_row(ids([3, n]), torch.randint(53, (n,), generator=generator)) for n in (5, 1, 30, 2)
    ]
    for row, logps in zip(rows, row_logprobs(policy.logprob, rows, budget), strict=True):
        want = full_forward(policy, torch.cat([row.context_ids, row.token_ids]), row.token_ids)
        assert logps.shape == row.token_ids.shape
        assert logps.sum().item() == pytest.approx(want, abs=2e-4)


def test_no_paths_no_utilities(policy):
    assert answer_likelihood(policy.logprob, [], think_close_id=CLOSE, budget=10).shape == (0,)


def test_several_spellings_are_added_as_probabilities(policy):
    other = ids([15])
    question = replace(QUESTION, variant_ids=(other,))
    thought = path([20, CLOSE], True)
    got = answer_likelihood(policy.logprob, [(question, thought)], think_close_id=CLOSE, budget=64)
    context = torch.cat([QUESTION.student_ids, thought.z_ids, QUESTION.cue_ids])
    both = [
        math.exp(full_forward(policy, torch.cat([context, target]), target))
        for target in (QUESTION.target_ids, other)
    ]
    assert got.item() == pytest.approx(math.log(sum(both)), abs=1e-5)


def test_utility_by_sampled_answers():
    correct = ids([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    want = [math.log(0.5 / 5), math.log(2.5 / 5), math.log(4.5 / 5)]
    assert accuracy_utility(correct).tolist() == pytest.approx(want)

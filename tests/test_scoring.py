"""Cross-view scoring against full logits of one sequence at a time."""

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from batches import prompted, sampled

from vpgea_fast import attention
from vpgea_fast.distributed import World
from vpgea_fast.metrics import model_flops
from vpgea_fast.model import Policy
from vpgea_fast.packing import pack_rows
from vpgea_fast.passes import Passes
from vpgea_fast.scoring import (
    accuracy_utility,
    answer_likelihood,
    answer_text,
    answers_correct,
    score_row,
    verify_any,
)
from vpgea_fast.spans import Tag

CLOSE = 9
ids = torch.tensor


@pytest.fixture(scope="module")
def policy(random_qwen2):
    return Policy(random_qwen2(attn_implementation=attention.register()))


def rows_of(policy, budget=64, logprob=None):
    """Rows -> their log-probs under `policy`, packed."""
    passes = Passes(World(policy.device), budget, model_flops(policy.causal_lm.config))
    return lambda rows: passes(lambda batch, _: (logprob or policy.logprob)(batch), rows)


QUESTION = prompted(student=[3, 4], teacher=[3, 4, 5, 6], cue=[10, 11], target=[12, 13, 14])


def path(z, closed):
    return sampled(z, answer_ids=ids([]).long(), closed=closed)


def test_the_token_in_which_a_tag_ends_may_begin_the_answer():
    """`/>` closes; the token behind it, or the tag's own last one, begins the answer."""
    words = ["<s>", "so ", "/", ">", "/>", ">\\bo", "xed{7}", "/>/>", "2"]

    def decode(tokens):
        return "".join(words[token] for token in tokens.tolist())

    tag = Tag("/>", (2, 3), lambda tokens: decode(ids(tokens)))
    for thought, answer, text in [
        ([1, 2, 3], [6], "xed{7}"),
        ([1, 2, 5], [6], "\\boxed{7}"),
        ([1, 4], [], ""),
        ([1, 7], [8], "/>2"),
    ]:
        assert tag.end(thought) == len(thought)
        one = replace(path(thought, True), answer_ids=ids(answer).long())
        assert answer_text(one, decode, tag) == text
        asked = []
        judge = {"verify": lambda pairs, seen=asked: seen.extend(pairs) or [True], "tag": tag}
        assert answers_correct([one], [("7",)], decode=decode, **judge).tolist() == [1.0]
        assert asked == [("7", text)]
        assert answer_text(one, decode, None) == decode(one.answer_ids)


def test_a_cut_thought_is_wrong_whatever_the_checker_says():
    """This one takes everything, an empty text too; of a cut path it is not even asked."""
    asked = []

    def takes_all(pairs):
        asked.extend(pairs)
        return [True] * len(pairs)

    closed = replace(path([20, CLOSE], True), answer_ids=ids([5, 6]))
    cut = replace(path([20, 21], False), answer_ids=ids([7]))
    said = {"decode": lambda tokens: str(tokens.tolist()), "verify": takes_all}
    got = answers_correct([cut, closed, cut], [("a",), ("b",), ("c",)], **said)
    assert got.tolist() == [0.0, 1.0, 0.0]
    assert asked == [("b", "[5, 6]")]
    assert answers_correct([cut], [("a",)], **said).tolist() == [0.0]


def full_forward(policy, sequence, target):
    with torch.no_grad():
        logits = policy.causal_lm(sequence[None], use_cache=False).logits[0].double()
    rows = logits[-target.numel() - 1 : -1].log_softmax(-1)
    return rows.gather(1, target[:, None]).sum().item()


def test_utility_is_the_answer_in_the_student_view(policy):
    closed, cut = path([20, 21, CLOSE], True), path([20, 21, 22], False)
    got = answer_likelihood(rows_of(policy), [(QUESTION, closed), (QUESTION, cut)])
    student, tail = QUESTION.student_ids, torch.cat([QUESTION.cue_ids, QUESTION.target_ids])
    want_closed = full_forward(
        policy, torch.cat([student, closed.z_ids, tail]), QUESTION.target_ids
    )
    want_cut = full_forward(
        policy, torch.cat([student, cut.z_ids, ids([CLOSE]), tail]), QUESTION.target_ids
    )
    assert got.tolist() == pytest.approx([want_closed, want_cut], abs=1e-5)
    assert got.dtype == torch.float64
    mean = answer_likelihood(rows_of(policy), [(QUESTION, closed)], u_norm="mean")
    assert mean.item() == pytest.approx(want_closed / 3, abs=1e-5)


def test_the_head_runs_on_the_answer_rows_only(policy):
    head_rows = []

    def logprob(batch):
        head_rows.append(batch.targets.numel())
        return policy.logprob(batch)

    pairs = [(QUESTION, path([20] * n + [CLOSE], True)) for n in (1, 30)]
    answer_likelihood(rows_of(policy, 1000, logprob), pairs)
    assert head_rows == [6]


def test_utility_does_not_depend_on_the_teacher_prompt(policy):
    other = replace(QUESTION, teacher_ids=ids([1]))
    a, b = (
        answer_likelihood(rows_of(policy), [(q, path([20, CLOSE], True))])
        for q in (QUESTION, other)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("budget", [1, 17, 1000])
def test_row_logprobs_keep_the_order_of_the_rows(policy, budget):
    generator = torch.Generator().manual_seed(0)
    rows = [
        score_row(ids([3, n]), torch.randint(53, (n,), generator=generator)) for n in (5, 1, 30, 2)
    ]
    for row, logps in zip(rows, rows_of(policy, budget)(rows), strict=True):
        want = full_forward(policy, torch.cat([row.context_ids, row.token_ids]), row.token_ids)
        assert logps.shape == row.token_ids.shape
        assert logps.sum().item() == pytest.approx(want, abs=2e-4)


class OnADevice(torch.Tensor):
    """Numbers that say when they are copied to the host."""

    copies: ClassVar[list[int]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is not torch.Tensor.cpu:
            return found
        cls.copies.append(found.numel())
        return found.as_subclass(torch.Tensor)


@pytest.mark.parametrize("step", ["logprob", "logprob_entropy"])
def test_a_pass_copies_to_the_host_once(policy, step):
    """Else the host would wait for the device once a batch, and the device for the host."""
    rows = [score_row(ids([3, 4]), ids([5] * n)) for n in (2, 3, 4)]
    passes = Passes(World(policy.device), 5, model_flops(policy.causal_lm.config))
    assert len(passes.plan(rows)[0]) == 3
    OnADevice.copies.clear()
    run = getattr(policy, step)
    got = passes(lambda batch, _: run(batch).as_subclass(OnADevice), rows)
    assert OnADevice.copies == [9 * (2 if step == "logprob_entropy" else 1)]
    for row, values in zip(rows, got, strict=True):
        alone = run(pack_rows([row])).double()
        torch.testing.assert_close(values, alone, atol=1e-6, rtol=0)


def test_forwards_without_gradients_have_a_budget_of_their_own(policy):
    flops, counts = model_flops(policy.causal_lm.config), []

    def logprob(batch, _):
        counts.append(batch.targets.numel())
        return policy.logprob(batch)

    rows = [score_row(ids([3, 4]), ids([5] * n)) for n in (2, 3, 4)]
    passes = Passes(World(policy.device), 5, flops, score_budget=100)
    found = [one(logprob, rows) for one in (passes, passes.scoring)]
    assert counts == [4, 3, 2, 9]
    for few, many in zip(*found, strict=True):
        torch.testing.assert_close(few, many, atol=1e-6, rtol=0)
    assert Passes(World(policy.device), 5, flops).scoring.budget == 5


def test_every_path_is_scored_under_the_view_that_it_is_given(policy):
    """Two views in one pass, each path's as in a pass of its own."""
    thought, scored = path([20, CLOSE], True), rows_of(policy)
    both = answer_likelihood(scored, [(QUESTION, thought)] * 2, view=("teacher", "student"))
    each = [
        answer_likelihood(scored, [(QUESTION, thought)], view=view)
        for view in ("teacher", "student")
    ]
    torch.testing.assert_close(both, torch.cat(each), atol=1e-6, rtol=0)
    assert abs(both[0] - both[1]) > 1e-3


def test_no_paths_no_utilities(policy):
    assert answer_likelihood(rows_of(policy), []).shape == (0,)


def test_several_spellings_are_added_as_probabilities(policy):
    other = ids([15])
    question = replace(QUESTION, variant_ids=(other,))
    thought = path([20, CLOSE], True)
    got = answer_likelihood(rows_of(policy), [(question, thought)])
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


def test_an_answer_is_right_in_any_of_its_spellings():
    """Later spellings are asked of what the earlier ones did not take, and of nothing else."""
    asked = []

    def verify(pairs):
        asked.append(pairs)
        return [gold == text for gold, text in pairs]

    pairs = [(("seven", "7", "VII"), "7"), (("seven",), "7"), (("7", "seven"), "7")]
    assert verify_any(pairs, verify) == [True, False, True]
    assert asked == [[("seven", "7"), ("seven", "7"), ("7", "7")], [("7", "7")]]
    assert verify_any([(("seven", "7", "VII"), "VII"), (("a", "b", "c"), "d")], verify) == [
        True,
        False,
    ]
    assert verify_any([], verify) == []

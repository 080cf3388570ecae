"""Each length reward by hand: numbers of its paper's formula, and the groups that have no spread."""

import pytest
import torch
from batches import prompted, sampled, scored, whole

from vpgea_fast.objectives import Grpo
from vpgea_fast.objectives.length_rewards import Arora, Eta, Judged, Kimi, ShorterBetter


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def judged(*groups):
    """Groups of (tokens, right); the paths have no answer, so response and thought are one."""
    names = [f"q{b}" for b in range(len(groups))]
    paths = tuple(
        tuple(
            sampled(range(n), question_id=name, stream="prior", index=i, answer_ids=double([]).long())
            for i, (n, _) in enumerate(group)
        )
        for name, group in zip(names, groups, strict=True)
    )
    right = double([[float(right) for _, right in group] for group in groups])
    prior = scored(paths, torch.full_like(right, -1.0), correct=right)
    questions = [prompted(n, student=[3], teacher=[3], cue=[5], target=[6]) for n in names]
    none = scored(((sampled([1]),),) * len(groups), [[0.0]] * len(groups))
    batch = whole(questions, none, prior)
    lengths = batch.token_counts("prior", "response")
    return Judged(right_BN=right == 1, length_BN=lengths, batch=batch)


MIXED = [(10, True), (20, False), (30, True), (60, False)]
WRONG = [(10, False), (20, False), (30, False), (60, False)]
RIGHT = [(10, True), (20, True), (30, True), (60, True)]
ONE = [(10, False), (20, False), (30, True), (60, False)]
EQUAL = [(20, True), (20, False), (20, True), (20, False)]
HALF = 1 / (1 + 2.718281828459045)  # sigmoid(-1)

CASES = [
    # the mean is 30 tokens
    (Eta(alpha=0.5), MIXED, [3**0.5, 0, 1, 0]),
    (Eta(alpha=2.0, clip=(0.5, 4.0)), RIGHT, [4, 2.25, 1, 0.5]),
    (Eta(), WRONG, [0, 0, 0, 0]),
    (Eta(), EQUAL, [1, 0, 1, 0]),
    (Eta(), ONE, [0, 0, 1, 0]),
    # places 1/2, 1/2 - 1/5, 1/2 - 2/5, -1/2; a wrong path is never paid
    (Kimi(), MIXED, [1.5, 0, 1.1, -0.5]),
    (Kimi(weight=0.4), MIXED, [1.2, 0, 1.04, -0.2]),
    (Kimi(), WRONG, [0, 0, 0, -0.5]),
    (Kimi(), RIGHT, [1.5, 1.3, 1.1, 0.5]),
    (Kimi(), EQUAL, [1, 0, 1, 0]),
    (Kimi(), ONE, [0, 0, 1.1, -0.5]),
    # right paths of 10 and 30 tokens: mean 20, standard deviation 10
    (Arora(alpha=0.1), MIXED, [1 - 0.1 * HALF, 0, 1 - 0.1 * (1 - HALF), 0]),
    (Arora(), WRONG, [0, 0, 0, 0]),
    (Arora(alpha=0.4), EQUAL, [0.8, 0, 0.8, 0]),
    (Arora(alpha=0.4), ONE, [0, 0, 0.8, 0]),
    # the shortest right path has 10 tokens; of none right, the mean of 30 is the mark
    (ShorterBetter(), MIXED, [2, -0.01, 1.98, -0.05]),
    (ShorterBetter(alpha=1.0, beta=0.01), WRONG, [-0.2, -0.1, 0, -0.3]),
    (ShorterBetter(), RIGHT, [2, 1.99, 1.98, 1.95]),
    (ShorterBetter(), EQUAL, [2, 0, 2, 0]),
    (ShorterBetter(), ONE, [-0.02, -0.01, 2, -0.03]),
]


@pytest.mark.parametrize(("kind", "group", "expected"), CASES)
def test_rewards_by_hand(kind, group, expected):
    # Beside another group: a question's rewards know nothing of the others.
    shaped = kind.shaped(judged(RIGHT, group), {})
    torch.testing.assert_close(shaped.reward_BN[1], double(expected), atol=1e-7, rtol=0)
    assert shaped.reward_BN.dtype == torch.float64


@pytest.mark.parametrize("kind", [Eta(), Kimi(), Arora(), ShorterBetter()])
@pytest.mark.parametrize("group", [[(20, False)] * 4, [(20, True)] * 4])
def test_a_group_of_equal_paths_has_no_gradient(kind, group):
    for advantage in ("zscore", "centred", "leave_one_out"):
        objective = Grpo(group_size=4, length_reward=kind, advantage=advantage)
        terms = objective.terms(judged(group).batch, {})
        assert not terms.alive.any(), advantage

"""Each length reward by hand: numbers of its paper's formula; groups that have no spread, states
over steps, and runs of the tiny task."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import prompted, sampled, scored, whole
from length_formulas import Group, reward

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.objectives import DrGrpo, Grpo
from vpgea_fast.objectives.judged import Judged
from vpgea_fast.objectives.length_limits import LaserByDifficulty
from vpgea_fast.objectives.length_rewards import (
    LENGTH_REWARDS,
    Arora,
    Eta,
    Kimi,
    L1Exact,
    L1Max,
    Laser,
    LaserD,
    LaserDe,
    LcR1,
    O1Pruner,
    ShorterBetter,
    ThinkPrune,
)
from vpgea_fast.objectives.likelihood import (
    ANSWER,
    STUDENT,
    TEACHER,
    NormalisedVeriFree,
    Rlt,
    VeriFree,
)
from vpgea_fast.rollout.engine import slot_of
from vpgea_fast.rows import Scale, build_rows

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


STATED = 999
"""Token of the answer, which a thought of 0, 1, 2, ... states nowhere."""


def stream(name, groups, thought: Callable[[int], Any] = range):
    """Groups of (tokens, right); the paths have no answer, so response and thought are one."""
    none = torch.zeros(0, dtype=torch.int64)
    paths = tuple(
        tuple(
            sampled(thought(n), question_id=f"q{b}", stream=name, index=i, answer_ids=none)
            for i, (n, _) in enumerate(group)
        )
        for b, group in enumerate(groups)
    )
    right = double([[float(right) for _, right in group] for group in groups])
    found = scored(paths, torch.full_like(right, -1.0), correct=right)
    ends = [
        [p.z_ids.tolist().index(STATED) + 1 if STATED in p.z_ids else 0 for p in g] for g in paths
    ]
    return replace(found, stated_BP=torch.tensor(ends))


def judged(
    *groups: Any,
    reference: Any = None,
    budget: int | None = None,
    thought: Callable[[int], Any] = range,
) -> Judged:
    prior = stream("prior", groups, thought)
    questions = [
        replace(
            prompted(f"q{b}", student=[3], teacher=[3], cue=[5], target=[6]),
            fields={"budget": str(budget)},
        )
        for b in range(len(groups))
    ]
    posterior = stream("posterior", [[(1, False)]] * len(groups))
    batch = whole(questions, posterior, prior)
    extra = {}
    if reference:
        drawn = stream("reference", [reference] * len(groups))
        batch = replace(batch, reference=drawn)
        extra = {
            "reference_right_BR": drawn.correct_BP == 1,
            "reference_length_BR": drawn.length_BP,
        }
    return Judged(right_BN=prior.correct_BP == 1, length_BN=prior.length_BP, batch=batch, **extra)


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
    # the reference: mean 24 tokens, 1/2 right
    (O1Pruner(), MIXED, [2.4, -0.8, 0.8, -1.6]),
    (O1Pruner(weight=1.0), WRONG, [0.9, -0.3, -0.7, -1.1]),
    (O1Pruner(weight=5.0, clip=(-1.0, 3.0)), ONE, [-1, -1, 2.3, -1]),
    (O1Pruner(), EQUAL, [1.2, -0.8, 1.2, -0.8]),
    # 1 of the format everywhere; the longest right path has 30 tokens
    (LcR1(), MIXED, [2 + 2 / 3, 1, 2, 1]),
    (LcR1(weight=0.3), MIXED, [2.2, 1, 2, 1]),
    (LcR1(), WRONG, [1, 1, 1, 1]),
    (LcR1(), RIGHT, [2 + 5 / 6, 2 + 2 / 3, 2.5, 2]),
    (LcR1(), EQUAL, [2, 1, 2, 1]),
    (LcR1(), ONE, [1, 1, 2, 1]),
    (ThinkPrune(limits=(20, 10)), RIGHT, [1, 1, 0, 0]),
    (ThinkPrune(limits=(20, 10)), MIXED, [1, 0, 0, 0]),
    (ThinkPrune(limits=(20,)), WRONG, [0, 0, 0, 0]),
    (ThinkPrune(limits=(30,)), ONE, [0, 0, 1, 0]),
    # the budget is 30 tokens
    (L1Exact(alpha=0.01), MIXED, [0.8, -0.1, 1, -0.3]),
    (L1Exact(alpha=0.01), WRONG, [-0.2, -0.1, 0, -0.3]),
    (L1Exact(alpha=0.01), EQUAL, [0.9, -0.1, 0.9, -0.1]),
    (L1Exact(alpha=0.01), ONE, [-0.2, -0.1, 1, -0.3]),
    (L1Max(alpha=0.01), RIGHT, [0.7, 0.6, 0.5, 0.2]),
    (L1Max(alpha=0.1, delta=0.4), RIGHT, [1, 1, 0.4, 0]),
    (L1Max(), WRONG, [0, 0, 0, 0]),
    (L1Max(alpha=0.01), EQUAL, [0.6, 0, 0.6, 0]),
    (L1Max(), ONE, [0, 0, 0.5, 0]),
    (Laser(target=20), RIGHT, [1.5, 1.5, 1, 1]),
    (Laser(target=20, weight=1.0), MIXED, [2, 0, 1, 0]),
    (Laser(target=20), WRONG, [0, 0, 0, 0]),
    (Laser(target=20), EQUAL, [1.5, 0, 1.5, 0]),
    (Laser(target=20), ONE, [0, 0, 1, 0]),
    (LaserD(target=20), MIXED, [1.5, 0, 1, 0]),
    (LaserD(target=20), WRONG, [0, 0, 0, 0]),
    (LaserD(target=20), EQUAL, [1.5, 0, 1.5, 0]),
    (LaserD(target=30), ONE, [0, 0, 1.5, 0]),
    # a wrong path beyond the target is paid for thinking on
    (LaserDe(target=20), MIXED, [1.5, 0, 1, 0.5]),
    (LaserDe(target=20), WRONG, [0, 0, 0.5, 0.5]),
    (LaserDe(target=20), RIGHT, [1.5, 1.5, 1, 1]),
    (LaserDe(target=10), EQUAL, [1, 0.5, 1, 0.5]),
    (LaserDe(target=20, weight=1.0), ONE, [0, 0, 1, 1]),
]
REFERENCE = [(12, True), (36, False)]


@pytest.mark.parametrize(("kind", "group", "expected"), CASES)
def test_rewards_by_hand(kind, group, expected):
    # Beside another group: a question's rewards know nothing of the others.
    shaped = kind.shaped(judged(RIGHT, group, reference=REFERENCE, budget=30), {})
    reward_N = shaped.reward_BN[1]
    torch.testing.assert_close(reward_N, double(expected), atol=1e-7, rtol=0)
    assert reward_N.dtype == torch.float64


KEYS = {
    "eta": {"alpha": 0.8, "clip": (0.6, 1.4)},
    "kimi": {"weight": 0.4},
    "arora": {"alpha": 0.3},
    "o1_pruner": {"weight": 1.5, "clip": (-1.2, 2.0)},
    "lc_r1": {"weight": 0.7},
    "think_prune": {"limits": (40, 10), "steps": 1},
    "l1_exact": {"alpha": 0.01},
    "l1_max": {"alpha": 0.02, "delta": 0.4},
    "laser": {"weight": 0.4, "target": 20},
    "laser_d": {"target": 20, "every": 1, "grid": 8, "lowest": 10},
    "laser_de": {"target": 20, "every": 1, "grid": 8},
    "shorter_better": {"alpha": 1.5, "beta": 0.02},
}


@pytest.mark.parametrize("name", LENGTH_REWARDS)
def test_every_group_of_three_paths_pays_what_the_paper_writes(name):
    """All 216 groups of paths of 10, 20 or 45 tokens, right or wrong, in one step; and in the step
    after it, whose limits that step has moved."""
    kind = LENGTH_REWARDS[name](**KEYS[name])
    groups = [*itertools.product(itertools.product((10, 20, 45), (True, False)), repeat=3)]
    step = judged(*groups, reference=REFERENCE, budget=30)
    facts = [
        Group(
            responses=[[*range(n)] for n, _ in group],
            thoughts=[n for n, _ in group],
            right=[right for _, right in group],
            closed=[True] * 3,
            whole=[True] * 3,
            budget=30,
            reference=REFERENCE,
        )
        for group in groups
    ]
    state: Any = {}
    for history in ([], [facts]):
        shaped = kind.shaped(step, state)
        expected = [[reward(kind, group, i, history) for i in range(3)] for group in facts]
        torch.testing.assert_close(shaped.reward_BN, double(expected), atol=1e-12, rtol=1e-12)
        state = shaped.state


def test_every_length_reward_has_a_case():
    assert {type(kind) for kind, *_ in CASES} == {*LENGTH_REWARDS.values()}


def batch_of(*groups):
    return judged(*groups, reference=REFERENCE, budget=30).batch


@pytest.mark.parametrize("kind", [kind() for kind in LENGTH_REWARDS.values() if kind is not LcR1])
@pytest.mark.parametrize("group", [[(20, False)] * 4, [(20, True)] * 4])
def test_a_group_of_equal_paths_has_no_gradient(kind, group):
    for advantage in ("zscore", "centred", "leave_one_out", "batch_zscore"):
        objective = Grpo(group_size=4, length_reward=kind, advantage=advantage)
        terms = objective.terms(batch_of(group), {})
        assert not terms.alive.any(), advantage


@pytest.mark.parametrize(
    ("kind", "beside", "key", "value"),
    [
        (Eta, {"alpha": 0.0}, "clip", (0.9, 1.1)),
        (LcR1, {"close": 0.0}, "absent", -0.5),
        (ThinkPrune, {"limits": (20,)}, "steps", 1),
        (ThinkPrune, {"limits": (20,)}, "fitting", 0.5),
        (Laser, {"weight": 0.0}, "target", 20),
        *(
            (kind, {"weight": 0.0}, key, 2)
            for kind in (LaserD, LaserDe)
            for key in ("target", "every", "lowest", "grid", "expected")
        ),
        (LaserDe, {"weight": 0.0}, "loop", 2),
    ],
)
def test_a_key_that_changes_no_reward_is_refused(kind, beside, key, value, monkeypatch):
    with pytest.raises(
        ValueError, match=f"{key}: got .* changes nothing with {next(iter(beside))} "
    ):
        kind(**beside, **{key: value})
    monkeypatch.setattr("vpgea_fast.objectives.judged.refuse_unread", lambda _: None)
    step = judged(MIXED, ONE, thought=stating)
    one, other = (
        reward.shaped(step, {}) for reward in (kind(**beside), kind(**beside, **{key: value}))
    )
    assert torch.equal(one.reward_BN, other.reward_BN)
    if one.close_BN is not None:
        assert not one.close_BN.any()
        assert not other.close_BN.any()


# --- LC-R1's closing token ------------------------------------------------------------------------


def stating(length):
    """A thought that states the answer after half of its tokens, if it has more than 20."""
    tokens = [*range(length)]
    if length > 20:
        tokens[length // 2 - 1] = STATED
    return tokens


def test_the_closing_token_earns_what_the_thought_could_have_spared():
    shaped = LcR1(close=0.5).shaped(judged(RIGHT, ONE, thought=stating), {})
    assert shaped.close_BN is not None
    # 1/2 of the thought could go; 10 and 20 tokens never state the answer.
    assert shaped.close_BN.tolist() == [[-0.5, -0.5, 0.25, 0.25], [0, 0, 0.25, 0]]
    assert shaped.metrics == {"answer_stated": 3 / 5}
    mild = LcR1(absent=0.0).shaped(judged(RIGHT, thought=stating), {})
    assert mild.close_BN is not None
    assert mild.close_BN.tolist() == [[0, 0, 0.5, 0.5]]


def test_the_closing_tokens_weight_is_the_advantage_and_its_own_reward():
    objective = DrGrpo(group_size=4, length_reward=LcR1(), norm="seq_sum", trains="thought")
    batch = judged(ONE, EQUAL, thought=stating).batch
    terms = objective.terms(batch, {})
    rows = {row.path: row for row in build_rows(batch, terms, Scale(norm="seq_sum"))}
    # R = (1, 1, 2, 1), so A = 3/4 for the right path, and 1/2 more at its end; 8 paths.
    coef = rows["q0", "prior", 2].coef
    assert coef[:-1].tolist() == pytest.approx([-0.75 / 8] * 29)
    assert coef[-1].item() == pytest.approx(-1.25 / 8)
    assert rows["q0", "prior", 0].coef.tolist() == pytest.approx([0.25 / 8] * 10)
    lost = terms.without(torch.tensor([True, False]))
    assert {row.path[0] for row in build_rows(batch, lost, Scale()) if row.path} == {"q1"}


def test_a_closing_token_alone_is_a_row_and_a_gradient():
    """All right, all of one length: no advantage, but the thoughts could have ended earlier."""
    batch = judged([(30, True)] * 2, thought=stating).batch
    terms = DrGrpo(group_size=2, length_reward=LcR1(), trains="thought").terms(batch, {})
    assert terms.alive.tolist() == [True]
    rows = build_rows(batch, terms, Scale(norm="seq_sum"))
    assert [row.coef.tolist() for row in rows] == [[0.0] * 29 + [-0.25]] * 2


# --- limits that move -----------------------------------------------------------------------------


def after(kind, *steps, state=None):
    """The state after steps of one group each, through JSON as a checkpoint has it."""
    state = state or {}
    for group in steps:
        state = json.loads(json.dumps(dict(kind.shaped(judged(group), state).state)))
    return state


def test_think_prune_goes_from_stage_to_stage():
    kind = ThinkPrune(limits=(60, 30, 10), steps=2)
    assert after(kind, RIGHT) == {"stage": 0, "steps": 1}
    assert after(kind, RIGHT, WRONG) == {"stage": 1, "steps": 0}
    last = after(kind, *[RIGHT] * 4)
    assert last["stage"] == 2
    assert after(kind, RIGHT, state=last) == last
    assert kind.shaped(judged(RIGHT), last).reward_BN.tolist() == [[1, 0, 0, 0]]
    # A resume with fewer stages stays in its last one.
    fewer = ThinkPrune(limits=(60, 30)).shaped(judged(RIGHT), last)
    assert fewer.reward_BN.tolist() == [[1, 1, 1, 0]]
    # 2 of 4 right paths fit 20 tokens.
    patient = ThinkPrune(limits=(60, 20), steps=1, fitting=0.6)
    assert after(patient, RIGHT) == {"stage": 0, "steps": 0}
    assert after(replace(patient, fitting=0.5), RIGHT) == {"stage": 1, "steps": 0}


def test_targets_are_measured_by_difficulty():
    kind = LaserD(target=100, every=2, grid=10)
    state = after(kind, RIGHT)
    assert state["targets"] == {"hard": 100, "medium": 100, "easy": 100}
    assert state["cells"]["easy"] == {"10": 1, "20": 1, "30": 1, "60": 1}
    # MIXED is medium: of 4 paths, floor(4 / 3) = 1 must be expected right, so all must fit.
    # RIGHT is easy: of floor(8 / 3) = 2 one is expected, so half of the paths fit: 20 tokens.
    state = after(kind, RIGHT, MIXED)
    assert state["targets"] == {"hard": 100, "medium": 60, "easy": 20}
    assert state["steps"] == 0
    assert state["cells"] == {"hard": {}, "medium": {}, "easy": {}}
    shaped = kind.shaped(judged(RIGHT, MIXED), state)
    assert shaped.reward_BN.tolist() == [[1.5, 1.5, 1, 1], [1.5, 0, 1.5, 0]]
    assert shaped.metrics == {"length_limit": 40}
    bounded = after(replace(kind, lowest=35), RIGHT, MIXED)["targets"]
    assert bounded == {"hard": 100, "medium": 60, "easy": 40}
    # More than there can be: the longest path of the level.
    many = replace(kind, expected=3)
    assert after(many, RIGHT, RIGHT)["targets"]["easy"] == 60


@pytest.mark.parametrize(("right", "level"), [(0, "hard"), (1, "medium"), (2, "easy"), (3, "easy")])
def test_thirds_are_counted_in_whole_numbers(right, level):
    group = [(10, i < right) for i in range(3)]
    state = after(LaserD(grid=10), group)
    assert {name for name, cells in state["cells"].items() if cells} == {level}
    assert isinstance(LaserD(), LaserByDifficulty)


def test_a_wrong_path_in_a_loop_or_cut_is_not_paid_for_going_on():
    kind = LaserDe(target=20, loop=4)
    loops = judged([(40, False), (40, False)], thought=lambda n: [*range(n - 10), *range(7, 17)])
    assert kind.shaped(loops, {}).reward_BN.tolist() == [[0, 0]]
    short = judged([(22, False)] * 2, thought=lambda n: [1] * n)
    assert kind.shaped(short, {}).reward_BN.tolist() == [[0, 0]]
    assert LaserDe(target=20, loop=22).shaped(short, {}).reward_BN.tolist() == [[0.5, 0.5]]
    free = judged([(40, False), (40, False)])
    assert kind.shaped(free, {}).reward_BN.tolist() == [[0.5, 0.5]]
    (first, second), *_ = free.batch.prior.paths
    cut = ((first, replace(second, finish="length")),)
    batch = replace(free.batch, prior=replace(free.batch.prior, paths=cut))
    assert kind.shaped(replace(free, batch=batch), {}).reward_BN.tolist() == [[0.5, 0]]


def test_a_state_of_another_length_reward_is_not_read():
    batch = batch_of(RIGHT)
    state = Grpo(group_size=4, length_reward=ThinkPrune(limits=(60, 30), steps=1)).terms(batch, {})
    assert state.state == {"think_prune": {"stage": 1, "steps": 0}}
    other = Grpo(group_size=4, length_reward=LaserD(grid=10)).terms(batch, state.state)
    assert other.state["laser_d"]["steps"] == 1
    assert "think_prune" not in other.state
    assert Grpo(group_size=4).terms(batch, other.state).state == {}


def test_a_question_has_one_budget_per_step_and_another_in_each_run():
    budget = L1Exact(low=100, high=4100).fields()["budget"]
    paths = [("prior", 0), ("prior", 1), ("posterior", 0), ("posterior", 7)]
    runs = []
    for run_seed in (0, 1):
        for step in (0, 1):
            asked = [
                {budget(slot_of(f"q{q}", *path, run_seed=run_seed, step=step)) for path in paths}
                for q in range(200)
            ]
            assert all(len(values) == 1 for values in asked)
            runs.append([value for (value,) in asked])
    # Equal by chance in one of 4001 places; a run or a step that repeated another would be in all.
    assert all(sum(map(int.__eq__, a, b)) < 5 for a, b in itertools.combinations(runs, 2))
    assert all(100 <= min(values) < 300 < 3900 < max(values) <= 4100 for values in runs)
    few = L1Exact(low=100, high=103).fields()["budget"]
    assert {few(slot_of(f"q{q}", "prior", 0, run_seed=0, step=0)) for q in range(40)} == {
        100,
        101,
        102,
        103,
    }


# --- runs of the tiny task ------------------------------------------------------------------------

SMALL = {
    "objective.name": "grpo",
    "objective.group_size": 4,
    "train.questions_per_step": 2,
    "train.steps": 3,
    "rollout.max_new_tokens": 80,
    "metrics.diag_every": 0,
    "metrics.compare": "null",
    "checkpoint.export": "false",
    "verify.name": "number",
}
STAGES = [100, 50, 20]
MORE = {
    "o1_pruner": ["--objective.length_reward.paths", "2"],
    "l1_exact": ["--prompt.student", "{question} ={budget}", "--data.max_prompt_tokens", "32"],
    "laser_d": ["--objective.length_reward.every", "2", "--objective.length_reward.grid", "10"],
    "think_prune": [
        *("--objective.length_reward.limits", str(STAGES)),
        *("--objective.length_reward.steps", "1"),
    ],
}
# Few paths are right behind a prompt that the base has never seen.
MORE["l1_max"] = [*MORE["l1_exact"], "--train.questions_per_step", "8"]
QUICK = {"o1_pruner", "l1_exact"}
"""What draws something of its own. What keeps a state is resumed and killed; of the others the
formulas are in test_formulas.py."""


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def train(tiny_words, tmp_path):
    """Train a small run with a length reward; the lines of its steps."""

    def make(name, *more, run="run"):
        reward = ["--objective.length_reward.name", name, *MORE.get(name, [])]
        assert main(["train", str(TINY), *tiny_words(SMALL)(run, *reward, *more)]) == 0
        return lines_of(tmp_path / run)

    return make


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in LENGTH_REWARDS],
)
def test_every_length_reward_trains(name, train):
    lines = train(name)
    assert len(lines) == 3
    assert max(line["grad_norm"] for line in lines) > 0
    limits = [line["length_limit"] for line in lines if "length_limit" in line]
    if name == "think_prune":
        assert limits == STAGES
    if name == "laser_d":
        assert limits[:2] == [4096] * 2
        assert limits[2] <= 110
    assert len(limits) == (3 if name in ("think_prune", "laser_d", "laser_de") else 0)


@pytest.mark.parametrize("name", ["think_prune", pytest.param("laser_d", marks=pytest.mark.slow)])
def test_a_resume_has_the_limits_of_its_run(name, train, tmp_path):
    """Cut in the middle of a stage, or between two measurements."""
    straight = train(name)
    if name == "think_prune":
        assert [line["length_limit"] for line in straight] == STAGES
    train(name, "--train.steps", "1", run="cut")
    run = str(tmp_path / "cut")
    assert main(["train", "--resume", run, "--train.steps", "3"]) == 0
    keys = ("length_limit", "loss", "grad_norm", "len_prior")
    pairs = [[line.get(k) for k in keys] for line in straight]
    assert pairs == [[line.get(k) for k in keys] for line in lines_of(tmp_path / "cut")]
    states = [
        json.loads((tmp_path / run / "checkpoints/step_3/state.json").read_text())
        for run in ("run", "cut")
    ]
    assert states[0]["trainer_state"]["method"] == states[1]["trainer_state"]["method"]
    assert name in states[0]["trainer_state"]["method"]


REFUSED = [
    (["l1_max"], "field {budget},"),
    (["kimmi"], "length_reward.name: got 'kimmi', expected 'eta',"),
    (["kimi", "--objective.length_reward.weigt", "1"], "weigt: unknown key; did you mean 'weight'"),
    (["kimi", "--objective.length_reward.weight", "-1"], "weight: got -1, expected 0 or more"),
    (["kimi", "--objective.alpha", "0.5"], "got alpha 0.5 and a length_reward, which takes its"),
    (["kimi", "--objective.reward", "probability"], "got reward 'probability' and a length reward"),
    (["l1_max", "--objective.length_reward.low", "5000"], "got low 5000 above high 4000"),
    (["think_prune", "--objective.length_reward.limits", "[2, 3]"], "expected limits that fall"),
    (["o1_pruner", "--objective.length_reward.clip", "[2, 1]"], "expected (low, high) with low"),
    (["kimi", "--objective.name", "vpgea"], "length_reward: unknown key; it belongs to objective"),
    (["null", "--objective.length_reward.weight", "1"], "name: got null, expected 'eta'"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_wrong_combinations_are_refused_in_a_line(words, said, tiny_words, tmp_path, capsys):
    given = ["--objective.length_reward.name", *words]
    assert main(["train", str(TINY), *tiny_words(SMALL)("run", *given)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vpgea: ")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_length_reward_is_named_or_spelled_out(tmp_path, capsys):
    file = tmp_path / "one.yaml"
    rest = "\nrollout: {full_answer: true}\n"
    file.write_text("objective: {name: grpo, length_reward: {name: kimi, weight: 0.4}}" + rest)
    heard: list[str] = []

    def read(*words: str) -> Any:
        return config.load(file, words, heard.append).objective

    assert read().length_reward == Kimi(weight=0.4)
    # The file's keys stay under another weight, and go with another reward.
    assert read("--objective.length_reward.weight", "2").length_reward == Kimi(weight=2.0)
    assert read("--objective.length_reward", "arora").length_reward == Arora()
    assert (
        "length_reward.name 'arora' leaves out the file's objective.length_reward.weight"
        in (heard[0])
    )
    assert read("--objective.length_reward", "null").length_reward is None
    file.write_text("objective: {name: rloo, length_reward: arora}" + rest)
    assert read().length_reward == Arora()
    loaded = config.load(file)
    assert config.resolve(config.as_dict(loaded)) == loaded
    words = ["--objective.length_reward", "null", "--objective.length_reward.alpha", "0.2"]
    with pytest.raises(config.ConfigError, match="length_reward is null already; give one"):
        config.load(file, words)
    assert main(["keys", "objective.length_reward"]) == 0
    assert "objective.length_reward.beta" in capsys.readouterr().out


# --- likelihood rewards ---------------------------------------------------------------------------


def scored_by(*rows):
    """A batch of one group of these U, nats; of a path whose U is None the thought was cut."""
    batch = batch_of(*([(10, False)] * len(row) for row in rows))
    u = double([[0.0 if u is None else u for u in row] for row in rows])
    closed = torch.tensor([[u is not None for u in row] for row in rows])
    return replace(batch, prior=replace(batch.prior, u_BP=u, closed_BP=closed))


LOG2 = math.log(2)
LIKELIHOODS = [
    # P = (1, 1/2, 1/4) against the mean of the others: 5/8, -1/8, -1/2
    (VeriFree(), [0, -LOG2, -2 * LOG2], [-5 / 8, 1 / 8, 1 / 2], [-1, -1 / 2, -1 / 4]),
    (
        VeriFree(target="advantage"),
        [0, -LOG2, -2 * LOG2],
        [-5 / 8, 1 / 8, 1 / 2],
        [-5 / 8, 1 / 8, 1 / 2],
    ),
    (VeriFree(target="none"), [0, -LOG2, None], [-3 / 4, 0, 3 / 4], None),
    # A cut thought has P = 0, whatever its U is.
    (VeriFree(), [-LOG2, None, None], [-1 / 2, 1 / 4, 1 / 4], [-1 / 2, 0, 0]),
    (VeriFree(), [None] * 3, [0] * 3, [0] * 3),
    (VeriFree(), [-LOG2] * 3, [0] * 3, [-1 / 2] * 3),
    # Shares 4/7, 2/7, 1/7 of three paths
    (NormalisedVeriFree(), [0, -LOG2, -2 * LOG2], [-12 / 7, -6 / 7, -3 / 7], "same"),
    # Far below what a number can hold
    (NormalisedVeriFree(), [-2000, -2000 - LOG2, None], [-2, -1, 0], "same"),
    (NormalisedVeriFree(), [-LOG2, None, None], [-3, 0, 0], "same"),
    (NormalisedVeriFree(), [-5.0] * 3, [-1] * 3, "same"),
    (NormalisedVeriFree(), [None] * 3, [0] * 3, "same"),
]


@pytest.mark.parametrize(("kind", "u", "thought", "target"), LIKELIHOODS)
def test_likelihood_rewards_by_hand(kind, u, thought, target):
    terms = replace(kind, group_size=3).terms(scored_by([0, -1, -2], u), {})
    weights = {part.part: part.weight_BP[1].tolist() for part in terms.parts}
    assert weights["thought"] == pytest.approx(thought)
    target = thought if target == "same" else target
    assert weights.get("target") == (target and pytest.approx(target))


def test_the_dense_reward_of_a_teacher_by_hand():
    batch = scored_by([0, 0, 0])
    post = stream("posterior", [[(2, False), (2, False), (2, False)]])
    closed = torch.tensor([[True, True, False]])
    batch = replace(batch, posterior=replace(post, closed_BP=closed))
    keys = [path.key for path in batch.posterior.flat]
    logps = {
        # mean and least: (-2, -3), (-1, -1), (-1, -1)
        ANSWER: [[-1, -3], [-1, -1], [-1, -1]],
        # log q - log p: (1, 0), (2, 2), (0, 0)
        TEACHER: [[-1, -1], [-1, -1], [-1, -1]],
        STUDENT: [[-2, -1], [-3, -3], [-1, -1]],
    }
    known = {s: dict(zip(keys, map(double, rows), strict=True)) for s, rows in logps.items()}
    kind = Rlt(group_size=3, answer_min=0.1, kl_coef=2.0, kl_max=0.5, cut=4.0)
    terms = kind.terms(replace(batch, logps=known), {})
    reward = [-2.3 - 2 * 1.0, -1.1 - 2 * 3.0, -1.1 - 4.0]
    assert terms.path_scores["posterior"]["reward"][0].tolist() == pytest.approx(reward)
    mean = sum(reward) / 3
    spread = math.sqrt(sum((r - mean) ** 2 for r in reward) / 3)
    expected = [-(r - mean) / (spread + 1e-6) for r in reward]
    (part,) = terms.parts
    assert (part.stream, part.view) == ("posterior", "teacher")
    assert part.weight_BP[0].tolist() == pytest.approx(expected)
    equal = {s: dict.fromkeys(keys, known[s][keys[1]]) for s in known}
    same = replace(batch, logps=equal, posterior=replace(post, closed_BP=closed | True))
    assert not kind.terms(same, {}).alive.any()


def test_verifree_takes_no_other_reward():
    with pytest.raises(ValueError, match="got reward 'verify', expected 'probability'"):
        VeriFree(reward="verify")


@pytest.mark.parametrize("name", ["laser_d", "laser_de"])
def test_more_right_paths_than_any_level_has_are_not_to_be_expected(name):
    """Of 6 paths an easy question has 4 right ones for sure."""
    words = ["--objective", "grpo", "--objective.group_size", "6"]
    words += ["--objective.length_reward.name", name, "--objective.length_reward.expected"]
    config.load(TINY, [*words, "4"])
    with pytest.raises(config.ConfigError, match="got 5, expected at most 4, two thirds of 6"):
        config.load(TINY, [*words, "5"])

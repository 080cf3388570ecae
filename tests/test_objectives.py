"""Each objective's weights by hand, and its batch bookkeeping. A new objective adds a row here."""

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from batches import prompted, sampled, scored, weights_of, whole

from vpgea_fast.book import METRICS
from vpgea_fast.objectives import METHODS, BestOfRft, Grpo, HintRft, Rft, Sft, Vpgea, guard_only
from vpgea_fast.objectives.guards import EARLY, GUARDS, VIEWS
from vpgea_fast.objectives.likelihood import NormalisedVeriFree
from vpgea_fast.objectives.unread import rules
from vpgea_fast.rows import Scale, build_rows, drawn_rows, truncated_ratios
from vpgea_fast.types import Score, ScoredPaths, TrainRow

ids = torch.tensor


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def group(stream, lengths, closed):
    return tuple(
        sampled(torch.arange(n), stream=stream, index=i, closed=c)
        for i, (n, c) in enumerate(zip(lengths, closed, strict=True))
    )


def batch(u_post=((-1.0, -5.0),), lengths=((50, 200),), closed=((True, True),), correct=None):
    """Priors with U = (-1, -3) and lengths (100, 300): baseline -2, base length 200."""
    count = len(u_post)
    question = prompted(student=[3], teacher=[3, 4], cue=[5], target=[6])
    posterior = tuple(group("posterior", n, c) for n, c in zip(lengths, closed, strict=True))
    prior = (group("prior", (100, 300), (True, True)),) * count
    return whole(
        [question] * count,
        scored(posterior, u_post, correct=correct or [[1.0] * len(u_post[0])] * count),
        scored(prior, [[-1.0, -3.0]] * count, correct=[[1.0, 0.0]] * count),
    )


CASES = [
    # R = (1, 0), eta = (2, 1), S = (2, 0), A = (1, -1)
    (
        Vpgea(beta=0.5),
        batch(),
        {"posterior teacher": [[-1, 1]], "posterior student": [[-0.5, 0]]},
    ),
    (
        Vpgea(beta=3.0, gate="relu"),
        batch(),
        {"posterior teacher": [[-1, 1]], "posterior student": [[-3, 0]]},
    ),
    # the better path was cut: R = 0 for both, nobody has a gradient
    (
        Vpgea(),
        batch(closed=((False, True),)),
        {"posterior teacher": [[0, 0]], "posterior student": [[0, 0]]},
    ),
    # the better path has no verified answer
    (Vpgea(verify="gate"), batch(correct=[[0.0, 1.0]]), {"posterior teacher": [[0, 0]]}),
    # an unscored path never passes, even where the baseline is below u_min
    (Vpgea(u_min=-0.5), batch(u_post=((math.nan, -5.0),)), {"posterior teacher": [[0, 0]]}),
    # R = (1, 0) and alpha: eta = (200 / 100)^.5, group mean length 200
    (Grpo(group_size=2), batch(), {"prior student": [[-1, 1]]}),
    (Grpo(group_size=2, alpha=0.5), batch(), {"prior student": [[-1, 1]]}),
    # likelihood: no prior path is above 1/2
    (Grpo(group_size=2, reward="likelihood"), batch(), {"prior student": [[0, 0]]}),
    # Supervised: of two right paths all, the shortest, and of the teacher's in the student's view
    (Sft(responses=2), batch(), {"prior student": [[-1, -1]]}),
    (Rft(group_size=2), batch(), {"prior student": [[-1, 0]]}),
    (HintRft(group_size=2), batch(), {"posterior student": [[-1, -1]]}),
    (HintRft(group_size=2, choose="shortest"), batch(), {"posterior student": [[-1, 0]]}),
    # equal lengths: the first; a cut thought is not right whatever follows it
    (
        HintRft(group_size=2, choose="shortest"),
        batch(lengths=((50, 50),)),
        {"posterior student": [[-1, 0]]},
    ),
    (
        HintRft(group_size=2),
        batch(closed=((False, True),)),
        {"posterior student": [[0, -1]]},
    ),
    (BestOfRft(group_size=2), batch(), {"prior student": [[-1, 0]]}),
]


@pytest.mark.parametrize(("cfg", "scored", "expected"), CASES)
def test_weights_by_hand(cfg, scored, expected):
    weights = weights_of(cfg.terms(scored, {}))
    for key, rows in expected.items():
        stream, view = key.split()
        assert torch.allclose(weights[stream, view], double(rows), atol=1e-5), key


def test_the_paths_of_a_lost_question_are_not_held_to_the_reference_either():
    two = batch(u_post=((-1.0, -5.0),) * 2, lengths=((50, 200),) * 2, closed=((True,) * 2,) * 2)
    # All right, so no path has a weight: the KL alone holds them.
    all_right = torch.ones_like(two.prior.correct_BP)
    two = replace(two, prior=replace(two.prior, correct_BP=all_right))
    lost = torch.tensor([True, False])
    for kl_coef, rows in ((0.0, [False, False]), (0.1, [True, True])):
        terms = Grpo(group_size=2, kl_coef=kl_coef).terms(two, {})
        assert terms.parts[0].acting.tolist() == [rows, rows]
        assert terms.without(lost).parts[0].acting.tolist() == [[False, False], rows]


def three_priors():
    """Groups of 3: the z-score keeps what two paths lose, so every setting has its own weights.

    Priors with lengths (100, 200, 600), the middle one wrong; base length 300.
    """
    three = batch(u_post=((-1.0, -5.0, -2.5),), lengths=((50, 200, 300),), closed=((True,) * 3,))
    paths = (group("prior", (100, 200, 600), (True,) * 3),)
    return replace(three, prior=scored(paths, [[-0.1, -4.0, -3.0]], correct=[[1.0, 0.0, 1.0]]))


def guarded(own, other, guard="counterfactual"):
    """The batch of one question, with the log-probs that the guard compares: a list per path."""
    view = "counterfactual" if guard == "counterfactual" else "student"
    one = batch(lengths=((3, 200),))
    keys = [path.key for path in one.posterior.flat]
    logps = {
        Score("posterior", name, "thought"): {
            key: double(values) for key, values in zip(keys, rows, strict=True)
        }
        for name, rows in (("teacher", own), (view, other))
    }
    return replace(one, logps=logps)


@pytest.mark.parametrize(
    ("guard", "own", "caught"),
    [
        # the sum of the better path: 2 passes, and any more is caught
        ("counterfactual", [1.5, 0.0, 0.5], 0.0),
        ("counterfactual", [1.5, 0.25, 0.5], 0.5),
        # of the largest token alone
        ("max_kl", [2.0, 2.0, 2.0], 0.0),
        ("max_kl", [-5.0, 2.25, 0.0], 0.5),
    ],
)
def test_a_path_that_leans_on_the_answer_has_no_reward(guard, own, caught):
    cfg = Vpgea(leak_guard=guard)
    scored = guarded([own, [0.0] * 3], [[0.0] * 3] * 2, guard)
    out = cfg.terms(scored, {})
    assert out.metrics["guard_caught"] == caught
    worst = sum(own) if guard == "counterfactual" else max(own)
    assert out.metrics["guard_nats"] == pytest.approx(worst / 2, abs=1e-15)
    expected = [[0.0, 0.0]] if caught else [[-1.0, 1.0]]
    assert weights_of(out)["posterior", "teacher"].tolist() == [
        pytest.approx(expected[0], abs=1e-5)
    ]
    assert {score.view for score in cfg.needs() if score.part == "thought"} == {
        "teacher",
        "counterfactual" if guard == "counterfactual" else "student",
    }


def test_what_another_filter_rejects_is_not_counted_as_caught():
    far = guarded([[9.0] * 3] * 2, [[0.0] * 3] * 2)
    no = torch.tensor([[True, False]])
    far = replace(far, posterior=replace(far.posterior, closed_BP=no))
    assert Vpgea(leak_guard="counterfactual").terms(far, {}).metrics["guard_caught"] == 0.5


def test_without_a_guard_nothing_is_scored_or_said_of_it():
    assert {score.part for score in Vpgea().needs()} == {"target"}
    assert not {"guard_caught", "guard_nats"} & Vpgea().terms(batch(), {}).metrics.keys()
    with pytest.raises(ValueError, match="leak_guard: got 'max_kl' with posterior: false"):
        Vpgea(leak_guard="max_kl", posterior=False)


def test_what_kappa_reads_too_is_no_cost_of_the_guard():
    wrong = Score("posterior", "counterfactual", "thought")
    for more, only in (
        ({"leak_guard": "counterfactual"}, {VIEWS[0], wrong}),
        ({"leak_guard": "counterfactual", "utility": "elbo", "kappa": 0.1}, {wrong}),
        ({"leak_guard": "max_kl", "utility": "elbo", "kappa": 0.1}, set()),
        ({"utility": "elbo", "kappa": 0.1}, set()),
        ({"leak_guard": "early_answer"}, {EARLY}),
        ({"leak_guard": "max_kl", "leak_limit": 4.0}, {*VIEWS}),
    ):
        assert guard_only(Vpgea(**more)) == only
    assert guard_only(Grpo()) == set()


def test_the_elbo_ranks_a_rejected_path_below_every_accepted_one():
    """All closings of three paths, U above and below the baseline of -2: eta is 1."""
    keys = {"utility": "elbo", "alpha": 0.0}
    for closed in itertools.product((False, True), repeat=3):
        for u in itertools.product((-0.5, -1.5, -6.0, -50.0), repeat=3):
            one = batch(u_post=(u,), lengths=((9, 9, 9),), closed=(closed,))
            out = Vpgea(**keys).terms(one, {}).path_scores["posterior"]
            s, a = out["utility"][0].tolist(), out["advantage"][0].tolist()
            kept = [x for x, c in zip(u, closed, strict=True) if c]
            floor = min([-2.0, *kept])
            assert s == [x if c else floor for x, c in zip(u, closed, strict=True)]
            assert any(a) == (len(set(s)) > 1)
            if len(kept) == 1 and kept[0] > -2:  # one right: it alone is gated
                assert sorted(a) == pytest.approx([-(0.5**0.5)] * 2 + [2**0.5], abs=1e-5)


def test_the_log_ratio_of_the_elbo_and_joint_and_answer_terms():
    one = guarded([[1.0, 0.0, 1.0], [0.0] * 3], [[0.0] * 3] * 2, "max_kl")
    out = Vpgea(utility="elbo", kappa=0.5, alpha=0.0).terms(one, {})
    assert out.path_scores["posterior"]["utility"].tolist() == [[-2.0, -5.0]]
    assert out.metrics["path_kl"] == 1.0
    out = Vpgea(prior_pg=0.5, train_answer="sft", answer_weight=3.0).terms(batch(), {})
    found = {term.name: term for term in out.parts}
    # U = (-1, -3) against their own mean: R = (1, 0)
    torch.testing.assert_close(
        found["prior_pg"].weight_BP, double([[-0.5, 0.5]]), atol=1e-5, rtol=0
    )
    assert found["answer"].weight_BP.tolist() == [[-3.0, 0.0]]
    assert found["answer"].part == "target"


# Of paths of 50 and 200 tokens, what catches the first, the only one with a reward, and what lets
# it pass (None: the key is only a switch). A guard that compares log-probs has tests of its own.
TEXTS = ("As GIVEN, 7.", "add")
COUNTED = {
    "lexical_caught": ({"lexical": True}, {"lexical": True, "lexical_regex": "hint"}),
    "short_caught": ({"len_min_frac": 0.26}, {"len_min_frac": 0.25}),
}


@pytest.mark.parametrize("name", sorted({*COUNTED, *GUARDS} - {"guard_caught"}))
def test_a_guard_is_counted_and_in_the_book(name):
    one = batch()
    one = replace(one, posterior=replace(one.posterior, texts=(TEXTS,)))
    catching, passing = COUNTED[name]
    for keys, share in ((catching, 0.5), (passing, 0.0)):
        if keys is None:
            continue
        out = Vpgea(**keys).terms(one, {})
        assert out.metrics[name] == share
        assert weights_of(out)["posterior", "teacher"].any() == (not share)
    assert name not in Vpgea().terms(one, {}).metrics
    assert METRICS[name].unit == "share"


def test_the_early_answer():
    one = batch()
    early = Score("posterior", "early", "target")
    keys = [path.key for path in one.posterior.flat]
    for u, share in ((-4.0, 0.0), (-4.1, 0.5), (math.nan, 0.5)):
        logps = {early: {keys[0]: double([u]), keys[1]: double([])}}
        out = Vpgea(leak_guard="early_answer").terms(replace(one, logps=logps), {})
        assert out.metrics["guard_caught"] == share
    # The baseline is -2; where every U is lifted to -3.5, that of the cut thought is too.
    logps = {early: {keys[0]: double([-9.0]), keys[1]: double([])}}
    lifted = Vpgea(leak_guard="early_answer", clamp_u=True, u_min=-3.5)
    out = lifted.terms(replace(one, logps=logps), {})
    assert (out.metrics["guard_caught"], out.metrics["guard_nats"]) == (0.0, 0.75)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"utility": "elbo", "preset": "robust", "reward": "likelihood_mix"},
            "reward: got 'likelihood_mix', which changes nothing with utility 'elbo'",
        ),
        ({"utility": "elbo", "cross_view": False}, "cross_view: got False with utility 'elbo'"),
        ({"kappa": 1.0}, "kappa: got 1.0 with utility 'product'"),
        ({"prior_pg": 1.0, "prior_samples": 1}, "prior_pg: got 1.0 with prior_samples 1"),
        ({"lexical_regex": "("}, "lexical_regex: got '\\('"),
        ({"clamp_u": True, "u_min": -0.3}, "u_min: got -0.3 with clamp_u, expected at most -2"),
    ],
)
def test_options_that_nothing_would_read_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        Vpgea(**keys)


# Another value of each key that a record declares to be unread, and what must hold beside it.
UNREAD = {
    "alpha_steps": 7,
    "answer_weight": 3.0,
    "baseline": "lme",
    "clamp_u": True,
    "clip_low": 0.7,
    "ddof": 1,
    "distill_denominator": "gated",
    "eps": 0.5,
    "eta_clip": (0.9, 1.1),
    "gate": "none",
    "kl": "low_variance",
    "leak_limit": 0.5,
    "lexical_regex": "0",
    "norm_constant": 3.0,
    "r_margin": 0.5,
    "reward": "likelihood_mix",
    "std_gate": 9.0,
}
RULES = [
    (kind, rule, combination)
    for kind in (Vpgea, Grpo)
    for rule in rules(kind)
    for combination in itertools.product(*rule.where.values())
    if not any(map(callable, rule.where.values()))
]


def losses(objective, batch):
    """All that a step makes of an objective, at two steps of a schedule."""
    found = []
    for now, several in itertools.product((objective.at(0), objective.at(1)), (False, True)):
        terms = now.terms(batch, {})
        effective = now.denominator == "effective"
        scale = Scale(norm=now.norm, constant=now.norm_constant or 9.0, effective=effective)
        for row in build_rows(batch, terms, scale, several=several):
            logps = torch.linspace(-2, -1, row.token_ids.numel()).double()
            row = replace(row, old=logps.flip(0), reference=logps.roll(1))
            found.append((row.term, row.path, row.loss(logps), row.at(logps).coef))
    return found


@pytest.mark.parametrize(("kind", "rule", "values"), RULES)
def test_a_key_that_is_said_to_change_nothing_changes_nothing(kind, rule, values, monkeypatch):
    one = batch(u_post=((-0.1, -0.6, -5.0),), lengths=((50, 200, 90),), closed=((True,) * 3,))
    one = replace(one, prior=replace(one.prior, u_BP=double([[-0.4, -30.0]])))
    logps = {
        score: {
            path.key: torch.full((path.length,), -1.0 - k / 1000).double()
            for _, path in one.pairs("posterior")
        }
        for k, score in enumerate([*VIEWS, Score("posterior", "counterfactual", "thought"), EARLY])
    }
    one = replace(one, logps=logps)
    beside = dict(zip(rule.where, values, strict=True))
    # What only a reference or an answer could show must be on.
    given = {"reward": "likelihood", "kl_coef": 0.5} if kind is Grpo else {"train_answer": "sft"}
    plain = kind(**{**given, **beside})
    with pytest.raises(ValueError, match=f"{rule.key}: got .* changes nothing with"):
        kind(**{**given, **beside, rule.key: UNREAD[rule.key]})
    for room in ("base", "judged"):  # a length reward is a record of its own
        monkeypatch.setattr(f"vpgea_fast.objectives.{room}.refuse_unread", lambda _: None)
    other = kind(**{**given, **beside, rule.key: UNREAD[rule.key]})
    assert (other.needs(), other.draws()) == (plain.needs(), plain.draws())
    pairs = list(zip(losses(plain, one), losses(other, one), strict=True))
    assert pairs
    for a, b in pairs:
        assert a[:2] == b[:2]
        assert torch.equal(a[2], b[2])
        assert torch.equal(a[3], b[3])


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        *((kind, "denominator", "effective") for kind in (Sft, Rft, BestOfRft, HintRft)),
        (NormalisedVeriFree, "clip_low", 0.7),
    ],
)
def test_what_imitates_or_shares_a_weight_of_1_refuses_keys_that_change_nothing(
    kind, key, value, monkeypatch
):
    """Two questions, the second without a right path."""
    one = batch(
        u_post=((-1.0, -5.0),) * 2,
        lengths=((50, 200),) * 2,
        closed=((True, True),) * 2,
        correct=[[1.0, 0.0], [0.0, 0.0]],
    )
    one = replace(one, prior=replace(one.prior, correct_BP=double([[1.0, 0.0], [0.0, 0.0]])))
    size = {} if kind is Sft else {"group_size": 2}
    with pytest.raises(ValueError, match=f"{key}: got .* changes nothing with"):
        kind(**size, **{key: value})
    if kind not in (Sft, NormalisedVeriFree):  # there it is read
        kind(**size, norm="seq_mean", **{key: value})
    monkeypatch.setattr("vpgea_fast.objectives.base.refuse_unread", lambda _: None)
    plain, other = losses(kind(**size), one), losses(kind(**size, **{key: value}), one)
    assert plain
    for a, b in zip(plain, other, strict=True):
        assert a[:2] == b[:2]
        assert torch.equal(a[2], b[2])
        assert torch.equal(a[3], b[3])


def zscore(rewards):
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / std for r in rewards]


@pytest.mark.parametrize(
    ("cfg", "rewards", "key"),
    [
        (Grpo(group_size=3), [1, 0, 1], ("prior", "student")),
        (
            Grpo(group_size=3, alpha=0.5),
            [3**0.5, 0, 0.5**0.5],
            ("prior", "student"),
        ),
        (Grpo(group_size=3, reward="likelihood"), [1, 0, 0], ("prior", "student")),
        # Ubar = -7.1 / 3: R = (1.37, 0, 0)
        (Vpgea(), [1.0, 0, 0], ("posterior", "teacher")),
        # with a margin of 1, R = (2.37, 0, 0.87), eta = (6^.5, ., 1)
        (
            Vpgea(r_margin=1.0),
            [6**0.5 * (7.1 / 3), 0, 7.1 / 3 - 1.5],
            ("posterior", "teacher"),
        ),
    ],
)
def test_groups_of_three_tell_the_objectives_apart(cfg, rewards, key):
    weights = weights_of(cfg.terms(three_priors(), {}))
    assert weights[key][0].tolist() == pytest.approx([-a for a in zscore(rewards)], abs=1e-4)
    assert set(weights) == (
        {("prior", "student")}
        if isinstance(cfg, Grpo)
        else {("posterior", "teacher"), ("posterior", "student")}
    )


@pytest.mark.parametrize("kind", METHODS.values())
def test_every_objective_says_something_of_a_batch(kind):
    one = batch()
    # Of other scores than U: log-probs of three tokens each.
    known = {
        score: {path.key: -torch.ones(3).double() for path in one.stream(score.stream).flat}
        for score in kind().needs()
    }
    terms = kind().terms(replace(one, logps=known), {})
    assert terms.parts
    assert terms.alive.shape == (1,)


def test_gated_lengths_are_compared_within_their_own_group():
    """Two questions, one with long thoughts that gates two of three paths. Pooled, the gated ones
    look longer than the rest; within each group they are shorter."""
    two = batch(
        u_post=((-1.0, -1.2, -5.0), (-1.0, -5.0, -5.0)),
        lengths=((300, 330, 400), (20, 40, 60)),
        closed=((True,) * 3,) * 2,
    )
    cfg = Vpgea(alpha=0.0, r_margin=0.0)
    out = cfg.terms(two, {})
    assert (weights_of(out)["posterior", "student"] < 0).tolist() == [
        [True, True, False],
        [True, False, False],
    ]
    assert out.metrics["len_gated"] == pytest.approx((300 + 330 + 20) / 3)
    assert out.metrics["len_gated"] > two.posterior.length_BP.mean().item()
    expected = (300 * 3 / 1030 + 330 * 3 / 1030 + 20 / 40) / 3
    assert out.metrics["len_gated_ratio"] == pytest.approx(expected, abs=1e-14)
    none = Vpgea(std_gate=1e9).terms(two, {}).metrics
    assert (none["len_gated"], none["len_gated_ratio"]) == (None, None)


def test_scores_and_counts():
    out = Vpgea().terms(batch(), {})
    assert out.path_scores["posterior"]["utility"][0].tolist() == pytest.approx([2.0, 0.0])
    assert out.metrics["accept_rate"] == out.metrics["gate_rate"] == 0.5
    assert out.metrics["len_gated"] == 50.0
    assert out.metrics["net_token_push"] == pytest.approx(50 - 200, rel=1e-5)
    assert (out.metrics["groups_all_rejected"], out.metrics["groups_zero_var"]) == (0, 0)
    assert out.alive.tolist() == [True]


def test_select_and_join_keep_every_column_together():
    two = batch(
        u_post=((-1.0, -5.0), (-9.0, -9.0)),
        lengths=((50, 200), (60, 70)),
        closed=((True, True), (True, False)),
        correct=[[1.0, 0.0], [0.0, 0.0]],
    )
    stated_BP = torch.tensor([[9, 0], [0, 7]])
    behind_BP = torch.tensor([[12, 0], [0, 8]])
    columns = {"stated_BP": stated_BP, "behind_BP": behind_BP}
    two = replace(two, posterior=replace(two.posterior, **columns))
    coefs = Vpgea().terms(two, {})
    assert coefs.alive.tolist() == [True, False]
    kept = two.select([0])
    assert kept.posterior.u_BP.tolist() == [[-1.0, -5.0]]
    assert [p.length for p in kept.posterior.paths[0]] == [50, 200]
    again = two.select([1]).join(kept)
    assert again.posterior.length_BP.tolist() == [[60, 70], [50, 200]]
    assert [p.length for p in again.posterior.paths[1]] == [50, 200]
    for name in {field.name for field in fields(ScoredPaths)} - {"paths", "texts"}:
        values = getattr(two.posterior, name)
        assert not torch.equal(values[0], values[1]), name
        assert torch.equal(getattr(again.posterior, name), values.flip(0)), name
    assert len(again.questions) == 2
    swapped = weights_of(Vpgea().terms(again, {}))["posterior", "teacher"]
    assert torch.equal(swapped, weights_of(coefs)["posterior", "teacher"].flip(0))


def test_importance_weights_fall_on_both_views_of_a_path_and_stop_at_the_cap():
    """The sampler's log-probs are 0, the trainer's log 1/2 for one path and log 3 for the other."""
    drawn = batch()
    coefs = Vpgea(beta=0.5).terms(drawn, {})
    rows = drawn_rows(drawn, coefs)
    assert {key: row.view for key, row in rows.items()} == {
        ("q", "posterior", 0): "teacher",
        ("q", "posterior", 1): "teacher",
    }
    trainer = [torch.full((n,), math.log(p)) for n, p in ((50, 0.5), (200, 3.0))]
    ratios, metrics = truncated_ratios(rows, trainer, cap=2.0)
    assert metrics == {"importance_capped": 200 / 250}
    plain = build_rows(drawn, coefs, Scale(norm="seq_sum"))
    corrected = build_rows(drawn, coefs, Scale(norm="seq_sum"), ratios=ratios)
    assert [(row.view, row.token_ids.numel()) for row in corrected] == [
        ("teacher", 50),
        ("teacher", 200),
        ("student", 50),
    ]
    for before, after in zip(plain, corrected, strict=True):
        factor = 0.5 if before.token_ids.numel() == 50 else 2.0
        torch.testing.assert_close(after.coef, before.coef * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [-1.3, 0.0, 0.8])
@pytest.mark.parametrize("keys", [{"kl": "k3"}, {"kl": "low_variance"}, {"ratio": "sequence"}])
def test_the_live_loss_is_its_formula_and_the_coefficients_its_derivative(keys, weight):
    """The clip on both sides, and the penalty, also where its bounds hold it. GSPO's loss has the
    ratio of the path on every token: each token's own gradient adds up to it."""
    objective = Grpo(group_size=2, kl_coef=0.3, clip_low=0.1, clip_high=0.15, **keys)
    live = objective.terms(batch(), {}).parts[0].live
    made = torch.Generator().manual_seed(2)
    now = torch.randn(40, generator=made, dtype=torch.float64).requires_grad_()
    old = now.detach() + 0.2 * torch.randn(40, generator=made, dtype=torch.float64)
    # d of 3 and more holds low variance to 10, of 20 and more its exponent.
    gap = torch.cat([torch.linspace(-4, 4, 36), torch.tensor([-25.0, -19.0, 19.0, 25.0])]).double()
    reference = now.detach() + gap
    ratio = (now - old).exp()
    if objective.ratio == "sequence":
        ratio = (now - old).mean().exp().expand(40)
    gain = torch.minimum(ratio * -weight, ratio.clamp(0.9, 1.15) * -weight)
    delta = reference - now
    if objective.kl == "low_variance":
        delta = delta.clamp(-20, 20)
        estimate = (delta.exp() - delta - 1).clamp(-10, 10)
        assert (estimate == 10).any()
    else:
        estimate = delta.exp() - delta - 1
    losses = -gain + 0.3 * estimate
    (expected,) = torch.autograd.grad(losses.sum(), now)
    ids = {"context_ids": torch.tensor([1]), "token_ids": torch.arange(40)}
    kind = {"stream": "prior", "view": "student", "live": live, "weight": weight}
    row = TrainRow(**ids, **kind, coef=torch.zeros(40), old=old, reference=reference, scale=0.5)
    torch.testing.assert_close(2 * row.at(now).coef, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(2 * row.loss(now), losses.detach(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="KL: got no log-probs of a reference policy"):
        live(weight, now.detach(), old, None)

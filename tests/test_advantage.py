"""Phase 2 against numbers worked out by hand, a scalar reference, and its laws."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Group
from torch import Tensor

from vpgea_fast.advantage import (
    GroupOptions,
    Utility,
    cross_view_utility,
    elbo_terms,
    group_zscore,
    length_factor,
    log_utility,
    posterior_monitors,
)

NAN, INF = math.nan, math.inf
PAPER: dict[str, Any] = {}  # the defaults are the paper's preset
ROBUST: dict[str, Any] = {
    "baseline": "lme",
    "reward": "likelihood_mix",
    "clamp_u": True,
    "eta_clip": (0.25, 4.0),
    "eps": 1e-3,
    "std_gate": 0.05,
}
LAWS = settings(max_examples=60, deadline=None, derandomize=True)


def score(group: Group, **options: Any) -> Utility:
    return cross_view_utility(**group.tensors(), **options)


def row(values_BG: Tensor) -> list[float]:
    return values_BG[0].tolist()


# --- by hand ----------------------------------------------------------------------------------

BY_HAND = Group(
    u_post=(-1, -1, -1.5, -4),
    u_prior=(-1, -3),
    len_post=(50, 200, 800, 3200),
    len_prior=(100, 300),
)


def test_paper_preset_by_hand() -> None:
    out = score(BY_HAND, **PAPER)
    assert row(out.reward) == [1, 1, 0.5, 0]
    assert row(out.eta) == pytest.approx([2, 1, 0.5, 0.25], rel=1e-15)
    assert row(out.utility) == pytest.approx([2, 1, 0.25, 0], rel=1e-15)
    assert (out.u_base.item(), out.len_base.item(), out.n_replaced) == (-2, 200, 0)
    std = math.sqrt(0.60546875)
    expected = [s / (std + 1e-6) for s in (1.1875, 0.1875, -0.5625, -0.8125)]
    assert row(out.advantage) == pytest.approx(expected, rel=1e-14)
    assert row(out.gate) == [True, True, False, False]


def test_robust_preset_by_hand() -> None:
    group = dataclasses.replace(
        BY_HAND, u_post=(-0.1, -0.5, -1, -300), len_post=(1, 200, 800, 5000)
    )
    out = score(group, **ROBUST)
    base = -1 + math.log((1 + math.exp(-2)) / 2)
    assert out.u_base.item() == pytest.approx(base, abs=1e-15)
    assert row(out.reward) == pytest.approx([0.9 - base, 0.5 - base, 0, 0], abs=1e-15)
    assert row(out.eta) == pytest.approx([4, 1, 0.5, 0.25], rel=1e-15)  # 14.1 and 0.2 are clipped
    first, second = 4 * (0.9 - base), 0.5 - base
    mean = (first + second) / 4
    std = math.sqrt(((first - mean) ** 2 + (second - mean) ** 2 + 2 * mean**2) / 4)
    expected = [(s - mean) / (std + 1e-3) for s in (first, second, 0, 0)]
    assert row(out.advantage) == pytest.approx(expected, rel=1e-14)
    assert row(out.gate) == [True, False, False, False]


def test_likelihood_gate_and_margin_by_hand() -> None:
    group = dataclasses.replace(BY_HAND, u_post=(math.log(0.5), -0.69, -1, -2.5))
    gate = score(group, reward="likelihood_gate")
    assert row(gate.reward) == [0, 1, 0, 0]  # the threshold itself does not pass
    margin = score(BY_HAND, r_margin=0.75)
    assert row(margin.reward) == [1.75, 1.75, 1.25, 0]


def test_std_denominator_and_population_bound() -> None:
    utility = torch.tensor([[3.0, 0, 0, 0, 0, 0, 0, 0]])
    population = group_zscore(utility, eps=0)
    sample = group_zscore(utility, eps=0, ddof=1)
    assert population[0, 0].item() == pytest.approx(math.sqrt(7), rel=1e-15)
    assert (population / sample)[0].tolist() == pytest.approx([math.sqrt(8 / 7)] * 8, rel=1e-15)


def test_outlier_prior_turns_the_mean_into_a_length_score() -> None:
    """One prior at -60 among four: the shortest, worst path wins; log-mean-exp does not notice."""
    group = Group(
        u_post=(-0.2, -0.5, -1.0, -1.8),
        u_prior=(-0.6, -1.0, -1.2, -1.2),
        len_post=(350, 300, 200, 160),
        len_prior=(200, 200, 200, 200),
    )
    trapped = dataclasses.replace(group, u_prior=(-60, *group.u_prior[1:]))
    assert score(group).u_base.item() == pytest.approx(-1, abs=1e-15)
    assert row(score(group).gate) == [True, True, False, False]

    out = score(trapped)
    assert out.u_base.item() == pytest.approx(-15.85, abs=1e-14)
    assert row(out.reward) == pytest.approx([15.65, 15.35, 14.85, 14.05], abs=1e-13)
    assert out.advantage.argmax().item() == 3
    assert out.advantage.max().item() == pytest.approx(1.24, abs=5e-3)

    clamped, robust = score(trapped, clamp_u=True), score(trapped, baseline="lme")
    assert clamped.u_base.item() == pytest.approx((-20 - 3.4) / 4, abs=1e-14)
    shift = robust.u_base.item() - score(group, baseline="lme").u_base.item()
    assert -0.5 < shift < 0
    assert row(robust.gate) == [True, True, False, False]
    assert robust.reward[0, 3] == 0


# --- degenerate groups ------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [PAPER, ROBUST], ids=["paper", "robust"])
@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_all_rejected_is_exactly_silent(preset: dict[str, Any], size: int) -> None:
    below = score(Group([-9.0] * size, (-1, -2), range(1, size + 1), (5, 9)), **preset)
    refused = Group([-0.1] * size, (-1, -2), range(1, size + 1), (5, 9), accept=[False] * size)
    for out in (below, score(refused, **preset)):
        for silent in (out.reward, out.utility, out.advantage):
            assert torch.equal(silent, torch.zeros(1, size).double())
        assert not out.gate.any()


@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_one_passing_path(size: int) -> None:
    out = score(Group([-0.1] + [-9.0] * (size - 1), (-1, -2), [7] * size, (5, 9)), eps=0)
    root = math.sqrt(size - 1)
    assert row(out.advantage) == pytest.approx([root] + [-1 / root] * (size - 1), rel=1e-13)
    assert row(out.gate) == [True] + [False] * (size - 1)


def test_rejected_path_stays_in_its_group() -> None:
    """The best path, refused, has R = 0 and a negative advantage; the others are compared to it."""
    out = score(dataclasses.replace(BY_HAND, accept=(False, True, True, True)))
    assert row(out.reward) == [0, 1, 0.5, 0]
    assert out.advantage[0, 0] == out.advantage[0, 3] < 0
    assert row(out.gate) == [False, True, False, False]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_u_becomes_u_min_and_is_counted(bad: float) -> None:
    post, prior = (*BY_HAND.u_post[:3], bad), (*BY_HAND.u_prior, bad)
    holes = dataclasses.replace(BY_HAND, u_post=post, u_prior=prior, len_prior=(100, 300, 200))
    filled = dataclasses.replace(
        holes, u_post=(*BY_HAND.u_post[:3], -20), u_prior=(*BY_HAND.u_prior, -20)
    )
    for preset in (PAPER, ROBUST):
        out, expected = score(holes, **preset), score(filled, **preset)
        assert (out.n_replaced, expected.n_replaced) == (2, 0)
        assert torch.equal(out.advantage, expected.advantage)
        assert torch.equal(out.u_base, expected.u_base)


def test_clamp_u_lifts_finite_scores_and_its_absence_keeps_them() -> None:
    group = dataclasses.replace(BY_HAND, u_prior=(-1, -61))
    assert score(group).u_base.item() == -31
    assert score(group, clamp_u=True).u_base.item() == -10.5
    assert score(group, clamp_u=True, u_min=-31).u_base.item() == -16


def test_length_zero_counts_as_one_token() -> None:
    zero = score(dataclasses.replace(BY_HAND, len_post=(0, 1, 1, 1), len_prior=(0, 1)))
    assert row(zero.eta) == [1, 1, 1, 1]
    assert zero.len_base.item() == 1


def test_std_gate_silences_a_group_below_it_only() -> None:
    utility = torch.tensor([[0.0, 0.2], [0.0, 0.22]])  # std 0.1 and 0.11
    assert group_zscore(utility, std_gate=0.105).ne(0).tolist() == [[False] * 2, [True] * 2]


def test_no_prompts_is_an_empty_result() -> None:
    empty = torch.zeros(0, 4)
    out = cross_view_utility(empty, empty, empty, empty)
    assert out.advantage.shape == (0, 4)
    assert posterior_monitors(empty, empty, empty, empty) == {}


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("size", range(2, 33))
def test_constant_groups_with_float32_noise_are_exactly_zero(size: int, ddof: int) -> None:
    """A few thousand constants of every magnitude, then each moved by at most one float32 ulp."""
    generator = torch.Generator().manual_seed(size)
    exponent_B1 = torch.empty(4000, 1).uniform_(-12, 12, generator=generator)
    constant_BG = (10**exponent_B1 * torch.randn(4000, 1, generator=generator)).expand(-1, size)
    direction_BG = torch.randint(-1, 2, constant_BG.shape, generator=generator)
    noisy_BG = torch.nextafter(constant_BG, constant_BG + direction_BG * constant_BG.abs())
    assert (noisy_BG.amax(1) > noisy_BG.amin(1)).float().mean() > 0.5
    for values_BG in (constant_BG, noisy_BG, constant_BG.double() + 0.1, noisy_BG.double()):
        for eps in (0.0, 1e-6):
            assert not group_zscore(values_BG, eps=eps, ddof=ddof).any()


def test_groups_just_above_the_noise_are_awake() -> None:
    constant_B1 = torch.logspace(-1, 6, 50, dtype=torch.float64)[:, None]
    spread_BG = constant_B1 * (1 + torch.tensor([0, 0, 0, 2e-6]))
    assert group_zscore(spread_BG, eps=0)[:, 3].tolist() == pytest.approx([math.sqrt(3)] * 50)
    floor_BG = torch.tensor([[0.0, 0.9e-7], [0.0, 1.1e-7]])  # nats, however small the scores are
    assert group_zscore(floor_BG, eps=0).tolist() == [[0, 0], [-1, 1]]


def test_identical_paths_scored_in_float32_open_no_gate() -> None:
    """G copies of one path whose U differ in the last bit, as two batch slots may return it."""
    u = torch.full((1, 8), -0.7)
    u[0, ::2] = torch.nextafter(u[0, ::2], torch.zeros(4))
    lengths = torch.full((1, 8), 31)
    out = cross_view_utility(u, torch.tensor([[-1.5, -2.0]]), lengths, lengths[:, :2])
    assert (out.reward > 0).all()
    assert not out.advantage.any()


# --- every option against the scalar reference ------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", ["paper", "likelihood_gate", "likelihood_mix"])
@pytest.mark.parametrize("baseline", ["mean", "lme"])
def test_every_option_matches_the_scalar_reference(
    baseline: str, reward: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)

    def uniform(n: int, low: float, high: float) -> list[float]:
        return (low + (high - low) * torch.rand(n, generator=generator)).tolist()

    choose = random.Random(1).choice
    for case in range(80):
        group_size, n_prior = 2 + case % 7, 1 + case % 5
        u_post = uniform(group_size, -3, 0)
        u_post[0] = choose((NAN, -40.0, -INF, -0.25))
        group = Group(
            u_post=u_post,
            u_prior=uniform(n_prior, choose((-30, -3)), 0),
            len_post=[round(n) for n in uniform(group_size, 0, 40)],
            len_prior=[round(n) for n in uniform(n_prior, 0, 40)],
            accept=choose((None, [n > 0.2 for n in uniform(group_size, 0, 1)])),
        )
        options: dict[str, Any] = {
            "alpha": choose((0, 0.25, 0.5, 1, 2)),
            "baseline": baseline,
            "reward": reward,
            "r_margin": choose((0, 0.3, -0.2)) if reward == "paper" else 0,
            "u_min": choose((-20, -5)),
            "clamp_u": choose((False, True)),
            "eta_clip": choose((None, (0.25, 4), (0.5, 1))),
            "eps": choose((0, 1e-6, 1e-3)),
            "ddof": choose((0, 1)),
            "std_gate": choose((0, 0.05, 0.4)),
        }
        out = cross_view_utility(**group.tensors(dtype), **options)
        for name, expected in oracle.reference_phase2(group, **options).items():
            actual = getattr(out, name)
            assert actual.dtype == torch.float64
            assert row(actual) == pytest.approx(expected, rel=1e-12, abs=1e-12), (case, name)
        assert torch.equal(out.gate, out.advantage > 0)
        assert (out.reward[out.gate] > 0).all()


def test_options_come_as_a_record_as_keywords_or_as_both() -> None:
    record = GroupOptions(**ROBUST)
    for other in (
        score(BY_HAND, options=record),
        score(BY_HAND, options=dataclasses.replace(record, eps=0.5), eps=ROBUST["eps"]),
    ):
        assert torch.equal(other.advantage, score(BY_HAND, **ROBUST).advantage)
    assert not torch.equal(score(BY_HAND, **ROBUST).advantage, score(BY_HAND).advantage)
    with pytest.raises(TypeError, match="unexpected keyword argument 'margin'"):
        score(BY_HAND, margin=0.1)


def test_result_is_a_constant_for_autograd() -> None:
    arguments = {k: v.requires_grad_() for k, v in BY_HAND.tensors().items()}
    out = cross_view_utility(**arguments)
    assert not any(t.requires_grad for t in (out.reward, out.eta, out.utility, out.advantage))


# --- laws -------------------------------------------------------------------------------------

# Multiples of 1/8: sums, shifts and means over 4 or 8 of them are exact in float64.
EIGHTHS = st.integers(-64, 0).map(lambda n: n / 8)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    size = draw(st.sampled_from([2, 3, 4, 8]))
    lengths = st.integers(1, 400)
    return Group(
        u_post=draw(st.lists(EIGHTHS, min_size=size, max_size=size)),
        u_prior=draw(st.lists(EIGHTHS, min_size=4, max_size=4)),
        len_post=draw(st.lists(lengths, min_size=size, max_size=size)),
        len_prior=draw(st.lists(lengths, min_size=4, max_size=4)),
        accept=draw(st.lists(st.booleans(), min_size=size, max_size=size)),
    )


@LAWS
@given(groups(), st.integers(-64, 64), st.sampled_from(["mean", "lme"]))
def test_shifting_every_u_changes_nothing(group: Group, eighths: int, baseline: str) -> None:
    moved = dataclasses.replace(
        group,
        u_post=[u + eighths / 8 for u in group.u_post],
        u_prior=[u + eighths / 8 for u in group.u_prior],
    )
    before, after = (score(g, baseline=baseline).advantage for g in (group, moved))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-7)  # eps = 1e-6 meets std ~ 1e-2


@LAWS
@given(groups(), st.floats(0.01, 100))
def test_scaling_every_u_changes_nothing(group: Group, scale: float) -> None:
    scaled = dataclasses.replace(
        group,
        u_post=[scale * u for u in group.u_post],
        u_prior=[scale * u for u in group.u_prior],
    )
    before, after = score(group, eps=0), score(scaled, eps=0)
    std = before.utility.std(unbiased=False).item()
    assume(std == 0 or min(1, scale) * std > 1e-5)  # in between, noise: the scale decides
    torch.testing.assert_close(before.advantage, after.advantage, rtol=0, atol=1e-7)


@LAWS
@given(groups(), st.randoms(use_true_random=False), st.sampled_from([PAPER, ROBUST]))
def test_permuting_the_paths_permutes_the_result(
    group: Group, shuffler: random.Random, preset: dict[str, Any]
) -> None:
    post, prior = list(range(len(group.u_post))), list(range(4))
    shuffler.shuffle(post)
    shuffler.shuffle(prior)
    assert group.accept is not None
    shuffled = Group(
        u_post=[group.u_post[i] for i in post],
        u_prior=[group.u_prior[j] for j in prior],
        len_post=[group.len_post[i] for i in post],
        len_prior=[group.len_prior[j] for j in prior],
        accept=[group.accept[i] for i in post],
    )
    before, after = score(group, **preset).advantage, score(shuffled, **preset).advantage
    torch.testing.assert_close(before[:, post], after, rtol=0, atol=1e-9)


@LAWS
@given(groups(), st.sampled_from([PAPER, ROBUST]), st.integers(0, 1))
def test_advantages_sum_to_zero_and_are_bounded(
    group: Group, preset: dict[str, Any], ddof: int
) -> None:
    advantage = score(group, **preset, ddof=ddof).advantage
    assert abs(advantage.sum().item()) < 1e-9
    assert advantage.abs().max().item() <= math.sqrt(len(group.u_post) - 1) + 1e-9


# --- monitors ---------------------------------------------------------------------------------


def test_monitors_by_hand() -> None:
    """alpha = 1: eta = (2, 2/3) on priors of length (10, 30), len_base 20."""
    u_prior, u_post = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[0.9, 0.5, 0.1]]).log()
    out = posterior_monitors(
        u_post, u_prior, torch.tensor([[40, 20, 10]]), torch.tensor([[10, 30]]), alpha=1.0
    )
    s_prior = (0.6 * 2, 0.3 * 2 / 3)
    assert out["adv_post"] == pytest.approx((0.45 + 0.5 + 0.2) / 3 - 0.7, abs=1e-7)
    assert out["e_qstar_s"] == pytest.approx((0.6 * s_prior[0] + 0.3 * s_prior[1]) / 0.9, abs=1e-7)
    covariance = 2 * (0.6 - 0.45) * (s_prior[0] - 0.7)  # two equal deviations, over N - 1 = 1
    assert out["cov_ls"] == pytest.approx(covariance, abs=1e-7)
    assert out["prop1_gap"] == pytest.approx(covariance / 0.45, abs=1e-7)
    assert out["share_cov_negative"] == 0


def test_covariance_monitor_is_the_unbiased_covariance() -> None:
    generator = torch.Generator().manual_seed(5)
    u = -3 * torch.rand(40, 6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 500, (40, 6), generator=generator)
    out = posterior_monitors(u, u, lengths, lengths, alpha=0.5)
    s = u.exp() * length_factor(lengths, lengths.double().mean(1))
    covariance = torch.stack(
        [torch.stack([a, b]).cov()[0, 1] for a, b in zip(u.exp(), s, strict=True)]
    )
    assert out["cov_ls"] == pytest.approx(covariance.mean().item(), abs=1e-14)
    assert out["share_cov_negative"] == (covariance < 0).double().mean().item()
    assert 0 < out["share_cov_negative"] < 1
    assert out["adv_post"] == 0


def test_monitors_leave_out_what_is_undefined() -> None:
    one = torch.tensor([[-1.0]])
    out = posterior_monitors(torch.tensor([[-0.5, NAN]]), one, torch.tensor([[4, 4]]), one + 5)
    assert sorted(out) == ["adv_post", "e_qstar_s"]
    assert out["adv_post"] == pytest.approx((math.exp(-0.5) + math.exp(-20)) / 2 - math.exp(-1))


def test_monitors_survive_likelihoods_below_float64() -> None:
    """exp(-2000) is 0: the covariance is 0, its ratio to the mean still defined and finite."""
    u, lengths = torch.tensor([[-2000.0, -2001.0, NAN]]), torch.tensor([[10, 20, 30]])
    out = posterior_monitors(u, u, lengths, lengths, u_min=-3000.0)
    assert all(math.isfinite(v) for v in out.values())
    assert (out["cov_ls"], out["share_cov_negative"]) == (0, 0)


def test_equal_likelihoods_have_no_negative_covariance() -> None:
    """Where three of seven paths, not the shortest, are likelier by one float32 ulp."""
    u, lengths = torch.full((1, 7), -1.37), torch.arange(1, 8)[None]
    u[:, 1::2] = torch.nextafter(u[:, 1::2], torch.zeros(1, 3))
    out = posterior_monitors(u, u, lengths, lengths)
    assert -1e-8 < out["cov_ls"] < 0
    assert out["share_cov_negative"] == 0


def test_elbo_terms_by_hand() -> None:
    u, lengths, base = (
        torch.tensor([[-1.0, -30.0]]),
        torch.tensor([[25, 400]]),
        torch.tensor([100.0]),
    )
    values = log_utility(u, lengths, base)
    log_2 = math.log(2)  # eta = 2, 1/2
    assert values[0].tolist() == pytest.approx([-1 + log_2, -20 - log_2], abs=1e-14)
    terms = elbo_terms(values, torch.tensor([[2.0, 4.0]]))
    assert terms.log_utility.item() == pytest.approx((-1 - 20) / 2, abs=1e-14)
    assert terms.kl.item() == 3.0
    assert terms.elbo.item() == pytest.approx(-13.5, abs=1e-14)


# --- errors -----------------------------------------------------------------------------------

U, LENGTHS = torch.full((2, 4), -1.0), torch.full((2, 4), 10)
BASE = torch.full((2,), 10.0)


def run(**changes: Any) -> Utility:
    arguments = {"u_post_BG": U, "u_prior_BN": U, "len_post_BG": LENGTHS, "len_prior_BN": LENGTHS}
    return cross_view_utility(**{**arguments, **changes})


ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: run(u_post_BG=U[:, :1], len_post_BG=LENGTHS[:, :1]), r"\(2, 1\).*G >= 2.*sample more"),
    (lambda: run(u_post_BG=U[:, :0], len_post_BG=LENGTHS[:, :0]), r"got 0 posterior paths"),
    (lambda: run(u_prior_BN=U[:, :0], len_prior_BN=LENGTHS[:, :0]), r"got 0 prior.*at least 1"),
    (lambda: run(u_prior_BN=U[:1], len_prior_BN=LENGTHS[:1]), r"u_prior \(1, 4\).*with one B"),
    (lambda: run(len_post_BG=LENGTHS[:, :3]), r"len_post \(2, 3\).*\(B, G\) twice"),
    (lambda: run(len_prior_BN=LENGTHS[0]), r"len_prior \(4,\).*\(B, N\) twice"),
    (lambda: run(alpha=-0.1), r"alpha: got -0.1, expected a finite number >= 0"),
    (lambda: run(alpha=NAN), r"alpha: got nan"),
    (lambda: run(baseline="median"), r"baseline: got 'median', expected one of mean, lme"),
    (lambda: run(reward="acc"), r"'acc', expected one of paper, likelihood_gate, likelihood_mix"),
    (lambda: run(reward="likelihood_mix", r_margin=0.1), r"r_margin: got 0.1.*reward='paper'"),
    (lambda: run(r_margin=INF), r"r_margin: got inf"),
    (lambda: run(u_min=-INF), r"u_min: got -inf.*such as -20"),
    (lambda: run(eta_clip=(4, 0.25)), r"eta_clip: got \(4, 0.25\).*low <= high.*None for no clip"),
    (lambda: run(eta_clip=(0, 4)), r"eta_clip: got \(0, 4\)"),
    (lambda: run(eps=-1e-6), r"eps: got -1e-06"),
    (lambda: run(std_gate=-1), r"std_gate: got -1"),
    (lambda: run(ddof=4), r"ddof: got 4, expected 0 <= ddof < G = 4"),
    (lambda: run(ddof=-1), r"ddof: got -1"),
    (lambda: run(len_post_BG=LENGTHS * NAN), r"len_post: got nan among the lengths"),
    (lambda: run(len_prior_BN=-LENGTHS), r"len_prior: got -10.0.*truncated path counts"),
    (
        lambda: run(accept_BG=torch.ones(2, 4)),
        r"accept: got torch.float32 \(2, 4\), expected .*bool",
    ),
    (lambda: run(accept_BG=torch.ones(2, 3).bool()), r"accept: got torch.bool \(2, 3\)"),
    (
        lambda: run(u_post_BG=U * torch.arange(4), len_post_BG=LENGTHS * 0, alpha=1e4),
        r"lower alpha",
    ),
    (lambda: group_zscore(torch.ones(4)), r"got shape \(4,\), expected \(B, G\)"),
    (lambda: group_zscore(torch.tensor([[1.0, NAN]])), r"got 1 non-finite values"),
    (lambda: length_factor(LENGTHS, BASE[:1]), r"len_base \(1,\), expected \(B, G\) and \(B,\)"),
    (lambda: length_factor(LENGTHS, BASE * 0), r"len_base: got \[0.0, 0.0\], expected positive"),
    (lambda: posterior_monitors(U[:, :0], U, LENGTHS[:, :0], LENGTHS), r"got 0 posterior paths"),
    (lambda: log_utility(U, LENGTHS[:, :2], BASE), r"len \(2, 2\), expected the same"),
    (lambda: elbo_terms(U, U * NAN), r"log_ratio: .*finite values"),
    (lambda: elbo_terms(U, U[:, :1]), r"log_ratio: got shape \(2, 1\)"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_input_names_what_it_got_and_the_remedy(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()

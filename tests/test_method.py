"""The identities of VPG-EA (arXiv 2605.11019) and of Variational Reasoning (arXiv 2509.22637),
each against exact enumeration; the product's phase 2 supplies advantages, gates and monitors."""

import itertools
import math

import oracle
import pytest
import torch
from torch import Tensor

from vpgea_fast import advantage

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 2.0)
GROUP_SIZE = 3
BETA = 0.5
CONSTANT = 2.5


# --- Proposition 1 and the bounds, on a few traces --------------------------------------------


@pytest.mark.parametrize("case", [oracle.FLIP_WORLD, oracle.FOUR_TRACES], ids=["flip", "four"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_proposition_1_is_an_identity(case: oracle.World, alpha: float) -> None:
    prior, likelihood, utility = case.prior_Z, case.likelihood_Z, case.utility(alpha)
    gain = ((case.posterior() - prior) * utility).sum()
    mean_l = (prior * likelihood).sum()
    covariance = (prior * (likelihood - mean_l) * utility).sum()
    assert gain.item() == pytest.approx((covariance / mean_l).item(), abs=1e-14)
    if alpha == 0:
        assert gain > 0


def test_proposition_1_turns_below_the_recommended_alpha() -> None:
    def gain(alpha: float) -> float:
        case = oracle.FLIP_WORLD
        return ((case.posterior() - case.prior_Z) * case.utility(alpha)).sum().item()

    assert oracle.FLIP_ALPHA < 0.5
    assert gain(oracle.FLIP_ALPHA) == pytest.approx(0, abs=1e-14)
    assert gain(oracle.FLIP_ALPHA - 0.01) > 1e-4
    assert gain(0.5) < -0.1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_monitors_see_the_world_when_samples_have_its_frequencies(alpha: float) -> None:
    """Priors drawn with frequencies pi and posteriors with frequencies q* make them exact."""
    case = oracle.FLIP_WORLD  # pi = (1, 2, 1) / 4, q* = (3, 4, 1) / 8
    prior_N, posterior_G = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    u_Z = case.likelihood_Z.log()
    monitors = advantage.posterior_monitors(
        u_Z[None, posterior_G],
        u_Z[None, prior_N],
        case.length_Z[None, posterior_G],
        case.length_Z[None, prior_N],
        alpha=alpha,
    )
    gain = ((case.posterior() - case.prior_Z) * case.utility(alpha)).sum().item()
    unbiased = 4 / 3  # N / (N - 1)
    mean_l = (case.prior_Z * case.likelihood_Z).sum().item()
    assert monitors["adv_post"] == pytest.approx(gain, abs=1e-13)
    assert monitors["prop1_gap"] == pytest.approx(unbiased * gain, abs=1e-13)
    assert monitors["cov_ls"] == pytest.approx(unbiased * gain * mean_l, abs=1e-13)
    expected = (case.posterior() * case.utility(alpha)).sum().item()
    assert monitors["e_qstar_s"] == pytest.approx(expected, abs=1e-13)
    assert monitors["share_cov_negative"] == (1.0 if alpha > oracle.FLIP_ALPHA else 0.0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_log_expected_utility_is_elbo_plus_kl_to_the_tilted_posterior(alpha: float) -> None:
    case = oracle.FOUR_TRACES
    tilted = case.posterior(alpha)
    log_utility = (case.prior_Z * case.utility(alpha)).sum().log().item()
    for q in (case.prior_Z, case.posterior(), torch.full((4,), 0.25).double(), tilted):
        bound = case.elbo(q, alpha).item()
        assert bound + oracle.kl(q, tilted).item() == pytest.approx(log_utility, abs=1e-13)
    assert case.elbo(tilted, alpha).item() == pytest.approx(log_utility, abs=1e-13)
    if alpha > 0:  # the exact posterior is not the maximiser
        assert case.elbo(case.posterior(), alpha).item() < log_utility - 1e-3


def test_the_monitors_bias_is_of_order_one_over_n_and_zero_without_an_eta() -> None:
    """E[cov_ls] and E[adv_post] over all 4^N draws of N priors, against the infinite sample."""
    case, bias = oracle.FOUR_TRACES, {}
    pi, u, length = case.prior_Z, case.likelihood_Z.log(), case.length_Z.double()
    for alpha, count in ((0.0, 2), (0.5, 2), (0.5, 4), (0.5, 8)):
        if count < 8:
            draws = torch.cartesian_prod(*[torch.arange(4)] * count)
        else:  # as multisets, or there are 65,536 of them
            draws = torch.combinations(torch.arange(4), count, with_replacement=True)
        chance = torch.stack([_chance(pi, draw, ordered=count < 8) for draw in draws])
        found = [
            advantage.posterior_monitors(
                u.expand(1, 4), u[draw][None], length.expand(1, 4), length[draw][None], alpha=alpha
            )
            for draw in draws
        ]
        s = case.utility(alpha)
        mean_s, mean_l = (pi * s).sum(), (pi * case.likelihood_Z).sum()
        exact = {
            "cov_ls": (pi * case.likelihood_Z * s).sum() - mean_l * mean_s,
            "adv_post": s.mean() - mean_s,
        }
        for key, value in exact.items():
            values = torch.tensor([monitors[key] for monitors in found], dtype=torch.float64)
            bias[key, alpha, count] = ((chance * values).sum() - value).item()
    for key in ("cov_ls", "adv_post"):
        assert abs(bias[key, 0.0, 2]) < 1e-13
        two, four, eight = (bias[key, 0.5, count] for count in (2, 4, 8))
        assert abs(two) > abs(four) > abs(eight) > 1e-5
        assert eight / four == pytest.approx(0.5, abs=0.15)


def _chance(pi: Tensor, draw: Tensor, *, ordered: bool) -> Tensor:
    counts = draw.bincount(minlength=4).tolist()
    orders = 1 if ordered else math.factorial(len(draw)) // math.prod(map(math.factorial, counts))
    return orders * pi[draw].prod()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_elbo_terms_reach_the_bound_at_the_tilted_posterior(alpha: float) -> None:
    """There log L + log eta - (log q - log pi) is one constant, so any sample gives the bound."""
    case = oracle.FOUR_TRACES
    prior, tilted = case.prior_Z, case.posterior(alpha)
    values = advantage.log_utility(
        case.likelihood_Z.log()[None],
        case.length_Z[None],
        (prior * case.length_Z).sum()[None],
        alpha=alpha,
    )
    terms = advantage.elbo_terms(values, (tilted / prior).log()[None])
    log_utility = (prior * case.utility(alpha)).sum().log().item()
    assert terms.elbo.item() == pytest.approx(log_utility, abs=1e-13)
    assert terms.kl.item() == pytest.approx((tilted / prior).log().mean().item(), abs=1e-13)


# --- distillation -----------------------------------------------------------------------------


def gated_world() -> tuple[oracle.World, Tensor, Tensor]:
    """World, exact posterior q, and 1[A > 0] of an infinitely large group drawn from q."""
    case = oracle.FOUR_TRACES
    q, u = case.posterior(), case.likelihood_Z.log()
    reward = (u - (case.prior_Z * u).sum()).clamp(min=0)
    utility = reward * case.efficiency(0.5)
    return case, q, utility > (q * utility).sum()


def test_distillation_optimum_is_the_truncated_posterior() -> None:
    """E_q[1[A>0] (log q - log pi)] exceeds its value at q(z | A>0) by P(A>0) KL(q(.|A>0) || pi)."""
    _, q, gate = gated_world()
    mass = (q * gate).sum()
    truncated = q * gate / mass
    assert gate.tolist() == [False, True, True, False]

    def loss(pi: Tensor) -> float:
        return (torch.xlogy(q * gate, q) - torch.xlogy(q * gate, pi)).sum().item()

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pi = torch.randn(4, generator=generator, dtype=torch.float64).softmax(0)
        excess = (mass * oracle.kl(truncated, pi)).item()
        assert excess > 0
        assert loss(pi) - loss(truncated) == pytest.approx(excess, abs=1e-13)


def test_truncation_alone_shortens_the_student_below_a_longer_teacher() -> None:
    case, q, gate = gated_world()
    length = case.length_Z
    prior_mean, teacher_mean = (case.prior_Z * length).sum(), (q * length).sum()
    gated_mean = (q * gate * length).sum() / (q * gate).sum()
    assert gated_mean < prior_mean < teacher_mean


# --- the whole loss, on the tabular model -----------------------------------------------------


class Tabular:
    """Shared logits, and an offset that only the teacher view adds; fixed student-view U."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.traces = oracle.tabular_traces()
        shape = self.traces.n_contexts, 3

        def table(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.shared_PV = table(*shape).requires_grad_()
        self.offset_PV = table(*shape).requires_grad_()
        self.u_Z = -2 * table(len(self.traces.token_ZT)).abs()

    def teacher_logits(self) -> Tensor:
        return self.shared_PV + self.offset_PV

    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """All groups of G teacher paths: trace indices, probability, advantages."""
        draw_XG = oracle.tuples(len(self.u_Z), GROUP_SIZE)
        logq_Z = oracle.token_logps(self.teacher_logits().detach(), self.traces).sum(dim=1)
        prior_N = torch.tensor([1, 4, 9, 14])
        scored = advantage.cross_view_utility(
            self.u_Z[draw_XG],
            self.u_Z[prior_N].expand(len(draw_XG), -1),
            self.traces.length_Z[draw_XG],
            self.traces.length_Z[prior_N].expand(len(draw_XG), -1),
            accept_BG=self.traces.closed_Z[draw_XG],
        )
        return draw_XG, logq_Z[draw_XG].sum(dim=1).exp(), scored.advantage


@pytest.fixture(scope="module")
def model() -> Tabular:
    return Tabular()


def test_tabular_model_lists_every_trace(model: Tabular) -> None:
    assert len(model.traces.token_ZT) == 15
    assert (~model.traces.closed_Z).sum() == 8
    for logits_PV in (model.shared_PV, model.teacher_logits()):
        probability = oracle.token_logps(logits_PV, model.traces).sum(dim=1).exp().sum()
        assert probability.item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("norm", ["seq_sum", "const", "seq_mean", "token_mean"])
def test_coefficients_give_the_gradient_of_the_loss(model: Tabular, norm: str) -> None:
    """c = -A w on teacher tokens and -beta 1[A>0] w on student tokens, over all 3375 groups."""
    draw_XG, probability_X, advantage_XG = model.groups()
    length_XG = model.traces.length_Z[draw_XG]
    weight_XG = torch.stack(
        [oracle.sequence_weights(norm, n[None], CONSTANT)[0] for n in length_XG]
    )

    logq_Z = oracle.token_logps(model.teacher_logits(), model.traces).sum(dim=1)
    logpi_Z = oracle.token_logps(model.shared_PV, model.traces).sum(dim=1)
    loss = oracle.vpgea_loss(
        logq_Z[draw_XG],
        logpi_Z[draw_XG],
        advantage_XG,
        probability_X[:, None] * weight_XG,
        BETA,
    )
    shared_grad, offset_grad = torch.autograd.grad(loss, (model.shared_PV, model.offset_PV))

    def explicit(logits_PV: Tensor, coef_XG: Tensor) -> Tensor:
        coef_Z = torch.zeros(len(model.u_Z), dtype=torch.float64)
        coef_Z.index_add_(0, draw_XG.flatten(), (probability_X[:, None] * coef_XG).flatten())
        return oracle.softmax_gradient(logits_PV.detach(), model.traces, coef_Z[:, None])

    teacher = explicit(model.teacher_logits(), -advantage_XG * weight_XG)
    student = explicit(model.shared_PV, -BETA * (advantage_XG > 0) * weight_XG)
    assert offset_grad.abs().max() > 1e-2
    torch.testing.assert_close(offset_grad, teacher, rtol=0, atol=1e-9)
    torch.testing.assert_close(shared_grad, teacher + student, rtol=0, atol=1e-9)


def test_distillation_never_reaches_the_teacher_offset(model: Tabular) -> None:
    """With sg it gets exactly 0; the full KL would pull the teacher towards the student."""
    draw_XG, probability_X, advantage_XG = model.groups()
    logq_Z = oracle.token_logps(model.teacher_logits(), model.traces).sum(dim=1)
    logpi_Z = oracle.token_logps(model.shared_PV, model.traces).sum(dim=1)
    weight_XG = probability_X[:, None].expand_as(advantage_XG) / GROUP_SIZE

    def offset_grad(beta: float) -> Tensor:
        loss = oracle.vpgea_loss(logq_Z[draw_XG], logpi_Z[draw_XG], advantage_XG, weight_XG, beta)
        return torch.autograd.grad(loss, model.offset_PV, retain_graph=True)[0]

    assert torch.equal(offset_grad(0.0), offset_grad(3.0))
    gate_XG = advantage_XG > 0
    full_kl = (weight_XG * gate_XG * (logq_Z - logpi_Z)[draw_XG]).sum()
    assert torch.autograd.grad(full_kl, model.offset_PV)[0].abs().max() > 1e-2


def test_normalisations_weigh_a_batch_as_they_say() -> None:
    """Two prompts, three paths: each weight is written out, C = 4."""
    length_BG = torch.tensor([[1, 2, 4], [5, 10, 2]])
    expected = {
        "seq_sum": [[1 / 6] * 3] * 2,
        "const": [[1 / 24] * 3] * 2,
        "seq_mean": [[1 / 6, 1 / 12, 1 / 24], [1 / 30, 1 / 60, 1 / 12]],
        "token_mean": [[1 / 24] * 3] * 2,  # C = 4 is this batch's mean length
    }
    for norm, weights in expected.items():
        actual = oracle.sequence_weights(norm, length_BG, constant=4)
        assert actual.flatten().tolist() == pytest.approx(
            [w for row in weights for w in row], abs=1e-15
        )
    uneven = length_BG + torch.tensor([[3], [0]])
    token_mean = oracle.sequence_weights("token_mean", uneven, constant=4)
    assert (token_mean * uneven).sum().item() == pytest.approx(1, abs=1e-15)


# --- policy-gradient and variational weights by brute force ------------------------------------


@pytest.mark.parametrize(
    ("p", "infinite", "eight"), [(0.1, 1 / 3, 0.233), (0.5, 1.0, None), (0.9, 3.0, 2.09)]
)
def test_grpo_weight_of_a_finite_group(p: float, infinite: float, eight: float | None) -> None:
    """(1/G) E[sum_i A_i grad log pi_i] = w grad log P(correct), w -> sqrt(p/(1-p)) as G grows."""
    reward_XG = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=torch.float64)
    probability_X = (p * reward_XG + (1 - p) * (1 - reward_XG)).prod(dim=1)
    advantage_XG = advantage.group_zscore(reward_XG, eps=0)
    # E[grad log pi | right] = grad log P; given wrong it is -p/(1-p) times that.
    score_XG = reward_XG - p / (1 - p) * (1 - reward_XG)
    weight = (probability_X * (advantage_XG * score_XG).mean(dim=1)).sum().item()

    binomial = sum(
        math.comb(8, k) * p**k * (1 - p) ** (8 - k) * math.sqrt(k * (8 - k)) for k in range(9)
    )
    assert weight == pytest.approx(binomial / (8 * (1 - p)), abs=1e-12)
    assert weight < infinite
    if eight is not None:
        assert weight == pytest.approx(eight, rel=3e-3)


def proposal() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of pi and of q, and log L, on three traces."""
    generator = torch.Generator().manual_seed(3)
    theta, phi = torch.randn(2, 3, generator=generator, dtype=torch.float64).unbind()
    log_l = oracle.FLIP_WORLD.likelihood_Z.log()
    return theta.clone().requires_grad_(), phi.clone().requires_grad_(), log_l


def test_iwae_bound_rises_and_has_the_two_gradients() -> None:
    """d theta: E sum rho~_k grad log pi; d phi: E sum (log mean rho - rho~_k) grad log q."""
    theta, phi, log_l = proposal()
    log_pi, log_q = theta.log_softmax(0), phi.log_softmax(0)
    log_rho = log_pi + log_l - log_q
    log_marginal = (log_pi + log_l).logsumexp(0).item()
    elbo = (log_q.exp() * log_rho).sum().item()

    bounds = []
    for size in (1, 2, 3, 4):
        bound = oracle.iwae_bound(log_rho, log_q, size)
        bounds.append(bound.item())
        actual = torch.autograd.grad(bound, (theta, phi), retain_graph=True)

        draw = oracle.tuples(3, size)
        probability = log_q[draw].sum(1, keepdim=True).exp().detach()
        share = log_rho[draw].softmax(1).detach()
        log_mean = (log_rho[draw].logsumexp(1, keepdim=True) - math.log(size)).detach()
        surrogate = probability * (share * log_pi[draw] + (log_mean - share) * log_q[draw])
        expected = torch.autograd.grad(surrogate.sum(), (theta, phi), retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert bounds[0] == pytest.approx(elbo, abs=1e-14)
    assert all(low < high for low, high in itertools.pairwise([*bounds, log_marginal]))


def test_forward_kl_is_biased_by_self_normalisation_and_blind_at_one_sample() -> None:
    theta, phi, log_l = proposal()
    log_pi, log_q = theta.log_softmax(0).detach(), phi.log_softmax(0)

    def phi_grad(weight_Z: Tensor) -> Tensor:
        return torch.autograd.grad((weight_Z * log_q).sum(), phi, retain_graph=True)[0]

    def mean_weight(size: int) -> Tensor:
        """E over z_1:M ~ pi of the self-normalised weight that each trace receives."""
        draw = oracle.tuples(3, size)
        weight = log_pi[draw].sum(1, keepdim=True).exp() * log_l[draw].softmax(1)
        return torch.zeros(3).double().index_add(0, draw.flatten(), weight.flatten())

    exact = phi_grad((log_pi + log_l).softmax(0))
    errors = [(phi_grad(mean_weight(m)) - exact).norm().item() for m in (1, 2, 4, 8)]
    assert all(big > 1.5 * small for big, small in itertools.pairwise(errors))
    torch.testing.assert_close(phi_grad(mean_weight(1)), phi_grad(log_pi.exp()), rtol=0, atol=1e-14)

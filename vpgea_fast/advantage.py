"""Scores of sampled paths -> utility, advantage and gate; and the monitors of the theory.

Everything here is a pure function of numbers that are already sampled and scored. It computes in
float64 on the device of its inputs. No gradient passes through R, eta or U: all are constants.

    Ubar  = mean_j U_j  or  log mean_j exp U_j             over the prior paths of one prompt
    R_i   = max(0, U_i - Ubar + r_margin)                  cross-view reward, nats
    eta_i = (len_base / len_i)^alpha,  len_base = mean_j len_j
    S_i   = R_i * eta_i;   A_i = (S_i - mean S) / (std S + eps);   gate_i = 1[A_i > 0]

U is log P(answer | question, path) in the student's view. Source: VPG-EA, arXiv 2605.11019.

Shapes: B prompts, G posterior (teacher view) and N prior (student view) paths per prompt.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vpgea_fast.kernels import reference
from vpgea_fast.kernels.options import PAPER, GroupOptions

__all__ = [
    "PAPER",
    "ElboTerms",
    "GroupOptions",
    "Utility",
    "cross_view_utility",
    "elbo_terms",
    "group_zscore",
    "length_factor",
    "log_utility",
    "posterior_monitors",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Utility:
    """Phase 2 of one batch: what each posterior path is worth, float64.

    Example, one prompt, priors with U = (-1, -3) and lengths (100, 300), so u_base = -2 and
    len_base = 200; two posteriors with U = (-1, -5) and lengths (50, 200): reward = (1, 0),
    eta = (2, 1), utility = (2, 0), advantage = (1, -1), gate = (True, False), n_replaced = 0.
    """

    reward: Tensor  # (B, G) R, nats for reward="paper"; 0 where not accepted
    eta: Tensor  # (B, G) length factor
    utility: Tensor  # (B, G) R * eta
    advantage: Tensor  # (B, G) z-score within the prompt, exactly 0 in a constant group
    gate: Tensor  # (B, G) bool, advantage > 0
    len_base: Tensor  # (B,) mean prior length, tokens
    u_base: Tensor  # (B,) baseline of U, nats
    n_replaced: int  # non-finite U, of both streams, that became u_min


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ElboTerms:
    """Sample means over the G posterior paths of each prompt; elbo = log_utility - kl.

    Example, U = (-1, -3), eta = (1, 1), log q - log pi = (2, 4): log_utility = -2, kl = 3,
    elbo = -5.
    """

    log_utility: Tensor  # (B,) E_q[log L + log eta], nats
    kl: Tensor  # (B,) E_q[log q - log pi], nats
    elbo: Tensor  # (B,)


def length_factor(
    len_BG: Tensor,
    len_base_B: Tensor,
    alpha: float = 0.5,
    eta_clip: tuple[float, float] | None = None,
) -> Tensor:
    """eta = (len_base / max(len, 1))^alpha, clipped to eta_clip = (low, high) if given.

    Above 1 for a path shorter than the base and unbounded as the length goes to 1, hence the
    clip. len_BG (B, G) tokens, len_base_B (B,) tokens, any dtype; returns float64 (B, G).
    Raises ValueError for negative or non-finite lengths, and a base that is not positive; also for
    alpha < 0, and a clip that is not 0 < low <= high.
    """
    options = GroupOptions(alpha=alpha, eta_clip=eta_clip)  # checks both
    if len_BG.ndim != 2 or len_base_B.shape != len_BG.shape[:1]:
        raise ValueError(
            f"length_factor: got len {tuple(len_BG.shape)} and len_base "
            f"{tuple(len_base_B.shape)}, expected (B, G) and (B,)"
        )
    len_base_B = _float64(len_base_B)
    # The mean length of no paths is NaN, and a base of 0 would make every eta 0.
    if not bool((torch.isfinite(len_base_B) & (len_base_B > 0)).all()):
        raise ValueError(
            f"len_base: got {len_base_B.tolist()}, expected positive finite token counts; "
            "pass the mean length of at least one path per prompt"
        )
    return reference.length_factor(_token_counts("len", len_BG), len_base_B, options)


def group_zscore(
    utility_BG: Tensor, *, eps: float = 1e-6, ddof: int = 0, std_gate: float = 0.0
) -> Tensor:
    """A = (S - mean) / (std + eps) within each row; a constant or gated-off row is exactly 0.

    A row is constant when max - min <= max(8 eps32 max|S|, 1e-7): decided before the division,
    or float32 noise in equal scores would come back as advantages of size one. std has
    G - ddof in its denominator; rows with std < std_gate are 0 too (0 = off). With ddof = 0,
    |A| <= sqrt(G - 1). utility_BG (B, G), any dtype; returns float64 (B, G), rows sum to 0.
    Raises ValueError for G < 2, ddof outside [0, G), negative eps or std_gate, and non-finite S.
    """
    options = GroupOptions(eps=eps, ddof=ddof, std_gate=std_gate)
    _check_group("utility", utility_BG, options)
    utility_BG = _float64(utility_BG)
    # One NaN makes the mean of its group NaN, and so every advantage in it.
    _check_finite_utility(utility_BG)
    return reference.group_zscore(utility_BG, options)


def cross_view_utility(
    u_post_BG: Tensor,
    u_prior_BN: Tensor,
    len_post_BG: Tensor,
    len_prior_BN: Tensor,
    *,
    accept_BG: Tensor | None = None,
    options: GroupOptions = PAPER,
    **changes: Any,
) -> Utility:
    """Utility, advantage and gate of every posterior path; formulas at the top of the file.

    u_*: log P(answer | question, path) in the student's view, both from the same parameters.
    len_*: path tokens, the closing think token included; 0 counts as 1.
    accept_BG: bool; False (truncated, unverified, caught by a leak guard) makes R = 0. The path
        stays in its group: it is a failure of the policy, and dropping it would hide it.
    options, changes: a `GroupOptions`, and keywords of its fields, which win: alpha=1.0 is
        options=GroupOptions(alpha=1.0). A U that became u_min is counted in n_replaced.

    Inputs may have any dtype; the result is float64 and detached. On CUDA it is one kernel launch
    (kernels/group_advantage.py) and one synchronisation with the host, for the errors.
    Raises ValueError for wrong shapes, G < 2, N < 1, bad lengths and options out of range;
    TypeError for a keyword that is no option.
    """
    options = replace(options, **changes)
    _check_shapes(u_post_BG, u_prior_BN, len_post_BG, len_prior_BN)
    _check_group("u_post", u_post_BG, options)
    if accept_BG is not None:
        _check_accept(accept_BG, u_post_BG.shape)
    # Imported late: the kernel's file needs Triton, which a machine without CUDA may lack.
    if u_post_BG.is_cuda:
        from vpgea_fast.kernels.group_advantage import group_advantage
    else:
        from vpgea_fast.kernels.reference import group_advantage
    out = group_advantage(
        torch.cat([_float64(u).flatten() for u in (u_post_BG, u_prior_BN)]),
        _float64(len_post_BG),
        _float64(len_prior_BN),
        options,
        accept_BG=accept_BG,
    )
    # (B,) counts; -1 marks a question whose lengths or utility are no numbers.
    replaced = out.replaced_B.tolist()  # the one synchronisation
    if -1 in replaced:
        # Only now: each check looks at values, which on CUDA waits for the device again.
        _token_counts("len_post", len_post_BG)
        _token_counts("len_prior", len_prior_BN)
        _check_finite_utility(out.utility_BG)
    return Utility(
        reward=out.reward_BG,
        eta=out.eta_BG,
        utility=out.utility_BG,
        advantage=out.advantage_BG,
        gate=out.gate_BG,
        len_base=out.len_base_B,
        u_base=out.u_base_B,
        n_replaced=sum(replaced),
    )


def posterior_monitors(
    u_post_BG: Tensor,
    u_prior_BN: Tensor,
    len_post_BG: Tensor,
    len_prior_BN: Tensor,
    *,
    alpha: float = 0.5,
    u_min: float = -20.0,
) -> dict[str, float]:
    """Is sampling from the teacher view worth it? The sample versions of Proposition 1.

    L = exp(max(U, u_min)), S = L eta and w = L / sum L, over the prior paths of a prompt. Each key
    is a mean over prompts (VPG-EA, arXiv 2605.11019, Proposition 1):

        adv_post            mean S_post - mean S_prior, an estimate of E_q[S] - E_pi[S]
        e_qstar_s           sum_j w_j S_j, E[S] under the exact posterior
        cov_ls              covariance of (L, S) over the N prior paths, N - 1 in the denominator
        prop1_gap           cov_ls / mean L, the gain that the exact posterior would have
        share_cov_negative  share of prompts with cov_ls < 0: there the exact posterior loses,
                            and alpha is too large (alpha = 0 cannot be negative)

    Computed as N/(N-1) (e_qstar_s - mean S_prior), prop1_gap is defined however small L is.

    * cov_ls is unbiased for a fixed len_base. Here len_base is the mean of the same N paths, as in
      the training reward: every monitor with an eta has a bias of order 1/N.
    * At alpha = 0 there is no eta, and cov_ls and adv_post are unbiased.
    * e_qstar_s and prop1_gap divide by a sample mean. They are consistent, with a bias of order 1/N
      at any alpha.

    What is undefined is absent, never NaN: the last three keys for N = 1, all keys for B = 0.
    Raises ValueError for wrong shapes, bad lengths, alpha < 0 or a u_min that is not finite.
    """
    _check_shapes(u_post_BG, u_prior_BN, len_post_BG, len_prior_BN)
    # Clamped whatever the training reward does: exp(-20), the default, is 2e-9, as good as 0 here.
    u_post_BG, _ = _finite_u(u_post_BG, u_min, clamp=True)
    u_prior_BN, _ = _finite_u(u_prior_BN, u_min, clamp=True)
    len_base_B = _token_counts("len_prior", len_prior_BN).mean(dim=1)
    s_post_BG = u_post_BG.exp() * length_factor(len_post_BG, len_base_B, alpha)
    l_BN = u_prior_BN.exp()
    s_BN = l_BN * length_factor(len_prior_BN, len_base_B, alpha)
    # A mean over no questions would be NaN.
    batch, n_prior = u_prior_BN.shape
    if batch == 0:
        return {}

    # softmax of U over the prior paths is L / sum L, the weights of the exact posterior.
    s_mean_B = s_BN.mean(dim=1)
    e_qstar_B = (u_prior_BN.softmax(dim=1) * s_BN).sum(dim=1)
    monitors = {
        "adv_post": float((s_post_BG.mean(dim=1) - s_mean_B).mean()),
        "e_qstar_s": float(e_qstar_B.mean()),
    }
    # A covariance needs two paths.
    if n_prior == 1:
        return monitors
    # sum_j w_j S_j - mean S is the covariance over N, divided by mean L; the factor makes it N - 1.
    gap_B = n_prior / (n_prior - 1) * (e_qstar_B - s_mean_B)
    monitors["cov_ls"] = float((gap_B * l_BN.mean(dim=1)).mean())
    monitors["prop1_gap"] = float(gap_B.mean())
    # A sign below the noise of the scores is no sign: equal likelihoods have covariance 0.
    monitors["share_cov_negative"] = float(
        (gap_B < -reference.NOISE_RELATIVE * s_mean_B).double().mean()
    )
    return monitors


def log_utility(
    u_BG: Tensor, len_BG: Tensor, len_base_B: Tensor, *, alpha: float = 0.5, u_min: float = -20.0
) -> Tensor:
    """log L + log eta of every path, float64 (B, G) nats: what the ELBO is an average of.

    u_BG (B, G) nats, each lifted to u_min; len_BG (B, G) and len_base_B (B,) tokens. eta is not
    clipped. Raises ValueError for wrong shapes and bad lengths. Source: VPG-EA, arXiv 2605.11019.
    """
    if u_BG.shape != len_BG.shape or u_BG.ndim != 2 or u_BG.shape[1] < 1:
        raise ValueError(
            f"log_utility: got u {tuple(u_BG.shape)} and len {tuple(len_BG.shape)}, expected the "
            "same (B, G) with G >= 1"
        )
    u_BG, _ = _finite_u(u_BG, u_min, clamp=True)
    # A sum, as in the ELBO; the reward of training multiplies R by eta.
    return u_BG + length_factor(len_BG, len_base_B, alpha).log()


def elbo_terms(log_utility_BG: Tensor, log_ratio_BG: Tensor) -> ElboTerms:
    """ELBO(q) = E_q[log L + log eta] - KL(q || pi) <= log E_pi[L eta], by prompt.

    The bounded quantity is the log of the expected utility; the bound is tight for q in
    proportion to pi L eta. log_utility_BG (B, G) as the objective made it; log_ratio_BG (B, G) is
    log q(z|x,y*) - log pi(z|x) summed over path tokens. Returns float64 sample means.
    Raises ValueError for other shapes and a non-finite log-ratio.
    Source: VPG-EA, arXiv 2605.11019.
    """
    shape = log_utility_BG.shape
    if log_ratio_BG.shape != shape or not bool(torch.isfinite(log_ratio_BG).all()):
        raise ValueError(
            f"log_ratio: got shape {tuple(log_ratio_BG.shape)}, expected finite values of shape "
            f"{tuple(shape)}; sum log q - log pi over the tokens of each path"
        )
    log_utility_B = _float64(log_utility_BG).mean(dim=1)
    # A mean of samples: unlike the KL that it estimates, it may be negative.
    kl_B = _float64(log_ratio_BG).mean(dim=1)
    return ElboTerms(log_utility=log_utility_B, kl=kl_B, elbo=log_utility_B - kl_B)


def _float64(values: Tensor) -> Tensor:
    return values.detach().to(torch.float64)


def _finite_u(u: Tensor, u_min: float, *, clamp: bool) -> tuple[Tensor, int]:
    if not math.isfinite(u_min):
        raise ValueError(f"u_min: got {u_min}, expected a finite number of nats such as -20")
    u = _float64(u)
    # +inf is replaced too: a likelihood above 1 is a fault and no good path.
    finite = torch.isfinite(u)
    cleaned = torch.where(finite, u, u_min)
    return cleaned.clamp(min=u_min) if clamp else cleaned, int((~finite).sum())


def _token_counts(name: str, lengths: Tensor) -> Tensor:
    lengths = _float64(lengths)
    bad = ~torch.isfinite(lengths) | (lengths < 0)
    if bool(bad.any()):
        raise ValueError(
            f"{name}: got {lengths[bad][0].item()} among the lengths, expected finite token counts "
            ">= 0; count the sampled ids, a truncated path counts max_new_tokens"
        )
    # A path of no token would have no finite eta.
    return lengths.clamp(min=1)


def _check_shapes(
    u_post_BG: Tensor, u_prior_BN: Tensor, len_post_BG: Tensor, len_prior_BN: Tensor
) -> None:
    shapes = [tuple(t.shape) for t in (u_post_BG, len_post_BG, u_prior_BN, len_prior_BN)]
    if (
        shapes[0] != shapes[1]
        or shapes[2] != shapes[3]
        or u_post_BG.ndim != 2
        or u_prior_BN.ndim != 2
        or shapes[0][0] != shapes[2][0]
    ):
        raise ValueError(
            f"shapes: got u_post {shapes[0]}, len_post {shapes[1]}, u_prior {shapes[2]}, "
            f"len_prior {shapes[3]}, expected (B, G) twice and (B, N) twice with one B"
        )
    if u_post_BG.shape[1] < 1:
        raise ValueError("G: got 0 posterior paths a prompt, expected at least 1; sample some")
    if u_prior_BN.shape[1] < 1:
        raise ValueError(
            "N: got 0 prior paths a prompt, expected at least 1; they define the baselines of U "
            "and length, without them there is no reward"
        )


def _check_accept(accept_BG: Tensor, shape: torch.Size) -> None:
    if accept_BG.dtype != torch.bool or accept_BG.shape != shape:
        raise ValueError(
            f"accept: got {accept_BG.dtype} {tuple(accept_BG.shape)}, expected torch.bool "
            f"{tuple(shape)}; compare before passing it"
        )


def _check_group(name: str, values_BG: Tensor, options: GroupOptions) -> None:
    if values_BG.ndim != 2 or values_BG.shape[1] < 2:
        raise ValueError(
            f"{name}: got shape {tuple(values_BG.shape)}, expected (B, G) with G >= 2; "
            "one path has nothing to be compared with, sample more posterior paths"
        )
    options.check_group_size(values_BG.shape[1])


def _check_finite_utility(utility_BG: Tensor) -> None:
    finite_BG = torch.isfinite(utility_BG)
    if not bool(finite_BG.all()):
        raise ValueError(
            f"utility: got {int((~finite_BG).sum())} non-finite values, expected none; replace "
            "non-finite log-likelihoods before scoring, or lower alpha"
        )

"""Exact oracles: expectations are sums over every trace, in float64; nothing is sampled.

Three parts: phase 2 of one prompt in scalar Python; a world of a few traces for the identities of
the theory; a tabular autoregressive model, seen through a student and a teacher view, whose 15
traces are all listed. None of it imports the product.

Shapes: Z traces, T tokens of a trace, P contexts (prefixes), V vocabulary, G paths of a group.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# --- phase 2 of one prompt, written with floats and loops -------------------------------------


@dataclass(frozen=True)
class Group:
    """What phase 2 knows about one prompt."""

    u_post: Sequence[float]
    u_prior: Sequence[float]
    len_post: Sequence[float]
    len_prior: Sequence[float]
    accept: Sequence[bool] | None = None

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Keyword arguments of cross_view_utility for a batch of this one prompt."""
        arguments: dict[str, Any] = {
            f"{name}_{suffix}": torch.tensor([list(getattr(self, name))], dtype=dtype)
            for name, suffix in _FIELDS
        }
        if self.accept is not None:
            arguments["accept_BG"] = torch.tensor([list(self.accept)])
        return arguments


_FIELDS = (("u_post", "BG"), ("u_prior", "BN"), ("len_post", "BG"), ("len_prior", "BN"))


def reference_phase2(
    group: Group,
    *,
    alpha: float = 0.5,
    baseline: str = "mean",
    reward: str = "paper",
    r_margin: float = 0.0,
    u_min: float = -20.0,
    clamp_u: bool = False,
    eta_clip: tuple[float, float] | None = None,
    eps: float = 1e-6,
    ddof: int = 0,
    std_gate: float = 0.0,
) -> dict[str, list[float]]:
    """reward, eta, utility and advantage of one group."""

    def clean(u: float) -> float:
        return max(u, u_min) if math.isfinite(u) and clamp_u else u if math.isfinite(u) else u_min

    u_post, u_prior = [clean(u) for u in group.u_post], [clean(u) for u in group.u_prior]
    u_base = statistics.fmean(u_prior)
    if baseline == "lme":
        u_base = math.log(statistics.fmean(math.exp(u) for u in u_prior))
    len_base = statistics.fmean(max(n, 1) for n in group.len_prior)

    rewards, etas = [], []
    for i, (u, n) in enumerate(zip(u_post, group.len_post, strict=True)):
        gain, likely = max(0.0, u - u_base + r_margin), u > math.log(0.5)
        value = {
            "paper": gain,
            "likelihood_gate": 1.0 if likely else 0.0,
            "likelihood_mix": 1.0 + gain if likely else 0.0,
        }[reward]
        rewards.append(value if group.accept is None or group.accept[i] else 0.0)
        eta = (len_base / max(n, 1)) ** alpha
        etas.append(min(max(eta, eta_clip[0]), eta_clip[1]) if eta_clip else eta)
    utilities = [r * e for r, e in zip(rewards, etas, strict=True)]

    mean = statistics.fmean(utilities)
    square = math.fsum((s - mean) ** 2 for s in utilities)
    std = math.sqrt(square / (len(utilities) - ddof))
    noise = max(8 * 2.0**-23 * max(map(abs, utilities)), 1e-7)
    silent = max(utilities) - min(utilities) <= noise or std < std_gate
    advantages = [0.0 if silent else (s - mean) / (std + eps) for s in utilities]
    return {"reward": rewards, "eta": etas, "utility": utilities, "advantage": advantages}


# --- a world of a few traces ------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A question whose only traces are these: prior pi(z|x), likelihood P(y*|x,z), length."""

    prior_Z: Tensor
    likelihood_Z: Tensor
    length_Z: Tensor

    def efficiency(self, alpha: float) -> Tensor:
        """eta, with the prior's mean length as a constant base."""
        return ((self.prior_Z * self.length_Z).sum() / self.length_Z) ** alpha

    def utility(self, alpha: float) -> Tensor:
        return self.likelihood_Z * self.efficiency(alpha)

    def posterior(self, alpha: float = 0.0) -> Tensor:
        """pi L eta, normalised; alpha = 0 is the exact posterior P(z|x,y*)."""
        weight_Z = self.prior_Z * self.utility(alpha)
        return weight_Z / weight_Z.sum()

    def elbo(self, q_Z: Tensor, alpha: float) -> Tensor:
        return (q_Z * self.utility(alpha).log()).sum() - kl(q_Z, self.prior_Z)


def world(prior: list[float], likelihood: list[float], length: list[float]) -> World:
    return World(*(torch.tensor(v, dtype=torch.float64) for v in (prior, likelihood, length)))


# pi and L are symmetric about the middle trace, whose L is E[L]: Cov(L, S) = 0 where
# (405 / 5)^alpha = 0.9 / 0.3, so the short wrong trace turns Proposition 1 at alpha = 1/4 exactly.
FLIP_WORLD = world([0.25, 0.5, 0.25], [0.9, 0.6, 0.3], [405.0, 200.0, 5.0])
FLIP_ALPHA = 0.25

# A short guess that is nearly always wrong, two concise chains and a verbose one.
FOUR_TRACES = world([0.3, 0.1, 0.1, 0.5], [0.02, 0.95, 0.9, 0.7], [40.0, 120.0, 190.0, 300.0])


def kl(p_Z: Tensor, q_Z: Tensor) -> Tensor:
    """KL(p || q), with 0 log 0 = 0."""
    return (torch.xlogy(p_Z, p_Z) - torch.xlogy(p_Z, q_Z)).sum()


def tuples(n_traces: int, size: int) -> Tensor:
    """Every ordered draw with replacement: (n_traces ** size, size)."""
    return torch.tensor(list(itertools.product(range(n_traces), repeat=size)))


def iwae_bound(log_rho_Z: Tensor, log_q_Z: Tensor, size: int) -> Tensor:
    """L_K = E_{z_1:K ~ q} log (1/K) sum_k rho_k; autograd differentiates the expectation too."""
    draw_XK = tuples(len(log_q_Z), size)
    log_mean_X = log_rho_Z[draw_XK].logsumexp(dim=1) - math.log(size)
    return (log_q_Z[draw_XK].sum(dim=1).exp() * log_mean_X).sum()


# --- a tabular autoregressive model with two views --------------------------------------------

STOP = 0


@dataclass(frozen=True)
class Traces:
    """Every trace over {stop, a, b} of at most three tokens; an unstopped one is truncated."""

    context_ZT: Tensor  # row of the logits table, 0 in padding
    token_ZT: Tensor  # 0 in padding
    mask_ZT: Tensor  # bool
    length_Z: Tensor
    closed_Z: Tensor  # bool, ends with stop
    n_contexts: int


def tabular_traces(vocabulary: int = 3, max_len: int = 3) -> Traces:
    going_on = range(1, vocabulary)
    prefixes = [p for n in range(max_len) for p in itertools.product(going_on, repeat=n)]
    row_of = {prefix: row for row, prefix in enumerate(prefixes)}
    traces = [(*prefix, STOP) for prefix in prefixes]
    traces += list(itertools.product(going_on, repeat=max_len))
    shape = len(traces), max_len
    context_ZT, token_ZT = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
    )
    mask_ZT = torch.zeros(shape, dtype=torch.bool)
    for z, trace in enumerate(traces):
        for t, token in enumerate(trace):
            context_ZT[z, t], token_ZT[z, t], mask_ZT[z, t] = row_of[trace[:t]], token, True
    return Traces(
        context_ZT=context_ZT,
        token_ZT=token_ZT,
        mask_ZT=mask_ZT,
        length_Z=mask_ZT.sum(dim=1),
        closed_Z=((token_ZT == STOP) & mask_ZT).any(dim=1),
        n_contexts=len(prefixes),
    )


def token_logps(logits_PV: Tensor, traces: Traces) -> Tensor:
    """log p of every token of every trace, (Z, T); 0 in padding."""
    logp_ZT = logits_PV.log_softmax(dim=1)[traces.context_ZT, traces.token_ZT]
    return torch.where(traces.mask_ZT, logp_ZT, 0.0)


def softmax_gradient(logits_PV: Tensor, traces: Traces, coef_ZT: Tensor) -> Tensor:
    """d/dlogits of sum_zt c_zt log p_zt without autograd: sum of c (onehot - softmax) by row."""
    onehot_ZTV = torch.nn.functional.one_hot(traces.token_ZT, logits_PV.shape[1])
    row_ZTV = onehot_ZTV - logits_PV.softmax(dim=1)[traces.context_ZT]
    gradient_PV = torch.zeros_like(logits_PV)
    weighted_ZTV = (coef_ZT * traces.mask_ZT)[..., None] * row_ZTV
    return gradient_PV.index_add(0, traces.context_ZT.flatten(), weighted_ZTV.flatten(0, 1))


def vpgea_loss(
    logq_G: Tensor, logpi_G: Tensor, advantage_G: Tensor, weight_G: Tensor, beta: float
) -> Tensor:
    """sum_i w_i [ -A_i log q_i + beta 1[A_i > 0] (sg log q_i - log pi_i) ], log-probs of traces."""
    distill_G = (advantage_G > 0) * (logq_G.detach() - logpi_G)
    return (weight_G * (beta * distill_G - advantage_G * logq_G)).sum()


def stream_coefficients(
    advantage_BG: Tensor, weight_BG: Tensor, cu_paths: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """Coefficient of every token of the posterior paths in the teacher's and the student's view.

    -w A and -beta w 1[A > 0], each (T,); cu_paths (B G + 1,) are the paths' boundaries.
    """
    tokens_P = cu_paths.diff()
    coefs = (-weight_BG * advantage_BG, -beta * weight_BG * (advantage_BG > 0))
    post_T, prior_T = (coef_BG.flatten().repeat_interleave(tokens_P) for coef_BG in coefs)
    return post_T, prior_T


def sequence_weights(norm: str, length_BG: Tensor, constant: float) -> Tensor:
    """w_i of each normalisation; B * G is the nominal number of paths, dead groups included."""
    length_BG = length_BG.double()
    per_sequence_BG = torch.full_like(length_BG, 1 / length_BG.numel())
    return {
        "seq_sum": per_sequence_BG,
        "const": per_sequence_BG / constant,
        "seq_mean": per_sequence_BG / length_BG,
        "token_mean": torch.ones_like(length_BG) / length_BG.sum(),
    }[norm]

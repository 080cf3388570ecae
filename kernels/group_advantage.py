"""Group scores before the loss and segment sums after it, on the device, without a host sync.

Before: one program per question reads the log-probs of its answers and writes

    U = sum_t log p(answer_t)         Ubar = mean_j U_j or log mean_j exp U_j, prior paths
    R = max(0, U - Ubar + r_margin) or 1[U > log 1/2] or 1[U > log 1/2] (1 + max(0, U - Ubar))
    eta = (len_base / len)^alpha      S = R eta, R = 0 where not accepted
    A = (S - mean S) / (std S + eps)  gate = 1[A > 0]
    coef_post_t = -w A                coef_prior_t = -beta w gate        for every token of a path

After: one program per sequence adds its tokens' log-probs, one more adds the sequences.

    log q_s = sum_t log q_t           kl_s = gate_s (sg log q_s - log pi_s)
    pg_loss = -sum_s w_s A_s log q_s  distill_loss = sum_s w_s kl_s

B questions of G posterior and N prior paths; A answer tokens; T, U tokens of the posterior and
prior stream; S sequences, P of them in the prior stream. One launch and two; no atomics, so every
run gives the same bits; memory is the outputs. The specification is reference.py.

| | inputs | arithmetic | outputs |
|---|---|---|---|
| group_advantage | float32 or float64 | float64 | float64 (B, G), float32 (T,) |
| gated_kl | float32 or float64 | float64 | the dtype of logq |

These kernels are small. What they save is launches, not bandwidth: see README.md.
"""

# Triton types a launch and the values of device code as constexpr or tuple.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vpgea_fast.kernels import reference
from vpgea_fast.kernels.options import PAPER, GroupOptions
from vpgea_fast.kernels.reference import GatedKl

Tensor = torch.Tensor

FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
TILE = 1024  # elements a program holds at once

# A float argument of a kernel arrives as float32, and up to Triton 3.6 so does a float constexpr
# that meets a float64: eps = 1e-6 and log 1/2 would be wrong from the eighth digit, on the device
# and not in the interpreter. So options are constexpr and pass through _f64.
_NOISE_RELATIVE = tl.constexpr(reference.NOISE_RELATIVE)
_NOISE_NATS = tl.constexpr(reference.NOISE_NATS)
_LOG_HALF = tl.constexpr(reference.LOG_HALF)
_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupScores(reference.GroupAdvantage):
    """`GroupAdvantage` and the coefficient of every posterior path's token in both streams.

    For its example with tokens (1, 2), w = (1, 1), beta = 0.5: coef_post = (-1, 1, 1),
    coef_prior = (-0.5, 0, 0). None where no weight was given.
    """

    coef_post_T: Tensor | None
    coef_prior_T: Tensor | None


@triton.jit
def _f64(x: tl.constexpr):
    """A number of the host as a float64 of the device, all its digits: see above."""
    return tl.full([], x, tl.float64)


@triton.jit
def _segments(cu_ptr, row, live, n_tokens):
    """Start, end (int64) of segment `row`, and whether it lies in [0, n_tokens]; empty if not."""
    start = tl.load(cu_ptr + row, mask=live, other=0).to(tl.int64)
    end = tl.load(cu_ptr + (row + 1), mask=live, other=0).to(tl.int64)
    inside = (start >= 0) & (start <= end) & (end <= n_tokens)
    return tl.where(inside, start, 0), tl.where(inside, end, 0), inside


@triton.jit
def _answer_utility(
    logp_ptr,  # (n_tokens,) float32 or float64; one value a path without cu_ptr
    cu_ptr,  # (paths + 1,) int32 or int64, or None
    row,
    live,
    n_tokens,
    U_MIN: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """U of the paths `row`, whether it was finite, and whether its boundaries are in range."""
    if cu_ptr is None:
        u = tl.load(logp_ptr + row, mask=live, other=0.0).to(tl.float64)
        inside = live
    else:
        start, end, inside = _segments(cu_ptr, row, live, n_tokens)
        position = start[:, None] + tl.arange(0, BLOCK)[None, :]
        total = tl.zeros([row.shape[0], BLOCK], tl.float64)
        # As many steps as the longest of these answers takes; the others are masked.
        for first in range(0, tl.max(end - start, 0), BLOCK):
            at = position + first
            total += tl.load(logp_ptr + at, mask=at < end[:, None], other=0.0).to(tl.float64)
        u = tl.sum(total, 1)
    finite = tl.abs(u) < _INF
    u = tl.where(finite, u, _f64(U_MIN))
    if CLAMP:
        u = tl.maximum(u, _f64(U_MIN))
    return u, finite, inside


@triton.jit
def _token_counts(len_ptr, row, live):
    """Lengths as float64, at least 1, and whether each is a finite number >= 0."""
    length = tl.load(len_ptr + row, mask=live, other=0).to(tl.float64)
    return tl.maximum(length, 1.0), (length >= 0) & (length < _INF)


@triton.jit
def _zscore(s, live, G: tl.constexpr, EPS: tl.constexpr, DDOF: tl.constexpr, GATE: tl.constexpr):
    """See reference.group_zscore: a constant group is found before anything is divided."""
    spread = tl.max(tl.where(live, s, -_INF), 0) - tl.min(tl.where(live, s, _INF), 0)
    largest = tl.max(tl.where(live, tl.abs(s), 0.0), 0)
    centred = tl.where(live, s - tl.sum(tl.where(live, s, 0.0), 0) / G, 0.0)
    std = tl.sqrt(tl.sum(centred * centred, 0) / (G - DDOF))
    noise = tl.maximum(largest * _f64(_NOISE_RELATIVE), _f64(_NOISE_NATS))
    silent = (spread <= noise) | (std < _f64(GATE))
    return tl.where(silent, 0.0, centred / tl.where(silent, 1.0, std + _f64(EPS)))


@triton.jit(do_not_specialize=["n_answer_tokens", "n_tokens"])
def _group_advantage_kernel(
    logp_ptr,  # (n_answer_tokens,) float32 or float64
    cu_answers_ptr,  # (B (G + N) + 1,) int, or None
    len_post_ptr,  # (B, G) int or float
    len_prior_ptr,  # (B, N) int or float
    accept_ptr,  # (B, G) bool, or None
    weight_ptr,  # (B, G) float, or None
    cu_paths_ptr,  # (B G + 1,) int, or None with weight
    post_ptr,  # out, (5, B, G) float64: U, R, eta, S, A
    prior_ptr,  # out, (B, N) float64: U
    base_ptr,  # out, (2, B) float64: Ubar, len_base
    gate_ptr,  # out, (B, G) bool
    replaced_ptr,  # out, (B,) int32
    coef_post_ptr,  # out with weight, (n_tokens,) float32, as the next
    coef_prior_ptr,
    n_answer_tokens,
    n_tokens,
    G: tl.constexpr, N: tl.constexpr, G_PAD: tl.constexpr, N_PAD: tl.constexpr,
    ALPHA: tl.constexpr, LME: tl.constexpr, REWARD: tl.constexpr, R_MARGIN: tl.constexpr,
    U_MIN: tl.constexpr, CLAMP_U: tl.constexpr, ETA_LOW: tl.constexpr, ETA_HIGH: tl.constexpr,
    EPS: tl.constexpr, DDOF: tl.constexpr, STD_GATE: tl.constexpr, BETA: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One question: utilities of its paths, their z-score, and the coefficients of their tokens."""
    b = tl.program_id(0).to(tl.int64)
    questions = tl.num_programs(0).to(tl.int64)
    live_G, live_N = tl.arange(0, G_PAD) < G, tl.arange(0, N_PAD) < N
    at_G, at_N = b * G + tl.arange(0, G_PAD), b * N + tl.arange(0, N_PAD)

    u_post, finite_G, inside_G = _answer_utility(
        logp_ptr,
        cu_answers_ptr,
        row=at_G,
        live=live_G,
        n_tokens=n_answer_tokens,
        U_MIN=U_MIN,
        CLAMP=CLAMP_U,
        BLOCK=TILE // G_PAD,
    )
    # The prior paths' answers lie behind those of all B G posterior paths.
    u_prior, finite_N, inside_N = _answer_utility(
        logp_ptr,
        cu_answers_ptr,
        row=questions * G + at_N,
        live=live_N,
        n_tokens=n_answer_tokens,
        U_MIN=U_MIN,
        CLAMP=CLAMP_U,
        BLOCK=TILE // N_PAD,
    )
    if LME:
        peak = tl.max(tl.where(live_N, u_prior, -_INF), 0)
        u_base = peak + tl.log(tl.sum(tl.where(live_N, tl.exp(u_prior - peak), 0.0), 0) / N)
    else:
        u_base = tl.sum(tl.where(live_N, u_prior, 0.0), 0) / N

    gain = tl.maximum(u_post - u_base + _f64(R_MARGIN), 0.0)
    if REWARD == "paper":
        reward = gain
    elif REWARD == "likelihood_gate":
        reward = (u_post > _f64(_LOG_HALF)).to(tl.float64)
    else:
        reward = tl.where(u_post > _f64(_LOG_HALF), 1.0 + gain, 0.0)
    if accept_ptr is not None:
        reward = tl.where(tl.load(accept_ptr + at_G, mask=live_G, other=0) != 0, reward, 0.0)

    len_post, counts_G = _token_counts(len_post_ptr, at_G, live_G)
    len_prior, counts_N = _token_counts(len_prior_ptr, at_N, live_N)
    len_base = tl.sum(tl.where(live_N, len_prior, 0.0), 0) / N
    eta = tl.exp((tl.log(len_base) - tl.log(len_post)) * _f64(ALPHA))
    if ETA_LOW is not None:
        eta = tl.minimum(tl.maximum(eta, _f64(ETA_LOW)), _f64(ETA_HIGH))
    utility = reward * eta

    # One bad path makes its question NaN: the mean and the deviation have all of them inside.
    good_G = inside_G & counts_G & (tl.abs(utility) < _INF)
    if cu_paths_ptr is not None:
        start, end, inside_paths = _segments(cu_paths_ptr, at_G, live_G, n_tokens)
        good_G = good_G & inside_paths
    bad = tl.sum((live_G & ~good_G).to(tl.int32), 0) + tl.sum(
        (live_N & ~(inside_N & counts_N)).to(tl.int32), 0
    )
    advantage = tl.where(
        bad > 0, _NAN, _zscore(utility, live_G, G=G, EPS=EPS, DDOF=DDOF, GATE=STD_GATE)
    )
    gate = advantage > 0
    replaced = tl.sum((live_G & ~finite_G).to(tl.int32), 0) + tl.sum(
        (live_N & ~finite_N).to(tl.int32), 0
    )

    plane = questions * G
    tl.store(post_ptr + at_G, u_post, mask=live_G)
    tl.store(post_ptr + plane + at_G, reward, mask=live_G)
    tl.store(post_ptr + 2 * plane + at_G, eta, mask=live_G)
    tl.store(post_ptr + 3 * plane + at_G, utility, mask=live_G)
    tl.store(post_ptr + 4 * plane + at_G, advantage, mask=live_G)
    tl.store(gate_ptr + at_G, gate, mask=live_G)
    tl.store(prior_ptr + at_N, u_prior, mask=live_N)
    tl.store(base_ptr + b, u_base)
    tl.store(base_ptr + questions + b, len_base)
    tl.store(replaced_ptr + b, tl.where(bad > 0, -1, replaced))

    if cu_paths_ptr is not None:
        # A path is one line of a (G_PAD, TILE // G_PAD) tile, which walks along its tokens.
        weight = tl.load(weight_ptr + at_G, mask=live_G, other=0.0).to(tl.float64)
        coef_post = tl.where(advantage == 0, 0.0, -advantage * weight)[:, None]
        coef_prior = tl.where(gate, -weight * _f64(BETA), 0.0)[:, None]
        coef_prior = tl.where(bad > 0, _NAN, coef_prior)
        position = start[:, None] + tl.arange(0, TILE // G_PAD)[None, :]
        zero = tl.zeros([G_PAD, TILE // G_PAD], tl.float64)
        for first in range(0, tl.max(tl.where(live_G, end - start, 0), 0), TILE // G_PAD):
            at = position + first
            mask = live_G[:, None] & (at < end[:, None])
            tl.store(coef_post_ptr + at, zero + coef_post, mask=mask)
            tl.store(coef_prior_ptr + at, zero + coef_prior, mask=mask)


@triton.jit
def _sum_tokens(logp_ptr, start, end, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, end - start, BLOCK):
        at = start + first + tl.arange(0, BLOCK)
        total += tl.load(logp_ptr + at, mask=at < end, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _prior_rows(index_ptr, cu_ptr, s, n_prior, n_rows, n_sequences, BLOCK: tl.constexpr):
    """The first prior row of sequence s, how often it is named, and whether n_rows fits the index.

    O(P) per sequence, which spares the launches of a cumulative sum.
    """
    # First where s stands in the index, then how many rows the sequences before it hold.
    times, slot = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int64)
    for first in range(0, n_prior, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        hit = tl.load(index_ptr + at, mask=at < n_prior, other=-1) == s
        times += hit.to(tl.int32)
        slot = tl.where(hit, at, slot)
    slot = tl.max(slot, 0)
    before, total = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    outside = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_prior, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        owner = tl.load(index_ptr + at, mask=at < n_prior, other=0)
        inside = (owner >= 0) & (owner < n_sequences)
        live = inside & (at < n_prior)
        # An owner out of range is never an address: it is counted, and makes `fits` False.
        lower = tl.load(cu_ptr + owner, mask=live, other=0).to(tl.int64)
        upper = tl.load(cu_ptr + (owner + 1), mask=live, other=0).to(tl.int64)
        total += upper - lower
        before += tl.where(at < slot, upper - lower, 0)
        outside += (~inside).to(tl.int32)
    fits = (tl.sum(total, 0) == n_rows) & (tl.sum(outside, 0) == 0)
    return tl.sum(before, 0), tl.sum(times, 0), fits


@triton.jit(do_not_specialize=["n_sequences", "n_tokens", "n_prior_tokens", "n_prior"])
def _path_sums_kernel(
    logq_ptr,  # (n_tokens,) float32 or float64
    logp_ptr,  # (n_prior_tokens,) the same dtype, as the outputs
    cu_ptr,  # (n_sequences + 1,) int
    index_ptr,  # (n_prior,) int64, or None
    advantage_ptr,  # (n_sequences,) float
    gate_in_ptr,  # (n_sequences,) bool, or None: A > 0
    logq_out_ptr,  # out, (n_sequences,), as the next three
    logp_out_ptr,
    gate_ptr,
    kl_ptr,
    n_sequences,
    n_tokens,
    n_prior_tokens,
    n_prior,
    BLOCK: tl.constexpr,
):
    """One sequence: its sums in both streams, its gate and its gated KL; NaN where it is wrong."""
    s = tl.program_id(0).to(tl.int64)
    start, end, inside = _segments(cu_ptr, s, True, n_tokens)
    # A gap before the first or after the last sequence would lose tokens without a word.
    inside = inside & ((start == 0) | (s > 0)) & ((end == n_tokens) | (s < n_sequences - 1))
    logq = tl.where(inside, _sum_tokens(logq_ptr, start, end, BLOCK), _NAN)
    if gate_in_ptr is None:
        gate = tl.load(advantage_ptr + s) > 0
    else:
        gate = tl.load(gate_in_ptr + s) != 0

    if index_ptr is None:
        logp = tl.where(inside, _sum_tokens(logp_ptr, start, end, BLOCK), _NAN)
    else:
        first, times, fits = _prior_rows(
            index_ptr,
            cu_ptr,
            s=s,
            n_prior=n_prior,
            n_rows=n_prior_tokens,
            n_sequences=n_sequences,
            BLOCK=BLOCK,
        )
        last = first + end - start
        good = fits & inside & (times == 1) & (first >= 0) & (last <= n_prior_tokens)
        total = _sum_tokens(logp_ptr, first, tl.where(good, last, first), BLOCK)
        # A sequence that is not there is no error unless its gate is open.
        logp = tl.where(good, total, tl.where((times == 0) & ~gate, 0.0, _NAN))
    tl.store(logq_out_ptr + s, logq)
    tl.store(logp_out_ptr + s, logp)
    tl.store(gate_ptr + s, gate)
    tl.store(kl_ptr + s, tl.where(gate, logq - logp, 0.0))


@triton.jit(do_not_specialize=["n_sequences"])
def _loss_parts_kernel(
    logq_ptr,  # (n_sequences,) float, as the next three
    kl_ptr,
    advantage_ptr,
    weight_ptr,
    parts_ptr,  # out, (2,): pg_loss, distill_loss
    n_sequences,
    BLOCK: tl.constexpr,
):
    """Adds the sequences, in one program: one order of the sum."""
    policy, distill = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, n_sequences, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        live = at < n_sequences
        weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float64)
        coef = -weight * tl.load(advantage_ptr + at, mask=live, other=0.0).to(tl.float64)
        logq = tl.load(logq_ptr + at, mask=live, other=0.0).to(tl.float64)
        kl = tl.load(kl_ptr + at, mask=live, other=0.0).to(tl.float64)
        # Selected, not multiplied by 0: where w A = 0, logq may be NaN.
        policy += tl.where(coef == 0, 0.0, coef * logq)
        distill += tl.where(weight == 0, 0.0, weight * kl)
    tl.store(parts_ptr, tl.sum(policy, 0))
    tl.store(parts_ptr + 1, tl.sum(distill, 0))


def group_advantage(
    answer_logp_A: Tensor,
    len_post_BG: Tensor,
    len_prior_BN: Tensor,
    options: GroupOptions = PAPER,
    *,
    cu_answers: Tensor | None = None,
    accept_BG: Tensor | None = None,
    weight_BG: Tensor | None = None,
    cu_paths: Tensor | None = None,
    tokens: int = 0,
    beta: float = 0.5,
) -> GroupScores:
    """Answer log-probs to utility, advantage, gate and token coefficients, in one launch.

    Formulas at the top of the file; source VPG-EA, arXiv 2605.11019.

    answer_logp_A: float32 or float64, the answer tokens of the B G posterior, then of the B N
        prior paths, back to back, in the student's view.
    cu_answers: (B (G + N) + 1,) int32 or int64, 0 = first <= ... <= last = A. None: answer_logp_A
        holds one value a path, U itself.
    len_post_BG, len_prior_BN: tokens of each path, int or float; 0 counts as 1.
    accept_BG: bool; False makes R = 0.
    weight_BG, cu_paths, tokens: per-path normaliser w (float), boundaries (B G + 1,) of the
        posterior paths in their packed stream, and its length T, a host number so that nothing
        waits for the device. With them come the coefficients (T,) float32 of both streams, which
        are laid out alike: a path whose gate is closed has zeros in the prior stream.
    beta: weight of the distillation.

    A constant group gives exact zeros. A NaN or infinite U becomes u_min and is counted. A length
    that is negative or not finite, an infinite S and boundaries that fall or leave their tensor
    give replaced_B = -1, NaN advantages and NaN coefficients; so do, alone, tokens that no path
    claims. Nothing is read or written out of bounds, and no host waits. Options are compiled in: a
    new value costs a compile.
    ValueError: shapes, dtypes, devices, options, G < 2, N < 1, no CUDA device.
    """
    questions, group, n_prior = _check_group(
        answer_logp_A, len_post_BG, len_prior_BN, cu_answers=cu_answers, accept_BG=accept_BG
    )
    options.check_group_size(group)
    _check_paths(
        weight_BG=weight_BG, cu_paths=cu_paths, tokens=tokens, like_BG=len_post_BG, beta=beta
    )
    device = answer_logp_A.device
    post_5BG = torch.empty(5, questions, group, dtype=torch.float64, device=device)
    u_prior_BN = torch.empty(questions, n_prior, dtype=torch.float64, device=device)
    base_2B = torch.empty(2, questions, dtype=torch.float64, device=device)
    gate_BG = torch.empty(questions, group, dtype=torch.bool, device=device)
    replaced_B = torch.empty(questions, dtype=torch.int32, device=device)
    coef_post_T = coef_prior_T = None
    if cu_paths is not None:
        # The fill is for tokens that no path claims: a wrong boundary must not pass unseen.
        coef_post_T, coef_prior_T = torch.full((2, tokens), torch.nan, device=device)
    if questions > 0:
        _group_advantage_kernel[(questions,)](
            logp_ptr=answer_logp_A.detach().contiguous(),
            cu_answers_ptr=_contiguous(cu_answers),
            len_post_ptr=len_post_BG.contiguous(),
            len_prior_ptr=len_prior_BN.contiguous(),
            accept_ptr=_contiguous(accept_BG),
            weight_ptr=_contiguous(weight_BG),
            cu_paths_ptr=_contiguous(cu_paths),
            post_ptr=post_5BG,
            prior_ptr=u_prior_BN,
            base_ptr=base_2B,
            gate_ptr=gate_BG,
            replaced_ptr=replaced_B,
            coef_post_ptr=coef_post_T,
            coef_prior_ptr=coef_prior_T,
            n_answer_tokens=answer_logp_A.numel(),
            n_tokens=tokens,
            G=group,
            N=n_prior,
            G_PAD=triton.next_power_of_2(group),
            N_PAD=triton.next_power_of_2(n_prior),
            BETA=float(beta),
            TILE=max(TILE, triton.next_power_of_2(max(group, n_prior))),
            enable_fp_fusion=False,
            **_constants_of(options),
        )
    u_post_BG, reward_BG, eta_BG, utility_BG, advantage_BG = post_5BG
    return GroupScores(
        u_post_BG=u_post_BG,
        u_prior_BN=u_prior_BN,
        u_base_B=base_2B[0],
        len_base_B=base_2B[1],
        reward_BG=reward_BG,
        eta_BG=eta_BG,
        utility_BG=utility_BG,
        advantage_BG=advantage_BG,
        gate_BG=gate_BG,
        replaced_B=replaced_B,
        coef_post_T=coef_post_T,
        coef_prior_T=coef_prior_T,
    )


def _constants_of(options: GroupOptions) -> dict[str, Any]:
    """The kernel's constants; float() of an int, which would be an integer in device code."""
    low, high = options.eta_clip or (None, None)
    return {
        "ALPHA": float(options.alpha),
        "LME": options.baseline == "lme",
        "REWARD": options.reward,
        "R_MARGIN": float(options.r_margin),
        "U_MIN": float(options.u_min),
        "CLAMP_U": options.clamp_u,
        "ETA_LOW": low if low is None else float(low),
        "ETA_HIGH": high if high is None else float(high),
        "EPS": float(options.eps),
        "DDOF": options.ddof,
        "STD_GATE": float(options.std_gate),
    }


def gated_kl(
    logq_T: Tensor,
    logp_U: Tensor,
    cu_seqlens: Tensor,
    advantage_S: Tensor,
    weight_S: Tensor,
    *,
    prior_index: Tensor | None = None,
    gate_S: Tensor | None = None,
) -> GatedKl:
    """Path sums, the stop-gradient gated KL and the logged parts of the loss, in two launches.

    Formulas at the top of the file; values only, no gradient: the loss made it already.

    logq_T: (T,) float32 or float64, log-probs of the posterior rows. logp_U: (U,), the same dtype,
        of the prior rows.
    cu_seqlens: (S + 1,) int32 or int64, 0 = first <= ... <= last = T.
    advantage_S, weight_S: (S,) float. Sequences with w A = 0 may hold NaN in logq.
    prior_index: (P,) int64 without repeats, the sequences that logp_U holds, in its order. None:
        all of them, U = T.
    gate_S: (S,) bool; None means A > 0.

    Errors that only values show cost no synchronisation, they come back as NaN: boundaries out of
    range in logq_S; a gated sequence that the prior stream lacks, one that it holds twice, and all
    that it holds when prior_index does not fit U, in logp_S.
    ValueError: shapes, dtypes, devices, no CUDA device.
    """
    sequences = advantage_S.shape[0] if advantage_S.ndim == 1 else -1
    _check_device(logq_T)
    for name, x, dtypes, shape in (
        ("logq_T", logq_T, FLOATS, (logq_T.numel(),)),
        ("logp_U", logp_U, (logq_T.dtype,), (logp_U.numel(),)),
        ("advantage_S", advantage_S, FLOATS, (sequences,)),
        ("weight_S", weight_S, FLOATS, (sequences,)),
        ("cu_seqlens", cu_seqlens, INTEGERS, (sequences + 1,)),
        ("gate_S", gate_S, (torch.bool,), (sequences,)),
    ):
        _check(name, x, dtypes=dtypes, shape=shape, like=logq_T)
    if prior_index is not None:
        shape = (prior_index.numel(),)
        _check("prior_index", prior_index, dtypes=(torch.int64,), shape=shape, like=logq_T)
    elif logp_U.shape != logq_T.shape:
        raise ValueError(
            f"logp_U: got {logp_U.numel()} rows, expected {logq_T.numel()} as in logq_T; pass "
            "prior_index when the prior stream holds only some sequences"
        )
    like: Any = {"dtype": logq_T.dtype, "device": logq_T.device}
    logq_S, logp_S, kl_S = torch.empty(3, sequences, **like)
    gate_out_S = torch.empty(sequences, dtype=torch.bool, device=logq_T.device)
    parts_2 = torch.empty(2, **like)
    # Two launches: the sequences can be added only when every one of them is known.
    advantage_S = advantage_S.detach().contiguous()
    if sequences > 0:
        _path_sums_kernel[(sequences,)](
            logq_ptr=logq_T.detach().contiguous(),
            logp_ptr=logp_U.detach().contiguous(),
            cu_ptr=cu_seqlens.contiguous(),
            index_ptr=_contiguous(prior_index),
            advantage_ptr=advantage_S,
            gate_in_ptr=_contiguous(gate_S),
            logq_out_ptr=logq_S,
            logp_out_ptr=logp_S,
            gate_ptr=gate_out_S,
            kl_ptr=kl_S,
            n_sequences=sequences,
            n_tokens=logq_T.numel(),
            n_prior_tokens=logp_U.numel(),
            n_prior=0 if prior_index is None else prior_index.numel(),
            BLOCK=TILE,
            enable_fp_fusion=False,
        )
    _loss_parts_kernel[(1,)](
        logq_ptr=logq_S,
        kl_ptr=kl_S,
        advantage_ptr=advantage_S,
        weight_ptr=weight_S.detach().contiguous(),
        parts_ptr=parts_2,
        n_sequences=sequences,
        BLOCK=TILE,
        enable_fp_fusion=False,
    )
    pg_loss, distill_loss = parts_2.unbind(0)
    return GatedKl(
        logq_S=logq_S,
        logp_S=logp_S,
        gate_S=gate_out_S,
        kl_S=kl_S,
        pg_loss=pg_loss,
        distill_loss=distill_loss,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


def _check_group(
    answer_logp_A: Tensor,
    len_post_BG: Tensor,
    len_prior_BN: Tensor,
    *,
    cu_answers: Tensor | None,
    accept_BG: Tensor | None,
) -> tuple[int, int, int]:
    """B, G, N."""
    shapes = tuple(len_post_BG.shape), tuple(len_prior_BN.shape)
    if [len(s) for s in shapes] != [2, 2] or shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"len_post {shapes[0]}, len_prior {shapes[1]}: expected (B, G) and (B, N) with one B"
        )
    (questions, group), n_prior = shapes[0], shapes[1][1]
    if group < 2 or n_prior < 1:
        raise ValueError(
            f"got G = {group} posterior and N = {n_prior} prior paths a question, expected G >= 2 "
            "and N >= 1: one path has nothing to be compared with, and prior paths set the "
            "baselines; sample more"
        )
    # Without boundaries there is one value per path, with them any number of tokens.
    paths = questions * (group + n_prior)
    _check_device(answer_logp_A)
    values = answer_logp_A.numel() if cu_answers is not None else paths
    for name, x, dtypes, shape in (
        ("answer_logp_A", answer_logp_A, FLOATS, (values,)),
        ("len_post_BG", len_post_BG, (*FLOATS, *INTEGERS), shapes[0]),
        ("len_prior_BN", len_prior_BN, (*FLOATS, *INTEGERS), shapes[1]),
        ("cu_answers", cu_answers, INTEGERS, (paths + 1,)),
        ("accept_BG", accept_BG, (torch.bool,), shapes[0]),
    ):
        _check(name, x, dtypes=dtypes, shape=shape, like=answer_logp_A)
    return questions, group, n_prior


def _check_paths(
    *, weight_BG: Tensor | None, cu_paths: Tensor | None, tokens: int, like_BG: Tensor, beta: float
) -> None:
    if (weight_BG is None) != (cu_paths is None):
        missing = "weight_BG" if weight_BG is None else "cu_paths"
        raise ValueError(
            f"{missing} is missing: token coefficients need weight_BG, cu_paths and tokens"
        )
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta: got {beta}, expected a finite number >= 0")
    if tokens < 0 or (tokens > 0 and (cu_paths is None or like_BG.numel() == 0)):
        raise ValueError(
            f"tokens: got {tokens} with {like_BG.numel()} paths, expected the length of the packed "
            "stream of cu_paths, 0 without it"
        )
    shape, bounds = tuple(like_BG.shape), (like_BG.numel() + 1,)
    _check("weight_BG", weight_BG, dtypes=FLOATS, shape=shape, like=like_BG)
    _check("cu_paths", cu_paths, dtypes=INTEGERS, shape=bounds, like=like_BG)


def _check_device(x: Tensor) -> None:
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"got tensors on {x.device}, expected CUDA: use vpgea_fast.kernels.reference there"
        )


def _check(
    name: str,
    x: Tensor | None,
    *,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    like: Tensor,
) -> None:
    if x is None:
        return
    if x.dtype not in dtypes or tuple(x.shape) != shape or x.device != like.device:
        raise ValueError(
            f"{name}: got {x.dtype} {tuple(x.shape)} on {x.device}, expected "
            f"{' or '.join(str(d) for d in dtypes)} {shape} on {like.device}"
        )

"""Device code of group_advantage.py, where the formulas, the letters and the launches are.

One program per question for the scores; one per sequence, then one for all, for the loss's parts.
Arithmetic is float64, whatever the inputs. Nothing is read or written out of bounds: boundaries and
indices are checked here, where their values are, and what is wrong comes back as NaN or -1.
"""

# Triton types the values of device code as constexpr or tuple.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from vpgea_fast.kernels import reference

TILE = 1024  # elements a program holds at once

# A float argument of a kernel arrives as float32, and up to Triton 3.6 so does a float constexpr
# that meets a float64: eps = 1e-6 and log 1/2 would be wrong from the eighth digit, on the device
# and not in the interpreter. So options are constexpr and pass through _f64.
_NOISE_RELATIVE = tl.constexpr(reference.NOISE_RELATIVE)
_NOISE_NATS = tl.constexpr(reference.NOISE_NATS)
_LOG_HALF = tl.constexpr(reference.LOG_HALF)
_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


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


@triton.jit
def _base_utility(u, live, N: tl.constexpr, LME: tl.constexpr):
    """Ubar of the N prior paths: their mean, or the log of their mean likelihood."""
    if LME:
        peak = tl.max(tl.where(live, u, -_INF), 0)
        return peak + tl.log(tl.sum(tl.where(live, tl.exp(u - peak), 0.0), 0) / N)
    return tl.sum(tl.where(live, u, 0.0), 0) / N


@triton.jit
def _reward(u, u_base, REWARD: tl.constexpr, R_MARGIN: tl.constexpr):
    """R of the posterior paths before anything is refused."""
    gain = tl.maximum(u - u_base + _f64(R_MARGIN), 0.0)
    if REWARD == "paper":
        reward = gain
    elif REWARD == "likelihood_gate":
        reward = (u > _f64(_LOG_HALF)).to(tl.float64)
    else:
        reward = tl.where(u > _f64(_LOG_HALF), 1.0 + gain, 0.0)
    return reward


@triton.jit
def _length_factor(
    length, len_base, ALPHA: tl.constexpr, ETA_LOW: tl.constexpr, ETA_HIGH: tl.constexpr
):
    """(len_base / length)^alpha as a difference of logarithms: no quotient to overflow."""
    eta = tl.exp((tl.log(len_base) - tl.log(length)) * _f64(ALPHA))
    if ETA_LOW is not None:
        eta = tl.minimum(tl.maximum(eta, _f64(ETA_LOW)), _f64(ETA_HIGH))
    return eta


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _fill_paths(
    post_ptr,  # out, (n_tokens,) float32
    prior_ptr,  # out, laid out alike
    coef_post,  # (G_PAD, 1) float64
    coef_prior,
    start,  # (G_PAD,) int64: the path's tokens
    end,
    live,
    BLOCK: tl.constexpr,
):
    """Writes each path's coefficients at its tokens: a line of the tile walks along one path."""
    position = start[:, None] + tl.arange(0, BLOCK)[None, :]
    zero = tl.zeros([start.shape[0], BLOCK], tl.float64)
    for first in range(0, tl.max(tl.where(live, end - start, 0), 0), BLOCK):
        at = position + first
        mask = live[:, None] & (at < end[:, None])
        tl.store(post_ptr + at, zero + coef_post, mask=mask)
        tl.store(prior_ptr + at, zero + coef_prior, mask=mask)


@triton.jit(do_not_specialize=["n_answer_tokens", "n_tokens"])
def group_advantage_kernel(
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
        logp_ptr, cu_answers_ptr, row=at_G, live=live_G, n_tokens=n_answer_tokens,
        U_MIN=U_MIN, CLAMP=CLAMP_U, BLOCK=TILE // G_PAD,
    )  # fmt: skip
    # The prior paths' answers lie behind those of all B G posterior paths.
    u_prior, finite_N, inside_N = _answer_utility(
        logp_ptr, cu_answers_ptr, row=questions * G + at_N, live=live_N, n_tokens=n_answer_tokens,
        U_MIN=U_MIN, CLAMP=CLAMP_U, BLOCK=TILE // N_PAD,
    )  # fmt: skip
    u_base = _base_utility(u_prior, live_N, N=N, LME=LME)
    reward = _reward(u_post, u_base, REWARD=REWARD, R_MARGIN=R_MARGIN)
    if accept_ptr is not None:
        reward = tl.where(tl.load(accept_ptr + at_G, mask=live_G, other=0) != 0, reward, 0.0)

    len_post, counts_G = _token_counts(len_post_ptr, at_G, live_G)
    len_prior, counts_N = _token_counts(len_prior_ptr, at_N, live_N)
    len_base = tl.sum(tl.where(live_N, len_prior, 0.0), 0) / N
    eta = _length_factor(len_post, len_base, ALPHA=ALPHA, ETA_LOW=ETA_LOW, ETA_HIGH=ETA_HIGH)
    utility = reward * eta

    # One bad path makes its question NaN: the mean and the deviation have all of them inside.
    good_G = inside_G & counts_G & (tl.abs(utility) < _INF)
    if cu_paths_ptr is not None:
        start, end, inside_paths = _segments(cu_paths_ptr, at_G, live_G, n_tokens)
        good_G = good_G & inside_paths
    bad = _count(live_G & ~good_G) + _count(live_N & ~(inside_N & counts_N))
    advantage = tl.where(
        bad > 0, _NAN, _zscore(utility, live_G, G=G, EPS=EPS, DDOF=DDOF, GATE=STD_GATE)
    )
    gate = advantage > 0
    replaced = _count(live_G & ~finite_G) + _count(live_N & ~finite_N)

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
        weight = tl.load(weight_ptr + at_G, mask=live_G, other=0.0).to(tl.float64)
        coef_post = tl.where(advantage == 0, 0.0, -advantage * weight)[:, None]
        coef_prior = tl.where(gate, -weight * _f64(BETA), 0.0)[:, None]
        coef_prior = tl.where(bad > 0, _NAN, coef_prior)
        _fill_paths(
            coef_post_ptr, coef_prior_ptr, coef_post=coef_post, coef_prior=coef_prior,
            start=start, end=end, live=live_G, BLOCK=TILE // G_PAD,
        )  # fmt: skip


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
def path_sums_kernel(
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
def loss_parts_kernel(
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

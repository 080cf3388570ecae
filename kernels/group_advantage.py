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

The device code is in group_kernels.py. These kernels are small. What they save is launches, not
bandwidth: see README.md.
"""

# Triton types a launch and the values of device code as constexpr or tuple.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

from vpgea_fast.kernels import reference
from vpgea_fast.kernels.group_kernels import (
    TILE,
    group_advantage_kernel,
    loss_parts_kernel,
    path_sums_kernel,
)
from vpgea_fast.kernels.options import PAPER, GroupOptions
from vpgea_fast.kernels.reference import GatedKl

Tensor = torch.Tensor

# What the kernels load; half-precision scores have too few digits to be compared.
FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupScores(reference.GroupAdvantage):
    """`GroupAdvantage` and the coefficient of every posterior path's token in both streams.

    For its example with tokens (1, 2), w = (1, 1), beta = 0.5: coef_post = (-1, 1, 1),
    coef_prior = (-0.5, 0, 0). None where no weight was given.
    """

    coef_post_T: Tensor | None  # (T,) float32
    coef_prior_T: Tensor | None  # (T,) float32, laid out alike


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
    """Answer log-probs to utility, advantage, gate and token coefficients (arXiv 2605.11019).

    answer_logp_A: float32 or float64, the answer tokens of the B G posterior, then of the B N
        prior paths, back to back, in the student's view.
    cu_answers: (B (G + N) + 1,) int32 or int64, 0 = first <= ... <= last = A. None: answer_logp_A
        holds one value a path, U itself.
    len_post_BG, len_prior_BN: tokens of each path, int or float; 0 counts as 1.
    accept_BG: bool; False makes R = 0.
    weight_BG, cu_paths, tokens: per-path normaliser w (float), boundaries (B G + 1,) of the
        posterior paths in their packed stream, and its length T, a host number. With them come the
        coefficients (T,) float32 of both streams, which are laid out alike.
    beta: weight of the distillation.

    A NaN or infinite U becomes u_min and is counted. A length that is negative or not finite, an
    infinite S and boundaries that fall or leave their tensor give replaced_B = -1, NaN advantages
    and NaN coefficients; so do, alone, tokens that no path claims. No host waits. Options are
    compiled in: a new value costs a compile.
    ValueError: shapes, dtypes, devices, options, G < 2, N < 1, no CUDA device.
    """
    questions, group, n_prior = _check_group(
        answer_logp_A, len_post_BG, len_prior_BN, cu_answers=cu_answers, accept_BG=accept_BG
    )
    options.check_group_size(group)
    _check_paths(weight_BG, cu_paths=cu_paths, tokens=tokens, like_BG=len_post_BG, beta=beta)
    new: Any = functools.partial(torch.empty, device=answer_logp_A.device)
    post_5BG = new(5, questions, group, dtype=torch.float64)  # U, R, eta, S, A
    u_prior_BN = new(questions, n_prior, dtype=torch.float64)
    base_2B = new(2, questions, dtype=torch.float64)  # Ubar, len_base
    gate_BG = new(questions, group, dtype=torch.bool)
    replaced_B = new(questions, dtype=torch.int32)
    coef_post_T = coef_prior_T = None
    if cu_paths is not None:
        # The fill is for tokens that no path claims: a wrong boundary must not pass unseen.
        coef_post_T, coef_prior_T = torch.full((2, tokens), torch.nan, device=gate_BG.device)
    if questions > 0:
        group_advantage_kernel[(questions,)](
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
            G_PAD=triton.next_power_of_2(group),  # lanes of a tile; those beyond G are masked
            N_PAD=triton.next_power_of_2(n_prior),
            BETA=float(beta),
            TILE=max(TILE, triton.next_power_of_2(max(group, n_prior))),
            # A fused multiply-add rounds once where reference.py rounds twice.
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
    low, high = options.eta_clip or (None, None)  # None: the clip is not compiled in
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
    sequences = advantage_S.shape[0] if advantage_S.ndim == 1 else -1  # -1: no shape
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
        path_sums_kernel[(sequences,)](
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
    loss_parts_kernel[(1,)](
        logq_ptr=logq_S,
        kl_ptr=kl_S,
        advantage_ptr=advantage_S,
        weight_ptr=weight_S.detach().contiguous(),
        parts_ptr=parts_2,
        n_sequences=sequences,
        BLOCK=TILE,
        enable_fp_fusion=False,
    )
    pg_loss, distill_loss = parts_2.unbind(0)  # views: nothing is launched
    return GatedKl(
        logq_S=logq_S,
        logp_S=logp_S,
        gate_S=gate_out_S,
        kl_S=kl_S,
        pg_loss=pg_loss,
        distill_loss=distill_loss,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    # The kernels take no strides; a contiguous tensor is not copied.
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
    # Without boundaries there is one value per path, with them any number of tokens, whose sum is
    # seen on the device alone.
    paths = questions * (group + n_prior)  # posterior ones first
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
    weight_BG: Tensor | None, *, cu_paths: Tensor | None, tokens: int, like_BG: Tensor, beta: float
) -> None:
    # One constexpr branch of the kernel needs both.
    if (weight_BG is None) != (cu_paths is None):
        missing = "weight_BG" if weight_BG is None else "cu_paths"
        raise ValueError(
            f"{missing} is missing: token coefficients need weight_BG, cu_paths and tokens"
        )
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta: got {beta}, expected a finite number >= 0")
    # Without boundaries no path would claim a token, and all coefficients stay NaN.
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
    # One sentence for the three: a caller who is wrong in one is often wrong in two.
    if x.dtype not in dtypes or tuple(x.shape) != shape or x.device != like.device:
        raise ValueError(
            f"{name}: got {x.dtype} {tuple(x.shape)} on {x.device}, expected "
            f"{' or '.join(str(d) for d in dtypes)} {shape} on {like.device}"
        )

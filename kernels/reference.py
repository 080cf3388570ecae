"""Every op in plain PyTorch: the specification of every other backend and the oracle of the tests.

T, U tokens, K kept rows, D hidden, V vocabulary, S sequences; B questions with G posterior and N
prior paths each. All logits are held at once, so memory is O(T V): small shapes only.

| | inputs | arithmetic | outputs |
|---|---|---|---|
| head: fp16, bf16, fp32 | as given | float32 | float32 |
| head: float64 | float64 | float64 | float64 |
| groups | any | float64 | float64 |
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from vpgea_fast.kernels.contract import NO_SINKS, Head, Sinks, Upstream, Values
from vpgea_fast.kernels.options import PAPER, GroupOptions

Tensor = torch.Tensor


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, log-sum-exp and entropy of each row: three (T,), by autograd.

        a = logit_scale (h . w) + bias        z = softcap tanh(a / softcap) / temperature
        logp = z_target - lse(z)              entropy = -sum_v p_v log p_v

    logp is written as log sigmoid(z_target - lse of the other classes): the same number, but exact
    where p is close to 1, never above 0, and its autograd gradient at the target is 1 - p without
    the cancellation. Ignored rows are never read and give 0 three times.
    """
    kept_T = targets_T != ignore_index
    targets_K1 = targets_T[kept_T].unsqueeze(1)
    z_KV = _logits(
        hidden_TD,
        weight_VD,
        kept_T,
        bias_V=bias_V,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    z_target_K = z_KV.gather(1, targets_K1).squeeze(1)
    # The lowest finite number and not -inf: where all others are -inf, -inf - -inf is NaN.
    others_KV = z_KV.scatter(1, targets_K1, torch.finfo(z_KV.dtype).min)
    logp_K = F.logsigmoid(z_target_K - others_KV.logsumexp(1))
    lse_K = z_KV.logsumexp(1)
    log_p_KV = z_KV - lse_K.unsqueeze(1)
    p_KV = log_p_KV.exp()
    # p log p is 0 at p = 0, where log p is -inf; the mask keeps its gradient finite too.
    entropy_K = -(p_KV * log_p_KV.masked_fill(p_KV == 0, 0.0)).sum(1)

    zero_T = hidden_TD.new_zeros(targets_T.shape, dtype=z_KV.dtype)
    logp_T, lse_T, entropy_T = (
        zero_T.masked_scatter(kept_T, row_K) for row_K in (logp_K, lse_K, entropy_K)
    )
    return logp_T, lse_T, entropy_T


def _logits(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    kept_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """z of the kept rows, (K, V): a row that is ignored may hold NaN, and is not read."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    a_KV = logit_scale * (hidden_TD[kept_T].to(dtype) @ weight_VD.to(dtype).T)
    if bias_V is not None:
        a_KV = a_KV + bias_V
    if softcap is not None:
        a_KV = softcap * torch.tanh(a_KV / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[kept_T].unsqueeze(1)
    return a_KV / temperature


def row_statistics(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, ignore_index: int = -100, **head
) -> tuple[Tensor, Tensor, Tensor]:
    """Three (T,): whether the target is the first of the largest logits, mean_v z_v and
    log sum_v p_v^2. Ignored rows give False, 0 and 0. `head`: as in `linear_logprob`.
    """
    kept_T = targets_T != ignore_index
    z_KV = _logits(hidden_TD, weight_VD, kept_T, **head)
    top1_K = z_KV.argmax(1) == targets_T[kept_T]
    log_sum_p2_K = (2.0 * z_KV.log_softmax(1)).logsumexp(1)
    top1_T, mean_T, log_sum_p2_T = (
        row_K.new_zeros(targets_T.shape).masked_scatter(kept_T, row_K)
        for row_K in (top1_K, z_KV.mean(1), log_sum_p2_K)
    )
    return top1_T, mean_T, log_sum_p2_T


def weighted_logprob_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    coef_T: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **head,
) -> Tensor:
    """sum_t c_t [(1 - s) log p_t + s mean_v log p_tv - z lse_t^2] (0-dim), s = label_smoothing, z =
    z_loss, over the rows with c_t != 0 and a target that is not ignored."""
    live_T = targets_T.masked_fill(coef_T == 0, ignore_index)
    rows, head = (hidden_TD, weight_VD, live_T), {**head, "ignore_index": ignore_index}
    logp_T, lse_T, _ = linear_logprob(*rows, **head)
    coef_T = coef_T.to(logp_T.dtype).masked_fill(live_T == ignore_index, 0.0)
    if label_smoothing:
        # mean_v log p_v = mean_v z_v - lse; no lerp, of which two -inf make NaN.
        smooth_T = row_statistics(*rows, **head)[1] - lse_T
        logp_T = (1.0 - label_smoothing) * logp_T + label_smoothing * smooth_T
    return (coef_T * (logp_T - z_loss * lse_T.square())).sum()


def distillation_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    coef_T: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    student_head: dict[str, Any] | None = None,
    teacher_head: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_t c_t D_t (0-dim), by autograd, and D_t (T,), 0 where c_t = 0; the teacher is a constant.

        D = KL(p || q)   or   KL(q || p)   or   beta KL(p || m) + (1 - beta) KL(q || m)
        m = beta p + (1 - beta) q          p of the teacher, q of the student

    student, teacher: hidden states (T, D) and weight (V, D), each D its own; the heads' options as
    in `linear_logprob`. jsd at beta 0 is forward_kl, at 1 reverse_kl, as in TRL and Liger.
    """
    kept_T = coef_T != 0
    log_q_KV, log_p_KV = (
        _logits(*x, kept_T, temperature=temperature, **(head or {})).log_softmax(1)
        for x, head in ((student, student_head), (teacher, teacher_head))
    )
    log_p_KV = log_p_KV.detach()
    # The ends of jsd by convention: its own value there is 0.
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        divergence_K = _kl(log_p_KV, log_q_KV)
    elif divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
        divergence_K = _kl(log_q_KV, log_p_KV)
    else:
        log_m_KV = torch.logaddexp(log_p_KV + math.log(beta), log_q_KV + math.log1p(-beta))
        divergence_K = beta * _kl(log_p_KV, log_m_KV) + (1 - beta) * _kl(log_q_KV, log_m_KV)
    zero_T = divergence_K.new_zeros(kept_T.shape)
    divergence_T = zero_T.masked_scatter(kept_T, divergence_K)
    return (coef_T.masked_fill(~kept_T, 0.0) * divergence_T).sum(), divergence_T


def _kl(log_a_KV: Tensor, log_b_KV: Tensor) -> Tensor:
    """(K,): KL(a || b) of each row; 0 log 0 is 0, and its gradient too."""
    gap_KV = (log_a_KV - log_b_KV).masked_fill(log_a_KV == -math.inf, 0.0)
    return (log_a_KV.exp() * gap_KV).sum(1)


def segment_sum(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum over each packed sequence: (T,) and boundaries (S + 1,) give (S,)."""
    sums = [values_T[start:end].sum() for start, end in pairwise(cu_seqlens.tolist())]
    return torch.stack(sums) if sums else values_T.new_zeros(0)


# Scores come from float32 kernels: equal paths may differ in the last bits, and a z-score would
# blow that up to unit variance. Below 1e-7 nats nothing was measured either.
NOISE_RELATIVE = 8 * torch.finfo(torch.float32).eps
NOISE_NATS = 1e-7
LOG_HALF = math.log(0.5)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupAdvantage:
    """Scores of B questions, float64.

    One question, U = (-1, -5 | -1, -3), lengths (50, 200 | 100, 300): u_base = -2, len_base = 200,
    reward = (1, 0), eta = (2, 1), utility = (2, 0), advantage = (1, -1), gate = (True, False).
    """

    u_post_BG: Tensor  # nats
    u_prior_BN: Tensor  # nats
    u_base_B: Tensor  # nats
    len_base_B: Tensor  # tokens
    reward_BG: Tensor
    eta_BG: Tensor
    utility_BG: Tensor
    advantage_BG: Tensor
    gate_BG: Tensor  # bool
    replaced_B: Tensor  # int: U that became u_min. -1: bad lengths or an infinite S; advantage NaN


def group_advantage(
    answer_logp_A: Tensor,
    len_post_BG: Tensor,
    len_prior_BN: Tensor,
    options: GroupOptions = PAPER,
    *,
    cu_answers: Tensor | None = None,
    accept_BG: Tensor | None = None,
) -> GroupAdvantage:
    """Answer log-probs -> utility, advantage and gate (VPG-EA, arXiv 2605.11019).

        U = sum_t log p(answer_t)         Ubar = mean_j U_j or log mean_j exp U_j, prior paths
        R = max(0, U - Ubar + r_margin) or 1[U > log 1/2] or 1[U > log 1/2] (1 + max(0, U - Ubar))
        eta = (len_base / len)^alpha      S = R eta, R = 0 where not accepted
        A = (S - mean S) / (std S + eps)  gate = 1[A > 0]

    answer_logp_A: the answer tokens of B G posterior, then B N prior paths, back to back;
    cu_answers (B (G + N) + 1,) their boundaries. None: one value a path, U itself.
    """
    o, n_post = options, len_post_BG.numel()
    u_P = answer_logp_A.double()
    if cu_answers is not None:
        u_P = segment_sum(u_P, cu_answers)
    # A path whose answer has probability 0 gives -inf, which would empty its whole group.
    finite_P = u_P.isfinite()
    u_P = torch.where(finite_P, u_P, o.u_min).clamp(min=o.u_min if o.clamp_u else -math.inf)
    u_post_BG, finite_BG = (x[:n_post].view(len_post_BG.shape) for x in (u_P, finite_P))
    u_prior_BN, finite_BN = (x[n_post:].view(len_prior_BN.shape) for x in (u_P, finite_P))

    u_base_B1 = u_prior_BN.mean(1, keepdim=True)
    if o.baseline == "lme":
        u_base_B1 = u_prior_BN.logsumexp(1, keepdim=True) - math.log(u_prior_BN.shape[1])
    gain_BG = (u_post_BG - u_base_B1 + o.r_margin).clamp(min=0)
    likely_BG = (u_post_BG > LOG_HALF).double()
    rewards = {"paper": gain_BG, "likelihood_gate": likely_BG}
    reward_BG = rewards.get(o.reward, likely_BG * (1 + gain_BG))
    if accept_BG is not None:
        reward_BG = torch.where(accept_BG, reward_BG, 0.0)
    # A path may be empty, and the length factor takes logarithms.
    len_base_B = len_prior_BN.double().clamp(min=1).mean(1)
    eta_BG = length_factor(len_post_BG, len_base_B, o)
    utility_BG = reward_BG * eta_BG

    # NaN where the input is wrong: the kernel, which this specifies, cannot raise.
    lengths = torch.cat((len_post_BG, len_prior_BN), 1).double()
    bad_B = ~(utility_BG.isfinite().all(1) & (lengths.isfinite() & (lengths >= 0)).all(1))
    advantage_BG = group_zscore(utility_BG, o).masked_fill(bad_B[:, None], math.nan)
    replaced_B = (~finite_BG).sum(1) + (~finite_BN).sum(1)
    return GroupAdvantage(
        u_post_BG=u_post_BG,
        u_prior_BN=u_prior_BN,
        u_base_B=u_base_B1.squeeze(1),
        len_base_B=len_base_B,
        reward_BG=reward_BG,
        eta_BG=eta_BG,
        utility_BG=utility_BG,
        advantage_BG=advantage_BG,
        gate_BG=advantage_BG > 0,
        replaced_B=torch.where(bad_B, -1, replaced_B),
    )


def length_factor(len_BG: Tensor, len_base_B: Tensor, options: GroupOptions = PAPER) -> Tensor:
    """eta = (len_base / max(len, 1))^alpha, clipped to eta_clip."""
    log_ratio_BG = len_base_B.log()[:, None] - len_BG.double().clamp(min=1).log()
    eta_BG = (options.alpha * log_ratio_BG).exp()
    return eta_BG if options.eta_clip is None else eta_BG.clamp(*options.eta_clip)


def group_zscore(utility_BG: Tensor, options: GroupOptions = PAPER) -> Tensor:
    """(S - mean) / (std + eps) in each row; 0 in a constant row or one with std < std_gate.

    Constant: max - min <= max(8 eps32 max|S|, 1e-7), decided before the division.
    """
    range_B1 = utility_BG.amax(1, keepdim=True) - utility_BG.amin(1, keepdim=True)
    noise_B1 = (NOISE_RELATIVE * utility_BG.abs().amax(1, keepdim=True)).clamp(min=NOISE_NATS)
    centred_BG = utility_BG - utility_BG.mean(1, keepdim=True)
    degrees = utility_BG.shape[1] - options.ddof
    std_B1 = (centred_BG.square().sum(1, keepdim=True) / degrees).sqrt()
    silent_B1 = (range_B1 <= noise_B1) | (std_B1 < options.std_gate)
    return torch.where(silent_B1, 0.0, centred_BG / (std_B1 + options.eps))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GatedKl:
    """What the log-probabilities of a step add up to; loss = pg_loss + beta distill_loss.

    Two one-token sequences, A = (1, -1), w = (1, 1), q = (1/2, 1/2), pi = (1/4, -): logq = (-0.69,
    -0.69), logp = (-1.39, 0), gate = (True, False), kl = (0.69, 0), pg_loss = 0, distill_loss =
    0.69.
    """

    logq_S: Tensor  # log q_s
    logp_S: Tensor  # log pi_s; without a prior row NaN where the gate is open, else 0
    gate_S: Tensor  # bool
    kl_S: Tensor  # gate_s (sg log q_s - log pi_s)
    pg_loss: Tensor  # 0-dim
    distill_loss: Tensor  # 0-dim


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
    """Sequence log-probs, the gated Monte-Carlo KL of both streams, and the parts of the loss.

        log q_s = sum_t log q_t               kl_s = gate_s (sg log q_s - log pi_s)
        pg_loss = -sum_s w_s A_s log q_s      distill_loss = sum_s w_s kl_s

    gate_S (bool): None means A_s > 0.
    prior_index (P,): the sequences that logp_U holds, in its order; None: all. A gated sequence
    without prior rows gives NaN; where w_s A_s = 0, log q_s may be anything.
    """
    gate_S = advantage_S > 0 if gate_S is None else gate_S
    index_P = torch.arange(len(gate_S)) if prior_index is None else prior_index
    cu_P = torch.nn.functional.pad(cu_seqlens.diff()[index_P].cumsum(0), (1, 0))
    logq_S = segment_sum(logq_T, cu_seqlens)
    # NaN until a prior row fills it: an open gate without one must show.
    logp_S = torch.where(gate_S, torch.nan, torch.zeros_like(logq_S))
    logp_S = logp_S.index_put((index_P,), segment_sum(logp_U, cu_P))
    kl_S = torch.where(gate_S, logq_S.detach() - logp_S, 0.0)
    coef_S = -weight_S * advantage_S
    # Masked, not multiplied by 0: a sequence that takes no part may hold NaN.
    pg_loss = (coef_S * logq_S.masked_fill(coef_S == 0, 0.0)).sum()
    distill_loss = (weight_S * kl_S.masked_fill(weight_S == 0, 0.0)).sum()
    return GatedKl(
        logq_S=logq_S,
        logp_S=logp_S,
        gate_S=gate_S,
        kl_S=kl_S,
        pg_loss=pg_loss,
        distill_loss=distill_loss,
    )


def vpgea_loss(
    hidden_post_TD: Tensor,
    hidden_prior_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    cu_seqlens: Tensor,
    advantage_S: Tensor,
    weight_S: Tensor,
    *,
    beta: float = 0.5,
    **head,
) -> Tensor:
    """VPG-EA's training loss (arXiv 2605.11019) on packed sequences, 0-dim.

    sum_s w_s [ -A_s log q_s + beta 1[A_s > 0] (sg log q_s - log pi_s) ]
    """
    logq_T, _, _ = linear_logprob(hidden_post_TD, weight_VD, targets_T, **head)
    logp_T, _, _ = linear_logprob(hidden_prior_TD, weight_VD, targets_T, **head)
    parts = gated_kl(
        logq_T, logp_T, cu_seqlens=cu_seqlens, advantage_S=advantage_S, weight_S=weight_S
    )
    return parts.pg_loss + beta * parts.distill_loss


def head_pass(
    hidden_TD: Tensor,
    head: Head,
    targets_K: Tensor,
    *,
    rows_K: Tensor,
    entropy: bool = False,
    statistics: bool = False,
    upstream: Upstream | None = None,
    sinks: Sinks = NO_SINKS,
    chunk_bytes: int | None = None,
) -> Values:
    """Meets the contract of chunked.head_pass by autograd; `chunk_bytes` is not used."""
    del chunk_bytes
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    # The caller is inside an autograd function, where grad mode is off.
    with torch.enable_grad():
        hidden_KD = hidden_TD.index_select(0, rows_K).to(dtype).detach().requires_grad_()
        weight_VD = head.weight.detach().to(dtype).requires_grad_()
        bias_V = None if head.bias is None else head.bias.detach().to(dtype).requires_grad_()
        rows = (hidden_KD, weight_VD, targets_K)
        options: dict[str, Any] = {
            "bias_V": bias_V,
            "temperature": head.temperature,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "ignore_index": -1,  # no target: the rows were selected before
        }
        logp_K, lse_K, entropy_K = linear_logprob(*rows, **options)
        skipped_K = None
        if upstream is not None:
            skipped_K = upstream.skipped(logp_K.detach(), head.temperature, slice(None))
            g_logp_K = upstream.logp
            if skipped_K is not None:
                g_logp_K = torch.where(skipped_K < 0, g_logp_K, 0.0)
            pairs = [(logp_K, g_logp_K), (lse_K, upstream.lse), (entropy_K, upstream.entropy)]
            if upstream.mean_logit is not None:
                pairs.append((row_statistics(*rows, **options)[1], upstream.mean_logit))
            pairs.append((lse_K.square(), upstream.lse_square))
            parts = [(value * g.to(dtype)).sum() for value, g in pairs if g is not None]
            leaves = [hidden_KD, weight_VD] + ([] if bias_V is None else [bias_V])
            # One sum: one backward for all upstream gradients.
            grads = torch.autograd.grad(torch.stack(parts).sum(), leaves)
            if sinks.hidden is not None:
                sinks.hidden.index_copy_(0, rows_K, grads[0].to(sinks.hidden.dtype))
            if sinks.weight is not None:
                sinks.weight.add_(grads[1])
            if sinks.bias is not None:
                sinks.bias.add_(grads[2])
    more = [x.detach() for x in row_statistics(*rows, **options)] if statistics else []
    made = Values(logp_K.detach(), lse_K.detach(), entropy_K.detach() if entropy else None, *more)
    return made._replace(skipped=skipped_K)

"""The language-model head in plain PyTorch: the specification of every other backend and the oracle
of the tests.

T tokens, K kept rows, D hidden, V vocabulary, S sequences. All logits are held at once, so memory
is O(T V): small shapes only.

| | inputs | arithmetic | outputs |
|---|---|---|---|
| fp16, bf16, fp32 | as given | float32 | float32 |
| float64 | float64 | float64 | float64 |
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

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
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    a_KV = logit_scale * (hidden_TD[kept_T].to(dtype) @ weight_VD.to(dtype).T)
    if bias_V is not None:
        a_KV = a_KV + bias_V
    if softcap is not None:
        a_KV = softcap * torch.tanh(a_KV / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[kept_T].unsqueeze(1)
    z_KV = a_KV / temperature

    z_target_K = z_KV.gather(1, targets_K1).squeeze(1)
    others_KV = z_KV.scatter(1, targets_K1, torch.finfo(dtype).min)
    logp_K = F.logsigmoid(z_target_K - others_KV.logsumexp(1))
    lse_K = z_KV.logsumexp(1)
    log_p_KV = z_KV - lse_K.unsqueeze(1)
    p_KV = log_p_KV.exp()
    entropy_K = -(p_KV * log_p_KV.masked_fill(p_KV == 0, 0.0)).sum(1)

    zero_T = hidden_TD.new_zeros(targets_T.shape, dtype=dtype)
    logp_T, lse_T, entropy_T = (
        zero_T.masked_scatter(kept_T, row_K) for row_K in (logp_K, lse_K, entropy_K)
    )
    return logp_T, lse_T, entropy_T


def weighted_logprob_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    coef_T: Tensor,
    *,
    ignore_index: int = -100,
    **head,
) -> Tensor:
    """sum_t c_t log p_t (0-dim) over the rows with c_t != 0 and a target that is not ignored."""
    live_T = targets_T.masked_fill(coef_T == 0, ignore_index)
    logp_T, _, _ = linear_logprob(hidden_TD, weight_VD, live_T, ignore_index=ignore_index, **head)
    coef_T = coef_T.to(logp_T.dtype).masked_fill(live_T == ignore_index, 0.0)
    return (coef_T * logp_T).sum()


def segment_sum(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum over each packed sequence: (T,) and boundaries (S + 1,) give (S,)."""
    sums = [values_T[start:end].sum() for start, end in pairwise(cu_seqlens.tolist())]
    return torch.stack(sums) if sums else values_T.new_zeros(0)


def gated_kl(
    logq_T: Tensor, logp_T: Tensor, cu_seqlens: Tensor, advantage_S: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequence log-probs and the gated Monte-Carlo KL of both streams: logq, logp, gate, kl, (S,).

    log q_s = sum_t log q_t     log pi_s = sum_t log pi_t     gate_s = 1[A_s > 0]
    kl_s = gate_s (sg log q_s - log pi_s)
    """
    logq_S, logp_S = segment_sum(logq_T, cu_seqlens), segment_sum(logp_T, cu_seqlens)
    gate_S = advantage_S > 0
    return logq_S, logp_S, gate_S, gate_S * (logq_S.detach() - logp_S)


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
    logq_S, _, _, kl_S = gated_kl(logq_T, logp_T, cu_seqlens, advantage_S)
    return (weight_S * (-advantage_S * logq_S + beta * kl_S)).sum()


def head_pass(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_K: Tensor,
    *,
    rows_K: Tensor,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    upstream: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
    dhidden_TD: Tensor | None = None,
    dweight_VD: Tensor | None = None,
    dbias_V: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The backend contract (see chunked.head_pass) met by autograd; `chunk_bytes` is not used."""
    del chunk_bytes
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    with torch.enable_grad():
        hidden_KD = hidden_TD.index_select(0, rows_K).to(dtype).detach().requires_grad_()
        weight = weight_VD.detach().to(dtype).requires_grad_()
        bias = None if bias_V is None else bias_V.detach().to(dtype).requires_grad_()
        logp_K, lse_K, entropy_K = linear_logprob(
            hidden_KD,
            weight,
            targets_K,
            bias_V=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=-1,
        )
        if upstream is not None:
            values = (logp_K, lse_K, entropy_K)
            pairs = [
                (v, g.to(dtype)) for v, g in zip(values, upstream, strict=True) if g is not None
            ]
            total = torch.stack([(v * g).sum() for v, g in pairs]).sum()
            leaves = [hidden_KD, weight] + ([] if bias is None else [bias])
            grads = torch.autograd.grad(total, leaves)
            if dhidden_TD is not None:
                dhidden_TD.index_copy_(0, rows_K, grads[0].to(dhidden_TD.dtype))
            if dweight_VD is not None:
                dweight_VD.add_(grads[1])
            if dbias_V is not None:
                dbias_V.add_(grads[2])
    return logp_K.detach(), lse_K.detach(), entropy_K.detach() if entropy else None

"""Packed attention for any Hugging Face causal LM: documents laid end to end never see each other.

Registered with transformers as `vpgea_varlen`. A call that carries `seqlens` (lengths of the
documents, in order) is packed: every document is attended on its own, causally, on any device. A
call without it is ordinary sdpa, so the same module also generates. The lengths travel with the
call because nothing else is safe: with position_ids alone transformers finds the documents only
when attention_mask is None and use_cache is False, and leaks silently otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "vpgea_varlen"


def register() -> str:
    """Make the name known to transformers (idempotent); returns it for `attn_implementation=`."""
    AttentionInterface.register(IMPLEMENTATION, varlen_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    return IMPLEMENTATION


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    seqlens: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each of the documents of a packed row.

    query (1, H, T, d), key and value (1, H_kv, T, d) with T = sum(seqlens); returns (1, T, H, d).
    Attention dropout is not applied: on-policy log-probs must be those that the sampler saw.
    Errors: ValueError for a batch that is not one packed row of sum(seqlens) tokens, or a sliding
    window shorter than a document.
    """
    if seqlens is None:
        kwargs.pop("dropout", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1 or query.shape[2] != sum(seqlens):
        raise ValueError(
            f"packed attention: expected one row of {sum(seqlens)} tokens (the sum of seqlens), "
            f"got a batch of {query.shape[0]} x {query.shape[2]}"
        )
    if sliding_window is not None and max(seqlens) > sliding_window:
        raise ValueError(
            f"packed attention: a document of {max(seqlens)} tokens is longer than the model's "
            f"sliding window of {sliding_window}; shorten the rollouts or use a model without one"
        )
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v in zip(
            *(x.split(list(seqlens), dim=2) for x in (query, key, value)), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _mask(
    *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """No (T, T) mask for packed calls; left-padded generation gets sdpa's."""
    return (
        None
        if attention_mask is None
        else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    )

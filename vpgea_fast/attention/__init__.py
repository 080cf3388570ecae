"""Packed attention for any Hugging Face causal LM: documents laid end to end never see each other.

    flash    flash-attn: FA3 or FA4 on Hopper, FA4 or FA2 on Blackwell, FA2 on Ampere (CUDA)
    varlen   torch.nn.attention.varlen.varlen_attn (CUDA)
    sdpa     one scaled_dot_product_attention a document (any device, any dtype)

`choose_for` takes the first that runs, `register` makes it an attention implementation of
transformers, `packed_inputs` makes the arguments of a packed call. The same module also generates:
a call without documents is ordinary sdpa, padding included, whatever the backend.

The lengths travel with the call because nothing else is safe: with position_ids alone transformers
finds the documents only when attention_mask is None and use_cache is False, and leaks silently
otherwise. What changes a result is computed or refused, never ignored: sliding windows and softcap
are computed (softcap not by varlen), sinks, position biases and layers without attention refused.

On CUDA the backward of a GPU kernel adds in no fixed order unless
torch.use_deterministic_algorithms is on; then it is bitwise repeatable, and slower.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vpgea_fast.attention.choice import (
    FLASH_MODULES,
    FLASH_PACKAGES,
    HALF,
    NAMES,
    Choice,
    Machine,
    check_model,
    choose,
    choose_for,
    look,
    no_flash,
    positions,
)
from vpgea_fast.attention.kernels import (
    Documents,
    Form,
    Kernel,
    best_flash_kernel,
    by_document,
    flash_kernel,
    softcapped,
    varlen_kernel,
)
from vpgea_fast.types import PackedBatch

__all__ = [
    "FLASH_MODULES",
    "FLASH_PACKAGES",
    "HALF",
    "NAMES",
    "Choice",
    "Documents",
    "Form",
    "Kernel",
    "Machine",
    "best_flash_kernel",
    "check_model",
    "choose",
    "choose_for",
    "flash_kernel",
    "look",
    "no_flash",
    "packed_attention",
    "packed_inputs",
    "positions",
    "register",
    "varlen_kernel",
]

WITHOUT_EFFECT = {
    *("cache_position", "logits_to_keep", "num_items_in_batch", "output_hidden_states"),
    *("position_ids", "return_dict", "use_cache"),
}
"""Keyword arguments that models hand down to attention and that do not concern it."""


def register(backend: str = "sdpa") -> str:
    """Make a backend known to transformers (idempotent); returns its `attn_implementation`."""
    # sdpa has no kernel: without one `packed_attention` goes document by document.
    make = {"flash": best_flash_kernel, "varlen": varlen_kernel}.get(backend)
    attention = functools.partial(packed_attention, kernel=None if make is None else make())
    AttentionInterface.register(NAMES[backend], attention)
    # Calls without documents end in sdpa, and want the masks that transformers makes for it.
    AttentionMaskInterface.register(NAMES[backend], sdpa_mask)
    return NAMES[backend]


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """The keyword arguments of a Hugging Face decoder (or causal LM) for a packed batch.

    The mask of no elements is a mask that transformers passes on as it is: it makes none of T x T
    and does not look for documents in position_ids, which costs a host sync on CUDA. Attention that
    meets it without `documents` knows that the layers dropped them.
    """
    # seqlens are numbers of the host: nothing here waits for a device.
    if sum(batch.seqlens) != batch.input_ids.numel():
        raise ValueError(
            f"packed attention: expected {sum(batch.seqlens)} tokens (the sum of seqlens), got "
            f"{batch.input_ids.numel()}"
        )
    # (1, T): one row.
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "attention_mask": batch.input_ids.new_empty(0, 0, 0, 0),
        "use_cache": False,  # a cache would keep the keys and values of every layer
        "documents": Documents(batch.seqlens, batch.cu_seqlens),
    }


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: Kernel | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - not applied: log-probs must be those the sampler saw
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each of the documents of a packed row; without them, plain sdpa.

    query (1, H, T, d), key and value (1, K, T, d) with T = sum(documents.seqlens) and H a multiple
    of K; returns (1, T, H, d). Errors: ValueError for a batch that is not one packed row, a mask
    beside the documents, documents that did not arrive, and arguments that would change the result
    and are not computed.
    """
    # The mark of packed_inputs: where it arrives without documents, a layer has dropped them.
    empty = attention_mask is not None and attention_mask.numel() == 0
    if documents is None:
        if empty:
            raise ValueError(
                f"packed attention: the layers around {type(module).__name__} do not hand "
                "`documents` down to it, so they would see each other; take another model"
            )
        # Sampling, and forwards without packing: the window is in the mask.
        return _unpacked(
            module,
            query,
            key=key,
            value=value,
            mask=attention_mask,
            form=Form(scaling, None, softcap),
            **kwargs,
        )
    if attention_mask is not None and not empty:
        raise ValueError(
            f"packed attention: got a mask {tuple(attention_mask.shape)} beside the documents, "
            "which say it all; call the model with attention.packed_inputs"
        )
    _refuse(kwargs, WITHOUT_EFFECT)
    if query.shape[0] != 1:
        raise ValueError(f"packed attention: expected one row, got a batch of {query.shape[0]}")
    query, key, value = _autocast(query, key, value)
    # The lengths of the host are enough for it, and values may be narrower than keys (DeepSeek).
    if kernel is None:
        form = Form(scaling, sliding_window, softcap)
        return by_document(query, key, value=value, documents=documents, form=form), None
    if documents.cu_seqlens is None:
        raise ValueError(
            "packed attention: a kernel needs cu_seqlens; call the model with "
            "attention.packed_inputs"
        )
    if value.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"model.attention: queries of size {query.shape[-1]} and values of {value.shape[-1]} "
            "are for 'sdpa' only; set it"
        )
    # A window as long as the longest document hides nothing: plain causal attention.
    limited = sliding_window is not None and sliding_window < documents.max_seqlen
    # (1, H, T, d) -> (T, H, d), as views.
    out_THd = kernel(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        documents.cu_seqlens,
        documents.max_seqlen,
        Form(scaling, sliding_window if limited else None, softcap),
    )
    # The second is the attention weights, which no kernel makes.
    return out_THd[None], None


def _unpacked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    form: Form,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Ordinary attention with the mask that transformers made (window and padding are in it)."""
    # These three sdpa_attention_forward computes.
    _refuse(kwargs, {*WITHOUT_EFFECT, "cache", "is_causal", "position_bias"})
    if form.softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=form.scale, **kwargs)
    # sdpa has no cap: from here on it is softcapped, which computes none of the three.
    _refuse(kwargs, WITHOUT_EFFECT)
    query, key, value = _autocast(query, key, value)
    length = query.shape[2]
    if mask is None and length > 1:  # transformers leaves it out where it is the plain triangle
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()
    out = softcapped(query, key, value=value, mask=mask, form=form)
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs: Mapping[str, Any], known: set[str]) -> None:
    """Whatever has a value, is not known and could change the result is an error."""
    for name, value in kwargs.items():
        usual = name == "is_causal"  # True is what is computed; any other switch is off
        if value is not None and value is not usual and name not in known:
            raise ValueError(
                f"attention: the model passes {name}, which is not computed here and would change "
                "the result; take another model"
            )


def _autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """To autocast's dtype where it is on: rotary embeddings leave query and key in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    # Autocast itself never narrows float64.
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]

"""Attention inside each document of a packed row, by flash-attn, by torch's varlen_attn, or one
scaled_dot_product_attention per document."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vpgea_fast.attention.choice import HALF, VARLEN_MODULE, flash_function, look, no_flash


class Form(NamedTuple):
    """softmax(softcap tanh(scale q k / softcap)) v over the last `window` tokens, the own one in
    it; scale None is 1 / sqrt(d), window None all tokens before, softcap None no tanh."""

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


class Documents:
    """Where the documents of a packed row end: lengths for the host and for a kernel.

    max_seqlen is an upper bound, at least 2: at 1 flash-attn takes a path made for decoding, which
    swaps heads and queries, and torch.compile takes 1 for a constant. A plain object, because
    torch.compile looks into tuples and frozen dataclasses and makes a graph for every number of
    documents; of this it sees what a kernel reads.
    """

    def __init__(self, seqlens: tuple[int, ...], cu_seqlens: torch.Tensor | None = None) -> None:
        self.seqlens = seqlens
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max(2, *seqlens)


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, Form], torch.Tensor]
"""(q_THd, k_TKd, v_TKd, cu_seqlens, max_seqlen, form) -> out_THd."""


def best_flash_kernel() -> Kernel:
    """The best flash-attn of the current device. Errors: ValueError if there is none."""
    machine = look(torch.device("cuda"))
    if not machine.flash:
        raise ValueError(f"model.attention: got 'flash': {no_flash(machine)}; set 'auto'")
    # In the order of FLASH_FOR: the first is the fastest.
    return flash_kernel(flash_function(machine.flash[0]))


def flash_kernel(function: Callable[..., Any]) -> Kernel:
    """`flash_attn_varlen_func` of any generation as a Kernel. Only keywords are passed: FA4 orders
    its arguments otherwise, and FA3 and FA4 may return (out, lse)."""

    def kernel(
        q_THd: torch.Tensor,
        k_TKd: torch.Tensor,
        v_TKd: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        form: Form,
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        if form.window is not None:
            # Tokens before the own one, which `window` counts too; none after it.
            options["window_size"] = (form.window - 1, 0)
        if form.softcap is not None:
            options["softcap"] = form.softcap
        # Queries and keys are the same tokens: one set of boundaries.
        out = function(
            q_THd,
            k_TKd,
            v_TKd,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=form.scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **options,
        )
        return out[0] if isinstance(out, tuple) else out

    return kernel


def varlen_kernel() -> Kernel:
    function: Callable[..., Any] = importlib.import_module(VARLEN_MODULE).varlen_attn
    # torch 2.11 takes grouped heads without being told, 2.13 wants to be.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}

    def kernel(
        q_THd: torch.Tensor,
        k_TKd: torch.Tensor,
        v_TKd: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        form: Form,
    ) -> torch.Tensor:
        if form.softcap is not None:
            raise ValueError(
                "model.attention: got 'varlen', but this model has a softcap, which varlen_attn "
                "does not compute; set 'flash' or 'sdpa'"
            )
        return function(
            q_THd,
            k_TKd,
            v_TKd,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            scale=form.scale,
            # No bound before (-1), no token after (0): causal is said by the window here.
            window_size=(-1 if form.window is None else form.window - 1, 0),
            **gqa,
        )

    return kernel


@torch.compiler.disable()
def by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    form: Form,
) -> torch.Tensor:
    """One attention call a document: no batch composition changes a bit of another document.

    Equal lengths batched into one call give the same bits, but gather and scatter cost more than
    the calls: 12 documents of 60 tokens 1.4 ms against 1.2 ms, forward and backward. Kept out of
    torch.compile, which would make a graph for every list of lengths.
    """
    if query.shape[2] != sum(documents.seqlens):
        raise ValueError(
            f"packed attention: expected one row of {sum(documents.seqlens)} tokens (the sum of "
            f"seqlens), got {query.shape[2]}"
        )
    dtype = query.dtype
    on_cpu = query.device.type == "cpu"
    if on_cpu and dtype in HALF:
        # torch's backward there takes three times as long in bfloat16 as in float32: 3.1 ms against
        # 1.05 for 150 tokens and 9 heads of 64, on two cores with AMX.
        query, key, value = query.float(), key.float(), value.float()
    # Views of each document, (1, H, L, d): nothing is copied to take the row apart.
    parts = (x.split(list(documents.seqlens), dim=2) for x in (query, key, value))
    # A CPU's autocast would take it back to bfloat16.
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        outs = [_causal(q, k, v, form) for q, k, v in zip(*parts, strict=True)]
    # (1, H, T, d) -> (1, T, H, d); a copy, since transformers' attention returns it so.
    out = torch.cat(outs, dim=2).transpose(1, 2)
    return out.to(dtype, memory_format=torch.contiguous_format)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form
) -> torch.Tensor:
    """One whole document, (1, H, L, d)."""
    length = query.shape[2]
    mask = None
    # A mask of L x L only where is_causal does not say it all.
    if form.softcap is not None or (form.window is not None and length > form.window):
        # Token i sees i - window + 1 to i.
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = seen if form.window is None else seen.triu(1 - form.window)
    if form.softcap is not None:
        return softcapped(query, key, value=value, mask=mask, form=form)
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and (mask is not None or query.dtype not in HALF):
        # Only flash reads grouped heads there; the other fused kernels give way to the L x L one.
        key, value = _repeated(query, key, value)
        grouped = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=form.scale,
        enable_gqa=grouped,
    )


def softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    form: Form,
) -> torch.Tensor:
    """Gemma 2's attention, where `mask` is True; L x L scores a head, in float32 at least."""
    assert form.softcap is not None
    key, value = _repeated(query, key, value)
    scale = query.shape[-1] ** -0.5 if form.scale is None else form.scale
    wide = torch.promote_types(query.dtype, torch.float32)
    # One factor for both: one pass less over the L x L scores.
    scores = (query @ key.transpose(2, 3)).to(wide) * (scale / form.softcap)
    scores = form.softcap * scores.tanh()
    if mask is not None:
        # Not -inf: a row of padding sees nothing, and its NaN would reach the others' values.
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    return scores.softmax(-1).to(value.dtype) @ value


def _repeated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # Query heads h times to h times + times - 1 read key head h.
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)

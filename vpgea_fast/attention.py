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
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vpgea_fast.types import PackedBatch

NAMES = {"flash": "vpgea_fa", "varlen": "vpgea_varlen", "sdpa": "vpgea_by_document"}
"""backend -> its name in transformers, which reads rules of its own into "flash" and "sdpa"."""

VARLEN_MODULE = "torch.nn.attention.varlen"
FLASH_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
FLASH_PACKAGES = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}
FLASH_FOR = {8: (2, 3), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (4, 2)}
"""Compute capability -> generations of flash-attn with kernels for it, the fastest first."""

HALF = (torch.bfloat16, torch.float16)
WITHOUT_EFFECT = {
    *("cache_position", "logits_to_keep", "num_items_in_batch", "output_hidden_states"),
    *("position_ids", "return_dict", "use_cache"),
}
"""Keyword arguments that models hand down to attention and that do not concern it."""


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


class Choice(NamedTuple):
    """A backend and why it was taken; printed as one line for the log.

    >>> str(Choice("sdpa", "no CUDA"))
    'attention sdpa: no CUDA'
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"attention {self.name}: {self.reason}"

    def facts(self) -> dict[str, str]:
        """What environment.json says of it."""
        return {"attention": self.name, "attention_reason": self.reason}


@dataclass(frozen=True)
class Machine:
    """What a device has for packed attention: CUDA compute capability (None: no CUDA), the flash-
    attn generations that import, what an installed one that does not import says, and whether torch
    has varlen_attn."""

    capability: tuple[int, int] | None = None
    flash: tuple[int, ...] = ()
    broken: str = ""
    varlen: bool = False


def choose_for(config: Any, wanted: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """`choose` for a Hugging Face config, after `check_model`. Errors: ValueError."""
    check_model(config)
    text = _text_config(config)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    softcap = getattr(text, "attn_logit_softcapping", None) is not None
    return choose(wanted, device, dtype, head_dim, softcap=softcap)


def choose(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool = False,
    machine: Machine | None = None,
) -> Choice:
    """The backend for `auto`: the first of flash, varlen and sdpa that runs `dtype` on `device`;
    any other `wanted` is taken as it is.

    A function of its arguments; `machine` is asked for when it is not given. Errors: ValueError
    for an unknown name, and for a backend that cannot run here, with what is in its way.
    """
    if wanted not in ("auto", *NAMES):
        raise ValueError(
            f"model.attention: got {wanted!r}, expected 'auto', {', '.join(map(repr, NAMES))}"
        )
    machine = machine or look(device)
    obstacles = {
        "flash": _obstacle(machine, dtype, head_dim) or _no_flash(machine),
        "varlen": _obstacle(machine, dtype, head_dim) or _no_varlen(machine, softcap=softcap),
        "sdpa": None,
    }
    if wanted != "auto":
        if obstacles[wanted] is not None:
            raise ValueError(
                f"model.attention: got {wanted!r}, which cannot run here: {obstacles[wanted]}; "
                "set 'auto' or 'sdpa'"
            )
        return Choice(wanted, f"asked for; {_described(wanted, machine)}")
    passed: list[str] = []
    for name, obstacle in obstacles.items():
        if obstacle is None:
            return Choice(name, "; ".join(dict.fromkeys([_described(name, machine), *passed])))
        passed.append(obstacle)
    raise AssertionError("sdpa runs everywhere")


def look(device: torch.device) -> Machine:
    """What there is on this machine for packed attention on `device`. Imports what it finds."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Machine()
    return _look(torch.cuda.get_device_capability(device))


def check_model(config: Any) -> None:
    """Refuse a Hugging Face config that packed attention would get wrong, before any GPU work.

    Errors: ValueError for heads that do not divide, for layers that carry a state from token to
    token (and so from document to document), and for attention that is not causal.
    """
    text = _text_config(config)
    name = getattr(config, "model_type", type(config).__name__)
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise ValueError(
            f"model.path: {name!r} has no num_attention_heads in config.json, so no attention that "
            "can keep packed documents apart; take a model that attends in every layer"
        )
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(
            f"model.path: num_attention_heads {heads} of {name!r} is no multiple of "
            f"num_key_value_heads {kv_heads}; correct its config.json"
        )
    if getattr(text, "head_dim", None) is None and text.hidden_size % heads:
        raise ValueError(
            f"model.path: hidden_size {text.hidden_size} of {name!r} is no multiple of "
            f"num_attention_heads {heads}, and head_dim is not given; correct its config.json"
        )
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"model.path: {name!r} has layers of type {', '.join(unknown)}, which do not keep "
            "packed documents apart; take a model with full or sliding attention in every layer"
        )
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None):
        raise ValueError(f"model.path: the attention of {name!r} is not causal; take a causal LM")


def positions(config: Any) -> tuple[int | None, str]:
    """How many positions a model has on which a token means the same in any company, and the key
    that says so.

    The frequencies of longrope and of dynamic NTK depend on the longest position of a forward:
    beyond the trained length a neighbour, a batch or a cache would change them. Up to it they are
    constant, and a longer row is refused.
    """
    text = _text_config(config)
    room, source = getattr(text, "max_position_embeddings", None), "max_position_embeddings"
    rope = getattr(text, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for part in parts:
        kind = part.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            continue
        limit = part.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if limit is not None and kind == "dynamic":
            limit = min(limit, room or limit)
        if limit is not None and (room is None or limit < room):
            room, source = limit, f"original_max_position_embeddings of {kind} RoPE"
    return room, source


def register(backend: str = "sdpa") -> str:
    """Make a backend known to transformers (idempotent); returns its `attn_implementation`."""
    make = {"flash": _flash_kernel, "varlen": _varlen_kernel}.get(backend)
    attention = functools.partial(packed_attention, kernel=None if make is None else make())
    AttentionInterface.register(NAMES[backend], attention)
    AttentionMaskInterface.register(NAMES[backend], sdpa_mask)
    return NAMES[backend]


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """The keyword arguments of a Hugging Face decoder (or causal LM) for a packed batch.

    The mask of no elements is a mask that transformers passes on as it is: it makes none of T x T
    and does not look for documents in position_ids, which costs a host sync on CUDA. Attention that
    meets it without `documents` knows that the layers dropped them.
    """
    if sum(batch.seqlens) != batch.input_ids.numel():
        raise ValueError(
            f"packed attention: expected {sum(batch.seqlens)} tokens (the sum of seqlens), got "
            f"{batch.input_ids.numel()}"
        )
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "attention_mask": batch.input_ids.new_empty(0, 0, 0, 0),
        "use_cache": False,
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
    empty = attention_mask is not None and attention_mask.numel() == 0
    if documents is None:
        if empty:
            raise ValueError(
                f"packed attention: the layers around {type(module).__name__} do not hand "
                "`documents` down to it, so they would see each other; take another model"
            )
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
    if kernel is None:
        form = Form(scaling, sliding_window, softcap)
        return _by_document(query, key, value=value, documents=documents, form=form), None
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
    limited = sliding_window is not None and sliding_window < documents.max_seqlen
    out_THd = kernel(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        documents.cu_seqlens,
        documents.max_seqlen,
        Form(scaling, sliding_window if limited else None, softcap),
    )
    return out_THd[None], None


@functools.cache
def _look(capability: tuple[int, int]) -> Machine:
    found, broken = [], []
    for generation in FLASH_FOR.get(capability[0], ()):
        try:
            _flash_function(generation)
            found.append(generation)
        except (AttributeError, ImportError, OSError, RuntimeError) as error:
            if _version(FLASH_PACKAGES[generation]):
                broken.append(f"{FLASH_PACKAGES[generation]} does not import ({error})")
    return Machine(
        capability,
        tuple(found),
        "; ".join(broken),
        varlen=importlib.util.find_spec(VARLEN_MODULE) is not None,
    )


def _flash_function(generation: int) -> Callable[..., Any]:
    return importlib.import_module(FLASH_MODULES[generation]).flash_attn_varlen_func


def _obstacle(machine: Machine, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps every GPU kernel from running."""
    if dtype not in HALF:
        return f"{str(dtype).removeprefix('torch.')} is not for flash kernels (bfloat16, float16)"
    if machine.capability is None:
        return "no CUDA device"
    if machine.capability < (8, 0):
        return f"CUDA capability {machine.capability[0]}.{machine.capability[1]} is below 8.0"
    if head_dim % 8 or head_dim > 256:
        return f"head_dim {head_dim} is no multiple of 8 up to 256"
    return None


def _no_flash(machine: Machine) -> str | None:
    if machine.flash:
        return None
    return machine.broken or "flash-attn is not installed"


def _no_varlen(machine: Machine, *, softcap: bool) -> str | None:
    if not machine.varlen:
        return "this torch has no varlen_attn"
    return "varlen_attn has no softcap" if softcap else None


def _described(name: str, machine: Machine) -> str:
    where = "" if machine.capability is None else " on CUDA {}.{}".format(*machine.capability)
    if name == "flash":
        package = FLASH_PACKAGES[machine.flash[0]]
        return f"{package} {_version(package) or 'of unknown version'}{where}"
    what = "torch's varlen_attn" if name == "varlen" else "one sdpa call a document"
    return f"{what}{where}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _flash_kernel() -> Kernel:
    """The best flash-attn of the current device. Errors: ValueError if there is none."""
    machine = look(torch.device("cuda"))
    if not machine.flash:
        raise ValueError(f"model.attention: got 'flash': {_no_flash(machine)}; set 'auto'")
    return flash_kernel(_flash_function(machine.flash[0]))


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
            options["window_size"] = (form.window - 1, 0)
        if form.softcap is not None:
            options["softcap"] = form.softcap
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


def _varlen_kernel() -> Kernel:
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
            window_size=(-1 if form.window is None else form.window - 1, 0),
            **gqa,
        )

    return kernel


@torch.compiler.disable()
def _by_document(
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
    parts = [
        _causal(q, k, v, form)
        for q, k, v in zip(
            *(x.split(list(documents.seqlens), dim=2) for x in (query, key, value)), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Form
) -> torch.Tensor:
    """One whole document, (1, H, L, d)."""
    length = query.shape[2]
    mask = None
    if form.softcap is not None or (form.window is not None and length > form.window):
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = seen if form.window is None else seen.triu(1 - form.window)
    if form.softcap is not None:
        return _softcapped(query, key, value=value, mask=mask, form=form)
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


def _softcapped(
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
    scores = (query @ key.transpose(2, 3)).to(wide) * (scale / form.softcap)
    scores = form.softcap * scores.tanh()
    if mask is not None:
        # Not -inf: a row of padding sees nothing, and its NaN would reach the others' values.
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    return scores.softmax(-1).to(value.dtype) @ value


def _repeated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


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
    _refuse(kwargs, {*WITHOUT_EFFECT, "cache", "is_causal", "position_bias"})
    if form.softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=form.scale, **kwargs)
    _refuse(kwargs, WITHOUT_EFFECT)
    query, key, value = _autocast(query, key, value)
    length = query.shape[2]
    if mask is None and length > 1:  # transformers leaves it out where it is the plain triangle
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()
    out = _softcapped(query, key, value=value, mask=mask, form=form)
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
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]

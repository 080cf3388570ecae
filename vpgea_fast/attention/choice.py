"""Which backend attends packed documents, and why; and which models none of them may run.

Functions of a configuration and a device: no tensor is made here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch

NAMES = {"flash": "vpgea_fa", "varlen": "vpgea_varlen", "sdpa": "vpgea_by_document"}
"""backend -> its name in transformers, which reads rules of its own into "flash" and "sdpa"."""

VARLEN_MODULE = "torch.nn.attention.varlen"
FLASH_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
FLASH_PACKAGES = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}
FLASH_FOR = {8: (2, 3), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (4, 2)}
"""Compute capability -> generations of flash-attn with kernels for it, the fastest first."""

HALF = (torch.bfloat16, torch.float16)


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
    # Qwen3 and Gemma say how wide a head is; hidden_size / heads may be another number.
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Gemma 2 sets it; Gemma 3 has the key and leaves it None.
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return choose(wanted, device, dtype, head_dim, capped=capped)


def choose(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    capped: bool = False,
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
    # Asked late: `look` imports flash-attn, which a wrong name should not have to wait for.
    machine = machine or look(device)
    # In the order of preference. sdpa has no obstacle, so the loop below always returns.
    obstacles = {
        "flash": _obstacle(machine, dtype, head_dim) or no_flash(machine),
        "varlen": _obstacle(machine, dtype, head_dim) or _no_varlen(machine, capped=capped),
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
        # Without repeats: what stops flash often stops varlen too.
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
    # Models of state-space layers alone, such as Mamba, have none.
    if heads is None:
        raise ValueError(
            f"model.path: {name!r} has no num_attention_heads in config.json, so no attention that "
            "can keep packed documents apart; take a model that attends in every layer"
        )
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    # Every key head serves the same number of query heads.
    if heads % kv_heads:
        raise ValueError(
            f"model.path: num_attention_heads {heads} of {name!r} is no multiple of "
            f"num_key_value_heads {kv_heads}; correct its config.json"
        )
    # Else the width of a head is a quotient: rounded down, it would be another model's.
    if getattr(text, "head_dim", None) is None and text.hidden_size % heads:
        raise ValueError(
            f"model.path: hidden_size {text.hidden_size} of {name!r} is no multiple of "
            f"num_attention_heads {heads}, and head_dim is not given; correct its config.json"
        )
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    # Recurrent ones among them carry a state over the end of a document: no mask stops that.
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"model.path: {name!r} has layers of type {', '.join(unknown)}, which do not keep "
            "packed documents apart; take a model with full or sliding attention in every layer"
        )
    # The second switch makes an encoder of Gemma 3 (EmbeddingGemma).
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
    # One set of parameters for all layers, or one per type of layer (Gemma 3).
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for part in parts:
        kind = part.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            continue
        limit = part.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        # transformers stretches dynamic NTK from max_position_embeddings on, also if that is lower.
        if limit is not None and kind == "dynamic":
            limit = min(limit, room or limit)
        if limit is not None and (room is None or limit < room):
            room, source = limit, f"original_max_position_embeddings of {kind} RoPE"
    return room, source


# Cached: an import that fails is tried anew every time, and one that works loads a CUDA library.
@functools.cache
def _look(capability: tuple[int, int]) -> Machine:
    usable, broken = [], []
    for generation in FLASH_FOR.get(capability[0], ()):
        # Imported, not looked up: a wheel built for another torch is installed and does not load.
        try:
            flash_function(generation)
            usable.append(generation)
        except (AttributeError, ImportError, OSError, RuntimeError) as error:
            if _version(FLASH_PACKAGES[generation]):
                broken.append(f"{FLASH_PACKAGES[generation]} does not import ({error})")
    return Machine(
        capability,
        tuple(usable),
        "; ".join(broken),
        varlen=importlib.util.find_spec(VARLEN_MODULE) is not None,
    )


def flash_function(generation: int) -> Callable[..., Any]:
    return importlib.import_module(FLASH_MODULES[generation]).flash_attn_varlen_func


def _obstacle(machine: Machine, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps every GPU kernel from running."""
    if dtype not in HALF:
        return f"{str(dtype).removeprefix('torch.')} is not for flash kernels (bfloat16, float16)"
    if machine.capability is None:
        return "no CUDA device"
    # flash-attn's own limits: Ampere or newer, heads up to 256 wide.
    if machine.capability < (8, 0):
        return f"CUDA capability {machine.capability[0]}.{machine.capability[1]} is below 8.0"
    if head_dim % 8 or head_dim > 256:
        return f"head_dim {head_dim} is no multiple of 8 up to 256"
    return None


def no_flash(machine: Machine) -> str | None:
    if machine.flash:
        return None
    return machine.broken or "flash-attn is not installed"


def _no_varlen(machine: Machine, *, capped: bool) -> str | None:
    if not machine.varlen:
        return "this torch has no varlen_attn"
    return "varlen_attn does not cap scores" if capped else None


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
    # A model of text and images keeps its decoder's keys in a configuration inside.
    return config.get_text_config() if hasattr(config, "get_text_config") else config

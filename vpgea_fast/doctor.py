"""What runs on this machine, and why the rest does not: `vpgea doctor`.

Each line asks the function that a run itself asks, so the two cannot differ.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import torch

from vpgea_fast import attention, losses
from vpgea_fast.distributed import pick_device
from vpgea_fast.kernels.backends import BACKENDS
from vpgea_fast.metrics import environment
from vpgea_fast.optim import check_torchao
from vpgea_fast.rollout.vllm.versions import check_installed

HEAD_DIM = 128
"""Width of a head in Qwen2.5 1.5B and 7B, Llama 3 8B and 70B, and Qwen3."""


@dataclass(frozen=True)
class Finding:
    """One thing that a run could use.

    Example: Finding("attention", "flash", runs=False, detail="there is no CUDA").
    """

    part: str
    name: str
    _: KW_ONLY
    runs: bool
    detail: str


def examine(device: str = "auto") -> list[Finding]:
    """List what a run on `device` chooses from. ConfigError for a device that is not here."""
    # Of one device: backends and attention depend on its kind and its compute capability.
    where = pick_device(device)
    return [*_machine(where), *_backends(where), *_attention(where), *_engines(), *_extras()]


def _machine(where: torch.device) -> Iterator[Finding]:
    # What environment.json of a run records, so that the two can be compared.
    found = environment()
    names = ("vpgea_fast", "torch", "transformers", "triton", "safetensors")
    for name in ("python", *names):
        version = found[name]
        yield Finding("version", name, runs=bool(version), detail=version or "not installed")
    # None on a CPU, whose cores are counted behind it.
    count = f"{found['devices']} x " if found["devices"] else ""
    detail = f"{count}{found['device']}, {found['cpus']} CPU cores"
    if where.type == "cuda":
        detail += f", {torch.cuda.get_device_properties(where).total_memory / 2**30:.1f} GiB"
    yield Finding("device", str(where), runs=True, detail=detail)


def _backends(where: torch.device) -> Iterator[Finding]:
    """Ask the loss backends about the dtype that a model on this device usually has."""
    # `auto` chooses by dtype too, and which one a run will have is not known here.
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    for name in ("auto", *BACKENDS):
        yield _asked("loss backend", name, lambda name=name: _backend(name, where, dtype))


def _backend(name: str, where: torch.device, dtype: torch.dtype) -> str:
    choice = losses.choose_backend(name, device=where, dtype=dtype)
    return choice.reason if name == choice.name else f"takes {choice.name!r}: {choice.reason}"


def _attention(where: torch.device) -> Iterator[Finding]:
    for name in ("auto", *attention.NAMES):
        # bfloat16 even on a CPU: with float32 the dtype would be named, and not the device.
        yield _asked(
            "attention",
            name,
            lambda name=name: str(attention.choose(name, where, torch.bfloat16, HEAD_DIM)),
        )


def _engines() -> Iterator[Finding]:
    here = "the trained model itself, by transformers"
    yield Finding("rollout engine", "hf", runs=True, detail=here)
    yield _asked("rollout engine", "vllm", lambda: check_installed() or "fits torch, transformers")


def _extras() -> Iterator[Finding]:
    yield _asked("extra", "torchao", lambda: check_torchao() or "optim.name adamw_8bit")
    # Found, not imported: that alone is what a run asks before it patches a model.
    liger, use = importlib.util.find_spec("liger_kernel"), "RMSNorm, RoPE and SwiGLU on CUDA"
    lack = f"not installed; pip install 'vpgea_fast[liger]' for its {use}"
    there = liger is not None
    yield Finding("extra", "liger", runs=there, detail=use if there else lack)


def _asked(part: str, name: str, ask: Callable[[], str]) -> Finding:
    """Ask the run's own check; give its answer, or its error."""
    try:
        return Finding(part, name, runs=True, detail=ask())
    # ConfigError, ModelError and the kernels' refusals are all ValueErrors.
    except ValueError as error:
        return Finding(part, name, runs=False, detail=str(error))

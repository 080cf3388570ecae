"""The random generators of a process: saved, restored, begun anew where nothing was saved."""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vpgea_fast.distributed import World


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of torch (CPU, and this GPU) and random; numpy's is not used."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),  # tuples of ints, which weights_only loads
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators back; a run that has moved between CPU and GPU gets a warning instead of
    the GPU's."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if (state["cuda"] is None) == (device.type == "cuda"):
        was = "a CPU" if state["cuda"] is None else "a GPU"
        warnings.warn(
            f"the checkpoint is of a run on {was}, this one is on {device.type}: the random state "
            "of the GPU is not restored",
            stacklevel=2,
        )
    elif state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def resume_rng(state: Mapping[str, Any], world: World, *, processes: int, path: Path) -> None:
    """Restore the generators from the checkpoint at `path`, which `processes` saved. `state` is
    this process's, or the last one's that saved."""
    if world.main and processes != world.size:
        warnings.warn(
            f"{path} is of {processes} processes, now there are {world.size}: sums "
            f"round otherwise, and random numbers begin anew from process {processes} on",
            stacklevel=3,
        )
    if world.rank < processes:
        restore_rng(state, world.device)
    else:
        # From what was saved, so that two resumes of one checkpoint draw alike.
        seed = zlib.crc32(state["torch"].numpy().tobytes()) + world.rank
        torch.manual_seed(seed)  # of the GPUs too
        random.seed(seed)

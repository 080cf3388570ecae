"""Where a run is made: commit, versions, device."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Collect what environment.json says of a run: commit, versions, device."""
    cuda = torch.cuda.is_available()
    libraries = ("vpgea_fast", "torch", "transformers", "triton", "safetensors")
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in libraries},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 0,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


@cache
def commit() -> str | None:
    """Commit of the checkout that this package runs from, `+changes` if files differ from it.

    As it was when a process first asked: what is imported stays, while the files may change.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: what encloses site-packages is another project
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        # -uno: run directories and data lie about untracked, and change no code.
        return head + ("+changes" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    # 10 s: a network disk may hang, and a run must not wait for its commit.
    command = ["git", "-C", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""Command-line words of small runs of the tiny task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def words_of(settings: Mapping[str, Any], world: Any, run: Path) -> list[str]:
    """A run in the directory `run`, without an evaluation unless `settings` asks for one: its two
    first words are --run.dir and the directory."""
    fixed = {
        "run.dir": run,
        "model.path": world.base_dir,
        "data.train": world.train_path,
        "eval.data": "[]",
        "verify.name": "number",  # a worker of `math` imports sympy for half a second
    }
    return [
        word for key, value in (fixed | dict(settings)).items() for word in (f"--{key}", str(value))
    ]

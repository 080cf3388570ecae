"""Small runs of the tiny task: their command-line words, and what they record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TIMED = ("time_", "tokens_per_s", "train_tokens_per_s", "mfu", "peak_memory")
"""Keys of metrics.jsonl that a clock or the allocator fills begin so."""

ONE_UPDATE = {
    "model.dtype": "float64",
    "run.seed": 1,
    "train.steps": 1,
    "train.micro_batch_tokens": 300,
    "rollout.max_answer_tokens": 6,
    "metrics.diag_every": 0,
    "metrics.compare": "null",
    "checkpoint.export": "false",
    "optim.lr": 1e-3,
}
"""Settings of a run whose update is held to a formula, in several micro-batches."""


def words_of(settings: Mapping[str, Any], world: Any, run: Path) -> list[str]:
    """A run in the directory `run`, without an evaluation unless `settings` asks for one: its two
    first words are --run.dir and the directory."""
    fixed = {
        "run.dir": run,
        "model.path": world.base_dir,
        "data.train": world.train_path,
        "eval.data": "[]",
        "verify.name": "number",  # a worker of `math` imports sympy for 0.3 s
        "metrics.figure": "false",  # a quarter of a second
    }
    return [
        word for key, value in (fixed | dict(settings)).items() for word in (f"--{key}", str(value))
    ]


def untimed(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock or the allocator says: what two equal runs have alike."""
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in records]


def recorded(run: Path | str) -> list[dict[str, Any]]:
    """The metrics.jsonl of a run directory, `untimed`."""
    return untimed(map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines()))

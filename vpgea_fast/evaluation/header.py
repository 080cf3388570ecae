"""What eval.json says: all that decides the answers of an evaluation, and who asked for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vpgea_fast.config import Config, as_dict
from vpgea_fast.data import Benchmark, fingerprint
from vpgea_fast.evaluation.records import SCHEMA
from vpgea_fast.metrics import environment
from vpgea_fast.weights import model_digest

# Neither model.path nor eval.data: weights and questions count by content, wherever they lie.
SETTINGS = {
    "sampling": {
        "eval": ("temperature", "top_p", "max_new_tokens"),
        "rollout": ("max_answer_tokens",),
    },
    "prompts": {"prompt": ("think_open", "think_close", "think_prefix", "chat_template_kwargs")},
    "engine": {"engine": ("name",), "model": ("dtype", "attention")},
    "checker": {"verify": ("name", "target", "timeout_s")},
}
"""Name in the header -> keys of sections."""


def make_header(
    cfg: Config, benchmarks: Mapping[str, Benchmark], *, wave: int | None, command: Sequence[str]
) -> dict[str, Any]:
    """Describe an evaluation; `wave` is that of its engine."""
    known = as_dict(cfg)
    settings: dict[str, Any] = {
        name: {key: known[section].get(key) for section, keys in of.items() for key in keys}
        for name, of in SETTINGS.items()
    }
    # Null: thought and answer share the limit of the first.
    if cfg.eval.joint_limit:
        settings["sampling"]["max_answer_tokens"] = None
    # Batches of other sizes would draw other last bits of the logits.
    settings["engine"]["wave"] = wave
    settings |= {
        "k": {"sampled": cfg.eval.samples, "greedy": int(cfg.eval.greedy)},
        "seed": cfg.eval.seed,
    }
    return {
        "schema": SCHEMA,
        "model": {"path": cfg.model.path, "fingerprint": model_digest(cfg.model.path)},
        "settings": settings,
        "benchmarks": {name: _benchmark(cfg, part) for name, part in benchmarks.items()},
        # Told and not compared: an evaluation may go on under newer ones.
        "versions": environment(),
        "command": list(command),
    }


def _benchmark(cfg: Config, benchmark: Benchmark) -> dict[str, Any]:
    # null in eval.data leaves the number of draws to eval.samples.
    own = benchmark.samples
    return {
        "fingerprint": fingerprint([question for question, _ in benchmark.questions]),
        "questions": len(benchmark.questions),
        "dropped": sum(benchmark.dropped.values()),
        "k": cfg.eval.samples if own is None else own,
        "student": benchmark.student or cfg.prompt.student,
    }

"""Sections of what comes out: checkpoints, evaluations, metrics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.config.inputs import Files
from vpgea_fast.values import (
    STRICT,
    Minutes,
    NonNegativeInt,
    PathText,
    PositiveInt,
    Seed,
    Temperature,
)


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    save_every: PositiveInt = 20
    """Steps between two checkpoints."""
    save_minutes: Minutes | None = None
    """Also save when this many minutes have passed since the last save; between two updates of a
    step too."""
    # Which of them stay: the newest for a resume, the best for an export.
    keep_last: PositiveInt = 2
    """Number of newest checkpoints of whole steps to keep."""
    keep_best: Literal["sampled_eps3", "sampled_acc", "greedy_eps3", "greedy_acc"] | None = None
    """Also keep the checkpoint with the best evaluation by this measure. Then every evaluated step
    is saved; needs eval.data and eval.every."""
    # Host memory for time: the copy is as large as this process's weights and moments.
    background: bool = False
    """Copy the state to host memory, train on, and write from a thread."""
    export: bool = True
    """Write export/ (a Hugging Face directory) when the run ends."""


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    data: Files = ()
    """Files as in data.train, one per benchmark; empty: no evaluation."""
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0: only before and after."""
    samples: NonNegativeInt = 1
    """Sampled answers per question; 0: greedy only."""
    greedy: bool = True
    """Also answer every question once without sampling."""
    # The sampling that DeepSeek-R1's authors recommend, as benchmarks of its distilled models have.
    temperature: Temperature = 0.6
    """Temperature of the sampled answers."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Nucleus of the sampled answers."""
    max_new_tokens: PositiveInt = 32768
    """Token limit of a thought. A cut thought counts as wrong."""
    joint_limit: bool = False
    """`max_new_tokens` limits thought and answer together, as papers have it, and
    rollout.max_answer_tokens is not read."""
    records: bool = False
    """Keep every answer of a run's evaluations, in RUN/evals/step_N, as `vpgea eval --out` does."""
    # Which questions: the same in every evaluation, so that its numbers can be compared.
    limit: PositiveInt | None = None
    """Read at most this many rows of each file; null: all."""
    seed: Seed = 0
    """Seed of the sampled answers."""

    def __post_init__(self) -> None:
        # A benchmark is evaluated whole, so a share of a step means nothing there.
        weighted = next((file.path for file in self.data if file.weight is not None), None)
        if weighted is not None:
            raise ValueError(f"eval.data: {weighted} has a weight, which is for data.train")

    def most(self, answer: int) -> int:
        """Count the tokens that a response may have, with the limit of an answer of its own."""
        return self.max_new_tokens + (0 if self.joint_limit else answer)

    def answers(self, samples: int | None) -> int:
        """Count the answers to a question of a benchmark with (or without) `samples` of its own."""
        return (self.samples if samples is None else samples) + self.greedy


@dataclass(frozen=True, config=STRICT)
class MetricsConfig:
    diag_every: NonNegativeInt = 10
    """Steps between the costly diagnostics, such as the KL of the two views on whole paths (0:
    never)."""
    paths_per_step: NonNegativeInt = 16
    """Sampled paths of each stream that a step writes to paths.jsonl, those of replaced questions
    last."""
    compare: PathText | None = None
    """Committed rows, shown beside the run's own in the closing table and the report. A JSON file,
    or `tiny_demo`: the rows that come with the configuration `tiny`."""
    note: str = ""
    """A line printed under the closing table."""
    figure: bool = True
    """Draw training.png into the report when the run ends. `false` saves a CPU second of each of
    many short runs; `vpgea report` draws it at any time."""

"""A stop between two updates of a rollout is saved there, and a resume makes the rest of them."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, watch_ranks
from saving import FailAt, numbers

from vpgea_fast import checkpoint, collect, config, trainer
from vpgea_fast.checkpoint import CheckpointError
from vpgea_fast.distributed import World
from vpgea_fast.names import Score
from vpgea_fast.updates import plain, revived

ALONE = World(torch.device("cpu"))
TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
TIMED = ("time_", "tokens_per_s", "train_tokens_per_s", "mfu", "peak_memory")
SMALL = {
    "objective": "grpo",
    "run.seed": 1,
    "objective.group_size": 4,
    "train.questions_per_step": 4,
    "train.minibatches": 2,
    "train.epochs": 2,
    "train.steps": 3,
    "metrics.compare": "null",
    "metrics.diag_every": 0,
    "rollout.max_new_tokens": 64,
    "checkpoint.export": "false",
    "optim.warmup_steps": 0,
    "optim.lr": 0.0003,
}
OWN = """
from dataclasses import replace

from pydantic.dataclasses import dataclass
from vpgea_fast.objectives import STRICT, Grpo


@dataclass(frozen=True, config=STRICT)
class Remembering(Grpo):
    name: str = "custom"
    target: str = ""

    def terms(self, batch, state, /):
        found = super().terms(batch, state)
        mean = batch.prior.correct_BP.mean().item()
        baseline = 0.5 * state.get("baseline", 0.0) + 0.5 * mean
        (part,) = found.parts
        part = replace(part, weight_BP=part.weight_BP * (1 + baseline))
        return replace(found, parts=(part,), state={"baseline": baseline})
"""
OBJECTIVES = {
    "importance weights": ["--rollout.importance_cap", "1.5"],
    "a reference policy": ["--objective.kl_coef", "0.05"],
    "distilled paths": ["--objective", "vpgea", "--objective.prior_samples", "2"],
    "replaced questions": ["--train.resample_rounds", "1", "--metrics.diag_every", "1"],
    "a state": ["--objective.name", "custom", "--objective.target", "own:Remembering"],
    "likelihood": ["--objective.name", "drgrpo", "--objective.reward", "likelihood"],
}


@pytest.fixture
def words(tiny_words, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)  # from where a run imports an objective
    return tiny_words(SMALL)


@pytest.fixture
def stopped(monkeypatch):
    """`stopped(words, step, update)`: a run that hears SIGTERM in that update. `stopped.drawn` are
    the steps that were drawn."""
    update, collector, drawn = trainer.Trainer.update, collect.Collector.collect, []

    def train(words, step=None, number=None, *, resume=False):
        def hearing(self, rows, scored):
            found = update(self, rows, scored)
            made = len(self.rollout.made) if self.rollout else 0
            if (self.step + 1, made + 1) == (step, number):
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        def drawing(self, step, *more):
            drawn.append(step)
            return collector(self, step, *more)

        monkeypatch.setattr(trainer.Trainer, "update", hearing)
        monkeypatch.setattr(collect.Collector, "collect", drawing)
        return trainer.fit(config.load(source(words, resume), words), resume=resume)

    train.drawn = drawn
    return train


def source(words, resume):
    return Path(words[1]) / "config.yaml" if resume else TINY


def on_disk(run):
    return sorted(path.name for path in (Path(run) / "checkpoints").iterdir())


def records(run):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)} for line in lines
    ]


def require_equal(run, other):
    """Bitwise in the newest checkpoint, the metrics and the paths."""
    mine, its = (checkpoint.find_checkpoint(path, world=ALONE) for path in (run, other))
    assert (mine.step, mine.updates) == (its.step, its.updates)
    assert mine.trainer_state["method"] == its.trainer_state["method"]
    tensors, same = mine.tensors(), its.tensors()
    assert tensors.keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())
    assert records(run) == records(other)
    assert (run / "paths.jsonl").read_bytes() == (other / "paths.jsonl").read_bytes()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stop_between_updates_resumes_bitwise(name, words, stopped, tmp_path):
    more = OBJECTIVES[name]
    whole, parts = words("whole", *more), words("parts", *more)
    assert stopped(whole)
    assert stopped(parts, 2, 2) is trainer.Ending.STOPPED
    assert on_disk(tmp_path / "parts") == ["step_1_2"]
    assert [record["step"] for record in records(tmp_path / "parts")] == [1]
    stopped.drawn.clear()
    assert stopped(parts, resume=True)
    assert stopped.drawn == [2]
    require_equal(tmp_path / "parts", tmp_path / "whole")
    moved = [record["grad_norm"] for record in records(tmp_path / "whole")]
    assert all(norm > 0 for norm in moved), "no update to lose"

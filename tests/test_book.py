"""Every key that a run writes is in the book, and the book holds no key that no run writes."""

import json
import re
from pathlib import Path

import pytest
from ranks import run_ranks
from runs import words_of

from vpgea_fast import book, config
from vpgea_fast.objectives.guards import GUARDS
from vpgea_fast.trainer import Trainer

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
RUNS = {
    "robust": {"train.resample_rounds": 1},
    "paper": {"objective.preset": "paper", "rollout.importance_cap": 2.0},
    "grpo": {
        "objective.name": "grpo",
        "eval.data": "[]",
        "objective.kl_coef": 0.1,
        "train.minibatches": 2,
        "objective.length_reward.name": "lc_r1",
    },
    "laser_d": {
        "objective.name": "grpo",
        "eval.data": "[]",
        "objective.length_reward.name": "laser_d",
    },
    "options": {
        "objective.preset": "paper",
        "objective.utility": "elbo",
        "objective.kappa": 0.1,
        "objective.prior_pg": 0.5,
        "objective.train_answer": "sft",
        **{f"objective.{guard.key}": json.dumps(guard.on) for guard in GUARDS.values()},
        "eval.data": "[]",
    },
    "rlt": {"objective.name": "rlt", "eval.data": "[]"},
    "vr": {"objective.name": "vr", "eval.data": "[]", "objective.share_params": "false"},
    "sft": {"objective.name": "sft", "eval.data": "[]", "objective.group_size": None},
    "held": {"objective.name": "custom", "objective.target": "held:Held", "eval.data": "[]"},
    "sharded": {"parallel.shard": "always", "eval.data": "[]"},
}
"""Together they take every branch that logs. A sharded model is handed over to its engine, and
without a benchmark eval.every asks for nothing."""


def write_run(words):
    """Two steps with all diagnostics and the evaluation between; the files of the run."""
    cfg = config.load(TINY, words)
    with Trainer(cfg) as trainer:
        trainer.evaluations.once("before")
        for _ in range(2):
            trainer.finish_step(trainer.train_step())
    run_dir = Path(cfg.run.dir)
    steps, paths = ((run_dir / f"{name}.jsonl").read_text("utf-8") for name in ("metrics", "paths"))
    return {
        "steps": [json.loads(line) for line in steps.splitlines()],
        "paths": [json.loads(line) for line in paths.splitlines()],
        "eval": json.loads((run_dir / "eval.json").read_text("utf-8")) if cfg.eval.data else {},
    }


@pytest.fixture(scope="module")
def written(tiny_world, tmp_path_factory):
    """What each of RUNS wrote."""
    fixed = {
        "eval.data": f"[{tiny_world.test_path}]",
        "eval.limit": 2,
        "eval.max_new_tokens": 24,
        "rollout.max_new_tokens": 48,
        "eval.every": 1,
        "train.questions_per_step": 2,
        "train.steps": 2,
        "objective.group_size": 4,
        "metrics.diag_every": 1,
        "checkpoint.export": "false",
    }
    files = {}
    for name, more in RUNS.items():
        asked = {key: value for key, value in {**fixed, **more}.items() if value is not None}
        words = words_of(asked, tiny_world, tmp_path_factory.mktemp("book") / name)
        files[name] = (
            run_ranks(write_run, words, size=1)[0] if name == "sharded" else write_run(words)
        )
    return files


def test_the_steps_of_all_runs_and_the_book_have_the_same_keys(written):
    logged = {key for run in written.values() for step in run["steps"] for key in step}
    assert logged - book.METRICS.keys() == set(), "logged, and not in vpgea_fast/book.py"
    assert book.METRICS.keys() - logged == set(), "in vpgea_fast/book.py, and never logged"


def test_the_guard_has_its_own_time(written):
    """Beside kappa's forwards, which every step of `options` makes as well."""
    for name, beside in (("options", True), ("robust", False)):
        for step in written[name]["steps"]:
            phases = {k: v for k, v in step.items() if re.fullmatch(r"time_\w+_s", k)}
            ratio = step["time_guard_s"] / sum(phases.values())
            assert step["time_guard_ratio"] == pytest.approx(ratio, rel=1e-12)
            assert step["time_guard_s"] > 0
            assert (step["time_logps_s"] > 0.2 * step["time_guard_s"]) == beside


def test_evaluations_and_the_book_have_the_same_keys(written):
    modes = [written["robust"]["eval"]["before"][mode] for mode in book.MODES]
    parts = [part for mode in modes for part in mode["benchmarks"].values()]
    keys = {key for result in [*modes, *parts] for key in result}
    assert keys - {"benchmarks"} == book.EVALUATION.metrics.keys()


def test_paths_and_the_book_have_the_same_keys(written):
    keys = {key for run in written.values() for path in run["paths"] for key in path}
    assert keys == book.PATHS.metrics.keys()


def test_shares_and_switches_keep_to_their_unit(written):
    bounded = {key for key, metric in book.METRICS.items() if metric.unit in ("share", "0 or 1")}
    seen = [
        (name, key, step[key])
        for name, run in written.items()
        for step in run["steps"]
        for key in bounded & step.keys()
        if step[key] is not None
    ]
    assert {key for _, key, _ in seen} == bounded - {"mfu"}
    assert [entry for entry in seen if not 0 <= entry[2] <= 1] == []


def test_no_key_stands_twice_and_every_meaning_is_short_sentences():
    chapters = [*book.STEP, book.EVALUATION, book.PATHS]
    assert len(book.METRICS) == sum(len(chapter.metrics) for chapter in book.STEP)
    for chapter in chapters:
        for key, (unit, text) in chapter.metrics.items():
            assert re.fullmatch(r"[a-z][a-z0-9_]*", key)
            assert unit
            assert text.endswith(".")
            assert text[0] == text[0].upper()
            for sentence in re.split(r"(?<=[.;:]) ", text):
                assert len(sentence.split()) <= 25, f"{key}: {sentence}"

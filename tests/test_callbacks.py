"""A run from Python: what a callback hears, how it stops a run, and what its failures do."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ranks import run_ranks, watch_ranks
from runs import recorded, untimed

import vpgea_fast
from vpgea_fast import checkpoint, config, trainer
from vpgea_fast.config import load
from vpgea_fast.trainer import Callback, Ending, StopTraining, fit

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"


@pytest.fixture
def words(tiny_words):
    """Command-line words for a run of three small steps: `words("name", "--a.b", "c")`."""
    return tiny_words(
        {
            "train.questions_per_step": 2,
            "objective.group_size": 4,
            "objective.prior_samples": 2,
            "train.steps": 3,
            "metrics.diag_every": 0,
            "rollout.max_new_tokens": 24,
            "checkpoint.export": "false",
        }
    )


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Recorder(Callback):
    def __init__(self):
        self.heard, self.records = [], []

    def on_start(self, run):
        self.heard.append(("start", run.path, run.step, run.rank, run.processes, run.main))

    def on_step(self, metrics):
        self.heard.append(("step", metrics["step"]))
        self.records.append(dict(metrics))

    def on_evaluation(self, step, results):
        self.heard.append(("evaluation", step, *results))

    def on_end(self, ending):
        self.heard.append(("end", ending))


class StopAt(Callback):
    """Stops, or fails with `error`, after a step of one rank."""

    def __init__(self, step, *, rank=0, error=None):
        self.step, self.rank, self.error = step, rank, error

    def on_step(self, metrics):
        if metrics["step"] == self.step and self.rank == int(os.environ.get("RANK", "0")):
            raise self.error or StopTraining


def test_a_callback_hears_all_and_one_that_stops_loses_nothing(words, tmp_path, tiny_world):
    """A run that a callback stops after a step and that goes on is the one that was not stopped."""
    more = ["--eval.data", f"[{tiny_world.test_path}]", "--eval.limit", "2", "--eval.every", "2"]
    more += ["--eval.greedy", "false"]
    whole, first, second = Recorder(), Recorder(), Recorder()
    assert fit(load(TINY, words("whole", *more)), callbacks=[whole]) is Ending.DONE
    assert whole.heard == [
        ("start", tmp_path / "whole", 0, 0, 1, True),
        ("evaluation", 0, "sampled"),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2, "sampled"),
        ("step", 3),
        ("evaluation", 3, "sampled"),
        ("end", Ending.DONE),
    ]
    written = lines(tmp_path / "whole")
    assert len(written) == 3
    for said, line in zip(whole.records, written, strict=True):
        assert said.keys() == line.keys()
        for key, value in said.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            assert line[key] == (value if finite else None), key

    parts = load(TINY, words("parts", *more))
    assert fit(parts, callbacks=[StopAt(2), first]) is Ending.STOPPED
    assert first.heard[-2:] == [("step", 2), ("end", Ending.STOPPED)]  # told all the same
    assert checkpoint.saved_steps(tmp_path / "parts") == [2]
    assert fit(parts, resume=True, callbacks=[second]) is Ending.DONE
    assert second.heard[0] == ("start", tmp_path / "parts", 2, 0, 1, True)
    assert recorded(tmp_path / "parts") == untimed(written)
    paths = [(tmp_path / name / "paths.jsonl").read_bytes() for name in ("whole", "parts")]
    assert paths[0] == paths[1]


def test_a_budget_of_tokens_ends_a_run_after_the_step_that_reaches_it(words, tmp_path, tiny_world):
    """One that is left in that step goes on to its last evaluation, and makes no step more."""
    more = ["--eval.data", f"[{tiny_world.test_path}]", "--eval.limit", "2", "--eval.greedy"]
    more += ["false", "--optim.schedule", "constant"]
    two = ["--optim.schedule", "constant", "--train.steps", "2"]
    assert fit(load(TINY, words("whole", *two))) is Ending.DONE
    whole = lines(tmp_path / "whole")
    for steps, more_tokens in ((1, 0), (2, 1)):
        budget = str(whole[0]["tokens_generated"] + more_tokens)
        cfg = load(TINY, words(budget, *more, "--train.max_tokens", budget))
        if steps == 2:
            assert fit(cfg, callbacks=[StopAt(2)]) is Ending.STOPPED
        assert fit(cfg, resume=steps == 2) is Ending.DONE
        assert recorded(tmp_path / budget) == untimed(whole[:steps])
        assert json.loads((tmp_path / budget / "eval.json").read_text())["after"]["step"] == steps
        assert checkpoint.saved_steps(tmp_path / budget) == [steps]


def test_what_a_callback_raises_ends_the_run_which_can_go_on(words, tmp_path):
    more = ["--checkpoint.save_every", "1", "--checkpoint.keep_last", "9"]
    cfg, after = load(TINY, words("run", *more)), Recorder()
    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(cfg, callbacks=[StopAt(2, error=ZeroDivisionError("mine")), after])
    assert after.heard == [("start", tmp_path / "run", 0, 0, 1, True), ("step", 1)]
    assert checkpoint.saved_steps(tmp_path / "run") == [1, 2]
    assert fit(cfg, resume=True) is Ending.DONE


def test_a_start_that_fails_ends_what_it_has_started(words, running):
    """A resume with another seed is refused when engine and checkers are up."""
    assert fit(load(TINY, words("run", "--train.steps", "1"))) is Ending.DONE
    before = running(parent=os.getpid()).keys()
    with pytest.raises(checkpoint.CheckpointError, match=r"would change run\.seed from 0 to 5"):
        fit(load(TINY, words("run", "--run.seed", "5")), resume=True)
    assert running(parent=os.getpid()).keys() == before
    assert fit(load(TINY, words("run", "--train.steps", "2")), resume=True) is Ending.DONE


def test_a_start_that_cannot_open_its_log_ends_what_it_has_started(words, running, monkeypatch):
    """The last act of a start: engine and checkers are up."""
    cfg, before = load(TINY, words("run", "--train.steps", "1")), running(parent=os.getpid()).keys()
    monkeypatch.setattr("vpgea_fast.metrics.log.METRICS", "nowhere/metrics.jsonl")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(cfg)
    assert running(parent=os.getpid()).keys() == before


def test_a_run_in_a_thread_hears_no_signal_and_trains(words):
    """Python sets signal handlers in the main thread alone."""
    cfg, endings = load(TINY, words("run", "--train.steps", "1")), []
    thread = threading.Thread(target=lambda: endings.append(fit(cfg)))
    thread.start()
    thread.join()
    assert endings == [Ending.DONE]


@pytest.mark.parametrize("given", [Recorder, print, None], ids=["class", "function", "none"])
def test_what_is_no_callback_is_refused_before_anything_is_made(words, tmp_path, given):
    with pytest.raises(ValueError, match=r"callbacks\[1\]: got .*; write class Mine"):
        fit(load(TINY, words("run")), callbacks=[Recorder(), given])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [StopAt(2), None, {StopAt(2)}])
def test_what_is_no_list_of_callbacks_is_refused_before_the_start(given, words):
    cfg = load(TINY, words("run"))
    with pytest.raises(ValueError, match=r"^callbacks: got .*write callbacks=\[Mine\(\)\]$"):
        fit(cfg, callbacks=given)
    assert not Path(cfg.run.dir).exists()


@pytest.mark.parametrize("given", ["tiny.yaml", Path("tiny.yaml"), {"run": {}}, config.Config])
def test_what_is_no_configuration_is_refused_with_the_way_to_one(given):
    with pytest.raises(ValueError, match=r"^cfg: got .*vpgea_fast\.config\.load\(FILE\)"):
        fit(given)


def fit_with(words, callback):
    return fit(config.load(TINY, words), callbacks=[callback]).name


def test_a_stop_or_a_failure_of_one_process_is_one_of_all(words, tmp_path):
    assert run_ranks(fit_with, words("stopped"), StopAt(1, rank=1)) == ["STOPPED", "STOPPED"]
    assert checkpoint.saved_steps(tmp_path / "stopped") == [1]
    failing = StopAt(1, rank=1, error=ZeroDivisionError("mine"))
    ends = watch_ranks(fit_with, words("failed"), failing, grace_s=60)
    assert [rank.status for rank in ends] == [1, 1]
    assert "RemoteError: process 1: mine" in ends[0].output
    assert "ZeroDivisionError: mine" in ends[1].output


def test_the_package_gives_fit_and_imports_nothing_before():
    assert vpgea_fast.fit is trainer.fit
    assert vpgea_fast.StopTraining is trainer.StopTraining
    assert not hasattr(vpgea_fast, "train")
    program = "import sys, vpgea_fast; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = [name for name in done.stdout.split() if name.startswith(("torch", "vpgea_fast"))]
    assert loaded == ["vpgea_fast"]

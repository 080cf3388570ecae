"""The whole run on several processes: resumed, killed, poisoned, restarted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, watch_ranks
from runs import recorded

from vpgea_fast import checkpoint, config, rows, trainer
from vpgea_fast.config import ParallelConfig
from vpgea_fast.distributed import World, open_world

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs/tiny.yaml"


@pytest.fixture
def words(tiny_words):
    """Command-line words for a small run of the tiny task: `words("name", "--a.b", "c")`."""
    return tiny_words(
        {
            "train.questions_per_step": 2,
            "objective.group_size": 4,
            "objective.prior_samples": 2,
            "metrics.diag_every": 0,
            "metrics.compare": "null",
            "rollout.max_new_tokens": 24,
            "checkpoint.export": "false",
            "optim.schedule": "constant",
        }
    )


def fit(words, resume=False, die_after=None, poison=None, stop_after=None, late=0.0):
    """One rank's run. `die_after`: rank 1 kills itself after that step. `poison`: from that step on
    the first row has a coefficient that is not a number, which one rank meets. `stop_after`: rank 1
    gets a SIGTERM after that step, and rank 0 none. `late`: seconds that rank 1 starts later."""
    time.sleep(late * int(os.environ["RANK"]))
    warnings.filterwarnings("ignore", message=".*is of 2 processes, now there are 1")
    finish, build = trainer.Trainer.finish_step, rows.build_rows
    step = 0

    def finish_step(self, stats):
        nonlocal step
        finish(self, stats)
        step = self.state.step
        if step == die_after and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_after and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def build_rows(*args, **kwargs):
        made = build(*args, **kwargs)
        if poison is None or step < poison or not made:
            return made
        nan = torch.full_like(made[0].coef, float("nan"))
        return [replace(made[0], coef=nan), *made[1:]]

    trainer.Trainer.finish_step, rows.build_rows = finish_step, build_rows
    source = Path(words[1]) / "config.yaml" if resume else TINY
    return trainer.fit(config.load(source, words), resume=resume)


@pytest.mark.parametrize("save_every", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_of_two_goes_on_bitwise_and_on_one_closely(words, tmp_path, save_every):
    """Four saves; killed between the second and the third."""
    death, whole = 2 * save_every + save_every // 2, 4 * save_every

    def saved(name, steps):
        return words(name, "--train.steps", str(steps), "--checkpoint.save_every", str(save_every))

    straight, parts = saved("straight", whole), saved("parts", whole)
    assert run_ranks(fit, straight) == [True, True]
    ends = watch_ranks(fit, parts, False, death, grace_s=60)
    assert ends[1].status == -signal.SIGKILL
    assert ends[0].status == 1  # by itself, soon, with the broken connection as its cause
    assert "Connection" in ends[0].output or "closed" in ends[0].output
    shutil.copytree(tmp_path / "parts", tmp_path / "fewer")
    assert run_ranks(fit, parts, True) == [True, True]
    assert recorded(tmp_path / "straight") == recorded(tmp_path / "parts")
    paths = [(tmp_path / name / "paths.jsonl").read_bytes() for name in ("straight", "parts")]
    assert paths[0] == paths[1]

    assert run_ranks(fit, saved("fewer", death), True, size=1) == [True]
    assert len(recorded(tmp_path / "fewer")) == death
    for ours, want in zip(
        recorded(tmp_path / "fewer"), recorded(tmp_path / "straight"), strict=False
    ):
        assert ours["tokens_generated"] == want["tokens_generated"]
        assert ours["loss"] == pytest.approx(want["loss"], abs=5e-6)
        assert ours["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def fit_and_hear(words, resume, number=None):
    """One rank's run; the last rank gets signal `number` in step 4, with two updates of its rollout
    made and two to come."""
    update = trainer.Trainer.update

    def update_and_hear(self, rows, scored):
        made = self.state.rollout.made if self.state.rollout else ()
        if (
            number
            and self.state.step == 3
            and len(made) == 2
            and self.world.rank == self.world.size - 1
        ):
            assert not any(reason for _, reason in made), "an update before has changed nothing"
            os.kill(os.getpid(), number)
        return update(self, rows, scored)

    trainer.Trainer.update = update_and_hear
    source = Path(words[1]) / "config.yaml" if resume else TINY
    return trainer.fit(config.load(source, words), resume=resume)


def newest(run_dir):
    """Step and tensors of the newest checkpoint: weights and optimiser."""
    found = checkpoint.find_checkpoint(run_dir, world=World(torch.device("cpu")))
    assert found is not None
    return found.step, found.tensors()


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_ends_between_two_updates_of_a_rollout_resumes_bitwise(tiny_words, tmp_path, size):
    """Four updates a step. Killed after the second of step 4, whose last checkpoint is of step 2:
    what the two have changed is lost with them, and steps 3 and 4 are made again. A SIGTERM in
    their place then saves what is there."""
    words = tiny_words(
        {
            "objective": "grpo",
            "run.seed": 1,  # every part of its fourth rollout has a gradient
            "objective.group_size": 4,
            "train.questions_per_step": 6,
            "train.minibatches": 2,
            "train.epochs": 2,
            "train.steps": 4,
            "metrics.compare": "null",
            "metrics.diag_every": 0,
            "rollout.max_new_tokens": 64,
            "checkpoint.export": "false",
            "checkpoint.save_every": 2,
            "optim.warmup_steps": 0,
            "optim.lr": 0.0003,
        }
    )
    whole, parts = words("whole"), words("parts")
    assert run_ranks(fit_and_hear, whole, False, size=size) == [True] * size
    ends = watch_ranks(fit_and_hear, parts, False, signal.SIGKILL, size=size, grace_s=60)
    assert ends[-1].status == -signal.SIGKILL, ends[-1].output
    assert all(rank.status == 1 for rank in ends[:-1])
    assert [record["step"] for record in recorded(tmp_path / "parts")] == [1, 2, 3]
    assert newest(tmp_path / "parts")[0] == 2
    assert run_ranks(fit_and_hear, parts, True, signal.SIGTERM, size=size) == [False] * size
    # Shards cannot drop half a gradient: several processes make the update that they are in.
    saved = f"step_3_{2 if size == 1 else 3}"
    assert {p.name for p in (tmp_path / "parts/checkpoints").iterdir()} == {"step_2", saved}
    assert run_ranks(fit_and_hear, parts, True, size=size) == [True] * size
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole")
    # Every path's sampler log-probs, the answer's too, are here whichever process drew it.
    gaps = [record["mismatch_mean"] for record in recorded(tmp_path / "whole")]
    assert gaps == pytest.approx([1.0] * 4, abs=1e-5)
    paths = [(tmp_path / name / "paths.jsonl").read_bytes() for name in ("parts", "whole")]
    assert paths[0] == paths[1]
    (step, ours), (last, want) = newest(tmp_path / "parts"), newest(tmp_path / "whole")
    assert step == last == 4
    assert ours.keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in ours.items())


def test_five_poisoned_steps_end_all_processes_and_leave_a_good_checkpoint(words, tmp_path):
    given = words("poisoned", "--train.steps", "9", "--checkpoint.save_every", "2")
    ends = watch_ranks(fit, given, False, None, 2, grace_s=60)
    assert [rank.status for rank in ends] == [1, 1]
    assert all("5 non-finite gradients in a row at step" in rank.output for rank in ends)
    run = tmp_path / "poisoned"
    skipped = [record for record in recorded(run) if record["skipped"]]
    assert len(skipped) >= 5
    (file,) = run.glob("nonfinite_step_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 1
    assert set(map(str, rows[0]["coef"])) == {"nan"}
    assert run_ranks(fit, [*given, "--train.steps", "7"], True) == [True, True]


def test_a_stop_of_one_process_is_one_of_all(words, tmp_path):
    """A signal that one of two hears, then a time limit that one reaches first: both leave after
    the same step, saved, and the run goes on from there."""
    given = words("stopped", "--train.steps", "5", "--checkpoint.save_every", "100")
    assert run_ranks(fit, given, False, None, None, 2) == [False, False]
    (first,) = (tmp_path / "stopped/checkpoints").iterdir()
    assert first.name == "step_2"
    limited = [*given, "--train.steps", "1000", "--run.max_minutes", "0.025"]
    assert run_ranks(fit, limited, True, None, None, None, 1.0) == [False, False]
    steps = sorted(int(p.name.removeprefix("step_")) for p in first.parent.iterdir())
    assert steps[-1] == recorded(tmp_path / "stopped")[-1]["step"]


def wait_for_nobody():
    world = open_world(ParallelConfig(timeout_minutes=0.05), "cpu")
    if world.rank == 1:
        time.sleep(10)
        return
    world.barrier()


def test_a_process_that_hangs_ends_the_others_after_the_time_out():
    waiting, _ = watch_ranks(wait_for_nobody, grace_s=60)
    assert waiting.status == 1
    assert "imed out" in waiting.output


@pytest.mark.slow  # half a minute, most of it torch starting four times
def test_torchrun_restarts_a_run_that_lost_a_process(words, tmp_path):
    """One of two processes is killed: the job starts again from the last checkpoint, by itself, and
    ends where an undisturbed one does."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, sys\n"
        "from vpgea_fast import cli, trainer\n"
        "finish = trainer.Trainer.finish_step\n"
        "def dying(self, stats):\n"
        "    finish(self, stats)\n"
        "    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "    if first and self.state.step == 7 and self.world.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "trainer.Trainer.finish_step = dying\n"
        "sys.exit(cli.main())\n"
    )
    more = ["--train.steps", "12", "--checkpoint.save_every", "5"]
    run_ranks(fit, words("calm", *more))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *(str(worker), "train", str(TINY), "--resume-if-started", *map(str, words("hit", *more))),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "exitcode: -9" in done.stderr  # it did lose one
    assert recorded(tmp_path / "hit") == recorded(tmp_path / "calm")

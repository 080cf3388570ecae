"""Rounds of Variational Reasoning: a round that falls is refused, and any end is gone on from."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vpgea_fast import config, strict_yaml
from vpgea_fast.cli import main
from vpgea_fast.sweep.plan import SweepError
from vpgea_fast.sweep.rounds import held_out_bound, run_rounds

VR_TINY = Path(__file__).parents[1] / "configs/vr-tiny.yaml"
OF_A_ROUND = ("unhinted", "phi", "hinted", "weights", "theta")
OF_A_MEASURE = ("held_out_paths", "held_out")


@pytest.fixture
def words(tiny_world):
    """Words of a small configuration, with more behind them."""
    small = {
        "model.path": tiny_world.base_dir,
        "data.train": tiny_world.train_path,
        "eval.data": f"[{tiny_world.test_path}]",
        "eval.limit": 5,
        "data.limit": 5,
        "rollout.max_new_tokens": 72,
        "verify.name": "number",
        "scoring.answer_samples": 2,
        "objective.group_size": 3,
        "objective.prior_samples": 3,
        "train.questions_per_step": 2,
        "train.steps": 2,
        "metrics.diag_every": 0,
        "run.seed": 3,
    }
    own = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    return lambda *more: [*own, *more]


def here(launched):
    """A launch in this process, which is the same command, and notes it."""

    def launch(given, _log):
        launched.append(Path(given[1]).relative_to(Path(given[1]).parents[1]).with_suffix(""))
        return main(given)

    return launch


def stages(rounds):
    found = [f"round_0/{name}" for name in OF_A_MEASURE]
    for number in range(1, rounds + 1):
        found += [f"round_{number}/{name}" for name in (*OF_A_ROUND, *OF_A_MEASURE)]
    return found


class LeftError(Exception):
    """The rounds were left."""


def test_a_round_that_falls_is_refused_and_rounds_that_were_left_go_on(words, tmp_path):
    """With a rate that destroys theta; left behind every sixth stage."""
    small = ["--train.steps", "1", "--eval.limit", "3", "--metrics.figure", "false"]
    cfg = config.load(VR_TINY, words(*small, "--optim.lr", "0.3"))
    launched, told, lefts, known = [], [], 0, []

    def leaving(given, log):
        status = here(launched)(given, log)
        if len(launched) % 6 == 0:
            raise LeftError  # the stage has ended, and nothing says so yet
        return status

    for _ in range(9):
        try:
            known = run_rounds(cfg, tmp_path / "out", 2, told.append, launch=leaving)
            break
        except LeftError:
            lefts += 1
    # What had ended when it was left is gone on with, which makes no step; all else ran once.
    assert [*dict.fromkeys(map(str, launched))] == stages(1)
    assert len(launched) == len(stages(1)) + lefts
    assert lefts
    assert told[0].startswith("objective.phi_weight and share_params change nothing")
    first, second = known
    assert (first["kept"], second["kept"]) == (True, False)
    assert second["bound"] < first["bound"]
    assert second["change"] == pytest.approx(second["bound"] - first["bound"], rel=1e-9)
    assert second["change_error"] > 0
    written = json.loads((tmp_path / "out/rounds.json").read_text())
    assert written == {"kept": first, "rounds": known}
    assert first["theta"] == first["phi"] == cfg.model.path
    assert not (tmp_path / "out/export").exists()
    assert f"round 1 is refused: its held-out bound fell from {first['bound']:.6g}" in told[-1]
    # Nothing is made again, and another configuration is another folder's.
    launched.clear()
    # As a version wrote it before a key came, and before another had a new default.
    for file in (tmp_path / "out").glob("round_*/*.yaml"):
        tree = config.read_sections(file)
        del tree["parallel"]["tensor"]
        tree["parallel"]["accumulate"] = "sharded"
        file.write_text(strict_yaml.dump(tree))
    assert run_rounds(cfg, tmp_path / "out", 2, told.append, launch=here(launched)) == known
    assert launched == []
    other = config.load(VR_TINY, words(*small, "--optim.lr", "0.2"))
    with pytest.raises(SweepError, match="is of another configuration"):
        run_rounds(other, tmp_path / "out", 2, told.append, launch=here(launched))


def test_the_held_out_bound_by_hand():
    """Two questions: one with two thoughts, one whose only thought has no right answer."""
    lines = [
        {"question_id": "a", "log_ratio": -1990.0, "answered": 0.5},
        {"question_id": "a", "log_ratio": -1991.0, "answered": 1.0},
        {"question_id": "b", "log_ratio": 3.0, "answered": 0.0},
    ]
    found = held_out_bound(lines, least=0.25)
    a = -1990 + math.log((0.5 + math.exp(-1)) / 2)
    assert found["bound"] == pytest.approx((a + 3 + math.log(0.25)) / 2, abs=1e-9)
    assert (found["questions"], found["answered"]) == (2, 0.5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objective.name", "vr_theta"], "objective: got 'vr_theta', expected vr with phi"),
        (["--objective.phi", "iwae", "--objective.prior_samples", "8"], "expected vr with phi"),
        (["--objective.estimator", "gml"], "objective.estimator: got 'gml', expected accuracy"),
        (["--eval.data", "[]"], "eval.data is empty; the bound of its questions decides"),
    ],
)
def test_what_no_round_can_be_made_of_is_refused(more, said, words, tmp_path, capsys):
    given = [*words(), *more]
    if "vr_theta" in more:  # a key of vr
        at = given.index("--objective.prior_samples")
        del given[at : at + 2]
    command = ["vr-rounds", str(VR_TINY), "--out", str(tmp_path / "out"), *given]
    assert main(command) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/round*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_that_are_killed_at_any_moment_end_as_if_they_had_not_been(words, tmp_path):
    more = {"optim.lr": 6e-4, "train.steps": 6, "train.questions_per_step": 4}
    more |= {"data.limit": 24, "eval.limit": 24, "rollout.max_new_tokens": 160}
    given = words(*(word for key, value in more.items() for word in (f"--{key}", str(value))))
    cfg = config.load(VR_TINY, given)
    whole = run_rounds(cfg, tmp_path / "whole", 1, print, launch=here([]))
    command = ["-m", "vpgea_fast.cli", "vr-rounds", str(VR_TINY), "--rounds", "1"]
    command = [sys.executable, *command, "--out", str(tmp_path / "killed"), *given]
    # Each is left a little later than the one before, by turns asked and killed.
    for number in range(9):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                # Stages of some seconds: each kill meets another one, the last start goes through.
                assert process.wait(timeout=5 + 2.7 * number if number < 8 else None) == 0
                break
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL if number % 2 else signal.SIGTERM)
    found = json.loads((tmp_path / "killed/rounds.json").read_text())["rounds"]
    assert [f["bound"] for f in found] == [f["bound"] for f in whole]
    assert [f["kept"] for f in found] == [True, True]
    for name in ("export", "export_posterior"):
        a, b = (tmp_path / out / name / "model.safetensors" for out in ("whole", "killed"))
        assert a.read_bytes() == b.read_bytes()

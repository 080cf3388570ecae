"""A stop between two updates of a rollout is saved there, and a resume makes the rest of them."""

import json
import os
import shutil
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from batches import prompted, sampled, scored, whole
from ranks import run_ranks, watch_ranks
from runs import recorded, words_of

from vpgea_fast import checkpoint, collect, config, trainer
from vpgea_fast.checkpoint import CheckpointError, protocol
from vpgea_fast.distributed import World
from vpgea_fast.types import PromptedQuestion, Score, ScoredBatch
from vpgea_fast.updates import plain, revived

ALONE = World(torch.device("cpu"))
TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
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
HALFWAY = {"checkpoint.save_every": 1, "train.steps": 2}
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
        right = batch.prior.correct_BP.mean().item()
        baseline = 0.5 * state.get("baseline", 0.0) + 0.5 * right
        (part,) = found.parts
        part = replace(part, weight_BP=part.weight_BP * (1 + baseline))
        return replace(found, parts=(part,), state={"baseline": baseline})
"""
REMEMBERING = ["--objective.name", "custom", "--objective.target", "own:Remembering"]
OBJECTIVES = {
    "state, importance weights, reference policy": [
        *REMEMBERING,
        *("--objective.kl_coef", "0.05", "--rollout.importance_cap", "1.5"),
    ],
    "distilled paths": [
        *("--objective", "vpgea", "--objective.prior_samples", "2", "--train.steps", "2"),
        *("--metrics.diag_every", "1"),
    ],
    "replaced questions": ["--train.resample_rounds", "1"],
    "answers behind thoughts": [
        *("--objective", "vr", "--objective.prior_samples", "2", "--train.steps", "2"),
    ],
    "two policies": [
        *("--objective", "vr", "--objective.share_params", "false", "--objective.phi", "iwae"),
        *("--posterior.lr", "0.001", "--train.steps", "2"),
    ],
    "likelihood": ["--objective.name", "drgrpo", "--objective.reward", "likelihood"],
}
QUICK = "state, importance weights, reference policy"


@pytest.fixture
def words(tiny_words, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)  # from where a run imports an objective
    sys.modules.pop("own", None)
    return tiny_words(SMALL)


class Disturbed:
    """Patches of a run: `stop` or `die` (step, update) in that update. `inside` stops it before its
    gradient is whole. `drawn`: the steps that were drawn."""

    def __init__(self, stop=None, die=None, *, inside=False):
        self.stop, self.die, self.inside, self.drawn = stop, die, inside, []

    def __enter__(self):
        self.update, self.collect = trainer.Trainer.update, collect.Collector.collect
        disturbed = self

        def update(self, rows, scored):
            place = self.state.step + 1, 1 + self.state.made
            last = self.world.rank == self.world.size - 1  # the others hear nothing
            if place == disturbed.die and last:
                os.kill(os.getpid(), signal.SIGKILL)
            if place == disturbed.stop and last and disturbed.inside:
                os.kill(os.getpid(), signal.SIGTERM)
            found = disturbed.update(self, rows, scored)
            if place == disturbed.stop and last:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        def draw(self, step, *more):
            disturbed.drawn.append(step)
            return disturbed.collect(self, step, *more)

        trainer.Trainer.update, collect.Collector.collect = update, draw
        return self

    def __exit__(self, *_):
        trainer.Trainer.update, collect.Collector.collect = self.update, self.collect


def fit(words, *, resume=False, **disturbed):
    """(how it ended, steps that were drawn) of a run, or of one process of it."""
    source = Path(words[1]) / "config.yaml" if resume else TINY
    with Disturbed(**disturbed) as seen:
        ending = trainer.fit(config.load(source, words), resume=resume)
    return ending, seen.drawn


def on_disk(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def require_equal(run, other):
    """Bitwise in the newest checkpoint, the metrics and the paths."""
    mine, its = (checkpoint.find_checkpoint(path, world=ALONE) for path in (run, other))
    assert (mine.step, mine.updates) == (its.step, its.updates)
    assert mine.trainer_state["method"] == its.trainer_state["method"]
    tensors, same = mine.tensors(), its.tensors()
    assert tensors.keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())
    assert recorded(run) == recorded(other)
    assert (run / "paths.jsonl").read_bytes() == (other / "paths.jsonl").read_bytes()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == QUICK else pytest.mark.slow) for n in OBJECTIVES],
)
def test_a_stop_between_updates_resumes_bitwise(name, words, tmp_path, capsys):
    more = OBJECTIVES[name]
    whole, parts = words("whole", *more), words("parts", *more)
    assert fit(whole)[0] is trainer.Ending.DONE
    capsys.readouterr()
    assert fit(parts, stop=(2, 2)) == (trainer.Ending.STOPPED, [0, 1])
    assert "stopped after update 2 of 4 of step 2, saved; go on" in capsys.readouterr().out
    assert on_disk(tmp_path / "parts") == ["step_1_2"]
    assert [record["step"] for record in recorded(tmp_path / "parts")] == [1]
    ending, drawn = fit(parts, resume=True)
    assert "goes on after update 2 of 4 of step 2, with its paths" in capsys.readouterr().out
    assert ending is trainer.Ending.DONE
    assert drawn == [*range(2, len(recorded(tmp_path / "whole")))]
    require_equal(tmp_path / "parts", tmp_path / "whole")
    assert all(record["grad_norm"] > 0 for record in recorded(tmp_path / "whole"))


def killed(words):
    fit(words, die=(2, 3))


def test_a_kill_between_updates_resumes_bitwise(words, tmp_path):
    """SIGKILL before update 3 of the second step, with a checkpoint after each update."""
    more = [*OBJECTIVES[QUICK], "--checkpoint.save_minutes", "0.000001"]
    whole, parts = words("whole", *OBJECTIVES[QUICK]), words("parts", *more)
    assert fit(whole)[0] is trainer.Ending.DONE
    (rank,) = watch_ranks(killed, parts, size=1)
    assert rank.status == -signal.SIGKILL
    assert "step_1_2" in on_disk(tmp_path / "parts")
    assert fit(parts, resume=True)[0] is trainer.Ending.DONE
    require_equal(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def _halfway(tiny_world, tmp_path_factory):
    given = words_of(SMALL | HALFWAY, tiny_world, tmp_path_factory.mktemp("halfway") / "run")
    fit(given, stop=(2, 2))
    return Path(given[1])


@pytest.fixture
def halfway(_halfway, tiny_world, tmp_path):
    """Words of a run that was stopped after two of four updates of its second step; its step 1 is
    saved too."""
    run = shutil.copytree(_halfway, tmp_path / "parts")
    assert on_disk(run) == ["step_1", "step_1_2"]
    return words_of(SMALL | HALFWAY, tiny_world, run)


def test_stops_in_every_update_add_up_to_the_whole(words, tmp_path):
    """Each process makes one update, or loses half of one: what it had begun is made again."""
    more = ["--objective", "vpgea", "--objective.prior_samples", "2", "--train.steps", "1"]
    more += ["--train.micro_batch_tokens", "256"]
    whole, parts = words("whole", *more), words("parts", *more)
    fit(whole)
    assert fit(parts, stop=(1, 1)) == (trainer.Ending.STOPPED, [0])
    assert on_disk(tmp_path / "parts") == ["step_0_1"]
    assert fit(parts, stop=(1, 2), resume=True, inside=True) == (trainer.Ending.STOPPED, [])
    assert on_disk(tmp_path / "parts") == ["step_0_1"]
    assert fit(parts, stop=(1, 3), resume=True) == (trainer.Ending.STOPPED, [])
    assert on_disk(tmp_path / "parts") == ["step_0_3"]
    # After the last update the step is whole, and saved as one.
    assert fit(parts, stop=(1, 4), resume=True) == (trainer.Ending.STOPPED, [])
    assert on_disk(tmp_path / "parts") == ["step_1"]
    assert fit(parts, resume=True) == (trainer.Ending.DONE, [])
    require_equal(tmp_path / "parts", tmp_path / "whole")


def test_what_cannot_go_on_between_updates_says_so(halfway, tmp_path, capsys):
    run = tmp_path / "parts"
    for key, value, was in (("minibatches", 4, 2), ("epochs", 1, 2)):
        fault = (
            rf"would change train\.{key} from {was} to {value}, .*; set them back .*, or delete "
            r".*step_1_2 to go on from step 1$"
        )
        with pytest.raises(CheckpointError, match=fault):
            fit([*halfway, f"--train.{key}", str(value)], resume=True)
    with pytest.raises(CheckpointError, match=r"train\.steps 1: 1 steps and 2 of the updates of"):
        fit([*halfway, "--train.steps", "1"], resume=True)
    assert on_disk(run) == ["step_1", "step_1_2"]
    # Export, report and the best know whole steps alone.
    assert checkpoint.saved_steps(run) == [1]
    # What it names is right: the last whole step goes on with other numbers.
    shutil.rmtree(run / "checkpoints/step_1_2")
    capsys.readouterr()
    assert fit([*halfway, "--train.epochs", "1"], resume=True) == (trainer.Ending.DONE, [1])
    assert "changed at step 1: train.epochs 2 -> 1" in capsys.readouterr().out


def test_a_damaged_rollout_costs_no_more_than_its_step(halfway, tmp_path):
    """Made again from the whole step, it is bitwise what the rest of it was."""
    whole = [*halfway, "--run.dir", str(shutil.copytree(halfway[1], tmp_path / "whole"))]
    os.truncate(tmp_path / "parts/checkpoints/step_1_2/rollout.pt", 100)
    with pytest.warns(UserWarning, match=r"step_1_2: rollout\.pt has 100 bytes.*falling back"):
        assert fit(halfway, resume=True) == (trainer.Ending.DONE, [1])
    assert fit(whole, resume=True) == (trainer.Ending.DONE, [])
    require_equal(tmp_path / "parts", tmp_path / "whole")


def edited(run, change):
    """Change what a rollout.pt holds, and the manifest with it."""
    found = run / "checkpoints/step_1_2"
    kept = torch.load(found / "rollout.pt", weights_only=True)
    change(kept)
    torch.save(kept, found / "rollout.pt")
    manifest = json.loads((found / "manifest.json").read_text())
    manifest["files"] |= protocol._manifest(found, ["rollout.pt"])
    (found / "manifest.json").write_text(json.dumps(manifest))


def test_a_rollout_of_other_rows_is_refused_and_of_other_coefficients_told(
    halfway, tmp_path, capsys
):
    run = tmp_path / "parts"
    for change, fault in (
        (lambda kept: kept["old"].pop(), r"its paths give (\d+) rows, and gave"),
        (lambda kept: kept.pop("found"), "KeyError: 'found'"),
    ):
        copy = shutil.copytree(run, tmp_path / "copy")
        edited(copy, change)
        with pytest.raises(CheckpointError, match=rf"cannot read .*step_1_2: .*{fault}.*delete it"):
            fit([*halfway, "--run.dir", str(copy)], resume=True)
        shutil.rmtree(copy)
    edited(run, lambda kept: kept.update(rows=kept["rows"] + 1))
    capsys.readouterr()
    assert fit(halfway, resume=True) == (trainer.Ending.DONE, [])
    assert "its paths have other coefficients than when they were drawn" in capsys.readouterr().out


def test_the_clock_saves_between_updates_too(words, tmp_path):
    names, save = [], checkpoint.Saver.save

    def seen(*args, **more):
        names.append(save(*args, **more).name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", seen)
        more = ["--checkpoint.save_minutes", "1e-6", "--train.steps", "1"]
        fit(words("run", *more))
    assert names == ["step_0_1", "step_0_2", "step_0_3", "step_1"]
    assert on_disk(tmp_path / "run") == ["step_1"]


def test_weights_between_updates_are_not_evaluated_as_those_of_the_start(
    words, tmp_path, tiny_world, capsys
):
    more = ["--eval.data", f"[{tiny_world.test_path}]", "--eval.limit", "1", "--train.steps", "1"]
    given = words("run", *more, "--eval.max_new_tokens", "16", "--train.questions_per_step", "2")
    fit(given, stop=(1, 1))
    (tmp_path / "run/eval.json").unlink()
    capsys.readouterr()
    assert fit(given, resume=True)[0] is trainer.Ending.DONE
    assert "no evaluation before training" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/eval.json").read_text()).keys() == {"after"}


def test_a_batch_is_the_same_behind_weights_only(tmp_path):
    """Every field of every record, and no storage beside what it shows."""
    long = torch.arange(10_000)
    asked = prompted("q0", student=[1, 2], teacher=[1, 3], cue=[4], target=[5, 6])
    asked = PromptedQuestion(
        **{
            name: getattr(asked, name)
            for name in ("student_ids", "teacher_ids", "close_ids", "cue_ids")
        },
        question=asked.question,
        target_ids=asked.target_ids,
        variant_ids=(torch.tensor([7]), torch.tensor([8, 9])),
        fields={"budget": "64", "record": "Path"},
    )
    path = sampled(long[3:6], question_id="q0", stream="prior", index=0, answer_ids=long[:2])
    columns = scored(((path,),), torch.tensor([[float("nan")]]))
    batch = whole([asked], columns, columns)
    batch = ScoredBatch(
        **{name: getattr(batch, name) for name in ("questions", "posterior", "prior", "lost_B")},
        posterior_view="student",
        token_limit=77,
        logps={Score("prior", "student", "thought", "reference"): {path.key: torch.ones(3)}},
        reference=columns,
    )
    torch.save(plain(batch), tmp_path / "batch.pt")
    assert (tmp_path / "batch.pt").stat().st_size < 40_000
    again = revived(torch.load(tmp_path / "batch.pt", weights_only=True))
    assert repr(again) == repr(batch)
    assert [score.who for score in again.logps] == ["reference"]
    with pytest.raises(TypeError, match="got a function, expected tensors, texts and numbers"):
        plain({"live": plain})


def on_a_rank(words, die_in_save=False, **more):
    """As `fit`, on one of several processes; process 0 is killed where it has written a rollout."""
    os.chdir(Path(words[1]).parent)
    warnings.filterwarnings("ignore", message=".*is of 2 processes, now there are 1")
    write = protocol.write_rollout

    def last_act(path, taken):
        write(path, taken)
        os.kill(os.getpid(), signal.SIGKILL)

    protocol.write_rollout = last_act if die_in_save else write
    return fit(words, **more)


DONE, STOPPED = int(trainer.Ending.DONE), int(trainer.Ending.STOPPED)
CORRECTED = ["--objective.kl_coef", "0.05", "--rollout.importance_cap", "1.5"]


@pytest.mark.slow  # seven processes
def test_two_processes_killed_in_that_save_go_on_and_one_closely(words, tmp_path):
    """Killed in the save; stopped again, saved; then resumed, by two and by one."""
    more = ["--train.steps", "2", "--checkpoint.save_every", "1", *REMEMBERING, *CORRECTED]
    whole, parts = words("whole", *more), words("parts", *more)
    run, stop = tmp_path / "parts", {"stop": (2, 2)}
    assert run_ranks(on_a_rank, whole) == [[DONE, [0, 1]]] * 2
    ends = watch_ranks(partial(on_a_rank, die_in_save=True, **stop), parts, grace_s=60)
    assert [rank.status for rank in ends] == [-signal.SIGKILL, 1]
    assert on_disk(run) == [".tmp-step_1_2", "step_1"]
    assert run_ranks(partial(on_a_rank, resume=True, **stop), parts) == [[STOPPED, [1]]] * 2
    assert on_disk(run) == ["step_1", "step_1_2"]
    shutil.copytree(run, tmp_path / "fewer")
    resume = partial(on_a_rank, resume=True)
    assert run_ranks(resume, parts) == [[DONE, []]] * 2
    require_equal(run, tmp_path / "whole")

    assert run_ranks(resume, [*parts, "--run.dir", str(tmp_path / "fewer")], size=1) == [[DONE, []]]
    mine, its = (recorded(tmp_path / name)[-1] for name in ("fewer", "whole"))
    assert mine["tokens_generated"] == its["tokens_generated"]
    assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-4)
    assert mine["loss"] == pytest.approx(its["loss"], abs=5e-6)

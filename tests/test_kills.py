"""kill -9 in every part of a run: the same command goes on by itself, and the run ends bitwise as
the one that nobody disturbed."""

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import pytest
from ranks import run_ranks
from runs import untimed

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
PHASES = {
    "evaluation": ("eval.json",),
    "save": ("checkpoints", ".saved"),
    "export": ("export",),
    "report": ("report.html", "training.png"),
    "step": ("metrics.jsonl", "paths.jsonl"),
}
"""Parts of the names of the files that a phase writes; what stands in no phase is the start's."""


def phase_of(name):
    return next(
        (phase for phase, parts in PHASES.items() if any(p in name for p in parts)), "start"
    )


def watch_files(run, act):
    """Call `act(number, name)` before every change to a file of the run, from now to the end."""
    count = 0

    def hook(event, args):
        nonlocal count
        changes = event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and isinstance(args[0], str) and args[0].startswith(run):
            number, count = count, count + 1
            act(number, args[0].removeprefix(run))

    sys.addaudithook(hook)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def life(words, act=None):
    """The exit status of a command in a process of its own (-9: killed), and what it said."""
    run = words[words.index("--run.dir") + 1]
    file = Path(f"{run}.out")
    child = os.fork()
    if child == 0:
        status = 99
        try:
            output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if act is not None:
                watch_files(run, act)
            from vpgea_fast.cli import main

            status = main(words)
            sys.stdout.flush()
            if getattr(act, "deadly", False):  # the moment that was drawn is later than the end
                kill()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file.read_text()


class Record:
    """Writes down when which file was changed."""

    def __init__(self, path):
        self.file = Path(path).open("w")  # noqa: SIM115

    def __call__(self, number, name):
        del number
        print(json.dumps([time.monotonic(), name]), file=self.file, flush=True)


class Death:
    """Kills so many seconds after a change; at once for 0."""

    deadly = True

    def __init__(self, number, delay):
        self.number, self.delay = number, delay

    def __call__(self, number, name):
        del name
        if number == self.number and not self.delay:
            kill()
        if number == self.number:
            threading.Timer(self.delay, kill).start()


def moments(record, each, seed):
    """`each` moments of every phase: half of them just before a change, half of them drawn from the
    time before it, in which the evaluation samples and the export gathers."""
    draw = random.Random(seed)
    for phase in ("start", "evaluation", "save", "export", "report"):
        places = [i for i, (_, name) in enumerate(record) if i and phase_of(name) == phase]
        for turn in range(each):
            place = draw.choice(places)
            gap = record[place][0] - record[place - 1][0]
            yield phase, *((place, 0) if turn % 2 else (place - 1, draw.uniform(0, gap) or 1e-3))


def killed(folder, fixed, each, seed):
    """[phase, change, delay, statuses and words of both lives] of every kill."""
    import matplotlib.figure  # noqa: F401  each life would import them

    import vpgea_fast.cli
    import vpgea_fast.trainer  # noqa: F401

    warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)

    def words(name):
        run = ["--run.dir", f"{folder}/{name}"]
        return ["train", str(TINY), "--resume-if-started", *fixed, *run]

    log = f"{folder}/whole.places"
    status, said = life(words("whole"), Record(log))
    assert status == 0, said
    record = [json.loads(line) for line in Path(log).read_text().splitlines()]
    found = []
    for number, (phase, place, delay) in enumerate(moments(record, each, seed)):
        first = life(words(f"run_{number}"), Death(place, delay))
        second = life(words(f"run_{number}"))
        found.append([phase, record[place][1], delay, first, second])
    return found


def facts(run):
    """All that a run says of its training; times aside."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = ["paths.jsonl", "export/model.safetensors", "export/config.json"]
    files += [f"checkpoints/{x.name}/__0_0.distcp" for x in (run / "checkpoints").iterdir()]
    evaluated = json.loads((run / "eval.json").read_text())
    return (
        untimed(lines),
        {name: (run / name).read_bytes() for name in files},
        {when: {k: v for k, v in x.items() if "time" not in k} for when, x in evaluated.items()},
    )


def check_kills(tiny_world, tmp_path, each, seed):
    settings = {
        "model.path": tiny_world.base_dir,
        "data.train": tiny_world.train_path,
        "data.limit": 8,
        "eval.data": f"[{tiny_world.test_path}]",
        "eval.limit": 2,
        "eval.every": 2,
        "eval.greedy": False,
        "verify.name": "number",
        "train.questions_per_step": 2,
        "train.steps": 3,
        "rollout.max_new_tokens": 16,
        "objective.group_size": 2,
        "objective.prior_samples": 2,
        "checkpoint.save_every": 1,
        "checkpoint.keep_last": 1,
        "optim.schedule": "constant",
        "metrics.compare": "null",
    }
    fixed = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    (found,) = run_ranks(killed, str(tmp_path), fixed, each, seed, size=1, timeout_s=1500)
    whole = facts(tmp_path / "whole")
    assert len(whole[0]) == 3
    for number, (phase, name, delay, (first, said), (second, then)) in enumerate(found):
        label, run = f"{phase}, {delay:.3f} s after {name}", tmp_path / f"run_{number}"
        assert first == -signal.SIGKILL, f"{label}: {first}: {said}"
        assert second == 0, f"{label}: {then}"
        assert facts(run) == whole, label
        assert (run / "report.html").stat().st_size > 10_000, label
        assert not [*run.rglob(".tmp-*")], label
    return [phase for phase, *_ in found]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [7, 8, 9])
def test_thirty_kills(tiny_world, tmp_path, seed):
    """Ten of each seed, two in every phase."""
    phases = check_kills(tiny_world, tmp_path, 2, seed)
    assert {phase: phases.count(phase) for phase in phases} == dict.fromkeys(
        ("start", "evaluation", "save", "export", "report"), 2
    )

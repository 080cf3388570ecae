"""`vpgea sweep`: what is equal, how a rate is picked, and that no kill loses or doubles a run."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import recorded, untimed

from vpgea_fast import strict_yaml
from vpgea_fast.cli import main
from vpgea_fast.config import as_dict, dump, load, resolve
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.metrics import Console
from vpgea_fast.stop import Stop
from vpgea_fast.sweep import Order, Sweep, budget_lines, parse_method, run_sweep
from vpgea_fast.sweep.inputs import Inputs, changed
from vpgea_fast.sweep.plan import SweepError, extended, questions
from vpgea_fast.sweep.runs import Pool, _goes_on, how_halted
from vpgea_fast.sweep.server import Starter
from vpgea_fast.sweep.table import (
    T_975,
    ending_lines,
    evaluate,
    interval,
    is_short,
    layout,
    t_975,
)

SMALL = {
    "train.steps": 2,
    "train.questions_per_step": 2,
    "eval.greedy": "false",
    "checkpoint.save_every": 1,
    "rollout.max_new_tokens": 80,
    "eval.max_new_tokens": 80,
    "verify.name": "number",  # a worker of `math` imports sympy for 0.3 s
    "metrics.figure": "false",  # a quarter of a second
}


@pytest.fixture
def order(tiny_world, tmp_path):
    """Makes an order over the tiny world with few questions: `order(rates=(1e-3,))`."""
    test = tmp_path / "held.jsonl"
    test.write_text("".join(tiny_world.test_path.read_text().splitlines(keepends=True)[:10]))
    keys = {"model.path": tiny_world.base_dir, "data.train": tiny_world.train_path, **SMALL}

    def make(*more, **changed):
        words = [f"--{key}={value}" for key, value in {**keys, "eval.data": test}.items()]
        parts = {
            "config": str(Path(__file__).parents[1] / "configs/tiny.yaml"),
            "words": (*words, *more),
            "methods": (parse_method("vpgea"),),
            "rates": (1e-3,),
            "seeds": (0,),
            "out": tmp_path / "sweep",
            "jobs": 2,
        }
        return Order(**(parts | changed))

    return make


def command(order, *more):
    words = ["sweep", order.config, "--out", str(order.out), "--seeds", *map(str, order.seeds)]
    words += ["--rates", *map(str, order.rates), "--extend", "0", "--methods", "vpgea"]
    return [*words, *more, *order.words]


def alone():
    """Whether a process without others was asked to leave."""
    return Stop(World(pick_device("cpu")))


def half(acc, tokens):
    eps3 = (100 * acc) ** 2 / tokens
    return {"acc": acc, "tokens": tokens, "eps3": eps3, "truncated": 0.0, "n": 400}


def run(lr, picked, reported, method="m", seed=0):
    """A run whose base had 92.25 % and 63 tokens on both halves; None: it diverged."""
    before = {"sampled": {"benchmarks": dict.fromkeys(("pick", "test"), half(0.9225, 63.0))}}
    after = None
    if picked is not None:
        after = {"sampled": {"benchmarks": {"pick": half(*picked), "test": half(*reported)}}}
    names = {"select": ["pick"], "test": ["test"], "tokens_generated": 10}
    return {"method": method, "lr": lr, "seed": seed, "before": before, "after": after, **names}


def test_a_run_is_short_only_where_it_still_answers():
    cases = {(0.9125, 22.0): True, (0.0, 3.0): False, (0.99, 22.1): False, (0.912, 20.0): False}
    for reported, short in cases.items():
        assert is_short(run(1e-3, (0.5, 50), reported), 22) is short
    assert not is_short(run(1e-3, None, None), 22)


def test_the_rate_is_picked_on_one_half_and_reported_on_the_other():
    """1e-3 wins on the picking half and loses on the other; 4e-3 would win, had none diverged."""
    runs = [run(1e-3, (0.99, 20), (0.93, 22)), run(2e-3, (0.95, 21), (0.99, 20))]
    runs += [run(4e-3, (1.0, 10), (1.0, 10)), run(4e-3, None, None, seed=1)]
    found = evaluate([*runs, run(5e-4, (0.5, 30), (0.0, 4), method="other")], short=22)
    row, other = found["rows"]
    assert found["rate_picked_on"] == ["pick"]
    assert (row["lr"], row["edge"], row["diverged_runs"]) == (1e-3, True, 1)
    assert row["after"]["sampled"]["acc"] == 0.93
    assert row["eps3_low"] == pytest.approx(93**2 / 22)
    assert (row["short_seeds"], row["short_runs"], row["runs"]) == (1, 3, 4)
    assert (other["short_runs"], other["intervals"]["acc"], other["edge"]) == (0, None, False)


def test_where_all_diverged_nothing_is_reported():
    (row,) = evaluate([run(1e-3, None, None)])["rows"]
    assert (row["after"], row["name"]) == ({}, "m, lr 0.001, diverged")


def test_t_intervals_against_the_integral_of_the_density():
    for freedom in (1, 2, 5, 10, 11, 15, 30, 200):
        edge, steps = t_975(freedom), 20000
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
        scale /= math.sqrt(freedom * math.pi)
        width = edge / steps
        # Simpson's rule from 0 to the edge, which holds 47.5 %.
        weights = [1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1)]
        density = [
            scale * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2)
            for i in range(steps + 1)
        ]
        area = width / 3 * math.fsum(w * d for w, d in zip(weights, density, strict=True))
        assert area == pytest.approx(0.475, abs=2e-6), freedom
    assert len(T_975) == 10


def test_an_interval_by_hand():
    # mean 2, standard error 1/sqrt(3), 2 degrees of freedom
    assert interval([1.0, 2.0, 3.0], most=4.0) == pytest.approx((0.0, 4.0))
    assert interval([9.0, 10.0, 11.0]) == pytest.approx((7.51586, 12.48414), abs=1e-4)
    assert interval([1.0]) is None


def test_the_halves_share_no_question_and_lose_none(order, tmp_path):
    lines = (tmp_path / "held.jsonl").read_text().splitlines()
    twin = json.loads(lines[0]) | {"id": "twin"}
    (tmp_path / "held.jsonl").write_text("\n".join([*lines, json.dumps(twin)]))
    asked = order()
    split = questions(asked, Sweep(asked, Console(silent=True)).base, Inputs())
    picked, shown = ([json.loads(line) for line in t.splitlines()] for t in split.files.values())
    assert (split.select, split.test) == (("select_held",), ("held",))
    assert {q["question"] for q in picked}.isdisjoint(q["question"] for q in shown)
    assert len(picked) + len(shown) == 11
    assert [q["id"] for q in picked] == [json.loads(line)["id"] for line in lines[::2]] + ["twin"]


def test_methods_draw_as_many_paths(order):
    """vpgea draws 8 + 4 paths a question, this GRPO 5: 2 x 2 x 12 = 48 paths are 4 steps of 10."""
    methods = tuple(map(parse_method, ("vpgea", "grpo:group_size=5")))
    asked = {b: order(methods=methods, budget=b) for b in ("paths", "steps", 100)}
    steps = {
        budget: [c.cfg.train.steps for c in Sweep(each, Console(silent=True)).cells()]
        for budget, each in asked.items()
    }
    assert steps == {"paths": [2, 4], "steps": [2, 2], 100: [4, 10]}
    # What reads the data's responses draws none, and makes the configuration's steps.
    read = order(methods=(parse_method("sft"),), budget=100)
    sweep = Sweep(read, Console(silent=True))
    assert [cell.cfg.train.steps for cell in sweep.cells()] == [2]
    assert budget_lines(read, sweep)[1] == "sft: 2 steps, which draw no path"
    with pytest.raises(SweepError, match="draws 24 paths a step, more than the 20"):
        Sweep(order(budget=20), Console(silent=True))


def fill(order, value_of):
    """Write the records that the runs of an order would leave."""
    for cell in Sweep(order, Console(silent=True)).cells():
        record = run(cell.rate, (0.9, 50), (0.9, 50), cell.method, cell.seed)
        record["after"]["sampled"]["benchmarks"]["pick"]["eps3"] = value_of(cell.method, cell.rate)
        file = order.out / "records" / f"{cell.name}.json"
        file.write_text(json.dumps(record | {"words": list(cell.words)}))


@pytest.mark.parametrize(("extend", "top"), [(3, 4e-3), (1, 2e-3)])
def test_grids_grow_alike_until_the_best_rate_is_inside(order, extend, top):
    """`up` is best at 2e-3, outside of the grid, `in` at 5e-4, inside of it."""
    methods = tuple(map(parse_method, ("up=vpgea", "in=vpgea:beta=0.5")))
    peak = {"up": 2e-3, "in": 5e-4}

    def value_of(method, rate):
        return 100 - abs(math.log2(rate / peak[method]))

    grid = (2.5e-4, 5e-4, 1e-3)
    asked = order(methods=methods, rates=grid, extend=extend)
    asked.out.mkdir()
    Sweep(asked, Console(silent=True)).enter()
    # Records of every rate that may be asked for: no process starts.
    fill(order(methods=methods, rates=(6.25e-5, 1.25e-4, *grid, 2e-3, 4e-3)), value_of)
    file = run_sweep(asked, Console(silent=True))
    result = json.loads(file.read_text())
    up, inside = result["rows"]
    assert up["rates"][-1] == top
    assert up["edge"] == (top < 4e-3)
    assert (inside["lr"], inside["edge"]) == (5e-4, False)
    assert len(up["rates"]) == len(inside["rates"])
    assert sum("is at an edge" in note for note in result["notes"]) == up["edge"]
    assert (file.parent / "results.png").stat().st_size > 10_000
    assert list((file.parent / "runs").iterdir()) == []


@pytest.fixture
def no_picture(monkeypatch):
    """Half a second of a sweep's end."""
    monkeypatch.setattr("vpgea_fast.sweep.plot_comparison", lambda *_, **__: None)


@pytest.mark.usefixtures("no_picture")
def test_a_method_may_have_rates_of_its_own_and_no_fewer(order):
    """`low` is best at 2.5e-4, at an end of its own grid: the other's grows too."""
    methods = tuple(map(parse_method, ("up=vpgea", "low=vpgea:beta=0.5")))
    peak, own = {"up": 1e-3, "low": 2.5e-4}, (2.5e-4, 5e-4, 1e-3)

    def value_of(method, rate):
        return 100 - abs(math.log2(rate / peak[method]))

    grids = {"low": own}
    asked = order(methods=methods, rates=(5e-4, 1e-3, 2e-3), grids=grids)
    asked.out.mkdir()
    Sweep(asked, Console(silent=True)).enter()
    more = (1.25e-4, *own, 2e-3, 4e-3)
    fill(order(methods=methods, rates=more), value_of)
    up, low = json.loads(run_sweep(asked, Console(silent=True)).read_text())["rows"]
    assert (up["rates"], up["lr"]) == ([5e-4, 1e-3, 2e-3, 4e-3], 1e-3)
    assert (low["rates"], low["lr"]) == ([1.25e-4, *own], 2.5e-4)


def test_a_folder_of_something_else_is_refused(order):
    asked = order()
    asked.out.mkdir()
    (asked.out / "thesis.tex").touch()
    with pytest.raises(SweepError, match="is not empty and no sweep"):
        run_sweep(asked, Console(silent=True))
    (asked.out / "sweep.json").write_text("[")
    with pytest.raises(SweepError, match="is no record of a sweep"):
        run_sweep(asked, Console(silent=True))
    assert {path.name for path in asked.out.iterdir()} >= {"thesis.tex", "sweep.json"}
    assert not (asked.out / "records").exists()


def test_a_grid_grows_by_its_factor():
    assert extended([1e-4, 1e-3], above=True) == [1e-4, 1e-3, 1e-2]
    assert extended([1e-4, 3e-4], above=False) == [3.33e-5, 1e-4, 3e-4]


def test_a_key_of_a_key_of_the_objective_is_given_with_a_dot():
    long = parse_method("grpo:length_reward=kimi,objective.length_reward.weight=0.4")
    short = parse_method("grpo:length_reward=kimi,length_reward.weight=0.4,verify.name=number")
    words = ("--objective.name=grpo", "--objective.length_reward=kimi")
    assert long.words == (*words, "--objective.length_reward.weight=0.4")
    assert short.words == (*long.words, "--verify.name=number")
    reward = load(
        Path(__file__).parents[1] / "configs/tiny.yaml", [*short.words]
    ).objective.length_reward
    assert (reward.name, reward.weight) == ("kimi", 0.4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "vpgae"], "there is no objective 'vpgae'; did you mean vpgea?"),
        (["--methods", "vpgea:beta"], "got 'beta' in 'vpgea:beta'; expected KEY=VALUE"),
        (["--methods", "vpgea:bta=0"], "objective.bta: unknown key; did you mean 'beta'?"),
        (["--methods", "vpgea:optim.lr=1"], "sets optim.lr, which is the same for all methods"),
        (["--methods", "vpgea", "vpgea"], "'vpgea' stands twice"),
        (["--methods", "a b=vpgea", "a_b=vpgea"], "as names of files,: 'a_b-1-0' stands twice"),
        (["--methods", "vpgea:beta=x"], "--methods 'vpgea:beta=x': "),
        (["--methods", "vpgea:beta=x"], "objective.beta: got 'x', expected a number"),
        (["--seeds", "1", "1"], "--seeds: 1 stands twice; leave one out\n"),
        (["--model.path", "no/such/folder"], "no model directory at no/such/folder"),
        (["--rates", "fast"], "--rates: got 'fast', expected numbers above 0"),
        (["--rates", "1e-3", "nan"], "--rates: got 'nan'"),
        (["--rates", "1e-3", "0.001"], "--rates: 0.001 stands twice"),
        (["--grid", "vpgea"], "--grid: got 'vpgea', expected LABEL=LR,LR,..."),
        (["--grid", "vpgea=x"], "--grid: got 'x', expected numbers above 0"),
        (["--grid", "vpgae=1e-3"], "--grid: got the method 'vpgae'; did you mean vpgea?"),
        (["--grid", "vpgea=1e-3,2e-3"], "got 2 rates, expected 1 different ones"),
        (["--grid", "vpgea=1e-3", "vpgea=2e-3"], "--grid: 'vpgea' stands twice"),
        (["--seeds", "-1"], "argument --seeds: got '-1'"),
        (["--budget", "tokens"], "argument --budget: got 'tokens'"),
        (["--budget", "tokens:0"], "argument --budget: got '0'"),
        (["--train.max_tokens", "9"], "a sweep sets it: give --budget tokens:N"),
        (["--metric", "acc"], "--metric: got 'acc', expected one of sampled_eps3"),
        (["--metric", "greedy_acc"], "eval.greedy is false, so no run measures it"),
        (["--short", "0"], "expected a number of tokens above 0"),
        (["--select", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--eval.data", "[]"], "eval.data is empty; a sweep compares evaluations"),
        (["--eval.data", "held.csv"], "is no JSONL file that a sweep can split"),
        (["--eval.data", "held.jsonl"], "there is no file held.jsonl"),
        (["--optim.lr", "1e-3"], "got --optim.lr; a sweep sets it: give --rates"),
        (["--objective.beta", "1"], "write it with its method, e.g. vpgea:beta=0"),
        (
            ["--train.record", "paths"],
            "train.record 'paths' trains nothing, so no run has an evaluation",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_anything_runs(order, capsys, more, said):
    asked = order()
    words = command(asked)
    # Instead of the good ones, not beside them.
    if more[0] in words:
        place = words.index(more[0])
        after = next(i for i in range(place + 1, len(words)) if words[i].startswith("--"))
        del words[place:after]
    words = [word for word in words if not word.startswith(f"{more[0]}=")]
    assert main([*words, *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) <= 2  # the file, then the key
    assert not asked.out.exists()


def test_a_folder_that_cannot_be_made_is_one_line(order, tmp_path, capsys):
    asked = order(out=tmp_path / "held.jsonl")
    assert main(command(asked)) == 2
    error = capsys.readouterr().err
    assert f"--out: cannot write the folder {asked.out} (File exists)" in error
    assert error.count("\n") == 1


def test_questions_that_pick_a_rate_are_others_than_those_reported(order, tmp_path, capsys):
    asked = order()
    assert main(command(asked, "--select", str(tmp_path / "held.jsonl"))) == 2
    assert "10 of its questions are among those of eval.data" in capsys.readouterr().err
    assert not asked.out.exists()


def logs(asked):
    return (asked.out / "logs").iterdir()


def same_as_a_single_run(asked, record, single):
    """Bit for bit: each step's numbers but its times, each path, and what the run answered."""
    (cell,) = (word for word in record["words"] if word.startswith("--run.dir="))
    words = [word for word in record["words"] if word != cell]
    assert main(["train", asked.config, *words, "--run.dir", str(single)]) == 0
    run = Path(cell.partition("=")[2])
    assert recorded(run) == recorded(single)
    assert (run / "paths.jsonl").read_bytes() == (single / "paths.jsonl").read_bytes()
    evaluated = json.loads((single / "eval.json").read_text())
    assert {key: record[key] for key in ("before", "after")} == evaluated


def test_a_cell_has_the_numbers_of_a_single_run_and_is_not_run_again(
    order, tmp_path, monkeypatch, capsys
):
    asked, callers = order(), tmp_path / "git/callers"
    # Who asks git, and what each process imports.
    callers.parent.mkdir()
    script = f'#!/bin/sh\necho $PPID >> "{callers}"\nexec "{shutil.which("git")}" "$@"\n'
    (tmp_path / "git/git").write_text(script)
    (tmp_path / "git/git").chmod(0o755)
    with monkeypatch.context() as during:
        during.setenv("PATH", str(callers.parent), prepend=os.pathsep)
        during.setenv("PYTHONPROFILEIMPORTTIME", "1")
        assert main(command(asked)) == 0, capsys.readouterr().err
    # The server alone, before it forked; and this process, for the table.
    assert len({*callers.read_text().split()} - {str(os.getpid())}) == 1
    imported = re.findall(r"^import time:.*\| +(\S+)$", next(logs(asked)).read_text(), re.M)
    assert imported
    assert [name for name in imported if name.startswith("vpgea_fast")] == []
    (record,) = map(json.loads, map(Path.read_text, (asked.out / "records").iterdir()))
    told = capsys.readouterr().out
    assert "1/1  vpgea  lr 0.001  seed 0  sampled_eps3" in told
    assert "vpgea: one rate was tried, so none was picked" in told
    same_as_a_single_run(asked, record, tmp_path / "single")
    assert (record["ended"], record["steps"]) == ("done", 2)
    facts = json.loads((tmp_path / "single/environment.json").read_text())
    assert record["made_by"] == {key: facts[key] for key in record["made_by"]}
    assert record["made_by"]["torch"] == torch.__version__
    steps = (tmp_path / "single/metrics.jsonl").read_text().splitlines()
    assert record["tokens_generated"] == sum(json.loads(s)["tokens_generated"] for s in steps)
    assert not list((asked.out / "runs").glob("*/checkpoints"))
    log = next(logs(asked))
    before = log.read_bytes()
    # Killed between the end of the run and its record: nothing is run again.
    path = next((asked.out / "records").iterdir())
    path.unlink()
    assert main(command(asked)) == 0
    assert json.loads(path.read_text()) == record | {"wall_s": None}
    assert log.read_bytes() == before
    # Another configuration, and another meaning of the same label, are other sweeps.
    assert main([*command(asked), "--rollout.temperature", "0.9"]) == 2
    assert "holds another sweep: config.rollout.temperature is now 0.9" in capsys.readouterr().err
    other = command(asked)
    other[other.index("vpgea")] = "vpgea=vpgea:beta=0.5"
    assert main(other) == 2
    assert "is of a run with other words" in capsys.readouterr().err


def test_a_budget_of_tokens_wants_a_schedule_without_an_end(order, capsys):
    asked = order()
    assert main(command(asked, "--budget", "tokens:900")) == 2
    assert "optim.schedule 'cosine' falls over train.steps" in capsys.readouterr().err
    assert not asked.out.exists()


# Of one run test_callbacks.py sees it.
@pytest.mark.slow
def test_runs_of_a_budget_of_tokens_end_in_the_step_that_reaches_it(order, capsys):
    asked = order()
    words = command(asked, "--budget", "tokens:900")
    assert main([*words, "--optim.schedule", "constant"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "budget of each run: 900 sampled tokens (--budget)" in told
    assert "vpgea: steps of 24 paths up to 900 tokens" in told
    (drawn,) = map(json.loads, map(Path.read_text, (asked.out / "records").iterdir()))
    lines = (asked.out / "runs/vpgea-0.001-0/metrics.jsonl").read_text().splitlines()
    tokens = [json.loads(line)["tokens_generated"] for line in lines]
    assert sum(tokens[:-1]) < 900 <= sum(tokens) == drawn["tokens_generated"]
    assert (drawn["ended"], drawn["steps"]) == ("done", len(tokens))


def lasting(folder):
    """The records without what may change between: how long the processes took, and the commit,
    which an edit of the tree marks."""
    records = [json.loads(path.read_text()) for path in sorted((folder / "records").iterdir())]
    for record in records:
        del record["wall_s"], record["words"], record["made_by"]["commit"]
    return untimed(records)


def start(order, *more):
    words = [sys.executable, "-m", "vpgea_fast.cli", *command(order, *more)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def servers(sweep, running):
    """The processes that fork the runs of a sweep: one, or none yet."""
    found = []
    for child in running(parent=sweep):
        with contextlib.suppress(OSError):  # it has just ended
            line = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [child] if b"vpgea_fast.sweep.server" in line else []
    return found


def runs_at_once(process, running):
    """The most runs of a sweep that lived at one moment, until it ends."""
    most, deadline = 0, time.monotonic() + 300
    while process.poll() is None:
        assert time.monotonic() < deadline
        for server in servers(process.pid, running):
            most = max(most, len(running(parent=server)))
        time.sleep(0.02)
    return most


def test_a_sweep_uses_every_core(order, monkeypatch, capsys):
    """As many runs at a time as there are cores, unless --jobs says otherwise."""
    started = []

    class Failed:
        """A run that has failed by the first look at it."""

        def poll(self):
            return 1

        wait = terminate = poll

    def start(_, words, log, *more):
        log.write_text("no")
        started.append((words, *more))
        return Failed()

    monkeypatch.setattr(Starter, "start", start)
    asked = order(rates=(5e-4, 1e-3, 2e-3))
    cores = len(os.sched_getaffinity(0))
    for more, jobs in (((), cores), (("--jobs", "1"), 1)):
        started.clear()
        assert main(command(asked, *more)) == 2
        told = capsys.readouterr()
        assert "ended with status 1: no (all of it: " in told.err
        assert f"3 runs, 0 known, {jobs} at a time" in told.out
        assert len(started) == min(jobs, 3)


@pytest.mark.slow
def test_runs_side_by_side_have_the_numbers_of_single_runs(order, running, tmp_path):
    asked = order(rates=(5e-4, 1e-3))
    lone = order(rates=(5e-4, 1e-3), out=tmp_path / "lone")
    for each, jobs in ((asked, 2), (lone, 1)):
        process = start(each, "--jobs", str(jobs))
        assert runs_at_once(process, running) == jobs
        told, _ = process.communicate()
        assert process.returncode == 0, told
    for path in sorted((asked.out / "records").iterdir()):
        same_as_a_single_run(asked, json.loads(path.read_text()), tmp_path / path.stem)
    assert lasting(asked.out) == lasting(lone.out)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 3])
def test_a_sweep_that_is_killed_at_any_moment_goes_on(order, tmp_path, seed):
    """kill -9 at random moments of the time that an undisturbed sweep takes, up to six times."""
    keys = {"rates": (5e-4, 1e-3), "seeds": (0,), "jobs": 2}
    whole, storm = order(**keys, out=tmp_path / "whole"), order(**keys, out=tmp_path / "storm")
    began = time.monotonic()
    told, _ = (first := start(whole)).communicate()
    assert first.returncode == 0, told
    # By the clock of this machine: a busy one takes minutes for what another does in seconds.
    dice, length, kills = random.Random(seed), time.monotonic() - began, 0
    for _ in range(6):
        process = start(storm)
        try:
            process.communicate(timeout=dice.uniform(0, length))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    told, _ = (last := start(storm)).communicate()
    assert last.returncode == 0, told
    assert kills >= 2
    assert lasting(storm.out) == lasting(whole.out)
    rows = [json.loads((f.out / "results.json").read_text())["rows"] for f in (whole, storm)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_leave_saves_its_runs(order):
    asked = order("--train.steps=40")
    process = start(asked)
    metrics = asked.out / "runs/vpgea-0.001-0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # A second sweep is refused while this one lives.
    second = start(asked)
    told = second.communicate()[0].decode()
    assert second.returncode == 2
    assert "another process runs the sweep" in told
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[0].decode()
    assert process.returncode == 143, told
    assert "the same command goes on" in told
    assert any((metrics.parent / "checkpoints").iterdir())
    assert list((asked.out / "records").iterdir()) == []


def test_what_changed_under_the_same_name_is_another_run(order, tmp_path):
    """Data, a model's files and the code of a checker: a record, and a run that has begun."""
    train = tmp_path / "train.jsonl"
    lines = Path(order().words[1].partition("=")[2]).read_text().splitlines(keepends=True)
    train.write_text("".join(lines[:8]))
    asked = order(f"--data.train={train}")
    asked.out.mkdir()
    sweep = Sweep(asked, Console(silent=True))
    sweep.enter()
    (cell,) = sweep.cells()
    pool = Pool(asked.out, 1, sweep.split, Starter(alone()), print)
    record = run(1e-3, (0.9, 20), (0.9, 20))
    record |= {"words": list(cell.words), "inputs": cell.inputs}
    path = asked.out / "records" / f"{cell.name}.json"
    path.write_text(json.dumps(record))
    assert pool.known(cell) == record
    assert set(cell.inputs) == {
        f"model {cell.cfg.model.path}",
        f"data.train {train}",
        f"eval.data {tmp_path / 'held.jsonl'}",
    }
    train.write_text("".join(lines[1:9]))
    (other,) = Sweep(asked, Console(silent=True)).cells()
    with pytest.raises(SweepError) as error:
        pool.known(other)
    assert f"{path} is of other inputs: data.train {train} has changed since" in str(error.value)
    assert "\n" not in str(error.value)
    # Of a version that did not say what it read.
    path.write_text(json.dumps({key: record[key] for key in record if key != "inputs"}))
    assert pool.known(other)
    # A run under way goes on with what it began with alone.
    path.unlink()
    begun = Path(cell.cfg.run.dir)
    begun.mkdir()
    (begun / "config.yaml").write_text(dump(cell.cfg))
    (asked.out / "configs" / f"{cell.name}.inputs.json").write_text(json.dumps(cell.inputs))
    with pytest.raises(SweepError, match=r"runs/vpgea-0\.001-0 is of other inputs: data"):
        pool.run([other])
    assert begun.exists()


DAMAGED = [
    ("{", "Expecting property name"),
    ("[1]", "list indices must be integers"),
    ({"words": 3}, "'int' object is not iterable"),
    ({"after": {}}, "got answers [['sampled'], []], expected the same at both ends"),
    ({"before": None}, "expected the same at both ends"),
    ({"lr": "fast"}, "got 'fast', expected numbers"),
    ({"inputs": "x"}, "got inputs 'x', expected names"),
    ({"after": {"sampled": {}}}, "KeyError: 'benchmarks'"),
    ({"after": {"sampled": {"benchmarks": {"pick": {}}}}}, "KeyError: 'acc'"),
]


def older(tree):
    """As a version wrote it that had no parallel.tensor, and `sharded` for parallel.accumulate."""
    parallel = {k: v for k, v in tree["parallel"].items() if k != "tensor"}
    return tree | {"parallel": parallel | {"accumulate": "sharded"}}


def test_a_folder_of_an_earlier_version_goes_on(order, capsys):
    """Its record, and a run that it has begun: they mean today what they meant."""
    asked = order()
    one = Sweep(asked, Console(silent=True))
    (cell,) = one.cells()
    run = Path(cell.cfg.run.dir)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(strict_yaml.dump(older(as_dict(cell.cfg))))
    assert load(run / "config.yaml", record=True) != cell.cfg
    assert _goes_on(run, cell)
    other = older(as_dict(cell.cfg))
    other["optim"]["lr"] = 2e-3
    (run / "config.yaml").write_text(strict_yaml.dump(other))
    assert not _goes_on(run, cell)
    shutil.rmtree(asked.out)
    assert main(command(asked)) == 0
    file = asked.out / "sweep.json"
    now = json.loads(file.read_text())
    file.write_text(json.dumps(now | {"config": older(now["config"])}))
    assert main(command(asked)) == 0
    assert json.loads(file.read_text()) == now
    file.write_text(json.dumps(now | {"config": older(now["config"]) | {"train": {}}}))
    assert main(command(asked)) == 2
    assert "holds another sweep: config.train.steps is now 2" in capsys.readouterr().err


def test_a_damaged_record_is_named(order):
    """Where it is read, with its file: not in the arithmetic of the table."""
    asked = order()
    asked.out.mkdir()
    sweep = Sweep(asked, Console(silent=True))
    sweep.enter()
    fill(asked, lambda *_: 100)
    (cell,) = sweep.cells()
    pool = Pool(asked.out, 1, sweep.split, Starter(alone()), print)
    path = asked.out / "records" / f"{cell.name}.json"
    good = json.loads(path.read_text())
    assert pool.known(cell) == good
    for change, said in DAMAGED:
        path.write_text(change if isinstance(change, str) else json.dumps(good | change))
        with pytest.raises(SweepError) as error:
            pool.known(cell)
        assert str(error.value).startswith(f"{path} is no record ("), change
        assert said in str(error.value)
        assert str(error.value).endswith("; remove it to run it anew")


def test_a_model_and_code_are_told_apart_by_content(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "model").mkdir()
    texts = {
        "model/config.json": "{}",
        "mine.py": "def same(gold, text): ...",
        "q.jsonl": '{"question": "1 + 1", "answer": "2"}\n',
    }
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    tree = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "q.jsonl")},
        "verify": {"name": "custom", "target": "mine:same"},
    }
    cfg = resolve(tree)
    known = Inputs().of(cfg)
    assert changed(known, Inputs().of(cfg)) is None
    (tmp_path / "mine.py").write_text("def same(gold, text): return True")
    assert changed(known, Inputs().of(cfg)) == "code mine:same"
    (tmp_path / "model/config.json").write_text('{"a": 1}')
    assert changed(known, Inputs().of(cfg)) == f"model {tmp_path / 'model'}"


def test_a_halted_run_is_marked_and_one_of_a_lost_engine_is_no_result():
    """At 2e-3 a run collapsed and was halted: it counts. At 4e-3 the engine was off: not picked."""
    ends = {1e-3: "done", 2e-3: "halted", 4e-3: "mismatched"}
    runs = [
        run(lr, (0.5 + lr * 100, 20), (0.5, 20), seed=seed)
        | {"ended": ends[lr] if seed else "done", "steps": 30}
        for lr in ends
        for seed in (0, 1)
    ]
    result = evaluate(runs, short=22)
    (row,) = result["rows"]
    assert (row["lr"], row["halted_seeds"], row["edge"]) == (2e-3, 1, False)
    assert (row["halted_runs"], row["mismatched_runs"]) == ([[2e-3, 1, 30]], [[4e-3, 1, 30]])
    _, (cells,) = layout(result)
    assert cells[2] == "2 (1 halted)"
    halted, off = ending_lines(result)
    assert halted.startswith("m: 1 of 6 runs halted (lr 0.002 seed 1 at step 30): an alarm ended")
    assert "no result, so their rate is not picked" in off
    # Where at every rate an engine was off, nothing is reported and nothing is called diverged.
    (none,) = evaluate([runs[-1]])["rows"]
    assert (none["after"], none["name"]) == ({}, "m, lr 0.004, mismatched")
    assert layout({"rows": [none], "rate_picked_by": "sampled_eps3"})[1][0][3] == (
        "92.2 -> mismatched"
    )


def test_a_record_says_which_alarm_halted_its_run(order):
    cell = Sweep(order("--train.idle_stop=2"), Console(silent=True)).cells()[0]
    idle = [{"step": n, "skipped": 1} for n in (1, 2)]
    assert how_halted(cell, idle)["ended"] == "halted"
    assert "no update for 2 steps in a row" in how_halted(cell, idle)["halt"]
    cell = Sweep(order("--train.mismatch_stop=2"), Console(silent=True)).cells()[0]
    steps = cell.cfg.train.mismatch_steps
    off = [{"step": n + 1, "mismatch_mean": 3.0} for n in range(steps)]
    assert how_halted(cell, off)["ended"] == "mismatched"
    assert "samples from another policy" in how_halted(cell, off)["halt"]


def test_short_runs_are_counted_in_the_mode_that_picks_the_rate():
    """Records without sampled answers, as --metric greedy_eps3 without eval.samples leaves them."""
    sampled = run(1e-3, (0.99, 20), (0.99, 20))
    parts = {when: {"greedy": sampled[when]["sampled"]} for when in ("before", "after")}
    found = evaluate([sampled | parts], "greedy_eps3", short=22)
    assert found["rows"][0]["short_runs"] == 1
    assert found["short"].startswith("greedy: tokens <= 22")


def test_drawn_tokens_are_whole_numbers():
    result = evaluate([run(1e-3, (0.9, 20), (0.9, 20)) | {"tokens_generated": 1_940_321}])
    assert layout(result)[1][0][-1] == "1,940,321"


@pytest.mark.usefixtures("no_picture")
def test_commit_and_versions_are_those_of_the_runs(order):
    """Not of who writes the table: a part was made by another commit, and one does not say."""
    asked = order(rates=(1e-3, 2e-3, 4e-3), extend=0)
    asked.out.mkdir()
    Sweep(asked, Console(silent=True)).enter()
    fill(asked, lambda *_: 100)
    files = sorted((asked.out / "records").iterdir())
    for file, commit in zip(files[:2], ("aaa", "bbb"), strict=True):
        made = {"commit": commit, "torch": "2.13"}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"made_by": made}))
    result = json.loads(run_sweep(asked, Console(silent=True)).read_text())
    assert result["commit"] == "aaa, bbb, unknown"
    assert result["environment"]["torch"] == ["2.13", None]
    assert "the runs are of several commits: 1 of aaa, 1 of bbb, 1 of unknown" in result["notes"]
    assert "3 of 3 records do not say what they read (older version)" in result["notes"]
    assert [r.get("made_by", {}).get("commit") for r in result["runs"]] == ["aaa", "bbb", None]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_before_the_first_run_says_how_to_go_on(order, monkeypatch, capsys, number):
    asked = order()

    def early(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr("vpgea_fast.sweep.parse_rates", early)
    before = signal.getsignal(signal.SIGTERM)
    assert main(command(asked)) == 128 + number
    told = capsys.readouterr()
    assert f"the same command goes on in {asked.out}" in told.out
    assert (told.out.count("\n"), told.err) == (1, "")
    assert signal.getsignal(signal.SIGTERM) is before
    assert not asked.out.exists()

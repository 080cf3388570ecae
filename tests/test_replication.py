"""benchmarks/replication.py: a fair plan, runs that come back from the file, tables and bars."""

import copy
import doctest
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from vpgea_fast import config, sweep
from vpgea_fast.checkpoint import write_text
from vpgea_fast.sweep import SweepError, parse_method
from vpgea_fast.sweep.inputs import Inputs
from vpgea_fast.sweep.plan import Questions, steps_of
from vpgea_fast.sweep.plan import cell as plan_cell
from vpgea_fast.sweep.runs import Pool

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import replication
import replication_pages as pages
import replication_plan
import replication_probes as probes
import replication_store as store
import replication_tables as tables
from sealed import sealed

pytestmark = pytest.mark.around

ROBUST, GRPO = "VPG-EA robust", "GRPO"
PLAN = replication_plan.read_plan()


@pytest.fixture
def plan():
    """One world, three methods, and little to answer."""
    stage = {"kind": "search", "worlds": ["chain-rare"], "methods": [ROBUST, GRPO, "hint-RFT"]}
    rows = {"no distillation": {"beta": 0.0}}
    ablations = {"kind": "rows", "world": "chain-rare", "method": ROBUST, "rows": rows}
    parts = {"questions": {"pick": 8, "report": 8, "few": 2}, "report_seeds": [0, 1]}
    return replace(PLAN, **parts, stages={"main": stage, "ablations": ablations}, claims=[])


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that are trained: each ends at once, as well as its rate is near 1e-3."""
    names = []

    def take(self, cell):
        names.append(cell.name)
        record = record_of(cell, self.split)
        write_text(self._record(cell), json.dumps(record))
        self.tell(record)

    monkeypatch.setattr(Pool, "_take", take)
    # Nobody looks at a sweep's own figure here, and each is a CPU second.
    monkeypatch.setattr(sweep, "plot_comparison", lambda *_, **__: None)
    return names


@pytest.fixture
def bench_of(tiny_world, monkeypatch):
    """`bench_of(plan, folder)`: in that folder, with a world that is made. Its few questions are
    read by every sweep."""

    def make(plan, folder):
        if not folder.exists():
            shutil.copytree(tiny_world.base_dir.parent, folder / "runs/worlds/chain-rare")
            store.cut_questions(folder / "runs/worlds/chain-rare", plan.questions)
        monkeypatch.chdir(folder)
        return replication.Bench(plan, Path("result.json"), Path("runs"), 2)

    return make


def record_of(cell, split):
    distance = max(cell.rate / 1e-3, 1e-3 / cell.rate)
    beta = next((w for w in cell.words if w.startswith("--objective.beta=")), "=1.0")
    # The second value of the knob wins, and distillation is what makes an answer short.
    tokens = {"0.5": 19, "0.0": 60}.get(beta.partition("=")[2], 20) + distance
    modes = ["sampled", "greedy"] if cell.cfg.eval.greedy else ["sampled"]
    ends = {
        when: {
            mode: {"benchmarks": dict.fromkeys([*split.select, *split.test], n)} for mode in modes
        }
        for when, n in (("before", half(0.9, 60)), ("after", half(0.9, tokens)))
    }
    made = {"commit": "c", "torch": "2"}
    place = {"method": cell.method, "lr": cell.rate, "seed": cell.seed, "words": [*cell.words]}
    place |= {"inputs": cell.inputs, "ended": "done", "steps": 9, "tokens_generated": 1000}
    place |= {"select": [*split.select], "test": [*split.test], "made_by": made, "wall_s": 10.0}
    return place | ends


def half(acc, tokens):
    eps3 = (100 * acc) ** 2 / tokens
    ends = {"acc_low": acc - 0.05, "acc_high": acc + 0.05}
    return {"acc": acc, "tokens": tokens, "eps3": eps3, "truncated": 0.0, "n": 8, **ends}


@pytest.mark.parametrize("module", [replication_plan, probes, store, tables])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_every_setting_of_the_plan_is_one_that_its_method_has():
    assert PLAN.stages["main"]["methods"] == [*PLAN.methods]
    place = Path("world")
    common = PLAN.words_of("chain-rare", place, "pick", greedy=False)
    variants = {PLAN.label(m, i): PLAN.variant(m, i) for m in PLAN.methods for i in range(3)}
    for of in PLAN.stages.values():
        if of["kind"] == "rows":
            base = PLAN.variant(of["method"], 0)
            variants |= {label: base | keys for label, keys in of["rows"].items()}
    for label, keys in variants.items():
        method = parse_method(replication_plan.method_text(label, keys))
        assert method.label == label
        cfg = config.load(config.find(PLAN.config), [*common, *method.words])
        assert (cfg.objective.name, cfg.eval.greedy) == (keys["objective"], False)
        paths = cfg.objective.draws().paths
        assert paths in ((16, 8) if keys["objective"] == "vr" else (12,))
        if "prompt.teacher" in keys:
            assert cfg.prompt.teacher == "{question}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["methods"]["GRPO"]["rates"].pop(), "expected four at a factor of two"),
        (lambda t: t["methods"]["VR"]["rates"].__setitem__(0, 1e-4), "a factor of two"),
        (lambda t: t["methods"]["RFT"]["knob"].pop(), "got 2 values of its knob"),
        (lambda t: t["report_seeds"].append(100), "search_seed 100 is also reported"),
        (lambda t: t["stages"]["main"]["methods"].append("PPO"), "'PPO' is no method"),
        (lambda t: t["stages"]["main"]["worlds"].append("moon"), "'moon' is no method and no"),
        (lambda t: t.pop("quick"), "is no plan (it has no quick); give one such as"),
        (
            lambda t: t.update(more=1),
            "is no plan (Plan.__init__() got an unexpected",
        ),
    ],
)
def test_a_plan_that_is_not_fair_is_one_line(tmp_path, capsys, change, said):
    tree = replication_plan.yaml.safe_load(replication_plan.PLAN.read_text())
    change(tree)
    file = tmp_path / "plan.yaml"
    file.write_text(replication_plan.yaml.safe_dump(tree))
    out = tmp_path / "result.json"
    with pytest.raises(SystemExit) as stopped:
        replication.main(["--plan", str(file), "--out", str(out), "--forecast"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_methods_are_searched_alike_and_another_machine_goes_on_from_the_file(
    plan, trained, bench_of, tmp_path, capsys
):
    bench_of(plan, tmp_path / "one").go()
    found = json.loads(Path("result.json").read_text())
    search = found["tables"]["search"]["main"]["chain-rare"]
    # hint-RFT's grid ends at 5e-4, and the best is at 1e-3: so every grid grows by two.
    assert {len(of["rates"]) for of in search.values()} == {6}
    assert {of["runs"] for of in search.values()} == {8}
    assert [of["lr"] for of in search.values()] == [1e-3, 1e-3, 1e-3]
    assert search[ROBUST]["knob"] == {"beta": 0.5}
    assert not any(of["edge"] for of in search.values())
    main = found["tables"]["main"]["chain-rare"]
    assert [*main] == [ROBUST, GRPO, "hint-RFT", "base"]
    assert main[ROBUST]["tokens"] == 20
    assert (main[ROBUST]["short_seeds"], main["base"]["tokens"]) == (2, 60)
    ablated = found["tables"]["ablations"]["chain-rare"]["no distillation"]
    assert (ablated["short_seeds"], ablated["lr"], ablated["exploratory"]) == (0, 1e-3, False)
    # 9 steps of 16 questions, 4 paths of the student and 8 of the teacher.
    student = found["worlds"]["chain-rare"]["measured"]["concise_student"]
    assert main[ROBUST]["paths"] == [576, 1152]
    assert main[ROBUST]["concise_draws"][0] == 576 * student
    assert len(trained) == 3 * 8 + 3 * 2 + 2
    text = Path("result.json").read_text()
    assert sum('"method": ' in line for line in text.splitlines()) == len(trained)

    trained.clear()
    again = bench_of(plan, tmp_path / "two")
    again = replication.Bench(
        plan, shutil.copy(tmp_path / "one/result.json", again.out), again.runs, 2
    )
    again.go()
    assert trained == []
    kept = ("tables", "folders", "worlds")
    assert all(again.result[key] == found[key] for key in kept)
    capsys.readouterr()
    # A run that the file has not is trained, and no other one; under a new plan it is marked.
    more = replace(plan, report_seeds=[0, 1, 2])
    third = bench_of(more, tmp_path / "two")
    third.go()
    assert {name.rpartition("-")[2] for name in trained} == {"2"}
    assert len(trained) == 4
    assert third.result["tables"]["main"]["chain-rare"][ROBUST]["exploratory"]
    assert f"| {ROBUST}* |" in pages.markdown(third.result, more)


def test_runs_of_a_world_that_comes_out_otherwise_are_not_mixed(plan, trained, bench_of, tmp_path):
    del plan.stages["ablations"]
    plan.stages["main"] |= {"knobs": False, "rates": [1e-3], "methods": [GRPO]}
    bench_of(plan, tmp_path / "one").go()
    before = Path("result.json").read_text()
    train = Path("runs/worlds/chain-rare/train.jsonl")
    train.write_text(train.read_text().replace("train-0001", "train-9999"))
    said = "chain-rare: train is another than that of the runs in result.json"
    with pytest.raises(replication_plan.PlanError, match=said):
        bench_of(plan, tmp_path / "one").go()
    assert Path("result.json").read_text() == before
    bench = bench_of(plan, tmp_path / "one")
    store.drop(bench.result, plan, "chain-rare", bench.runs)
    trained.clear()
    bench.go()
    assert len(trained) == 2
    # The parts are cut again, and those of other counts are others; an older file knows none.
    Path("runs/worlds/chain-rare/report.jsonl").write_text("")
    assert replication.make_worlds(bench) == []
    fewer = replace(plan, questions=plan.questions | {"few": 1})
    with pytest.raises(replication_plan.PlanError, match="few_report is another"):
        replication.make_worlds(bench_of(fewer, tmp_path / "one"))
    marks = bench.result["worlds"]["chain-rare"]["marks"]
    for name in ("few_report", "few"):
        del marks[name]
    assert replication.make_worlds(bench) == []
    assert marks.keys() < bench.result["worlds"]["chain-rare"]["marks"].keys()


def test_a_search_that_goes_on_may_have_another_winner(plan, trained, bench_of, tmp_path):
    rows = {"one prompt": {"prompt.teacher": "{question}"}}
    plan.stages["main"] |= {"methods": [ROBUST]}
    plan.stages["ablations"] |= {"rows": rows}
    bench = bench_of(plan, tmp_path / "one")
    bench.go()
    row = bench.result["tables"]["ablations"]["chain-rare"]["one prompt"]
    # The teacher sees no hint: its thoughts are as rarely concise as the student's.
    student = bench.result["worlds"]["chain-rare"]["measured"]["concise_student"]
    assert row["concise_draws"] == [many * student for many in row["paths"]]
    records = Path("runs/sweeps/main-chain-rare-search/records")

    def improve(name, tokens):
        path = records / f"{name}-100.json"
        record = json.loads(path.read_text())
        for end in record["after"]["sampled"]["benchmarks"].values():
            end |= half(0.9, tokens)
        path.write_text(json.dumps(record))
        trained.clear()
        bench = bench_of(plan, tmp_path / "one")
        bench.go()
        folder = bench.result["folders"]["main-chain-rare-report"]
        return bench.result["tables"]["main"]["chain-rare"][ROBUST], folder

    # Another value of the knob, at the same rate: nothing of the old one is left, or put back.
    row, folder = improve("VPG_EA_robust_beta_2.0-0.001", 15)
    assert len(trained) == 4
    assert len(folder["runs"]) == 2
    assert "--objective.beta=2.0" in folder["words"][ROBUST]
    assert (row["lr"], row["seeds"], row["complete"]) == (1e-3, 2, True)
    # Another rate with the words that were left before.
    row, folder = improve("VPG_EA_robust-0.0005", 10)
    assert "--objective.beta=1.0" in folder["words"][ROBUST]
    assert (row["lr"], row["seeds"]) == (5e-4, 2)
    assert bench_of(plan, tmp_path / "one").result["tables"]["main"]["chain-rare"][ROBUST] == row
    # Two rates of the same words do not mix.
    row, folder = improve("VPG_EA_robust-0.00025", 5)
    assert len(folder["runs"]) == 4
    assert (row["lr"], row["seeds"], row["drawn"]) == (2.5e-4, 2, 1000)


def drop_seed(report, _):
    report.pop()


def diverge(report, _):
    report[0] |= {"ended": "diverged", "after": None}


def halt(report, _):
    report[0] |= {"ended": "halted"}


def forget(report, _):
    report[0]["after"]["sampled"]["benchmarks"]["report"]["acc"] = 0.44


def take_the_last(_, search):
    search[:] = [run for run in search if run["lr"] <= 1e-3]


@pytest.mark.usefixtures("trained")
def test_a_verdict_is_of_whole_rows_and_tells_what_happened_to_them(plan, bench_of, tmp_path):
    row = f"main/chain-rare/{GRPO}"
    check = [[f"{row}/acc", ">=", "main/chain-rare/base/acc", 1.0, -0.5]]
    plan = replace(plan, claims=[{"says": "s", "refuted": "r", "check": check}])
    plan.stages["main"] |= {"methods": [GRPO], "knobs": False}
    del plan.stages["ablations"]
    bench = bench_of(plan, tmp_path / "one")
    bench.go()
    assert bench.result["tables"]["claims"][0]["verdict"] == "holds"
    place, none = f"{GRPO} in chain-rare", "not measured"
    lacks = f"{place} without a result of every seed"
    for change, said in (
        (drop_seed, f"{none}; {lacks}"),
        (diverge, f"{none}; {lacks}; {place} diverged with 1 of 2 seeds"),
        (halt, f"holds; {place} halted with 1 of 2 seeds"),
        (forget, f"holds; {place} forgot with 1 of 2 seeds"),
        (take_the_last, f"holds; {place} at an edge of its grid"),
    ):
        result = copy.deepcopy(bench.result)
        folders = result["folders"]
        change(*(folders[f"main-chain-rare-{part}"]["runs"] for part in ("report", "search")))
        assert tables.make(result, plan)["claims"][0]["verdict"] == said
    # Of a plan that has changed since, the claims say so; so does a search that ran after it.
    result["folders"]["main-chain-rare-search"]["runs"][0]["plan"] = "later"
    result["tables"] = tables.make(result, replace(plan, budget=1))
    assert result["tables"]["search"]["main"]["chain-rare"][GRPO]["exploratory"]
    shown = pages.markdown(result, plan)
    assert f"### claims\n\n{pages.CHANGED}\n\n| claim" in shown
    assert not tables.exploratory(result, [{}])
    assert tables.exploratory(result, [{}, {"plan": "later"}])


def test_late_differences_are_shown_by_seed():
    of = {"late_difference": [-0.25, None, 1.5], "prior_below": 1, "seeds": 3}
    assert pages._late(of) == "1 of 3 (-0.25, +1.50)"
    assert pages._late(of | {"late_difference": [None]}) == "-"


@pytest.mark.usefixtures("trained")
def test_a_run_of_another_commit_is_refused(plan, bench_of, tmp_path):
    plan.stages["main"] |= {"knobs": False, "rates": [1e-3], "methods": [GRPO]}
    del plan.stages["ablations"]
    bench = bench_of(plan, tmp_path / "one")
    bench.commit = "d"
    with pytest.raises(replication_plan.PlanError, match=r"GRPO-0.001-0 was made at commit c, and"):
        bench.go()
    assert not bench.out.exists()
    bench = bench_of(plan, tmp_path / "one")
    bench.commit = "c"
    bench.go()
    # What the file knows may be of any.
    bench.commit = "d"
    bench.save()


def test_what_fails_is_told_and_the_rest_goes_on(
    plan, trained, bench_of, tmp_path, monkeypatch, capsys
):
    plan.stages["main"] |= {"knobs": False, "rates": [1e-3], "methods": [ROBUST]}
    bench, takes = bench_of(plan, tmp_path / "one"), Pool._take

    def fail(self, cell):
        if cell.seed == 1:
            raise SweepError("no room")
        takes(self, cell)

    monkeypatch.setattr(Pool, "_take", fail)
    with pytest.raises(SystemExit) as stopped:
        bench.go()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "replication: not done: main in chain-rare, ablations in chain-rare; the same command "
        "tries it again"
    )
    # Seed 0 of both stages has been kept, and is not run again.
    assert len(trained) == 2
    monkeypatch.setattr(Pool, "_take", takes)
    bench_of(plan, tmp_path / "one").go()
    assert len(trained) == 4


def test_rows_wait_for_their_method(plan, trained, bench_of, tmp_path, capsys):
    plan.stages["main"] |= {"knobs": False, "rates": [1e-3], "methods": [GRPO]}
    with pytest.raises(SystemExit):
        bench_of(plan, tmp_path / "one").go()
    said = capsys.readouterr().err
    assert "not done: ablations in chain-rare (it needs VPG-EA robust of the main table)" in said
    assert len(trained) == 2


def test_the_forecast_counts_runs_that_are_missing(plan, trained, bench_of, tmp_path):
    plan = replace(plan, seconds={"run": 30, "base": 100, "pass_at_k": 20})
    bench = bench_of(plan, tmp_path / "one")
    # Methods x (rates and extensions, two values of a knob, seeds).
    main, rows = 3 * (4 + 2 + 2 + 2), 2
    assert replication.forecast(bench) == [
        f"main: {main} runs, {main * 30 / 60 / 2:.0f} minutes",
        f"ablations: {rows} runs, {rows * 30 / 60 / 2:.0f} minutes",
        "in all 8 minutes at 2 runs a time, 160,000 tokens a run; longest, with every extension",
    ]
    bench.go()
    done = [line.partition(",")[0] for line in replication.forecast(bench)]
    assert done == ["main: 0 runs", "ablations: 0 runs", "in all 0 minutes at 2 runs a time"]
    third = replication.Bench(replace(plan, report_seeds=[0, 1, 2]), bench.out, bench.runs, 2)
    # 10 seconds each, as they were measured.
    assert replication.forecast(third)[0] == "main: 3 runs, 0 minutes"
    assert len(trained) == main + rows
    # What would be refused is said, whether the folder is there or in the file alone.
    other = replace(plan, words=plan.words | {"rollout.temperature": 0.5})
    for runs in (bench.runs, Path("elsewhere")):
        lines = replication.forecast(replication.Bench(other, bench.out, runs, 2))
        refused = [line for line in lines if line.startswith("refused: ")]
        assert len(refused) == 3
        assert all("holds another sweep: " in line for line in refused)
        assert ("config.rollout.temperature is now 0.5" in refused[0]) == (runs == bench.runs)
    assert not Path("elsewhere").exists()


def test_the_file_lists_the_starts_that_have_made_something(plan, trained, bench_of, tmp_path):
    plan.stages["main"] |= {"knobs": False, "rates": [1e-3], "methods": [GRPO]}
    del plan.stages["ablations"]

    def go(number, plan=plan):
        bench = bench_of(plan, tmp_path / "one")
        bench.start = {"command": f"start {number}", "environment": {"commit": "c"}}
        bench.go()
        found = json.loads(bench.out.read_text())
        return [start["command"] for start in found.get("starts", [])], found.get("command")

    assert go(1) == (["start 1"], "start 1")
    assert go(2) == (["start 1"], "start 1")
    # Of an earlier version, which knew its last start alone.
    file = Path("result.json")
    found = json.loads(file.read_text())
    del found["starts"]
    file.write_text(json.dumps(sealed(found)))
    assert go(3) == ([], "start 1")
    more = replace(plan, report_seeds=[0, 1, 2])
    assert go(4, more) == (["start 1", "start 4"], "start 4")
    assert len(trained) == 3


def test_changed_files_are_those_of_the_tree_without_the_result(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    result, code = tmp_path / "result.json", tmp_path / "code.py"
    for file in (result, code):
        file.write_text("1")
    assert store.changed_files(tmp_path, result) == []
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    result.write_text("2")
    (tmp_path / "beside.txt").write_text("untracked")
    assert store.changed_files(tmp_path, result) == []
    code.write_text("2")
    assert store.changed_files(tmp_path, result) == ["code.py"]
    assert store.changed_files(tmp_path, tmp_path / "other.json") == ["code.py", "result.json"]


def test_a_claim_holds_is_refuted_or_is_not_measured():
    found = {"a": {"x": 2.0, "y": 1.9}}
    assert tables.verdict(found, [["a/x", ">", "a/y"], ["a/x", "<=", 4, 0.5]]) == "holds"
    assert tables.verdict(found, [["a/x", ">", "a/y"], ["a/y", ">", "a/x"]]) == "refuted"
    assert tables.verdict(found, [["a/x", ">", "a/y"], ["a/z", ">", "a/x"]]) == "not measured"
    assert tables.verdict(found, [["a/z", ">", 1], ["a/y", ">", "a/x"]]) == "not measured"
    assert tables.holds(found, ["a/y", ">=", "a/x", 1.0, -0.1])
    assert not tables.holds(found, ["a/y", ">=", "a/x", 1.0, -0.09])
    paths = [check[0] for claim in PLAN.claims for check in claim["check"]]
    stages = {**PLAN.stages, "search": {}}
    assert all(path.split("/")[0] in stages for path in paths)


def test_side_tables_are_means_of_what_was_measured():
    known = {"base": {"pass_at": {"1": [0.5, 0.1], "2": [0.75, 0.1]}}}
    assert tables.answered(known, {}) == {
        "base": {"1": 0.5, "2": 0.75, "errors": {"1": 0.1, "2": 0.1}}
    }
    questions = [[0.2, 3.0], [0.5, 1.0], [1.0, 1.0], [0.9, 1.0], [0.4, 4.0]]
    found = tables.weighed({"VR": {"questions": questions}}, {"bins": [0.0, 0.5, 1.0]})
    assert found["hardest"] == {"questions": 2, "VR": 1.75}
    assert found["easiest"] == {"questions": 3, "VR": 0.5}
    shown = pages._weighed("w", found | {"exploratory": False})
    assert "0.5 to 1 | 3 | 0.50" in shown
    assert shown.endswith(pages.WEIGHTS)


def test_a_winner_that_comes_out_otherwise_is_not_asked(tmp_path):
    lines = ['{"step": 1, "tokens_generated": 40}', '{"step": 2, "tokens_generated": 50}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    record = {"steps": 2, "tokens_generated": 90}
    probes.check_same(tmp_path, record)
    for other in ({"steps": 3}, {"tokens_generated": 91}):
        with pytest.raises(replication_plan.StageError, match=r"got \(2, 90\) steps and tokens"):
            probes.check_same(tmp_path, record | other)
    assert [probes.counts(n) for n in (1, 2, 12)] == [[1], [1, 2], [1, 2, 4, 8, 12]]


@pytest.mark.usefixtures("trained")
def test_how_winners_think_is_asked_once_of_each_seed(plan, bench_of, tmp_path, monkeypatch):
    asked = []

    def train_again(bench, name, world, record):
        asked.append((name, record["seed"]))
        return bench.runs / "worlds" / world / "base"

    monkeypatch.setattr(probes, "train_again", train_again)
    of = {"world": "chain-rare", "methods": [ROBUST]}
    bench = bench_of(replace(plan, after=[of]), tmp_path / "one")
    bench.go()
    # The answers are those of the base, which is right less or more often than the records say.
    with pytest.raises(replication_plan.StageError, match=r"got accuracy [\d.]+, expected 0\.9 "):
        replication.after(bench)
    samples = next(bench.runs.glob("probes/styles-*-0")) / probes.SAMPLES
    acc = fmean(sample.correct for sample in probes.read_samples(samples))
    for run in bench.result["folders"]["main-chain-rare-report"]["runs"]:
        run["after"]["sampled"]["benchmarks"]["report"]["acc"] = acc
    asked.clear()
    for _ in range(2):
        replication.after(bench)
        assert asked == [(ROBUST, 0), (ROBUST, 1)]
    table = bench_of(bench.plan, tmp_path / "one").result["tables"]["styles"]["chain-rare"]
    for seed in (0, 1):  # both are the base here, which thinks at length
        styles = table[f"{ROBUST}, {seed}"]
        assert sum(share for share, _ in styles.values()) == pytest.approx(1.0)
        assert max(styles, key=styles.get) == "verbose"
    assert "### styles of thoughts, chain-rare" in replication.markdown(bench.result, bench.plan)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("\udcff", "cannot be read"),
        ("[]", "has no sha256"),
        ('{"plan": "a", "tables": null}', "has no sha256"),
        (json.dumps(sealed({"stages": {}})), "is no result of the replication: it has no plan"),
        (json.dumps(sealed({"plan": "a"}) | {"plan": "b"}), "is not as it was written"),
    ],
)
def test_a_file_that_is_no_result_is_one_line(tmp_path, capsys, content, said):
    out = tmp_path / "result.json"
    out.write_text(content, errors="surrogateescape")
    with pytest.raises(SystemExit) as stopped:
        replication.main(["--out", str(out), "--table"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert out.read_text(errors="surrogateescape") == content


def test_a_result_is_of_one_kind_of_plan_and_of_one_bench(tmp_path, capsys):
    out = tmp_path / "result.json"
    known = store.read(out, PLAN) | {"command": "as before"}
    store.write(out, known)
    words = ["--out", str(out), "--runs", str(tmp_path / "runs"), "--collect"]
    with pytest.raises(SystemExit) as stopped:
        replication.main([*words, "--quick"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "is of the whole plan, expected one of the little plan (--quick)" in error
    assert error.count("\n") == 1
    assert store.read(out, PLAN) == known
    with replication.alone(out), pytest.raises(SystemExit) as stopped:
        replication.main(words)
    assert stopped.value.code == 2
    assert "another bench writes into" in capsys.readouterr().err
    replication.main(words)
    elsewhere = ["--out", str(tmp_path / "other.json"), *words[2:]]
    for more in (elsewhere, [*elsewhere[:2], "--table"], ["--out", str(tmp_path), "--table"]):
        with pytest.raises(SystemExit):
            replication.main(more)
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "other.json").exists()
    found = store.read(out, PLAN)
    assert found["command"] == "as before"
    assert "environment" not in found
    assert len(found["tables"]["claims"]) == len(PLAN.claims)


def test_a_signal_while_worlds_are_made_ends_what_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    child = ["sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 1; kill -TERM $PPID; exec sleep 600"]
    monkeypatch.setattr(replication, "bound_command", lambda _: child)
    words = ["--worlds", "--out", str(tmp_path / "result.json"), "--runs", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stopped:
        replication.main([*words, "--jobs", "1"])
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "replication: stopped; the same command goes on\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    # Runs are of the bench's own tree.
    assert os.environ["PYTHONPATH"] == f"{replication.ROOT}{os.pathsep}elsewhere"


def test_a_world_that_the_plan_has_not_cannot_be_remade(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        replication.main(["--out", str(tmp_path / "result.json"), "--remake", "moon"])
    assert stopped.value.code == 2
    assert "--remake: got 'moon', expected some of chain-rare, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_little_plan_keeps_its_bars_and_is_run_once(tmp_path):
    """Trained here and now: VPG-EA shortens at held accuracy, GRPO does not on the same tokens."""
    words = [replication.__file__, "--quick", "--out", "result.json"]
    said = command(words, tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    little = replication_plan.read_plan(quick=True)
    rows = found["tables"]["main"]["chain-rare"]
    assert [*rows] == [ROBUST, GRPO, "GRPO + eta", "base"]
    assert all(rows[name]["seeds"] == 2 for name in little.stages["main"]["methods"])
    assert len(little.bars) == 3
    assert all(tables.holds(found["tables"], bar) for bar in little.bars)
    (folder,) = found["folders"].values()
    assert [run["ended"] for run in folder["runs"]] == ["done"] * 6
    assert all(run["tokens_generated"] >= little.budget for run in folder["runs"])
    assert f"| {ROBUST} | 0.001 |" in said
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("records/*.json")}
    assert len(files) == 6
    command(words, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("records/*.json")} == files
    shown = command([*words, "--table"], tmp_path)
    assert shown in said


def command(words, cwd):
    """What a command has said; its status is 0."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Kept(Inputs):
    """The inputs that a folder knows, of worlds that this machine may not have."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def of(self, _cfg):
        return dict(self.known)


def kept_variants(found, name):
    """Label -> keys of the methods of a folder."""
    if name.endswith("-search"):
        stage = next(s for folder, s, *_ in PLAN.folders() if folder == name)
        names = PLAN.stages[stage]["methods"]
        return {PLAN.label(m, i): PLAN.variant(m, i) for m in names for i in range(3)}
    return {label: keys for label, (keys, _) in tables.chosen(found, PLAN, name).items()}


def kept_cells(found, name, out):
    """A pool over a restored folder, and the first run of each of its methods as a cell."""
    known, variants = found["folders"][name], kept_variants(found, name)
    store.restore(found, name, out, variants)
    order = replace(PLAN.order(name, replication.RUNS), out=out)
    base = config.load(order.config, order.words)
    split = Questions("[]", tuple(known["select"]), tuple(known["test"]), {}, {})
    inputs, cells = Kept(known["inputs"]), []
    for label in known["words"]:
        run = next(run for run in known["runs"] if run["method"] == label)
        method = parse_method(replication_plan.method_text(label, variants[label]))
        place = method, run["lr"], run["seed"]
        steps = steps_of(order, method, base)
        cells.append(plan_cell(order, *place, split=split, steps=steps, inputs=inputs))
    return Pool(out, 1, split, None, print), cells


def test_the_committed_sweeps_go_on_under_todays_code(tmp_path):
    """Every folder, and a run of each of its methods: nothing of it would be run again."""
    found, count = store.read(replication.RESULT, PLAN), 0
    assert len(found["folders"]) == len([*PLAN.folders()])
    for name in found["folders"]:
        pool, cells = kept_cells(found, name, tmp_path / name)
        sweep.hold_sweep(tmp_path / name / "sweep.json", PLAN.identity(name, replication.RUNS))
        assert all(pool.known(cell) is not None for cell in cells)
        count += len(cells)
    assert count > 100
    bench = replication.Bench(PLAN, replication.RESULT, replication.RUNS, 1)
    assert replication.refusals(bench) == []


OTHER = [
    ("config", "model", "path", "elsewhere"),
    ("config", "parallel", "accumulate", "unsharded"),
    ("config", "parallel", "tensor", "head"),
    ("config", "rollout", "max_batch", 256),
    ("config", "objective", "beta", 0.5),
    ("budget", "tokens:80000"),
    ("select", "elsewhere.jsonl"),
]


@pytest.mark.parametrize("change", OTHER)
def test_a_committed_sweep_of_another_meaning_is_refused(tmp_path, change):
    name, (*keys, last, value) = "main-chain-rare-search", change
    found = store.read(replication.RESULT, PLAN)
    tree = known = found["folders"][name]["sweep"]
    for key in keys:
        tree = tree[key]
    tree[last] = value
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(known))
    with pytest.raises(SweepError, match=rf"another sweep: {'.'.join([*keys, last])} is now"):
        sweep.hold_sweep(file, PLAN.identity(name, replication.RUNS))


def test_a_key_that_a_committed_sweep_lacks_has_its_default(tmp_path):
    name, file = "main-chain-rare-search", tmp_path / "sweep.json"
    known = store.read(replication.RESULT, PLAN)["folders"][name]["sweep"]
    now = PLAN.identity(name, replication.RUNS)
    del known["config"]["parallel"]
    file.write_text(json.dumps(known))
    sweep.hold_sweep(file, now)
    # The plan has 512, and the default is another.
    del known["config"]["rollout"]["max_batch"]
    file.write_text(json.dumps(known))
    with pytest.raises(SweepError, match=r"config\.rollout\.max_batch is now 512"):
        sweep.hold_sweep(file, now)
    for broken in ({"config": {"rollout": {"no_key": 1}}}, {"config": 3}, {}, []):
        file.write_text(json.dumps(broken))
        with pytest.raises(SweepError, match="is no record of a sweep"):
            sweep.hold_sweep(file, now)


@pytest.mark.parametrize("word", ["--optim.lr=0.03", "--run.seed=7", "--objective.group_size=3"])
def test_a_committed_run_of_other_words_is_refused(tmp_path, word):
    found = store.read(replication.RESULT, PLAN)
    pool, (cell, *_) = kept_cells(found, "main-chain-rare-report", tmp_path)
    path = tmp_path / "records" / f"{cell.name}.json"
    record, key = json.loads(path.read_text()), word.partition("=")[0]
    assert any(own.startswith(f"{key}=") for own in record["words"])
    record["words"] = [word if own.startswith(f"{key}=") else own for own in record["words"]]
    path.write_text(json.dumps(record))
    with pytest.raises(SweepError, match="is of a run with other words"):
        pool.known(cell)


def test_committed_styles_are_of_the_accuracy_of_their_runs():
    """Trained and asked again, to the last answer."""
    found, count = store.read(replication.RESULT, PLAN), 0
    for world, methods in found["styles"].items():
        known = tables.winners(found, PLAN, f"main-{world}-report")
        for name, seeds in methods.items():
            for record in known[name]:
                own = seeds[str(record["seed"])]["styles"]
                acc = sum(share * right for share, right in own.values())
                probes.check_accuracy(Path("out"), acc, record)
                with pytest.raises(replication_plan.StageError, match="came out otherwise"):
                    probes.check_accuracy(Path("out"), acc + 1 / 400, record)
                count += 1
    assert count == 27


def test_committed_rows_of_one_view_compare_no_lengths_and_means_name_lost_seeds():
    found = store.read(replication.RESULT, PLAN)
    lines = pages.markdown(found, PLAN).splitlines()
    rows = [line for line in lines if line.startswith("| no hint |")]
    assert len(rows) == 2
    assert all(row.endswith(" | - |") for row in rows)
    assert found["tables"]["vr"]["lookup-rare"]["no hint"]["late_difference"][0] is not None
    assert any(line.startswith("| estimator gml |") and line.endswith(") |") for line in lines)
    lost = found["tables"]["main"]["lookup-rare"]["GRPO + eta"]
    assert lost["forgot"] == 1
    assert pages._cell(lost).endswith("0 of 3 (1 forgot)")
    assert "(" not in pages._cell(lost | {"forgot": 0})
    assert pages._cell(lost | {"diverged": 2}).endswith("(2 diverged, 1 forgot)")


@pytest.mark.skipif(not replication.RESULT.exists(), reason="no result is committed yet")
def test_the_committed_tables_are_those_of_the_committed_runs():
    found = store.read(replication.RESULT, PLAN)
    assert json.loads(json.dumps(tables.make(found, PLAN))) == found["tables"]
    assert pages.markdown(found, PLAN)

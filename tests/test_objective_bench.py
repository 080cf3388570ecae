"""benchmarks/objective_bench.py: its committed rows, and what it hands to `vpgea sweep`."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from runs import words_of

from vpgea_fast import config
from vpgea_fast.tiny import make_tiny
from vpgea_fast.trainer import fit

pytestmark = pytest.mark.around

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
ROBUST = "demo (robust, beta 1)"
SHIPPED = 5e-4
"""The rate of configs/tiny.yaml."""


@pytest.fixture(scope="module")
def bench():
    path = ROOT / "benchmarks/objective_bench.py"
    spec = importlib.util.spec_from_file_location("objective_bench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "short"), [("tiny_demo", [9, 10, 0, 0]), ("tiny_common", [12, 9])], ids=str
)
def test_committed_rows_are_those_of_the_committed_runs(bench, tmp_path, capsys, name, short):
    known = committed(name)
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps({key: known[key] for key in ("runs", "command", "note")}))
    bench.main(["--reevaluate", str(copy)])
    again = json.loads(copy.read_text())
    assert [row["short_runs"] for row in again["rows"]] == short
    assert all(again[key] == known[key] for key in ("rows", "rate_picked_on", "short", "runs"))
    assert len(capsys.readouterr().out.splitlines()) == len(short)


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (None, [], "FileNotFoundError"),
        ("{", [], "JSONDecodeError"),
        ("[]", [], "expected a file that --out wrote, with its runs"),
        ('{"rows": []}', [], "KeyError('runs')"),
        ('{"runs": [{"method": "m"}]}', [], "KeyError"),
        ('{"runs": []}', ["--jobs", "2"], "got --jobs with --reevaluate"),
        ('{"runs": []}', ["--seeds=1"], "got --seeds=1 with --reevaluate"),
    ],
)
def test_a_file_that_cannot_be_evaluated_again_is_one_line(
    bench, tmp_path, capsys, content, more, said
):
    file = tmp_path / "rows.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--reevaluate", str(file), *more])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert (file.read_text() if file.exists() else None) == content


@pytest.mark.slow
def test_each_method_begins_with_its_grid_and_all_runs_come_into_one_file(
    bench, tiny_world, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    small = {
        "train": {"steps": 1, "questions_per_step": 2},
        "eval": {"greedy": False, "max_new_tokens": 40, "limit": 8},
        "rollout": {"max_new_tokens": 40},
    }
    tree = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
    for section, keys in small.items():
        tree[section] |= keys
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    words = ["--config", "small.yaml", "--world", str(tiny_world.base_dir.parent), "--seeds", "0"]
    words += ["--methods", ROBUST, "hint-RFT", "--extend", "0", "--out", "found.json"]
    bench.main(words)
    found = json.loads((tmp_path / "found.json").read_text())
    rates = {row["method"]: row["rates"] for row in found["rows"]}
    assert rates == {ROBUST: [5e-4, 1e-3, 2e-3], "hint-RFT": [6.25e-5, 1.25e-4, 2.5e-4, 5e-4]}
    assert len(found["runs"]) == 7
    assert all(run["ended"] == "done" for run in found["runs"])
    # Nothing is run again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("records/*.json")}
    bench.main(words)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("records/*.json")} == before
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == found["runs"]


def committed(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_every_best_rate_is_inside_its_grid():
    """As docs/demo.md says."""
    for name in ("tiny_demo", "tiny_common"):
        assert not any(row["edge"] for row in committed(name)["rows"])


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ("[]", [], "TypeError"),
        ('{"runs": []}', [], "KeyError('rows'); expected a file that --out wrote"),
        ('{"rows": [{"runs": 1}]}', [], "KeyError"),
        ('{"rows": []}', ["--jobs", "2"], "got --jobs with --table"),
    ],
)
def test_a_file_without_a_table_is_one_line(bench, tmp_path, capsys, content, more, said):
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--table", str(file), *more])
    assert stopped.value.code == 2
    printed, error = capsys.readouterr()
    assert said in error
    assert (printed, error.count("\n")) == ("", 1)


def test_the_table_has_a_row_per_method_and_an_unknown_one_its_own_name(bench, tmp_path, capsys):
    file = tmp_path / "one.json"
    known = committed("tiny_demo")
    known["rows"] = known["rows"][:1]
    known["rows"][0] |= {"method": "mine", "short_runs": 7}
    known["rows"][0]["after"]["greedy"]["acc"] = 0.5
    file.write_text(json.dumps(known))
    bench.main(["--table", str(file)])
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == 7
    assert row.startswith("| mine | 92.2 → 97.8 % | ")
    assert row.endswith(" | 100 → 50.0 % | 7 |")


def test_preset_robust_keeps_its_bars():
    """Of all three seeds, at the rate of its row and at the one that the configuration ships."""
    result = committed("tiny_demo")
    row = next(row for row in result["rows"] if row["method"] == ROBUST)
    for rate in (row["lr"], SHIPPED):
        ends = [gains(run) for run in runs_of(result, ROBUST, rate)]
        assert len(ends) == 3
        assert all(e["tokens"] <= 0.35 and e["eps3"] >= 3 and e["greedy"] >= 0.98 for e in ends)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_preset_robust_trained_now_keeps_its_bars(tmp_path, seed):
    """The committed runs are of the code of their day; this is of the code as it stands, on all
    questions of the demo: a hundred do not tell the seeds apart."""
    world = make_tiny(tmp_path / "world")
    asked = {"run.seed": seed, "eval.data": str(world.test_path), "checkpoint.export": "false"}
    cfg = config.load(ROOT / "configs/tiny.yaml", words_of(asked, world, tmp_path / "run"))
    assert (cfg.objective.preset, cfg.optim.lr) == ("robust", SHIPPED)
    assert fit(cfg)
    known = json.loads((tmp_path / "run/eval.json").read_text())
    before, after = known["before"], known["after"]
    assert after["sampled"]["tokens"] <= 0.35 * before["sampled"]["tokens"]
    assert after["sampled"]["eps3"] >= 3 * before["sampled"]["eps3"]
    assert after["sampled"]["acc"] >= before["sampled"]["acc"]
    assert after["greedy"]["acc"] >= 0.98


def runs_of(result, method, rate):
    return [run for run in result["runs"] if (run["method"], run["lr"]) == (method, rate)]


def gains(run):
    """What a run ends with on the questions that are reported: tokens and eps3 over the base's."""
    (test,) = run["test"]
    before, after = (
        {mode: run[when][mode]["benchmarks"][test] for mode in ("sampled", "greedy")}
        for when in ("before", "after")
    )
    ratios = {k: after["sampled"][k] / before["sampled"][k] for k in ("tokens", "eps3")}
    return ratios | {"acc": after["sampled"]["acc"], "greedy": after["greedy"]["acc"]}

"""benchmarks/objective_bench.py: its committed rows, and what it hands to `vpgea sweep`."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
LABELS = {
    "demo (robust, beta 1)": "VPG-EA, preset `robust`, beta 1",
    "paper preset": "VPG-EA, the literal preset `paper`",
    "GRPO + length factor": "GRPO with the same length factor",
}


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
    ("name", "short"), [("tiny_demo", [9, 7, 0]), ("tiny_common", [9, 9])], ids=str
)
def test_committed_rows_are_those_of_the_committed_runs(bench, tmp_path, capsys, name, short):
    committed = json.loads((RESULTS / f"{name}.json").read_text())
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps({key: committed[key] for key in ("runs", "command", "note")}))
    bench.main(["--reevaluate", str(copy)])
    again = json.loads(copy.read_text())
    assert [row["short_runs"] for row in again["rows"]] == short
    assert all(again[key] == committed[key] for key in ("rows", "rate_picked_on", "short", "runs"))
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


def test_the_table_of_the_readme_is_that_of_the_committed_rows():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in json.loads((RESULTS / "tiny_demo.json").read_text())["rows"]:
        greedy = arrow(row, "greedy", "acc", 1, scale=100).replace("100.0 →", "100 →")
        cells = (
            LABELS[row["name"].split(", lr")[0]],
            f"{arrow(row, 'sampled', 'acc', 1, scale=100)} %",
            arrow(row, "sampled", "tokens", 1),
            arrow(row, "sampled", "eps3", 0),
            f"{greedy} %",
            str(row["short_runs"]),
        )
        assert f"| {' | '.join(cells)} |" in readme


def arrow(row, mode, key, digits, scale=1):
    return " → ".join(f"{scale * row[when][mode][key]:.{digits}f}" for when in ("before", "after"))

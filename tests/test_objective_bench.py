"""benchmarks/objective_bench.py: which run is short, which rate is picked, what is committed."""

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


def half(acc, tokens):
    eps3 = (100 * acc) ** 2 / tokens
    return {"acc": acc, "tokens": tokens, "eps3": eps3, "truncated": 0.0, "n": 400}


def run(lr, validation, test, method="m"):
    """A run whose base had 92.25 % and 63 tokens on both halves."""
    before = {"sampled": {"benchmarks": dict.fromkeys(("validation", "test"), half(0.9225, 63.0))}}
    after = {"sampled": {"benchmarks": {"validation": half(*validation), "test": half(*test)}}}
    return {"method": method, "lr": lr, "before": before, "after": after}


def test_a_run_is_short_only_where_it_still_answers(bench):
    kept, dumb, long = (0.9125, 22.0), (0.0, 3.0), (0.99, 22.1)
    assert [bench.is_short(run(1e-3, kept, test)) for test in (kept, dumb, long)] == [
        True,
        False,
        False,
    ]
    assert not bench.is_short(run(1e-3, kept, (0.9120, 20.0)))


def test_the_rate_is_picked_on_one_half_and_reported_on_the_other(bench):
    """1e-3 wins on the validation half and loses on the test half."""
    runs = [run(1e-3, (0.99, 20), (0.93, 22)), run(2e-3, (0.95, 21), (0.99, 20))]
    found = bench.evaluate([*runs, run(5e-4, (0.5, 30), (0.0, 4), method="other")])
    row, other = found["rows"]
    assert found["rate_picked_on"] == "validation"
    assert (row["lr"], row["after"]["sampled"]["acc"], row["eps3_low"]) == (
        1e-3,
        0.93,
        pytest.approx(93**2 / 22),
    )
    assert (row["short_seeds"], row["short_runs"], row["runs"]) == (1, 2, 2)
    assert (other["short_seeds"], other["short_runs"]) == (0, 0)


def test_the_halves_share_no_question_and_lose_none(bench, tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(f'{{"q": {i}}}\n' for i in range(5)))
    halves = bench.split_questions(path, tmp_path)
    lines = {name: file.read_text().split("\n")[:-1] for name, file in halves.items()}
    assert lines == {
        "validation": ['{"q": 0}', '{"q": 2}', '{"q": 4}'],
        "test": ['{"q": 1}', '{"q": 3}'],
    }


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

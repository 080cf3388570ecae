"""The digest script sees what moved: a weight, a metric, a path, a key, a run."""

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import digest
import step_time

pytestmark = pytest.mark.around

RUN = {
    "weights": {"embed": "aa", "norm": "bb"},
    "eval": {"after": {"acc": 0.5}},
    "metrics": [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}],
    "paths": [{"step": 1, "text": "x"}],
}


def changed(part, key, value, place=None):
    run = copy.deepcopy(RUN)
    record = run[part] if place is None else run[part][place]
    if value is None:
        del record[key]
    else:
        record[key] = value
    return {"a": run}


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (changed("weights", "norm", "bc"), ["a: weights: norm"]),
        (changed("metrics", "loss", 0.20000000000000001 + 1e-16, 1), ["a: metrics[1]: loss"]),
        (changed("metrics", "loss", None, 0), ["a: metrics[0]: loss"]),
        (changed("paths", "text", "y", 0), ["a: paths[0]: text"]),
        ({"a": RUN | {"paths": []}}, ["a: paths: 1 records before, 0 now"]),
        ({"a": RUN, "b": RUN}, ["b: only on one side"]),
    ],
)
def test_whatever_moves_is_named(new, words):
    found = digest.differences({"a": RUN}, new, {})
    assert [line[: len(word)] for line, word in zip(found, words, strict=True)] == words


def test_a_renamed_key_is_no_difference_and_its_value_still_counts():
    def with_key(name, value):
        run = copy.deepcopy(RUN)
        del run["metrics"][0]["loss"]
        run["metrics"][0][name] = value
        return {"a": run}

    assert digest.differences({"a": RUN}, with_key("total", 0.1), {"loss": "total"}) == [
        "a: metrics[1]: loss: null -> 0.2",
        "a: metrics[1]: total: 0.2 -> null",
    ]
    both = with_key("total", 0.1)
    both["a"]["metrics"][1] = {"step": 2, "total": 0.2}
    assert digest.differences({"a": RUN}, both, {"loss": "total"}) == []
    both["a"]["metrics"][1]["total"] = 0.3
    assert len(digest.differences({"a": RUN}, both, {"loss": "total"})) == 1


@pytest.mark.slow
def test_a_step_takes_as_long_as_a_step_of_the_same_commit(tmp_path):
    """Two short rounds: the table has every phase of both, and keys behind -- reach both runs."""
    out = tmp_path / "out.json"
    words = ["--rounds", "2", "--steps", "4", "--out", str(out), "--", "--objective.name", "grpo"]
    step_time.main(["--before", "HEAD", *words])
    found = json.loads(out.read_text())
    assert set(found["milliseconds_per_step"]["rollout"]) == {"before", "now"}
    assert 0.3 < found["ratio"] < 3  # other work on the machine, not the same commit, moves it
    assert len(found["ratios"]) == 2

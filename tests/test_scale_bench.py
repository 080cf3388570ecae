"""benchmarks/scale_bench.py: its slopes and what it objects to, on steps with a known cost."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("scale_bench")


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_slope_of_a_power_is_its_exponent(bench, power):
    sizes = [3.0, 7.0, 20.0, 1e4]
    assert bench.slope(sizes, [0.2 * x**power for x in sizes]) == pytest.approx(power, abs=1e-12)


def test_the_slope_is_that_of_least_squares_in_logarithms(bench):
    """By hand: log2 sizes 0, 1, 2 and log2 costs 0, 3, 2 have the covariance 2, the variance 2."""
    assert bench.slope([1, 2, 4], [1, 8, 4]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("sizes", "costs"),
    [([5, 5], [1, 2]), ([4], [1]), ([1, 2], [0.0, 1]), ([0, 2], [1, 1]), ([1, 2], [1, 2, 3])],
)
def test_what_has_no_slope_is_refused(bench, sizes, costs):
    with pytest.raises(ValueError, match=r"got sizes .* expected as many of each, positive"):
        bench.slope(sizes, costs)


def step(trained, generated, **seconds):
    times = {f"time_{name}_s": value for name, value in seconds.items()}
    return {"tokens_trained": trained, "tokens_generated": generated, "step": 1, **times}


def test_a_run_counts_by_its_medians_after_the_warm_up(bench):
    lines = [step(1, 1, train=99.0, rollout=99.0)] * bench.WARM_UP
    lines += [step(n, 10 * n, train=0.1 * n, rollout=1.0) for n in (30, 10, 20)]
    found = bench.point_of(lines)
    assert found == {"seconds": {"train": 2.0, "rollout": 1.0}, "generated": 200, "trained": 20}


def test_a_sentence_that_does_not_hold_is_named(bench):
    """Training is held to trained tokens, not to generated ones; only a model may take long."""

    def point(size, **seconds):
        return {"size": size, "trained": 10 * size, "generated": 40 * size, "seconds": seconds}

    linear = [point(n, train=0.2 * n, guard=3.0, sync=0.05 * n / 10) for n in (1, 4, 16)]
    assert bench.problems("paths", linear) == []
    square = [point(n, train=0.2 * n**2, diagnose=0.0) for n in (1, 4, 16)]
    assert bench.problems("paths", square) == [
        "paths: training grows with slope 2.00 in trained tokens"
    ]
    slow = [point(n, train=0.9 * n, diagnose=0.1 * n if n == 4 else 0.0) for n in (1, 4, 16)]
    assert bench.problems("paths", slow) == ["paths 4: diagnose takes 10.0% of the step"]

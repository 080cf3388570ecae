"""Hours by stated rates, by hand; and every shipped recipe: sees accuracy, fits its card, says its
hours."""

import json
import os
import re
from pathlib import Path

import pytest

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.config import ConfigError
from vpgea_fast.durations import Rates, Sizes, card_of, durations, parse_rates, rates_of
from vpgea_fast.types import ModelFlops

ROOT = Path(__file__).parents[1]
RATES = Rates(
    tflops=1.0, bandwidth=1e-3, train_mfu=0.5, forward_mfu=1.0, decode=1.0, transfer=1e-6, wake=0.5
)
SIZES = {
    "flops": ModelFlops(decoder=1000, head=100, width=10),
    "parameters": 2000,
    "states": 4000,
    "token": 8,
    "cache": 10**9,
    "prompt": 20.0,
    "evaluated": 0,
    "world": 1,
}


def settled(**sections):
    return config.resolve(
        {
            "model": {"dtype": "bfloat16"},
            "rollout": {"max_new_tokens": 100, "max_batch": 8},
            "engine": {"name": "vllm"},
            "train": {"questions_per_step": 2, "steps": 21},
            "metrics": {"diag_every": 0},
            "checkpoint": {"save_every": 10},
        }
        | sections
    )


def test_a_step_by_hand():
    """16 + 16 paths of 50 tokens on average, 8 side by side: 200 tokens each read all 4000 bytes of
    weights, 50 more drain; a path reads 8 bytes of keys for its 20 + t tokens at token t."""
    found = durations(settled(), RATES, Sizes(**SIZES))
    square = 4 / 3 * 50 * 50
    read = (32 * 50 / 8 + 50) * 4000 + 32 * 8 * (20 * 50 + square / 2)
    assert found.step["rollouts"] == pytest.approx(read / 1e9)
    row, flops = 70, SIZES["flops"]
    assert found.step["scoring"] == pytest.approx(32 * flops.forward_row(row, 16) / 1e12)
    train = 3 * 2 * (1000 * row + 100 * 50 + 10 * row * row)
    assert found.step["training"] == pytest.approx(16 * 1.5 * train / 0.5e12)
    assert found.step["weights"] == pytest.approx(2000 * 2 / 1e3 + 0.5)
    assert found.step["saving"] == pytest.approx(4000 / 1e9 / 10)
    assert found.step["evaluation"] == found.step["diagnostics"] == 0
    assert found.run["rollouts"] == pytest.approx(21 * read / 1e9)


def test_what_costs_more_takes_longer():
    """Each from the others: devices, diagnostics, importance weights, GRPO, a small cache, hf."""

    def step(sizes=(), rates=RATES, **sections):
        return durations(settled(**sections), rates, Sizes(**SIZES | dict(sizes))).step

    base, two = step(), step({"world": 2})
    assert two["scoring"] == pytest.approx(base["scoring"] / 2)
    assert base["rollouts"] / 2 < two["rollouts"] < base["rollouts"]  # the drain stays
    diagnosed = step(metrics={"diag_every": 10})
    views = 2 * 16 * SIZES["flops"].forward_row(70, 50) / 1e12
    assert diagnosed["diagnostics"] == pytest.approx((views + base["training"]) / 10)
    capped = step(
        rollout={"max_new_tokens": 100, "max_batch": 8, "importance_cap": 2.0},
    )
    assert capped["scoring"] > base["scoring"]
    grpo = step(
        objective={"name": "grpo", "group_size": 16},
        rollout={"max_new_tokens": 100, "max_batch": 8, "full_answer": True},
    )
    assert grpo["scoring"] == 0
    assert grpo["training"] == pytest.approx(32 / 24 * base["training"])
    assert step({"cache": 140})["rollouts"] > 3 * base["rollouts"]  # two paths side by side
    slow = step(engine={"name": "hf"}, rates=RATES)
    assert slow["rollouts"] == pytest.approx(base["rollouts"] / RATES.hf_decode)
    assert slow["weights"] == pytest.approx(base["weights"] - RATES.wake)
    assert step(checkpoint={"background": True})["saving"] == 0


def test_evaluations_between_the_steps_before_and_after():
    sizes = Sizes(**SIZES | {"evaluated": 8})
    cfg = settled(eval={"data": ["x.jsonl"], "every": 5, "max_new_tokens": 400})
    found = durations(cfg, RATES, sizes)
    read = (50 + 350) * 4000 + 8 * 8 * (20 * 50 + 4 / 3 * 2500 / 2)
    assert found.evaluation == pytest.approx(read / 1e9)
    assert found.evaluations == 6  # after 5, 10, 15, 20 steps, and before and after
    assert found.step["evaluation"] == pytest.approx(4 * read / 1e9 / 21)
    assert found.run["evaluation"] == pytest.approx(6 * read / 1e9)
    assert found.evaluation_share == found.step["evaluation"] / sum(found.step.values())


def test_cards_and_stated_rates():
    assert card_of(79.2) == "H100"
    assert card_of(139) == "H200"
    assert card_of(24) == ""
    assert rates_of("NVIDIA A100-SXM4-80GB", stated={}).tflops == 312
    assert rates_of("CPU", stated={"tflops": 1.0}) is None
    assert rates_of("CPU", stated={"tflops": 1.0, "bandwidth": 0.1}).bandwidth == 0.1
    assert rates_of("NVIDIA H200", stated={"train_mfu": 0.5}).train_mfu == 0.5
    assert parse_rates("") == {}
    for bad in ("tflops", "tflops=x", "tflops=0", "tflops=inf", "speed=1", "tflops=1;mfu=2"):
        with pytest.raises(ConfigError, match=r"--rates: got .*expected KEY=NUMBER, above 0"):
            parse_rates(bad)


# --- the shipped recipes --------------------------------------------------------------------------

RECIPES = [
    ("7b", "7b", 8),
    ("7b-multinode", "7b", 16),
    ("7b-1gpu", "7b", 1),
    ("1.5b", "1.5b", 1),
    ("1.5b", "1.5b", 8),
]


@pytest.fixture
def questions():
    """Files of real questions by name: of VPGEA_DATA where it is set, else a few of MATH-500."""
    few = ROOT / "tests/cases/math500_head.jsonl"
    folder = os.environ.get("VPGEA_DATA")
    real = Path(folder) / "math500.jsonl" if folder else few
    return real if real.is_file() else few


@pytest.mark.parametrize(("recipe", "shape", "processes"), RECIPES)
def test_every_recipe_measures_accuracy_fits_its_card_and_says_its_hours(
    recipe, shape, processes, large_r1_model, questions, capsys
):
    model = large_r1_model(shape)
    words = ["--model.path", model, "--data.train", questions, "--eval.data", questions]
    machine = ["--processes", processes, "--device-gib", "79.2"]
    assert main(["train", recipe, "--dry-run", *map(str, [*words, *machine])]) == 0
    shown = capsys.readouterr().out
    assert "accuracy: at every step answers are drawn and judged" in shown
    held = re.search(r"held out: (\d+) answers every 20 steps, \d+ s each, ([0-9.]+)% of", shown)
    assert held is not None, shown
    assert int(held[1]) > 0
    assert float(held[2]) <= 10
    for word in ("more than", "fewer than", "too many", "will not start", "above 10%", "built-in"):
        assert word not in shown, shown
    peak = re.search(r"peak ([0-9.]+) GiB .*, ([0-9.]+) beside CUDA", shown)
    assert float(peak[1]) < float(peak[2])
    total = re.search(r"  total +([0-9.]+)  100\.0% +([0-9.]+) +([0-9.]+)\n", shown)
    step, hours, gpu_hours = map(float, total.groups())
    assert gpu_hours == pytest.approx(hours * processes, abs=0.06 * processes)
    cfg = config.load(ROOT / f"configs/{recipe}.yaml")
    assert hours == pytest.approx(cfg.train.steps * step / 3600, rel=0.1, abs=0.06)
    assert "host memory of a node: " in shown
    said = (ROOT / f"configs/{recipe}.yaml").read_text()
    claims = re.findall(r"Estimated peak (\d+) GiB|and (\d+) on each", said)
    if claims:  # the comment at the head of the file
        assert str(round(float(peak[1]))) in {n for pair in claims for n in pair}


def test_the_tiny_recipe_measures_accuracy_and_says_why_it_has_no_hours(
    tiny_world, tiny_words, capsys
):
    words = tiny_words({"eval.data": f"[{tiny_world.test_path}]"})("run")
    assert main(["train", "tiny", "--dry-run", *words]) == 0
    shown = capsys.readouterr().out
    assert "accuracy: at every step answers are drawn and judged" in shown
    asked = len(Path(tiny_world.test_path).read_text().splitlines())
    assert f"held out: {2 * asked} answers before and after, not between" in shown
    assert "hours: the rates of a CPU are not known; state them, e.g. --rates" in shown
    stated = ["--rates", "tflops=0.1,bandwidth=0.02"]
    assert main(["train", "tiny", "--dry-run", *words, *stated]) == 0
    assert "GPU-hours" in capsys.readouterr().out


def test_rates_that_cannot_be_used_and_an_evaluation_that_takes_too_long(
    tiny_world, tiny_words, capsys
):
    words = tiny_words({"eval.data": f"[{tiny_world.test_path}]"})("run")
    assert main(["train", "tiny", "--dry-run", *words, "--rates", "flops=1"]) == 2
    assert "vpgea: --rates: got 'flops=1', expected KEY=NUMBER" in capsys.readouterr().err
    assert main(["train", "tiny", *words, "--rates", "tflops=1"]) == 2
    assert "--rates are for --dry-run" in capsys.readouterr().err
    often = ["--eval.every", "1", "--rates", "tflops=0.1,bandwidth=0.02"]
    assert main(["train", "tiny", "--dry-run", *words, *often]) == 0
    assert "above 10%: raise eval.every, or lower eval.limit" in capsys.readouterr().out


def test_the_hf_engine_is_warned_of_where_it_is_slow(large_r1_model, questions, capsys):
    words = ["--model.path", large_r1_model("1.5b"), "--data.train", questions, "--eval.data", "[]"]
    machine = ["--device-gib", "139", "--engine", "hf", "--rollout.max_batch", "64"]
    words = [*map(str, [*words, *machine])]
    assert main(["train", "1.5b", "--dry-run", *words]) == 0
    shown = capsys.readouterr().out
    assert "engine hf draws up to 8192 tokens a path on CUDA" in shown
    assert "held out: none" in shown
    few = ["--rollout.max_new_tokens", "2047"]
    assert main(["train", "1.5b", "--dry-run", *words, *few]) == 0
    assert "engine hf draws" not in capsys.readouterr().out


def test_the_small_file_is_one_that_the_recipes_read(questions):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert all({"problem", "answer"} <= row.keys() for row in rows)

"""benchmarks/smollm2.py: what is made, what is not made again, and what its file says."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import smollm2

pytestmark = pytest.mark.around

ALL = [*smollm2.STAGES]


@pytest.mark.parametrize(
    ("ended", "gone", "wanted"),
    [
        ([], ALL, ALL),
        (ALL, [], []),
        # A checkout has the committed file alone: what is known is not made again.
        (ALL, ALL, []),
        (ALL[:4], [], ALL[4:]),
        # What a later stage needs is made again, and nothing else.
        (ALL[:-1], ["grpo"], ["grpo", "grpo_eval"]),
        (ALL[:-1], ["model", "vpgea"], ["grpo_eval"]),
        (ALL[:-2], ALL, ["model", "problems", "sft", "base", "grpo", "grpo_eval"]),
    ],
)
def test_a_stage_is_made_that_is_lacking_or_whose_folder_a_later_one_needs(ended, gone, wanted):
    assert smollm2.to_make(ended, lambda name: name not in gone) == wanted


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [1]), (60, [*range(1, 61)]), (121, [*range(1, 122, 3)])]
)
def test_a_curve_has_the_last_step_and_at_most_sixty(count, kept):
    steps = [{"step": n, "loss": n / 2, "kl_gated": None, "x": 0} for n in range(1, count + 1)]
    assert smollm2.thinned(steps) == [{"step": n, "loss": n / 2} for n in kept]


SMALL = {
    "data.response_key": "solution",
    "optim.schedule": "constant",  # train.max_tokens needs it
    "train.steps": 1,
    "train.questions_per_step": 1,
    "rollout.max_new_tokens": 40,
    "eval.limit": 2,
    "eval.max_new_tokens": 8,
    "verify.name": "number",
    "metrics.diag_every": 0,
    "metrics.figure": "false",
}


def small_bench(folder):
    words = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    record = smollm2.opened(folder / "made.json")
    return smollm2.Bench(folder / "made.json", folder / "runs", record, config="tiny", words=words)


def test_the_file_alone_says_what_is_known_and_makes_nothing(tmp_path, capsys):
    found = {"questions": 200, "acc": 0.625, "tokens": 40.0}
    ended = {"wall_s": 90.0, "cpu_s": 150.0}
    bench = small_bench(tmp_path)
    bench.record["stages"] = dict.fromkeys(ALL, ended)
    bench.record["stages"]["grpo_eval"] = ended | {"problems, greedy": found}
    bench.save()
    text = bench.out.read_text()
    # As a checkout has it: no folder of a run.
    smollm2.go_on(small_bench(tmp_path))
    *told, result = capsys.readouterr().out.splitlines()
    assert [line.split() for line in told] == [f"{name} 1.5 min 150 CPU s".split() for name in ALL]
    assert result == f"    problems, greedy: {json.dumps(found)}"
    assert bench.out.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]


@pytest.mark.slow
def test_all_stages_in_small_and_a_second_start_makes_nothing(tiny_world, tmp_path, capsys):
    bench = small_bench(tmp_path)
    problems = bench.runs / "problems"
    problems.mkdir(parents=True)
    shutil.copytree(tiny_world.base_dir, bench.runs / "model")
    for name, file in (("sft", "train"), ("train", "train"), ("test", "test")):
        shutil.copy(tiny_world.base_dir.parent / f"{file}.jsonl", problems / f"{name}.jsonl")
    for name in ("model", "problems"):
        bench.record["stages"][name] = {"wall_s": 0.0, "cpu_s": 0.0}
    smollm2.go_on(bench)

    text = bench.out.read_text()
    stages = json.loads(text)["stages"]
    assert [*stages] == ALL
    assert bench.out.with_suffix(".png").stat().st_size > 10_000
    for name in ("sft", "vpgea", "grpo"):
        assert (stages[name]["steps"], len(stages[name]["curve"])) == (1, 1)
        assert (stages[name]["sampled_tokens"] == 0) == (name == "sft")
    base = stages["base"]["problems, greedy"]
    for name in ("vpgea_eval", "grpo_eval"):
        found = stages[name]["problems, greedy"]
        change = found["change"]["tokens"]["value"]
        assert change == pytest.approx(found["tokens"] / base["tokens"] - 1)

    capsys.readouterr()
    smollm2.go_on(small_bench(tmp_path))
    assert "vpgea" not in capsys.readouterr().out.partition("model ")[0]
    assert bench.out.read_text() == text

"""benchmarks/smollm2.py: what is made, what is not made again, and what its file says."""

import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import smollm2
import smollm2_rules as rules
import smollm2_store as store
from sealed import sealed

from vpgea_fast import config
from vpgea_fast.data import load_training
from vpgea_fast.intake import open_text
from vpgea_fast.questions import misled
from vpgea_fast.verify import Verifier

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
        (ALL[:-1], ["grpo_eta"], ["grpo_eta", "grpo_eta_eval"]),
        (ALL[:-1], ["model", "vpgea"], ["grpo_eta_eval"]),
        (ALL[:-2], ALL, ["model", "problems", "sft", "base", "grpo_eta", "grpo_eta_eval"]),
        # A base that was taken out of the record, see `check`.
        (ALL[:2], ["sft"], ALL[2:]),
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
    return smollm2.Bench(
        folder / "made.json",
        folder / "runs",
        record,
        config="tiny",
        words=words,
        styles=("solution",),
    )


def refusal(made, *given):
    """The one line with which it refuses."""
    with pytest.raises(SystemExit) as refused:
        made(*given)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_record_has_one_folder_and_a_folder_one_record(tmp_path):
    first = small_bench(tmp_path)
    first.runs.mkdir()
    (first.runs / "sft-200").mkdir()
    assert "holds files and no record.id" in refusal(store.begin, first, {})
    assert not first.out.exists()
    (first.runs / "sft-200").rmdir()
    store.begin(first, {"a": 1})
    store.begin(small_bench(tmp_path), {"a": 1})  # the next start
    other = small_bench(tmp_path / "no")
    other = smollm2.Bench(tmp_path / "other.json", first.runs, other.record)
    assert "belongs to another record than" in refusal(store.begin, other, {"a": 1})
    assert not other.out.exists()
    # The record goes on in a folder of its own, as a checkout does.
    moved = smollm2.Bench(first.out, tmp_path / "runs2", first.record)
    store.begin(moved, {"a": 1})
    assert (moved.runs / "record.id").read_text() == (first.runs / "record.id").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("\udcff", "cannot be read"),
        ("null", "has no sha256"),
        (json.dumps(sealed({"folders": {}})), "is of another bench: it has no stages"),
        (json.dumps(sealed({"stages": {}, "acc": 0.4}) | {"acc": 0.9}), "not as it was written"),
    ],
)
def test_a_file_that_is_no_record_is_one_line(tmp_path, content, said):
    """Of a complete record, too, whose settings no stage would ask for."""
    out = tmp_path / "result.json"
    out.write_text(content, errors="surrogateescape")
    refused = refusal(smollm2.opened, out)
    assert said in refused
    assert "\n" not in refused
    assert "cannot be read" in refusal(smollm2.opened, tmp_path)  # a folder
    assert smollm2.opened(tmp_path / "new.json")["stages"] == {}


def test_another_setting_is_refused_by_its_name(tmp_path):
    bench = small_bench(tmp_path)
    store.begin(bench, {"sft": ("x", 1), "config": {"optim": {"lr": 1.0}}})
    store.begin(small_bench(tmp_path), {"sft": ("x", 1), "config": {"optim": {"lr": 1.0}}})
    said = refusal(
        store.begin, small_bench(tmp_path), {"sft": ("x", 1), "config": {"optim": {"lr": 2.0}}}
    )
    assert "was begun with config.optim.lr 1.0, and this start has 2.0; go on with commit" in said
    said = refusal(store.begin, small_bench(tmp_path), {"sft": ("x", 2), "rules": {}})
    assert "begun with sft ['x', 1], and this start has ['x', 2] (2 more differ)" in said
    # What was written before a key came, or had another default, means the same.
    whole = smollm2.settings(small_bench(tmp_path / "whole"))
    first = small_bench(tmp_path / "whole")
    parallel = {"shard": "auto", "accumulate": "sharded"}
    store.begin(first, whole | {"config": whole["config"] | {"parallel": parallel}})
    store.begin(first, whole)
    parallel["accumulate"] = "unsharded"
    other = whole | {"config": whole["config"] | {"parallel": parallel}}
    said = refusal(store.begin, first, other)
    assert "config.parallel.accumulate 'sharded', and this start has 'unsharded'; go on" in said


def test_methods_come_and_go_between_versions_and_none_changes(tmp_path):
    bench, first = small_bench(tmp_path), {"vpgea": [], "grpo": ["--objective.name", "grpo"]}
    store.begin(bench, {"methods": first})
    with_eta = {"methods": first | {"grpo_eta": ["--objective.eps", "1e-3"]}}
    store.begin(small_bench(tmp_path), with_eta)
    kept = json.loads(bench.out.read_text())
    assert kept["settings"] == {"methods": first}
    assert kept["added"] == {"grpo_eta": ["--objective.eps", "1e-3"]}
    store.begin(small_bench(tmp_path), with_eta)
    other = {"methods": first | {"grpo_eta": ["--objective.eps", "1e-6"]}}
    made = small_bench(tmp_path)
    said = refusal(store.begin, made, other)
    assert "was begun with methods.grpo_eta" in said
    assert "go on with commit that added it and its options" in said
    made.record["stages"] = {"grpo_eta": {"commit": "5eed+changes"}}
    assert "go on with commit 5eed and its options" in refusal(store.begin, made, other)
    # One that the first start had may not change by the way.
    other = {"methods": with_eta["methods"] | {"grpo": []}}
    assert "was begun with methods.grpo " in refusal(store.begin, small_bench(tmp_path), other)
    assert json.loads(bench.out.read_text()) == kept
    # Of a later version of the bench: what it no longer makes stays in the record.
    store.begin(small_bench(tmp_path), {"methods": {"grpo_eta": ["--objective.eps", "1e-3"]}})
    assert json.loads(bench.out.read_text()) == kept
    damaged = small_bench(tmp_path)
    damaged.record["stages"] = {"grpo_eta": {}}
    del damaged.record["added"]
    assert "not the words of that method" in refusal(store.begin, damaged, with_eta)


def test_what_an_earlier_version_made_stays_in_verdict_and_figure(tmp_path, monkeypatch):
    bench = small_bench(tmp_path)
    bench.runs.mkdir()
    (bench.runs / "record.id").touch()
    spread = {"value": 0.0, "low": -0.1, "high": 0.1}
    found = {"acc": 0.5, "tokens": 40.0, "change": {"acc": spread, "tokens": spread}}
    bench.record["stages"] = {"grpo_eval": {"problems, greedy": found}}
    made = replace(smollm2.STAGES["check"], make=lambda _: {})
    monkeypatch.setitem(smollm2.STAGES, "check", made)
    labels, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *a, label, **k: labels.append(label) or plot(*a, label=label, **k)
    )
    smollm2.make(bench, "check")
    assert [*json.loads(bench.out.read_text())["verdict"]] == ["grpo"]
    assert "grpo, greedy" in labels


def test_the_settings_hold_what_a_result_hangs_on(tmp_path):
    found = smollm2.settings(small_bench(tmp_path))
    assert found["config"]["rollout"]["max_new_tokens"] == 40
    assert found["config"]["objective"]["leak_limit"] == 2.0
    assert (found["rules"]["ladder"], found["gsm8k"]) == (rules.LADDER, None)
    bench = smollm2.Bench(tmp_path / "a.json", tmp_path, {}, gsm8k=tmp_path)
    assert "expected gsm8k_train.jsonl and gsm8k_test.jsonl there" in refusal(
        smollm2.settings, bench
    )
    for split in ("train", "test"):
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(split)
    one = smollm2.settings(bench)["gsm8k"]
    (tmp_path / "gsm8k_test.jsonl").write_text("else")
    assert smollm2.settings(bench)["gsm8k"] != one


def test_seconds_add_up_over_starts_and_a_kill_takes_the_last_ones_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BEAT", 0.01)
    file = tmp_path / "clock.json"
    killed = store.Clock(file, "sft", {})
    killed.__enter__()
    while not file.is_file() or json.loads(file.read_text())["sft"]["wall_s"] < 0.2:
        time.sleep(0.01)
    killed.ended.set()  # as a kill does: nothing is noted behind its last beat
    killed.thread.join()
    noted = json.loads(file.read_text())["sft"]
    with store.Clock(file, "base", {}):  # one at a time, as stages are
        pass
    with store.Clock(file, "sft", {}) as clock:
        assert clock.before == noted
        assert clock.took()["wall_s"] >= noted["wall_s"]
    # Of a folder that is new the record knows more, and stages do not mix.
    assert store.Clock(file, "sft", {"wall_s": 90.0, "cpu_s": 60.0}).before["wall_s"] == 90.0
    assert store.Clock(file, "grpo", {}).before == {"wall_s": 0.0, "cpu_s": 0.0}


@pytest.mark.slow
def test_a_folder_with_other_content_is_renamed_and_made_again(tmp_path):
    bench = small_bench(tmp_path)
    store.begin(bench, {})
    smollm2.make(bench, "problems")
    made = bench.record["stages"]["problems"]
    assert smollm2.sound(bench, "problems", {})
    (bench.runs / "problems/test.jsonl").write_text("{}\n")
    assert not smollm2.sound(bench, "problems", {})
    assert (bench.runs / "problems.refused-1/test.jsonl").read_text() == "{}\n"
    smollm2.make(bench, "problems")
    again = bench.record["stages"]["problems"]
    assert (again["starts"], again["weights"]) == (2, made["weights"])
    assert again["wall_s"] >= made["wall_s"]
    # The record says that another machine made others: what this one makes is never used.
    again["weights"] = "0" * 64
    assert not smollm2.sound(bench, "problems", {})
    said = refusal(smollm2.make, bench, "problems")
    assert "problems was made again and has other weights than" in said
    assert not (bench.runs / "problems").exists()
    assert (bench.runs / "problems.refused-3").is_dir()


def ended_run(run, steps, limit):
    """A training of the tiny configuration that has exported after so many idle steps."""
    (run / "export").mkdir(parents=True)
    cfg = config.load(config.find("tiny"), ["--train.steps", str(limit), "--train.idle_stop", "2"])
    (run / "config.yaml").write_text(config.dump(cfg))
    lines = [{"step": n, "skipped": 1, "tokens_generated": 9} for n in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_halted_training_is_a_result_with_its_reason_and_a_halted_base_is_none(tmp_path):
    bench = small_bench(tmp_path)
    for name, steps in (("grpo", 2), ("vpgea", 3), (bench.named("sft-{steps}"), 2)):
        ended_run(bench.runs / name, steps, limit=3)
    assert smollm2.train(bench, "vpgea", "", "")["ended"] == "done"
    found = smollm2.train(bench, "grpo", "", "")
    assert (found["ended"], found["steps"]) == ("halted", 2)
    assert "2 steps" in found["halt"]
    said = refusal(smollm2.train_base, bench)
    assert f"the base's training was halted after step 2: {found['halt']}" in said


@pytest.mark.parametrize(
    ("acc", "cut", "found", "after_200"),
    [
        (0.5, 0.05, [], None),
        (0.9, 0.0, [], None),
        (0.495, 0.0, ["weak"], 400),
        (0.7, 0.055, ["cut"], 400),
        (0.905, 0.0, ["strong"], None),
        (0.905, 0.1, ["cut", "strong"], 400),
    ],
)
def test_a_weak_base_is_trained_again_once(acc, cut, found, after_200, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "LADDER", (200, 400))
    assert rules.outside({"acc": acc, "truncated": cut}) == found
    assert rules.next_steps(found, 200) == after_200
    assert rules.next_steps(found, 400) is None
    base = {"problems, sampled": {"acc": acc, "truncated": cut}}
    stages = {"model": {}, "sft": {"steps": 200}, "base": base}
    record = {"sft_steps": 200, "starts": {"base": 2}, "stages": stages}
    bench = smollm2.Bench(tmp_path / "a.json", tmp_path, record)
    if after_200:
        assert smollm2.check(bench) is None
        assert [*bench.record["stages"]] == ["model"]
        (first,) = bench.record["earlier_bases"]
        assert first == {"outside": found, "sft": {"steps": 200}, "base": base}
        # As bad again: it stays.
        bench.record["stages"] |= {"sft": {"steps": 400}, "base": base}
    want = {"sft_steps": after_200 or 200, "outside": found}
    assert smollm2.check(bench) == want
    assert bench.named("sft-{steps}") == f"sft-{after_200 or 200}"


def test_what_the_guard_would_catch_decides_whether_to_go_on(tmp_path):
    short = torch.tensor([0.0, 1.0, 2.0, 3.0, math.inf], dtype=torch.float64)
    calm = torch.zeros(5, dtype=torch.float64)
    found = rules.preflight({"concise": short, "verbose": calm}, 2.0)
    assert (found["concise"]["caught"], found["verbose"]["caught"]) == (0.4, 0.0)
    assert (found["caught"], found["go_on"]) == (0.2, True)
    assert found["concise"]["nats"]["0.5"] == 2.0
    # A gap that is none is caught, as the guard does.
    none = torch.full((5,), math.nan, dtype=torch.float64)
    bad = rules.preflight({"concise": short, "verbose": none}, 2.0)
    assert (bad["caught"], bad["go_on"]) == (0.7, False)

    bench = small_bench(tmp_path)
    base = {"problems, sampled": {"acc": 0.625, "truncated": 0.01}}
    stages = {"base": base, "check": {"sft_steps": 200, "outside": []}, "preflight": found}
    said = "Base of 200 steps: accuracy 62.5%, cut 1.0%. The leak guard would catch"
    assert rules.told(stages) == f"go on: yes. {said} 20.0% of honest solutions, and may 30%"
    times = {"wall_s": 1.0, "cpu_s": 1.0}
    done = dict.fromkeys(ALL[:3], times)
    bench.record["stages"] = done | {k: times | v for k, v in stages.items()}
    bench.record["stages"]["preflight"] |= bad
    for leaf in ("problems", bench.named("sft-{steps}/export"), "evals"):
        (bench.runs / leaf).mkdir(parents=True)
    for file, content in (
        ("record.id", bench.record["id"]),
        (bench.named("evals/base-{steps}.ended"), ""),
    ):
        (bench.runs / file).write_text(content)
    said = refusal(smollm2.go_on, bench)
    assert said.startswith("go on: no. ")
    assert "mend the teacher's rows" in said
    assert "vpgea" not in bench.record["stages"]


def changed(acc, tokens):
    parts = {"acc": acc, "tokens": tokens}
    keys = ("value", "low", "high")
    return {"change": {k: dict(zip(keys, part, strict=True)) for k, part in parts.items()}}


@pytest.mark.parametrize(
    ("acc", "tokens", "holds", "clear"),
    [
        ((0.02, 0.0, 0.05), (-0.5, -0.6, -0.35), True, True),
        ((0.02, -0.01, 0.05), (-0.5, -0.6, -0.35), True, False),
        ((0.02, 0.0, 0.05), (-0.4, -0.5, -0.2), True, False),
        ((-0.005, -0.05, 0.04), (-0.5, -0.6, -0.35), False, False),
        ((0.02, 0.0, 0.05), (-0.25, -0.6, -0.1), False, False),
        ((0.0, None, None), (-0.5, None, None), True, False),
        ((0.0, 0.0, 0.0), (None, None, None), False, False),
    ],
)
def test_the_verdict_is_of_accuracy_and_tokens_together(acc, tokens, holds, clear):
    stages = {"vpgea_eval": {"problems, greedy": changed(acc, tokens)}, "grpo_eval": {}}
    found = rules.verdicts(stages, ["vpgea", "grpo"])
    own = found["vpgea"]["greedy"]
    assert (own["holds"], own["clear"]) == (holds, clear)
    if tokens[0] is not None:
        assert own["token_ratio"]["value"] == 1 + tokens[0]
    (line,) = rules.verdict_lines(found)
    assert ("does not hold" in line, "intervals too" in line) == (not holds, clear)


def test_gaps_of_honest_solutions_are_those_of_transformers(tiny_world):
    words = ["--model.path", str(tiny_world.base_dir), "--eval.data", "[]"]
    words += ["--data.train", str(tiny_world.base_dir.parent / "train.jsonl")]
    cfg = config.load(config.find("tiny"), [*words, "--verify.name", "number"])
    gaps = rules.honest_gaps(cfg, 3)
    text, model = open_text(cfg), AutoModelForCausalLM.from_pretrained(tiny_world.base_dir)
    pool = text.prompter.prompt(load_training(cfg.data).questions)
    with Verifier.configured(cfg.verify) as verifier:
        wrong = misled(
            cfg, pool[:3], pool, step=0, prompt=text.prompter.prompt, verify=verifier.verify
        )
    assert gaps.shape == (3,)
    for gap, own, other in zip(gaps, pool, wrong, strict=False):
        z_ids = text.prompter.responses([own])[0][0][0]
        assert own.question.answer != other.question.answer

        def logp(question, z_ids=z_ids):
            ids = torch.cat([question.teacher_ids, z_ids])[None]
            with torch.no_grad():
                logits_TV = model(ids).logits[0, question.teacher_ids.numel() - 1 : -1]
            return logits_TV.double().log_softmax(-1).gather(1, z_ids[:, None]).sum()

        # Sums of some hundred float32 log-probs.
        assert gap.item() == pytest.approx((logp(own) - logp(other)).item(), abs=1e-3)


def test_the_file_alone_says_what_is_known_and_makes_nothing(tmp_path, capsys):
    found = {"questions": 200, "acc": 0.625, "tokens": 40.0}
    ended = {"wall_s": 90.0, "cpu_s": 150.0}
    bench = small_bench(tmp_path)
    bench.record["stages"] = dict.fromkeys(ALL, ended)
    bench.record["stages"][ALL[-1]] = ended | {"problems, greedy": found}
    bench.save()
    text = bench.out.read_text()
    # As a checkout has it: no folder of a run.
    assert not smollm2.go_on(small_bench(tmp_path))
    *told, result = capsys.readouterr().out.splitlines()
    assert [line.split() for line in told] == [f"{name} 1.5 min 150 CPU s".split() for name in ALL]
    assert result == f"    problems, greedy: {json.dumps(found)}"
    assert bench.out.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]


@pytest.mark.slow
def test_all_stages_in_small_and_a_second_start_makes_nothing(
    tiny_world, tmp_path, capsys, monkeypatch
):
    for module in (rules, smollm2):
        monkeypatch.setattr(module, "LADDER", (200, 400))
    bench = small_bench(tmp_path)
    problems = bench.runs / "problems"
    problems.mkdir(parents=True)
    shutil.copytree(tiny_world.base_dir, bench.runs / "model")
    for name, file in (("sft", "train"), ("train", "train"), ("test", "test")):
        shutil.copy(tiny_world.base_dir.parent / f"{file}.jsonl", problems / f"{name}.jsonl")
    for name in ("model", "problems"):
        bench.record["stages"][name] = {"wall_s": 0.0, "cpu_s": 0.0}
    (bench.runs / "record.id").write_text(bench.record["id"])
    while smollm2.go_on(bench):
        pass
    assert capsys.readouterr().out.count("go on: yes. Base of 400 steps") == 1

    text = bench.out.read_text()
    stages = json.loads(text)["stages"]
    assert [*stages] == ALL
    # Of one step: it was trained again, as a base that is weak.
    assert stages["check"]["sft_steps"] == 400
    assert [*json.loads(text)["verdict"]] == ["vpgea", "grpo_eta"]
    assert bench.out.with_suffix(".png").stat().st_size > 10_000
    for name in ("sft", *smollm2.METHODS):
        assert (stages[name]["steps"], len(stages[name]["curve"])) == (1, 1)
        assert (stages[name]["sampled_tokens"] == 0) == (name == "sft")
    base = stages["base"]["problems, greedy"]
    for name in ("vpgea_eval", "grpo_eta_eval"):
        found = stages[name]["problems, greedy"]
        change = found["change"]["tokens"]["value"]
        assert change == pytest.approx(found["tokens"] / base["tokens"] - 1)

    capsys.readouterr()
    assert not smollm2.go_on(small_bench(tmp_path))
    assert "vpgea" not in capsys.readouterr().out.partition("model ")[0]
    assert bench.out.read_text() == text


def test_a_forgotten_gsm8k_is_named_and_a_folder_for_the_file_is_made(tmp_path):
    bench = store.Bench(tmp_path / "new/made.json", tmp_path / "runs", {"id": "a"})
    store.begin(bench, {"gsm8k": {"files": "digest"}})
    assert refusal(store.begin, bench, {"gsm8k": None}).endswith(
        "made.json was begun with --gsm8k, or with other files of it; give it as then, or a new "
        "--out and --runs"
    )


@pytest.mark.parametrize(("status", "says"), [(130, True), (143, True), (2, False)])
def test_a_stop_of_a_stage_names_this_command_and_not_that_of_the_stage(
    status, says, monkeypatch, capsys
):
    monkeypatch.setattr(smollm2, "vpgea", lambda _: status)
    with pytest.raises(SystemExit) as left:
        smollm2.call("train", "smollm2")
    assert left.value.code == status
    assert ("the same command goes on" in capsys.readouterr().err) == says

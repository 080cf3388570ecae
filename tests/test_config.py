"""Strict configuration: every key checked at birth, unknown ones named with their nearest
neighbour."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from vpgea_fast import config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_presets_load_and_survive_a_round_trip(path):
    cfg = config.load(path)
    assert config.resolve(yaml.safe_load(config.dump(cfg))) == cfg


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optim": {"lrr": 1}}, "optim.lrr: unknown key; did you mean 'lr'?"),
        ({"optm": {}}, "optm: unknown key; did you mean 'optim'?"),
        ({"objective": {"alpah": 1}}, "objective.alpah: unknown key; did you mean 'alpha'?"),
        (
            {"objective": {"name": "grpo", "beta": 1}},
            "objective.beta: unknown key; known keys: name, group_size",
        ),
        (
            {"objective": {"name": "grop"}},
            "objective.name: got 'grop', expected 'vpgea', 'grpo'; did you mean 'grpo'?",
        ),
        (
            {"objective": {"group_size": 1}},
            "objective.group_size: got 1, expected 2 or more; the z-score",
        ),
        (
            {"objective": {"prior_samples": 0}},
            "objective.prior_samples: got 0, expected 1 or more",
        ),
        (
            {"objective": {"alpha": -0.5}},
            "objective.alpha: got -0.5, expected 0 or more",
        ),
        ({"objective": {"eta_clip": [4, 0.25]}}, "expected (low, high) with low <= high"),
        (
            {"objective": {"alpha": float("inf")}},
            "objective.alpha: got Infinity, expected a finite number",
        ),
        ({"optim": {"lr": float("nan")}}, "optim.lr: got NaN, expected a finite number"),
        (
            {"model": {"dtype": "float16"}},
            "model.dtype: got 'float16', expected 'float32', 'bfloat16' or",
        ),
        ({"objective": {"alpha": -1}}, "0 turns the length factor off"),
        (
            {"objective": {"preset": "papr"}},
            "objective.preset: got 'papr', expected 'paper' or 'robust'; did you mean 'paper'?",
        ),
        (
            {"objective": {"name": "grpo"}},
            "verifies sampled answers, but rollout.full_answer is false",
        ),
        (
            {"objective": {"verify": "gate"}},
            "verifies sampled answers, but rollout.full_answer is false",
        ),
        ({"train": {"steps": "many"}}, "train.steps: got 'many', expected a whole number"),
        ({"optim": 3}, "optim: got 3, expected keys (name, "),
        ({"rollout": {"top_p": 0.0}}, "rollout.top_p: got 0.0, expected more than 0"),
    ],
)
def test_errors_name_the_key_and_the_remedy(tree, message):
    with pytest.raises(config.ConfigError) as error:
        config.resolve(tree)
    assert message in str(error.value)


def test_preset_fills_only_what_is_not_given():
    robust = config.resolve({"objective": {"preset": "robust", "eps": 0.5}}).objective
    paper = config.resolve({}).objective
    assert (robust.baseline, robust.reward, robust.std_gate, robust.eps) == (
        "lme",
        "likelihood_mix",
        0.05,
        0.5,
    )
    assert (robust.clamp_u, robust.eta_clip) == (True, (0.25, 4.0))
    assert (paper.baseline, paper.reward, paper.std_gate, paper.eps, paper.eta_clip) == (
        "mean",
        "paper",
        0,
        1e-6,
        None,
    )
    assert (paper.beta, paper.alpha, paper.gate, paper.u_min) == (0.5, 0.5, "indicator", -20.0)


def test_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1.0e-6}\nrun: {seed: 1}\n")
    words = [
        "--optim.lr",
        "5e-4",
        "--run.seed=3",
        "--eval.data",
        "[a.jsonl, b.jsonl]",
        "--prompt.student",
        "Q: {question}",
    ]
    cfg = config.load(file, words)
    assert (cfg.optim.lr, cfg.run.seed, cfg.eval.data, cfg.prompt.student) == (
        5e-4,
        3,
        ("a.jsonl", "b.jsonl"),
        "Q: {question}",
    )


def test_another_variant_leaves_the_keys_of_the_old_one(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("objective: {name: vpgea, beta: 0.3}\nrollout: {full_answer: true}\n")
    cfg = config.load(file, ["--objective.name", "grpo", "--objective.group_size", "4"])
    assert (cfg.objective.name, cfg.objective.group_size) == ("grpo", 4)
    assert config.load(file, ["--objective.alpha", "0.1"]).objective.beta == 0.3


def test_text_is_taken_as_it_stands():
    words = ["--run.dir", "runs #2", "--metrics.note=see #12: x", "--prompt.student", "{question}"]
    words += ["--model.path", "2024", "--run.seed", "7", "--metrics.compare", "12:30"]
    cfg = config.resolve(config.parse_overrides(words))
    assert (cfg.run.dir, cfg.metrics.note, cfg.prompt.student) == (
        "runs #2",
        "see #12: x",
        "{question}",
    )
    assert (cfg.model.path, cfg.run.seed, cfg.metrics.compare) == ("2024", 7, "12:30")


def test_a_forgotten_value_is_no_value():
    with pytest.raises(config.ConfigError, match="and no value"):
        config.parse_overrides(["--run.dir", "--optim.lr", "1e-5"])
    assert config.parse_overrides(["--run.dir=--odd"]) == {"run": {"dir": "--odd"}}


@pytest.mark.parametrize(
    "words", [["--lr", "1"], ["optim.lr", "1"], ["--optim.lr"], ["--optim.lr", "1", "2"]]
)
def test_malformed_overrides(words):
    with pytest.raises(config.ConfigError, match="expected --section"):
        config.parse_overrides(words)


def test_unreadable_files(tmp_path):
    with pytest.raises(config.ConfigError, match="cannot read the configuration"):
        config.load(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("run: [unclosed\n")
    with pytest.raises(
        config.ConfigError,
        match=r"bad.yaml, line 2: is not YAML: while parsing a flow sequence expected",
    ):
        config.load(bad)
    bad.write_text("- a list\n")
    with pytest.raises(config.ConfigError, match="got a list, expected sections"):
        config.load(bad)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.resolve({}).run.seed = 3

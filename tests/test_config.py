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
            "does not match any of the expected tags: 'vpgea', 'grpo'",
        ),
        (
            {"objective": {"group_size": 1}},
            "objective.group_size: Input should be greater than or equal to 2, got 1",
        ),
        (
            {"objective": {"prior_samples": 0}},
            "objective.prior_samples: Input should be greater than 0, got 0",
        ),
        (
            {"objective": {"alpha": -0.5}},
            "objective.alpha: Input should be greater than or equal to 0, got -0.5",
        ),
        ({"objective": {"eta_clip": [4, 0.25]}}, "expected (low, high) with low <= high"),
        (
            {"objective": {"alpha": float("inf")}},
            "objective.alpha: Input should be a finite number",
        ),
        ({"optim": {"lr": float("nan")}}, "optim.lr: Input should be a finite number"),
        ({"model": {"dtype": "float16"}}, "model.dtype: Input should be 'float32', 'bfloat16' or"),
        ({"objective": {"alpha": -1}}, "0 turns the length factor off"),
        (
            {"objective": {"preset": "papr"}},
            "objective.preset: Input should be 'paper' or 'robust', got 'papr'",
        ),
        (
            {"objective": {"name": "grpo"}},
            "verifies sampled answers, but rollout.full_answer is false",
        ),
        (
            {"objective": {"verify": "gate"}},
            "verifies sampled answers, but rollout.full_answer is false",
        ),
        ({"train": {"steps": "many"}}, "train.steps: Input should be a valid integer"),
        ({"optim": 3}, "optim: Input should be a dictionary"),
        ({"rollout": {"top_p": 0.0}}, "rollout.top_p: Input should be greater than 0, got 0.0"),
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
        (config.DataFile("a.jsonl"), config.DataFile("b.jsonl")),
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
    with pytest.raises(config.ConfigError, match="is not valid YAML"):
        config.load(bad)
    bad.write_text("- a list\n")
    with pytest.raises(config.ConfigError, match="expected sections"):
        config.load(bad)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.resolve({}).run.seed = 3


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["--eval.data", "a.jsonl"], ["a.jsonl"]),
        (["--eval.data", "a: #b.jsonl"], ["a: #b.jsonl"]),
        (["--eval.data=2024"], ["2024"]),
        (["--eval.data", "[a.jsonl, {path: b.csv}]"], ["a.jsonl", "b.csv"]),
        (["--eval.data", "{path: b.csv, limit: 3}"], ["b.csv"]),
        (["--eval.data", "[]"], []),
    ],
)
def test_files_are_a_path_a_mapping_or_a_list(words, paths):
    cfg = config.resolve(config.parse_overrides(words))
    assert [file.path for file in cfg.eval.data] == paths
    assert config.resolve(yaml.safe_load(config.dump(cfg))) == cfg


def test_a_file_of_the_command_line_replaces_all_of_the_files(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {train: {path: a.jsonl, question_key: problem, limit: 3}}\n")
    [found] = config.load(file, ["--data.train", "{path: b.jsonl, limit: 4}"]).data.train
    assert found == config.DataFile("b.jsonl", limit=4)


def test_what_a_file_leaves_open_is_that_of_the_section():
    files = ["a.jsonl", {"path": "b.jsonl", "question_key": "problem", "choices_key": ""}]
    data = config.resolve({"data": {"train": files, "choices_key": ["x", "y"], "limit": 5}}).data
    assert config.as_dict(config.resolve({"data": {"train": files}}))["data"]["train"] == files
    first, second = map(data.filled, data.train)
    assert (first.question_key, first.choices_key, first.limit) == ("question", ("x", "y"), 5)
    assert (second.question_key, second.choices_key, second.id_key) == ("problem", "", "id")
    assert first.choices_answer == "auto"
    assert data.weights is None


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"train": [{"path": "a", "answerkey": "x"}]}}, "did you mean 'answer_key'?"),
        ({"data": {"train": []}}, "data.train: Value should have at least 1 item"),
        ({"data": {"train": 3}}, "expected a file, {path: FILE, question_key: KEY, ...}, or a"),
        ({"data": {"train": [3]}}, "data.train: expected a path or {path: FILE, ...} in the list"),
        ({"data": {"train": [["a"]]}}, "in the list, got ['a']"),
        ({"data": {"train": {"limit": 3}}}, "data.train.0.path: Field required"),
        ({"data": {"train": {"path": "a", "weight": 0}}}, "data.train.0.weight: Input should be"),
        ({"data": {"train": ["a", {"path": "b", "weight": 1}]}}, "1 of 2 files have no weight"),
        ({"data": {"train": ["a/x.csv", "b/x.csv"]}}, "names two files 'x'"),
        ({"eval": {"data": [{"path": "a", "weight": 1}]}}, "a has a weight, which is for data."),
        ({"data": {"choices_key": 3}}, "data.choices_key"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tree, message):
    with pytest.raises(config.ConfigError) as error:
        config.resolve(tree)
    assert message in str(error.value)

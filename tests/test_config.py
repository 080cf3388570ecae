"""Strict configuration: every key checked at birth, unknown ones named with their nearest
neighbour."""

import dataclasses
import math
import re
from pathlib import Path
from random import Random

import pytest
import yaml
from pydantic import TypeAdapter

from vpgea_fast import config, strict_yaml
from vpgea_fast.cli import main
from vpgea_fast.kernels.options import GroupOptions
from vpgea_fast.objectives import Grpo

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
            "objective.beta: unknown key; it belongs to objective.name 'vpgea': set that",
        ),
        (
            {"objective": {"name": "grop"}},
            "'custom'; did you mean 'grpo'?",
        ),
        ({"objective": {"name": "gpro"}}, "'custom'; did you mean 'grpo'?"),
        (
            {"objective": {"name": "sft", "group_size": 4}},
            "it belongs to objective.name 'vpgea', 'grpo', 'drgrpo', ...: set one of these, or",
        ),
        (
            {"objective": {"name": "grpo", "length_reward": {"name": "kimi", "absent": 0}}},
            "length_reward.absent: unknown key; it belongs to objective.length_reward.name 'lc_r1'",
        ),
        (
            {"objective": {"name": "grpo", "length_reward": {"name": "kimi", "group_size": 4}}},
            "objective.length_reward.group_size: unknown key; known keys: name, weight",
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
        (
            {"train": {"questions_per_step": 4, "minibatches": 5}},
            "train.minibatches is 5, but a step has 4 questions",
        ),
        (
            {"parallel": {"tensor": "head"}, "loss": {"backend": "triton"}},
            "parallel.tensor is 'head', but loss.backend is 'triton', which takes whole heads",
        ),
        ({"train": {"steps": "many"}}, "train.steps: got 'many', expected a whole number"),
        ({"optim": 3}, "optim: got 3, expected keys (name, "),
        ({"optim": {"lr": "1e-6"}}, "optim.lr: got '1e-6', expected a number"),
        ({"optim": {"lr": True}}, "optim.lr: got true, expected a number"),
        ({"optim": {"lr": None}}, "optim.lr: got null, expected a number; leave the key out"),
        ({"train": {"steps": True}}, "train.steps: got true, expected a whole number"),
        ({"train": {"steps": 2.0}}, "train.steps: got 2.0, expected a whole number; write 2"),
        ({"train": {"steps": 2**31}}, "train.steps: got 2147483648, expected less than 2147483648"),
        ({"train": {"lr": 1}}, "train.lr: unknown key; did you mean 'optim.lr'?"),
        ({"run": {"seed": 2**32}}, "run.seed: got 4294967296, expected less than 4294967296"),
        ({"run": {"seed": 10**39}}, "run.seed: got 1000000000000000000000000"),
        ({"run": {"threads": 100000}}, "run.threads: got 100000, expected 1024 or less"),
        (
            {"run": {"max_minutes": 1e9}},
            "run.max_minutes: got 1000000000.0, expected 1e+06 or less",
        ),
        ({"run": {"dir": 2024}}, "run.dir: got 2024, expected text (in quotes)"),
        ({"run": {"dir": ""}}, "run.dir: got '', expected a path"),
        ({"run": {"dir": "a\0b"}}, "expected a path"),
        ({"run": {"dir": "~nobody-here/x"}}, "write ./~nobody-here/x for a file of this name"),
        ({"metrics": {"note": "\ud800"}}, "configuration: "),
        ({"metrics": {"note": object()}}, "expected what YAML can hold"),
        ({"rollout": {"full_answer": "yes"}}, "got 'yes', expected true or false"),
        ({"rollout": {"full_answer": 1}}, "rollout.full_answer: got 1, expected true or false"),
        ({"rollout": {"temperature": 1e-9}}, "got 1e-09, expected 0.0001 or more"),
        ({"objective": {"preset": ["paper"]}}, 'objective.preset: got ["paper"], expected'),
        ({"objective": {"name": ["vpgea"]}}, 'objective.name: got ["vpgea"], expected'),
        ({"objective": {"ddof": True}}, "objective.ddof: got true, expected a whole number"),
        ({"objective": None}, "objective: got null, expected keys and values"),
        ({"optim": None}, "optim: got null, expected keys (name, "),
        ({"optim": {"betas": [0.9]}}, "optim.betas[1]: got [0.9], expected a value more"),
        ({"optim": {"betas": [0.9, "a"]}}, "optim.betas[1]: got 'a', expected a number"),
        ({"optim": {"betas": [0.1] * 3}}, "expected 2 entries"),
        ({"optim": {"betas": 0.9}}, "optim.betas: got 0.9, expected a list, [a, b]"),
        ({"eval": {"data": 3}}, "eval.data[0]: got 3, expected text or keys (path, "),
        ({"eval": {"data": None}}, "eval.data: got null, expected a list"),
        ({"rollout": {"top_p": 0.0}}, "rollout.top_p: got 0.0, expected more than 0"),
    ],
)
def test_errors_name_the_key_and_the_remedy(tree, message):
    with pytest.raises(config.ConfigError) as error:
        config.resolve(tree)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "c.yaml: got an empty file, expected sections"),
        (b"# all of it\n", "c.yaml: got an empty file"),
        (b"- a\n", "c.yaml: got a list, expected sections"),
        (b"run: {seed: 1}\nrun: {dir: x}\n", "c.yaml, line 2: 'run' stands twice, first in line 1"),
        (b"run: {dir: \xe9}\n", "c.yaml, line 1: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("run: {seed: 1}\n".encode("utf-16"), "c.yaml, line 1: byte 0xff is not UTF-8"),
        (b"run:\n  dir: \x00\n", "c.yaml, line 2: character U+0000 may not stand here"),
        (bytes(range(1, 256)), "c.yaml, line"),
        (b"x" * 2_000_000, "c.yaml: more than 1000000 bytes"),
        (b"[" * 100_000, "c.yaml, line 1: more than 16 levels"),
        (b"optim: {lr: yes}\n", "c.yaml: optim.lr: got 'yes', expected a number"),
        (b"train: {steps: 1:30}\n", "c.yaml: train.steps: got '1:30', expected a whole number"),
        (b"train: 5\n", "train: got 5, expected keys (steps, "),
    ],
)
@pytest.mark.parametrize("words", [[], ["--run.seed", "3"]], ids=["file", "with an option"])
def test_a_file_that_cannot_be_used_is_named_in_one_line(text, said, words, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_bytes(text)
    assert main(["train", str(file), *words, "--print-config"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert str(file) in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_words_mean_the_same_in_a_file_and_on_the_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    for word, want in {"010": 10, "0o17": 15, "7": 7}.items():
        file.write_text(f"run: {{seed: {word}}}\n")
        assert config.load(file).run.seed == want
        assert config.load(file, ["--run.seed", word]).run.seed == want
    for word in ("yes", "1:30", "1_000", "2026-01-02", "2.0", "true", "'3'", "null", "[1]", "1e2"):
        file.write_text(f"run: {{seed: {word}}}\n")
        with pytest.raises(config.ConfigError) as in_file:
            config.load(file)
        file.write_text("run: {}\n")
        with pytest.raises(config.ConfigError) as as_option:
            config.load(file, ["--run.seed", word])
        said = str(in_file.value).removeprefix(f"{file}:\n  ")
        assert said.startswith("run.seed: ")
        assert str(as_option.value) == f"command line:\n  --{said}"
    file.write_bytes(b"\xef\xbb\xbfoptim: {lr: 1e-6, betas: [.5, 0]}\n")  # as some editors save it
    assert (config.load(file).optim.lr, config.load(file).optim.betas) == (1e-6, (0.5, 0.0))


PLACES = [
    ("run: {seed: 1}", ["--optm.lr", "1"], "command line:\n  optm: unknown key"),
    ("run: {seed: 1}", ["--optim.lrr", "1"], "command line:\n  --optim.lrr: unknown key"),
    ("run: {sede: 1}", ["--optim.lr", "1"], "FILE:\n  run.sede: unknown key"),
    (
        "run: {sede: 1}",
        ["--optim.lr", "0"],
        "FILE and the command line:\n  run.sede: unknown key; did you mean 'seed'?\n  --optim.lr: ",
    ),
    # A rule between two keys is broken by both, by those of the words alone, or of the file.
    (
        "rollout: {full_answer: false}",
        ["--objective.name", "grpo"],
        "FILE and the command line:\n  configuration: objective 'grpo' verifies",
    ),
    ("run: {seed: 1}", ["--objective.kappa", "1"], "command line:\n  objective: kappa: got 1"),
    (
        "objective: {utility: elbo}",
        ["--objective.cross_view", "false"],
        "FILE and the command line:\n  objective: cross_view: got False",
    ),
    ("objective: {kappa: 1}", ["--run.seed", "1"], "FILE:\n  objective: kappa: got 1"),
    (
        "objective: {beta: 1}",
        ["--objective.beta", "x"],
        "command line:\n  --objective.beta: got 'x'",
    ),
    ("run: {seed: 1}", ["--eval.data", "[{path: a, x: 1}]"], "command line:\n  --eval.data[0].x: "),
    ("run: {seed: 1}", ["--train.norm", "const"], "command line:\n  --train.norm: is now obj"),
]


@pytest.mark.parametrize(("text", "words", "said"), PLACES)
def test_an_error_names_what_holds_its_key(text, words, said, tmp_path):
    """Words of the command line stand in no file."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(config.ConfigError) as error:
        config.load(file, words)
    assert str(error.value).startswith(said.replace("FILE", str(file)))


MEASURED = [
    ({"scoring": {"u_norm": "mean"}}, "scoring.u_norm 'mean'", "scoring.u_norm sum"),
    (
        {"scoring": {"u_source": "accuracy"}},
        "scoring.u_source 'accuracy'",
        "scoring.u_source likelihood",
    ),
    ({"data": {"variants_key": "others"}}, "data.variants_key 'others'", "data.variants_key null"),
    (
        {"data": {"train": [{"path": "a", "variants_key": "own"}]}},
        "data.variants_key 'own'",
        "data.variants_key null",
    ),
]


@pytest.mark.parametrize("name", ["verifree", "verifree_normalised"])
@pytest.mark.parametrize(("other", "got", "remedy"), MEASURED)
def test_an_answer_is_trained_by_its_own_likelihood_alone(name, other, got, remedy):
    """grad P(y*) = P(y*) grad log P(y*) of the one text that the row trains."""
    with pytest.raises(config.ConfigError) as error:
        config.resolve({"objective": {"name": name}, **other})
    assert f"objective '{name}' weighs the reference answer" in str(error.value)
    assert f"which {got} makes another number; set {remedy}, or train no target" in str(error.value)
    # As a reward of thoughts alone, or beside an answer of weight 1, it is a choice.
    for free in (
        {"name": "verifree", "target": "none"},
        {"name": "rloo", "reward": "probability", "trains": "thought"},
        {"train_answer": "sft"},
    ):
        config.resolve({"objective": free, **other})


@pytest.mark.parametrize("name", ["sft", "verifree"])
def test_what_nobody_samples_is_trained_at_temperature_1(name):
    sampled = {"temperature": 0.6, "full_answer": True}
    said = f"objective '{name}' trains the likelihood of the"
    with pytest.raises(config.ConfigError, match=said):
        config.resolve({"objective": {"name": name}, "rollout": sampled})
    config.resolve({"objective": {"name": "rft"}, "rollout": sampled})


@pytest.mark.parametrize(("answer", "most"), [(False, 90), (True, 120)])
def test_a_soft_punishment_begins_behind_the_first_token(answer, most):
    rollout = {"max_new_tokens": 90, "max_answer_tokens": 30, "full_answer": answer}
    keys = {"name": "dapo", "reward": "likelihood", "trains": "thought"}

    def read(cache):
        config.resolve({"objective": {**keys, "overlong_cache": cache}, "rollout": rollout})

    read(most)
    said = f"overlong_cache: got {most + 1}, expected at most the {most} tokens of a path"
    with pytest.raises(config.ConfigError, match=said):
        read(most + 1)


def test_null_unsets():
    words = ["--metrics.compare", "null", "--data.limit=~", "--objective.eta_clip", "null"]
    words += ["--engine", "vllm", "--engine.server", "NULL", "--objective.preset", "robust"]
    cfg = config.resolve(config.parse_overrides(words))
    found = (cfg.metrics.compare, cfg.data.limit, cfg.objective.eta_clip, cfg.vllm.server)
    assert found == (None, None, None, None)
    with pytest.raises(config.ConfigError, match=r"run\.dir: got null, expected text"):
        config.resolve(config.parse_overrides(["--run.dir", "null"]))
    for word in ("", " "):
        with pytest.raises(config.ConfigError, match=r"data\.limit: got an empty word; write null"):
            config.parse_overrides(["--data.limit", word])


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--run.dir", "~/run", "--model.path=~/m", "--data.train", "~/t.jsonl"]
    words += ["--eval.data", "[~/a.jsonl, b~c.jsonl]", "--metrics.compare", "~/c.json"]
    words += ["--engine", "vllm", "--engine.sync_dir", "~/sync"]
    cfg = config.resolve(config.parse_overrides(words))
    assert cfg == config.resolve(strict_yaml.parse(config.dump(cfg)))
    assert (cfg.run.dir, cfg.model.path) == (f"{tmp_path}/run", f"{tmp_path}/m")
    assert [file.path for file in cfg.data.train] == [f"{tmp_path}/t.jsonl"]
    assert [file.path for file in cfg.eval.data] == [f"{tmp_path}/a.jsonl", "b~c.jsonl"]
    assert (cfg.metrics.compare, cfg.vllm.sync_dir) == (f"{tmp_path}/c.json", f"{tmp_path}/sync")
    assert config.resolve({"run": {"dir": "./~x"}}).run.dir == "./~x"
    assert config.resolve({"model": {"path": "org/name"}}).model.path == "org/name"


def test_one_file_is_a_list_of_one():
    def data(*words):
        cfg = config.resolve(config.parse_overrides(words))
        assert config.resolve(strict_yaml.parse(config.dump(cfg))) == cfg
        return [(file.path, file.limit) for file in cfg.eval.data]

    assert data("--eval.data", "a b.jsonl") == [("a b.jsonl", None)]
    assert data("--eval.data", "a: #b, 2") == [("a: #b, 2", None)]
    assert data("--eval.data", "{path: a, limit: 3}") == [("a", 3)]
    assert data("--eval.data", "[a, {path: b}]") == [("a", None), ("b", None)]
    assert data("--eval.data", "[]") == []
    assert config.resolve({"eval": {"data": "a"}}).eval.data == (config.DataFile("a"),)
    for word, said in {
        "{limit: 3}": r"eval\.data\[0\]\.path: is missing; give it a value",
        "{path: a, limt: 3}": r"eval\.data\[0\]\.limt: unknown key; did you mean 'limit'\?",
        "[a, 3]": r"eval\.data\[1\]: got 3, expected text or keys \(path, name, ",
        "[[a]]": r"eval\.data\[0\]: got \[\"a\"\], expected text or keys",
        "{path: a, limit: yes}": r"eval\.data\[0\]\.limit: got 'yes', expected a whole number",
    }.items():
        with pytest.raises(config.ConfigError, match=said):
            data("--eval.data", word)
    with pytest.raises(config.ConfigError, match=r"--eval\.data: got '\[a': is not YAML"):
        data("--eval.data", "[a")


def test_the_command_line_lays_over_one_key_and_no_more(tmp_path):
    """Naming another optimiser once left the rate of the file behind."""
    file = tmp_path / "c.yaml"
    file.write_text("optim: {name: adamw_bf16, lr: 3e-4, betas: [0.5, 0.6]}\n")
    optim = config.load(file, ["--optim.name", "adamw_8bit"]).optim
    assert (optim.name, optim.lr, optim.betas) == ("adamw_8bit", 3e-4, (0.5, 0.6))


def test_every_number_has_a_range():
    """Both ends, of every field of every record, optional ones and lists among them."""

    def numbers(node):
        if isinstance(node, dict):
            if node.get("type") in ("integer", "number"):
                yield node
            node = list(node.values())
        for part in node if isinstance(node, list) else []:
            yield from numbers(part)

    records = TypeAdapter(config.Config).json_schema()["$defs"]
    found = {
        f"{record}.{key}": [{"minimum", "exclusiveMinimum"} & {*n} for n in numbers(field)]
        + [{"maximum", "exclusiveMaximum"} & {*n} for n in numbers(field)]
        for record, schema in records.items()
        for key, field in schema.get("properties", {}).items()
    }
    assert len(found["OptimConfig.betas"]) == 4
    assert [key for key, ends in found.items() if not all(ends)] == []


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


def test_every_option_of_the_utility_comes_from_the_key_of_its_name():
    values = {
        "alpha": 1.5,
        "baseline": "lme",
        "reward": "paper",
        "r_margin": 0.25,
        "u_min": -9.0,
        "clamp_u": True,
        "eta_clip": (0.5, 2.0),
        "eps": 0.125,
        "ddof": 1,
        "std_gate": 0.75,
    }
    options = config.resolve({"objective": values}).objective.group_options()
    assert dataclasses.asdict(options) == values
    assert config.resolve({}).objective.group_options() == GroupOptions()
    with pytest.raises(config.ConfigError, match=r"r_margin: got 0\.25 with reward="):
        config.resolve({"objective": {**values, "reward": "likelihood_mix"}})


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


@pytest.mark.parametrize("name", ["name: vpgea, ", ""], ids=["named", "by default"])
def test_another_variant_leaves_the_keys_of_the_old_one_and_says_so(name, tmp_path):
    file, said = tmp_path / "c.yaml", []
    file.write_text(f"objective: {{{name}beta: 0.3, eps: 0.1}}\nrollout: {{full_answer: true}}\n")
    words = ["--objective.name", "grpo", "--objective.group_size", "4"]
    cfg = config.load(file, words, said.append)
    assert (cfg.objective.name, cfg.objective.group_size, cfg.objective.eps) == ("grpo", 4, 1e-6)
    [line] = said
    assert "'grpo' leaves out the file's objective.beta, objective.eps" in line
    assert config.load(file, ["--objective.name", "vpgea"], said.append).objective.beta == 0.3
    assert len(said) == 1
    assert config.load(file, ["--objective.alpha", "0.1"]).objective.beta == 0.3


def test_a_variant_may_be_given_by_its_name_alone(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("engine: vllm\nobjective: grpo\nrollout: {full_answer: true}\n")
    cfg = config.load(file)
    assert (cfg.engine, cfg.objective) == (config.VllmEngineConfig(), Grpo())
    same = config.load(file, ["--engine=vllm", "--engine.gpu_memory", "0.7", "--objective", "grpo"])
    assert same.vllm == config.VllmEngineConfig(gpu_memory=0.7)
    with pytest.raises(config.ConfigError, match=r"engine\.name: got 'vlm'.*did you mean 'vllm'"):
        config.resolve({"engine": "vlm"})
    with pytest.raises(config.ConfigError, match=r"engine\.sync: .* belongs to engine.name 'vllm'"):
        config.resolve({"engine": {"sync": "disk"}})
    with pytest.raises(ValueError, match=r"engine\.name: got 'hf', expected 'vllm'"):
        config.Config().vllm  # noqa: B018 - refuses


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("rollout: {engine: vllm}", [], "rollout.engine: is now engine.name"),
        ("vllm: {gpu_memory: 0.5}", [], "vllm.gpu_memory: is now engine.gpu_memory"),
        ("vllm: {}", [], "vllm: is now engine"),
        ("engine: vllm", ["--vllm.sync", "disk"], "vllm.sync: is now engine.sync"),
        ("engine: vllm", ["--rollout.engine", "hf"], "rollout.engine: is now engine.name"),
    ],
)
def test_a_key_of_an_older_version_is_refused_with_its_new_name(text, words, said, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(config.ConfigError, match=re.escape(said)):
        config.load(file, words)


def test_every_renamed_key_leads_to_one_that_exists():
    for old, new in config.RENAMED.items():
        assert old not in config.known_keys()
        assert new in (*config.known_keys(), *vars(config.Config()))


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_the_record_of_an_older_run_is_read_as_what_its_keys_are_now(engine, tmp_path):
    """As version 0.1 wrote them: each section whole, the engine's settings with hf too."""
    file, heard = tmp_path / "config.yaml", []
    new = config.resolve({"engine": engine, "run": {"seed": 3}, "rollout": {"max_batch": 7}})
    old = config.as_dict(new)
    settings = {**config.as_dict(config.resolve({"engine": "vllm"}))["engine"], "gpu_memory": 0.25}
    del old["engine"], settings["name"]
    old["rollout"]["engine"], old["vllm"] = engine, settings
    file.write_text(strict_yaml.dump(old))
    expected = {"name": "vllm", **settings} if engine == "vllm" else "hf"
    cfg = config.load(file, [], heard.append, record=True)
    assert cfg == dataclasses.replace(new, engine=config.resolve({"engine": expected}).engine)
    assert config.resolve(config.renewed(old)) == cfg
    (line,) = heard
    assert f"{file}: written by an older version: read rollout.engine as engine.name" in line
    assert ("left out vllm.process, vllm.server" in line) == (engine == "hf")
    assert config.renewed(config.as_dict(new)) == config.as_dict(new)


def test_the_record_of_an_older_grpo_run_trains_what_the_run_trained(tmp_path):
    """The thought, for which version 0.1 had no key; the default is the whole response now."""
    file, heard = tmp_path / "config.yaml", []
    objective = {"name": "grpo", "trains": "thought"}
    new = config.resolve({"objective": objective, "rollout": {"full_answer": True}})
    old = config.as_dict(new)
    del old["objective"]["trains"]
    assert config.resolve(config.renewed(old)).objective.trains == "response"  # not an old record
    old["train"]["norm"] = old["objective"].pop("norm")
    file.write_text(strict_yaml.dump(old))
    assert config.load(file, [], heard.append, record=True) == new
    (line,) = heard
    assert line.endswith("read train.norm as objective.norm, no objective.trains as thought")
    old["objective"]["trains"] = "response"
    assert config.resolve(config.renewed(old)).objective.trains == "response"
    old["objective"] = {"name": ["grpo"]}
    assert config.renewed(old)["objective"] == {"name": ["grpo"]}


def test_another_engine_is_one_change():
    old, new = config.Config(), config.resolve({"engine": {"name": "vllm", "gpu_memory": 0.7}})
    assert config.changes(old, new) == {"engine.name": ("hf", "vllm")}
    other = config.resolve({"engine": {"name": "vllm", "gpu_memory": 0.5}})
    assert config.changes(new, other) == {"engine.gpu_memory": (0.7, 0.5)}


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


def test_the_last_of_two_values_is_taken_and_the_other_told():
    said = []
    words = ["--optim.lr", "1e-5", "--optim.lr=1e-5", "--engine", "vllm", "--engine.name", "hf"]
    assert config.parse_overrides(words, said.append) == {
        "optim": {"lr": 1e-5},
        "engine": {"name": "hf"},
    }
    assert said == ["--engine.name stands twice: 'hf' is taken, and 'vllm' left out"]
    config.load(config.find("tiny"), ["--data.train", "a", "--data.train", "b"], said.append)
    assert said[1:] == ["--data.train stands twice: 'b' is taken, and 'a' left out"]


@pytest.mark.parametrize("section", ["null", "3", "[]"])
def test_a_section_that_is_none_is_refused_by_its_file(tmp_path, section):
    file = tmp_path / "c.yaml"
    file.write_text(f"optim: {section}\n")
    for words in ([], ["--optim.lr", "1e-5"]):
        with pytest.raises(config.ConfigError, match=r"c\.yaml:\n  optim: got .*, expected keys"):
            config.load(file, words)


@pytest.mark.parametrize("value", [float("nan"), {"deep": [float("-inf")]}])
def test_switches_of_a_template_are_finite(value):
    with pytest.raises(config.ConfigError, match="chat_template_kwargs: expected finite numbers"):
        config.resolve({"prompt": {"chat_template_kwargs": {"a": value}}})


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
        ({"data": {"train": []}}, "data.train: got [], expected 1 entries or more"),
        ({"data": {"train": 3}}, "data.train[0]: got 3, expected text or keys (path, name, "),
        ({"data": {"train": ["a", 3]}}, "data.train[1]: got 3, expected text or keys (path, "),
        ({"data": {"train": [["a"]]}}, 'data.train[0]: got ["a"], expected text or keys'),
        ({"data": {"train": {"limit": 3}}}, "data.train[0].path: is missing; give it"),
        (
            {"data": {"train": {"path": "a", "weight": 0}}},
            "data.train[0].weight: got 0, expected more than 0",
        ),
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


# Text that YAML, Python or a shell gives a meaning to, and values of every type.
ODD = ":{}[]#&*!|>'\"%@`\t\n\r -~0x1e.,?<=\\\0\x85\u2028\ufeff\ud800é"
PIECES = ["&a ", "*a", "<<: ", "!!python/name:os ", "---\n", "%YAML 1.1\n", "[" * 50, "9" * 5000]
VALUES = [None, True, "", " ", "yes", "null", "~", "~nobody/x", -1, 0, 2.0, 2**70, 1e308, 5e-324]
VALUES += [math.nan, [], {}, [[[1]]], [None], {"a": {"b": [1]}}, {"name": []}, "\0", "x" * 9999]
VALUES += ["1:30", "010", "1_0", "[", "{a: 1, a: 2}", "*a", "!!str 1", "- 1", "%", "=", "<<", "-1"]
KEYS = [f"{s}.{k}" for s, keys in config.as_dict(config.Config()).items() for k in keys]


def spoil(rng, text):
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        end = at + rng.choice([0, 1, 1, 3, 30])
        new = rng.choice([rng.choice(ODD), text[at:end] * 2, "", rng.choice(PIECES)])
        text = text[:at] + new + text[end:]
    return text


def spoiled(rng):
    """A shipped file and words behind it, one of them spoiled: in its characters, its bytes, a
    value or the words."""
    text = rng.choice(CONFIGS).read_text()
    kind = rng.choice(["characters", "bytes", "value", "words"])
    raw, words = text.encode(), []
    if kind == "characters":
        raw = spoil(rng, text).encode("utf-8", "surrogatepass")
    elif kind == "bytes":
        at = rng.randrange(len(raw))
        raw = raw[:at] + rng.randbytes(3) + raw[at + 3 :]
        raw = rng.choice([raw, raw, text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))])
    elif kind == "value":
        tree, (section, key) = strict_yaml.parse(text), rng.choice(KEYS).split(".")
        tree[section] = {**tree.get(section, {}), key: rng.choice(VALUES)}
        tree = rng.choice([tree, tree, tree | {section: rng.choice(VALUES)}])
        raw = strict_yaml.dump(tree).encode()
    else:
        for _ in range(rng.randint(1, 3)):
            key, value = f"--{rng.choice(KEYS)}", str(rng.choice(VALUES))
            odd = [spoil(rng, key), value]
            words += rng.choice([[key, value], [f"{key}={value}"], odd, [key], [value]])
    return raw, words


def sweep(seeds, tmp_path, capsys, errors_in):
    """Status 2 and one line of this program, or a configuration that prints and reads as itself."""
    file, printed_file, statuses = tmp_path / "c.yaml", tmp_path / "printed.yaml", []
    for seed in seeds:
        raw, words = spoiled(Random(seed))
        file.write_bytes(raw)
        statuses.append(main(["train", str(file), *words, "--print-config"]))
        printed = capsys.readouterr()
        if statuses[-1] == 0:
            printed_file.write_text(printed.out)
            assert config.load(printed_file) == config.load(file, words), seed
        else:
            assert statuses[-1] == 2, seed
            errors = errors_in(printed.err)
            assert len(errors) == 1, seed
            assert errors[0].startswith("vpgea: "), seed
            assert "--traceback" not in printed.err, seed  # an error that nobody foresaw
    assert {*tmp_path.iterdir()} <= {file, printed_file}
    assert {*statuses} == {0, 2}


def test_forty_spoiled_configurations(tmp_path, capsys, errors_in):
    sweep(range(40), tmp_path, capsys, errors_in)


@pytest.mark.slow
def test_three_hundred_spoiled_configurations(tmp_path, capsys, errors_in):
    sweep(range(40, 340), tmp_path, capsys, errors_in)


@pytest.mark.parametrize("place", ["data.train", "eval.data"])
def test_the_file_for_dropped_rows_is_none_that_is_read(place: str, tmp_path: Path):
    """It is written anew, in a dry run too: the data would be lost."""
    file = tmp_path / "a.jsonl"
    words = [f"--{place}", str(file), "--data.dropped_file", str(tmp_path / "." / "a.jsonl")]
    with pytest.raises(
        config.ConfigError, match=r"data\.dropped_file is .*read from; give a file of its"
    ):
        config.resolve(config.parse_overrides(words))
    other = [*words[:3], str(tmp_path / "b.jsonl")]
    assert config.resolve(config.parse_overrides(other)).data.dropped_file == other[3]


@pytest.mark.parametrize(
    ("keys", "lacks"),
    [
        ({"eval.data": ["a.jsonl"]}, "eval.every asks for none"),
        ({"eval.every": 5}, "eval.data asks for none"),
        ({"eval.data": ["a.jsonl"], "eval.every": 5, "eval.samples": 0}, "eval.samples asks for"),
        ({"eval.data": ["a.jsonl"], "eval.every": 5}, None),
    ],
)
def test_the_best_checkpoint_needs_an_evaluation(keys, lacks):
    tree = {"checkpoint": {"keep_best": "sampled_eps3"}, "eval": {}}
    tree["eval"] = {key.removeprefix("eval."): value for key, value in keys.items()}
    if lacks is None:
        assert config.resolve(tree).checkpoint.keep_best == "sampled_eps3"
        return
    with pytest.raises(config.ConfigError, match=lacks):
        config.resolve(tree)


def test_a_budget_of_tokens_needs_a_rate_that_does_not_fall():
    tree = {"train": {"max_tokens": 1000}, "optim": {"schedule": "cosine"}}
    with pytest.raises(config.ConfigError, match=r"'cosine' falls over train\.steps, and"):
        config.resolve(tree)
    assert config.resolve(tree | {"optim": {"schedule": "constant"}}).train.max_tokens == 1000


def test_a_shipped_configuration_goes_by_name_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("1.5b", "7b", "7b-1gpu", "7b-multinode", "tiny")
    assert [config.find(name) for name in names] == [
        str(config.SHIPPED / f"{name}.yaml") for name in names
    ]
    (tmp_path / "tiny").mkdir()  # a world of make-tiny, not a configuration
    assert config.find("tiny") == str(config.SHIPPED / "tiny.yaml")
    (tmp_path / "7b").write_text("run: {seed: 3}")
    assert config.load(config.find("7b")).run.seed == 3
    for word in ("tiny.yaml", "none", "../tiny", "", str(config.SHIPPED / "tiny")):
        assert config.find(word) == word
    with pytest.raises(config.ConfigError, match=r"one of the names 1\.5b, 7b, 7b-1gpu, 7b-multi"):
        config.load("none")

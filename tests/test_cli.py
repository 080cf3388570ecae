"""The command line as a user meets it: what it prints, what it refuses, what it leaves behind."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from chat_models import SHAPES
from safetensors.torch import load_file, save_file
from test_prompts import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from vpgea_fast import __version__, checkpoint, config, strict_yaml
from vpgea_fast.cli import main
from vpgea_fast.cli.train import status
from vpgea_fast.distributed import World
from vpgea_fast.objectives import Grpo
from vpgea_fast.trainer import Ending

ROOT = Path(__file__).parents[1]
GSM8K = str(Path(__file__).parent / "cases/gsm8k_raw.jsonl")
TINY = ROOT / "configs/tiny.yaml"


@pytest.fixture
def train(tiny_world, tmp_path):
    """`vpgea train configs/tiny.yaml` on the tiny world, two small steps: returns the status."""

    def run(*more, run_dir=tmp_path / "run"):
        fixed = {
            "run.dir": run_dir,
            "model.path": tiny_world.base_dir,
            "data.train": tiny_world.train_path,
            "data.limit": 64,
            "eval.data": "[]",
            "verify.name": "number",
            "train.questions_per_step": 2,
            "objective.group_size": 2,
            "objective.prior_samples": 2,
            "train.steps": 2,
            "checkpoint.save_every": 1,
            "checkpoint.export": "false",
            "metrics.compare": "null",
            "metrics.figure": "false",
            "rollout.max_new_tokens": 24,
        }
        more = [*map(str, more)]
        left = {f"--{key}": str(value) for key, value in fixed.items() if f"--{key}" not in more}
        return main(["train", str(TINY), *(word for pair in left.items() for word in pair), *more])

    return run


@pytest.fixture
def refusal(capsys):
    """The one line that a refused command prints; nothing else may come, and no traceback."""

    def read(status):
        printed = capsys.readouterr()
        assert status == 2
        assert printed.err.startswith("vpgea: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return read


def jsonl(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "eval", "data", "report", "make-tiny"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: COMMAND; see vpgea --help"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "give a YAML file, or --resume RUN"),
        (["train", "a.yaml", "--resume", "b"], "one of the two"),
        (["train", "a.yaml", "--dryrun"], "unknown argument '--dryrun'; did you mean --dry-run?"),
        (["train", "a.yaml", "--lr", "1"], "unknown argument '--lr'; did you mean --optim.lr?"),
        (["train", "a.yaml", "more"], "unknown argument 'more'; see vpgea train --help"),
        (["train", "none.yaml"], "cannot read the configuration none.yaml"),
        (["train", str(TINY), "--model.path"], "expected --section.key value"),
        (["train", str(TINY), "--optim.lrr", "1"], "optim.lrr: unknown key; did you mean 'lr'?"),
        (["train", str(TINY), "--objective.group_size", "1"], "objective.group_size: "),
        (["train", str(TINY), "--objective.prior_samples=0"], "objective.prior_samples: "),
        (["train", str(TINY), "--objective.alpha", "-1"], "got -1, expected 0 or more"),
        (["train", "--resume", "none"], "none is no run: config.yaml is missing"),
        (["train", "--resume", "b", "--resume-if-started"], "goes with a YAML file"),
        (["train", "a.yaml", "--processes", "8"], "are for --dry-run"),
        (
            ["train", "a.yaml", "--dry-run", "--processes", "-1"],
            "--processes: got '-1', expected a",
        ),
        (["train", "a.yaml", "--dry-run", "--processes", "0"], "a whole number from 1 to 1048576"),
        (["train", "a.yaml", "--dry-run", "--processes", "2.0"], "got '2.0', expected a whole"),
        (
            ["train", "a.yaml", "--dry-run", "--device-gib", "-5"],
            "--device-gib: got '-5', expected",
        ),
        (
            ["train", "a.yaml", "--dry-run", "--device-gib", ".nan"],
            "a number above 0, up to 100000",
        ),
        (["train", "a.yaml", "--device-gib", "yes"], "--device-gib: got 'yes', expected a number"),
        (
            ["train", "~nobody-here/a.yaml"],
            "has no home directory here; write ./~nobody-here/a.yaml",
        ),
        (["train", ""], "got '', expected a path"),
        (["train", str(TINY), "--run.threads", "100000"], "run.threads: got 100000, expected 1024"),
        (["train", str(TINY), "--optim.lr", "yes"], "optim.lr: got 'yes', expected a number"),
        (["train", "--resume", "a", "--resume=b"], "--resume stands twice; leave one of them out"),
        (["export", "no-run"], "no-run is no run: config.yaml is missing; give a run directory"),
        (["train", str(TINY), "--data.limit", ""], "--data.limit: got an empty word; write null"),
        (
            ["train", str(TINY), "--metrics.note", "\udcff"],
            "--metrics.note: got '\\udcff', expected",
        ),
        (["train", str(TINY), "--eval.data", "[a"], "--eval.data: got '[a': is not YAML"),
        (["serve", "m", "--port", "99999"], "--port: got '99999', expected a whole number from 1"),
        (
            ["serve", "m", "--port", "http"],
            "--port: got 'http', expected a whole number from 1 to 65",
        ),
        (["make-tiny", "x", "--seed", "-1"], "--seed: got '-1', expected a whole number from 0"),
        (["eval"], "required: model, data; see vpgea eval --help"),
        (["eval", "m", "d", "--out", "none/x"], "its parent is not there"),
        (["eval", "./none", "d"], "there is no file d"),
        (["eval", "./none", GSM8K], "no model directory at ./none"),
        (["eval", "none", GSM8K], "cannot load a tokenizer from 'none'"),
        (["report", "none"], "none is no run"),
        (["report", "none", "--run.dir", "x"], "--run.dir is an option of train and eval only"),
        (["make-tiny", "x", "--base", "big"], "invalid choice: 'big'"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_remedy(words, said, refusal, tmp_path):
    assert said in refusal(main(words))
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"vpgea_fast {__version__}\n"


def test_what_another_objective_leaves_out_is_said_beside_the_configuration(capsys):
    words = ["--objective.name", "grpo", "--print-config"]
    assert main(["train", str(TINY), *words]) == 0
    printed = capsys.readouterr()
    assert config.resolve(strict_yaml.parse(printed.out)).objective == Grpo()
    assert printed.err.startswith("vpgea: ")
    assert "objective.name 'grpo' leaves out the file's objective.preset, objective." in printed.err
    assert printed.err.count("\n") == 1


def test_an_error_that_nobody_foresaw_is_one_line_too(refusal):
    words: list = ["train", 3]
    assert "(AttributeError; --traceback shows where)" in refusal(main(words))
    with pytest.raises(AttributeError):
        main([*words, "--traceback"])


def test_several_wrong_keys_stand_in_one_line(refusal):
    said = refusal(main(["train", str(TINY), "--optm.lr", "1", "--train.steps", "many"]))
    assert "train.steps: " in said
    assert "; optm: unknown key; did you mean 'optim'?" in said


def test_traceback_on_request():
    with pytest.raises(ValueError, match="COMMAND"):
        main(["--traceback"])
    with pytest.raises(config.ConfigError):
        main(["train", str(TINY), "--optim.lrr", "1", "--traceback"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_printed_configuration_is_the_configuration(path, capsys, tmp_path):
    assert main(["train", str(path), "--print-config", "--optim.lr", "3e-7"]) == 0
    printed = capsys.readouterr().out
    assert config.resolve(yaml.safe_load(printed)) == config.load(path, ["--optim.lr", "3e-7"])
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert main(["train", str(again), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_dry_run_shows_prompts_lengths_and_memory_and_writes_nothing(train, capsys, tmp_path):
    assert train("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "64 questions, none dropped; the first 8:" in shown
    assert shown.count("scored answer '{") == 8
    assert "student prompt:\n<s><|user|>9 A-three B-five<|assistant|><think>\n" in shown
    assert "teacher prompt:\n<s><|user|>9 A-three B-five hint 1<|assistant|><think>\n" in shown
    assert "student prompt tokens: min 9" in shown
    assert "memory estimate for one of 1 devices" in shown
    assert "more than it holds" not in shown
    assert "traffic" not in shown  # one process alone
    assert not list(tmp_path.iterdir())


def test_dry_run_ends_with_the_error_of_the_run(train, refusal, tmp_path):
    assert "there is no file" in refusal(train("--dry-run", "--data.train", tmp_path / "none"))
    assert "no model directory" in refusal(train("--dry-run", "--model.path", tmp_path / "none"))
    assert "a step takes 65 questions" in refusal(
        train("--dry-run", "--train.questions_per_step", 65)
    )


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_benchmark_that_cannot_be_drawn_is_refused_by_run_and_dry_run(
    dry, train, refusal, tiny_world, tmp_path
):
    """Before the weights are loaded: these would be refused as NaN."""
    model = shutil.copytree(tiny_world.base_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({k: w.fill_(float("nan")) for k, w in weights.items()}, model / "model.safetensors")
    test = ["--model.path", model, "--eval.data", f"[{tiny_world.test_path}]", *dry]
    assert "there is no file" in refusal(train(*dry, "--eval.data", f"[{tmp_path}/none.jsonl]"))
    said = refusal(train(*test, "--eval.max_new_tokens", 100000))
    assert "benchmark test, question test-" in said
    assert "and up to 100006 new ones need" in said
    assert "(max_position_embeddings); lower" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("entry", ["{file}", "{{path: {file}, question_key: question}}"])
def test_an_evaluation_never_writes_over_its_questions(entry, tiny_world, tmp_path, refusal):
    data = jsonl(tmp_path / "mine.jsonl", '{"question": "1 A+two", "answer": "3"}\n')
    before = data.read_text()
    link = tmp_path / "link.jsonl"
    link.symlink_to(data)
    for out in (data, link, tmp_path / "." / "mine.jsonl"):
        words = ["eval", str(tiny_world.base_dir), entry.format(file=data), "--out", str(out)]
        assert "is a file; expected a folder" in refusal(main(words))
    for name in ("result.json", "samples.jsonl", "times.jsonl"):
        mine = tmp_path / "mine" / name
        mine.parent.mkdir()
        mine.write_text(before)
        words = ["eval", str(tiny_world.base_dir), str(mine), "--out", str(mine.parent)]
        assert f"{name} is there without eval.json" in refusal(main(words))
        assert mine.read_text() == before
        shutil.rmtree(mine.parent)
    assert data.read_text() == before


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_an_evaluation_leaves_out_no_long_question_and_says_so(
    policy, train, tiny_world, tmp_path, refusal
):
    data = jsonl(
        tmp_path / "long.jsonl",
        '{"question": "1 A+two", "answer": "3"}\n',
        '{"question": "1 A+two B+two C+two", "answer": "7"}\n',
    )
    limit = ["--data.max_prompt_tokens", "8", "--data.overlong", policy]
    words = ["eval", str(tiny_world.base_dir), str(data), "--config", str(TINY), *limit]
    for said in (refusal(main(words)), refusal(train("--eval.data", data, "--dry-run", *limit))):
        assert "1 prompts are longer than 8 tokens (the first is question 'row-2')" in said
        assert f"whatever data.overlong says (now '{policy}'): the rest would be another" in said


FAMILIES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_run_of_families_with_other_names_for_their_sizes(
    family, train, tiny_world, tmp_path, capsys
):
    """GPT-2 has no intermediate_size and n_embd for hidden_size; OPT learns its positions."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vocabulary = json.loads((tiny_world.base_dir / "config.json").read_text())["vocab_size"]
    shape = AutoConfig.for_model(family, vocab_size=vocabulary, **FAMILIES[family], **ends)
    model = tmp_path / "model"
    with torch.random.fork_rng():
        AutoModelForCausalLM.from_config(shape).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_world.base_dir / name, model / name)
    assert train("--dry-run", "--model.path", model) == 0
    shown = capsys.readouterr().out
    count = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())
    assert f"{count / 1e6:.1f} M parameters" in shown
    assert re.search(r"peak 0\.\d+ GiB", shown)


UNREACHABLE = """
import sys, time
from vpgea_fast.cli import main

yaml, data, base = sys.argv[1:]
of = ["--eval.data", "[]", "--data.train"]
for words in (
    ["eval", "some/model", data],
    ["train", yaml, "--model.path", "some/model", *of, data],
    ["train", yaml, "--model.path", "some/model", *of, data, "--dry-run"],
    ["serve", "some/model"],
    ["eval", base, "--suite", "quick"],
):
    start = time.monotonic()
    assert main(words) == 2, words
    assert time.monotonic() - start < 60, words
"""


def test_a_hub_that_does_not_answer_is_one_line_in_seconds(tiny_world, tmp_path):
    """transformers asks for each of its files six times, 200 s in all, and datasets tells each time
    on a line; the limit is that of a busy machine, imports included."""
    around = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    around |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    data = jsonl(tmp_path / "d.jsonl", '{"question": "1 A+two", "answer": "3"}\n')
    words = [sys.executable, "-c", UNREACHABLE, *map(str, (TINY, data, tiny_world.base_dir))]
    done = subprocess.run(words, cwd=tmp_path, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    for line in lines[:4]:
        assert line.startswith("vpgea: 'some/model' is no directory here, and the Hub does not ans")
        assert line.endswith("or set HF_HUB_OFFLINE=1 if the model lies in the cache of the Hub")
    assert lines[4] == (
        "vpgea: hub:openai/gsm8k/main:test: the Hub does not answer; give a copy as a file (of a "
        "suite: --from FOLDER), or set HF_HUB_OFFLINE=1 if it lies in the cache of the Hub"
    )
    assert not (tmp_path / "runs").exists()


LARGE = [("7b", "7b", 8), ("7b-multinode", "7b", 16), ("7b-1gpu", "7b", 1), ("1.5b", "1.5b", 1)]


# What a dry run of sizes needs; sympy's start would be most of its time.
NUMBERS = ["--verify.name", "number"]


@pytest.fixture
def large_plan(large_model, capsys):
    """The dry run of a large preset without a network: what it shows, and its table of memory,
    part -> GiB of every phase."""

    def plan(preset, name, *more):
        words = ["--model.path", str(large_model(name)), "--device-gib", "79.6", *NUMBERS, *more]
        assert main(["train", str(ROOT / f"configs/{preset}.yaml"), "--dry-run", *words]) == 0
        shown = capsys.readouterr().out
        table = {
            line[2:19].strip(): [float(cell) for cell in line[19:].split()]
            for line in shown.splitlines()
            if line.startswith("  ") and line[19:].replace(".", "").replace(" ", "").isdigit()
        }
        return shown, table

    return plan


def check_large(shown, sizes, preset, name, processes):
    """What does not depend on the engine; the parameter counts are the published ones."""
    cfg, parameters = config.load(ROOT / f"configs/{preset}.yaml"), SHAPES[name][-1]
    whole = parameters / 2**30
    assert "8 built-in questions stand in, the run itself needs hub:" in shown
    assert "The reference answer to this problem is: 45." in shown
    assert f"{parameters / 1e6:.1f} M parameters" in shown
    assert f"one of {processes} devices" in shown
    assert "more than it holds" not in shown
    if preset != "7b-1gpu":
        shards = processes // cfg.parallel.replicas
        # One GPU has what its forward reads, and beside it what is updated.
        updated = "masters" if processes == 1 else "weights"
        assert sizes[updated][0] == pytest.approx(4 * whole / shards, rel=1e-3)
        if processes == 1:
            assert sizes["weights"][0] == pytest.approx(2 * whole, rel=1e-3)
        assert sizes["optimiser"][0] == pytest.approx(8 * whole / shards, rel=1e-3)
    else:
        assert sizes["weights"] == [pytest.approx(2 * whole, rel=1e-3)] * len(sizes["total"])
        assert "optimiser" not in sizes  # its moments lie in host memory
        assert f"host memory of a process, moments: {4 * whole:.3f} GiB" in shown
    for phase, total in enumerate(sizes["total"]):
        column = sum(cells[phase] for part, cells in sizes.items() if part != "total")
        assert total == pytest.approx(column, abs=5e-3)
    peak = re.search(r"peak ([0-9.]+) GiB", shown)
    assert float(peak[1]) == pytest.approx(max(sizes["total"]), abs=2e-3)
    assert ("between nodes" in shown) == (processes > 1)
    assert ("all-reduce" in shown) == (preset == "7b-multinode")
    answers = cfg.eval.limit * cfg.eval.samples
    assert f"  held out: {answers} answers every 20 steps, " in shown
    assert "planned, its files could not be asked for here: hub:HuggingFaceH4/MATH-500" in shown


# The planned evaluation's longest prompt, thought and answer: longer than any of the built-in ones.
CONTEXT = 1024 + 8192 + 512


@pytest.mark.parametrize(("preset", "name", "processes"), LARGE)
def test_dry_run_of_the_large_presets_needs_no_network_and_no_weights(
    preset, name, processes, large_plan
):
    """As shipped, with vLLM: its share of the device beside its weights is KV cache. GiB, a column
    a phase."""
    shown, sizes = large_plan(preset, name, "--processes", str(processes))
    check_large(shown, sizes, preset, name, processes)
    hidden, _, kv_heads, mlp, vocabulary, parameters = SHAPES[name]
    cfg = config.load(ROOT / f"configs/{preset}.yaml")
    assert cfg.engine.name == "vllm"
    assert f"{cfg.rollout.max_batch} paths of up to {CONTEXT} tokens side by side" in shown
    weights = 2 * parameters / 2**30
    forward = 16384 * 2 * (3 * mlp + 2 * hidden)  # of the tokens that vLLM batches
    work = (forward + cfg.rollout.max_batch * vocabulary * (2 + 16)) / 2**30
    cache = cfg.vllm.gpu_memory * 79.6 - weights - work - 1
    asleep, near = [0] * 5, pytest.approx
    assert sizes["vllm weights"] == [*asleep, near(weights, abs=1e-3), near(weights, abs=1e-3)]
    assert sizes["vllm kv cache"] == [*asleep, near(cache, abs=2e-3), 0]
    assert sizes["vllm work"] == [*asleep, near(work, abs=1e-3), 0]
    assert sizes["vllm graphs"] == [1] * 7
    assert "sampling replica" not in sizes
    token = 2 * 28 * kv_heads * 128 * 2
    found = re.search(rf"{token} bytes a token, (\d+) tokens: (\d+) paths of {CONTEXT} at", shown)
    assert int(found[1]) == near(cache * 2**30 / token, rel=1e-4)
    assert int(found[2]) == int(found[1]) // CONTEXT
    assert "fewer than" not in shown


@pytest.mark.parametrize(("preset", "name", "processes"), LARGE)
def test_dry_run_of_the_large_presets_where_there_is_no_vllm(preset, name, processes, large_plan):
    """`--engine hf`: a whole copy of the model beside shards, and a KV cache of its own."""
    words = ["--engine", "hf", "--rollout.max_batch", "64", "--processes", str(processes)]
    shown, sizes = large_plan(preset, name, *words)
    check_large(shown, sizes, preset, name, processes)
    assert f"64 paths of up to {CONTEXT} tokens side by side" in shown
    kv_heads, parameters = SHAPES[name][2], SHAPES[name][-1]
    replica = 2 * parameters / 2**30
    # One GPU samples with the trained weights themselves.
    copies = [] if processes == 1 else [pytest.approx(replica, abs=1e-3)] * 6
    assert sizes.get("sampling replica", []) == copies
    kv_cache = 2 * 28 * 64 * CONTEXT * kv_heads * 128 * 2 / 2**30
    assert sizes["kv cache"] == [0, 0, 0, 0, 0, pytest.approx(kv_cache, abs=1e-3)]
    assert not [part for part in sizes if part.startswith("vllm")]
    assert "engine hf draws up to 8192 tokens a path on CUDA" in shown


def test_dry_run_says_what_to_lower(large_plan):
    words = ["--engine", "hf", "--rollout.max_batch", "512", "--processes", "8"]
    shown, _ = large_plan("7b", "7b", *words)
    assert "such a device holds 79.600 GiB, 73.232 beside CUDA" in shown
    assert "'kv cache' is largest: rollout.max_batch or rollout.max_new_tokens" in shown


@pytest.fixture
def vllm_plan(large_model, capsys):
    """The lines that a dry run of the 7B preset on 8 GPUs of 80 GiB ends with."""
    model = large_model("7b")

    def plan(*more):
        words = ["--model.path", str(model), *NUMBERS, *more]
        machine = ["--processes", "8", "--device-gib", "80"]
        assert main(["train", str(ROOT / "configs/7b.yaml"), "--dry-run", *words, *machine]) == 0
        return capsys.readouterr().out

    return plan


def test_dry_run_counts_the_paths_in_vllms_cache(vllm_plan):
    """28 layers, 4 key heads of 128, bfloat16: 57,344 bytes a token, 28,672 on two GPUs."""
    shown = vllm_plan("--engine.kv_cache_gib", "14")
    paths = 14 * 2**30 // 57344 // CONTEXT
    assert (
        "vLLM's KV cache: 14.000 GiB, 57344 bytes a token, 262144 tokens: "
        f"{paths} paths of {CONTEXT} at once" in shown
    )
    # 64 questions x 16 paths on 8 devices; half of the longest thought, and an answer of 256.
    assert "fewer than the 128 that a step draws side by side (rollout.max_batch 192)" in shown
    assert "of mean length (4352, and 8 share a prompt)" in shown
    assert "slower, not wrong; raise engine.kv_cache_gib, or lower rollout.max_batch" in shown
    shown = vllm_plan("--engine.tensor_parallel", "2", "--engine.gpu_memory", "0.45")
    assert "28672 bytes a token" in shown
    assert "fewer than" not in shown
    assert "too many" not in shown
    assert "will not start" not in shown
    assert "sampling replica" not in shown
    assert "weight sync" in shown


def test_dry_run_says_that_vllm_would_not_start(vllm_plan):
    shown = vllm_plan("--engine.gpu_memory", "0.2")
    assert f"0 tokens: 0 paths of {CONTEXT} at once" in shown
    one = f"vLLM will not start: one path may have {CONTEXT + 1} tokens (engine.context); raise "
    one += "engine."
    assert f"{one}gpu_memory, or lower" in shown
    room = CONTEXT * 57344 / 2**30
    assert f"{one}kv_cache_gib" in vllm_plan("--engine.kv_cache_gib", str(room))
    fits = vllm_plan("--engine.kv_cache_gib", str(room), "--engine.context", str(CONTEXT))
    assert "will not start" not in fits
    shown = vllm_plan("--engine.kv_cache_gib", "10", "--engine.gpu_memory", "0.9")
    assert "it asks for engine.gpu_memory (72.000 GiB) of free memory also with" in shown
    free = 80 * 0.92 - 4 * SHAPES["7b"][-1] / 8 / 2**30
    assert f"and {free:.3f} are free; set engine.gpu_memory to {int(free / 0.8) / 100:.2f}" in shown


def test_dry_run_says_how_much_vllm_may_take_and_that_fits(vllm_plan):
    def plan(*words):
        return vllm_plan("--train.resample_rounds", "1", *words)

    shown = plan("--engine.gpu_memory", "0.8")
    assert "'vllm kv cache' is largest: engine.gpu_memory or engine.kv_cache_gib" in shown
    found = re.search(
        r"scoring: vLLM's 64\.000 GiB beside ([0-9.]+) of the trainer are ([0-9.]+) too many; "
        r"set engine\.gpu_memory to ([0-9.]+)",
        shown,
    )
    assert found is not None
    trainer, over, share = map(float, found.groups())
    assert trainer + 64 - over == pytest.approx(80 * 0.92, abs=2e-3)
    assert "more than it holds" not in plan("--engine.gpu_memory", str(share))
    assert "more than it holds" in plan("--engine.gpu_memory", str(share + 0.01))
    shown = plan("--engine.kv_cache_gib", "45")
    cache = re.search(r"too many; set engine\.kv_cache_gib to ([0-9.]+)", shown)
    assert cache is not None
    assert "more than it holds" not in plan("--engine.kv_cache_gib", cache[1])
    wide = ["--engine.gpu_memory", "0.5", "--train.micro_batch_tokens", "400000"]
    assert "raise engine.tensor_parallel, take more processes, or let a server" in plan(*wide)


def test_dry_run_refuses_what_the_run_would_refuse(train, refusal):
    said = refusal(train("--dry-run", "--train.micro_batch_tokens", 40))
    assert "train.micro_batch_tokens: got 40, but a row may have" in said
    said = refusal(train("--dry-run", "--parallel.cpu_offload", "true"))
    assert "parallel.cpu_offload: got true without a CUDA device" in said
    said = refusal(train("--dry-run", "--processes", 3, "--parallel.replicas", 2))
    assert "parallel.replicas: got 2, expected a divisor of the 3 processes" in said


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "there is no file"),
        ([], "is empty"),
        ([{"question": "1", "answer": "1"}, "\n{oops}\n"], "line 2: Expecting property name"),
        ([{"question": "1"}], "line 1: no key 'answer'"),
        ([{"answer": "1"}], "line 1: no key 'question'"),
        ([{"question": "1", "answer": r"\frac{1}{"}], "all 1 questions have an unusable answer"),
    ],
)
def test_bad_data_is_refused_in_one_line(rows, said, train, refusal, tmp_path):
    data = tmp_path / "bad.jsonl"
    if rows is not None:
        jsonl(data, *rows)
    text = refusal(train("--data.train", data))
    assert said in text
    assert str(data) in text
    assert not (tmp_path / "run").exists()


def test_bad_answers_and_long_prompts_by_policy(train, refusal, tmp_path, capsys):
    rows = [f'{{"question": "{i} A-three", "answer": "{i}"}}\n' for i in range(4)]
    data = jsonl(
        tmp_path / "some.jsonl", *rows, '{"question": "9 A+two", "answer": "\\\\frac{1}{"}\n'
    )
    strict = refusal(train("--data.train", data, "--data.bad_answer", "error"))
    assert "some.jsonl, line 5: answer not accepted" in strict
    long = jsonl(tmp_path / "long.jsonl", *rows, '{"question": "1 A+two B+two", "answer": "5"}\n')
    short = ["--data.train", long, "--data.max_prompt_tokens", 10]
    strict = refusal(train(*short, "--data.overlong", "error"))
    assert "1 of 5 prompts are longer than 10 tokens, the longest (question 'row-5')" in strict
    assert "4096" not in strict
    assert train("--data.train", data, run_dir=tmp_path / "a") == 0
    assert train(*short, run_dir=tmp_path / "b") == 0
    shown = capsys.readouterr().out
    assert "4 questions, 1 dropped (answer not accepted)" in shown
    assert "4 questions, 1 dropped (longer than 10 tokens)" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--verify.name", "custom"], "a target belongs to name custom, and custom needs one"),
        (["--verify.target", "mine:f"], "verify.name is 'number' and verify.target 'mine:f'"),
        (["--verify.name", "custom", "--verify.target", "nowhere:f"], "cannot import nowhere"),
    ],
)
def test_a_checker_that_cannot_be_used_is_refused_before_anything_is_made(
    words, said, train, refusal, tmp_path
):
    assert said in refusal(train(*words)).replace("\n", " ")
    assert said in refusal(train("--dry-run", *words))
    assert not (tmp_path / "run").exists()


def test_a_run_with_the_users_own_checker(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "asked"
    (tmp_path / "mine.py").write_text(
        "def right(gold, text):\n"
        f"    open({str(log)!r}, 'a').write(text.replace('\\n', ' ') + '\\n')\n"
        "    return gold != '3'\n"
    )
    words = ["--verify.name", "custom", "--verify.target", "mine:right"]
    words += ["--rollout.full_answer", "true", "--rollout.max_new_tokens", 240]
    # It finds no answer wrong, and the leak guard's prompt must hold one that is.
    assert train(*words) == 2
    assert "no other question's answer is a wrong one" in capsys.readouterr().err
    assert train(*words, "--objective.leak_guard", "none") == 0
    asked = log.read_text().splitlines()
    assert r"\boxed{3}" in asked  # the gold answers first, then what was sampled
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["acc_student"] for line in lines] == [1.0, 1.0]


def _no_template(model):
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["chat_template"]
    file.write_text(json.dumps(settings))


def _foreign_tokenizer(model):
    text = (model / "tokenizer.json").read_text()
    text = text.replace("<think>", "<a>").replace("</think>", "</a>")
    (model / "tokenizer.json").write_text(text)


def _cut_weights(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _nan_weights(model):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def _no_norm(model):
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_no_template, "has no chat template"),
        (_foreign_tokenizer, "the model embeds 316 tokens"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors missing"),
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (_cut_weights, "damaged or cut"),
        (_nan_weights, "1 tensors hold NaN or Inf (model.norm.weight"),
        (_no_norm, "1 weights are missing"),
    ],
)
def test_a_bad_model_is_refused_in_one_line(
    command, spoil, said, train, refusal, tiny_world, tmp_path
):
    model = shutil.copytree(tiny_world.base_dir, tmp_path / "model")
    spoil(model)
    if command == "train":
        status = train("--model.path", model)
    else:
        out = ["--config", str(TINY), "--out", str(tmp_path / "out")]
        status = main(["eval", str(model), str(tiny_world.test_path), *out])
    assert said in refusal(status)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_directory_that_cannot_be_used(train, refusal, tmp_path):
    """A file stands for a read-only place: permissions do not bind the superuser of a container."""
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file; give a directory" in refusal(train(run_dir=file))
    assert "give a writable --run.dir" in refusal(train(run_dir=file / "run"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "a run is never overwritten" in refusal(train(run_dir=other))
    assert "is no run" in refusal(main(["train", "--resume", str(other)]))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "other", "thesis.txt"]


def test_the_same_command_starts_a_run_and_goes_on_with_it(train, refusal, tmp_path):
    """What a launcher repeats after a failure; the run's own configuration counts."""
    run = tmp_path / "run"

    def steps():
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    run.mkdir()
    (run / ".lock").touch()  # what a kill before the first step leaves
    assert train("--resume-if-started") == 0
    assert steps() == [1, 2]
    assert train("--resume-if-started") == 0  # it is done: nothing is added
    assert steps() == [1, 2]
    assert "a run is never overwritten" in refusal(train())
    assert train("--resume-if-started", "--train.steps", 3) == 0
    assert steps() == [1, 2, 3]


def test_a_checkpoint_is_exported_by_its_step(train, refusal, capsys, tmp_path):
    run = tmp_path / "run"
    assert train("--checkpoint.export", "false") == 0
    for more, said in (
        (["--step", "best"], "checkpoint.keep_best is null.* --step N (there are: 1, 2)"),
        (["--step", "9"], "step_9: there is none; the steps with a checkpoint: 1, 2"),
        (["--step", "first"], "--step: got 'first', expected a whole number"),
    ):
        capsys.readouterr()
        assert re.search(
            said.replace("(", r"\(").replace(")", r"\)"), refusal(main(["export", str(run), *more]))
        )
    assert main(["export", str(run), "--step", "1"]) == 0
    assert capsys.readouterr().out == f"{run / 'export_step_1'}\n"
    assert main(["export", str(run), "--out", str(tmp_path / "last")]) == 0
    weights = [p / "model.safetensors" for p in (run / "export_step_1", tmp_path / "last")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_a_stopped_run_is_no_failure_under_torchrun(monkeypatch):
    """Another status than 0 would make torchrun start a run that has just saved and stopped."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    endings = (Ending.DONE, Ending.HALTED, Ending.STOPPED)
    assert [*map(status, endings)] == [0, 3, 143]
    assert [*map(bool, endings)] == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert [*map(status, endings)] == [0, 0, 0]


def test_a_full_disk_ends_the_run_and_keeps_its_last_checkpoint(train, refusal, capsys, tmp_path):
    """A file-size limit refuses the writes of the third save, as a full disk would."""
    run = tmp_path / "run"
    assert train() == 0
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        status = main(["train", "--resume", str(run), "--train.steps", "3"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = refusal(status)
    assert "cannot save" in said
    assert f"--resume {run}" in said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_1", "step_2"]
    assert main(["train", "--resume", str(run), "--train.steps", "3"]) == 0
    saved = checkpoint.find_checkpoint(run, world=World(torch.device("cpu")))
    assert saved is not None
    assert saved.step == 3
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_eval_prints_a_table_and_writes_json(tiny_world, tmp_path, capsys):
    words = ["--eval.limit", "4", "--eval.samples", "2", "--config", str(TINY)]
    out = tmp_path / "out"
    files = [str(tiny_world.test_path), str(tiny_world.train_path)]
    command = ["eval", str(tiny_world.base_dir), *files, *words]
    assert main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["settings"]["eval"]["samples"] == 2
    assert result["settings"]["model"]["path"] == str(tiny_world.base_dir)
    assert result["environment"]["torch"]
    assert "test: 4 questions" in shown
    assert "student view only" in shown
    cells = [line.split() for line in shown.splitlines()]
    for mode, samples in (("sampled", 8), ("greedy", 4)):
        for name in ("test", "train"):
            part = result[mode]["benchmarks"][name]
            row = next(cell for cell in cells if cell[:2] == [name, mode])
            assert row[2:5] == ["4", str(samples), f"{100 * part['acc']:.1f}"]
            assert row[8] == f"{part['tokens']:.1f}"
        mean = next(cell for cell in cells if cell[:2] == ["mean", mode])
        means = [f"{result[mode][key]:.3g}" for key in ("eps3", "eps3_mean")]
        assert mean[9:11] == means
    # With records there is a table of what they tell beside that.
    assert main(command) == 0
    more = shown.removeprefix(capsys.readouterr().out)
    assert more.count("sampled") == more.count("greedy") == 2 < len(more) < len(shown)
    assert "maj@k %" in more
    assert more.endswith(f"{out / 'result.json'}\n")


def test_a_configuration_that_keeps_the_best_evaluates_and_measures_too(
    tiny_world, tmp_path, capsys, refusal
):
    """What keep_best asks of a run's own evaluations is nothing to other commands."""
    file = tmp_path / "recipe.yaml"
    sections = yaml.safe_load(TINY.read_text())
    sections["eval"] |= {"every": 5}
    sections["checkpoint"] |= {"keep_best": "sampled_acc"}
    file.write_text(yaml.safe_dump(sections))
    words = ["--config", str(file), "--eval.samples", "0", "--eval.limit", "2"]
    assert main(["eval", str(tiny_world.base_dir), str(tiny_world.test_path), *words]) == 0
    assert "greedy" in capsys.readouterr().out
    assert "data: got 'none'; expected one of" in refusal(
        main(["data", "none", "--config", str(file)])
    )


def test_report_draws_a_run(train, capsys, tmp_path):
    """Whether or not the run itself drew: its page then says how, and lists no figure."""
    assert train("--metrics.figure", "false") == 0
    page, figure = (tmp_path / "run" / name for name in ("report.html", "training.png"))
    assert "metrics.figure is false; `vpgea report`" in page.read_text()
    assert "<img" not in page.read_text()
    assert not figure.exists()
    assert "training.png" not in capsys.readouterr().out
    page.unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert str(page) in capsys.readouterr().out
    assert "<img" in page.read_text()
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_make_tiny_refuses_a_place_that_holds_no_directory_in_one_line(capsys):
    assert main(["make-tiny", "/dev/null/x"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("vpgea: cannot write the tiny world /dev/null/x: Not a directory; give")
    assert "\n" not in said
    assert "Errno" not in said


def test_make_tiny_says_what_it_made(tmp_path, capsys):
    assert main(["make-tiny", str(tmp_path / "tiny")]) == 0
    assert "P(concise thought): student view" in capsys.readouterr().out
    assert (tmp_path / "tiny/base/model.safetensors").is_file()


def test_the_program_is_one_process_away():
    command = [sys.executable, "-m", "vpgea_fast.cli", "train", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vpgea: cannot read the configuration none.yaml")


def test_files_of_a_mixture_have_keys_and_shares(train, tmp_path, capsys):
    """Two files with keys of their own, 3 to 1: each step of 4 takes three of one, one of other."""
    one = [
        {"question": f"{i} A-three", "answer": f"so it is {i} and no more\n#### {i}"}
        for i in range(6)
    ]
    two = [{"problem": f"{i} B+two", "final_answer": [str(i)]} for i in range(6)]
    for name, rows in (("one", one), ("two", two)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [
        {"path": f"{tmp_path}/one.jsonl", "weight": 3},
        {"path": f"{tmp_path}/two.jsonl", "weight": 1, "question_key": "problem",
         "answer_key": "final_answer"},
    ]  # fmt: skip
    more = ["--train.questions_per_step", 4, "--metrics.paths_per_step", 99]
    assert train("--data.train", json.dumps(files), *more) == 0
    shown = capsys.readouterr().out
    assert "12 questions, none dropped" in shown
    assert "one: 6 answers: what follows the last ####" in shown
    assert "questions a step: 3 of one, 1 of two" in shown
    paths = [json.loads(line) for line in (tmp_path / "run/paths.jsonl").read_text().splitlines()]
    for step in (1, 2):
        asked = {path["question_id"] for path in paths if path["step"] == step}
        assert sorted(name.split("/")[0] for name in asked) == ["one", "one", "one", "two"]
    again = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["train"]
    assert again == [{**files[0], "weight": 3.0}, {**files[1], "weight": 1.0}]


def test_a_dry_run_drops_what_the_run_drops_and_names_it(train, tmp_path, capsys):
    rows = [f'{{"question": "{i} A-three", "answer": "{i}"}}\n' for i in range(4)]
    bad = '{"question": "9 A+two", "answer": "\\\\frac{1}{"}\n'
    data = jsonl(tmp_path / "some.jsonl", *rows, bad, bad.replace("\\\\frac{1}{", ""))
    list_of_all = tmp_path / "dropped.jsonl"
    words = ["--data.train", data, "--data.dropped_file", list_of_all]
    written, said = [], []
    for more in (["--dry-run"], []):
        assert train(*words, *more) == 0
        shown = capsys.readouterr().out
        assert "4 questions, 1 dropped (answer not accepted), 1 dropped (empty answer)" in shown
        said.append([line for line in shown.splitlines() if line.startswith("dropped: ")])
        written.append(list_of_all.read_text())
        list_of_all.unlink()
    assert said[0] == said[1]
    assert said[0][0] == f"dropped: {data}, line 5 ('row-5'): answer not accepted '\\\\frac{{1}}{{'"
    assert written[0] == written[1]
    assert [json.loads(line)["id"] for line in written[0].splitlines()] == ["row-5", "row-6"]


def test_one_evaluation_of_files_with_keys_of_their_own(tiny_world, tmp_path, capsys):
    rows = [json.loads(line) for line in tiny_world.test_path.read_text().splitlines()[:2]]
    other = [{"problem": row["question"], "answer": row["answer"]} for row in rows]
    file = tmp_path / "other.json"
    file.write_text(json.dumps(other))
    entry = json.dumps({"path": str(file), "question_key": "problem", "name": "array"})
    out = tmp_path / "out"
    words = ["--config", TINY, "--eval.limit", 2, "--eval.samples", 0, "--out", out]
    base, test = tiny_world.base_dir, tiny_world.test_path
    assert main(["eval", *map(str, [base, test, entry, *words])]) == 0
    found = json.loads((out / "result.json").read_text())
    parts = found["greedy"]["benchmarks"]
    assert set(parts) == {"test", "array"}
    assert parts["test"] == parts["array"]
    assert found["settings"]["eval"]["data"][1] == json.loads(entry)
    assert "array: 2 questions" in capsys.readouterr().out


def test_raw_gsm8k_is_trained_on_its_numbers(train, tmp_path, random_qwen2, capsys):
    """As published, with a byte-level tokenizer of R1's shape and a random model, whose thoughts
    of 400 tokens close often enough for an update."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    model = random_qwen2(vocab=512, max_position_embeddings=2048)
    model.save_pretrained(tmp_path / "model")
    prompt = config.PromptConfig()
    words = [
        "--model.path",
        tmp_path / "model",
        "--data.train",
        ROOT / "tests/cases/gsm8k_raw.jsonl",
    ]
    words += ["--data.max_prompt_tokens", 1024, "--rollout.max_new_tokens", 400]
    words += ["--train.micro_batch_tokens", 4096, "--train.steps", 1]
    words += ["--objective.reward", "paper", "--objective.std_gate", 0]
    words += ["--objective.clamp_u", "false", "--objective.baseline", "mean"]
    for key in ("student", "teacher", "answer_cue", "answer_target", "think_prefix"):
        words += [f"--prompt.{key}", getattr(prompt, key)]
    assert train(*words, "--dry-run") == 0
    shown = capsys.readouterr().out
    teacher = shown.partition("teacher prompt:")[2].partition("\n\n")[0]
    assert "The reference answer to this problem is: 72." in teacher
    assert "4 answers: what follows the last ####" in shown
    assert "scored answer '{72}'" in shown
    assert "<<" not in shown
    assert train(*words) == 0
    [record] = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert record["skipped"] == 0
    assert record["grad_norm"] > 0
    assert "<<" not in capsys.readouterr().out

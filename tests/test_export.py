"""An export is a Hugging Face directory, whole or not there."""

import json
import resource
from pathlib import Path

import pytest
import torch
from saving import (
    ALONE,
    tiny_model,
    tiny_tokenizer,
)

from vpgea_fast.checkpoint import (
    CheckpointError,
    export_model,
)
from vpgea_fast.cli import main
from vpgea_fast.config import load
from vpgea_fast.distributed import full_weights
from vpgea_fast.estimate import communication, estimate_memory, model_shape
from vpgea_fast.run_dir import EXPORTS
from vpgea_fast.trainer import Trainer
from vpgea_fast.weights import load_config

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_export_loads_in_transformers_with_equal_logits(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run" / "export"
    tokenizer = tiny_tokenizer()
    export_model(tiny_model(tied=not tied), tokenizer, out, world=ALONE)
    model = tiny_model(tied=tied, seed=1).eval()
    model.generation_config.do_sample, model.generation_config.top_k = True, 7
    with pytest.raises(CheckpointError, match="not empty"):
        export_model(model, tokenizer, out, world=ALONE)
    export_model(model, tokenizer, out, world=ALONE, replace=True)
    assert [path.name for path in out.parent.iterdir()] == ["export"]
    assert {oct(path.stat().st_mode) for path in out.iterdir()} == {
        oct((out / "config.json").stat().st_mode)
    }
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    assert again.dtype == torch.float32
    assert again.generation_config.top_k == 7
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_an_export_in_another_dtype_and_in_pieces(tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = tiny_model(tied=False)
    export_model(
        model,
        tiny_tokenizer(),
        tmp_path / "a",
        world=ALONE,
        dtype=torch.bfloat16,
        max_shard_size="4KB",
    )
    assert model.dtype == torch.float32
    assert model.config.dtype != "bfloat16"
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    for name, file in index["weight_map"].items():
        assert (tmp_path / "a" / file).stat().st_size < 6_000
        with safe_open(tmp_path / "a" / file, "pt") as tensors:
            assert torch.equal(tensors.get_tensor(name), model.state_dict()[name].bfloat16())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto").dtype == torch.bfloat16
    )
    model.model.norm.weight.data[2] = 7e4  # more than float16 can hold
    with pytest.raises(CheckpointError, match=r"norm.weight holds NaN or infinity"):
        export_model(model, tiny_tokenizer(), tmp_path / "b", world=ALONE, dtype=torch.float16)


def test_an_export_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "export"
    model, tokenizer = tiny_model(tied=True), tiny_tokenizer()
    export_model(model, tokenizer, out, world=ALONE)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN"):
        export_model(model, tokenizer, out, world=ALONE, replace=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write the export"):
            export_model(tiny_model(tied=True), tokenizer, out, world=ALONE, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# --- two policies ------------------------------------------------------------------------------


@pytest.fixture
def two(tiny_words):
    """Words of a small run of two policies, or of one with `share_params true`."""
    settings = {
        "objective": "vr",
        "objective.group_size": 3,
        "objective.prior_samples": 3,
        "objective.norm": "seq_mean",
        "scoring.answer_samples": 2,
        "rollout.max_new_tokens": 72,
        "train.questions_per_step": 2,
        "train.steps": 2,
        "metrics.diag_every": 0,
        "metrics.compare": "null",
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
    }
    return tiny_words(settings)


def tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_both_policies_are_exported_each_with_its_own_weights(two, tmp_path, capsys):
    run = tmp_path / "run"
    cfg = load(TINY, two("run", "--objective.share_params", "false"))
    with Trainer(cfg) as trainer:
        while not trainer.over:
            trainer.finish_step(trainer.train_step())
        trainer.finish_run()
        expected = {
            who: {name: weight.clone() for name, weight in full_weights(learner.policy)}
            for who, learner in trainer.stages.policies.learners.items()
        }
    found = {who: tensors_of(run / name) for who, name in EXPORTS.items()}
    for who, weights in expected.items():
        assert weights.keys() == found[who].keys()
        assert all(torch.equal(weights[name], found[who][name]) for name in weights)
    pairs = [(found["policy"][name], found["posterior"][name]) for name in expected["policy"]]
    assert not all(torch.equal(a, b) for a, b in pairs)
    for who, name in EXPORTS.items():
        assert main(["export", str(run), "--who", who]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(run / f"{name}_step_2")
        again = tensors_of(run / f"{name}_step_2")
        assert all(torch.equal(again[key], value) for key, value in found[who].items())


def test_a_run_of_one_policy_has_no_other_to_export(two, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(TINY), *two("run", "--train.steps", "1")]) == 0
    assert not (run / "export_posterior").exists()
    capsys.readouterr()
    assert main(["export", str(run), "--who", "posterior"]) == 2
    assert "holds one policy and no posterior policy" in capsys.readouterr().err
    assert not list(run.glob("export_posterior*"))


def test_the_dry_run_counts_both_policies(two, capsys, tiny_world):
    """Against the bytes of the weights themselves, and twice those of one policy."""
    weights = tensors_of(Path(tiny_world.base_dir)).values()
    bytes_of = sum(weight.nbytes for weight in weights) / 2**30
    sizes = {}
    for shared in ("true", "false"):
        words = two("run", "--objective.share_params", shared, "--parallel.shard", "never")
        assert main(["train", str(TINY), *words, "--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert ("of two models of this size" in shown) == (shared == "false")
        for line in shown.splitlines():
            part = line[2:19].strip()
            if part in ("weights", "gradients", "optimiser"):
                sizes[shared, part] = max(map(float, line[19:].split()))
    for part, times in (("weights", 1), ("gradients", 1), ("optimiser", 2)):
        assert sizes["true", part] == pytest.approx(times * bytes_of, abs=6e-4)
        assert sizes["false", part] == pytest.approx(2 * times * bytes_of, abs=6e-4)


def test_host_memory_and_traffic_of_two_policies_by_hand(two):
    """Sharded over two processes, with offload, and the hand-overs of a step."""
    words = two("run", "--model.dtype", "bfloat16", "--parallel.cpu_offload", "true")
    one, both = (
        load(TINY, [*words, "--objective.share_params", shared]) for shared in ("true", "false")
    )
    shape = model_shape(load_config(one.model.path))
    alone, beside = (
        estimate_memory(shape, cfg, world=2, context=100, prompt=20).host for cfg in (one, both)
    )
    assert {part: 2 * size for part, size in alone.items()} == dict(beside)
    a, b = (communication(shape, cfg, world=2, micro_batches=4) for cfg in (one, both))
    assert b["replica refresh"].total == 3 * a["replica refresh"].total
    assert b["reduce-scatter"].total >= a["reduce-scatter"].total

"""An export is a Hugging Face directory, whole or not there."""

import json
import resource

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

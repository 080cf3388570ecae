"""The policy and its loading: what is trained, what is refused, what the optimiser may touch."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from vpgea_fast import attention
from vpgea_fast.config import ModelConfig, ParallelConfig
from vpgea_fast.distributed import open_world
from vpgea_fast.model import ModelError, Policy, check_model_dir, load_policy, random_policy
from vpgea_fast.packing import pack_rows
from vpgea_fast.types import TrainRow

CPU = {"device": "cpu", "activation_checkpointing": "none"}


@pytest.fixture
def model_dir(random_qwen2, tmp_path):
    random_qwen2().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def one_batch():
    return pack_rows(
        [
            TrainRow(
                torch.tensor([3, 4]), torch.tensor([5, 6, 7]), -torch.ones(3), "prior", "student"
            )
        ]
    )


def test_bfloat16_forward_keeps_float32_parameters_and_gradients(model_dir):
    policy = load_policy(ModelConfig(path=str(model_dir), dtype="bfloat16", **CPU))
    exact = load_policy(ModelConfig(path=str(model_dir), dtype="float32", **CPU))
    out, want = policy(one_batch()), exact(one_batch())
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert (
        {p.dtype for p in policy.parameters()}
        == {p.grad.dtype for p in policy.parameters()}
        == {torch.float32}
    )
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=0.05)
    assert out.loss.item() != want.loss.item()


def test_temperature_divides_the_logits(model_dir):
    policy = load_policy(ModelConfig(path=str(model_dir), dtype="float64", **CPU))
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([[3, 4, 5, 6]]), use_cache=False).logits[0, 1:]
    want = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor([[5], [6], [7]]))[:, 0]
    assert torch.allclose(policy.logprob(one_batch(), temperature=0.7), want, atol=1e-6)
    assert torch.equal(
        policy(one_batch(), temperature=0.7).logp, policy.logprob(one_batch(), temperature=0.7)
    )


def test_scoring_builds_no_graph_and_moves_nothing(model_dir):
    policy = load_policy(ModelConfig(path=str(model_dir), dtype="float32", **CPU))
    before = {name: p.clone() for name, p in policy.named_parameters()}
    assert not policy.logprob(one_batch()).requires_grad
    assert all(
        p.grad is None and torch.equal(p, before[name]) for name, p in policy.named_parameters()
    )


def rewrite(model_dir, change):
    weights = load_file(model_dir / "model.safetensors")
    change(weights)
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})


def damage_nan(directory):
    rewrite(directory, lambda w: w["model.norm.weight"].fill_(math.nan))


def damage_missing_tensor(directory):
    rewrite(directory, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))


def damage_truncated(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_no_weights(directory):
    (directory / "model.safetensors").unlink()


def damage_no_config(directory):
    (directory / "config.json").unlink()


def damage_index(directory):
    (directory / "model.safetensors.index.json").write_text('{"metadata":')


def damage_empty_index(directory):
    (directory / "model.safetensors.index.json").write_text("{}")


def damage_config(directory):
    (directory / "config.json").write_text("[]")


def damage_missing_shard(directory):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nan, "1 tensors hold NaN or Inf .*model.norm.weight"),
        (damage_missing_tensor, "1 weights of .* are in no file .*layers.1.mlp.up_proj"),
        (damage_truncated, "a weight file is damaged or cut"),
        (damage_no_weights, "is incomplete: model.safetensors missing"),
        (damage_no_config, "has no config.json"),
        (damage_index, "index.json is damaged .*copy the model again"),
        (damage_empty_index, "names no weight files"),
        (damage_config, "config.json is damaged"),
        (damage_missing_shard, "is incomplete: model-00001-of-00002.safetensors missing"),
    ],
)
def test_a_damaged_directory_is_refused(model_dir, damage, message):
    damage(model_dir)
    with pytest.raises(ModelError, match=message):
        load_policy(ModelConfig(path=str(model_dir), dtype="float32", **CPU))


def test_no_such_directory():
    with pytest.raises(ModelError, match="no model directory at"):
        check_model_dir("./nowhere/model")


def test_half_precision_head_accumulates_its_gradient_in_float32(random_qwen2):
    """256 micro-batches of bfloat16: without the float32 sink each dW is rounded to 8 bits."""
    model = random_qwen2(attn_implementation=attention.register(), tie_word_embeddings=False)
    policy = Policy(model, dtype=torch.bfloat16)
    policy(one_batch()).loss.backward()
    once = model.lm_head.weight.grad.clone()
    for _ in range(255):
        policy(one_batch()).loss.backward()
    assert once.dtype == torch.float32
    assert not torch.equal(once, once.bfloat16().float())
    assert torch.allclose(model.lm_head.weight.grad, 256 * once, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_random_weights_need_a_configuration_alone(random_qwen2, tied, sharded):
    config = random_qwen2(vocab=503, tie_word_embeddings=tied).config
    world = open_world(ParallelConfig(shard="always" if sharded else "never"), "cpu")
    try:
        policy = random_policy(config, ModelConfig(dtype="float32", **CPU), world)
        assert policy.sharded == sharded
        embedding = policy.causal_lm.get_input_embeddings()
        assert (policy.head.weight is embedding.weight) == policy.tied == tied
        for name, parameter in policy.causal_lm.named_parameters():
            value = parameter.to_local() if sharded else parameter
            if parameter.ndim > 1:
                assert value.std().item() == pytest.approx(config.initializer_range, rel=0.1)
            else:
                assert bool((value == (1.0 if "norm" in name else 0.0)).all())
        out = policy(one_batch())
        out.loss.backward()
        assert torch.isfinite(out.logp).all()
        assert config._attn_implementation != attention.NAMES["sdpa"], "the caller's is its own"
        del out, policy, embedding, parameter, value
    finally:
        world.close()


@pytest.mark.gpu
def test_liger_layers_compute_the_same(model_dir):
    pytest.importorskip("liger_kernel")
    plain, fused = (
        load_policy(ModelConfig(path=str(model_dir), dtype="bfloat16", device="cuda", liger=choice))
        for choice in ("never", "always")
    )
    first, second = (policy.causal_lm.model.layers[0].mlp for policy in (plain, fused))
    assert first.forward.__func__ is not second.forward.__func__
    assert torch.allclose(plain.logprob(one_batch()), fused.logprob(one_batch()), atol=0.05)
    for policy in (plain, fused):
        policy(one_batch()).loss.backward()
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()]).item()
        for policy in (plain, fused)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)

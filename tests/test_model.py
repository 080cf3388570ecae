"""The policy and its loading: what is trained, what is refused, what the optimiser may touch."""

import hashlib
import json
import math
import shutil
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from vpgea_fast import attention
from vpgea_fast.checkpoint import export_model
from vpgea_fast.config import ConfigError, ModelConfig, ParallelConfig, printable
from vpgea_fast.distributed import World, full_weights, open_world, pick_device
from vpgea_fast.model import Policy, load_policy, random_policy
from vpgea_fast.model_dir import ModelError, check_model_dir
from vpgea_fast.packing import pack_rows
from vpgea_fast.types import TrainRow
from vpgea_fast.weights import load_causal_lm, load_config, stored_model

ALONE = World(torch.device("cpu"))
CPU = {"device": "cpu", "activation_checkpointing": "none"}


@pytest.fixture
def model_dir(random_qwen2, tmp_path):
    random_qwen2().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def one_batch():
    return pack_rows(
        [
            TrainRow(
                context_ids=torch.tensor([3, 4]),
                token_ids=torch.tensor([5, 6, 7]),
                coef=-torch.ones(3),
                stream="prior",
                view="student",
            )
        ]
    )


def test_bfloat16_forward_has_float32_masters_and_gradients(model_dir):
    policy = load_policy(ModelConfig(path=str(model_dir), dtype="bfloat16", **CPU))
    exact = load_policy(ModelConfig(path=str(model_dir), dtype="float32", **CPU))
    out, want = policy(one_batch()), exact(one_batch())
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.masters is not None
    for weight, master in policy.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(weight, master.bfloat16())
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=0.05)
    assert out.loss.item() != want.loss.item()


@pytest.mark.parametrize("shard", ["auto", "always"])
def test_an_embedding_of_half_precision_has_the_gradient_of_all_its_tokens(
    random_qwen2, tmp_path, shard
):
    """Of one token 2,000 times: in bfloat16 a sum of its gradients takes no more at some point."""
    path = str(tmp_path / "model")
    random_qwen2(vocab=97, tie_word_embeddings=False).save_pretrained(path)
    (found,) = run_ranks(gradients_of_one_token, path, shard, size=1)
    exact, half = torch.tensor(found)
    assert (half - exact).norm() < 0.05 * exact.norm()


def gradients_of_one_token(path, shard):
    """The embedding's, of a forward in float32 and of one in bfloat16."""
    parallel = ParallelConfig(shard=shard, accumulate="unsharded")
    world, ids = open_world(parallel, "cpu"), torch.full((500,), 5)
    parts = {"context_ids": ids[:1], "token_ids": ids[1:], "coef": torch.ones(499)}
    rows = [TrainRow(**parts, stream="prior", view="student")] * 4
    found = []
    for dtype in ("float32", "bfloat16"):
        policy = load_policy(ModelConfig(path=path, dtype=dtype, **CPU), world, parallel)
        policy.expect_backward(last=True)
        policy(pack_rows(rows)).loss.backward()
        gradient = policy.causal_lm.get_input_embeddings().weight.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found.append(whole[5].tolist())
    return found


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
        (damage_missing_tensor, "1 weights are missing .*layers.1.mlp.up_proj"),
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


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def test_no_such_directory():
    with pytest.raises(ModelError, match="no model directory at"):
        check_model_dir("./nowhere/model")


def test_half_precision_head_accumulates_its_gradient_in_float32(random_qwen2):
    """256 micro-batches of bfloat16: without the float32 sink each dW is rounded to 8 bits."""
    model = random_qwen2(attn_implementation=attention.register(), tie_word_embeddings=False)
    policy = Policy(model.bfloat16(), dtype=torch.bfloat16)
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


# --- one meaning of the weight files --------------------------------------------------------------


def to_shards(directory, parts=("a.safetensors", "b.safetensors")):
    """The weights in two files with an index; (weight_map, its file)."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {name: parts[place % 2] for place, name in enumerate(names)}
    for part in parts:
        (directory / part).parent.mkdir(parents=True, exist_ok=True)
        save_file({n: weights[n] for n in names if weight_map[n] == part}, directory / part)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory, weight_map):
    content = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def config_of(directory, **change):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def as_it_is(directory):
    """A valid directory."""


def hub_cache(directory):
    """The snapshot of a Hub cache: every file is a link to ../../blobs."""
    blobs = directory.parents[1] / "blobs"
    blobs.mkdir()
    to_shards(directory)
    for file in list(directory.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")


def only_the_head(directory):
    """What safetensors' save_model keeps of a tie: the first name."""
    rewrite(directory, lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")}))


def both_of_a_tie(directory):
    rewrite(
        directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    )


def without_prefix(directory):
    """A base model that was saved alone; its head is the embedding."""

    def change(weights):
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    rewrite(directory, change)


def other_dtypes(directory):
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.float32]
    rewrite(
        directory,
        lambda w: w.update({n: w[n].to(dtypes[i % 4]) for i, n in enumerate(sorted(w))}),
    )


def old_buffer(directory):
    rewrite(
        directory,
        lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )


def untied(directory):
    rewrite(directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    config_of(directory, tie_word_embeddings=False)


GOOD = [as_it_is, to_shards, hub_cache, only_the_head, both_of_a_tie, without_prefix]
GOOD += [other_dtypes, old_buffer, untied]


def digest(named):
    """Name -> hash of the float32 bits. Of a copy: numpy would hold the storage that FSDP frees."""
    return {
        name: hashlib.sha256(
            value.detach().to(torch.float32, copy=True).numpy().tobytes()
        ).hexdigest()
        for name, value in named
    }


def digests(paths):
    """What every path reads in this world; the words of what is refused."""
    world, found = open_world(ParallelConfig(), "cpu"), []
    for path in paths:
        try:
            policy = load_policy(ModelConfig(path=path, dtype="float32", **CPU), world)
            found.append(digest(full_weights(policy)))
            del policy
        except ModelError as error:
            found.append(str(error))
    world.close()
    return found


@pytest.fixture
def make_dirs(model_dir, tmp_path):
    def make(changes):
        made = []
        for change in changes:
            directory = tmp_path / change.__name__ / "snapshots" / "0"
            shutil.copytree(model_dir, directory)
            change(directory)
            made.append(str(directory))
        return made

    return make


def test_what_is_accepted_is_the_same_for_every_reader(make_dirs, model_dir):
    paths = make_dirs(GOOD)
    first, second = run_ranks(digests, paths)
    assert first == second
    plain = digest(load_file(model_dir / "model.safetensors").items())
    for path, sharded in zip(paths, first, strict=True):
        config = load_config(path)
        whole = load_causal_lm(path, torch.float32)
        _, given = stored_model(path, torch.float32)
        assert digest(whole.named_parameters()) == digest(given) == sharded, path
        head, embedding = whole.lm_head.weight, whole.model.embed_tokens.weight
        assert (head is embedding) == config.tie_word_embeddings
        if config.tie_word_embeddings and "other_dtypes" not in path:
            assert sharded == plain, path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_reads_back_as_the_model_that_it_was(make_dirs, r1_tokenizer, tmp_path, dtype):
    """Ties, dtype, generation_config; a file that was odd is an ordinary one then."""
    for path in make_dirs([only_the_head, without_prefix, untied]):
        policy = load_policy(ModelConfig(path=path, dtype=dtype, **CPU))
        policy.causal_lm.generation_config.max_new_tokens = 17
        out = str(
            export_model(policy, r1_tokenizer, tmp_path / "export", world=ALONE, replace=True)
        )
        stored = getattr(torch, dtype)
        back = load_causal_lm(out, stored)
        want = {name: p.to(stored) for name, p in policy.causal_lm.named_parameters()}
        _, given = stored_model(out, stored)
        given = dict(given)
        assert {value.dtype for value in given.values()} == {stored}
        assert digest(want.items()) == digest(given.items()) == digest(back.named_parameters())
        tied = back.lm_head.weight is back.model.embed_tokens.weight
        assert tied == policy.tied == load_config(out).tie_word_embeddings
        assert back.generation_config.max_new_tokens == 17


def missing_head(directory):
    config_of(directory, tie_word_embeddings=False)


def another_head(directory):
    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][7] += 1

    rewrite(directory, change)


def head_bias(directory):
    rewrite(directory, lambda w: w.update({"lm_head.bias": torch.ones(53)}))


def surplus_layer(directory):
    rewrite(
        directory,
        lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}),
    )


def misshapen(directory):
    rewrite(directory, lambda w: w.update({"model.norm.weight": torch.ones(31)}))


def fp8(directory):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(directory, lambda w: w.update({name: w[name].to(torch.float8_e4m3fn)}))


def int8(directory):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(directory, lambda w: w.update({name: w[name].to(torch.int8)}))


def twice_by_prefix(directory):
    rewrite(directory, lambda w: w.update({"norm.weight": torch.ones(32)}))


def outside(directory):
    to_shards(directory, ("../a.safetensors", "b.safetensors"))


def absolute(directory):
    weight_map = to_shards(directory)
    (directory / "a.safetensors").rename(directory.parent / "a.safetensors")
    elsewhere = {"a.safetensors": str(directory.parent / "a.safetensors")}
    write_index(directory, {n: elsewhere.get(f, f) for n, f in weight_map.items()})


def number_for_a_file(directory):
    write_index(directory, dict.fromkeys(to_shards(directory), 3))


def index_and_other_file(directory):
    single = (directory / "model.safetensors").read_bytes()
    to_shards(directory)
    (directory / "model.safetensors").write_bytes(single)


def wrong_index(directory):
    weight_map = to_shards(directory)
    write_index(directory, weight_map | {"model.norm.weight": "a.safetensors"})


def unlisted(directory):
    weight_map = to_shards(directory)
    write_index(directory, {n: f for n, f in weight_map.items() if n != "model.norm.weight"})


def twice_in_files(directory):
    weight_map = to_shards(directory)
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    file = directory / other[weight_map["model.norm.weight"]]
    save_file(load_file(file) | {"model.norm.weight": torch.ones(32)}, file)


def bin_only(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80")


def cut_header(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 20)


def empty_file(directory):
    (directory / "model.safetensors").write_bytes(b"")


BAD = [
    (missing_head, r"1 weights are missing \(lm_head.weight"),
    (another_head, r"model.safetensors: lm_head.weight differs from .*embed_tokens.* in row 7, "),
    (head_bias, "model.safetensors: lm_head.bias is no weight of the model in config.json"),
    (surplus_layer, "model.safetensors: model.layers.2.mlp.up_proj.weight is no weight"),
    (misshapen, r"model.safetensors: model.norm.weight is \(31,\), config.json says \(32,\)"),
    (fp8, "model.safetensors: model.layers.0.mlp.up_proj.weight is stored as F8_E4M3"),
    (int8, "model.safetensors: model.layers.0.mlp.up_proj.weight is stored as I8"),
    (twice_by_prefix, "norm.weight are both model.norm.weight|and norm.weight are both"),
    (outside, r"index.json: .* is in '../a.safetensors', expected the name"),
    (absolute, r"index.json: .* is in '/[^,]*, expected the name"),
    (number_for_a_file, r"index.json: .* is in 3, expected the name"),
    (index_and_other_file, "holds model.safetensors and model.safetensors.index.json, which names"),
    (wrong_index, "index.json: model.norm.weight is in b.safetensors, the index says a.safe"),
    (unlisted, "index.json: model.norm.weight is in b.safetensors, the index says None"),
    (twice_in_files, "b.safetensors: model.norm.weight is in a.safetensors, too"),
    (bin_only, r"is incomplete: model.safetensors missing.*pytorch_model.bin"),
    (cut_header, "model.safetensors: a weight file is damaged or cut"),
    (empty_file, "model.safetensors: a weight file is damaged or cut"),
]


def test_what_is_refused_is_refused_by_every_reader_in_the_same_words(make_dirs):
    paths = make_dirs([change for change, _ in BAD])
    first, second = run_ranks(digests, paths)
    assert first == second
    for path, (_, words), sharded in zip(paths, BAD, first, strict=True):
        for reader in (
            load_config,
            lambda path: load_causal_lm(path, torch.float32),
            lambda path: stored_model(path, torch.float32),
        ):
            with pytest.raises(ModelError, match=words) as refused:
                reader(path)
            assert str(refused.value) == sharded, path
        assert "\n" not in sharded


@pytest.mark.parametrize("name", ["toaster", "meta", "cuda:x", "mps", ""])
def test_a_device_that_is_none_names_its_key(name):
    with pytest.raises(ConfigError, match=r"^model.device: got .*, expected auto, cpu, cuda or"):
        pick_device(name)


# --- config.json ----------------------------------------------------------------------------------

BAD_CONFIGS = [
    ({"use_sliding_window": "x"}, "use_sliding_window"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', expected a whole number of 1..1000"),
    ({"num_hidden_layers": -1, "layer_types": None}, "num_hidden_layers is -1, expected"),
    ({"num_hidden_layers": 10**30, "layer_types": None}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number"),
    ({"num_attention_heads": 3}, "num_attention_heads 3 of 'qwen2' is no multiple of"),
    ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected a whole number of 1..100000000"),
    ({"vocab_size": 10**12}, "vocab_size is 1000000000000, expected"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, expected a number above 0"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0, expected"),
    ({"hidden_act": "\x1b[2J\nx"}, r"KeyError: '\\x1b\[2J\\nx'"),
    ({"model_type": "nonsense"}, "nonsense"),
    ({"model_type": "gptj"}, "the attention of 'gptj' does not go through"),
    ({"model_type": "bart"}, "'bart' is an encoder and a decoder"),
    ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "custom code"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq': quantised weights"),
    ({"initializer_range": math.inf}, "initializer_range is inf, expected a finite number"),
]


def test_what_config_json_cannot_say_is_one_line_that_names_it(model_dir):
    """Before a weight: none is as large as these say."""
    good = (model_dir / "config.json").read_text()
    for change, words in BAD_CONFIGS:
        (model_dir / "config.json").write_text(good)
        config_of(model_dir, **change)
        with pytest.raises(ModelError, match=words) as refused:
            load_config(str(model_dir))
        said = str(refused.value)
        assert str(model_dir) in said
        assert "config.json" in said
        assert printable(said) == said
        assert "\n" not in said
    (model_dir / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config.json: Unrecognized model"):
        load_config(str(model_dir))


def converted_facts(path):
    world = open_world(ParallelConfig(), "cpu")
    try:
        load_policy(ModelConfig(path=path, dtype="float32", **CPU), world)
    except ModelError as error:
        return str(error)
    finally:
        world.close()


def test_experts_are_read_whole_and_refused_in_shards_before_a_weight(tmp_path):
    """Mixtral's files hold a tensor for each expert, the model one for all of them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "vocab_size": 53,
        "num_hidden_layers": 1,
    }
    heads: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    model.save_pretrained(tmp_path)
    path = str(tmp_path)
    read = load_causal_lm(path, torch.float32)
    assert digest(read.named_parameters()) == digest(model.named_parameters())
    _, given = stored_model(path, torch.float32)
    assert set(dict(given)) == set(load_file(tmp_path / "model.safetensors"))
    for words in run_ranks(converted_facts, path):
        assert "experts" in words
        assert "set parallel.shard: never" in words
    rewrite(tmp_path, lambda w: w.pop(next(name for name in w if ".experts.1." in name)))
    with pytest.raises(ModelError, match="experts"):
        load_causal_lm(path, torch.float32)

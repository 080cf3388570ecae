"""Every family of models that is taken scores a row twice with the same bits, packed as alone, and
as the engine sampled it; every other is refused in words, before weights are read."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from vpgea_fast import families
from vpgea_fast.config import ConfigError, ModelConfig
from vpgea_fast.distributed import pick_device
from vpgea_fast.families import HeadOptions, measure
from vpgea_fast.model import Policy, load_policy
from vpgea_fast.model_dir import ModelError
from vpgea_fast.packing import pack_rows
from vpgea_fast.rollout.engine import Sampling
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.types import SampleRequest, TrainRow
from vpgea_fast.weights import load_config

CASES = Path(__file__).parent / "cases"
CPU = {"device": "cpu", "dtype": "float32", "activation_checkpointing": "none"}
TINY = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**TINY, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
MIXTURE = {**HEADS, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    **TINY,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
THETA = {"rope_theta": 10000.0}


def case(name):
    return json.loads((CASES / f"{name}.json").read_text())


TAKEN = {
    **dict.fromkeys(("qwen2", "llama", "granite", "olmo", "olmo2"), GROUPED),
    **dict.fromkeys(("qwen3", "mistral", "gemma", "arcee", "helium", "smollm3"), HEADS),
    **dict.fromkeys(("glm", "glm4", "seed_oss", "ernie4_5", "apertus", "exaone4"), HEADS),
    **dict.fromkeys(("phi", "phi3", "starcoder2", "cohere", "nanochat", "hyperclovax"), GROUPED),
    **dict.fromkeys(("gpt2", "gpt_neox", "persimmon", "biogpt", "jais2"), TINY),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "granitemoe"), MIXTURE),
    **{name: {**HEADS, "sliding_window": 6} for name in ("gemma2", "cohere2", "olmo3")},
    "gemma3_text": {**HEADS, "sliding_window": 6},
    "deepseek_v3": LATENT,
    "opt": {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "hunyuan_v1_dense": HEADS,
    "ministral": {**HEADS, "sliding_window": 6},
    "yarn": {**HEADS, "model_type": "qwen3", "rope_parameters": {**YARN, **THETA}},
    "llama3": {**HEADS, "model_type": "llama", "rope_parameters": {**LLAMA3, **THETA}},
    "linear": {
        **HEADS,
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA},
    },
    "mixtral routed": {**MIXTURE, "model_type": "mixtral", "output_router_logits": True},
    "granite scaled": {**GROUPED, "model_type": "granite", "logits_scaling": 8.0},
    "cohere scaled": {**GROUPED, "model_type": "cohere", "logit_scale": 0.25},
    "gemma2 capped": {**HEADS, "model_type": "gemma2", "final_logit_softcapping": 3.0},
    "gpt2 untied": {**TINY, "model_type": "gpt2", "tie_word_embeddings": False},
    **{name: case(name) for name in ("phi3_longrope", "qwen2_dynamic")},
}


def config_of(name):
    """The configuration, every rate of dropout, dropped layers and noise in it at 0.3."""
    settings = dict(TAKEN[name])
    kind = settings.pop("model_type", name)
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config = AutoConfig.for_model(kind, **settings)
    for key, value in config.to_dict().items():
        if ("drop" in key or "jitter" in key) and type(value) is float:
            setattr(config, key, 0.3)
    return config


def save(config, directory):
    """Weights that hide nothing: logits of a few nats, norms and biases that are not trivial."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter), alpha=scale)
        model.get_output_embeddings().weight.div_(measure(config).logit_scale)
    model.save_pretrained(directory)
    return str(directory)


def some_rows(vocabulary=67):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, vocabulary, (n,), generator=generator)  # noqa: E731
    sizes = [(3, 7), (1, 1), (9, 20), (2, 2)]
    return [
        TrainRow(
            context_ids=draw(c),
            token_ids=draw(t),
            coef=torch.randn(t, generator=generator),
            stream="prior",
            view="student",
        )
        for c, t in sizes
    ]


def alone(model, row):
    """The oracle: transformers' own model, eager attention, one row."""
    ids = torch.cat([row.context_ids, row.token_ids])
    with torch.no_grad():
        logits = model(ids[None, :-1], use_cache=False).logits[0, row.context_ids.numel() - 1 :]
    return logits.double().log_softmax(-1).gather(1, row.token_ids[:, None])[:, 0]


def sampled_rows(policy):
    """Paths that the engine drew from the policy behind prompts of several lengths."""
    contexts = [row.context_ids for row in some_rows()]
    paths = HFEngine(policy.causal_lm, max_batch=8).generate(
        [
            SampleRequest(question_id=f"q{i}", stream="prior", index=i, prompt_ids=ids, seed=i)
            for i, ids in enumerate(contexts)
        ],
        Sampling(max_new_tokens=12, think_close_id=66, eos_ids=(1,)),
    )
    return [
        TrainRow(
            context_ids=ids,
            token_ids=path.z_ids,
            coef=torch.ones(path.length),
            stream="prior",
            view="student",
            sample_logps=path.logps,
        )
        for ids, path in zip(contexts, paths, strict=True)
    ]


@pytest.mark.parametrize("name", list(TAKEN))
def test_a_family_scores_what_its_own_model_and_the_engine_compute(name, tmp_path):
    path = save(config_of(name), tmp_path)
    policy = load_policy(ModelConfig(path=path, **CPU))
    assert policy.causal_lm.training
    rows = some_rows()
    batch = pack_rows(rows)
    first, second = policy(batch, train=True).logp.detach(), policy.logprob(batch)
    assert torch.equal(first, second)
    assert torch.equal(first, policy.logprob(batch))
    own = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    wanted = torch.cat([alone(own, row) for row in rows])
    assert wanted.std() > 0.3
    assert (first - wanted).abs().max() <= 1e-5
    drawn = sampled_rows(policy)
    scored = policy.logprob(pack_rows(drawn))
    assert (scored - torch.cat([row.sample_logps for row in drawn])).abs().max() <= 2e-5


@pytest.mark.parametrize("name", list(TAKEN))
def test_a_family_trains_in_bfloat16_as_in_float32(name, tmp_path):
    """Nothing casts between its modules: each takes what the one before gives."""
    path, found = save(config_of(name), tmp_path), []
    for dtype in ("float32", "bfloat16"):
        policy = load_policy(ModelConfig(path=path, **CPU | {"dtype": dtype}))
        out = policy(pack_rows(some_rows()))
        out.loss.backward()
        found.append((out.logp.detach(), {n: p.grad for n, p in policy.named_parameters()}))
    (logp, gradients), (half, narrow) = found
    assert (half - logp).abs().mean() < 0.05
    # The bias of a key has none: what is there is rounding.
    least = 0.01 * torch.stack([g.norm() for g in gradients.values()]).norm()
    for key, gradient in gradients.items():
        assert (narrow[key] - gradient).norm() < 0.3 * gradient.norm() + least, key


HEAD_OPTIONS = {
    "granite scaled": HeadOptions(1 / 8.0),
    "cohere scaled": HeadOptions(0.25),
    "gemma2 capped": HeadOptions(1.0, 3.0),
    "qwen2": HeadOptions(),
}


@pytest.mark.parametrize("name", list(HEAD_OPTIONS))
def test_the_head_is_measured_and_exact(name):
    assert measure(config_of(name)) == HEAD_OPTIONS[name]


def test_a_scale_that_no_key_explains_is_refused():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(9, 67, generator=generator)
    config = config_of("qwen2")
    assert families.fit_head(raw, raw, config, "qwen2") == HeadOptions()
    with pytest.raises(ValueError, match="the logits of 'qwen2' are not those of its head"):
        families.fit_head(raw, raw * 0.77, config, "qwen2")
    with pytest.raises(ValueError, match="the logits of 'qwen2' are not those of its head"):
        families.fit_head(raw, raw + 0.01 * raw**2, config, "qwen2")


REFUSED = {
    **{name: {} for name in ("falcon", "gptj", "gpt_neo", "mpt", "bloom", "codegen", "xglm")},
    **{name: {} for name in ("rwkv", "mamba", "mamba2", "jamba", "bamba", "recurrent_gemma")},
    **{name: {} for name in ("gemma3", "llama4", "llama4_text", "qwen3_5", "phi4_multimodal")},
    **{name: {} for name in ("bart", "marian", "bert", "roberta", "stablelm", "gpt_oss")},
    **{name: {} for name in ("minicpm3", "gemma3n_text", "xlnet", "dbrx")},
}
SAID = {
    **dict.fromkeys(("falcon", "gptj", "gpt_neo", "mpt", "bloom", "codegen", "xglm"), "interface"),
    **dict.fromkeys(("bart", "marian"), "is an encoder and a decoder"),
    **dict.fromkeys(("gemma3", "llama4", "qwen3_5", "phi4_multimodal"), "more than text"),
    "dbrx": "makes no model",
    **dict.fromkeys(("bert", "roberta", "minicpm3"), "are not those of its head"),
    "stablelm": "do not hand `documents` down",
    "gpt_oss": "passes s_aux",
    "llama4_text": "layers of type chunked_attention",
    "gemma3n_text": "share keys",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_families_are_refused_in_words_before_weights_are_read(name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    config = AutoConfig.for_model(name)
    with pytest.raises(ValueError, match=SAID.get(name, "take another|take a model")) as caught:
        measure(config)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.path: ")
    assert name == "dbrx" or "take a" in str(caught.value)


@pytest.mark.parametrize("name", ["phi3_longrope", "qwen2_dynamic"])
def test_rows_beyond_the_length_of_constant_frequencies_are_refused(name, tmp_path):
    """Both have 32 positions on which nothing behind a token moves it."""
    policy = load_policy(ModelConfig(path=save(config_of(name), tmp_path), **CPU))
    ids = torch.arange(3, 36)
    long = TrainRow(
        context_ids=ids[:1], token_ids=ids[1:], coef=torch.ones(32), stream="prior", view="student"
    )
    short = TrainRow(
        context_ids=ids[:1], token_ids=ids[1:9], coef=torch.ones(8), stream="prior", view="student"
    )
    together = policy.logprob(pack_rows([short, long]))
    assert torch.equal(together[:8], policy.logprob(pack_rows([short])))
    longer = TrainRow(
        context_ids=ids[:2],
        token_ids=torch.arange(3, 35),
        coef=torch.ones(32),
        stream="prior",
        view="student",
    )
    with pytest.raises(ModelError, match=r"a row has 33 tokens, but the model has 32 positions"):
        policy.logprob(pack_rows([longer]))
    engine = HFEngine(policy.causal_lm, max_batch=4)
    request = SampleRequest(question_id="q", stream="prior", index=0, prompt_ids=ids[:20], seed=0)
    with pytest.raises(ValueError, match=r"need 33 positions, but the model has 32 \((orig|max_p)"):
        engine.generate([request], Sampling(max_new_tokens=13, think_close_id=66, eos_ids=(1,)))


def test_a_frequency_that_depends_on_the_length_unsaid_is_found(monkeypatch):
    """Longrope without the bound that refuses longer rows."""
    config = config_of("phi3_longrope")
    monkeypatch.setattr(families.attention, "positions", lambda _config: (256, "nothing"))
    with pytest.raises(ValueError, match="other logits with a token at position 255 behind it"):
        families._measured(config)


def test_randomness_that_no_key_names_is_found(monkeypatch):
    monkeypatch.setattr(families, "remove_randomness", lambda _model: None)
    monkeypatch.setattr(families, "without_randomness", lambda config: config)
    with pytest.raises(ValueError, match="'gpt2' scores the same row twice with a difference"):
        families._measured(config_of("gpt2"))


def test_a_wrong_shape_behind_converted_names_is_told_by_name(tmp_path):
    """Mixtral stores experts apart and holds them together: only the loading sees their shape."""
    path = save(config_of("mixtral"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    with pytest.raises(ModelError, match=r"weights are mismatched \(.*experts"):
        load_policy(ModelConfig(path=path, **CPU))


def test_a_policy_of_a_model_with_dropout_loses_it():
    config = config_of("seed_oss")
    assert config.residual_dropout == 0.3
    policy = Policy(AutoModelForCausalLM.from_config(config))
    rates = [m.p for m in policy.modules() if isinstance(m, torch.nn.Dropout)]
    assert policy.causal_lm.config.residual_dropout == 0.0
    assert not any(rates)


MODEL_TEXT = {"model_type": "qwen2", **GROUPED}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "config.json"),
        ({"model_type": "no_such"}, "config.json.*no_such"),
        (
            {"model_type": "no_such", "auto_map": {"AutoConfig": "code.Config"}},
            "config.json",
        ),
        ({**MODEL_TEXT, "num_hidden_layers": "2"}, "num_hidden_layers"),
        ({**MODEL_TEXT, "num_hidden_layers": -1}, "num_hidden_layers.*-1"),
        ({**MODEL_TEXT, "num_hidden_layers": 0}, "num_hidden_layers.*0"),
        ({**MODEL_TEXT, "num_hidden_layers": None}, "num_hidden_layers"),
        ({**MODEL_TEXT, "num_attention_heads": 5}, "multiple of"),
        ({**MODEL_TEXT, "hidden_size": 2.5}, "hidden_size"),
        ({**MODEL_TEXT, "vocab_size": None}, "vocab_size"),
        ({**MODEL_TEXT, "rope_parameters": [1]}, "config.json"),
        ({**MODEL_TEXT, "rope_parameters": {"rope_type": "nothing", **THETA}}, "nothing"),
        ({**MODEL_TEXT, "layer_types": ["full_attention"]}, "layer"),
        ({**MODEL_TEXT, "hidden_act": "no_such"}, "no_such"),
        ({**MODEL_TEXT, "quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_one_line(text, message, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=message) as caught:
        measure(load_config(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["toaster", "meta", "cuda:x", ""])
def test_a_device_that_is_none_names_its_key(name):
    with pytest.raises(ConfigError, match=r"model\.device: got"):
        pick_device(name)

"""Activation checkpointing: what the backward makes again, by name, on many families."""

import importlib.machinery
import logging
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from vpgea_fast.activations import checkpoint_activations, kept_products, kept_width
from vpgea_fast.config import ModelConfig
from vpgea_fast.model import _use_liger

SIZES = dict(
    zip(
        "hidden_size num_hidden_layers intermediate_size vocab_size num_attention_heads "
        "num_key_value_heads pad_token_id bos_token_id eos_token_id".split(),
        (32, 2, 48, 61, 4, 2, 0, 1, 2),
        strict=True,
    )
)
SEPARATE = {"q_proj", "k_proj", "v_proj", "gate_proj"}
FAMILIES = {
    # model_type -> (what selective keeps, what it makes again)
    "qwen2": (SEPARATE, {"o_proj", "up_proj"}),
    "qwen3": (SEPARATE, {"o_proj", "up_proj"}),
    "llama": (SEPARATE, {"o_proj", "up_proj"}),
    "gemma2": (SEPARATE, {"o_proj", "up_proj", "down_proj"}),  # a norm follows its down_proj
    "phi3": ({"qkv_proj", "gate_up_proj"}, {"o_proj"}),
    "gpt_neox": ({"query_key_value", "dense_h_to_4h"}, {"dense"}),
    "starcoder2": ({"q_proj", "k_proj", "v_proj", "c_fc"}, {"o_proj"}),
}


def causal_lm(family, **more):
    config = AutoConfig.for_model(family, **SIZES, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return model.eval().train()


class Products(TorchDispatchMode):
    """Which modules' matrix products, and how many attentions, really run, and in which phase."""

    def __init__(self, model):
        super().__init__()
        self.backward, self.running, self.made = False, "", []
        for name, module in model.named_modules():
            if not list(module.children()) and getattr(module, "weight", None) is not None:
                module.register_forward_pre_hook(lambda *_, n=name: setattr(self, "running", n))
                leave = lambda *_: setattr(self, "running", "")  # noqa: E731
                module.register_forward_hook(leave, always_call=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        name = str(func)
        if self.backward and name.startswith(("aten.mm", "aten.addmm")) and self.running:
            self.made.append(self.running.rpartition(".")[2])
        if self.backward and "attention" in name and "backward" not in name:
            self.made.append("attention")
        return func(*args, **(kwargs or {}))


def gradients(family, grade):
    """Of a loss of two rows; and what the backward made again."""
    model = causal_lm(family)
    checkpoint_activations(model, grade)
    products = Products(model.base_model)
    with products:
        ids = torch.arange(1, 41).view(2, 20) % 61
        loss = model(ids, use_cache=False).logits.square().mean()
        products.backward = True
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, products.made


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_makes_again_only_what_it_does_not_keep(family):
    kept, again = FAMILIES[family]
    exact, nothing = gradients(family, "none")
    found, made = gradients(family, "selective")
    whole, all_made = gradients(family, "full")
    assert nothing == []
    assert set(made) == again
    assert len(made) == 2 * len(again)  # one of each of the two layers
    assert {"attention", *kept, *again} == set(all_made)
    for name, gradient in exact.items():
        assert torch.equal(found[name], gradient), name
        assert torch.equal(whole[name], gradient), name
    names = kept_products(causal_lm(family))
    assert {n.rpartition(".")[2] for n in names} == kept
    layer = causal_lm(family).base_model.layers[0]
    weights = {n.split(".")[-2]: p for n, p in layer.named_parameters() if n.endswith("weight")}
    assert kept_width(layer) == sum(weights[name].shape[0] for name in kept)


def test_a_model_without_known_names_is_told_of(caplog):
    """Experts are one parameter, no modules with a product each."""
    model = causal_lm("mixtral", num_local_experts=2, num_experts_per_tok=1)
    with caplog.at_level(logging.WARNING, logger="vpgea_fast.activations"):
        checkpoint_activations(model, "selective")
    (message,) = caplog.messages
    assert "no product by name in the MLP of MixtralForCausalLM" in message
    caplog.clear()
    checkpoint_activations(causal_lm("qwen2"), "selective")
    assert caplog.messages == []


@pytest.mark.parametrize("grade", ["none", "selective", "full"])
def test_liger_never_rotates_what_selective_keeps(grade, monkeypatch):
    """Its kernel writes into the products of q_proj and k_proj; no CUDA and no Liger is needed to
    see what it is asked for."""
    asked = {}
    stub = types.ModuleType("liger_kernel.transformers.monkey_patch")
    stub.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": lambda **words: asked.update(words)}
    package = types.ModuleType("liger_kernel")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    for module in (package, types.ModuleType("liger_kernel.transformers"), stub):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    cfg = ModelConfig(liger="always", activation_checkpointing=grade)
    _use_liger(causal_lm("qwen2"), cfg, torch.device("cuda"))
    assert asked["rope"] == (grade != "selective")
    assert asked["swiglu"]
    assert asked["rms_norm"]

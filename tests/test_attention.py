"""Packed = one by one, and no document ever sees another, on any Hugging Face causal LM."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from vpgea_fast import attention
from vpgea_fast.model import Policy
from vpgea_fast.packing import pack_rows
from vpgea_fast.types import TrainRow

SIZES = [(3, 7), (1, 1), (5, 30), (2, 2), (1, 64)]


@pytest.fixture(params=[Qwen2Config, Qwen3Config, LlamaConfig], ids=["qwen2", "qwen3", "llama"])
def policy(request):
    torch.manual_seed(0)
    config = request.param(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=53,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return Policy(
        AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    )


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(53, (n,), generator=generator)  # noqa: E731
    return [
        TrainRow(draw(c), draw(t), torch.randn(t, generator=generator), "prior", "student")
        for c, t in SIZES
    ]


def unpacked_logprobs(policy, row):
    """The oracle: eager attention over one unpacked document."""
    policy.causal_lm.set_attn_implementation("eager")
    ids = torch.cat([row.context_ids, row.token_ids])
    with torch.no_grad():
        logits = policy.causal_lm(ids[None], use_cache=False).logits[0]
    policy.causal_lm.set_attn_implementation(attention.IMPLEMENTATION)
    first = row.context_ids.numel() - 1
    return logits[first:-1].double().log_softmax(-1).gather(1, row.token_ids[:, None])[:, 0]


def gradients(policy, batches):
    policy.zero_grad()
    for batch in batches:
        policy(batch).loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def test_packed_equals_one_by_one(policy):
    packed = policy.logprob(pack_rows(rows())).split([t for _, t in SIZES])
    for part, row in zip(packed, rows(), strict=True):
        assert (part - unpacked_logprobs(policy, row)).abs().max() <= 5e-6


def test_packed_gradient_equals_one_by_one(policy):
    packed = gradients(policy, [pack_rows(rows())])
    single = gradients(policy, [pack_rows([row]) for row in rows()])
    for name, grad in packed.items():
        assert (grad - single[name]).norm() <= 5e-6 * single[name].norm().clamp(min=1.0), name


def test_perturbing_one_document_leaves_the_others_exactly_unchanged(policy):
    changed = rows()
    changed[2] = TrainRow(
        changed[2].context_ids.flip(0),
        (changed[2].token_ids + 1) % 53,
        changed[2].coef,
        "prior",
        "student",
    )
    before, after = (
        policy.logprob(pack_rows(r)).split([t for _, t in SIZES]) for r in (rows(), changed)
    )
    assert not torch.equal(before[2], after[2])
    for i in (0, 1, 3, 4):
        assert torch.equal(before[i], after[i])


def test_the_trap_that_the_lengths_close(policy):
    """With position_ids alone, sdpa and use_cache left on, transformers lets documents leak; with
    seqlens none can."""
    batch = pack_rows(rows())
    inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
    policy.causal_lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        safe = policy.causal_lm(**inputs, use_cache=False).logits
        leaking = policy.causal_lm(**inputs, use_cache=True).logits
        policy.causal_lm.set_attn_implementation(attention.IMPLEMENTATION)
        ours = policy.causal_lm(**inputs, use_cache=False, seqlens=batch.seqlens).logits
        cached = policy.causal_lm(**inputs, use_cache=True, seqlens=batch.seqlens).logits
    assert (leaking - safe).abs().max() > 1e-2
    assert (ours - safe).abs().max() < 1e-4
    assert torch.equal(ours, cached)


def test_left_padded_generation_is_that_of_sdpa(policy):
    prompt = {
        "input_ids": torch.tensor([[2, 3, 4], [2, 2, 5]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]),
    }
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    ours = policy.causal_lm.generate(**prompt, **settings)
    policy.causal_lm.set_attn_implementation("sdpa")
    assert torch.equal(ours, policy.causal_lm.generate(**prompt, **settings))


def test_checkpointed_gradient_is_the_same(policy):
    plain = gradients(policy, [pack_rows(rows())])
    policy.causal_lm.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    policy.train()
    for name, grad in gradients(policy, [pack_rows(rows())]).items():
        assert torch.allclose(grad, plain[name], atol=1e-6), name


def test_wrong_lengths_and_short_windows_are_refused():
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"one row of 4 tokens .* got a batch of 1 x 5"):
        attention.varlen_attention(torch.nn.Module(), q, q, q, None, seqlens=(2, 2))
    with pytest.raises(
        ValueError, match="document of 5 tokens is longer than the model's sliding window of 4"
    ):
        attention.varlen_attention(torch.nn.Module(), q, q, q, None, seqlens=(5,), sliding_window=4)

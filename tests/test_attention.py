"""Packed = one by one, and no document ever sees another, on any Hugging Face causal LM."""

import functools
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import sdpa_mask

from vpgea_fast import attention
from vpgea_fast.attention import (
    Documents,
    Form,
    Machine,
    choose,
    choose_for,
    packed_attention,
    packed_inputs,
)
from vpgea_fast.model import Policy
from vpgea_fast.packing import drop_zero_rows, pack_rows
from vpgea_fast.types import TrainRow

SIZES = [(3, 7), (1, 1), (5, 30), (2, 2), (1, 64)]
COUNTS = [tokens for _, tokens in SIZES]
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 53,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FULL = {
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY),
    "llama": LlamaConfig(**TINY),
}
WINDOWED = {
    "mistral": MistralConfig(**TINY, sliding_window=6),
    "qwen2 window": Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gemma2": Gemma2Config(
        **TINY, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
}
EVERY = {**FULL, **WINDOWED}


def by_name(configs):
    return pytest.mark.parametrize("policy", list(configs), indirect=True)


def make_policy(config, implementation):
    torch.manual_seed(0)
    config = type(config)(**config.to_diff_dict())
    return Policy(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))


@pytest.fixture(params=list(FULL))
def policy(request):
    return make_policy(EVERY[request.param], attention.register())


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(53, (n,), generator=generator)  # noqa: E731
    return [
        TrainRow(
            context_ids=draw(c),
            token_ids=draw(t),
            coef=torch.randn(t, generator=generator),
            stream="prior",
            view="student",
        )
        for c, t in SIZES
    ]


def with_changed(rows, index, coef=None):
    """The same rows, but every id of one of them is another."""
    old = rows[index]
    new = TrainRow(
        context_ids=(old.context_ids + 1) % 53,
        token_ids=(old.token_ids + 1) % 53,
        coef=old.coef if coef is None else torch.full_like(old.coef, coef),
        stream="prior",
        view="student",
    )
    return [*rows[:index], new, *rows[index + 1 :]]


def unpacked_logprobs(policy, row):
    """The oracle: eager attention over one unpacked document."""
    name = policy.causal_lm.config._attn_implementation
    policy.causal_lm.set_attn_implementation("eager")
    ids = torch.cat([row.context_ids, row.token_ids])
    with torch.no_grad():
        logits = policy.causal_lm(ids[None], use_cache=False).logits[0]
    policy.causal_lm.set_attn_implementation(name)
    first = row.context_ids.numel() - 1
    return logits[first:-1].double().log_softmax(-1).gather(1, row.token_ids[:, None])[:, 0]


def gradients(policy, batches):
    policy.zero_grad()
    for batch in batches:
        policy(batch).loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def embedding_gradients(policy, batch):
    """The gradient at the embedding of every document, (L, D) each."""
    kept = []

    def keep(_module, _inputs, output):
        output.retain_grad()
        kept.append(output)

    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(keep)
    policy(batch).loss.backward()
    handle.remove()
    return kept[0].grad[0].split(batch.seqlens)


def dense(q_THd, k_TKd, v_TKd, cu_seqlens, *, scale, window=(-1, -1), softcap=0.0):
    """What flash-attn documents, written out: one T x T softmax with a mask."""
    heads = q_THd.shape[1] // k_TKd.shape[1]
    k_THd, v_THd = (x.repeat_interleave(heads, dim=1) for x in (k_TKd, v_TKd))
    scores = torch.einsum("ihd,jhd->hij", q_THd, k_THd) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(q_THd.shape[0])
    document = torch.searchsorted(cu_seqlens, place, right=True)
    behind = place[:, None] - place[None, :]
    seen = (document[:, None] == document[None, :]) & (behind >= 0)
    if window[0] is not None and window[0] >= 0:
        seen &= behind <= window[0]
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v_THd)


def fa2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The signature of flash-attn 2.8."""
    assert causal
    assert {dropout_p, alibi_slopes, deterministic, return_attn_probs, block_table} <= {0.0, None}
    assert cu_seqlens_q is cu_seqlens_k
    assert cu_seqlens_q.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q == max_seqlen_k
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return dense(q, k, v, cu_seqlens_q, scale=scale, window=window_size, softcap=softcap)


def fa4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    softcap=0.0,
    deterministic=False,
):
    """The signature of flash-attn 4 as far as it is used: another order, and (out, lse) back."""
    assert causal
    assert qv is None
    assert not deterministic
    assert cu_seqlens_q is cu_seqlens_k
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q == max_seqlen_k
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = dense(q, k, v, cu_seqlens_q, scale=scale, window=window_size, softcap=softcap)
    return out, None


def traceable(q, k, v, *, cu_seqlens_q, **_kwargs):
    return dense(q, k, v, cu_seqlens_q, scale=q.shape[-1] ** -0.5)


def register_dense(function=fa2):
    kernel = attention.flash_kernel(function)
    AttentionInterface.register("dense", functools.partial(packed_attention, kernel=kernel))
    AttentionMaskInterface.register("dense", sdpa_mask)
    return "dense"


def packed_qkv(seqlens, *, dtype, heads=4, kv_heads=2, size=16, device="cpu", seed=0):
    """q, k, v as models hand them over, (1, heads, T, d), and the lengths in both forms."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = [
        torch.randn(1, sum(seqlens), n, size, generator=generator, device=device, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]
    cu_seqlens = torch.tensor([0, *seqlens], device=device).cumsum(0).int()
    return tensors, Documents(seqlens, cu_seqlens)


def attend(tensors, documents, kernel, form, *, upstream=None):
    """Output and the gradients of q, k and v, for random gradients rounded to `upstream`."""
    out, _ = packed_attention(
        torch.nn.Module(),
        *tensors,
        None,
        kernel=kernel,
        scaling=form.scale,
        sliding_window=form.window,
        softcap=form.softcap,
        documents=documents,
    )
    generator = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32)
    grad = grad.to(upstream or out.dtype).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


FORMS = [Form(), Form(scale=0.3), Form(window=3), Form(window=1), Form(softcap=1.5)]
FORMS += [Form(scale=0.3, window=5, softcap=1.5), Form(window=1000)]
LENGTHS = [(5, 1, 17, 2), (1,), (1, 1, 1), (40,)]


@by_name(EVERY)
def test_packed_equals_one_by_one(policy):
    packed = policy.logprob(pack_rows(rows())).split(COUNTS)
    for part, row in zip(packed, rows(), strict=True):
        assert (part - unpacked_logprobs(policy, row)).abs().max() <= 5e-6


@by_name(EVERY)
def test_packed_gradient_equals_one_by_one(policy):
    packed = gradients(policy, [pack_rows(rows())])
    single = gradients(policy, [pack_rows([row]) for row in rows()])
    for name, grad in packed.items():
        assert (grad - single[name]).norm() <= 5e-6 * single[name].norm().clamp(min=1.0), name


@by_name(EVERY)
@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_perturbing_one_document_leaves_the_others_exactly_unchanged(policy, backend):
    if backend == "dense":
        policy.causal_lm.set_attn_implementation(register_dense())
    batches = [pack_rows(rows()), pack_rows(with_changed(rows(), 2))]
    before, after = (policy.logprob(batch).split(COUNTS) for batch in batches)
    assert not torch.equal(before[2], after[2])
    before_grads, after_grads = (embedding_gradients(policy, batch) for batch in batches)
    assert not torch.equal(before_grads[2], after_grads[2])
    for i in (0, 1, 3, 4):
        assert torch.equal(before[i], after[i])
        assert torch.equal(before_grads[i], after_grads[i])


def test_a_document_without_a_coefficient_moves_no_parameter(policy):
    """Whatever it says, and whether it is there at all."""
    there = with_changed(rows(), 2, coef=0.0)
    before = gradients(policy, [pack_rows(there)])
    changed = gradients(policy, [pack_rows(with_changed(there, 2))])
    gated = drop_zero_rows(there)
    dropped = pack_rows(gated)
    after = gradients(policy, [dropped])
    for name, grad in before.items():
        assert torch.equal(grad, changed[name]), name
        assert (grad - after[name]).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name
    assert dropped.input_ids.numel() == pack_rows(there).input_ids.numel() - sum(SIZES[2]) + 1


def test_a_dummy_batch_has_every_gradient_and_all_are_zero(policy):
    out = policy(pack_rows([]))
    assert float(out.loss.detach()) == 0.0
    out.loss.backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None, name
        assert not p.grad.any(), name


def test_the_trap_that_the_lengths_close(policy):
    """With position_ids alone, sdpa and use_cache left on, transformers lets documents leak; with
    the lengths none can."""
    batch = pack_rows(rows())
    inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
    policy.causal_lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        safe = policy.causal_lm(**inputs, use_cache=False).logits
        leaking = policy.causal_lm(**inputs, use_cache=True).logits
        policy.causal_lm.set_attn_implementation(attention.NAMES["sdpa"])
        ours = policy.causal_lm(**packed_inputs(batch)).logits
        cached = policy.causal_lm(**{**packed_inputs(batch), "use_cache": True}).logits
    assert (leaking - safe).abs().max() > 1e-2
    assert (ours - safe).abs().max() < 1e-4
    assert torch.equal(ours, cached)


class Operations(TorchDispatchMode):
    """Counts what would wait for a GPU, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.syncs, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.syncs.append(func)
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_a_packed_forward_never_waits_and_makes_no_mask(policy):
    batch = pack_rows([*rows(), *rows(1), *rows(2), *rows(3)])
    decoder = policy.causal_lm.base_model
    with torch.no_grad(), Operations() as seen:
        decoder(**packed_inputs(batch))
    assert not seen.syncs
    tokens = batch.input_ids.numel()
    assert seen.largest <= 2 * tokens * TINY["intermediate_size"] < tokens**2
    policy.causal_lm.set_attn_implementation("sdpa")
    with torch.no_grad(), Operations() as seen:  # the instrument sees both
        decoder(batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
    assert seen.syncs
    assert seen.largest >= tokens**2


@by_name(EVERY)
def test_left_padded_generation_is_that_of_eager(policy):
    prompt = {
        "input_ids": torch.tensor([[2, 3, 4, 9, 8, 7, 6], [2, 2, 5, 3, 3, 3, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]),
    }
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    ours = policy.causal_lm.generate(**prompt, **settings)
    policy.causal_lm.set_attn_implementation("eager")
    assert torch.equal(ours, policy.causal_lm.generate(**prompt, **settings))


@by_name(EVERY)
def test_an_unpacked_forward_without_a_mask_is_that_of_eager(policy):
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        ours = policy.causal_lm(ids).logits
        policy.causal_lm.set_attn_implementation("eager")
        assert (ours - policy.causal_lm(ids).logits).abs().max() < 1e-4


@by_name(EVERY)
def test_checkpointed_gradient_is_the_same(policy):
    plain = gradients(policy, [pack_rows(rows())])
    policy.causal_lm.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    policy.train()
    for name, grad in gradients(policy, [pack_rows(rows())]).items():
        assert torch.allclose(grad, plain[name], atol=1e-6), name


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("seqlens", LENGTHS, ids=str)
@pytest.mark.parametrize("function", [fa2, fa4])
def test_a_flash_kernel_is_called_as_it_documents(form, seqlens, function):
    """The oracle has flash-attn's own signatures and conventions: layout, grouped heads, scale,
    window and softcap. Budget: float64 sums of at most 40 terms."""
    tensors, documents = packed_qkv(seqlens, dtype=torch.float64)
    ours = attend(tensors, documents, None, form)
    theirs = attend(tensors, documents, attention.flash_kernel(function), form)
    for one, other in zip(ours, theirs, strict=True):
        # scores of a softcapped document are never narrower than float32, here float64
        assert (one - other).abs().max() <= 1e-13 * max(1.0, other.abs().max())


def test_a_flash_kernel_is_deterministic_when_torch_is():
    seen = []

    def record(*args, deterministic, **_kwargs):
        seen.append(deterministic)
        return args[0]

    tensors, documents = packed_qkv((3, 2), dtype=torch.float32, kv_heads=4)
    kernel = attention.flash_kernel(record)
    attend(tensors[:1] * 3, documents, kernel, Form())
    torch.use_deterministic_algorithms(True)
    try:
        attend(tensors[:1] * 3, documents, kernel, Form())
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True]


@pytest.mark.parametrize("form", [Form(), Form(scale=0.3, window=3)], ids=str)
def test_varlen_attn_takes_our_arguments(form):
    """On the meta device, where torch checks its own signature and shapes, forward and backward."""
    kernel = attention.varlen_kernel()
    q, k, v = (torch.empty(8, n, 16, device="meta", requires_grad=True) for n in (4, 2, 2))
    out = kernel(q, k, v, torch.empty(3, dtype=torch.int32, device="meta"), 5, form)
    assert out.shape == q.shape
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    with pytest.raises(ValueError, match="has a softcap, which varlen_attn does not compute"):
        kernel(q, k, v, torch.empty(3), 5, Form(softcap=2.0))


def test_autocast_attends_in_its_own_dtype():
    """Rotary embeddings in float32 leave float32 queries beside half-precision values."""
    tensors, documents = packed_qkv((3, 5), dtype=torch.float32)
    seen = []

    def record(q, k, v, **_kwargs):
        seen.extend(x.dtype for x in (q, k, v))
        return q + k.sum() + v.sum()

    with torch.autocast("cpu", torch.bfloat16):
        attend(tensors, documents, attention.flash_kernel(record), Form())
        out = attend(tensors, documents, None, Form())[0]
    assert seen == [torch.bfloat16] * 3
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_attends_in_float32_and_rounds_once(dtype):
    tensors, documents = packed_qkv((3, 5), dtype=dtype)
    wide = tuple(x.float() for x in tensors)
    expected = attend(wide, documents, None, Form())[0].to(dtype)
    assert torch.equal(attend(tensors, documents, None, Form())[0], expected)
    with torch.autocast("cpu", dtype):
        assert torch.equal(attend(tensors, documents, None, Form())[0], expected)


Q = torch.zeros(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"documents": Documents((2, 2))}, r"one row of 4 tokens \(the sum of seqlens\), got 5"),
        (
            {"documents": Documents((5,)), "mask": torch.ones(1, 1, 5, 5)},
            r"a mask \(1, 1, 5, 5\) beside",
        ),
        ({"mask": torch.ones(0, 0, 0, 0)}, "layers around Module do not hand `documents` down"),
        ({"documents": Documents((5,)), "s_aux": torch.zeros(2)}, "the model passes s_aux"),
        ({"s_aux": torch.zeros(2)}, "the model passes s_aux"),
        ({"documents": Documents((5,)), "position_bias": Q}, "the model passes position_bias"),
        ({"documents": Documents((5,)), "is_causal": False}, "the model passes is_causal"),
        (
            {"documents": Documents((5,)), "output_attentions": True},
            "the model passes output_attentions",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "the model passes cu_seq_lens_q"),
        ({"softcap": 2.0, "position_bias": Q}, "the model passes position_bias"),
        ({"documents": Documents((5,)), "kernel": fa2}, "a kernel needs cu_seqlens"),
        (
            {"documents": Documents((5,)), "query": torch.zeros(2, 2, 5, 8)},
            "one row, got a batch of 2",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(call, message):
    call = dict(call)
    query, mask = call.pop("query", Q), call.pop("mask", None)
    with pytest.raises(ValueError, match=message):
        packed_attention(torch.nn.Module(), query, query, query[..., :8], mask, **call)


def test_arguments_without_effect_pass():
    module = torch.nn.Module()
    plain, _ = packed_attention(module, Q, Q, Q, None, documents=Documents((5,)))
    usual = {"is_causal": True, "output_attentions": False, "position_bias": None, "dropout": 0.5}
    out, _ = packed_attention(
        module, Q, Q, Q, None, documents=Documents((5,)), use_cache=False, **usual
    )
    assert torch.equal(out, plain)


def test_inputs_that_do_not_add_up_are_refused():
    batch = pack_rows(rows())
    object.__setattr__(batch, "seqlens", (3, 4))
    with pytest.raises(ValueError, match="expected 7 tokens"):
        packed_inputs(batch)


def test_a_model_with_sinks_is_refused():
    config = GptOssConfig(
        **TINY,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with pytest.raises(ValueError, match="the model passes s_aux"):
        make_policy(config, attention.register())


def config_of(model_type, **changes):
    return AutoConfig.for_model(model_type, **changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("qwen3_next"), "layers of type linear_attention"),
        (config_of("falcon_h1"), "layers of type hybrid"),
        (config_of("llama4_text"), "layers of type chunked_attention"),
        (config_of("recurrent_gemma"), "layers of type"),
        (config_of("mamba"), "no num_attention_heads|layers of type"),
        (config_of("gemma3_text", use_bidirectional_attention=True), "not causal"),
        (
            config_of("qwen2", hidden_size=30, num_attention_heads=4, num_key_value_heads=4),
            "hidden_size 30 of 'qwen2' is no multiple of num_attention_heads 4",
        ),
        (config_of("qwen2", num_key_value_heads=5), "no multiple of num_key_value_heads 5"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_a_model_that_mixes_documents_is_refused_before_it_runs(config, message):
    with pytest.raises(ValueError, match=rf"model\.path: .*({message})"):
        choose_for(config, "auto", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("config", list(EVERY.values()), ids=list(EVERY))
def test_the_choice_for_a_cpu_is_sdpa_with_its_reason(config):
    choice = choose_for(config, "auto", torch.device("cpu"), torch.bfloat16)
    assert choice == ("sdpa", "one sdpa call a document; no CUDA device")
    assert str(choice) == "attention sdpa: one sdpa call a document; no CUDA device"
    assert choice.facts() == {"attention": "sdpa", "attention_reason": choice.reason}


CUDA = torch.device("cuda")
HOPPER = Machine((9, 0), flash=(3, 2), varlen=True)
BARE = Machine((9, 0), varlen=True)
OLD = Machine((7, 5), varlen=True)


@pytest.mark.parametrize(
    ("machine", "dtype", "head_dim", "softcap", "name", "reason"),
    [
        (HOPPER, torch.bfloat16, 128, False, "flash", "flash-attn-3 .* on CUDA 9.0"),
        (HOPPER, torch.float16, 256, True, "flash", "flash-attn-3"),
        (BARE, torch.bfloat16, 128, False, "varlen", "varlen_attn on CUDA 9.0; flash-attn is not"),
        (BARE, torch.bfloat16, 128, True, "sdpa", "flash-attn is not .*; varlen_attn does not cap"),
        (HOPPER, torch.float32, 128, False, "sdpa", "float32 is not for flash kernels"),
        (HOPPER, torch.float64, 128, False, "sdpa", "float64 is not for flash kernels"),
        (HOPPER, torch.bfloat16, 20, False, "sdpa", "head_dim 20 is no multiple of 8"),
        (HOPPER, torch.bfloat16, 512, False, "sdpa", "head_dim 512"),
        (OLD, torch.bfloat16, 64, False, "sdpa", "capability 7.5 is below 8.0"),
        (
            Machine((9, 0), broken="flash-attn does not import (undefined symbol)", varlen=True),
            torch.bfloat16,
            64,
            False,
            "varlen",
            r"flash-attn does not import \(undefined symbol\)",
        ),
        (Machine((9, 0)), torch.bfloat16, 64, False, "sdpa", "this torch has no varlen_attn"),
    ],
)
def test_the_choice_is_the_first_that_runs(machine, dtype, head_dim, softcap, name, reason):
    choice = choose("auto", CUDA, dtype, head_dim, capped=softcap, machine=machine)
    assert choice.name == name

    assert re.search(reason, choice.reason), choice.reason


def test_an_explicit_choice_runs_or_is_refused():
    take = functools.partial(choose, device=CUDA, dtype=torch.bfloat16, head_dim=128)
    assert take("varlen", machine=HOPPER).name == "varlen"
    assert take("sdpa", machine=HOPPER).reason.startswith("asked for; one sdpa call")
    with pytest.raises(ValueError, match=r"'flash', which cannot run here: flash-attn is not inst"):
        take("flash", machine=BARE)
    with pytest.raises(
        ValueError, match=r"model\.attention: got 'varlen'.*does not cap scores; set 'auto'"
    ):
        take("varlen", machine=HOPPER, capped=True)
    with pytest.raises(ValueError, match="got 'varlen', which cannot run here: no CUDA device"):
        choose("varlen", torch.device("cpu"), torch.bfloat16, 64)
    with pytest.raises(ValueError, match="got 'fast', expected 'auto', 'flash', 'varlen', 'sdpa'"):
        take("fast", machine=HOPPER)


def test_names_keep_clear_of_what_transformers_reads_into_them():
    """A name with "flash" in it changes how masks are made, one with "sdpa" which models may."""
    assert not any(word in name for name in attention.NAMES.values() for word in ("flash", "sdpa"))
    assert attention.register() == attention.NAMES["sdpa"] == attention.register("sdpa")


USED = {
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"),
    *("causal", "deterministic", "window_size", "softcap"),
}


@pytest.mark.parametrize("generation", [2, 3, 4])
def test_an_installed_flash_attn_imports_and_takes_our_arguments(generation):
    module = attention.FLASH_MODULES[generation]
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{attention.FLASH_PACKAGES[generation]} is not installed")
    code = f"from {module} import flash_attn_varlen_func as f; import inspect; "
    code += "print(*inspect.signature(f).parameters)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= USED


def flash_attn_of_a_run():
    """Which flash_attn a process has that imported the trainer, and so vpgea_fast.attention."""
    importlib.import_module("torch.nn.attention.varlen")
    assert "vpgea_fast.attention" in sys.modules
    return [name for name in sys.modules if name.split(".")[0] == "flash_attn"]


def test_varlen_attn_imports_and_importing_attention_imports_no_flash_attn():
    assert run_ranks(flash_attn_of_a_run, size=1) == [[]]
    from torch.nn.attention.varlen import varlen_attn

    assert {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_compiled_layers_take_every_batch_with_few_graphs(backend):
    """One layer's graph serves all layers and all lists of lengths: no graph a batch."""
    implementation = attention.register() if backend == "sdpa" else register_dense(traceable)
    policy = make_policy(EVERY["qwen2"], implementation)
    batches = [pack_rows(rows(seed)[seed : seed + 3]) for seed in range(3)]
    batches += [pack_rows([*rows(3), *rows(4)])]
    expected = [policy.logprob(batch) for batch in batches]
    plain = gradients(policy, batches)
    torch._dynamo.reset()
    for layer in policy.causal_lm.base_model.layers:
        layer.compile(dynamic=True, backend="aot_eager")  # the graphs of inductor, not its code
    policy.logprob(batches[0])
    gradients(policy, batches[:1])
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, logps in zip(batches, expected, strict=True):
            assert (policy.logprob(batch) - logps).abs().max() <= 5e-6
        compiled = gradients(policy, batches)
    for name, grad in compiled.items():
        assert (grad - plain[name]).norm() <= 5e-6 * plain[name].norm().clamp(min=1.0), name


GPU_BACKENDS = ["flash", "varlen", "sdpa"]


def gpu_kernel(backend):
    if backend == "sdpa":
        return None
    if backend == "flash":
        if not attention.look(CUDA).flash:
            pytest.skip(attention.no_flash(attention.look(CUDA)))
        return attention.best_flash_kernel()
    return attention.varlen_kernel()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [Form(), Form(window=64), Form(scale=0.05, softcap=5.0)], ids=str)
@pytest.mark.parametrize("seqlens", [(700, 1, 129, 33), (1,), (1, 1)], ids=str)
def test_gpu_kernels_against_float64(backend, dtype, form, seqlens):
    """Truth: one document at a time in float64. Budget: twice what one sdpa call a document loses
    in the same dtype, and a rounding of the largest entry."""
    kernel = gpu_kernel(backend)
    if backend == "varlen" and form.softcap is not None:
        pytest.skip("varlen_attn does not cap scores")
    shape = {"heads": 14, "kv_heads": 2, "size": 128, "device": "cuda"}
    tensors, documents = packed_qkv(seqlens, dtype=dtype, **shape)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    truth = attend(exact, documents, None, form, upstream=dtype)
    torchs = attend(tensors, documents, None, form)
    found = attend(tensors, documents, kernel, form)
    for one, other, true in zip(found, torchs, truth, strict=True):
        assert one.isfinite().all()
        rounding = torch.finfo(dtype).eps * true.abs().max()
        budget = 2 * (other.double() - true).abs().max() + rounding
        assert (one.double() - true).abs().max() <= budget


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_documents_are_exactly_isolated(backend):
    """Deterministic backward on: then a changed document changes no bit of another."""
    kernel = gpu_kernel(backend)
    seqlens = (300, 1, 700, 64)
    shape = {"heads": 14, "kv_heads": 2, "size": 64, "device": "cuda"}
    tensors, documents = packed_qkv(seqlens, dtype=torch.bfloat16, **shape)
    changed = []
    for x in tensors:
        other = x.detach().clone()
        other[:, :, 301:1001] = torch.randn_like(other[:, :, 301:1001])
        changed.append(other.requires_grad_())
    torch.use_deterministic_algorithms(True)
    try:
        before = attend(tensors, documents, kernel, Form())
        after = attend(changed, documents, kernel, Form())
    finally:
        torch.use_deterministic_algorithms(False)
    split = [x.split(seqlens, dim=1 if i == 0 else 2) for i, x in enumerate(before)]
    other_split = [x.split(seqlens, dim=1 if i == 0 else 2) for i, x in enumerate(after)]
    for ours, theirs in zip(split, other_split, strict=True):
        assert not torch.equal(ours[2], theirs[2])
        for i in (0, 1, 3):
            assert torch.equal(ours[i], theirs[i])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_gpu_policy_scores_as_on_the_cpu_and_never_waits(backend):
    kernel = gpu_kernel(backend)
    name = attention.register(backend)
    assert (kernel is None) == (backend == "sdpa")
    reference = make_policy(EVERY["qwen2"], attention.register())
    expected = reference.logprob(pack_rows(rows()))
    reference.dtype = torch.bfloat16
    lost = (reference.logprob(pack_rows(rows())) - expected).abs().max()  # 0.025
    policy = make_policy(EVERY["qwen2"], name)
    policy.causal_lm.to("cuda")
    policy.dtype = torch.bfloat16
    found = policy.logprob(pack_rows(rows()))
    assert (found - expected).abs().max() <= 2 * lost
    inputs = packed_inputs(pack_rows(rows()).to("cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            policy.causal_lm.base_model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")

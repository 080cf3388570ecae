"""The estimator against what torch does: shards and collectives to the byte, peaks within 10 %."""

import gc
import importlib.util
import json
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from vpgea_fast import attention, config
from vpgea_fast.activations import checkpoint_activations
from vpgea_fast.check import Target, check_config, slow_layers, target
from vpgea_fast.data import Benchmark
from vpgea_fast.distributed import World, open_world, reshard
from vpgea_fast.estimate import (
    RESERVE,
    Choice,
    choose,
    communication,
    estimate_memory,
    model_shape,
    score_tokens,
)
from vpgea_fast.estimate.choice import settled
from vpgea_fast.intake import check_text
from vpgea_fast.model import Policy, random_policy
from vpgea_fast.model_dir import ModelError
from vpgea_fast.optim import apply_update, build_optimizer
from vpgea_fast.packing import pack_rows
from vpgea_fast.rollout.factory import positions
from vpgea_fast.rollout.vllm.transfer import CHUNK_BYTES
from vpgea_fast.types import PromptedQuestion, Question, TrainRow

ROOT = Path(__file__).parents[1]
GIB = 2**30
ALONE = World(torch.device("cpu"))
PUBLISHED = {
    "1.5b": ((1536, 28, 8960, 12, 2, 151936), 1_777_088_000),
    "7b": ((3584, 28, 18944, 28, 4, 152064), 7_615_616_512),
    "32b": ((5120, 64, 27648, 40, 8, 152064), 32_763_876_352),
}


def qwen(sizes, *, tied=False, **more):
    hidden, layers, mlp, heads, kv_heads, vocabulary = sizes
    settings = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }
    return Qwen2Config(**settings | more)


SMALL = (256, 3, 1024, 8, 2, 2051)  # no power of two divides the vocabulary


def settings(*, model=(), parallel=(), train=(), optim=(), **sections):
    tree = {
        "model": {"dtype": "bfloat16", "attention": "sdpa"} | dict(model),
        "parallel": {"shard": "always"} | dict(parallel),
        "train": {"micro_batch_tokens": 768} | dict(train),
        "optim": dict(optim),
    }
    return config.resolve(tree | sections)


def parts(shape, cfg, phase=None, **given):
    given = {"world": 1, "cuda": True, "context": 100, "prompt": 10} | given
    found = estimate_memory(shape, cfg, **given)
    return found.parts if phase is None else found.phases[phase]


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    sizes, count = PUBLISHED[name]
    shape = model_shape(qwen(sizes))
    assert shape.parameters == count
    assert len(shape.blocks) == sizes[1]
    assert not shape.tied


def test_states_of_every_optimiser_by_hand():
    """On 4 processes every parameter has rows / 4 rows, rounded up."""
    shape = model_shape(qwen(SMALL))
    held = sum(
        -(-rows // 4) * math.prod(rest) for unit in shape.units.values() for rows, *rest in unit
    )
    half = {"model": {"master_dtype": "bfloat16"}, "parallel": {"accumulate": "unsharded"}}
    rounded = {"stochastic_rounding": True}
    for given, weight, moments in (
        ({}, 4, 8),
        ({"optim": {"name": "adamw_bf16"}}, 4, 4),
        (half | {"optim": rounded}, 2, 8),
        (half | {"optim": rounded | {"name": "adamw_bf16"}}, 2, 4),
    ):
        got = parts(shape, settings(**given), world=4)
        assert got["weights"] == weight * held
        assert got["optimiser"] == moments * held
        assert got["sampling replica"] == 2 * shape.parameters
        assert parts(shape, settings(**given), "update", world=4)["gradients"] == weight * held
    whole = parts(shape, settings(**half, optim=rounded), "backward", world=4)
    assert whole["gradients"] == 4 * (shape.parameters - 2051 * 256)  # the head's dW: its unit
    assert parts(shape, settings(), "backward", world=4)["gradients"] == 4 * held
    replicas = settings(parallel={"replicas": 2})
    assert parts(shape, replicas, world=8)["weights"] == 4 * held
    eight = settings(optim={"name": "adamw_8bit"})
    assert 2 * held < parts(shape, eight, world=4)["optimiser"] < 2.2 * held
    never = settings(**half | {"parallel": {"shard": "never"}}, optim=rounded)
    for phase in ("head", "backward", "reduction", "embedding"):
        assert parts(shape, never, phase)["gradients"] == 4 * shape.parameters, phase
    assert parts(shape, never, "update")["gradients"] == 2 * shape.parameters
    alone = parts(shape, settings(parallel={"shard": "never"}, model={"dtype": "float32"}))
    assert alone["sampling replica"] == 0
    assert alone["weights"] == 4 * shape.parameters
    # Of one device: what the forward reads, and beside it what is updated.
    both = parts(shape, settings(parallel={"shard": "never"}))
    assert (both["weights"], both["masters"]) == (2 * shape.parameters, 4 * shape.parameters)
    assert both["sampling replica"] == 0


def test_a_head_cut_by_classes_by_hand():
    """No whole head and no whole dW; the hidden states of all rows, and an eighth of each logit."""
    shape = model_shape(qwen(SMALL))
    cut = settings(parallel={"tensor": "head"}, loss={"backend": "torch"})
    plain = settings(loss={"backend": "torch"})
    head, own = 2051 * 256, 257 * 256
    phases = {name: (parts(shape, plain, name, world=8), parts(shape, cut, name, world=8))
              for name in ("head", "embedding", "reduction")}  # fmt: skip
    before, after = phases["embedding"]
    assert before["units"] - after["units"] == head * (2 + 4)
    before, after = phases["head"]
    chunks = 6144 * (257 * 6 + 8 * 256) - 768 * (2051 * 6 + 8 * 256)
    joined = 2 * (6144 - 768) * 256 * 2 + 2 * 768 * 256 * 2
    assert after["head"] - before["head"] == chunks + joined + own * 2
    for name, (before, after) in phases.items():
        assert before["gradients"] == after["gradients"], name
    given = {"world": 8, "micro_batches": 3, "scoring_batches": 1}
    before, after = (communication(shape, cfg, **given) for cfg in (plain, cut))
    assert before["all-gather"].calls - after["all-gather"].calls == 1
    assert before["reduce-scatter"].total - after["reduce-scatter"].total == 7 * own * 4
    assert after["head rows"].total == 7 * 768 * 256 * 2 * 4
    assert after["head gradients"].total == 7 * 768 * 256 * 4 * 2 * 3


def test_the_host_holds_what_is_offloaded():
    shape, plain = model_shape(qwen(SMALL)), settings()
    cfg = settings(parallel={"cpu_offload": True}, checkpoint={"background": True})
    found = estimate_memory(shape, cfg, world=4, context=100, prompt=10)
    assert found.parts["weights"] == found.parts["optimiser"] == found.parts["gradients"] == 0
    kept = parts(shape, plain, world=4)
    assert found.host == {
        "weights, optimiser": kept["weights"] + kept["optimiser"],
        "gradients": kept["weights"],
        "checkpoint copy": kept["weights"] + kept["optimiser"],
    }
    assert estimate_memory(shape, plain, world=4, context=100, prompt=10).host == {}


def test_one_gpu_keeps_the_weights_and_the_host_the_rest():
    """Weights in the forward's dtype, gradients in float32, no unit to gather and no replica; of a
    step three blocks of 2^24 elements at most. Masters only where they are other tensors."""
    shape, whole = model_shape(qwen(SMALL)), {"shard": "auto", "cpu_offload": True}
    p, embedding, mlp = shape.parameters, 2051 * 256, 1024 * 256
    rounded = {"stochastic_rounding": True, "name": "adamw_bf16"}
    half = {"model": {"master_dtype": "bfloat16"}, "optim": rounded}
    for given, moments, master, scratch in (
        ({}, 8, 4, 0),
        (half, 4, 0, 32),
        ({"model": {"dtype": "float32"}}, 8, 0, 0),
        ({"optim": {"name": "adamw_bf16"}}, 4, 4, 32),
    ):
        cfg = settings(parallel=whole, **given)
        s = 4 if cfg.model.dtype == "float32" else 2
        found = estimate_memory(shape, cfg, context=100, prompt=10)
        assert in_phases(found, "weights") == dict.fromkeys(found.phases, s * p)
        assert found.parts["optimiser"] == found.parts["sampling replica"] == 0
        for phase in ("head", "backward", "reduction", "embedding"):
            assert found.phases[phase]["gradients"] == 4 * p, phase
        own = 2 if given is half else 4  # rounded before the update
        assert found.phases["update"]["gradients"] == own * p
        assert found.phases["head"]["units"] == found.phases["reduction"]["units"] == 0
        assert found.phases["backward"]["units"] == mlp * (s + 4)
        assert found.phases["embedding"]["units"] == embedding * (s + 4)
        assert found.phases["update"]["scratch"] == embedding * (3 * (moments + master) + scratch)
        want = {"moments": moments * p} | ({"masters": master * p} if master else {})
        assert found.host == want
    copied = settings(parallel=whole, checkpoint={"background": True})
    host = estimate_memory(shape, copied, context=100, prompt=10).host
    assert host["checkpoint copy"] == 12 * p
    assert communication(shape, copied, world=1) == {}
    large = model_shape(qwen(PUBLISHED["7b"][0]))
    update = parts(large, settings(parallel=whole, **half), "update")
    # There the first gradient that is rounded, beside all others, takes more than the update.
    assert update["gradients"] == 4 * large.parameters
    assert update["scratch"] == 2 * 152064 * 3584
    kl = {"objective": {"name": "grpo", "kl_coef": 0.1}, "rollout": {"full_answer": True}}
    held = estimate_memory(shape, settings(parallel=whole, **kl), context=100, prompt=10)
    assert held.phases["update"]["reference"] == 2 * p
    # Several processes have shards in host memory, as with `always`.
    for world, shard in ((2, "auto"), (1, "always")):
        cfg = settings(parallel={"shard": shard, "cpu_offload": True})
        assert estimate_memory(shape, cfg, world=world, context=9, prompt=1).parts["weights"] == 0
    never = settings(parallel={"shard": "never", "cpu_offload": True})
    assert estimate_memory(shape, never, context=100, prompt=10).parts["weights"] == 2 * p


def test_a_reference_policy_lies_where_its_shards_do():
    shape = model_shape(qwen(SMALL))
    kl = {"objective": {"name": "grpo", "kl_coef": 0.1}, "rollout": {"full_answer": True}}
    # In the forward's dtype, sharded or on one GPU.
    held = parts(shape, settings(), world=4)["weights"] // 4
    assert parts(shape, settings(**kl), "update", world=4)["reference"] == 2 * held
    alone = settings(**kl, parallel={"shard": "never"})
    assert parts(shape, alone, "update")["reference"] == 2 * shape.parameters
    disk = settings(**kl, model={"reference": "disk"})
    assert "reference" not in parts(shape, disk, "update", world=4)
    assert parts(shape, disk, "reference", world=4)["reference"] == 2 * held
    off = settings(**kl, parallel={"cpu_offload": True})
    found = estimate_memory(shape, off, world=4, context=100, prompt=10)
    assert "reference" not in found.parts
    assert found.host["reference"] == 2 * held
    assert "reference" not in parts(shape, settings(), world=4)


def test_sampling_and_grades_of_checkpointing():
    shape = model_shape(qwen(SMALL))
    cfg = settings(rollout={"max_batch": 6})
    # k and v of 3 layers, 6 paths of 100 tokens, 2 heads of 32 columns, 2 bytes
    assert parts(shape, cfg)["kv cache"] == 2 * 3 * 6 * 100 * 2 * 32 * 2
    grades = [
        parts(shape, settings(model={"activation_checkpointing": grade}), "head")["activations"]
        for grade in ("full", "selective", "none")
    ]
    assert grades[0] == 3 * 768 * 256 * 2  # the inputs of the layers
    # and attention's output with its 8 log-sums, q, k and v of 256, 64 and 64 columns, the gate
    assert grades[1] - grades[0] == 3 * 768 * (2 * (256 + 256 + 64 + 64 + 1024) + 4 * 8)
    assert grades == sorted(set(grades))
    slim = settings(model={"activation_checkpointing": "none", "compile": True})
    assert parts(shape, slim, "head")["activations"] < grades[2]


HELD = {"name": "grpo", "kl_coef": 0.1}


@pytest.mark.parametrize("where", ["device", "disk"])
def test_a_reference_policy_by_hand(where):
    """In shards of bfloat16 beside float32 masters, or in its own phase alone; whole it is as the
    policy is; offloaded it is the host's."""
    shape, model = model_shape(qwen(SMALL)), {"reference": where}
    rest = {"objective": HELD, "rollout": {"full_answer": True}}
    plain = settings(model=model, rollout={"full_answer": True}, objective={"name": "grpo"})
    cfg = settings(model=model, **rest)
    before = estimate_memory(shape, plain, context=100, prompt=10)
    after = estimate_memory(shape, cfg, context=100, prompt=10)
    held = in_phases(after, "reference")
    assert "reference" not in before.parts
    assert "reference" not in before.phases
    for phase, size in held.items():
        expected = 2 * shape.parameters if where == "device" or phase == "reference" else 0
        assert size == expected, phase
    totals = [sum(found.phases["head"].values()) for found in (before, after)]
    assert totals[1] - totals[0] == held.get("head", 0)
    parts = after.phases["reference"]
    assert parts["units"] >= 2 * 2 * 2051 * 256 * 2  # both ends of both models
    whole = estimate_memory(
        shape, settings(model=model, parallel={"shard": "never"}, **rest), context=100, prompt=10
    )
    assert whole.phases["reference"]["reference"] == 2 * shape.parameters
    away = settings(model=model, parallel={"cpu_offload": True}, **rest)
    offloaded = estimate_memory(shape, away, context=100, prompt=10)
    assert "reference" not in offloaded.parts
    assert offloaded.host["reference"] == 2 * shape.parameters


@pytest.mark.parametrize(("world", "replicas", "tied"), [(8, 1, False), (64, 8, True)])
def test_a_pass_of_the_reference_policy_to_the_byte(world, replicas, tied):
    """Three forwards and what they gave up; the ends are gathered once."""
    sizes = (64, 2, 128, 4, 2, 515)
    cfg = settings(parallel={"replicas": replicas})
    shape = model_shape(qwen(sizes, tied=tied))
    with fake_world(world, replicas) as mesh:
        policy = sharded(causal_lm(sizes, cfg, tied), mesh, cfg).requires_grad_(False)
        with Collectives() as seen:
            for _ in range(3):
                policy.logprob(full_batch(32, 2))
        reshard(policy)
        del policy
    moved = communication(shape, cfg, world=world, reference_batches=3, cuda=False)["reference"]
    assert dict(seen.calls) == {"all-gather": moved.calls}
    shards = world // replicas
    assert moved.total == pytest.approx((shards - 1) / shards * seen.bytes["all-gather"], rel=1e-9)


def test_what_to_lower_is_the_largest_part_of_the_peak():
    shape = model_shape(qwen(SMALL))
    for given, part, key in (
        ({"rollout": {"max_batch": 4096}}, "kv cache", "rollout.max_batch"),
        ({"train": {"micro_batch_tokens": 2**20}}, "activations", "train.micro_batch_tokens"),
        ({"engine": "vllm"}, "vllm kv cache", "engine.gpu_memory or engine.kv_cache_gib"),
    ):
        cfg = settings(**given)
        found = estimate_memory(shape, cfg, world=4, context=100, prompt=10, device_bytes=100 * GIB)
        assert found.lower()[0] == part
        assert key in found.lower()[1]


# --- vLLM, by hand: 3 layers, 256 wide, MLP 1024, 8 heads of 32, 2 of keys, 2051 tokens -----------

DEVICE = 10 * GIB
TRAINING = ("head", "backward", "reduction", "embedding", "update")
RESAMPLED = {"resample_rounds": 1}


def with_vllm(vllm=(), *, tied=False, rollout=(), engine="vllm", **given):
    shape = model_shape(qwen(SMALL, tied=tied))
    around = {"world": 4, "cuda": True, "context": 1000, "prompt": 10, "device_bytes": DEVICE}
    known = {name: given.pop(name) for name in list(given) if name in around}
    engine = {"name": "vllm", **dict(vllm)} if engine == "vllm" else engine
    cfg = settings(rollout={"max_batch": 6} | dict(rollout), engine=engine, **given)
    return shape, estimate_memory(shape, cfg, **around | known)


def in_phases(found, part):
    return {name: parts[part] for name, parts in found.phases.items() if parts.get(part)}


def test_the_hugging_face_engine_has_no_part_of_vllms():
    shape, found = with_vllm(engine="hf")
    assert list(found.phases) == [*TRAINING, "sampling"]
    assert found.engine is None
    assert found.phases["sampling"].keys() - found.phases["update"].keys() == {
        *("kv cache", "prefill", "logits")
    }
    assert in_phases(found, "sampling replica") == dict.fromkeys(
        [*TRAINING, "sampling"], 2 * shape.parameters
    )


@pytest.mark.parametrize(("group", "heads"), [(1, 2), (2, 1), (4, 1)])
def test_vllm_takes_its_share_of_a_gpu_awake_and_nearly_nothing_asleep(group, heads):
    """bfloat16; a process has its part of weights, MLP and key heads, one head at least."""
    vllm = {"tensor_parallel": group, "gpu_memory": 0.5}
    shape, found = with_vllm(vllm, train=RESAMPLED)
    engine, whole = found.engine, 2 * shape.parameters
    assert engine.weights == -(-whole // group)
    assert engine.work == 8192 * 2 * (3 * 1024 // group + 2 * 256) + 6 * 2051 * (2 + 16)
    assert engine.kept == GIB
    assert engine.weights + engine.work + engine.kept + engine.cache == DEVICE // 2
    assert engine.token == 2 * 3 * heads * 32 * 2
    assert engine.tokens == engine.cache // engine.token
    states = 12 * sum(
        -(-rows // 4) * math.prod(rest) for unit in shape.units.values() for rows, *rest in unit
    )
    sampling = found.phases["sampling"]
    assert sampling["units"] == found.phases["scoring"]["units"]  # of the probe
    assert sum(sampling.values()) == states + DEVICE // 2 + sampling["units"]
    awake = ("sampling", "scoring")
    assert in_phases(found, "vllm graphs") == dict.fromkeys([*TRAINING, *awake, "sync"], GIB)
    assert in_phases(found, "vllm weights") == dict.fromkeys([*awake, "sync"], engine.weights)
    assert in_phases(found, "vllm kv cache") == dict.fromkeys(awake, engine.cache)
    assert in_phases(found, "vllm work") == dict.fromkeys(awake, engine.work)
    for part in ("sampling replica", "kv cache", "prefill", "logits"):
        assert not in_phases(found, part)


def test_vllms_cache_may_have_a_size_of_its_own():
    shape, found = with_vllm(
        {"kv_cache_gib": 0.25, "tensor_parallel": 2}, device_bytes=None, world=2
    )
    assert found.engine.cache == GIB // 4
    assert found.engine.weights == shape.parameters
    assert found.engine.tokens == GIB // 4 // (2 * 3 * 32 * 2)
    with pytest.raises(ValueError, match=r"device_bytes: got None.*set engine\.kv_cache_gib"):
        with_vllm(device_bytes=None)
    _, full = with_vllm({"gpu_memory": 0.05})  # not even the graphs
    assert full.engine.cache == full.engine.tokens == 0
    assert sum(full.phases["sampling"].values()) > full.engine.least > GIB


def test_answers_are_scored_beside_a_vllm_that_may_be_asked_again():
    """A layer's tensors once, and what is whole in a forward: blocks, head, embedding."""
    shape, found = with_vllm(train=RESAMPLED)
    scoring = found.phases["scoring"]
    backward, head = found.phases["backward"], found.phases["head"]
    # One after the other: a layer's tensors, then the head's.
    assert scoring["activations"] + scoring["head"] == max(scoring["activations"], head["head"])
    assert 0 < scoring["activations"] <= backward["activations"]
    assert found.score_tokens == 768  # beside vLLM no room is known
    block = sum(math.prod(p) for p in shape.blocks[0])
    assert scoring["units"] == 2 * (2 * 2051 * 256 + max(2 * block, 2051 * 256))
    for given in (
        {},
        {"train": RESAMPLED, "scoring": {"u_source": "accuracy"}},
        {"train": RESAMPLED, "objective": {"name": "grpo"}, "rollout": {"full_answer": True}},
    ):
        assert "scoring" not in with_vllm(**given)[1].phases


@pytest.mark.parametrize(
    ("vllm", "cuda", "copies"),
    [
        # gate and up together are 2 x 1024 x 256; the embedding's 2051 x 256 is the larger
        ({}, True, 2 * 2 * 2051 * 256),
        ({"process": "own"}, True, 2 * 2051 * 256 + GIB),
        ({"server": "http://127.0.0.1:8000"}, True, 2 * 2051 * 256),
        ({"server": "http://127.0.0.1:8000", "sync": "nccl"}, True, 2 * 2051 * 256 + GIB),
        ({"process": "own"}, False, "and all weights, which one file holds"),
        ({"server": "http://127.0.0.1:8000"}, False, "and all weights, which one file holds"),
    ],
)
def test_a_sync_gathers_a_unit_and_copies_a_tensor(vllm, cuda, copies):
    shape, found = with_vllm(vllm, cuda=cuda)
    if isinstance(copies, str):
        copies = 2 * 2051 * 256 + 2 * shape.parameters
    assert CHUNK_BYTES == GIB
    block = sum(math.prod(p) for p in shape.blocks[0])
    sync = found.phases["sync"]
    assert sync["hand-over"] == copies
    assert sync["units"] == 2 * 2 * max(block, 2051 * 256)  # and its flat copy
    _, alone = with_vllm(vllm, cuda=cuda, world=1, parallel={"shard": "never"})
    assert alone.phases["sync"]["units"] == 0


def test_a_server_leaves_the_device_to_the_trainer():
    shape, found = with_vllm({"server": "http://127.0.0.1:8000"}, device_bytes=None)
    assert found.engine is None
    assert list(found.phases) == [*TRAINING, "sampling", "sync"]
    assert found.phases["sampling"].keys() == {"weights", "optimiser", "sampling replica"}
    assert not any(part.startswith("vllm") for part in found.parts)
    assert not in_phases(found, "sampling replica")
    hf = with_vllm(engine="hf")[1]
    for phase in TRAINING:
        assert sum(hf.phases[phase].values()) - sum(found.phases[phase].values()) == (
            2 * shape.parameters
        )


@pytest.mark.parametrize("tied", [True, False])
def test_on_a_cpu_vllm_never_sleeps_and_unties_the_head(tied):
    shape, found = with_vllm(tied=tied, cuda=False)
    engine = found.engine
    assert engine.weights == 2 * (shape.parameters + tied * 2051 * 256)
    assert engine.cache == GIB
    assert engine.work == 4096 * 2 * (3 * 1024 + 2 * 256) + 6 * 2051 * 18
    assert engine.kept == 0
    everywhere = [*TRAINING, "sampling", "sync"]
    assert in_phases(found, "vllm weights") == dict.fromkeys(everywhere, engine.weights)
    assert in_phases(found, "vllm kv cache") == dict.fromkeys(everywhere, GIB)


# --- tokens of a forward without gradients --------------------------------------------------------


def scored_at(shape, tokens, *, world=1, **given):
    """(bytes of the scoring phase at so many tokens, bytes of the highest phase of training)."""
    cfg = settings(**given, train={"micro_batch_tokens": 768, "score_tokens": tokens})
    phases = estimate_memory(shape, cfg, world=world, context=100, prompt=10).phases
    totals = {name: sum(sizes.values()) for name, sizes in phases.items()}
    no_gradients = max(totals[name] for name in ("scoring", "reference") if name in totals)
    return no_gradients, max(totals[name] for name in TRAINING)


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": {"activation_checkpointing": "none"}},
        {"parallel": {"shard": "never"}},
        {"objective": HELD, "rollout": {"full_answer": True}},
        {"objective": HELD, "rollout": {"full_answer": True}, "model": {"reference": "disk"}},
    ],
    ids=["full", "none", "whole", "reference", "read"],
)
def test_scoring_takes_the_most_tokens_that_training_has_room_for(world, given):
    """Twice as many would need more, unless they are the eight micro-batches that are enough."""
    shape = model_shape(qwen((512, 12, 1024, 8, 2, 515)))
    tokens = score_tokens(shape, settings(**given), world=world)
    assert tokens in (768, 2 * 768, 4 * 768, 8 * 768)
    if tokens > 768:
        needed, room = scored_at(shape, tokens, world=world, **given)
        assert needed <= room
    if tokens < 8 * 768:
        needed, room = scored_at(shape, 2 * tokens, world=world, **given)
        assert needed > room


def test_scoring_takes_a_multiple_where_training_keeps_every_layer():
    """12 layers' tensors are room for the one that scoring holds; without any training none is."""
    shape = model_shape(qwen((512, 12, 1024, 8, 2, 515)))
    keeps = {"model": {"activation_checkpointing": "none"}}
    assert score_tokens(shape, settings(**keeps)) == 8 * 768
    assert score_tokens(shape, settings(**keeps, train={"record": "weights"}).asked) == 768
    assert score_tokens(shape, settings(**keeps, train={"score_tokens": 1000})) == 1000


def test_a_budget_that_is_given_is_planned_for_and_is_what_to_lower():
    shape = model_shape(qwen(SMALL))
    cfg = settings(train={"score_tokens": 2**20})
    found = estimate_memory(shape, cfg, context=100, prompt=10)
    assert found.phase == "scoring"
    assert found.lower() == ("activations", "train.score_tokens")
    assert found.score_tokens == 2**20
    assert "scoring" not in estimate_memory(shape, settings(), context=100, prompt=10).phases


# --- simulation: many processes in one, the others' messages left out ----------------------------


@contextmanager
def fake_world(size, replicas=1):
    """Rank 0 of `size`: collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    shape, names = (size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, size // replicas), ("replicate", "shard")
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        gc.collect()
        dist.destroy_process_group()


def sharded(model, mesh, cfg):
    policy = Policy(model, dtype=getattr(torch, cfg.model.dtype))
    return policy.shard(World(torch.device("cpu"), size=mesh.size(), mesh=mesh), cfg.parallel)


def causal_lm(sizes, cfg, tied):
    torch.manual_seed(0)
    hf = qwen(sizes, tied=tied)
    model = Qwen2ForCausalLM._from_config(hf, attn_implementation=attention.register()).float()
    checkpoint_activations(model, cfg.model.activation_checkpointing)
    return model.train()


def full_batch(tokens, documents=4):
    ids = torch.arange(tokens // documents + 1) % 1000
    row = TrainRow(
        context_ids=ids[:1],
        token_ids=ids[1:],
        coef=-torch.ones(len(ids) - 1),
        stream="prior",
        view="student",
    )
    return pack_rows([row] * documents)


def sharded_step(policy, optimizer, batch, *, micro_batches, scoring=0):
    for _ in range(scoring):
        policy.logprob(batch)
    for number in range(micro_batches):
        policy.expect_backward(last=number + 1 == micro_batches)
        policy(batch).loss.backward()
    reshard(policy)
    for p in policy.parameters():
        p.grad.to_local().zero_()  # nobody has sent anything
    apply_update(optimizer, lr=0.0, max_grad_norm=1.0)


KINDS = {
    "c10d._allgather_base_.": "all-gather",
    "c10d._reduce_scatter_base_.": "reduce-scatter",
    "c10d.allreduce_.": "all-reduce",
}


class Collectives(TorchDispatchMode):
    """Calls and bytes of the larger side (the sum, for an all-reduce) of what FSDP sends."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = next((kind for name, kind in KINDS.items() if name in str(function)), None)
        if kind is not None:
            tensors = args[0] if isinstance(args[0], list) else args[:2]
            size = max(tensor.nbytes for tensor in tensors)
            if size > 8:  # the gradient norm is a number
                self.calls[kind] += 1
                self.bytes[kind] += size
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("world", "replicas", "accumulate", "scoring", "tied"),
    [
        (1, 1, "sharded", 1, False),
        (8, 1, "sharded", 2, False),
        (8, 1, "sharded", 0, True),
        (8, 1, "unsharded", 1, False),
        (64, 8, "sharded", 1, False),
        (64, 1, "unsharded", 1, True),
        (512, 64, "sharded", 1, False),
        (512, 1, "sharded", 0, False),
    ],
)
def test_shards_and_collectives_to_the_byte(world, replicas, accumulate, scoring, tied):
    """Local bytes of weights, gradients and moments of rank 0, and every message of one step."""
    sizes = (64, 2, 128, 4, 2, 515)
    cfg = settings(
        model={"activation_checkpointing": "full"},
        parallel={"replicas": replicas, "accumulate": accumulate},
    )
    shape, batches = model_shape(qwen(sizes, tied=tied)), 3
    with fake_world(world, replicas) as mesh:
        policy = sharded(causal_lm(sizes, cfg, tied), mesh, cfg)
        optimizer = build_optimizer(policy.parameters(), cfg.optim)
        held = sum(p.to_local().nbytes for p in policy.parameters())
        batch = full_batch(32, 2)
        with Collectives() as seen:
            sharded_step(policy, optimizer, batch, micro_batches=batches, scoring=scoring)
        moments = sum(
            value.to_local().nbytes
            for state in optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        )
        del policy, optimizer
    want = parts(shape, cfg, "update", world=world, cuda=False)
    assert (held, held, moments) == (want["weights"], want["gradients"], want["optimiser"])
    moved = communication(
        shape, cfg, world=world, micro_batches=batches, scoring_batches=scoring, cuda=False
    )
    refresh = moved.pop("replica refresh", None)
    assert set(seen.calls) == {kind for kind, traffic in moved.items() if traffic.calls}
    shards = world // replicas
    for kind, traffic in moved.items():
        assert traffic.calls == seen.calls[kind], kind
        # of a gathered tensor a rank already has its own shard; a sum goes around twice
        share = (shards - 1) / shards if kind != "all-reduce" else 2 * (replicas - 1) / replicas
        assert traffic.total == pytest.approx(share * seen.bytes[kind], rel=1e-9), kind
        assert traffic.inside >= 0
        nodes = {"all-reduce": replicas > 8 // min(8, shards)}.get(kind, shards > 8)
        assert (traffic.between > 0) == nodes, kind
    if refresh is not None:  # every unit once, in bfloat16
        assert refresh.total == (shards - 1) * want["weights"] // 2
        assert refresh.calls == len(shape.units)


@pytest.mark.parametrize(("world", "replicas"), [(1, 1), (8, 1), (64, 1), (64, 8), (512, 1)])
def test_shards_of_a_7b_model_to_the_byte(world, replicas):
    """The published shapes without storage; dimensions that the world does not divide included."""
    hf = qwen(PUBLISHED["7b"][0])
    cfg = settings(parallel={"replicas": replicas})
    with torch.device("meta"):
        model = Qwen2ForCausalLM._from_config(hf, attn_implementation=attention.register())
    with fake_world(world, replicas) as mesh:
        policy = sharded(model.float(), mesh, cfg)
        held = sum(p.to_local().nbytes for p in policy.parameters())
        del policy, model
    assert held == parts(model_shape(hf), cfg, world=world)["weights"]


def peak_bytes(run, tmp_path):
    """What a run allocates at its highest above what was alive before, by torch's allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    alive = peak = 0
    for _, change in sorted(
        (e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"
    ):
        alive += change
        peak = max(peak, alive)
    return peak


# A CPU without bfloat16 units takes 22 s for one micro-batch of 768 tokens, and float32 0.7 s.
TOKENS = {"float32": 768, "bfloat16": 256}
THERE = ("weights", "masters", "optimiser", "sampling replica")
MEASURED = [
    # (dtype, checkpointing, processes, tied); 0 processes: not sharded
    pytest.param("float32", "none", 0, False, marks=pytest.mark.slow),
    ("float32", "full", 0, True),
    ("bfloat16", "none", 0, False),
    ("bfloat16", "selective", 8, False),
    ("float32", "selective", 0, False),
    ("bfloat16", "full", 8, False),
    ("bfloat16", "none", 8, True),
    ("float32", "full", 8, False),
    pytest.param("bfloat16", "full", 1, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "grade", "world", "tied"), MEASURED)
def test_estimated_peaks_are_the_measured_ones(dtype, grade, world, tied, tmp_path):
    """A step of two micro-batches on a CPU, real memory of rank 0, within 10 % of the estimate."""
    cfg = settings(
        model={"dtype": dtype, "activation_checkpointing": grade},
        parallel={"shard": "always" if world else "never"},
        train={"micro_batch_tokens": TOKENS[dtype]},
    )
    batch = full_batch(TOKENS[dtype])
    if world:
        peak = peak_of_shards(cfg, batch, tmp_path, world=world, tied=tied)
    else:
        peak = peak_of_whole(cfg, batch, tmp_path, tied=tied)
    want = planned_peak(model_shape(qwen(SMALL, tied=tied)), cfg, world=max(1, world))
    assert peak == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("replicas", [1, 2])
def test_estimated_peaks_where_nobody_has_another_shard(replicas, tmp_path):
    """Of blocks that outweigh the head, as in real models: what waits of a block is seen."""
    sizes, tokens = (512, 4, 2048, 8, 2, 501), 512
    cfg = settings(
        model={"dtype": "float32", "activation_checkpointing": "full"},
        parallel={"replicas": replicas},
        train={"micro_batch_tokens": tokens},
    )
    peak = peak_of_shards(cfg, full_batch(tokens), tmp_path, world=replicas, sizes=sizes)
    want = planned_peak(model_shape(qwen(sizes)), cfg, world=replicas)
    assert peak == pytest.approx(want, rel=0.05)


def planned_peak(shape, cfg, *, world=1, left_out=("sampling",)):
    """The largest phase of a training step, without what is there before it."""
    found = estimate_memory(shape, cfg, world=world, cuda=False, context=1, prompt=1)
    return max(
        sum(size for part, size in sizes.items() if part not in THERE)
        for phase, sizes in found.phases.items()
        if phase not in left_out
    )


def peak_of_shards(cfg, batch, tmp_path, *, world, sizes=SMALL, tied=False):
    """Of a second step of two micro-batches, on rank 0."""
    with fake_world(world, cfg.parallel.replicas) as mesh:
        policy = sharded(causal_lm(sizes, cfg, tied), mesh, cfg)
        optimizer = build_optimizer(policy.parameters(), cfg.optim)
        step = partial(sharded_step, policy, optimizer, batch, micro_batches=2)
        step()
        return peak_bytes(step, tmp_path)


def peak_of_whole(cfg, batch, tmp_path, *, tied=False):
    """Of a second step of two micro-batches, of weights that are not cut."""
    policy = random_policy(qwen(SMALL, tied=tied), cfg.model, ALONE, cfg.parallel)
    apart = {"masters": policy.masters, "hosted": policy.hosted}
    optimizer = build_optimizer(policy.parameters(), cfg.optim, **apart)

    def step():
        for last in (False, True):
            policy.expect_backward(last=last)
            policy(batch).loss.backward()
        apply_update(optimizer, lr=1e-3, max_grad_norm=1.0)

    step()
    return peak_bytes(step, tmp_path)


@pytest.mark.parametrize(("hosted", "master"), [(True, "float32"), (True, "bfloat16"),
                                                (False, "bfloat16")])  # fmt: skip
def test_estimated_peaks_of_whole_half_precision_weights(hosted, master, tmp_path):
    """Gradients in float32 beside weights in bfloat16; what lies in host memory is not torch's."""
    half = master == "bfloat16"
    cfg = settings(
        model={"activation_checkpointing": "full", "master_dtype": master},
        parallel={"shard": "never", "cpu_offload": hosted},
        train={"micro_batch_tokens": TOKENS["bfloat16"]},
        optim={"name": "adamw_bf16", "stochastic_rounding": True} if half else {},
    )
    peak = peak_of_whole(cfg, full_batch(TOKENS["bfloat16"]), tmp_path)
    # What no block bounds is updated on a CPU in smaller chunks than on CUDA.
    left_out = ("sampling",) if hosted else ("sampling", "update")
    want = planned_peak(model_shape(qwen(SMALL)), cfg, left_out=left_out)
    assert peak == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "world"),
    [("float32", 0), ("float32", 8), pytest.param("bfloat16", 0, marks=pytest.mark.slow)],
)
def test_a_forward_without_gradients_takes_at_most_what_is_planned(dtype, world, tmp_path):
    """And at least half of it: the plan adds up what lies beside each other for a moment only."""
    tokens = TOKENS[dtype]
    cfg = settings(
        model={"dtype": dtype},
        parallel={"shard": "always" if world else "never"},
        train={"score_tokens": tokens},
    )
    batch = full_batch(tokens)
    if world:
        with fake_world(world) as mesh:
            policy = sharded(causal_lm(SMALL, cfg, False), mesh, cfg)
            peak = peak_bytes(lambda: policy.logprob(batch), tmp_path)
            del policy
    else:
        policy = random_policy(qwen(SMALL), cfg.model, ALONE, cfg.parallel)
        policy.logprob(batch)
        peak = peak_bytes(lambda: policy.logprob(batch), tmp_path)
    shape = model_shape(qwen(SMALL))
    found = estimate_memory(shape, cfg, world=max(1, world), cuda=False, context=1, prompt=1)
    sizes = found.phases["scoring"].items()
    planned = sum(size for part, size in sizes if part not in THERE)
    assert planned / 2 <= peak <= planned


@pytest.mark.gpu
@pytest.mark.parametrize("grade", ["none", "selective", "full"])
def test_estimated_peaks_hold_on_a_gpu(grade):
    """One process on CUDA, sharded as `auto` does: what its allocator says, states included."""
    sizes, tokens = (1024, 6, 4096, 16, 4, 32768), 8192
    cfg = settings(
        model={"activation_checkpointing": grade},
        train={"micro_batch_tokens": tokens},
        loss={"backend": "torch"},
    )
    world = open_world(cfg.parallel, "cuda")
    policy = Policy(causal_lm(sizes, cfg, tied=False), dtype=torch.bfloat16, backend="torch")
    policy.to(world.device).shard(world, cfg.parallel)
    optimizer = build_optimizer(policy.parameters(), cfg.optim)
    batch = full_batch(tokens)
    sharded_step(policy, optimizer, batch, micro_batches=2)
    torch.cuda.reset_peak_memory_stats()
    sharded_step(policy, optimizer, batch, micro_batches=2)
    peak = torch.cuda.max_memory_allocated()
    del policy, optimizer
    world.close()
    found = estimate_memory(model_shape(qwen(sizes)), cfg, context=1, prompt=1)
    phases = {name: dict(sizes) for name, sizes in found.phases.items() if name != "sampling"}
    want = max(sum(s.values()) - s["sampling replica"] for s in phases.values())
    assert peak == pytest.approx(want, rel=0.1)


# --- what memory decides --------------------------------------------------------------------------


def chosen(cfg, device_bytes, *, world=4, cuda=True):
    shape = model_shape(qwen(SMALL))
    given = {"world": world, "context": 100, "prompt": 10}
    return choose(lambda: shape, cfg, cuda=cuda, device_bytes=device_bytes, **given)


def test_a_null_key_becomes_the_fastest_that_fits_to_the_byte():
    """In this order: what a layer keeps, then whole gradients; the smallest where nothing fits."""
    cfg, shape = settings(), model_shape(qwen(SMALL))
    order = [(g, a) for g in ("selective", "full") for a in ("unsharded", "sharded")]
    peaks = []
    for grade, accumulate in order:
        given = settings(
            model={"activation_checkpointing": grade}, parallel={"accumulate": accumulate}
        )
        peaks.append(estimate_memory(shape, given, world=4, context=100, prompt=10).peak)
    # Here whole gradients take more than what `selective` keeps of three small layers.
    assert peaks[0] > peaks[2] > peaks[1] >= peaks[3]

    def at(cfg, peak, less=0):
        found = chosen(cfg, math.ceil(peak / (1 - RESERVE)) - less)
        return order.index((found.grade, found.accumulate)), found

    assert [at(cfg, peaks[n], less)[0] for n in (0, 1) for less in (0, 2)] == [0, 1, 1, 3]
    full = settings(model={"activation_checkpointing": "full"})
    assert [at(full, peaks[n], less)[0] for n in (2, 3) for less in (0, 2)] == [2, 3, 3, 3]
    room = peaks[0] / GIB
    assert f"(estimated peak {room:.1f} of {room:.1f} GiB)" in at(cfg, peaks[0])[1].reason
    found = at(cfg, peaks[3], 2)[1]
    assert found.reason.startswith(
        "model.activation_checkpointing null: full; parallel.accumulate null: sharded (est"
    )
    made = found.made(cfg)
    assert made.model.activation_checkpointing == "full"
    assert replace(made, model=cfg.model, parallel=cfg.parallel) == cfg


def test_a_key_that_is_set_stays_and_a_cpu_keeps_the_least():
    both = {"model": {"activation_checkpointing": "none"}, "parallel": {"accumulate": "sharded"}}
    assert chosen(settings(**both), 1) == Choice("none", "sharded")
    one = chosen(settings(model={"activation_checkpointing": "full"}), 2**50)
    assert (one.grade, one.accumulate) == ("full", "unsharded")
    assert one.reason.startswith("parallel.accumulate null: unsharded (estimated")
    half = {"model": {"master_dtype": "bfloat16"}, "optim": {"stochastic_rounding": True}}
    assert chosen(settings(**half), 1) == replace(
        chosen(settings(**half), 1), grade="full", accumulate="unsharded"
    )
    assert chosen(settings(model={"compile": True}), 2**50).grade == "full"
    here = settings(parallel={"shard": "auto", "cpu_offload": True})
    alone = chosen(here, 2**50, world=1)
    assert (alone.grade, alone.accumulate) == ("selective", "sharded")
    assert "accumulate" not in alone.reason
    for cfg, sums in ((settings(), "sharded"), (settings(**half), "unsharded")):
        assert chosen(cfg, 2**50, cuda=False) == Choice("full", sums)
    recorded = settings(train={"record": "paths"}).asked
    assert chosen(recorded, 2**50) == Choice("full", "sharded")


def test_what_trains_slowly_on_cuda_is_said_with_its_price(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    cfg = settings(model={"attention": "auto"})
    liger, flash = slow_layers(cfg, attention="varlen", cuda=True)
    assert liger.startswith("liger-kernel is not installed: norms, rotations and SwiGLU run op")
    assert "about 10 % faster, by arithmetic" in liger
    assert flash.startswith("attention varlen, not flash: with FlashAttention training is about 7")
    assert all(line.endswith("pip install 'vpgea_fast[gpu]'") for line in (liger, flash))
    assert [*slow_layers(cfg, attention="flash", cuda=True)] == [liger]
    never = settings(model={"attention": "sdpa", "liger": "never"})
    assert [*slow_layers(never, attention="sdpa", cuda=True)] == []
    assert [*slow_layers(cfg, attention="sdpa", cuda=False)] == []


# --- presets --------------------------------------------------------------------------------------


CHOSEN = {
    "1.5b": ("selective", "sharded"),  # which says nothing of one process
    "7b": ("selective", "sharded"),
    "7b-multinode": ("selective", "sharded"),
    "7b-1gpu": ("full", "sharded"),
}
"""On cards of 80 GB, of what memory decides."""


@pytest.mark.parametrize("gib", [79.2, 139.0])
@pytest.mark.parametrize("engine", ["vllm", "hf"])
@pytest.mark.parametrize(
    ("name", "model", "processes"),
    [("1.5b", "1.5b", 1), ("7b", "7b", 8), ("7b-multinode", "7b", 16), ("7b-1gpu", "7b", 1)],
)
def test_a_preset_fits_its_card_at_its_limits(name, model, processes, engine, gib):
    """80 GB or 141 GB, with 5 GiB to spare. Prompts and paths as long as its keys allow;
    test_needs.py holds it to its comment."""
    file, hf = ROOT / f"configs/{name}.yaml", qwen(PUBLISHED[model][0])
    words = {"vllm": [], "hf": ["--engine", "hf", "--rollout.max_batch", "64"]}[engine]
    cfg = config.load(file, words)
    on = target(cfg, processes=processes, device_gib=gib)
    check_config(cfg, hf, processes, on=on)
    shape = model_shape(hf)
    asked = {
        "world": processes,
        "context": positions(cfg),
        "prompt": cfg.data.max_prompt_tokens,
        "device_bytes": on.device_bytes,
    }
    choice = choose(lambda: shape, cfg, cuda=True, **asked)
    if gib < 80:
        assert (choice.grade, choice.accumulate) == CHOSEN[name]
    found = estimate_memory(shape, choice.made(cfg), **asked)
    assert found.peak <= (1 - RESERVE) * on.device_bytes
    assert on.device_bytes - found.peak >= 5 * GIB


def test_what_no_memory_decides_is_settled_without_a_model():
    """A null key has the value that `choose` gives it on the smallest and the largest device."""

    def keys(cfg):
        return cfg.model.activation_checkpointing, cfg.parallel.accumulate

    cfg = settings(parallel={"shard": "auto"})
    cases = {
        (1, False): ("full", "sharded"),
        (4, False): ("full", "sharded"),
        (1, True): (None, "sharded"),
        (4, True): (None, None),
    }
    own = {"activation_checkpointing": "none"}
    given = settings(model=own, parallel={"accumulate": "unsharded"})
    for (world, cuda), expected in cases.items():
        assert keys(settled(cfg, world=world, cuda=cuda)) == expected
        found = [chosen(cfg, size, world=world, cuda=cuda) for size in (1, 1 << 60)]
        each = zip(*((choice.grade, choice.accumulate) for choice in found), strict=True)
        # Null where the two devices differ.
        assert expected == tuple(one if one == two else None for one, two in each)
        assert settled(given, world=world, cuda=cuda) == given


def test_the_committed_scale_table_is_the_estimators(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale_table

    committed = json.loads((ROOT / "benchmarks/results/scale_table.json").read_text())
    assert {(r["model"], r["gpus"]) for r in committed["rows"]} == {
        (model, gpus) for model in scale_table.MODELS for gpus in (1, 8, 64, 512)
    }
    args = type("Args", (), committed["settings"])
    for known in committed["rows"][4::5]:  # every fifth line: the whole table takes 4 s
        shape = scale_table.shape_of(known["model"])
        fresh = scale_table.row(known["model"], shape, known["gpus"], known["copies"], args)
        assert json.loads(json.dumps(fresh)) == known


# --- bad input ------------------------------------------------------------------------------------

GPUS = Target(8, 80 * GIB, cuda=True, here=False)
LAPTOP = Target(1, 16 * GIB, cuda=False)


def question(student=5, teacher=9, target_tokens=4):
    def ids(n):
        return torch.zeros(n, dtype=torch.long)

    return PromptedQuestion(
        question=Question(id="q", text="x", answer="y"),
        student_ids=ids(student),
        teacher_ids=ids(teacher),
        close_ids=ids(1),
        cue_ids=ids(3),
        target_ids=ids(target_tokens),
        variant_ids=(),
    )


@pytest.mark.parametrize(
    ("given", "hf", "on", "message"),
    [
        (
            {"parallel": {"replicas": 3}},
            {},
            GPUS,
            r"parallel\.replicas: got 3, expected a divisor of the 8",
        ),
        ({"parallel": {"shard": "never"}}, {}, GPUS, r"parallel\.shard: got 'never' with 8"),
        (
            {"parallel": {"tensor": "head"}},
            {},
            LAPTOP,
            r"parallel\.tensor: got 'head' with 1 processes",
        ),
        (
            {"parallel": {"tensor": "head"}},
            {"tie_word_embeddings": True},
            GPUS,
            r"parallel\.tensor: got 'head' for a model that ties its head",
        ),
        (
            {"parallel": {"tensor": "head"}, "model": {"master_dtype": "bfloat16"}}
            | {"optim": {"stochastic_rounding": True}},
            {},
            GPUS,
            r"parallel\.tensor: got 'head' with model\.master_dtype 'bfloat16'",
        ),
        (
            {},
            {"num_key_value_heads": 3},
            LAPTOP,
            r"num_attention_heads 8 .*is no multiple of num_key_value_heads 3",
        ),
        (
            {"train": {"micro_batch_tokens": 9000}},
            {},
            GPUS,
            r"train\.micro_batch_tokens: got 9000, but a row may have 10239 .*set it to 10239",
        ),
        (
            {},
            {"max_position_embeddings": 4096},
            LAPTOP,
            r"rollout\.max_new_tokens: got 8192.*4096 positions",
        ),
        (
            {"engine": {"name": "vllm", "context": 10239}},
            {},
            GPUS,
            r"a prompt of 2048 .* need 10240 positions.*10239 \(engine\.context\).*to 10240",
        ),
        (
            {"engine": {"name": "vllm", "tensor_parallel": 3}},
            {},
            GPUS,
            r"engine\.tensor_parallel: got 3, expected a divisor of the model's 8 attention heads",
        ),
        (
            {"parallel": {"cpu_offload": True}},
            {},
            LAPTOP,
            r"parallel\.cpu_offload: got true without a CUDA device.*set it to false",
        ),
        (
            {"parallel": {"cpu_offload": True}, "optim": {"name": "adamw_8bit"}},
            {},
            Target(1, GIB, cuda=True, here=False),
            r"optim\.name: got 'adamw_8bit' with parallel\.cpu_offload on one device.*adamw_bf16",
        ),
        (
            {"model": {"master_dtype": "bfloat16"}, "optim": {"stochastic_rounding": True}}
            | {"parallel": {"accumulate": "sharded"}},
            {},
            GPUS,
            r"parallel\.accumulate: got 'sharded' with model\.master_dtype 'bfloat16'",
        ),
        (
            {"model": {"liger": "always"}},
            {},
            LAPTOP,
            r"model\.liger: got 'always', but there is no",
        ),
        ({"model": {"attention": "flash"}}, {}, LAPTOP, r"model\.attention: got 'flash', which"),
    ],
)
def test_what_cannot_work_is_refused_with_key_and_remedy(given, hf, on, message):
    tree = {"model": {}, "parallel": {}, "train": {"micro_batch_tokens": 16384}} | given
    cfg = config.resolve(tree)
    with pytest.raises(ValueError, match=message):
        check_config(cfg, qwen(SMALL, **hf), on.processes, on=on)


def test_the_context_is_that_of_the_longest_path_of_every_kind():
    """A teacher's prompt of 9 tokens; a student's of 5, a thought of 90, its closing token, and an
    answer of 7; a benchmark's of 6, 95 and 7. What a server has, only it knows."""
    other = {"data": {"max_prompt_tokens": 50}, "scoring": {"u_source": "likelihood"}}

    def check(context, benchmarks=(), **given):
        cfg = config.resolve(
            {
                "rollout": {"max_new_tokens": 90, "max_answer_tokens": 7},
                "engine": {"name": "vllm", "context": context},
                "eval": {"max_new_tokens": 95},
            }
            | other
            | given
        )
        check_config(
            cfg, qwen(SMALL), 8, questions=[question()], benchmarks=dict(benchmarks), on=GPUS
        )

    def refuse(needed, match, **given):
        check(needed, **given)
        with pytest.raises(ValueError, match=f"{match} .*need {needed} positions.*engine.context"):
            check(needed - 1, **given)
        check(needed - 1, engine="hf", **given)

    refuse(99, "question q: a prompt of 9")
    answers = {"u_source": "accuracy"}
    refuse(103, "question q, answers after its thought: a prompt of 96", scoring=answers)
    item = (Question(id="b", text="x", answer="y"), torch.zeros(6, dtype=torch.long))
    test = [("test", Benchmark((item,), {}, ""))]
    refuse(108, "benchmark test, question b: a prompt of 6", benchmarks=test)
    check(10, engine={"name": "vllm", "context": 10, "server": "http://127.0.0.1:8000"})


def test_a_missing_compiler_is_found_before_the_first_step(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cfg = config.resolve({"model": {"compile": True}})
    with pytest.raises(
        config.ConfigError, match=r"model\.compile: got true, but there is no C\+\+"
    ):
        check_config(cfg, qwen(SMALL), 1, on=LAPTOP)


def test_a_missing_torchao_is_found_before_the_first_step():
    if importlib.util.find_spec("torchao") is not None:
        pytest.skip("torchao is installed here")
    eight = {"optim": {"name": "adamw_8bit"}}
    cfg = config.resolve(eight | {"parallel": {"shard": "always"}})
    with pytest.raises(ValueError, match=r"optim\.name: 'adamw_8bit' needs torchao"):
        check_config(cfg, qwen(SMALL), 1, on=LAPTOP)
    # Nor are there others beside the masters of one device.
    for on in (GPUS, LAPTOP):
        with pytest.raises(ValueError, match=r"'adamw_8bit' with float32 masters .* set mod"):
            check_config(config.resolve(eight), qwen(SMALL), 1, on=on)


def test_the_longest_row_is_that_of_the_questions_that_are_there():
    """A teacher's prompt of 9 tokens and 90 new ones fit 98 packed tokens; scoring needs the
    student's 5, the thought, its closing token, a cue of 3 and the answer."""

    def check(budget, *questions, **given):
        cfg = config.resolve(
            {
                "train": {"micro_batch_tokens": budget},
                "rollout": {"max_new_tokens": 90},
                "data": {"max_prompt_tokens": 50},
            }
            | given
        )
        check_config(cfg, qwen(SMALL), 1, questions=questions, on=LAPTOP)

    check(102, question())
    with pytest.raises(config.ConfigError, match="a row may have 102 tokens"):
        check(101, question())
    with pytest.raises(config.ConfigError, match="a row may have 103 tokens"):
        check(102, question(), question(target_tokens=5))
    check(98, question(), scoring={"u_source": "accuracy"})
    with pytest.raises(config.ConfigError, match="a row may have 98 tokens"):
        check(97, question(), scoring={"u_source": "accuracy"})
    with pytest.raises(config.ConfigError, match="a row may have 139 tokens"):
        check(102)
    # Each budget for itself: a row is never cut where it is scored either.
    check(102, question(), train={"micro_batch_tokens": 102, "score_tokens": 102})
    with pytest.raises(config.ConfigError, match=r"train\.score_tokens: got 101.*102 tokens"):
        check(102, question(), train={"micro_batch_tokens": 102, "score_tokens": 101})


def test_a_tokenizer_of_another_model_is_refused(tiny_tokenizer):
    size = max(tiny_tokenizer.get_vocab().values()) + 1
    for vocabulary, good in ((size, True), (size - 1, False)):
        hf = qwen((*SMALL[:-1], vocabulary))
        if good:
            check_text(tiny_tokenizer, hf, config.resolve({}).model.path)
            continue
        with pytest.raises(ModelError, match=f"the model embeds {vocabulary} tokens"):
            check_text(tiny_tokenizer, hf, config.resolve({}).model.path)

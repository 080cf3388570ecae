"""What a configuration needs, from config.json alone: memory of one device and of the host by phase
and purpose, and the bytes that one device moves in a step.

L layers, D hidden, Q and K widths of queries and keys, F inner MLP, V vocabulary, T packed tokens,
P parameters, W processes, S = W / replicas of them share one copy of the model. Bytes: s forward
dtype, m master dtype, r reduction (4; 8 for float64), x residual stream (s when sharded, m under
autocast).

A sharded model lies in units that are gathered whole, used, and freed: every block, the embedding,
the head (with the embedding when tied), and the root, which holds the final norm. A process holds
ceil(rows / S) rows of every parameter.

| phase     | beyond weights, optimiser, sampling replica                                         |
| head      | block inputs (or all activations), gathered head, its dW (r V D), chunks of logits  |
| backward  | the same inputs, one block's inner tensors, its unit and the next, its gradients,   |
|           | their reduction buffer, and the head's                                              |
| embedding | a dense V D gradient and its reduction buffer                                       |
| update    | reduced gradients, scratch of the optimiser                                         |
| sampling  | KV cache, prefill, logits (no gradients); or vLLM, awake                            |
| scoring   | vLLM in the training processes, awake for train.resample_rounds beside a forward    |
|           | without gradients                                                                   |
| sync      | vLLM only: a gathered unit, its tensors on their way, vLLM's weights if it is here  |

vLLM awake is its weights / tensor_parallel, its work and its KV cache: together engine.gpu_memory
of the device, unless engine.kv_cache_gib sizes the cache. Asleep, in the other phases, weights and
cache are gone; on a CPU it never sleeps. None of this was measured on a GPU.

Checked by simulation without a GPU (tests/test_estimate.py): shards and communication to the byte
under a fake process group, the phases against measured peaks on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vpgea_fast.activations import kept_width
from vpgea_fast.config import Config
from vpgea_fast.model_dir import decoder_layers

Shapes = tuple[tuple[int, ...], ...]

KEYS = {
    "weights": "more processes, model.master_dtype bfloat16, or parallel.cpu_offload",
    "optimiser": "optim.name (adamw_bf16, adamw_8bit), more processes, or parallel.cpu_offload",
    "gradients": "parallel.accumulate sharded, more processes, or parallel.cpu_offload",
    "sampling replica": "parallel.shard never on one device (then there is none)",
    "forward copy": "model.dtype",
    "activations": "train.micro_batch_tokens, or model.activation_checkpointing full",
    "head": "train.micro_batch_tokens",
    "kv cache": "rollout.max_batch or rollout.max_new_tokens",
    "prefill": "rollout.max_batch or data.max_prompt_tokens",
    "logits": "rollout.max_batch",
    "scratch": "optim.name adamw",
    "vllm weights": "engine.tensor_parallel (engine.gpu_memory can then be smaller)",
    "vllm kv cache": "engine.gpu_memory or engine.kv_cache_gib",
    "vllm work": "rollout.max_batch",
}
"""Part -> what to lower, or to set, when it does not fit."""

HEAD_BYTES, HEAD_BYTES_CPU, TRITON_ROWS = 2**32, 48 << 20, 8448
"""Bytes of the logits of one chunk of the head, at most, and rows of one of the Triton head."""

RESERVE = 0.08
"""Share of a device left to the CUDA context, NCCL's buffers and the allocator's gaps: a choice,
not a measurement."""

GIB = 2**30

VLLM_TOKENS, VLLM_TOKENS_SMALL, VLLM_TOKENS_CPU = 16384, 8192, 4096
"""Tokens of one forward of vLLM 0.32: its default on a GPU of 70 GiB or more, on a smaller one (and
on an A100), and the least that its engine here asks for on a CPU."""

VLLM_KEPT = GIB
"""Bytes that vLLM keeps on a GPU asleep and awake: CUDA graphs, workspaces, the CUDA context of a
process of its own. A choice, not a measurement."""

STAGING = GIB
"""`rollout.vllm.transfer.CHUNK_BYTES`: weights that travel together into vLLM elsewhere."""


@dataclass(frozen=True)
class ModelShape:
    """A causal LM as its units see it: the shapes of their parameters, and the widths that size the
    activations. `head` is empty when tied: the embedding's unit holds the one weight."""

    blocks: tuple[Shapes, ...]
    embedding: Shapes
    head: Shapes
    root: Shapes
    hidden: int
    query: int
    key: int
    heads: int
    mlp: int
    vocabulary: int
    qk_norm: bool = False
    kept: int = 0
    """Widths of the products of one block that `selective` checkpointing keeps, together."""

    @property
    def tied(self) -> bool:
        return not self.head

    @property
    def units(self) -> dict[str, Shapes]:
        """name -> shapes, in the order in which a forward gathers them."""
        named = {"root": self.root, "embedding": self.embedding}
        named |= {f"block {i}": shapes for i, shapes in enumerate(self.blocks)}
        return named if self.tied else {**named, "head": self.head}

    @property
    def parameters(self) -> int:
        return sum(_numel(shapes) for shapes in self.units.values())


def model_shape(config: Any) -> ModelShape:
    """The shape of a transformers configuration; the model is made on the meta device (0.3 s)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    tied = bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    units: dict[str, Any] = {"embedding": model.get_input_embeddings()}
    if not tied:
        units["head"] = model.get_output_embeddings()
    blocks = decoder_layers(model)
    widest = max(max(p.shape) for p in blocks[0].parameters() if p.ndim == 2)
    inside = {id(p) for part in (*units.values(), *blocks) for p in part.parameters()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return ModelShape(
        blocks=tuple(_shapes(block.parameters()) for block in blocks),
        embedding=_shapes(units["embedding"].parameters()),
        head=() if tied else _shapes(units["head"].parameters()),
        root=_shapes(p for p in model.parameters() if id(p) not in inside),
        hidden=config.hidden_size,
        query=config.num_attention_heads * head_dim,
        key=kv_heads * head_dim,
        heads=config.num_attention_heads,
        mlp=getattr(config, "intermediate_size", None) or widest,  # GPT-2's kind has another name
        vocabulary=config.vocab_size,
        qk_norm=any("q_norm" in name for name, _ in blocks[0].named_parameters()),
        kept=max(map(kept_width, blocks)),
    )


@dataclass(frozen=True)
class Layout:
    """How a configuration lies on `world` processes, and the bytes of its dtypes."""

    shape: ModelShape
    cfg: Config
    world: int
    cuda: bool

    @property
    def sharded(self) -> bool:
        wish = self.cfg.parallel.shard
        return wish == "always" or (wish == "auto" and (self.world > 1 or self.cuda))

    @property
    def shards(self) -> int:
        return self.world // self.cfg.parallel.replicas if self.sharded else 1

    @property
    def forward(self) -> int:
        return getattr(torch, self.cfg.model.dtype).itemsize

    @property
    def master(self) -> int:
        if self.cfg.model.dtype == "float64":
            return 8
        return getattr(torch, self.cfg.model.master_dtype).itemsize

    @property
    def reduce(self) -> int:
        return max(4, self.forward)

    @property
    def autocast(self) -> bool:
        return not self.sharded and self.forward != self.master

    @property
    def residual(self) -> int:
        return self.master if self.autocast else self.forward

    def local(self, shapes: Shapes) -> int:
        """Elements of a unit that one process holds, rounded up to whole rows."""
        return sum(_rows(shape, self.shards) for shape in shapes)

    @property
    def held(self) -> int:
        return sum(self.local(shapes) for shapes in self.shape.units.values())


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of a vLLM in the training processes on one device: what is there while it is awake,
    what of it (`kept`) stays on a GPU while it sleeps, and one `token` in its KV cache."""

    weights: int
    work: int
    cache: int
    kept: int
    token: int

    @property
    def tokens(self) -> int:
        """That the KV cache holds."""
        return self.cache // self.token

    @property
    def least(self) -> int:
        """All but the KV cache."""
        return self.weights + self.work + self.kept

    @property
    def parts(self) -> dict[str, int]:
        sizes = (self.weights, self.cache, self.work, self.kept)
        names = ("vllm weights", "vllm kv cache", "vllm work", "vllm graphs")
        return dict(zip(names, sizes, strict=True))

    def asleep(self, *, cuda: bool) -> dict[str, int]:
        """What lies beside the training. On a CPU there is no sleep."""
        gone = ("vllm weights", "vllm kv cache") if cuda else ()
        return {name: n for name, n in self.parts.items() if name not in (*gone, "vllm work")}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by phase and purpose on one device; `host` is one process's share of host memory,
    `engine` the vLLM on the device.

    `parts` has the largest of every purpose over the phases, `peak` is the largest phase.
    """

    phases: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]
    parameters: int
    engine: EngineMemory | None = None

    @property
    def phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.phase].values())

    @property
    def parts(self) -> dict[str, int]:
        names = [name for parts in self.phases.values() for name in parts]
        return {n: max(p.get(n, 0) for p in self.phases.values()) for n in dict.fromkeys(names)}

    def lower(self) -> tuple[str, str]:
        """The largest part of the peak that a key changes, and what to lower or set."""
        parts = {name: size for name, size in self.phases[self.phase].items() if name in KEYS}
        largest = max(parts, key=lambda name: parts[name])
        return largest, KEYS[largest]


def estimate_memory(
    shape: ModelShape,
    cfg: Config,
    *,
    world: int = 1,
    cuda: bool = True,
    context: int,
    prompt: int,
    device_bytes: int | None = None,
) -> MemoryEstimate:
    """Peak memory of one device. `context` tokens of the longest sampled sequence, `prompt` of the
    longest prompt; vLLM on CUDA also needs to know the device's size.

    An upper estimate: every micro-batch is full, every row is trained, all paths of a batch reach
    the longest length together. Not counted: what torch does not allocate (see RESERVE).
    """
    lay = Layout(shape, cfg, world, cuda)
    offload, replica = cfg.parallel.cpu_offload, shape.parameters * lay.forward
    states = {
        "weights": 0 if offload else lay.held * lay.master,
        "optimiser": 0 if offload else optimizer_bytes(lay),
        "sampling replica": replica if lay.sharded and cfg.engine.name == "hf" else 0,
    }
    copies = {"forward copy": replica if lay.autocast else 0}
    engine = _engine(lay, context=context, device_bytes=device_bytes) if cfg.colocated else None
    beside = {**states, **(engine.asleep(cuda=cuda) if engine else {})}
    gradients = _gradients(lay)
    phases = {name: {**beside, **parts} for name, parts in _training(lay, gradients).items()}
    if cfg.model.activation_checkpointing == "none":  # else freed before the head
        phases = {name: {**parts, **copies} for name, parts in phases.items()}
    phases["update"] = {**beside, "gradients": gradients["reduced"], "scratch": _scratch(lay)}
    if cfg.engine.name == "hf":
        phases["sampling"] = {**states, **_sampling(lay, context=context, prompt=prompt), **copies}
        return MemoryEstimate(phases, _host(lay), shape.parameters)
    awake = {**states, **(engine.parts if engine else {})}
    probe = {"units": _scoring(lay)["units"]} if engine else {}  # a few tokens are scored then
    phases["sampling"] = {**awake, **probe}
    scored = cfg.objective.scores_answers and cfg.scoring.u_source == "likelihood"
    if engine and scored and cfg.train.resample_rounds:
        phases["scoring"] = {**awake, **_scoring(lay), **copies}
    weights = {"vllm weights": engine.weights} if engine else {}
    phases["sync"] = {**beside, **weights, **_hand_over(lay)}
    return MemoryEstimate(phases, _host(lay), shape.parameters, engine)


def _training(lay: Layout, gradients: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The four moments of a micro-batch, not the first of its step, that can be the highest."""
    shape, s, r = lay.shape, lay.forward, lay.reduce
    tokens, layers = lay.cfg.train.micro_batch_tokens, len(shape.blocks)
    kept, inner = _activations(lay)
    held = {"gradients": gradients["training"], "activations": layers * kept * tokens}
    # Units exist when the model is sharded; a gather has a flat copy when there is a peer.
    block = max(map(_numel, shape.blocks)) * lay.sharded
    head = _numel(shape.head or shape.embedding) * lay.sharded
    embedding = _numel(shape.embedding)
    sharded_sum = lay.sharded and lay.cfg.parallel.accumulate == "sharded"
    flat = lay.shards > 1
    pair = block * s * (1 + flat)
    # From its forward on the head stays whole, with its dW, to the end of the step; the embedding
    # to its backward.
    head_stays = head * (s + r)
    waiting = head_stays + (0 if shape.tied else embedding * s * lay.sharded)
    # FSDP2 keeps the last reduction's buffer, the embedding's, until the next backward reduces.
    buffer = embedding * r if sharded_sum and flat and not shape.tied else 0
    down = shape.mlp * shape.hidden * s * lay.sharded
    reduction = max(pair + block * (s + r) + waiting, 2 * head * r)
    dense = embedding * s + (embedding * r + 2 * embedding * r // lay.shards) * lay.sharded
    return {
        "head": {**held, "head": _head(lay), "units": waiting + max(buffer, head * s * flat)},
        "backward": {
            **held,
            "activations": (layers * kept + inner) * tokens,
            "units": pair + down + waiting + max(0, block * r - kept * tokens),
        },
        "reduction": {**held, "units": reduction},
        "embedding": {"gradients": gradients["training"], "units": head_stays + dense},
    }


def optimizer_bytes(lay: Layout) -> int:
    """Of the moments of one process's shards."""
    name, held = lay.cfg.optim.name, lay.held
    if name == "adamw_8bit":
        return sum(
            _eight_bit(_rows(shape, lay.shards), lay.master)
            for shapes in lay.shape.units.values()
            for shape in shapes
        )
    return 2 * held * (2 if name == "adamw_bf16" else max(4, lay.master))


def _eight_bit(numel: int, master: int) -> int:
    """torchao: a byte an element, a float32 scale for 256, a table of 256; small ones whole."""
    if numel < 4096 or numel % 256:
        return 2 * numel * master
    return 2 * (numel + 4 * numel // 256 + 1024)


def _gradients(lay: Layout) -> dict[str, int]:
    """`reduced`: shards in the masters' dtype. `training`: what is held between micro-batches."""
    reduced = lay.held * lay.master
    if not lay.sharded:
        return {"training": reduced, "reduced": reduced}
    vocabulary = _numel(lay.shape.head or lay.shape.embedding)
    offload = lay.cfg.parallel.cpu_offload
    if lay.cfg.parallel.accumulate == "unsharded":
        training = (lay.shape.parameters - vocabulary) * lay.reduce  # the head's dW is in its unit
    elif lay.cfg.parallel.replicas > 1 or lay.master < lay.reduce:
        training = lay.held * max(lay.reduce, lay.master)  # summed as it was reduced, cast once
    else:
        training = 0 if offload else reduced
    return {"training": training, "reduced": 0 if offload else reduced}


def _activations(lay: Layout) -> tuple[int, int]:
    """(bytes a token that a layer keeps to the backward, bytes that one layer's backward adds).

    Of a layer autograd keeps, in Hugging Face's modules: of each norm a float32 copy of its input
    (the residual itself when it is float32), the normalised input and the output; q, k, v after the
    rotation, the attention's output and, when documents are attended one by one, their
    concatenation; of the MLP gate, its activation, up and the product. Liger, and a
    compiled layer, keep of a norm its input and output, of the MLP gate, up and the product. The
    backward of the MLP's product holds more gradients of width F: two, or one.
    """
    shape, model, s, x = lay.shape, lay.cfg.model, lay.forward, lay.residual
    d, q, k, f = shape.hidden, shape.query, shape.key, shape.mlp
    liger = model.liger == "always" or (model.liger == "auto" and lay.cuda and _has_liger())
    copies = 2 if model.attention == "sdpa" or not lay.cuda else 1
    attended = s * (copies * q + q + 2 * k) + 4 * shape.heads
    if model.compile or liger:
        saved, extra = 4 * x * d + attended + 3 * s * f, s * f
    else:
        inputs = 5 * s if lay.autocast and x != s else 2 * s  # autocast casts for each projection
        norms = 2 * (4 + x) * d + inputs * d
        saved, extra = norms + attended + 4 * s * f, 2 * s * f
    if shape.qk_norm:
        saved += (2 * x if model.compile or liger else 4 + x) * (q + k)
    if model.activation_checkpointing == "none":
        return saved, extra + 2 * s * d
    # The repetition makes neither what is kept nor, of a float32 input, a copy for the norm.
    kept, shared = x * d, x * d if x == 4 else 0
    if model.activation_checkpointing == "selective":
        kept += s * (q + shape.kept) + 4 * shape.heads
        rotated = min(shape.kept, q + k)  # autograd holds them after the rotation, beside these
        shared += s * (q + shape.kept - rotated) + 4 * shape.heads
    return kept, saved + extra + 2 * s * d - shared


def _head(lay: Layout) -> int:
    """Hidden states of the target rows and their gradient, the final norm, one chunk of logits with
    its operands, and under autocast the head's cast weight."""
    shape, tokens, s = lay.shape, lay.cfg.train.micro_batch_tokens, lay.forward
    wide, half = max(4, s), s < 4
    logit = {"triton": s, "reference": 4 * wide}.get(lay.cfg.loss.backend, wide + s * half)
    row = shape.vocabulary * logit
    rows = min(tokens, HEAD_BYTES // row) if lay.cuda else max(256, HEAD_BYTES_CPU // row)
    if lay.cfg.loss.backend == "triton":
        rows = min(rows, TRITON_ROWS)
    if lay.cfg.loss.backend == "reference":  # all logits, their log-softmax, two gradients
        rows = tokens
    rows = -(-tokens // -(-tokens // rows))  # chunks of equal size
    chunk = rows * (row + 2 * shape.hidden * wide)
    norm = tokens * shape.hidden * (4 + 2 * lay.residual)
    cast = shape.vocabulary * shape.hidden * s * lay.autocast
    return norm + 2 * tokens * shape.hidden * s + chunk + cast


def _sampling(lay: Layout, *, context: int, prompt: int) -> dict[str, int]:
    """KV cache of all paths decoded side by side, the forward of their distinct prompts, and the
    draw's (rows, V) numbers: logits, their float32 copy and log-probs, two in float64."""
    shape, rollout, s = lay.shape, lay.cfg.rollout, lay.forward
    rows, objective = rollout.max_batch, lay.cfg.objective
    shared = max(1, min(n for n in (objective.posterior_paths, objective.prior_paths) if n))
    prompts = min(rows, -(-rows // shared) + 1)
    prefill = prompts * prompt * s * (3 * shape.mlp + 2 * shape.hidden)
    return {
        "kv cache": 2 * len(shape.blocks) * rows * context * shape.key * s,
        "prefill": prefill,
        "logits": rows * shape.vocabulary * (s + 4 + 4 + 8 + 8),
    }


def _engine(lay: Layout, *, context: int, device_bytes: int | None) -> EngineMemory:
    """vLLM's share of one device. Its work is a forward of as many tokens as it batches, and for
    every path a row of logits with four float32 numbers more a column; a path's keys and values
    take 2 layers (K / tensor_parallel, at least one head) elements a token."""
    shape, vllm, s = lay.shape, lay.cfg.vllm, lay.forward
    group, rows = vllm.tensor_parallel, lay.cfg.rollout.max_batch
    untied = _numel(shape.embedding) if shape.tied and not lay.cuda else 0
    weights = -(-(shape.parameters + untied) * s // group)
    tokens = max(context, rows, VLLM_TOKENS_CPU)
    if lay.cuda:
        small = device_bytes is not None and device_bytes < 70 * GIB
        tokens = VLLM_TOKENS_SMALL if small else VLLM_TOKENS
    work = tokens * s * (3 * shape.mlp // group + 2 * shape.hidden)
    work += rows * shape.vocabulary * (s + 16)
    kept = VLLM_KEPT if lay.cuda else 0
    if vllm.kv_cache_gib is not None or not lay.cuda:
        cache = int((vllm.kv_cache_gib or 1) * GIB)
    elif device_bytes is None:
        raise ValueError(
            "device_bytes: got None, but engine.gpu_memory is a share of the device; give its "
            "bytes, or set engine.kv_cache_gib"
        )
    else:
        cache = max(0, int(vllm.gpu_memory * device_bytes) - weights - work - kept)
    width = max(shape.key // group, shape.query // shape.heads)
    return EngineMemory(weights, work, cache, kept, token=2 * len(shape.blocks) * width * s)


def _scoring(lay: Layout) -> dict[str, int]:
    """A forward without gradients: at most what one layer keeps and adds, the head as in training,
    the units that are whole for it."""
    shape, s = lay.shape, lay.forward
    block = max(map(_numel, shape.blocks)) * lay.sharded
    head = _numel(shape.head or shape.embedding) * lay.sharded
    embedding = 0 if shape.tied else _numel(shape.embedding) * lay.sharded
    flat = lay.shards > 1
    return {
        "activations": sum(_activations(lay)) * lay.cfg.train.micro_batch_tokens,
        "head": _head(lay),
        "units": s * (head + embedding + max(block * (1 + flat), head * flat)),
    }


def _hand_over(lay: Layout) -> dict[str, int]:
    """Weights on their way to vLLM. A sharded model gathers its largest unit. Inside the process
    vLLM holds a layer's tensors twice, as copies and as its own new ones, before they take the
    place of the old; elsewhere a tensor is copied into a buffer, or a file's worth into memory."""
    shape, vllm, s = lay.shape, lay.cfg.vllm, lay.forward
    unit = max(map(_numel, shape.units.values())) * lay.sharded
    tensor = s * max(math.prod(p) for unit_ in shape.units.values() for p in unit_)
    if lay.cfg.colocated and vllm.process == "shared":
        copies = 2 * max(tensor, 2 * shape.mlp * shape.hidden * s)
    elif lay.cfg.colocated and lay.cuda:
        copies = tensor + max(STAGING, tensor)
    elif lay.cuda:  # files are written from host memory
        copies = tensor + (STAGING if vllm.sync == "nccl" else 0)
    else:
        copies = tensor + min(shape.parameters * s, STAGING + tensor)
    return {"units": unit * s * (1 + (lay.shards > 1)), "hand-over": copies}


def _scratch(lay: Layout) -> int:
    """float32 copies of one chunk of `optim.RoundedAdamW` on CUDA; torch's fused step has none."""
    rounds = lay.cfg.optim.name == "adamw_bf16" or lay.master == 2
    if not rounds or lay.cfg.optim.name == "adamw_8bit" or lay.cfg.parallel.cpu_offload:
        return 0
    largest = max(_rows(shape, lay.shards) for u in lay.shape.units.values() for shape in u)
    return 8 * 4 * min(2**24, largest)


def _host(lay: Layout) -> dict[str, int]:
    states = lay.held * lay.master + optimizer_bytes(lay)
    host = {}
    if lay.cfg.parallel.cpu_offload:
        host = {"weights, optimiser": states, "gradients": lay.held * lay.master}
    if lay.cfg.checkpoint.background:
        host["checkpoint copy"] = states
    return host


# --- communication ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step, and the bytes that one device receives by them.

    `between`: what a node must get from the others, divided by its devices; `inside`: the rest.
    """

    calls: int
    inside: int
    between: int

    @property
    def total(self) -> int:
        return self.inside + self.between


def communication(
    shape: ModelShape,
    cfg: Config,
    *,
    world: int,
    node: int = 8,
    micro_batches: int = 1,
    scoring_batches: int = 0,
    cuda: bool = True,
) -> dict[str, Traffic]:
    """What FSDP2 moves in one step of `micro_batches` and `scoring_batches` a process, `node`
    devices a node.

    A micro-batch gathers every block twice (forward, backward), a scoring batch once. Embedding and
    root stay gathered from a scoring batch to the next backward, the head to the last one of the
    step: it is gathered and reduced once. The other gradients are reduced every micro-batch, or
    once when they accumulate unsharded. Replicas sum their shards once a step. At its end the
    sampling replica is filled, or vLLM's weights are.
    """
    lay = Layout(shape, cfg, world, cuda)
    if not lay.sharded or world == 1:
        return {}
    blocks = [lay.local(unit) for unit in shape.blocks]
    head = lay.local(shape.head or shape.embedding)
    ends = [lay.local(shape.root), *([] if shape.tied else [lay.local(shape.embedding)])]
    units = [*blocks, *ends, head]
    reductions = 1 if cfg.parallel.accumulate == "unsharded" else micro_batches
    gathers = [(n, 2 * micro_batches + scoring_batches) for n in blocks]
    gathers += [(n, max(1, micro_batches)) for n in ends] + [(head, 1)]
    scatters = [(n, reductions) for n in (*blocks, *ends)] + [(head, 1)]
    shards, replicas = lay.shards, cfg.parallel.replicas
    found = {
        "all-gather": _ring(gathers, lay.forward, group=shards, node=node),
        "reduce-scatter": _ring(scatters, lay.reduce, group=shards, node=node),
    }
    if replicas > 1:
        sums = [(n, 1) for n in units]
        found["all-reduce"] = _all_reduce(
            sums, lay.reduce, replicas=replicas, stride=shards, node=node
        )
    refresh = "replica refresh" if cfg.engine.name == "hf" else "weight sync"
    found[refresh] = _ring([(n, 1) for n in units], lay.forward, group=shards, node=node)
    return found


def _ring(units: Iterable[tuple[int, int]], size: int, *, group: int, node: int) -> Traffic:
    """All-gather or reduce-scatter over `group` neighbouring processes: (group - 1) shards a call,
    of which a node takes those of the other nodes once for all its devices."""
    if group == 1:
        return Traffic(0, 0, 0)
    calls = moved = 0
    for elements, count in units:
        calls += count
        moved += elements * size * count
    here = min(group, node)
    outside = moved * (group - here) // here
    return Traffic(calls, moved * (group - 1) - outside, outside)


def _all_reduce(
    units: Iterable[tuple[int, int]], size: int, *, replicas: int, stride: int, node: int
) -> Traffic:
    """A shard summed over `replicas` processes that are `stride` apart: a reduce-scatter and an
    all-gather of pieces of 1 / replicas."""
    here = max(1, min(replicas, node // stride))
    calls = moved = 0
    for elements, count in units:
        calls += count
        moved += elements * size * count
    total = 2 * moved * (replicas - 1) // replicas
    outside = 2 * moved * (replicas - here) // (replicas * here)
    return Traffic(calls, total - outside, outside)


def _shapes(parameters: Iterable[torch.Tensor]) -> Shapes:
    return tuple(tuple(p.shape) for p in parameters)


def _numel(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def _rows(shape: tuple[int, ...], shards: int) -> int:
    rows, *rest = shape or (1,)
    return -(-rows // shards) * math.prod(rest)


def _has_liger() -> bool:
    import importlib.util

    return importlib.util.find_spec("liger_kernel") is not None

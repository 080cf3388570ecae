"""Memory of one device and of the host, by phase and purpose (see the package's docstring)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vpgea_fast.config import Config
from vpgea_fast.estimate import forward
from vpgea_fast.estimate.layout import Layout, ModelShape, draws_itself, numel, rows_of
from vpgea_fast.hosted import BLOCK, DEPTH
from vpgea_fast.objectives import policy_rows, reads_reference, scores_answers

KEYS = {
    "weights": "more processes (and then model.master_dtype bfloat16, or parallel.cpu_offload)",
    "masters": "model.master_dtype bfloat16, more processes, or parallel.cpu_offload",
    "optimiser": "optim.name (adamw_bf16, adamw_8bit), more processes, or parallel.cpu_offload",
    "gradients": "parallel.accumulate sharded, more processes, or parallel.cpu_offload",
    "sampling replica": "parallel.shard never on one device (then there is none)",
    "activations": "train.micro_batch_tokens, or model.activation_checkpointing full",
    "head": "train.micro_batch_tokens",
    "kv cache": "rollout.max_batch or rollout.max_new_tokens",
    "prefill": "rollout.max_batch or data.max_prompt_tokens",
    "logits": "rollout.max_batch",
    "scratch": "optim.name adamw",
    "reference": "model.reference disk, or more processes",
    "vllm weights": "engine.tensor_parallel (engine.gpu_memory can then be smaller)",
    "vllm kv cache": "engine.gpu_memory or engine.kv_cache_gib",
    "vllm work": "rollout.max_batch",
}
"""Part -> what to lower, or to set, when it does not fit."""

NO_GRADIENTS = ("scoring", "reference")
"""Phases of forwards without gradients, whose tokens are those of train.score_tokens."""

MICRO_BATCHES = (2, 4, 8)
"""Micro-batches that one forward without gradients may be as large as, where they fit."""

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
class EngineMemory:
    """Bytes of a vLLM in the training processes on one device: what it holds while awake, what of
    it (`kept`) stays on a GPU while it sleeps, and one `token` in its KV cache."""

    weights: int
    work: int
    cache: int
    kept: int
    token: int

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds."""
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
    `score_tokens` are those of one forward without gradients.
    """

    phases: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]
    parameters: int
    score_tokens: int
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
        if self.phase in NO_GRADIENTS and largest in ("activations", "head"):
            return largest, "train.score_tokens"
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
    """Estimate the peak memory of one device. `context`: tokens of the longest sampled sequence,
    `prompt`: of the longest prompt. vLLM on CUDA also needs to know the device's size.

    An upper estimate: every micro-batch is full, every row is trained, all paths of a batch reach
    the longest length together. Not counted: what torch does not allocate (see RESERVE).
    """
    lay = Layout(shape, cfg, world, cuda)
    replica = shape.parameters * lay.forward
    held = 0 if lay.offloaded else reference_bytes(lay)
    frozen = {"reference": held} if held else {}
    own = lay.forward if lay.hosted or lay.masters else lay.master
    states = {
        "weights": 0 if lay.offloaded else lay.models * lay.held * own,
        **({"masters": lay.masters} if lay.masters else {}),
        "optimiser": 0 if cfg.parallel.cpu_offload else optimizer_bytes(lay),
        "sampling replica": replica if lay.sharded and cfg.samples_itself else 0,
    }
    if cfg.model.reference == "device":
        states |= frozen
    engine = _engine(lay, context=context, device_bytes=device_bytes) if cfg.colocated else None
    beside = {**states, **(engine.asleep(cuda=cuda) if engine else {})}
    awake = {**states, **(engine.parts if engine else {})}
    asked, tokens = cfg.objective.draws(), _score_tokens(lay)
    phases = {name: {**beside, **parts} for name, parts in _trained(lay).items()}
    if not asked.trained:  # a record scores at most, and may do nothing but draw
        scores = policy_rows(cfg.objective) or scores_answers(cfg.objective)
        phases = {"loaded": beside}
        if scores:
            phases = {"scoring": {**beside, **forward.scoring(lay, tokens)}}
    elif cfg.train.score_tokens is not None:  # else it takes no more than training does
        phases["scoring"] = {**beside, **forward.scoring(lay, tokens)}
    scored = scores_answers(cfg.objective) and cfg.scoring.u_source == "likelihood"
    if reads_reference(cfg.objective):
        # Where it may be asked again in a step, vLLM is awake.
        asleep = not (cfg.train.resample_rounds or cfg.answers_behind)
        around = {**(beside if asleep else awake), **frozen}
        phases["reference"] = {**around, **forward.reference_pass(lay, tokens)}
    # The reference policy's weights are there while it draws, or is handed to the engine.
    own = frozen if asked.reference else {}
    # hf samples with what is there: the trained module, or the replica of a sharded one.
    if cfg.samples_itself and not draws_itself(cfg):
        return MemoryEstimate(phases, _host(lay), shape.parameters, tokens)
    if cfg.samples_itself:
        drawing = _sampling(lay, context=context, prompt=prompt)
        phases["sampling"] = {**states, **drawing, **own}
        return MemoryEstimate(phases, _host(lay), shape.parameters, tokens)
    # A few tokens are scored then.
    probe = {"units": forward.scoring(lay, 1)["units"]} if engine else {}
    phases["sampling"] = {**awake, **probe, **own}
    # Log-probs of thoughts are scored beside an engine that has just answered behind them.
    beside_it = cfg.answers_behind and policy_rows(cfg.objective)
    if engine and (beside_it or (scored and cfg.train.resample_rounds)):
        phases["scoring"] = {**awake, **forward.scoring(lay, tokens)}
    weights = {"vllm weights": engine.weights} if engine else {}
    phases["sync"] = {**beside, **weights, **_hand_over(lay)}
    return MemoryEstimate(
        phases, _host(lay), parameters=shape.parameters, score_tokens=tokens, engine=engine
    )


def score_tokens(shape: ModelShape, cfg: Config, *, world: int = 1, cuda: bool = True) -> int:
    """Tokens of one forward without gradients: `train.score_tokens`, or where that is null the most
    micro-batches (1, 2, 4, 8) that need no more memory together than training does anyway.

    One micro-batch where nothing is trained, or where a vLLM may be awake beside such a forward:
    of the room that these leave nothing is known.
    """
    return _score_tokens(Layout(shape, cfg, world, cuda))


def _score_tokens(lay: Layout) -> int:
    cfg, own = lay.cfg, lay.cfg.train.micro_batch_tokens
    if cfg.train.score_tokens is not None:
        return cfg.train.score_tokens
    awake = cfg.colocated and (cfg.train.resample_rounds or cfg.answers_behind)
    if awake or not cfg.objective.draws().trained:
        return own
    # What lies on the device in every phase is left out on both sides.
    room = max(sum(parts.values()) for parts in _trained(lay).values())
    asked = reads_reference(cfg.objective)
    read = asked and cfg.model.reference == "disk" and not lay.offloaded
    beside = reference_bytes(lay) if read else 0
    one_pass = forward.reference_pass if asked else forward.scoring
    budgets = [count * own for count in MICRO_BATCHES]
    fit = [n for n in budgets if beside + sum(one_pass(lay, n).values()) <= room]
    return max(fit, default=own)


def _trained(lay: Layout) -> dict[str, dict[str, int]]:
    """Size the phases of an update, beside what lies on the device in every phase."""
    gradients = _gradients(lay)
    phases = _training(lay, gradients)
    # Activations are gone by then, and the optimiser's copies come.
    moments = [{"gradients": gradients["reduced"], "scratch": _scratch(lay)}]
    # Before them whole gradients are rounded, one at a time beside those that are not yet.
    largest = lay.master * max(math.prod(p) for unit in lay.shape.units.values() for p in unit)
    if lay.widened and lay.master < lay.reduce:
        moments.append({"gradients": gradients["training"], "scratch": largest})
    phases["update"] = max(moments, key=lambda parts: sum(parts.values()))
    return phases


def _training(lay: Layout, gradients: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Size the four moments of a micro-batch, not the first of its step, that can be highest."""
    shape, s, r = lay.shape, lay.forward, lay.reduce
    tokens, layers = lay.cfg.train.micro_batch_tokens, len(shape.blocks)
    kept, inner = forward.activations(lay)
    held = {"gradients": gradients["training"], "activations": layers * kept * tokens}
    # Units exist when the model is sharded; a gather has a flat copy when there is a peer.
    block = max(map(numel, shape.blocks)) * lay.sharded
    head, embedding = lay.gathered_head, numel(shape.embedding)
    sharded_sum = lay.sharded and not lay.whole_gradients
    flat = lay.shards > 1
    pair = block * s * (1 + flat)
    # From its forward on the head stays whole, with its dW, to the end of the step; the embedding
    # to its backward.
    head_stays = head * (s + r)
    waiting = head_stays + (0 if shape.tied else embedding * s * lay.sharded)
    # FSDP2 keeps the last reduction's buffer, the embedding's, until the next backward reduces.
    buffer = embedding * r if sharded_sum and flat and not shape.tied else 0
    down = shape.mlp * shape.hidden * s * (lay.sharded or lay.widened)
    # A gradient in the forward's dtype, and in float32 to be added to the sum.
    down += shape.mlp * shape.hidden * r * lay.widened
    later, summed = waiting, pair + block * (s + r)
    if lay.sharded and not flat:
        # Without a peer dW is in the gradients once the head has ended, and its copy alone waits;
        # a block's sum is divided into a third buffer.
        later, summed = head * s, 3 * block * r
    reduction = max(summed + later, 2 * head * r)
    dense = embedding * s + (embedding * r + 2 * embedding * r // lay.shards) * lay.sharded
    dense += embedding * r * lay.widened
    # A CPU adds up in float32: all rows, and those of each id.
    dense += 8 * tokens * shape.hidden * (s < 4 and not lay.cuda)
    return {
        "head": {
            **held,
            "head": forward.head(lay, tokens),
            "units": waiting + max(buffer, head * s * flat),
        },
        "backward": {
            **held,
            "activations": (layers * kept + inner) * tokens,
            "units": pair + down + later + max(0, block * r - kept * tokens),
        },
        "reduction": {**held, "units": reduction},
        "embedding": {"gradients": gradients["training"], "units": head_stays + dense},
    }


def reference_bytes(lay: Layout) -> int:
    """Count the bytes of the frozen reference policy on one process; 0 where none is asked for."""
    if not reads_reference(lay.cfg.objective):
        return 0
    # Not updated, so in the dtype of the policy's forward.
    return lay.held * lay.forward


def optimizer_bytes(lay: Layout) -> int:
    """Count the bytes of the moments of one process's shards, of all models; 0 where nothing is
    trained."""
    if not lay.cfg.objective.draws().trained:
        return 0
    # Two moments per weight: float32, bfloat16, or bytes in blocks with their scales.
    name, held = lay.cfg.optim.name, lay.held
    if name == "adamw_8bit":
        return lay.models * sum(
            _eight_bit(rows_of(shape, lay.shards), lay.master)
            for shapes in lay.shape.units.values()
            for shape in shapes
        )
    return lay.models * held * _moment(lay)


def _eight_bit(numel: int, master: int) -> int:
    """Count torchao's bytes of two moments: one per element, a float32 scale per 256, a table."""
    # Below 4096 elements, or where blocks of 256 do not fit, torchao keeps them whole.
    if numel < 4096 or numel % 256:
        return 2 * numel * master
    return 2 * (numel + 4 * numel // 256 + 1024)


def _gradients(lay: Layout) -> dict[str, int]:
    """`reduced`: shards in the masters' dtype. `training`: what is held between micro-batches."""
    reduced = lay.held * lay.master
    if not lay.sharded:  # summed in float32, and rounded to the masters' dtype before the update
        summed = lay.models * lay.held * lay.reduce
        return {"training": summed, "reduced": lay.models * reduced}
    # One model after the other: the gradients of the first wait, reduced, for those of the second.
    vocabulary = numel(lay.shape.head or lay.shape.embedding)
    waiting = 0 if lay.offloaded else reduced
    if lay.whole_gradients:
        training = (lay.shape.parameters - vocabulary) * lay.reduce  # the head's dW is in its unit
        if lay.by_classes:
            training += lay.local(lay.shape.head) * lay.reduce
    elif lay.cfg.parallel.replicas > 1 or lay.master < lay.reduce:
        training = lay.held * max(lay.reduce, lay.master)  # summed as it was reduced, cast once
    else:
        training = waiting
    return {
        "training": training + (lay.models - 1) * waiting,
        "reduced": lay.models * waiting,
    }


def _sampling(lay: Layout, *, context: int, prompt: int) -> dict[str, int]:
    """Size sampling by hf: the KV cache of all paths side by side, the forward of their distinct
    prompts, and (rows, V) numbers: logits, their float32 copy and log-probs, two in float64."""
    shape, rollout, s = lay.shape, lay.cfg.rollout, lay.forward
    rows, shared = rollout.max_batch, min(lay.cfg.objective.draws().counts, default=1)
    # A prompt's keys are computed once for the paths that share it; one group may be split.
    prompts = min(rows, -(-rows // shared) + 1)
    prefill = prompts * prompt * s * (3 * shape.mlp + 2 * shape.hidden)
    return {
        "kv cache": 2 * len(shape.blocks) * rows * context * shape.key * s,
        "prefill": prefill,
        "logits": rows * shape.vocabulary * (s + 4 + 4 + 8 + 8),
    }


def _engine(lay: Layout, *, context: int, device_bytes: int | None) -> EngineMemory:
    """Size vLLM's share of one device.

    Its work is a forward of as many tokens as it batches. Every path adds a row of logits, with
    four float32 numbers more per column. A path's keys and values take 2 layers (K /
    tensor_parallel, at least one head) elements per token.
    """
    shape, vllm, s = lay.shape, lay.cfg.vllm, lay.forward
    group, rows = vllm.tensor_parallel, lay.cfg.rollout.max_batch
    # On a CPU vLLM unties the head, so that a tied weight is there twice.
    untied = numel(shape.embedding) if shape.tied and not lay.cuda else 0
    weights = -(-(shape.parameters + untied) * s // group)
    tokens = max(context, rows, VLLM_TOKENS_CPU)
    if lay.cuda:
        small = device_bytes is not None and device_bytes < 70 * GIB
        tokens = VLLM_TOKENS_SMALL if small else VLLM_TOKENS
    work = tokens * s * (3 * shape.mlp // group + 2 * shape.hidden)
    work += rows * shape.vocabulary * (s + 16)
    kept = VLLM_KEPT if lay.cuda else 0
    # On a CPU gpu_memory means nothing: without a size vLLM's cache is the 1 GiB of our engine.
    if vllm.kv_cache_gib is not None or not lay.cuda:
        cache = int((vllm.kv_cache_gib or 1) * GIB)
    elif device_bytes is None:
        raise ValueError(
            "device_bytes: got None, but engine.gpu_memory is a share of the device; give its "
            "bytes, or set engine.kv_cache_gib"
        )
    else:
        cache = max(0, int(vllm.gpu_memory * device_bytes) - weights - work - kept)
    # With more devices than key heads each device holds one whole head: they are copied.
    width = max(shape.key // group, shape.query // shape.heads)
    return EngineMemory(weights, work, cache, kept, token=2 * len(shape.blocks) * width * s)


def _hand_over(lay: Layout) -> dict[str, int]:
    """Size weights on their way to vLLM. A sharded model gathers its largest unit.

    Inside the process vLLM holds a layer's tensors twice, as copies and as its own new ones, before
    they replace the old. Elsewhere a tensor is copied into a buffer, or a file's worth into memory.
    """
    shape, vllm, s = lay.shape, lay.cfg.vllm, lay.forward
    unit = max(map(numel, shape.units.values())) * lay.sharded
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
    """Size the scratch of `optim.RoundedAdamW` on CUDA, and the blocks of states that come from
    host memory; torch's fused step has none of its own."""
    rounds = lay.cfg.optim.name == "adamw_bf16" or lay.master == 2
    largest = max(rows_of(shape, lay.shards) for u in lay.shape.units.values() for shape in u)
    block = min(BLOCK, largest)
    # Two moments of each, and the master where the forward has another weight.
    states = block * (_moment(lay) + lay.master * (lay.master != lay.forward))
    travelling = DEPTH * states * lay.hosted
    if not rounds or lay.cfg.optim.name == "adamw_8bit" or lay.offloaded:
        return travelling
    # Of a chunk: gradient, two moments, weight and a root in float32; int32 bits and what mixes
    # them. Chunks bound it, whatever the size of a shard.
    return travelling + 8 * 4 * block


def _moment(lay: Layout) -> int:
    """Count the bytes of the two moments of one weight, where they are not in blocks."""
    return 2 * (2 if lay.cfg.optim.name == "adamw_bf16" else max(4, lay.master))


def _host(lay: Layout) -> dict[str, int]:
    # A copy of a checkpoint is as large as what it holds: masters and moments of the shards.
    masters = lay.models * lay.held * lay.master
    states = masters + optimizer_bytes(lay)
    host = {}
    if lay.hosted:
        elsewhere = lay.master != lay.forward
        host = {"moments": optimizer_bytes(lay)} | ({"masters": masters} if elsewhere else {})
    elif lay.offloaded:
        host = {"weights, optimiser": states, "gradients": lay.models * lay.held * lay.master}
        if held := reference_bytes(lay):
            host["reference"] = held
    if lay.cfg.checkpoint.background:
        host["checkpoint copy"] = states
    return host

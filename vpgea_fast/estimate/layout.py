"""A causal LM by the shapes of its units, and how a configuration lays it on processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vpgea_fast.activations import kept_width
from vpgea_fast.config import Config
from vpgea_fast.model_dir import decoder_layers

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ModelShape:
    """A causal LM unit by unit: the shapes of the parameters, and the widths that size the
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
    """Sum of the widths of the products of one block that `selective` checkpointing keeps."""

    @property
    def tied(self) -> bool:
        return not self.head

    @property
    def units(self) -> dict[str, Shapes]:
        """name -> shapes, in the order in which a forward gathers them."""
        # Of a tied model the embedding's unit is gathered for the head too.
        named = {"root": self.root, "embedding": self.embedding}
        named |= {f"block {i}": shapes for i, shapes in enumerate(self.blocks)}
        return named if self.tied else {**named, "head": self.head}

    @property
    def parameters(self) -> int:
        return sum(numel(shapes) for shapes in self.units.values())


def model_shape(config: Any) -> ModelShape:
    """Measure the shape of a transformers configuration on a model without storage (0.3 s)."""
    from transformers import AutoModelForCausalLM

    # On the meta device no bytes are allocated, however large the model is.
    with torch.device("meta"):
        # A copy: a model writes the name of its attention into its configuration.
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    tied = bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    units: dict[str, Any] = {"embedding": model.get_input_embeddings()}
    if not tied:
        units["head"] = model.get_output_embeddings()
    blocks = decoder_layers(model)
    widest = max(max(p.shape) for p in blocks[0].parameters() if p.ndim == 2)
    # By identity: what lies in no unit (the last norm) belongs to FSDP's root.
    inside = {id(p) for part in (*units.values(), *blocks) for p in part.parameters()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return ModelShape(
        blocks=tuple(_shapes(block.parameters()) for block in blocks),
        embedding=_shapes(units["embedding"].parameters()),
        head=() if tied else _shapes(units["head"].parameters()),
        # A tied weight is yielded once by `parameters`, and is in the embedding's unit already.
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
    """How a configuration is laid on `world` processes, and the bytes of its dtypes.

    forward   of an element in the forward and in gathers
    master    of a weight that the optimiser updates
    reduce    of a gradient while it is summed over processes
    held      elements that one process holds
    """

    shape: ModelShape
    cfg: Config
    world: int
    cuda: bool

    @property
    def sharded(self) -> bool:
        return self.cfg.parallel.sharded(self.world)

    @property
    def hosted(self) -> bool:
        """Whether the whole weights lie on the device in the forward's dtype, and the optimiser's
        states in host memory."""
        return self.cfg.parallel.hosted(self.world)

    @property
    def masters(self) -> int:
        """Bytes on the device of the weights that are updated, where the forward has others."""
        apart = not (self.sharded or self.hosted) and self.cfg.model.has_masters
        return self.models * self.held * self.master * apart

    @property
    def offloaded(self) -> bool:
        """Whether host memory has the shards themselves."""
        return self.sharded and self.cfg.parallel.cpu_offload

    @property
    def models(self) -> int:
        """Models that are trained side by side, each with gradients and moments of its own."""
        return 2 if self.cfg.two_policies else 1

    @property
    def shards(self) -> int:
        return self.world // self.cfg.parallel.replicas if self.sharded else 1

    @property
    def by_classes(self) -> bool:
        """Whether the head is no unit: each process has its classes, for the rows of all."""
        return self.sharded and self.cfg.parallel.tensor == "head"

    @property
    def gathered_head(self) -> int:
        """Elements of the head that its forward finds whole, in a unit."""
        if not self.sharded or self.by_classes:
            return 0
        return numel(self.shape.head or self.shape.embedding)

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
        # FSDP reduces gradients in float32: sums in bfloat16 lose small ones.
        return max(4, self.forward)

    @property
    def widened(self) -> bool:
        """Whether a gradient comes in the forward's dtype, and is summed in a wider one."""
        # Under FSDP too, but there as a part of a unit's reduction.
        narrow = self.masters > 0 or self.hosted or self.master < self.reduce
        return not self.sharded and narrow

    @property
    def grade(self) -> str:
        """What a layer keeps for its backward; the least where it is not chosen yet."""
        return self.cfg.model.activation_checkpointing or "full"

    @property
    def whole_gradients(self) -> bool:
        """Whether gradients are reduced once; not where it is not chosen yet."""
        return self.cfg.parallel.accumulate == "unsharded"

    def local(self, shapes: Shapes) -> int:
        """Count the elements of a unit that one process holds, rounded up to whole rows."""
        return sum(rows_of(shape, self.shards) for shape in shapes)

    @property
    def held(self) -> int:
        return sum(self.local(shapes) for shapes in self.shape.units.values())


def _shapes(parameters: Iterable[torch.Tensor]) -> Shapes:
    return tuple(tuple(p.shape) for p in parameters)


def numel(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def rows_of(shape: tuple[int, ...], shards: int) -> int:
    # FSDP2 cuts the first dimension and pads the last shard; a scalar is one row.
    rows, *rest = shape or (1,)
    return -(-rows // shards) * math.prod(rest)


def draws_itself(cfg: Config) -> bool:
    """Whether the trained module, or its copy, samples anything: paths, answers, evaluations."""
    answers = cfg.answers_behind and not cfg.objective.draws().recorded
    return cfg.draws_paths or bool(cfg.eval.data) or answers

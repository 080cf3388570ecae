"""A model cut over many devices (FSDP2), and its parts filled.

    model without storage -> cut: units -> allocate -> read_parts, or draw

Units: every decoder layer, the embedding, the head (with the embedding when tied), and the root,
which holds the final norm. No process ever holds all of the model. With `parallel.tensor: head` the
head is no unit: each process keeps its classes, and takes the rows of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vpgea_fast import attention
from vpgea_fast.config import ParallelConfig
from vpgea_fast.distributed import World
from vpgea_fast.model_dir import ModelError, decoder_layers
from vpgea_fast.weights import Weights, find_weights, read


def cut(
    policy: nn.Module, causal_lm: Any, dtype: torch.dtype, *, world: World, parallel: ParallelConfig
) -> None:
    """Cut `policy`, which holds `causal_lm`, over the mesh of `world`, in place; parameters become
    DTensors that are gathered in `dtype`. Errors: ModelError."""
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    tied = head.weight is embedding.weight
    master = head.weight.dtype
    # Not cast on the way in: coefficients would become bfloat16, and a layer's input already is.
    mixed = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != master else None,
        reduce_dtype=torch.float32 if dtype in attention.HALF else None,
        cast_forward_inputs=False,
    )
    offload = OffloadPolicy()
    if parallel.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    options: dict[str, Any] = {"mesh": world.mesh, "mp_policy": mixed, "offload_policy": offload}
    by_classes = parallel.tensor == "head"
    if by_classes:
        _cut_by_classes(head, tied=tied, world=world)
    # From the inside out: each call takes only what no unit has yet.
    for layer in decoder_layers(causal_lm):
        fully_shard(layer, **options)
    # FSDP does not share a parameter between two units, so a tied weight is in one.
    ends = [[embedding, head]] if tied else [[embedding], [head]][: 2 - by_classes]
    for modules in ends:
        # One all-gather of the head serves all micro-batches of a step, scoring included.
        fully_shard(modules, reshard_after_forward=False, **options)
    fully_shard(policy, ignored_params=set(head.parameters()) if by_classes else None, **options)
    for unit in units(policy):
        # Sums: FSDP would divide by the number of processes. Neither call recurses.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    if not by_classes:
        head.set_unshard_in_backward(False)  # its gradient is made by then
    embedding.set_unshard_in_backward(False)  # needs no weight
    if tied and head.weight is not embedding.weight:
        raise ModelError("sharding untied the embeddings; update torch to 2.13 or newer")


def _cut_by_classes(head: Any, *, tied: bool, world: World) -> None:
    """Leave each process its classes of the head, as `Shard(0)` of the mesh. Errors: ModelError."""
    mesh = world.mesh
    assert mesh is not None
    if tied:
        raise ModelError(
            "parallel.tensor: got 'head' for a model that ties its head to the embedding, which is "
            "gathered; set 'none'"
        )
    for name, whole in list(head.named_parameters(recurse=False)):
        shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, [Shard(0)])
        # A copy: a view would keep the whole head in memory.
        own = whole.detach()[offset[0] : offset[0] + shape[0]].clone()
        part = DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        setattr(head, name, nn.Parameter(part, requires_grad=whole.requires_grad))


class AllRows:
    """The rows of all processes of a mesh, one after the other, where each brings its own R.

    Padded to the largest R, which takes one exchange of counts.
    """

    def __init__(self, mesh: Any, rows: int, device: torch.device) -> None:
        self.group = mesh.get_group()
        counts = self._gathered(torch.tensor([rows], device=device)).tolist()
        self.room = max(counts)
        first = self.room * mesh.get_local_rank()
        self.own = slice(first, first + rows)

    def join(self, rows_R: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """(R, ...) of each -> (n room, ...) of all. No gradient."""
        padded = rows_R.new_full((self.room, *rows_R.shape[1:]), fill)
        padded[: rows_R.shape[0]] = rows_R
        return self._gathered(padded)

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.new_empty((dist.get_world_size(self.group), *x.shape))
        dist.all_gather(list(whole.unbind()), x, group=self.group)
        return whole.flatten(0, 1)


class JoinedRows(torch.autograd.Function):
    """`AllRows.join` of hidden states (R, D). Its gradient is whole on every process, each of which
    takes that of its own rows."""

    @staticmethod
    def forward(ctx: Any, hidden_RD: torch.Tensor, rows: AllRows) -> torch.Tensor:
        ctx.own = rows.own
        return rows.join(hidden_RD)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream[0][ctx.own], None


def units(model: nn.Module) -> list[Any]:
    """The modules that FSDP gathers as one, the root first; none when not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def allocate(causal_lm: Any, device: torch.device) -> None:
    """Allocate parameters made without storage; compute buffers again, since no file has them."""
    buffers = {name for name, _ in causal_lm.named_buffers()}
    causal_lm.to_empty(device=device)
    computed: set[str] = set()
    for name, module in list(causal_lm.named_modules()):
        # Rotary embeddings follow from the configuration: a new module computes them again.
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            with torch.device(device):
                fresh = type(module)(config=causal_lm.config)
            for leaf, value in fresh.named_buffers():
                setattr(module, leaf, value)
                computed.add(f"{name}.{leaf}")
    if missing := sorted(buffers - computed):
        raise ModelError(
            f"{type(causal_lm).__name__} has buffers that no weight file holds ({missing[0]}); "
            "this model cannot be built without them: set parallel.shard: never and "
            "parallel.cpu_offload: false"
        )


@torch.no_grad()
def draw(causal_lm: Any, std: float, seed: int) -> None:
    """Fill this process's part of every parameter: matrices N(0, std), norms 1, biases 0."""
    generator: torch.Generator | None = None
    for name, parameter in causal_lm.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if generator is None or generator.device != local.device:
            generator = torch.Generator(local.device).manual_seed(seed)
        if parameter.ndim > 1:
            local.normal_(0.0, std, generator=generator)
        else:
            local.fill_(1.0 if "norm" in name else 0.0)


def weights_in_parts(causal_lm: Any, path: str) -> Weights:
    """Weights of which each process can read its part. Errors: ModelError."""
    weights = find_weights(causal_lm, path)
    if weights.converted:
        raise ModelError(
            f"{path}: transformers makes weights of {type(causal_lm).__name__} out of several "
            f"tensors ({next(iter(weights.converted))}, ...), which no process can read in parts; "
            "set parallel.shard: never and parallel.cpu_offload: false"
        )
    return weights


@torch.no_grad()
def read_parts(
    causal_lm: Any, weights: Weights, masters: Mapping[torch.Tensor, torch.Tensor] | None = None
) -> None:
    """Fill this process's part of every parameter from the safetensors files, by way of its master
    where it has one."""
    for name, parameter in causal_lm.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # With more processes than rows some hold none.
        if local.numel():
            value = read(weights.of[name], _rows_of(parameter))
            if masters and parameter in masters:
                value = masters[parameter].copy_(value)
            local.copy_(value)


def _rows_of(parameter: torch.Tensor) -> slice:
    """The rows of a tensor cut along dimension 0 that are this process's."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return slice(offset[0], offset[0] + shape[0])

"""The states of an optimiser by their names in a checkpoint: taken, and where they are read to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from vpgea_fast.checkpoint.dcp import shard_of
from vpgea_fast.checkpoint.files import CheckpointError

MODEL, OPTIMIZER = "model.", "optimizer.state."
"""Before the names of weights, and of an optimiser's states."""


def optimizer_states(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """By name in the files: the states that DCP can cut, this process's shards of those that it
    cannot (torchao's 8-bit blocks, a tensor class of their own); and the rest, as in `Checkpoint`.
    """
    tensors: dict[str, torch.Tensor] = {}
    bound: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    # Before the first update there are no states, and nothing of the optimiser is saved.
    trained = trained_by_name(optimizer, weights)
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            # Step counts of optimisers that keep them as numbers go into state.json.
            if not isinstance(value, torch.Tensor):
                values.setdefault(name, {})[key] = value
            elif type(shard := shard_of(value)) is torch.Tensor:
                tensors[f"{OPTIMIZER}{name}.{key}"] = value.detach()
            else:
                bound[f"{OPTIMIZER}{name}.{key}"] = shard
    rest = {
        "class": kind_of(optimizer),
        "parameters": [*trained],
        "values": values,
        "bound": bool(bound),
    }
    return tensors, bound, rest


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The class whose states these are: one that only keeps them elsewhere says whose."""
    return getattr(optimizer, "saved_as", type(optimizer).__name__)


def trained_by_name(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]
) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by name."""
    # By identity: the optimiser holds the very tensors, and they have no names.
    names = {id(weight): name for name, weight in weights.items()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def by_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Name of a parameter -> key -> state, of tensors by their name in the files."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith(OPTIMIZER):
            name, key = _parts(full_name)
            states.setdefault(name, {})[key] = tensor
    return states


def _parts(full_name: str) -> tuple[str, str]:
    name, _, key = full_name.removeprefix(OPTIMIZER).rpartition(".")
    return name, key


def beside(
    shards: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Place blocks that cannot be cut anew beside the shards of their parameters."""
    placed: dict[str, torch.Tensor] = {}
    for full_name, shard in shards.items():
        weight = weights[_parts(full_name)[0]]
        placed[full_name] = shard = shard.to(shard_of(weight).device)
        if isinstance(weight, DTensor):
            # run_check would be a collective; who wrote these shards is checked by `_check_fit`.
            placed[full_name] = DTensor.from_local(
                shard,
                weight.device_mesh,
                weight.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
    return placed


def state_targets(
    found: Mapping[str, TensorStorageMetadata],
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    path: Path,
) -> dict[str, torch.Tensor]:
    """Where to read an optimiser's states to: new tensors, or its own room for them.
    CheckpointError for states of another dtype than that."""
    targets: dict[str, torch.Tensor] = {}
    room = getattr(optimizer, "room", None)
    # The options of a parameter's group decide where its step count lives.
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = trained_by_name(optimizer, weights)
    for full_name, saved in found.items():
        if not full_name.startswith(OPTIMIZER):
            continue
        name, key = _parts(full_name)
        parameter, dtype = trained[name], saved.properties.dtype
        if saved.size == parameter.shape and room is not None and key != "step":
            targets[full_name] = own = room(parameter, key)
            if own.dtype != dtype:
                raise CheckpointError(
                    f"{path} holds {key} of {name} in {dtype}, this run in {own.dtype}; set "
                    "optim.name to what the run began with"
                )
        elif saved.size == parameter.shape:
            # A DTensor where the parameter is one: DCP then reads this process's shard alone.
            targets[full_name] = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            # As AdamW does: a step count on a GPU that no fused kernel reads there would cost a
            # sync a parameter.
            group = groups[id(parameter)]
            beside = saved.size or group.get("fused") or group.get("capturable")
            device = shard_of(parameter).device if beside else "cpu"
            targets[full_name] = torch.zeros(saved.size, dtype=dtype, device=device)
    return targets

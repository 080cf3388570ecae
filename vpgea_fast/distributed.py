"""The processes of a run: which one this is, the mesh they form, and what they tell each other.

Every process runs the same program on the same host data: prompts, paths, scores and plans are
equal everywhere, and only the model's shards and the batches of a plan differ. So there is little
to say: numbers are summed, flags are or-ed, results are gathered. All of it is host data and goes
over gloo; what FSDP moves goes over the device's own backend.

A process that fails leaves; the others learn it from the broken connection (gloo: at once) or from
the time-out (NCCL: `parallel.timeout_minutes`), and torchrun ends or restarts them all.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vpgea_fast.config import ConfigError, ParallelConfig


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, its device, and the mesh of a sharded model (None: not sharded).

    The mesh has the dimensions (shard) or (replicate, shard).

    >>> World(torch.device("cpu")).gather("alone")
    ['alone']
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """This process writes the run's files and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process says so. A collective."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over the processes, elementwise, on the CPU; bitwise equal on all. A collective."""
        total = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What every process gave, in the order of the ranks. A collective."""
        if self.size == 1:
            return [data]
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        length = torch.tensor([len(data)])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        widest = max(int(n) for n in lengths)
        padded = torch.zeros(widest, dtype=torch.uint8)
        padded[: len(data)] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        if widest:
            dist.all_gather(parts, padded)
        return [part[: int(n)].numpy().tobytes() for part, n in zip(parts, lengths, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """`gather_bytes` of what JSON can say."""
        return [json.loads(part) for part in self.gather_bytes(json.dumps(value).encode())]

    def share(self, items: Sequence[Any]) -> range:
        """The places of `items` that are this process's: every size-th one."""
        return range(self.rank, len(items), self.size)

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(torch.zeros(1))

    def close(self) -> None:
        """Leave the group. Models must be out of scope: their FSDP state outlives no group."""
        if self.mesh is not None:
            gc.collect()  # without it gloo aborts at exit, one run in three
            self.barrier()
            dist.destroy_process_group()


def open_world(cfg: ParallelConfig, device: str = "auto") -> World:
    """The world that torchrun describes in the environment, or a process of its own.

    ConfigError: a world size that `parallel.replicas` does not divide, sharding off with more than
    one process, replicas without sharding.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    here = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    check_world(cfg, size)
    sharded = cfg.shard == "always" or (cfg.shard == "auto" and (size > 1 or here.type == "cuda"))
    if not sharded:
        return World(here)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo",
        timeout=timedelta(minutes=cfg.timeout_minutes),
        rank=rank,
        world_size=size,
        **({} if size > 1 else {"store": dist.HashStore()}),
    )
    shape, names = (size,), ("shard",)
    if cfg.replicas > 1:
        shape, names = (cfg.replicas, size // cfg.replicas), ("replicate", "shard")
    mesh = init_device_mesh(here.type, shape, mesh_dim_names=names)
    return World(here, rank=rank, size=size, mesh=mesh)


def check_world(cfg: ParallelConfig, size: int) -> None:
    """ConfigError unless `size` processes can make the mesh of `cfg`."""
    if size % cfg.replicas:
        raise ConfigError(
            f"parallel.replicas: got {cfg.replicas}, expected a divisor of the {size} processes; "
            "take the number of nodes, or 1"
        )
    if cfg.shard == "never" and (size > 1 or cfg.replicas > 1):
        raise ConfigError(
            f"parallel.shard: got 'never' with {size} processes and {cfg.replicas} replicas; "
            "several processes train one model only when it is sharded: set 'auto'"
        )


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA where there is any; `cuda` without a number is this process's own."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not cuda:
        raise ConfigError(f"model.device: got {name!r}, but torch sees no CUDA device; set 'auto'")
    return device if device.index is not None else torch.device("cuda", local_rank)

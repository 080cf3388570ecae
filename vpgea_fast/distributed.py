"""The processes of a run: which one this is, the mesh they form, and what they tell each other.

Every process runs the same program on the same host data: prompts, paths, scores and plans are
equal everywhere, and only the model's shards and the batches of a plan differ. So there is little
to say: numbers are summed, flags are or-ed, results are gathered. All of it is host data and goes
over gloo; what FSDP moves goes over the device's own backend.

A process that fails leaves; the others learn it from the broken connection (gloo: at once) or from
the time-out (NCCL: `parallel.timeout_minutes`), and torchrun ends or restarts them all. What may
fail on one process and need not end it, such as writing a file, is done in `World.together`.

Below `World`, what every room has to know of a sharded model: its names, how to shard it again, and
its weights in full.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from vpgea_fast.config import ConfigError, ParallelConfig

T = TypeVar("T")

M_MMAP_THRESHOLD = -3
"""Of malloc.h."""
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What activation checkpointing and torch.compile write into the names of a module's parameters."""


class Stopped(Exception):  # noqa: N818 - not an error: the run can go on later
    """SIGTERM, Ctrl-C or the time limit; raised where all processes can leave together."""


class RemoteError(RuntimeError):
    """Another process has failed; the message says which, and why."""


class LostError(RemoteError):
    """The connection to another process broke: it has ended, or is not heard of."""


@contextmanager
def _connected() -> Iterator[None]:
    """Raise LostError where gloo's own error is about its place in gloo's source."""
    try:
        yield
    except RuntimeError as error:
        place, found, said = str(error).partition("] ")
        if not found or "/gloo/" not in place:
            raise
        said = said.partition(". ")[0]
        raise LostError(f"another process has ended, or does not answer ({said})") from error


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, its device, and the mesh of a sharded model (None: not sharded).

    The mesh has the dimensions (shard) or (replicate, shard); `group` is what host data goes over
    (None: the default group), and no collective waits longer than `timeout`.

    >>> World(torch.device("cpu")).gather("alone")
    ['alone']
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    timeout: timedelta = timedelta(minutes=30)

    @property
    def main(self) -> bool:
        """This process writes the run's files and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process says so. A collective."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add elementwise over the processes, on the CPU; bitwise equal on all. A collective."""
        # A copy: all_reduce adds in place, and the caller's tensor must stay as it is.
        total = values.detach().cpu().clone()
        if self.size > 1:
            with _connected():
                dist.all_reduce(total, group=self.group)
        return total

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return what every process gave, in the order of the ranks. A collective."""
        if self.size == 1:
            return [data]
        # all_gather takes one shape from all: lengths first, then bytes padded to the longest. Each
        # process receives size x the longest.
        lengths = self._gather(torch.tensor([len(data)]))
        widest = max(int(length) for length in lengths)
        padded = torch.zeros(widest, dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = self._gather(padded) if widest else [padded] * self.size
        return [p[: int(n)].numpy().tobytes() for p, n in zip(parts, lengths, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, of the kinds that JSON has. A collective."""
        # Through JSON on one process too: types come back alike, whatever the number of processes.
        return [json.loads(part) for part in self.gather_bytes(json.dumps(value).encode())]

    def gather_tensor(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Gather 1-D tensors of one dtype and any lengths, on the CPU. A collective."""
        parts = self.gather_bytes(values.detach().cpu().contiguous().numpy().tobytes())
        return [
            torch.frombuffer(bytearray(part), dtype=values.dtype) if part else values.new_empty(0)
            for part in parts
        ]

    def require_same(self, value: Any, what: str) -> None:
        """RuntimeError on all processes if one has another value. A collective.

        With unequal plans some processes would wait for ever, or add up other sums, silently.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise RuntimeError(
                f"the processes disagree on the {what} ({values}): their hosts compute "
                "differently; take equal CPUs and versions on all nodes, and go on with --resume"
            )

    def share(self, count: int) -> slice:
        """The places of `count` things that are this process's; all shares together are all."""
        # Lengths differ by one at most, and one share ends where the next begins.
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def spread(self, work: Callable[[Sequence[T]], list[Any]], items: Sequence[T]) -> list[Any]:
        """Do `work(items)`, each process its share; results as JSON has them. A collective.

        For work that is expensive, or whose result may differ between processes (a time-out).
        """
        parts = self.gather(work(items[self.share(len(items))]))
        return [result for part in parts for result in part]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Local work, no collective in it, that fails on every process or on none. A collective.

        Its own exception where it failed, RemoteError on the others: nobody waits for a process
        that has given up.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        # An exception may have no text (MemoryError): its type is told then.
        problems = self.gather(failure and (str(failure) or type(failure).__name__))
        if failure is not None:
            # Its own exception: it has the traceback, the others know its words alone.
            raise failure
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise RemoteError(f"process {rank}: {problem}")

    def on_main(self, action: Callable[[], object]) -> None:
        """Do something on the main process only, in `together`."""
        with self.together():
            if self.main:
                action()

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(torch.zeros(1))

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _connected():
            dist.all_gather(parts, tensor, group=self.group)
        return parts

    # cached_property writes into __dict__, which a frozen dataclass allows.
    @functools.cached_property
    def side(self) -> World:
        """The same processes over connections of their own, for a thread. The first use is a
        collective, and one that learns of a dead process from the time-out only."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=self.timeout))

    def close(self) -> None:
        """Leave the group. Models must be out of scope: their FSDP state outlives no group."""
        if self.mesh is not None:
            gc.collect()  # without it gloo aborts at exit, one run in three
            self.barrier()
            dist.destroy_process_group()


def reshard(model: nn.Module) -> None:
    """Give up what a forward without a backward has left whole. No communication.

    Where a unit is whole its parameters are plain copies in the forward's dtype: whoever reads or
    updates parameters after a scoring pass would silently miss the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under Hugging Face's names, a tied one once; shards where
    the model is sharded.

    `model` is a causal LM, or holds one as `causal_lm`.
    """
    reshard(model)
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    # keep_vars: the parameters themselves, so that a tied one is told by its identity.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[_public(name)] = tensor
    return weights


def master_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """`named_weights`, with the optimiser's own in place of what the forward has in another dtype:
    what a checkpoint holds (`Policy.masters`)."""
    masters = getattr(model, "masters", None) or {}
    return {name: masters.get(weight, weight) for name, weight in named_weights(model).items()}


@torch.no_grad()
def take_masters(model: nn.Module) -> None:
    """Give the forward the values of the masters, where it has other tensors."""
    for weight, master in (getattr(model, "masters", None) or {}).items():
        weight.copy_(master)


def full_weights(
    model: nn.Module, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of all `named_weights`. A collective: every process takes all of them,
    and no other collective between two.

    Without `dtype` a sharded model is gathered a unit at a time in the forward's dtype (7B: 31
    gathers instead of 339), and a tensor is valid until the next one is asked for: no process holds
    more than one unit. With `dtype`, a tensor at a time, floating point in that dtype. A model that
    is not sharded gives its own tensors.
    """
    # A cast starts from the master weights, but a unit holds the forward's dtype already.
    by_unit = dtype is None and any(isinstance(m, FSDPModule) for m in model.modules())
    shards: set[str] = set()
    forward: torch.dtype | None = None  # of the units
    weights = named_weights(model) if dtype is None else master_weights(model)
    for name, weight in weights.items():
        weight = weight.detach()
        if by_unit and isinstance(weight, DTensor):
            shards.add(name)
            continue
        if dtype is not None and weight.is_floating_point():
            weight = weight.to(dtype)
        yield name, _whole(weight)
    # unshard() gathers one unit, not those below it: the root's is the final norm alone.
    for prefix, unit in model.named_modules():
        if not (shards and isinstance(unit, FSDPModule)):
            continue
        unit.unshard()
        for name, weight in nn.Module.named_parameters(unit, prefix):  # pyright: ignore
            # Those of the units below are still DTensors; their turn comes.
            if not isinstance(weight, DTensor) and _public(name) in shards:
                shards.remove(_public(name))
                forward = weight.dtype
                yield _public(name), weight.detach()
        unit.reshard()
    # In no unit: a head that is cut by classes.
    named = named_weights(model)
    for name in sorted(shards):
        weight = named[name].detach()
        yield name, _whole(weight if forward is None else weight.to(forward))


def _whole(weight: torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, DTensor):
        return weight
    # Offloaded shards lie on the CPU, where NCCL cannot gather them.
    whole: Any = weight.to(weight.device_mesh.device_type)
    return whole.full_tensor()


def _public(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("causal_lm.")


def open_world(cfg: ParallelConfig, device: str = "auto") -> World:
    """The world that torchrun describes in the environment, or a process of its own.

    ConfigError: a world size that `parallel.replicas` does not divide, sharding off with more than
    one process, replicas without sharding.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    here = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    check_world(cfg, size)
    if here.type == "cpu":
        _keep_heap_small()
    if here.type == "cuda":
        # Before NCCL starts, and for kernels of ours: they would otherwise use device 0.
        torch.cuda.set_device(here)
    if not cfg.sharded(size):
        return World(here)
    timeout = timedelta(minutes=cfg.timeout_minutes)
    dist.init_process_group(
        # Both on CUDA: the records and small sums of a step are CPU tensors, which NCCL refuses.
        "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo",
        timeout=timeout,
        rank=rank,
        world_size=size,
        store=_open_store(rank, size, timeout),
    )
    shape: tuple[int, ...] = (size,)
    names: tuple[str, ...] = ("shard",)
    if cfg.replicas > 1:
        # The last dimension is that of neighbouring ranks, which gather; replicas sum once a step.
        shape, names = (cfg.replicas, size // cfg.replicas), ("replicate", "shard")
    mesh = init_device_mesh(here.type, shape, mesh_dim_names=names)
    return World(here, rank=rank, size=size, mesh=mesh, timeout=timeout)


def _keep_heap_small() -> None:
    """Let glibc map each tensor of 1 MiB and more by itself, for the rest of the process.

    By default its limit grows to 32 MiB with the first tensors. From then on those of every step,
    in sizes that change, lie in one heap, whose free pieces it searches longer and longer: steps of
    SmolLM2's SFT went from 3.6 to 10 s in 380 steps, half of a core in malloc.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:  # the user's own
        return
    # Other libraries of C, and other allocators, have none, and grow no such heap.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _open_store(rank: int, size: int, timeout: timedelta) -> Any:
    """A store in which nothing is written yet.

    torchrun's own outlives a restart, so a process may read the address that a dead one had left:
    "connection refused", in about half of the restarts. Its restart count is no help: only the
    agent of the node that failed raises it. So the main process deals out a new prefix, to those
    that are alive: each leaves a random word, and takes the prefix that comes back behind it.
    """
    if "MASTER_ADDR" not in os.environ:
        # One process, not started by torchrun: a store in memory, and no port is opened.
        return HashStore()
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    word, prefix, end = uuid.uuid4().hex, "", time.monotonic() + timeout.total_seconds()
    # Process 0 waits for a sign of every other; each other one for its prefix.
    waiting = set(range(1, size)) if rank == 0 else {rank}
    if rank:
        store.set(f"here/{rank}", word)
    while waiting:
        if time.monotonic() > end:
            raise RuntimeError(
                f"process {rank} waited {timeout} for processes {sorted(waiting)} to start; look "
                "at their logs, or raise parallel.timeout_minutes"
            )
        for other in sorted(waiting):
            # Three messages a process, since a store may hold those of the dead: its word, the
            # prefix with that word before it (so it is no old one), and that it has read it.
            said, answer = f"here/{other}", f"prefix/{other}"
            if rank == 0 and store.check([said]):
                store.set(answer, store.get(said).decode() + word)
                waiting -= {other} if store.check([f"{word}/{other}"]) else set()
            elif rank and store.check([answer]) and store.get(answer).decode().startswith(word):
                prefix = store.get(answer).decode().removeprefix(word)
                store.set(f"{prefix}/{rank}", "taken")
                waiting.clear()
        time.sleep(0.05)  # the store has no wait for whichever of several keys comes first
    return PrefixStore(prefix or word, store)


def check_world(cfg: ParallelConfig, size: int) -> None:
    """ConfigError unless `size` processes can make the mesh of `cfg`."""
    if size % cfg.replicas:
        raise ConfigError(
            f"parallel.replicas: got {cfg.replicas}, expected a divisor of the {size} processes; "
            "take the number of nodes, or 1"
        )
    if cfg.tensor == "head" and (size == 1 or cfg.replicas > 1 or cfg.cpu_offload):
        raise ConfigError(
            f"parallel.tensor: got 'head' with {size} processes, {cfg.replicas} replicas and "
            f"cpu_offload {str(cfg.cpu_offload).lower()}; it wants several processes, one replica "
            "and no offload: set 'none'"
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
    try:
        device = torch.device(name)
    except RuntimeError:
        # A device of another kind, to be refused below in the words of this key.
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"model.device: got {name!r}, expected auto, cpu, cuda or cuda:N (the number of a GPU)"
        )
    if device.type == "cpu":
        return device
    if not cuda:
        raise ConfigError(f"model.device: got {name!r}, but torch sees no CUDA device; set 'auto'")
    return device if device.index is not None else torch.device("cuda", local_rank)

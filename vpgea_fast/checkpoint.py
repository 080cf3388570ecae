"""Checkpoints that outlive a kill at any moment, the claim on a run directory, and the export.

A save writes aside, syncs, renames, and only then forgets:

    checkpoints/.tmp-step_20/
        __0_0.distcp process_0.pt   __1_0.distcp process_1.pt ...   each process its own, fsynced
        .metadata  state.json                      process 0, when all have written, fsynced
        manifest.json                              last: bytes and CRC-32 of all others, fsynced
    fsync that directory -> rename it to checkpoints/step_20 -> fsync checkpoints/ -> drop old ones

so a directory named step_N was complete when it got its name; if the disk lost part of it later,
its manifest says so and the one before is used. The order is the whole proof: move no line of it.

The tensors are in the format of torch.distributed.checkpoint (DCP), from one process as from many:
whole tensors cut in any way, `model.<name>` and `optimizer.state.<name>.<key>` under Hugging Face's
names. DCP plans, writes and reads the shards; its `save` and `load` are not used, because no file
operation may stand between two collectives (the others would wait for a process whose disk is
full), nor is `get_state_dict`, which has a fresh optimiser make a step to see its state.
"""

from __future__ import annotations

import copy
import fcntl
import functools
import json
import os
import pickle
import random
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vpgea_fast.distributed import RemoteError, World, full_weights, named_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD, OWN = "__{}_0.distcp", "process_{}.pt"
"""Of process {}: its shards, under DCP's name; its random states, and what cannot be cut anew."""
INDEX, STATE, MANIFEST = ".metadata", "state.json", "manifest.json"
RUN_MARK = "config.yaml"
LOCK = ".lock"
OPTIMIZER = "optimizer.state."
COPY_AHEAD = 10_000_000
"""Bytes that DCP copies from a GPU ahead of those that it writes; its own default."""

Do = Callable[..., Any]
"""`do(operation, *args)` performs one file operation; a test's own fails, or dies, at the n-th."""


def perform(operation: Callable[..., Any], *args: Any) -> Any:
    return operation(*args)


class CheckpointError(RuntimeError):
    """A run directory or a checkpoint that cannot be used; the message has cause and remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, written by so many `processes`.

    `trainer_state` is the JSON that was saved (tuples have become lists). `optimizer` has the
    `class` of the optimiser, the `parameters` it had, as `values` (name -> key -> value) those of
    its states that are no tensors, and whether it is `bound` to the number of processes.
    """

    path: Path
    step: int
    processes: int
    trainer_state: dict[str, Any]
    optimizer: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, whole, on the CPU, by its name in the files: to look at, or to convert
        where no model fits. Needs no other process."""
        reader = FileSystemReader(self.path)
        metadata = reader.read_metadata()
        whole = {
            name: torch.empty(saved.size, dtype=saved.properties.dtype)
            for name, saved in _saved_tensors(metadata).items()
        }
        _fill(whole, reader, metadata)
        return whole


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    *,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer_state: Mapping[str, Any],
    keep_last: int,
    do: Do = perform,
) -> Path:
    """Write checkpoints/step_<step>, random states included; return its path once it is durable.

    A collective: every process writes its own shards. `model` is a causal LM, or holds one as
    `causal_lm`. The optimiser's hyper-parameters belong to the configuration and are not saved. A
    complete checkpoint of this step is left as it is: a SIGTERM may fall on a step just saved.

    Raises CheckpointError, on every process, when a state of any holds NaN or infinity and when any
    cannot write; older checkpoints are then untouched and nothing of this one is left. Costs one
    read of what was written, for the checksums.
    """
    with Saver(
        run_dir, world=world, model=model, optimizer=optimizer, keep_last=keep_last, do=do
    ) as saver:
        return saver.save(step, trainer_state)


class Saver:
    """The saves of one run; with `background` a thread writes them.

    `save` then returns when the state is in host memory: the next update may change the weights at
    once. That copy is as large as this process's shards (7B in float32 with AdamW, 8 GPUs: 11 GB).
    The next `save`, `wait` or `close` waits for the thread, and raises what it met on every process
    alike.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep_last: int,
        background: bool = False,
        do: Do = perform,
    ) -> None:
        if keep_last < 1:
            raise ValueError(
                f"checkpoint.keep_last: got {keep_last}, expected 1 or more; set it to 1"
            )
        self.run_dir, self.world, self.keep_last, self.do = Path(run_dir), world, keep_last, do
        self.model, self.optimizer = model, optimizer
        self.thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self.pending: Future[None] | None = None

    def save(self, step: int, trainer_state: Mapping[str, Any]) -> Path:
        """As `save_checkpoint`, but in the background it is durable only after the next wait."""
        self.wait()
        final = self.run_dir / "checkpoints" / f"step_{step}"
        if any(self.world.gather(final.exists())) and _fault(final, self.world) is None:
            return final
        state = {"step": step, "processes": self.world.size, "trainer_state": trainer_state}
        parts = _take(
            final, state, self.world, self.model, self.optimizer, copied=self.thread is not None
        )
        write = functools.partial(_write, final, parts, keep_last=self.keep_last, do=self.do)
        if self.thread is None:
            write(self.world)
        else:
            self.pending = self.thread.submit(write, self.world.side)
        return final

    def wait(self) -> None:
        """Until the save before is durable. CheckpointError: it is not going to be."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self.thread is not None:
                self.thread.shutdown()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_checkpoint(run_dir: str | Path, *, world: World) -> Checkpoint | None:
    """The newest complete checkpoint, or None; the same for all processes, which share the reading.
    An incomplete one is passed over with a warning. A collective."""
    parent = Path(run_dir) / "checkpoints"
    for name in reversed(world.gather([path.name for path in _by_step(parent)])[0]):
        path = parent / name
        fault = _fault(path, world)
        if fault is None:
            return Checkpoint(path, **json.loads((path / STATE).read_text(encoding="utf-8")))
        if world.main:
            warnings.warn(f"{path}: {fault}; falling back to the checkpoint before", stacklevel=2)
    return None


def load_checkpoint(
    run_dir: str | Path, *, world: World, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Checkpoint | None:
    """Put the newest complete checkpoint into model, optimiser and random generators, in place.

    None: there is none, and nothing has changed. A collective; each process reads the shards that
    it needs, whatever the number of processes that wrote them. On as many as wrote them the run
    goes on bitwise; on another number with a warning, and a process beyond those that wrote seeds
    its generators from process 0's state and its own rank.

    CheckpointError, before anything has changed: a checkpoint of another model, vocabulary, dtype
    or optimiser, or of another number of processes with states in blocks (8 bits). Also removes
    what an interrupted save left aside: for the process that claimed the run only.
    """
    if world.main:
        for leftover in (*Path(run_dir).glob(".tmp-*"), *Path(run_dir).glob("checkpoints/.tmp-*")):
            _remove(leftover)
    found = find_checkpoint(run_dir, world=world)
    if found is None:
        return None
    reader = FileSystemReader(found.path)
    weights = named_weights(model)
    what, remedy = f"cannot read {found.path}", "delete it to go on from the one before"
    with _together(world, what, remedy):
        metadata = reader.read_metadata()
        _check_fit(found, metadata, world, weights, optimizer)
        targets = _targets(metadata, weights, optimizer)
        file = found.path / OWN.format(min(world.rank, found.processes - 1))
        own = torch.load(file, map_location="cpu", weights_only=True)
    with _together(world, what, remedy):
        _fill(targets, reader, metadata)
        states = _states(targets), _bound_states(own["states"], weights), found.optimizer["values"]
        _set_optimizer(optimizer, weights, states)
        _restore_rng(found, own["rng"], world)
    return found


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of torch (CPU, and this GPU) and random; numpy's is not used."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators back; a run that has moved between CPU and GPU gets a warning instead of
    the GPU's."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if (state["cuda"] is None) == (device.type == "cuda"):
        was = "a CPU" if state["cuda"] is None else "a GPU"
        warnings.warn(
            f"the checkpoint is of a run on {was}, this one is on {device.type}: the random state "
            "of the GPU is not restored",
            stacklevel=2,
        )
    elif state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def write_text(path: str | Path, text: str) -> None:
    """Replace a small file at once: a reader finds the old text or the new, whatever happens."""
    path = Path(path)
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free disk space first") from error
    finally:
        _remove(aside)


def truncate_jsonl(path: str | Path, *, upto: int, key: str = "step") -> int:
    """Drop torn lines and those whose `key` is above `upto`; return how many. Atomic.

    A resumed run calls it, so that no line of a lost step stays. Lines without the key stay; a
    missing file has no lines.
    """
    path = Path(path)
    if not path.exists():
        return 0
    aside = path.with_name(f".tmp-{path.name}")
    dropped = 0
    try:
        with path.open("rb") as old, aside.open("wb") as new:
            for line in old:
                if _belongs(line, key, upto):
                    new.write(line)
                else:
                    dropped += 1
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot rewrite {path}: {error}; free disk space first") from error
    finally:
        aside.unlink(missing_ok=True)
    return dropped


@dataclass(frozen=True)
class RunLock:
    """A claimed run directory. The claim ends with `release`, the `with` block, or the process."""

    path: Path
    handle: IO[str]

    def release(self) -> None:
        self.handle.close()

    def abandon(self) -> None:
        """Release, and remove the directory if the run never wrote into it: a start has failed."""
        if [entry.name for entry in self.path.iterdir()] == [LOCK]:
            _remove(self.path)
        self.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def claim_run_dir(run_dir: str | Path, *, resume: bool = False) -> RunLock:
    """Create a run directory, or with `resume` enter one, and keep every other process out of it.

    The lock is a POSIX record lock: a killed process drops it, and workers forked from this process
    do not inherit it (an orphan would hold a flock). It does not see a second claim by one process.
    Raises CheckpointError for a directory that is not empty, that is no run, that another process
    writes, or that cannot be written.
    """
    path = Path(run_dir)
    _check_claim(path, resume)
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = (path / LOCK).open("a+", encoding="ascii")
    except OSError as error:
        raise CheckpointError(
            f"cannot write the run directory {path}: {error.strerror}; give a writable --run.dir"
        ) from error
    try:
        _lock(handle, path)
        _check_claim(path, resume)  # again: a run may have come and gone since the first look
        handle.truncate(0)
        print(os.getpid(), file=handle, flush=True)
    except BaseException:
        handle.close()
        raise
    return RunLock(path, handle)


def export_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    world: World,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    replace: bool = False,
) -> Path:
    """Write a Hugging Face directory (safetensors) that `AutoModelForCausalLM` loads.

    A collective. `model` is a causal LM, or holds one as `causal_lm`; `dtype` is `model.dtype` by
    default, which for a Policy is that of its forward. A sharded model is gathered a tensor at a
    time, and collected in the host memory of process 0, which writes it aside and renames it.
    `replace` lets an earlier export in `out_dir` go; without it a directory that is not empty is a
    CheckpointError, as are weights that are not finite in `dtype`, and a disk that refuses.
    """
    out_dir = Path(out_dir)
    dtype = dtype or model.dtype  # pyright: ignore[reportAssignmentType]
    what, remedy = f"cannot write the export {out_dir}", "free disk space or make it writable"
    with _together(world, what, remedy):
        if world.main and not replace and out_dir.exists() and any(out_dir.iterdir()):
            raise CheckpointError(f"{out_dir} is not empty; export to another directory")
    weights = {}
    for name, weight in full_weights(model, dtype):
        if world.main:
            weights[name] = weight.cpu()
    with _together(world, what, remedy):
        _require_finite(weights, what="the export")
        if world.main:
            _write_export(
                getattr(model, "causal_lm", model), weights, tokenizer, out_dir, max_shard_size
            )
    return out_dir


def _write_export(
    causal_lm: Any,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    max_shard_size: str,
) -> None:
    aside = out_dir.with_name(f".tmp-{out_dir.name}-{os.getpid()}")
    previous = out_dir.with_name(f".tmp-old-{out_dir.name}-{os.getpid()}")
    try:
        _remove(aside)
        _make_directory(aside)
        _outline(causal_lm, weights).save_pretrained(
            aside, state_dict=weights, max_shard_size=max_shard_size
        )
        tokenizer.save_pretrained(aside)
        mode = (aside / "config.json").stat().st_mode  # safetensors makes its files 0600
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            _sync(path)
        _sync(aside)
        if out_dir.exists():
            out_dir.rename(previous)
        aside.rename(out_dir)
        _sync(out_dir.parent)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        for path in (aside, previous):
            shutil.rmtree(path, ignore_errors=True)


def _outline(causal_lm: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """The model without weights, of the class that it had before it was sharded and in the dtype
    of `weights`: `save_pretrained` writes both into config.json."""
    plain = next(kind for kind in type(causal_lm).__mro__ if not issubclass(kind, FSDPModule))
    dtypes = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    with torch.device("meta"):
        outline = plain(copy.deepcopy(causal_lm.config)).to(*dtypes)
    outline.generation_config = causal_lm.generation_config
    return outline


def _forget(final: Path, keep_last: int, do: Do) -> None:
    """Delete all but the newest `keep_last` up to `final`.

    Later steps do not count: they are incomplete ones that the run fell back from. A rename comes
    first, so that a kill leaves no half a checkpoint under a checkpoint's name. The new one is safe
    by now, so a directory that cannot be deleted is no reason to stop the run.
    """
    upto = [path for path in _by_step(final.parent) if _step_of(path) <= _step_of(final)]
    for old in upto[:-keep_last]:
        doomed = final.with_name(f".tmp-old-{old.name}")
        try:
            do(_remove, doomed)
            do(os.rename, old, doomed)
            do(_remove, doomed)
        except OSError as error:
            warnings.warn(f"cannot delete {old}: {error}; delete it by hand", stacklevel=3)


def _by_step(parent: Path) -> list[Path]:
    named = [path for path in parent.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(named, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


class _SavePlanner(DefaultSavePlanner):
    """Plans over a model's tensors and takes the bytes from `shards`, this process's own of each:
    the live ones, or copies."""

    shards: Mapping[str, torch.Tensor]

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.shards[index.fqn]


@dataclass(frozen=True)
class _Parts:
    """What this process writes of a checkpoint, and what process 0 writes for all."""

    writer: FileSystemWriter
    planner: _SavePlanner
    plan: SavePlan
    index: Metadata
    own: dict[str, Any]
    state: str


def _take(
    final: Path,
    state: dict[str, Any],
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    copied: bool,
) -> _Parts:
    """Take the state of this moment, and settle with the others who writes what. A collective.

    `copied` shards are in host memory and the model's no more; others are read when written.
    """
    planner = _SavePlanner()
    take = _copy if copied else lambda tensor: tensor
    with _together(world):
        weights = named_weights(model)
        states, bound, state["optimizer"] = _optimizer_states(optimizer, weights)
        tensors = {f"model.{name}": weight.detach() for name, weight in weights.items()} | states
        shards = {name: _shard(tensor) for name, tensor in tensors.items()}
        _require_finite(shards | bound, what=f"step {state['step']}")
        planner.set_up_planner(tensors, is_coordinator=world.main)
        own_plan = planner.create_local_plan()
        text = json.dumps(state, allow_nan=False, indent=1)
        planner.shards = {name: take(shard) for name, shard in shards.items()}
        own = {
            "rng": rng_state(world.device),
            "states": {name: take(shard) for name, shard in bound.items()},
        }
    plans, index = planner.create_global_plan(_exchange(world, own_plan))
    planner.state_dict = {}  # of live tensors
    # A thread must not touch CUDA: its current device would be the first, not this process's.
    ahead = 0 if copied else COPY_AHEAD
    writer = FileSystemWriter(_aside(final), sync_files=False, per_thread_copy_ahead=ahead)
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[world.rank])
    return _Parts(writer, planner, plan, index, own, text)


def _write(final: Path, parts: _Parts, world: World, *, keep_last: int, do: Do) -> None:
    """The protocol at the head of this file. A collective, over the connections of `world`."""
    parent, aside = final.parent, _aside(final)
    what = f"cannot save {final}"
    remedy = (
        "older checkpoints are intact. Free disk space (or make the directory writable) and "
        f"continue with --resume {parent.parent}"
    )
    own, common = (SHARD.format(world.rank), OWN.format(world.rank)), (INDEX, STATE)
    written: list[WriteResult] = []
    entries: dict[str, Any] = {}
    try:
        with _together(world, what, remedy):
            if world.main:
                do(_make_directory, parent)
                do(_sync, parent.parent)
                do(_remove, aside)
                do(_make_directory, aside)
        with _together(world, what, remedy):
            written = do(_write_shards, aside / own[0], parts)
            do(_sync, aside / own[0])
            do(_write_tensors, aside / own[1], parts.own)
            do(_sync, aside / own[1])
            entries = do(_manifest, aside, own)
        all_written, all_entries = zip(*_exchange(world, (written, entries)), strict=True)
        with _together(world, what, remedy):
            if world.main:
                do(_write_index, aside / INDEX, parts, list(all_written))
                do(_sync, aside / INDEX)
                do(_write_text, aside / STATE, parts.state)
                do(_sync, aside / STATE)
                files = {name: entry for part in all_entries for name, entry in part.items()}
                files |= do(_manifest, aside, common)
                do(_write_text, aside / MANIFEST, json.dumps({"files": files}, indent=1))
                do(_sync, aside / MANIFEST)
                do(_sync, aside)
                do(_remove, final)  # there is one only if it was found incomplete
                do(os.rename, aside, final)
                do(_sync, parent)
    finally:
        if world.main:
            shutil.rmtree(aside, ignore_errors=True)
    if world.main:
        _forget(final, keep_last, do)


def _aside(final: Path) -> Path:
    return final.with_name(f".tmp-{final.name}")


def _exchange(world: World, value: Any) -> list[Any]:
    """`world.gather` of what JSON cannot say: DCP's records."""
    return [pickle.loads(part) for part in world.gather_bytes(pickle.dumps(value))]


@contextmanager
def _together(world: World, what: str = "", remedy: str = "") -> Iterator[None]:
    """`world.together`; what a disk refuses and what others met are CheckpointErrors."""
    try:
        with world.together():
            try:
                yield
            except OSError as error:
                raise CheckpointError(f"{what}: {error}; {remedy}") from error
    except RemoteError as error:
        raise CheckpointError(str(error)) from error


def _optimizer_states(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """By name in the files: the states that DCP can cut, this process's shards of those that it
    cannot (torchao's 8-bit blocks, a tensor class of their own); and the rest, as in `Checkpoint`.
    """
    tensors: dict[str, torch.Tensor] = {}
    bound: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    trained = _trained(optimizer, weights)
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                values.setdefault(name, {})[key] = value
            elif type(shard := _shard(value)) is torch.Tensor:
                tensors[f"{OPTIMIZER}{name}.{key}"] = value.detach()
            else:
                bound[f"{OPTIMIZER}{name}.{key}"] = shard
    rest = {
        "class": type(optimizer).__name__,
        "parameters": [*trained],
        "values": values,
        "bound": bool(bound),
    }
    return tensors, bound, rest


def _trained(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]
) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by name."""
    names = {id(weight): name for name, weight in weights.items()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def _states(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Name of a parameter -> key -> state, of tensors by name in the files."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith(OPTIMIZER):
            name, _, key = full_name.removeprefix(OPTIMIZER).rpartition(".")
            states.setdefault(name, {})[key] = tensor
    return states


def _bound_states(
    shards: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Shards of blocks beside their parameters, sharded as those are."""
    states = _states(shards)
    for name, state in states.items():
        weight = weights[name]
        for key, shard in state.items():
            state[key] = shard = shard.to(_shard(weight).device)
            if isinstance(weight, DTensor):
                state[key] = DTensor.from_local(
                    shard,
                    weight.device_mesh,
                    weight.placements,
                    run_check=False,
                    shape=weight.shape,
                    stride=weight.stride(),
                )
    return states


def _set_optimizer(
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, torch.Tensor],
    states: Iterable[Mapping[str, Mapping[str, Any]]],
) -> None:
    """Not by `load_state_dict`, which casts every state to its parameter's dtype: moments in
    bfloat16 would come back in float32."""
    trained = _trained(optimizer, weights)
    optimizer.state.clear()
    for part in states:
        for name, state in part.items():
            optimizer.state[trained[name]].update(state)


def _targets(
    metadata: Metadata, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Where to read to: the model's own tensors, and new ones for the optimiser's states."""
    targets = {f"model.{name}": weight.detach() for name, weight in weights.items()}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = _trained(optimizer, weights)
    for full_name, saved in _saved_tensors(metadata).items():
        if not full_name.startswith(OPTIMIZER):
            continue
        name = full_name.removeprefix(OPTIMIZER).rpartition(".")[0]
        parameter, dtype = trained[name], saved.properties.dtype
        if saved.size == parameter.shape:
            targets[full_name] = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            # As AdamW does: a step count on a GPU that no fused kernel reads there would cost a
            # sync a parameter.
            group = groups[id(parameter)]
            beside = saved.size or group.get("fused") or group.get("capturable")
            device = _shard(parameter).device if beside else "cpu"
            targets[full_name] = torch.zeros(saved.size, dtype=dtype, device=device)
    return targets


def _check_fit(
    found: Checkpoint,
    metadata: Metadata,
    world: World,
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """CheckpointError if the checkpoint is not one of this model and this kind of optimiser."""
    saved = {
        name.removeprefix("model."): tensor
        for name, tensor in _saved_tensors(metadata).items()
        if name.startswith("model.")
    }
    where = f"{found.path} is of another model"
    remedy = "set model.path to what the run began with, or start another run"
    if odd := sorted(saved.keys() ^ weights.keys()):
        has, lacks = ("it", "this one") if odd[0] in saved else ("this one", "it")
        raise CheckpointError(f"{where}: {has} has {odd[0]}, {lacks} has not; {remedy}")
    for name, weight in weights.items():
        if saved[name].size != weight.shape:
            raise CheckpointError(
                f"{where} or vocabulary: {name} is {tuple(saved[name].size)} there, "
                f"{tuple(weight.shape)} here; {remedy}"
            )
        if saved[name].properties.dtype != weight.dtype:
            raise CheckpointError(
                f"{found.path} holds {name} in {saved[name].properties.dtype}, this run in "
                f"{weight.dtype}; set model.dtype and model.master_dtype to what the run began with"
            )
    kind = type(optimizer).__name__
    if found.optimizer["class"] != kind:
        raise CheckpointError(
            f"{found.path} holds states of {found.optimizer['class']}, this run has {kind}; set "
            "optim.name to what the run began with"
        )
    if odd := {*found.optimizer["parameters"]} ^ _trained(optimizer, weights).keys():
        raise CheckpointError(
            f"{found.path} is of a run that trained other weights ({min(odd)} among them); {remedy}"
        )
    if found.optimizer["bound"] and found.processes != world.size:
        raise CheckpointError(
            f"{found.path} is of {found.processes} processes, now there are {world.size}, and the "
            f"blocks of {kind} cannot be cut anew; go on with {found.processes}"
        )


def _restore_rng(found: Checkpoint, state: Mapping[str, Any], world: World) -> None:
    """`state` is this process's, or that of the last one that saved."""
    if world.main and found.processes != world.size:
        warnings.warn(
            f"{found.path} is of {found.processes} processes, now there are {world.size}: sums "
            f"round otherwise, and random numbers begin anew from process {found.processes} on",
            stacklevel=3,
        )
    if world.rank < found.processes:
        restore_rng(state, world.device)
    else:
        seed = zlib.crc32(state["torch"].numpy().tobytes()) + world.rank
        torch.manual_seed(seed)
        random.seed(seed)


def _fault(path: Path, world: World) -> str | None:
    """Why the checkpoint is not complete, or None; all processes read a share. A collective."""
    return next(filter(None, world.gather(_damage(path, world))), None)


def _damage(path: Path, world: World) -> str | None:
    """What is wrong with this process's share of the files. Sizes first: they cost no read."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        names = sorted({INDEX, STATE, *files})
        for name in names:
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, the manifest says {files[name]['bytes']}"
        own = names[world.share(len(names))]
        damaged = [name for name, entry in _manifest(path, own).items() if entry != files[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not complete ({type(error).__name__}: {error})"
    return f"the checksum of {', '.join(damaged)} is wrong" if damaged else None


def _manifest(path: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of files: enough to find a torn one, at 2.7x the rate of SHA-256."""
    entries: dict[str, dict[str, int]] = {}
    for name in names:
        with (path / name).open("rb") as file:
            crc = 0
            while chunk := file.read(1 << 20):
                crc = zlib.crc32(chunk, crc)
            entries[name] = {"bytes": file.tell(), "crc32": crc}
    return entries


def _saved_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        name: saved
        for name, saved in metadata.state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    }


def _fill(targets: dict[str, torch.Tensor], reader: FileSystemReader, metadata: Metadata) -> None:
    """Read into `targets`: of DTensors this process's shards. No collective."""
    planner = DefaultLoadPlanner()
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _inner(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that a tensor is made of: itself, as "", or those of a tensor class."""
    if type(tensor) is torch.Tensor:
        return {"": tensor}
    return {name: getattr(tensor, name) for name in _flatten(tensor)[0]}


def _flatten(tensor: Any) -> tuple[list[str], Any]:
    return tensor.__tensor_flatten__()


def _copy(tensor: Any) -> torch.Tensor:
    """In host memory, and of its own. A tensor class's `to` need not copy: its parts' does."""
    parts = {name: part.to("cpu", copy=True) for name, part in _inner(tensor).items()}
    if type(tensor) is torch.Tensor:
        return parts[""]
    context = _flatten(tensor)[1]
    return tensor.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())


def _write_shards(path: Path, parts: _Parts) -> list[WriteResult]:
    """The shards of this process, into `path`, whose name DCP finds by itself."""
    assert path.parent == Path(parts.writer.path)
    try:
        return parts.writer.write_data(parts.plan, parts.planner).wait()
    except RuntimeError as error:  # how torch's zip writer reports a full disk
        raise OSError(str(error)) from error


def _write_index(path: Path, parts: _Parts, written: list[list[WriteResult]]) -> None:
    """Which tensor lies where: DCP's index, for the shards of all processes."""
    assert path.parent == Path(parts.writer.path)
    parts.writer.finish(parts.index, written)


def _write_tensors(path: Path, content: Any) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _make_directory(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _belongs(line: bytes, key: str, upto: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(record, dict) and record.get(key, upto) <= upto


def _lock(handle: IO[str], path: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        raise CheckpointError(
            f"cannot lock the run directory {path}: {error.strerror}; process {owner} writes this "
            "run: wait for it, stop it, or give another --run.dir"
        ) from error


def _check_claim(path: Path, resume: bool) -> None:
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a directory with --run.dir")
    if resume and not (path / RUN_MARK).is_file():
        raise CheckpointError(f"{path} is no run ({RUN_MARK} is missing); start without --resume")
    if (
        not resume
        and path.is_dir()
        and any(
            entry.name != LOCK and not entry.name.startswith(".tmp-") for entry in path.iterdir()
        )
    ):
        raise CheckpointError(
            f"{path} is not empty, and a run is never overwritten; continue it with --resume "
            f"{path}, or give another --run.dir"
        )


def _require_finite(tensors: Mapping[str, torch.Tensor], *, what: str) -> None:
    """Smallest and largest element of each: NaN and infinity show in them, with no mask in memory,
    and the devices are asked once all is queued."""
    extremes = [
        (name, torch.stack(part.aminmax()))
        for name, tensor in tensors.items()
        for part in _inner(tensor).values()
        if part.is_floating_point() and part.numel()
    ]
    bad = next((name for name, pair in extremes if not pair.isfinite().all()), None)
    if bad is not None:
        raise CheckpointError(
            f"{what} is not saved: {bad} holds NaN or infinity; go on from the last checkpoint "
            "with a lower optim.lr, and look at the last steps in paths.jsonl"
        )

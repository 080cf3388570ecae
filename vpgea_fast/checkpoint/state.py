"""What a checkpoint holds, as this process's part of it: taken from a model and an optimiser, cut
by torch.distributed.checkpoint (DCP), and put back.

| DCP's shards        | model.<name>, optimizer.state.<name>.<key>: whole tensors, cut anywhere;  |
|                     | of a posterior policy the same behind `posterior.`                        |
| a process's file    | its random states, optimiser states that cannot be cut anew (8-bit blocks) |
| state.json          | the trainer's state, optimiser states that are numbers, who wrote          |
| rollout.pt          | between two updates of a rollout: what those to come need of it            |

Names are Hugging Face's. DCP plans, writes and reads the shards. Its `save` and `load` are not used
because no file operation may stand between two collectives: the others would wait for a process
whose disk is full. Nor are `get_state_dict`, which has a fresh optimiser make a step to see its
state, and `load_state_dict`, which casts every state to its parameter's dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from vpgea_fast.checkpoint.dcp import (
    Planner,
    Reader,
    copy_to_host,
    exchange,
    fill,
    inner_of,
    saved_tensors,
    shard_of,
)
from vpgea_fast.checkpoint.files import CheckpointError, together
from vpgea_fast.checkpoint.generators import resume_rng, rng_state
from vpgea_fast.checkpoint.optimizers import (
    MODEL,
    beside,
    by_name,
    kind_of,
    optimizer_states,
    state_targets,
    trained_by_name,
)
from vpgea_fast.distributed import World, master_weights, named_weights, take_masters
from vpgea_fast.names import Trained

SHARD, OWN = "__{}_0.distcp", "process_{}.pt"
"""Files of process {}; DCP names the first."""
STATE = "state.json"
"""What neither of them holds."""
ROLLOUT = "rollout.pt"
"""Only between two updates of a rollout. One for all: every process has the same rows."""
POSTERIOR = "posterior."
"""Before the names of a second policy."""
States = Mapping[str, Mapping[str, Any]]
"""Name of a parameter -> key -> state."""
Named = TypeVar("Named")
STATE_KINDS = {
    "step": int,
    "updates": int,
    "processes": int,
    "trainer_state": dict,
    "optimizer": dict,
}
LATER_KINDS = {"posterior": dict}
"""What stands in state.json only where there is a second policy."""
OPTIMIZER_KINDS = {"class": str, "parameters": list, "values": dict, "bound": bool}
"""What stands in state.json, and in its `optimizer`."""
REMEDY = "set model.path (in the run's config.yaml) to its own model, or start another run"
"""For a checkpoint of another model."""
COPY_AHEAD = 10_000_000
"""Bytes that DCP copies from a GPU ahead of those that it writes; its own default."""


class Kept(NamedTuple):
    """A model, or what holds one as `causal_lm`, and its optimiser."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, written by so many `processes`: `step` whole steps were made,
    and so many `updates` of the next one.

    `trainer_state` is the JSON that was saved (tuples have become lists). `optimizer` has the
    `class` of the optimiser, the `parameters` it had, as `values` (name -> key -> value) those of
    its states that are no tensors, and whether it is `bound` to the number of processes;
    `posterior` is the same of a second policy, None where there is none.
    """

    path: Path
    step: int
    updates: int
    processes: int
    trainer_state: dict[str, Any]
    optimizer: dict[str, Any]
    posterior: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """The state.json of a checkpoint; ValueError where it is not as `take` makes it."""
        # Its CRC has been compared by now: what is wrong here was written so, or edited.
        tree = json.loads((path / STATE).read_text(encoding="utf-8"))
        tree = {"updates": 0, **tree} if isinstance(tree, dict) else tree
        if not isinstance(tree, dict) or tree.keys() - LATER_KINDS.keys() != STATE_KINDS.keys():
            raise ValueError(f"{STATE}: expected an object of {', '.join(STATE_KINDS)}")
        later = {key: kind for key, kind in LATER_KINDS.items() if key in tree}
        # An empty one fails below, on its first key, in words.
        optimizers = [
            (tree[key] if isinstance(tree[key], dict) else {}, OPTIMIZER_KINDS)
            for key in ("optimizer", *later)
        ]
        for part, kinds in ((tree, STATE_KINDS | later), *optimizers):
            for key, kind in kinds.items():
                if type(part.get(key)) is not kind:
                    got = f"got {key} {part.get(key)!r:.60}"
                    raise ValueError(f"{STATE}: {got}, expected {kind.__name__}")
        return cls(path, **tree)  # its keys are the other fields, as checked above

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, whole, on the CPU, by its name in the files: to look at, or to convert
        where no model fits. Needs no other process."""
        # No process group is asked for: this runs on a laptop too.
        reader = Reader(self.path)
        metadata = reader.read_metadata()
        whole = {
            name: torch.empty(saved.size, dtype=saved.properties.dtype)
            for name, saved in saved_tensors(metadata).items()
        }
        fill(whole, reader, metadata)
        return whole


@dataclass(frozen=True)
class Planned:
    """Who writes what: this process's wish, what it got, and DCP's index of all. Exchanging wishes
    costs seconds at hundreds of processes, and they change only with the optimiser's first step."""

    wish: SavePlan
    plan: SavePlan
    index: Metadata


@dataclass(frozen=True)
class Snapshot:
    """This process's part of a checkpoint, and what process 0 writes for all."""

    writer: FileSystemWriter
    planner: Planner
    planned: Planned
    own: dict[str, Any]
    state: str
    rollout: Mapping[str, Any] | None


def take(
    folder: Path,
    state: Mapping[str, Any],
    *,
    world: World,
    kept: Mapping[str, Kept],
    copied: bool,
    known: Planned | None,
    rollout: Mapping[str, Any] | None,
) -> Snapshot:
    """Take the state of this moment, to be written into `folder`. A collective.

    `kept` are the models by what stands before their names: "", and `POSTERIOR` of a second one.
    `copied` shards are in host memory and no more the model's; others are read when written.
    CheckpointError, on every process, for NaN or infinity on any.
    """
    planner = Planner()
    planner.shards = {}
    copy = copy_to_host if copied else lambda tensor: tensor  # host bytes: this process's shards
    with together(world):
        tensors: dict[str, torch.Tensor] = {}
        bound: dict[str, torch.Tensor] = {}
        about: dict[str, Any] = {}
        for prefix, (model, optimizer) in kept.items():
            states, blocks, rest = optimizer_states(optimizer, named_weights(model))
            named = {f"{MODEL}{name}": w.detach() for name, w in master_weights(model).items()}
            tensors |= {f"{prefix}{name}": tensor for name, tensor in (named | states).items()}
            bound |= {f"{prefix}{name}": block for name, block in blocks.items()}
            about[prefix.rstrip(".") or "optimizer"] = rest
        shards = {name: shard_of(tensor) for name, tensor in tensors.items()}
        require_finite(shards | bound, what=f"step {state['step']}")
        planner.set_up_planner(tensors, is_coordinator=world.main)
        wish = planner.create_local_plan()
        # The plan is made; live tensors here would keep their memory to the end of the write.
        planner.state_dict = {}  # of live tensors
        text = json.dumps({**state, **about}, allow_nan=False, indent=1)
        planner.shards = {name: copy(shard) for name, shard in shards.items()}
        bound = {name: copy(shard) for name, shard in bound.items()}
    # A thread must not touch CUDA: its current device would be the first, not this process's.
    ahead = 0 if copied else COPY_AHEAD
    writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=ahead)
    # Any: all exchange, or none. A process that alone planned anew would wait for ever.
    if known is None or world.any(wish != known.wish):
        plans, index = planner.create_global_plan(exchange(world, wish))
        known = Planned(wish, writer.prepare_global_plan(plans)[world.rank], index)
    own = {"rng": rng_state(world.device), "states": bound}
    return Snapshot(writer, planner, planned=known, own=own, state=text, rollout=rollout)


def write_shards(path: Path, taken: Snapshot) -> list[WriteResult]:
    """Write the shards of this process into `path`: DCP finds that name by itself."""
    # DCP joins the folder and a name of its plan; the protocol must mean the same file.
    assert path.parent == Path(taken.writer.path)
    with _disk_errors():
        plan = taken.planner.finish_plan(taken.planned.plan)
        return taken.writer.write_data(plan, taken.planner).wait()


def write_index(path: Path, taken: Snapshot, written: list[list[WriteResult]]) -> None:
    """Write DCP's index of the shards that all processes have written."""
    assert path.parent == Path(taken.writer.path)
    taken.writer.finish(taken.planned.index, written)


def write_own(path: Path, taken: Snapshot) -> None:
    _write_tree(path, taken.own)


def write_rollout(path: Path, taken: Snapshot) -> None:
    _write_tree(path, taken.rollout)


def _write_tree(path: Path, tree: Mapping[str, Any] | None) -> None:
    with _disk_errors():
        torch.save(tree, path)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """OSError for a RuntimeError, which is how torch's zip writer reports a full disk."""
    handled = sys.exc_info()[1]  # a caller may save in its own `except`
    try:
        yield
    except RuntimeError as error:
        # It says the same of a file that a second Ctrl-C has left half written.
        cause: BaseException | None = error
        while (cause := cause.__context__) not in (None, handled):
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
        raise OSError(str(error)) from error


def put(found: Checkpoint, *, world: World, kept: Mapping[str, Kept]) -> None:
    """Put a checkpoint into models, optimisers and random generators; `kept` as `take` has them. A
    collective.

    CheckpointError, on every process and before anything has changed, if it does not fit.
    """
    reader = Reader(found.path)
    what, remedy = f"cannot read {found.path}", "delete it to go on from the one before"
    targets: dict[str, torch.Tensor] = {}
    restored: list[tuple[Kept, dict[str, nn.Parameter], list[States]]] = []
    # Files that somebody has edited, manifest and all, may raise anything.
    with together(world, what, remedy, catch=Exception):
        metadata = reader.read_metadata()
        _check_policies(found, kept)
        # More processes than wrote: the others start from the last one's file, and seed anew.
        file = found.path / OWN.format(min(world.rank, found.processes - 1))
        own = torch.load(file, map_location="cpu", weights_only=True)
        for prefix, one in kept.items():
            weights, about = named_weights(one.model), _about(found, prefix)
            saved = _below(saved_tensors(metadata), prefix)
            masters = master_weights(one.model)
            _check_weights(found, saved, masters)
            _check_fit(found, about, world=world, weights=weights, optimizer=one.optimizer)
            ours = {f"{MODEL}{name}": master.detach() for name, master in masters.items()}
            ours |= state_targets(saved, weights, one.optimizer, path=found.path)
            bound = beside(_below(own["states"], prefix), weights)
            targets |= {f"{prefix}{name}": tensor for name, tensor in ours.items()}
            states = [by_name(ours), by_name(bound), about["values"]]
            restored.append((one, trained_by_name(one.optimizer, weights), states))
    with together(world, what, remedy, catch=Exception):
        fill(targets, reader, metadata)  # the weights straight into the model's storage
        # All is read and checked by now: from here on nothing of this run's state survives.
        for one, trained, parts in restored:
            take_masters(one.model)
            one.optimizer.state.clear()
            for states in parts:
                for name, state in states.items():
                    one.optimizer.state[trained[name]].update(state)
        resume_rng(own["rng"], world, processes=found.processes, path=found.path)


def put_weights(
    found: Checkpoint, model: nn.Module, *, world: World, who: Trained = "policy"
) -> None:
    """Put the weights of a policy of a checkpoint into a model, and nothing else of it. A
    collective.

    CheckpointError, on every process and before anything has changed, if they do not fit.
    """
    reader, weights = Reader(found.path), master_weights(model)
    prefix = POSTERIOR if who == "posterior" else ""
    what, remedy = f"cannot read {found.path}", "take another checkpoint"
    with together(world, what, remedy, catch=Exception):
        metadata = reader.read_metadata()
        if prefix and found.posterior is None:
            raise CheckpointError(
                f"{found.path} holds one policy and no posterior policy; its run had none: take "
                "the policy's weights"
            )
        _check_weights(found, _below(saved_tensors(metadata), prefix), weights)
    # Apart: no process writes a weight before all have found that theirs fit.
    with together(world, what, remedy, catch=Exception):
        targets = {f"{prefix}{MODEL}{name}": weight.detach() for name, weight in weights.items()}
        fill(targets, reader, metadata)
        take_masters(model)


def _about(found: Checkpoint, prefix: str) -> dict[str, Any]:
    """What state.json says of the optimiser of a model."""
    about = found.posterior if prefix == POSTERIOR else found.optimizer
    assert about is not None  # `_check_policies` has looked
    return about


def _below(named: Mapping[str, Named], prefix: str) -> dict[str, Named]:
    """What belongs to one model, by its names without the prefix."""
    if prefix:
        return {n.removeprefix(prefix): x for n, x in named.items() if n.startswith(prefix)}
    return {name: value for name, value in named.items() if not name.startswith(POSTERIOR)}


def _check_policies(found: Checkpoint, kept: Mapping[str, Kept]) -> None:
    """Raise CheckpointError for a checkpoint of more policies than this run has, or of fewer."""
    if (POSTERIOR in kept) == (found.posterior is not None):
        return
    has, want = ("no", "has one") if POSTERIOR in kept else ("a", "has none")
    raise CheckpointError(
        f"{found.path} holds {has} posterior policy, and this run {want}; set "
        "objective.share_params to what the run began with, or start another run"
    )


def require_finite(tensors: Mapping[str, torch.Tensor], *, what: str) -> None:
    """Raise CheckpointError for NaN or infinity. They show in the smallest and largest element,
    with no mask in memory; the devices are asked once all is queued."""
    extremes = [
        (name, torch.stack(part.aminmax()))  # (2,), NaN where any element is
        for name, tensor in tensors.items()
        for part in inner_of(tensor).values()
        if part.is_floating_point() and part.numel()
    ]
    bad = next((name for name, pair in extremes if not pair.isfinite().all()), None)
    if bad is not None:
        raise CheckpointError(
            f"{what} is not saved: {bad} holds NaN or infinity; go on from the last checkpoint "
            "with a lower optim.lr, and look at the last steps in paths.jsonl"
        )


def _check_fit(
    found: Checkpoint,
    about: Mapping[str, Any],
    *,
    world: World,
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise CheckpointError for a checkpoint of another kind of optimiser, or of other weights."""
    # A moment of another optimiser has the same shape and another meaning.
    kind = kind_of(optimizer)
    if about["class"] != kind:
        raise CheckpointError(
            f"{found.path} holds states of {about['class']}, this run has {kind}; set "
            "optim.name to what the run began with"
        )
    if odd := {*about["parameters"]} ^ trained_by_name(optimizer, weights).keys():
        raise CheckpointError(
            f"{found.path} is of a run that trained other weights ({min(odd)} among them); {REMEDY}"
        )
    if about["bound"] and found.processes != world.size:
        raise CheckpointError(
            f"{found.path} is of {found.processes} processes, now there are {world.size}, and the "
            f"blocks of {kind} cannot be cut anew; go on with {found.processes}"
        )


def _check_weights(
    found: Checkpoint,
    tensors: Mapping[str, TensorStorageMetadata],
    weights: Mapping[str, torch.Tensor],
) -> None:
    """Raise CheckpointError for a checkpoint of another model."""
    # Optimiser states have a prefix of their own and are checked elsewhere.
    saved = _below(tensors, MODEL)
    where = f"{found.path} is of another model"
    if odd := sorted(saved.keys() ^ weights.keys()):
        has, lacks = ("it", "this one") if odd[0] in saved else ("this one", "it")
        raise CheckpointError(f"{where}: {has} has {odd[0]}, {lacks} has not; {REMEDY}")
    for name, weight in weights.items():
        # A grown vocabulary is the usual cause, so the message names it.
        if saved[name].size != weight.shape:
            raise CheckpointError(
                f"{where} or vocabulary: {name} is {tuple(saved[name].size)} there, "
                f"{tuple(weight.shape)} here; {REMEDY}"
            )
        if saved[name].properties.dtype != weight.dtype:
            raise CheckpointError(
                f"{found.path} holds {name} in {saved[name].properties.dtype}, this run in "
                f"{weight.dtype}; set model.dtype and model.master_dtype to what the run began with"
            )

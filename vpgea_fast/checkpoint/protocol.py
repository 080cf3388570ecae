"""The protocol of a save and a load: which file, in which order, and who agrees to it.

A save writes aside, syncs, renames, and only then forgets:

    checkpoints/.tmp-step_20/
        __0_0.distcp process_0.pt   __1_0.distcp process_1.pt ...   each process its own, fsynced
        .metadata  state.json  [rollout.pt]        process 0, when all have written, fsynced
        manifest.json                              last: bytes and CRC-32 of all others, fsynced
    fsync that directory -> rename it to checkpoints/step_20 -> fsync checkpoints/ -> drop old ones

so a directory named step_N was complete when it got its name; if the disk lost part of it later,
its manifest says so and the one before is used. The order is the whole proof: move no line of it.

step_N_U was saved inside a step: N whole steps and U updates of the next one, whose rollout is in
rollout.pt. It serves a resume alone, and goes once a later checkpoint is there.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.storage import WriteResult

from vpgea_fast.checkpoint.dcp import INDEX, exchange
from vpgea_fast.checkpoint.files import (
    SAVED,
    CheckpointError,
    make_directory,
    remove,
    sync,
    together,
)
from vpgea_fast.checkpoint.state import (
    OWN,
    POSTERIOR,
    ROLLOUT,
    SHARD,
    STATE,
    Checkpoint,
    Kept,
    Planned,
    Snapshot,
    put,
    take,
    write_index,
    write_own,
    write_rollout,
    write_shards,
)
from vpgea_fast.distributed import World

MANIFEST = "manifest.json"
STEP_NAME = "step_(0|[1-9][0-9]*)(_[1-9][0-9]*)?"

Made = TypeVar("Made")
Do = Callable[..., Any]
"""`do(operation, *args)` performs one file operation; a test's own fails, or dies, at the n-th."""


def perform(operation: Callable[..., Any], *args: Any) -> Any:
    return operation(*args)


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    *,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer_state: Mapping[str, Any],
    keep_last: int,
    worth: Mapping[int, float] | None = None,
    posterior: Kept | None = None,
    do: Do = perform,
) -> Path:
    """Write checkpoints/step_<step>, random states included; return its path once it is durable.

    Older ones are deleted but for the last `keep_last` and the one of the most `worth`, by step.

    A collective: every process writes its own shards. `model` is a causal LM, or holds one as
    `causal_lm`; `posterior` is a second one. The optimiser's hyper-parameters belong to the
    configuration and are not saved. A complete checkpoint of this step is left as it is: a SIGTERM
    may fall on a step just saved.

    Raises CheckpointError, on every process, when a state of any holds NaN or infinity and when any
    cannot write; older checkpoints are then untouched and nothing of this one is left. Costs one
    read of what was written, for the checksums.
    """
    # No thread: who calls this once wants the file, not the overlap.
    made: dict[str, Any] = {"model": model, "optimizer": optimizer, "posterior": posterior}
    with Saver(run_dir, world=world, keep_last=keep_last, do=do, **made) as saver:
        return saver.save(step, trainer_state, worth)


class Saver:
    """The saves of one run; with `background` a thread writes them. Making one is a collective.

    A background `save` returns when the state is in host memory: the next update may change the
    weights at once. That copy is as large as this process's shards (7B in float32 with AdamW on 8
    GPUs: 11 GB). The next `save`, `wait` or `close` waits for the thread, and raises what it met on
    every process alike.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep_last: int,
        posterior: Kept | None = None,
        background: bool = False,
        do: Do = perform,
    ) -> None:
        if keep_last < 1:
            raise ValueError(
                f"checkpoint.keep_last: got {keep_last}, expected 1 or more; set it to 1"
            )
        self.run_dir, self.world, self.keep_last, self.do = Path(run_dir), world, keep_last, do
        self.kept = _named(Kept(model, optimizer), posterior)
        self.thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        # The thread's collectives have connections of their own: on the main ones they would meet
        # those of the training step in any order.
        self.writers = world.side if background else world
        self.pending: Future[None] | None = None
        self.planned: Planned | None = None

    def save(
        self,
        step: int,
        trainer_state: Mapping[str, Any],
        worth: Mapping[int, float] | None = None,
        *,
        updates: int = 0,
        rollout: Mapping[str, Any] | None = None,
    ) -> Path:
        """As `save_checkpoint`, but in the background it is durable only after the next wait.

        With `updates` of the step after `step` made, `rollout` is what process 0 keeps for the
        rest of them: tensors, texts and numbers, which nobody changes any more.
        """
        self.wait()
        final = (
            self.run_dir / "checkpoints" / (f"step_{step}_{updates}" if updates else f"step_{step}")
        )
        state = {"step": step, "processes": self.world.size, "trainer_state": trainer_state}
        # Any: a shared disk shows a new directory to its processes at different times.
        if any(self.world.gather(final.exists())) and _fault(final, self.world) is None:
            return final
        taken = take(
            _aside(final),
            # Named only where there are some: a whole step is one for older versions too.
            {**state, "updates": updates} if updates else state,
            world=self.world,
            kept=self.kept,
            copied=self.thread is not None,
            known=self.planned,
            rollout=rollout,
        )
        # Who writes what stays the same from save to save: seconds at hundreds of processes.
        self.planned = taken.planned
        # `worth` is copied: training goes on and evaluates while the thread writes.
        forget = functools.partial(
            _forget, final, keep_last=self.keep_last, worth=dict(worth or {}), do=self.do
        )
        write = functools.partial(_write, final, taken, self.writers, forget=forget, do=self.do)
        if self.thread is None:
            write()
        else:
            # Free: `wait` above has seen the save before end.
            self.pending = self.thread.submit(write)
        return final

    def wait(self) -> None:
        """Wait until the save before is durable. CheckpointError: it is not going to be."""
        # Forgotten before it is asked: a failed save is reported once.
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
    # Process 0's listing for all: a shared disk may show others an older one.
    for name in reversed(world.gather([path.name for path in _by_step(parent)])[0]):
        path = parent / name
        fault = _fault(path, world)
        if fault is None:
            return Checkpoint.read(path)
        if world.main:
            warnings.warn(f"{path}: {fault}; falling back to the checkpoint before", stacklevel=2)
    return None


def load_checkpoint(
    run_dir: str | Path,
    *,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    posterior: Kept | None = None,
) -> Checkpoint | None:
    """Put the newest complete checkpoint into model, optimiser and random generators, in place; of
    a run of two policies into `posterior` too.

    None: the run never reached its first save, and nothing has changed. A collective; each process
    reads the shards that it needs, whatever the number of processes that wrote them. On as many as
    wrote them the run goes on bitwise; on another number with a warning, and a process beyond those
    that wrote seeds its generators from process 0's state and its own rank.

    CheckpointError, before anything has changed: no complete checkpoint of a run that was saved; a
    checkpoint of another model, vocabulary, dtype or optimiser, or of another number of processes
    with states in blocks (8 bits). Also removes what an interrupted save left aside: for the
    process that claimed the run only.
    """
    run_dir = Path(run_dir)
    if world.main:
        # What a killed save left aside never had a checkpoint's name, so nothing is lost with it.
        for leftover in (*run_dir.glob(".tmp-*"), *run_dir.glob("checkpoints/.tmp-*")):
            remove(leftover)
    found = find_checkpoint(run_dir, world=world)
    # Process 0 alone looks at the marks, and every process hears its error.
    with together(world):
        if world.main:
            _require_kept(run_dir, found)
    if found is not None:
        put(found, world=world, kept=_named(Kept(model, optimizer), posterior))
    return found


def _named(policy: Kept, posterior: Kept | None) -> dict[str, Kept]:
    """The models of a run by what stands before their names in the files."""
    return {"": policy} if posterior is None else {"": policy, POSTERIOR: posterior}


def read_rollout(
    found: Checkpoint, make: Callable[[dict[str, Any]], Made], *, world: World
) -> Made:
    """`make` of the rollout that was saved with its `updates`. A collective, with none in `make`.

    CheckpointError, on every process, for a rollout that cannot be read, or made.
    """
    what, remedy = f"cannot read {found.path}", "delete it to go on from the one before"
    with together(world, what, remedy, catch=Exception):
        return make(torch.load(found.path / ROLLOUT, map_location="cpu", weights_only=True))


def _write(
    final: Path, taken: Snapshot, world: World, *, forget: Callable[[], None], do: Do
) -> None:
    """Follow the protocol at the head of this file. A collective over `world`'s connections."""
    parent, aside = final.parent, _aside(final)
    what = f"cannot save {final}"
    remedy = (
        "older checkpoints are intact. Free disk space (or make the directory writable) and "
        f"continue with --resume {parent.parent}"
    )
    # What each process writes, and what process 0 writes for all.
    own, common = (SHARD.format(world.rank), OWN.format(world.rank)), (INDEX, STATE)
    written: list[WriteResult] = []
    entries: dict[str, Any] = {}
    try:
        with together(world, what, remedy):
            if world.main:
                # A kill from here to the rename leaves a directory that no load looks at.
                do(make_directory, parent)
                # Of the first save: checkpoints/ itself is durable only with its parent.
                do(sync, parent.parent)
                do(remove, aside)
                do(make_directory, aside)
        with together(world, what, remedy):
            written = do(write_shards, aside / own[0], taken)
            do(sync, aside / own[0])
            do(write_own, aside / own[1], taken)
            do(sync, aside / own[1])
            # Read back by who wrote it: one process would read all shards through one disk.
            entries = do(_manifest, aside, own)
        # Everyone's files are durable here: only then does process 0 name them.
        all_written, all_entries = zip(*exchange(world, (written, entries)), strict=True)
        with together(world, what, remedy):
            if world.main:
                do(write_index, aside / INDEX, taken, list(all_written))
                do(sync, aside / INDEX)
                do(_write_text, aside / STATE, taken.state)
                do(sync, aside / STATE)
                if taken.rollout is not None:
                    do(write_rollout, aside / ROLLOUT, taken)
                    do(sync, aside / ROLLOUT)
                    common += (ROLLOUT,)
                files = {name: entry for part in all_entries for name, entry in part.items()}
                files |= do(_manifest, aside, common)
                # The manifest is the last file: it names all others.
                do(_write_text, aside / MANIFEST, json.dumps({"files": files}, indent=1))
                do(sync, aside / MANIFEST)
                do(sync, aside)
                do(remove, final)  # there is one only if it was found incomplete
                # A kill before this line leaves the old checkpoints, one after it the new one too;
                # the sync behind it makes that true of a power cut.
                do(os.rename, aside, final)
                do(sync, parent)
    finally:
        if world.main:
            # Nothing there after the rename: this is for a save that failed.
            shutil.rmtree(aside, ignore_errors=True)
    if world.main:
        _mark_saved(parent.parent)
        forget()


def _mark_saved(run_dir: Path) -> None:
    """Leave SAVED in the run directory. No part of the protocol: without the mark, a run whose
    checkpoints are gone begins again instead of an error."""
    if not (run_dir / SAVED).exists():
        with suppress(OSError):
            (run_dir / SAVED).touch()
            sync(run_dir)


def _require_kept(run_dir: Path, found: Checkpoint | None) -> None:
    """Raise CheckpointError if there is no checkpoint where there was one: to begin again at step 0
    would cost the logs of the steps that were made."""
    if found is not None:
        _mark_saved(run_dir)  # a run of an older version
        return
    damaged = [path.name for path in _by_step(run_dir / "checkpoints")]
    if damaged or (run_dir / SAVED).exists():
        state = f"damaged: {', '.join(damaged)}" if damaged else "gone"
        raise CheckpointError(
            f"{run_dir} was saved, but its checkpoints are {state}; bring "
            f"{run_dir / 'checkpoints'} back from a copy, or start another run (--run.dir). The "
            "logs are as they were"
        )


def _aside(final: Path) -> Path:
    return final.with_name(f".tmp-{final.name}")


def _forget(final: Path, *, keep_last: int, worth: Mapping[int, float], do: Do) -> None:
    """Delete all but `final`, the newest `keep_last` whole steps up to it, and the best of those
    with a worth.

    Later steps do not count: they are incomplete ones that the run fell back from. A rename comes
    first, so that a kill leaves no half a checkpoint under a checkpoint's name. The new one is safe
    by now, so a directory that cannot be deleted is no reason to stop the run.
    """
    upto = [path for path in _by_step(final.parent) if _place(path) <= _place(final)]
    steps = [step for step, updates in map(_place, upto) if not updates]
    kept = {*steps[-keep_last:], best_step(worth, steps)}
    for old in upto:
        step, updates = _place(old)
        if old == final or (not updates and step in kept):
            continue
        # Under .tmp-, so that the next load takes away what a kill leaves of it.
        doomed = final.with_name(f".tmp-old-{old.name}")
        try:
            do(remove, doomed)
            do(os.rename, old, doomed)
            do(remove, doomed)
        except OSError as error:
            warnings.warn(f"cannot delete {old}: {error}; delete it by hand", stacklevel=3)


def best_step(worth: Mapping[int, float], steps: Iterable[int]) -> int | None:
    """Of the steps that have a worth the best one, of equals the last; None where none has."""
    return max((s for s in steps if s in worth), key=lambda s: (worth[s], s), default=None)


def saved_steps(run_dir: str | Path) -> list[int]:
    """The whole steps of which there are checkpoints, complete or not, in order."""
    places = map(_place, _by_step(Path(run_dir) / "checkpoints"))
    return [step for step, updates in places if not updates]


def open_checkpoint(run_dir: str | Path, step: int, *, world: World) -> Checkpoint:
    """The checkpoint of a step. CheckpointError if there is none or it is damaged. A collective."""
    path = Path(run_dir) / "checkpoints" / f"step_{step}"
    fault = _fault(path, world) if any(world.gather(path.exists())) else "there is none"
    if fault is not None:
        there = ", ".join(map(str, saved_steps(run_dir))) or "none"
        raise CheckpointError(f"{path}: {fault}; the steps with a checkpoint: {there}")
    return Checkpoint.read(path)


def _by_step(parent: Path) -> list[Path]:
    """Those with a name that a save gives: no leading zero, and no digits but ASCII's."""
    named = [path for path in parent.glob("step_*") if re.fullmatch(STEP_NAME, path.name)]
    return sorted(named, key=_place)


def _place(path: Path) -> tuple[int, int]:
    """(whole steps, updates of the next one) of a checkpoint, by its name."""
    step, _, updates = path.name.removeprefix("step_").partition("_")
    return int(step), int(updates or 0)


def _fault(path: Path, world: World) -> str | None:
    """Why the checkpoint is not complete, or None; all processes read a share. A collective."""
    return next(filter(None, world.gather(_damage(path, world))), None)


def _damage(path: Path, world: World) -> str | None:
    """What is wrong with this process's share of the files. Sizes first: they cost no read."""
    manifest = path / MANIFEST
    if manifest.exists() and not manifest.is_file():  # a pipe that nobody writes is waited for
        return f"{MANIFEST} is no file"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        names = sorted({INDEX, STATE, *files})
        for name in names:
            # A torn file nearly always has another size, so most damage costs no read.
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, the manifest says {files[name]['bytes']}"
        # Each process reads a share: the files may be hundreds of GB together.
        own = names[world.share(len(names))]
        damaged = [name for name, entry in _manifest(path, own).items() if entry != files[name]]
        if not damaged:
            _require_own(path, names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not complete ({type(error).__name__}: {error})"
    return f"the checksum of {', '.join(damaged)} is wrong" if damaged else None


def _require_own(path: Path, names: Iterable[str]) -> None:
    """Raise ValueError if the files are whole, but not those of a save of this step."""
    found = Checkpoint.read(path)
    if (found.step, found.updates) != _place(path):
        raise ValueError(f"{STATE} is of step {found.step}, {found.updates} updates of the next")
    # An index of fewer processes than wrote would load, and lack their shards.
    named = {*names}
    if not 1 <= found.processes <= len(named):
        raise ValueError(f"{STATE} is of {found.processes} processes")
    own = {name.format(rank) for rank in range(found.processes) for name in (SHARD, OWN)}
    own |= {ROLLOUT} if found.updates else set()
    if lacking := own - named:
        raise ValueError(f"{MANIFEST} does not name {min(lacking)}")


def _manifest(path: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of files: enough to find a torn one, at 2.7x the rate of SHA-256."""
    entries: dict[str, dict[str, int]] = {}
    for name in names:
        with (path / name).open("rb") as file:
            # In pieces of 1 MiB: a shard may be larger than the memory that is left.
            crc = 0
            while chunk := file.read(1 << 20):
                crc = zlib.crc32(chunk, crc)
            entries[name] = {"bytes": file.tell(), "crc32": crc}
    return entries


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""Checkpoints that outlive a kill at any moment, the claim on a run directory, and the export.

A save writes aside, syncs, renames, and only then forgets:

    checkpoints/.tmp-step_20-<pid>/
        model.safetensors  optimizer.pt  rng.pt  state.json     each fsynced
        manifest.json      bytes and CRC-32 of the others       last, fsynced
    fsync that directory -> rename it to checkpoints/step_20 -> fsync checkpoints/ -> drop old ones

so a directory named step_N was complete when it got its name; if the disk lost part of it later,
its manifest says so and the one before is used. The order is the whole proof: move no line of it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL, OPTIMIZER, RNG, STATE = "model.safetensors", "optimizer.pt", "rng.pt", "state.json"
MANIFEST = "manifest.json"
RUN_MARK = "config.yaml"
LOCK = ".lock"

Do = Callable[..., Any]
"""`do(operation, *args)` performs one file operation; a test's own fails, or dies, at the n-th."""


def perform(operation: Callable[..., Any], *args: Any) -> Any:
    return operation(*args)


class CheckpointError(RuntimeError):
    """A run directory or a checkpoint that cannot be used; the message has cause and remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """What a complete checkpoint holds; `model_state` is on the device asked for, the rest on CPU.

    `model_state` and `optimizer_state` go to `load_state_dict`, `rng_state` to `restore_rng`;
    `trainer_state` is the JSON that was saved (tuples have become lists).
    """

    path: Path
    step: int
    model_state: dict[str, torch.Tensor]
    optimizer_state: dict[str, Any]
    rng_state: dict[str, Any]
    trainer_state: dict[str, Any]


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    *,
    model_state: Mapping[str, torch.Tensor],
    optimizer_state: dict[str, Any],
    trainer_state: dict[str, Any],
    keep_last: int,
    do: Do = perform,
) -> Path:
    """Write checkpoints/step_<step>, random states included; return its path once it is durable.

    A complete checkpoint of this step is left as it is: a SIGTERM may fall on a step just saved.
    Raises CheckpointError when a state holds NaN or infinity and when a file cannot be written;
    older checkpoints are then untouched and nothing of this one is left. Costs one read of what
    was written, for the checksums.
    """
    if keep_last < 1:
        raise ValueError(f"checkpoint.keep_last: got {keep_last}, expected 1 or more; set it to 1")
    _require_finite({"model": model_state, "optimizer": optimizer_state}, what=f"step {step}")
    parent = Path(run_dir) / "checkpoints"
    final = parent / f"step_{step}"
    if final.exists() and _fault(final) is None:
        return final
    aside = parent / f".tmp-{final.name}-{os.getpid()}"
    try:
        do(_make_directory, parent)
        do(_sync, parent.parent)
        do(_remove, aside)
        do(_make_directory, aside)
        for name, write, content in (
            (MODEL, _write_model, model_state),
            (OPTIMIZER, _write_tensors, optimizer_state),
            (RNG, _write_tensors, rng_state()),
            (STATE, _write_json, {"step": step, "trainer": trainer_state}),
        ):
            do(write, aside / name, content)
            do(_sync, aside / name)
        do(_write_json, aside / MANIFEST, {"files": do(_manifest, aside)})
        do(_sync, aside / MANIFEST)
        do(_sync, aside)
        do(_remove, final)  # there is one only if it was found incomplete above
        do(os.rename, aside, final)
        do(_sync, parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot save {final}: {error}; older checkpoints are intact. Free disk space (or make "
            f"the directory writable) and continue with --resume {run_dir}"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _forget(step, parent, keep_last, do)
    return final


def load_checkpoint(run_dir: str | Path, *, device: torch.device | str) -> Checkpoint | None:
    """The newest complete checkpoint, or None. An incomplete one is passed over with a warning.

    Also removes what an interrupted save left aside: for the process that claimed the run only.
    """
    parent = Path(run_dir) / "checkpoints"
    for leftover in (*Path(run_dir).glob(".tmp-*"), *parent.glob(".tmp-*")):
        _remove(leftover)
    for path in reversed(_by_step(parent)):
        fault = _fault(path)
        if fault is None:
            return _read(path, device)
        warnings.warn(f"{path}: {fault}; falling back to the checkpoint before it", stacklevel=2)
    return None


def rng_state() -> dict[str, Any]:
    """States of the global generators of torch (CPU, each GPU) and random; numpy's is not used."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the generators back; those of the GPUs only if as many are visible as were saved."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    saved = len(state["cuda"])
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved != visible:
        warnings.warn(
            f"the checkpoint has random states of {saved} GPUs, {visible} are here: not restored",
            stacklevel=2,
        )
        return
    for index in range(visible):
        torch.cuda.set_rng_state(state["cuda"][index], index)


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
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    replace: bool = False,
) -> Path:
    """Write a Hugging Face directory (safetensors) that `AutoModelForCausalLM` loads.

    Written aside and renamed. `replace` lets an earlier export in `out_dir` go; without it a
    directory that is not empty is a CheckpointError, as are NaN weights and a disk that refuses.
    """
    out_dir = Path(out_dir)
    if not replace and out_dir.exists() and any(out_dir.iterdir()):
        raise CheckpointError(f"{out_dir} is not empty; export to another directory")
    _require_finite({"model": dict(causal_lm.named_parameters())}, what="the export")
    aside = out_dir.with_name(f".tmp-{out_dir.name}-{os.getpid()}")
    previous = out_dir.with_name(f".tmp-old-{out_dir.name}-{os.getpid()}")
    try:
        _remove(aside)
        _make_directory(aside)
        causal_lm.save_pretrained(aside)
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
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the export {out_dir}: {error}; free disk space or make it writable"
        ) from error
    finally:
        for path in (aside, previous):
            shutil.rmtree(path, ignore_errors=True)
    return out_dir


def _forget(step: int, parent: Path, keep_last: int, do: Do) -> None:
    """Delete all but the newest `keep_last` up to `step`.

    Later steps do not count: they are incomplete ones that the run fell back from. A rename comes
    first, so that a kill leaves no half a checkpoint under a checkpoint's name. The new one is safe
    by now, so a directory that cannot be deleted is no reason to stop the run.
    """
    for old in [path for path in _by_step(parent) if _step_of(path) <= step][:-keep_last]:
        doomed = parent / f".tmp-old-{old.name}"
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


def _fault(path: Path) -> str | None:
    """Why the checkpoint is not complete, or None. Sizes first: they cost no read."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in (MODEL, OPTIMIZER, RNG, STATE):
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, the manifest says {files[name]['bytes']}"
        damaged = [name for name, entry in _manifest(path).items() if entry != files[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not complete ({type(error).__name__}: {error})"
    return f"the checksum of {', '.join(damaged)} is wrong" if damaged else None


def _manifest(path: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of each file: enough to find a torn one, at 2.7x the rate of SHA-256."""
    entries: dict[str, dict[str, int]] = {}
    for name in (MODEL, OPTIMIZER, RNG, STATE):
        with (path / name).open("rb") as file:
            crc = 0
            while chunk := file.read(1 << 20):
                crc = zlib.crc32(chunk, crc)
            entries[name] = {"bytes": file.tell(), "crc32": crc}
    return entries


def _read(path: Path, device: torch.device | str) -> Checkpoint:
    # The optimiser stays on the CPU: load_state_dict moves its moments, but would leave `step` on
    # a GPU, where AdamW reads it with a sync a parameter.
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(
        path=path,
        step=state["step"],
        model_state=_read_model(path / MODEL, device),
        optimizer_state=torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True),
        rng_state=torch.load(path / RNG, map_location="cpu", weights_only=True),
        trainer_state=state["trainer"],
    )


def _write_model(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """A tied weight is written once, as safetensors asks; its other names go to the metadata."""
    first: dict[Any, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(same, name) != name:
            aliases[name] = first[same]
        else:
            tensors[name] = tensor.detach().contiguous()
    try:
        save_file(tensors, path, metadata={"aliases": json.dumps(aliases)})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _read_model(path: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        aliases = json.loads(file.metadata()["aliases"])
    return tensors | {name: tensors[first] for name, first in aliases.items()}


def _write_tensors(path: Path, content: Any) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # how torch's zip writer reports a full disk
        raise OSError(str(error)) from error


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False, indent=1), encoding="utf-8")


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


def _require_finite(states: Mapping[str, Any], *, what: str) -> None:
    bad = next(_nonfinite(states), None)
    if bad is not None:
        raise CheckpointError(
            f"{what} is not saved: {bad} holds NaN or infinity; go on from the last checkpoint "
            "with a lower optim.lr, and look at the last steps in paths.jsonl"
        )


def _nonfinite(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the tensors and numbers that are not finite. One device sync a tensor."""
    if isinstance(value, torch.Tensor):
        if not bool(torch.isfinite(value).all()):
            yield name
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield name
    elif isinstance(value, (Mapping, list, tuple)):
        items: Iterable[Any] = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _nonfinite(item, f"{name}.{key}".removeprefix("."))

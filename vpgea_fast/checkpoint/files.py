"""Files that survive a kill, and the claim on a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from vpgea_fast.distributed import RemoteError, World

RUN_MARK = "config.yaml"
LOCK = ".lock"
FILES = (
    *("metrics.jsonl", "paths.jsonl", "eval.json", "environment.json"),
    *("report.html", "training.png", LOCK),
)
SAVED = ".saved"
"""Left by the first save: where it is and no checkpoint is, the checkpoints are lost."""


class CheckpointError(RuntimeError):
    """A run directory or a checkpoint that cannot be used; the message has cause and remedy."""


@contextmanager
def together(
    world: World, what: str = "", remedy: str = "", *, catch: type[Exception] = OSError
) -> Iterator[None]:
    """`world.together`; what a disk refuses (or all that is of the class `catch`, memory aside) and
    what others met are CheckpointErrors."""
    try:
        with world.together():
            try:
                yield
            # Memory is no fault of the disk: its own error says more.
            except (CheckpointError, MemoryError, torch.OutOfMemoryError):
                raise
            except catch as error:
                kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
                raise CheckpointError(f"{what}: {kind}{error}; {remedy}") from error
    except RemoteError as error:
        raise CheckpointError(str(error)) from error


def write_text(path: str | Path, text: str) -> None:
    """Replace a small file at once: a reader finds the old text or the new, whatever happens."""
    path = Path(path)
    # In the same directory: a rename across file systems would be a copy.
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
        # The rename is durable with its directory, not with its file.
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free disk space first") from error
    finally:
        remove(aside)


@dataclass
class Cut:
    """What `truncate_jsonl` took out of a log, and how many lines it left of each step."""

    kept_in: Path
    later: int = 0
    """Lines of steps after the last one."""
    damaged: list[int] = field(default_factory=list)
    """Numbers of the lines that are torn, no step's, or a second one of a step."""
    lines: Counter[int] = field(default_factory=Counter)

    def words(self, path: Path, upto: int) -> list[str]:
        """A sentence for each kind of line that was taken out."""
        found = []
        if self.later:
            found.append(f"{self.later} of steps after {upto}, which are made again")
        if self.damaged:
            found.append(f"{len(self.damaged)} damaged (the first was line {self.damaged[0]})")
        return [f"{path}: lines taken out: {text}; kept in {self.kept_in}" for text in found]


def truncate_jsonl(path: str | Path, *, upto: int, once: bool = False) -> Cut:
    """Take out torn lines, those of no step, and those of steps after `upto`; with `once` a second
    line of a step too. They are appended to NAME.dropped.jsonl beside. Atomic.

    A resumed run calls it, so that no line of a lost step stays. A missing file has no lines.
    """
    path = Path(path)
    cut = Cut(path.with_name(f"{path.stem}.dropped.jsonl"))
    if not path.exists():
        return cut
    aside, dropped = path.with_name(f".tmp-{path.name}"), list[bytes]()
    try:
        # Bytes, not text: a torn line may end inside a character.
        with path.open("rb") as old, aside.open("wb") as new:
            for number, line in enumerate(old, start=1):
                if _keeps(cut, line, number=number, upto=upto, once=once):
                    new.write(line)
                else:
                    dropped.append(line.rstrip(b"\n") + b"\n")
        sync(aside)
        # The dropped lines are durable before the log loses them: a kill between the two leaves
        # a line twice, never in neither file.
        if dropped:
            with cut.kept_in.open("ab") as kept:
                kept.writelines(dropped)
            sync(cut.kept_in)
            aside.replace(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot rewrite {path}: {error}; it must be a file, on a disk with room"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return cut


@dataclass(frozen=True)
class RunLock:
    """A claimed run directory. The claim ends with `release`, the `with` block, or the process.

    `made`: the directories that the claim made, the innermost first.
    """

    path: Path
    handle: IO[str]
    made: tuple[Path, ...] = ()

    def release(self) -> None:
        self.handle.close()

    def abandon(self) -> None:
        """Release, and leave no more behind than the claim found: a start has failed. What the run
        has written stays, and so does a directory, a link or a mount point that was there."""
        # Anything beside the lock is the run's.
        if [entry.name for entry in self.path.iterdir()] == [LOCK]:
            remove(self.path / LOCK)
            _remove_empty(self.made)
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
    # Known before mkdir: `abandon` removes these alone.
    made = tuple(each for each in (path, *path.parents) if not each.exists())
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = (path / LOCK).open("a+", encoding="ascii")
    except OSError as error:
        _remove_empty(made)
        raise CheckpointError(
            f"cannot write the run directory {path}: {error.strerror}; give a writable --run.dir"
        ) from error
    try:
        _lock(handle, path)
        _check_claim(path, resume)  # again: a run may have come and gone since the first look
        if not resume:  # of a run of which all else was deleted, or that was killed in its start
            for leftover in (path / SAVED, *path.glob(".tmp-*")):
                remove(leftover)
        # For the error of the next process that asks: who holds the claim.
        handle.truncate(0)
        print(os.getpid(), file=handle, flush=True)
    except BaseException:
        handle.close()
        raise
    return RunLock(path, handle, made)


def make_directory(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a directory, or a link alone and not what it leads to."""
    # rmtree refuses a link, and would empty a larger disk if it did not.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keeps(cut: Cut, line: bytes, number: int, upto: int, once: bool) -> bool:
    """Whether a line stays in the log; counts it."""
    try:
        record = json.loads(line)
    # RecursionError: a damaged line may be a thousand brackets.
    except (ValueError, RecursionError):
        record = None
    # A line without its line break was torn, even if it parses.
    step = record.get("step") if isinstance(record, dict) and line.endswith(b"\n") else None
    if type(step) is not int or step < 0 or (once and step in cut.lines):
        cut.damaged.append(number)
    elif step > upto:
        cut.later += 1
    else:
        cut.lines[step] += 1
        return True
    return False


def _remove_empty(directories: Sequence[Path]) -> None:
    """Remove those that are there and empty; another process may have begun to use one."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def _lock(handle: IO[str], path: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # The claimant wrote its process id into the file.
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        raise CheckpointError(
            f"cannot lock the run directory {path}: {error.strerror}; process {owner} writes this "
            "run: wait for it, stop it, or give another --run.dir"
        ) from error


def _check_claim(path: Path, resume: bool) -> None:
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a directory with --run.dir")
    # config.yaml is the first file that a run writes.
    if resume and not (path / RUN_MARK).is_file():
        raise CheckpointError(f"{path} is no run ({RUN_MARK} is missing); start without --resume")
    for file in (path / name for name in FILES):
        if file.exists() and not file.is_file():  # a pipe that nobody writes is waited for
            kind = "directory" if file.is_dir() else "pipe or device"
            raise CheckpointError(f"{file} is a {kind}, expected a file of the run; move it away")
    if (
        not resume
        and path.is_dir()
        and any(
            entry.name not in (LOCK, SAVED) and not entry.name.startswith(".tmp-")
            for entry in path.iterdir()
        )
    ):
        raise CheckpointError(
            f"{path} is not empty, and a run is never overwritten; continue it with --resume "
            f"{path}, or give another --run.dir"
        )

"""The folder of an evaluation while it is written: who may go on with it, and with what.

    eval.json       what is drawn, by temp file and rename, before the first answer
    samples.jsonl   a line per answer, appended when it ends; process 1 has samples.1.jsonl
    times.jsonl     its seconds, apart

Process 0 joins the parts of the others to its own at the end, or when the evaluation goes on after
a kill. A torn last line is cut off then: its answer is drawn again. Nothing of a folder is touched
before it is clear that this evaluation may write there.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from vpgea_fast.checkpoint import write_text
from vpgea_fast.distributed import World
from vpgea_fast.evaluation.records import (
    HEADER,
    SAMPLES,
    TIMES,
    Key,
    Note,
    Sample,
    SampleError,
    line,
    read_header,
    read_samples,
    whole_bytes,
)
from vpgea_fast.types import Finish

RESULT = "result.json"
"""The closing table, which the command line writes at the end."""
COMPARED = ("model.fingerprint", "settings", "benchmarks")
"""What decides the answers; a model may have moved, and versions may be newer (which is said)."""


Plan = Mapping[Key, tuple[int, str]]
"""Of every answer of an evaluation its seed and its gold: by these a record is one of it."""


class Outcome(NamedTuple):
    """What the numbers of an evaluation need of one answer."""

    tokens: int
    finish: Finish
    correct: int


class _Found(NamedTuple):
    """The answers of a folder, and those that a part and samples.jsonl both hold."""

    known: dict[Key, Outcome]
    twice: set[Key]


class Folder:
    """A folder that this process appends to. `known`: what was drawn before it, by key."""

    def __init__(self, path: Path, rank: int, known: Mapping[Key, Outcome]) -> None:
        self.path, self.known = path, known
        # Without buffers: what has failed to be written is not tried again at the end.
        self.samples = _part(path, SAMPLES, rank).open("ab", buffering=0)
        self.times = _part(path, TIMES, rank).open("ab", buffering=0)

    def append(self, ended: Iterable[tuple[Sample, float]]) -> None:
        """Write samples with their seconds, so that a reader sees them at once."""
        pairs = list(ended)
        names = ("benchmark", "mode", "question_id", "index")
        rows = [
            {**dict(zip(names, sample.key, strict=True)), "seconds": round(seconds, 3)}
            for sample, seconds in pairs
        ]
        # Samples first: an answer is whole without its seconds, and not the other way round. A
        # killed process loses nothing of what it wrote; a power cut, what `sync` has not put down.
        with self._written():
            _write(self.samples, "".join(line(sample) for sample, _ in pairs))
            _write(self.times, "".join(json.dumps(row) + "\n" for row in rows))

    def sync(self) -> None:
        """Put what was appended on the disk: from here on no power cut costs it."""
        with self._written():
            os.fsync(self.samples.fileno())
            os.fsync(self.times.fileno())

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SampleError(
                f"{self.path}: {error.strerror}; make room, and go on with --resume: the answers "
                "so far are kept"
            ) from error

    def close(self) -> None:
        self.samples.close()
        self.times.close()


@contextmanager
def open_folder(
    path: Path, header: Mapping[str, Any], world: World, *, plan: Plan, resume: bool, note: Note
) -> Iterator[Folder]:
    """Begin an evaluation in `path`, or go on with it; join all parts at the end. A collective.

    SampleError, with nothing touched: records without `resume`, or of another model, question set
    or settings (the first that differs is named), or that are not of `plan`; another process that
    writes there.
    """
    lock: BinaryIO | None = None
    known: dict[Key, Outcome] = {}
    try:
        # Process 0 alone reads, judges and repairs the folder; its refusal ends the others too.
        with world.together():
            if world.main:
                lock, known = _begin(path, header, plan, resume=resume, note=note)
        folder = Folder(path, world.rank, everywhere(world, known))
        try:
            yield folder
            folder.sync()
        finally:
            folder.close()
        # Waits for the slowest process: its part must be whole.
        world.on_main(lambda: _join(path, note, twice=()))
    finally:
        if lock is not None:
            lock.close()


def everywhere(world: World, outcomes: Mapping[Key, Outcome]) -> dict[Key, Outcome]:
    """Join what each process knows, for all of them. A collective."""
    # Keys and outcomes as lists: JSON has no tuples.
    rows = [row for rows in world.gather([[*k, *o] for k, o in outcomes.items()]) for row in rows]
    return {(b, m, q, i): Outcome(*rest) for b, m, q, i, *rest in rows}


def write_whole(path: Path, header: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Write the folder of an evaluation that has ended, over one of the same name."""
    path.mkdir(parents=True, exist_ok=True)
    # Before the header, which makes the folder an evaluation to a reader.
    write_text(path / SAMPLES, "".join(lines))
    write_text(path / HEADER, json.dumps(header, indent=1) + "\n")


def check_free(path: Path, *, resume: bool) -> None:
    """Refuse, before any model is read, a path that no evaluation could begin in."""
    if path.exists() and not path.is_dir():
        raise SampleError(f"{path} is a file; expected a folder to write records to, or a new one")
    if not path.parent.is_dir():
        raise SampleError(f"{path}: its parent is not there; give a folder in one that exists")
    try:
        # A file without a name: what the permissions say does not bind root, and leaves out quotas.
        tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent).close()
    except OSError as error:
        raise SampleError(
            f"{path}: nothing can be written there ({error.strerror}); give another folder"
        ) from error
    header = path / HEADER
    if header.exists() and not resume:
        raise SampleError(
            f"{path} holds an evaluation; go on with --resume, or give another folder"
        )
    for file in (path / SAMPLES, path / TIMES, path / RESULT):
        if not header.exists() and file.exists() and file.stat().st_size:
            raise SampleError(
                f"{file} is there without {HEADER}, which says whose it is; bring that back, or "
                "give another folder"
            )


def _begin(
    path: Path, header: Mapping[str, Any], plan: Plan, *, resume: bool, note: Note
) -> tuple[BinaryIO, dict[Key, Outcome]]:
    """Check or write the header, join parts, cut torn lines; return the lock and the answers."""
    check_free(path, resume=resume)
    old = read_header(path) if (path / HEADER).exists() else None
    if old is not None:
        _refuse_other(path, old, header)
    path.mkdir(exist_ok=True)
    for file in (path / SAMPLES, path / TIMES):
        if file.exists() and not file.is_file():
            raise SampleError(f"{file} is no file; remove it, or give another folder")
    # Two processes appending would interleave answers, and each believe the file whole.
    # A flock goes with its process, killed or not: no stale lock file stays behind.
    lock = (path / SAMPLES).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise SampleError(f"{path}: another process writes it; wait, or give another") from error
    try:
        # Before the rest, for its refusal: of another evaluation's folder no line is cut or moved.
        known, twice = _found(path, plan)
    except SampleError:
        lock.close()
        raise
    if old is None:
        write_text(path / HEADER, json.dumps(header, indent=1) + "\n")
    elif old.get("versions") != header.get("versions"):
        note(f"{path}: goes on with other versions than it began with; see {HEADER}")
    _join(path, note, twice)
    return lock, known


def _found(path: Path, plan: Plan) -> _Found:
    """Read what was drawn, by all processes. SampleError for a record that is not of the plan: its
    header may be right, and its file another's."""
    known: dict[Key, Outcome] = {}
    twice: set[Key] = set()
    for file in (path / SAMPLES, *_parts(path, SAMPLES)):
        for s in read_samples(file):
            if plan.get(s.key) != (s.seed, s.gold):
                what = "seed or gold" if s.key in plan else "question, or more answers to it"
                raise SampleError(
                    f"{file}: the record {s.key} is of another evaluation: another {what}; bring "
                    "the right file back, or give another folder"
                )
            if s.key in known:
                twice.add(s.key)
            else:  # the first file that has it keeps it, as `_join` does
                known[s.key] = Outcome(s.tokens, s.finish, s.correct)
    return _Found(known, twice)


def _refuse_other(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    # As JSON has it: tuples of the new one are lists there.
    new = json.loads(json.dumps(new))
    for name in COMPARED:
        there, here = _at(old, name), _at(new, name)
        if there != here:
            where, a, b = _difference(name, there, here)
            raise SampleError(
                f"{path} holds an evaluation of another {where}: {_short(a)} there, {_short(b)} "
                "now; give another folder, or the same model, questions and settings"
            )


def _difference(name: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The first key below `name` of which both have another value."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if a.get(key) != b.get(key):
                return _difference(f"{name}.{key}", a.get(key), b.get(key))
    return name, a, b


def _at(record: Mapping[str, Any], name: str) -> Any:
    value: Any = record
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _part(path: Path, name: str, rank: int) -> Path:
    """The file of one process: samples.jsonl of process 0, samples.1.jsonl of process 1."""
    return path / (name if rank == 0 else name.replace(".", f".{rank}.", 1))


def _parts(path: Path, name: str) -> list[Path]:
    # samples.1.jsonl and so on, but not samples.jsonl, which they are joined to.
    stem, dot, kind = name.partition(".")
    return sorted(path.glob(f"{stem}.[0-9]*{dot}{kind}"))


def _join(path: Path, note: Note, twice: Collection[Key]) -> None:
    """Cut torn last lines, and move the lines of other processes into the files of process 0.

    twice   answers of samples.jsonl that stand in a part, too: a kill between copying a part and
            removing it leaves both
    """
    for name in (SAMPLES, TIMES):
        whole = path / name
        whole.touch()
        for file in (whole, *_parts(path, name)):
            if (keep := whole_bytes(file)) < file.stat().st_size:
                note(f"{file}: a torn last line is cut off; its answer is drawn again")
                os.truncate(file, keep)
        for part in _parts(path, name):
            if name == SAMPLES and twice:
                lines = (line(s).encode() for s in read_samples(part) if s.key not in twice)
                _append(whole, lines)
            else:  # bytes: nobody waits for 12,000 records to be read once more
                with part.open("rb") as file:
                    _append(whole, file)
            part.unlink()


def _write(file: IO[bytes], text: str) -> None:
    left = memoryview(text.encode())
    while left:
        left = left[file.write(left) :]


def _append(file: Path, lines: Iterable[bytes]) -> None:
    with file.open("ab") as handle:
        handle.writelines(lines)
        # On the disk before the caller removes the part that the lines come from.
        handle.flush()
        os.fsync(handle.fileno())

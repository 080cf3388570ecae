"""What holds a run of smollm2.py together over its starts: one record, its folder, its seconds.

RUNS/record.id   the record that the folder belongs to
record settings  all that a result hangs on, fixed by the first start
record added     methods that came to the bench after that start, with their words
record weights   digest of what a stage leaves, looked at before it is used
RUNS/clock.json  seconds of each stage over all its starts
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sealed import sealed

from vpgea_fast.checkpoint import write_text
from vpgea_fast.config import ConfigError
from vpgea_fast.sweep.inputs import meaning
from vpgea_fast.values import dotted

BEAT = 10.0
"""Seconds between two notes of the clock: what a kill takes from it."""


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and what is known so far (`record`, the JSON file)."""

    out: Path
    runs: Path
    record: dict[str, Any]
    gsm8k: Path | None = None
    config: str = "smollm2"
    words: Sequence[str] = ()
    """More options of every training."""
    styles: Sequence[str] = ("concise", "verbose")
    """Keys of train.jsonl with an honest solution."""

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.out, json.dumps(sealed(self.record), indent=1) + "\n")

    def named(self, text: str) -> str:
        """A name of a folder, with the steps of the base's training filled in."""
        return text.format(steps=self.record["sft_steps"])


def begin(bench: Bench, settings: Mapping[str, Any]) -> None:
    """Write settings and id into the record, and the id into RUNS.

    A method that the record lacks is `added` to it, and one that this version lacks stays there.
    SystemExit, with nothing written, for a record of other settings or a folder of another record.
    """
    record, mine = bench.record, bench.runs / "record.id"
    settings = json.loads(json.dumps(settings))  # tuples are lists in the file
    fresh = "settings" not in record
    added = {} if fresh else _check_settings(bench, settings)
    if mine.is_file():
        if mine.read_text().strip() != record["id"]:
            raise SystemExit(
                f"{bench.runs} belongs to another record than {bench.out}; give the --out that it "
                "was made with, or another --runs"
            )
    elif bench.runs.exists() and any(bench.runs.iterdir()):
        raise SystemExit(
            f"{bench.runs} holds files and no record.id, so they are of no record; move it away, "
            "or give another --runs"
        )
    if fresh:
        record["settings"] = settings
        bench.save()
    elif added:
        record["added"] = added
        bench.save()
    bench.runs.mkdir(parents=True, exist_ok=True)
    write_text(mine, record["id"] + "\n")


def _check_settings(bench: Bench, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hold the settings to the record's. Return the methods that came after its first start: as
    an earlier start had them, or new."""
    known, methods = bench.record["settings"], settings.get("methods", {})
    first, kept = known.get("methods", {}), bench.record.get("added", {})
    new = {name: words for name, words in methods.items() if name not in {**first, **kept}}
    if made := [name for name in new if name in bench.record["stages"]]:
        raise SystemExit(
            f"{bench.out}: it has {made[0]}, and not the words of that method; restore the file"
        )
    added = {**new, **kept}
    if "methods" in known:
        both = {**added, **first}
        known = {**known, "methods": {k: words for k, words in both.items() if k in methods}}
    if settings == known:
        return added
    go_on = "go on with commit {} and its options, or give a new --out and --runs"
    begun = str(bench.record.get("environment", {}).get("commit"))
    try:
        old, new = (
            dotted({**each, "config": meaning(each.get("config", {}), str(bench.out))})
            for each in (known, settings)
        )
    except ConfigError as error:
        raise SystemExit(f"{error}; {go_on.format(begun)}") from error
    other = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    # Of an earlier version, with the same meaning today.
    if not other:
        return added
    key, *more = other
    if key.startswith("gsm8k"):
        raise SystemExit(
            f"{bench.out} was begun {'with' if known['gsm8k'] else 'without'} --gsm8k, or with "
            "other files of it; give it as then, or a new --out and --runs"
        )
    # An added method is of the version that made its stage, if one has.
    name = key.removeprefix("methods.")
    if name in kept:
        begun = bench.record["stages"].get(name, {}).get("commit", "that added it")
    raise SystemExit(
        f"{bench.out} was begun with {key} {old.get(key)!r}, and this start has {new.get(key)!r}"
        f"{f' ({len(more)} more differ)' if more else ''}; "
        f"{go_on.format(begun.removesuffix('+changes'))}"
    )


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 of the files' content, one behind the other; "" where one is not there."""
    if not all(file.is_file() for file in files):
        return ""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(1 << 22):
                whole.update(part)
    return whole.hexdigest()


def aside(folder: Path) -> Path:
    """Rename a folder that may not be used, and return its new name: nothing is deleted."""
    number = 1
    while (other := folder.with_name(f"{folder.name}.refused-{number}")).exists():
        number += 1
    return folder.rename(other)


class Clock:
    """Counts the seconds of a stage on from its earlier starts, and notes them every BEAT.

    So a start that is killed counts too, up to its last note. `wall_s` leaves out the time between
    two starts; `cpu_s` is of this process and its ended children.
    """

    def __init__(self, file: Path, name: str, known: Mapping[str, Any]) -> None:
        self.file, self.name = file, name
        noted = json.loads(file.read_text()) if file.is_file() else {}
        self.noted: dict[str, dict[str, float]] = noted
        # The record's are older, unless the folder is new.
        found = [known, noted.get(name, {})]
        self.before = {key: max(f.get(key, 0.0) for f in found) for key in ("wall_s", "cpu_s")}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self.start = _now()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._note()

    def took(self) -> dict[str, float]:
        """Seconds until now, of all starts."""
        passed = {key: now - self.start[key] for key, now in _now().items()}
        return {key: round(self.before[key] + passed[key], 1) for key in passed}

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            self._note()

    def _note(self) -> None:
        write_text(self.file, json.dumps({**self.noted, self.name: self.took()}) + "\n")


def _now() -> dict[str, float]:
    return {"wall_s": time.monotonic(), "cpu_s": sum(os.times()[:4])}

"""Which gold answers accept themselves, kept on disk between runs.

One JSON file per checker and version, `{gold: bool}`, under $VPGEA_CACHE, else
$XDG_CACHE_HOME/vpgea_fast, else ~/.cache/vpgea_fast. VPGEA_CACHE=off keeps nothing. A file that is
damaged or cannot be read counts as empty; one that cannot be written is left alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")


class Verdicts:
    """The verdicts of one checker: `known` as read at construction; `add` stores more.

    The key is the checker's name, the text of its program, and the versions of the libraries and of
    Python, so a change of any of them begins a new file.
    """

    def __init__(self, name: str, program: Path) -> None:
        self.known: dict[str, bool] = {}
        self._file: Path | None = None
        folder = _folder()
        if folder is None:
            return
        versions = [f"{library} {version(library)}" for library in LIBRARIES]
        text = json.dumps([name, program.read_text("utf-8"), versions, sys.version_info[:2]])
        # 16 hex digits in the file's name: a clash of two programs would take 2^32 of them.
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._file = folder / f"golds-{name}-{digest}.json"
        self.known = _read(self._file)

    def add(self, verdicts: dict[str, bool]) -> None:
        """Store verdicts beside what other processes have stored meanwhile."""
        if self._file is None or not verdicts:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until the block ends: read, merge, replace
                # Replaced at once: readers take no lock.
                aside = self._file.with_suffix(f".{os.getpid()}.tmp")
                try:
                    aside.write_text(json.dumps(_read(self._file) | verdicts), encoding="utf-8")
                    aside.replace(self._file)
                finally:
                    aside.unlink(missing_ok=True)


def _folder() -> Path | None:
    chosen = os.environ.get("VPGEA_CACHE", "")
    if chosen.lower() == "off":
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # no home
        return (Path(base) if base else Path.home() / ".cache") / "vpgea_fast"
    return None


def _read(file: Path) -> dict[str, bool]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    # A file that somebody edited counts as empty, not as verdicts.
    sound = isinstance(content, dict) and all(isinstance(v, bool) for v in content.values())
    return content if sound else {}

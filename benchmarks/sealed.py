"""A result that holds the digest of all else in it: what a hand or a disk changed is refused.

For the files that a bench goes on with, whose numbers the pages quote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "sha256"


class SealError(ValueError):
    """A file that is not what its bench wrote."""


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, its keys in order."""
    # As a file gives it back: its keys are text, which sorts otherwise than numbers.
    value = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record, with the digest of all else as its last key."""
    rest = {key: value for key, value in record.items() if key != KEY}
    return {**rest, KEY: digest(rest)}


def opened(path: Path) -> dict[str, Any]:
    """What `sealed` wrote into a file. SealError, in one line, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SealError(f"{path} cannot be read ({error}); bring it back, or remove it") from error
    if not isinstance(found, dict) or KEY not in found:
        raise SealError(
            f"{path} has no {KEY}: another bench or an earlier version wrote it; go on with that "
            "version, or give another --out"
        )
    if found.pop(KEY) != digest(found):
        raise SealError(
            f"{path} is not as it was written: its {KEY} is of other numbers; bring it back, or "
            "remove it"
        )
    return found

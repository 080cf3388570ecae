"""Types of values, with their ranges; text that a terminal may show; mappings, made of others."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, JsonValue

# Defaults are validated too: a wrong one of ours is an error here, and not the user's in a run.
STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

# C0 but tab and line feed, DEL and C1; the line and paragraph separators; marks that turn the
# writing around (Unicode, UAX 9); halves of characters, which UTF-8 cannot encode.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Make text safe for a terminal: spell out what would steer one (escape sequences, carriage
    returns, reversed writing) or cannot be encoded. Line breaks and tabs stay.

    >>> printable("\\x1b[2J 2 + 2\\r = ?")
    '\\\\x1b[2J 2 + 2\\\\r = ?'
    """
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(error: BaseException, limit: int | None = 600) -> str:
    """Say an error in one line that a terminal can show, cut at `limit` characters. One that says
    no more than a name (KeyError) stands behind its type.

    >>> one_line(ValueError("wrong keys:\\n  a: unknown\\n  b: unknown")), one_line(KeyError("a"))
    ('wrong keys: a: unknown; b: unknown', "KeyError: 'a'")
    """
    name = type(error).__name__
    # str(KeyError("a")) is `'a'`, which tells nobody what happened.
    bare = isinstance(error, (KeyError, AttributeError, IndexError))
    text = f"{name}: {error}" if bare else str(error).strip() or name
    # A line that ends in a colon introduces the next; any other break separates two of them.
    text = re.sub(r"\s*\n\s*", "; ", re.sub(r":\s*\n\s*", ": ", text))
    return printable(text if limit is None or len(text) <= limit else f"{text[:limit]} ...")


def dotted(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Name every value of nested mappings by its keys, joined with dots; an empty mapping is a
    value.

    >>> dotted({"a": {"b": 1, "c": {}}, "d": [2]})
    {'a.b': 1, 'a.c': {}, 'd': [2]}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= dotted(value, f"{above}{key}.") if inner else {f"{above}{key}": value}
    return found


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One dict of all parts. ValueError for a key that two of them have: one would be lost.

    >>> merge({"len_post": 4.0}, {"loss": 0.1})
    {'len_post': 4.0, 'loss': 0.1}
    """
    merged: dict[str, Any] = {}
    for part in parts:
        repeated = sorted(merged.keys() & part.keys())
        if repeated:
            raise ValueError(
                f"metrics: got {', '.join(repeated)} twice, expected every name once; rename it in "
                "the objective"
            )
        merged |= part
    return merged


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the known word that was probably meant: the fewest slips of the keyboard away.

    >>> nearest("gpro", ["gspo", "grpo", "vpgea"])
    'grpo'
    """
    words = list(known)
    # Of those that look alike at all; difflib's own order takes no note of exchanged letters.
    alike = difflib.get_close_matches(word, words, n=max(1, len(words)))
    return min(alike, key=lambda other: _slips(word, other), default=None)


def _slips(a: str, b: str) -> int:
    """Letters put in, left out, changed, or exchanged with their neighbour between two words."""
    rows = [[*range(len(b) + 1)]]
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            best = min(row[-1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (letter != other))
            if i > 1 and j > 1 and (a[i - 2], letter) == (other, b[j - 2]):
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def expand_home(path: str) -> str:
    """Put the home directory for a leading `~` or `~user` of a path.

    Errors: ValueError where none is known, and for what is no path.
    """
    # The operating system refuses these with a ValueError, late and without a name.
    if not path.strip() or "\0" in path:
        raise ValueError(f"got {path!r}, expected a path")
    # pathlib raises for an unknown user; os.path.expanduser would give the word back as it is.
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ValueError(
            f"got {path!r}, and that user has no home directory here; write ./{path} for a file of "
            "this name"
        ) from error


PathText = Annotated[str, AfterValidator(expand_home)]

# A count beyond int32 is a slip, and so is a quantity beyond 1e12: both end in crashes elsewhere.
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=1e12)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=1e12)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""The range of numpy's seeds: vLLM seeds numpy too."""
Minutes = Annotated[float, Field(gt=0.0, le=1e6)]
Seconds = Annotated[float, Field(gt=0.0, le=1e6)]
Gibibytes = Annotated[float, Field(gt=0.0, le=1e5)]
Temperature = Annotated[float, Field(ge=1e-4, le=100.0)]
"""At 1e-4 the rounding of a float32 logit of 32 is 0.02 nats; below, it would not be small."""
Exponent = Annotated[float, Field(ge=0.0, le=8.0)]
"""Exponent of a ratio of lengths: 2^15 to the power of 8 is 2^120, still within float32."""


def _ordered(clip: tuple[float, float]) -> tuple[float, float]:
    if clip[0] > clip[1]:
        raise ValueError("expected (low, high) with low <= high")
    return clip


def _finite(tree: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        json.dumps(tree, allow_nan=False)
    except ValueError as error:
        raise ValueError("expected finite numbers") from error
    return tree


Switches = Annotated[dict[str, JsonValue], AfterValidator(_finite)]
"""Any keys and values of JSON. NaN differs from itself: a resume would find it changed."""
Clip = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]

"""Errors in words: what was got, what was expected, and the nearest key or value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from vpgea_fast.config.records import Config
from vpgea_fast.config.schema import (
    VARIANTS,
    fields_of,
    item_of,
    members_of,
    records_at,
    records_of,
)
from vpgea_fast.values import nearest

REMEDIES = {
    "objective.group_size": "the z-score compares paths: sample 2 or more a question",
    "objective.prior_samples": "they define the baseline and the base length: sample 1 or more",
    "objective.alpha": "0 turns the length factor off, 0.5 is the paper's choice",
}

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (in quotes)",
    "tuple_type": "a list, [a, b]",
    "too_short": "{min_length} entries or more",
    "too_long": "{max_length} entries",
    "dict_type": "keys and values",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
}
"""What was expected, by pydantic's type of an error."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, what was got and what to do."""


class Origin(NamedTuple):
    """Where a configuration comes from: a file's name and sections, and what the command line laid
    over them."""

    source: str
    tree: Mapping[str, Any] = MappingProxyType({})
    words: Mapping[str, Any] = MappingProxyType({})

    def error(self, lines: Mapping[str, str]) -> ConfigError:
        """Make an error of complaints by key. It is headed by what holds the keys: the file, the
        command line, or both, as where a rule between two keys is broken."""
        owners = {key: self._owners(key) for key in lines}
        held = {owner for found in owners.values() for owner in found}
        names = {
            "file": self.source,
            "words": "command line" if len(held) == 1 else "the command line",
        }
        head = " and ".join(name for owner, name in names.items() if owner in held)
        texts = [
            f"  {'--' * (_holds(self.words, key) == 'whole')}{key or 'configuration'}: {text}"
            for key, text in lines.items()
        ]
        return ConfigError(f"{head}:\n" + "\n".join(texts))

    def _owners(self, key: str) -> set[str]:
        given = _holds(self.words, key)
        if not given:
            return {"file"}
        # Of a key with others below it, each may have given some.
        below = _holds(self.tree, key) if given == "in part" else ""
        return {"": {"words"}, "in part": {"file", "words"}, "whole": {"file"}}[below]


def _holds(tree: Any, key: str) -> str:
    """Whether a tree gives a value at this key: `whole`, `in part` or not ("")."""
    for name in filter(None, key.split(".")):
        # Of a list or a mapping that one word gave, every part is the word's.
        if not isinstance(tree, Mapping):
            return "whole"
        name = name.partition("[")[0]
        if name not in tree:
            return ""
        tree = tree[name]
    return ("in part" if tree else "") if isinstance(tree, Mapping) else "whole"


def explain(errors: Iterable[Any]) -> dict[str, str]:
    """Map each key to a line: what was got, what was expected, and the nearest key or value.

    pydantic gives an error per member of a union. Their expectations stand in one line; where one
    member fits but for one of its keys, that key alone counts.
    """
    groups: dict[str, list[tuple[Any, list[Any]]]] = {}
    for error in errors:
        key, owners = _place(error)
        groups.setdefault(key, []).append((error, owners))
    return {
        key: _complaint(key, group)
        for key, group in groups.items()
        # Where a deeper key is wrong, that this record did not fit says nothing more.
        if not key or not any(other.startswith((f"{key}.", f"{key}[")) for other in groups)
    }


def _place(error: Any) -> tuple[str, list[Any]]:
    """Find the key of an error as the user writes it, and the records that have its last part."""
    key, owners, kinds = "", [Config], [Config]
    # An unknown variant is an error of its key `name`.
    loc = [*error["loc"], "name"] if error["type"].startswith("union_tag") else error["loc"]
    for place, part in enumerate(loc):
        # All members that have this key: a union is not decided yet at this depth.
        hints = [fields_of(kind)[part] for kind in kinds if part in fields_of(kind)]
        unknown = error["type"] == "unexpected_keyword_argument" and place == len(loc) - 1
        if isinstance(part, int):
            key += f"[{part}]"
        elif hints or unknown:
            key, owners = f"{key}.{part}".lstrip("."), kinds
            kinds = [t for hint in hints for t in members_of(hint)]
            kinds += [t for kind in kinds for t in members_of(item_of(kind))]
        else:  # the name of a union's member
            names = {kind: (getattr(kind, "name", None), _name(kind)) for kind in kinds}
            chosen = [kind for kind in kinds if part in names[kind]]
            # No name either: a key of a class of the user's own, which has no record here.
            if not chosen and isinstance(part, str) and part.isidentifier() and place:
                key = f"{key}.{part}"
            kinds = chosen or kinds
    # A record was expected here: its keys are what the message lists.
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        owners = [kind for kind in kinds if fields_of(kind)]
    return key, owners


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", "")


def _complaint(key: str, group: Sequence[tuple[Any, list[Any]]]) -> str:
    (error, owners), kinds = group[0], {error["type"] for error, _ in group}
    # A key that one member lacks: the others' complaints about values do not matter.
    if "unexpected_keyword_argument" in kinds:
        return f"unknown key; {_nearest_key(key, owners)}"
    unnamed = error["type"] == "union_tag_not_found"
    if unnamed or (error["type"] == "missing" and isinstance(error["loc"][-1], str)):
        return "is missing; give it a value"
    value = error["input"]
    if error["type"] == "union_tag_invalid":
        value = value["name"]
    expectations = list(dict.fromkeys(_expectation(error, owners) for error, owners in group))
    remedy = f"; {REMEDIES[key]}" if key in REMEDIES else ""
    # A validator of ours wrote its own sentence, which is better than any put together here.
    if None in expectations:
        own = error["msg"].removeprefix("Value error, ")
        told = "got " in own or error["type"] == "unknown_key" or isinstance(value, Mapping)
        got = "" if told else f", got {show(value)}"
        return f"{own}{got}{remedy}"
    expected = " or ".join(map(str, expectations))
    if isinstance(value, str) and (near := nearest(value, re.findall(r"'([^']+)'", expected))):
        remedy = f"; did you mean {near!r}?{remedy}"
    # YAML's `key:` without a value is the usual cause.
    if value is None:
        remedy = f"; leave the key out for its default{remedy}"
    # 1e3 is a float in YAML, and whole numbers are never converted.
    if isinstance(value, float) and value.is_integer() and "int_type" in kinds:
        remedy = f"; write {int(value)}{remedy}"
    return f"got {show(value)}, expected {expected}{remedy}"


def _expectation(error: Any, owners: Sequence[Any]) -> str | None:
    """Say what pydantic expected; None where the error brings its own message."""
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        keys = dict.fromkeys(name for owner in owners for name in fields_of(owner))
        text = "text or " * isinstance(error["loc"][-1], int)
        return f"{text}keys ({', '.join(list(keys)[:4])}, ...)"
    if error["type"] == "missing":
        return "a value more"
    template, limits = EXPECTED.get(error["type"]), error.get("ctx", {})
    # 1000000000000.0 reads worse than 1e+12.
    plain = {k: f"{v:g}" if isinstance(v, float) else v for k, v in limits.items()}
    return template and template.format(**plain)


def _nearest_key(key: str, owners: Sequence[Any]) -> str:
    """Suggest a key of the same record, or one of the same name in another section."""
    first, *_, last = [*key.split("."), key.split(".")[-1]]
    # Most keys that are unknown to a variant belong to another one, of the section or within it.
    within = key.split(".")[1:-1]
    place, kinds = ".".join([first, *within]), records_of(first)
    if within:
        kinds = records_at(first, within[0])
    others = [kind.name for kind in kinds if hasattr(kind, "name") and last in fields_of(kind)]
    if others and (within or first in VARIANTS):
        some = ", ".join(map(repr, others[:3])) + ", ..." * (len(others) > 3)
        choice = "that too" if len(others) == 1 else "one of these, or leave the key out"
        return f"it belongs to {place}.name {some}: set {choice}"
    known = list(dict.fromkeys(name for owner in owners for name in fields_of(owner)))
    if near := nearest(last, known):
        return f"did you mean {near!r}?"
    # Last: the right name in the wrong section.
    for other in fields_of(Config):
        if other != first and any(last in fields_of(record) for record in records_of(other)):
            return f"did you mean '{other}.{last}'?"
    return f"known keys: {', '.join(known)}"


def show(value: Any) -> str:
    """Write a value as YAML has it, cut to 80 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""Keys of an older version: read in a run's record, refused with their new names elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vpgea_fast.config.errors import Origin
from vpgea_fast.config.schema import VARIANTS, fields_of, records_of

RENAMED = {
    "rollout.engine": "engine.name",
    "vllm": "engine",
    "train.norm": "objective.norm",
    "train.norm_constant": "objective.norm_constant",
    "train.denominator": "objective.denominator",
    "train.distill_denominator": "objective.distill_denominator",
}
"""Key or section of an older version -> what it is now."""

CHANGED = {"objective": {"grpo": {"trains": "thought"}}}
"""Section -> variant -> keys that older records lack, with what such a run did: not the default."""


def renewed(tree: Mapping[str, Any], say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Return the sections of a run's record with keys of an older version under their new names.

    Keys of a variant that was not chosen are left out: nothing read them. Keys that the version
    lacked are as the run was, not as new runs are (CHANGED). `say` hears of all three.
    """
    # A whole section that moved holds nothing by itself: only its keys do.
    moved = {old: _new_name(old) for old in _old_keys(tree) if "." in old}
    if not moved:
        return dict(tree)
    values: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    for section, keys in tree.items():
        if isinstance(keys, Mapping):
            # Collected first, since the name of the variant decides which of them are kept.
            values |= {
                moved[old]: keys[old.partition(".")[2]] for old in moved if _in(old, section)
            }
            keys = {k: v for k, v in keys.items() if f"{section}.{k}" not in moved}
        if section not in RENAMED:
            sections[section] = keys
    # Which variant it was may itself be among the values that move, or stand in its new section.
    there = {name: keys.get("name") for name, keys in sections.items() if isinstance(keys, Mapping)}
    chosen = {s: values.get(f"{s}.name") or there.get(s) or name for s, name in VARIANTS.items()}
    kept, left = [], []
    for old, new in moved.items():
        section, _, key = new.partition(".")
        # A section without variants has one record and no choice.
        kinds = [k for k in records_of(section) if chosen.get(section) in (None, k.name)]
        if any(key in fields_of(kind) for kind in kinds):
            sections.setdefault(section, {})[key] = values[new]
            kept.append(f"{old} as {new}")
        else:
            left.append(old)
    as_before = _add_changed(sections, chosen)
    dropped = f"; left out {', '.join(left)}, which nothing read" if left else ""
    say(f"written by an older version: read {', '.join([*kept, *as_before])}{dropped}")
    return sections


def _add_changed(sections: dict[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    """Write the keys of CHANGED that a record lacks into it; list them, to be said."""
    added = []
    for section, variants in CHANGED.items():
        # Of a damaged record the section or its name may be anything.
        keys, did = sections.get(section), variants.get(str(chosen[section]), {})
        if isinstance(keys, Mapping):
            sections[section] = {**did, **keys}
            added += [f"no {section}.{k} as {v}" for k, v in did.items() if k not in keys]
    return added


def _in(key: str, section: str) -> bool:
    return key.partition(".")[0] == section


def _old_keys(tree: Mapping[str, Any]) -> list[str]:
    """List `section.key` of an older version; a section that is empty, or no mapping, by name."""
    old_keys: list[str] = []
    for section, keys in tree.items():
        # All keys of a section that moved are old, also those that no version had.
        whole = section in RENAMED
        if isinstance(keys, Mapping) and keys:
            names = [f"{section}.{key}" for key in keys]
            old_keys += [name for name in names if whole or name in RENAMED]
        elif whole:
            old_keys.append(section)
    return old_keys


def _new_name(old: str) -> str:
    section, _, key = old.partition(".")
    # A key by itself first; the rest of a section moved under the same names.
    return RENAMED.get(old) or f"{RENAMED[section]}.{key}"


def refuse_old(tree: Mapping[str, Any], origin: Origin) -> None:
    """Raise ConfigError for keys of an older version, with their new names."""
    lines = {old: f"is now {_new_name(old)}; write that" for old in _old_keys(tree)}
    if lines:
        raise origin.error(lines)

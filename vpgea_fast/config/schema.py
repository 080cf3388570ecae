"""What the records say of themselves: keys of a section, their types, variants."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from vpgea_fast.config.records import Config
from vpgea_fast.objectives import DEFAULT

VARIANTS = {"objective": DEFAULT.name, "engine": "hf"}
"""Sections whose `name` chooses what other keys they have, with the name that is the default."""


@functools.cache  # half a millisecond per record, and a load asks 400 times
def fields_of(record: Any) -> Mapping[str, Any]:
    """Map the keys of a record to their types; empty for what is no record."""
    # Resolved: with `from __future__ import annotations` a field's own type is text.
    hints = get_type_hints(record) if dataclasses.is_dataclass(record) else {}
    # A constant of the class is no key.
    found = {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
    return MappingProxyType(found)


def members_of(hint: Any) -> list[Any]:
    """List the types of a union, or the one type; none for None, which is no type."""
    # Both spellings, `A | B` and Union[A, B], and unions inside unions.
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in members_of(part)]
    return [] if hint is None else [hint]


def item_of(hint: Any) -> Any:
    """Return what a list of any length holds; None for other types."""
    args = get_args(hint)
    return args[0] if get_origin(hint) is tuple and args[1:] == (...,) else None


def known_keys() -> list[str]:
    """List every `section.key`, of all variants."""
    return list(
        dict.fromkeys(
            # `name` and others stand in several variants: once each.
            f"{s}.{key}"
            for s in fields_of(Config)
            for r in records_of(s)
            for key in fields_of(r)
        )
    )


def records_of(section: str) -> list[Any]:
    """List the records that a section may be: one, or one per variant."""
    return [kind for kind in members_of(fields_of(Config).get(section)) if fields_of(kind)]


def records_at(section: str, key: str) -> list[Any]:
    """List the records that a key of a section may be, in any of the section's variants."""
    hints = [fields_of(kind).get(key) for kind in records_of(section)]
    kinds = dict.fromkeys(kind for hint in hints for kind in members_of(hint))
    return [kind for kind in kinds if fields_of(kind)]

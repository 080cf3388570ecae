"""Keys that nothing reads because of what another key says: declared beside them, refused at birth.

A key that changes nothing would pass for one that was tried. A record lists its own as `UNREAD`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Unread(NamedTuple):
    """`key` is not read where every key of `where` has one of these values, or passes this test.

    even_preset  also refuse the value that a preset gave it, since the preset then is not whole
    """

    key: str
    where: Mapping[str, tuple[Any, ...] | Callable[[Any], bool]]
    even_preset: bool = False

    def holds(self, record: Any) -> bool:
        """Whether the record is as `where` has it."""
        found = ((getattr(record, key), want) for key, want in self.where.items())
        return all(want(got) if callable(want) else got in want for got, want in found)


def refuse_unread(record: Any) -> None:
    """Raise ValueError for a key that is not at its default and that nothing reads, in one line
    with the other key."""
    preset = getattr(record, "PRESETS", {}).get(getattr(record, "preset", None), {})
    for rule in rules(type(record)):
        got, default = getattr(record, rule.key), _default(record, rule.key)
        # A key that the preset has set is nobody's slip, where one that was given switches it off.
        filled = not rule.even_preset and rule.key in preset and got == preset[rule.key]
        if got == default or filled or not rule.holds(record):
            continue
        because = " and ".join(f"{key} {_shown(getattr(record, key))}" for key in rule.where)
        raise ValueError(
            f"{rule.key}: got {_shown(got)}, which changes nothing with {because}; set it to its "
            f"default {_shown(default)}, or change {next(iter(rule.where))}"
        )


def rules(kind: type) -> list[Unread]:
    """Those of the record and of all that it builds on."""
    # vars, since a class's own UNREAD hides that of its base.
    return [rule for base in reversed(kind.__mro__) for rule in vars(base).get("UNREAD", ())]


def _default(record: Any, key: str) -> Any:
    return type(record).__pydantic_fields__[key].default


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)

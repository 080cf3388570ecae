"""The reference: every configuration key, every metric and the public functions, from the source.

    vpgea keys [SECTION]              the configuration keys on a terminal
    python -m vpgea_fast.manual DIR   write configuration.md, metrics.md and api.md into DIR

Texts are docstrings under the keys of config/ and the tables of book.py. Defaults and ranges are
asked of the records. The public functions are in interface.py.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from vpgea_fast import book, config, interface
from vpgea_fast.config.schema import fields_of, records_at, records_of
from vpgea_fast.values import nearest

LONG = 60
"""A default of more characters than this stands below its table."""
WIDTH = 96
"""Columns of a terminal's text."""
GENERIC = {2**31, 1e12}
"""Upper bounds that only catch slips; the page's head tells of them, not every line."""


class SectionError(ValueError):
    """A section that the configuration does not have; the message names the nearest."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key: its type and range in words, its default as JSON ("" for none)."""

    name: str
    kind: str
    default: str
    text: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A section, or one variant of it: `title` is "objective", `variant` "name: grpo" or ""."""

    title: str
    variant: str
    text: str
    keys: tuple[Key, ...]

    @property
    def head(self) -> str:
        return f"{self.title} ({self.variant})" if self.variant else self.title


def sections() -> list[Section]:
    """List every section in the order of the configuration. A variant is one of its own, and so are
    the keys of a file in `data.train` and `eval.data`."""
    hints = get_type_hints(config.Config, include_extras=True)
    found = []
    for name, hint in hints.items():
        # A section with variants is a union; any other is one record.
        members = _members(_bare(hint)[0])
        # One section per variant: their keys differ.
        for record in members:
            variant = f"name: {record.name}" if len(members) > 1 else ""
            # A variant says in its own docstring what it is; a section alone, in Config.
            text = " ".join((inspect.getdoc(record) or "").split()) if variant else ""
            text = text or attribute_docstrings(config.Config).get(name, "")
            found.append(Section(name, variant, text, tuple(_keys(record))))
        found += _deeper(name)
        if name == "data":
            text = "Keys of one file in `data.train` or `eval.data`, where it is not a path alone."
            found.append(Section("data", "a file", text, tuple(_keys(config.DataFile))))
    return found


def _deeper(name: str) -> Iterator[Section]:
    """Describe the keys of keys that are records again, once for all variants that have them."""
    for key in dict.fromkeys(key for record in records_of(name) for key in fields_of(record)):
        for kind in records_at(name, key):
            text = " ".join((inspect.getdoc(kind) or "").split())
            yield Section(f"{name}.{key}", f"name: {kind.name}", text, tuple(_keys(kind)))


def section(name: str) -> list[Section]:
    """Find the section of this name, with its variants. SectionError with the nearest name."""
    known = sections()
    if found := [part for part in known if part.title == name]:
        return found
    names = list(dict.fromkeys(part.title for part in known))
    # A key's name instead of a section's is the usual slip: `vpgea keys lr`.
    owners = [part.title for part in known for key in part.keys if key.name == name]
    near = [*filter(None, [nearest(name, names)]), *owners]  # the command asks for a section
    hint = f"did you mean {near[0]!r}?" if near else f"sections: {', '.join(names)}"
    raise SectionError(f"got section {name!r}; {hint}")


@functools.cache  # two thirds of a second for all: each record names the classes that it extends
def attribute_docstrings(record: type) -> Mapping[str, str]:
    """Read field -> the string below it in the class's source, in one line."""
    # Python drops a string that stands below a field: only the source still has it.
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(node.body, node.body[1:], strict=False)  # each with the one below
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _keys(record: Any) -> Iterator[Key]:
    """Describe the keys of a record, in its order."""
    # A key that a base class explains, and whose default alone differs, keeps its explanation.
    texts: dict[str, str] = {}
    for kind in reversed(record.__mro__):
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            texts |= attribute_docstrings(kind)
    hints = get_type_hints(record, include_extras=True)
    required = [n for n, field in record.__pydantic_fields__.items() if field.is_required()]
    # Defaults come from an instance, so that factories and serialisers have had their say.
    values = TypeAdapter(record).dump_python(record(**dict.fromkeys(required, "-")))
    for name in record.__pydantic_fields__:
        default = "" if name in required else _json(values[name])
        yield Key(name, in_words(hints[name]), default, texts.get(name, ""))


def _json(value: Any) -> str:
    """Write a default as JSON: a record as keys and values, what else JSON lacks as text."""

    def plain(item: Any) -> Any:
        return vars(item) if dataclasses.is_dataclass(item) else str(item)

    return json.dumps(value, ensure_ascii=False, default=plain)


def _bare(hint: Any) -> tuple[Any, list[Any]]:
    """Split a type from what `Annotated` adds to it."""
    # pydantic's Field holds its limits (annotated_types.Ge, Lt, ...) one level further in.
    if get_origin(hint) is not Annotated:
        return hint, []
    return hint.__origin__, [
        part for note in hint.__metadata__ for part in [note, *getattr(note, "metadata", [])]
    ]


def _members(hint: Any) -> list[Any]:
    """List the types of a union, also of one inside it; of any other type itself."""
    union = get_origin(hint) in (Union, UnionType)
    return [part for arg in get_args(hint) for part in _members(arg)] if union else [hint]


def in_words(hint: Any) -> str:
    """Say a type with its range as a user would.

    >>> in_words(config.PositiveInt), in_words(config.Exponent | None), in_words(Literal["a", "b"])
    ('whole number, 1 or more', 'number from 0 to 8, or null', '`a` or `b`')
    """
    bare, notes = _bare(hint)
    members = _members(bare)
    if len(members) > 1:
        # The records of a union are keys and values each.
        words = [*dict.fromkeys(in_words(member) for member in members)]
        return words[0] if len(words) == 1 else f"{' or '.join(words[:-1])}, or {words[-1]}"
    if get_origin(bare) is Literal:
        *most, last = [f"`{value}`" for value in get_args(bare)]
        return f"{', '.join(most)} or {last}" if most else last
    # Before the table of names: a tuple's type says how many values it takes.
    if get_origin(bare) is tuple:
        return _tuple_in_words(get_args(bare), notes)
    # A path is text to Python; its validator tells it apart.
    if config.expand_home in [getattr(note, "func", None) for note in notes]:
        return "path"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    names |= {type(None): "null", config.DataFile: "file"}
    return names.get(bare, "keys and values") + _range(bare, notes)


def _tuple_in_words(items: Sequence[Any], notes: Sequence[Any]) -> str:
    if items[1:] != (...,):
        return f"list of {len(items)}: {' and '.join(dict.fromkeys(map(in_words, items)))}"
    some = (
        "one or more" if any(getattr(note, "min_length", None) for note in notes) else "any number"
    )
    return f"list of {in_words(items[0])}" + (f"s, {some}" if items[0] is config.DataFile else "")


def _range(kind: Any, notes: Sequence[Any]) -> str:
    """Say the limits of a number; a generic upper bound is left out."""
    limits = {
        name: value
        for note in notes
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(note, name, None)) is not None and value not in GENERIC
    }
    if kind is int and "lt" in limits:  # the largest whole number is plainer
        limits["le"] = limits.pop("lt") - 1
    ge, gt, le, lt = (
        None if (limit := limits.get(name)) is None else f"{limit:.15g}"
        for name in ("ge", "gt", "le", "lt")
    )
    # From a to b reads as a range; one-sided limits stand behind a comma.
    if ge and (le or lt):
        return f" from {ge} to {le or f'below {lt}'}"
    low = f", {ge} or more" if ge else f" above {gt}" if gt else ""
    high = f", at most {le}" if le else f", below {lt}" if lt else ""
    return low + high


def keys_text(parts: Sequence[Section]) -> str:
    """Lay out keys for a terminal: name, type and default, and the text below."""
    blocks = []
    for part in parts:
        blocks.append(_wrapped(f"{part.head}: {part.text}", first=0))
        for key in part.keys:
            # JSON, which is also what the command line takes.
            default = f"default {key.default}" if key.default else "must be given"
            head = f"{part.title}.{key.name}: {key.kind}, {default}"
            blocks.append([*_wrapped(head, first=2), *_wrapped(key.text, first=6)])
    return "\n\n".join("\n".join(block) for block in blocks)


def metrics_text() -> str:
    """Lay out the book of metrics for a terminal."""
    blocks = []
    for chapter in [*book.STEP, book.EVALUATION, book.PATHS]:
        blocks.append([chapter.title, *_wrapped(chapter.when, first=6)])
        for key, metric in chapter.metrics.items():
            blocks.append([f"  {key}, {metric.unit}", *_wrapped(metric.text, first=6)])
    return "\n\n".join("\n".join(block) for block in blocks)


def _wrapped(text: str, *, first: int) -> list[str]:
    """Wrap text to WIDTH; indent the first line by `first` columns and the others by 6."""
    return textwrap.wrap(text, WIDTH, initial_indent=" " * first, subsequent_indent=" " * 6)


def pages() -> dict[str, str]:
    """Make file name -> Markdown of every generated page."""
    return {
        "configuration.md": configuration_page(),
        "metrics.md": metrics_page(),
        "api.md": interface.page(),
    }


def configuration_page() -> str:
    """Make docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from the source by `python -m vpgea_fast.manual docs`. Do not edit.",
        "",
        "* A YAML file holds sections of keys; `--section.key value` overrides one of them.",
        "* `vpgea keys SECTION` prints the same on a terminal.",
        "* `vpgea train FILE --print-config` shows what a file resolves to.",
        "* Whole numbers are below 2^31 and numbers at most 1e12, unless their line says less.",
    ]
    for part in sections():
        rows = [(f"`{key.name}`", key.kind, _shown(key), key.text) for key in part.keys]
        lines += ["", f"## {part.head}", "", part.text, ""]
        lines += _markdown_table(("key", "type", "default", "meaning"), rows)
        for key in part.keys:
            # A prompt template would make its row unreadable.
            if len(key.default) > LONG:
                text = json.loads(key.default)
                lines += ["", f"Default of `{part.title}.{key.name}`:", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def _shown(key: Key) -> str:
    if not key.default:
        return "must be given"
    return "below" if len(key.default) > LONG else f"`{key.default}`"


def metrics_page() -> str:
    """Make docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Generated from `vpgea_fast/book.py` by `python -m vpgea_fast.manual docs`. Do not edit.",
        "",
        "* metrics.jsonl has one line per step; the report shows these texts as tooltips.",
        "* Every number is of the whole step, over all processes. Times are those of process 0.",
        "* Questions of which the engine gave up a path are in no mean.",
        "* A share runs from 0 to 1. null stands for a number that does not exist in this step.",
    ]
    for chapter in [*book.STEP, book.EVALUATION, book.PATHS]:
        rows = [(f"`{key}`", *metric) for key, metric in chapter.metrics.items()]
        lines += ["", f"## {chapter.title}", "", chapter.when, ""]
        lines += _markdown_table(("key", "unit", "meaning"), rows)
    return "\n".join(lines) + "\n"


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    # A bar in a text would begin another cell.
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    # Unaligned: a column of one long cell would shift every line of a diff.
    rule = ["---"] * len(headers)
    return [f"| {' | '.join(row)} |" for row in [headers, rule, *cells]]


def main(argv: Sequence[str] | None = None) -> None:
    """Write every page into the directory given."""
    (folder,) = sys.argv[1:] if argv is None else argv
    for name, page in pages().items():
        (Path(folder) / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""YAML as its version 1.2 reads it, with nothing overridden, dropped or guessed.

PyYAML parses. What a plain word means is the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section
10.3.2): `yes`, `1:30`, `1_000` and dates are text, `010` is ten, `1e-6` is a number. PyYAML itself
follows 1.1, where they are true, 90, 1000, a date, eight, and text.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import yaml

MAX_DEPTH = 16
MAX_DIGITS = 40
"""Longer numbers are slips, and thousands of digits are an error of Python's own."""

NULL = {"", "~", "null", "Null", "NULL"}
BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INT = re.compile(r"[-+]?[0-9]+")
OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
ODD = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
"""Not printable in YAML, or (U+0085, U+2028, U+2029) a line break in 1.1 and none in 1.2."""

LONE = re.compile("[\ud800-\udfff]")
"""Half a character, which no encoding writes."""


class YamlError(ValueError):
    """What is wrong, and in which line (from 1)."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def parse(text: str) -> Any:
    """The one document in `text`: None, numbers, text, lists, and dicts whose keys are text.

    YamlError for a key that stands twice, anchors, aliases, merges, tags, directives, more than one
    document, deep nesting, and whatever PyYAML refuses.
    """
    node = _composed(text)
    return None if node is None else _value(node)


# A run and its report read one configuration a dozen times: 20 ms each.
@functools.lru_cache(maxsize=16)
def _composed(text: str) -> Any:
    """The document's node; None for an empty one."""
    # PyYAML would drop or split at some of these, and say nothing.
    if odd := ODD.search(text):
        raise YamlError(
            f"character U+{ord(odd[0]):04X} may not stand here; write it as an escape in double "
            "quotes",
            _line(text, odd.start()),
        )
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        # The problem's place; the context is where its collection began.
        mark = error.problem_mark or error.context_mark
        found = " ".join(filter(None, [error.context, error.problem]))
        raise YamlError(f"is not YAML: {found}", 1 + mark.line if mark else 1) from error
    except (ValueError, OverflowError) as error:  # of an escape or a version with large numbers
        if isinstance(error, YamlError):
            raise
        raise YamlError("is not YAML: no such character or version", 1 + loader.line) from error
    finally:
        loader.dispose()


def parse_word(text: str) -> Any:
    """As `parse`, of a word of the command line, in which a comment would be lost."""
    value = parse(text)
    # Again for its end: PyYAML ends a plain word at ` #` and drops the rest.
    node = yaml.compose(text, _Loader)
    if node is not None and text[node.end_mark.index :].strip():
        raise YamlError("is not one value: what follows a # would be lost; quote it", 1)
    return value


def plain(text: str) -> Any:
    """What a word without quotes means. ValueError for a number that no computer number holds."""
    if text in NULL:
        return None
    if text in BOOL:
        return BOOL[text]
    digits = INT.fullmatch(text) or OTHER_BASE.fullmatch(text)
    # Python refuses to convert beyond 4,300 digits, with an error of its own.
    if digits and len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; write it with {MAX_DIGITS} at most")
    if digits:
        return int(text, 0) if OTHER_BASE.fullmatch(text) else int(text)
    if FLOAT.fullmatch(text):
        value = float(text)
        # 1e999 would become infinity without a word.
        if value in (float("inf"), -float("inf")):
            raise ValueError(f"{text[:MAX_DIGITS]} is beyond float64; write a smaller number")
        return value
    # Python spells .inf and .nan without the dot.
    return float(text.replace(".", "", 1)) if SPECIAL.fullmatch(text) else text


def dump(tree: Any) -> str:
    """YAML that `parse`, and a reader of YAML 1.1 too, reads as `tree`."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.BaseLoader):
    """Composes nodes; BaseLoader gives no meaning to words."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = 1 + event.start_mark.line
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            mark = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise YamlError(f"got {mark}{event.anchor}; write the value out in each place", line)
        if event.tag is not None:
            raise YamlError(
                f"got the tag {event.tag!r}; leave it out, and put text in quotes", line
            )
        # Each level is a call: a thousand brackets would be a RecursionError.
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlError(f"more than {MAX_DEPTH} levels; expected sections and keys", line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def process_directives(self) -> Any:
        token: Any = self.peek_token()
        if isinstance(token, yaml.DirectiveToken):
            line = 1 + token.start_mark.line
            # %YAML 1.1 asks for other meanings, %TAG for types.
            if (token.name, token.value) != ("YAML", (1, 2)):
                raise YamlError(f"got %{token.name}; it is read as YAML 1.2: leave it out", line)
        return super().process_directives()


def _value(node: Any) -> Any:
    line = 1 + node.start_mark.line
    if isinstance(node, yaml.SequenceNode):
        return [_value(part) for part in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node)
    if LONE.search(node.value):
        raise YamlError("half a character (a lone surrogate); write it as \\U and 8 digits", line)
    try:
        # A style is a quote: what is quoted is text.
        return node.value if node.style else plain(node.value)
    except ValueError as error:
        raise YamlError(str(error), line) from error


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = 1 + key_node.start_mark.line
        # By its meaning: `1:` and `true:` are no names unless they are quoted.
        is_text = isinstance(key_node, yaml.ScalarNode) and isinstance(_value(key_node), str)
        if not is_text:
            got = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise YamlError(f"got {got!r} as a key, expected a name", line)
        key = key_node.value
        if key == "<<":
            raise YamlError("got a merge (<<), which YAML 1.2 has not; write the keys out", line)
        # PyYAML would keep the last of them without a word.
        if key in values:
            raise YamlError(
                f"{key!r} stands twice, first in line {lines[key]}; leave one of them out", line
            )
        values[key], lines[key] = _value(value_node), line
    return values


def _line(text: str, position: int) -> int:
    # YAML counts \r\n as one break, and a lone \r as one too.
    return 1 + len(re.findall(r"\r\n?|\n", text[:position]))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        # What stands twice is written twice: `parse` refuses aliases.
        return True


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """In quotes where either version of YAML would read something else."""
    try:
        # Quoted where a plain word would come back as a number, true or null.
        style = None if isinstance(plain(text), str) else "'"
    except ValueError:
        style = "'"
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, '"' if ODD.search(text) else style
    )


_Dumper.add_representer(str, _write_text)

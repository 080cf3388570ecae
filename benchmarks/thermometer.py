"""How the code reads, in numbers: sizes of files and functions, comments, positional arguments.

    python benchmarks/thermometer.py            # the table
    python benchmarks/thermometer.py --list     # and what stands behind each number

A thermometer, not the aim: where a rule would make a line worse, the better line stays.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("vpgea_fast", "kernels")
LONG_FILE, LONG_FUNCTION, SPEAKING_FUNCTION, POSITIONAL = 450, 90, 25, 5
LARGE_FILES, POSITIONAL_CALLS, SOFTCAP_FILES, MEDIAN_FILE, SILENT_SHARE = 9, 10, 7, 260, 0.20
COMMENT_SHARE = (0.06, 0.08)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file: its lines, its syntax tree, and the lines that hold a comment."""

    path: str
    lines: int
    tree: ast.Module
    comments: frozenset[int]
    text: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number, whether it is within its limit, and what stands behind it."""

    name: str
    value: str
    limit: str
    within: bool
    behind: Sequence[str] = ()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="show what stands behind each number")
    args = parser.parse_args(argv)
    readings = measure(read_sources(ROOT))
    for reading in readings:
        mark = " " if reading.within else "!"
        print(f"{mark} {reading.name:<58}{reading.value:>10}  {reading.limit}")
        if args.list:
            print("".join(f"      {line}\n" for line in reading.behind), end="")
    return int(not all(reading.within for reading in readings))


def read_sources(root: Path) -> list[Source]:
    """Every module of ROOMS; the symlinked folder is read once."""
    paths = {path.resolve() for room in ROOMS for path in (root / room).rglob("*.py")}
    sources = []
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = frozenset(t.start[0] for t in tokens if t.type == tokenize.COMMENT)
        sources.append(
            Source(
                path=path.relative_to(root).as_posix(),
                lines=text.count("\n"),
                tree=ast.parse(text),
                comments=comments,
                text=text,
            )
        )
    return sources


def measure(sources: Sequence[Source]) -> list[Reading]:
    sizes = {source.path: source.lines for source in sources if source.lines > 3}
    large = sorted((p for p, n in sizes.items() if n > LONG_FILE), key=lambda p: -sizes[p])
    spans = [(s, f, f.end_lineno - f.lineno + 1) for s in sources for f in functions(s.tree)]
    long = [f"{s.path}: {f.name}, {n} lines" for s, f, n in spans if n > LONG_FUNCTION]
    speaking = [(s, f) for s, f, n in spans if n >= SPEAKING_FUNCTION]
    silent = [f"{s.path}: {f.name}" for s, f in speaking if not has_comment(s, f)]
    comments = sum(len(source.comments) for source in sources) / sum(sizes.values())
    own = {node.name for s in sources for node in ast.walk(s.tree) if isinstance(node, DEFINED)}
    calls = [line for source in sources for line in positional_calls(source, own)]
    # As a word: attn_logit_softcapping and the like are other people's names for their own.
    softcap = [source.path for source in sources if re.search(r"\bsoftcap\b", source.text)]
    low, high = COMMENT_SHARE
    return [
        reading("lines of the median file", statistics.median(sizes.values()), MEDIAN_FILE),
        reading(
            f"files above {LONG_FILE} lines",
            len(large),
            LARGE_FILES,
            [f"{path}: {sizes[path]}" for path in large],
        ),
        reading(f"functions above {LONG_FUNCTION} lines", len(long), 0, long),
        Reading(
            name="lines with a comment",
            value=f"{comments:.2%}",
            limit=f"{low:.0%} to {high:.0%}",
            within=low <= comments <= high,
            behind=[f"{s.path}: {len(s.comments) / s.lines:.1%}" for s in sources if s.lines > 3],
        ),
        Reading(
            name=f"functions of {SPEAKING_FUNCTION}+ lines without a comment inside",
            value=f"{len(silent) / len(speaking):.1%}",
            limit=f"below {SILENT_SHARE:.0%}",
            within=len(silent) / len(speaking) < SILENT_SHARE,
            behind=silent,
        ),
        reading(
            f"calls of own code with {POSITIONAL}+ positional arguments",
            len(calls),
            POSITIONAL_CALLS,
            calls,
        ),
        reading("files that name `softcap`", len(softcap), SOFTCAP_FILES, softcap),
    ]


def reading(name: str, value: float, limit: float, behind: Sequence[str] = ()) -> Reading:
    return Reading(
        name=name,
        value=f"{value:g}",
        limit=f"at most {limit:g}",
        within=value <= limit,
        behind=behind,
    )


Function = ast.FunctionDef | ast.AsyncFunctionDef
DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def functions(tree: ast.Module) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def has_comment(source: Source, function: Function) -> bool:
    """Behind the `def` line, so that a comment above the function does not count."""
    assert function.end_lineno is not None
    return any(function.lineno < line <= function.end_lineno for line in source.comments)


def positional_calls(source: Source, own: set[str]) -> Iterator[str]:
    """Calls of a name defined in ROOMS; a starred argument may hold any number and is left out."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        given = [a for a in node.args if not isinstance(a, ast.Starred)]
        if name in own and len(given) >= POSITIONAL:
            yield f"{source.path}:{node.lineno}: {name}, {len(given)} arguments"


if __name__ == "__main__":
    raise SystemExit(main())

"""`vpgea compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vpgea_fast.cli.words import (
    Commands,
    Parser,
    UsageError,
    no_more,
    notice,
    one_process,
    path,
    show,
)

FORMATS = {"markdown": ".md", "latex": ".tex", "json": ".json"}


def declare_compare(commands: Commands, common: Parser) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare evaluations question by question",
        epilog="The first evaluation is the base. Differences have paired bootstrap intervals over "
        "questions.",
        allow_abbrev=False,
        parents=[common],
    )
    compare.add_argument(
        "evaluations",
        nargs="+",
        type=path,
        metavar="[NAME=]FOLDER",
        help="what eval wrote, or a run: each evaluation that it holds",
    )
    compare.add_argument(
        # No default here: it depends on what the evaluations hold.
        "--mode",
        choices=("sampled", "greedy"),
        help="default: sampled where all have it",
    )
    compare.add_argument(
        "--common",
        action="store_true",
        help="compare the questions that all have, whatever else of settings and sets is unlike",
    )
    compare.add_argument("--format", choices=tuple(FORMATS), default="markdown")
    compare.add_argument(
        "--no-published", action="store_true", help="leave the published figures out"
    )
    compare.add_argument(
        "--out", type=path, metavar="FOLDER", help="write comparison.md, .tex and .json there, too"
    )
    compare.set_defaults(run=run_compare, parser=compare)


def run_compare(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    one_process("compare")
    # Imports wait until the options are known to be good: torch takes seconds.
    from vpgea_fast.evaluation import compare, tables

    found = compare.open_evaluations(args.evaluations, common=args.common, note=notice)
    comparison = compare.compare(found, mode=args.mode, common=args.common)
    if args.no_published:
        comparison["published"] = {}
    grids = tables.grids(comparison)
    # All three before any is written: a fault in one leaves no folder behind.
    texts = {
        "markdown": tables.markdown(grids),
        "latex": tables.latex(grids),
        "json": tables.as_json(comparison),
    }
    if args.out is not None:
        _write(Path(args.out), texts)
    show(texts[args.format].rstrip("\n"))
    return 0


def _write(folder: Path, texts: dict[str, str]) -> None:
    from vpgea_fast.checkpoint import write_text

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, suffix in FORMATS.items():
            write_text(folder / f"comparison{suffix}", texts[name])
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; give another folder") from error

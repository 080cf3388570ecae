"""Commands that tell: `vpgea report`, `keys` and `doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vpgea_fast.cli.words import (
    Commands,
    Parser,
    UsageError,
    no_more,
    path,
    show,
)


def declare_report(commands: Commands, common: Parser) -> None:
    report = commands.add_parser(
        "report", help="draw a run directory", allow_abbrev=False, parents=[common]
    )
    report.add_argument("run_dir", metavar="RUN", type=path)
    report.set_defaults(run=run_report, parser=report)


def run_report(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    # After the refusal, which must not wait seconds for torch.
    from vpgea_fast.metrics import Console
    from vpgea_fast.report import closing_notes, closing_table, write_report

    run_dir, console = Path(args.run_dir), Console()
    # The page first: it has refused what is no run by the time a table is printed.
    page = write_report(run_dir)
    headers, rows = closing_table(run_dir)
    console.close()
    # A run of no evaluation has a page and no table.
    if rows:
        console.table(headers, rows, notes=closing_notes(run_dir))
    console.message(str(page))
    return 0


def declare_keys(commands: Commands, common: Parser) -> None:
    keys = commands.add_parser(
        "keys",
        help="explain every configuration key, or every metric",
        epilog="A section is the part of a key before the dot, e.g. vpgea keys optim.",
        allow_abbrev=False,
        parents=[common],
    )
    keys.add_argument("section", nargs="?", metavar="SECTION", help="default: all of them")
    keys.add_argument("--metrics", action="store_true", help="what a run writes, in its place")
    keys.set_defaults(run=run_keys, parser=keys)


def run_keys(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    from vpgea_fast import manual

    # A section of the metrics does not exist, so one of the two words is a slip.
    if args.metrics and args.section is not None:
        raise UsageError(f"keys: got {args.section!r} and --metrics; give one of the two")
    if args.metrics:
        show(manual.metrics_text())
    else:
        parts = manual.sections() if args.section is None else manual.section(args.section)
        show(manual.keys_text(parts))
    return 0


def declare_doctor(commands: Commands, common: Parser) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what runs on this machine, and why the rest does not",
        allow_abbrev=False,
        parents=[common],
    )
    doctor.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default auto")
    doctor.set_defaults(run=run_doctor, parser=doctor)


def run_doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    from vpgea_fast.doctor import examine

    # `no:` stands before the reason, so that a column of names stays a column.
    for part in examine(args.device):
        print(f"{part.part:<16}{part.name:<13}{'' if part.runs else 'no: '}{part.detail}")
    # 0 whatever is missing: it describes the machine and judges nothing.
    return 0

"""`vpgea vr-rounds`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vpgea_fast import config
from vpgea_fast.cli.train import STATUS
from vpgea_fast.cli.words import (
    Commands,
    Parser,
    config_file,
    notice,
    one_process,
    path,
    show,
    status_of,
    whole,
)


def declare_rounds(commands: Commands, common: Parser) -> None:
    rounds = commands.add_parser(
        "vr-rounds",
        help="Variational Reasoning with two models, round by round",
        epilog="Any key is an option. The same command goes on with what is missing.",
        allow_abbrev=False,
        parents=[common],
    )
    rounds.add_argument("config", type=config_file, help="YAML file, or an installed one, as train")
    # One is what the paper ran.
    rounds.add_argument(
        "--rounds", type=whole(1, 1000), default=1, metavar="T", help="most rounds; default 1"
    )
    rounds.add_argument("--out", type=path, required=True, help="folder of the rounds")
    rounds.set_defaults(run=run_rounds, parser=rounds)


def run_rounds(args: argparse.Namespace, overrides: list[str]) -> int:
    one_process("vr-rounds")
    cfg = config.load(args.config, overrides, notice)
    try:
        return _run(args, cfg)
    except KeyboardInterrupt as error:
        return _left(args, status_of(error))


def _left(args: argparse.Namespace, status: int) -> int:
    """Say how rounds go on that were asked to leave; return the exit status."""
    show(f"stopped; what has run is saved: the same command goes on in {args.out}")
    return status


def _run(args: argparse.Namespace, cfg: config.Config) -> int:
    from vpgea_fast.distributed import Stopped
    from vpgea_fast.sweep import rounds

    if args.rounds > 1:
        show("more than one round is beyond the paper, which made one (arXiv 2509.22637)")
    try:
        known = rounds.run_rounds(cfg, Path(args.out), args.rounds, show)
    except Stopped:
        return _left(args, STATUS["STOPPED"])
    kept = next(found for found in reversed(known) if found["kept"])
    show(f"kept: round {kept['round']}, theta {kept['theta']}, phi {kept['phi']}")
    return 0

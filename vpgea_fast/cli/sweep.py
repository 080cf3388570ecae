"""`vpgea sweep`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vpgea_fast.cli.train import STATUS
from vpgea_fast.cli.words import (
    Commands,
    Parser,
    config_file,
    one_process,
    path,
    show,
    status_of,
    whole,
    yaml_value,
)


def declare_sweep(commands: Commands, common: Parser) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="compare methods on one budget",
        epilog="Any key is an option and holds for all runs, e.g. --train.steps 30. The same "
        "command goes on with what is missing.",
        allow_abbrev=False,
        parents=[common],
    )
    sweep.add_argument("config", type=config_file, help="YAML file, or an installed one, as train")
    sweep.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="METHOD",
        help="NAME, NAME:KEY=VALUE,... or LABEL=NAME:...; a key of the objective, or section.key",
    )
    sweep.add_argument("--rates", nargs="+", required=True, metavar="LR", help="grid of optim.lr")
    sweep.add_argument(
        "--grid",
        nargs="+",
        default=[],
        metavar="LABEL=LR,LR,...",
        help="as many other rates of one method, where those of all are none for it",
    )
    # Three: the t interval of two seeds is 12.7 standard errors to each side.
    sweep.add_argument("--seeds", nargs="+", type=whole(0, 2**31 - 1), default=[0, 1, 2])
    sweep.add_argument("--out", type=path, required=True, help="folder of the sweep")
    sweep.add_argument(
        "--budget",
        default="paths",
        type=_budget,
        help="what all runs have alike: paths (those that the configuration draws; the default), "
        "steps, a number of paths, or tokens:N, that many sampled ones",
    )
    # No default here: it depends on what the configuration evaluates.
    sweep.add_argument("--metric", help="what picks a rate; default sampled_eps3")
    sweep.add_argument(
        "--select",
        type=path,
        metavar="FILE",
        help="questions that pick the rates; default: half of those of eval.data",
    )
    sweep.add_argument(
        "--extend",
        type=whole(0, 20),
        default=3,
        metavar="N",
        help="most rates that a grid gets more while a best one is at its edge; default 3",
    )
    sweep.add_argument(
        "--jobs",
        type=whole(1, 4096),
        metavar="N",
        help="runs at a time; default: cores / run.threads, one on a GPU",
    )
    sweep.add_argument(
        "--short",
        type=_tokens,
        metavar="TOKENS",
        help="count runs that end with at most so many tokens at held accuracy",
    )
    sweep.set_defaults(run=run_sweep, parser=sweep)


def run_sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    one_process("sweep")
    try:
        return _run(args, overrides)
    except KeyboardInterrupt as error:
        return _left(args, status_of(error))


def _left(args: argparse.Namespace, status: int) -> int:
    """Say how a sweep goes on that was asked to leave; return its exit status."""
    show(f"stopped; what has run is saved: the same command goes on in {args.out}")
    return status


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    # Imports wait until the options are known to be good: torch takes seconds.
    from vpgea_fast import sweep
    from vpgea_fast.distributed import Stopped
    from vpgea_fast.metrics import Console

    if args.metric not in (None, *sweep.METRICS):
        known = ", ".join(sweep.METRICS)
        raise sweep.SweepError(f"--metric: got {args.metric!r}, expected one of {known}")
    order = sweep.Order(
        config=args.config,
        words=tuple(overrides),
        methods=tuple(map(sweep.parse_method, args.methods)),
        rates=sweep.parse_rates(args.rates),
        seeds=tuple(args.seeds),
        out=Path(args.out),
        budget=args.budget,
        metric=args.metric,
        select=args.select,
        extend=args.extend,
        jobs=args.jobs,
        short=args.short,
        grids=sweep.parse_grids(args.grid),
    )
    console = Console()
    try:
        sweep.run_sweep(order, console, command=_command(args, overrides))
    except Stopped:
        return _left(args, STATUS["STOPPED"])
    finally:
        console.close()
    return 0


def _command(args: argparse.Namespace, overrides: list[str]) -> str:
    """Write the command that makes the same results again."""
    words = ["vpgea", "sweep", args.config, "--methods", *args.methods, "--rates", *args.rates]
    words += ["--grid", *args.grid] if args.grid else []
    words += ["--seeds", *map(str, args.seeds), "--out", args.out, "--budget", str(args.budget)]
    # Without --jobs: it moves runs in time, and changes none of them.
    for name in ("metric", "select", "short"):
        value = getattr(args, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join([*words, "--extend", str(args.extend), *overrides])


def _budget(word: str) -> str | int:
    if word in ("paths", "steps"):
        return word
    count = whole(1, 2**53)(word.removeprefix("tokens:"))
    return f"tokens:{count}" if word.startswith("tokens:") else count


def _tokens(word: str) -> float:
    value = yaml_value(word)
    if type(value) in (int, float) and value > 0:
        return float(value)
    raise argparse.ArgumentTypeError(f"got {word!r}, expected a number of tokens above 0")

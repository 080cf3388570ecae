"""`vpgea train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vpgea_fast import config
from vpgea_fast.cli.words import (
    Commands,
    Parser,
    UsageError,
    config_file,
    gib,
    notice,
    path,
    plain_logs,
    show,
    status_of,
    whole,
)

if TYPE_CHECKING:
    from vpgea_fast.trainer import Ending

STATUS = {"DONE": 0, "HALTED": 3, "STOPPED": 143}
"""`trainer.Ending` -> exit status. 143 = 128 + SIGTERM is what a scheduler expects of a preempted
job that saved."""
MADE = {
    "data/tiny/base": "make it: vpgea make-tiny data/tiny",
    "data/smollm2": "make it: vpgea make-smol data/smollm2",
    "data/problems": "make them: vpgea make-problems data/problems",
    "runs/smollm2-sft/export": "train it: docs/smollm2.md has the command",
}
"""What shipped configurations read and no Hub has -> where it comes from."""


def declare_train(commands: Commands, common: Parser) -> None:
    train = commands.add_parser(
        "train",
        help="train from a YAML file",
        epilog="Any key of --print-config is an option, e.g. --optim.lr 1e-6 --run.dir runs/b; "
        "vpgea keys explains them.",
        allow_abbrev=False,
        parents=[common],
    )
    # Read from the folder: a configuration that is added is listed with no edit here.
    names = ", ".join(sorted(file.stem for file in config.SHIPPED.glob("*.yaml")))
    train.add_argument(
        "config", nargs="?", type=config_file, help=f"YAML file, or one that is installed: {names}"
    )
    train.add_argument(
        "--resume",
        metavar="RUN",
        type=path,
        help="go on with a run directory (its own config.yaml is used)",
    )
    train.add_argument(
        "--resume-if-started",
        action="store_true",
        help="with a YAML file: go on with its run directory if a run has begun there, as --resume "
        "would (for launchers that start the same command again)",
    )
    train.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="show prompts, lengths, memory and hours, and stop"
    )
    # These three describe other machines than this one, so they go with --dry-run alone.
    train.add_argument(
        "--processes",
        type=whole(1, 2**20),
        metavar="N",
        help="--dry-run for N processes, one a device",
    )
    train.add_argument(
        "--device-gib", type=gib, metavar="G", help="--dry-run for CUDA devices of G GiB"
    )
    train.add_argument(
        "--rates",
        metavar="KEY=NUMBER,...",
        help="--dry-run with other rates than it shows, e.g. tflops=312,bandwidth=2.04",
    )
    train.set_defaults(run=run_train, parser=train)


def run_train(args: argparse.Namespace, overrides: list[str]) -> int:
    # Both would be two configurations, neither is none.
    if (args.config is None) == (args.resume is None):
        raise UsageError("train: give a YAML file, or --resume RUN (one of the two)")
    if args.resume_if_started and args.config is None:
        raise UsageError("--resume-if-started goes with a YAML file; --resume RUN needs no more")
    if not args.dry_run and (args.processes, args.device_gib, args.rates) != (None, None, None):
        raise UsageError(
            "--processes, --device-gib and --rates are for --dry-run; add it or leave them out"
        )
    source, run = args.config, args.resume
    if args.resume_if_started:
        # The run directory is known from the configuration alone; whose config.yaml is there rules.
        run_dir = config.load(source, overrides).run.dir
        run = run_dir if (Path(run_dir) / "config.yaml").is_file() else None
    # A resumed run is described by its own record; the YAML file may have changed since.
    if run is not None:
        source = Path(run) / "config.yaml"
        overrides = [*overrides, "--run.dir", run]
        if not source.is_file():
            raise UsageError(f"{run} is no run: config.yaml is missing; give a run to go on")
    # --run.dir is appended above: it wins over the record's, so a moved run goes on.
    cfg = config.load(source, overrides, notice, record=run is not None)
    if args.print_config:
        show(config.dump(cfg).rstrip("\n"))
        return 0
    # Their loaders would say that the Hub has no such name.
    read = {cfg.model.path, *(str(Path(file.path).parent) for file in cfg.data.train)}
    for place, remedy in MADE.items():
        if place in read and not Path(place).exists():
            raise UsageError(f"{place} is not there; {remedy}")
    if args.dry_run:
        # Imports wait until the options are known to be good: torch takes seconds.
        from vpgea_fast.check import target
        from vpgea_fast.dry_run import dry_run
        from vpgea_fast.durations import parse_rates

        rates = {} if args.rates is None else parse_rates(args.rates)
        on = target(cfg, processes=args.processes, device_gib=args.device_gib)
        dry_run(cfg, on=on, rates=rates)
        return 0
    try:
        return _train(cfg, resume=run is not None)
    except KeyboardInterrupt as error:
        begun = (Path(cfg.run.dir) / "config.yaml").is_file()
        how = f"go on: --resume {cfg.run.dir}" if begun else "the same command starts the run"
        notice(f"stopped; {how}")
        return status_of(error)


def _train(cfg: config.Config, *, resume: bool) -> int:
    # Of one process: several would each say it.
    if os.environ.get("WORLD_SIZE", "1") == "1":
        from vpgea_fast.data import check_first_rows

        check_first_rows([*cfg.data.train, *cfg.eval.data], cfg.data)
    from vpgea_fast.trainer import fit

    plain_logs()
    return status(fit(cfg, resume=resume))


def status(ending: Ending) -> int:
    """Return the exit status of an ending.

    Under torchrun it is 0 for every run that saved: any other status is a failure there, and
    starts the run again.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else STATUS[ending.name]

"""Commands that make questions: `vpgea data` and `make-tiny`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vpgea_fast.cli.models import of_model, settings_line
from vpgea_fast.cli.words import (
    Commands,
    Parser,
    UsageError,
    config_file,
    files,
    no_more,
    one_process,
    path,
    plain_logs,
    share_range,
    take_folders,
    whole,
)


def declare_data(commands: Commands, common: Parser) -> None:
    data = commands.add_parser(
        "data",
        help="write a published data set as training and test questions",
        epilog="Data sets: gsm8k, math (without the 500 of math500, which are its test), math500, "
        "deepscaler, aime24, aime25, svamp. Keys are options for --against and --model, e.g. "
        "--eval.temperature 1 --engine vllm.",
        allow_abbrev=False,
        parents=[common],
    )
    data.add_argument("name", metavar="NAME", help="data set, e.g. gsm8k")
    take_folders(data, "its files")
    data.add_argument("--out", type=path, metavar="DIR", help="default: data/NAME")
    # `extend`: --against may come again, each time with several files.
    data.add_argument(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="evaluation files besides the test split whose questions are left out of training",
    )
    data.add_argument("--overwrite", action="store_true", help="replace files that are there")
    # The options from here on belong to the pass rates of a model.
    data.add_argument("--model", type=path, help="sample answers to each training question")
    data.add_argument(
        "--keep",
        type=share_range,
        metavar="LOW:HIGH",
        help="with --model: write the training questions whose pass rate is in this range",
    )
    data.add_argument(
        "--samples",
        type=whole(1, 2**20),
        metavar="N",
        help="with --model: answers each, default 8",
    )
    data.add_argument("--config", type=config_file, help="YAML file whose sections are used")
    data.set_defaults(run=run_data, parser=data)


def run_data(args: argparse.Namespace, overrides: list[str]) -> int:
    one_process("data")
    # Without a model no rate is measured: the two would mean nothing, in silence.
    if args.model is None and (args.keep, args.samples) != (None, None):
        raise UsageError("--keep and --samples need --model, the model whose pass rate counts")
    # Eight answers per question unless told otherwise: one gives only the rates 0 and 1.
    words = ["--eval.data", files(args.against), *overrides]
    if args.samples is not None:
        words += ["--eval.samples", str(args.samples)]
    elif not any(word.startswith("--eval.samples") for word in overrides):
        words += ["--eval.samples", "8"]
    if args.model is not None:
        words += ["--model.path", args.model]
    source, cfg = of_model(args, words, overrides)
    if args.model is not None:
        print(settings_line(args.model, source))
    from vpgea_fast.metrics import Console
    from vpgea_fast.prepare import Order, prepare

    # 0 is legal in an evaluation (greedy answers alone), so the configuration takes it.
    if not cfg.eval.samples:
        raise UsageError("eval.samples: got 0; a pass rate needs one sample or more")
    # Paths become Paths here; nothing below reads the command line.
    order = Order(
        name=args.name,
        out=Path(args.out or Path("data") / args.name),
        folders=tuple(map(Path, args.folders)),
        overwrite=args.overwrite,
        measure=args.model is not None,
        keep=args.keep,
    )
    plain_logs()
    # `datasets` draws a bar per file and map; in a log each redraw is a line.
    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
    # Closed also after an error: a bar left behind would hide its line on a terminal.
    console = Console()
    try:
        prepare(order, cfg, console)
    finally:
        console.close()
    return 0


def declare_make_tiny(commands: Commands, common: Parser) -> None:
    tiny = commands.add_parser(
        "make-tiny",
        help="make the tiny model and its questions",
        allow_abbrev=False,
        parents=[common],
    )
    tiny.add_argument("out", type=path, help="directory to make")
    tiny.add_argument(
        "--base",
        choices=[
            *("demo", "common", "chain-1e-4", "chain-1e-3", "strict", "stated"),
            *("lookup-rare", "lookup-common"),
        ],
        default="demo",
        help="arithmetic with concise paths at about 1e-6, or 1 %%, 1e-4, 1e-3; strict: nothing "
        "between verbose and concise; stated: a teacher that states the answer. Or lookups",
    )
    # Three minutes a try; copying takes none.
    tiny.add_argument(
        "--from-scratch",
        action="store_true",
        help="train the base instead of copying the shipped one",
    )
    tiny.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    tiny.set_defaults(run=run_make_tiny, parser=tiny)


def run_make_tiny(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    from vpgea_fast.tiny import make_tiny

    world = make_tiny(
        args.out, base=args.base, from_scratch=args.from_scratch, seed=args.seed, progress=print
    )
    # What the gate of the base measured, also where a shipped one was copied.
    base = world.report
    print(f"{args.out}: base {base.recipe!r} (seed {base.seed}) and its questions")
    print(
        f"P(concise thought): student view {base.concise_student:.2g}, "
        f"teacher view {base.concise_teacher:.2g}"
    )
    if base.terse_student is not None:
        print(
            f"P(terse thought): student view {base.terse_student:.2g}, "
            f"teacher view {base.terse_teacher:.2g}"
        )
    print(
        f"accuracy and tokens: greedy {base.greedy_accuracy:.1%}, {base.greedy_tokens:.1f}; "
        f"sampled {base.sampled_accuracy:.1%}, {base.sampled_tokens:.1f}"
    )
    return 0

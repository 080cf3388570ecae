"""`vpgea`: train, sweep, vr-rounds, eval, compare, export, data, serve, report, keys, doctor,
make-tiny, make-smol, make-problems. Every configuration key is an option, `--section.key value`;
`vpgea keys` explains them."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence

from vpgea_fast import __version__, config
from vpgea_fast.cli.about import declare_doctor, declare_keys, declare_report
from vpgea_fast.cli.compare import declare_compare
from vpgea_fast.cli.models import declare_eval, declare_export, declare_serve, run_serve
from vpgea_fast.cli.questions import declare_data, declare_make_tiny
from vpgea_fast.cli.rounds import declare_rounds
from vpgea_fast.cli.smol import declare_make_problems, declare_make_smol
from vpgea_fast.cli.sweep import declare_sweep
from vpgea_fast.cli.train import declare_train
from vpgea_fast.cli.words import Parser, UsageError, status_of, termination
from vpgea_fast.values import nearest

REPEATABLE = ("--from", "--against")
"""Options that collect their values."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status.

    0; 2 for an error (one line on stderr); 3 for a run that had to end before its last step; 143
    and 130 for a stopped one.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        words, overrides, passed = _split(argv)
        _no_repeats(words)
        # Unknown words come back, so that the error can name the option that was meant.
        args, unknown = _parser().parse_known_args(words)
        if unknown:
            raise UsageError(_unknown(unknown[0], args.parser))
        if passed and args.run is not run_serve:
            raise UsageError(f"got {passed[0]!r} after --; only serve passes words on, to vLLM")
        args.passed, args.words = passed, list(argv)
        # Until a command listens itself: imports and checks take seconds, an evaluation hours.
        with termination():
            return args.run(args, overrides)
    # Every refusal of this program is an exception whose text is meant for the user.
    except Exception as error:
        # In argv, not in args: the error may be that of the parser itself.
        if "--traceback" in argv:
            raise
        print(f"vpgea: {_said(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("vpgea: interrupted", file=sys.stderr)
        return status_of(interrupt)


def _said(error: BaseException) -> str:
    """Say an error in words; where it is not this program's, also how to see where it arose."""
    text, name = config.one_line(error, limit=None), type(error).__name__
    own = type(error).__module__.startswith("vpgea_fast") or type(error) is ValueError
    return text if own else f"{text.removeprefix(f'{name}: ')} ({name}; --traceback shows where)"


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    """Say that a word is no option, with the option that was probably meant."""
    name = word.partition("=")[0]
    keys = [f"--{key}" for key in config.known_keys()]
    options = re.findall(r"--[a-z][a-z-]+", parser.format_help())
    # `--lr` for `--optim.lr` is the usual slip: a key of that name before similar spellings.
    near = [key for key in keys if name.startswith("--") and key.endswith(f".{name[2:]}")]
    near += filter(None, [nearest(name, [*options, *keys])])
    hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
    return f"unknown argument {name!r}; {hint}"


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split a command line: words for argparse; `--section.key value` (or `--engine name`) pairs,
    which it would misread; what is behind a `--`."""
    words, pairs, rest = [], [], iter(argv)
    # Until a `--` or the end, whichever comes first.
    for word in iter(lambda: next(rest, "--"), "--"):
        key, equals, _ = word.partition("=")
        if key.startswith("--") and ("." in key or key[2:] in config.VARIANTS):
            # The value may be missing here: parse_overrides says so in words.
            pairs += [word] if equals else [word, *itertools.islice(rest, 1)]
        else:
            words.append(word)
    return words, pairs, list(rest)


def _no_repeats(words: Sequence[str]) -> None:
    """Refuse an option that stands twice: argparse would take the last one in silence."""
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    twice = next((n for n in names if names.count(n) > 1 and n not in REPEATABLE), None)
    if twice is not None:
        raise UsageError(f"{twice} stands twice; leave one of them out")


def _parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error"
    )
    parser = Parser(prog="vpgea", description=__doc__, allow_abbrev=False, parents=[common])
    parser.add_argument("--version", action="version", version=f"vpgea_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    # In the order of use, which is that of `vpgea --help`.
    declared = (
        declare_train,
        declare_sweep,
        declare_rounds,
        declare_eval,
        declare_compare,
        declare_data,
        declare_export,
        declare_serve,
        declare_report,
        declare_keys,
        declare_doctor,
        declare_make_tiny,
        declare_make_smol,
        declare_make_problems,
    )
    for declare in declared:
        declare(commands, common)
    return parser

"""Words of a command line as values, paths and options; what a command says on the side."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeAlias

from vpgea_fast import config, strict_yaml

MAX_GIB = 100_000

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class UsageError(ValueError):
    """A command line that cannot be used; the message says what was got and what to do."""


class Parser(argparse.ArgumentParser):
    """Raises an error of one line, where argparse prints the usage too and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def path(word: str) -> str:
    try:
        return config.expand_home(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def config_file(word: str) -> str:
    return config.find(path(word))


def take_folders(parser: Parser, what: str) -> None:
    """Declare --from, the folders that are read in place of the Hub."""
    parser.add_argument(
        "--from",
        dest="folders",
        action="append",
        default=[],
        type=path,
        metavar="FOLDER",
        help=f"read {what} as published from here, not the Hub; may be given again",
    )


def whole(low: int, high: int) -> Callable[[str], int]:
    def read(word: str) -> int:
        # As a configuration reads it: 1e3 and 010 are no whole numbers.
        value = yaml_value(word)
        # `type`, not isinstance: true is an int to Python.
        if type(value) is int and low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(
            f"got {word!r}, expected a whole number from {low} to {high}"
        )

    return read


def share_range(word: str) -> tuple[float, float]:
    low, colon, high = word.partition(":")
    # A word without a colon has no second number, and falls through to the error.
    values = [yaml_value(part) for part in (low, high)] if colon else []
    numbers = len(values) == 2 and all(type(value) in (int, float) for value in values)
    if numbers and 0 <= values[0] <= values[1] <= 1:
        return float(values[0]), float(values[1])
    raise argparse.ArgumentTypeError(f"got {word!r}, expected LOW:HIGH within 0:1, e.g. 0.1:0.9")


def step(word: str) -> int | str:
    return word if word in ("best", "last") else whole(0, 2**31 - 1)(word)


def gib(word: str) -> float:
    # NaN compares as neither, so it is refused too.
    value = yaml_value(word)
    if type(value) in (int, float) and 0 < value <= MAX_GIB:
        return float(value)
    raise argparse.ArgumentTypeError(f"got {word!r}, expected a number above 0, up to {MAX_GIB}")


def yaml_value(word: str) -> Any:
    """Read a word as YAML; None for what is none."""
    try:
        return strict_yaml.parse_word(word)
    except strict_yaml.YamlError:
        return None


def files(words: Sequence[str]) -> str:
    """Write words of a command line as the value of eval.data."""
    files = [
        # A word that opens a mapping is YAML already; any other is a path, quoted for YAML.
        word if word.startswith("{") else json.dumps(word, ensure_ascii=False)
        for word in words
    ]
    return f"[{', '.join(files)}]"


def no_more(overrides: Sequence[str]) -> None:
    if overrides:
        raise UsageError(f"{overrides[0]} is an option of train and eval only; leave it out")


def one_process(command: str, advice: str = "") -> None:
    """Refuse a command that torchrun has started: every process would do all of the work."""
    # torchrun sets it also for one process, which changes nothing.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"vpgea {command} is one process: start it without torchrun{advice}")


_heard: set[int] = set()
"""Signals of this command: the import of an extension module may raise an interrupt anew, bare."""


@contextmanager
def termination() -> Iterator[None]:
    """Raise KeyboardInterrupt(SIGTERM) where SIGTERM would end this process without a word: until
    a run listens itself. Processes of torchrun are left to it."""

    def hear(number: int, _: FrameType | None) -> None:
        _heard.add(number)
        raise KeyboardInterrupt(number)

    # Python sets handlers in the main thread only.
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard.clear()
    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status of a process that was asked to leave: 128 + the signal."""
    # The signal is in the error where vLLM's start had it; a Ctrl-C's own has no arguments.
    terminated = signal.SIGTERM in {*_heard, *interrupt.args}
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def notice(text: str) -> None:
    """Say something on stderr, once per job: what --print-config prints is a configuration."""
    if os.environ.get("RANK", "0") == "0":
        print(f"vpgea: {text}", file=sys.stderr)


def show(text: str) -> None:
    """Print what a reader may cut short (`vpgea keys | head`): no error then."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain_logs() -> None:
    """Turn off other libraries' bars in a log file; a terminal shows how a large model loads.

    Their warnings too: what they warn of in a model (missing weights, say) is an error here.
    """
    # Imported here: `vpgea --version` must not wait for it.
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()

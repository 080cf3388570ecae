"""`vpgea`: train, eval, export, data, serve, report, keys, doctor, make-tiny. Every configuration
key is an option, `--section.key value`; `vpgea keys` explains them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from vpgea_fast import __version__, config, strict_yaml

if TYPE_CHECKING:
    from vpgea_fast.trainer import Ending

EVAL_NOTES = (
    "tokens: mean generated, thought and answer, cut ones too; a thought that was cut is wrong",
    "eps3: (accuracy in %)^2 / tokens; over several benchmarks its mean, or that of the means",
)
STATUS = {"DONE": 0, "HALTED": 3, "STOPPED": 143}
"""Of a run by its `trainer.Ending`. 143 = 128 + SIGTERM is what a scheduler expects of a preempted
job that saved."""
MAX_GIB = 100_000
REPEATABLE = ("--from", "--against")
TINY_WORLD = "data/tiny"
TINY_BASE = f"{TINY_WORLD}/base"
"""What the configuration `tiny` trains."""
INTERRUPTED = 130  # 128 + SIGINT

Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


class UsageError(ValueError):
    """A command line that cannot be used; the message says what was got and what to do."""


class _Parser(argparse.ArgumentParser):
    """One line for an error, where argparse prints the usage too and leaves the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for an error (one line on stderr), 3 for a run that had to end before
    its last step, 143 and 130 for a stopped one."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        words, overrides, passed = _split(argv)
        _no_repeats(words)
        args, unknown = _parser().parse_known_args(words)
        if unknown:
            raise UsageError(_unknown(unknown[0], args.parser))
        if passed and args.run is not _serve:
            raise UsageError(f"got {passed[0]!r} after --; only serve passes words on, to vLLM")
        args.passed = passed
        return args.run(args, overrides)
    except Exception as error:
        if "--traceback" in argv:
            raise
        print(f"vpgea: {config.printable(_one_line(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vpgea: interrupted", file=sys.stderr)
        return INTERRUPTED


def _one_line(error: BaseException) -> str:
    """The message in one line; where it is not this program's, also how to see where it arose."""
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip()) or type(error).__name__
    text = re.sub(r"\s*\n\s*", "; ", text)
    module = type(error).__module__
    own = module == __name__ or module.startswith("vpgea_fast") or type(error) is ValueError
    return text if own else f"{text} ({type(error).__name__}; --traceback shows where)"


def _path(word: str) -> str:
    try:
        return config.expand_home(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _config(word: str) -> str:
    return config.find(_path(word))


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(word: str) -> int:
        value = _yaml(word)
        if type(value) is int and low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(
            f"got {word!r}, expected a whole number from {low} to {high}"
        )

    return read


def _range(word: str) -> tuple[float, float]:
    low, colon, high = word.partition(":")
    values = [_yaml(part) for part in (low, high)] if colon else []
    numbers = len(values) == 2 and all(type(value) in (int, float) for value in values)
    if numbers and 0 <= values[0] <= values[1] <= 1:
        return float(values[0]), float(values[1])
    raise argparse.ArgumentTypeError(f"got {word!r}, expected LOW:HIGH within 0:1, e.g. 0.1:0.9")


def _step(word: str) -> int | str:
    return word if word in ("best", "last") else _whole(0, 2**31 - 1)(word)


def _gib(word: str) -> float:
    value = _yaml(word)
    if type(value) in (int, float) and 0 < value <= MAX_GIB:
        return float(value)
    raise argparse.ArgumentTypeError(f"got {word!r}, expected a number above 0, up to {MAX_GIB}")


def _yaml(word: str) -> Any:
    """None for what is no YAML."""
    try:
        return strict_yaml.parse_word(word)
    except strict_yaml.YamlError:
        return None


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    """What to say of a word that is no option, with the option that was probably meant."""
    name = word.partition("=")[0]
    keys = [f"--{key}" for key in config.known_keys()]
    options = re.findall(r"--[a-z][a-z-]+", parser.format_help())
    near = [key for key in keys if name.startswith("--") and key.endswith(f".{name[2:]}")]
    near += difflib.get_close_matches(name, [*options, *keys], n=1)
    hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
    return f"unknown argument {name!r}; {hint}"


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Words for argparse; the `--section.key value` (or `--engine name`) pairs, which it would
    misread; what is behind a `--`."""
    words, pairs, rest = [], [], iter(argv)
    for word in iter(lambda: next(rest, "--"), "--"):
        key, equals, _ = word.partition("=")
        if key.startswith("--") and ("." in key or key[2:] in config.VARIANTS):
            pairs += [word] if equals else [word, *itertools.islice(rest, 1)]
        else:
            words.append(word)
    return words, pairs, list(rest)


def _no_repeats(words: Sequence[str]) -> None:
    """UsageError for an option that stands twice: argparse takes the last one unsaid."""
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    twice = next((n for n in names if names.count(n) > 1 and n not in REPEATABLE), None)
    if twice is not None:
        raise UsageError(f"{twice} stands twice; leave one of them out")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error"
    )
    parser = _Parser(prog="vpgea", description=__doc__, allow_abbrev=False, parents=[common])
    parser.add_argument("--version", action="version", version=f"vpgea_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    declared = (
        _declare_train,
        _declare_eval,
        _declare_data,
        _declare_export,
        _declare_serve,
        _declare_report,
        _declare_keys,
        _declare_doctor,
        _declare_make_tiny,
    )
    for declare in declared:
        declare(commands, common)
    return parser


def _declare_train(commands: Commands, common: _Parser) -> None:
    train = commands.add_parser(
        "train",
        help="train from a YAML file",
        epilog="Any key of --print-config is an option, e.g. --optim.lr 1e-6 --run.dir runs/b; "
        "vpgea keys explains them.",
        allow_abbrev=False,
        parents=[common],
    )
    names = ", ".join(sorted(file.stem for file in config.SHIPPED.glob("*.yaml")))
    train.add_argument(
        "config", nargs="?", type=_config, help=f"YAML file, or one that is installed: {names}"
    )
    train.add_argument(
        "--resume",
        metavar="RUN",
        type=_path,
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
    train.add_argument(
        "--processes",
        type=_whole(1, 2**20),
        metavar="N",
        help="--dry-run for N processes, one a device",
    )
    train.add_argument(
        "--device-gib", type=_gib, metavar="G", help="--dry-run for CUDA devices of G GiB"
    )
    train.add_argument(
        "--rates",
        metavar="KEY=NUMBER,...",
        help="--dry-run with other rates than it shows, e.g. tflops=312,bandwidth=2.04",
    )
    train.set_defaults(run=_train, parser=train)


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
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
    if run is not None:
        source = Path(run) / "config.yaml"
        overrides = [*overrides, "--run.dir", run]
        if not source.is_file():
            raise UsageError(f"{run} is no run: config.yaml is missing; give a run to go on")
    cfg = config.load(source, overrides, _notice, record=run is not None)
    if args.print_config:
        _show(config.dump(cfg).rstrip("\n"))
        return 0
    if cfg.model.path == TINY_BASE and not Path(TINY_BASE).exists():
        raise UsageError(f"{TINY_BASE} is not there; make it: vpgea make-tiny {TINY_WORLD}")
    if args.dry_run:
        from vpgea_fast.check import target
        from vpgea_fast.dry_run import dry_run
        from vpgea_fast.durations import parse_rates

        on = target(cfg, processes=args.processes, device_gib=args.device_gib)
        dry_run(cfg, on=on, rates=parse_rates(args.rates or ""))
        return 0
    from vpgea_fast.trainer import fit

    _plain_logs()
    return _status(fit(cfg, resume=run is not None))


def _status(ending: Ending) -> int:
    """Under torchrun 0 for a run that was stopped or ended itself, and saved: there any other
    status is a failure, and starts the run again."""
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else STATUS[ending.name]


def _declare_eval(commands: Commands, common: _Parser) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="evaluate the student view of a model",
        epilog="Keys are options, e.g. --engine vllm --eval.samples 4 --eval.limit 100. For "
        "RUN/export the settings of its run (RUN/config.yaml) are used.",
        allow_abbrev=False,
        parents=[common],
    )
    evaluate.add_argument("model", type=_path, help="Hugging Face directory or Hub name")
    evaluate.add_argument(
        "data",
        nargs="+",
        help="files (JSONL, JSON, CSV, parquet), one a benchmark; one with keys of its own as "
        "'{path: math500.jsonl, question_key: problem}'",
    )
    evaluate.add_argument(
        "--config",
        type=_config,
        help="YAML file whose sections are used, all but model.path and eval.data",
    )
    evaluate.add_argument(
        "--out", type=_path, help="write the result and its settings as JSON here"
    )
    evaluate.set_defaults(run=_eval, parser=evaluate)


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("vpgea eval is one process: start it without torchrun, one a benchmark")
    out = None if args.out is None else Path(args.out)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: expected a file in a directory that exists")
    words = [*overrides, "--model.path", args.model, "--eval.data", _files(args.data)]
    source, cfg = _of_model(args, words, overrides)
    if out is not None and out.resolve() in {Path(f.path).resolve() for f in cfg.eval.data}:
        raise UsageError(f"--out {out}: the questions are read from it; give another file")
    # Printed before the imports: torch and transformers take seconds, a refusal must not.
    print(f"settings: {source or 'defaults and the command line'}")
    from vpgea_fast.checkpoint import write_text
    from vpgea_fast.evaluate import evaluate_model, result_table
    from vpgea_fast.metrics import Console, environment

    _plain_logs()
    console = Console()
    try:
        results = evaluate_model(cfg, console)
    finally:
        console.close()
    console.table(*result_table(results), notes=EVAL_NOTES)
    if out is not None:
        known = config.as_dict(cfg)
        sections = ["model", "data", "prompt", "rollout", "engine", "eval"]
        settings = {"settings": {name: known[name] for name in sections}}
        write_text(out, json.dumps({**results, **settings, "environment": environment()}, indent=1))
        console.message(str(out))
    return 0


def _files(words: Sequence[str]) -> str:
    """Words of a command line as the value of eval.data."""
    files = [
        word if word.startswith("{") else json.dumps(word, ensure_ascii=False) for word in words
    ]
    return f"[{', '.join(files)}]"


def _of_model(
    args: argparse.Namespace, words: list[str], overrides: list[str]
) -> tuple[str | Path | None, config.Config]:
    """The configuration of `words`, over that of --config, or of the run that a model comes from;
    and where the latter stands."""
    run = Path(args.model or "").parent / "config.yaml"
    name = Path(args.model or "").name
    exported = re.fullmatch(r"export(_step_\d+)?", name) and run.exists()
    if exported and not run.is_file():
        raise UsageError(f"{run} is no file; expected the configuration of the run, or nothing")
    source = args.config or (run if exported else None)
    if source is None:
        return None, config.resolve(config.parse_overrides(words, _notice), source="command line")
    cfg = config.load(source, words, _notice, record=source == run)
    named = any(word.startswith("--engine.server") for word in overrides)
    if source == run and isinstance(cfg.engine, config.VllmEngineConfig) and not named:
        # The run may go on at its server, with weights of its own.
        cfg = dataclasses.replace(cfg, engine=dataclasses.replace(cfg.engine, server=None))
    return source, cfg


def _declare_data(commands: Commands, common: _Parser) -> None:
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
    data.add_argument(
        "--from",
        dest="folders",
        action="append",
        default=[],
        type=_path,
        metavar="FOLDER",
        help="read its files as published from here, not the Hub; may be given again",
    )
    data.add_argument("--out", type=_path, metavar="DIR", help="default: data/NAME")
    data.add_argument(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="evaluation files besides the test split whose questions are left out of training",
    )
    data.add_argument("--overwrite", action="store_true", help="replace files that are there")
    data.add_argument("--model", type=_path, help="sample answers to each training question")
    data.add_argument(
        "--keep",
        type=_range,
        metavar="LOW:HIGH",
        help="with --model: write the training questions whose pass rate is in this range",
    )
    data.add_argument(
        "--samples",
        type=_whole(1, 2**20),
        metavar="N",
        help="with --model: answers each, default 8",
    )
    data.add_argument("--config", type=_config, help="YAML file whose sections are used")
    data.set_defaults(run=_data, parser=data)


def _data(args: argparse.Namespace, overrides: list[str]) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("vpgea data is one process: start it without torchrun")
    if args.model is None and (args.keep, args.samples) != (None, None):
        raise UsageError("--keep and --samples need --model, the model whose pass rate counts")
    words = ["--eval.data", _files(args.against), *overrides]
    if args.samples is not None:
        words += ["--eval.samples", str(args.samples)]
    elif not any(word.startswith("--eval.samples") for word in overrides):
        words += ["--eval.samples", "8"]
    if args.model is not None:
        words += ["--model.path", args.model]
    source, cfg = _of_model(args, words, overrides)
    if args.model is not None:
        print(f"settings: {source or 'defaults and the command line'}")
    from vpgea_fast.metrics import Console
    from vpgea_fast.prepare import Order, prepare

    if not cfg.eval.samples:
        raise UsageError("eval.samples: got 0; a pass rate needs one sample or more")
    order = Order(
        name=args.name,
        out=Path(args.out or Path("data") / args.name),
        folders=tuple(map(Path, args.folders)),
        overwrite=args.overwrite,
        measure=args.model is not None,
        keep=args.keep,
    )
    _plain_logs()
    # `datasets` draws a bar per file and map; in a log each redraw is a line.
    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
    console = Console()
    try:
        prepare(order, cfg, console)
    finally:
        console.close()
    return 0


def _declare_export(commands: Commands, common: _Parser) -> None:
    export = commands.add_parser(
        "export",
        help="write the model of a checkpoint as a Hugging Face directory",
        allow_abbrev=False,
        parents=[common],
    )
    export.add_argument("run_dir", metavar="RUN", type=_path)
    export.add_argument(
        "--step",
        metavar="N|best|last",
        type=_step,
        default="last",
        help="which checkpoint; best is by checkpoint.keep_best; default last",
    )
    export.add_argument("--out", type=_path, help="directory to make; default RUN/export_step_N")
    export.set_defaults(run=_export, parser=export)


def _export(args: argparse.Namespace, overrides: list[str]) -> int:
    _no_more(overrides)
    from vpgea_fast.run_dir import export_step

    _plain_logs()
    print(export_step(args.run_dir, args.step, args.out))
    return 0


def _declare_serve(commands: Commands, common: _Parser) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model to training runs (vLLM), with engine.server as their URL",
        epilog="Keys are options, e.g. --engine.gpu_memory 0.9 --model.dtype bfloat16; words "
        "behind a -- go to vLLM, e.g. -- --data-parallel-size 8. The key is read from "
        "VLLM_API_KEY; beyond this machine there must be one.",
        allow_abbrev=False,
        parents=[common],
    )
    serve.add_argument("model", type=_path, help="Hugging Face directory or Hub name")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=_whole(1, 65535), default=8000)
    serve.add_argument("--print", action="store_true", help="print the command and stop")
    serve.set_defaults(run=_serve, parser=serve)


def _serve(args: argparse.Namespace, overrides: list[str]) -> int:
    words = [*overrides, "--model.path", args.model, "--engine", "vllm"]
    cfg = config.resolve(config.parse_overrides(words, _notice), source="command line")
    from vpgea_fast.model_dir import check_model_dir
    from vpgea_fast.rollout.vllm.client import check_key
    from vpgea_fast.rollout.vllm.serve import serve, serve_command
    from vpgea_fast.rollout.vllm.versions import check_installed

    check_key(args.host)
    command, environment = serve_command(cfg, args.host, args.port, args.passed)
    if args.print:
        print(shlex.join([*(f"{key}={value}" for key, value in environment.items()), *command]))
        return 0
    check_model_dir(args.model)
    check_installed()
    return serve(command, environment, args.host, args.port)


def _declare_report(commands: Commands, common: _Parser) -> None:
    report = commands.add_parser(
        "report", help="draw a run directory", allow_abbrev=False, parents=[common]
    )
    report.add_argument("run_dir", metavar="RUN", type=_path)
    report.set_defaults(run=_report, parser=report)


def _report(args: argparse.Namespace, overrides: list[str]) -> int:
    _no_more(overrides)
    from vpgea_fast.metrics import Console
    from vpgea_fast.report import closing_notes, closing_table, write_report

    run_dir, console = Path(args.run_dir), Console()
    page = write_report(run_dir)
    headers, rows = closing_table(run_dir)
    console.close()
    if rows:
        console.table(headers, rows, notes=closing_notes(run_dir))
    console.message(str(page))
    return 0


def _declare_keys(commands: Commands, common: _Parser) -> None:
    keys = commands.add_parser(
        "keys",
        help="explain every configuration key, or every metric",
        epilog="A section is the part of a key before the dot, e.g. vpgea keys optim.",
        allow_abbrev=False,
        parents=[common],
    )
    keys.add_argument("section", nargs="?", metavar="SECTION", help="default: all of them")
    keys.add_argument("--metrics", action="store_true", help="what a run writes, in its place")
    keys.set_defaults(run=_keys, parser=keys)


def _keys(args: argparse.Namespace, overrides: list[str]) -> int:
    _no_more(overrides)
    from vpgea_fast import manual

    if args.metrics and args.section is not None:
        raise UsageError(f"keys: got {args.section!r} and --metrics; give one of the two")
    if args.metrics:
        _show(manual.metrics_text())
    else:
        parts = manual.sections() if args.section is None else manual.section(args.section)
        _show(manual.keys_text(parts))
    return 0


def _show(text: str) -> None:
    """Print what a reader may cut short (`vpgea keys | head`): no error then."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _declare_doctor(commands: Commands, common: _Parser) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what runs on this machine, and why the rest does not",
        allow_abbrev=False,
        parents=[common],
    )
    doctor.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default auto")
    doctor.set_defaults(run=_doctor, parser=doctor)


def _doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    _no_more(overrides)
    from vpgea_fast.doctor import examine

    for found in examine(args.device):
        print(f"{found.part:<16}{found.name:<13}{'' if found.runs else 'no: '}{found.detail}")
    return 0


def _declare_make_tiny(commands: Commands, common: _Parser) -> None:
    tiny = commands.add_parser(
        "make-tiny",
        help="make the tiny model and its questions",
        allow_abbrev=False,
        parents=[common],
    )
    tiny.add_argument("out", type=_path, help="directory to make")
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
    tiny.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0)
    tiny.set_defaults(run=_make_tiny, parser=tiny)


def _make_tiny(args: argparse.Namespace, overrides: list[str]) -> int:
    _no_more(overrides)
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
    """No bars of other libraries in a log file; on a terminal a large model shows its loading.

    Nor their warnings: what they warn of in a model (missing weights, say) is an error here.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _notice(text: str) -> None:
    """On stderr, once: what --print-config prints is a configuration."""
    if os.environ.get("RANK", "0") == "0":
        print(f"vpgea: {text}", file=sys.stderr)


def _no_more(overrides: Sequence[str]) -> None:
    if overrides:
        raise UsageError(f"{overrides[0]} is an option of train and eval only; leave it out")


if __name__ == "__main__":
    sys.exit(main())

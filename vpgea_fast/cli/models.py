"""Commands on a model: `vpgea eval`, `export` and `serve`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpgea_fast import config
from vpgea_fast.cli.processes import run_processes, silent_if_lost
from vpgea_fast.cli.words import (
    Commands,
    Parser,
    UsageError,
    config_file,
    files,
    no_more,
    notice,
    one_process,
    path,
    plain_logs,
    status_of,
    step,
    take_folders,
    whole,
)

if TYPE_CHECKING:
    from vpgea_fast.distributed import World
    from vpgea_fast.metrics import Console

PATIENCE_MINUTES = 7 * 24 * 60.0
EVAL_NOTES = (
    "tokens: mean generated, thought and answer, cut ones too; a thought that was cut is wrong",
    "eps3: (accuracy in %)^2 / tokens; over several benchmarks its mean, or that of the means",
)


def declare_eval(commands: Commands, common: Parser) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="evaluate the student view of a model",
        epilog="Keys are options, e.g. --engine vllm --eval.samples 4 --eval.limit 100. For "
        "RUN/export the settings of its run (RUN/config.yaml) are used.",
        allow_abbrev=False,
        parents=[common],
    )
    evaluate.add_argument("model", type=path, help="Hugging Face directory or Hub name")
    evaluate.add_argument(
        # None where a suite names its own.
        "data",
        nargs="*",
        help="files of any format that data.train takes, one per benchmark; one with keys of its "
        "own as '{path: math500.jsonl, question_key: problem}'",
    )
    evaluate.add_argument(
        "--suite",
        metavar="paper|vr|quick",
        help="the benchmarks of the papers, by their protocol; or some of them: gsm8k,math500,"
        "aime24,aime25,gpqa_diamond,mmlu_pro,amc23,olympiadbench",
    )
    take_folders(evaluate, "the suite's files")
    evaluate.add_argument(
        "--config",
        type=config_file,
        help="YAML file whose sections are used, all but model.path and eval.data",
    )
    evaluate.add_argument(
        "--out",
        type=path,
        help="folder for the records: each answer as it ends (samples.jsonl, times.jsonl), what "
        "decides them (eval.json), and at the end the table (result.json)",
    )
    evaluate.add_argument(
        "--resume", action="store_true", help="go on with the records of --out, if there are any"
    )
    evaluate.add_argument(
        "--processes",
        type=whole(1, 1024),
        metavar="N",
        help="share the answers between N processes of this machine, one per GPU; needs --out",
    )
    evaluate.set_defaults(run=run_eval, parser=evaluate)


def run_eval(args: argparse.Namespace, overrides: list[str]) -> int:
    try:
        return _eval(args, overrides)
    except KeyboardInterrupt as interrupt:
        notice(f"stopped; {_how_to_go_on(args)}")
        return status_of(interrupt)


def _how_to_go_on(args: argparse.Namespace) -> str:
    """Say what a stopped evaluation keeps, and how it goes on."""
    if args.out is None:
        return "without --out no answer is kept; give it, and --resume goes on"
    # The header is there before the first answer; `records` has its name, and seconds of imports.
    if not (Path(args.out) / "eval.json").is_file():
        return "no answer was drawn yet: the same command begins again"
    return f"the answers so far are kept in {args.out}: the same command goes on with --resume"


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    from vpgea_fast.evaluation.folder import check_free

    if args.out is None:
        one_process("eval", ", or give --out, where processes join their records")
        alone = next((o for o in ("resume", "processes") if getattr(args, o)), None)
        if alone is not None:
            raise UsageError(f"--{alone} goes on or shares what --out holds; give it, too")
    # Each process of torchrun sees what another may have begun by now: only the first looks.
    elif os.environ.get("RANK", "0") == "0":
        check_free(Path(args.out), resume=args.resume)
    data, protocol = _asked(args, overrides)
    # The positional words come last: they win over an override of the same key, which is told.
    words = [*protocol, *overrides, "--model.path", args.model, "--eval.data", files(data)]
    source, cfg = of_model(args, words, overrides)
    if (args.processes or 1) > 1:
        words = _without_processes(args.words)
        return run_processes(words, args.processes, lambda: _how_to_go_on(args))
    # Before the other imports: transformers takes seconds, a refusal must not.
    from vpgea_fast.data import check_first_rows

    if os.environ.get("RANK", "0") == "0":
        print(settings_line(args.model, source), flush=True)
        check_first_rows(cfg.eval.data, cfg.data)
    return silent_if_lost(lambda: _evaluate(args, cfg))


def _asked(args: argparse.Namespace, overrides: list[str]) -> tuple[list[str], list[str]]:
    """The words of eval.data, a suite's first, and those of its protocol."""
    if args.suite is None:
        if args.folders:
            raise UsageError("--from is where a suite's files lie; give --suite, too")
        if not args.data:
            raise UsageError("expected files of questions, or --suite; see vpgea eval --help")
        return args.data, []
    from vpgea_fast.evaluation.suites import PROTOCOL, suite_files

    # What the command line gives wins, and each key stands once.
    given = {word.partition("=")[0].removeprefix("--") for word in overrides}
    entries, lacking = suite_files(args.suite, [*map(Path, args.folders)], given)
    for line in lacking:
        notice(f"--suite {args.suite}: {line}")
    rows = [{k: v for k, v in vars(entry).items() if v is not None} for entry in entries]
    # A limit of the answer's own is none that it shares.
    given |= {"eval.joint_limit"} if "rollout.max_answer_tokens" in given else set()
    protocol = [[f"--{key}", value] for key, value in PROTOCOL.items() if key not in given]
    return [*map(json.dumps, rows), *args.data], [word for pair in protocol for word in pair]


def _evaluate(args: argparse.Namespace, cfg: config.Config) -> int:
    from vpgea_fast.checkpoint import write_text
    from vpgea_fast.evaluate import Record, evaluate_model, result_table
    from vpgea_fast.evaluation.compare import plain
    from vpgea_fast.evaluation.folder import RESULT
    from vpgea_fast.metrics import Console, environment

    plain_logs()
    world = _world(cfg)
    record = None
    if args.out is not None:
        record = Record(Path(args.out), resume=args.resume, command=args.words, world=world)
    # Closed also after an error: a bar left behind would hide its line on a terminal.
    console = Console(silent=not world.main)
    try:
        results = evaluate_model(cfg, console, record)
    finally:
        console.close()
    lost = sum(result["errors"] for result in results.values())
    notes = [f"{lost} answers are wrong because the engine gave them up"] * bool(lost)
    console.table(*result_table(results), notes=[*EVAL_NOTES, *notes])
    if args.out is not None and world.main:
        details = _details(Path(args.out), console)
        # Only what an evaluation reads: the rest would look like a part of the result.
        known = config.as_dict(cfg)
        sections = ["model", "data", "prompt", "rollout", "engine", "eval"]
        settings = {name: known[name] for name in sections}
        told = {"details": details, "settings": settings, "environment": environment()}
        out = Path(args.out) / RESULT
        write_text(out, json.dumps(plain({**results, **told}), indent=1, allow_nan=False))
        console.message(str(out))
    world.close()
    return 0


def _details(folder: Path, console: Console) -> dict[str, Any]:
    """Show what the records of a folder tell beyond the closing table, and return it by mode."""
    from vpgea_fast.evaluation import compare, tables

    evaluation = compare.open_evaluation("", folder, common=False, note=console.message)
    # One evaluation against nothing: its own intervals, votes and pass@k.
    found = {
        mode: compare.compare([dataclasses.replace(evaluation, name=mode)], mode=mode)
        for mode in evaluation.answers
    }
    grids = [tables.draws(comparison) for comparison in found.values()]
    rows = [row for grid in grids for row in grid.rows]
    console.table(["answers", *grids[0].headers[1:]], rows, notes=grids[0].notes)
    return {
        mode: {key: comparison["rows"][0][key] for key in ("benchmarks", "mean")}
        for mode, comparison in found.items()
    }


def _world(cfg: config.Config) -> World:
    """The processes that torchrun or --processes has started, each with a whole model."""
    from vpgea_fast.distributed import World, open_world, pick_device

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(pick_device(cfg.model.device))
    if cfg.engine.name == "vllm" and cfg.processes_per_engine > 1:
        raise UsageError(
            f"engine.tensor_parallel: got {cfg.vllm.tensor_parallel} in several processes, each "
            "with an engine of its own; set 1, or serve the model with `vpgea serve`"
        )
    # Processes end hours apart, and the first waits for the last.
    return open_world(config.ParallelConfig(timeout_minutes=PATIENCE_MINUTES), cfg.model.device)


def _without_processes(words: Sequence[str]) -> list[str]:
    words = list(words)
    # Left in, each child would start as many again. `--processes 2` is two words, with `=` one.
    at = next(i for i, word in enumerate(words) if word.startswith("--processes"))
    del words[at : at + (1 if "=" in words[at] else 2)]
    return words


def settings_line(model: str, source: str | Path | None) -> str:
    """Say where the settings come from, and where an export lacks the settings of its run."""
    run = Path(model).parent
    # Metrics beside it tell that a run made the model.
    lost = source is None and (run / "metrics.jsonl").exists()
    gone = f" ({run / 'config.yaml'} is missing)" if lost else ""
    return f"settings: {source or 'defaults and the command line'}{gone}"


def of_model(
    args: argparse.Namespace, words: list[str], overrides: list[str]
) -> tuple[str | Path | None, config.Config]:
    """Read the configuration of `words` over that of --config, or of the run that a model comes
    from; return the file below (None: there is none) and the configuration."""
    words = ["--checkpoint.keep_best", "null", *words]  # nothing is trained, so no best is kept
    # RUN/export and RUN/export_step_N are what a run and `vpgea export` write.
    run = Path(args.model or "").parent / "config.yaml"
    name = Path(args.model or "").name
    exported = re.fullmatch(r"export(_posterior)?(_step_\d+)?", name) and run.exists()
    if exported and not run.is_file():
        raise UsageError(f"{run} is no file; expected the configuration of the run, or nothing")
    source = args.config or (run if exported else None)
    # `record`: a run's own file may have keys of an older version, a user's file not.
    if source is None:
        return None, config.resolve(config.parse_overrides(words, notice), source="command line")
    cfg = config.load(source, words, notice, record=source == run)
    named = any(word.startswith("--engine.server") for word in overrides)
    if source == run and isinstance(cfg.engine, config.VllmEngineConfig) and not named:
        # The run may go on at its server, with weights of its own.
        cfg = dataclasses.replace(cfg, engine=dataclasses.replace(cfg.engine, server=None))
    # No recorded path is of an evaluation, and the files may be gone.
    if cfg.engine.name == "replay":
        cfg = dataclasses.replace(cfg, engine=config.HfEngineConfig())
    return source, cfg


def declare_export(commands: Commands, common: Parser) -> None:
    export = commands.add_parser(
        "export",
        help="write the model of a checkpoint as a Hugging Face directory",
        allow_abbrev=False,
        parents=[common],
    )
    export.add_argument("run_dir", metavar="RUN", type=path)
    export.add_argument(
        "--step",
        metavar="N|best|last",
        type=step,
        default="last",
        help="which checkpoint; best is by checkpoint.keep_best; default last",
    )
    export.add_argument(
        "--who",
        choices=["policy", "posterior"],
        default="policy",
        help="whose weights, of a run with a posterior policy of its own; default policy",
    )
    export.add_argument("--out", type=path, help="directory to make; default RUN/export_step_N")
    export.set_defaults(run=run_export, parser=export)


def run_export(args: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    from vpgea_fast.run_dir import export_step

    plain_logs()
    print(export_step(args.run_dir, args.step, args.out, who=args.who))
    return 0


def declare_serve(commands: Commands, common: Parser) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model to training runs (vLLM), with engine.server as their URL",
        epilog="Keys are options, e.g. --engine.gpu_memory 0.9 --model.dtype bfloat16; words "
        "behind a -- go to vLLM, e.g. -- --data-parallel-size 8. The key is read from "
        "VLLM_API_KEY; beyond this machine there must be one.",
        allow_abbrev=False,
        parents=[common],
    )
    serve.add_argument("model", type=path, help="Hugging Face directory or Hub name")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=whole(1, 65535), default=8000)
    serve.add_argument("--print", action="store_true", help="print the command and stop")
    serve.set_defaults(run=run_serve, parser=serve)


def run_serve(args: argparse.Namespace, overrides: list[str]) -> int:
    # The engine stands last: a server is vLLM whatever was given.
    words = [*overrides, "--model.path", args.model, "--engine", "vllm"]
    cfg = config.resolve(config.parse_overrides(words, notice), source="command line")
    from vpgea_fast.model_dir import check_model_dir
    from vpgea_fast.rollout.vllm.client import check_key
    from vpgea_fast.rollout.vllm.serve import serve, serve_command
    from vpgea_fast.rollout.vllm.versions import check_installed

    # A host that others reach without a key is refused even by --print.
    check_key(args.host)
    command, environment = serve_command(cfg, args.host, args.port, args.passed)
    if args.print:
        print(shlex.join([*(f"{key}={value}" for key, value in environment.items()), *command]))
        return 0
    # Before vLLM starts, whose own error for a wrong directory comes after its imports.
    check_model_dir(args.model)
    check_installed()
    return serve(command, environment, args.host, args.port)

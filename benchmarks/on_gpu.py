"""All that waits for a GPU, in parts of under ten minutes, the most valuable first.

    python benchmarks/on_gpu.py --out benchmarks/results/on_gpu.json [--minutes 13] [--only dense]
    python benchmarks/on_gpu.py wheels DIR     # where there is a network: what a bare machine lacks

The parts train* are of the training engine, about 18 minutes; `one_gpu`, 5 minutes, compares what
one GPU may keep; `step` and `scale`, 8 minutes, are of whole steps; `vllm`, 7 minutes, needs vLLM;
the others, 19 minutes, are of the kernels. What trains a 7B model takes another shape on a card
below 100 GB. It runs from any directory, with or without .git: beside the commit stands a digest of
the source files, which is the same in a checkout of that commit.

A part is a few commands; their exit status, time, last lines and JSON go into the file after every
part, with device, commit and versions, so that a run that is cut short loses the part it was in. A
part that the minutes left cannot hold is not begun: the file says so, and a later run with the same
--out goes on with what is missing (--again: and with what failed). A part has failed when a command
fails, when it is stopped for time (what it had stays in the file), or when a JSON that it should
have written is missing or empty. It does not stop the others; the exit status tells. `--list`
prints the parts, their commands, what they are expected to take and when they are stopped.

At the end it prints a table: what was expected, with its interval, what was measured, and the aims
of the project (gpu_aims.py).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bare_machine
import torch
from gpu_aims import aims, table

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 570
STOPPED = 124
TAIL = 4000
BENCH = "{python} benchmarks/kernel_bench.py --shape qwen2.5-7b --check-rows 2048 --warmup 2"
FORWARD = (
    "--sweep 16384 --providers triton cublas torch torch.compile 'eager torch' 'Liger FLSCE' "
    "'TRL chunked' 'CCE exact'"
)
STREAMS = (
    "--sweep 16384 --providers triton cublas 'cublas bf16' torch 'eager torch' 'Liger FLSCE' "
    "'Liger GRPO' 'TRL chunked'"
)
REPORT = "--target-processes all --error-exitcode 9"
SMALL_CARD = 100e9
"""Bytes below which a 7B model does not train in float32 with moments in bfloat16 (98 GiB)."""
SMALLER = "--layers 18 --master-dtype bfloat16 --accumulate unsharded"
DEVICE = "tests/test_kernels_interpret.py"
TRL = ("trl", "accelerate", "datasets")
ABSENT = {
    "sanitizer": "no compute-sanitizer on PATH, in CUDA or a wheel",
    "trl": f"needs {', '.join(TRL)}",
}
"""Placeholder -> why a part without any other command is skipped."""
SHARDS = ("float32", "bfloat16", "float16", "others", "cublas")
"""Of tests/test_kernels_interpret.py: a kernel compiles in seconds, and there are hundreds."""
SMALL = (
    "test_values and (pointers or tail) and dtype1 or gradients_of_logp and dtype1 and not None "
    "or out_of_range and dtype1 and 1.0"
)
HEADS = f'-m "" -k "{SMALL}" tests/interpreted/linear_logprob.py'
GROUP = '-m "" -k "not compiles and not interpreter" tests/test_group_kernels.py'
WORLD = (
    "--model.path {scratch}/world/base --data.train {scratch}/world/train.jsonl "
    "--eval.data [{scratch}/world/test.jsonl]"
)


@dataclass(frozen=True)
class Part:
    """Commands of one question. seconds: what they should take, compiling included.

    {python}: this interpreter; {scratch}: a folder, from which every JSON named here is read;
    {fits}: of `fits` the words for a card below 100 GB, or for a larger one. A command with
    {sanitizer}, {tests}, {heads}, {flash} or {trl} is left out where there is no compute-sanitizer,
    no test file that can run, no flash-attn, or no TRL. together: the commands run side by side
    (compiling is what takes their time, not the device).
    """

    name: str
    seconds: int
    commands: tuple[str, ...]
    results: tuple[str, ...] = ()
    together: bool = False
    fits: tuple[str, str] = ("", "")

    @property
    def limit_s(self) -> int:
        """When it is stopped: at twice what it should take, and always below ten minutes."""
        return min(LIMIT_S, max(120, 2 * self.seconds))


def bench(name: str, words: str) -> str:
    return f"{BENCH} {words} --out {{scratch}}/{name}.json"


def train_bench(name: str, words: str) -> str:
    return f"{{python}} benchmarks/train_bench.py --out {{scratch}}/{name}.json {words}"


PYTEST = "{python} -m pytest -q -p no:cacheprovider"
TRAIN = "{python} -m vpgea_fast.cli train configs/tiny.yaml --train.steps 20 --model.device cuda"
RUN = (
    "{python} -m vpgea_fast.cli train configs/7b-1gpu.yaml --parallel.cpu_offload {fits} "
    "--model.path {scratch}/model --data.train {scratch}/world/train.jsonl "
    "--data.question_key question --rollout.max_new_tokens 1024 --objective.preset paper "
    "--metrics.diag_every 0 --checkpoint.export false "
    # No vLLM on a bare machine, no network for eval.data; random weights answer nothing right.
    "--engine hf --rollout.max_batch 64 --rollout.full_answer false --objective.verify none "
    "--eval.data [] --checkpoint.keep_best null"
)
ATTENTION = {"flash": "{flash}", "varlen": "varlen", "sdpa": "sdpa"}
ONE = (
    "--model qwen2.5-7b --optimizer adamw_bf16 --master-dtype bfloat16 --accumulate unsharded "
    "{fits}"
)
ONE_GPU = {"resident": "", "offload": "--offload", "selective": "--checkpointing selective"}
"""The states of one GPU: all on it; moments in host memory; and more kept for the backward."""
SEVEN = "--model qwen2.5-7b --optimizer adamw_bf16 {fits}"
PARTS = (
    Part(
        "sweep",
        130,
        ("{python} benchmarks/tile_sweep.py --out {scratch}/tile_sweep.json",),
        ("tile_sweep",),
    ),
    Part(
        "dense",
        200,
        (
            bench("weighted", "--op weighted --modes full --sweep 4096 --repeats 8"),
            bench("logprob", f"--op linear_logprob --modes forward --repeats 8 {FORWARD}"),
        ),
        ("weighted", "logprob"),
    ),
    Part(
        "train",
        200,
        (
            train_bench(
                "train_7b",
                f"{SEVEN} --variants gated padded --profile {{scratch}}/train_7b_trace.json",
            ),
        ),
        ("train_7b",),
        fits=(SMALLER, ""),
    ),
    Part(
        "tests",
        200,
        (
            f"{PYTEST} -m gpu --timeout 500 {{tests}}",
            *(f"{PYTEST} -m gpu {{heads}} -k {shard}" for shard in SHARDS),
        ),
        together=True,
    ),
    Part(
        "two_stream",
        100,
        (bench("two_stream", f"--op two_stream --gates 1 0.5 --repeats 6 {STREAMS}"),),
        ("two_stream",),
    ),
    Part(
        "group",
        30,
        (bench("group", "--op group_advantage gated_kl --repeats 50"),),
        ("group",),
    ),
    Part(
        "kernels",
        280,
        (
            (
                "{python} benchmarks/kernel_bench.py --repeats 5 --warmup 1 "
                "--profile {scratch}/kernel_trace.json --out {scratch}/kernel_bench.json"
            ),
        ),
        ("kernel_bench",),
    ),
    Part(
        "step",
        280,
        (
            (
                "{trl}{python} benchmarks/step_bench.py --model qwen2.5-1.5b --mean 128 "
                "--repeats 3 --out {scratch}/step_1.5b.json"
            ),
        ),
        ("step_1.5b",),
    ),
    Part(
        "scale",
        200,
        ("{python} benchmarks/scale_bench.py --out {scratch}/scale.json -- --model.device cuda",),
        ("scale",),
    ),
    Part(
        "sanitizer",
        120,
        tuple(
            f"{{sanitizer}} --tool {tool} {REPORT} {PYTEST} {words}"
            for tool in ("memcheck", "racecheck")
            for words in (HEADS, GROUP)
        ),
        together=True,
    ),
    Part(
        "tiny",
        60,
        (
            "{python} -m vpgea_fast.cli make-tiny {scratch}/world",
            f"{TRAIN} --loss.backend triton {WORLD} --run.dir {{scratch}}/tiny",
        ),
    ),
    Part(
        "one_gpu",
        300,
        tuple(
            train_bench(
                f"one_gpu_{name}", f"{ONE} {words} --variants gated --repeats 2 --check-rows 4"
            )
            for name, words in ONE_GPU.items()
        ),
        tuple(f"one_gpu_{name}" for name in ONE_GPU),
        fits=("--layers 12", ""),
    ),
    Part(
        "train_rest",
        280,
        (
            train_bench(
                "train_7b_rest", f"{SEVEN} --variants gated ungated 'padded sorted' TRL --repeats 2"
            ),
        ),
        ("train_7b_rest",),
        fits=(SMALLER, ""),
    ),
    Part(
        "train_run",
        270,
        (
            "{python} -m vpgea_fast.cli make-tiny {scratch}/world",
            "{python} benchmarks/random_model.py qwen2.5-7b {scratch}/model",
            f"{RUN} --run.dir {{scratch}}/run_7b --train.steps 3",
            "rm -r {scratch}/model {scratch}/run_7b/checkpoints",  # 57 GiB
            "{python} benchmarks/random_model.py qwen2.5-1.5b {scratch}/model",
            f"{RUN} --run.dir {{scratch}}/run_1.5b --train.steps 2 --parallel.cpu_offload true",
            "{python} -m vpgea_fast.cli train --resume {scratch}/run_1.5b --train.steps 3",
        ),
        fits=("true", "false"),
    ),
    Part(
        "train_long",
        200,
        (
            train_bench(
                "train_7b_32k",
                f"{SEVEN} --rows 24 --mean-length 8192 --budget 32768 --variants gated padded "
                "--repeats 2",
            ),
        ),
        ("train_7b_32k",),
        fits=(SMALLER, ""),
    ),
    Part(
        "train_attention",
        150,
        tuple(
            train_bench(
                f"train_1.5b_{name}",
                f"--model qwen2.5-1.5b --attention {words} --variants gated --repeats 2",
            )
            for name, words in ATTENTION.items()
        ),
        tuple(f"train_1.5b_{name}" for name in ATTENTION),
    ),
    Part(
        "vllm",
        400,
        (
            f'{PYTEST} -m "vllm and gpu" tests',
            "{python} benchmarks/random_model.py qwen2.5-1.5b {scratch}/model",
            (
                "{python} benchmarks/rollout_bench.py --model {scratch}/model --dtype bfloat16 "
                "--questions 32 --tokens 1024 --engines hf vllm --out {scratch}/rollout.json"
            ),
        ),
        ("rollout",),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["wheels"]:
        return wheels(words[1:])
    args = arguments(words)
    chosen = [part for part in PARTS if part.name in args.only]
    if args.list:
        show(chosen)
        return 0
    if not torch.cuda.is_available():
        print("on_gpu: no CUDA device here; this program measures nothing without one")
        return 2
    if absent := bare_machine.missing():
        print(f"on_gpu: {bare_machine.advice(absent)}", flush=True)
    if "rich" in absent:
        print("on_gpu: every part needs rich: nothing is run")
        return 2
    scratch, out = args.scratch.resolve(), args.out.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(out.read_text(encoding="utf-8"))["parts"] if out.exists() else {}
    sources = tree()
    open_ones = (None, "no time", *(["failed"] if args.again else []))
    end = time.monotonic() + 60 * args.minutes
    for part in chosen:
        if done.get(part.name, {}).get("status") in open_ones:
            done[part.name] = {**run(part, scratch, end - time.monotonic()), "tree": sources}
            write(out, done, args.commit, sources)
    print(*table(aims(done, place()["device"])), sep="\n")
    for name, result in done.items():
        print(f"on_gpu: {name}: {result['status']}  {result.get('reason', '')}".rstrip())
    left = [part.name for part in chosen if done[part.name]["status"] == "no time"]
    if left:
        print(f"on_gpu: no time for {' '.join(left)}: run again with the same --out")
    return int(any(result["status"] == "failed" for result in done.values()))


def arguments(words: Sequence[str]) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        epilog="on_gpu.py wheels DIR: download what a bare machine lacks, for pip --find-links DIR",
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--again", action="store_true", help="run parts that failed once more")
    parser.add_argument("--minutes", type=float, default=13.0, help="of device time, all in all")
    parser.add_argument("--commit", nargs="?", help="where there is no .git; may be empty")
    parser.add_argument("--scratch", type=Path, default=Path("runs/on_gpu"))
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu.json"))
    parser.add_argument("--list", action="store_true", help="print the parts and run nothing")
    return parser.parse_args(words)


def wheels(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="on_gpu.py wheels")
    parser.add_argument("folder", type=Path, help="made if need be")
    return bare_machine.download(parser.parse_args(words).folder.resolve())


def show(parts: Sequence[Part]) -> None:
    for part in parts:
        together = ", side by side" if part.together else ""
        print(f"{part.name}: about {part.seconds} s, stopped at {part.limit_s} s{together}")
        print("".join(f"    {command}\n" for command in part.commands), end="")
        if any(part.fits):
            small, large = (words or "nothing" for words in part.fits)
            print(f"    {{fits}} below 100 GB: {small}; else {large}")


def write(path: Path, done: dict[str, Any], commit: str | None, sources: str) -> None:
    here = place()
    here["commit"] = here["commit"] or commit or "unknown"
    here["tree"] = sources
    states = {name: result["status"] for name, result in done.items()}
    result = {**here, "status": states, "aims": aims(done, here["device"]), "parts": done}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def place() -> dict[str, Any]:
    from vpgea_fast.metrics import environment  # not before what is missing was told

    return environment()


def tree() -> str:
    """SHA-256 of the names and bytes of all source files: what a copy without .git was made of."""
    found = hashlib.sha256()
    folders = ("vpgea_fast", "kernels", "benchmarks", "tests", "configs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [ROOT / name for name in ("setup.py", "pyproject.toml", "constraints.txt")]
    for path in sorted(files):
        if path.suffix in (".py", ".yaml", ".toml", ".txt") and path.is_file():
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def run(part: Part, scratch: Path, left: float) -> dict[str, Any]:
    """One part, or why not: `status` is ok, failed, skipped (a tool is missing) or no time."""
    if left < part.seconds:
        return {"status": "no time", "reason": f"{left:.0f} s left, about {part.seconds} s needed"}
    places, told = places_of(part, scratch)
    lines = [command.format(**places) for command in part.commands if possible(command, places)]
    if not lines:
        status = "failed" if told else "skipped"
        absent = {field for command in part.commands for field in fields_of(command)}
        why = [reason for field, reason in ABSENT.items() if field in absent]
        return {"status": status, "reason": "no test file can run" if told else why[0], **told}
    print(f"on_gpu: {part.name}\n" + "\n".join(f"  {line}" for line in lines), flush=True)
    for file, why in told.get("left_out", {}).items():
        print(f"  left out: {file} {why}", flush=True)
    for name in part.results:  # of an earlier run
        (scratch / f"{name}.json").unlink(missing_ok=True)
    start = time.monotonic()
    commands = execute(part, lines, scratch, start + min(part.limit_s, left))
    wall = round(time.monotonic() - start, 1)
    not_run = [command for command in part.commands if not possible(command, places)]
    results = {name: read(scratch / f"{name}.json") for name in part.results}
    wrong = [f"exit status {c['exit']} of: {c['command']}" for c in commands if c["exit"]]
    wrong += [
        f"no result in {name}.json"
        for name, result in results.items()
        if result is None and not any(f"/{name}.json" in command for command in not_run)
    ]
    if any(command["exit"] == STOPPED for command in commands):
        wrong.insert(0, f"stopped after {wall:.0f} s")
    verdict = {"status": "failed", "reason": "; ".join(wrong)} if wrong else {"status": "ok"}
    return {**verdict, "wall_s": wall, "commands": commands, "results": results, **told}


def execute(part: Part, lines: Sequence[str], scratch: Path, end: float) -> list[dict[str, Any]]:
    commands: list[dict[str, Any]] = []
    batches = [lines] if part.together else [[line] for line in lines]
    for batch in batches:
        processes = [begin(line, scratch / f"{part.name}_{i}.log") for i, line in enumerate(batch)]
        for line, process, log in processes:
            code = wait(process, end - time.monotonic())
            text = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
            print(text, flush=True)
            commands.append({"command": line, "exit": code, "tail": text})
    return commands


def places_of(part: Part, scratch: Path) -> tuple[dict[str, str | None], dict[str, Any]]:
    """Placeholder -> words, None where there is nothing; and the tests that are left out, if any
    command of the part asks for tests."""
    flash = any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface")))
    found: dict[str, str | None] = {
        "python": shlex.quote(sys.executable),
        "scratch": shlex.quote(str(scratch)),
        "sanitizer": sanitizer(),
        "fits": part.fits[not small_card()],
        "flash": "flash" if flash else None,
        "trl": "" if all(map(importlib.util.find_spec, TRL)) else None,
    }
    if not any("{tests}" in command for command in part.commands):
        return found, {}
    device, heads = ROOT / DEVICE, ROOT / "tests/interpreted/linear_logprob.py"
    files = [f for f in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in f.read_text()]
    good, left_out = bare_machine.runnable([*files, heads], bare_machine.missing())
    kernels = device in good and heads in good  # the first runs the second
    names = [f.relative_to(ROOT).as_posix() for f in good if f not in (device, heads)]
    found |= {"tests": " ".join(names) or None, "heads": DEVICE if kernels else None}
    return found, {"left_out": left_out}


def possible(command: str, places: Mapping[str, str | None]) -> bool:
    return all(places[field] is not None for field in fields_of(command))


def fields_of(command: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(command) if field}


def small_card() -> bool:
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_properties(0).total_memory < SMALL_CARD


def begin(line: str, log: Path) -> tuple[str, subprocess.Popen[bytes], Path]:
    """A process of its own group: pytest starts others, which must not outlive it on the device."""
    places = (str(ROOT), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    with log.open("wb") as file:
        process = subprocess.Popen(
            shlex.split(line),
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return line, process, log


def wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit status; STOPPED for a process that had to be, with all that it started."""
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return STOPPED


def read(path: Path) -> Any:
    """The JSON; None if it is missing, damaged or empty, a list of no records included."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    empty = not result or (isinstance(result, dict) and result.get("records") == [])
    return None if empty else result


def sanitizer() -> str | None:
    """compute-sanitizer: on PATH, in a CUDA toolkit, or in one of NVIDIA's wheels."""
    if (found := shutil.which("compute-sanitizer")) is not None:
        return found
    places = (Path("/usr/local"), Path(sysconfig.get_path("purelib")) / "nvidia")
    patterns = ("cuda*/bin/compute-sanitizer", "**/bin/compute-sanitizer")
    for place, pattern in zip(places, patterns, strict=True):
        for path in sorted(place.glob(pattern)):
            return str(path)
    return None


if __name__ == "__main__":
    sys.exit(main())

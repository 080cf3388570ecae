"""All that waits for a GPU, in parts of under ten minutes, the most valuable first.

    python benchmarks/on_gpu.py --out benchmarks/results/on_gpu.json [--minutes 13] [--only dense]

The parts train* are of the training engine, about 15 minutes; `vllm`, 7 minutes, needs vLLM; the
others, 15 minutes, are of the kernels.

A part is a few commands; their exit status, time, last lines and JSON go into the file after every
part, with device, commit and versions, so that a run that is cut short loses the part it was in. A
part that the minutes left cannot hold is not begun: the file says so, and a later run with the same
--out goes on with what is missing. A part that fails does not stop the others; the exit status
tells. `--list` prints the parts, their commands and what they are expected to take.

At the end the aims of the project on an H200 are compared with what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vpgea_fast.metrics import environment

ROOT = Path(__file__).parents[1]
LIMIT_S = 570
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
KEEP_GOING = "--continue-on-collection-errors"  # the trainer's dependencies may be missing
REPORT = "--target-processes all --error-exitcode 9"
DEVICE = "tests/test_kernels_interpret.py"
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

    {python}: this interpreter; {sanitizer}: compute-sanitizer; {scratch}: a folder, from which
    every JSON named here is read. together: the commands run side by side (compiling is what takes
    their time, not the device).
    """

    name: str
    seconds: int
    commands: tuple[str, ...]
    results: tuple[str, ...] = ()
    together: bool = False


def bench(name: str, words: str) -> str:
    return f"{BENCH} {words} --out {{scratch}}/{name}.json"


def train_bench(name: str, words: str) -> str:
    return f"{{python}} benchmarks/train_bench.py --out {{scratch}}/{name}.json {words}"


PYTEST = "{python} -m pytest -q -p no:cacheprovider"
TRAIN = "{python} -m vpgea_fast.cli train configs/tiny.yaml --train.steps 20 --model.device cuda"
RUN = (
    "{python} -m vpgea_fast.cli train configs/7b-1gpu.yaml --parallel.cpu_offload false "
    "--model.path {scratch}/model --data.train {scratch}/world/train.jsonl "
    "--data.question_key question --rollout.max_new_tokens 1024 --objective.preset paper "
    "--metrics.diag_every 0 --checkpoint.export false"
)
ATTENTION = ("flash", "varlen", "sdpa")
TRAINED = {"train": "train_7b", "train_long": "train_7b_32k"}
PARTS = (
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
        "sweep",
        130,
        ("{python} benchmarks/tile_sweep.py --out {scratch}/tile_sweep.json",),
        ("tile_sweep",),
    ),
    Part(
        "tests",
        200,
        (
            f"{PYTEST} -m gpu --timeout 500 {KEEP_GOING} tests --ignore {DEVICE}",
            *(f"{PYTEST} -m gpu {DEVICE} -k {shard}" for shard in SHARDS),
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
        "train",
        280,
        (train_bench("train_7b", "--model qwen2.5-7b --profile {scratch}/train_7b_trace.json"),),
        ("train_7b",),
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
    ),
    Part(
        "train_long",
        200,
        (
            train_bench(
                "train_7b_32k",
                "--model qwen2.5-7b --rows 24 --mean-length 8192 --budget 32768 "
                "--optimizer adamw_bf16 --variants gated padded --repeats 2",
            ),
        ),
        ("train_7b_32k",),
    ),
    Part(
        "train_attention",
        150,
        tuple(
            train_bench(
                f"train_1.5b_{name}",
                f"--model qwen2.5-1.5b --attention {name} --variants gated --repeats 2",
            )
            for name in ATTENTION
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
                "--questions 32 --tokens 1024 --out {scratch}/rollout.json"
            ),
        ),
        ("rollout",),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=13.0, help="of device time, all in all")
    parser.add_argument("--commit", help="where the checkout has no .git")
    parser.add_argument("--scratch", type=Path, default=Path("runs/on_gpu"))
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu.json"))
    parser.add_argument("--list", action="store_true", help="print the parts and run nothing")
    args = parser.parse_args(argv)
    chosen = [part for part in PARTS if part.name in args.only]
    if args.list:
        for part in chosen:
            together = ", side by side" if part.together else ""
            print(f"{part.name}: about {part.seconds} s{together}")
            print("".join(f"    {command}\n" for command in part.commands), end="")
        return 0
    if not torch.cuda.is_available():
        print("on_gpu: no CUDA device here; this program measures nothing without one")
        return 2
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(args.out.read_text())["parts"] if args.out.exists() else {}
    end = time.monotonic() + 60 * args.minutes
    for part in chosen:
        if done.get(part.name, {}).get("status") in (None, "no time"):
            done[part.name] = run(part, args.scratch, end - time.monotonic())
            write(args.out, done, args.commit)
    for aim in aims(done):
        print("{holds!s:5}  {value}  (aim {aim})  {name}".format(**aim))
    left = [part.name for part in chosen if done[part.name]["status"] == "no time"]
    if left:
        print(f"on_gpu: no time for {' '.join(left)}: run again with the same --out")
    return int(any(result["status"] == "failed" for result in done.values()))


def write(path: Path, done: dict[str, Any], commit: str | None) -> None:
    place = environment()
    place["commit"] = place["commit"] or commit
    result = {**place, "aims": aims(done), "parts": done}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(part: Part, scratch: Path, left: float) -> dict[str, Any]:
    """One part, or why not: `status` is ok, failed, skipped (a tool is missing) or no time."""
    if left < part.seconds:
        return {"status": "no time", "reason": f"{left:.0f} s left, about {part.seconds} s needed"}
    places = {"python": sys.executable, "scratch": str(scratch), "sanitizer": sanitizer()}
    if places["sanitizer"] is None and any("{sanitizer}" in c for c in part.commands):
        return {"status": "skipped", "reason": "no compute-sanitizer on PATH, in CUDA or a wheel"}
    lines = [command.format(**places) for command in part.commands]
    print(f"on_gpu: {part.name}\n" + "\n".join(f"  {line}" for line in lines), flush=True)
    start = time.monotonic()
    limit = min(LIMIT_S, left)
    commands: list[dict[str, Any]] = []
    batches = [lines] if part.together else [[line] for line in lines]
    for batch in batches:
        processes = [begin(line, scratch / f"{part.name}_{i}.log") for i, line in enumerate(batch)]
        for line, process, log in processes:
            code = wait(process, start + limit - time.monotonic())
            text = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
            print(text, flush=True)
            commands.append({"command": line, "exit": code, "tail": text})
    results = {name: read(scratch / f"{name}.json") for name in part.results}
    good = all(command["exit"] == 0 for command in commands)
    wall = round(time.monotonic() - start, 1)
    status = "ok" if good else "failed"
    return {"status": status, "wall_s": wall, "commands": commands, "results": results}


def begin(line: str, log: Path) -> tuple[str, subprocess.Popen[bytes], Path]:
    places = (str(ROOT), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    with log.open("wb") as file:
        process = subprocess.Popen(
            shlex.split(line), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    return line, process, log


def wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit status; 124 for a process that had to be stopped."""
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 124


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


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


# --- aims ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """What is wanted on an H200 at N = 16384 (a stream), D = 3584, V = 152064, bf16.

    Aim("forward, ms", 24.1, "<= 28", True)
    """

    name: str
    value: float | None
    aim: str
    holds: bool | None


def aims(done: dict[str, Any]) -> list[dict[str, Any]]:
    """Of both of our CUDA heads, and of the train phase; None where nothing was measured."""
    heads = [aim for ours in ("triton", "cublas") for aim in _aims(ours, done)]
    return [asdict(aim) for aim in (*heads, *_train_aims(done))]


def _most(name: str, value: float | None, limit: float) -> Aim:
    return Aim(name, value, f"<= {limit}", value and value <= limit)


def _least(name: str, value: float | None, limit: float) -> Aim:
    return Aim(name, value, f">= {limit}", value and value >= limit)


def _train_aims(done: dict[str, Any]) -> Iterator[Aim]:
    """Of Qwen2.5-7B at 16k and 32k tokens a forward."""
    results = {n: done.get(p, {}).get("results", {}).get(n) or {} for p, n in TRAINED.items()}
    for name, result in results.items():
        rows = {row["variant"]: row for row in result.get("records", [])}
        ours = rows.get("gated", {})
        yield _least(f"{name}: MFU", ours.get("mfu"), 0.35)
        padded = rows.get("padded", {}).get("times_gated")
        yield _least(f"{name}: times as fast as the padded loop", padded, 1.3)
        if name == "train_7b":
            dense = ratio(ours.get("paths_per_s"), rows.get("ungated", {}).get("paths_per_s"))
            yield _least(f"{name}: paths per second, gate 0.5 / dense", dense, 1.25)
            yield _most(f"{name}: share of head and loss", ours.get("head_share"), 0.08)
        memory = result.get("estimate", {})
        off = ratio(memory.get("mib"), memory.get("measured_mib"))
        yield _most(f"{name}: estimate beside measured peak", off and abs(off - 1), 0.1)


def _aims(ours: str, done: dict[str, Any]) -> Iterator[Aim]:
    def find(part: str, result: str, key: str = "p50_ms", **wanted: Any) -> float | None:
        found = done.get(part, {}).get("results", {}).get(result) or {"records": []}
        rows = [r for r in found["records"] if all(r[k] == v for k, v in wanted.items())]
        return rows[0][key] if rows else None

    def full(provider: str) -> float | None:
        return find("dense", "weighted", mode="full", provider=provider, rows=16384)

    def gated(gate: float) -> float | None:
        return find("two_stream", "two_stream", mode="full", provider=ours, gate=gate, rows=16384)

    def most(name: str, value: float | None, limit: float) -> Aim:
        return _most(f"{ours}: {name}", value, limit)

    def least(name: str, value: float | None, limit: float) -> Aim:
        return _least(f"{ours}: {name}", value, limit)

    forward = find("dense", "logprob", mode="forward", provider=ours, rows=16384)
    yield most("forward, ms", forward, 28)
    yield most("forward + backward, ms", full(ours), 78)
    yield most("two streams, gate 0.5 / dense", ratio(gated(0.5), gated(1.0)), 0.78)
    for peer, limit in (
        ("Liger FLSCE", 1.15),
        ("Liger FLCE", 2.0),
        ("TRL chunked", 3.0),
        ("Liger GRPO", 3.0),
        ("QuACK", 0.97),
    ):
        yield least(f"times as fast as {peer}", ratio(full(peer), full(ours)), limit)
    added = f"{ours}, dW out"
    memory = find("dense", "weighted", "transient_mib", mode="full", provider=added, rows=4096)
    yield most("transient memory at 4096 rows, MiB", memory, 1.3 * 1024)


def ratio(left: float | None, right: float | None) -> float | None:
    return left / right if left and right else None


if __name__ == "__main__":
    sys.exit(main())

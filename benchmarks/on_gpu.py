"""All that waits for a GPU, in parts of under ten minutes: the gpu tests, then measurements.

    python benchmarks/on_gpu.py --out benchmarks/results/on_gpu.json [--only tests]

A part is a command; its exit status, time and last lines go into the JSON together with device,
commit and versions. A part that fails does not stop the others; the exit status tells.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from vpgea_fast.metrics import environment

ROOT = Path(__file__).parents[1]
PARTS = {
    "tests": "-m pytest -q -m gpu --timeout 540 tests",
    "kernels": "benchmarks/kernel_bench.py --shape qwen2.5-7b --out {scratch}/kernel_bench",
    "tiny": (
        "-m vpgea_fast.cli train configs/tiny.yaml --model.path vpgea_fast/tiny_base "
        "--model.device cuda --run.dir {scratch}/tiny --train.steps 20"
    ),
}
LIMIT_S = 570
TAIL = 4000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--scratch", type=Path, default=Path("runs/on_gpu"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("on_gpu: no CUDA device here; this program measures nothing without one")
        return 2
    results = [run(name, args.scratch) for name in args.only]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**environment(), "parts": results}, indent=1) + "\n")
    return int(any(result["exit"] for result in results))


def run(name: str, scratch: Path) -> dict[str, object]:
    """One part in a process of its own."""
    words = PARTS[name].format(scratch=scratch)
    print(f"on_gpu: {name}: python {words}", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *shlex.split(words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, text = 124, str(error)
    print(text[-TAIL:], flush=True)
    return {
        "name": name,
        "command": f"python {words}",
        "exit": code,
        "wall_s": round(time.perf_counter() - start, 1),
        "tail": text[-TAIL:],
    }


if __name__ == "__main__":
    sys.exit(main())

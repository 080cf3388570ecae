"""Time of a training step, this tree against a commit before it, in rounds of both by turns.

    python benchmarks/step_time.py --before COMMIT
    python benchmarks/step_time.py --before COMMIT --rounds 5 -- --objective.name grpo

A round is `vpgea train CONFIG` of either tree in a process of its own, with the same keys and seed;
what follows `--` goes to both. The time of a step is the sum of its `time_*_s` in metrics.jsonl.
The first two steps warm up. Of every other step counts the fastest round, so that what else runs
on the machine is left out; the ratio is that of the sums over steps. Each round's own ratio stands
beside it. The runs must have generated the same tokens, or they did not do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vpgea_fast.metrics import environment
from vpgea_fast.tiny import make_tiny

ROOT = Path(__file__).parents[1]
WARM_UP = 2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="the commit to compare with")
    parser.add_argument("--config", default="tiny", help="a configuration that both trees have")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("words", nargs="*", help="keys of both runs, behind --")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        scratch, old = Path(folder), Path(folder, "before")
        git("worktree", "add", "--detach", "--quiet", str(old), given.before)
        try:
            make_tiny(scratch / "data" / "tiny")
            found = compare(given, {"before": old, "now": ROOT}, scratch)
        finally:
            git("worktree", "remove", "--force", str(old))
    found |= {"before": git("rev-parse", given.before), "environment": environment()}
    print(json.dumps({k: v for k, v in found.items() if k != "environment"}, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def compare(given: argparse.Namespace, trees: dict[str, Path], scratch: Path) -> dict[str, object]:
    """Run both trees in turn: seconds of every step by round, and their ratios."""
    ratios: list[float] = []
    times: dict[str, list[list[dict[str, float]]]] = {name: [] for name in trees}
    for number in range(given.rounds):
        # The order changes: a machine that gets slower would favour whoever is always first.
        names = list(trees) if number % 2 == 0 else list(reversed(trees))
        lines = {n: steps(trees[n], given, scratch, scratch / f"{n}_{number}") for n in names}
        made = [[line["tokens_generated"] for line in lines[name]] for name in trees]
        if made[0] != made[1]:
            raise SystemExit("step_time: the two runs drew other tokens, so their steps differ")
        for name in trees:
            times[name].append([phases(line) for line in lines[name][WARM_UP:]])
        pairs = zip(times["now"], times["before"], strict=True)
        ratios = [total(now) / total(before) for now, before in pairs]
        print(f"round {number + 1}: {ratios[-1]:.3f}", file=sys.stderr)
    fastest = {
        name: [min(of, key=lambda step: sum(step.values())) for of in zip(*rounds, strict=True)]
        for name, rounds in times.items()
    }
    return {
        "ratio": total(fastest["now"]) / total(fastest["before"]),
        "ratios": ratios,
        "milliseconds_per_step": {
            # A phase that the older tree does not have took no time there.
            phase: {
                name: 1e3 * sum(step.get(phase, 0.0) for step in of) / len(of)
                for name, of in fastest.items()
            }
            for phase in fastest["now"][0]
        },
    }


def steps(
    tree: Path, given: argparse.Namespace, scratch: Path, out: Path
) -> list[dict[str, float]]:
    """Train, and read the lines of the run."""
    keys = {"train.steps": given.steps, "run.dir": out, "eval.data": "[]", "eval.every": 0}
    keys |= {"checkpoint.export": "false", "metrics.compare": "null"}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "vpgea_fast.cli", "train", given.config, *words, *given.words]
    env = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"step_time: {tree}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def phases(line: dict[str, float]) -> dict[str, float]:
    """Phase of a step -> its seconds."""
    return {k[5:-2]: v for k, v in line.items() if k.startswith("time_") and k.endswith("_s")}


def total(of: Sequence[dict[str, float]]) -> float:
    """Seconds of steps."""
    return sum(sum(step.values()) for step in of)


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()

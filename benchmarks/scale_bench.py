"""Cost of a training step against its size: questions per step, paths per question, path length.

    python benchmarks/scale_bench.py --out FILE                  # the tiny task, one core
    python benchmarks/scale_bench.py --axes length --steps 20 -- --objective.preset paper

Each axis has one run of `vpgea train tiny` per size, all else as the configuration has it; what
follows `--` goes to every run. A step counts by the medians of its phases (`time_*_s`) over the
steps after the first two. The slope of a phase is that of the least-squares line through
(log size, log seconds): 1 is linear, 0 is a fixed cost. Size is what the phase works on: trained
tokens for `train`, generated tokens for all others.

Two sentences are judged: training is linear in trained tokens (slope at most 1.1), and no phase
without a model in it takes more than 5 % of a step. Status 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step_time import ROOT, WARM_UP, phases, steps

from vpgea_fast.metrics import Console, environment
from vpgea_fast.tiny import make_tiny

AXES = {
    "questions": ("train.questions_per_step", (4, 8, 16, 32)),
    "paths": ("objective.group_size", (4, 8, 16, 32)),
    # The base writes 63 tokens on average. Of 8 no thought closes, and nothing is trained.
    "length": ("rollout.max_new_tokens", (16, 32, 64, 128)),
}
MODEL_PHASES = ("rollout", "score", "logps", "guard", "train")
"""Phases that run the model. The others only handle what it made."""
LINEAR, SMALL = 1.1, 0.05


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Of the least-squares line through (log size, log cost). ValueError: fewer than two different
    sizes, or a number that is not positive."""
    if len(sizes) != len(costs) or len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError(
            f"got sizes {[*sizes]} and costs {[*costs]}, expected as many of each, positive, with "
            "two different sizes; measure more sizes"
        )
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope


def point_of(lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over the steps of a run: seconds by phase, tokens generated and trained."""
    kept = lines[WARM_UP:]
    parts = [phases(dict(line)) for line in kept]
    return {
        "seconds": {name: statistics.median(p.get(name, 0.0) for p in parts) for name in parts[0]},
        "generated": statistics.median(line["tokens_generated"] for line in kept),
        "trained": statistics.median(line["tokens_trained"] for line in kept),
    }


def slopes(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Phase -> slope of its seconds along one axis; phases that took no time are left out."""
    found = {}
    for name in points[0]["seconds"]:
        costs = [point["seconds"][name] for point in points]
        size = "trained" if name == "train" else "generated"
        if min(costs) > 0:
            found[name] = slope([point[size] for point in points], costs)
    return found


def problems(axis: str, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each sentence that does not hold along an axis."""
    lines = []
    if (found := slopes(points)["train"]) > LINEAR:
        lines.append(f"{axis}: training grows with slope {found:.2f} in trained tokens")
    for point in points:
        whole = sum(point["seconds"].values())
        for name, seconds in point["seconds"].items():
            if name not in MODEL_PHASES and seconds > SMALL * whole:
                share = f"{seconds / whole:.1%}"
                lines.append(f"{axis} {point['size']}: {name} takes {share} of the step")
    return lines


def show(axis: str, points: Sequence[Mapping[str, Any]], console: Console) -> None:
    key, _ = AXES[axis]
    names = [name for name in points[0]["seconds"] if any(p["seconds"][name] for p in points)]
    rows = [
        [
            *(str(point["size"]), f"{point['generated']:.0f}", f"{point['trained']:.0f}"),
            *(f"{1e3 * point['seconds'][name]:.1f}" for name in names),
        ]
        for point in points
    ]
    found = slopes(points)
    rows.append(["slope", "", "", *(f"{found[n]:.2f}" if n in found else "-" for n in names)])
    heads = (key, "generated", "trained", *(f"{name} ms" for name in names))
    console.table(heads, rows, title=f"one step by {axis}, medians")


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--steps", type=int, default=8, help="of each run, two of them to warm up")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("words", nargs="*", help="keys of all runs, behind --")
    given = parser.parse_args(words)
    if given.steps <= WARM_UP:
        parser.error(f"--steps: got {given.steps}, expected more than the {WARM_UP} to warm up")
    return given


def main(words: Sequence[str] | None = None) -> int:
    """0, or 1 where a sentence does not hold."""
    given = arguments(words)
    console, measured, bad = Console(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder, "data", "tiny"))
        for axis in given.axes:
            key, sizes = AXES[axis]
            points = measured[axis] = []
            for size in sizes:
                keys = [f"--{key}", str(size), *given.words]
                run = argparse.Namespace(config="tiny", steps=given.steps, words=keys)
                lines = steps(ROOT, run, Path(folder), Path(folder, f"{axis}_{size}"))
                points.append({"size": size, **point_of(lines)})
            if not all(point["trained"] for point in points):
                raise SystemExit(f"scale_bench: {axis}: a run trained no token, so it has no slope")
            show(axis, points, console)
            bad += problems(axis, points)
    holds = "training is linear in trained tokens, and no phase without a model takes above 5 %"
    for line in bad or [holds]:
        console.message(line)
    console.close()
    if given.out is not None:
        command = [
            "python",
            "benchmarks/scale_bench.py",
            *(sys.argv[1:] if words is None else words),
        ]
        found = {"command": shlex.join(command), "environment": environment(), "axes": measured}
        found["slopes"] = {axis: slopes(points) for axis, points in measured.items()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

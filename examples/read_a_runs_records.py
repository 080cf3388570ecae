"""Read what a run wrote: metrics.jsonl, paths.jsonl and eval.json, with the standard library alone.

    python examples/read_a_runs_records.py RUN

docs/metrics.md explains every key. null stands for a number that does not exist in that step.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main(run: Path) -> None:
    for step in read_lines(run / "metrics.jsonl"):
        print(f"step {step['step']}: loss {step['loss']:.3f}, gate {step['gate_rate']:.2f}")

    lengths = defaultdict(list)  # stream -> tokens of its paths
    for path in read_lines(run / "paths.jsonl"):
        lengths[path["stream"]].append(path["length"])
    for stream, values in sorted(lengths.items()):
        print(f"{stream}: {len(values)} paths, {sum(values) / len(values):.1f} tokens on average")

    evaluations = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    for when, result in evaluations.items():  # before and after training
        sampled = result["sampled"]
        print(f"{when}: {100 * sampled['acc']:.1f} % right with {sampled['tokens']:.1f} tokens")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/read_a_runs_records.py RUN, a run directory")
    main(Path(sys.argv[1]))

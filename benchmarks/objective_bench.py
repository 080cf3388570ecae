"""Methods against each other on the tiny world: same samples, same rates for all, several seeds.

    vpgea make-tiny data/tiny
    python benchmarks/objective_bench.py --out benchmarks/results/tiny_demo.json

Every run is `vpgea train configs/tiny.yaml` with the method's keys laid over it, a process each,
`--jobs` at a time. Every method gets the same grid of learning rates. The held-out questions are
split in two by turns: the rate of a method is the one with the highest mean eps3 (sampled, after
training) over the seeds on the half `validation`, and what is reported is of the half `test`. A run
is short if it ends (sampled) with at most SHORT tokens and an accuracy of at least the base's minus
one point. Constructed task: it shows the mechanism, not the paper's result.

    python benchmarks/objective_bench.py --reevaluate benchmarks/results/tiny_demo.json

makes the rows of a file again from its runs by these rules. Runs of before the split have one
benchmark: their rate is picked on the questions that are reported, and the file says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

from vpgea_fast.metrics import environment

ROOT = Path(__file__).parents[1]
METHODS = {
    "demo (robust, beta 1)": [],
    "paper preset": ["--objective.preset", "paper", "--objective.beta", "0.5"],
    "GRPO + length factor": [
        *("--objective.name", "grpo", "--objective.group_size", "12", "--objective.alpha", "0.5"),
        # As VPG-EA is trained here: thoughts alone, the sum over their tokens.
        *("--objective.trains", "thought", "--objective.norm", "seq_sum"),
        *("--objective.eta_clip", "[0.25, 4.0]", "--objective.std_gate", "0.05"),
        *("--objective.eps", "1e-3"),
    ],
}
RATES = ("5e-4", "1e-3", "2e-3")
SHORT = 22
"""Mean tokens, answer included, up to which a run may count as short; a concise chain has 21."""
ACCURACY_LOSS = 0.01
"""What a short run may lose of the base's accuracy."""
PICK, REPORT = "validation", "test"
Run = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = _arguments(words)
    command = shlex.join(["python", "benchmarks/objective_bench.py", *words])
    file = args.reevaluate or args.out
    result = {} if args.reevaluate else measure(args)
    if args.reevaluate:
        result = known(file) | {
            "reevaluated": {"command": command, "commit": environment()["commit"]}
        }
    else:
        result["command"] = command
    result |= evaluate(result["runs"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print(json.dumps(row))


def known(file: Path) -> dict[str, Any]:
    """An earlier result; one line and status 2 for a file that is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        evaluate(found["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        stop(f"--reevaluate {file}: {error!r}; expected a file that --out wrote, with its runs")
    return found


def stop(why: str) -> NoReturn:
    print(f"objective_bench: {why}", file=sys.stderr)
    raise SystemExit(2)


def measure(args: Any) -> dict[str, Any]:
    """All runs, and where they were made."""
    jobs = [
        (method, rate, seed)
        for method in args.methods
        for rate in args.rates
        for seed in args.seeds
    ]
    scratch = Path(tempfile.mkdtemp(prefix="objective_bench_"))
    try:
        halves = split_questions(ROOT / args.world / "test.jsonl", scratch)
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = list(
                pool.map(lambda job: run(*job, args=args, halves=halves, scratch=scratch), jobs)
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    facts = environment()
    return {
        "runs": runs,
        "base": json.loads((ROOT / args.world / "base/tiny_base.json").read_text())["measured"],
        "note": "constructed task: it shows the mechanism, not the paper's result",
        "commit": facts["commit"],
        "environment": facts,
    }


def split_questions(path: Path, folder: Path) -> dict[str, Path]:
    """validation.jsonl and test.jsonl in `folder`: the lines of `path` by turns."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    files = {name: folder / f"{name}.jsonl" for name in (PICK, REPORT)}
    for start, file in enumerate(files.values()):
        file.write_text("".join(lines[start::2]), encoding="utf-8")
    return files


def run(
    method: str, rate: str, seed: int, *, args: Any, halves: Mapping[str, Path], scratch: Path
) -> dict[str, Any]:
    """One training run in a process of its own, and what it measured."""
    run_dir = scratch / f"{args.methods.index(method)}-{rate}-{seed}"
    words = [
        *METHODS[method],
        "--optim.lr",
        rate,
        "--run.seed",
        str(seed),
        "--run.dir",
        str(run_dir),
    ]
    words += ["--model.path", f"{args.world}/base", "--data.train", f"{args.world}/train.jsonl"]
    words += [
        "--eval.data",
        f"[{', '.join(map(str, halves.values()))}]",
        "--checkpoint.export",
        "false",
    ]
    command = [sys.executable, "-m", "vpgea_fast.cli", "train", str(args.config), *words]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} at {rate}, seed {seed} failed:\n{done.stdout}\n{done.stderr}")
    evaluation = json.loads((run_dir / "eval.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    drawn, short_at = 0, None
    for line in lines:
        drawn += line["tokens_generated"]
        if short_at is None and line["len_prior"] <= SHORT:
            short_at = drawn  # by length alone; `is_short` judges the run
    print(f"{method} lr {rate} seed {seed}: {evaluation['after']['sampled']}", flush=True)
    return {
        "method": method,
        "lr": float(rate),
        "seed": seed,
        "before": evaluation["before"],
        "after": evaluation["after"],
        "tokens_generated": drawn,
        "tokens_to_short": short_at,
        "wall_s": round(time.perf_counter() - start, 1),
    }


def evaluate(runs: Sequence[Run]) -> dict[str, Any]:
    """The rows of all methods, and on which questions their rates were picked."""
    split = all(PICK in run["after"]["sampled"]["benchmarks"] for run in runs)
    return {
        "rows": [best_row(method, runs) for method in dict.fromkeys(run["method"] for run in runs)],
        "rate_picked_on": PICK
        if split
        else "the questions that are reported: the runs have no other",
        "short": f"sampled: tokens <= {SHORT} and accuracy >= the base's - {ACCURACY_LOSS}",
    }


def best_row(method: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The method at the rate picked for it: means over seeds on the questions that are reported,
    with the lowest and highest seed of eps3, and how many runs got short, there and at any rate."""
    mine = [run for run in runs if run["method"] == method]
    groups = {lr: [r for r in mine if r["lr"] == lr] for lr in sorted({r["lr"] for r in mine})}
    best = max(
        groups, key=lambda lr: fmean(part(r, "after", "sampled", PICK)["eps3"] for r in groups[lr])
    )
    seeds = groups[best]
    eps3 = [part(r, "after", "sampled", REPORT)["eps3"] for r in seeds]
    return {
        "name": f"{method}, lr {best:g}, mean of {len(seeds)} seeds",
        "lr": best,
        "seeds": len(seeds),
        "short_seeds": sum(map(is_short, seeds)),
        "runs": len(mine),
        "short_runs": sum(map(is_short, mine)),
        "eps3_low": min(eps3),
        "eps3_high": max(eps3),
        **{when: _mean(seeds, when) for when in ("before", "after")},
    }


def is_short(run: Run) -> bool:
    """Short answers at held accuracy: length alone also counts a run that unlearnt to answer."""
    before, after = (part(run, when, "sampled", REPORT) for when in ("before", "after"))
    # 1e-9: 0.9225 - 0.01 is not 0.9125 in binary
    return after["tokens"] <= SHORT and after["acc"] >= before["acc"] - ACCURACY_LOSS - 1e-9


def part(run: Run, when: str, mode: str, half: str) -> dict[str, Any]:
    """A run's result on one half of the questions; on all where the run knew no halves."""
    benchmarks = run[when][mode]["benchmarks"]
    return benchmarks[half if PICK in benchmarks else REPORT]


def _mean(runs: Sequence[Run], when: str) -> dict[str, Any]:
    modes = [mode for mode in ("sampled", "greedy") if mode in runs[0][when]]
    keys = ("acc", "tokens", "eps3", "truncated", "n")
    parts = {mode: [part(run, when, mode, REPORT) for run in runs] for mode in modes}
    means = {mode: {key: fmean(p[key] for p in parts[mode]) for key in keys} for mode in modes}
    return {mode: {**mean, "eps3_mean": mean["eps3"]} for mode, mean in means.items()}


def _arguments(argv: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny.yaml")
    parser.add_argument("--world", type=Path, default=Path("data/tiny"), help="of make-tiny")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="where the measured runs and rows are written")
    target.add_argument("--reevaluate", type=Path, metavar="FILE", help="rows anew from its runs")
    args = parser.parse_args(argv)
    idle = [word for word in argv if word.startswith("--") and "--reevaluate" not in word]
    if args.reevaluate and idle:
        stop(f"got {idle[0]} with --reevaluate, which measures nothing; leave it out")
    return args


if __name__ == "__main__":
    main()

"""Methods against each other on the tiny world: same samples, same rates for all, several seeds.

    vpgea make-tiny data/tiny
    python benchmarks/objective_bench.py --out benchmarks/results/tiny_demo.json

Every run is `vpgea train configs/tiny.yaml` with the method's keys laid over it, a process each,
`--jobs` at a time. Every method gets the same grid of learning rates; its best rate is the one with
the highest mean eps3 (sampled, after training) over the seeds. Constructed task: it shows the
mechanism, not the paper's result.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from vpgea_fast.metrics import environment

ROOT = Path(__file__).parents[1]
METHODS = {
    "demo (robust, beta 1)": [],
    "paper preset": ["--objective.preset", "paper", "--objective.beta", "0.5"],
    "GRPO + length factor": [
        *("--objective.name", "grpo", "--objective.group_size", "12", "--objective.alpha", "0.5"),
        *("--objective.eta_clip", "[0.25, 4.0]", "--objective.std_gate", "0.05"),
        *("--objective.eps", "1e-3"),
    ],
}
RATES = ("5e-4", "1e-3", "2e-3")
SHORT = 22
"""Mean thought tokens at which a run counts as short; a concise chain has 17."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    jobs = [
        (method, rate, seed)
        for method in args.methods
        for rate in args.rates
        for seed in args.seeds
    ]
    scratch = Path(tempfile.mkdtemp(prefix="objective_bench_"))
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = list(pool.map(lambda job: run(*job, args=args, scratch=scratch), jobs))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    facts = environment()
    result = {
        "rows": [best_row(method, runs) for method in args.methods],
        "runs": runs,
        "base": json.loads((ROOT / args.world / "base/tiny_base.json").read_text())["measured"],
        "command": "python benchmarks/objective_bench.py " + " ".join(argv or sys.argv[1:]),
        "note": "constructed task: it shows the mechanism, not the paper's result",
        "commit": facts["commit"],
        "environment": facts,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print(json.dumps(row))


def run(method: str, rate: str, seed: int, *, args: Any, scratch: Path) -> dict[str, Any]:
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
    words += ["--eval.data", f"[{args.world}/test.jsonl]", "--checkpoint.export", "false"]
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
            short_at = drawn
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


def best_row(method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The method at its best rate: means over seeds, with the lowest and highest seed of eps3."""
    rates = sorted({r["lr"] for r in runs if r["method"] == method})
    groups = {lr: [r for r in runs if r["method"] == method and r["lr"] == lr] for lr in rates}
    best = max(groups, key=lambda lr: fmean(r["after"]["sampled"]["eps3"] for r in groups[lr]))
    seeds = groups[best]
    eps3 = [r["after"]["sampled"]["eps3"] for r in seeds]
    return {
        "name": f"{method}, lr {best:g}, mean of {len(seeds)} seeds",
        "lr": best,
        "seeds": len(seeds),
        "short_seeds": sum(r["tokens_to_short"] is not None for r in seeds),
        "eps3_low": min(eps3),
        "eps3_high": max(eps3),
        **{when: _mean([r[when] for r in seeds]) for when in ("before", "after")},
    }


def _mean(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    modes = [mode for mode in ("sampled", "greedy") if mode in results[0]]
    keys = ("acc", "tokens", "eps3", "eps3_mean", "truncated", "n")
    return {mode: {key: fmean(r[mode][key] for r in results) for key in keys} for mode in modes}


def _arguments(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny.yaml")
    parser.add_argument("--world", type=Path, default=Path("data/tiny"), help="of make-tiny")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

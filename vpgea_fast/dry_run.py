"""`--dry-run`: what a run would see and need, before anything is sampled: prompts, lengths,
memory."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from vpgea_fast.config import Config
from vpgea_fast.data import DataError, load_questions
from vpgea_fast.model import check_model_dir, estimate_memory
from vpgea_fast.prompts import Prompter, length_report
from vpgea_fast.types import Question

ITEMS = 8
SAMPLE_QUESTIONS = [
    Question(f"sample-{i}", text, answer)
    for i, (text, answer) in enumerate(
        [
            ("What is 17 + 28?", "45"),
            ("Solve 3x = 12 for x.", "4"),
            ("What is the area of a 3 by 5 rectangle?", "15"),
            ("How many primes are below 20?", "8"),
            ("What is 1/2 + 1/4?", r"\frac{3}{4}"),
            ("Expand (x + 1)^2.", "x^2+2x+1"),
            ("What is the sum of the first 10 positive integers?", "55"),
            ("What is 2^10?", "1024"),
        ]
    )
]


def dry_run(cfg: Config, say: Any = print) -> None:
    """Tokenise 8 items, show both prompts, report lengths and memory. Writes nothing, loads no
    weight."""
    check_model_dir(cfg.model.path)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    prompter = Prompter(tokenizer, cfg.prompt)
    questions, dropped = _questions(cfg, say)
    kept, overlong = prompter.prompt_within(
        questions, limit=cfg.data.max_prompt_tokens, policy=cfg.data.overlong
    )
    say(f"questions: {len(kept)} ({ {**dropped, 'overlong': overlong} } dropped)")
    for item in kept[:ITEMS]:
        lengths = f"student {len(item.student_ids)}, teacher {len(item.teacher_ids)}"
        say(f"  {item.question.id}: {lengths}, scored answer {tokenizer.decode(item.target_ids)!r}")
    say(f"student prompt:\n{tokenizer.decode(kept[0].student_ids)}\n")
    say(f"teacher prompt:\n{tokenizer.decode(kept[0].teacher_ids)}\n")
    say(f"prompt tokens: {length_report(kept)}")
    _memory(cfg, max(len(q.teacher_ids) for q in kept), say)


def _questions(cfg: Config, say: Any) -> tuple[list[Question], dict[str, int]]:
    try:
        loaded = load_questions(cfg.data.train, cfg.data)
    except DataError as error:
        say(f"data: {error}")
        say(f"data: showing {ITEMS} built-in questions; the run itself needs {cfg.data.train}")
        return SAMPLE_QUESTIONS, {}
    return list(loaded.questions), dict(loaded.dropped)


def _memory(cfg: Config, longest_prompt: int, say: Any) -> None:
    row = longest_prompt + cfg.rollout.max_new_tokens
    estimate = estimate_memory(
        cfg.model.path,
        cfg.model.dtype,
        batch_tokens=max(cfg.train.micro_batch_tokens, row),
        checkpointing=cfg.model.gradient_checkpointing,
        sequences=cfg.rollout.max_batch,
        context=row + (cfg.rollout.max_answer_tokens if cfg.rollout.full_answer else 0),
    )
    say(f"memory estimate for one device ({estimate.parameters / 1e6:.1f} M parameters):")
    for name, size in estimate.parts.items():
        say(f"  {name:<14}{size / 2**30:9.3f} GiB")
    say(f"  {'peak':<14}{estimate.total / 2**30:9.3f} GiB (states + larger of training, sampling)")

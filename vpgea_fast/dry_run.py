"""`--dry-run`: what a run would see and need, before anything is sampled: prompts, lengths,
memory."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants, is_offline_mode

from vpgea_fast.config import Config
from vpgea_fast.data import DataError, load_questions, step_questions
from vpgea_fast.model import estimate_memory, load_tokenizer
from vpgea_fast.prompts import Prompter, length_report
from vpgea_fast.types import Question
from vpgea_fast.verify import Verifier

ITEMS = 8
SAMPLE_QUESTIONS = tuple(
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
)
REMEDIES = {
    "kv cache": "rollout.max_batch or rollout.max_new_tokens",
    "activations": "train.micro_batch_tokens",
    "head": "train.micro_batch_tokens",
}

Say = Callable[[str], object]


def dry_run(cfg: Config, say: Say = print) -> None:
    """Tokenise the data, show 8 items and both prompts, report lengths and memory.

    Writes nothing, loads no weight, and draws nothing. Bad input is the error that the run would
    end with; only data on a Hub that cannot be reached is replaced, loudly, by built-in questions.
    """
    tokenizer = load_tokenizer(cfg.model.path)
    prompter = Prompter(tokenizer, cfg.prompt)
    questions, dropped = _questions(cfg, say)
    kept, unfit = prompter.prompt_within(
        questions, limit=cfg.data.max_prompt_tokens, policy=cfg.data.overlong
    )
    counts = {**dropped, **unfit}
    lost = ", ".join(f"{count} dropped ({why})" for why, count in counts.items() if count)
    say(f"{len(kept)} questions, {lost or 'none dropped'}; the first {len(kept[:ITEMS])}:")
    with Verifier(timeout_s=cfg.verify.timeout_s) as verifier:
        readable = verifier.parseable([item.question.answer for item in kept[:ITEMS]])
    for item, good in zip(kept[:ITEMS], readable, strict=True):
        say(
            f"  {item.question.id}: prompt tokens student {len(item.student_ids)}, teacher "
            f"{len(item.teacher_ids)}; scored answer {tokenizer.decode(item.target_ids)!r}"
            + ("" if good else ", which math-verify cannot parse")
        )
    say(f"student prompt:\n{tokenizer.decode(kept[0].student_ids)}\n")
    say(f"teacher prompt:\n{tokenizer.decode(kept[0].teacher_ids)}\n")
    for view, lengths in length_report(kept).items():
        say(f"{view} prompt tokens: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
    if questions is not SAMPLE_QUESTIONS:  # the error that the run would end with
        step_questions(kept, seed=cfg.run.seed, step=0, batch=cfg.train.questions_per_step)
    _memory(cfg, max(len(q.teacher_ids) for q in kept), say)


def _questions(cfg: Config, say: Say) -> tuple[tuple[Question, ...], dict[str, int]]:
    source = cfg.data.train
    hub = source.startswith("hub:")
    reason = "the Hub does not answer"
    if not hub or is_offline_mode() or _hub_answers():
        try:
            loaded = load_questions(source, cfg.data)
            return loaded.questions, dict(loaded.dropped)
        except DataError as error:
            if not (hub and is_offline_mode()):
                raise
            reason = str(error)
    say(f"data: {reason}; {ITEMS} built-in questions stand in, the run itself needs {source}")
    return SAMPLE_QUESTIONS, {}


def _hub_answers() -> bool:
    """One request: `datasets` asks six times, for half a minute, before it gives up."""
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # `datasets` may trust it
    return True


def _memory(cfg: Config, longest_prompt: int, say: Say) -> None:
    row = longest_prompt + cfg.rollout.max_new_tokens
    context = row + (cfg.rollout.max_answer_tokens if cfg.rollout.full_answer else 0)
    batch_tokens = max(cfg.train.micro_batch_tokens, row)
    estimate = estimate_memory(
        cfg.model.path,
        cfg.model.dtype,
        batch_tokens=batch_tokens,
        checkpointing=cfg.model.activation_checkpointing != "none",
        sequences=cfg.rollout.max_batch,
        context=context,
    )
    say(
        f"memory estimate for one device: {estimate.parameters / 1e6:.1f} M parameters, "
        f"{batch_tokens} packed tokens a forward, {cfg.rollout.max_batch} paths of up to {context} "
        "tokens side by side"
    )
    for name, size in estimate.parts.items():
        say(f"  {name:<14}{size / 2**30:9.3f} GiB")
    say(f"  {'peak':<14}{estimate.total / 2**30:9.3f} GiB (states + larger of training, sampling)")
    present = _device_memory(cfg.model.device)
    say(f"  {'this device':<14}{present / 2**30:9.3f} GiB")
    if estimate.total > present:
        largest = max(REMEDIES, key=lambda name: estimate.parts[name])
        say(f"  more than this device holds; of what can be set {largest!r} is largest: lower")
        say(f"  {REMEDIES[largest]}, or take a larger device")


def _device_memory(device: str) -> int:
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

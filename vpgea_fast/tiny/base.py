"""The base: rows to train on, the training, and what counts as trained."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vpgea_fast.tiny.task import (
    ANSWER,
    LABELS,
    MAX_LENGTH,
    SPECIAL_ID,
    STEP_TOKENS,
    TEST_QUESTIONS,
    Corpus,
    concise_thought,
    make_tokenizer,
    parse_question,
    prompt_ids,
    question_sets,
    random_question,
    sample_thought,
    solve,
    stated_thought,
    text_ids,
)
from vpgea_fast.types import Question, View

MAX_NEW_TOKENS = 240  # a short limit would count the base's long thoughts as wrong
GREEDY_QUESTIONS = 200
CHUNK = 200  # rows of one forward or `generate`
TRIES = 4  # seeds, one after another, until a base passes the gate


@dataclass(frozen=True)
class Phase:
    """Steps of AdamW; `pinned` turns on the weights and the pin of the mode decision."""

    steps: int
    lr: float
    pinned: bool


@dataclass(frozen=True)
class Recipe:
    """A kind of base: how rare concise thoughts are in the student view, and what is accepted."""

    name: str
    student_concise: float
    student_band: tuple[float, float]
    teacher_band: tuple[float, float] = (0.2, 0.3)
    corpus: Corpus = field(default_factory=Corpus)
    phases: tuple[Phase, ...] = (Phase(1300, 3e-3, pinned=False), Phase(900, 1e-3, pinned=True))
    batch: int = 32
    pin: float = 0.05


RECIPES = {
    "demo": Recipe("demo", student_concise=1.2e-6, student_band=(1e-7, 1e-5)),
    "stated": Recipe(
        "stated",
        student_concise=1.2e-6,
        student_band=(1e-7, 1e-5),
        corpus=Corpus(teacher_stated=0.1),
    ),
    "common": Recipe("common", student_concise=0.0115, student_band=(0.005, 0.02)),
}


@dataclass(frozen=True)
class BaseReport:
    """A base measured on held-out questions in the student view, the teacher view where named.

    Tokens count everything generated: thought, answer, `</s>`. `forced_accuracy` is the greedy one
    of a forced concise thought, that is with the first step and the second label given: a student
    can only be distilled into a skill it has, and the free thoughts are all verbose.
    """

    recipe: str
    seed: int
    concise_student: float
    concise_teacher: float
    greedy_accuracy: float
    greedy_tokens: float
    forced_accuracy: float
    sampled_accuracy: float
    sampled_tokens: float


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and its completion, and the weight of each token: 0 on the prompt.

    With `concise` set, the mode decision at index `decision` is to be concise that often.
    """

    ids: list[int]
    weight: list[float]
    decision: int = 0
    concise: float | None = None


def sample_row(
    rng: random.Random, recipe: Recipe, tokenizer: Any, held_out: frozenset[str], *, pinned: bool
) -> Row:
    """One supervised row, in either view with equal chance.

    A teacher thought ends on the right digit (drawn until it does) or leaks, silently or by stating
    its hint. If `pinned`, the mode
    decision weighs p / drawn when concise and (1 - p) / (1 - drawn) when verbose, p the recipe's
    probability; every later word weighs 1, so that a rare concise thought stays usable.
    """
    # Test questions are drawn again: the space holds far more than the 800.
    corpus, text = recipe.corpus, random_question(rng)
    while text in held_out:
        text = random_question(rng)
    question = Question(id="", text=text, answer=solve(text))
    view: View = "student" if rng.random() < 0.5 else "teacher"
    drawn = corpus.student_concise if view == "student" else corpus.teacher_concise
    # Drawn at a rate at which both kinds are learnt; the weight puts the recipe's rate back.
    verbose = rng.random() >= drawn
    # `and` draws no number for a corpus without such rows: its bases stay as they were.
    stated = view == "teacher" and corpus.teacher_stated > 0
    stated = stated and rng.random() < corpus.teacher_stated
    if stated:
        thought, digit = stated_thought(question.answer), question.answer
    elif view == "teacher" and rng.random() < corpus.teacher_leak:
        # A leak stops after some steps and copies the hint, so it ends on the right digit.
        steps = rng.randrange(1, len(parse_question(text)[1]))
        thought, _ = sample_thought(text, rng, corpus, verbose=verbose, steps=steps)
        digit = question.answer
    else:
        thought, digit = sample_thought(text, rng, corpus, verbose=verbose)
        # A teacher that states a wrong digit would contradict its hint.
        while view == "teacher" and digit != question.answer:
            thought, digit = sample_thought(text, rng, corpus, verbose=verbose)
    prompt = prompt_ids(tokenizer, question, view)
    completion = text_ids(tokenizer, "".join(thought) + ANSWER.format(answer=digit) + "</s>")
    ids, weight = [*prompt, *completion], [0.0] * len(prompt) + [1.0] * len(completion)
    if not pinned or stated:  # a thought without steps decides nothing
        return Row(ids, weight)
    # The decision is the word after the first step: STEP_TOKENS behind the prompt.
    p, decision = recipe.student_concise if view == "student" else drawn, len(prompt) + STEP_TOKENS
    weight[decision] = (1 - p) / (1 - drawn) if verbose else p / drawn
    return Row(ids, weight, decision, p)


def row_batch(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_BT and weight_BT, padded on the right, where a causal model needs no mask."""
    width = max(len(row.ids) for row in rows)
    pad = SPECIAL_ID["<pad>"]
    ids = [row.ids + [pad] * (width - len(row.ids)) for row in rows]
    weight = [row.weight + [0.0] * (width - len(row.weight)) for row in rows]
    return torch.tensor(ids), torch.tensor(weight)


def make_model(seed: int, vocab_size: int) -> Qwen2ForCausalLM:
    """A random float32 Qwen2; head_dim 32 is the smallest that vLLM runs on a CPU.

    initializer_range: after 500 steps the steps are right with 0.08, and none is with the usual
    0.02. rope_theta: the slowest of the 16 waves spans 470 positions, about MAX_LENGTH.
    """
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_ID["<s>"],
        eos_token_id=SPECIAL_ID["</s>"],
        pad_token_id=SPECIAL_ID["<pad>"],
    )
    # The caller's generators stay as they are: a run's seed must not depend on this one.
    # The caller's generator stays as it was, and a seed stands for one model.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).float()


def supervised_loss(
    model: Qwen2ForCausalLM, rows: Sequence[Row], recipe: Recipe, second_label: int
) -> torch.Tensor:
    """Weighted cross-entropy per completion token + pin * the mean over rows with `concise` of

        (log P(second label | first step) - log concise)^2,

    because cross-entropy alone would need millions of rows to place a probability of 1e-6.
    """
    # (B, T) with padding: 115k parameters do not pay for packing.
    ids_BT, weight_BT = row_batch(rows)
    logp_BTV = model(ids_BT[:, :-1], use_cache=False).logits.log_softmax(-1)
    nll_BT = -logp_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    # By the number of tokens, not the sum of weights: a decision weighs 2e-6 or 2.
    loss = (nll_BT * weight_BT[:, 1:]).sum() / (weight_BT[:, 1:] > 0).sum()
    # Row -> the log-probability to pin; (B,) rows, S of them pinned.
    targets = {i: math.log(row.concise) for i, row in enumerate(rows) if row.concise is not None}
    if not targets:
        return loss
    # Logits at t are of the token at t + 1.
    position = [rows[i].decision - 1 for i in targets]
    logp_S = logp_BTV[list(targets), position, second_label]
    return loss + recipe.pin * (logp_S - torch.tensor([*targets.values()])).square().mean()


def train_once(
    recipe: Recipe, seed: int, held_out: frozenset[str], progress: Callable[[str], None]
) -> Qwen2ForCausalLM:
    """Train both phases: AdamW, 50 steps of warm-up, cosine to 0, gradient norm clipped to 1."""
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    (second_label,) = text_ids(tokenizer, LABELS[1])
    model = make_model(seed, vocab_size=len(tokenizer))
    model.train()
    for number, phase in enumerate(recipe.phases, start=1):
        # Each phase has moments and a warm-up of its own.
        optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, weight_decay=0.01)
        started = time.monotonic()
        for step in range(1, phase.steps + 1):
            # Per phase: warm-up over 50 steps, then down to zero.
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / phase.steps))
            optimizer.param_groups[0]["lr"] = phase.lr * cosine * min(1.0, step / 50)
            rows = [
                sample_row(rng, recipe, tokenizer, held_out, pinned=phase.pinned)
                for _ in range(recipe.batch)
            ]
            loss = supervised_loss(model, rows, recipe, second_label)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 1 or step % 200 == 0:
                # Of this phase alone: whether the gate asks for another try is not known yet.
                left = (time.monotonic() - started) * (phase.steps / step - 1)
                progress(
                    f"tiny base, phase {number}/{len(recipe.phases)}, step {step}/{phase.steps}: "
                    f"loss {loss.item():.3f}, {left:.0f} s left in this phase"
                )
    return model.eval()


def train_base(
    recipe: Recipe,
    *,
    seed: int = 0,
    tries: int = TRIES,
    measure_on: int = TEST_QUESTIONS,
    progress: Callable[[str], None] = print,
) -> tuple[Qwen2ForCausalLM, BaseReport]:
    """Train bases from seed, seed + 1, .. until one passes the gate on `measure_on` questions.

    Raises RuntimeError with the measured numbers of every try if none does.
    """
    _, test = question_sets()
    held_out, tokenizer, refused = frozenset(q.text for q in test), make_tokenizer(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one order of summation: a seed stands for one base
    try:
        for attempt in range(seed, seed + tries):
            model = train_once(recipe, attempt, held_out, progress)
            # On the very questions that no row was drawn from.
            report = measure_base(
                model, tokenizer, test[:measure_on], recipe=recipe.name, seed=attempt
            )
            progress(f"tiny base, measured: {report}")
            failures = gate_failures(report, recipe)
            if not failures:
                return model, report
            refused.append(f"seed {attempt}: {', '.join(failures)}")
            progress(f"tiny base refused, {refused[-1]}")
    finally:
        torch.set_num_threads(threads)
    raise RuntimeError(
        f"no {recipe.name} base passed the gate ({'; '.join(refused)}); try another first seed"
    )


def concise_probability(
    model: Any, tokenizer: Any, questions: Sequence[Question], view: View
) -> float:
    """Mean over questions of P(concise thought, `</think>` included | the view's prompt), exact."""
    device, total = next(model.parameters()).device, 0.0
    for i in range(0, len(questions), CHUNK):
        rows = []
        for question in questions[i : i + CHUNK]:
            prompt = prompt_ids(tokenizer, question, view)
            thought = text_ids(tokenizer, "".join(concise_thought(question.text)))
            rows.append(Row([*prompt, *thought], [0.0] * len(prompt) + [1.0] * len(thought)))
        ids_BT, weight_BT = (tensor.to(device) for tensor in row_batch(rows))
        with torch.no_grad():
            logits_BTV = model(ids_BT[:, :-1], use_cache=False).logits.float()
        logp_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        # exp in float64: 1e-6 per question is summed over hundreds.
        total += (logp_BT * weight_BT[:, 1:]).sum(-1).double().exp().sum().item()
    return total / len(questions)


def answer_accuracy(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    seed: int | None,
    forced: bool = False,
) -> tuple[float, float]:
    """(accuracy, mean tokens) in the student view; greedy if `seed` is None, else sampled at T=1.

    If `forced`, the thought is given up to its concise mode decision; given tokens do not count.
    A path that MAX_NEW_TOKENS cuts off is wrong.
    """
    # Padding on the left, as `generate` of a causal model needs it.
    pad, eos = SPECIAL_ID["<pad>"], SPECIAL_ID["</s>"]
    sampling = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0}
    correct = tokens = 0
    for i in range(0, len(questions), CHUNK):
        chunk = questions[i : i + CHUNK]
        prompts = [prompt_ids(tokenizer, question, "student") for question in chunk]
        # One word past the first step: the second label, which is the concise decision.
        if forced:
            given = ["".join(concise_thought(q.text)[: STEP_TOKENS + 1]) for q in chunk]
            prompts = [
                [*ids, *text_ids(tokenizer, text)] for ids, text in zip(prompts, given, strict=True)
            ]
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        with torch.random.fork_rng(devices=[]):
            # By chunk, so that a chunk's samples do not hang on how far the ones before came.
            torch.manual_seed((seed or 0) + i)
            output_BT = model.generate(
                ids_BT,
                attention_mask=ids_BT.ne(pad).long(),
                max_new_tokens=MAX_NEW_TOKENS,
                **sampling,
            )
        for question, ids in zip(chunk, output_BT[:, width:].tolist(), strict=True):
            # Behind the end of a short answer `generate` pads to the longest of the chunk.
            ids = ids[: ids.index(eos) + 1] if eos in ids else ids
            right = "</think>" + ANSWER.format(answer=question.answer) + "</s>"
            # Six tokens: `</think>`, `\boxed`, `{`, digit, ` }`, `</s>`.
            correct += ids[-6:] == text_ids(tokenizer, right)
            tokens += len(ids)
    return correct / len(questions), tokens / len(questions)


def measure_base(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, recipe: str, seed: int
) -> BaseReport:
    greedy = answer_accuracy(model, tokenizer, questions[:GREEDY_QUESTIONS], seed=None)
    forced = answer_accuracy(model, tokenizer, questions, seed=None, forced=True)
    sampled = answer_accuracy(model, tokenizer, questions, seed=0)
    return BaseReport(
        recipe=recipe,
        seed=seed,
        concise_student=concise_probability(model, tokenizer, questions, "student"),
        concise_teacher=concise_probability(model, tokenizer, questions, "teacher"),
        greedy_accuracy=greedy[0],
        greedy_tokens=greedy[1],
        forced_accuracy=forced[0],
        sampled_accuracy=sampled[0],
        sampled_tokens=sampled[1],
    )


def gate_failures(report: BaseReport, recipe: Recipe) -> list[str]:
    """What keeps a base from being used; empty if it passes."""
    bands = {
        "concise_student": recipe.student_band,
        "concise_teacher": recipe.teacher_band,
        "greedy_accuracy": (0.99, 1.0),
        "forced_accuracy": (0.99, 1.0),
        "sampled_accuracy": (0.8, 0.97),
        "sampled_tokens": (50.0, 75.0),
    }
    measured = asdict(report)
    return [
        f"{name} is {measured[name]:.3g}, wanted {low:g} to {high:g}"
        for name, (low, high) in bands.items()
        if not low <= measured[name] <= high
    ]

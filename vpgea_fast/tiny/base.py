"""The base: rows to train on, the training, and its measures."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vpgea_fast.tiny.recipes import TASKS, Gate, Recipe
from vpgea_fast.tiny.task import (
    ANSWER,
    LABELS,
    MAX_LENGTH,
    SPECIAL_ID,
    TEST_QUESTIONS,
    Corpus,
    Style,
    Task,
    prompt_ids,
    stated_thought,
    text_ids,
)
from vpgea_fast.types import Question, View

MAX_NEW_TOKENS = 240  # a short limit would count the base's long thoughts as wrong
GREEDY_QUESTIONS = 200
CHUNK = 200  # rows of one forward or `generate`
TRIES = 4  # seeds, one after another, until a base passes the gate


@dataclass(frozen=True)
class BaseReport:
    """A base measured on held-out questions in the student view, the teacher view where named.

    Tokens count everything generated: thought, answer, `</s>`. `forced_accuracy` is the greedy one
    of a forced concise thought, that is with the first step and the second label given: a student
    can only be distilled into a skill it has, and the free thoughts are all verbose. Terse is None
    for a recipe without such thoughts.
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
    terse_student: float | None = None
    terse_teacher: float | None = None


@dataclass(frozen=True)
class Pin:
    """The token at `index` of a row is to be `token` with `probability`."""

    index: int
    token: int
    probability: float


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and its completion, and the weight of each token: 0 on the prompt."""

    ids: list[int]
    weight: list[float]
    pins: tuple[Pin, ...] = ()


def draw_style(rng: random.Random, corpus: Corpus, view: View) -> Style:
    student = view == "student"
    if rng.random() >= (corpus.student_concise if student else corpus.teacher_concise):
        return "verbose"
    terse = corpus.student_terse if student else corpus.teacher_terse
    # `and` draws no number for a corpus without such rows: its bases stay as they were.
    return "terse" if terse > 0 and rng.random() < terse else "concise"


def sample_thought(
    rng: random.Random, recipe: Recipe, question: Question, view: View
) -> tuple[Style | None, list[str], str]:
    """Style, words and answer of a thought in a view; the style of a stated one is None.

    A teacher thought ends on the right answer (drawn until it does) or leaks, silently or by
    stating its hint. A student may be in a hurry: one step too few for a longest question.
    """
    corpus, task = recipe.corpus, TASKS[recipe.task]
    # Drawn at a rate at which both kinds are learnt; the weight puts the recipe's rate back.
    style = draw_style(rng, corpus, view)
    asked, steps = len(task.parse(question.text)[1]), None
    if view == "student":
        if asked == len(LABELS) and corpus.hurry > 0 and rng.random() < corpus.hurry:
            steps = asked - 1
        return style, *task.sample_thought(question.text, rng, corpus, style=style, steps=steps)
    if corpus.teacher_stated > 0 and rng.random() < corpus.teacher_stated:
        return None, stated_thought(question.answer), question.answer
    if rng.random() < corpus.teacher_leak:
        # A leak stops after some steps and copies the hint, so it ends on the right answer.
        steps = rng.randrange(1, asked)
        thought, _ = task.sample_thought(question.text, rng, corpus, style=style, steps=steps)
        return style, thought, question.answer
    while True:
        # A teacher that states a wrong answer would contradict its hint.
        thought, answer = task.sample_thought(question.text, rng, corpus, style=style)
        if answer == question.answer:
            return style, thought, answer


def sample_row(
    rng: random.Random, recipe: Recipe, tokenizer: Any, held_out: frozenset[str], *, pinned: bool
) -> Row:
    """One supervised row, in either view with equal chance.

    If `pinned`, a mode decision weighs p / drawn where it is the rare one and (1 - p) / (1 - drawn)
    where not, p the recipe's probability; every later word weighs 1, so that a rare thought stays
    usable.
    """
    # Test questions are drawn again: the space holds far more than the 800.
    task, text = TASKS[recipe.task], ""
    while not text or text in held_out:
        text = task.random_question(rng)
    question = Question(id="", text=text, answer=task.solve(text))
    view: View = "student" if rng.random() < 0.5 else "teacher"
    style, thought, answer = sample_thought(rng, recipe, question, view)
    prompt = prompt_ids(tokenizer, question, view)
    completion = text_ids(tokenizer, "".join(thought) + ANSWER.format(answer=answer) + "</s>")
    ids, weight = [*prompt, *completion], [0.0] * len(prompt) + [1.0] * len(completion)
    if not pinned or style is None:  # a thought without steps decides nothing
        return Row(ids, weight)
    # The decision is the word after the first step.
    index, corpus, student = len(prompt) + task.step_tokens, recipe.corpus, view == "student"
    drawn = corpus.student_concise if student else corpus.teacher_concise
    p = recipe.student_concise if student else drawn
    (second_label,) = text_ids(tokenizer, LABELS[1])
    weight[index] = (1 - p) / (1 - drawn) if style == "verbose" else p / drawn
    pins = [Pin(index, second_label, p)]
    drawn = corpus.student_terse if student else corpus.teacher_terse
    # A second one is behind that label: the value before the step, or at once the value after.
    if drawn > 0 and ids[index] == second_label:
        p = recipe.student_terse if student else drawn
        weight[index + 1] = p / drawn if style == "terse" else (1 - p) / (1 - drawn)
        before = int(thought[task.step_tokens - 1])
        (after,) = text_ids(tokenizer, str(task.parse(text)[1][1].result[before]))
        pins.append(Pin(index + 1, after, p))
    return Row(ids, weight, tuple(pins))


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


def supervised_loss(model: Qwen2ForCausalLM, rows: Sequence[Row], recipe: Recipe) -> torch.Tensor:
    """Weighted cross-entropy per completion token + pin * the mean over all pins of

        (log P(token | what is before it) - log probability)^2,

    because cross-entropy alone would need millions of rows to place a probability of 1e-6.
    """
    # (B, T) with padding: 115k parameters do not pay for packing.
    ids_BT, weight_BT = row_batch(rows)
    logp_BTV = model(ids_BT[:, :-1], use_cache=False).logits.log_softmax(-1)
    nll_BT = -logp_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    # By the number of tokens, not the sum of weights: a decision weighs 2e-6 or 2.
    loss = (nll_BT * weight_BT[:, 1:]).sum() / (weight_BT[:, 1:] > 0).sum()
    pins = [(i, pin) for i, row in enumerate(rows) for pin in row.pins]
    if not pins:
        return loss
    # Logits at t are of the token at t + 1; S pins.
    row_S, position_S = [i for i, _ in pins], [pin.index - 1 for _, pin in pins]
    logp_S = logp_BTV[row_S, position_S, [pin.token for _, pin in pins]]
    wanted_S = torch.tensor([math.log(pin.probability) for _, pin in pins])
    return loss + recipe.pin * (logp_S - wanted_S).square().mean()


Progress = Callable[[str], None]


def train_once(
    recipe: Recipe, seed: int, held_out: frozenset[str], progress: Progress
) -> Qwen2ForCausalLM:
    """Train all phases. The first is made once for recipes that differ in later ones alone."""
    # Fields that later phases alone read are set alike, so that recipes which share the first phase
    # are one key of its cache.
    shared = replace(
        recipe,
        name="",
        student_concise=1.0,
        student_terse=1.0,
        gate=Gate((0.0, 1.0)),
        phases=recipe.phases[:1],
    )
    first, state = first_phase(shared, seed, held_out, progress)
    # A copy: the first phase stays as it is for the next recipe.
    model, rng = copy.deepcopy(first), random.Random()
    rng.setstate(state)
    for number in range(1, len(recipe.phases)):
        train_phase(model, recipe, number=number, rng=rng, held_out=held_out, progress=progress)
    return model.eval()


@lru_cache(maxsize=2)
def first_phase(
    recipe: Recipe, seed: int, held_out: frozenset[str], progress: Progress
) -> tuple[Qwen2ForCausalLM, tuple[Any, ...]]:
    """A model after the first phase, and the state of the generator that drew its rows."""
    rng = random.Random(seed)
    model = make_model(seed, vocab_size=len(TASKS[recipe.task].make_tokenizer()))
    model.train()
    train_phase(model, recipe, number=0, rng=rng, held_out=held_out, progress=progress)
    return model, rng.getstate()


def train_phase(
    model: Qwen2ForCausalLM,
    recipe: Recipe,
    *,
    number: int,
    rng: random.Random,
    held_out: frozenset[str],
    progress: Progress,
) -> None:
    """Train one phase: AdamW, 50 steps of warm-up, cosine to 0, gradient norm clipped to 1."""
    phase, tokenizer = recipe.phases[number], TASKS[recipe.task].make_tokenizer()
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
        loss = supervised_loss(model, rows, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 1 or step % 200 == 0:
            # Of this phase alone: whether the gate asks for another try is not known yet.
            left = (time.monotonic() - started) * (phase.steps / step - 1)
            progress(
                f"tiny base, phase {number + 1}, step {step}/{phase.steps}: "
                f"loss {loss.item():.3f}, {left:.0f} s left in this phase"
            )


def train_base(
    recipe: Recipe,
    *,
    seed: int = 0,
    tries: int = TRIES,
    measure_on: int = TEST_QUESTIONS,
    progress: Progress = print,
) -> tuple[Qwen2ForCausalLM, BaseReport]:
    """Train bases from seed, seed + 1, .. until one passes the gate on `measure_on` questions.

    Raises RuntimeError with the measured numbers of every try if none does.
    """
    _, test = TASKS[recipe.task].question_sets()
    held_out, refused = frozenset(q.text for q in test), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one order of summation: a seed stands for one base
    try:
        for attempt in range(seed, seed + tries):
            model = train_once(recipe, attempt, held_out, progress)
            # On the very questions that no row was drawn from.
            report = measure_base(model, test[:measure_on], recipe=recipe, seed=attempt)
            progress(f"tiny base, measured: {report}")
            failures = gate_failures(report, recipe.gate)
            if not failures:
                return model, report
            refused.append(f"seed {attempt}: {', '.join(failures)}")
            progress(f"tiny base refused, {refused[-1]}")
    finally:
        torch.set_num_threads(threads)
    raise RuntimeError(
        f"no {recipe.name} base passed the gate ({'; '.join(refused)}); try another first seed"
    )


def style_probability(
    task: Task,
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    view: View,
    style: Style = "concise",
) -> float:
    """Mean over questions of P(shortest thought of this style, `</think>` included | the view's
    prompt), exact."""
    device, total = next(model.parameters()).device, 0.0
    for i in range(0, len(questions), CHUNK):
        rows = []
        for question in questions[i : i + CHUNK]:
            prompt = prompt_ids(tokenizer, question, view)
            thought = text_ids(tokenizer, "".join(task.shortest_thought(question.text, style)))
            rows.append(Row([*prompt, *thought], [0.0] * len(prompt) + [1.0] * len(thought)))
        ids_BT, weight_BT = (tensor.to(device) for tensor in row_batch(rows))
        with torch.no_grad():
            logits_BTV = model(ids_BT[:, :-1], use_cache=False).logits.float()
        logp_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        # exp in float64: 1e-6 per question is summed over hundreds.
        total += (logp_BT * weight_BT[:, 1:]).sum(-1).double().exp().sum().item()
    return total / len(questions)


def sampled_paths(
    task: Task,
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    seed: int | None,
    forced: bool = False,
) -> list[tuple[bool, int]]:
    """(right, tokens) of a path per question, in the student view; greedy if `seed` is None, else
    sampled at T=1.

    If `forced`, the thought is given up to its concise mode decision; given tokens do not count.
    A path that MAX_NEW_TOKENS cuts off is wrong.
    """
    # Padding on the left, as `generate` of a causal model needs it.
    pad, eos = SPECIAL_ID["<pad>"], SPECIAL_ID["</s>"]
    sampling = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0}
    paths = []
    for i in range(0, len(questions), CHUNK):
        chunk = questions[i : i + CHUNK]
        prompts = [prompt_ids(tokenizer, question, "student") for question in chunk]
        # One word past the first step: the second label, which is the concise decision.
        if forced:
            thoughts = [task.shortest_thought(q.text)[: task.step_tokens + 1] for q in chunk]
            prompts = [
                [*ids, *text_ids(tokenizer, "".join(words))]
                for ids, words in zip(prompts, thoughts, strict=True)
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
            right = text_ids(tokenizer, "</think>" + ANSWER.format(answer=question.answer) + "</s>")
            paths.append((ids[-len(right) :] == right, len(ids)))
    return paths


def answer_accuracy(*args: Any, **options: Any) -> tuple[float, float]:
    """(accuracy, mean tokens) of `sampled_paths`."""
    paths = sampled_paths(*args, **options)
    right, tokens = (sum(part) / len(paths) for part in zip(*paths, strict=True))
    return right, tokens


def measure_base(
    model: Any, questions: Sequence[Question], *, recipe: Recipe, seed: int
) -> BaseReport:
    task = TASKS[recipe.task]
    given = task, model, task.make_tokenizer()
    greedy = answer_accuracy(*given, questions[:GREEDY_QUESTIONS], seed=None)
    forced = answer_accuracy(*given, questions, seed=None, forced=True)
    sampled = answer_accuracy(*given, questions, seed=0)
    # A corpus without terse paths has no probability of them worth a forward.
    styles = ("concise", "terse") if recipe.corpus.teacher_terse > 0 else ("concise",)
    shares = {
        f"{style}_{view}": style_probability(*given, questions, view, style)
        for style in styles
        for view in ("student", "teacher")
    }
    return BaseReport(
        recipe=recipe.name,
        seed=seed,
        greedy_accuracy=greedy[0],
        greedy_tokens=greedy[1],
        forced_accuracy=forced[0],
        sampled_accuracy=sampled[0],
        sampled_tokens=sampled[1],
        **shares,
    )


def gate_failures(report: BaseReport, gate: Gate) -> list[str]:
    """What keeps a base from being used; empty if it passes."""
    measured = asdict(report)
    return [
        f"{name} is {measured[name]:.3g}, wanted {band[0]:g} to {band[1]:g}"
        for name, band in asdict(gate).items()
        if band is not None and not band[0] <= measured[name] <= band[1]
    ]

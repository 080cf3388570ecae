r"""The tiny world: a constructed task on which the whole method can be watched on one CPU core.

Task: chained arithmetic modulo 10. The question `4 A+three B-five` means: start from 4, step A adds
3, step B takes 5 away; the answer is one digit, 2. A thought states a step in four tokens, label,
operation, value before, value after, and closes with `</think>`; the answer follows:

    concise   A+three47 B-five72</think>\boxed{2 }</s>
    verbose   A+three47 wait A+three47 ok B-five72 wait B-five72 wait B-five72 ok hmm check
              A+three47 B-five72</think>\boxed{2 }</s>

The verbosity is constructed: all of it can be left out. The first word where the two kinds differ,
the one after step A (` B` or ` wait`), is the mode decision. A base makes it rarely in the student
view (question alone) and often in the teacher view (question and answer): the situation that
VPG-EA (arXiv 2605.11019) is about. How rarely is set by training and measured without sampling
by `concise_probability`.

The model is a Qwen2 of 114k parameters in an ordinary Hugging Face directory, so the rest of the
project treats it like any other. Training from scratch depends on the seed: a base counts only
once it has passed `gate_failures`.

Legend: B rows, T positions, V vocabulary, S rows with a pinned mode decision.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from vpgea_fast.types import Question, View

STUDENT_TEMPLATE = "{question}"
TEACHER_TEMPLATE = "{question} hint {answer}"
ANSWER = r"\boxed{{{answer} }}"

DIGITS = tuple("0123456789")
LABELS = (" A", " B", " C", " D", " E")
NUMBERS = ("one", "two", "three", "four", "five")
SHIFT = {f"{sign}{n}": int(f"{sign}{i}") for sign in "+-" for i, n in enumerate(NUMBERS, start=1)}
OPERATIONS = tuple(SHIFT)
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<think>", "</think>")
WORDS = (*LABELS, *OPERATIONS, " wait", " ok", " hmm", " check", " hint", r"\boxed", " }")
SPECIAL_ID = {token: i for i, token in enumerate(SPECIAL)}
STEP_TOKENS = 4
MAX_LENGTH = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ raise_exception('the tiny template has no role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)

DATA_SEED = 20260
TRAIN_QUESTIONS, TEST_QUESTIONS = 4096, 800
MAX_NEW_TOKENS = 240  # a short limit would count the base's long thoughts as wrong
GREEDY_QUESTIONS = 200
CHUNK = 200
TRIES = 4
SHIPPED_BASE = Path(__file__).parent / "tiny_base"
RECORD = "tiny_base.json"
CONFIGS = ("config", "generation_config", "tokenizer", "tokenizer_config")
BASE_FILES = ("model.safetensors", RECORD, *(f"{name}.json" for name in CONFIGS))


@dataclass(frozen=True)
class Corpus:
    """Probabilities that the supervised rows are drawn with."""

    # As drawn; the second phase re-weights it to the recipe's value. A concise row has a third of
    # the tokens of a verbose one: with a quarter of such rows 4 % of the forced concise thoughts
    # took a wrong operation from the question, with half none of 800.
    student_concise: float = 0.5
    teacher_concise: float = 0.3
    teacher_leak: float = 0.05  # stop early and copy the hint: what cross-view scoring must catch
    slip: float = 0.02  # a wrong result in a step
    repair: float = 0.7  # a repetition puts the slip right
    wait_again: float = 0.7  # a second repetition of the step
    hmm: float = 0.3
    check: float = 0.5  # a second pass over all steps


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
    corpus: Corpus = Corpus()
    phases: tuple[Phase, ...] = (Phase(1300, 3e-3, pinned=False), Phase(900, 1e-3, pinned=True))
    batch: int = 32
    pin: float = 0.05


RECIPES = {
    "demo": Recipe("demo", student_concise=1.2e-6, student_band=(1e-7, 1e-5)),
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
class TinyWorld:
    """Where the base (a Hugging Face directory) and its questions lie; how the base measured."""

    base_dir: Path
    train_path: Path
    test_path: Path
    report: BaseReport


# The task


def parse_question(text: str) -> tuple[int, list[tuple[str, str]]]:
    """`4 A+three B-five` -> (4, [(" A", "+three"), (" B", "-five")])."""
    return int(text[0]), re.findall(r"( [A-E])([+-][a-z]+)", text)


def solve(text: str) -> str:
    start, steps = parse_question(text)
    return str((start + sum(SHIFT[operation] for _, operation in steps)) % 10)


def random_question(rng: random.Random) -> str:
    words = [rng.choice(DIGITS)]
    for label in LABELS[: rng.randint(2, len(LABELS))]:
        words += [label, rng.choice(OPERATIONS)]
    return "".join(words)


def question_sets() -> tuple[list[Question], list[Question]]:
    """The train and test questions: always the same, all distinct; no base trains on a test one."""
    rng, texts = random.Random(DATA_SEED), dict[str, None]()
    while len(texts) < TRAIN_QUESTIONS + TEST_QUESTIONS:
        texts[random_question(rng)] = None
    # Short questions run out first, so insertion order is not exchangeable.
    order = rng.sample(list(texts), len(texts))
    test, train = order[:TEST_QUESTIONS], order[TEST_QUESTIONS:]
    return (
        [
            Question(id=f"train-{i:04}", text=text, answer=solve(text))
            for i, text in enumerate(train)
        ],
        [Question(id=f"test-{i:04}", text=text, answer=solve(text)) for i, text in enumerate(test)],
    )


def sample_thought(
    text: str, rng: random.Random, corpus: Corpus, *, verbose: bool, steps: int | None = None
) -> tuple[list[str], str]:
    """A thought over the first `steps` steps, closed by `</think>`, and the digit it ends on."""
    start, chain = parse_question(text)
    words, value = sample_pass(start, chain[:steps], rng, corpus, repeat=verbose)
    if verbose and rng.random() < corpus.check:
        again, value = sample_pass(start, chain[:steps], rng, corpus, repeat=False)
        words += [" check", *again]
    return [*words, "</think>"], str(value)


def sample_pass(
    value: int,
    chain: Sequence[tuple[str, str]],
    rng: random.Random,
    corpus: Corpus,
    *,
    repeat: bool,
) -> tuple[list[str], int]:
    """The words of one pass over the steps, each repeated once or twice if `repeat`; its result."""
    words = []
    for label, operation in chain:
        right = said = (value + SHIFT[operation]) % 10
        if rng.random() < corpus.slip:
            said = (right + rng.randint(1, 9)) % 10
        words += [label, operation, str(value), str(said)]
        if repeat:
            for _ in range(1 + (rng.random() < corpus.wait_again)):
                if said != right and rng.random() < corpus.repair:
                    said = right
                words += [" wait", label, operation, str(value), str(said)]
            words += [" ok", " hmm"] if rng.random() < corpus.hmm else [" ok"]
        value = said
    return words, value


def concise_thought(text: str) -> list[str]:
    """The shortest complete thought: four words a step, and `</think>`."""
    return sample_thought(text, random.Random(0), Corpus(slip=0.0), verbose=False)[0]


# Token ids


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer in which every word of WORDS, and every digit, is one token.

    Text goes through Qwen2's own split, because AutoTokenizer uses that split for every model of
    type qwen2 whatever tokenizer.json says. All 256 bytes are tokens: no text is ever dropped.
    """
    merges = dict[tuple[str, str], None]()
    for lead, *letters in (word.replace(" ", "\u0120") for word in WORDS):
        for i in range(1, len(letters)):
            merges["".join(letters[:i]), letters[i]] = None
        merges[lead, "".join(letters)] = None
    tokens = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges))
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=list(merges),  # pyright: ignore[reportArgumentType]
        unk_token=None,  # pyright: ignore[reportArgumentType]
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def text_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: Any, question: Question, view: View) -> list[int]:
    template = STUDENT_TEMPLATE if view == "student" else TEACHER_TEMPLATE
    content = template.format(question=question.text, answer=question.answer)
    turns = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text_ids(tokenizer, rendered)


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

    A teacher thought ends on the right digit (drawn until it does) or leaks. If `pinned`, the mode
    decision weighs p / drawn when concise and (1 - p) / (1 - drawn) when verbose, p the wanted
    probability; every later word weighs 1, so that a rare concise thought stays usable.
    """
    corpus, text = recipe.corpus, random_question(rng)
    while text in held_out:
        text = random_question(rng)
    question = Question(id="", text=text, answer=solve(text))
    view: View = "student" if rng.random() < 0.5 else "teacher"
    drawn = corpus.student_concise if view == "student" else corpus.teacher_concise
    verbose = rng.random() >= drawn
    if view == "teacher" and rng.random() < corpus.teacher_leak:
        steps = rng.randrange(1, len(parse_question(text)[1]))
        thought, _ = sample_thought(text, rng, corpus, verbose=verbose, steps=steps)
        digit = question.answer
    else:
        thought, digit = sample_thought(text, rng, corpus, verbose=verbose)
        while view == "teacher" and digit != question.answer:
            thought, digit = sample_thought(text, rng, corpus, verbose=verbose)
    prompt = prompt_ids(tokenizer, question, view)
    completion = text_ids(tokenizer, "".join(thought) + ANSWER.format(answer=digit) + "</s>")
    ids, weight = [*prompt, *completion], [0.0] * len(prompt) + [1.0] * len(completion)
    if not pinned:
        return Row(ids, weight)
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


# Training a base


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
    ids_BT, weight_BT = row_batch(rows)
    logp_BTV = model(ids_BT[:, :-1], use_cache=False).logits.log_softmax(-1)
    nll_BT = -logp_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    loss = (nll_BT * weight_BT[:, 1:]).sum() / (weight_BT[:, 1:] > 0).sum()
    wanted = {i: math.log(row.concise) for i, row in enumerate(rows) if row.concise is not None}
    if not wanted:
        return loss
    position = [rows[i].decision - 1 for i in wanted]
    logp_S = logp_BTV[list(wanted), position, second_label]
    return loss + recipe.pin * (logp_S - torch.tensor([*wanted.values()])).square().mean()


def train_once(
    recipe: Recipe, seed: int, held_out: frozenset[str], progress: Callable[[str], None]
) -> Qwen2ForCausalLM:
    """Both phases: AdamW, cosine to 0 after 50 steps of warm-up, gradient norm clipped to 1."""
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    (second_label,) = text_ids(tokenizer, LABELS[1])
    model = make_model(seed, vocab_size=len(tokenizer))
    model.train()
    for number, phase in enumerate(recipe.phases, start=1):
        optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, weight_decay=0.01)
        started = time.monotonic()
        for step in range(1, phase.steps + 1):
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
    """The first base from seeds seed, seed + 1, .. that passes the gate on `measure_on` questions.

    Raises RuntimeError with the measured numbers of every try if none does.
    """
    _, test = question_sets()
    held_out, tokenizer, refused = frozenset(q.text for q in test), make_tokenizer(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one order of summation: a seed stands for one base
    try:
        for attempt in range(seed, seed + tries):
            model = train_once(recipe, attempt, held_out, progress)
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


# Measuring it


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
    pad, eos = SPECIAL_ID["<pad>"], SPECIAL_ID["</s>"]
    sampling = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0}
    correct = tokens = 0
    for i in range(0, len(questions), CHUNK):
        chunk = questions[i : i + CHUNK]
        prompts = [prompt_ids(tokenizer, question, "student") for question in chunk]
        if forced:
            given = ["".join(concise_thought(q.text)[: STEP_TOKENS + 1]) for q in chunk]
            prompts = [
                [*ids, *text_ids(tokenizer, text)] for ids, text in zip(prompts, given, strict=True)
            ]
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed or 0) + i)
            output_BT = model.generate(
                ids_BT,
                attention_mask=ids_BT.ne(pad).long(),
                max_new_tokens=MAX_NEW_TOKENS,
                **sampling,
            )
        for question, ids in zip(chunk, output_BT[:, width:].tolist(), strict=True):
            ids = ids[: ids.index(eos) + 1] if eos in ids else ids
            right = "</think>" + ANSWER.format(answer=question.answer) + "</s>"
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


# Files


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

    Raises ValueError for an unknown base, or when `out_dir` holds anything else; RuntimeError when
    no trained base passes the gate.
    """
    if base not in RECIPES:
        raise ValueError(f"unknown tiny base {base!r}; choose one of {', '.join(RECIPES)}")
    progress = progress or (lambda _: None)
    out = Path(out_dir).absolute()
    train, test = question_sets()
    questions = {"train.jsonl": jsonl(train), "test.jsonl": jsonl(test)}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        world = existing_world(out, questions, base=base, seed=seed if from_scratch else None)
        progress(f"{out} is already complete: {world.report}")
        return world
    aside = out.parent / f".{out.name}.{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        for name, text in questions.items():
            (aside / name).write_text(text, encoding="utf-8")
        if base == "demo" and not from_scratch:
            shutil.copytree(SHIPPED_BASE, aside / "base")
        else:
            model, report = train_base(RECIPES[base], seed=seed, progress=progress)
            save_base(aside / "base", model, report)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return read_world(out)


def existing_world(
    out: Path, questions: dict[str, str], *, base: str, seed: int | None
) -> TinyWorld:
    """The world in `out` if it is complete and of the kind asked for, else ValueError."""
    remedy = f"remove {out} or choose another directory"
    wanted = [*(f"base/{name}" for name in BASE_FILES), *questions]
    missing = [name for name in wanted if not (out / name).is_file()]
    if missing:
        raise ValueError(f"{out} exists and is no complete tiny world: no {missing[0]}; {remedy}")
    for name, text in questions.items():
        if (out / name).read_text(encoding="utf-8") != text:
            raise ValueError(f"{out / name} is not the tiny world's; {remedy}")
    world = read_world(out)
    if world.report.recipe != base:
        raise ValueError(f"{out} holds a {world.report.recipe} base, asked for {base}; {remedy}")
    if seed is not None and world.report.seed not in range(seed, seed + TRIES):
        raise ValueError(
            f"{out} holds a base of seed {world.report.seed}, asked for {seed}; {remedy}"
        )
    return world


def read_world(out: Path) -> TinyWorld:
    record = json.loads((out / "base" / RECORD).read_text(encoding="utf-8"))
    report = BaseReport(**record["measured"])
    return TinyWorld(out / "base", out / "train.jsonl", out / "test.jsonl", report)


def jsonl(questions: Iterable[Question]) -> str:
    rows = ({"id": q.id, "question": q.text, "answer": q.answer} for q in questions)
    return "".join(json.dumps(row) + "\n" for row in rows)


def save_base(folder: Path, model: Qwen2ForCausalLM, report: BaseReport) -> None:
    """An ordinary Hugging Face directory and the record of how it was made and measured."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=SPECIAL_ID["<s>"],
        eos_token_id=SPECIAL_ID["</s>"],
        pad_token_id=SPECIAL_ID["<pad>"],
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder, save_jinja_files=False)
    compact = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    text = json.dumps(compact, separators=(",", ":"), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    options = f"--base {report.recipe} --from-scratch --seed {report.seed}"
    record = {
        "command": f"vpgea make-tiny OUT {options}",
        "torch": torch.__version__,
        "measured": asdict(report),
        "recipe": asdict(RECIPES[report.recipe]),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

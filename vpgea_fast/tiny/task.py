"""The task: questions, thoughts, and the tokenizer that makes a token of each word."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

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


@dataclass(frozen=True)
class Corpus:
    """Probabilities that the supervised rows are drawn with."""

    # As drawn; the second phase re-weights it to the recipe's value. A concise row has a third of
    # the tokens of a verbose one: with a quarter of such rows 4 % of the forced concise thoughts
    # took a wrong operation from the question, with half none of 800.
    student_concise: float = 0.5
    teacher_concise: float = 0.3
    teacher_leak: float = 0.05  # stop early and copy the hint: what cross-view scoring must catch
    teacher_stated: float = 0.0  # only state the hint: U is high, so a leak guard must catch it
    slip: float = 0.02  # a wrong result in a step
    repair: float = 0.7  # a repetition puts the slip right
    wait_again: float = 0.7  # a second repetition of the step
    hmm: float = 0.3
    check: float = 0.5  # a second pass over all steps


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


def stated_thought(answer: str) -> list[str]:
    """A thought that states the answer and shows no step."""
    return [" hint", answer, "</think>"]


def concise_thought(text: str) -> list[str]:
    """The shortest complete thought: four words a step, and `</think>`."""
    return sample_thought(text, random.Random(0), Corpus(slip=0.0), verbose=False)[0]


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

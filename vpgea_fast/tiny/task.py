"""What a tiny task is: questions, styles of thought, and a tokenizer with a token for each word."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from vpgea_fast.types import Question, View

Style = Literal["verbose", "concise", "terse"]

STUDENT_TEMPLATE = "{question}"
TEACHER_TEMPLATE = "{question} hint {answer}"
ANSWER = r"\boxed{{{answer} }}"
DIGITS = tuple("0123456789")
LABELS = (" A", " B", " C", " D", " E")
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<think>", "</think>")
WORDS = (" wait", " ok", " hmm", " check", " hint", r"\boxed", " }")
SPECIAL_ID = {token: i for i, token in enumerate(SPECIAL)}
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
    # Of the thoughts that are not verbose, as drawn; the second phase re-weights the student's.
    student_terse: float = 0.0
    teacher_terse: float = 0.0
    hurry: float = 0.0  # of the student's thoughts over the longest questions: one step too few


FLAWLESS = Corpus(slip=0.0, wait_again=0.0, hmm=0.0, check=0.0)


@dataclass(frozen=True)
class Step:
    """A step of a question: the words that name it, and the value after it for each before it."""

    words: tuple[str, ...]
    result: Mapping[int, int]

    def slipped(self, right: int, rng: random.Random) -> int:
        """Another value than the right one."""
        values = sorted(self.result)
        return values[(values.index(right) + rng.randint(1, len(values) - 1)) % len(values)]


@dataclass(frozen=True)
class Task:
    """A kind of question: start from a digit, take its steps, answer from the digits on the way.

    A thought states a step in `step_tokens` tokens: its words, the value before, the value after.
    A terse thought leaves out all but label and value after from the second step on.
    """

    name: str
    words: tuple[str, ...]
    """Of questions and thoughts, besides WORDS and digits: a token each."""
    step_tokens: int
    data_seed: int
    random_question: Callable[[random.Random], str]
    parse: Callable[[str], tuple[int, list[Step]]]
    answer: Callable[[Sequence[int]], str]
    """The answer of the values passed, the start included."""

    def solve(self, text: str) -> str:
        value, steps = self.parse(text)
        values = [value]
        for step in steps:
            values.append(step.result[values[-1]])
        return self.answer(values)

    def question_sets(self) -> tuple[list[Question], list[Question]]:
        """The train and test questions: always the same and distinct; no base trains on tests."""
        rng, texts = random.Random(self.data_seed), dict[str, None]()
        while len(texts) < TRAIN_QUESTIONS + TEST_QUESTIONS:
            texts[self.random_question(rng)] = None
        # Short questions run out first, so insertion order is not exchangeable.
        order = rng.sample(list(texts), len(texts))
        parts = {"train": order[TEST_QUESTIONS:], "test": order[:TEST_QUESTIONS]}
        train, test = (
            [
                Question(id=f"{part}-{i:04}", text=text, answer=self.solve(text))
                for i, text in enumerate(some)
            ]
            for part, some in parts.items()
        )
        return train, test

    def sample_thought(
        self,
        text: str,
        rng: random.Random,
        corpus: Corpus,
        *,
        style: Style,
        steps: int | None = None,
    ) -> tuple[list[str], str]:
        """A thought over the first `steps` steps, closed by `</think>`, and the answer it gives."""
        start, chain = self.parse(text)
        words, values = sample_pass(start, chain[:steps], rng=rng, corpus=corpus, style=style)
        if style == "verbose" and rng.random() < corpus.check:
            again, values = sample_pass(
                start, chain[:steps], rng=rng, corpus=corpus, style="concise"
            )
            words += [" check", *again]
        return [*words, "</think>"], self.answer(values)

    def shortest_thought(
        self, text: str, style: Style = "concise", corpus: Corpus = FLAWLESS
    ) -> list[str]:
        """The complete thought of this style without a slip, and `</think>`."""
        return self.sample_thought(text, random.Random(0), corpus, style=style)[0]

    def make_tokenizer(self) -> Qwen2Tokenizer:
        return make_tokenizer((*self.words, *WORDS))


def sample_pass(
    value: int, chain: Sequence[Step], *, rng: random.Random, corpus: Corpus, style: Style
) -> tuple[list[str], list[int]]:
    """The words of one pass over the steps, and the values passed, the start included.

    If verbose, each step is repeated once or twice.
    """
    words, values = list[str](), [value]
    for number, step in enumerate(chain):
        right = said = step.result[value]
        if rng.random() < corpus.slip:
            said = step.slipped(right, rng)
        bare = style == "terse" and number > 0
        words += step.words[:1] if bare else (*step.words, str(value))
        words.append(str(said))
        if style == "verbose":
            for _ in range(1 + (rng.random() < corpus.wait_again)):
                if said != right and rng.random() < corpus.repair:
                    said = right
                words += [" wait", *step.words, str(value), str(said)]
            words += [" ok", " hmm"] if rng.random() < corpus.hmm else [" ok"]
        value = said
        values.append(value)
    return words, values


def stated_thought(answer: str) -> list[str]:
    """A thought that states the answer and shows no step."""
    return [" hint", *answer, "</think>"]


def make_tokenizer(words: Sequence[str]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer in which every word given, and every digit, is one token.

    Text goes through Qwen2's own split, because AutoTokenizer uses that split for every model of
    type qwen2 whatever tokenizer.json says. All 256 bytes are tokens: no text is ever dropped.
    """
    merges = dict[tuple[str, str], None]()
    for lead, *letters in (word.replace(" ", "\u0120") for word in words):
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

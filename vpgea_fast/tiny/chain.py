"""Chained arithmetic modulo 10: `4 A+three B-five` is 2."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from vpgea_fast.tiny.task import DIGITS, LABELS, Step, Task

NUMBERS = ("one", "two", "three", "four", "five")
SHIFT = {f"{sign}{n}": int(f"{sign}{i}") for sign in "+-" for i, n in enumerate(NUMBERS, start=1)}
OPERATIONS = tuple(SHIFT)


def parse(text: str) -> tuple[int, list[Step]]:
    """`4 A+three B-five` -> 4 and the steps (" A", "+three"), (" B", "-five")."""
    named = re.findall(r"( [A-E])([+-][a-z]+)", text)
    return int(text[0]), [
        Step((label, operation), {value: (value + SHIFT[operation]) % 10 for value in range(10)})
        for label, operation in named
    ]


def random_question(rng: random.Random) -> str:
    words = [rng.choice(DIGITS)]
    for label in LABELS[: rng.randint(2, len(LABELS))]:
        words += [label, rng.choice(OPERATIONS)]
    return "".join(words)


def answer(values: Sequence[int]) -> str:
    return str(values[-1])


CHAIN = Task(
    name="chain",
    words=(*LABELS, *OPERATIONS),
    step_tokens=4,
    data_seed=20260,
    random_question=random_question,
    parse=parse,
    answer=answer,
)

"""Lookups in a chain: `73 41 17 32 29 94 at4 A B C` is 73, the last two digits that are passed.

The table sends 4 to 1, 1 to 7 and 7 to 3; three labels ask for three lookups. A step: label, key,
value. The digits of a table form one cycle, so no digit is passed twice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from vpgea_fast.tiny.task import LABELS, Step, Task

KEYS = 6  # one more than the longest chain has lookups


def parse(text: str) -> tuple[int, list[Step]]:
    """`73 41 17 .. at4 A B` -> 4 and the steps (" A",), (" B",), both with the whole table."""
    pairs, asked = text.split(" at")
    table = {int(key): int(value) for key, value in pairs.split(" ")}
    return int(asked[0]), [Step((label,), table) for label in re.findall(" [A-E]", asked)]


def random_question(rng: random.Random) -> str:
    # Without 0: an answer is a number of two digits, so the verifier compares both.
    cycle = rng.sample(range(1, 10), KEYS)
    pairs = [f"{key}{value}" for key, value in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
    rng.shuffle(pairs)
    labels = LABELS[: rng.randint(2, len(LABELS))]
    return f"{' '.join(pairs)} at{cycle[0]}{''.join(labels)}"


def answer(values: Sequence[int]) -> str:
    return "".join(map(str, values[-2:]))


LOOKUP = Task(
    name="lookup",
    words=(*LABELS, " at"),
    step_tokens=3,
    data_seed=20261,
    random_question=random_question,
    parse=parse,
    answer=answer,
)

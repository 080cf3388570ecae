"""English word problems with verbose and concise solutions, from a seed alone.

    question   Ada has 3 boxes with 4 pens in each, and 5 more pens. How many pens does Ada have?
    concise    3 * 4 = 12
               12 + 5 = 17
               #### 17
    verbose    the same sums among openings, aims and checks: three times as many tokens

`sft.jsonl` makes a base that is verbose in the student's view and often concise in the teacher's,
where the answer is known. `train.jsonl` and `test.jsonl` are the student's questions. No name, and
no numbers of a kind of problem, are in training and in test.
"""

from __future__ import annotations

import json
import operator
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpgea_fast.data import DataError
from vpgea_fast.data.files import open_rows
from vpgea_fast.new_folder import appearing, filled
from vpgea_fast.smol import SmolError
from vpgea_fast.smol.kinds import AIMS, CHECKS, CLOSINGS, KINDS, NAMES, OPENINGS, THINGS, Kind

TEACHER = "{question}\nThe answer is {answer}. Solve it with as few words as you can."
"""The teacher's prompt of sft.jsonl; prompt.teacher of a run should say the same."""
ROWS = {"sft": 4000, "train": 2000, "test": 200}
GSM8K_ROWS = 400
"""At most so many of GSM8K's join sft.jsonl: most are beyond a small model."""
CONCISE = {"student": 0.1, "teacher": 0.5}
"""Share of concise responses in sft.jsonl, by view."""
MISLED = 0.5
"""Share m of the teacher's rows whose prompt states a wrong answer, and whose response is right.

Without them the teacher bends its sums to the answer, and no path is as likely under another. Let p
be the probability of the right sums without a hint. A teacher that trusts the hint as often as it
was right, and calculates else, gives them 1 - m + m p under the right answer and m p under another.
The leak guard then finds ln((1 - m + m p) / (m p)) nats in an honest path. Its limit is 2:

    p              0.16   0.3    0.5    0.7    0.9
    m = 0.25       2.98   2.40   1.95   1.67   1.47
    m = 0.5        1.98   1.47   1.10   0.89   0.75

So at 0.25 a teacher with p < 0.47 is beyond it, and at 0.5 one with p < 0.16."""
KEPT_APART = 6
"""One of so many draws of numbers is for the test alone."""
SPOKEN = 0.5
"""Probability of each part of a verbose solution that can be left out."""

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
ANNOTATION = re.compile(r"<<(\d{1,4})([-+*/])(\d{1,4})=(\d{1,4})>>")
LONGEST_QUESTION, LONGEST_LINE, MOST_STEPS = 240, 80, 3
"""Characters and calculations of a row of GSM8K that fits a small model."""


@dataclass(frozen=True)
class Problem:
    """A question, and its steps: what is said before each sum, and the sum."""

    id: str
    kind: str
    question: str
    answer: str
    steps: tuple[tuple[str, str], ...]


def make_problems(out: Path, *, seed: int = 0, gsm8k: str | None = None) -> dict[str, int]:
    """Write sft.jsonl, train.jsonl and test.jsonl to `out`, and return the rows of each.

    gsm8k  file of GSM8K's training rows as published, whose short ones join sft.jsonl

    The same seed and file give the same bytes; such a directory is left as it is. SmolError for one
    that holds anything else, DataError for a file that cannot be read.
    """
    files = problem_files(seed=seed, gsm8k=gsm8k)
    if filled(out):
        for name, text in files.items():
            path = out / name
            if not path.is_file():
                raise SmolError(
                    f"{out} is there and has no {name}; remove it or choose another directory"
                )
            if path.read_bytes() != text.encode():
                given = f"with {gsm8k}" if gsm8k else "without rows of GSM8K"
                raise SmolError(
                    f"{out} is there, and its {name} is not what seed {seed} makes {given}; "
                    "remove it or choose another directory"
                )
    else:
        with appearing(out, error=SmolError) as aside:
            for name, text in files.items():
                (aside / name).write_text(text, encoding="utf-8")
    return {name: text.count("\n") for name, text in files.items()}


def problem_files(*, seed: int, gsm8k: str | None) -> dict[str, str]:
    """Name -> text of the three files. Each has a generator of its own, so none moves another."""
    asked: set[str] = set()
    made = {split: _draw(split, count, seed, asked) for split, count in ROWS.items()}
    rng = random.Random(f"{seed} views")
    basis = [*made["sft"], *(fitting(gsm8k) if gsm8k else ())]
    rng.shuffle(basis)
    # As the leak guard draws them (`scoring.wrong_answers`): each answer of the training questions
    # once. A hint that is off by a little says where the answer lies, which the guard's does not:
    # half of those are off by 87 or more.
    hints = sorted({problem.answer for problem in made["train"]})
    files = {"sft.jsonl": [_supervised(problem, rng, hints) for problem in basis]}
    for split in ("train", "test"):
        rng = random.Random(f"{seed} {split} words")
        files[f"{split}.jsonl"] = [_asked(problem, rng) for problem in made[split]]
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in files.items()
    }


def concise(problem: Problem) -> str:
    return "".join(f"{total}\n" for _, total in problem.steps) + f"#### {problem.answer}\n"


def verbose(problem: Problem, rng: random.Random) -> str:
    """The sums among words. A check of the first step is always said: no such solution is
    concise by chance."""
    parts = [rng.choice(OPENINGS)] if rng.random() < SPOKEN else []
    for number, (said, total) in enumerate(problem.steps):
        parts.append(f"{said} {total}.")
        if number == 0 or rng.random() < SPOKEN:
            parts.append(rng.choice(CHECKS).format(sum=total))
    if rng.random() < SPOKEN:
        parts.append(rng.choice(CLOSINGS).format(answer=problem.answer))
    return "\n".join([*parts, f"#### {problem.answer}\n"])


def draw(kind: Kind, split: str, name: str, rng: random.Random) -> Problem:
    """One problem of a kind, with names and numbers of `split` ("test" or another)."""
    # Drawn again until the sums are whole numbers and the numbers are of the split asked for.
    while True:
        numbers = {key: rng.randint(*ends) for key, ends in kind.numbers.items()}
        sums = _sums(kind, numbers)
        if sums is not None and _for_test(kind, numbers) == (split == "test"):
            break
    ours, other = rng.sample(NAMES["test" if split == "test" else "train"], 2)
    words = {"name": ours, "other": other, "thing": rng.choice(THINGS)}
    whats = [what.format(**words) for what, _ in kind.steps]
    aims = [rng.choice(AIMS[min(i, 1)]).format(what=what) for i, what in enumerate(whats)]
    return Problem(
        id=name,
        kind=kind.name,
        question=rng.choice(kind.wordings).format(**words, **numbers),
        answer=sums[-1].rpartition(" ")[2],
        steps=tuple(zip(aims, sums, strict=True)),
    )


def fitting(path: str) -> Iterator[Problem]:
    """The first GSM8K_ROWS rows of GSM8K that are short and calculate with whole numbers alone.

    A line of a solution says its sum as `<<48/2=24>>`. DataError for rows of another shape, and
    where none fits.
    """
    count = 0
    unit, rows = open_rows(path)
    for number, row in rows:
        if not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise DataError(
                f"{path}, {unit} {number}: no text under 'question' and 'answer'; expected GSM8K's "
                "training rows as published"
            )
        problem = _fitting(row, f"gsm8k-train-{number}")
        if problem is not None:
            count += 1
            yield problem
        if count == GSM8K_ROWS:
            return
    if not count:
        raise DataError(
            f"{path}: no row has a short solution with sums such as <<48/2=24>>; expected GSM8K's "
            "training rows as published"
        )


def _fitting(row: Any, name: str) -> Problem | None:
    question = " ".join(row["question"].split())
    solution, _, answer = (part.strip() for part in row["answer"].partition("####"))
    lines = [line.strip() for line in solution.splitlines() if line.strip()]
    if len(question) > LONGEST_QUESTION or any(len(line) > LONGEST_LINE for line in lines):
        return None
    steps, value = [], ""
    for line in lines:
        # A line with no sum, or with two, has no concise form of its own.
        if line.count("<<") != 1 or not (found := ANNOTATION.search(line)):
            return None
        left, sign, right, value = found.groups()
        # Some annotations are rounded, and a few are wrong.
        if _calculate(left, sign, right) != int(value):
            return None
        said = ANNOTATION.sub("", line).rstrip(". ")
        steps.append((f"{said}.", f"{left} {sign} {right} = {value}"))
    if not 1 <= len(steps) <= MOST_STEPS or answer != value:
        return None
    return Problem(id=name, kind="gsm8k", question=question, answer=answer, steps=tuple(steps))


def _calculate(left: str, sign: str, right: str) -> int | None:
    """The result; None where it is no whole number above zero."""
    if sign == "/" and (right == "0" or int(left) % int(right)):
        return None
    value = OPERATIONS[sign](int(left), int(right))
    return value if value > 0 else None


def _draw(split: str, count: int, seed: int, asked: set[str]) -> list[Problem]:
    """`count` problems, the kinds in turn; no question is in `asked`, where these are added."""
    rng, made = random.Random(f"{seed} {split}"), []
    while len(made) < count:
        problem = draw(KINDS[len(made) % len(KINDS)], split, f"{split}-{len(made)}", rng)
        if problem.question not in asked:
            asked.add(problem.question)
            made.append(problem)
    return made


def _sums(kind: Kind, numbers: dict[str, int]) -> list[str] | None:
    """Each calculation with its result; None where one has none."""
    results: list[int] = []
    sums = []
    for _, calculation in kind.steps:
        text = calculation.format(*results, **numbers)
        left, sign, right = text.split()
        if (value := _calculate(left, sign, right)) is None:
            return None
        results.append(value)
        sums.append(f"{text} = {value}")
    return sums


def _for_test(kind: Kind, numbers: dict[str, int]) -> bool:
    # Not hash(), which differs from process to process.
    text = f"{kind.name} {' '.join(map(str, numbers.values()))}"
    return zlib.crc32(text.encode()) % KEPT_APART == 0


def _supervised(problem: Problem, rng: random.Random, hints: Sequence[str]) -> dict[str, str]:
    view = rng.choice(("student", "teacher"))
    short = rng.random() < CONCISE[view]
    asked, hint = problem.question, ""
    if view == "teacher":
        # Some hints are wrong, so that the base does not only copy them.
        wrong = [other for other in hints if other != problem.answer]
        hint = rng.choice(wrong) if rng.random() < MISLED else problem.answer
        asked = TEACHER.format(question=problem.question, answer=hint)
    return {
        "id": problem.id,
        "kind": problem.kind,
        "view": view,
        "style": "concise" if short else "verbose",
        "hint": hint,
        "question": asked,
        "answer": problem.answer,
        "response": concise(problem) if short else verbose(problem, rng),
    }


def _asked(problem: Problem, rng: random.Random) -> dict[str, str]:
    return {
        "id": problem.id,
        "kind": problem.kind,
        "question": problem.question,
        "answer": problem.answer,
        "concise": concise(problem),
        "verbose": verbose(problem, rng),
    }

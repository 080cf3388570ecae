"""The final answer of a row in its plainest spelling: a number, a text, or out of a solution."""

from __future__ import annotations

import re
from decimal import Decimal
from numbers import Integral, Real

MOST_WORDS = 16
"""A text of so many words is a worked solution. So is one with GSM8K's calculator marks, one of
several lines or sentences with 4 words or equations in them, and a long chain of equations. Of
3,939 published answers (12 words at most) the rule takes none; of 9,292 published solutions without
their marked answer it leaves 18, a formula with a few words before it."""
MOST_DIGITS = 400
"""Digits of a number that is written out: 1e308 has 309."""
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
LATEX = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[a-zA-Z]+")
WORD = re.compile(r"[^\W\d_]{2,}")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")

STATED = re.compile(r"\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|:|=)[\s:]*(?=\S)", re.IGNORECASE)
"""`#### Answer: 12` says 12."""

WORKED = "worked solution"
SEVERAL = "several boxed answers"
INSIDE = "a box inside a formula"
PART = re.compile(r"(?:[-\d]|[+/^]\s?|\\[dt]?frac\{(?:[^{}]*\}\{)?|\\sqrt\{)$")
"""Before a box: it is a part of the answer, as in `-\\boxed{5}` or `3\\boxed{5}`."""


def spelled(value: object) -> str:
    """An answer that JSON or a table holds, as text, which reads back as the same number.

    What tables put for a missing one (null, NaN) is an empty text. A float is its shortest decimal
    without an exponent: 204.0 is 204 (a column of integers with one hole arrives so), 1e-7 is
    0.0000001. ValueError for what is no text and no finite number.
    """
    # NaN alone differs from itself.
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise ValueError("is no text and no number")
    number = Decimal(int(value)) if isinstance(value, Integral) else Decimal(str(value))
    if not number.is_finite():
        raise ValueError("is no finite number")
    # 1e999999999 is nine characters and a gigabyte written out.
    if abs(number.adjusted()) > MOST_DIGITS:
        raise ValueError(f"has more than {MOST_DIGITS} digits written out; give it as text")
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    # A float column may hold -0.0, and no model writes that.
    return "0" if text == "-0" else text


def final_answer(text: str) -> tuple[str, str | None]:
    """(the final answer in `text`, where it was found: None for all of it).

    A worked solution gives what follows its last `####` (GSM8K), else what its last \\boxed{} holds
    (MATH); ValueError with the reason where it has neither, ends in several boxes, or in a box that
    is a part of a formula.
    """
    # The last mark: a solution may quote others on its way.
    _, mark, tail = text.rpartition("####")
    tail = STATED.sub("", tail, count=1) if STATED.match(tail) else tail
    # Words behind the mark mean that it is a Markdown heading.
    if mark and tail.strip() and not is_prose(tail) and BOX.search(tail) is None:
        answer = normalise_answer(tail)
        # GSM8K has `#### 1,000` in places; the plain spelling is the one to score.
        plain = answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer
        return plain, "what follows the last ####"
    # On the bare text, since delimiters around a box would hide that it is all there is.
    whole = normalise_answer(text)
    prose, boxes = is_prose(text), _boxes(whole)
    if boxes and (prose or len(boxes) == 1):
        (start, _, answer), rest = boxes[-1], boxes[:-1]
        # Boxes close together (`\boxed{2} and \boxed{3}`) are one answer in parts; far apart, the
        # earlier ones are steps on the way.
        if rest and len(whole[rest[-1][1] : start]) <= 20:
            raise ValueError(SEVERAL)
        if PART.search(whole[max(0, start - 80) : start]):
            raise ValueError(INSIDE)
        return normalise_answer(answer), r"what the last \boxed{} holds"
    if prose:
        raise ValueError(WORKED)
    return whole, None


def is_prose(text: str) -> bool:
    """Whether `text` is a worked solution and not an answer; the rule stands at MOST_WORDS."""
    # Commands are no words: `\begin{pmatrix}` would count as two.
    plain = LATEX.sub(" ", text.strip())
    words = len(WORD.findall(plain))
    lines = [line for line in plain.splitlines() if line.strip()]
    equations = sum("=" in line for line in lines)
    sentences = re.search(r"[^\W\d_]\$?[.!?]\s+[A-Z]", plain)
    chained = [part for part in plain.split("=")[1:-1] if not re.search("[,;]", part)]
    return (
        words >= MOST_WORDS
        or "<<" in plain
        or (words >= 4 and (len(lines) > 1 or sentences is not None))
        or (equations > 1 and r"\begin{cases}" not in text)
        or (len(plain) > 40 and any(part.strip(" {") for part in chained))
    )


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, inside) of every outermost \\boxed{} that is closed."""
    # One pass over the braces for all boxes: a search from each would be quadratic.
    closing, opened = {}, []
    for match in BRACES.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    found: list[tuple[int, int, str]] = []
    for match in BOX.finditer(text):
        end = closing.get(match.end())
        # A box inside a box is a part of the outer one's answer.
        if end is not None and not (found and match.start() < found[-1][1]):
            found.append((match.start(), end + 1, text[match.end() + 1 : end]))
    return found


def normalise_answer(answer: str) -> str:
    r"""The bare spelling of a final answer, as it would stand inside \boxed{}.

    Math delimiters, surrounding spaces, trailing dots, \left and \right, and an outer \boxed{} go:
    the likelihood of the answer is that of one spelling, so it should be the plainest one. `\$18`
    (dollars) and invisible delimiters (`\left.`) stay.

    >>> normalise_answer(r" $\boxed{\left(3, \frac{\pi}{2}\right)}$. ")
    '(3, \\frac{\\pi}{2})'
    """
    # An escaped \$ is dollars and stays.
    text = re.sub(r"(?<!\\)(\$|\\[()\[\]])", "", answer)
    if not re.search(r"\\(left|right)\s*\.", text):
        text = re.sub(r"\\(left|right)(?![a-zA-Z])", "", text)
    before = None
    # Shells may alternate: a box in dots in a box.
    while text != before:
        before = text
        text = _unboxed(_without_end(text.strip()))
    return text


def _without_end(text: str) -> str:
    r"""`text` without dots and spaces at its end; the delimiter `\right.` keeps its dot."""
    end = len(text)
    while end and (text[end - 1] == "." or text[end - 1].isspace()):
        end -= 1
    return text[: end + text.endswith(r"\right", 0, end)]


def _unboxed(text: str) -> str:
    r"""The inside of a \boxed{} that holds all of `text`; any other text as it is."""
    if not text.startswith(r"\boxed{"):
        return text
    start, depth = len(r"\boxed{"), 1
    for i, char in enumerate(text[start:], start):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:i] if i == len(text) - 1 else text
    return text

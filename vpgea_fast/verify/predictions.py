r"""The answer that a text gives, as a record keeps it: two spellings of one answer are one text.

Read by the rules of checkers.py, without its verdict. Votes are counted over these texts, so what
no rule brings together (`x+1` and `1+x`) counts as two answers.
"""

from __future__ import annotations

import re

from vpgea_fast.verify.checkers import (
    answer_of,
    bare,
    labelled,
    last_line,
    number,
    plain_text,
    respell,
)

LONGEST = 400
"""Characters of an answer; what is longer is prose, and kept as it is up to here."""
# With separators of thousands, decimals or a denominator: -1,234.5, 3/4.
LAST_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def prediction(checker: str, text: str, gold: str = "") -> str | None:
    r"""Read the answer of a text for `checker` (`verify.name`); None where it gives none.

    Where `gold` is a choice, `C. 12` is the choice C.

    >>> [prediction("math", rf"So \boxed{{{a}}}.") for a in (r"\frac12", "0.5", "(B)", "x + 1")]
    ['1/2', '1/2', 'B', 'x+1']
    """
    answer = answer_of(text)
    if answer is None:
        # What the checkers fall back to where nothing is boxed or stated.
        answer = last_line(text)
        if checker not in ("text", "letter"):
            found = LAST_NUMBER.findall(respell(text[-LONGEST:]))
            answer = found[-1] if found else ""
    answer = answer.strip()[:LONGEST]
    if not answer:
        return None
    return _canonical(checker, answer, choice=labelled(bare(gold))[0] is not None)


def _canonical(checker: str, answer: str, *, choice: bool) -> str | None:
    if checker == "text":
        return plain_text(answer) or None
    # `(B) 12` is the letter where letters are judged, or the gold is one, and else the number.
    label, rest = labelled(bare(answer))
    if checker == "letter":
        return label
    if label and (choice or not rest):
        return label
    if choice and re.fullmatch("[a-j]", bare(answer)):
        return bare(answer).upper()
    value = number(answer)
    if value is not None:
        # An exact fraction: 0.5, \frac12 and 50 % are one text.
        return str(value)
    # Spaces mean nothing in mathematics, but \pi x is no \pix.
    return re.sub(r"(?<!\\)(?<![a-zA-Z])\s+|\s+(?![a-zA-Z])", "", bare(answer)) or None

"""Which training questions an evaluation asks too: a shared run of 13 words.

13 words are the length of GPT-3's check (arXiv 2005.14165, appendix C). Words are lower-cased,
punctuation aside. A question of fewer words counts by its whole text, operators included: `3 + 4`
is not `3 - 4`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vpgea_fast.types import Question

LENGTH = 13
WORD = re.compile(r"[^\W_]+")
SIGN = re.compile(r"""[^\W_]+|[^\w\s.,;:!?'"$]""")


@dataclass(frozen=True)
class Match:
    """An evaluation's question, its file, and what it has in common with another one."""

    file: str
    question: Question
    shared: str


class Overlap:
    """All runs of 13 words of the evaluations' questions.

    >>> question = Question(id="q1", text="What is 3 + 4?", answer="7")
    >>> overlap = Overlap([("test.jsonl", [question])])
    >>> overlap.match("what is 3+4").question.id, overlap.match("What is 3 - 4?")
    ('q1', None)
    """

    def __init__(self, evaluations: Iterable[tuple[str, Iterable[Question]]]) -> None:
        self._known: dict[str, tuple[str, Question]] = {}
        self.files = 0
        for file, questions in evaluations:
            self.files += 1
            for question in questions:
                for gram in _grams(question.text):
                    # The first file with a run is named: one is enough to leave the question out.
                    self._known.setdefault(gram, (file, question))

    def match(self, text: str) -> Match | None:
        """The first evaluation row with which a question shares a run, or its whole short text."""
        gram = next((gram for gram in _grams(text) if gram in self._known), None)
        return None if gram is None else Match(*self._known[gram], shared=gram)


def _grams(text: str) -> Iterator[str]:
    """Every run of 13 words; of fewer words the whole text with its signs. No run equals a whole
    text, which has fewer words."""
    # Full-width digits and ligatures count as the plain ones.
    plain = unicodedata.normalize("NFKC", text).lower()
    # LaTeX falls apart into words here (`frac`, `sqrt`): formulas count like text.
    words = WORD.findall(plain)
    if len(words) < LENGTH:
        # Signs matter where words are few, and would only break runs where they are many.
        yield " ".join(SIGN.findall(plain))
    for start in range(len(words) - LENGTH + 1):
        yield " ".join(words[start : start + LENGTH])

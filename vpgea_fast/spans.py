"""Where a text stands in the tokens that spell it, by decoding alone.

A byte-level vocabulary spells a word in many ways: with the blank before it, merged with its
neighbours, cut inside a character. So text is looked for in text, and a place there is mapped back
to a token boundary.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Decode = Callable[[Any], str]
"""Ids -> text. The text of the first tokens must begin that of all, a cut character aside."""
Ids = Any
"""A list or a 1-D tensor: what can be sliced and decoded."""

LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
"""A letter, a digit or `_`, of scripts that put blanks between words."""
TERM = r"\w)\]}"
"""What ends a term: a minus behind it subtracts."""


def tokens_holding(ids: Ids, decode: Decode, text: str, end: int) -> int:
    """Count the first tokens whose text holds text[:end], where `text` is that of all `ids`.

    A binary search over decoded prefixes. One that ends inside a character has U+FFFD there, and so
    does not hold that character yet.
    """
    low, high, part = 0, len(ids), text[:end]
    while low < high:
        middle = (low + high) // 2
        if decode(ids[:middle]).startswith(part):
            high = middle
        else:
            low = middle + 1
    return low


def tokens_before(ids: Ids, decode: Decode, text: str, start: int) -> int:
    """Count the tokens before the one that begins the character text[start]."""
    count = tokens_holding(ids, decode, text, start + 1) - 1
    # Bytes of that character may lie in the tokens before, too.
    while not text.startswith(decode(ids[:count])):
        count -= 1
    return count


@dataclass(frozen=True)
class Tag:
    """A text that ends a thought where no one token of the model does.

    It ends at the first token boundary where the text so far holds `text`, however that is spelled.

    ids     a spelling of it, put behind a thought that was cut
    decode  ids -> text, special tokens shown: hidden ones would bring parts of the tag together
    """

    text: str
    ids: tuple[int, ...]
    decode: Decode
    _ends: dict[int, bool] = field(default_factory=dict, compare=False, repr=False)

    @property
    def reach(self) -> int:
        """Tokens before its last one that a tag may lie in, at most, and one more."""
        # Each token within the tag has a byte of it or more; some decoders strip the first blank.
        return len(self.text.encode()) + 1

    def end(self, ids: Sequence[int], since: int = 0) -> int:
        """Count the tokens until their text holds the tag; 0: it does not. Of the first `since`
        it is known that theirs does not."""
        if not any(map(self._may_end, ids[since:])):
            return 0
        # A window: decoding all of a thought at every look would be quadratic in its length.
        start = max(0, since - self.reach)
        part = ids[start:]
        text = self.decode(part)
        place = text.find(self.text)
        if place < 0:
            return 0
        return start + tokens_holding(part, self.decode, text, place + len(self.text))

    def _may_end(self, token: int) -> bool:
        """Whether the tag may end within this token: most have not its last letter, and then
        nothing is decoded."""
        last = self.text[-1]
        if token not in self._ends:
            # A letter of several bytes may be cut over tokens, none of which shows it.
            self._ends[token] = not last.isascii() or last in self.decode([token])
        return self._ends[token]


def stated(
    ids: Ids, decode: Decode, spellings: Sequence[str], *, whole: bool = True
) -> tuple[int, int] | None:
    """Find where a thought first states an answer: the tokens before, and those up to its end.

    spellings  of the answer
    whole      as whole words and numbers: 7 is not in 17, 7.5, 7,000, -7 or 7x, though in 10-7
    """
    text = decode(ids)
    found = _pattern(tuple(spellings), whole).search(text)
    if found is None:
        return None
    start, end = found.span()
    return tokens_before(ids, decode, text, start), tokens_holding(ids, decode, text, end)


@functools.lru_cache(maxsize=4096)  # of a question, for all of its paths
def _pattern(spellings: tuple[str, ...], whole: bool) -> re.Pattern[str]:
    """What finds the first of these texts; of two that begin alike the shorter."""
    shortest_first = sorted({text for text in spellings if text.strip()}, key=len)
    # Nothing is everywhere: without a spelling nothing is found.
    return re.compile("|".join(_bounded(text, whole) for text in shortest_first) or r"(?!)")


def _bounded(text: str, whole: bool) -> str:
    words = [re.escape(word) for word in text.split()]
    body = r"\s+".join(words)  # a line may end between two words
    if not whole:
        return body
    first, last, before, behind = text.strip()[0], text.strip()[-1], "", ""
    if re.match(LETTER, first):
        before = rf"(?<!{LETTER})"
    if first.isdigit():
        # Another number: 3.7, 1,007, and -7 unless the minus subtracts.
        before += rf"(?<!\d[.,])(?<![^{TERM}][-−])(?<!\A[-−])"
    elif first in "+-−.":
        before = rf"(?<![{TERM}])"
    if re.match(LETTER, last):
        behind = rf"(?!{LETTER})"
    if last.isdigit():
        behind += r"(?![.,]\d)"
    return before + body + behind

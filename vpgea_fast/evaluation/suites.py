"""The benchmarks of the papers, with the protocol in which their tables are made.

Sampled at temperature 0.6 and top_p 0.95 with at most 32,768 tokens, thought and answer together,
as R1's model card says. k answers to each question, more where a set is small; mathematics under
`prompt.student`, choices under CHOICE, shown with letters. Where the published order puts the right
choice first, the choices are shuffled by a fixed seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vpgea_fast.config import DataFile
from vpgea_fast.data import DataError
from vpgea_fast.data.recipes import (
    AIME_24,
    AIME_25,
    AMC_23,
    GPQA_DIAMOND,
    MATH_500,
    MMLU_PRO,
    OLYMPIADBENCH,
    RECIPES,
    Source,
    located,
)
from vpgea_fast.values import nearest

PROTOCOL = {
    "eval.temperature": "0.6",
    "eval.top_p": "0.95",
    "eval.max_new_tokens": "32768",
    "eval.joint_limit": "true",
    # The papers report sampled answers alone; greedy ones would cost a draw of each question.
    "eval.greedy": "false",
    "verify.name": "math",  # which reads letters too
}
"""Keys of a suite, unless the command line gives others."""
CHOICE = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. "
    "Think step by step before answering.\n\n{question}"
)
"""As OpenAI's simple-evals and lighteval ask."""


@dataclass(frozen=True)
class Set:
    """A benchmark: where it lies, the answers to each question, and the letters of its choices."""

    source: Source
    samples: int
    letters: str = ""

    @property
    def student(self) -> str | None:
        """The template of its prompt; None: that of the configuration."""
        return CHOICE.replace("{letters}", self.letters) if self.letters else None


[(_GSM8K,)] = RECIPES["gsm8k"]["test"]
# About 1,000 to 2,700 answers of each set, but for MMLU-Pro: one to each of 12,032 questions.
SETS = {
    "gsm8k": Set(_GSM8K, samples=1),
    "math500": Set(MATH_500, samples=4),
    "aime24": Set(AIME_24, samples=32),
    "aime25": Set(AIME_25, samples=32),
    "gpqa_diamond": Set(GPQA_DIAMOND, samples=8, letters="ABCD"),
    "mmlu_pro": Set(MMLU_PRO, samples=1, letters="ABCDEFGHIJ"),
    "amc23": Set(AMC_23, samples=32),
    "olympiadbench": Set(OLYMPIADBENCH, samples=4),
}
MISSING = {"livecodebench": "its answers are programs, which nothing here runs"}
"""Asked for by papers, and not served yet: why."""
QUICK = 100
"""Questions of a set in the suite `quick`."""
SUITES = {
    "paper": ("gsm8k", "math500", "aime24", "aime25", "gpqa_diamond", "mmlu_pro"),
    "vr": ("aime24", "aime25", "amc23", "math500", "olympiadbench", "gpqa_diamond", "mmlu_pro"),
    "quick": ("gsm8k", "math500", "aime24"),
}
LACKS = {"vr": ("livecodebench",)}


def suite_files(
    words: str, folders: Sequence[Path], given: Collection[str] = ()
) -> tuple[list[DataFile], list[str]]:
    """Write a suite, or sets with commas between them, as entries of eval.data; and what of it is
    not served.

    folders   where the files lie as published; none: the Hub
    given     keys of the command line, which win: eval.samples over each set's, eval.limit over
              that of `quick`
    DataError for a name that is none, and for files that are not there.
    """
    names = SUITES.get(words, tuple(words.split(",")))
    for name in names:
        _check(name)
    quick = words == "quick"
    lacking = [f"{name} is not served yet: {MISSING[name]}" for name in LACKS.get(words, ())]
    return list(_entries(names, folders, given, quick=quick)), lacking


def _entries(
    names: Sequence[str], folders: Sequence[Path], given: Collection[str], *, quick: bool
) -> Iterable[DataFile]:
    for name in names:
        one = SETS[name]
        source = one.source
        [(_, path)] = located([(source,)], folders, name)
        # A small set is drawn whole, but not 32 times in a quick look.
        count = min(one.samples, 4) if quick else one.samples
        yield source.entry(
            path,
            name=name,
            limit=QUICK if quick and "eval.limit" not in given else None,
            subject_key=source.subject,
            level_key=source.level,
            samples=count if "eval.samples" not in given else None,
            student=one.student,
        )


def _check(name: str) -> None:
    if name in MISSING:
        raise DataError(f"--suite: {name} is not served yet: {MISSING[name]}; leave it out")
    if name not in SETS:
        near = nearest(name, [*SUITES, *SETS])
        hint = f"did you mean {near!r}? known: " if near else "expected one of "
        raise DataError(
            f"--suite: got {name!r}; {hint}{', '.join(SUITES)}, or sets with commas between them, "
            f"of {', '.join(SETS)}"
        )

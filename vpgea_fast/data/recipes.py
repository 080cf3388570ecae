"""Published data sets: where each split lies, on the Hub and as files, and the keys of its rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vpgea_fast.config import DataFile
from vpgea_fast.data.files import DataError

ChoicesAnswer = Literal["auto", "letter", "index", "index_from_1", "text"]

# The Hub's names of parts: train-00000-of-00003.parquet.
SHARD = re.compile(r"-\d{5}-of-(\d{5})")
SHOWN = 6  # patterns that an error lists


@dataclass(frozen=True)
class Source:
    """One split of one configuration of a data set on the Hub, and its files in a folder.

    `rows` as published. `files` are patterns beside the Hub's own parquet files, or, with `plain`,
    all that there are; `part` are the rows (from, to) to take of a file that holds more.
    """

    hub: str
    split: str
    rows: int
    files: tuple[str, ...] = ()
    config: str | None = None
    question: str = "problem"
    answer: str = "answer"
    id: str = "id"
    part: tuple[int, int | None] = (0, None)
    plain: bool = False
    choices: str | tuple[str, ...] | None = None
    choices_answer: ChoicesAnswer | None = None
    choices_seed: int | None = None
    subject: str | None = None
    level: str | None = None

    def entry(self, path: str, **more: Any) -> DataFile:
        """Write one of its files as a configuration names it."""
        return DataFile(
            path,
            question_key=self.question,
            answer_key=self.answer,
            id_key=self.id,
            choices_key=self.choices,
            choices_answer=self.choices_answer,
            choices_seed=self.choices_seed,
            **more,
        )

    @property
    def hub_path(self) -> str:
        # OWNER/NAME, the configuration where there are several, the split: as data.train reads it.
        return f"hub:{self.hub}" + (f"/{self.config}" if self.config else "") + f":{self.split}"

    @property
    def patterns(self) -> tuple[str, ...]:
        """What is looked for in a folder, the first that matches is taken."""
        if self.plain:
            return self.files
        # The layout that the Hub gives a data set, and so a clone of it.
        return (f"{self.config or 'data'}/{self.split}-*.parquet", *self.files)


Sources = tuple[Source, ...]
Recipe = dict[str, tuple[Sources, ...]]
"""train, test -> ways to get the split: the first from the Hub, any from a folder."""


def _gsm8k(split: str, rows: int) -> Source:
    files = f"gsm8k_{split}.jsonl", f"grade_school_math/data/{split}.jsonl", f"{split}.jsonl"
    return Source("openai/gsm8k", split, rows, files, config="main", question="question")


def _svamp(split: str, rows: int, part: tuple[int, int | None]) -> tuple[Sources, ...]:
    hub = Source(
        "ChilleD/SVAMP",
        split,
        rows,
        (f"{split}.json",),
        question="{Body} {Question}",
        answer="Answer",
        id="ID",
    )
    # The Hub has two files; the authors' own has all 1,000 rows, of which the first 700 are
    # train's.
    return (hub,), (replace(hub, files=("svamp.jsonl", "SVAMP.json"), part=part, plain=True),)


MATH_ROWS = {  # of train and test: 7,500 and 5,000 together
    "algebra": (1744, 1187),
    "counting_and_probability": (771, 474),
    "geometry": (870, 479),
    "intermediate_algebra": (1295, 903),
    "number_theory": (869, 540),
    "prealgebra": (1205, 871),
    "precalculus": (746, 546),
}
MATH = tuple(
    Source("EleutherAI/hendrycks_math", split, rows[i], config=config, answer="solution")
    for i, split in enumerate(("train", "test"))
    for config, rows in MATH_ROWS.items()
)
MATH_SPLITS = Source(  # PRM800K's: the 12,000 already without the 500
    "openai/prm800k",
    "train",
    12_000,
    ("math_train.jsonl", "math_splits/train.jsonl"),
    answer="solution",
    id="unique_id",
    plain=True,
)
MATH_500 = Source(
    "HuggingFaceH4/MATH-500",
    "test",
    500,
    ("math500.jsonl", "test.jsonl", "math_splits/test.jsonl"),
    id="unique_id",
    subject="subject",
    level="level",
)
DEEPSCALER = Source(
    "agentica-org/DeepScaleR-Preview-Dataset", "train", 40_315, ("deepscaler.json",)
)
# Its one split is called train, and is a test all the same.
AIME_24 = Source("HuggingFaceH4/aime_2024", "train", 30, ("aime24.jsonl", "aime_2024.jsonl"))
AIME_25 = Source("math-ai/aime25", "test", 30, ("aime25.jsonl", "test.jsonl"))
AMC_23 = Source("math-ai/amc23", "test", 40, ("amc23.jsonl",), question="question")
OLYMPIADBENCH = Source(  # the open-ended mathematics in English that needs no picture
    "math-ai/olympiadbench",
    "test",
    675,
    ("olympiadbench.jsonl",),
    question="question",
    answer="final_answer",
    subject="subfield",
)
GPQA_DIAMOND = Source(  # gated
    "Idavidrein/gpqa",
    "train",
    198,
    ("gpqa_diamond.jsonl", "gpqa_diamond.csv"),
    config="gpqa_diamond",
    question="Question",
    answer="Correct Answer",
    id="Record ID",
    choices=("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3))),
    # Published with the right choice first: in that order A would always be right.
    choices_seed=0,
    subject="High-level domain",
    level="Writer's Difficulty Estimate",
)
MMLU_PRO = Source(
    "TIGER-Lab/MMLU-Pro",
    "test",
    12_032,
    ("mmlu_pro.jsonl",),
    question="question",
    id="question_id",
    choices="options",
    choices_answer="letter",
    subject="category",
)

RECIPES: dict[str, Recipe] = {
    "gsm8k": {"train": ((_gsm8k("train", 7473),),), "test": ((_gsm8k("test", 1319),),)},
    "math": {"train": (MATH, (MATH_SPLITS,)), "test": ((MATH_500,),)},
    "math500": {"test": ((MATH_500,),)},
    "deepscaler": {"train": ((DEEPSCALER,),)},
    "aime24": {"test": ((AIME_24,),)},
    "aime25": {"test": ((AIME_25,),)},
    "svamp": {"train": _svamp("train", 700, (0, 700)), "test": _svamp("test", 300, (700, None))},
}


def located(
    ways: Sequence[Sources], folders: Sequence[Path], what: str
) -> list[tuple[Source, str]]:
    """(source, path or Hub name) of everything that a split is read from. Without folders the Hub.
    DataError that says what was looked for."""
    if not folders:
        # Nothing is asked yet: the Hub is first heard when a row is read.
        return [(source, source.hub_path) for source in ways[0]]
    # A folder that is misspelt would look like one that lacks the files.
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"--from {folder}: expected a folder that holds {what} as published")
    for sources in ways:
        found = [(source, _find(source, folders)) for source in sources]
        # One way whole: half of MATH from here and half from there may overlap.
        if all(files for _, files in found):
            return [(source, str(file)) for source, files in found for file in files]
    missing = [source for source in ways[0] if not _find(source, folders)]
    others = [source for sources in ways[1:] for source in sources]
    # The single-file ways first: they are the easiest to get.
    patterns = list(dict.fromkeys(p for source in (*others, *missing) for p in source.patterns))
    shown = patterns[:SHOWN]
    raise DataError(
        f"{what}: looked in {', '.join(map(str, folders))} for {', or '.join(shown)}"
        + (f" and {len(patterns) - len(shown)} more" if len(patterns) > len(shown) else "")
        + f" (also below {ways[0][0].hub.partition('/')[2]}/) and found "
        + ("only a part" if len(missing) < len(ways[0]) else "none")
        + f"; give with --from the files of {ways[0][0].hub}, or leave --from out for the Hub"
    )


def _find(source: Source, folders: Sequence[Path]) -> list[Path]:
    """The files of the first pattern that matches; all shards of a parquet file."""
    for root in _roots(source, folders):
        for pattern in source.patterns:
            if files := sorted(root.glob(pattern)):
                shards = SHARD.search(files[0].name)
                # A part of the shards reads well and trains on a part of the data.
                if shards and int(shards[1]) != len(files):
                    raise DataError(
                        f"{root / pattern}: {len(files)} of {int(shards[1])} files are there; "
                        "copy them all"
                    )
                return files
    return []


def _roots(source: Source, folders: Sequence[Path]) -> Iterator[Path]:
    """The folders, and in each one of the data set's own name, as a clone or a mirror makes it."""
    for folder in folders:
        yield from (folder, folder / source.hub.partition("/")[2], folder / source.hub)

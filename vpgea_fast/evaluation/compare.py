"""Evaluations against a base: paired differences with intervals, over questions common to all.

All evaluations are resampled with the same questions, so a difference has the interval of the
questions' own differences, not that of two unrelated numbers. The base is the first evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpgea_fast.book import MODES
from vpgea_fast.evaluation.measures import (
    Answers,
    aes,
    collect_all,
    details,
    intervals,
    measure,
    question_means,
    resampled_means,
    statistics,
)
from vpgea_fast.evaluation.published import shared
from vpgea_fast.evaluation.records import (
    HEADER,
    SAMPLES,
    Note,
    SampleError,
    read_header,
    read_samples,
)
from vpgea_fast.values import dotted

RELATIVE = ("tokens", "eps3", "eps3_mean")
"""What is compared as new / base - 1; accuracy is compared as new - base."""
SHOWN = 3  # settings that a refusal names before it only counts them


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A folder's records in memory, without their texts."""

    name: str
    header: Mapping[str, Any]
    answers: Mapping[str, Mapping[str, Answers]]
    """By mode and benchmark."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings and question sets as dotted keys: what two evaluations must have alike."""
        parts = {"settings": self.header["settings"], "benchmarks": self.header["benchmarks"]}
        return dotted(parts)


def open_evaluations(words: Sequence[str], *, common: bool, note: Note) -> list[Evaluation]:
    """Read folders, given as FOLDER or NAME=FOLDER; of a run, all that it holds, by their paths.

    With `common` an unfinished evaluation gives the questions that have all their answers.
    SampleError for a folder without records, and for a name that stands twice.
    """
    found = []
    for word in words:
        name, folder = _named(word)
        for path in _folders(folder):
            inner = path.relative_to(folder).as_posix()
            label = name if inner == "." else f"{name}/{inner}"
            found.append(open_evaluation(label, path, common=common, note=note))
    names = [evaluation.name for evaluation in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SampleError(
            f"two evaluations are called {twice!r}; write NAME=FOLDER for one of them"
        )
    return found


def _named(word: str) -> tuple[str, Path]:
    name, equals, folder = word.partition("=")
    # A folder whose own name holds "=" is a folder still.
    if not equals or Path(word).is_dir():
        return Path(word).absolute().name, Path(word)  # a link keeps its own name
    if not name or not folder:
        raise SampleError(f"got {word!r}, expected FOLDER or NAME=FOLDER")
    return name, Path(folder)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SampleError(f"{folder} is no folder; give one that vpgea eval wrote")
    # A run holds one evaluation per evaluated step, in evals/step_N.
    paths = sorted({file.parent for file in folder.rglob(SAMPLES)}, key=_by_number)
    if not paths:
        raise SampleError(f"{folder} holds no {SAMPLES}; give a folder that vpgea eval wrote")
    return paths


def _by_number(path: Path) -> list[tuple[int, str]]:
    # step-20 before step-100.
    words = [(part, part.rstrip("0123456789")) for part in path.parts]
    return [(len(part) - len(stem), part) for part, stem in words]


def open_evaluation(name: str, folder: Path, *, common: bool, note: Note) -> Evaluation:
    """Read the records of one folder, as `open_evaluations` does."""
    header = read_header(folder)
    try:
        found = collect_all(read_samples(folder, note), unfinished=common)
        if not found:
            raise SampleError("there is no sample; go on with --resume")
        # As they were asked, whichever ended first.
        rank = {name: place for place, name in enumerate(header["benchmarks"])}
        last = len(rank)
        answers = {
            mode: dict(sorted(parts.items(), key=lambda item: rank.get(item[0], last)))
            for mode, parts in found.items()
        }
        for mode in answers:
            _check_finished(header, mode, answers[mode], common=common)
    except SampleError as error:
        text = str(error)
        raise SampleError(text if str(folder) in text else f"{folder}: {text}") from error
    return Evaluation(name=name, header=header, answers=answers)


def _check_finished(
    header: Mapping[str, Any], mode: str, answers: Mapping[str, Answers], *, common: bool
) -> None:
    """Hold the answers against what eval.json says was to be drawn."""
    planned = header["benchmarks"]
    unknown = next((name for name in answers if name not in planned), None)
    if unknown is not None:
        raise SampleError(f"a sample is of {unknown!r}, which {HEADER} does not name")
    for name, facts in planned.items():
        # A benchmark may have a number of draws of its own; greedy answers are the same for all.
        draws = facts.get("k") if mode == "sampled" else None
        draws = header["settings"].get("k", {}).get(mode) if draws is None else draws
        if draws == 0:
            if name in answers:
                raise SampleError(f"{name} has {mode} answers, of which {HEADER} plans none")
            continue
        have = answers[name].correct_QK.shape if name in answers else (0, 0)
        if tuple(have) != (facts.get("questions"), draws) and not common:
            raise SampleError(
                f"{name}, {mode}: {have[0]} of {facts.get('questions')} questions have {have[1]} "
                f"of {draws} answers; go on with --resume, or compare what is there with --common"
            )


def compare(
    evaluations: Sequence[Evaluation], *, mode: str | None = None, common: bool = False
) -> dict[str, Any]:
    """Measure every evaluation (one, too), and all but the first against the first.

    mode    None: sampled answers where all have them, else greedy ones
    common  take the questions that all have, and say what else is unlike; without it, anything
            unlike in settings or questions is a SampleError

    {"schema", "base", "mode", "questions", "rows", "notes", "published"}; a row has its name,
    model, benchmarks, mean, and `against` the base. All JSON: what is not finite is None.
    """
    mode = mode or _shared_mode(evaluations)
    notes = _unlike(evaluations, common=common)
    # Cut before anything is measured: the base's own row is of the common questions too.
    parts = _common(evaluations, mode, common=common)
    rows = [
        {"name": evaluation.name, "model": evaluation.header["model"], **_measured(answers)}
        for evaluation, answers in zip(evaluations, parts, strict=True)
    ]
    for row, answers in zip(rows[1:], parts[1:], strict=True):
        row["against"] = _against(answers, parts[0])
    questions = {name: len(answers.questions) for name, answers in parts[0].items()}
    if common:
        notes.append(f"questions common to all: {_listed(questions)}")
    return plain(
        {
            "schema": 1,
            "base": evaluations[0].name,
            "mode": mode,
            "questions": questions,
            "protocol": evaluations[0].header["settings"],
            "rows": rows,
            "notes": notes,
            "published": shared(list(questions)),
        }
    )


def _shared_mode(evaluations: Sequence[Evaluation]) -> str:
    for mode in MODES:
        if all(mode in evaluation.answers for evaluation in evaluations):
            return mode
    modes = {evaluation.name: ", ".join(evaluation.answers) for evaluation in evaluations}
    raise SampleError(f"no mode is common to all, got {_listed(modes)}; evaluate one of them again")


def _unlike(evaluations: Sequence[Evaluation], *, common: bool) -> list[str]:
    """Say what settings and question sets differ from the base's; SampleError without `common`."""
    base, notes = evaluations[0], []
    for other in evaluations[1:]:
        ours, theirs = base.protocol, other.protocol
        keys = sorted(key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key))
        if not keys:
            continue
        words = [f"{k} ({_short(ours.get(k))}, {_short(theirs.get(k))})" for k in keys[:SHOWN]]
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        what = f"{base.name} and {other.name} differ in {', '.join(words)}{more}"
        if not common:
            raise SampleError(f"{what}; --common compares the questions that both have")
        notes.append(what)
    return notes


def _common(
    evaluations: Sequence[Evaluation], mode: str, *, common: bool
) -> list[dict[str, Answers]]:
    """Give every evaluation's answers to the same questions, in one order."""
    for evaluation in evaluations:
        if mode not in evaluation.answers:
            raise SampleError(f"{evaluation.name} has no {mode} answers; leave --mode out")
    sets = [evaluation.answers[mode] for evaluation in evaluations]
    # The base's order of benchmarks; alike in all, or cut to what is common.
    names = [name for name in sets[0] if all(name in benchmarks for benchmarks in sets)]
    aligned: list[dict[str, Answers]] = [{} for _ in sets]
    for name in names:
        # By id and reference answer: "row-1" of two files are two questions.
        keys = [dict(zip(_keys(s[name]), range(10**9), strict=False)) for s in sets]
        shared_keys = sorted(set.intersection(*map(set, keys)))
        if not common and any(len(known) != len(shared_keys) for known in keys):
            raise SampleError(
                f"{name}: only {len(shared_keys)} questions are common to all; "
                "--common compares them"
            )
        if shared_keys:
            for target, benchmarks, known in zip(aligned, sets, keys, strict=True):
                target[name] = benchmarks[name].select([known[key] for key in shared_keys])
    if not aligned[0]:
        raise SampleError("no question is common to all; evaluate the same files")
    return aligned


def _keys(answers: Answers) -> list[tuple[str, str]]:
    return list(zip(answers.questions, answers.golds, strict=True))


def _measured(benchmarks: Mapping[str, Answers]) -> dict[str, Any]:
    whole, edges = measure(benchmarks), intervals(benchmarks)
    parts = whole.pop("benchmarks")
    return {
        "benchmarks": {
            name: {
                **parts[name],
                "k": answers.correct_QK.shape[1],
                "intervals": edges[name],
                **details(answers),
            }
            for name, answers in benchmarks.items()
        },
        "mean": {**whole, "intervals": edges["mean"]},
    }


def _against(new: Mapping[str, Answers], base: Mapping[str, Answers]) -> dict[str, Any]:
    """Changes from the base with paired intervals, by benchmark and of the "mean"."""
    # The difference is that of all questions; resamples give its interval alone.
    points = _changes(statistics(*question_means(new)), statistics(*question_means(base)))
    # Of one name and the same questions: both draw the same resamples.
    drawn = _changes(statistics(*resampled_means(new)), statistics(*resampled_means(base)))
    return {
        name: {key: _change(points[key][row, 0], drawn[key][row]) for key in points}
        for row, name in enumerate([*new, "mean"])
    }


def _changes(new: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        # In points, as papers print it; tokens and eps3 differ in size between benchmarks.
        "acc": new["acc"] - base["acc"],
        **{key: new[key] / base[key] - 1 for key in RELATIVE},
        "aes": aes(new["acc"], new["tokens"], base=(base["acc"], base["tokens"])),
    }


def _change(value: Tensor, values_R: Tensor) -> dict[str, float]:
    # A base without a right answer in some resample has no ratio there, and no interval.
    edges = torch.tensor([0.025, 0.975], dtype=values_R.dtype)
    sound = bool(values_R.isfinite().all())
    low, high = values_R.quantile(edges).tolist() if sound else (math.nan, math.nan)
    return {"value": value.item(), "low": low, "high": high}


def _listed(pairs: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


def _short(value: object) -> str:
    return f"{value!r:.24}"


def plain(value: Any) -> Any:
    """Turn numbers that JSON lacks into None, and tuples into lists."""
    # Keys as text: a k of pass@k is a number here, and none in JSON.
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    # json would write NaN and Infinity, which other readers refuse.
    return None if isinstance(value, float) and not math.isfinite(value) else value

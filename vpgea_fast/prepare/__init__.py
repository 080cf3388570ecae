"""`vpgea data NAME`: published questions as train.jsonl and test.jsonl (id, question, answer).

overlap.py     training questions that an evaluation asks too
pass_rates.py  how often a model answers each question right
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vpgea_fast import strict_yaml
from vpgea_fast.checkpoint import write_text
from vpgea_fast.config import Config, DataConfig
from vpgea_fast.data import (
    DataError,
    Drop,
    Judge,
    LoadedQuestions,
    dropped_rows,
    load_questions,
    shown_drops,
)
from vpgea_fast.data.recipes import RECIPES, Recipe, Source, located
from vpgea_fast.intake import open_text
from vpgea_fast.metrics import Console
from vpgea_fast.prepare.overlap import Match, Overlap
from vpgea_fast.prepare.pass_rates import histogram, pass_rates
from vpgea_fast.types import Question
from vpgea_fast.values import nearest
from vpgea_fast.verify import Verifier

__all__ = ["Order", "prepare"]
RATES = "pass_rates.jsonl"


@dataclass(frozen=True)
class Order:
    """What to write where. Without `folders` the Hub is read. `keep` and `measure` ask for the pass
    rate of `Config.model` on each training question, `Config.eval.samples` answers each."""

    name: str
    out: Path
    folders: tuple[Path, ...] = ()
    overwrite: bool = False
    measure: bool = False
    keep: tuple[float, float] | None = None


def prepare(order: Order, cfg: Config, console: Console) -> None:
    """Write the files of `order`, say what is in them, and how a configuration names them.

    `cfg.eval.data` are more evaluation files that the training questions must not share. DataError,
    before anything is written, for what cannot be read and for a file that would change.
    """
    recipe = _recipe(order)
    if order.out.exists() and not order.out.is_dir():
        raise DataError(f"--out {order.out} is a file; give a directory")
    # The model's tokenizer and templates are checked before minutes of reading and judging.
    if order.measure:
        open_text(cfg)
    with Verifier.configured(cfg.verify) as verifier:
        judge = console.watched(verifier.accepts_itself, "reference answers")
        splits = {
            role: _load(order, role, ways=ways, limit=cfg.data.limit, judge=judge, console=console)
            for role, ways in recipe.items()
        }
    files: dict[str, str] = {}
    if "train" in splits:
        # Every file that the model may be evaluated on, this data set's own test first.
        evaluations = {str(order.out / "test.jsonl"): splits["test"]} if "test" in splits else {}
        evaluations |= {file.path: load_questions(file, cfg.data) for file in cfg.eval.data}
        own = splits["test"].questions if "test" in splits else ()
        splits["train"], matches = _without_overlap(splits["train"], own, evaluations)
        # What was taken out stands beside, with its match: the reader can judge the rule.
        files["contaminated.jsonl"] = _lines([_matched(q, match) for q, match in matches])
        compared = ", ".join(evaluations) or "no evaluation: give one with --against FILE"
        console.message(f"train: compared with {compared}")
    for role, loaded in splits.items():
        _tell(role, loaded, console)
        files[f"{role}.jsonl"] = _lines([_row(q) for q in loaded.questions])
    files["dropped.jsonl"] = _lines(dropped_rows(splits.values()))
    # The files are safe before the sampling begins, which takes hours.
    _write(order, files, console)
    named = {role: str(order.out / f"{role}.jsonl") for role in splits}
    if order.measure:
        named["train"] = _measured(order, cfg, splits["train"].questions, console)
    console.message(f"for a configuration:\n{_settings(named)}")


def _recipe(order: Order) -> Recipe:
    if order.name not in RECIPES:
        near = nearest(order.name, RECIPES)
        hint = f"did you mean {near!r}? known: " if near else "expected one of "
        raise DataError(f"data: got {order.name!r}; {hint}{', '.join(RECIPES)}")
    recipe = RECIPES[order.name]
    if order.measure and "train" not in recipe:
        raise DataError(
            f"data: {order.name} has no training questions, and --model is for those; leave "
            "--model and --keep out"
        )
    return recipe


def _load(
    order: Order,
    role: str,
    ways: Sequence[tuple[Source, ...]],
    limit: int | None,
    judge: Judge,
    console: Console,
) -> LoadedQuestions:
    """Every question of a split, in the published order and under its lasting id."""
    what = f"{order.name} {role}"
    # Several sources make one split: MATH has a file per subject.
    sources = located(ways, order.folders, what)
    parts: list[tuple[Source, LoadedQuestions]] = []
    counts: dict[Source, int] = {}
    for source, path in sources:
        tag = f"{source.config}-{source.split}" if len(ways[0]) > 1 and source.config else role
        try:
            loaded = _rows(source, path, limit, judge)
        except DataError as error:
            # With a cause it comes from the network; without one, from the rows themselves.
            if order.folders or error.__cause__ is None:
                raise
            raise DataError(
                f"{what}: {source.hub} does not come from the Hub ({_cause(error)}); see the "
                f"network, or get its files elsewhere and give their folder: vpgea data "
                f"{order.name} --from FOLDER with {', or '.join(source.patterns)}"
            ) from error
        # Shards of a parquet file go on counting where the last one ended.
        start = counts.get(source, 0)
        loaded = _named(loaded, order.name, tag, start)
        counts[source] = start + len(loaded.questions) + len(loaded.drops)
        parts.append((source, loaded))
    # A published number of rows that is not met is said, not refused: data sets get repaired.
    published, read = sum(source.rows for source in counts), sum(counts.values())
    console.message(f"{what}: {read} rows from {_from(sources)}")
    if limit is not None:
        console.message(f"{what}: of each file the first {limit} rows (data.limit)")
    elif read != published:
        console.message(f"{what}: {published} rows were published, {read} are here")
    notes: Counter[str] = Counter()
    # Seven subjects would say one note seven times: equal notes add up.
    for note in (note for _, part in parts for note in part.notes):
        count, _, text = note.partition(" ")
        notes[text] += int(count)
    for text, count in notes.items():
        console.message(f"{what}: {count} {text}")
    return LoadedQuestions(
        tuple(q for _, part in parts for q in part.questions),
        tuple(drop for _, part in parts for drop in part.drops),
    )


def _rows(source: Source, path: str, limit: int | None, judge: Judge) -> LoadedQuestions:
    first, last = source.part
    # The limit counts within the part, so that a test split has as many as asked for.
    ends = [end for end in (last, None if limit is None else first + limit) if end is not None]
    file = source.entry(path, limit=min(ends, default=None))
    loaded = load_questions(file, DataConfig(), parseable=judge)
    if not first:
        return loaded
    # The rows before were read for their numbers alone.
    behind = tuple(q for q in loaded.questions if _number(q) > first)
    if not behind:
        raise DataError(f"{path} ends before row {first + 1}; expected {source.rows} rows there")
    return replace(
        loaded,
        questions=behind,
        drops=tuple(d for d in loaded.drops if _number(d.question) > first),
    )


def _number(question: Question) -> int:
    """The row or line of its source; `place` ends with it."""
    return int(question.place.rpartition(" ")[2])


def _named(loaded: LoadedQuestions, name: str, tag: str, start: int) -> LoadedQuestions:
    """Questions under ids that no reading order, limit or kind of file changes: the published one
    behind the data set's name, or split and number of the row."""

    def renamed(q: Question) -> Question:
        number = _number(q)
        # row-N is the loader's word for a row without an id.
        own = f"{tag}-{start + number}" if q.id == f"row-{number}" else q.id
        return replace(q, id=f"{name}-{own}")

    return replace(
        loaded,
        questions=tuple(map(renamed, loaded.questions)),
        drops=tuple(replace(drop, question=renamed(drop.question)) for drop in loaded.drops),
    )


def _from(sources: Sequence[tuple[Source, str]]) -> str:
    (source, path), more = sources[0], len(sources) - 1
    first, last = source.part
    part = f", rows {first + 1} to {last or 'its end'}" if first or last else ""
    return path + part + (f" and {more} more" if more else "")


def _cause(error: BaseException) -> str:
    # One line: what the network says may be a page.
    text = " ".join(str(error.__cause__).split()) or type(error.__cause__).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _without_overlap(
    train: LoadedQuestions, test: Sequence[Question], evaluations: Mapping[str, LoadedQuestions]
) -> tuple[LoadedQuestions, list[tuple[Question, Match]]]:
    """The training questions that no evaluation asks, and the others with what they match. A row
    that is the test's own (MATH-500 lies within MATH) is set apart first."""
    # Whole texts for the test split, as it is a part of the same publication: a shared run of
    # words is the test of contamination, and would count the split itself as such.
    own = {" ".join(q.text.split()) for q in test}
    overlap = Overlap(
        # Dropped evaluation rows count too: their text may be trained on all the same.
        (file, [*part.questions, *(drop.question for drop in part.drops)])
        for file, part in evaluations.items()
    )
    clean: list[Question] = []
    drops: list[Drop] = []
    matches: list[tuple[Question, Match]] = []
    for question in train.questions:
        if " ".join(question.text.split()) in own:
            drops.append(Drop(question, "in the test split"))
        elif match := overlap.match(question.text):
            drops.append(Drop(question, "contaminated"))
            matches.append((question, match))
        else:
            clean.append(question)
    # An empty training file is no result; the usual slip is named.
    if not clean:
        raise DataError(
            f"all {len(train.questions)} training questions stand in an evaluation too; see "
            "whether --against names the training file itself"
        )
    return replace(train, questions=tuple(clean), drops=(*train.drops, *drops)), matches


def _tell(role: str, loaded: LoadedQuestions, console: Console) -> None:
    kept, read = len(loaded.questions), len(loaded.questions) + len(loaded.drops)
    reasons = ", ".join(f"{count} {reason}" for reason, count in loaded.dropped.items())
    console.message(
        f"{role}: {read} read, {kept} kept, {read - kept} dropped" + f" ({reasons})" * bool(reasons)
    )
    for line in shown_drops(loaded.drops, "dropped.jsonl"):
        console.message(line)


def _row(question: Question) -> dict[str, object]:
    return {"id": question.id, "question": question.text, "answer": question.answer}


def _matched(question: Question, match: Match) -> dict[str, object]:
    other = match.question
    evaluation = {"file": match.file, "id": other.id, "question": other.text}
    return {**_row(question), "shared": match.shared, "evaluation": evaluation}


def _lines(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(order: Order, files: Mapping[str, str], console: Console) -> None:
    """Write all files or none: what stands there and differs is kept, unless `overwrite`."""
    # All are compared before the first is written.
    there = {name: order.out / name for name in files if (order.out / name).exists()}
    other = [path for name, path in there.items() if not _holds(path, files[name])]
    if other and not order.overwrite:
        raise DataError(
            f"{other[0]} is there and would change"
            + (f" (and {len(other) - 1} more)" if len(other) > 1 else "")
            + "; give another --out, or --overwrite"
        )
    try:
        order.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--out {order.out}: {error.strerror}; give a directory that can be written"
        ) from error
    for name, text in files.items():
        same = name in there and there[name] not in other
        if not same:
            # Each file at once: a kill leaves whole files, and the next call writes the rest.
            write_text(order.out / name, text)
        rows = text.count("\n")
        console.message(f"{order.out / name}: {rows} rows" + " (unchanged)" * same)


def _holds(path: Path, text: str) -> bool:
    # Bytes: universal newlines would call a file with \r\n unchanged.
    return path.is_file() and path.read_bytes() == text.encode()


def _measured(order: Order, cfg: Config, questions: Sequence[Question], console: Console) -> str:
    """The file of the training questions that are hard enough and not too hard; without `keep` all
    of them."""
    low, high = order.keep or (0.0, 1.0)
    kept_file = order.out / f"train-{low:g}-{high:g}.jsonl"
    # Without the rates beside it, it is not of this command: nothing says how it was chosen.
    if kept_file.exists() and not (order.out / RATES).exists() and not order.overwrite:
        raise DataError(f"{kept_file} is there already; give another --out, or --overwrite")
    rates = pass_rates(
        cfg, questions, order.out / RATES, overwrite=order.overwrite, console=console
    )
    inside = [
        {**_row(q), "pass_rate": round(rate.value, 6)}
        for q, rate in zip(questions, rates, strict=True)
        if rate.value is not None and low <= rate.value <= high
    ]
    # Before the refusal below: the table shows which range would have questions.
    console.table(*histogram(rates, (low, high)), title="pass rates of the training questions")
    if order.keep is None:
        return str(order.out / "train.jsonl")
    if not inside:
        raise DataError(
            f"none of {len(rates)} questions has a pass rate from {low:g} to {high:g}; widen "
            f"--keep (the rates are in {order.out / RATES})"
        )
    _write(order, {kept_file.name: _lines(inside)}, console)
    return str(kept_file)


def _settings(named: Mapping[str, str]) -> str:
    tree: dict[str, object] = {}
    if "train" in named:
        tree["data"] = {"train": named["train"]}
    if "test" in named:
        tree["eval"] = {"data": [named["test"]]}
    return strict_yaml.dump(tree).rstrip()

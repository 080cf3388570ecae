"""How often a model answers each question right: sampled once, kept on disk, resumable.

The file is a line of settings and then a line a question, in the order of the questions. Lines are
written a block at a time. What a kill leaves of a block is cut off, so a process that goes on draws
the same blocks, batch by batch, as one that was never stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from vpgea_fast.config import RENAMED, Config, DataFile, as_dict
from vpgea_fast.data import Benchmark, DataError, LoadedQuestions, fingerprint
from vpgea_fast.evaluate import Evaluator, Item, open_model
from vpgea_fast.intake import open_text
from vpgea_fast.metrics import Console
from vpgea_fast.prompts import Prompter
from vpgea_fast.types import Question
from vpgea_fast.verify import Verifier
from vpgea_fast.weights import model_digest

WAVES = 4
"""Batches of `rollout.max_batch` answers in a block: what a kill may cost, against the tail of each
block in which few rows still run."""
SETTINGS = {
    "model": ("dtype", "attention"),
    "data": ("max_prompt_tokens",),
    "prompt": ("student", "think_open", "think_close", "think_prefix", "chat_template_kwargs"),
    "engine": ("name",),
    "rollout": ("max_answer_tokens",),
    "eval": ("samples", "temperature", "top_p", "max_new_tokens", "joint_limit", "seed"),
    "verify": ("name", "target", "timeout_s"),
}
"""What a pass rate depends on."""
SINCE: dict[str, Any] = {"eval.joint_limit": False}
"""Keys that are younger than some files: what these were drawn with."""


@dataclass(frozen=True)
class Rate:
    """Right answers of those that the engine did not give up; mean tokens of an answer with its
    thought, and the share that was cut at a limit. `why` tells what was not asked at all."""

    id: str
    right: int = 0
    drawn: int = 0
    tokens: float = 0.0
    cut: float = 0.0
    why: str | None = None

    @property
    def value(self) -> float | None:
        return self.right / self.drawn if self.drawn else None


def pass_rates(
    cfg: Config,
    questions: Sequence[Question],
    file: Path,
    *,
    overwrite: bool,
    console: Console,
) -> list[Rate]:
    """A rate for each question, from `file` or sampled as an evaluation would (student view,
    `cfg.eval`) and written there. DataError for a file of other settings, unless `overwrite`."""
    # In questions: the engine's batches hold samples of several of them.
    block = max(1, -(-WAVES * cfg.rollout.max_batch // cfg.eval.samples))
    header = {"block": block, "questions": fingerprint(questions), **_settings(cfg)}
    with _locked(file) as handle:
        header, rates = _known(handle, file, expected=header, questions=questions, new=overwrite)
        if len(rates) < len(questions):
            if rates:
                console.message(
                    f"{file}: goes on behind {len(rates)} of {len(questions)} questions"
                )
            rest = questions[len(rates) :]
            rates += _sampled(cfg, rest, handle=handle, header=header, console=console)
    return rates


def histogram(
    rates: Sequence[Rate], kept: tuple[float, float]
) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of a table: a row a rate where there are few, else ten ranges."""
    values = [rate.value for rate in rates if rate.value is not None]
    # k samples give k + 1 rates; with many samples ranges of ten percent are plainer.
    distinct = sorted(set(values))
    if len(distinct) <= 11:
        groups = [(f"{v:.3g}", [v] * values.count(v)) for v in distinct]
    else:
        tens = [[v for v in values if min(int(v * 10), 9) == i] for i in range(10)]
        groups = [(f"{i / 10:.1f} to {(i + 1) / 10:.1f}", group) for i, group in enumerate(tens)]
    most = max((len(group) for _, group in groups), default=1)
    rows = []
    for label, group in groups:
        inside = sum(kept[0] <= v <= kept[1] for v in group)
        # Rounded up: a rate that occurs shows at least one mark.
        bar = "#" * -(-40 * len(group) // most)
        rows.append([label, str(len(group)), str(inside), bar.ljust(40)])
    without = Counter(rate.why or "no answer drawn" for rate in rates if rate.value is None)
    rows += [[why, str(count), "0", ""] for why, count in without.items()]
    return ["pass rate", "questions", "kept", ""], rows


def _settings(cfg: Config) -> dict[str, Any]:
    known = as_dict(cfg)
    flat = {f"{s}.{key}": known[s].get(key) for s, keys in SETTINGS.items() for key in keys}
    if cfg.eval.joint_limit:  # not read then
        flat["rollout.max_answer_tokens"] = None
    return {**flat, "weights": model_digest(cfg.model.path)}


@contextmanager
def _locked(file: Path) -> Iterator[BinaryIO]:
    """Open the file for reading and appending; DataError where another process writes it."""
    try:
        # a+: nothing is lost before the lock is ours, and every write goes to the end.
        handle = file.open("a+b")
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror}; give another --out") from error
    with handle:
        try:
            # Two processes appending would interleave blocks, and each believe the file whole.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{file}: another process writes it; wait for it, or give another --out"
            ) from error
        try:
            yield handle
        finally:
            if not file.stat().st_size:  # nothing was drawn
                file.unlink()


def _known(
    handle: BinaryIO, file: Path, expected: dict[str, Any], questions: Sequence[Question], new: bool
) -> tuple[dict[str, Any], list[Rate]]:
    """The settings line and the rates of whole blocks; what stands behind them is cut off."""
    handle.seek(0)
    lines = handle.read().splitlines(keepends=True)
    # A kill within a line.
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    header = _parsed(lines[0], file, 1) if lines else None
    if header is not None:
        # Written by an older version, the settings still mean the same.
        header = SINCE | {RENAMED.get(key, key): value for key, value in header.items()}
        # The size of a block may differ: what was drawn is still valid, in the old size.
        differ = [k for k in expected if k != "block" and header.get(k) != expected[k]]
        if differ and not new:
            shown = f"{differ[0]}: {header.get(differ[0])!r} there, {expected[differ[0]]!r} now"
            raise DataError(
                f"{file} was drawn with other settings ({shown}"
                + (f", and {len(differ) - 1} more" if len(differ) > 1 else "")
                + "); give another --out, or --overwrite to draw anew"
            )
        header = None if differ else header
    if header is None:
        handle.truncate(0)
        return expected, []
    rows = [_parsed(line, file, number) for number, line in enumerate(lines[1:], 2)]
    # The last block may be short; any other that is short was cut by a kill.
    whole = len(rows) if len(rows) == len(questions) else len(rows) - len(rows) % header["block"]
    handle.truncate(sum(map(len, lines[: 1 + whole])))
    rates = [Rate(**row) for row in rows[:whole]]
    # The fingerprint in the header covers the questions; this covers edited rows.
    if [rate.id for rate in rates] != [q.id for q in questions[:whole]]:
        raise DataError(f"{file}: its rows are not those of the questions; remove it to draw anew")
    return header, rates


def _parsed(line: bytes, file: Path, number: int) -> dict[str, Any]:
    """A line of the file: the settings, or the fields of a Rate."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict):
        if number > 1 and set(row) == set(asdict(Rate(""))):
            return row
        if number == 1 and isinstance(row.get("block"), int) and row["block"] > 0:
            return row
    raise DataError(f"{file}, line {number}: {line[:60]!r} is no pass rate; remove it to draw anew")


def _append(handle: BinaryIO, header: dict[str, Any], rates: Sequence[Rate]) -> None:
    first = not os.fstat(handle.fileno()).st_size
    rows = [*[header] * first, *map(asdict, rates)]
    handle.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    handle.flush()
    # Hours of sampling hang on these lines.
    os.fsync(handle.fileno())


def _sampled(
    cfg: Config,
    questions: Sequence[Question],
    handle: BinaryIO,
    header: dict[str, Any],
    console: Console,
) -> list[Rate]:
    """Draw block after block, and append each when it is judged."""
    # With an evaluation in the configuration the engine makes room for its paths, the longest here.
    drawn = replace(cfg.eval, data=(DataFile(handle.name),), greedy=False, limit=None)
    cfg = replace(cfg, eval=drawn)
    rates: list[Rate] = []
    text = open_text(cfg)
    # Before the weights: a question that cannot be asked must not wait for them.
    asked = _prompted(cfg, text.prompter, questions)
    items = tuple(item for item in asked if not isinstance(item, Rate))
    loaded = LoadedQuestions(tuple(question for question, _ in items))
    shown = text.prompter.shown(items[0][1]) if items else "none fits"
    with (
        Verifier.configured(cfg.verify) as verifier,
        open_model(cfg, text, verifier) as model,
    ):
        evaluator = model.evaluator(cfg, {"train": Benchmark(items, loaded, shown)})
        for line in evaluator.describe():
            console.message(line)
        advance = console.samples(evaluator.samples)
        for start in range(0, len(asked), header["block"]):
            part = _block(evaluator, asked[start : start + header["block"]], advance)
            _append(handle, header, part)
            rates += part
    return rates


def _prompted(cfg: Config, prompter: Prompter, questions: Sequence[Question]) -> list[Item | Rate]:
    """Each question with its student prompt; a rate without answers for those that a run drops."""
    # As a training run leaves them out, so that a rate exists for what would be trained on.
    plain = [q for q in questions if not prompter.has_special(q.text)]
    ids = prompter.student_ids([q.text for q in plain], [q.id for q in plain])
    prompts = {q.id: prompt for q, prompt in zip(plain, ids, strict=True)}
    limit = cfg.data.max_prompt_tokens
    asked: list[Item | Rate] = []
    for question in questions:
        prompt = prompts.get(question.id)
        if prompt is None:
            asked.append(Rate(question.id, why="special token in text"))
        elif prompt.numel() > limit:
            asked.append(Rate(question.id, why=f"longer than {limit} tokens"))
        else:
            asked.append((question, prompt))
    return asked


def _block(evaluator: Evaluator, asked: Sequence[Item | Rate], advance: Any) -> list[Rate]:
    items = [item for item in asked if not isinstance(item, Rate)]
    if not items:
        return [item for item in asked if isinstance(item, Rate)]
    # paths: `samples` of each question in a row; correct_QN: (questions, samples).
    samples, sampling = evaluator.modes()["sampled"]
    paths, correct_QN = evaluator.answers(items, samples, sampling, advance)
    rates: dict[str, Rate] = {}
    for i, (question, _) in enumerate(items):
        group = paths[i * samples : (i + 1) * samples]
        # A path that the engine gave up says nothing about the question.
        good = [n for n, path in enumerate(group) if path.finish != "error"]
        # All given up: the means are 0 / 1, and `value` is None.
        count = max(1, len(good))
        rates[question.id] = Rate(
            question.id,
            right=sum(int(correct_QN[i][n]) for n in good),
            drawn=len(good),
            tokens=round(sum(group[n].generated for n in good) / count, 3),
            cut=round(sum(group[n].truncated for n in good) / count, 4),
        )
    return [item if isinstance(item, Rate) else rates[item[0].id] for item in asked]

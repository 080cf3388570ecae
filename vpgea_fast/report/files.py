"""What a run directory holds, checked as far as a report reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpgea_fast import book
from vpgea_fast.config import ROWS, ConfigError, TrainConfig, find, read_sections, resolve
from vpgea_fast.metrics import finite, read_steps

Record = Mapping[str, Any]


class ReportError(ValueError):
    """A run directory that no report can be made of; the message has cause and remedy."""


def read_evaluation(run_dir: str | Path) -> dict[str, Any]:
    """eval.json of a run: {"before": {"step": 0, "sampled": {...}, ...}, "after": ...}; {} without
    the file. ReportError for one of another shape."""
    path = Path(run_dir) / "eval.json"
    remedy = "bring it back from a copy, or remove it: the run then goes on without what it held"
    evaluation = read_json(path, remedy)
    # Checked here once, so that nothing below asks for shapes again.
    for when in ("before", "after"):
        results = evaluation.get(when, {})
        check_results(f"{path}: {when}", results, remedy)
        step = results.get("step", 0)
        if type(step) is not int or step < 0:
            raise ReportError(f"{path}: {when}: got step {step!r}, expected a number; {remedy}")
    return evaluation


def evaluated(run_dir: str | Path, name: str) -> dict[int, float]:
    """Step -> `name` (sampled_eps3, greedy_acc, ...), of every evaluation in the run's files."""
    mode, _, key = name.partition("_")
    # Steps from the log, both ends from eval.json; an end wins over the log's line.
    pairs = [(r.get("eval_step"), r.get(f"eval_{name}")) for r in read_steps(run_dir)]
    ends = read_evaluation(run_dir)
    results = [ends[when] for when in ("before", "after") if when in ends]
    pairs += [(result.get("step"), result.get(mode, {}).get(key)) for result in results]
    return {
        step: value
        for step, raw in pairs
        if type(step) is int and (value := finite(raw)) is not None
    }


def check_results(where: str, results: Any, remedy: str) -> None:
    """Raise ReportError for what is no evaluation: modes, each with its numbers."""
    parts = (
        [results, *(results.get(mode, {}) for mode in book.MODES)] if is_map(results) else [results]
    )
    # Its own value is shown, which is how the user finds it in the file.
    wrong = next((part for part in parts if not is_map(part)), None)
    if wrong is not None or not all(map(is_map, parts)):
        raise ReportError(f"{where}: got {wrong!r:.60}, expected keys and values; {remedy}")


def is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def label_of(run_dir: Path) -> str:
    objective = section_of(run_dir, "objective")
    preset = f", preset {objective['preset']}" if "preset" in objective else ""
    return f"{objective.get('name', 'unknown objective')}{preset}"


def committed_rows(run_dir: Path) -> dict[str, Any]:
    """The committed rows; {} if the run names none or the file is not there."""
    path = section_of(run_dir, "metrics").get("compare")
    # A name like tiny_demo, or a path; neither need exist.
    comparison = read_json(Path(find(str(path), ROWS, ".json"))) if path else {}
    remedy = "rows must be objects with name, before and after"
    rows = comparison.get("rows", [])
    if not isinstance(rows, list) or not all(is_map(r) and "name" in r for r in rows):
        raise ReportError(f"{path}: {remedy}")
    for row in rows:
        for when in ("before", "after"):
            check_results(f"{path}: {row['name']}: {when}", row.get(when) or {}, remedy)
    return comparison


def limits(run_dir: Path) -> TrainConfig:
    """The section `train` as far as the alarms read it: other keys may be of another version."""
    names = ("idle_alarm", "idle_stop", "mismatch_stop", "mismatch_steps")
    keys = {key: value for key, value in section_of(run_dir, "train").items() if key in names}
    try:
        # Resolved, so that a key that is not given has the alarms' default.
        return resolve({"train": keys}, source=str(run_dir / "config.yaml")).train
    except ConfigError as error:
        raise ReportError(str(error)) from error


def section_of(run_dir: Path, name: str) -> Record:
    # A section without keys is null in YAML.
    section = run_config(run_dir).get(name) or {}
    if not is_map(section):
        raise ReportError(f"{run_dir / 'config.yaml'}: {name}: got {section!r:.60}, expected keys")
    return section


def run_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    try:
        return read_sections(path) if path.exists() else {}
    except ConfigError as error:
        raise ReportError(str(error)) from error


def read_json(path: Path, remedy: str = "write it again or remove it") -> dict[str, Any]:
    """Read the object of a JSON file; {} where there is no file."""
    if not path.exists():
        return {}
    try:
        tree = json.loads(text_of(path))
    # A file of ten thousand brackets is valid in form and too deep to read.
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {error}; {remedy}") from error
    if not isinstance(tree, dict):
        raise ReportError(f"{path}: got a {type(tree).__name__}, expected a JSON object; {remedy}")
    return tree


def text_of(path: Path) -> str:
    if not path.is_file():  # a pipe that nobody writes is waited for
        raise ReportError(f"cannot read {path}: it is no file; move it away")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error

"""A run as one picture, one table, and one HTML file that needs nothing beside it.

Reads what is in the run directory (config.yaml, metrics.jsonl, eval.json, environment.json) and the
committed rows of `metrics.compare`; what is missing is said, not guessed.
"""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpgea_fast import book
from vpgea_fast.checkpoint import write_text
from vpgea_fast.config import ROWS, ConfigError, TrainConfig, find, read_sections, resolve
from vpgea_fast.metrics import METRICS, Alarms, finite, missing_steps, read_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, FIGURE = "report.html", "training.png"
POINTS, ENDS = 2000, 5
"""The most points of a drawn line (even); how many steps a table's first and last are means of."""
Record = Mapping[str, Any]

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"  # Okabe and Ito's palette
PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...], str], ...] = (
    (
        "Length of thoughts",
        "tokens",
        (
            ("len_prior", "prior (student)", BLUE),
            ("len_post", "posterior (teacher)", ORANGE),
        ),
        "",
    ),
    (
        "Gated against its group",
        "length / mean length of the group",
        (("len_gated_ratio", "gated", GREEN),),
        "",
    ),
    (
        "Accuracy",
        "% of answers",
        (("acc_student", "student", BLUE), ("acc_teacher", "teacher", ORANGE)),
        "acc",
    ),
    (
        "Efficiency",
        "eps3 = (accuracy in %)² / tokens",
        (("eps3_student", "student", BLUE),),
        "eps3",
    ),
)
"""title, unit, (metric, label, colour) of the lines, and the key of the evaluation's points."""

SETTINGS = {
    "run": ("seed",),
    "model": ("path", "dtype", "device"),
    "data": ("train",),
    "rollout": ("engine", "max_new_tokens", "temperature", "full_answer"),
    "train": ("steps", "questions_per_step", "norm", "denominator"),
    "optim": ("lr", "schedule", "warmup_steps", "max_grad_norm"),
}
"""What the summary shows of each section; of `objective` it shows everything."""


class ReportError(ValueError):
    """A run directory that no report can be made of; the message has cause and remedy."""


def closing_table(run_dir: str | Path) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): the student before -> after training; the run, then the committed rows.

    No rows if the run was not evaluated. The interval is the 95 % bootstrap interval afterwards.
    Raises ReportError for a file that is there and cannot be read.
    """
    run_dir = Path(run_dir)
    own = read_evaluation(run_dir)
    entries = [{"name": f"this run: {_label(run_dir)}", **own}] if own else []
    if own:
        entries += _comparison(run_dir).get("rows", [])
    results = [result for entry in entries for result in _results(entry)]
    columns = {
        "accuracy %": lambda r: _arrow(r, "acc", lambda value: f"{100 * value:.1f}"),
        "95 % interval": _interval,
        "tokens": lambda r: _arrow(r, "tokens", lambda value: f"{value:.1f}"),
        "eps3": lambda r: _arrow(r, "eps3", _short),
        "eps3 of means": lambda r: _arrow(r, "eps3_mean", _short),
        "cut %": lambda r: _arrow(r, "truncated", lambda value: f"{100 * value:.1f}"),
        "samples": lambda r: _arrow(r, "n", lambda value: f"{value:.0f}").split(" -> ")[-1],
    }
    if all(r.get("eps3") == r.get("eps3_mean") for _, _, pair in results for r in pair):
        del columns["eps3 of means"]  # one benchmark: the two aggregations are one number
    rows = [
        [name, mode, *(cell(pair) for cell in columns.values())] for name, mode, pair in results
    ]
    return ["run", "answers", *columns], rows


def read_evaluation(run_dir: str | Path) -> dict[str, Any]:
    """eval.json of a run: {"before": {"step": 0, "sampled": {...}, ...}, "after": ...}; {} without
    the file. ReportError for one of another shape."""
    path = Path(run_dir) / "eval.json"
    remedy = "bring it back from a copy, or remove it: the run then goes on without what it held"
    evaluation = _read_json(path, remedy)
    for when in ("before", "after"):
        results = evaluation.get(when, {})
        _check_results(f"{path}: {when}", results, remedy)
        step = results.get("step", 0)
        if type(step) is not int or step < 0:
            raise ReportError(f"{path}: {when}: got step {step!r}, expected a number; {remedy}")
    return evaluation


def evaluated(run_dir: str | Path, name: str) -> dict[int, float]:
    """Step -> `name` (sampled_eps3, greedy_acc, ...), of every evaluation in the run's files."""
    mode, _, key = name.partition("_")
    found = [(r.get("eval_step"), r.get(f"eval_{name}")) for r in read_steps(run_dir)]
    ends = read_evaluation(run_dir)
    results = [ends[when] for when in ("before", "after") if when in ends]
    found += [(result.get("step"), result.get(mode, {}).get(key)) for result in results]
    return {
        step: value
        for step, raw in found
        if type(step) is int and (value := finite(raw)) is not None
    }


def closing_notes(run_dir: str | Path) -> list[str]:
    """The lines under the closing table: the run's note, and where the committed rows come from."""
    run_dir = Path(run_dir)
    section = _section(run_dir, "metrics")
    notes = [str(section.get("note", ""))]
    if section.get("compare"):
        comparison = _comparison(run_dir)
        made = [f"{key} {comparison[key]}" for key in ("commit", "command") if key in comparison]
        notes += [
            str(comparison.get("note", "")),
            f"the other runs: {section['compare']}" + (f" ({', '.join(made)})" if made else "")
            if comparison
            else f"committed rows are missing: there is no file {section['compare']}",
        ]
    return list(dict.fromkeys(filter(None, notes)))


class Line:
    """A series of at most POINTS points, whatever the number of values: beyond it two neighbours
    become one, their mean."""

    def __init__(self) -> None:
        self.bins: list[list[float]] = []  # sums of steps and of values, and their number
        self.width = 1

    def add(self, step: int, value: float) -> None:
        if self.bins and self.bins[-1][2] < self.width:
            last = self.bins[-1]
            last[0], last[1], last[2] = last[0] + step, last[1] + value, last[2] + 1
            return
        if len(self.bins) == POINTS:
            pairs = zip(self.bins[::2], self.bins[1::2], strict=True)
            self.bins = [[x + y for x, y in zip(a, b, strict=True)] for a, b in pairs]
            self.width *= 2
        self.bins.append([step, value, 1])

    def points(self, reach: int = 0) -> tuple[list[float], list[float]]:
        """(steps, values); with `reach` of each point and so many neighbours on both sides."""
        parts = [self.bins[max(0, i - reach) : i + reach + 1] for i in range(len(self.bins))]
        means = [math.fsum(b[1] for b in part) / math.fsum(b[2] for b in part) for part in parts]
        return [step / count for step, _, count in self.bins], means


class Span:
    """Ends and extremes of a metric: all that the table of metrics shows."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=ENDS)
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, value: float) -> None:
        if len(self.first) < ENDS:
            self.first.append(value)
        self.last.append(value)
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)

    def cells(self) -> list[str]:
        ends = statistics.fmean(self.first), statistics.fmean(self.last)
        return [_number(value) for value in (*ends, self.lowest, self.highest)]


class Log:
    """metrics.jsonl read once, a line at a time: what the page and the figure show of it. Time is
    linear in the lines; memory is bounded but for the numbers of the steps."""

    def __init__(self, run_dir: str | Path) -> None:
        run_dir = Path(run_dir)
        self.seen: set[int] = set()
        self.last = 0
        self.spans: dict[str, Span] = {}
        self.lines = {key: Line() for _, _, lines, _ in PANELS for key, *_ in lines}
        self.evaluations = {
            f"{mode}_{key}": Line() for *_, key in PANELS for mode in book.MODES if key
        }
        alarms, ends = Alarms(_limits(run_dir)), read_evaluation(run_dir)
        self.alarms: list[str] = []
        # In the order of the steps: a Line merges neighbours, and takes its points as they come.
        self._evaluated(ends.get("before", {}))
        for record in read_steps(run_dir):
            self.alarms += alarms.update(record)
            if alarms.halt:
                self.alarms.append(f"stopped at step {record['step']}: {alarms.halt}")
            self._add(record)
        self._evaluated(ends.get("after", {}))

    @property
    def gaps(self) -> str:
        return missing_steps(self.seen, self.last)

    def _add(self, record: Record) -> None:
        step = record["step"]
        self.seen.add(step)
        self.last = max(self.last, step)
        for key, raw in record.items():
            value = finite(raw)
            if value is None or key == "step":
                continue
            if key not in self.spans:
                self.spans[key] = Span()
            self.spans[key].add(value)
            if key in self.lines:
                self.lines[key].add(step, value)
        at = finite(record.get("eval_step")) or step
        for name, line in self.evaluations.items():
            value = finite(record.get(f"eval_{name}"))
            if value is not None:
                line.add(int(at), value)

    def _evaluated(self, result: Record) -> None:
        for name, line in self.evaluations.items():
            mode, _, key = name.partition("_")
            value = finite(result.get(mode, {}).get(key))
            if value is not None:
                line.add(result.get("step", self.last), value)


def plot_training(run_dir: str | Path, out_png: str | Path, log: Log | None = None) -> Path:
    """Lengths, gate, accuracy and eps3 by step, dots for evaluations, without missing series.

    Thin lines are the steps, bold ones their moving average over a twentieth of the run. Of more
    than POINTS steps a point is the mean of 2, 4, ... neighbours. `log`: what was read already.
    Raises ReportError when no step was recorded.
    """
    from matplotlib.figure import Figure  # 0.5 s; and no pyplot, so no global state

    run_dir, out_png = Path(run_dir), Path(out_png)
    log = log or Log(run_dir)
    if not log.seen:
        raise ReportError(f"{run_dir / METRICS} has no step; a figure needs one. Train first")
    figure = Figure(figsize=(17, 4))
    figure.set_layout_engine("constrained", wspace=0.06)
    for axes, (title, unit, lines, eval_key) in zip(
        figure.subplots(1, len(PANELS)), PANELS, strict=True
    ):
        scale = 100 if eval_key == "acc" else 1  # logged as a share, drawn in percent
        for key, label, colour in lines:
            _draw(axes, log.lines[key], scale=scale, label=label, colour=colour)
        for mode, marker in (("sampled", "o"), ("greedy", "D")) if eval_key else ():
            steps, values = log.evaluations[f"{mode}_{eval_key}"].points()
            if steps:
                axes.plot(
                    steps,
                    [scale * value for value in values],
                    marker,
                    color=BLACK,
                    markerfacecolor=BLACK if mode == "sampled" else "white",
                    label=f"evaluation, {mode}",
                    zorder=4,
                )
        _finish(axes, title, unit, last=log.last)
    figure.suptitle(f"{_label(run_dir)}: {log.last} steps", fontsize=13)
    try:
        figure.savefig(out_png, dpi=130)
    except OSError as error:
        raise ReportError(
            f"cannot write {out_png}: {error.strerror}; free disk space or make it writable"
        ) from error
    return out_png


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and training.png into the run directory; return the path of the former.

    Parts whose files are missing are named in their place. Raises ReportError for a directory that
    is no run, and for files that cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ReportError(f"{run_dir} is no run: config.yaml is missing; give a run directory")
    log = Log(run_dir)  # the one pass over metrics.jsonl: figure, alarms and table share it
    headers, rows = closing_table(run_dir)
    lost = [f"{METRICS} has no line of steps {log.gaps}; the rest is shown."] if log.gaps else []
    sections = {
        "Before and after": _table(headers, rows) + _paragraphs(closing_notes(run_dir))
        if rows
        else _paragraphs(["This run was not evaluated (no eval.json); set eval.data."]),
        "Training": _figure(run_dir, log) + _paragraphs(lost, "alarm")
        if log.seen
        else _paragraphs(["No step was recorded."]),
        "Alarms": _paragraphs(log.alarms, "alarm")
        if log.alarms
        else _paragraphs(["None was raised."]),
        "Settings": _table(["key", "value"], list(_settings(_config(run_dir))))
        + f"<details><summary>config.yaml</summary><pre>{escape(_text(run_dir / 'config.yaml'))}"
        "</pre></details>",
        "Metrics": _table(
            ["metric", f"first {ENDS}", f"last {ENDS}", "lowest", "highest"],
            [[key, *span.cells()] for key, span in log.spans.items()],
            hints={key: str(metric) for key, metric in book.METRICS.items()},
        )
        if log.seen
        else "",
        "Environment": _environment(run_dir),
    }
    title = f"{run_dir.resolve().name}: {_label(run_dir)}"
    body = "\n".join(f"<h2>{name}</h2>\n{html}" for name, html in sections.items() if html)
    write_text(run_dir / REPORT, PAGE.format(title=escape(title), body=body))
    return run_dir / REPORT


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }}
h1, h2 {{ font-weight: 600; line-height: 1.2; }} h2 {{ margin-top: 2.2rem; font-size: 1.2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ font-weight: 600; border-bottom-color: #888; }} td[title] {{ cursor: help; }}
.scroll {{ overflow-x: auto; }} img {{ max-width: 100%; }} p {{ margin: .4rem 0; }}
.alarm {{ border-left: 4px solid #D55E00; padding-left: .7rem; }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def _results(entry: Record) -> Iterator[tuple[str, str, tuple[Record, Record]]]:
    """(name, mode, (before, after)) of one run, for the modes that it was evaluated in."""
    before, after = entry.get("before") or {}, entry.get("after") or {}
    for mode in book.MODES:
        if mode in before or mode in after:
            yield entry.get("name", "?"), mode, (before.get(mode, {}), after.get(mode, {}))


def _check_results(where: str, results: Any, remedy: str) -> None:
    """ReportError for what is no evaluation: modes, each with its numbers."""
    parts = (
        [results, *(results.get(mode, {}) for mode in book.MODES)]
        if _is_map(results)
        else [results]
    )
    wrong = next((part for part in parts if not _is_map(part)), None)
    if wrong is not None or not all(map(_is_map, parts)):
        raise ReportError(f"{where}: got {wrong!r:.60}, expected keys and values; {remedy}")


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _arrow(pair: tuple[Record, Record], key: str, show: Callable[[float], str]) -> str:
    values = [finite(result.get(key)) for result in pair]
    return " -> ".join("-" if value is None else show(value) for value in values)


def _interval(pair: tuple[Record, Record]) -> str:
    bounds = [finite(pair[1].get(key)) for key in ("acc_low", "acc_high")]
    shown = ["-" if bound is None else f"{100 * bound:.1f}" for bound in bounds]
    return "-" if shown == ["-", "-"] else f"{shown[0]} to {shown[1]}"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _draw(axes: Axes, line: Line, scale: float, label: str, colour: str) -> None:
    steps, values = line.points()
    if not steps:
        return
    values = [scale * value for value in values]
    reach = len(values) // 40
    if not reach:
        axes.plot(steps, values, color=colour, marker="." if len(values) < 3 else "", label=label)
        return
    smooth = [scale * value for value in line.points(reach)[1]]
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color=colour, linewidth=2, label=label)


def _finish(axes: Axes, title: str, unit: str, *, last: int) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.locator_params(axis="x", integer=True)
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
        return
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    axes.set_ylim(0, 103 if title == "Accuracy" else 1.03 * axes.get_ylim()[1])


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.4g}"


def _settings(config: Record) -> Iterator[list[str]]:
    for section, content in config.items():
        keys = SETTINGS.get(section, content if section == "objective" else ())
        for key in keys:
            if isinstance(content, Mapping) and key in content:
                yield [f"{section}.{key}", str(content[key])]


def _environment(run_dir: Path) -> str:
    facts = _read_json(run_dir / "environment.json")
    if not facts:
        return _paragraphs(["environment.json is missing."])
    return _table(["", ""], [[str(key), str(value)] for key, value in facts.items()])


def _figure(run_dir: Path, log: Log) -> str:
    data = plot_training(run_dir, run_dir / FIGURE, log).read_bytes()
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    alt = "Lengths, gate, accuracy and eps3 over the training steps"
    return f'<img alt="{alt}" src="{source}">'


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], hints: Mapping[str, str] | None = None
) -> str:
    """A table as HTML; a cell that `hints` knows shows that text under the pointer."""

    def line(cells: Sequence[str], tag: str) -> str:
        titles = [
            f' title="{escape(hints[cell])}"' if hints and cell in hints else "" for cell in cells
        ]
        parts = [
            f"<{tag}{title}>{escape(cell)}</{tag}>"
            for title, cell in zip(titles, cells, strict=True)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    head = line(headers, "th") if any(headers) else ""
    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{head}\n{body}</table></div>'


def _paragraphs(texts: Sequence[str], css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return "\n".join(f"<p{attribute}>{escape(text)}</p>" for text in texts)


def _label(run_dir: Path) -> str:
    objective = _section(run_dir, "objective")
    preset = f", preset {objective['preset']}" if "preset" in objective else ""
    return f"{objective.get('name', 'unknown objective')}{preset}"


def _comparison(run_dir: Path) -> dict[str, Any]:
    """The committed rows; {} if the run names none or the file is not there."""
    path = _section(run_dir, "metrics").get("compare")
    comparison = _read_json(Path(find(str(path), ROWS, ".json"))) if path else {}
    remedy = "rows must be objects with name, before and after"
    rows = comparison.get("rows", [])
    if not isinstance(rows, list) or not all(_is_map(r) and "name" in r for r in rows):
        raise ReportError(f"{path}: {remedy}")
    for row in rows:
        for when in ("before", "after"):
            _check_results(f"{path}: {row['name']}: {when}", row.get(when) or {}, remedy)
    return comparison


def _limits(run_dir: Path) -> TrainConfig:
    """The section `train` as far as the alarms read it: other keys may be of another version."""
    names = ("idle_alarm", "idle_stop", "mismatch_stop", "mismatch_steps")
    keys = {key: value for key, value in _section(run_dir, "train").items() if key in names}
    try:
        return resolve({"train": keys}, source=str(run_dir / "config.yaml")).train
    except ConfigError as error:
        raise ReportError(str(error)) from error


def _section(run_dir: Path, name: str) -> Record:
    section = _config(run_dir).get(name) or {}
    if not _is_map(section):
        raise ReportError(f"{run_dir / 'config.yaml'}: {name}: got {section!r:.60}, expected keys")
    return section


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    try:
        return read_sections(path) if path.exists() else {}
    except ConfigError as error:
        raise ReportError(str(error)) from error


def _read_json(path: Path, remedy: str = "write it again or remove it") -> dict[str, Any]:
    """{} for a file that is not there."""
    if not path.exists():
        return {}
    try:
        tree = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {error}; {remedy}") from error
    if not isinstance(tree, dict):
        raise ReportError(f"{path}: got a {type(tree).__name__}, expected a JSON object; {remedy}")
    return tree


def _text(path: Path) -> str:
    if not path.is_file():  # a pipe that nobody writes is waited for
        raise ReportError(f"cannot read {path}: it is no file; move it away")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error

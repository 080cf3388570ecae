"""A run as one picture, one table, and one HTML file that needs nothing beside it.

Reads what is in the run directory (config.yaml, metrics.jsonl, eval.json, environment.json) and the
committed rows of `metrics.compare`; what is missing is said, not guessed.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpgea_fast.checkpoint import write_text
from vpgea_fast.config import ConfigError, read_sections
from vpgea_fast.metrics import METRICS, Alarms, finite, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, FIGURE = "report.html", "training.png"
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
    own = _read_json(run_dir / "eval.json")
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


def closing_notes(run_dir: str | Path) -> list[str]:
    """The lines under the closing table: the run's note, and where the committed rows come from."""
    run_dir = Path(run_dir)
    section = _config(run_dir).get("metrics") or {}
    notes = [section.get("note", "")]
    if section.get("compare"):
        comparison = _comparison(run_dir)
        made = [f"{key} {comparison[key]}" for key in ("commit", "command") if key in comparison]
        notes += [
            comparison.get("note", ""),
            f"the other runs: {section['compare']}" + (f" ({', '.join(made)})" if made else "")
            if comparison
            else f"committed rows are missing: there is no file {section['compare']}",
        ]
    return list(dict.fromkeys(filter(None, notes)))


def plot_training(run_dir: str | Path, out_png: str | Path) -> Path:
    """Lengths, gate, accuracy and eps3 by step, dots for evaluations, without missing series.

    Thin lines are the steps, bold ones their moving average over a twentieth of the run.
    Raises ReportError when no step was recorded.
    """
    from matplotlib.figure import Figure  # 0.5 s; and no pyplot, so no global state

    run_dir, out_png = Path(run_dir), Path(out_png)
    records = _records(run_dir)
    if not records:
        raise ReportError(f"{run_dir / METRICS} has no step; a figure needs one. Train first")
    evaluation = _read_json(run_dir / "eval.json")
    figure = Figure(figsize=(17, 4))
    figure.set_layout_engine("constrained", wspace=0.06)
    for axes, (title, unit, lines, eval_key) in zip(
        figure.subplots(1, len(PANELS)), PANELS, strict=True
    ):
        scale = 100 if eval_key == "acc" else 1
        for key, label, colour in lines:
            _draw(axes, [(r["step"], r.get(key)) for r in records], scale, label, colour)
        if eval_key:
            for mode, marker in (("sampled", "o"), ("greedy", "D")):
                points = list(_eval_points(records, evaluation, mode, eval_key))
                if points:
                    steps, values = zip(*points, strict=True)
                    axes.plot(
                        steps,
                        [scale * value for value in values],
                        marker,
                        color=BLACK,
                        markerfacecolor=BLACK if mode == "sampled" else "white",
                        label=f"evaluation, {mode}",
                        zorder=4,
                    )
        _finish(axes, title, unit, last=records[-1]["step"])
    figure.suptitle(f"{_label(run_dir)}: {records[-1]['step']} steps", fontsize=13)
    figure.savefig(out_png, dpi=130)
    return out_png


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and training.png into the run directory; return the path of the former.

    Parts whose files are missing are named in their place. Raises ReportError for a directory that
    is no run, and for files that cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ReportError(f"{run_dir} is no run: config.yaml is missing; give a run directory")
    records = _records(run_dir)
    headers, rows = closing_table(run_dir)
    alarms = Alarms().replay(run_dir)
    sections = {
        "Before and after": _table(headers, rows) + _paragraphs(closing_notes(run_dir))
        if rows
        else _paragraphs(["This run was not evaluated (no eval.json); set eval.data."]),
        "Training": _figure(run_dir) if records else _paragraphs(["No step was recorded."]),
        "Alarms": _paragraphs(alarms, "alarm") if alarms else _paragraphs(["None was raised."]),
        "Settings": _table(["key", "value"], list(_settings(_config(run_dir))))
        + f"<details><summary>config.yaml</summary><pre>{escape(_text(run_dir / 'config.yaml'))}"
        "</pre></details>",
        "Metrics": _table(["metric", "first 5", "last 5", "lowest", "highest"], _summary(records))
        if records
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
th {{ font-weight: 600; border-bottom-color: #888; }}
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
    for mode in ("sampled", "greedy"):
        if mode in before or mode in after:
            yield entry.get("name", "?"), mode, (before.get(mode, {}), after.get(mode, {}))


def _arrow(pair: tuple[Record, Record], key: str, show: Callable[[float], str]) -> str:
    values = [finite(result.get(key)) for result in pair]
    return " -> ".join("-" if value is None else show(value) for value in values)


def _interval(pair: tuple[Record, Record]) -> str:
    bounds = [finite(pair[1].get(key)) for key in ("acc_low", "acc_high")]
    shown = ["-" if bound is None else f"{100 * bound:.1f}" for bound in bounds]
    return "-" if shown == ["-", "-"] else f"{shown[0]} to {shown[1]}"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _draw(
    axes: Axes, points: Sequence[tuple[int, Any]], scale: float, label: str, colour: str
) -> None:
    known = [(step, scale * y) for step, value in points if (y := finite(value)) is not None]
    if not known:
        return
    steps, values = zip(*known, strict=True)
    reach = len(values) // 40
    if not reach:
        axes.plot(steps, values, color=colour, marker="." if len(values) < 3 else "", label=label)
        return
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, [statistics.fmean(w) for w in windows], color=colour, linewidth=2, label=label)


def _eval_points(
    records: Sequence[Record], evaluation: Record, mode: str, key: str
) -> Iterator[tuple[int, float]]:
    """(step, value) of the evaluations before, during and after training."""
    logged = [
        (record.get("eval_step", record["step"]), record.get(f"eval_{mode}_{key}"))
        for record in records
    ]
    ends = {"before": 0, "after": records[-1]["step"]}
    for when, step in ends.items():
        result = evaluation.get(when) or {}
        logged.append((result.get("step", step), (result.get(mode) or {}).get(key)))
    yield from sorted((step, y) for step, value in logged if (y := finite(value)) is not None)


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


def _summary(records: Sequence[Record]) -> list[list[str]]:
    keys = dict.fromkeys(key for record in records for key in record if key != "step")
    rows = []
    for key in keys:
        values = [y for record in records if (y := finite(record.get(key))) is not None]
        if values:
            ends = [statistics.fmean(values[:5]), statistics.fmean(values[-5:])]
            rows.append([key, *map(_number, (*ends, min(values), max(values)))])
    return rows


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


def _figure(run_dir: Path) -> str:
    data = plot_training(run_dir, run_dir / FIGURE).read_bytes()
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    alt = "Lengths, gate, accuracy and eps3 over the training steps"
    return f'<img alt="{alt}" src="{source}">'


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = line(headers, "th") if any(headers) else ""
    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{head}\n{body}</table></div>'


def _paragraphs(texts: Sequence[str], css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return "\n".join(f"<p{attribute}>{escape(text)}</p>" for text in texts)


def _label(run_dir: Path) -> str:
    objective = _config(run_dir).get("objective") or {}
    preset = f", preset {objective['preset']}" if "preset" in objective else ""
    return objective.get("name", "unknown objective") + preset


def _comparison(run_dir: Path) -> dict[str, Any]:
    """The committed rows; {} if the run names none or the file is not there."""
    path = (_config(run_dir).get("metrics") or {}).get("compare")
    comparison = _read_json(Path(path)) if path else {}
    if not all(isinstance(row, dict) and "name" in row for row in comparison.get("rows", [])):
        raise ReportError(f"{path}: rows must be objects with name, before and after")
    return comparison


def _records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / METRICS
    return read_jsonl(path) if path.exists() else []


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    try:
        return read_sections(path) if path.exists() else {}
    except ConfigError as error:
        raise ReportError(str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    """{} for a file that is not there."""
    if not path.exists():
        return {}
    try:
        tree = json.loads(_text(path))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}; write it again or remove it") from error
    if not isinstance(tree, dict):
        raise ReportError(f"{path}: got {type(tree).__name__}, expected a JSON object")
    return tree


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error

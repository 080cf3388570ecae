"""A run as one picture, one table, and one HTML file that needs nothing beside it.

Reads what is in the run directory (config.yaml, metrics.jsonl, eval.json, environment.json) and the
committed rows of `metrics.compare`; what is missing is said, not guessed.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from vpgea_fast import book
from vpgea_fast.checkpoint import write_text
from vpgea_fast.metrics import METRICS, finite, read_steps
from vpgea_fast.objectives.guards import GUARDS
from vpgea_fast.report.comparison import plot_comparison
from vpgea_fast.report.figure import ENDS, POINTS, Line, Log, plot_training
from vpgea_fast.report.files import (
    Record,
    ReportError,
    committed_rows,
    evaluated,
    label_of,
    read_evaluation,
    read_json,
    run_config,
    section_of,
    text_of,
)

__all__ = [
    "POINTS",
    "Line",
    "Log",
    "ReportError",
    "closing_notes",
    "closing_table",
    "evaluated",
    "plot_comparison",
    "plot_training",
    "read_evaluation",
    "read_json",
    "write_report",
]

REPORT, FIGURE = "report.html", "training.png"
UNDRAWN = "metrics.figure is false; `vpgea report` of this directory draws the figure."
SETTINGS = {
    "run": ("seed",),
    "model": ("path", "dtype", "device"),
    "data": ("train",),
    "rollout": ("engine", "max_new_tokens", "temperature", "full_answer"),
    "train": ("steps", "questions_per_step"),
    "optim": ("lr", "schedule", "warmup_steps", "max_grad_norm"),
}
"""What the summary shows of each section; of `objective` it shows everything."""


def closing_table(run_dir: str | Path) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): the student before -> after training; the run, then the committed rows.

    No rows if the run was not evaluated. The interval is the 95 % bootstrap interval afterwards.
    Raises ReportError for a file that is there and cannot be read.
    """
    run_dir = Path(run_dir)
    own = read_evaluation(run_dir)
    entries = [{"name": f"this run: {label_of(run_dir)}", **own}] if own else []
    # Committed rows alone would look like a result of this run.
    if own:
        entries += committed_rows(run_dir).get("rows", [])
    results = [result for entry in entries for result in _results(entry)]
    # Heading -> cell of a (before, after) pair; a column is added here alone.
    columns = {
        "accuracy %": lambda r: _arrow(r, "acc", lambda value: f"{100 * value:.1f}"),
        "95 % interval": _interval,
        "tokens": lambda r: _arrow(r, "tokens", lambda value: f"{value:.1f}"),
        "eps3": lambda r: _arrow(r, "eps3", _short),
        "eps3 of means": lambda r: _arrow(r, "eps3_mean", _short),
        "cut %": lambda r: _arrow(r, "truncated", lambda value: f"{100 * value:.1f}"),
        # How many answers were drawn, in the evaluation afterwards.
        "samples": lambda r: _arrow(r, "n", lambda value: f"{value:.0f}").split(" -> ")[-1],
    }
    if all(r.get("eps3") == r.get("eps3_mean") for _, _, pair in results for r in pair):
        del columns["eps3 of means"]  # one benchmark: the two aggregations are one number
    rows = [
        [name, mode, *(cell(pair) for cell in columns.values())] for name, mode, pair in results
    ]
    return ["run", "answers", *columns], rows


def closing_notes(run_dir: str | Path) -> list[str]:
    """The lines under the closing table: the run's note, what its leak guard caught and cost, and
    where the committed rows come from."""
    run_dir = Path(run_dir)
    section = section_of(run_dir, "metrics")
    notes = [str(section.get("note", "")), _guard_note(run_dir)]
    if section.get("compare"):
        comparison = committed_rows(run_dir)
        # Where committed rows come from, so that they can be made again.
        origin = [f"{key} {comparison[key]}" for key in ("commit", "command") if key in comparison]
        notes += [
            str(comparison.get("note", "")),
            f"the other runs: {section['compare']}" + (f" ({', '.join(origin)})" if origin else "")
            if comparison
            else f"committed rows are missing: there is no file {section['compare']}",
        ]
    # A run's note may be the committed rows' own: each once.
    return list(dict.fromkeys(filter(None, notes)))


def _guard_note(run_dir: Path) -> str:
    """Say what each guard caught, and what the leak guard took, over all steps; "" for a run
    without one."""
    keys = (*GUARDS, "time_guard_ratio")
    # Of steps, not of paths: every step draws as many.
    known = {key: [] for key in keys}
    for step in read_steps(run_dir):
        for key in keys:
            if (value := finite(step.get(key))) is not None:
                known[key].append(value)
    section, said = section_of(run_dir, "objective"), []
    for caught, (key, *_) in GUARDS.items():
        if known[caught]:
            name = key if section.get(key) in (None, True) else f"{key} {section[key]}"
            said.append(f"{name} rejected {fmean(known[caught]):.1%}")
    # The others only read texts and lengths.
    took = f"; leak_guard took {fmean(known[keys[-1]]):.1%} of the time" if known[keys[-1]] else ""
    return f"of the teacher's paths {', '.join(said)}{took}" if said else ""


def write_report(run_dir: str | Path, *, figure: bool = True) -> Path:
    """Write report.html and training.png into the run directory; return the path of the former.

    Parts whose files are missing are named in their place, and so is a `figure` not wanted. Raises
    ReportError for a directory that is no run, and for files that cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ReportError(f"{run_dir} is no run: config.yaml is missing; give a run directory")
    log = Log(run_dir)  # the one pass over metrics.jsonl: figure, alarms and table share it
    headers, rows = closing_table(run_dir)
    # A crash between two saves may lose lines; a curve would hide the gap.
    lost = [f"{METRICS} has no line of steps {log.gaps}; the rest is shown."] if log.gaps else []
    # In the order of the page: the result first, what it hangs on last.
    sections = {
        "Before and after": _table(headers, rows) + _paragraphs(closing_notes(run_dir))
        if rows
        else _paragraphs(["This run was not evaluated (no eval.json); set eval.data."]),
        "Training": (_figure(run_dir, log) if figure else _paragraphs([UNDRAWN]))
        + _paragraphs(lost, "alarm")
        if log.seen
        else _paragraphs(["No step was recorded."]),
        "Alarms": _paragraphs(log.alarms, "alarm")
        if log.alarms
        else _paragraphs(["None was raised."]),
        "Settings": _table(["key", "value"], list(_settings(run_config(run_dir))))
        + f"<details><summary>config.yaml</summary><pre>{escape(text_of(run_dir / 'config.yaml'))}"
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
    title = f"{run_dir.resolve().name}: {label_of(run_dir)}"
    body = "\n".join(f"<h2>{name}</h2>\n{html}" for name, html in sections.items() if html)
    # At once: a browser that reloads finds the old page or the new.
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


def _arrow(pair: tuple[Record, Record], key: str, show: Callable[[float], str]) -> str:
    values = [finite(result.get(key)) for result in pair]
    return " -> ".join("-" if value is None else show(value) for value in values)


def _interval(pair: tuple[Record, Record]) -> str:
    bounds = [finite(pair[1].get(key)) for key in ("acc_low", "acc_high")]
    shown = ["-" if bound is None else f"{100 * bound:.1f}" for bound in bounds]
    # Runs of an older version have no interval.
    return "-" if shown == ["-", "-"] else f"{shown[0]} to {shown[1]}"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _settings(config: Record) -> Iterator[list[str]]:
    for section, content in config.items():
        # The objective whole: each of its keys is a part of the method.
        keys = SETTINGS.get(section, content if section == "objective" else ())
        for key in keys:
            if isinstance(content, Mapping) and key in content:
                yield [f"{section}.{key}", str(content[key])]


def _environment(run_dir: Path) -> str:
    facts = read_json(run_dir / "environment.json")
    if not facts:
        return _paragraphs(["environment.json is missing."])
    return _table(["", ""], [[str(key), str(value)] for key, value in facts.items()])


def _figure(run_dir: Path, log: Log) -> str:
    data = plot_training(run_dir, run_dir / FIGURE, log).read_bytes()
    # Inside the page, which then is one file to send.
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
        # Everything is escaped: a path or a note may hold markup.
        parts = [
            f"<{tag}{title}>{escape(cell)}</{tag}>"
            for title, cell in zip(titles, cells, strict=True)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    # A table of facts has no heading to show.
    head = line(headers, "th") if any(headers) else ""
    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{head}\n{body}</table></div>'


def _paragraphs(texts: Sequence[str], css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return "\n".join(f"<p{attribute}>{escape(text)}</p>" for text in texts)

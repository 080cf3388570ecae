"""A comparison as text: Markdown, LaTeX (booktabs) and JSON.

The same tables in all of them: what papers print (benchmarks x accuracy, tokens, eps3), the
differences, what the draws tell, and published figures under their own protocols.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]
TRIPLE = ("acc %", "tokens", "eps3")
"""What papers print of a benchmark."""


class Grid(NamedTuple):
    """A table: a title, headers, rows of cells, lines below it."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    notes: Sequence[str] = ()


def grids(comparison: Record) -> list[Grid]:
    """Lay out what `compare` returns."""
    several = len(comparison["rows"]) > 1
    # One evaluation alone has nothing to differ from.
    found = [_results(comparison), *[_differences(comparison)] * several, draws(comparison)]
    names = list(comparison["questions"])
    return found + [_published(key, t, names) for key, t in comparison["published"].items()]


def _results(comparison: Record) -> Grid:
    names, rows = list(comparison["questions"]), []
    several = len(names) > 1
    for row in comparison["rows"]:
        cells = [row["name"]]
        for part in row["benchmarks"].values():
            cells += [_percent(part["acc"]), _whole(part["tokens"]), _ratio(part["eps3"])]
        mean = row["mean"]
        keys = ("eps3", "eps3_mean")
        means = [_percent(mean["acc"]), _whole(mean["tokens"]), *(_ratio(mean[k]) for k in keys)]
        # Of one benchmark the mean says the same again.
        rows.append(cells + means * several)
    headers = ["model"] + [
        f"{name} {what}" for name in names for what in ("acc %", "tokens", "eps3")
    ]
    headers += ["mean acc %", "mean tokens", "mean eps3", "eps3 of means"] * several
    return Grid(f"Results, {comparison['mode']} answers", headers, rows, comparison["notes"])


def _differences(comparison: Record) -> Grid:
    # Key of the change, and what it is multiplied by to be shown.
    columns: dict[str, tuple[str, float]] = {
        "accuracy, points": ("acc", 100),
        "tokens %": ("tokens", 100),
        "eps3 %": ("eps3", 100),
        "eps3 of means %": ("eps3_mean", 100),
        "AES": ("aes", 1),
    }
    several, rows = len(comparison["questions"]) > 1, []
    # The first is the base.
    for row in comparison["rows"][1:]:
        for name, changes in row["against"].items():
            if name != "mean" or several:
                cells = [_change(changes[key], scale) for key, scale in columns.values()]
                rows.append([row["name"], name, *cells])
    notes = (
        "95 % intervals in brackets: paired bootstrap over questions; * does not hold 0",
        "AES of O1-Pruner (arXiv 2501.12570) with weights 1, 3 and 5",
    )
    return Grid(
        f"Differences from {comparison['base']}", ["model", "benchmark", *columns], rows, notes
    )


def draws(comparison: Record) -> Grid:
    """Lay out what the draws of every evaluation tell, with its own intervals."""
    columns: dict[str, Callable[[Record], str]] = {
        "k": lambda p: str(p["k"]),
        "avg@k %": lambda p: f"{_percent(p['acc'])} {_span(p['intervals']['acc'], 100)}",
        "pass@k %": lambda p: _percent(p["pass_at"][str(p["k"])]),
        "maj@k %": lambda p: _percent(p["maj_at"][str(p["k"])]),
        "tokens per right answer": lambda p: _whole(p["tokens_per_correct"]),
        "eps3": lambda p: f"{_ratio(p['eps3'])} {_span(p['intervals']['eps3'], 1, '.3g')}",
        "cut %": lambda p: _percent(p["truncated"]),
    }
    rows = [
        [row["name"], name, *(cell(part) for cell in columns.values())]
        for row in comparison["rows"]
        for name, part in row["benchmarks"].items()
    ]
    note = "maj@k: predictions that tie share; an answer without a prediction does not vote"
    return Grid("Draws", ["model", "benchmark", *columns], rows, [note])


def _published(key: str, table: Record, names: Sequence[str]) -> Grid:
    # No empty columns for a benchmark that this paper leaves out.
    shown = [n for n in names if any(n in row["benchmarks"] for row in table["rows"])]
    headers = [f"{name} {what}" for name in shown for what in TRIPLE]
    rows = []
    for row in table["rows"]:
        cells = [" ".join(filter(None, (row["method"], row["size"])))]
        for name in shown:
            # A row may lack a benchmark that others of its table have.
            part = row["benchmarks"].get(name, {})
            cells += [_percent(part.get("acc")), _whole(part.get("tokens"))]
            cells.append(_ratio(part.get("eps3")))
        rows.append(cells)
    protocol = f"{table['protocol']}; compare within this table only"
    return Grid(
        f"Published, {key}: {table['source']}",
        ["method", *headers],
        rows,
        [protocol, *table["notes"]],
    )


def markdown(tables: Sequence[Grid]) -> str:
    """Write tables for a README; the first column is left, numbers are right."""
    parts = []
    for grid in tables:
        head = [grid.headers, [":--"] + ["--:"] * (len(grid.headers) - 1)]
        lines = [f"| {' | '.join(map(_bar, row))} |" for row in [*head, *grid.rows]]
        notes = [f"- {note}" for note in grid.notes]
        parts.append("\n".join([f"### {grid.title}", "", *lines, *([""] if notes else []), *notes]))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Grid]) -> str:
    """Write tables for a paper: \\usepackage{booktabs}; the notes stand in the caption."""
    parts = []
    for grid in tables:
        rows = [" & ".join(map(_tex, row)) + r" \\" for row in [grid.headers, *grid.rows]]
        caption = _tex(". ".join([grid.title, *grid.notes]))
        columns = "l" + "r" * (len(grid.headers) - 1)
        lines = [
            r"\begin{table}",
            rf"\caption{{{caption}.}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_json(comparison: Record) -> str:
    # `compare` has put None for what JSON lacks, so a NaN here is a fault.
    return json.dumps(comparison, indent=1, allow_nan=False) + "\n"


TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        **{c: f"\\{c}" for c in "&%$#_{}"},
    }
)


def _tex(text: str) -> str:
    # In one pass: what one rule writes no other rule reads.
    text = " ".join(text.split()).translate(TEX)
    # At the head of a row a bracket or a star would be an option of the line break before it.
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def _bar(text: str) -> str:
    # A bar would begin the next cell, and a line break the next row.
    return " ".join(text.split()).replace("|", r"\|")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _span(edges: Sequence[float | None], scale: float, form: str = ".1f") -> str:
    low, high = edges
    return (
        "[-]" if low is None or high is None else f"[{scale * low:{form}}, {scale * high:{form}}]"
    )


def _change(change: Record, scale: float) -> str:
    value, low, high = (change[key] for key in ("value", "low", "high"))
    if value is None:
        return "-"
    # Shares come times 100, to a tenth; the AES has no unit.
    form = "+.1f" if scale == 100 else "+.2f"
    clear = "*" if low is not None and high is not None and (low > 0 or high < 0) else ""
    return f"{scale * value:{form}} {_span((low, high), scale, form)}{clear}"

"""What kernel_bench.py shows of its records: tables, the closing words and the picture.

A record is one row of its JSON; records of correctness have no time. Nothing here measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_providers import EAGER, GROUP, PER_TOKEN, Provider

from vpgea_fast.metrics import Console

ERRORS = ("error_max", "error_mean", "error_dx", "error_dw")
HEAD_MODES = ("forward", "backward", "full", "scoring")
COLOURS = {
    "triton": "#1f77b4",
    "triton, dW out": "#8ec1e8",
    "cublas": "#2ca02c",
    "cublas bf16": "#1b5e20",
    "cublas, dW out": "#98df8a",
    "torch": "#d62728",
    "torch, dW out": "#ff9896",
    "reference": "#7f7f7f",
    "eager torch": "#e0a800",
    "torch.compile": "#ff7f0e",
    "torch LCE": "#9467bd",
    "torch LCE mean": "#c5b0d5",
    "Liger FLCE": "#17becf",
    "Liger FLSCE": "#0b7285",
    "Liger GRPO": "#9edae5",
    "CCE exact": "#bcbd22",
    "QuACK": "#e377c2",
    "TRL chunked": "#8c564b",
    "kernel": "#3f51b5",
}
"""One per provider: the same in every panel, and in the pictures of two runs."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def main_mode(op: str) -> str:
    """What an op is mostly called for: values and gradients; of the group ops, which have none,
    values."""
    return "full" if op in PER_TOKEN else "forward"


# --- tables -------------------------------------------------------------------------------------


def gate_words(gate: float | None) -> str:
    return "" if gate is None else f", gate {gate:g}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def size_words(record: dict[str, Any]) -> str:
    """N, D, V = 2048, 512, 32768, fp32; of the group ops, which have no head, N alone."""
    sizes = {"N": record["rows"], "D": record["hidden"], "V": record["vocabulary"]}
    known = {name: str(size) for name, size in sizes.items() if size is not None}
    return f"{', '.join(known)} = {', '.join(known.values())}, {record['dtype']}"


def show_correctness(
    op: str, gate: float | None, records: Sequence[dict[str, Any]], args: Any, console: Console
) -> None:
    rows = min(args.check_rows, args.shape[0])
    console.table(
        ("provider", "verdict", "max |value|", "mean |value|", "dX", "dW", "why"),
        [
            [r["provider"], r["status"], *(number(r[key]) for key in ERRORS), r["reason"]]
            for r in records
        ],
        title=f"{op}{gate_words(gate)}: errors against float64 at {rows} rows, {args.dtype_name}",
    )


def skipped_words(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line per op and reason: who could not take part."""
    absent: dict[tuple[str, str], list[str]] = {}
    for r in records:
        if r["status"] == "skipped":
            names = absent.setdefault((r["op"], r["reason"]), [])
            names += [r["provider"]] if r["provider"] not in names else []
    return [f"skipped  {op}  {', '.join(who)}: {why}" for (op, why), who in absent.items()]


def show_times(records: Sequence[dict[str, Any]], args: Any, console: Console) -> None:
    timed = [r for r in records if r["mode"] in HEAD_MODES and r["rows"] == args.shape[0]]
    for op in dict.fromkeys(r["op"] for r in timed):
        keys = ["p50_ms", "p20_ms", "p80_ms", "time_of_eager"]
        heads = ["provider", "mode", "p50 ms", "p20", "p80", "x eager"]
        if op in GROUP:
            keys, heads = [*keys, "launches"], [*heads, "launches"]
        else:
            keys += ["tflops", "percent_of_mm", "peak_mib", "peak_of_eager", "transient_mib"]
            heads += ["TF/s(6)", "% of mm", "peak MiB", "x eager", "transient"]
        lines = [
            [
                *(r["provider"], r["mode"] + gate_words(r["gate"])),
                *(
                    number(r[key]) if r["status"] == "ok" else (r["status"] if i == 0 else "-")
                    for i, key in enumerate(keys)
                ),
                *([number(r["ratio"])] if args.compare else []),
            ]
            for r in timed
            if r["op"] == op
        ]
        title = f"{op}: N, D, V = {', '.join(map(str, args.shape))}, {args.dtype_name}"
        console.table((*heads, *(["x before"] if args.compare else [])), lines, title=title)


def compare(records: Sequence[dict[str, Any]], path: Path) -> str:
    """Writes p50 / (p50 of the earlier result) into `ratio`; says what it was compared with."""
    earlier = json.loads(path.read_text(encoding="utf-8"))
    key = ("op", "gate", "mode", "provider", "rows", "hidden", "vocabulary", "dtype")
    before = {tuple(r[k] for k in key): r["p50_ms"] for r in earlier["records"]}
    matched = 0
    for row in records:
        old = before.get(tuple(row[k] for k in key))
        if old and row["p50_ms"]:
            row["ratio"], matched = row["p50_ms"] / old, matched + 1
    place = earlier["environment"]
    return f"x before: {matched} rows of {path} ({place['device']}, commit {place['commit']})"


# --- the closing words --------------------------------------------------------------------------


def closing_words(
    records: Sequence[dict[str, Any]], providers: Sequence[Provider], rows: int
) -> list[str]:
    """Who is fastest, by how much and at which peak, for each op and gate at its N = `rows`.

    The fastest is compared with the best of the other side (ours, theirs) and with eager torch. A
    provider with one coefficient for all rows solves an easier problem, so it has its own sentence.
    Those whose numbers were wrong, or that failed, are named with the reason.
    """
    easier, own = ({p.name for p in providers if getattr(p, k)} for k in ("mean_only", "ours"))
    lines: list[str] = []
    for op, gate in dict.fromkeys((r["op"], r["gate"]) for r in records if r["p50_ms"]):
        table = [
            r
            for r in records
            if (r["op"], r["gate"], r["mode"]) == (op, gate, main_mode(op))
            and r["rows"] == rows
            and r["p50_ms"]
        ]
        table.sort(key=lambda r: r["p50_ms"])
        if table:
            lines.append(f"{op}{gate_words(gate)}, {main_mode(op)}, {size_words(table[0])}:")
            lines += [f"  {line}" for line in _ranking(table, easier, own)]
    for record in records:
        if record["status"] in ("refused", "failed", "OOM"):
            why = "wrong numbers, not timed: " if record["status"] == "refused" else ""
            where = f"{record['op']}{gate_words(record['gate'])}"
            lines.append(
                f"{record['status']}  {where}  {record['provider']}: {why}{record['reason']}"
            )
    return lines


def _ranking(table: Sequence[dict[str, Any]], easier: set[str], own: set[str]) -> Iterator[str]:
    """Sentences about one table, fastest first."""
    full = [r for r in table if r["provider"] not in easier]
    if full:
        first, *others = full
        yield f"{first['provider']} is fastest: {number(first['p50_ms'])} ms{_peak(first)}."
        side = first["provider"] in own
        best = next((r for r in others if (r["provider"] in own) != side), None)
        for other in others:
            if other is not best and other["provider"] != EAGER:
                continue
            close = other["p20_ms"] <= first["p80_ms"]
            note = ", within the spread of the samples" if close else ""
            ratio = f"{other['p50_ms'] / first['p50_ms']:.2f}"
            yield f"{other['provider']} takes {ratio} times as long{_peak(other)}{note}."
        smallest = min(
            (r for r in full if r["peak_mib"]), key=lambda r: r["peak_mib"], default=first
        )
        if smallest is not first:
            times = f"{smallest['p50_ms'] / first['p50_ms']:.2f} times its time"
            peak = f"{number(smallest['peak_mib'])} MiB"
            yield f"{smallest['provider']} has the smallest peak: {peak}, in {times}."
    for record in table:
        if record["provider"] in easier:
            time = f"{number(record['p50_ms'])} ms"
            if full:
                time = f"{record['p50_ms'] / full[0]['p50_ms']:.2f} times its time"
            yield f"{record['provider']}, with one coefficient for all rows: {time}{_peak(record)}."


def _peak(record: dict[str, Any]) -> str:
    return f", peak {number(record['peak_mib'])} MiB" if record["peak_mib"] else ""


# --- the picture --------------------------------------------------------------------------------

Value = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Panel:
    """What is drawn of a provider's record, and `floor`, a black line to hold the lines against,
    which any record of the same N gives."""

    what: str
    value: Value
    floor_words: str
    floor: Value
    style: str
    linear: bool = False


PANELS = (
    Panel(
        "time, ms",
        lambda r: r["p50_ms"],
        "floor: the GEMMs at torch.mm's rate",
        lambda r: r["percent_of_mm"] and r["p50_ms"] * r["percent_of_mm"] / 100,
        "--",
    ),
    Panel(
        "peak memory, MiB",
        lambda r: r["peak_mib"] or None,
        "floor: dX and dW",
        lambda r: gradients_mib(r) if r["mode"] == "full" else None,
        "-.",
    ),
    Panel(
        "useful rate, TF/s",
        lambda r: r["tflops"],
        "rate of torch.mm",
        lambda r: r["percent_of_mm"] and 100 * r["tflops"] / r["percent_of_mm"],
        ":",
        linear=True,
    ),
)


def gradients_mib(record: dict[str, Any]) -> float | None:
    """dX and dW in the dtype of the inputs; None of an op without a head."""
    if record["hidden"] is None:
        return None
    rows = record["rows"] * (2 if record["op"] == "two_stream" else 1)
    elements = (rows + record["vocabulary"]) * record["hidden"]
    return elements * BYTES[record["dtype"]] / 2**20


def pictured(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """title -> records of one row of panels: an op's main mode, of two_stream the swept gate."""
    timed = [r for r in records if r["p50_ms"] and r["mode"] == main_mode(r["op"])]
    rows: dict[str, list[dict[str, Any]]] = {}
    for op in dict.fromkeys(r["op"] for r in timed):
        mine = [r for r in timed if r["op"] == op]
        gates = [r["gate"] for r in mine]
        gate = 0.5 if 0.5 in gates else gates[0]
        rows[op + gate_words(gate)] = [r for r in mine if r["gate"] == gate]
    return rows


def plot(records: Sequence[dict[str, Any]], path: Path, *, device: str) -> None:
    figure_of(records, device).savefig(path, dpi=110)


def figure_of(records: Sequence[dict[str, Any]], device: str) -> Any:
    """A row of panels per op: time, peak memory and rate against N, the empty ones left out.

    A provider has one colour everywhere. Black lines are what to hold them against: the GEMMs
    alone, the gradients alone, the rate of torch.mm.
    """
    from matplotlib.figure import Figure

    rows = pictured(records)
    panels = [
        [panel for panel in PANELS if any(panel.value(r) is not None for r in mine)]
        for mine in rows.values()
    ]
    columns = max(map(len, panels))
    figure = Figure(figsize=(4.2 * columns + 2.2, 0.6 + 3.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (title, mine), chosen, line in zip(rows.items(), panels, grid, strict=True):
        for axes, panel in zip(line, chosen, strict=False):
            _draw(axes, mine, panel)
        for axes in line[len(chosen) :]:
            axes.remove()
        line[0].set_title(
            f"{title}, {mine[0]['mode']}, {_shape_words(mine)}", loc="left", fontsize=10
        )
    figure.suptitle(f"kernel_bench on {device}")
    handles = {handle.get_label(): handle for axes in figure.axes for handle in axes.get_lines()}
    figure.legend(handles=[*handles.values()], loc="outside right upper", fontsize=8)
    return figure


def _shape_words(records: Sequence[dict[str, Any]]) -> str:
    """D, V and dtype of one op; N is the axis."""
    first = records[0]
    sizes = [f"{name} = {first[key]}" for name, key in (("D", "hidden"), ("V", "vocabulary"))]
    return ", ".join([*(sizes if first["hidden"] is not None else []), first["dtype"]])


def _draw(axes: Any, records: Sequence[dict[str, Any]], panel: Panel) -> None:
    by_rows = sorted(records, key=lambda r: r["rows"])
    for name in dict.fromkeys(r["provider"] for r in records):
        points = [(r["rows"], panel.value(r)) for r in by_rows if r["provider"] == name]
        points = [(n, y) for n, y in points if y is not None]
        if points:
            colour = COLOURS.get(name, "dimgray")
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=4, label=name)
    floors = {r["rows"]: panel.floor(r) for r in by_rows if panel.floor(r)}
    if floors:
        line = {"color": "black", "ls": panel.style, "label": panel.floor_words}
        axes.plot([*floors], [*floors.values()], **line)
    axes.set(xlabel="N", ylabel=panel.what)
    axes.grid(alpha=0.3)
    _plain_ticks(axes, sorted({r["rows"] for r in records}), linear=panel.linear)


def _plain_ticks(axes: Any, rows: Sequence[int], *, linear: bool) -> None:
    """Numbers as people write them: the measured N, and 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [str(n) for n in rows])
    axes.xaxis.set_minor_locator(NullLocator())
    values = [y for line in axes.get_lines() for y in line.get_ydata()]
    # Within a factor of four a logarithmic axis has hardly a tick to show.
    if linear or max(values) < 4 * min(values):
        axes.set_ylim(0, 1.08 * max(values))
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))

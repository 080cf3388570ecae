"""Methods against each other: what each rate brought, and where each method ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vpgea_fast.report.figure import BLACK, BLUE, GREEN, ORANGE
from vpgea_fast.report.files import ReportError

# The rest of Okabe and Ito's palette, which stays apart for the colour-blind.
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", BLACK)


def plot_comparison(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    rows: Sequence[Mapping[str, Any]],
    *,
    halted: Mapping[str, Mapping[float, Sequence[float]]],
    mode: str,
    key: str,
    out_png: str | Path,
) -> Path:
    """Draw two panels. Left: `curves`, method -> rate -> a value per seed on the selection
    questions, as mean and range, the picked rate filled; those among them that were `halted` are
    crossed. Right: accuracy over tokens of `rows` on the test questions, with their intervals, and
    the base. Raises ReportError for an unwritable file."""
    from matplotlib.figure import Figure  # 0.5 s; and no pyplot, so no global state

    figure = Figure(figsize=(12, 4.6))
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    # eps3 is on its printed scale: its accuracy is in percent already.
    scale = 100 if key == "acc" else 1
    picked, crossed = {row["method"]: row["lr"] for row in rows}, 0
    for place, (method, by_rate) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        # A rate at which every seed diverged has no point.
        points = {rate: [scale * v for v in values] for rate, values in by_rate.items() if values}
        means = [fmean(values) for values in points.values()]
        left.plot(list(points), means, "o-", color=colour, markerfacecolor="white", label=method)
        for rate, values in points.items():
            # The whole range: of two or three seeds a standard deviation says little.
            left.plot([rate, rate], [min(values), max(values)], color=colour, alpha=0.4)
            if rate == picked.get(method):
                left.plot(rate, fmean(values), "o", color=colour)
        for rate, values in halted.get(method, {}).items():
            crossed += len(values)
            left.plot([rate] * len(values), [scale * v for v in values], "x", color=colour)
    # An empty line: one entry of the legend for the crosses of all methods.
    if crossed:
        left.plot([], [], "x", color=BLACK, label="a run that an alarm halted")
    # Neighbours of a grid differ by a factor.
    left.set_xscale("log")
    left.set_title("Selection questions: mean and range of the seeds", fontsize=11)
    left.set_xlabel("learning rate (filled: picked)")
    left.set_ylabel("accuracy, %" if key == "acc" else "eps3")
    for place, row in enumerate(rows):
        colour = COLOURS[place % len(COLOURS)]
        if row["after"]:
            _end(right, row, mode, colour)
        before = row["before"][mode]
        # Every method starts from the same model: one entry of the legend for all.
        label = "before training" if not place else None
        right.plot(before["tokens"], 100 * before["acc"], "x", color=BLACK, label=label)
    right.set_title("Test questions: mean and 95 % interval of the seeds", fontsize=11)
    right.set_xlabel(f"tokens, {mode}")
    right.set_ylabel("accuracy, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    try:
        figure.savefig(out_png, dpi=130)
    except OSError as error:
        raise ReportError(f"cannot write {out_png}: {error.strerror}; make it writable") from error
    return Path(out_png)


def _end(axes: Any, row: Mapping[str, Any], mode: str, colour: str) -> None:
    """Draw where a method ends."""
    after, bars = row["after"][mode], {}
    for key, scale in (("tokens", 1), ("acc", 100)):
        bounds = row["intervals"][key]
        mean = scale * after[key]
        # matplotlib takes distances below and above the point, and one seed has no interval.
        bars[key] = (
            None if bounds is None else [[mean - scale * bounds[0]], [scale * bounds[1] - mean]]
        )
    axes.errorbar(
        after["tokens"],
        100 * after["acc"],
        xerr=bars["tokens"],
        yerr=bars["acc"],
        fmt="o",
        color=colour,
        label=row["method"] + (f" ({row['halted_seeds']} halted)" if "halted_seeds" in row else ""),
    )

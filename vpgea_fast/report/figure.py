"""metrics.jsonl in bounded memory, and the picture of it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from vpgea_fast import book
from vpgea_fast.metrics import METRICS, Alarms, finite, missing_steps, read_steps
from vpgea_fast.report.files import (
    Record,
    ReportError,
    label_of,
    limits,
    read_evaluation,
    section_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS, ENDS = 2000, 5
"""The most points of a drawn line (even); how many steps a table's first and last are means of."""
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
        # Full: halve the number of points and double what one holds. Each value is added to a sum
        # at most once per doubling, so n values cost O(n).
        if len(self.bins) == POINTS:
            pairs = zip(self.bins[::2], self.bins[1::2], strict=True)
            self.bins = [[x + y for x, y in zip(a, b, strict=True)] for a, b in pairs]
            self.width *= 2
        self.bins.append([step, value, 1])

    def points(self, reach: int = 0) -> tuple[list[float], list[float]]:
        """(steps, values); with `reach` of each point and so many neighbours on both sides."""
        parts = [self.bins[max(0, i - reach) : i + reach + 1] for i in range(len(self.bins))]
        # Weighted by count: the last point may hold fewer values than its neighbours.
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
        return [short_number(value) for value in (*ends, self.lowest, self.highest)]


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
        replays = section_of(run_dir, "engine").get("name") == "replay"
        alarms, ends = Alarms(limits(run_dir), replays=replays), read_evaluation(run_dir)
        self.alarms: list[str] = []
        # In the order of the steps: a Line merges neighbours, and takes its points as they come.
        self._evaluated(ends.get("before", {}))
        for record in read_steps(run_dir):
            self.alarms += alarms.update(record)
            # The rule that ended the run, replayed from its log.
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
            # Text, null and infinities have no place on an axis.
            value = finite(raw)
            if value is None or key == "step":
                continue
            if key not in self.spans:
                self.spans[key] = Span()
            self.spans[key].add(value)
            if key in self.lines:
                self.lines[key].add(step, value)
        # Evaluations are of the weights before the step, and say of which.
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
    # Fixed: a layout engine draws all twice, half of the 0.4 s; fonts and labels are known here.
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.14, top=0.84, wspace=0.22)
    # A missing series leaves its panel in place and says so: figures of two runs line up.
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
    figure.suptitle(f"{label_of(run_dir)}: {log.last} steps", fontsize=13)
    try:
        figure.savefig(out_png, dpi=130)
    except OSError as error:
        raise ReportError(
            f"cannot write {out_png}: {error.strerror}; free disk space or make it writable"
        ) from error
    return out_png


def _draw(axes: Axes, line: Line, scale: float, label: str, colour: str) -> None:
    steps, values = line.points()
    if not steps:
        return
    values = [scale * value for value in values]
    # A twentieth of the run, half on each side.
    reach = len(values) // 40
    if not reach:
        axes.plot(steps, values, color=colour, marker="." if len(values) < 3 else "", label=label)
        return
    smooth = [scale * value for value in line.points(reach)[1]]
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color=colour, linewidth=2, label=label)


def _finish(axes: Axes, title: str, unit: str, *, last: int) -> None:
    axes.set_title(title, fontsize=11, y=1.0)  # a place that is not looked for
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    # A margin for the dots of the first and the last evaluation.
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.locator_params(axis="x", integer=True)
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
        return
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    # From zero, so that a fall by a tenth looks like one.
    axes.set_ylim(0, 103 if title == "Accuracy" else 1.03 * axes.get_ylim()[1])


def short_number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.4g}"

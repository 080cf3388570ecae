"""The run on a terminal, or in a plain log: a bar, a line per step, tables."""

from __future__ import annotations

import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console as Terminal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from vpgea_fast.config import printable
from vpgea_fast.metrics.log import finite

TIME = re.compile(r"time_\w+_s")

STEP_LINE = (
    ("acc", "acc_student", "{:.3f}"),
    ("eps3", "eps3_student", "{:.3g}"),
    ("prior", "len_prior", "{:.1f}"),
    ("post", "len_post", "{:.1f}"),
    ("gated", "len_gated_ratio", "{:.2f}x"),
    ("accept", "accept_rate", "{:.0%}"),
    ("gate", "gate_rate", "{:.0%}"),
    ("cut", "trunc_prior", "{:.0%}"),
    ("grad", "grad_norm", "{:.2g}"),
    ("tok/s", "tokens_per_s", "{:.0f}"),
)
"""(label, metric, format) of a step's line; a metric that the step lacks is left out."""


class Console:
    """The run on a terminal: a bar with the time left, a line per step, tables; else plain lines.

    `total` steps (0: no bar), of which `done` were made before this process. A plain log gets a
    line about samples after `quiet_s` seconds without one. `silent`: print nothing.
    """

    def __init__(
        self,
        total: int = 0,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        quiet_s: float = 20.0,
        silent: bool = False,
    ) -> None:
        self._terminal = Terminal(file=stream, highlight=False, quiet=silent)
        live = self._terminal.is_terminal
        if not live:
            self._terminal.width = 160  # rich takes a pipe for 80 columns and folds tables
        self._total, self._quiet_s = total, quiet_s
        self._step_seconds: deque[float] = deque(maxlen=20)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        left = TextColumn("{task.fields[left]}")
        # rich's own estimate follows the bar's updates, which come once per step: `left` is ours.
        self._bar = Progress(*columns, left, console=self._terminal, disable=not live)
        self._task = self._bar.add_task(
            "steps", total=total, completed=done, left="", visible=total > 0
        )
        self._bar.start()

    def message(self, text: str) -> None:
        # No markup: `[math]` in a question would vanish as a tag. soft_wrap: a line of a log stays
        # one.
        self._terminal.print(printable(text), markup=False, soft_wrap=True)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A line for the step that `metrics` tells of; the time left follows the last 20 steps."""
        done = metrics["step"]
        self._step_seconds.append(sum(metrics[key] for key in metrics if TIME.fullmatch(key)))
        left = statistics.fmean(self._step_seconds) * (self._total - done)
        self.message(step_line(metrics, self._total, left))
        self._bar.update(self._task, completed=done, left=f"{clock_time(left)} left")

    def samples(self, total: int, what: str = "samples") -> Callable[..., None]:
        """Progress of drawing `total` samples: call the result with the number newly finished, and
        with a line about all so far, if there is one.

        The time left is that of the samples so far, so it falls short while only short ones ended.
        """
        # A bar of its own below the steps', gone when all are finished.
        task = self._bar.add_task(what, total=total, left="")
        # monotonic: a clock that is set back must not silence the log.
        finished, spoke = 0, time.monotonic()
        began = spoke

        def advance(count: int, said: str = "") -> None:
            nonlocal finished, spoke
            if not count:  # the bar of the last one is gone
                return
            finished += count
            left = (time.monotonic() - began) / max(1, finished) * (total - finished)
            words = f"{clock_time(left)} left  {said}".rstrip()
            self._bar.update(task, completed=finished, left=words)
            if finished >= total:
                self._bar.remove_task(task)
            elif self._bar.disable and time.monotonic() - spoke > self._quiet_s:
                spoke = time.monotonic()
                self.message(f"{what} {finished}/{total}  left {clock_time(left)}  {said}".rstrip())

        return advance

    def watched(self, judge: Callable[..., list[bool]], what: str) -> Callable[..., list[bool]]:
        """`judge` of many items with a bar; its `on_progress` need not hear of all of them."""

        def run(items: Sequence[str]) -> list[bool]:
            advance, left = self.samples(len(items), what), len(items)

            def on_progress(count: int) -> None:
                nonlocal left
                left -= count
                advance(count)

            verdicts = judge(items, on_progress=on_progress)
            if left:  # what was known already, and what other processes judged
                advance(left)
            return verdicts

        return run

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index, header in enumerate(headers):
            table.add_column(header, justify="left" if index == 0 else "right")
        for row in rows:
            # Tables have markup on, so every cell is escaped.
            table.add_row(*(escape(printable(cell)) for cell in row))
        self._terminal.print(table)
        for note in notes:
            self.message(note)

    def close(self) -> None:
        if not self._bar.disable:  # a bar that never ran would print an empty line
            self._bar.stop()


def step_line(metrics: Mapping[str, Any], total: int, seconds_left: float) -> str:
    """One line for one step.

    >>> step_line({"step": 3, "acc_student": 0.8125, "len_prior": 51.26}, 60, 114.2)
    'step  3/60  acc 0.812  prior 51.3  left 1:54'
    """
    words = [f"step {metrics['step']:>{len(str(total))}}/{total}"]
    for label, key, form in STEP_LINE:
        value = finite(metrics.get(key))
        if value is not None:
            words.append(f"{label} {form.format(value)}")
    return "  ".join([*words, f"left {clock_time(seconds_left)}"])


def clock_time(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour.

    >>> clock_time(59.6), clock_time(3661)
    ('1:00', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

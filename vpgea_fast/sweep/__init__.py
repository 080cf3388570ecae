"""Methods against each other on any configuration: one budget, one grid of rates, several seeds.

    OUT/sweep.json      what all runs of the folder have in common; another order is refused
    OUT/records/        one JSON file per run that has ended: what a restart goes on from
    OUT/runs/, logs/    the run directories, without their checkpoints, and what the runs said
    OUT/results.json    rows and runs, in the form that metrics.compare reads; results.png

plan.py is what to run, inputs.py what it reads, runs.py the runs, server.py their processes,
table.py the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vpgea_fast.checkpoint import write_text
from vpgea_fast.config import Config, one_line
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.intake import open_text
from vpgea_fast.metrics import Console, environment
from vpgea_fast.metrics.console import clock_time
from vpgea_fast.report import plot_comparison
from vpgea_fast.stop import Stop
from vpgea_fast.sweep.inputs import Inputs, meaning
from vpgea_fast.sweep.plan import (
    METRICS,
    Cell,
    Method,
    Order,
    Questions,
    SweepError,
    cell,
    check,
    extended,
    identity,
    metric_of,
    parse_grids,
    parse_method,
    parse_rates,
    paths_a_step,
    questions,
    steps_of,
)
from vpgea_fast.sweep.runs import Pool, Record, claimed, cores
from vpgea_fast.sweep.server import Starter
from vpgea_fast.sweep.table import (
    Run,
    best_rate,
    by_rate,
    edge_lines,
    ending_lines,
    evaluate,
    is_result,
    layout,
    origin,
    origin_lines,
    score,
)
from vpgea_fast.values import dotted

__all__ = [
    "METRICS",
    "Method",
    "Order",
    "Sweep",
    "SweepError",
    "evaluate",
    "hold_sweep",
    "identity",
    "origin",
    "parse_grids",
    "parse_method",
    "parse_rates",
    "run_sweep",
]


class Sweep:
    """One order under way: its grids, and what is known of them."""

    def __init__(self, order: Order, console: Console) -> None:
        self.order, self.console = order, console
        # All is checked and resolved here, before a file is written or a run begins.
        self.base = check(order)
        self.metric = metric_of(order, self.base)
        self.inputs = Inputs()
        self.split: Questions = questions(order, self.base, self.inputs)
        self.grids = {m: sorted(order.grids.get(m.label, order.rates)) for m in order.methods}
        self.steps = {method: steps_of(order, method, self.base) for method in order.methods}
        self.resolved: dict[tuple[Method, float, int], Cell] = {}
        self.jobs = order.jobs or default_jobs(self.base)
        # A cell of each method: its model, tokenizer and prompts, before a folder is made.
        for each in {one.method: one for one in self.cells()}.values():
            open_text(each.cfg)
        self.durations: list[float] = []

    def cells(self) -> list[Cell]:
        """Resolve every run of the grids as they are."""
        return [
            self._cell(method, rate, seed)
            for seed in self.order.seeds
            for method, rates in self.grids.items()
            for rate in rates
        ]

    def _cell(self, method: Method, rate: float, seed: int) -> Cell:
        place = method, rate, seed
        # Every round asks for all of them, and each is a configuration to read and check.
        if place not in self.resolved:
            of = {"split": self.split, "steps": self.steps[method], "inputs": self.inputs}
            self.resolved[place] = cell(self.order, *place, **of)
        return self.resolved[place]

    def enter(self) -> None:
        """Make the folder this sweep's, or refuse it. Called with its lock held."""
        out, file = self.order.out, self.order.out / "sweep.json"
        # As the file gives it back: tuples come as lists, and keys as text.
        mine = json.loads(json.dumps(identity(self.order, self.base, self.split)))
        if file.is_file():
            hold_sweep(file, mine)
        # The hidden ones are the locks, which are held by now.
        elif any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise SweepError(f"{out} is not empty and no sweep; give another --out")
        for path, text in self.split.files.items():
            if path.is_file() and path.read_text(encoding="utf-8") != text:
                raise SweepError(
                    f"{path} has other questions than eval.data has now; bring them back, or give "
                    "another --out"
                )
        for folder in ("records", "runs", "configs", "logs", "questions"):
            (out / folder).mkdir(exist_ok=True)
        for path, text in self.split.files.items():
            write_text(path, text)
        # Last: from here on the folder is this sweep's.
        write_text(file, json.dumps(mine, indent=1) + "\n")

    def run(self, pool: Pool) -> list[Record]:
        """Run the grids, longer by a rate at a time until each method's best one is inside."""
        for round_ in range(self.order.extend + 1):
            cells = self.cells()
            self.left = sum(pool.known(each) is None for each in cells)
            self.done, self.total = len(cells) - self.left, len(cells)
            if self.left:
                self.console.message(f"{self.total} runs, {self.done} known, {self.jobs} at a time")
            runs = pool.run(cells)
            at_edge = [m.label for m in self.grids if self._edge(m, runs) is not None]
            # One rate has no factor to go on by.
            if round_ == self.order.extend or not at_edge or len(self.order.rates) == 1:
                return runs
            self.console.message(
                f"best at an edge of the grid: {', '.join(at_edge)}; every grid gets one rate more"
            )
            # All grow, so that none has been searched less than another.
            for method in self.grids:
                self._extend(method, runs)
        raise AssertionError("the last round returns")

    def tell(self, record: Record) -> None:
        """Say what a run has brought, and how long the rest takes."""
        seconds, value = record["wall_s"], score([record], self.metric)
        # A run that went on was timed in part: it tells nothing of the others.
        self.durations += [] if seconds is None else [seconds]
        self.done += 1
        words = [
            f"{self.done}/{self.total}",
            record["method"],
            f"lr {record['lr']:g}",
            f"seed {record['seed']}",
            f"{self.metric} {value:.4g} (selection)" if value > -math.inf else record["ended"],
        ]
        if record["ended"] == "halted":
            words.append(f"halted at step {record['steps']}")
        if seconds is not None:
            words.append(clock_time(seconds))
        if self.durations:
            rest = self.total - self.done
            # Runs go side by side, so time passes once for as many as there are jobs.
            waves = rest / min(self.jobs, max(1, rest))
            words.append(f"left {clock_time(waves * fmean(self.durations))}")
        self.console.message("  ".join(words))

    def _edge(self, method: Method, runs: Sequence[Record]) -> str | None:
        rates, best = self.grids[method], best_rate(runs, method.label, self.metric)
        return "below" if best == rates[0] else "above" if best == rates[-1] else None

    def _extend(self, method: Method, runs: Sequence[Record]) -> None:
        rates, best = self.grids[method], best_rate(runs, method.label, self.metric)
        # Of a method whose best is inside: where fewer rates lie beside it.
        at = rates.index(best)
        self.grids[method] = extended(rates, above=at >= len(rates) - 1 - at)


def run_sweep(order: Order, console: Console, command: str = "") -> Path:
    """Run what is missing of a sweep, write results.json and results.png and print the table;
    return the path of the former.

    Errors: SweepError or ConfigError before anything runs; SweepError for a run that fails.
    `distributed.Stopped` when SIGTERM or Ctrl-C asked to leave: the runs have saved.
    """
    sweep = Sweep(order, console)
    for line in budget_lines(order, sweep):
        console.message(line)
    with (
        claimed(order.out, console.message) as lock,
        Stop(World(pick_device("cpu")), tell=console.message) as stop,
        Starter(stop, lock) as starter,
    ):
        sweep.enter()
        pool = Pool(order.out, sweep.jobs, split=sweep.split, starter=starter, tell=sweep.tell)
        runs = sweep.run(pool)
        return _write(order, sweep, runs, console=console, command=command)


def budget_lines(order: Order, sweep: Sweep) -> list[str]:
    """Say what is equal between the methods, and what each draws."""
    what = {
        "paths": f"the paths of {order.config}",
        "steps": "its steps",
        f"tokens:{order.tokens}": f"{order.tokens} sampled tokens",
    }.get(str(order.budget), f"{order.budget} paths")
    lines = [f"budget of each run: {what} (--budget); rates picked by {sweep.metric}"]
    for each in {c.method: c for c in sweep.cells()}.values():
        steps, drawn = each.cfg.train.steps, paths_a_step(each.cfg)
        if not drawn:
            lines.append(f"{each.method}: {steps} steps, which draw no path")
        elif order.tokens is not None:
            lines.append(f"{each.method}: steps of {drawn} paths up to {order.tokens} tokens")
        else:
            lines.append(f"{each.method}: {steps} steps x {drawn} paths = {steps * drawn}")
    return lines


def default_jobs(cfg: Config) -> int:
    """As many runs as the cores carry; one on a GPU."""
    if pick_device(cfg.model.device).type != "cpu":
        return 1
    # 0 leaves the number of threads to torch, which takes every core.
    return max(1, cores() // cfg.run.threads) if cfg.run.threads else 1


def hold_sweep(file: Path, mine: Mapping[str, Any]) -> None:
    """Hold a folder's sweep.json to the `identity` of an order. SweepError where they differ."""
    now = dotted({**mine, "config": meaning(mine["config"])})
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        theirs = dotted(known | {"config": meaning(known["config"], str(file))})
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise SweepError(
            f"{file} is no record of a sweep ({one_line(error)}); give another --out"
        ) from error
    # Every run has a rate of the grid, whatever the configuration's own is.
    keys = [key for key in {**now, **theirs} if key != "config.optim.lr"]
    changed = [key for key in keys if now.get(key) != theirs.get(key)]
    if changed:
        key, value = changed[0], now.get(changed[0])
        raise SweepError(
            f"{file.parent} holds another sweep: {key} is now {value!r:.60}; bring it back, or "
            "give another --out"
        )


def _write(
    order: Order, sweep: Sweep, runs: Sequence[Record], *, console: Console, command: str
) -> Path:
    result = evaluate(runs, sweep.metric, order.short)
    notes = [
        f"mean over seeds on the questions {', '.join(sweep.split.test)}",
        f"behind each mean: {result['interval']}",
        f"each rate picked by {sweep.metric} on the questions {', '.join(sweep.split.select)}",
        f"budget: {order.budget}; drawn: tokens sampled in training, per run",
        *edge_lines(result),
        *ending_lines(result),
        *origin_lines(runs),
    ]
    result |= {
        "note": sweep.base.metrics.note,
        "budget": order.budget,
        "command": command,
        # Of the runs; the table itself may be written again by another commit.
        **origin(runs),
        "table_commit": environment()["commit"],
        "notes": notes,
        "runs": list(runs),
    }
    path = order.out / "results.json"
    # Before the picture: the numbers are there though it cannot be drawn.
    write_text(path, json.dumps(result, indent=1) + "\n")
    mode, _, key = sweep.metric.partition("_")
    # A halted run is a result and in the curves too; the second holds those to be crossed.
    curves, halted = (
        {m.label: _points(runs, m.label, sweep.metric, ends) for m in order.methods}
        for ends in (("done", "halted"), ("halted",))
    )
    how = {"halted": halted, "mode": mode, "key": key, "out_png": order.out / "results.png"}
    plot_comparison(curves, result["rows"], **how)
    headers, rows = layout(result)
    console.close()
    console.table(headers, rows, notes=notes)
    console.message(f"{path}, {order.out / 'results.png'}")
    return path


def _points(
    runs: Sequence[Run], method: str, metric: str, ends: Sequence[str]
) -> dict[float, list[float]]:
    """Rate -> the metric of each of its runs that ended in one of these ways."""
    return {
        rate: [
            # Run by run: of one run the mean over seeds is its own value.
            score([run], metric)
            for run in group
            if is_result(run) and run.get("ended", "done") in ends
        ]
        for rate, group in by_rate(runs, method).items()
    }

"""Records of runs -> the rate of each method, its numbers on other questions, and their spread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Run = Mapping[str, Any]
ACCURACY_LOSS = 0.01
"""What a short run may lose of the base's accuracy."""
KEYS = ("acc", "tokens", "eps3", "truncated", "n")
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""97.5 % quantiles of Student's t, of 1 to 10 degrees of freedom."""
Z_975 = 1.959964
INTERVAL = "95 % t interval of the mean over seeds (of one seed there is none)"
PICK_UNSPLIT = "the questions that are reported: the runs have no other"
HALTED = "an alarm ended them, as they no longer learnt: a result, counted as it ended"
MISMATCHED = (
    "train.mismatch_stop ended them, as the engine drew from another policy: no result, so their "
    "rate is not picked; mend it, remove their records and run the same command"
)


def t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 1e-4 (Abramowitz and Stegun 26.7.5).

    >>> round(t_975(2), 3), round(t_975(30), 3)
    (4.303, 2.042)
    """
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    # The series in 1 / n is poor for few degrees of freedom, which the table above holds.
    z, n = Z_975, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def interval(values: Sequence[float], most: float = math.inf) -> tuple[float, float] | None:
    """The 95 % t interval of a mean, cut to what can be, 0 to `most`; None of one value."""
    if len(values) < 2:
        return None
    # stdev divides by n - 1, the degrees of freedom of this t.
    half = t_975(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return max(0.0, fmean(values) - half), min(most, fmean(values) + half)


def part(run: Run, when: str, mode: str, half: str) -> dict[str, float]:
    """A run's means over its benchmarks of one half, `select` or `test`; over all where the run
    knows no halves."""
    benchmarks = run[when][mode]["benchmarks"]
    names = run.get(half) or list(benchmarks)
    return {key: fmean(benchmarks[name][key] for name in names) for key in KEYS}


def is_result(run: Run) -> bool:
    """Whether a run's numbers are its method's: not of one that diverged, nor of one whose engine
    was off. One that an alarm halted stays what it is, however bad."""
    return run["after"] is not None and run.get("ended") != "mismatched"


def score(runs: Sequence[Run], metric: str) -> float:
    """The mean over seeds of the metric that picks a rate; minus infinity where one of them is no
    result: the others alone would be a choice of seeds."""
    mode, _, key = metric.partition("_")
    if not all(map(is_result, runs)):
        return -math.inf
    return fmean(part(run, "after", mode, "select")[key] for run in runs)


def by_rate(runs: Sequence[Run], method: str) -> dict[float, list[Run]]:
    mine = [run for run in runs if run["method"] == method]
    return {rate: [r for r in mine if r["lr"] == rate] for rate in sorted({r["lr"] for r in mine})}


def best_rate(runs: Sequence[Run], method: str, metric: str) -> float:
    """The rate with the highest score; of equal ones the lowest."""
    groups = by_rate(runs, method)
    # The groups rise in rate, and max keeps the first of equals.
    return max(groups, key=lambda rate: score(groups[rate], metric))


def is_short(run: Run, tokens: float, mode: str = "sampled") -> bool:
    """Short answers at held accuracy: length alone also counts a run that unlearnt to answer."""
    if not is_result(run):
        return False
    before, after = (part(run, when, mode, "test") for when in ("before", "after"))
    # 1e-9: 0.9225 - 0.01 is not 0.9125 in binary
    return after["tokens"] <= tokens and after["acc"] >= before["acc"] - ACCURACY_LOSS - 1e-9


def evaluate(
    runs: Sequence[Run], metric: str = "sampled_eps3", short: float | None = None
) -> dict[str, Any]:
    """The rows of all methods, and on which questions their rates were picked.

    >>> evaluate([])["rows"]
    []
    """
    rows = [row(method, runs, metric, short) for method in dict.fromkeys(r["method"] for r in runs)]
    split = bool(runs) and all(run.get("select") for run in runs)
    facts: dict[str, Any] = {
        "rows": rows,
        "rate_picked_by": metric,
        "rate_picked_on": sorted({n for r in runs for n in r["select"]}) if split else PICK_UNSPLIT,
        "interval": INTERVAL,
    }
    if short is not None:
        facts["short"] = (
            f"{metric.partition('_')[0]}: tokens <= {short:g} and accuracy >= the base's - "
            f"{ACCURACY_LOSS}"
        )
    return facts


def row(method: str, runs: Sequence[Run], metric: str, short: float | None) -> dict[str, Any]:
    """A method at its best rate: means over seeds of the questions that are reported."""
    groups = by_rate(runs, method)
    best, rates, mode = best_rate(runs, method, metric), list(groups), metric.partition("_")[0]
    mine = [run for group in groups.values() for run in group]
    # A rate that is best without being a result: at all rates a run was none. Nothing to report.
    seeds = groups[best] if score(groups[best], metric) > -math.inf else []
    many = f"mean of {len(seeds)} seeds" if len(seeds) != 1 else "one seed"
    diverged = any(run["after"] is None for run in groups[best])
    found: dict[str, Any] = {
        "name": f"{method}, lr {best:g}, "
        + (many if seeds else "diverged" if diverged else "mismatched"),
        "method": method,
        "lr": best,
        "rates": rates,
        # At an end of its grid: a better rate may lie beyond.
        "edge": len(rates) > 1 and best in (rates[0], rates[-1]),
        "seeds": len(groups[best]),
        "runs": len(mine),
        "diverged_runs": sum(run["after"] is None for run in mine),
        # At the best rate alone: what the method costs, and not what the search did.
        "tokens_generated": fmean(run["tokens_generated"] for run in groups[best]),
    }
    # Each kind only where there is one, so that rows of older records stay what they were.
    for ended in ("halted", "mismatched"):
        if these := [run for run in mine if run.get("ended") == ended]:
            found[f"{ended}_runs"] = [[run["lr"], run["seed"], run["steps"]] for run in these]
    if count := sum(run.get("ended") == "halted" for run in seeds):
        found["halted_seeds"] = count
    # Not its time: rows made again after a kill are the same.
    if caught := [run["guard_caught"] for run in groups[best] if "guard_caught" in run]:
        found["guard_caught"] = fmean(caught)
    if short is not None:
        found["short_seeds"] = sum(is_short(run, short, mode) for run in groups[best])
        found["short_runs"] = sum(is_short(run, short, mode) for run in mine)
    if not seeds:
        return found | {"before": _mean(groups[best], "before"), "after": {}}
    ends = [part(run, "after", mode, "test") for run in seeds]
    eps3 = [end["eps3"] for end in ends]
    found["eps3_low"], found["eps3_high"] = min(eps3), max(eps3)
    found["intervals"] = {
        key: interval([end[key] for end in ends], most)
        for key, most in (("acc", 1.0), ("tokens", math.inf), ("eps3", math.inf))
    }
    return found | {when: _mean(seeds, when) for when in ("before", "after")}


def _mean(runs: Sequence[Run], when: str) -> dict[str, Any]:
    # All runs have the same modes: no method may set a key of eval.
    modes = [mode for mode in ("sampled", "greedy") if mode in runs[0][when]]
    parts = {mode: [part(run, when, mode, "test") for run in runs] for mode in modes}
    means = {mode: {key: fmean(p[key] for p in parts[mode]) for key in KEYS} for mode in modes}
    return {mode: {**mean, "eps3_mean": mean["eps3"]} for mode, mean in means.items()}


def layout(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of what `evaluate` returns, of the mode that picked the rates."""
    mode = result["rate_picked_by"].partition("_")[0]
    headers = ["method", "lr", "seeds", "accuracy %", "", "tokens", "", "eps3", "", "drawn"]
    # Behind each mean its interval, as the notes say.
    short = any("short_runs" in row for row in result["rows"])
    lines = []
    for found in result["rows"]:
        cells = [found["method"], f"{found['lr']:g}{' (edge)' * found['edge']}"]
        halted = found.get("halted_seeds")
        cells.append(f"{found['seeds']}{f' ({halted} halted)' if halted else ''}")
        for key, scale, digits in (("acc", 100, 1), ("tokens", 1, 1), ("eps3", 1, 0)):
            cells += _cells(found, mode, key, scale=scale, digits=digits)
        cells.append(f"{found['tokens_generated']:,.0f}")
        if short:
            cells.append(f"{found['short_runs']} of {found['runs']}")
        lines.append(cells)
    return [*headers, *["short runs"] * short], lines


def _cells(
    found: Mapping[str, Any], mode: str, key: str, *, scale: float, digits: int
) -> list[str]:
    before = f"{scale * found['before'][mode][key]:.{digits}f}"
    if not found["after"]:
        # The name ends in the reason: diverged, or mismatched.
        return [f"{before} -> {found['name'].rpartition(', ')[2]}", "-"]
    bounds = found["intervals"][key]
    shown = "-" if bounds is None else " to ".join(f"{scale * b:.{digits}f}" for b in bounds)
    return [f"{before} -> {scale * found['after'][mode][key]:.{digits}f}", shown]


def edge_lines(result: Mapping[str, Any]) -> list[str]:
    """A line for each method whose rate is not inside its grid."""
    return [
        f"{row['method']}: the best rate, {row['lr']:g}, is at an edge of "
        f"{', '.join(f'{rate:g}' for rate in row['rates'])}: another may be better"
        for row in result["rows"]
        if row["edge"]
    ] + [
        f"{row['method']}: one rate was tried, so none was picked"
        for row in result["rows"]
        if len(row["rates"]) == 1
    ]


def ending_lines(result: Mapping[str, Any]) -> list[str]:
    """A line for each method with runs that did not reach their end, and what they count as."""
    return [
        f"{row['method']}: {len(row[key])} of {row['runs']} runs {key.removesuffix('_runs')} "
        f"({', '.join(f'lr {lr:g} seed {seed} at step {step}' for lr, seed, step in row[key])}): "
        f"{meaning}"
        for row in result["rows"]
        for key, meaning in (("halted_runs", HALTED), ("mismatched_runs", MISMATCHED))
        if key in row
    ]


def origin(runs: Sequence[Run]) -> dict[str, Any]:
    """Which commit and versions made the runs, by their records; where they differ, all of them."""
    # Records of older versions do not tell.
    made = [run.get("made_by", {}) for run in runs]
    facts = {
        key: [*dict.fromkeys(of.get(key) for of in made)]
        for key in dict.fromkeys(key for of in made for key in of)
    }
    facts = {key: values[0] if len(values) == 1 else values for key, values in facts.items()}
    commits = facts.get("commit")
    joined = ", ".join(c or "unknown" for c in commits) if isinstance(commits, list) else commits
    return {"commit": joined, "environment": facts}


def origin_lines(runs: Sequence[Run]) -> list[str]:
    """A line for each fact in which the programs that made the runs differ."""
    facts = origin(runs)["environment"]
    lines = []
    for key in (key for key, value in facts.items() if isinstance(value, list)):
        counts = Counter(run.get("made_by", {}).get(key) for run in runs)
        each = (f"{count} of {value or 'unknown'}" for value, count in counts.items())
        lines.append(f"the runs are of several {key}s: {', '.join(each)}")
    silent = sum("inputs" not in run for run in runs)
    if silent:
        lines.append(f"{silent} of {len(runs)} records do not say what they read (older version)")
    return lines

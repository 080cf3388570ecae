"""The tables of the replication: numbers at paths that stay, and markdown of them alone.

main.WORLD.METHOD        acc, tokens, eps3 (means over seeds on the report questions), their t
                         intervals over seeds (`acc_seeds`, ...), the bootstrap interval over the
                         questions of one run, mean of the seeds' (`acc_questions`), ...
main.WORLD.base          the same of the base
search.STAGE.WORLD.METHOD   what was tried, with its score on the pick questions, and what won
ROWS.WORLD.ROW           ablations and rows of VR, as in main
pass_at_k, weights, claims
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import replication_store as store
from replication_plan import Plan, worlds_of

from vpgea_fast.sweep.table import INTERVAL, by_rate, row, score

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
Result = Mapping[str, Any]


def make(result: Result, plan: Plan) -> dict[str, Any]:
    """All tables of what is known."""
    found: dict[str, Any] = {"search": {}}
    for folder, stage, world, part in plan.folders():
        if folder not in result["folders"]:
            continue
        if part == "search":
            found["search"].setdefault(stage, {})[world] = searched(result, plan, folder, stage)
        else:
            found.setdefault(stage, {})[world] = reported(result, plan, folder)
    for stage, of in plan.stages.items():
        if stage in result and of["kind"] in ("pass_at_k", "weights"):
            found[stage] = {of["world"]: KNOWN[of["kind"]](result[stage], of)}
    found["rarity"] = rarity(result, plan, found)
    found["claims"] = [
        {"says": c["says"], "refuted": c["refuted"], "verdict": verdict(found, c["check"])}
        for c in plan.claims
    ]
    return found


def reported(result: Result, plan: Plan, folder: str) -> dict[str, Any]:
    runs, found = store.expand(result, folder), {}
    for method in plan.labels(folder):
        mine = [run for run in runs if run["method"] == method]
        if mine:
            found[method] = numbers(result, plan, folder, method, mine)
    (name,) = runs[0]["test"]
    found["base"] = {
        "greedy_" * (mode == "greedy") + key: runs[0]["before"][mode]["benchmarks"][name][key]
        for mode in ("sampled", "greedy")
        if mode in runs[0]["before"]
        for key in ("acc", "tokens", "eps3")
    }
    return found


def numbers(
    result: Result, plan: Plan, folder: str, method: str, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A method's numbers on the report questions: means over the seeds of one rate."""
    of = row(method, runs, plan.metric, plan.short(result["folders"][folder]["world"]))
    ended = [run for run in runs if run["after"]]
    found: dict[str, Any] = {"lr": of["lr"], "seeds": of["seeds"], "short_seeds": of["short_seeds"]}
    found |= {"diverged": of["diverged_runs"], "halted": len(of.get("halted_runs", []))}
    for key, value in of["after"].get("sampled", {}).items():
        if key in ("acc", "tokens", "eps3"):
            found[key] = value
    for key, bounds in (of.get("intervals") or {}).items():
        if bounds is not None:
            found[f"{key}_low"], found[f"{key}_high"] = bounds
    (name,) = runs[0]["test"]
    ends = [run["after"]["sampled"]["benchmarks"][name] for run in ended]
    if ends and all("acc_low" in end for end in ends):
        found["acc_questions"] = [fmean(end[k] for end in ends) for k in ("acc_low", "acc_high")]
    greedy = of["after"].get("greedy", {})
    found |= {f"greedy_{key}": greedy[key] for key in ("acc", "tokens") if key in greedy}
    found["drawn"] = of["tokens_generated"]
    found["steps"] = fmean(run["steps"] for run in runs)
    student, teacher = result["folders"][folder]["draws"][method]
    measured = result["worlds"][result["folders"][folder]["world"]]["measured"]
    found["paths"] = [found["steps"] * student, found["steps"] * teacher]
    found["concise_draws"] = [
        found["paths"][0] * measured["concise_student"],
        found["paths"][1] * measured["concise_teacher"],
    ]
    spent = [run.get("to_short") for run in runs]
    found["tokens_to_short"] = spent
    found["late"] = late = [run.get("late") for run in runs]
    found["prior_below"] = sum(bool(pair) and pair[0] < pair[1] for pair in late)
    found["exploratory"] = any(run["plan"] != result["plan"] for run in runs)
    return found


def searched(result: Result, plan: Plan, folder: str, stage: str) -> dict[str, Any]:
    """What was tried of each method of a world, and what won."""
    runs, found = store.expand(result, folder), {}
    for name in plan.stages[stage]["methods"]:
        default = [run for run in runs if run["method"] == name]
        if not default:
            continue
        rates = {f"{r:g}": score(group, plan.metric) for r, group in by_rate(runs, name).items()}
        rate, value = store.best(runs, name, plan.metric)
        knobs = {plan.label(name, 0): value}
        for index in (1, 2):
            own = [run for run in runs if run["method"] == plan.label(name, index)]
            if own:
                knobs[plan.label(name, index)] = score(own, plan.metric)
        index, _ = winner(result, plan, folder, name)
        found[name] = {
            "rates": {key: finite(value) for key, value in rates.items()},
            "lr": rate,
            "edge": len(rates) > 1 and f"{rate:g}" in (next(iter(rates)), [*rates][-1]),
            "knobs": {key: finite(value) for key, value in knobs.items()},
            "knob": plan.methods[name]["knob"][index],
            "runs": len(rates) + len(knobs) - 1,
        }
    return found


def finite(value: float) -> float | None:
    """None for the score of a rate at which a run was no result."""
    return None if value == float("-inf") else value


def winner(result: Result, plan: Plan, folder: str, name: str) -> tuple[int, float]:
    """(value of the knob, rate) with the best score; of equal ones the first."""
    runs = store.expand(result, folder)
    if not runs:  # one rate and setting, of which none was picked
        stage = next(stage for known, stage, _, _ in plan.folders() if known == folder)
        return 0, plan.grid(name, plan.stages[stage])[0]
    rate, _ = store.best(runs, name, plan.metric)
    scores = []
    for index in range(3):
        mine = [r for r in runs if r["method"] == plan.label(name, index) and r["lr"] == rate]
        scores.append(score(mine, plan.metric) if mine else float("-inf"))
    return max(range(3), key=scores.__getitem__), rate


def rarity(result: Result, plan: Plan, found: Mapping[str, Any]) -> dict[str, Any]:
    """Every world by how rare concise answers are, with the reported rows of its methods."""
    worlds: dict[str, Any] = {}
    for stage, of in plan.stages.items():
        if of["kind"] == "search":
            for world, methods in found.get(stage, {}).items():
                measured = result["worlds"][world]["measured"]
                mine = worlds.setdefault(world, {k: measured[f"concise_{k}"] for k in VIEWS})
                mine |= {name: own for name, own in methods.items() if name in CONTRAST}
    return dict(sorted(worlds.items(), key=lambda each: -each[1]["student"]))


VIEWS = ("student", "teacher")
CONTRAST = ("VPG-EA robust", "GRPO + eta")


def answered(known: Mapping[str, Any], _of: Mapping[str, Any]) -> dict[str, Any]:
    """pass@k as it was measured: method -> k -> [mean, standard error over questions]."""
    found: dict[str, Any] = {}
    for name, mine in known.items():
        found[name] = {k: value for k, (value, _) in mine["pass_at"].items()}
        found[name]["errors"] = {k: error for k, (_, error) in mine["pass_at"].items()}
    return found


def weighed(known: Mapping[str, Any], of: Mapping[str, Any]) -> dict[str, Any]:
    """Mean weight of a question in each bin of the base's accuracy, over that of all questions."""
    edges, found = of["bins"], {}
    for low, high in pairwise(edges):
        # The last bin holds its upper end.
        last = high == edges[-1]
        inside: dict[str, Any] = {}
        for name, mine in known.items():
            pairs = mine["questions"]
            own = [w for p, w in pairs if low <= p < high or (last and p == high)]
            mean = fmean(w for _, w in pairs) if pairs else 0.0
            inside["questions"] = len(own)
            inside[name] = fmean(own) / mean if own and mean else None
        found[f"{low:g} to {high:g}"] = inside
    if found:
        bins = [*found]
        found["hardest"], found["easiest"] = found[bins[0]], found[bins[-1]]
    return found


KNOWN = {"pass_at_k": answered, "weights": weighed}


def lookup(tree: Any, path: Any) -> float | None:
    """A number, or that at a path of the tables; None where there is none."""
    if not isinstance(path, str):
        return path
    for key in path.split("/"):
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def holds(found: Mapping[str, Any], check: Sequence[Any]) -> bool | None:
    """[left, operator, right, factor 1, offset 0]: left against factor * right + offset; None where
    one of both is not measured.

    >>> holds({"a": {"b": 2.0}}, ["a/b", "<=", 4, 0.5]), holds({}, ["a", ">", 1])
    (True, None)
    """
    left, sign, right, *more = check
    factor, offset = [*more, *(1.0, 0.0)[len(more) :]]
    a, b = lookup(found, left), lookup(found, right)
    return None if a is None or b is None else OPERATORS[sign](a, factor * b + offset + TIE[sign])


TIE = {">=": -1e-12, "<=": 1e-12, ">": 0.0, "<": 0.0}
"""0.95 of a number is no exact one."""


def shown(found: Mapping[str, Any], check: Sequence[Any]) -> str:
    left, sign, right, *more = check
    return (
        f"{left} {lookup(found, left)} {sign} {right} {lookup(found, right)} {more or ''}".strip()
    )


def verdict(found: Mapping[str, Any], checks: Sequence[Sequence[Any]]) -> str:
    held = [holds(found, check) for check in checks]
    return "refuted" if False in held else "not measured" if None in held else "holds"


def missing(
    plan: Plan, stage: str, of: Mapping[str, Any], result: Result, known: Mapping[str, float]
) -> tuple[int, float]:
    """(runs, seconds of one core) that a stage lacks, with every extension of its grids."""
    mean, runs = plan.seconds["run"], []
    count = len(plan.report_seeds)
    if of["kind"] == "search":
        tried = len(of.get("rates", [0] * 4)) + of.get("extend", plan.extend)
        tried += 2 * of.get("knobs", True)
        for world in worlds_of(of):
            here = len(store.expand(result, f"{stage}-{world}-report"))
            done = len(store.expand(result, f"{stage}-{world}-search"))
            left = 0 if here else max(0, tried * len(of["methods"]) - done)
            runs += [(name, left / len(of["methods"])) for name in of["methods"]]
            rest = max(0, count * len(of["methods"]) - here) / len(of["methods"])
            runs += [(name, rest) for name in of["methods"]]
    elif of["kind"] == "rows":
        here = len(store.expand(result, f"{stage}-{of['world']}"))
        runs = [(of["method"], max(0, len(of["rows"]) * count - here))]
    else:
        left = [name for name in of["methods"] if name not in result.get(stage, {})]
        extra = plan.seconds["pass_at_k"] * (len(left) + 1 if left else 0)
        if of["kind"] == "weights":
            return len(left), mean / 2 * len(left)
        return len(left), extra + sum(known.get(name, mean) for name in left)
    total = round(sum(many for _, many in runs))
    return total, sum(many * known.get(name, mean) for name, many in runs)


def markdown(result: Result, plan: Plan) -> str:
    """All tables, from the result's tables alone."""
    found, parts = result["tables"], [_planned(plan)]
    for stage, of in plan.stages.items():
        if of["kind"] in ("search", "rows"):
            parts += [_reported(stage, w, mine, plan) for w, mine in found.get(stage, {}).items()]
    for stage, worlds in found.get("search", {}).items():
        parts += [_searched(f"search of {stage}, {w}", mine) for w, mine in worlds.items()]
    parts += [_rarity(found["rarity"])] if found.get("rarity") else []
    for stage, of in plan.stages.items():
        if of["kind"] in SIDES:
            parts += [SIDES[of["kind"]](w, mine) for w, mine in found.get(stage, {}).items()]
    claims = [[c["says"], c["refuted"], c["verdict"]] for c in found.get("claims", [])]
    parts += [grid("claims", ["claim", "refuted", "verdict"], claims)] if claims else []
    return "\n\n".join(parts)


def _planned(plan: Plan) -> str:
    """What each method is given, beside what all have alike."""
    lines = []
    for name in dict.fromkeys(m for of in plan.stages.values() for m in of.get("methods", [])):
        of = plan.methods[name]
        keys = ", ".join(f"{key} {value}" for key, value in of["keys"].items())
        knobs = [", ".join(f"{k} {v}" for k, v in value.items()) for value in of["knob"]]
        rates = ", ".join(f"{rate:g}" for rate in of["rates"])
        lines.append([name, f"{of['objective']}: {keys}", rates, " / ".join(knobs)])
    note = (
        f"Alike: {plan.budget:,} sampled tokens a run, constant rate; search seed "
        f"{plan.search_seed}, report seeds {', '.join(map(str, plan.report_seeds))}; at most "
        f"{plan.extend} rates more for every grid; picked by {plan.metric} on "
        f"{plan.questions['pick']} questions, reported on {plan.questions['report']} others."
    )
    return grid("plan", ["method", "keys", "first grid", "knob"], lines) + f"\n\n{note}"


def grid(title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [headers, ["---"] * len(headers), *lines]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table)


def _reported(stage: str, world: str, mine: Mapping[str, Any], plan: Plan) -> str:
    headers = [
        "method",
        "lr",
        "accuracy %",
        "seeds",
        "questions",
        "tokens",
        "seeds",
        "eps3",
        "seeds",
    ]
    headers += ["greedy %", "short", "drawn", "concise draws, student + teacher"]
    base, lines = mine["base"], []
    greedy = f"{100 * base['greedy_acc']:.1f}" if "greedy_acc" in base else "-"
    cells = ["base", "-", f"{100 * base['acc']:.1f}", "-", "-", f"{base['tokens']:.1f}", "-"]
    lines.append([*cells, f"{base['eps3']:.0f}", "-", greedy, "-", "-", "-"])
    for name, of in mine.items():
        if name == "base":
            continue
        marks = "*" * of["exploratory"] + f" ({of['halted']} halted)" * bool(of["halted"])
        cells = [name + marks, f"{of['lr']:g}"]
        if "acc" not in of:
            lines.append([*cells, "diverged", *["-"] * 10])
            continue
        asked = of.get("acc_questions")
        cells += [f"{100 * of['acc']:.1f}", _range(of, "acc", 100, 1)]
        cells.append(f"{100 * asked[0]:.1f} to {100 * asked[1]:.1f}" if asked else "-")
        cells += [f"{of['tokens']:.1f}", _range(of, "tokens", 1, 1)]
        cells += [f"{of['eps3']:.0f}", _range(of, "eps3", 1, 0)]
        cells.append(f"{100 * of['greedy_acc']:.1f}" if "greedy_acc" in of else "-")
        student, teacher = of["concise_draws"]
        cells += [f"{of['short_seeds']} of {of['seeds']}", f"{of['drawn']:,.0f}"]
        lines.append([*cells, f"{student:.3g} + {teacher:.3g}"])
    notes = f"\n\nseeds: {INTERVAL}. questions: 95 % bootstrap of one run's, mean over seeds."
    notes += " *: exploratory, made after the plan had changed." * any(
        of.get("exploratory") for of in mine.values()
    )
    short = f"short: at most {plan.short(world):g} tokens at the base's accuracy less one point."
    return grid(f"{stage}, {world}", headers, lines) + f"{notes} {short}"


def _range(of: Mapping[str, Any], key: str, scale: float, digits: int) -> str:
    if f"{key}_low" not in of:
        return "-"
    return " to ".join(f"{scale * of[f'{key}_{end}']:.{digits}f}" for end in ("low", "high"))


def _searched(title: str, mine: Mapping[str, Any]) -> str:
    lines = []
    for name, of in mine.items():
        rates = ", ".join(f"{key}: {_score(value)}" for key, value in of["rates"].items())
        knobs = ", ".join(f"{key}: {_score(value)}" for key, value in of["knobs"].items())
        won = ", ".join(f"{key} {value}" for key, value in of["knob"].items())
        edge = " (edge)" * of["edge"]
        lines.append([name, rates, f"{of['lr']:g}{edge}", knobs, won, str(of["runs"])])
    headers = ["method", "rates: score", "best", "knob: score", "won", "runs"]
    return grid(title, headers, lines)


def _score(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.0f}"


def _rarity(worlds: Mapping[str, Any]) -> str:
    headers, lines = ["world", "P(concise), student", "teacher"], []
    for name in CONTRAST:
        headers += [f"{name}: eps3", "short", "k tokens to short, by seed"]
    for world, of in worlds.items():
        cells = [world, f"{of['student']:.2g}", f"{of['teacher']:.2g}"]
        for name in CONTRAST:
            if name not in of or "eps3" not in of[name]:
                cells += ["-"] * 3
                continue
            mine = of[name]
            spent = [f"{n / 1000:.0f}" if n else "never" for n in mine["tokens_to_short"]]
            cells += [f"{mine['eps3']:.0f}", f"{mine['short_seeds']} of {mine['seeds']}"]
            cells.append(", ".join(spent))
        lines.append(cells)
    return grid("by rarity", headers, lines)


def _answered(world: str, mine: Mapping[str, Any]) -> str:
    ks = [key for key in next(iter(mine.values())) if key != "errors"]
    lines = [
        [name, *(f"{100 * of[k]:.1f} ± {100 * of['errors'][k]:.1f}" for k in ks)]
        for name, of in mine.items()
    ]
    return grid(f"pass@k %, {world}", ["method", *(f"k = {k}" for k in ks)], lines)


def _weighed(world: str, mine: Mapping[str, Any]) -> str:
    bins = {key: of for key, of in mine.items() if key not in ("hardest", "easiest")}
    names = [key for key in next(iter(bins.values())) if key != "questions"]
    lines = [
        [key, str(of["questions"]), *("-" if of[n] is None else f"{of[n]:.2f}" for n in names)]
        for key, of in bins.items()
    ]
    title = f"weight of a question over the mean, by the base's accuracy on it, {world}"
    return grid(title, ["accuracy", "questions", *names], lines)


SIDES = {"pass_at_k": _answered, "weights": _weighed}

"""The tables of the replication: numbers at paths that stay, and what they say of its claims.

main.WORLD.METHOD        acc, tokens, eps3 (means over seeds on the report questions), their t
                         intervals over seeds (`acc_seeds`, ...), the bootstrap interval over the
                         questions of one run, mean of the seeds' (`acc_questions`), ...
main.WORLD.base          the same of the base
search.STAGE.WORLD.METHOD   what was tried, with its score on the pick questions, and what won
ROWS.WORLD.ROW           ablations and rows of VR, as in main
styles.WORLD.METHOD, SEED  how a reported winner thinks
spent.STAGE              its runs, and their hours of one core
pass_at_k, weights, claims
exploratory              whether the plan has changed since the first run
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import replication_store as store
from replication_plan import Plan

from vpgea_fast import config
from vpgea_fast.sweep.table import Run, by_rate, is_result, part, row, score

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
FORGOT = 0.5
"""A run has forgotten how to answer below this share of the base's accuracy."""
Result = Mapping[str, Any]


def make(result: Result, plan: Plan) -> dict[str, Any]:
    """All tables of what is known."""
    found: dict[str, Any] = {"search": {}}
    for folder, stage, world, kind in plan.folders():
        if folder not in result["folders"]:
            continue
        if kind == "search":
            found["search"].setdefault(stage, {})[world] = searched(result, plan, folder, stage)
        else:
            found.setdefault(stage, {})[world] = reported(result, plan, folder)
    for stage, of in plan.stages.items():
        if result.get(stage) and of["kind"] in KNOWN:
            known = KNOWN[of["kind"]](result[stage], of)
            known["exploratory"] = exploratory(result, result[stage].values())
            found[stage] = {of["world"]: known}
    found["spent"] = spent(result, plan)
    found["styles"] = {world: thought(mine) for world, mine in result.get("styles", {}).items()}
    found["rarity"] = rarity(result, plan, found)
    found["exploratory"] = plan.digest != result["plan"]
    found["claims"] = [
        {"says": c["says"], "refuted": c["refuted"], "verdict": verdict(found, c["check"])}
        for c in plan.claims
    ]
    return found


def exploratory(result: Result, made: Iterable[Mapping[str, Any]]) -> bool:
    """Whether anything was made after the plan had changed; a probe without a digest is of the
    first plan."""
    return any(each.get("plan", result["plan"]) != result["plan"] for each in made)


def chosen(result: Result, plan: Plan, folder: str) -> dict[str, tuple[dict[str, Any], float]]:
    """(keys, rate) of each label that a folder reports, where its search has a winner."""
    stage = next(stage for name, stage, _, _ in plan.folders() if name == folder)
    rows, found = plan.stages[stage].get("rows", {}), {}
    for label in plan.labels(folder):
        search, name = plan.source(folder, label)
        if (won := winner(result, plan, search, name)) is not None:
            index, rate = won
            found[label] = plan.variant(name, index) | rows.get(label, {}), rate
    return found


def winners(result: Result, plan: Plan, folder: str) -> dict[str, list[Run]]:
    """Runs of each label that a folder reports: of the report seeds, with the rate and the words of
    the winner alone. There may be others, where the search went on after them."""
    runs, found = store.expand(result, folder), {}
    for label, (keys, rate) in chosen(result, plan, folder).items():
        mine = [r for r in runs if (r["method"], r["lr"]) == (label, rate)]
        mine = [r for r in mine if r["seed"] in plan.report_seeds and store.is_of(r, {label: keys})]
        found |= {label: mine} if mine else {}
    return found


def reported(result: Result, plan: Plan, folder: str) -> dict[str, Any]:
    runs, found = store.expand(result, folder), {}
    for method, mine in winners(result, plan, folder).items():
        found[method] = numbers(result, plan, folder, method, mine)
    (name,) = runs[0]["test"]
    found["base"] = {
        "greedy_" * (mode == "greedy") + key: runs[0]["before"][mode]["benchmarks"][name][key]
        for mode in ("sampled", "greedy")
        if mode in runs[0]["before"]
        for key in ("acc", "tokens", "eps3")
    }
    base = runs[0]["before"]["sampled"]["benchmarks"][name]
    if "acc_low" in base:
        found["base"]["acc_questions"] = [base["acc_low"], base["acc_high"]]
    return found


def numbers(
    result: Result, plan: Plan, folder: str, method: str, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A method's numbers on the report questions: means over the seeds of one rate."""
    of = row(method, runs, plan.metric, plan.short(result["folders"][folder]["world"]))
    ended = [run for run in runs if run["after"]]
    found: dict[str, Any] = {"lr": of["lr"], "seeds": of["seeds"], "short_seeds": of["short_seeds"]}
    found |= {"diverged": of["diverged_runs"], "halted": len(of.get("halted_runs", []))}
    results = [run for run in runs if is_result(run)]
    found["complete"] = {run["seed"] for run in results} == {*plan.report_seeds}
    found["forgot"] = sum(map(has_forgotten, results))
    search, searched_as = plan.source(folder, method)
    found["edge"] = at_edge(store.expand(result, search), searched_as, of["lr"])
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
    views = ("student", "student" if one_prompt(plan, runs[0]["words"]) else "teacher")
    concise = [measured[f"concise_{view}"] for view in views]
    found["concise_draws"] = [n * p for n, p in zip(found["paths"], concise, strict=True)]
    spent = [run.get("to_short") for run in runs]
    found["tokens_to_short"] = spent
    found["late"] = late = [run.get("late") for run in runs]
    found["prior_below"] = sum(bool(pair) and pair[0] < pair[1] for pair in late)
    found["late_difference"] = [pair and round(pair[0] - pair[1], 3) for pair in late]
    found["exploratory"] = exploratory(result, runs)
    return found


def one_prompt(plan: Plan, words: Sequence[str]) -> bool:
    """Whether the teacher of a run sees what its student sees."""
    # A configuration takes milliseconds to read, and few runs have a prompt of their own.
    if not any(word.startswith("--prompt.") for word in words):
        return False
    prompt = config.load(config.find(plan.config), list(words)).prompt
    return prompt.teacher == prompt.student


def has_forgotten(run: Run) -> bool:
    before, after = (part(run, when, "sampled", "test")["acc"] for when in ("before", "after"))
    return after < FORGOT * before


def at_edge(runs: Sequence[Run], method: str, rate: float) -> bool:
    """Whether a rate is the first or the last of several that were tried."""
    rates = [*by_rate(runs, method)]
    return len(rates) > 1 and rate in (rates[0], rates[-1])


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
        index, _ = winner(result, plan, folder, name) or (0, rate)
        tried = [run for run in runs if run["method"] in knobs]
        found[name] = {
            "rates": {key: finite(value) for key, value in rates.items()},
            "lr": rate,
            "edge": at_edge(runs, name, rate),
            "knobs": {key: finite(value) for key, value in knobs.items()},
            "knob": plan.methods[name]["knob"][index],
            "runs": len(rates) + len(knobs) - 1,
            "exploratory": exploratory(result, tried),
        }
    return found


def finite(value: float) -> float | None:
    """None for the score of a rate at which a run was no result."""
    return None if value == float("-inf") else value


def winner(result: Result, plan: Plan, folder: str, name: str) -> tuple[int, float] | None:
    """(value of the knob, rate) with the best score, of equal ones the first; None where nothing
    was searched."""
    stage = next(stage for known, stage, _, _ in plan.folders() if known == folder)
    # Of one rate none is picked.
    if len(grid := plan.grid(name, plan.stages[stage])) == 1:
        return 0, grid[0]
    runs = store.expand(result, folder)
    if not any(run["method"] == name for run in runs):
        return None
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


def spent(result: Result, plan: Plan) -> dict[str, Any]:
    """Runs of each stage, and their hours of one core."""
    found: dict[str, Any] = {}
    for folder, stage, *_ in plan.folders():
        runs = result["folders"].get(folder, {}).get("runs", [])
        mine = found.setdefault(stage, {"runs": 0, "core_hours": 0.0})
        mine["runs"] += len(runs)
        mine["core_hours"] += sum(run.get("wall_s") or 0.0 for run in runs) / 3600
    return found


def thought(known: Mapping[str, Any]) -> dict[str, Any]:
    """Method, seed -> style -> [share of the answers, share of those that are right]."""
    return {
        f"{name}, {seed}": of["styles"] for name, mine in known.items() for seed, of in mine.items()
    }


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
    one of both is not measured, or is of a row that lacks a seed.

    >>> holds({"a": {"b": 2.0}}, ["a/b", "<=", 4, 0.5]), holds({}, ["a", ">", 1])
    (True, None)
    """
    left, sign, right, *more = check
    factor, offset = [*more, *(1.0, 0.0)[len(more) :]]
    a, b = lookup(found, left), lookup(found, right)
    whole = all(row_of(found, side).get("complete", True) for side in (left, right))
    if a is None or b is None or not whole:
        return None
    return OPERATORS[sign](a, factor * b + offset + TIE[sign])


TIE = {">=": -1e-12, "<=": 1e-12, ">": 0.0, "<": 0.0}
"""0.95 of a number is no exact one."""


def shown(found: Mapping[str, Any], check: Sequence[Any]) -> str:
    left, sign, right, *more = check
    return (
        f"{left} {lookup(found, left)} {sign} {right} {lookup(found, right)} {more or ''}".strip()
    )


def row_of(found: Mapping[str, Any], path: Any) -> Mapping[str, Any]:
    """The reported row that a number is of; none for the base's, or for one that is no path."""
    stage, *rest = str(path).split("/")[:3]
    # A probe asks a winner of the main table.
    rows = (lookup(found, "/".join([at, *rest])) for at in (stage, "main"))
    return next((row for row in rows if isinstance(row, Mapping) and "seeds" in row), {})


def verdict(found: Mapping[str, Any], checks: Sequence[Sequence[Any]]) -> str:
    """What the checks say together, and what is to be known of the rows that they compare."""
    held = [holds(found, check) for check in checks]
    said = "not measured" if None in held else "refuted" if False in held else "holds"
    sides = [side for check in checks for side in (check[0], check[2])]
    return "; ".join([said, *dict.fromkeys(mark for side in sides for mark in marks(found, side))])


def marks(found: Mapping[str, Any], path: Any) -> list[str]:
    """What a verdict says of a row beside its numbers."""
    if not (row := row_of(found, path)):
        return []
    _, world, label, *_ = path.split("/")
    said = ["at an edge of its grid"] * row["edge"]
    said += ["without a result of every seed"] * (not row["complete"])
    for key in ("diverged", "halted", "forgot"):
        said += [f"{key} with {row[key]} of {row['seeds']} seeds"] * bool(row[key])
    return [f"{label} in {world} {each}" for each in said]


def missing(plan: Plan, stage: str, of: Mapping[str, Any], result: Result) -> int:
    """Count the runs that a stage lacks, with every extension of its grids, or models to ask."""
    if of["kind"] in KNOWN:
        return sum(name not in result.get(stage, {}) for name in of["methods"])
    total = 0
    for folder, _, world, kind in (each for each in plan.folders() if each[1] == stage):
        if kind != "search":
            done = sum(map(len, winners(result, plan, folder).values()))
            total += len(plan.report_seeds) * len(plan.labels(folder)) - done
        # What is reported has been searched.
        elif f"{stage}-{world}-report" not in result["folders"]:
            rates = len(of.get("rates", [0] * 4)) + of.get("extend", plan.extend)
            each = rates + 2 * of.get("knobs", True)
            total += max(0, each * len(of["methods"]) - len(store.expand(result, folder)))
    return total

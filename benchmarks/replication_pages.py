"""The tables of the replication as markdown, of their numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from replication_plan import Plan, method_words
from replication_tables import CONTRAST, FORGOT, Result, one_prompt

from vpgea_fast.sweep.table import INTERVAL

CHANGED = "Exploratory: the plan has changed since the first run."
LATER = "exploratory, made after the plan had changed."
HALF = f"forgot: below {100 * FORGOT:g} % of the base's accuracy."
WEIGHTS = (
    "Before that division VR's weight is 1 by construction where any path is right, and else 0."
)


def markdown(result: Result, plan: Plan) -> str:
    """All tables, from the result's tables alone."""
    found = result["tables"]
    parts = [_planned(plan), _spent(found["spent"])]
    parts += [_summary(found["main"])] if found.get("main") else []
    for stage, of in plan.stages.items():
        if of["kind"] in ("search", "rows"):
            parts += [_reported(stage, w, mine, plan) for w, mine in found.get(stage, {}).items()]
    for stage, worlds in found.get("search", {}).items():
        parts += [_searched(f"search of {stage}, {w}", mine) for w, mine in worlds.items()]
    parts += [_rarity(found["rarity"])] if found.get("rarity") else []
    for stage, of in plan.stages.items():
        if of["kind"] in SIDES:
            parts += [SIDES[of["kind"]](w, mine) for w, mine in found.get(stage, {}).items()]
    parts += [_thought(world, mine) for world, mine in found.get("styles", {}).items()]
    claims = [[c["says"], c["refuted"], c["verdict"]] for c in found.get("claims", [])]
    if claims:
        note = f"{CHANGED}\n\n" * found["exploratory"]
        parts.append(grid("claims", ["claim", "refuted", "verdict"], claims, note=note))
        parts.append(HALF)
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


def _spent(stages: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        [stage, f"{of['runs']:.0f}", f"{of['core_hours']:.2f}"] for stage, of in stages.items()
    ]
    return grid("spent", ["stage", "runs", "hours of one core"], lines)


def _summary(worlds: Mapping[str, Mapping[str, Any]]) -> str:
    """The main table in one: accuracy and tokens of every method in every world."""
    names = dict.fromkeys(name for mine in worlds.values() for name in mine)
    lines = [
        [name, *(_cell(mine.get(name)) for mine in worlds.values())]
        for name in sorted(names, key=lambda name: name != "base")
    ]
    return grid("summary", ["sampled accuracy, tokens, short runs", *worlds], lines)


def _cell(of: Mapping[str, Any] | None) -> str:
    if of is None or "acc" not in of:
        return "-"
    short = f", {of['short_seeds']} of {of['seeds']}" if "seeds" in of else ""
    return f"{100 * of['acc']:.1f} %, {of['tokens']:.1f}{short}{_after(_ends(of))}"


def _ends(of: Mapping[str, Any]) -> list[str]:
    """How seeds of a row ended that its means hold, or lack; none of the base."""
    return [f"{of[key]} {key}" for key in ("diverged", "halted", "forgot") if of.get(key)]


def _after(told: Sequence[str]) -> str:
    return f" ({', '.join(told)})" * bool(told)


def grid(
    title: str, headers: Sequence[str], lines: Sequence[Sequence[str]], *, note: str = ""
) -> str:
    table = [headers, ["---"] * len(headers), *lines]
    return f"### {title}\n\n{note}" + "\n".join(f"| {' | '.join(line)} |" for line in table)


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
    headers += ["late, student - teacher"]
    base, lines, alike = mine["base"], [], _one_prompt(stage, plan)
    greedy = f"{100 * base['greedy_acc']:.1f}" if "greedy_acc" in base else "-"
    cells = ["base", "-", f"{100 * base['acc']:.1f}", "-", _questions(base)]
    cells += [f"{base['tokens']:.1f}", "-"]
    lines.append([*cells, f"{base['eps3']:.0f}", "-", greedy, "-", "-", "-", "-"])
    for name, of in mine.items():
        if name == "base":
            continue
        told, seeds, expected = _ends(of), of["seeds"], len(plan.report_seeds)
        told += [f"{seeds} of {expected} seeds"] * (seeds != expected) + ["edge"] * of["edge"]
        cells = [name + "*" * of["exploratory"] + _after(told), f"{of['lr']:g}"]
        if "acc" not in of:
            lines.append([*cells, "diverged", *["-"] * 11])
            continue
        cells += [f"{100 * of['acc']:.1f}", _range(of, "acc", 100, 1), _questions(of)]
        cells += [f"{of['tokens']:.1f}", _range(of, "tokens", 1, 1)]
        cells += [f"{of['eps3']:.0f}", _range(of, "eps3", 1, 0)]
        cells.append(f"{100 * of['greedy_acc']:.1f}" if "greedy_acc" in of else "-")
        student, teacher = of["concise_draws"]
        cells += [f"{of['short_seeds']} of {of['seeds']}", f"{of['drawn']:,.0f}"]
        # Without a path of the teacher, or with one prompt, there is one view.
        late = "-" if name in alike or not of["paths"][1] else _late(of)
        lines.append([*cells, f"{student:.3g} + {teacher:.3g}", late])
    notes = f"\n\nseeds: {INTERVAL}. questions: 95 % bootstrap of one run's, mean over seeds."
    notes += " late: seeds whose student thinks less than its teacher over the last quarter of the "
    notes += f"steps, and the mean difference of each seed, tokens. {HALF} edge: the rate is at an "
    notes += "end of its grid."
    notes += f" *: {LATER}" * any(of.get("exploratory") for of in mine.values())
    short = f"short: at most {plan.short(world):g} tokens at the base's accuracy less one point."
    return grid(f"{stage}, {world}", headers, lines) + f"{notes} {short}"


def _questions(of: Mapping[str, Any]) -> str:
    """The interval over questions, in %."""
    asked = of.get("acc_questions")
    return f"{100 * asked[0]:.1f} to {100 * asked[1]:.1f}" if asked else "-"


def _one_prompt(stage: str, plan: Plan) -> set[str]:
    """Rows of a stage whose teacher sees what the student sees."""
    rows = plan.stages[stage].get("rows", {})
    base = plan.variant(plan.stages[stage]["method"], 0) if rows else {}
    return {row for row, keys in rows.items() if one_prompt(plan, method_words(row, base | keys))}


def _late(of: Mapping[str, Any]) -> str:
    """How many seeds, and by how much: a difference of noise alone is a coin flip."""
    known = [f"{each:+.2f}" for each in of["late_difference"] if each is not None]
    return f"{of['prior_below']} of {of['seeds']} ({', '.join(known)})" if known else "-"


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
        cells = [name + "*" * of["exploratory"], rates, f"{of['lr']:g}{edge}", knobs, won]
        lines.append([*cells, str(of["runs"])])
    headers = ["method", "rates: score", "best", "knob: score", "won", "runs"]
    after = f"\n\n*: {LATER}" * any(of["exploratory"] for of in mine.values())
    return grid(title, headers, lines) + after


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
            cells.append(f"{mine['eps3']:.0f}{_after(_ends(mine))}")
            cells += [f"{mine['short_seeds']} of {mine['seeds']}", ", ".join(spent)]
        lines.append(cells)
    return grid("by rarity", headers, lines)


def _answered(world: str, mine: Mapping[str, Any]) -> str:
    models = {name: of for name, of in mine.items() if name != "exploratory"}
    ks = [key for key in next(iter(models.values())) if key != "errors"]
    lines = [
        [name, *(f"{100 * of[k]:.1f} ± {100 * of['errors'][k]:.1f}" for k in ks)]
        for name, of in models.items()
    ]
    table = grid(f"pass@k %, {world}", ["method", *(f"k = {k}" for k in ks)], lines)
    return table + f"\n\n{LATER.capitalize()}" * mine["exploratory"]


def _weighed(world: str, mine: Mapping[str, Any]) -> str:
    bins = {key: of for key, of in mine.items() if " to " in key}
    names = [key for key in next(iter(bins.values())) if key != "questions"]
    lines = [
        [key, str(of["questions"]), *("-" if of[n] is None else f"{of[n]:.2f}" for n in names)]
        for key, of in bins.items()
    ]
    title = f"weight of a question over the mean, by the base's accuracy on it, {world}"
    table = grid(title, ["accuracy", "questions", *names], lines)
    return table + f"\n\n{WEIGHTS}" + f"\n\n{LATER.capitalize()}" * mine["exploratory"]


def _thought(world: str, mine: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    names = sorted({style for of in mine.values() for style in of})
    lines = [
        [run, *(f"{100 * of[n][0]:.1f} ({100 * of[n][1]:.0f})" if n in of else "-" for n in names)]
        for run, of in mine.items()
    ]
    table = grid(f"styles of thoughts, {world}", ["winner, seed", *names], lines)
    return f"{table}\n\nPer cent of the answers, and of those the right ones. Asked afterwards."


SIDES = {"pass_at_k": _answered, "weights": _weighed}

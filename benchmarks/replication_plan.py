"""The plan of the replication: read, checked for fairness, and as words of `vpgea sweep`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from vpgea_fast import config
from vpgea_fast.sweep import Order, identity, parse_method
from vpgea_fast.sweep.plan import Questions

PLAN = Path(__file__).with_suffix("").with_name("replication.yaml")
Keys = Mapping[str, Any]
BESIDE = ("seconds", "after")
KINDS = ("search", "rows", "pass_at_k", "weights")


class PlanError(ValueError):
    """A plan, or a result, that cannot be used; the message has cause and remedy."""


class StageError(Exception):
    """A stage that cannot be done in a world; the others can."""


@dataclass(frozen=True)
class Plan:
    """replication.yaml: a field for each of its keys, and of the quick one its bars."""

    config: str
    budget: int
    metric: str
    search_seed: int
    report_seeds: list[int]
    extend: int
    questions: dict[str, int]
    seconds: dict[str, float]
    words: dict[str, Any]
    worlds: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    stages: dict[str, dict[str, Any]]
    claims: list[dict[str, Any]]
    bars: list[list[Any]]
    after: list[dict[str, Any]] = field(default_factory=list)
    """What was asked when results were known. It makes no run and judges none."""

    @property
    def digest(self) -> str:
        """Of all that makes a run or judges it; what the forecast assumes is no part."""
        parts = {key: value for key, value in vars(self).items() if key not in BESIDE}
        text = json.dumps(parts, sort_keys=True)
        return hashlib.blake2b(text.encode()).hexdigest()[:12]

    def short(self, world: str) -> float:
        return self.worlds[world]["short"]

    def grid(self, name: str, stage: Keys) -> list[float]:
        return stage.get("rates") or self.methods[name]["rates"]

    def variant(self, name: str, index: int) -> dict[str, Any]:
        """Objective and keys of a method, at one value of its knob."""
        method = self.methods[name]
        return {"objective": method["objective"], **method["keys"], **method["knob"][index]}

    def label(self, name: str, index: int) -> str:
        """Name a method at one value of its knob; the first has the method's own name."""
        knob = self.methods[name]["knob"][index]
        inner = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in knob.items())
        return f"{name} ({inner})" if index else name

    def used_worlds(self) -> list[str]:
        named = [w for of in self.stages.values() for w in worlds_of(of)]
        return list(dict.fromkeys(named))

    @property
    def quick(self) -> bool:
        """Whether this is the little plan."""
        return bool(self.bars)

    def folders(self) -> Iterator[tuple[str, str, str, str]]:
        """(folder, stage, world, part) of every sweep: part is search, report or rows."""
        for stage, of in self.stages.items():
            for world in worlds_of(of):
                if of["kind"] == "search":
                    yield f"{stage}-{world}-search", stage, world, "search"
                    yield f"{stage}-{world}-report", stage, world, "report"
                elif of["kind"] == "rows":
                    yield f"{stage}-{world}", stage, world, "rows"

    def labels(self, folder: str) -> list[str]:
        """The methods or rows that a folder reports, in the plan's order."""
        stage = next(stage for name, stage, _, _ in self.folders() if name == folder)
        of = self.stages[stage]
        return list(of["rows"]) if of["kind"] == "rows" else of["methods"]

    def source(self, folder: str, label: str) -> tuple[str, str]:
        """(folder, method) of the search whose winner a label of a folder is."""
        stage, world = next((s, w) for name, s, w, _ in self.folders() if name == folder)
        of = self.stages[stage]
        searched = ("main", of["method"]) if of["kind"] == "rows" else (stage, label)
        return f"{searched[0]}-{world}-search", searched[1]

    def words_of(self, world: str, place: Path, shown: str, *, greedy: bool) -> list[str]:
        """Options that all runs of a sweep have."""
        keys = self.words | {
            "model.path": place / "base",
            "data.train": place / "train.jsonl",
            "eval.data": place / f"{shown}.jsonl",
            "eval.greedy": greedy,
        }
        own = self.worlds[world].get("words", {})
        return [f"--{key}={text_of(value)}" for key, value in (keys | own).items()]

    def asked(self, world: str, place: Path, *, report: bool) -> tuple[str, list[str]]:
        """(file of --select, options of all runs) of a sweep that searches, or reports."""
        pick, shown = ("few", "report") if report else ("pick", "few_report")
        return str(place / f"{pick}.jsonl"), self.words_of(world, place, shown, greedy=report)

    def order(self, folder: str, runs: Path) -> Order:
        """What all runs of a folder of `runs` have alike: its sweep's order, without a method."""
        world, part = next((w, kind) for name, _, w, kind in self.folders() if name == folder)
        select, words = self.asked(world, runs / "worlds" / world, report=part != "search")
        return Order(
            config=config.find(self.config),
            words=tuple(words),
            methods=(),
            rates=(),
            seeds=(),
            out=runs / "sweeps" / folder,
            budget=f"tokens:{self.budget}",
            select=select,
        )

    def identity(self, folder: str, runs: Path) -> dict[str, Any]:
        """What `vpgea sweep` holds the record of a folder to."""
        order = self.order(folder, runs)
        # With --select no file is cut, so nothing of a world is read.
        split = Questions(data="[]", select=(), test=(), files={}, inputs={})
        return identity(order, config.load(order.config, order.words), split)


def worlds_of(stage: Keys) -> Sequence[str]:
    return stage["worlds"] if "worlds" in stage else [stage["world"]]


def method_words(label: str, keys: Keys) -> list[str]:
    """The words of a run that are its method's."""
    return [*parse_method(method_text(label, keys)).words]


def text_of(value: Any) -> str:
    """A value as a word of a command."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def method_text(label: str, keys: Keys) -> str:
    """A method as `vpgea sweep --methods` reads it.

    >>> method_text("a", {"objective": "grpo", "alpha": 0.5, "eta_clip": [0.25, 4.0]})
    'a=grpo:alpha=0.5,eta_clip=[0.25, 4.0]'
    """
    own = [f"{key}={text_of(value)}" for key, value in keys.items() if key != "objective"]
    return f"{label}={keys['objective']}:{','.join(own)}"


def read_plan(path: Path = PLAN, *, quick: bool = False) -> Plan:
    """Read the plan, or its little one. PlanError where it is none, or is not fair."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        little = tree.pop("quick")
        plan = Plan(**tree, bars=[])
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        said = "it is no mapping" if isinstance(error, AttributeError) else str(error)
        said = f"it has no {error.args[0]}" if isinstance(error, KeyError) else said
        said = " ".join(said.split())
        raise PlanError(
            f"{path} is no plan ({said}); give one such as {PLAN.name} by --plan"
        ) from error
    check_fair(plan)
    return little_plan(plan, little) if quick else plan


def check_fair(plan: Plan) -> None:
    """PlanError unless all methods are searched equally."""
    for name, method in plan.methods.items():
        rates, knob = method["rates"], method["knob"]
        factors = {round(b / a, 6) for a, b in pairwise(rates)}
        if len(rates) != 4 or factors != {2.0}:
            raise PlanError(f"{name}: got the rates {rates}, expected four at a factor of two")
        if len(knob) != 3 or len({json.dumps(value) for value in knob}) != 3:
            raise PlanError(f"{name}: got {len(knob)} values of its knob, expected three")
    for stage, of in plan.stages.items():
        if of.get("kind") not in KINDS:
            raise PlanError(f"{stage}: got the kind {of.get('kind')}, expected one of {KINDS}")
        unknown = [*(m for m in of.get("methods", []) if m not in plan.methods)]
        unknown += [w for w in worlds_of(of) if w not in plan.worlds]
        if unknown:
            raise PlanError(f"{stage}: {unknown[0]!r} is no method and no world of the plan")
    if plan.search_seed in plan.report_seeds:
        raise PlanError(f"search_seed {plan.search_seed} is also reported; take another")


def little_plan(plan: Plan, of: Keys) -> Plan:
    """The plan that CI runs: one world and rate, the knobs as shipped."""
    stage = {
        "kind": "search",
        "worlds": [of["world"]],
        "methods": of["methods"],
        "rates": [of["rate"]],
        "extend": 0,
        "knobs": False,
    }
    parts = {key: of[key] for key in ("budget", "questions", "report_seeds", "bars")}
    return Plan(**(vars(plan) | parts | {"stages": {"main": stage}, "claims": [], "after": []}))

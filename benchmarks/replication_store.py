"""What is kept of the replication's runs: one file, from which their records can be made again.

    folders.FOLDER  a sweep: what its runs have in common (`sweep`, `words` by method, `inputs`, the
                    answers `before`), and a line for each run
    worlds.WORLD    what the base measured, and fingerprints of it and its questions
    tables          the numbers of the pages, at paths that stay
    starts          command, time and environment of each start that has made something

A run keeps the digest of the plan that it was made by: another than the file's is exploratory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from replication_plan import Keys, Plan, PlanError, method_words
from sealed import SealError, opened, sealed

from vpgea_fast import config
from vpgea_fast.checkpoint import write_text
from vpgea_fast.sweep.inputs import file_digest
from vpgea_fast.sweep.plan import cell_name
from vpgea_fast.sweep.table import best_rate, by_rate, score
from vpgea_fast.weights import model_digest

Result = dict[str, Any]
SLOTS = {"--optim.lr=": "lr", "--run.seed=": "seed"}
"""Words that differ between the runs of a method."""
PLACES = ("--run.dir=", "--eval.data=")
"""Words that say where files lie; a sweep does not compare them."""
NUMBERS = ("acc", "acc_low", "acc_high", "tokens", "eps3", "truncated", "n")
DIGITS = 6
"""Decimals that are kept of them: shares of 400 questions are exact."""
BESIDE = ("plan", "tables", "worlds", "made_by", "folders", "command", "environment", "starts")
"""Keys of the file that are no probe."""
KEPT = ("ended", "halt", "steps", "tokens_generated", "guard_caught", "wall_s")
COURSE = ("to_short", "late")
FILES = ("train", "test", "pick", "report", "few_report", "few")


def read(path: Path, plan: Plan) -> Result:
    """What is known, or nothing yet. PlanError for a file that is no result of such a plan."""
    fresh = {"plan": plan.digest, "tables": {}, "worlds": {}, "made_by": [], "folders": {}}
    if not path.exists():
        return fresh | {"quick": True} if plan.quick else fresh
    try:
        found = opened(path)
    except SealError as error:
        raise PlanError(str(error)) from error
    # A sealed record of another bench is none.
    if (missing := next((key for key in fresh if key not in found), None)) is not None:
        raise PlanError(f"{path} is no result of the replication: it has no {missing}")
    if found.get("quick", False) != plan.quick:
        kinds = {True: "the little plan (--quick)", False: "the whole plan"}
        raise PlanError(
            f"{path} is of {kinds[not plan.quick]}, expected one of {kinds[plan.quick]}; give "
            "another --out"
        )
    return found


def write(path: Path, result: Result) -> None:
    """Write the result, with a line for each run and for each of the long parts."""
    result, folders = sealed(result), {}
    for name, folder in result["folders"].items():
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value)}"
            for key, value in folder.items()
            if key != "runs"
        ]
        runs = ",\n".join(f"   {json.dumps(run)}" for run in folder["runs"])
        folders[name] = "{\n" + ",\n".join([*lines, f'  "runs": [\n{runs}\n  ]']) + "\n }"
    parts = []
    for key, value in result.items():
        if key == "folders":
            text = ",\n".join(f" {json.dumps(name)}: {folders[name]}" for name in folders)
            parts.append(f'"folders": {{\n{text}\n}}')
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, indent=1)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def made(result: Result) -> str:
    """Name all that runs and probes have brought, in one text."""
    probes = {key: value for key, value in result.items() if key not in BESIDE}
    runs = {name: folder["runs"] for name, folder in result["folders"].items()}
    return json.dumps([runs, probes], sort_keys=True)


def add_start(result: Result, start: Mapping[str, Any]) -> None:
    """Add a start to those that have made the result; `command` and `environment` are the last's.

    A file of an earlier version knows its last one alone.
    """
    last = {key: result[key] for key in ("command", "environment") if key in result}
    starts = result.setdefault("starts", [last] if last else [])
    if start not in starts:
        starts.append(dict(start))
        result |= {key: start[key] for key in ("command", "environment")}


def changed_files(root: Path, result: Path) -> list[str]:
    """List the tracked files that differ from their commit, without the result, which every sweep
    writes; none where git does not say."""
    words = ["git", "-C", str(root), "diff", "--name-only", "HEAD"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for name in said.splitlines() if root / name != result.resolve()]


def collect(result: Result, name: str, out: Path, plan: Plan, *, commit: str | None = None) -> None:
    """Put the records of a sweep's folder into the result. PlanError for a new one that is of
    another commit than this one; None takes any."""
    place = next(((s, w) for folder, s, w, _ in plan.folders() if folder == name), None)
    records = [json.loads(p.read_text("utf-8")) for p in sorted((out / "records").glob("*.json"))]
    if place is None or not records:
        return
    first, known = records[0], result["folders"].get(name, {})
    words = known.get("words", {})
    now = {record["method"]: template(record["words"]) for record in records}
    # Of other words under the same label: a search that went on has another winner.
    other = {method for method, own in words.items() if now.get(method, own) != own}
    words |= now
    kept = (run for run in known.get("runs", []) if run["method"] not in other)
    runs = {(run["method"], run["lr"], run["seed"]): run for run in kept}
    folder = {
        "world": place[1],
        "sweep": json.loads((out / "sweep.json").read_text("utf-8")),
        "inputs": first["inputs"],
        "select": first["select"],
        "test": first["test"],
        "draws": {m: many for m, many in known.get("draws", {}).items() if m not in other},
        "before": known.get("before") or numbers(first["before"]),
    }
    for record in records:
        method, rate, seed = key = record["method"], record["lr"], record["seed"]
        made = record["made_by"].get("commit")
        if key not in runs and commit is not None and _bare(made) != _bare(commit):
            raise PlanError(
                f"{out}: {cell_name(*key)} was made at commit {made}, and this is {commit}; "
                "--collect takes it as it is, and without its record it is run anew"
            )
        if method not in folder["draws"]:
            folder["draws"][method] = paths_a_step(plan, record["words"])
        old = runs.get(key, {})
        run: dict[str, Any] = {"method": method, "lr": rate, "seed": seed}
        run |= {k: record[k] for k in KEPT if record.get(k) is not None}
        run["made_by"] = place_of(result["made_by"], record["made_by"])
        if (own := numbers(record["before"])) != folder["before"]:
            run["before"] = own
        run["after"] = record["after"] and numbers(record["after"])
        # The run directory is of the machine that ran it; the file knows what it said.
        said = {key: old[key] for key in COURSE if key in old}
        said = said or course(out / "runs" / cell_name(*key), plan.worlds[place[1]])
        runs[key] = run | said | {"plan": old.get("plan", plan.digest)}
    folder["words"] = words
    folder["runs"] = [runs[key] for key in sorted(runs, key=str)]
    result["folders"][name] = folder


def _bare(commit: str | None) -> str:
    # The result is a file of the tree: once it is written, the tree has changes.
    return str(commit).removesuffix("+changes")


def restore(result: Result, name: str, out: Path, methods: Mapping[str, Keys]) -> None:
    """Put back the records of these methods that the result holds and the machine has not, and
    remove those of other words: a sweep refuses them."""
    for path in (out / "records").glob("*.json"):
        if not is_of(json.loads(path.read_text("utf-8")), methods):
            path.unlink()
    folder = result["folders"].get(name)
    if folder is None:
        return
    (out / "records").mkdir(parents=True, exist_ok=True)
    if not (out / "sweep.json").is_file():
        write_text(out / "sweep.json", json.dumps(folder["sweep"], indent=1) + "\n")
    for run in (run for run in expand(result, name, methods) if is_of(run, methods)):
        path = out / "records" / f"{cell_name(run['method'], run['lr'], run['seed'])}.json"
        if not path.exists():
            write_text(path, json.dumps(run, indent=1) + "\n")


def expand(
    result: Mapping[str, Any], name: str, methods: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """The runs of a folder as records of its sweep; of these methods, or all."""
    folder = result["folders"].get(name)
    if folder is None:
        return []
    wanted = set(folder["words"] if methods is None else methods)
    return [_record(result, folder, run) for run in folder["runs"] if run["method"] in wanted]


def _record(
    result: Mapping[str, Any], folder: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, Any]:
    slots = {"lr": repr(run["lr"]), "seed": str(run["seed"])}
    words = [
        next((f"{w}{slots[slot]}" for w, slot in SLOTS.items() if w == word), word)
        for word in folder["words"][run["method"]]
    ]
    return {
        **run,
        "words": words,
        "wall_s": run.get("wall_s"),
        "inputs": folder["inputs"],
        "select": folder["select"],
        "test": folder["test"],
        "before": run.get("before", folder["before"]),
        "made_by": result["made_by"][run["made_by"]],
    }


def is_of(run: Mapping[str, Any], methods: Mapping[str, Keys]) -> bool:
    """Whether a run has the words of its label; that of another label has."""
    label, words = run["method"], run["words"]
    return label not in methods or own_words(words) == method_words(label, methods[label])


def own_words(words: list[str]) -> list[str]:
    """Those of a run that are its method's: a sweep sets the rate behind them.

    >>> own_words(["--a=1", "--objective.name=vr", "--objective.norm=x", "--optim.lr=0.1"])
    ['--objective.name=vr', '--objective.norm=x']
    """
    ends = ("--objective.name=", "--optim.lr=")
    start, stop = (next(i for i, w in enumerate(words) if w.startswith(end)) for end in ends)
    return words[start:stop]


def template(words: Iterable[str]) -> list[str]:
    """The words of a run without what differs between those of a method.

    >>> template(["--a=1", "--optim.lr=0.1", "--run.seed=3", "--run.dir=x"])
    ['--a=1', '--optim.lr=', '--run.seed=']
    """
    kept = [word for word in words if not word.startswith(PLACES)]
    return [next((slot for slot in SLOTS if word.startswith(slot)), word) for word in kept]


def numbers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation keeps: of each mode and benchmark the numbers of the tables."""
    return {
        mode: {
            "benchmarks": {
                name: {key: round(found[key], DIGITS) for key in NUMBERS if key in found}
                for name, found in evaluation[mode]["benchmarks"].items()
            }
        }
        for mode in ("sampled", "greedy")
        if mode in evaluation
    }


def place_of(known: list[Any], facts: Any) -> int:
    """Where facts stand in a list, which they join."""
    if facts not in known:
        known.append(facts)
    return known.index(facts)


def paths_a_step(plan: Plan, words: Iterable[str]) -> list[int]:
    """[in the student's view, in the teacher's]: the paths that a step draws."""
    cfg = config.load(config.find(plan.config), list(words))
    draws, each = cfg.objective.draws(), cfg.train.questions_per_step
    hinted = draws.posterior if draws.posterior_view == "teacher" else 0
    return [each * (draws.posterior + draws.prior - hinted), each * hinted]


def course(run: Path, world: Mapping[str, Any]) -> dict[str, Any]:
    """How the lengths of a run went, of the mean thoughts of its steps.

    to_short  tokens drawn until those of the student are short; None where never
    late      [student's, teacher's] length over the last quarter of the steps, tokens; None for a
              method that draws one of both alone
    """
    path, drawn, spent, both = run / "metrics.jsonl", 0, None, list[tuple[float, float]]()
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    for step in map(json.loads, lines):
        drawn += int(step.get("tokens_generated") or 0)
        prior, posterior = step.get("len_prior"), step.get("len_post")
        short = world["short"] - world["answer"]
        if spent is None and prior is not None and prior <= short:
            spent = drawn
        if prior is not None and posterior is not None:
            both.append((prior, posterior))
    late = both[-max(1, len(both) // 4) :]
    means = [round(fmean(side), 3) for side in zip(*late, strict=True)] if late else None
    return {"to_short": spent, "late": means}


def cut_questions(folder: Path, count: Mapping[str, int]) -> None:
    """Write the held-out questions in parts: pick, report, and a few of each."""
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    pick, report, few = count["pick"], count["report"], count["few"]
    if len(lines) < pick + report:
        raise PlanError(f"{folder}: got {len(lines)} held-out questions, expected {pick + report}")
    parts = {
        "pick": lines[:pick],
        "report": lines[pick : pick + report],
        "few_report": lines[pick : pick + few],
        "few": lines[:few],  # the last: the world is complete
    }
    for name, part in parts.items():
        write_text(folder / f"{name}.jsonl", "".join(part))


def hold_world(result: Result, world: str, folder: Path) -> str | None:
    """Keep what a world is; the name of what has changed since the runs that are known."""
    record = json.loads((folder / "base/tiny_base.json").read_text(encoding="utf-8"))
    marks = {file: file_digest(folder / f"{file}.jsonl") for file in FILES}
    now = {
        "measured": record["measured"],
        "marks": {"base": model_digest(str(folder / "base")), **marks},
    }
    known = result["worlds"].get(world)
    if known is not None and any(f["world"] == world for f in result["folders"].values()):
        before = known["marks"]
        # A file of an earlier version knows no marks of the parts.
        changed = next((k for k, mark in now["marks"].items() if before.get(k, mark) != mark), None)
        if changed is not None:
            return changed
    result["worlds"][world] = now
    return None


def drop(result: Result, plan: Plan, world: str, runs: Path) -> None:
    """Forget a world's runs, its probes and its sweeps on this machine."""
    names = [name for name, folder in result["folders"].items() if folder["world"] == world]
    for name in names:
        del result["folders"][name]
        shutil.rmtree(runs / "sweeps" / name, ignore_errors=True)
    for stage, of in plan.stages.items():
        if of.get("world") == world and of["kind"] in ("pass_at_k", "weights"):
            result.pop(stage, None)
            shutil.rmtree(runs / "probes", ignore_errors=True)
    result.get("styles", {}).pop(world, None)
    result["worlds"].pop(world, None)


def best(runs: list[dict[str, Any]], method: str, metric: str) -> tuple[float, float]:
    """(rate, score) of a method's best rate."""
    rate = best_rate(runs, method, metric)
    return rate, score(by_rate(runs, method)[rate], metric)


def seconds(result: Result, otherwise: float) -> float:
    """Mean seconds of a run, as far as they are known."""
    runs = [run for folder in result["folders"].values() for run in folder["runs"]]
    return fmean([run["wall_s"] for run in runs if run.get("wall_s")] or [otherwise])

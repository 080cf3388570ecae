"""The replication: every method on every tiny world, searched alike, with what the plan promises.

    python benchmarks/replication.py --forecast   what is missing of the plan: runs and minutes
    python benchmarks/replication.py              runs it, or goes on; nothing is run twice
    python benchmarks/replication.py --table      the tables of the committed file, as markdown
    python benchmarks/replication.py --quick --out runs/quick.json    a little plan, with bars

`replication.yaml` is the plan, and says what would refute each claim. The result is one file, which
is written after every sweep: what it holds of runs is put back where the sweeps look for them, so
that another machine goes on from it. Worlds are made anew there; where one comes out otherwise,
`--remake WORLD` drops its runs. Constructed tasks: they show mechanisms, not the papers' results.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import replication_store as store
import replication_tables as tables
from replication_plan import PLAN, Plan, PlanError, method_text, read_plan, worlds_of

from vpgea_fast.cli.words import whole
from vpgea_fast.metrics import environment
from vpgea_fast.sweep.runs import cores

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/replication.json"
RUNS = Path("runs/replication")
"""Beside the working directory: its name is in the words of every run."""
Result = dict[str, Any]


class MissingRunsError(Exception):
    """A stage that builds on runs that are not there."""


class Bench:
    """A plan under way in a folder of runs, and the file that holds what is known."""

    def __init__(self, plan: Plan, out: Path, runs: Path, jobs: int) -> None:
        self.plan, self.out, self.runs, self.jobs = plan, out, runs, jobs
        self.result = store.read(out, plan)

    def save(self) -> None:
        """Write all records that are there, and the tables of them."""
        for name in sorted(p.parent.name for p in self.runs.glob("sweeps/*/sweep.json")):
            store.collect(self.result, name, self.runs / "sweeps" / name, self.plan)
        self.result["tables"] = tables.make(self.result, self.plan)
        store.write(self.out, self.result)

    def go(self) -> None:
        """Run every stage in every world. What fails is told at once and at the end, with status 2;
        the rest goes on, and the same command tries it again."""
        failed = make_worlds(self)
        places = [(s, of, w) for s, of in self.plan.stages.items() for w in worlds_of(of)]
        for stage, of, world in places:
            try:
                if world in failed:
                    continue
                KINDS[of["kind"]](self, stage, of, world)
            except SystemExit as left:
                # Any other status: it was asked to leave.
                if left.code not in (1, 2):
                    raise
                failed.append(f"{stage} in {world}")
            except MissingRunsError as missing:
                failed.append(f"{stage} in {world} ({missing})")
            self.save()
        if failed:
            stop(f"not done: {', '.join(failed)}; the same command tries it again")

    def sweep(
        self,
        folder: str,
        world: str,
        methods: Mapping[str, Mapping[str, Any]],
        grids: Mapping[str, Sequence[float]],
        *,
        report: bool,
        extend: int = 0,
    ) -> list[dict[str, Any]]:
        """Run `vpgea sweep` over methods with grids of their own; all runs of these methods.

        `report`: with the report seeds, sampled and greedy on the report questions; else with the
        search seed on the pick questions. Of the other ones a few are answered.
        """
        from vpgea_fast.cli import main as vpgea

        plan, place = self.plan, self.runs / "worlds" / world
        out = self.runs / "sweeps" / folder
        store.restore(self.result, folder, out)
        first = next(iter(grids.values()))
        pick, shown = ("few", "report") if report else ("pick", "few_report")
        words = ["sweep", str(plan.config), "--out", str(out)]
        words += ["--methods", *(method_text(label, keys) for label, keys in methods.items())]
        words += ["--rates", *(f"{rate!r}" for rate in first), "--grid"]
        words += [f"{label}={','.join(map(repr, rates))}" for label, rates in grids.items()]
        seeds = plan.report_seeds if report else [plan.search_seed]
        words += ["--seeds", *map(str, seeds), "--budget", f"tokens:{plan.budget}"]
        words += ["--metric", plan.metric, "--short", f"{plan.short(world):g}"]
        words += ["--extend", str(extend), "--jobs", str(self.jobs)]
        words += ["--select", str(place / f"{pick}.jsonl")]
        words += plan.words_of(world, place, shown, greedy=report)
        print(f"replication: {folder}", flush=True)
        status = vpgea(words)
        self.save()
        if status:
            raise SystemExit(status)
        return store.expand(self.result, folder, methods)


def search(bench: Bench, stage: str, of: Mapping[str, Any], world: str) -> None:
    """Grids, knobs at the best rate, and the winners with the report seeds."""
    plan, names = bench.plan, of["methods"]
    won = {name: (0, plan.grid(name, of)[0]) for name in names}
    # Of one rate and one setting there is nothing to pick.
    if any(len(plan.grid(name, of)) > 1 for name in names):
        won = searched(bench, f"{stage}-{world}-search", world, of)
    chosen = {name: plan.variant(name, index) for name, (index, _) in won.items()}
    rates = {name: [rate] for name, (_, rate) in won.items()}
    bench.sweep(f"{stage}-{world}-report", world, chosen, rates, report=True)


def searched(
    bench: Bench, folder: str, world: str, of: Mapping[str, Any]
) -> dict[str, tuple[int, float]]:
    """(value of the knob, rate) that won of each method."""
    plan, names = bench.plan, of["methods"]
    default = {name: plan.variant(name, 0) for name in names}
    grids = {name: plan.grid(name, of) for name in names}
    extend = of.get("extend", plan.extend)
    runs = bench.sweep(folder, world, default, grids, report=False, extend=extend)
    if of.get("knobs", True):
        knobs, at = {}, {}
        for name in names:
            rate, _ = store.best(runs, name, plan.metric)
            for index in (1, 2):
                label = plan.label(name, index)
                knobs[label], at[label] = plan.variant(name, index), [rate]
        bench.sweep(folder, world, knobs, at, report=False)
    return {name: tables.winner(bench.result, plan, folder, name) for name in names}


def rows(bench: Bench, stage: str, of: Mapping[str, Any], world: str) -> None:
    """The winner of a method with other keys, row by row."""
    method = of["method"]
    need(bench, world, [method])
    index, rate = tables.winner(bench.result, bench.plan, f"main-{world}-search", method)
    base = bench.plan.variant(method, index)
    variants = {label: {**base, **keys} for label, keys in of["rows"].items()}
    rates = {label: [rate] for label in variants}
    bench.sweep(f"{stage}-{world}", world, variants, rates, report=True)


def pass_at_k(bench: Bench, stage: str, of: Mapping[str, Any], world: str) -> None:
    """Train the winners again, with their models kept, and ask each many times."""
    from replication_probes import answers

    need(bench, world, of["methods"])
    found = bench.result.setdefault(stage, {})
    for name in ("base", *of["methods"]):
        if name not in found:
            found[name] = answers(bench, name, of, bench.runs / "worlds" / world)
            bench.save()


def weights(bench: Bench, stage: str, of: Mapping[str, Any], world: str) -> None:
    """What each method weighs a question, on paths of the base."""
    from replication_probes import question_weights

    if "base" not in bench.result.get("pass_at_k", {}):
        raise MissingRunsError("it needs the base's answers, of pass_at_k")
    found = bench.result.setdefault(stage, {})
    for name in of["methods"]:
        if name not in found:
            found[name] = question_weights(bench, name, of, bench.runs / "worlds" / world)
            bench.save()


def need(bench: Bench, world: str, methods: Sequence[str]) -> None:
    """MissingRunsError where the main table of a world has not these methods."""
    runs = store.expand(bench.result, f"main-{world}-report")
    missing = [name for name in methods if not any(run["method"] == name for run in runs)]
    if missing:
        raise MissingRunsError(f"it needs {missing[0]} of the main table")


KINDS = {"search": search, "rows": rows, "pass_at_k": pass_at_k, "weights": weights}


def make_worlds(bench: Bench) -> list[str]:
    """Make what is missing, `jobs` bases at a time, and hold each to what the file knows of it;
    those that no base was found for."""
    plan, folder = bench.plan, bench.runs / "worlds"
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [w for w in plan.used_worlds() if not (folder / w / "few.jsonl").is_file()]
    active, failed = list[tuple[str, subprocess.Popen[bytes]]](), list[str]()
    while waiting or active:
        while waiting and len(active) < bench.jobs:
            world = waiting.pop(0)
            words = ["make-tiny", str(folder / world), *map(str, plan.worlds[world]["make"])]
            command = [sys.executable, "-m", "vpgea_fast.cli", *words]
            print(f"replication: vpgea {shlex.join(words)}", flush=True)
            active.append((world, subprocess.Popen(command, stdout=subprocess.DEVNULL)))
        world, process = active.pop(0)
        if process.wait():
            print(f"replication: make-tiny of {world} ended with status {process.returncode}")
            failed.append(world)
        else:
            store.cut_questions(folder / world, plan.questions)
    for world in (world for world in plan.used_worlds() if world not in failed):
        if (changed := store.hold_world(bench.result, world, folder / world)) is not None:
            stop(
                f"{world}: {changed} is another than that of the runs in {bench.out}, so they do "
                f"not mix; bring it back, or give --remake {world} to drop them"
            )
    return failed


def forecast(bench: Bench) -> list[str]:
    """Lines: what is missing of each stage, and the minutes that it takes."""
    plan, total, lines = bench.plan, 0.0, []
    known = store.seconds(bench.result)
    made = bench.runs / "worlds"
    missing = [w for w in plan.used_worlds() if not (made / w / "few.jsonl").is_file()]
    bases = [w for w in missing if "demo" not in plan.worlds[w]["make"]]
    if bases:
        total += plan.seconds["base"] * len(bases)
        lines.append(f"worlds: {len(bases)} bases to train, {total / 60 / bench.jobs:.0f} minutes")
    for stage, of in plan.stages.items():
        count, seconds = tables.missing(plan, stage, of, bench.result, known)
        total += seconds
        lines.append(f"{stage}: {count} runs, {seconds / 60 / bench.jobs:.0f} minutes")
    lines.append(
        f"in all {total / 60 / bench.jobs:.0f} minutes at {bench.jobs} runs a time, "
        f"{plan.budget:,} tokens a run; longest, with every extension"
    )
    return lines


def quick(bench: Bench) -> None:
    """Run the little plan, print its tables, and end with status 1 where a bar is missed."""
    bench.go()
    print(tables.markdown(bench.result, bench.plan))
    missed = [c for c in bench.plan.bars if not tables.holds(bench.result["tables"], c)]
    for check in missed:
        print(f"replication: missed {tables.shown(bench.result['tables'], check)}", flush=True)
    if missed:
        raise SystemExit(1)


def stop(why: str) -> NoReturn:
    print(f"replication: {why}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = _arguments(words)
    try:
        plan = read_plan(args.plan, quick=args.quick)
        bench = Bench(plan, args.out, args.runs / ("quick" if args.quick else ""), args.jobs)
    except PlanError as error:
        stop(str(error))
    if unknown := [world for world in args.remake if world not in plan.worlds]:
        stop(f"--remake: got {unknown[0]!r}, expected some of {', '.join(plan.worlds)}")
    if args.table:
        print(tables.markdown(bench.result, plan))
    elif args.forecast:
        print("\n".join(forecast(bench)))
    else:
        for world in args.remake:
            store.drop(bench.result, plan, world, bench.runs)
        bench.result["command"] = shlex.join(["python", "benchmarks/replication.py", *words])
        bench.result["environment"] = environment()
        if bench.result["plan"] != plan.digest:
            print("replication: the plan has changed since the first run: what runs now is marked")
        if args.minutes:
            # The sweep under way saves, and the same command goes on.
            end = threading.Timer(60 * args.minutes, os.kill, (os.getpid(), signal.SIGTERM))
            end.daemon = True
            end.start()
        if args.worlds:
            make_worlds(bench)
        elif args.collect:
            bench.save()
        else:
            (quick if args.quick else Bench.go)(bench)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--out", type=Path, default=RESULT, help="the result, read and written")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of worlds and sweeps")
    parser.add_argument("--jobs", type=whole(1, 4096), default=cores(), help="runs at a time")
    parser.add_argument("--minutes", type=float, help="save and leave after so many")
    parser.add_argument("--remake", nargs="+", default=[], metavar="WORLD", help="drop its runs")
    parser.add_argument("--quick", action="store_true", help="the little plan, with bars")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--forecast", action="store_true", help="runs and minutes, and end")
    what.add_argument("--worlds", action="store_true", help="make the worlds, and end")
    what.add_argument("--collect", action="store_true", help="write what has run, and end")
    what.add_argument("--table", action="store_true", help="print the tables of --out, and end")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

"""The replication: every method on every tiny world, searched alike, with what the plan promises.

    python benchmarks/replication.py --forecast   what is missing of the plan: runs and minutes
    python benchmarks/replication.py              runs it, or goes on; nothing is run twice
    python benchmarks/replication.py --table      the tables of the committed file, as markdown
    python benchmarks/replication.py --quick      a little plan, with bars; into runs/quick.json

`replication.yaml` is the plan, and says what would refute each claim. The result is one file, which
is written after every sweep: what it holds of runs is put back where the sweeps look for them, so
that another machine goes on from it. Worlds are made anew there; where one comes out otherwise,
`--remake WORLD` drops its runs. Constructed tasks: they show mechanisms, not the papers' results.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import replication_store as store
import replication_tables as tables
from replication_pages import markdown
from replication_plan import PLAN, Plan, PlanError, StageError, method_text, read_plan, worlds_of

from vpgea_fast.bound import bound_command
from vpgea_fast.cli.words import status_of, termination, whole
from vpgea_fast.metrics import environment
from vpgea_fast.sweep import SweepError, hold_sweep
from vpgea_fast.sweep.runs import MADE_BY, cores

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/replication.json"
QUICK = Path("runs/quick.json")
RUNS = Path("runs/replication")
"""Beside the working directory: its name is in the words of every run."""
Result = dict[str, Any]


class Bench:
    """A plan under way in a folder of runs, and the file that holds what is known. New runs must be
    of `commit`, if it is given. `start` is what the file keeps of this one once it makes
    something."""

    def __init__(self, plan: Plan, out: Path, runs: Path, jobs: int) -> None:
        self.plan, self.out, self.runs, self.jobs = plan, out, runs, jobs
        self.result = store.read(out, plan)
        self.commit: str | None = None
        self.start: dict[str, Any] = {}
        self._before = store.made(self.result)

    def save(self) -> None:
        """Write all records that are there, and the tables of them."""
        for name in sorted(p.parent.name for p in self.runs.glob("sweeps/*/sweep.json")):
            folder = self.runs / "sweeps" / name
            store.collect(self.result, name, folder, self.plan, commit=self.commit)
        if self.start and store.made(self.result) != self._before:
            store.add_start(self.result, self.start)
        self.result["tables"] = tables.make(self.result, self.plan)
        store.write(self.out, self.result)

    def origin(self) -> dict[str, Any]:
        """What a probe keeps of how it was made, as runs do."""
        facts = environment()
        made_by = {key: facts.get(key) for key in MADE_BY}
        place = store.place_of(self.result["made_by"], made_by)
        return {"plan": self.plan.digest, "made_by": place, "command": self.start.get("command")}

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
            except StageError as why:
                failed.append(f"{stage} in {world} ({why})")
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
        store.restore(self.result, folder, out, methods)
        first = next(iter(grids.values()))
        select, common = plan.asked(world, place, report=report)
        words = ["sweep", str(plan.config), "--out", str(out)]
        words += ["--methods", *(method_text(label, keys) for label, keys in methods.items())]
        words += ["--rates", *(f"{rate!r}" for rate in first), "--grid"]
        words += [f"{label}={','.join(map(repr, rates))}" for label, rates in grids.items()]
        seeds = plan.report_seeds if report else [plan.search_seed]
        words += ["--seeds", *map(str, seeds), "--budget", f"tokens:{plan.budget}"]
        words += ["--metric", plan.metric, "--short", f"{plan.short(world):g}"]
        words += ["--extend", str(extend), "--jobs", str(self.jobs)]
        words += ["--select", select, *common]
        print(f"replication: {folder}", flush=True)
        status = vpgea(words)
        self.save()
        if status:
            raise SystemExit(status)
        return store.expand(self.result, folder, methods)


def search(bench: Bench, stage: str, of: Mapping[str, Any], world: str) -> None:
    """Grids, knobs at the best rate, and the winners with the report seeds."""
    plan, names, folder = bench.plan, of["methods"], f"{stage}-{world}-search"
    grids = {name: plan.grid(name, of) for name in names}
    # Of one rate and one setting there is nothing to pick.
    if any(len(rates) > 1 for rates in grids.values()):
        default = {name: plan.variant(name, 0) for name in names}
        extend = of.get("extend", plan.extend)
        runs = bench.sweep(folder, world, default, grids, report=False, extend=extend)
        if of.get("knobs", True):
            best = {name: [store.best(runs, name, plan.metric)[0]] for name in names}
            each = [(name, index) for name in names for index in (1, 2)]
            knobs = {plan.label(*one): plan.variant(*one) for one in each}
            at = {plan.label(*one): best[one[0]] for one in each}
            bench.sweep(folder, world, knobs, at, report=False)
    report(bench, f"{stage}-{world}-report", world)


def rows(bench: Bench, stage: str, of: Mapping[str, Any], world: str) -> None:
    """The winner of a method with other keys, row by row."""
    need(bench, world, [of["method"]])
    report(bench, f"{stage}-{world}", world)


def report(bench: Bench, folder: str, world: str) -> None:
    """Run what a folder reports: the winners of its search, with the report seeds."""
    won = tables.chosen(bench.result, bench.plan, folder)
    variants = {label: keys for label, (keys, _) in won.items()}
    rates = {label: [rate] for label, (_, rate) in won.items()}
    bench.sweep(folder, world, variants, rates, report=True)


def pass_at_k(bench: Bench, stage: str, of: Mapping[str, Any], world: str) -> None:
    """Train the winners again, with their models kept, and ask each many times."""
    from replication_probes import answers, winner_of

    need(bench, world, of["methods"])
    found = bench.result.setdefault(stage, {})
    for name in ("base", *of["methods"]):
        record = None if name == "base" else winner_of(bench, name, of)
        asked = record and [record["lr"], *store.own_words(record["words"])]
        known = found.get(name)
        if known is not None and known.get("run", asked) != asked:
            # Of a winner that has since lost.
            shutil.rmtree(bench.runs / "probes", ignore_errors=True)
            known = None
        if known is None:
            own = answers(bench, name, of, place=bench.runs / "worlds" / world, record=record)
            found[name] = own | {"run": asked} | bench.origin()
            bench.save()


def weights(bench: Bench, stage: str, of: Mapping[str, Any], world: str) -> None:
    """What each method weighs a question, on paths of the base."""
    from replication_probes import question_weights

    if "base" not in bench.result.get("pass_at_k", {}):
        raise StageError("it needs the base's answers, of pass_at_k")
    found = bench.result.setdefault(stage, {})
    for name in of["methods"]:
        if name not in found:
            own = question_weights(bench, name, of, bench.runs / "worlds" / world)
            found[name] = own | bench.origin()
            bench.save()


def after(bench: Bench) -> None:
    """Ask what was asked when results were known: in which styles the reported winners think."""
    from replication_probes import styles

    if failed := make_worlds(bench):
        stop(f"no base was found for {failed[0]}; the same command tries it again")
    for of in bench.plan.after:
        world, found = of["world"], bench.result.setdefault("styles", {})
        known = tables.winners(bench.result, bench.plan, f"main-{world}-report")
        for name, record in ((m, run) for m in of["methods"] for run in known.get(m, [])):
            mine = found.setdefault(world, {}).setdefault(name, {})
            asked = [record["lr"], *store.own_words(record["words"])]
            if mine.get(seed := str(record["seed"]), {}).get("run") != asked:
                own = {"styles": styles(bench, name, world, record)}
                mine[seed] = own | {"run": asked} | bench.origin()
                bench.save()


def need(bench: Bench, world: str, methods: Sequence[str]) -> None:
    """StageError where the main table of a world has not these methods."""
    known = tables.winners(bench.result, bench.plan, f"main-{world}-report")
    missing = [name for name in methods if name not in known]
    if missing:
        raise StageError(f"it needs {missing[0]} of the main table")


KINDS = {"search": search, "rows": rows, "pass_at_k": pass_at_k, "weights": weights}


def make_worlds(bench: Bench) -> list[str]:
    """Make what is missing, `jobs` bases at a time, and hold each to what the file knows of it;
    those that no base was found for."""
    plan, folder = bench.plan, bench.runs / "worlds"
    folder.mkdir(parents=True, exist_ok=True)
    failed = _make([w for w in plan.used_worlds() if not _is_made(folder / w)], bench)
    for world in (world for world in plan.used_worlds() if world not in failed):
        store.cut_questions(folder / world, plan.questions)
        if (changed := store.hold_world(bench.result, world, folder / world)) is not None:
            raise PlanError(
                f"{world}: {changed} is another than that of the runs in {bench.out}, so they do "
                f"not mix; bring it back, or give --remake {world} to drop them"
            )
    return failed


def _is_made(world: Path) -> bool:
    # make-tiny gives all or nothing.
    return (world / "test.jsonl").is_file()


def _make(worlds: Sequence[str], bench: Bench) -> list[str]:
    """Run make-tiny, `jobs` at a time; the worlds at which it failed."""
    waiting, failed = deque(worlds), list[str]()
    active = deque[tuple[str, subprocess.Popen[bytes]]]()
    try:
        while waiting or active:
            while waiting and len(active) < bench.jobs:
                world = waiting.popleft()
                place = bench.runs / "worlds" / world
                words = ["make-tiny", str(place), *map(str, bench.plan.worlds[world]["make"])]
                print(f"replication: vpgea {shlex.join(words)}", flush=True)
                child = subprocess.Popen(bound_command(words), stdout=subprocess.DEVNULL)
                active.append((world, child))
            world, process = active[0]
            status = process.wait()
            active.popleft()
            if status:
                print(f"replication: make-tiny of {world} ended with status {status}")
                failed.append(world)
    finally:
        for _, process in active:
            process.terminate()
        for _, process in active:
            process.wait()
    return failed


def forecast(bench: Bench) -> list[str]:
    """Lines: what is missing of each stage, and the minutes that it takes."""
    plan = bench.plan
    a_run = store.seconds(bench.result, plan.seconds["run"])
    missing = [w for w in plan.used_worlds() if not _is_made(bench.runs / "worlds" / w)]
    bases = sum("demo" not in plan.worlds[w]["make"] for w in missing)
    # (what, how many, seconds of one core)
    parts = [("worlds", f"{bases} bases to train", bases * plan.seconds["base"])] * bool(bases)
    for stage, of in plan.stages.items():
        count = tables.missing(plan, stage, of, bench.result)
        asked = plan.seconds["pass_at_k"] if of["kind"] in tables.KNOWN else 0
        parts.append((stage, f"{count} runs", count * (a_run + asked)))
    total = sum(seconds for *_, seconds in parts) / 60 / bench.jobs
    lines = [f"{what}: {n}, {seconds / 60 / bench.jobs:.0f} minutes" for what, n, seconds in parts]
    lines.append(
        f"in all {total:.0f} minutes at {bench.jobs} runs a time, {plan.budget:,} tokens a run; "
        "longest, with every extension"
    )
    return lines + refusals(bench)


def refusals(bench: Bench) -> list[str]:
    """Lines: sweeps that are known, and that `vpgea sweep` would not go on with."""
    lines = []
    with tempfile.TemporaryDirectory() as elsewhere:
        for name in (f for f, *_ in bench.plan.folders() if f in bench.result["folders"]):
            out = bench.runs / "sweeps" / name
            if not (out / "sweep.json").is_file():
                # As a start would put it back; a forecast writes nothing that stays.
                out = Path(elsewhere) / name
                store.restore(bench.result, name, out, {})
            try:
                hold_sweep(out / "sweep.json", bench.plan.identity(name, bench.runs))
            except SweepError as why:
                lines.append(f"refused: {why}")
    return lines


def quick(bench: Bench) -> None:
    """Run the little plan, print its tables, and end with status 1 where a bar is missed."""
    bench.go()
    print(markdown(bench.result, bench.plan))
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
        with termination():
            _main(args, words)
    except (PlanError, StageError) as error:
        stop(str(error))
    except KeyboardInterrupt as interrupt:
        print("replication: stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(status_of(interrupt)) from None


def _main(args: argparse.Namespace, words: Sequence[str]) -> None:
    plan = read_plan(args.plan, quick=args.quick)
    out = args.out or (QUICK if args.quick else RESULT)
    if unknown := [world for world in args.remake if world not in plan.worlds]:
        raise PlanError(f"--remake: got {unknown[0]!r}, expected some of {', '.join(plan.worlds)}")
    # Nothing is written by what only shows.
    with nullcontext() if args.table or args.forecast else alone(out):
        bench = Bench(plan, out, args.runs / ("quick" if args.quick else ""), args.jobs)
        if (args.table and not out.is_file()) or out.is_dir():
            raise PlanError(f"--out: got {out}, expected the file of a run; run the plan first")
        known = out.is_file() or any(bench.runs.glob("sweeps/*/sweep.json"))
        if args.collect and not known:
            raise PlanError(f"--runs: there is no sweep in {bench.runs}; give the folder of a run")
        if args.table:
            # Made anew: the file may be of an earlier version of the tables.
            bench.result["tables"] = tables.make(bench.result, plan)
            print(markdown(bench.result, plan))
        elif args.forecast:
            print("\n".join(forecast(bench)))
        elif args.collect:
            bench.save()
        else:
            _run(bench, args, words)


def _run(bench: Bench, args: argparse.Namespace, words: Sequence[str]) -> None:
    plan, result = bench.plan, bench.result
    # Runs are of this tree, wherever the command is given and whatever is installed.
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
    for world in args.remake:
        store.drop(result, plan, world, bench.runs)
    command = shlex.join(["python", "benchmarks/replication.py", *words])
    facts, now = environment(), datetime.now(UTC).isoformat(timespec="seconds")
    bench.commit = facts["commit"]
    bench.start = {"command": command, "time": now, "environment": facts}
    if changed := store.changed_files(ROOT, bench.out):
        print(
            f"replication: {', '.join(changed[:3])}{', ...' * (len(changed) > 3)} "
            "differ from the commit: what runs now cannot be traced; commit them first"
        )
    if result["plan"] != plan.digest:
        print("replication: the plan has changed since the first run: what runs now is marked")
    if args.minutes:
        # The sweep under way saves, and the same command goes on.
        end = threading.Timer(60 * args.minutes, os.kill, (os.getpid(), signal.SIGTERM))
        end.daemon = True
        end.start()
    if args.worlds:
        make_worlds(bench)
    elif args.after:
        after(bench)
    else:
        (quick if args.quick else Bench.go)(bench)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep the result from other benches, which would lose what this one writes. PlanError where
    one is at work."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # The folder: the file is another one after every write.
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PlanError(
                f"another bench writes into {out.parent}, after each of its sweeps; wait for it, "
                "or give an --out elsewhere"
            ) from error
        yield
    finally:
        os.close(folder)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--out", type=Path, help=f"the result; of --quick {QUICK}")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of worlds and sweeps")
    parser.add_argument("--jobs", type=whole(1, 4096), default=cores(), help="runs at a time")
    parser.add_argument("--minutes", type=whole(1, 10**6), help="save and leave after so many")
    parser.add_argument("--remake", nargs="+", default=[], metavar="WORLD", help="drop its runs")
    parser.add_argument("--quick", action="store_true", help="the little plan, with bars")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--forecast", action="store_true", help="runs and minutes, and end")
    what.add_argument("--worlds", action="store_true", help="make the worlds, and end")
    what.add_argument("--after", action="store_true", help="ask how winners think, and end")
    what.add_argument("--collect", action="store_true", help="write what has run, and end")
    what.add_argument("--table", action="store_true", help="print the tables of --out, and end")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

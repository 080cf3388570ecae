"""The runs of a sweep: processes of `vpgea train`, side by side, stopped, killed, gone on with."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import IO, Any

from vpgea_fast.checkpoint import write_text
from vpgea_fast.config import ConfigError, as_dict, changes, dump, load, one_line, resolve
from vpgea_fast.metrics import Alarms, read_steps
from vpgea_fast.objectives.guards import GUARDS
from vpgea_fast.report import read_evaluation, read_json
from vpgea_fast.sweep.inputs import changed, meaning
from vpgea_fast.sweep.plan import Cell, Questions, SweepError
from vpgea_fast.sweep.server import Forked, Starter
from vpgea_fast.sweep.table import part

Record = dict[str, Any]
GUARD = (*GUARDS, "time_guard_ratio")
"""What a run logs of its guards in every step."""
MADE_BY = ("commit", "vpgea_fast", "python", "torch", "transformers", "triton", "device", "threads")
"""What a record keeps of the environment of its run."""
ENDED = (0, 3)
"""Exit statuses of a run that has been evaluated: at its last step, or where it had to halt."""


class Pool:
    """Runs cells in the folder of a sweep, `jobs` at a time. A cell that has a record is not run;
    one that was interrupted goes on. `tell` hears of each record that is made."""

    def __init__(
        self,
        out: Path,
        jobs: int,
        split: Questions,
        starter: Starter,
        tell: Callable[[Record], None],
    ) -> None:
        self.out, self.jobs, self.split, self.starter, self.tell = out, jobs, split, starter, tell
        # The cell of a process, and when it began; None for one that was interrupted before.
        self.active: dict[subprocess.Popen[bytes] | Forked, tuple[Cell, float | None]] = {}

    def run(self, cells: Sequence[Cell]) -> list[Record]:
        """Return the records of all cells, in their order. SweepError where a run fails, and
        KeyboardInterrupt or Stopped when asked to leave; the runs under way have then saved."""
        waiting = deque(cell for cell in cells if self.known(cell) is None)
        # All of them before one goes on: none of the work is for nothing.
        for cell in waiting:
            self._check_begun(cell)
        try:
            while waiting or self.active:
                self.starter.stop.alone()
                while waiting and len(self.active) < self.jobs:
                    self._take(waiting.popleft())
                self._collect()
                # A look costs microseconds, and a run takes seconds at least.
                time.sleep(0.05)
        finally:
            self._end()
        return [record for cell in cells if (record := self.known(cell)) is not None]

    def known(self, cell: Cell) -> Record | None:
        """Return the record of a cell; None where there is none. SweepError for another run's."""
        path = self._record(cell)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            # Where the folder lies and what its files are called may change.
            same = _lasting(record["words"]) == _lasting(cell.words)
            _read_through(record)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SweepError(
                f"{path} is no record ({one_line(error)}); remove it to run it anew"
            ) from error
        if not same:
            raise SweepError(
                f"{path} is of a run with other words: {' '.join(record['words'])}; give the "
                "method another label, or the sweep another folder"
            )
        # Records of earlier versions say nothing of it; the table counts them.
        if "inputs" in record:
            _require_inputs(path, record["inputs"], cell)
        return record

    def _check_begun(self, cell: Cell) -> None:
        """Refuse a run that has begun with other inputs, which `_take` would go on with."""
        file, run = self._inputs(cell), Path(cell.cfg.run.dir)
        if file.is_file() and _goes_on(run, cell):
            try:
                known = dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise SweepError(
                    f"{file} does not say what {run} has read ({error}); remove both to run it anew"
                ) from error
            _require_inputs(run, known, cell)

    def _take(self, cell: Cell) -> None:
        run = Path(cell.cfg.run.dir)
        # Not begun, or begun under other words: nothing of it can be used.
        if run.exists() and not _goes_on(run, cell):
            shutil.rmtree(run)
        # Killed between its end and its record. A report is the last that a run writes, and the
        # first that a resume removes; a run that had to halt would otherwise train on.
        if (run / "report.html").exists() and "after" in read_evaluation(run):
            self._finish(cell, 0, None)
        else:
            self._start(cell)

    def _start(self, cell: Cell) -> None:
        """Start the process of a cell."""
        file, begun = self.out / "configs" / f"{cell.name}.yaml", Path(cell.cfg.run.dir).exists()
        write_text(file, dump(cell.cfg))
        write_text(self._inputs(cell), json.dumps(cell.inputs, indent=1) + "\n")
        words = ["train", str(file), "--resume-if-started"]
        log = self.out / "logs" / f"{cell.name}.txt"
        process = self.starter.start(words, log, cell.cfg.model.device)
        self.active[process] = cell, None if begun else time.monotonic()

    def _collect(self) -> None:
        for process, (cell, began) in list(self.active.items()):
            if (status := process.poll()) is None:
                continue
            del self.active[process]
            # A run that was interrupted is timed from its resume, which is no time of a run.
            seconds = None if began is None else round(time.monotonic() - began, 1)
            self._finish(cell, status, seconds)

    def _finish(self, cell: Cell, status: int, seconds: float | None) -> None:
        run = Path(cell.cfg.run.dir)
        # Status 2 is a refusal's too; only a run that diverged has written its rows.
        diverged = status == 2 and any(run.glob("nonfinite_step_*.jsonl"))
        if status not in ENDED and not diverged:
            log = self.out / "logs" / f"{cell.name}.txt"
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise SweepError(
                f"the run {cell.name} ended with status {status}: {lines[-1] if lines else '-'} "
                f"(all of it: {log}); mend it, and the same command goes on"
            )
        record = record_of(cell, run, self.split, diverged=diverged)
        record["wall_s"] = seconds
        write_text(self._record(cell), json.dumps(record, indent=1) + "\n")
        # After the record: a run that is recorded is never gone on with.
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        self.tell(record)

    def _end(self) -> None:
        """Stop what still runs, each with a checkpoint, and wait for it."""
        for process in self.active:
            process.terminate()
        for process in self.active:
            process.wait()
        self.active.clear()

    def _record(self, cell: Cell) -> Path:
        return self.out / "records" / f"{cell.name}.json"

    def _inputs(self, cell: Cell) -> Path:
        return self.out / "configs" / f"{cell.name}.inputs.json"


def record_of(cell: Cell, run: Path, split: Questions, *, diverged: bool) -> Record:
    """What a sweep keeps of a run that has ended."""
    evaluation, drawn, steps = read_evaluation(run), 0, 0
    lines, facts = list(read_steps(run)), read_json(run / "environment.json")
    for line in lines:
        drawn, steps = drawn + int(line.get("tokens_generated", 0)), line["step"]
    limit, last = cell.cfg.train.max_tokens, cell.cfg.train.steps
    spent = steps == last or (limit is not None and drawn >= limit)
    if not diverged and "after" not in evaluation:
        raise SweepError(f"{run}: the run has ended and eval.json has no `after`; remove {run}")
    halted = {} if diverged or spent else how_halted(cell, lines)
    return {
        "method": cell.method,
        "lr": cell.rate,
        "seed": cell.seed,
        "words": list(cell.words),
        "inputs": cell.inputs,
        "ended": "diverged" if diverged else "done",
        **halted,
        "steps": steps,
        "tokens_generated": drawn,
        **guard_facts(lines),
        "select": list(split.select),
        "test": list(split.test),
        "before": evaluation["before"],
        "after": None if diverged else evaluation["after"],
        # Not of who writes the table: that may be days and commits later.
        "made_by": {key: facts.get(key) for key in MADE_BY},
    }


def how_halted(cell: Cell, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Which alarm ended a run before its last step, and in its words."""
    train = cell.cfg.train
    # What would have ended it, were the engine never off.
    replays = cell.cfg.engine.name == "replay"
    alarms = [Alarms(t, replays=replays) for t in (train, replace(train, mismatch_stop=None))]
    for line in lines:
        for alarm in alarms:
            alarm.update(line)
    ended = "mismatched" if alarms[1].halt is None and alarms[0].halt is not None else "halted"
    return {"ended": ended, "halt": alarms[0].halt or "not known"}


def guard_facts(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a run's guards caught and cost, means over its steps; {} without one."""
    known = {key: [s[key] for s in steps if s.get(key) is not None] for key in GUARD}
    return {key: fmean(values) for key, values in known.items() if values}


def _lasting(words: Sequence[str]) -> list[str]:
    return [word for word in words if not word.startswith(("--run.dir=", "--eval.data="))]


def _read_through(record: Record) -> None:
    """Take every number that the table takes, so that a damaged record is found with its file."""
    # A run that diverged has no `after`.
    ends = [when for when in ("before", "after") if record[when] is not None]
    modes = [{*record[when]} - {"step"} for when in ends]
    if ends[0] != "before" or not modes[0] or modes[0] != modes[-1]:
        raise TypeError(f"got answers {[*map(sorted, modes)]}, expected the same at both ends")
    numbers = [record["lr"], record["seed"], record["tokens_generated"]]
    for when in ends:
        for mode in modes[0]:
            for half in ("select", "test"):
                numbers += part(record, when, mode, half).values()
    wrong = next((n for n in numbers if type(n) not in (int, float)), None)
    if wrong is not None:
        raise TypeError(f"got {wrong!r:.40}, expected numbers")
    if not isinstance(record.get("inputs", {}), dict):
        raise TypeError(f"got inputs {record['inputs']!r:.40}, expected names and fingerprints")


def _require_inputs(path: Path, known: dict[str, str], cell: Cell) -> None:
    """SweepError where a run has read something else than it would read now."""
    if (name := changed(known, cell.inputs)) is not None:
        raise SweepError(
            f"{path} is of other inputs: {name} has changed since; bring it back, remove {path} to "
            "run it anew, or give the sweep another folder"
        )


def _goes_on(run: Path, cell: Cell) -> bool:
    """Whether a run has begun, with the keys of this cell."""
    try:
        # By meaning, run.dir aside: what an older version has begun is not begun anew.
        pair = (meaning(as_dict(c)) for c in (load(run / "config.yaml", record=True), cell.cfg))
        return not changes(*map(resolve, pair))
    except ConfigError:
        return False


@contextmanager
def claimed(out: Path, say: Callable[[str], None]) -> Iterator[IO[str]]:
    """Keep other sweeps out of a folder; wait for the runs that a killed one has left behind.

    Yields the lock that runs inherit: a flock, which lasts until the last of them has ended.
    """
    with ExitStack() as undo:
        try:
            out.mkdir(parents=True, exist_ok=True)
            mine, theirs = (undo.enter_context((out / f).open("a+")) for f in (".sweep", ".runs"))
        except OSError as error:
            raise SweepError(
                f"--out: cannot write the folder {out} ({error.strerror}); give another"
            ) from error
        try:
            # A lock of this process alone: what it starts inherits a flock, and no lockf.
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SweepError(
                f"another process runs the sweep in {out}; wait for it, or give another --out"
            ) from error
        try:
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"{out}: waiting for the runs of a sweep that was killed; they save and end")
            fcntl.flock(theirs, fcntl.LOCK_EX)
        yield theirs


def cores() -> int:
    """Count the cores that this process may use."""
    # A container or taskset may give fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

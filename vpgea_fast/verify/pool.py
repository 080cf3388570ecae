r"""Judgements in worker processes that can be killed.

A short text can keep sympy busy for hours (`9^{9^{9}}`) inside one C call, where math-verify's own
time limit (SIGALRM, main thread only) does not reach. So a worker judges one answer at a time, and
one that misses its deadline is killed and replaced; its answer counts as wrong.

A deadline is of processor time: on a busy machine a right answer would else be wrong, by chance.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vpgea_fast.config import ConfigError, VerifyConfig
from vpgea_fast.verify.verdicts import Verdicts

if TYPE_CHECKING:
    from vpgea_fast.distributed import World

Job = tuple[str, str]
"""(gold, text to verify)"""

Outcome = Literal["right", "wrong", "late", "dead"] | tuple[Literal["raised", "returned"], str]
"""What became of a job. A custom function that raised or returned no bool: what exactly."""

Progress = Callable[[int], None]

CHECKERS = Path(__file__).with_name("checkers.py")
START_S = 120.0  # the import takes 0.7 s from a warm cache; a cold network disk may need a minute
CLOCK_LIMITS = 20.0  # time limits by the clock after which a worker that hardly runs is late
ORPHAN_S = 1.0  # how long after its deadline a busy worker ends when no parent is left to kill it
CACHED_JOBS = 1 << 14
PLAIN = re.compile(r"0|-?[1-9][0-9]{0,14}")
"""Golds that `math` and `number` accept in a box without a look: plain integers (tested)."""


class Verifier:
    r"""A pool of workers with one checker; they start in the background at construction.

    `name` and `target` are those of the configuration's section `verify`; checkers.py says what
    each checker accepts. ConfigError for a custom target that a worker cannot use.

    `timeouts` counts the answers whose worker was killed at its deadline; `crashes` those on which
    two workers died by themselves; `errors` those on which a custom function raised, which warns
    once. All count as wrong. The last 16,384 verdicts are kept, so a text that comes again costs
    nothing. Not for several threads at once. With a `world` every process judges its share and gets
    all verdicts, which hang on a clock and so could differ: `verify` and `accepts_itself` are then
    collectives. `on_progress` hears how many more of this process's share are done.

    >>> with Verifier() as verifier:
    ...     verifier.verify([("1/2", r"So it is \boxed{0.5}."), ("7", r"It is \boxed{8}.")])
    [True, False]
    """

    def __init__(
        self,
        workers: int = 1,
        timeout_s: float = 5.0,
        world: World | None = None,
        *,
        name: str = "math",
        target: str | None = None,
    ) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"got workers={workers}, timeout_s={timeout_s}; expected at least one worker and a "
                "positive time limit: set verify.workers and verify.timeout_s"
            )
        self.timeouts = self.crashes = self.errors = 0
        self._silent = True
        self._name, self._target, self._world = name, target, world
        self._memory: dict[Job, bool | str] = {}
        self._unsure: set[Job] = set()  # judged by a deadline or a crash: another day may differ
        # A custom function may wait for a server, which takes no processor time.
        settings: dict[str, Any] = {
            "name": name,
            "target": target,
            "limit_s": timeout_s + ORPHAN_S,
            "by_clock": name == "custom",
        }
        if name == "custom":
            # The worker starts with -P and sees no working directory of its own.
            settings["path"] = [*sys.path, str(Path.cwd())]
        self._workers = [_Worker(timeout_s, settings) for _ in range(workers)]
        if name == "custom":
            try:
                # One worker tells for all, before any model is loaded.
                self._workers[0].wait_until_up()
            except BaseException:
                self.close()
                raise

    @property
    def unjudged(self) -> int:
        """Count the answers that are wrong because nothing judged them in time."""
        return self.timeouts + self.crashes

    def summed(self, count: int) -> int:
        """Add up a count of all processes that judge. A collective where `verify` is one."""
        return count if self._world is None else sum(self._world.gather(count))

    @classmethod
    def configured(cls, cfg: VerifyConfig, world: World | None = None) -> Verifier:
        return cls(world=world, **asdict(cfg))

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def verify(
        self, pairs: Iterable[tuple[str, str]], on_progress: Progress | None = None
    ) -> list[bool]:
        r"""Whether each text states its gold answer. The gold answer stands FIRST in a pair.

        A text is what was decoded after the thought. Its last \boxed{} is the answer; without one,
        see the checker. The order matters: for `math` the gold `1<x<2` accepts the interval
        `(1,2)`, but the gold `(1,2)` does not accept `1<x<2`. ConfigError where a custom function
        returns something else than a bool.
        """
        return self._spread(lambda jobs: self._judge(jobs, on_progress or _silent), list(pairs))

    def accepts_itself(
        self, golds: Iterable[str], on_progress: Progress | None = None
    ) -> list[bool]:
        r"""Whether each gold answer would be right as \boxed{gold}: else no path ever could be.

        Judged as paths are. Verdicts are kept on disk (verdicts.py), except those of custom
        functions and those that a deadline or a dead worker made.
        """
        return self._spread(lambda some: self._accept(some, on_progress or _silent), list(golds))

    def _spread(self, work: Callable[[Sequence[Any]], list[bool | str]], items: list) -> list[bool]:
        verdicts = work(items) if self._world is None else self._world.spread(work, items)
        for verdict in verdicts:
            # As a verdict, since one process with an exception would leave the others waiting.
            if isinstance(verdict, str):
                raise ConfigError(f"verify.target {self._target!r}: {verdict}")
        return [verdict is True for verdict in verdicts]

    def _accept(self, golds: Sequence[str], on_progress: Progress) -> list[bool | str]:
        # A user's function may change between runs; nothing here would notice.
        kept = None if self._name == "custom" else Verdicts(self._name, CHECKERS)
        known: dict[str, bool | str] = {} if kept is None else dict(kept.known)
        if self._name in ("math", "number"):
            # Most golds of GSM8K and AIME: no worker has to be asked.
            known |= {gold: True for gold in golds if PLAIN.fullmatch(gold)}
        jobs = [(gold, rf"\boxed{{{gold}}}") for gold in golds if gold not in known]
        on_progress(len(golds) - len(jobs))
        outcomes = dict(zip(jobs, self._judge(jobs, on_progress), strict=True))
        if kept is not None:
            kept.add({job[0]: bool(outcomes[job]) for job in outcomes if job not in self._unsure})
        known |= {gold: verdict for (gold, _), verdict in outcomes.items()}
        return [known[gold] for gold in golds]

    def _judge(self, jobs: Sequence[Job], on_progress: Progress) -> list[bool | str]:
        if not self._workers:
            raise ValueError("this Verifier is closed; make a new one")
        # Short answers repeat within a group: each pair is judged once.
        times = Counter(jobs)
        verdicts = {job: self._memory.pop(job) for job in times if job in self._memory}
        on_progress(sum(times[job] for job in verdicts))
        for job, verdict in self._run([job for job in times if job not in verdicts]):
            verdicts[job] = verdict
            on_progress(times[job])
        self._memory |= verdicts
        # Insertion order: a verdict that was used again was popped and stands at the end.
        for job in list(self._memory)[:-CACHED_JOBS]:
            del self._memory[job]
        return [verdicts[job] for job in jobs]

    def _run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, bool | str]]:
        """Give every free worker one job at a time until each job has its verdict."""
        waiting, retried, left = deque(jobs), set(), len(jobs)
        while left:
            for worker in self._workers:
                if waiting and worker.job is None:
                    worker.take(waiting.popleft())
            for job, outcome in self._outcomes():
                if outcome == "dead" and job not in retried:
                    # It may have died earlier, while idle, for no fault of this job.
                    retried.add(job)
                    waiting.append(job)
                    continue
                left -= 1
                yield job, self._verdict(job, outcome)

    def _verdict(self, job: Job, outcome: Outcome) -> bool | str:
        """True, False, or in words why a custom function's word is none."""
        self.timeouts += outcome == "late"
        self.crashes += outcome == "dead"
        if outcome in ("late", "dead"):
            self._unsure.add(job)
            if self._name == "custom":  # with math-verify it is an answer's fault, and expected
                took = (
                    "took longer than verify.timeout_s"
                    if outcome == "late"
                    else "ended its process"
                )
                self._say_once(took, job)
        if not isinstance(outcome, tuple):
            return outcome == "right"
        kind, what = outcome
        if kind == "returned":
            return f"got {what} for the gold answer {job[0]!r}; expected True or False: use bool()"
        self.errors += 1
        self._say_once(f"raised {what}", job)
        return False

    def _say_once(self, what: str, job: Job) -> None:
        if self._silent:
            self._silent = False
            warnings.warn(
                f"verify.target {self._target!r} {what} for the gold answer {job[0]!r}; "
                "such answers count as wrong (said once)",
                stacklevel=3,
            )

    def _outcomes(self) -> list[tuple[Job, Outcome]]:
        """Sleep until a worker has something to say or is late; what became of which jobs."""
        busy = [worker for worker in self._workers if worker.job is not None]
        # Until the first deadline: a worker that hangs must not delay another's verdict.
        patience = min(worker.deadline for worker in busy) - time.monotonic()
        wait([worker.pipe for worker in busy], timeout=max(0.0, patience))
        outcomes: list[tuple[Job, Outcome]] = []
        for worker in busy:
            job = worker.job
            outcome = worker.poll()
            if job is not None and outcome is not None:
                outcomes.append((job, outcome))
        return outcomes


class _Worker:
    """A child process, the pipe to it, and the one job it has (with its deadline) or None."""

    job: Job | None
    pipe: Connection
    deadline: float
    _spent: float | None

    def __init__(self, timeout_s: float, settings: dict[str, Any]) -> None:
        self._timeout_s, self._settings = timeout_s, settings
        self._start()

    def _start(self) -> None:
        self.job = None
        self._up, self._began, self._spent = False, 0.0, None
        self.pipe, theirs = Pipe()
        fd = theirs.fileno()
        # A fresh program and no fork: a forked child would hold torch's memory and threads.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(CHECKERS), str(fd), json.dumps(self._settings)],
            # No standard stream carries the pipe: what a library prints would be read as a verdict.
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the LaTeX parser prints every syntax error
        )
        theirs.close()

    def kill(self) -> None:
        self.pipe.close()
        self._process.kill()
        self._process.wait()

    def take(self, job: Job) -> None:
        self.job = job
        self._begin(0.0 if self._up else START_S)  # the import does not count
        with suppress(OSError):  # a worker that died while idle: poll() finds it dead
            self.pipe.send(job)

    def poll(self) -> Outcome | None:
        """What became of the job; None while the worker is at it."""
        # A verdict that is there counts even when its deadline has passed meanwhile.
        if not self.pipe.poll():
            return self._replace("late") if self._is_late() else None
        try:
            word = self.pipe.recv()
        except (EOFError, OSError):
            return self._replace("dead")
        # Now the clock of the first job starts.
        if word == "up":
            self._up = True
            self._begin(0.0)
            return None
        if word[0] == "unusable":
            raise ConfigError(
                f"verify.target {self._settings['target']!r}: {word[1]}; expected "
                "package.module:function, a function of (gold, text) that returns True or False"
            )
        self.job = None
        return word

    def _begin(self, more_s: float) -> None:
        """Set the clock of a job."""
        self._began, self._spent = time.monotonic(), _processor_seconds(self._process.pid)
        self.deadline = self._began + self._timeout_s + more_s

    def _is_late(self) -> bool:
        """Tell whether the time of the job is over; one that had to wait for a processor gets what
        it lacks."""
        now, begun, spent = time.monotonic(), self._spent, _processor_seconds(self._process.pid)
        if now < self.deadline:
            return False
        clock = self._settings["by_clock"] or not self._up
        if clock or now >= self._began + CLOCK_LIMITS * self._timeout_s:
            return True
        if begun is None or spent is None:
            return True
        lacking = self._timeout_s - (spent - begun)
        self.deadline = now + lacking
        return lacking <= 0

    def wait_until_up(self) -> None:
        """Wait until the worker has its checker; ConfigError if it cannot use a custom one."""
        self.deadline = time.monotonic() + START_S
        while not self._up:
            wait([self.pipe], timeout=max(0.0, self.deadline - time.monotonic()))
            self.poll()

    def _replace(self, outcome: Outcome) -> Outcome:
        self.kill()
        # It never came up: another start would end alike, for ever.
        if not self._up:
            if self._settings["name"] == "custom":
                raise ConfigError(
                    f"verify.target {self._settings['target']!r}: a worker "
                    + ("died" if outcome == "dead" else f"was still busy after {START_S:.0f} s")
                    + " while it imported this; see what the import does"
                )
            raise RuntimeError(
                "a verifier worker did not come up; see what "
                f"`{sys.executable} -c 'import math_verify'` says, and install "
                "math-verify[antlr4_13_2] if it is missing"
            )
        self._start()
        return outcome


def _silent(_: int) -> None:
    pass


def _processor_seconds(process: int) -> float | None:
    """Seconds that a process has computed; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    # A process's clock by Linux's numbering, clock_getcpuclockid(3). Gone: its pipe will say so.
    with suppress(OSError):
        return time.clock_gettime((~process << 3) | 2)
    return None

r"""Do two answers mean the same? math-verify, in worker processes that can be killed.

A short text can keep sympy busy for hours (`9^{9^{9}}`) inside one C call, where math-verify's own
time limit (SIGALRM, main thread only) does not reach. So a worker judges one answer at a time, and
one that misses its deadline is killed and replaced; its answer counts as wrong.

This file is also the worker's program (`python -P verify.py FD TIMEOUT`). It imports no sibling and
no torch, so that a worker is up in about a second.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a worker imports this file, and needs no torch
    from vpgea_fast.distributed import World

Job = tuple[str, str | None]
"""(gold, text to verify), or (gold, None): can the gold answer be parsed at all?"""

Outcome = Literal["right", "wrong", "late", "dead"]
Progress = Callable[[int], None]

START_S = 120.0  # the import takes 0.7 s from a warm cache; a cold network disk may need a minute
ORPHAN_S = 1.0  # how long after its deadline a busy worker ends when no parent is left to kill it
CACHED_JOBS = 1 << 14


class Verifier:
    r"""A pool of math-verify workers; they start in the background at construction.

    `timeouts` counts the answers whose worker was killed at its deadline; `crashes` those on which
    two workers died by themselves. Both count as wrong. The last 16,384 verdicts are kept, so a
    text that comes again costs nothing. Not for several threads at once. With a `world` every
    process judges its share and gets all verdicts, which hang on a clock and so could differ:
    `verify` and `parseable` are then collectives.

    >>> with Verifier() as verifier:
    ...     verifier.verify([("1/2", r"So it is \boxed{0.5}."), ("7", r"It is \boxed{8}.")])
    [True, False]
    """

    def __init__(
        self, workers: int = 1, timeout_s: float = 5.0, world: World | None = None
    ) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"got workers={workers}, timeout_s={timeout_s}; expected at least one worker and a "
                "positive time limit: set verify.workers and verify.timeout_s"
            )
        self.timeouts = 0
        self.crashes = 0
        self._world = world
        self._cache: dict[Job, bool] = {}
        self._workers = [_Worker(timeout_s) for _ in range(workers)]

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def verify(self, pairs: Iterable[tuple[str, str]]) -> list[bool]:
        r"""Whether each text states its gold answer. The gold answer stands FIRST in a pair.

        A text is what was decoded after the thought. Its last \boxed{} is the answer (together with
        boxes close before it); without one, its last formula or number. The order matters: the gold
        `1<x<2` accepts the interval `(1,2)`, but the gold `(1,2)` does not accept `1<x<2`.
        """
        return self._judge(list(pairs))

    def parseable(self, golds: Iterable[str], on_progress: Progress | None = None) -> list[bool]:
        """Whether math-verify can make a mathematical object of each gold answer. `on_progress`
        hears how many more this process has judged."""
        return self._judge([(gold, None) for gold in golds], on_progress)

    def _judge(self, jobs: Sequence[Job], on_progress: Progress | None = None) -> list[bool]:
        def judge(share: Sequence[Job]) -> list[bool]:
            return self._judge_own(share, on_progress)

        return judge(jobs) if self._world is None else self._world.spread(judge, jobs)

    def _judge_own(self, jobs: Sequence[Job], on_progress: Progress | None) -> list[bool]:
        if not self._workers:
            raise ValueError("this Verifier is closed; make a new one")
        distinct = dict.fromkeys(jobs)
        verdicts = {job: self._cache.pop(job) for job in distinct if job in self._cache}
        verdicts |= self._run([job for job in distinct if job not in verdicts], on_progress)
        self._cache |= verdicts
        for job in list(self._cache)[:-CACHED_JOBS]:
            del self._cache[job]
        return [verdicts[job] for job in jobs]

    def _run(self, jobs: Sequence[Job], on_progress: Progress | None) -> dict[Job, bool]:
        """Give every free worker one job at a time until each job has its verdict."""
        waiting, verdicts, retried = deque(jobs), {}, set()
        while len(verdicts) < len(jobs):
            for worker in self._workers:
                if waiting and worker.job is None:
                    worker.take(waiting.popleft())
            for job, outcome in self._outcomes():
                if outcome == "dead" and job not in retried:
                    # It may have died earlier, while idle, for no fault of this job.
                    retried.add(job)
                    waiting.append(job)
                    continue
                self.timeouts += outcome == "late"
                self.crashes += outcome == "dead"
                verdicts[job] = outcome == "right"
                if on_progress is not None:
                    on_progress(1)
        return verdicts

    def _outcomes(self) -> list[tuple[Job, Outcome]]:
        """Sleep until a worker has something to say or is late; what became of which jobs."""
        busy = [worker for worker in self._workers if worker.job is not None]
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

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._start()

    def _start(self) -> None:
        self.job = None
        self._up = False
        self.pipe, theirs = Pipe()
        fd = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(fd), str(self._timeout_s + ORPHAN_S)],
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
        self.deadline = time.monotonic() + self._timeout_s + (0.0 if self._up else START_S)
        with suppress(OSError):  # a worker that died while idle: poll() finds it dead
            self.pipe.send(job)

    def poll(self) -> Outcome | None:
        """What became of the job; None while the worker is at it."""
        if not self.pipe.poll():
            return self._replace("late") if time.monotonic() >= self.deadline else None
        try:
            word = self.pipe.recv()
        except (EOFError, OSError):
            return self._replace("dead")
        if word == "up":
            self._up = True
            self.deadline = time.monotonic() + self._timeout_s
            return None
        self.job = None
        return word

    def _replace(self, outcome: Outcome) -> Outcome:
        self.kill()
        if not self._up:
            raise RuntimeError(
                "a verifier worker did not come up; see what "
                f"`{sys.executable} -c 'import math_verify'` says, and install "
                "math-verify[antlr4_13_2] if it is missing"
            )
        self._start()
        return outcome


def _serve(pipe: Connection, limit_s: float) -> None:
    """The worker: judge jobs from the pipe until it ends, that is, until the parent is gone."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides
        signal.signal(signum, signal.SIG_IGN)
    # The default action of SIGALRM ends the process even inside a C call: for a worker whose parent
    # was killed while it was busy.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    judge = _make_judge()
    pipe.send("up")
    with suppress(EOFError, OSError):
        while True:
            gold, text = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            verdict = judge(gold, text)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            pipe.send("right" if verdict else "wrong")


def _make_judge() -> Callable[[str, str | None], bool]:
    """math-verify with our settings: strict LaTeX in predictions, forgiving in gold answers."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    strict = NormalizationConfig(
        basic_latex=True,
        units=True,
        malformed_operators=False,
        nits=False,
        boxed="all",
        equations=False,
    )
    of_text = [
        LatexExtractionConfig(boxed_match_priority=0, normalization_config=strict),
        ExprExtractionConfig(),
    ]
    of_gold = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    @lru_cache(maxsize=1024)  # G + N texts of a step share one gold answer; a parse takes 1-70 ms
    def parse_gold(gold: str) -> list:
        return parse(rf"\boxed{{{gold}}}", extraction_config=of_gold, parsing_timeout=0)

    def judge(gold: str, text: str | None) -> bool:
        meaning = parse_gold(gold)
        if text is None:
            return any(not isinstance(value, str) for value in meaning)
        prediction = parse(text, extraction_config=of_text, parsing_timeout=0)
        return verify(meaning, prediction, timeout_seconds=0)

    return judge


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), float(sys.argv[2]))

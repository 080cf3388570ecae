"""How a Python program listens to a run, and stops it: see `vpgea_fast.trainer.fit`."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpgea_fast.config import Config
from vpgea_fast.distributed import World


class Ending(enum.IntEnum):
    """How a run ended; only DONE is true."""

    STOPPED = 0
    """Ended by a signal, its time limit or a callback: saved, and can go on."""
    DONE = 1
    HALTED = 2
    """It learnt nothing more, or wrongly: saved, evaluated, exported. See `Alarms.halt`."""

    def __bool__(self) -> bool:
        # By default every member but 0 would be true, HALTED too.
        return self is Ending.DONE


class StopTraining(Exception):  # noqa: N818 - not an error: the run can go on later
    """Raise it in a callback to end the run cleanly: the step is finished and saved.

    `fit` then returns `Ending.STOPPED` on every process.
    """


@dataclass(frozen=True)
class Run:
    """What a callback learns of the run at its start: no weights, so that none outlive it."""

    cfg: Config
    path: Path
    """The run directory: config.yaml, metrics.jsonl, paths.jsonl, checkpoints/."""
    step: int
    """Steps that were done before this process began: 0 except in a resumed run."""
    rank: int
    processes: int

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files and speaks."""
        return self.rank == 0


class Callback:
    """What a Python program hears of a run. Override what you need; the rest does nothing.

    Every hook is called on every process, in the order of `fit`'s list, so give each process the
    same callbacks; write files where `run.main`. Raise `StopTraining` to end the run cleanly. Any
    other exception ends it on every process: there as it was raised, RemoteError elsewhere. The
    last checkpoint stays, and `resume=True` goes on from it.
    """

    def on_start(self, run: Run) -> None:
        """Before the first evaluation and the first step of this process."""

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """After a step: its line of metrics.jsonl, with "step" from 1. A save that was due is made
        or on its way. Times and rates are this process's, all else is equal everywhere."""

    def on_evaluation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """After an evaluation of the weights of `step`: the result of `Evaluator.run`."""

    def on_end(self, ending: Ending) -> None:
        """After the last save and the report; not after an exception. A `StopTraining` raised here
        comes too late and means nothing."""


def check(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Refuse what is no instance of a Callback, for example a class, with a ValueError."""
    # Text is a sequence too, and is refused by its first letter.
    if not isinstance(callbacks, Sequence):
        raise ValueError(
            f"callbacks: got {callbacks!r:.80}, expected a list of them; write callbacks=[Mine()]"
        )
    # Before any weight is loaded: a class has every hook too, and would fail when one is called.
    for number, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            # 80 characters: the repr of what holds a model or data fills a screen.
            raise ValueError(
                f"callbacks[{number}]: got {callback!r:.80}, expected an instance of a class "
                "derived from vpgea_fast.Callback; write class Mine(Callback) and give Mine()"
            )
    return tuple(callbacks)


def tell(callbacks: Sequence[Callback], world: World, hook: str, *args: object) -> bool:
    """Call `hook` of all `callbacks`; return whether one of them, in this process, asks for a stop.

    A collective where there are any: one gather, so that a failure of one process ends all.
    """
    stop = False
    # The same on all processes, which have as many callbacks: none waits for a gather alone.
    if not callbacks:
        return stop
    # No collective inside: a callback that failed on one process would leave the others waiting.
    with world.together():
        for callback in callbacks:
            # Caught for each: the callbacks after it hear of the step too, and no process fails.
            try:
                getattr(callback, hook)(*args)
            except StopTraining:
                stop = True
    return stop

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
    """By a signal, its time or a callback: saved, and can go on."""
    DONE = 1
    HALTED = 2
    """Because it learnt nothing more, or wrong: saved, evaluated, exported. See `Alarms.halt`."""

    def __bool__(self) -> bool:
        # `if fit(cfg):` asks whether the model is the one that was asked for.
        return self is Ending.DONE


class StopTraining(Exception):  # noqa: N818 - not an error: the run can go on later
    """Raise it in a callback to end the run cleanly: the step is finished and saved, and `fit`
    returns `Ending.STOPPED` on every process."""


@dataclass(frozen=True)
class Run:
    """What a callback is told of the run at its start: no weights, so that none outlive it."""

    cfg: Config
    path: Path
    """The run directory: config.yaml, metrics.jsonl, paths.jsonl, checkpoints/."""
    step: int
    """Steps made before this process began: 0 but for a resumed run."""
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
        """After the last save and the report; not after an exception. A `StopTraining` of it comes
        too late and means nothing."""


def check(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """ValueError for what is no instance of a Callback, a class for example."""
    # Before anything is read: a class in place of an instance would fail at its first hook.
    for number, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks[{number}]: got {callback!r:.80}, expected an instance of a class "
                "derived from vpgea_fast.trainer.Callback; write class Mine(Callback) and give "
                "Mine()"
            )
    return tuple(callbacks)


def tell(callbacks: Sequence[Callback], world: World, hook: str, *args: object) -> bool:
    """Call `hook` of all `callbacks`; whether one of them, here, asks for a stop.

    A collective where there are any: one gather, so that a failure of one process ends all.
    """
    asked = False
    # The common case costs no collective.
    if not callbacks:
        return asked
    with world.together():
        for callback in callbacks:
            try:
                getattr(callback, hook)(*args)
            # The callbacks after it are called all the same: they may write what they have.
            except StopTraining:
                asked = True
    return asked

"""What is due between the steps of a run: an evaluation, a save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from vpgea_fast.config import Config
from vpgea_fast.distributed import World
from vpgea_fast.measure import evaluation_metrics
from vpgea_fast.run_dir import RunDir
from vpgea_fast.run_state import RunState
from vpgea_fast.stop import Stop

Results = Mapping[str, Mapping[str, Any]]
"""What an evaluation returns: mode -> measure -> value."""


class Evaluations:
    """Evaluates a run before it, after it, and every eval.every steps. Its methods are collectives.

    samples  answers that an evaluation draws; 0: the run has no benchmark
    ask      gives the results of the weights as they are, which are those of a step
    tell     calls the callbacks' hook of this name with what follows it
    say      shows a line
    """

    def __init__(
        self,
        cfg: Config,
        *,
        state: RunState,
        run: RunDir,
        stop: Stop,
        samples: int,
        ask: Callable[[int], Results],
        tell: Callable[..., object],
        say: Callable[[str], object],
    ) -> None:
        self.cfg, self.state, self.run, self.stop = cfg, state, run, stop
        self.samples, self.ask, self.tell, self.say = samples, ask, tell, say

    def once(self, when: str) -> None:
        """Evaluate "before" or "after" training, into eval.json; a resumed run keeps what is
        there."""
        known, state = self.run.evaluations(), self.state
        # Before training they are the base's weights, also where a resumed run looks again.
        step = 0 if when == "before" else state.step
        if not self.samples or known.get(when, {}).get("step") == step:
            return
        # The weights between two updates are those of no step.
        if step != state.step or state.rollout is not None:
            self.say(
                "no evaluation before training: it was not asked for when the run began, or "
                f"{self.run.path / 'eval.json'} was removed"
            )
            return
        self.say(f"evaluating {when} training: {self.samples} answers")
        results = self._count(step)
        # A run that is left here has no result yet, and its resume asks again.
        self.stop.together()
        self.run.write_evaluations({**known, when: {**results, "step": step}})
        self.tell("on_evaluation", step, results)

    def scheduled(self) -> dict[str, float]:
        """Evaluate before the step, so that a stop here loses nothing; keys of its metrics."""
        every, step = self.cfg.eval.every, self.state.step
        # The weights of step 0 are those of `once`.
        if not (every and self.samples) or not step or step % every:
            return {}
        results = self._count(step)
        self.tell("on_evaluation", step, results)
        return evaluation_metrics(step, results)

    def _count(self, step: int) -> Results:
        """Ask, and keep what a best step is chosen by."""
        results, best = self.ask(step), self.cfg.checkpoint.keep_best
        if best is not None:
            # As sampled_eps3: how answers were drawn, and a measure of them.
            mode, _, key = best.partition("_")
            self.state.worth[step] = results[mode][key]
        return results


class Saves:
    """Whether a save is due. `reset` at each; the start of a run counts as one."""

    def __init__(self, cfg: Config, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.reset()

    def reset(self) -> None:
        """Count the minutes from now on."""
        self.at = time.monotonic()

    def due(self, step: int) -> bool:
        """By steps, by the main process's clock, or because the step will be evaluated. A
        collective."""
        cfg = self.cfg.checkpoint
        # Only a step that was saved can be the best one.
        if cfg.keep_best and step % self.cfg.eval.every == 0:
            return True
        return step % cfg.save_every == 0 or self.late()

    def late(self) -> bool:
        """Whether the last save is checkpoint.save_minutes ago, by the main process's clock. A
        collective."""
        minutes = self.cfg.checkpoint.save_minutes
        late = minutes and time.monotonic() - self.at > 60 * minutes
        # A save is a collective, and clocks differ: one process decides for all.
        return self.world.gather(bool(late))[0]

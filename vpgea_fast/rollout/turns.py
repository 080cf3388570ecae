"""Whose weights the engine has: outside a turn of another model those of the policy.

    with turns.lent() as hand_over:
        hand_over("posterior", model)      # all weights, probed where that is due
        engine.generate(...)
    # the policy's again

A whole module that is trained samples by itself: then the engine changes modules, and nothing is
copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vpgea_fast.distributed import full_weights
from vpgea_fast.names import Who
from vpgea_fast.rollout.engine import RolloutEngine, RolloutError, Usage
from vpgea_fast.rollout.hf import HFEngine

HandOver = Callable[[Who, Any], object]
"""(who, model): gives the engine all weights of a model that holds a `causal_lm`."""


class Turns:
    """Gives the engine the weights of one model after the other; every use is a collective.

    policy   whose weights it has outside a turn
    whole    the engine is an `HFEngine` of the trained module itself
    probe    checks that the engine samples with the weights of a trained policy
    every    steps between two probes of a policy after its first; 0: no more
    holds    whose weights the engine was given last
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Any,
        *,
        whole: bool,
        probe: Callable[[Any], dict[str, float]],
        every: int,
    ) -> None:
        self.engine, self.policy, self.whole = engine, policy, whole
        self.probe, self.every = probe, every
        self.holds: Who = "policy"
        self.probed: set[Who] = set()
        self.used = Usage()

    def due(self, who: Who, step: int) -> bool:
        """Whether a policy is probed in this step: at its first hand-over, then on schedule."""
        return who not in self.probed or bool(self.every and (step + 1) % self.every == 0)

    def give(self, who: Who = "policy", model: Any = None, *, check: bool) -> dict[str, float]:
        """Give the engine the weights of a model, by default the policy's; with `check` see that it
        has them, and return what that measured. RolloutError otherwise."""
        model = self.policy if model is None else model
        if self.whole:
            assert isinstance(self.engine, HFEngine)
            # Nothing is copied: it samples with the module that is trained.
            self.engine.sample_with(model.causal_lm)
        else:
            self.engine.load_weights(full_weights(model))
        self.holds = who
        if not check:
            return {}
        # A probe starts the counts anew, also in the middle of a step.
        self._count()
        self.probed.add(who)
        return self.probe(who)

    @contextmanager
    def lent(self, *, check: bool = False) -> Iterator[HandOver]:
        """Lend the engine to other models: the block hands their weights over, and those of the
        policy come back at its end. With `check` each trained policy is probed."""

        def hand_over(who: Who, model: Any) -> None:
            # Nothing scores what a frozen model draws.
            self.give(who, model, check=check and who != "reference")

        try:
            yield hand_over
        except BaseException:
            # A collective after an error would wait for processes that have left; a module is free.
            if self.whole:
                self.give(check=False)
            raise
        self.give(check=check and not self.whole)

    def require(self, who: Who = "policy") -> None:
        """RolloutError where the engine does not hold the weights of `who`."""
        if self.holds != who:
            raise RolloutError(
                f"the engine holds the weights of the {self.holds}, expected those of the "
                f"{who}; the last checkpoint is good: go on with --resume"
            )

    def usage(self) -> Usage:
        """What the engine has counted since the last call, probes left out."""
        self._count()
        used, self.used = self.used, Usage()
        return used

    def _count(self) -> None:
        now, before = self.engine.usage(), self.used
        self.used = Usage(
            prompt_tokens=before.prompt_tokens + now.prompt_tokens,
            cached_tokens=before.cached_tokens + now.cached_tokens,
            # Of the last rest, and a look after it says 0.
            freed_bytes=now.freed_bytes or before.freed_bytes,
        )

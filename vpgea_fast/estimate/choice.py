"""What keys that are null become where memory decides: once, at the start of a run or a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from vpgea_fast.config import Config
from vpgea_fast.estimate.layout import ModelShape
from vpgea_fast.estimate.memory import GIB, RESERVE, estimate_memory

Grade = Literal["none", "selective", "full"]
Sums = Literal["sharded", "unsharded"]


@dataclass(frozen=True)
class Choice:
    """Values of model.activation_checkpointing and parallel.accumulate, and why; "" where neither
    was chosen by memory."""

    grade: Grade
    accumulate: Sums
    reason: str = ""

    def made(self, cfg: Config) -> Config:
        """Return `cfg` with these values."""
        return replace(
            cfg,
            model=replace(cfg.model, activation_checkpointing=self.grade),
            parallel=replace(cfg.parallel, accumulate=self.accumulate),
        )


def choose(
    shape: Callable[[], ModelShape],
    cfg: Config,
    *,
    world: int,
    cuda: bool,
    context: int,
    prompt: int,
    device_bytes: int,
) -> Choice:
    """Choose the values of keys that are null; the other arguments are those of `estimate_memory`.

    On CUDA the fastest whose estimated peak leaves RESERVE of the device, else the smallest: first
    what a layer keeps for its backward (a tenth of the training time, by arithmetic), then whole
    gradients in place of a reduction per micro-batch (2 to 3 %). On a CPU the smallest, whatever it
    has. `shape` is asked only where memory decides.
    """
    sharded = cfg.parallel.sharded(world)
    choices = _choices(cfg, sharded=sharded)
    # One that is set has a single value in every choice.
    grades = cfg.model.activation_checkpointing is None
    sums = sharded and cfg.parallel.accumulate is None
    # A CPU shares its memory with all else that runs there: what it has in all says little.
    if not (cuda and (grades or sums) and cfg.objective.draws().trained):
        return choices[-1]
    # Of the card, not of what is free on it: a resumed run must choose the same, or it would add
    # gradients up in another order.
    usable, whole = (1 - RESERVE) * device_bytes, shape()
    # By the whole run's peak, sampling included: what does not fit there never gets to train.
    peaks = [
        estimate_memory(
            whole,
            choice.made(cfg),
            world=world,
            cuda=cuda,
            context=context,
            prompt=prompt,
            device_bytes=device_bytes,
        ).peak
        for choice in choices
    ]
    fits = (pair for pair in zip(choices, peaks, strict=True) if pair[1] <= usable)
    choice, peak = next(fits, (choices[-1], peaks[-1]))
    said = [f"model.activation_checkpointing null: {choice.grade}"] * grades
    said += [f"parallel.accumulate null: {choice.accumulate}"] * sums
    reason = f"{'; '.join(said)} (estimated peak {peak / GIB:.1f} of {usable / GIB:.1f} GiB)"
    return replace(choice, reason=reason)


def settled(cfg: Config, *, world: int, cuda: bool) -> Config:
    """Return `cfg` with the value of each null key that is the same whatever the memory."""
    choices = _choices(cfg, sharded=cfg.parallel.sharded(world))
    if not (cuda and cfg.objective.draws().trained):
        choices = choices[-1:]
    model, parallel = cfg.model, cfg.parallel
    grades, sums = {one.grade for one in choices}, {one.accumulate for one in choices}
    if len(grades) == 1:
        model = replace(model, activation_checkpointing=grades.pop())
    if len(sums) == 1:
        parallel = replace(parallel, accumulate=sums.pop())
    return replace(cfg, model=model, parallel=parallel)


def _choices(cfg: Config, *, sharded: bool) -> list[Choice]:
    """List what may be chosen, the fastest first."""
    grade, sums = cfg.model.activation_checkpointing, cfg.parallel.accumulate
    grades: list[Grade] = ["selective", "full"] if grade is None else [grade]
    if grade is None and cfg.model.compile:  # whose kernels write into what `selective` keeps
        grades = ["full"]
    every: list[Sums] = ["unsharded", "sharded"] if sums is None else [sums]
    if sums is None and not sharded:  # nothing is reduced
        every = ["sharded"]
    elif sums is None and cfg.model.master_dtype == "bfloat16" and cfg.parallel.replicas == 1:
        every = ["unsharded"]  # shards would be summed in bfloat16
    return [Choice(grade, sums) for grade in grades for sums in every]

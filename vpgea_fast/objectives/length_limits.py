"""Length rewards with a limit in tokens, fixed or moved while training; the notation is that of
length_rewards.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from vpgea_fast.objectives.judged import Judged, LengthKeys, Shaped
from vpgea_fast.objectives.unread import Unread
from vpgea_fast.values import STRICT, NonNegativeFloat, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Field(ge=0.0, le=1.0)]
LEVELS = ("hard", "medium", "easy")
"""Levels of difficulty, by the share of a question's paths that are right."""


def _falling(limits: tuple[int, ...]) -> tuple[int, ...]:
    if any(a <= b for a, b in itertools.pairwise(limits)):
        raise ValueError(f"got {list(limits)}, expected limits that fall from stage to stage")
    return limits


@dataclass(frozen=True, config=STRICT)
class ThinkPrune(LengthKeys):
    """R = c 1[n <= limit], the limit lower from stage to stage: ThinkPrune (arXiv 2504.01296). It
    draws no more than `limit` tokens, so that a longer path has no answer; here such a path is
    drawn in full, and earns nothing.

    A stage ends after `steps` steps in which enough right paths would fit the next limit.
    """

    name: Literal["think_prune"] = "think_prune"
    """ThinkPrune."""
    # The paper's stages.
    limits: Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_falling)] = (
        4000,
        3000,
        2000,
    )
    """Limit of each stage, in tokens."""
    steps: PositiveInt = 100
    """Steps of a stage, at least."""
    fitting: Share = 0.0
    """A step counts for its stage only if at least this share of its right paths fits the next
    limit; 0: every step counts."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread("steps", {"limits": lambda limits: len(limits) == 1}),
        Unread("fitting", {"limits": lambda limits: len(limits) == 1}),
    )
    TOKENS: ClassVar[tuple[str, ...]] = ("limits",)

    def shaped(self, judged: Judged, state: Mapping[str, Any], /) -> Shaped:
        # A resume may have fewer stages.
        stage = min(state.get("stage", 0), len(self.limits) - 1)
        steps = state.get("steps", 0)
        length_BN, right_BN = judged.length_BN, judged.right_BN
        limit = self.limits[stage]
        reward_BN = (right_BN & (length_BN <= limit)).double()
        # Of the stage that paid this step; the next one may begin below.
        metrics = {"length_limit": float(limit)}
        if stage + 1 < len(self.limits):
            fits_BN = right_BN & (length_BN <= self.limits[stage + 1])
            # Of no right path none fits: a policy that has lost its way must not be squeezed more.
            fit = bool(right_BN.any()) and int(fits_BN.sum()) >= self.fitting * int(right_BN.sum())
            steps += fit or not self.fitting
            if steps >= self.steps:
                stage, steps = stage + 1, 0
        return Shaped(reward_BN=reward_BN, state={"stage": stage, "steps": steps}, metrics=metrics)


@dataclass(frozen=True, config=STRICT)
class Laser(LengthKeys):
    """R = c + weight 1[c and n <= target]: Laser (arXiv 2505.15612)."""

    name: Literal["laser"] = "laser"
    """Laser."""
    weight: NonNegativeFloat = 0.5
    """Worth of a right path within the target."""
    target: PositiveInt = 4096
    """Target length, in tokens."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("target", {"weight": (0.0,)}),)
    TOKENS: ClassVar[tuple[str, ...]] = ("target",)

    def shaped(self, judged: Judged, _state: Mapping[str, Any], /) -> Shaped:
        short_BN = judged.right_BN & (judged.length_BN <= self.target)
        return Shaped(reward_BN=judged.right_BN.double() + self.weight * short_BN.double())


@dataclass(frozen=True, config=STRICT)
class LaserByDifficulty(LengthKeys):
    """Keys of Laser-D and Laser-DE, and the targets that they keep.

    A question is easy with 2/3 or more of its N paths right, medium with 1/3 or more, else hard.
    Every `every` steps the target of a level becomes the smallest multiple of `grid` which so many
    of its paths fit that `expected` right ones can be hoped for: a share of expected / m, with m =
    floor(2 N / 3), floor(N / 3) and 1 for easy, medium and hard. A level without paths keeps its
    target. The paper measures on questions held out; here, on the paths of the steps since.
    """

    weight: NonNegativeFloat = 0.5
    """Worth of the length reward."""
    target: PositiveInt = 4096
    """Target of every level before the first measurement, in tokens."""
    every: PositiveInt = 20
    """Steps from one measurement to the next."""
    lowest: PositiveInt = 1
    """No measured target is lower. The authors' Laser-D of 4096 tokens has 4096 here, and a grid of
    1024."""
    grid: PositiveInt = 512
    """Targets are multiples of this many tokens."""
    expected: PositiveInt = 1
    """Right paths to be hoped for within the target."""

    UNREAD: ClassVar[tuple[Unread, ...]] = tuple(
        Unread(key, {"weight": (0.0,)}) for key in ("target", "every", "lowest", "grid", "expected")
    )
    TOKENS: ClassVar[tuple[str, ...]] = ("target", "lowest", "grid")

    def check(self, paths: int, /) -> None:
        most = _fewest(paths)["easy"]
        if self.expected > most:
            raise ValueError(
                f"length_reward.expected: got {self.expected}, expected at most {most}, two thirds "
                f"of {paths} paths: no level has more right ones for sure, and every target would "
                "be the longest path"
            )

    def _by_level(
        self, judged: Judged, state: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any], dict[str, float]]:
        """The target of every question (B, 1), the state after this step, and its targets."""
        import torch

        targets = {**dict.fromkeys(LEVELS, self.target), **state.get("targets", {})}
        cells = {level: dict(state.get("cells", {}).get(level, {})) for level in LEVELS}
        steps, right_B = state.get("steps", 0) + 1, judged.right_BN.sum(dim=1).tolist()
        count = judged.right_BN.shape[1]
        # In whole numbers: 2 of 3 is easy, whatever 2/3 is in binary.
        levels = [LEVELS[(3 * r >= count) + (3 * r >= 2 * count)] for r in right_B]
        for level, lengths in zip(levels, judged.length_BN.tolist(), strict=True):
            for length in lengths:
                # The smallest target that the path fits; JSON has text as keys.
                cell = str(math.ceil(length / self.grid) * self.grid)
                cells[level][cell] = cells[level].get(cell, 0) + 1
        now_B1 = torch.tensor([[targets[level]] for level in levels], dtype=torch.float64)
        metrics = {"length_limit": now_B1.mean().item()}
        if steps >= self.every:
            fewest = _fewest(count)
            for level in LEVELS:
                targets[level] = self._chosen(cells[level], fewest[level]) or targets[level]
            # Lengths of earlier weights are not counted again.
            steps, cells = 0, {level: {} for level in LEVELS}
        return now_B1, {"targets": targets, "cells": cells, "steps": steps}, metrics

    def _chosen(self, cells: Mapping[str, int], fewest: int) -> int | None:
        """The smallest target that fits, and is no lower than it may be; the longest path's where
        none fits; None of no paths."""
        total, covered, cell = sum(cells.values()), 0, 0
        for cell in sorted(map(int, cells)):
            covered += cells[str(cell)]
            # covered / total >= expected / m, in whole numbers.
            if covered * fewest >= total * self.expected:
                break
        return max(cell, math.ceil(self.lowest / self.grid) * self.grid) if cell else None


def _fewest(paths: int) -> dict[str, int]:
    """Right paths that a question of each level has at least: m."""
    # At least one: a third of two paths is none.
    return {"hard": 1, "medium": max(1, paths // 3), "easy": max(1, 2 * paths // 3)}


@dataclass(frozen=True, config=STRICT)
class LaserD(LaserByDifficulty):
    """R = c + weight 1[c and n <= target of the question's level]: Laser-D (arXiv 2505.15612).
    Its targets are measured anew while training."""

    name: Literal["laser_d"] = "laser_d"
    """Laser-D."""

    def shaped(self, judged: Judged, state: Mapping[str, Any], /) -> Shaped:
        target_B1, state, metrics = self._by_level(judged, state)
        short_BN = judged.right_BN & (judged.length_BN <= target_B1)
        reward_BN = judged.right_BN.double() + self.weight * short_BN.double()
        return Shaped(reward_BN=reward_BN, state=state, metrics=metrics)


@dataclass(frozen=True, config=STRICT)
class LaserDe(LaserByDifficulty):
    """R = c + weight (1[c and n <= target] + 1[not c, ended, n > target and not in a loop]):
    Laser-DE (arXiv 2505.15612), where a wrong path may think on. A path is in a loop if its last
    `loop` tokens stand in it before; the authors' code counts n-grams."""

    name: Literal["laser_de"] = "laser_de"
    """Laser-DE."""
    loop: PositiveInt = 16
    """Tokens at the end of a path that tell a loop."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (Unread("loop", {"weight": (0.0,)}),)

    def shaped(self, judged: Judged, state: Mapping[str, Any], /) -> Shaped:
        target_B1, state, metrics = self._by_level(judged, state)
        right_BN, long_BN = judged.right_BN, judged.length_BN > target_B1
        # A wrong path may think on, but not in circles and not into the token limit.
        free = [
            not path.truncated and not _loops(path.response_ids.tolist(), self.loop)
            for path in judged.batch.prior.flat
        ]
        free_BN = right_BN.new_tensor(free).view_as(right_BN)
        paid_BN = (right_BN & ~long_BN) | (~right_BN & long_BN & free_BN)
        reward_BN = right_BN.double() + self.weight * paid_BN.double()
        return Shaped(reward_BN=reward_BN, state=state, metrics=metrics)


def _loops(tokens: list[int], size: int) -> bool:
    """The last `size` tokens stand in the path before, overlaps included."""
    # A path of `size` tokens or fewer has no place for them.
    tail = tokens[-size:]
    return any(tokens[i : i + size] == tail for i in range(len(tokens) - size))

"""What each length reward pays, as its paper writes it: one path at a time, in plain numbers.

`right` are the verdicts, `lengths` the tokens of each response, `history` the groups of the steps
before this one: a limit that moves follows from them anew each time.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Group:
    """The paths of one question. `whole`: no token limit cut it. `budget`: what the prompt asks
    for. `reference`: (tokens, right) of every path of the reference policy."""

    responses: list[list[int]]
    thoughts: list[int]
    right: list[bool]
    closed: list[bool]
    whole: list[bool]
    budget: int | None = None
    reference: list[tuple[int, bool]] | None = None

    @property
    def lengths(self):
        return [len(tokens) for tokens in self.responses]


def mean(values):
    return sum(values) / len(values)


def eta(keys, group, i, _):
    factor = (mean(group.thoughts) / group.thoughts[i]) ** keys.alpha
    low, high = keys.clip or (0.0, math.inf)
    return group.right[i] * min(max(factor, low), high)


def kimi(keys, group, i, _):
    lengths = group.lengths
    span = max(lengths) - min(lengths)
    place = 0.5 - (lengths[i] - min(lengths)) / span if span else 0.0
    return group.right[i] + keys.weight * (place if group.right[i] else min(0.0, place))


def arora(keys, group, i, _):
    if not group.right[i]:
        return 0.0
    mine = [n for n, right in zip(group.lengths, group.right, strict=True) if right]
    spread = math.sqrt(mean([(n - mean(mine)) ** 2 for n in mine]))
    place = (group.lengths[i] - mean(mine)) / (spread + 1e-7)
    return 1 - keys.alpha / (1 + math.exp(-place))


def o1_pruner(keys, group, i, _):
    lengths, rights = zip(*group.reference, strict=True)
    reward = mean(lengths) / group.lengths[i] - 1 + keys.weight * (group.right[i] - mean(rights))
    return min(max(reward, keys.clip[0]), keys.clip[1])


def lc_r1(keys, group, i, _):
    if not group.right[i]:
        return group.closed[i]
    longest = max(n for n, right in zip(group.lengths, group.right, strict=True) if right)
    return 1 + group.closed[i] + keys.weight * (1 - group.lengths[i] / longest)


def think_prune(keys, group, i, history):
    # A stage has as many steps as it is given, whatever they drew.
    assert not keys.fitting
    stage = min(len(history) // keys.steps, len(keys.limits) - 1)
    return group.right[i] * (group.lengths[i] <= keys.limits[stage])


def l1_exact(keys, group, i, _):
    return group.right[i] - keys.alpha * abs(group.budget - group.lengths[i])


def l1_max(keys, group, i, _):
    room = keys.alpha * (group.budget - group.lengths[i]) + keys.delta
    return group.right[i] * min(max(room, 0.0), 1.0)


def laser(keys, group, i, _, target=None):
    fits = group.lengths[i] <= (keys.target if target is None else target)
    return group.right[i] + keys.weight * (group.right[i] and fits)


def laser_d(keys, group, i, history):
    return laser(keys, group, i, history, target=targets(keys, history)[level(group)])


def laser_de(keys, group, i, history):
    target = targets(keys, history)[level(group)]
    tokens = group.responses[i]
    ends = [tokens[j : j + keys.loop] for j in range(len(tokens) - keys.loop + 1)]
    looping = bool(ends) and ends[-1] in ends[:-1]
    thinks_on = len(tokens) > target and group.whole[i] and not looping
    wrong = not group.right[i] and thinks_on
    return laser(keys, group, i, history, target=target) + keys.weight * wrong


def shorter_better(keys, group, i, _):
    mine = [n for n, right in zip(group.lengths, group.right, strict=True) if right]
    best = min(mine) if mine else mean(group.lengths)
    return keys.alpha * group.right[i] - keys.beta * abs(group.lengths[i] - best)


def level(group):
    """By thirds of a question's paths that are right."""
    right, count = sum(group.right), len(group.right)
    return "easy" if 3 * right >= 2 * count else "medium" if 3 * right >= count else "hard"


def targets(keys, history):
    """The target of every level after these steps: the least one of the grid that leaves enough of
    the fewest right paths that a question of the level has."""
    found: dict[str, int] = dict.fromkeys(("easy", "medium", "hard"), keys.target)
    for end in range(keys.every, len(history) + 1, keys.every):
        groups = [group for step in history[end - keys.every : end] for group in step]
        for name in found:
            mine = [group for group in groups if level(group) == name]
            lengths = [n for group in mine for n in group.lengths]
            if not lengths:
                continue
            count = len(mine[0].right)
            fewest = {"easy": 2 * count // 3, "medium": count // 3, "hard": 1}[name]
            least, last = (
                keys.grid * math.ceil(n / keys.grid) for n in (keys.lowest, max(lengths))
            )
            target = least
            while target < last and (
                mean([n <= target for n in lengths]) * max(1, fewest) < keys.expected
            ):
                target += keys.grid
            found[name] = target
    return found


FORMULAS: dict[str, Any] = {
    formula.__name__: formula
    for formula in (
        *(eta, kimi, arora, o1_pruner, lc_r1, think_prune),
        *(l1_exact, l1_max, laser, laser_d, laser_de, shorter_better),
    )
}


def reward(keys, group, i, history):
    """R of path i of a group by the formula that the keys name."""
    return float(FORMULAS[keys.name](keys, group, i, history))

"""Rows -> packed batches: laid end to end, never padded, never cut; a row without a coefficient
does not exist.

    rows = [r0 (5 tokens), r1 (3), r2 (9)], budget 9      ->      [[r2], [r0, r1]]

The last token of a row is only ever a target, so T counts `row.tokens - 1`.

Several ranks make the same number of batches, since every batch is a round of collectives, and one
rank waits for all others in every round. So rows are dealt by work (FLOPs, attention included) and
not by tokens, batch k of every rank costs about the same, and a rank that has no row left for a
round runs a dummy of one token. A plan is a function of the lengths alone: every rank computes the
whole plan and takes its own part, and nothing is sent.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import torch

from vpgea_fast.types import PackedBatch, TrainRow

RankPlan = list[list[int]]
"""The micro-batches of one rank, each a list of row numbers; an empty one is a dummy."""

BALANCED = 1.02
"""Largest load over mean load from which on a plan is left as it is."""


def drop_zero_rows(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """Return the rows with a gradient. A zero-coefficient row would cost attention, MLP and head
    for nothing."""
    return [row for row in rows if row.token_ids.numel() and bool(row.coef.any())]


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put indices of `lengths` into batches of at most `budget` tokens; a longer row stays alone.

    First-fit-decreasing: at most 11/9 of the fewest batches + 6/9 (Dosa, 2007). Order within a
    batch and of the batches is a function of the lengths alone (ties by index), so a plan is
    reproducible. O(n log n): a tree over the batches finds the first with enough room.
    Errors: ValueError for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"micro-batch budget: expected at least 1 token, got {budget}")
    order = _longest_first(lengths)
    # Rows that leave no room for another. They are the longest, so `order` begins with them.
    batches = [[index] for index in order if lengths[index] >= budget]
    rest = order[len(batches) :]
    # A complete binary tree in one list: the root is 1, the children of node n are 2 n and 2 n + 1,
    # and leaf `leaves + k` is batch k. There are never more batches than rows, and a batch that is
    # not open yet has the whole budget, so the walk down always ends at a leaf with room.
    leaves = 1 << max(0, len(rest) - 1).bit_length()
    room = [budget] * (2 * leaves)  # room[n]: the most that any batch under node n can take
    filled: list[list[int]] = []
    for index in rest:
        length, node = lengths[index], 1
        while node < leaves:
            node *= 2  # left, where the earlier batches are; right if none of them has room
            node += room[node] < length
        if node - leaves == len(filled):
            filled.append([])
        filled[node - leaves].append(index)
        room[node] -= length
        # Upwards only as far as the row took the largest room of a subtree.
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return batches + filled


def plan_ranks(
    lengths: Sequence[int], budget: int, ranks: int, cost: Callable[[int], float]
) -> list[RankPlan]:
    """Plan the micro-batches of every rank: as few rounds as first-fit-decreasing needs, equal in
    number on all ranks, balanced by `cost` (`ModelFlops.row`) in every round and in sum.

    A round takes as long as its slowest rank. There are two ways to fill the rounds: rows spread
    over all batches by cost, or first-fit batches as they are. The one whose rounds cost less in
    sum is chosen. Either deals batches of similar cost to a round, the costlier to the rank with
    less, and then moves single rows from the rank with most.

    Costlier rounds come first: the allocator then reserves its largest blocks once and reuses them,
    and a budget that does not fit memory shows in the first micro-batch and not in the last.

    The k-th batches of the ranks belong together. No batch exceeds the budget, except a single
    longer row. No rows, no rounds. Errors: ValueError for a budget or a number of ranks below 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {ranks}")
    batches = plan_batches(lengths, budget)
    # No more rounds than first-fit needs: each costs every rank a gather of all weights.
    slots = -(-len(batches) // ranks) * ranks
    costs = [cost(length) for length in lengths]
    spread = _spread(lengths, costs, slots, budget)
    plans = []
    for candidate in (spread, batches):
        if candidate is not None:
            plan = _deal(candidate, costs, ranks)
            _level(plan, lengths, costs, budget)
            plan = _largest_first(plan, costs)
            plans.append((_waiting(plan, costs), plan))
            if plans[0][0] <= BALANCED:
                break  # good enough: the second way could save at most 2 %
    return min(plans, key=lambda pair: pair[0])[1]


def pack(rows: Sequence[TrainRow], budget: int) -> Iterator[tuple[PackedBatch, list[int]]]:
    """Pack `rows` into batches, each with the indices of its rows, in its order."""
    return pack_plan(rows, plan_batches([row.tokens - 1 for row in rows], budget))


def pack_plan(rows: Sequence[TrainRow], plan: RankPlan) -> Iterator[tuple[PackedBatch, list[int]]]:
    """Pack the batches of a plan one at a time: a whole step's rows, five int64 per token, need not
    lie in memory twice."""
    return ((pack_rows([rows[i] for i in batch]), batch) for batch in plan)


def pack_rows(rows: Sequence[TrainRow]) -> PackedBatch:
    """Pack rows into one batch; no rows into a dummy of one token, target 0, coefficient 0.

    The dummy's loss is 0 and its gradients are zeros, so a rank can take part in every collective
    of a round that it has no rows for. Errors: ValueError for a row without a context or without
    tokens.
    """
    if not rows:
        # One context token and one target: T = R = 1, the smallest forward there is.
        token = torch.zeros(1, dtype=torch.int64)
        rows = [
            TrainRow(
                context_ids=token,
                token_ids=token,
                coef=torch.zeros(1),
                stream="prior",
                view="student",
            )
        ]
    # S rows become S documents of context + tokens - 1, end to end: T input tokens, R targets.
    contexts = [row.context_ids.numel() for row in rows]
    counts = [row.token_ids.numel() for row in rows]
    for number, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        if not context or not count:
            raise ValueError(
                f"row {number}: expected at least one context token and one token, got "
                f"{context} and {count}"
            )
    seqlens = [context + count - 1 for context, count in zip(contexts, counts, strict=True)]
    # Positions begin anew in every document, as if it were alone; one ramp serves them all.
    ramp = torch.arange(max(seqlens))
    cu_seqlens = torch.tensor([0, *seqlens]).cumsum(0)
    counts_S = torch.tensor(counts)
    # The targets of document s sit at the end of it: row r of them is at r + shift_S[s].
    shift_S = cu_seqlens[1:] - counts_S.cumsum(0)
    return PackedBatch(
        input_ids=torch.cat([ids for r in rows for ids in (r.context_ids, r.token_ids[:-1])]),
        position_ids=torch.cat([ramp[:length] for length in seqlens]),
        seqlens=tuple(seqlens),
        cu_seqlens=cu_seqlens.to(torch.int32),
        logit_index=torch.arange(sum(counts)) + shift_S.repeat_interleave(counts_S),
        targets=torch.cat([row.token_ids for row in rows]),
        coef=torch.cat([row.coef for row in rows]).double(),
    )


def plan_stats(
    plans: Sequence[RankPlan], lengths: Sequence[int], cost: Callable[[int], float]
) -> dict[str, float]:
    """Measure a plan: rounds; dummy tokens; `flops_imbalance`, largest over mean work of a rank;
    `flops_waiting`, sum over the rounds of the largest work over the mean work of a rank.

    The first is what a rank computes more than the mean, the second what the slowest rank of every
    round makes all others wait. Both are 1 where there is nothing to balance.
    """
    costs = [cost(length) for length in lengths]
    # Per rank, in operations: by tokens attention's square would not show.
    loads = [sum(_work(batch, costs) for batch in plan) for plan in plans]
    return {
        "rounds": len(plans[0]),
        "dummy_tokens": sum(not batch for plan in plans for batch in plan),
        "flops_imbalance": max(loads) * len(plans) / sum(loads) if any(loads) else 1.0,
        "flops_waiting": _waiting(plans, costs),
    }


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _work(batch: Sequence[int], costs: Sequence[float]) -> float:
    return sum(costs[i] for i in batch)


def _waiting(plans: Sequence[RankPlan], costs: Sequence[float]) -> float:
    """Cost of the rounds over the mean cost of a rank; a round costs what its slowest rank does."""
    total = sum(costs)
    rounds = zip(*plans, strict=True)
    slowest = sum(max(_work(batch, costs) for batch in batches) for batches in rounds)
    return slowest * len(plans) / total if total else 1.0


def _spread(
    lengths: Sequence[int], costs: Sequence[float], slots: int, budget: int
) -> list[list[int]] | None:
    """Spread rows over `slots` batches, the longest first, each to the batch with the least cost
    (Graham's rule, 1969); None if the budget is too tight for that.

    A batch that is the cheapest and has no room is full of short rows: it is closed for good.
    """
    batches: list[list[int]] = [[] for _ in range(slots)]
    cheapest = [(0.0, slot, 0) for slot in range(slots)]  # (cost, slot, tokens), a heap
    for index in _longest_first(lengths):
        # [0][2] is 0 for an empty batch, which takes a row of any length.
        while cheapest and cheapest[0][2] and cheapest[0][2] + lengths[index] > budget:
            heapq.heappop(cheapest)
        if not cheapest:
            return None
        cost, slot, tokens = cheapest[0]
        batches[slot].append(index)
        heapq.heapreplace(cheapest, (cost + costs[index], slot, tokens + lengths[index]))
    return batches


def _deal(batches: list[list[int]], costs: Sequence[float], ranks: int) -> list[RankPlan]:
    """Deal rounds of `ranks` batches of similar cost, the costliest first; in each round the
    costliest batch goes to the rank with the least so far."""
    work = [_work(batch, costs) for batch in batches]
    order = sorted(range(len(batches)), key=lambda b: (-work[b], b))
    plans: list[RankPlan] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for first in range(0, len(order), ranks):
        round_ = order[first : first + ranks]
        for place, rank in enumerate(sorted(range(ranks), key=lambda r: (loads[r], r))):
            # Only the last round can be short. It is the cheapest, so dummies wait for little.
            real = place < len(round_)
            plans[rank].append(list(batches[round_[place]]) if real else [])
            loads[rank] += work[round_[place]] if real else 0.0
    return plans


def _largest_first(plans: list[RankPlan], costs: Sequence[float]) -> list[RankPlan]:
    """The same rounds, the one with the slowest rank first."""
    slowest = [
        max(_work(batch, costs) for batch in batches) for batches in zip(*plans, strict=True)
    ]
    order = sorted(range(len(slowest)), key=lambda k: -slowest[k])
    return [[plan[k] for k in order] for plan in plans]


def _level(
    plans: list[RankPlan], lengths: Sequence[int], costs: Sequence[float], budget: int
) -> None:
    """Move rows, one at a time and in place, from the rank with most work to another rank's batch
    of the same round, until the most is within BALANCED of the mean or nothing helps."""
    ranks = len(plans)
    loads = [sum(_work(batch, costs) for batch in plan) for plan in plans]
    # tokens[rank][round], kept up to date by each move: a new sum would cost a pass over all rows.
    tokens = [[sum(lengths[i] for i in batch) for batch in plan] for plan in plans]
    # Each move narrows a gap, so it would end by itself. The bound is for hundreds of ranks: a move
    # costs a pass over the giver's rows per taker that is tried.
    for _ in range(16 * ranks):
        giver = max(range(ranks), key=lambda r: loads[r])
        if loads[giver] * ranks <= BALANCED * sum(loads):
            return
        # The idlest rank first: the widest gap leaves the most rows to choose from.
        for taker in sorted(range(ranks), key=lambda r: (loads[r], r)):
            move = _best_move(
                plans[giver],
                lengths,
                costs,
                room=[budget - count for count in tokens[taker]],
                gap=loads[giver] - loads[taker],
            )
            if move is not None:
                break
        else:
            return
        k, index = move
        plans[giver][k].remove(index)
        plans[taker][k].append(index)
        tokens[giver][k] -= lengths[index]
        tokens[taker][k] += lengths[index]
        loads[giver] -= costs[index]
        loads[taker] += costs[index]


def _best_move(
    plan: RankPlan,
    lengths: Sequence[int],
    costs: Sequence[float],
    *,
    room: Sequence[int],
    gap: float,
) -> tuple[int, int] | None:
    """Find the (round, row) whose cost is nearest half the gap between two ranks.

    Only rows count that the other rank's batch of the same round has room for; no batch is emptied.
    A row of cost c turns a gap g into |g - 2 c|: half the gap would close it.
    """
    # A row that costs the gap or more would only swap who has too much. Ties end with the row's
    # number, so every rank finds the same move.
    moves = (
        (abs(gap - 2 * costs[i]), k, costs[i], i)
        for k, batch in enumerate(plan)
        if len(batch) > 1
        for i in batch
        if lengths[i] <= room[k] and 0 < costs[i] < gap
    )
    best = min(moves, default=None)
    return None if best is None else (best[1], best[3])

"""Rows -> packed batches: laid end to end, never padded, never cut; a row without a coefficient
does not exist.

    rows = [r0 (5 tokens), r1 (3), r2 (9)], budget 9      ->      [[r2], [r0, r1]]

The last token of a row is only ever a target, so T counts `row.tokens - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vpgea_fast.types import PackedBatch, TrainRow


def drop_zero_rows(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """The rows with a gradient. A zero-coefficient row would cost attention, MLP and head for
    nothing."""
    return [row for row in rows if row.token_ids.numel() and bool(row.coef.any())]


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit-decreasing: indices of `lengths` in batches of at most `budget` tokens; a longer
    row stays alone.

    Order within a batch and of the batches is a function of the lengths alone (ties by index), so a
    plan is reproducible. Errors: ValueError for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"micro-batch budget: expected at least 1 token, got {budget}")
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        slot = next((b for b, free in enumerate(room) if length <= free), None)
        if slot is None:
            batches.append([index])
            room.append(budget - length)
        else:
            batches[slot].append(index)
            room[slot] -= length
    return batches


def pack(rows: Sequence[TrainRow], budget: int) -> list[tuple[PackedBatch, list[int]]]:
    """Packed batches of `rows`, each with the indices of the rows that it holds, in its order."""
    plan = plan_batches([row.tokens - 1 for row in rows], budget)
    return [(pack_rows([rows[i] for i in batch]), batch) for batch in plan]


def pack_rows(rows: Sequence[TrainRow]) -> PackedBatch:
    """One packed batch. Errors: ValueError for a row without a context or without tokens."""
    for number, row in enumerate(rows):
        if not row.context_ids.numel() or not row.token_ids.numel():
            raise ValueError(
                f"row {number}: expected at least one context token and one token, got "
                f"{row.context_ids.numel()} and {row.token_ids.numel()}"
            )
    seqlens = tuple(row.tokens - 1 for row in rows)
    starts = [0, *torch.tensor(seqlens).cumsum(0).tolist()]
    first = [start + row.context_ids.numel() - 1 for start, row in zip(starts, rows, strict=False)]
    counts = [row.token_ids.numel() for row in rows]
    return PackedBatch(
        input_ids=torch.cat([torch.cat([row.context_ids, row.token_ids[:-1]]) for row in rows]),
        position_ids=torch.cat([torch.arange(n) for n in seqlens]),
        seqlens=seqlens,
        logit_index=torch.cat([torch.arange(f, f + n) for f, n in zip(first, counts, strict=True)]),
        targets=torch.cat([row.token_ids for row in rows]),
        coef=torch.cat([row.coef.double() for row in rows]),
    )

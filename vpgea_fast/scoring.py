"""Cross-view scoring: how likely a thought makes the reference answer in the *student* view.

    S(x) + z (+ think-close if the thought was cut) + cue + target
    U = sum over the target of log p, at temperature 1

The trunk runs over the whole sequence, the head over the target rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vpgea_fast.packing import pack
from vpgea_fast.types import PackedBatch, Path, PromptedQuestion, TrainRow

LogprobFn = Callable[[PackedBatch], torch.Tensor]
"""A packed batch -> (R,) log-probs of its targets, in its order."""


def answer_likelihood(
    logprob: LogprobFn,
    paths: Sequence[tuple[PromptedQuestion, Path]],
    *,
    think_close_id: int,
    budget: int,
    u_norm: str = "sum",
) -> torch.Tensor:
    """U = log P(y*|x, z) of every path, (len(paths),) float64 in nats, summed (or averaged) over
    the target tokens.

    A thought that was cut gets its think-close appended, so that it has a defined utility (VPG-EA,
    arXiv 2605.11019).
    """
    close = torch.tensor([think_close_id])
    rows = []
    for question, path in paths:
        thought = path.z_ids if path.closed else torch.cat([path.z_ids, close])
        context = torch.cat([question.student_ids, thought, question.cue_ids])
        rows.append(score_row(context, question.target_ids))
    totals = (
        torch.stack([logps.sum() for logps in row_logprobs(logprob, rows, budget)])
        if rows
        else torch.zeros(0)
    )
    if u_norm == "sum":
        return totals.double()
    return totals.double() / torch.tensor(
        [row.token_ids.numel() for row in rows], dtype=torch.float64
    )


def row_logprobs(logprob: LogprobFn, rows: Sequence[TrainRow], budget: int) -> list[torch.Tensor]:
    """Per-token log-probs of every row, each (len,) float64, in the order of `rows`."""
    result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for batch, members in pack(rows, budget):
        counts = [rows[i].token_ids.numel() for i in members]
        for i, logps in zip(members, logprob(batch).double().split(counts), strict=True):
            result[i] = logps
    return result


def score_row(context_ids: torch.Tensor, token_ids: torch.Tensor) -> TrainRow:
    """A row to be scored, not trained: its coefficients are ones."""
    return TrainRow(context_ids, token_ids, torch.ones(token_ids.numel()), "prior", "student")

"""Scored batches by hand. Of the tests, this file alone spells the columns of `ScoredPaths`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vpgea_fast.objectives import Terms
from vpgea_fast.types import (
    Groups,
    Path,
    PromptedQuestion,
    Question,
    ScoredBatch,
    ScoredPaths,
)

ids = torch.tensor


def prompted(
    name: str = "q",
    *,
    student: Sequence[int] | torch.Tensor,
    teacher: Sequence[int] | torch.Tensor,
    cue: Sequence[int] | torch.Tensor,
    target: Sequence[int] | torch.Tensor,
    answer: str = "7",
    close: int = 9,
) -> PromptedQuestion:
    return PromptedQuestion(
        question=Question(id=name, text="?", answer=answer),
        student_ids=torch.as_tensor(student),
        teacher_ids=torch.as_tensor(teacher),
        close_ids=torch.tensor([close]),
        cue_ids=torch.as_tensor(cue),
        target_ids=torch.as_tensor(target),
    )


def sampled(thought: Sequence[int] | torch.Tensor, **fields: Any) -> Path:
    """A path with this thought; whatever is not given is ordinary: it closed, and of log-prob 0."""
    z_ids = torch.as_tensor(thought)
    closed = fields.get("closed", True)
    ordinary = {
        "question_id": "q",
        "stream": "posterior",
        "index": 0,
        "logps": torch.zeros(z_ids.numel()),
        "answer_ids": ids([1]),
        "closed": closed,
        "finish": "stop" if closed else "length",
    }
    return Path(z_ids=z_ids, **{**ordinary, **fields})


def scored(paths: Groups, u: Any, *, correct: Any = None) -> ScoredPaths:
    """A stream whose lengths and closings are those of its paths; correct NaN where not given."""
    u_BP = torch.as_tensor(u, dtype=torch.float64)
    columns = [[(path.length, path.closed) for path in group] for group in paths]
    # By its shape: a stream that is not drawn has no column.
    length_BP, closed_BP = ids(columns, dtype=torch.float64).view(*u_BP.shape, 2).unbind(-1)
    correct = torch.full_like(u_BP, math.nan) if correct is None else correct
    return ScoredPaths(
        paths=paths,
        u_BP=u_BP,
        length_BP=length_BP,
        closed_BP=closed_BP.bool(),
        correct_BP=torch.as_tensor(correct, dtype=torch.float64),
    )


def whole(
    questions: Sequence[PromptedQuestion], posterior: ScoredPaths, prior: ScoredPaths
) -> ScoredBatch:
    """A batch of which the engine gave up nothing."""
    lost_B = torch.zeros(len(questions), dtype=torch.int64)
    return ScoredBatch(questions=tuple(questions), posterior=posterior, prior=prior, lost_B=lost_B)


def weights_of(terms: Terms) -> dict[tuple[str, str], torch.Tensor]:
    """The weights of each (stream, view), of an objective with one term for each."""
    weights = {(term.stream, term.view): term.weight_BP for term in terms.parts}
    assert len(weights) == len(terms.parts)
    return weights


def losing(path: Path) -> Path:
    """As a server's time-out leaves it: not a token."""
    none = torch.zeros(0)
    return replace(path, z_ids=none.long(), answer_ids=none.long(), logps=none, finish="error")

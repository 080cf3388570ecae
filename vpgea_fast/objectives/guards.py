"""Which teacher paths may earn a reward: the filters of VPG-EA, and its guards against leaks.

A path that states the answer of its prompt makes the answer likely in the student's view too.
`cfg` is a `Vpgea`, whose file imports this one.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from vpgea_fast.names import Score, Stream, Trained

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.types import ScoredBatch

VIEWS = Score("posterior", "teacher", "thought"), Score("posterior", "student", "thought")
EARLY = Score("posterior", "early", "target")
OFF = (None, "none", 0)
"""Values of a guard's key with which it rejects nothing; 0 is False too."""


class Guard(NamedTuple):
    """A filter that a run counts, switched by a key of `objective`."""

    key: str
    on: str | float
    """A value that turns it on: tests/test_book.py runs with it."""
    rejects: Callable[[Any, ScoredBatch], Tensor]
    """(cfg, batch) -> the teacher paths that it rejects, (B, G) bool. Asked only where it is on."""


def accepted(cfg: Any, batch: ScoredBatch) -> Tensor:
    """Which teacher paths may earn a reward, (B, G) bool: those that pass, and no guard catches."""
    return functools.reduce(
        operator.and_, (~c for c in caught(cfg, batch).values()), passed(cfg, batch)
    )


def passed(cfg: Any, batch: ScoredBatch, stream: Stream = "posterior") -> Tensor:
    """Which paths pass every filter that is not counted, (B, P) bool. They stand here.

    A rejected path has R = 0 and stays in its group's mean: it is a failure of the policy, and
    dropping it would hide it. A filter may read the columns of the stream, each (B, P): `u_BP`
    (nats), `length_BP` (tokens, the closing one included), `closed_BP`, `correct_BP` (1, 0, or NaN
    where not verified). Token ids are in `own.paths[b][i].z_ids`.
    """
    own = batch.stream(stream)
    # Cut thoughts have no end to score, and a U that is not finite says nothing.
    filters = [own.closed_BP, own.u_BP.isfinite()]
    if cfg.verify == "gate":
        filters.append(own.correct_BP == 1.0)
    return functools.reduce(operator.and_, filters)


def caught(cfg: Any, batch: ScoredBatch) -> dict[str, Tensor]:
    """The guards of GUARDS that are on -> the teacher paths that each rejects, (B, G) bool."""
    return {
        name: guard.rejects(cfg, batch)
        for name, guard in GUARDS.items()
        if getattr(cfg, guard.key) not in OFF
    }


def _leaking(cfg: Any, batch: ScoredBatch) -> Tensor:
    leaked_BG = leak(cfg, batch)
    assert leaked_BG is not None  # each value of the key has its measure
    return ~(leaked_BG <= cfg.leak_limit)  # NaN too


def _lexical(cfg: Any, batch: ScoredBatch) -> Tensor:
    post, words = batch.posterior, re.compile(cfg.lexical_regex, re.IGNORECASE)
    assert post.texts is not None  # draws() asks for them
    rows = [[bool(words.search(text)) for text in group] for group in post.texts]
    return post.closed_BP.new_tensor(rows)


def _short(cfg: Any, batch: ScoredBatch) -> Tensor:
    # Relative to the student's own paths: questions differ in the length that they need.
    base_B1 = batch.prior.length_BP.mean(dim=1, keepdim=True)
    return batch.posterior.length_BP < cfg.len_min_frac * base_B1


GUARDS = {
    "guard_caught": Guard("leak_guard", "early_answer", _leaking),
    "lexical_caught": Guard("lexical", True, _lexical),
    "short_caught": Guard("len_min_frac", 0.05, _short),
}
"""What a run logs of a guard, the share of the teacher's paths that it rejects and `passed` accepts
-> the guard. The book, the report, the sweep and the tests read this table: a row is all."""


def leak(cfg: Any, batch: ScoredBatch) -> Tensor | None:
    """How far each teacher path leans on the answer in its prompt, (B, G) nats; None without a
    guard.

    counterfactual  log q(z|x, y*) - log q(z|x, y'), summed over the thought's tokens
    max_kl          the largest log q(z_t|x, y*) - log pi(z_t|x) of a token
    early_answer    baseline of U - U of the thought before it first states y*; 0 where that is
                    nowhere, or in its second half
    """
    if cfg.leak_guard == "early_answer":
        return _early(cfg, batch)
    if (scores := cfg.guard_scores()) is None:
        return None
    # The sum compares whole paths; the maximum finds one token that the answer alone explains.
    summed = cfg.leak_guard == "counterfactual"
    # A path that the engine gave up may have no token, and is trained by nobody.
    values = [
        gap.sum() if summed or not gap.numel() else gap.max() for gap in _gaps(batch, *scores)
    ]
    return _column(batch, values)


def views(who: Trained) -> tuple[Score, Score]:
    """The thoughts of the teacher paths as this policy drew them, and in the student's view of the
    policy."""
    return VIEWS[0]._replace(who=who), VIEWS[1]


def log_ratio(batch: ScoredBatch) -> Tensor:
    """log q(z|x, y*) - log pi(z|x) of each teacher path, (B, G) nats; q is of who drew it."""
    own, student = views(batch.drawn_by("posterior"))
    return _column(batch, [gap.sum() for gap in _gaps(batch, own, student)])


def _early(cfg: Any, batch: ScoredBatch) -> Tensor:
    from vpgea_fast.advantage import cross_view_utility

    post, prior = batch.posterior, batch.prior
    columns = post.u_BP, prior.u_BP, post.length_BP, prior.length_BP
    base_B = cross_view_utility(*columns, options=cfg.group_options()).u_base
    # One number of a path that is cut, none of another.
    found = [batch.logps[EARLY][path.key] for path in post.flat]
    cut_BG = _column(batch, [u.new_tensor(float(u.numel())) for u in found]) > 0
    u_BG = _column(batch, [u.sum() for u in found])
    u_BG = u_BG.where(u_BG.isfinite(), cfg.u_min)
    if cfg.clamp_u:  # as every U of the baseline
        u_BG = u_BG.clamp(min=cfg.u_min)
    return (base_B[:, None] - u_BG).where(cut_BG, 0.0)


def _gaps(batch: ScoredBatch, own: Score, other: Score) -> list[Tensor]:
    """Per token, how much likelier each teacher path is as drawn than under the other prompt."""
    one, two = batch.logps[own], batch.logps[other]
    return [one[path.key] - two[path.key] for path in batch.posterior.flat]


def _column(batch: ScoredBatch, values: list[Tensor]) -> Tensor:
    import torch

    # `flat` goes through a question's paths before the next one's, as the columns do.
    return torch.stack(values).double().view_as(batch.posterior.u_BP)

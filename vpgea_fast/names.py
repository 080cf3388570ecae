"""Names of streams, views and parts: what a configuration needs of the records, without torch.

A command line must not wait for torch, and the methods of objectives/ are read with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Stream = Literal["posterior", "prior", "reference"]
"""Who sampled a path: the teacher view (posterior q, sees the answer), the student view (prior pi),
or the reference policy in the student view."""

View = Literal["teacher", "student"]
"""Under which prompt tokens are conditioned: T(x, y*) or S(x)."""

Context = Literal["teacher", "student", "counterfactual", "early"]
"""Under which prompt log-probs are asked for: a view; `counterfactual`, the teacher's with a wrong
answer, that of another question, drawn anew at every step; or `early`, of part `target` alone: the
student's and the thought cut before it first states the answer. Nothing is drawn or trained in the
last two."""

Part = Literal["thought", "response", "answer", "target", "attempts"]
"""Tokens of a path. `thought`: z. `response`: z and the answer sampled after it. `answer`: that
answer alone. `target`: the reference answer behind the thought and its cue. `attempts`: the right
ones of the answers sampled behind the thought to score it, which share the path's weight."""

BEHIND: tuple[Part, ...] = ("target", "attempts")
"""Parts that were not drawn with the path, and stand behind its thought."""

Trained = Literal["policy", "posterior"]
"""Whose weights a row trains: those of the policy, or those of the posterior policy, which is a
model of its own where an objective says so (`Draws.posterior_who`)."""

Who = Literal["policy", "posterior", "reference"]
"""Whose log-probs: a policy that is trained, or the frozen model that it is held to."""

Norm = Literal["seq_sum", "const", "seq_mean", "token_mean"]
"""What the weight of a path is divided by; see rows.py."""

PathKey = tuple[str, Stream, int]
"""Question, stream and index: what tells a path from all others of its step."""


class Score(NamedTuple):
    """Log-probs that an objective must see: of a part of every path of a stream, under a prompt."""

    # Their order is kept in checkpoints, which hold a score as a plain tuple.
    stream: Stream
    view: Context
    part: Part
    who: Who = "policy"


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a path before it is drawn: all that a field of its prompt may depend on. `seed`
    is the path's own, and `group_seed` that of its question's paths in this step, of all streams:
    pure functions of the place and of run.seed."""

    question_id: str
    stream: Stream
    index: int
    step: int
    # 63 bits each: engines take a signed 64-bit number.
    seed: int
    group_seed: int

"""What an objective is: a frozen record of keys with three methods. Nothing else names a method.

    draws()              what a step samples
    needs()              log-probs that must be known before the objective speaks
    terms(batch, state)  scored paths -> the additive parts of the loss, one weight per path

The trainer below knows no algorithm: it draws, scores, makes a row of every path with a weight, and
steps. An objective of your own is a class with these methods (`objective.target`).

The methods shipped here name no torch before they are called: a configuration holds one, and a
command line must not wait for torch.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.names import Norm, Part, PathKey, Score, Slot, Stream, Trained, View
from vpgea_fast.objectives.surrogate import Surrogate
from vpgea_fast.objectives.unread import Unread, refuse_unread
from vpgea_fast.values import STRICT, Clip, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from vpgea_fast.types import Live, ScoredBatch


# Of a clip: from 1 on the ratio would have no lower bound.
Share = Annotated[float, Field(gt=0.0, lt=1.0)]


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What a step samples of each question.

    posterior, prior  paths of each stream
    reference         paths of the frozen reference policy, in the student view
    posterior_view    the prompt that the posterior paths are drawn from
    posterior_who     whose weights draw them
    verified          the sampled answers must be judged, so full answers are sampled
    answers           sampled answers are trained, so rows are longer than thoughts
    texts             the objective reads the decoded thoughts (`ScoredPaths.texts`)
    stated            it reads where each thought states the answer (`ScoredPaths.stated_BP`)
    joint             the prior paths are trained beside the posterior ones
    targets           the reference answer is trained behind the thoughts: a row more of each
    attempts          scoring.answer_samples answers are sampled behind every closed thought, in the
                      student's view, judged and kept (`Path.attempts`)
    answer_rows       the most of a path's right attempts that are trained; 0: none
    u_norm            how U adds up the answer's tokens; None: as scoring.u_norm says
    by_likelihood     `targets` are weighed by exp U, as its gradient is: U must be their log-prob
    given             the prior paths are the responses of the data, and none is sampled
    recorded          paths are imitated by recorded weights (`Path.share`): which model drew them,
                      and at which temperature, does not matter
    trained           False: the paths are for a record alone (train.record)
    fields            name -> the value that a path's prompt holds for `{name}`, text or a whole
                      number: a pure function of the path's place

    >>> budget = {"budget": lambda slot: 64 + 64 * (slot.seed % 3)}
    >>> Draws(prior=4, fields=budget).values(Slot("q0", "prior", 0, step=0, seed=5, group_seed=5))
    {'budget': '192'}
    """

    posterior: int = 0
    prior: int = 0
    reference: int = 0
    posterior_view: View = "teacher"
    posterior_who: Trained = "policy"
    verified: bool = False
    answers: bool = False
    texts: bool = False
    stated: bool = False
    joint: bool = False
    targets: bool = False
    attempts: bool = False
    answer_rows: int = 0
    u_norm: Literal["sum", "mean"] | None = None
    by_likelihood: bool = False
    given: bool = False
    recorded: bool = False
    trained: bool = True
    fields: Mapping[str, Callable[[Slot], str | int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in get_args(Stream):
            count = getattr(self, name)
            # bool is an int, and True would draw one path without a word.
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"Draws.{name}: got {count!r}, expected a number of paths")
        if not self.paths:
            raise ValueError("Draws: got no paths; ask for posterior or prior paths")
        for name, kind in (("posterior_view", View), ("posterior_who", Trained)):
            if (got := getattr(self, name)) not in get_args(kind):
                known = " or ".join(get_args(kind))
                raise ValueError(f"Draws.{name}: got {got!r}, expected {known}")
        if self.given and (not self.prior or self.posterior or self.reference):
            raise ValueError(
                "Draws.given: the data gives prior paths alone; ask for those, and for no others"
            )
        for name, value in self.fields.items():
            # The templates have these three already.
            taken = name in ("question", "answer", "solution")
            if taken or not re.fullmatch(r"[a-z]\w*", str(name)) or not callable(value):
                raise ValueError(
                    f"Draws.fields: got {name!r}: {value!r}, expected a name in small letters, not "
                    "question, answer or solution, and a function of a Slot"
                )

    # Questions of trainer, check, estimate and dry run, so that none of them asks for a type.

    def values(self, slot: Slot) -> dict[str, str]:
        """The fields of a path's prompt. ValueError for a function that fails, or gives no text."""
        found = {}
        for name, value in self.fields.items():
            try:
                got = value(slot)
            except Exception as error:  # a function of the user's may fail in any way
                said = f"{type(error).__name__}: {error}"
                raise ValueError(f"objective, field {name!r} of {slot}: raised {said}") from error
            # True is an int to Python, and would stand in the prompt as a word.
            if isinstance(got, bool) or not isinstance(got, (str, int)):
                raise ValueError(
                    f"objective, field {name!r} of {slot}: got {got!r}, expected text or a whole "
                    "number"
                )
            found[name] = str(got)
        return found

    @property
    def paths(self) -> int:
        """Paths of a question, all streams."""
        # What a question costs the engine; scoring costs a forward of each again.
        return self.posterior + self.prior + self.reference

    @property
    def plan(self) -> list[tuple[Stream, View, int]]:
        """(stream, view that it is drawn in, paths per question), in the order of drawing."""
        return [
            ("posterior", self.posterior_view, self.posterior),
            ("prior", "student", self.prior),
            ("reference", "student", self.reference),
        ]

    @property
    def counts(self) -> list[int]:
        """Paths per prompt, of the streams that are drawn."""
        # Paths of one stream share a prompt, and with it a prefix in the engine's cache.
        return [count for _, _, count in self.plan if count]

    @property
    def teacher(self) -> bool:
        """Anything is drawn from the teacher's prompt."""
        return self.posterior > 0 and self.posterior_view == "teacher"


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One additive part of the loss: a weight for every path of a stream, under one prompt.

    name        the part's name in the log, as in `loss_pg`
    weight_BP   (B, P) float64: the gradient of the minimised loss is the sum over paths of
                weight * w * grad log p(part | context), with w the normaliser of rows.py. A
                negative weight makes a path likelier.
    counted_BP  (B, P) bool: paths whose tokens the norm `token_mean` counts; None: all
    factors     path -> (tokens of the part,) float64, multiplied into its tokens' coefficients
    distilled   the paths were drawn under another prompt: sg log q is part of the logged loss
    live        replaces `weight` by a function of the log-probs of the moment
    later       the same where a rollout has several updates; with one, `weight` stands
    held_BP     (B, P) bool: paths that `live` acts on whatever their weight; None: none
    close_BP    (B, P) float64: added to the weight on the thought's last token alone; None: none
    first       of part `attempts`: the first right ones of a path alone; None: all of them
    who         whose weights are trained
    """

    name: str
    stream: Stream
    view: View
    weight_BP: Tensor
    part: Part = "thought"
    distilled: bool = False
    counted_BP: Tensor | None = None
    factors: Mapping[PathKey, Tensor] | None = None
    live: Live | None = None
    later: Live | None = None
    held_BP: Tensor | None = None
    close_BP: Tensor | None = None
    first: int | None = None
    who: Trained = "policy"

    @property
    def weighted(self) -> Tensor:
        """(B, P) bool: the paths that have a weight, on all tokens or on one."""
        weighted_BP = self.weight_BP.ne(0)
        return weighted_BP if self.close_BP is None else weighted_BP | self.close_BP.ne(0)

    @property
    def acting(self) -> Tensor:
        """(B, P) bool: the paths that get a row."""
        # A zero row would cost attention, MLP and head, and add nothing.
        return self.weighted if self.held_BP is None else self.weighted | self.held_BP

    def without(self, lost_B: Tensor) -> Term:
        """No row for the paths of the questions where `lost_B` is True."""
        # Zero and not fewer rows of the matrix: the log of the paths keeps its places.
        lost_B1 = lost_B[:, None]
        held_BP = None if self.held_BP is None else self.held_BP & ~lost_B1
        close_BP = None if self.close_BP is None else self.close_BP.masked_fill(lost_B1, 0.0)
        counted_BP = None if self.counted_BP is None else self.counted_BP & ~lost_B1
        weight_BP = self.weight_BP.masked_fill(lost_B1, 0.0)
        return replace(
            self,
            weight_BP=weight_BP,
            held_BP=held_BP,
            close_BP=close_BP,
            counted_BP=counted_BP,
        )

    def where(self, whole_B: Tensor, other: Term) -> Term:
        """`other`, which is of the questions where `whole_B` is True alone, with the rest of the
        questions as they are here."""
        columns = {}
        # What is not given: held to nothing, no weight on the last token, every path counted.
        for name, absent in (("weight_BP", 0), ("close_BP", 0), ("held_BP", 0), ("counted_BP", 1)):
            mine, theirs = getattr(self, name), getattr(other, name)
            given = mine if theirs is None else theirs
            if given is None:
                continue
            found_BP = given.new_full(self.weight_BP.shape, absent)
            if mine is not None:
                found_BP[~whole_B] = mine[~whole_B].to(found_BP.dtype)
            if theirs is not None:
                found_BP[whole_B] = theirs
            columns[name] = found_BP
        return replace(other, **columns)


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What an objective says of a batch.

    parts        the additive parts of the loss
    path_scores  for the log alone: of a stream, name -> (B, P)
    metrics      for the log alone
    state        what the objective keeps for the next step, values that JSON has

    >>> import torch
    >>> part = Term(
    ...     name="pg", stream="prior", view="student", weight_BP=torch.tensor([[-1.0, 1.0]])
    ... )
    >>> Terms(parts=(part,)).alive.tolist()
    [True]
    """

    parts: tuple[Term, ...]
    path_scores: Mapping[Stream, dict[str, Tensor]] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alive(self) -> Tensor:
        """Which questions have a path whose weight is not zero; (B,) bool. Keeping to a reference
        policy alone teaches nothing, and does not count."""
        # One part with a gradient is enough.
        by_part = (part.weighted.any(dim=1) for part in self.parts)
        return functools.reduce(operator.or_, by_part)

    @property
    def acting(self) -> Tensor:
        """Which questions have a path with a row, (B,) bool: a weight, or the hold to a reference
        policy alone."""
        return functools.reduce(operator.or_, (part.acting.any(dim=1) for part in self.parts))

    def without(self, lost_B: Tensor) -> Terms:
        """The same without the questions where `lost_B` is True."""
        return replace(self, parts=tuple(part.without(lost_B) for part in self.parts))

    def where(self, whole_B: Tensor, other: Terms) -> Terms:
        """The same with the weights and scores of `other` for the questions where `whole_B` is
        True, which are all that `other` is of."""
        names = [[part.name for part in terms.parts] for terms in (self, other)]
        if names[0] != names[1]:
            raise ValueError(
                f"objective: got the parts {', '.join(names[1])} of the questions that lost no "
                f"path, and {', '.join(names[0])} of all; return the same parts of every batch"
            )
        pairs = zip(self.parts, other.parts, strict=True)
        scores = {stream: dict(found) for stream, found in self.path_scores.items()}
        for stream, found in other.path_scores.items():
            for name, theirs in found.items():
                # A copy, since `self` must stay as it is.
                scores[stream][name] = scores[stream][name].clone()
                scores[stream][name][whole_B] = theirs.to(scores[stream][name].dtype)
        return replace(
            self,
            parts=tuple(mine.where(whole_B, theirs) for mine, theirs in pairs),
            path_scores=scores,
        )


class Objective(Protocol):
    """A method. The keys of its section are the fields of the class, a frozen pydantic dataclass
    (`Keys` below has those that all of them share)."""

    # Properties, here and below: the fields of a frozen record can stand for them.
    @property
    def name(self) -> str: ...

    @property
    def norm(self) -> Norm: ...

    @property
    def norm_constant(self) -> float | None: ...

    @property
    def denominator(self) -> Literal["nominal", "effective"]: ...

    def draws(self) -> Draws:
        """Say what a step samples."""
        ...

    def needs(self) -> frozenset[Score]:
        """Say which log-probs `terms` or its live parts read. The policy's of part `target` come as
        `u_BP` of the stream, all others as `ScoredBatch.logps`."""
        ...

    def terms(self, batch: ScoredBatch, state: Mapping[str, Any], /) -> Terms:
        """Make the loss of a step. A pure function: `state` is the `Terms.state` of the step
        before, {} at first. It holds values that JSON has, and is saved in every checkpoint."""
        ...

    def at(self, step: int, /) -> Objective:
        """Give the objective of this step, from 0: schedules of keys go this one way."""
        ...

    def notes(self) -> Iterator[str]:
        """Say what a user should know before trusting the curves."""
        ...


@dataclass(frozen=True, config=STRICT)
class Keys:
    """Keys of every objective, and the answers of one that is the same at every step."""

    name: str = ""
    """The method."""
    norm: Norm = "const"
    """What a path's weight is divided by, besides the number of paths. `const`: norm_constant.
    `seq_sum`: nothing. `seq_mean`: its length. `token_mean`: tokens of the whole stream instead."""
    norm_constant: PositiveFloat | None = None
    """C of `const`; null: rollout.max_new_tokens / 4."""
    denominator: Literal["nominal", "effective"] = "nominal"
    """Divide by all questions of the update (`nominal`), or by those that have a gradient
    (`effective`)."""

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread("norm_constant", {"norm": ("seq_sum", "seq_mean", "token_mean")}),
    )

    def __post_init__(self) -> None:
        refuse_unread(self)

    def at(self, _step: int, /) -> Any:
        # The object itself: by it `at_step` sees that nothing has changed.
        return self

    def bounds(self) -> Mapping[str, tuple[int, ...]]:
        """Say which keys hold numbers of tokens that a path's are compared with."""
        return {}

    def notes(self) -> Iterator[str]:
        return iter(())


@dataclass(frozen=True, config=STRICT)
class ClipKeys(Keys):
    """Keys of an objective whose weights are of the policy that drew the paths: what corrects the
    later updates of a rollout (`Term.later`)."""

    # PPO's range, arXiv 1707.06347.
    clip_low: Share = 0.2
    """The ratio of later updates of a rollout is clipped below 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """That ratio is clipped above 1 + clip_high."""

    def clipped(self) -> Surrogate:
        """The loss of each token: -min(r A, clip(r) A)."""
        return Surrogate(low=1 - self.clip_low, high=1 + self.clip_high)


@dataclass(frozen=True, config=STRICT)
class GroupKeys(ClipKeys):
    """Keys of an objective that compares the paths of a question by z-score."""

    eps: PositiveFloat = 1e-6
    """Added to the standard deviation of the z-score."""
    # torch and verl divide by G - 1: their advantages are smaller by sqrt((G - 1) / G).
    ddof: Annotated[int, Field(ge=0, le=1)] = 0
    """0: divide the variance of the group by G; 1: by G - 1."""
    std_gate: NonNegativeFloat = 0.0
    """Give no gradient to groups whose score has a smaller standard deviation than this (0:
    never)."""


@dataclass(frozen=True, config=STRICT)
class EtaKeys(GroupKeys):
    """Keys of an objective with a length factor."""

    eta_clip: Clip | None = None
    """Clip the length factor to (low, high); null: no clip."""


def scores_answers(objective: Objective) -> bool:
    """The reference answer is scored behind every path: U."""
    return any(score.part == "target" and score.who == "policy" for score in objective.needs())


def reference_rows(objective: Objective) -> int:
    """Count the rows of a question that the reference policy scores, one per path and score."""
    return _rows(objective, [score for score in objective.needs() if score.who == "reference"])


def policy_rows(objective: Objective) -> int:
    """Count the rows of a question that trained policies score beside U, one per path and score."""
    # At most: a thought is cut early only where it states the answer.
    needs = [s for s in objective.needs() if s.who != "reference"]
    return _rows(objective, [s for s in needs if s.part != "target" or s.view == "early"])


def _rows(objective: Objective, scores: Iterable[Score]) -> int:
    # What a score costs: a row of every path of its stream, so a forward of prompt and path.
    counts = {stream: count for stream, _, count in objective.draws().plan}
    return sum(counts[score.stream] for score in scores)


def reads_reference(objective: Objective) -> bool:
    """The frozen reference policy is asked: for log-probs, or for paths."""
    needed = any(score.who == "reference" for score in objective.needs())
    return needed or objective.draws().reference > 0

"""The frozen records that walk between the stages: from a JSONL line to a gradient.

    Question -> PromptedQuestion -> SampleRequest -> Path -> ScoredPaths -> ScoredBatch
    -> Terms -> TrainRow -> PackedBatch

Shape suffixes of the whole project:

    B  questions of one step       G  posterior paths of a question   N  prior paths of a question
    P  paths of either stream, G or N
    T  tokens of a packed batch    S  sequences of a packed batch     D  hidden size   V  vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from vpgea_fast.names import Part, PathKey, Score, Stream, Trained, View

Finish = Literal["stop", "length", "error"]
"""Why sampling ended: a stop token, the token limit, or a failed request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One line of the data set; `variants` are other spellings of the answer, `responses` solutions
    or whole responses that the data gives, `solution` what a teacher's prompt may show, `subject`
    and `level` what a benchmark's numbers are broken down by, `file` and `place` tell where it
    stands.

    >>> Question(id="gsm-17", text="What is 1/2?", answer="0.5", variants=(r"\\frac12",)).answer
    '0.5'
    """

    id: str
    text: str
    answer: str
    variants: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    solution: str = ""
    subject: str | None = field(default=None, compare=False)
    level: str | int | None = field(default=None, compare=False)
    file: str = field(default="", compare=False)
    place: str = field(default="", compare=False)

    @property
    def spellings(self) -> tuple[str, ...]:
        """All that counts as the answer, the reference answer first."""
        return self.answer, *self.variants


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptedQuestion:
    """A question with the token ids of everything that is ever put around a thought.

    `student_ids` is a function of (template, question text, fields) alone; only `teacher_ids` and
    `target_ids` know the answer. `cue_ids` leads from the end of the thought to the answer that
    `target_ids` spells, for scoring: score sequence = student_ids + z + cue_ids + target_ids,
    with `close_ids` behind a z that was cut. All are 1-D int64 tensors on the CPU. `variant_ids`
    spell the other accepted answers. `fields` are the values that an objective put into both
    prompts (`Draws.fields`).

    >>> q = Question(id="q0", text="2 + 2 = ?", answer="4")
    >>> ids = torch.tensor
    >>> both = {"student_ids": ids([1, 5]), "teacher_ids": ids([1, 5, 9])}
    >>> end = {"close_ids": ids([9]), "cue_ids": ids([7]), "target_ids": ids([8])}
    >>> PromptedQuestion(question=q, **both, **end).context("student").tolist()
    [1, 5]
    """

    question: Question
    student_ids: Tensor
    teacher_ids: Tensor
    close_ids: Tensor
    cue_ids: Tensor
    target_ids: Tensor
    variant_ids: tuple[Tensor, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return self.question.file

    def context(self, view: View) -> Tensor:
        # Both end in the same opening of the thought, so the ids of z fit behind either.
        return self.student_ids if view == "student" else self.teacher_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One path to sample. `seed` is a pure function of (run seed, step, question, stream, index);
    `asked` is its question with prompts of its own (`Path.asked`), which no engine reads. `step` is
    the training step, from 0; None for what is no path of one: an evaluation, an answer, a probe.

    >>> who = {"question_id": "q0", "stream": "prior", "index": 3}
    >>> SampleRequest(**who, prompt_ids=torch.tensor([1, 5]), seed=11).index
    3
    """

    question_id: str
    stream: Stream
    index: int
    prompt_ids: Tensor
    seed: int
    asked: PromptedQuestion | None = None
    step: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """An answer sampled behind a thought to score it, in the student's view: ids (m,) int64, and
    whether it is right.

    >>> Attempt(ids=torch.tensor([7]), right=True).right
    True
    """

    ids: Tensor
    right: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """One sampled reasoning path: token ids as the engine drew them, never re-tokenised text.

    z_ids      (len,) int64: the thought, up to and including the first think-close token
    logps      (len,) float32: sampling log-prob of each z token, nats, at the sampling temperature
    answer_ids (m,) int64: what followed the thought (empty unless full answers are sampled)
    answer_logps (m,) float32: their sampling log-probs; None where the engine gives none
    closed     the thought ends in the think-close token
    finish     "length": the token limit cut the sample; "error": the engine gave it up
    asked      its question with prompts of its own, where the objective gives it fields
    attempts   answers sampled behind a closed thought, where the objective asks (`Draws.attempts`)
    share      its weight within its question as a record has it; None: no record has one

    >>> who = {"question_id": "q0", "stream": "prior", "index": 0}
    >>> ids = {"z_ids": torch.tensor([4, 9]), "answer_ids": torch.tensor([7])}
    >>> p = Path(**who, **ids, logps=torch.zeros(2), closed=True, finish="stop")
    >>> p.length, p.truncated
    (2, False)
    """

    question_id: str
    stream: Stream
    index: int
    z_ids: Tensor
    logps: Tensor
    answer_ids: Tensor
    closed: bool
    finish: Finish
    answer_logps: Tensor | None = None
    asked: PromptedQuestion | None = None
    attempts: tuple[Attempt, ...] = ()
    share: float | None = None

    @property
    def key(self) -> PathKey:
        # Texts and a number: JSON has them, and they are equal on every process.
        return self.question_id, self.stream, self.index

    @property
    def length(self) -> int:
        """Thought tokens, think-close included; at least 1: it stands in a denominator."""
        return max(1, self.z_ids.numel())

    @property
    def generated(self) -> int:
        """All sampled tokens, thought and answer."""
        # What eps3 divides by, and what a step pays for; prompts are shared and not counted.
        return self.z_ids.numel() + self.answer_ids.numel()

    @property
    def truncated(self) -> bool:
        return self.finish == "length"

    @property
    def response_ids(self) -> Tensor:
        """Thought and answer, (len + m,) int64."""
        return torch.cat([self.z_ids, self.answer_ids])

    @property
    def response_logps(self) -> Tensor:
        """The sampler's log-probs of thought and answer, (len + m,) float32; NaN if not known."""
        # NaN, not 0: a log-prob of 0 would pass for a token that was certain.
        answer = self.answer_logps
        if answer is None:
            answer = torch.full(self.answer_ids.shape, torch.nan)
        return torch.cat([self.logps, answer])


Groups = tuple[tuple[Path, ...], ...]
"""The paths of every question of a step, in the order of the questions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPaths:
    """One stream of a step: paths[b][i] of every question, and a column per fact about them.

    u_BP        (B, P) float64: log P(y*|x, z) in the student view, nats; NaN where it is not scored
    length_BP   (B, P) float64: thought tokens
    closed_BP   (B, P) bool: the thought ended by itself
    correct_BP  (B, P) float64: 1 or 0; NaN where no answer was verified
    texts       (B, P) the decoded thoughts without their close, where the objective reads them
                (`Draws.texts`)
    stated_BP   (B, P) int64: tokens of the thought until it first states the answer, 0 where it
                never does; where the objective reads them (`Draws.stated`)
    behind_BP   (B, P) int64: tokens of the answers sampled behind the thought to score it; None:
                none

    On the CPU. A stream that the objective does not sample has (B, 0) matrices. A new column is a
    field here, a value in `Collector.score` and a reader.

    >>> u, no = torch.tensor([[-1.0]]), torch.tensor([[False]])
    >>> one = ScoredPaths(paths=((),), u_BP=u, length_BP=u + 3, closed_BP=no, correct_BP=-u)
    >>> one.join(one).select([1]).u_BP.tolist()
    [[-1.0]]
    """

    paths: Groups
    u_BP: Tensor
    length_BP: Tensor
    closed_BP: Tensor
    correct_BP: Tensor
    texts: tuple[tuple[str, ...], ...] | None = None
    stated_BP: Tensor | None = None
    behind_BP: Tensor | None = None

    @property
    def generated(self) -> int:
        """All tokens that were sampled for these paths."""
        behind = 0 if self.behind_BP is None else int(self.behind_BP.sum())
        return sum(path.generated for path in self.flat) + behind

    @property
    def accuracy(self) -> Tensor:
        """Share of each path's attempts that are right, (B, P) float64; 0 of a path without any."""
        shares = [sum(a.right for a in p.attempts) / max(1, len(p.attempts)) for p in self.flat]
        return self.length_BP.new_tensor(shares).view_as(self.length_BP)

    @property
    def flat(self) -> list[Path]:
        """All paths, question after question."""
        # In the order of a flattened (B, P) column, which every reader relies on.
        return [path for group in self.paths for path in group]

    def select(self, keep: Sequence[int]) -> ScoredPaths:
        """The paths of the questions at these places."""
        return _select(self, keep)

    def join(self, other: ScoredPaths) -> ScoredPaths:
        """Both streams as one, the questions of `other` last."""
        return _join(self, other)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch:
    """A step's questions, all streams of their paths and all that an objective may look at.

    lost_B          (B,) int64: paths of each question that the engine gave up, and one more where
                    it gave up an answer sampled to score a path
    posterior_view  the prompt that the posterior paths were drawn from
    posterior_who   whose weights drew them
    token_limit     tokens that a path may have, thought and answer; 0: not known
    logps           what `Objective.needs` asked for: a score -> path -> (tokens,) float64
    reference       paths that the reference policy drew in the student view; None: it drew none
    replaced        questions without a gradient that others of this batch came for
                    (train.resample_rounds), of which nothing is trained or in a mean

    >>> none = torch.zeros(0, 2)
    >>> stream = ScoredPaths(
    ...     paths=(), u_BP=none, length_BP=none, closed_BP=none > 0, correct_BP=none
    ... )
    >>> lost = torch.zeros(0, dtype=torch.int64)
    >>> ScoredBatch(questions=(), posterior=stream, prior=stream, lost_B=lost).tokens
    0
    """

    questions: tuple[PromptedQuestion, ...]
    posterior: ScoredPaths
    prior: ScoredPaths
    lost_B: Tensor
    posterior_view: View = "teacher"
    token_limit: int = 0
    logps: Mapping[Score, Mapping[PathKey, Tensor]] = field(default_factory=dict)
    reference: ScoredPaths | None = None
    replaced: ScoredBatch | None = None
    posterior_who: Trained = "policy"

    @property
    def streams(self) -> dict[Stream, ScoredPaths]:
        """Name -> paths, of the streams that there are."""
        named: dict[Stream, ScoredPaths] = {"posterior": self.posterior, "prior": self.prior}
        return named if self.reference is None else {**named, "reference": self.reference}

    @property
    def whole(self) -> ScoredBatch | None:
        """The questions of which nothing was lost, the only ones with a gradient or in a mean;
        None if there are none."""
        places = (self.lost_B == 0).nonzero()[:, 0].tolist()
        return self.select(places) if places else None

    @property
    def tokens(self) -> int:
        """Tokens that were sampled for these questions: thoughts, answers, and the answers that
        score a thought."""
        return sum(columns.generated for columns in self.streams.values())

    def stream(self, name: Stream) -> ScoredPaths:
        # KeyError for one that was not drawn: an empty stand-in would have a mean of its own.
        return self.streams[name]

    def drawn_in(self, stream: Stream) -> View:
        """The prompt that the paths of a stream were drawn from."""
        # The reference policy too draws from the student's prompt.
        return self.posterior_view if stream == "posterior" else "student"

    def drawn_by(self, stream: Stream) -> Trained:
        """Whose weights drew the paths of a stream; those of `reference` nobody's who is trained,
        and the policy's stand for them."""
        return self.posterior_who if stream == "posterior" else "policy"

    def token_counts(self, stream: Stream, part: Part) -> Tensor:
        """Tokens of a part of every path of a stream, (B, P) float64; at least 1 each, since they
        stand in denominators."""
        columns = self.stream(stream)
        # The thought's are a column already: its lengths are what eta and the baselines use too.
        if part == "thought":
            return columns.length_BP
        if part == "target":
            counts = [
                [q.target_ids.numel()] * len(g)
                for q, g in zip(self.questions, columns.paths, strict=True)
            ]
        else:
            whole = part == "response"
            counts = [
                # `whole` is 0 for an answer alone.
                [whole * p.z_ids.numel() + p.answer_ids.numel() for p in g]
                for g in columns.paths
            ]
        return torch.tensor(counts, dtype=torch.float64).view_as(columns.length_BP).clamp(min=1.0)

    def pairs(self, stream: Stream) -> list[tuple[PromptedQuestion, Path]]:
        """Every path of a stream with its question, in the order of the batch."""
        return with_questions(self.questions, self.stream(stream).paths)

    def select(self, keep: Sequence[int]) -> ScoredBatch:
        """The questions at these places, with all that belongs to them."""
        return _select(self, keep)

    def join(self, other: ScoredBatch) -> ScoredBatch:
        """Both batches as one, the questions of `other` last."""
        return _join(self, other)


def with_questions(
    questions: Sequence[PromptedQuestion], groups: Groups
) -> list[tuple[PromptedQuestion, Path]]:
    """Every path of the groups with its question as the path was asked it, in their order."""
    return [
        # With fields of an objective a path was asked in a prompt of its own.
        (path.asked or q, path)
        for q, group in zip(questions, groups, strict=True)
        for path in group
    ]


Columns = TypeVar("Columns", ScoredPaths, ScoredBatch)
"""A record whose every field has one entry per question."""


def _select(record: Columns, keep: Sequence[int]) -> Columns:
    def chosen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[list(keep)]
        if isinstance(value, ScoredPaths):
            return _select(value, keep)
        # Log-probs stay whole: they are found by a path's key, which a cut does not change.
        return tuple(value[i] for i in keep) if isinstance(value, tuple) else value

    return replace(record, **{f.name: chosen(getattr(record, f.name)) for f in fields(record)})


def _join(record: Columns, other: Columns) -> Columns:
    def joined(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            return torch.cat([a, b])
        if isinstance(a, ScoredPaths):
            return _join(a, b)
        if isinstance(a, Mapping):  # a score -> what each batch has of it
            return {key: {**a[key], **b[key]} for key in a}
        # A fact of the step (its view, its token limit) is the same in both.
        return (*a, *b) if isinstance(a, tuple) else a

    # By field: a new column is selected and joined without a line here.
    columns = {f.name: (getattr(record, f.name), getattr(other, f.name)) for f in fields(record)}
    return replace(record, **{name: joined(*pair) for name, pair in columns.items()})


class Live(Protocol):
    """The loss of each token of a path, of log-probs that change while the path stays.

    The log-probs now, before the first update of these paths, and of the reference policy are
    (n,) float64, n the tokens of one path. The result is (n,), differentiable in `now`. Its
    gradient is `weight` on every token where now equals old and there is no reference. `weight` is
    a number, or (n,) where the term adds to the thought's last token (`Term.close_BP`).
    """

    @property
    def reference(self) -> bool:
        """It reads the log-probs of the reference policy."""
        ...

    def __call__(
        self, weight: float | Tensor, now: Tensor, old: Tensor, reference: Tensor | None
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRow:
    """A context, tokens after it, and one coefficient per token: all that the trainer knows of an
    objective.

    gradient of the row = that of sum_t coef[t] * log p(token_ids[t] | context_ids, token_ids[:t]).
    That sum is the loss, unless it is `live` or the path `distilled`: drawn under another prompt.
    Its log-prob there is subtracted then, sg log q(token_ids[t]), a constant for the log alone.
    `path` tells which rows are one path; `sample_logps` are the sampler's log-probs. `who` says
    whose weights score and train it.

    live   the loss of log-probs of the moment, times scale * factor; coef is its derivative
    old    log-probs before the first update of these paths; reference: of the reference policy

    >>> ids = {"context_ids": torch.tensor([1, 5]), "token_ids": torch.tensor([4, 9])}
    >>> TrainRow(**ids, coef=torch.full((2,), -0.5), stream="posterior", view="teacher").tokens
    4
    """

    # (c,) and (n,) int64, on the CPU until they are packed.
    context_ids: Tensor
    token_ids: Tensor
    # (n,), float64 where the row is trained.
    coef: Tensor
    stream: Stream
    view: View
    term: str = "pg"
    distilled: bool = False
    sample_logps: Tensor | None = None
    path: PathKey | None = None
    live: Live | None = None
    weight: float | Tensor = 0.0
    scale: float = 1.0
    factor: Tensor | None = None
    old: Tensor | None = None
    reference: Tensor | None = None
    who: Trained = "policy"

    @property
    def tokens(self) -> int:
        """Tokens that go through the model for this row."""
        return self.context_ids.numel() + self.token_ids.numel()

    @property
    def weighted(self) -> bool:
        """Some token has a weight: the row is more than held to the reference policy."""
        return bool(torch.as_tensor(self.weight).ne(0).any())

    def loss(self, now: Tensor) -> Tensor:
        """Each token's part of the loss, (n,) float64, from the log-probs (n,) of the moment."""
        if self.live is None:
            return self.coef * now
        # Detached: this is for the log, and the coefficients carry the gradient.
        return self._scaled(self._alive(now.detach()))

    def at(self, now: Tensor) -> TrainRow:
        """The row with the coefficients of the moment, from its tokens' log-probs (n,)."""
        if self.live is None:
            return self
        # A graph over one number per token: the model's own pass takes the derivative as it is.
        with torch.enable_grad():
            leaf = now.detach().clone().requires_grad_()
            loss = self._alive(leaf)
            if not loss.requires_grad:
                raise ValueError(
                    f"objective, term {self.term!r}: live returned a constant, expected a loss of "
                    "the log-probs now"
                )
            (slope,) = torch.autograd.grad(loss.sum(), leaf)
        return replace(self, coef=self._scaled(slope))

    def _alive(self, now: Tensor) -> Tensor:
        assert self.live is not None
        # Not scored before: then this is the policy that drew the paths, and every ratio is 1.
        old = now.detach() if self.old is None else self.old
        loss = self.live(self.weight, now, old, self.reference)
        if loss.shape != now.shape:
            raise ValueError(
                f"objective, term {self.term!r}: live returned {tuple(loss.shape)}, expected a "
                f"number per token {tuple(now.shape)}"
            )
        return loss

    def _scaled(self, values: Tensor) -> Tensor:
        # Of the whole loss: the hold to a reference has the normaliser of its term too.
        values = values * self.scale
        return values if self.factor is None else values * self.factor


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Rows laid end to end, with no padding. The last token of a row is only a target, so it never
    enters the model.

    input_ids, position_ids (T,) int64
    seqlens      the S lengths as Python ints: splitting by them must not cost a host sync
    cu_seqlens   (S + 1,) int32, 0 = first < ... < last = T: the same for a GPU kernel
    logit_index  (R,) int64: positions in T whose hidden state predicts a target
    targets      (R,) int64        coef (R,) float64

    >>> from vpgea_fast.packing import pack_rows
    >>> ids = {"context_ids": torch.tensor([1, 5]), "token_ids": torch.tensor([4, 9])}
    >>> row = TrainRow(**ids, coef=torch.ones(2), stream="prior", view="student")
    >>> batch = pack_rows([row])
    >>> batch.input_ids.tolist(), batch.logit_index.tolist(), batch.targets.tolist()
    ([1, 5, 4], [1, 2], [4, 9])
    >>> batch.cu_seqlens.tolist()
    [0, 3]
    """

    input_ids: Tensor
    position_ids: Tensor
    seqlens: tuple[int, ...]
    cu_seqlens: Tensor
    logit_index: Tensor
    targets: Tensor
    coef: Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy the batch to `device`: the one place where tensors move there."""
        # seqlens stay Python numbers; the copies are asynchronous where the source is pinned.
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one step did: `metrics` is its line in metrics.jsonl; `skipped` says why there was no
    update, if there was none.

    >>> StepStats(metrics={"step": 3, "len_prior": 51.0}, skipped="no path has a gradient").skipped
    'no path has a gradient'
    """

    metrics: dict[str, float | int | str | bool | None]
    skipped: str | None = None

"""The frozen records that walk between the stages: from a JSONL line to a gradient.

    Question -> PromptedQuestion -> SampleRequest -> Path -> ScoredBatch -> TrainRow -> PackedBatch

Shape suffixes of the whole project:

    B  questions of one step       G  posterior paths of a question   N  prior paths of a question
    T  tokens of a packed batch    S  sequences of a packed batch     D  hidden size   V  vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

Stream = Literal["posterior", "prior"]
"""Who sampled a path: the teacher view (posterior q, sees the answer) or the student view (prior
pi)."""

View = Literal["teacher", "student"]
"""Under which prompt tokens are conditioned: T(x, y*) or S(x)."""

Finish = Literal["stop", "length", "error"]
"""Why sampling ended: a stop token, the token limit, or a failed request."""


@dataclass(frozen=True)
class Question:
    """One line of the data set; `variants` are other spellings of the answer, `file` and `place`
    tell where it stands.

    >>> Question(id="gsm-17", text="What is 1/2?", answer="0.5", variants=(r"\\frac12",)).answer
    '0.5'
    """

    id: str
    text: str
    answer: str
    variants: tuple[str, ...] = ()
    file: str = field(default="", compare=False)
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptedQuestion:
    """A question with the token ids of everything that is ever put around a thought.

    `student_ids` is a function of (template, question text) alone; only `teacher_ids` and
    `target_ids` know the answer. `cue_ids` leads from the end of the thought to the answer that
    `target_ids` spells, for scoring: score sequence = student_ids + z + cue_ids + target_ids. All
    are 1-D int64 tensors on the CPU. `variant_ids` spell the other accepted answers.

    >>> q = Question(id="q0", text="2 + 2 = ?", answer="4")
    >>> ids = torch.tensor
    >>> PromptedQuestion(q, ids([1, 5]), ids([1, 5, 9]), ids([7]), ids([8])).student_ids.tolist()
    [1, 5]
    """

    question: Question
    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    cue_ids: torch.Tensor
    target_ids: torch.Tensor
    variant_ids: tuple[torch.Tensor, ...] = ()

    @property
    def file(self) -> str:
        return self.question.file

    def context(self, view: View) -> torch.Tensor:
        return self.student_ids if view == "student" else self.teacher_ids


@dataclass(frozen=True)
class SampleRequest:
    """One path to sample. `seed` is a pure function of (run seed, step, question, stream, index).

    >>> SampleRequest("q0", "prior", 3, torch.tensor([1, 5]), seed=11).index
    3
    """

    question_id: str
    stream: Stream
    index: int
    prompt_ids: torch.Tensor
    seed: int


@dataclass(frozen=True)
class Path:
    """One sampled reasoning path: token ids as the engine drew them, never re-tokenised text.

    z_ids      (len,) int64: the thought, up to and including the first think-close token
    logps      (len,) float32: sampling log-prob of each z token, nats, at the sampling temperature
    answer_ids (m,) int64: what followed the thought (empty unless full answers are sampled)
    closed     the thought ends in the think-close token
    finish     "length": the token limit cut the sample; "error": the engine gave it up

    >>> z, answer = torch.tensor([4, 9]), torch.tensor([7])
    >>> p = Path("q0", "prior", 0, z, torch.zeros(2), answer, closed=True, finish="stop")
    >>> p.length, p.truncated
    (2, False)
    """

    question_id: str
    stream: Stream
    index: int
    z_ids: torch.Tensor
    logps: torch.Tensor
    answer_ids: torch.Tensor
    closed: bool
    finish: Finish

    @property
    def length(self) -> int:
        """Thought tokens, think-close included; at least 1: it stands in a denominator."""
        return max(1, self.z_ids.numel())

    @property
    def generated(self) -> int:
        """All sampled tokens, thought and answer."""
        return self.z_ids.numel() + self.answer_ids.numel()

    @property
    def truncated(self) -> bool:
        return self.finish == "length"


Groups = tuple[tuple[Path, ...], ...]
"""The paths of every question of a step, in the order of the questions."""


@dataclass(frozen=True)
class ScoredBatch:
    """A step's questions, their paths and all that an objective may look at; float64 on the CPU.

    posterior[b][i] and prior[b][j] are paths; u_post_BG, u_prior_BN their log P(y*|x, z) in the
    student view (an objective without a stream has a (B, 0) matrix there); len_* count thought
    tokens; closed_* tell whether the thought ended by itself; correct_* are 1 / 0, or NaN where no
    answer was verified. answers_lost_B: the engine gave up an answer sampled to score a path.

    >>> one = torch.tensor([[0.0, -1.0]])
    >>> none, kept = torch.zeros(1, 0), torch.tensor([False])
    >>> u = one, none, one.exp(), none, one > -1, none > 0, one, none
    >>> batch = ScoredBatch((), (), (), *u, kept)
    >>> batch.u_post_BG.shape
    torch.Size([1, 2])
    """

    questions: tuple[PromptedQuestion, ...]
    posterior: Groups
    prior: Groups
    u_post_BG: torch.Tensor
    u_prior_BN: torch.Tensor
    len_post_BG: torch.Tensor
    len_prior_BN: torch.Tensor
    closed_post_BG: torch.Tensor
    closed_prior_BN: torch.Tensor
    correct_post_BG: torch.Tensor
    correct_prior_BN: torch.Tensor
    answers_lost_B: torch.Tensor

    @property
    def lost(self) -> torch.Tensor:
        """Paths of each question that the engine gave up, and one for lost answers; (B,) int64."""
        paths = [
            sum(path.finish == "error" for path in (*posterior, *prior))
            for posterior, prior in zip(self.posterior, self.prior, strict=True)
        ]
        return torch.tensor(paths, dtype=torch.int64) + self.answers_lost_B

    @property
    def whole(self) -> ScoredBatch | None:
        """The questions of which nothing was lost, the only ones with a gradient or in a mean;
        None if there are none."""
        places = (self.lost == 0).nonzero()[:, 0].tolist()
        return self.select(places) if places else None

    @property
    def tokens(self) -> int:
        """Tokens that were sampled for these questions, thoughts and answers."""
        return sum(
            p.generated for groups in (self.posterior, self.prior) for g in groups for p in g
        )

    def pairs(self, stream: Stream) -> list[tuple[PromptedQuestion, Path]]:
        """Every path of a stream with its question, in the order of the batch."""
        groups = self.posterior if stream == "posterior" else self.prior
        return [(q, p) for q, group in zip(self.questions, groups, strict=True) for p in group]

    def select(self, keep: Sequence[int]) -> ScoredBatch:
        """The questions at these places, with all that belongs to them."""
        chosen: dict[str, Any] = {
            name: value[list(keep)]
            if isinstance(value, torch.Tensor)
            else tuple(value[i] for i in keep)
            for name, value in vars(self).items()
        }
        return ScoredBatch(**chosen)

    def join(self, other: ScoredBatch) -> ScoredBatch:
        """Both batches as one, the questions of `other` last."""
        joined: dict[str, Any] = {
            name: torch.cat([a, b]) if isinstance(a, torch.Tensor) else (*a, *b)
            for (name, a), b in zip(vars(self).items(), vars(other).values(), strict=True)
        }
        return ScoredBatch(**joined)


@dataclass(frozen=True)
class Coefficients:
    """What an objective says: for every (stream of the path, view of the context) one weight a
    path.

    `weights[stream, view]` is (B, G) or (B, N) float64: the gradient of the minimised loss is sum
    over paths of weight * w * grad log p(z | view), with w the normaliser (a negative weight makes
    a path likelier). `utility` and friends are only for the log: name -> matrix of the same shape
    as the posterior (or prior) paths.

    >>> weights = {("prior", "student"): torch.tensor([[-1.0, 1.0]])}
    >>> Coefficients(weights, path_scores={}, metrics={}).weights["prior", "student"].sum().item()
    0.0
    """

    weights: dict[tuple[Stream, View], torch.Tensor]
    path_scores: dict[Stream, dict[str, torch.Tensor]]
    metrics: dict[str, float | None]

    @property
    def alive(self) -> torch.Tensor:
        """Which questions have a gradient: any weight other than zero; (B,) bool."""
        used = [weights.ne(0).any(dim=1) for weights in self.weights.values()]
        return torch.stack(used).any(dim=0)


PathKey = tuple[str, Stream, int]
"""Question, stream and index: what tells a path from all others of its step."""


@dataclass(frozen=True)
class TrainRow:
    """A context, tokens after it, and one coefficient a token: all that the trainer knows of an
    objective.

    gradient of the row = that of sum_t coef[t] * log p(token_ids[t] | context_ids, token_ids[:t]).
    That sum is the loss in the view that the path was drawn in. In another view the path is
    distilled: there its own log-prob is subtracted, sg log q(token_ids[t]), a constant for the log
    alone. `path` tells which rows are one path; `sample_logps` are the sampler's log-probs.

    >>> context, tokens = torch.tensor([1, 5]), torch.tensor([4, 9])
    >>> TrainRow(context, tokens, torch.tensor([-0.5, -0.5]), "posterior", "teacher").tokens
    4
    """

    context_ids: torch.Tensor
    token_ids: torch.Tensor
    coef: torch.Tensor
    stream: Stream
    view: View
    sample_logps: torch.Tensor | None = None
    path: PathKey | None = None

    @property
    def own_view(self) -> bool:
        """The tokens are scored under the prompt that they were sampled from."""
        return (self.stream, self.view) in {("posterior", "teacher"), ("prior", "student")}

    @property
    def tokens(self) -> int:
        """Tokens that go through the model for this row."""
        return self.context_ids.numel() + self.token_ids.numel()


@dataclass(frozen=True)
class PackedBatch:
    """Rows laid end to end, with no padding. The last token of a row is only a target, so it never
    enters the model.

    input_ids, position_ids (T,) int64
    seqlens      the S lengths as Python ints: splitting by them must not cost a host sync
    cu_seqlens   (S + 1,) int32, 0 = first < ... < last = T: the same for a GPU kernel
    logit_index  (R,) int64: positions in T whose hidden state predicts a target
    targets      (R,) int64        coef (R,) float64

    >>> from vpgea_fast.packing import pack_rows
    >>> context, tokens = torch.tensor([1, 5]), torch.tensor([4, 9])
    >>> batch = pack_rows([TrainRow(context, tokens, torch.ones(2), "prior", "student")])
    >>> batch.input_ids.tolist(), batch.logit_index.tolist(), batch.targets.tolist()
    ([1, 5, 4], [1, 2], [4, 9])
    >>> batch.cu_seqlens.tolist()
    [0, 3]
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    seqlens: tuple[int, ...]
    cu_seqlens: torch.Tensor
    logit_index: torch.Tensor
    targets: torch.Tensor
    coef: torch.Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`: the one place where tensors move there."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


@dataclass(frozen=True)
class ModelFlops:
    """Arithmetic of a decoder per document: what MFU counts, and what work is balanced by.

    decoder  parameters that a token is multiplied with, the embedding and the head left out
    head     those of the head, tied or not
    width    layers x heads x head size: a token's query, over all layers

    A document of l tokens costs 6 (decoder + head) l + 6 width l^2 in training and a third of it in
    a forward: two operations a multiply-add, a backward of two forwards, the causal half of the
    attention, nothing for padding, recomputation or the embedding. Sliding windows are not
    discounted.

    >>> ModelFlops(decoder=10, head=2, width=1).row(4)
    384
    """

    decoder: int
    head: int
    width: int

    def row(self, length: int, head_rows: int | None = None) -> int:
        """Operations of a document's forward and backward; `head_rows` as in `forward_row`."""
        return 3 * self.forward_row(length, head_rows)

    def rows(self, lengths: Iterable[int], head_rows: Iterable[int] | None = None) -> int:
        return 3 * self.forward_rows(lengths, head_rows)

    def forward_row(self, length: int, head_rows: int | None = None) -> int:
        """Operations of a forward whose head runs on `head_rows` of the tokens (None: on all)."""
        head_rows = length if head_rows is None else head_rows
        return 2 * (self.decoder * length + self.head * head_rows + self.width * length**2)

    def forward_rows(self, lengths: Iterable[int], head_rows: Iterable[int] | None = None) -> int:
        if head_rows is None:
            return sum(map(self.forward_row, lengths))
        return sum(self.forward_row(*pair) for pair in zip(lengths, head_rows, strict=True))


@dataclass(frozen=True)
class StepStats:
    """What one step did: `metrics` is its line in metrics.jsonl; `skipped` says why there was no
    update, if there was none.

    >>> StepStats(metrics={"step": 3, "len_prior": 51.0}, skipped="no path has a gradient").skipped
    'no path has a gradient'
    """

    metrics: dict[str, float | int | str | bool | None]
    skipped: str | None = None

"""Terms of an objective -> training rows, with the normaliser of the whole update folded in.

loss = sum over rows of sum_t coef_t log p(token_t | context), coef_t = weight_i * w_i, up to the
constants of distilled rows (`TrainRow`); w_i divides by

    seq_sum     B P                the formula of the paper literally
    const       B P C              the same direction at a length-free scale
    seq_mean    B P len_i          removes the length from the gradient of a path
    token_mean  sum_j len_j        all tokens of the stream in the update

with B questions, P paths of each, and len_i the tokens of the trained part. The updates of one
rollout share its normaliser (`Scale.updates`), as TRL's do: a mean over the tokens of a minibatch
would weigh the paths of one more than those of another. Sums stay inside and the normaliser
outside, so no split into micro-batches or ranks can change the gradient.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vpgea_fast.config import Config
from vpgea_fast.names import BEHIND, Norm
from vpgea_fast.objectives import Term, Terms
from vpgea_fast.scoring import after_thought
from vpgea_fast.types import (
    Part,
    Path,
    PathKey,
    PromptedQuestion,
    Score,
    ScoredBatch,
    TrainRow,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The normaliser of an update: see the top of the file.

    constant   C of `const`
    effective  count only the questions that have a gradient
    updates    parts that the questions are split into, an update each: a part weighs as much as
               all of them did, and every path as much as any other
    """

    norm: Norm = "const"
    constant: float = 1.0
    effective: bool = False
    updates: int = 1

    @classmethod
    def of(cls, cfg: Config) -> Scale:
        """What the objective's keys say; C is a quarter of the token limit where they do not."""
        objective = cfg.objective
        return cls(
            norm=objective.norm,
            constant=objective.norm_constant or cfg.rollout.max_new_tokens / 4,
            effective=objective.denominator == "effective",
            updates=cfg.train.minibatches,
        )


def build_rows(
    batch: ScoredBatch,
    terms: Terms,
    scale: Scale,
    *,
    ratios: Mapping[PathKey, torch.Tensor] | None = None,
    several: bool = False,
) -> list[TrainRow]:
    """One row for every path of a term that acts on it; the others do not exist.

    ratios          a factor per token for paths drawn by another sampler than the policy, under
                    every prompt alike: as many numbers as the path has tokens, or more. Of the KL
                    to a reference too, which is a mean over what the policy would draw
    several         more than one update will be made of these rows (`Term.later`)
    """
    rows = []
    for term in terms.parts:
        scale_BP = _normaliser(batch, term, terms.acting, scale)
        close_BP = torch.zeros_like(term.weight_BP) if term.close_BP is None else term.close_BP
        # Python numbers, flat in the order of the pairs: one transfer per term, not per path.
        matrices = (term.acting, term.weight_BP, close_BP, scale_BP)
        columns = zip(
            batch.pairs(term.stream), *(m.flatten().tolist() for m in matrices), strict=True
        )
        for (question, path), acting, weight, close, factor in columns:
            if not acting:
                continue
            for row, share in part_rows(question, path, term):
                if not row.token_ids.numel():
                    continue
                own = _with_close(row, path, share * weight, close)
                row = _weigh(row, term, path, weight=own, scale=factor, ratios=ratios)
                live = term.later if several and term.later else term.live
                row = replace(row, live=live, reference=_reference(batch, term, path))
                # Under another prompt, or of another model, the sampler's log-probs are no measure
                # of the trainer's.
                drawn = term.stream != "reference" and (term.view, term.who) == (
                    batch.drawn_in(term.stream),
                    batch.drawn_by(term.stream),
                )
                same = term.distilled or drawn
                rows.append(row if same else replace(row, sample_logps=None))
    return rows


def update_rows(
    cfg: Config,
    batch: ScoredBatch,
    terms: Terms,
    ratios: Mapping[PathKey, torch.Tensor] | None = None,
) -> list[list[TrainRow]]:
    """The rows of every update of a rollout, in order; epochs share theirs."""
    scale, several = Scale.of(cfg), cfg.train.updates > 1
    rows = build_rows(batch, terms, scale, ratios=ratios, several=several)
    return minibatches(batch, rows, scale.updates) * cfg.train.epochs


def minibatches(batch: ScoredBatch, rows: Sequence[TrainRow], count: int) -> list[list[TrainRow]]:
    """Split rows by question into `count` parts, in the order of the batch."""
    # By place: the questions of a step are in random order already, and a path's rows, which the
    # loss of a distilled one reads together, stay in one update.
    questions = len(batch.questions)
    part_of = {q.question.id: i * count // questions for i, q in enumerate(batch.questions)}
    return [[r for r in rows if r.path and part_of[r.path[0]] == n] for n in range(count)]


def checksum(rows: Sequence[TrainRow]) -> int:
    """A number of the rows' tokens and coefficients: processes must agree on it."""
    # Bytes, not values: NaN is unequal to itself, and -0.0 equal to 0.0.
    crc = 0
    for row in rows:
        for part in (row.context_ids, row.token_ids, row.coef.double()):
            crc = zlib.crc32(part.numpy().tobytes(), crc)
        # Only where there are two policies, so that all other sums are those of older versions.
        if row.who != "policy":
            crc = zlib.crc32(row.who.encode(), crc)
    return crc


def _with_close(row: TrainRow, path: Path, weight: float, close: float) -> float | torch.Tensor:
    """The weight, of each token where the thought's last one has a weight added."""
    if not close:
        return weight
    weights = torch.full(row.token_ids.shape, weight, dtype=torch.float64)
    # The thought comes first in the thought and in the response.
    weights[path.z_ids.numel() - 1] += close
    return weights


def _weigh(
    row: TrainRow,
    term: Term,
    path: Path,
    *,
    weight: float | torch.Tensor,
    scale: float,
    ratios: Mapping[PathKey, torch.Tensor] | None,
) -> TrainRow:
    """The row with its coefficients: those of an update whose policy drew the paths."""
    tokens = row.token_ids.shape
    # float64: the sum over 8k tokens of a row is rounded once, in the loss.
    coef = torch.ones(tokens, dtype=torch.float64) * (weight * scale)
    factor = None
    if term.factors is not None:
        factor = term.factors.get(path.key)
        # One number would be taken for all tokens, without a word.
        if factor is None or factor.shape != tokens or not factor.isfinite().all():
            got = "none" if factor is None else f"{factor.numel()} numbers"
            raise ValueError(
                f"objective, term {term.name!r}: factors of path {path.key}: got {got}; expected "
                f"{tokens[0]} finite numbers"
            )
    # What was not drawn with the path has no ratio of it.
    if ratios is not None and term.part not in BEHIND:
        # A ratio per drawn token, thought first: an answer's begin behind the thought.
        start = path.z_ids.numel() if term.part == "answer" else 0
        ratio = ratios[path.key][start:][: tokens[0]]
        factor = ratio if factor is None else factor * ratio
    if factor is not None:
        coef *= factor
    return replace(row, coef=coef, weight=weight, scale=scale, factor=factor)


def _reference(batch: ScoredBatch, term: Term, path: Path) -> torch.Tensor | None:
    """Log-probs of the term's tokens under the reference policy, where its loss reads them and they
    are known."""
    if term.live is None or not term.live.reference:
        return None
    score = Score(term.stream, term.view, term.part, "reference")
    return batch.logps.get(score, {}).get(path.key)


def drawn_rows(batch: ScoredBatch, terms: Terms) -> dict[PathKey, TrainRow]:
    """Every path that a term acts on, whole as far as it is trained, under the prompt that it was
    drawn from; no coefficients."""
    rows: dict[PathKey, TrainRow] = {}
    for term in terms.parts:
        # Behind a thought the answer is drawn too, so its log-probs are those of the response.
        part: Part = "thought" if term.part in ("thought", *BEHIND) else "response"
        # Under the prompt of the draw, by the weights that drew: others say nothing about the
        # sampler.
        drawn: dict[str, Any] = {
            "view": batch.drawn_in(term.stream),
            "who": batch.drawn_by(term.stream),
        }
        own = replace(term, part=part, live=None, later=None, distilled=False, **drawn)
        acting = term.acting.flatten().tolist()
        for (question, path), acts in zip(batch.pairs(term.stream), acting, strict=True):
            row = part_row(question, path, own)
            known = rows.get(path.key)
            # Two terms of one path share a row: the longer part holds the other's tokens.
            longer = known is None or known.token_ids.numel() < row.token_ids.numel()
            if acts and row.token_ids.numel() and longer:
                rows[path.key] = row
    return rows


def part_rows(question: PromptedQuestion, path: Path, term: Term) -> list[tuple[TrainRow, float]]:
    """The rows of a path for a term, each with its share of the path's weight: one row, but for
    `attempts`. Of those the first right ones have the same share, and equal ones are one row."""
    if term.part != "attempts":
        return [(part_row(question, path, term), 1.0)]
    context = torch.cat([question.context(term.view), path.z_ids])
    # A row costs the whole thought again, and short answers are mostly the same one.
    right = Counter([tuple(a.ids.tolist()) for a in path.attempts if a.right][: term.first])
    return [
        (_row(path, term, context, torch.tensor(ids, dtype=torch.long)), count / right.total())
        for ids, count in right.items()
    ]


def part_row(question: PromptedQuestion, path: Path, term: Term) -> TrainRow:
    """The part of a path that a term trains behind its context; coefficients zero."""
    context, logps = question.context(term.view), None
    if term.part == "thought":
        tokens, logps = path.z_ids, path.logps
    elif term.part == "response":
        tokens, logps = path.response_ids, path.response_logps
    elif term.part == "answer":
        # No close is put in: only behind a closed thought an answer is drawn.
        context, tokens = torch.cat([context, path.z_ids]), path.answer_ids
        logps = path.response_logps[path.z_ids.numel() :]
    else:
        thought = after_thought(question, term.view, path)
        context, tokens = torch.cat([thought, question.cue_ids]), question.target_ids
    return _row(path, term, context, tokens, logps=logps)


def _row(
    path: Path,
    term: Term,
    context: torch.Tensor,
    tokens: torch.Tensor,
    logps: torch.Tensor | None = None,
) -> TrainRow:
    return TrainRow(
        context_ids=context,
        token_ids=tokens,
        # The coefficients come with the weight of the path, which this row does not know.
        coef=torch.zeros(tokens.shape, dtype=torch.float64),
        stream=path.stream,
        view=term.view,
        term=term.name,
        distilled=term.distilled,
        sample_logps=logps,
        path=path.key,
        who=term.who,
    )


def truncated_ratios(
    rows: Mapping[PathKey, TrainRow], trainer: Sequence[torch.Tensor], *, cap: float
) -> tuple[dict[PathKey, torch.Tensor], dict[str, float]]:
    """min(p_trainer / p_engine, cap) of every token of `drawn_rows`, float64; the share cut.

    Importance weights for paths that the engine drew, token by token (truncated importance
    sampling, Ionides 2008): that the prefix too was drawn by the engine is left out.

    trainer: log-probs of every row's tokens under the policy that is trained.
    """
    ratios, cut = {}, [torch.zeros(0, dtype=torch.bool)]
    for (key, row), logps in zip(rows.items(), trainer, strict=True):
        assert row.sample_logps is not None
        ratio = (logps.double() - row.sample_logps.double()).exp()
        ratios[key] = ratio.clamp(max=cap)
        cut.append(ratio > cap)
    share = torch.cat(cut).double().mean().item() if rows else 0.0
    return ratios, {"importance_capped": share}


def _normaliser(
    batch: ScoredBatch, term: Term, acting_B: torch.Tensor, scale: Scale
) -> torch.Tensor:
    """w_i of every path, (B, P) float64."""
    weight_BP = term.weight_BP
    # The hold to a reference policy is a gradient too: it is divided by all that are held.
    counted_B = acting_B if scale.effective else torch.ones_like(acting_B)
    # 1 / (B P) of one update: each has 1 / updates of the questions.
    per_path = scale.updates / (counted_B.sum().clamp(min=1).double() * weight_BP.shape[1])
    if scale.norm in ("seq_sum", "const"):
        constant = scale.constant if scale.norm == "const" else 1.0
        return (per_path / constant).expand_as(weight_BP)
    # The answer behind a thought weighs as much as the thought: they are one path of the formula.
    part = "thought" if term.part in BEHIND else term.part
    tokens_BP = batch.token_counts(term.stream, part)
    if scale.norm == "seq_mean":
        return per_path / tokens_BP
    counted_BP = counted_B[:, None]
    if term.counted_BP is not None:
        counted_BP = counted_BP & term.counted_BP
    return (scale.updates / (tokens_BP * counted_BP).sum().clamp(min=1.0)).expand_as(weight_BP)

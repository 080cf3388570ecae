"""What a step's paths say about the method: lengths, utilities, accuracies, and how far the two
views are apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch

from vpgea_fast.advantage import elbo_terms
from vpgea_fast.metrics import ModelFlops, eps3, mfu
from vpgea_fast.objectives import Terms
from vpgea_fast.packing import RankPlan, plan_stats
from vpgea_fast.rollout.engine import prompt_digest
from vpgea_fast.rows import part_rows
from vpgea_fast.types import (
    Attempt,
    ScoredBatch,
    ScoredPaths,
    Stream,
    TrainRow,
    View,
)
from vpgea_fast.values import merge

HINT_NATS = 5.0
"""A token this much likelier under the teacher's prompt than under the student's comes from the
hint."""
Scored = Sequence[tuple[TrainRow, torch.Tensor]]
"""Rows, each with its log-probs just before an update."""


def batch_metrics(batch: ScoredBatch, *, given: bool = False) -> dict[str, float | None]:
    """Compute lengths, truncation and utility quantiles of every stream, and accuracies where
    answers were verified. `given`: the prior paths are responses of the data, and say nothing of
    the student."""
    if given:
        found = _stream_metrics(batch.prior, name="data", who="data")
        return {key: found[key] for key in ("len_data", "acc_data") if key in found}
    drawn = batch.reference
    return merge(
        _stream_metrics(batch.prior, name="prior", who="student"),
        _stream_metrics(batch.posterior, name="post", who="teacher"),
        {} if drawn is None else _stream_metrics(drawn, name="reference", who="reference"),
    )


def _stream_metrics(stream: ScoredPaths, *, name: str, who: str) -> dict[str, float | None]:
    """`batch_metrics` of one stream; none of a stream that is not sampled."""
    paths, length = stream.flat, stream.length_BP
    if not paths:
        return {}
    metrics: dict[str, float | None] = {
        f"len_{name}": length.mean().item(),
        # A thought that closed and whose answer was cut is whole: only its answer is missing.
        f"trunc_{name}": sum(p.truncated and not p.closed for p in paths) / len(paths),
    }
    # NaN where U is not scored; an infinite one would be the mean of all.
    finite = stream.u_BP[torch.isfinite(stream.u_BP)]
    if finite.numel():
        quantiles = finite.quantile(torch.tensor([0.1, 0.5], dtype=finite.dtype)).tolist()
        metrics |= {
            f"u_{name}": finite.mean().item(),
            f"u_{name}_p10": quantiles[0],
            f"u_{name}_p50": quantiles[1],
        }
    # A mean over the judged ones alone would be of other paths at each step.
    if not torch.isnan(stream.correct_BP).any():
        accuracy = stream.correct_BP.mean().item()
        metrics[f"acc_{who}"] = accuracy
        if who == "student":
            tokens = sum(p.generated for p in paths) / len(paths)
            metrics["eps3_student"] = eps3(accuracy, tokens)
    return metrics


def view_divergence(
    teacher: Sequence[torch.Tensor],
    student: Sequence[torch.Tensor],
    log_utility_BG: torch.Tensor,
) -> dict[str, float]:
    """Measure how far the views are apart on the posterior paths, and the ELBO (arXiv 2605.11019).

    kl_q_pi          KL(q || pi) per token; kl_q_pi_max: that of the largest token
    hint_token_rate  share of the tokens that are HINT_NATS likelier under the hint, the first of
                     each path not counted: one such token opens another way of thinking, which the
                     student is to learn; a path that leans on the hint has more of them
    entropy_*        of both views, mean over tokens
    elbo             E_q[log L + log eta] - KL(q || pi), mean over questions

    teacher, student: (2, len) of every posterior path in that view, in the order of the batch:
    log-prob and entropy of each token. log_utility_BG: log L + log eta, as the objective has it.
    """
    gaps = [q[0] - pi[0] for q, pi in zip(teacher, student, strict=True)]
    gap_T = torch.cat(gaps)  # (tokens of all posterior paths,)
    hinted = [int((gap > HINT_NATS).sum()) for gap in gaps]
    # Path log-ratios, not means over tokens: the ELBO's KL is one of whole paths.
    sums_BG = torch.stack([gap.sum() for gap in gaps]).view_as(log_utility_BG)
    terms = elbo_terms(log_utility_BG, sums_BG)
    return {
        "kl_q_pi": gap_T.mean().item(),
        "kl_q_pi_max": gap_T.max().item(),
        "entropy_teacher": torch.cat([q[1] for q in teacher]).mean().item(),
        "entropy_student": torch.cat([pi[1] for pi in student]).mean().item(),
        "hint_token_rate": sum(max(0, count - 1) for count in hinted) / gap_T.numel(),
        "elbo": terms.elbo.mean().item(),
    }


def early_answer_rate(batch: ScoredBatch, decode: Callable[[torch.Tensor], str]) -> float:
    """Compute the share of posterior paths whose first fifth spells the answer already.

    A thought that starts from the answer passes cross-view scoring. A number of the question counts
    too, so watch the change of the share, not its level.
    """
    # By text: a tokenizer may spell the answer's digits in several ways.
    early = [
        question.question.answer in decode(path.z_ids[: path.length // 5])
        for question, path in batch.pairs("posterior")
    ]
    return sum(early) / len(early)


def row_metrics(
    rows: Sequence[TrainRow],
    logps: Sequence[torch.Tensor],
    scored: Scored = (),
) -> dict[str, float]:
    """Compute the loss by its formula, the gated KL, and the mismatch of sampler and trainer.

    loss_NAME  of every term of the objective: sum over its rows of sum_t coef_t log p_t, or of its
               live loss. Where its paths are distilled, of coef_t (log p_t - sg log q_t), beta
               included: 0 where the prompts meet. log q_t of the same path in its own view
    loss       their sum
    kl_gated   mean of log q_t - log p_t over the tokens of the distilled rows

    log q is the trainer's, from the row of the same path that is trained beside it: the mismatch
    with the sampler stays out of the loss. A path without such a row takes the sampler's: NaN where
    a record has none, ValueError where no row has any. `scored` are the rows with `old`, and their
    log-probs before the update: of a token that is clipped it has none.
    """
    # What is scored comes last: it is whole, and a row that was clipped is not.
    known = [*zip(rows, logps, strict=True), *scored]
    own_logps = {_place(r, r.view): values for r, values in known if r.path and not r.distilled}
    # Both names always, so that a figure's lines do not break where a step distils nothing.
    losses: dict[str, float] = defaultdict(float, loss_pg=0.0, loss_distill=0.0)
    for row, values in scored:
        losses[f"loss_{row.term}"] += row.loss(values).sum().item()
    gaps, distilled = [], []  # log p of sampler - trainer; log q - log p of distilled rows
    # float64 sums on the CPU: thousands of tokens, whose terms nearly cancel.
    for row, row_logps in zip(rows, logps, strict=True):
        if not row.distilled:
            if row.old is None:
                losses[f"loss_{row.term}"] += row.loss(row_logps).sum().item()
            if row.sample_logps is not None:
                # NaN where nobody knows the sampler: a response of the data, a record without. Of a
                # token without a gradient the update has no log-prob.
                known = ~row.sample_logps.isnan() & row.coef.ne(0)
                gaps.append((row.sample_logps.double() - row_logps)[known])
            continue
        (drawn_in,) = {*get_args(View)} - {row.view}
        reference = own_logps.get(_place(row, drawn_in), row.sample_logps)
        if reference is None:
            raise ValueError(
                f"loss: got a {row.stream} path in the {row.view} view alone, expected its own "
                "log-probs; give the row its path or sample_logps"
            )
        # A record without log-probs: without its constant the sum is another formula's.
        if reference.isnan().any():
            losses[f"loss_{row.term}"] = math.nan
            continue
        distilled.append(reference.double() - row_logps)
        if row.old is None:
            losses[f"loss_{row.term}"] -= (row.coef * distilled[-1]).sum().item()
    return merge(
        {"loss": sum(losses.values()), **losses},
        mismatch(torch.cat(gaps)) if any(gap.numel() for gap in gaps) else {},
        {"kl_gated": torch.cat(distilled).mean().item()} if distilled else {},
    )


def _place(row: TrainRow, view: View) -> tuple[Any, ...]:
    """Which tokens under which prompt: a path may have a row of its thought and of its answer."""
    return row.path, view, row.token_ids.numpy().tobytes()


def mean_update(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merge the metrics of several updates of one step: means, but for the mismatch, which is that
    of the first, and `skipped`, which says that there was no update at all."""
    if len(updates) == 1:
        return dict(updates[0])
    # A key may be missing where an update had no row of its kind: a mean over those that have it.
    first, keys = updates[0], {key: None for metrics in updates for key in metrics}
    result = {}
    for key in keys:
        values = [metrics[key] for metrics in updates if key in metrics]
        # Of a loss no row is no loss: its parts add up to it.
        if key.startswith("loss_"):
            values += [0.0] * (len(updates) - len(values))
        # Later updates have moved away from the sampler by themselves: no fault of the engine.
        if key.startswith("mismatch"):
            result |= {key: first[key]} if key in first else {}
        else:
            result[key] = min(values) if key == "skipped" else sum(values) / len(values)
    return result


def k3(gap: torch.Tensor) -> float:
    """Mean exp(d) - d - 1 of d = log p_reference - log p: an estimate of KL(p || p_reference) per
    token, never negative (Schulman 2020)."""
    return (gap.exp() - gap - 1).mean().item()


def mismatch(gap: torch.Tensor) -> dict[str, float]:
    """Measure how far the sampler is from the trainer, by log p_engine - log p_trainer per token:
    mean exp|gap| (NeMo-RL's bar is 1.05), the largest |gap|, the smallest and largest ratio
    p_trainer / p_engine, and the share of ratios outside [0.9, 1.1]."""
    # p_trainer / p_engine: what an importance weight would be.
    ratio = (-gap).exp()
    return {
        "mismatch_mean": gap.abs().exp().mean().item(),
        "mismatch_max": gap.abs().max().item(),
        "mismatch_ratio_min": ratio.min().item(),
        "mismatch_ratio_max": ratio.max().item(),
        "mismatch_outside": ((ratio - 1.0).abs() > 0.1).double().mean().item(),
    }


def work_metrics(
    batch: ScoredBatch,
    terms: Terms,
    rows: Sequence[TrainRow],
    *,
    seconds: dict[str, float],
    given: bool = False,
) -> dict[str, float | int]:
    """Count tokens generated (none of responses that are `given`), trained, and not trained because
    their coefficient is zero."""
    # What a step would train if nothing were gated off, term by term.
    possible = sum(
        row.tokens
        for term in terms.parts
        for question, path in batch.pairs(term.stream)
        for row, _ in part_rows(question, path, term)
    )
    trained = sum(row.tokens for row in rows)
    # Replaced questions are in no batch, but their paths took as long to draw.
    generated = 0 if given else batch.tokens + (terms.metrics.get("tokens_replaced") or 0)
    counts = {
        "tokens_generated": generated,
        "tokens_trained": trained,
        "tokens_gated_off": possible - trained,
        "tokens_per_s": (generated + trained) / sum(seconds.values()),
    }
    return merge(counts, seconds)


def plan_metrics(
    plan: Sequence[RankPlan], rows: Sequence[TrainRow], flops: ModelFlops
) -> dict[str, float]:
    """`plan_stats` of the update's micro-batches, as `plan_rounds` and so on."""
    stats = plan_stats(plan, [row.tokens - 1 for row in rows], flops.row)
    return {f"plan_{name}": value for name, value in stats.items()}


def speed_metrics(
    rows: Sequence[TrainRow], flops: ModelFlops, *, seconds: float, device: str, devices: int
) -> dict[str, float | None]:
    """Compute tokens per second and MFU of an update that took `seconds` on all `devices`.

    The head counts on a row's targets alone, where it runs. `mfu` is None on a device whose peak is
    not known.
    """
    # The last token of a row is only ever a target.
    lengths, targets = [row.tokens - 1 for row in rows], [row.token_ids.numel() for row in rows]
    return {
        "train_tokens_per_s": sum(row.tokens for row in rows) / seconds,
        "mfu": mfu(flops.rows(lengths, targets), seconds, device, devices=devices),
    }


def path_records(
    batch: ScoredBatch,
    terms: Terms,
    decode: Callable[[torch.Tensor], str],
    *,
    step: int,
    limit: int | None,
    temperature: float,
    answer_temperature: float,
) -> list[dict[str, Any]]:
    """Return the first `limit` paths of each stream with their scores, for paths.jsonl; behind
    those of the batch come the paths of questions that it has replaced. `limit` None: all."""
    records: list[dict[str, Any]] = []
    for stream in batch.streams:
        scores = terms.path_scores.get(stream, {})
        # From the first question on: a reader wants whole groups, not a random handful.
        own = _path_lines(batch, stream, scores, decode, limit=limit)
        if batch.replaced is not None:
            rest = {"limit": None if limit is None else limit - len(own), "replaced": True}
            own += _path_lines(batch.replaced, stream, scores, decode, **rest)
        records += own
    # `logps` are of this temperature: at another one they are log-probs of another distribution.
    made = [{"step": step, **record, "temperature": temperature} for record in records]
    of_answers = {"answer_temperature": answer_temperature}
    return [{**record, **of_answers} if "attempts" in record else record for record in made]


def _path_lines(
    batch: ScoredBatch,
    stream: Stream,
    scores: Mapping[str, torch.Tensor],
    decode: Callable[[torch.Tensor], str],
    *,
    limit: int | None,
    replaced: bool = False,
) -> list[dict[str, Any]]:
    """Say of the first `limit` paths of a stream all but the step; `scores` of a replaced question
    are not known."""
    columns, view = batch.stream(stream), batch.drawn_in(stream)
    pairs, count = batch.pairs(stream)[:limit], columns.correct_BP.shape[1]
    lines = []
    for place, (question, path) in enumerate(pairs):
        # (b, i): `pairs` goes through a question's paths before the next one's.
        at = divmod(place, count)
        correct = columns.correct_BP[at].item()
        lines.append(
            {
                "question_id": path.question_id,
                "stream": path.stream,
                "index": path.index,
                "length": path.length,
                "finish": path.finish,
                "closed": path.closed,
                "correct": None if math.isnan(correct) else bool(correct),
                "replaced": replaced,
                "prompt": prompt_digest(question.context(view)),
                **{name: None if replaced else of[at].item() for name, of in scores.items()},
                "text": decode(path.z_ids),
                "answer": decode(path.answer_ids),
                "ids": path.z_ids.tolist(),
                "logps": _short(path.logps),
                "answer_ids": path.answer_ids.tolist(),
                "answer_logps": _short(path.response_logps[path.z_ids.numel() :]),
                **_attempts(path.attempts),
            }
        )
    return lines


def _attempts(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Answers sampled behind a thought, each text once: what is right, and in which order. Nothing
    where none was."""
    if not attempts:
        return {}
    # Of eight most are equal: the whole would be longer than the thought.
    made = [(tuple(attempt.ids.tolist()), attempt.right) for attempt in attempts]
    distinct = {answer: place for place, answer in enumerate(dict.fromkeys(made))}
    return {
        "attempt_ids": [[*ids] for ids, _ in distinct],
        "attempt_right": [right for _, right in distinct],
        "attempts": [distinct[answer] for answer in made],
    }


def _short(logps: torch.Tensor) -> list[float]:
    """Float32 numbers as the shortest decimals that give them back, bit for bit."""
    # 17 digits of the same number as a double would double the file.
    return [float(str(value)) for value in logps.numpy()]

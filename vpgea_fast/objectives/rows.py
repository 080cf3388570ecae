"""Coefficients of an objective -> training rows, with the normaliser of the whole step folded in.

loss = sum over rows of sum_t coef_t log p(token_t | context), coef_t = weight_i * w_i, up to the
constants of distilled rows (`TrainRow`); w_i divides by

    seq_sum     B G                the formula of the paper literally
    const       B G C              the same direction at a length-free scale (default)
    seq_mean    B G len_i          removes the length from the gradient of a path
    token_mean  sum_j len_j        all tokens of the stream in the step

Sums stay inside and the normaliser outside, so no split into micro-batches or ranks can change the
gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vpgea_fast.config import TrainConfig
from vpgea_fast.types import (
    Coefficients,
    Path,
    PathKey,
    PromptedQuestion,
    ScoredBatch,
    TrainRow,
    View,
)


def build_rows(
    batch: ScoredBatch,
    coefficients: Coefficients,
    cfg: TrainConfig,
    *,
    norm_constant: float,
    ratios: Mapping[PathKey, torch.Tensor] | None = None,
) -> list[TrainRow]:
    """One row for every path and view with a weight other than zero; the others do not exist.

    `ratios`: a factor per token for paths drawn by another sampler than the policy, both views
    alike.
    """
    rows = []
    for (stream, view), weights in coefficients.weights.items():
        scale = _normaliser(
            batch.stream(stream).length_BP,
            weights,
            coefficients.alive,
            cfg,
            distilled=(stream, view) == ("posterior", "student"),
            constant=norm_constant,
        )
        factors = zip(weights.flatten().tolist(), scale.flatten().tolist(), strict=True)
        for (question, path), (weight, factor) in zip(batch.pairs(stream), factors, strict=True):
            if weight != 0.0 and path.z_ids.numel():
                # One number per path: only importance weights tell its tokens apart.
                coef = torch.full(path.z_ids.shape, weight * factor, dtype=torch.float64)
                if ratios is not None:
                    coef *= ratios[path.key]
                rows.append(_row(question, path, view, coef))
    return rows


def drawn_rows(batch: ScoredBatch, coefficients: Coefficients) -> dict[PathKey, TrainRow]:
    """Every path with a weight in any view, in the view that it was drawn in; no coefficients."""
    rows: dict[PathKey, TrainRow] = {}
    for (stream, _), weights in coefficients.weights.items():
        view: View = "teacher" if stream == "posterior" else "student"
        pairs = batch.pairs(stream)
        for (question, path), weight in zip(pairs, weights.flatten().tolist(), strict=True):
            if weight != 0.0 and path.z_ids.numel():
                none = torch.zeros(path.z_ids.shape, dtype=torch.float64)
                rows[path.key] = _row(question, path, view, none)
    return rows


def _row(question: PromptedQuestion, path: Path, view: View, coef: torch.Tensor) -> TrainRow:
    return TrainRow(
        context_ids=question.context(view),
        token_ids=path.z_ids,
        coef=coef,
        stream=path.stream,
        view=view,
        sample_logps=path.logps,
        path=path.key,
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
    length: torch.Tensor,
    weights: torch.Tensor,
    alive_B: torch.Tensor,
    cfg: TrainConfig,
    *,
    distilled: bool,
    constant: float,
) -> torch.Tensor:
    """w_i of every path, (B, P) float64, of lengths and weights (B, P). `effective` counts only the
    questions that have a gradient."""
    counted = alive_B if cfg.denominator == "effective" else torch.ones_like(alive_B)
    per_path = 1.0 / (counted.sum().clamp(min=1).double() * length.shape[1])
    if cfg.norm == "seq_mean":
        return per_path / length
    if cfg.norm == "token_mean":
        alone = distilled and cfg.distill_denominator == "gated"
        tokens = (length * weights.ne(0)).sum() if alone else (length * counted[:, None]).sum()
        return (1.0 / tokens.clamp(min=1.0)).expand_as(length)
    return (per_path / (constant if cfg.norm == "const" else 1.0)).expand_as(length)

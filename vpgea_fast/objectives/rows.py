"""Coefficients of an objective -> training rows, with the normaliser of the whole step folded in.

loss = sum over rows of sum_t coef_t log p(token_t | context), coef_t = weight_i * w_i, where w_i
divides by

    seq_sum     B G                the formula of the paper literally
    const       B G C              the same direction at a length-free scale (default)
    seq_mean    B G len_i          removes the length from the gradient of a path
    token_mean  sum_j len_j        all tokens of the stream in the step

Sums stay inside and the normaliser outside, so no split into micro-batches or ranks can change the
gradient.
"""

from __future__ import annotations

import torch

from vpgea_fast.config import TrainConfig
from vpgea_fast.types import Coefficients, Groups, ScoredBatch, TrainRow


def build_rows(
    batch: ScoredBatch, coefficients: Coefficients, cfg: TrainConfig, *, norm_constant: float
) -> list[TrainRow]:
    """One row for every path and view with a weight other than zero; the others do not exist."""
    rows = []
    for (stream, view), weights in coefficients.weights.items():
        paths = batch.posterior if stream == "posterior" else batch.prior
        scale = _normaliser(
            paths,
            weights,
            coefficients.alive,
            cfg,
            distilled=(stream, view) == ("posterior", "student"),
            constant=norm_constant,
        )
        for question, group, row_weights, row_scale in zip(
            batch.questions, paths, weights.tolist(), scale.tolist(), strict=True
        ):
            for path, weight, factor in zip(group, row_weights, row_scale, strict=True):
                if weight != 0.0 and path.z_ids.numel():
                    coef = torch.full(path.z_ids.shape, weight * factor, dtype=torch.float64)
                    context = question.context(view)
                    rows.append(TrainRow(context, path.z_ids, coef, stream, view, path.logps))
    return rows


def _normaliser(
    paths: Groups,
    weights: torch.Tensor,
    alive_B: torch.Tensor,
    cfg: TrainConfig,
    *,
    distilled: bool,
    constant: float,
) -> torch.Tensor:
    """w_i of every path, (B, G) float64. `effective` counts only the questions that have a
    gradient."""
    length = torch.tensor([[path.length for path in group] for group in paths], dtype=torch.float64)
    counted = alive_B if cfg.denominator == "effective" else torch.ones_like(alive_B)
    per_path = 1.0 / (counted.sum().clamp(min=1).double() * length.shape[1])
    if cfg.norm == "seq_mean":
        return per_path / length
    if cfg.norm == "token_mean":
        alone = distilled and cfg.distill_denominator == "gated"
        tokens = (length * weights.ne(0)).sum() if alone else (length * counted[:, None]).sum()
        return (1.0 / tokens.clamp(min=1.0)).expand_as(length)
    return (per_path / (constant if cfg.norm == "const" else 1.0)).expand_as(length)

"""Objectives: each turns scored paths into one weight a path and view; `rows.build_rows` does the
rest.

A new objective is one function here, one config type, one row in tests/test_objectives.py.
"""

from __future__ import annotations

from vpgea_fast.config import GrpoConfig, VpgeaConfig
from vpgea_fast.objectives import policy_gradient, vpgea
from vpgea_fast.types import Coefficients, ScoredBatch


def coefficients(cfg: VpgeaConfig | GrpoConfig, batch: ScoredBatch) -> Coefficients:
    """The weights that the configured objective gives to the paths of a step."""
    if isinstance(cfg, VpgeaConfig):
        return vpgea.coefficients(cfg, batch)
    return policy_gradient.grpo(cfg, batch)

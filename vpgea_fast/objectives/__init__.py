"""Objectives: each turns scored paths into one weight per path and view; `rows.build_rows` does the
rest.

A new objective is one function here, one config type, one row in tests/test_objectives.py.
"""

from __future__ import annotations

from vpgea_fast.config import ConfigError, GrpoConfig, VpgeaConfig
from vpgea_fast.objectives import policy_gradient, vpgea
from vpgea_fast.types import Coefficients, ScoredBatch


def coefficients(cfg: VpgeaConfig | GrpoConfig, batch: ScoredBatch) -> Coefficients:
    """The weights that the configured objective gives to the paths of a step.

    ConfigError for a config type without a line here: it must not train another objective.
    """
    if isinstance(cfg, VpgeaConfig):
        return vpgea.coefficients(cfg, batch)
    if isinstance(cfg, GrpoConfig):
        return policy_gradient.grpo(cfg, batch)
    raise ConfigError(
        f"objective: got a {type(cfg).__name__}, expected VpgeaConfig or GrpoConfig; give the new "
        "type a line in objectives.coefficients"
    )

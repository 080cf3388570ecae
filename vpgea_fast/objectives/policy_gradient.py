"""Policy gradient in the student view: GRPO at ratio 1 (arXiv 2402.03300), with a length factor.

    loss = -(1/G) sum_i A_i log pi(z_i|x)
    A = z-score over the group of R_i = correct_i (len_base / len_i)^alpha

Like every objective here it trains the thought, think-close included, not the answer after it.
"""

from __future__ import annotations

import math

from vpgea_fast.advantage import group_zscore, length_factor
from vpgea_fast.config import GrpoConfig
from vpgea_fast.types import Coefficients, ScoredBatch


def grpo(cfg: GrpoConfig, batch: ScoredBatch) -> Coefficients:
    """alpha = 0 is GRPO; above it, len_base is the mean length of the group itself."""
    prior = batch.prior
    likely = (prior.u_BP > math.log(0.5)) & prior.closed_BP
    correct = prior.correct_BP == 1.0 if cfg.reward == "verify" else likely
    len_base = prior.length_BP.mean(dim=1)
    eta = length_factor(prior.length_BP, len_base, alpha=cfg.alpha, eta_clip=cfg.eta_clip)
    reward = correct.double() * eta
    advantage = group_zscore(reward, eps=cfg.eps, ddof=cfg.ddof, std_gate=cfg.std_gate)
    metrics = {
        "accept_rate": correct.double().mean().item(),
        "groups_all_rejected": int((~correct).all(dim=1).sum()),
        "groups_zero_var": int((advantage == 0).all(dim=1).sum()),
        "std_s": reward.std(dim=1, correction=cfg.ddof).mean().item(),
        "net_token_push": (advantage * prior.length_BP).sum().item(),
    }
    scores = {"reward": reward, "eta": eta, "advantage": advantage, "u": prior.u_BP}
    return Coefficients(
        weights={("prior", "student"): -advantage}, path_scores={"prior": scores}, metrics=metrics
    )

"""VPG-EA (arXiv 2605.11019): policy gradient for the teacher, gated distillation for the student.

    loss = -(1/G) sum_i A_i log q(z_i|x, y*)
           + beta (1/G) sum_i 1[A_i > 0] (sg log q(z_i|x, y*) - log pi(z_i|x))

A and the gate are constants of the rollout batch, so the weights of a path are -A_i (teacher view)
and -beta 1[A_i > 0] (student view, the same token ids).
"""

from __future__ import annotations

import torch

from vpgea_fast.advantage import cross_view_utility, log_utility, posterior_monitors
from vpgea_fast.config import VpgeaConfig
from vpgea_fast.metrics import merge
from vpgea_fast.types import Coefficients, ScoredBatch


def coefficients(cfg: VpgeaConfig, batch: ScoredBatch) -> Coefficients:
    """Weights of both streams, the scores of every posterior path, and the group diagnostics.

    len_gated        mean length of the gated paths of all questions: of the groups with many gated
                     paths, not comparable with len_post
    len_gated_ratio  mean over the gated paths of len_i / mean length of its own group

    Both None where no path is gated. Whoever needs alpha later takes `log_utility` from here.
    """
    options, post, prior = cfg.group_options(), batch.posterior, batch.prior
    columns = post.u_BP, prior.u_BP, post.length_BP, prior.length_BP
    u = cross_view_utility(*columns, accept_BG=accepted(cfg, batch), options=options)
    gate_BG = u.gate.double() if cfg.gate == "indicator" else u.advantage.clamp(min=0.0)
    gated = post.length_BP[u.gate]
    ratio = (post.length_BP / post.length_BP.mean(dim=1, keepdim=True))[u.gate]
    metrics: dict[str, float | None] = {
        "accept_rate": (u.reward > 0).double().mean().item(),
        "gate_rate": u.gate.double().mean().item(),
        "len_gated": gated.mean().item() if gated.numel() else None,
        "len_gated_ratio": ratio.mean().item() if ratio.numel() else None,
        "groups_all_rejected": int((u.reward <= 0).all(dim=1).sum()),
        "groups_zero_var": int((u.advantage == 0).all(dim=1).sum()),
        "std_s": u.utility.std(dim=1, correction=options.ddof).mean().item(),
        "utility": u.utility.mean().item(),
        "u_replaced": u.n_replaced,
        "net_token_push": (u.advantage * post.length_BP).sum().item(),
    }
    bounds = {"alpha": options.alpha, "u_min": options.u_min}  # the theory knows no other option
    scores = {
        "reward": u.reward,
        "eta": u.eta,
        "utility": u.utility,
        "advantage": u.advantage,
        "u": post.u_BP,
        "log_utility": log_utility(post.u_BP, post.length_BP, u.len_base, **bounds),
    }
    return Coefficients(
        weights={
            ("posterior", "teacher"): -u.advantage,
            ("posterior", "student"): -cfg.beta * gate_BG,
        },
        path_scores={"posterior": scores, "prior": {"u": prior.u_BP}},
        metrics=merge(metrics, posterior_monitors(*columns, **bounds)),
    )


def accepted(cfg: VpgeaConfig, batch: ScoredBatch) -> torch.Tensor:
    """Which teacher paths may earn a reward, (B, G) bool. Every filter of paths stands here.

    A rejected path has R = 0 and stays in its group's mean: it is a failure of the policy, and
    dropping it would hide it. A filter may read the columns of the stream, each (B, G): `u_BP`
    (nats), `length_BP` (tokens), `closed_BP`, `correct_BP` (1, 0, or NaN where not verified). Token
    ids are in `post.paths[b][i].z_ids`.
    """
    post = batch.posterior
    # Cut thoughts have no end to score, and a U that is not finite says nothing.
    filters = [post.closed_BP, torch.isfinite(post.u_BP)]
    if cfg.verify == "gate":
        filters.append(post.correct_BP == 1.0)
    return torch.stack(filters).all(dim=0)

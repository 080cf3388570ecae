"""AdamW, the learning-rate schedule as a pure function of the step, and the guarded update."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from vpgea_fast.config import OptimConfig


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], cfg: OptimConfig
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; fused on CUDA. Norms and biases are decayed like the
    rest (decay is 0 in RL)."""
    trainable = [p for p in parameters if p.requires_grad]
    fused = bool(trainable) and trainable[0].device.type == "cuda"
    return torch.optim.AdamW(
        trainable,
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=fused or None,
    )


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """Rate of update `step` (0-based) of `steps`: linear warm-up from lr / warmup_steps, then the
    schedule."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.lr * (
        1.0 - done if cfg.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    )


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Euclidean norm of all gradients."""
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads).item()


def apply_update(optimizer: torch.optim.Optimizer, *, lr: float, max_grad_norm: float) -> float:
    """Clip to `max_grad_norm`, step, clear; returns the norm before clipping.

    A non-finite norm makes no update: parameters and optimiser state stay bitwise as they were.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

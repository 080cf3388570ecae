"""The optimisers, the learning rate as a pure function of the step, and the guarded update.

| optim.name | moments        | weights          | update computed by     |
| adamw      | float32        | float32, float64 | torch, one fused pass  |
| adamw      | float32        | bfloat16 *       | `RoundedAdamW`         |
| adamw_bf16 | bfloat16 *     | any (bfloat16 *) | `RoundedAdamW`         |
| adamw_8bit | 8 bits a block | any (bfloat16 *) | torchao's `AdamW8bit`  |

* rounded stochastically. The moments of float64 weights are float64 in torch's. Parameters may be
DTensors of any mesh whose shards are rows: every optimiser works on the shards where they lie. The
first three can have their states in host memory, and float32 masters apart (`ApartAdamW`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from vpgea_fast.config import OptimConfig
from vpgea_fast.optim.apart import ApartAdamW
from vpgea_fast.optim.rounded import RoundedAdamW, own_shard, random_bits, round_stochastically

__all__ = [
    "NO_8BIT",
    "TORCHAO",
    "ApartAdamW",
    "RoundedAdamW",
    "Step",
    "apply_update",
    "build_optimizer",
    "check_torchao",
    "gradient_norm",
    "learning_rate",
    "make_steps",
    "random_bits",
    "round_stochastically",
]

TORCHAO = (0, 11)
"""The first torchao with `torchao.optim`."""

NO_8BIT = {
    "hosted": "optim.name: got 'adamw_8bit' with parallel.cpu_offload on one device, which takes "
    "moments to the device in blocks that torchao's cannot be cut into; set adamw_bf16, or "
    "parallel.shard always (weights then travel for every micro-batch)",
    "masters": "optim.name: got 'adamw_8bit' with float32 masters beside the weights of one "
    "device, which torchao does not know; set model.master_dtype bfloat16 with "
    "optim.stochastic_rounding, adamw_bf16, or parallel.shard always (weights are then copied for "
    "every micro-batch)",
}

Tensor = torch.Tensor


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    cfg: OptimConfig,
    *,
    seed: int = 0,
    masters: Mapping[Tensor, Tensor] | None = None,
    hosted: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimiser of `cfg` over the trainable parameters. Norms and biases decay like the
    rest (decay is 0 in RL).

    `seed` is that of stochastic rounding. `masters`: given where these or the moments lie apart
    from the weights, see `ApartAdamW`; `hosted`: in host memory. Errors: ValueError where
    `optim.stochastic_rounding` does not fit the dtype of the weights, for 8 bits apart, and for a
    missing or old torchao.
    """
    trainable = [p for p in parameters if p.requires_grad]
    # What is updated decides, not what the forward reads: beside float32 masters that is bfloat16.
    own = masters or {}
    half = any(own.get(p, p).dtype is torch.bfloat16 for p in trainable)
    if half != cfg.stochastic_rounding:
        raise ValueError(
            f"optim.stochastic_rounding: got {cfg.stochastic_rounding} with "
            f"{'bfloat16' if half else 'no bfloat16'} weights; bfloat16 weights lose updates of "
            "1e-6 unless rounded stochastically: set it exactly when model.master_dtype is bfloat16"
        )
    options: dict[str, Any] = {
        "lr": cfg.lr,
        "betas": cfg.betas,
        "eps": cfg.eps,
        "weight_decay": cfg.weight_decay,
    }
    moments = torch.bfloat16 if cfg.name == "adamw_bf16" else torch.float32
    rounded: dict[str, Any] = {"moments": moments, "seed": seed}
    plain = cfg.name == "adamw" and not half
    # An empty mapping too: weights that are their own masters, with moments in host memory.
    if masters is not None:
        if cfg.name == "adamw_8bit":
            raise ValueError(NO_8BIT["hosted" if hosted else "masters"])
        rounded |= {"masters": masters, "hosted": hosted, "rounds": not plain}
        return ApartAdamW(trainable, **options, **rounded)
    if cfg.name == "adamw_8bit":
        check_torchao()
        # Here: an extra, which a run of another optimiser may lack.
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(trainable, **options, bf16_stochastic_round=half)
    if plain:
        # Fused: one read and one write of each state, where torch's default makes a pass of each
        # operation.
        return torch.optim.AdamW(trainable, **options, fused=bool(trainable) or None)
    return RoundedAdamW(trainable, **options, **rounded)


def check_torchao() -> None:
    """ValueError unless a torchao is installed that has the 8-bit optimiser."""
    oldest = ".".join(map(str, TORCHAO))
    remedy = "install the extra, pip install vpgea_fast[torchao], or take adamw_bf16"
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(
            f"optim.name: 'adamw_8bit' needs torchao {oldest} or newer, which is not installed; "
            f"{remedy}"
        )
    installed = metadata.version("torchao")
    if tuple(int(part) for part in installed.split("+")[0].split(".")[:2]) < TORCHAO:
        raise ValueError(
            f"optim.name: 'adamw_8bit' needs torchao {oldest} or newer, found {installed}; {remedy}"
        )


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """Rate of update `step` (0-based) of `steps`: linear warm-up from lr / warmup_steps, then the
    schedule."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    # Below 1 at the last step too, whose update would otherwise be none.
    done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.lr * (
        1.0 - done if cfg.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    )


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Euclidean norm of all gradients over all ranks, the same on each. A collective when they are
    sharded."""
    return _norm(_gradients(optimizer)).item()


class Step(NamedTuple):
    """A step to be made of an optimiser's gradients: its rate, and what they are clipped to."""

    optimizer: torch.optim.Optimizer
    lr: float
    max_grad_norm: float


def make_steps(steps: Sequence[Step]) -> list[float]:
    """Clip, step and clear every optimiser; return the norms before clipping, over all ranks.

    A norm that is not finite makes none of the updates: parameters and optimiser states stay
    bitwise as they were, on every rank, since one NaN on one rank makes the norm NaN on all. Costs
    one host sync each, and one all-reduce of a number when the gradients are sharded.
    """
    # All norms before any step, so that one that is not finite stops every policy.
    norms = [_norm(_gradients(step.optimizer)) for step in steps]
    values = [norm.item() for norm in norms]
    if all(map(math.isfinite, values)):
        for step, norm in zip(steps, norms, strict=True):
            _step(step, norm)
    for step in steps:
        # Freed, not zeroed: the next step samples first, and gradients are as large as weights.
        step.optimizer.zero_grad(set_to_none=True)
    return values


def _step(step: Step, norm: Tensor) -> None:
    """Clip the gradients, whose norm this is, and step."""
    # 1e-6 as in torch's clip_grad_norm_.
    scale = (step.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in _gradients(step.optimizer):
        local = own_shard(gradient)
        # Always, also by 1: to ask whether it is below would wait for the device. The factor stays
        # in float32, and the product is rounded once.
        local.mul_(scale.to(local.device, torch.promote_types(local.dtype, torch.float32)))
    for group in step.optimizer.param_groups:
        # torchao's compiled step reads the rate from a tensor; a new float would compile again.
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(step.lr)
        else:
            group["lr"] = step.lr
    step.optimizer.step()


def apply_update(optimizer: torch.optim.Optimizer, *, lr: float, max_grad_norm: float) -> float:
    """Make the step of one optimiser; see `make_steps`."""
    return make_steps([Step(optimizer, lr, max_grad_norm)])[0]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """List the gradients, in the dtype of what each updates."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    masters = optimizer.masters if isinstance(optimizer, ApartAdamW) else {}
    for p in parameters:
        _settle(p, masters.get(p, p).dtype)
    return [p.grad for p in parameters if p.grad is not None]


def _settle(p: Tensor, dtype: torch.dtype) -> None:
    """Round a gradient that was summed in float32 (`Policy.expect_backward`), as FSDP rounds what
    it has reduced: one process then makes the update of many."""
    # One at a time: half a weight more is held for a moment, and all gradients are halved by then.
    if p.grad is not None and p.grad.dtype != dtype:
        rounded, p.grad = p.grad.to(dtype), None
        p.grad_dtype = dtype  # first: torch refuses a gradient of another dtype than this
        p.grad = rounded


@torch.no_grad()
def _norm(gradients: list[Tensor]) -> Tensor:
    """Norm of plain and sharded gradients together, at least float32: of bfloat16 ones torch's own
    norm keeps 8 bits. Replicas count once."""
    # One all-reduce for all tensors of a mesh and placement.
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(key, []).append(own_shard(gradient))
    norms = []
    for key, local in by_mesh.items():
        dtype = torch.promote_types(local[0].dtype, torch.float32)
        parts = torch._foreach_norm(local, 2.0, dtype)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(torch.stack(parts))
        norms.append(norm if key is None else _norm_over_ranks(norm, *key))
    if not norms:
        return torch.tensor(0.0)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _norm_over_ranks(norm: Tensor, mesh: Any, placements: tuple[Any, ...]) -> Tensor:
    """sqrt of the sum of squares over all ranks, that is of the mean over replicas: one that went
    wrong is seen by all. float64 on the way, where no float32 square overflows; on the mesh's
    device, since NCCL takes no CPU tensor (offload)."""
    square = norm.double().square().to(mesh.device_type)
    for dimension, placement in enumerate(placements):
        dist.all_reduce(square, group=mesh.get_group(dimension))
        if placement.is_replicate():
            square /= mesh.size(dimension)
    return square.sqrt().to(norm.dtype)

"""The optimisers, the learning rate as a pure function of the step, and the guarded update.

| optim.name | moments        | weights          | update computed by     |
| adamw      | float32        | float32, float64 | torch, one fused pass  |
| adamw      | float32        | bfloat16 *       | `RoundedAdamW`         |
| adamw_bf16 | bfloat16 *     | any (bfloat16 *) | `RoundedAdamW`         |
| adamw_8bit | 8 bits a block | any (bfloat16 *) | torchao's `AdamW8bit`  |

* rounded stochastically. The moments of float64 weights are float64 in torch's. Parameters may be
DTensors of any mesh whose shards are rows: every optimiser works on the shards where they lie.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from vpgea_fast.config import OptimConfig

TORCHAO = (0, 11)
"""The first torchao with `torchao.optim`."""

Tensor = torch.Tensor


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], cfg: OptimConfig, *, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the optimiser of `cfg` over the trainable parameters. Norms and biases decay like the
    rest (decay is 0 in RL).

    `seed` is that of stochastic rounding. Errors: ValueError where `optim.stochastic_rounding` does
    not fit the dtype of the weights, and for a missing or old torchao.
    """
    trainable = [p for p in parameters if p.requires_grad]
    half = any(p.dtype is torch.bfloat16 for p in trainable)
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
    if cfg.name == "adamw_8bit":
        check_torchao()
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(trainable, **options, bf16_stochastic_round=half)
    if cfg.name == "adamw" and not half:
        return torch.optim.AdamW(trainable, **options, fused=bool(trainable) or None)
    moments = torch.bfloat16 if cfg.name == "adamw_bf16" else torch.float32
    return RoundedAdamW(trainable, **options, moments=moments, seed=seed)


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


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) in float32, whose bfloat16 tensors are rounded stochastically.

    m += (1 - b1)(g - m);  v += (1 - b2)(g^2 - v);  w -= lr (decay w + m^ / (sqrt(v^) + eps))

    Rounding to nearest would lose what is below half a unit in the last place, 2^-9 to 2^-8 of the
    value: every update of a weight near 1 at lr 1e-6, and with b2 = 0.999 the whole decay of v. A
    value between two neighbours becomes the upper one with the probability that makes the mean
    exact; v then has a noise of about 5 % (standard deviation, b2 = 0.999), that is 2 % of a step.
    The step itself uses m and v before they are rounded.

    The random bits are a hash of (seed, step, place of the parameter, place of the element in the
    whole tensor). So there is no generator to save; a resumed run is bitwise the run; any number of
    ranks rounds alike; and the replicas of a weight stay equal, which with a generator a rank they
    would not. The moments are `moments` (float64 for float64 weights and float32 moments).

    Cost on one CPU core: 4 to 7 ns an element (torch's fused AdamW: 0.7), half of it for the bits.
    Errors: ValueError for a DTensor that is sharded otherwise than by rows.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"seed": seed})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if closure is not None:
            raise ValueError("RoundedAdamW.step: got a closure, expected none; call it before")
        # Counted without a gradient too: a place stands for the same parameter at every step.
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group, place)
                place += 1

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[p]
        if not state:
            # float64 weights have float64 moments, unless bfloat16 was asked for.
            dtype = torch.promote_types(p.dtype, torch.float32)
            dtype = self.moments if self.moments is torch.bfloat16 else dtype
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
        state["step"] += 1
        # A CPU tensor, so reading it waits for no device.
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        # (N,) views of this process's shards: writing into them writes the parameter.
        w_N, m_N, v_N = (_local(t).view(-1) for t in (p, state["exp_avg"], state["exp_avg_sq"]))
        g_N = _local(grad).reshape(-1)
        keys = _keys(group["seed"], step, place)
        work = torch.promote_types(p.dtype, torch.float32)
        # In chunks: the copies below stay in a CPU's cache, and no draw crosses a multiple of 2^32.
        for part, first in _chunks(w_N.numel(), _first_element(p), _chunk(w_N.device)):
            g, m = g_N[part].to(work), m_N[part].to(work)
            v, w = v_N[part].to(work), w_N[part].to(work)
            # Where a dtype is that of the work, `to` has copied nothing: these are the tensors
            # themselves.
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.mul_(1 - group["lr"] * group["weight_decay"])
            # v is rounded below, so its root is a copy.
            denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            w.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
            if m_N.dtype is torch.bfloat16:
                bits = random_bits(first, w.numel(), keys[0], w.device)
                m_N[part] = round_stochastically(m, bits)
                # One draw serves both moments, 16 bits each: the draw is half of the step's cost.
                v_N[part] = round_stochastically(v, bits.bitwise_right_shift_(16))
            if w_N.dtype is torch.bfloat16:
                # Another key than the moments': the weight's error must not follow theirs.
                bits = random_bits(first, w.numel(), keys[1], w.device)
                w_N[part] = round_stochastically(w, bits)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the moments keep their dtype: torch casts them to the weight's."""
        saved = state_dict["state"]
        # Only the counts go through torch's own loading; the moments are put in below.
        steps = {i: {"step": s["step"]} for i, s in saved.items()}
        super().load_state_dict({**state_dict, "state": steps})
        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, i in zip(group["params"], given["params"], strict=True):
                for name in ("exp_avg", "exp_avg_sq") if i in saved else ():
                    self.state[p][name] = saved[i][name].to(p.device)


def random_bits(first: int, count: int, key: int, device: torch.device) -> Tensor:
    """(count,) int32 of 32 uniform bits: a hash of `key` and the places first, first + 1, ...

    Two multiplicative mixings (constants of Mueller and Wellons) with a half of the 64-bit key
    before each; int32 arithmetic wraps. The places must not cross a multiple of 2^32.
    """
    x_N = torch.arange(count, dtype=torch.int32, device=device)
    x_N.add_(_signed(first)).bitwise_xor_(_signed(key))
    # The high word of the place joins the key: tensors above 2^32 elements repeat no bits.
    high = _signed((key >> 32) + (first >> 32))
    for shift, factor, then in ((16, 0x7FEB352D, high), (15, 0x846CA68B, 0), (16, 0x45D9F3B3, 0)):
        # int32 shifts copy the sign: the mask makes this a shift of unsigned numbers.
        x_N.bitwise_xor_(x_N.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1))
        x_N.mul_(_signed(factor)).add_(then)
    return x_N.bitwise_xor_(x_N.bitwise_right_shift(16).bitwise_and_(0xFFFF))


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """bfloat16 of `x`, up or down with the probability that makes the mean exact.

    The low 16 of `bits` (int32, uniform) are added to the 16 bits of the float32 that bfloat16
    drops: it is carried exactly as often as their size says. Infinity stays. `x` is overwritten
    when it is float32.
    """
    x = x.float()
    raw = x.view(torch.int32)
    # The mask keeps the upper 16 bits, which are bfloat16's: the cast below is exact.
    raw.add_(bits.bitwise_and(0xFFFF)).bitwise_and_(-0x10000)
    return x.to(torch.bfloat16)


def _keys(*parts: int) -> tuple[int, int]:
    """Two 64-bit keys of some numbers, by splitmix64 (Steele et al., 2014)."""
    key = 0
    for part in (*parts, 0):
        key = _splitmix(key ^ part)
    return key, _splitmix(key)


def _splitmix(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The low 32 bits as an int32."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _chunk(device: torch.device) -> int:
    """Elements updated at a time, a power of two. CUDA: scratch of 0.5 GiB. CPU: 2^16 a thread, so
    that it stays in the cache; 2^16, 2^18, 2^20, 2^24 took 4.3, 4.6, 5.2, 46 ns an element."""
    if device.type == "cuda":
        return 2**24
    return 2**16 << (torch.get_num_threads().bit_length() - 1)


def _chunks(count: int, first: int, size: int) -> Iterator[tuple[slice, int]]:
    """Slices of a shard of `count` elements, each with its first place in the whole tensor; cut at
    multiples of `size` there, so that none crosses a multiple of 2^32."""
    start = 0
    while start < count:
        stop = min(count, start + size - (first + start) % size)
        yield slice(start, stop), first + start
        start = stop


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_element(p: Tensor) -> int:
    """The place of this rank's first element of `p` in the whole tensor, counted along its rows."""
    if not isinstance(p, DTensor):
        return 0
    first, rows = 0, p.shape[0] if p.ndim else 1
    sharded = [d for d, place in enumerate(p.placements) if not place.is_replicate()]
    if any(p.placements[d] != Shard(0) for d in sharded) or len(sharded) > 1:
        raise ValueError(
            f"RoundedAdamW: got a parameter placed {p.placements}, expected shards of rows over "
            "one dimension of the mesh; shard it with fully_shard's default placement"
        )
    # torch.chunk's rule, which FSDP follows: ceil(rows / size) rows each until none are left.
    for d in sharded:
        chunk = -(-rows // p.device_mesh.size(d))
        first = min(rows, chunk * p.device_mesh.get_local_rank(d))
    return first * (p.numel() // max(1, rows))


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
        local = _local(gradient)
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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.grad for p in parameters if p.grad is not None]


@torch.no_grad()
def _norm(gradients: list[Tensor]) -> Tensor:
    """Norm of plain and sharded gradients together, at least float32: of bfloat16 ones torch's own
    norm keeps 8 bits. Replicas count once."""
    # One all-reduce for all tensors of a mesh and placement.
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(key, []).append(_local(gradient))
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

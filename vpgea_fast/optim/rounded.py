"""AdamW whose bfloat16 weights and moments are rounded stochastically."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

Tensor = torch.Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the first and the second moment among the states, as in torch's AdamW."""


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
            kind = type(self).__name__
            raise ValueError(f"{kind}.step: got a closure, expected none; call it before")
        self._step()

    def _step(self) -> None:
        for p, group, place in self._stepped():
            self._update(p, group, place)

    def _stepped(self) -> Iterator[tuple[Tensor, dict[str, Any], int]]:
        """Give each parameter that has a gradient, with its group and its place; count its step."""
        # Counted without a gradient too: a place stands for the same parameter at every step.
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["step"] = torch.tensor(0.0)
                        self.state[p].update(self._fresh_moments(p))
                    self.state[p]["step"] += 1
                    yield p, group, place
                place += 1

    def moment_dtype(self, weight: torch.dtype) -> torch.dtype:
        """Choose the dtype of the moments of weights of this one."""
        # float64 weights have float64 moments, unless bfloat16 was asked for.
        bfloat16 = self.moments is torch.bfloat16
        return self.moments if bfloat16 else torch.promote_types(weight, torch.float32)

    def _fresh_moments(self, p: Tensor) -> dict[str, Tensor]:
        dtype = self.moment_dtype(p.dtype)
        return {key: torch.zeros_like(p, dtype=dtype) for key in MOMENTS}

    def _update(self, p: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[p]
        # (N,) views of this process's shards: writing into them writes the parameter.
        w_N, m_N, v_N = (own_shard(t).view(-1) for t in (p, *(state[key] for key in MOMENTS)))
        g_N = own_shard(p.grad).reshape(-1)  # pyright: ignore[reportArgumentType]
        # A CPU tensor, so reading it waits for no device.
        moment = Moment(group, int(state["step"]), place)
        # In chunks: the copies stay in a CPU's cache, and no draw crosses a multiple of 2^32.
        for part, first in chunks(w_N.numel(), _first_element(p), _chunk(w_N.device)):
            update_part(w_N[part], m_N[part], v_N[part], g_N[part], moment=moment, first=first)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the moments keep their dtype: torch casts them to the weight's."""
        saved = state_dict["state"]
        # Only the counts go through torch's own loading; the moments are put in below.
        steps = {i: {"step": s["step"]} for i, s in saved.items()}
        super().load_state_dict({**state_dict, "state": steps})
        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, i in zip(group["params"], given["params"], strict=True):
                for name in MOMENTS if i in saved else ():
                    self.state[p][name] = self._loaded(p, name, saved[i][name])

    def _loaded(self, p: Tensor, name: str, moment: Tensor) -> Tensor:
        del name
        return moment.to(p.device)


class Moment(NamedTuple):
    """What an update depends on beside tensors: the parameter's group of options, how many updates
    it has had with this one, and its place among all parameters."""

    group: dict[str, Any]
    step: int
    place: int


def update_part(
    w_N: Tensor, m_N: Tensor, v_N: Tensor, g_N: Tensor, *, moment: Moment, first: int
) -> None:
    """Update a part of a weight and its moments in place, by its gradient, all (N,) on one device.

    `first`: the place of its first element in the whole tensor. The part must not cross a multiple
    of 2^32 there. Scratch: eight times the part in float32.
    """
    group, step = moment.group, moment.step
    beta1, beta2 = group["betas"]
    keys = _keys(group["seed"], step, moment.place)
    work = torch.promote_types(w_N.dtype, torch.float32)
    # Where a dtype is that of the work, `to` copies nothing: these are the tensors themselves.
    g, m, v, w = (x.to(work) for x in (g_N, m_N, v_N, w_N))
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    w.mul_(1 - group["lr"] * group["weight_decay"])
    # v is rounded below, so its root is a copy.
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    w.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
    if m_N.dtype is torch.bfloat16:
        bits = random_bits(first, w.numel(), keys[0], w.device)
        m_N.copy_(round_stochastically(m, bits))
        # One draw serves both moments, 16 bits each: the draw is half of the step's cost.
        v_N.copy_(round_stochastically(v, bits.bitwise_right_shift_(16)))
    if w_N.dtype is torch.bfloat16:
        # Another key than the moments': the weight's error must not follow theirs.
        bits = random_bits(first, w.numel(), keys[1], w.device)
        w_N.copy_(round_stochastically(w, bits))


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


def chunks(count: int, first: int, size: int) -> Iterator[tuple[slice, int]]:
    """Slices of a shard of `count` elements, each with its first place in the whole tensor; cut at
    multiples of `size` there, so that none crosses a multiple of 2^32."""
    start = 0
    while start < count:
        stop = min(count, start + size - (first + start) % size)
        yield slice(start, stop), first + start
        start = stop


def own_shard(tensor: Tensor) -> Tensor:
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

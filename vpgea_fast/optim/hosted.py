"""AdamW on one device, whose moments and float32 masters lie in host memory.

The weights stay on the device, where the forward reads them; so do the gradients. A step brings the
rest in blocks, updates them on the device, and takes them back.

| bytes per parameter over PCIe   | to the device | to the host | and                            |
| update on the device, bfloat16  | 4             | 4           |                                |
| the same, masters in float32    | 12            | 12          |                                |
| update by the CPU, bfloat16     | 2             | 2           | 4 to 7 ns a parameter and core |
| the same, masters in float32    | 2             | 4           | 30 bytes of host memory        |

On the device: the two ways of PCIe are used at once, so 7.6e9 parameters at 50 GB/s take 0.6 s
(float32: 1.8 s), and the arithmetic hides behind it. A CPU of 16 cores would take 2.4 s to round
stochastically, one with 150 GB/s of memory 1.5 s in float32. And the bits are those of a run whose
states are on the device. The numbers are arithmetic; nothing was measured on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from vpgea_fast.hosted import BLOCK, Blocks, Work, host_tensors
from vpgea_fast.optim.rounded import MOMENTS, Moment, RoundedAdamW, chunks, update_part

Tensor = torch.Tensor


class HostedAdamW(RoundedAdamW):
    """`torch.optim.AdamW` (`rounds` False) or `RoundedAdamW`, with its states in host memory.

    `masters`: parameter -> the weight that is updated, in host memory; one that is not there is its
    own. The parameter then takes the master's value in its own dtype. A step is bitwise that of the
    other optimiser on the parameters' device. Errors: MemoryError where the host has no room.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        *,
        masters: Mapping[Tensor, Tensor],
        rounds: bool,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self.masters, self.rounds = masters, rounds
        # A checkpoint of one is a checkpoint of the other.
        self.saved_as = "RoundedAdamW" if rounds else "AdamW"
        # At once: a run without the room would otherwise end at its first update.
        self._room: dict[str, dict[Tensor, Tensor]] = {
            key: dict(zip(params, self._moments(params), strict=True)) for key in MOMENTS
        }

    def _moments(self, params: Sequence[torch.nn.Parameter]) -> list[Tensor]:
        if not params:
            return []
        dtype = self.moment_dtype(self.master(params[0]).dtype)
        return host_tensors((p.shape for p in params), dtype, params[0].device)

    def master(self, p: Tensor) -> Tensor:
        """The weight of a parameter that is updated."""
        return self.masters.get(p, p)

    def room(self, p: Tensor, key: str) -> Tensor:
        """The tensor in host memory that holds a moment of a parameter."""
        return self._room[key][p]

    def _step(self) -> None:
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return
        master = self.master(moved[0])
        moment = self.moment_dtype(master.dtype)
        dtypes = [moment, moment, *([master.dtype] if moved[0] in self.masters else [])]
        # Made anew for each step: between two the device's memory is the sampler's.
        size = min(BLOCK, max(p.numel() for p in moved))
        Blocks(moved[0].device, dtypes, size).run(self._blocks())

    def settle(self) -> None:
        """Round gradients to the dtype of what they update, as FSDP reduces them; one at a time."""
        for group in self.param_groups:
            for p in group["params"]:
                wanted = self.master(p).dtype
                if p.grad is not None and p.grad.dtype != wanted:
                    rounded, p.grad = p.grad.to(wanted), None
                    p.grad_dtype = wanted
                    p.grad = rounded

    def _blocks(self) -> Iterator[tuple[list[Tensor], Work]]:
        for p, group, place in self._stepped():
            state = self.state[p]
            moment = Moment(group, int(state["step"]), place)
            hosted = [state[key].view(-1) for key in MOMENTS]
            if p in self.masters:
                hosted.append(self.masters[p].view(-1))
            for part, first in chunks(p.numel(), 0, BLOCK):
                work = functools.partial(self._work, p, part, moment=moment, first=first)
                yield [whole[part] for whole in hosted], work

    def _work(
        self,
        p: Tensor,
        part: slice,
        m_N: Tensor,
        v_N: Tensor,
        master_N: Tensor | None = None,
        *,
        moment: Moment,
        first: int,
    ) -> None:
        """Update a block on the device."""
        assert p.grad is not None
        own_N, g_N = p.view(-1)[part], p.grad.reshape(-1)[part]
        w_N = own_N if master_N is None else master_N
        if self.rounds:
            update_part(w_N, m_N, v_N, g_N, moment=moment, first=first)
        else:
            _torch_update(w_N, m_N, v_N, g_N, moment=moment)
        if master_N is not None:
            own_N.copy_(master_N)

    def _fresh_moments(self, p: Tensor) -> dict[str, Tensor]:
        return {key: self.room(p, key).zero_() for key in MOMENTS}

    def _loaded(self, p: Tensor, name: str, moment: Tensor) -> Tensor:
        return self.room(p, name).copy_(moment)


def _torch_update(w_N: Tensor, m_N: Tensor, v_N: Tensor, g_N: Tensor, *, moment: Moment) -> None:
    group = moment.group
    # Filled on the device: a copy of a number from the host would wait for it. torch counts on.
    before = torch.full((), float(moment.step - 1), device=w_N.device)
    adamw(
        [w_N],
        [g_N],
        [m_N],
        [v_N],
        [],
        [before],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )

"""AdamW on one device, whose moments and float32 masters lie in host memory; or whose masters lie
on the device too, beside the weights.

The weights stay on the device, where the forward reads them; so do the gradients. A step brings
what lies in host memory in blocks, updates it on the device, and takes it back.

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


class ApartAdamW(RoundedAdamW):
    """`torch.optim.AdamW` (`rounds` False) or `RoundedAdamW`, of masters that are other tensors.

    `masters`: parameter -> the weight that is updated; one that is not there is its own. The
    parameter then takes the master's value in its own dtype. `hosted`: they and the moments lie in
    host memory, else on the parameters' device. A step is bitwise that of the other optimiser on
    this device. The moments take their memory at `reserve`, or at the first step. Errors:
    MemoryError where the host has no room.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        *,
        masters: Mapping[Tensor, Tensor],
        hosted: bool,
        rounds: bool,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self.masters, self.hosted, self.rounds = masters, hosted, rounds
        # A checkpoint of one is a checkpoint of the other.
        self.saved_as = "RoundedAdamW" if rounds else "AdamW"

    def reserve(self) -> None:
        """Take the memory of all moments now, so that a run without the room ends at its start and
        not at its first update. One that only records paths needs none: 28 GiB of 7B."""
        _ = self._room

    @functools.cached_property
    def _room(self) -> dict[str, dict[Tensor, Tensor]]:
        """Moment -> parameter -> its place. Made once: a checkpoint is read into it, and a step
        count of 0 clears it (`_fresh_moments`)."""
        params = [p for group in self.param_groups for p in group["params"]]
        # All parameters have one dtype, and so have their masters.
        dtype, device = self.moment_dtype(self.master(params[0]).dtype), params[0].device
        room = {}
        for key in MOMENTS:
            if self.hosted:
                made = host_tensors((p.shape for p in params), dtype, device)
            else:
                made = [torch.zeros(p.shape, dtype=dtype, device=device) for p in params]
            room[key] = dict(zip(params, made, strict=True))
        return room

    def master(self, p: Tensor) -> Tensor:
        """The weight of a parameter that is updated."""
        return self.masters.get(p, p)

    def room(self, p: Tensor, key: str) -> Tensor:
        """The tensor that holds a moment of a parameter."""
        return self._room[key][p]

    def _step(self) -> None:
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return
        if not self.hosted:
            for states, work in self._blocks():
                work(*states)
            return
        master = self.master(moved[0])
        moment = self.moment_dtype(master.dtype)
        # As `_blocks` gives them. Weights and gradients are there already and need no room.
        dtypes = [moment, moment, *([master.dtype] if moved[0] in self.masters else [])]
        # Made anew for each step: between two the device's memory is the sampler's.
        size = min(BLOCK, max(p.numel() for p in moved))
        Blocks(moved[0].device, dtypes, size).run(self._blocks())

    def _blocks(self) -> Iterator[tuple[list[Tensor], Work]]:
        """Give the states of each block, (N,), and what works on them or their copies."""
        # Asked for one at a time: the host clears a first step's moments while the device works.
        for p, group, place in self._stepped():
            state = self.state[p]
            moment = Moment(group, int(state["step"]), place)
            # The room itself, so that a step leaves its results where a checkpoint looks for them.
            apart = [state[key].view(-1) for key in MOMENTS]
            if p in self.masters:
                apart.append(self.masters[p].view(-1))
            # Cut where `RoundedAdamW` cuts on CUDA; the bits of rounding hang on places alone.
            for part, first in chunks(p.numel(), 0, BLOCK):
                work = functools.partial(self._work, p, part, moment=moment, first=first)
                yield [whole[part] for whole in apart], work

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
        """Update a block on the device: `part` of `p`, with its moments and its master, or their
        copies there, (N,) each."""
        assert p.grad is not None
        # A view: autograd gives a gradient its weight's strides.
        own_N, g_N = p.view(-1)[part], p.grad.reshape(-1)[part]
        w_N = own_N if master_N is None else master_N
        if self.rounds:
            update_part(w_N, m_N, v_N, g_N, moment=moment, first=first)
        else:
            _torch_update(w_N, m_N, v_N, g_N, moment=moment)
        if master_N is not None:
            # From the master each time, never by the update itself: their difference cannot grow.
            own_N.copy_(master_N)

    def _fresh_moments(self, p: Tensor) -> dict[str, Tensor]:
        # Cleared, since the states of a run before, or of a load that failed, may lie there.
        return {key: self.room(p, key).zero_() for key in MOMENTS}

    def _loaded(self, p: Tensor, name: str, moment: Tensor) -> Tensor:
        # torch's own way of loading; a checkpoint is read into the room itself (`state_targets`).
        return self.room(p, name).copy_(moment)


def _torch_update(w_N: Tensor, m_N: Tensor, v_N: Tensor, g_N: Tensor, *, moment: Moment) -> None:
    """Update a part, (N,) each, by the kernel that torch's AdamW runs on whole tensors: element by
    element, so the bits are the same."""
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

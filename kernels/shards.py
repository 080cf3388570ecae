"""A head whose classes are cut over the processes of a group: what they tell each other of a row.

C rows of one chunk, V classes of the whole head, n processes; the tokens are the same on each.

    1  maximum   the peak of the other classes' logits                        (C, 1)
    2  sum       S = sum exp(z - peak), the target's z, sum -e log e           (C, 2 or 3)
    3  sum       dX, which every process has a part of                        (C, D)

What a row knows after 2 is what it would know of the whole head, so logp, lse, entropy and the
gradient of a process's own logits are those of the whole. dW needs no process but its own.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Tensor = torch.Tensor


class RowSums(NamedTuple):
    """What the logits of a row add up to, each (C, 1); `others` and `plogp` leave out the target.

    Two classes, logits [0, 0], target 0: z_target = 0, peak = 0, others = 1, plogp = 0.
    """

    z_target: Tensor
    peak: Tensor  # of the other classes
    others: Tensor  # sum e, e = exp(z - peak)
    plogp: Tensor | None  # sum -e log e, where an entropy is wanted

    def joined(self, other: "RowSums", own_C1: Tensor) -> "RowSums":
        """The sums with those of other classes, without an entropy; own_C1: bool, whether the
        target is one of these."""
        peak_C1 = torch.maximum(self.peak, other.peak)
        others_C1 = self.others * torch.exp(self.peak - peak_C1)
        others_C1 += other.others * torch.exp(other.peak - peak_C1)
        z_target_C1 = torch.where(own_C1, other.z_target, self.z_target)
        return RowSums(z_target_C1, peak_C1, others_C1, None)


def part(classes: int, size: int, rank: int) -> range:
    """The classes of a rank, as torch's `Shard(0)` cuts them: 10 over 4 are 3, 3, 3, 1."""
    share = -(-classes // size)
    return range(min(share * rank, classes), min(share * (rank + 1), classes))


def placed(targets: Tensor, own: range) -> tuple[Tensor, Tensor]:
    """Each target's place among the own classes, and whether it is one; 0 where it is not."""
    is_own = (targets >= own.start) & (targets < own.stop)
    return (targets - own.start).masked_fill(~is_own, 0), is_own


class Shards(NamedTuple):
    """The cut of a head: its process group, by name, and V."""

    group: str  # an op takes a name, no group
    classes: int

    @property
    def processes(self) -> Any:
        # As torch's own ops find the group; there is no public way back from its name.
        registry: Any = dist.distributed_c10d
        return registry._resolve_process_group(self.group)

    def of(self, rank: int) -> range:
        return part(self.classes, dist.get_world_size(self.processes), rank)

    @property
    def widest(self) -> int:
        """Classes of the first rank, which has the most."""
        return len(self.of(0))

    def place(self, targets_K: Tensor) -> tuple[Tensor, Tensor]:
        """As `placed`, among this process's classes."""
        return placed(targets_K, self.of(dist.get_rank(self.processes)))

    def whole(self, own: RowSums, own_C1: Tensor) -> RowSums:
        """The sums over all classes, the same bits on every process.

        own_C1: bool, whether the row's target is a class of this process.
        """
        peak_C1 = own.peak.clone()
        self._reduce(peak_C1, dist.ReduceOp.MAX)
        lift_C1 = peak_C1 - own.peak
        factor_C1 = torch.exp(-lift_C1)
        # A sum and not a maximum: it hands on a NaN, which must not look like a number.
        sums = [own.others * factor_C1, own.z_target.masked_fill(~own_C1, 0.0)]
        if own.plogp is not None:
            # e shrinks by the factor: both terms of its -e log e are >= 0, so nothing cancels.
            sums.append(factor_C1 * (own.plogp + lift_C1 * own.others))
        sums_C = torch.cat(sums, dim=1)
        self._reduce(sums_C, dist.ReduceOp.SUM)
        others_C1, z_target_C1, *plogp = sums_C.split(1, dim=1)
        return RowSums(z_target_C1, peak_C1, others_C1, plogp[0] if plogp else None)

    def begin_sum(self, x: Tensor) -> Any:
        """Starts to add x over the processes, in place: it is the sum after `.wait()`."""
        return dist.all_reduce(x, group=self.processes, async_op=True)

    def spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The largest and the smallest of each number over the processes."""
        both = torch.stack((x, -x))
        self._reduce(both, dist.ReduceOp.MAX)
        return both[0], -both[1]

    def _reduce(self, x: Tensor, op: Any) -> None:
        dist.all_reduce(x, op=op, group=self.processes)

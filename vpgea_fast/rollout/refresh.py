"""All weights of a model, and which of them a refresh of an engine has brought."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def exhausting(
    named: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """Take what is left of `named` at the end of the block, after an error too."""
    rest = iter(named)
    try:
        yield rest
    finally:
        # Each tensor may be a collective, in which processes without an error wait for this one.
        # None is kept: of a sharded model a process holds one unit at a time.
        for _ in rest:
            pass


class WeightSet:
    """All weights of a model, and which of them one refresh has brought.

    shapes   name -> shape, in the names of the model's own parameters
    aliases  second name of a tied weight -> its first; one of the two is enough
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str] | None = None
    ) -> None:
        self.shapes, self.aliases = shapes, aliases or {}
        self.arrivals: set[str] = set()
        self.misfits: list[str] = []

    @property
    def largest(self) -> int:
        """The number of elements of the largest weight."""
        return max(map(math.prod, self.shapes.values()))

    @classmethod
    def of(cls, model: torch.nn.Module) -> WeightSet:
        """List the weights of `model`, which may lie on the meta device."""
        first: dict[int, str] = {}
        shapes, aliases = {}, {}
        # By identity: a tied head is the very object that the embedding is, also without storage.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if (original := first.setdefault(id(parameter), name)) != name:
                aliases[name] = original
            shapes[name] = tuple(parameter.shape)
        return cls(shapes, aliases)

    def fitting(
        self, named: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that fit, under their first names; note the others for `check`."""
        # Not in the generator, which starts at the first `next`: a loader that asks for nothing
        # must find an empty set in `check`, not that of the refresh before.
        self.arrivals, self.misfits = set(), []
        return self._fitting(named)

    def _fitting(
        self, named: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named:
            if name not in self.shapes:
                self.misfits.append(f"unknown {name}")
            elif tuple(tensor.shape) != self.shapes[name]:
                self.misfits.append(
                    f"shape of {name}: got {tuple(tensor.shape)}, expected {self.shapes[name]}"
                )
            else:
                name = self.aliases.get(name, name)
                # Noted only when the loader asks, so a weight it never asks for counts as missing.
                self.arrivals.add(name)
                yield name, tensor

    def both_names(
        self, named: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a tied weight under its second name too, for an engine that does not tie it."""
        second = {first: name for name, first in self.aliases.items()}
        for name, tensor in named:
            yield name, tensor
            if name in second:
                # A copy, as a rule of the embedding: safetensors refuses tensors that share memory.
                yield second[name], tensor.clone()

    def check(self) -> None:
        """Refuse a refresh with missing, unknown or misshapen weights, and list them all."""
        absent = self.shapes.keys() - self.aliases.keys() - self.arrivals
        misfits = [*self.misfits, *(f"missing {name}" for name in self.shapes if name in absent)]
        if misfits:
            raise ValueError(
                "weights do not fit the rollout model, which cannot sample now; give every "
                f"parameter under its name in model.named_parameters(): {'; '.join(misfits)}"
            )

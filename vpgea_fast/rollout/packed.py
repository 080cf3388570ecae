"""Large weights laid out once for the products of a decode, where a CPU makes them.

A token multiplies each weight by a few rows. The sgemm behind F.linear lays a large weight out anew
in every call, which takes longer than the product; oneDNN takes one that is laid out already.
Milliseconds on two cores (AVX2), float32:

    weight           rows   F.linear   packed
    32768 x 512        32       25.8     10.5
    32768 x 512         8       15.3      5.3
    8960 x 1536        32       19.6      9.6
    1408 x 512         32        0.5      0.5
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LEAST = 2**20
"""Elements of a weight from which on it is packed: smaller ones lie in a cache, and gain little."""
ROWS = 32
"""Rows that copies are laid out for. Of any number a product is as fast; a layout by the rows of a
call would give a wave that is drawn alone other bits."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Multiply by packed copies of the large weights inside.

    Packing takes what three tokens' products do, and the copies the memory of those weights. Of
    what is no plain float32 Linear on a CPU, or computes something else, nothing changes. No weight
    may change inside: the copy would not.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _large(m)]
    try:
        for layer in layers:
            # On the instance, so that hooks and wrappers around the layer stay what they are.
            vars(layer)["forward"] = _product(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _large(layer: nn.Linear) -> bool:
    """Whether its product is F.linear's of a large weight, and there is another way to make it."""
    # A subclass or a forward of its own (a quantised layer, a caller's patch) computes otherwise.
    if not AVAILABLE or type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight: Any = layer.weight
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype is torch.float32
    return plain and weight.device.type == "cpu" and weight.numel() >= LEAST


def _product(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's forward, by a packed copy of its weight."""
    weight, bias = layer.weight.detach(), layer.bias
    # torch's own names for its compiler, which packs the weights of a frozen graph so.
    copy = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
            return F.linear(hidden, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(hidden, copy, bias, "none", [], "")

    return forward


def _available() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


AVAILABLE = _available()
"""Whether this torch has oneDNN's packed products."""

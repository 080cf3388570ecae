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

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
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
            weight = layer.weight.detach()
            # torch's own names for its compiler, which packs the weights of a frozen graph so.
            _COPIES[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            # On the instance, so that hooks and wrappers around the layer stay what they are.
            vars(layer)["forward"] = MethodType(_forward, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
            _COPIES.pop(layer.weight.data_ptr(), None)


def _large(layer: nn.Linear) -> bool:
    """Whether its product is F.linear's of a large weight, and there is another way to make it."""
    # A subclass or a forward of its own (a quantised layer, a caller's patch) computes otherwise.
    if not AVAILABLE or type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight: Any = layer.weight
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype is torch.float32
    return plain and weight.device.type == "cpu" and weight.numel() >= LEAST


_COPIES: dict[int, torch.Tensor] = {}
"""By the address of the weight: a compiled graph gets weights, and knows no copy."""


def _forward(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    if hidden.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(hidden, layer.weight, layer.bias)
    return _product(hidden, layer.weight, layer.bias)


@torch.library.custom_op("vpgea_fast::packed_product", mutates_args=())
def _product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear, by the packed copy of the weight."""
    copy = _COPIES[weight.data_ptr()]
    return torch.ops.mkldnn._linear_pointwise(hidden, copy, bias, "none", [], "")


@_product.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


def _available() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


AVAILABLE = _available()
"""Whether this torch has oneDNN's packed products."""

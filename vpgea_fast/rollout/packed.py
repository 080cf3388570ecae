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

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import nn

LEAST = 2**20
"""Elements of a weight from which on it is packed: smaller ones lie in a cache, and gain little."""
ROWS = 32
"""Rows that copies are laid out for. Of any number a product is as fast; a layout by the rows of a
call might give a wave that is drawn alone other bits."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Multiply by packed copies of the large weights inside.

    Each is packed at its first product, which takes what three tokens' products do, and the copies
    the memory of those weights. Of what is no plain float32 Linear on a CPU, or computes something
    else, nothing changes, nor of a product under autograd. A weight that is written to inside is
    packed anew, but torch counts no write by `.data` or by a fused optimizer: make none.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _large(m)]
    copies = [_copy_of(layer.weight) for layer in layers]
    _DRAWS.update(layers)
    try:
        for layer in layers:
            # On the instance, so that hooks and wrappers around the layer stay what they are.
            vars(layer)["forward"] = MethodType(_forward, layer)
        yield
    finally:
        copies.clear()  # a traceback may hold this frame
        _DRAWS.subtract(layers)
        for layer in layers:
            if not _DRAWS[layer]:
                del _DRAWS[layer]
                vars(layer).pop("forward", None)


def _large(layer: nn.Linear) -> bool:
    """Whether its product is F.linear's of a large weight, and there is another way to make it."""
    # A subclass or a forward of its own (a quantised layer, a caller's patch) computes otherwise.
    own = "forward" in vars(layer) and layer not in _DRAWS
    if not AVAILABLE or not torch.backends.mkldnn.enabled or type(layer) is not nn.Linear or own:
        return False
    weight: Any = layer.weight
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype is torch.float32
    # Of an inference tensor torch counts no changes.
    counted = plain and not weight.is_inference()
    return counted and weight.device.type == "cpu" and weight.numel() >= LEAST


class _Copy:
    """A packed weight, as it is at each product."""

    def __init__(self, weight: torch.Tensor) -> None:
        # An alias: while it lives no other weight gets this address.
        self.weight, self.version = weight.detach(), -1
        self.packed: torch.Tensor | None = None

    def product(self, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        version = self.weight._version
        if self.version != version:
            # torch's own names for its compiler, which packs the weights of a frozen graph so.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)
            self.version = version
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, bias, "none", [], "")


_COPIES: WeakValueDictionary[tuple[int, ...], _Copy] = WeakValueDictionary()
"""By where the weight lies: a compiled graph gets weights, and knows no copy."""

_DRAWS: Counter[nn.Module] = Counter()
"""Of each layer, the open blocks of `packed`."""


def _place(weight: torch.Tensor) -> tuple[int, ...]:
    # A slice or the transpose of a weight begins at its address.
    return (weight.data_ptr(), *weight.shape, *weight.stride())


def _copy_of(weight: torch.Tensor) -> _Copy:
    """The copy that another block has of this weight, or a new one."""
    copy = _COPIES.setdefault(_place(weight), _Copy(weight))
    copy.version = -1  # what wrote to `.data` since then has left no count
    return copy


def _forward(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    plain = hidden.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    if not plain or torch.is_grad_enabled():
        return F.linear(hidden, layer.weight, layer.bias)
    # The op, which a graph needs, takes 60 microseconds a call.
    product = _graph_product if torch.compiler.is_compiling() else _product
    return product(hidden, layer.weight, layer.bias)


# The name by which pickle finds it: of a model saved inside it is the forward of the class.
_forward.__name__ = "forward"


def _product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear, by the packed copy of the weight where there is one: the weight may be another
    than at the start, and a graph or a copy of the model may outlive the block."""
    copy = _COPIES.get(_place(weight))
    return F.linear(hidden, weight, bias) if copy is None else copy.product(hidden, bias)


_graph_product = torch.library.custom_op("vpgea_fast::packed_product", _product, mutates_args=())


@_graph_product.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


def _available() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


AVAILABLE = _available()
"""Whether this torch has oneDNN's packed products."""

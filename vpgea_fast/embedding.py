"""Embeddings whose gradient a CPU adds up in float32, as CUDA does.

torch's CPU kernel adds the rows of an id in the weight's dtype. In bfloat16 a sum that is 256 times
its next term takes no more of it: 800 equal rows come out a quarter too small.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from vpgea_fast.kernels.chunked import HALF


def add_in_float32(model: nn.Module) -> None:
    """Change the embeddings of a model on a CPU, in place: their class, and none of their tensors.

    Weights that are float32 when the forward runs keep torch's kernel.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and not isinstance(module, _Embedding):
            module.__class__ = _beneath(type(module))


@cache
def _beneath(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    """The class with its own forward: Gemma's scales what `super().forward` looks up."""
    if kind is nn.Embedding:
        return _Embedding
    bases: Any = (kind, _Embedding)
    return type(kind.__name__, bases, {})


class _Embedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.Embedding calls it
        plain = self.max_norm is None and not (self.scale_grad_by_freq or self.sparse)
        if not plain or self.weight.dtype not in HALF or not torch.is_grad_enabled():
            return super().forward(input)
        return _Lookup.apply(self.weight, input, self.padding_idx)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_VD: torch.Tensor, ids: torch.Tensor, padding: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding = weight_VD.shape, padding
        return nn.functional.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (ids,), (gradient,) = ctx.saved_tensors, gradients
        # U ids of the batch: float32 sums of all V would be twice the gradient's memory.
        ids_U, place_N = ids.unique(return_inverse=True)
        rows_ND = gradient.reshape(-1, ctx.shape[1]).float()
        sums_UD = rows_ND.new_zeros(len(ids_U), ctx.shape[1])
        sums_UD.index_add_(0, place_N.flatten(), rows_ND)
        del rows_ND  # as large as the sums, which are rounded into another one
        if ctx.padding is not None:
            sums_UD[ids_U == ctx.padding] = 0.0
        made_VD = gradient.new_zeros(ctx.shape)
        made_VD[ids_U] = sums_UD.to(gradient.dtype)
        return made_VD, None, None

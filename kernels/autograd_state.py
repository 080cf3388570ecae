"""What torch is doing with a tensor: compiling it, batching it, transforming it, or passing back
through its node for the last time.

The answers hang on private names of torch, which stand here alone; where one is missing the answer
is the slower, safe one.
"""

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

from vpgea_fast.kernels.selection import check

Tensor = torch.Tensor


def without_values(x: Tensor) -> bool:
    """Compiling, or a tensor that only has a shape (fake, meta) or a meaning of its own."""
    # A subclass sees one op, and not products into buffers of which it knows nothing.
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.device.type == "meta"
    )


NO_TRANSFORMS = (
    "this loss has reverse-mode gradients only, made by hand: no torch.func transform (grad, vmap, "
    "jvp) and no forward-mode AD goes through it. Use backward() or torch.autograd.grad, or "
    "vpgea_fast.kernels.reference"
)


def refuse_transforms(x: Tensor) -> None:
    """RuntimeError inside a transform of torch.func, of any tensor, and for one of forward mode.

    torch's own words name setup_context, and a compiled torch.func.grad would not say a word: the
    op below it has no gradient there, so the answer would be 0. Not a `jvp` of the functions above
    that raises: torch.compile refuses a function that has one.
    """
    # torch.compile evaluates this call while it traces.
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
    if transforms is not None and transforms():
        raise RuntimeError(NO_TRANSFORMS)
    if torch.compiler.is_compiling():
        return
    # Without a dual level no tensor has a tangent, and to ask each one would make a view of it.
    dual = getattr(forward_ad, "_current_level", -1) >= 0
    if dual and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(NO_TRANSFORMS)


def refuse_double_backward() -> None:
    # Grad mode is on in a backward for create_graph alone, which compiled code refuses by itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "this loss can be differentiated once only: its gradients are made by hand. Drop "
            "create_graph=True, or use vpgea_fast.kernels.reference"
        )


def check_one(grad_loss: Tensor) -> None:
    message = (
        "dweight_out already holds dW, so the gradient that reaches the loss must be 1: put every "
        "factor (loss scale, 1 / micro-batches) into the coefficients"
    )
    if without_values(grad_loss):  # no op of ours: one without outputs would be dropped
        torch.ops.aten._assert_async.msg(grad_loss == 1, message)
    elif is_batched(grad_loss):
        # An assertion has one value to look at, a batch of gradients many.
        raise ValueError(message)
    else:
        check(grad_loss == 1, message)


def may_overwrite(grad_loss: Tensor) -> bool:
    """Whether this backward is the last one, so that the stored gradients may be scaled in place:
    no second dX and dW, and AccumulateGrad takes them over without a copy.

    Torch answers by private names; where one is missing the answer is no. A batched grad_loss
    (is_grads_batched) has no place to be written to.
    """
    if without_values(grad_loss) or (probes := _probes()) is None:
        return False
    # A graph that is kept will be asked for the same gradients again.
    return not probes[0]() and not is_batched(grad_loss)


def is_batched(x: Tensor | None) -> bool:
    """Whether x stands for many tensors (is_grads_batched, vmap); no where torch cannot tell."""
    return x is not None and any(probe(x) for probe in (_probes() or ())[1:])


@functools.cache
def _probes() -> list[Any] | None:
    """Torch's answers to: is the running backward's graph kept, and is a tensor batched?"""
    found: list[Any] = [
        getattr(getattr(torch._C, module, None), name, None)
        for module, name in (
            ("_autograd", "_get_current_graph_task_keep_graph"),
            ("_functorch", "is_batchedtensor"),
            ("_functorch", "is_legacy_batchedtensor"),
        )
    ]
    return None if None in found else found

"""What a pass adds dW to, beside its outputs: checked before the pass writes."""

import torch

from vpgea_fast.kernels.autograd_state import without_values
from vpgea_fast.kernels.checks import SPOKEN, check_plain, check_shape, own_part, shards_of
from vpgea_fast.kernels.contract import Inputs
from vpgea_fast.kernels.selection import accumulator

Tensor = torch.Tensor


def checked_sink(
    dweight_out: Tensor | None, weight_VD: Tensor, inputs: Inputs, **others: Tensor | None
) -> Tensor | None:
    """What dW is added to; the own part of one that is cut as the weight is.

    inputs, others: all that the pass reads, so that it is not overwritten meanwhile.
    """
    if dweight_out is None:
        return None
    grad_VD = weight_VD.grad if weight_VD.is_leaf else None
    if shards_of(weight_VD) is not None:
        dweight_out = own_part("dweight_out", dweight_out, weight_VD)
        weight_VD = own_part("weight_VD", weight_VD, weight_VD)
    # full_tensor() is a copy: what is added to it would be lost.
    check_plain("dweight_out", dweight_out, instead="a plain buffer of the whole weight")
    check_shape("dweight_out", dweight_out, weight_VD.shape)
    # Micro-batches add up in it: half precision would lose the small ones.
    expected = accumulator(weight_VD)
    if dweight_out.dtype != expected or dweight_out.device != weight_VD.device:
        raise ValueError(
            f"dweight_out: got {dweight_out.dtype} on {dweight_out.device}, expected {expected} on "
            f"{weight_VD.device}"
        )
    (rows, columns), (down, right) = dweight_out.shape, dweight_out.stride()
    # An expanded or sliding buffer: addmm_ would add many entries into one.
    crossed = down <= (columns - 1) * right and right <= (rows - 1) * down
    if crossed or (rows > 1 and down == 0) or (columns > 1 and right == 0):
        raise ValueError(
            f"dweight_out: its entries share memory (strides {down}, {right}), pass a dense buffer"
        )
    if dweight_out.requires_grad:
        raise ValueError("dweight_out requires grad: pass a plain buffer, such as weight.grad")
    read = dict(zip(SPOKEN, inputs, strict=True)) | others
    _check_apart(dweight_out, {name: x for name, x in read.items() if x is not None}, grad_VD)
    return dweight_out


def _check_apart(sink_VD: Tensor, read: dict[str, Tensor], grad_VD: Tensor | None) -> None:
    """ValueError: a sink whose memory is that of something else, which dW would be added to."""
    if without_values(sink_VD):  # no memory to look at
        return
    remedy = "pass weight.grad itself, or a buffer of its own (torch.zeros_like(weight))"
    for name, x in read.items():
        if _in_one_memory(sink_VD, x):
            raise ValueError(f"dweight_out: got memory of {name}, which dW would change; {remedy}")
    grad_VD = getattr(grad_VD, "_local_tensor", grad_VD)
    if grad_VD is None or not _in_one_memory(sink_VD, grad_VD):
        return
    if (sink_VD.data_ptr(), sink_VD.stride()) != (grad_VD.data_ptr(), grad_VD.stride()):
        raise ValueError(
            "dweight_out: got memory of weight.grad in another layout, where dW would meet other "
            f"classes; {remedy}"
        )


def _in_one_memory(a: Tensor, b: Tensor) -> bool:
    """Whether their bytes cross: not whether their storage is one, as that of a flat buffer is."""
    if without_values(b) or a.device != b.device or not a.numel() or not b.numel():
        return False
    return all(x.data_ptr() < _end(y) for x, y in ((a, b), (b, a)))


def _end(x: Tensor) -> int:
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (steps + 1) * x.element_size()

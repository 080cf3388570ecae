"""The products of a chunk of the head, and the sinks that they go to.

C rows of a chunk, D hidden, V vocabulary, B classes of a block. A dW that has no numbers yet is
memory that nobody reads. Where the logits of all rows fit into it, they lie there, up to its end:

    | rows of dW without a number           | dz (C, V)               |
    | dW = dz' X, of the classes before dz  | dz of the other classes |      C / D of dz, moved on
    | written                                   | dW, of the next ones  | dz |

and so on, until what is left of dz is small enough for a copy. So a float32 pass over all rows
holds little more than its gradients, and writes dW once.
"""

from collections.abc import Iterator

import torch

from vpgea_fast.kernels.contract import Head, Sinks

Tensor = torch.Tensor

HALF = (torch.float16, torch.bfloat16)

COPIED = 512 << 10
"""Bytes of dz that are copied at a time: a quarter of a core's second cache."""


def operand_of(hidden_TD: Tensor) -> torch.dtype:
    """Of the GEMMs: only CUDA has half-precision ones with fp32 out; elsewhere they are upcast."""
    dtype = hidden_TD.dtype
    return dtype if hidden_TD.is_cuda else torch.promote_types(dtype, torch.float32)


def upcast_block(weight_VD: Tensor, operand: torch.dtype) -> Tensor | None:
    """Memory for 2 MiB of the weight in the operands' dtype, one class at least; None where it has
    that dtype."""
    if weight_VD.dtype == operand:
        return None
    vocabulary, hidden = weight_VD.shape
    classes = max(1, (2 << 20) // max(1, hidden * operand.itemsize))
    return weight_VD.new_empty(min(vocabulary, classes), hidden, dtype=operand)


def weight_blocks(weight_VD: Tensor, upcast_BD: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(columns of z, their rows of the weight in the operands' dtype): all at once, or upcast into
    the one block, which stays in the cache: the time of a whole float32 copy, without its memory.
    """
    if upcast_BD is None:
        yield slice(None), weight_VD
        return
    # One block for all: the next one would be made while the caller still holds the last.
    for start in range(0, weight_VD.shape[0], upcast_BD.shape[0]):
        columns = slice(start, start + upcast_BD.shape[0])
        part_BD = weight_VD[columns]
        yield columns, upcast_BD[: part_BD.shape[0]].copy_(part_BD)


def matmul(
    left: Tensor, right: Tensor, accumulator: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """left @ right in the accumulator's dtype: only CUDA has a half GEMM with fp32 out."""
    # cuBLAS accumulates in float32 and would round its result: out_dtype keeps it.
    if left.dtype != accumulator and left.is_cuda:
        return torch.mm(left, right, out_dtype=accumulator, out=out)
    return torch.mm(left.to(accumulator), right.to(accumulator), out=out)


def add_matmul_(
    total: Tensor, left: Tensor, right: Tensor, alpha: float, *, begun: bool = True
) -> None:
    """total += alpha left @ right, without a temporary of total's size; not `begun`: = instead."""
    beta = 1.0 if begun else 0.0
    if left.dtype != total.dtype and left.is_cuda:
        torch.addmm(total, left, right, alpha=alpha, beta=beta, out_dtype=total.dtype, out=total)
        return
    # In place by `out`: torch's FLOP counter knows addmm and not addmm_.
    left, right = left.to(total.dtype), right.to(total.dtype)
    torch.addmm(total, left, right, alpha=alpha, beta=beta, out=total)


def weight_sink(dweight_VD: Tensor | None, unit: Tensor | float) -> Tensor | None:
    """What dW's GEMMs add to: the caller's sum; in fp16 zeros, which are in units until the end."""
    # Without units dW's GEMMs add to the caller's sum itself.
    if dweight_VD is None or not isinstance(unit, Tensor):
        return dweight_VD
    return torch.zeros_like(dweight_VD)


def settle_weight(dweight_VD: Tensor | None, sink_VD: Tensor | None, unit: Tensor | float) -> None:
    """Adds what was kept in units to the caller's sum, once, after the last chunk."""
    if dweight_VD is not None and sink_VD is not None and sink_VD is not dweight_VD:
        dweight_VD.add_(sink_VD.mul_(unit))


def _rounded_(z_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Rewrites z_CV, contiguous, with the nearest values of `dtype`, 64 KiB of them at a time: they
    stay in the cache, and a copy of the chunk would be half as much memory again."""
    for part in z_CV.view(-1).split((64 << 10) // dtype.itemsize):
        part.copy_(part.to(dtype))
    return z_CV


def add_gradients_(
    z_CV: Tensor,
    hidden_CD: Tensor,
    rows_C: Tensor | slice,
    *,
    head: Head,
    sinks: Sinks,
    sink_VD: Tensor | None,
    unit: Tensor | float,
    upcast_BD: Tensor | None,
    begun: bool = True,
    begun_hidden: bool = False,
) -> None:
    """Puts a chunk's gradients into the sinks; z_CV is dz, and is rewritten. begun: dW exists;
    begun_hidden: and dX of these rows, in `wide` numbers.

    rows_C: a slice of rows gets dX in its place, where nothing is rounded or summed over processes.
    """
    dtype, operand, wide = head.weight.dtype, hidden_CD.dtype, z_CV.dtype
    if sinks.bias is not None:
        # From the float32 dz, which is rounded for the GEMMs only.
        sinks.bias.add_(z_CV.sum(0))
    in_units = isinstance(unit, Tensor)
    if in_units:
        z_CV.div_(unit)
    # Rounded on a CPU all the same, so that it gives a GPU's gradients.
    dz_CV = z_CV.to(dtype) if operand == dtype else _rounded_(z_CV, dtype)
    work = dhidden_CD = None
    if sinks.hidden is not None:
        in_place = isinstance(rows_C, slice)
        # A view or, of rows here and there, a copy.
        dhidden_CD = (
            sinks.hidden[rows_C]
            if in_place or begun_hidden
            else torch.zeros_like(hidden_CD, dtype=wide)
        )
        _put_dhidden_(dhidden_CD, dz_CV, head, upcast_BD, begun=begun_hidden)
        if in_units:
            dhidden_CD.mul_(unit)
        work = None if head.shards is None else head.shards.begin_sum(dhidden_CD)
    if sink_VD is not None:
        put_dweight_(sink_VD, dz_CV, hidden_CD, head.logit_scale, begun=begun)
    if not isinstance(rows_C, slice) and sinks.hidden is not None and dhidden_CD is not None:
        if work is not None:
            work.wait()  # the sum over processes ran beside the product for dW
        sinks.hidden.index_copy_(0, rows_C, dhidden_CD.to(sinks.hidden.dtype))


def _put_dhidden_(
    dhidden_CD: Tensor, dz_CV: Tensor, head: Head, upcast_BD: Tensor | None, *, begun: bool
) -> None:
    """(C, D) = logit_scale dz W, += where it is begun; added up over the blocks of classes and
    rounded later."""
    for columns, weight_BD in weight_blocks(head.weight, upcast_BD):
        add_matmul_(dhidden_CD, dz_CV[:, columns], weight_BD, head.logit_scale, begun=begun)
        begun = True


def room_in_dweight(sinks: Sinks, rows: int, dtype: torch.dtype) -> Tensor | None:
    """(rows, V) up to the end of a fresh dW; None where they do not fit, or a copy is as small.

    Each move leaves rows / D of dz: from two thirds on there would be too many. Below, one writes a
    class at least, where two classes of dz are as small as a copy.
    """
    sink_VD = sinks.weight
    if not sinks.fresh or sink_VD is None or sink_VD.dtype != dtype or not sink_VD.is_contiguous():
        return None
    classes, width = sink_VD.shape
    entries, most = rows * classes, min(2 * width // 3, COPIED // (2 * dtype.itemsize))
    if entries * dtype.itemsize <= COPIED or rows > most:
        return None
    return sink_VD.view(-1)[-entries:].view(rows, classes)


def put_dweight_(
    sink_VD: Tensor, dz_CV: Tensor, hidden_CD: Tensor, alpha: float, *, begun: bool
) -> None:
    """dW += alpha dz' X, or = where it is not begun; a dz in the memory of dW is lost."""
    if begun or not 0 <= dz_CV.data_ptr() - sink_VD.data_ptr() < sink_VD.nbytes:
        add_matmul_(sink_VD, dz_CV.T, hidden_CD, alpha, begun=begun)
        return
    width, written = sink_VD.shape[1], 0
    while dz_CV.numel() * dz_CV.itemsize > COPIED:
        # Of these classes the rows of dW have nothing of dz.
        free = int(dz_CV.storage_offset() - sink_VD.storage_offset()) // width - written
        part_BD = sink_VD[written : written + free]
        add_matmul_(part_BD, dz_CV[:, :free].T, hidden_CD, alpha, begun=False)
        written, dz_CV = written + free, _moved_to_end(sink_VD, dz_CV[:, free:])
    add_matmul_(sink_VD[written:], dz_CV.clone().T, hidden_CD, alpha, begun=False)


def _moved_to_end(sink_VD: Tensor, dz_CV: Tensor) -> Tensor:
    """dz, moved together up to the end of dW. None is overwritten before it moves: a row's place is
    not before the row, and the last rows go first; through a copy, since the two may overlap."""
    rows, classes = dz_CV.shape
    moved_CV = sink_VD.view(-1)[sink_VD.numel() - dz_CV.numel() :].view(rows, classes)
    step = max(1, COPIED // (classes * dz_CV.itemsize))
    for start in reversed(range(0, rows, step)):
        block = slice(start, start + step)
        moved_CV[block] = dz_CV[block].clone()
    return moved_CV

"""The rows of a call that take part, and the checks that need their values.

T tokens, K rows that take part. A row takes part with a target that is not ignored, a coefficient
that is not 0 and, where `rows` is given, a place in it. Backends see these rows only.
"""

import math
from dataclasses import dataclass

import torch

from vpgea_fast.kernels.contract import NUMBERS, Inputs, Settings
from vpgea_fast.kernels.shards import Shards

Tensor = torch.Tensor


@dataclass(frozen=True)
class Selection:
    """The rows that take part and all that belongs to them.

    kept_T: (T,) bool. masked: rows_K holds rows that are not kept; they must not show in results.
    """

    rows_K: Tensor  # int64
    targets_K: Tensor  # int64, in [0, V)
    temperature: float | Tensor  # (K,) where it is a tensor
    kept_T: Tensor
    masked: bool

    def gather(self, values_T: Tensor) -> Tensor:
        """(T,) to (K,), 0 at masked rows."""
        return _gather(values_T, self.rows_K, self.kept_T if self.masked else None)

    def scatter(self, values_K: Tensor) -> Tensor:
        """(K,) to (T,), 0 at rows that take no part."""
        values_T = values_K.new_zeros(self.kept_T.shape).index_copy(0, self.rows_K, values_K)
        return values_T.masked_fill(~self.kept_T, 0) if self.masked else values_T


def select(inputs: Inputs, settings: Settings, coef_T: Tensor | None = None) -> Selection:
    """The rows with a coefficient, a target and a place in `rows`.

    One host synchronisation on CUDA unless `rows` is given or a graph is being captured: then the
    rows that take no part stay, masked.
    """
    targets_T, rows, validate = inputs.targets_T, inputs.rows, settings.validate
    tokens, shards = targets_T.shape[0], settings.shards
    vocabulary = inputs.weight_VD.shape[0] if shards is None else shards.classes
    kept_T = targets_T != settings.ignore_index
    if coef_T is not None:
        kept_T = kept_T & (coef_T != 0)
    if rows is not None:
        if validate or not rows.is_cuda:  # on CUDA the indexing kernels assert it themselves
            inside = ((rows >= 0) & (rows < tokens)).all()
            check(inside, f"rows must lie in [0, T = {tokens})", validate)
        listed_T = torch.zeros_like(kept_T).index_fill_(0, rows, True)
        check(listed_T.sum() == rows.shape[0], "rows names a row twice", validate)
        kept_T = kept_T & listed_T
    temperature = settings.temperature
    masked = rows is not None or _capturing(targets_T)
    if rows is not None:
        rows_K = rows
    elif masked:
        rows_K = torch.arange(tokens, device=targets_T.device)
    else:
        rows_K = kept_T.nonzero().squeeze(1)  # the synchronisation: its length is a value
    if inputs.temperature_T is not None:
        temperature = inputs.temperature_T.index_select(0, rows_K)
        temperature = temperature.to(accumulator(inputs.hidden_TD))
    # Masked rows get class 0, which exists: their own target may be out of range.
    selection = Selection(
        rows_K=rows_K,
        targets_K=_gather(targets_T.long(), rows_K, kept_T if masked else None),
        temperature=temperature,
        kept_T=kept_T,
        masked=masked,
    )
    if shards is not None:
        _check_alike(shards, inputs.hidden_TD, selection, coef_T=coef_T, settings=settings)
    # After it: what one process alone refuses, the others would wait for.
    in_range_T = (targets_T >= 0) & (targets_T < vocabulary)
    # Rows that take no part may hold any target, such as a padding id of another tokenizer.
    check(
        (in_range_T | ~kept_T).all(),
        f"targets_T holds values outside [0, V = {vocabulary}) that are not ignore_index = "
        f"{settings.ignore_index}: give them ignore_index, or ids of this head's tokenizer",
        validate,
    )
    if inputs.temperature_T is not None:
        fine = ((inputs.temperature_T > 0) & (inputs.temperature_T < math.inf)).all()
        check(fine, "temperature: every value must be positive and finite", validate)
    return selection


SAMPLED = 64
"""Hidden rows that processes compare: N x D would cost a copy, other tokens show in any few."""


def _check_alike(
    shards: Shards,
    hidden_TD: Tensor,
    selection: Selection,
    *,
    coef_T: Tensor | None,
    settings: Settings,
) -> None:
    """Refuses a head that is cut over processes with rows of their own, such as FSDP's.

    One maximum of two dozen numbers, before any whose size depends on the rows: ranks with unequal
    counts would wait for each other without end. Replicas may differ by random roundings.
    """
    rows_K, kept_T = selection.rows_K, selection.kept_T
    # Weighted by place: the same rows in another order are other rows.
    place_K = torch.arange(1.0, rows_K.shape[0] + 1, dtype=torch.float64, device=rows_K.device)
    few_F = rows_K[:: max(1, rows_K.shape[0] // SAMPLED)]
    hidden_FD = hidden_TD.detach().index_select(0, few_F).double()
    hidden_FD = hidden_FD.masked_fill(~kept_T.index_select(0, few_F).unsqueeze(1), 0.0)
    hidden_FD *= place_K[: few_F.shape[0], None]
    coef_K = torch.zeros_like(place_K) if coef_T is None else selection.gather(coef_T) * place_K
    # Logits in other units on one rank would make a plausible loss of no model. Numbers for NaN and
    # inf, which are told after: neither is more than the other.
    warmth_K = (place_K * selection.temperature).nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0)
    counts = [place_K.sum(), (place_K * selection.targets_K).sum()]  # whole numbers: exact
    # None as 0, which no option that may be None can be.
    counts += [place_K.new_full((), float(getattr(settings, name) or 0)) for name in NUMBERS]
    measures = (coef_K, hidden_FD, warmth_K)
    numbers = torch.stack([*counts, *(x.sum() for x in measures)])
    slack = 8 * torch.finfo(hidden_TD.dtype).eps
    bounds = torch.stack([*(0.0 * x for x in counts), *(slack * x.norm() for x in measures)])
    most, least = shards.spread(torch.stack((numbers, bounds)))
    # Where all hold NaN nothing is larger: the loss says it, as that of a whole head does.
    check(~(most[0] - least[0] > most[1]).any(), OTHER_ROWS, settings.validate)


OTHER_ROWS = (
    "weight_VD is a DTensor cut by classes, and the ranks of its mesh hold other rows (hidden "
    "states, targets, coefficients or temperatures) or other options: give each rank the same. "
    "Ranks with tokens of their own pass weight_VD.full_tensor(grad_placements=[Partial()]), and "
    "under FSDP2 call the loss inside the forward of the module that owns the weight"
)


def _gather(values_T: Tensor, rows_K: Tensor, kept_T: Tensor | None) -> Tensor:
    if kept_T is not None:
        values_T = values_T.masked_fill(~kept_T, 0)
    return values_T.index_select(0, rows_K)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def check(ok: Tensor, message: str, validate: bool = False) -> None:
    """ValueError unless `ok`; on CUDA an assertion in the stream, which costs no synchronisation,
    unless `validate` asks for the error here and now (not inside graph capture)."""
    if ok.is_cuda and (not validate or _capturing(ok)):
        torch.ops.aten._assert_async.msg(ok, message)
    elif not ok:
        raise ValueError(message)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

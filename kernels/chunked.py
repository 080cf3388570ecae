"""The language-model head in chunks of rows, in plain torch: one pass and no (T, V) tensor.

T tokens, K rows that take part, C rows of one chunk, D hidden, V vocabulary. With upstream
gradients (a, b, c) of (logp, lse, entropy H) of a row, its logit gradient is

    dz_v = p_v (b - a - c (log p_v + H))                 v other than the target
    dz_t = a (1 - p_t) + p_t (b - c (log p_t + H))       the target; 1 - p_t = -expm1(log p_t)

With a gradient m of the mean logit m / V is added to each, and one q of lse^2 adds 2 q lse to b.
Then dX = logit_scale da W, dW = logit_scale da' X, db = sum da with da = dz (1 - tanh^2) /
temperature. When a is known before the forward (the weighted loss: a = coefficient, b = c = 0) this
happens right after the logits are made: three GEMMs (6 K V D FLOP) instead of four.

Chunks have equal size and share one (C, V) buffer, rewritten in place:

    logits -> exp(z - peak), 0 at the target -> dz -> on CUDA a half-precision copy for two GEMMs

with one more (C, V) buffer for a capped head (tanh's slope) and one for an entropy (-e log e). They
are allocated once: new ones for every chunk cost a CPU a page fault every 4 KiB, 15 % of the logits
GEMM. A dW that is made anew has room for the logits (products.py, late.py). Else C is the largest
number of rows whose buffers fit in `chunk_bytes`; nothing else grows with V except dW (fp32).

A CPU has no half-precision GEMM with fp32 out, and without bfloat16 units those of torch are slow:
3.9 s of one thread with AVX2 for (768, 2051) @ (2051, 256), and 0.043 s in fp32. So products there
are fp32 ones of upcast operands, which hold the product of two halves: nothing is lost. The weight
is upcast 2 MiB at a time, dz rounded in place. On bfloat16 units: units.py.

| | inputs | GEMM operands | accumulators, statistics | outputs |
|---|---|---|---|---|
| bf16 | bf16 | bf16; dz rounded once | fp32 | fp32 values and dW, bf16 dX |
| fp16 | fp16 | fp16; dz in units of its bound / 2^14 | fp32 | fp32 values, dW and dX |
| fp32, fp64 | the same | the same | the same | the same |
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vpgea_fast.kernels import units
from vpgea_fast.kernels.contract import NO_SINKS, Head, Sinks, Upstream, Values
from vpgea_fast.kernels.epilogue import (
    dlogits_,
    log_sum_p2,
    put_logits_,
    row_sums_,
    statistics_of,
    top1_and_mean,
)
from vpgea_fast.kernels.late import LateClasses, late_classes
from vpgea_fast.kernels.products import (
    HALF,
    add_gradients_,
    operand_of,
    room_in_dweight,
    settle_weight,
    upcast_block,
    weight_sink,
)
from vpgea_fast.kernels.shards import placed

Tensor = torch.Tensor


def default_chunk_bytes(device: torch.device, row_bytes: int = 0, dw_bytes: int = 1 << 40) -> int:
    """Memory for the (C, V) buffers: on CUDA up to 4 GiB and 1/16 of the memory, on a CPU 48 MiB.

    Every chunk reads the weight twice and dW once: a CPU's GEMMs lose 3 % of their rate at 128 rows
    and 13 % at 82 (V = 152064, one core). So there are 256 rows of `row_bytes`, whatever they need.
    A dW of 16 MiB stays in the cache: there 96 rows or 3 MiB are as fast.
    """
    if device.type != "cuda":
        small = dw_bytes <= 16 << 20
        return max(3 << 20, 96 * row_bytes) if small else max(48 << 20, 256 * row_bytes)
    return min(4 << 30, torch.cuda.get_device_properties(device).total_memory // 16)


def head_pass(
    hidden_TD: Tensor,
    head: Head,
    targets_K: Tensor,
    *,
    rows_K: Tensor,
    entropy: bool = False,
    statistics: bool = False,
    upstream: Upstream | None = None,
    sinks: Sinks = NO_SINKS,
    chunk_bytes: int | None = None,
) -> Values:
    """Runs one pass over the rows `rows_K` of hidden_TD. `statistics`: three reads of z more.

    Every backend has this signature. targets_K, the head's temperatures and the upstream gradients,
    each (K,), belong to the selected rows. With `upstream` the gradients are made in the same pass
    and put into the sinks. No host synchronisation; validates nothing: the public functions in
    vpgea_fast.losses do.
    """
    dtype = hidden_TD.dtype
    accumulator, operand = torch.promote_types(dtype, torch.float32), operand_of(hidden_TD)
    n_rows, shards = targets_K.shape[0], head.shards
    needs_entropy = entropy or (upstream is not None and upstream.entropy is not None)
    if n_rows == 0 or dtype is torch.float16:  # no product of dW's own, or one in units
        sinks = sinks.cleared()
    if n_rows == 0:  # no chunk, and so nothing to concatenate
        return _values(hidden_TD.new_empty(0, 6 if statistics else 3, dtype=accumulator), entropy)

    widest, own_K = head.weight.shape[0], None  # own_K: whose target is here; None: all
    if shards is not None:
        widest = shards.widest
        targets_K, own_K = shards.place(targets_K)
    plain = chunk_bytes is None and not (needs_entropy or statistics)
    late = late_classes(head, sinks, targets_K) if plain and _may_wait(head, upstream) else None
    if late is not None:
        head, sinks = late.early
        targets_K, own_K = placed(targets_K, range(late.first))
    # By the widest part of a head that is cut: every process must make the same chunks.
    rows_of = partial(chunk_rows, n_rows, widest, hidden_TD=hidden_TD, chunk_bytes=chunk_bytes)
    buffers_BCV = _buffers(rows_of, n_rows, late, head=head, sinks=sinks, entropy=needs_entropy)
    in_place = shards is None and _all_in_place(hidden_TD, rows_K, sinks)
    upcast_BD = upcast_block(head.weight, operand)
    gradients = None
    if upstream is not None:
        gradients = _Gradients(upstream, head, sinks, rows_K, dtype, upcast_BD)

    def read(chunk: slice) -> tuple[Tensor, Any]:
        rows_C: Any = chunk if in_place else rows_K[chunk]
        hidden_CD = hidden_TD[chunk] if in_place else hidden_TD.index_select(0, rows_C).to(operand)
        return hidden_CD, rows_C

    def run(chunk: slice) -> Tensor:
        hidden_CD, rows_C = read(chunk)
        targets_C1 = targets_K[chunk].unsqueeze(1)
        own_C1 = None if own_K is None else own_K[chunk].unsqueeze(1)
        # The last chunk may be shorter: views of the same buffers.
        z_CV, *spare = buffers_BCV[:, : hidden_CD.shape[0]].unbind()
        plogp_CV = spare.pop() if needs_entropy else None
        slope_CV = spare.pop() if head.capped else None
        # Before the other logits, which get the same memory.
        late_sums = None if late is None else late.sums(hidden_CD, chunk)
        put_logits_(z_CV, slope_CV, hidden_CD, head=head, upcast_BD=upcast_BD, chunk=chunk)
        # Of the logits themselves, before they become exponentials.
        columns = top1_and_mean(z_CV, targets_C1) if statistics else []
        sums = row_sums_(z_CV, plogp_CV, targets_C1=targets_C1, own_C1=own_C1)
        # Apart from `sums`: the exponentials in the buffer hang on this part's own peak.
        whole = sums if late_sums is None else sums.joined(*late_sums)
        if shards is not None and own_C1 is not None:
            whole = shards.whole(sums, own_C1)
        values_C3 = statistics_of(whole)
        if statistics:
            columns.append(log_sum_p2(z_CV, sums.peak, values_C3))
        if gradients is not None:
            gradients.put_(
                (z_CV, plogp_CV, slope_CV),
                read=(chunk, hidden_CD, rows_C),
                targets_C1=targets_C1,
                own_C1=own_C1,
                peak_C1=sums.peak,
                values_C3=values_C3,
            )
        return torch.cat((values_C3, *columns), dim=1)

    with units.of(hidden_TD):
        step = buffers_BCV.shape[1]
        columns_K = torch.cat([run(slice(start, start + step)) for start in range(0, n_rows, step)])
        if late is not None and gradients is not None:
            late.put_gradients_(columns_K, gradients.by_logits_K3, read)
    values = _values(columns_K, entropy)
    return values if gradients is None else gradients.settled(values)


class _Gradients:
    """What a pass makes of upstream gradients: dz of a chunk, and its share of the sinks."""

    def __init__(
        self,
        upstream: Upstream,
        head: Head,
        sinks: Sinks,
        rows_K: Tensor,
        dtype: torch.dtype,
        upcast_BD: Tensor | None,
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        classes = head.weight.shape[0] if head.shards is None else head.shards.classes
        self.upstream, self.head, self.sinks, self.rows_K = upstream, head, sinks, rows_K
        self.by_logits_K3 = upstream.by_logits(head.temperature, wide)
        self.smooth_K2 = upstream.smoothed(head.temperature, wide)
        self.unit = storage_unit(self.by_logits_K3, classes) if dtype is torch.float16 else 1.0
        self.sink_VD = weight_sink(sinks.weight, self.unit)
        self.upcast_BD = upcast_BD
        self.skipped: list[Tensor] = []

    def put_(
        self,
        buffers: tuple[Tensor, Tensor | None, Tensor | None],
        *,
        read: tuple[slice, Tensor, Any],
        targets_C1: Tensor,
        own_C1: Tensor | None,
        peak_C1: Tensor,
        values_C3: Tensor,
    ) -> None:
        """Rewrite a chunk's exponentials as dz, and put its gradients into the sinks. read: the
        chunk, its hidden states and which rows they are."""
        exp_CV, plogp_CV, slope_CV = buffers
        chunk, hidden_CD, rows_C = read
        dlogits_(
            exp_CV,
            plogp_CV=plogp_CV,
            slope_CV=slope_CV,
            targets_C1=targets_C1,
            own_C1=own_C1,
            peak_C1=peak_C1,
            values_C3=values_C3,
            upstream_C3=self.by_logits_K3[chunk],
            smooth_C2=None if self.smooth_K2 is None else self.smooth_K2[chunk],
        )
        bound_C = self.upstream.skipped(values_C3[:, 0], self.head.temperature, chunk)
        if bound_C is not None:
            self.skipped.append(bound_C)
            exp_CV, hidden_CD, rows_C = without_skipped_(
                bound_C, exp_CV, hidden_CD, self.rows_K[chunk]
            )
        add_gradients_(
            exp_CV,
            hidden_CD,
            rows_C,
            head=self.head,
            sinks=self.sinks,
            sink_VD=self.sink_VD,
            unit=self.unit,
            upcast_BD=self.upcast_BD,
            begun=not self.sinks.fresh or chunk.start > 0,
        )

    def settled(self, values: Values) -> Values:
        """The values of all rows, with the bounds of those left out; dW is whole after it."""
        settle_weight(self.sinks.weight, self.sink_VD, self.unit)
        return values._replace(skipped=torch.cat(self.skipped)) if self.skipped else values


def _may_wait(head: Head, upstream: Upstream | None) -> bool:
    """Whether some classes of a head may come last: all that a row wants of them is its sums."""
    plain = upstream is not None and upstream.mean_logit is None and not upstream.skip_below
    return plain and head.shards is None and not head.capped


def _buffers(
    rows_of: Callable[[int], int],
    rows: int,
    late: LateClasses | None,
    *,
    head: Head,
    sinks: Sinks,
    entropy: bool,
) -> Tensor:
    """(1 to 3, C, V), which every chunk rewrites: the logits, tanh's slope, -e log e. The logits of
    all rows, or of a chunk's, lie in a fresh dW where they fit. rows_of: C for so many buffers."""
    if late is not None:
        return late.room(late.rows, late.first).unsqueeze(0)
    many, dtype = 1 + head.capped + entropy, torch.promote_types(head.weight.dtype, torch.float32)
    # A head that is cut has sums over processes under way beside dW's product.
    if many == 1 and head.shards is None:
        room_CV = room_in_dweight(sinks, rows, dtype)
        if room_CV is not None:
            return room_CV.unsqueeze(0)
    return head.weight.new_empty(many, rows_of(many), head.weight.shape[0], dtype=dtype)


def _all_in_place(hidden_TD: Tensor, rows_K: Tensor, sinks: Sinks) -> bool:
    """Whether a pass may read all rows where they are, and write dX where it belongs. Asked on a
    CPU alone: CUDA's host would wait for the answer."""
    tokens, dtype = hidden_TD.shape[0], hidden_TD.dtype
    if rows_K.shape[0] != tokens or hidden_TD.device.type != "cpu" or dtype in HALF:
        return False
    same = sinks.hidden is None or sinks.hidden.dtype == dtype
    return same and torch.equal(rows_K, torch.arange(tokens, device=rows_K.device))


def without_skipped_(bound_C: Tensor, x_CV: Tensor, *others_C: Any) -> tuple[Any, ...]:
    """The rows whose bound is -1: of x_CV in its own memory, as `kept_rows_`, of others copied.
    CUDA's host waits here."""
    keep_R = (bound_C < 0).nonzero().squeeze(1)
    return kept_rows_(x_CV, keep_R), *(x[keep_R] for x in others_C)


def kept_rows_(x_CV: Tensor, keep_R: Tensor) -> Tensor:
    """The rows keep_R, ascending, as the first of x_CV, whose others are lost; moved 64 at a time,
    not all copied. None is overwritten before it moves: the r-th kept one is not before row r."""
    n_rows = keep_R.shape[0]
    if n_rows < x_CV.shape[0]:
        for start in range(0, n_rows, 64):
            block_R = keep_R[start : start + 64]
            x_CV[start : start + block_R.shape[0]] = x_CV.index_select(0, block_R)
    return x_CV[:n_rows]


def _values(columns_K: Tensor, entropy: bool) -> Values:
    """Of (K, 3) logp, lse, entropy, or of (K, 6): top-1 flag, mean logit, log sum p^2 too."""
    logp_K, lse_K, entropy_K, *more = columns_K.unbind(1)
    if more:
        more[0] = more[0].bool()
    return Values(logp_K, lse_K, entropy_K if entropy else None, *more)


def chunk_rows(
    rows: int, classes: int, buffers: int, *, hidden_TD: Tensor, chunk_bytes: int | None
) -> int:
    """Rows of a chunk whose buffers, and dz's copy where the GEMMs take halves, fit the budget.

    All chunks are equal: a short last one would run its GEMMs at fewer than the budget allows.
    """
    wide, operand = torch.promote_types(hidden_TD.dtype, torch.float32), operand_of(hidden_TD)
    dw_bytes = classes * hidden_TD.shape[1] * wide.itemsize
    row_bytes = classes * (wide.itemsize * buffers + operand.itemsize * (operand in HALF))
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(hidden_TD.device, row_bytes, dw_bytes)
    most = max(1, chunk_bytes // row_bytes)
    return math.ceil(rows / math.ceil(rows / most))


def storage_unit(upstream_K3: Tensor | None, vocabulary: int) -> Tensor | float:
    """fp16 ends at 6e-8, where coefficients begin: its dz is kept in units of bound / 2^14.

    |dz_v| <= |a| + |b| + |c| (log V + 1), since |p log p| < 1 and H <= log V.
    """
    if upstream_K3 is None:
        return 1.0
    g_logp_K, g_lse_K, g_entropy_K = upstream_K3.abs().unbind(1)
    bound_K = g_logp_K + g_lse_K + (math.log(vocabulary) + 1.0) * g_entropy_K
    # Clamped last: a subnormal unit is 0 where they are flushed, and 0 / 0 a NaN.
    return (bound_K.amax() / 2.0**14).clamp_min(torch.finfo(bound_K.dtype).tiny)

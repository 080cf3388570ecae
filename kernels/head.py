"""The head as autograd functions, whatever backend computes it.

T tokens, K rows that take part, D hidden, V vocabulary. `OnePass` makes the gradients with the
value, `Recompute` makes the logits again in its backward; both select the rows that take part
(selection.py) and call a backend's head_pass. The checks of shapes, dtypes and options are in
checks.py, the records in contract.py.

Eager tensors go straight to the backend, so that profilers and modes see its GEMMs. A tensor
without values (torch.compile, fake, meta) goes through one opaque op of ops.py instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vpgea_fast.kernels.autograd_state import (
    check_one,
    is_batched,
    may_overwrite,
    refuse_double_backward,
    without_values,
)
from vpgea_fast.kernels.backends import BACKENDS, chunk_budget, resolve
from vpgea_fast.kernels.contract import (
    NO_SINKS,
    Inputs,
    Needs,
    Settings,
    Sinks,
    Smoothing,
    Upstream,
    Values,
)
from vpgea_fast.kernels.selection import Selection, accumulator, select

Tensor = torch.Tensor


def _run(
    inputs: Inputs,
    selection: Selection,
    settings: Settings,
    *,
    entropy: bool = False,
    statistics: bool = False,
    upstream: Upstream | None = None,
    sinks: Sinks = NO_SINKS,
) -> Values:
    """Runs the backend's head_pass on these rows.

    Under autocast the cast weight lives as long as this pass; the sinks keep their own dtypes.
    """
    hidden_TD, weight_VD = operands(*inputs[:2], selection, settings.operands)
    # Each pass is decided alone: a gradient of the entropy moves the backward only.
    choice = resolve(
        settings.backend,
        hidden_TD.device,
        settings.operands,
        lse_gradient=upstream is not None and upstream.lse is not None,
        entropy_gradient=upstream is not None and upstream.entropy is not None,
        batch_invariant=settings.batch_invariant,
        sharded=settings.shards is not None,
        statistics=statistics,
        smoothing=upstream is not None and upstream.mean_logit is not None,
        skips=upstream is not None and upstream.skip_below > 0,
    )
    chunk_bytes = settings.chunk_bytes
    if chunk_bytes is None:
        sharded = settings.shards is not None
        chunk_bytes = chunk_budget(weight_VD, gradients=upstream is not None, sharded=sharded)
    # The backends cast by themselves: autocast would cast their float32 products too.
    backend = BACKENDS[choice.name]
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return backend.run(
            hidden_TD,
            settings.head(weight_VD, inputs.bias_V, selection.temperature),
            selection.targets_K,
            rows_K=selection.rows_K,
            entropy=entropy,
            statistics=statistics,
            upstream=upstream,
            sinks=sinks if backend.writes_first else sinks.cleared(),
            chunk_bytes=chunk_bytes,
        )


def operands(
    hidden_TD: Tensor, weight_VD: Tensor, selection: Selection, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both in the GEMMs' dtype. Masked rows read as zeros: a NaN stays out."""
    hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
    if selection.masked:
        # 0 x NaN is NaN: a zero coefficient alone would not keep a masked row out of dW.
        hidden_TD = hidden_TD.masked_fill(~selection.kept_T.unsqueeze(1), 0.0)
    return hidden_TD, weight_VD


def one_pass(
    inputs: Inputs,
    coef_T: Tensor,
    dweight_out: Tensor | None,
    needs: Needs,
    smoothing: Smoothing,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor | None]]:
    """loss, logp_T, kept_T, the bounds (T,) of the rows that skip_below leaves out, and the
    gradients of hidden, weight and bias at an upstream of 1."""
    # fp16 ends at 6e-8, where normalised coefficients begin.
    total = accumulator(inputs.hidden_TD)
    selection = select(inputs, settings, coef_T)
    coef_K = selection.gather(coef_T).to(total)
    sinks = new_sinks(inputs, needs, dweight_out, fresh=True)
    upstream = None
    if any(needs):
        upstream = replace(smoothing.upstream(coef_K), skip_below=settings.skip_below)
    values = _run(
        inputs, selection, settings, statistics=smoothing.on, upstream=upstream, sinks=sinks
    )
    logp_T, row_T = (selection.scatter(x) for x in (values.logp, smoothing.of(values)))
    # Gathered again: masked rows are 0 in row_T, where the values have what zeros gave.
    loss = dot(coef_K, selection.gather(row_T))
    skipped_T = None
    if settings.skip_below:
        # -1 of a row that was not left out; without gradients no row was.
        left_K = torch.zeros_like(coef_K) if values.skipped is None else values.skipped.relu()
        skipped_T = selection.scatter(left_K)
    return loss, logp_T, selection.kept_T, skipped_T, results(sinks, inputs, dweight_out)


def results(sinks: Sinks, inputs: Inputs, dweight_out: Tensor | None) -> list[Tensor | None]:
    """The gradients of hidden, weight and bias that a one-pass node keeps until its backward."""
    dweight_VD = sinks.weight
    if dweight_VD is not None:
        # A sink of the caller's is no result: autograd must not see it as dW once more.
        dweight_VD = None if dweight_out is not None else dweight_VD.to(stored(inputs.weight_VD))
    return [sinks.hidden, dweight_VD, sinks.bias]


def new_sinks(
    inputs: Inputs,
    needs: Needs,
    dweight_out: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    fresh: bool = False,
) -> Sinks:
    """Zeros for what is needed: rows that take no part keep them. dtype: of dX, if not its own.
    fresh: a new dW on a CPU may come without numbers."""
    hidden_TD, weight_VD, bias_V = inputs[:3]
    total = accumulator(hidden_TD)
    dweight_VD = dweight_out if needs.weight else None
    fresh &= needs.weight and dweight_out is None and weight_VD.device.type == "cpu"
    if needs.weight and dweight_out is None:
        dweight_VD = (torch.empty_like if fresh else torch.zeros_like)(weight_VD, dtype=total)
    return Sinks(
        hidden=torch.zeros_like(hidden_TD, dtype=dtype or stored(hidden_TD))
        if needs.hidden
        else None,
        weight=dweight_VD,
        bias=torch.zeros_like(bias_V, dtype=total) if needs.bias and bias_V is not None else None,
        fresh=fresh,
    )


class OnePass(torch.autograd.Function):
    """Value and gradients of sum_t coef_t logp_t in the forward; the backward only scales.

    apply(*Inputs, coef_T, dweight_out, needs, smoothing, settings) -> loss, logp_T, kept_T,
    skipped_T (None without skip_below); needs: which of hidden, weight (or its sink) and bias want
    a gradient.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, coef_T, dweight_out, needs, smoothing, settings = arguments
        inputs, skipped_T = Inputs(*tensors), None
        if without_values(inputs.hidden_TD):
            loss, logp_T, kept_T, *made = torch.ops.vpgea_fast.one_pass(
                *inputs, coef_T, dweight_out, needs, *smoothing, *settings
            )
            grads = present_again(made, needs, dweight_out)
        else:
            loss, logp_T, kept_T, skipped_T, grads = one_pass(
                inputs=inputs,
                coef_T=coef_T,
                dweight_out=dweight_out,
                needs=needs,
                smoothing=smoothing,
                settings=settings,
            )
        keep(ctx, inputs, grads, dweight_out)
        # Their gradients went into the pass: a second one through logp_T would be lost in silence.
        values = [x for x in (logp_T, kept_T, skipped_T) if x is not None]
        ctx.mark_non_differentiable(*values)
        return loss, logp_T, kept_T, skipped_T

    @staticmethod
    def backward(ctx, *upstream):
        return *scaled(ctx, upstream[0]), *[None] * (len(Inputs._fields) + 2)


def present_again(
    made: Sequence[Tensor], needs: Needs, dweight_out: Tensor | None
) -> list[Tensor | None]:
    """The gradients of an op, which cannot give None: its empty stand-ins become None again."""
    outputs = needs._replace(weight=needs.weight and dweight_out is None)
    return [x if need else None for x, need in zip(made, outputs, strict=True)]


def keep(
    ctx: Any, inputs: Inputs, grads: Sequence[Tensor | None], dweight_out: Tensor | None
) -> None:
    """Leaves the gradients to the backward, as `stored` says; there each gets its own dtype."""
    ctx.direct = dweight_out is not None  # dW is final already, see check_one
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*grads)


def scaled(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """What `keep` kept times the loss's own gradient: the backward of a one-pass node."""
    refuse_double_backward()
    if ctx.direct:
        check_one(grad_loss)
    kept = ctx.saved_tensors
    if may_overwrite(grad_loss):
        # On a CPU asked: a product of dW with 1 is 5 % of a pass over few rows.
        one = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        # Spares a second dW: 2 GiB in float32 at V = 152064, D = 3584.
        grads = [x if one or x is None else x.mul_(grad_loss) for x in kept]
    else:
        # A second backward through the same graph must find what this one found.
        grads = [None if x is None else x * grad_loss for x in kept]
    return [None if x is None else x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)]


def logprob(
    inputs: Inputs, selection: Selection, settings: Settings, *, entropy: bool, statistics: bool
) -> list[Tensor | None]:
    """The fields of `Values` but the last, each (T,); None where not asked for."""
    values = _run(inputs, selection, settings, entropy=entropy, statistics=statistics)
    return [None if x is None else selection.scatter(x) for x in values[:-1]]


def logprob_backward(
    inputs: Inputs,
    selection: Selection,
    upstream_T: Sequence[Tensor | None],
    needs: Needs,
    settings: Settings,
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias from those of logp, lse and entropy."""
    total = accumulator(inputs.hidden_TD)
    g_logp_K, g_lse_K, g_entropy_K = (
        None if x is None else selection.gather(x).to(total) for x in upstream_T
    )
    if g_logp_K is None:
        # Every backend takes a gradient of logp; the other two are optional.
        g_logp_K = torch.zeros(selection.rows_K.shape, dtype=total, device=inputs.hidden_TD.device)
    sinks = new_sinks(inputs, needs, fresh=True)
    upstream = Upstream(logp=g_logp_K, lse=g_lse_K, entropy=g_entropy_K)
    _run(inputs, selection, settings, upstream=upstream, sinks=sinks)
    # Summed in the accumulator's dtype, rounded once.
    return [
        sink if sink is None or x is None else sink.to(x.dtype)
        for sink, x in zip((sinks.hidden, sinks.weight, sinks.bias), inputs[:3], strict=True)
    ]


class Recompute(torch.autograd.Function):
    """logp, lse and entropy in the forward; the backward makes the logits again.

    apply(*Inputs, entropy, statistics, settings) -> the fields of `Values` but the last, each (T,);
    None where not asked for. The statistics have no gradient.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, entropy, statistics, settings = arguments
        inputs = Inputs(*tensors)
        if without_values(inputs.hidden_TD):
            values = torch.ops.vpgea_fast.logprob(*inputs, entropy, statistics, *settings)
            # An op cannot give None: its empty stand-ins become None again.
            asked = (True, True, entropy, statistics, statistics, statistics)
            values = [x if wanted else None for x, wanted in zip(values, asked, strict=True)]
        else:
            ctx.selection = select(inputs, settings)
            # None for an output that nobody used: zeros would cost the entropy's gradient.
            ctx.set_materialize_grads(False)
            values = logprob(
                inputs, ctx.selection, settings, entropy=entropy, statistics=statistics
            )
        if statistics:
            ctx.mark_non_differentiable(*values[3:])
        ctx.save_for_backward(*inputs)
        ctx.settings = settings
        return tuple(values)

    @staticmethod
    def backward(ctx, *upstream):
        refuse_double_backward()
        upstream_T = upstream[:3]  # of logp, lse and entropy
        nothing = [None] * len(Inputs._fields)  # three more inputs, and as many options
        # Autograd may call a node whose outputs nobody used.
        if all(x is None for x in upstream_T):
            return None, None, None, *nothing
        return *_recomputed(ctx, Inputs(*ctx.saved_tensors), upstream_T), *nothing


def _recomputed(ctx: Any, inputs: Inputs, upstream_T: Sequence[Tensor | None]) -> Sequence[Any]:
    """The gradients of hidden, weight and bias of a node, by a second pass."""
    needs = Needs(*ctx.needs_input_grad[:3])
    # The op has a rule for batches: one pass for each (is_grads_batched, vmap).
    if without_values(inputs.hidden_TD) or any(map(is_batched, upstream_T)):
        made = torch.ops.vpgea_fast.logprob_backward(*inputs, *upstream_T, needs, *ctx.settings)
        return [x if need else None for x, need in zip(made, needs, strict=True)]
    return logprob_backward(
        inputs=inputs,
        selection=ctx.selection,
        upstream_T=upstream_T,
        needs=needs,
        settings=ctx.settings,
    )


EXPECTED = 2e-6
"""How far, relatively, a gradient of logp may be from a multiple of the expected one: a dozen
roundings of float32."""


class Expected(torch.autograd.Function):
    """`Recompute` that makes the gradients with the values, for the expected gradient of logp.

    apply(*Inputs, expected_T, entropy, statistics, needs, settings) -> as `Recompute`. Where logp's
    gradient is a multiple of expected_T and is all that comes, backward scales what was made; else
    it makes the logits again. To compare costs CUDA a synchronisation.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, expected_T, entropy, statistics, needs, settings = arguments
        inputs = Inputs(*tensors)
        ctx.selection, ctx.settings = select(inputs, settings), settings
        ctx.set_materialize_grads(False)
        total = accumulator(inputs.hidden_TD)
        # Not rounded before the factor is known: then once, as the second pass does.
        sinks = new_sinks(inputs, needs, dtype=total)
        values = _run(
            inputs,
            ctx.selection,
            settings,
            entropy=entropy,
            statistics=statistics,
            upstream=Upstream(logp=ctx.selection.gather(expected_T).to(total)),
            sinks=sinks,
        )
        values = [None if x is None else ctx.selection.scatter(x) for x in values[:-1]]
        if statistics:
            ctx.mark_non_differentiable(*values[3:])
        ctx.save_for_backward(*inputs, expected_T, sinks.hidden, sinks.weight, sinks.bias)
        return tuple(values)

    @staticmethod
    def backward(ctx, *upstream):
        refuse_double_backward()
        *tensors, expected_T, dhidden_TD, dweight_VD, dbias_V = ctx.saved_tensors
        inputs, upstream_T = Inputs(*tensors), upstream[:3]
        nothing = [None] * (len(Inputs._fields) + 2)
        if all(x is None for x in upstream_T):
            return None, None, None, *nothing
        # The forward has made the gradients for the upstream that a loss of these log-probs has, up
        # to one factor; only where there is no such factor the pass is run again.
        factor = None
        if upstream_T[1] is None and upstream_T[2] is None and not is_batched(upstream_T[0]):
            kept_T = ctx.selection.kept_T
            factor = _factor(*(x.masked_fill(~kept_T, 0.0) for x in (upstream_T[0], expected_T)))
        if factor is None:
            del dhidden_TD, dweight_VD, dbias_V
            return *_recomputed(ctx, inputs, upstream_T), *nothing
        made = zip((dhidden_TD, dweight_VD, dbias_V), inputs[:3], strict=True)
        grads = [
            None if x is None or like is None else (x * factor).to(like.dtype) for x, like in made
        ]
        return *grads, *nothing


def _factor(found_T: Tensor, expected_T: Tensor) -> Tensor | None:
    """f with found = f expected, entry by entry; None: there is none."""
    # The answer is read on the host, which cannot be while a graph is captured.
    if found_T.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    found_T, expected_T = (x.to(wide(x.device)) for x in (found_T, expected_T))
    # The multiple that fits best, by least squares; whether it fits each entry is asked below.
    square = expected_T.square().sum()
    factor = torch.where(square > 0, (found_T * expected_T).sum() / square, 0.0)
    fits = (found_T - factor * expected_T).abs() <= EXPECTED * (factor * expected_T).abs()
    return factor if bool(fits.all()) else None


def stored(x: Tensor) -> torch.dtype:
    """A gradient's dtype until backward: fp16 cannot hold it before the loss scale arrives."""
    return torch.float32 if x.dtype is torch.float16 else x.dtype


def dot(left: Tensor, right: Tensor) -> Tensor:
    """sum left right: added in `wide`, given in right's dtype."""
    dtype = wide(right.device)
    return (left.detach().to(dtype) * right.detach().to(dtype)).sum().to(right.dtype)


def wide(device: torch.device) -> torch.dtype:
    """The widest float to add scalars in: float64, but float32 on MPS, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64

"""The head as autograd functions and torch ops, whatever backend computes it.

T tokens, K rows that take part, D hidden, V vocabulary. `OnePass` makes the gradients with the
value, `Recompute` makes the logits again in its backward; both select the rows that take part
(selection.py) and call a backend's head_pass. The checks of shapes, dtypes and options are in
checks.py, the records in contract.py.

Eager tensors go straight to the backend, so that profilers and modes see its GEMMs. A tensor
without values (torch.compile, fake, meta) goes through one opaque op instead: all that depends on
values, the selection of rows and the checks, happens inside, the outputs have static shapes.

    vpgea_fast::one_pass           loss, logp, kept, dX, dW, db     may add to dweight_out
    vpgea_fast::logprob            logp, lse, entropy
    vpgea_fast::logprob_backward   dX, dW, db
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from vpgea_fast.kernels.backends import BACKENDS, chunk_budget, resolve
from vpgea_fast.kernels.contract import (
    INPUTS,
    NO_SINKS,
    SETTINGS,
    Inputs,
    Needs,
    Settings,
    Sinks,
    Upstream,
    Values,
)
from vpgea_fast.kernels.selection import Selection, accumulator, check, select

Tensor = torch.Tensor

LIBRARY = torch.library.Library("vpgea_fast", "FRAGMENT")
"""Registered without an autograd kernel: OnePass and Recompute are the autograd, and the backend
`reference` needs a live one inside."""


def _run(
    inputs: Inputs,
    selection: Selection,
    settings: Settings,
    *,
    entropy: bool = False,
    upstream: Upstream | None = None,
    sinks: Sinks = NO_SINKS,
) -> Values:
    """Runs the backend's head_pass on these rows. Masked rows read as zeros: a NaN stays out.

    Under autocast the cast weight lives as long as this pass; the sinks keep their own dtypes.
    """
    hidden_TD, weight_VD = (x.to(settings.operands) for x in inputs[:2])
    choice = resolve(
        settings.backend,
        hidden_TD.device,
        settings.operands,
        lse_gradient=upstream is not None and upstream.lse is not None,
        entropy_gradient=upstream is not None and upstream.entropy is not None,
        batch_invariant=settings.batch_invariant,
    )
    if selection.masked:
        # 0 x NaN is NaN: a zero coefficient alone would not keep a masked row out of dW.
        hidden_TD = hidden_TD.masked_fill(~selection.kept_T.unsqueeze(1), 0.0)
    chunk_bytes = settings.chunk_bytes
    if chunk_bytes is None:
        chunk_bytes = chunk_budget(weight_VD, gradients=upstream is not None)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return BACKENDS[choice.name].run(
            hidden_TD,
            settings.head(weight_VD, inputs.bias_V, selection.temperature),
            selection.targets_K,
            rows_K=selection.rows_K,
            entropy=entropy,
            upstream=upstream,
            sinks=sinks,
            chunk_bytes=chunk_bytes,
        )


# --- value and gradients in one pass ------------------------------------------------------------


def _one_pass(
    inputs: Inputs, coef_T: Tensor, dweight_out: Tensor | None, needs: Needs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """loss, logp_T, kept_T and the gradients of hidden, weight and bias at an upstream of 1."""
    total = accumulator(inputs.hidden_TD)
    selection = select(inputs, settings, coef_T)
    coef_K = selection.gather(coef_T).to(total)
    sinks = _new_sinks(inputs, needs, dweight_out)
    values = _run(
        inputs,
        selection,
        settings,
        upstream=Upstream(logp=coef_K) if any(needs) else None,
        sinks=sinks,
    )
    logp_T = selection.scatter(values.logp)
    # Gathered again: masked rows are 0 in logp_T, where values.logp has what zeros gave.
    loss = dot(coef_K, selection.gather(logp_T))
    dweight_VD = sinks.weight
    if dweight_VD is not None:
        # A sink of the caller's is no result: autograd must not see it as dW once more.
        dweight_VD = None if dweight_out is not None else dweight_VD.to(_stored(inputs.weight_VD))
    return loss, logp_T, selection.kept_T, [sinks.hidden, dweight_VD, sinks.bias]


def _new_sinks(inputs: Inputs, needs: Needs, dweight_out: Tensor | None = None) -> Sinks:
    """Zeros for what is needed: rows that take no part keep them."""
    hidden_TD, weight_VD, bias_V = inputs[:3]
    total = accumulator(hidden_TD)
    dweight_VD = dweight_out if needs.weight else None
    if needs.weight and dweight_out is None:
        dweight_VD = torch.zeros_like(weight_VD, dtype=total)
    return Sinks(
        hidden=torch.zeros_like(hidden_TD, dtype=_stored(hidden_TD)) if needs.hidden else None,
        weight=dweight_VD,
        bias=torch.zeros_like(bias_V, dtype=total) if needs.bias and bias_V is not None else None,
    )


class OnePass(torch.autograd.Function):
    """Value and gradients of sum_t coef_t logp_t in the forward; the backward only scales.

    apply(*Inputs, coef_T, dweight_out, needs, settings) -> loss, logp_T, kept_T; needs: which of
    hidden, weight (or its sink) and bias want a gradient.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, coef_T, dweight_out, needs, settings = arguments
        inputs = Inputs(*tensors)
        if without_values(inputs.hidden_TD):
            loss, logp_T, kept_T, *made = torch.ops.vpgea_fast.one_pass(
                *inputs, coef_T, dweight_out, needs, *settings
            )
            # An op cannot give None: its empty stand-ins become None again.
            outputs = needs._replace(weight=needs.weight and dweight_out is None)
            grads = [x if need else None for x, need in zip(made, outputs, strict=True)]
        else:
            loss, logp_T, kept_T, grads = _one_pass(
                inputs=inputs,
                coef_T=coef_T,
                dweight_out=dweight_out,
                needs=needs,
                settings=settings,
            )
        ctx.direct = dweight_out is not None  # dW is final already, see _check_one
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.save_for_backward(*grads)
        # Their gradients went into the pass: a second one through logp_T would be lost in silence.
        ctx.mark_non_differentiable(logp_T, kept_T)
        return loss, logp_T, kept_T

    @staticmethod
    def backward(ctx, *upstream):
        _refuse_double_backward()
        grad_loss = upstream[0]
        if ctx.direct:
            _check_one(grad_loss)
        stored = ctx.saved_tensors
        if _may_overwrite(grad_loss):
            # Spares a second dW: 2 GiB in float32 at V = 152064, D = 3584.
            scaled = [None if x is None else x.mul_(grad_loss) for x in stored]
        else:
            scaled = [None if x is None else x * grad_loss for x in stored]
        grads = [
            None if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * (len(Inputs._fields) + 1)


def _check_one(grad_loss: Tensor) -> None:
    message = (
        "dweight_out already holds dW, so the gradient that reaches the loss must be 1: put every "
        "factor (loss scale, 1 / micro-batches) into the coefficients"
    )
    if without_values(grad_loss):  # no op of ours: one without outputs would be dropped
        torch.ops.aten._assert_async.msg(grad_loss == 1, message)
    elif _is_batched(grad_loss):
        raise ValueError(message)
    else:
        check(grad_loss == 1, message)


def _may_overwrite(grad_loss: Tensor) -> bool:
    """Whether this backward is the last one, so that the stored gradients may be scaled in place:
    no second dX and dW, and AccumulateGrad takes them over without a copy.

    Torch answers by private names; where one is missing the answer is no. A batched grad_loss
    (is_grads_batched) has no place to be written to.
    """
    if without_values(grad_loss) or (probes := _probes()) is None:
        return False
    return not probes[0]() and not _is_batched(grad_loss)


def _is_batched(x: Tensor | None) -> bool:
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


# --- value now, gradients by a second pass ------------------------------------------------------


def _logprob(
    inputs: Inputs, selection: Selection, settings: Settings, entropy: bool
) -> list[Tensor | None]:
    """logp, lse, entropy (None unless asked for), each (T,)."""
    values = _run(inputs, selection, settings, entropy=entropy)
    return [None if x is None else selection.scatter(x) for x in values]


def _logprob_backward(
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
    sinks = _new_sinks(inputs, needs)
    upstream = Upstream(logp=g_logp_K, lse=g_lse_K, entropy=g_entropy_K)
    _run(inputs, selection, settings, upstream=upstream, sinks=sinks)
    return [
        sink if sink is None or x is None else sink.to(x.dtype)
        for sink, x in zip((sinks.hidden, sinks.weight, sinks.bias), inputs[:3], strict=True)
    ]


class Recompute(torch.autograd.Function):
    """logp, lse and entropy in the forward; the backward makes the logits again.

    apply(*Inputs, entropy, settings) -> logp_T, lse_T, entropy_T or None.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, entropy, settings = arguments
        inputs = Inputs(*tensors)
        if without_values(inputs.hidden_TD):
            values = torch.ops.vpgea_fast.logprob(*inputs, entropy, *settings)
            values = [*values[:2], values[2] if entropy else None]
        else:
            ctx.selection = select(inputs, settings)
            # None for an output that nobody used: zeros would cost the entropy's gradient.
            ctx.set_materialize_grads(False)
            values = _logprob(inputs, ctx.selection, settings, entropy)
        ctx.save_for_backward(*inputs)
        ctx.settings = settings
        return tuple(values)

    @staticmethod
    def backward(ctx, *upstream_T):
        _refuse_double_backward()
        inputs, needs = Inputs(*ctx.saved_tensors), Needs(*ctx.needs_input_grad[:3])
        nothing = [None] * (len(Inputs._fields) - 1)
        if all(x is None for x in upstream_T):
            return None, None, None, *nothing
        # The op has a rule for batches: one pass for each (is_grads_batched, vmap).
        if without_values(inputs.hidden_TD) or any(map(_is_batched, upstream_T)):
            made = torch.ops.vpgea_fast.logprob_backward(*inputs, *upstream_T, needs, *ctx.settings)
            grads = [x if need else None for x, need in zip(made, needs, strict=True)]
        else:
            grads = _logprob_backward(
                inputs=inputs,
                selection=ctx.selection,
                upstream_T=upstream_T,
                needs=needs,
                settings=ctx.settings,
            )
        return *grads, *nothing


# --- the ops ------------------------------------------------------------------------------------


def register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """torch.ops.vpgea_fast.<name>; `fake` gives shapes, dtypes and strides."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vpgea_fast::{name}", fake, lib=LIBRARY)


def _present(made: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op cannot give None: an empty tensor stands for it."""
    return tuple(like.new_empty(0) if x is None else x for x in made)


def _split(arguments: Sequence[Any]) -> tuple[Inputs, tuple[Any, ...], Settings]:
    """An op's arguments: the tensors, what lies between, the settings."""
    first, last = len(Inputs._fields), len(arguments) - len(Settings._fields)
    return Inputs(*arguments[:first]), tuple(arguments[first:last]), Settings(*arguments[last:])


@torch.no_grad()
def _one_pass_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (coef_T, dweight_out, needs), settings = _split(arguments)
    loss, logp_T, kept_T, grads = _one_pass(
        inputs=inputs,
        coef_T=coef_T,
        dweight_out=dweight_out,
        needs=Needs(*needs),
        settings=settings,
    )
    return loss, logp_T, kept_T, *_present(grads, inputs.hidden_TD)


def _one_pass_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (_, dweight_out, flags), _ = _split(arguments)
    needs, (hidden_TD, weight_VD, bias_V) = Needs(*flags), inputs[:3]
    grads: list[Tensor | None] = [None, None, None]
    if needs.hidden:
        grads[0] = torch.empty_like(hidden_TD, dtype=_stored(hidden_TD))
    if needs.weight and dweight_out is None:
        grads[1] = torch.empty_like(weight_VD, dtype=_stored(weight_VD))
    if needs.bias and bias_V is not None:
        grads[2] = torch.empty_like(bias_V, dtype=accumulator(hidden_TD))
    logp_T = torch.empty_like(inputs.targets_T, dtype=accumulator(hidden_TD))
    kept_T = torch.empty_like(inputs.targets_T, dtype=torch.bool)
    return logp_T.new_empty(()), logp_T, kept_T, *_present(grads, hidden_TD)


register(
    "one_pass",
    f"({INPUTS}, Tensor coef, Tensor(a!)? dweight_out, bool[] needs, {SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _one_pass_kernel,
    _one_pass_fake,
)


@torch.no_grad()
def _logprob_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (entropy,), settings = _split(arguments)
    values = _logprob(inputs, select(inputs, settings), settings, entropy)
    return _present(values, inputs.hidden_TD)


def _logprob_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (entropy,), _ = _split(arguments)
    dtype = accumulator(inputs.hidden_TD)
    values = [torch.empty_like(inputs.targets_T, dtype=dtype) for _ in range(2 + entropy)]
    return _present([*values, None][:3], inputs.hidden_TD)


register(
    "logprob",
    f"({INPUTS}, bool entropy, {SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _logprob_kernel,
    _logprob_fake,
)


@torch.no_grad()
def _logprob_backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (*upstream_T, needs), settings = _split(arguments)
    grads = _logprob_backward(
        inputs=inputs,
        upstream_T=_without_unused(upstream_T, inputs.hidden_TD, settings),
        selection=select(inputs, settings),
        needs=Needs(*needs),
        settings=settings,
    )
    return _present(grads, inputs.hidden_TD)


def _without_unused(
    upstream_T: Sequence[Tensor | None], hidden_TD: Tensor, settings: Settings
) -> list[Tensor | None]:
    """A compiled backward gets zeros for an output that nobody used: None again.

    On CUDA nobody reads them. A backend without that gradient takes them for what they are, and an
    assertion in the stream refuses any other value.
    """
    g_logp, g_lse, g_entropy = upstream_T
    if not hidden_TD.is_cuda:
        return [g_logp, *(None if x is None or not x.any() else x for x in (g_lse, g_entropy))]
    kept: list[Tensor | None] = [g_logp]
    for x, gradient in ((g_lse, "lse_gradient"), (g_entropy, "entropy_gradient")):
        try:
            want = {gradient: True}
            resolve(settings.backend, hidden_TD.device, settings.operands, **want)
        except ValueError as refusal:
            if x is not None:
                check(~x.any(), str(refusal))
            x = None
        kept.append(x)
    return kept


def _logprob_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (*_, needs), _ = _split(arguments)
    grads = [
        torch.empty_like(x) if need and x is not None else None
        for x, need in zip(inputs[:3], needs, strict=True)
    ]
    return _present(grads, inputs.hidden_TD)


register(
    "logprob_backward",
    f"({INPUTS}, Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, bool[] needs, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _logprob_backward_kernel,
    _logprob_backward_fake,
)


# --- shared -------------------------------------------------------------------------------------


def without_values(x: Tensor) -> bool:
    """Compiling, or a tensor that only has a shape (fake, meta) or a meaning of its own."""
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
    """RuntimeError for a tensor of torch.func or forward mode, whose own words name setup_context.

    Not a `jvp` of the functions above that raises: torch.compile refuses a function that has one.
    """
    if torch.compiler.is_compiling():
        return
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    dual = getattr(forward_ad, "_current_level", -1) >= 0
    if (wrapped and wrapped(x)) or (dual and forward_ad.unpack_dual(x).tangent is not None):
        raise RuntimeError(NO_TRANSFORMS)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "this loss can be differentiated once only: its gradients are made by hand. Drop "
            "create_graph=True, or use vpgea_fast.kernels.reference"
        )


def _stored(x: Tensor) -> torch.dtype:
    """A gradient's dtype until backward: fp16 cannot hold it before the loss scale arrives."""
    return torch.float32 if x.dtype is torch.float16 else x.dtype


def dot(left: Tensor, right: Tensor) -> Tensor:
    """sum left right: added in `wide`, given in right's dtype."""
    dtype = wide(right.device)
    return (left.detach().to(dtype) * right.detach().to(dtype)).sum().to(right.dtype)


def wide(device: torch.device) -> torch.dtype:
    """The widest float to add scalars in: float64, but float32 on MPS, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64

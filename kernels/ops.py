"""The head as torch ops, for tensors without values: torch.compile, torch.export, fake, meta.

All that depends on values, the selection of rows and the checks, happens inside an op; its outputs
have static shapes. A fake gives their shapes, dtypes and strides.

    vpgea_fast::one_pass           loss, logp, kept, dX, dW, db     may add to dweight_out
    vpgea_fast::logprob            logp, lse, entropy, top1, mean logit, log sum p^2
    vpgea_fast::logprob_backward   dX, dW, db
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vpgea_fast.kernels.backends import resolve
from vpgea_fast.kernels.contract import INPUTS, SETTINGS, Inputs, Needs, Settings, Smoothing
from vpgea_fast.kernels.head import logprob, logprob_backward, one_pass, stored
from vpgea_fast.kernels.selection import accumulator, check, select

Tensor = torch.Tensor

LIBRARY = torch.library.Library("vpgea_fast", "FRAGMENT")
"""Registered without an autograd kernel: OnePass and Recompute are the autograd, and the backend
`reference` needs a live one inside."""


def register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """torch.ops.vpgea_fast.<name>; `fake` gives shapes, dtypes and strides."""
    # The tag says that torch.compile may trace it.
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Below autograd, for every device: the backend is chosen inside.
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vpgea_fast::{name}", fake, lib=LIBRARY)


def present(made: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op cannot give None: an empty tensor stands for it."""
    return tuple(like.new_empty(0) if x is None else x for x in made)


def split(arguments: Sequence[Any]) -> tuple[Inputs, tuple[Any, ...], Settings]:
    """An op's arguments: the tensors, what lies between, the settings."""
    # Flat, because a schema has no records.
    first, last = len(Inputs._fields), len(arguments) - len(Settings._fields)
    return Inputs(*arguments[:first]), tuple(arguments[first:last]), Settings(*arguments[last:])


@torch.no_grad()
def _one_pass_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (coef_T, dweight_out, needs, *smoothing), settings = split(arguments)
    # needs is a list of bool in the schema.
    # No skipped rows: losses.py refuses skip_below of tensors without values.
    loss, logp_T, kept_T, _, grads = one_pass(
        inputs=inputs,
        coef_T=coef_T,
        dweight_out=dweight_out,
        needs=Needs(*needs),
        smoothing=Smoothing(*smoothing),
        settings=settings,
    )
    return loss, logp_T, kept_T, *present(grads, inputs.hidden_TD)


def _one_pass_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (_, dweight_out, flags, *_), _ = split(arguments)
    return one_pass_shapes(inputs, Needs(*flags), dweight_out)


def one_pass_shapes(inputs: Inputs, needs: Needs, dweight_out: Tensor | None) -> tuple[Tensor, ...]:
    """A loss, its value per row, kept and three gradients, without values."""
    hidden_TD, weight_VD, bias_V = inputs[:3]
    grads: list[Tensor | None] = [None, None, None]  # of hidden, weight, bias, as in one_pass
    if needs.hidden:
        grads[0] = torch.empty_like(hidden_TD, dtype=stored(hidden_TD))
    # What goes into the caller's sink is no output.
    if needs.weight and dweight_out is None:
        grads[1] = torch.empty_like(weight_VD, dtype=stored(weight_VD))
    if needs.bias and bias_V is not None:
        grads[2] = torch.empty_like(bias_V, dtype=accumulator(hidden_TD))
    logp_T = torch.empty_like(inputs.targets_T, dtype=accumulator(hidden_TD))
    kept_T = torch.empty_like(inputs.targets_T, dtype=torch.bool)
    return logp_T.new_empty(()), logp_T, kept_T, *present(grads, hidden_TD)


register(
    "one_pass",
    # (a!) says that the op writes there: a compiler may neither drop nor reorder the call.
    f"({INPUTS}, Tensor coef, Tensor(a!)? dweight_out, bool[] needs, float label_smoothing, "
    f"float z_loss, {SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _one_pass_kernel,
    _one_pass_fake,
)


@torch.no_grad()
def _logprob_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (entropy, statistics), settings = split(arguments)
    # Selected here and in the backward: an op cannot keep rows for another one.
    selection = select(inputs, settings)
    values = logprob(inputs, selection, settings, entropy=entropy, statistics=statistics)
    return present(values, inputs.hidden_TD)


def _logprob_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (entropy, statistics), _ = split(arguments)
    dtype = accumulator(inputs.hidden_TD)
    # The schema has six outputs: what was not asked for is the empty stand-in.
    made = [(True, dtype), (True, dtype), (entropy, dtype), (statistics, torch.bool)]
    made += [(statistics, dtype)] * 2
    values = [torch.empty_like(inputs.targets_T, dtype=x) if asked else None for asked, x in made]
    return present(values, inputs.hidden_TD)


register(
    "logprob",
    f"({INPUTS}, bool entropy, bool statistics, {SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _logprob_kernel,
    _logprob_fake,
)


@torch.no_grad()
def _logprob_backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (*upstream_T, needs), settings = split(arguments)
    grads = logprob_backward(
        inputs=inputs,
        upstream_T=_without_unused(upstream_T, inputs.hidden_TD, settings),
        selection=select(inputs, settings),
        needs=Needs(*needs),
        settings=settings,
    )
    return present(grads, inputs.hidden_TD)


def _without_unused(
    upstream_T: Sequence[Tensor | None], hidden_TD: Tensor, settings: Settings
) -> list[Tensor | None]:
    """A compiled backward gets zeros for an output that nobody used: None again.

    On CUDA nobody reads them. A backend without that gradient takes them for what they are, and an
    assertion in the stream refuses any other value.
    """
    g_logp, g_lse, g_entropy = upstream_T
    # To look at a value is a synchronisation on CUDA, and none on a CPU.
    if not hidden_TD.is_cuda:
        return [g_logp, *(None if x is None or not x.any() else x for x in (g_lse, g_entropy))]
    kept: list[Tensor | None] = [g_logp]
    for x, gradient in ((g_lse, "lse_gradient"), (g_entropy, "entropy_gradient")):
        # Asked of the backend, not of its name: "auto" takes one that has the gradient.
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
    inputs, (*_, needs), _ = split(arguments)
    # In the tensors' own dtypes: this pass rounds its sums, one_pass waits for the loss scale.
    grads = [
        torch.empty_like(x) if need and x is not None else None
        for x, need in zip(inputs[:3], needs, strict=True)
    ]
    return present(grads, inputs.hidden_TD)


register(
    "logprob_backward",
    f"({INPUTS}, Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, bool[] needs, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _logprob_backward_kernel,
    _logprob_backward_fake,
)

"""Losses and log-probs of a causal LM from ids and labels: shift, padding, packing, normaliser,
auxiliary loss.

B rows, T tokens each; N = B T.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.generic import TransformersKwargs

from vpgea_fast import losses
from vpgea_fast.families import HeadOptions
from vpgea_fast.integrations.heads import (
    Weights,
    alike,
    find_head,
    head_options,
    loss_options,
    run_at_head,
)
from vpgea_fast.kernels import checks
from vpgea_fast.kernels.head import wide
from vpgea_fast.kernels.selection import accumulator, check

Tensor = torch.Tensor

IGNORED = -100

OURS = (
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "past_key_values",
    "return_dict",
    "use_cache",
)
"""Inputs of a model that this module sets itself."""


class CausalLoss(NamedTuple):
    """`loss` () to call backward on; `logp` (B, T) detached, `kept` (B, T), as in `CausalLogprobs`.

    `aux_loss` () detached: the share of the load-balancing loss in `loss`; None where the model
    gives none. A tuple: FSDP finds the tensors whose backward it must follow in tuples only.
    """

    loss: Tensor  # 0-dim
    logp: Tensor  # (B, T)
    kept: Tensor  # (B, T) bool
    aux_loss: Tensor | None = None  # 0-dim


class CausalLogprobs(NamedTuple):
    """`logp[b, t]` = log p(label[b, t] | tokens before t of its document), 0 where not `kept`.

    `entropy[b, t]` is that of the distribution which token t came from. Column 0 is never kept:
    nothing comes before it. Differentiable. `logp` and `entropy` are float32, float64 for float64.
    """

    logp: Tensor  # (B, T)
    kept: Tensor  # (B, T) bool
    entropy: Tensor | None = None  # (B, T)


def causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items: int | Tensor | None = None,
    world_size: int = 1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    all_labels: bool = False,
    backend: str = "auto",
    **inputs: Any,
) -> CausalLoss:
    """The cross-entropy that `model(..., labels=labels)` gives, without (B, T, V) logits.

        loss = - world_size / num_items sum_t log p(label_t | tokens before t) + coef aux_loss

    model: a causal LM of transformers, bare or in DDP, FSDP2, accelerate or PEFT. Its whole forward
        runs here, once, so the reducers are armed.
    input_ids, labels: (B, T) int64; labels None: input_ids. The shift is made here. A label counts
        unless it is -100, padding, or first in its document: after padding, or at position 0.
    attention_mask: (B, T) of padded rows. position_ids: (B, T); those of packed rows begin again at
        0, and go without a mask, since with one transformers lets documents see each other.
    num_items: labels that count, over all micro-batches (and ranks) of the step, as the Trainer
        gives it: an int, or a tensor of one element. None: those of this call, and 0 of none.
    world_size: factor where gradients are averaged over ranks and num_items counts all of them;
        not of the auxiliary loss, which is a mean.
    label_smoothing, z_loss: of `losses.weighted_logprob_loss`; the first is the Trainer's
        label_smoothing_factor.
    all_labels: count every label but -100, as transformers' own loss does, of padding or not.
    inputs: any other input of the model. With output_router_logits=True, or a configuration that
        says it, the load-balancing loss is added as the model does, whatever num_items.

    Gradients flow to the head's weight, to LoRA's A and B on it, to copies of `modules_to_save` and
    to trainable tokens. With LoRA on the head W + scale B A is made, V x D, in each call. Under
    autocast the operands follow it, the weight's gradient stays float32.

    ValueError: shapes, num_items, smoothing, unknown inputs, and what `head_options` refuses; the
    model is measured in the first call.
    """
    places = {"attention_mask": attention_mask, "position_ids": position_ids}
    call = _prepared(model, input_ids, labels, places=places, inputs=inputs, all_labels=all_labels)
    coef = _coefficient(call.targets_BT, num_items, world_size)
    made: list[losses.WeightedLoss] = []

    def compute(hidden: Tensor, head: Weights) -> list[Tensor]:
        hidden_ND, weight_VD, targets_N, options = _operands(hidden, head, call)
        # One for all: ignored rows take no part whatever their coefficient.
        coef_N = coef.to(targets_N.device, accumulator(hidden_ND)).repeat(targets_N.numel())
        out = losses.weighted_logprob_loss(
            hidden_ND,
            weight_VD,
            targets_N,
            coef_N,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            backend=backend,
            **options,
        )
        made.append(out)
        # Through the wrappers' hooks, which know tensors: logp and kept go by `made`.
        return [out.loss]

    outputs, link = run_at_head(model, call.inputs, compute)
    loss, aux_loss = made[0].loss + link, _aux_loss(model, outputs)
    if aux_loss is not None:
        loss = loss + aux_loss.to(loss.device)
    logp_BT, kept_BT = (_aligned(x, call) for x in (made[0].logp, made[0].kept))
    return CausalLoss(loss, logp_BT, kept_BT, None if aux_loss is None else aux_loss.detach())


def causal_lm_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    backend: str = "auto",
    **inputs: Any,
) -> CausalLogprobs:
    """Log-probability of every label, differentiable, in its own column; for losses of your own.

    temperature: logits are divided by it. entropy: also that of each distribution, in nats. The
    backward makes the logits again. Model, ids, labels, masks, inputs and errors as in
    `causal_lm_loss`; no auxiliary loss is added.
    """
    places = {"attention_mask": attention_mask, "position_ids": position_ids}
    call = _prepared(model, input_ids, labels, places=places, inputs=inputs)
    made: list[losses.LogprobOutput] = []

    def compute(hidden: Tensor, head: Weights) -> list[Tensor]:
        hidden_ND, weight_VD, targets_N, options = _operands(hidden, head, call)
        out = losses.linear_logprob(
            hidden_ND,
            weight_VD,
            targets_N,
            return_entropy=entropy,
            temperature=temperature,
            backend=backend,
            **options,
        )
        made.append(out)
        # All that a gradient may come from: a wrapper hangs its backward on what the head returns.
        return [out.logp] if out.entropy is None else [out.logp, out.entropy]

    _, link = run_at_head(model, call.inputs, compute)
    kept_BT = _aligned(call.targets_BT != IGNORED, call)
    entropy_N = made[0].entropy
    return CausalLogprobs(
        logp=_aligned(made[0].logp + link, call),
        kept=kept_BT,
        entropy=None if entropy_N is None else _aligned(entropy_N + link, call),
    )


class LossModule(nn.Module):
    """A model whose forward is `causal_lm_loss`, to hand to DDP, FSDP2 or accelerate in its place.

        module = DistributedDataParallel(LossModule(model))
        module(input_ids, labels, num_items=count, world_size=ranks).loss.backward()

    Parameters have "model." before their names; save `module.model`.
    """

    def __init__(self, model: nn.Module, *, backend: str = "auto") -> None:
        super().__init__()
        self.model = model
        self.backend = backend

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> CausalLoss:
        """`causal_lm_loss` of the model; its keyword arguments and errors."""
        return causal_lm_loss(self.model, input_ids, labels, backend=self.backend, **inputs)


class _Call(NamedTuple):
    inputs: dict[str, Any]  # of the model
    targets_BT: Tensor  # of each place the token to predict from it; IGNORED for none
    options: HeadOptions


def _prepared(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None,
    *,
    places: dict[str, Tensor | None],
    inputs: dict[str, Any],
    all_labels: bool = False,
) -> _Call:
    # Every token a label, as in pretraining.
    labels = input_ids if labels is None else labels
    _check_shapes(input_ids, labels, **places)
    checks.check_flag("all_labels", all_labels)
    if isinstance(getattr(model, "module", model), LossModule):  # DDP's is `module`
        raise ValueError("model: got a LossModule, which is called itself; pass its .model")
    _check_names(model, inputs)
    _check_packed(**places)
    given = {name: x for name, x in places.items() if x is not None}
    return _Call(
        inputs={"input_ids": input_ids, **given, **inputs},
        # transformers' own loss looks at labels alone.
        targets_BT=_targets(labels, **({} if all_labels else places)),
        options=head_options(model, input_ids),
    )


def _check_shapes(
    input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    """ValueError: rows, labels and places that do not fit, some of which torch would broadcast."""
    given = {"input_ids": input_ids, "labels": labels}
    given |= {"attention_mask": attention_mask, "position_ids": position_ids}
    for name, x in given.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(
                f"{name}: got {checks.told(x)}, expected a tensor; pass torch.tensor({name})"
            )
    if input_ids.dim() != 2 or labels.shape != input_ids.shape or not input_ids.shape[1]:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and labels {tuple(labels.shape)}: expected (B, T) "
            "both, of one token or more; labels are not shifted, and a packed row is (1, T)"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: got {input_ids.dtype}, expected int64 or int32: .long()")
    rows, tokens = input_ids.shape
    for name, x, fit in (
        ("attention_mask", _by_token(attention_mask), (rows,)),
        ("position_ids", _by_token(position_ids), (rows, 1)),  # one row's are all rows'
    ):
        if x is not None and (x.shape[0] not in fit or x.shape[1] != tokens):
            raise ValueError(
                f"{name}: got {tuple(x.shape)}, expected {(rows, tokens)} as input_ids; pass that "
                "of these rows"
            )


def _check_names(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Models of transformers take any keyword and drop it: a misspelt one would do nothing."""
    found = find_head(model)
    known = {*inspect.signature(type(found.causal_lm).forward).parameters, *_SHARED} - {*OURS}
    for name in inputs:
        if name not in known:
            raise ValueError(f"{name}: no input of {found.name} that this loss takes; leave it out")


# What a forward takes by **kwargs without naming it, such as the lengths of packed documents.
_SHARED = TransformersKwargs.__annotations__


def _check_packed(attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Costs CUDA a synchronisation where both are given, and nothing else. Errors: ValueError."""
    mask_BT, places_BT = _by_token(attention_mask), _by_token(position_ids)
    if mask_BT is None or places_BT is None:
        return
    inside = mask_BT[:, 1:].bool() & mask_BT[:, :-1].bool()
    if bool((inside & (places_BT.diff(dim=-1) != 1)).any()):
        raise ValueError(
            "position_ids: they begin again inside a row, beside an attention_mask, with which "
            "transformers lets the documents see each other; leave attention_mask out"
        )


def _by_token(x: Tensor | None) -> Tensor | None:
    """None too for a 4-D mask and for positions in three dimensions."""
    return x if x is not None and x.dim() == 2 else None


def _targets(
    labels_BT: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """labels [5, 6, -100, 8] -> [6, -100, 8, -100]: what each place predicts."""
    targets_BT = labels_BT[:, 1:]
    if (mask_BT := _by_token(attention_mask)) is not None:
        inside = mask_BT[:, 1:].bool() & mask_BT[:, :-1].bool()
        targets_BT = targets_BT.masked_fill(~inside, IGNORED)
    if (places_BT := _by_token(position_ids)) is not None:
        targets_BT = targets_BT.masked_fill(places_BT[:, 1:] == 0, IGNORED)
    # The targets move and not the states: hidden[:, :-1] would be a copy of B T D numbers.
    return nn.functional.pad(targets_BT, (0, 1), value=IGNORED)


def _coefficient(targets_BT: Tensor, num_items: int | Tensor | None, world_size: int) -> Tensor:
    """(), in the widest float: the factor of every log-prob. Nothing waits for the device."""
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size: got {world_size!r}, expected the number of ranks, from 1")
    if num_items is None:
        # Of no label the mean would be NaN, and so would be the step's gradient.
        count = (targets_BT != IGNORED).sum().clamp(min=1)
    elif isinstance(num_items, Tensor) and num_items.numel() == 1:
        count = num_items.detach().reshape(()).to(targets_BT.device)
        # Of a step without a label it is 0, as the Trainer counts it, and the loss then is too.
        right = (count > 0) | ((count == 0) & (targets_BT == IGNORED).all())
        check(right, "num_items: got 0, a negative number or NaN, expected the labels of the step")
    elif isinstance(num_items, int) and not isinstance(num_items, bool) and num_items > 0:
        count = torch.tensor(num_items, device=targets_BT.device)
    else:
        raise ValueError(
            f"num_items: got {num_items!r:.60}, expected the number of labels of the step: an int "
            "from 1, or a tensor of one element"
        )
    # float32 has every count up to 2^24, and a step may have more tokens.
    return -world_size / count.to(wide(targets_BT.device))


def _operands(
    hidden: Tensor, head: Weights, call: _Call
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    if hidden.shape[:-1] != call.targets_BT.shape:
        raise ValueError(
            f"model: its head got hidden states {tuple(hidden.shape)} for ids "
            f"{tuple(call.targets_BT.shape)}; virtual tokens and cut sequences are not supported"
        )
    # Where layers are spread over devices the head's is the last.
    hidden, weight_VD = alike(hidden.to(head.weight.device), head.weight)
    options = loss_options({**call.options._asdict(), "ignore_index": IGNORED}, head)
    targets_N = call.targets_BT.reshape(-1).to(hidden.device)
    return hidden.reshape(-1, hidden.shape[-1]), weight_VD, targets_N, options


def _aligned(values: Tensor, call: _Call) -> Tensor:
    """(N,) or (B, T) by place -> (B, T) by token: what place t predicts is token t + 1."""
    values_BT = values.reshape(call.targets_BT.shape)
    return nn.functional.pad(values_BT[:, :-1], (1, 0))


def _aux_loss(model: nn.Module, outputs: Any) -> Tensor | None:
    """The load-balancing loss times the model's own coefficient. ValueError: it has none."""
    aux_loss = getattr(outputs, "aux_loss", None)
    if not isinstance(aux_loss, Tensor):
        return None
    found = find_head(model)
    # Mixtral keeps it on the model too, others in their configuration alone.
    for place in (found.causal_lm, found.causal_lm.config.get_text_config()):
        coef = getattr(place, "router_aux_loss_coef", None)
        if coef is not None:
            return coef * aux_loss
    raise ValueError(f"model: {found.name} has an aux_loss and no router_aux_loss_coef; add it")

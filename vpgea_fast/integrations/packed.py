"""Rows of an objective inside a model that another trainer holds: losses and log-probs of a packed
batch, made by the model's own forward, once, in whatever wraps it.

    PackedBatch -> model(...) -> hidden at the target rows -> the fused loss -> d loss / d weights

R targets of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from vpgea_fast import attention, losses
from vpgea_fast.integrations.heads import (
    Weights,
    alike,
    find_head,
    head_options,
    loss_options,
    run_at_head,
)
from vpgea_fast.kernels.selection import accumulator
from vpgea_fast.types import PackedBatch

Tensor = torch.Tensor


class PackedLoss(NamedTuple):
    """`loss` () = world_size sum_t coef_t log p_t, to call backward on; `logp` (R,) detached.

    A tuple: FSDP finds the tensors whose backward it must follow in tuples only.
    """

    loss: Tensor  # 0-dim
    logp: Tensor  # (R,)


def ready(model: nn.Module, autocast: torch.dtype | None = None) -> attention.Choice:
    """Let the model's attention take packed rows, documents apart; the choice says with what.

    autocast: what the forward will compute in, where that is not the weights' own dtype. Calls
    without documents, as in sampling, stay plain sdpa.
    ValueError: what `find_head` or `attention.choose_for` refuses. The model is then as it was.
    """
    causal_lm = find_head(model).causal_lm
    dtype = autocast or causal_lm.dtype
    choice = attention.choose_for(causal_lm.config, "auto", causal_lm.device, dtype)
    causal_lm.set_attn_implementation(attention.register(choice.name))
    return choice


def packed_loss(
    model: nn.Module,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    world_size: int = 1,
    backend: str = "auto",
) -> PackedLoss:
    """The weighted log-probs of a batch's targets, their gradients made in the same pass.

    model: a causal LM that `ready` has seen, bare or in DDP, accelerate or PEFT.
    temperature: logits are divided by it. world_size: factor of the loss, where gradients are
        averaged over ranks and the coefficients count all of them.

    ValueError: what `head_options` refuses; the model is measured in the first call.
    """
    made: list[losses.WeightedLoss] = []
    inputs, options = _call(model, batch, temperature=temperature, backend=backend)

    def compute(hidden: Tensor, head: Weights) -> list[Tensor]:
        hidden_RD, weight_VD, targets_R = _operands(hidden, head, batch)
        # Of the whole step: coefficients hold its normaliser, so float32 at least.
        coef_R = world_size * batch.coef.to(targets_R.device, accumulator(hidden_RD))
        known = loss_options(options, head)
        out = losses.weighted_logprob_loss(hidden_RD, weight_VD, targets_R, coef_R, **known)
        made.append(out)
        return [out.loss]

    _, link = run_at_head(model, inputs, compute)
    return PackedLoss(made[0].loss + link, made[0].logp)


@torch.no_grad()
def packed_logprobs(
    model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0, backend: str = "auto"
) -> Tensor:
    """(R,) log p of every target, without a graph. Model and errors as in `packed_loss`."""
    made: list[Tensor] = []
    inputs, options = _call(model, batch, temperature=temperature, backend=backend)

    def compute(hidden: Tensor, head: Weights) -> list[Tensor]:
        operands = _operands(hidden, head, batch)
        made.append(losses.linear_logprob(*operands, **loss_options(options, head)).logp)
        return made

    run_at_head(model, inputs, compute)
    return made[0]


def _call(model: nn.Module, batch: PackedBatch, **settings: Any) -> tuple[dict[str, Any], Any]:
    """The inputs of the model, and the options of the loss but for what the weight says."""
    inputs = attention.packed_inputs(batch.to(find_head(model).causal_lm.device))
    del inputs["use_cache"]  # `run_at_head` says it
    # Measured here: a forward within the head's own would never end.
    return inputs, {**head_options(model)._asdict(), **settings}


def _operands(hidden: Tensor, head: Weights, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (R, D) of the target rows, the weight (V, D), targets (R,)."""
    device = head.weight.device  # where layers are spread over devices the head's is the last
    rows = hidden.to(device)[0][batch.logit_index.to(device)]
    return *alike(rows, head.weight), batch.targets.to(device)

"""What a decoder layer keeps from its forward to its backward: the grades of activation
checkpointing.

| grade     | a layer keeps                              | its backward makes again            |
| none      | all that autograd saves                    | nothing                             |
| selective | its input, what attention gave, and the    | the output projection, up, and what |
|           | products named here                        | is cheap: norms, rotation           |
| full      | its input                                  | all but the down projection         |

Nothing needs the product of the down projection, the last of a layer: torch ends a repetition at
the last tensor that the backward asks for, and the next layer's input is kept already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

log = logging.getLogger(__name__)

ATTENTION = frozenset(
    "q_proj k_proj v_proj qkv_proj query_key_value c_attn Wqkv q_a_proj q_b_proj "
    "kv_a_proj_with_mqa kv_b_proj".split()
)
"""Last names, in transformers, of modules that give queries, keys and values. The backward of
attention needs all three; o_proj is not here: one product makes it again from what is kept."""
MLP = frozenset("gate_proj gate_up_proj fc1 c_fc dense_h_to_4h w1".split())
"""Last names of what an activation function takes. A gated MLP's other half, up, is made again."""


def kept_products(module: nn.Module) -> dict[str, nn.Module]:
    """Map names to the modules whose matrix product `selective` keeps."""
    names = ATTENTION | MLP
    return {n: m for n, m in module.named_modules() if n.rpartition(".")[2] in names}


def kept_width(layer: nn.Module) -> int:
    """Count the elements per token that `selective` keeps of one layer's products."""
    # nf: transformers' Conv1D (GPT-2) has no out_features.
    widths = (
        getattr(m, "out_features", getattr(m, "nf", 0)) for m in kept_products(layer).values()
    )
    return sum(widths)


def checkpoint_activations(causal_lm: Any, grade: str) -> None:
    """Make every layer of a causal LM run again in the backward, as `grade` says, in place."""
    if grade == "none":
        return
    # Reentrant checkpointing takes no context_fn.
    options: dict[str, Any] = {"use_reentrant": False}
    if grade == "selective":
        options["context_fn"] = _selective(causal_lm)
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _selective(causal_lm: Any) -> Callable[[], tuple[Any, Any]]:
    """Return the contexts of one layer's forward and of its repetition.

    An operation does not know the module that calls it, so hooks say when one of ours runs. A
    repetition may end inside a module, by an exception, hence `always_call`.
    """
    running: list[nn.Module] = []
    kept = kept_products(causal_lm)
    for module in kept.values():
        module.register_forward_pre_hook(lambda module, _: running.append(module))
        module.register_forward_hook(lambda *_: running.clear(), always_call=True)
    _tell_missing(causal_lm, {name.rpartition(".")[2] for name in kept})

    def choose(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        name = str(op)
        # By name: torch's SDPA kernels, its varlen one and flash-attn are different operations.
        attended = "attention" in name or "attn" in name
        if attended or (running and name.startswith(("aten.mm", "aten.addmm"))):
            # torch.compile may overrule a PREFER_SAVE, never a MUST_SAVE.
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    # New contexts for each forward of a layer: they hold the tensors that it keeps.
    return lambda: create_selective_checkpoint_contexts(choose)


def _tell_missing(causal_lm: Any, present: set[str]) -> None:
    # A warning, no error: the gradients are the same, the backward only takes longer.
    for what, names in (("attention", ATTENTION), ("MLP", MLP)):
        if not present & names:
            log.warning(
                "model.activation_checkpointing: 'selective' knows no product by name in the %s of "
                "%s (%s), so the backward makes them again, as with 'full'",
                what,
                type(causal_lm).__name__,
                ", ".join(sorted(names)),
            )

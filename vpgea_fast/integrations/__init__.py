"""The losses inside other people's trainers: a Hugging Face causal LM whose head makes a loss.

    model(...) -> decoder -> hidden (B, T, D) -> head: the fused loss in place of logits -> outputs

The model's own forward runs, however it is wrapped: by DDP, FSDP2, accelerate, PEFT or autocast.
What those hang on it happens as ever; only the head's product is not made. B rows, T tokens each,
D hidden, V vocabulary.
"""

from vpgea_fast.integrations.causal import (
    CausalLogprobs,
    CausalLoss,
    LossModule,
    causal_lm_logprobs,
    causal_lm_loss,
)
from vpgea_fast.integrations.heads import head_options

__all__ = [
    "CausalLogprobs",
    "CausalLoss",
    "LossModule",
    "causal_lm_logprobs",
    "causal_lm_loss",
    "head_options",
]

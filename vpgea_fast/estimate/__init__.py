"""What a configuration needs, from config.json alone: memory of one device and of the host by phase
and purpose, and the bytes that one device moves in a step.

L layers, D hidden, Q and K widths of queries and keys, F inner MLP, V vocabulary, T packed tokens,
P parameters, W processes, S = W / replicas of them share one copy of the model. Bytes: s forward
dtype, m master dtype, r reduction (4; 8 for float64).

A sharded model lies in units that are gathered whole, used, and freed: every block, the embedding,
the head (with the embedding when tied), and the root, which holds the final norm. A process holds
ceil(rows / S) rows of every parameter.

On one device nothing is cut. The whole weights lie on it in the forward's dtype, gradients in
float32 (8 bytes for float64), and masters where they have another dtype. With parallel.cpu_offload
the optimiser's states are in host memory; an update has three blocks of them on the device.

| phase     | beyond weights, optimiser, sampling replica                                         |
| head      | block inputs (or all activations), gathered head, its dW (r V D), chunks of logits  |
| backward  | the same inputs, one block's inner tensors, its unit and the next, its gradients,   |
|           | their reduction buffer, and the head's                                              |
| embedding | a dense V D gradient and its reduction buffer                                       |
| update    | reduced gradients, scratch of the optimiser                                         |
| sampling  | KV cache, prefill, logits (no gradients); or vLLM, awake                            |
| scoring   | vLLM in the training processes, awake for train.resample_rounds beside a forward    |
|           | without gradients; or such a forward of train.score_tokens, where that is given:    |
|           | null takes what training needs at most                                              |
| reference | a forward of the reference policy, beside the ends of the policy; its weights are   |
|           | there in every phase, or with model.reference disk in this one                      |
| sync      | vLLM only: a gathered unit, its tensors on their way, vLLM's weights if it is here  |

vLLM awake is its weights / tensor_parallel, its work and its KV cache: together engine.gpu_memory
of the device, unless engine.kv_cache_gib sizes the cache. Asleep, in the other phases, weights and
cache are gone; on a CPU it never sleeps. None of this was measured on a GPU.

Checked by simulation without a GPU (tests/test_estimate.py): shards and communication to the byte
under a fake process group, the phases against measured peaks on a CPU.
"""

from vpgea_fast.estimate.choice import Choice, choose
from vpgea_fast.estimate.layout import Layout, ModelShape, draws_itself, model_shape
from vpgea_fast.estimate.memory import (
    GIB,
    RESERVE,
    EngineMemory,
    MemoryEstimate,
    estimate_memory,
    optimizer_bytes,
    reference_bytes,
    score_tokens,
)
from vpgea_fast.estimate.traffic import Traffic, communication

__all__ = [
    "GIB",
    "RESERVE",
    "Choice",
    "EngineMemory",
    "Layout",
    "MemoryEstimate",
    "ModelShape",
    "Traffic",
    "choose",
    "communication",
    "draws_itself",
    "estimate_memory",
    "model_shape",
    "optimizer_bytes",
    "reference_bytes",
    "score_tokens",
]

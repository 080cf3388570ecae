"""What one forward of packed tokens holds: activations, the head's chunk of logits, whole units."""

from __future__ import annotations

import importlib.util

from vpgea_fast.estimate.layout import Layout, numel
from vpgea_fast.kernels.backends import UNASKED_CHUNK

HEAD_BYTES, HEAD_BYTES_CPU, TRITON_ROWS = 2**32, 48 << 20, 8448
"""Bytes of the logits of one chunk of the head, at most, and rows of one of the Triton head."""

SMALL_HEAD, SMALL_BYTES = 16 << 20, 3 << 20
"""Of a head on a CPU: of a dW that is small, and of the chunks of its logits."""

UPCAST_BYTES = 2 << 20
"""Of a half-precision head on a CPU: the part of its weight that is in float32 at a time."""


def activations(lay: Layout) -> tuple[int, int]:
    """Size a layer: (bytes per token that it keeps to the backward, bytes that its backward adds).

    In Hugging Face's modules autograd keeps:

    * of each norm a float32 copy of its input (the residual itself when it is float32), the
      normalised input and the output
    * q, k, v after the rotation, the attention's output and, when documents are attended one by
      one, their concatenation
    * of the MLP gate, its activation, up and the product

    Liger, and a compiled layer, keep of a norm its input and output, of the MLP gate, up and the
    product. The backward of the MLP's product holds more gradients of width F: two, or one.
    """
    shape, model, s = lay.shape, lay.cfg.model, lay.forward
    d, q, k, f = shape.hidden, shape.query, shape.key, shape.mlp
    liger = model.liger == "always" or (model.liger == "auto" and lay.cuda and _has_liger())
    copies = 2 if model.attention == "sdpa" or not lay.cuda else 1
    # q, k, v and the output; 4 bytes per head for the float32 log-sum-exp of attention.
    attended = (s if lay.cuda else max(4, s)) * (copies * q + q + 2 * k) + 4 * shape.heads
    if model.compile or liger:
        saved, extra = 4 * s * d + attended + 3 * s * f, s * f
    else:
        norms = 2 * (4 + s) * d + 2 * s * d
        saved, extra = norms + attended + 4 * s * f, 2 * s * f
    if shape.qk_norm:
        saved += (2 * s if model.compile or liger else 4 + s) * (q + k)
    if lay.grade == "none":
        return saved, extra + 2 * s * d
    # The repetition makes neither what is kept nor, of a float32 input, a copy for the norm.
    kept, shared = s * d, s * d if s == 4 else 0
    if lay.grade == "selective":
        kept += s * (q + shape.kept) + 4 * shape.heads
        rotated = min(shape.kept, q + k)  # autograd holds them after the rotation, beside these
        shared += s * (q + shape.kept - rotated) + 4 * shape.heads
    return kept, saved + extra + 2 * s * d - shared


def head(lay: Layout, tokens: int) -> int:
    """Size the head over `tokens`: hidden states of the target rows and their gradient, the final
    norm, and a chunk of logits with its operands.

    Of a head that is cut by classes: the rows of all processes, and its own classes, cast."""
    shape, s = lay.shape, lay.forward
    processes = lay.shards if lay.by_classes else 1
    own, norm = tokens, tokens * shape.hidden * (4 + 2 * s)
    tokens *= processes
    wide, half = max(4, s), s < 4
    copied = s * (half and lay.cuda)  # dz's; a CPU rounds in place
    logit = {"triton": s, "reference": 4 * wide}.get(lay.cfg.loss.backend, wide + copied)
    row = -(-shape.vocabulary // processes) * logit
    limit = UNASKED_CHUNK if lay.by_classes else HEAD_BYTES
    rows = min(tokens, limit // row)
    if not lay.cuda:
        small = -(-shape.vocabulary // processes) * shape.hidden * wide <= SMALL_HEAD
        rows = max(96, SMALL_BYTES // row) if small else max(256, HEAD_BYTES_CPU // row)
    if lay.cfg.loss.backend == "triton":
        rows = min(rows, TRITON_ROWS)
    if lay.cfg.loss.backend == "reference":  # all logits, their log-softmax, two gradients
        rows = tokens
    rows = -(-tokens // -(-tokens // rows))  # chunks of equal size
    chunk = rows * (row + 2 * shape.hidden * wide)
    weight = shape.vocabulary * shape.hidden
    cast = 0
    if lay.by_classes:
        # Joined once more than it is used: the own rows, and their gradient of all.
        cast = lay.local(shape.head) * s * (s != lay.master) + 2 * own * shape.hidden * s
    if half and not lay.cuda:
        cast += min(UPCAST_BYTES, 4 * weight)
    return norm + 2 * tokens * shape.hidden * s + chunk + cast


def layer(lay: Layout) -> int:
    """Size a layer without gradients: bytes per token that its forward holds at once, at most.

    Its input with two copies of the norm's output, and the largest of three moments: the norm's
    float32 tensors; attention with q, k, v, their rotation and its temporaries; the MLP's gate, its
    activation, up and the product.
    """
    shape, s = lay.shape, lay.forward
    d, q, k = shape.hidden, shape.query, shape.key
    norm, mlp = 12 * d, 4 * s * shape.mlp
    # Cosines and sines in float32 and in the forward's dtype; 4 bytes per head: log-sum-exp.
    attention = s * (6 * q + 4 * k) + 16 * (q // shape.heads) + 4 * shape.heads
    attention += 12 * (q + k) * shape.qk_norm
    return 3 * s * d + max(norm, attention, mlp)


def scoring(lay: Layout, tokens: int) -> dict[str, int]:
    """Size a forward of `tokens` without gradients: one layer's tensors, what the head takes more
    when these are gone, and the units that are whole for it."""
    shape, s = lay.shape, lay.forward
    block = max(map(numel, shape.blocks)) * lay.sharded
    vocabulary = lay.gathered_head
    embedding = 0 if shape.tied else numel(shape.embedding) * lay.sharded
    flat = lay.shards > 1
    held = layer(lay) * tokens
    return {
        "activations": held,
        "head": max(0, head(lay, tokens) - held),
        "units": s * (vocabulary + embedding + max(block * (1 + flat), vocabulary * flat)),
    }


def reference_pass(lay: Layout, tokens: int) -> dict[str, int]:
    """Size a forward of the reference policy: what scoring takes, and the ends of the policy, which
    may still be gathered from a pass of its own."""
    parts, ends = scoring(lay, tokens), numel(lay.shape.embedding)
    ends += 0 if lay.by_classes else numel(lay.shape.head)
    return {**parts, "units": parts["units"] + lay.forward * ends * lay.sharded}


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None

"""The forward of the transformers engine: the logits of the next token, over a cache that grows.

Shapes: R rows, T new tokens of each, S positions with them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vpgea_fast.integrations.heads import compiled_in_place

ROOM = 64
"""Spare positions that a cache layer allocates when it is full."""


class Forward:
    """Logits after the last token of every row, by a transformers causal LM.

    Of a model whose layers compile themselves (model.compile) the forward of one more token is one
    graph. Its first call takes half a minute of a core; the others take half the time, of a model
    of 2 layers and 64 channels on a CPU. Where a layer of the cache does not grow (a sliding
    window), nothing is compiled.

    Logits of a graph differ in the last bits from those of the modules, as those of other batch
    sizes do.
    """

    def __init__(self, model: Any) -> None:
        compiled = any(map(compiled_in_place, model.modules()))
        # On a CPU the kernels are called by C++: by Python that is a fifth of a small model's step.
        options: dict[str, Any] = {"cpp_wrapper": True} if model.device.type == "cpu" else {}
        # Dynamic: rows and positions change from step to step.
        self._graph = torch.compile(_step, dynamic=True, options=options) if compiled else None

    def __call__(self, model: Any, ids_RT: torch.Tensor, **given: Any) -> torch.Tensor:
        """As `_forward`, uncompiled: the layers would make a graph for every place in the cache and
        its every state."""
        with torch.compiler.set_stance("force_eager") if self._graph else nullcontext():
            return _forward(model, ids_RT, **given)

    def next(
        self,
        model: Any,
        ids_R1: torch.Tensor,
        *,
        mask_RS: torch.Tensor,
        position_R1: torch.Tensor,
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Logits (R, V) after one more token."""
        layers = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
        # A single row would be a graph of its own: torch.compile takes 1 for a constant.
        if self._graph is None or len(ids_R1) == 1 or len(layers) < len(cache.layers):
            return self(model, ids_R1, mask_RS=mask_RS, position_RT=position_R1, cache=cache)
        end = mask_RS.shape[1]
        # More than is used: where both were equal, once every ROOM tokens, it would compile again.
        for layer in layers:
            layer.reserve(end + 1)
        rooms = [room for layer in layers for room in layer.room]
        logits_RV = self._graph(model, ids_R1, mask_RS, position_R1, rooms)
        for layer in layers:
            layer.hold(layer.room, end)
        return logits_RV


def _forward(
    model: Any,
    ids_RT: torch.Tensor,
    *,
    mask_RS: torch.Tensor,
    position_RT: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    """Logits (R, V) after the last token; the head runs for that position only."""
    output = model(
        input_ids=ids_RT,
        attention_mask=mask_RS,
        position_ids=position_RT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def _step(
    model: Any,
    ids_R1: torch.Tensor,
    mask_RS: torch.Tensor,
    position_R1: torch.Tensor,
    rooms: Sequence[torch.Tensor],
) -> torch.Tensor:
    """As `_forward`, of tensors alone: a graph of a cache would be one of each layer's state.

    rooms: of every layer keys and values, (R, heads, >= S, width); the token's are written there.
    """
    cache = growing_cache(model.config)
    for layer, *room in zip(cache.layers, rooms[::2], rooms[1::2], strict=True):
        assert isinstance(layer, GrowingLayer)
        layer.hold(room, mask_RS.shape[1] - 1)
    return _forward(model, ids_R1, mask_RS=mask_RS, position_RT=position_R1, cache=cache)


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that writes into spare room: transformers' own copies the cache every token.

    On one CPU core 2.5 times the tokens/s at 900-token paths, 1.05 times at 54-token paths.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Rotary embedding leaves float32 keys under autocast: half of their cache for nothing.
        new = (key_states.to(value_states.dtype), value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.room = [states[:, :, :0] for states in new]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.reserve(end)
        for room, states in zip(self.room, new, strict=True):
            room[:, :, start:end] = states
        self.hold(self.room, end)
        return cast("tuple[torch.Tensor, torch.Tensor]", (self.keys, self.values))

    def reserve(self, end: int) -> None:
        """Make room for `end` positions."""
        start = self.get_seq_length()
        if end > self.room[0].shape[-2]:
            # (R, heads, S, width): the whole layer is copied, once every ROOM tokens.
            self.room = [
                F.pad(room[:, :, :start], (0, 0, 0, end + ROOM - start)) for room in self.room
            ]

    def hold(self, room: Sequence[torch.Tensor], end: int) -> None:
        """Be a layer whose first `end` positions in `room`, of keys and of values, are written."""
        self.is_initialized, self.room = True, [*room]
        self.keys, self.values = (states[:, :, :end] for states in self.room)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.hold([room[indices] for room in self.room], self.get_seq_length())


def growing_cache(config: Any) -> DynamicCache:
    """Make the cache that the model's layers ask for, full-attention layers with spare room."""
    cache = DynamicCache(config=config)
    # By exact type: a sliding window drops its oldest positions, a linear layer has none.
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache

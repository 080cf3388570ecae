"""torchtitan's trainer with this library's head: the loss of hidden states, without logits.

    trainer -> decoder, its lm_head skipped -> hidden (B, T, D)
            -> FusedLoss -> ChunkedLossWrapper -> lm_head(hidden): the fused loss in place of logits

`FusedLoss` is a ChunkedLossWrapper of one chunk whose head gives the loss. Whatever torchtitan
hangs around it stays: FSDP2's hooks of the head and when it is resharded, gradient synchronisation,
the accumulated gradient of the hidden states, pipeline stages, SPMD types.

B rows, T tokens each, N = B T; D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from vpgea_fast import losses
from vpgea_fast.integrations.heads import compiled_in_place
from vpgea_fast.integrations.hosts import changed, check_version, imported

Tensor = torch.Tensor

TESTED = "torchtitan>=0.3,<0.4"
TAKES = ("self", "pred", "labels", "global_valid_tokens", "loss_inputs")
NEEDED = ("ChunkedLossWrapper", "CrossEntropyLoss", "IGNORE_INDEX", "get_spmd_backend", "spmd")

_titan = imported("torchtitan.components.loss", TESTED)
_override = imported("torchtitan.config.override", TESTED)
_meshes = imported("torchtitan.distributed.spmd_types", TESTED)


def _check_hooks() -> None:
    """RuntimeError: what is subclassed is not what it was. UserWarning: it may not be."""
    version = metadata.version("torchtitan")
    for name in NEEDED:
        if not hasattr(_titan, name):
            raise changed(TESTED, version, f"torchtitan.components.loss has no {name}")
    base = _titan.ChunkedLossWrapper
    takes = tuple(inspect.signature(base.__call__).parameters)
    if takes != TAKES:
        words = f"ChunkedLossWrapper takes ({', '.join(takes)}), not ({', '.join(TAKES)})"
        raise changed(TESTED, version, words)
    if not {"lm_head", "loss_fn", "num_chunks"} <= {*base.__call__.__code__.co_names}:
        words = "ChunkedLossWrapper does not call its lm_head and its loss_fn"
        raise changed(TESTED, version, words)
    check_version(TESTED, version)


# At import: an override of the command line does nothing else before it is built.
_check_hooks()


class FusedLoss(_titan.ChunkedLossWrapper):
    """torchtitan's cross-entropy, - sum log p(label) / global_valid_tokens, without (N, V) logits.

    Called as a ChunkedLossWrapper: pred (B, T, D) from the decoder, labels (B, T), -100 for none;
    (loss, {}) comes back. The loss is float32. Its logits are float32 too, where torchtitan's are
    rounded to the head's dtype. A head cut by classes over tensor-parallel processes stays cut.

    ValueError: `Config`; a head that is more than a weight and a bias; spmd_backend full_dtensor.
    """

    # tyro makes the command line of it.
    @dataclass(kw_only=True, slots=True)
    class Config(_titan.ChunkedLossWrapper.Config):
        num_chunks: int = 1
        """1: chunks follow from memory."""
        backend: str = "auto"
        """As in vpgea_fast.losses.HeadOptions."""

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        del compile_config  # of the function of logits, which is not called
        _check_config(config)
        super().__init__(config)
        self.backend = config.backend
        self.classes = config.loss_fn.global_vocab_size
        # The base class calls it with what the head gives.
        self.loss_fn = _handed_on

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """The head whose weight and bias make the loss. ValueError: one that does more."""
        _check_head(lm_head)
        super().set_lm_head(lm_head)

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {}): the sum over labels, divided by global_valid_tokens if there are any.

        `loss.backward()` goes on into the decoder; the head's gradients are there before, as in
        torchtitan. pred without a gradient: the loss alone.
        """
        head = self.lm_head
        if head is None:
            raise ValueError("lm_head: got none; call set_lm_head before, as the trainer does")
        _check_placed(pred, labels)

        def compute(hidden: Tensor) -> Tensor:
            return self._loss(head, hidden, labels, global_valid_tokens)

        with _in_place_of_logits(head, compute):
            return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)

    def _loss(
        self, head: Any, hidden: Tensor, labels: Tensor, global_valid_tokens: Tensor | None
    ) -> Tensor:
        """() loss, inside the head's forward: its weight is whole here, or cut by classes alone."""
        spmd = _titan.spmd
        checked = spmd.is_type_checking()
        # Validation may have gradients on, of hidden states that have none.
        trained = torch.is_grad_enabled() and hidden.requires_grad
        # The kernels have no SPMD types; the loss is given its own below.
        with spmd.no_typecheck(), torch.set_grad_enabled(trained):
            if isinstance(hidden, DTensor):  # the same on all: so is its gradient
                hidden = hidden.to_local()
            mesh = _classes_mesh(head.weight)
            if mesh is not None:
                hidden = _Part.apply(hidden, mesh.size())
            weight, bias = head.weight, head.bias
            if mesh is not None:
                weight = _cut(weight, mesh, self.classes)
                bias = None if bias is None else _cut(bias, mesh, self.classes)
            # Divided here: scaled afterwards, half-precision gradients would be rounded twice.
            coef = -1.0 if global_valid_tokens is None else -1.0 / global_valid_tokens
            wide = torch.promote_types(hidden.dtype, torch.float32)
            loss = losses.weighted_logprob_loss(
                hidden.flatten(0, -2),
                weight,
                labels.flatten(),
                torch.ones(labels.numel(), dtype=wide, device=hidden.device) * coef,
                bias=bias,
                ignore_index=_titan.IGNORE_INDEX,
                backend=self.backend,
            ).loss
        if checked:
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss


@_override.override(
    target=_titan.ChunkedLossWrapper.Config, exact=True, description="vpgea_fast's head"
)
def fused_loss(config: Any, backend: str = "auto") -> Any:
    """The `FusedLoss.Config` of a loss's Config: a chunked cross-entropy, or a plain one.

    On the command line: --override.imports vpgea_fast.integrations.torchtitan.fused_loss

    The number of chunks is left out. ValueError, where it is built: another loss.
    """
    chunked = isinstance(config, _titan.ChunkedLossWrapper.Config)
    return FusedLoss.Config(loss_fn=config.loss_fn if chunked else config, backend=backend)


def _handed_on(
    loss: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stands where the loss of logits does: the head has given the loss itself."""
    del labels, global_valid_tokens, inputs
    return loss, {}


@contextmanager
def _in_place_of_logits(head: Any, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `head(hidden)` is compute(hidden), between the hooks of the head's call."""
    own = vars(head).get("forward")  # torchtitan's, around the class's: it checks logits
    # Not a hook: between those of FSDP2, so the weight is gathered and not yet freed.
    head.forward = compute
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


class _Part(torch.autograd.Function):
    """x itself; its gradient as one of equal parts of it, which torchtitan adds over processes.

    Under spmd_types hidden states that are the same on tensor-parallel processes have a gradient
    that is a sum over them; the losses give each the whole of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> Tensor:
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.parts, None


def _classes_mesh(weight: Tensor) -> Any:
    """The mesh over which a plain weight is cut by classes; None: it is whole, or a DTensor.

    ValueError: a DTensor under spmd_types, where nobody would know whose part a gradient is.
    """
    if _meshes.spmd_mesh_size("tp") == 1:
        return None
    if isinstance(weight, DTensor):
        raise ValueError(
            "lm_head: its weight is a DTensor under spmd_types, expected the plain classes of this "
            "process; set parallelism.spmd_backend to partial_dtensor"
        )
    return _meshes.current_spmd_mesh()["tp"]


def _cut(own: Tensor, mesh: Any, classes: int | None) -> Tensor:
    """The DTensor, (V, ...), of which this process has `own`. ValueError: V is not known."""
    if classes is None:
        raise ValueError(
            "loss.loss_fn.global_vocab_size: got None, expected V: with tensor parallelism no "
            "process knows it; CrossEntropyLoss.Config(global_vocab_size=...)"
        )
    # Unchecked: a check is a collective in each call.
    shape = torch.Size((classes, *own.shape[1:]))
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=shape, stride=own.contiguous().stride()
    )


def _check_config(config: Any) -> None:
    """ValueError: chunks, another loss, a backend that is not there."""
    if config.num_chunks != 1:
        raise ValueError(
            f"loss.num_chunks: got {config.num_chunks}, expected 1: no logits are made that chunks "
            "would save; leave it out"
        )
    wanted = _titan.CrossEntropyLoss.Config
    if type(config.loss_fn) is not wanted:
        raise ValueError(
            f"loss.loss_fn: got {type(config.loss_fn).__qualname__}, expected "
            f"{wanted.__qualname__}: other losses need logits; keep ChunkedLossWrapper for them"
        )
    losses.choose_backend(config.backend)


def _check_head(head: nn.Module) -> None:
    """ValueError: a head of which the logits are not hidden W^T + bias."""
    own = type(head).forward is nn.Linear.forward
    # torchtitan's own wrapper of a parallel module, around the class's forward.
    kept = "forward" not in vars(head) or getattr(head, "_parallelized", False)
    compiled = compiled_in_place(head) or hasattr(head, "_orig_mod")
    if own and kept and not compiled:
        return
    what = "is compiled" if compiled else "has a forward of its own"
    raise ValueError(
        f"lm_head: {type(head).__name__} {what}, expected a plain Linear; keep "
        "ChunkedLossWrapper for it"
    )


def _check_placed(pred: Tensor, labels: Tensor) -> None:
    """ValueError: hidden states or labels that are cut over processes, as full_dtensor has them."""
    for name, x in (("pred", pred), ("labels", labels)):
        if isinstance(x, DTensor) and (name == "labels" or x.placements != (Replicate(),)):
            raise ValueError(
                f"{name}: got a DTensor placed {tuple(x.placements)}; set "
                "parallelism.spmd_backend to spmd_types or partial_dtensor"
            )

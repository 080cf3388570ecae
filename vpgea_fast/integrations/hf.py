"""The Hugging Face Trainer with this library's loss: a mixin, or a switch for one that is made.

    class FusedTrainer(FusedLossMixin, Trainer): ...      with hf.enable(trainer):
    FusedTrainer(model, args, ...).train()                    trainer.train()

Data, optimiser, accumulation, evaluation, checkpoints and callbacks stay the Trainer's. Its
`compute_loss_func` could not do this: it is called after the forward, with (B, T, V) logits.
"""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer import Trainer

from vpgea_fast import losses
from vpgea_fast.families import TOLERANCE
from vpgea_fast.integrations.causal import causal_lm_loss
from vpgea_fast.integrations.heads import evaluating, find_head, probe
from vpgea_fast.integrations.hosts import Switch, changed, check_version

Tensor = torch.Tensor
_Trainer: Any = Trainer if TYPE_CHECKING else object

TESTED = "transformers>=5.19,<5.20"
HOOKS = {
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "prediction_step": ("self", "model", "inputs", "prediction_loss_only", "ignore_keys"),
    "get_tp_size": ("self",),
}
"""Methods of the Trainer that are replaced or called here, and what they take."""
DROPPED = ("num_items_in_batch", "skip_logits")
"""Inputs that say what the host's own loss is to do; the second is Liger's."""

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""accelerate's words; its outputs are float32 again."""


class FusedLossMixin(_Trainer):
    """`class FusedTrainer(FusedLossMixin, Trainer)`: the Trainer's own step without its logits.

    Loss and gradients are those of the Trainer's `compute_loss`, under any accumulation and number
    of processes: `num_items_in_batch`, `average_tokens_across_devices`, `label_smoothing_factor`
    and a model's load-balancing loss do what they do there. As there, every label but -100 counts.
    Evaluation too, unless it wants logits: with `compute_metrics`, and in `predict`, the model's
    own forward makes them.

    fused_backend: as in `losses.HeadOptions`.

    ValueError: a class with the mixin behind the Trainer; `compute_loss_func`, or a `compute_loss`
    of another class behind the mixin. So are DataParallel, sequence and context parallelism, and
    label smoothing beside a load-balancing loss. In the first step, what `causal_lm_loss` refuses,
    and a loss other than cross-entropy.
    RuntimeError: a Trainer whose replaced methods have changed. UserWarning: a version of
    transformers out of the tested range.
    """

    fused_backend = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        classes = cls.__mro__
        if Trainer in classes and classes.index(Trainer) < classes.index(FusedLossMixin):
            raise ValueError(
                f"{cls.__name__}: got the mixin behind Trainer, which would never ask it; write "
                f"class {cls.__name__}(FusedLossMixin, Trainer)"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._needs_logits = False  # of the prediction step that runs
        super().__init__(*args, **kwargs)
        _check(self, self.fused_backend)
        _check_classes(self)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss (), and with return_outputs also {"loss": loss}, without logits."""
        if self._needs_logits or inputs.get("labels") is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = _loss(self, model, inputs, num_items_in_batch, backend=self.fused_backend)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """The Trainer's own, by its own forward where the logits are wanted."""
        # Told by an attribute: `compute_loss` is called inside, and has no argument for it.
        self._needs_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._needs_logits = False


def make_compute_loss(*, backend: str = "auto") -> Callable[..., Any]:
    """A `compute_loss` for a class of your own, or to call inside the one that it has.

        class Mine(Trainer):
            compute_loss = hf.make_compute_loss()

    Takes and returns what the Trainer's does, and skips those of classes between. In training it is
    the mixin's. Where outputs are asked for it is the Trainer's own, with logits, but for
    `args.prediction_loss_only`: a function alone does not see whether they are wanted.

    backend: as in `losses.HeadOptions`. Errors and warnings as of the mixin, in the first call; so
    are classes of TRL, and this function where it is no method of a class.
    """

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any = None,  # not there where this is called as something else
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not isinstance(self, Trainer):
            raise ValueError(
                f"compute_loss: got a {type(self).__name__}, expected the trainer whose method it "
                "is; write compute_loss = hf.make_compute_loss() in the body of your class, "
                "neither on a trainer nor as compute_loss_func"
            )
        if self not in _CHECKED:
            _check(self, backend)
            _check_trl(type(self))
            _CHECKED.add(self)
        logits = return_outputs and not self.args.prediction_loss_only
        if logits or inputs.get("labels") is None:
            return Trainer.compute_loss(
                self,
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        loss = _loss(self, model, inputs, num_items_in_batch, backend=backend)
        return (loss, {"loss": loss}) if return_outputs else loss

    return compute_loss


_CHECKED: weakref.WeakSet[Trainer] = weakref.WeakSet()
"""Trainers that a `compute_loss` made here has looked at."""


def enable(trainer: Any, *, backend: str = "auto") -> Switch:
    """Give a Trainer that is made the methods of `FusedLossMixin`, until it is switched off.

        with hf.enable(trainer):           switch = hf.enable(trainer)
            trainer.train()                ...; switch.disable()

    backend: as in `losses.HeadOptions`. Errors and warnings as of the mixin.
    """
    if isinstance(trainer, FusedLossMixin):
        raise ValueError("trainer: it has this loss already; leave enable out")
    _check(trainer, backend)
    _check_classes(trainer)
    own = type(trainer)
    settings = {"fused_backend": backend, "_needs_logits": False}
    # A subclass: `super()` in the user's own classes finds what it found before.
    fused = type(own.__name__, (FusedLossMixin, own), settings)
    switch = Switch()

    def undo() -> None:
        # A class that somebody else has set since has ours below it, and stays.
        if type(trainer) is fused:
            trainer.__class__ = own

    switch._undo.append(undo)
    trainer.__class__ = fused
    return switch


def _loss(
    trainer: Any,
    model: nn.Module,
    inputs: dict[str, Any],
    num_items_in_batch: Tensor | int | None,
    *,
    backend: str,
) -> Tensor:
    """The Trainer's loss () of a batch with labels, made without logits."""
    inputs = {name: x for name, x in inputs.items() if name not in DROPPED}
    if inputs.get("input_ids") is None:
        raise ValueError(
            f"inputs: got {', '.join(inputs)}, expected input_ids, which the loss reads the "
            "rows from; give them, or train without vpgea_fast"
        )
    # A model without loss kwargs makes a mean of this call, which training_step divides.
    items = num_items_in_batch if trainer.model_accepts_loss_kwargs else None
    smoothing = 0.0 if trainer.label_smoother is None else trainer.label_smoother.epsilon
    # Smoothed, the Trainer makes its loss of logits and does not ask the model for one.
    if not smoothing:
        _check_once(trainer, model, inputs["input_ids"], backend)
    out = causal_lm_loss(
        model,
        **inputs,
        num_items=items,
        label_smoothing=smoothing,
        all_labels=True,
        backend=backend,
    )
    loss = out.loss
    if trainer.args.average_tokens_across_devices and items is not None:
        # Not `world_size`: the Trainer multiplies the load-balancing loss too.
        loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
    return loss


@torch.no_grad()
def _check_once(trainer: Trainer, model: nn.Module, input_ids: Tensor, backend: str) -> None:
    """Compare both losses on 8 tokens, once per head. ValueError: the model has another."""
    found = find_head(model)
    if found.head in _SAME:
        return
    # Measured, since any model can be given a `loss_function`: 8 tokens, two forwards.
    ids = probe(input_ids)
    with evaluating(model):
        own: Any = model(input_ids=ids, labels=ids, use_cache=False, return_dict=True)
        ours = causal_lm_loss(model, ids, backend=backend).loss
    # The host's logits are rounded to the dtype of the head's product, ours are not.
    rounding = torch.finfo(HALVES.get(trainer.accelerator.mixed_precision) or own.logits.dtype).eps
    budget = max(TOLERANCE, rounding) * max(1.0, float(own.logits.abs().max()))
    if not abs(float(own.loss - ours)) <= budget:  # `not`: NaN is refused
        raise ValueError(
            f"model: {found.name} has a loss of its own, {float(own.loss):.6g} on 8 tokens "
            f"where cross-entropy is {float(ours):.6g}; train it without vpgea_fast"
        )
    _SAME.add(found.head)


_SAME: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Heads of models whose own loss was seen to be ours."""


def _check(trainer: Any, backend: str) -> None:
    """ValueError: a trainer that is not served. RuntimeError, UserWarning: another transformers."""
    name = type(trainer).__name__
    if Trainer not in type(trainer).__mro__:
        raise ValueError(f"trainer: got a {name}, expected a Trainer of transformers")
    _check_hooks()
    _check_options(trainer)
    losses.choose_backend(backend)
    # For its error now, and not after the first batch is loaded.
    find_head(trainer.model)


def _check_hooks() -> None:
    version = importlib.import_module("transformers").__version__
    for name, expected in HOOKS.items():
        method = getattr(Trainer, name, None)
        if method is None:
            raise changed(TESTED, version, f"Trainer has no {name}")
        takes = tuple(inspect.signature(method).parameters)
        if takes != expected:
            words = f"Trainer.{name} takes ({', '.join(takes)}), not ({', '.join(expected)})"
            raise changed(TESTED, version, words)
    check_version(TESTED, version)


def _check_classes(trainer: Any) -> None:
    """Nothing may stand between the mixin and the Trainer's own loss: it would be skipped."""
    classes = type(trainer).__mro__
    if isinstance(trainer, FusedLossMixin):
        classes = classes[classes.index(FusedLossMixin) + 1 :]
    owner = next(c for c in classes if "compute_loss" in vars(c))
    if owner is Trainer:
        return
    _check_trl(owner)
    raise _skipped(owner, "derive it from (FusedLossMixin, Trainer) and call super().compute_loss")


def _check_trl(kind: type) -> None:
    """TRL's options say what its losses are: cross-entropy would be another, without a word."""
    for owner in kind.__mro__:
        if owner.__module__.split(".")[0] == "trl" and "compute_loss" in vars(owner):
            raise _skipped(owner, "use vpgea_fast.integrations.trl.enable")


def _skipped(owner: type, remedy: str) -> ValueError:
    return ValueError(
        f"trainer: {owner.__name__} has a compute_loss of its own, which would be skipped; {remedy}"
    )


def _check_options(trainer: Any) -> None:
    """The options with which the Trainer's loss is another than the one made here."""
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func: it makes the loss of full logits; leave it out, or train without "
            "vpgea_fast"
        )
    # Its replicas are copies, whose heads have none of the hooks.
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"trainer: {trainer.args.n_gpu} devices of one process are torch's DataParallel; start "
            "a process per device, with torchrun or accelerate launch"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "parallelism_config: context and sequence parallelism cut the rows, whose labels are "
            "not shifted here; take data parallelism, or train without vpgea_fast"
        )
    config = trainer.model.config.get_text_config()
    if trainer.label_smoother is not None and getattr(config, "output_router_logits", False):
        raise ValueError(
            "label_smoothing_factor: beside output_router_logits the Trainer leaves the "
            "load-balancing loss out; set one of them"
        )

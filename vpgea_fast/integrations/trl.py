"""TRL's trainers with this library's head: SFT, GRPO, RLOO, DPO and KTO, through the one function
that they share.

    trainer -> model(..., labels, fused_lm_head=True) -> trl.trainer.utils._ChunkedLogProbFunction

`enable` puts a function of the same signature in its place. Where TRL has no Triton kernel it
scores every position; while enabled it leaves out those without a label there too, as on CUDA. What
the trainers make of the log-probs, and every option of theirs behind that, is theirs as ever.

N tokens that are scored, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vpgea_fast import losses
from vpgea_fast.families import HeadOptions
from vpgea_fast.integrations.heads import check_weight
from vpgea_fast.integrations.hosts import Switch, changed, check_version, imported
from vpgea_fast.kernels import checks

Tensor = torch.Tensor

TESTED = "trl>=1.16,<1.17"
HOOK, SWITCH = "_ChunkedLogProbFunction", "_use_triton"
"""Names in trl.trainer.utils: the function, and whether a device scores labelled tokens only."""
MAKER, FUSED = "add_fused_lm_head", "_fused_forward"
"""What makes a model ready, and the forward that it gives it: there both names are read."""
ARGUMENTS = (
    "hidden",  # (N, D)
    "weight",  # (V, D)
    "bias",  # (V,) or None
    "targets",  # (N,)
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")
OUTPUTS = ("log_probs", "entropy", *STATISTICS)
Coefficients = Callable[[Tensor], Tensor]
"""(N,), empty, for device and dtype -> (N,) coefficients up to a factor."""
ON_POLICY = {
    "importance_sampling_level": "token",
    "beta": 0.0,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "_entropy_bonus_enabled": False,
}
"""Of a GRPOTrainer whose d loss / d logp hangs on nothing but advantages, without old log-probs."""
COMPACT = ("cpu", "cuda", "mps", "xpu")
"""Devices without static shapes: a number of tokens that changes compiles nothing again."""


class Enabled(Switch):
    """A switch that is on. `disable()`, or the end of a `with`, turns it off; off twice is off."""

    def __init__(self, models: Sequence[nn.Module] | None, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.coefficients: Coefficients | None = None  # of the step that runs, in one pass
        self._everywhere = models is None
        self._inside = 0  # forwards of its models that are running
        self._undo += [handle.remove for model in models or () for handle in self._watch(model)]
        _install(self)

    def _watch(self, model: nn.Module) -> Iterator[Any]:
        # Plain functions: a copy of the model shares them, and needs no copy of this switch.
        def enter(*_: Any) -> None:
            self._inside += 1

        def leave(*_: Any) -> None:
            self._inside -= 1

        yield model.register_forward_pre_hook(enter)
        yield model.register_forward_hook(leave, always_call=True)

    @property
    def serves(self) -> bool:
        """Whether the forward that runs now, if any, is one of its models'."""
        return self._everywhere or self._inside > 0

    def _foresee(self, trainer: Any) -> None:
        """Make gradients with the log-probs where this trainer's loss tells them beforehand."""
        if getattr(getattr(trainer, "args", None), "loss_type", None) == "nll":  # SFT's
            self.coefficients = torch.ones_like
        elif hasattr(trainer, "importance_sampling_level"):  # GRPO has it, RLOO not
            self._undo.append(_InOnePass(self, trainer).remove)

    def disable(self) -> None:
        """Give TRL its own functions back, the shared one where no other switch is on."""
        super().disable()
        _uninstall(self)


class _InOnePass:
    """Stands where a GRPO trainer's `_compute_loss` does, or in front of what stood there."""

    def __init__(self, switch: Enabled, trainer: Any) -> None:
        self.switch, self.trainer, self.on = switch, trainer, True
        self.own, self.below = trainer._compute_loss, vars(trainer).get("_compute_loss")
        trainer._compute_loss = self

    def __call__(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.switch.coefficients = _on_policy(self.trainer, inputs)
        try:
            return self.own(model, inputs)
        finally:
            self.switch.coefficients = None

    def remove(self) -> None:
        """Take this away, and what was taken away while this stood in front of it."""
        self.on, found = False, vars(self.trainer)
        while isinstance(top := found.get("_compute_loss"), _InOnePass) and not top.on:
            del self.trainer._compute_loss
            if top.below is not None:
                self.trainer._compute_loss = top.below


def enable(where: Any = None, *, backend: str = "auto") -> Enabled:
    """Score TRL's tokens with `losses.linear_logprob`, without (N, V) logits.

        with trl.enable(trainer):          switch = trl.enable()
            trainer.train()                ...; switch.disable()

    where: a trainer of TRL (its model and its reference model), a model that one has made ready, or
        None for all models of this process. Of a trainer the loss is known too: SFT's "nll", and
        GRPO's on policy, make their gradients in the same pass as the log-probs.
    backend: as in `losses.HeadOptions`. "auto" on CUDA takes "torch" for a forward whose metrics
        want row statistics (SFT, DPO and KTO), and Triton's kernels for the rest.

    Log-probs, entropy and statistics are TRL's, float32, and so is what has a gradient. Scale,
    cap and bias are read by TRL. A head in half precision is multiplied in its dtype, or
    autocast's, but its logits stay float32; TRL rounds them.

    ValueError: a trainer that does not score tokens this way; label_smoothing_factor or
    compute_loss_func of SFT, which make the loss of full logits. In a forward: DeepSpeed ZeRO-3, a
    quantised head. ImportError: TRL is missing. RuntimeError: it has changed what is replaced here.
    UserWarning: a version of TRL out of the tested range.
    """
    _check_hooks(_utils())
    losses.choose_backend(backend)
    switch = Enabled(None if where is None else _models(where), backend)
    if where is not None and not isinstance(where, nn.Module):
        switch._foresee(where)
    return switch


_ON: list[Enabled] = []
_OWN: dict[str, Any] = {}
"""TRL's own, by name; they stay here, for a caller that has kept what stood in for them."""
_WAS: dict[str, Any] = {}
"""What the stand-ins replaced: TRL's own, or another library's in front of it."""


class _Served:
    """Stands where TRL's autograd function does."""

    @staticmethod
    def apply(*arguments: Any) -> tuple[Tensor | None, ...]:
        """The five outputs, (N,) each; None for those not asked for."""
        switch = _serving()
        if switch is None:
            return _OWN[HOOK].apply(*arguments)
        return _score(switch, *arguments)


def _labelled_only(device: torch.device) -> bool:
    """Stands where TRL's `_use_triton` does."""
    return _OWN[SWITCH](device) or (device.type in COMPACT and _serving() is not None)


def _serving() -> Enabled | None:
    return next((switch for switch in reversed(_ON) if switch.serves), None)


STAND_INS: dict[str, Any] = {HOOK: _Served, SWITCH: _labelled_only}


def _install(switch: Enabled) -> None:
    utils = _utils()
    for name, stand_in in STAND_INS.items():
        if getattr(utils, name) is not stand_in:
            _WAS[name] = getattr(utils, name)
            # Not another library's that came later: it may call the stand-in, in a circle.
            _OWN.setdefault(name, _WAS[name])
            setattr(utils, name, stand_in)
    _ON.append(switch)


def _uninstall(switch: Enabled) -> None:
    if switch in _ON:
        _ON.remove(switch)
    for name, stand_in in STAND_INS.items():
        # What somebody else has put there since calls ours, which now calls TRL's.
        if not _ON and getattr(_utils(), name) is stand_in:
            setattr(_utils(), name, _WAS[name])


def _score(
    switch: Enabled,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = OUTPUTS,
) -> tuple[Tensor | None, ...]:
    """OUTPUTS in their order, (N,) each; None for those not asked for."""
    del chunk_size  # of TRL's tiles
    _check_call(weight, outputs)
    if checks.autocast_dtype(hidden, weight) is None:
        weight = weight.to(hidden.dtype)
    if bias is not None and logit_scale != 1.0:
        bias = logit_scale * bias  # TRL scales it with the rest, the losses add it after the scale
    out = losses.linear_logprob(
        hidden,
        weight,
        targets,
        return_entropy="entropy" in outputs,
        return_statistics=any(name in outputs for name in STATISTICS),
        expected_T=_expected(switch, hidden),
        bias=bias,
        temperature=temperature,
        backend=switch.backend,
        **HeadOptions(logit_scale, final_logit_softcapping)._asdict(),
    )
    # Float32 whatever the head's dtype, as TRL's own.
    found = {"log_probs": out.logp.float()}
    if out.entropy is not None:
        found["entropy"] = out.entropy.float()
    if out.statistics is not None:
        found["log_sum_sq_probs"] = out.statistics.log_sum_p2.float()
        found["mean_logits"] = out.statistics.mean_logit.float()
        found["is_top1"] = out.statistics.top1
    return tuple(found[x] if x in ("log_probs", *outputs) else None for x in OUTPUTS)


def _expected(switch: Enabled, hidden: Tensor) -> Tensor | None:
    """(N,): the coefficients of a step that is trained; None where nobody knows them."""
    if switch.coefficients is None or not torch.is_grad_enabled():
        return None
    found = switch.coefficients(hidden.new_empty(hidden.shape[0], dtype=torch.float32))
    return found if found.shape == hidden.shape[:1] else None


def _on_policy(trainer: Any, inputs: dict[str, Any]) -> Coefficients | None:
    """GRPO's coefficients up to a factor, A / (tokens of the row, with a mean over rows): with the
    ratio 1 they are all of d loss / d logp. A wrong guess costs time; `losses` compares."""
    # Missing from another TRL: nobody knows.
    known = all(getattr(trainer, name, ...) == value for name, value in ON_POLICY.items())
    if not known or inputs.get("old_per_token_logps") is not None:
        return None
    labelled_BT, advantages = inputs["completion_mask"], inputs["advantages"]
    mask_BT = labelled_BT * inputs.get("tool_mask", 1)
    coef_BT = mask_BT * (advantages[:, None] if advantages.dim() == 1 else advantages)
    if trainer.loss_type in ("grpo", "sapo"):
        coef_BT = coef_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    coef_N = coef_BT[labelled_BT.bool()]  # the labelled tokens, in the order of the forward
    return lambda like: coef_N.to(like)


def _check_call(weight: Tensor, outputs: Sequence[str]) -> None:
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(
                f"outputs: TRL asks for {name!r}, expected some of {', '.join(OUTPUTS)}; train "
                f"without vpgea_fast, or with {TESTED}"
            )
    check_weight(weight)


def _models(where: Any) -> list[nn.Module]:
    """The models of a trainer, or the one model. ValueError: none whose tokens are scored here."""
    model = where if isinstance(where, nn.Module) else getattr(where, "model", None)
    name = type(where).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(f"where: got a {name}, expected a trainer of TRL, a model of one, or None")
    if not any(_is_fused(module) for module in model.modules()):
        raise ValueError(
            f"where: {name} has no model that TRL's {MAKER} has made ready; SFT, GRPO, RLOO, DPO "
            "and KTO trainers have"
        )
    if model is where:
        return [model]
    _check_options(where, name)
    # DPO and KTO score a frozen model of the same kind beside theirs.
    reference = getattr(where, "ref_model", None)
    return [model] if reference is None else [model, reference]


def _is_fused(module: nn.Module) -> bool:
    """accelerate keeps the forward that it wraps in autocast as `_original_forward`."""
    found = (vars(module).get(name) for name in ("forward", "_original_forward"))
    functions = (getattr(forward, "__func__", forward) for forward in found)
    return any(getattr(f, "__code__", None) in _codes() for f in functions if f is not None)


def _check_options(trainer: Any, name: str) -> None:
    """The options with which SFT makes its loss of full logits, which nothing here replaces."""
    args = getattr(trainer, "args", None)
    kind = getattr(args, "loss_type", None)
    given = ""
    if kind in ("nll", "dft") and getattr(trainer, "compute_loss_func", None) is not None:
        given = "compute_loss_func"
    elif kind == "nll" and getattr(trainer, "label_smoother", None) is not None:
        given = f"label_smoothing_factor={getattr(args, 'label_smoothing_factor', '')}"
    if given:
        raise ValueError(
            f"{given}: with it {name} makes the loss of full logits, so nothing would be served; "
            "leave it out, or train without vpgea_fast"
        )


def _utils() -> types.ModuleType:
    return imported("trl.trainer.utils", TESTED)


def _check_hooks(utils: types.ModuleType) -> None:
    """RuntimeError: what is replaced is not what it was. UserWarning: it may not be."""
    version = importlib.import_module("trl").__version__
    for name in (HOOK, SWITCH, MAKER):
        if not hasattr(utils, name):
            raise changed(TESTED, version, f"trl.trainer.utils has no {name}")
    own = _OWN[HOOK] if getattr(utils, HOOK) is _Served else getattr(utils, HOOK)
    takes = tuple(inspect.signature(own.forward).parameters)[1:]  # without ctx
    if takes != ARGUMENTS:
        words = f"{HOOK} takes ({', '.join(takes)}), not ({', '.join(ARGUMENTS)})"
        raise changed(TESTED, version, words)
    for name in (HOOK, SWITCH):
        if not any(name in code.co_names for code in _codes()):
            raise changed(TESTED, version, f"{MAKER} does not call {name}")
    check_version(TESTED, version)


def _codes() -> tuple[types.CodeType, ...]:
    """Of the forward that MAKER gives a model: all models share it."""
    return _codes_in(getattr(_utils(), MAKER).__code__)


@functools.cache
def _codes_in(code: types.CodeType) -> tuple[types.CodeType, ...]:
    found = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return tuple(x for x in found if x.co_name == FUSED)

"""The head of a Hugging Face causal LM: its weight as the forward uses it, what becomes of its
product, and a forward in which it computes something else than logits.

B rows, T tokens each, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import PreTrainedModel

from vpgea_fast import families
from vpgea_fast.kernels.checks import FLOATS

Tensor = torch.Tensor

PROBED = 8
"""Tokens of the forward that measures a head: half of them keep its product, half get numbers."""

COMPILED_BEFORE = (
    "; a forward that was compiled before does not see it: torch.compiler.reset(), then this loss"
)

REACH = 5.0
"""The numbers go to +-REACH^3: 125, which a cap of 30 or 50 bends; a new model's logits are
below 1, where it does not show."""


class Weights(NamedTuple):
    """A head's weight (V, D), plain and differentiable, and its bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None


class Found(NamedTuple):
    """The causal LM inside its wrappers, its head and its name; whether its head is compiled."""

    causal_lm: Any
    head: nn.Module
    name: str
    compiled: bool


Compute = Callable[[Tensor, Weights], Sequence[Tensor]]
"""hidden as the head gets it, and the head -> float tensors."""


def head_options(model: nn.Module, input_ids: Tensor | None = None) -> families.HeadOptions:
    """What the model makes of its head's product W h + b: `families.HeadOptions` has the formula.

    model: a causal LM of transformers, in any wrapper. input_ids: any ids that it takes; None for
    random ones. Measured once per head, in a forward of 8 tokens without gradients or dropout.
    Half of them get known numbers in place of the head's product; the logits show what becomes of
    those. Scale and cap must be numbers of the text configuration. The logits of the other half
    must be those of the weight that the losses will read, adapters included.

    `losses.linear_logprob(hidden, weight, targets, **head_options(model)._asdict())`; a bias goes
    beside it as `logit_scale * bias`, since the losses add it after the scale.

    ValueError: a model without a head, or with logits that this formula does not give. So is a head
    that is quantised, offloaded, tensor-parallel, or adapted in a way that no plain weight shows.
    """
    found = find_head(model)
    if found.head not in _MEASURED:
        if input_ids is None:
            vocabulary = found.causal_lm.config.get_text_config().vocab_size
            made = torch.Generator().manual_seed(0)  # a run draws as it would without
            device = found.causal_lm.get_input_embeddings().weight.device
            input_ids = torch.randint(vocabulary, (PROBED,), generator=made).to(device)
        _MEASURED[found.head] = _measured(model, found, probe(input_ids))
    return _MEASURED[found.head]


def probe(input_ids: Tensor) -> Tensor:
    """(1, PROBED) ids of any batch, repeated where it is shorter."""
    return input_ids.flatten()[:PROBED].repeat(PROBED)[None, :PROBED]


_MEASURED: weakref.WeakKeyDictionary[nn.Module, families.HeadOptions] = weakref.WeakKeyDictionary()


def find_head(model: nn.Module) -> Found:
    """The causal LM in DDP, PEFT and whatever else is around it. ValueError: there is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: got a {type(model).__name__}, expected a causal LM of transformers, in any "
            "wrapper; pass what prepare or DDP returns for it"
        )
    wrappers = []
    for module in model.modules():
        wrappers.append(module)
        if isinstance(module, PreTrainedModel):
            break
    causal_lm, name = wrappers[-1], type(model).__name__
    if not isinstance(causal_lm, PreTrainedModel):
        raise ValueError(f"model: {name} holds no model of transformers; call the losses yourself")
    head: Any = causal_lm.get_output_embeddings()
    name = type(causal_lm).__name__
    if head is None or causal_lm.config.is_encoder_decoder:
        raise ValueError(f"model: {name} has no head of a causal LM; pass the causal LM itself")
    modules = (*wrappers, head)
    compiled = any(hasattr(m, "_orig_mod") or compiled_in_place(m) for m in modules)
    # torch.compile's wrapper calls none of its own hooks; inside FSDP1's the weight is whole.
    for wrapper in ("_fsdp_wrapped_module", "_orig_mod"):
        head = getattr(head, wrapper, head)
    return Found(causal_lm, head, name, compiled)


def compiled_in_place(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


class _Run:
    """One forward in which a head computes something else."""

    def __init__(self, head: nn.Module, compute: Compute) -> None:
        self.head, self.compute = head, compute
        self.hidden: list[Tensor] = []  # of each call

    def enter(self, hidden: Tensor) -> Tensor:
        self.hidden.append(hidden)
        # No rows: the head and all that a family does to logits cost nothing.
        return hidden.narrow(-2, 0, 0)

    def leave(self, empty: Tensor) -> Tensor:
        values = self.compute(self.hidden[-1], head_weights(self.head))
        # Not a view, which FSDP2 warns of. Its gradient is that of no elements: 0.
        return empty.detach().to(values[0].dtype) + torch.stack([x.sum() for x in values]).sum()


_RUNS: weakref.WeakKeyDictionary[nn.Module, _Run] = weakref.WeakKeyDictionary()
"""Of each head the forward that is running."""
_STANDING: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Compiled heads, whose hooks stay: a compiled forward has those of its first call for good."""


def _enter(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if torch.compiler.is_compiling():  # the results would be those of the first call
        raise RuntimeError("a function around this loss is compiled; compile the model itself")
    run = _RUNS.get(head)
    return None if run is None else (run.enter(*arguments),)


def _leave(head: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor | None:
    run = _RUNS.get(head)
    return None if run is None else run.leave(output)


def _hooked(found: Found) -> contextlib.ExitStack:
    """Register both hooks on a head, for a `with`, or for good where it is compiled."""
    stack = contextlib.ExitStack()
    hooks: list[Any] = [_enter, _leave]
    if found.head in _STANDING:
        return stack
    if found.compiled:  # a graph would hold the first call's numbers: torch.compile breaks it here
        hooks = [torch.compiler.disable(hook) for hook in hooks]
    # Before FSDP2's own hook, which takes the weight away.
    handles = (
        found.head.register_forward_pre_hook(hooks[0]),
        found.head.register_forward_hook(hooks[1], prepend=True),
    )
    if found.compiled:
        _STANDING.add(found.head)
        return stack
    for handle in handles:
        stack.callback(handle.remove)
    return stack


def run_at_head(model: nn.Module, inputs: dict[str, Any], compute: Compute) -> tuple[Any, Tensor]:
    """Run the model's own forward, its head replaced by `compute`, once.

    Returns its outputs, whose logits have no rows, and `link`: a 0 that must be added to what is
    made of `compute`'s results. FSDP2 and DDP hang the beginning of the backward on the outputs.
    """
    found = find_head(model)
    # The hooks of a compiled head stay on it, and ask here whether this forward is one of ours.
    run = _RUNS[found.head] = _Run(found.head, compute)
    try:
        with _hooked(found):
            outputs = model(**inputs, use_cache=False, return_dict=True)
    finally:
        del _RUNS[found.head]
    if len(run.hidden) != 1:
        raise ValueError(
            f"model: {found.name} called its head {len(run.hidden)} times, expected once"
            + COMPILED_BEFORE * (found.compiled and not run.hidden)
        )
    return outputs, outputs.logits.sum()


def head_weights(head: Any) -> Weights:
    """The weight and bias with which this head multiplies. ValueError: no plain weight does."""
    # PEFT: trainable tokens give `weight` alone, the rest has that of the module below.
    tokens = hasattr(head, "token_adapter")
    bias = getattr(head.original_module if tokens else head, "bias", None)
    weight: Any = getattr(head, "weight", None)
    if hasattr(head, "base_layer") and not (head.disable_adapters or head.merged):
        weight = weight + sum(head.get_delta_weight(name) for name in _lora_names(head))
    check_weight(weight)
    return Weights(_whole(weight), None if bias is None else _whole(bias))


def check_weight(weight: Any) -> None:
    """ValueError: a head's weight with which no loss can multiply, then or in its backward."""
    # torchao's subclasses say bfloat16, dequantise in a forward, and have no backward of ours.
    if type(weight) not in (Tensor, nn.Parameter) and not hasattr(weight, "device_mesh"):
        kind = "no weight" if weight is None else f"a weight {type(weight).__name__}"
        raise ValueError(
            f"model: the head has {kind}, expected a plain matrix; leave lm_head out of the "
            "quantisation"
        )
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "DeepSpeed ZeRO-3: the head's weight is gone when the backward reads it; use ZeRO-2 or "
            "FSDP2, or train without vpgea_fast"
        )
    if weight.dtype not in FLOATS or weight.dim() != 2:
        raise ValueError(
            f"model: the head has weights {weight.dtype} {tuple(weight.shape)}, expected a float "
            "matrix; leave lm_head out of the quantisation"
        )
    if weight.device.type == "meta":
        raise ValueError("model: the head is offloaded to disk or memory; keep it on the device")


def _lora_names(head: Any) -> list[str]:
    """The active adapters of PEFT's plain LoRA: W + scale B A. ValueError: another kind."""
    kind = type(head).__name__
    if not hasattr(head, "lora_A"):
        raise ValueError(f"model: the head has an adapter {kind}; train it with LoRA, or without")
    names = [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        # DoRA and its like begin as W does: no measurement tells them from it.
        if name in getattr(head, "lora_variant", ()) or head.lora_B[name].bias is not None:
            raise ValueError(
                f"model: adapter {name!r} of the head is no plain LoRA; take plain LoRA"
            )
        if head.training and getattr(head.lora_dropout[name], "p", 0.0):
            raise ValueError(
                f"model: adapter {name!r} of the head has lora_dropout, which acts on hidden "
                "states and on no weight; set it to 0, or leave lm_head out of target_modules"
            )
    return names


def _whole(x: Tensor) -> Tensor:
    """All of a tensor that is cut over ranks with tokens of their own; its gradient is their mean.

    As DDP and FSDP make it of every other gradient. ValueError: a tensor-parallel one."""
    mesh = getattr(x, "device_mesh", None)
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(x, DTensor)
    if "tp" in (mesh.mesh_dim_names or ()):
        raise ValueError("model: the head is tensor-parallel; leave lm_head out of the plan")
    # Without `Partial` each rank's gradient would pass for the whole one.
    whole = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


@torch.no_grad()
def _measured(model: nn.Module, found: Found, ids: Tensor) -> families.HeadOptions:
    """The options with which known numbers, and the head's own product, give the model's logits."""
    ours: list[Tensor] = []
    raws: list[Tensor] = []
    half = PROBED // 2

    def leave(_: nn.Module, arguments: tuple[Any, ...], raw: Tensor) -> Tensor:
        if raw.shape[-2] != PROBED:
            raise ValueError(
                f"model: its head got {raw.shape[-2]} tokens for {PROBED} ids; virtual tokens and "
                "cut sequences are not supported"
            )
        hidden, (weight, bias) = arguments[0][..., :half, :], head_weights(found.head)
        hidden, weight = alike(hidden, weight.to(hidden.device))
        ours.append(functional.linear(hidden, weight, bias).reshape(half, -1))
        wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
        numbers = torch.linspace(-REACH, REACH, half * raw.shape[-1], device=raw.device) ** 3
        wide[..., half:, :] = numbers.view(half, -1)
        raws.append(wide.reshape(PROBED, -1))
        return wide

    hook = found.head.register_forward_hook(leave, prepend=True)
    with evaluating(model), hook:
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
    if len(raws) != 1:
        raise ValueError(f"model: {found.name} called its head {len(raws)} times, expected once")
    raw, logits = raws[0], logits.reshape(PROBED, -1)
    _check_same(ours[0], raw[:half], found, "does not multiply with its weight and bias")
    if logits.shape != raw.shape:
        raise ValueError(
            f"model: {found.name} makes logits {tuple(logits.shape)} of its head's "
            f"{tuple(raw.shape)}; call the losses yourself"
        )
    # Of the dtype that they were rounded to on the way, if to any.
    tolerance = max(families.TOLERANCE, torch.finfo(logits.dtype).eps)
    config = found.causal_lm.config.get_text_config()
    try:
        options = families.fit_head(raw, logits, config, found.name, tolerance=tolerance)
    except families.FamilyError as error:
        raise ValueError(str(error).replace("model.path", "model")) from error
    # The largest of the numbers hides what is small beside it: the real logits are judged alone.
    _check_same(
        options.logits(raw[:half]), logits[:half], found, f"has logits other than {options}"
    )
    return options


def _check_same(got: Tensor, expected: Tensor, found: Found, complaint: str) -> None:
    """Refuse a head that is not what it was taken for. Errors: ValueError."""
    place = f"model: {type(found.head).__name__}, the head of {found.name}, {complaint}"
    remedy = "call the losses yourself"
    if got.shape != expected.shape:
        raise ValueError(f"{place}: {tuple(got.shape)} for {tuple(expected.shape)}; {remedy}")
    tolerance = max(families.TOLERANCE, *(torch.finfo(x.dtype).eps for x in (got, expected)))
    error = float((got - expected).abs().max())
    if not error <= tolerance * float(expected.abs().max()):  # `not`: NaN is refused
        raise ValueError(f"{place}: {error:.2g} off; {remedy}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and after it each as it was; nothing is compiled meanwhile."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    # Asked first: torch.compiler's own import is most of a second.
    eager = torch.compiler.set_stance("force_eager") if find_head(model).compiled else None
    try:
        with eager or contextlib.nullcontext():
            yield
    finally:
        for module in trained:
            module.training = True


def alike(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype: float32 adapters stay that beside a half-precision base."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype)


def loss_options(options: dict[str, Any], head: Weights) -> dict[str, Any]:
    """The options of a loss with this head's bias among them."""
    if head.bias is None:
        return options
    # A model scales it with the rest, the losses add it after the scale.
    return {**options, "bias": options["logit_scale"] * head.bias}

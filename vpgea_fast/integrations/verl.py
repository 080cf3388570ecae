"""verl's actors and reference models with this library's head: log-probs and entropies of labels.

    model.forward, as verl's patch_forward_with_backends sets it where model.use_fused_kernels is on
        impl_backend torch or liger -> FusedLinearForPPO          (B, T)
        impl_backend triton         -> linear_cross_entropy       (N,)
    Megatron                        -> linear_cross_entropy       (N,)

`enable` puts functions of the same signatures in their places, in the process that calls it. verl's
workers are processes of their own: `integrations.verl_enabled` is what they import.

B rows, T tokens each, N = B T; D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vpgea_fast import losses
from vpgea_fast.integrations.hosts import Switch, changed, check_version, imported

Tensor = torch.Tensor

TESTED = "verl>=0.9,<0.10"
FUSED, TWIN, TWIN_CLASS = "FusedLinearForPPO", "linear_cross_entropy", "LinearCrossEntropy"
HOMES = {
    FUSED: "verl.utils.experimental.torch_functional",
    TWIN: "verl.utils.kernel.linear_cross_entropy",
}
"""Where each is defined; verl's forwards for transformers import it from there in every call."""
COPIES = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")
"""Modules for Megatron, which import `linear_cross_entropy` once and keep it."""
FORWARDS = {FUSED: "forward_with_torch_backend", TWIN: "forward_with_triton_backend"}
"""In verl.models.transformers.dense_common: the forwards of plain language models."""
MADE = ("self", "chunk_size", "impl_backend")
TAKES = {
    FUSED: ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
    TWIN: ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
}
IMPLEMENTATIONS = ("torch", "liger")


class Enabled(Switch):
    """A switch that is on. `disable()`, or the end of a `with`, turns it off; off twice is off."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        _install(self)
        self._undo.append(lambda: _uninstall(self))


def enable(*, backend: str = "auto") -> Enabled:
    """Score verl's labels with `losses.linear_logprob`, without (N, V) logits, in this process.

        with verl.enable():                switch = verl.enable()
            ...                            ...; switch.disable()

    backend: as in `losses.HeadOptions`.

    verl calls what is replaced where `use_fused_kernels` is on; elsewhere nothing changes, and
    nothing says so. Log-probs are float32, as verl's; so are entropies, which its "torch" rounds to
    the dtype of the hidden states. The logits are float32; verl's "torch" rounds those too.

    ImportError: verl is missing. RuntimeError: it has changed what is replaced here. UserWarning: a
    version of verl out of the tested range. ValueError: the backend.
    """
    _check_hooks()
    losses.choose_backend(backend)
    return Enabled(backend)


class FusedLinearForPPO(nn.Module):
    """Stands where verl's module of this name does.

    chunk_size: of verl's tiles; here chunks follow from memory. impl_backend: "torch" or "liger",
    the same here. ValueError: another one.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in IMPLEMENTATIONS:
            raise ValueError(
                f"impl_backend: got {impl_backend!r}, expected one of {', '.join(IMPLEMENTATIONS)}"
            )
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) of softmax(hidden W^T / temperature), shaped as input_ids, float32.

        hidden_states: (B, T, D) or (T, D). vocab_weights: (V, D). input_ids: (B, T) or (T,), whole
        numbers: the label of each place, -100 for none, where both outputs are 0.

        ValueError: shapes, dtypes, a temperature that is no positive float.
        """
        if hidden_states.dim() not in (2, 3) or input_ids.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"hidden_states {tuple(hidden_states.shape)} and input_ids "
                f"{tuple(input_ids.shape)}: expected (B, T, D) and (B, T), or (T, D) and (T,)"
            )
        logp_N, entropy_N = _score(hidden_states, vocab_weights, input_ids, temperature)
        return logp_N.view(input_ids.shape), entropy_N.view(input_ids.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), (N,) each, float32: what verl's Triton kernels compute, on any device.

    hidden: (..., D), of N tokens. weight: (V, D). labels: N whole numbers in any shape, -100 for
    none, where both outputs are 0.

    ValueError: as `FusedLinearForPPO`; a reduction, which no forward of verl asks for; a group of
    several processes, over which Megatron cuts the vocabulary.
    """
    if reduction.lower() != "none":
        raise ValueError(
            f"reduction: got {reduction!r}, expected 'none'; add or average the log-probs yourself"
        )
    # A slice of the classes, taken for all of them, would give a plausible loss.
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        raise ValueError(
            f"dist_process_group: got {dist.get_world_size(dist_process_group)} processes, "
            "expected 1; set tensor_model_parallel_size to 1, or train without vpgea_fast"
        )
    # By number: Megatron has hidden states (T, 1, D) and labels (1, T).
    if labels.numel() != hidden.shape[:-1].numel():
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)}: expected (..., D) and "
            "a label for each of its rows"
        )
    return _score(hidden, weight, labels, temperature)


def _score(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(N,) log-probs and (N,) entropies. ValueError: what `losses` refuses."""
    out = losses.linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        # Whole numbers of any width, as verl's forwards have them; ours are int64.
        labels.reshape(-1).to(torch.int64),
        return_entropy=True,
        temperature=_number(temperature),
        # The two also stand alone, where no switch is on.
        backend=_ON[-1].backend if _ON else "auto",
    )
    assert out.entropy is not None
    return out.logp.float(), out.entropy.float()


def _number(temperature: Any) -> float:
    """What `losses` would take as one per token is none of verl's: it broadcasts over classes."""
    if isinstance(temperature, Tensor):
        raise ValueError(
            f"temperature: got a tensor {tuple(temperature.shape)}, expected a float: with fused "
            "kernels verl has one temperature for all tokens"
        )
    return temperature


_ON: list[Enabled] = []
_WAS: dict[tuple[str, str], Any] = {}
"""What the stand-ins replaced, by module and name: verl's own, or another library's before it."""
STAND_INS: dict[str, Any] = {FUSED: FusedLinearForPPO, TWIN: linear_cross_entropy}


def _install(switch: Enabled) -> None:
    for module, name in _places():
        # It is, where another switch is on; what it replaced is kept once.
        if getattr(module, name) is not STAND_INS[name]:
            _WAS[module.__name__, name] = getattr(module, name)
            setattr(module, name, STAND_INS[name])
    _ON.append(switch)


def _uninstall(switch: Enabled) -> None:
    if switch in _ON:
        _ON.remove(switch)
    for module, name in _places():
        # What somebody else has put there since stays.
        if not _ON and getattr(module, name) is STAND_INS[name]:
            # A copy that was imported meanwhile has never had verl's own.
            own = _WAS.get((module.__name__, name), _WAS[HOMES[name], name])
            setattr(module, name, own)


def _places() -> Iterator[tuple[types.ModuleType, str]]:
    """Every module that holds one of the two, of those that are imported, and its name there."""
    for name, home in HOMES.items():
        yield imported(home, TESTED), name
    # Not imported for this: they want Megatron.
    for path in COPIES:
        if hasattr(sys.modules.get(path), TWIN):
            yield sys.modules[path], TWIN


def _check_hooks() -> None:
    """RuntimeError: what is replaced is not what it was. UserWarning: it may not be."""
    version = imported("verl", TESTED).__version__
    for name, home in HOMES.items():
        module = _found(version, home)
        own = _own(version, module, name)
        # Of the class: `apply`, which is called, takes anything.
        takes = tuple(inspect.signature(own.forward).parameters)
        if takes != TAKES[name]:
            wanted = ", ".join(TAKES[name])
            raise changed(TESTED, version, f"{name} takes ({', '.join(takes)}), not ({wanted})")
        dense = _found(version, "verl.models.transformers.dense_common")
        forward = getattr(dense, FORWARDS[name], None)
        # Both: a forward that no longer imports it in each call would keep verl's own.
        if forward is None or not {name, home} <= {*forward.__code__.co_names}:
            words = f"{FORWARDS[name]} does not import {name} from {home}"
            raise changed(TESTED, version, words)
    fused = _own(version, imported(HOMES[FUSED], TESTED), FUSED)
    made = tuple(inspect.signature(fused.__init__).parameters)
    if made != MADE:
        words = f"{FUSED} is made of ({', '.join(made)}), not ({', '.join(MADE)})"
        raise changed(TESTED, version, words)
    check_version(TESTED, version)


def _found(version: str, path: str) -> types.ModuleType:
    """A module of a verl that is there. RuntimeError: it has none of this name."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A package that verl itself lacks is for its user to install.
        if error.name is None or not path.startswith(error.name):
            raise
        raise changed(TESTED, version, f"there is no {path}") from error


def _own(version: str, module: types.ModuleType, name: str) -> Any:
    """verl's own class behind a name, also while a stand-in is there: with a forward."""
    found = TWIN_CLASS if name == TWIN else name
    for needed in (name, found):
        if not hasattr(module, needed):
            raise changed(TESTED, version, f"{module.__name__} has no {needed}")
    own = getattr(module, found)
    return _WAS[module.__name__, name] if own is FusedLinearForPPO else own

"""The policy: a Hugging Face causal LM that answers packed batches with losses or log-probs, never
with logits.

    PackedBatch -> decoder -> hidden states at the target rows -> fused head loss (T rows, never a
    (T, V) tensor)

| tensor                 | dtype                                         |
| parameters, gradients  | float32 (float64 when model.dtype is float64) |
| forward                | model.dtype, by autocast                      |
| log-probs, losses      | float32 (float64)                             |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vpgea_fast import attention, losses
from vpgea_fast.config import ModelConfig
from vpgea_fast.types import PackedBatch


class ModelError(ValueError):
    """A model that cannot be loaded or trained; the message says what was found and what to do."""


class Policy(nn.Module):
    """One parameter set, two uses: `forward` gives the weighted loss of a batch, `logprob` scores
    it without a graph."""

    def __init__(
        self, causal_lm: Any, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.dtype = dtype
        self.backend = losses.resolve_backend(backend)

    @property
    def device(self) -> torch.device:
        return next(self.causal_lm.parameters()).device

    def forward(self, batch: PackedBatch, *, temperature: float = 1.0) -> losses.WeightedLoss:
        """sum_t coef_t log p_t at `temperature`, its gradients made in the same pass."""
        batch = batch.to(self.device)
        hidden_RD = self._hidden(batch)
        weight_VD, sink_VD = self._weight()
        coef_R = batch.coef.to(torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32)
        return losses.weighted_logprob_loss(
            hidden_RD,
            weight_VD,
            batch.targets,
            coef_R,
            temperature=temperature,
            dweight_out=sink_VD,
            **self._head(),
        )

    @torch.no_grad()
    def logprob(self, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """(R,) log p of every target, on the CPU; the head runs on the target rows only."""
        return self._output(batch, temperature).logp.cpu()

    @torch.no_grad()
    def logprob_entropy(self, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """(2, R): `logprob`, and the entropy in nats of the distribution each target came from."""
        output = self._output(batch, temperature, return_entropy=True)
        assert output.entropy is not None
        return torch.stack([output.logp, output.entropy]).cpu()

    def _output(
        self, batch: PackedBatch, temperature: float, *, return_entropy: bool = False
    ) -> losses.LogprobOutput:
        batch = batch.to(self.device)
        return losses.linear_logprob(
            self._hidden(batch),
            self._weight()[0],
            batch.targets,
            temperature=temperature,
            return_entropy=return_entropy,
            **self._head(),
        )

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        with torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16)
        ):
            output = self.causal_lm.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                attention_mask=None,
                use_cache=False,
                seqlens=batch.seqlens,
            )
        return output.last_hidden_state[0][batch.logit_index].to(self.dtype)

    def _weight(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The head's weight in the forward's dtype; where that is a half-precision copy to train
        through, also the float32 gradient that takes its dW without rounding on the way."""
        weight = self.causal_lm.get_output_embeddings().weight
        if weight.dtype == self.dtype:
            return weight, None
        trained = torch.is_grad_enabled() and weight.requires_grad
        if trained and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.detach().to(self.dtype), weight.grad if trained else None

    def _head(self) -> dict[str, Any]:
        head, config = self.causal_lm.get_output_embeddings(), self.causal_lm.config
        return {
            "bias": None if getattr(head, "bias", None) is None else head.bias.to(self.dtype),
            "softcap": getattr(config, "final_logit_softcapping", None),
            "logit_scale": getattr(config, "logit_scale", None)
            or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
            "backend": self.backend,
        }


def load_policy(cfg: ModelConfig, *, backend: str = "auto") -> Policy:
    """The policy of a Hugging Face directory or Hub name, on its device, ready to train."""
    dtype = getattr(torch, cfg.dtype)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    )
    causal_lm = load_causal_lm(
        cfg.path, torch.float64 if dtype is torch.float64 else torch.float32
    ).to(device)
    if cfg.activation_checkpointing != "none":
        causal_lm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    causal_lm.train()
    return Policy(causal_lm, dtype=dtype, backend=backend)


def load_causal_lm(path: str, dtype: torch.dtype) -> Any:
    """AutoModelForCausalLM with packed attention. Errors: ModelError for an incomplete directory or
    non-finite weights."""
    from transformers import AutoModelForCausalLM

    check_model_dir(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.register(),
            use_safetensors=True,
            output_loading_info=True,
        )
        causal_lm, info = loaded
    except OSError as error:
        raise ModelError(
            f"cannot load the model {path!r}: {_first_line(error)}; give a complete directory"
        ) from error
    except SafetensorError as error:
        raise ModelError(
            f"{path}: a weight file is damaged or cut ({error}); copy the model again"
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(
        str(key) for key in info.get("mismatched_keys", ())
    )
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} weights are missing or misshapen ({missing[0]}, ...); "
            "copy the model again"
        )
    bad = [name for name, p in causal_lm.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ModelError(
            f"{path}: {len(bad)} tensors hold NaN or Inf ({bad[0]}, ...); use an earlier checkpoint"
        )
    return causal_lm


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a Hugging Face directory or Hub name. Errors: ModelError."""
    from transformers import AutoTokenizer

    check_model_dir(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a tokenizer from {path!r}: {_first_line(error)}; give a complete Hugging "
            "Face directory, or the Hub name (owner/name) of a model that can be reached"
        ) from error


def check_model_dir(path: str) -> None:
    """A local directory must hold config.json and every weight file that its index names. A Hub
    name is not checked."""
    directory = Path(path)
    if not directory.exists():
        if path.startswith((".", "/")) or path.count("/") > 1:
            raise ModelError(
                f"no model directory at {path}; "
                "give a Hugging Face directory or a Hub name (owner/name)"
            )
        return
    if not (directory / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give a Hugging Face model directory")
    _json_object(directory / "config.json")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} names no weight files; copy the model again")
        wanted = sorted(set(weight_map.values()))
    else:
        wanted = ["model.safetensors"]
    absent = [name for name in wanted if not (directory / name).is_file()]
    if absent:
        raise ModelError(
            f"{path} is incomplete: {', '.join(absent)} missing; copy the whole model (safetensors)"
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}); copy the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged (no JSON object); copy the model again")
    return content


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

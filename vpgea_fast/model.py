"""The policy: a Hugging Face causal LM that answers packed batches with losses or log-probs, never
with logits; on one device, or sharded over many.

    PackedBatch -> decoder -> hidden states at the target rows -> LossHead (T rows, never a (T, V)
    tensor)

| tensor                | one device, not sharded        | sharded (FSDP2)                       |
| parameters            | float32 (float64)              | shards in model.master_dtype          |
| forward               | model.dtype, by autocast       | model.dtype: gathered in it           |
| gradients             | float32 (float64)              | reduced in float32, shards            |
| dW of the head        | float32 across micro-batches   | the same, then one reduce-scatter     |
| log-probs, losses     | float32 (float64)              | float32 (float64)                     |

Units of a sharded policy: every decoder layer, the embedding, the head, the root (the final norm).
The head makes its gradient in the forward, inside its own unit, so its reduce-scatter starts before
the decoder's backward; one all-gather and one reduce-scatter of the head serve a whole step,
scoring included. Gradients are sums over processes: the normaliser is in the coefficients.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vpgea_fast import attention, families, losses
from vpgea_fast.activations import checkpoint_activations
from vpgea_fast.config import ModelConfig, ParallelConfig
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.model_dir import (
    ModelError,
    Weights,
    blamed_on,
    check_model_dir,
    decoder_layers,
    empty_model,
    find_weights,
    json_object,
    one_line,
    read,
    read_config,
)
from vpgea_fast.types import PackedBatch

P = TypeVar("P", bound="Policy")
HALF = (torch.bfloat16, torch.float16)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
SAMPLING_KEYS = (
    *("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
"""What generation_config.json says of sampling, and only of sampling."""


class Output(NamedTuple):
    """`loss` () = sum_t coef_t log p_t (None without coefficients), `logp` (R,), `entropy` (R,).

    A tuple, because FSDP finds the tensors whose backward it must follow in tuples only.
    """

    loss: torch.Tensor | None
    logp: torch.Tensor
    entropy: torch.Tensor | None = None


class LossHead(nn.Linear):
    """The head of a causal LM: logits for a sampler, losses and log-probs for a trainer.

    The gradient of the weight is made in the forward and added to `weight.grad` there, in float32
    also where the weight is in half precision: what reaches the backward must be 1, and the module
    must stay outside activation checkpointing.
    """

    def __init__(self, head: nn.Linear, options: families.HeadOptions, backend: str) -> None:
        bias = head.bias is not None
        super().__init__(head.in_features, head.out_features, bias=bias, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.backend = backend
        self.options = options

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002 - as nn.Linear calls it
        targets: torch.Tensor | None = None,
        coef: torch.Tensor | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Any:
        """Logits of any hidden states; with targets (R,) the `Output` of hidden states (R, D)."""
        hidden = input
        if targets is None:
            return super().forward(hidden)
        options: dict[str, Any] = {
            "bias": None if self.bias is None else self.bias.to(hidden.dtype),
            **self.options._asdict(),
            "backend": self.backend,
            "temperature": temperature,
        }
        weight_VD = self.weight.to(hidden.dtype)
        if coef is None:
            out = losses.linear_logprob(
                hidden, weight_VD, targets, return_entropy=entropy, **options
            )
            return Output(None, out.logp, out.entropy)
        out = losses.weighted_logprob_loss(
            hidden, weight_VD, targets, coef, dweight_out=self._sink(), **options
        )
        return Output(out.loss, out.logp)

    def _sink(self) -> torch.Tensor | None:
        """The weight's own gradient, in float32 at least. Tested here: inside an autograd Function
        grad mode is always off, and a scoring pass would add to it."""
        weight = self.weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if weight.grad is None:
            if weight.grad_dtype is not dtype:
                weight.grad_dtype = dtype
            weight.grad = torch.zeros_like(weight, dtype=dtype)
        return weight.grad


class Policy(nn.Module):
    """One parameter set, two uses: `forward` gives the weighted loss of a batch, `logprob` scores
    it without a graph. Everything goes through `forward`, where FSDP's hooks are."""

    def __init__(
        self,
        causal_lm: Any,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.dtype = dtype
        self.run_device = device
        self.backend = losses.choose_backend(backend, device=self.device, dtype=dtype)
        options = families.measure(causal_lm.config)
        families.remove_randomness(causal_lm)
        head = LossHead(causal_lm.get_output_embeddings(), options, self.backend.name)
        causal_lm.set_output_embeddings(head)
        self.tied = head.weight is causal_lm.get_input_embeddings().weight
        self.room = attention.positions(causal_lm.config)
        self.whole_gradients = self.offloaded = False
        self.attention = attention.Choice("sdpa", "not chosen: as the model was given")

    @property
    def device(self) -> torch.device:
        """Where the forward runs; with CPU offload the parameters are elsewhere."""
        return self.run_device or next(self.causal_lm.parameters()).device

    @property
    def head(self) -> LossHead:
        return self.causal_lm.get_output_embeddings()

    @property
    def sharded(self) -> bool:
        return isinstance(self, FSDPModule)

    def forward(
        self,
        batch: PackedBatch,
        *,
        temperature: float = 1.0,
        train: bool = True,
        entropy: bool = False,
    ) -> Output:
        """sum_t coef_t log p_t at `temperature`, its gradients made in the same pass; without
        `train` the log-probs alone."""
        batch = batch.to(self.device)
        hidden_RD = self._hidden(batch)
        coef_R = None
        if train:
            wide = torch.promote_types(hidden_RD.dtype, torch.float32)
            coef_R = batch.coef.to(wide)
        return self.head(hidden_RD, batch.targets, coef_R, temperature=temperature, entropy=entropy)

    @torch.no_grad()
    def logprob(self, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """(R,) log p of every target, on the CPU; the head runs on the target rows only."""
        return self(batch, temperature=temperature, train=False).logp.cpu()

    @torch.no_grad()
    def logprob_entropy(self, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """(2, R): `logprob`, and the entropy in nats of the distribution each target came from."""
        output = self(batch, temperature=temperature, train=False, entropy=True)
        return torch.stack([output.logp, output.entropy]).cpu()

    def expect_backward(self, *, last: bool) -> None:
        """Say before each micro-batch whether it is the last of its update: the head's gradient is
        reduced only then. The layers' are reduced each time, unless they are kept whole."""
        for unit in self.units():
            late = self.whole_gradients or unit is self.head
            late |= self.tied and unit is self.causal_lm.get_input_embeddings()
            unit.set_requires_gradient_sync(last or not late, recurse=False)
            unit.set_requires_all_reduce(last, recurse=False)
            if unit is self.head:
                unit.set_reshard_after_backward(last, recurse=False)
            if unit is self:
                unit.set_is_last_backward(last)

    def units(self) -> list[Any]:
        """The modules that FSDP gathers as one, the root first; none when not sharded."""
        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    def autocast(self) -> torch.autocast:
        """The forward's dtype, for a decoder whose weights FSDP does not cast."""
        casts = self.dtype in HALF and not self.sharded
        return torch.autocast(self.device.type, self.dtype, enabled=casts)

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        room, source = self.room
        if room is not None and max(batch.seqlens) > room:
            raise ModelError(
                f"a row has {max(batch.seqlens)} tokens, but the model has {room} positions "
                f"({source}); lower rollout.max_new_tokens or data.max_prompt_tokens"
            )
        with self.autocast():
            output = self.causal_lm.base_model(**attention.packed_inputs(batch))
        return output.last_hidden_state[0][batch.logit_index].to(self.dtype)


def load_policy(
    cfg: ModelConfig,
    world: World | None = None,
    parallel: ParallelConfig | None = None,
    *,
    backend: str = "auto",
) -> Policy:
    """The policy of a Hugging Face directory or Hub name, on its device, ready to train.

    In a world with a mesh it is sharded, and no process ever holds all of it: it is built without
    storage, cut, and each process reads its own part of the files. Errors: ModelError; ValueError
    for a family that `families.measure` refuses.
    """
    world = world or World(pick_device(cfg.device))
    if world.mesh is None:
        causal_lm = load_causal_lm(cfg.path, _master_dtype(cfg)).to(world.device)
        return _make_policy(Policy, causal_lm, cfg, world=world, parallel=parallel, backend=backend)
    causal_lm = _without_storage(cfg.path, _master_dtype(cfg))
    weights = _whole_files(causal_lm, cfg.path)
    policy = _make_policy(Policy, causal_lm, cfg, world=world, parallel=parallel, backend=backend)
    _read_shards(causal_lm, weights)
    return policy


def random_policy(
    config: Any,
    cfg: ModelConfig,
    world: World | None = None,
    parallel: ParallelConfig | None = None,
    *,
    backend: str = "auto",
    kind: type[P] = Policy,
    seed: int = 0,
) -> P:
    """`load_policy` of a transformers configuration with random weights, for measurements: no file
    is read, and `cfg.path` means nothing.

    Matrices are drawn with the configuration's `initializer_range`, each process its own part;
    norms are 1, biases 0. `kind`: what is made, `Policy` or a subclass that takes other batches.
    """
    world = world or World(pick_device(cfg.device))
    # A copy: the model reads the name of its attention from it, and another model may write there.
    causal_lm = empty_model(copy.deepcopy(config), _master_dtype(cfg))
    if world.mesh is None:
        _allocate(causal_lm, world.device)
        causal_lm.tie_weights()
    policy = _make_policy(kind, causal_lm, cfg, world=world, parallel=parallel, backend=backend)
    part = 0 if world.mesh is None else world.mesh.get_local_rank("shard")  # copies are alike
    _draw_weights(causal_lm, config.initializer_range, seed + part)
    return policy


def _master_dtype(cfg: ModelConfig) -> torch.dtype:
    return torch.float64 if cfg.dtype == "float64" else getattr(torch, cfg.master_dtype)


def _make_policy(
    kind: type[P],
    causal_lm: Any,
    cfg: ModelConfig,
    *,
    world: World,
    parallel: ParallelConfig | None,
    backend: str,
) -> P:
    """Put a policy around a causal LM as `cfg` has it; in a world with a mesh sharded, and then its
    storage, which it comes without, is allocated and not yet filled."""
    dtype = getattr(torch, cfg.dtype)
    choice = attention.choose_for(causal_lm.config, cfg.attention, world.device, dtype)
    causal_lm.set_attn_implementation(attention.register(choice.name))
    _use_liger(causal_lm, cfg, world.device)
    checkpoint_activations(causal_lm, cfg.activation_checkpointing)
    causal_lm.train()
    policy = kind(causal_lm, dtype=dtype, backend=backend, device=world.device)
    policy.attention = choice
    if cfg.compile:
        for layer in decoder_layers(causal_lm):
            layer.compile(dynamic=True)
    if world.mesh is not None:
        shard(policy, world, parallel or ParallelConfig())
        _allocate(causal_lm, world.device if not policy.offloaded else torch.device("cpu"))
    return policy


def shard(policy: Policy, world: World, parallel: ParallelConfig) -> Policy:
    """Cut a policy over the mesh of `world`, in place; parameters become DTensors."""
    causal_lm = policy.causal_lm
    embedding: Any = causal_lm.get_input_embeddings()
    head: Any = policy.head
    layers = decoder_layers(causal_lm)
    master = head.weight.dtype
    half = policy.dtype in HALF
    # Not cast on the way in: coefficients would become bfloat16, and a layer's input already is.
    mixed = MixedPrecisionPolicy(
        param_dtype=policy.dtype if policy.dtype != master else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    offload = OffloadPolicy()
    if parallel.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    options: dict[str, Any] = {"mesh": world.mesh, "mp_policy": mixed, "offload_policy": offload}
    for layer in layers:
        fully_shard(layer, **options)
    ends = [[embedding, head]] if policy.tied else [[embedding], [head]]
    for modules in ends:
        fully_shard(modules, reshard_after_forward=False, **options)
    fully_shard(policy, **options)
    policy.whole_gradients = parallel.accumulate == "unsharded"
    policy.offloaded = parallel.cpu_offload
    for unit in policy.units():
        # Sums: FSDP would divide by the number of processes. Neither call recurses.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    head.set_unshard_in_backward(False)  # its gradient is made by then
    embedding.set_unshard_in_backward(False)  # needs no weight
    if policy.tied and head.weight is not embedding.weight:
        raise ModelError("sharding untied the embeddings; update torch to 2.13 or newer")
    return policy


def make_replica(policy: Policy, path: str) -> Any:
    """An unsharded causal LM of the same shape in the forward's dtype, its weights not yet filled:
    for an engine that is given `full_weights` before it samples."""
    replica = _without_storage(path, policy.dtype)
    _allocate(replica, policy.device)
    replica.tie_weights()  # storage of its own for each name has untied them
    return replica.eval()


def stored_model(path: str, dtype: torch.dtype) -> tuple[Any, Iterator[tuple[str, torch.Tensor]]]:
    """A causal LM without storage, and its weights as the files hold them, one at a time: for an
    engine that is no module. Errors: ModelError."""
    causal_lm = _without_storage(path, dtype)
    return causal_lm, find_weights(causal_lm, path).given(dict(causal_lm.named_parameters()))


def _without_storage(path: str, dtype: torch.dtype) -> Any:
    config = read_config(path)
    causal_lm = empty_model(config, dtype, path)
    causal_lm.generation_config = load_generation_config(path, config)
    return causal_lm


def _allocate(causal_lm: Any, device: torch.device) -> None:
    """Allocate parameters made without storage; compute buffers again, since no file has them."""
    buffers = {name for name, _ in causal_lm.named_buffers()}
    causal_lm.to_empty(device=device)
    computed: set[str] = set()
    for name, module in list(causal_lm.named_modules()):
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            with torch.device(device):
                fresh = type(module)(config=causal_lm.config)
            for leaf, value in fresh.named_buffers():
                setattr(module, leaf, value)
                computed.add(f"{name}.{leaf}")
    if missing := sorted(buffers - computed):
        raise ModelError(
            f"{type(causal_lm).__name__} has buffers that no weight file holds ({missing[0]}); "
            "this model cannot be built in shards: set parallel.shard: never"
        )


@torch.no_grad()
def _draw_weights(causal_lm: Any, std: float, seed: int) -> None:
    generator: torch.Generator | None = None
    for name, parameter in causal_lm.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if generator is None or generator.device != local.device:
            generator = torch.Generator(local.device).manual_seed(seed)
        if parameter.ndim > 1:
            local.normal_(0.0, std, generator=generator)
        else:
            local.fill_(1.0 if "norm" in name else 0.0)


def _whole_files(causal_lm: Any, path: str) -> Weights:
    """Weights of which each process can read its part. Errors: ModelError."""
    weights = find_weights(causal_lm, path)
    if weights.converted:
        raise ModelError(
            f"{path}: transformers makes weights of {type(causal_lm).__name__} out of several "
            f"tensors ({next(iter(weights.converted))}, ...), which no process can read in parts; "
            "set parallel.shard: never"
        )
    return weights


@torch.no_grad()
def _read_shards(causal_lm: Any, weights: Weights) -> None:
    """Fill this process's part of every parameter from the safetensors files."""
    for name, parameter in causal_lm.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel():
            local.copy_(read(weights.of[name], _rows_of(parameter)))


def _rows_of(parameter: torch.Tensor) -> slice:
    """The rows of a tensor cut along dimension 0 that are this process's."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return slice(offset[0], offset[0] + shape[0])


def _use_liger(causal_lm: Any, cfg: ModelConfig, device: torch.device) -> None:
    """Liger's RMSNorm, RoPE and SwiGLU in place of transformers'. Errors: ModelError for `always`
    where it cannot run."""
    choice = cfg.liger
    installed = importlib.util.find_spec("liger_kernel") is not None
    if choice == "never" or (choice == "auto" and not (installed and device.type == "cuda")):
        return
    if not installed or device.type != "cuda":
        why = f"runs on CUDA only, the device is {device}" if installed else "is not installed"
        raise ModelError(
            f"model.liger: got 'always', but liger-kernel {why}; pip install 'vpgea_fast[liger]' "
            "on a CUDA machine, or set 'auto'"
        )
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    kind = causal_lm.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        if choice == "always":
            raise ModelError(
                f"model.liger: got 'always', but Liger has no kernels for {kind!r}; set 'never'"
            )
        return
    MODEL_TYPE_TO_APPLY_LIGER_FN[kind](
        # Liger rotates queries and keys where they lie: those that `selective` keeps would be
        # rotated again in the backward, and no version counter tells, since Triton writes them.
        rope=cfg.activation_checkpointing != "selective",
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=causal_lm,
    )


def load_causal_lm(path: str, dtype: torch.dtype) -> Any:
    """AutoModelForCausalLM with packed attention. Errors: ModelError for an incomplete directory or
    non-finite weights."""
    from transformers import AutoModelForCausalLM

    outline = _without_storage(path, dtype)
    weights = find_weights(outline, path)
    with blamed_on(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(weights.directory),
            config=read_config(path),
            dtype=dtype,
            attn_implementation=attention.register(),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    causal_lm, info = loaded
    for what in ("missing_keys", "mismatched_keys"):  # of those that are made of several tensors
        if names := sorted(map(str, info.get(what, ()))):
            raise ModelError(
                f"{path}: {len(names)} weights are {what.removesuffix('_keys')} ({names[0]}, ...), "
                "by its config.json; copy the model again, or correct config.json"
            )
    bad = [name for name, p in causal_lm.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ModelError(
            f"{path}: {len(bad)} tensors hold NaN or Inf ({bad[0]}, ...); use an earlier checkpoint"
        )
    causal_lm.generation_config = outline.generation_config
    return causal_lm


def load_tokenizer(path: str) -> Any:
    """The tokenizer that tokenizer.json of a Hugging Face directory or Hub name describes.

    Not AutoTokenizer, whose classes rebuild a tokenizer from its vocabulary alone: LlamaTokenizer
    drops every space of a byte-level tokenizer.json. Decoding cleans up nothing, so it says what
    the ids say. Errors: ModelError.
    """
    from transformers import PreTrainedTokenizerFast

    check_model_dir(path)
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "tokenizer.json").is_file():
            raise ModelError(
                f"{path} has no tokenizer.json; expected the tokenizer beside the weights: copy it "
                "there, or write it with AutoTokenizer.from_pretrained(NAME).save_pretrained(DIR)"
            )
        if not (directory / "tokenizer_config.json").is_file():
            raise ModelError(
                f"{path} has no tokenizer_config.json, which names the tokens that begin and end a "
                "text: copy it beside tokenizer.json"
            )
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                json_object(directory / name)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.decode(tokenizer("What is 1 + 1?")["input_ids"])  # a wrong setting ends here
        json.dumps(tokenizer.init_kwargs, default=str, ensure_ascii=False).encode()  # or in export
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any kind: tokenizers' panics are no Exception
        raise ModelError(
            f"cannot load a tokenizer from {path!r}: {one_line(error)}; give a complete Hugging "
            "Face directory, or the Hub name (owner/name) of a model that can be reached"
        ) from error
    return tokenizer


def check_vocabulary(tokenizer: Any, config: Any, path: str) -> None:
    """ModelError where the tokenizer knows a token that the model of `config` does not embed."""
    rows = config.get_text_config().vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ModelError(
            f"model.path {path}: the tokenizer's {token!r} is token {largest}, but the model "
            f"embeds {rows} tokens; use the tokenizer that belongs to the model, or enlarge the "
            "embedding (resize_token_embeddings) and train it"
        )


def load_generation_config(path: str, config: Any) -> Any:
    """generation_config.json of a model directory or Hub name as transformers can write it again;
    that of `config` where there is none.

    With `do_sample: false` a temperature means nothing to transformers, which yet refuses to save
    it: such keys are left out. Errors: ModelError for what is no number of its kind, for an eos
    token that is none, and for all else that an export could not write.
    """
    from transformers import GenerationConfig

    file = Path(path) / "generation_config.json"
    if file.is_file():
        json_object(file)
    try:
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:  # an old or a tiny model may have none
            generation = GenerationConfig.from_model_config(config)
        _check_generation_types(generation, config.get_text_config().vocab_size)
        if generation.do_sample is not True:
            for key in SAMPLING_KEYS:
                setattr(generation, key, None)
        generation.validate(strict=True)
        json.dumps(generation.to_dict(), allow_nan=False)
    except Exception as error:  # whatever a wrong type leads to
        raise ModelError(
            f"{path}: generation_config.json cannot be used, and an export could not write it "
            f"again: {one_line(error)}; repair it, or take it away"
        ) from error
    return generation


def _check_generation_types(generation: Any, rows: int) -> None:
    """A ValueError for sampling keys that are no numbers and for end tokens that are no tokens."""
    for key in SAMPLING_KEYS:
        value = getattr(generation, key, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{key} is {value!r}, expected a number")
    if not (generation.do_sample is None or isinstance(generation.do_sample, bool)):
        raise ValueError(f"do_sample is {generation.do_sample!r}, expected true or false")
    named = generation.eos_token_id
    for token in named if isinstance(named, list) else [] if named is None else [named]:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < rows:
            raise ValueError(f"eos_token_id is {named!r}, expected tokens of 0..{rows - 1}")

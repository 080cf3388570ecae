"""The policy: a Hugging Face causal LM that answers packed batches with losses or log-probs, never
with logits; on one device, or sharded over many.

    PackedBatch -> decoder -> hidden states at the target rows -> LossHead (T rows, never a (T, V)
    tensor)

| tensor                | one device, not sharded *      | sharded (FSDP2)                       |
| parameters            | model.dtype                    | shards in model.master_dtype          |
| masters               | apart in model.master_dtype    | the shards                            |
| forward               | model.dtype                    | model.dtype: gathered in it           |
| gradients             | float32 (float64)              | reduced in float32, shards            |
| dW of the head        | float32 across micro-batches   | the same, then one reduce-scatter     |
| log-probs, losses     | float32 (float64)              | float32 (float64)                     |

* Where the dtypes differ the device has both: no forward copies a weight, and it computes what a
sharded one does. With parallel.cpu_offload the masters lie in host memory.

Units of a sharded policy: every decoder layer, the embedding, the head, the root (the final norm).
The head makes its gradient in the forward, inside its own unit, so its reduce-scatter starts before
the decoder's backward; one all-gather and one reduce-scatter of the head serve a whole step,
scoring included. Gradients are sums over processes: the normaliser is in the coefficients.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
)
from torch.distributed.tensor import DTensor

from vpgea_fast import attention, embedding, families, losses
from vpgea_fast.activations import checkpoint_activations
from vpgea_fast.config import ModelConfig, ParallelConfig
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.hosted import host_tensors
from vpgea_fast.model_dir import ModelError, decoder_layers, empty_model
from vpgea_fast.shard import (
    AllRows,
    JoinedRows,
    allocate,
    cut,
    draw,
    read_parts,
    units,
    weights_in_parts,
)
from vpgea_fast.types import PackedBatch
from vpgea_fast.weights import load_causal_lm, without_storage

P = TypeVar("P", bound="Policy")


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
        # On meta: nn.Linear would allocate and draw a second (V, D), which the next line drops.
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
        # A copy only of a head that is cut by classes: FSDP gathers a unit in this dtype.
        weight_VD = self.weight.to(hidden.dtype)
        rows = None
        if isinstance(self.weight, DTensor):  # cut by classes: a unit of FSDP is plain in here
            rows = AllRows(self.weight.device_mesh, hidden.shape[0], hidden.device)
            hidden = JoinedRows.apply(hidden, rows)
            targets = rows.join(targets, fill=-100)  # the losses' ignore_index
        if coef is None:
            out = losses.linear_logprob(
                hidden, weight_VD, targets, return_entropy=entropy, **options
            )
            own = slice(None) if rows is None else rows.own
            return Output(None, out.logp[own], None if out.entropy is None else out.entropy[own])
        coef_all = coef if rows is None else rows.join(coef)
        out = losses.weighted_logprob_loss(
            hidden, weight_VD, targets, coef_all, dweight_out=self._sink(), **options
        )
        if rows is None:
            return Output(out.loss, out.logp)
        logp = out.logp[rows.own]
        # The value of the own rows, with the gradient of the sum over all processes.
        return Output((coef * logp).sum() + (out.loss - out.loss.detach()), logp)

    def _sink(self) -> torch.Tensor | None:
        """Return the weight's own gradient, in float32 at least; None for a scoring pass."""
        weight = self.weight
        # Asked here: inside an autograd Function grad mode is off, and scoring would add to it.
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if weight.grad is None:
            # torch refuses a gradient of another dtype than the weight's unless grad_dtype says so.
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
        # Chosen and measured before the model is changed: what is refused here leaves it as it was.
        self.asked = backend
        self.backend = losses.choose_backend(backend, device=self.device, dtype=dtype)
        options = families.measure(causal_lm.config)
        families.remove_randomness(causal_lm)
        head = LossHead(causal_lm.get_output_embeddings(), options, self.backend.name)
        causal_lm.set_output_embeddings(head)
        # By identity, before FSDP replaces both by DTensors.
        self.tied = head.weight is causal_lm.get_input_embeddings().weight
        self.room = attention.positions(causal_lm.config)  # (positions or None, where it says so)
        self.whole_gradients = self.offloaded = False
        # parameter -> the weight that is updated, where that is another tensor; None: nowhere.
        self.masters: dict[torch.Tensor, torch.Tensor] | None = None
        self.hosted = False
        self.attention = attention.Choice("sdpa", "not chosen: as the model was given")

    @property
    def device(self) -> torch.device:
        """Where the forward runs; offloaded shards are elsewhere."""
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
            # (R,) in float32 at least: coefficients hold the normaliser of the whole step.
            coef_R = batch.coef.to(wide)
        return self.head(hidden_RD, batch.targets, coef_R, temperature=temperature, entropy=entropy)

    @torch.no_grad()
    def logprob(self, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """(R,) log p of every target, on the policy's device; the head runs on the target rows
        only."""
        return self(batch, temperature=temperature, train=False).logp

    @torch.no_grad()
    def logprob_entropy(self, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """(2, R): `logprob`, and the entropy in nats of the distribution each target came from."""
        output = self(batch, temperature=temperature, train=False, entropy=True)
        return torch.stack([output.logp, output.entropy])

    def expect_backward(self, *, last: bool) -> None:
        """Say before each micro-batch whether it is the last of its update: the head's gradient is
        reduced only then. The layers' are reduced each time, unless they are kept whole."""
        for unit in units(self):
            # The layers' are reduced per micro-batch, so only shards of them stay in memory.
            late = self.whole_gradients or unit is self.head
            late |= self.tied and unit is self.causal_lm.get_input_embeddings()
            unit.set_requires_gradient_sync(last or not late, recurse=False)
            # Between HSDP replicas only once per step: that is the slow network.
            unit.set_requires_all_reduce(last, recurse=False)
            if unit is self.head:
                # Else the next micro-batch would gather V x D again.
                unit.set_reshard_after_backward(last, recurse=False)
            if unit is self:
                unit.set_is_last_backward(last)
        if not self.sharded:
            # FSDP sums in float32 by itself. Autograd would in the weight's dtype: in bfloat16 a
            # micro-batch is lost whose gradient is 2^-9 of the sum so far.
            for parameter in self.parameters():
                _sum_in_float32(parameter)

    def shard(self, world: World, parallel: ParallelConfig) -> Self:
        """Cut the policy over the mesh of `world`, in place; parameters become DTensors."""
        if parallel.tensor == "head":
            self.backend = losses.choose_backend(
                self.asked, device=self.device, dtype=self.dtype, sharded=True
            )
            self.head.backend = self.backend.name
        cut(self, self.causal_lm, self.dtype, world=world, parallel=parallel)
        self.whole_gradients = parallel.accumulate == "unsharded"
        self.offloaded = parallel.cpu_offload
        return self

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        room, source = self.room
        if room is not None and max(batch.seqlens) > room:
            raise ModelError(
                f"a row has {max(batch.seqlens)} tokens, but the model has {room} positions "
                f"({source}); lower rollout.max_new_tokens or data.max_prompt_tokens"
            )
        if not self.sharded and self.head.weight.dtype is not self.dtype:
            raise ModelError(
                f"Policy: got weights in {self.head.weight.dtype} for a forward in {self.dtype}; "
                "cast the model, or take `load_policy`"
            )
        # The decoder alone: the causal LM would make (T, V) logits, 2 GB per 8k tokens and 128k
        # words in bfloat16.
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
    storage, cut, and each process reads its own part of the files. Without a mesh the device has
    the weights in the forward's dtype, and masters of another one beside them, or in host memory
    with parallel.cpu_offload. Errors: ModelError; ValueError for a family that `families.measure`
    refuses.
    """
    world = world or World(pick_device(cfg.device))
    hosted, cuda = _hosted(world, parallel), world.device.type == "cuda"
    weights = None
    if world.mesh is not None or (parallel and parallel.in_parts(world.size, cuda=cuda)):
        # Headers are checked before the cut: a wrong model is refused before it takes memory.
        causal_lm = without_storage(cfg.path, _weight_dtype(cfg, hosted))
        weights = weights_in_parts(causal_lm, cfg.path)
        if world.mesh is None:
            _allocate_whole(causal_lm, world.device)
    else:
        causal_lm = load_causal_lm(cfg.path, _master_dtype(cfg)).to(world.device)
    policy = _make_policy(Policy, causal_lm, cfg, world=world, parallel=parallel, backend=backend)
    if weights is not None:
        read_parts(causal_lm, weights, policy.masters)
    return with_masters(policy, cfg)


def frozen(cfg: ModelConfig) -> ModelConfig:
    """The section `model` of a policy that nothing updates: it has no masters, and no backward that
    would have anything computed twice."""
    master_dtype = "bfloat16" if cfg.has_masters else cfg.master_dtype
    return replace(cfg, activation_checkpointing="none", master_dtype=master_dtype)


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
    hosted = _hosted(world, parallel)
    causal_lm = empty_model(copy.deepcopy(config), _weight_dtype(cfg, hosted))
    if world.mesh is None:
        _allocate_whole(causal_lm, world.device)
    policy = _make_policy(kind, causal_lm, cfg, world=world, parallel=parallel, backend=backend)
    part = 0 if world.mesh is None else world.mesh.get_local_rank("shard")  # copies are alike
    draw(causal_lm, config.initializer_range, seed + part)
    for weight, master in (policy.masters or {}).items():
        master.copy_(weight.detach())
    return with_masters(policy, cfg)


def _master_dtype(cfg: ModelConfig) -> torch.dtype:
    return torch.float64 if cfg.dtype == "float64" else getattr(torch, cfg.master_dtype)


def _weight_dtype(cfg: ModelConfig, hosted: bool) -> torch.dtype:
    """Choose the dtype of the module's own parameters."""
    return getattr(torch, cfg.dtype) if hosted else _master_dtype(cfg)


def _hosted(world: World, parallel: ParallelConfig | None) -> bool:
    return parallel is not None and parallel.cpu_offload and world.mesh is None


def _allocate_whole(causal_lm: Any, device: torch.device) -> None:
    allocate(causal_lm, device)
    causal_lm.tie_weights()  # storage of its own for each name has untied them


def _masters(causal_lm: Any, cfg: ModelConfig) -> dict[torch.Tensor, torch.Tensor]:
    """Make the tensors in host memory that an optimiser updates, by the parameters; none where
    those have the masters' dtype."""
    dtype, parameters = _master_dtype(cfg), list(causal_lm.parameters())
    if parameters[0].dtype is dtype:
        return {}
    made = host_tensors((p.shape for p in parameters), dtype, parameters[0].device)
    return dict(zip(parameters, made, strict=True))


@torch.no_grad()
def with_masters(policy: P, cfg: ModelConfig) -> P:
    """Keep the weights of one device as masters, and give the forward others in its dtype. Cast in
    the forward, every micro-batch would hold what it has cast until its backward."""
    if cfg.has_masters and not (policy.sharded or policy.hosted):
        policy.masters = {weight: weight.detach() for weight in policy.parameters()}
        for weight in policy.parameters():
            weight.data = policy.masters[weight].to(policy.dtype)
            _sum_in_float32(weight)
    return policy


def _sum_in_float32(parameter: nn.Parameter) -> None:
    """Let autograd add what it makes in the weight's dtype to a gradient in float32 at least."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    if parameter.requires_grad and parameter.grad_dtype is not wide:
        before, parameter.grad = parameter.grad, None
        parameter.grad_dtype = wide
        parameter.grad = None if before is None else before.to(wide)


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
    storage, which it comes without, is allocated and not yet filled, nor are hosted masters."""
    dtype = getattr(torch, cfg.dtype)
    choice = attention.choose_for(causal_lm.config, cfg.attention, world.device, dtype)
    causal_lm.set_attn_implementation(attention.register(choice.name))
    _use_liger(causal_lm, cfg, world.device)
    if world.device.type == "cpu":
        embedding.add_in_float32(causal_lm)
    checkpoint_activations(causal_lm, cfg.activation_checkpointing or "full")
    # Train mode for gradient checkpointing, which transformers skips in eval; no dropout is left.
    causal_lm.train()
    policy = kind(causal_lm, dtype=dtype, backend=backend, device=world.device)
    policy.attention = choice
    if cfg.compile:
        # Dynamic, since every micro-batch has another number of tokens.
        for layer in decoder_layers(causal_lm):
            layer.compile(dynamic=True)
    if world.mesh is not None:
        policy.shard(world, parallel or ParallelConfig())
        allocate(causal_lm, world.device if not policy.offloaded else torch.device("cpu"))
    elif _hosted(world, parallel):
        policy.masters, policy.hosted = _masters(causal_lm, cfg), True
    return policy


def make_replica(policy: Policy, path: str) -> Any:
    """An unsharded causal LM of the same shape in the forward's dtype, its weights not yet filled:
    for an engine that receives `full_weights` before it samples."""
    replica = without_storage(path, policy.dtype)
    _allocate_whole(replica, policy.device)
    return replica.eval()


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
    # `auto` runs without Liger here: its kernels are an optimisation of the same formulas.
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

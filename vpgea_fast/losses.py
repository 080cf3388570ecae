"""Fused losses of the language-model head: no (T, V) logits, gradients in one pass where possible.

T tokens of a (posterior) stream, U tokens of a prior stream, K rows that take part, D hidden, V
vocabulary, S sequences, P sequences of the prior stream. Needs torch only. The maths is derived in
kernels/README.md.

Every objective whose coefficients are known before the forward (policy gradients with constant
advantages, gated distillation, supervised fine-tuning) is `weighted_logprob_loss`: one pass, three
GEMMs. Objectives whose coefficients depend on the current log-probabilities use `linear_logprob`,
which recomputes the logits in its backward: four GEMMs.

Rules that hold for all four functions:

* A row with coefficient 0 or an ignored target takes no part: its hidden row is never read (it may
  hold NaN), its logp is 0, its `kept` False and its gradient exactly 0. Finding these rows costs
  one host synchronisation on CUDA; pass `rows` to avoid it. Inside CUDA graph capture, and with
  `rows`, rows are masked instead.
* fp16, bf16 and fp32 inputs give float32 values and accumulators; float64 gives float64. Gradients
  have their tensor's dtype.
* Under autocast hidden and weight are cast to its dtype, as F.linear casts them; float64 is left
  alone, as there. "auto" chooses by that dtype. The copies (T, D) and (V, D) live as long as one
  pass and are made again by the backward of `linear_logprob`. Logits, bias, values and dW stay
  float32: a float32 weight gets a gradient that was never rounded to half precision.
* All sums, no means: the normaliser belongs in the coefficients, computed once per optimiser step
  over all ranks and micro-batches. Frameworks that average gradients over ranks (DDP, FSDP) divide
  the sum by the number of ranks: multiply the coefficients, or 1 / denominator, by the world size
  there.
* torch.compile(fullgraph=True), torch.export, fake and meta tensors see one op a call
  (torch.ops.vpgea_fast): no graph breaks, the eager bits, dynamic lengths.
* `loss.backward(g)` scales the stored gradients by g, on the device and, where the graph is freed,
  in place.
* Differentiating twice, forward mode and torch.func transforms are a RuntimeError;
  torch.autograd.grad(is_grads_batched=True) works, a pass for each gradient. Coefficients,
  advantages, denominators, sequence weights and temperatures are constants.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch

from vpgea_fast.kernels import backends
from vpgea_fast.kernels.backends import BackendChoice
from vpgea_fast.kernels.head import (
    Inputs,
    OnePass,
    Recompute,
    Settings,
    accumulator,
    check,
    dot,
    refuse_transforms,
    register,
    wide,
    without_values,
)

Tensor = torch.Tensor


class HeadOptions(TypedDict, total=False):
    """Keyword arguments shared by every loss of this module.

    bias: (V,) or None.
    temperature: positive float or (T,) tensor (two streams: (T + U,), posterior first).
    softcap: positive float or None: logits become softcap tanh(logits / softcap).
    logit_scale: float multiplying h . w, before the bias.
    ignore_index: target value of rows that take no part.
    backend: "auto", "reference", "torch", "cublas" or "triton"; see `choose_backend`.
    rows: (R,) int64 without repeats or None: the only rows that may take part; the rest count as
        coefficient 0. Spares CUDA the host synchronisation that finds them. Two streams: indices
        into [posterior; prior], prior ones + T.
    chunk_bytes: memory for the logits of one chunk (all backends but "reference"); None: 48 MiB or
        256 rows, whichever is more; on CUDA up to 4 GiB and at most 1/8 of what is free at the
        first call of this head on this device, which is the only time the driver is asked.
    batch_invariant: a row's logp, lse and entropy depend, bit for bit, neither on its neighbours
        nor on its place in a chunk. Always so in "triton", which needs CUDA; a ValueError in the
        others.
    validate: on CUDA, wrong values (targets, rows, temperatures, boundaries) are a ValueError here
        and now, at the price of a synchronisation for each check, and not an assertion on the
        device, after which the process cannot go on. On a CPU they always are a ValueError.
    """

    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    ignore_index: int
    backend: str
    rows: Tensor | None
    chunk_bytes: int | None
    batch_invariant: bool
    validate: bool


@dataclass(frozen=True)
class LogprobOutput:
    """`logp`, `lse`, `entropy` (None unless asked for), each (T,), differentiable; 0 where ignored.

    One token, two classes, logits [0, 0]: logp = [-0.6931], lse = [0.6931], entropy = [0.6931].
    """

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


@dataclass(frozen=True)
class WeightedLoss:
    """`loss` = sum_t coef_t logp_t (0-dim, differentiable); `logp` (T,) detached; `kept` (T,) bool.

    coef = [-1, 0] and p = [1/2, anything]: loss = 0.6931, logp = [-0.6931, 0], kept =
    [True, False].
    """

    loss: Tensor
    logp: Tensor
    kept: Tensor


@dataclass(frozen=True)
class TwoStreamLoss:
    """`loss` (0-dim, differentiable) = `loss_post` + `loss_prior` (detached, as the logp are).

    coef_post = [-1], coef_prior = [-0.5], both p = 1/2: loss_post = 0.6931, loss_prior = 0.3466,
    loss = 1.0397.
    """

    loss: Tensor
    loss_post: Tensor
    loss_prior: Tensor
    logp_post: Tensor
    logp_prior: Tensor
    kept_post: Tensor
    kept_prior: Tensor


@dataclass(frozen=True)
class VpgeaLoss:
    """`loss` = `pg_loss` + beta `distill_loss`; only `loss` (0-dim) is differentiable.

    logq_S: log q_s, sum over the sequence's tokens; 0 where A_s = 0 or w_s = 0: not computed there.
    logp_S: log pi_s; 0 where the gate is closed, and everywhere when beta = 0: not computed there.
    gate_S: bool, A_s > 0.

    Two one-token sequences, A = [1, -1], w = [1, 1], beta = 0.5, q = [1/2, 1/2], pi = [1/4, -]:
    pg_loss = 0, distill_loss = log(1/2) - log(1/4) = 0.6931, loss = 0.3466.
    """

    loss: Tensor
    pg_loss: Tensor
    distill_loss: Tensor
    logq_S: Tensor
    logp_S: Tensor
    gate_S: Tensor


def choose_backend(
    backend: str = "auto",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    entropy_gradient: bool = False,
) -> BackendChoice:
    """What runs for tensors of this dtype on this device (None: CUDA where there is one), and why.

    "reference" (full logits), "torch" (chunked), "cublas" and "triton" (CUDA). "auto" chooses by
    device, dtype and what the call wants: "triton" for half precision on sm_80 or newer, for values
    and gradients of logp and lse, and "torch" for the rest; each pass is decided alone, so only a
    backward with a gradient of the entropy runs on "torch". Shape and free memory decide the size
    of a chunk, not the backend. Each distinct decision of "auto" is logged once, at INFO, on the
    logger "vpgea_fast.losses".

    ValueError: an unknown name, a backend that is not available, or one that cannot do this.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return backends.resolve(
        backend, torch.device(device), dtype, False, entropy_gradient, batch_invariant
    )


def resolve_backend(backend: str = "auto", **situation: Any) -> str:
    """The name of what `choose_backend` chooses; the same keywords and errors."""
    return choose_backend(backend, **situation).name


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
) -> LogprobOutput:
    """Log-probability of each target under the head, differentiable per token.

        a = logit_scale (h . w) + bias        z = softcap tanh(a / softcap) / temperature
        logp = z_target - lse(z)              entropy = -sum_v p_v log p_v

    hidden_TD (T, D) and weight_VD (V, D) share a floating dtype, or are cast by autocast; targets_T
    is (T,) int32 or int64;
    the options are those of `HeadOptions`. Gradients flow to hidden, weight and bias from any mix
    of logp, lse and entropy. logp <= 0 always and 1 - p is exact for confident tokens. Nothing but
    the inputs is saved; the backward makes the logits again.

    ValueError: shapes, dtypes, devices, options; a target outside [0, V) that is not ignore_index
    (on CUDA a device-side assertion, without synchronisation, unless `validate`); a sharded weight.
    """
    inputs, settings = _inputs(
        hidden_TD,
        weight_VD,
        targets_T,
        bias=bias,
        temperature=temperature,
        rows=rows,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        backend=backend,
        chunk_bytes=chunk_bytes,
        batch_invariant=batch_invariant,
        validate=validate,
    )
    _check_flag("return_entropy", return_entropy)
    logp_T, lse_T, entropy_T = Recompute.apply(*inputs, return_entropy, settings)
    return LogprobOutput(logp_T, lse_T, entropy_T)


def weighted_logprob_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    coef_T: Tensor,
    *,
    dweight_out: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
) -> WeightedLoss:
    """sum_t coef_t logp_t with its gradients made in the same pass; only dX and dW are kept.

        d loss / d z_tv = coef_t (1[v = target_t] - p_tv)        (z as in `linear_logprob`)

    coef_T (T,) is a constant of any sign: minimising with coef < 0 makes the token more likely. An
    expected-reward gradient uses -advantage / denominator, supervised fine-tuning -1 / tokens. Sums
    only: see the module's note on frameworks that average gradients over ranks.

    dweight_out (V, D) float32 (float64 for float64 inputs) receives dW by accumulation in this
    call, whenever grad mode is on; weight.grad is then left alone. Micro-batches so accumulate in
    float32 under a half-precision weight. Its dW is final before `backward`, so backward's incoming
    gradient must be 1 (asserted on the device): scale the coefficients instead. Not for use inside
    activation checkpointing, which runs the forward twice.

    Under no_grad only values are computed. Errors as `linear_logprob`, and coef_T with
    requires_grad.
    """
    inputs, settings = _inputs(
        hidden_TD,
        weight_VD,
        targets_T,
        bias=bias,
        temperature=temperature,
        rows=rows,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        backend=backend,
        chunk_bytes=chunk_bytes,
        batch_invariant=batch_invariant,
        validate=validate,
    )
    _check_constant("coef_T", coef_T, targets_T)
    _check_sink(dweight_out, weight_VD)
    grad = torch.is_grad_enabled()
    needs = [
        grad and hidden_TD.requires_grad,
        grad and (weight_VD.requires_grad or dweight_out is not None),
        grad and bias is not None and bias.requires_grad,
    ]
    loss, logp_T, kept_T = OnePass.apply(*inputs, coef_T, dweight_out, needs, settings)
    return WeightedLoss(loss, logp_T, kept_T)


def two_stream_loss(
    hidden_post_TD: Tensor,
    hidden_prior_UD: Tensor,
    weight_VD: Tensor,
    targets_post_T: Tensor,
    targets_prior_U: Tensor,
    coef_post_T: Tensor,
    coef_prior_U: Tensor,
    *,
    dweight_out: Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> TwoStreamLoss:
    """`weighted_logprob_loss` of two streams that share the head: one call, one sum of dW.

        loss = sum_t coef_post_t log q_t + sum_u coef_prior_u log pi_u

    Either stream may be empty. Options as in `HeadOptions`; `dweight_out` and errors as in
    `weighted_logprob_loss`.
    """
    both = _weighted_streams(
        (hidden_post_TD, hidden_prior_UD),
        weight_VD,
        (targets_post_T, targets_prior_U),
        (coef_post_T, coef_prior_U),
        dweight_out=dweight_out,
        **options,
    )
    tokens = targets_post_T.shape[0]
    logp_post_T, logp_prior_U = both.logp[:tokens], both.logp[tokens:]
    kept_post_T, kept_prior_U = both.kept[:tokens], both.kept[tokens:]
    return TwoStreamLoss(
        loss=both.loss,
        loss_post=dot(coef_post_T.masked_fill(~kept_post_T, 0.0), logp_post_T),
        loss_prior=dot(coef_prior_U.masked_fill(~kept_prior_U, 0.0), logp_prior_U),
        logp_post=logp_post_T,
        logp_prior=logp_prior_U,
        kept_post=kept_post_T,
        kept_prior=kept_prior_U,
    )


def vpgea_loss(
    hidden_post_TD: Tensor,
    hidden_prior_UD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    cu_seqlens: Tensor,
    advantage_S: Tensor,
    *,
    denominator: float | Tensor | None = None,
    weight_S: Tensor | None = None,
    prior_index: Tensor | None = None,
    beta: float = 0.5,
    dweight_out: Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> VpgeaLoss:
    """The training loss of VPG-EA (arXiv 2605.11019) on packed sequences, both streams in one pass.

        loss = sum_s w_s [ -A_s log q_s + beta 1[A_s > 0] (sg log q_s - log pi_s) ]
        log q_s = sum_t log q_t

    hidden_post_TD: (T, D), the sampled tokens' contexts in the teacher (posterior) view, sequences
        back to back.
    hidden_prior_UD: (U, D), the same tokens' contexts in the student (prior) view.
    targets_T: (T,), the sampled tokens, the same in both views.
    cu_seqlens: (S + 1,) int32 or int64, 0 = first <= ... <= last = T.
    advantage_S: (S,). Sequences with A_s = 0 are dropped: no row of them is computed. The gate is
        strict: A_s > 0.
    denominator: w_s = 1 / denominator, counted over all ranks and micro-batches (B*G, B*G*C or
        tokens). Where gradients are averaged over ranks, divide it by the world size.
    weight_S: (S,), w_s itself. Exactly one of denominator and weight_S.
    prior_index: (P,) int64 without repeats: the sequences that hidden_prior_UD holds, in its order.
        None: all of them, U = T. It may leave out sequences with A_s <= 0, no others.
    beta: weight of the distillation term, >= 0. At 0 the prior stream is not computed.
    Options as in `HeadOptions`; `dweight_out` as in `weighted_logprob_loss`.

    ValueError (on CUDA device-side assertions for what needs values, unless `validate`): both or
    none of denominator and weight_S, bad cu_seqlens, prior_index out of range, repeated, or missing
    a gated sequence, U not the prior sequences' tokens.
    """
    _check_matrix("hidden_post_TD", hidden_post_TD, "(T, D): flatten batch and time first")
    _check_matrix("hidden_prior_UD", hidden_prior_UD, "(U, D): flatten batch and time first")
    _check_float("hidden_post_TD", hidden_post_TD)
    _check_plain("targets_T", targets_T)
    _check_targets("targets_T", targets_T, "hidden_post_TD", hidden_post_TD)
    tokens, prior_tokens = targets_T.shape[0], hidden_prior_UD.shape[0]
    _check_flag("validate", options.get("validate", False))
    _check_sequences(cu_seqlens, advantage_S, targets_T)
    advantage_S = advantage_S.to(
        torch.promote_types(advantage_S.dtype, accumulator(hidden_post_TD))
    )
    weight_S = _sequence_weight(advantage_S, denominator, weight_S)
    _check_number("beta", beta, "a finite number >= 0", low=0, high=FLOAT32.max)
    if prior_index is not None:
        _check_prior_index(prior_index, cu_seqlens)
    elif prior_tokens != tokens:
        raise ValueError(
            f"hidden_prior_UD: got {prior_tokens} rows, expected {tokens} as in hidden_post_TD; "
            "pass prior_index when the prior stream holds only some sequences"
        )
    gate_S = advantage_S > 0
    coef_post_S = -weight_S * advantage_S
    coef_prior_S = -beta * weight_S * gate_S
    layout = torch.ops.vpgea_fast.stream_layout if without_values(targets_T) else _stream_layout
    sequence_T, sequence_U, targets_U = layout(
        cu_seqlens,
        targets_T,
        coef_prior_S,
        prior_index,
        denominator if isinstance(denominator, Tensor) else None,
        prior_tokens,
        options.get("validate", False),
    )
    if prior_index is None:
        sequence_U, targets_U = sequence_T, targets_T
    both = _weighted_streams(
        (hidden_post_TD, hidden_prior_UD),
        weight_VD,
        (targets_T, targets_U),
        (coef_post_S[sequence_T], coef_prior_S[sequence_U]),
        dweight_out=dweight_out,
        **options,
    )
    sums = torch.ops.vpgea_fast.path_sums if without_values(targets_T) else _path_sums
    logq_S, logp_S, pg_loss, distill_loss = sums(
        both.logp[:tokens],
        both.logp[tokens:],
        sequence_T,
        sequence_U,
        cu_seqlens,
        advantage_S,
        weight_S,
        coef_prior_S != 0,
        prior_index,
    )
    # The value is the sum of its parts; both.loss, which lacks beta w 1[A > 0] sg log q, gives the
    # gradient alone.
    loss = pg_loss + beta * distill_loss + (both.loss - both.loss.detach())
    return VpgeaLoss(
        loss=loss,
        pg_loss=pg_loss,
        distill_loss=distill_loss,
        logq_S=logq_S,
        logp_S=logp_S,
        gate_S=gate_S,
    )


def _weighted_streams(
    hidden: tuple[Tensor, Tensor],
    weight_VD: Tensor,
    targets: tuple[Tensor, Tensor],
    coef: tuple[Tensor, Tensor],
    *,
    dweight_out: Tensor | None,
    **options: Unpack[HeadOptions],
) -> WeightedLoss:
    """`weighted_logprob_loss` of [posterior; prior]."""
    _check_matrix("weight_VD", weight_VD, "(V, D): gather a sharded one")
    for name, *tensors in zip(("post", "prior"), hidden, targets, coef, strict=True):
        named = zip(("hidden", "targets", "coef"), tensors, strict=True)
        for label, x in ((f"{kind}_{name}", x) for kind, x in named):
            _check_plain(label, x)
            if x.device != weight_VD.device:
                raise ValueError(
                    f"{label} is on {x.device}, weight_VD on {weight_VD.device}: move one"
                )
        hidden_RD, targets_R, coef_R = tensors
        alike = hidden_RD.dtype == weight_VD.dtype or _autocast(hidden_RD, weight_VD) is not None
        if not alike or hidden_RD.dim() != 2 or hidden_RD.shape[1] != weight_VD.shape[1]:
            raise ValueError(
                f"hidden_{name}: got {hidden_RD.dtype} {tuple(hidden_RD.shape)}, expected "
                f"{weight_VD.dtype} (rows, {weight_VD.shape[1]}) as in weight_VD: cast or flatten"
            )
        _check_targets(f"targets_{name}", targets_R, f"hidden_{name}", hidden_RD)
        _check_constant(f"coef_{name}", coef_R, targets_R)
    with _without_autocast(weight_VD):  # a CPU's takes no float16 and no float64 in cat
        both = [torch.cat(pair) for pair in (hidden, targets, coef)]
    hidden_RD, targets_R, coef_R = both
    return weighted_logprob_loss(
        hidden_RD,
        weight_VD,
        targets_R,
        coef_R,
        dweight_out=dweight_out,
        **options,
    )


# --- what depends on values: opaque to torch.compile, as the head is -----------------------------


def _stream_layout(
    cu_seqlens: Tensor,
    targets_T: Tensor,
    coef_prior_S: Tensor,
    prior_index: Tensor | None,
    denominator: Tensor | None,
    prior_tokens: int,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which sequence a token belongs to, (T,) and (U,), and targets_U. Checks the values."""
    tokens, lengths_S = targets_T.shape[0], cu_seqlens.diff()
    check(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (lengths_S >= 0).all(),
        f"cu_seqlens must start at 0, never fall, and end at the {tokens} tokens of targets_T",
        validate,
    )
    if denominator is not None:
        fine = (denominator > 0) & (denominator < math.inf)
        check(fine, "denominator: must be positive and finite", validate)
    sequence_T = _sequence_of_token(cu_seqlens, tokens)
    if prior_index is None:
        return sequence_T, sequence_T, targets_T
    sequences = lengths_S.shape[0]
    inside = ((prior_index >= 0) & (prior_index < sequences)).all()
    check(inside, f"prior_index must lie in [0, {sequences})", validate)
    held_S = torch.zeros_like(lengths_S).index_add_(
        0, prior_index, torch.ones_like(prior_index).to(lengths_S.dtype)
    )
    check((held_S <= 1).all(), "prior_index names a sequence twice", validate)
    check(
        ((held_S == 1) | (coef_prior_S == 0) | (lengths_S == 0)).all(),
        "prior_index leaves out a sequence with a positive advantage: the prior stream must hold "
        "every gated sequence",
        validate,
    )
    lengths_P = lengths_S[prior_index]
    check(
        lengths_P.sum() == prior_tokens,
        f"hidden_prior_UD has {prior_tokens} rows, which is not the number of tokens of the "
        "sequences in prior_index",
        validate,
    )
    cu_P = torch.cat((cu_seqlens.new_zeros(1), lengths_P.cumsum(0).to(cu_seqlens.dtype)))
    slot_U = _sequence_of_token(cu_P, prior_tokens)
    offset_U = torch.arange(prior_tokens, device=cu_seqlens.device) - cu_P[slot_U]
    sequence_U = prior_index[slot_U]
    return sequence_T, sequence_U, targets_T[cu_seqlens[sequence_U] + offset_U]


def _sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) int64: which sequence a packed token belongs to."""
    position_T = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position_T, right=True)


def _path_sums(
    logq_T: Tensor,
    logp_U: Tensor,
    sequence_T: Tensor,
    sequence_U: Tensor,
    cu_seqlens: Tensor,
    advantage_S: Tensor,
    weight_S: Tensor,
    gate_S: Tensor,
    prior_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logq_S, logp_S, pg_loss = -sum w A logq, distill_loss = sum w gate (logq - logp).

    Added in `wide`. On CUDA with Triton by kernels/group_advantage.py: two launches for about
    thirty, and one order of every sum, where index_add has atomics.
    """
    if (logq_T.is_cuda or backends.interpreted()) and backends.triton_missing() is None:
        from vpgea_fast.kernels.group_advantage import gated_kl

        sums = gated_kl(
            logq_T,
            logp_U,
            cu_seqlens,
            advantage_S,
            weight_S,
            prior_index=prior_index,
            gate_S=gate_S,
        )
        return sums.logq_S, sums.logp_S, sums.pg_loss, sums.distill_loss
    zero_S = torch.zeros(gate_S.shape, dtype=wide(logq_T.device), device=logq_T.device)
    logq_S = zero_S.index_add(0, sequence_T, logq_T.to(zero_S.dtype))
    logp_S = zero_S.index_add(0, sequence_U, logp_U.to(zero_S.dtype))
    pg_loss = -(weight_S * advantage_S * logq_S).sum()
    distill_loss = (weight_S * gate_S * (logq_S - logp_S)).sum()
    dtype = logq_T.dtype
    return logq_S.to(dtype), logp_S.to(dtype), pg_loss.to(dtype), distill_loss.to(dtype)


@torch.no_grad()
def _stream_layout_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    """An op may not return one tensor twice, nor an argument: without prior_index, nothing."""
    sequence_T, *prior = _stream_layout(*arguments)
    held = arguments[3] is not None  # prior_index
    return sequence_T, *(x if held else x.new_empty(0) for x in prior)


def _stream_layout_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, targets_T, _, prior_index, _, prior_tokens, _ = arguments
    prior_tokens = 0 if prior_index is None else prior_tokens
    sequence_T = targets_T.new_empty(targets_T.shape, dtype=torch.int64)
    sequence_U = sequence_T.new_empty(prior_tokens)
    return sequence_T, sequence_U, sequence_U.new_empty(prior_tokens, dtype=targets_T.dtype)


@torch.no_grad()
def _path_sums_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    """The launches write their sums side by side, an op's outputs share no memory."""
    return tuple(x.clone() for x in _path_sums(*arguments))


def _path_sums_fake(logq_T: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    shape = arguments[4].shape  # advantage_S
    sums = [logq_T.new_empty(shape) for _ in range(2)]
    return *sums, logq_T.new_empty(()), logq_T.new_empty(())


register(
    "stream_layout",
    "(Tensor cu_seqlens, Tensor targets, Tensor coef_prior, Tensor? prior_index, "
    "Tensor? denominator, SymInt prior_tokens, bool validate) -> (Tensor, Tensor, Tensor)",
    _stream_layout_kernel,
    _stream_layout_fake,
)
register(
    "path_sums",
    "(Tensor logq, Tensor logp, Tensor sequence_post, Tensor sequence_prior, Tensor cu_seqlens, "
    "Tensor advantage, Tensor weight, Tensor gate, Tensor? prior_index) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _path_sums_kernel,
    _path_sums_fake,
)


# --- checks that need no values -----------------------------------------------------------------


def _inputs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    rows: Tensor | None,
    **options: Any,
) -> tuple[Inputs, Settings]:
    """The arguments of a call, checked: ValueError."""
    temperature_T = temperature if isinstance(temperature, Tensor) else None
    inputs = Inputs(hidden_TD, weight_VD, bias, targets_T, temperature_T, rows)
    scalar = 1.0 if isinstance(temperature, Tensor) else temperature
    _check_tensors(inputs)
    operands = _autocast(hidden_TD, weight_VD) or hidden_TD.dtype
    settings = Settings(temperature=scalar, operands=operands, **options)
    _check_settings(settings)
    return inputs, settings


def _autocast(*operands: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives the operands of a GEMM; None where it leaves them alone."""
    kind = operands[0].device.type
    if not _autocast_on(kind) or any(x.dtype is torch.float64 for x in operands):
        return None
    return torch.get_autocast_dtype(kind)


def _autocast_on(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _autocast_on(kind) else nullcontext()


def _check_tensors(inputs: Inputs) -> None:
    hidden_TD, weight_VD, bias, targets_T, temperature_T, rows = inputs
    names = ("hidden_TD", "weight_VD", "bias", "targets_T", "temperature", "rows")
    optional = ("bias", "temperature", "rows")
    for name, x in zip(names, inputs, strict=True):
        if x is not None or name not in optional:
            _check_plain(name, x)
        if x is not None and x.device != hidden_TD.device:
            raise ValueError(f"{name} is on {x.device}, hidden_TD on {hidden_TD.device}: move one")
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and weight_VD {tuple(weight_VD.shape)}: expected "
            "(T, D) and (V, D); flatten batch and time first (hidden.reshape(-1, D), and "
            "reshape(-1) what is per token), and gather a sharded weight"
        )
    _check_float("hidden_TD", hidden_TD)
    _check_float("weight_VD", weight_VD)
    if weight_VD.dtype != hidden_TD.dtype and _autocast(hidden_TD, weight_VD) is None:
        raise ValueError(
            f"weight_VD is {weight_VD.dtype}, hidden_TD is {hidden_TD.dtype}: cast one of "
            "them to the other's dtype (.to() is differentiable)"
        )
    if weight_VD.shape[0] < 2:
        raise ValueError(f"weight_VD: got V = {weight_VD.shape[0]}, expected at least 2 classes")
    _check_targets("targets_T", targets_T, "hidden_TD", hidden_TD)
    if bias is not None:
        _check_shape("bias", bias, (weight_VD.shape[0],))
        _check_float("bias", bias)
    if temperature_T is not None:
        _check_constant("temperature", temperature_T, targets_T)
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"rows: got {rows.dtype} {tuple(rows.shape)}, expected int64 indices (R,)")


def _check_settings(settings: Settings) -> None:
    tiny, huge = FLOAT32.tiny, FLOAT32.max
    positive = "a positive number or "
    _check_number("temperature", settings.temperature, f"{positive}(T,)", low=tiny, high=huge)
    if settings.softcap is not None:
        _check_number("softcap", settings.softcap, f"{positive}None", low=tiny, high=huge)
    _check_number("logit_scale", settings.logit_scale, "a finite number", low=-huge, high=huge)
    _check_number("ignore_index", settings.ignore_index, "an int", whole=True, low=-(1 << 63))
    if settings.chunk_bytes is not None:
        _check_number(
            "chunk_bytes", settings.chunk_bytes, "a positive int or None", whole=True, low=1
        )
    if not isinstance(settings.backend, str):
        raise ValueError(f"backend: got {_told(settings.backend)}, expected a name such as 'auto'")
    _check_flag("batch_invariant", settings.batch_invariant)
    _check_flag("validate", settings.validate)


FLOAT32 = torch.finfo(torch.float32)
INT64 = (1 << 63) - 1


def _check_number(
    name: str, x: Any, expected: str, *, low: float, high: float = INT64, whole: bool = False
) -> None:
    """The ops take these as Python numbers; a bool would be read as 0 or 1. Beyond `low` and `high`
    float32 has 0 or inf, and the loss NaN."""
    kinds = (int, torch.SymInt) if whole else (int, float, torch.SymInt, torch.SymFloat)
    if not isinstance(x, kinds) or isinstance(x, bool):
        got, remedy = _told(x), "convert it, or leave it out for the default"
        if isinstance(x, Tensor):
            convert = "int" if whole else "float"
            got, remedy = "a Tensor", f"pass {convert}({name}), on CUDA made outside the step"
        raise ValueError(f"{name}: got {got}, expected {expected}; {remedy}")
    # Comparisons, which NaN fails: torch.compile does not trace math.isfinite of a dynamic float.
    if not low <= x <= (min(high, INT64) if isinstance(x, int) else high):
        raise ValueError(f"{name}: got {x}, expected {expected}, from {low} to {high}")


def _check_flag(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise ValueError(f"{name}: got {_told(x)}, expected True or False: pass bool(...) of it")


def _check_matrix(name: str, x: Any, expected: str) -> None:
    _check_plain(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")


def _check_targets(name: str, targets_T: Tensor, rows: str, hidden_TD: Tensor) -> None:
    if targets_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: got {targets_T.dtype}, expected int64 or int32: .long()")
    expected = (hidden_TD.shape[0],)
    if tuple(targets_T.shape) != expected:
        raise ValueError(
            f"{name}: got shape {tuple(targets_T.shape)}, expected {expected}, one for each row "
            f"of {rows}"
        )


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{name}: got {x.dtype}, expected float16, bfloat16, float32 or float64: cast it, "
            f"{name}.to(hidden.dtype)"
        )


def _check_plain(name: str, x: Any, instead: str = "") -> None:
    """A dense tensor of this process, outside torch.func."""
    if not isinstance(x, Tensor):
        remedy = f"torch.as_tensor({name}, device=hidden.device)"
        if isinstance(x, (bool, int, float)):
            remedy = "torch.full((T,), value), one value for each token (or sequence)"
        elif isinstance(x, torch.nn.Module):
            remedy = "the module's weight"
        kind = type(x).__name__
        raise ValueError(f"{name}: got {_told(x)} ({kind}), expected a tensor; pass {remedy}")
    if hasattr(x, "device_mesh"):
        raise ValueError(_dtensor_advice(name, x, instead))
    if x.layout is not torch.strided:
        raise ValueError(
            f"{name}: got a {x.layout} tensor, expected a dense one: pack it first "
            "(.values() of a nested one, .to_dense() of a sparse one)"
        )
    refuse_transforms(x)


def _told(x: Any) -> str:
    """A value that may be long, in a message of one line."""
    text = " ".join(repr(x).split())
    return text if len(text) <= 40 else text[:37] + "..."


def _dtensor_advice(name: str, x: Any, instead: str) -> str:
    """What to pass for a DTensor.

    A plain `full_tensor()` takes the gradient of each rank for the whole one: a rank's tokens train
    its own shard, and nothing of the others. Data is the reverse: each rank gives its own rows.
    """
    start = f"{name} is a DTensor {tuple(x.shape)} placed {tuple(x.placements)}: the loss needs a "
    if instead:
        return f"{start}plain tensor; pass {instead}"
    if name not in ("weight_VD", "bias"):
        return (
            f"{start}plain tensor; pass the rows of this rank, {name}.to_local(), beside those of "
            "every other argument (only where another dimension than the rows is cut "
            f"{name}.full_tensor(), on every rank)"
        )
    partial = ", ".join(["Partial()"] * len(x.placements))
    return (
        f"{start}plain tensor. Under FSDP2 call it inside the forward of the module that owns the "
        "weight, where hooks have unsharded it. Otherwise pass "
        f"{name}.full_tensor(grad_placements=[{partial}]), which adds the ranks' gradients: leave "
        "out the world-size factor. Partial() is for a mesh dimension along which ranks hold other "
        "tokens; where they hold the same tokens it is Replicate()"
    )


def _check_shape(name: str, x: Tensor, expected: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(expected)}")


def _check_constant(name: str, x: Tensor, like: Tensor) -> None:
    _check_plain(name, x)
    _check_shape(name, x, like.shape)
    if x.dtype not in FLOATS or x.device != like.device:
        raise ValueError(
            f"{name}: got {x.dtype} on {x.device}, expected a float tensor on {like.device}: "
            ".to() makes one"
        )
    if x.requires_grad:
        raise ValueError(
            f"{name} requires grad, but is a constant here: detach it, or build the loss from "
            "linear_logprob"
        )


def _check_sink(dweight_out: Tensor | None, weight_VD: Tensor) -> None:
    if dweight_out is None:
        return
    # full_tensor() is a copy: what is added to it would be lost.
    _check_plain("dweight_out", dweight_out, instead="a plain buffer of the whole weight")
    _check_shape("dweight_out", dweight_out, weight_VD.shape)
    expected = accumulator(weight_VD)
    if dweight_out.dtype != expected or dweight_out.device != weight_VD.device:
        raise ValueError(
            f"dweight_out: got {dweight_out.dtype} on {dweight_out.device}, expected {expected} on "
            f"{weight_VD.device}"
        )
    strides = zip(dweight_out.shape, dweight_out.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in strides):
        raise ValueError("dweight_out: its entries share memory (stride 0), pass a dense buffer")
    if dweight_out.requires_grad:
        raise ValueError("dweight_out requires grad: pass a plain buffer, such as weight.grad")


def _sequence_weight(
    advantage_S: Tensor, denominator: float | Tensor | None, weight_S: Tensor | None
) -> Tensor:
    if weight_S is not None and denominator is None:
        _check_constant("weight_S", weight_S, advantage_S)
        return weight_S.to(advantage_S.dtype)
    if denominator is None or weight_S is not None:
        given = "neither" if denominator is None else "both"
        raise ValueError(f"got {given} of denominator and weight_S, expected exactly one")
    if isinstance(denominator, Tensor):
        _check_plain("denominator", denominator)
        _check_shape("denominator", denominator, ())
        if denominator.device != advantage_S.device:
            raise ValueError(
                f"denominator is on {denominator.device}, advantage_S on {advantage_S.device}: "
                "move one"
            )
        if denominator.dtype not in (*FLOATS, torch.int32, torch.int64):
            raise ValueError(f"denominator: got {denominator.dtype}, expected a float or int64")
        if denominator.requires_grad:
            raise ValueError("denominator requires grad, but is a constant here: detach it")
        return torch.ones_like(advantage_S) / denominator
    expected = "a positive number or a 0-dim tensor"
    _check_number("denominator", denominator, expected, low=FLOAT32.tiny, high=FLOAT32.max)
    return torch.ones_like(advantage_S) / denominator


def _check_sequences(cu_seqlens: Tensor, advantage_S: Tensor, targets_T: Tensor) -> None:
    for name, x in (("cu_seqlens", cu_seqlens), ("advantage_S", advantage_S)):
        _check_plain(name, x)
        if x.device != targets_T.device:
            raise ValueError(f"{name} is on {x.device}, targets_T on {targets_T.device}: move one")
    if advantage_S.dim() != 1:
        raise ValueError(f"advantage_S: got shape {tuple(advantage_S.shape)}, expected (S,)")
    _check_constant("advantage_S", advantage_S, advantage_S)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: got {cu_seqlens.dtype}, expected int32 or int64")
    _check_shape("cu_seqlens", cu_seqlens, (advantage_S.shape[0] + 1,))


def _check_prior_index(prior_index: Tensor, cu_seqlens: Tensor) -> None:
    _check_plain("prior_index", prior_index)
    if prior_index.dtype != torch.int64 or prior_index.dim() != 1:
        raise ValueError(
            f"prior_index: got {prior_index.dtype} {tuple(prior_index.shape)}, expected int64 (P,)"
        )
    if prior_index.device != cu_seqlens.device:
        raise ValueError(
            f"prior_index is on {prior_index.device}, cu_seqlens on {cu_seqlens.device}: move one"
        )

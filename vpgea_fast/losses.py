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
  have their tensor's dtype. Under autocast the inputs keep their dtype.
* All sums, no means: the normaliser belongs in the coefficients, computed once per optimiser step
  over all ranks and micro-batches. Frameworks that average gradients over ranks (DDP, FSDP) divide
  the sum by the number of ranks: multiply the coefficients, or 1 / denominator, by the world size
  there.
* Differentiating twice is an error. Coefficients, advantages, sequence weights and temperatures are
  constants.
"""

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch

from vpgea_fast.kernels.chunked import head_pass as chunked_head_pass
from vpgea_fast.kernels.reference import head_pass as reference_head_pass

Tensor = torch.Tensor


def _triton_head_pass(*args, **options):
    """Imported when it is asked for: this module needs torch only."""
    from vpgea_fast.kernels.linear_logprob import head_pass

    return head_pass(*args, **options)


def _cublas_head_pass(*args, **options):
    """Imported when it is asked for, as triton's."""
    from vpgea_fast.kernels.cublas import head_pass

    return head_pass(*args, **options)


BACKENDS = {
    "reference": reference_head_pass,
    "torch": chunked_head_pass,
    "triton": _triton_head_pass,
    "cublas": _cublas_head_pass,
}
HALF = (torch.float16, torch.bfloat16)


class HeadOptions(TypedDict, total=False):
    """Keyword arguments shared by every loss of this module.

    bias: (V,) or None.
    temperature: positive float or (T,) tensor (two streams: (T + U,), posterior first).
    softcap: positive float or None: logits become softcap tanh(logits / softcap).
    logit_scale: float multiplying h . w, before the bias.
    ignore_index: target value of rows that take no part.
    backend: "auto", "reference", "torch" or "triton"; see `resolve_backend`.
    rows: (R,) int64 without repeats or None: the only rows that may take part; the rest count as
        coefficient 0. Spares CUDA the host synchronisation that finds them. Two streams: indices
        into [posterior; prior], prior ones + T.
    chunk_bytes: memory for the logits of one chunk (backend "torch"); None picks by device.
    """

    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    ignore_index: int
    backend: str
    rows: Tensor | None
    chunk_bytes: int | None


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


def resolve_backend(backend: str = "auto") -> str:
    """The backend that runs: "reference" (full logits), "torch" (chunked) or "triton" (CUDA).

    "auto" is "torch". ValueError: an unknown name, or "triton" where it cannot run.
    """
    if backend == "auto":
        return "torch"
    missing = {} if (why := _triton_missing()) is None else {"triton": why, "cublas": why}
    if backend not in BACKENDS or backend in missing:
        why = missing.get(backend, "no such backend")
        names = ", ".join(repr(name) for name in BACKENDS if name not in missing)
        raise ValueError(
            f"backend {backend!r} is not available ({why}); available: 'auto', {names}"
        )
    return backend


def _triton_missing() -> str | None:
    """Why the Triton kernels cannot run here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'vpgea_fast[triton]'"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


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
) -> LogprobOutput:
    """Log-probability of each target under the head, differentiable per token.

        a = logit_scale (h . w) + bias        z = softcap tanh(a / softcap) / temperature
        logp = z_target - lse(z)              entropy = -sum_v p_v log p_v

    hidden_TD (T, D) and weight_VD (V, D) share a floating dtype; targets_T is (T,) int32 or int64;
    the options are those of `HeadOptions`. Gradients flow to hidden, weight and bias from any mix
    of logp, lse and entropy. logp <= 0 always and 1 - p is exact for confident tokens. Nothing but
    the inputs is saved; the backward makes the logits again.

    ValueError: shapes, dtypes, devices, options; a target outside [0, V) that is not ignore_index
    (on CUDA a device-side assertion, without synchronisation); a sharded weight.
    """
    head = _Head(bias, temperature, softcap, logit_scale, ignore_index, backend, rows, chunk_bytes)
    _check_inputs(hidden_TD, weight_VD, targets_T, head)
    call, _ = _select(hidden_TD, weight_VD, targets_T, head, coef_T=None)
    with _no_autocast(hidden_TD):
        logp_T, lse_T, entropy_T = _Recompute.apply(
            hidden_TD, weight_VD, bias, call, bool(return_entropy)
        )
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

    `loss.backward(g)` otherwise scales the stored gradients by g on the device. Under no_grad only
    values are computed. Errors as `linear_logprob`, and coef_T with requires_grad.
    """
    head = _Head(bias, temperature, softcap, logit_scale, ignore_index, backend, rows, chunk_bytes)
    _check_inputs(hidden_TD, weight_VD, targets_T, head)
    _check_constant("coef_T", coef_T, targets_T)
    _check_sink(dweight_out, weight_VD)
    call, kept_T = _select(hidden_TD, weight_VD, targets_T, head, coef_T=coef_T)
    grad = torch.is_grad_enabled()
    needs = (
        grad and hidden_TD.requires_grad,
        grad and (weight_VD.requires_grad or dweight_out is not None),
        grad and bias is not None and bias.requires_grad,
    )
    with _no_autocast(hidden_TD):
        loss, logp_T = _OnePass.apply(hidden_TD, weight_VD, bias, coef_T, call, dweight_out, needs)
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
    for name, hidden, targets, coef in (
        ("post", hidden_post_TD, targets_post_T, coef_post_T),
        ("prior", hidden_prior_UD, targets_prior_U, coef_prior_U),
    ):
        if hidden.dtype != weight_VD.dtype or hidden.shape[1:] != weight_VD.shape[1:]:
            raise ValueError(
                f"hidden_{name}: got {hidden.dtype} {tuple(hidden.shape)}, expected "
                f"{weight_VD.dtype} (rows, {weight_VD.shape[-1]}) as in weight_VD"
            )
        _check_shape(f"targets_{name}", targets, (hidden.shape[0],))
        _check_shape(f"coef_{name}", coef, (hidden.shape[0],))
    tokens = targets_post_T.shape[0]
    both = weighted_logprob_loss(
        torch.cat((hidden_post_TD, hidden_prior_UD)),
        weight_VD,
        torch.cat((targets_post_T, targets_prior_U)),
        torch.cat((coef_post_T, coef_prior_U)),
        dweight_out=dweight_out,
        **options,
    )
    logp_post_T, logp_prior_U = both.logp[:tokens], both.logp[tokens:]
    kept_post_T, kept_prior_U = both.kept[:tokens], both.kept[tokens:]
    return TwoStreamLoss(
        loss=both.loss,
        loss_post=_dot(coef_post_T.masked_fill(~kept_post_T, 0.0), logp_post_T),
        loss_prior=_dot(coef_prior_U.masked_fill(~kept_prior_U, 0.0), logp_prior_U),
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

    ValueError (on CUDA device-side assertions for what needs values): both or none of denominator
    and weight_S, bad cu_seqlens, prior_index out of range, repeated, or missing a gated sequence, U
    not the prior sequences' tokens.
    """
    sequences, tokens = advantage_S.shape[0], targets_T.shape[0]
    _check_sequences(cu_seqlens, advantage_S, targets_T)
    advantage_S = advantage_S.to(torch.promote_types(advantage_S.dtype, torch.float32))
    weight_S = _sequence_weight(advantage_S, denominator, weight_S)
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta: got {beta}, expected a finite number >= 0")
    gate_S = advantage_S > 0
    coef_post_S = -weight_S * advantage_S
    coef_prior_S = -beta * weight_S * gate_S
    lengths_S = cu_seqlens.diff()
    sequence_T = _sequence_of_token(cu_seqlens, tokens)
    if prior_index is None:
        if hidden_prior_UD.shape[0] != tokens:
            raise ValueError(
                f"hidden_prior_UD: got {hidden_prior_UD.shape[0]} rows, expected {tokens} as in "
                "hidden_post_TD; pass prior_index when the prior stream holds only some sequences"
            )
        sequence_U, targets_U = sequence_T, targets_T
    else:
        _check_prior_index(prior_index, coef_prior_S, lengths_S, hidden_prior_UD.shape[0])
        sequence_U, targets_U = _prior_tokens(
            prior_index, cu_seqlens, targets_T, hidden_prior_UD.shape[0]
        )
    streams = two_stream_loss(
        hidden_post_TD,
        hidden_prior_UD,
        weight_VD,
        targets_T,
        targets_U,
        coef_post_S[sequence_T],
        coef_prior_S[sequence_U],
        dweight_out=dweight_out,
        **options,
    )
    logq_S = _segment_sum(streams.logp_post, sequence_T, sequences)
    logp_S = _segment_sum(streams.logp_prior, sequence_U, sequences)
    # beta sum_s w_s 1[A_s > 0] sg log q_s: a value without a gradient.
    constant = -_dot(coef_prior_S, logq_S)
    distill = _dot(weight_S * gate_S, logq_S - logp_S) if beta > 0 else torch.zeros_like(constant)
    return VpgeaLoss(
        loss=streams.loss + constant,
        pg_loss=streams.loss_post,
        distill_loss=distill,
        logq_S=logq_S,
        logp_S=logp_S,
        gate_S=gate_S,
    )


@dataclass(frozen=True)
class _Head:
    """The options of one call, as given."""

    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    ignore_index: int
    backend: str
    rows: Tensor | None
    chunk_bytes: int | None


@dataclass(frozen=True)
class _Call:
    """What a backend is asked to do: the rows that take part and everything that belongs to them.

    kept_T is None unless rows were masked: then some of the K rows must not show in the results.
    """

    rows_K: Tensor
    targets_K: Tensor
    temperature: float | Tensor
    kept_T: Tensor | None
    head: _Head

    def run(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, **gradients):
        """The backend's head_pass on these rows. Masked rows read as zeros: a NaN stays out."""
        if self.kept_T is not None:
            hidden_TD = hidden_TD.masked_fill(~self.kept_T.unsqueeze(1), 0.0)
        return BACKENDS[resolve_backend(self.head.backend)](
            hidden_TD,
            weight_VD,
            self.targets_K,
            rows_K=self.rows_K,
            bias_V=bias_V,
            temperature=self.temperature,
            softcap=self.head.softcap,
            logit_scale=self.head.logit_scale,
            chunk_bytes=self.head.chunk_bytes,
            **gradients,
        )

    def gather(self, values_T: Tensor) -> Tensor:
        """(T,) to (K,), 0 at masked rows."""
        return _gather(values_T, self.rows_K, self.kept_T)

    def scatter(self, values_K: Tensor, tokens: int) -> Tensor:
        """(K,) to (T,), 0 at rows that take no part."""
        values_T = values_K.new_zeros(tokens).index_copy(0, self.rows_K, values_K)
        return values_T if self.kept_T is None else values_T.masked_fill(~self.kept_T, 0.0)


class _OnePass(torch.autograd.Function):
    """Value and gradients of sum_t coef_t logp_t in the forward; the backward only scales."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, coef_T, call: _Call, dweight_out, needs):
        accumulator = _accumulator(hidden_TD)
        coef_K = call.gather(coef_T).to(accumulator)
        needs_hidden, needs_weight, needs_bias = needs
        dhidden_TD = torch.zeros_like(hidden_TD, dtype=_stored(hidden_TD)) if needs_hidden else None
        dweight_VD = dweight_out
        if needs_weight and dweight_out is None:
            dweight_VD = torch.zeros_like(weight_VD, dtype=accumulator)
        dbias_V = torch.zeros_like(bias_V, dtype=accumulator) if needs_bias else None
        logp_K, _, _ = call.run(
            hidden_TD,
            weight_VD,
            bias_V,
            upstream=(coef_K, None, None) if any(needs) else None,
            dhidden_TD=dhidden_TD,
            dweight_VD=dweight_VD if needs_weight else None,
            dbias_V=dbias_V,
        )
        logp_T = call.scatter(logp_K, hidden_TD.shape[0])
        ctx.direct = dweight_out is not None
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(
            dhidden_TD,
            dweight_VD.to(_stored(weight_VD)) if needs_weight and not ctx.direct else None,
            dbias_V,
        )
        ctx.mark_non_differentiable(logp_T)
        return _dot(coef_K, call.gather(logp_T)), logp_T

    @staticmethod
    def backward(ctx, *grads):
        _refuse_double_backward()
        grad_loss = grads[0]
        if ctx.direct:
            _check_on_device(
                grad_loss == 1,
                "dweight_out already holds dW, so the gradient that reaches the loss must be 1: "
                "put every factor (loss scale, 1 / micro-batches) into the coefficients",
            )
        scaled = (
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


class _Recompute(torch.autograd.Function):
    """logp, lse and entropy in the forward; the backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, call: _Call, entropy: bool):
        values = call.run(hidden_TD, weight_VD, bias_V, entropy=entropy)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(None if v is None else call.scatter(v, hidden_TD.shape[0]) for v in values)

    @staticmethod
    def backward(ctx, *grads_T):
        _refuse_double_backward()
        hidden_TD, weight_VD, bias_V = ctx.saved_tensors
        call, accumulator = ctx.call, _accumulator(hidden_TD)
        if all(grad is None for grad in grads_T):
            return None, None, None, None, None
        upstream = [None if g is None else call.gather(g).to(accumulator) for g in grads_T]
        if upstream[0] is None:
            upstream[0] = torch.zeros(call.rows_K.shape, dtype=accumulator, device=hidden_TD.device)
        stored = (_stored(hidden_TD), accumulator, accumulator)
        inputs = (hidden_TD, weight_VD, bias_V)
        sinks = [
            torch.zeros_like(x, dtype=dtype) if need and x is not None else None
            for x, dtype, need in zip(inputs, stored, ctx.needs_input_grad[:3], strict=True)
        ]
        with _no_autocast(hidden_TD):
            call.run(
                hidden_TD,
                weight_VD,
                bias_V,
                upstream=tuple(upstream),
                dhidden_TD=sinks[0],
                dweight_VD=sinks[1],
                dbias_V=sinks[2],
            )
        given = (None if s is None else s.to(x.dtype) for s, x in zip(sinks, inputs, strict=True))
        return *given, None, None


def _gather(values_T: Tensor, rows_K: Tensor, kept_T: Tensor | None) -> Tensor:
    if kept_T is not None:
        values_T = values_T.masked_fill(~kept_T, 0)
    return values_T.index_select(0, rows_K)


def _accumulator(hidden_TD: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_TD.dtype, torch.float32)


def _stored(x: Tensor) -> torch.dtype:
    """A gradient's dtype until backward: fp16 cannot hold it before the loss scale arrives."""
    return torch.float32 if x.dtype is torch.float16 else x.dtype


def _no_autocast(hidden_TD: Tensor) -> torch.autocast:
    return torch.autocast(hidden_TD.device.type, enabled=False)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this loss can be differentiated once only: its gradients are made by hand. Drop "
            "create_graph=True, or use vpgea_fast.kernels.reference"
        )


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """sum left right: added in float64, given in right's dtype."""
    return (left.detach().double() * right.detach().double()).sum().to(right.dtype)


def _segment_sum(values_T: Tensor, sequence_T: Tensor, sequences: int) -> Tensor:
    """(T,) to (S,); in float64, so that the order of CUDA's atomics does not show in float32."""
    sums_S = torch.zeros(sequences, dtype=torch.float64, device=values_T.device)
    return sums_S.index_add_(0, sequence_T, values_T.double()).to(values_T.dtype)


def _select(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, head: _Head, coef_T: Tensor | None
) -> tuple[_Call, Tensor]:
    """The rows that take part, and kept_T.

    One host synchronisation on CUDA unless `rows` is given or a graph is being captured: then the
    rows that take no part stay, masked.
    """
    kept_T = targets_T != head.ignore_index
    if coef_T is not None:
        kept_T = kept_T & (coef_T != 0)
    if head.rows is not None:
        kept_T = kept_T & torch.zeros_like(kept_T).index_fill_(0, head.rows, True)
    in_range_T = (targets_T >= 0) & (targets_T < weight_VD.shape[0])
    _check_on_device(
        (in_range_T | ~kept_T).all(),
        f"targets_T holds values outside [0, V = {weight_VD.shape[0]}) that are not "
        f"ignore_index = {head.ignore_index}",
    )
    masked = head.rows is not None or (
        hidden_TD.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    if head.rows is not None:
        rows_K = head.rows
    elif masked:
        rows_K = torch.arange(targets_T.shape[0], device=targets_T.device)
    else:
        rows_K = kept_T.nonzero().squeeze(1)

    temperature = head.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.index_select(0, rows_K).to(_accumulator(hidden_TD))
    mask_T = kept_T if masked else None
    targets_K = _gather(targets_T.long(), rows_K, mask_T)
    return _Call(rows_K, targets_K, temperature, mask_T, head), kept_T


def _check_on_device(ok: Tensor, message: str) -> None:
    """ValueError on a CPU; elsewhere an assertion in the stream, which costs no synchronisation."""
    if ok.device.type == "cpu":
        if not ok:
            raise ValueError(message)
    else:
        torch.ops.aten._assert_async.msg(ok, message)


def _check_inputs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, head: _Head) -> None:
    resolve_backend(head.backend)
    given = {"hidden_TD": hidden_TD, "weight_VD": weight_VD, "targets_T": targets_T}
    options = {"bias": head.bias, "temperature": head.temperature, "rows": head.rows}
    given |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
    for name, x in given.items():
        if hasattr(x, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor {tuple(x.shape)}: the loss needs a plain tensor. "
                "Under FSDP2 call it inside the forward of the module that owns the weight, where "
                f"hooks have unsharded it; otherwise pass {name}.full_tensor()"
            )
        if x.device != hidden_TD.device:
            raise ValueError(f"{name} is on {x.device}, hidden_TD on {hidden_TD.device}: move one")
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and weight_VD {tuple(weight_VD.shape)}: expected "
            "(T, D) and (V, D); flatten batch and time first, and gather a sharded weight"
        )
    if hidden_TD.dtype not in (*HALF, torch.float32, torch.float64):
        raise ValueError(f"hidden_TD: got {hidden_TD.dtype}, expected float16, bfloat16, 32 or 64")
    if weight_VD.dtype != hidden_TD.dtype:
        raise ValueError(
            f"weight_VD is {weight_VD.dtype}, hidden_TD is {hidden_TD.dtype}: cast one of "
            "them to the other's dtype (.to() is differentiable)"
        )
    if weight_VD.shape[0] < 2:
        raise ValueError(f"weight_VD: got V = {weight_VD.shape[0]}, expected at least 2 classes")
    if targets_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets_T: got {targets_T.dtype}, expected int64 or int32")
    _check_shape("targets_T", targets_T, (hidden_TD.shape[0],))
    _check_options(head, weight_VD, targets_T)


def _check_options(head: _Head, weight_VD: Tensor, targets_T: Tensor) -> None:
    if head.bias is not None:
        _check_shape("bias", head.bias, (weight_VD.shape[0],))
    if isinstance(head.temperature, Tensor):
        _check_constant("temperature", head.temperature, targets_T)
        _check_on_device((head.temperature > 0).all(), "temperature: every value must be positive")
    elif not (math.isfinite(head.temperature) and head.temperature > 0):
        raise ValueError(f"temperature: got {head.temperature}, expected a positive number or (T,)")
    if head.softcap is not None and not (math.isfinite(head.softcap) and head.softcap > 0):
        raise ValueError(f"softcap: got {head.softcap}, expected a positive number or None")
    if not math.isfinite(head.logit_scale):
        raise ValueError(f"logit_scale: got {head.logit_scale}, expected a finite number")
    if head.chunk_bytes is not None and head.chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: got {head.chunk_bytes}, expected a positive number or None")
    if head.rows is not None and (head.rows.dtype != torch.int64 or head.rows.dim() != 1):
        raise ValueError(
            f"rows: got {head.rows.dtype} {tuple(head.rows.shape)}, expected int64 indices (R,)"
        )


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")


def _check_constant(name: str, x: Tensor, targets_T: Tensor) -> None:
    _check_shape(name, x, tuple(targets_T.shape))
    if not x.is_floating_point() or x.device != targets_T.device:
        raise ValueError(
            f"{name}: got {x.dtype} on {x.device}, expected a float tensor on {targets_T.device}"
        )
    if x.requires_grad:
        raise ValueError(
            f"{name} requires grad, but is a constant here: detach it, or build the loss from "
            "linear_logprob"
        )


def _check_sink(dweight_out: Tensor | None, weight_VD: Tensor) -> None:
    if dweight_out is None:
        return
    _check_shape("dweight_out", dweight_out, tuple(weight_VD.shape))
    expected = _accumulator(weight_VD)
    if dweight_out.dtype != expected or dweight_out.device != weight_VD.device:
        raise ValueError(
            f"dweight_out: got {dweight_out.dtype} on {dweight_out.device}, expected {expected} on "
            f"{weight_VD.device}"
        )
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
        _check_shape("denominator", denominator, ())
        _check_on_device(denominator > 0, "denominator: must be positive")
    elif not (math.isfinite(denominator) and denominator > 0):
        raise ValueError(f"denominator: got {denominator}, expected a positive number")
    return torch.ones_like(advantage_S) / denominator


def _check_sequences(cu_seqlens: Tensor, advantage_S: Tensor, targets_T: Tensor) -> None:
    tokens = targets_T.shape[0]
    if advantage_S.dim() != 1:
        raise ValueError(f"advantage_S: got shape {tuple(advantage_S.shape)}, expected (S,)")
    _check_constant("advantage_S", advantage_S, advantage_S)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: got {cu_seqlens.dtype}, expected int32 or int64")
    for name, x in (("cu_seqlens", cu_seqlens), ("advantage_S", advantage_S)):
        if x.device != targets_T.device:
            raise ValueError(f"{name} is on {x.device}, targets_T on {targets_T.device}: move one")
    _check_shape("cu_seqlens", cu_seqlens, (advantage_S.shape[0] + 1,))
    _check_on_device(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all(),
        f"cu_seqlens must start at 0, never fall, and end at the {tokens} tokens of targets_T",
    )


def _check_prior_index(
    prior_index: Tensor, coef_prior_S: Tensor, lengths_S: Tensor, prior_tokens: int
) -> None:
    sequences = lengths_S.shape[0]
    if prior_index.dtype != torch.int64 or prior_index.dim() != 1:
        raise ValueError(
            f"prior_index: got {prior_index.dtype} {tuple(prior_index.shape)}, expected int64 (P,)"
        )
    if prior_index.device != lengths_S.device:
        raise ValueError(
            f"prior_index is on {prior_index.device}, cu_seqlens on {lengths_S.device}: move one"
        )
    _check_on_device(
        ((prior_index >= 0) & (prior_index < sequences)).all(),
        f"prior_index must lie in [0, {sequences})",
    )
    held_S = torch.zeros_like(lengths_S).index_add_(
        0, prior_index, torch.ones_like(prior_index).to(lengths_S.dtype)
    )
    _check_on_device((held_S <= 1).all(), "prior_index names a sequence twice")
    _check_on_device(
        ((held_S == 1) | (coef_prior_S == 0) | (lengths_S == 0)).all(),
        "prior_index leaves out a sequence with a positive advantage: the prior stream must hold "
        "every gated sequence",
    )
    _check_on_device(
        lengths_S[prior_index].sum() == prior_tokens,
        f"hidden_prior_UD has {prior_tokens} rows, which is not the number of tokens of the "
        "sequences in prior_index",
    )


def _sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) int64: which sequence a packed token belongs to."""
    position_T = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position_T, right=True)


def _prior_tokens(
    prior_index: Tensor, cu_seqlens: Tensor, targets_T: Tensor, prior_tokens: int
) -> tuple[Tensor, Tensor]:
    """For each of the U prior tokens its sequence and its target."""
    lengths_P = cu_seqlens.diff()[prior_index]
    cu_P = torch.cat((cu_seqlens.new_zeros(1), lengths_P.cumsum(0).to(cu_seqlens.dtype)))
    slot_U = _sequence_of_token(cu_P, prior_tokens)
    offset_U = torch.arange(prior_tokens, device=cu_seqlens.device) - cu_P[slot_U]
    sequence_U = prior_index[slot_U]
    return sequence_U, targets_T[cu_seqlens[sequence_U] + offset_U]

"""Fused losses of the language-model head: no (T, V) logits, gradients in one pass where possible.

T tokens of a (posterior) stream, U tokens of a prior stream, K rows that take part; D hidden, V
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
* weight_VD may be cut by classes over processes that hold the same tokens: a DTensor placed
  [Shard(0)] on a mesh of one dimension, with bias and dweight_out placed alike. Every process gets
  the loss, the values and dX of the whole head, and dW of its own classes. All make the same calls;
  other rows on one of them are a ValueError. The backend is "torch".
* `linear_logprob` and `weighted_logprob_loss` take (B, T, D) too, with (B, T) for all that is per
  token, and give (B, T) back. shift=True: place t - 1 predicts token t, as in transformers. Targets
  and all else per token stand in their token's column; column 0 takes no part. Indices of `rows`
  are b T + t of a token.
* torch.compile(fullgraph=True), torch.export, fake and meta tensors see one op a call
  (torch.ops.vpgea_fast): no graph breaks, the eager bits, dynamic lengths.
* `loss.backward(g)` scales the stored gradients by g, on the device and, where the graph is freed,
  in place.
* Differentiating twice, forward mode and torch.func transforms, compiled too, are a RuntimeError;
  torch.autograd.grad(is_grads_batched=True) works, a pass for each gradient. Coefficients,
  advantages, denominators, sequence weights and temperatures are constants.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, Unpack

import torch

from vpgea_fast.kernels import backends, checks
from vpgea_fast.kernels.autograd_state import without_values
from vpgea_fast.kernels.backends import BackendChoice
from vpgea_fast.kernels.batches import batch_of
from vpgea_fast.kernels.contract import FLOAT32, Bounds, Settings, Smoothing, needs_of
from vpgea_fast.kernels.head import Expected, OnePass, Recompute, dot
from vpgea_fast.kernels.selection import accumulator
from vpgea_fast.kernels.sinks import checked_sink
from vpgea_fast.kernels.streams import PathTerms, Streams, layout_of, path_sums

Tensor = torch.Tensor
_Function = TypeVar("_Function", bound=Callable[..., Any])


class HeadOptions(TypedDict, total=False):
    """Keyword arguments shared by every loss of this module, with their defaults.

    bias (None): (V,).
    temperature (1.0): positive float or (T,) tensor (two streams: (T + U,), posterior first).
    softcap (None): positive float: logits become softcap tanh(logits / softcap).
    logit_scale (1.0): float multiplying h . w, before the bias.
    ignore_index (-100): target value of rows that take no part.
    backend ("auto"): or "reference", "torch", "cublas", "triton"; see `choose_backend`.
    rows (None): (R,) int64 without repeats: the only rows that may take part; the rest count as
        coefficient 0. Spares CUDA the host synchronisation that finds them. Two streams: indices
        into [posterior; prior], prior ones + T.
    chunk_bytes (None): memory for the logits of one chunk (all backends but "reference"). On a CPU
        those of few rows lie in a new dW, whatever it says, and with None float32 ones of many
        rows. Else 48 MiB or 256 rows, whichever is more (a dW of at most 16 MiB: 3 MiB or 96 rows);
        on CUDA up to 4 GiB and at most 1/8 of what is free at the first call of this head on this
        device, the only time the driver is asked. On CUDA 512 MiB for a head that is cut over
        processes.
    batch_invariant (False): a row's logp, lse and entropy depend, bit for bit, neither on its
        neighbours nor on its place in a chunk. Always so in "triton", which needs CUDA; a
        ValueError in the others.
    validate (False): on CUDA, wrong values (targets, rows, temperatures, boundaries) are a
        ValueError here and now, at the price of a synchronisation for each check, and not an
        assertion on the device, after which the process cannot go on. On a CPU they always are a
        ValueError.
    skip_below (0.0): leave rows out of the gradients of which it is known that the gradient by
        their logits has a norm below this: sqrt(2) |coef| (1 - p) / temperature. `skipped` of the
        result has these bounds. Costs CUDA one synchronisation per chunk. A ValueError in
        `linear_logprob`, compiled or captured calls, cut heads, smoothed losses.
    """

    bias: Tensor | None  # (V,)
    temperature: float | Tensor  # (T,) where it is a tensor, of every row, ignored ones too
    softcap: float | None
    logit_scale: float
    ignore_index: int
    backend: str
    rows: Tensor | None  # (R,) int64
    chunk_bytes: int | None
    batch_invariant: bool
    validate: bool
    skip_below: float


def _spelled_out(function: _Function) -> _Function:
    """Lists the options of `HeadOptions` in the signature: help() and notebooks show that."""
    given = inspect.signature(function)
    own = [p for p in given.parameters.values() if p.kind is not p.VAR_KEYWORD]
    # bias and rows are tensors, which Settings does not hold.
    defaults = {"bias": None, "rows": None, **Settings._field_defaults}
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=t
        )
        for name, t in HeadOptions.__annotations__.items()
    ]
    # The function stays as it is: a wrapper would be one more frame for torch.compile.
    signature = given.replace(parameters=[*own, *options])
    function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return function


@dataclass(frozen=True)
class RowStatistics:
    """What metrics ask of each row, (T,), without gradients; False and 0 where ignored.

    `top1`: the target is the first of the largest logits. `mean_logit` = mean_v z_v. `log_sum_p2` =
    log sum_v p_v^2. Two classes, logits [0, log 3], target 1: top1 = [True], mean_logit = [0.5493],
    log_sum_p2 = [-0.4700].
    """

    top1: Tensor  # (T,) bool
    mean_logit: Tensor  # (T,) float32, float64 for float64 inputs, as the next
    log_sum_p2: Tensor  # (T,)


@dataclass(frozen=True)
class LogprobOutput:
    """`logp`, `lse`, `entropy` (None unless asked for), each (T,), differentiable; 0 where ignored.

    One token, two classes, logits [0, 0]: logp = [-0.6931], lse = [0.6931], entropy = [0.6931].
    """

    logp: Tensor  # (T,) float32, float64 for float64 inputs, as all that follows
    lse: Tensor  # (T,)
    entropy: Tensor | None  # (T,)
    statistics: RowStatistics | None = None  # None unless asked for


@dataclass(frozen=True)
class WeightedLoss:
    """`loss` = sum_t coef_t logp_t (0-dim, differentiable); `logp` (T,) detached; `kept` (T,) bool.

    coef = [-1, 0] and p = [1/2, anything]: loss = 0.6931, logp = [-0.6931, 0], kept =
    [True, False].
    """

    loss: Tensor  # 0-dim
    logp: Tensor  # (T,)
    kept: Tensor  # (T,) bool
    skipped: Tensor | None = None  # (T,), 0 where a row was not left out; None without skip_below


@dataclass(frozen=True)
class TwoStreamLoss:
    """`loss` (0-dim, differentiable) = `loss_post` + `loss_prior` (detached, as the logp are).

    coef_post = [-1], coef_prior = [-0.5], both p = 1/2: loss_post = 0.6931, loss_prior = 0.3466,
    loss = 1.0397.
    """

    loss: Tensor  # 0-dim, as the next two
    loss_post: Tensor
    loss_prior: Tensor
    logp_post: Tensor  # (T,)
    logp_prior: Tensor  # (U,)
    kept_post: Tensor  # (T,) bool
    kept_prior: Tensor  # (U,) bool
    skipped_post: Tensor | None = None  # (T,), as of `WeightedLoss`
    skipped_prior: Tensor | None = None  # (U,)


@dataclass(frozen=True)
class VpgeaLoss:
    """`loss` = `pg_loss` + beta `distill_loss`; only `loss` (0-dim) is differentiable.

    logq_S: log q_s, sum over the sequence's tokens; 0 where A_s = 0 or w_s = 0: not computed there.
    logp_S: log pi_s; 0 where the gate is closed, and everywhere when beta = 0: not computed there.
    gate_S: bool, A_s > 0.

    Two one-token sequences, A = [1, -1], w = [1, 1], beta = 0.5, q = [1/2, 1/2], pi = [1/4, -]:
    pg_loss = 0, distill_loss = log(1/2) - log(1/4) = 0.6931, loss = 0.3466.
    """

    loss: Tensor  # 0-dim, as the next two
    pg_loss: Tensor
    distill_loss: Tensor
    logq_S: Tensor  # (S,)
    logp_S: Tensor  # (S,)
    gate_S: Tensor  # (S,) bool
    skipped_post: Tensor | None = None  # (T,), as of `WeightedLoss`
    skipped_prior: Tensor | None = None  # (U,)


def choose_backend(
    backend: str = "auto",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    entropy_gradient: bool = False,
    sharded: bool = False,
    statistics: bool = False,
    smoothing: bool = False,
) -> BackendChoice:
    """What runs for tensors of this dtype on this device (None: CUDA where there is one), and why.

    "reference" (full logits), "torch" (chunked), "cublas" and "triton" (CUDA). "auto" chooses by
    device, dtype and what the call wants: "triton" for half precision on sm_80 or newer, for values
    and gradients of logp and lse, and "torch" for the rest; each pass is decided alone, so only a
    backward with a gradient of the entropy runs on "torch". So do passes with row statistics, label
    smoothing or z-loss.
    Shape and free memory decide the size of a chunk, not the backend.

    sharded: the head's classes are cut over processes. Each distinct decision of "auto" is logged
    once, at INFO, on the logger "vpgea_fast.losses".

    ValueError: an unknown name, a backend that is not available, or one that cannot do this.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # The function that a call asks: what is told here and what runs cannot differ.
    return backends.resolve(
        backend,
        torch.device(device),
        dtype,
        entropy_gradient=entropy_gradient,
        batch_invariant=batch_invariant,
        sharded=sharded,
        statistics=statistics,
        smoothing=smoothing,
    )


def resolve_backend(backend: str = "auto", **situation: Any) -> str:
    """The name of what `choose_backend` chooses; the same keywords and errors."""
    return choose_backend(backend, **situation).name


@_spelled_out
def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    return_entropy: bool = False,
    return_statistics: bool = False,
    expected_T: Tensor | None = None,
    shift: bool = False,
    **options: Unpack[HeadOptions],
) -> LogprobOutput:
    """Log-probability of each target under the head, differentiable per token.

        a = logit_scale (h . w) + bias        z = softcap tanh(a / softcap) / temperature
        logp = z_target - lse(z)              entropy = -sum_v p_v log p_v

    hidden_TD (T, D) and weight_VD (V, D) share a floating dtype, or are cast by autocast; targets_T
    is (T,) int32 or int64; the options are those of `HeadOptions`; (B, T, D) and shift as in the
    module's rules. Gradients flow to hidden, weight
    and bias from any mix of logp, lse and entropy. logp <= 0 always and 1 - p is exact for
    confident tokens. Nothing but the inputs is saved; the backward makes the logits again.

    return_statistics: `RowStatistics` too, three more reads of a chunk's logits; not in the
    backends "triton" and "cublas".
    expected_T: (T,), what the gradient of logp is expected to be, up to one factor for all rows.
    The gradients are then made with the values: three GEMMs where the expectation holds within
    2e-6. Where it does not, or lse or the entropy has a gradient too, they are made again: six
    GEMMs, the same numbers. dX and dW are kept until the backward. Compiled calls ignore it.

    ValueError: shapes, dtypes, devices, options; a target outside [0, V) that is not ignore_index
    (on CUDA a device-side assertion, without synchronisation, unless `validate`); a weight that is
    sharded otherwise than by classes.
    """
    batch, ignored = batch_of(hidden_TD, shift), options.get("ignore_index", -100)
    hidden_TD, targets_T = batch.hidden(hidden_TD), batch.targets(targets_T, ignored)
    expected_T, options = batch.rows("expected_T", expected_T, 0.0), batch.options(options)
    inputs, settings = checks.checked_call(hidden_TD, weight_VD, targets_T, **options)
    if settings.skip_below:
        raise ValueError(
            f"skip_below: got {settings.skip_below}, but linear_logprob does not know the "
            "coefficients that bound a gradient; use weighted_logprob_loss, or leave it out"
        )
    # A tensor here would be read as True or False, on CUDA by waiting for the device.
    checks.check_flag("return_entropy", return_entropy)
    checks.check_flag("return_statistics", return_statistics)
    asked = (return_entropy, return_statistics)
    needs = needs_of(inputs) if expected_T is not None else None
    if expected_T is not None and needs is not None:
        checks.check_constant("expected_T", expected_T, targets_T)
    # Each process of a cut head would decide alone whether to make them again.
    expects = settings.shards is None and not without_values(hidden_TD)
    if needs is not None and any(needs) and expects:
        made = Expected.apply(*inputs, expected_T, *asked, needs, settings)
    else:
        made = Recompute.apply(*inputs, *asked, settings)
    logp_T, lse_T, entropy_T, *more = map(batch.back, made)
    statistics = RowStatistics(*more) if return_statistics else None
    return LogprobOutput(logp_T, lse_T, entropy_T, statistics)


@_spelled_out
def weighted_logprob_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    coef_T: Tensor,
    *,
    dweight_out: Tensor | None = None,
    # Not 0.0: torch.compile(dynamic=True) makes a symbol of a float, and traces once more for it.
    label_smoothing: float = 0,
    z_loss: float = 0,
    shift: bool = False,
    **options: Unpack[HeadOptions],
) -> WeightedLoss:
    """sum_t coef_t logp_t with its gradients made in the same pass; only dX and dW are kept.

        d loss / d z_tv = coef_t (1[v = target_t] - p_tv)        (z as in `linear_logprob`)

    coef_T (T,) is a constant of any sign: minimising with coef < 0 makes the token more likely. An
    expected-reward gradient uses -advantage / denominator, supervised fine-tuning -1 / tokens. Sums
    only: see the module's note on frameworks that average gradients over ranks.

    dweight_out (V, D) float32 (float64 for float64 inputs) receives dW by accumulation in this
    call, whenever grad mode is on: a buffer of its own, or weight.grad itself. weight.grad is then
    otherwise left alone. Micro-batches so accumulate in float32 under a half-precision weight. Its
    dW is final before `backward`, so backward's incoming gradient must be 1 (asserted on the
    device): scale the coefficients instead. Not for use inside activation checkpointing, which runs
    the forward twice.

    label_smoothing s and z_loss z: coef_t times (1 - s) logp_t + s mean_v log p_tv - z lse_t^2, in
    the same pass; `logp` stays the target's own. With coef_t = -1 / tokens that is the label
    smoothing of torch and transformers, and PaLM's z-loss. Not in the backends "triton" and
    "cublas", nor in float16.

    Under no_grad only values are computed. Options as in `HeadOptions`; errors as `linear_logprob`,
    and coef_T with requires_grad.
    """
    batch, ignored = batch_of(hidden_TD, shift), options.get("ignore_index", -100)
    hidden_TD, targets_T = batch.hidden(hidden_TD), batch.targets(targets_T, ignored)
    coef_T, options = batch.rows("coef_T", coef_T, 0.0), batch.options(options)
    inputs, settings = checks.checked_call(hidden_TD, weight_VD, targets_T, **options)
    # The gradients are made before anybody could ask for one of coef.
    checks.check_constant("coef_T", coef_T, targets_T)
    sink_VD = checked_sink(dweight_out, weight_VD, inputs, coef_T=coef_T)
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        if type(value) is not int or value != 0:  # the default: bounds are floats too
            checks.check_number(name, value, _SMOOTHING[name])
    smoothing = Smoothing(label_smoothing, z_loss)
    if settings.skip_below:
        _check_skipping(hidden_TD, smoothing)
    needs = needs_of(inputs, sink_VD)
    loss, *rows_T = OnePass.apply(*inputs, coef_T, sink_VD, needs, smoothing, settings)
    return WeightedLoss(loss, *map(batch.back, rows_T))


def _check_skipping(hidden_TD: Tensor, smoothing: Smoothing) -> None:
    """ValueError where no bound is known, or no number of rows that are left."""
    why = None
    if smoothing.on:
        why = "label_smoothing and z_loss have gradients at rows whose p is 1"
    elif without_values(hidden_TD):
        why = "a compiled call has no values by which to choose rows"
    elif hidden_TD.is_cuda and torch.cuda.is_current_stream_capturing():
        why = "the number of rows is not known while a graph is captured"
    if why is not None:
        raise ValueError(f"skip_below: {why}; leave it out")


_SMOOTHING = {
    "label_smoothing": Bounds("a number from 0 to 1", 0, 1),
    "z_loss": Bounds("a finite number >= 0", 0, FLOAT32.max),
}


@_spelled_out
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
    # The rows of both streams in one pass: its chunks do not know where one ends.
    both = _weighted_streams(
        (hidden_post_TD, hidden_prior_UD),
        weight_VD,
        (targets_post_T, targets_prior_U),
        (coef_post_T, coef_prior_U),
        dweight_out=dweight_out,
        **options,
    )
    tokens = targets_post_T.shape[0]  # the posterior's rows are first
    logp_post_T, logp_prior_U = both.logp[:tokens], both.logp[tokens:]
    kept_post_T, kept_prior_U = both.kept[:tokens], both.kept[tokens:]
    # Masked, as the pass masks them: a coefficient of an ignored target counts nowhere.
    return TwoStreamLoss(
        loss=both.loss,
        loss_post=dot(coef_post_T.masked_fill(~kept_post_T, 0.0), logp_post_T),
        loss_prior=dot(coef_prior_U.masked_fill(~kept_prior_U, 0.0), logp_prior_U),
        logp_post=logp_post_T,
        logp_prior=logp_prior_U,
        kept_post=kept_post_T,
        kept_prior=kept_prior_U,
        **_skipped(both, tokens),
    )


@_spelled_out
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

    hidden_post_TD (T, D), hidden_prior_UD (U, D): contexts of the sampled tokens in the teacher
        (posterior) and in the student (prior) view, sequences back to back.
    targets_T: (T,), the sampled tokens, the same in both views.
    cu_seqlens: (S + 1,) int32 or int64, 0 = first <= ... <= last = T.
    advantage_S: (S,). A_s = 0 drops a sequence: no row of it is computed. The gate is A_s > 0.
    denominator: w_s = 1 / denominator, counted over all ranks and micro-batches (B*G, B*G*C or
        tokens). Where gradients are averaged over ranks, divide it by the world size.
    weight_S: (S,), w_s itself. Exactly one of denominator and weight_S.
    prior_index: (P,) int64 without repeats: the sequences that hidden_prior_UD holds, in its order.
        None: all of them, U = T. It may leave out sequences with A_s <= 0, no others.
    beta: weight of the distillation term, >= 0. At 0 the prior stream is not computed.
    Options as in `HeadOptions`; `dweight_out` as in `weighted_logprob_loss`.

    ValueError (on CUDA device-side assertions for values, unless `validate`): bad cu_seqlens; a
    prior_index out of range, repeated, without a gated sequence, or that does not fit U.
    """
    checks.check_flag("validate", options.get("validate", False))
    checks.check_number("beta", beta, _BETA)
    checks.check_packed(
        hidden_post_TD,
        hidden_prior_UD,
        targets_T=targets_T,
        cu_seqlens=cu_seqlens,
        advantage_S=advantage_S,
        prior_index=prior_index,
    )
    tokens = targets_T.shape[0]
    # bfloat16 advantages have three digits: in the loss they are numbers of its accumulator.
    wide = torch.promote_types(advantage_S.dtype, accumulator(hidden_post_TD))
    advantage_S = advantage_S.to(wide)
    weight_S = checks.sequence_weight(advantage_S, denominator, weight_S)
    gate_S = advantage_S > 0
    # d loss / d log q_s and d loss / d log pi_s; sg log q_s has no gradient.
    coef_post_S = -weight_S * advantage_S
    coef_prior_S = -beta * weight_S * gate_S
    layout = layout_of(
        Streams(
            cu_seqlens=cu_seqlens,
            targets_T=targets_T,
            coef_prior_S=coef_prior_S,
            prior_index=prior_index,
            denominator=denominator if isinstance(denominator, Tensor) else None,
            prior_tokens=hidden_prior_UD.shape[0],
            validate=options.get("validate", False),
        )
    )
    both = _weighted_streams(
        (hidden_post_TD, hidden_prior_UD),
        weight_VD,
        (targets_T, layout.targets_U),
        (coef_post_S[layout.sequence_T], coef_prior_S[layout.sequence_U]),
        dweight_out=dweight_out,
        **options,
    )
    sums = path_sums(
        PathTerms(
            logq_T=both.logp[:tokens],
            logp_U=both.logp[tokens:],
            sequence_T=layout.sequence_T,
            sequence_U=layout.sequence_U,
            cu_seqlens=cu_seqlens,
            advantage_S=advantage_S,
            weight_S=weight_S,
            gate_S=coef_prior_S != 0,  # where log pi was computed: nowhere with beta = 0
            prior_index=prior_index,
        )
    )
    # both.loss lacks beta w 1[A > 0] sg log q in its value: it gives the gradient alone.
    loss = sums.pg_loss + beta * sums.distill_loss + (both.loss - both.loss.detach())
    return VpgeaLoss(loss=loss, gate_S=gate_S, **_skipped(both, tokens), **sums._asdict())


def _skipped(both: WeightedLoss, tokens: int) -> dict[str, Tensor | None]:
    """What was left out of the posterior stream, its first `tokens` rows, and of the prior one."""
    whole = both.skipped
    parts = (None, None) if whole is None else (whole[:tokens], whole[tokens:])
    return dict(zip(("skipped_post", "skipped_prior"), parts, strict=True))


_BETA = Bounds("a finite number >= 0", 0, FLOAT32.max)


def _weighted_streams(
    hidden: tuple[Tensor, Tensor],
    weight_VD: Tensor,
    targets: tuple[Tensor, Tensor],
    coef: tuple[Tensor, Tensor],
    *,
    dweight_out: Tensor | None,
    **options: Unpack[HeadOptions],
) -> WeightedLoss:
    """`weighted_logprob_loss` of [posterior; prior]: one pass reads the weight once for both."""
    # The loss below has more, of which the streams' own values would know nothing.
    checks.check_options(options)
    checks.check_streams(hidden, weight_VD, targets, coef)
    with checks.without_autocast(weight_VD):  # a CPU's takes no float16 and no float64 in cat
        hidden_RD, targets_R, coef_R = (torch.cat(pair) for pair in (hidden, targets, coef))
    return weighted_logprob_loss(
        hidden_RD, weight_VD, targets_R, coef_R, dweight_out=dweight_out, **options
    )

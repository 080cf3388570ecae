"""What benchmarks/kernel_bench.py measures: problems, their float64 truth, and who solves them.

N rows a stream, R rows in all (2 N for two streams), D hidden, V vocabulary; S paths, 8 a stream
for the head. A provider is a function from a problem to (loss or None, value to check or None): a
per-token value (R,), a scalar loss, or nothing where the value is not comparable.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from vpgea_fast import losses

Tensor = torch.Tensor

PER_TOKEN = ("linear_logprob", "weighted", "two_stream")
GROUP = ("group_advantage", "gated_kl")
SEQUENCES = 8
"""Paths a stream: a coefficient is constant over one, as Liger's GRPO loss needs it."""
PATH_TOKENS = 128


# --- inputs and truth -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One head problem. hiddens: leaves (N, D), posterior (and prior); targets, coef: (R,)."""

    op: str
    hiddens: tuple[Tensor, ...]
    weight: Tensor
    targets: Tensor
    coef: Tensor
    chunk_bytes: int | None

    @property
    def hidden(self) -> Tensor:
        return self.hiddens[0] if len(self.hiddens) == 1 else torch.cat(self.hiddens)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (*self.hiddens, self.weight)

    @functools.cached_property
    def dweight_out(self) -> Tensor:
        """A float32 dW that outlives the call, as a trainer keeps it over micro-batches."""
        return torch.zeros_like(self.weight, dtype=torch.float32)

    @property
    def kept(self) -> Tensor:
        return self.coef != 0

    def uniform(self) -> Case:
        return replace(self, coef=torch.full_like(self.coef, -1 / self.coef.shape[0]))


@dataclass(frozen=True)
class GroupCase:
    """8 + 8 paths a question. values: log-probs of their answers (8 tokens each) or rows."""

    op: str
    values: Tensor
    cu_values: Tensor
    lengths: Tensor
    advantage_S: Tensor
    weight_S: Tensor
    cu_paths: Tensor
    leaves: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Truth:
    """Float64 results; the gradients are None where nothing is differentiated."""

    value: Tensor
    loss: Tensor | None = None
    gradients: tuple[Tensor, Tensor] | None = None


def head_case(op: str, shape: Sequence[int], gate: float | None, args: Any) -> Case:
    """Random rows, from hopeless to certain: each hidden state leans by 0-20 nats to its target."""
    rows, hidden, vocabulary = shape
    make = torch.Generator(args.device).manual_seed(0)
    kwargs: Any = {"generator": make, "device": args.device}
    streams = 2 if op == "two_stream" else 1
    weight = torch.randn(vocabulary, hidden, **kwargs) * (2 / hidden**0.5)
    targets = torch.randint(vocabulary, (rows,), **kwargs).repeat(streams)
    lean = 5 * torch.rand(streams * rows, 1, **kwargs)
    states = torch.randn(streams * rows, hidden, **kwargs).addcmul_(lean, weight[targets])
    advantage_S = torch.randn(SEQUENCES, **kwargs)
    coef_S = -advantage_S
    if gate is not None:
        open_S = torch.arange(SEQUENCES, device=args.device) < gate * SEQUENCES
        coef_S = torch.cat((coef_S, -0.5 * open_S))
    return Case(
        op,
        tuple(x.to(args.dtype).clone().requires_grad_() for x in states.split(rows)),
        weight.to(args.dtype).requires_grad_(),
        targets,
        (coef_S / targets.shape[0]).repeat_interleave(rows // SEQUENCES),
        None if args.chunk_mib is None else args.chunk_mib << 20,
    )


def group_case(op: str, shape: Sequence[int], args: Any) -> GroupCase:
    """Two rows of paths: posterior and prior, in groups of 8; both streams hold the same paths."""
    paths = max(SEQUENCES, shape[0] // PATH_TOKENS)
    paths -= paths % SEQUENCES
    tokens = PATH_TOKENS if op == "gated_kl" else 8
    kwargs: Any = {"generator": torch.Generator(args.device).manual_seed(0), "device": args.device}
    return GroupCase(
        op,
        -2 * torch.rand(2 * paths * tokens, **kwargs),
        torch.arange(2 * paths + 1, device=args.device) * tokens,
        torch.randint(1, 2048, (2, paths // SEQUENCES, SEQUENCES), **kwargs),
        torch.randn(paths, **kwargs),
        torch.full((paths,), 1 / paths, device=args.device),
        torch.arange(paths + 1, device=args.device) * PATH_TOKENS,
    )


def head_truth(case: Case) -> Truth:
    """The formula in float64: dz = coef (onehot - p), a few rows at a time."""
    weight_VD, hidden_RD = case.weight.detach().double(), case.hidden.detach().double()
    coef_R = case.coef.double()
    step = max(1, (256 << 20) // (8 * weight_VD.shape[0]))
    logp, dhidden, dweight_VD = [], [], torch.zeros_like(weight_VD)
    for part in torch.arange(hidden_RD.shape[0], device=hidden_RD.device).split(step):
        logp_CV = (hidden_RD[part] @ weight_VD.T).log_softmax(1)
        logp.append(logp_CV.gather(1, case.targets[part, None])[:, 0])
        dz_CV = -coef_R[part, None] * logp_CV.exp_()
        dz_CV.scatter_add_(1, case.targets[part, None], coef_R[part, None])
        dhidden.append(dz_CV @ weight_VD)
        dweight_VD.addmm_(dz_CV.T, hidden_RD[part])
    logp_R = torch.cat(logp)
    return Truth(logp_R, coef_R @ logp_R, (torch.cat(dhidden), dweight_VD))


def group_truth(case: GroupCase) -> Truth:
    """The formulas of `eager_group`, in float64 on paths of one length, so without segment sums."""
    u_2BG = case.values.double().view(*case.lengths.shape, -1).sum(-1)
    if case.op == "gated_kl":
        kl_S = (u_2BG[0] - u_2BG[1]).flatten()
        return Truth(torch.where(case.advantage_S > 0, kl_S, 0.0))
    length_2BG = case.lengths.double()
    reward_BG = (u_2BG[0] - u_2BG[1].mean(1, keepdim=True)).relu()
    utility_BG = reward_BG * (length_2BG[1].mean(1, keepdim=True) / length_2BG[0]).sqrt()
    std_B1 = utility_BG.std(1, keepdim=True, correction=0)
    advantage_S1 = ((utility_BG - utility_BG.mean(1, keepdim=True)) / (std_B1 + 1e-6)).view(-1, 1)
    coef_S2 = case.weight_S[:, None] * torch.cat((-advantage_S1, -0.5 * (advantage_S1 > 0)), 1)
    coef_2T = coef_S2.T.repeat_interleave(PATH_TOKENS, 1)
    return Truth(torch.cat((advantage_S1.flatten(), coef_2T.flatten())))


# --- providers: case -> (loss or None, value to check or None) ----------------------------------


def ours(backend: str, *, accumulates: bool = False) -> Callable[[Case], tuple[Tensor, Tensor]]:
    def call(case: Case) -> tuple[Tensor, Tensor]:
        options: Any = {"backend": backend, "chunk_bytes": case.chunk_bytes}
        if accumulates:
            options["dweight_out"] = case.dweight_out
        if case.op == "linear_logprob":
            logp = losses.linear_logprob(case.hidden, case.weight, case.targets, **options).logp
            return case.coef @ logp, logp
        if case.op == "two_stream":
            targets, coef = case.targets.chunk(2), case.coef.chunk(2)
            post, prior = case.hiddens
            out = losses.two_stream_loss(post, prior, case.weight, *targets, *coef, **options)
            return out.loss, torch.cat((out.logp_post, out.logp_prior))
        out = losses.weighted_logprob_loss(
            case.hidden, case.weight, case.targets, case.coef, **options
        )
        return out.loss, out.logp

    return call


def bf16_logits(case: Case) -> tuple[Tensor, Tensor]:
    """The cuBLAS head with logits rounded to bf16: log-probs off by up to 0.1, no public backend.

    Only where all GEMMs are in the forward: the switch is undone before a backward runs.
    """
    from vpgea_fast.kernels import cublas

    exact = cublas.head_pass
    cublas.head_pass = functools.partial(exact, logits_dtype=torch.bfloat16)
    try:
        return ours("cublas")(case)
    finally:
        cublas.head_pass = exact


def _eager_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


@functools.cache
def _compiled_logp(dynamic: bool) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64  # one for every N, with and without gradients
    return torch.compile(_eager_logp, dynamic=dynamic)


def per_token(logp: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Case], Any]:
    """A provider from a differentiable (hidden, weight, targets) -> logp."""

    def call(case: Case) -> tuple[Tensor, Tensor]:
        value = logp(case.hidden, case.weight, case.targets)
        return case.coef @ value.float(), value

    return call


def mean_nll(nll: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Case], Any]:
    """A provider from a mean over rows: its only coefficient is -1 / N."""

    def call(case: Case) -> tuple[Tensor, Tensor]:
        loss = nll(case.hidden, case.weight, case.targets)
        return loss, loss.detach()

    return call


def compiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # On a CPU one compilation for all N: each costs about ten seconds.
    return _compiled_logp(not hidden.is_cuda)(hidden, weight, targets)


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def torch_chunked_mean(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="mean", options=options)


def liger_flce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, accum_dtype=torch.float32)


def liger_flsce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return -Function.apply(hidden, weight, targets)


def liger_grpo(case: Case) -> tuple[Tensor, None]:
    """On-policy GRPO without KL: the same gradient; its value is -mean A, so none to check."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=case.weight.is_cuda, use_ref_model=False, loss_type="bnpo"
    )
    targets = case.targets.view(SEQUENCES * len(case.hiddens), -1)
    advantage_S = -case.coef.view_as(targets)[:, 0] * case.targets.shape[0]
    hidden = case.hidden.view(*targets.shape, -1)
    return loss(hidden, case.weight, targets, torch.ones_like(targets), advantage_S)[0], None


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)


def quack(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, targets)


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's fused head, `trl.trainer.utils._ChunkedLogProbFunction` of all its trainers."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise ImportError("no trl.kernels.ChunkedLogProbFunction; TRL 1.16.0 has it") from error

    # 32768 columns per tile are what TRL's trainers pass.
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]


def eager_group(case: GroupCase) -> tuple[None, Tensor]:
    """U, reward, length factor, z-score, gate and both streams' coefficients; or the gated KL."""
    paths_2S = torch.arange(case.cu_values.shape[0] - 1, device=case.values.device)
    owner = paths_2S.repeat_interleave(case.cu_values.diff(), output_size=case.values.shape[0])
    u_2S = torch.zeros(len(paths_2S), dtype=torch.float64, device=case.values.device)
    u_2S.index_add_(0, owner, case.values.double())
    if case.op == "gated_kl":
        logq_S, logp_S = u_2S.chunk(2)
        return None, (case.advantage_S > 0) * (logq_S - logp_S)
    u_post_BG, u_prior_BG = u_2S.view(case.lengths.shape)
    len_post_BG, len_prior_BG = case.lengths.double()
    reward_BG = (u_post_BG - u_prior_BG.mean(1, keepdim=True)).clamp(min=0)
    utility_BG = reward_BG * (len_prior_BG.mean(1, keepdim=True) / len_post_BG).pow(0.5)
    centred_BG = utility_BG - utility_BG.mean(1, keepdim=True)
    std_B1 = centred_BG.square().mean(1, keepdim=True).sqrt()
    advantage_S = (centred_BG / (std_B1 + 1e-6)).flatten()
    tokens = paths_2S.shape[0] // 2 * PATH_TOKENS
    coefs = (-case.weight_S * advantage_S, -0.5 * case.weight_S * (advantage_S > 0))
    coefs = [c.repeat_interleave(case.cu_paths.diff(), output_size=tokens) for c in coefs]
    return None, torch.cat((advantage_S, *coefs))


def group_kernel(case: GroupCase) -> tuple[None, Tensor]:
    from vpgea_fast.kernels import group_advantage as kernels

    if case.op == "gated_kl":
        logq_T, logp_T = case.values.chunk(2)
        out = kernels.gated_kl(logq_T, logp_T, case.cu_paths, case.advantage_S, case.weight_S)
        return None, out.kl_S
    out = kernels.group_advantage(
        case.values,
        *case.lengths,
        cu_answers=case.cu_values,
        weight_BG=case.weight_S.view(case.lengths.shape[1:]),
        cu_paths=case.cu_paths,
        tokens=case.weight_S.shape[0] * PATH_TOKENS,
    )
    return None, torch.cat((out.advantage_BG.flatten(), out.coef_post_T, out.coef_prior_T))


@dataclass(frozen=True)
class Provider:
    """A column of the comparison.

    ops: what it computes. needs: what must be importable. dense: holds (R, V) logits. mean_only:
    one coefficient for all rows. one_pass: the ops whose gradients are made in the forward. ours:
    held to absolute budgets; backend: its name in vpgea_fast.losses. dtypes: what it takes.
    accumulates: adds dW to the case's dweight_out, which is not among what it allocates.
    """

    name: str
    call: Callable[[Any], tuple[Tensor | None, Tensor | None]]
    ops: tuple[str, ...] = PER_TOKEN
    needs: str | None = None
    cuda: bool = False
    dense: bool = False
    mean_only: bool = False
    one_pass: tuple[str, ...] = ()
    ours: bool = False
    backend: str | None = None
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    accumulates: bool = False


ONE_PASS = ("weighted", "two_stream")
EAGER = "eager torch"
PROVIDERS = [
    Provider("triton", ours("triton"), cuda=True, one_pass=ONE_PASS, ours=True, backend="triton"),
    Provider("cublas", ours("cublas"), cuda=True, one_pass=ONE_PASS, ours=True, backend="cublas"),
    Provider(
        "cublas bf16",
        bf16_logits,
        ONE_PASS,
        cuda=True,
        one_pass=ONE_PASS,
        backend="cublas",
        dtypes=("bf16",),
    ),
    Provider("torch", ours("torch"), one_pass=ONE_PASS, ours=True, backend="torch"),
    Provider(
        "reference",
        ours("reference"),
        dense=True,
        one_pass=ONE_PASS,
        ours=True,
        backend="reference",
    ),
    *(
        Provider(
            f"{backend}, dW out",
            ours(backend, accumulates=True),
            ("weighted",),
            cuda=backend != "torch",
            one_pass=ONE_PASS,
            ours=True,
            backend=backend,
            accumulates=True,
        )
        for backend in ("triton", "cublas", "torch")
    ),
    Provider(EAGER, per_token(_eager_logp), dense=True),
    Provider("torch.compile", per_token(compiled), dense=True),
    Provider("torch LCE", per_token(torch_chunked), needs="torch.nn.LinearCrossEntropyOptions"),
    Provider(
        "torch LCE mean",
        mean_nll(torch_chunked_mean),
        needs="torch.nn.LinearCrossEntropyOptions",
        mean_only=True,
        one_pass=ONE_PASS,
    ),
    Provider(
        "Liger FLCE",
        mean_nll(liger_flce),
        needs="liger_kernel",
        cuda=True,
        mean_only=True,
        one_pass=ONE_PASS,
    ),
    Provider("Liger FLSCE", per_token(liger_flsce), needs="liger_kernel"),
    Provider("Liger GRPO", liger_grpo, ONE_PASS, needs="liger_kernel", one_pass=ONE_PASS),
    Provider("CCE exact", per_token(cce), needs="cut_cross_entropy", cuda=True),
    Provider("QuACK", mean_nll(quack), needs="quack", cuda=True, mean_only=True, one_pass=ONE_PASS),
    Provider("TRL chunked", per_token(trl_chunked), needs="trl"),
    Provider(
        "kernel",
        group_kernel,
        GROUP,
        needs="vpgea_fast.kernels.group_advantage",
        cuda=True,
        ours=True,
    ),
    Provider(EAGER, eager_group, GROUP),
]


def unavailable(provider: Provider, op: str, shape: Sequence[int], args: Any) -> str | None:
    """Why this provider cannot take part, or None."""
    if provider.mean_only and op in PER_TOKEN and op != "weighted":
        return "one scalar for all rows: takes no per-token coefficients"
    if op not in provider.ops:
        return f"does not compute {op}"
    if provider.backend is not None:
        try:
            losses.resolve_backend(provider.backend)
        except ValueError as error:
            return str(error)
    if provider.needs and provider.needs.startswith("torch."):
        if not hasattr(torch.nn, provider.needs.rpartition(".")[2]):
            return f"torch {torch.__version__} has no {provider.needs}"
    elif provider.needs and importlib.util.find_spec(provider.needs) is None:
        ours = provider.needs.startswith("vpgea_fast.")
        return f"not built: {provider.needs}" if ours else f"{provider.needs} is not installed"
    if provider.cuda and args.device.type != "cuda":
        return "needs CUDA"
    if args.dtype_name not in provider.dtypes:
        return f"takes {', '.join(provider.dtypes)}, not {args.dtype_name}"
    # Logits in the input dtype, in float32, and their gradient.
    gib = shape[0] * (2 if op == "two_stream" else 1) * shape[2] * 12 / 2**30
    if provider.dense and gib > args.memory_gib:
        return f"full logits take about {gib:.1f} GiB, --memory-gib is {args.memory_gib:.1f}"
    return None

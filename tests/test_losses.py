"""The fused losses against float64 autograd through the full logits.

Budgets: float64 1e-12 (1e-9 for vpgea_loss), float32 1e-5, fp16 2e-3 and bf16 4e-3, all relative in
the Frobenius norm; bf16 also at most 1.1 (dX) and 1.6 (dW) times the error of torch with float32
logits and the logit gradient rounded once to bf16.
"""

import math
import re
import subprocess
import sys
import weakref
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vpgea_fast.kernels import backends, epilogue, head, reference, streams, units
from vpgea_fast.losses import (
    linear_logprob,
    two_stream_loss,
    vpgea_loss,
    weighted_logprob_loss,
)

BACKENDS = ["reference", "torch"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}
T, D, V = 23, 12, 61
CHUNK = 5 * V * 4  # five float32 rows: every test below crosses chunk borders raggedly


def head_case(dtype=torch.float64, *, tokens=T, vocabulary=V, device="cpu", spread=1.0):
    """Random hidden, weight and bias (leaves), targets with the last class, signed coefficients."""
    hidden_TD = (spread * torch.randn(tokens, D)).to(device, dtype).requires_grad_()
    weight_VD = torch.randn(vocabulary, D).to(device, dtype).requires_grad_()
    bias_V = torch.randn(vocabulary).to(device, dtype).requires_grad_()
    targets_T = torch.randint(0, vocabulary, (tokens,)).to(device)
    targets_T[:1] = vocabulary - 1
    return hidden_TD, weight_VD, bias_V, targets_T, torch.randn(tokens).to(device)


def full_logits(hidden_TD, weight_VD, **head):
    """z_TV in float64, independent of reference.py."""
    a_TV = head.get("logit_scale", 1.0) * (hidden_TD.double() @ weight_VD.double().T)
    if head.get("bias") is not None:
        a_TV = a_TV + head["bias"].double()
    if head.get("softcap") is not None:
        a_TV = head["softcap"] * torch.tanh(a_TV / head["softcap"])
    temperature = head.get("temperature", 1.0)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().unsqueeze(1)
    return a_TV / temperature


def oracle(hidden_TD, weight_VD, targets_T, **head):
    """logp, lse, entropy by log_softmax of the full float64 logits."""
    z_TV = full_logits(hidden_TD, weight_VD, **head)
    kept_T = targets_T != head.get("ignore_index", -100)
    index_T1 = targets_T.long().masked_fill(~kept_T, 0).unsqueeze(1)
    logp_T = z_TV.log_softmax(1).gather(1, index_T1).squeeze(1)
    entropy_T = -(z_TV.softmax(1) * z_TV.log_softmax(1)).sum(1)
    return tuple(x.masked_fill(~kept_T, 0.0) for x in (logp_T, z_TV.logsumexp(1), entropy_T))


def float64_leaves(hidden_TD, weight_VD):
    """The same values as leaves of their own."""
    return tuple(x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD))


def gradients(value, *leaves):
    return torch.autograd.grad(value, leaves, retain_graph=True)


def assert_close(got, expected, budget):
    for ours, truth in zip(got, expected, strict=True):
        error = (ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)
        assert error <= budget, f"relative error {error:.2e} > {budget:.0e}"


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": "per row"},
    "softcap": {"softcap": 2.5},
    "logit_scale": {"logit_scale": -0.4},
    "bias": {"bias": "yes"},
    "all": {"temperature": "per row", "softcap": 3.0, "logit_scale": 0.6, "bias": "yes"},
    "ignore_index": {"ignore_index": 7},
}


def options_of(name, bias_V):
    options = dict(OPTIONS[name])
    if "bias" in options:
        options["bias"] = bias_V
    if options.get("temperature") == "per row":
        options["temperature"] = torch.rand(T) + 0.5
    return options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logprob_matches_autograd(backend, name, dtype):
    hidden_TD, weight_VD, bias_V, targets_T, _ = head_case(dtype)
    options = options_of(name, bias_V)
    targets_T[3] = options.get("ignore_index", -100)
    leaves = (hidden_TD, weight_VD) + ((bias_V,) if "bias" in options else ())
    ours = linear_logprob(
        hidden_TD,
        weight_VD,
        targets_T,
        return_entropy=True,
        backend=backend,
        chunk_bytes=CHUNK,
        **options,
    )
    assert ours.entropy is not None
    truth = oracle(hidden_TD, weight_VD, targets_T, **options)
    values = (ours.logp, ours.lse, ours.entropy)
    assert_close(values, truth, BUDGET[dtype])
    assert all(x.dtype == dtype and x[3] == 0 for x in values)
    upstream = [torch.randn(T, dtype=torch.float64) for _ in range(3)]
    for used in ([0], [1], [2], [0, 1, 2]):
        mine = torch.stack([(values[i] * upstream[i].to(dtype)).sum() for i in used]).sum()
        theirs = torch.stack([(truth[i] * upstream[i]).sum() for i in used]).sum()
        assert_close(gradients(mine, *leaves), gradients(theirs, *leaves), 2 * BUDGET[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weighted_loss_matches_autograd(backend, name, dtype):
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(dtype)
    options = options_of(name, bias_V)
    targets_T[3] = options.get("ignore_index", -100)
    coef_T[5] = 0.0
    leaves = (hidden_TD, weight_VD) + ((bias_V,) if "bias" in options else ())
    ours = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, coef_T, backend=backend, chunk_bytes=CHUNK, **options
    )
    logp_T, _, _ = oracle(hidden_TD, weight_VD, targets_T, **options)
    truth = (coef_T * logp_T).sum()
    kept_T = (coef_T != 0) & (targets_T != options.get("ignore_index", -100))
    assert_close((ours.loss, ours.logp), (truth, logp_T * kept_T), BUDGET[dtype])
    assert torch.equal(ours.kept, kept_T)
    assert not ours.logp.requires_grad
    got = gradients(ours.loss, *leaves)
    assert_close(got, gradients(truth, *leaves), 2 * BUDGET[dtype])
    assert torch.equal(got[0][[3, 5]], torch.zeros(2, D, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_statistics_are_those_of_the_full_logits(backend, name, dtype):
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(dtype)
    options = options_of(name, bias_V)
    z_TV = full_logits(hidden_TD, weight_VD, **options).detach()
    targets_T[::2] = z_TV[::2].argmax(1)
    targets_T[4] = options.get("ignore_index", -100)
    kept_T = targets_T != targets_T[4]

    def call(**more):
        arguments = (hidden_TD, weight_VD, targets_T)
        return linear_logprob(*arguments, backend=backend, chunk_bytes=CHUNK, **options, **more)

    with Recorder() as plain:
        bare = call()
    assert bare.statistics is None
    ours = call(return_statistics=True)
    found = ours.statistics
    assert found is not None
    top_T = torch.tensor([int(z.argmax()) == t for z, t in zip(z_TV, targets_T, strict=True)])
    assert torch.equal(found.top1, top_T & kept_T)
    assert 0 < found.top1.sum() < kept_T.sum()
    p2_T = z_TV.softmax(1).square().sum(1).log()
    for got, truth in ((found.mean_logit, z_TV.mean(1)), (found.log_sum_p2, p2_T)):
        assert got.dtype == dtype
        assert_close((got,), (truth * kept_T,), BUDGET[dtype])
    # They cost nothing where they are not asked for, and change nothing where they are.
    assert not [x for x in plain.names if "argmax" in x or "norm" in x]
    assert torch.equal(ours.logp, bare.logp)
    assert torch.equal(ours.lse, bare.lse)
    assert not any(x.requires_grad for x in (found.top1, found.mean_logit, found.log_sum_p2))
    upstream = [(coef_T * x.logp).sum() + x.lse.sum() for x in (ours, bare)]
    mine, theirs = (gradients(x, hidden_TD, weight_VD) for x in upstream)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_expected_gradients_are_those_of_a_second_pass(backend, dtype):
    """Where the expectation holds they are made once; where it does not, again, and never wrong."""
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(dtype)
    leaves = (hidden_TD, weight_VD, bias_V)
    targets_T[3], coef_T[5] = -100, 0.0
    uneven_T = coef_T.clone()
    uneven_T[7] *= 1 + 1e-5

    def run(loss_of, expected_T=None):
        with Recorder() as recorder:
            out = linear_logprob(
                *leaves[:2],
                targets_T,
                bias=bias_V,
                softcap=9.0,
                return_entropy=True,
                return_statistics=True,
                expected_T=expected_T,
                backend=backend,
            )
            grads = gradients(loss_of(out), *leaves)
        return (out.logp, out.lse, out.entropy, out.statistics.mean_logit, *grads), recorder.gemms

    def weighted(out):
        return -2.5 * (coef_T * out.logp).sum()

    plain, twice = run(weighted)
    foreseen, once = run(weighted, coef_T)
    assert all(map(torch.equal, foreseen[:4], plain[:4]))
    logp_T = oracle(hidden_TD, weight_VD, targets_T, bias=bias_V, softcap=9.0)[0]
    truth = gradients(-2.5 * (coef_T * logp_T).sum(), *leaves)
    for grads in (foreseen[4:], plain[4:]):
        assert_close(grads, truth, 4e-3 if dtype == torch.bfloat16 else 2 * BUDGET[dtype])
    assert all(got.dtype == like.dtype for got, like in zip(foreseen, plain, strict=True))
    if backend == "torch" and dtype != torch.bfloat16:  # a CPU's has a GEMM for each block there
        assert (once, twice) == (3, 4)
    for loss_of, expected_T in (
        (weighted, uneven_T),
        (weighted, torch.zeros(T)),
        (lambda out: weighted(out) + 0.1 * out.entropy.sum(), coef_T),
        (lambda out: weighted(out) + 0.1 * out.lse.sum(), coef_T),
    ):
        missed, more = run(loss_of, expected_T)
        assert all(map(torch.equal, missed, run(loss_of)[0]))
        assert more > twice or backend == "reference"
    nothing = torch.zeros(T)
    assert not any(x.any() for x in run(lambda out: (nothing * out.logp).sum(), nothing)[0][4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flop_counters_see_every_product(dtype):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(dtype)
    arguments = (hidden_TD, weight_VD, targets_T)
    for products, loss_of in (
        (3, lambda: weighted_logprob_loss(*arguments, coef_T, backend="torch").loss),
        (4, lambda: linear_logprob(*arguments, backend="torch").logp.sum()),
    ):
        with FlopCounterMode(display=False) as counter:
            loss_of().backward()
        assert counter.get_total_flops() == 2 * products * T * V * D


def test_an_expected_gradient_is_a_constant():
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case()
    with pytest.raises(ValueError, match="expected_T requires grad, but is a constant"):
        linear_logprob(hidden_TD, weight_VD, targets_T, expected_T=coef_T.requires_grad_())
    with torch.no_grad():
        out = linear_logprob(hidden_TD, weight_VD, targets_T, expected_T=torch.ones(T))
    assert not out.logp.requires_grad
    out = linear_logprob(hidden_TD, weight_VD, targets_T, expected_T=torch.ones(T)).logp
    every = torch.eye(T, dtype=torch.float64)
    (grads,) = torch.autograd.grad(out, hidden_TD, every, retain_graph=True, is_grads_batched=True)
    for row, each in enumerate(grads):
        (alone,) = torch.autograd.grad(out[row], hidden_TD, retain_graph=True)
        assert_close((each,), (alone,), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_statistics_at_the_edges(backend):
    """Equal largest logits: the first is on top. 152064 equal classes; one that is certain."""

    def statistics(weight_VD, *targets):
        targets_T = torch.tensor(targets, dtype=torch.int64)
        hidden_TD = torch.ones(len(targets), weight_VD.shape[1])
        return linear_logprob(
            hidden_TD, weight_VD, targets_T, return_statistics=True, backend=backend
        ).statistics

    tied = statistics(torch.tensor([[0.0], [2.0], [1.0], [2.0]]), 0, 1, 2, 3)
    assert tied.top1.tolist() == [False, True, False, False]
    flat = statistics(torch.full((152064, 2), 0.25), 5)
    assert flat.mean_logit.item() == pytest.approx(0.5, rel=1e-6)
    assert flat.log_sum_p2.item() == pytest.approx(-math.log(152064), rel=1e-6)
    sure = statistics(torch.tensor([[90.0], [-80.0], [-80.0]]), 0, 1)
    assert sure.top1.tolist() == [True, False]
    assert sure.log_sum_p2.tolist() == [0.0, 0.0]
    none = statistics(torch.ones(3, 1))
    assert [x.shape for x in (none.top1, none.mean_logit)] == [(0,), (0,)]
    assert none.top1.dtype == torch.bool


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_of_skipped_rows_is_within_their_bounds(backend, name):
    """By autograd through the full float64 logits: of dX in each row, of dW and db in all."""
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case()
    with torch.no_grad():
        hidden_TD[::2] = 1.5 * weight_VD[targets_T[::2]]  # confident rows, whose bounds are small
    options, kwargs = options_of(name, bias_V), {"backend": backend, "chunk_bytes": CHUNK}
    targets_T[3], coef_T[5] = options.get("ignore_index", -100), 0.0
    rows = hidden_TD, weight_VD, targets_T
    leaves = (hidden_TD, weight_VD) + ((bias_V,) if "bias" in options else ())
    logp_T = oracle(*rows, **options)[0]
    bound_T = 2**0.5 * coef_T.double().abs() * -torch.expm1(logp_T.detach())
    bound_T = bound_T / options.get("temperature", 1.0)
    # Between two bounds: at one of them, rounding would decide.
    least = bound_T.sort().values[T // 2 - 1 : T // 2 + 1].mean().item()
    plain = weighted_logprob_loss(*rows, coef_T, **kwargs, **options)
    ours = weighted_logprob_loss(*rows, coef_T, skip_below=least, **kwargs, **options)
    assert torch.equal(ours.loss, plain.loss)
    assert torch.equal(ours.logp, plain.logp)
    left_T = plain.kept & (bound_T < least)
    assert 5 < left_T.sum() < plain.kept.sum()
    assert_close((ours.skipped,), (bound_T * left_T,), 1e-9)
    got, exact = gradients(ours.loss, *leaves), gradients((coef_T * logp_T).sum(), *leaves)
    dx_TD, dw_VD, *db = (x - y for x, y in zip(got, exact, strict=True))
    scale, slack = abs(options.get("logit_scale", 1.0)), 1 + 1e-9
    largest = torch.linalg.matrix_norm(weight_VD.detach(), 2)
    assert (dx_TD.norm(dim=1) <= slack * scale * ours.skipped * largest + 1e-12).all()
    assert torch.equal(got[0].detach().norm(dim=1) > 0, plain.kept & ~left_T)
    most = (ours.skipped * hidden_TD.detach().norm(dim=1)).sum()
    assert 0 < dw_VD.norm() <= slack * scale * most
    assert all(x.norm() <= slack * ours.skipped.sum() for x in db)
    fewer = weighted_logprob_loss(*rows, coef_T.masked_fill(left_T, 0.0), **kwargs, **options)
    assert_close(got, gradients(fewer.loss, *leaves), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_no_row_or_every_row_is_skipped(backend, dtype):
    """Bit for bit the call without the option; and no gradient, with the value as it was."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(dtype)
    arguments = hidden_TD, weight_VD, targets_T, coef_T
    plain = weighted_logprob_loss(*arguments, backend=backend, chunk_bytes=CHUNK)
    none, every = (
        weighted_logprob_loss(*arguments, backend=backend, chunk_bytes=CHUNK, skip_below=least)
        for least in (1e-30, 1e30)
    )
    assert plain.skipped is None
    for ours, truth in zip(
        gradients(none.loss, hidden_TD, weight_VD),
        gradients(plain.loss, hidden_TD, weight_VD),
        strict=True,
    ):
        assert torch.equal(ours, truth)
    assert not none.skipped.any()
    assert torch.equal(every.loss, plain.loss)
    assert not any(x.any() for x in gradients(every.loss, hidden_TD, weight_VD))
    assert (every.skipped > 0).all()
    with torch.no_grad():
        scored = weighted_logprob_loss(*arguments, backend=backend, skip_below=1e30)
    assert not scored.skipped.any()


def test_skipped_rows_of_two_streams():
    """Each stream has its own part of the bounds; a closed gate's rows are 0 there."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case()
    cut = (hidden_TD[:9], hidden_TD[9:]), (targets_T[:9], targets_T[9:]), (coef_T[:9], coef_T[9:])
    both = two_stream_loss(*cut[0], weight_VD, *cut[1], *cut[2], skip_below=0.5)
    one = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, skip_below=0.5)
    assert torch.equal(torch.cat((both.skipped_post, both.skipped_prior)), one.skipped)
    assert both.skipped_post.any()
    assert both.skipped_prior.any()
    ours = vpgea_loss(
        hidden_TD[:9],
        hidden_TD[9:18],
        weight_VD,
        targets_T[:9],
        torch.tensor([0, 4, 9]),
        torch.tensor([1.0, -1.0]),
        denominator=2,
        skip_below=1e30,
    )
    assert (ours.skipped_post > 0).all()
    assert torch.equal(ours.skipped_prior > 0, torch.arange(9) < 4)


def test_where_rows_cannot_be_skipped():
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case()
    rows = hidden_TD, weight_VD, targets_T
    with pytest.raises(ValueError, match=r"skip_below: got 0.1, but linear_logprob"):
        linear_logprob(*rows, skip_below=0.1)
    with pytest.raises(ValueError, match=r"skip_below: label_smoothing and z_loss"):
        weighted_logprob_loss(*rows, coef_T, z_loss=0.1, skip_below=0.1)
    with pytest.raises(ValueError, match=r"skip_below: a compiled call"):
        weighted_logprob_loss(*(x.to("meta") for x in (*rows, coef_T)), skip_below=0.1)
    for wrong in (-1.0, math.nan, math.inf, True):
        with pytest.raises(ValueError, match=r"skip_below: got .*, expected a finite number >= 0"):
            weighted_logprob_loss(*rows, coef_T, skip_below=wrong)
    call = backends.Situation("cpu", torch.float32, sharded=True, skips=True)
    with pytest.raises(ValueError, match=r"a head that is cut has no skip_below"):
        backends.choose("torch", call, {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_label_smoothing_and_z_loss_in_one_pass(backend, name, dtype):
    """Against torch's own label smoothing of the full float64 logits, and lse^2 beside it."""
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(dtype)
    options = options_of(name, bias_V)
    targets_T[3], coef_T[5] = options.get("ignore_index", -100), 0.0
    leaves = (hidden_TD, weight_VD) + ((bias_V,) if "bias" in options else ())
    kept_T = (coef_T != 0) & (targets_T != targets_T[3])
    z_TV = full_logits(hidden_TD, weight_VD, **options)
    safe_T = targets_T.masked_fill(~kept_T, 0)
    for label, z_loss in ((0.1, 0.0), (0.0, 0.02), (0.3, 0.01), (1.0, 0.0)):
        nll_T = torch.nn.functional.cross_entropy(
            z_TV, safe_T, reduction="none", label_smoothing=label
        )
        truth = (coef_T * kept_T * (-nll_T - z_loss * z_TV.logsumexp(1).square())).sum()
        smoothing = {"label_smoothing": label, "z_loss": z_loss}
        ours = weighted_logprob_loss(
            hidden_TD,
            weight_VD,
            targets_T,
            coef_T,
            backend=backend,
            chunk_bytes=CHUNK,
            **smoothing,
            **options,
        )
        values = 1e-12 if dtype is torch.float64 else 2e-5
        logp_T = oracle(hidden_TD, weight_VD, targets_T, **options)[0] * kept_T
        assert_close((ours.loss, ours.logp), (truth, logp_T), values)
        got, expected = gradients(ours.loss, *leaves), gradients(truth, *leaves)
        assert_close(got, expected, 2 * BUDGET[dtype])
        if backend == "reference" and dtype is torch.float64:
            head = {"bias_V" if k == "bias" else k: x for k, x in options.items()}
            spec = reference.weighted_logprob_loss(
                hidden_TD, weight_VD, targets_T, coef_T.double(), **smoothing, **head
            )
            assert_close((spec,), (truth,), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_smoothing_at_the_edges(backend):
    """A class that cannot be makes the loss torch's inf, as a target or beside it, and no NaN; one
    term alone is not touched by the other's range, as lse^2 beyond float32 is."""
    hidden_TD, weight_VD, bias_V, targets_T, _ = head_case(torch.float32)
    coef_T = torch.full((T,), -1.0 / T)
    with torch.no_grad():
        bias_V[4] = -math.inf

    def both(label, **call):
        arguments = {"hidden_TD": hidden_TD, "targets_T": targets_T, "bias": bias_V, **call}
        ours = weighted_logprob_loss(
            weight_VD=weight_VD, coef_T=coef_T, label_smoothing=label, backend=backend, **arguments
        )
        z_TV = full_logits(arguments["hidden_TD"], weight_VD, bias=arguments["bias"])
        truth = torch.nn.functional.cross_entropy(
            z_TV, arguments["targets_T"], label_smoothing=label
        )
        return ours.loss.item(), truth.item()

    others_T = targets_T.masked_fill(targets_T == 4, 0)
    for rows_T in (others_T, torch.full_like(targets_T, 4)):
        assert both(0.1, targets_T=rows_T) == (math.inf, math.inf)
        assert both(1.0, targets_T=rows_T)[0] == math.inf  # torch's is 0 x inf for the target
    assert both(0.0, targets_T=others_T)[0] < math.inf
    ours, truth = both(0.1, hidden_TD=1e25 * hidden_TD.detach(), bias=None)
    assert ours == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(
    ("smoothing", "words"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing: .*a number from 0 to 1"),
        ({"label_smoothing": torch.tensor(0.1)}, "label_smoothing: got a Tensor"),
        ({"z_loss": -1e-4}, "z_loss: .*a finite number >= 0"),
        ({"z_loss": 1e-4, "backend": "triton"}, "backend 'triton'"),
    ],
)
def test_smoothing_out_of_its_bounds_is_refused(smoothing, words):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float32)
    with pytest.raises(ValueError, match=words):
        weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, **smoothing)
    half = [x.detach().half() for x in (hidden_TD, weight_VD)]
    half[0].requires_grad_()
    for backend in ("auto", "torch"):
        with pytest.raises(ValueError, match="got float16, whose passes have neither"):
            weighted_logprob_loss(*half, targets_T, coef_T, z_loss=0.1, backend=backend)
    # Values alone have no gradient that would need a bound.
    z_TV = half[0].detach().double() @ half[1].double().T
    want = (coef_T * (z_TV.gather(1, targets_T[:, None])[:, 0] - z_TV.logsumexp(1)
                      - 0.1 * z_TV.logsumexp(1).square())).sum()  # fmt: skip
    with torch.no_grad():
        found = weighted_logprob_loss(*half, targets_T, coef_T, z_loss=0.1, backend="torch").loss
    assert found.item() == pytest.approx(want.item(), rel=1e-5)


def test_gradcheck_reference():
    """Finite differences agree with every reference op, the entropy and second derivatives too."""
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(tokens=4, vocabulary=7)
    targets_T[1] = -100
    coef_T = coef_T.double()
    head = {"temperature": torch.rand(4) + 0.5, "softcap": 3.0, "logit_scale": 0.6}

    def rows(hidden_TD, weight_VD, bias_V):
        return reference.linear_logprob(hidden_TD, weight_VD, targets_T, bias_V=bias_V, **head)

    def weighted(hidden_TD, weight_VD, bias_V):
        return reference.weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, bias_V=bias_V, **head
        )

    assert torch.autograd.gradcheck(rows, (hidden_TD, weight_VD, bias_V))
    assert torch.autograd.gradcheck(weighted, (hidden_TD, weight_VD, bias_V))
    assert torch.autograd.gradgradcheck(weighted, (hidden_TD, weight_VD, bias_V))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_public(backend):
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(tokens=5, vocabulary=7)
    targets_T[1] = -100
    options = {"temperature": torch.rand(5) + 0.5, "softcap": 3.0, "backend": backend}

    def rows(hidden_TD, weight_VD, bias_V):
        out = linear_logprob(
            hidden_TD, weight_VD, targets_T, bias=bias_V, return_entropy=True, **options
        )
        assert out.entropy is not None
        return out.logp, out.lse, out.entropy

    def weighted(hidden_TD, weight_VD, bias_V):
        return weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T.double(), bias=bias_V, **options
        ).loss

    assert torch.autograd.gradcheck(rows, (hidden_TD, weight_VD, bias_V))
    assert torch.autograd.gradcheck(weighted, (hidden_TD, weight_VD, bias_V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_size_does_not_matter(dtype):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(dtype, tokens=40)
    runs = []
    for chunk_bytes in (1, 7 * V * 6, 16 * V * 6, None):
        ours = weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, backend="torch", chunk_bytes=chunk_bytes
        )
        runs.append((ours.logp, *gradients(ours.loss, hidden_TD, weight_VD)))
    for run in runs[:-1]:
        assert_close(run, runs[-1], 1e-3)


def one_row_case(logp, dtype):
    """One row, in `dtype`, and a float32 bias that gives its target about this log-probability."""
    hidden_TD, weight_VD, _, _, _ = head_case(dtype, tokens=1, spread=0.5)
    z_V = (weight_VD.double() @ hidden_TD.double().squeeze(0)).detach()
    log_odds = logp - math.log(-math.expm1(logp))
    bias_V = torch.zeros(V)
    bias_V[V - 1] = z_V[:-1].logsumexp(0) + log_odds - z_V[-1]
    return hidden_TD, weight_VD, bias_V.requires_grad_(), torch.tensor([V - 1])


@pytest.mark.parametrize("missing", [1e-1, 7e-6, 1e-6, 1e-12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_tokens_keep_their_gradient(backend, missing):
    """softmax - onehot is a multiple of 6e-8 in float32: 6 % of 1 - p = 1e-6, nothing of 1e-12."""
    hidden_TD, weight_VD, bias_V, targets_T = one_row_case(math.log1p(-missing), torch.float32)
    leaves = (hidden_TD, weight_VD, bias_V)
    truth = oracle(hidden_TD, weight_VD, targets_T, bias=bias_V)[0]
    assert -truth.item() == pytest.approx(missing, rel=0.2)
    ours = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, torch.ones(1), bias=bias_V, backend=backend
    )
    assert ours.logp.item() < 0
    assert_close((ours.logp,), (truth,), 5e-3)
    got, expected = gradients(ours.loss, *leaves), gradients(truth.sum(), *leaves)
    assert_close(got, expected, 5e-3)
    assert_close((got[2][V - 1],), (expected[2][V - 1],), 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coefficient", [1.0, -1e-4, 1e-7])
@pytest.mark.parametrize("logp", [-40.0, -60.0, -69.0, -200.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unlikely_tokens(backend, logp, coefficient, dtype):
    hidden_TD, weight_VD, bias_V, targets_T = one_row_case(logp, dtype)
    coef_T = torch.tensor([coefficient])
    truth = oracle(hidden_TD, weight_VD, targets_T, bias=bias_V)[0]
    dweight_VD = torch.zeros(V, D)
    ours = weighted_logprob_loss(
        hidden_TD,
        weight_VD,
        targets_T,
        coef_T,
        bias=bias_V,
        backend=backend,
        dweight_out=dweight_VD,
    )
    assert_close((ours.logp,), (truth,), 1e-5)
    full_hidden_TD, full_weight_VD = float64_leaves(hidden_TD, weight_VD)
    loss = coefficient * oracle(full_hidden_TD, full_weight_VD, targets_T, bias=bias_V)[0].sum()
    expected = gradients(loss, full_hidden_TD, full_weight_VD)
    scale = 1.0 / abs(coefficient)
    ours.loss.backward()
    assert hidden_TD.grad is not None
    assert_close((dweight_VD * scale,), (expected[1] * scale,), BUDGET[dtype])
    if dtype is not torch.float16:  # dX itself is fp16: 1e-7 is one step of its grid there
        assert_close((hidden_TD.grad,), (expected[0],), BUDGET[dtype])


def test_fp16_gradients_survive_until_the_loss_scale():
    """dX of 1e-9 is 0 in fp16: it must be scaled by backward's gradient before it is stored."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float16)
    coef_T = 1e-9 * coef_T
    ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend="torch")
    (ours.loss * 2.0**24).backward()
    full_hidden_TD, full_weight_VD = float64_leaves(hidden_TD, weight_VD)
    truth = (2.0**24 * coef_T * oracle(full_hidden_TD, full_weight_VD, targets_T)[0]).sum()
    assert_close(
        (hidden_TD.grad, weight_VD.grad), gradients(truth, full_hidden_TD, full_weight_VD), 2e-3
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["one pass", "recompute"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_precision_budget(backend, op, dtype, device):
    """Against float64 from the same inputs, and against torch with dlogits rounded once."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(
        dtype, tokens=64, vocabulary=211, device=device, spread=0.5
    )
    options = {"backend": backend, "chunk_bytes": 20 * 211 * 6}
    if op == "one pass":
        ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, **options)
        loss, logp_T = ours.loss, ours.logp
    else:
        logp_T = linear_logprob(hidden_TD, weight_VD, targets_T, **options).logp
        loss = (coef_T * logp_T).sum()
    assert loss.dtype == logp_T.dtype == torch.float32
    dhidden_TD, dweight_VD = gradients(loss, hidden_TD, weight_VD)
    assert dhidden_TD.dtype == dweight_VD.dtype == dtype

    full_hidden_TD, full_weight_VD = float64_leaves(hidden_TD, weight_VD)
    truth_T, _, _ = oracle(full_hidden_TD, full_weight_VD, targets_T)
    expected = gradients((coef_T * truth_T).sum(), full_hidden_TD, full_weight_VD)
    assert_close((logp_T,), (truth_T,), 1e-5)
    assert_close((dhidden_TD, dweight_VD), expected, BUDGET[dtype])

    z_TV = (hidden_TD.float() @ weight_VD.float().T).detach()
    onehot_TV = torch.nn.functional.one_hot(targets_T, 211)
    dz_TV = (coef_T.unsqueeze(1) * (onehot_TV - z_TV.softmax(1))).to(dtype).float()
    plain = (dz_TV @ weight_VD.float()).to(dtype), (dz_TV.T @ hidden_TD.float()).to(dtype)
    if dtype is torch.bfloat16:
        for mine, theirs, truth, factor in zip(
            (dhidden_TD, dweight_VD), plain, expected, (1.1, 1.6), strict=True
        ):
            assert (mine - truth).norm() <= factor * (theirs - truth).norm()


class Products(TorchDispatchMode):
    """Dtypes of the operands of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear"):
            self.dtypes |= {x.dtype for x in tree_leaves(args) if torch.is_tensor(x)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", ["one pass", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_of_a_cpu_are_float32_ones(dtype, op):
    """Of upcast operands, so exact but for the order of sums; of the weight three blocks."""
    width, vocabulary = 64, 2 * (2**21 // (4 * 64)) + 5
    hidden_TD = torch.randn(8, width, dtype=dtype, requires_grad=True)
    weight_VD = (torch.randn(vocabulary, width) / 4).to(dtype).requires_grad_()
    targets_T = torch.randint(vocabulary, (8,))
    targets_T[:3] = torch.tensor([0, vocabulary - 1, 2**13])  # in the blocks' first and last rows
    coef_T = torch.randn(8)
    with Products() as seen:
        if op == "one pass":
            ours = weighted_logprob_loss(
                hidden_TD, weight_VD, targets_T, coef_T, backend="torch", chunk_bytes=1
            )
            loss, logp_T = ours.loss, ours.logp
        else:
            logp_T = linear_logprob(hidden_TD, weight_VD, targets_T, backend="torch").logp
            loss = (coef_T * logp_T).sum()
        made = torch.autograd.grad(loss, (hidden_TD, weight_VD))
    assert seen.dtypes == {torch.float32}

    full_hidden_TD, full_weight_VD = float64_leaves(hidden_TD, weight_VD)
    truth_T, _, _ = oracle(full_hidden_TD, full_weight_VD, targets_T)
    assert_close((logp_T,), (truth_T,), 1e-6)
    assert (logp_T - truth_T).abs().max() <= 1e-5
    # Logits in half precision, which a product of halves gives, are not within a thousandth.
    rounded_TV = (full_hidden_TD @ full_weight_VD.T).to(dtype).double()
    rounded_T = rounded_TV.log_softmax(1).gather(1, targets_T[:, None])[:, 0]
    assert (rounded_T - truth_T).abs().max() > (1e-3 if dtype is torch.bfloat16 else 1e-4)
    expected = gradients((coef_T * truth_T).sum(), full_hidden_TD, full_weight_VD)
    assert_close(made, expected, BUDGET[dtype])


@pytest.fixture
def switch(monkeypatch):
    """torch's switch for float32 products of a CPU, as of one with bfloat16 units; "none" after."""
    monkeypatch.setattr(units, "_has_units", lambda: True)
    yield torch.backends.mkldnn.matmul
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.mkldnn.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bfloat16_units_multiply_bfloat16_numbers_alone(monkeypatch, dtype, switch):
    """torch's switch is the user's again after a pass, and after one that fails."""
    product, seen = epilogue.matmul, []

    def recorded(*args, **kwargs):
        seen.append(switch.fp32_precision)
        return product(*args, **kwargs) if len(seen) == 1 else kwargs["no such argument"]

    monkeypatch.setattr(epilogue, "matmul", recorded)
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(dtype)
    arguments = hidden_TD, weight_VD, targets_T, coef_T
    switch.fp32_precision = "ieee"
    weighted_logprob_loss(*arguments, backend="torch", chunk_bytes=1 << 20)
    assert switch.fp32_precision == "ieee"
    with pytest.raises(KeyError, match="no such argument"):
        weighted_logprob_loss(*arguments, backend="torch", chunk_bytes=1 << 20)
    assert switch.fp32_precision == "ieee"
    assert seen == ["bf16" if dtype is torch.bfloat16 else "ieee"] * 2


def test_passes_that_overlap_give_the_switch_back(switch):
    """As those of two threads do; and what it had of its parent is the parent's to say again."""
    switch.fp32_precision = "ieee"
    first, second = ExitStack(), ExitStack()
    for one in (first, second):
        one.enter_context(units.UNITS)
    first.close()
    assert switch.fp32_precision == "bf16"
    second.close()
    assert switch.fp32_precision == "ieee"
    for whole in ("bf16", "ieee"):
        switch.fp32_precision = "none"
        torch.backends.mkldnn.fp32_precision = whole
        with units.UNITS:
            assert switch.fp32_precision == "bf16"
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert switch.fp32_precision == "ieee"


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_logits(backend):
    """|z| to 60 and beyond in bf16: max |logp - float64| <= 1e-3, mean <= 5e-5, never above 0."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(
        torch.bfloat16, tokens=200, vocabulary=2000, spread=4.0
    )
    z_TV = hidden_TD.detach().double() @ weight_VD.detach().double().T
    targets_T[::2] = z_TV[::2].argmax(1)
    assert 60 < z_TV.abs().max() < 120
    truth_T = oracle(hidden_TD, weight_VD, targets_T)[0]
    ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend=backend)
    error_T = (ours.logp - truth_T).abs()
    assert (ours.logp <= 0).all()
    assert error_T.max() <= 1e-3
    assert error_T.mean() <= 5e-5


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_7b_head(backend):
    """N = 2048, D = 3584, V = 152064, |z| to 60: the budgets of the issue, on every row."""
    torch.cuda.manual_seed(0)
    rows, width, vocabulary = 2048, 3584, 152064
    scale = 13.0 / width**0.5
    hidden_TD = torch.randn(rows, width, device="cuda").bfloat16().requires_grad_()
    weight_VD = (scale * torch.randn(vocabulary, width, device="cuda")).bfloat16().requires_grad_()
    targets_T = torch.randint(0, vocabulary, (rows,), device="cuda")
    coef_T = torch.randn(rows, device="cuda")
    sink_VD = torch.zeros(vocabulary, width, device="cuda")
    truth_VD, once_VD = (torch.zeros_like(sink_VD, dtype=torch.float64) for _ in range(2))
    logp, dhidden, plain = [], [], []
    wide_VD = weight_VD.detach().double()
    for part in torch.arange(rows, device="cuda").split(256):
        z_RV = hidden_TD.detach()[part].double() @ wide_VD.T
        if part[0] % 512 == 0:
            targets_T[part] = z_RV.argmax(1)
        logp_RV = z_RV.log_softmax(1)
        logp.append(logp_RV.gather(1, targets_T[part, None]).squeeze(1))
        dz_RV = -coef_T[part, None].double() * logp_RV.exp_()
        dz_RV.scatter_add_(1, targets_T[part, None], coef_T[part, None].double())
        dhidden.append(dz_RV @ wide_VD)
        truth_VD += dz_RV.T @ hidden_TD.detach()[part].double()
        once_RV = dz_RV.bfloat16().double()
        plain.append((once_RV @ wide_VD).bfloat16().double())
        once_VD += once_RV.T @ hidden_TD.detach()[part].double()
    del wide_VD, z_RV, logp_RV, dz_RV, once_RV
    ours = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, coef_T, dweight_out=sink_VD, backend=backend
    )
    ours.loss.backward()
    assert hidden_TD.grad is not None
    error_T = (ours.logp - torch.cat(logp)).abs()
    assert (ours.logp <= 0).all()
    assert error_T.max() <= 1e-3
    assert error_T.mean() <= 5e-5
    exact_TD = torch.cat(dhidden)
    assert_close((hidden_TD.grad, sink_VD), (exact_TD, truth_VD), 4e-3)
    once_error = (torch.cat(plain) - exact_TD).norm()
    assert (hidden_TD.grad - exact_TD).norm() <= 1.1 * once_error
    assert (sink_VD - truth_VD).norm() <= 1.6 * (once_VD - truth_VD).norm()
    with torch.no_grad():
        scored = linear_logprob(hidden_TD, weight_VD, targets_T, backend=backend)
    if backend == "triton":
        assert torch.equal(scored.logp, ours.logp)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scoring_and_training_give_the_same_bits(backend, dtype):
    """No grad, one pass, recomputation, with lse and entropy beside it: one logp."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(dtype)
    options = {"backend": backend, "chunk_bytes": CHUNK}
    trained = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, **options).logp
    recomputed = linear_logprob(hidden_TD, weight_VD, targets_T, **options).logp
    with torch.no_grad():
        scored = linear_logprob(hidden_TD, weight_VD, targets_T, **options).logp
        weighted = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, **options).logp
    for logp_T in (recomputed, scored, weighted):
        assert torch.equal(logp_T, trained)


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 1, 3), (3, 7, 2), (2, 1, 1009), (65, 33, 130)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, shape):
    tokens, width, vocabulary = shape
    hidden_TD = torch.randn(tokens, width, requires_grad=True)
    weight_VD = torch.randn(vocabulary, width, requires_grad=True)
    targets_T, coef_T = torch.randint(0, vocabulary, (tokens,)), torch.randn(tokens)
    leaves = (hidden_TD, weight_VD)
    ours = weighted_logprob_loss(*leaves, targets_T, coef_T, backend=backend, chunk_bytes=64)
    logp_T = linear_logprob(*leaves, targets_T, backend=backend, chunk_bytes=64).logp
    wide = float64_leaves(*leaves)
    truth = (coef_T * oracle(*wide, targets_T)[0]).sum()
    expected = gradients(truth, *wide)
    for loss in (ours.loss, (coef_T * logp_T).sum()):
        assert_close(gradients(loss, *leaves), expected, 1e-5)


@pytest.mark.parametrize("by", ["coefficient", "target", "rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_rows_may_hold_anything(backend, by):
    """NaN and Inf in rows that take no part change no bit of the result."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float32)
    dead = torch.tensor([0, 8, T - 1])
    alive = torch.tensor([t for t in range(T) if t not in dead])
    rows = None
    if by == "coefficient":
        coef_T[dead] = 0.0
        targets_T[8] = V + 9  # not a class, but not read either
    elif by == "target":
        targets_T[dead] = -100
        coef_T[8] = math.nan
    else:
        rows = torch.cat((alive.flip(0), dead[:1]))
        coef_T[0] = 0.0

    def run(hidden_TD):
        ours = weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, rows=rows, backend=backend, chunk_bytes=CHUNK
        )
        return ours, gradients(ours.loss, hidden_TD, weight_VD)

    clean, clean_gradients = run(hidden_TD)
    with torch.no_grad():
        hidden_TD[dead[:2]], hidden_TD[dead[2]] = math.nan, math.inf
    dirty, dirty_gradients = run(hidden_TD)
    assert torch.isfinite(dirty.loss)
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(dirty.kept, torch.ones(T, dtype=torch.bool).index_fill(0, dead, False))
    for mine, theirs in zip(dirty_gradients, clean_gradients, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(dirty_gradients[0][dead], torch.zeros(3, D))
    only = weighted_logprob_loss(
        hidden_TD[alive], weight_VD, targets_T[alive], coef_T[alive], backend=backend
    )
    assert_close(dirty_gradients[1:], gradients(only.loss, weight_VD), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_linear_logprob(backend):
    hidden_TD, weight_VD, _, targets_T, _ = head_case()
    rows = torch.tensor([4, 0, 11])
    listed_T = torch.full_like(targets_T, -100).index_copy(0, rows, targets_T[rows])
    options = {"backend": backend, "return_entropy": True}
    some = linear_logprob(hidden_TD, weight_VD, targets_T, rows=rows, **options)
    same = linear_logprob(hidden_TD, weight_VD, listed_T, **options)
    assert some.entropy is not None
    assert same.entropy is not None
    for mine, theirs in (
        (some.logp, same.logp),
        (some.lse, same.lse),
        (some.entropy, same.entropy),
    ):
        assert_close((mine,), (theirs,), 1e-12)
        upstream_T = torch.randn(T, dtype=torch.float64)
        assert_close(
            gradients((mine * upstream_T).sum(), hidden_TD, weight_VD),
            gradients((theirs * upstream_T).sum(), hidden_TD, weight_VD),
            1e-12,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_scales(backend):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case()
    ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend=backend)
    once = gradients(ours.loss, hidden_TD, weight_VD)
    scaled = torch.autograd.grad(
        ours.loss, (hidden_TD, weight_VD), torch.tensor(-3.7, dtype=torch.float64)
    )
    assert_close(scaled, [-3.7 * x for x in once], 1e-12)
    logp_T = linear_logprob(hidden_TD, weight_VD, targets_T, backend=backend).logp
    ones = gradients(logp_T.sum(), hidden_TD, weight_VD)  # sum() hands down a stride-0 gradient
    assert_close(ones, gradients((logp_T * torch.ones(T)).sum(), hidden_TD, weight_VD), 1e-12)


@settings(max_examples=12)
@given(
    cuts=st.lists(st.integers(0, T), max_size=4),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_any_split_of_the_batch_gives_the_same_gradient(cuts, dtype):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(dtype)
    accumulator = torch.promote_types(dtype, torch.float32)
    whole_VD, split_VD = (torch.zeros(V, D, dtype=accumulator) for _ in range(2))
    weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, coef_T, dweight_out=whole_VD
    ).loss.backward()
    expected, hidden_TD.grad = hidden_TD.grad, None
    assert expected is not None
    bounds = [0, *sorted(cuts), T]
    for start, end in pairwise(bounds):
        weighted_logprob_loss(
            hidden_TD[start:end],
            weight_VD,
            targets_T[start:end],
            coef_T[start:end],
            dweight_out=split_VD,
        ).loss.backward()
    assert weight_VD.grad is None
    budget = 1e-12 if dtype is torch.float64 else 1e-5
    assert_close((split_VD, hidden_TD.grad), (whole_VD, expected), budget)


@settings(max_examples=15)
@given(
    shift=st.floats(-80, 80),
    temperature=st.floats(0.2, 5),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from(BACKENDS),
)
def test_a_common_shift_of_the_logits_changes_nothing(shift, temperature, seed, backend):
    torch.manual_seed(seed)
    hidden_TD, weight_VD, bias_V, targets_T, _ = head_case(tokens=5)

    def run(bias_V):
        out = linear_logprob(
            hidden_TD,
            weight_VD,
            targets_T,
            bias=bias_V,
            temperature=temperature,
            return_entropy=True,
            backend=backend,
        )
        assert out.entropy is not None
        total = (out.logp + 0.3 * out.entropy).sum()
        return out, gradients(total, hidden_TD, weight_VD, bias_V)

    (still, still_gradients), (moved, moved_gradients) = run(bias_V), run(bias_V + shift)
    assert (still.logp <= 0).all()
    torch.testing.assert_close(moved.logp, still.logp, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(moved.entropy, still.entropy, atol=1e-10, rtol=1e-11)
    torch.testing.assert_close(moved.lse, still.lse + shift / temperature, atol=1e-10, rtol=1e-11)
    assert_close(moved_gradients, still_gradients, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_80_and_masked_classes(backend):
    """Logits of +-80 and classes switched off by a bias of -inf stay finite in float32."""
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(torch.float32)
    with torch.no_grad():
        bias_V.copy_(80.0 * torch.sign(bias_V))
        bias_V[5], bias_V[9] = -math.inf, -3e4
    targets_T[targets_T == 5] = 6
    ours = linear_logprob(
        hidden_TD, weight_VD, targets_T, bias=bias_V, return_entropy=True, backend=backend
    )
    assert ours.entropy is not None
    assert (ours.logp <= 0).all()
    truth_T = oracle(hidden_TD, weight_VD, targets_T, bias=bias_V)[0]
    assert_close((ours.logp,), (truth_T,), 1e-5)
    total = (coef_T * ours.logp).sum() + ours.entropy.sum()
    assert all(torch.isfinite(x).all() for x in gradients(total, hidden_TD, weight_VD, bias_V))
    loss = (coef_T * ours.logp).sum()
    expected = gradients((coef_T * truth_T).sum(), hidden_TD, weight_VD)
    assert_close(gradients(loss, hidden_TD, weight_VD), expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_only_class_left_is_certain(backend):
    """All other classes at -inf: log p is 0 and so is every gradient, not inf - inf."""
    hidden_TD, weight_VD, bias_V, _, coef_T = head_case(torch.float32, tokens=3)
    with torch.no_grad():
        bias_V[:-1] = -math.inf
    targets_T = torch.full((3,), V - 1)
    ours = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, coef_T, bias=bias_V, backend=backend
    )
    assert torch.equal(ours.logp, torch.zeros(3))
    for got in gradients(ours.loss, hidden_TD, weight_VD, bias_V):
        assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do_stays_connected(backend, tokens):
    """No rows, or none kept: zero loss, zero gradients for every leaf, so that FSDP's hooks run."""
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(tokens=tokens)
    loss = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, 0.0 * coef_T, bias=bias_V, backend=backend
    ).loss
    dropped_T = targets_T.fill_(-100)
    logp_T = linear_logprob(hidden_TD, weight_VD, dropped_T, bias=bias_V, backend=backend).logp
    for value in (loss, logp_T.sum()):
        assert value.item() == 0.0
        for got, leaf in zip(
            gradients(value, hidden_TD, weight_VD, bias_V),
            (hidden_TD, weight_VD, bias_V),
            strict=True,
        ):
            assert torch.equal(got, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dweight_out_accumulates_and_leaves_the_weight_alone(backend):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.bfloat16)
    dweight_VD = torch.full((V, D), 2.0)
    for _ in range(3):
        loss = weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, dweight_out=dweight_VD, backend=backend
        ).loss
        loss.backward()
    full_hidden_TD, full_weight_VD = float64_leaves(hidden_TD, weight_VD)
    truth = (coef_T * oracle(full_hidden_TD, full_weight_VD, targets_T)[0]).sum()
    assert_close((dweight_VD - 2.0,), (3 * gradients(truth, full_weight_VD)[0],), 4e-3)
    assert weight_VD.grad is None
    kept_VD = dweight_VD.clone()
    with torch.no_grad():
        weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, dweight_out=dweight_VD, backend=backend
        )
    assert torch.equal(dweight_VD, kept_VD)
    loss = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, coef_T, dweight_out=dweight_VD, backend=backend
    ).loss
    with pytest.raises(ValueError, match="into the coefficients"):
        (0.5 * loss).backward()


def misplaced_sinks(hidden_TD, weight_VD, bias_V, coef_T):
    """By what the error says: buffers (V, D) of which no entry may be written."""
    flat = torch.zeros(V * D + D)
    weight_VD.grad = flat[: V * D].view(V, D)
    return {
        "memory of weight_VD": [weight_VD.detach(), weight_VD.data],
        "memory of hidden_TD": [hidden_TD.detach().flatten()[: V * D].view(V, D)],
        "memory of bias": [bias_V.detach().as_strided((V, D), (D, 1))],
        "memory of coef_T": [coef_T.as_strided((V, D), (D, 1))],
        "memory of weight.grad in another layout": [
            flat[D:].view(V, D),
            flat[: V * D].view(D, V).T,
        ],
        "its entries share memory": [
            torch.zeros(1, D).expand(V, D),
            torch.zeros(V + D).as_strided((V, D), (1, 1)),
        ],
    }


def test_a_sink_in_the_memory_of_something_else_is_refused_in_words():
    """dW would be added to the weight, or to the gradient of other classes, without a word."""
    torch.manual_seed(0)
    tokens = V + 2
    hidden_TD = torch.randn(tokens, D, requires_grad=True)
    weight_VD = torch.randn(V, D, requires_grad=True)
    bias_V, coef_T = torch.randn(V * D)[:V], torch.randn(V * D)[:tokens]
    bias_V.requires_grad_()
    targets_T = torch.arange(tokens) % V
    call = (hidden_TD, weight_VD, targets_T, coef_T)
    kept = [x.detach().clone() for x in (hidden_TD, weight_VD, bias_V, coef_T)]
    sinks = misplaced_sinks(hidden_TD, weight_VD, bias_V, coef_T)
    for words, bad in sinks.items():
        for sink_VD in bad:
            with pytest.raises(ValueError, match=words) as caught:
                weighted_logprob_loss(*call, bias=bias_V, dweight_out=sink_VD)
            assert "\n" not in str(caught.value)
            assert "; pass" in str(caught.value) or ", pass" in str(caught.value)
    assert all(map(torch.equal, kept, (hidden_TD, weight_VD, bias_V, coef_T)))
    assert not weight_VD.grad.any()  # type: ignore[union-attr]
    # weight.grad itself, and a neighbour of the weight in one flat buffer, are right.
    expected_VD = torch.zeros(V, D)
    weighted_logprob_loss(*call, bias=bias_V, dweight_out=expected_VD)
    weighted_logprob_loss(*call, bias=bias_V, dweight_out=weight_VD.grad)
    both = torch.zeros(2 * V, D)
    both[:V] = weight_VD.detach()
    moved = (hidden_TD, both[:V].requires_grad_(), targets_T, coef_T)
    weighted_logprob_loss(*moved, bias=bias_V, dweight_out=both.detach()[V:])
    assert torch.equal(weight_VD.grad, expected_VD)  # type: ignore[arg-type]
    assert torch.equal(both[V:], expected_VD)


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
@pytest.mark.parametrize("op", ["one pass", "recompute"])
def test_frozen_tensors_cost_nothing(op, frozen):
    """A frozen tensor gets no gradient, and no GEMM is spent on it."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float32)
    hidden_TD.requires_grad_(frozen == "weight")
    weight_VD.requires_grad_(frozen == "hidden")

    def run():
        if op == "one pass":
            return weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T).loss
        return (coef_T * linear_logprob(hidden_TD, weight_VD, targets_T).logp).sum()

    with Recorder() as recorder:
        loss = run()
        if frozen != "both":
            loss.backward()
    extra = {"one pass": 0, "recompute": 1}[op]  # the logits, made twice by the recomputing op
    assert recorder.gemms == (1 if frozen == "both" else 2 + extra)
    assert loss.requires_grad == (frozen != "both")
    assert (hidden_TD.grad is None) == (frozen != "weight")
    assert (weight_VD.grad is None) == (frozen != "hidden")


def test_no_grad_computes_the_value_only():
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float32)
    with torch.no_grad(), Recorder() as recorder:
        ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T)
    assert recorder.gemms == 1
    assert not ours.loss.requires_grad
    assert torch.equal(ours.logp, linear_logprob(hidden_TD, weight_VD, targets_T).logp)


def test_tied_embeddings_receive_both_gradients():
    weight_VD = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ids_T, targets_T = torch.randint(0, V, (2, T))
    coef_T = torch.randn(T, dtype=torch.float64)
    ours = weighted_logprob_loss(weight_VD[ids_T], weight_VD, targets_T, coef_T).loss
    truth = (coef_T * oracle(weight_VD[ids_T], weight_VD, targets_T)[0]).sum()
    assert_close(gradients(ours, weight_VD), gradients(truth, weight_VD), 1e-12)


@pytest.mark.parametrize("op", ["one pass", "recompute"])
def test_backward_twice_and_double_backward_are_errors(op):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case()

    def run():
        if op == "one pass":
            return weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T).loss
        return linear_logprob(hidden_TD, weight_VD, targets_T).logp.sum()

    loss = run()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(run(), hidden_TD, create_graph=True)


def test_int32_targets_and_strided_inputs():
    """Column slices of a wider hidden state and weight, int32 targets: the same result."""
    wide_hidden, wide_weight = torch.randn(T, 2 * D), torch.randn(V, 2 * D)
    targets_T, coef_T = torch.randint(0, V, (T,)), torch.randn(T)

    def run(hidden_TD, weight_VD, targets_T):
        hidden_TD, weight_VD = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
        ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T)
        return ours.logp, *gradients(ours.loss, hidden_TD, weight_VD)

    strided = run(wide_hidden[:, ::2], wide_weight[:, ::2], targets_T.int())
    dense = run(wide_hidden[:, ::2].contiguous(), wide_weight[:, ::2].contiguous(), targets_T)
    assert_close(strided, dense, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    """Stride 0 anywhere: one hidden row for all tokens, one weight row for all classes, scalars."""
    row_1D, weight_VD = torch.randn(1, D), torch.randn(V, D)
    targets_T = torch.tensor(3).expand(T)
    coef_T, temperature_T = torch.tensor(-0.5).expand(T), torch.tensor(0.8).expand(T)

    def run(dense, weight_VD):
        given = [row_1D.expand(T, D), weight_VD, targets_T, coef_T, temperature_T]
        if dense:
            given = [x.clone(memory_format=torch.contiguous_format) for x in given]
        hidden, weight, targets, coef, temperature = given
        hidden.requires_grad_()
        weight.requires_grad_()
        ours = weighted_logprob_loss(
            hidden, weight, targets, coef, temperature=temperature, backend=backend
        )
        return ours.logp, *gradients(ours.loss, hidden, weight)

    for weight in (weight_VD, weight_VD[:1].expand(V, D)):
        assert_close(run(False, weight), run(True, weight), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_sink(backend):
    """dweight_out may be a transposed buffer, or columns of a wider one."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float32)
    sinks = torch.zeros(V, D), torch.zeros(D, V).T, torch.zeros(V, 2 * D)[:, ::2]
    for sink_VD in sinks:
        loss = weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, dweight_out=sink_VD, backend=backend
        ).loss
        assert loss.requires_grad
        assert_close((sink_VD,), (sinks[0],), 1e-6)


class Recorder(TorchDispatchMode):
    """Counts GEMMs, and the bytes alive at once among the tensors made while it is active; names
    the ops."""

    def __init__(self):
        super().__init__()
        self.gemms = self.alive = self.peak = self.largest = 0
        self.owners, self.names = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        out = func(*args, **(kwargs or {}))
        self.gemms += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        self.gemms += func.overloadpacket is torch.ops.aten.addmm_
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if torch.is_tensor(x)}
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage().nbytes():
                self.follow(x, made=x.untyped_storage()._cdata not in given)
        return out

    def follow(self, x, *, made):
        # Of the storage, not of its bytes: on the meta device there are none.
        pointer, size = x.untyped_storage()._cdata, x.untyped_storage().nbytes()
        if pointer not in self.owners:
            if not made:
                return
            self.owners[pointer] = 0
            self.alive += size
            self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        self.owners[pointer] += 1
        weakref.finalize(x, self.release, pointer, size)

    def release(self, pointer, size):
        self.owners[pointer] -= 1
        if not self.owners[pointer]:
            del self.owners[pointer]
            self.alive -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"entropy": True}])
def test_memory_stays_under_the_budget(options, dtype):
    """Peak of all that is alive: chunk_bytes, what is returned, rows that do not grow with V."""
    tokens, vocabulary, budget = 512, 4001, 1 << 20
    hidden_TD = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(vocabulary, D, dtype=dtype, requires_grad=True)
    targets_T, coef_T = torch.randint(0, vocabulary, (tokens,)), torch.randn(tokens)
    softcap = options.get("softcap")
    with Recorder() as recorder:
        if "entropy" in options:
            out = linear_logprob(
                hidden_TD, weight_VD, targets_T, return_entropy=True, chunk_bytes=budget
            )
            assert out.entropy is not None
            (out.logp.sum() + out.entropy.sum()).backward()
        else:
            weighted_logprob_loss(
                hidden_TD, weight_VD, targets_T, coef_T, softcap=softcap, chunk_bytes=budget
            ).loss.backward()
    weights = 4 * weight_VD.numel()  # dW and its copy in the weight's dtype
    rows = 4 * (4 * hidden_TD.numel() + 32 * tokens)
    assert recorder.largest <= budget
    assert recorder.peak <= budget + 2 * weights + rows < 4 * tokens * vocabulary


def test_a_half_precision_chunk_of_a_cpu_has_as_many_rows_as_a_float32_one():
    """Its logits are float32 ones, and dz is rounded in their place: 4 bytes a logit, not 6."""
    gemms = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden_TD = torch.randn(64, D, dtype=dtype, requires_grad=True)
        weight_VD = torch.randn(1001, D, dtype=dtype, requires_grad=True)
        targets_T, coef_T = torch.randint(0, 1001, (64,)), torch.randn(64)
        with Recorder() as recorder:
            weighted_logprob_loss(
                hidden_TD, weight_VD, targets_T, coef_T, backend="torch", chunk_bytes=16 * 1001 * 4
            )
        gemms[dtype] = recorder.gemms
    assert gemms == dict.fromkeys(gemms, 3 * 64 // 16)


@pytest.mark.slow
def test_default_chunks_take_a_sixth_of_the_memory():
    """Of what torch holds for the full logits, gradients counted; our backward only scales."""
    hidden_TD = torch.randn(2048, 512, requires_grad=True)
    weight_VD = torch.randn(32768, 512, requires_grad=True)
    targets_T, coef_T = torch.randint(0, 32768, (2048,)), torch.randn(2048)
    with Recorder() as ours:
        weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend="torch")
    with Recorder() as eager:
        nll_T = torch.nn.functional.cross_entropy(
            hidden_TD @ weight_VD.T, targets_T, reduction="none"
        )
        nll_T.backward(-coef_T)
    assert ours.peak <= eager.peak / 6


@pytest.mark.slow
def test_bfloat16_takes_half_of_eagers_memory():
    """At (1024, 512, 32768). Eager torch runs on the meta device: its products would take minutes
    on a CPU without bfloat16 units, and allocate the same."""
    hidden_TD = torch.randn(1024, 512, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(32768, 512, dtype=torch.bfloat16, requires_grad=True)
    targets_T, coef_T = torch.randint(0, 32768, (1024,)), torch.randn(1024)
    with Recorder() as ours:
        weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, backend="torch"
        ).loss.backward()
    far = [x.detach().to("meta").requires_grad_() for x in (hidden_TD, weight_VD)]
    with Recorder() as eager:
        z_TV = torch.nn.functional.linear(*far).float()
        nll_T = torch.nn.functional.cross_entropy(z_TV, targets_T.to("meta"), reduction="none")
        nll_T.backward(-coef_T.to("meta"))
    # Logits in bfloat16 and float32, log-softmax and its gradient at least.
    assert eager.peak > 1024 * 32768 * (2 + 4 + 4)
    assert ours.peak <= eager.peak / 2


class NoFloat64(TorchDispatchMode):
    """A device without float64, as MPS: making a tensor of it is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if torch.is_tensor(x) and x.dtype is torch.float64]
        assert not made, f"{func} makes float64"
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_float64_where_mps_has_none(backend, monkeypatch):
    """`wide` is the only place that asks for the device; here the CPU gets the answer of MPS."""
    post_TD, weight_VD, bias_V, targets_T, coef_T = head_case(torch.float32)
    prior_TD = head_case(torch.float32)[0]
    options = {"bias": bias_V, "softcap": 3.0, "backend": backend, "chunk_bytes": CHUNK}

    def everything():
        lone = linear_logprob(post_TD, weight_VD, targets_T, return_entropy=True, **options)
        weighted = weighted_logprob_loss(post_TD, weight_VD, targets_T, coef_T, **options)
        both = vpgea_loss(
            post_TD, prior_TD, weight_VD, targets_T, CU, ADVANTAGE.float(), denominator=9, **options
        )
        values = (lone.logp.sum() + lone.entropy.sum(), weighted.loss, both.loss)
        return [x for loss in values for x in (loss, *gradients(loss, post_TD, weight_VD))]

    exact = everything()
    answer = head.wide(torch.device("mps"))
    for module in (head, streams):
        monkeypatch.setattr(module, "wide", lambda _: answer)
    with NoFloat64():
        narrow = everything()
    assert_close(narrow, exact, 1e-6)
    assert answer is torch.float32
    monkeypatch.undo()
    assert head.wide(torch.device("cpu")) is torch.float64
    with pytest.raises(AssertionError, match="makes float64"), NoFloat64():
        everything()


BAD_CALLS = {
    "target V": ({"targets_T": torch.full((T,), V)}, r"outside \[0, V = 61\)"),
    "negative target": ({"targets_T": torch.full((T,), -1)}, "outside"),
    "float targets": ({"targets_T": torch.zeros(T)}, "int64 or int32"),
    "short targets": ({"targets_T": torch.zeros(T - 1, dtype=torch.int64)}, r"expected \(23,\)"),
    "3-D hidden": ({"hidden_TD": torch.zeros(1, T, D)}, "flatten"),
    "sharded weight": ({"weight_VD": torch.zeros(V * D)}, "sharded"),
    "other width": ({"weight_VD": torch.zeros(V, D + 1)}, r"\(T, D\) and \(V, D\)"),
    "one class": ({"weight_VD": torch.zeros(1, D)}, "at least 2"),
    "mixed dtypes": ({"weight_VD": torch.zeros(V, D).bfloat16()}, "cast one"),
    "int hidden": ({"hidden_TD": torch.zeros(T, D, dtype=torch.int64)}, "float16, bfloat16"),
    "other device": ({"weight_VD": torch.zeros(V, D, device="meta")}, "move one"),
    "short coefficients": ({"coef_T": torch.zeros(T - 1)}, r"coef_T.*expected \(23,\)"),
    "int coefficients": ({"coef_T": torch.zeros(T, dtype=torch.int64)}, "float tensor"),
    "live coefficients": ({"coef_T": torch.ones(T, requires_grad=True)}, "linear_logprob"),
    "bias": ({"bias": torch.zeros(V + 1)}, r"bias.*expected \(61,\)"),
    "temperature 0": ({"temperature": 0.0}, "positive"),
    "temperatures": ({"temperature": torch.zeros(T)}, "positive"),
    "softcap": ({"softcap": -1.0}, "positive number or None"),
    "logit_scale": ({"logit_scale": math.nan}, "finite"),
    "chunk_bytes": ({"chunk_bytes": 0}, "positive"),
    "int bias": ({"bias": torch.zeros(V, dtype=torch.int64)}, r"bias: got torch.int64.*cast it"),
    "bool bias": ({"bias": torch.zeros(V, dtype=torch.bool)}, "bias: got torch.bool.*cast it"),
    "complex bias": (
        {"bias": torch.zeros(V, dtype=torch.complex64)},
        "bias: got torch.complex64.*cast it",
    ),
    "temperature text": ({"temperature": "1.0"}, "temperature: got '1.0', expected a positive"),
    "no temperature": ({"temperature": None}, "temperature: got None, expected a positive"),
    "tensor softcap": ({"softcap": torch.tensor(5.0)}, r"softcap: got a Tensor.*float\(softcap\)"),
    "tensor scale": (
        {"logit_scale": torch.tensor(1.0)},
        r"logit_scale: got a Tensor.*float\(logit_scale\)",
    ),
    "bool scale": ({"logit_scale": True}, "logit_scale: got True, expected a finite number"),
    "float ignore_index": ({"ignore_index": -100.0}, "ignore_index: got -100.0, expected an int"),
    "bool ignore_index": ({"ignore_index": False}, "ignore_index: got False, expected an int"),
    "no ignore_index": ({"ignore_index": None}, "ignore_index: got None, expected an int"),
    "float chunk_bytes": ({"chunk_bytes": 1e6}, "chunk_bytes: got 1000000.0, expected a positive"),
    "bool chunk_bytes": ({"chunk_bytes": True}, "chunk_bytes: got True, expected a positive int"),
    "rows": ({"rows": torch.zeros(T, dtype=torch.bool)}, "int64 indices"),
    "rows past the end": ({"rows": torch.tensor([0, T])}, r"rows must lie in \[0, T = 23\)"),
    "negative rows": ({"rows": torch.tensor([-1])}, "rows must lie"),
    "rows twice": ({"rows": torch.tensor([4, 1, 4])}, "names a row twice"),
    "backend": ({"backend": "cuda"}, "available"),
    "batch_invariant": ({"batch_invariant": True, "backend": "torch"}, "needs CUDA: 'triton'"),
    "sink dtype": ({"dweight_out": torch.zeros(V, D).bfloat16()}, "expected torch.float32"),
    "sink shape": ({"dweight_out": torch.zeros(V, D + 1)}, r"expected \(61, 12\)"),
    "expanded sink": ({"dweight_out": torch.zeros(1, D).expand(V, D)}, "share memory"),
    "other sink": ({"dweight_out": torch.zeros(V, D, device="meta")}, "on meta"),
    "targets elsewhere": ({"targets_T": torch.zeros(T, dtype=torch.int64, device="meta")}, "move"),
    "coefficients elsewhere": ({"coef_T": torch.zeros(T, device="meta")}, "tensor on cpu"),
    "live sink": ({"dweight_out": torch.zeros(V, D, requires_grad=True)}, "plain buffer"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_do(name):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float32)
    call = {"hidden_TD": hidden_TD, "weight_VD": weight_VD, "targets_T": targets_T}
    changed, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        weighted_logprob_loss(**{**call, "coef_T": coef_T, **changed})


def valid_calls():
    """Each public function with a valid value for every argument."""
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(torch.float32)
    head = {
        "weight_VD": weight_VD,
        "bias": bias_V,
        "temperature": 0.9,
        "softcap": 3.0,
        "logit_scale": 1.1,
        "ignore_index": -100,
        "backend": "torch",
        "rows": None,
        "chunk_bytes": CHUNK,
        "batch_invariant": False,
        "validate": False,
    }
    rows = {"hidden_TD": hidden_TD, "targets_T": targets_T}
    streams = {"hidden_post_TD": hidden_TD, "hidden_prior_UD": hidden_TD}
    sink = {"dweight_out": torch.zeros(V, D)}
    return {
        linear_logprob: {**head, **rows, "return_entropy": True},
        weighted_logprob_loss: {**head, **rows, **sink, "coef_T": coef_T},
        two_stream_loss: {
            **head,
            **streams,
            **sink,
            "targets_post_T": targets_T,
            "targets_prior_U": targets_T,
            "coef_post_T": coef_T,
            "coef_prior_U": coef_T,
        },
        vpgea_loss: {
            **head,
            **streams,
            **sink,
            "targets_T": targets_T,
            "cu_seqlens": CU,
            "advantage_S": ADVANTAGE,
            "denominator": 4.0,
            "weight_S": None,
            "prior_index": None,
            "beta": 0.5,
        },
    }


HOSTILE = [
    *(None, 1, 0, -1, 0.5, math.nan, math.inf, 10**30, 1e308, 5e-324, 1 + 2j, True, "text", [], {}),
    *([1.0] * T, (1, 2), object(), numpy.float32(1), numpy.int64(1), numpy.zeros(T), torch.int32),
    torch.nn.Linear(D, V),
    torch.tensor(1.0, requires_grad=True),
    *(
        torch.zeros(shape).to(dtype)
        for shape in [(), (0,), (1,), (T,), (V,), (6,), (T, D), (V, D), (1, T, D), (T, 1)]
        for dtype in (torch.complex64, torch.float8_e4m3fn, torch.bool, torch.int16)
    ),
    *(torch.zeros(s, device="meta") for s in [(), (T,), (V,), (6,), (T, D), (V, D)]),
    *(torch.zeros(s).to_sparse() for s in [(T,), (T, D), (V, D)]),
    torch.nested.nested_tensor([torch.zeros(2, D), torch.zeros(T - 2, D)], layout=torch.jagged),
    torch.zeros(T, D, dtype=torch.float16),
    torch.zeros(V, D, dtype=torch.float64),
    *(torch.ones(s, requires_grad=True) for s in [(T,), (6,)]),
]


@pytest.mark.parametrize(
    "function", [linear_logprob, weighted_logprob_loss, two_stream_loss, vpgea_loss]
)
def test_any_argument_may_be_anything(function):
    """A ValueError that names the argument, or a result that is a number; never another error."""
    call = valid_calls()[function]
    for name in call:
        stem = re.sub("_[A-Z]+$", "", name)
        refused = []
        for value in HOSTILE:
            instead = {"denominator": None} if name == "weight_S" and value is not None else {}
            try:
                out = function(**{**call, name: value, **instead})
            except ValueError as error:
                refused.append(str(error))
            else:
                values = [x for x in vars(out).values() if x is not None]
                assert all(x.isfinite().all() for x in values), (name, value)
        assert len(refused) >= len(HOSTILE) - 12, name
        assert not [words for words in refused if stem not in words], name


NO_TENSORS = {
    "float": (0.5, r"got 0.5 \(float\), expected a tensor; pass torch.full\("),
    "int": (1, r"got 1 \(int\), expected a tensor; pass torch.full\("),
    "list": ([0.5] * T, r"\(list\), expected a tensor; pass torch.as_tensor\("),
    "array": (numpy.zeros(T), r"\(ndarray\), expected a tensor; pass torch.as_tensor\("),
    "nothing": (None, r"got None \(NoneType\), expected a tensor"),
    "module": (torch.nn.Linear(D, V), r"\(Linear\), expected a tensor; pass the module's weight"),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("name", ["coef_T", "targets_T", "weight_VD", "hidden_TD"])
def test_what_is_no_tensor_is_told_what_to_pass(name, kind):
    value, message = NO_TENSORS[kind]
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        weighted_logprob_loss(**{**valid_calls()[weighted_logprob_loss], name: value})


@pytest.mark.filterwarnings("ignore:.*redistribute:UserWarning")
def test_a_dtensor_names_the_remedy(tmp_path):
    """Replicated or sharded, whichever argument it is: no silent gather, no local shard."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Replicate(), Shard(0)):
            # By classes the losses take it: test_shards.py.
            other = Shard(1) if placement.is_shard() else placement
            hidden = distribute_tensor(hidden_TD.detach(), mesh, [placement])
            weight = distribute_tensor(weight_VD.detach(), mesh, [other])
            with pytest.raises(ValueError, match=r"weight_VD is a DTensor.*grad_placements=\[Part"):
                weighted_logprob_loss(hidden_TD, weight, targets_T, coef_T)
            with pytest.raises(ValueError, match=r"hidden_TD is a DTensor.*hidden_TD.to_local\(\)"):
                linear_logprob(hidden, weight_VD, targets_T)
            coef, sink = (
                distribute_tensor(x, mesh, [placement])
                for x in (coef_T, torch.zeros_like(weight_VD))
            )
            with pytest.raises(ValueError, match=r"coef_T is a DTensor.*coef_T.to_local\(\)"):
                weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef)
            with pytest.raises(ValueError, match=r"dweight_out is a DTensor.*a plain buffer"):
                weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, dweight_out=sink)
            with pytest.raises(ValueError, match=r"hidden_prior is a DTensor.*to_local"):
                two_stream_loss(hidden_TD, hidden, weight_VD, targets_T, targets_T, coef_T, coef_T)
    finally:
        dist.destroy_process_group()


RANKS_TOKENS = 12


def head_of_all_ranks():
    """The same on every rank: what one process would have, float64."""
    torch.manual_seed(3)
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(tokens=RANKS_TOKENS)
    return hidden_TD, weight_VD, bias_V, targets_T, coef_T.double()


def as_advised(name, call, plain):
    """What the error about the DTensor `name` says to pass, evaluated."""
    from torch.distributed.tensor import Partial

    with pytest.raises(ValueError, match=f"{name} is a DTensor") as refused:
        call()
    words = r"pass .*?(\w+\.(?:to_local\(\)|full_tensor\(grad_placements=\[.*?\]\)))"
    (advice,) = re.findall(words, str(refused.value))
    return eval(advice, {name: plain, "Partial": Partial})


def follow_the_advice(shape, by):
    """Errors of dX, dW and db against one process, for DTensors on a mesh of this shape."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    with process_group():
        mesh = init_device_mesh("cpu", shape)
        hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_of_all_ranks()
        truth = (coef_T * oracle(hidden_TD, weight_VD, targets_T, bias=bias_V)[0]).sum()
        expected = gradients(truth, hidden_TD, weight_VD, bias_V)
        # FSDP keeps a shard on the last dimension and copies along the ones before; data is cut
        # over all of them.
        laid_out = [Replicate()] * (len(shape) - 1) + [{"shard": Shard(0), "copy": Replicate()}[by]]
        weight, bias = (distribute_tensor(x.detach(), mesh, laid_out).requires_grad_()
                        for x in (weight_VD, bias_V))  # fmt: skip
        data = [Shard(0)] * len(shape)
        hidden = distribute_tensor(hidden_TD.detach(), mesh, data).requires_grad_()
        targets, coef = (distribute_tensor(x, mesh, data) for x in (targets_T, coef_T))

        def call(hidden, weight, targets, coef, bias):
            return weighted_logprob_loss(hidden, weight, targets, coef, bias=bias).loss

        h = as_advised("hidden_TD", lambda: call(hidden, weight_VD, targets, coef, None), hidden)
        t = as_advised("targets_T", lambda: call(h, weight_VD, targets, coef, None), targets)
        c = as_advised("coef_T", lambda: call(h, weight_VD, t, coef, None), coef)
        w = as_advised("weight_VD", lambda: call(h, weight, t, c, None), weight)
        b = as_advised("bias", lambda: call(h, w, t, c, bias), bias)
        logp_T = linear_logprob(h, w, t, bias=b).logp
        found = {}
        for name, loss in (("one pass", call(h, w, t, c, b)), ("recompute", (c * logp_T).sum())):
            got = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
            found[name] = [relative(g.full_tensor(), e) for g, e in zip(got, expected, strict=True)]
        plain = torch.autograd.grad(call(h, weight.full_tensor(), t, c, None), weight)[0]
        return found, relative(plain.full_tensor(), expected[1])


@contextmanager
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def relative(got, truth):
    return ((got - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    ("shape", "by"), [((2,), "shard"), ((2,), "copy"), ((2, 1), "shard"), ((2, 2), "shard")]
)
def test_the_advice_about_a_dtensor_gives_the_gradient_of_one_process(shape, by):
    """Taken from the error and evaluated, for each argument; plain full_tensor() is far off."""
    for found, plain in run_ranks(follow_the_advice, shape, by, size=math.prod(shape)):
        for errors in found.values():
            assert max(errors) < 1e-13
        assert plain > 0.1


def same_tokens_on_every_rank():
    """Replicate() where the ranks hold the same tokens; and FSDP2's own hooks, which average."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    class Head(torch.nn.Module):
        def __init__(self, weight_VD, bias_V):
            super().__init__()
            self.weight, self.bias = (torch.nn.Parameter(x.detach()) for x in (weight_VD, bias_V))

        def forward(self, hidden_TD, targets_T, coef_T):
            return weighted_logprob_loss(
                hidden_TD, self.weight, targets_T, coef_T, bias=self.bias
            ).loss

    with process_group():
        mesh = init_device_mesh("cpu", (2,))
        hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_of_all_ranks()
        truth = (coef_T * oracle(hidden_TD, weight_VD, targets_T, bias=bias_V)[0]).sum()
        _, dweight_VD, dbias_V = gradients(truth, hidden_TD, weight_VD, bias_V)
        weight = distribute_tensor(weight_VD.detach(), mesh, [Shard(0)]).requires_grad_()
        whole = weight.full_tensor(grad_placements=[Replicate()])
        loss = weighted_logprob_loss(hidden_TD, whole, targets_T, coef_T, bias=bias_V).loss
        alike = torch.autograd.grad(loss, weight)[0].full_tensor()
        layer = Head(weight_VD, bias_V)
        fully_shard(layer, mesh=mesh)
        mine = slice(mesh.get_rank(), None, 2)
        layer(hidden_TD[mine], targets_T[mine], 2 * coef_T[mine]).backward()
        gathered = [p.grad.full_tensor() for p in (layer.weight, layer.bias)]
        return [
            relative(g, e)
            for g, e in zip((alike, *gathered), (dweight_VD, dweight_VD, dbias_V), strict=True)
        ]


def test_the_same_tokens_on_every_rank_and_the_hooks_of_fsdp():
    for errors in run_ranks(same_tokens_on_every_rank):
        assert max(errors) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_are_the_sum_of_two_losses(backend):
    post_TD, weight_VD, _, targets_T, coef_T = head_case()
    prior_UD, _, _, targets_U, coef_U = head_case(tokens=9)
    coef_U[4], targets_T[2], coef_T[2] = 0.0, -100, math.nan
    ours = two_stream_loss(
        post_TD,
        prior_UD,
        weight_VD,
        targets_T,
        targets_U,
        coef_T,
        coef_U,
        backend=backend,
        chunk_bytes=CHUNK,
        rows=torch.cat((torch.arange(T), T + torch.arange(9))) if backend == "torch" else None,
    )
    logq_T = oracle(post_TD, weight_VD, targets_T)[0]
    logp_U = oracle(prior_UD, weight_VD, targets_U)[0]
    truth = (coef_T.nan_to_num() * logq_T).sum(), (coef_U * logp_U).sum()
    assert_close((ours.loss_post, ours.loss_prior, ours.loss), (*truth, sum(truth)), 1e-6)
    assert_close((ours.logp_post, ours.logp_prior), (logq_T, logp_U * (coef_U != 0)), 1e-12)
    assert ours.kept_post.sum() == T - 1
    assert ours.kept_prior.sum() == 8
    leaves = (post_TD, prior_UD, weight_VD)
    assert_close(gradients(ours.loss, *leaves), gradients(sum(truth), *leaves), 1e-12)


@pytest.mark.parametrize("empty", ["post", "prior", "both"])
def test_a_stream_may_be_empty(empty):
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case()
    none = torch.zeros(0, D, dtype=torch.float64, requires_grad=True), targets_T[:0], coef_T[:0]
    full = hidden_TD, targets_T, coef_T
    post, prior = (none if empty in (name, "both") else full for name in ("post", "prior"))
    ours = two_stream_loss(post[0], prior[0], weight_VD, post[1], prior[1], post[2], prior[2])
    truth = (coef_T * oracle(hidden_TD, weight_VD, targets_T)[0]).sum() * (empty != "both")
    assert_close((ours.loss_post + ours.loss_prior, ours.loss), (truth, truth), 1e-6)
    got = gradients(ours.loss, weight_VD)
    assert_close(got, gradients(truth, weight_VD), 1e-12)


def test_two_streams_check_each_stream():
    """A row too many in one stream and one too few in the other must not cancel out."""
    post_TD, weight_VD, _, targets_T, coef_T = head_case()
    with pytest.raises(ValueError, match="targets_post"):
        two_stream_loss(
            post_TD,
            post_TD,
            weight_VD,
            torch.cat((targets_T, targets_T[:1])),
            targets_T[1:],
            coef_T,
            coef_T,
        )
    with pytest.raises(ValueError, match="hidden_prior"):
        two_stream_loss(post_TD, post_TD.float(), weight_VD, targets_T, targets_T, coef_T, coef_T)
    away = post_TD.to("meta")
    with pytest.raises(ValueError, match="hidden_prior is on meta, weight_VD on cpu: move one"):
        two_stream_loss(post_TD, away, weight_VD, targets_T, targets_T, coef_T, coef_T)


CU = torch.tensor([0, 4, 4, 9, 15, 21, T])
ADVANTAGE = torch.tensor([1.3, 0.7, -0.8, 0.0, 0.2, -1.1], dtype=torch.float64)


def vpgea_truth(post_TD, prior_TD, weight_VD, targets_T, weight_S, beta, advantage_S=ADVANTAGE):
    """The published formula, sequence by sequence, by float64 autograd."""
    logq_T = oracle(post_TD, weight_VD, targets_T)[0]
    logp_T = oracle(prior_TD, weight_VD, targets_T)[0]
    total, sums = torch.zeros((), dtype=torch.float64), []
    for s in range(6):
        span = slice(int(CU[s]), int(CU[s + 1]))
        logq, logp = logq_T[span].sum(), logp_T[span].sum()
        gate = advantage_S[s] > 0
        total = total + weight_S[s] * (
            -advantage_S[s] * logq + beta * gate.double() * (logq.detach() - logp)
        )
        sums.append((logq.detach(), logp.detach()))
    return total, sums


@pytest.mark.parametrize("held", ["all", "gated", "shuffled"])
@pytest.mark.parametrize("weights", ["denominator", "tensor denominator", "weight_S"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vpgea_loss_is_the_published_formula(backend, weights, held):
    post_TD, weight_VD, _, targets_T, _ = head_case()
    prior_TD = head_case()[0]
    index = {"all": None, "gated": [0, 1, 4], "shuffled": [4, 2, 0, 1]}[held]
    prior_UD = prior_TD
    if index is not None:
        prior_UD = torch.cat([prior_TD[CU[s] : CU[s + 1]] for s in index])
    given, weight_S = {
        "denominator": ({"denominator": 48}, torch.full((6,), 1 / 48, dtype=torch.float64)),
        "tensor denominator": (
            {"denominator": torch.tensor(48.0)},
            torch.full((6,), 1 / 48, dtype=torch.float64),
        ),
        "weight_S": (
            {"weight_S": torch.arange(1.0, 7.0, dtype=torch.float64)},
            torch.arange(1.0, 7.0, dtype=torch.float64),
        ),
    }[weights]
    ours = vpgea_loss(
        post_TD,
        prior_UD,
        weight_VD,
        targets_T,
        CU,
        ADVANTAGE,
        prior_index=None if index is None else torch.tensor(index),
        beta=0.4,
        backend=backend,
        chunk_bytes=CHUNK,
        **given,
    )
    truth, sums = vpgea_truth(post_TD, prior_TD, weight_VD, targets_T, weight_S, 0.4)
    assert_close((ours.loss,), (truth,), 1e-9)
    assert_close((ours.loss,), (ours.pg_loss + 0.4 * ours.distill_loss,), 1e-9)
    leaves = (post_TD, prior_TD, weight_VD)
    assert_close(gradients(ours.loss, *leaves), gradients(truth, *leaves), 1e-9)
    assert torch.equal(ours.gate_S, ADVANTAGE > 0)
    logq_S, logp_S = torch.tensor(sums, dtype=torch.float64).T
    assert_close((ours.logq_S,), (logq_S * (ADVANTAGE != 0),), 1e-12)
    assert_close((ours.logp_S,), (logp_S * (ADVANTAGE > 0),), 1e-12)


def test_float32_advantages_of_float64_states_are_weighed_in_float64():
    post_TD, weight_VD, _, targets_T, _ = head_case()
    advantage_S = ADVANTAGE.float()
    ours = vpgea_loss(post_TD, post_TD, weight_VD, targets_T, CU, advantage_S, denominator=3.0)
    logq_T = oracle(post_TD, weight_VD, targets_T)[0].detach()
    parts = zip(advantage_S.double(), logq_T.split(CU.diff().tolist()), strict=True)
    assert_close((ours.loss,), (-sum(a * q.sum() for a, q in parts) / 3,), 1e-12)


def test_reference_vpgea_loss_is_the_published_formula():
    post_TD, weight_VD, _, targets_T, _ = head_case()
    prior_TD = head_case()[0]
    weight_S = torch.rand(6, dtype=torch.float64)
    ours = reference.vpgea_loss(
        post_TD, prior_TD, weight_VD, targets_T, CU, ADVANTAGE, weight_S, beta=0.3
    )
    truth, _ = vpgea_truth(post_TD, prior_TD, weight_VD, targets_T, weight_S, 0.3)
    leaves = (post_TD, prior_TD, weight_VD)
    assert_close((ours, *gradients(ours, *leaves)), (truth, *gradients(truth, *leaves)), 1e-12)


def test_vpgea_loss_computes_only_what_has_a_coefficient():
    """beta = 0 drops the prior stream, A = 0 its sequence: their rows may hold NaN."""
    post_TD, weight_VD, _, targets_T, _ = head_case(torch.bfloat16)
    with torch.no_grad():
        post_TD[CU[3] : CU[4]] = math.nan
    prior_TD = torch.full_like(post_TD, math.nan)
    ours = vpgea_loss(
        post_TD,
        prior_TD,
        weight_VD,
        targets_T,
        CU,
        ADVANTAGE.bfloat16(),
        denominator=6.0,
        beta=0.0,
    )
    assert torch.isfinite(ours.loss)
    assert torch.equal(ours.loss.detach(), ours.pg_loss)
    assert ours.distill_loss == 0
    assert torch.equal(ours.logp_S, torch.zeros(6))
    assert ours.logq_S[3] == 0


def test_vpgea_loss_of_nothing():
    weight_VD = torch.randn(V, D, requires_grad=True)
    hidden_TD = torch.zeros(0, D, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    ours = vpgea_loss(
        hidden_TD,
        hidden_TD,
        weight_VD,
        none,
        torch.tensor([0]),
        torch.zeros(0),
        denominator=8,
        prior_index=none,
    )
    ours.loss.backward()
    assert ours.loss == 0
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()


BAD_VPGEA = {
    "no weight": ({}, "neither"),
    "two weights": ({"denominator": 4, "weight_S": torch.ones(6)}, "both"),
    "denominator 0": ({"denominator": 0}, "positive"),
    "tensor denominator 0": ({"denominator": torch.tensor(0.0)}, "positive"),
    "short weights": ({"weight_S": torch.ones(5)}, r"weight_S.*expected \(6,\)"),
    "beta": ({"denominator": 4, "beta": -0.1}, "beta"),
    "bounds end": ({"denominator": 4, "cu_seqlens": CU - (CU == T).long()}, "cu_seqlens"),
    "bounds start": ({"denominator": 4, "cu_seqlens": CU + (CU == 0).long()}, "cu_seqlens"),
    "bounds fall": (
        {"denominator": 4, "cu_seqlens": torch.tensor([0, 4, 3, 9, 15, 21, T])},
        "never fall",
    ),
    "bounds short": ({"denominator": 4, "cu_seqlens": CU[1:]}, r"cu_seqlens.*expected \(7,\)"),
    "bounds float": ({"denominator": 4, "cu_seqlens": CU.float()}, "int32 or int64"),
    "live advantage": (
        {"denominator": 4, "advantage_S": ADVANTAGE.clone().requires_grad_()},
        "constant",
    ),
    "2-D advantage": ({"denominator": 4, "advantage_S": ADVANTAGE.view(2, 3)}, r"\(S,\)"),
    "prior rows": ({"denominator": 4, "prior_rows": T - 1}, "pass prior_index"),
    "index range": ({"denominator": 4, "prior_index": torch.tensor([0, 6])}, r"\[0, 6\)"),
    "index twice": ({"denominator": 4, "prior_index": torch.tensor([0, 1, 4, 4])}, "twice"),
    "index misses": ({"denominator": 4, "prior_index": torch.tensor([0, 1])}, "leaves out"),
    "index rows": ({"denominator": 4, "prior_index": torch.tensor([0, 1, 4])}, "number of tokens"),
    "index device": (
        {"denominator": 4, "prior_index": torch.zeros(1, dtype=torch.int64, device="meta")},
        "move one",
    ),
    "denominator device": (
        {"denominator": torch.tensor(4.0, device="meta")},
        "denominator is on meta, advantage_S on cpu",
    ),
    "endless denominator": ({"denominator": torch.tensor(math.inf)}, "positive and finite"),
    "live denominator": ({"denominator": torch.tensor(4.0, requires_grad=True)}, "constant here"),
    "bool denominator": ({"denominator": True}, "denominator: got True, expected a positive"),
    "bool tensor": ({"denominator": torch.tensor(True)}, "denominator: got torch.bool"),
    "tensor beta": ({"denominator": 4, "beta": torch.tensor(0.5)}, r"beta: got a Tensor.*float\("),
    "list advantage": ({"denominator": 4, "advantage_S": [1.0]}, r"advantage_S: .*list.*as_tensor"),
    "list bounds": ({"denominator": 4, "cu_seqlens": [0, T]}, r"cu_seqlens: .*list.*as_tensor"),
    "list index": ({"denominator": 4, "prior_index": [0]}, r"prior_index: .*list.*as_tensor"),
    "float weight": ({"weight_S": 0.25}, r"weight_S: got 0.25 \(float\).*torch.full"),
    "index dtype": ({"denominator": 4, "prior_index": torch.tensor([0.0])}, "int64"),
}


@pytest.mark.parametrize("name", BAD_VPGEA)
def test_bad_vpgea_calls_say_what_to_do(name):
    post_TD, weight_VD, _, targets_T, _ = head_case()
    changed, message = BAD_VPGEA[name]
    call = {"cu_seqlens": CU, "advantage_S": ADVANTAGE, **changed}
    prior_UD = post_TD[: call.pop("prior_rows", T)]
    with pytest.raises(ValueError, match=message):
        vpgea_loss(post_TD, prior_UD, weight_VD, targets_T, **call)


# --- any valid call -----------------------------------------------------------------------------


def laid_out(x, how):
    """The same values in another layout: a slice, a view with an offset, transposed, expanded."""
    if how == "slice":
        wide = x.new_full([2 * n for n in x.shape], 7).to(x.dtype)
        view = wide[tuple(slice(0, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if how == "offset":
        return torch.cat((x.new_full((3,), 7), x.reshape(-1)))[3:].view(x.shape)
    if how == "transposed":
        return x.mT.contiguous().mT if x.dim() == 2 else x
    return x[:1].expand(x.shape) if how == "expanded" else x.clone()


LAYOUTS = st.sampled_from(["dense", "slice", "offset", "transposed", "expanded"])
HALVES = [torch.float16, torch.bfloat16]
SINGLE = [*HALVES, torch.float32]


@st.composite
def any_call(draw):
    """Hidden, weight, bias or None, targets, coefficients, dead rows, options, autocast's dtype."""
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    tokens, width, classes = (draw(st.sampled_from(n)) for n in ([0, 1, 2, 9], [1, 5], [2, 3, 67]))
    dtype = draw(st.sampled_from([torch.float64, *SINGLE]))
    autocast = draw(st.sampled_from([None, *HALVES]))
    dtypes = [dtype, dtype]
    if autocast is not None and dtype is not torch.float64:
        dtypes = [draw(st.sampled_from(SINGLE)) for _ in range(2)]
    layout = [draw(LAYOUTS) for _ in range(5)]
    hidden_TD = laid_out(torch.randn(tokens, width).to(dtypes[0]), layout[0])
    weight_VD = laid_out(torch.randn(classes, width).to(dtypes[1]), layout[1])
    bias_V = None
    if draw(st.booleans()):
        bias_V = laid_out(torch.randn(classes).to(draw(st.sampled_from(SINGLE))), layout[2])
    ignore_index = draw(st.sampled_from([-100, -1, 0, classes]))
    targets_T = torch.randint(
        0, classes, (tokens,), dtype=draw(st.sampled_from([torch.int32, torch.int64]))
    )
    coef_T = torch.randn(tokens).to(draw(st.sampled_from([torch.float64, *SINGLE])))
    share = draw(st.sampled_from([0.0, 0.4, 1.0]))
    targets_T[torch.rand(tokens) < share] = ignore_index
    coef_T[torch.rand(tokens) < share] = 0.0
    targets_T, coef_T = laid_out(targets_T, layout[3]), laid_out(coef_T, layout[4])
    dead_T = (targets_T == ignore_index) | (coef_T == 0)
    rows = torch.randperm(tokens)[: draw(st.integers(0, tokens))] if draw(st.booleans()) else None
    if rows is not None:
        dead_T = dead_T | ~torch.zeros(tokens, dtype=torch.bool).index_fill(0, rows, True)
    if layout[0] != "expanded":
        hidden_TD[dead_T] = math.nan
    options = {
        "softcap": draw(st.sampled_from([None, 2.5])),
        "logit_scale": draw(st.sampled_from([1, 0.4, -1.5, 0])),
        "temperature": draw(st.sampled_from([1, 0.7, torch.rand(tokens) + 0.5])),
        "ignore_index": ignore_index,
    }
    backend = draw(st.sampled_from(BACKENDS))
    more = {
        "rows": rows,
        "backend": backend,
        "chunk_bytes": draw(st.sampled_from([None, 1, CHUNK])),
    }
    tensors = hidden_TD, weight_VD, bias_V, targets_T, coef_T, dead_T
    return tensors, options, more, autocast


@settings(max_examples=150)
@given(any_call(), st.sampled_from(["one pass", "two streams", "recompute"]), st.data())
def test_any_valid_call(call, op, data):
    """Values and gradients against float64 autograd, in every mode and every layout.

    Budgets: those of this file, of the coarser of operand and gradient, times the largest
    coefficient: a row whose gradient cancels keeps the noise of its terms.
    """
    (hidden_TD, weight_VD, bias_V, targets_T, coef_T, dead_T), options, more, dtype = call
    mode = data.draw(st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]))
    given = [x for x in (hidden_TD, weight_VD, bias_V) if x is not None]
    leaves = [x for x in given if x.requires_grad_(data.draw(st.booleans())).requires_grad]
    if hidden_TD.dtype is torch.float64:
        dtype = None
    operand = dtype or hidden_TD.dtype
    exact = [
        x.detach().to(operand if x is not bias_V else x.dtype).double().requires_grad_()
        for x in given
    ]
    hidden, weight, bias = (*exact, None)[:3]
    truth_T = oracle(
        hidden.masked_fill(dead_T[:, None], 0.0),
        weight,
        targets_T.masked_fill(dead_T, options["ignore_index"]),
        bias=bias,
        **options,
    )[0]
    live_T = coef_T.double().masked_fill(dead_T, 0.0)
    cut = data.draw(st.integers(0, len(targets_T)))
    with mode(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        if op == "one pass":
            out = weighted_logprob_loss(
                hidden_TD, weight_VD, targets_T, coef_T, bias=bias_V, **options, **more
            )
            loss = out.loss
            assert torch.equal(out.kept, ~dead_T)
        elif op == "two streams":
            pairs = [(x[:cut], x[cut:]) for x in (hidden_TD, targets_T, coef_T)]
            loss = two_stream_loss(
                *pairs[0], weight_VD, *pairs[1], *pairs[2], bias=bias_V, **options, **more
            ).loss
        else:
            clean_T = targets_T.masked_fill(dead_T, options["ignore_index"])
            loss = (
                live_T
                * linear_logprob(hidden_TD, weight_VD, clean_T, bias=bias_V, **options, **more).logp
            ).sum()
    budget = 1e-5 if operand is not torch.float64 else 1e-12
    assert (loss - (live_T * truth_T).sum()).abs() <= budget * (live_T.abs() * (1 - truth_T)).sum()
    assert loss.requires_grad == (mode is torch.enable_grad and bool(leaves))
    if not loss.requires_grad:
        return
    factor = data.draw(st.sampled_from([1.0, -0.3]))
    wanted = torch.autograd.grad(factor * (live_T * truth_T).sum(), exact)
    for keep in (True, False):
        found = dict(
            zip(leaves, torch.autograd.grad(factor * loss, leaves, retain_graph=keep), strict=True)
        )
        for x, truth in zip(given, wanted, strict=True):
            if x not in found:
                continue
            assert found[x].dtype == x.dtype
            near = 4 * max(BUDGET[operand], BUDGET[x.dtype])
            torch.testing.assert_close(
                found[x].double(),
                truth,
                rtol=near,
                atol=near * float(live_T.abs().amax() if len(live_T) else 0),
            )
            if x is hidden_TD:
                assert not found[x][dead_T].any()


@pytest.mark.gpu
def test_a_target_out_of_range_stops_the_device():
    """Without `validate` nothing waits: the assertion ends the process at its next look at CUDA."""
    code = (
        "import torch; from vpgea_fast.losses import linear_logprob\n"
        "x, w = (torch.randn(n, 8, device='cuda') for n in (4, 9))\n"
        "linear_logprob(x, w, torch.full((4,), 9, device='cuda'), rows=torch.arange(4).cuda())\n"
        "print('not stopped yet', flush=True)\n"
        "torch.cuda.synchronize(); print('never here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "not stopped yet" in done.stdout
    assert "never here" not in done.stdout
    assert "targets_T holds values outside" in done.stdout + done.stderr


IMPORT = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import vpgea_fast.losses
print(time.process_time() - start, *sorted(set(sys.modules) - before))
"""


def test_the_import_is_quick():
    """After torch 0.02 s of a core, and nothing of torch's compiler comes with it."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    seconds, *modules = done.stdout.split()
    assert float(seconds) < 0.3
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton", "numpy", "sympy")
    assert not [name for name in modules if name.startswith(heavy)]


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
def test_losses_of_two_streams_refuse_what_their_own_values_would_not_know(option):
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    targets, cu, advantage = torch.arange(4), torch.tensor([0, 2, 4]), torch.tensor([1.0, -1.0])
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        vpgea_loss(hidden, hidden, weight, targets, cu, advantage, denominator=1.0, **{option: 0.1})
    coef, both = torch.ones(4), (hidden, hidden, weight, targets, targets)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        two_stream_loss(*both, coef, coef, **{option: 0.1})

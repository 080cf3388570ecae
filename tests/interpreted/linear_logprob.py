"""The Triton heads against float64, in the interpreter or on a GPU; see test_kernels_interpret.py.

The interpreter shows arithmetic, masks and addresses, no races: programs run one after another.
"""

import os

import pytest
import torch
import triton
import triton.language as tl
from test_losses import assert_close, gradients, oracle

from vpgea_fast.kernels import cublas
from vpgea_fast.kernels import linear_logprob as head
from vpgea_fast.kernels._tiling import INTERPRETED, as_float32, dot_transposed, rounded_to
from vpgea_fast.kernels.contract import Head, Sinks, Upstream
from vpgea_fast.losses import linear_logprob, resolve_backend, weighted_logprob_loss

pytestmark = [
    # exp2 of a row that is out of range is inf by design: the row is flagged and redone.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
    # Triton 3.6's interpreter on NumPy 2.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

if not INTERPRETED:
    torch.set_default_device("cuda")
HARDWARE = 1 if INTERPRETED else 5
"""A device's exp2 and log2 are good to 2^-22, the interpreter's to 2^-24, of exponents up to 20."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# float16 takes bfloat16's way through the kernels, with other roundings.
HALF_AND_FLOAT = [*DTYPES[:2], pytest.param(torch.float16, marks=pytest.mark.slow)]


def with_each_dtype(values, quick):
    """Each of DTYPES with each value; what is not `quick` is slow. The names are those that a GPU's
    shards select by."""
    return [
        pytest.param(
            dtype,
            value,
            id=f"dtype{number}-{value}",
            marks=() if (dtype, value) in quick else pytest.mark.slow,
        )
        for number, dtype in enumerate(DTYPES)
        for value in values
    ]


BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}
RAGGED = {
    "one row": (1, 16, 2),
    "pointers": (5, 37, 61),
    "tail tiles": (130, 72, 700),
    "whole tiles": (128, 64, 512),
    "whole columns": (130, 24, 512),
    "one more": (129, 8, 257),
}


@pytest.fixture(params=["triton", "cublas"])
def backend(request):
    return request.param


def case(dtype, tokens, width, vocabulary, *, spread=2.0):
    """Leaves hidden and weight with logits of about `spread`, targets with the last class."""
    hidden_TD = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width) * spread / width**0.5).to(dtype).requires_grad_()
    targets_T = torch.randint(0, vocabulary, (tokens,))
    targets_T[0] = vocabulary - 1
    return hidden_TD, weight_VD, targets_T


def doubled(*leaves):
    return tuple(x.detach().double().requires_grad_() for x in leaves)


def options_of(name, tokens, vocabulary):
    return {
        "plain": {},
        "temperature": {"temperature": 0.7},
        "temperatures": {"temperature": torch.rand(tokens) + 0.5},
        "softcap": {"softcap": 2.5},
        "logit_scale": {"logit_scale": -0.4},
        "bias": {"bias": torch.randn(vocabulary).requires_grad_()},
        "all": {
            "temperature": torch.rand(tokens) + 0.5,
            "softcap": 3.0,
            "logit_scale": 0.6,
            "bias": torch.randn(vocabulary).requires_grad_(),
        },
    }[name]


@triton.jit
def _cast(x_ptr, half_ptr, back_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    half = rounded_to(tl.load(x_ptr + offs), tl.bfloat16)
    tl.store(half_ptr + offs, half)
    tl.store(back_ptr + offs, as_float32(half))


@triton.jit
def _product(left_ptr, right_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    square = offs[:, None] * BLOCK + offs[None, :]
    zero = tl.zeros([BLOCK, BLOCK], tl.float32)
    out = dot_transposed(tl.load(left_ptr + square), tl.load(right_ptr + square), zero)
    tl.store(out_ptr + square, out)


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_bf16_is_exact_in_the_interpreter():
    """It keeps bf16 as raw uint16: sums and products of that are garbage, and casts truncate."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert resolve_backend("triton") == "triton"
    x = torch.randn(256) * 10.0 ** torch.randint(-42, 38, (256,))
    x[:8] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0, torch.inf, -torch.inf, 3e38, 1e-40])
    half, back = torch.empty(256, dtype=torch.bfloat16), torch.empty(256)
    _cast[(1,)](x, half, back, BLOCK=256)
    assert torch.equal(half, x.bfloat16())
    assert torch.equal(back, x.bfloat16().float())
    left, right = torch.randn(2, 16, 16).bfloat16().unbind(0)
    out = torch.empty(16, 16)
    _product[(1,)](left, right, out, BLOCK=16)
    torch.testing.assert_close(out, left.float() @ right.float().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("shape", RAGGED)
def test_values(backend, shape, dtype):
    """Budget: the float32 rounding of logits of about 8, a few units in 1e-6."""
    hidden_TD, weight_VD, targets_T = case(dtype, *RAGGED[shape])
    truth = oracle(hidden_TD, weight_VD, targets_T)
    with torch.no_grad():
        ours = linear_logprob(hidden_TD, weight_VD, targets_T, return_entropy=True, backend=backend)
    assert (ours.logp <= 0).all()
    for got, expected in zip((ours.logp, ours.lse, ours.entropy), truth, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * HARDWARE
    trained = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, torch.ones(len(targets_T)), backend=backend
    )
    assert torch.equal(trained.logp, ours.logp), "scoring and training differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["temperature", "temperatures", "softcap", "logit_scale", "bias", "all"]
)
def test_options(backend, name, dtype):
    hidden_TD, weight_VD, targets_T = case(dtype, 130, 40, 300)
    options = options_of(name, 130, 300)
    truth = oracle(hidden_TD, weight_VD, targets_T, **options)
    ours = linear_logprob(
        hidden_TD, weight_VD, targets_T, return_entropy=True, backend=backend, **options
    )
    for got, expected in zip((ours.logp, ours.lse, ours.entropy), truth, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * HARDWARE
    coef_T = torch.randn(130)
    loss = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, coef_T, backend=backend, **options
    ).loss
    wide = doubled(hidden_TD, weight_VD)
    expected = (coef_T * oracle(*wide, targets_T, **options)[0]).sum()
    bias = (options["bias"],) if "bias" in options else ()
    got = gradients(loss, hidden_TD, weight_VD, *bias)
    assert_close(got, gradients(expected, *wide, *bias), 2 * BUDGET[dtype])


def test_peaked_logits(backend):
    """|z| to 60 in bf16: max |logp - float64| <= 1e-3, mean <= 5e-5."""
    hidden_TD, weight_VD, targets_T = case(torch.bfloat16, 256, 64, 2000, spread=14.0)
    z_TV = hidden_TD.double() @ weight_VD.double().T
    targets_T[::2] = z_TV[::2].argmax(1)
    assert 45 < z_TV.abs().max() < 90
    with torch.no_grad():
        ours = linear_logprob(hidden_TD, weight_VD, targets_T, backend=backend).logp
    error_T = (ours - oracle(hidden_TD, weight_VD, targets_T)[0]).abs()
    assert error_T.max() <= 1e-3
    assert error_T.mean() <= 5e-5


def assert_gradient_budgets(backend, inputs, extra):
    """bf16 and fp16: dX <= 1.1 times, dW <= 1.6 times the error of dlogits rounded once."""
    hidden_TD, weight_VD, targets_T = inputs
    dtype, coef_T = hidden_TD.dtype, torch.randn(len(targets_T))
    wide = doubled(hidden_TD, weight_VD)
    truth = gradients((coef_T * oracle(*wide, targets_T, **extra)[0]).sum(), *wide)
    z_TV = hidden_TD.detach().float() @ weight_VD.detach().float().T + extra.get("bias", 0)
    dz_TV = z_TV.detach().softmax(1).mul_(-coef_T[:, None])
    dz_TV.scatter_add_(1, targets_T[:, None], coef_T[:, None])
    dz_TV = dz_TV.to(dtype).float()
    once = (
        (dz_TV @ weight_VD.float()).to(dtype),
        (dz_TV.T @ hidden_TD.float()).to(dtype),
    )
    ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend=backend, **extra)
    got = gradients(ours.loss, hidden_TD, weight_VD)
    assert_close(got, truth, BUDGET[dtype])
    if dtype is torch.bfloat16:
        for mine, theirs, exact, ratio in zip(got, once, truth, (1.1, 1.6), strict=True):
            allowed = ratio * (theirs.double() - exact).norm()
            assert (mine.double() - exact).norm() <= allowed


# float32 without a bias: its gradients are those of test_gradients_of_logp_and_lse too.
@pytest.mark.parametrize(
    ("dtype", "options"),
    with_each_dtype(
        ("plain", "bias"),
        quick={(torch.float32, "bias"), (torch.bfloat16, "plain"), (torch.bfloat16, "bias")},
    ),
)
def test_gradient_budgets(backend, dtype, options):
    inputs = case(dtype, 260, 96, 1000)
    assert_gradient_budgets(backend, inputs, options_of(options, 260, 1000))


@pytest.mark.gpu
def test_the_head_of_a_7b_model(backend):
    """2048 rows, |z| to 60: max |logp - float64| <= 1e-3, mean <= 5e-5, and the gradients."""
    inputs = case(torch.bfloat16, 2048, 3584, 152064, spread=14.0)
    hidden_TD, weight_VD, targets_T = inputs
    with torch.no_grad():
        z_TV = hidden_TD.double() @ weight_VD.double().T
        assert z_TV.abs().max() > 60
        targets_T[::2] = z_TV[::2].argmax(1)
        truth_T = z_TV.log_softmax(1).gather(1, targets_T[:, None])[:, 0]
        del z_TV
        scored_T = linear_logprob(hidden_TD, weight_VD, targets_T, backend=backend).logp
    assert (scored_T <= 0).all()
    error_T = (scored_T - truth_T).abs()
    assert error_T.max() <= 1e-3
    assert error_T.mean() <= 5e-5
    trained = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, torch.ones(2048), backend=backend
    )
    assert torch.equal(trained.logp, scored_T)
    ordinary = case(torch.bfloat16, 2048, 3584, 152064)
    assert_gradient_budgets(backend, ordinary, {})


@pytest.mark.gpu
def test_more_than_2_31_logits_in_a_chunk(backend):
    """8448 x 262144 = 2.2e9: the last rows equal a run of their own."""
    hidden_TD, weight_VD, targets_T = case(torch.bfloat16, 8448, 64, 262144)
    coef_T = torch.randn(8448)
    options = {"backend": backend, "chunk_bytes": 1 << 34}
    ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, **options)
    dhidden_TD, dweight_VD = gradients(ours.loss, hidden_TD, weight_VD)
    halves = []
    for part in (slice(0, 8320), slice(8320, 8448)):
        leaf = hidden_TD.detach()[part].requires_grad_()
        alone = weighted_logprob_loss(leaf, weight_VD, targets_T[part], coef_T[part], **options)
        torch.testing.assert_close(ours.logp[part], alone.logp, rtol=1e-5, atol=1e-5)
        halves.append(gradients(alone.loss, leaf, weight_VD))
        assert_close((dhidden_TD[part],), halves[-1][:1], 1e-3)
    assert_close((dweight_VD,), (halves[0][1].double() + halves[1][1].double(),), 4e-3)


@pytest.mark.slow
def test_beside_liger(backend):
    """Its fused cross entropy takes one scalar, the mean; ours may lose twice what it loses."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    hidden_TD, weight_VD, targets_T = case(torch.float32, 40, 32, 500)
    wide = doubled(hidden_TD, weight_VD)
    truth = -oracle(*wide, targets_T)[0].mean()
    exact = gradients(truth, *wide)
    theirs = functional.liger_fused_linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    coef_T = torch.full((40,), -1 / 40)
    ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend=backend).loss
    assert abs(ours - truth) <= max(1e-6, 2 * abs(theirs - truth))
    mine, other = (gradients(loss, hidden_TD, weight_VD) for loss in (ours, theirs))
    for x, y, z in zip(mine, other, exact, strict=True):
        assert (x - z).norm() <= max(1e-6 * z.norm(), 2 * (y - z).norm())


# The coefficient changes no way through the kernels: one of each dtype is quick.
@pytest.mark.parametrize(
    ("dtype", "coefficient"),
    with_each_dtype((1.0, -1e-4, 1e-7), quick={(torch.float32, 1e-7), (torch.bfloat16, 1.0)}),
)
def test_rows_out_of_range_are_redone(backend, dtype, coefficient):
    """logp of -25 to -200 beside ordinary rows: exact, and the neighbours keep every bit."""
    tokens, vocabulary = 300, 300
    hidden_TD, weight_VD, targets_T = case(dtype, tokens, 32, vocabulary)
    bias_V = torch.zeros(vocabulary)
    unlikely = {0: -25.0, 5: -33.0, 6: -40.0, 7: -60.0, 270: -69.0, 299: -200.0}
    targets_T = targets_T % 200
    for offset, (row, logp) in enumerate(unlikely.items()):
        targets_T[row] = 250 + offset
        bias_V[250 + offset] = logp
    truth = oracle(hidden_TD, weight_VD, targets_T, bias=bias_V)[0]
    assert (truth[list(unlikely)] < -20).all()
    dweight_VD = torch.zeros(vocabulary, 32)
    coef_T = torch.full((tokens,), coefficient)
    ours = weighted_logprob_loss(
        hidden_TD,
        weight_VD,
        targets_T,
        coef_T,
        bias=bias_V,
        backend=backend,
        dweight_out=dweight_VD,
    )
    assert ((ours.logp - truth) / truth.clamp(max=-1)).abs().max() <= 1e-6 * HARDWARE
    scored = linear_logprob(hidden_TD, weight_VD, targets_T, bias=bias_V, backend=backend)
    assert torch.equal(scored.logp, ours.logp)

    wide = doubled(hidden_TD, weight_VD)
    loss = coefficient * oracle(*wide, targets_T, bias=bias_V)[0].sum()
    expected = gradients(loss, *wide)
    ours.loss.backward()
    scale = 1.0 / abs(coefficient)
    assert_close((dweight_VD * scale,), (expected[1] * scale,), BUDGET[dtype])
    for row in unlikely:
        target = targets_T[row]
        assert_close((dweight_VD[target] * scale,), (expected[1][target] * scale,), BUDGET[dtype])
    if dtype is not torch.float16:  # dX itself is fp16: 1e-7 is one step of its grid there
        for row in unlikely:
            got, exact = hidden_TD.grad[row] * scale, expected[0][row] * scale
            assert_close((got,), (exact,), BUDGET[dtype])

    ordinary = torch.ones(tokens, dtype=torch.bool)
    ordinary[list(unlikely)] = False
    with torch.no_grad():
        alone = linear_logprob(
            hidden_TD[ordinary], weight_VD, targets_T[ordinary], bias=bias_V, backend=backend
        )
    if backend == "triton":
        assert torch.equal(alone.logp, ours.logp[ordinary])
    torch.testing.assert_close(alone.logp, ours.logp[ordinary], rtol=1e-6 * HARDWARE, atol=1e-6)


@pytest.mark.parametrize("missing", [1e-1, 7e-6, 1e-6, 1e-12])
def test_confident_tokens_keep_their_gradient(backend, missing):
    """fp32, 0.5 %: softmax - onehot would be a multiple of 6e-8."""
    hidden_TD, weight_VD, targets_T = case(torch.float32, 3, 32, 300)
    targets_T[:] = 299
    z_TV = hidden_TD.detach().double() @ weight_VD.detach().double().T
    bias_V = torch.zeros(300)
    bias_V[299] = (z_TV[0, :299].logsumexp(0) - z_TV[0, 299]) - torch.tensor(missing).log()
    bias_V.requires_grad_()
    truth = oracle(hidden_TD, weight_VD, targets_T, bias=bias_V)[0]
    assert -truth[0].item() == pytest.approx(missing, rel=0.2)
    ours = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, torch.tensor([1.0, 0, 0]), bias=bias_V, backend=backend
    )
    assert_close((ours.logp[:1],), (truth[:1],), 5e-3)
    leaves = (hidden_TD, weight_VD, bias_V)
    got, expected = gradients(ours.loss, *leaves), gradients(truth[0], *leaves)
    assert_close(got, expected, 5e-3)
    assert_close((got[2][299],), (expected[2][299],), 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_of_logp_and_lse(backend, softcap, dtype):
    hidden_TD, weight_VD, targets_T = case(dtype, 130, 24, 200)
    wide = doubled(hidden_TD, weight_VD)
    ours = linear_logprob(hidden_TD, weight_VD, targets_T, softcap=softcap, backend=backend)
    truth = oracle(*wide, targets_T, softcap=softcap)
    up_T2 = torch.randn(130, 2)
    up_T2[::3, 0] = up_T2[::3, 1]  # a = b: only the target's logit has a gradient
    up_T2[1::3, 0] = 0.0
    mine = (ours.logp * up_T2[:, 0] + ours.lse * up_T2[:, 1]).sum()
    theirs = (truth[0] * up_T2[:, 0] + truth[1] * up_T2[:, 1]).sum()
    got, expected = gradients(mine, hidden_TD, weight_VD), gradients(theirs, *wide)
    assert_close(got, expected, BUDGET[dtype])


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_cublas_gradients_of_logp_lse_and_entropy(name, dtype):
    """Rows that end within a block and, in half precision, are rewritten into their own halves."""
    hidden_TD, weight_VD, targets_T = case(dtype, 40, 24, 1037)
    options = options_of(name, 40, 1037)
    wide = doubled(hidden_TD, weight_VD)
    up_T3 = torch.randn(40, 3)
    up_T3[::3, :2] = 0.0
    ours = linear_logprob(
        hidden_TD, weight_VD, targets_T, return_entropy=True, backend="cublas", **options
    )
    truth = oracle(*wide, targets_T, **options)
    mine = (torch.stack((ours.logp, ours.lse, ours.entropy), 1) * up_T3).sum()
    theirs = (torch.stack(truth, 1) * up_T3).sum()
    bias = (options["bias"],) if "bias" in options else ()
    got, expected = gradients(mine, hidden_TD, weight_VD, *bias), gradients(theirs, *wide, *bias)
    assert_close(got, expected, 2 * BUDGET[dtype])


def test_cublas_bf16_logits_are_as_wrong_as_their_last_bit():
    """The benchmark's variant: half a unit of a logit of 60 is 0.125; float32 logits keep 1e-3."""
    hidden_TD, weight_VD, targets_T = case(torch.bfloat16, 100, 64, 600, spread=14.0)
    hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    truth = oracle(hidden_TD, weight_VD, targets_T)[0]
    upstream = Upstream(logp=torch.randn(100))
    errors, dhiddens = [], []
    for logits_dtype in (torch.float32, torch.bfloat16):
        dhiddens.append(torch.zeros_like(hidden_TD))
        logp, *_ = cublas.head_pass(
            hidden_TD,
            Head(weight=weight_VD),
            targets_T,
            rows_K=torch.arange(100),
            upstream=upstream,
            sinks=Sinks(hidden=dhiddens[-1]),
            logits_dtype=logits_dtype,
        )
        errors.append((logp - truth).abs().max().item())
    assert errors[0] <= 1e-3 < 0.03 <= errors[1] <= 0.25
    assert_close(dhiddens[1:], dhiddens[:1], 0.1)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_chunks_neighbours_and_reruns(backend, dtype):
    hidden_TD, weight_VD, targets_T = case(dtype, 300, 40, 300)
    coef_T = torch.randn(300)
    runs = []
    for chunk_bytes in (130 * 300 * 4, None, None):
        ours = weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, backend=backend, chunk_bytes=chunk_bytes
        )
        runs.append((ours.logp, *gradients(ours.loss, hidden_TD, weight_VD)))
    assert_close(runs[0], runs[1], 1e-3)
    assert all(torch.equal(x, y) for x, y in zip(runs[1], runs[2], strict=True)), "a rerun"
    picked = torch.randperm(300)[:7]
    few = linear_logprob(hidden_TD[picked], weight_VD, targets_T[picked], backend=backend).logp
    if backend == "triton":  # torch.mm takes another kernel for another number of rows
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(few, runs[0][0][picked])
    torch.testing.assert_close(few, runs[0][0][picked], rtol=1e-6 * HARDWARE, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_dead_rows_may_hold_anything(backend, dtype):
    hidden_TD, weight_VD, targets_T = case(dtype, 20, 16, 100)
    coef_T = torch.randn(20)
    coef_T[::2] = 0.0
    targets_T[1] = -100
    dirty_TD = hidden_TD.detach().clone()
    dirty_TD[::2], dirty_TD[1] = torch.nan, torch.inf
    runs = []
    for hidden in (hidden_TD.detach().clone(), dirty_TD):
        hidden.requires_grad_()
        for rows in (None, torch.arange(20)):
            ours = weighted_logprob_loss(
                hidden, weight_VD, targets_T, coef_T, rows=rows, backend=backend
            )
            runs.append((ours.loss, ours.logp, *gradients(ours.loss, hidden, weight_VD)))
    for run in runs:
        assert all(x.isfinite().all() for x in run)
        assert torch.equal(run[2][:3], torch.zeros(3, 16, dtype=dtype))
        assert_close(run, runs[0], 1e-6 if dtype is torch.float32 else 1e-3)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
# Beyond V the logits read as 0, far above a masked target: what is made there is not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_every_other_class_masked(backend):
    """logp = 0 and no gradient; a masked target has logp -inf and stays alone.

    Its sum is NaN (-inf - -inf) until the row is redone.
    """
    for dtype in DTYPES:
        hidden_TD, weight_VD, _ = case(dtype, 4, 16, 100)
        bias_V = torch.full((100,), -torch.inf)
        bias_V[3] = 0.0
        ours = weighted_logprob_loss(
            hidden_TD,
            weight_VD,
            torch.tensor([3, 3, 3, 3]),
            torch.ones(4),
            bias=bias_V,
            backend=backend,
        )
        assert torch.equal(ours.logp, torch.zeros(4))
        for gradient in gradients(ours.loss, hidden_TD, weight_VD):
            assert torch.equal(gradient, torch.zeros_like(gradient))
        scored = linear_logprob(
            hidden_TD, weight_VD, torch.tensor([3, 50, 3, 3]), bias=bias_V, backend=backend
        )
        assert scored.logp.tolist() == [0.0, -torch.inf, 0.0, 0.0]


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_a_row_of_nan_stays_a_row_of_nan(backend):
    hidden_TD, weight_VD, targets_T = case(torch.bfloat16, 140, 16, 300)
    clean = linear_logprob(hidden_TD, weight_VD, targets_T, backend=backend).logp
    with torch.no_grad():
        hidden_TD[7] = torch.nan
    dirty = linear_logprob(hidden_TD, weight_VD, targets_T, backend=backend).logp
    others = torch.arange(140) != 7
    assert dirty[7].isnan()
    assert torch.equal(dirty[others], clean[others])


def test_frozen_parts_and_strided_inputs(backend):
    """A frozen head or hidden gives the other's gradient; expanded and transposed inputs work."""
    hidden_TD, weight_VD, targets_T = case(torch.bfloat16, 40, 24, 90)
    coef_T = torch.randn(40)
    both = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend=backend)
    dhidden_TD, dweight_VD = gradients(both.loss, hidden_TD, weight_VD)
    transposed_VD = weight_VD.detach().T.contiguous().T
    frozen = weighted_logprob_loss(hidden_TD, transposed_VD, targets_T, coef_T, backend=backend)
    assert torch.equal(gradients(frozen.loss, hidden_TD)[0], dhidden_TD)
    strided_TD = torch.stack((hidden_TD.detach(), torch.zeros(40, 24)), 1)[:, 0].bfloat16()
    frozen = weighted_logprob_loss(strided_TD, weight_VD, targets_T, coef_T, backend=backend)
    assert torch.equal(gradients(frozen.loss, weight_VD)[0], dweight_VD)
    empty = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, torch.zeros(40), backend=backend)
    assert not gradients(empty.loss, hidden_TD, weight_VD)[1].any()


def test_what_they_do_not_do_is_an_error(backend):
    hidden_TD, weight_VD, targets_T = case(torch.float16, 4, 16, 50)
    with pytest.raises(ValueError, match=f"'{backend}' cannot run .* not float64; use 'torch'"):
        linear_logprob(hidden_TD.double(), weight_VD.double(), targets_T, backend=backend)
    out = linear_logprob(hidden_TD, weight_VD, targets_T, backend="triton", return_entropy=True)
    with pytest.raises(ValueError, match=r"'triton' cannot run .* no gradient of the entropy"):
        gradients(out.entropy.sum(), hidden_TD)
    with pytest.raises(ValueError, match=r"'triton' cannot run .* no gradient of lse in float16"):
        gradients(out.lse.sum(), hidden_TD)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_skipped_rows_have_no_gradient(backend, dtype):
    """The gradients of the rows that stay, the bounds of the others, and nothing else changes."""
    hidden_TD, weight_VD, targets_T = case(dtype, 130, 16, 257)
    coef_T = torch.randn(130)
    arguments = hidden_TD, weight_VD, targets_T, coef_T
    leaves = hidden_TD, weight_VD
    rows = {"backend": backend, "chunk_bytes": 50 * 257 * 4}  # one tile, or cuBLAS's 50 rows
    plain = weighted_logprob_loss(*arguments, **rows)
    bound_T = 2**0.5 * coef_T.abs() * -torch.expm1(plain.logp)
    least = bound_T.median().item()
    some, none, every = (
        weighted_logprob_loss(*arguments, skip_below=x, **rows) for x in (least, 1e-30, 1e30)
    )
    assert torch.equal(some.logp, plain.logp)
    assert 50 < (bound_T < least).sum() < 80
    assert_close((some.skipped,), (bound_T * (bound_T < least),), 1e-6)
    wide = doubled(*leaves)
    truth = (coef_T * (bound_T >= least) * oracle(*wide, targets_T)[0]).sum()
    assert_close(gradients(some.loss, *leaves), gradients(truth, *wide), 2 * BUDGET[dtype])
    for x, y in zip(gradients(none.loss, *leaves), gradients(plain.loss, *leaves), strict=True):
        assert torch.equal(x, y)
    assert not any(x.any() for x in gradients(every.loss, *leaves))


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (1e-30, 0.0), (-0.25, 30.0)])
def test_a_bias_beside_any_scale(backend, scale, shift):
    """The kernel's sums begin with bias / scale: a scale of 0 or next to it divides nothing."""
    hidden_TD, weight_VD, targets_T = case(torch.bfloat16, 20, 48, 300)
    bias_V = (torch.randn(300) + shift).requires_grad_()
    options = {"bias": bias_V, "logit_scale": scale}
    truth = oracle(hidden_TD, weight_VD, targets_T, **options)[0]
    ours = weighted_logprob_loss(
        hidden_TD, weight_VD, targets_T, torch.ones(20), backend=backend, **options
    )
    assert (ours.logp - truth).abs().max() <= 1e-5 * HARDWARE
    wide = doubled(hidden_TD, weight_VD)
    expected = gradients(oracle(*wide, targets_T, **options)[0].sum(), *wide, bias_V)
    got = gradients(ours.loss, hidden_TD, weight_VD, bias_V)
    assert_close(got[2:], expected[2:], BUDGET[torch.bfloat16])
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("vocabulary", [700, 512])
def test_half_tiles_that_hold_a_target(vocabulary):
    """Only these are masked: a target elsewhere would be counted as one of the others."""
    hidden_TD, weight_VD, targets_T = case(torch.bfloat16, 130, 16, vocabulary)
    targets_T[1:100] = 3
    plan = head.Plan.of(Head(weight=weight_VD.detach()))
    stats, tiles = head.new_stats(targets_T, plan.head), head.TileSums.new(130, plan)
    head._launch_target_logit(hidden_TD.detach(), stats, tiles, plan)
    rows_T = torch.arange(130, device=targets_T.device)
    expected = torch.zeros_like(tiles.holds)
    expected[rows_T // plan.tile.block_m, targets_T // (plan.tile.block_n // 2)] = 1
    assert torch.equal(tiles.holds, expected)
    assert 0 < expected.sum() < expected.numel()


def test_chunks_fill_whole_tiles():
    """16384 rows of Qwen2.5-7B's head are two chunks of 8192; a tiny budget is one tile each."""
    weight_VD = torch.empty(152064, 8, dtype=torch.bfloat16)
    given = head.Plan.of(Head(weight=weight_VD))
    halves = [slice(0, 8192), slice(8192, 16384)]
    tiles = [slice(0, 128), slice(128, 256), slice(256, 300)]
    assert head._chunks(16384, given, store=True, chunk_bytes=4 << 30) == halves
    assert head._chunks(16384, given, store=False, chunk_bytes=None) == [slice(0, 16384)]
    assert head._chunks(300, given, store=True, chunk_bytes=1) == tiles
    assert head._chunks(0, given, store=True, chunk_bytes=None) == []
    budget = 8192 * 152064 * 4
    assert cublas._chunks(16384, weight_VD, torch.float32, budget) == halves
    assert cublas._chunks(3, weight_VD, torch.float32, 1) == [slice(i, i + 1) for i in range(3)]

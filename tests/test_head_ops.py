"""The losses as torch ops: compiled, captured, traced without values, and scaled in place.

A compiled or replayed call runs the same backend on the same rows, so it must give the eager bits.
"""

import dataclasses
import os
import re

import pytest
import torch
from test_losses import CHUNK, CU, DEVICES, D, Recorder, T, V, assert_close, gradients, head_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vpgea_fast.kernels import autograd_state, head
from vpgea_fast.kernels.contract import Inputs, LogitShape, Settings
from vpgea_fast.losses import (
    linear_logprob,
    two_stream_loss,
    vpgea_loss,
    weighted_logprob_loss,
)

pytestmark = [
    # Dynamo makes a context by instantiating torch.autograd.Function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Inductor imports torch.jit.
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

ADVANTAGE = torch.tensor([1.3, 0.7, -0.8, 0.0, 0.2, -1.1])


def weighted(x, **options):
    return weighted_logprob_loss(
        x["hidden"], x["weight"], x["targets"], x["coef"], chunk_bytes=CHUNK, **options
    )


def weighted_all(x, **options):
    return weighted(
        x,
        bias=x["bias"],
        temperature=x["temperature"],
        softcap=3.0,
        logit_scale=0.6,
        rows=x["rows"],
        **options,
    )


def weighted_into_a_sink(x, **options):
    return weighted(x, dweight_out=x["sink"], temperature=x["scalar"], **options)


def logprob(x, **options):
    """The entropy is only looked at: its gradient must not be asked for."""
    out = linear_logprob(
        x["hidden"], x["weight"], x["targets"], return_entropy=True, chunk_bytes=CHUNK, **options
    )
    return (x["coef"] * out.logp).sum(), out.logp, out.lse, out.entropy.detach()


def logprob_all(x, **options):
    out = linear_logprob(
        x["hidden"],
        x["weight"],
        x["targets"],
        bias=x["bias"],
        temperature=x["temperature"],
        softcap=3.0,
        rows=x["rows"],
        return_entropy=True,
        return_statistics=x["statistics"],
        **options,
    )
    loss, found = (x["coef"] * out.logp + out.lse + 0.3 * out.entropy).sum(), out.statistics
    more = (found.top1, found.mean_logit, found.log_sum_p2) if x["statistics"] else ()
    return loss, out.logp, out.entropy, *more


def two_streams(x, **options):
    targets, coef = x["targets"], x["coef"]
    hidden = x["hidden"], x["hidden_prior"]
    return two_stream_loss(*hidden, x["weight"], targets, targets, coef, coef, **options)


def vpgea(x, **options):
    return vpgea_loss(
        x["hidden"],
        x["hidden_prior"],
        x["weight"],
        x["classes"],
        x["bounds"],
        x["advantage"],
        denominator=x["scalar"],
        **options,
    )


def vpgea_some(x, **options):
    """The prior stream holds the three gated sequences only, in another order."""
    prior_UD = torch.cat((x["hidden_prior"][15:21], x["hidden_prior"][:4]))
    return vpgea_loss(
        x["hidden"],
        prior_UD,
        x["weight"],
        x["classes"],
        x["bounds"],
        x["advantage"],
        denominator=x["count"],
        prior_index=x["index"],
        **options,
    )


CALLS = [weighted, weighted_all, weighted_into_a_sink, logprob, logprob_all, two_streams]
CALLS += [vpgea, vpgea_some]
WIDEST = [weighted_into_a_sink, logprob_all, vpgea_some]
"""One of each op, with the most options: what else compiles is a part of these, and slow."""
WIDEST_FIRST = [
    call if call in WIDEST else pytest.param(call, marks=pytest.mark.slow) for call in CALLS
]


def inputs_of(dtype=torch.float32, *, tokens=T, device="cpu"):
    hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(
        dtype, tokens=tokens, device=device, spread=0.5
    )
    hidden_UD = head_case(dtype, tokens=tokens, device=device, spread=0.5)[0]
    classes_T = targets_T.clone()
    targets_T[3], coef_T[5] = -100, 0.0
    sink_dtype = torch.promote_types(dtype, torch.float32)
    more = {
        "rows": torch.tensor([4, 0, 11, 3, tokens - 1]),
        "temperature": torch.rand(tokens) + 0.5,
        "sink": torch.zeros(V, D, dtype=sink_dtype),
        "bounds": CU.clamp(max=tokens),
        "advantage": ADVANTAGE,
        "count": torch.tensor(6.0),
        "index": torch.tensor([4, 0, 1]),
    }
    return {
        "hidden": hidden_TD,
        "hidden_prior": hidden_UD,
        "weight": weight_VD,
        "bias": bias_V,
        "targets": targets_T,
        "classes": classes_T,
        "coef": coef_T,
        "scalar": 0.7,
        # Triton's kernels, which "auto" takes on CUDA, have none.
        "statistics": device == "cpu",
        **{name: x.to(device) for name, x in more.items()},
    }


def run(call, x, loss, **options):
    """Values, gradients of the leaves in use, and the sink, of one call."""
    x = {**x, "sink": x["sink"].clone()}
    out = call(x, **options)
    if dataclasses.is_dataclass(out):
        values = (getattr(out, field.name) for field in dataclasses.fields(out))
        out = tuple(x for x in values if x is not None)  # no skipped rows
    leaves = [x[name] for name in ("hidden", "hidden_prior", "weight", "bias")]
    found = torch.autograd.grad(loss(out), leaves, allow_unused=True)
    return [*(v.detach() for v in out), *(g for g in found if g is not None), x["sink"]]


def scaled(out):
    """0.37 of the loss, so that backward has something to do; 1 where a sink forbids it."""
    return 0.37 * out[0]


def whole(out):
    return out[0]


def compare(got, expected, *, budget):
    """Bit for bit with budget 0."""
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        if budget == 0:
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, rtol=budget, atol=budget)


def compiled_equals_eager(call, backend, compiler, dynamic, dtype, *, device="cpu", budget=0.0):
    x = inputs_of(dtype, device=device)
    loss = whole if call is weighted_into_a_sink else scaled
    expected = run(call, x, loss, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler, dynamic=dynamic)
    for _ in range(2):  # the second time without tracing
        compare(run(compiled, x, loss, backend=backend), expected, budget=budget)


@pytest.mark.parametrize(
    ("call", "dynamic"),
    [*((call, True) for call in CALLS), *((call, False) for call in WIDEST)]
    + [pytest.param(c, False, marks=pytest.mark.slow) for c in CALLS if c not in WIDEST],
)
def test_compiled_equals_eager(call, dynamic):
    compiled_equals_eager(call, "torch", "aot_eager", dynamic, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("call", CALLS)
def test_compiled_equals_eager_everywhere(call, backend, dtype):
    compiled_equals_eager(call, backend, "aot_eager", None, dtype)


def test_inductor_equals_eager():
    """Per-row temperature, bias, softcap, rows: its scalars are Python floats, not float64."""
    compiled_equals_eager(weighted_all, "torch", "inductor", True, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_inductor_equals_eager_everywhere(call, dtype):
    """Inductor fuses what lies between the ops, such as the sum of coef logp: one last bit."""
    budget = 0.0 if call in (weighted, weighted_all, weighted_into_a_sink) else 1e-6
    compiled_equals_eager(call, "torch", "inductor", None, dtype, budget=budget)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("call", CALLS)
def test_inductor_equals_eager_on_cuda(call, dtype, backend):
    compiled_equals_eager(call, backend, "inductor", None, dtype, device="cuda", budget=1e-5)


def test_one_graph_serves_every_length():
    """dynamic=True: T and U are symbols, and so is a denominator; a temperature is a constant."""
    # A second, and every process that collects this file has it at the top.
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vpgea, fullgraph=True, backend=counter, dynamic=True)
    traced = []
    for tokens, denominator in ((T, 0.7), (40, 0.9), (31, 8.0), (T, 48.5)):
        x = inputs_of(tokens=tokens)
        x["scalar"], x["bounds"] = denominator, torch.tensor([0, 4, 4, 9, 15, 21, tokens])
        compare(run(compiled, x, scaled), run(vpgea, x, scaled), budget=0.0)
        traced.append(counter.frame_count)
    assert len(set(traced)) == 1


def test_a_compiled_call_checks_values_too():
    x = inputs_of()
    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"outside \[0, V = 61\)"):
        compiled({**x, "targets": x["targets"] + V})
    compiled = torch.compile(vpgea_some, fullgraph=True, backend="aot_eager")
    for name, value, message in (
        ("bounds", x["bounds"].flip(0), "never fall"),
        ("index", torch.tensor([4, 0, 0]), "twice"),
        ("count", torch.tensor(-1.0), "denominator: must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled({**x, name: value})
    compiled = torch.compile(weighted_into_a_sink, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="into the coefficients"):
        (0.5 * compiled(x).loss).backward()


def settings(**changes):
    fixed = Settings(0.9, 3.0, 0.8, -100, "torch", CHUNK, False, False, 0.0, torch.float32)
    return fixed._replace(**changes)


def op_arguments(name, x):
    """Arguments of each op, with as many optional tensors as it takes, and with as few."""
    few = Inputs(x["hidden"], x["weight"], None, x["targets"], None, None)
    many = few._replace(bias_V=x["bias"], temperature_T=x["temperature"], rows=x["rows"])
    up_T = torch.randn(T, dtype=x["sink"].dtype)
    sequence_T = torch.searchsorted(CU[1:], torch.arange(T), right=True)
    gate_S = ADVANTAGE > 0
    logp_T = -torch.rand(T, dtype=x["sink"].dtype)
    scores = ADVANTAGE.to(x["sink"].dtype), torch.full((6,), 0.25, dtype=x["sink"].dtype)
    return {
        "one_pass": [
            (*few, x["coef"], None, [True, True, False], 0.0, 0.0, *settings()),
            (*many, x["coef"], x["sink"], [True, True, True], 0.1, 0.01, *settings()),
            (*few, x["coef"], None, [False, False, False], 0.0, 0.0, *settings(softcap=None)),
        ],
        "logprob": [(*few, False, False, *settings()), (*many, True, True, *settings())],
        "logprob_backward": [
            (*few, up_T, None, None, [True, False, False], *settings()),
            (*many, up_T, up_T, up_T, [True, True, True], *settings()),
        ],
        "stream_layout": [
            (CU, x["classes"], ADVANTAGE, None, None, T, False),
            (CU, x["classes"], ADVANTAGE.relu(), x["index"], x["count"], 10, False),
        ],
        "path_sums": [
            (logp_T, logp_T.clone(), sequence_T, sequence_T.clone(), CU, *scores, gate_S, None)
        ],
    }[name]


OPS = ["one_pass", "logprob", "logprob_backward", "stream_layout", "path_sums"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype):
    """Schema, autograd registration, fake kernel against the real one, AOT with dynamic shapes."""
    for arguments in op_arguments(name, inputs_of(dtype)):
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        plain = [dtype if isinstance(a, torch.dtype) else a for a in plain]
        torch.library.opcheck(getattr(torch.ops.vpgea_fast, name).default, plain)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_without_values_the_shapes_are_right(dtype, transposed):
    """Fake and meta tensors: what a call returns, gradients and their strides included."""
    x = inputs_of(dtype)
    if transposed:
        x["weight"] = x["weight"].detach().T.contiguous().T.requires_grad_()
    real = run(logprob_all, x, whole) + run(weighted_all, x, whole)
    with FakeTensorMode() as mode:
        y = {name: mode.from_tensor(v) if torch.is_tensor(v) else v for name, v in x.items()}
        fake = run(logprob_all, y, whole) + run(weighted_all, y, whole)
    meta = {name: v.to("meta") if torch.is_tensor(v) else v for name, v in x.items()}
    meta = {k: v.detach().requires_grad_(k in FLOATS) if torch.is_tensor(v) else v
            for k, v in meta.items()}  # fmt: skip
    shapes = run(logprob_all, meta, whole) + run(weighted_all, meta, whole)
    for a, b, c in zip(real, fake, shapes, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert (a.shape, a.dtype, a.stride()) == (c.shape, c.dtype, c.stride())


FLOATS = ("hidden", "hidden_prior", "weight", "bias")


@pytest.mark.parametrize("strict", [False, True])
def test_a_scoring_model_can_be_exported(strict):
    """torch.export with a dynamic T: one node, whichever backend the importing machine has."""

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(D, V)

        def forward(self, hidden_TD, targets_T):
            return linear_logprob(hidden_TD, self.head.weight, targets_T, bias=self.head.bias).logp

    scorer = Scorer().requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2)
    x = inputs_of()
    exported = torch.export.export(
        scorer,
        (x["hidden"].detach(), x["targets"]),
        strict=strict,
        dynamic_shapes=({0: tokens}, {0: tokens}),
    )
    assert "vpgea_fast.logprob.default" in str(exported.graph)
    y = inputs_of(tokens=40)
    hidden_TD, targets_T = y["hidden"].detach(), y["targets"]
    assert torch.equal(exported.module()(hidden_TD, targets_T), scorer(hidden_TD, targets_T))


# --- the backward of the weighted loss scales in place ------------------------------------------


def big_case(dtype):
    """dW is larger than all the backward may make besides."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(dtype, tokens=8, vocabulary=4001)
    return hidden_TD, weight_VD, targets_T, coef_T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backward_makes_no_second_dweight(dtype):
    """Neither a scaled copy nor, in AccumulateGrad, a clone: the stored dW becomes weight.grad."""
    hidden_TD, weight_VD, targets_T, coef_T = big_case(dtype)
    loss = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T).loss
    expected = gradients(loss, hidden_TD, weight_VD)
    with Recorder() as recorder:
        (0.37 * loss).backward()
    assert recorder.largest < hidden_TD.nbytes
    assert_close((hidden_TD.grad, weight_VD.grad), [0.37 * g for g in expected], 2e-3)


@pytest.mark.parametrize("private", ["_get_current_graph_task_keep_graph", None])
def test_a_graph_that_is_kept_keeps_its_gradients(private, monkeypatch):
    """Twice through one graph, then no more; and the same where torch cannot tell."""
    autograd_state._probes.cache_clear()
    if private:
        monkeypatch.delattr(torch._C._autograd, private)
        assert autograd_state._probes() is None
    hidden_TD, weight_VD, targets_T, coef_T = big_case(torch.float64)
    loss = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T).loss
    once = gradients(loss, hidden_TD, weight_VD)
    (0.37 * loss).backward(retain_graph=True)
    (0.5 * loss).backward()
    assert_close((hidden_TD.grad, weight_VD.grad), [0.87 * g for g in once], 1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    autograd_state._probes.cache_clear()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("call", "options"),
    [
        (weighted_all, {}),
        (logprob_all, {}),
        (weighted, {"skip_below": 1e6}),
        (weighted, {"ignore_index": None}),
    ],
)
def test_what_a_new_dweight_held_reaches_no_gradient(call, options, backend, dtype, monkeypatch):
    """NaN in the memory of a dW that is written first; with rows left out, and with none at all."""
    if "skip_below" in options and backend == "reference":
        pytest.skip("it leaves no rows out")
    x = inputs_of(dtype)
    if "ignore_index" in options:
        x["targets"], options = torch.full_like(x["targets"], -100), {}
    want, made = run(call, x, scaled, backend=backend, **options), []

    def filled(*arguments, **given):
        sinks = new_sinks(*arguments, **given)
        if sinks.fresh:
            made.append(sinks.weight.fill_(torch.nan))
        return sinks

    new_sinks = head.new_sinks
    monkeypatch.setattr(head, "new_sinks", filled)
    compare(run(call, x, scaled, backend=backend, **options), want, budget=0)
    assert made


# --- autocast: the operands in its dtype, the gradients in their tensor's -----------------------


def under_autocast(call, dtype=torch.bfloat16, enabled=True):
    def inside(x, **options):
        with torch.autocast(x["hidden"].device.type, dtype, enabled=enabled):
            return call(x, **options)

    return inside


def cast(x, dtype):
    """The float32 leaves as leaves of `dtype`, what a user would write by hand; not the bias."""
    names = ("hidden", "hidden_prior", "weight")
    return {k: v.detach().to(dtype).requires_grad_() if k in names else v for k, v in x.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_operands_follow_autocast(call, backend, dtype):
    """Bit for bit the call with operands cast by hand; but dX and dW come in float32."""
    x = inputs_of()  # `whole`: a factor would scale a bfloat16 gradient that is rounded already
    got = run(under_autocast(call, dtype), x, whole, backend=backend)
    expected = run(call, cast(x, dtype), whole, backend=backend)
    assert all(v.dtype in (torch.float32, torch.bool) for v in got)
    compare([v.to(e.dtype) for v, e in zip(got, expected, strict=True)], expected, budget=0)
    plain = run(call, x, whole, backend=backend)
    assert not all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", ["one pass", "recompute"])
def test_autocast_never_rounds_dweight(call, dtype):
    """The gradient of a float32 weight is the float32 sum itself, as `dweight_out` holds it."""
    x = inputs_of()
    y = cast(x, dtype)
    weighted_logprob_loss(y["hidden"], y["weight"], y["targets"], y["coef"], dweight_out=y["sink"])
    with torch.autocast("cpu", dtype):
        if call == "one pass":
            loss = weighted(x).loss
        else:
            logp_T = linear_logprob(x["hidden"], x["weight"], x["targets"], chunk_bytes=CHUNK).logp
            loss = (x["coef"] * logp_T).sum()
    (dweight_VD,) = gradients(loss, x["weight"])
    assert dweight_VD.dtype is torch.float32
    assert_close((dweight_VD,), (y["sink"],), 1e-6)
    assert not torch.equal(dweight_VD, dweight_VD.to(dtype).float())


@pytest.mark.parametrize("call", CALLS)
def test_autocast_leaves_float64_and_can_be_turned_off(call):
    """As in F.linear: float64 is no operand of autocast; `enabled=False` inside ends it."""
    loss = whole if call is weighted_into_a_sink else scaled
    for dtype, inner in (
        (torch.float64, call),
        (torch.float32, under_autocast(call, enabled=False)),
    ):
        x = inputs_of(dtype)
        compare(run(under_autocast(inner), x, loss), run(call, x, loss), budget=0)


@pytest.mark.parametrize("pair", [("bfloat16", "float32"), ("float32", "float16")])
def test_autocast_takes_operands_of_two_dtypes(pair):
    """A half-precision hidden state over a float32 weight, or the reverse."""
    hidden, weight = (getattr(torch, name) for name in pair)
    x = inputs_of()
    x["hidden"] = x["hidden"].detach().to(hidden).requires_grad_()
    x["weight"] = x["weight"].detach().to(weight).requires_grad_()
    with pytest.raises(ValueError, match="cast one of them"):
        weighted(x)
    for call in (weighted, logprob, two_streams, vpgea):
        got = run(under_autocast(call), x, whole)
        expected = run(call, cast(x, torch.bfloat16), whole)
        values = len(got) - (4 if call in (two_streams, vpgea) else 3)
        ours = [weight if g.shape == (V, D) else hidden for g in got[values:-1]]
        if call in (two_streams, vpgea):
            ours[1] = torch.float32  # hidden_prior, which was not cast
        assert [g.dtype for g in got[values:-1]] == ours
        for mine, theirs in zip(got, expected, strict=True):
            # By way of float16: rounded twice, and bfloat16's smallest are its subnormals.
            rtol, atol = (2.0**-7, 1e-7) if mine.dtype is torch.float16 else (0, 0)
            torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=rtol, atol=atol)
    x["weight"] = x["weight"].detach().double()
    with pytest.raises(ValueError, match="float64"):
        under_autocast(weighted)(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_eager(dtype):
    """F.linear and log_softmax under the same autocast, whose logits are rounded.

    A logit is off by u |z|, so logp by 2 u max|z| and p_v by a factor exp(that). dz is rounded
    once more on either side; its product with the weight is rounded by eager's output.
    """
    x, unit = inputs_of(), torch.finfo(dtype).eps / 2
    hidden_TD, weight_VD, coef_T = x["hidden"], x["weight"], x["coef"]
    targets_T = x["classes"]
    with torch.autocast("cpu", dtype):
        ours = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T)
        logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD)
        eager_T = logits_TV.float().log_softmax(1).gather(1, targets_T[:, None]).squeeze(1)
    assert logits_TV.dtype is dtype
    slack_T1 = 2.02 * unit * logits_TV.float().abs().amax(1, keepdim=True) + 1e-5
    assert ((ours.logp - eager_T).abs() <= slack_T1.squeeze(1))[coef_T != 0].all()
    p_TV = logits_TV.float().softmax(1)
    dz_TV = coef_T[:, None] * (torch.nn.functional.one_hot(targets_T, V) - p_TV)
    off = (coef_T[:, None] * p_TV * slack_T1.expm1()).norm() + 2.02 * unit * dz_TV.norm()
    mine = gradients(ours.loss, hidden_TD, weight_VD)
    theirs = gradients((coef_T * eager_T).sum(), hidden_TD, weight_VD)
    factors = [torch.linalg.matrix_norm(m, 2) for m in (weight_VD, hidden_TD)]
    for a, b, factor in zip(mine, theirs, factors, strict=True):
        assert (a - b).norm() <= 1.01 * (off * factor + unit * (b.norm() + a.norm()))


@pytest.mark.parametrize("call", WIDEST_FIRST)
def test_compiled_under_autocast(call):
    """One graph with autocast around the compiled call, and inside it: the eager bits."""
    x, inside = inputs_of(), under_autocast(call)
    loss = whole if call is weighted_into_a_sink else scaled
    expected = run(inside, x, loss)
    for place in ("inside", "outside"):
        torch._dynamo.reset()
        traced = inside if place == "inside" else call
        compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
        compare(
            run(compiled if place == "inside" else under_autocast(compiled), x, loss),
            expected,
            budget=0,
        )


def test_autocast_without_values():
    """Fake tensors have the shapes and dtypes of real ones; meta has no autocast and says so."""
    x = inputs_of()
    for call in (under_autocast(weighted_all), under_autocast(logprob_all)):
        with FakeTensorMode() as mode:
            y = {name: mode.from_tensor(v) if torch.is_tensor(v) else v for name, v in x.items()}
            fake = run(call, y, whole)
        for real, shape in zip(run(call, x, whole), fake, strict=True):
            assert (real.shape, real.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize("call", [weighted, logprob])
def test_autocast_keeps_no_second_weight(call):
    """One cast of the weight a pass, and none of them outlives it."""

    class Casts(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.dtype is torch.bfloat16:
                self.made += out.shape == (V, D) and args[0].dtype is torch.float32
            return out

    x, saved = inputs_of(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, Casts() as casts:
        loss = whole(tuple(vars(under_autocast(call)(x)).values()) if call is weighted
                     else under_autocast(call)(x))  # fmt: skip
        forward = casts.made
        gradients(loss, x["weight"])
    assert (forward, casts.made) == ((1, 1) if call is weighted else (1, 2))
    assert not any(t.dtype is torch.bfloat16 for t in saved)


# --- gradients of many gradients, transforms ----------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_batched_gradients_of_logprob(backend):
    """is_grads_batched, and so a vectorised Jacobian: each slice as if it came alone."""
    x = inputs_of(torch.float64)
    leaves = x["hidden"], x["weight"], x["bias"]
    out = linear_logprob(*leaves[:2], x["targets"], bias=leaves[2], return_entropy=True,
                         backend=backend)  # fmt: skip
    up_3T = [torch.randn(3, T, dtype=torch.float64) for _ in range(3)]
    values = out.logp, out.lse, out.entropy
    got = torch.autograd.grad(values, leaves, up_3T, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(values, leaves, [g[i] for g in up_3T], retain_graph=True)
        compare([g[i] for g in got], alone, budget=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_the_backward():
    """torch.func.vmap around autograd.grad: torch's loop over the op, and its warning."""
    x = inputs_of(torch.float64)
    logp_T = linear_logprob(x["hidden"], x["weight"], x["targets"]).logp
    up_3T = torch.randn(3, T, dtype=torch.float64)

    def backward(g_T):
        return torch.autograd.grad(logp_T, x["weight"], g_T, retain_graph=True)[0]

    got = torch.func.vmap(backward)(up_3T)
    assert torch.equal(got, torch.stack([backward(g_T) for g_T in up_3T]))


def test_a_sink_takes_no_batch_of_gradients():
    x = inputs_of()
    loss = weighted_into_a_sink(x).loss
    with pytest.raises(ValueError, match="into the coefficients"):
        torch.autograd.grad(loss, x["hidden"], torch.ones(3), is_grads_batched=True)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(2, *x.shape)),
}


def forward_mode(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transform", [*TRANSFORMS.values(), forward_mode],
                         ids=[*TRANSFORMS, "forward mode"])  # fmt: skip
@pytest.mark.parametrize("call", [weighted, logprob, two_streams, vpgea])
def test_transforms_are_refused_in_words(call, transform):
    x = inputs_of()

    def loss(hidden_TD):
        out = call({**x, "hidden": hidden_TD})
        return out[0] if isinstance(out, tuple) else out.loss

    with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
        transform(loss, x["hidden"].detach())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transform", ["grad", "vmap"])
@pytest.mark.parametrize("call", [weighted, logprob, vpgea])
def test_transforms_are_refused_compiled_and_around_plain_tensors_too(call, transform):
    """The op has no gradient of its own below a transform: a compiled grad was 0 in silence."""
    x = inputs_of()

    def total(x):
        out = call(x)
        return out[0].sum() if isinstance(out, tuple) else out.loss

    def through(hidden_TD):
        return TRANSFORMS[transform](lambda h: total({**x, "hidden": h}), hidden_TD)

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
        torch.compile(through, backend="aot_eager")(x["hidden"].detach())
    with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
        TRANSFORMS[transform](lambda scale: (scale * total(x).detach()).sum(), torch.ones(2))


def test_batched_upstream_gradients():
    """is_grads_batched: one stored gradient, three scales, nowhere to scale it in place."""
    hidden_TD, weight_VD, targets_T, coef_T = big_case(torch.float64)
    loss = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T).loss
    once = gradients(loss, hidden_TD, weight_VD)
    scales = torch.tensor([0.37, -2.0, 1.0], dtype=torch.float64)
    got = torch.autograd.grad(loss, (hidden_TD, weight_VD), scales, is_grads_batched=True)
    assert_close(got, [scales.view(3, 1, 1) * g for g in once], 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """The gradients of the recomputed forward are scaled in place, not those that were dropped."""
    hidden_TD, weight_VD, targets_T, coef_T = big_case(torch.float64)

    def loss(hidden_TD, weight_VD):
        return weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T).loss

    expected = gradients(0.37 * loss(hidden_TD, weight_VD), hidden_TD, weight_VD)
    again = checkpoint(loss, hidden_TD, weight_VD, use_reentrant=reentrant)
    (0.37 * again).backward()
    assert torch.equal(hidden_TD.grad, expected[0])
    assert torch.equal(weight_VD.grad, expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler_and_accumulation(device):
    """fp16 under a loss scale of 2^16, two micro-batches: unscaled, the sum of both gradients."""
    hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float16, device=device)
    coef_T = 1e-4 * coef_T
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    hidden, weight = (x.detach().float().requires_grad_() for x in (hidden_TD, weight_VD))
    optimizer = torch.optim.SGD([hidden, weight], lr=0.0)
    for part in (slice(0, 9), slice(9, T)):
        loss = weighted_logprob_loss(
            hidden[part].half(), weight.half(), targets_T[part], coef_T[part]
        ).loss
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    wide = [x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD)]
    truth = weighted_logprob_loss(*wide, targets_T, coef_T, backend="reference").loss
    assert_close((hidden.grad, weight.grad), gradients(truth, *wide), 2e-3)


# --- CUDA graphs, synchronisations, addresses ---------------------------------------------------

BACKENDS_ON_CUDA = ["torch", "cublas", "triton"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS_ON_CUDA)
@pytest.mark.parametrize("call", [c for c in CALLS if c is not logprob_all])
def test_a_captured_call_replays_with_other_values(call, backend):
    """Forward and backward in one CUDA graph; the second replay sees new inputs in old places."""
    torch.manual_seed(1)
    x, y = (inputs_of(torch.bfloat16, device="cuda") for _ in range(2))
    y["targets"][7], y["coef"][9] = -100, 0.0  # other rows take no part
    loss = whole if call is weighted_into_a_sink else scaled
    expected = [run(call, z, loss, backend=backend) for z in (x, y)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(call, x, loss, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run(call, x, loss, backend=backend)
    for z, truth in zip((x, y), expected, strict=True):
        with torch.no_grad():
            for name, value in x.items():
                if torch.is_tensor(value):
                    value.copy_(z[name])
        graph.replay()
        torch.cuda.synchronize()
        # Masked rows stay in the GEMMs, so a sum may have another order than without them: one
        # rounding of bf16.
        compare(held, truth, budget=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS_ON_CUDA)
@pytest.mark.parametrize("call", [weighted_all, two_streams, vpgea, vpgea_some, logprob])
def test_rows_spare_every_synchronisation(call, backend):
    x = inputs_of(torch.bfloat16, device="cuda")
    tokens = 2 * T if call in (two_streams, vpgea) else T + 10 if call is vpgea_some else T
    options = {"backend": backend}
    if call is not weighted_all:
        options["rows"] = torch.arange(tokens, device="cuda")
    expected = run(call, x, scaled, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(call, x, scaled, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compare(got, expected, budget=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS_ON_CUDA)
def test_wrong_values_raise_where_they_are_asked_about(backend):
    """validate=True: a ValueError, and the process goes on; by default an assertion kills it."""
    x = inputs_of(torch.bfloat16, device="cuda")
    options = {"backend": backend, "validate": True}
    with pytest.raises(ValueError, match="outside"):
        weighted({**x, "targets": x["targets"] + V}, **options)
    with pytest.raises(ValueError, match="never fall"):
        vpgea({**x, "bounds": x["bounds"].flip(0)}, **options)
    with pytest.raises(ValueError, match="rows must lie"):
        weighted_all({**x, "rows": torch.tensor([0, T], device="cuda")}, **options)
    assert weighted(x, **options).loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS_ON_CUDA)
@pytest.mark.parametrize(("rows", "width"), [(8448, 64), (256, 8448)], ids=["logits", "weight"])
def test_more_than_2_to_the_31_elements(rows, width, backend):
    """N V > 2^31 in one chunk, and V D > 2^31: the last rows and the last classes are right."""
    vocabulary = 262144
    assert rows * vocabulary > 2**31 or vocabulary * width > 2**31
    hidden_TD = (torch.randn(rows, width, device="cuda") / width**0.5).bfloat16().requires_grad_()
    weight_VD = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16)
    targets_T = torch.randint(vocabulary - 1000, vocabulary, (rows,), device="cuda")
    coef_T = torch.randn(rows, device="cuda")
    sink_VD = torch.zeros(vocabulary, width, device="cuda")
    ours = weighted_logprob_loss(
        hidden_TD,
        weight_VD,
        targets_T,
        coef_T,
        dweight_out=sink_VD,
        backend=backend,
        chunk_bytes=16 << 30,
    )
    ours.loss.backward()
    assert hidden_TD.grad is not None
    last = slice(rows - 8, rows)
    z_RV = hidden_TD[last].detach().double() @ weight_VD.double().T
    logp_R = z_RV.log_softmax(1).gather(1, targets_T[last, None]).squeeze(1)
    assert (ours.logp[last] - logp_R).abs().max() <= 1e-3
    dz_RV = -coef_T[last, None].double() * z_RV.softmax(1)
    dz_RV.scatter_add_(1, targets_T[last, None], coef_T[last, None].double())
    assert_close((hidden_TD.grad[last],), (dz_RV @ weight_VD.double(),), 4e-3)
    classes = slice(vocabulary - 64, vocabulary)
    lse_T = torch.cat(
        [(part.double() @ weight_VD.double().T).logsumexp(1) for part in hidden_TD.split(512)]
    )
    z_TW = hidden_TD.detach().double() @ weight_VD[classes].double().T
    dz_TW = -coef_T[:, None].double() * (z_TW - lse_T[:, None].detach()).exp()
    dz_TW += coef_T[:, None] * (
        targets_T[:, None] == torch.arange(classes.start, classes.stop, device="cuda")
    )
    assert_close((sink_VD[classes],), (dz_TW.T @ hidden_TD.detach().double(),), 4e-3)


ADDRESSING = {
    "_gemm_exp": {
        **dict.fromkeys("TAIL STORE PEAK FLAGGED ENTROPY".split(), True),
        "TMA": False,
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "BLOCK_K": 32,
        "GROUP_M": 8,
    },
    "_target_logit": {"BIAS": True, "BLOCK_M": 16, "BLOCK_D": 128, "TILE_M": 64, "HALF_N": 32},
    "_gradient_operands": {
        "LIFT": True,
        "SLOPE": True,
        "SCALED": True,
        "BLOCK_M": 8,
        "BLOCK_D": 512,
    },
    "_bias_gradient": {"BLOCK_M": 64, "BLOCK_N": 128},
}
NOT_POINTERS = {
    "shape": LogitShape("fp32", "fp32"),
    "target_ptr": "*i32",
    "flag_ptr": "*i32",
    "holds_ptr": "*i8",
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize("name", ADDRESSING)
def test_rows_are_addressed_in_64_bits(name, tmp_path, monkeypatch):
    """N V = 2.5e9 > 2^31: whatever multiplies a stride does so in int64."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vpgea_fast.kernels import linear_logprob as kernels

    kernel, constants = getattr(kernels, name), dict(ADDRESSING[name])
    if "DTYPE" in kernel.arg_names:
        constants["DTYPE"] = triton.language.bfloat16
    types = dict.fromkeys(constants, "constexpr") | NOT_POINTERS
    halves = ("hidden", "weight", "exps", "scaled")
    for argument in kernel.arg_names:
        pointer = argument in halves or argument.endswith("_ptr")
        kind = "*bf16" if argument.startswith(halves) else "*fp32"
        types.setdefault(argument, kind if pointer else "i32")
    built = triton.compile(
        ASTSource(kernel, {a: types[a] for a in kernel.arg_names}, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": True},
    )
    lines = [x for x in built.asm["ttir"].splitlines() if "_stride" in x and "tt.func" not in x]
    uses = [x for x in lines if re.search(r"%\w+_stride\b", x)]
    assert uses
    assert all(re.search(r"arith.extsi %\w+_stride : i32 to i64", use) for use in uses)

"""(B, T, D) hidden states: the bits of the flat call, and a shift that is transformers' own."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_losses import CHUNK, D, V, assert_close, gradients

from vpgea_fast.distillation import distillation_loss
from vpgea_fast.losses import linear_logprob, weighted_logprob_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

B, T, E = 3, 7, 5


def case(dtype=torch.float64, *, shape=(B, T)):
    """Hidden and weight (leaves), labels with one that is ignored, coefficients, temperatures."""
    hidden_BTD = torch.randn(*shape, D, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(V, D, dtype=dtype, requires_grad=True)
    labels_BT = torch.randint(0, V, shape)
    labels_BT[:1, 2:3] = -100
    return hidden_BTD, weight_VD, labels_BT, torch.randn(shape), torch.rand(shape) + 0.5


def flat(*tensors):
    return [x.reshape(-1, *x.shape[2:]) for x in tensors]


def test_a_batch_gives_the_bits_of_its_rows():
    hidden_BTD, weight_VD, labels_BT, coef_BT, temperature_BT = case(torch.float32)
    hidden_ND, labels_N, coef_N, temperature_N = flat(
        hidden_BTD, labels_BT, coef_BT, temperature_BT
    )
    ours = linear_logprob(
        hidden_BTD,
        weight_VD,
        labels_BT,
        temperature=temperature_BT,
        return_entropy=True,
        return_statistics=True,
        expected_T=coef_BT,
    )
    rows = linear_logprob(
        hidden_ND,
        weight_VD,
        labels_N,
        temperature=temperature_N,
        return_entropy=True,
        return_statistics=True,
        expected_T=coef_N,
    )
    for name in ("logp", "lse", "entropy"):
        assert torch.equal(getattr(ours, name), getattr(rows, name).view(B, T))
    for name in ("top1", "mean_logit", "log_sum_p2"):
        found, flatly = (getattr(x.statistics, name) for x in (ours, rows))
        assert torch.equal(found, flatly.view(B, T))
    losses = (coef_BT * ours.logp).sum(), (coef_N * rows.logp).sum()
    mine, theirs = (gradients(x, hidden_BTD, weight_VD) for x in losses)
    assert all(map(torch.equal, mine, theirs))

    one = weighted_logprob_loss(hidden_BTD, weight_VD, labels_BT, coef_BT, chunk_bytes=CHUNK)
    two = weighted_logprob_loss(hidden_ND, weight_VD, labels_N, coef_N, chunk_bytes=CHUNK)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.logp, two.logp.view(B, T))
    assert torch.equal(one.kept, two.kept.view(B, T))
    mine, theirs = (gradients(x.loss, hidden_BTD, weight_VD) for x in (one, two))
    assert all(map(torch.equal, mine, theirs))


def shifted_truth(hidden_BTD, weight_VD, labels_BT, temperature_BT):
    """(B, T) by token, as transformers shifts: logits[:, :-1] against labels[:, 1:]."""
    z_BTV = (hidden_BTD @ weight_VD.T)[:, :-1] / temperature_BT[:, 1:, None]
    nll_N = F.cross_entropy(
        z_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return F.pad(-nll_N.view(labels_BT.shape[0], -1), (1, 0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_shift_is_that_of_transformers(dtype):
    hidden_BTD, weight_VD, labels_BT, coef_BT, temperature_BT = case()
    truth_BT = shifted_truth(hidden_BTD, weight_VD, labels_BT, temperature_BT)
    truth = (coef_BT * truth_BT).sum()
    expected = gradients(truth, hidden_BTD, weight_VD)
    with torch.no_grad():
        hidden_BTD[:, -1] = math.nan  # predicts nothing and is never read
    arguments = (hidden_BTD, weight_VD, labels_BT.to(dtype))
    options = {"temperature": temperature_BT, "shift": True, "chunk_bytes": CHUNK}
    out = linear_logprob(*arguments, return_entropy=True, **options)
    one = weighted_logprob_loss(*arguments, coef_BT, **options)
    counted_BT = labels_BT != -100
    counted_BT[:, 0] = False
    for logp_BT in (out.logp, one.logp):
        assert_close((logp_BT,), (truth_BT,), 1e-12)
    for column in (out.logp, out.lse, out.entropy):
        assert torch.equal(column == 0, ~counted_BT)
    assert torch.equal(one.kept, counted_BT)
    for loss in ((coef_BT * out.logp).sum(), one.loss):
        assert_close((loss,), (truth,), 1e-12)
        got = gradients(loss, hidden_BTD, weight_VD)
        assert_close(got, expected, 1e-12)
        assert torch.equal(got[0][:, -1], torch.zeros(B, D, dtype=torch.float64))


@pytest.mark.parametrize("shift", [False, True])
def test_rows_are_those_of_the_tokens(shift):
    """b T + t of a token, whatever place predicts it; the first of a sequence takes no part. By
    place, the tokens beside the listed ones were trained in silence."""
    hidden_BTD, weight_VD, labels_BT, coef_BT, _ = case()
    teacher = (torch.randn(B, T, E).double(), torch.randn(V, E).double())
    rows = torch.tensor([0, T, 4, 2, 2 * T + 1, B * T - 1])
    listed_BT = torch.zeros(B * T, dtype=torch.bool).index_fill(0, rows, True).view(B, T)
    some_BT = coef_BT.masked_fill(~listed_BT, 0.0)
    calls = {
        "weighted": lambda coef, rows: weighted_logprob_loss(
            hidden_BTD, weight_VD, labels_BT, coef, shift=shift, rows=rows
        ),
        "distilled": lambda coef, rows: distillation_loss(
            hidden_BTD, weight_VD, *teacher, coef, shift=shift, rows=rows
        ),
    }
    for call in calls.values():
        ours, truth = call(coef_BT, rows), call(some_BT, None)
        assert torch.equal(ours.kept, truth.kept)
        got = (ours.loss, *gradients(ours.loss, hidden_BTD, weight_VD))
        assert_close(got, (truth.loss, *gradients(truth.loss, hidden_BTD, weight_VD)), 1e-12)
        for bad in (-1, B * T):
            with pytest.raises(ValueError, match=r"rows must lie in \[0, T = 21\)"):
                call(coef_BT, torch.tensor([3, bad]))
        with pytest.raises(ValueError, match="rows names a row twice"):
            call(coef_BT, torch.tensor([3, 0, 3]))
    out = linear_logprob(hidden_BTD, weight_VD, labels_BT, shift=shift, rows=rows)
    whole = linear_logprob(hidden_BTD, weight_VD, labels_BT, shift=shift)
    assert torch.equal(out.logp != 0, (whole.logp != 0) & listed_BT)
    assert_close((out.logp,), (whole.logp * listed_BT,), 1e-12)


@pytest.mark.parametrize("shift", [False, True])
def test_a_batch_is_distilled(shift):
    """coef and temperature of token t, distributions of place t - 1 where shifted."""
    hidden_BTD, weight_VD, _, coef_BT, temperature_BT = case()
    teacher_BTE, teacher_VE = torch.randn(B, T, E).double(), torch.randn(V, E).double()
    ours = distillation_loss(
        hidden_BTD,
        weight_VD,
        teacher_BTE,
        teacher_VE,
        coef_BT,
        temperature=temperature_BT,
        shift=shift,
    )
    cut = (slice(None), slice(0, T - shift)), (slice(None), slice(int(shift), T))
    rows = flat(hidden_BTD[cut[0]], teacher_BTE[cut[0]], coef_BT[cut[1]], temperature_BT[cut[1]])
    flatly = distillation_loss(
        rows[0], weight_VD, rows[1], teacher_VE, rows[2], temperature=rows[3]
    )
    assert_close((ours.loss,), (flatly.loss,), 1e-12)
    found_BT = F.pad(flatly.divergence.view(B, -1), (int(shift), 0))
    assert_close((ours.divergence,), (found_BT,), 1e-12)
    assert torch.equal(ours.kept, found_BT > 0)
    mine, theirs = (gradients(x.loss, hidden_BTD, weight_VD) for x in (ours, flatly))
    assert_close(mine, theirs, 1e-12)


@pytest.mark.parametrize("shape", [(0, T), (B, 0), (B, 1)])
def test_nothing_to_predict(shape):
    hidden_BTD, weight_VD, labels_BT, coef_BT, _ = case(shape=shape)
    out = linear_logprob(hidden_BTD, weight_VD, labels_BT, shift=True)
    one = weighted_logprob_loss(hidden_BTD, weight_VD, labels_BT, coef_BT, shift=True)
    assert out.logp.shape == one.logp.shape == one.kept.shape == shape
    assert not one.kept.any()
    for loss in (out.logp.sum(), one.loss):
        for got in gradients(loss, hidden_BTD, weight_VD):
            assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_equals_eager(dynamic):
    hidden_BTD, weight_VD, labels_BT, coef_BT, temperature_BT = case(torch.float32)

    def call(hidden, weight):
        out = weighted_logprob_loss(
            hidden, weight, labels_BT, coef_BT, temperature=temperature_BT, shift=True
        )
        return out.loss, out.logp, out.kept

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    mine, theirs = (f(hidden_BTD, weight_VD) for f in (compiled, call))
    assert all(map(torch.equal, mine, theirs))
    # Once each: a compiled backward gives its buffers away.
    found = [torch.autograd.grad(x[0], (hidden_BTD, weight_VD)) for x in (mine, theirs)]
    assert all(map(torch.equal, *found))


BAD_CALLS = {
    "flat targets": ({"targets_T": torch.zeros(B * T, dtype=torch.int64)}, r"expected \(3, 7\)"),
    "flat coefficients": ({"coef_T": torch.zeros(B * T)}, r"coef_T.*\(21,\), expected \(3, 7\)"),
    "flat temperatures": ({"temperature": torch.ones(B * T)}, r"temperature.*expected \(3, 7\)"),
    "four dimensions": ({"hidden_TD": torch.zeros(1, B, T, D)}, "flatten"),
    "shifted rows": ({"hidden_TD": torch.zeros(T, D), "shift": True}, r"shift: .*hidden\[None\]"),
    "shift": ({"shift": 1}, "shift: got 1, expected True or False"),
    "no ignore_index": ({"shift": True, "ignore_index": None}, "ignore_index: got None"),
    "no tensor": ({"shift": True, "hidden_TD": [1.0]}, "hidden_TD: got .*expected a tensor"),
    "sparse": (
        {"shift": True, "hidden_TD": torch.zeros(B, T, D).to_sparse()},
        "hidden_TD: got a torch.sparse_coo tensor, expected a dense one",
    ),
    "sparse coefficients": (
        {"shift": True, "coef_T": torch.zeros(B, T).to_sparse()},
        "coef_T: got a torch.sparse_coo tensor, expected a dense one",
    ),
    "float targets": ({"shift": True, "targets_T": torch.zeros(B, T)}, "int64 or int32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_do(name):
    hidden_BTD, weight_VD, labels_BT, coef_BT, _ = case(torch.float32)
    call = {
        "hidden_TD": hidden_BTD,
        "weight_VD": weight_VD,
        "targets_T": labels_BT,
        "coef_T": coef_BT,
    }
    changed, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        weighted_logprob_loss(**{**call, **changed})


def test_both_models_have_one_layout():
    hidden_BTD, weight_VD, _, coef_BT, _ = case(torch.float32)
    with pytest.raises(ValueError, match=r"teacher_hidden_TE: .*flatten batch and time of both"):
        distillation_loss(hidden_BTD, weight_VD, torch.zeros(B * T, E), torch.zeros(V, E), coef_BT)

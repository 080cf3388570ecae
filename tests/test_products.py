"""kernels/products.py: dz in the memory of the dW that it makes, against whole products."""

import importlib
from pathlib import Path

import pytest
import torch

from vpgea_fast.kernels import products
from vpgea_fast.kernels.contract import Sinks
from vpgea_fast.losses import weighted_logprob_loss

MIB, ROOT = 1 << 20, Path(__file__).parents[1]


def fresh(classes, width, dtype=torch.float64):
    """Sinks of a dW whose memory holds no number."""
    return Sinks(weight=torch.full((classes, width), torch.nan, dtype=dtype), fresh=True)


@pytest.mark.parametrize("left_out", [0, 1, 2])
@pytest.mark.parametrize("copied", [64, 200, 1000])
def test_dweight_is_the_product_however_often_dz_moves(copied, left_out, monkeypatch):
    """`left_out` rows are skipped: dz no longer ends where dW does."""
    monkeypatch.setattr(products, "COPIED", copied)
    lent = 0
    for classes in (*range(1, 24), 97):
        for width in (2, 3, 5, 8, 16, 40):
            for rows in range(1, width + 2):
                sinks = fresh(classes, width)
                room_CV = products.room_in_dweight(sinks, rows, torch.float64)
                if room_CV is None:
                    continue
                assert sinks.weight is not None
                lent += 1
                room_CV.copy_(torch.randn(rows, classes, dtype=torch.float64))
                kept = max(0, rows - left_out)
                dz_CV, hidden_CD = room_CV[:kept], torch.randn(kept, width, dtype=torch.float64)
                expected = 0.5 * dz_CV.T @ hidden_CD
                products.put_dweight_(sinks.weight, dz_CV, hidden_CD, 0.5, begun=False)
                torch.testing.assert_close(sinks.weight, expected, rtol=1e-12, atol=1e-12)
    assert lent > 100


def test_a_dweight_lends_what_it_has_no_use_for_alone():
    rows, classes, width = 8, 9000, 30
    lends = fresh(classes, width)
    room_CV = products.room_in_dweight(lends, rows, torch.float64)
    assert room_CV is not None
    assert lends.weight is not None
    assert room_CV.shape == (rows, classes)
    assert room_CV.data_ptr() + 8 * room_CV.numel() == lends.weight.data_ptr() + 8 * 270_000
    for sinks, asked, dtype in (
        (lends, 21, torch.float64),  # more than two thirds of the width
        (lends, 1, torch.float64),  # as small as a copy
        (lends, rows, torch.float32),
        (lends.cleared(), rows, torch.float64),  # it has numbers
        (Sinks(), rows, torch.float64),
        (Sinks(weight=torch.empty(width, classes).T, fresh=True), 20, torch.float32),
    ):
        assert products.room_in_dweight(sinks, asked, dtype) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "logit_scale": 0.5, "temperature": 0.7},
        {"skip_below": 0.2},
        {"label_smoothing": 0.1, "z_loss": 0.01},
        {"masked": True},
        {"apart": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_loss_with_room_has_the_gradients_of_one_that_adds_up(dtype, options):
    """A dweight_out has numbers already, and lends nothing: its chunks have memory of their own."""
    options = dict(options)
    hidden_TD = torch.randn(60, 160).to(dtype).requires_grad_()
    weight_VD = (0.1 * torch.randn(5003, 160)).to(dtype).requires_grad_()
    targets_T, coef_T = torch.randint(5003, (60,)), torch.randn(60)
    if options.pop("bias", None):
        options["bias"] = torch.randn(5003).to(dtype).requires_grad_()
    if options.pop("masked", None):
        targets_T[7:19] = -100
    if options.pop("apart", None):  # rows that are not dense
        hidden_TD = hidden_TD.detach().T.contiguous().T.requires_grad_()
    sink_VD = torch.zeros(5003, 160, dtype=torch.promote_types(dtype, torch.float32))
    wanted = [hidden_TD, weight_VD, *(x for x in options.values() if torch.is_tensor(x))]

    def gradients(**sink):
        out = weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, backend="torch", **options, **sink
        )
        inputs = wanted if not sink else [hidden_TD, *wanted[2:]]
        return torch.autograd.grad(out.loss, inputs)

    dhidden, dweight, *dbias = gradients()
    expected = gradients(dweight_out=sink_VD)
    found = [dhidden, dweight.to(sink_VD.dtype), *dbias]
    exact = 1e-13 if dtype is torch.float64 else 2e-6
    for one, other in zip(found, [expected[0], sink_VD, *expected[1:]], strict=True):
        # dW of a bfloat16 weight is rounded once more.
        error = (one - other).norm() / other.norm()
        assert error < (3e-3 if dtype is torch.bfloat16 else exact)


@pytest.mark.parametrize("rows", [64, 300, 1000])  # of the last some classes wait: late.py
def test_a_pass_with_room_holds_its_gradients_and_a_copy_alone(rows, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    peak_bytes = importlib.import_module("kernel_bench").peak_bytes
    hidden_TD = torch.randn(rows, 512, requires_grad=True)
    weight_VD = torch.randn(16384, 512, requires_grad=True)
    targets_T, coef_T = torch.randint(16384, (rows,)), torch.randn(rows)

    def run():
        out = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend="torch")
        torch.autograd.grad(out.loss, (hidden_TD, weight_VD))

    class Job:
        prepare = __call__ = staticmethod(run)

    gradients = 4 * 512 * (16384 + rows)
    assert gradients <= peak_bytes(Job(), torch.device("cpu")) < gradients + MIB


def test_rows_are_read_in_place_whatever_the_default_device_is():
    hidden_TD, weight_VD = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    targets_T, coef_T = torch.tensor([1, 2, 3, 0, 6]), torch.ones(5)
    with torch.device("meta"):
        out = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, backend="torch")
    logp_TV = torch.log_softmax(hidden_TD @ weight_VD.T, dim=1)
    torch.testing.assert_close(out.logp, logp_TV.gather(1, targets_T[:, None])[:, 0].detach())

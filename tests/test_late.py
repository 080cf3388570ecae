"""kernels/late.py: classes of the head whose gradients come last, against the whole head."""

import math

import pytest
import torch

from vpgea_fast.kernels import late
from vpgea_fast.losses import linear_logprob, weighted_logprob_loss


@pytest.fixture
def waits(monkeypatch):
    """Passes whose late classes got their gradients last: (rows of a chunk, first late class)."""
    seen, put = [], late.LateClasses.put_gradients_

    def noted(self, *arguments):
        seen.append((self.rows, self.first))
        put(self, *arguments)

    monkeypatch.setattr(late.LateClasses, "put_gradients_", noted)
    monkeypatch.setattr(late, "SMALL", 0)
    return seen


def case(rows, width, classes, dtype=torch.float64):
    hidden_TD = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight_VD = (torch.randn(classes, width, dtype=dtype) / math.sqrt(width)).requires_grad_()
    return hidden_TD, weight_VD, torch.randint(classes, (rows,)), torch.randn(rows, dtype=dtype)


def both(arguments, wanted, **options):
    """(loss and gradients) of the backends torch and reference."""
    found = []
    for backend in ("torch", "reference"):
        out = weighted_logprob_loss(*arguments, backend=backend, **options)
        found.append([out.loss, out.logp, *torch.autograd.grad(out.loss, wanted)])
    return found


def close(found, expected, exact=1e-12):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= exact * other.norm()


@pytest.mark.parametrize("shape", [(60, 16, 500), (400, 32, 1003), (999, 8, 77), (5000, 3, 30)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "logit_scale": 0.5, "temperature": 0.7},
        {"temperature": True},
        {"masked": True},
        {"tile": 1},
        {"last": 7, "masked": True},
        {"frozen": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_gradients_are_those_of_the_whole_head(shape, options, waits, monkeypatch):
    options, arguments = dict(options), case(*shape)
    hidden_TD, weight_VD, targets_T, _ = arguments
    wanted = [hidden_TD, weight_VD]
    if options.pop("bias", None):
        options["bias"] = torch.randn(shape[2], dtype=torch.float64, requires_grad=True)
        wanted.append(options["bias"])
    if options.get("temperature") is True:
        options["temperature"] = 0.5 + torch.rand(shape[0], dtype=torch.float64)
    if options.pop("masked", None):
        targets_T[torch.randperm(shape[0])[: shape[0] // 5]] = -100
    if options.pop("tile", None):
        monkeypatch.setattr(late, "TILE", 8)
    if rows := options.pop("last", None):
        monkeypatch.setattr(late, "LAST_ROWS", rows)
    if options.pop("frozen", None):  # a trunk without gradients
        hidden_TD.requires_grad_(False)
        wanted.remove(hidden_TD)
    close(*both(arguments, wanted, **options))
    ((step, first),) = waits
    assert 0 < first < shape[2]
    assert step * first <= (shape[2] - first) * shape[1]  # their logits fit into what is lent


def test_a_call_that_makes_its_logits_twice_gives_them_the_same_place(waits):
    hidden_TD, weight_VD, targets_T, coef_T = case(300, 24, 701)
    found = []
    for backend in ("torch", "reference"):
        out = linear_logprob(hidden_TD, weight_VD, targets_T, backend=backend)
        total = coef_T @ out.logp + (coef_T**2) @ out.lse
        found.append(torch.autograd.grad(total, (hidden_TD, weight_VD)))
    close(*found)
    assert len(waits) == 1


@pytest.mark.parametrize("masked", [range(340), range(330, 500)], ids=["early", "late"])
def test_classes_without_a_chance_make_no_nan(masked, waits):
    """A bias of -inf, as a mask of the vocabulary has it, on all classes of a part."""
    hidden_TD, weight_VD, _, coef_T = case(60, 16, 500)
    bias_V = torch.zeros(500, dtype=torch.float64)
    bias_V[list(masked)] = -torch.inf
    targets_T = bias_V.isfinite().nonzero().squeeze(1)[:60]
    close(*both((hidden_TD, weight_VD, targets_T, coef_T), (hidden_TD, weight_VD), bias=bias_V))
    ((_, first),) = waits
    assert masked.stop >= first if masked.start == 0 else masked.start <= first


@pytest.mark.parametrize("place", ["hidden", "early", "late"])
def test_a_nan_is_never_hidden(place, waits):
    arguments = case(60, 16, 500)
    with torch.no_grad():
        tensor, at = {"hidden": (0, 7), "early": (1, 3), "late": (1, 499)}[place]
        arguments[tensor][at] = torch.nan
    out = weighted_logprob_loss(*arguments, backend="torch")
    dhidden, dweight = torch.autograd.grad(out.loss, arguments[:2])
    assert out.loss.isnan()
    rows = slice(7, 8) if place == "hidden" else slice(None)
    assert out.logp[rows].isnan().all()
    assert dhidden[rows].isnan().all()
    assert dweight.isnan().all()
    assert waits


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_bytes": 1 << 20},
        {"softcap": 5.0},
        {"skip_below": 0.1},
        {"label_smoothing": 0.1},
        {"z_loss": 0.01},
        {"dweight_out": True},
        {"rows": 8},
        {"entropy": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_class_waits_where_more_than_its_sums_is_wanted(options, waits):
    options, (hidden_TD, weight_VD, targets_T, coef_T) = dict(options), case(60, 16, 500)
    if options.pop("dweight_out", None):
        options["dweight_out"] = torch.zeros_like(weight_VD)
    if rows := options.pop("rows", None):  # the logits of few rows lie in dW as they are
        options["rows"] = torch.arange(rows)
    if options.pop("entropy", None):
        out = linear_logprob(hidden_TD, weight_VD, targets_T, return_entropy=True, backend="torch")
        assert out.entropy is not None
        out.entropy.sum().backward()
    else:
        weighted_logprob_loss(
            hidden_TD, weight_VD, targets_T, coef_T, backend="torch", **options
        ).loss.backward()
    assert not waits


def test_halves_are_rounded_once_and_none_waits(waits):
    arguments = case(60, 16, 500, torch.bfloat16)
    weighted_logprob_loss(*arguments, backend="torch").loss.backward()
    assert not waits


def test_a_dweight_of_the_caches_size_has_chunks(waits, monkeypatch):
    monkeypatch.undo()
    arguments = case(60, 16, 500)
    weighted_logprob_loss(*arguments, backend="torch").loss.backward()
    assert not waits

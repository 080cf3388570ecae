"""vpgea_fast/embedding.py: gradients of embeddings on a CPU, added up in float32."""

import copy

import pytest
import torch
from torch import nn

from vpgea_fast.embedding import add_in_float32

V, D, T = 50, 8, 2000


class Scaled(nn.Embedding):
    """As Gemma's: the module's own arithmetic around torch's lookup."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


class Behind(nn.Embedding):
    """As OPT's positions: another id than the caller's."""

    def forward(self, ids):
        return super().forward(ids + 2)


def gradient(module, ids, upstream):
    output = module(ids)
    output.backward(upstream.to(output.dtype))
    return output, module.weight.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "made",
    [
        lambda: nn.Embedding(V, D),
        lambda: nn.Embedding(V, D, padding_idx=7),
        lambda: Scaled(V, D),
        lambda: Behind(V, D),
    ],
    ids=["plain", "padding", "scaled", "behind"],
)
def test_a_token_that_comes_often_has_its_whole_gradient(made, dtype):
    torch.manual_seed(0)
    plain = made().to(dtype)
    ours = copy.deepcopy(plain)
    add_in_float32(nn.ModuleList([ours]))
    exact = copy.deepcopy(plain).double()
    # Half of a batch is one token; some ids never come.
    ids = torch.randint(0, V - 5, (4, T // 4)).where(torch.rand(4, T // 4) < 0.5, 3)
    ids[0, :9] = 7
    upstream = (1 + torch.rand(4, T // 4, D)).to(dtype) / 64
    output, got = gradient(ours, ids, upstream)
    same, of_torch = gradient(plain, ids, upstream)
    _, want = gradient(exact, ids, upstream)
    assert torch.equal(output, same)
    assert (got.dtype, isinstance(ours, type(plain))) == (dtype, True)
    size, rounding = want.abs().max(), torch.finfo(dtype).eps
    # Scaled: the upstream of the lookup is rounded too.
    assert (got.double() - want).abs().max() < rounding * size
    assert (of_torch.double() - want).abs().max() > 4 * rounding * size
    assert torch.equal(got == 0, want == 0)


def test_float32_keeps_the_kernel_of_torch():
    ours, plain = nn.Embedding(V, D), nn.Embedding(V, D)
    plain.weight.data = ours.weight.data.clone()
    add_in_float32(nn.ModuleList([ours]))
    ids, upstream = torch.randint(0, V, (T,)), torch.randn(T, D)
    assert torch.equal(gradient(ours, ids, upstream)[1], gradient(plain, ids, upstream)[1])
    assert "Embedding" in type(ours(ids).grad_fn).__name__


def test_a_second_call_changes_nothing():
    model = nn.ModuleList([Scaled(V, D), nn.Embedding(V, D)])
    add_in_float32(model)
    kinds = [type(module) for module in model]
    add_in_float32(model)
    assert [type(module) for module in model] == kinds
    assert [kind.__name__ for kind in kinds] == ["Scaled", "_Embedding"]

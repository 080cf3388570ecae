"""Which backend runs, and why: the policy is a pure function, so every machine can be asked."""

import logging
import typing

import pytest
import torch

from vpgea_fast.config import LossConfig
from vpgea_fast.kernels import backends
from vpgea_fast.kernels.backends import BACKENDS, Situation, choose
from vpgea_fast.losses import choose_backend, linear_logprob, resolve_backend

H200 = (9, 0)
NOWHERE = dict.fromkeys(("triton", "cublas"), "triton is not installed")


@pytest.mark.parametrize(
    ("call", "name", "because"),
    [
        (Situation("cuda", torch.bfloat16, H200), "triton", "tensor cores"),
        (Situation("cuda", torch.float16, (8, 0)), "triton", "tensor cores"),
        (Situation("cuda", torch.bfloat16, H200, lse_gradient=True), "triton", "tensor cores"),
        (Situation("cuda", torch.bfloat16, H200, entropy_gradient=True), "torch", "the entropy"),
        (Situation("cuda", torch.float16, H200, lse_gradient=True), "torch", "lse in float16"),
        (Situation("cuda", torch.float32, H200), "torch", "float32 without TF32"),
        (Situation("cuda", torch.float64, H200), "torch", "not float64"),
        (Situation("cuda", torch.float16, (7, 5)), "torch", "sm_80 or newer"),
        (Situation("cuda", torch.bfloat16, None), "torch", "sm_80 or newer"),  # not NVIDIA
        (Situation("cpu", torch.bfloat16), "torch", "the tensors are on cpu"),
        (Situation("mps", torch.float32), "torch", "the tensors are on mps"),
        (Situation("cuda", torch.float32, H200, batch_invariant=True), "triton", "only one"),
    ],
    ids=str,
)
def test_auto_takes(call, name, because, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice = choose("auto", call, {})
    assert choice.name == name
    assert because in choice.reason


def test_auto_says_what_is_not_here():
    choice = choose("auto", Situation("cuda", torch.bfloat16, H200), NOWHERE)
    assert choice.name == "torch"
    assert choice.reason == (
        "chunked, on any device; not 'triton': triton is not installed; not 'cublas': triton is "
        "not installed"
    )


@pytest.mark.parametrize(
    ("name", "call", "missing", "message"),
    [
        ("quack", Situation("cpu", torch.float32), {}, r"no such backend.*'auto', 'triton', 'cubl"),
        ("triton", Situation("cuda", torch.bfloat16, H200), NOWHERE, "triton is not installed"),
        ("triton", Situation("cpu", torch.bfloat16), {}, "move them to a CUDA device"),
        ("triton", Situation("cuda", torch.float64, H200), {}, "not float64; use 'torch'"),
        (
            "triton",
            Situation("cuda", torch.bfloat16, H200, entropy_gradient=True),
            {},
            "no gradient of the entropy; detach",
        ),
        (
            "triton",
            Situation("cuda", torch.float16, H200, lse_gradient=True),
            {},
            "no gradient of lse in float16; detach lse",
        ),
        (
            "torch",
            Situation("cuda", torch.bfloat16, H200, batch_invariant=True),
            {},
            "for batch_invariant=True use 'triton'",
        ),
        (
            "reference",
            Situation("cpu", torch.float32, None, batch_invariant=True),
            {},
            "batch_invariant=True needs CUDA: 'triton'",
        ),
        (
            "auto",
            Situation("cpu", torch.float32, None, batch_invariant=True),
            NOWHERE,
            "no backend can run this call .float32 on cpu.: 'triton': triton is not installed; 'c",
        ),
    ],
)
def test_a_backend_that_cannot_is_an_error(name, call, missing, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        choose(name, call, missing)


def test_the_configuration_names_every_backend():
    names = typing.get_args(typing.get_type_hints(LossConfig)["backend"])
    assert set(names) == {"auto", *BACKENDS}
    assert LossConfig().backend == "auto"


def test_names_on_this_machine():
    assert resolve_backend(device="cpu") == resolve_backend("torch") == "torch"
    assert resolve_backend("reference") == "reference"
    assert choose_backend("torch", device="cpu").reason == "asked for"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'triton' is not available.*'torch', 'reference'"):
            resolve_backend("triton")


def test_a_decision_is_logged_once(caplog):
    backends.resolve.cache_clear()
    backends._announce.cache_clear()
    hidden_TD, weight_VD = torch.randn(5, 4), torch.randn(9, 4)
    targets_T = torch.arange(5)
    with caplog.at_level(logging.INFO, logger="vpgea_fast.losses"):
        for _ in range(3):
            linear_logprob(hidden_TD, weight_VD, targets_T)
        linear_logprob(hidden_TD.double(), weight_VD.double(), targets_T)
        linear_logprob(hidden_TD, weight_VD, targets_T, backend="torch")
    assert len(caplog.messages) == 2
    assert "backend 'torch' for float32 on cpu: chunked, on any device" in caplog.messages[0]
    assert "backend 'torch' for float64 on cpu" in caplog.messages[1]


@pytest.mark.parametrize(
    ("free_gib", "expected_mib"), [(100, 4096), (32, 4096), (31, 2048), (3, 256), (0.1, 64)]
)
def test_a_chunk_takes_an_eighth_of_what_is_free(free_gib, expected_mib):
    budget = backends.halved_to_fit(4 << 30, int(free_gib * 2**30))
    assert budget >> 20 == expected_mib


@pytest.mark.gpu
def test_the_driver_is_asked_once_and_a_full_device_gets_small_chunks():
    weight_VD = torch.zeros(1000, 8, device="cuda")
    backends._budgets.clear()
    first = backends.chunk_budget(weight_VD)
    free = torch.cuda.mem_get_info()[0]
    assert first is not None
    assert first <= max(backends.LEAST_CHUNK, free // backends.FREE_SHARE)
    ballast = torch.empty(int(0.97 * free), dtype=torch.uint8, device="cuda")
    assert backends.chunk_budget(weight_VD) == first
    backends._budgets.clear()
    small = backends.chunk_budget(weight_VD)
    del ballast
    assert small is not None
    assert small < first

"""Which backend runs, and why: the policy is a pure function, so every machine can be asked."""

import importlib
import inspect
import logging
import types
import typing

import pytest
import torch

from vpgea_fast import losses
from vpgea_fast.config import LossConfig
from vpgea_fast.kernels import backends, checks, head
from vpgea_fast.kernels.backends import BACKENDS, Situation, choose
from vpgea_fast.kernels.contract import NUMBERS, SETTINGS, Settings
from vpgea_fast.losses import (
    HeadOptions,
    choose_backend,
    linear_logprob,
    resolve_backend,
    weighted_logprob_loss,
)

GIB = 2**30
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
        (Situation("cuda", torch.bfloat16, H200, statistics=True), "torch", "no row statistics"),
        (Situation("cuda", torch.bfloat16, H200, smoothing=True), "torch", "label smoothing"),
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
            "cublas",
            Situation("cuda", torch.bfloat16, H200, statistics=True),
            {},
            "no row statistics, label smoothing or z-loss; leave them out, or use 'torch'",
        ),
        (
            "torch",
            Situation("cpu", torch.float16, smoothing=True),
            {},
            "label_smoothing, z_loss: got float16, whose passes have neither; use bfloat16",
        ),
        (  # "reference" could, with all logits at once
            "auto",
            Situation("cpu", torch.float16, smoothing=True),
            {},
            "label_smoothing, z_loss: got float16",
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


def test_every_backend_has_one_signature():
    """One call serves all; the benchmark's switch of the cuBLAS head is the only one more."""
    pytest.importorskip("triton")
    names = ("reference", "chunked", "linear_logprob", "cublas")
    modules = [importlib.import_module(f"vpgea_fast.kernels.{name}") for name in names]
    signatures = [dict(inspect.signature(module.head_pass).parameters) for module in modules]
    assert signatures[-1].pop("logits_dtype").default is torch.float32
    assert all(list(x.items()) == list(signatures[0].items()) for x in signatures)
    assert len(signatures[0]) == 9


def test_an_option_has_one_default_and_one_name():
    """HeadOptions, which a user sees, against the records that become an op's arguments."""
    own = {"bias", "rows"}  # tensors: they are inputs of the op
    assert set(HeadOptions.__annotations__) == own | set(checks.OPTIONS)
    derived = ("operands", "group", "classes")  # of the tensors
    assert Settings._fields == checks.OPTIONS + derived
    assert set(NUMBERS) <= set(checks.OPTIONS)
    assert HeadOptions.__doc__ is not None
    for name in checks.OPTIONS:
        default = f"{Settings._field_defaults[name]!r}".replace("'", '"')
        assert f"    {name} ({default}): " in HeadOptions.__doc__, name
    assert SETTINGS == (
        "float temperature, float? softcap, float logit_scale, int ignore_index, str backend, "
        "int? chunk_bytes, bool batch_invariant, bool validate, float skip_below, "
        "ScalarType operands, str? group, int? classes"
    )


def test_an_unknown_option_is_named():
    hidden_TD, weight_VD, targets_T = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)
    for name in ("sofcap", "operands"):
        with pytest.raises(TypeError, match=f"argument '{name}'; options are bias, rows, temp"):
            linear_logprob(hidden_TD, weight_VD, targets_T, **{name: torch.float16})


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


class FakeDriver:
    """A device of 80 GiB: what torch.cuda would say of it, and how often it was asked."""

    def __init__(self, monkeypatch):
        self.free, self.asked = 0, 0
        properties = types.SimpleNamespace(total_memory=80 * GIB)
        for name, answer in (
            ("get_device_properties", lambda _: properties),
            ("is_current_stream_capturing", lambda: False),
            ("memory_reserved", lambda _: 3 * GIB),
            ("memory_allocated", lambda _: 2 * GIB),
            ("mem_get_info", self.answer),
        ):
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(backends, "_budgets", {})

    def answer(self, _):
        self.asked += 1
        return self.free * GIB, 80 * GIB


class OnCuda:
    """A weight there, as far as the question goes: device, shape, dtype."""

    device, shape, dtype = torch.device("cuda", 0), (152064, 3584), torch.bfloat16


def test_a_probe_while_an_engine_holds_the_device_decides_nothing(monkeypatch):
    """1 GiB free while vLLM is awake, 39 GiB when the training begins, 1 at the next probe."""
    driver = FakeDriver(monkeypatch)
    budgets = []
    for free, gradients in ((1, False), (39, True), (0, False), (0, True)):
        driver.free = free
        budgets.append(backends.chunk_budget(OnCuda, gradients=gradients))
    assert [budget >> 20 for budget in budgets] == [512, 4096, 4096, 4096]
    assert driver.asked == 1
    backends._budgets.clear()
    assert backends.chunk_budget(OnCuda, gradients=True) == 128 << 20  # 1/8 of what torch holds
    assert driver.asked == 2


def test_only_calls_with_gradients_ask(monkeypatch):
    """The losses say which they are: scoring, a value whose gradient comes later, one pass."""
    asked, real = [], head.chunk_budget

    def spy(weight_VD, *, gradients, sharded):
        asked.append(gradients)
        return real(weight_VD, gradients=gradients, sharded=sharded)

    monkeypatch.setattr(head, "chunk_budget", spy)
    hidden_TD, weight_VD = torch.randn(5, 4), torch.randn(9, 4, requires_grad=True)
    targets_T, coef_T = torch.arange(5), torch.ones(5)
    with torch.no_grad():
        linear_logprob(hidden_TD, weight_VD, targets_T)
    assert asked == [False]
    linear_logprob(hidden_TD, weight_VD, targets_T).logp.sum().backward()
    assert asked == [False, False, True]
    weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T)
    assert asked == [False, False, True, True]
    with torch.no_grad():
        weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T)
    assert asked == [False, False, True, True, False]


@pytest.mark.gpu
def test_the_driver_is_asked_once_and_a_full_device_gets_small_chunks():
    weight_VD = torch.zeros(1000, 8, device="cuda")
    backends._budgets.clear()
    first = backends.chunk_budget(weight_VD, gradients=True)
    free = torch.cuda.mem_get_info()[0]
    assert first is not None
    assert first <= max(backends.LEAST_CHUNK, free // backends.FREE_SHARE)
    ballast = torch.empty(int(0.97 * free), dtype=torch.uint8, device="cuda")
    assert backends.chunk_budget(weight_VD, gradients=True) == first
    backends._budgets.clear()
    small = backends.chunk_budget(weight_VD, gradients=True)
    del ballast
    assert small is not None
    assert small < first


@pytest.mark.parametrize("name", ["linear_logprob", "weighted_logprob_loss", "vpgea_loss"])
def test_a_signature_lists_every_option_with_its_default(name: str):
    """help() and notebooks read the signature: **options would tell nobody anything."""
    parameters = inspect.signature(getattr(losses, name)).parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    defaults = {option: parameters[option].default for option in HeadOptions.__annotations__}
    assert defaults == {
        "bias": None,
        "temperature": 1.0,
        "softcap": None,
        "logit_scale": 1.0,
        "ignore_index": -100,
        "backend": "auto",
        "rows": None,
        "chunk_bytes": None,
        "batch_invariant": False,
        "validate": False,
        "skip_below": 0.0,
    }

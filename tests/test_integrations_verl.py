"""verl's two head functions by ours: numbers against float64, and against verl's own where it is.

Budgets: in float32 1e-5 for values, and for each gradient as one vector. In bfloat16, where verl
rounds the logits, ours are never further from float64 than its own.

Of verl the files that are asked for are imported, without its packages' `__init__`: those want Ray.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_integrations import TINY, error, flat, make
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from vpgea_fast.integrations import verl
from vpgea_fast.integrations.verl import (
    COPIES,
    FUSED,
    HOMES,
    STAND_INS,
    TESTED,
    TWIN,
    FusedLinearForPPO,
    enable,
    linear_cross_entropy,
)

pytestmark = pytest.mark.hosts

TEMPERATURE, V = 0.7, TINY["vocab_size"]
PACKAGES = ("", ".utils", ".utils.experimental", ".utils.kernel", ".models", ".models.transformers")


def case(shape=(2, 5), dtype=torch.float32, width=16):
    """hidden (*shape, D), weight (V, D), labels, and signed factors of log-probs and entropies."""
    made = torch.Generator().manual_seed(3)
    hidden = torch.randn(*shape, width, generator=made)
    weight = torch.randn(V, width, generator=made)
    labels = torch.randint(V, shape, generator=made)
    signs = torch.randn(2, *shape, generator=made)
    return hidden.to(dtype), weight.to(dtype), labels, signs


def scored(call, hidden, weight, labels, signs):
    """(log-probs, entropies, d hidden, d weight) of a call by verl's arguments."""
    x, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    logp, entropy = call(x, w, labels, TEMPERATURE)
    (signs[0].view_as(logp) * logp + signs[1].view_as(entropy) * entropy).sum().backward()
    return [t.detach().double().flatten() for t in (logp, entropy, x.grad, w.grad)]


def by_logits(hidden, weight, labels, temperature):
    """The same in float64, through the full logits."""
    logp_V = (hidden @ weight.T / temperature).log_softmax(-1)
    kept = labels != -100
    logp = logp_V.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logp * kept, -(logp_V.exp() * logp_V).sum(-1) * kept


def exact(hidden, weight, labels, signs):
    return scored(by_logits, hidden.double(), weight.double(), labels, signs.double())


def errors(got, truth):
    return [error(x, y) for x, y in zip(got, truth, strict=True)]


def fused(chunk_size=512, impl_backend="torch"):
    return FusedLinearForPPO(chunk_size, impl_backend).forward


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5), (7,), (1, 1)])
@pytest.mark.parametrize("call", [fused(), fused(impl_backend="liger"), linear_cross_entropy])
def test_values_and_gradients_are_those_of_float64(call, shape):
    given = case(shape)
    assert max(errors(scored(call, *given), exact(*given))) < 1e-5


def test_shapes_and_dtypes_are_those_of_verl():
    hidden, weight, labels, _ = case(dtype=torch.bfloat16)
    pairs = {
        (2, 5): fused()(hidden, weight, labels.int(), 1),
        (10,): linear_cross_entropy(hidden, weight, labels, 1.0, "NONE"),
        # Megatron's layout: tokens first.
        (5,): linear_cross_entropy(hidden[0][:, None], weight, labels[:1], TEMPERATURE),
    }
    for shape, (logp, entropy) in pairs.items():
        assert logp.shape == entropy.shape == shape
        assert logp.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize("call", [fused(), linear_cross_entropy])
def test_a_place_without_a_label_counts_nowhere(call):
    hidden, weight, labels, signs = case()
    labels[0, 3] = labels[1, 0] = -100
    got, truth = (
        f(hidden, weight, labels, signs) for f in (functools.partial(scored, call), exact)
    )
    assert max(errors(got, truth)) < 1e-5
    assert float(got[0][3]) == float(got[1][5]) == 0.0


def test_autocast_is_followed():
    hidden, weight, labels, signs = case()
    with torch.autocast("cpu", torch.bfloat16):
        got = scored(fused(), hidden, weight, labels, signs)
    found = errors(got, exact(hidden, weight, labels, signs))
    assert 1e-4 < max(found) < 2e-2


# --- refusals -------------------------------------------------------------------------------------


def per_token() -> Any:
    return torch.ones(2)


REFUSED: dict[str, Any] = {
    "impl_backend: got 'triton'": lambda *_: FusedLinearForPPO(impl_backend="triton"),
    "temperature: got a tensor (2,)": lambda h, w, y: fused()(h, w, y, per_token()),
    "temperature: got 0.0": lambda h, w, y: linear_cross_entropy(h, w, y, 0.0),
    "reduction: got 'mean'": lambda h, w, y: linear_cross_entropy(h, w, y, 1.0, "mean"),
    "input_ids (10,)": lambda h, w, y: fused()(h, w, y.flatten()),
    "labels (2, 4)": lambda h, w, y: linear_cross_entropy(h, w, y[:, 1:]),
    "weight_VD is torch.float64": lambda h, w, y: fused()(h, w.double(), y),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_served_is_an_error_with_its_name(words):
    hidden, weight, labels, _ = case()
    with pytest.raises(ValueError) as caught:
        REFUSED[words](hidden, weight, labels)
    assert words in str(caught.value)


def over_two_processes():
    import torch.distributed as dist
    from test_losses import process_group

    hidden, weight, labels, _ = case()
    with process_group():
        alone: Any = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
        one = linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "none", alone)
        plain = linear_cross_entropy(hidden, weight, labels, TEMPERATURE)
        with pytest.raises(ValueError, match="tensor_model_parallel_size to 1"):
            linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "none", dist.group.WORLD)
    return all(torch.equal(x, y) for x, y in zip(one, plain, strict=True))


def test_a_vocabulary_cut_by_megatron_is_refused():
    assert run_ranks(over_two_processes) == [True, True]


def test_without_verl_it_says_what_to_install():
    if importlib.util.find_spec("verl") is not None:
        pytest.skip("verl is there")
    with pytest.raises(ImportError, match=r"verl is not there .*: pip install 'verl>=0\.9,<0\.10'"):
        enable()


# --- verl itself ----------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch):
    """verl's folders as packages: name -> its own module, and `version` of what is installed."""
    spec = importlib.util.find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations
    root = spec.submodule_search_locations[0]
    for name in [x for x in sys.modules if x.split(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    for name in PACKAGES:
        package = types.ModuleType(f"verl{name}")
        package.__path__ = [root + name.replace(".", "/")]
        monkeypatch.setitem(sys.modules, f"verl{name}", package)
    sys.modules["verl"].__version__ = metadata.version("verl")  # pyright: ignore[reportAttributeAccessIssue]
    verl._WAS.clear()
    found = {name: importlib.import_module(home) for name, home in HOMES.items()}
    before = {name: getattr(module, name) for name, module in found.items()}
    yield types.SimpleNamespace(**before, modules=found, root=Path(root))
    assert {name: getattr(module, name) for name, module in found.items()} == before
    verl._WAS.clear()
    for name in [x for x in sys.modules if x.split(".")[0] == "verl"]:
        sys.modules.pop(name)


class TestVerl:
    pytestmark = pytest.mark.hosts("verl")

    def test_signatures_are_those_of_verl(self, own):
        for ours, theirs in (
            (FusedLinearForPPO.__init__, own.FusedLinearForPPO.__init__),
            (FusedLinearForPPO.forward, own.FusedLinearForPPO.forward),
        ):
            assert arguments(ours) == arguments(theirs)
        twin = own.modules[TWIN].LinearCrossEntropy.forward
        assert arguments(linear_cross_entropy) == arguments(twin)[1:]  # without ctx

    def test_these_are_all_places_that_import_the_two(self, own):
        """In every file of verl: a module keeps it (COPIES), or a forward imports it when run."""
        kept, called = set(), set()
        for file in own.root.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            if not any(home in text for home in HOMES.values()):
                continue
            tree = ast.parse(text)
            module = ".".join(["verl", *file.relative_to(own.root).with_suffix("").parts])
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module in HOMES.values():
                    assert [alias.name for alias in node.names] in ([FUSED], [TWIN])
                    (kept if node in tree.body else called).add(module)
        assert kept == {*COPIES}
        names = ("dense_common", "glm4v", "qwen2_vl", "qwen3_vl", "qwen3_5")
        assert called == {f"verl.models.transformers.{name}" for name in names}

    def test_numbers_are_those_of_verl(self, own):
        given = case()
        theirs = scored(own.FusedLinearForPPO().forward, *given)
        assert max(errors(scored(fused(), *given), theirs)) < 1e-5

    def test_bfloat16_is_never_further_from_float64_than_verl(self, own):
        given = case(shape=(3, 40), dtype=torch.bfloat16)
        truth = exact(*given)
        theirs = errors(scored(own.FusedLinearForPPO().forward, *given), truth)
        ours = errors(scored(fused(), *given), truth)
        assert all(mine <= their for mine, their in zip(ours, theirs, strict=True)), (ours, theirs)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_on_a_gpu_it_is_never_further_from_float64_than_verls_kernels(self, own, dtype):
        """Its Triton twin, which runs on CUDA alone, by the shapes that its tiles ask for."""
        given = [x.cuda() for x in case(shape=(3, 40), dtype=dtype, width=128)]
        truth = exact(*given)
        theirs = errors(scored(own.linear_cross_entropy, *given), truth)
        ours = errors(scored(linear_cross_entropy, *given), truth)
        assert all(mine <= max(their, 1e-5) for mine, their in zip(ours, theirs, strict=True)), (
            ours,
            theirs,
        )

    @pytest.mark.usefixtures("own")
    @pytest.mark.parametrize("implementation", ["torch", "liger", "triton"])
    def test_a_patched_model_gives_what_its_logits_give(self, implementation):
        """Through verl's patch_forward_with_backends; its own Triton kernels need CUDA."""
        patch = importlib.import_module("verl.models.transformers.monkey_patch")
        model = make("qwen2")
        model.__class__ = type("Patched", (Qwen2ForCausalLM,), {})  # verl patches the class
        patch.patch_forward_with_backends(model, True, implementation)
        truth = model_scored(make("qwen2", torch.float64), logits=True)
        with enable():
            got = model_scored(model)
        assert max(errors(got, truth)) < 1e-5
        if implementation != "triton":
            before, again = model_scored(model), model_scored(model)
            assert max(errors(before, truth)) < 1e-5
            assert not torch.equal(got[2], before[2])
            assert all(torch.equal(x, y) for x, y in zip(before, again, strict=True))

    def test_off_is_verl_again(self, own, monkeypatch):
        """Also in modules that keep a copy, imported before, or while it is on."""
        early, late = (types.ModuleType(name) for name in COPIES)
        early.linear_cross_entropy = own.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, COPIES[0], early)
        outer = enable()
        with enable(backend="reference"):
            assert early.linear_cross_entropy is linear_cross_entropy
            late.linear_cross_entropy = own.modules[TWIN].linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]
            monkeypatch.setitem(sys.modules, COPIES[1], late)
            assert verl._ON[-1].backend == "reference"
        for name, module in own.modules.items():
            assert getattr(module, name) is STAND_INS[name]
        outer.disable()
        outer.disable()
        assert early.linear_cross_entropy is late.linear_cross_entropy is own.linear_cross_entropy

    def test_what_came_in_front_of_ours_stays(self, own):
        with enable():
            own.modules[TWIN].linear_cross_entropy = other = object()
        assert own.modules[TWIN].linear_cross_entropy is other
        own.modules[TWIN].linear_cross_entropy = own.linear_cross_entropy

    def test_a_worker_imports_it(self, own, monkeypatch):
        monkeypatch.delitem(sys.modules, "vpgea_fast.integrations.verl_enabled", raising=False)
        enabled = importlib.import_module("vpgea_fast.integrations.verl_enabled")
        with enabled.SWITCH:
            assert own.modules[FUSED].FusedLinearForPPO is FusedLinearForPPO

    @pytest.mark.usefixtures("own")
    def test_another_version_warns_with_the_range(self, monkeypatch):
        monkeypatch.setattr(sys.modules["verl"], "__version__", "0.10.0")
        with (
            pytest.warns(UserWarning, match=r"verl 0\.10\.0 is not tested .*verl>=0\.9,<0\.10 is"),
            enable(),
        ):
            pass

    @pytest.mark.parametrize("change", ["gone", "argument", "module", "forward", "made"])
    def test_a_changed_verl_is_an_error_that_says_what_changed(self, own, change, monkeypatch):
        class Other(own.FusedLinearForPPO):
            def forward(self, hidden_states, vocab_weights, input_ids, temperature, top_k):
                pass

        class Made(own.FusedLinearForPPO):
            def __init__(self, tile):
                super().__init__(tile)

        dense = importlib.import_module("verl.models.transformers.dense_common")
        module, words = own.modules[FUSED], ""
        with contextlib.ExitStack() as stack, monkeypatch.context() as patched:
            if change == "gone":
                patched.delattr(own.modules[TWIN], "LinearCrossEntropy")
                words = "linear_cross_entropy has no LinearCrossEntropy"
            elif change == "argument":
                patched.setattr(module, FUSED, Other)
                words = "temperature, top_k), not (self"
            elif change == "made":
                patched.setattr(module, FUSED, Made)
                words = "made of (self, tile), not"
            elif change == "module":
                patched.setattr(verl, "HOMES", {FUSED: "verl.utils.experimental.elsewhere"})
                words = "there is no verl.utils.experimental.elsewhere"
            else:
                patched.setattr(dense, "forward_with_torch_backend", lambda _: None)
                words = "forward_with_torch_backend does not import FusedLinearForPPO from verl"
            with pytest.raises(RuntimeError) as caught:
                stack.enter_context(enable())
        assert words in str(caught.value)
        assert str(caught.value).startswith(f"verl {metadata.version('verl')}: ")
        assert TESTED in str(caught.value)
        assert not verl._ON


def arguments(function):
    """(name, default) of each."""
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def model_scored(model, logits=False):
    """(log-probs, entropies, the gradient) of packed ids, by the outputs of verl or by logits."""
    made = torch.Generator().manual_seed(5)
    ids = torch.randint(3, V, (1, 12), generator=made)
    sign = torch.randn(2, 12, generator=made)
    model.zero_grad()
    if logits:
        rolled = ids.roll(-1, dims=-1)
        logp, entropy = by_logits(model(ids, use_cache=False).logits, eye(V), rolled, TEMPERATURE)
    else:
        out = model(input_ids=ids, temperature=TEMPERATURE, return_dict=True, use_cache=False)
        logp, entropy = out.log_probs, out.entropy
    (sign[0] * logp.flatten() + sign[1] * entropy.flatten()).sum().backward()
    gradient = flat([p.grad for p in model.parameters()])
    return [x.detach().double().flatten() for x in (logp, entropy, gradient)]


def eye(size):
    return torch.eye(size, dtype=torch.float64)

"""The Hugging Face Trainer with our loss against the Trainer's own, through its own loop.

Budget: loss and gradient of a whole optimiser step within 1e-5 of the host's, in float32.
"""

import functools
import importlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_integrations import (
    ADAPTERS,
    STEP,
    V,
    adapted,
    distance,
    error,
    flat,
    make,
    packed,
    padded,
)
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import Trainer

from vpgea_fast.integrations import causal_lm_loss, hf

pytestmark = pytest.mark.hosts
pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
BUDGET = 1e-5


class Fused(hf.FusedLossMixin, Trainer):
    """What a user writes."""


class WithFunction(Trainer):
    """The same by the factory."""

    compute_loss = hf.make_compute_loss()


class Gradients(TrainerCallback):
    """The whole gradient of every step, as the optimiser gets it."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, *_, **kwargs):
        grads = (p.grad for p in kwargs["model"].parameters())
        self.seen.append(flat([grad.clone() for grad in grads if grad is not None]))


def left(count=STEP):
    """Rows padded on the left: their first token has a label too, as the host's collators make it,
    and is predicted from padding."""
    for batch in padded(count):
        ids, mask = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


LAYOUTS = {"padded": padded, "left": left, "packed": packed}


def trainer(kind, folder, *, model=None, rows=padded, accumulation=STEP, **settings) -> Any:
    """A trainer of this class on micro-batches that are made, one optimiser step of plain SGD."""
    keys = {k: settings.pop(k) for k in ("compute_metrics", "compute_loss_func") if k in settings}
    batches = list(rows())
    alike = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "remove_unused_columns": False,
    }
    return kind(
        model=make() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **{**alike, **settings}),
        train_dataset=batches,
        eval_dataset=batches,
        data_collator=lambda rows: dict(rows[0]),
        **keys,
    )


def step(made):
    """(loss, gradient) of one optimiser step."""
    seen = Gradients()
    made.add_callback(seen)
    loss = made.train().training_loss
    (gradient,) = seen.seen
    return torch.tensor(loss), gradient


def compare(folder, *, kind="llama", model=make, ours=Fused, **settings):
    """Steps of both trainers from the same weights, which must agree."""
    host, ours = (
        step(trainer(each, folder, model=model(kind), **settings)) for each in (Trainer, ours)
    )
    assert float(host[0]) > 1.0
    assert not torch.equal(ours[1], host[1])  # ours is what ran
    assert error(ours[0], host[0]) < BUDGET
    assert error(ours[1], host[1]) < BUDGET


# --- a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "granite", "phi", "mixtral"])
def test_a_step_is_the_trainers_own(kind, layout, tmp_path):
    compare(tmp_path, kind=kind, rows=LAYOUTS[layout])


@pytest.mark.parametrize("ours", [Fused, WithFunction])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [
        {"accumulation": 1},
        {"label_smoothing_factor": 0.1},
        {"label_smoothing_factor": 0.1, "accumulation": 1},
        {"gradient_checkpointing": True, "accumulation": 1, "label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False},
    ],
    # Not str: the address of a function is another in every worker of pytest-xdist.
    ids=", ".join,
)
def test_options_do_what_they_do_in_the_trainer(settings, layout, ours, tmp_path):
    compare(tmp_path, ours=ours, rows=LAYOUTS[layout], **settings)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_model_without_loss_kwargs_has_a_mean_per_micro_batch(smoothing, tmp_path):
    """Such a model is told no number of labels; the Trainer divides by the accumulation."""

    def model(kind):
        found = make(kind)
        found.accepts_loss_kwargs = False
        return found

    compare(tmp_path, model=model, label_smoothing_factor=smoothing)


def test_every_label_counts_as_in_the_trainer():
    """Also of padding, whose number the Trainer's normaliser counts."""
    model, (batch,) = make(dtype=torch.float64), left(1)
    own = model(**batch, use_cache=False).loss
    ours = causal_lm_loss(model, **batch, all_labels=True)
    assert error(ours.loss.detach(), own.detach()) < 1e-6
    assert torch.equal(ours.kept[:, 1:], batch["labels"][:, 1:] != -100)
    assert causal_lm_loss(model, **batch).kept.sum() < ours.kept.sum()


def test_a_made_compute_loss_is_the_mixins_in_training_and_the_trainers_in_prediction(tmp_path):
    settings = {"label_smoothing_factor": 0.1, "average_tokens_across_devices": False}
    mixed, made = (step(trainer(each, tmp_path, **settings)) for each in (Fused, WithFunction))
    assert torch.equal(made[0], mixed[0])
    assert torch.equal(made[1], mixed[1])
    host, ours = (trainer(each, tmp_path) for each in (Trainer, WithFunction))
    batch = next(padded())
    own, logits, _ = host.prediction_step(host.model, dict(batch), prediction_loss_only=False)
    found, same, _ = ours.prediction_step(ours.model, dict(batch), prediction_loss_only=False)
    assert torch.equal(same, logits)
    assert torch.equal(found, own)
    ours.args.prediction_loss_only = True
    found, none, _ = ours.prediction_step(ours.model, dict(batch), prediction_loss_only=True)
    assert none is None
    assert not torch.equal(found, own)  # without logits
    assert error(found, own) < BUDGET


def test_a_made_compute_loss_serves_a_class_that_has_one_and_looks_at_its_trainer(tmp_path):
    fused = hf.make_compute_loss(backend="reference")

    class Twice(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * fused(self, *args, **kwargs)

    once, twice = (trainer(each, tmp_path) for each in (WithFunction, Twice))
    batch = next(padded())
    loss = once.compute_loss(once.model, dict(batch))
    assert torch.allclose(twice.compute_loss(twice.model, dict(batch)), 2 * loss)
    refused = trainer(Twice, tmp_path, compute_loss_func=lambda *_, **__: None)
    with pytest.raises(ValueError, match="compute_loss_func: it makes"):
        refused.compute_loss(refused.model, dict(batch))


def test_a_made_compute_loss_is_one_link_of_a_chain_of_classes(tmp_path):
    """`super()` finds it from below, and it skips the losses above it, as it says."""

    class Above(Trainer):
        compute_loss = None

    class Made(Above):
        compute_loss = hf.make_compute_loss()

    class Below(Made):
        def compute_loss(self, *args, **kwargs):
            return 3 * super().compute_loss(*args, **kwargs)

    once, thrice = (step(trainer(each, tmp_path)) for each in (WithFunction, Below))
    assert error(thrice[0], 3 * once[0]) < 1e-6
    assert error(thrice[1], 3 * once[1]) < 1e-6
    for hide in (
        lambda: hf.enable(trainer(Made, tmp_path)),
        lambda: trainer(type("Mixed", (hf.FusedLossMixin, Made), {}), tmp_path),
    ):
        with pytest.raises(ValueError, match=r"\Atrainer: Made has a compute_loss of its own"):
            hide()


def test_a_made_compute_loss_that_is_no_method_is_refused_in_words(tmp_path):
    """Handed over as compute_loss_func, or set on a trainer, it gets another first argument."""
    func = trainer(Trainer, tmp_path, compute_loss_func=hf.make_compute_loss())
    hung: Any = trainer(Trainer, tmp_path)
    hung.compute_loss = hf.make_compute_loss()
    for made, name in ((func, "CausalLMOutputWithPast"), (hung, "LlamaForCausalLM")):
        words = rf"\Acompute_loss: got a {name}, expected .*; write compute_loss = [^\n]*\Z"
        with pytest.raises(ValueError, match=words):
            made.train()
        with pytest.raises(ValueError, match=words):
            made.evaluate()


def test_a_made_compute_loss_of_trls_classes_is_refused(tmp_path):
    """TRL's option says what SFT's loss is: dft, and nll would be trained."""
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'trl>=1.16,<1.17'")
    made = trainer(Trainer, tmp_path)
    made.__class__ = type("Mine", (trl.SFTTrainer,), {"compute_loss": hf.make_compute_loss()})
    with pytest.raises(ValueError, match=r"SFTTrainer has a compute_loss .* use .*trl\.enable"):
        made.compute_loss(made.model, next(padded()))


# torch._dynamo asks for it where a graph is broken, and hides the warning but from `error`.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_step_is_the_trainers_own(tmp_path, monkeypatch):
    """Compiled as a whole, by the Trainer's option; its second step has numbers of its own."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the option sets it, for good
    counters = importlib.import_module("torch._dynamo.utils").counters
    found, graphs = [], []
    for each, more in ((Trainer, {}), (Fused, {"torch_compile_backend": "eager"})):
        counters.clear()
        model = make(num_hidden_layers=1)
        made = trainer(each, tmp_path, model=model, max_steps=2, accumulation=2, **more)
        seen = Gradients()
        made.add_callback(seen)
        found.append((torch.tensor(made.train().training_loss), *seen.seen))
        graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert graphs[0] == 0 < graphs[1]
    assert len(found[0]) == 3
    assert all(error(ours, host) < BUDGET for ours, host in zip(*found, strict=True))
    assert error(found[1][2], found[1][1]) > 0.1


# --- beside other libraries -----------------------------------------------------------------------


@pytest.mark.hosts("peft")
@pytest.mark.parametrize("ours", [Fused, WithFunction])
@pytest.mark.parametrize("adapters", ["body", "head", "copied head", "tokens"])
def test_adapters_train_as_in_the_trainer(adapters, ours, tmp_path):
    def model(kind):
        torch.manual_seed(0)  # adapters are drawn
        return adapted(kind, dtype=torch.float32, **ADAPTERS[adapters])

    compare(tmp_path, kind="granite", model=model, ours=ours)


@pytest.mark.hosts("liger_kernel")
def test_ligers_patches_stay_and_its_loss_is_not_called(tmp_path):
    """Its forward alone is patched in: its kernels run on no CPU, and so does its loss."""
    parts = ("rope", "rms_norm", "swiglu", "cross_entropy")
    config = {**dict.fromkeys(parts, False), "fused_linear_cross_entropy": True}
    ours = trainer(Fused, tmp_path, use_liger_kernel=True, liger_kernel_config=config)
    host = trainer(Trainer, tmp_path)
    theirs, mine = step(host), step(ours)
    assert ours.model.forward.__module__.startswith("liger_kernel")
    assert error(mine[0], theirs[0]) < BUDGET
    assert error(mine[1], theirs[1]) < BUDGET
    theirs, mine = (made.evaluate()["eval_loss"] for made in (host, ours))
    assert mine == pytest.approx(theirs, rel=BUDGET)


# --- processes ------------------------------------------------------------------------------------


EIGHT = {name: functools.partial(rows, 2 * STEP) for name, rows in LAYOUTS.items()}
SPREAD = {
    f"{layout}, {accumulation}": (Fused, {"rows": rows, "accumulation": accumulation})
    for layout, rows in EIGHT.items()
    for accumulation in (1, STEP)
} | {
    "not averaged": (Fused, {"average_tokens_across_devices": False, "accumulation": 2}),
    "experts": (Fused, {"model": "mixtral", "accumulation": 2}),
    "smoothed": (Fused, {"label_smoothing_factor": 0.1, "rows": EIGHT["packed"]}),
    "checkpointed": (Fused, {"gradient_checkpointing": True, "rows": EIGHT["left"]}),
    "a function": (WithFunction, {"rows": EIGHT["packed"]}),
    "a function, smoothed, not averaged": (
        WithFunction,
        {"label_smoothing_factor": 0.1, "average_tokens_across_devices": False, "accumulation": 2},
    ),
}
"""Of two processes: what is compared with the host's own Trainer."""


def on_two_ranks(folder):
    """By name: how far loss, gradient and evaluation are from those of the host's own Trainer."""
    found = {}
    for name, (ours, settings) in SPREAD.items():
        kind, results = settings.get("model", "llama"), []
        for each in (Trainer, ours):
            # mixtral's router leaves experts without a token
            more = {"ddp_find_unused_parameters": "checkpointing" not in " ".join(settings)}
            made = trainer(each, folder, **{**settings, **more, "model": make(kind)})
            loss, gradient = step(made)
            results.append((loss, gradient, torch.tensor(made.evaluate()["eval_loss"])))
        errors = [float(error(*pair)) for pair in zip(results[1], results[0], strict=True)]
        found[name] = (*errors, torch.equal(results[0][1], results[1][1]))
    alone, batches = make(), list(padded())
    items = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
    for batch in batches:
        causal_lm_loss(alone, **batch, num_items=items).loss.backward()
    whole = flat([p.grad for p in alone.parameters()])
    made = step(trainer(Fused, folder, accumulation=2))
    return found, error(made[1], whole), dist.get_world_size()


def test_two_processes_are_the_trainers_own(tmp_path):
    for found, alone, size in run_ranks(on_two_ranks, str(tmp_path)):
        assert size == 2
        assert found.keys() == SPREAD.keys()
        for name, (*errors, same) in found.items():
            assert max(errors) < BUDGET, (name, errors)
            assert not same, name  # ours is what ran
        # Averaged over devices, two processes are one.
        assert alone < BUDGET


def sharded(folder, version):
    """FSDP as accelerate makes it. It refuses a CPU, so its state is told by hand."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    warnings.simplefilter("ignore")  # FSDP1 is deprecated
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        **({"use_orig_params": True, "sync_module_states": False} if version == 1 else {}),
    )
    made = trainer(Fused, folder, accumulation=2)
    state = made.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    state.device = torch.device("cpu")  # not cpu:0, which FSDP1 takes for another
    model = make()
    model, _ = made.accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    alone, batches = make(), list(padded())
    items = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
    for batch in batches[dist.get_rank() :: 2]:
        made.compute_loss(model, batch, num_items_in_batch=items).backward()
    for batch in batches:
        causal_lm_loss(alone, **batch, num_items=items).loss.backward()
    return type(model).__name__, distance(model, alone)


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_under_accelerate(version, tmp_path):
    for name, wrong in run_ranks(sharded, str(tmp_path), version):
        assert name == {1: "FullyShardedDataParallel", 2: "FSDPLlamaForCausalLM"}[version]
        assert wrong < 1e-6


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_is_the_trainers_own(smoothing, tmp_path):
    host, ours = (
        trainer(each, tmp_path, rows=left, label_smoothing_factor=smoothing)
        for each in (Trainer, Fused)
    )
    theirs, mine = (made.evaluate()["eval_loss"] for made in (host, ours))
    assert mine == pytest.approx(theirs, rel=BUDGET)
    (batch,) = left(1)
    loss, outputs = ours.compute_loss(ours.model, dict(batch), return_outputs=True)
    assert outputs == {"loss": loss}


@pytest.mark.parametrize("kind", [Fused, WithFunction])
def test_logits_are_made_where_they_are_wanted(kind, tmp_path):
    shapes = []

    def metrics(found):
        shapes.append(found.predictions.shape)
        return {"top": float(found.predictions.argmax(-1).mean())}

    host, ours = (trainer(each, tmp_path, compute_metrics=metrics) for each in (Trainer, kind))
    theirs, mine = (made.evaluate() for made in (host, ours))
    assert mine["eval_top"] == theirs["eval_top"]
    assert mine["eval_loss"] == theirs["eval_loss"]
    assert shapes == [(2 * STEP, 11, V)] * 2
    assert torch.equal(
        *(torch.tensor(made.predict(made.eval_dataset).predictions) for made in (host, ours))
    )
    assert not getattr(ours, "_needs_logits", False)


# --- the switch -----------------------------------------------------------------------------------


def test_a_trainer_that_is_made_is_switched_on_and_off(tmp_path):
    made = trainer(Trainer, tmp_path)
    batch = next(padded())
    host = made.compute_loss(made.model, dict(batch))
    with hf.enable(made, backend="reference") as switch:
        ours = made.compute_loss(made.model, dict(batch))
        with pytest.raises(ValueError, match="has this loss already"):
            hf.enable(made)
        assert isinstance(made, Trainer)
        assert type(made).__name__ == "Trainer"
    again = made.compute_loss(made.model, dict(batch))
    switch.disable()
    assert type(made) is Trainer
    assert torch.equal(host, again)
    assert error(ours.detach(), host.detach()) < 1e-6
    assert host.grad_fn.name() != ours.grad_fn.name()
    assert not made.model.lm_head._forward_hooks


def test_an_error_inside_switches_off(tmp_path):
    made = trainer(Trainer, tmp_path)
    with pytest.raises(KeyError), hf.enable(made):
        raise KeyError
    assert type(made) is Trainer


def test_a_class_that_came_in_front_of_ours_stays(tmp_path):
    made = trainer(Trainer, tmp_path)
    switch = hf.enable(made)
    made.__class__ = front = type("Front", (type(made),), {})
    switch.disable()
    assert type(made) is front


# --- refusals -------------------------------------------------------------------------------------


class OfItsOwn(Trainer):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


class Behind(hf.FusedLossMixin, OfItsOwn):
    pass


class InFront(Fused):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def spread(folder):
    made = trainer(Trainer, folder)
    made.args._n_gpu = 2
    return hf.enable(made)


def cut(folder):
    made = trainer(Trainer, folder)
    enabled = {"cp_enabled": True, "sp_enabled": False}
    made.accelerator.state.parallelism_config = type("Config", (), enabled)()
    try:
        return hf.enable(made)
    finally:
        made.accelerator.state.parallelism_config = None


REFUSED = {
    "Wrong: got the mixin behind Trainer": lambda _: type(
        "Wrong", (Trainer, hf.FusedLossMixin), {}
    ),
    "compute_loss_func: it makes": lambda d: trainer(
        Fused, d, compute_loss_func=lambda *_, **__: None
    ),
    "OfItsOwn has a compute_loss of its own, which would be skipped; derive": lambda d: trainer(
        Behind, d
    ),
    "OfItsOwn has a compute_loss": lambda d: hf.enable(trainer(OfItsOwn, d)),
    "label_smoothing_factor: beside output_router_logits": lambda d: trainer(
        Fused, d, model=make("mixtral"), label_smoothing_factor=0.1
    ),
    "2 devices of one process": spread,
    "parallelism_config: context": cut,
    "got a dict, expected a Trainer": lambda _: hf.enable({}),
    "has no head of a causal LM": lambda d: trainer(Fused, d, model=make().model),
    "backend 'quack' is not available": lambda d: hf.enable(trainer(Trainer, d), backend="quack"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_served_is_refused_in_one_line(words, tmp_path):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        REFUSED[words](tmp_path)
    assert words in str(caught.value)


def test_a_batch_without_ids_or_labels(tmp_path):
    """Of the first no label is known to shift; what the second is to do is the Trainer's to say."""
    made, batch = trainer(Fused, tmp_path), next(padded())
    embedded = {**batch, "inputs_embeds": made.model.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    with pytest.raises(ValueError, match=r"got labels, .*, expected input_ids") as caught:
        made.compute_loss(made.model, embedded)
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, AttributeError)) as theirs:
        trainer(Trainer, tmp_path).compute_loss(make(), {**batch, "labels": None})
    with pytest.raises(theirs.type):
        made.compute_loss(made.model, {**batch, "labels": None})


def test_a_loss_in_front_of_the_mixin_is_called(tmp_path):
    twice, once = (trainer(each, tmp_path) for each in (InFront, Fused))
    losses = [made.compute_loss(made.model, next(padded())).detach() for made in (twice, once)]
    assert error(losses[0], 2 * losses[1]) < 1e-6


def test_trls_trainers_have_a_switch_of_their_own(tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'trl>=1.16,<1.17'")
    made = trainer(Trainer, tmp_path)
    made.__class__ = trl.SFTTrainer
    with pytest.raises(ValueError, match=r"SFTTrainer has a compute_loss .* use .*trl\.enable"):
        hf.enable(made)


@pytest.mark.parametrize("which", ["another", "none"])
def test_a_model_with_another_loss_is_refused_in_its_first_step(which, tmp_path):
    model = make()
    own = model.loss_function
    other = {
        "another": lambda **inputs: 1.01 * own(**inputs),
        "none": lambda **inputs: own(**inputs) * float("nan"),
    }
    model.loss_function = other[which]
    made = trainer(Fused, tmp_path, model=model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has a loss of its own"):
        made.train()
    assert not model.lm_head._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_is_not_taken_for_another_loss(tmp_path):
    host, ours = (step(trainer(each, tmp_path, bf16=True)) for each in (Trainer, Fused))
    assert error(ours[0], host[0]) < 1e-2
    assert error(ours[1], host[1]) < 3e-2


def changed(self, batch):
    raise NotImplementedError


@pytest.mark.parametrize("name", hf.HOOKS)
@pytest.mark.parametrize("how", ["missing", "other"])
def test_a_hook_that_changed_is_said(name, how, tmp_path, monkeypatch):
    made = trainer(Trainer, tmp_path)
    with monkeypatch.context() as patch:
        if how == "missing":
            patch.delattr(Trainer, name)
        else:
            patch.setattr(Trainer, name, changed)
        words = "has no" if how == "missing" else r"takes \(self, batch\), not \(self"
        with pytest.raises(RuntimeError, match=rf"transformers .*: Trainer.*{words}") as caught:
            hf.enable(made)
    assert f"install '{hf.TESTED}'" in str(caught.value)


@pytest.mark.parametrize("version", ["5.18.2", "5.20.0", "6.0.0.dev0"])
def test_a_version_that_was_not_tested_warns(version, tmp_path, monkeypatch):
    made = trainer(Trainer, tmp_path)
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.warns(UserWarning, match=rf"transformers {version} is not tested.*{hf.TESTED} is"):
        hf.enable(made).disable()

"""The losses on backend "triton" in the interpreter; run by tests/test_kernels_interpret.py.

Batch invariance, the compiled ops, the segment sums of vpgea_loss, and a training run.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
from test_head_ops import (
    WIDEST_FIRST,
    compiled_equals_eager,
    inputs_of,
    logprob_all,
    run,
    scaled,
    vpgea,
    vpgea_some,
)
from test_losses import ADVANTAGE, CU, T, V, assert_close, gradients, vpgea_truth

from vpgea_fast import config, losses
from vpgea_fast.kernels import backends
from vpgea_fast.losses import linear_logprob, weighted_logprob_loss
from vpgea_fast.tiny import make_tiny
from vpgea_fast.trainer import fit

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"

pytestmark = [
    # exp2 of a row that is out of range, or its moment, is inf by design: the row is flagged (its
    # sum is above 2^46 long before) and redone.
    pytest.mark.filterwarnings("ignore:overflow encountered in (exp2|multiply|reduce)"),
    # Triton 3.6's interpreter on NumPy 2.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    # Dynamo makes a context by instantiating torch.autograd.Function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [
        (torch.float32, 5.0),
        (torch.bfloat16, None),
        # Without a cap: also linear_logprob.py::test_chunks_neighbours_and_reruns, in float32.
        pytest.param(torch.bfloat16, 5.0, marks=pytest.mark.slow),
        pytest.param(torch.float16, None, marks=pytest.mark.slow),
        pytest.param(torch.float32, None, marks=pytest.mark.slow),
        pytest.param(torch.float16, 5.0, marks=pytest.mark.slow),
    ],
)
def test_batch_invariance(dtype, softcap):
    """A row alone, in a permutation, in chunks of one tile, trained or scored: the same bits."""
    rows, width, vocabulary = 140, 40, 300
    hidden_TD = torch.randn(rows, width).to(dtype)
    weight_VD = torch.randn(vocabulary, width).to(dtype)
    targets_T = torch.randint(0, vocabulary, (rows,))
    bias_V = torch.randn(vocabulary)
    bias_V[targets_T[7]] = -60.0  # out of range: its tile is redone

    def score(index, **options):
        out = linear_logprob(
            hidden_TD[index],
            weight_VD,
            targets_T[index],
            bias=bias_V,
            softcap=softcap,
            return_entropy=True,
            backend="auto",
            batch_invariant=True,
            **options,
        )
        return torch.stack((out.logp, out.lse, out.entropy))

    everything = torch.arange(rows)
    together = score(everything)
    for t in (0, 7, 128, rows - 1):
        assert torch.equal(score(everything[t : t + 1]), together[:, t : t + 1])
    order = torch.randperm(rows)
    assert torch.equal(score(order), together[:, order])
    assert torch.equal(score(everything, chunk_bytes=1), together)
    listed = torch.randperm(rows)[:40]
    some = score(everything, rows=listed)
    assert torch.equal(some[:, listed], together[:, listed])
    trained = weighted_logprob_loss(
        hidden_TD.clone().requires_grad_(),
        weight_VD,
        targets_T,
        torch.ones(rows),
        bias=bias_V,
        softcap=softcap,
        batch_invariant=True,
        chunk_bytes=1,
    )
    assert torch.equal(trained.logp, together[0])


def test_auto_takes_triton_only_where_it_must(caplog):
    backends.resolve.cache_clear()
    backends._announce.cache_clear()
    x, w, t = torch.randn(3, 8), torch.randn(9, 8), torch.arange(3)
    with caplog.at_level(logging.INFO, logger="vpgea_fast.losses"):
        linear_logprob(x, w, t)
        linear_logprob(x, w, t, batch_invariant=True)
    assert "backend 'torch'" in caplog.messages[0]
    assert "not 'triton': the interpreter is for tests" in caplog.messages[0]
    assert "backend 'triton' for float32 on cpu: the only one" in caplog.messages[1]
    with pytest.raises(ValueError, match="for batch_invariant=True use 'triton'"):
        linear_logprob(x, w, t, batch_invariant=True, backend="torch")
    with pytest.raises(ValueError, match=r"no backend can run this call .*not float64"):
        linear_logprob(x.double(), w.double(), t, batch_invariant=True)


@pytest.mark.parametrize("call", [call for call in WIDEST_FIRST if call is not logprob_all])
def test_compiled_equals_eager(call):
    compiled_equals_eager(call, "triton", "aot_eager", None, torch.bfloat16)


@pytest.mark.parametrize("call", [vpgea, vpgea_some])
def test_the_kernel_adds_what_torch_adds(call, monkeypatch):
    """gated_kl here, index_add without Triton: the same sums, losses and gradients.

    gated_kl keeps a sequence's sum in float32 before it weights it: 2e-6 of 30 nats.
    """
    x = inputs_of()
    mine = run(call, x, scaled, backend="torch")
    monkeypatch.setattr(backends, "triton_missing", lambda: "for this test")
    theirs = run(call, x, scaled, backend="torch")
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_vpgea_loss_is_the_published_formula(beta):
    """float64 on backend "torch", summed by gated_kl: 1e-9, as without it."""
    post_TD, prior_TD = (torch.randn(T, 12, dtype=torch.float64).requires_grad_() for _ in "ab")
    weight_VD = torch.randn(V, 12, dtype=torch.float64).requires_grad_()
    targets_T, weight_S = torch.randint(0, V, (T,)), torch.rand(6, dtype=torch.float64)
    ours = losses.vpgea_loss(
        post_TD, prior_TD, weight_VD, targets_T, CU, ADVANTAGE, weight_S=weight_S, beta=beta
    )
    truth, sums = vpgea_truth(post_TD, prior_TD, weight_VD, targets_T, weight_S, beta)
    leaves = (post_TD, weight_VD)
    assert_close((ours.loss, *gradients(ours.loss, *leaves)),
                 (truth, *gradients(truth, *leaves)), 1e-9)  # fmt: skip
    logq_S, logp_S = torch.tensor(sums, dtype=torch.float64).T
    assert_close((ours.logq_S,), (logq_S * (ADVANTAGE != 0),), 1e-12)
    assert_close((ours.logp_S,), (logp_S * (ADVANTAGE > 0) * (beta > 0),), 1e-12)


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_torch_and_triton_train_alike(tmp_path, count):
    """The trainer itself: the same samples, and numbers of float32. test_trainer.py compares torch
    with the reference.

    Budget: 1e-5 relative, about 100 roundings of float32. The loss is a difference of log-probs of
    whole paths, about 100 nats of which little is left: 2e-5 nats. A path with one other token
    would be off by whole units.
    """
    world = make_tiny(tmp_path / "world")
    runs = {}
    for backend in ("torch", "triton"):
        words = {
            "run.dir": tmp_path / backend,
            "model.path": world.base_dir,
            "data.train": world.train_path,
            "eval.data": "[]",
            "loss.backend": backend,
            "train.steps": count,
            "data.limit": 100,
            "train.questions_per_step": 2,
            "objective.group_size": 3,
            "objective.prior_samples": 2,
            "rollout.max_new_tokens": 24,
            "metrics.diag_every": 0,
            "metrics.compare": "null",
            "metrics.figure": "false",
            "verify.name": "number",
            "checkpoint.save_every": count,
            "checkpoint.export": "false",
        }
        given = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        assert fit(config.load(TINY, given))
        facts = json.loads((tmp_path / backend / "environment.json").read_text())
        assert (facts["loss_backend"], facts["loss_backend_reason"]) == (backend, "asked for")
        runs[backend] = [
            [json.loads(line) for line in (tmp_path / backend / name).read_text().splitlines()]
            for name in ("metrics.jsonl", "paths.jsonl")
        ]
    (steps, paths), (triton_steps, triton_paths) = runs.values()
    assert sum(step["skipped"] == 0 for step in steps) >= count // 2
    assert [path["ids"] for path in triton_paths] == [path["ids"] for path in paths]
    for mine, theirs in zip(triton_steps, steps, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        for key in ("grad_norm", "u_post", "u_prior"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key

"""A head cut by classes over ranks, against the whole head: the same tokens on each rank.

Budgets, relative in the Frobenius norm, against float64 autograd through the full logits: float64
1e-10, float32 2e-6. The gradient of an entropy alone has that of test_losses.py in float32: it
cancels, and the whole head's own is 1.9e-6 off. Half precision against the same loss of the whole
head.
"""

import math
import warnings
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_losses import (
    ADVANTAGE,
    CU,
    OPTIONS,
    D,
    T,
    V,
    gradients,
    head_case,
    one_row_case,
    options_of,
    oracle,
    process_group,
    relative,
    vpgea_truth,
)
from test_losses import BUDGET as WHOLE_BUDGET

from vpgea_fast.kernels.contract import NUMBERS
from vpgea_fast.losses import (
    choose_backend,
    linear_logprob,
    two_stream_loss,
    vpgea_loss,
    weighted_logprob_loss,
)

BUDGET = {"float64": 1e-10, "float32": 2e-6}


def mesh_of(size):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (size,))


def cut(x, mesh, placement=None):
    """A leaf of its own with the values of x, by classes unless told otherwise."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(x.detach(), mesh, [placement or Shard(0)]).requires_grad_()


def whole(x):
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def errors(got, truth):
    return [
        relative(whole(x).detach().double(), t.double()) for x, t in zip(got, truth, strict=True)
    ]


# --- every option, both modes ---------------------------------------------------------------------


def both_modes(hidden_TD, weight_VD, targets_T, coef_T, upstream_3T, bias_V, options):
    """mode -> loss or (logp, lse, entropy), then the gradients of the leaves."""
    leaves = [x for x in (hidden_TD, weight_VD, bias_V) if x is not None]
    one = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T, bias=bias_V, **options)
    made: dict[str, Any] = {"one pass": (one.loss, one.logp, *gradients(one.loss, *leaves))}
    out = linear_logprob(
        hidden_TD, weight_VD, targets_T, bias=bias_V, return_entropy=True, **options
    )
    values = (out.logp, out.lse, out.entropy)
    for used in ([0], [1], [2], [0, 1, 2]):
        total = sum((values[i] * upstream_3T[i].to(out.logp.dtype)).sum() for i in used)
        made[f"recomputed {used}"] = (*values, *gradients(total, *leaves))
    return made


def in_float64(hidden_TD, weight_VD, targets_T, coef_T, upstream_3T, bias_V, options):
    """The same by autograd through the full logits."""
    leaves = [x for x in (hidden_TD, weight_VD, bias_V) if x is not None]
    values = oracle(hidden_TD, weight_VD, targets_T, bias=bias_V, **options)
    loss = (coef_T.double() * values[0]).sum()
    made: dict[str, Any] = {
        "one pass": (loss, values[0] * (coef_T != 0), *gradients(loss, *leaves))
    }
    for used in ([0], [1], [2], [0, 1, 2]):
        total = sum((values[i] * upstream_3T[i]).sum() for i in used)
        made[f"recomputed {used}"] = (*values, *gradients(total, *leaves))
    return made


def each_option(size, dtype, vocabulary):
    """option and mode -> errors of values and gradients."""
    dtype, found = getattr(torch, dtype), {}
    with process_group():
        mesh = mesh_of(size)
        for name in OPTIONS:
            torch.manual_seed(1)
            hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(
                dtype, vocabulary=vocabulary
            )
            options = options_of(name, bias_V)
            bias_V = options.pop("bias", None)
            targets_T[3], coef_T[5] = options.get("ignore_index", -100), 0.0
            coef_T.masked_fill_(targets_T == targets_T[3], 0.0)
            rest = (targets_T, coef_T, torch.randn(3, T, dtype=torch.float64))
            truth = in_float64(hidden_TD, weight_VD, *rest, bias_V, options)
            options["chunk_bytes"] = 5 * vocabulary * 4  # ragged chunks
            bias = None if bias_V is None else cut(bias_V, mesh)
            with torch.no_grad():
                hidden_TD[3] = math.nan  # a row that takes no part is never read
            parts = both_modes(hidden_TD, cut(weight_VD, mesh), *rest, bias, options)
            for mode, expected in truth.items():
                found[f"{name}, {mode}"] = errors(parts[mode], expected)
    return found


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize(
    ("size", "vocabulary"), [(1, V), (2, V), (2, 64), (4, V), (4, 64), (4, 10), (2, 2)]
)
def test_every_option_gives_the_whole_heads_values_and_gradients(size, vocabulary, dtype):
    """V = 61 is 31, 30 and 16, 16, 16, 13; V = 10 is 3, 3, 3, 1; V = 2 is one class for each."""
    for found in run_ranks(each_option, size, dtype, vocabulary, size=size):
        assert len(found) == 5 * len(OPTIONS)
        for name, wrong in found.items():
            budget = BUDGET[dtype]
            if dtype == "float32" and name.endswith("[2]"):
                budget = 2 * WHOLE_BUDGET[torch.float32]
            assert max(wrong) <= budget, (name, wrong)


# --- what else a whole head holds to --------------------------------------------------------------


def streams_and_sinks(size):
    """Errors of both functions of two streams, of a sink over two calls, and of a reused graph."""
    found = {}
    with process_group():
        mesh = mesh_of(size)
        torch.manual_seed(2)
        post_TD, weight_VD, _, targets_T, coef_T = head_case()
        prior_TD, other_T = head_case()[0], torch.randn(T)
        other_T[::3] = 0.0
        weight = cut(weight_VD, mesh)
        leaves, parts = (post_TD, prior_TD, weight_VD), (post_TD, prior_TD, weight)
        truth = [oracle(x, weight_VD, targets_T)[0] for x in (post_TD, prior_TD)]
        sums = (coef_T * truth[0]).sum(), (other_T * truth[1]).sum()
        both = two_stream_loss(
            post_TD, prior_TD, weight, targets_T, targets_T, coef_T, other_T, chunk_bytes=2000
        )
        found["two streams"] = errors(
            (both.loss_post, both.loss_prior, *gradients(both.loss, *parts)),
            (*sums, *gradients(sums[0] + sums[1], *leaves)),
        )
        out = vpgea_loss(
            post_TD, prior_TD, weight, targets_T, CU, ADVANTAGE, denominator=6, beta=0.4
        )
        weight_S = torch.full((6,), 1 / 6, dtype=torch.float64)
        loss, _ = vpgea_truth(post_TD, prior_TD, weight_VD, targets_T, weight_S, 0.4)
        found["vpgea"] = errors(
            (out.loss, *gradients(out.loss, *parts)), (loss, *gradients(loss, *leaves))
        )
        sink = cut(torch.zeros_like(weight_VD), mesh).detach()
        for x in (post_TD, prior_TD):
            weighted_logprob_loss(x, weight, targets_T, coef_T, dweight_out=sink).loss.backward()
        assert weight.grad is None
        total = (coef_T * (truth[0] + truth[1])).sum()
        found["sink"] = errors((sink,), gradients(total, weight_VD))
        one = weighted_logprob_loss(
            post_TD, weight, targets_T, coef_T, rows=torch.tensor([5, 2, 9])
        )
        kept = torch.zeros(T).index_fill_(0, torch.tensor([5, 2, 9]), 1.0)
        rows = (kept * coef_T * truth[0]).sum()
        grads = [g for _ in range(2) for g in gradients(3.0 * one.loss, post_TD, weight)]
        found["rows"] = errors(grads, 2 * gradients(3.0 * rows, post_TD, weight_VD))
        (3.0 * one.loss).backward()  # the graph goes, so the stored gradients are scaled in place
        grad: Any = weight.grad
        assert (grad.placements, grad.shape) == (weight.placements, weight.shape)
        found["backward"] = errors((weight.grad,), gradients(3.0 * rows, weight_VD))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_two_streams_sinks_and_rows(size):
    for found in run_ranks(streams_and_sinks, size, size=size):
        assert max(map(max, found.values())) <= 1e-10, found


def one_row(size, logp, dtype):
    """Errors of one target of about this log-probability, and whether logp stayed below 0."""
    with process_group():
        mesh = mesh_of(size)
        torch.manual_seed(4)
        hidden_TD, weight_VD, bias_V, targets_T = one_row_case(logp, getattr(torch, dtype))
        truth = oracle(hidden_TD, weight_VD, targets_T, bias=bias_V)[0]
        weight, bias = cut(weight_VD, mesh), cut(bias_V, mesh)
        out = weighted_logprob_loss(hidden_TD, weight, targets_T, torch.ones(1), bias=bias)
        got = (out.logp, *gradients(out.loss, hidden_TD, weight, bias))
        expected = (truth, *gradients(truth.sum(), hidden_TD, weight_VD, bias_V))
        return errors(got, expected), out.logp.item() < 0


@pytest.mark.parametrize("missing", [1e-1, 7e-6, 1e-12])
def test_confident_tokens_keep_their_gradient(missing):
    """The budget of the whole head, whose 1 - p keeps its digits."""
    for wrong, below in run_ranks(one_row, 2, math.log1p(-missing), "float32"):
        assert below
        assert max(wrong) <= 5e-3


@pytest.mark.parametrize("logp", [-40.0, -200.0])
def test_unlikely_tokens(logp):
    for wrong, below in run_ranks(one_row, 2, logp, "float32"):
        assert below
        assert max(wrong) <= WHOLE_BUDGET[torch.float32]


def masked_classes(size):
    """Errors where all classes of the last rank are at -inf, as padding is; the entropy's too."""
    with process_group():
        mesh = mesh_of(size)
        torch.manual_seed(5)
        hidden_TD, weight_VD, bias_V, targets_T, _ = head_case(torch.float32, vocabulary=64)
        first = 64 - 64 // size
        with torch.no_grad():
            bias_V[first:] = -math.inf
        targets_T = targets_T % first
        out = linear_logprob(
            hidden_TD, cut(weight_VD, mesh), targets_T, bias=cut(bias_V, mesh), return_entropy=True
        )
        small = linear_logprob(
            hidden_TD, weight_VD[:first], targets_T, bias=bias_V[:first], return_entropy=True
        )
        pairs = []
        for x in (out, small):
            assert x.entropy is not None
            dhidden_TD = gradients((x.logp + 5.0 * x.entropy).sum(), hidden_TD)
            pairs.append((x.logp, x.lse, x.entropy, *dhidden_TD))
        return errors(*pairs)


def test_a_rank_whose_classes_are_all_masked():
    for wrong in run_ranks(masked_classes, 4, size=4):
        assert max(wrong) <= 2 * WHOLE_BUDGET[torch.float32]


def large_logits(size, dtype):
    """Errors of logits of 1e30, which float32 holds: of a whole head all is on one class."""
    with process_group():
        mesh = mesh_of(size)
        torch.manual_seed(11)
        hidden_TD, weight_VD, _, targets_T, coef_T = head_case(getattr(torch, dtype))
        made = []
        for weight in (cut(weight_VD, mesh), weight_VD):
            hidden = (1e30 * hidden_TD.detach()).requires_grad_()
            out = weighted_logprob_loss(hidden, weight, targets_T, coef_T)
            made.append((out.loss, out.logp, *gradients(out.loss, hidden, weight)))
        return errors(*made)


@pytest.mark.parametrize("dtype", BUDGET)
def test_large_logits(dtype):
    """Values were right, and gradients those of one certain class on each rank."""
    for wrong in run_ranks(large_logits, 4, dtype, size=4):
        assert max(wrong) <= BUDGET[dtype]


def half_precision(size, dtype):
    """Errors against the whole head, in units of that head's own against float64."""
    with process_group():
        mesh = mesh_of(size)
        torch.manual_seed(6)
        hidden_TD, weight_VD, _, targets_T, coef_T = head_case(getattr(torch, dtype))
        truth = (coef_T * oracle(hidden_TD, weight_VD, targets_T)[0]).sum()
        expected = gradients(truth, hidden_TD, weight_VD)
        whole_loss = weighted_logprob_loss(hidden_TD, weight_VD, targets_T, coef_T).loss
        of_the_whole = errors(gradients(whole_loss, hidden_TD, weight_VD), expected)
        weight = cut(weight_VD, mesh)
        loss = weighted_logprob_loss(hidden_TD, weight, targets_T, coef_T).loss
        assert loss.dtype == torch.float32
        got = gradients(loss, hidden_TD, weight)
        assert {g.dtype for g in got} == {hidden_TD.dtype}
        ratios = [a / b for a, b in zip(errors(got, expected), of_the_whole, strict=True)]
        return [*ratios, *errors((loss,), (whole_loss,))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loses_no_more_than_the_whole_head(dtype):
    """Parts of dX are added in float32 and rounded once."""
    for *ratios, value in run_ranks(half_precision, 4, dtype, size=4):
        assert max(ratios) < 1.05
        assert value < 1e-6


# --- what the ranks say to each other -------------------------------------------------------------


def collectives(size):
    """Names and sizes of the collectives of one pass of 23 rows in chunks of at most 8."""
    import torch.distributed as dist

    with process_group():
        mesh, calls = mesh_of(size), []
        torch.manual_seed(7)
        hidden_TD, weight_VD, _, targets_T, coef_T = head_case(torch.float32, vocabulary=64)
        weight = cut(weight_VD, mesh)
        true_reduce = dist.all_reduce

        def counted(x, *args, **options):
            calls.append(list(x.shape))
            return true_reduce(x, *args, **options)

        dist.all_reduce = counted
        try:
            row_bytes = 4 * 64 // size
            loss = weighted_logprob_loss(
                hidden_TD, weight, targets_T, coef_T, chunk_bytes=8 * row_bytes
            ).loss
            loss.backward()
            one_pass = list(calls)
            calls.clear()
            with torch.no_grad():
                linear_logprob(hidden_TD, weight, targets_T, return_entropy=True)
        finally:
            dist.all_reduce = true_reduce
        return one_pass, calls


def test_a_chunk_takes_two_reductions_of_its_rows_and_one_of_dx():
    for one_pass, scoring in run_ranks(collectives, 2):
        chunk = [[8, 1], [8, 2], [8, D]]
        sameness = [2, 2, 5 + len(NUMBERS)]  # sums of the rows, and each option
        assert one_pass == [sameness, *chunk, *chunk, [7, 1], [7, 2], [7, D]]
        assert scoring == [sameness, [T, 1], [T, 3]]


# --- refusals, each on every rank -----------------------------------------------------------------


def refusals(size):
    """What is refused -> its message; afterwards the mesh works, and no gradient was left."""
    from torch.distributed.tensor import Replicate, Shard

    with process_group():
        mesh = mesh_of(size)
        rank = mesh.get_rank()
        torch.manual_seed(8)
        hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(torch.float32)
        weight, said = cut(weight_VD, mesh), {}

        def call(name, hidden=hidden_TD, weight=weight, targets=targets_T, coef=coef_T, **options):
            try:
                weighted_logprob_loss(hidden, weight, targets, coef, **options)
            except ValueError as error:
                said[name] = str(error)

        mine = slice(rank, None, size)
        call("count", hidden_TD[mine], targets=targets_T[mine], coef=coef_T[mine])
        call("hidden", torch.randn(T, D, generator=torch.Generator().manual_seed(rank)))
        call("order", hidden_TD.roll(rank, 0))
        call("one target", targets=targets_T.index_fill(0, torch.tensor([4]), rank))
        call("one coefficient", coef=coef_T.index_fill(0, torch.tensor([4]), 1.0 + 0.01 * rank))
        # Wrong on one rank alone, which would leave the others waiting.
        call("one wrong target", targets=targets_T.index_fill(0, torch.tensor([4]), V * rank))
        warm_T = torch.ones(T)
        call("one temperature", temperature=warm_T.index_fill(0, torch.tensor([4]), 1.0 + rank))
        cold = -math.inf if rank == 1 else math.nan if rank == 2 else 1.0
        call("no temperature", temperature=warm_T.index_fill(0, torch.tensor([4]), cold))
        call("one option", softcap=30.0 + rank)
        call("one chunk", chunk_bytes=2000 * (1 + rank))
        try:
            linear_logprob(hidden_TD[mine], weight, targets_T[mine])
        except ValueError as error:
            said["recomputed"] = str(error)
        call("columns", weight=cut(weight_VD, mesh, Shard(1)))
        call("copies", weight=cut(weight_VD, mesh, Replicate()))
        call("no class", weight=cut(weight_VD[: size + 1] if size > 2 else weight_VD[:1], mesh))
        call("plain bias", bias=bias_V)
        call("copied bias", bias=cut(bias_V, mesh, Replicate()))
        call("whole bias", bias=cut(torch.zeros(V + size), mesh))
        call("plain sink", dweight_out=torch.zeros(V, D))
        call("backend", backend="reference")
        call("target", targets=targets_T.index_fill(0, torch.tensor([4]), V))
        call("temperature", temperature=warm_T.index_fill(0, torch.tensor([4]), math.nan))
        assert weight.grad is None
        assert hidden_TD.grad is None
        call("nothing")
        # Roundings of replicas are no other rows.
        call("rounding", hidden_TD * (1 + rank * torch.finfo(torch.float32).eps))
        return said


OTHER = "weight_VD is a DTensor cut by classes, and the ranks of its mesh hold other rows"
REFUSED = {
    "count": OTHER,
    "hidden": OTHER,
    "order": OTHER,
    "one target": OTHER,
    "one coefficient": OTHER,
    "one wrong target": OTHER,
    "one temperature": OTHER,
    "no temperature": OTHER,
    "one option": OTHER,
    "one chunk": OTHER,
    "recomputed": OTHER,
    "columns": "weight_VD is a DTensor (61, 12) placed (Shard(dim=1),): the loss needs a plain",
    "copies": "weight_VD is a DTensor (61, 12) placed (Replicate(),): the loss needs a plain",
    "no class": "of which the last has no class; expected one or more on each: use a smaller mesh",
    "plain bias": "bias: got no DTensor, expected one placed as weight_VD",
    "copied bias": "bias: got a DTensor placed (Replicate(),)",
    "whole bias": "bias: got shape",
    "plain sink": "dweight_out: got no DTensor, expected one placed as weight_VD",
    "backend": "'reference' cannot run this call: it takes no head whose classes are cut",
    "target": "targets_T holds values outside [0, V = 61)",
    "temperature": "temperature: every value must be positive and finite",
}


@pytest.mark.parametrize("size", [2, 4])
def test_what_cannot_be_is_refused_on_every_rank(size):
    for said in run_ranks(refusals, size, size=size):
        assert said.keys() == REFUSED.keys()
        for name, words in REFUSED.items():
            assert words in said[name], name
            assert "\n" not in said[name]


def test_two_dimensions_of_a_mesh_are_refused():
    for said in run_ranks(on_a_square, size=4):
        assert said.startswith("weight_VD is a DTensor (61, 12) placed (Replicate(), Shard(dim=0))")


def on_a_square():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    with process_group():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
        torch.manual_seed(9)
        hidden_TD, weight_VD, _, targets_T, coef_T = head_case()
        square = distribute_tensor(weight_VD.detach(), mesh, [Replicate(), Shard(0)])
        with pytest.raises(ValueError, match="weight_VD is a DTensor") as refused:
            weighted_logprob_loss(hidden_TD, square, targets_T, coef_T)
        # One dimension of it is a mesh of its own: the ranks beside it may hold other tokens.
        mine = slice(mesh["data"].get_local_rank(), None, 2)
        weight = cut(weight_VD, mesh["vocabulary"])
        out = weighted_logprob_loss(hidden_TD[mine], weight, targets_T[mine], coef_T[mine])
        truth = (coef_T[mine] * oracle(hidden_TD[mine], weight_VD, targets_T[mine])[0]).sum()
        got = (out.loss, *gradients(out.loss, weight))
        assert max(errors(got, (truth, *gradients(truth, weight_VD)))) < 1e-12
        return str(refused.value)


def test_auto_takes_torch():
    choice = choose_backend(dtype=torch.bfloat16, device="cpu", sharded=True)
    assert choice.name == "torch"
    with pytest.raises(ValueError, match="use 'torch'"):
        choose_backend("reference", device="cpu", sharded=True)


# --- compiled and checkpointed --------------------------------------------------------------------


def compiled(size):
    """Whether a compiled call, and one under activation checkpointing, give the eager bits."""
    from torch.utils.checkpoint import checkpoint

    # Dynamo makes a context by instantiating torch.autograd.Function.
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    with process_group():
        mesh = mesh_of(size)
        torch.manual_seed(10)
        hidden_TD, weight_VD, bias_V, targets_T, coef_T = head_case(torch.float32)
        weight, bias = cut(weight_VD, mesh), cut(bias_V, mesh)

        def both(hidden_TD, weight, bias):
            one = weighted_logprob_loss(hidden_TD, weight, targets_T, coef_T, bias=bias)
            out = linear_logprob(hidden_TD, weight, targets_T, bias=bias)
            return one.loss + (coef_T * out.logp).sum()

        runs = {
            "eager": both,
            "compiled": torch.compile(both, backend="aot_eager", fullgraph=True),
            "checkpointed": lambda *leaves: checkpoint(both, *leaves, use_reentrant=False),
        }
        made = {}
        for name, run in runs.items():
            loss = run(hidden_TD, weight, bias)
            made[name] = [loss.detach(), *map(whole, gradients(loss, hidden_TD, weight, bias))]
        return [
            all(torch.equal(a, b) for a, b in zip(made["eager"], made[name], strict=True))
            for name in ("compiled", "checkpointed")
        ]


def test_compiled_and_checkpointed_calls_give_the_eager_bits():
    assert run_ranks(compiled, 2) == [[True, True]] * 2

"""`distillation_loss` against float64 autograd through both full logits.

Budgets, relative in the Frobenius norm: float64 1e-12, float32 2e-6; bf16 4e-3, and at most 1.1
(dX) and 1.6 (dW) times the error of torch with float32 logits and their gradient rounded once to
bf16. The divergences are written as TRL's GKDTrainer writes them, with torch's kl_div.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_head_ops import TRANSFORMS, compare
from test_losses import (
    DEVICES,
    HOSTILE,
    D,
    Recorder,
    T,
    V,
    assert_close,
    float64_leaves,
    full_logits,
    gradients,
    head_case,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vpgea_fast.distillation import distillation_loss
from vpgea_fast.kernels import reference

pytestmark = [
    # Dynamo makes a context by instantiating torch.autograd.Function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

E = 7  # the teacher's hidden width
CHUNK = 2 * 5 * V * 4  # five float32 rows of two logits: ragged chunks everywhere
BUDGET = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}
KINDS = {
    "forward": {"divergence": "forward_kl"},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "jsd 0.1": {"divergence": "jsd", "beta": 0.1},
    "jsd 0.9": {"divergence": "jsd", "beta": 0.9},
}
EXACT = {torch.float64: 1e-12, torch.float32: 2e-6}


def case(dtype=torch.float64, *, tokens=T, vocabulary=V, device="cpu"):
    """The student's hidden, weight and bias (leaves), the teacher's, and coefficients > 0."""
    hidden_TD, weight_VD, bias_V, _, coef_T = head_case(
        dtype, tokens=tokens, vocabulary=vocabulary, device=device, spread=0.5
    )
    teacher = (torch.randn(tokens, E), torch.randn(vocabulary, E), torch.randn(vocabulary))
    return (
        (hidden_TD, weight_VD, bias_V),
        tuple(x.to(device, dtype) for x in teacher),
        coef_T.abs() + 0.1,
    )


def options_of(name, student, teacher):
    """Keyword arguments, and the same as the heads of `full_logits`."""
    if name == "plain":
        return {}, {}, {}
    shared = {"temperature": torch.rand(len(student[0])) + 0.5 if name == "all" else 1.7}
    mine = {"softcap": 3.0, "logit_scale": 0.6, "bias": student[2]} if name == "all" else {}
    theirs = {"softcap": 2.0, "logit_scale": -0.8, "bias": teacher[2]} if name == "all" else {}
    given = {**shared, **mine, **{f"teacher_{key}": x for key, x in theirs.items()}}
    return given, {**shared, **mine}, {**shared, **theirs}


def oracle(student, teacher, kind, head, teacher_head):
    """(T,) as TRL's generalized_jsd_loss: beta 0 is forward, 1 is reverse KL."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(kind["divergence"], kind.get("beta", 0.5))
    log_q_TV = full_logits(*student[:2], **head).log_softmax(1)
    log_p_TV = full_logits(*teacher[:2], **teacher_head).detach().log_softmax(1)

    def kl(to, of):
        return F.kl_div(to, of, reduction="none", log_target=True).sum(1)

    if beta == 0:
        return kl(log_q_TV, log_p_TV)
    if beta == 1:
        return kl(log_p_TV, log_q_TV)
    log_m_TV = torch.stack((log_q_TV + math.log1p(-beta), log_p_TV + math.log(beta))).logsumexp(0)
    return beta * kl(log_m_TV, log_p_TV) + (1 - beta) * kl(log_m_TV, log_q_TV)


@pytest.mark.parametrize("options", ["plain", "temperature", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", EXACT)
def test_value_and_gradients_match_autograd(dtype, kind, options):
    student, teacher, coef_T = case(dtype)
    coef_T[5], coef_T[7] = 0.0, -0.3
    given, head, teacher_head = options_of(options, student, teacher)
    ours = distillation_loss(
        *student[:2], *teacher[:2], coef_T, chunk_bytes=CHUNK, **KINDS[kind], **given
    )
    truth_T = oracle(student, teacher, KINDS[kind], head, teacher_head).masked_fill(coef_T == 0, 0)
    truth = (coef_T * truth_T).sum()
    assert_close((ours.loss, ours.divergence), (truth, truth_T), EXACT[dtype])
    assert torch.equal(ours.kept, coef_T != 0)
    assert ours.divergence.dtype == dtype
    assert not ours.divergence.requires_grad
    leaves = student if "bias" in given else student[:2]
    got = gradients(0.37 * ours.loss, *leaves)
    assert_close(got, [0.37 * g for g in gradients(truth, *leaves)], 2 * EXACT[dtype])
    assert torch.equal(got[0][5], torch.zeros(D, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_published_formula(kind):
    student, teacher, coef_T = case()
    coef_T[2] = 0.0
    given, head, teacher_head = options_of("all", student, teacher)
    of_reference = ({**x, "bias_V": x["bias"]} for x in (head, teacher_head))
    own, theirs = ({k: x[k] for k in ("bias_V", "softcap", "logit_scale")} for x in of_reference)
    loss, found_T = reference.distillation_loss(
        student[:2],
        teacher[:2],
        coef_T,
        temperature=given["temperature"],
        student_head=own,
        teacher_head=theirs,
        **KINDS[kind],
    )
    truth_T = oracle(student, teacher, KINDS[kind], head, teacher_head).masked_fill(coef_T == 0, 0)
    assert_close((found_T,), (truth_T,), 1e-12)
    truth = (coef_T * truth_T).sum()
    assert_close(gradients(loss, *student), gradients(truth, *student), 1e-12)


@pytest.mark.parametrize(("beta", "same"), [(0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_jsd_are_the_two_kl(beta, same):
    student, teacher, coef_T = case(torch.float32)
    pair = [
        distillation_loss(*student[:2], *teacher[:2], coef_T, **kind)
        for kind in ({"divergence": "jsd", "beta": beta}, {"divergence": same})
    ]
    assert torch.equal(*(x.divergence for x in pair))
    assert torch.equal(*(gradients(x.loss, student[0])[0] for x in pair))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_half_precision_budget(kind, device):
    """Against float64 from the same inputs, and against torch with dz rounded once."""
    student, teacher, coef_T = case(torch.bfloat16, tokens=64, vocabulary=211, device=device)
    ours = distillation_loss(
        *student[:2], *teacher[:2], coef_T, chunk_bytes=20 * 211 * 8, **KINDS[kind]
    )
    assert ours.loss.dtype == ours.divergence.dtype == torch.float32
    got = gradients(ours.loss, *student[:2])
    assert {x.dtype for x in got} == {torch.bfloat16}
    leaves = float64_leaves(*student[:2])
    truth_T = oracle(leaves, teacher, KINDS[kind], {}, {})
    expected = gradients((coef_T * truth_T).sum(), *leaves)
    assert_close((ours.divergence,), (truth_T,), 1e-5)
    assert_close(got, expected, BUDGET[torch.bfloat16])

    hidden, weight = (x.detach().float() for x in student[:2])
    z_TV = (hidden @ weight.T).requires_grad_()
    identity = torch.eye(211, device=device)
    of_z = oracle((z_TV, identity), teacher, KINDS[kind], {}, {})
    (dz_TV,) = gradients((coef_T * of_z).sum(), z_TV)
    dz_TV = dz_TV.bfloat16().float()
    plain = (dz_TV @ weight).bfloat16(), (dz_TV.T @ hidden).bfloat16()
    for mine, theirs, truth, factor in zip(got, plain, expected, (1.1, 1.6), strict=True):
        assert (mine - truth).norm() <= factor * (theirs - truth).norm()


@pytest.mark.parametrize("by", ["coefficient", "rows"])
def test_dead_rows_may_hold_anything(by):
    """NaN in rows of either model that take no part changes no bit; in a live row it shows."""
    student, teacher, coef_T = case(torch.float32)
    dead = torch.tensor([0, 8, T - 1])
    rows = None
    if by == "rows":
        rows = torch.cat((torch.tensor([t for t in range(T) if t not in dead]).flip(0), dead[:1]))
        coef_T[0] = 0.0  # in the list, and masked
    else:
        coef_T[dead] = 0.0

    def run():
        ours = distillation_loss(
            *student[:2], *teacher[:2], coef_T, rows=rows, chunk_bytes=CHUNK, divergence="jsd"
        )
        return ours, gradients(ours.loss, *student[:2])

    clean, clean_gradients = run()
    assert clean.loss > 0
    with torch.no_grad():
        student[0][dead], teacher[0][dead] = math.nan, math.nan
    dirty, dirty_gradients = run()
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(dirty.divergence, clean.divergence)
    assert torch.equal(dirty.kept, torch.ones(T, dtype=torch.bool).index_fill(0, dead, False))
    for mine, theirs in zip(dirty_gradients, clean_gradients, strict=True):
        assert torch.equal(mine, theirs)
    teacher[0][3] = math.nan
    broken, broken_gradients = run()
    assert broken.divergence.isnan().nonzero().tolist() == [[3]]
    assert broken.loss.isnan()
    assert broken_gradients[0][3].isnan().all()


@pytest.mark.parametrize("shape", [(0, V), (1, V), (3, 2), (2, 1000)])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_any_shape(kind, shape):
    student, teacher, coef_T = case(tokens=shape[0], vocabulary=shape[1])
    ours = distillation_loss(*student[:2], *teacher[:2], coef_T, chunk_bytes=64, **KINDS[kind])
    truth = (coef_T * oracle(student, teacher, KINDS[kind], {}, {})).sum()
    assert_close((ours.loss,), (truth,), 1e-12)
    got, expected = (gradients(x, *student[:2]) for x in (ours.loss, truth))
    assert_close(got, expected, 1e-12)


def test_nothing_to_do_stays_connected():
    student, teacher, coef_T = case(torch.float32)
    ours = distillation_loss(*student[:2], *teacher[:2], 0.0 * coef_T)
    assert ours.loss.item() == 0.0
    for got, leaf in zip(gradients(ours.loss, *student[:2]), student[:2], strict=True):
        assert torch.equal(got, torch.zeros_like(leaf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_teaches_nothing(kind, dtype):
    """Exactly: no rounding pushes a model away from itself. The shared weight has no second dW."""
    (hidden_TD, weight_VD, bias_V), _, coef_T = case(dtype)
    ours = distillation_loss(
        hidden_TD,
        weight_VD,
        hidden_TD.detach().clone(),
        weight_VD,
        coef_T,
        bias=bias_V,
        teacher_bias=bias_V,
        chunk_bytes=CHUNK,
        **KINDS[kind],
    )
    assert torch.equal(ours.divergence, torch.zeros(T))
    for got in gradients(ours.loss, hidden_TD, weight_VD, bias_V):
        assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_close_by_is_measured_in_its_own_digits(kind):
    """gap = log(q/p) of 1e-3 has three digits of float32's seven, and so has D ~ gap^2 / 2. The sum
    of p log(p/q) has eps = 6e-8 of D = 1e-7."""
    hidden_TD, weight_VD = torch.randn(T, D), 0.3 * torch.randn(V, D)
    teacher = (hidden_TD, weight_VD + 2e-4 * torch.randn(V, D))
    ours = distillation_loss(hidden_TD, weight_VD, *teacher, torch.ones(T), **KINDS[kind])
    wide = [x.double() for x in (hidden_TD, weight_VD, *teacher)]
    truth_T = oracle(wide[:2], wide[2:], KINDS[kind], {}, {})
    assert truth_T.max() < 2e-6
    assert ((ours.divergence - truth_T).abs() <= 5e-3 * truth_T).all()
    naive_TV = (wide[2] @ wide[3].T).float().log_softmax(1)
    student_TV = (wide[0] @ wide[1].T).float().log_softmax(1)
    if kind == "forward":
        naive_T = F.kl_div(student_TV, naive_TV, reduction="none", log_target=True).sum(1)
        assert ((naive_T - truth_T).abs() > 5e-3 * truth_T).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind, size, dtype):
    """Certain of different classes, of the same one, and of none: finite, and autograd's."""
    logits_TV = torch.tensor([[size, 0, -size], [size, 0, -size], [0, 0, 0], [-size, 0, size]])
    teacher_TV = torch.tensor([[-size, 0, size], [size, 0, -size], [size, 0, -size], [0, 0, 0]])
    weight_VD = torch.eye(3, dtype=dtype).requires_grad_()
    hidden_TD = logits_TV.to(dtype).requires_grad_()
    teacher = (teacher_TV.to(dtype), weight_VD.detach())
    ours = distillation_loss(
        hidden_TD, weight_VD, *teacher, torch.ones(4, dtype=dtype), **KINDS[kind]
    )
    leaves = float64_leaves(hidden_TD, weight_VD)
    truth_T = oracle(leaves, teacher, KINDS[kind], {}, {})
    budget = EXACT[dtype]
    assert_close((ours.divergence,), (truth_T,), budget)
    assert_close(gradients(ours.loss, hidden_TD), gradients(truth_T.sum(), leaves[0]), budget)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_neither_can_have(kind):
    """Padding of the vocabulary at -inf in both heads: the same as without these classes."""
    student, teacher, coef_T = case(torch.float32)
    with torch.no_grad():
        student[2][-4:], teacher[2][-4:] = -math.inf, -math.inf
    ours = distillation_loss(
        *student[:2], *teacher[:2], coef_T, bias=student[2], teacher_bias=teacher[2], **KINDS[kind]
    )
    less = [[x[:-4].detach() for x in side[1:]] for side in (student, teacher)]
    truth_T = oracle(
        (student[0], less[0][0]),
        (teacher[0], less[1][0]),
        KINDS[kind],
        {"bias": less[0][1]},
        {"bias": less[1][1]},
    )
    assert_close((ours.divergence,), (truth_T,), 1e-5)
    got = gradients(ours.loss, *student)
    assert_close(got[:1], gradients((coef_T * truth_T).sum(), student[0]), 1e-5)
    assert torch.equal(got[2][-4:], torch.zeros(4))


def test_a_class_that_one_cannot_have():
    """KL to where there is nothing is infinite, and says so; jsd is finite, gradients too."""
    student, teacher, coef_T = case(torch.float32)
    teacher[2][0] = -math.inf
    tensors = (*student[:2], *teacher[:2], coef_T)
    found = {
        kind: distillation_loss(*tensors, teacher_bias=teacher[2], divergence=kind)
        for kind in ("forward_kl", "reverse_kl", "jsd")
    }
    assert found["reverse_kl"].divergence.isposinf().all()
    for kind in ("forward_kl", "jsd"):
        assert found[kind].divergence.isfinite().all()
        assert all(x.isfinite().all() for x in gradients(found[kind].loss, *student[:2]))
    flipped = distillation_loss(*tensors, bias=teacher[2], divergence="forward_kl")
    assert flipped.divergence.isposinf().all()


@pytest.mark.parametrize("beta", [1e-300, 1e-9, 1e-7, 1 - 1e-7, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [100.0, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_mixture_that_is_nearly_one_of_the_two(side, size, dtype, beta):
    """With beta within eps of an end a class that only the other has was infinite, and NaN in the
    gradient. Absolute budgets, of probabilities: D and the logits' gradient go to 0 with beta."""
    student, teacher, _ = case()
    bias_V = torch.zeros(V, dtype=torch.float64)
    bias_V[3] = -size
    cast = [x.detach().to(dtype) for x in (*student[:2], *teacher[:2])]
    cast[0].requires_grad_()
    kind = {"divergence": "jsd", "beta": beta}
    name = "bias" if side == "student" else "teacher_bias"
    ours = distillation_loss(*cast, torch.ones(T), **{name: bias_V}, **kind)
    wide = [x.detach().double() for x in cast]
    wide[0].requires_grad_()
    head = {"bias": bias_V.clamp(min=-1e4)}  # torch's kl_div of -inf is NaN
    heads = (head, {}) if side == "student" else ({}, head)
    truth_T = oracle(wide[:2], wide[2:], kind, *heads)
    room = 8 * torch.finfo(dtype).eps
    assert ((ours.divergence - truth_T).abs() <= room).all()
    (got,), (truth,) = gradients(ours.loss, cast[0]), gradients(truth_T.sum(), wide[0])
    assert ((got - truth).abs() <= room * wide[1].abs().sum(0)).all()


def test_temperature_divides_both_logits_and_nothing_else():
    """No factor temperature^2: D is that of the scaled logits. In coef it gives Hinton's loss."""
    student, teacher, coef_T = case()
    tensors = (*student[:2], *teacher[:2])
    hot = distillation_loss(*tensors, coef_T, temperature=4.0)
    scaled = distillation_loss(*tensors, coef_T, logit_scale=0.25, teacher_logit_scale=0.25)
    assert_close((hot.divergence,), (scaled.divergence,), 1e-12)
    hinton = distillation_loss(*tensors, 16.0 * coef_T, temperature=4.0)
    assert_close((hinton.loss,), (16.0 * hot.loss,), 1e-12)


def test_micro_batches_add_up_in_the_sink():
    student, teacher, coef_T = case(torch.bfloat16)
    sink_VD = torch.zeros(V, D)
    for rows in (slice(0, 9), slice(9, T)):
        loss = distillation_loss(
            student[0][rows],
            student[1],
            teacher[0][rows],
            teacher[1],
            coef_T[rows],
            dweight_out=sink_VD,
        ).loss
        assert torch.autograd.grad(loss, student[:2], allow_unused=True)[1] is None
    leaves = float64_leaves(*student[:2])
    truth = (coef_T * oracle(leaves, teacher, KINDS["forward"], {}, {})).sum()
    assert_close((sink_VD,), gradients(truth, leaves[1]), BUDGET[torch.bfloat16])


def test_no_grad_and_frozen_tensors_cost_nothing():
    student, teacher, coef_T = case(torch.float32)
    tensors = (*student[:2], *teacher[:2], coef_T)
    chunks = math.ceil(T / 5)
    counts = {"all": 4, "no grad": 2, "frozen": 3}
    for name, products in counts.items():
        weight_VD = student[1].detach() if name == "frozen" else student[1]
        with Recorder() as recorder, torch.set_grad_enabled(name != "no grad"):
            ours = distillation_loss(tensors[0], weight_VD, *tensors[2:], chunk_bytes=CHUNK)
        assert recorder.gemms == products * chunks
        assert ours.loss.requires_grad is (name != "no grad")


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "teacher_softcap": 2.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_under_the_budget(options, dtype):
    """chunk_bytes, dW and its copy, rows, and 16 blocks of 2^16 logits between them."""
    tokens, vocabulary, budget = 512, 40001, 64 << 20
    hidden_TD = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(vocabulary, D, dtype=dtype, requires_grad=True)
    teacher = torch.randn(tokens, E, dtype=dtype), torch.randn(vocabulary, E, dtype=dtype)
    with Recorder() as recorder:
        distillation_loss(
            hidden_TD,
            weight_VD,
            *teacher,
            torch.rand(tokens),
            divergence="jsd",
            chunk_bytes=budget,
            **options,
        ).loss.backward()
    rest = 2 * 4 * weight_VD.numel() + 4 * (4 * hidden_TD.numel() + 32 * tokens)
    assert recorder.largest <= budget
    # bfloat16 operands are upcast 2 MiB at a time, each weight into a block of its own.
    assert recorder.peak <= budget + rest + 16 * 4 * 2**16 + (4 << 20) < 4 * tokens * vocabulary * 2


def test_flop_counters_see_every_product():
    """2 K V D of the student's logits, dX and dW each, 2 K V E of the teacher's."""
    student, teacher, coef_T = case(torch.float32)
    with FlopCounterMode(display=False) as counter:
        distillation_loss(*student[:2], *teacher[:2], coef_T).loss.backward()
    assert counter.get_total_flops() == 2 * T * V * (3 * D + E)


def test_chunks_change_nothing():
    student, teacher, coef_T = case()
    found = [
        distillation_loss(*student[:2], *teacher[:2], coef_T, divergence="jsd", chunk_bytes=size)
        for size in (1, CHUNK, None)
    ]
    for other in found[1:]:
        assert_close((other.divergence,), (found[0].divergence,), 1e-13)
        mine, theirs = (gradients(x.loss, *student[:2]) for x in (other, found[0]))
        assert_close(mine, theirs, 1e-13)


def test_backward_twice_and_double_backward_are_errors():
    student, teacher, coef_T = case()
    loss = distillation_loss(*student[:2], *teacher[:2], coef_T).loss
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, student[0], create_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_transforms_are_refused_in_words(transform):
    student, teacher, coef_T = case()

    def loss(hidden_TD):
        return distillation_loss(hidden_TD, student[1], *teacher[:2], coef_T).loss

    with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
        transform(loss, student[0].detach())


# --- as a torch op --------------------------------------------------------------------------------


def some(x, **options):
    """With every option but the sink."""
    return distillation_loss(
        x["hidden"],
        x["weight"],
        *x["teacher"][:2],
        x["coef"],
        divergence="jsd",
        beta=0.3,
        temperature=x["temperature"],
        bias=x["bias"],
        softcap=3.0,
        logit_scale=0.6,
        teacher_bias=x["teacher"][2],
        teacher_softcap=4.0,
        teacher_logit_scale=0.7,
        rows=x["rows"],
        chunk_bytes=CHUNK,
        **options,
    )


def into_a_sink(x, **options):
    return distillation_loss(
        x["hidden"], x["weight"], *x["teacher"][:2], x["coef"], dweight_out=x["sink"], **options
    )


def inputs_of(dtype=torch.float32):
    (hidden_TD, weight_VD, bias_V), teacher, coef_T = case(dtype)
    coef_T[3] = 0.0
    return {
        "hidden": hidden_TD,
        "weight": weight_VD,
        "bias": bias_V,
        "teacher": teacher,
        "coef": coef_T,
        "temperature": torch.rand(T) + 0.5,
        "rows": torch.tensor([4, 0, 11, 3, 8]),
        "sink": torch.zeros(V, D, dtype=torch.promote_types(dtype, torch.float32)),
    }


def run(call, x):
    """Values, gradients of the leaves in use, and the sink."""
    x = {**x, "sink": torch.zeros_like(x["sink"])}
    out = call(x)
    leaves = [x[name] for name in ("hidden", "weight", "bias")]
    found = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    values = [x.detach() for x in (out.loss, out.divergence, out.kept)]
    return [*values, *(g for g in found if g is not None), x["sink"]]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("call", [some, into_a_sink])
def test_compiled_equals_eager(call, dynamic):
    x = inputs_of()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for _ in range(2):  # the second time without tracing
        compare(run(compiled, x), run(call, x), budget=0.0)


@pytest.mark.parametrize("call", [some, into_a_sink])
def test_without_values_the_shapes_are_right(call):
    x = inputs_of(torch.bfloat16)
    real = run(call, x)
    with FakeTensorMode() as mode:
        y = {
            name: tuple(map(mode.from_tensor, v)) if name == "teacher" else mode.from_tensor(v)
            for name, v in x.items()
        }
        fake = run(call, y)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_opcheck():
    """Schema, autograd registration, fake kernel against the real one, AOT with dynamic shapes."""
    x = {name: v.detach() for name, v in inputs_of().items() if name != "teacher"}
    teacher = inputs_of()["teacher"]
    targets_T, needs = torch.zeros(T, dtype=torch.int64), [True, True, True]
    settings = (1.0, 3.0, 0.6, -100, "auto", CHUNK, False, False, 0.0, torch.float32, None, None)
    torch.library.opcheck(
        torch.ops.vpgea_fast.distil.default,
        (
            *(x["hidden"], x["weight"], x["bias"], targets_T, x["temperature"], None),
            *(*teacher, x["coef"], x["sink"], needs),
            *("jsd", 0.3),
            *(1.0, None, 0.7, *settings[3:]),
            *settings,
        ),
    )


@pytest.mark.parametrize("call", [some, into_a_sink])
def test_operands_follow_autocast(call):
    """Bit for bit the call with operands cast by hand, dX and dW in float32."""
    x = inputs_of()
    with torch.autocast("cpu", torch.bfloat16):
        got = run(call, x)
    cast = {
        **x,
        **{k: x[k].detach().bfloat16().requires_grad_() for k in ("hidden", "weight")},
        "teacher": (*(v.bfloat16() for v in x["teacher"][:2]), x["teacher"][2]),
    }
    expected = run(call, cast)
    assert all(v.dtype in (torch.float32, torch.bool) for v in got)
    compare([v.to(e.dtype) for v, e in zip(got, expected, strict=True)], expected, budget=0)


def test_autocast_takes_a_teacher_of_two_dtypes():
    student, teacher, coef_T = case(torch.float32)
    half = teacher[0].bfloat16(), teacher[1]
    with torch.autocast("cpu", torch.bfloat16):
        ours = distillation_loss(*student[:2], *half, coef_T)
        cast = distillation_loss(*student[:2], half[0], half[1].bfloat16(), coef_T)
    assert torch.equal(ours.loss, cast.loss)
    with pytest.raises(ValueError, match="cast one"):
        distillation_loss(*student[:2], *half, coef_T)


def test_float16_of_autocast_is_refused_by_its_name():
    student, teacher, coef_T = case(torch.float32)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="of autocast"):
        distillation_loss(*student[:2], *teacher[:2], coef_T)


def test_a_teacher_may_have_a_dtype_of_its_own():
    student, teacher, coef_T = case(torch.float32)
    half = [x.bfloat16() for x in teacher[:2]]
    ours = distillation_loss(*student[:2], *half, coef_T)
    upcast = distillation_loss(*student[:2], *(x.float() for x in half), coef_T)
    assert_close((ours.loss,), (upcast.loss,), 1e-6)


# --- bad calls ------------------------------------------------------------------------------------

BAD_CALLS = {
    "divergence": ({"divergence": "kl"}, "got 'kl', expected one of forward_kl, reverse_kl, jsd"),
    "idle beta": ({"beta": 0.5}, "beta: got 0.5 with divergence 'forward_kl'.*leave it out"),
    "beta 2": ({"divergence": "jsd", "beta": 2.0}, "beta: got 2.0, expected a number from 0 to 1"),
    "classes": ({"teacher_weight_VE": torch.zeros(V + 1, E)}, r"T = 23 and V = 61"),
    "rows of the teacher": ({"teacher_hidden_TE": torch.zeros(T - 1, E)}, r"T = 23 and V = 61"),
    "3-D teacher": ({"teacher_hidden_TE": torch.zeros(1, T, E)}, "flatten batch and time"),
    "teacher's bias": ({"teacher_bias": torch.zeros(V + 1)}, r"teacher_bias.*expected \(61,\)"),
    "teacher's dtypes": ({"teacher_weight_VE": torch.zeros(V, E).bfloat16()}, "cast one"),
    "teacher elsewhere": ({"teacher_weight_VE": torch.zeros(V, E, device="meta")}, "move one"),
    "live teacher": ({"teacher_hidden_TE": torch.ones(T, E, requires_grad=True)}, "no_grad"),
    "live coefficients": ({"coef_T": torch.ones(T, requires_grad=True)}, "requires grad"),
    "teacher's softcap": ({"teacher_softcap": -1.0}, "teacher_softcap: got -1.0"),
    "teacher's scale": ({"teacher_logit_scale": math.nan}, "teacher_logit_scale: got nan"),
    "temperature 0": ({"temperature": 0.0}, "temperature: got 0.0"),
    "3-D hidden": ({"hidden_TD": torch.zeros(1, 1, T, D)}, "flatten"),
    "float16": (
        {"hidden_TD": torch.zeros(T, D).half(), "weight_VD": torch.zeros(V, D).half()},
        "got float16, expected bfloat16",
    ),
    "float64 teacher": (
        {
            "teacher_hidden_TE": torch.zeros(T, E).double(),
            "teacher_weight_VE": torch.zeros(V, E).double(),
        },
        "float64 alone",
    ),
}


def test_a_sink_in_the_teachers_memory_is_refused():
    """As where a model is its own teacher, with other hidden states."""
    student, _, coef_T = case(torch.float32)
    own_VD = torch.randn(V, D)
    call = (student[0], student[1], torch.randn(T, D), own_VD, coef_T)
    for sink_VD, words in ((own_VD, "teacher_weight_VE"), (student[1].detach(), "weight_VD")):
        kept_VD = sink_VD.clone()
        with pytest.raises(ValueError, match=rf"\Adweight_out: got memory of {words}.*; pass"):
            distillation_loss(*call, dweight_out=sink_VD)
        assert torch.equal(sink_VD, kept_VD)


def valid_call():
    student, teacher, coef_T = case(torch.float32)
    return {
        "hidden_TD": student[0],
        "weight_VD": student[1],
        "teacher_hidden_TE": teacher[0],
        "teacher_weight_VE": teacher[1],
        "coef_T": coef_T,
        "divergence": "jsd",
        "beta": 0.5,
        "temperature": 0.9,
        "bias": student[2],
        "softcap": 3.0,
        "logit_scale": 1.1,
        "teacher_bias": teacher[2],
        "teacher_softcap": 4.0,
        "teacher_logit_scale": 0.9,
        "dweight_out": torch.zeros(V, D),
        "rows": None,
        "chunk_bytes": CHUNK,
        "validate": False,
    }


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_do(name):
    student, teacher, coef_T = case(torch.float32)
    names = ("hidden_TD", "weight_VD", "teacher_hidden_TE", "teacher_weight_VE", "coef_T")
    call = dict(zip(names, (*student[:2], *teacher[:2], coef_T), strict=True))
    changed, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{**call, **changed})


def test_any_argument_may_be_anything():
    """A ValueError of one line that names the argument, or a result that is a number."""
    call = valid_call()
    for name in call:
        stem = re.sub("_[A-Z]+$", "", name)
        refused = []
        for value in HOSTILE:
            try:
                out = distillation_loss(**{**call, name: value})
            except ValueError as error:
                refused.append(str(error))
            else:
                assert all(x.isfinite().all() for x in vars(out).values()), (name, value)
        assert len(refused) >= len(HOSTILE) - 12, name
        assert not [words for words in refused if stem not in words or "\n" in words], name

"""How far a student's head is from a teacher's, over the whole vocabulary, in chunks of rows.

T tokens, K rows that take part, C rows of a chunk, R of a block; D hidden of the student, E of the
teacher, V vocabulary. Of a row with the student's logits z and probabilities q, the teacher's p:

    forward_kl    D = KL(p || q)                                 dD/dz = q - p
    reverse_kl    D = KL(q || p)                                 dD/dz = q (log(q/p) - D)
    jsd           D = beta KL(p || m) + (1 - beta) KL(q || m)    m = beta p + (1 - beta) q
                  dD/dz = (1 - beta) q (log(q/m) - KL(q || m))

The coefficient of a row is known before the forward and the teacher has no gradient, so the logits'
gradient is made as soon as both logits are: four GEMMs, 4 K V D + 2 K V (D + E) FLOP, and no second
pass. dX, dW and db follow from dz as in chunked.py, whose GEMMs these are.

A chunk has two (C, V) buffers, allocated once: the student's logits, which become dz in place, and
the teacher's; one more for a student with a cap. What lies between runs in blocks of rows, 2^16
logits on a CPU and 2^22 on CUDA, or one row, with at most 16 temporaries of that size. All is in
the accumulator's dtype, float32 or float64; dz is rounded once, to the weight's.

KL(a || b) is added up as a log(a/b) + b - a, of which b - a adds 0 in all. No term is negative, so
nothing cancels where the two meet; sum a log(a/b) keeps eps there, where KL is of second order.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch

from vpgea_fast.kernels.autograd_state import without_values
from vpgea_fast.kernels.backends import chunk_budget
from vpgea_fast.kernels.chunked import (
    chunk_rows,
    put_logits_,
)
from vpgea_fast.kernels.contract import (
    INPUTS,
    SETTINGS,
    Head,
    Inputs,
    Needs,
    Settings,
    Sinks,
    schema_of,
)
from vpgea_fast.kernels.head import (
    dot,
    keep,
    new_sinks,
    operands,
    present_again,
    results,
    scaled,
)
from vpgea_fast.kernels.ops import one_pass_shapes, present, register, split
from vpgea_fast.kernels.products import add_gradients_, operand_of, upcast_block
from vpgea_fast.kernels.selection import accumulator, select

Tensor = torch.Tensor


class Teacher(NamedTuple):
    """The teacher's tensors, detached."""

    hidden_TE: Tensor
    weight_VE: Tensor
    bias_V: Tensor | None


class Measure(NamedTuple):
    """What is measured; beta counts for "jsd" alone."""

    divergence: str = "forward_kl"
    beta: float = 0.5


def _kl(a_RV: Tensor, b_RV: Tensor, gap_RV: Tensor) -> Tensor:
    """(R, 1): KL(a || b), gap = log(a/b); >= 0, inf where b is 0 and a is not."""
    # Two forms of one term: expm1 where a and b are close, where exp might overflow the plain one.
    near_RV = (gap_RV + torch.expm1(-gap_RV)).mul_(a_RV)
    far_RV = (a_RV * gap_RV).masked_fill_(a_RV == 0, 0.0).add_(b_RV - a_RV)
    terms_RV = torch.where(gap_RV.abs() < 1, near_RV, far_RV)
    # Each is >= 0 but for its last bit.
    return terms_RV.sum(1, keepdim=True).clamp_min(0.0)


def _slope(q_RV: Tensor, gap_RV: Tensor, kl_R1: Tensor) -> Tensor:
    """dKL(q || .)/dz, gap = log(q/.): classes that the student cannot take have none."""
    return (gap_RV - kl_R1).mul_(q_RV).masked_fill_(q_RV == 0, 0.0)


def _to_mixture(gap_RV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(q/m) and log(p/m), of gap = log(q/p): both 0, exactly, where the two are one.

    Taken from the larger of the two: log(q/m) = -log1p(beta (p/q - 1)), and neither exp overflows.
    """
    above_RV, far_RV = gap_RV > 0, gap_RV.abs()
    # Tensors of gap's dtype: of two Python numbers where() makes float32.
    ends = (gap_RV.new_full((), share) for share in (beta, 1.0 - beta))
    share_RV = torch.where(above_RV, *ends)
    # m has at least its share of either, which a share within eps of 1 would round away: inf.
    most = -math.log(min(beta, 1.0 - beta))
    larger_RV = torch.expm1(-far_RV).mul_(share_RV).log1p_().neg_().clamp_max_(most)
    smaller_RV = larger_RV - far_RV
    to_q_RV = torch.where(above_RV, larger_RV, smaller_RV)
    return to_q_RV, torch.where(above_RV, smaller_RV, larger_RV)


def _measured(z_RV: Tensor, teacher_RV: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """(R, 1) the divergence of two rows of logits, and (R, V) its gradient by the student's."""
    log_q_RV, log_p_RV = z_RV.log_softmax(1), teacher_RV.log_softmax(1)
    gap_RV = log_q_RV - log_p_RV
    # Where neither can be, -inf - -inf would be NaN; a NaN of the logits equals nothing and stays.
    gap_RV.masked_fill_(log_q_RV == log_p_RV, 0.0)
    q_RV, p_RV = log_q_RV.exp_(), log_p_RV.exp_()
    if measure.divergence == "forward_kl":
        # Where the two are one, so are their roundings: the difference is 0, exactly.
        return _kl(p_RV, q_RV, -gap_RV), q_RV - p_RV
    if measure.divergence == "reverse_kl":
        kl_R1 = _kl(q_RV, p_RV, gap_RV)
        return kl_R1, _slope(q_RV, gap_RV, kl_R1)
    beta, m_RV = measure.beta, q_RV.lerp(p_RV, measure.beta)
    q_gap_RV, p_gap_RV = _to_mixture(gap_RV, beta)
    kl_q_R1, kl_p_R1 = _kl(q_RV, m_RV, q_gap_RV), _kl(p_RV, m_RV, p_gap_RV)
    slope_RV = _slope(q_RV, q_gap_RV, kl_q_R1).mul_(1.0 - beta)
    return beta * kl_p_R1 + (1.0 - beta) * kl_q_R1, slope_RV


DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def divergence_pass(
    hidden_TD: Tensor,
    head: Head,
    teacher_TE: Tensor,
    teacher: Head,
    *,
    measure: Measure,
    rows_K: Tensor,
    coef_K: Tensor | None,
    sinks: Sinks,
    chunk_bytes: int | None,
) -> Tensor:
    """(K,) the divergence of each row; with coef_K the gradients of sum coef_k D_k into the sinks.

    Temperatures are the head's, (K,) where they are a tensor. No host synchronisation; validates
    nothing.
    """
    total, n_rows = accumulator(hidden_TD), rows_K.shape[0]
    if n_rows == 0:
        return hidden_TD.new_empty(0, dtype=total)
    # The teacher's logits are as wide, whatever its E; its tanh borrows the student's buffer.
    vocabulary, buffers = head.weight.shape[0], 2 + head.capped
    step = chunk_rows(n_rows, vocabulary, buffers, hidden_TD=hidden_TD, chunk_bytes=chunk_bytes)
    buffers_BCV = hidden_TD.new_empty(buffers, step, vocabulary, dtype=total)
    sides = [(hidden_TD, head), (teacher_TE, teacher)]
    # 2 MiB each where a CPU has halves to upcast, else None.
    upcasts = [upcast_block(side.weight, operand_of(x)) for x, side in sides]
    add_ = partial(
        add_gradients_,
        head=head,
        sinks=sinks,
        sink_VD=sinks.weight,
        unit=1.0,
        upcast_BD=upcasts[0],
    )
    # d/dz to d/da: what is left of the head, tanh's slope, follows in each chunk.
    upstream_K = None if coef_K is None else coef_K / head.temperature

    def run(chunk: slice) -> Tensor:
        mine_CD, other_CE = (x.index_select(0, rows_K[chunk]).to(operand_of(x)) for x, _ in sides)
        # The last chunk may be shorter: views of the same buffers.
        z_CV, teacher_CV, *spare = buffers_BCV[:, : mine_CD.shape[0]].unbind()
        slope_CV = spare.pop() if head.capped else None
        # The teacher first: until the student's logits come, their buffer is free for its tanh.
        scratch_CV = z_CV if teacher.capped else None
        for logits_CV, spare_CV, x_C, (_, side), upcast in (
            (teacher_CV, scratch_CV, other_CE, sides[1], upcasts[1]),
            (z_CV, slope_CV, mine_CD, sides[0], upcasts[0]),
        ):
            put_logits_(logits_CV, spare_CV, x_C, head=side, upcast_BD=upcast, chunk=chunk)
        upstream_C = None if upstream_K is None else upstream_K[chunk]
        values_C = _compared_(z_CV, teacher_CV, measure, upstream_C)
        if upstream_C is not None:
            if slope_CV is not None:
                z_CV.mul_(slope_CV)
            add_(z_CV, mine_CD, rows_K[chunk])
        return values_C

    return torch.cat([run(slice(start, start + step)) for start in range(0, n_rows, step)])


def _compared_(
    z_CV: Tensor, teacher_CV: Tensor, measure: Measure, upstream_C: Tensor | None
) -> Tensor:
    """(C,) the divergences; with an upstream gradient rewrites z_CV as that of the logits."""
    # Few rows at a time: the temporaries of a block stay in a CPU's cache, and small on CUDA.
    block = max(1, (1 << (22 if z_CV.is_cuda else 16)) // z_CV.shape[1])
    values: list[Tensor] = []
    for start in range(0, z_CV.shape[0], block):
        rows = slice(start, start + block)
        values_R1, slope_RV = _measured(z_CV[rows], teacher_CV[rows], measure)
        values.append(values_R1.squeeze(1))
        if upstream_C is not None:
            # In the logits' place: nobody reads this block of them again.
            torch.mul(slope_RV, upstream_C[rows, None], out=z_CV[rows])
    return torch.cat(values)


def distil(
    inputs: Inputs,
    teacher: Teacher,
    coef_T: Tensor,
    dweight_out: Tensor | None,
    *,
    needs: Needs,
    measure: Measure,
    theirs: Settings,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """loss, divergence_T, kept_T and the gradients of hidden, weight and bias at an upstream of 1.

    inputs.targets_T holds class 0 everywhere: a row is left out by its coefficient. theirs: of the
    teacher, whose head and operands it makes; rows, temperatures and chunks are the student's.
    """
    # The call's one synchronisation on CUDA, none with `rows`.
    selection = select(inputs, settings, coef_T)
    coef_K = selection.gather(coef_T).to(accumulator(inputs.hidden_TD))
    sinks = new_sinks(inputs, needs, dweight_out)
    hidden_TD, weight_VD = operands(*inputs[:2], selection, settings.operands)
    teacher_TE, teacher_VE = operands(*teacher[:2], selection, theirs.operands)
    chunk_bytes = settings.chunk_bytes
    if chunk_bytes is None:
        chunk_bytes = chunk_budget(weight_VD, gradients=any(needs))
    # The pass casts by itself: autocast would cast its float32 products too.
    with torch.autocast(hidden_TD.device.type, enabled=False):
        values_K = divergence_pass(
            hidden_TD,
            settings.head(weight_VD, inputs.bias_V, selection.temperature),
            teacher_TE,
            theirs.head(teacher_VE, teacher.bias_V, selection.temperature),
            measure=measure,
            rows_K=selection.rows_K,
            coef_K=coef_K if any(needs) else None,
            sinks=sinks,
            chunk_bytes=chunk_bytes,
        )
    values_T = selection.scatter(values_K)
    # Gathered again: masked rows are 0 in values_T.
    loss = dot(coef_K, selection.gather(values_T))
    return loss, values_T, selection.kept_T, results(sinks, inputs, dweight_out)


class Distil(torch.autograd.Function):
    """`distil` in the forward; the backward only scales, as that of head.OnePass.

    apply(*Inputs, *Teacher, coef_T, dweight_out, needs, measure, theirs, settings) -> loss,
    divergence_T, kept_T.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, coef_T, dweight_out, needs, measure, theirs, settings = arguments
        first = len(Inputs._fields)
        inputs, teacher = Inputs(*tensors[:first]), Teacher(*tensors[first:])
        if without_values(inputs.hidden_TD):
            loss, values_T, kept_T, *made = torch.ops.vpgea_fast.distil(
                *inputs, *teacher, coef_T, dweight_out, needs, *measure, *theirs, *settings
            )
            grads = present_again(made, needs, dweight_out)
        else:
            loss, values_T, kept_T, grads = distil(
                inputs,
                teacher,
                coef_T,
                dweight_out,
                needs=needs,
                measure=measure,
                theirs=theirs,
                settings=settings,
            )
        keep(ctx, inputs, grads, dweight_out)
        # A gradient through values_T would come after the pass that could have used it.
        ctx.mark_non_differentiable(values_T, kept_T)
        return loss, values_T, kept_T

    @staticmethod
    def backward(ctx, *upstream):
        # None for what is not hidden, weight or bias.
        rest = len(Inputs._fields) - 3 + len(Teacher._fields) + 6
        return *scaled(ctx, upstream[0]), *[None] * rest


@torch.no_grad()
def _distil_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, rest, settings = split(arguments)
    # Flat, because a schema has no records; the teacher's settings stand before the student's.
    *tensors, coef_T, dweight_out, needs, divergence, beta = rest[: -len(Settings._fields)]
    *values, grads = distil(
        inputs,
        Teacher(*tensors),
        coef_T,
        dweight_out,
        needs=Needs(*needs),
        measure=Measure(divergence, beta),
        theirs=Settings(*rest[-len(Settings._fields) :]),
        settings=settings,
    )
    return *values, *present(grads, inputs.hidden_TD)


def _distil_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (*_, dweight_out, needs, _, _), _ = split(arguments[: -len(Settings._fields)])
    return one_pass_shapes(inputs, Needs(*needs), dweight_out)


register(
    "distil",
    # (a!) says that the op writes there: a compiler may neither drop nor reorder the call.
    f"({INPUTS}, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor coef, "
    f"Tensor(a!)? dweight_out, bool[] needs, {schema_of(Measure)}, "
    f"{schema_of(Settings, 'teacher_')}, {SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _distil_kernel,
    _distil_fake,
)

"""A student's head held to a teacher's over the whole vocabulary, without (T, V) logits.

T tokens; D hidden of the student, E of the teacher, V vocabulary. Needs torch only. The rules of
vpgea_fast.losses hold here too: rows with coefficient 0 are never read, sums and no means, operands
that follow autocast, float32 accumulators, torch.compile without graph breaks, one backward. The
formulas of the gradients are in kernels/divergence.py.
"""

from dataclasses import dataclass

import torch

from vpgea_fast.kernels import checks
from vpgea_fast.kernels.batches import Batch, batch_of
from vpgea_fast.kernels.contract import Bounds, Inputs, needs_of
from vpgea_fast.kernels.divergence import DIVERGENCES, Distil, Measure, Teacher
from vpgea_fast.kernels.selection import accumulator
from vpgea_fast.kernels.sinks import checked_sink

Tensor = torch.Tensor


@dataclass(frozen=True)
class DistillationLoss:
    """`loss` = sum_t coef_t D_t (0-dim, differentiable); `divergence` D_t (T,), detached, in nats;
    `kept` (T,) bool.

    coef = [1, 0], teacher p = [1/2, 1/2], student q = [1/4, 3/4], forward KL: loss = 0.1438,
    divergence = [0.1438, 0], kept = [True, False].
    """

    loss: Tensor  # 0-dim
    divergence: Tensor  # (T,)
    kept: Tensor  # (T,) bool


def distillation_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_weight_VE: Tensor,
    coef_T: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    dweight_out: Tensor | None = None,
    shift: bool = False,
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    validate: bool = False,
) -> DistillationLoss:
    """sum_t coef_t D_t, D between a teacher's distribution p and the student's q, in one pass.

        forward_kl    D = KL(p || q) = sum_v p_v log(p_v / q_v)
        reverse_kl    D = KL(q || p)
        jsd           D = beta KL(p || m) + (1 - beta) KL(q || m)        m = beta p + (1 - beta) q

    Both logits of a chunk of rows are made, then the gradient of the student's at once: four GEMMs,
    and dX and dW alone are kept. Nothing of the teacher gets a gradient.

    hidden_TD (T, D), weight_VD (V, D): the student's, of one dtype, or cast by autocast; bfloat16,
        float32 or float64. bias, softcap, logit_scale: of its head, as in `losses.HeadOptions`.
    teacher_hidden_TE (T, E), teacher_weight_VE (V, E): the teacher's, any E, the same V classes in
        the same order. A half or float32 dtype of its own, or float64 beside float64.
    coef_T: (T,), a constant, 0 for rows that take no part. Minimising wants coef > 0: 1 / tokens,
        counted over the whole optimiser step, where `losses` wants -1 / tokens.
    divergence: the names are those of distillation, where forward is teacher first. With rows that
        the student has sampled, reverse_kl is on-policy distillation.
    beta: for "jsd" alone (None: 0.5), weight of the teacher. 0 is forward_kl and 1 is reverse_kl,
        as GKD (arXiv 2306.13649), TRL's GKDTrainer and Liger have it: a convention, since the
        formula itself goes to 0 at both ends.
    temperature: of both heads; positive float or (T,). Gradients go as 1 / temperature^2 at high
        temperatures. Hinton's factor temperature^2 is not included, as in TRL and Liger: put it
        into coef_T.
    shift: hidden states may be (B, T, D) and (B, T, E), coefficients and temperatures then (B, T),
        as in `losses`. shift=True: coef of token t weighs the distributions of place t - 1.
    dweight_out, rows, chunk_bytes, validate: as in `losses.weighted_logprob_loss`. chunk_bytes
        holds two logits a class here, three under a softcap of the student.

    A class that one of the two cannot have (a logit of -inf) makes its KL infinite, and the
    gradient of reverse_kl not finite; jsd is finite there. Runs in plain torch on every device.

    ValueError: shapes, dtypes, devices, options; float16, whose gradients have no bound here; a
    teacher's hidden state or coef_T that requires grad; a weight cut over processes.
    """
    checks.check_plain("weight_VD", weight_VD)  # cut by classes too: a part knows no mixture
    batch = _layout(hidden_TD, teacher_hidden_TE, shift)
    hidden_TD, teacher_hidden_TE = (batch.hidden(x) for x in (hidden_TD, teacher_hidden_TE))
    coef_T = batch.rows("coef_T", coef_T, 0.0)
    temperature = batch.rows("temperature", temperature, 1.0)
    # No targets: class 0 of every row, which the pass never looks at.
    targets_T = torch.zeros(hidden_TD.shape[:1], dtype=torch.int64, device=hidden_TD.device)
    inputs, settings = checks.checked_call(
        hidden_TD,
        weight_VD,
        targets_T,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        rows=batch.indices(rows),
        chunk_bytes=chunk_bytes,
        validate=validate,
    )
    _refuse_float16(hidden_TD, settings.operands)
    # Gradients are made before anybody could ask for one of coef.
    checks.check_constant("coef_T", coef_T, targets_T)
    teacher = Teacher(teacher_hidden_TE, teacher_weight_VE, teacher_bias)
    teacher, operands = _checked_teacher(inputs, teacher)
    theirs = settings._replace(
        softcap=teacher_softcap, logit_scale=teacher_logit_scale, operands=operands
    )
    read = {f"teacher_{name.removesuffix('_V')}": x for name, x in teacher._asdict().items()}
    sink_VD = checked_sink(dweight_out, weight_VD, inputs, coef_T=coef_T, **read)
    checks.check_settings(theirs, "teacher_")  # bounds of numbers are the student's
    measure, needs = Measure(*_divergence(divergence, beta)), needs_of(inputs, sink_VD)
    of_call = (coef_T, sink_VD, needs, measure, theirs, settings)
    loss, *values = Distil.apply(*inputs, *teacher, *of_call)
    return DistillationLoss(loss, *map(batch.back, values))


_BETA = Bounds("a number from 0 to 1", 0, 1)


def _refuse_float16(hidden_TD: Tensor, operands: torch.dtype) -> None:
    # No unit for dz, as chunked.storage_unit has one: reverse KL's gradient has no bound.
    if operands is torch.float16:
        source = "" if hidden_TD.dtype is torch.float16 else " of autocast"
        raise ValueError(
            f"hidden_TD: got float16{source}, expected bfloat16, float32 or float64: cast it, or "
            "call the loss under torch.autocast(..., dtype=torch.bfloat16)"
        )


def _layout(hidden_TD: Tensor, teacher_hidden_TE: Tensor, shift: bool) -> Batch:
    """How the rows of both lie. ValueError: one has sequences, the other rows."""
    checks.check_plain("hidden_TD", hidden_TD)
    checks.check_plain("teacher_hidden_TE", teacher_hidden_TE)
    batch = batch_of(hidden_TD, shift)
    # Before they are flattened: 2 x 6 rows of one would fit 3 x 4 of the other.
    if batch_of(teacher_hidden_TE, shift).shape != batch.shape:
        raise ValueError(
            f"teacher_hidden_TE: got {tuple(teacher_hidden_TE.shape)}, expected the rows of "
            f"hidden_TD {tuple(hidden_TD.shape)}: flatten batch and time of both, or of neither"
        )
    return batch


def _divergence(divergence: str, beta: float | None) -> tuple[str, float]:
    """The divergence and its beta; the ends of jsd are the two KL."""
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence: got {checks.told(divergence)}, expected one of {', '.join(DIVERGENCES)}"
        )
    if divergence != "jsd":
        if beta is not None:
            raise ValueError(
                f"beta: got {checks.told(beta)} with divergence {divergence!r}, expected None; "
                "leave it out, or take 'jsd'"
            )
        return divergence, 0.5  # of no effect, but the op takes a number
    if beta is None:
        return divergence, 0.5
    checks.check_number("beta", beta, _BETA)
    # Here the formula is 0 for any student; GKD, TRL and Liger mean these two.
    if beta == 0:
        return "forward_kl", 0.5
    return ("reverse_kl", 0.5) if beta == 1 else ("jsd", beta)


def _checked_teacher(inputs: Inputs, teacher: Teacher) -> tuple[Teacher, torch.dtype]:
    """Its tensors, detached, and what they are cast to. ValueError: they do not fit the student."""
    hidden_TE, weight_VE, bias_V = teacher
    student_TD, classes = inputs.hidden_TD, inputs.weight_VD.shape[0]
    tensors = {"teacher_hidden_TE": hidden_TE, "teacher_weight_VE": weight_VE}
    if bias_V is not None:
        tensors["teacher_bias"] = bias_V
    for name, x in tensors.items():
        # Replicas of a teacher are whole; its rows are those of this rank, as the student's.
        whole = "" if name == "teacher_hidden_TE" else f"the whole one, {name}.full_tensor()"
        checks.check_plain(name, x, instead=whole)
        checks.check_float(name, x)
        if x.device != student_TD.device:
            raise ValueError(f"{name} is on {x.device}, hidden_TD on {student_TD.device}: move one")
    tokens, flat = student_TD.shape[0], hidden_TE.dim() == weight_VE.dim() == 2
    if not flat or (*hidden_TE.shape, classes) != (tokens, weight_VE.shape[1], weight_VE.shape[0]):
        raise ValueError(
            f"teacher_hidden_TE {tuple(hidden_TE.shape)} and teacher_weight_VE "
            f"{tuple(weight_VE.shape)}: expected (T, E) and (V, E) with the student's T = {tokens} "
            f"and V = {classes}; flatten batch and time first, cut padding classes"
        )
    if bias_V is not None:
        checks.check_shape("teacher_bias", bias_V, (classes,))
    autocast = checks.autocast_dtype(hidden_TE, weight_VE)
    if weight_VE.dtype != hidden_TE.dtype and autocast is None:
        raise ValueError(
            f"teacher_weight_VE is {weight_VE.dtype}, teacher_hidden_TE {hidden_TE.dtype}: cast one"
        )
    # Both logits are compared in one accumulator.
    if accumulator(hidden_TE) != accumulator(student_TD):
        raise ValueError(
            f"teacher_hidden_TE is {hidden_TE.dtype}, hidden_TD {student_TD.dtype}: float64 goes "
            "with float64 alone, cast one of them"
        )
    if hidden_TE.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_hidden_TE requires grad, but is a constant here: run the teacher under "
            "torch.no_grad(), or detach it"
        )
    # Its weight is a parameter like any other, and may be the student's own.
    bias_V = None if bias_V is None else bias_V.detach()
    teacher = Teacher(hidden_TE.detach(), weight_VE.detach(), bias_V)
    return teacher, autocast or hidden_TE.dtype

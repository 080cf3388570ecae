"""Checks of a call that need no values: shapes, dtypes, devices and options; ValueError in words.

T tokens, K rows that take part, D hidden, V vocabulary, S sequences. What only values show is
checked where they are read: selection.py and streams.py.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vpgea_fast.kernels.autograd_state import refuse_transforms
from vpgea_fast.kernels.contract import FLOAT32, INT64, NUMBERS, Bounds, Inputs, Settings
from vpgea_fast.kernels.shards import Shards, part

Tensor = torch.Tensor

SPOKEN = ("hidden_TD", "weight_VD", "bias", "targets_T", "temperature", "rows")
"""The fields of `Inputs` as the caller names them."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPTIONS = Settings._fields[:-3]  # operands, group and classes follow from the tensors


def check_options(options: Iterable[str]) -> None:
    """TypeError for an option of the head that there is not."""
    known = ("bias", "rows", *OPTIONS)
    for name in options:
        if name not in known:
            raise TypeError(
                f"got an unexpected keyword argument {name!r}; options are {', '.join(known)}"
            )


def checked_call(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    rows: Tensor | None = None,
    **options: Any,
) -> tuple[Inputs, Settings]:
    """The arguments of a call, checked: ValueError; TypeError for an option that there is not."""
    check_options(options)
    whole_VD, shards = weight_VD, shards_of(weight_VD)
    if shards is not None:
        weight_VD = own_part("weight_VD", weight_VD, whole_VD)
        bias = None if bias is None else own_part("bias", bias, whole_VD)
    # A temperature per row is an input of the op, one for all a setting.
    per_row = isinstance(temperature, Tensor)
    inputs = Inputs(
        hidden_TD=hidden_TD,
        weight_VD=weight_VD,
        bias_V=bias,
        targets_T=targets_T,
        temperature_T=temperature if per_row else None,
        rows=rows,
    )
    _check_tensors(inputs)
    # With one class there are no others, whose log-sum-exp every backend needs.
    if whole_VD.shape[0] < 2:
        raise ValueError(f"weight_VD: got V = {whole_VD.shape[0]}, expected at least 2 classes")
    # Decided here: inside the autograd function autocast is already off.
    operands = autocast_dtype(hidden_TD, weight_VD) or hidden_TD.dtype
    scalar = 1.0 if per_row else temperature  # an op's schema wants a number all the same
    group, classes = shards or (None, None)
    settings = Settings(
        temperature=scalar, operands=operands, group=group, classes=classes, **options
    )
    check_settings(settings)
    return inputs, settings


def shards_of(weight_VD: Any) -> Shards | None:
    """The cut of a DTensor `Shard(0)` over a mesh of one dimension; None for anything else.

    ValueError: a mesh with more processes than torch's cut has parts with a class.
    """
    mesh = getattr(weight_VD, "device_mesh", None)
    # Other placements are refused where tensors are checked, with what to pass instead.
    if mesh is None or mesh.ndim != 1 or weight_VD.dim() != 2:
        return None
    if not weight_VD.placements[0].is_shard(0):
        return None
    classes = weight_VD.shape[0]
    if not part(classes, mesh.size(), mesh.size() - 1):
        raise ValueError(
            f"weight_VD: got V = {classes} cut over {mesh.size()} ranks, of which the last has no "
            "class; expected one or more on each: use a smaller mesh"
        )
    return Shards(mesh.get_group().group_name, classes)


def own_part(name: str, x: Any, weight_VD: Any) -> Tensor:
    """The part of this process, differentiable, of what is cut as the weight is: a gradient comes
    back with the same placement."""
    mesh = weight_VD.device_mesh
    if getattr(x, "device_mesh", None) != mesh or x.placements != weight_VD.placements:
        got = "no DTensor"
        if hasattr(x, "device_mesh"):
            got = f"a DTensor placed {tuple(x.placements)} on {x.device_mesh}"
        raise ValueError(
            f"{name}: got {got}, expected one placed as weight_VD, Shard(0) on the same mesh: "
            f"distribute_tensor({name}, mesh, [Shard(0)])"
        )
    check_shape(name, x, weight_VD.shape[: x.dim()])
    # Which classes are here the losses compute from V and the number of ranks, and ask nobody.
    own = x.to_local()
    if own.shape[0] != len(part(x.shape[0], mesh.size(), mesh.get_local_rank())):
        raise ValueError(
            f"{name}: this rank has {own.shape[0]} of {x.shape[0]} classes, expected "
            "ceil(V / ranks) on all but the last ones: cut it by distribute_tensor"
        )
    return own


def autocast_dtype(*operands: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives the operands of a GEMM; None where it leaves them alone."""
    kind = operands[0].device.type
    # Autocast never touches float64.
    if not _autocast_on(kind) or any(x.dtype is torch.float64 for x in operands):
        return None
    return torch.get_autocast_dtype(kind)


def _autocast_on(kind: str) -> bool:
    # torch has no autocast for meta and raises.
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _autocast_on(kind) else nullcontext()


def _check_tensors(inputs: Inputs) -> None:
    hidden_TD, weight_VD, bias, targets_T, temperature_T, rows = inputs
    optional = ("bias", "temperature", "rows")  # None is a value of these alone
    # What is no tensor, or a sharded one, first: it has no shape or dtype to speak of.
    for name, x in zip(SPOKEN, inputs, strict=True):
        if x is not None or name not in optional:
            check_plain(name, x)
        if x is not None and x.device != hidden_TD.device:
            raise ValueError(f"{name} is on {x.device}, hidden_TD on {hidden_TD.device}: move one")
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and weight_VD {tuple(weight_VD.shape)}: expected "
            "(T, D) and (V, D); flatten other dimensions first (hidden.reshape(-1, D), and "
            "reshape(-1) what is per token), and gather a sharded weight"
        )
    check_float("hidden_TD", hidden_TD)
    check_float("weight_VD", weight_VD)
    if weight_VD.dtype != hidden_TD.dtype and autocast_dtype(hidden_TD, weight_VD) is None:
        raise ValueError(
            f"weight_VD is {weight_VD.dtype}, hidden_TD is {hidden_TD.dtype}: cast one of "
            "them to the other's dtype (.to() is differentiable)"
        )
    check_targets("targets_T", targets_T, "hidden_TD", hidden_TD)
    if bias is not None:
        check_shape("bias", bias, (weight_VD.shape[0],))
        check_float("bias", bias)
    if temperature_T is not None:
        check_constant("temperature", temperature_T, targets_T)
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"rows: got {rows.dtype} {tuple(rows.shape)}, expected int64 indices (R,)")


def check_settings(settings: Settings, prefix: str = "") -> None:
    """ValueError for an option out of its bounds, under the name that the caller knows it by."""
    for name, bounds in NUMBERS.items():
        value = getattr(settings, name)
        # None is a value only where it is the default.
        if value is not None or Settings._field_defaults[name] is not None:
            check_number(f"{prefix}{name}", value, bounds)
    if not isinstance(settings.backend, str):
        raise ValueError(f"backend: got {told(settings.backend)}, expected a name such as 'auto'")
    check_flag("batch_invariant", settings.batch_invariant)
    check_flag("validate", settings.validate)


def check_number(name: str, x: Any, bounds: Bounds) -> None:
    """The ops take these as Python numbers; a bool would be read as 0 or 1, and beyond the bounds
    the loss is NaN."""
    # SymInt and SymFloat: what torch.compile makes of a number that changed between calls.
    kinds = (int, torch.SymInt) if bounds.whole else (int, float, torch.SymInt, torch.SymFloat)
    if not isinstance(x, kinds) or isinstance(x, bool):
        got, remedy = told(x), "convert it, or leave it out for the default"
        if isinstance(x, Tensor):
            convert = "int" if bounds.whole else "float"
            got, remedy = "a Tensor", f"pass {convert}({name}), on CUDA made outside the step"
        raise ValueError(f"{name}: got {got}, expected {bounds.expected}; {remedy}")
    # Comparisons, which NaN fails: torch.compile does not trace math.isfinite of a dynamic float.
    # An int stops at int64, which is what an op takes.
    high = min(bounds.high, INT64) if isinstance(x, int) else bounds.high
    if not bounds.low <= x <= high:
        raise ValueError(
            f"{name}: got {x}, expected {bounds.expected}, from {bounds.low} to {bounds.high}"
        )


def check_flag(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise ValueError(f"{name}: got {told(x)}, expected True or False: pass bool(...) of it")


def check_matrix(name: str, x: Any, expected: str) -> None:
    check_plain(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")


def check_targets(name: str, targets_T: Tensor, rows: str, hidden_TD: Tensor) -> None:
    if targets_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: got {targets_T.dtype}, expected int64 or int32: .long()")
    expected = (hidden_TD.shape[0],)
    if tuple(targets_T.shape) != expected:
        raise ValueError(
            f"{name}: got shape {tuple(targets_T.shape)}, expected {expected}, one for each row "
            f"of {rows}"
        )


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{name}: got {x.dtype}, expected float16, bfloat16, float32 or float64: cast it, "
            f"{name}.to(hidden.dtype)"
        )


def check_plain(name: str, x: Any, instead: str = "") -> None:
    """A dense tensor of this process, outside torch.func."""
    if not isinstance(x, Tensor):
        remedy = f"torch.as_tensor({name}, device=hidden.device)"
        if isinstance(x, (bool, int, float)):
            remedy = "torch.full((T,), value) or (B, T), a value for each token (or path)"
        elif isinstance(x, torch.nn.Module):
            remedy = "the module's weight"
        kind = type(x).__name__
        raise ValueError(f"{name}: got {told(x)} ({kind}), expected a tensor; pass {remedy}")
    if hasattr(x, "device_mesh"):
        raise ValueError(_dtensor_advice(name, x, instead))
    if x.layout is not torch.strided:
        raise ValueError(
            f"{name}: got a {x.layout} tensor, expected a dense one: pack it first "
            "(.values() of a nested one, .to_dense() of a sparse one)"
        )
    refuse_transforms(x)


def told(x: Any) -> str:
    """A value that may be long, in a message of one line."""
    text = " ".join(repr(x).split())  # a module's repr has many lines
    return text if len(text) <= 40 else text[:37] + "..."


def _dtensor_advice(name: str, x: Any, instead: str) -> str:
    """What to pass for a DTensor.

    A plain `full_tensor()` takes the gradient of each rank for the whole one: a rank's tokens train
    its own shard, and nothing of the others. Data is the reverse: each rank gives its own rows.
    """
    start = f"{name} is a DTensor {tuple(x.shape)} placed {tuple(x.placements)}: the loss needs a "
    if instead:
        return f"{start}plain tensor; pass {instead}"
    if name not in ("weight_VD", "bias"):
        return (
            f"{start}plain tensor; pass the rows of this rank, {name}.to_local(), beside those of "
            "every other argument (only where another dimension than the rows is cut "
            f"{name}.full_tensor(), on every rank)"
        )
    # One placement for each dimension of the mesh.
    partial = ", ".join(["Partial()"] * len(x.placements))
    return (
        f"{start}plain tensor. Under FSDP2 call it inside the forward of the module that owns the "
        "weight, where hooks have unsharded it. Otherwise pass "
        f"{name}.full_tensor(grad_placements=[{partial}]), which adds the ranks' gradients: leave "
        "out the world-size factor. Partial() is for a mesh dimension along which ranks hold other "
        "tokens; where they hold the same tokens it is Replicate()"
    )


def check_shape(name: str, x: Tensor, expected: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(expected)}")


def check_constant(name: str, x: Tensor, like: Tensor) -> None:
    check_plain(name, x)
    check_shape(name, x, like.shape)
    if x.dtype not in FLOATS or x.device != like.device:
        raise ValueError(
            f"{name}: got {x.dtype} on {x.device}, expected a float tensor on {like.device}: "
            ".to() makes one"
        )
    if x.requires_grad:
        raise ValueError(
            f"{name} requires grad, but is a constant here: detach it, or build the loss from "
            "linear_logprob"
        )


def check_streams(
    hidden: tuple[Tensor, Tensor],
    weight_VD: Tensor,
    targets: tuple[Tensor, Tensor],
    coef: tuple[Tensor, Tensor],
) -> None:
    """The two streams of a call, each (posterior, prior), before they are laid end to end."""
    if shards_of(weight_VD) is None:
        check_matrix("weight_VD", weight_VD, "(V, D): gather a sharded one")
    for name, *tensors in zip(("post", "prior"), hidden, targets, coef, strict=True):
        for kind, x in zip(("hidden", "targets", "coef"), tensors, strict=True):
            label = f"{kind}_{name}"
            check_plain(label, x)
            if x.device != weight_VD.device:
                raise ValueError(
                    f"{label} is on {x.device}, weight_VD on {weight_VD.device}: move one"
                )
        hidden_RD, targets_R, coef_R = tensors
        # Before the streams are joined: torch.cat would promote a dtype, or fail without a name.
        cast = autocast_dtype(hidden_RD, weight_VD) is not None
        alike = hidden_RD.dtype == weight_VD.dtype or cast
        if not alike or hidden_RD.dim() != 2 or hidden_RD.shape[1] != weight_VD.shape[1]:
            raise ValueError(
                f"hidden_{name}: got {hidden_RD.dtype} {tuple(hidden_RD.shape)}, expected "
                f"{weight_VD.dtype} (rows, {weight_VD.shape[1]}) as in weight_VD: cast or flatten"
            )
        check_targets(f"targets_{name}", targets_R, f"hidden_{name}", hidden_RD)
        check_constant(f"coef_{name}", coef_R, targets_R)


_DENOMINATOR = Bounds("a positive number or a 0-dim tensor", FLOAT32.tiny, FLOAT32.max)


def sequence_weight(
    advantage_S: Tensor, denominator: float | Tensor | None, weight_S: Tensor | None
) -> Tensor:
    """w_s, from whichever of the two was given, in the advantage's dtype."""
    if weight_S is not None and denominator is None:
        check_constant("weight_S", weight_S, advantage_S)
        return weight_S.to(advantage_S.dtype)
    # No default: 1 would train at a rate that follows the number of tokens.
    if denominator is None or weight_S is not None:
        given = "neither" if denominator is None else "both"
        raise ValueError(f"got {given} of denominator and weight_S, expected exactly one")
    # A tensor's value is not looked at here: on CUDA that would wait for the device.
    if isinstance(denominator, Tensor):
        check_plain("denominator", denominator)
        check_shape("denominator", denominator, ())
        if denominator.device != advantage_S.device:
            raise ValueError(
                f"denominator is on {denominator.device}, advantage_S on {advantage_S.device}: "
                "move one"
            )
        if denominator.dtype not in (*FLOATS, torch.int32, torch.int64):
            raise ValueError(f"denominator: got {denominator.dtype}, expected a float or int64")
        if denominator.requires_grad:
            raise ValueError("denominator requires grad, but is a constant here: detach it")
        return torch.ones_like(advantage_S) / denominator
    check_number("denominator", denominator, _DENOMINATOR)
    return torch.ones_like(advantage_S) / denominator


def check_packed(
    hidden_post_TD: Tensor,
    hidden_prior_UD: Tensor,
    *,
    targets_T: Tensor,
    cu_seqlens: Tensor,
    advantage_S: Tensor,
    prior_index: Tensor | None,
) -> None:
    """The sequences of `vpgea_loss`; what needs values is checked by streams.layout_of."""
    check_matrix("hidden_post_TD", hidden_post_TD, "(T, D): flatten batch and time first")
    check_matrix("hidden_prior_UD", hidden_prior_UD, "(U, D): flatten batch and time first")
    check_float("hidden_post_TD", hidden_post_TD)
    check_plain("targets_T", targets_T)
    check_targets("targets_T", targets_T, "hidden_post_TD", hidden_post_TD)
    check_sequences(cu_seqlens, advantage_S, targets_T)
    tokens, prior_tokens = targets_T.shape[0], hidden_prior_UD.shape[0]
    # With an index the host does not know how many rows its sequences have.
    if prior_index is not None:
        check_prior_index(prior_index, cu_seqlens)
    elif prior_tokens != tokens:
        raise ValueError(
            f"hidden_prior_UD: got {prior_tokens} rows, expected {tokens} as in hidden_post_TD; "
            "pass prior_index when the prior stream holds only some sequences"
        )


def check_sequences(cu_seqlens: Tensor, advantage_S: Tensor, targets_T: Tensor) -> None:
    for name, x in (("cu_seqlens", cu_seqlens), ("advantage_S", advantage_S)):
        check_plain(name, x)
        if x.device != targets_T.device:
            raise ValueError(f"{name} is on {x.device}, targets_T on {targets_T.device}: move one")
    if advantage_S.dim() != 1:
        raise ValueError(f"advantage_S: got shape {tuple(advantage_S.shape)}, expected (S,)")
    # Compared with itself: what defines S has no other shape to agree with.
    check_constant("advantage_S", advantage_S, advantage_S)
    # Indices and boundaries: searchsorted takes these two dtypes.
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: got {cu_seqlens.dtype}, expected int32 or int64")
    check_shape("cu_seqlens", cu_seqlens, (advantage_S.shape[0] + 1,))


def check_prior_index(prior_index: Tensor, cu_seqlens: Tensor) -> None:
    check_plain("prior_index", prior_index)
    if prior_index.dtype != torch.int64 or prior_index.dim() != 1:
        raise ValueError(
            f"prior_index: got {prior_index.dtype} {tuple(prior_index.shape)}, expected int64 (P,)"
        )
    if prior_index.device != cu_seqlens.device:
        raise ValueError(
            f"prior_index is on {prior_index.device}, cu_seqlens on {cu_seqlens.device}: move one"
        )

"""The records that pass between the losses, the ops and the backends of the head.

T tokens, K rows that take part, D hidden, V vocabulary. `Inputs` and `Settings` are the arguments
of a torch op, flat; the other records are those of `head_pass`, which every backend implements
with one signature:

    head_pass(
        hidden_TD, head, targets_K, *, rows_K, entropy, statistics, upstream, sinks, chunk_bytes
    ) -> Values

An option of the head has its line in `Settings` (with its default), its bounds in NUMBERS, and its
line in `Head`; its meaning is in the formula of `Head`, which reference.py spells out.
"""

import math
import types
from dataclasses import dataclass, replace
from typing import NamedTuple, get_type_hints

import torch

from vpgea_fast.kernels.shards import Shards

Tensor = torch.Tensor


class LogitShape(NamedTuple):
    """What makes a logit of a product h . w: one argument of a kernel, see `_tiling.logit_of`."""

    scale: float
    cap: float | None  # None: compiled without the tanh


@dataclass(frozen=True, kw_only=True)
class Head:
    """The head of one pass, and the temperatures of its rows.

    a = logit_scale (h . w) + bias        z = softcap tanh(a / softcap) / temperature
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    temperature: float | Tensor = 1.0  # (K,) where it is a tensor
    softcap: float | None = None
    logit_scale: float = 1.0
    shards: Shards | None = None  # weight and bias are the own classes of a head that is cut

    @property
    def capped(self) -> bool:
        return self.softcap is not None

    @property
    def shape(self) -> LogitShape:
        return LogitShape(self.logit_scale, self.softcap)

    def part(self, classes: slice) -> "Head":
        """The head of these classes alone."""
        bias_V = None if self.bias is None else self.bias[classes]
        return replace(self, weight=self.weight[classes], bias=bias_V)

    def logits_(self, a_CV: Tensor, slope_CV: Tensor | None, temperature: float | Tensor) -> None:
        """Rewrites the products a_CV as z_CV; the tanh's slope 1 - tanh^2 goes to slope_CV.

        temperature: the head's, (C, 1) of this chunk where it is a tensor.
        """
        # Each line is one more pass over (C, V), read and written: a factor of 1 is left out.
        if self.logit_scale != 1.0:
            a_CV.mul_(self.logit_scale)
        if self.bias is not None:
            a_CV.add_(self.bias)
        if self.softcap is not None:
            assert slope_CV is not None
            torch.tanh(a_CV.div_(self.softcap), out=slope_CV)
            torch.mul(slope_CV, self.softcap / temperature, out=a_CV)
            slope_CV.square_().neg_().add_(1.0)
        elif isinstance(temperature, Tensor) or temperature != 1.0:
            a_CV.div_(temperature)


class Needs(NamedTuple):
    """Which gradients a call wants: Needs(hidden=True, weight=True, bias=False)."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Gradients of the loss by each row's values, each (K,); None: nobody used that value.

    lse_square: the gradient by lse^2; that by lse, 2 lse times it, a pass makes itself. skip_below:
    with logp alone, see `skipped`.
    """

    logp: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    lse_square: Tensor | None = None
    skip_below: float = 0.0

    def skipped(self, logp_C: Tensor, temperature: float | Tensor, chunk: slice) -> Tensor | None:
        """(C,): the norm that the gradient of a row of the chunk is known to be below, where that
        is under skip_below, so that the row is left out; -1 elsewhere. None: nothing is asked for.

        d loss / d z_v = a (1[v = target] - p_v). Of that vector the target's entry is a (1 - p),
        and the others, of one sign, add up to as much: its norm is at most sqrt(2) |a| (1 - p).
        """
        if not self.skip_below:
            return None
        divisor = temperature[chunk] if isinstance(temperature, Tensor) else temperature
        # expm1 keeps the digits of 1 - p. A NaN is not below anything: it stays, and shows.
        bound_C = -math.sqrt(2.0) * self.logp[chunk].abs() * torch.expm1(logp_C) / divisor
        return torch.where(bound_C < self.skip_below, bound_C, -1.0)

    def by_logits(self, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
        """(K, 3) of logp, lse and entropy, 0 for None, divided by the temperature: what reaches a
        row's logits."""
        zero_K = torch.zeros_like(self.logp, dtype=dtype)
        columns = (self.logp, self.lse, self.entropy)
        columns_K3 = torch.stack([zero_K if x is None else x.to(dtype) for x in columns], dim=1)
        divisor = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
        return columns_K3 / divisor

    def smoothed(self, temperature: float | Tensor, dtype: torch.dtype) -> Tensor | None:
        """(K, 2) of mean_logit and lse_square, as `by_logits`; None where both are."""
        # `Smoothing.upstream` gives both or neither: one alone would be dropped here.
        assert (self.mean_logit is None) == (self.lse_square is None)
        if self.mean_logit is None or self.lse_square is None:
            return None
        columns_K2 = torch.stack([self.mean_logit, self.lse_square], dim=1).to(dtype)
        return columns_K2 / (
            temperature[:, None] if isinstance(temperature, Tensor) else temperature
        )


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """Where a pass puts its gradients; None: not wanted, and costs nothing.

    Rows of `hidden` are overwritten. `weight` and `bias` (float32, float64 for float64 inputs) are
    added to; a `fresh` weight has no numbers yet, and is written first. Zeros would cost a CPU 15 %
    of a pass over few rows.
    """

    hidden: Tensor | None = None  # (T, D)
    weight: Tensor | None = None  # (V, D)
    bias: Tensor | None = None  # (V,)
    fresh: bool = False

    def cleared(self) -> "Sinks":
        """Itself, with zeros where no numbers are yet: for a pass that only adds."""
        if self.fresh and self.weight is not None:
            self.weight.zero_()
        return replace(self, fresh=False)

    def part(self, classes: slice) -> "Sinks":
        """The sinks of these classes alone."""
        weight_VD, bias_V = (None if x is None else x[classes] for x in (self.weight, self.bias))
        return replace(self, weight=weight_VD, bias=bias_V)


NO_SINKS = Sinks()


class Smoothing(NamedTuple):
    """What the weighted loss adds up of a row, coefficient aside:

    (1 - label) logp + label mean_v log p_v - z lse^2         mean_v log p_v = mean_v z_v - lse
    """

    label: float = 0.0
    z: float = 0.0

    @property
    def on(self) -> bool:
        return self != Smoothing()

    def upstream(self, coef_K: Tensor) -> Upstream:
        """The gradient of sum_k coef_k times that."""
        if not self.on:
            return Upstream(logp=coef_K)
        smooth_K = self.label * coef_K
        return Upstream(
            logp=coef_K - smooth_K, lse=-smooth_K, mean_logit=smooth_K, lse_square=-self.z * coef_K
        )

    def of(self, values: "Values") -> Tensor:
        """(K,): that."""
        if not self.on or values.mean_logit is None:
            return values.logp
        row_K = values.logp
        # A term with the factor 0 is left out: times -inf, or times an lse^2 beyond float32, it
        # would be NaN. So would the difference of two terms where both are -inf.
        if self.label:
            smooth_K = values.mean_logit - values.lse
            rest = 1.0 - self.label
            row_K = self.label * smooth_K + (rest * row_K if rest else 0.0)
        if self.z:
            row_K = row_K - self.z * values.lse.square()
        return row_K


class Values(NamedTuple):
    """What a pass knows of each row, (K,) float32, float64 for float64 inputs."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None  # None unless the call asked for it
    # The statistics, without gradients; None unless the call asked for them.
    top1: Tensor | None = None  # bool: the target is the first of the largest logits
    mean_logit: Tensor | None = None  # mean_v z_v
    log_sum_p2: Tensor | None = None  # log sum_v p_v^2
    skipped: Tensor | None = None  # as of `Upstream.skipped`; None without skip_below


class Inputs(NamedTuple):
    """The tensors of a call; temperature_T is None for a float, rows None for all."""

    hidden_TD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    targets_T: Tensor  # int32 or int64
    temperature_T: Tensor | None
    rows: Tensor | None  # (R,) int64


def needs_of(inputs: Inputs, dweight_out: Tensor | None = None) -> Needs:
    """Asked outside an autograd function: inside one grad mode is off and requires_grad is lost."""
    grad, bias_V = torch.is_grad_enabled(), inputs.bias_V
    return Needs(
        hidden=grad and inputs.hidden_TD.requires_grad,
        weight=grad and (inputs.weight_VD.requires_grad or dweight_out is not None),
        bias=grad and bias_V is not None and bias_V.requires_grad,
    )


INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? temperatures, Tensor? rows"
)


class Settings(NamedTuple):
    """The options of a call that are no tensors: the last arguments of every op, in this order.

    The last three follow from the tensors. operands: what hidden and weight are cast to, once per
    pass; autocast's dtype, or their own. group, classes: the `Shards` of a head that is cut.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100
    backend: str = "auto"
    chunk_bytes: int | None = None
    batch_invariant: bool = False
    validate: bool = False
    skip_below: float = 0.0
    operands: torch.dtype = torch.float32
    group: str | None = None
    classes: int | None = None

    @property
    def shards(self) -> Shards | None:
        if self.group is None or self.classes is None:
            return None
        return Shards(self.group, self.classes)

    def head(self, weight_VD: Tensor, bias_V: Tensor | None, temperature: float | Tensor) -> Head:
        return Head(
            weight=weight_VD,
            bias=bias_V,
            temperature=temperature,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            shards=self.shards,
        )


_SCHEMA_TYPES = {float: "float", int: "int", str: "str", bool: "bool", torch.dtype: "ScalarType"}


def _schema_type(hint: object) -> str:
    """float | None is the schema's `float?`."""
    if isinstance(hint, types.UnionType):
        return _SCHEMA_TYPES[hint.__args__[0]] + "?"
    return _SCHEMA_TYPES[hint]  # pyright: ignore[reportArgumentType]


def schema_of(record: type, prefix: str = "") -> str:
    """The schema of a record of numbers: "float temperature, float? softcap, ..."."""
    hints = get_type_hints(record).items()
    return ", ".join(f"{_schema_type(hint)} {prefix}{name}" for name, hint in hints)


SETTINGS = schema_of(Settings)


class Bounds(NamedTuple):
    """What a number of `Settings` may be; beyond low and high float32 has 0 or inf."""

    expected: str  # in words
    low: float
    high: float
    whole: bool = False


FLOAT32 = torch.finfo(torch.float32)
INT64 = (1 << 63) - 1
NUMBERS = {
    "temperature": Bounds("a positive number or (T,)", FLOAT32.tiny, FLOAT32.max),
    "softcap": Bounds("a positive number or None", FLOAT32.tiny, FLOAT32.max),
    "logit_scale": Bounds("a finite number", -FLOAT32.max, FLOAT32.max),
    "ignore_index": Bounds("an int", -INT64 - 1, INT64, whole=True),
    "chunk_bytes": Bounds("a positive int or None", 1, INT64, whole=True),
    "skip_below": Bounds("a finite number >= 0", 0.0, FLOAT32.max),
}
"""The numbers of `Settings`; None passes where it is the default."""

"""Batches of sequences: hidden states (B, T, D) as the rows of a call, and its results as (B, T).

B sequences, T places in each, N = B T rows. With `shift` all that belongs to a token, given or
returned, stands in the token's own column; place t - 1 predicts it. So column 0 takes no part:

    tokens           a  b  c        targets of the places    b  c  ignored
    logp returned    0  log p(b | a)  log p(c | a b)
"""

from typing import Any, NamedTuple

import torch

from vpgea_fast.kernels import checks
from vpgea_fast.kernels.contract import NUMBERS

Tensor = torch.Tensor


class Batch(NamedTuple):
    """How the rows of a call lie: shape (B, T); None for (T, D), which passes as it is."""

    shape: tuple[int, ...] | None
    shift: bool

    def hidden(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (N, D), a view where it is dense: the targets move, the states do not."""
        return hidden if self.shape is None else hidden.flatten(0, 1)

    def targets(self, targets: Tensor, ignore_index: int) -> Tensor:
        """(B, T) -> (N,): of each place the token to predict, ignore_index for none."""
        if self.shift:
            checks.check_number("ignore_index", ignore_index, NUMBERS["ignore_index"])
            if isinstance(targets, Tensor) and targets.dtype is torch.int32:
                targets = targets.long()  # ignore_index may be outside int32
        return self.rows("targets_T", targets, ignore_index)

    def rows(self, name: str, x: Any, fill: float) -> Any:
        """(B, T) -> (N,) by place, `fill` where a place predicts nothing.

        What is no tensor passes, for the checks that follow. ValueError: another shape.
        """
        if self.shape is None or not isinstance(x, Tensor):
            return x
        checks.check_plain(name, x)  # before a roll, which has words of its own for it
        if tuple(x.shape) != self.shape:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected {tuple(self.shape)}, one for each "
                "place of hidden_TD (B, T, D); or flatten all of them, hidden.reshape(-1, D)"
            )
        if self.shift:
            # A copy of (B, T) numbers, where hidden[:, :-1] would copy every state.
            x = x.roll(-1, dims=1)
            x[:, -1:] = fill
        return x.reshape(-1)

    def indices(self, rows: Any) -> Any:
        """Indices b T + t of tokens -> those of the places that predict them, (R,)."""
        if not self.shift or not isinstance(rows, Tensor) or rows.dtype is not torch.int64:
            return rows
        assert self.shape is not None
        places = self.shape[0] * self.shape[1]
        # Token 0 gets the one place left: the last of all, which predicts nothing either. What is
        # out of range stays so, for the check of values that follows.
        return torch.where(rows == 0, places - 1, rows - (rows < places).long())

    def options(self, options: Any) -> Any:
        """The options of a head, with temperatures and `rows` by place."""
        if self.shape is None:
            return options
        moved = {
            "temperature": self.rows("temperature", options.get("temperature"), 1.0),
            "rows": self.indices(options.get("rows")),
        }
        return {**options, **{name: x for name, x in moved.items() if name in options}}

    def back(self, values: Any) -> Any:
        """(N,) -> (B, T). The last place predicts nothing: its 0 becomes that of column 0."""
        if self.shape is None or values is None:
            return values
        values = values.view(self.shape)  # dense, as every pass makes them
        return values.roll(1, dims=1) if self.shift else values


def batch_of(hidden: Any, shift: Any) -> Batch:
    """The layout of a call. ValueError: shift without sequences."""
    checks.check_flag("shift", shift)  # first: a tensor would be read as one, and awaited on CUDA
    # Nested, sparse and distributed tensors are refused in words by the checks that follow.
    plain = isinstance(hidden, Tensor) and not hasattr(hidden, "device_mesh")
    if not plain or hidden.layout is not torch.strided:
        return Batch(None, shift=False)
    if hidden.dim() == 3:
        return Batch(tuple(hidden.shape[:2]), shift)
    if shift:
        raise ValueError(
            f"shift: got True with hidden_TD {tuple(hidden.shape)}, expected (B, T, D): packed "
            "rows hold more than one document, so shift their targets yourself; one sequence is "
            "hidden[None]"
        )
    return Batch(None, shift=False)

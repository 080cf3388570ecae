"""Packed sequences of two streams: which token belongs to whom, and what a loss adds up per path.

T, U tokens of the posterior and the prior stream, S sequences, P of them in the prior stream. Both
functions look at values, so they are opaque to torch.compile, as the head is:

    vpgea_fast::stream_layout      sequence of each token, of both streams, and the prior's targets
    vpgea_fast::path_sums          logq_S, logp_S, pg_loss, distill_loss
"""

import math
from typing import Any, NamedTuple

import torch

from vpgea_fast.kernels import backends
from vpgea_fast.kernels.autograd_state import without_values
from vpgea_fast.kernels.head import wide
from vpgea_fast.kernels.ops import register
from vpgea_fast.kernels.selection import check

Tensor = torch.Tensor


class Streams(NamedTuple):
    """The packed sequences of a call; the arguments of vpgea_fast::stream_layout, in this order."""

    cu_seqlens: Tensor  # (S + 1,)
    targets_T: Tensor
    coef_prior_S: Tensor  # 0 where the prior stream need not hold the sequence
    prior_index: Tensor | None  # (P,)
    denominator: Tensor | None  # 0-dim
    prior_tokens: int  # U
    validate: bool


class Layout(NamedTuple):
    """Sequence of each token, (T,) and (U,), and the prior's targets (U,).

    Two sequences of 2 and 1 tokens, the second alone in the prior stream: sequence_T = [0, 0, 1],
    sequence_U = [1], targets_U = targets_T[2:].
    """

    sequence_T: Tensor
    sequence_U: Tensor
    targets_U: Tensor


class PathTerms(NamedTuple):
    """What path sums are made of; the arguments of vpgea_fast::path_sums, in this order."""

    logq_T: Tensor
    logp_U: Tensor
    sequence_T: Tensor  # int64, as sequence_U
    sequence_U: Tensor
    cu_seqlens: Tensor  # (S + 1,)
    advantage_S: Tensor
    weight_S: Tensor
    gate_S: Tensor  # bool
    prior_index: Tensor | None  # (P,)


class PathSums(NamedTuple):
    """pg_loss = -sum w A logq and distill_loss = sum w gate (logq - logp), 0-dim."""

    logq_S: Tensor
    logp_S: Tensor
    pg_loss: Tensor
    distill_loss: Tensor


def layout_of(streams: Streams) -> Layout:
    """Finds every token's sequence. ValueError for wrong values (on CUDA see selection.check)."""
    if not without_values(streams.targets_T):
        return _layout(streams)
    layout = Layout(*torch.ops.vpgea_fast.stream_layout(*streams))
    # An op may not return one tensor twice: without prior_index it gives nothing for the prior.
    return layout if streams.prior_index is not None else _same(layout.sequence_T, streams)


def path_sums(terms: PathTerms) -> PathSums:
    """Adds the tokens of each sequence, and the sequences, in `wide`."""
    if not without_values(terms.logq_T):
        return _path_sums(terms)
    return PathSums(*torch.ops.vpgea_fast.path_sums(*terms))


def _same(sequence_T: Tensor, streams: Streams) -> Layout:
    return Layout(sequence_T, sequence_T, streams.targets_T)


def _layout(streams: Streams) -> Layout:
    cu_seqlens, targets_T, validate = streams.cu_seqlens, streams.targets_T, streams.validate
    tokens, lengths_S = targets_T.shape[0], cu_seqlens.diff()
    check(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (lengths_S >= 0).all(),
        f"cu_seqlens must start at 0, never fall, and end at the {tokens} tokens of targets_T",
        validate,
    )
    if streams.denominator is not None:
        fine = (streams.denominator > 0) & (streams.denominator < math.inf)
        check(fine, "denominator: must be positive and finite", validate)
    sequence_T = _sequence_of_token(cu_seqlens, tokens)
    # The prior stream then holds the same tokens: one map serves both.
    if streams.prior_index is None:
        return _same(sequence_T, streams)
    _check_held(streams, lengths_S)
    lengths_P = lengths_S[streams.prior_index]
    # The boundaries of the prior stream, in cu_seqlens' dtype: searchsorted wants one for both.
    cu_P = torch.cat((cu_seqlens.new_zeros(1), lengths_P.cumsum(0).to(cu_seqlens.dtype)))
    slot_U = _sequence_of_token(cu_P, streams.prior_tokens)
    offset_U = torch.arange(streams.prior_tokens, device=cu_seqlens.device) - cu_P[slot_U]
    sequence_U = streams.prior_index[slot_U]
    return Layout(sequence_T, sequence_U, targets_T[cu_seqlens[sequence_U] + offset_U])


def _check_held(streams: Streams, lengths_S: Tensor) -> None:
    """Checks that the prior stream holds every gated sequence, once, and nothing else."""
    prior_index, validate = streams.prior_index, streams.validate
    assert prior_index is not None
    sequences = lengths_S.shape[0]
    inside = ((prior_index >= 0) & (prior_index < sequences)).all()
    check(inside, f"prior_index must lie in [0, {sequences})", validate)
    held_S = torch.zeros_like(lengths_S).index_add_(
        0, prior_index, torch.ones_like(prior_index).to(lengths_S.dtype)
    )
    check((held_S <= 1).all(), "prior_index names a sequence twice", validate)
    check(
        ((held_S == 1) | (streams.coef_prior_S == 0) | (lengths_S == 0)).all(),
        "prior_index leaves out a sequence with a positive advantage: the prior stream must hold "
        "every gated sequence",
        validate,
    )
    check(
        lengths_S[prior_index].sum() == streams.prior_tokens,
        f"hidden_prior_UD has {streams.prior_tokens} rows, which is not the number of tokens of "
        "the sequences in prior_index",
        validate,
    )


def _sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) int64: which sequence a packed token belongs to."""
    position_T = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position_T, right=True)


def _path_sums(terms: PathTerms) -> PathSums:
    """On CUDA with Triton by group_advantage.py: two launches for about thirty, and one order of
    every sum, where index_add has atomics.
    """
    logq_T, weight_S, gate_S = terms.logq_T, terms.weight_S, terms.gate_S
    if (logq_T.is_cuda or backends.interpreted()) and backends.triton_missing() is None:
        # Imported when it is asked for: the losses need torch only.
        from vpgea_fast.kernels.group_advantage import gated_kl

        sums = gated_kl(
            logq_T,
            terms.logp_U,
            cu_seqlens=terms.cu_seqlens,
            advantage_S=terms.advantage_S,
            weight_S=weight_S,
            prior_index=terms.prior_index,
            gate_S=gate_S,
        )
        return PathSums(sums.logq_S, sums.logp_S, sums.pg_loss, sums.distill_loss)
    zero_S = torch.zeros(gate_S.shape, dtype=wide(logq_T.device), device=logq_T.device)
    logq_S = zero_S.index_add(0, terms.sequence_T, logq_T.to(zero_S.dtype))
    logp_S = zero_S.index_add(0, terms.sequence_U, terms.logp_U.to(zero_S.dtype))
    pg_loss = -(weight_S * terms.advantage_S * logq_S).sum()
    distill_loss = (weight_S * gate_S * (logq_S - logp_S)).sum()
    return PathSums(*(x.to(logq_T.dtype) for x in (logq_S, logp_S, pg_loss, distill_loss)))


@torch.no_grad()
def _stream_layout_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    """An op may not return one tensor twice, nor an argument: without prior_index, nothing."""
    streams = Streams(*arguments)
    sequence_T, *prior = _layout(streams)
    held = streams.prior_index is not None
    return sequence_T, *(x if held else x.new_empty(0) for x in prior)


def _stream_layout_fake(*arguments: Any) -> tuple[Tensor, ...]:
    streams = Streams(*arguments)
    prior_tokens = 0 if streams.prior_index is None else streams.prior_tokens
    sequence_T = streams.targets_T.new_empty(streams.targets_T.shape, dtype=torch.int64)
    sequence_U = sequence_T.new_empty(prior_tokens)
    return sequence_T, sequence_U, streams.targets_T.new_empty(prior_tokens)


@torch.no_grad()
def _path_sums_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    """The launches write their sums side by side, an op's outputs share no memory."""
    return tuple(x.clone() for x in _path_sums(PathTerms(*arguments)))


def _path_sums_fake(*arguments: Any) -> tuple[Tensor, ...]:
    terms = PathTerms(*arguments)
    shapes = terms.advantage_S.shape, terms.advantage_S.shape, (), ()
    return tuple(terms.logq_T.new_empty(shape) for shape in shapes)


register(
    "stream_layout",
    "(Tensor cu_seqlens, Tensor targets, Tensor coef_prior, Tensor? prior_index, "
    "Tensor? denominator, SymInt prior_tokens, bool validate) -> (Tensor, Tensor, Tensor)",
    _stream_layout_kernel,
    _stream_layout_fake,
)
register(
    "path_sums",
    "(Tensor logq, Tensor logp, Tensor sequence_post, Tensor sequence_prior, Tensor cu_seqlens, "
    "Tensor advantage, Tensor weight, Tensor gate, Tensor? prior_index) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _path_sums_kernel,
    _path_sums_fake,
)

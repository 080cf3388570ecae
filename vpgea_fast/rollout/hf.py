"""The transformers engine: plain batched decoding with any causal language model module.

The trainer hands its own module, so weights are shared and `load_weights` has nothing to copy.

    requests -> waves of max_batch rows -> each distinct prompt prefilled once, its KV expanded to
    the requests that share it -> a forward a token -> draw -> finished rows leave batch and cache

Shapes: R rows of the wave, P distinct prompts, W prompt width (left-padded), L token limit,
S = W + L positions, K kept rows, V vocabulary.

Precision   logits: the model's dtype   log-probs: float32   cumulative sum of the draw: float64
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from vpgea_fast import attention
from vpgea_fast.rollout.engine import (
    Drawn,
    EngineBase,
    Sampling,
    not_finite,
)
from vpgea_fast.rollout.forward import Forward, growing_cache
from vpgea_fast.rollout.packed import packed
from vpgea_fast.rollout.refresh import WeightSet, exhausting
from vpgea_fast.types import Finish, SampleRequest

COMPACT_BELOW = 0.8
"""Finished rows leave when at most this share of the batch still runs. Tiny model, 192 paths of 54
tokens, one CPU core, thousand tokens/s: never 23, 0.6 32, 0.8 31, 0.9 29, at once 23."""


BLOCK = 4096
"""Classes that a draw sums at once. 32 rows of 32,768 classes on two CPU cores take 3 ms, and
15 with one running sum, in new memory."""


PACK_FROM = 16
"""Tokens of a path from which on large weights are packed, which takes as long as three of them."""


class HFEngine(EngineBase):
    """Rollout engine over `model`, a transformers causal LM, where it lies.

    dtype        of the forward, by autocast over float32 weights, as a host's own forward; None:
                 the weights' own
    max_batch    rows decoded side by side; the KV cache of that many paths must fit
    check_every  decode steps between two looks at what has finished. Every look is a sync point,
                 which on a CPU costs its operations alone: by default 4 there and 16 elsewhere. It
                 changes no path.
    complete     the model has its weights already; else it waits for `load_weights`
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int,
        dtype: torch.dtype | None = None,
        check_every: int | None = None,
        complete: bool = True,
    ) -> None:
        if max_batch < 1 or (check_every is not None and check_every < 1):
            raise ValueError(
                f"max_batch, check_every: got {max_batch}, {check_every}; give at least 1"
            )
        super().__init__(*attention.positions(model.config), complete=complete)
        self.model: Any = model
        self.max_batch = self.wave = max_batch
        # Autocast knows the two half precisions only; float32 needs none.
        self.autocast_dtype = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self.check_every = check_every or (4 if model.device.type == "cpu" else 16)
        self._forward = Forward(model)

    # Of a generator: while it computes, and not while the caller does.
    @torch.no_grad()
    def _draw(
        self, requests: Sequence[SampleRequest], sampling: Sampling
    ) -> Generator[Sequence[Drawn], None, None]:
        """Decode waves of max_batch rows, one after the other."""
        autocast = torch.autocast(
            self.model.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        )
        # All hold between yields too: `on_progress` of the caller runs under them.
        with _eval_mode(self.model), autocast, self._packed(sampling):
            for start in range(0, len(requests), self.max_batch):
                wave = requests[start : start + self.max_batch]
                for ended in self._decode(wave, sampling):
                    yield [drawn._replace(place=start + drawn.place) for drawn in ended]

    def _packed(self, sampling: Sampling) -> AbstractContextManager[None]:
        """Large weights packed, where so many tokens are drawn that it pays."""
        return packed(self.model) if sampling.limit >= PACK_FROM else nullcontext()

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine. Tensors that already are the model's own storage are not copied;
        others are cast to the parameter's dtype."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        weights, self.complete = WeightSet.of(self.model), False
        filled: set[str] = set()
        with exhausting(named) as rest:
            for name, tensor in weights.fitting(rest):
                # A second value of a tied weight would overwrite the first without a word.
                if name in filled:
                    if not torch.equal(own[name], tensor.to(own[name])):
                        weights.misfits.append(f"two values of {name}, but the model ties them")
                elif tensor.data_ptr() != own[name].data_ptr():
                    own[name].copy_(tensor)
                filled.add(name)
        weights.check()
        self.complete = True

    def sample_with(self, model: Any) -> None:
        """Sample with another module of the same shapes from here on, as it lies: no weight is
        copied, and those of the module before stay what they are."""
        self.model = model

    def rest(self) -> None:
        """Nothing to give back: the cache of a wave lives as long as the wave."""

    def close(self) -> None:
        self.model = None

    def _decode(
        self, requests: Sequence[SampleRequest], sampling: Sampling
    ) -> Iterator[list[Drawn]]:
        """Decode one wave; at every look yield the rows that leave it, mostly none."""
        logits_RV, cache, batch = self._prefill(requests, sampling)
        work = _Work.of(logits_RV)
        for step in range(sampling.limit):
            batch.record(step, *draw(logits_RV, batch.uniform_LR[step], sampling, work), sampling)
            # Every look waits for the device, so on a GPU finished rows draw on between looks. At
            # the last step every row has reached its end_R: nothing runs, and the loop returns.
            if (step + 1) % self.check_every == 0 or step + 1 == sampling.limit:
                batch.check_finite(step + 1, self.check_every, requests)
                batch.look(step + 1, sampling)
                running_R = batch.length_R == 0
                running = int(running_R.sum())
                # Leaving copies the keys and values of all rows that stay.
                if running <= COMPACT_BELOW * len(batch.numbers):
                    yield batch.finished(sampling)
                    if running == 0:
                        return
                    keep_K = running_R.nonzero()[:, 0]
                    batch.select(keep_K)
                    cache.batch_select_indices(keep_K)
                else:
                    yield []  # a place where the caller can stop
            logits_RV = self._forward.next(
                self.model,
                batch.tokens_LR[step][:, None],
                mask_RS=batch.mask_RS[:, : batch.width + step + 1],
                position_R1=(batch.prompt_len_R + step)[:, None],
                cache=cache,
            )

    def _prefill(
        self, requests: Sequence[SampleRequest], sampling: Sampling
    ) -> tuple[torch.Tensor, DynamicCache, _Batch]:
        """Run each distinct prompt once; return the first logits (R, V) and the state of R rows."""
        device = self.model.device
        distinct: dict[tuple[int, ...], int] = {}
        prompt_R = [
            distinct.setdefault(tuple(r.prompt_ids.tolist()), len(distinct)) for r in requests
        ]
        width, limit, rows = max(map(len, distinct)), sampling.limit, len(requests)
        # What a prefix cache would count: of a shared prompt all but the first are cached.
        prompt_tokens = sum(request.prompt_ids.numel() for request in requests)
        self.count(prompt_tokens, prompt_tokens - sum(map(len, distinct)))
        # Padded on the left, so that the last column is the last token of every prompt.
        # Filled on the CPU: on a device each row would be a copy of its own.
        ids_PW = torch.full((len(distinct), width), sampling.pad_id)
        mask_PS = torch.ones(len(distinct), width + limit, dtype=torch.long)
        for prompt, number in distinct.items():
            ids_PW[number, width - len(prompt) :] = torch.tensor(prompt)
            mask_PS[number, : width - len(prompt)] = 0
        ids_PW, mask_PS = ids_PW.to(device), mask_PS.to(device)
        expand_R = torch.tensor(prompt_R, device=device)

        cache = growing_cache(self.model.config)
        mask_PW = mask_PS[:, :width]
        # The first real token stands at position 0, whatever padding is before it; padding, which
        # is masked, takes any position that exists.
        position_PW = (mask_PW.cumsum(-1) - 1).clamp(min=0)
        logits_PV = self._forward(
            self.model, ids_PW, mask_RS=mask_PW, position_RT=position_PW, cache=cache
        )
        # From P prompts to R rows by copying: rows that share a prompt do not share its memory.
        cache.batch_select_indices(expand_R)
        batch = _Batch(
            width=width,
            numbers=list(range(rows)),
            # (L, R), not (R, L): the tokens of one step lie side by side.
            tokens_LR=torch.zeros(limit, rows, dtype=torch.long, device=device),
            logps_LR=torch.zeros(limit, rows, device=device),
            uniform_LR=_uniforms(requests, sampling).to(device),
            mask_RS=mask_PS[expand_R],
            prompt_len_R=mask_PW.sum(-1)[expand_R],
            end_R=torch.full((rows,), sampling.max_new_tokens, device=device),
            closed_R=torch.zeros(rows, dtype=torch.bool, device=device),
            length_R=torch.zeros(rows, dtype=torch.long, device=device),
            stop_ids_K=torch.tensor(sampling.stop_ids, dtype=torch.long, device=device),
        )
        return logits_PV[expand_R], cache, batch


@dataclass
class _Batch:
    """The rows being decoded. A finished row that has not left yet goes on drawing.

    numbers    places of the rows in the wave
    mask_RS    0 at the padding left of a prompt, 1 elsewhere
    end_R      tokens after which a row ends at the latest
    closed_R   a think-close was drawn (`full_answer` or a tag only)
    length_R   0 while a row runs, then its number of tokens
    looked     steps in which a tag was looked for
    """

    width: int
    numbers: list[int]
    tokens_LR: torch.Tensor
    logps_LR: torch.Tensor
    uniform_LR: torch.Tensor
    mask_RS: torch.Tensor
    prompt_len_R: torch.Tensor
    end_R: torch.Tensor
    closed_R: torch.Tensor
    length_R: torch.Tensor
    stop_ids_K: torch.Tensor
    looked: int = 0

    def record(
        self, step: int, token_R: torch.Tensor, logp_R: torch.Tensor, sampling: Sampling
    ) -> None:
        """Write the tokens of this step and note the rows that end with them."""
        # Selects instead of branches: reading one value would wait for the device.
        self.tokens_LR[step] = token_R
        self.logps_LR[step] = logp_R
        if sampling.full_answer:
            first_R = (token_R == sampling.think_close_id) & ~self.closed_R
            self.closed_R |= first_R
            self.end_R = torch.where(first_R, sampling.most(step + 1), self.end_R)
        ends_R = (token_R[:, None] == self.stop_ids_K).any(-1) | (self.end_R == step + 1)
        self.length_R = torch.where(ends_R & (self.length_R == 0), step + 1, self.length_R)

    def look(self, steps: int, sampling: Sampling) -> None:
        """Find the rows whose thought a tag has closed since the last look, and where they end:
        text tells, and no token. They have drawn on, or a limit of open thoughts has ended them."""
        if sampling.tag is None:
            return
        since, self.looked = self.looked, steps
        start = max(0, since - sampling.tag.reach)
        lengths, closed = self.length_R.tolist(), self.closed_R.tolist()
        for row, ids in enumerate(self.tokens_LR[start:steps].T.tolist()):
            # What had ended before waits to leave.
            if closed[row] or 0 < lengths[row] <= since:
                continue
            close = start + sampling.tag.end(ids, since - start)
            ends = [start + i for i, token in enumerate(ids, 1) if token in sampling.eos_ids]
            earlier = min((end for end in ends if end > since), default=steps + 1)
            if close == start or close > sampling.max_new_tokens or earlier < close:
                continue
            limit = sampling.most(close)
            last = min(limit, earlier)
            self.closed_R[row], self.end_R[row] = True, limit
            self.length_R[row] = last if last <= steps else 0

    def check_finite(self, steps: int, last: int, requests: Sequence[SampleRequest]) -> None:
        """Refuse NaN among the log-probs of the `last` steps before `steps`."""
        # R log-probs per step tell what R * V logits hold; one sync for all of them.
        since = max(0, steps - last)
        bad = ~self.logps_LR[since:steps].isfinite()
        if bad.any():
            step, row = bad.nonzero()[0].tolist()
            question = requests[self.numbers[row]].question_id
            raise not_finite(question, since + step)

    def finished(self, sampling: Sampling) -> list[Drawn]:
        """Copy the rows that have ended to the CPU, with their places in the wave."""
        done_K = self.length_R.nonzero()[:, 0]
        steps = int(self.length_R.max())
        tokens_KL = self.tokens_LR[:steps, done_K].T.cpu()
        logps_KL = self.logps_LR[:steps, done_K].T.cpu()
        ended = []
        for k, (row, length) in enumerate(
            zip(done_K.tolist(), self.length_R[done_K].tolist(), strict=True)
        ):
            # Behind its length are tokens that the row drew on while it waited to leave.
            ids, logps = tokens_KL[k, :length], logps_KL[k, :length]
            # Of a thought that a tag has closed `split_path` knows that it stopped.
            finish: Finish = "stop" if int(ids[-1]) in sampling.stop_ids else "length"
            ended.append(Drawn(self.numbers[row], ids, logps, finish))
        return ended

    def select(self, keep_K: torch.Tensor) -> None:
        """Keep these rows alone."""
        self.numbers = [self.numbers[row] for row in keep_K.tolist()]
        for name in ("tokens_LR", "logps_LR", "uniform_LR"):
            setattr(self, name, getattr(self, name)[:, keep_K])
        for name in ("mask_RS", "prompt_len_R", "end_R", "closed_R", "length_R"):
            setattr(self, name, getattr(self, name)[keep_K])


class _Work(NamedTuple):
    """Memory that draws write over: on a CPU new pages for each take longer than what is done in
    them. 16 bytes for each logit; W is V in whole blocks."""

    scaled_RV: torch.Tensor
    logp_RV: torch.Tensor
    mass_RW: torch.Tensor

    @classmethod
    def of(cls, logits_RV: torch.Tensor) -> _Work:
        """For draws of as many rows, or fewer."""
        rows, classes = logits_RV.shape
        width = classes if classes <= BLOCK else classes + -classes % BLOCK
        new, single = logits_RV.new_zeros, torch.float32
        return cls(
            new(rows, classes, dtype=single),
            new(rows, classes, dtype=single),
            new(rows, width, dtype=torch.float64),
        )


def draw(
    logits_RV: torch.Tensor,
    uniform_R: torch.Tensor,
    sampling: Sampling,
    work: _Work | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform_R`.

    uniform_R (R,) float64 in [0, 1). Returns token_R int64 and its log-prob logp_R float32, of the
    softmax before top_p.
    """
    rows = len(logits_RV)
    scaled_RV, logp_RV, mass_RW = (memory[:rows] for memory in work or _Work.of(logits_RV))
    scaled_RV.copy_(logits_RV)
    if sampling.temperature == 0:
        token_R = logits_RV.argmax(-1)
        torch.log_softmax(scaled_RV, -1, out=logp_RV)
    else:
        torch.log_softmax(scaled_RV.div_(sampling.temperature), -1, out=logp_RV)
        # Rounded to multiples of 2^-52, so each partial sum is an integer below 2^53 and exact in
        # float64: it does not depend on the order in which a device adds. Whole numbers times a
        # power of 2 are exact in float32 too.
        mass_RV = torch.exp(logp_RV, out=scaled_RV).mul_(2.0**52).round_()
        if sampling.top_p < 1:
            mass_RV = _nucleus(mass_RV, sampling.top_p)
        mass_RW[:, : mass_RV.shape[1]] = mass_RV
        # Only a row of NaN reaches V: the gather must stay inside until check_finite reports it.
        token_R = _inverse(mass_RW, uniform_R).clamp_(max=logits_RV.shape[-1] - 1)
    return token_R, logp_RV.gather(-1, token_R[:, None])[:, 0]


def _inverse(mass_RW: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """The first place (R,) up to which there is more than `uniform_R` of the row's mass.

    A running sum of every class is most of a draw: summed by blocks, only that of the place needs
    one. The sums are exact, so it is the same place.
    """
    if mass_RW.shape[-1] <= BLOCK:
        sum_RW = mass_RW.cumsum(-1)
        return _first_above(sum_RW, uniform_R * sum_RW[:, -1])
    mass_RBK = mass_RW.unflatten(-1, (-1, BLOCK))
    sum_RB = mass_RBK.sum(-1).cumsum(-1)
    at_R = uniform_R * sum_RB[:, -1]
    block_R = _first_above(sum_RB, at_R)
    mass_RK = mass_RBK[torch.arange(len(block_R), device=block_R.device), block_R]
    before_R = sum_RB.gather(-1, block_R[:, None])[:, 0] - mass_RK.sum(-1)
    # Exact as well: both are multiples of the last bit of at_R.
    return block_R * BLOCK + _first_above(mass_RK.cumsum(-1), at_R - before_R)


def _first_above(sum_RN: torch.Tensor, at_R: torch.Tensor) -> torch.Tensor:
    """The first place (R,) whose sum is above `at_R`; the last one for NaN."""
    # On the right: a token of probability zero has an empty interval, which no uniform hits.
    place_R = torch.searchsorted(sum_RN, at_R[:, None], right=True)[:, 0]
    return place_R.clamp_(max=sum_RN.shape[-1] - 1)


def _nucleus(mass_RV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of likeliest tokens that holds at least top_p; ties by id."""
    sorted_RV, order_RV = mass_RV.double().sort(dim=-1, descending=True, stable=True)
    sum_RV = sorted_RV.cumsum(-1)
    # A token stays while those before it hold less than top_p, so the likeliest always stays.
    beyond_RV = sum_RV - sorted_RV >= top_p * sum_RV[:, -1:]
    return mass_RV.masked_fill(beyond_RV.scatter(-1, order_RV, beyond_RV), 0.0)


def _uniforms(requests: Sequence[SampleRequest], sampling: Sampling) -> torch.Tensor:
    """Draw (L, R) float64: one number per token, from the request's own generator."""
    # On the CPU, because there the stream is the same on every machine and a longer one begins with
    # the shorter. That generator uses the low 32 bits of a seed.
    columns = [
        torch.rand(
            sampling.limit,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(request.seed),
        )
        for request in requests
    ]
    return torch.stack(columns, dim=1)


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off; what was in training mode before is so again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

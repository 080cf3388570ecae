"""Define what a rollout engine is, and what all share: settings, seeds, and where a thought ends.

An engine turns requests (prompt ids and a seed) into paths (token ids and their sampling
log-probs). It never sees text, so nothing is ever re-tokenised. `split_path` is the one place that
decides what of the drawn tokens is thought and what is answer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from vpgea_fast.names import Slot
from vpgea_fast.spans import Tag
from vpgea_fast.types import Finish, Path, SampleRequest, Stream


@dataclass(frozen=True)
class Sampling:
    """Settings of a draw, and of where it stops.

    temperature 0 means greedy. A path ends at the first of: an end-of-sequence token; the first
    think-close token (it is kept), unless `full_answer`; the limits. `max_new_tokens` limits the
    thought, think-close included; `max_answer_tokens` limits what follows it (`full_answer` only).
    With `joint_limit` the first of them limits both together, and the second is not read.
    With a `tag` its text closes a thought, and no token does (`think_close_id` -1). `pad_id` is any
    valid token id; padding is masked, so its choice changes nothing.

    >>> Sampling(max_new_tokens=8, think_close_id=3, eos_ids=(2,)).limit
    8
    """

    max_new_tokens: int
    think_close_id: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    full_answer: bool = False
    max_answer_tokens: int = 1024
    joint_limit: bool = False
    pad_id: int = 0
    tag: Tag | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: got {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}; give a number above 0, at most 1")
        if min(self.max_new_tokens, self.max_answer_tokens) < 1:
            raise ValueError(
                f"max_new_tokens, max_answer_tokens: got {self.max_new_tokens}, "
                f"{self.max_answer_tokens}; both must be at least 1"
            )
        if self.tag is not None and self.think_close_id != -1:
            raise ValueError(
                f"think_close_id: got {self.think_close_id} beside the tag {self.tag.text!r}; "
                "give -1, which is no token"
            )
        if self.think_close_id in self.eos_ids:
            raise ValueError(
                f"think_close_id {self.think_close_id} is also an end-of-sequence token; "
                "an answer could never follow it: take it out of eos_ids"
            )

    @property
    def limit(self) -> int:
        """The most tokens that one path can have, thought and answer."""
        return self.most(self.max_new_tokens)

    def most(self, thought: int) -> int:
        """Count the tokens that a path may have whose thought has closed after `thought`."""
        if not self.full_answer:
            return thought
        return self.max_new_tokens if self.joint_limit else thought + self.max_answer_tokens

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a path wherever they are drawn."""
        # Where a tag ends no engine knows: each draws on until it looks.
        if self.full_answer or self.tag is not None:
            return self.eos_ids
        return (*self.eos_ids, self.think_close_id)

    def closed_at(self, ids: Sequence[int], since: int = 0) -> int:
        """Count the tokens of a thought that has closed, of those drawn; 0: it is open. It is
        known to be open after the first `since`."""
        # A think-close beyond the limit of thoughts closes nothing.
        ids = ids[: self.max_new_tokens]
        if self.tag is not None:
            return self.tag.end(ids, since)
        return ids.index(self.think_close_id, since) + 1 if self.think_close_id in ids else 0


def answer_only(sampling: Sampling, temperature: float) -> Sampling:
    """Sample an answer behind a finished thought: all that is drawn comes back as z."""
    return replace(
        sampling,
        # `limit` without `full_answer` is the limit of thoughts alone: the answer's goes there.
        max_new_tokens=sampling.max_answer_tokens,
        think_close_id=-1,  # an id that no token has: nothing is cut off as a thought
        tag=None,
        temperature=temperature,
        top_p=1.0,
        full_answer=False,
    )


class RolloutError(RuntimeError):
    """Ends a run whose engine cannot go on; the message says why and what to do."""


class Usage(NamedTuple):
    """What an engine has counted since the last look at it."""

    prompt_tokens: int = 0
    """Tokens of all prompts, a shared one once for each request."""
    cached_tokens: int = 0
    """Those among them whose keys and values were not computed again."""
    freed_bytes: int = 0
    """Device memory that the last `rest` gave back."""


class Ended(NamedTuple):
    """A path that has ended, and the place of its request among those that were asked for."""

    place: int
    path: Path


Looks = Generator[Sequence[Ended], None, None]
"""What has ended since the last look, often nothing. Close it (`closing`): until then it draws."""


class RolloutEngine(Protocol):
    """Samples paths, and takes over new weights between steps."""

    @property
    def wave(self) -> int | None:
        """Requests that are decoded as one batch, on which the last bits of their logits depend:
        what `in_waves` puts together draws the same tokens again. None: batches as they come."""
        ...

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Looks:
        """Draw one path per request, as `generate` does, and yield each when it has ended.

        Errors of `check` come at once, not with the first look.
        """
        ...

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Path]:
        """Draw one path per request, in the order of the requests.

        The sampling log-prob of a token is log softmax(logits / temperature), natural log, float32,
        at temperature 1 for greedy decoding. Where top_p < 1 it is that of the full softmax, or NaN
        in an engine that cannot tell it. A path that the engine gives up has finish "error".
        `on_progress` gets the number of newly finished paths, often 0; it may raise.
        Errors as `check`, before anything is drawn; RolloutError for an engine that is lost.
        """
        ...

    def check(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Refuse a prompt that leaves no room for `sampling.limit` tokens: no prompt is cut."""
        ...

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over all weights, one after the other, by the names of the model's own parameters.

        A tensor may be gone when the next one is asked for, and `named` is always exhausted.
        ValueError that lists every missing, unknown or wrongly shaped name; the engine then refuses
        to sample until it has been given a whole set.
        """
        ...

    def rest(self) -> None:
        """Give memory back to the trainer; nothing is sampled until the next `load_weights`."""
        ...

    def usage(self) -> Usage:
        """Return the counts since the last call, and start again at zero."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; it cannot be used afterwards."""
        ...


class Drawn(NamedTuple):
    """A path as an engine drew it, before it is cut into thought and answer."""

    place: int  # of its request, in the order that `_draw` was given
    ids: torch.Tensor  # (n,) int64, CPU
    logps: torch.Tensor  # (n,) float32, CPU
    finish: Finish


class EngineBase:
    """Does what every engine does alike: orders requests, makes paths of drawn tokens, counts.

    room, source   positions that a path may have, and the setting that says so
    complete       the engine has a whole set of weights
    """

    wave: int | None = None
    full_softmax = True
    """False: where top_p < 1 the log-probs of `_draw` are those of the cut distribution."""

    def __init__(self, room: int | None, source: str, *, complete: bool = False) -> None:
        self.room, self.source, self.complete = room, source, complete
        self.totals = Usage()

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Path]:
        """See RolloutEngine."""
        return collected(self.stream(requests, sampling), len(requests), on_progress)

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Looks:
        """See RolloutEngine. Requests are drawn in the order of `in_waves`."""
        # Not in the generator, which starts at the first `next`.
        self.check(requests, sampling)
        if not self.complete:
            raise ValueError("the rollout model has no whole set of weights: load_weights first")
        return self._stream(requests, sampling)

    def _stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Looks:
        order = [place for wave in in_waves(requests, self.wave) for place in wave]
        # Closed at once when the caller leaves: a stopped engine must not go on drawing.
        with closing(self._draw([requests[place] for place in order], sampling)) as looks:
            for ended in looks:
                yield [
                    Ended(order[d.place], self._as_path(requests[order[d.place]], d, sampling))
                    for d in ended
                ]

    def _as_path(self, request: SampleRequest, drawn: Drawn, sampling: Sampling) -> Path:
        logps = drawn.logps
        # NaN, not a number of another distribution: a ratio made of it would be silent.
        if sampling.top_p < 1 and not self.full_softmax:
            logps = torch.full_like(logps, torch.nan)
        return split_path(request, drawn.ids, logps=logps, sampling=sampling, finish=drawn.finish)

    def _draw(
        self, requests: Sequence[SampleRequest], sampling: Sampling
    ) -> Generator[Sequence[Drawn], None, None]:
        """Draw every request; yield what has ended since the last look, often nothing."""
        raise NotImplementedError

    def check(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """See RolloutEngine."""
        check_room(requests, sampling, self.room, self.source)

    def count(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Add to what `usage` tells."""
        self.totals = self.totals._replace(
            prompt_tokens=self.totals.prompt_tokens + prompt_tokens,
            cached_tokens=self.totals.cached_tokens + cached_tokens,
        )

    def usage(self) -> Usage:
        """See RolloutEngine."""
        totals, self.totals = self.totals, Usage()
        return totals


def in_waves(requests: Sequence[SampleRequest], wave: int | None) -> list[list[int]]:
    """The places of the requests, at most `wave` (None: all) drawn together, in the order of
    (prompt length, prompt, seed)."""
    # An order of its own: batches, and with them float32 logits, must not depend on the caller's.
    # By length first: a batch of like lengths has the least padding. Prompts that paths share lie
    # together, so their keys and values are computed once.
    keys = [(len(r.prompt_ids), r.prompt_ids.tolist(), r.seed) for r in requests]
    order = sorted(range(len(requests)), key=keys.__getitem__)
    size = wave or max(1, len(order))
    return [order[start : start + size] for start in range(0, len(order), size)]


def collected(
    looks: Looks, count: int, on_progress: Callable[[int], None] | None = None
) -> list[Path]:
    """Draw a stream of `count` requests to its end; the paths in their order."""
    paths: dict[int, Path] = {}
    # An error of on_progress must not leave the engine drawing.
    with closing(looks):
        for ended in looks:
            paths.update(ended)
            if on_progress is not None:
                on_progress(len(ended))
    return [paths[place] for place in range(count)]


def check_room(
    requests: Sequence[SampleRequest], sampling: Sampling, room: int | None, source: str
) -> None:
    """Refuse an empty prompt, and one that leaves fewer than `sampling.limit` of `room` positions.

    source   the key that gives `room`, for the message
    """
    for request in requests:
        prompt, what = request.prompt_ids.numel(), f"question {request.question_id}"
        # The first token is drawn from the logits of the prompt's last one.
        if prompt == 0:
            raise ValueError(f"{what}: the prompt has no tokens")
        check_positions(what, prompt=prompt, new=sampling.limit, room=room, source=source)


def check_positions(what: str, *, prompt: int, new: int, room: int | None, source: str) -> None:
    """Refuse `prompt` tokens and `new` ones that need more than `room` positions."""
    if room is not None and prompt + new > room:
        # Other sources are facts of a model or of a server that runs: no key here raises them.
        larger = f", or raise {source} to {prompt + new}" if source == "engine.context" else ""
        raise ValueError(
            f"{what}: a prompt of {prompt} tokens and up to {new} new ones need {prompt + new} "
            f"positions, but the model has {room} ({source}); lower rollout.max_new_tokens (in an "
            "evaluation eval.max_new_tokens), drop longer prompts with data.max_prompt_tokens"
            + larger
        )


def not_finite(question_id: str, step: int) -> RolloutError:
    """Make the error for logits that hold NaN or +inf."""
    # Both make the log-prob of the token drawn there NaN, which is how an engine notices; -inf is
    # a token of probability zero.
    return RolloutError(
        f"non-finite logits for question {question_id} at decode step {step}; likely the weights "
        "hold NaN or inf (a diverged update, a damaged checkpoint), or the dtype overflows: check "
        "the last checkpoint, or try model.dtype float32 or bfloat16"
    )


def check_drawn(question_id: str, logps: Sequence[float], start: int = 0) -> None:
    """Refuse a NaN among log-probs, the first of which belongs to decode step `start`."""
    for step, logp in enumerate(logps, start=start):
        if math.isnan(logp):
            raise not_finite(question_id, step)


def request_seed(run_seed: int, step: int, question_id: str, stream: Stream, index: int) -> int:
    """Hash the fields to a seed of 63 bits: a pure function, the same in every process.

    >>> request_seed(0, 0, "q0", "prior", 0) != request_seed(0, 0, "q0", "prior", 1)
    True
    """
    # JSON keeps the fields apart ("q1", 0 is not "q", 10). BLAKE2b, because Python's own hash of a
    # string changes with the process. 63 bits, because engines take a signed 64-bit seed.
    fields = json.dumps([run_seed, step, question_id, stream, index]).encode()
    return int.from_bytes(hashlib.blake2b(fields, digest_size=8).digest(), "big") >> 1


def prompt_digest(ids: torch.Tensor) -> str:
    """Hash the ids of a prompt: a record of a path says with it what the path was drawn from."""
    # 64 bits: against a mix-up of prompts, not against forgery.
    data = json.dumps(ids.tolist()).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def slot_of(question_id: str, stream: Stream, index: int, *, run_seed: int, step: int) -> Slot:
    """Give a path's place its seeds."""
    of = functools.partial(request_seed, run_seed=run_seed, step=step, question_id=question_id)
    # The group's is that of the student's first path, whichever stream asks: one number per
    # question and step.
    seeds = {
        "seed": of(stream=stream, index=index),
        "group_seed": of(stream="prior", index=0),
    }
    return Slot(question_id, stream, index, step, **seeds)


def split_path(
    request: SampleRequest,
    ids: torch.Tensor,
    logps: torch.Tensor,
    sampling: Sampling,
    finish: Finish,
) -> Path:
    """Cut drawn tokens into thought and answer, and to the limits of both.

    ids (n,) int64 and logps (n,) float32 as drawn, the stop token included; CPU. The thought z runs
    up to and including the FIRST think-close token, or the token in which the tag ends; later think
    tokens of either kind are ordinary answer tokens. A thought that is not closed is all of it, an
    end-of-sequence token too: it was drawn, so log q(z) must count it. Such a path has closed=False
    and finish="stop". The answer likewise keeps its end-of-sequence token, because tokens are
    counted as generated.
    An engine with a single limit may draw up to `sampling.limit` tokens for a thought: what is
    beyond a limit is dropped here and finish becomes "length".

    >>> drawn = torch.tensor([7, 3, 8, 3, 2])
    >>> who = {"question_id": "q0", "stream": "prior", "index": 0}
    >>> request = SampleRequest(**who, prompt_ids=torch.tensor([1]), seed=0)
    >>> full = Sampling(max_new_tokens=4, think_close_id=3, eos_ids=(2,), full_answer=True)
    >>> path = split_path(request, drawn, torch.zeros(5), full, "stop")
    >>> path.z_ids.tolist(), path.answer_ids.tolist(), path.closed
    ([7, 3], [8, 3, 2], True)
    """
    closes = sampling.closed_at(ids.tolist())
    closed = closes > 0
    thought = closes or sampling.max_new_tokens
    end = sampling.most(thought) if closed else thought
    # Behind the think-close of a thought alone nothing was asked for: dropping it is no cut.
    cut_by_limit = len(ids) > end and (sampling.full_answer or not closed)
    # A whole thought was all: how what was drawn behind it ended says nothing.
    if closed and not sampling.full_answer and finish == "length":
        finish = "stop"
    return Path(
        question_id=request.question_id,
        stream=request.stream,
        index=request.index,
        # Clones: a slice would keep the storage of all drawn tokens alive.
        z_ids=ids[:thought].clone(),
        logps=logps[:thought].clone(),
        answer_ids=ids[thought:end].clone(),
        answer_logps=logps[thought:end].clone(),
        closed=closed,
        finish="length" if cut_by_limit else finish,
    )

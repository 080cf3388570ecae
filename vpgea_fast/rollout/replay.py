"""Recorded paths in place of drawn ones: an objective works offline, or a run is made again.

    paths.jsonl -> Records: (step, question, stream, index) -> file and byte -> Replay: one line per
    request

A line holds what an engine gives: the token ids of the thought and of the answer behind it, and
their sampling log-probs. Where answers were sampled behind the thought to score it, it has them and
their verdicts, and none is drawn again. It is cut to the limits of `Sampling` as a drawn path is,
so a run that is replayed with its own configuration makes bitwise the same updates. The index has
some hundred bytes per line; the lines stay in their files (recorded.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vpgea_fast.rollout.engine import (
    Ended,
    Looks,
    RolloutEngine,
    Sampling,
    Usage,
    collected,
    prompt_digest,
    split_path,
)
from vpgea_fast.rollout.recorded import Key, Place, RecordError, Records
from vpgea_fast.types import Attempt, Finish, Path, SampleRequest


class Replay:
    """A RolloutEngine that answers the paths of training steps from files, and all else by `live`.

    needs_logps  a line without the sampler's log-probs is refused

    RecordError for a path that is missing or of something else.
    """

    def __init__(
        self,
        live: RolloutEngine,
        records: Records,
        *,
        needs_logps: bool = False,
    ) -> None:
        self.live, self.records, self.needs_logps = live, records, needs_logps

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Path]:
        """See RolloutEngine."""
        return collected(self.stream(requests, sampling), len(requests), on_progress)

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Looks:
        """See RolloutEngine. Either all requests are paths of a step, or none is."""
        # Evaluations, answers that score a path, and probes: nobody records them.
        if any(request.step is None for request in requests):
            return self.live.stream(requests, sampling)
        self.check(requests, sampling)
        return (
            # One at a time: a line is read when its path is taken.
            [Ended(place, self._path(request, sampling))]
            for place, request in enumerate(requests)
        )

    @property
    def wave(self) -> int | None:
        """See RolloutEngine: of what `live` draws."""
        return self.live.wave

    def check(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """See RolloutEngine."""
        self.live.check(requests, sampling)

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine: for what `live` draws."""
        self.live.load_weights(named)

    def rest(self) -> None:
        """See RolloutEngine."""
        self.live.rest()

    def usage(self) -> Usage:
        """See RolloutEngine; a replayed path costs no token."""
        return self.live.usage()

    def close(self) -> None:
        self.live.close()

    def _path(self, request: SampleRequest, sampling: Sampling) -> Path:
        assert request.step is not None
        # A run counts steps from 0, and its records from 1.
        own: Key = (request.step + 1, request.question_id, request.stream, request.index)
        place = self.records.find(own)
        record = self.records.read(place)
        if (record["question_id"], record["stream"]) != own[1:3]:
            raise RecordError(
                f"{place}: got a {record['stream']} path of question {record['question_id']!r}, "
                f"expected {own[2]} of {own[1]!r}; the file has changed since the run began: go on "
                "with --resume and a file that nobody writes"
            )
        self.records.require_prompt(record, place, prompt_digest(request.prompt_ids))
        self.records.require_text(record, place)
        ids, logps = self._tokens(record, place, full_answer=sampling.full_answer)
        finish: Finish = record.get("finish") or _finish(ids.tolist(), sampling)
        path = split_path(request, ids, logps=logps, sampling=sampling, finish=finish)
        # Of another thought, cut by another limit, they would say nothing.
        whole = path.closed and path.z_ids.numel() == len(record["ids"])
        attempts = _attempts(record) if whole else ()
        return replace(path, attempts=attempts, share=record.get("share"))

    def _tokens(
        self, record: Mapping[str, Any], place: Place, *, full_answer: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and log-probs of thought and answer as one, NaN where the line has none."""
        # A run that judges nothing writes `correct` null, and cuts its paths at the thought's end:
        # their answers would count as wrong.
        unanswered = not record.get("answer_ids") and record.get("correct", False) is None
        unanswered = unanswered and record.get("finish") != "error"  # given up, in any run
        if full_answer and ("answer_ids" not in record or unanswered):
            raise RecordError(
                f"{place}: got no answer_ids, expected those of the answer behind the thought; set "
                "rollout.full_answer false, or record them"
            )
        ids, logps = [], []
        for name, of in (("ids", "logps"), ("answer_ids", "answer_logps")):
            own = record.get(name, [])
            # Unknown log-probs become NaN below: a 0 would pass for a certain token.
            known = record.get(of, [None] * len(own))
            if len(known) != len(own) or (self.needs_logps and None in known):
                raise RecordError(
                    f"{place}: got {sum(v is not None for v in known)} numbers as {of}, expected "
                    f"{len(own)}, one per token; record them, or leave rollout.importance_cap null"
                )
            ids += own
            logps += [math.nan if value is None else value for value in known]
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(logps, dtype=torch.float32)


def _finish(ids: Sequence[int], sampling: Sampling) -> Finish:
    """How a path ended whose line does not say it: an open thought was cut, and so was an answer
    that filled its room, unless an end-of-sequence token ends them."""
    # Other programs write the answer without that token, so its absence alone is no cut.
    closes = sampling.closed_at(ids)
    roomy = closes > 0 and len(ids) - closes < sampling.max_answer_tokens
    return "stop" if roomy or (ids and ids[-1] in sampling.eos_ids) else "length"


def _attempts(record: Mapping[str, Any]) -> tuple[Attempt, ...]:
    """The answers sampled behind the thought, in their order; equal ones are one record."""
    texts = zip(record.get("attempt_ids", ()), record.get("attempt_right", ()), strict=True)
    made = [Attempt(ids=torch.tensor(i, dtype=torch.int64), right=right) for i, right in texts]
    return tuple(made[place] for place in record.get("attempts", ()))

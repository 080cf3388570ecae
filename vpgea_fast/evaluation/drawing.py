"""Answers drawn into a folder: what is there stays, what is missing is drawn, each one as it ends.

    parts -> waves of the whole plan -> those that lack an answer, shared by the processes
          -> engine.stream -> judged -> a line of samples.jsonl

A wave that a kill has cut is drawn again whole: the last bits of a batch's logits depend on all of
its rows. So every process count and every kill gives the records of one process that was never
stopped. An engine that makes its own batches (`wave` None) draws the missing answers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vpgea_fast.distributed import World
from vpgea_fast.evaluation.folder import Folder, Outcome, Plan, everywhere
from vpgea_fast.evaluation.records import Key, Mode, Note, Sample
from vpgea_fast.rollout.engine import RolloutEngine, Sampling, in_waves
from vpgea_fast.scoring import answer_text
from vpgea_fast.types import Path, Question, SampleRequest
from vpgea_fast.verify.predictions import prediction

SYNC_S = 30.0
"""Seconds of answers that a power cut may cost within a wave, which can take hours."""
Judge = Callable[[Sequence[Path], Sequence[tuple[str, ...]]], torch.Tensor]
Progress = Callable[..., None]
"""Hears how many answers have newly ended, and (second) a line about all so far."""


@dataclass(frozen=True)
class Part:
    """The answers of one benchmark in one mode, those to one question side by side."""

    benchmark: str
    mode: Mode
    samples: int
    sampling: Sampling
    questions: Sequence[Question]  # of each request
    requests: Sequence[SampleRequest]

    @cached_property
    def keys(self) -> list[Key]:
        return [(self.benchmark, self.mode, r.question_id, r.index) for r in self.requests]

    @property
    def plan(self) -> Plan:
        """Give what makes a record one of this part."""
        asked = zip(self.keys, self.requests, self.questions, strict=True)
        return {key: (request.seed, question.answer) for key, request, question in asked}


class Recorder:
    """Draws parts into `folder`, of which it knows what is there.

    checker   `verify.name`, by whose rules the answer of a text is read
    """

    def __init__(
        self,
        folder: Folder,
        world: World,
        engine: RolloutEngine,
        *,
        judge: Judge,
        decode: Callable[[torch.Tensor], str],
        checker: str,
        note: Note,
    ) -> None:
        self.folder, self.world, self.engine = folder, world, engine
        self.judge, self.note = judge, note
        self.reading: Any = {"decode": decode, "checker": checker}
        self.outcomes: dict[Key, Outcome] = dict(folder.known)
        # Of this process, for all to gather at the end.
        self.own: dict[Key, Outcome] = {}
        # Answers drawn again with another outcome than their record.
        self.moved = 0
        # Running sums, since the line of progress is written at every look.
        self.right = sum(o.correct for o in self.outcomes.values())
        self.tokens = sum(o.tokens for o in self.outcomes.values())

    def draw(
        self, parts: Sequence[Part], progress: Callable[[int], Progress] | None
    ) -> list[list[Outcome]]:
        """Draw what is missing of all parts; return every outcome, in their order. A collective.

        progress   makes, of a number of answers, what hears of them
        """
        waves = self._share(parts)
        missing = sum(part.keys[place] not in self.outcomes for part, w in waves for place in w)
        planned = sum(len(part.keys) for part in parts)
        if self.folder.known:
            self.note(f"goes on behind {len(self.folder.known)} of {planned} answers")
        tell = progress(missing) if progress is not None and missing else None
        for part, wave in waves:
            self._draw(part, wave, tell)
            # A power cut then costs no wave that has ended.
            self.folder.sync()
        if self.moved:
            self.note(
                f"{self.moved} answers drawn again differ from their records, which stay: another "
                "machine or other versions began this evaluation"
            )
        self.outcomes |= everywhere(self.world, self.own)
        return [[self.outcomes[key] for key in part.keys] for part in parts]

    def _share(self, parts: Sequence[Part]) -> list[tuple[Part, list[int]]]:
        """What this process draws: every process computes the same list, and takes its own."""
        waves = [(part, wave) for part in parts for wave in self._lacking(part)]
        if self.engine.wave is not None:
            # Neighbours differ least in length, so every process gets as much.
            return waves[self.world.rank :: self.world.size]
        # It batches as it likes, so single answers are shared and no waves.
        shared = [(part, wave[self.world.share(len(wave))]) for part, wave in waves]
        return [(part, wave) for part, wave in shared if wave]

    def _lacking(self, part: Part) -> Iterator[list[int]]:
        for wave in in_waves(part.requests, self.engine.wave):
            lacks = [place for place in wave if part.keys[place] not in self.outcomes]
            if lacks:
                # All of a wave that lacks one answer: a part of it would have other last bits.
                yield lacks if self.engine.wave is None else wave

    def _draw(self, part: Part, wave: Sequence[int], tell: Progress | None) -> None:
        began = synced = time.monotonic()
        requests = [part.requests[place] for place in wave]
        with closing(self.engine.stream(requests, part.sampling)) as looks:
            for ended in looks:
                now = time.monotonic()
                count = self._keep(part, [(wave[e.place], e.path) for e in ended], now - began)
                if tell is not None:
                    tell(count, self._standing())
                if now - synced > SYNC_S:
                    self.folder.sync()
                    synced = now

    def _keep(self, part: Part, ended: Sequence[tuple[int, Path]], seconds: float) -> int:
        """Judge and append what has no record yet; return how many these were."""
        new = [(place, path) for place, path in ended if part.keys[place] not in self.outcomes]
        for place, path in ended:
            known = self.outcomes.get(part.keys[place])
            # A record stays as it is: others may have read it.
            if known is not None and known[:2] != (path.generated, path.finish):
                self.moved += 1
        if not new:
            return 0
        verdicts = self.judge(
            [path for _, path in new], [part.questions[place].spellings for place, _ in new]
        )
        samples = [
            sample_of(part, place, path, correct=int(verdict), **self.reading)
            for (place, path), verdict in zip(new, verdicts.tolist(), strict=True)
        ]
        self.folder.append((sample, seconds) for sample in samples)
        outcomes = {s.key: Outcome(s.tokens, s.finish, s.correct) for s in samples}
        self.own.update(outcomes)
        self.outcomes.update(outcomes)
        self.right += sum(o.correct for o in outcomes.values())
        self.tokens += sum(o.tokens for o in outcomes.values())
        return len(new)

    def _standing(self) -> str:
        """Accuracy and tokens of all answers so far."""
        count = max(1, len(self.outcomes))
        return f"acc {self.right / count:.1%}  tokens {self.tokens / count:.0f}"


def sample_of(
    part: Part,
    place: int,
    path: Path,
    *,
    correct: int,
    decode: Callable[[torch.Tensor], str],
    checker: str,
) -> Sample:
    """Make the record of the answer at a place of a part."""
    question, request = part.questions[place], part.requests[place]
    # A cut thought has no answer, and no answer may be found inside a thought.
    answer = answer_text(path, decode, part.sampling.tag) if path.closed else ""
    return Sample(
        benchmark=part.benchmark,
        mode=part.mode,
        question_id=question.id,
        index=request.index,
        seed=request.seed,
        ids=tuple(path.response_ids.tolist()),
        text=decode(path.response_ids),
        answer_text=answer,
        prediction=prediction(checker, answer, question.answer) if path.closed else None,
        gold=question.answer,
        tokens=path.generated,
        thought_tokens=path.z_ids.numel(),
        finish=path.finish,
        correct=correct,
        subject=question.subject,
        level=question.level,
    )

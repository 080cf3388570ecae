"""One engine per process: each samples its share of the requests, and all get all paths.

Shares are contiguous, so the paths of a question, which share a prompt, mostly stay together. Only
the drawn tensors travel; the rest of a path is known from its request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import torch
from safetensors.torch import load, save

from vpgea_fast.config import ConfigError
from vpgea_fast.distributed import Stopped, World
from vpgea_fast.rollout.engine import Ended, Looks, RolloutEngine, Sampling, Usage
from vpgea_fast.types import Attempt, Finish, Path, SampleRequest

FINISHES: tuple[Finish, ...] = ("stop", "length", "error")


def check_group(group: int, size: int) -> None:
    """Refuse `size` processes that do not divide into engines of `group` each."""
    if size % group:
        raise ConfigError(
            f"engine.tensor_parallel: got {group}, expected a divisor of the {size} processes; "
            "take the GPUs of a node, or 1"
        )


class ParallelEngine:
    """A RolloutEngine made of one engine per process, or one per `group` processes.

    The processes of a group draw the same paths together (tensor parallel).
    """

    def __init__(self, engine: RolloutEngine, world: World, *, group: int = 1) -> None:
        check_group(group, world.size)
        self.engine, self.world, self.group = engine, world, group
        # No process group behind it: it only says which share of the requests a team draws.
        self.teams = World(world.device, rank=world.rank // group, size=world.size // group)

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Path]:
        """See RolloutEngine. Progress is this process's, scaled to all processes. A collective.

        When `on_progress` raises Stopped in one process, all raise it after their own share.
        """
        self.check(requests, sampling)
        # The last path is reported when all processes are done: this one's 100 % are a guess.
        reported, most = 0, len(requests) - 1

        def advance(count: int) -> None:
            nonlocal reported
            if on_progress is not None:
                step = min(count * self.teams.size, most - reported)
                reported += step
                on_progress(step)

        own = requests[self.teams.share(len(requests))]
        # A member that stops alone would leave the others of its team waiting for it.
        progress = advance if self.group == 1 else None
        # Stopped leaves it empty; even no paths at all save to a header, so b"" means nothing else.
        data = b""
        with self.world.together(), suppress(Stopped):
            data = save(_to_tensors(self.engine.generate(own, sampling, progress)))
        # 12 bytes per token, to every process.
        parts = self.world.gather_bytes(data)
        if not all(parts):
            raise Stopped
        if on_progress is not None and requests:
            with suppress(Stopped):  # alone it must not leave now; the caller asks all
                on_progress(len(requests) - reported)
        # A team's members hold the same paths: one part of each team is read.
        drawn = [path for part in parts[:: self.group] for path in _from_tensors(load(part))]
        return [_path(request, *path) for request, path in zip(requests, drawn, strict=True)]

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Looks:
        """See RolloutEngine. All paths come in one look, at the end. A collective."""
        # A path may be drawn elsewhere: this process learns of it when all are done.
        self.check(requests, sampling)
        return self._stream(requests, sampling)

    def _stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Looks:
        yield [Ended(*pair) for pair in enumerate(self.generate(requests, sampling))]

    @property
    def wave(self) -> int | None:
        """See RolloutEngine: of the share of each process."""
        return self.engine.wave

    def check(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """See RolloutEngine."""
        self.engine.check(requests, sampling)

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine; in every process. A collective."""
        # `named` is a collective, and is exhausted even on failure; so `together` still comes after
        # it in every process.
        with self.world.together():
            self.engine.load_weights(named)

    def rest(self) -> None:
        """See RolloutEngine; in every process."""
        self.engine.rest()

    def usage(self) -> Usage:
        """Sum the tokens of all processes; of the memory, take the least that one got back. A
        collective."""
        # JSON has turned each tuple into a list.
        every = [Usage(*counts) for counts in self.world.gather(self.engine.usage())]
        teams = every[:: self.group]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in teams),
            cached_tokens=sum(usage.cached_tokens for usage in teams),
            freed_bytes=min(usage.freed_bytes for usage in every),
        )

    def close(self) -> None:
        self.engine.close()


PathTensors = tuple[torch.Tensor, ...]
"""z_ids, logps, answer_ids, answer_logps, (closed, place in FINISHES), the share or NaN, and of the
attempts (length, right) and all ids."""


def _to_tensors(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    flags = [[int(path.closed), FINISHES.index(path.finish)] for path in paths]
    # The last two are of recorded paths alone: what an engine draws has no attempts yet.
    attempts = [[attempt.ids.numel() for attempt in path.attempts] for path in paths]
    lengths = [
        [path.z_ids.numel(), path.answer_ids.numel(), len(own), sum(own)]
        for path, own in zip(paths, attempts, strict=True)
    ]
    judged = [[a.ids.numel(), int(a.right)] for path in paths for a in path.attempts]
    shares = [math.nan if path.share is None else path.share for path in paths]
    # torch.cat takes no empty list, and a process may have no path.
    none = torch.zeros(0, dtype=torch.int64)
    return {
        "z": torch.cat([none, *(path.z_ids for path in paths)]),
        "logps": torch.cat([none.float(), *(path.logps for path in paths)]),
        "answers": torch.cat([none, *(path.answer_ids for path in paths)]),
        # By way of the response: they are NaN there where an engine gives none.
        "answer_logps": torch.cat(
            [none.float(), *(path.response_logps[path.z_ids.numel() :] for path in paths)]
        ),
        "flags": torch.tensor(flags, dtype=torch.int64).view(-1, 2),
        "lengths": torch.tensor(lengths, dtype=torch.int64).view(-1, 4),
        "shares": torch.tensor(shares, dtype=torch.float64),
        "attempts": torch.tensor(judged, dtype=torch.int64).view(-1, 2),
        "attempt_ids": torch.cat([none, *(a.ids for path in paths for a in path.attempts)]),
    }


def _from_tensors(tensors: dict[str, torch.Tensor]) -> list[PathTensors]:
    thoughts, answers, attempts, behind = tensors["lengths"].T.tolist()
    return list(
        zip(
            tensors["z"].split(thoughts),
            tensors["logps"].split(thoughts),
            tensors["answers"].split(answers),
            tensors["answer_logps"].split(answers),
            tensors["flags"].unbind(0),
            tensors["shares"].unbind(0),
            tensors["attempts"].split(attempts),
            tensors["attempt_ids"].split(behind),
            strict=True,
        )
    )


def _path(
    request: SampleRequest,
    z_ids: torch.Tensor,
    logps: torch.Tensor,
    answer_ids: torch.Tensor,
    answer_logps: torch.Tensor,
    flags: torch.Tensor,
    share: torch.Tensor,
    attempts: torch.Tensor,
    attempt_ids: torch.Tensor,
) -> Path:
    closed, finish = flags.tolist()
    counts, right = attempts.T.tolist()
    judged = zip(attempt_ids.split(counts), right, strict=True)
    # Clones: a view would keep a whole process's part alive as long as one of its paths.
    return Path(
        question_id=request.question_id,
        stream=request.stream,
        index=request.index,
        z_ids=z_ids.clone(),
        logps=logps.clone(),
        answer_ids=answer_ids.clone(),
        answer_logps=answer_logps.clone(),
        closed=bool(closed),
        finish=FINISHES[finish],
        attempts=tuple(Attempt(ids=ids.clone(), right=bool(yes)) for ids, yes in judged),
        share=None if share.isnan() else share.item(),
    )

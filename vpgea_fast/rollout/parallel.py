"""One engine a process: each samples its share of the requests, all get all paths.

Contiguous shares, so that the paths of a question, which share a prompt, mostly stay together. What
travels are the drawn tensors; the rest of a path is known from its request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import torch
from safetensors.torch import load, save

from vpgea_fast.config import ConfigError
from vpgea_fast.distributed import Stopped, World
from vpgea_fast.rollout.engine import RolloutEngine, Sampling, Usage
from vpgea_fast.types import Finish, Path, SampleRequest

FINISHES: tuple[Finish, ...] = ("stop", "length", "error")


def check_group(group: int, size: int) -> None:
    """ConfigError unless `size` processes make whole engines of `group` each."""
    if size % group:
        raise ConfigError(
            f"engine.tensor_parallel: got {group}, expected a divisor of the {size} processes; "
            "take the GPUs of a node, or 1"
        )


class ParallelEngine:
    """A RolloutEngine over one of each process's own, or over one of each `group` processes, which
    then draw the same paths together (tensor parallel)."""

    def __init__(self, engine: RolloutEngine, world: World, *, group: int = 1) -> None:
        check_group(group, world.size)
        self.engine, self.world, self.group = engine, world, group
        self.teams = World(world.device, rank=world.rank // group, size=world.size // group)

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Path]:
        """See RolloutEngine. Progress is this process's, scaled to all. When `on_progress` raises
        Stopped in one process, all raise it once they have come here. A collective."""
        self.check(requests, sampling)
        shown, most = 0, len(requests) - 1  # the last one when all processes are done

        def advance(count: int) -> None:
            nonlocal shown
            if on_progress is not None:
                step = min(count * self.teams.size, most - shown)
                shown += step
                on_progress(step)

        own = requests[self.teams.share(len(requests))]
        # A member that stops alone would leave the others of its team waiting for it.
        watched = advance if self.group == 1 else None
        data = b""
        with self.world.together(), suppress(Stopped):
            data = save(_to_tensors(self.engine.generate(own, sampling, watched)))
        parts = self.world.gather_bytes(data)
        if not all(parts):
            raise Stopped
        if on_progress is not None and requests:
            with suppress(Stopped):  # alone it must not leave now; the caller asks all
                on_progress(len(requests) - shown)
        drawn = [path for part in parts[:: self.group] for path in _from_tensors(load(part))]
        return [_path(request, *path) for request, path in zip(requests, drawn, strict=True)]

    def check(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """See RolloutEngine."""
        self.engine.check(requests, sampling)

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine; in every process. All take every tensor, so a failure of one can be
        told to all. A collective."""
        with self.world.together():
            self.engine.load_weights(named)

    def rest(self) -> None:
        """See RolloutEngine; in every process."""
        self.engine.rest()

    def usage(self) -> Usage:
        """Tokens of all processes together, the least memory that one of them got back. A
        collective."""
        every = [Usage(*used) for used in self.world.gather(self.engine.usage())]
        teams = every[:: self.group]
        return Usage(
            prompt_tokens=sum(used.prompt_tokens for used in teams),
            cached_tokens=sum(used.cached_tokens for used in teams),
            freed_bytes=min(used.freed_bytes for used in every),
        )

    def close(self) -> None:
        self.engine.close()


Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""z_ids, logps, answer_ids, and (closed, place in FINISHES)."""


def _to_tensors(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    flags = [[int(path.closed), FINISHES.index(path.finish)] for path in paths]
    lengths = [[path.z_ids.numel(), path.answer_ids.numel()] for path in paths]
    none = torch.zeros(0, dtype=torch.int64)
    return {
        "z": torch.cat([none, *(path.z_ids for path in paths)]),
        "logps": torch.cat([none.float(), *(path.logps for path in paths)]),
        "answers": torch.cat([none, *(path.answer_ids for path in paths)]),
        "flags": torch.tensor(flags, dtype=torch.int64).view(-1, 2),
        "lengths": torch.tensor(lengths, dtype=torch.int64).view(-1, 2),
    }


def _from_tensors(tensors: dict[str, torch.Tensor]) -> list[Drawn]:
    thoughts, answers = tensors["lengths"].T.tolist()
    return list(
        zip(
            tensors["z"].split(thoughts),
            tensors["logps"].split(thoughts),
            tensors["answers"].split(answers),
            tensors["flags"].unbind(0),
            strict=True,
        )
    )


def _path(
    request: SampleRequest,
    z_ids: torch.Tensor,
    logps: torch.Tensor,
    answer_ids: torch.Tensor,
    flags: torch.Tensor,
) -> Path:
    closed, finish = flags.tolist()
    return Path(
        question_id=request.question_id,
        stream=request.stream,
        index=request.index,
        z_ids=z_ids.clone(),
        logps=logps.clone(),
        answer_ids=answer_ids.clone(),
        closed=bool(closed),
        finish=FINISHES[finish],
    )

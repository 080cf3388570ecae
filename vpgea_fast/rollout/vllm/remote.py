"""An engine elsewhere, at a `vpgea serve` on other GPUs or nodes.

    each process posts its share of the requests, token ids in and out, as JSON
    weights: the main process writes safetensors that the server reads, or broadcasts them over NCCL

Each hand-over leaves a mark in the server's workers, which is compared before and after every
rollout: so a server that was started again, or given weights by another run, is noticed.
"""

from __future__ import annotations

import os
import queue
import secrets
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from vpgea_fast.config import ConfigError, VllmEngineConfig
from vpgea_fast.distributed import World
from vpgea_fast.rollout.engine import (
    Drawn,
    EngineBase,
    RolloutError,
    Sampling,
    check_drawn,
)
from vpgea_fast.rollout.refresh import WeightSet, exhausting
from vpgea_fast.rollout.vllm.client import Client
from vpgea_fast.rollout.vllm.options import finish_of, sampling_params
from vpgea_fast.rollout.vllm.transfer import (
    SYNC_SECONDS,
    NcclSender,
    check_counts,
    copied,
    describe,
    skeleton,
    weights_directory,
    write_weights,
)
from vpgea_fast.types import SampleRequest

LOOK_SECONDS = 0.2
"""Between two looks at what has ended: a caller that wants to stop waits at most this long."""

Answer = Future[tuple[Drawn, int]]
"""A path, and how many tokens of its prompt the server had in its cache."""


def _ready(ended: queue.SimpleQueue[Answer], seconds: float) -> list[Answer]:
    """Take all answers out of the queue; wait up to `seconds` for the first."""
    answers: list[Answer] = []
    # A queue, because `concurrent.futures.wait` adds and removes a waiter at every open future.
    with suppress(queue.Empty):
        answers.append(ended.get(timeout=seconds))
        while True:
            answers.append(ended.get_nowait())
    return answers


class ServerEngine(EngineBase):
    """Rollout engine over a server at `cfg.server`; see `RolloutEngine`.

    path   the model that is served; only its config.json is read here
    files  directory that the server sees too
    """

    full_softmax = False

    def __init__(
        self,
        path: str,
        *,
        cfg: VllmEngineConfig,
        world: World,
        max_batch: int,
        dtype: torch.dtype,
        files: str | None = None,
    ) -> None:
        assert cfg.server is not None
        self.cfg, self.world, self.dtype, self.files = cfg, world, dtype, files
        self.client = Client(cfg.server)
        model = skeleton(path, trust_remote_code=cfg.trust_remote_code)
        self.weights = WeightSet.of(model)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        try:  # the client has a thread of its own, which must not outlive a refusal
            positions = self._connect(describe(model.config))
        except BaseException:
            self.client.close()
            raise
        super().__init__(positions, "max_model_len of the server")
        self.mark = ""
        # Made at the first hand-over: it joins a group with the server's workers, once.
        self.nccl: NcclSender | None = None
        self.threads = ThreadPoolExecutor(max_workers=max_batch, thread_name_prefix="rollout")

    def _connect(self, here: Mapping[str, Any]) -> int:
        """Return the positions of the server's model; refuse one of another shape than `here`."""
        served = self.client.rpc("describe")[0]
        other = {key: served[key] for key in here if served[key] != here[key]}
        if other:
            there = ", ".join(f"{key} {value}" for key, value in other.items())
            expected = ", ".join(f"{key} {here[key]}" for key in other)
            raise ConfigError(
                f"the server at {self.cfg.server} serves another model than model.path: {there} "
                f"there, {expected} here; start `vpgea serve` with this model"
            )
        return served["positions"]

    def _check_mark(self) -> None:
        """Refuse a server of which any worker holds other weights than this run gave it."""
        if set(self.client.rpc("marked")) != {self.mark}:
            self.complete = False
            raise RolloutError(
                f"the server at {self.cfg.server} holds other weights than this run gave it: it "
                "was started again, or another run uses it; give each run a server of its own and "
                "go on with --resume: the last checkpoint is good"
            )

    def _draw(
        self, requests: Sequence[SampleRequest], sampling: Sampling
    ) -> Generator[Sequence[Drawn], None, None]:
        """See EngineBase. A request that takes longer than `engine.timeout_s` is given up."""
        # Before: no path is drawn from other weights. After: none changed while they were drawn.
        self._check_mark()
        # Other processes of the run ask the same server: names must differ between them.
        run = f"vpgea-{os.getpid()}-{time.monotonic_ns()}"
        waiting: dict[Answer, int] = {}
        ended: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        try:
            # A thread per request that the server may draw at once: each waits for one answer.
            for place, request in enumerate(requests):
                work = self.threads.submit(self._ask, run, place, request, sampling)
                waiting[work] = place
                work.add_done_callback(ended.put)
            while waiting:
                looked: list[Drawn] = []
                for work in _ready(ended, LOOK_SECONDS):
                    request = requests[waiting.pop(work)]
                    drawn, cached = work.result()  # raises what the thread has raised
                    self.count(request.prompt_ids.numel(), cached)
                    looked.append(drawn)
                yield looked
        except BaseException:
            self._abort(run, waiting)
            raise
        self._check_mark()

    def _abort(self, run: str, waiting: Mapping[Answer, int]) -> None:
        """Have the server stop the paths of `waiting`, and let their threads end."""
        # What can be cancelled has not begun; the server knows the others only.
        names = [f"{run}-{place}" for work, place in waiting.items() if not work.cancel()]
        try:
            if names and self.client.healthy():
                with suppress(RolloutError):  # what ended the rollout is what is told
                    self.client.post("/inference/v1/abort_requests", {"request_ids": names}, 60.0)
        finally:
            self.client.hang_up()

    def _ask(
        self, run: str, place: int, request: SampleRequest, sampling: Sampling
    ) -> tuple[Drawn, int]:
        """Draw a path; also tell how many tokens of its prompt the server had in its cache."""
        # A server knows one limit, so it draws up to the sum of both; `split_path` cuts.
        body = {
            "request_id": f"{run}-{place}",
            "token_ids": request.prompt_ids.tolist(),
            "sampling_params": sampling_params(request, sampling, self.vocabulary),
        }
        try:
            answer = self.client.draw(body, self.cfg.timeout_s)
        # This question is given up, not the run. vLLM aborts a path whose caller has hung up.
        except TimeoutError:
            none = torch.zeros(0)
            return Drawn(place, none.long(), none, "error"), 0
        choice = answer["choices"][0]
        ids = torch.tensor(choice["token_ids"] or [], dtype=torch.int64)
        content = (choice["logprobs"] or {}).get("content") or []
        logps = torch.tensor([token["logprob"] for token in content], dtype=torch.float32)
        # A server that was not started by `vpgea serve` may leave log-probs out.
        if ids.numel() != logps.numel():
            raise RolloutError(
                f"the server gave {logps.numel()} log-probs for {ids.numel()} tokens; start it "
                "with `vpgea serve`"
            )
        check_drawn(request.question_id, logps.tolist())
        usage = answer.get("usage") or {}
        # Absent where nothing was cached, and in a server without --enable-prompt-tokens-details.
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Drawn(place, ids, logps, finish_of(choice["finish_reason"])), cached

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine. The main process hands over; all return when the server has them.
        A collective."""
        self.complete = False
        with self.world.together(), exhausting(named) as rest:
            fitting = self.weights.fitting(rest)
            if self.world.main:
                self._hand_over(fitting)
            # The others take part in gathering, and note every name for their own check.
            for _ in fitting:
                pass
        # All processes compare the mark that the main one has left.
        self.mark = self.world.gather(self.mark)[0]
        self.weights.check()
        self.complete = True

    def _hand_over(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Give the server all of `named`, and leave a new mark when it has them."""
        self.mark = secrets.token_hex(8)
        if self.cfg.sync == "nccl":
            self.nccl = self.nccl or NcclSender(self.client, self.client.get("/get_world_size"))
            # `load_files` takes the old mark away itself: half of a hand-over must carry none.
            self.client.rpc("set_mark", "")
            self.nccl.send(copied(named, self.dtype))
        else:
            # Both names: a server on a CPU has untied the head. With a tied one vLLM skips it.
            self._leave_files(self.weights.both_names(copied(named, self.dtype, "cpu")))
        if not self.client.post("/reset_prefix_cache", {}, 60.0)["success"]:
            raise RolloutError(
                "the server kept its prefix cache: something is drawing from it during a sync; "
                "give every run a server of its own"
            )
        self.client.rpc("set_mark", self.mark)

    def _leave_files(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Write the weights, let every worker read them, and remove them again."""
        with weights_directory(self.files) as directory:
            written = write_weights(named, directory)
            where = str(directory.resolve())  # the server's working directory is another
            check_counts(written, self.client.rpc("load_files", where, seconds=SYNC_SECONDS))

    def rest(self) -> None:
        """See RolloutEngine. The server's memory is not the trainer's."""
        self.complete = False

    def close(self) -> None:
        """Hang up. The server goes on: it was not started here."""
        self.complete = False
        self.client.close()

"""The vLLM engine: inside the training process, or in a child of it.

Only functions import vLLM, so the modules of this folder can be imported without it.

    requests, sorted -> one batch of vLLM's scheduler -> tokens every few steps -> a path is cut off
    where its limits say

Sampling   temperature, stop ids and seed of each request are vLLM's; log-probs are `processed`:
           after the temperature, in float32
Weights    names of the transformers model, one after the other into vLLM's own reload. Into a
           child they go by CUDA IPC, on a CPU by safetensors files
Sleep      on CUDA: after a rollout weights and KV cache are dropped; a refresh wakes the weights,
           fills them, and only then wakes the KV cache
Seeds      a path's tokens depend on its seed and its logits; float32 sums depend on the batch it is
           computed in, so another batch may, rarely, draw other tokens
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from vpgea_fast import attention
from vpgea_fast.config import VllmEngineConfig
from vpgea_fast.rollout.engine import (
    Drawn,
    EngineBase,
    RolloutError,
    Sampling,
    check_drawn,
)
from vpgea_fast.rollout.refresh import WeightSet, exhausting
from vpgea_fast.rollout.vllm.lifetime import Guard, ending_with_this_process, interruptible, is_dead
from vpgea_fast.rollout.vllm.options import engine_options, environment, finish_of, sampling_params
from vpgea_fast.rollout.vllm.transfer import (
    CHUNK_BYTES,
    EXTENSION,
    SYNC_SECONDS,
    check_counts,
    copied,
    send_ipc,
    skeleton,
    weights_directory,
    write_weights,
)
from vpgea_fast.rollout.vllm.versions import check_dtype
from vpgea_fast.types import Finish, SampleRequest

LOOK_EVERY = 16
"""Tokens of a path between two looks at it. At most this many are drawn beyond a limit."""

CLOSE_SECONDS = 20.0
"""An engine that takes longer to close is killed. vLLM's own 5 s are less than its processes take
on a busy CPU. A killed one leaves shared memory, of which its resource tracker complains."""


class VllmEngine(EngineBase):
    """Rollout engine over a vLLM in this process or in a child of it; see `RolloutEngine`.

    path       Hugging Face directory or Hub name; only its config.json is read, the weights come
               through `load_weights`
    context    positions that a path may need, prompt included; at most the model's own
    max_batch  paths that are decoded side by side
    files      directory for weights on their way into a child; default the system's place

    A process of its own ends with the thread that made the engine.
    """

    full_softmax = False

    def __init__(
        self,
        path: str,
        *,
        max_batch: int,
        dtype: torch.dtype,
        device: torch.device,
        context: int | None = None,
        cfg: VllmEngineConfig | None = None,
        files: str | None = None,
        seed: int = 0,
    ) -> None:
        check_dtype(dtype)
        self.cfg, self.files = cfg or VllmEngineConfig(), files
        model = skeleton(path, trust_remote_code=self.cfg.trust_remote_code)
        room, source = attention.positions(model.config)
        if context is not None and (room is None or context < room):
            room, source = context, "engine.context"
        super().__init__(room, source)
        self.guard: Guard | None = None
        self.device, self.dtype = device, dtype
        self.asleep, self.alive = False, True
        # On a CPU vLLM 0.32 keeps a packed copy of a tied head, which no reload refreshes.
        self.untied = device.type == "cpu"
        self.weights = WeightSet.of(model)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.shares_group = dist.is_initialized()
        self.llm: Any = self._start(path, max_batch, seed)
        self.rest()  # the first hand-over too finds weights and cache asleep

    def _start(self, path: str, max_batch: int, seed: int) -> Any:
        """Start vLLM with weights that mean nothing; return its `LLM`."""
        cfg, cuda = self.cfg, self.device.type == "cuda"
        options = engine_options(
            cfg,
            path=path,
            dtype=str(self.dtype).removeprefix("torch."),
            max_batch=max_batch,
            context=self.room,
            seed=seed,
            cuda=cuda,
            untied=self.untied,
        )
        # No weight is read from disk, and no text goes in or out.
        options |= {"load_format": "dummy", "skip_tokenizer_init": True}
        options |= {"enable_sleep_mode": True} if cuda else {}
        if cfg.process == "own":
            options["worker_extension_cls"] = EXTENSION
            if cuda:
                options["weight_transfer_config"] = {"backend": "ipc"}
        elif self.shares_group and "RANK" in os.environ:
            # vLLM joins the trainer's processes instead of starting workers of its own.
            options["distributed_executor_backend"] = "external_launcher"
        with (
            environment(cfg.process, self.device),
            interruptible(),
            ending_with_this_process() as started,
        ):
            from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]

            llm = LLM(**options)
        # A child alone can die without this process; inside, what vLLM raises is raised here.
        if cfg.process == "own":
            (engine,) = started
            self.guard = Guard(llm.llm_engine.engine_core, engine)
            self.guard.start()
        return llm

    def _draw(
        self, requests: Sequence[SampleRequest], sampling: Sampling
    ) -> Generator[Sequence[Drawn], None, None]:
        """See EngineBase: one batch of the scheduler, which is left empty by an error too."""
        # Its own engine, used by one thread: the places alone are names enough.
        open_: dict[str, _Drawing] = {}
        try:
            for place, request in enumerate(requests):
                with self._told():
                    self._add(str(place), request, sampling)
                open_[str(place)] = _Drawing(request)
            while open_:
                ended = self._step(open_, sampling)
                yield [open_.pop(name).drawn(int(name), finish) for name, finish in ended.items()]
        # GeneratorExit too, when the caller stops: paths left behind would hold their KV blocks.
        except BaseException:
            self._give_up(open_)
            raise

    def _add(self, name: str, request: SampleRequest, sampling: Sampling) -> None:
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
            SamplingParams,
        )

        self.llm.llm_engine.add_request(
            name,
            TokensPrompt(prompt_token_ids=request.prompt_ids.tolist()),
            SamplingParams(
                **sampling_params(request, sampling, self.vocabulary),
                flat_logprobs=True,  # lists of numbers instead of a dict and an object per token
                output_kind=RequestOutputKind.DELTA,
                stream_interval=LOOK_EVERY,
            ),
        )

    def _step(self, open_: dict[str, _Drawing], sampling: Sampling) -> dict[str, Finish]:
        """Run the scheduler once; return the names and reasons of the paths that have ended."""
        ended: dict[str, Finish] = {}
        cut: list[str] = []
        with self._waiting(self.cfg.timeout_s):
            outputs = self.llm.llm_engine.step()
        for output in outputs:
            drawing, completion = open_[output.request_id], output.outputs[0]
            if not drawing.ids:  # told once, with the first tokens of a path
                asked = drawing.request.prompt_ids.numel()
                self.count(asked, output.num_cached_tokens or 0)
            # `logprobs=0` asks for the drawn token alone: the first entry of each position is its.
            flat = completion.logprobs
            drawing.add(completion.token_ids, [flat.logprobs[i] for i in flat.start_indices])
            if output.finished:
                ended[output.request_id] = finish_of(completion.finish_reason)
            elif drawing.beyond(sampling):
                # vLLM knows one limit only, the sum of both.
                ended[output.request_id] = "length"
                cut.append(output.request_id)
        if self.cfg.tensor_parallel == 1:  # clocks differ, and processes must schedule alike
            late = time.monotonic() - self.cfg.timeout_s
            for name, drawing in open_.items():
                if name not in ended and drawing.began is not None and drawing.began < late:
                    ended[name] = "error"
                    cut.append(name)
        if cut:
            with self._told():
                self.llm.llm_engine.abort_request(cut)
        return ended

    @contextmanager
    def _waiting(self, seconds: float) -> Iterator[None]:
        """Wait for the engine; RolloutError for a dead one. A child is killed after `seconds`."""
        with self._told(), nullcontext() if self.guard is None else self.guard.waiting(seconds):
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """RolloutError for a dead engine: it may die between two calls, and any of them says so.

        Where vLLM clears up behind a dead child in a thread of its own, a call may meet a socket
        that is closed: whatever it raises then, the child's death is the reason.
        """
        try:
            yield
        except Exception as error:
            if is_dead(error) or (self.guard is not None and not self.guard.engine_runs()):
                raise self._gone() from error
            raise

    def _give_up(self, open_: dict[str, _Drawing]) -> None:
        """Take unfinished paths out of the scheduler, if there still is one."""
        if open_ and self.alive:
            # The error on its way says more than that the engine has gone with it.
            with suppress(RolloutError), self._told():
                self.llm.llm_engine.abort_request(list(open_))

    def _gone(self) -> RolloutError:
        """Note that the engine is lost, and make the error that says so."""
        self.complete = self.alive = False
        return RolloutError(
            "the vLLM engine's process is gone (killed, out of memory, or silent for longer than "
            f"engine.timeout_s, {self.cfg.timeout_s:g} s; see the lines above); the last "
            "checkpoint is good: go on with --resume, with a smaller rollout.max_batch, "
            "engine.gpu_memory or engine.kv_cache_gib if memory ran out"
        )

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine. On CUDA this wakes the engine."""
        self.complete = False
        with exhausting(named) as rest, self._waiting(SYNC_SECONDS):
            # The cache wakes last, so it never lies beside the trainer's gathered tensors.
            self._wake("weights")
            self._hand_over(self._as_loaded(rest))
            self._wake("kv_cache")
            # Keys and values of shared prompts are the old weights'.
            clean = self.llm.reset_prefix_cache()
        if not clean:
            raise RolloutError("vLLM kept its prefix cache: a path was being drawn during a sync")
        self.weights.check()
        self.complete = True

    def _as_loaded(
        self, named: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors that outlive the next one, under the names that vLLM's reload expects."""
        # vLLM 0.32 keeps tensors until their layer is whole: one layer's copies at a time.
        copies = copied(self.weights.fitting(named), self.dtype)
        return self.weights.both_names(copies) if self.untied else copies

    def _hand_over(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Give `named` to vLLM: tensor by tensor here, by CUDA IPC or files into a child."""
        if self.cfg.process == "shared":
            options = {"weights_iterator": named, "is_checkpoint_format": True}
            self.llm.collective_rpc("reload_weights", kwargs=options)
        elif self.device.type == "cuda":
            # The staging buffer must hold the largest tensor, as a rule the embedding.
            send_ipc(self.llm, named, max(CHUNK_BYTES, self.weights.largest * self.dtype.itemsize))
        else:
            with weights_directory(self.files) as directory:
                written = write_weights(named, directory)
                counts = self.llm.collective_rpc("load_files", args=(str(directory),))
                check_counts(written, counts)

    def _wake(self, part: str) -> None:
        """Give memory back to "weights", then to "kv_cache", after which the engine is awake."""
        if self.asleep:
            # What the trainer's caching allocator keeps unused is not free for vLLM's allocator.
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=[part])
            self.asleep = part != "kv_cache"

    def rest(self) -> None:
        """See RolloutEngine; on CUDA this drops weights and KV cache."""
        self.complete = False
        if self.device.type == "cuda" and not self.asleep:
            before, _ = torch.cuda.mem_get_info(self.device)
            with self._waiting(SYNC_SECONDS):
                self.llm.sleep(level=2)  # level 1 would copy the weights to host memory
            self.asleep = True
            after, _ = torch.cuda.mem_get_info(self.device)
            # Of the device, so it counts a child's memory too.
            self.totals = self.totals._replace(freed_bytes=after - before)

    def close(self) -> None:
        """See RolloutEngine. Inside a training process its process group stays as it was."""
        llm, self.llm, self.complete = self.llm, None, False
        if llm is None:
            return
        core = llm.llm_engine.engine_core
        if self.cfg.process == "own" or not self.shares_group:
            # Of a dead child the error on its way says more than what its end may raise.
            with nullcontext() if self.alive else suppress(Exception):
                core.shutdown(timeout=CLOSE_SECONDS)
            return
        # vLLM 0.32's own shutdown, which its finalizer calls too, destroys the default process
        # group, which is the trainer's. So its parts are shut down one by one.
        from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

        core._finalizer.detach()
        core.engine_core.model_executor.shutdown()
        core.engine_core.scheduler.shutdown()
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None


@dataclass
class _Drawing:
    """Collects the tokens of a path while they arrive."""

    request: SampleRequest
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    closed: int = 0
    """Tokens of the thought once it has closed."""
    looked: int = 0
    """Tokens among which its end was looked for."""
    began: float | None = None
    """When the first token came: a path that waits in the queue draws nothing."""

    def add(self, ids: Sequence[int], logps: Sequence[float]) -> None:
        if self.began is None:
            self.began = time.monotonic()
        check_drawn(self.request.question_id, logps, start=len(self.ids))
        self.ids += ids
        self.logps += logps

    def beyond(self, sampling: Sampling) -> bool:
        """Tell whether nothing that is drawn from now on can belong to the path."""
        # As `split_path` cuts.
        if not self.closed:
            self.closed = sampling.closed_at(self.ids, self.looked)
            self.looked = min(len(self.ids), sampling.max_new_tokens)
        if not self.closed:
            return len(self.ids) >= sampling.max_new_tokens
        return len(self.ids) >= sampling.most(self.closed)

    def drawn(self, place: int, finish: Finish) -> Drawn:
        ids = torch.tensor(self.ids, dtype=torch.int64)
        return Drawn(place, ids, torch.tensor(self.logps, dtype=torch.float32), finish)

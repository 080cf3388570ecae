"""Move weights into an engine elsewhere: both ends of each way.

    safetensors files   any device
    CUDA IPC            a child on the same GPU
    NCCL                a server

About CHUNK_BYTES travel together, so no process ever holds the whole model for a transfer.
"""

from __future__ import annotations

import base64
import itertools
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vpgea_fast.rollout.engine import RolloutError

SYNC_SECONDS = 1800.0
"""An engine that takes longer to take over weights, or to sleep, is lost."""

CHUNK_BYTES = 2**30
"""Of weights that travel together: one file, one staging buffer, one call to a server."""

SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
"""Of a configuration: what two models must share for one to take the other's weights."""


def describe(config: Any) -> dict[str, Any]:
    """Read SHAPE from a transformers configuration."""
    # A multimodal model has these keys one level deeper; a key that a family lacks counts as None.
    text = config.get_text_config()
    return {key: getattr(text, key, None) for key in SHAPE}


class WorkerExtension:
    """Adds methods to the worker of an engine that runs in a process of its own."""

    model_runner: Any
    mark = ""

    def describe(self) -> dict[str, Any]:
        """Describe the served model, and the positions that a path may have."""
        model = self.model_runner.model_config
        return {**describe(model.hf_config), "positions": model.max_model_len}

    def set_mark(self, mark: str) -> None:
        """Note which hand-over the weights are of."""
        self.mark = mark

    def marked(self) -> str:
        return self.mark

    def load_files(self, directory: str) -> int:
        """Take over the weights that `write_weights` left; return how many vLLM asked for."""
        # Half of a hand-over must carry no mark. `zip` reads a weight before it counts it, so at
        # the end the counter stands at the number of weights.
        self.mark, counter = "", itertools.count()
        read = _read_weights(FilePath(directory))
        named = (weight for weight, _ in zip(read, counter, strict=False))
        self.model_runner.reload_weights(weights_iterator=named, is_checkpoint_format=True)
        return next(counter)


EXTENSION = f"{WorkerExtension.__module__}.{WorkerExtension.__name__}"
"""Its name, by which vLLM imports it."""


def copied(
    named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, device: str | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Copy each tensor, so that it outlives the next one."""
    # The tensors of a sharded model are views of a unit, which is freed when the next is gathered.
    return ((name, tensor.detach().to(device, dtype, copy=True)) for name, tensor in named)


def chunks(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Group tensors to about CHUNK_BYTES; a larger one is the last of its group."""
    part: dict[str, torch.Tensor] = {}
    for name, tensor in named:
        part[name] = tensor.contiguous()  # neither safetensors nor NCCL takes a strided view
        if sum(held.nbytes for held in part.values()) >= CHUNK_BYTES:
            yield part
            part = {}
    if part:
        yield part


@contextmanager
def weights_directory(parent: str | None) -> Iterator[FilePath]:
    """Make a directory for weights below `parent` (default: the system's place), for the block."""
    try:
        if parent is not None:
            FilePath(parent).mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=parent, prefix="weights-")
    except OSError as error:
        raise RolloutError(
            f"engine.sync_dir: cannot write below {parent or tempfile.gettempdir()} ({error}); set "
            "it to a directory that can be written"
        ) from error
    with temporary as directory:
        yield FilePath(directory)


def check_counts(written: int, counts: Sequence[object]) -> None:
    """Refuse a hand-over unless every worker has answered `load_files` with what was written."""
    # As strings, because the route of a server makes strings of numbers.
    if {str(count) for count in counts} != {str(written)}:
        raise RolloutError(
            f"the engine took {', '.join(map(str, counts))} of {written} weights; the last "
            "checkpoint is good: go on with --resume"
        )


def write_weights(named: Iterable[tuple[str, torch.Tensor]], directory: FilePath) -> int:
    """Write a safetensors file for each of `chunks`; return the number of tensors.

    A weight under two names must be two tensors.
    """
    written = 0
    for number, part in enumerate(chunks(named)):
        written += len(part)
        try:
            save_file(part, directory / f"{number:05d}.safetensors")
        except (OSError, SafetensorError) as error:
            raise RolloutError(
                f"engine.sync_dir: cannot write weights to {directory} ({error}); set it to a "
                "directory with room for the model"
            ) from error
    return written


def _read_weights(directory: FilePath) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of all files, one tensor in memory at a time."""
    files = sorted(directory.glob("*.safetensors"))
    # Two hosts may have a directory of the same name: the engine would keep its old weights.
    if not files:
        raise FileNotFoundError(
            f"no weights in {directory}: engine.sync_dir must be a directory that the trainer and "
            "the server share"
        )
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)


def send_ipc(llm: Any, named: Iterable[tuple[str, torch.Tensor]], staged: int) -> None:
    """Send weights to a child on the same GPU, by vLLM's packed IPC transfer.

    They pass through one staging buffer of `staged` bytes, whose handle goes over the pipe between
    the two processes. Not run on a GPU by this project yet.
    """
    # vLLM's own trainer side would gather pickled handles of all processes, other nodes' too. Each
    # engine here has one trainer, so its producer is driven directly.
    from vllm.distributed.weight_transfer.packed_tensor import (  # pyright: ignore[reportMissingImports]
        packed_ipc_producer,
    )

    # By UUID, since the two processes may number their devices differently.
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
    """Sends weights to the workers of a server by vLLM's NCCL transfer, a call for every chunk.

    `client` has vLLM's four calls of a weight transfer. Not run on a GPU by this project yet.
    """

    def __init__(self, client: Any, workers: Mapping[str, int]) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import (  # pyright: ignore[reportMissingImports]
            NCCLLibrary,
        )

        self.client, self.device = client, torch.cuda.current_device()
        self.group: Any = None
        self.size = workers["world_size"] + 1
        # The id goes with the other JSON: vLLM's own meeting, over a store, would pickle it.
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
        """Send all of `named`, whose tensors must outlive the next one; see `copied`."""
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
        # The broadcast runs in another thread, whose current stream need not be the one that the
        # copies are queued on.
        torch.cuda.current_stream().synchronize()
        side_by_side(
            lambda: self.client.update_weights(update), lambda: self._broadcast(part.values())
        )

    def _broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        # The current device is a thread's own; a new one starts at device 0.
        with torch.cuda.device(self.device):
            for tensor in tensors:
                self.group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
            torch.cuda.current_stream().synchronize()


def side_by_side(*parts: Callable[[], object]) -> None:
    """Run all parts at once; raise the first error, whatever the others still wait for.

    >>> import time
    >>> side_by_side(lambda: time.sleep(1e6), lambda: 1 / 0)
    Traceback (most recent call last):
    ZeroDivisionError: division by zero
    """
    # A call to a server that has died ends, but a broadcast to it never does. So no executor, whose
    # exit waits for its threads, and daemons, which do not hold up the end of the process.
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


def skeleton(path: str, *, trust_remote_code: bool) -> Any:
    """Build the transformers model without storage: its parameters' names and shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model

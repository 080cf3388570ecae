"""torch.distributed.checkpoint (DCP): an index that cannot run code, a planner, and the tensors
that a process has of each."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from vpgea_fast.checkpoint.files import CheckpointError
from vpgea_fast.distributed import World

INDEX = ".metadata"
"""Which tensor lies where; DCP names it."""


class Index(pickle.Unpickler):
    """DCP's index, which is a pickle: of DCP's own records, sizes and dtypes, and nothing else. A
    checkpoint may come from someone else, and any other class could run code."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.path = file.name

    known: ClassVar[dict[str, set[str]]] = {
        Metadata.__module__: {
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"} | {name for name, x in vars(torch).items() if isinstance(x, torch.dtype)},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},  # Python 3.13
    }

    def find_class(self, module_name: str, name: str) -> Any:
        # The one gate: unpickling can call nothing that this does not return.
        if name in self.known.get(module_name, ()):
            return super().find_class(module_name, name)
        raise CheckpointError(
            f"{self.path} names {module_name}.{name}, which no index of a checkpoint needs and "
            "which could run code; do not use this checkpoint"
        )


class Reader(FileSystemReader):
    """DCP's reader, with an index that cannot run code and names no file elsewhere."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / INDEX
        with path.open("rb") as file:
            try:
                index = Index(file).load()
                places = list(index.storage_data.values())
            # `find_class` has said it in words already.
            except (CheckpointError, OSError):
                raise
            except Exception as error:  # a pickle that is none may raise anything
                raise CheckpointError(
                    f"{path} is no index of a checkpoint ({type(error).__name__}: {error}); delete "
                    "this checkpoint to go on from the one before"
                ) from error
        for place in places:
            # An edited index could otherwise read any file that this user can.
            if Path(place.relative_path).name != place.relative_path:
                raise CheckpointError(
                    f"{path} names the file {place.relative_path!r}, which lies elsewhere; do not "
                    "use this checkpoint"
                )
        return index


class Planner(DefaultSavePlanner):
    """Plans over a model's tensors and takes the bytes from `shards`, this process's own of each:
    the live ones, or copies."""

    # Name in the files -> bytes to write; a plan holds shapes and places, no tensor.
    shards: Mapping[str, torch.Tensor]

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.shards[index.fqn]


def exchange(world: World, value: Any) -> list[Any]:
    """`world.gather` of what JSON cannot say: DCP's records, of which the names repeat."""
    if world.size == 1:
        return [value]
    # Plans repeat their names, so the fastest level suffices. The processes are this job's own:
    # this pickle is trusted, an index on disk is not.
    packed = zlib.compress(pickle.dumps(value), 1)
    return [pickle.loads(zlib.decompress(part)) for part in world.gather_bytes(packed)]


def saved_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        name: saved
        for name, saved in metadata.state_dict_metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    }


def fill(targets: dict[str, torch.Tensor], reader: FileSystemReader, metadata: Metadata) -> None:
    """Read into `targets`: of DTensors this process's shards. No collective."""
    # Coordinator everywhere: each process plans its own reads, and nobody waits.
    planner = DefaultLoadPlanner()
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def inner_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that a tensor is made of: itself, as "", or those of a tensor class."""
    if type(tensor) is torch.Tensor:
        return {"": tensor}
    return {name: getattr(tensor, name) for name in _flatten(tensor)[0]}


def _flatten(tensor: Any) -> tuple[list[str], Any]:
    return tensor.__tensor_flatten__()


def copy_to_host(tensor: Any) -> torch.Tensor:
    """In host memory, and of its own. A tensor class's `to` need not copy: its parts' does."""
    # copy=True also on a CPU, where `to` alone would return the live tensor.
    parts = {name: part.to("cpu", copy=True) for name, part in inner_of(tensor).items()}
    if type(tensor) is torch.Tensor:
        return parts[""]
    context = _flatten(tensor)[1]
    return tensor.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())

"""The one meaning of the weight files of a model directory, for every reader of them.

    config.json -> model without storage  \
                                            > Weights: every parameter's tensor, in which file
    headers of the safetensors files      /

Whatever does not fit is refused from the headers, before a weight is read: transformers fills what
is missing at random, unties what differs, and leaves out what it does not know, each with a warning
at most, and other engines decide otherwise. What is accepted means the same to every reader.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vpgea_fast import attention
from vpgea_fast.config import one_line
from vpgea_fast.model_dir import (
    INDEX,
    ModelError,
    blamed_on,
    check_model_dir,
    empty_model,
    load_generation_config,
    read_config,
    weight_files,
    weight_index,
)

TRAINABLE = ("BF16", "F16", "F32", "F64")
"""Dtypes of safetensors that hold a weight itself, not one that a scale elsewhere belongs to."""
ROWS_COMPARED = 4096
EDGE = 1 << 20
"""Bytes read at both ends of a file of weights to know it again."""
STRIDES, BLOCK = 512, 4096
"""Places between them, and the bytes read at each: where only some layers were trained, the ends
may be those of the base. One place in 10 MB of a file of 5 GB."""


class Tensor(NamedTuple):
    """A tensor of a safetensors file, as its header has it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Weights:
    """The weights of a directory, checked against the model of its config.json.

    `of`: name of a parameter or buffer in the model -> what fills it; a tied weight is there once
    for each of its names. `converted`: tensors that transformers makes a parameter of several of
    (experts of a mixture); their shapes are checked when they are read.
    """

    directory: Path
    of: Mapping[str, Tensor]
    converted: Mapping[str, Tensor]

    def given(self, names: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one at a time, in the dtypes of the files: by the model's `names`, or, if
        some are converted, by the files' names, which is what engines know then. ModelError for a
        value that is not finite."""
        if self.converted:
            tensors = {t.name: t for t in (*self.of.values(), *self.converted.values())}
        else:
            tensors = {name: self.of[name] for name in names}
        for name, tensor in tensors.items():
            yield name, read(tensor)


def read(tensor: Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """Rows of a stored tensor, in its own dtype. Errors: ModelError, also for NaN and Inf."""
    with _reading(tensor.file), safe_open(tensor.file, framework="pt") as opened:
        values = (
            # get_slice reads the bytes of these rows alone, but cannot slice a tensor of no
            # dimension.
            opened.get_slice(tensor.name)[rows] if tensor.shape else opened.get_tensor(tensor.name)
        )
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"{tensor.file}: {tensor.name} holds NaN or Inf; use an earlier checkpoint"
        )
    return values


def load_config(path: str) -> Any:
    """The transformers configuration of a model directory or Hub name, of which a model can be made
    that its weight files fit (those of the Hub are not fetched for it). Errors: ModelError."""
    config = read_config(path)
    # A copy: transformers writes the dtype and the attention of the model into it.
    causal_lm = empty_model(copy.deepcopy(config), torch.float32, path)
    # On the Hub that would fetch gigabytes for a look.
    if Path(path).is_dir():
        find_weights(causal_lm, path)
    return config


def load_causal_lm(path: str, dtype: torch.dtype) -> Any:
    """AutoModelForCausalLM with packed attention. Errors: ModelError for an incomplete directory or
    non-finite weights."""
    from transformers import AutoModelForCausalLM

    config = read_config(path)
    outline = without_storage(path, dtype, config)
    # All is checked on an outline first: from_pretrained would only warn, and fill at random.
    weights = find_weights(outline, path)
    with blamed_on(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(weights.directory),
            config=config,
            dtype=dtype,
            attn_implementation=attention.register(),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    causal_lm, info = loaded
    for what in ("missing_keys", "mismatched_keys"):  # of those that are made of several tensors
        if names := sorted(map(str, info.get(what, ()))):
            raise ModelError(
                f"{path}: {len(names)} weights are {what.removesuffix('_keys')} ({names[0]}, ...), "
                "by its config.json; copy the model again, or correct config.json"
            )
    bad = [name for name, p in causal_lm.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ModelError(
            f"{path}: {len(bad)} tensors hold NaN or Inf ({bad[0]}, ...); use an earlier checkpoint"
        )
    # transformers reads its own without the checks of load_generation_config.
    causal_lm.generation_config = outline.generation_config
    return causal_lm


def stored_model(path: str, dtype: torch.dtype) -> tuple[Any, Iterator[tuple[str, torch.Tensor]]]:
    """A causal LM without storage, and its weights as the files hold them, one at a time: for an
    engine that is no module. Errors: ModelError."""
    causal_lm = without_storage(path, dtype)
    return causal_lm, find_weights(causal_lm, path).given(dict(causal_lm.named_parameters()))


def without_storage(path: str, dtype: torch.dtype, config: Any = None) -> Any:
    """A causal LM of a directory or Hub name without storage; `config`: as `read_config` gives it,
    where it was read before. Errors: ModelError."""
    config = config or read_config(path)
    # A copy: transformers writes the dtype and the attention of the model into it.
    causal_lm = empty_model(copy.deepcopy(config), dtype, path)
    causal_lm.generation_config = load_generation_config(path, config)
    return causal_lm


def find_weights(causal_lm: Any, path: str) -> Weights:
    """Where the weights of a model (without storage) are in a directory or on the Hub, which is
    fetched. Only headers are read, and both tensors of a tie of which both are stored. ModelError,
    with the tensor and its file, for what is missing, of another shape or unknown to the model, for
    ties that do not hold, and for dtypes that are no trainable weight."""
    directory = _fetched(path)
    # keep_vars: tied names share one object, by which `_tie` knows them.
    state = causal_lm.state_dict(keep_vars=True)
    stored = _headers(directory)
    of, converted, extra, composed = _matched(causal_lm, state, stored)
    _refuse_unknown(causal_lm, extra)
    for tensor in (*of.values(), *converted.values()):
        if tensor.dtype not in TRAINABLE:
            raise ModelError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, and quantised weights "
                "cannot be trained; take the model in bfloat16, float16 or float32"
            )
    for name, tensor in of.items():
        if tensor.shape != tuple(state[name].shape):
            raise ModelError(
                f"{tensor.file}: {tensor.name} is {tensor.shape}, config.json says "
                f"{tuple(state[name].shape)}; copy the model again"
            )
    # Before what is missing is counted: a tied weight is stored under one of its names.
    _tie(state, of)
    ignored = _patterns(causal_lm._keys_to_ignore_on_load_missing)
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    missing = [
        name
        for name in state
        if name not in of and name not in composed and (name in parameters or not ignored(name))
    ]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} weights are missing ({missing[0]}, ...), which the model "
            "in config.json has and no file; copy the model again"
        )
    return Weights(directory, of, converted)


def _matched(
    causal_lm: Any, state: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Sort stored tensors by what transformers makes of their names: one parameter each, part of a
    parameter, or nothing. The last of the four are the parameters that are made of parts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    # transformers' own rules and function, so no name can be read in two ways. Converters build a
    # parameter of several tensors (experts), renamings only change a name.
    known = get_model_conversion_mapping(causal_lm)
    converters = [rule for rule in known if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in known if not isinstance(rule, WeightConverter)]
    prefix = causal_lm.base_model_prefix
    of, converted, extra, composed = {}, {}, {}, set()
    for name, tensor in stored.items():
        new, pattern = rename_source_key(name, renamings, converters, prefix, dict(state))
        # As transformers decides: a rule that leads away from a name of this model is not for it.
        if new not in state and name in state:
            new, pattern = name, None
        if new not in state:
            extra[name] = tensor
        elif pattern is not None:
            converted[name] = tensor
            composed.add(new)
        # Which of two tensors a parameter gets would depend on the reader.
        elif new in of:
            raise ModelError(
                f"{tensor.file}: {name} and {of[new].name} are both {new} of the model; "
                "copy the model again"
            )
        else:
            of[new] = tensor
    return of, converted, extra, composed


def _refuse_unknown(causal_lm: Any, extra: Mapping[str, Tensor]) -> None:
    """A bias that config.json does not have would be left out without a word. What old versions
    stored and every model computes, and what a family is known to store for others, may be there.
    """
    ignored = _patterns(causal_lm._keys_to_ignore_on_load_unexpected)
    buffers = {name for name, _ in causal_lm.named_buffers()}
    old = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$")
    prefix = causal_lm.base_model_prefix
    for name, tensor in extra.items():
        if ignored(name) or old.search(name) or {name, f"{prefix}.{name}"} & buffers:
            continue
        raise ModelError(
            f"{tensor.file}: {name} is no weight of the model in config.json, which would run "
            "without it; correct config.json, or take the tensor out of the file"
        )


def _tie(state: Mapping[str, torch.Tensor], of: dict[str, Tensor]) -> None:
    """Give each name of a tied weight the tensor that is stored; ModelError if two differ."""
    groups: dict[int, list[str]] = {}
    for name, value in state.items():
        groups.setdefault(id(value), []).append(name)
    for names in groups.values():
        # A model is usually stored with one name of a tie; with both they must be equal, or one
        # would be lost in silence.
        have = [name for name in names if name in of]
        for other in have[1:]:
            row = _first_difference(of[have[0]], of[other])
            if row is not None:
                raise ModelError(
                    f"{of[other].file}: {of[other].name} differs from {of[have[0]].name} in row "
                    f"{row}, but config.json ties them (tie_word_embeddings); set it to false if "
                    "both belong to the model, or take one of them out of the file"
                )
        if have:
            of.update((name, of[have[0]]) for name in names)


def _first_difference(one: Tensor, other: Tensor) -> int | None:
    # In blocks: an embedding of 150k x 8k in bfloat16 is 2.5 GB, twice.
    for start in range(0, one.shape[0], ROWS_COMPARED):
        rows = slice(start, start + ROWS_COMPARED)
        a, b = read(one, rows), read(other, rows)
        if not torch.equal(a, b):
            return start + int((a != b).flatten(1).any(1).nonzero()[0])
    return None


def _patterns(patterns: Any) -> Any:
    """Whether a name matches one of the regular expressions that transformers keeps for a class."""
    joined = re.compile("|".join(f"({p})" for p in patterns)) if patterns else None
    return lambda name: joined is not None and joined.search(name) is not None


def _fetched(path: str) -> Path:
    """The directory itself, or the snapshot of a Hub name."""
    if not Path(path).exists():
        from huggingface_hub import snapshot_download

        with blamed_on(path):
            # No *.bin: a pickle may run code, and is never asked for.
            path = snapshot_download(path, allow_patterns=["*.safetensors", "*.json"])
        check_model_dir(path)
    return Path(path)


def _headers(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the weight files. ModelError where the index and the files disagree, as two
    readers would then."""
    index = weight_index(directory)
    stored: dict[str, Tensor] = {}
    for file in (directory / name for name in weight_files(index)):
        # Opening maps the file and parses its header; no weight is read.
        with _reading(file), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in stored:
                    raise ModelError(
                        f"{file}: {name} is in {stored[name].file.name}, too; keep one"
                    )
                part = opened.get_slice(name)
                stored[name] = Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
    if index is not None:
        # Both directions: what the index names and no file has, and what a file has unnamed.
        said = {name: directory / file for name, file in index.items()}
        for name in {**said, **stored}:
            if name not in said or name not in stored or stored[name].file != said[name]:
                where = stored[name].file.name if name in stored else "no file"
                raise ModelError(
                    f"{directory / INDEX}: {name} is in {where}, the index says "
                    f"{index.get(name)}; copy the model again"
                )
    return stored


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{file}: a weight file is damaged or cut ({one_line(error)}); copy the model again"
        ) from error


def model_digest(path: str) -> str:
    """A digest of a model directory: configuration, tokenizer, and parts of its weights; a name on
    the Hub as it is."""
    if not Path(path).is_dir():
        return path
    digest = hashlib.blake2b(digest_size=16)
    kinds = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")
    # Names and sizes too: a renamed or cut file is another model.
    for file in sorted(Path(path).iterdir()):
        if file.suffix in kinds and file.is_file():
            size = file.stat().st_size
            digest.update(json.dumps([file.name, size]).encode())
            with file.open("rb") as stream:
                digest.update(stream.read(EDGE))
                if size > 2 * EDGE:
                    for stride in range(STRIDES):
                        stream.seek(size * stride // STRIDES)
                        digest.update(stream.read(BLOCK))
                stream.seek(max(0, size - EDGE))
                digest.update(stream.read(EDGE))
    return digest.hexdigest()

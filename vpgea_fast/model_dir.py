"""A Hugging Face model directory: its configuration, and the one meaning of its weight files.

    config.json -> model without storage  \
                                            > Weights: every parameter's tensor, in which file
    headers of the safetensors files      /

Whatever does not fit is refused from the headers, before a weight is read: transformers fills what
is missing at random, unties what differs, and leaves out what it does not know, each with a warning
at most, and other engines decide otherwise. What is accepted means the same to every reader.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vpgea_fast import attention, families, hub
from vpgea_fast.config import one_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TRAINABLE = ("BF16", "F16", "F32", "F64")
"""Dtypes of safetensors that hold a weight itself, not one that a scale elsewhere belongs to."""
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
MOST_LAYERS = 1000
COUNTS = (
    *("hidden_size", "intermediate_size", "vocab_size", "head_dim", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "n_positions", "n_embd", "n_head", *LAYERS),
)
MOST = 2**31 - 1
ABOVE_ZERO = ("_eps", "_epsilon", "rope_theta")
ROWS_COMPARED = 4096


class ModelError(ValueError):
    """A model that cannot be loaded or trained; the message says what was found and what to do."""


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
            wanted = {t.name: t for t in (*self.of.values(), *self.converted.values())}
        else:
            wanted = {name: self.of[name] for name in names}
        for name, tensor in wanted.items():
            yield name, read(tensor)


def read(tensor: Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """Rows of a stored tensor, in its own dtype. Errors: ModelError, also for NaN and Inf."""
    with _reading(tensor.file), safe_open(tensor.file, framework="pt") as opened:
        values = (
            opened.get_slice(tensor.name)[rows] if tensor.shape else opened.get_tensor(tensor.name)
        )
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"{tensor.file}: {tensor.name} holds NaN or Inf; use an earlier checkpoint"
        )
    return values


# The configuration


def load_config(path: str) -> Any:
    """The transformers configuration of a model directory or Hub name, of which a model can be made
    that its weight files fit (those of the Hub are not fetched for it). Errors: ModelError."""
    config = read_config(path)
    # A copy: transformers writes the dtype and the attention of the model into it.
    causal_lm = empty_model(copy.deepcopy(config), torch.float32, path)
    if Path(path).is_dir():
        find_weights(causal_lm, path)
    return config


def read_config(path: str) -> Any:
    """config.json alone, as transformers reads it. Errors: ModelError."""
    from transformers import AutoConfig, PreTrainedConfig

    check_model_dir(path)
    with blamed_on(path):
        _check_raw(PreTrainedConfig.get_config_dict(path)[0])
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{config.model_type!r} is an encoder-decoder; take a decoder alone")
    with _of_the_family(path):
        families.check(config)
    return families.without_randomness(config)


def empty_model(config: Any, dtype: torch.dtype, path: str | None = None) -> Any:
    """The causal LM of a configuration without storage, its ties made. ModelError, blamed on the
    config.json of `path`, for a configuration of which none can be made."""
    from transformers import AutoModelForCausalLM

    name = attention.register()
    with _of_the_family(path):
        families.measure(config)
    with blamed_on(path or getattr(config, "model_type", "")):
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=name, trust_remote_code=False
            )
        causal_lm.tie_weights()
    return causal_lm


def decoder_layers(causal_lm: Any) -> list[nn.Module]:
    """The modules that transformers says must stay in one piece. Errors: ModelError."""
    names = set(getattr(causal_lm, "_no_split_modules", None) or ())
    layers = [module for module in causal_lm.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"{type(causal_lm).__name__} names no layers (_no_split_modules), so it cannot be cut "
            "into units; use a decoder-only causal LM of transformers, or parallel.shard: never"
        )
    return layers


@contextmanager
def _of_the_family(path: str | None) -> Iterator[None]:
    """What a measurement refuses is told in its own words, with the file that it is about."""
    try:
        yield
    except ValueError as error:
        where = f" ({path}/config.json)" if path and Path(path).is_dir() else ""
        raise ModelError(f"{error}{where}") from error


@contextmanager
def blamed_on(path: str) -> Iterator[None]:
    """Whatever is raised while transformers works on the user's config.json is a ModelError of one
    line that names the file: no list of kinds of errors is ever complete."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        local = Path(path).is_dir()
        where = str(Path(path) / "config.json") if local else f"the configuration of {path!r}"
        remedy = (
            "correct it, or take a causal LM that transformers knows, unquantised"
            if local
            else "give a complete Hugging Face directory, or a Hub name that can be reached"
        )
        raise ModelError(f"cannot use {where}: {one_line(error)}; {remedy}") from error


def _check_raw(content: Mapping[str, Any]) -> None:
    """ValueError for what transformers would take and no run can: quantised weights, no numbers,
    and sizes that are none, of which it makes lists before anything else."""
    for key, value in content.items():
        if key == "quantization_config" and value is not None:
            how = value.get("quant_method", "?") if isinstance(value, Mapping) else value
            raise ValueError(f"quantization_config says {how!r}: quantised weights are not trained")
        if isinstance(value, Mapping):
            _check_raw(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}, expected a finite number")
        elif key in COUNTS and value is not None:
            _check_counts(key, value)
        elif isinstance(value, int) and abs(value) > 2**63 - 1:
            raise ValueError(f"{key} is {str(value)[:20]}..., which is no size of a model")
        elif key.endswith(ABOVE_ZERO) and isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"{key} is {value}, expected a number above 0")


def _check_counts(key: str, value: Any) -> None:
    most = MOST_LAYERS if key in LAYERS else MOST
    for count in value if isinstance(value, list) else [value]:  # a list: one for each layer
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise ValueError(f"{key} is {count!r:.40}, expected a whole number of 1..{most}")


# The weight files


def check_model_dir(path: str) -> None:
    """A local directory must hold config.json and every weight file that its index names. Of a Hub
    name it is asked whether the Hub answers."""
    directory = Path(path)
    if not directory.exists():
        if path.startswith((".", "/")) or path.count("/") > 1:
            raise ModelError(
                f"no model directory at {path}; "
                "give a Hugging Face directory or a Hub name (owner/name)"
            )
        if hub.silent():
            raise ModelError(
                f"{path!r} is no directory here, and the Hub does not answer: give a Hugging Face "
                "directory, or set HF_HUB_OFFLINE=1 if the model lies in the cache of the Hub"
            )
        return
    if not (directory / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give a Hugging Face model directory")
    json_object(directory / "config.json")
    index = _index(directory)
    wanted = sorted({SINGLE} if index is None else set(index.values()))
    absent = [name for name in wanted if not (directory / name).is_file()]
    if absent:
        pickled = (directory / "pytorch_model.bin").is_file()
        raise ModelError(
            f"{path} is incomplete: {', '.join(absent)} missing; "
            + (
                "pytorch_model.bin may run code: save it as"
                if pickled
                else "copy the whole model in"
            )
            + " safetensors"
        )
    if index is not None and SINGLE not in wanted and (directory / SINGLE).is_file():
        raise ModelError(
            f"{path} holds {SINGLE} and {INDEX}, which names other files: engines disagree on "
            "which counts; take away the one that is not of this model"
        )


def find_weights(causal_lm: Any, path: str) -> Weights:
    """Where the weights of a model (without storage) are in a directory or on the Hub, which is
    fetched. Only headers are read, and both tensors of a tie of which both are stored. ModelError,
    with the tensor and its file, for what is missing, of another shape or unknown to the model, for
    ties that do not hold, and for dtypes that are no trainable weight."""
    directory = _fetched(path)
    state = causal_lm.state_dict(keep_vars=True)
    stored = _headers(directory)
    of, converted, extra, made = _matched(causal_lm, state, stored)
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
    _tie(state, of)
    ignored = _patterns(causal_lm._keys_to_ignore_on_load_missing)
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    missing = [
        name
        for name in state
        if name not in of and name not in made and (name in parameters or not ignored(name))
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
    """Stored tensors by what transformers makes of their names: (one parameter each, parts of a
    parameter, nothing), and the parameters that are made of parts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known = get_model_conversion_mapping(causal_lm)
    converters = [rule for rule in known if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in known if not isinstance(rule, WeightConverter)]
    prefix = causal_lm.base_model_prefix
    of, converted, extra, made = {}, {}, {}, set()
    for name, tensor in stored.items():
        new, pattern = rename_source_key(name, renamings, converters, prefix, dict(state))
        if new not in state and name in state:
            new, pattern = name, None
        if new not in state:
            extra[name] = tensor
        elif pattern is not None:
            converted[name] = tensor
            made.add(new)
        elif new in of:
            raise ModelError(
                f"{tensor.file}: {name} and {of[new].name} are both {new} of the model; "
                "copy the model again"
            )
        else:
            of[new] = tensor
    return of, converted, extra, made


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
            path = snapshot_download(path, allow_patterns=["*.safetensors", "*.json"])
        check_model_dir(path)
    return Path(path)


def _headers(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the weight files. ModelError where the index and the files disagree, as two
    readers would then."""
    index = _index(directory)
    files = sorted({SINGLE} if index is None else set(index.values()))
    found: dict[str, Tensor] = {}
    for file in (directory / name for name in files):
        with _reading(file), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in found:
                    raise ModelError(f"{file}: {name} is in {found[name].file.name}, too; keep one")
                part = opened.get_slice(name)
                found[name] = Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
    if index is not None:
        said = {name: directory / file for name, file in index.items()}
        for name in {**said, **found}:
            if name not in said or name not in found or found[name].file != said[name]:
                where = found[name].file.name if name in found else "no file"
                raise ModelError(
                    f"{directory / INDEX}: {name} is in {where}, the index says "
                    f"{index.get(name)}; copy the model again"
                )
    return found


def _index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> name of its file, of a directory that has an index. ModelError for a file that
    is not below the directory; links are followed, since the Hub's cache consists of them."""
    path = directory / INDEX
    if not path.is_file():
        return None
    named = json_object(path).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{path} names no weight files; copy the model again")
    for name, file in named.items():
        good = isinstance(file, str) and file.endswith(".safetensors") and "\0" not in file
        if not good or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ModelError(
                f"{path}: {name} is in {file!r:.100}, expected the name of a safetensors file in "
                "the same directory; do not use this model, or copy it again"
            )
    return named


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


def json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file. ModelError for anything else in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({one_line(error)}); copy the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged (no JSON object); copy the model again")
    return content

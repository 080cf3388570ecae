"""Tokenizers of the shapes that people bring, trained here on a little text, and models around
them: tiny ones with random weights, large ones without any."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

# The split of Qwen2: a letter run takes one mark before it, other marks stay together.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"|\s?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = [
    "Please reason step by step, and put your final answer within \\boxed{}.",
    (
        "The reference answer to this problem is: 72.\nReconstruct the shortest complete chain of "
        "reasoning that a solver who does NOT know this answer would follow to derive it."
    ),
    (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May. "
        "How many clips did Natalia sell altogether in April and May?\n\n"
        "**Final Answer**\n\\boxed{72}"
    ),
    "Think in the first person; keep every step needed to reach the result, drop dead ends.",
]
BYTE_LETTERS = bytes_to_unicode()
"""A byte -> the letter that a byte-level vocabulary spells it with."""
R1_BOS, R1_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
R1_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'system' %}{{ message.content }}
  {%- elif message.role == 'user' %}{{ '<｜User｜>' + message.content }}
  {%- else %}{{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
QWEN3_TEMPLATE = """\
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}"""


def trained_bpe(texts: list[str], vocab_size: int, *splits: Any) -> Tokenizer:
    """A byte-level BPE trained on `texts`. Without a split its tokens run over words, digits and
    marks."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 5, trainer)
    return tokenizer


def byte_level(
    template: str, *, special: dict[str, str], plain: list[str], vocab_size: int = 420
) -> Any:
    """A byte-level BPE of the Qwen2 kind; `special` names its special tokens (`bos_token`, ...),
    `plain` are added tokens that tokenizer.json calls not special."""
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    tokenizer = trained_bpe(TEXT, vocab_size, split)
    options = {"normalized": False}
    names = dict.fromkeys(special.values())
    tokenizer.add_special_tokens([AddedToken(name, special=True, **options) for name in names])
    tokenizer.add_tokens([AddedToken(name, special=False, **options) for name in plain])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def r1_tokenizer() -> Any:
    """DeepSeek-R1-Distill-Qwen's shape: turn and think tags that are not special."""
    return byte_level(
        R1_TEMPLATE,
        special={"bos_token": R1_BOS, "eos_token": R1_EOS, "pad_token": R1_EOS},
        plain=["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
    )


def qwen3_tokenizer() -> Any:
    """Qwen3's shape: no BOS, special turn tags, think tags that are not, `enable_thinking`."""
    tokenizer = byte_level(
        QWEN3_TEMPLATE,
        special={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        plain=["<think>", "</think>"],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def save_model(path: Any, tokenizer: Any, model: Any) -> str:
    """A Hugging Face directory of both."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


SHAPES = {
    "7b": (3584, 28, 4, 18944, 152064, 7_615_616_512),
    "1.5b": (1536, 12, 2, 8960, 151936, 1_777_088_000),
}
"""Qwen2.5 with its head untied: hidden, heads, key heads, MLP, vocabulary, published parameters."""


def save_hollow(path: Path, tokenizer: Any, name: str) -> Path:
    """A directory with one of SHAPES around a smaller tokenizer, and a hole for the weights."""
    hidden, heads, kv_heads, mlp, vocabulary, _ = SHAPES[name]
    return _save_hollow(
        path,
        tokenizer,
        Qwen2Config,
        architectures=["Qwen2ForCausalLM"],
        hidden_size=hidden,
        num_hidden_layers=28,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
    )


def save_hollow_qwen3(path: Path, tokenizer: Any) -> Path:
    """The same with the shape of Qwen3-4B: 4,022,468,096 parameters, its head tied."""
    return _save_hollow(
        path,
        tokenizer,
        Qwen3Config,
        architectures=["Qwen3ForCausalLM"],
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )


def _save_hollow(path: Path, tokenizer: Any, kind: Any, **shape: Any) -> Path:
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos")}
    kind(**shape, **ends).save_pretrained(path)
    tokenizer.save_pretrained(path)
    _hollow_weights(path)
    return path


def _hollow_weights(directory: Path) -> None:
    """Write model.safetensors: the header that config.json asks for, and a sparse file behind."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)

"""A Hugging Face directory of random weights in a real shape, where no model can be fetched.

    python benchmarks/random_model.py qwen2.5-7b DIRECTORY

bfloat16 weights drawn on the device at hand, the tokenizer of the tiny base (its tokens are the
first ones of the vocabulary). What such a model writes is noise: it is for phases, memory, saving.
The head's row of </think> is four times as long, so that thoughts end, at random, and have a
gradient.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train_variants import MODELS
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

TINY_BASE = Path(__file__).parents[1] / "vpgea_fast/tiny_base"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write_model(args.model, args.out)


def model_folder(name: str, out: Path) -> Path:
    """The base that the package ships for `tiny`; else `out`, with random weights of the shape."""
    if name == "tiny":
        return TINY_BASE
    write_model(name, out)
    return out


def write_model(name: str, out: Path) -> None:
    """The directory of the shape `name` of MODELS; the same weights on every call and machine of a
    kind. Sets torch's seed."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    torch.manual_seed(0)
    config = Qwen2Config(
        **MODELS[name],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("</think>")] *= 4
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()

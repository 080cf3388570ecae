"""Train with TRL's SFTTrainer, its tokens scored by this library's head.

    python examples/trl_sft.py

One line around `train()`; GRPO, RLOO, DPO and KTO trainers take the same.
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from vpgea_fast.integrations import trl

VOCABULARY = 64


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **shape, **heads))
    words = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>"
    )
    starts = torch.randint(2, VOCABULARY - 16, (64, 1))
    rows = Dataset.from_dict({"input_ids": (starts + torch.arange(16)).tolist()})
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False}
    config = SFTConfig("out", max_steps=30, logging_steps=10, learning_rate=1e-2, **quiet)
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    with trl.enable(trainer):
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"first loss {float(losses[0]):.3f}, last loss {float(losses[-1]):.3f}")


if __name__ == "__main__":
    main()

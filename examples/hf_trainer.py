"""Train with the Hugging Face Trainer, its loss made without (B, T, V) logits.

    python examples/hf_trainer.py

The mixin is the one line; data, accumulation, evaluation and checkpoints stay the Trainer's. For a
trainer that is made already: `with hf.enable(trainer): trainer.train()`.
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from vpgea_fast.integrations import hf

VOCABULARY = 64


class FusedTrainer(hf.FusedLossMixin, Trainer):
    """The Trainer with this library's loss."""


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **shape, **heads))
    starts = torch.randint(VOCABULARY, (64, 1))
    ids = (starts + torch.arange(16)) % VOCABULARY  # every token is the one before it plus one
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        "out",
        max_steps=30,
        learning_rate=1e-2,
        gradient_accumulation_steps=4,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = FusedTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    print(f"loss {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    main()

"""Train with Lightning without (B, T, V) logits: one line of `training_step`.

python examples/lightning_module.py
"""

import lightning
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vpgea_fast.integrations import causal_lm_loss

VOCABULARY = 64


class Module(lightning.LightningModule):
    """A causal LM whose loss is this library's."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        self.model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **shape, **heads))

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        return causal_lm_loss(self.model, ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    torch.manual_seed(0)
    starts = torch.randint(VOCABULARY, (256, 1))
    ids = (starts + torch.arange(16)) % VOCABULARY  # every token is the one before it plus one
    batches = torch.utils.data.DataLoader(ids, batch_size=8)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet)
    module = Module()
    trainer.fit(module, batches)
    print(f"loss {module.training_step(ids).item():.3f}")


if __name__ == "__main__":
    main()

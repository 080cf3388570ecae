"""Train LoRA adapters of PEFT, one of them on the head, without (B, T, V) logits.

    python examples/peft_lora.py

The head's weight W + scale B A is made for each call, so the adapter on it is trained too; a loss
that reads `lm_head.weight` would leave it out and say nothing.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from vpgea_fast.integrations import causal_lm_loss

VOCABULARY, STEPS = 64, 60


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **shape, **heads))
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    model = get_peft_model(base, LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(adapters, lr=1e-2)
    for step in range(1, STEPS + 1):
        starts = torch.randint(VOCABULARY, (16, 1))
        ids = (starts + torch.arange(16)) % VOCABULARY  # every token is the one before it plus one
        loss = causal_lm_loss(model, ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    moved = {name for name, p in model.named_parameters() if "lora_B" in name and p.any()}
    print(f"adapters that moved: {len(moved)}, the head's: {sum('lm_head' in x for x in moved)}")


if __name__ == "__main__":
    main()

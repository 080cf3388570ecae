"""Train in your own loop with accelerate, on any number of processes, without (B, T, V) logits.

    python examples/accelerate_ddp.py
    torchrun --nproc-per-node 2 examples/accelerate_ddp.py

Pass `causal_lm_loss` what `prepare` returns: DDP, autocast or FSDP2 do what they do for the model.
"""

import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM

from vpgea_fast.integrations import causal_lm_loss

VOCABULARY, MICRO_BATCHES, STEPS = 64, 2, 30


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **shape, **heads))
    model, optimiser = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    ranks, rank = accelerator.num_processes, accelerator.process_index
    for step in range(1, STEPS + 1):
        starts = torch.randint(VOCABULARY, (MICRO_BATCHES * ranks, 8, 1))
        ids = (starts + torch.arange(16)) % VOCABULARY  # every token is the one before it plus one
        items = ids[..., 1:].numel()  # labels of the whole step, over all ranks
        total = torch.zeros(())
        for batch in ids[rank::ranks]:
            loss = causal_lm_loss(model, batch, num_items=items, world_size=ranks).loss
            accelerator.backward(loss)
            total += loss.detach()
        optimiser.step()
        optimiser.zero_grad()
        if step % 10 == 0:
            mean = accelerator.reduce(total, "mean")
            accelerator.print(f"step {step}: loss {mean:.3f}")
    # Before the process group: with DDP as its last owner, its end can hang.
    model, optimiser = accelerator.free_memory(model, optimiser)
    accelerator.end_training()


if __name__ == "__main__":
    main()

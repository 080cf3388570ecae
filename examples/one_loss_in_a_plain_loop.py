"""Use one fused loss in a plain torch loop: REINFORCE on a model that has a head.

    python examples/one_loss_in_a_plain_loop.py

A sampled token earns 1 if it is the token before it plus one. `weighted_logprob_loss` takes hidden
states and the head's weight; no logits of the whole batch are made in the update.
"""

import torch

from vpgea_fast.losses import weighted_logprob_loss

VOCABULARY, WIDTH, TOKENS, STEPS = 16, 32, 256, 200


def main() -> None:
    torch.manual_seed(0)
    embed = torch.nn.Embedding(VOCABULARY, WIDTH)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    optimiser = torch.optim.AdamW([*embed.parameters(), *head.parameters()], lr=0.03)
    for step in range(1, STEPS + 1):
        context = torch.randint(VOCABULARY, (TOKENS,))
        hidden = embed(context)  # (T, D); stands for your decoder's last hidden states
        with torch.no_grad():
            sampled = torch.multinomial(head(hidden).softmax(1), 1).flatten()
            reward = (sampled == (context + 1) % VOCABULARY).float()
        coefficient = (reward.mean() - reward) / TOKENS  # minus the advantage, per token
        out = weighted_logprob_loss(hidden, head.weight, sampled, coef_T=coefficient)
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step in (1, STEPS // 2, STEPS):
            print(f"step {step}: reward {reward.mean():.2f}, loss {out.loss.item():+.3f}")


if __name__ == "__main__":
    main()

"""TRL's own GRPO losses as an oracle: loss and gradient of given rows, by TRL's unchanged code.

A real `GRPOTrainer` on a CPU runs each micro-batch of one optimizer step through its
`training_step`; only `_prepare_inputs` is ours, which hands over the rows instead of sampling.
Building one takes 10 ms. Two switches are turned after it is built, because the constructor would
load a reference model from disk for `beta` and start an engine for `use_vllm`.

What TRL 1.16 computes (`GRPOTrainer._compute_loss`). A micro-batch has B rows; m is 1 on a token
that counts and 0 on padding, on a token from outside the policy and on all of a masked row; A is a
row's (or token's) advantage; n = max(sum_t m, 1).

    r = exp(logp - old)                              token level; old is logp.detach() where absent
    r = exp(sum_t m (logp - old) / n)                sequence level: one r a row, with gradient to
                                                     every token. GSPO is this with `grpo`
    k3 = exp(ref - logp) - (ref - logp) - 1          always a token's, never clamped;
                                                     x r under use_bias_correction_kl (not sg(r))

| loss_type                  | loss l of a token (0 / 1 factors below)                             |
|----------------------------|---------------------------------------------------------------------|
| grpo, bnpo, dr_grpo, dapo, | -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A);    |
| luspo                      | without delta, r alone; epsilon_high is epsilon where absent        |
| cispo                      | -sg(min(r, epsilon_high)) A logp: epsilon_high is the cap itself,   |
|                            | not 1 + it; no lower bound; the cap holds for either sign of A      |
| sapo                       | -(4 / tau) sigmoid(tau (r - 1)) A, tau = sapo_temperature_pos where |
|                            | A > 0, else _neg                                                    |
| vespo                      | -sg(phi) A logp; phi = exp(lam + k log w - lam w), 1 at w = 1; log w|
|                            | = sum_t m clip(logp - old, +-20) in [log 1e-8, 20]; k, lam of sign A|

then l is multiplied by the off-policy mask (a row's: 1 where A >= 0 or mean_t(sampled - logp) <=
threshold, sampled = old where absent), the entropy mask (tokens of the top quantile of this
micro-batch) and the engine's ratio (not vespo's, which multiplies it into w), and beta k3 is added
AFTER these, so none masks the penalty. use_bias_correction_kl is TRL's default: switch it off for
the plain k3; its gradient differs also where r is 1.

| loss_type          | loss of a micro-batch; C = max_completion_length, a = micro-batches a step  |
|--------------------|-----------------------------------------------------------------------------|
| grpo, sapo         | sum_rows (sum_t m l / n) / (B a): a masked row counts in B                  |
| bnpo               | sum m l / max(sum m, 1) / a: tokens of this micro-batch                     |
| dr_grpo            | sum m l / (B C a): a masked row counts in B                                 |
| luspo              | sum m l / (B a): the sum of a row, so a row weighs its length               |
| dapo, cispo, vespo | sum m l / (N a / (S processes)), N = num_items_in_batch = tokens with m of  |
|                    | the whole rollout over all processes, S = steps_per_generation = micro-     |
|                    | batches a rollout: with U updates a pass, a / S = 1 / U, so each divides by |
|                    | the MEAN tokens of an update, not by its own                                |

The step's loss is the sum over its micro-batches; neither Trainer nor accelerate divides again
(`loss_is_scaled_for_ga`). a is `current_gradient_accumulation_steps`, so the shorter last step of
an epoch has its own. The entropy bonus subtracts entropy_coef x mean entropy (of this micro-batch's
counting tokens) / a. Advantages are made before, in `_generate_and_score_completions`:
(R - mean_group) / (std + 1e-4), std unbiased (G - 1), `scale_rewards` group, batch or none.

Masks: `masked` is mask_truncated_completions (no token of the row counts, and none is attended);
`counts` is the tool mask (attended, but no loss). The head runs in float32 whatever the model's
dtype, so a float64 model agrees to some 1e-6 and a float32 model barely to 1e-5: hand over a
float64 model. `trl_coefficients` takes log-probs, and is exact. A masked row's log-probs are 0.

Shapes: B rows, T tokens of the longest completion, P of the longest prompt.
"""

import contextlib
import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Rows:
    """Rows of one optimizer step, ragged: every sequence has one tensor a row."""

    prompts: Sequence[Tensor]
    completions: Sequence[Tensor]
    advantages: Sequence[Tensor] | Tensor
    """(B,), or a tensor a row: a token's."""
    old: Sequence[Tensor] | None = None
    """Log-probs when the rollout was made; None: ratio 1."""
    ref: Sequence[Tensor] | None = None
    sampled: Sequence[Tensor] | None = None
    """The engine's log-probs, for the off-policy mask."""
    engine_ratio: Sequence[Tensor] | None = None
    """exp(old - sampled), capped or masked already: TRL makes it where it samples."""
    counts: Sequence[Tensor] | None = None
    """0 on tokens that the policy did not write."""
    masked: Sequence[bool] | None = None
    """Rows of which no token counts."""

    def take(self, places: Sequence[int]) -> "Rows":
        def taken(values: Any) -> Any:
            if values is None or isinstance(values, Tensor):
                return values if values is None else values[list(places)]
            return [values[i] for i in places]

        return Rows(**{name: taken(values) for name, values in vars(self).items()})

    def tokens(self) -> int:
        """How many tokens count."""
        inputs = self.inputs()
        return int((inputs["completion_mask"] * inputs.get("tool_mask", 1)).sum())

    def inputs(self) -> dict[str, Tensor]:
        """Padded as TRL pads: prompts on the left, completions on the right."""
        ones = [torch.ones_like(row) for row in self.completions]
        masked = self.masked or [False] * len(ones)
        made = {
            "prompt_ids": _pad(self.prompts, left=True),
            "prompt_mask": _pad([torch.ones_like(row) for row in self.prompts], left=True),
            "completion_ids": _pad(self.completions),
            "completion_mask": _pad([o * (not gone) for o, gone in zip(ones, masked, strict=True)]),
            "advantages": self.advantages
            if isinstance(self.advantages, Tensor)
            else _pad(self.advantages),
        }
        more = {
            "old_per_token_logps": self.old,
            "ref_per_token_logps": self.ref,
            "sampling_per_token_logps": self.sampled,
            "importance_sampling_ratio": self.engine_ratio,
            "tool_mask": self.counts,
        }
        # The ratio of padding is 1: vespo sums its logarithm over padding, too.
        fill = {"importance_sampling_ratio": 1.0}
        given = {name: rows for name, rows in more.items() if rows is not None}
        return made | {name: _pad(rows, fill.get(name, 0.0)) for name, rows in given.items()}


def _pad(rows: Sequence[Tensor], value: float = 0.0, *, left: bool = False) -> Tensor:
    side = "left" if left else "right"
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


@dataclass(frozen=True)
class Step:
    """How TRL is told to see the rows: all are one optimizer step, `micro_batch` rows at a time."""

    micro_batch: int
    updates: int = 1
    """Optimizer steps a pass over the rollout."""
    rollout_tokens: int | None = None
    """Tokens that count of the whole rollout; None: these rows are the rollout (updates 1)."""

    def split(self, rows: Rows) -> list[dict[str, Any]]:
        if self.updates > 1 and self.rollout_tokens is None:
            raise ValueError("more than one update needs rollout_tokens, of the whole rollout")
        total = rows.tokens() if self.rollout_tokens is None else self.rollout_tokens
        places = list(range(len(rows.prompts)))
        starts = places[:: self.micro_batch]
        parts = [rows.take(places[i : i + self.micro_batch]).inputs() for i in starts]
        return [{**part, "num_items_in_batch": torch.tensor(total)} for part in parts]


@contextlib.contextmanager
def _kept_seeds() -> Iterator[None]:
    """Restore the generators: TRL's constructor seeds them all."""
    states = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])  # noqa: NPY002


@contextlib.contextmanager
def trainer(
    model: Any,
    tokenizer: Any,
    given: dict[str, Callable[..., Any]],
    step: Step,
    micro_batches: int,
    *,
    engine: bool = False,
    beta: float = 0.0,
    **options: Any,
) -> Iterator[Any]:
    """A GRPOTrainer of a copy of the model, whose methods of these names are `given`; `options` are
    keys of GRPOConfig. What it writes is gone afterwards."""
    import trl
    from datasets import Dataset

    settings = {
        "per_device_train_batch_size": step.micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_generation": micro_batches * step.updates,
        # Only how a rollout is sampled and its advantages are made: one group.
        "num_generations": step.micro_batch * micro_batches * step.updates,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory(prefix="trl_oracle_") as folder, _kept_seeds():
        made = type("Given", (trl.GRPOTrainer,), given)(
            # A copy: TRL replaces the forward of the model that it is given.
            model=copy.deepcopy(model),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(output_dir=folder, **{**settings, **options}),
            train_dataset=Dataset.from_dict({"prompt": ["?"]}),
            processing_class=tokenizer,
        )
        made.beta, made.use_vllm = beta, engine
        made.current_gradient_accumulation_steps = micro_batches
        yield made


def trl_step(
    model: Any, tokenizer: Any, rows: Rows, step: Step, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """One optimizer step's loss and the gradient of every weight, by `GRPOTrainer.training_step`.

    `options` are keys of `GRPOConfig`: loss_type, epsilon, epsilon_high, delta, beta,
    importance_sampling_level, max_completion_length, ... The model is left as it was."""
    parts, given = step.split(rows), {"_prepare_inputs": lambda _, inputs: inputs}
    options["engine"] = rows.engine_ratio is not None
    with trainer(model, tokenizer, given, step, len(parts), **options) as made:
        made.model.zero_grad()
        loss = sum(float(made.training_step(made.model, part, None)) for part in parts)
        return loss, {name: p.grad for name, p in made.model.named_parameters()}


def trl_coefficients(
    model: Any, tokenizer: Any, logps: Sequence[Tensor], rows: Rows, step: Step, **options: Any
) -> tuple[float, list[Tensor]]:
    """The same step as a function of the log-probs alone: its loss and d loss / d logp, ragged, in
    the dtype of `logps`. The model is only what the constructor asks for."""
    for key, off in (("top_entropy_quantile", 1.0), ("entropy_coef", 0.0)):
        if options.get(key, off) != off:
            raise ValueError(f"got {key}, expected trl_step: log-probs say nothing of entropies")
    leaves = [row.detach().clone().requires_grad_() for row in logps]
    parts, starts = step.split(rows), range(0, len(leaves), step.micro_batch)
    columns = iter([_pad(leaves[i : i + step.micro_batch]) for i in starts])

    def own(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        logp_BT = next(columns)
        return logp_BT, torch.zeros_like(logp_BT), None

    given = {"_get_per_token_logps_and_entropies": own}
    options["engine"] = rows.engine_ratio is not None
    with trainer(model, tokenizer, given, step, len(parts), **options) as made:
        made.model.train()
        loss = torch.stack([made.compute_loss(made.model, part) for part in parts]).sum()
    return loss.item(), list(torch.autograd.grad(loss, leaves, materialize_grads=True))

"""What benchmarks/train_bench.py measures: rows as VPG-EA makes them, and who trains on them.

| variant       | rows            | one forward holds                                            |
| gated         | with a gradient | whole rows end to end, planned as the trainer plans them     |
| ungated       | all             | the same; the head skips rows without a gradient all the same |
| padded        | with a gradient | budget // longest rows, padded to the step's longest, with a |
|               |                 | mask: as TRL does, and verl without its padding removal      |
| padded sorted | with a gradient | rows of like length, as many as fit, padded to the longest   |
|               |                 | of them, no mask: the best that padding can do               |
| TRL           | with a gradient | TRL's own GRPOTrainer.training_step, padded as TRL pads      |

The first four share one policy, one optimiser and one head, so their differences are the layout's.
TRL has its own model, head, mixed precision and AdamW, and everything else that its step does.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vpgea_fast.config import Config
from vpgea_fast.distributed import World, full_weights, reshard
from vpgea_fast.metrics import model_flops
from vpgea_fast.model import Policy, random_policy
from vpgea_fast.optim import apply_update, build_optimizer
from vpgea_fast.packing import drop_zero_rows
from vpgea_fast.passes import Passes
from vpgea_fast.types import PackedBatch, TrainRow

Tensor = torch.Tensor

QWEN = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        **QWEN,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": {
        **QWEN,
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    # 39M parameters, of them 17M in the tied embedding: the least that still looks like a model.
    "40m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1408,
        "vocab_size": 32768,
        "tie_word_embeddings": True,
    },
    # Five times the usual scale of weights: logits that differ, so a wrong mask or shift shows.
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "vocab_size": 2003,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    },
}
VARIANTS = {
    "gated": ("packed", True),
    "ungated": ("packed", False),
    "padded": ("padded", True),
    "padded sorted": ("padded sorted", True),
    "TRL": ("TRL", True),
}
"""name -> (layout, whether rows without a gradient are dropped)."""
OURS = tuple(name for name, (layout, _) in VARIANTS.items() if layout != "TRL")
PHASES: tuple[str, ...] = (
    "packing",
    "decoder_forward",
    "head_loss",
    "decoder_backward",
    "optimizer",
)


# --- rows -----------------------------------------------------------------------------------------


def make_rows(
    paths: int,
    *,
    mean: int,
    sigma: float,
    budget: int,
    gate_rate: float,
    vocabulary: int,
    beta: float = 0.5,
    seed: int = 0,
) -> list[TrainRow]:
    """All rows of `paths` sampled paths: teacher rows, then student rows, as an objective gives
    them.

    Lengths are log-normal with mean `mean`, at most 4 `mean` and what the budget takes. A prompt
    has mean / 16 tokens, the teacher's a quarter more. The share `gate_rate` of the paths has a
    positive advantage: only their student rows have a coefficient. Tokens are random.
    """
    draw, made = random.Random(seed), torch.Generator().manual_seed(seed)
    prompt = max(4, mean // 16)
    hinted = prompt + max(1, prompt // 4)
    longest = min(4 * mean, budget - hinted + 1)
    gate = [i < round(gate_rate * paths) for i in range(paths)]
    draw.shuffle(gate)
    teacher, student = [], []
    for accepted in gate:
        length = round(mean * draw.lognormvariate(-(sigma**2) / 2, sigma))
        length = min(longest, max(1, length))
        ids = torch.randint(vocabulary, (hinted + length,), generator=made)
        advantage = (1 if accepted else -1) * (0.1 + abs(draw.gauss(0, 1)))
        weight_T = torch.full((length,), 1 / (paths * mean), dtype=torch.float64)
        path = ids[hinted:]
        teacher.append(
            TrainRow(
                context_ids=ids[:hinted],
                token_ids=path,
                coef=-advantage * weight_T,
                stream="posterior",
                view="teacher",
            )
        )
        coef_T = -beta * accepted * weight_T
        student.append(
            TrainRow(
                context_ids=ids[:prompt],
                token_ids=path,
                coef=coef_T,
                stream="posterior",
                view="student",
                term="distill",
                distilled=True,
            )
        )
    return teacher + student


def through_model(rows: Sequence[TrainRow]) -> int:
    """Tokens of `rows` that enter the decoder: of each row all but the last."""
    return sum(row.tokens - 1 for row in rows)


@dataclass(frozen=True)
class PaddedBatch:
    """Rows below each other, padded on the right: input_ids (B, L), mask the same or None (causal
    attention alone hides what is behind a row); logit_index counts in the flattened B L."""

    input_ids: Tensor
    mask: Tensor | None
    logit_index: Tensor
    targets: Tensor
    coef: Tensor

    def to(self, device: torch.device | str) -> PaddedBatch:
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


def pad_rows(rows: Sequence[TrainRow], width: int, *, masked: bool) -> PaddedBatch:
    """Padded to `width`; of no rows the dummy that `pack_rows` makes of none."""
    if not rows:
        token = torch.zeros(1, dtype=torch.int64)
        rows, width = (
            [
                TrainRow(
                    context_ids=token,
                    token_ids=token,
                    coef=torch.zeros(1),
                    stream="prior",
                    view="student",
                )
            ],
            1,
        )
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, index = torch.zeros_like(input_ids), []
    for b, row in enumerate(rows):
        input_ids[b, : row.tokens - 1] = torch.cat([row.context_ids, row.token_ids[:-1]])
        mask[b, : row.tokens - 1] = 1
        index.append(torch.arange(row.token_ids.numel()) + b * width + row.context_ids.numel() - 1)
    return PaddedBatch(
        input_ids=input_ids,
        mask=mask if masked else None,
        logit_index=torch.cat(index),
        targets=torch.cat([row.token_ids for row in rows]),
        coef=torch.cat([row.coef for row in rows]).double(),
    )


def padded_plan(lengths: Sequence[int], budget: int, layout: str) -> list[list[int]]:
    """Rows of every micro-batch: any of equal number, or like ones as many as the budget takes."""
    order = list(range(len(lengths)))
    if layout == "padded":
        random.Random(0).shuffle(order)
        size = max(1, budget // max(lengths))
        return [order[i : i + size] for i in range(0, len(order), size)]
    order.sort(key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


# --- who trains -----------------------------------------------------------------------------------


class Laps:
    """Seconds between marks, by the phase of `phases` that each mark ends.

    On CUDA by the device's own clock: queued work counts where it runs, an idle device in the phase
    that makes it wait.
    """

    def __init__(self, device: torch.device, phases: Sequence[str] = PHASES) -> None:
        self.device, self.phases = device, phases
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def __call__(self, phase: str) -> None:
        self.marks.append((phase, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        found = dict.fromkeys(self.phases, 0.0)
        for (_, start), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            if self.device.type == "cuda":
                end.synchronize()
            spent = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            found[phase] += spent
        return found


class PaddingPolicy(Policy):
    """A policy that takes padded batches too."""

    def _hidden(self, batch: Any) -> Tensor:
        if isinstance(batch, PackedBatch):
            return super()._hidden(batch)
        output = self.causal_lm.base_model(
            input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False
        )
        return output.last_hidden_state.flatten(0, 1)[batch.logit_index].to(self.dtype)


class Ours:
    """The trainer's update over any layout: one policy, one optimiser."""

    def __init__(self, config: Any, cfg: Config, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.policy = random_policy(
            config,
            cfg.model,
            world,
            cfg.parallel,
            backend=cfg.loss.backend,
            kind=PaddingPolicy,
        )
        self.optimizer = build_optimizer(
            self.policy.parameters(),
            cfg.optim,
            masters=self.policy.masters,
            hosted=self.policy.hosted,
        )
        self.passes = Passes(world, cfg.train.micro_batch_tokens, model_flops(config))
        self.laps, self.ran, self.batches = Laps(world.device), 0, 0
        self.policy.causal_lm.base_model.register_forward_hook(
            lambda *_: self.laps("decoder_forward")
        )

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.policy.causal_lm.named_parameters()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return full_weights(self.policy)

    def clear(self) -> None:
        reshard(self.policy)
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, rows: Sequence[TrainRow], layout: str) -> dict[int, Tensor]:
        """Add the gradient of `rows`; log-probs of them, or of this process's, by row number."""
        self.laps, self.ran, self.batches = Laps(self.world.device), 0, 0

        def step(batch: Any, last: bool) -> Tensor:
            self.laps("packing")
            self.policy.expect_backward(last=last)
            out = self.policy(batch, temperature=self.cfg.rollout.temperature)
            self.laps("head_loss")
            out.loss.backward()
            self.laps("decoder_backward")
            dummy = batch.input_ids.numel() == 1
            self.ran += 0 if dummy else batch.input_ids.numel()
            self.batches += 1
            return out.logp.cpu()

        if layout == "packed":
            found = dict(enumerate(self.passes(step, rows)))
        else:
            found = self._padded(step, rows, layout)
        reshard(self.policy)
        self.laps("packing")
        return found

    def _padded(
        self, step: Callable[[Any, bool], Tensor], rows: Sequence[TrainRow], layout: str
    ) -> dict[int, Tensor]:
        """Micro-batches dealt in turn, the same number to every process."""
        lengths = [row.tokens - 1 for row in rows]
        plan = padded_plan(lengths, self.passes.budget, layout)
        plan += [[]] * (-len(plan) % self.world.size)
        own = plan[self.world.rank :: self.world.size]
        found: dict[int, Tensor] = {}
        for number, members in enumerate(own):
            width = max(lengths if layout == "padded" else [lengths[i] for i in members] or [1])
            batch = pad_rows([rows[i] for i in members], width, masked=layout == "padded")
            logps = step(batch, number + 1 == len(own)).double()
            counts = [rows[i].token_ids.numel() for i in members]
            found |= dict(zip(members, logps.split(counts) if members else (), strict=True))
        return found

    def train(self, rows: Sequence[TrainRow], layout: str) -> None:
        self.gradient(rows, layout)
        optim = self.cfg.optim
        apply_update(self.optimizer, lr=optim.lr, max_grad_norm=optim.max_grad_norm)
        self.laps("optimizer")

    def forward(self, rows: Sequence[TrainRow]) -> None:
        """The forward of `rows` alone, packed."""
        self.laps = Laps(self.world.device)

        def step(batch: PackedBatch, _: bool) -> Tensor:
            self.laps("packing")
            logps = self.policy.logprob(batch)
            self.laps("head_loss")
            return logps

        self.passes(step, rows)
        reshard(self.policy)
        self.laps("packing")


def trl_missing(world: World) -> str | None:
    """Why TRL's step cannot run here; None if it can."""
    if importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    if world.size > 1:
        return "TRL is measured on one process: its sharding belongs to accelerate's launcher"
    return None


class TrlTrainer:
    """One of TRL's GRPOTrainers, with its model and AdamW, as `cfg` trains.

    Attention: FlashAttention 2 where installed on CUDA, else sdpa, its default.
    """

    trainer: Any
    model: Any
    optimizer: Any

    def __init__(self, cfg: Config, world: World) -> None:
        self.cfg, self.device = cfg, world.device
        flash = world.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
        self.attention = "flash_attention_2" if flash else "sdpa"

    def open(
        self,
        kind: Callable[..., Any],
        model: Any,
        tokenizer: Any,
        *,
        prompts: Sequence[str],
        reward: Callable[..., list[float]],
        **words: Any,
    ) -> None:
        """Make a trainer of class `kind`; `words` go to its GRPOConfig."""
        import trl  # pyright: ignore[reportMissingImports]
        from datasets import Dataset

        cfg, cuda = self.cfg, self.device.type == "cuda"
        folder = tempfile.mkdtemp(prefix="trl_bench_")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.trainer = kind(
            model=model.to(self.device),
            reward_funcs=reward,
            args=trl.GRPOConfig(
                output_dir=folder,
                beta=0.0,
                learning_rate=cfg.optim.lr,
                bf16=cfg.model.dtype == "bfloat16",
                use_cpu=not cuda,
                gradient_checkpointing=cfg.model.activation_checkpointing != "none",
                report_to=[],
                disable_tqdm=True,
                torch_compile=cfg.model.compile,
                **words,
            ),
            train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=tokenizer,
        )
        self.trainer.create_optimizer()
        self.model, self.optimizer = self.trainer.accelerator.prepare(model, self.trainer.optimizer)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.trainer.model.named_parameters()

    @torch.no_grad()
    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        own = dict(self.parameters())
        for name, value in weights:
            own[name].copy_(value)

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Clip, step, drop the gradients."""
        accelerator = self.trainer.accelerator
        accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.optim.max_grad_norm)
        self.optimizer.step()
        self.clear()


class Trl(TrlTrainer):
    """TRL's GRPO training step: `GRPOTrainer.training_step` per micro-batch, then its clip and
    AdamW. Only generation is left out: `_prepare_inputs` hands over the rows.

    Its `dr_grpo` loss is -sum(A log p) / (rows a batch x max_completion_length x micro-batches), so
    advantages of -coef times that make its gradient ours, which the correctness run tests. Prompts
    are padded on the left and completions on the right, both to the longest of the step, as its
    `_generate_and_score_completions` does. Its step also makes entropies and metrics; that is part
    of it.
    """

    def __init__(
        self, config: Any, cfg: Config, world: World, *, batch: int, completion: int
    ) -> None:
        import trl  # pyright: ignore[reportMissingImports]
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        super().__init__(cfg, world)
        self.batch, self.completion = batch, completion
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=self.attention
        )
        words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        )

        class ReadyRows(trl.GRPOTrainer):
            def _prepare_inputs(self, generation_batch: Any) -> Any:
                return generation_batch

        self.open(
            ReadyRows,
            model,
            tokenizer,
            prompts=["?"],
            reward=lambda completions, **_: [0.0] * len(completions),
            per_device_train_batch_size=2,
            num_generations=2,
            gradient_accumulation_steps=1,
            max_completion_length=completion,
            loss_type="dr_grpo",
        )
        self.laps, self.ran, self.batches = Laps(world.device), 0, 0
        model.base_model.register_forward_hook(lambda *_: self.laps("decoder_forward"))
        accelerator = self.trainer.accelerator
        backward = accelerator.backward

        def timed_backward(loss: Tensor, **kwargs: Any) -> None:
            self.laps("head_loss")
            backward(loss, **kwargs)
            self.laps("decoder_backward")

        accelerator.backward = timed_backward

    def gradient(self, rows: Sequence[TrainRow], layout: str) -> dict[int, Tensor]:  # noqa: ARG002
        self.laps, self.ran, self.batches = Laps(self.device), 0, 0
        parts = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        prompt = max(row.context_ids.numel() for row in rows)
        completion = max(row.token_ids.numel() for row in rows)
        self.trainer.current_gradient_accumulation_steps = len(parts)
        for part in parts:
            inputs = self._inputs(part, prompt, completion, len(parts))
            self.laps("packing")
            self.trainer.training_step(self.model, inputs, None)
            self.laps("packing")
            self.ran += len(part) * (prompt + completion)
            self.batches += 1
        return {}

    def _inputs(
        self, rows: Sequence[TrainRow], prompt: int, completion: int, parts: int
    ) -> dict[str, Tensor]:
        ids = torch.zeros(len(rows), prompt + completion, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for b, row in enumerate(rows):
            place = slice(prompt - row.context_ids.numel(), prompt + row.token_ids.numel())
            ids[b, place] = torch.cat([row.context_ids, row.token_ids])
            mask[b, place] = 1
        scale = len(rows) * self.completion * parts
        advantages = torch.stack([-scale * row.coef[0] for row in rows]).float()
        found = {
            "prompt_ids": ids[:, :prompt],
            "prompt_mask": mask[:, :prompt],
            "completion_ids": ids[:, prompt:],
            "completion_mask": mask[:, prompt:],
            "advantages": advantages,
        }
        return {name: value.to(self.device) for name, value in found.items()}

    def train(self, rows: Sequence[TrainRow], layout: str) -> None:
        self.gradient(rows, layout)
        self.update()
        self.laps("optimizer")


class Job:
    """One variant's step: `prepare` outside the clock, the call inside; `history` has its laps."""

    def __init__(self, engine: Any, rows: Sequence[TrainRow], layout: str) -> None:
        self.engine, self.rows, self.layout = engine, rows, layout
        self.history: list[Laps] = []
        self.loss, self.ran, self.batches = None, 0, 0

    def prepare(self) -> None:
        self.engine.clear()

    def __call__(self) -> None:
        if self.layout == "forward":
            self.engine.forward(self.rows)
        else:
            self.engine.train(self.rows, self.layout)
        self.ran, self.batches = self.engine.ran, self.engine.batches
        self.history.append(self.engine.laps)


def rows_of(name: str, rows: Sequence[TrainRow]) -> list[TrainRow]:
    """What a variant is given of all rows."""
    return drop_zero_rows(rows) if VARIANTS[name][1] else list(rows)

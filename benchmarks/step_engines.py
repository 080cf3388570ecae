"""Who makes the whole steps of benchmarks/step_bench.py: our Trainer, and TRL's GRPOTrainer.

Both draw paths of the same prompts. A path has the length that `Lengths` gives it, in both: ours
ends the row there, TRL is made to draw its end-of-sequence token there and nowhere before. The
first path of every two is right. So both generate and train as many tokens, in every round.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from op_kinds import ROLLOUT
from step_time import phases
from torch.profiler import record_function
from train_bench import Made, local
from train_variants import Laps, TrlTrainer

from vpgea_fast.config import Config
from vpgea_fast.distributed import World
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.trainer import Trainer
from vpgea_fast.types import TrainRow

Tensor = torch.Tensor

PARTS: tuple[str, ...] = ("rollout", "score", "train", "sync", "other")
"""Phases of a step that both have: `score` is rewards, log-probs and advantages; `train` gradients
and update; `sync` the hand-over of weights, nothing where the trained module samples."""
SCORED = ("score", "logps", "guard", "advantage", "importance")


@dataclass(frozen=True)
class Lengths:
    """Tokens of every path: log-normal with this mean, 2 to 4 `mean`; `sigma` is of the logarithm.

    >>> Lengths(20, 0.0)("q0", 3)
    20
    """

    mean: int
    sigma: float
    seed: int = 0

    @property
    def longest(self) -> int:
        return 4 * self.mean if self.sigma else self.mean

    def __call__(self, question_id: str, index: int) -> int:
        draw = random.Random(f"{self.seed} {question_id} {index}")
        drawn = self.mean * draw.lognormvariate(-(self.sigma**2) / 2, self.sigma)
        return min(self.longest, max(2, round(drawn)))


def right(index: int) -> float:
    """The reward of a path by its place in its group: every group has something to compare."""
    return float(index % 2 == 0)


def gradients_of(engine: Any) -> dict[str, Tensor]:
    return {n: local(p.grad).clone() for n, p in engine.parameters() if p.grad is not None}


def exact(path: str, rows: Sequence[TrainRow], device: torch.device) -> Made:
    """Log-probs and gradient in float64: transformers' own forward of every row alone."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model, logps = loaded.to(device).eval(), {}
    for n, row in enumerate(rows):
        ids = torch.cat([row.context_ids, row.token_ids]).to(device)
        z_LV = model(input_ids=ids[None], use_cache=False).logits[0]
        z_LV = z_LV[row.context_ids.numel() - 1 : -1]
        logp_L = z_LV.log_softmax(-1).gather(-1, row.token_ids.to(device)[:, None])[:, 0]
        (row.coef.to(logp_L) @ logp_L).backward()
        logps[n] = logp_L.detach().cpu()
    made = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Made(made, logps, sum(row.tokens - 1 for row in rows))


class Ours:
    """The project's Trainer, as it is: `train_step` draws, scores, weighs, trains and syncs.

    What is not the run's own: lengths of paths instead of stop tokens, and who is right.
    """

    def __init__(self, trainer: Trainer, lengths: Lengths) -> None:
        stages = trainer.stages
        self.trainer, self.optimizer = trainer, stages.optimizer
        self.parts: dict[str, float] = {}
        self.tokens = 0
        collector = stages.collector
        collector.sampling = replace(
            collector.sampling,
            max_new_tokens=lengths.longest,
            think_close_id=-1,  # an id that no token has
            tag=None,
            eos_ids=(),
            full_answer=False,
        )
        assert callable(collector.correct)  # or it would be a name that nobody asks
        collector.correct = lambda pairs: torch.tensor(
            [right(path.index) for _, path in pairs], dtype=torch.float64
        )
        if not isinstance(stages.engine, HFEngine):
            raise TypeError(f"got {type(stages.engine).__name__}, expected the engine hf")
        engine: Any = stages.engine
        engine._prefill = functools.partial(_ending, engine._prefill, lengths)
        engine.generate = functools.partial(_ranged, engine.generate)

    @property
    def prompts(self) -> list[tuple[str, Tensor]]:
        """(id, student prompt) of the questions of the step that is measured."""
        questions = self.trainer.stages.collector._questions(0, round_=0)
        return [(q.question.id, q.student_ids) for q in questions]

    def parameters(self) -> Any:
        return self.trainer.stages.policy.causal_lm.named_parameters()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self) -> tuple[Made, list[TrainRow]]:
        """Draw a step and make its gradient, without an update; the rows that it trained."""
        self.clear()
        rollout = self.trainer.draw()
        rows, _, _ = self.trainer.stages.measure.moment(rollout.rest[0], moved=False)
        logps = [logp.double() for logp in self.trainer.stages.gradients.accumulate(rows)]
        made = Made(gradients_of(self), dict(enumerate(logps)), sum(r.tokens - 1 for r in rows))
        self.clear()
        return made, rows

    def step(self) -> None:
        """The same step each time: the run's counter stands, so its seeds and questions do."""
        start = time.perf_counter()
        stats = self.trainer.train_step()
        if self.trainer.world.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.world.device)
        wall = time.perf_counter() - start
        if stats.skipped:
            raise RuntimeError(f"our step made no update: {stats.skipped}")
        spent = phases(stats.metrics)
        parts = {name: spent.get(name, 0.0) for name in ("rollout", "train", "sync")}
        parts["score"] = sum(spent.get(name, 0.0) for name in SCORED)
        self.parts = parts | {"other": wall - sum(parts.values())}
        self.tokens = stats.metrics["tokens_generated"]


def _ending(prefill: Callable[..., Any], lengths: Lengths, requests: Any, sampling: Any) -> Any:
    """HFEngine._prefill, with an end of its own for every row."""
    logits_RV, cache, batch = prefill(requests, sampling)
    ends = [lengths(request.question_id, request.index) for request in requests]
    batch.end_R = torch.tensor(ends, device=batch.end_R.device)
    return logits_RV, cache, batch


def _ranged(call: Callable[..., Any], *words: Any, **named: Any) -> Any:
    """The call within the profiler's range of a rollout."""
    with record_function(ROLLOUT):
        return call(*words, **named)


class EndsAt:
    """A logits processor: the end-of-sequence token as the last of `lengths`, never before.

    It writes into the scores, so it costs a few numbers a token.
    """

    def __init__(self, lengths: Sequence[int], eos_ids: Sequence[int]) -> None:
        self.eos_ids, self.width = list(eos_ids), 0
        self.rows: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            self.rows.setdefault(length - 1, []).append(row)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.eos_ids] = -torch.inf
        if rows := self.rows.get(input_ids.shape[1] - self.width):
            scores[rows] = -torch.inf
            scores[rows, self.eos_ids[0]] = 0.0
        return scores


class Trl(TrlTrainer):
    """TRL's GRPOTrainer, whole: its `_generate_and_score_completions` with transformers'
    `generate`, its `training_step` per micro-batch, then its clip and AdamW.

    A generation is one step's, so it makes no log-probs of its own, as by its defaults. `batch`
    rows a micro-batch. Everything else that its step does, entropies and metrics, is part of it.
    """

    def __init__(
        self,
        path: str,
        cfg: Config,
        world: World,
        *,
        prompts: Sequence[tuple[str, Tensor]],
        lengths: Lengths,
        group: int,
        batch: int,
    ) -> None:
        import trl  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(cfg, world)
        self.path = path
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=self.attention
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.prompts = [ids.tolist() for _, ids in prompts for _ in range(group)]
        self.lengths = [lengths(name, i) for name, _ in prompts for i in range(group)]
        texts = [tokenizer.decode(ids) for ids in self.prompts]
        if tokenizer(text=texts)["input_ids"] != self.prompts:
            raise ValueError("a prompt is not the ids of its own text, so TRL cannot be given it")
        self.inputs = [{"prompt": text} for text in texts]
        self.micro_batches = len(texts) // batch
        self.given: list[list[int]] | None = None
        self.logps: dict[tuple[int, ...], Tensor] = {}
        self.parts: dict[str, float] = {}
        self.laps, self.tokens = Laps(world.device, PARTS), 0

        self.open(
            _watched(trl.GRPOTrainer, self),
            model,
            tokenizer,
            prompts=texts,
            reward=lambda completions, **_: [right(i % group) for i in range(len(completions))],
            per_device_train_batch_size=batch,
            num_generations=group,
            gradient_accumulation_steps=self.micro_batches,
            max_completion_length=max(self.lengths),
            loss_type="grpo",
        )
        self.generate = model.generate
        model.generate = self._generate

    def _generate(self, **words: Any) -> Tensor:
        ends = EndsAt(self.lengths, self.trainer.eos_token_ids)
        ends.width = words["input_ids"].shape[1]
        return self.generate(**words, logits_processor=[ends])

    def gradient(self, given: list[list[int]], rows: Sequence[TrainRow]) -> Made:
        """The gradient of these completions, in the order of the prompts; log-probs of `rows`."""
        self.clear()
        self.given, self.logps = given, {}
        self._accumulate()
        self.given = None
        keys = [(*row.context_ids.tolist(), *row.token_ids.tolist()) for row in rows]
        none = torch.empty(0, dtype=torch.float64)
        logps = {n: self.logps.get(key, none) for n, key in enumerate(keys)}
        width = max(map(len, self.prompts)) + max(map(len, given))
        made = Made(gradients_of(self), logps, width * len(given))
        self.clear()
        return made

    def step(self) -> None:
        self.laps = Laps(self.device, PARTS)
        self._accumulate()
        self.update()
        self.laps("train")
        self.parts = self.laps.seconds()

    def _accumulate(self) -> None:
        self.trainer.current_gradient_accumulation_steps = self.micro_batches
        for _ in range(self.micro_batches):
            self.trainer.training_step(self.model, self.inputs, None)

    def completions(self, draw: Callable[[], Any], prompt_ids: list[list[int]]) -> Any:
        """What TRL draws, or what it is given instead."""
        if prompt_ids != self.prompts:
            raise RuntimeError("TRL asks with other prompts than ours")
        if self.given is not None:
            return self.given, None
        self.laps("score")
        with record_function(ROLLOUT):
            made = draw()
        self.laps("rollout")
        self.tokens = sum(map(len, made[0]))
        return made

    def note(self, ids_BS: Tensor, mask_BS: Tensor, logps_BL: Tensor) -> None:
        """Keep the log-probs of completions that were given, by the ids of the whole row."""
        if self.given is None:
            return
        for ids_S, mask_S, logps_L in zip(ids_BS, mask_BS.bool(), logps_BL, strict=True):
            kept_L = mask_S[-logps_L.shape[0] :]
            key = tuple(ids_S[mask_S].tolist())
            self.logps[key] = logps_L[kept_L].detach().double().cpu()


def _watched(base: Any, engine: Trl) -> Any:
    """TRL's trainer, which tells `engine` of its phases and log-probs."""

    class Watched(base):
        def _generate_single_turn(self, prompt_ids: Any, *words: Any, **named: Any) -> Any:
            draw = functools.partial(super()._generate_single_turn, prompt_ids, *words, **named)
            return engine.completions(draw, prompt_ids)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            engine.laps("score")
            return made

        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: Any, attention_mask: Any, *words: Any, **named: Any
        ) -> Any:
            made = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, *words, **named
            )
            engine.note(input_ids, attention_mask, made[0])
            return made

    return Watched

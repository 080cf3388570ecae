"""The method on a model that a Trainer holds: the stages of a run without the run.

questions of a step -> Collector -> ScoredBatch, Terms -> rows with coefficients
questions of an evaluation -> Evaluator -> accuracies and tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vpgea_fast import diagnostics, families
from vpgea_fast.book import LOGGED
from vpgea_fast.collect import Collector, Pairs
from vpgea_fast.config import Config
from vpgea_fast.distributed import World
from vpgea_fast.evaluate import Evaluator, make_sampling
from vpgea_fast.hf_trainer.questions import Asked, RewardJudge
from vpgea_fast.intake import ModelText
from vpgea_fast.integrations import head_options, packed
from vpgea_fast.integrations.heads import evaluating, find_head
from vpgea_fast.metrics import PhaseTimer, model_flops
from vpgea_fast.objectives import Terms
from vpgea_fast.packing import drop_zero_rows
from vpgea_fast.passes import Passes
from vpgea_fast.questions import check_questions
from vpgea_fast.rollout.engine import RolloutEngine
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.rollout.parallel import ParallelEngine
from vpgea_fast.rollout.turns import Turns
from vpgea_fast.rows import Scale, build_rows
from vpgea_fast.scoring import RowsFn
from vpgea_fast.types import Path, PromptedQuestion, ScoredBatch, TrainRow
from vpgea_fast.values import merge
from vpgea_fast.verify import Verifier


@dataclass(frozen=True)
class Drawn:
    """A step before its update: what was drawn, what it weighs, the rows that have a gradient."""

    batch: ScoredBatch
    terms: Terms
    rows: list[TrainRow]
    timer: PhaseTimer


class Method:
    """Draws, scores and weighs with `model`, and changes nothing of it but what `prepare` does.

    Its calls are collectives: every process has all questions of a step, and gets all paths.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        model: nn.Module,
        world: World,
        text: ModelText,
        verifier: Verifier,
        judge: RewardJudge | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.cfg, self.model, self.world, self.text = cfg, model, world, text
        self.verifier, self.judge = verifier, judge
        # First: what runs the model below finds its dropout off and its attention packed.
        prepare(model, autocast)
        causal_lm = find_head(model).causal_lm
        flops = model_flops(causal_lm.config)
        self.passes = Passes(world, cfg.train.micro_batch_tokens, flops)
        # The weights that are trained, where they lie: no copy of them, and no hand-over.
        engine = HFEngine(model, max_batch=cfg.rollout.max_batch, dtype=autocast)
        self.engine: RolloutEngine = engine if world.size == 1 else ParallelEngine(engine, world)
        self.sampling = make_sampling(cfg.rollout, text.prompter, text.tokenizer, causal_lm)
        self.collector: Collector | None = None
        self.asked: Asked | None = None

    def train_on(self, asked: Asked | None) -> None:
        """Take the questions that steps will be of. ValueError for some that no step can take."""
        if asked is None:
            return
        questions, prompter = [*asked.prompted.values()], self.text.prompter
        known: Any = {"prompt": prompter.prompt, "responses": prompter.responses}
        # At the start: a step would find it after its paths are drawn.
        check_questions(self.cfg, questions, **known, verify=self.verifier.verify)
        # One model: nothing is ever handed over.
        turns = Turns(self.engine, None, whole=True, probe=lambda _: {}, every=0)
        self.collector = _Collector(
            self.cfg,
            questions,
            **known,
            row_logprobs=self._scorer(1.0),  # U is a likelihood whatever the paths were drawn at
            path_logprobs=self._scorer(self.cfg.rollout.temperature),
            reference=None,
            posterior=None,
            turns=turns,
            sampling=self.sampling,
            decode=self.text.decode,
            verifier=self.verifier,
            progress=lambda _: lambda _: None,
            judge=self.judge,
        )
        self.collector.check()
        self.asked = asked

    def draw(self, questions: Sequence[PromptedQuestion], step: int) -> Drawn:
        """Sample, score and weigh the paths of a step: a function of weights, seed and step."""
        assert self.collector is not None
        # Evaluations share the judge, and look rows up in a dataset of their own.
        if self.judge is not None:
            self.judge.asked = self.asked
        timer = PhaseTimer()
        with timer("rollout"):
            posterior, prior = self.collector.sample(questions, step)
        batch = self.collector.score(questions, posterior, prior, step, timer=timer)
        with timer("advantage"):
            terms = self.collector.weigh(batch, step, {})
        # A row of zeros would cost a forward and a backward.
        rows = drop_zero_rows(build_rows(batch, terms, Scale.of(self.cfg)))
        return Drawn(batch, terms, rows, timer)

    def metrics(self, drawn: Drawn, logps: Sequence[torch.Tensor]) -> dict[str, Any]:
        """What a step says of itself, by the names of the book and, with a slash, by TRL's."""
        whole, timer = drawn.batch.whole, drawn.timer.metrics()
        # Where every question is lost there are no paths to speak of.
        found = merge(
            diagnostics.batch_metrics(whole) if whole else {},
            drawn.terms.metrics,
            diagnostics.row_metrics(drawn.rows, logps),
            diagnostics.work_metrics(drawn.batch, drawn.terms, drawn.rows, seconds=timer),
        )
        return merge(found, completions(drawn), self._rewards(drawn.batch))

    def evaluate(self, asked: Asked) -> dict[str, float]:
        """Accuracy, tokens, eps3 and share of cut answers of each mode, as the book has them."""
        if self.judge is not None:
            self.judge.asked = asked
        # Of each mode, sampled and greedy, what the line of a run repeats.
        results = self.evaluator(asked).run()
        return {f"{mode}_{key}": found[key] for mode, found in results.items() for key in LOGGED}

    def evaluator(self, asked: Asked) -> Evaluator:
        """What answers these questions. ValueError: one with no room for its answer."""
        assert asked.benchmark is not None
        return _Evaluator(
            self.cfg,
            engine=self.engine,
            benchmarks={asked.name: asked.benchmark},
            sampling=self.sampling,
            decode=self.text.decode,
            verifier=self.verifier,
            judge=self.judge,
        )

    def _rewards(self, batch: ScoredBatch) -> dict[str, float]:
        # Training samples no answers then, so no function was asked.
        if self.judge is None or not self.sampling.full_answer:
            return {}
        judged = torch.cat([batch.posterior.correct_BP.flatten(), batch.prior.correct_BP.flatten()])
        return {f"rewards/{self.judge.name}/mean": judged.mean().item()}

    def _scorer(self, temperature: float) -> RowsFn:
        how: Any = {"temperature": temperature, "backend": self.cfg.loss.backend}

        def score(rows: Sequence[TrainRow]) -> list[torch.Tensor]:
            # As the engine samples: log-probs of both must be those of one model.
            with evaluating(self.model):
                return self.passes.scoring(
                    lambda batch, _: packed.packed_logprobs(self.model, batch, **how), rows
                )

        return score


def check_model(model: nn.Module) -> None:
    """ValueError for what is no causal LM, or of a family that does not score a packed document as
    it does alone; before anything is changed."""
    config: Any = find_head(model).causal_lm.config
    families.measure(config)


def prepare(model: nn.Module, autocast: torch.dtype | None = None) -> None:
    """Measure a model's head, take its randomness out, let its attention take packed rows.
    ValueError for a head that is not understood."""
    head_options(model)
    packed.ready(model, autocast)
    families.remove_randomness(model)


def completions(drawn: Drawn) -> dict[str, float]:
    """TRL's names: lengths of all paths of a step, the share that was cut, the utility as the
    reward. {} where a step has no whole question."""
    streams = drawn.batch.posterior, drawn.batch.prior
    paths = [path for stream in streams for path in stream.flat]
    lengths = [path.generated for path in paths]
    utility_BG = drawn.terms.path_scores["posterior"]["utility"]
    # (B,): 0 where every path of a question is worth the same, so none has an advantage.
    spread_B = utility_BG.std(dim=1, correction=0)
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(path.truncated for path in paths) / len(paths),
        "reward": utility_BG.mean().item(),
        "reward_std": spread_B.mean().item(),
        "frac_reward_zero_std": (spread_B == 0).double().mean().item(),
    }


class _Collector(Collector):
    """A collector whose answers a reward function may judge."""

    def __init__(self, *args: Any, judge: RewardJudge | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.judge = judge

    def correct(self, pairs: Pairs) -> torch.Tensor:
        if self.judge is None or not self.sampling.full_answer:
            return super().correct(pairs)
        return self.judge([path for _, path in pairs])


class _Evaluator(Evaluator):
    """An evaluator whose answers a reward function may judge."""

    def __init__(self, *args: Any, judge: RewardJudge | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reward = judge

    def judge(self, paths: Sequence[Path], golds: Sequence[tuple[str, ...]]) -> torch.Tensor:
        return super().judge(paths, golds) if self.reward is None else self.reward(paths)

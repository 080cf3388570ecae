"""Evaluation of the student view: accuracy, generated tokens, and eps3 = ACC^2 / tokens.

Only `student_ids` are ever sampled from here: no teacher prompt can reach an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from transformers import AutoTokenizer

from vpgea_fast.config import Config, RolloutConfig
from vpgea_fast.data import load_questions
from vpgea_fast.metrics import eps3, eps3_mean
from vpgea_fast.model import load_policy
from vpgea_fast.prompts import Prompter, eos_ids
from vpgea_fast.rollout.engine import RolloutEngine, Sampling, request_seed
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.types import Path, Question, SampleRequest
from vpgea_fast.verify import Verifier

BOOTSTRAP = 1000
Decode = Callable[[torch.Tensor], str]
Item = tuple[Question, torch.Tensor]
"""A question and its student prompt: all that an evaluation knows."""
Progress = Callable[[int], None]


class Evaluator:
    """The benchmarks of `cfg.eval`, loaded once, and the settings under which they are sampled."""

    def __init__(
        self,
        cfg: Config,
        *,
        engine: RolloutEngine,
        prompter: Prompter,
        sampling: Sampling,
        decode: Decode,
        verifier: Verifier,
    ) -> None:
        self.cfg, self.engine, self.decode, self.verifier = cfg.eval, engine, decode, verifier
        self.sampling = replace(sampling, max_new_tokens=cfg.eval.max_new_tokens, full_answer=True)
        self.benchmarks: dict[str, list[Item]] = {}
        for source in cfg.eval.data:
            loaded = load_questions(
                source, replace(cfg.data, limit=cfg.eval.limit), parseable=verifier.parseable
            )
            name = FilePath(source).stem
            if name in self.benchmarks:
                raise ValueError(
                    f"eval.data names two benchmarks {name!r}; rename one of the files"
                )
            ids = prompter.student_ids([question.text for question in loaded.questions])
            self.benchmarks[name] = list(zip(loaded.questions, ids, strict=True))
            self._check_lengths(name, cfg.data.max_prompt_tokens)

    def _check_lengths(self, name: str, limit: int) -> None:
        """No question of a benchmark is left out: the rest would be another benchmark."""
        long = [question.id for question, ids in self.benchmarks[name] if ids.numel() > limit]
        if long:
            raise ValueError(
                f"benchmark {name}: {len(long)} prompts are longer than {limit} tokens (the "
                f"first is question {long[0]!r}); raise data.max_prompt_tokens"
            )

    @property
    def samples(self) -> int:
        """Answers that one run draws."""
        return sum(map(len, self.benchmarks.values())) * (self.cfg.samples + int(self.cfg.greedy))

    def run(self, on_progress: Progress | None = None) -> dict[str, dict[str, Any]]:
        """{"sampled": {...}, "greedy": {...}}: means over the benchmarks, and each of several.

        acc (0..1, pass@1 over n samples) with a 95 % bootstrap interval over questions, tokens
        (mean generated, thought and answer, cut samples included), truncated (share), n (samples),
        eps3 = mean over benchmarks of ACC^2/tokens, eps3_mean = (mean ACC)^2 / mean tokens: the
        paper does not say which of the two it prints.
        """
        modes = {
            "sampled": (
                self.cfg.samples,
                {"temperature": self.cfg.temperature, "top_p": self.cfg.top_p},
            ),
            "greedy": (int(self.cfg.greedy), {"temperature": 0.0}),
        }
        return {
            mode: self._mode(count, replace(self.sampling, **settings), on_progress)
            for mode, (count, settings) in modes.items()
            if count
        }

    def _mode(
        self, samples: int, sampling: Sampling, on_progress: Progress | None
    ) -> dict[str, Any]:
        parts = {
            name: self._benchmark(questions, samples, sampling, on_progress)
            for name, questions in self.benchmarks.items()
        }
        return {
            **_aggregate(list(parts.values())),
            **({"benchmarks": parts} if len(parts) > 1 else {}),
        }

    def _benchmark(
        self,
        questions: Sequence[Item],
        samples: int,
        sampling: Sampling,
        on_progress: Progress | None,
    ) -> dict[str, float]:
        # step -1: no training step ever draws with an evaluation's seed
        requests = [
            SampleRequest(q.id, "prior", i, ids, request_seed(self.cfg.seed, -1, q.id, "prior", i))
            for q, ids in questions
            for i in range(samples)
        ]
        paths = self.engine.generate(requests, sampling, on_progress)
        answers = [q.answer for q, _ in questions for _ in range(samples)]
        correct_QN = verify_paths(paths, answers, self.decode, self.verifier).view(
            len(questions), samples
        )
        low, high = _bootstrap(correct_QN.mean(dim=1), self.cfg.seed)
        acc, tokens = correct_QN.mean().item(), sum(path.generated for path in paths) / len(paths)
        return {
            "acc": acc,
            "acc_low": low,
            "acc_high": high,
            "tokens": tokens,
            "eps3": eps3(acc, tokens),
            "truncated": sum(path.truncated for path in paths) / len(paths),
            "n": len(paths),
        }


def make_sampling(
    cfg: RolloutConfig, prompter: Prompter, tokenizer: Any, causal_lm: Any
) -> Sampling:
    """The rollout section with the token ids that end a thought and an answer of this model."""
    return Sampling(
        max_new_tokens=cfg.max_new_tokens,
        max_answer_tokens=cfg.max_answer_tokens,
        full_answer=cfg.full_answer,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        think_close_id=prompter.think_close_id,
        eos_ids=eos_ids(tokenizer, causal_lm.generation_config),
    )


def verify_paths(
    paths: Sequence[Path], answers: Sequence[str], decode: Decode, verifier: Verifier
) -> torch.Tensor:
    """1.0 where the text after a closed thought verifies against the reference answer, else 0.0;
    (len(paths),) float64."""
    texts = [decode(path.answer_ids) if path.closed else "" for path in paths]
    return torch.tensor(
        verifier.verify(list(zip(answers, texts, strict=True))), dtype=torch.float64
    )


def _aggregate(parts: list[dict[str, float]]) -> dict[str, Any]:
    keys = ("acc", "acc_low", "acc_high", "tokens", "truncated")
    means = {key: math.fsum(part[key] for part in parts) / len(parts) for key in keys}
    mean_of_ratios, ratio_of_means = eps3_mean([(part["acc"], part["tokens"]) for part in parts])
    return {
        **means,
        "eps3": mean_of_ratios,
        "eps3_mean": ratio_of_means,
        "n": sum(int(part["n"]) for part in parts),
    }


def _bootstrap(per_question: torch.Tensor, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean over questions."""
    generator = torch.Generator().manual_seed(seed)
    count = per_question.numel()
    picks = torch.randint(count, (BOOTSTRAP, count), generator=generator)
    edges = torch.tensor([0.025, 0.975], dtype=per_question.dtype)
    low, high = per_question[picks].mean(dim=1).quantile(edges).tolist()
    return low, high


def evaluate_model(cfg: Config, on_progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate the model directory `cfg.model.path` on `cfg.eval.data`; the result of
    `Evaluator.run`."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    policy = load_policy(replace(cfg.model, gradient_checkpointing=False))
    prompter = Prompter(tokenizer, cfg.prompt)
    engine = HFEngine(policy.causal_lm, max_batch=cfg.rollout.max_batch, dtype=policy.dtype)
    with Verifier(cfg.verify.workers, cfg.verify.timeout_s) as verifier:
        evaluator = Evaluator(
            cfg,
            engine=engine,
            prompter=prompter,
            sampling=make_sampling(cfg.rollout, prompter, tokenizer, policy.causal_lm),
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            verifier=verifier,
        )
        return evaluator.run(on_progress)

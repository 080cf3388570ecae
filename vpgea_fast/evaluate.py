"""Evaluate the student view: accuracy, generated tokens, and eps3 = ACC^2 / tokens.

Only `student_ids` are ever sampled from here: no teacher prompt can reach an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from vpgea_fast.config import Config, RolloutConfig
from vpgea_fast.data import Benchmark
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.evaluation.measures import Answers, measure
from vpgea_fast.intake import ModelText, open_text, read_benchmarks
from vpgea_fast.metrics import Console
from vpgea_fast.model import load_policy
from vpgea_fast.prompts import Prompter, eos_ids
from vpgea_fast.rollout.engine import RolloutEngine, Sampling, request_seed
from vpgea_fast.rollout.factory import open_engine
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.scoring import answers_correct
from vpgea_fast.types import Path, Question, SampleRequest
from vpgea_fast.verify import Verifier
from vpgea_fast.weights import stored_model

Decode = Callable[[torch.Tensor], str]
Item = tuple[Question, torch.Tensor]
"""A question and its student prompt: all that an evaluation knows."""
Progress = Callable[[int], None]
Weights = Iterable[tuple[str, torch.Tensor]]


class Evaluator:
    """Benchmarks, and the settings of `cfg.eval` under which they are sampled."""

    def __init__(
        self,
        cfg: Config,
        *,
        engine: RolloutEngine,
        benchmarks: Mapping[str, Benchmark],
        sampling: Sampling,
        decode: Decode,
        verifier: Verifier,
    ) -> None:
        self.cfg, self.engine, self.decode, self.verifier = cfg.eval, engine, decode, verifier
        self.sampling = replace(sampling, max_new_tokens=cfg.eval.max_new_tokens, full_answer=True)
        self.benchmarks = benchmarks
        for benchmark in benchmarks.values():
            # Before any step: a prompt too long for the engine would end the run at its evaluation.
            engine.check(self._requests(benchmark.questions, samples=1), self.sampling)

    def _requests(self, questions: Sequence[Item], samples: int) -> list[SampleRequest]:
        # Step -1: no training step ever draws with an evaluation's seed. The seed is cfg.eval's, so
        # evaluations at different steps draw with the same random numbers and compare closely.
        return [
            SampleRequest(
                question_id=q.id,
                stream="prior",
                index=i,
                prompt_ids=ids,
                seed=request_seed(
                    run_seed=self.cfg.seed, step=-1, question_id=q.id, stream="prior", index=i
                ),
            )
            for q, ids in questions
            for i in range(samples)
        ]

    @property
    def samples(self) -> int:
        """Count the answers that one run draws."""
        questions = sum(len(benchmark.questions) for benchmark in self.benchmarks.values())
        return questions * (self.cfg.samples + int(self.cfg.greedy))

    def describe(self) -> list[str]:
        """Say what will be drawn, and what of the files cannot be used."""
        cfg, lines = self.cfg, []
        for name, benchmark in self.benchmarks.items():
            lines.append(f"student prompt: {benchmark.shown}")
            dropped = ", ".join(f"{n} dropped ({why})" for why, n in benchmark.dropped.items())
            lines.append(
                f"{name}: {len(benchmark.questions)} questions"
                + (f", {dropped}" if dropped else "")
            )
            lines += [f"{name}: {line}" for line in benchmark.loaded.lines()]
        sampled = f"{cfg.samples} at temperature {cfg.temperature}, top_p {cfg.top_p}"
        # In the order in which they are drawn.
        ways = [sampled] * bool(cfg.samples) + ["1 greedy"] * cfg.greedy
        lines.append(
            f"answers a question: {' and '.join(ways)}; a thought of at most "
            f"{cfg.max_new_tokens} tokens, an answer of {self.sampling.max_answer_tokens}; "
            "student view only"
        )
        return lines

    def run(self, on_progress: Progress | None = None) -> dict[str, dict[str, Any]]:
        """Draw and judge; return {"sampled": {...}, "greedy": {...}}, means over the benchmarks.

        acc          0..1, pass@1 over n samples; acc_low, acc_high its 95 % interval over questions
        tokens       mean generated, thought and answer, cut samples included
        truncated    share of samples that were cut; errors, the number that the engine gave up
        n, questions, dropped   samples; questions; those without a usable reference answer
        eps3         mean over benchmarks of ACC^2 / tokens
        eps3_mean    (mean ACC)^2 / mean tokens
        benchmarks   the same for each, without eps3_mean
        """
        return {
            mode: self._mode(count, sampling, on_progress)
            for mode, (count, sampling) in self.modes().items()
            if count
        }

    def modes(self) -> dict[str, tuple[int, Sampling]]:
        """Give for each mode the answers per question, and how they are drawn."""
        warm = replace(self.sampling, temperature=self.cfg.temperature, top_p=self.cfg.top_p)
        return {
            "sampled": (self.cfg.samples, warm),
            "greedy": (int(self.cfg.greedy), replace(self.sampling, temperature=0.0)),
        }

    def _mode(
        self, samples: int, sampling: Sampling, on_progress: Progress | None
    ) -> dict[str, Any]:
        results = {}
        for name, benchmark in self.benchmarks.items():
            paths, correct_QN = self.answers(benchmark.questions, samples, sampling, on_progress)
            results[name] = _answers(benchmark.questions, paths, correct_QN)
        found = measure(results, seed=self.cfg.seed)
        # What was asked of none of them is known to the benchmarks alone.
        dropped = {name: sum(b.dropped.values()) for name, b in self.benchmarks.items()}
        for name, part in found["benchmarks"].items():
            part["dropped"] = dropped[name]
        return {**found, "dropped": sum(dropped.values())}

    def answers(
        self,
        questions: Sequence[Item],
        samples: int,
        sampling: Sampling,
        on_progress: Progress | None,
    ) -> tuple[list[Path], torch.Tensor]:
        """Draw `samples` paths per question, and judge each: (Q, N) float64 of 1.0 and 0.0."""
        paths = self.engine.generate(self._requests(questions, samples), sampling, on_progress)
        # Request order: the samples of a question stand side by side.
        answers = [q.answer for q, _ in questions for _ in range(samples)]
        correct = answers_correct(paths, answers, decode=self.decode, verify=self.verifier.verify)
        return paths, correct.view(len(questions), samples)


def _answers(questions: Sequence[Item], paths: Sequence[Path], correct_QN: torch.Tensor) -> Answers:
    """Arrange the paths of a benchmark, which stand in the order of its questions."""

    def column(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values)).view(correct_QN.shape)

    return Answers(
        questions=tuple(q.id for q, _ in questions),
        correct_QK=correct_QN,
        tokens_QK=column(path.generated for path in paths),
        cut_QK=column(path.truncated for path in paths),
        error_QK=column(path.finish == "error" for path in paths),
        votes_QK=torch.full(correct_QN.shape, -1),
    )


def make_sampling(
    cfg: RolloutConfig, prompter: Prompter, tokenizer: Any, causal_lm: Any
) -> Sampling:
    """Join the rollout section and the token ids that end a thought and an answer of this model.

    ValueError for a tokenizer that knows these tokens and a model that does not.
    """
    # Token ids from the tokenizer, rows from the model: a resized one may have fewer than it needs.
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    ends = eos_ids(tokenizer, causal_lm.generation_config)
    # The largest id decides: the embedding has rows 0 to rows - 1.
    largest = max(prompter.think_open_id, prompter.think_close_id, *ends)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer's {tokenizer.convert_ids_to_tokens(largest)!r} is token {largest}, but "
            f"the model embeds {rows} tokens; use the tokenizer that belongs to the model, or "
            "enlarge the embedding (resize_token_embeddings) and train it"
        )
    return Sampling(
        max_new_tokens=cfg.max_new_tokens,
        max_answer_tokens=cfg.max_answer_tokens,
        full_answer=cfg.full_answer,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        think_close_id=prompter.think_close_id,
        eos_ids=ends,
    )


@dataclass(frozen=True)
class OpenModel:
    """Holds what an evaluation draws with, and what judges it."""

    text: ModelText
    causal_lm: Any
    engine: RolloutEngine
    verifier: Verifier

    def evaluator(self, cfg: Config, benchmarks: Mapping[str, Benchmark]) -> Evaluator:
        text = self.text
        return Evaluator(
            cfg,
            engine=self.engine,
            benchmarks=benchmarks,
            sampling=make_sampling(cfg.rollout, text.prompter, text.tokenizer, self.causal_lm),
            decode=text.decode,
            verifier=self.verifier,
        )


@contextmanager
def open_model(cfg: Config) -> Iterator[OpenModel]:
    """Open the model directory `cfg.model.path` with `cfg.engine.name`, after `open_text`."""
    text = open_text(cfg)
    # Workers come up in the background while the model loads.
    with Verifier.configured(cfg.verify) as verifier:  # refuses a custom target, too
        causal_lm, engine, weights = _model_and_engine(cfg)
        try:
            # Inside the `try`: a hand-over that fails must not leave vLLM's processes behind.
            if weights is not None:
                engine.load_weights(weights)
            yield OpenModel(text, causal_lm, engine, verifier)
        finally:
            engine.close()


def evaluate_model(cfg: Config, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate the model directory `cfg.model.path` on `cfg.eval.data` with `cfg.engine.name`.

    Returns the result of `Evaluator.run`. `console` shows what is drawn and the time left.
    """
    with open_model(cfg) as model:
        judge = model.verifier.accepts_itself
        if console is not None:
            judge = console.watched(judge, "reference answers")
        evaluator = model.evaluator(cfg, read_benchmarks(cfg, model.text, judge))
        if console is None:
            return evaluator.run()
        for line in evaluator.describe():
            console.message(line)
        return evaluator.run(console.samples(evaluator.samples))


def _model_and_engine(cfg: Config) -> tuple[Any, RolloutEngine, Weights | None]:
    """Open the model, its engine, and the weights that the engine still needs.

    For an engine that is no module the model has no storage.
    """
    world, dtype = World(pick_device(cfg.model.device)), getattr(torch, cfg.model.dtype)
    weights = None
    if cfg.samples_itself:
        # Nothing is trained, so nothing has to be kept for a backward.
        policy = load_policy(replace(cfg.model, activation_checkpointing="none"), world)
        causal_lm = policy.causal_lm
    else:
        # An engine of its own holds the weights: the model here only knows its shapes.
        causal_lm, weights = stored_model(cfg.model.path, dtype)
    engine = open_engine(
        cfg,
        world,
        dtype=dtype,
        hf=lambda: HFEngine(causal_lm, max_batch=cfg.rollout.max_batch, dtype=dtype),
    )
    return causal_lm, engine, weights


def result_table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Lay out what `Evaluator.run` returns as (headers, rows)."""
    # Each benchmark, then the mean where there are several: of one it would repeat the row.
    entries = [
        (name, mode, part)
        for mode, result in results.items()
        for name, part in [*result["benchmarks"].items(), ("mean", result)]
        if name != "mean" or len(result["benchmarks"]) > 1
    ]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "questions": lambda r: str(r["questions"]),
        "samples": lambda r: str(r["n"]),
        "pass@1 %": lambda r: f"{100 * r['acc']:.1f}",
        "95 % interval": lambda r: f"{100 * r['acc_low']:.1f} to {100 * r['acc_high']:.1f}",
        "tokens": lambda r: f"{r['tokens']:.1f}",
        "eps3": lambda r: f"{r['eps3']:.3g}",
        "eps3 of means": lambda r: f"{r.get('eps3_mean', r['eps3']):.3g}",
        "cut %": lambda r: f"{100 * r['truncated']:.1f}",
    }
    rows = [[name, mode, *(cell(r) for cell in columns.values())] for name, mode, r in entries]
    return ["benchmark", "answers", *columns], rows

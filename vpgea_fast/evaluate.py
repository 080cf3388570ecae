"""Evaluate the student view: accuracy, generated tokens, and eps3 = ACC^2 / tokens.

Only `student_ids` are ever sampled from here: no teacher prompt can reach an evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch

from vpgea_fast.config import Config, RolloutConfig
from vpgea_fast.data import Benchmark
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.evaluation import records
from vpgea_fast.evaluation.drawing import Part, Recorder, sample_of
from vpgea_fast.evaluation.folder import Outcome, open_folder, write_whole
from vpgea_fast.evaluation.header import make_header
from vpgea_fast.evaluation.measures import Answers, measure
from vpgea_fast.evaluation.records import Mode
from vpgea_fast.intake import ModelText, open_text, read_benchmarks
from vpgea_fast.metrics import Console
from vpgea_fast.model import frozen, load_policy
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
Draw = Callable[[Sequence[Part]], list[list[Outcome]]]
"""Gives every outcome of the parts, in their order."""
Keep = Callable[[Part, Sequence[Path], torch.Tensor], object]
"""Hears the paths of a part and which of them are right."""
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
        # Whatever training draws: without an answer there is nothing to judge.
        limits: Any = {name: getattr(cfg.eval, name) for name in ("max_new_tokens", "joint_limit")}
        self.sampling = replace(sampling, **limits, full_answer=True)
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

    def parts(self) -> list[Part]:
        """List what one run draws: each mode, and in it each benchmark."""
        return [
            Part(
                benchmark=name,
                mode=mode,
                samples=count,
                sampling=sampling,
                questions=[q for q, _ in benchmark.questions for _ in range(count)],
                requests=self._requests(benchmark.questions, count),
            )
            for mode, (usual, sampling) in self.modes().items()
            for name, benchmark in self.benchmarks.items()
            if (count := self._count(mode, benchmark, usual))
        ]

    @staticmethod
    def _count(mode: Mode, benchmark: Benchmark, usual: int) -> int:
        # A set's own number is of sampled answers: greedy ones would all be the same.
        own = benchmark.samples if mode == "sampled" else None
        return usual if own is None else own

    @property
    def samples(self) -> int:
        """Count the answers that one run draws."""
        answers = self.cfg.answers
        return sum(len(b.questions) * answers(b.samples) for b in self.benchmarks.values())

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
        own = {name: b.samples for name, b in self.benchmarks.items() if b.samples is not None}
        counts = ", ".join(f"{count} of {name}" for name, count in own.items())
        sampled = f"{counts or cfg.samples} at temperature {cfg.temperature}, top_p {cfg.top_p}"
        if own and len(own) < len(self.benchmarks):
            sampled = f"{cfg.samples}, {sampled}"
        # In the order in which they are drawn.
        ways = [sampled] * bool(cfg.samples or own) + ["1 greedy"] * cfg.greedy
        limits = f"a thought of at most {cfg.max_new_tokens} tokens"
        if cfg.joint_limit:
            limits += " with its answer"
        else:
            limits += f", an answer of {self.sampling.max_answer_tokens}"
        lines.append(f"answers a question: {' and '.join(ways)}; {limits}; student view only")
        return lines

    def run(
        self,
        on_progress: Progress | None = None,
        draw: Draw | None = None,
        keep: Keep | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Draw and judge; return {"sampled": {...}, "greedy": {...}}, means over the benchmarks.

        draw   instead of one call of the engine per part: a `Recorder`'s, which keeps records
        keep   hears of each part that one call has drawn

        acc          0..1, pass@1 over n samples; acc_low, acc_high its 95 % interval over questions
        tokens       mean generated, thought and answer, cut samples included
        truncated    share of samples that were cut; errors, the number that the engine gave up
        n, questions, dropped   samples; questions; those without a usable reference answer
        eps3         mean over benchmarks of ACC^2 / tokens
        eps3_mean    (mean ACC)^2 / mean tokens
        benchmarks   the same for each, without eps3_mean
        """
        parts = self.parts()
        # A call of the engine per part: all processes take their share of each.
        one = functools.partial(self._draw, on_progress=on_progress, keep=keep)
        drawn = draw(parts) if draw is not None else [one(part) for part in parts]
        found: dict[str, list[tuple[Part, list[Outcome]]]] = {}
        for part, outcomes in zip(parts, drawn, strict=True):
            found.setdefault(part.mode, []).append((part, outcomes))
        return {mode: self._mode(of_mode) for mode, of_mode in found.items()}

    def modes(self) -> dict[Mode, tuple[int, Sampling]]:
        """Give for each mode the usual answers per question, and how they are drawn."""
        warm = replace(self.sampling, temperature=self.cfg.temperature, top_p=self.cfg.top_p)
        return {
            "sampled": (self.cfg.samples, warm),
            # One at most: more of them would be the same answer.
            "greedy": (int(self.cfg.greedy), replace(self.sampling, temperature=0.0)),
        }

    def _mode(self, found: Sequence[tuple[Part, list[Outcome]]]) -> dict[str, Any]:
        results = {part.benchmark: _answers(part, outcomes) for part, outcomes in found}
        whole = measure(results)
        # What was asked of none of them is known to the benchmarks alone.
        dropped = {name: sum(self.benchmarks[name].dropped.values()) for name in results}
        for name, part in whole["benchmarks"].items():
            part["dropped"] = dropped[name]
        return {**whole, "dropped": sum(dropped.values())}

    def _draw(self, part: Part, on_progress: Progress | None, keep: Keep | None) -> list[Outcome]:
        """Draw a part in one call: with several processes a collective."""
        paths = self.engine.generate(part.requests, part.sampling, on_progress)
        correct = self.judge(paths, [question.spellings for question in part.questions])
        if keep is not None:
            keep(part, paths, correct)
        return [
            Outcome(path.generated, path.finish, int(right))
            for path, right in zip(paths, correct.tolist(), strict=True)
        ]

    def judge(self, paths: Sequence[Path], golds: Sequence[tuple[str, ...]]) -> torch.Tensor:
        """Judge every path by the spellings of its answer: (len(paths),) float64, 1.0 or 0.0."""
        asked: Any = {"decode": self.decode, "verify": self.verifier.verify}
        return answers_correct(paths, golds, **asked, tag=self.sampling.tag)

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
        answers = [q.spellings for q, _ in questions for _ in range(samples)]
        return paths, self.judge(paths, answers).view(len(questions), samples)


def _answers(part: Part, outcomes: Sequence[Outcome]) -> Answers:
    """Arrange the outcomes of a part: the draws of a question stand side by side."""

    def column(values: Iterable[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype).view(-1, part.samples)

    return Answers(
        questions=tuple(question.id for question in part.questions[:: part.samples]),
        correct_QK=column((o.correct for o in outcomes), torch.float64),
        tokens_QK=column((o.tokens for o in outcomes), torch.int64),
        cut_QK=column((o.finish == "length" for o in outcomes), torch.bool),
        error_QK=column((o.finish == "error" for o in outcomes), torch.bool),
        # Nobody votes: predictions are kept in records, and an outcome has none.
        votes_QK=column((-1 for _ in outcomes), torch.int64),
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
    largest = max(*prompter.think_open_ids, *prompter.think_close_ids, *ends)
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
        **prompter.closing,
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
def open_model(
    cfg: Config, text: ModelText, verifier: Verifier, world: World | None = None
) -> Iterator[OpenModel]:
    """Open the model directory `cfg.model.path` with `cfg.engine.name`; whole in each process of
    `world`, on its device. `text` is what `open_text` says of it."""
    device = pick_device(cfg.model.device) if world is None else world.device
    causal_lm, engine, weights = _model_and_engine(cfg, World(device))
    try:
        # Inside the `try`: a hand-over that fails must not leave vLLM's processes behind.
        if weights is not None:
            engine.load_weights(weights)
        yield OpenModel(text, causal_lm, engine, verifier)
    finally:
        engine.close()


def evaluate_step(
    cfg: Config, evaluator: Evaluator, step: int, *, world: World, on_progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Evaluate the weights of a training step; with eval.records the process that writes a run's
    files keeps the answers in RUN/evals/step_N. A collective."""
    if not cfg.eval.records:
        return evaluator.run(on_progress)
    lines: list[str] = []

    def keep(part: Part, paths: Sequence[Path], correct: torch.Tensor) -> None:
        reading: Any = {"decode": evaluator.decode, "checker": cfg.verify.name}
        for place, (path, right) in enumerate(zip(paths, correct.tolist(), strict=True)):
            sample = sample_of(part, place, path, correct=int(right), **reading)
            lines.append(records.line(sample))

    results = evaluator.run(on_progress, keep=keep if world.main else None)
    header = make_header(
        cfg, evaluator.benchmarks, wave=evaluator.engine.wave, command=["train", cfg.run.dir]
    )
    # The run's own weights: its base is what model.path names.
    header["model"] = {"path": cfg.run.dir, "fingerprint": f"{cfg.run.dir}, step {step}"}
    folder = FilePath(cfg.run.dir) / "evals" / f"step_{step}"
    world.on_main(lambda: write_whole(folder, header, lines))
    return results


@dataclass(frozen=True)
class Record:
    """Where an evaluation keeps its records, whether it may go on with some that are there, the
    command that asked for it, and the processes that share it."""

    folder: FilePath
    resume: bool
    command: Sequence[str]
    world: World


def evaluate_model(
    cfg: Config, console: Console | None = None, record: Record | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate the model directory `cfg.model.path` on `cfg.eval.data` with `cfg.engine.name`.

    Returns the result of `Evaluator.run`. `console` shows what is drawn and the time left.
    """
    text, world = open_text(cfg), None if record is None else record.world
    # Workers come up in the background while the questions are read.
    with Verifier.configured(cfg.verify) as verifier:  # refuses a custom target, too
        judge = verifier.accepts_itself
        if console is not None:
            judge = console.watched(judge, "reference answers")
        # Before the weights: their errors must not wait for minutes of reading.
        benchmarks = read_benchmarks(cfg, text, judge)
        with open_model(cfg, text, verifier, world) as model:
            return _evaluated(cfg, model.evaluator(cfg, benchmarks), console, record)


def _evaluated(
    cfg: Config, evaluator: Evaluator, console: Console | None, record: Record | None
) -> dict[str, dict[str, Any]]:
    """Draw and judge, and say what was not judged. A collective with a record."""
    if console is not None:
        for line in evaluator.describe():
            console.message(line)
    # From here: a reference answer without a verdict has been dropped and told before.
    unjudged = evaluator.verifier.unjudged
    if record is not None:
        results = _recorded(cfg, evaluator, console, record)
    else:
        total = evaluator.samples
        results = evaluator.run(None if console is None else console.samples(total))
    lost = evaluator.verifier.unjudged - unjudged
    if record is not None:
        lost = sum(record.world.gather(lost))
    if console is not None and lost:
        console.message(
            f"verdicts that are missing, whose answers count as wrong: {lost}; judging took "
            f"more than verify.timeout_s ({cfg.verify.timeout_s:g} s), or ended its process"
        )
    return results


def _recorded(
    cfg: Config, evaluator: Evaluator, console: Console | None, record: Record
) -> dict[str, dict[str, Any]]:
    """Run with a folder of records. A collective."""
    note = console.message if console is not None else lambda _: None
    world, wave = record.world, evaluator.engine.wave
    header = make_header(cfg, evaluator.benchmarks, wave=wave, command=record.command)
    # What will be drawn, before it is: a folder of another plan is refused, not mixed.
    plan = {key: value for part in evaluator.parts() for key, value in part.plan.items()}
    with open_folder(
        record.folder, header=header, world=world, plan=plan, resume=record.resume, note=note
    ) as folder:
        recorder = Recorder(
            folder,
            world,
            evaluator.engine,
            judge=evaluator.judge,
            decode=evaluator.decode,
            checker=cfg.verify.name,
            note=note,
        )
        progress = None if console is None else console.samples
        return evaluator.run(draw=lambda parts: recorder.draw(parts, progress))


def _model_and_engine(cfg: Config, world: World) -> tuple[Any, RolloutEngine, Weights | None]:
    """Open the model, its engine, and the weights that the engine still needs.

    For an engine that is no module the model has no storage.
    """
    dtype, weights = getattr(torch, cfg.model.dtype), None
    if cfg.samples_itself:
        causal_lm = load_policy(frozen(cfg.model), world).causal_lm
    else:
        # An engine of its own holds the weights: the model here only knows its shapes.
        causal_lm, weights = stored_model(cfg.model.path, dtype)
    engine = open_engine(
        cfg,
        world,
        dtype=dtype,
        hf=lambda: HFEngine(causal_lm, max_batch=cfg.rollout.max_batch),
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

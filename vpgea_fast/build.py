"""The stages of a training run, made once by `build` and handed to the trainer as one record.

    intake (questions, benchmarks) -> check_config -> policies, optimisers -> engine -> probe
                                                              -> evaluator, collector -> start

Everything that can be refused without a weight is refused before the policy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpgea_fast.check import (
    check_config,
    draws,
    longest,
    loose_limits,
    slow_engine,
    slow_layers,
    target,
    unread_keys,
    whole_pass,
)
from vpgea_fast.checkpoint import Saver
from vpgea_fast.collect import Collector
from vpgea_fast.config import Config
from vpgea_fast.data import step_shares
from vpgea_fast.distributed import World
from vpgea_fast.estimate import Choice, choose, model_shape, score_tokens
from vpgea_fast.evaluate import Evaluator, make_sampling
from vpgea_fast.gradients import Gradients
from vpgea_fast.intake import Intake, open_text, read, read_records
from vpgea_fast.measure import Measure
from vpgea_fast.metrics import Console, model_flops
from vpgea_fast.model import Policy, make_replica
from vpgea_fast.objectives import reads_reference
from vpgea_fast.passes import Passes
from vpgea_fast.policies import Policies, open_policies, posterior_model
from vpgea_fast.prompts import Prompter, length_report
from vpgea_fast.questions import check_questions
from vpgea_fast.reference import Reference, check_models, reference_path
from vpgea_fast.rollout.engine import RolloutEngine
from vpgea_fast.rollout.factory import open_engine
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.rollout.probe import Score, SyncProbe
from vpgea_fast.rollout.recorded import Records
from vpgea_fast.rollout.turns import Turns
from vpgea_fast.step_start import StepStart
from vpgea_fast.stop import Stop
from vpgea_fast.types import PromptedQuestion
from vpgea_fast.verify import Verifier

Progress = Callable[[int], Callable[[int], None]]
"""`progress(total)` gives a function that takes the number of newly finished samples."""


@dataclass(frozen=True)
class Stages:
    """The parts of a training run. Nothing else holds the model, so dropping them frees it."""

    intake: Intake
    policies: Policies
    passes: Passes
    saver: Saver
    engine: RolloutEngine
    turns: Turns
    evaluator: Evaluator
    start: StepStart
    verifier: Verifier
    reference: Reference | None
    notes: tuple[str, ...]
    """What memory has decided, and what was odd about the paths that are replayed."""

    @property
    def policy(self) -> Policy:
        """The reasoning model: what is evaluated and exported."""
        return self.policies["policy"].policy

    @property
    def collector(self) -> Collector:
        return self.start.collector

    @property
    def measure(self) -> Measure:
        return self.start.measure

    @property
    def gradients(self) -> Gradients:
        return self.start.gradients

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The policy's own."""
        return self.policies["policy"].optimizer

    def close(self) -> None:
        """End what runs beside this process: the engine, and the workers that judge; drop the
        reference policy."""
        if self.reference is not None:
            self.reference.close()
        # The workers end even where an engine's child does not answer.
        try:
            self.engine.close()
        finally:
            self.verifier.close()


def build(cfg: Config, world: World, *, stop: Stop, progress: Progress, begin: int = 0) -> Stages:
    """Make every stage of `cfg`, or leave nothing running; `begin` is the step that it goes on
    with, from 0, and `stop` what may end an update. A collective.

    Errors: ValueError, with its key and the remedy, for what cannot work.
    """
    cfg = cfg.asked
    with ExitStack() as undo:
        # The workers start in half a second each, beside the reading of the questions.
        verifier = undo.enter_context(Verifier.configured(cfg.verify, world))
        intake = _read(cfg, world, verifier)
        # Each process reads all files: one that cannot ends the others, too.
        with world.together():
            records = read_records(cfg, intake, begin)
        choice = _choose(cfg, world, intake)
        cfg = choice.made(cfg)
        # From here on memory of the device is taken; all that needs none was refused above.
        policies = open_policies(
            cfg, world, lambda policy: _passes(cfg, world, policy, intake.text.config)
        )
        policy, passes = policies["policy"].policy, policies.passes
        posterior = None if policies.posterior is None else policies.posterior.policy
        saver = _build_saver(cfg, world, policies)
        # Before the engine: a vLLM that samples leaves no room to load in.
        reference = Reference(cfg, world, passes) if reads_reference(cfg.objective) else None
        engine = _build_engine(cfg, world, policy, records)
        undo.callback(engine.close)
        # U is a likelihood, at temperature 1 whatever the paths were drawn at.
        score = policies.scorer(1.0)
        text, first = intake.text, intake.questions[0]
        probe = _build_probe(cfg, world, policies, engine=engine, score=score, first=first)
        turns = Turns(
            engine,
            policy,
            whole=cfg.samples_itself and not policy.sharded,
            probe=probe,
            every=cfg.rollout.probe_every,
        )
        sampling = make_sampling(cfg.rollout, text.prompter, text.tokenizer, policy.causal_lm)
        # Both refuse, before the first step, a path that the engine has no room for.
        evaluator = Evaluator(
            cfg,
            engine=engine,
            benchmarks=intake.benchmarks,
            sampling=sampling,
            decode=text.decode,
            verifier=verifier,
        )
        collector = Collector(
            cfg,
            intake.questions,
            prompt=text.prompter.prompt,
            responses=text.prompter.responses,
            row_logprobs=score,
            # Of the distribution that drew them.
            path_logprobs=policies.scorer(cfg.rollout.temperature),
            reference=reference,
            posterior=posterior,
            turns=turns,
            sampling=sampling,
            decode=text.decode,
            verifier=verifier,
            progress=progress,
        )
        collector.check()
        start = _build_start(
            cfg, world, policies, collector=collector, decode=text.decode, stop=stop
        )
        # From here on `Stages.close` ends what was started.
        undo.pop_all()
    return Stages(
        intake=intake,
        policies=policies,
        passes=passes,
        saver=saver,
        engine=engine,
        turns=turns,
        evaluator=evaluator,
        start=start,
        verifier=verifier,
        reference=reference,
        notes=(*filter(None, [choice.reason]), *(() if records is None else records.notes)),
    )


def _read(cfg: Config, world: World, verifier: Verifier) -> Intake:
    """Read the questions and benchmarks; refuse what they and the model's shapes rule out."""
    text = open_text(cfg, world.size)
    # A bar on a terminal; in a plain log no line, however long the judging takes.
    with closing(Console(silent=not world.main, quiet_s=math.inf)) as console:
        judge = console.watched(verifier.accepts_itself, "reference answers")
        intake = read(cfg, text, judge, world)
    known = {"prompt": text.prompter.prompt, "responses": text.prompter.responses}
    check_questions(cfg, intake.questions, **known, verify=verifier.verify)
    check_models(cfg, text.config, text.tokenizer)
    check_config(
        cfg, text.config, world.size, questions=intake.questions, benchmarks=intake.benchmarks
    )
    return intake


def _choose(cfg: Config, world: World, intake: Intake) -> Choice:
    """Choose what memory decides. A collective."""
    prompt, _ = longest(cfg, intake.questions)
    context = max(asked + new for _, asked, new in draws(cfg, intake.questions, intake.benchmarks))
    found = choose(
        lambda: model_shape(intake.text.config),
        cfg,
        world=world.size,
        cuda=world.device.type == "cuda",
        context=context,
        prompt=prompt,
        device_bytes=target(cfg).device_bytes,
    )
    # Process 0's word: with gradients of other units processes would wait for each other.
    return Choice(*world.gather([found.grade, found.accumulate, found.reason])[0])


def _passes(cfg: Config, world: World, policy: Policy, model_config: Any) -> Passes:
    """What runs rows through models of the shapes of `policy`. A collective."""
    on_cuda = world.device.type == "cuda"
    # A model without storage is made only where its shapes are asked for.
    tokens = cfg.train.score_tokens or score_tokens(
        model_shape(model_config), cfg, world=world.size, cuda=on_cuda
    )
    # Process 0's word: with plans of another budget processes would wait for each other.
    tokens, flops = world.gather(tokens)[0], model_flops(policy.causal_lm.config)
    return Passes(world, cfg.train.micro_batch_tokens, flops, tokens)


def _build_saver(cfg: Config, world: World, policies: Policies) -> Saver:
    """Make what saves checkpoints. A collective where a thread writes: it opens connections."""
    return Saver(
        Path(cfg.run.dir),
        world=world,
        **policies.kept(),
        keep_last=cfg.checkpoint.keep_last,
        background=cfg.checkpoint.background,
    )


def _build_engine(
    cfg: Config, world: World, policy: Policy, records: Records | None
) -> RolloutEngine:
    """Open the engine. With `hf` the trained module samples, or a copy beside a sharded one."""

    def hf() -> HFEngine:
        # A sharded model would gather its weights for every token; the copy costs its size once.
        return HFEngine(
            make_replica(policy, cfg.model.path) if policy.sharded else policy.causal_lm,
            max_batch=cfg.rollout.max_batch,
            complete=not policy.sharded,  # the replica's weights come with the first hand-over
        )

    return open_engine(cfg, world, dtype=policy.dtype, hf=hf, records=records)


def _build_probe(
    cfg: Config,
    world: World,
    policies: Policies,
    *,
    engine: RolloutEngine,
    score: Score,
    first: PromptedQuestion,
) -> SyncProbe:
    """Make the probe of a hand-over, with one prompt per view: see rollout/probe.py."""
    return SyncProbe(
        engine,
        score,
        [first.student_ids, first.teacher_ids],
        engines=world.size,
        limit=cfg.rollout.max_new_tokens,
        dtype=policies["policy"].policy.dtype,
        tolerance=cfg.rollout.probe_tolerance,
        policies=tuple(policies.learners),
    )


def _build_start(
    cfg: Config,
    world: World,
    policies: Policies,
    *,
    collector: Collector,
    decode: Callable[[torch.Tensor], str],
    stop: Stop,
) -> StepStart:
    """Make what begins a step, with what measures it and what adds up its gradients."""
    return StepStart(
        cfg=cfg,
        collector=collector,
        measure=Measure(
            cfg=cfg,
            world=world,
            policies=policies,
            passes=policies.passes,
            logprobs=policies.scorer(cfg.rollout.temperature),
            decode=decode,
        ),
        gradients=Gradients(cfg, world=world, policies=policies, stop=stop),
        stop=stop,
    )


def introduction(cfg: Config, stages: Stages, world: World) -> Iterator[str]:
    """Say both prompts, their lengths, what will be drawn, and what the preset leaves out."""
    intake, policy = stages.intake, stages.policy
    if slow := slow_engine(cfg, cuda=policy.device.type == "cuda"):
        yield slow
    yield from slow_layers(cfg, attention=policy.attention.name, cuda=policy.device.type == "cuda")
    first, prompter = intake.questions[0], intake.text.prompter
    # Most runs that learn nothing show it here: a template that lost its tag, a prompt cut short.
    yield f"student prompt: {prompter.shown(first.student_ids)}"
    draws = cfg.objective.draws()
    if draws.teacher:
        yield f"teacher prompt: {prompter.shown(first.teacher_ids)}"
    yield intake.counts
    yield from intake.lines()
    for name, benchmark in intake.benchmarks.items():
        for line in benchmark.loaded.lines():
            yield f"benchmark {name}: {line}"
    if cfg.data.weights is not None:
        shares = step_shares(cfg.data.weights, cfg.train.questions_per_step)
        yield "questions a step: " + ", ".join(f"{count} of {n}" for n, count in shares.items())
    yield f"prompt tokens: {length_report(intake.questions)}"
    paths, samples = ("responses", "of the data") if draws.given else ("paths", "samples")
    yield (
        f"{cfg.objective.name}: {cfg.train.steps} steps x {cfg.train.questions_per_step} "
        f"questions x {draws.paths} {paths} = "
        f"{cfg.train.steps * cfg.train.questions_per_step * draws.paths} {samples}"
    )
    yield from whole_pass(cfg, len(intake.questions))
    if cfg.train.max_tokens is not None:
        yield f"ends before where {cfg.train.max_tokens} tokens are sampled"
    shards = f", sharded over {world.size} processes" if policy.sharded else ""
    states = ", states of the optimiser in host memory" if policy.hosted else ""
    yield f"device {policy.device}{shards}{states}, loss backend {policy.backend.name}"
    yield str(policy.attention)
    trained, scored = stages.passes.budget, stages.passes.scoring.budget
    if scored != trained:
        yield f"tokens of a forward: {trained} that trains, {scored} without gradients"
    if stages.policies.posterior is not None:
        rate = stages.policies.posterior.optim.lr
        yield f"posterior policy {posterior_model(cfg).path}, weights of its own, lr {rate:.3g}"
    if stages.reference is not None:
        yield f"reference policy {reference_path(cfg)}, on {cfg.model.reference}"
    yield from stages.notes
    yield from _caveats(cfg, prompter)


def _caveats(cfg: Config, prompter: Prompter) -> Iterator[str]:
    """Say what a user of these settings should know before trusting the curves."""
    yield from cfg.objective.notes()
    if prompter.tag is not None:
        yield (
            f"prompt.think_close {prompter.tag.text!r} is {len(prompter.tag.ids)} tokens of this "
            "model: a thought ends where its text says so"
        )
    yield from loose_limits(cfg)
    yield from unread_keys(cfg)
    # Legal settings all: a measurement may want them, so they are said and not refused.
    if not cfg.rollout.full_answer:
        yield (
            "rollout.full_answer is false: no answer is verified while training, so the alarm "
            "for a falling accuracy is blind"
        )
    if cfg.rollout.top_p < 1:
        yield (
            f"rollout.top_p {cfg.rollout.top_p} < 1: paths are not drawn from the model that "
            "the gradient assumes; use 1.0"
        )

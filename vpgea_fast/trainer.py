"""The one loop: rollout -> score -> coefficients -> packed update -> log -> save.

The same on a laptop and on a node. build.py makes the stages, collect.py draws and scores the paths
of a step, run_dir.py keeps the files. This file holds the only mutable state of a run: parameters,
optimiser, step counter.

From Python:

    from vpgea_fast.config import load
    from vpgea_fast.trainer import Callback, StopTraining, fit

    class UntilItIsShort(Callback):
        def on_step(self, metrics):
            print(metrics["step"], metrics["loss"])
            if metrics["len_prior"] < 20:
                raise StopTraining

    ending = fit(load("configs/tiny.yaml", ["--run.dir", "runs/b"]), callbacks=[UntilItIsShort()])
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from vpgea_fast import callbacks as listeners
from vpgea_fast import checkpoint, diagnostics
from vpgea_fast.build import Stages, build, introduction
from vpgea_fast.callbacks import Callback, Ending, Run, StopTraining
from vpgea_fast.config import Config, as_dict
from vpgea_fast.distributed import Stopped, World, open_world
from vpgea_fast.evaluate import evaluate_step
from vpgea_fast.measure import evaluation_metrics
from vpgea_fast.metrics import Alarms, Console, MetricsWriter, PhaseTimer
from vpgea_fast.model import Policy
from vpgea_fast.objectives import Terms
from vpgea_fast.policies import Share, joined
from vpgea_fast.profiling import StepTrace
from vpgea_fast.rollout.engine import Usage
from vpgea_fast.rows import Scale, build_rows, checksum, minibatches
from vpgea_fast.run_dir import RunDir
from vpgea_fast.stop import Stop
from vpgea_fast.types import PackedBatch, PathKey, ScoredBatch, StepStats, TrainRow
from vpgea_fast.updates import Rollout, Updates, rescored, revived
from vpgea_fast.values import merge
from vpgea_fast.watch import Watch

__all__ = ["Callback", "Ending", "Run", "StopTraining", "Trainer", "TrainingError", "fit"]

MAX_SKIPPED_IN_A_ROW = 5
NO_PATHS = "the engine gave up a path of every question; see engine.timeout_s"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def fit(cfg: Config, *, resume: bool = False, callbacks: Sequence[Callback] = ()) -> Ending:
    """Train in `cfg.run.dir` to the last step, unless the run is stopped or has to halt.

    A stopped run is saved first. With `resume` the run directory's newest checkpoint is continued,
    bitwise as if it had never stopped. `callbacks` listen and may stop the run (see `Callback`);
    `cfg` comes from `vpgea_fast.config.load` or `resolve`. Under torchrun each process calls `fit`
    with the same arguments. Errors: ValueError for bad input, CheckpointError for the run
    directory, TrainingError for a run that diverges, and what a callback raises.
    """
    with Trainer(cfg, resume=resume, callbacks=callbacks) as trainer:
        trainer.introduce()
        try:
            trainer.evaluate_once("before")
            while not trainer.over:
                stats = trainer.train_step()
                trainer.finish_step(stats)
            trainer.evaluate_once("after")
        # Raised only where the state is whole: between samples, micro-batches, updates or steps.
        except Stopped:
            return trainer.leave()
        return trainer.finish_run()


class Trainer:
    """The stages of one run. Use as a context manager; see `fit` for the loop."""

    # What was asked for.
    cfg: Config
    callbacks: tuple[Callback, ...]

    # Where it runs, what it writes to, and when it must leave.
    world: World
    run: RunDir
    stop: Stop
    watch: Watch

    # What it works with: model, optimiser, engine, questions. See build.py.
    stages: Stages

    # What it tells. Only the main process writes metrics, and has a console that is not silent.
    metrics: MetricsWriter | None
    console: Console
    say: Callable[[str], object]
    alarms: Alarms
    trace: StepTrace

    # All that changes in a run, beside parameters, optimiser state and random generators.
    step: int
    tokens: int  # sampled so far
    method: Mapping[str, Any]  # what the objective keeps from step to step
    rollout: Rollout | None  # of the step under way, from its first update on
    skipped_in_a_row: int
    worth: dict[int, float]  # checkpoint.keep_best of the evaluated steps
    halted: str | None  # why the run must end before its last step
    offending: list[TrainRow]  # rows of the last step whose gradient was not finite
    saved_at: float  # time.monotonic() of the last save, or of the start

    def __init__(
        self, cfg: Config, *, resume: bool = False, callbacks: Sequence[Callback] = ()
    ) -> None:
        if not isinstance(cfg, Config):
            raise ValueError(
                f"cfg: got {cfg!r:.80}, expected a Config; make it of a file by "
                "vpgea_fast.config.load(FILE), or of keys and values by vpgea_fast.config.resolve"
            )
        self.cfg, self.callbacks = cfg, listeners.check(callbacks)
        self.step, self.tokens, self.skipped_in_a_row, self.worth = 0, 0, 0, {}
        self.halted, self.offending, self.saved_at = None, [], time.monotonic()
        self.method, self.rollout = {}, None
        if cfg.run.threads:
            torch.set_num_threads(cfg.run.threads)
        self.world = open_world(cfg.parallel, cfg.model.device)
        self.stop = Stop(self.world, cfg.run.max_minutes)
        # Both decide about collectives: processes that differ would wait for each other for ever.
        self.world.require_same(resume, "question whether the run has started already")
        self.world.require_same(len(self.callbacks), "number of callbacks")
        self.run = RunDir(cfg, self.world)
        self.alarms = Alarms(cfg.train, replays=cfg.engine.name == "replay")
        self.trace = StepTrace(
            cfg.train.profile_steps if self.world.main else None,
            self.run.path,
            cuda=self.world.device.type == "cuda",
        )
        with ExitStack() as undo:
            self.watch = Watch(self.world)
            undo.callback(self.watch.close)
            undo.callback(self.run.abandon)
            self.run.claim(resume=resume)
            begin = self.run.newest() if resume else 0
            self.stages = build(cfg, self.world, progress=self.progress, begin=begin)
            undo.callback(self.stages.close)
            self._start(resume)
            undo.pop_all()
        self.metrics = MetricsWriter(self.run.path) if self.world.main else None
        self.console = Console(cfg.train.steps, done=self.step, silent=not self.world.main)
        self.say = self.console.message

    def __enter__(self) -> Trainer:
        self.stop.__enter__()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.stop.__exit__()
        self.trace.close()
        try:
            self.stages.saver.close()
        finally:
            for part in (self.console, self.metrics, self.stages):
                if part is not None:
                    part.close()
            self.run.release()
            self.watch.close()
        if error is None:
            del self.stages  # FSDP's state must not outlive the group that the world closes
            self.world.close()

    @property
    def over(self) -> bool:
        """Whether the run has made its steps, has sampled its tokens, or has to halt."""
        limit = self.cfg.train.max_tokens
        spent = limit is not None and self.tokens >= limit
        return spent or self.step >= self.cfg.train.steps or self.halted is not None

    def train_step(self) -> StepStats:
        """Draw, update, sync: one step of the method, or the rest of one that was left.

        No state changes until the first update has every gradient: a step that is left before is
        made again, with the same paths. Later it can be left between two updates.
        """
        self.trace.before(self.step + 1)
        rollout = self.rollout or self.draw()
        for rows in rollout.rest:
            with rollout.timer("train"):
                # The paths stay and the policy moves: clipped ratios are taken anew each time.
                now, clipped, scored = self.stages.measure.moment(rows, moved=rollout.moved)
                metrics, reason = self.update(now, scored)
            rollout = self.rollout = rollout.after(merge(metrics, clipped), reason)
            if rollout.rest:
                self.stop.together()
                if self._late():
                    self.save()
        stats = self.close_step(rollout)
        for line in self.trace.after(self.step + 1):
            self.say(line)
        return stats

    def draw(self) -> Rollout:
        """Collect the paths of a step, weigh them, make rows, diagnose."""
        measure = self.stages.measure
        timer = PhaseTimer(self._synchronize)
        evaluated = self.scheduled_evaluation()
        batch, terms, usage = self.collect(timer)
        with timer("importance"):
            ratios, weighed = measure.importance(batch, terms)
            updates, held = measure.known(self.updates(batch, terms, ratios))
        rows = self.first_pass(updates)
        with timer("diagnose"):  # before the update: of the weights that drew the paths
            diagnosed = self.diagnose(batch, terms, rows)
        return Rollout(
            batch=batch,
            terms=terms,
            ratios=ratios,
            updates=updates,
            rows=rows,
            found=merge(evaluated, diagnosed, weighed, held),
            usage=usage,
            timer=timer,
        )

    def close_step(self, rollout: Rollout) -> StepStats:
        """Hand the weights over and write the step's paths, after its last update."""
        measure, timer = self.stages.measure, rollout.timer
        batch, terms = rollout.batch, rollout.terms
        with timer("sync"):
            synced = self.sync_engine(updated=rollout.moved)
        with timer("diagnose"):
            records = measure.records(batch, terms, self.step + 1)
        if self.metrics is not None:
            self.metrics.write_paths(records)
        # Only the first update is of the policy that drew the paths: how far sampler and trainer
        # are apart is told of it alone.
        update = diagnostics.mean_update([metrics for metrics, _ in rollout.made])
        found = merge(rollout.found, {"paths_written": len(records)})
        trained = rollout.rows * self.cfg.train.epochs
        cost = measure.cost(batch, terms, trained, usage=rollout.usage, seconds=timer.metrics())
        line = merge({"step": self.step + 1}, found, update, synced, cost)
        # Now, with the step whole: until here it rests on the state of the one before.
        self.method, self.rollout = terms.state, None
        return StepStats(metrics=line, skipped=rollout.skipped if batch.whole else NO_PATHS)

    def collect(self, timer: PhaseTimer) -> tuple[ScoredBatch, Terms, Usage]:
        """Draw and score the paths of this step; what the engine says it took."""
        turns = self.stages.turns
        turns.usage()  # what evaluations asked for is not this step's
        batch, terms = self.stages.collector.collect(self.step, timer, self.method)
        turns.engine.rest()  # the update has its memory
        usage = turns.usage()
        self.stop.together()
        return batch, terms, usage

    def updates(
        self, batch: ScoredBatch, terms: Terms, ratios: Mapping[PathKey, torch.Tensor] | None
    ) -> Updates:
        """The rows of every update of this step, in order."""
        scale = Scale.of(self.cfg)
        epochs, several = self.cfg.train.epochs, self.cfg.train.updates > 1
        rows = build_rows(batch, terms, scale, ratios=ratios, several=several)
        return minibatches(batch, rows, scale.updates) * epochs

    def first_pass(self, updates: Updates) -> list[TrainRow]:
        """One pass over the questions, as the first update has them: later epochs repeat it."""
        parts, measure = updates[: self.cfg.train.minibatches], self.stages.measure
        return [row for part in parts for row in measure.moment(part, moved=False)[0]]

    def diagnose(
        self, batch: ScoredBatch, terms: Terms, rows: Sequence[TrainRow]
    ) -> dict[str, float]:
        """What the batch shows; every metrics.diag_every steps also what costs passes of its own:
        two heads over the posterior paths, a forward and backward of all rows."""
        every, measure = self.cfg.metrics.diag_every, self.stages.measure
        found = measure.quality(batch, terms)
        if every and self.step % every == 0:
            found = merge(found, measure.view_divergence(batch, terms), self.stream_norms(rows))
        return found

    def update(
        self, rows: Sequence[TrainRow], scored: diagnostics.Scored
    ) -> tuple[dict[str, float | int], str | None]:
        """The gradient of all rows, one optimiser step; and why there was none, if there was none.

        `scored` are the rows whose log-probs were taken before, for the log. No rows or a
        non-finite gradient leave parameters and optimiser state bitwise unchanged.
        """
        # With unequal rows the processes would add up other sums, or wait for ever, silently.
        self.world.require_same(checksum(rows), "rows of this step and their coefficients")
        policies, steps = self.stages.policies, self.cfg.train.steps
        if not rows:
            found = merge(
                policies.metrics({}, self.step, steps),
                {"skipped": 1},
                diagnostics.row_metrics([], [], scored),
            )
            return found, "no path has a gradient"
        shares = policies.shares(rows)
        logps = self.accumulate(rows, shares)
        policies.reshard()
        norms = policies.update(shares, self.step, steps)
        odd = [norm for norm in norms.values() if not math.isfinite(norm)]
        found = merge(
            policies.metrics(norms, self.step, steps),
            {"skipped": int(bool(odd))},
            diagnostics.row_metrics(rows, logps, scored),
            diagnostics.plan_metrics(joined(shares), rows, self.stages.passes.flops),
        )
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if odd else 0
        if not odd:
            return found, None
        numbers = [(row, torch.cat([row.coef, v])) for row, v in zip(rows, logps, strict=True)]
        self.offending = [row for row, n in numbers if not n.isfinite().all()] or list(rows)
        return found, f"the gradient norm is {odd[0]}"

    def accumulate(
        self, rows: Sequence[TrainRow], plan: Sequence[Share] | None = None
    ) -> list[torch.Tensor]:
        """Add the gradient of `rows` to the parameters of their policies; per-token log-probs of
        every row."""
        policies, temperature = self.stages.policies, self.cfg.rollout.temperature

        def backward(policy: Policy, batch: PackedBatch, last: bool) -> torch.Tensor:
            # What FSDP has accumulated cannot be thrown away.
            if not policy.sharded:
                self.stop.alone()
            policy.expect_backward(last=last)
            out = policy(batch, temperature=temperature)
            out.loss.backward()
            return out.logp.detach()

        try:
            return policies.run(backward, rows, plan)
        except Stopped:  # of a gradient in parts nothing is kept: the update is made again
            policies.drop_gradients()
            raise

    def sync_engine(self, *, updated: bool) -> dict[str, float]:
        """Give the engine the weights, unless it samples with the trained module itself, and see
        that it has them. RolloutError otherwise."""
        turns = self.stages.turns
        if turns.whole:
            return {}
        # Also after a skipped step: an engine that rested has no weights until it is given them.
        # The first hand-over is always probed; later ones cost a rollout of a few tokens each.
        return turns.give(check=not updated or turns.due("policy", self.step))

    def finish_step(self, stats: StepStats) -> None:
        """Count the step, log it, raise alarms, save on schedule, tell the callbacks."""
        drawn = stats.metrics["tokens_generated"]
        assert isinstance(drawn, int)
        self.step, self.tokens = self.step + 1, self.tokens + drawn
        if self.metrics is not None:
            self.metrics.write(stats.metrics)
        self.console.step(stats.metrics)
        if stats.skipped and not self.cfg.train.record:
            self.say(f"step {self.step}: no update, {stats.skipped}")
        for alarm in self.alarms.update(stats.metrics):
            self.say(alarm)
        # Process 0's word: of a resumed run it alone has read the steps before.
        self.halted = self.world.gather(self.alarms.halt)[0]
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            file = self.run.write_rows(self.step, self.offending, self.decode)
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} non-finite gradients in a row at step {self.step}; the "
                f"rows of the last one are in {file}, the last checkpoint is good: lower optim.lr "
                "and go on with --resume"
            )
        # Before the callbacks: one of them may raise, and end the run.
        if self.over or self._save_is_due():
            self.save()
        self._tell("on_step", stats.metrics)
        self.stop.together()

    def introduce(self) -> None:
        """Say what will be trained, and on what; tell the callbacks that the run starts."""
        for text in [*self.run.notices, *introduction(self.cfg, self.stages, self.world)]:
            self.say(text)
        rank, processes = self.world.rank, self.world.size
        run = Run(self.cfg, self.run.path, step=self.step, rank=rank, processes=processes)
        self._tell("on_start", run)

    def evaluate_once(self, when: str) -> None:
        """Evaluate before or after training, into eval.json; a resumed run keeps what is there."""
        known = self.run.evaluations()
        step = 0 if when == "before" else self.step
        samples = self.stages.evaluator.samples
        if not self.stages.evaluator.benchmarks or known.get(when, {}).get("step") == step:
            return
        # The weights between two updates are those of no step.
        if step != self.step or self.rollout is not None:
            self.say(
                "no evaluation before training: it was not asked for when the run began, or "
                f"{self.run.path / 'eval.json'} was removed"
            )
            return
        self.say(f"evaluating {when} training: {samples} answers")
        known[when] = {**self._evaluate(step), "step": step}
        self._count_evaluation(step, known[when])
        self.stop.together()
        self.run.write_evaluations(known)
        results = {mode: result for mode, result in known[when].items() if mode != "step"}
        self._tell("on_evaluation", step, results)

    def _evaluate(self, step: int) -> dict[str, dict[str, Any]]:
        evaluator = self.stages.evaluator
        # The reasoning model is what a benchmark asks, whoever has drawn in this step.
        self.stages.turns.require("policy")
        progress = self.progress(evaluator.samples)
        # A collective: the processes share the questions.
        return evaluate_step(self.cfg, evaluator, step, world=self.world, on_progress=progress)

    def scheduled_evaluation(self) -> dict[str, float]:
        """Evaluate before the step, so that a stop here loses nothing; keys of its metrics."""
        every, evaluator = self.cfg.eval.every, self.stages.evaluator
        if not (every and evaluator.benchmarks) or not self.step or self.step % every:
            return {}
        results = self._evaluate(self.step)
        self._count_evaluation(self.step, results)
        self._tell("on_evaluation", self.step, results)
        return evaluation_metrics(self.step, results)

    def leave(self) -> Ending:
        """Save a run that was stopped, and say how it goes on."""
        self.save()
        self.stages.saver.wait()
        self.say(f"stopped after {self._place()}, saved; go on: --resume {self.run.path}")
        self._tell("on_end", Ending.STOPPED)
        return Ending.STOPPED

    def finish_run(self) -> Ending:
        """Export the model, draw the figure and the report, print the closing table."""
        self.stages.saver.wait()
        for who, name in self.run.exports.items():
            checkpoint.export_model(
                self.stages.policies[who].policy,
                self.stages.intake.text.tokenizer,
                self.run.path / name,
                world=self.world,
                replace=True,
            )
        self.world.on_main(lambda: self.run.report(self.console, self.worth))
        ending = Ending.DONE if self.halted is None else Ending.HALTED
        if self.halted is not None:
            self.say(f"ended after step {self.step}, before train.steps: {self.halted}")
        self._tell("on_end", ending)
        return ending

    def save(self) -> None:
        """Save a checkpoint of this moment, after a step or between two updates of one; in the
        background, if checkpoint.background says so."""
        self.saved_at = time.monotonic()
        best, rollout = self.cfg.checkpoint.keep_best, self.rollout
        self.stages.saver.save(
            self.step,
            {
                "skipped_in_a_row": self.skipped_in_a_row,
                "tokens": self.tokens,
                "method": dict(self.method),
                "data": self.stages.intake.fingerprint,
                "config": as_dict(self.cfg),
                "evaluated": {best: self.worth} if best else {},
            },
            self.worth,
            updates=0 if rollout is None else len(rollout.made),
            rollout=rollout.kept() if rollout is not None and self.world.main else None,
        )

    def stream_norms(self, rows: Sequence[TrainRow]) -> dict[str, float]:
        """Gradient norm of each term alone: one more forward and backward of `rows`, a pass over
        the questions."""
        names = dict.fromkeys(row.term for row in rows)
        if len(names) <= 1:
            return {}  # it is grad_norm
        norms = {}
        for name in names:
            self.accumulate([row for row in rows if row.term == name])
            self.stages.policies.reshard()
            # Each minibatch weighs as much as all questions do: the norm is of their mean.
            norm = self.stages.policies.gradient_norm() / self.cfg.train.minibatches
            norms[f"grad_norm_{name}"] = norm
            # The update adds to what is there: nothing of a measurement may be left.
            self.stages.policies.drop_gradients()
        return norms

    def decode(self, ids: torch.Tensor) -> str:
        return self.stages.intake.text.decode(ids)

    def progress(self, total: int) -> Callable[[int], None]:
        """Shows how many of `total` samples are drawn; a stop request is honoured between them."""
        advance = self.console.samples(total)

        def on_progress(finished: int) -> None:
            self.stop.alone()
            advance(finished)

        return on_progress

    def _start(self, resume: bool) -> None:
        """Take the state of the newest checkpoint, hand the weights over, write the run's files."""
        if resume:
            saved = checkpoint.load_checkpoint(
                self.run.path, world=self.world, **self.stages.policies.kept()
            )
            self.run.restore(saved, self.stages.intake.fingerprint, self.alarms)
            if saved is not None:
                self.step = saved.step
                self.skipped_in_a_row = saved.trainer_state["skipped_in_a_row"]
                self.method = saved.trainer_state.get("method", {})
                self.tokens = saved.trainer_state.get("tokens", 0)
                if saved.updates:
                    self.rollout = checkpoint.read_rollout(saved, self._revive, world=self.world)
                    self.run.notices.append(f"goes on after {self._place()}, with its paths")
            self.worth = self.run.worth(saved)
        self.sync_engine(updated=False)
        if self.rollout is not None:
            self.stages.engine.rest()  # the updates have its memory
        self.run.write_facts(self.stages.policy)

    def _revive(self, kept: Mapping[str, Any]) -> Rollout:
        """The rollout of a checkpoint between two of its updates: nothing is drawn or scored."""
        batch, ratios, collector = revived(kept["batch"]), kept["ratios"], self.stages.collector
        # What the objective says of the same paths is the same; only what was replaced is gone.
        terms = replace(collector.weigh(batch, self.step, self.method), metrics=kept["metrics"])
        updates = rescored(self.updates(batch, terms, ratios), kept["old"])
        rows = self.first_pass(updates)
        if checksum(rows) != kept["rows"]:
            self.run.notices.append(
                "its paths have other coefficients than when they were drawn (another objective, "
                "version or processor): the updates to come take the new ones"
            )
        return Rollout(
            batch=batch,
            terms=terms,
            ratios=ratios,
            updates=updates,
            rows=rows,
            found=kept["found"],
            usage=Usage(*kept["usage"]),
            timer=PhaseTimer(self._synchronize, kept["seconds"]),
            made=kept["made"],
        )

    @property
    def _synchronize(self) -> Callable[[], object] | None:
        return torch.cuda.synchronize if self.stages.measure.on_cuda else None

    def _place(self) -> str:
        """How far the run has come, in words."""
        if self.rollout is None:
            return f"step {self.step}"
        made, of = len(self.rollout.made), len(self.rollout.updates)
        return f"update {made} of {of} of step {self.step + 1}"

    def _tell(self, hook: str, *args: object) -> None:
        """Call a hook of the callbacks; a stop that one asks for is heard at the step's end."""
        if listeners.tell(self.callbacks, self.world, hook, *args):
            self.stop.requested = True

    def _count_evaluation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        best = self.cfg.checkpoint.keep_best
        if best is not None:
            mode, _, key = best.partition("_")
            self.worth[step] = results[mode][key]

    def _save_is_due(self) -> bool:
        """By steps, by the main process's clock, or because the step will be evaluated."""
        cfg = self.cfg.checkpoint
        if cfg.keep_best and self.step % self.cfg.eval.every == 0:
            return True
        return self.step % cfg.save_every == 0 or self._late()

    def _late(self) -> bool:
        """The last save is checkpoint.save_minutes ago, by the main process's clock. A
        collective."""
        minutes = self.cfg.checkpoint.save_minutes
        late = minutes and time.monotonic() - self.saved_at > 60 * minutes
        # `save` is a collective, and clocks differ: one process decides for all.
        return self.world.gather(bool(late))[0]

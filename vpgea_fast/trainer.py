"""The one loop: rollout -> score -> coefficients -> packed update -> log -> save.

The same on a laptop and on a node. The rooms of a step: step_start.py draws and scores its paths,
gradients.py makes an update, schedule.py says when to evaluate and save. build.py makes the stages,
run_dir.py keeps the files. What changes is `Trainer.state`, beside models and optimisers.

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

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from vpgea_fast import callbacks as listeners
from vpgea_fast import checkpoint, diagnostics
from vpgea_fast.build import Stages, build, introduction
from vpgea_fast.callbacks import Callback, Ending, Run, StopTraining
from vpgea_fast.config import Config, as_dict
from vpgea_fast.distributed import Stopped, World, open_world
from vpgea_fast.evaluate import evaluate_step
from vpgea_fast.metrics import Alarms, Console, MetricsWriter
from vpgea_fast.profiling import StepTrace
from vpgea_fast.run_dir import RunDir
from vpgea_fast.run_state import RunState
from vpgea_fast.schedule import Evaluations, Results, Saves
from vpgea_fast.stop import Stop
from vpgea_fast.types import StepStats, TrainRow
from vpgea_fast.updates import Rollout
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
            trainer.evaluations.once("before")
            while not trainer.over:
                stats = trainer.train_step()
                trainer.finish_step(stats)
            trainer.evaluations.once("after")
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

    # What changes, beside parameters, optimiser states and random generators; and what is due.
    state: RunState
    evaluations: Evaluations
    saves: Saves

    def __init__(
        self, cfg: Config, *, resume: bool = False, callbacks: Sequence[Callback] = ()
    ) -> None:
        if not isinstance(cfg, Config):
            raise ValueError(
                f"cfg: got {cfg!r:.80}, expected a Config; make it of a file by "
                "vpgea_fast.config.load(FILE), or of keys and values by vpgea_fast.config.resolve"
            )
        self.cfg, self.callbacks = cfg, listeners.check(callbacks)
        self.state = RunState()
        if cfg.run.threads:
            torch.set_num_threads(cfg.run.threads)
        self.world = open_world(cfg.parallel, cfg.model.device)
        self.stop = Stop(self.world, cfg.run.max_minutes)
        # Both decide about collectives: processes that differ would wait for each other for ever.
        self.world.require_same(resume, "question whether the run has started already")
        self.world.require_same(len(self.callbacks), "number of callbacks")
        self.run, self.saves = RunDir(cfg, self.world), Saves(cfg, self.world)
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
            self.stages = build(
                cfg, self.world, stop=self.stop, progress=self.progress, begin=begin
            )
            undo.callback(self.stages.close)
            self._start(resume)
            self.metrics = MetricsWriter(self.run.path) if self.world.main else None
            undo.pop_all()
        self.console = Console(cfg.train.steps, done=self.state.step, silent=not self.world.main)
        self.say = self.stop.tell = self.console.message
        self.evaluations = Evaluations(
            cfg,
            state=self.state,
            run=self.run,
            stop=self.stop,
            samples=self.stages.evaluator.samples,
            ask=self.evaluate,
            tell=self._tell,
            say=self.say,
        )

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
        limit, state = self.cfg.train.max_tokens, self.state
        spent = limit is not None and state.tokens >= limit
        return spent or state.step >= self.cfg.train.steps or state.halted is not None

    def train_step(self) -> StepStats:
        """Draw, update, sync: one step of the method, or the rest of one that was left.

        No state changes until the first update has every gradient: a step that is left before is
        made again, with the same paths. Later it can be left between two updates.
        """
        self.trace.before(self.state.step + 1)
        rollout = self.state.rollout or self.draw()
        for rows in rollout.rest:
            with rollout.timer("train"):
                # The paths stay and the policy moves: clipped ratios are taken anew each time.
                now, clipped, scored = self.stages.measure.moment(rows, moved=rollout.moved)
                metrics, reason = self.update(now, scored)
            rollout = self.state.rollout = rollout.after(merge(metrics, clipped), reason)
            if rollout.rest:
                self.stop.together()
                if self.saves.late():
                    self.save()
        stats = self.close_step(rollout)
        for line in self.trace.after(self.state.step + 1):
            self.say(line)
        return stats

    def draw(self) -> Rollout:
        """Begin a step: evaluate where that is due, then draw and score its paths."""
        state, evaluated = self.state, self.evaluations.scheduled()
        return self.stages.start.draw(state.step, state.method, known=evaluated)

    def close_step(self, rollout: Rollout) -> StepStats:
        """Hand the weights over and write the step's paths, after its last update."""
        measure, timer = self.stages.measure, rollout.timer
        batch, terms = rollout.batch, rollout.terms
        with timer("sync"):
            synced = self.sync_engine(updated=rollout.moved)
        with timer("diagnose"):
            records = measure.records(batch, terms, self.state.step + 1)
        if self.metrics is not None:
            self.metrics.write_paths(records)
        # Only the first update is of the policy that drew the paths: how far sampler and trainer
        # are apart is told of it alone.
        update = diagnostics.mean_update([metrics for metrics, _ in rollout.made])
        found = merge(rollout.found, {"paths_written": len(records)})
        trained = rollout.rows * self.cfg.train.epochs
        cost = measure.cost(batch, terms, trained, usage=rollout.usage, seconds=timer.metrics())
        line = merge({"step": self.state.step + 1}, found, update, synced, cost)
        # Now, with the step whole: until here it rests on the state of the one before.
        self.state.method, self.state.rollout = terms.state, None
        return StepStats(metrics=line, skipped=rollout.skipped if batch.whole else NO_PATHS)

    def update(
        self, rows: Sequence[TrainRow], scored: diagnostics.Scored
    ) -> tuple[dict[str, float | int], str | None]:
        """Make one update; what it says of itself, and why it changed nothing, if it did not."""
        state = self.state
        update = self.stages.gradients.update(rows, scored, step=state.step)
        if update.offending:
            state.skipped_in_a_row, state.offending = state.skipped_in_a_row + 1, update.offending
        # An update without rows says nothing of the gradients before it.
        elif update.skipped is None:
            state.skipped_in_a_row = 0
        return update.metrics, update.skipped

    def sync_engine(self, *, updated: bool) -> dict[str, float]:
        """Give the engine the weights, unless it samples with the trained module itself, and see
        that it has them. RolloutError otherwise."""
        turns = self.stages.turns
        if turns.whole:
            return {}
        # Also after a skipped step: an engine that rested has no weights until it is given them.
        # The first hand-over is always probed; later ones cost a rollout of a few tokens each.
        return turns.give(check=not updated or turns.due("policy", self.state.step))

    def finish_step(self, stats: StepStats) -> None:
        """Count the step, log it, raise alarms, save on schedule, tell the callbacks."""
        drawn = stats.metrics["tokens_generated"]
        assert isinstance(drawn, int)
        state = self.state
        state.step, state.tokens = state.step + 1, state.tokens + drawn
        if self.metrics is not None:
            self.metrics.write(stats.metrics)
        self.console.step(stats.metrics)
        if stats.skipped and not self.cfg.train.record:
            self.say(f"step {state.step}: no update, {stats.skipped}")
        for alarm in self.alarms.update(stats.metrics):
            self.say(alarm)
        # Process 0's word: of a resumed run it alone has read the steps before.
        state.halted = self.world.gather(self.alarms.halt)[0]
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            file = self.run.write_rows(state.step, state.offending, self.decode)
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} non-finite gradients in a row at step {state.step}; the "
                f"rows of the last one are in {file}, the last checkpoint is good: lower optim.lr "
                "and go on with --resume"
            )
        # Before the callbacks: one of them may raise, and end the run.
        if self.over or self.saves.due(state.step):
            self.save()
        self._tell("on_step", stats.metrics)
        self.stop.together()

    def introduce(self) -> None:
        """Say what will be trained, and on what; tell the callbacks that the run starts."""
        for text in [*self.run.notices, *introduction(self.cfg, self.stages, self.world)]:
            self.say(text)
        rank, processes = self.world.rank, self.world.size
        run = Run(self.cfg, self.run.path, step=self.state.step, rank=rank, processes=processes)
        self._tell("on_start", run)

    def evaluate(self, step: int) -> Results:
        """Ask the benchmarks of the weights as they are, those of `step`. A collective."""
        evaluator = self.stages.evaluator
        # The reasoning model is what a benchmark asks, whoever has drawn in this step.
        self.stages.turns.require("policy")
        progress = self.progress(evaluator.samples)
        # The processes share the questions.
        return evaluate_step(self.cfg, evaluator, step, world=self.world, on_progress=progress)

    def leave(self) -> Ending:
        """Save a run that was stopped, and say how it goes on."""
        self.save()
        self.stages.saver.wait()
        self.say(f"stopped after {self.state}, saved; go on: --resume {self.run.path}")
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
        self.world.on_main(lambda: self.run.report(self.console, self.state.worth))
        halted = self.state.halted
        ending = Ending.DONE if halted is None else Ending.HALTED
        if halted is not None:
            self.say(f"ended after step {self.state.step}, before train.steps: {halted}")
        self._tell("on_end", ending)
        return ending

    def save(self) -> None:
        """Save a checkpoint of this moment, after a step or between two updates of one; in the
        background, if checkpoint.background says so."""
        self.saves.reset()
        state, rollout = self.state, self.state.rollout
        self.stages.saver.save(
            state.step,
            {
                **state.kept(self.cfg.checkpoint.keep_best),
                "data": self.stages.intake.fingerprint,
                "config": as_dict(self.cfg),
            },
            state.worth,
            updates=state.made,
            rollout=rollout.kept() if rollout is not None and self.world.main else None,
        )

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
                self.state.take(saved)
                if saved.updates:
                    self.state.rollout = checkpoint.read_rollout(
                        saved, self._revive, world=self.world
                    )
                paths = ", with its paths" if saved.updates else ""
                self.run.notices.append(f"goes on after {self.state}{paths}")
            self.state.worth = self.run.worth(saved)
        self.sync_engine(updated=False)
        if self.state.rollout is not None:
            self.stages.engine.rest()  # the updates have its memory
        self.run.write_facts(self.stages.policy)

    def _revive(self, kept: Mapping[str, Any]) -> Rollout:
        state, note = self.state, self.run.notices.append
        return self.stages.start.revive(state.step, state.method, kept, note=note)

    def _tell(self, hook: str, *args: object) -> None:
        """Call a hook of the callbacks; a stop that one asks for is heard at the step's end."""
        if listeners.tell(self.callbacks, self.world, hook, *args):
            self.stop.requested = True

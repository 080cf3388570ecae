"""The one loop: rollout -> score -> coefficients -> packed update -> log -> save.

The same on a laptop and on a node. This file composes the stages (collect.py does it for the paths
of a step) and holds the only mutable state of a run: parameters, optimiser, step counter.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import resource
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch

from vpgea_fast import checkpoint, diagnostics, report
from vpgea_fast.collect import Collector
from vpgea_fast.config import (
    Config,
    ConfigError,
    VpgeaConfig,
    as_dict,
    changes,
    dump,
    load,
    resolve,
)
from vpgea_fast.data import (
    fingerprint,
    load_benchmarks,
    load_training,
    long_targets,
    step_shares,
    unfit,
    write_dropped,
)
from vpgea_fast.distributed import Stopped, World, full_weights, open_world, reshard
from vpgea_fast.dry_run import check_config
from vpgea_fast.evaluate import Evaluator, make_sampling
from vpgea_fast.metrics import (
    METRICS,
    PATHS,
    Alarms,
    Console,
    MetricsWriter,
    PhaseTimer,
    environment,
    merge,
    missing_steps,
    model_flops,
    read_steps,
)
from vpgea_fast.model import load_policy, load_tokenizer, make_replica
from vpgea_fast.model_dir import load_config
from vpgea_fast.objectives.rows import build_rows, drawn_rows, truncated_ratios
from vpgea_fast.optim import apply_update, build_optimizer, gradient_norm, learning_rate
from vpgea_fast.packing import RankPlan, drop_zero_rows
from vpgea_fast.passes import Passes
from vpgea_fast.prompts import Prompter, length_report
from vpgea_fast.rollout.engine import RolloutEngine
from vpgea_fast.rollout.factory import SYNC_DIR, check_engine, open_engine
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.rollout.probe import SyncProbe
from vpgea_fast.scoring import score_row
from vpgea_fast.types import (
    Coefficients,
    PackedBatch,
    PathKey,
    ScoredBatch,
    StepStats,
    TrainRow,
)
from vpgea_fast.verify import Verifier

MAX_SKIPPED_IN_A_ROW = 5
FIXED_ON_RESUME = (
    *("model.path", "model.dtype", "model.master_dtype", "optim.name"),
    *("prompt.", "scoring.", "objective.", "rollout.temperature", "rollout.top_p"),
    *("rollout.max_new_tokens", "rollout.full_answer", "rollout.max_answer_tokens"),
    "rollout.importance_cap",
    *("data.", "verify.", "run.seed", "run.threads", "train.norm", "train.questions_per_step"),
)
"""Keys that a resumed run keeps; the rest may change, and the run says so. Of the rollout it is the
distribution of the samples and their weights, not which engine draws them, how many at a time."""
FREE_ON_RESUME = ("data.dropped_file", "verify.workers", "verify.timeout_s")
"""Exceptions: they do not change what is drawn or how it is judged."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class Ending(enum.IntEnum):
    """How a run ended; only DONE is true."""

    STOPPED = 0
    """By a signal or its time: saved, and can go on."""
    DONE = 1
    HALTED = 2
    """Because it learnt nothing more, or wrong: saved, evaluated, exported. See `Alarms.halt`."""

    def __bool__(self) -> bool:
        return self is Ending.DONE


def fit(cfg: Config, *, resume: bool = False) -> Ending:
    """Train to `cfg.train.steps` in `cfg.run.dir`, unless the run is stopped or has to halt.

    A stopped run is saved first. With `resume` the run directory's newest checkpoint is continued,
    bitwise as if it had never stopped. Errors: ValueError for bad input, CheckpointError for the
    run directory, TrainingError for a run that diverges.
    """
    with Trainer(cfg, resume=resume) as trainer:
        trainer.introduce()
        try:
            trainer.evaluate_once("before")
            while trainer.step < cfg.train.steps and trainer.halted is None:
                stats = trainer.train_step()
                trainer.finish_step(stats)
            trainer.evaluate_once("after")
        except Stopped:
            trainer.save()
            trainer.saver.wait()
            trainer.say(f"stopped after step {trainer.step}, saved; go on: --resume {cfg.run.dir}")
            return Ending.STOPPED
        trainer.finish_run()
        if trainer.halted is None:
            return Ending.DONE
        trainer.say(f"ended after step {trainer.step}, before train.steps: {trainer.halted}")
    return Ending.HALTED


class Trainer:
    """The stages of one run. Use as a context manager; see `fit` for the loop."""

    def __init__(self, cfg: Config, *, resume: bool = False) -> None:
        self.cfg, self.run_dir, self.step = cfg, Path(cfg.run.dir), 0
        self.skipped_in_a_row, self.stop_requested = 0, False
        self.before, self.notices = cfg, list[str]()
        self.halted: str | None = None
        self.worth: dict[int, float] = {}
        self.offending: list[TrainRow] = []
        self.began = self.saved = time.monotonic()
        if cfg.run.threads:
            torch.set_num_threads(cfg.run.threads)
        self.world = open_world(cfg.parallel, cfg.model.device)
        self.world.require_same(resume, "question whether the run has started already")
        self.claim: checkpoint.RunLock | None = None
        self.verifier = Verifier.configured(cfg.verify, self.world)
        try:
            self.world.on_main(functools.partial(self._claim, resume))
            self._build_stages()
            if resume:
                self._restore()
            self.sync_engine(updated=False)
            self.world.on_main(self._write_run_files)
        except BaseException:
            self.verifier.close()
            if self.claim is not None:
                self.claim.abandon()
            raise
        self.metrics = MetricsWriter(self.run_dir) if self.world.main else None
        self.console = Console(cfg.train.steps, done=self.step, silent=not self.world.main)
        self.say = self.console.message

    def __enter__(self) -> Trainer:
        signals = (signal.SIGTERM, signal.SIGINT)
        self.previous_handlers = {s: signal.signal(s, self._on_signal) for s in signals}
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        try:
            self.saver.close()
        finally:
            for part in (self.console, self.metrics, self.engine, self.verifier):
                if part is not None:
                    part.close()
            if self.claim is not None:
                self.claim.release()
        if error is None:
            del self.policy, self.engine, self.optimizer, self.collector, self.evaluator
            del self.saver, self.probe
            self.world.close()

    def train_step(self) -> StepStats:
        """One rollout batch, one update. No state changes until `update` has every gradient."""
        cfg, timer = self.cfg, PhaseTimer(torch.cuda.synchronize if self.on_cuda else None)
        evaluated = self._scheduled_evaluation()
        self.engine.usage()  # what evaluations asked for is not this step's
        batch, coefs = self.collector.collect(self.step, timer)
        self.engine.rest()
        used = self.engine.usage()
        self._leave_together()
        with timer("importance"):
            ratios, weighed = self.importance(batch, coefs)
        constant = self.norm_constant
        rows = build_rows(batch, coefs, cfg.train, norm_constant=constant, ratios=ratios)
        rows = drop_zero_rows(rows)
        with timer("diagnose"):
            whole = batch.whole
            seen = diagnostics.batch_metrics(whole) if whole else {}
            engine = {
                "prefix_hit_rate": used.cached_tokens / max(1, used.prompt_tokens),
                "rest_freed_mib": used.freed_bytes / 2**20,
            }
            found = merge(evaluated, seen, coefs.metrics, weighed, engine)
            if cfg.metrics.diag_every and self.step % cfg.metrics.diag_every == 0:
                found = merge(found, self.view_divergence(batch, coefs), self.stream_norms(rows))
            records = diagnostics.path_records(
                batch, coefs, self.decode, step=self.step + 1, limit=cfg.metrics.paths_per_step
            )
        with timer("train"):
            update, skipped = self.update(rows)
        if whole is None:
            skipped = "the engine gave up a path of every question; see vllm.timeout_s"
        with timer("sync"):
            synced = self.sync_engine(updated=skipped is None)
        if self.metrics is not None:
            self.metrics.write_paths(records)
        found = merge(found, {"paths_written": len(records)})
        work = diagnostics.work_metrics(batch, coefs, rows, seconds=timer.metrics())
        speed = diagnostics.speed_metrics(
            rows,
            self.passes.flops,
            seconds=timer.metrics()["time_train_s"],
            device=torch.cuda.get_device_name(self.policy.device) if self.on_cuda else "cpu",
            devices=self.world.size,
        )
        step = {"step": self.step + 1}
        return StepStats(
            metrics=merge(step, found, update, synced, work, speed, self._memory()), skipped=skipped
        )

    def importance(
        self, batch: ScoredBatch, coefs: Coefficients
    ) -> tuple[dict[PathKey, torch.Tensor] | None, dict[str, float]]:
        """Truncated p_trainer / p_engine of every token with a gradient, and the share that was
        cut: one forward more, of the paths in the view that drew them."""
        cap = self.cfg.rollout.importance_cap
        if cap is None:
            return None, {}
        rows = drawn_rows(batch, coefs)
        temperature = self.cfg.rollout.temperature
        scored = self.passes(
            lambda b, _: self.policy.logprob(b, temperature=temperature), list(rows.values())
        )
        return truncated_ratios(rows, scored, cap=cap)

    def update(self, rows: Sequence[TrainRow]) -> tuple[dict[str, float | int], str | None]:
        """The gradient of all rows, one optimiser step; and why there was none, if there was none.

        No rows or a non-finite gradient leave parameters and optimiser state bitwise unchanged.
        """
        self.world.require_same(_checksum(rows), "rows of this step and their coefficients")
        lr = learning_rate(self.cfg.optim, self.step, self.cfg.train.steps)
        if not rows:
            found = merge(
                {"lr": lr, "grad_norm": 0.0, "skipped": 1}, diagnostics.row_metrics([], [])
            )
            return found, "no path has a gradient"
        plan = self.passes.plan(rows)
        logps = self.accumulate(rows, plan)
        reshard(self.policy)
        norm = apply_update(self.optimizer, lr=lr, max_grad_norm=self.cfg.optim.max_grad_norm)
        found = merge(
            {"lr": lr, "grad_norm": norm, "skipped": int(not math.isfinite(norm))},
            diagnostics.row_metrics(rows, logps),
            diagnostics.plan_metrics(plan, rows, self.passes.flops),
        )
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if math.isfinite(norm):
            return found, None
        numbers = [(row, torch.cat([row.coef, v])) for row, v in zip(rows, logps, strict=True)]
        self.offending = [row for row, n in numbers if not n.isfinite().all()] or list(rows)
        return found, f"the gradient norm is {norm}"

    def accumulate(
        self, rows: Sequence[TrainRow], plan: Sequence[RankPlan] | None = None
    ) -> list[torch.Tensor]:
        """Add the gradient of `rows` to the parameters; per-token log-probs of every row."""

        def backward(batch: PackedBatch, last: bool) -> torch.Tensor:
            if not self.policy.sharded:  # what FSDP has accumulated cannot be thrown away
                self._check_stop()
            self.policy.expect_backward(last=last)
            out = self.policy(batch, temperature=self.cfg.rollout.temperature)
            out.loss.backward()
            return out.logp.cpu()

        return self.passes(backward, rows, plan)

    def finish_step(self, stats: StepStats) -> None:
        """Count the step, log it, raise alarms, save on schedule."""
        self.step += 1
        if self.metrics is not None:
            self.metrics.write(stats.metrics)
        self.console.step(stats.metrics)
        if stats.skipped:
            self.say(f"step {self.step}: no update, {stats.skipped}")
        for alarm in self.alarms.update(stats.metrics):
            self.say(alarm)
        # Process 0's word: of a resumed run it alone has read the steps before.
        self.halted = self.world.gather(self.alarms.halt)[0]
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            file = self.run_dir / f"nonfinite_step_{self.step}.jsonl"
            self.world.on_main(lambda: self._write_rows(file, self.offending))
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} non-finite gradients in a row at step {self.step}; the "
                f"rows of the last one are in {file}, the last checkpoint is good: lower optim.lr "
                "and go on with --resume"
            )
        ends = self.halted is not None or self.step == self.cfg.train.steps
        if ends or self._save_is_due():
            self.save()
        self._leave_together()

    def introduce(self) -> None:
        """Show both prompts, their lengths, what will be drawn, and what the preset leaves out."""
        cfg, first, say = self.cfg, self.questions[0], self.say
        for text in self.notices:
            say(text)
        say(f"student prompt: {self.prompter.shown(first.student_ids)}")
        if cfg.objective.posterior_paths:
            say(f"teacher prompt: {self.prompter.shown(first.teacher_ids)}")
        say(f"{len(self.questions)} questions, {_counts(self.loaded.dropped)}")
        for line in [*self.loaded.lines(), *long_targets(self.questions)]:
            say(line)
        for name, benchmark in self.evaluator.benchmarks.items():
            for line in benchmark.loaded.lines():
                say(f"benchmark {name}: {line}")
        if cfg.data.weights is not None:
            shares = step_shares(cfg.data.weights, cfg.train.questions_per_step)
            say("questions a step: " + ", ".join(f"{count} of {n}" for n, count in shares.items()))
        say(f"prompt tokens: {length_report(self.questions)}")
        paths = cfg.objective.posterior_paths + cfg.objective.prior_paths
        say(
            f"{cfg.objective.name}: {cfg.train.steps} steps x {cfg.train.questions_per_step} "
            f"questions x {paths} paths = "
            f"{cfg.train.steps * cfg.train.questions_per_step * paths} samples"
        )
        shards = f", sharded over {self.world.size} processes" if self.policy.sharded else ""
        say(f"device {self.policy.device}{shards}, loss backend {self.policy.backend.name}")
        say(str(self.policy.attention))
        if isinstance(cfg.objective, VpgeaConfig) and cfg.objective.preset == "robust":
            say(
                "preset robust: its counterfactual leak guard is not built yet; a path that states "
                "the answer passes"
            )
        if isinstance(cfg.objective, VpgeaConfig) and not cfg.rollout.full_answer:
            say(
                "rollout.full_answer is false: no answer is verified while training, so the alarm "
                "for a falling accuracy is blind"
            )
        if cfg.rollout.top_p < 1:
            self.say(
                f"rollout.top_p {cfg.rollout.top_p} < 1: paths are not drawn from the model that "
                "the gradient assumes; use 1.0"
            )

    def evaluate_once(self, when: str) -> None:
        """The evaluation before or after training, into eval.json; a resumed run keeps it."""
        file = self.run_dir / "eval.json"
        known = self.world.gather(report.read_evaluation(self.run_dir))[0]
        step = 0 if when == "before" else self.step
        if not self.evaluator.benchmarks or known.get(when, {}).get("step") == step:
            return
        if step != self.step:
            self.say(
                "no evaluation before training: it was not asked for when the run began, or "
                f"{file} was removed"
            )
            return
        self.say(f"evaluating {when} training: {self.evaluator.samples} answers")
        known[when] = {**self.evaluator.run(self.progress(self.evaluator.samples)), "step": step}
        self._count_evaluation(step, known[when])
        self._leave_together()
        self.world.on_main(lambda: checkpoint.write_text(file, json.dumps(known, indent=1)))

    def finish_run(self) -> None:
        """Export the model, draw the figure and the report, print the closing table."""
        self.saver.wait()
        if self.cfg.checkpoint.export:
            checkpoint.export_model(
                self.policy,
                self.tokenizer,
                self.run_dir / "export",
                world=self.world,
                replace=True,
            )
        self.world.on_main(self._report)

    def _report(self) -> None:
        page = report.write_report(self.run_dir)
        headers, table = report.closing_table(self.run_dir)
        self.console.close()
        if table:
            self.console.table(headers, table, notes=report.closing_notes(self.run_dir))
        best = checkpoint.best_step(self.worth, checkpoint.saved_steps(self.run_dir))
        if best is not None:
            self.say(
                f"best by {self.cfg.checkpoint.keep_best}: step {best} ({self.worth[best]:.4g}); "
                f"vpgea export {self.run_dir} --step best"
            )
        files = [page, self.run_dir / "training.png"]
        files += [self.run_dir / "export"] * self.cfg.checkpoint.export
        self.say(", ".join(map(str, files)))

    def save(self) -> None:
        self.saved = time.monotonic()
        best = self.cfg.checkpoint.keep_best
        self.saver.save(
            self.step,
            {
                "skipped_in_a_row": self.skipped_in_a_row,
                "data": self.fingerprint,
                "config": as_dict(self.cfg),
                "evaluated": {best: self.worth} if best else {},
            },
            self.worth,
        )

    def _count_evaluation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        best = self.cfg.checkpoint.keep_best
        if best is not None:
            mode, _, key = best.partition("_")
            self.worth[step] = results[mode][key]

    def view_divergence(self, batch: ScoredBatch, coefs: Coefficients) -> dict[str, float]:
        """KL and entropies of the two views on whole posterior paths: two no-grad heads. Questions
        that are not whole are left out: a path that the engine gave up may lack a token."""
        log_utility_BG = coefs.path_scores.get("posterior", {}).get("log_utility")
        whole, temperature = batch.whole, self.cfg.rollout.temperature
        if log_utility_BG is None or whole is None:
            return {}
        pairs = whole.pairs("posterior")
        views = [
            self.passes(
                lambda batch, _: self.policy.logprob_entropy(batch, temperature=temperature),
                [score_row(q.context(v), p.z_ids) for q, p in pairs],
            )
            for v in ("teacher", "student")
        ]
        early = diagnostics.early_answer_rate(whole, self.decode)
        return merge(
            diagnostics.view_divergence(views[0], views[1], log_utility_BG[batch.lost_B == 0]),
            {"early_answer_rate": early},
        )

    def stream_norms(self, rows: Sequence[TrainRow]) -> dict[str, float]:
        """Gradient norm of each stream alone: one more forward and backward of all rows."""
        if all(row.own_view for row in rows):
            return {}
        norms = {}
        for name, own in (("grad_norm_pg", True), ("grad_norm_distill", False)):
            part = [row for row in rows if row.own_view == own]
            if part:
                self.accumulate(part)
                reshard(self.policy)
                norms[name] = gradient_norm(self.optimizer)
                self.optimizer.zero_grad(set_to_none=True)
        return norms

    @property
    def on_cuda(self) -> bool:
        return self.policy.device.type == "cuda"

    @property
    def norm_constant(self) -> float:
        return self.cfg.train.norm_constant or self.cfg.rollout.max_new_tokens / 4

    def decode(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def progress(self, total: int) -> Callable[[int], None]:
        """Shows how many of `total` samples are drawn; a stop request is honoured between them."""
        advance = self.console.samples(total)

        def on_progress(finished: int) -> None:
            self._check_stop()
            advance(finished)

        return on_progress

    def _build_stages(self) -> None:
        cfg = self.cfg
        check_engine(cfg, self.world.size)
        self.tokenizer = load_tokenizer(cfg.model.path)
        self.prompter = Prompter(self.tokenizer, cfg.prompt)
        with closing(Console(silent=not self.world.main, quiet_s=math.inf)) as console:
            judge = console.watched(self.verifier.accepts_itself, "reference answers")
            loaded = load_training(cfg.data, parseable=judge)
            benchmarks = load_benchmarks(cfg.eval, cfg.data, self.prompter, parseable=judge)
        self.questions, lost = self.prompter.prompt_within(
            loaded.questions, limit=cfg.data.max_prompt_tokens, policy=cfg.data.overlong
        )
        self.loaded = unfit(loaded, self.questions, lost, self.prompter.has_special)
        self.fingerprint = fingerprint([q.question for q in self.questions])
        every = [self.loaded, *(benchmark.loaded for benchmark in benchmarks.values())]
        self.world.on_main(functools.partial(write_dropped, cfg.data.dropped_file, every))
        check_config(
            cfg,
            load_config(cfg.model.path),
            self.world.size,
            questions=self.questions,
            benchmarks=benchmarks,
            tokenizer=self.tokenizer,
        )
        self.policy = load_policy(cfg.model, self.world, cfg.parallel, backend=cfg.loss.backend)
        self.optimizer = build_optimizer(self.policy.parameters(), cfg.optim, seed=cfg.run.seed)
        self.passes = Passes(
            self.world, cfg.train.micro_batch_tokens, model_flops(self.policy.causal_lm.config)
        )
        self.saver = checkpoint.Saver(
            self.run_dir,
            world=self.world,
            model=self.policy,
            optimizer=self.optimizer,
            keep_last=cfg.checkpoint.keep_last,
            background=cfg.checkpoint.background,
        )
        self.engine = self._build_engine()
        self.probe = self._build_probe()
        sampling = make_sampling(cfg.rollout, self.prompter, self.tokenizer, self.policy.causal_lm)
        self.evaluator = Evaluator(
            cfg,
            engine=self.engine,
            benchmarks=benchmarks,
            sampling=sampling,
            decode=self.decode,
            verifier=self.verifier,
        )
        self.collector = Collector(
            cfg,
            self.questions,
            row_logprobs=lambda rows: self.passes(lambda b, _: self.policy.logprob(b), rows),
            engine=self.engine,
            sampling=sampling,
            decode=self.decode,
            verifier=self.verifier,
            progress=self.progress,
        )
        self.collector.check()
        self.alarms = Alarms(cfg.train)

    def _build_engine(self) -> RolloutEngine:
        """With `hf` the trained module itself samples, or a whole copy beside a sharded one."""
        cfg, policy = self.cfg, self.policy

        def hf() -> HFEngine:
            return HFEngine(
                make_replica(policy, cfg.model.path) if policy.sharded else policy.causal_lm,
                max_batch=cfg.rollout.max_batch,
                dtype=None if policy.sharded else policy.dtype,
                complete=not policy.sharded,
            )

        return open_engine(cfg, self.world, dtype=policy.dtype, hf=hf)

    def _build_probe(self) -> SyncProbe:
        first, cfg = self.questions[0], self.cfg.rollout
        return SyncProbe(
            self.engine,
            lambda rows: self.passes(lambda b, _: self.policy.logprob(b), rows),
            [first.student_ids, first.teacher_ids],
            engines=self.world.size,
            limit=cfg.max_new_tokens,
            dtype=self.policy.dtype,
            tolerance=cfg.probe_tolerance,
        )

    def sync_engine(self, *, updated: bool) -> dict[str, float]:
        """Give the engine the weights, unless it samples with the trained module itself, and see
        that it has them. RolloutError otherwise."""
        if not (self.policy.sharded or self.cfg.rollout.engine != "hf"):
            return {}
        self.engine.load_weights(full_weights(self.policy))
        every = self.cfg.rollout.probe_every
        if updated and not (every and (self.step + 1) % every == 0):
            return {}
        return self.probe()

    def _restore(self) -> None:
        """The newest checkpoint, and logs that end where it ends."""
        saved = checkpoint.load_checkpoint(
            self.run_dir, world=self.world, model=self.policy, optimizer=self.optimizer
        )
        with self.world.together():  # all have read config.yaml before it is written again
            self._check_resume(saved)
        if saved is not None:
            self.step = saved.step
            self.skipped_in_a_row = saved.trainer_state["skipped_in_a_row"]
        self.world.on_main(self._cut_logs)
        best = self.cfg.checkpoint.keep_best
        if best and saved:
            known = saved.trainer_state.get("evaluated", {}).get(best, {})
            self.worth = {int(step): value for step, value in known.items()}
            with self.world.together():  # a log may have lost lines, the checkpoint the last one
                self.worth |= report.evaluated(self.run_dir, best)

    def _cut_logs(self) -> None:
        """Logs end where the checkpoint ends; a changed configuration leaves the old one beside."""
        if changes(self.before, self.cfg):
            old = self.run_dir / f"config.until_step_{self.step}.yaml"
            checkpoint.write_text(old, dump(self.before))
        lines, paths = self._cut_log(METRICS, once=True), self._cut_log(PATHS, once=False)
        (self.run_dir / "report.html").unlink(missing_ok=True)  # it marks a run that has ended
        written: dict[int, int] = {}
        for record in read_steps(self.run_dir):
            self.alarms.update(record)
            written[record["step"]] = record.get("paths_written", paths[record["step"]])
        if gaps := missing_steps(lines, self.step):
            self.notices.append(f"{self.run_dir / METRICS}: no line of steps {gaps}")
        whole = {step for step, count in written.items() if paths[step] == count}
        if gaps := missing_steps(whole | (set(range(self.step)) - written.keys()), self.step):
            self.notices.append(f"{self.run_dir / PATHS}: not all lines of steps {gaps}")

    def _cut_log(self, name: str, *, once: bool) -> Counter[int]:
        """How many lines of each step there are."""
        path = self.run_dir / name
        cut = checkpoint.truncate_jsonl(path, upto=self.step, once=once)
        self.notices += cut.words(path, self.step)
        return cut.lines

    def _check_resume(self, saved: checkpoint.Checkpoint | None) -> None:
        """A resumed run is the same run: what its numbers rest on must not have changed."""
        step, record = 0 if saved is None else saved.step, _record(saved)
        self.before = record or load(self.run_dir / "config.yaml")
        changed = changes(self.before, self.cfg)
        known = report.read_evaluation(self.run_dir)
        evaluated = ("eval.",) if known else ()
        fixed = [
            f"{key} from {_spelled(old)} to {_spelled(new)}"
            for key, (old, new) in changed.items()
            if key.startswith((*FIXED_ON_RESUME, *evaluated)) and key not in FREE_ON_RESUME
        ]
        if fixed:
            raise checkpoint.CheckpointError(
                f"--resume would change {', '.join(fixed)}, on which the steps so far rest; set "
                f"them back in {self.run_dir / 'config.yaml'} and on the command line, or start "
                "another run"
            )
        if self.cfg.train.steps < step:
            raise checkpoint.CheckpointError(
                f"train.steps {self.cfg.train.steps}: {step} steps are made already; give more"
            )
        if saved and saved.trainer_state["data"] != self.fingerprint:
            raise checkpoint.CheckpointError(
                f"the questions of {', '.join(file.path for file in self.cfg.data.train)} are not "
                "those that the run began with; "
                "bring them back, or start another run"
            )
        self.notices = [
            f"changed at step {step}: {key} {_spelled(a)} -> {_spelled(b)}"
            for key, (a, b) in changed.items()
        ]
        self.notices += rate_changes(self.before, self.cfg, step)
        if saved and record is None:
            self.notices.append(
                f"{saved.path} does not say with which configuration its steps were made (another "
                "version wrote it): config.yaml is believed, edited or not"
            )

    def _write_run_files(self) -> None:
        facts = {
            **environment(),
            "run_device": str(self.policy.device),
            "parameters": sum(p.numel() for p in self.policy.parameters()),
            "loss_backend": self.policy.backend.name,
            "rollout_engine": self.cfg.rollout.engine,
            "loss_backend_reason": self.policy.backend.reason,
            **self.policy.attention.facts(),
        }
        checkpoint.write_text(self.run_dir / "config.yaml", dump(self.cfg))
        checkpoint.write_text(self.run_dir / "environment.json", json.dumps(facts, indent=1))

    def _scheduled_evaluation(self) -> dict[str, float]:
        """Of the weights that this step starts from: a run stopped here has lost nothing."""
        every = self.cfg.eval.every
        if not every or not self.step or self.step % every:
            return {}
        results = self.evaluator.run(self.progress(self.evaluator.samples))
        self._count_evaluation(self.step, results)
        return {
            "eval_step": self.step,
            **{
                f"eval_{mode}_{key}": result[key]
                for mode, result in results.items()
                for key in ("acc", "tokens", "eps3", "truncated")
            },
        }

    def _memory(self) -> dict[str, float]:
        """Peak since the start, the largest of all processes: of the device, or of the process
        where there is none."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if self.on_cuda:
            peak = torch.cuda.max_memory_allocated() / 2**20
        return {"peak_memory_mib": max(self.world.gather(peak))}

    def _save_is_due(self) -> bool:
        """By steps, by the main process's clock, or because the step will be evaluated."""
        cfg = self.cfg.checkpoint
        if cfg.keep_best and self.step % self.cfg.eval.every == 0:
            return True
        late = cfg.save_minutes and time.monotonic() - self.saved > 60 * cfg.save_minutes
        return self.step % cfg.save_every == 0 or self.world.gather(bool(late))[0]

    def _write_rows(self, file: Path, rows: Sequence[TrainRow]) -> None:
        lines = [
            {
                "stream": row.stream,
                "view": row.view,
                "context_ids": row.context_ids.tolist(),
                "token_ids": row.token_ids.tolist(),
                "coef": row.coef.tolist(),
                "text": self.decode(row.token_ids),
            }
            for row in rows
        ]
        checkpoint.write_text(file, "".join(json.dumps(line) + "\n" for line in lines))

    def _claim(self, resume: bool) -> None:
        self.claim = checkpoint.claim_run_dir(self.run_dir, resume=resume)
        # of a run that was killed in a hand-over
        shutil.rmtree(self.run_dir / SYNC_DIR, ignore_errors=True)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True

    def _check_stop(self) -> None:
        """For this process alone: inside a rollout, whose end all processes reach together."""
        limit = self.cfg.run.max_minutes
        if limit is not None and time.monotonic() - self.began > 60 * limit:
            self.stop_requested = True
        if self.stop_requested:
            self._stop()

    def _leave_together(self) -> None:
        """Stop if any process was asked to. A collective: here a clock or a signal of one process
        is heard by all or by none."""
        limit = self.cfg.run.max_minutes
        late = limit is not None and time.monotonic() - self.began > 60 * limit
        if self.world.any(self.stop_requested or late):
            self._stop()

    def _stop(self) -> NoReturn:
        self.optimizer.zero_grad(set_to_none=True)
        raise Stopped


def _record(saved: checkpoint.Checkpoint | None) -> Config | None:
    """The configuration that a checkpoint's steps were made with; None if it does not say, or has
    keys that are no more."""
    try:
        return None if saved is None else resolve(saved.trainer_state["config"])
    except (KeyError, ConfigError):
        return None


def export_step(
    run_dir: str | Path, step: int | Literal["best", "last"], out_dir: str | Path | None = None
) -> Path:
    """Write the model of a checkpoint as a Hugging Face directory (RUN/export_step_N unless
    `out_dir` says where), on the CPU; return its path.

    `best` is by the run's checkpoint.keep_best. The run may go on meanwhile. Errors: ValueError for
    what is no run, CheckpointError for a step without a complete checkpoint.
    """
    run_dir, world = Path(run_dir), World(torch.device("cpu"))
    cfg = load(run_dir / "config.yaml")
    steps = checkpoint.saved_steps(run_dir)
    if step == "best":
        name = cfg.checkpoint.keep_best
        worth = {} if name is None else report.evaluated(run_dir, name)
        chosen = checkpoint.best_step(worth, steps)
        if chosen is None:
            raise checkpoint.CheckpointError(
                f"{run_dir}: checkpoint.keep_best is {_spelled(name)}, and no step with a "
                "checkpoint was evaluated by it; give --step N (there are: "
                f"{', '.join(map(str, steps))})"
            )
    else:
        chosen = max(steps, default=0) if step == "last" else step
    found = checkpoint.open_checkpoint(run_dir, chosen, world=world)
    model = replace(
        (_record(found) or cfg).model,
        device="cpu",
        attention="auto",
        liger="never",
        activation_checkpointing="none",
        compile=False,
    )
    out_dir = Path(out_dir or run_dir / f"export_step_{chosen}")
    policy = load_policy(model, world)
    checkpoint.put_weights(found, policy, world=world)
    return checkpoint.export_model(policy, load_tokenizer(model.path), out_dir, world=world)


def rate_changes(old: Config, new: Config, step: int) -> list[str]:
    """What a resume does to the learning rate of the next update, in numbers."""
    if step >= new.train.steps:
        return []
    now = learning_rate(new.optim, step, new.train.steps)
    planned = learning_rate(old.optim, step, old.train.steps) if step < old.train.steps else 0.0
    last = learning_rate(old.optim, step - 1, old.train.steps) if step else 0.0
    if now == planned or (step >= old.train.steps and now == last):
        return []
    return [
        f"learning rate: {last:.3g} at step {step}, {now:.3g} at step {step + 1}; without the "
        + (f"change {planned:.3g}" if step < old.train.steps else "change the run had ended")
    ]


def _spelled(value: object) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)


def _checksum(rows: Sequence[TrainRow]) -> int:
    crc = 0
    for row in rows:
        for part in (row.context_ids, row.token_ids, row.coef.double()):
            crc = zlib.crc32(part.numpy().tobytes(), crc)
    return crc


def _counts(dropped: dict[str, int]) -> str:
    dropped = {reason: count for reason, count in dropped.items() if count}
    return ", ".join(f"{count} dropped ({why})" for why, count in dropped.items()) or "none dropped"

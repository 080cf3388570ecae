"""The one loop: rollout -> score -> coefficients -> packed update -> log -> save.

The same on a laptop and on a node. This file composes the stages (collect.py does it for the paths
of a step) and holds the only mutable state of a run: parameters, optimiser, step counter.
"""

from __future__ import annotations

import functools
import json
import math
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch

from vpgea_fast import checkpoint, diagnostics, report
from vpgea_fast.collect import Collector
from vpgea_fast.config import Config, VpgeaConfig, changes, dump, load
from vpgea_fast.data import fingerprint, load_questions
from vpgea_fast.distributed import World
from vpgea_fast.evaluate import Evaluator, make_sampling
from vpgea_fast.metrics import Alarms, Console, MetricsWriter, PhaseTimer, environment
from vpgea_fast.model import load_policy, load_tokenizer
from vpgea_fast.objectives.rows import build_rows
from vpgea_fast.optim import apply_update, build_optimizer, gradient_norm, learning_rate
from vpgea_fast.packing import drop_zero_rows
from vpgea_fast.prompts import Prompter, length_report
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.scoring import (
    row_logprobs,
    score_row,
)
from vpgea_fast.types import (
    PackedBatch,
    ScoredBatch,
    StepStats,
    TrainRow,
)
from vpgea_fast.verify import Verifier

MAX_SKIPPED_IN_A_ROW = 5
FIXED_ON_RESUME = (
    *("model.path", "model.dtype", "model.master_dtype", "optim.name"),
    *("prompt.", "rollout.", "scoring.", "objective."),
    *("data.", "run.seed", "run.threads", "train.norm", "train.questions_per_step"),
)
"""Keys that a resumed run keeps; the rest may change, and the run says so."""


class Preempted(Exception):  # noqa: N818 - not an error: the run is saved and can go on
    """SIGTERM or Ctrl-C; raised only where no update is half done, so the state can be saved."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def fit(cfg: Config, *, resume: bool = False) -> bool:
    """Train to `cfg.train.steps` in `cfg.run.dir`; True when done, False when stopped by a signal.

    A stopped run is saved first. With `resume` the run directory's newest checkpoint is continued,
    bitwise as if it had never stopped. Errors: ValueError for bad input, CheckpointError for the
    run directory, TrainingError for a run that diverges.
    """
    with Trainer(cfg, resume=resume) as trainer:
        trainer.introduce()
        try:
            trainer.evaluate_once("before")
            while trainer.step < cfg.train.steps:
                stats = trainer.train_step()
                trainer.finish_step(stats)
            trainer.evaluate_once("after")
        except Preempted:
            trainer.save()
            trainer.saver.wait()
            trainer.say(f"stopped after step {trainer.step}, saved; go on: --resume {cfg.run.dir}")
            return False
        trainer.finish_run()
    return True


class Trainer:
    """The stages of one run. Use as a context manager; see `fit` for the loop."""

    def __init__(self, cfg: Config, *, resume: bool = False) -> None:
        self.cfg, self.run_dir, self.step = cfg, Path(cfg.run.dir), 0
        self.skipped_in_a_row, self.stop_requested, self.changed = 0, False, []
        if cfg.run.threads:
            torch.set_num_threads(cfg.run.threads)
        self.claim = checkpoint.claim_run_dir(self.run_dir, resume=resume)
        self.verifier = Verifier(cfg.verify.workers, cfg.verify.timeout_s)
        try:
            self._build_stages()
            if resume:
                self._restore()
        except BaseException:
            self.verifier.close()
            self.claim.abandon()
            raise
        self._write_run_files()
        self.metrics = MetricsWriter(self.run_dir)
        self.console = Console(cfg.train.steps, done=self.step)
        self.say = self.console.message

    def __enter__(self) -> Trainer:
        signals = (signal.SIGTERM, signal.SIGINT)
        self.previous_handlers = {s: signal.signal(s, self._on_signal) for s in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        try:
            self.saver.close()
        finally:
            for part in (self.console, self.metrics, self.engine, self.verifier):
                part.close()
            self.claim.release()

    def train_step(self) -> StepStats:
        """One rollout batch, one update. No state changes until `update` has every gradient."""
        cfg, timer = self.cfg, PhaseTimer(torch.cuda.synchronize if self.on_cuda else None)
        evaluated = self._scheduled_evaluation()
        batch, coefs = self.collector.collect(self.step, timer)
        rows = build_rows(batch, coefs, cfg.train, norm_constant=self.norm_constant)
        rows = drop_zero_rows(rows)
        with timer("diagnose"):
            found = {**evaluated, **diagnostics.batch_metrics(batch), **coefs.metrics}
            if cfg.metrics.diag_every and self.step % cfg.metrics.diag_every == 0:
                found |= {**self.view_divergence(batch), **self.stream_norms(rows)}
            records = diagnostics.path_records(
                batch, coefs, self.decode, step=self.step + 1, limit=cfg.metrics.paths_per_step
            )
        with timer("train"):
            update, skipped = self.update(rows)
        self.metrics.write_paths(records)
        work = diagnostics.work_metrics(batch, coefs, rows, seconds=timer.metrics())
        return StepStats(
            {"step": self.step + 1, **found, **update, **work, **self._memory()}, skipped
        )

    def update(self, rows: Sequence[TrainRow]) -> tuple[dict[str, float | int], str | None]:
        """The gradient of all rows, one optimiser step; and why there was none, if there was none.

        No rows or a non-finite gradient leave parameters and optimiser state bitwise unchanged.
        """
        lr = learning_rate(self.cfg.optim, self.step, self.cfg.train.steps)
        if not rows:
            return {"lr": lr, "loss": 0.0, "grad_norm": 0.0, "skipped": 1}, "no path has a gradient"
        logps = self.accumulate(rows)
        norm = apply_update(self.optimizer, lr=lr, max_grad_norm=self.cfg.optim.max_grad_norm)
        found = {"lr": lr, **diagnostics.row_metrics(rows, logps), "grad_norm": norm}
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if math.isfinite(norm):
            return {**found, "skipped": 0}, None
        return {**found, "skipped": 1}, f"the gradient norm is {norm}"

    def accumulate(self, rows: Sequence[TrainRow]) -> list[torch.Tensor]:
        """Add the gradient of `rows` to the parameters; per-token log-probs of every row."""

        def backward(batch: PackedBatch) -> torch.Tensor:
            self._check_stop()
            out = self.policy(batch, temperature=self.cfg.rollout.temperature)
            out.loss.backward()
            return out.logp.cpu()

        return row_logprobs(backward, rows, self.cfg.train.micro_batch_tokens)

    def finish_step(self, stats: StepStats) -> None:
        """Count the step, log it, raise alarms, save on schedule."""
        self.step += 1
        self.metrics.write(stats.metrics)
        self.console.step(stats.metrics)
        if stats.skipped:
            self.say(f"step {self.step}: no update, {stats.skipped}")
        for alarm in self.alarms.update(stats.metrics):
            self.say(alarm)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} non-finite gradients in a row at step {self.step}; the "
                "last checkpoint is good: lower optim.lr, look at the last steps in paths.jsonl, "
                "and go on with --resume"
            )
        if self.step == self.cfg.train.steps or self.step % self.cfg.checkpoint.save_every == 0:
            self.save()
        self._check_stop()

    def introduce(self) -> None:
        """Show both prompts, their lengths, what will be drawn, and what the preset leaves out."""
        cfg, first, say = self.cfg, self.questions[0], self.say
        for text in self.changed:
            say(text)
        say(f"student prompt: {self.tokenizer.decode(first.student_ids)}")
        if cfg.objective.posterior_paths:
            say(f"teacher prompt: {self.tokenizer.decode(first.teacher_ids)}")
        say(f"{len(self.questions)} questions, {_counts(self.dropped)}")
        say(f"prompt tokens: {length_report(self.questions)}")
        paths = cfg.objective.posterior_paths + cfg.objective.prior_paths
        say(
            f"{cfg.objective.name}: {cfg.train.steps} steps x {cfg.train.questions_per_step} "
            f"questions x {paths} paths = "
            f"{cfg.train.steps * cfg.train.questions_per_step * paths} samples"
        )
        say(f"device {self.policy.device}, loss backend {self.policy.backend}")
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
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        step = 0 if when == "before" else self.step
        if not self.evaluator.benchmarks or known.get(when, {}).get("step") == step:
            return
        if step != self.step:
            self.say("no evaluation before training: it was not asked for when the run began")
            return
        self.say(f"evaluating {when} training: {self.evaluator.samples} answers")
        known[when] = {**self.evaluator.run(self.progress(self.evaluator.samples)), "step": step}
        checkpoint.write_text(file, json.dumps(known, indent=1))

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
        page = report.write_report(self.run_dir)
        headers, table = report.closing_table(self.run_dir)
        self.console.close()
        if table:
            self.console.table(headers, table, notes=report.closing_notes(self.run_dir))
        files = [page, self.run_dir / "training.png"]
        files += [self.run_dir / "export"] * self.cfg.checkpoint.export
        self.say(", ".join(map(str, files)))

    def save(self) -> None:
        self.saver.save(
            self.step, {"skipped_in_a_row": self.skipped_in_a_row, "data": self.fingerprint}
        )

    def view_divergence(self, batch: ScoredBatch) -> dict[str, float]:
        """KL and entropies of the two views on whole posterior paths: two no-grad heads."""
        objective, budget = self.cfg.objective, self.cfg.train.micro_batch_tokens
        if not isinstance(objective, VpgeaConfig):
            return {}
        pairs = batch.pairs("posterior")
        logprob_entropy = functools.partial(
            self.policy.logprob_entropy, temperature=self.cfg.rollout.temperature
        )
        views = [
            row_logprobs(
                logprob_entropy, [score_row(q.context(v), p.z_ids) for q, p in pairs], budget
            )
            for v in ("teacher", "student")
        ]
        return {
            **diagnostics.view_divergence(
                batch, *views, alpha=objective.alpha, u_min=objective.u_min
            ),
            "early_answer_rate": diagnostics.early_answer_rate(batch, self.decode),
        }

    def stream_norms(self, rows: Sequence[TrainRow]) -> dict[str, float]:
        """Gradient norm of each stream alone: one more forward and backward of all rows."""
        if all(row.own_view for row in rows):
            return {}
        norms = {}
        for name, own in (("grad_norm_pg", True), ("grad_norm_distill", False)):
            part = [row for row in rows if row.own_view == own]
            if part:
                self.accumulate(part)
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
        self.tokenizer = load_tokenizer(cfg.model.path)
        self.prompter = Prompter(self.tokenizer, cfg.prompt)
        loaded = load_questions(cfg.data.train, cfg.data, parseable=self.verifier.parseable)
        self.questions, unfit = self.prompter.prompt_within(
            loaded.questions, limit=cfg.data.max_prompt_tokens, policy=cfg.data.overlong
        )
        self.dropped = {**loaded.dropped, **unfit}
        self.fingerprint = fingerprint([q.question for q in self.questions])
        self.policy = load_policy(cfg.model, backend=cfg.loss.backend)
        self.engine = HFEngine(
            self.policy.causal_lm, max_batch=cfg.rollout.max_batch, dtype=self.policy.dtype
        )
        self.optimizer = build_optimizer(self.policy.parameters(), cfg.optim)
        self.world = World(self.policy.device)
        self.saver = checkpoint.Saver(
            self.run_dir,
            world=self.world,
            model=self.policy,
            optimizer=self.optimizer,
            keep_last=cfg.checkpoint.keep_last,
            background=cfg.checkpoint.background,
        )
        sampling = make_sampling(cfg.rollout, self.prompter, self.tokenizer, self.policy.causal_lm)
        self.evaluator = Evaluator(
            cfg,
            engine=self.engine,
            prompter=self.prompter,
            sampling=sampling,
            decode=self.decode,
            verifier=self.verifier,
        )
        self.collector = Collector(
            cfg,
            self.questions,
            policy=self.policy,
            engine=self.engine,
            sampling=sampling,
            decode=self.decode,
            verifier=self.verifier,
            progress=self.progress,
        )
        self.collector.check()
        self.alarms = Alarms()

    def _restore(self) -> None:
        """The newest checkpoint, and logs that end where it ends."""
        saved = checkpoint.load_checkpoint(
            self.run_dir, world=self.world, model=self.policy, optimizer=self.optimizer
        )
        self._check_resume(saved)
        if saved is not None:
            self.step = saved.step
            self.skipped_in_a_row = saved.trainer_state["skipped_in_a_row"]
        for name in ("metrics.jsonl", "paths.jsonl"):
            checkpoint.truncate_jsonl(self.run_dir / name, upto=self.step)
        self.alarms.replay(self.run_dir)

    def _check_resume(self, saved: checkpoint.Checkpoint | None) -> None:
        """A resumed run is the same run: what its numbers rest on must not have changed."""
        before = load(self.run_dir / "config.yaml")
        changed = changes(before, self.cfg)
        evaluated = ("eval",) if (self.run_dir / "eval.json").exists() else ()
        fixed = [key for key in changed if key.startswith((*FIXED_ON_RESUME, *evaluated))]
        if fixed:
            raise checkpoint.CheckpointError(
                f"--resume would change {', '.join(fixed)}, on which the steps so far rest; leave "
                "them as they are, or start another run"
            )
        step = 0 if saved is None else saved.step
        if self.cfg.train.steps < step:
            raise checkpoint.CheckpointError(
                f"train.steps {self.cfg.train.steps}: {step} steps are made already; give more"
            )
        if saved and saved.trainer_state["data"] != self.fingerprint:
            raise checkpoint.CheckpointError(
                f"the questions of {self.cfg.data.train} are not those that the run began with; "
                "bring them back, or start another run"
            )
        self.changed = [
            f"changed at step {step}: {key} {a!r} -> {b!r}" for key, (a, b) in changed.items()
        ]
        if changed:
            (self.run_dir / "config.yaml").rename(self.run_dir / f"config.until_step_{step}.yaml")

    def _write_run_files(self) -> None:
        facts = {
            **environment(),
            "run_device": str(self.policy.device),
            "parameters": sum(p.numel() for p in self.policy.parameters()),
            "loss_backend": self.policy.backend,
            "attention": "per-document sdpa",
        }
        checkpoint.write_text(self.run_dir / "config.yaml", dump(self.cfg))
        checkpoint.write_text(self.run_dir / "environment.json", json.dumps(facts, indent=1))

    def _scheduled_evaluation(self) -> dict[str, float]:
        """Of the weights that this step starts from: a run stopped here has lost nothing."""
        every = self.cfg.eval.every
        if not every or not self.step or self.step % every:
            return {}
        results = self.evaluator.run(self.progress(self.evaluator.samples))
        return {
            "eval_step": self.step,
            **{
                f"eval_{mode}_{key}": result[key]
                for mode, result in results.items()
                for key in ("acc", "tokens", "eps3", "truncated")
            },
        }

    def _memory(self) -> dict[str, float]:
        """Peak since the start: of the device, or of the process where there is none."""
        if self.on_cuda:
            return {"peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20}
        return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True

    def _check_stop(self) -> None:
        if self.stop_requested:
            self.optimizer.zero_grad(set_to_none=True)
            raise Preempted


def _counts(dropped: dict[str, int]) -> str:
    dropped = {reason: count for reason, count in dropped.items() if count}
    return ", ".join(f"{count} dropped ({why})" for why, count in dropped.items()) or "none dropped"

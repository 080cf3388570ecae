"""The one loop: rollout -> score -> coefficients -> packed update -> log -> save, the same on a laptop and on a node."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import AutoTokenizer

from vpgea_fast import checkpoint, diagnostics, objectives, report
from vpgea_fast.config import Config, VpgeaConfig, dump
from vpgea_fast.data import load_questions, step_questions
from vpgea_fast.evaluate import Evaluator, verify_paths
from vpgea_fast.metrics import Alarms, Console, MetricsWriter, PhaseTimer, environment
from vpgea_fast.model import load_policy
from vpgea_fast.objectives.rows import build_rows
from vpgea_fast.optim import apply_update, build_optimizer, learning_rate
from vpgea_fast.packing import drop_zero_rows, pack
from vpgea_fast.prompts import Prompter
from vpgea_fast.rollout.engine import Sampling, request_seed
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.scoring import answer_likelihood, row_logprobs, score_row
from vpgea_fast.types import Coefficients, PromptedQuestion, SampleRequest, ScoredBatch, StepStats, Stream, TrainRow
from vpgea_fast.types import Path as SampledPath
from vpgea_fast.verify import Verifier

MAX_SKIPPED_IN_A_ROW = 5
Groups = tuple[tuple[SampledPath, ...], ...]


class Preempted(Exception):
    """SIGTERM or Ctrl-C; raised only where no update is half done, so that the state can be saved."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def fit(cfg: Config, *, resume: bool = False) -> bool:
    """Train to `cfg.train.steps` in `cfg.run.dir`; True when done, False when a signal stopped it (and it was saved)."""
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
            trainer.console.message(f"stopped after step {trainer.step}, saved; go on with --resume {cfg.run.dir}")
            return False
        trainer.finish_run()
    return True


class Trainer:
    """Owns the stages of one run and its only mutable state: parameters, optimiser, step counter, alarms."""

    def __init__(self, cfg: Config, *, resume: bool = False) -> None:
        self.cfg, self.run_dir, self.step = cfg, Path(cfg.run.dir), 0
        self.skipped_in_a_row, self.stop_requested, self.handlers = 0, False, {}
        if cfg.run.threads:
            torch.set_num_threads(cfg.run.threads)
        self.verifier = Verifier(cfg.verify.workers, cfg.verify.timeout_s)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
            self.prompter = Prompter(self.tokenizer, cfg.prompt)
            loaded = load_questions(cfg.data.train, cfg.data, self.verifier.parseable)
            self.questions, overlong = self.prompter.prompt_questions(
                loaded.questions, cfg.data.max_prompt_tokens, cfg.data.overlong
            )
            self.dropped = {**loaded.dropped, "overlong": overlong}
            self.policy = load_policy(cfg.model, backend=cfg.loss.backend)
            self.engine = HFEngine(self.policy.causal_lm, max_batch=cfg.rollout.max_batch)
            self.optimizer = build_optimizer(self.policy.parameters(), cfg.optim)
            self.sampling = Sampling(
                max_new_tokens=cfg.rollout.max_new_tokens,
                think_close_id=self.prompter.think_close_id,
                eos_ids=self.prompter.eos_ids,
                temperature=cfg.rollout.temperature,
                top_p=cfg.rollout.top_p,
                full_answer=cfg.rollout.full_answer,
                max_answer_tokens=cfg.rollout.max_answer_tokens,
            )
            self.evaluator = Evaluator(
                cfg, engine=self.engine, prompter=self.prompter, decode=self._decode, verifier=self.verifier
            )
            self.claim = checkpoint.claim_run_dir(self.run_dir, resume=resume)
        except BaseException:
            self.verifier.close()
            raise
        self.alarms = Alarms()
        if resume:
            self._restore()
        self._write_run_files()
        self.metrics = MetricsWriter(self.run_dir)
        self.console = Console(cfg.train.steps, done=self.step)

    def __enter__(self) -> Trainer:
        self.handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.console.close()
        self.verifier.close()
        self.engine.close()
        self.claim.close()

    # ------------------------------------------------------------------------------------------ one step

    def train_step(self) -> StepStats:
        """One rollout batch, one update. Nothing that is saved changes before `update` has all its gradients."""
        cfg, timer = self.cfg, PhaseTimer()
        questions = step_questions(
            self.questions, seed=cfg.run.seed, step=self.step, batch=cfg.train.questions_per_step
        )
        with timer("rollout"):
            posterior, prior = self.sample(questions)
        with timer("score"):
            batch = self.score(questions, posterior, prior)
        with timer("advantage"):
            coefs = objectives.coefficients(cfg.objective, batch)
            rows = drop_zero_rows(build_rows(batch, coefs, cfg.train, norm_constant=self.norm_constant))
        with timer("diagnose"):
            found = {**diagnostics.batch_metrics(batch), **coefs.metrics, **self._divergence(batch)}
        with timer("train"):
            update, skipped = self.update(rows)
        work = diagnostics.work_metrics(batch, coefs, rows)
        self._log_paths(batch, coefs)
        return StepStats(
            self.step, {"step": self.step + 1, **found, **update, **work, **timer.metrics(), **_memory()}, skipped
        )

    def sample(self, questions: Sequence[PromptedQuestion]) -> tuple[Groups, Groups]:
        """Posterior and prior paths of every question, both streams in one call of the engine."""
        plan: list[tuple[Stream, int]] = [
            ("posterior", self.cfg.objective.posterior_paths),
            ("prior", self.cfg.objective.prior_paths),
        ]
        requests = [
            SampleRequest(
                q.question.id,
                stream,
                i,
                q.context("teacher" if stream == "posterior" else "student"),
                request_seed(self.cfg.run.seed, self.step, q.question.id, stream, i),
            )
            for q in questions
            for stream, count in plan
            for i in range(count)
        ]
        paths = iter(self.engine.generate(requests, self.sampling, self._sampled(len(requests))))
        groups = [[tuple(next(paths) for _ in range(count)) for _, count in plan] for _ in questions]
        return tuple(g[0] for g in groups), tuple(g[1] for g in groups)

    @torch.no_grad()
    def score(self, questions: Sequence[PromptedQuestion], posterior: Groups, prior: Groups) -> ScoredBatch:
        """Cross-view likelihoods, lengths and (with full answers) verified correctness of all paths."""
        matrices: dict[str, torch.Tensor] = {}
        for name, groups in {"post_BG": posterior, "prior_BN": prior}.items():
            shape = (len(groups), len(groups[0]))
            pairs = [(q, path) for q, group in zip(questions, groups, strict=True) for path in group]
            paths = [path for _, path in pairs]
            unknown = torch.full(shape, math.nan, dtype=torch.float64)
            matrices[f"u_{name}"] = self._utilities(pairs).view(shape) if self.cfg.objective.scores_answers else unknown
            answers = [q.question.answer for q, _ in pairs]
            verified = verify_paths(paths, answers, self._decode, self.verifier) if self.sampling.full_answer else unknown
            matrices[f"correct_{name}"] = verified.view(shape)
            matrices[f"len_{name}"] = torch.tensor([p.length for p in paths], dtype=torch.float64).view(shape)
            matrices[f"closed_{name}"] = torch.tensor([p.closed for p in paths], dtype=torch.bool).view(shape)
        return ScoredBatch(tuple(questions), posterior, prior, **matrices)

    def update(self, rows: Sequence[TrainRow]) -> tuple[dict[str, float | int], str | None]:
        """Accumulate the gradient of all rows and step once; no rows, or a non-finite gradient: no update at all."""
        lr = learning_rate(self.cfg.optim, self.step, self.cfg.train.steps)
        if not rows:
            return {"lr": lr, "loss": 0.0, "grad_norm": 0.0, "skipped": 1}, "no path has a gradient"
        logps: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for batch, members in pack(rows, self.cfg.train.micro_batch_tokens):
            self._check_stop()
            out = self.policy(batch, temperature=self.cfg.rollout.temperature)
            out.loss.backward()
            parts = out.logp.double().cpu().split([rows[i].token_ids.numel() for i in members])
            for i, part in zip(members, parts, strict=True):
                logps[i] = part
        norm = apply_update(self.optimizer, lr=lr, max_grad_norm=self.cfg.optim.max_grad_norm)
        metrics = {"lr": lr, **diagnostics.row_metrics(rows, logps), "grad_norm": norm}
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return {**metrics, "skipped": 0}, None
        self.skipped_in_a_row += 1
        return {**metrics, "skipped": 1}, f"non-finite gradient norm ({norm})"

    def finish_step(self, stats: StepStats) -> None:
        """Count, log, raise alarms, evaluate and save on schedule."""
        self.step += 1
        every, last = self.cfg.eval.every, self.step == self.cfg.train.steps
        extra = self._evaluation_metrics() if every and self.step % every == 0 and not last else {}
        metrics = {**stats.metrics, **extra}
        self.metrics.write(metrics)
        self.console.step(metrics)
        for text in [*([f"step {self.step}: no update, {stats.skipped}"] if stats.skipped else []), *self.alarms.update(metrics)]:
            self.console.message(text)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} non-finite gradients in a row at step {self.step}; the last checkpoint is good: "
                "lower optim.lr or look at the paths of these steps in paths.jsonl, then --resume"
            )
        if last or self.step % self.cfg.checkpoint.save_every == 0:
            self.save()
        self._check_stop()

    # ------------------------------------------------------------------------------------------ before and after

    def introduce(self) -> None:
        """Show both prompts, the length report, what will be drawn, and what the preset leaves out."""
        cfg, first = self.cfg, self.questions[0]
        say = self.console.message
        say(f"student prompt: {self.tokenizer.decode(first.student_ids)}")
        if cfg.objective.posterior_paths:
            say(f"teacher prompt: {self.tokenizer.decode(first.teacher_ids)}")
        say(f"{len(self.questions)} questions ({_counts(self.dropped)}), prompt tokens {self.prompter.length_report(self.questions)}")
        paths = cfg.objective.posterior_paths + cfg.objective.prior_paths
        say(
            f"{cfg.objective.name}: {cfg.train.steps} steps x {cfg.train.questions_per_step} questions x {paths} paths = "
            f"{cfg.train.steps * cfg.train.questions_per_step * paths} samples; loss backend {self.policy.backend}, "
            f"device {self.policy.device}"
        )
        if isinstance(cfg.objective, VpgeaConfig) and cfg.objective.preset == "robust":
            say("preset robust: its counterfactual leak guard is not built yet, so paths that state the answer pass")
        if cfg.rollout.top_p < 1:
            say(f"rollout.top_p {cfg.rollout.top_p} < 1: log q is not that of the sampler, gradients are biased; use 1.0")

    def evaluate_once(self, when: str) -> None:
        """The evaluation before (or after) training into eval.json; not repeated by a resumed run."""
        file = self.run_dir / "eval.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        if not self.cfg.eval.data or known.get(when, {}).get("step") == (0 if when == "before" else self.step):
            return
        result = self._evaluate()
        checkpoint.write_atomic(file, json.dumps({**known, when: {**result, "step": self.step}}, indent=1))

    def finish_run(self) -> None:
        """Export the model, draw the figure and the report, print the closing table."""
        if self.cfg.checkpoint.export:
            checkpoint.export_model(self.policy.causal_lm, self.tokenizer, self.run_dir / "export")
        report.write_report(self.run_dir)
        headers, rows = report.closing_table(self.run_dir)
        if rows:
            self.console.table(headers, rows)
        if self.cfg.metrics.note:
            self.console.message(self.cfg.metrics.note)
        self.console.message(f"run {self.run_dir}: report.html, training.png, metrics.jsonl, export/")

    def save(self) -> None:
        checkpoint.save_checkpoint(
            self.run_dir,
            self.step,
            model_state=self.policy.causal_lm.state_dict(),
            optimizer_state=self.optimizer.state_dict(),
            trainer_state={"step": self.step, "skipped_in_a_row": self.skipped_in_a_row},
            keep_last=self.cfg.checkpoint.keep_last,
        )

    @property
    def norm_constant(self) -> float:
        return self.cfg.train.norm_constant or self.cfg.rollout.max_new_tokens / 4

    # ------------------------------------------------------------------------------------------ inside

    def _restore(self) -> None:
        saved = checkpoint.load_checkpoint(self.run_dir, device=self.policy.device)
        self.step = 0 if saved is None else saved.step
        if saved is not None:
            self.policy.causal_lm.load_state_dict(saved.model_state)
            self.optimizer.load_state_dict(saved.optimizer_state)
            self.skipped_in_a_row = saved.trainer_state["skipped_in_a_row"]
        for name in ("metrics.jsonl", "paths.jsonl"):
            checkpoint.truncate_jsonl(self.run_dir / name, upto=self.step)
        self.alarms.replay(self.run_dir)

    def _write_run_files(self) -> None:
        facts = {**environment(), "loss_backend": self.policy.backend, "attention": "sdpa per document"}
        facts |= {"device": str(self.policy.device), "parameters": sum(p.numel() for p in self.policy.parameters())}
        checkpoint.write_atomic(self.run_dir / "config.yaml", dump(self.cfg))
        checkpoint.write_atomic(self.run_dir / "environment.json", json.dumps(facts, indent=1))

    def _utilities(self, pairs: Sequence[tuple[PromptedQuestion, SampledPath]]) -> torch.Tensor:
        return answer_likelihood(
            self.policy.logprob,
            pairs,
            think_close_id=self.prompter.think_close_id,
            budget=self.cfg.train.micro_batch_tokens,
            u_norm=self.cfg.scoring.u_norm,
        )

    def _divergence(self, batch: ScoredBatch) -> dict[str, float]:
        every, objective = self.cfg.metrics.diag_every, self.cfg.objective
        if not every or self.step % every or not isinstance(objective, VpgeaConfig):
            return {}
        rows = [
            score_row(question.student_ids, path.z_ids)
            for question, group in zip(batch.questions, batch.posterior, strict=True)
            for path in group
        ]
        log_pi = row_logprobs(self._logprob_at_temperature, rows, self.cfg.train.micro_batch_tokens)
        return diagnostics.view_divergence(batch, log_pi, alpha=objective.alpha, u_min=objective.u_min)

    def _logprob_at_temperature(self, packed: Any) -> torch.Tensor:
        return self.policy.logprob(packed, temperature=self.cfg.rollout.temperature)

    def _evaluate(self) -> dict[str, dict[str, Any]]:
        return self.evaluator.run(self._sampled(self.evaluator.samples))

    def _evaluation_metrics(self) -> dict[str, float]:
        return {
            f"eval_{mode}_{key}": result[key]
            for mode, result in self._evaluate().items()
            for key in ("acc", "tokens", "eps3", "truncated")
        }

    def _log_paths(self, batch: ScoredBatch, coefs: Coefficients) -> None:
        self.metrics.write_paths(
            diagnostics.path_records(batch, coefs, self.tokenizer.decode, step=self.step + 1, limit=self.cfg.metrics.paths_per_step)
        )

    def _decode(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _sampled(self, total: int) -> Any:
        """Progress of `total` samples; a stop request is honoured between decoding steps."""
        advance = self.console.samples(total)

        def on_progress(finished: int) -> None:
            self._check_stop()
            advance(finished)

        return on_progress

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True

    def _check_stop(self) -> None:
        if self.stop_requested:
            self.optimizer.zero_grad(set_to_none=True)
            raise Preempted


def _memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20}
    return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} dropped: {reason}" for reason, count in dropped.items() if count) or "none dropped"

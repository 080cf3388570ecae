"""A run's directory: claimed by one process group, checked before it goes on, exported from later.

    config.yaml environment.json        written at each start, when all else is in place
    metrics.jsonl paths.jsonl eval.json one line per step, one per path, evaluations at both ends
    checkpoints/                        see checkpoint/
    config.until_step_N.yaml            the configuration of the steps before a changed one
    nonfinite_step_N.jsonl              rows whose gradient was not finite
    trace_N_M.json.gz                   a profile of steps N to M (train.profile_steps)

A resumed run is the same run: what its numbers rest on must not have changed.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from vpgea_fast import checkpoint, report
from vpgea_fast.config import Config, ConfigError, changes, dump, load, renewed, resolve
from vpgea_fast.distributed import World
from vpgea_fast.metrics import (
    METRICS,
    PATHS,
    Alarms,
    Console,
    environment,
    missing_steps,
    read_steps,
)
from vpgea_fast.model import Policy, load_policy
from vpgea_fast.model_dir import load_tokenizer
from vpgea_fast.names import Trained
from vpgea_fast.optim import learning_rate
from vpgea_fast.rollout.factory import SYNC_DIR
from vpgea_fast.types import TrainRow

FIXED_ON_RESUME = (
    *("model.path", "model.dtype", "model.master_dtype", "optim.name", "posterior.path"),
    *("prompt.", "scoring.", "objective.", "rollout.temperature", "rollout.top_p"),
    *("rollout.max_new_tokens", "rollout.full_answer", "rollout.max_answer_tokens"),
    *("rollout.importance_cap", "train.record"),
    *("data.", "verify.", "run.seed", "run.threads", "train.questions_per_step"),
)
"""Keys that a resumed run keeps; the rest may change, and the run says so. The rollout's are those
that decide how samples are distributed and weighted, not which engine draws how many at a time."""
FREE_ON_RESUME = ("data.dropped_file", "verify.workers", "verify.timeout_s")
"""Exceptions: they do not change what is drawn or how it is judged."""
FIXED_BETWEEN_UPDATES = ("train.minibatches", "train.epochs")
"""Keys that only a resume between two updates of a rollout keeps: they say which update is next."""


EXPORTS: Mapping[Trained, str] = {"policy": "export", "posterior": "export_posterior"}
"""Whose weights -> the directory that holds them as a model, beside the run's files."""


class RunDir:
    """The directory of one run while it is written. `claim` it first; `release` or `abandon` it.

    `before` is the configuration of the steps so far, `notices` what the user should hear of a
    resume. Both are known after `check_resume`.
    """

    def __init__(self, cfg: Config, world: World) -> None:
        self.cfg, self.world, self.path = cfg, world, Path(cfg.run.dir)
        self.lock: checkpoint.RunLock | None = None
        self.before: Config = cfg
        self.notices: list[str] = []

    @property
    def exports(self) -> dict[Trained, str]:
        """The models that the run exports at its end, each with the name of its directory."""
        if not self.cfg.asked.checkpoint.export:
            return {}
        return {who: EXPORTS[who] for who in EXPORTS if who == "policy" or self.cfg.two_policies}

    def claim(self, *, resume: bool) -> None:
        """Lock the directory for the main process, or refuse it everywhere. A collective."""
        self.world.on_main(functools.partial(self._claim, resume))

    def release(self) -> None:
        """End the claim, so that another process may make it."""
        if self.lock is not None:
            self.lock.release()

    def abandon(self) -> None:
        """Release the directory as the claim found it, because the start failed."""
        if self.lock is not None:
            self.lock.abandon()

    def restore(self, saved: checkpoint.Checkpoint | None, data: str, alarms: Alarms) -> None:
        """Check that this run may go on from `saved` with the questions of fingerprint `data`, and
        end the logs where it ends. A collective."""
        with self.world.together():  # all have read config.yaml before it is written again
            self._check_resume(saved, data)
        step = 0 if saved is None else saved.step
        self.world.on_main(lambda: self._cut_logs(step, alarms))

    def newest(self) -> int:
        """Read the step of the newest checkpoint; 0 without one. A collective."""
        # Process 0's reading for all: a shared disk may show the others an older folder.
        return self.world.gather(max(checkpoint.saved_steps(self.path), default=0))[0]

    def worth(self, saved: checkpoint.Checkpoint | None) -> dict[int, float]:
        """Read step -> checkpoint.keep_best of the evaluations so far. A collective."""
        best = self.cfg.checkpoint.keep_best
        if not (best and saved):
            return {}
        known = saved.trainer_state.get("evaluated", {}).get(best, {})
        # JSON has made text of the steps.
        worth = {int(step): value for step, value in known.items()}
        with self.world.together():  # a log may have lost lines, the checkpoint the last one
            return worth | report.evaluated(self.path, best)

    def evaluations(self) -> dict[str, Any]:
        """Read eval.json: its results by "before" and "after". A collective."""
        # Process 0's reading for all: it decides whether they evaluate, and a shared disk may show
        # the others an older file.
        return self.world.gather(report.read_evaluation(self.path))[0]

    def write_evaluations(self, known: Mapping[str, Any]) -> None:
        """Write eval.json anew. A collective."""
        text = json.dumps(known, indent=1)
        self.world.on_main(lambda: checkpoint.write_text(self.path / "eval.json", text))

    def write_facts(self, policy: Policy) -> None:
        """Write config.yaml and environment.json. A collective, and the last act of a start."""
        # From config.yaml on the directory is a run: --resume takes it, another start refuses it.
        # Numbers of two runs are compared later: what ran them must stand beside them.
        facts = {
            **environment(),
            "run_device": str(policy.device),
            # A shard counts as its whole tensor: the number is that of the model.
            "parameters": sum(p.numel() for p in policy.parameters()),
            "loss_backend": policy.backend.name,
            "rollout_engine": self.cfg.engine.name,
            "loss_backend_reason": policy.backend.reason,
            **policy.attention.facts(),
        }

        def write() -> None:
            checkpoint.write_text(self.path / "config.yaml", dump(self.cfg))
            checkpoint.write_text(self.path / "environment.json", json.dumps(facts, indent=1))

        self.world.on_main(write)

    def write_rows(
        self, step: int, rows: Sequence[TrainRow], decode: Callable[[torch.Tensor], str]
    ) -> Path:
        """Write rows that have no finite gradient; return the file. A collective."""
        # Ids, not only their text: the rows can be run again from this file alone.
        file = self.path / f"nonfinite_step_{step}.jsonl"
        lines = [
            {
                "stream": row.stream,
                "view": row.view,
                "context_ids": row.context_ids.tolist(),
                "token_ids": row.token_ids.tolist(),
                "coef": row.coef.tolist(),
                "text": decode(row.token_ids),
            }
            for row in rows
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.world.on_main(lambda: checkpoint.write_text(file, text))
        return file

    def report(self, console: Console, worth: Mapping[int, float]) -> None:
        """Write report.html, with its figure; print the closing table and which step was best.

        Only the main process calls it.
        """
        page = report.write_report(self.path, figure=self.cfg.metrics.figure)
        headers, table = report.closing_table(self.path)
        console.close()  # the bar would be drawn below the table
        if table:
            console.table(headers, table, notes=report.closing_notes(self.path))
        # Among the saved steps alone: a better one that is deleted cannot be exported.
        best = checkpoint.best_step(worth, checkpoint.saved_steps(self.path))
        if best is not None:
            console.message(
                f"best by {self.cfg.checkpoint.keep_best}: step {best} ({worth[best]:.4g}); "
                f"vpgea export {self.path} --step best"
            )
        files = [page] + [self.path / report.FIGURE] * self.cfg.metrics.figure
        files += [self.path / name for name in self.exports.values()]
        console.message(", ".join(map(str, files)))

    def _claim(self, resume: bool) -> None:
        self.lock = checkpoint.claim_run_dir(self.path, resume=resume)
        # What a run that was killed in a hand-over has left: as large as the weights.
        shutil.rmtree(self.path / SYNC_DIR, ignore_errors=True)

    def _check_resume(self, saved: checkpoint.Checkpoint | None, data: str) -> None:
        """Raise CheckpointError where a key of FIXED_ON_RESUME, the steps or the questions do not
        fit; set `before` and `notices`."""
        step, record = 0 if saved is None else saved.step, _record(saved)
        if saved:
            _require_state(saved)
        # The checkpoint's own record first: config.yaml may have been edited since.
        self.before = record or load(self.path / "config.yaml", record=True)
        changed = changes(self.before, self.cfg)
        # An evaluation of other settings would stand beside those before as if it were one of them.
        evaluated = ("eval.",) if report.read_evaluation(self.path) else ()
        self._require_fixed(changed, (*FIXED_ON_RESUME, *evaluated), "start another run")
        made = f"{step} steps"
        if saved and saved.updates:
            made += f" and {saved.updates} of the updates of the next"
            whole = checkpoint.saved_steps(self.path)
            other = f"delete {saved.path} to go on from step {whole[-1]}" if whole else ""
            self._require_fixed(changed, FIXED_BETWEEN_UPDATES, other or "start another run")
        # As many are fine: what may be missing is the last evaluation, the export, the report.
        if self.cfg.train.steps < step + bool(saved and saved.updates):
            raise checkpoint.CheckpointError(
                f"train.steps {self.cfg.train.steps}: {made} are made already; give more"
            )
        limit = self.cfg.train.max_tokens
        spent = saved and limit is not None and saved.trainer_state.get("tokens", 0) >= limit
        if saved and not saved.updates and (spent or self.cfg.train.steps == step):
            # config.yaml and the report would name a rate that no step had.
            limits = "train.max_tokens" if spent else "train.steps"
            more = f"give more {limits}: none of the run's {step} steps is left to have them"
            self._require_fixed(changed, ("optim.",), more)
        # The order of the questions counts too: a step's own are drawn by their places.
        if saved and saved.trainer_state["data"] != data:
            raise checkpoint.CheckpointError(
                f"the questions of {', '.join(file.path for file in self.cfg.data.train)} are not "
                f"those that the run began with, by {saved.path}/state.json; bring them back, or "
                "start another run"
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

    def _require_fixed(
        self, changed: Mapping[str, tuple[object, object]], keys: tuple[str, ...], other: str
    ) -> None:
        """Raise CheckpointError where one of `keys`, or beginnings of keys, has changed; `other` is
        what can be done instead of setting it back."""
        fixed = [
            f"{key} from {_spelled(old)} to {_spelled(new)}"
            for key, (old, new) in changed.items()
            if key.startswith(keys) and key not in FREE_ON_RESUME
        ]
        if fixed:
            raise checkpoint.CheckpointError(
                f"--resume would change {', '.join(fixed)}, on which the steps so far rest; set "
                f"them back in {self.path / 'config.yaml'} and on the command line, or {other}"
            )

    def _cut_logs(self, step: int, alarms: Alarms) -> None:
        """End the logs at `step`, and keep a changed configuration beside; replay `alarms`."""
        if changes(self.before, self.cfg):
            old = self.path / f"config.until_step_{step}.yaml"
            checkpoint.write_text(old, dump(self.before))
        # Steps after the checkpoint are made again, so their lines would stand twice.
        lines = self._cut_log(METRICS, step, once=True)
        paths = self._cut_log(PATHS, step, once=False)
        # The page marks a run that has ended; the figure may not be drawn again.
        for name in (report.REPORT, report.FIGURE):
            (self.path / name).unlink(missing_ok=True)
        written: dict[int, int] = {}
        # Alarms count steps in a row: replayed, they know what the killed process knew.
        for record in read_steps(self.path):
            alarms.update(record)
            # Older versions did not count: what is there must be believed.
            written[record["step"]] = record.get("paths_written", paths[record["step"]])
        if gaps := missing_steps(lines, step):
            self.notices.append(f"{self.path / METRICS}: no line of steps {gaps}")
        # A step without a line of metrics is told of above: how many paths it had, nobody knows.
        whole = {number for number, count in written.items() if paths[number] == count}
        if gaps := missing_steps(whole | (set(range(1, step + 1)) - written.keys()), step):
            self.notices.append(f"{self.path / PATHS}: not all lines of steps {gaps}")

    def _cut_log(self, name: str, step: int, *, once: bool) -> Counter[int]:
        """Take out of a log what is torn or later than `step`; count the lines of each step."""
        path = self.path / name
        cut = checkpoint.truncate_jsonl(path, upto=step, once=once)
        self.notices += cut.words(path, step)
        return cut.lines


def _require_state(saved: checkpoint.Checkpoint) -> None:
    """Raise CheckpointError for a state that `Trainer.save` does not write."""
    state = saved.trainer_state
    kinds = {"skipped_in_a_row": int, "data": str, "evaluated": dict, "method": dict, "tokens": int}
    for key, kind in kinds.items():
        # Of versions that had none of it.
        missing = kind() if key in ("evaluated", "method", "tokens") else None
        if type(state.get(key, missing)) is not kind:
            raise checkpoint.CheckpointError(
                f"{saved.path}/state.json: got {key} {state.get(key)!r:.60}, expected "
                f"{kind.__name__}; delete this checkpoint to go on from the one before"
            )


def _record(saved: checkpoint.Checkpoint | None) -> Config | None:
    """Read the configuration that a checkpoint's steps were made with; None if it does not say, or
    has keys that no longer exist."""
    try:
        return None if saved is None else resolve(renewed(saved.trainer_state["config"]))
    except (KeyError, ConfigError):
        return None


def export_step(
    run_dir: str | Path,
    step: int | Literal["best", "last"],
    out_dir: str | Path | None = None,
    *,
    who: Trained = "policy",
) -> Path:
    """Write a model of a checkpoint as a Hugging Face directory (RUN/export_step_N, or of the
    posterior policy RUN/export_posterior_step_N, unless `out_dir` says where), on the CPU; return
    its path.

    `best` is chosen by the run's checkpoint.keep_best. The run may go on meanwhile. Errors:
    ValueError for what is no run, CheckpointError for a step without a complete checkpoint.
    """
    run_dir, world = Path(run_dir), World(torch.device("cpu"))
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir} is no run: config.yaml is missing; give a run directory")
    cfg = load(run_dir / "config.yaml", record=True)
    # No lock: a run may write meanwhile, and what is complete stays complete.
    steps = checkpoint.saved_steps(run_dir)
    if step == "best":
        name = cfg.checkpoint.keep_best
        worth = {} if name is None else report.evaluated(run_dir, name)
        chosen = checkpoint.best_step(worth, steps)
        if chosen is None:
            raise checkpoint.CheckpointError(
                f"{run_dir / 'checkpoints'}: checkpoint.keep_best is {_spelled(name)}, and no step "
                "with a checkpoint was evaluated by it; give --step N (there are: "
                f"{', '.join(map(str, steps)) or 'none'})"
            )
    else:
        # Without any checkpoint step 0: the next line then says that there is none.
        chosen = max(steps, default=0) if step == "last" else step
    saved = checkpoint.open_checkpoint(run_dir, chosen, world=world)
    # The weights are those of any machine; what the run's own needed (kernels, a GPU) is left out.
    given = (_record(saved) or cfg).model
    model = replace(
        given,
        # Masters alone: nothing runs, so there are no weights of a forward beside them.
        dtype="float32" if given.has_masters else given.dtype,
        device="cpu",
        attention="auto",
        liger="never",
        activation_checkpointing="none",
        compile=False,
    )
    out_dir = Path(out_dir or run_dir / f"{EXPORTS[who]}_step_{chosen}")
    policy = load_policy(model, world)
    checkpoint.put_weights(saved, policy, world=world, who=who)
    dtype = getattr(torch, given.dtype)
    tokenizer = load_tokenizer(given.path)
    return checkpoint.export_model(policy, tokenizer, out_dir, world=world, dtype=dtype)


def rate_changes(old: Config, new: Config, step: int) -> list[str]:
    """Say in numbers what a resume does to the learning rate of the next update."""
    if step >= new.train.steps:
        return []
    now = learning_rate(new.optim, step, new.train.steps)
    # Three rates: of the next update, of it without the change, and of the last one made.
    planned = learning_rate(old.optim, step, old.train.steps) if step < old.train.steps else 0.0
    last = learning_rate(old.optim, step - 1, old.train.steps) if step else 0.0
    # A finished run that gets more steps has no planned rate: then the last one is compared.
    if now == planned or (step >= old.train.steps and now == last):
        return []
    return [
        f"learning rate: {last:.3g} at step {step}, {now:.3g} at step {step + 1}; without the "
        + (f"change {planned:.3g}" if step < old.train.steps else "change the run had ended")
    ]


def _spelled(value: object) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)

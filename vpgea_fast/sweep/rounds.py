"""Rounds of Variational Reasoning with two models: one run of `vpgea train` after the other.

    phi    draws of theta, weighed by what theta answers -> phi learns them behind the hint
    theta  draws of phi, weighed by theta -> theta learns them

    OUT/round_T/STAGE/     its run directory, without checkpoints; STAGE.yaml, .txt (what it said)
    OUT/rounds.json        the held-out bound of every round, its change, and which models are kept
    OUT/export[_posterior] theta and phi of the last round that was kept

After each round the bound L_K of held-out questions is taken. Where it falls the round is refused:
the models of the round before are kept, and no other round is made. A stage that is done is never
run again, and one that was left goes on, so the same command goes on after any end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vpgea_fast.checkpoint import write_text
from vpgea_fast.config import (
    Config,
    PosteriorConfig,
    ReplayEngineConfig,
    as_dict,
    dump,
    read_sections,
)
from vpgea_fast.distributed import World, pick_device
from vpgea_fast.intake import ALONE, open_text, read
from vpgea_fast.objectives import Vr, VrPhi, VrTheta
from vpgea_fast.stop import Stop
from vpgea_fast.sweep.inputs import meaning
from vpgea_fast.sweep.plan import SweepError
from vpgea_fast.sweep.runs import claimed
from vpgea_fast.sweep.server import Starter
from vpgea_fast.verify import Verifier

Say = Callable[[str], None]
Launch = Callable[[list[str], Path], int]
"""Runs `vpgea WORDS` with its output in a file; its exit status."""


@dataclass(frozen=True)
class Models:
    """Directories of both models."""

    theta: str
    phi: str


class Rounds:
    """The stages of every round over one configuration, in one folder."""

    def __init__(self, cfg: Config, out: Path, *, launch: Launch) -> None:
        self.cfg, self.out, self.launch = cfg, out, launch
        self.method = _method(cfg)
        held = replace(cfg.data, train=cfg.eval.data, limit=cfg.eval.limit)
        self.held = replace(self._plain(cfg), data=held)
        # How many there are is known when they are read: some may be dropped.
        self.questions, self.held_questions = count(self._plain(cfg)), count(self.held)

    def go(self, rounds: int, say: Say) -> list[dict[str, Any]]:
        """Make the rounds, or what is missing of them; what is known of each."""
        kept = Models(self.cfg.model.path, self.cfg.posterior.path or self.cfg.model.path)
        if self.method.joint:
            say("objective.phi_weight and share_params change nothing: each model has its own runs")
        known = [self.measure(0, kept, say)]
        for number in range(1, rounds + 1):
            made = self.round(number, kept)
            found = self.measure(number, made, say)
            found |= change(known[-1]["by_question"], found["by_question"])
            found["kept"] = found["bound"] >= known[-1]["bound"]
            known.append(found)
            # After each: a kill in the next round must not hide what is kept.
            self._keep(known)
            if not found["kept"]:
                say(
                    f"round {number} is refused: its held-out bound fell from "
                    f"{known[-2]['bound']:.6g} to {found['bound']:.6g} (standard error of the "
                    f"change {found['change_error']:.2g}); the models of round {number - 1} are "
                    "kept"
                )
                break
            kept = made
        return known

    def round(self, number: int, models: Models) -> Models:
        """Train phi and theta of a round on fresh draws of the models before it."""
        batch, steps = self.cfg.train.questions_per_step, self.cfg.train.steps
        # A question is weighed once, however often the steps that train come back to it.
        once = min(steps, -(-self.questions // batch))
        # Another seed for every round: other questions, where one pass is more than its steps.
        base = replace(self._plain(self.cfg), run=replace(self.cfg.run, seed=self._seed(number)))
        draw, weigh = (recorded(base, kind, once) for kind in ("paths", "weights"))
        phi, theta, place = self.method.phi, self.method.theta, f"round_{number}"
        own = self.stage(f"{place}/unhinted", weigh, phi, models.theta)
        rate = self.cfg.posterior.lr or base.optim.lr
        of_phi = replace(base, optim=replace(base.optim, lr=rate))
        phi_run = self.stage(f"{place}/phi", replayed(of_phi, own), phi, models.phi)
        made = str(phi_run / "export")
        hinted = self.stage(f"{place}/hinted", draw, theta, made)
        read_q = replace(theta, log_q="recorded")
        weights = self.stage(f"{place}/weights", replayed(weigh, hinted), read_q, models.theta)
        last = replace(theta, weights="recorded", **self.method.unread)
        theta_run = self.stage(f"{place}/theta", replayed(base, weights), last, models.theta)
        return Models(str(theta_run / "export"), made)

    def measure(self, number: int, models: Models, say: Say) -> dict[str, Any]:
        """The bound of held-out questions, on draws of phi that theta weighs."""
        train = self.held.train
        batch = min(train.questions_per_step, self.held_questions)
        held = replace(self.held, train=replace(train, questions_per_step=batch))
        steps, place, theta = -(-self.held_questions // batch), f"round_{number}", self.method.theta
        draw, weigh = (recorded(held, kind, steps) for kind in ("paths", "weights"))
        drawn = self.stage(f"{place}/held_out_paths", draw, theta, models.phi)
        read_q = replace(theta, log_q="recorded")
        run = self.stage(f"{place}/held_out", replayed(weigh, drawn), read_q, models.theta)
        # Half an answer of J + 1, so that a question without a right one counts too.
        least = 0.5 / (self.cfg.scoring.answer_samples + 1)
        with (run / "paths.jsonl").open(encoding="utf-8") as lines:
            found = held_out_bound(map(json.loads, lines), least=least)
        say(
            f"round {number}: held-out bound {found['bound']:.6g} over {found['questions']} "
            f"questions, f {found['answered']:.3f}"
        )
        return {"round": number, "theta": models.theta, "phi": models.phi, "kept": True, **found}

    def stage(self, name: str, cfg: Config, objective: Any, model: str) -> Path:
        """Run a stage to its end, unless it has ended; its run directory."""
        run, file, done = (self.out / f"{name}{end}" for end in ("", ".yaml", ".done"))
        own = replace(
            cfg,
            run=replace(cfg.run, dir=str(run)),
            model=replace(cfg.model, path=model),
            objective=objective,
        )
        if file.is_file() and meaning(read_sections(file), str(file)) != meaning(as_dict(own)):
            raise SweepError(
                f"{file} is of another configuration; bring it back, or give another --out"
            )
        if done.is_file():
            return run
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, dump(own))
        log = self.out / f"{name}.txt"
        status = self.launch(["train", str(file), "--resume-if-started"], log)
        if status:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise SweepError(
                f"the stage {name} ended with status {status}: {said[-1] if said else '-'} (all of "
                f"it: {log}); mend it, and the same command goes on"
            )
        # Before the mark: a stage that is marked is never gone on with.
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        write_text(done, "")
        return run

    def _plain(self, cfg: Config) -> Config:
        """The configuration of a stage, without evaluations: the bound is the measure."""
        return replace(
            cfg,
            posterior=PosteriorConfig(),  # of two models here each has runs of its own
            eval=replace(cfg.eval, data=(), every=0),
            checkpoint=replace(cfg.checkpoint, keep_best=None, export=True),
            metrics=replace(cfg.metrics, compare=None),
        )

    def _seed(self, number: int) -> int:
        # A prime step: seeds side by side, as people choose them, must not meet in another round.
        return (self.cfg.run.seed + 7919 * number) % 2**31

    def _keep(self, known: list[dict[str, Any]]) -> None:
        """Write rounds.json, and the links to the models that are kept."""
        last = next(found for found in reversed(known) if found["kept"])
        write_text(self.out / "rounds.json", json.dumps({"kept": last, "rounds": known}, indent=1))
        for name, path in (("export", last["theta"]), ("export_posterior", last["phi"])):
            link = self.out / name
            with suppress(FileNotFoundError):
                link.unlink()
            if last["round"]:  # the start is no model of this folder
                link.symlink_to(os.path.relpath(path, self.out), target_is_directory=True)


@dataclass(frozen=True)
class Method:
    """The objectives of both steps; `unread` are keys that recorded weights leave without use.
    `joint`: the objective has a key that only both steps at once read."""

    theta: VrTheta
    phi: VrPhi
    unread: Mapping[str, Any]
    joint: bool


def _method(cfg: Config) -> Method:
    """The steps that the objective `vr` makes at once, one by one. SweepError for another."""
    own = cfg.objective
    if not isinstance(own, Vr) or own.phi != "forward_kl":
        raise SweepError(
            f"objective: got {own.name!r}, expected vr with phi forward_kl, whose steps the rounds "
            "make one by one; set objective.name vr"
        )
    # Another f would be that of phi, which is not the model that is asked.
    if own.estimator != "accuracy":
        raise SweepError(
            f"objective.estimator: got {own.estimator!r}, expected accuracy: the answers that "
            "theta gave are recorded, and its likelihoods are not"
        )
    if not cfg.eval.data:
        raise SweepError("eval.data is empty; the bound of its questions decides about a round")
    shared = {key: getattr(own, key) for key in ("norm", "norm_constant", "denominator")}
    shared["estimator"] = own.estimator
    of_theta = ("thought_ratio", "answer", "answer_rows", "group_size")
    theta = VrTheta(**shared, **{key: getattr(own, key) for key in of_theta})
    phi = VrPhi(**shared, group_size=own.prior_samples)
    unread = {"thought_ratio": "geometric"}
    if own.answer is not None:
        unread["estimator"] = "accuracy"
    return Method(theta, phi, unread, own.phi_weight != 1 or not own.share_params)


def recorded(cfg: Config, kind: str, steps: int) -> Config:
    """The stage that records and trains nothing."""
    alone = {"minibatches": 1, "epochs": 1, "resample_rounds": 0, "max_tokens": None}
    return replace(cfg, train=replace(cfg.train, record=kind, steps=steps, **alone))


def replayed(cfg: Config, run: Path) -> Config:
    """The stage that reads the paths of another."""
    # By question: a stage may go through them more often than they were drawn.
    engine = ReplayEngineConfig(paths=(str(run / "paths.jsonl"),), match="question")
    return replace(cfg, engine=engine)


def count(cfg: Config) -> int:
    """Count the questions of a stage, without those that it drops."""
    with Verifier.configured(cfg.verify) as verifier:
        return len(read(cfg, open_text(cfg), verifier.accepts_itself, ALONE).questions)


def held_out_bound(lines: Iterable[Mapping[str, Any]], *, least: float) -> dict[str, Any]:
    """Mean over questions of log (1/K) sum_k (pi / q)_k f_k, nats, with f at least `least`, so that
    every question counts; how many there are; the mean f; and the bound of each question.

    >>> one = {"question_id": "q", "log_ratio": 0.0}
    >>> found = held_out_bound([{**one, "answered": 1.0}, {**one, "answered": 0.0}], least=0.1)
    >>> round(found["bound"], 4), found["answered"]
    (-0.5978, 0.5)
    """
    logs, answered = defaultdict[str, list[float]](list), list[float]()
    for line in lines:
        answered.append(line["answered"])
        logs[line["question_id"]].append(line["log_ratio"] + math.log(max(answered[-1], least)))
    bounds = {}
    for question, own in logs.items():
        # A ratio of whole thoughts may be e^-2000.
        most = max(own)
        bounds[question] = most + math.log(sum(math.exp(log - most) for log in own) / len(own))
    return {
        "bound": sum(bounds.values()) / len(bounds),
        "questions": len(bounds),
        "answered": sum(answered) / len(answered),
        "by_question": bounds,
    }


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Mean change of the bound of the same questions, nats, and its standard error: a fall within
    it may be noise, and refuses a round all the same.

    >>> change({"a": -1.0, "b": -2.0}, {"a": -0.5, "b": -2.5})
    {'change': 0.0, 'change_error': 0.5}
    """
    steps = [after[question] - bound for question, bound in before.items()]
    error = stdev(steps) / math.sqrt(len(steps)) if len(steps) > 1 else math.nan
    return {"change": fmean(steps), "change_error": error}


def run_rounds(
    cfg: Config, out: Path, rounds: int, say: Say, launch: Launch | None = None
) -> list[dict[str, Any]]:
    """Make `rounds` rounds in `out`, or go on with them; what is known of each.

    Errors: SweepError or ConfigError before anything runs; SweepError for a stage that fails.
    `distributed.Stopped` when SIGTERM or Ctrl-C asked to leave: the stage under way has saved.
    """
    with (
        claimed(out, say) as lock,
        Stop(World(pick_device("cpu")), tell=say) as stop,
        Starter(stop, lock) as starter,
    ):

        def child(words: list[str], log: Path) -> int:
            process = starter.start(words, log, cfg.model.device)
            try:
                while process.poll() is None:
                    stop.alone()
                    time.sleep(0.05)
            finally:
                process.terminate()  # it saves first
                status = process.wait()
            return status

        return Rounds(cfg, out, launch=launch or child).go(rounds, say)

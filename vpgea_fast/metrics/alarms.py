"""What is wrong with a run, and what to change: read off its metrics alone."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpgea_fast.config import TrainConfig
from vpgea_fast.metrics.log import finite, read_steps

LIMITS = {
    "share_cov_negative": (
        0.3,
        "{:.0%} of the questions have Cov(L, S) < 0; lower objective.alpha",
    ),
    "trunc_prior": (
        0.2,
        "{:.0%} of the student's paths are cut at the token limit; raise rollout.max_new_tokens",
    ),
    "trunc_post": (
        0.2,
        "{:.0%} of the teacher's paths are cut at the token limit; raise rollout.max_new_tokens",
    ),
    "verdicts_missing": (
        0.0,
        (
            "{:.3g} answers per step have no verdict and count as wrong; raise verify.timeout_s, "
            "or choose a checker that is quicker (verify.name)"
        ),
    ),
    "mismatch_mean": (
        1.05,
        (
            "the engine samples from another policy than the one trained: mean exp|log-prob gap| "
            "is {:.3f}; try engine.fp32_head true, or rollout.importance_cap 2"
        ),
    ),
}
"""metric -> (limit of its mean over a few steps, what is said of that mean)."""
# Of a replay.
MOVED_AWAY = "the policy has moved too far from the one whose paths are recorded"
HOLD_STILL = "lower optim.lr, make fewer steps"

CONVERGED = "all paths of each question were equal and right"

IDLE = {
    CONVERGED: "these questions teach no more: take harder ones, or be content",
    "the gradient was not finite": "lower optim.lr",
    "the engine gave up a path of every question": "see engine.timeout_s",
    "every path was rejected (cut, wrong, or no better than the student's own)": (
        "read paths.jsonl: do the answers have the form that the data has? Lower optim.lr, or "
        "raise rollout.max_new_tokens"
    ),
    "all paths of each question were worth the same": (
        "raise rollout.temperature, or take questions that the student sometimes fails"
    ),
    "every group's spread was below objective.std_gate": "lower objective.std_gate",
}
"""Why a step made no update -> what to do."""

EQUAL = 0.05
"""std_s below which paths are worth the same: the gate of preset `robust`."""


class Alarms:
    """Watches the metrics and says, once per condition, what is wrong and what to change.

    preflight   mean of adv_post over its first 5 steps <= 0
    collapse    acc_student fell while u_post rose: means of the last 10 steps and of the 10 before,
                each by more than 2 standard errors, accuracy by 2 points or more. So it looks when
                thoughts learn to state or copy the answer
    covariance  mean share_cov_negative of the last 5 steps > 0.3
    truncation  mean trunc_prior, or trunc_post, of the last 5 steps > 0.2
    verdicts    mean verdicts_missing of the last 5 steps > 0
    mismatch    mean mismatch_mean of the last 5 steps > 1.05, NeMo-RL's bar
    idle        no update for train.idle_alarm steps in a row, with the reasons counted

    `halt` says why the run must end after the last record, or is None: no update for
    train.idle_stop steps in a row, or mismatch_mean above train.mismatch_stop for
    train.mismatch_steps measured steps in a row. Having said so it counts anew: a resumed run gets
    another chance.

    `replays`: the paths are recorded ones, which no engine draws: the remedy is another.

    The state is a function of the records alone: a resumed run replays metrics.jsonl and goes on as
    if it had not stopped.
    """

    FEW, WINDOW = 5, 10

    def __init__(self, cfg: TrainConfig | None = None, *, replays: bool = False) -> None:
        self.cfg, self.halt, self.replays = cfg or TrainConfig(), None, replays
        self._idle: list[str] = []
        self._mismatched = 0
        self._first_advantages: list[float] = []
        self._accuracy: deque[float] = deque(maxlen=2 * self.WINDOW)
        self._utility: deque[float] = deque(maxlen=2 * self.WINDOW)
        self._last = {key: deque[float](maxlen=self.FEW) for key in LIMITS}
        self._raised: set[str] = set()

    def update(self, record: Mapping[str, Any]) -> list[str]:
        """The alarms that this record sets off, each a text with the remedy."""
        # First: it counts the idle step of which `_idles` speaks below.
        self.halt = self._stays_idle(record) or self._is_off(record)
        # Each is asked at every step, even one that has spoken: the windows must go on.
        texts = {
            "idle": self._idles(),
            "preflight": self._preflight(record),
            "collapse": self._collapse(record),
            **{key: self._beyond(record, key) for key in LIMITS},
        }
        fresh = {name: text for name, text in texts.items() if text and name not in self._raised}
        self._raised |= fresh.keys()
        return [f"alarm at step {record['step']}: {text}" for text in fresh.values()]

    def replay(self, run_dir: str | Path) -> list[str]:
        """`update` with every line of the run's metrics.jsonl, and all that it said."""
        return [text for record in read_steps(run_dir) for text in self.update(record)]

    def _stays_idle(self, record: Mapping[str, Any]) -> str | None:
        if self.cfg.record:  # no step of it makes an update
            return None
        if record.get("skipped") != 1:
            self._idle.clear()
            return None
        self._idle.append(idle_reason(record))
        if self.cfg.idle_stop is None or len(self._idle) < self.cfg.idle_stop:
            return None
        text = self._idle_words()
        self._idle.clear()
        return text

    def _idles(self) -> str | None:
        return self._idle_words() if len(self._idle) == self.cfg.idle_alarm else None

    def _idle_words(self) -> str:
        counts = Counter(self._idle).most_common()
        told = "; ".join(f"{count} x {reason}: {IDLE[reason]}" for reason, count in counts)
        # No fault of the run: it has learnt what its questions hold.
        converged = "converged: " if {*self._idle} == {CONVERGED} else ""
        return f"{converged}no update for {len(self._idle)} steps in a row ({told})"

    def _is_off(self, record: Mapping[str, Any]) -> str | None:
        """A mean that is no number (null in metrics.jsonl) is beyond every limit."""
        limit = self.cfg.mismatch_stop
        # Not every step measures the gap; one that does not neither counts nor interrupts.
        if limit is None or "mismatch_mean" not in record:
            return None
        mean = finite(record["mismatch_mean"])
        self._mismatched = 0 if mean is not None and mean <= limit else self._mismatched + 1
        if self._mismatched < self.cfg.mismatch_steps:
            return None
        self._mismatched = 0
        cause = "the engine samples from another policy than the one trained"
        remedy = "see that the engine has the weights (rollout.probe_every 1), "
        remedy += "try engine.fp32_head true"
        if self.replays:
            cause, remedy = MOVED_AWAY, f"{HOLD_STILL}, or set train.mismatch_stop null"
        return (
            f"{cause}: mismatch_mean was above train.mismatch_stop ({limit:g}) for "
            f"{self.cfg.mismatch_steps} steps in a row, the last time "
            f"{'not finite' if mean is None else f'{mean:.3g}'}; {remedy}"
        )

    def _preflight(self, record: Mapping[str, Any]) -> str | None:
        first, value = self._first_advantages, finite(record.get("adv_post"))
        # The first five alone: later the student catches up, and the difference goes to 0.
        if value is None or len(first) == self.FEW:
            return None
        first.append(value)
        mean = statistics.fmean(first)  # one step's estimate may be negative by chance
        if len(first) < self.FEW or mean > 0:
            return None
        return (
            f"preflight: over the first {self.FEW} steps the teacher's paths were worth no more "
            f"than the student's own (E_q[S] - E_pi[S] = {mean:.3g} <= 0): there is nothing to "
            "distil. Read paths.jsonl, improve prompt.teacher, lower objective.alpha, or take "
            "questions that the student sometimes fails"
        )

    def _collapse(self, record: Mapping[str, Any]) -> str | None:
        accuracy, utility = finite(record.get("acc_student")), finite(record.get("u_post"))
        if accuracy is None or utility is None:
            return None
        self._accuracy.append(accuracy)
        self._utility.append(utility)
        if len(self._accuracy) < 2 * self.WINDOW:  # two windows are compared
            return None
        # Both in standard errors of a difference of means: a noisy step must not raise the alarm.
        # Negated, so that a fall too is a change above a limit.
        fall, fall_errors = _change([-value for value in self._accuracy])
        rise, rise_errors = _change(self._utility)
        # u_post rises in a good run too: it is an alarm only while the accuracy falls.
        if fall < 0.02 or min(fall_errors, rise_errors) <= 2:
            return None
        return (
            f"the student's accuracy fell by {100 * fall:.1f} points while log P(answer) after the "
            f"teacher's paths rose by {rise:.2f}: they may state or copy the answer. Read "
            "paths.jsonl, set objective.verify to gate, or lower optim.lr"
        )

    def _beyond(self, record: Mapping[str, Any], key: str) -> str | None:
        last, value, (limit, text) = self._last[key], finite(record.get(key)), LIMITS[key]
        if value is None:
            return None
        last.append(value)
        mean = statistics.fmean(last)
        # A full window alone: the first steps of a run are the noisiest.
        if self.replays and key == "mismatch_mean":
            text = f"{MOVED_AWAY}: mean exp|log-prob gap| is {{:.3f}}; {HOLD_STILL}"
        return text.format(mean) if len(last) == self.FEW and mean > limit else None


def idle_reason(record: Mapping[str, Any]) -> str:
    """Why the step of this record made no update: a key of IDLE."""
    groups, spread = record.get("groups_zero_var"), finite(record.get("std_s"))
    right = [finite(record[k]) for k in ("acc_student", "acc_teacher") if k in record]
    right = right or [finite(record.get("accept_rate"))]
    # In the order of IDLE's keys.
    converged, infinite, lost, rejected, same, gated = IDLE
    # The log writes null for a number that is not finite.
    norms = record.get("grad_norm"), record.get("grad_norm_posterior", 0.0)
    if None in map(finite, norms):
        return infinite
    if groups is None:
        return lost
    # std_s is a mean over groups: what is said is what most of them were.
    equal = spread is not None and spread < EQUAL
    if equal and all(share == 1 for share in right):
        return converged
    if record.get("groups_all_rejected") == groups:
        return rejected
    return same if equal else gated


def _change(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the later half minus mean of the earlier: as it is, and in standard errors."""
    half = len(values) // 2
    before, after = list(values)[:half], list(values)[half:]
    change = statistics.fmean(after) - statistics.fmean(before)
    # Of a difference of two independent means of `half` values each.
    error = math.sqrt((statistics.variance(before) + statistics.variance(after)) / half)
    if error == 0:
        # Constant halves have no noise: any change is beyond every limit.
        return change, 0.0 if change == 0 else math.copysign(math.inf, change)
    return change, change / error

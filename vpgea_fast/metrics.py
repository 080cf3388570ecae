"""What a run tells: metrics.jsonl, phase times, the console, the alarms, eps3, and the environment.

The only file that may import a logger. Metrics are a flat dict a step: what `MetricsWriter` writes,
`Console` prints from, and `Alarms` watches, so a replay of metrics.jsonl puts all of them back.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console as Terminal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from vpgea_fast.config import TrainConfig, printable
from vpgea_fast.types import ModelFlops

METRICS, PATHS = "metrics.jsonl", "paths.jsonl"
KEY = re.compile(r"[a-z][a-z0-9_]*")
TIME = re.compile(r"time_\w+_s")
MAX_SPANS = 8

PEAK_FLOPS = (
    ("H100 PCIe", 756.5e12),
    ("H100 NVL", 835.5e12),
    ("H200 NVL", 835.5e12),
    ("H100", 989.5e12),
    ("H200", 989.5e12),
    ("A100", 312e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("L40S", 362e12),
)
"""(part of the name that CUDA gives a device, dense bfloat16 operations a second), the first match
counts. From NVIDIA's data sheets, which print twice the rate, that of sparse matrices."""

STEP_LINE = (
    ("acc", "acc_student", "{:.3f}"),
    ("eps3", "eps3_student", "{:.3g}"),
    ("prior", "len_prior", "{:.1f}"),
    ("post", "len_post", "{:.1f}"),
    ("gated", "len_gated_ratio", "{:.2f}x"),
    ("accept", "accept_rate", "{:.0%}"),
    ("gate", "gate_rate", "{:.0%}"),
    ("cut", "trunc_prior", "{:.0%}"),
    ("grad", "grad_norm", "{:.2g}"),
    ("tok/s", "tokens_per_s", "{:.0f}"),
)
"""(label, metric, format) of a step's line; a metric that the step lacks is left out."""


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
    "mismatch_mean": (
        1.05,
        (
            "the engine samples from another policy than the one trained: mean exp|log-prob gap| "
            "is {:.3f}; try engine.fp32_head true, or rollout.importance_cap 2"
        ),
    ),
}
"""metric -> (limit of its mean over a few steps, what is said of that mean)."""


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


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One dict of all parts. ValueError for a key that two of them have: one would be lost.

    >>> merge({"len_post": 4.0}, {"loss": 0.1})
    {'len_post': 4.0, 'loss': 0.1}
    """
    merged: dict[str, Any] = {}
    for part in parts:
        repeated = sorted(merged.keys() & part.keys())
        if repeated:
            raise ValueError(
                f"metrics: got {', '.join(repeated)} twice, expected every name once; rename it in "
                "the objective"
            )
        merged |= part
    return merged


class MetricsWriter:
    """Appends to metrics.jsonl and paths.jsonl, flushed: a kill costs the last line at most.

    NaN and infinity, which JSON does not have, become null.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._metrics = (self.run_dir / METRICS).open("a", encoding="utf-8")
        self._paths = (self.run_dir / PATHS).open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """One step's line. ValueError for a name that is not snake_case ASCII."""
        wrong = [key for key in record if not KEY.fullmatch(key)]
        if wrong:
            raise ValueError(f"metric names: got {wrong}, expected snake_case ASCII like kl_q_pi")
        self._append(self._metrics, [record])

    def write_paths(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._append(self._paths, records)

    def _append(self, file: TextIO, records: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(_json_ready(record), allow_nan=False) + "\n" for record in records]
        try:
            file.write("".join(lines))
            file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot append to {file.name} ({error.strerror}); free disk space and go on with "
                f"--resume {self.run_dir}",
            ) from error

    def close(self) -> None:
        self._metrics.close()
        self._paths.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_steps(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one at a time; none without the file. An unfinished last
    line (a live or killed run) is left out.

    Raises ValueError with file and line number for anything else that is no step's JSON object.
    """
    path = Path(run_dir) / METRICS
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"{path}: got a directory, expected the lines of the steps; move it away")
    remedy = "delete the line, or let --resume take it out"
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{where}: not JSON ({error}); {remedy}") from error
            step = record.get("step") if isinstance(record, dict) else None
            if type(step) is not int or not 0 <= step < 2**31:
                got = f"step {step!r}" if isinstance(record, dict) else f"a {type(record).__name__}"
                raise ValueError(f"{where}: got {got}, expected an object of a step; {remedy}")
            yield record


def missing_steps(seen: Collection[int], upto: int) -> str:
    """Which of the steps 1 to `upto` are not in `seen`, in words; "" where none is missing.

    >>> missing_steps({1, 2, 4, 8}, 9)
    '3, 5 to 7, 9'
    """
    spans: list[list[int]] = []
    for step in range(1, upto + 1):
        if step in seen:
            continue
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    words = [f"{a}" if a == b else f"{a} to {b}" for a, b in spans]
    more = [f"{len(words) - MAX_SPANS} more gaps"] if len(words) > MAX_SPANS else []
    return ", ".join(words[:MAX_SPANS] + more)


class PhaseTimer:
    """Wall seconds of the named phases of a step.

    `synchronize` (torch.cuda.synchronize) makes a phase wait for the work it has queued; without it
    a GPU's time lands in the phase that first asks for a result.

    >>> timer = PhaseTimer()
    >>> with timer("rollout"):
    ...     pass
    >>> list(timer.metrics())
    ['time_rollout_s']
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            if self._synchronize is not None:
                self._synchronize()
        finally:
            spent = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent

    def metrics(self) -> dict[str, float]:
        return {f"time_{phase}_s": seconds for phase, seconds in self._seconds.items()}


class Console:
    """The run on a terminal: a bar with the time left, a line a step, tables; else plain lines.

    `total` steps (0: there are none), of which `done` were made before this process. A plain log
    hears of samples being drawn after `quiet_s` seconds without a line. `silent`: no word at all.
    """

    def __init__(
        self,
        total: int = 0,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        quiet_s: float = 20.0,
        silent: bool = False,
    ) -> None:
        self._terminal = Terminal(file=stream, highlight=False, quiet=silent)
        live = self._terminal.is_terminal
        if not live:
            self._terminal.width = 160  # rich takes a pipe for 80 columns and folds tables
        self._total, self._quiet_s = total, quiet_s
        self._step_seconds: deque[float] = deque(maxlen=20)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        left = TextColumn("{task.fields[left]}")
        self._bar = Progress(*columns, left, console=self._terminal, disable=not live)
        self._task = self._bar.add_task(
            "steps", total=total, completed=done, left="", visible=total > 0
        )
        self._bar.start()

    def message(self, text: str) -> None:
        self._terminal.print(printable(text), markup=False, soft_wrap=True)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A line for the step that `metrics` tells of; the time left follows the last 20 steps."""
        done = metrics["step"]
        self._step_seconds.append(sum(metrics[key] for key in metrics if TIME.fullmatch(key)))
        left = statistics.fmean(self._step_seconds) * (self._total - done)
        self.message(step_line(metrics, self._total, left))
        self._bar.update(self._task, completed=done, left=f"{clock_time(left)} left")

    def samples(self, total: int, what: str = "samples") -> Callable[[int], None]:
        """Progress of drawing `total` samples: call the result with the number newly finished.

        The time left is that of the samples so far, so it falls short while only short ones ended.
        """
        task = self._bar.add_task(what, total=total, left="")
        finished, spoke = 0, time.monotonic()
        began = spoke

        def advance(count: int) -> None:
            nonlocal finished, spoke
            if not count:  # the bar of the last one is gone
                return
            finished += count
            left = (time.monotonic() - began) / max(1, finished) * (total - finished)
            self._bar.update(task, completed=finished, left=f"{clock_time(left)} left")
            if finished >= total:
                self._bar.remove_task(task)
            elif self._bar.disable and time.monotonic() - spoke > self._quiet_s:
                spoke = time.monotonic()
                self.message(f"{what} {finished}/{total}  left {clock_time(left)}")

        return advance

    def watched(self, judge: Callable[..., list[bool]], what: str) -> Callable[..., list[bool]]:
        """`judge` of many items with a bar; its `on_progress` need not hear of all of them."""

        def run(items: Sequence[str]) -> list[bool]:
            advance, left = self.samples(len(items), what), len(items)

            def on_progress(count: int) -> None:
                nonlocal left
                left -= count
                advance(count)

            verdicts = judge(items, on_progress=on_progress)
            if left:  # what was known already, and what other processes judged
                advance(left)
            return verdicts

        return run

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index, header in enumerate(headers):
            table.add_column(header, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        self._terminal.print(table)
        for note in notes:
            self.message(note)

    def close(self) -> None:
        if not self._bar.disable:  # a bar that never ran would print an empty line
            self._bar.stop()


def step_line(metrics: Mapping[str, Any], total: int, seconds_left: float) -> str:
    """One line for one step.

    >>> step_line({"step": 3, "acc_student": 0.8125, "len_prior": 51.26}, 60, 114.2)
    'step  3/60  acc 0.812  prior 51.3  left 1:54'
    """
    words = [f"step {metrics['step']:>{len(str(total))}}/{total}"]
    for label, key, form in STEP_LINE:
        value = finite(metrics.get(key))
        if value is not None:
            words.append(f"{label} {form.format(value)}")
    return "  ".join([*words, f"left {clock_time(seconds_left)}"])


def clock_time(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour.

    >>> clock_time(59.6), clock_time(3661)
    ('1:00', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def finite(value: Any) -> float | None:
    """`value` as a float, or None for what has none: None, NaN, infinity, text."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


class Alarms:
    """Watches the metrics and says, once a condition, what is wrong and what to turn.

    preflight   mean of adv_post over its first 5 steps <= 0
    collapse    acc_student fell while u_post rose: means of the last 10 steps and of the 10 before,
                each by more than 2 standard errors, accuracy by 2 points or more. So it looks when
                thoughts learn to state or copy the answer
    covariance  mean share_cov_negative of the last 5 steps > 0.3
    truncation  mean trunc_prior, or trunc_post, of the last 5 steps > 0.2
    mismatch    mean mismatch_mean of the last 5 steps > 1.05, NeMo-RL's bar
    idle        no update for train.idle_alarm steps in a row, with the reasons counted

    `halt` says why the run must end after the last record, or is None: no update for
    train.idle_stop steps in a row, or mismatch_mean above train.mismatch_stop for
    train.mismatch_steps measured steps in a row. Having said so it counts anew: a resumed run gets
    another chance.

    The state is a function of the records alone: a resumed run replays metrics.jsonl and goes on as
    if it had not stopped.
    """

    FEW, WINDOW = 5, 10

    def __init__(self, cfg: TrainConfig | None = None) -> None:
        self.cfg, self.halt = cfg or TrainConfig(), None
        self._idle: list[str] = []
        self._mismatched = 0
        self._first_advantages: list[float] = []
        self._accuracy: deque[float] = deque(maxlen=2 * self.WINDOW)
        self._utility: deque[float] = deque(maxlen=2 * self.WINDOW)
        self._last = {key: deque[float](maxlen=self.FEW) for key in LIMITS}
        self._raised: set[str] = set()

    def update(self, record: Mapping[str, Any]) -> list[str]:
        """The alarms that this record sets off, each a text with the remedy."""
        self.halt = self._stays_idle(record) or self._is_off(record)
        found = {
            "idle": self._idles(),
            "preflight": self._preflight(record),
            "collapse": self._collapse(record),
            **{key: self._beyond(record, key) for key in LIMITS},
        }
        fresh = {name: text for name, text in found.items() if text and name not in self._raised}
        self._raised |= fresh.keys()
        return [f"alarm at step {record['step']}: {text}" for text in fresh.values()]

    def replay(self, run_dir: str | Path) -> list[str]:
        """`update` with every line of the run's metrics.jsonl, and all that it said."""
        return [text for record in read_steps(run_dir) for text in self.update(record)]

    def _stays_idle(self, record: Mapping[str, Any]) -> str | None:
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
        converged = "converged: " if {*self._idle} == {CONVERGED} else ""
        return f"{converged}no update for {len(self._idle)} steps in a row ({told})"

    def _is_off(self, record: Mapping[str, Any]) -> str | None:
        """A mean that is no number (null in metrics.jsonl) is beyond every limit."""
        limit = self.cfg.mismatch_stop
        if limit is None or "mismatch_mean" not in record:
            return None
        mean = finite(record["mismatch_mean"])
        self._mismatched = 0 if mean is not None and mean <= limit else self._mismatched + 1
        if self._mismatched < self.cfg.mismatch_steps:
            return None
        self._mismatched = 0
        return (
            "the engine samples from another policy than the one trained: mismatch_mean was above "
            f"train.mismatch_stop ({limit:g}) for {self.cfg.mismatch_steps} steps in a row, the "
            f"last time {'not finite' if mean is None else f'{mean:.3g}'}; see that the engine has "
            "the weights (rollout.probe_every 1), try engine.fp32_head true"
        )

    def _preflight(self, record: Mapping[str, Any]) -> str | None:
        first, value = self._first_advantages, finite(record.get("adv_post"))
        if value is None or len(first) == self.FEW:
            return None
        first.append(value)
        mean = statistics.fmean(first)
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
        if len(self._accuracy) < 2 * self.WINDOW:
            return None
        fall, fall_errors = _change([-value for value in self._accuracy])
        rise, rise_errors = _change(self._utility)
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
        return text.format(mean) if len(last) == self.FEW and mean > limit else None


def idle_reason(record: Mapping[str, Any]) -> str:
    """Why the step of this record made no update: a key of IDLE."""
    groups, spread = record.get("groups_zero_var"), finite(record.get("std_s"))
    right = [finite(record[k]) for k in ("acc_student", "acc_teacher") if k in record]
    right = right or [finite(record.get("accept_rate"))]
    converged, infinite, lost, rejected, same, gated = IDLE
    if finite(record.get("grad_norm")) is None:
        return infinite
    if groups is None:
        return lost
    equal = spread is not None and spread < EQUAL
    if equal and all(share == 1 for share in right):
        return converged
    if record.get("groups_all_rejected") == groups:
        return rejected
    return same if equal else gated


def eps3(acc: float, tokens: float) -> float:
    """Efficiency ACC^2 / tokens of VPG-EA (arXiv 2605.11019): accuracy in percent, mean tokens.

    `acc` is a share, 0 to 1; `tokens` counts all generated tokens of a response, cut ones included.
    NaN where no token was generated.

    >>> round(eps3(0.79, 978), 2)
    6.38
    """
    return (100 * acc) ** 2 / tokens if tokens > 0 else math.nan


def eps3_mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(mean of ratios, ratio of means) over the (acc, tokens) of several benchmarks.

    The paper does not say which of mean_b(ACC_b^2 / tokens_b) and (mean ACC)^2 / mean tokens it
    prints. They differ by several times where benchmarks differ in length, so both are shown.

    >>> eps3_mean([(0.9, 900.0), (0.3, 9000.0)])
    (4.55, 0.7272727272727273)
    """
    if not pairs:
        raise ValueError("eps3_mean: got no benchmark, expected at least one (acc, tokens)")
    accs, tokens = zip(*pairs, strict=True)
    mean_of_ratios = statistics.fmean(eps3(acc, count) for acc, count in pairs)
    return mean_of_ratios, eps3(statistics.fmean(accs), statistics.fmean(tokens))


def model_flops(config: Any) -> ModelFlops:
    """What a document costs in a Hugging Face causal LM, from its config alone (no weight is made).

    Every matrix of the decoder counts, whatever the architecture; of a mixture of experts those
    that a token is sent through. Errors: ValueError for stacked matrices that are no such experts.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        causal_lm: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    looked_up = {id(m.weight) for m in causal_lm.modules() if isinstance(m, torch.nn.Embedding)}
    decoder = sum(
        _active(name, weight, config)
        for name, weight in causal_lm.base_model.named_parameters()
        if weight.ndim > 1 and id(weight) not in looked_up
    )
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelFlops(
        decoder=decoder,
        head=causal_lm.get_output_embeddings().weight.numel(),
        width=config.num_hidden_layers * heads * head_size,
    )


def _active(name: str, weight: torch.Tensor, config: Any) -> int:
    """How many numbers of a matrix a token is multiplied with."""
    if weight.ndim == 2:
        return weight.numel()
    chosen = getattr(config, "num_experts_per_tok", None)
    if weight.ndim != 3 or chosen is None:
        raise ValueError(
            f"{name} {tuple(weight.shape)}: expected matrices, or stacks of experts with "
            "num_experts_per_tok in config.json; the FLOPs of this model are not known, take "
            "another one"
        )
    return chosen * weight[0].numel()


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 operations a second of a device by its CUDA name; None for an unknown one.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
    (989500000000000.0, None)
    """
    return next((peak for part, peak in PEAK_FLOPS if part in device), None)


def mfu(flops: float, seconds: float, device: str, *, devices: int = 1) -> float | None:
    """Model FLOPs utilisation: `flops` of `ModelFlops`, done in `seconds` by `devices` together,
    as a share of their bfloat16 peak. None where the peak is not known.

    >>> mfu(989.5e12, 2.0, "NVIDIA H200")
    0.5
    """
    peak = peak_flops(device)
    return None if peak is None or seconds <= 0 else flops / (seconds * devices * peak)


def environment() -> dict[str, Any]:
    """What environment.json says about where a run was made: commit, versions, device."""
    cuda = torch.cuda.is_available()
    libraries = ("vpgea_fast", "torch", "transformers", "triton", "safetensors")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in libraries},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 0,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, `+changes` if files differ from it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: what encloses site-packages is another project
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _json_ready(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    return value


def _change(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the later half minus mean of the earlier: as it is, and in standard errors."""
    half = len(values) // 2
    before, after = list(values)[:half], list(values)[half:]
    change = statistics.fmean(after) - statistics.fmean(before)
    error = math.sqrt((statistics.variance(before) + statistics.variance(after)) / half)
    if error == 0:
        return change, 0.0 if change == 0 else math.copysign(math.inf, change)
    return change, change / error

"""What a sweep runs: methods, learning rates and seeds over one configuration, on one budget."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from vpgea_fast.config import Config, ConfigError, DataFile, as_dict, load, one_line
from vpgea_fast.config.schema import records_at
from vpgea_fast.data import load_questions
from vpgea_fast.objectives import METHODS
from vpgea_fast.sweep.inputs import Inputs
from vpgea_fast.values import nearest

OWN_KEYS = {
    "optim.lr": "--rates",
    "run.seed": "--seeds",
    "run.dir": "--out",
    "train.max_tokens": "--budget tokens:N",
}
"""Keys that a sweep sets itself -> where the user says them."""
COMMON_KEYS = (*OWN_KEYS, "objective.name", "train.steps")
"""What no method may set for itself, beside the section eval."""
SELECT = "select"
"""What the questions that pick the rates are called."""
METRICS = ("sampled_eps3", "greedy_eps3", "sampled_acc", "greedy_acc")


class SweepError(ValueError):
    """A sweep that cannot run, or go on; the message has cause and remedy."""


class Method(NamedTuple):
    """An objective under the name that the table shows."""

    label: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Order:
    """What the user asked for. `config` is a file, `words` are laid over it in every run; `budget`
    is "paths", "steps", a number of paths, or "tokens:N"; `select` is a file of questions that pick
    the rates, null: half of those of eval.data; `grids` are rates of their own, by label."""

    config: str
    words: tuple[str, ...]
    methods: tuple[Method, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    out: Path
    budget: str | int = "paths"
    metric: str | None = None
    select: str | None = None
    extend: int = 3
    jobs: int | None = None
    short: float | None = None
    grids: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def tokens(self) -> int | None:
        """The sampled tokens of a run, if they are the budget."""
        kind, _, count = str(self.budget).partition(":")
        return int(count) if kind == "tokens" else None


class Questions(NamedTuple):
    """The value of eval.data, and the benchmarks in it that pick the rates and that are shown."""

    data: str
    select: tuple[str, ...]
    test: tuple[str, ...]
    files: dict[Path, str]
    """The halves: what each file must hold."""
    inputs: dict[str, str]
    """Fingerprints of the files that the questions come from."""


class Cell(NamedTuple):
    """One run: its place in the sweep, the words that make it, their configuration, and the
    fingerprints of what it reads."""

    method: str
    rate: float
    seed: int
    words: tuple[str, ...]
    cfg: Config
    inputs: dict[str, str]

    @property
    def name(self) -> str:
        return cell_name(self.method, self.rate, self.seed)


def cell_name(method: str, rate: float, seed: int) -> str:
    """Name the files of a run.

    >>> cell_name("GRPO + length", 5e-4, 1)
    'GRPO_length-0.0005-1'
    """
    return f"{file_name(method)}-{rate!r}-{seed}"


def file_name(text: str) -> str:
    """Replace what a file system may take amiss.

    >>> file_name("GRPO + length")
    'GRPO_length'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.")


def parse_method(text: str) -> Method:
    """Read `NAME`, `NAME:KEY=VALUE,...` or `LABEL=NAME:KEY=VALUE,...`. A key is the objective's, or
    any `section.key` of the configuration.

    >>> parse_method("vpgea:beta=0").words
    ('--objective.name=vpgea', '--objective.beta=0')
    >>> parse_method("clipped=grpo:eta_clip=[0.5, 2],rollout.temperature=0.9")
    Method(label='clipped', words=('--objective.name=grpo', '--objective.eta_clip=[0.5, 2]', \
'--rollout.temperature=0.9'))
    """
    head, _, keys = text.partition(":")
    # A label ends at an `=` that comes before the keys.
    label, equals, name = head.rpartition("=")
    known = [*METHODS, "custom"]
    if name not in known:
        raise SweepError(
            f"--methods: got {text!r}: there is no objective {name!r}; {_meant(name, known)}"
        )
    label = label.strip() if equals else text
    if not re.search(r"[A-Za-z0-9]", label):
        raise SweepError(f"--methods: got {text!r}: its label has no letter; write LABEL={name}")
    words = [f"--objective.name={name}"]
    for pair in _pairs(keys):
        key, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[a-z_]\w*(\.\w+)*", key.strip()):
            raise SweepError(f"--methods: got {pair!r} in {text!r}; expected KEY=VALUE")
        place, first = key.strip(), key.strip().partition(".")[0]
        # A dot leads into a section, or into a key of the objective that holds keys itself.
        if "." not in key or records_at("objective", first):
            place = f"objective.{place}"
        # The grid owns the rates and seeds, and all methods answer the same questions.
        if place in COMMON_KEYS or place.startswith("eval."):
            raise SweepError(f"--methods: {text!r} sets {place}, which is the same for all methods")
        words.append(f"--{place}={value}")
    return Method(label, tuple(words))


def _meant(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"expected one of {', '.join(known)}"


def _pairs(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part for part in parts if part.strip()]


def check(order: Order) -> Config:
    """Return the configuration that all runs share. SweepError or ConfigError for an order that
    cannot run."""
    for word in order.words:
        # `--key=value`, or `--key` with the value behind it: both begin alike.
        key = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and key in OWN_KEYS:
            raise SweepError(f"got --{key}; a sweep sets it: give {OWN_KEYS[key]}")
        if word.startswith(("--objective.", "--objective=")) or word == "--objective":
            raise SweepError(f"got --{key}; write it with its method, e.g. vpgea:beta=0")
    if not order.methods or not order.rates or not order.seeds:
        raise SweepError("got no method, no rate or no seed; give at least one of each")
    # Two runs of one name would share a folder, and the second be taken for the first.
    for what, values in {
        "--methods": [m.label for m in order.methods],
        "--methods, as names of files,": [cell_name(m.label, 1, 0) for m in order.methods],
        "--rates": order.rates,
        "--seeds": order.seeds,
    }.items():
        twice = next((v for v in values if list(values).count(v) > 1), None)
        if twice is not None:
            other = ", or give it a LABEL=" if what.startswith("--methods") else ""
            raise SweepError(f"{what}: {twice!r} stands twice; leave one out{other}")
    _check_grids(order)
    cfg = load(order.config, order.words)
    if not cfg.eval.data:
        raise SweepError(f"{order.config}: eval.data is empty; a sweep compares evaluations")
    mode = metric_of(order, cfg).partition("_")[0]
    if not (cfg.eval.samples if mode == "sampled" else cfg.eval.greedy):
        key = "eval.samples is 0" if mode == "sampled" else "eval.greedy is false"
        raise SweepError(f"--metric {metric_of(order, cfg)}: {key}, so no run measures it")
    return cfg


def _check_grids(order: Order) -> None:
    labels = [method.label for method in order.methods]
    for label, rates in order.grids.items():
        if label not in labels:
            raise SweepError(f"--grid: got the method {label!r}; {_meant(label, labels)}")
        # A longer grid would be a longer search.
        if len(set(rates)) != len(order.rates) or len(rates) != len(order.rates):
            raise SweepError(
                f"--grid {label}: got {len(rates)} rates, expected {len(order.rates)} different "
                "ones, as many as --rates: all methods are searched equally"
            )


def parse_grids(words: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Read `LABEL=LR,LR,...`: the rates that a method has in place of --rates.

    >>> parse_grids(["hint-RFT=2.5e-4,1.25e-4"])
    {'hint-RFT': (0.000125, 0.00025)}
    """
    grids = dict[str, tuple[float, ...]]()
    for word in words:
        # A label may be a method's own text, which has signs of its own.
        label, equals, rates = word.rpartition("=")
        label = label.strip()
        if not equals or not label:
            raise SweepError(f"--grid: got {word!r}, expected LABEL=LR,LR,...")
        if label in grids:
            raise SweepError(f"--grid: {label!r} stands twice; leave one out")
        grids[label] = parse_rates(rates.split(","), "--grid")
    return grids


def metric_of(order: Order, cfg: Config) -> str:
    """Return the metric that picks the rates."""
    return order.metric or ("sampled_eps3" if cfg.eval.samples else "greedy_eps3")


def paths_a_step(cfg: Config) -> int:
    """Count the paths that a step draws; 0 for an objective that reads the data's responses."""
    draws = cfg.objective.draws()
    return 0 if draws.given else draws.paths * cfg.train.questions_per_step


def cell(
    order: Order,
    method: Method,
    rate: float,
    seed: int,
    *,
    split: Questions,
    steps: int,
    inputs: Inputs,
) -> Cell:
    """Resolve the configuration of one run. ConfigError for keys that the method has not."""
    # The last of a key wins: the method's over the user's, and the grid's over both.
    words = [*order.words, *method.words, f"--optim.lr={rate!r}", f"--run.seed={seed}"]
    # Nobody reads a run's exported model, and the sweep itself compares.
    words += [f"--eval.data={split.data}", "--checkpoint.export=false", "--metrics.compare=null"]
    name = cell_name(method.label, rate, seed)
    words += [f"--train.steps={steps}", f"--run.dir={order.out / 'runs' / name}"]
    cfg = _load(order, method, words)
    # What draws no path has no token to count.
    if order.tokens is not None and paths_a_step(cfg):
        words.append(f"--train.max_tokens={order.tokens}")
        cfg = _load(order, method, words)
    return Cell(
        method=method.label,
        rate=rate,
        seed=seed,
        words=tuple(words),
        cfg=cfg,
        inputs=inputs.of(cfg) | split.inputs,
    )


def _load(order: Order, method: Method, words: Sequence[str]) -> Config:
    try:
        cfg = load(order.config, words)
    except ConfigError as error:
        # The file is right: the method's keys are not, or do not go with it.
        raise SweepError(f"--methods {method.label!r}: {one_line(error, limit=None)}") from error
    if cfg.train.record:
        raise SweepError(
            f"--methods {method.label!r}: train.record {cfg.train.record!r} trains nothing, so no "
            "run has an evaluation to compare; leave it out"
        )
    return cfg


def steps_of(order: Order, method: Method, base: Config) -> int:
    """Count the steps that the budget allows: all methods draw as many paths, to within a step. Of
    a budget of tokens these are more than it pays for, since a path has a token or more."""
    cfg = _load(order, method, [*order.words, *method.words])
    each = paths_a_step(cfg)
    # What draws no path (it reads them) makes the configuration's steps.
    if order.budget == "steps" or not each:
        return base.train.steps
    if order.tokens is not None:
        # Rounded up: a path has a token at least, so these steps spend them all.
        return -(-order.tokens // each)
    paths = order.budget
    if not isinstance(paths, int):
        paths = paths_a_step(base) * base.train.steps
    # Rounded down: no method draws more than the budget.
    steps = paths // each
    if not steps:
        raise SweepError(
            f"--budget: {method.label!r} draws {each} paths a step, more than the {paths} of the "
            "whole budget; give more, or fewer questions a step"
        )
    return steps


def questions(order: Order, cfg: Config, inputs: Inputs) -> Questions:
    """Split the held-out questions, or take those of `select`; nothing is written. No question
    picks a rate and is reported."""
    # As an evaluation reads them: within eval.limit, whatever training is limited to.
    limited = replace(cfg.data, limit=cfg.eval.limit)
    if order.select is not None:
        picked = [DataFile(order.select)]
        entries = [*map(_entry, cfg.eval.data)]
        chosen = {"path": order.select, "name": SELECT}
        test, files = [str(entry["name"]) for entry in entries], {}
        _disjoint(cfg, picked)
        read = inputs.questions([*picked, *cfg.eval.data], limited)
        return Questions(
            data=_flow([chosen, *entries]),
            select=(SELECT,),
            test=tuple(test),
            files=files,
            inputs=read,
        )
    entries, files = [], dict[Path, str]()
    for file in cfg.eval.data:
        halves = dict(zip((f"{SELECT}_{file.label}", file.label), _halves(file, cfg), strict=True))
        for name, text in halves.items():
            path = order.out / "questions" / f"{file_name(name)}.jsonl"
            files[path] = text
            # With the file's other keys: a half is read as the whole was.
            entries.append(_entry(file) | {"path": str(path), "name": name})
    names = [str(entry["name"]) for entry in entries]
    # Names that file systems would confuse are one file: the second half would replace the first.
    if len(files) < len(names):
        raise SweepError("eval.data names two files alike; give one another `name`")
    read = inputs.questions(cfg.eval.data, limited)
    # Halves alternate: of each file first the one that selects.
    return Questions(
        data=_flow(entries),
        select=tuple(names[::2]),
        test=tuple(names[1::2]),
        files=files,
        inputs=read,
    )


def _entry(file: DataFile) -> dict[str, Any]:
    # Keys that are not given stay out, so that the section's own still fill them.
    return {k: v for k, v in vars(file).items() if v is not None} | {"name": file.label}


def _flow(entries: Sequence[dict[str, Any]]) -> str:
    # JSON is YAML, so it can stand on a command line.
    return json.dumps(entries, ensure_ascii=False)


def _halves(file: DataFile, cfg: Config) -> tuple[str, str]:
    """Cut a JSONL file in two: its questions by turns, equal ones into one half."""
    path = Path(file.path)
    if path.suffix != ".jsonl" or path.is_dir():
        raise SweepError(
            f"eval.data: {file.path} is no JSONL file that a sweep can split; give a file of other "
            "questions that pick the rates: --select FILE"
        )
    # Refuses what is not there or no question, with its place, before any half is written.
    loaded = load_questions(replace(file, limit=file.limit or cfg.eval.limit), cfg.data)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A place ends in its line number; a row that was dropped has none here.
    places = {q.place.rpartition(" ")[2]: q.text for q in loaded.questions}
    half, halves = dict[str, int](), ([], [])
    for number, line in enumerate(lines, 1):
        text = places.get(str(number))
        if text is not None:
            side = half.setdefault(text, len(half) % 2)
            # A file's last line may lack its break, and another follows it here.
            halves[side].append(line if line.endswith("\n") else f"{line}\n")
    if len(half) < 2:
        raise SweepError(f"{path}: got {len(half)} questions; a split needs two or more")
    return "".join(halves[0]), "".join(halves[1])


def _disjoint(cfg: Config, picked: Sequence[DataFile]) -> None:
    def texts(files: Sequence[DataFile]) -> dict[str, str]:
        return {q.text: q.place for f in files for q in load_questions(f, cfg.data).questions}

    # By text: ids and places of the same question differ between files.
    select, test = texts(picked), texts(cfg.eval.data)
    shared = [place for text, place in select.items() if text in test]
    if shared:
        raise SweepError(
            f"--select: {len(shared)} of its questions are among those of eval.data (the first is "
            f"{shared[0]}); the questions that pick a rate must be others"
        )


def grid_factor(rates: Sequence[float]) -> float:
    """Return the mean factor between neighbours of a grid."""
    # The geometric mean: a grid need not be even.
    return (max(rates) / min(rates)) ** (1 / (len(rates) - 1))


def extended(rates: Sequence[float], *, above: bool) -> list[float]:
    """Add a rate to a sorted grid by its factor, rounded to three digits.

    >>> extended([5e-4, 1e-3, 2e-3], above=True), extended([5e-4, 1e-3], above=False)
    ([0.0005, 0.001, 0.002, 0.004], [0.00025, 0.0005, 0.001])
    """
    factor = grid_factor(rates)
    # Rounded, since a rate is part of a file's name.
    new = float(f"{rates[-1] * factor if above else rates[0] / factor:.3g}")
    return sorted({*rates, new})


def parse_rates(words: Sequence[str], option: str = "--rates") -> tuple[float, ...]:
    """Read learning rates, sorted. SweepError for what is none."""
    rates = []
    for word in words:
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        # NaN fails it too.
        if not 0 < rate < 1e6:
            raise SweepError(f"{option}: got {word!r}, expected numbers above 0, e.g. 5e-4 1e-3")
        rates.append(rate)
    return tuple(sorted(rates))


def identity(order: Order, cfg: Config, split: Questions) -> dict[str, Any]:
    """What a folder's runs have in common: another order may add methods, rates and seeds."""
    # Where the folder lies is no part of it: a moved one goes on.
    tree = as_dict(cfg)
    tree["run"] = {k: v for k, v in tree["run"].items() if k not in ("dir", "seed")}
    # Their number alone: the text is held against the files themselves.
    texts = {path.name: text.count("\n") for path, text in split.files.items()}
    return {"budget": order.budget, "select": order.select, "questions": texts, "config": tree}

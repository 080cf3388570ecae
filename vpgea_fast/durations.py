"""How long a step and a run take, from stated rates: arithmetic that a dry run shows and explains.

None of the rates was measured by this project. They are the card's own (dense bfloat16 operations,
memory bandwidth) and the shares of them that comparable systems reach; `--rates` states others.

| phase       | what it costs                                                                     |
| rollouts    | reads of the weights, once per token of the side-by-side paths, and of their keys  |
| scoring     | a forward of every path behind which the answer is scored                          |
| training    | forward and backward of every sampled row and of the accepted share once more      |
| diagnostics | at metrics.diag_every: both views of the posterior paths, each stream's gradient   |
| evaluation  | at eval.every, and before and after the run                                        |
| weights     | the way of the weights into the engine, and the time it takes to wake up           |
| saving      | at checkpoint.save_every, unless a thread writes                                   |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from vpgea_fast.config import Config, ConfigError
from vpgea_fast.metrics import peak_flops
from vpgea_fast.types import ModelFlops

HOUR = 3600

# TB/s of the data sheets. A name is what a CUDA device gives; sizes tell planned cards apart.
BANDWIDTH = {"H100": 3.35, "H200": 4.8, "A100": 2.04, "B200": 8.0}
CARDS = ((60, 100, "H100"), (120, 160, "H200"), (170, 200, "B200"))
"""(GiB from, to, card): what a device of that size is taken for when it is only planned."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one device does per second, and what paths are like.

    tflops        dense bfloat16 operations per second, 1e12; the data sheet
    bandwidth     bytes per second of device memory, 1e12; the data sheet
    train_mfu     share of tflops in forward + backward; 0.36 of 8 H100 with full checkpointing is
                  arithmetic, fms-fsdp publishes 0.42 for 7B
    offload_mfu   the same with parallel.cpu_offload on one device
    forward_mfu   share of tflops in passes without gradients
    decode        share of the bandwidth while vLLM decodes
    hf_decode     the same for the hf engine, which is launch-bound: a tenth, by arithmetic
    tokens        mean tokens of a path; 0: half of rollout.max_new_tokens
    accepted      share of the posterior paths that are distilled
    transfer      bytes per second of weights on their way to the engine, 1e9
    wake          seconds in which vLLM wakes up and sleeps again, per step
    write         bytes per second that a process writes of a checkpoint, 1e9
    """

    tflops: float
    bandwidth: float
    train_mfu: float = 0.36
    offload_mfu: float = 0.27
    forward_mfu: float = 0.50
    decode: float = 0.60
    hf_decode: float = 0.06
    tokens: float = 0.0
    accepted: float = 0.5
    transfer: float = 20.0
    wake: float = 3.0
    write: float = 1.0


def rates_of(name: str, *, stated: Mapping[str, float]) -> Rates | None:
    """The rates of a card, `stated` ones laid over them; None for an unknown card of which neither
    tflops nor bandwidth is stated."""
    peak = peak_flops(name)
    bandwidth = next((rate for part, rate in BANDWIDTH.items() if part in name), None)
    known = {"tflops": peak and peak / 1e12, "bandwidth": bandwidth} | dict(stated)
    sheet = {key: value for key, value in known.items() if value is not None}
    return Rates(**sheet) if {"tflops", "bandwidth"} <= sheet.keys() else None


def card_of(gib: float) -> str:
    """The card that a planned device of so many GiB is taken for; "" where none is known."""
    return next((card for low, high, card in CARDS if low <= gib < high), "")


def parse_rates(text: str) -> dict[str, float]:
    """`tflops=312,bandwidth=2.04` as numbers. ConfigError for another key or what is no number.

    >>> parse_rates("tflops=312, accepted=0.3")
    {'tflops': 312.0, 'accepted': 0.3}
    """
    known = [field.name for field in dataclasses.fields(Rates)]
    rates = {}
    for pair in filter(None, text.split(",")):
        key, _, number = (part.strip() for part in pair.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if key not in known or not 0 < value < 1e6:
            raise ConfigError(
                f"--rates: got {pair.strip()!r}, expected KEY=NUMBER, above 0, with a key of "
                f"{', '.join(known)}; e.g. tflops=312,bandwidth=2.04"
            )
        rates[key] = value
    return rates


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the durations need to know of a model, its data and its devices.

    flops       of a row; see `ModelFlops`
    parameters  of the model
    states      bytes of weights and moments that one process saves
    token       bytes of a token's keys and values, over all layers, on all devices of an engine
    cache       tokens that the engine's KV cache holds
    prompt      mean tokens of a prompt
    evaluated   answers that one evaluation draws
    """

    flops: ModelFlops
    parameters: int
    states: int
    token: int
    cache: int
    prompt: float
    evaluated: int
    world: int


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds of each phase in a mean step, of one evaluation, and how many a run makes."""

    step: Mapping[str, float]
    evaluation: float
    evaluations: int
    steps: int
    world: int

    @property
    def run(self) -> dict[str, float]:
        """phase -> seconds of the whole run."""
        whole = {phase: self.steps * seconds for phase, seconds in self.step.items()}
        return whole | {"evaluation": self.evaluations * self.evaluation}

    @property
    def evaluation_share(self) -> float:
        """Evaluations between steps, as a share of the time of these steps."""
        return self.step["evaluation"] / sum(self.step.values())


def durations(cfg: Config, rates: Rates, sizes: Sizes) -> Durations:
    """Seconds of every phase of a mean step, on `sizes.world` devices that work side by side."""
    objective, questions = cfg.objective, cfg.train.questions_per_step
    drawn = questions * (objective.posterior_paths + objective.prior_paths)
    mean = min(rates.tokens or cfg.rollout.max_new_tokens / 2, cfg.rollout.max_new_tokens)
    row = round(sizes.prompt + mean)
    flops, device = sizes.flops, rates.tflops * 1e12 * sizes.world
    forward, mfu = device * rates.forward_mfu, rates.train_mfu
    if cfg.parallel.cpu_offload:
        mfu = rates.offload_mfu
    # The head runs where a loss reads it: on the thought, not on the prompt.
    train = flops.row(row, round(mean)) / (device * mfu)
    posterior = questions * objective.posterior_paths
    rows = posterior * (1 + rates.accepted) or questions * objective.prior_paths

    scored = objective.scores_answers and cfg.scoring.u_source == "likelihood"
    scoring = drawn * flops.forward_row(row, 16) / forward if scored else 0.0
    if objective.scores_answers and not scored:  # J short answers behind every thought
        scoring = _drawing(
            cfg,
            rates,
            sizes,
            paths=drawn * cfg.scoring.answer_samples,
            mean=cfg.rollout.max_answer_tokens / 2,
            limit=cfg.rollout.max_answer_tokens,
        )
    if cfg.rollout.importance_cap is not None:
        scoring += (posterior or rows) * flops.forward_row(row, round(mean)) / forward

    # Seldom, but dear: both views with entropies, and every row's gradient again.
    diagnosing = 0.0
    if cfg.metrics.diag_every and posterior:
        views = 2 * posterior * flops.forward_row(row, round(mean)) / forward
        diagnosing = (views + rows * train) / cfg.metrics.diag_every

    limit = cfg.rollout.max_new_tokens
    rollouts = _drawing(cfg, rates, sizes, paths=drawn, mean=mean, limit=limit)
    evaluation = 0.0
    if sizes.evaluated:
        limit = cfg.eval.max_new_tokens
        evaluation = _drawing(
            cfg, rates, sizes, paths=sizes.evaluated, mean=min(mean, limit), limit=limit
        )
    every, steps = cfg.eval.every, cfg.train.steps
    between = (steps - 1) // every if every and sizes.evaluated else 0

    width = {"bfloat16": 2, "float64": 8}.get(cfg.model.dtype, 4)
    weights = sizes.parameters * width / (rates.transfer * 1e9)
    saving = 0.0 if cfg.checkpoint.background else sizes.states / (rates.write * 1e9)
    return Durations(
        step={
            "rollouts": rollouts,
            "scoring": scoring,
            "training": rows * train,
            "diagnostics": diagnosing,
            "evaluation": evaluation * between / steps,
            "weights": weights + (rates.wake if cfg.colocated else 0.0),
            "saving": saving / cfg.checkpoint.save_every,
        },
        evaluation=evaluation,
        evaluations=between + 2 * bool(sizes.evaluated),
        steps=steps,
        world=sizes.world,
    )


def _drawing(
    cfg: Config, rates: Rates, sizes: Sizes, *, paths: int, mean: float, limit: float
) -> float:
    """Seconds in which all engines draw `paths`: decoding reads memory, nothing else counts.

    A token of all paths side by side reads every weight once, and each path's keys and values so
    far. Lengths spread evenly from 0 to twice their mean. The batch is full until the last paths
    are begun; then it drains, at worst to the limit, and the weights are read for few.
    """
    vllm = cfg.colocated
    group = cfg.vllm.tensor_parallel if vllm else 1
    mine = math.ceil(paths * group / sizes.world)
    batch = min(cfg.rollout.max_batch, max(1, int(sizes.cache / (sizes.prompt + mean))))
    tokens = mine * mean / min(mine, batch) + (limit - mean)
    square = min(4 / 3 * mean, limit) * mean
    width = {"bfloat16": 2, "float64": 8}.get(cfg.model.dtype, 4)
    read = tokens * sizes.parameters * width
    read += mine * sizes.token * (sizes.prompt * mean + square / 2)
    share = rates.hf_decode if cfg.engine.name == "hf" else rates.decode
    return read / (group * rates.bandwidth * 1e12 * share)

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

import torch

from vpgea_fast.config import Config, ConfigError
from vpgea_fast.metrics import ModelFlops, peak_flops
from vpgea_fast.objectives import policy_rows, reads_reference, reference_rows, scores_answers

HOUR = 3600
ANSWER_ROWS = 16
"""Tokens of a reference answer and its cue, of which the head scores each."""

BANDWIDTH = (
    ("H100 PCIe", 2.0),
    ("H100 NVL", 3.9),
    ("H100 80GB HBM3", 3.35),
    ("GH200 480GB", 4.0),
    ("GH200", None),  # its name holds H200
    ("H200", 4.8),
    ("A100-SXM4-40GB", 1.555),
    ("A100-PCIE-40GB", 1.555),
    ("A100-SXM4-80GB", 2.039),
    ("A100 80GB PCIe", 1.935),
    ("B200", 8.0),
    ("L40S", 0.864),
)
"""(part of the name that CUDA gives a device, 1e12 bytes per second); the first match counts. From
NVIDIA's data sheets; a card that is not here is unknown, since variants differ by half."""
CARDS = ((60, 100, "H100 80GB HBM3"), (120, 160, "H200"), (170, 200, "B200"))
"""(GiB from, to, card): what a device of that size is taken for when it is only planned."""
SHARES = ("train_mfu", "offload_mfu", "forward_mfu", "decode", "hf_decode", "accepted")
"""Rates that are parts of a whole."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one device does per second, and what paths are like.

    tflops        dense bfloat16 operations per second, 1e12; the data sheet
    bandwidth     bytes per second of device memory, 1e12; the data sheet
    train_mfu     share of tflops in forward + backward; 0.36 of 8 H100 with full checkpointing is
                  arithmetic, fms-fsdp publishes 0.42 for 7B
    offload_mfu   the same where parallel.cpu_offload brings weights for every micro-batch
    forward_mfu   share of tflops in passes without gradients
    decode        share of the bandwidth while vLLM decodes
    hf_decode     the same for the hf engine, which is launch-bound: a tenth, by arithmetic
    tokens        mean tokens of a thought; 0: half of rollout.max_new_tokens
    answer        mean tokens of the answer behind it, where one is drawn; at most
                  rollout.max_answer_tokens
    accepted      share of the posterior paths that are distilled
    transfer      bytes per second of weights on their way to the engine, 1e9
    wake          seconds in which vLLM wakes up and sleeps again, per step
    write         bytes per second that a process writes of a checkpoint, 1e9
    read          bytes per second that a process reads of a model, 1e9
    """

    tflops: float
    bandwidth: float
    train_mfu: float = 0.36
    offload_mfu: float = 0.27
    forward_mfu: float = 0.50
    decode: float = 0.60
    hf_decode: float = 0.06
    tokens: float = 0.0
    answer: float = 256.0
    accepted: float = 0.5
    transfer: float = 20.0
    wake: float = 3.0
    write: float = 1.0
    read: float = 1.0


def rates_of(name: str, *, stated: Mapping[str, float]) -> Rates | None:
    """Look up the rates of a card and lay `stated` ones over them. None for an unknown card, or a
    part of one (MIG), of which tflops or bandwidth is not stated."""
    known: dict[str, float | None] = {}
    # A slice has a part of the card's rates, and its name does not say how much.
    if " MIG " not in name:
        peak = peak_flops(name)
        bandwidth = next((rate for part, rate in BANDWIDTH if part in name), None)
        known = {"tflops": peak and peak / 1e12, "bandwidth": bandwidth}
    sheet = {key: value for key, value in (known | dict(stated)).items() if value is not None}
    return Rates(**sheet) if {"tflops", "bandwidth"} <= sheet.keys() else None


def card_of(gib: float) -> str:
    """The card that a planned device of so many GiB is taken for; "" where none is known."""
    return next((card for low, high, card in CARDS if low <= gib < high), "")


def parse_rates(text: str) -> dict[str, float]:
    """Read `tflops=312,bandwidth=2.04` as numbers. ConfigError for another key, one given twice,
    what is no number above 0, and a share above 1.

    >>> parse_rates("tflops=312, accepted=0.3")
    {'tflops': 312.0, 'accepted': 0.3}
    """
    # The record is the list of keys: a new rate is known here at once.
    known = [field.name for field in dataclasses.fields(Rates)]
    rates: dict[str, float] = {}
    for pair in text.split(","):
        key, _, number = (part.strip() for part in pair.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan  # compares as neither, so the last check refuses it with the key
        if key in rates:
            raise ConfigError(f"--rates: got {key!r} twice; give it once")
        # 60 for 60 % would give a run sixty times too short, and look like a number.
        if key in SHARES and value > 1:
            raise ConfigError(
                f"--rates: got {pair.strip()!r}, expected a share, above 0 and up to 1; write "
                f"{value / 100:g} for {value:g} %"
            )
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
    reference   bytes of the reference policy that one process reads in a step
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
    reference: int = 0


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
        # Evaluations before and after the run belong to no step, so they are counted apart.
        whole = {phase: self.steps * seconds for phase, seconds in self.step.items()}
        return whole | {"evaluation": self.evaluations * self.evaluation}

    @property
    def evaluation_share(self) -> float:
        """Evaluations between steps, as a share of the time of these steps."""
        return self.step["evaluation"] / sum(self.step.values())


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Paths that are drawn together: `shared` of them have one prompt, whose keys and values the
    cache holds once. `mean` and `limit` are tokens that are drawn, answers included."""

    paths: int
    shared: int
    prompt: float
    mean: float
    limit: float

    @property
    def held(self) -> float:
        """Tokens of a path of mean length in the cache."""
        return self.prompt / self.shared + self.mean


def rollouts_of(
    cfg: Config, *, prompt: float, tokens: float = 0.0, answer: float = Rates.answer
) -> Draw:
    """Describe the paths of a step, with prompts of `prompt` tokens; the rest as in `Rates`."""
    rollout, views = cfg.rollout, cfg.objective.draws().counts
    mean, limit = _mean_thought(cfg, tokens), 0
    if rollout.full_answer:
        limit = rollout.max_answer_tokens
        mean += min(answer, limit)
    return Draw(
        paths=cfg.train.questions_per_step * sum(views),
        shared=min(views),  # of streams that differ in size the smaller: the cautious figure
        prompt=prompt,
        mean=mean,
        limit=limit + rollout.max_new_tokens,
    )


def durations(cfg: Config, rates: Rates, sizes: Sizes) -> Durations:
    """Compute the seconds of every phase of a mean step, on `sizes.world` devices side by side."""
    thought = _mean_thought(cfg, rates.tokens)
    rollouts = rollouts_of(cfg, prompt=sizes.prompt, tokens=rates.tokens, answer=rates.answer)
    evaluation = 0.0
    if sizes.evaluated:
        # As Evaluator draws: every sample of a question has one prompt, answers behind thoughts.
        answer = cfg.rollout.max_answer_tokens
        if cfg.eval.joint_limit:
            answer = cfg.eval.max_new_tokens
        limit = cfg.eval.most(answer)
        held_out = Draw(
            paths=sizes.evaluated,
            shared=max(1, cfg.eval.samples),
            prompt=sizes.prompt,
            mean=min(limit, min(thought, cfg.eval.max_new_tokens) + min(rates.answer, answer)),
            limit=limit,
        )
        evaluation = _drawing(cfg, rates, sizes, held_out)
    every, steps = cfg.eval.every, cfg.train.steps
    # Not before the first step and not after the last: those two are counted by themselves.
    between = (steps - 1) // every if every and sizes.evaluated else 0
    # Each hand-over moves every weight once, in the model's dtype.
    weights = sizes.parameters * _width(cfg) / (rates.transfer * 1e9)
    # Where another model draws, the engine is given its weights, and then the policy's.
    weights *= 1 + 2 * bool(cfg.objective.draws().reference) + 2 * cfg.two_policies
    # In the background the write is hidden behind the next steps; its copy is not counted.
    saving = 0.0 if cfg.checkpoint.background else sizes.states / (rates.write * 1e9)
    return Durations(
        step={
            "rollouts": _drawing(cfg, rates, sizes, rollouts) if cfg.draws_paths else 0.0,
            **_passes(cfg, rates, sizes, thought=thought),
            "evaluation": evaluation * between / steps,
            "weights": weights + (rates.wake if cfg.colocated else 0.0),
            "saving": saving / cfg.checkpoint.save_every,
        },
        evaluation=evaluation,
        evaluations=between + 2 * bool(sizes.evaluated),
        steps=steps,
        world=sizes.world,
    )


def _passes(cfg: Config, rates: Rates, sizes: Sizes, *, thought: float) -> dict[str, float]:
    """Compute the seconds of a step's forwards and backwards, over thoughts of mean length."""
    objective, questions = cfg.objective, cfg.train.questions_per_step
    draws = objective.draws()
    posterior, prior = questions * draws.posterior, questions * draws.prior
    # A sampled answer is a part of the row only where the objective trains it.
    drawn = thought + draws.answers * min(rates.answer, cfg.rollout.max_answer_tokens)
    row, flops = round(sizes.prompt + drawn), sizes.flops
    peak = rates.tflops * sizes.world * 1e12  # operations per second of all devices
    forward = peak * rates.forward_mfu
    # An offload that brings no weights costs an update two seconds at most (7B, float32 masters).
    streams = cfg.parallel.cpu_offload and not cfg.parallel.hosted(sizes.world)
    mfu = rates.offload_mfu if streams else rates.train_mfu
    # At the mean length attention costs about 3/4 of its mean over all lengths.
    # The head runs where a loss reads it: on what was drawn, not on the prompt.
    whole = flops.forward_row(row, round(drawn)) / forward
    train = flops.row(row, round(drawn)) / (peak * mfu)
    # A posterior path is trained in the teacher's view, and the accepted ones in the student's too.
    rows = draws.trained * (posterior * (1 + rates.accepted) or prior)
    behind = draws.targets + draws.answer_rows  # as if every sampled answer were right
    if draws.trained:
        rows += (posterior * rates.accepted or prior) * behind + (prior if draws.joint else 0)

    scoring = 0.0
    if scores_answers(objective) and cfg.scoring.u_source == "likelihood":
        scoring = (posterior + prior) * flops.forward_row(row, ANSWER_ROWS) / forward
    # J short answers behind every thought, which they share.
    if cfg.answers_behind and not draws.recorded:
        answers = Draw(
            paths=(posterior + prior) * cfg.scoring.answer_samples,
            shared=cfg.scoring.answer_samples,
            prompt=sizes.prompt + thought,
            mean=min(rates.answer, cfg.rollout.max_answer_tokens),
            limit=cfg.rollout.max_answer_tokens,
        )
        scoring += _drawing(cfg, rates, sizes, answers)
    # Importance weights: one forward more of the paths in the view that drew them.
    if cfg.rollout.importance_cap is not None:
        scoring += (posterior or rows) * whole
    parts, epochs = cfg.train.minibatches, cfg.train.epochs
    if parts * epochs > 1 or reads_reference(objective):
        # Log-probs before the first update, and again before every update but that one.
        scoring += rows * whole * (1 + epochs - 1 / parts)
    # A row for every score that is asked of either policy, as of the policy by a leak guard.
    scoring += questions * (policy_rows(objective) + reference_rows(objective)) * whole
    scoring += sizes.reference / (rates.read * 1e9)

    # Seldom, but dear: both views with entropies, and every row's gradient again.
    diagnosing = 0.0
    if cfg.metrics.diag_every and posterior and draws.trained:
        diagnosing = (2 * posterior * whole + rows * train) / cfg.metrics.diag_every
    return {"scoring": scoring, "training": epochs * rows * train, "diagnostics": diagnosing}


def _drawing(cfg: Config, rates: Rates, sizes: Sizes, draw: Draw) -> float:
    """Compute the seconds in which all engines draw: decoding reads memory, nothing else counts.

    A token of all paths side by side reads every weight once, and each path's keys and values so
    far. Lengths spread evenly from 0 to twice their mean. The batch is full until the last paths
    are begun; then it drains, at worst to the limit, and the weights are read for few.
    """
    group = cfg.processes_per_engine
    mine = math.ceil(draw.paths * group / sizes.world)
    batch = min(cfg.rollout.max_batch, max(1, int(sizes.cache / draw.held)))
    # Rounds of decoding: full ones, then the tail of the longest path alone.
    tokens = mine * draw.mean / min(mine, batch) + (draw.limit - draw.mean)
    # E[length^2] of lengths that are even from 0 to twice the mean.
    square = min(4 / 3 * draw.mean, draw.limit) * draw.mean
    read = tokens * sizes.parameters * _width(cfg)
    read += mine * sizes.token * (draw.prompt * draw.mean + square / 2)
    share = rates.hf_decode if cfg.samples_itself else rates.decode
    return read / (group * rates.bandwidth * 1e12 * share)


def _mean_thought(cfg: Config, tokens: float) -> float:
    """Mean tokens of a thought: the stated ones, or half of the limit, which none exceeds."""
    limit = cfg.rollout.max_new_tokens
    return min(tokens or limit / 2, limit)


def _width(cfg: Config) -> int:
    return getattr(torch, cfg.model.dtype).itemsize

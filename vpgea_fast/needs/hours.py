"""The hours of a planned run, as lines: its phases by stated rates, and its evaluations' share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from vpgea_fast.check import Target
from vpgea_fast.durations import HOUR, Durations, Rates, Sizes, card_of, durations, rates_of
from vpgea_fast.estimate import GIB, Layout, MemoryEstimate, optimizer_bytes, reference_bytes
from vpgea_fast.metrics import model_flops
from vpgea_fast.needs.plan import Plan
from vpgea_fast.objectives import reads_reference

EVALUATION_SHARE = 0.10
"""Share of a step's time above which evaluations are said to be too dear."""
OF_CARD = ("tflops", "bandwidth", "train_mfu", "offload_mfu", "forward_mfu", "decode", "hf_decode")
"""Rates that stand in a line of their own."""


def hours(plan: Plan, estimate: MemoryEstimate, stated: Mapping[str, float]) -> Iterator[str]:
    """Say the time of a step and of the run, and what evaluations take of it."""
    # A card without a data sheet here gets no hours: a guess would look like a promise.
    rates = rates_of(_card(plan.on), stated=stated)
    times = durations(plan.cfg, rates, _sizes(plan, estimate)) if rates else None
    yield from _table(plan, rates, times) if rates and times else _unknown(plan.on)
    yield from _accuracy(plan, times)


def _table(plan: Plan, rates: Rates, times: Durations) -> Iterator[str]:
    """Say the phases of a mean step and of the run in a table, and the rates behind them."""
    cfg, on = plan.cfg, plan.on
    card = _card(on)
    device = card if on.name or not on.cuda else f"taken for {card or 'unknown'} by their size"
    yield f"time of a run by stated rates, none measured here (--rates KEY=NUMBER,...); {device}:"
    # What a zero stands for is shown as the number that was reckoned with.
    shown = vars(rates) | {"tokens": rates.tokens or cfg.rollout.max_new_tokens / 2}
    shown["answer"] = min(rates.answer, cfg.rollout.max_answer_tokens)
    names = [key for key in shown if key not in _unused(plan)]
    for keys in ([key for key in names if key in OF_CARD], [k for k in names if k not in OF_CARD]):
        yield "  " + ", ".join(f"{key} {shown[key]:g}" for key in keys)
    # Of the run: evaluations and saves do not fall into every step.
    whole, run = sum(times.step.values()), times.run
    yield f"  {'':<17}{'s per step':>11}{'share':>8}{'hours':>9}{'GPU-hours':>11}"
    # By the run's seconds: a phase may be zero in a mean step and not in the run.
    rows = [(phase, seconds, run[phase]) for phase, seconds in times.step.items() if run[phase]]
    for name, seconds, spent in [*rows, ("total", whole, sum(run.values()))]:
        share, h = seconds / whole, spent / HOUR
        yield f"  {name:<17}{seconds:11.1f}{share:8.1%}{h:9.1f}{h * on.processes:11.1f}"
    # What the server has is not known here.
    if cfg.engine.name == "vllm" and not cfg.colocated:
        yield "  engine.server: its devices are taken for as many and such as train"


def _unused(plan: Plan) -> set[str]:
    """List the rates that no phase of this run depends on."""
    cfg = plan.cfg
    streams = Layout(plan.shape, cfg, plan.on.processes, plan.on.cuda).offloaded
    # Rate -> whether a phase of this run depends on it; what is not here always counts.
    needed = {
        "train_mfu": not streams,
        "offload_mfu": streams,
        "decode": not cfg.samples_itself,
        "hf_decode": cfg.samples_itself,
        "answer": cfg.rollout.full_answer or plan.answers or cfg.answers_behind,
        "accepted": cfg.objective.draws().posterior,
        "wake": cfg.colocated,
        "write": not cfg.checkpoint.background,
        "read": cfg.model.reference == "disk" and reads_reference(cfg.objective),
    }
    return {rate for rate, is_needed in needed.items() if not is_needed}


def _unknown(on: Target) -> Iterator[str]:
    card = _card(on)
    what = f"a {card}" if card else f"devices of {on.device_bytes / GIB:.0f} GiB"
    yield (
        f"hours: the rates of {what} are not known; state them, e.g. --rates "
        "tflops=312,bandwidth=2.04 (1e12 operations and bytes per second)"
    )


def _accuracy(plan: Plan, times: Durations | None) -> Iterator[str]:
    """Say where the run sees whether answers are right, and how much time evaluations take."""
    cfg = plan.cfg
    training = (
        "answers are drawn and judged"
        if cfg.rollout.full_answer
        else "not seen (rollout.full_answer false): a collapse looks like success"
    )
    yield f"accuracy: at every step {training}"
    if not cfg.eval.data:
        yield "  held out: none (eval.data is empty)"
        return
    # A run that sees its accuracy only at the end has spent its hours by then.
    when = f"every {cfg.eval.every} steps" if cfg.eval.every else "before and after, not between"
    share = ""
    # Without a share where all evaluations are outside the steps, or their files are not at hand.
    if times is not None and plan.answers:
        share = f", {times.evaluation:.0f} s each"
        if times.step["evaluation"]:
            share += f", {times.evaluation_share:.1%} of a mean step's time, theirs included"
    yield f"  held out: {plan.answers} answers {when}{share}"
    if plan.left_out:
        names = ", ".join(file.path for file in plan.left_out)
        yield f"  planned, its files could not be asked for here: {names}, by their limit"
        if not all(file.limit or cfg.eval.limit for file in plan.left_out):
            yield "  without a limit (eval.limit) a file is not counted: its size is not known"
    if times is not None and times.evaluation_share > EVALUATION_SHARE:
        yield (
            f"  above {EVALUATION_SHARE:.0%}: raise eval.every, or lower eval.limit, eval.samples "
            "or eval.max_new_tokens"
        )


def _sizes(plan: Plan, estimate: MemoryEstimate) -> Sizes:
    cfg, on, engine = plan.cfg, plan.on, estimate.engine
    lay = Layout(plan.shape, cfg, on.processes, on.cuda)
    group = cfg.processes_per_engine
    # From disk the reference policy is read for each score, and to draw.
    reads = sum(score.who == "reference" for score in cfg.objective.needs())
    reads += cfg.objective.draws().reference > 0
    # Keys and values of one token over all layers, in the dtype of the forward.
    token = 2 * len(plan.shape.blocks) * plan.shape.key * lay.forward
    return Sizes(
        flops=model_flops(plan.model),
        parameters=plan.shape.parameters,
        states=lay.models * lay.held * lay.master + optimizer_bytes(lay),
        reference=reads * reference_bytes(lay) if cfg.model.reference == "disk" else 0,
        # On one device of an engine; the hf engine's own cache is sized by rollout.max_batch.
        token=engine.token * group if engine else token,
        cache=engine.tokens if engine else sys.maxsize,
        prompt=plan.mean_prompt,
        evaluated=plan.answers,
        world=on.processes,
    )


def _card(on: Target) -> str:
    # No card has this name, so a CPU has hours only by stated rates.
    if not on.cuda:
        return "CPU"
    return on.name or card_of(on.device_bytes / GIB)

"""A trace of chosen steps, and in words what took long in it.

train.profile_steps -> torch.profiler around these steps -> trace_FIRST_LAST.json.gz
                                                         -> the longest kernels and gaps
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vpgea_fast.metrics import PHASE

LONGEST = 10
"""Kernels, and gaps, that are named."""
WIDTH = 72
"""Letters of a kernel's name that are shown: templates of CUDA kernels have hundreds."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a Chrome trace for what a GPU does."""

Event = Mapping[str, Any]
"""One of the `traceEvents` of a Chrome trace; `ts` and `dur` in microseconds."""


class Span(NamedTuple):
    """What ran from `begin` to `end`, in microseconds; `own` without what it called."""

    begin: float
    end: float
    name: str
    own: float


class StepTrace:
    """Records steps `first` to `last` of this process, or of a resumed run what is left of them."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, *, cuda: bool) -> None:
        self.steps, self.folder, self.cuda = steps, folder, cuda
        self._profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Begin recording, if this step is one of those that are asked for."""
        first, last = self.steps or (1, 0)
        if self._profile is not None or not first <= step <= last:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] * self.cuda
        # Without stacks and shapes: nothing below tells of them, and each operator pays for them.
        profile = torch.profiler.profile(activities=kinds)
        profile.start()
        self._profile = profile

    def after(self, step: int) -> list[str]:
        """End recording, if this step is the last that is asked for; say what took long."""
        if self._profile is None or self.steps is None or step < self.steps[1]:
            return []
        # Gone from here first: a full disk ends the run, and `close` must not stop it twice.
        profile, self._profile = self._profile, None
        profile.stop()
        file = self.folder / "trace_{}_{}.json.gz".format(*self.steps)
        profile.export_chrome_trace(str(file))
        with gzip.open(file, "rt", encoding="utf-8") as text:
            events = json.load(text)["traceEvents"]
        return [f"profile: {file}, for a viewer of Chrome traces (ui.perfetto.dev)", *told(events)]

    def close(self) -> None:
        """Drop what is recorded of steps that were left."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None


def told(events: Sequence[Event]) -> Iterator[str]:
    """Say the longest kernels by name and the longest gaps between two, with their phases. Without
    a GPU's kernels the operators on the CPU stand for them, each without those that it calls."""
    # By what the GPU did, and not by when it was asked: the host runs ahead of it.
    spans = [_span(event) for event in _complete(events, ON_DEVICE)]
    what = "kernels" if spans else "operators"
    spans = sorted(spans or _operators(events))
    phases = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PHASE))
        for event in _complete(events, ("user_annotation",))
        if event["name"].startswith(PHASE)
    )
    if not spans:
        yield "  nothing was computed in these steps"
        return
    gaps = list(_gaps(spans))
    # From the first kernel to the last: what comes before is the profiler's own start.
    whole = max(span.end for span in spans) - spans[0].begin
    idle = sum(after.begin - end for end, _, after in gaps)
    # Of streams that overlap a moment counts once here, and twice in the kernels' own times.
    yield f"  {whole / 1e6:.3f} s, {1 - idle / whole:.1%} of it in {what}; the longest {what}:"
    yield from _longest(spans, phases, whole)
    yield f"  the longest gaps between {what}:"
    # By length; of equal ones the first.
    for end, before, after in sorted(gaps, key=lambda gap: gap[0] - gap[2].begin)[:LONGEST]:
        phase = _phase(phases, end, after.begin)
        yield (
            f"    {(after.begin - end) / 1e3:10.3f} ms in {phase}, after {before.name[:WIDTH]}, "
            f"before {after.name[:WIDTH]}"
        )


def _longest(
    spans: Iterable[Span], phases: Sequence[tuple[float, float, str]], whole: float
) -> Iterator[str]:
    """Say the names with the most time, each with its calls and the phase that has most of it."""
    calls: Counter[str] = Counter()
    times: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for span in spans:
        calls[span.name] += 1
        # One kernel may serve several phases: scoring and training run the same forward.
        by_phase, phase = times[span.name], _phase(phases, span.begin, span.end)
        by_phase[phase] = by_phase.get(phase, 0.0) + span.own
    totals = {name: sum(by_phase.values()) for name, by_phase in times.items()}
    for name in sorted(totals, key=lambda name: (-totals[name], name))[:LONGEST]:
        by_phase = times[name]
        phase = max(by_phase, key=lambda phase: by_phase[phase])
        # Operators that only call others have no time of their own.
        part = by_phase[phase] / totals[name] if totals[name] else 1.0
        share = f", {part:.0%}" if len(by_phase) > 1 else ""
        yield (
            f"    {totals[name] / 1e3:10.3f} ms {totals[name] / whole:6.1%} {calls[name]:7d} x "
            f"{name[:WIDTH]} (in {phase}{share})"
        )


def _gaps(spans: Sequence[Span]) -> Iterator[tuple[float, Span, Span]]:
    """Give (its beginning, what ran before, what runs after) of each time in which nothing ran;
    `spans` by their beginnings, of all streams and threads."""
    # What ends last so far: a long kernel on one stream covers all gaps of another.
    before = spans[0]
    for span in spans[1:]:
        if span.begin > before.end:
            yield before.end, before, span
        if span.end > before.end:
            before = span


def _operators(events: Sequence[Event]) -> Iterator[Span]:
    """Give the CPU operators of every thread, each with its own time."""
    threads: defaultdict[Any, list[Span]] = defaultdict(list)
    for event in _complete(events, ("cpu_op",)):
        threads[event.get("pid"), event.get("tid")].append(_span(event))
    for spans in threads.values():
        # The longer of two that begin together is the caller.
        spans.sort(key=lambda span: (span.begin, -span.end))
        own = [span.own for span in spans]
        # Calls that have not ended, the innermost last: a thread's operators lie in each other.
        open_: list[int] = []
        for number, span in enumerate(spans):
            while open_ and spans[open_[-1]].end <= span.begin:
                open_.pop()
            if open_:  # from the caller alone: its own caller has lost it already
                own[open_[-1]] -= span.end - span.begin
            open_.append(number)
        yield from (span._replace(own=time) for span, time in zip(spans, own, strict=True))


def _complete(events: Sequence[Event], kinds: tuple[str, ...]) -> Iterator[Event]:
    return (e for e in events if e.get("ph") == "X" and e.get("cat") in kinds)


def _span(event: Event) -> Span:
    begin, length = float(event["ts"]), float(event["dur"])
    return Span(begin, begin + length, str(event["name"]), length)


def _phase(phases: Sequence[tuple[float, float, str]], begin: float, end: float) -> str:
    """The phase that holds the middle of a time."""
    # By its middle: a kernel that was asked for in one phase may end in the next.
    middle = (begin + end) / 2
    # Phases do not lie in each other, so the last that has begun is the one.
    place = bisect_right(phases, (middle, float("inf"), "")) - 1
    if place >= 0 and middle <= phases[place][1]:
        return phases[place][2]
    return "no phase"

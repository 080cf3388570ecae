"""Where the time of a call goes, by kind of work: matrix products, attention, drawing, the rest.

A profile of one call, by torch's profiler. On a CPU a kind's seconds are those that its operations
take themselves, without what they call; what the wall clock has beyond them is Python and the
dispatch of operations. On CUDA they are those of the kernels, and the rest is an idle device. The
profiler makes every operation slower by about a microsecond, so the rest reads high.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch

ROLLOUT = "rollout of a step"
"""Name of the profiler's range around a rollout."""
KINDS = {
    "products": re.compile(
        r"aten::(mm|addmm|bmm|baddbmm|_addmm_activation|addmm_|mkldnn_linear)$|mkldnn::_linear"
        r"|gemm|gemv|cutlass|wgmma|nvjet|xmma|splitK"
    ),
    "attention": re.compile(r"scaled_dot_product|_flash_attention|flash_fwd|flash_bwd|fmha"),
    "drawing": re.compile(
        r"aten::(_log_softmax|_softmax|cumsum|searchsorted|multinomial|sort|topk|exponential_"
        r"|round_|argmax)$"
    ),
}
WORDS = {"products": "matrix products", "other": "other operations"}
"""What a kind is called where it is not its name."""
Kinds = dict[str, float]
"""Kind -> seconds: `products`, `attention`, `drawing`, `other`, and `rest`."""


def profiled(call: Callable[[], object], device: torch.device) -> dict[str, Kinds]:
    """Seconds by kind of one call, in a range named ROLLOUT (`rollout`) and outside (`outside`)."""
    cuda = device.type == "cuda"
    start = time.perf_counter()
    with torch.autograd.profiler.profile(use_device="cuda" if cuda else None) as taken:
        call()
        if cuda:
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    return sorted_out(list(taken.function_events or ()), wall, cuda=cuda)


def sorted_out(events: list[Any], wall: float, *, cuda: bool) -> dict[str, Kinds]:
    """The seconds of a profile's events by place and kind; `wall` seconds in all."""
    host = torch.autograd.DeviceType.CPU
    ranges = [e.time_range for e in events if e.name == ROLLOUT and e.device_type == host]
    found = {
        place: dict.fromkeys((*KINDS, "other", "rest"), 0.0) for place in ("rollout", "outside")
    }
    for event in events:
        kind = kind_of(event.name, cuda=cuda)
        if kind is None or (event.device_type == host) == cuda:
            continue
        start = event.time_range.start
        inside = any(r.start <= start <= r.end for r in ranges)
        spent = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        found["rollout" if inside else "outside"][kind] += spent / 1e6
    within = sum(r.elapsed_us() for r in ranges) / 1e6
    for place, whole in (("rollout", within), ("outside", wall - within)):
        found[place]["rest"] = max(0.0, whole - sum(found[place].values()))
    return found


def kind_of(name: str, *, cuda: bool = False) -> str | None:
    """Of an operation, or of a CUDA kernel; None of a range around others, such as autograd's."""
    if name == ROLLOUT or not (cuda or name.startswith(("aten::", "mkldnn::"))):
        return None
    return next((kind for kind, names in KINDS.items() if names.search(name)), "other")


def shares(kinds: Kinds, *, cuda: bool = False) -> str:
    """Words: every kind above half a per cent, the largest first."""
    rest = {"rest": "an idle device" if cuda else "Python and dispatch"}
    whole = sum(kinds.values()) or 1.0
    parts = sorted(kinds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{(WORDS | rest).get(kind, kind)} {seconds / whole:.0%}"
        for kind, seconds in parts
        if seconds >= 0.005 * whole
    )

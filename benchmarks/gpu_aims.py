"""What on_gpu.py expects of a GPU and what is wanted of it, beside what was measured.

An expected figure is arithmetic, made before anything ran on a GPU, and stands with its interval;
of another card than H200 and H100 there is none. An aim is what the project wants on an H200 at
N = 16384 (a stream), D = 3584, V = 152064, bf16; it holds or not on any card.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Interval = tuple[float, float, float]
"""Expected figure, lowest, highest."""
INTO = "forward + backward, dW into float32, ms"
PEER = "kernel_bench: triton beside the fastest right peer, times as fast"
SLOPE = "scale: slope of training in trained tokens"
OFFLOADED = "one_gpu: speed, moments in host memory / on the GPU"
SELECTIVE = "one_gpu: MFU, selective / full checkpointing"
SELECTIVE_MFU = "one_gpu: MFU with selective checkpointing"
EXPECTED: dict[str, dict[str, Interval]] = {
    "gemm_exp, TF/s": {"H200": (680, 630, 725), "H100": (665, 610, 720)},
    f"triton: {INTO}": {"H200": (77, 72, 84), "H100": (79, 73, 87)},
    "triton: forward, ms": {"H200": (26.2, 24, 30), "H100": (26.8, 24.6, 30.7)},
    f"cublas: {INTO}": {"H200": (82, 78, 86), "H100": (85, 81, 89)},
    PEER: {"": (1.2, 0.95, 1.5)},
    "step_1.5b: TRL's seconds / ours": {"": (1.2, 1.0, 1.8)},
    "step_1.5b: added memory / TRL's": {"": (0.6, 0.3, 1.0)},
    SLOPE: {"": (0.5, 0.0, 1.1)},
    OFFLOADED: {"": (0.97, 0.9, 1.03)},
    SELECTIVE: {"": (1.1, 1.04, 1.15)},
}
"""name -> card ("": all) -> what is expected. Milliseconds are those of 16384 rows. Drawing with
the 1.5B model is launches, the same ones in both, so the factor of its step is in training alone.
A step of the tiny task is launches too, so its slope is below that of a CPU."""
MFU = {
    (False, False): (0.41, 0.37, 0.45),
    (True, False): (0.45, 0.41, 0.49),
    (True, True): (0.48, 0.44, 0.52),
}
"""(Liger, flash-attn) -> MFU of Qwen2.5-7B on an H200 at 16k tokens a forward, all checkpointed."""
BACKENDS = ("triton", "cublas", "cublas bf16", "torch", "reference")
OURS = (*BACKENDS, *(f"{name}, dW out" for name in ("triton", "cublas", "torch")))
"""Providers of kernel_bench.py that are no peers. (It cannot be imported here: it needs packages
that a bare machine lacks.)"""
TRAINED = {"train": "train_7b", "train_long": "train_7b_32k"}


@dataclass(frozen=True)
class Aim:
    """A figure that was measured, what is wanted of it and what was expected.

    Aim("forward, ms", 24.1, "<= 28", True, (26.2, 24, 30))
    """

    name: str
    value: float | None
    aim: str = ""
    holds: bool | None = None
    expected: Interval | None = None

    @property
    def verdict(self) -> str:
        """Words of both."""
        if self.value is None:
            return "not measured"
        words = []
        if self.expected is not None:
            _, low, high = self.expected
            inside = "below" if self.value < low else "above" if self.value > high else "as"
            words.append(f"{inside} expected")
        if self.aim:
            words.append(f"aim {self.aim} {'holds' if self.holds else 'missed'}")
        return ", ".join(words)


def aims(done: dict[str, Any], device: str = "H200") -> list[dict[str, Any]]:
    """Of the parts that have run, in their order; None where nothing was measured. `device`: the
    card's name."""
    heads = [aim for ours in ("triton", "cublas") for aim in _head_aims(ours, done)]
    every = (*_sweep_aims(done), *heads, *_train_aims(done), *_new_aims(done))
    cards = [card for card in ("H200", "H100") if card in device]
    known = [replace(aim, expected=_expected(aim.name, cards)) for aim in every]
    return [asdict(aim) | {"verdict": aim.verdict} for aim in known]


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: name, expected figure and interval, what was measured, how the two compare."""
    width = max(len(aim["name"]) for aim in found)
    lines = [f"{'':{width}} {'expected':>9} {'interval':>13} {'measured':>9}"]
    for aim in found:
        figure, low, high = aim["expected"] or (None, None, None)
        between = "-" if low is None else f"{low:g} to {high:g}"
        lines.append(
            f"{aim['name']:{width}} {_said(figure):>9} {between:>13} {_said(aim['value']):>9}  "
            f"{aim['verdict']}"
        )
    return lines


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _expected(name: str, cards: Sequence[str]) -> Interval | None:
    if name == "train_7b: MFU" and "H200" in cards:
        liger = importlib.util.find_spec("liger_kernel") is not None
        flash = any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface")))
        return MFU.get((liger, flash))
    if name == SELECTIVE_MFU and "H200" in cards:
        full, gain = _expected("train_7b: MFU", cards), EXPECTED[SELECTIVE][""][0]
        return None if full is None else tuple(round(gain * figure, 3) for figure in full)
    known = EXPECTED.get(name, {})
    return next((known[card] for card in (*cards, "") if card in known), None)


def _most(name: str, value: float | None, limit: float) -> Aim:
    return Aim(name, value, f"<= {limit:g}", None if value is None else value <= limit)


def _least(name: str, value: float | None, limit: float) -> Aim:
    return Aim(name, value, f">= {limit:g}", None if value is None else value >= limit)


def _result(done: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    return done.get(part, {}).get("results", {}).get(name) or {}


def _sweep_aims(done: dict[str, Any]) -> Iterator[Aim]:
    best = _result(done, "sweep", "tile_sweep").get("gemm_exp") or {}
    yield _least("gemm_exp, TF/s", best.get("tflops"), 690)


def _new_aims(done: dict[str, Any]) -> Iterator[Aim]:
    """Of the benches that run as their pages say."""
    rows = _result(done, "kernels", "kernel_bench").get("records", [])
    whole = {"op": "weighted", "mode": "full", "rows": 16384, "status": "ok"}
    right = [r for r in rows if all(r.get(key) == value for key, value in whole.items())]
    times = {r["provider"]: r["p50_ms"] for r in right if r["p50_ms"]}
    peers = [ms for name, ms in times.items() if name not in OURS]
    fastest = ratio(min(peers, default=None), times.get("triton"))
    yield _least(PEER, fastest, 1.0)
    step = _result(done, "step", "step_1.5b")
    yield _least("step_1.5b: TRL's seconds / ours", step.get("faster"), 1.0)
    yield _most("step_1.5b: added memory / TRL's", step.get("added_of_trl"), 0.5)
    found = {
        name: (_result(done, "one_gpu", f"one_gpu_{name}").get("records") or [{}])[0]
        for name in ("resident", "offload", "selective")
    }
    resident, away, kept = (found[name] for name in ("resident", "offload", "selective"))
    # An update of 0.6 s of copies, most of them hidden, beside 10 s of forwards and backwards.
    yield _least(OFFLOADED, ratio(resident.get("p50_s"), away.get("p50_s")), 0.9)
    yield _least(SELECTIVE, ratio(kept.get("mfu"), resident.get("mfu")), 1.04)
    yield _least(SELECTIVE_MFU, kept.get("mfu"), 0.35)
    slopes = _result(done, "scale", "scale").get("slopes", {})
    trained = [found["train"] for found in slopes.values() if "train" in found]
    yield _most(SLOPE, max(trained, default=None), 1.1)


def _train_aims(done: dict[str, Any]) -> Iterator[Aim]:
    """Of Qwen2.5-7B at 16k and 32k tokens a forward."""
    for part, name in TRAINED.items():
        result = _result(done, part, name)
        rows = {row["variant"]: row for row in result.get("records", [])}
        ours = rows.get("gated", {})
        yield _least(f"{name}: MFU", ours.get("mfu"), 0.35)
        padded = rows.get("padded", {}).get("times_gated")
        yield _least(f"{name}: times as fast as the padded loop", padded, 1.3)
        if name == "train_7b":
            rest = _result(done, "train_rest", "train_7b_rest").get("records", [])
            rates = {r["variant"]: r.get("paths_per_s") for r in rest}
            dense = ratio(rates.get("gated"), rates.get("ungated"))
            yield _least(f"{name}: paths per second, gate 0.5 / dense", dense, 1.25)
            yield _most(f"{name}: share of head and loss", ours.get("head_share"), 0.08)
        memory = result.get("estimate", {})
        off = ratio(memory.get("mib"), memory.get("measured_mib"))
        yield _most(f"{name}: estimate beside measured peak", off and abs(off - 1), 0.1)


def _head_aims(ours: str, done: dict[str, Any]) -> Iterator[Aim]:
    def find(part: str, result: str, key: str = "p50_ms", **wanted: Any) -> float | None:
        found = _result(done, part, result).get("records", [])
        rows = [r for r in found if all(r[k] == v for k, v in wanted.items())]
        return rows[0][key] if rows else None

    def full(provider: str) -> float | None:
        return find("dense", "weighted", mode="full", provider=provider, rows=16384)

    def gated(gate: float) -> float | None:
        return find("two_stream", "two_stream", mode="full", provider=ours, gate=gate, rows=16384)

    def most(name: str, value: float | None, limit: float) -> Aim:
        return _most(f"{ours}: {name}", value, limit)

    def least(name: str, value: float | None, limit: float) -> Aim:
        return _least(f"{ours}: {name}", value, limit)

    forward = find("dense", "logprob", mode="forward", provider=ours, rows=16384)
    yield most("forward, ms", forward, 28)
    # A trainer's: dW is added to a float32 tensor that is there before. The other makes it, casts
    # it and scales it, 1.5 ms, as the peers do: it is what they are compared with.
    yield most(INTO, full(f"{ours}, dW out"), 78)
    yield most("forward + backward, dW made, cast and scaled, ms", full(ours), 79.5)
    yield most("two streams, gate 0.5 / dense", ratio(gated(0.5), gated(1.0)), 0.78)
    for peer, limit in (
        ("Liger FLSCE", 1.15),
        ("Liger FLCE", 2.0),
        ("TRL chunked", 3.0),
        ("Liger GRPO", 3.0),
        ("QuACK", 0.97),
    ):
        yield least(f"times as fast as {peer}", ratio(full(peer), full(ours)), limit)
    added = f"{ours}, dW out"
    memory = find("dense", "weighted", "transient_mib", mode="full", provider=added, rows=4096)
    yield most("transient memory at 4096 rows, MiB", memory, 1.3 * 1024)


def ratio(left: float | None, right: float | None) -> float | None:
    return left / right if left and right else None

"""Measures of a run: seconds of its phases, eps3 of its answers, FLOPs of its model."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

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
"""(part of the name that CUDA gives a device, dense bfloat16 operations per second). The first
match counts. From NVIDIA's data sheets, which print twice the rate, that of sparse matrices."""


PHASE = "phase: "
"""What the name of a phase begins with in a profiler's trace."""


class PhaseTimer:
    """Wall seconds of the named phases of a step; in a profiler's trace they have their names.

    `synchronize` (torch.cuda.synchronize) makes a phase wait for the work it has queued; without it
    a GPU's time lands in the phase that first asks for a result.

    >>> timer = PhaseTimer()
    >>> with timer("rollout"):
    ...     pass
    >>> list(timer.metrics())
    ['time_rollout_s']
    """

    def __init__(
        self,
        synchronize: Callable[[], object] | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self._synchronize = synchronize
        # Of a step that another process began: what it has taken there counts.
        self.seconds = dict(seconds or {})

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            # Microseconds where nothing is profiled.
            with torch.profiler.record_function(PHASE + phase):
                yield
                # Not in `finally`: after an error the device may never answer.
                if self._synchronize is not None:
                    self._synchronize()
        finally:
            spent = time.perf_counter() - start
            # Added: a step may enter a phase several times (rounds of resampling).
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def metrics(self) -> dict[str, float]:
        return {f"time_{phase}_s": seconds for phase, seconds in self.seconds.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """Arithmetic of a decoder per document: what MFU counts, and what work is balanced by.

    decoder  parameters that a token is multiplied with, the embedding and the head left out
    head     those of the head, tied or not
    width    layers x heads x head size: a token's query, over all layers

    A document of l tokens costs 6 (decoder + head) l + 6 width l^2 in training and a third of it in
    a forward: two operations per multiply-add, a backward of two forwards, the causal half of the
    attention, nothing for padding, recomputation or the embedding. Sliding windows are not
    discounted.

    >>> ModelFlops(decoder=10, head=2, width=1).row(4)
    384
    """

    decoder: int
    head: int
    width: int

    def row(self, length: int, head_rows: int | None = None) -> int:
        """Operations of a document's forward and backward; `head_rows` as in `forward_row`."""
        return 3 * self.forward_row(length, head_rows)

    def rows(self, lengths: Iterable[int], head_rows: Iterable[int] | None = None) -> int:
        return 3 * self.forward_rows(lengths, head_rows)

    def forward_row(self, length: int, head_rows: int | None = None) -> int:
        """Operations of a forward whose head runs on `head_rows` of the tokens (None: on all)."""
        head_rows = length if head_rows is None else head_rows
        # q k and p v are 4 width l^2 operations over all pairs; a causal mask leaves half of them.
        return 2 * (self.decoder * length + self.head * head_rows + self.width * length**2)

    def forward_rows(self, lengths: Iterable[int], head_rows: Iterable[int] | None = None) -> int:
        if head_rows is None:
            return sum(map(self.forward_row, lengths))
        return sum(self.forward_row(*pair) for pair in zip(lengths, head_rows, strict=True))


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
    # Short benchmarks rule this mean, long ones the ratio of means.
    mean_of_ratios = statistics.fmean(eps3(acc, count) for acc, count in pairs)
    return mean_of_ratios, eps3(statistics.fmean(accs), statistics.fmean(tokens))


def model_flops(config: Any) -> ModelFlops:
    """What a document costs in a Hugging Face causal LM, from its config alone (no weight is made).

    Every matrix of the decoder counts, whatever the architecture; of a mixture of experts those
    that a token is sent through. Errors: ValueError for stacked matrices that are no such experts.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # modules without storage: no memory, whatever the size
        # A copy: transformers writes into the configuration that it is given.
        causal_lm: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    # A lookup is no product; a tied head is counted as the head, below.
    looked_up = {id(m.weight) for m in causal_lm.modules() if isinstance(m, torch.nn.Embedding)}
    decoder = sum(
        _active(name, weight, config)
        for name, weight in causal_lm.base_model.named_parameters()
        if weight.ndim > 1 and id(weight) not in looked_up
    )
    # Query heads, though keys may be fewer: each query meets a key, whoever shares it.
    heads = config.num_attention_heads
    # Qwen3 and Gemma have heads of another width than hidden_size / heads.
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
    return chosen * weight[0].numel()  # (experts, rows, columns), of which `chosen` are used


def peak_flops(device: str) -> float | None:
    """Look up the dense bfloat16 operations per second of a device; None for an unknown one.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
    (989500000000000.0, None)
    """
    # By substring, so the longer names stand first: "H100" is in "H100 PCIe".
    return next((peak for part, peak in PEAK_FLOPS if part in device), None)


def mfu(flops: float, seconds: float, device: str, *, devices: int = 1) -> float | None:
    """Model FLOPs utilisation: `flops` of `ModelFlops`, done in `seconds` by `devices` together,
    as a share of their bfloat16 peak. None where the peak is not known.

    >>> mfu(989.5e12, 2.0, "NVIDIA H200")
    0.5
    """
    peak = peak_flops(device)
    return None if peak is None or seconds <= 0 else flops / (seconds * devices * peak)

"""The backends of the head: which of them can run a call, and which one "auto" takes.

A backend is one function with the signature of `chunked.head_pass` (its records are in contract.py)
and a line in BACKENDS, which is the order of preference. A call that names a backend gets it or a
ValueError. "auto" takes the first one that can run the call and has nothing against it, and says
which and why, once, at INFO. It looks at the device, the dtype and what the call wants; shape and
free memory decide only the chunk.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vpgea_fast.kernels import chunked, reference

log = logging.getLogger("vpgea_fast.losses")


@dataclass(frozen=True)
class Situation:
    """All that the choice of a backend depends on: no tensor, no machine, so that it can be tested.

    bf16 on an H200: Situation("cuda", torch.bfloat16, (9, 0)).
    """

    device: str  # type of the tensors' device
    dtype: torch.dtype
    capability: tuple[int, int] | None = None  # of an NVIDIA device
    lse_gradient: bool = False
    entropy_gradient: bool = False
    batch_invariant: bool = False
    sharded: bool = False  # each process has some of the classes
    statistics: bool = False
    smoothing: bool = False  # gradients of the mean logit and of lse^2
    skips: bool = False  # rows with small gradients are left out

    def __str__(self) -> str:
        version = "" if self.capability is None else " sm_{}{}".format(*self.capability)
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}{version}"


@dataclass(frozen=True)
class BackendChoice:
    """What runs and why: BackendChoice("torch", "chunked, on any device; not 'triton': ...")."""

    name: str
    reason: str


def _nothing(_: Any = None) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run the head. Each question is answered by None or by a sentence why not."""

    run: Callable[..., Any]  # chunked.head_pass's signature
    virtue: str
    missing: Callable[[], str | None] = _nothing  # on this machine
    lacks: Callable[[Situation], str | None] = _nothing  # what this call wants, and the remedy
    objection: Callable[[Situation], str | None] = _nothing  # it can, but "auto" should not
    sharded: bool = False  # whether it looks at Head.shards
    writes_first: bool = False  # whether it looks at Sinks.fresh

    def refuses(self, call: Situation) -> str | None:
        """What it lacks of what the call wants. A backend that says nothing takes whole heads."""
        if call.sharded and not self.sharded:
            return "it takes no head whose classes are cut over processes; use 'torch'"
        # Of a process's own classes alone they would be wrong numbers.
        if call.sharded and (call.statistics or call.smoothing):
            return (
                "a head that is cut has no row statistics, label smoothing or z-loss; gather the "
                "weight, or leave them out"
            )
        # A last bit of logp that differs would give two processes products of other shapes.
        if call.sharded and call.skips:
            return "a head that is cut has no skip_below; gather the weight, or leave it out"
        return self.lacks(call)


def _run_triton(*args: Any, **options: Any) -> Any:
    """Imported when it is asked for: the losses need torch only."""
    from vpgea_fast.kernels.linear_logprob import head_pass

    return head_pass(*args, **options)


def _run_cublas(*args: Any, **options: Any) -> Any:
    """Imported when it is asked for, as triton's."""
    from vpgea_fast.kernels.cublas import head_pass

    return head_pass(*args, **options)


def interpreted() -> bool:
    # Asked of the environment: the losses must not import triton to know.
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'vpgea_fast[triton]'"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def _kernels_lack(call: Situation) -> str | None:
    """What no Triton kernel has."""
    if call.device != "cuda" and not interpreted():
        return f"the tensors are on {call.device}; move them to a CUDA device or use 'torch'"
    # The kernels' accumulators and statistics are float32.
    if call.dtype is torch.float64:
        return "it takes float16, bfloat16 and float32, not float64; use 'torch'"
    # Its passes keep neither the largest logit nor a sum of the logits.
    if call.statistics or call.smoothing:
        return "it has no row statistics, label smoothing or z-loss; leave them out, or use 'torch'"
    return None


def _triton_lacks(call: Situation) -> str | None:
    if (why := _kernels_lack(call)) is not None:
        return why
    # Its E is relative to the target and has no row of p log p.
    if call.entropy_gradient:
        return "it has no gradient of the entropy; detach the entropy, or use 'torch'"
    # fp16 stores E = 2^14 p, whose target entry has no room for lse's share.
    if call.lse_gradient and call.dtype is torch.float16:
        return "it has no gradient of lse in float16; detach lse, use bfloat16 or 'torch'"
    return None


def _triton_objection(call: Situation) -> str | None:
    if call.device != "cuda":
        return "the interpreter is for tests"
    if call.capability is None or call.capability < (8, 0):
        return "it wants the tensor cores of sm_80 or newer"
    if call.dtype is torch.float32:
        return "float32 without TF32 has no tensor cores, and cuBLAS is the better GEMM there"
    return None


def _depends_on_neighbours(call: Situation) -> str | None:
    if not call.batch_invariant:
        return None
    remedy = "for batch_invariant=True use 'triton'"
    if call.device != "cuda" and not interpreted():
        remedy = "batch_invariant=True needs CUDA: 'triton'"
    return (
        "its GEMM library picks a kernel by the number of rows, so a row's bits depend on its "
        f"chunk; {remedy}"
    )


BACKENDS = {
    # Order is preference: "auto" takes the first that can and has no objection.
    "triton": Backend(
        run=_run_triton,
        virtue="tensor cores, and no logits in memory",
        missing=triton_missing,
        lacks=_triton_lacks,
        objection=_triton_objection,
    ),
    "cublas": Backend(
        run=_run_cublas,
        virtue="cuBLAS and two Triton passes over float32 logits",
        missing=triton_missing,
        lacks=lambda call: _kernels_lack(call) or _depends_on_neighbours(call),
        objection=lambda _: "no measurement has preferred it to 'triton' yet",
    ),
    "torch": Backend(
        run=chunked.head_pass,
        virtue="chunked, on any device",
        lacks=_depends_on_neighbours,
        sharded=True,
        writes_first=True,
    ),
    "reference": Backend(
        run=reference.head_pass,
        virtue="the specification",
        lacks=_depends_on_neighbours,
        objection=lambda _: "it holds all logits",
    ),
}


def choose(backend: str, call: Situation, missing: Mapping[str, str]) -> BackendChoice:
    """The backend of a call, and why; a pure function. missing: backend -> why it is not here.

    ValueError: no such backend, one that is missing, or one that lacks what the call wants.
    """
    if backend != "auto" and (backend not in BACKENDS or backend in missing):
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS) if name not in missing)
        why = missing.get(backend, "no such backend")
        raise ValueError(f"backend {backend!r} is not available ({why}); available: {names}")
    # Their fp16 gradients are kept in units of a bound, which lse^2 has only after the pass. Not
    # left to each of them: "auto" would then fall back on all logits at once.
    if call.smoothing and call.dtype is torch.float16 and backend != "reference":
        raise ValueError(
            "label_smoothing, z_loss: got float16, whose passes have neither; use bfloat16 or "
            "float32, or backend='reference'"
        )
    # Objections are not heard here: whoever names a backend has made up his mind.
    if backend != "auto":
        if (why := BACKENDS[backend].refuses(call)) is not None:
            raise ValueError(f"backend {backend!r} cannot run this call: {why}")
        return BackendChoice(backend, "asked for")
    # What was passed over, in words, and what could run but should not: the last resort.
    against: dict[str, str] = {}
    disliked: list[str] = []
    for name, candidate in BACKENDS.items():
        if (why := missing.get(name) or candidate.refuses(call)) is not None:
            against[name] = why
        elif (why := candidate.objection(call)) is not None:
            against[name] = why
            disliked.append(name)
        else:
            passed_over = "".join(f"; not {name!r}: {why}" for name, why in against.items())
            return BackendChoice(name, BACKENDS[name].virtue + passed_over)
    # All objected: a call that wants what only one backend has runs there all the same.
    if disliked:
        return BackendChoice(disliked[0], "the only one that has what this call wants")
    reasons = "; ".join(f"{name!r}: {why}" for name, why in against.items())
    raise ValueError(f"no backend can run this call ({call}): {reasons}")


@functools.cache
def missing_backends() -> Mapping[str, str]:
    """Backend -> why it cannot run on this machine; looked up once a process."""
    found = {name: backend.missing() for name, backend in BACKENDS.items()}
    return {name: why for name, why in found.items() if why is not None}


@functools.cache
def resolve(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    lse_gradient: bool = False,
    entropy_gradient: bool = False,
    batch_invariant: bool = False,
    sharded: bool = False,
    statistics: bool = False,
    smoothing: bool = False,
    skips: bool = False,
) -> BackendChoice:
    """`choose` for tensors on a device of this machine; what "auto" takes is logged once, at INFO.

    Cached, so that a call pays for one look-up.
    """
    # ROCm calls itself cuda too, and its capabilities are other numbers.
    nvidia = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if nvidia else None
    call = Situation(
        device.type,
        dtype,
        capability,
        lse_gradient=lse_gradient,
        entropy_gradient=entropy_gradient,
        batch_invariant=batch_invariant,
        sharded=sharded,
        statistics=statistics,
        smoothing=smoothing,
        skips=skips,
    )
    choice = choose(backend, call, missing_backends())
    if backend == "auto":
        _announce(f"backend {choice.name!r} for {call}: {choice.reason}")
    return choice


@functools.cache
def _announce(message: str) -> None:
    log.info(message)


FREE_SHARE = 8
"""A chunk takes at most 1/8 of the memory that is free: dW, its copy and the decoder's backward
follow it."""
LEAST_CHUNK = 64 << 20
UNASKED_CHUNK = 512 << 20
"""Of a call without gradients before any with: 588 rows of the backend `torch`, which holds 6
bytes a logit, for a 152064-token vocabulary in bfloat16."""

_budgets: dict[tuple[torch.device, tuple[int, ...], torch.dtype], int] = {}


def chunk_budget(weight_VD: torch.Tensor, *, gradients: bool, sharded: bool = False) -> int | None:
    """Bytes for the logits of one chunk; None leaves it to the backend (all devices but CUDA).

    On CUDA the backend's default, halved until it is at most 1/8 of what is free, 64 MiB at least.
    Halved, not cut: the size of a chunk sets the order in which dW is added, and so its last bits,
    which should not follow every byte that another process holds. The driver is asked what is free
    once per device, head and dtype, by the first call with `gradients`, outside graph capture. A
    call without may come while another engine holds the device, and must not decide for the
    training; it takes the budget that is known, or 512 MiB. A `sharded` head always takes 512 MiB:
    its processes must make the same chunks, and may have unequal room. Pass chunk_bytes for
    another.
    """
    device = weight_VD.device
    if device.type != "cuda":
        return None
    if sharded:
        return UNASKED_CHUNK
    # A teacher's head of another shape on the same device has a budget of its own.
    key = (device, tuple(weight_VD.shape), weight_VD.dtype)
    if key not in _budgets:
        budget = chunked.default_chunk_bytes(device)
        if not gradients:
            return min(budget, UNASKED_CHUNK)
        if torch.cuda.is_current_stream_capturing():
            return budget  # the driver may not be asked while a graph is captured
        # What the allocator holds and does not use is free to us, and not to the driver.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        _budgets[key] = halved_to_fit(budget, free)
        _announce(
            f"chunks of {_budgets[key] >> 20} MiB on {device}, where {free >> 20} MiB are free"
        )
    return _budgets[key]


def halved_to_fit(budget: int, free: int) -> int:
    """budget / 2^n, the largest that is at most free / 8, but not under 64 MiB."""
    while budget > max(LEAST_CHUNK, free // FREE_SHARE):
        budget //= 2
    return budget

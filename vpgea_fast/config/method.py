"""Sections of the method: sampling, engines, verification, scoring."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.values import (
    STRICT,
    Gibibytes,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Temperature,
)


@dataclass(frozen=True, config=STRICT)
class RolloutConfig:
    # Lengths and distribution of the paths: fixed for a run, since all its numbers rest on them.
    max_new_tokens: PositiveInt = 8192
    """Token limit of a thought, its closing token included. A path that is cut there has no
    reward."""
    temperature: Temperature = 1.0
    """Sampling temperature; the loss uses the same, so paths are drawn from the trained policy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus of the sampling. Below 1 the paths are not drawn from the policy that the gradient
    assumes."""
    full_answer: bool = False
    """Sample on after the thought to the end of the answer, so that it can be verified."""
    max_answer_tokens: PositiveInt = 1024
    """Token limit of the answer after a thought."""
    # Memory of the engine: each path costs its keys and values, and a row of logits.
    max_batch: PositiveInt = 256
    """Paths decoded side by side, per process."""
    # An engine with old weights still samples fluent text: only log-probs tell.
    probe_every: NonNegativeInt = 1
    """Check that the engine took over the weights: a few tokens' log-probs, engine against trainer.
    It happens after the first hand-over, then every this many steps (0: only the first)."""
    probe_tolerance: PositiveFloat | None = None
    """Largest allowed mean |difference| of those log-probs; null: 1e-4 in float32, 0.05 in
    bfloat16."""
    # Truncated importance sampling (Ionides, 2008), here between two programs with one policy.
    importance_cap: Annotated[float, Field(ge=1.0, le=1e12)] | None = None
    """Truncated importance weights: multiply coefficients by min(p_trainer / p_engine, cap), token
    by token. Costs one forward of every trained path. Off by default: the mismatch is only
    logged."""


@dataclass(frozen=True, config=STRICT)
class HfEngineConfig:
    """The trained model itself samples, or a copy of it beside a sharded one."""

    name: Literal["hf"] = "hf"
    """The trained model itself samples, or a copy of it beside a sharded one."""


@dataclass(frozen=True, config=STRICT)
class VllmEngineConfig:
    """vLLM samples: where it runs and what it may take."""

    name: Literal["vllm"] = "vllm"
    """vLLM samples, on the devices of the training processes or at a server."""
    # Where it runs: in the training processes it shares their devices, a server has its own.
    process: Literal["shared", "own"] = "shared"
    """`shared`: vLLM inside each training process. `own`: in a child process of it."""
    server: str | None = None
    """URL of a `vllm serve` that samples instead, e.g. http://127.0.0.1:8000. Its key is read from
    the environment variable VLLM_API_KEY."""
    tensor_parallel: PositiveInt = 1
    """Training processes of a node that share one engine (`process: shared`). It must divide their
    number and the model's attention heads."""
    # What it may take: the trainer's weights and moments stay beside it, unless offloaded.
    gpu_memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Share of the whole GPU for vLLM's weights, work and KV cache, free when vLLM starts. Asleep,
    vLLM keeps its CUDA graphs only. `--dry-run` says what fits."""
    kv_cache_gib: Gibibytes | None = None
    """Size of the KV cache; null: what gpu_memory leaves, on a CPU 1."""
    context: PositiveInt | None = None
    """Longest path in tokens, prompt included; null: what data, rollout and eval can need."""
    enforce_eager: bool = False
    """Use no CUDA graphs and no torch.compile. Always so on a CPU."""
    # MiniMax-M1 (arXiv 2506.13585) traced its mismatch of engine and trainer to the head.
    fp32_head: bool = False
    """Compute logits from a float32 product with the head, as the trainer does (bfloat16
    models)."""
    timeout_s: Seconds = 1800.0
    """Give up a path that takes longer; its question then has no gradient in this step. A server's
    time includes its queue. Not with tensor_parallel, whose processes must stop alike."""
    # How a server, or a child process on a CPU, gets the weights of every step.
    sync: Literal["auto", "disk", "nccl"] = "auto"
    """How a server gets weights: safetensors in sync_dir (`disk`), or NCCL; `auto` is `disk`."""
    sync_dir: PathText | None = None
    """Directory through which weights pass as files; a server must see it too. Null: sync/ in
    run.dir."""
    trust_remote_code: bool = False
    """Let vLLM run the Python code that a model directory brings."""


@dataclass(frozen=True, config=STRICT)
class ReplayEngineConfig:
    """Recorded paths stand for drawn ones; evaluations and sampled answers are drawn as by hf."""

    name: Literal["replay"] = "replay"
    """Recorded paths stand for drawn ones; evaluations and sampled answers are drawn as by hf."""
    paths: tuple[PathText, ...] = ()
    """JSONL files of recorded paths, such as the paths.jsonl of a run. A line needs question_id,
    stream and ids; logps, answer_ids, answer_logps, finish, index, step, and of Variational
    Reasoning share, attempt_ids, attempt_right and attempts, where they matter. Where
    it has text, answer, question or prompt, they must be those of this run."""
    match: Literal["step", "question"] = "step"
    """`step`: a path of the same step, stream and index; a line without a step fits every step.
    `question`: of a question's lines, in their order, whatever their step and index."""


EngineConfig = Annotated[
    HfEngineConfig | VllmEngineConfig | ReplayEngineConfig, Field(discriminator="name")
]


@dataclass(frozen=True, config=STRICT)
class VerifyConfig:
    """Who judges answers, in training and evaluation alike."""

    name: Literal["math", "text", "number", "letter", "custom"] = "math"
    """The checker. `math`: math-verify. `number`: equal as exact rationals. `text`: the same words,
    case and spaces aside. `letter`: the same choice, A to J. `custom`: target."""
    target: str | None = None
    """`package.module:function` of (gold, text) that returns True or False; `custom` only. It is
    found as modules are, or in the working directory, and must accept `\\boxed{gold}`."""
    # A wrong answer can keep sympy busy for hours, so judges are processes that can be killed.
    workers: PositiveInt = 1
    """Processes that judge, per process of the run."""
    timeout_s: Seconds = 5.0
    """End a judgement that computes longer (`custom`: takes longer), and count its answer as
    wrong."""

    def __post_init__(self) -> None:
        # A target under another name would be ignored, and the user's function with it.
        if (self.name == "custom") != (self.target is not None):
            raise ValueError(
                f"verify.name is {self.name!r} and verify.target {self.target!r}: a target belongs "
                "to name custom, and custom needs one; set both or neither"
            )
        if self.target is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.target):
            raise ValueError(f"verify.target is {self.target!r}; expected package.module:function")


@dataclass(frozen=True, config=STRICT)
class ScoringConfig:
    # Variants of one answer differ in tokens: a sum is their log-likelihood, a mean is not.
    u_norm: Literal["sum", "mean"] = "sum"
    """Sum or mean of the answer's token log-probs. exp U is the answer's probability with `sum`,
    the geometric mean of its tokens' with `mean`: what compares it with a limit, as
    likelihood_gate does at 1/2, then rejects less. With reward paper and baseline mean the
    advantages are the same up to eps, for answers of one length. An objective whose estimator says
    which (vr_theta) does not read it."""
    u_source: Literal["likelihood", "accuracy"] = "likelihood"
    """`likelihood`: U = log P(answer given question and path). `accuracy`: U = log((J acc + 1/2) /
    (J + 1)) of J answers sampled after the thought."""
    answer_samples: PositiveInt = 8
    """J, the answers sampled after each thought (`accuracy`, and objectives that ask for them)."""
    answer_temperature: Temperature = 0.7
    """Sampling temperature of those answers."""

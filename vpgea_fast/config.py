"""Configuration: one frozen dataclass a stage, validated at birth, from YAML and `--section.key
value`.

An unknown key is an error that names the nearest known one; a variant (the objective) is a type of
its own, so no field is read by one branch only. `resolve` gives the record, `dump` the YAML that
makes the same record again.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

R1_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
STUDENT_TEMPLATE = "{question}\n" + R1_INSTRUCTION
TEACHER_TEMPLATE = (
    "{question}\n"
    "The reference answer to this problem is: {answer}.\n"
    "Reconstruct the shortest complete chain of reasoning that a solver who does NOT know this "
    "answer would follow to derive it from the problem alone.\n"
    "Think in the first person; keep every step needed to reach the result, drop dead ends, "
    "repeated checks and restarts; never mention, use or hint that an answer was given. "
    r"Put the final answer within \boxed{}."
)


def _ordered(clip: tuple[float, float]) -> tuple[float, float]:
    if clip[0] > clip[1]:
        raise ValueError("expected (low, high) with low <= high")
    return clip


Clip = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]

REMEDIES = {
    "objective.group_size": "the z-score compares paths: sample 2 or more a question",
    "objective.prior_samples": "they define the baseline and the base length: sample 1 or more",
    "objective.alpha": "0 turns the length factor off, 0.5 is the paper's choice",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, what was got and what to do."""


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    dir: str = "runs/vpgea"
    """Run directory; an existing run is never overwritten (`--resume` continues it)."""
    seed: NonNegativeInt = 0
    threads: NonNegativeInt = 0
    """CPU threads of torch; 0 keeps torch's choice. Part of the configuration because sums depend
    on it bitwise."""
    max_minutes: PositiveFloat | None = None
    """Save and stop, as on SIGTERM, when the run has taken so long: before a scheduler ends it."""


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    path: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """A Hugging Face directory, or the name of a model on the Hub."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Dtype of the forward. Weights that are trained and optimiser states stay float32 (float64 for
    float64). float64 is for checks: norms and rotary tables of transformers compute in float32
    inside, so its log-probs are exact to about 1e-5."""
    device: str = "auto"
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that the optimiser updates (float64 for a float64 forward). bfloat16
    halves them and needs optim.stochastic_rounding: at 1e-6 a rounded update is lost."""
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    """`full` keeps a layer's input and runs the layer again in the backward; `selective` also keeps
    what attention and every second GEMM gave."""
    compile: bool = False
    """torch.compile, one graph for all decoder layers."""
    liger: Literal["auto", "always", "never"] = "auto"
    """Liger's RMSNorm, RoPE and SwiGLU; `auto`: on CUDA when liger-kernel is installed."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Attention of packed documents: flash-attn, torch's varlen_attn (CUDA), or one sdpa call a
    document (any device); `auto` takes the first that runs here."""


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """How the model lies on the processes that torchrun starts; one process needs none of it."""

    shard: Literal["auto", "always", "never"] = "auto"
    """FSDP2; `auto`: with more than one process, and on CUDA."""
    replicas: PositiveInt = 1
    """HSDP: so many copies of the model, each sharded over processes / replicas. One copy a node
    keeps the gathers inside it."""
    accumulate: Literal["sharded", "unsharded"] = "sharded"
    """Gradients between micro-batches: reduced into shards each time, or kept whole on every
    process and reduced once (4 bytes a parameter). The head always does the latter."""
    cpu_offload: bool = False
    """Weights, gradients and optimiser states in host memory between uses."""
    timeout_minutes: PositiveFloat = 30.0
    """A collective that waits longer ends the job."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    train: str = "data/train.jsonl"
    """JSONL or parquet file, or `hub:owner/name[:split]`."""
    question_key: str = "question"
    answer_key: str = "answer"
    id_key: str = "id"
    variants_key: str | None = None
    """Key of a list of other spellings of the answer; U is then the logsumexp over all of them."""
    max_prompt_tokens: PositiveInt = 2048
    overlong: Literal["drop", "error"] = "drop"
    """What to do with a prompt above the limit. It is never cut."""
    bad_answer: Literal["drop", "error"] = "drop"
    """What to do with a reference answer that the verifier cannot parse."""
    limit: PositiveInt | None = None


@dataclass(frozen=True, config=STRICT)
class PromptConfig:
    student: str = STUDENT_TEMPLATE
    teacher: str = TEACHER_TEMPLATE
    teacher_role: Literal["user", "system"] = "user"
    """Where the teacher's words beyond the student prompt go; R1 models ask for no system
    prompt."""
    think_open: str = "<think>"
    think_close: str = "</think>"
    think_prefix: str = "<think>\n"
    """What both views must end with; appended where the chat template does not."""
    answer_cue: str = "\n\n**Final Answer**\n\\boxed"
    answer_target: str = "{{answer}}"
    """Spelling of the reference answer after the cue: here `{4}`. `{question}` and `{answer}` are
    the only fields; every other brace is itself."""


@dataclass(frozen=True, config=STRICT)
class RolloutConfig:
    engine: Literal["hf", "vllm"] = "hf"
    """`hf`: the trained model itself, or a copy of it; `vllm`: see the section `vllm`."""
    max_new_tokens: PositiveInt = 8192
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    full_answer: bool = False
    """Sample on after the thought to the end of the answer, so that it can be verified."""
    max_answer_tokens: PositiveInt = 1024
    max_batch: PositiveInt = 256
    """Paths decoded side by side."""
    probe_every: NonNegativeInt = 1
    """Steps between two checks that the engine took over the weights: a few tokens' log-probs,
    engine against trainer, after the first hand-over and then so often; 0: only the first."""
    probe_tolerance: PositiveFloat | None = None
    """Largest mean |difference| of those log-probs; default 1e-4 in float32, 0.05 in bfloat16."""
    importance_cap: Annotated[float, Field(ge=1.0)] | None = None
    """Truncated importance weights: coefficients times min(p_trainer / p_engine, cap), token by
    token. Costs a forward of every path that is trained. Off by default: the mismatch is logged."""


@dataclass(frozen=True, config=STRICT)
class VllmEngineConfig:
    """Where vLLM runs and what it may take; read when rollout.engine is vllm."""

    process: Literal["shared", "own"] = "shared"
    """`shared`: vLLM inside each training process; `own`: in a child of it."""
    server: str | None = None
    """URL of a `vllm serve` that samples instead, e.g. http://127.0.0.1:8000; its key is read from
    the environment variable VLLM_API_KEY."""
    tensor_parallel: PositiveInt = 1
    """Training processes of a node that share one engine (`process: shared`); a divisor of their
    number and of the model's attention heads."""
    gpu_memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Share of the whole GPU for weights, work and KV cache, which must be free when vLLM starts;
    asleep, all but its CUDA graphs is the trainer's. `--dry-run` says what fits."""
    kv_cache_gib: PositiveFloat | None = None
    """Size of the KV cache; default what gpu_memory leaves, on a CPU 1."""
    context: PositiveInt | None = None
    """Positions of a path, prompt included; default what data, rollout and eval can need."""
    enforce_eager: bool = False
    """No CUDA graphs, no torch.compile; always so on a CPU."""
    fp32_head: bool = False
    """Logits from a float32 product with the head, as in the trainer (bfloat16 models)."""
    timeout_s: PositiveFloat = 1800.0
    """A path that takes longer is given up (with a server from the request on, queueing included),
    and its question has no gradient in this step. Not with tensor_parallel, whose processes must
    stop alike."""
    sync: Literal["auto", "disk", "nccl"] = "auto"
    """How a server gets weights: safetensors in sync_dir, or NCCL; `auto` is disk."""
    sync_dir: str | None = None
    """Where weights pass through files; a server must see it too. Default: sync/ in run.dir."""
    trust_remote_code: bool = False


@dataclass(frozen=True, config=STRICT)
class VerifyConfig:
    workers: PositiveInt = 1
    timeout_s: PositiveFloat = 5.0


@dataclass(frozen=True, config=STRICT)
class ScoringConfig:
    u_norm: Literal["sum", "mean"] = "sum"
    """Sum or mean of the answer's token log-probs; the advantages are the same up to eps."""
    u_source: Literal["likelihood", "accuracy"] = "likelihood"
    """`accuracy`: U = log((J acc + 1/2) / (J + 1)) of J answers sampled after the thought."""
    answer_samples: PositiveInt = 8
    """J; `accuracy` only."""
    answer_temperature: PositiveFloat = 0.7


@dataclass(frozen=True, config=STRICT)
class VpgeaConfig:
    """VPG-EA (arXiv 2605.11019). `preset` fills every key that is not given; the paper leaves most
    of them open."""

    name: Literal["vpgea"] = "vpgea"
    preset: Literal["paper", "robust"] = "paper"
    group_size: Annotated[int, Field(ge=2)] = 8
    """G, posterior paths a question; the z-score needs two."""
    prior_samples: PositiveInt = 8
    """N, prior paths a question; they define the baseline utility and the base length."""
    alpha: NonNegativeFloat = 0.5
    beta: NonNegativeFloat = 0.5
    gate: Literal["indicator", "relu"] = "indicator"
    reward: Literal["paper", "likelihood_gate", "likelihood_mix"] = "paper"
    baseline: Literal["mean", "lme"] = "mean"
    r_margin: NonNegativeFloat = 0.0
    clamp_u: bool = False
    u_min: Annotated[float, Field(lt=0.0)] = -20.0
    eta_clip: Clip | None = None
    eps: PositiveFloat = 1e-6
    ddof: Literal[0, 1] = 0
    std_gate: NonNegativeFloat = 0.0
    verify: Literal["none", "gate"] = "none"
    """`gate`: a posterior path is accepted only if the answer sampled after it verifies (needs
    rollout.full_answer)."""
    leak_guard: Literal["none"] = "none"
    """The counterfactual guard of `robust` is not built yet; the run says so."""

    def __post_init__(self) -> None:
        if self.r_margin and self.reward != "paper":
            raise ValueError(
                f"r_margin {self.r_margin} belongs to reward 'paper', got reward "
                f"{self.reward!r}; set it to 0"
            )

    @property
    def posterior_paths(self) -> int:
        return self.group_size

    @property
    def prior_paths(self) -> int:
        return self.prior_samples

    @property
    def scores_answers(self) -> bool:
        return True

    @property
    def verifies_answers(self) -> bool:
        return self.verify == "gate"


VPGEA_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "robust": {
        "baseline": "lme",
        "reward": "likelihood_mix",
        "clamp_u": True,
        "eta_clip": (0.25, 4.0),
        "eps": 1e-3,
        "std_gate": 0.05,
    },
}


@dataclass(frozen=True, config=STRICT)
class GrpoConfig:
    """GRPO at ratio 1, with VPG-EA's length factor as an option: reward = correct * (len_base /
    len)^alpha."""

    name: Literal["grpo"] = "grpo"
    group_size: Annotated[int, Field(ge=2)] = 8
    alpha: NonNegativeFloat = 0.0
    """0 is plain GRPO; above 0 a correct path earns the length factor against its group's mean
    length."""
    reward: Literal["verify", "likelihood"] = "verify"
    """`verify`: the sampled answer verifies (needs rollout.full_answer). `likelihood`: P(y*|x, z) >
    0.5."""
    eta_clip: Clip | None = None
    eps: PositiveFloat = 1e-6
    ddof: Literal[0, 1] = 0
    std_gate: NonNegativeFloat = 0.0

    @property
    def posterior_paths(self) -> int:
        return 0

    @property
    def prior_paths(self) -> int:
        return self.group_size

    @property
    def scores_answers(self) -> bool:
        return self.reward == "likelihood"

    @property
    def verifies_answers(self) -> bool:
        return self.reward == "verify"


ObjectiveConfig = Annotated[VpgeaConfig | GrpoConfig, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    backend: Literal["auto", "reference", "torch", "triton", "cublas"] = "auto"


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    name: Literal["adamw", "adamw_bf16", "adamw_8bit"] = "adamw"
    """Moments in float32, in bfloat16 rounded stochastically, or in 8 bits (torchao, an extra)."""
    stochastic_rounding: bool = False
    """Round bfloat16 weights up or down with the probability that makes the mean exact."""
    lr: PositiveFloat = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up, over train.steps; linear and cosine end at zero."""
    warmup_steps: NonNegativeInt = 10
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    steps: PositiveInt = 200
    questions_per_step: PositiveInt = 64
    norm: Literal["seq_sum", "const", "seq_mean", "token_mean"] = "const"
    norm_constant: PositiveFloat | None = None
    """C of `const`; default rollout.max_new_tokens / 4."""
    denominator: Literal["nominal", "effective"] = "nominal"
    """Divide by all questions of the step, or by those that have a gradient."""
    distill_denominator: Literal["same", "gated"] = "same"
    """`token_mean` only: the distilled rows divide by the sampled stream's tokens, or by their
    own."""
    resample_rounds: NonNegativeInt = 0
    """Dynamic sampling (DAPO, arXiv 2503.14476): questions without a gradient are replaced by new
    ones, up to so many times a step. 0: off."""
    micro_batch_tokens: PositiveInt = 16384
    """Packed tokens a forward; at least the longest row that may come."""


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    save_every: PositiveInt = 20
    save_minutes: PositiveFloat | None = None
    """Also save when so much time has passed since the last save."""
    keep_last: PositiveInt = 2
    background: bool = False
    """Copy the state to host memory, train on, and write from a thread."""
    export: bool = True
    """Write export/ (a Hugging Face directory) when the run ends."""


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    data: tuple[str, ...] = ()
    """JSONL or parquet files, one a benchmark; empty: no evaluation."""
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0: only before and after."""
    samples: NonNegativeInt = 1
    """n sampled answers a question; 0: greedy only."""
    greedy: bool = True
    temperature: PositiveFloat = 0.6
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    max_new_tokens: PositiveInt = 32768
    limit: PositiveInt | None = None
    seed: NonNegativeInt = 0


@dataclass(frozen=True, config=STRICT)
class MetricsConfig:
    diag_every: NonNegativeInt = 10
    """Steps between the costly diagnostics (KL of the two views on whole paths); 0: never."""
    paths_per_step: NonNegativeInt = 16
    """Sampled paths written to paths.jsonl a step."""
    compare: str | None = None
    """JSON of committed rows shown beside the run's own in the closing table and the report."""
    note: str = ""
    """A line printed under the closing table."""


@dataclass(frozen=True, config=STRICT)
class Config:
    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    vllm: VllmEngineConfig = Field(default_factory=VllmEngineConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    objective: ObjectiveConfig = Field(default_factory=VpgeaConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)

    @property
    def colocated(self) -> bool:
        """vLLM samples on the devices of the training processes, not at a server."""
        return self.rollout.engine == "vllm" and self.vllm.server is None

    def __post_init__(self) -> None:
        if self.objective.verifies_answers and not self.rollout.full_answer:
            raise ValueError(
                f"objective {self.objective.name!r} verifies sampled answers, but "
                "rollout.full_answer is false; set it to true or choose another reward"
            )
        if self.rollout.engine == "vllm" and self.rollout.top_p < 1:
            raise ValueError(
                f"rollout.top_p is {self.rollout.top_p}, but vLLM gives log-probs of the cut "
                "distribution then, and the gradient assumes paths of the whole one; set it to 1.0 "
                "(an evaluation may cut: eval.top_p)"
            )
        rounded = self.model.master_dtype == "bfloat16"
        if rounded != self.optim.stochastic_rounding:
            raise ValueError(
                f"model.master_dtype is {self.model.master_dtype!r} and optim.stochastic_rounding "
                f"{self.optim.stochastic_rounding}: bfloat16 weights lose updates of 1e-6 unless "
                "rounded stochastically, others are not rounded; set both or neither"
            )
        if rounded and self.model.dtype != "bfloat16":
            raise ValueError(
                f"model.master_dtype 'bfloat16' needs model.dtype 'bfloat16', got "
                f"{self.model.dtype!r}"
            )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `--section.key value` (or `--section.key=value`) laid
    over it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file"
        ) from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected sections (run:, model:, ...), got {type(tree).__name__}"
        )
    return resolve(_merge(tree, parse_overrides(overrides)), source=str(path))


def resolve(tree: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate a tree of sections; presets fill the keys of their objective that the tree leaves
    open."""
    try:
        return TypeAdapter(Config).validate_python(_with_preset(tree))
    except ValidationError as error:
        raise ConfigError(
            f"{source}:\n" + "\n".join(_explain(e) for e in error.errors())
        ) from error


def dump(config: Config) -> str:
    """YAML of every key; `resolve(yaml.safe_load(dump(c))) == c`."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def as_dict(config: Config) -> dict[str, Any]:
    return TypeAdapter(Config).dump_python(config, mode="json")


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (old value, new value) of every key that differs, run.dir aside."""
    a, b = as_dict(old), as_dict(new)
    keys = [(section, key) for section in b for key in {**a[section], **b[section]}]
    pairs = {f"{s}.{k}": (a[s].get(k), b[s].get(k)) for s, k in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key != "run.dir"}


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["--optim.lr", "1e-5", "--run.seed=3"]` -> `{"optim": {"lr": "1e-5"}, "run": {"seed": 3}}`.

    Text fields take their value as it stands; others read it as YAML.
    """
    tree: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        section, dot, name = key.removeprefix("--").partition(".")
        if not key.startswith("--") or not dot:
            raise ConfigError(f"expected --section.key value, got {word!r}")
        if not equals:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise ConfigError(
                    f"expected --section.key value, got {key} and no value; write {key}=VALUE for "
                    "a value that starts with --"
                )
        tree.setdefault(section, {})[name] = value if _is_text(section, name) else _parse(value)
    return tree


def _is_text(section: str, name: str) -> bool:
    """Whether a field takes text: then a `#`, a colon or a number in it means nothing."""
    records = [VpgeaConfig, GrpoConfig] if section == "objective" else []
    if not records and section in Config.__dataclass_fields__:
        records = [get_type_hints(Config)[section]]
    return any(get_type_hints(record).get(name) in (str, str | None) for record in records)


def _parse(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`; naming another variant (`objective.name`) leaves the old one's keys."""
    if "name" in top and top["name"] != base.get("name", top["name"]):
        return dict(top)
    merged = dict(base)
    for key, value in top.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    objective = tree.get("objective") or {}
    if not isinstance(objective, Mapping):
        return dict(tree)
    objective = {"name": "vpgea", **objective}
    preset = (
        VPGEA_PRESETS.get(objective.get("preset", "paper"), {})
        if objective["name"] == "vpgea"
        else {}
    )
    return {**tree, "objective": {**preset, **objective}}


def _explain(error: Any) -> str:
    """One line for one pydantic error: the key, what was got, and the nearest key when it is
    unknown."""
    loc = [str(part) for part in error["loc"]]
    variants = {"vpgea": VpgeaConfig, "grpo": GrpoConfig}
    owner: Any = Config
    for part in loc[:-1]:
        owner = variants.get(part) or get_type_hints(owner).get(part, owner)
    key = ".".join(part for part in loc if part not in variants)
    if error["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(owner)]
        near = difflib.get_close_matches(loc[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"  {key}: unknown key; {hint}"
    got = "" if isinstance(error["input"], (dict, list)) else f", got {error['input']!r}"
    remedy = f"; {REMEDIES[key]}" if key in REMEDIES else ""
    return f"  {key or 'configuration'}: {error['msg'].removeprefix('Value error, ')}{got}{remedy}"

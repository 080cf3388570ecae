"""Configuration: one frozen dataclass a stage, validated at birth, from YAML and `--section.key
value`.

An unknown key is an error that names the nearest known one; for a key of an older version it gives
the new one. A variant (the objective, the engine) is a type of its own, so no field is read
by one branch only. Values are taken as strict_yaml.py reads them, in a file and on the command line
alike, and never converted. `resolve` gives the record, `dump` the YAML that makes it again.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from vpgea_fast import strict_yaml
from vpgea_fast.kernels.options import GroupOptions

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

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text for a terminal: what would steer one (escape sequences, carriage returns, reversed
    writing) or cannot be encoded is spelled out; line breaks and tabs stay.

    >>> printable("\\x1b[2J 2 + 2\\r = ?")
    '\\\\x1b[2J 2 + 2\\\\r = ?'
    """
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def expand_home(path: str) -> str:
    """A path with the home directory for a leading `~` or `~user`. ValueError where none is known,
    and for what is no path."""
    if not path.strip() or "\0" in path:
        raise ValueError(f"got {path!r}, expected a path")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ValueError(
            f"got {path!r}, and that user has no home directory here; write ./{path} for a file of "
            "this name"
        ) from error


PathText = Annotated[str, AfterValidator(expand_home)]

# A count beyond int32 is a slip, and so is a quantity beyond 1e12: both end in crashes elsewhere.
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=1e12)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=1e12)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What numpy takes, inside vLLM."""
Minutes = Annotated[float, Field(gt=0.0, le=1e6)]
Seconds = Annotated[float, Field(gt=0.0, le=1e6)]
Gibibytes = Annotated[float, Field(gt=0.0, le=1e5)]
Temperature = Annotated[float, Field(ge=1e-4, le=100.0)]
"""Below, logits overflow float32."""
Exponent = Annotated[float, Field(ge=0.0, le=8.0)]
"""Of a ratio of lengths, whose power must stay in float32."""


def _ordered(clip: tuple[float, float]) -> tuple[float, float]:
    if clip[0] > clip[1]:
        raise ValueError("expected (low, high) with low <= high")
    return clip


def _finite(tree: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        json.dumps(tree, allow_nan=False)
    except ValueError as error:
        raise ValueError("expected finite numbers") from error
    return tree


Switches = Annotated[dict[str, JsonValue], AfterValidator(_finite)]
Clip = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]

REMEDIES = {
    "objective.group_size": "the z-score compares paths: sample 2 or more a question",
    "objective.prior_samples": "they define the baseline and the base length: sample 1 or more",
    "objective.alpha": "0 turns the length factor off, 0.5 is the paper's choice",
}


SHIPPED = Path(__file__).with_name("configs")
"""The configurations of the project: `configs/` in the tree, a package of files in a wheel."""
ROWS = Path(__file__).with_name("results")
"""The committed rows that come with them."""
MAX_BYTES = 1_000_000
"""Of a configuration: what is larger is another file."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, what was got and what to do."""


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    dir: PathText = "runs/vpgea"
    """Run directory. An existing run is never overwritten; `--resume` continues it."""
    seed: Seed = 0
    """Seed of the samples, of the order of the questions and of stochastic rounding."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of torch; 0 keeps torch's choice. Part of the configuration because sums depend
    on it bitwise."""
    max_minutes: Minutes | None = None
    """Save and stop, as on SIGTERM, after this many minutes: before a scheduler ends the run."""


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    path: PathText = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """A Hugging Face directory, or the name of a model on the Hub."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Dtype of the forward. Trained weights and optimiser states stay float32 (float64 for
    float64). float64 is for checks: transformers computes norms and rotary tables in float32, so
    its log-probs are exact to about 1e-5."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that the optimiser updates (float64 for a float64 forward). bfloat16
    halves their memory and needs optim.stochastic_rounding: at a rate of 1e-6 a rounded update is
    lost."""
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    """What a layer keeps for its backward. `full`: its input, and the layer runs again.
    `selective`: also attention's output, queries, keys and values, and the gate of the MLP. `none`:
    everything."""
    compile: bool = False
    """Compile all decoder layers with torch.compile, as one graph."""
    liger: Literal["auto", "always", "never"] = "auto"
    """Use Liger's RMSNorm, RoPE and SwiGLU. `auto`: on CUDA when liger-kernel is installed."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Attention over packed documents. `flash`: flash-attn. `varlen`: torch's varlen_attn (CUDA).
    `sdpa`: one call per document, on any device. `auto`: the first of these that runs here."""


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """How the model lies on the processes that torchrun starts; one process needs none of it."""

    shard: Literal["auto", "always", "never"] = "auto"
    """Shard the model with FSDP2. `auto`: with more than one process, and on CUDA."""
    replicas: PositiveInt = 1
    """Number of HSDP replicas, each sharded over world_size / replicas processes. One replica per
    node keeps the gathers inside it."""
    accumulate: Literal["sharded", "unsharded"] = "sharded"
    """Gradients between micro-batches. `sharded`: reduced into shards each time. `unsharded`: kept
    whole on every process and reduced once, at 4 bytes per parameter. The head is always
    unsharded."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimiser states in host memory between uses."""
    timeout_minutes: Minutes = 30.0
    """End the job when a collective waits longer than this."""


@dataclass(frozen=True, config=STRICT)
class DataFile:
    """One entry of data.train or eval.data: a path, or a mapping. A key that is not given is that
    of the section `data`; an empty text there means none."""

    path: PathText
    """JSONL, JSON (an array), CSV, TSV or parquet file, a directory, or
    `hub:owner/name[/config][:split]`."""
    name: str | None = None
    """Name of the benchmark; also put before ids that two files share. Default: the file's name."""
    weight: PositiveFloat | None = None
    """Share of a step's questions, relative to the other files' weights (data.train only)."""
    question_key: str | None = None
    """For this file, instead of data.question_key."""
    answer_key: str | None = None
    """For this file, instead of data.answer_key."""
    id_key: str | None = None
    """For this file, instead of data.id_key."""
    variants_key: str | None = None
    """For this file, instead of data.variants_key."""
    choices_key: str | tuple[str, ...] | None = None
    """For this file, instead of data.choices_key."""
    choices_answer: Literal["auto", "letter", "index", "index_from_1", "text"] | None = None
    """For this file, instead of data.choices_answer."""
    choices_seed: NonNegativeInt | None = None
    """For this file, instead of data.choices_seed."""
    limit: PositiveInt | None = None
    """Read at most this many rows of the file; default: data.limit, in eval.data eval.limit."""

    @property
    def label(self) -> str:
        return self.name or Path(self.path).stem


def _written(files: tuple[DataFile, ...]) -> Any:
    """What `resolve` reads, as short as can be: a path where nothing else is given."""
    given = [{k: v for k, v in vars(file).items() if v is not None} for file in files]
    given = [entry["path"] if len(entry) == 1 else entry for entry in given]
    plain = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in entry.items()}
        if isinstance(entry, dict)
        else entry
        for entry in given
    ]
    return plain[0] if len(plain) == 1 else plain


Files = Annotated[tuple[DataFile, ...], PlainSerializer(_written)]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Keys of rows may lead inside (`reward_model.ground_truth`, `prompt.0.content`); a key that
    holds a dot itself comes first."""

    train: Annotated[Files, Field(min_length=1)] = (DataFile("data/train.jsonl"),)
    """One file, or a list of files, each a path or a mapping (see the keys of a file). Without
    weights they form one data set; with a weight each, every step takes that share from every
    file."""
    question_key: str = "question"
    """Key of the question's text, or of chat messages with one user turn. `{Body} {Question}` joins
    two keys."""
    answer_key: str = "answer"
    """Key of the final answer. Of a worked solution, the answer is what follows the last `####` or
    what its last \\boxed{} holds, and the run says so."""
    id_key: str = "id"
    """Key of the question's id; a row without one is called row-N."""
    variants_key: str | None = None
    """Key of a list of other spellings of the answer; U is then the logsumexp over all of them."""
    choices_key: str | tuple[str, ...] | None = None
    """Key of a question's choices, shown with letters; the letter is the answer. A list of keys,
    one per choice, puts the right one first where answer_key has none or is the first; they are
    then shuffled. An empty text leaves choices out."""
    choices_answer: Literal["auto", "letter", "index", "index_from_1", "text"] = "auto"
    """What answer_key holds. `auto`: a letter, the text of a choice, or an index from 0. With
    `auto` a row without choices has a free answer; else it is dropped, or an error (bad_answer)."""
    choices_seed: NonNegativeInt | None = None
    """Shuffle the choices of each question by this seed and its id; null: the published order."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt of either view, in tokens."""
    overlong: Literal["drop", "error"] = "drop"
    """What to do with a prompt above the limit. It is never cut."""
    bad_answer: Literal["drop", "error"] = "drop"
    """What to do with an unusable reference answer: empty, a worked solution without a final
    answer, or not accepted as itself by verify.name."""
    limit: PositiveInt | None = None
    """Read at most this many rows of each file; null: all."""
    dropped_file: PathText | None = None
    """Write every dropped row to this file, as JSON lines: place, reason, id, answer."""

    def __post_init__(self) -> None:
        weighted = [file.weight is not None for file in self.train]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"data.train: {weighted.count(False)} of {len(self.train)} files have no weight; "
                "give every file one, or none (then questions come by the size of the files)"
            )
        names = [file.label for file in self.train]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"data.train names two files {twice!r}; give one another `name`")

    def filled(self, file: DataFile) -> DataFile:
        """`file` with what it leaves open taken from this section."""
        mine = {
            k: getattr(self, k) for k, v in vars(file).items() if v is None and hasattr(self, k)
        }
        return dataclasses.replace(file, **mine)

    @property
    def weights(self) -> dict[str, float] | None:
        """The weight of each file by its name; None: questions come by the size of the files."""
        weights = {file.label: file.weight for file in self.train if file.weight is not None}
        return weights if len(weights) > 1 else None


@dataclass(frozen=True, config=STRICT)
class PromptConfig:
    student: str = STUDENT_TEMPLATE
    """Template of the student's prompt. `{question}` is its only field, so the student never sees
    the answer."""
    teacher: str = TEACHER_TEMPLATE
    """Template of the teacher's prompt, with the fields `{question}` and `{answer}`."""
    teacher_role: Literal["user", "system"] = "user"
    """Where the teacher's words beyond the student prompt go. R1 models advise against a system
    prompt."""
    think_open: str = "<think>"
    """Token that opens a thought."""
    think_close: str = "</think>"
    """Token that closes a thought."""
    think_prefix: str = "<think>\n"
    """Text that both views must end with; appended where the chat template does not end so."""
    answer_cue: str = "\n\n**Final Answer**\n\\boxed"
    """Text between the closed thought and the scored answer."""
    answer_target: str = "{{answer}}"
    """Spelling of the reference answer after the cue; by default `{4}` for the answer 4.
    `{question}` and `{answer}` are the only fields; every other brace is itself."""
    chat_template_kwargs: Annotated[dict[str, JsonValue], AfterValidator(_finite)] = Field(
        default_factory=dict
    )
    """Switches of the model's chat template, for both views, e.g. {enable_thinking: true}."""


@dataclass(frozen=True, config=STRICT)
class RolloutConfig:
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
    max_batch: PositiveInt = 256
    """Paths decoded side by side, per process."""
    probe_every: NonNegativeInt = 1
    """Check that the engine took over the weights: a few tokens' log-probs, engine against trainer.
    It happens after the first hand-over, then every this many steps (0: only the first)."""
    probe_tolerance: PositiveFloat | None = None
    """Largest allowed mean |difference| of those log-probs; null: 1e-4 in float32, 0.05 in
    bfloat16."""
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
    process: Literal["shared", "own"] = "shared"
    """`shared`: vLLM inside each training process. `own`: in a child process of it."""
    server: str | None = None
    """URL of a `vllm serve` that samples instead, e.g. http://127.0.0.1:8000. Its key is read from
    the environment variable VLLM_API_KEY."""
    tensor_parallel: PositiveInt = 1
    """Training processes of a node that share one engine (`process: shared`). It must divide their
    number and the model's attention heads."""
    gpu_memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Share of the whole GPU for vLLM's weights, work and KV cache, free when vLLM starts. Asleep,
    vLLM keeps its CUDA graphs only. `--dry-run` says what fits."""
    kv_cache_gib: Gibibytes | None = None
    """Size of the KV cache; null: what gpu_memory leaves, on a CPU 1."""
    context: PositiveInt | None = None
    """Longest path in tokens, prompt included; null: what data, rollout and eval can need."""
    enforce_eager: bool = False
    """Use no CUDA graphs and no torch.compile. Always so on a CPU."""
    fp32_head: bool = False
    """Compute logits from a float32 product with the head, as the trainer does (bfloat16
    models)."""
    timeout_s: Seconds = 1800.0
    """Give up a path that takes longer; its question then has no gradient in this step. A server's
    time includes its queue. Not with tensor_parallel, whose processes must stop alike."""
    sync: Literal["auto", "disk", "nccl"] = "auto"
    """How a server gets weights: safetensors in sync_dir (`disk`), or NCCL; `auto` is `disk`."""
    sync_dir: PathText | None = None
    """Directory through which weights pass as files; a server must see it too. Null: sync/ in
    run.dir."""
    trust_remote_code: bool = False
    """Let vLLM run the Python code that a model directory brings."""


EngineConfig = Annotated[HfEngineConfig | VllmEngineConfig, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class VerifyConfig:
    """Who judges answers, in training and evaluation alike."""

    name: Literal["math", "text", "number", "letter", "custom"] = "math"
    """The checker. `math`: math-verify. `number`: equal as exact rationals. `text`: the same words,
    case and spaces aside. `letter`: the same choice, A to J. `custom`: target."""
    target: str | None = None
    """`package.module:function` of (gold, text) that returns True or False; `custom` only. It is
    found as modules are, or in the working directory, and must accept `\\boxed{gold}`."""
    workers: PositiveInt = 1
    """Processes that judge, per process of the run."""
    timeout_s: Seconds = 5.0
    """End a judgement that takes longer, and count its answer as wrong."""

    def __post_init__(self) -> None:
        if (self.name == "custom") != (self.target is not None):
            raise ValueError(
                f"verify.name is {self.name!r} and verify.target {self.target!r}: a target belongs "
                "to name custom, and custom needs one; set both or neither"
            )
        if self.target is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.target):
            raise ValueError(f"verify.target is {self.target!r}; expected package.module:function")


@dataclass(frozen=True, config=STRICT)
class ScoringConfig:
    u_norm: Literal["sum", "mean"] = "sum"
    """Sum or mean of the answer's token log-probs. The advantages are the same up to eps."""
    u_source: Literal["likelihood", "accuracy"] = "likelihood"
    """`likelihood`: U = log P(answer given question and path). `accuracy`: U = log((J acc + 1/2) /
    (J + 1)) of J answers sampled after the thought."""
    answer_samples: PositiveInt = 8
    """J, the answers sampled after each thought (`accuracy` only)."""
    answer_temperature: Temperature = 0.7
    """Sampling temperature of those answers."""


@dataclass(frozen=True, config=STRICT)
class VpgeaConfig:
    """VPG-EA (arXiv 2605.11019). `preset` fills every key that is not given; the paper leaves most
    of them open."""

    name: Literal["vpgea"] = "vpgea"
    """VPG-EA: policy gradient for the teacher's view, gated distillation for the student's."""
    preset: Literal["paper", "robust"] = "paper"
    """Defaults of the keys that are not given. `paper`: the formulas literally. `robust`:
    log-mean-exp baseline, mixed reward, clamped U, clipped eta, and a gate on groups without
    spread."""
    group_size: Annotated[int, Field(ge=2, lt=2**31)] = 8
    """G, posterior paths per question; the z-score needs two."""
    prior_samples: PositiveInt = 8
    """N, prior paths per question. They define the baseline utility and the base length."""
    alpha: Exponent = 0.5
    """Exponent of the length factor eta = (base length / length)^alpha; 0 turns it off."""
    beta: NonNegativeFloat = 0.5
    """Weight of the distillation loss against the policy gradient."""
    gate: Literal["indicator", "relu"] = "indicator"
    """Weight of a distilled path. `indicator`: 1 for a positive advantage A, else 0. `relu`: max(0,
    A)."""
    reward: Literal["paper", "likelihood_gate", "likelihood_mix"] = "paper"
    """R of a path. `paper`: max(0, U - baseline + r_margin). `likelihood_gate`: 1 where P > 0.5.
    `likelihood_mix`: that times 1 + max(0, U - baseline)."""
    baseline: Literal["mean", "lme"] = "mean"
    """Baseline of U over the prior paths. `mean`: mean U. `lme`: log of the mean likelihood, which
    one terrible path cannot pull down."""
    r_margin: NonNegativeFloat = 0.0
    """Margin of the reward `paper`, in nats."""
    clamp_u: bool = False
    """Also lift every finite U below u_min to u_min."""
    u_min: Annotated[float, Field(lt=0.0, ge=-1e6)] = -20.0
    """Value for a U that is not finite, in nats."""
    eta_clip: Clip | None = None
    """Clip eta to (low, high); null: no clip."""
    eps: PositiveFloat = 1e-6
    """Added to the standard deviation of the z-score."""
    ddof: Annotated[int, Field(ge=0, le=1)] = 0
    """0: divide the variance of the group by G; 1: by G - 1."""
    std_gate: NonNegativeFloat = 0.0
    """Give no gradient to groups whose utility has a smaller standard deviation than this (0:
    never)."""
    verify: Literal["none", "gate"] = "none"
    """`gate`: accept a posterior path only if the answer sampled after it verifies (needs
    rollout.full_answer)."""
    leak_guard: Literal["none"] = "none"
    """The counterfactual guard of `robust` is not built yet; the run says so."""

    def __post_init__(self) -> None:
        self.group_options()  # refuses keys that do not go together

    def group_options(self) -> GroupOptions:
        """What the utility takes of these keys: each field of `GroupOptions` is a key here."""
        names = [field.name for field in dataclasses.fields(GroupOptions)]
        return GroupOptions(**{name: getattr(self, name) for name in names})

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
    """GRPO: policy gradient in the student's view, with group-normalised rewards."""
    group_size: Annotated[int, Field(ge=2, lt=2**31)] = 8
    """Paths per question; the z-score needs two."""
    alpha: Exponent = 0.0
    """0 is plain GRPO. Above 0, a correct path earns the length factor against its group's mean
    length."""
    reward: Literal["verify", "likelihood"] = "verify"
    """`verify`: the sampled answer verifies (needs rollout.full_answer). `likelihood`: P(answer
    given path) > 0.5."""
    eta_clip: Clip | None = None
    """Clip the length factor to (low, high); null: no clip."""
    eps: PositiveFloat = 1e-6
    """Added to the standard deviation of the z-score."""
    ddof: Annotated[int, Field(ge=0, le=1)] = 0
    """0: divide the variance of the group by G; 1: by G - 1."""
    std_gate: NonNegativeFloat = 0.0
    """Give no gradient to groups whose reward has a smaller standard deviation than this (0:
    never)."""

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
    """What computes the language-model head and its loss. `reference`: full logits. `torch`: chunks
    of rows. `triton`, `cublas`: CUDA kernels. `auto` chooses by device and dtype; `vpgea doctor`
    says what runs here."""


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    name: Literal["adamw", "adamw_bf16", "adamw_8bit"] = "adamw"
    """AdamW, with its moments in float32, in bfloat16 rounded stochastically, or in 8 bits
    (torchao, an extra)."""
    stochastic_rounding: bool = False
    """Round bfloat16 weights up or down with the probability that keeps the mean exact."""
    lr: PositiveFloat = 1e-6
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate after the warm-up, over train.steps; `linear` and `cosine` end at zero."""
    warmup_steps: NonNegativeInt = 10
    """Steps over which the rate rises linearly to lr."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay of AdamW's two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Clip the norm of the whole gradient to this."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    steps: PositiveInt = 200
    """Steps of the run: one rollout batch and at most one update each."""
    questions_per_step: PositiveInt = 64
    """Questions per step, over all processes."""
    norm: Literal["seq_sum", "const", "seq_mean", "token_mean"] = "const"
    """What a path's weight is divided by, besides the number of paths. `const`: norm_constant.
    `seq_sum`: nothing. `seq_mean`: its length. `token_mean`: tokens of the whole stream instead."""
    norm_constant: PositiveFloat | None = None
    """C of `const`; null: rollout.max_new_tokens / 4."""
    denominator: Literal["nominal", "effective"] = "nominal"
    """Divide by all questions of the step (`nominal`), or by those that have a gradient
    (`effective`)."""
    distill_denominator: Literal["same", "gated"] = "same"
    """`token_mean` only: divide distilled rows by the sampled stream's tokens (`same`), or by their
    own (`gated`)."""
    resample_rounds: NonNegativeInt = 0
    """Replace questions without a gradient, at most this many times per step (0: never). Dynamic
    sampling of DAPO, arXiv 2503.14476."""
    micro_batch_tokens: PositiveInt = 16384
    """Packed tokens per forward; at least the longest row that may come."""
    idle_alarm: PositiveInt = 5
    """Raise an alarm after this many steps in a row without an update."""
    idle_stop: PositiveInt | None = 25
    """After this many steps in a row without an update, save, evaluate, export and end with status
    3; null: never."""
    mismatch_stop: Annotated[float, Field(gt=1.0, le=1e12)] | None = 2.0
    """End in the same way when mismatch_mean (mean exp|log p_engine - log p_trainer|, 1 where they
    agree) exceeds this; null: never."""
    mismatch_steps: PositiveInt = 3
    """Measured steps in a row above train.mismatch_stop that end the run."""


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    save_every: PositiveInt = 20
    """Steps between two checkpoints."""
    save_minutes: Minutes | None = None
    """Also save when this many minutes have passed since the last save."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: Literal["sampled_eps3", "sampled_acc", "greedy_eps3", "greedy_acc"] | None = None
    """Also keep the checkpoint with the best evaluation by this measure. Then every evaluated step
    is saved; needs eval.data and eval.every."""
    background: bool = False
    """Copy the state to host memory, train on, and write from a thread."""
    export: bool = True
    """Write export/ (a Hugging Face directory) when the run ends."""


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    data: Files = ()
    """Files as in data.train, one per benchmark; empty: no evaluation."""
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0: only before and after."""
    samples: NonNegativeInt = 1
    """Sampled answers per question; 0: greedy only."""
    greedy: bool = True
    """Also answer every question once without sampling."""
    temperature: Temperature = 0.6
    """Temperature of the sampled answers."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Nucleus of the sampled answers."""
    max_new_tokens: PositiveInt = 32768
    """Token limit of a thought. A cut thought counts as wrong."""
    limit: PositiveInt | None = None
    """Read at most this many rows of each file; null: all."""
    seed: Seed = 0
    """Seed of the sampled answers and of the bootstrap interval."""

    def __post_init__(self) -> None:
        weighted = next((file.path for file in self.data if file.weight is not None), None)
        if weighted is not None:
            raise ValueError(f"eval.data: {weighted} has a weight, which is for data.train")


@dataclass(frozen=True, config=STRICT)
class MetricsConfig:
    diag_every: NonNegativeInt = 10
    """Steps between the costly diagnostics, such as the KL of the two views on whole paths (0:
    never)."""
    paths_per_step: NonNegativeInt = 16
    """Sampled paths of each stream that a step writes to paths.jsonl."""
    compare: PathText | None = None
    """Committed rows, shown beside the run's own in the closing table and the report. A JSON file,
    or `tiny_demo`: the rows that come with the configuration `tiny`."""
    note: str = ""
    """A line printed under the closing table."""


@dataclass(frozen=True, config=STRICT)
class Config:
    run: RunConfig = Field(default_factory=RunConfig)
    """Directory, seed and time limit of the run."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model and how its forward computes."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model lies on the processes that torchrun starts; one process needs none of it."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Training questions and how to read them."""
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    """The two views of a question."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Sampling of the paths."""
    engine: EngineConfig = Field(default_factory=HfEngineConfig)
    """What draws the paths. `name` chooses between two sets of keys: `hf` and `vllm`."""
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    """Who judges answers, in training and evaluation alike."""
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    """How U, the worth of a path, is measured."""
    objective: ObjectiveConfig = Field(default_factory=VpgeaConfig)
    """Coefficients of the paths. `name` chooses between two sets of keys: `vpgea` and `grpo`."""
    loss: LossConfig = Field(default_factory=LossConfig)
    """Backend of the fused losses."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimiser and learning rate."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Steps, normalisation, and when a run ends itself."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving, keeping and exporting."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation of the student view, before, during and after training."""
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    """Diagnostics, paths.jsonl and the report."""

    @property
    def colocated(self) -> bool:
        """vLLM samples on the devices of the training processes, not at a server."""
        return isinstance(self.engine, VllmEngineConfig) and self.engine.server is None

    @property
    def vllm(self) -> VllmEngineConfig:
        """The engine where it is vLLM; ValueError for a reader that has not asked."""
        if isinstance(self.engine, VllmEngineConfig):
            return self.engine
        raise ValueError(f"engine.name: got {self.engine.name!r}, expected 'vllm'; set it")

    def __post_init__(self) -> None:
        target = self.data.dropped_file
        files = [file.path for file in (*self.data.train, *self.eval.data)]
        if target is not None and Path(target).resolve() in [Path(f).resolve() for f in files]:
            raise ValueError(
                f"data.dropped_file is {target!r}, which questions are read from; give a file of "
                "its own: it is written anew"
            )
        if self.objective.verifies_answers and not self.rollout.full_answer:
            raise ValueError(
                f"objective {self.objective.name!r} verifies sampled answers, but "
                "rollout.full_answer is false; set it to true or choose another reward"
            )
        if self.engine.name == "vllm" and self.rollout.top_p < 1:
            raise ValueError(
                f"rollout.top_p is {self.rollout.top_p}, but vLLM gives log-probs of the cut "
                "distribution then, and the gradient assumes paths of the whole one; set it to 1.0 "
                "(an evaluation may cut: eval.top_p)"
            )
        self._check_keep_best()
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

    def _check_keep_best(self) -> None:
        best = self.checkpoint.keep_best
        if best is None:
            return
        drawn = self.eval.greedy if best.startswith("greedy") else self.eval.samples
        wanting = {"eval.data": self.eval.data, "eval.every": self.eval.every}
        wanting["eval.greedy or eval.samples"] = drawn
        lacks = next((key for key, value in wanting.items() if not value), None)
        if lacks is not None:
            raise ValueError(
                f"checkpoint.keep_best {best!r} chooses by an evaluation while training, and "
                f"{lacks} asks for none; set it, or checkpoint.keep_best null"
            )


VARIANTS = {"objective": "vpgea", "engine": "hf"}
"""Sections whose `name` chooses what other keys they have, with the name that is the default."""

RENAMED = {"rollout.engine": "engine.name", "vllm": "engine"}
"""Key or section of an older version -> what it is now."""


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    *,
    record: bool = False,
) -> Config:
    """The configuration of a YAML file with `--section.key value` (or `--section.key=value`) laid
    over it. `say` hears which of the file's keys another objective or engine leaves out.

    `load("configs/tiny.yaml", ["--run.dir", "runs/b", "--optim.lr=1e-5"])` is what `vpgea train`
    makes of the same words. `record`: the file is a run's own, so keys of an older version are read
    as what they are now. Errors: ConfigError, which names the key and the nearest known one.
    """
    tree, top = _by_name(read_sections(path)), parse_overrides(overrides, say)
    if record:
        tree = renewed(tree, say=lambda text: say(f"{path}: {text}"))
    lost = {section: _foreign(section, tree, top) for section in VARIANTS}
    tree = {**tree, **{section: {} for section, keys in lost.items() if keys}}
    cfg = resolve(_merge(tree, top), source=str(path))
    for section, keys in lost.items():
        if keys:
            name, left = getattr(cfg, section).name, ", ".join(f"{section}.{key}" for key in keys)
            say(f"{path}: {section}.name {name!r} leaves out the file's {left}")
    return cfg


def renewed(tree: Mapping[str, Any], say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The sections of a run's record with keys of an older version under their new names. Keys of
    a variant that was not chosen are left out: nothing read them. `say` hears of both."""
    moved = {old: _new_name(old) for old in _old_keys(tree) if "." in old}
    if not moved:
        return dict(tree)
    values: dict[str, Any] = {}
    done: dict[str, Any] = {}
    for section, keys in tree.items():
        if isinstance(keys, Mapping):
            values |= {
                moved[old]: keys[old.partition(".")[2]] for old in moved if _in(old, section)
            }
            keys = {k: v for k, v in keys.items() if f"{section}.{k}" not in moved}
        if section not in RENAMED:
            done[section] = keys
    # Which variant it was is itself among the values that move.
    chosen = {section: values.get(f"{section}.name", name) for section, name in VARIANTS.items()}
    kept, left = [], []
    for old, new in moved.items():
        section, _, key = new.partition(".")
        kinds = [k for k in _records(section) if chosen.get(section) in (None, k.name)]
        if any(key in _hints(kind) for kind in kinds):
            done.setdefault(section, {})[key] = values[new]
            kept.append(f"{old} as {new}")
        else:
            left.append(old)
    said = f"; left out {', '.join(left)}, which nothing read" if left else ""
    say(f"written by an older version: read {', '.join(kept)}{said}")
    return done


def _in(key: str, section: str) -> bool:
    return key.partition(".")[0] == section


def _old_keys(tree: Mapping[str, Any]) -> list[str]:
    """`section.key` of an older version; a section that is empty, or no mapping, by its name."""
    found: list[str] = []
    for section, keys in tree.items():
        whole = section in RENAMED
        if isinstance(keys, Mapping) and keys:
            names = [f"{section}.{key}" for key in keys]
            found += [name for name in names if whole or name in RENAMED]
        elif whole:
            found.append(section)
    return found


def _new_name(old: str) -> str:
    section, _, key = old.partition(".")
    return RENAMED.get(old) or f"{RENAMED[section]}.{key}"


def _refuse_old(tree: Mapping[str, Any], source: str) -> None:
    """ConfigError for keys of an older version, with their new names."""
    lines = [f"  {old}: is now {_new_name(old)}; write that" for old in _old_keys(tree)]
    if lines:
        raise ConfigError(f"{source}:\n" + "\n".join(lines))


def _by_name(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A variant that is given as text by what the text names: `engine: vllm`."""
    return {
        section: {"name": keys} if section in VARIANTS and isinstance(keys, str) else keys
        for section, keys in tree.items()
    }


def find(word: str, folder: Path = SHIPPED, suffix: str = ".yaml") -> str:
    """The file of a path, else the shipped file of that name: `tiny` is configs/tiny.yaml, wherever
    the project is installed. A word that is neither comes back as it is."""
    known = {file.stem: str(file) for file in folder.glob(f"*{suffix}")}
    taken = Path(word).exists() and not Path(word).is_dir()
    return word if taken else known.get(word, word)


def read_sections(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file, as they stand there. ConfigError with the file and its line."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)  # one byte too many tells, without reading the rest
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file "
            f"or one of the names {names}"
        ) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: more than {MAX_BYTES} bytes; expected a configuration in YAML")
    try:
        tree = strict_yaml.parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise ConfigError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as "
            "UTF-8"
        ) from error
    except strict_yaml.YamlError as error:
        raise ConfigError(f"{path}, line {error.line}: {error}") from error
    if not isinstance(tree, dict):
        got = "an empty file" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(
            f"{path}: got {got}, expected sections (run:, model:, ...); for the defaults write one "
            "key, e.g. run: {seed: 0}"
        )
    return tree


def resolve(tree: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate a tree of sections, of values that JSON has; presets fill the keys of their
    objective that the tree leaves open. A single value is a list of one where a list is wanted.

    It makes a Config in Python; what the tree leaves out has its default. The records are frozen:
    `dataclasses.replace` makes another one, validated anew. Errors: ConfigError.

    >>> cfg = resolve({"model": {"path": "base"}, "data": {"train": "questions.jsonl"}})
    >>> cfg.model.path, cfg.data.train[0].path, cfg.objective.name
    ('base', 'questions.jsonl', 'vpgea')
    >>> dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=10)).train.steps
    10
    """
    tree = _by_name(tree)
    _refuse_old(tree, source)
    try:
        text = json.dumps(_with_preset(_with_lists(tree)))
        return TypeAdapter(Config).validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n" + "\n".join(_explain(error.errors()))) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: expected what YAML can hold, got {error}") from error


def dump(config: Config) -> str:
    """YAML of every key, which `load` reads as the same configuration."""
    return strict_yaml.dump(as_dict(config))


def as_dict(config: Config) -> dict[str, Any]:
    """Sections of keys, of values that JSON has; `resolve` makes the same configuration of it."""
    return TypeAdapter(Config).dump_python(config, mode="json")


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (old value, new value) of every key that differs, run.dir aside; of another
    variant the keys that both have."""
    a, b = as_dict(old), as_dict(new)
    keys = [
        (section, key)
        for section in b
        for key in {**a[section], **b[section]}
        if section not in VARIANTS or {key in a[section], key in b[section]} == {True}
    ]
    pairs = {f"{s}.{k}": (a[s].get(k), b[s].get(k)) for s, k in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key != "run.dir"}


def parse_overrides(
    words: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`["--optim.lr", "1e-5", "--run.seed=3"]` -> `{"optim": {"lr": 1e-5}, "run": {"seed": 3}}`;
    `--engine vllm` is short for `--engine.name vllm`, as of any variant.

    Text fields take their value as it stands; others read it as YAML. `null` unsets either. The
    last of two values is taken (a launcher adds to a command line), and `say` hears of it.
    """
    tree: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        section, dot, name = key.removeprefix("--").partition(".")
        if section in VARIANTS and not dot:
            dot, name = ".", "name"
        if not key.startswith("--") or not dot:
            raise ConfigError(f"expected --section.key value, got {word!r}")
        if not equals:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise ConfigError(
                    f"expected --section.key value, got {key} and no value; write {key}=VALUE for "
                    "a value that starts with --"
                )
        keys, new = tree.setdefault(section, {}), _parse(section, name, value)
        if name in keys and keys[name] != new:
            old = _show(keys[name])
            say(f"--{section}.{name} stands twice: {_show(new)} is taken, and {old} left out")
        keys[name] = new
    return tree


def _parse(section: str, name: str, word: str) -> Any:
    """A word as its field takes it. Where text is one choice among others, a word that opens a list
    or a mapping is one; a `#`, a colon or a number means nothing in text."""
    types = [t for record in _records(section) for t in _members(_hints(record).get(name))]
    types += [t for kind in types for t in _members(_item(kind))]
    structured = any(kind not in (str, type(None)) for kind in types)
    takes_text = str in types or any(_hints(kind) for kind in types)  # a record's first key
    opens = word.lstrip()[:1] in ("[", "{")
    if strict_yaml.LONE.search(word):
        raise ConfigError(f"--{section}.{name}: got {word!r}, expected UTF-8")
    if word in strict_yaml.NULL and word:
        return None
    if not types or (takes_text and not (structured and opens)):
        return word
    if not word.strip():
        raise ConfigError(f"--{section}.{name}: got an empty word; write null to unset the key")
    try:
        return strict_yaml.parse_word(word)
    except strict_yaml.YamlError as error:
        raise ConfigError(f"--{section}.{name}: got {word[:80]!r}: {error}") from error


def _hints(record: Any) -> dict[str, Any]:
    return get_type_hints(record) if dataclasses.is_dataclass(record) else {}


def _members(hint: Any) -> list[Any]:
    """The types of a union, or the one type; none for None, which is no type."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _members(part)]
    return [] if hint is None else [hint]


def _item(hint: Any) -> Any:
    """What a list of any length holds; None for other types."""
    args = get_args(hint)
    return args[0] if get_origin(hint) is tuple and args[1:] == (...,) else None


def known_keys() -> list[str]:
    """Every `section.key`, of all variants."""
    return list(
        dict.fromkeys(
            f"{s}.{key}" for s in _hints(Config) for r in _records(s) for key in _hints(r)
        )
    )


def _records(section: str) -> list[Any]:
    return [kind for kind in _members(_hints(Config).get(section)) if _hints(kind)]


def _foreign(section: str, tree: Mapping[str, Any], top: Mapping[str, Any]) -> list[str]:
    """Keys of the file's variant, where the command line names another one."""
    base, name = tree.get(section), top.get(section, {}).get("name")
    if not isinstance(base, dict) or name is None or name == base.get("name", VARIANTS[section]):
        return []
    return [key for key in base if key != "name"]


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `top` over those of `base`, section by section. What is no section stays: it is
    refused with the rest."""
    merged = dict(base)
    for section, keys in top.items():
        below = merged.get(section, {})
        merged[section] = {**below, **keys} if isinstance(below, Mapping) else below
    return merged


def _with_lists(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A single value as a list of one where only a list is wanted; where that is of records, text
    is the first key of one. Here, because a validator of pydantic's would end the strict reading of
    JSON."""

    def wrapped(hint: Any, value: Any) -> Any:
        item = _item(hint)
        if item is None or value is None:
            return value
        values = value if isinstance(value, (list, tuple)) else [value]
        first = next(iter(_hints(item)), None)
        return [{first: v} if first and isinstance(v, str) else v for v in values]

    done = dict(tree)
    for section, keys in tree.items():
        for record in _records(section) if isinstance(keys, Mapping) else []:
            hints = _hints(record)
            done[section] = {k: wrapped(hints.get(k), v) for k, v in done[section].items()}
    return done


def _with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Variants with their name, and an objective with the keys of its preset."""
    tree = dict(tree)
    for section, name in VARIANTS.items():
        keys = tree.get(section, {})
        tree[section] = {"name": name, **keys} if isinstance(keys, Mapping) else keys
    objective = tree["objective"]
    if not isinstance(objective, Mapping):
        return tree
    preset = str(objective.get("preset", "paper")) if objective["name"] == "vpgea" else ""
    return {**tree, "objective": {**VPGEA_PRESETS.get(preset, {}), **objective}}


EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (in quotes)",
    "tuple_type": "a list, [a, b]",
    "too_short": "{min_length} entries or more",
    "too_long": "{max_length} entries",
    "dict_type": "keys and values",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
}
"""What was expected, by pydantic's type of an error."""


def _explain(errors: Iterable[Any]) -> list[str]:
    """A line for each key: what was got, what was expected, and the nearest key or value.

    Of a union pydantic gives an error a member: their expectations stand in one line, and where one
    member fits but for a key of it, that key alone counts.
    """
    found: dict[str, list[tuple[Any, list[Any]]]] = {}
    for error in errors:
        key, owners = _place(error)
        found.setdefault(key, []).append((error, owners))
    return [
        f"  {key or 'configuration'}: {_complaint(key, group)}"
        for key, group in found.items()
        if not key or not any(other.startswith((f"{key}.", f"{key}[")) for other in found)
    ]


def _place(error: Any) -> tuple[str, list[Any]]:
    """The key of an error as the user writes it, and the records that the last part is a key of."""
    key, owners, kinds = "", [Config], [Config]
    loc = [*error["loc"], "name"] if error["type"].startswith("union_tag") else error["loc"]
    for place, part in enumerate(loc):
        hints = [_hints(kind)[part] for kind in kinds if part in _hints(kind)]
        unknown = error["type"] == "unexpected_keyword_argument" and place == len(loc) - 1
        if isinstance(part, int):
            key += f"[{part}]"
        elif hints or unknown:
            key, owners = f"{key}.{part}".lstrip("."), kinds
            kinds = [t for hint in hints for t in _members(hint)]
            kinds += [t for kind in kinds for t in _members(_item(kind))]
        else:  # the name of a union's member
            names = {kind: (getattr(kind, "name", None), _name(kind)) for kind in kinds}
            kinds = [kind for kind in kinds if part in names[kind]] or kinds
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        owners = [kind for kind in kinds if _hints(kind)]
    return key, owners


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", "")


def _complaint(key: str, group: Sequence[tuple[Any, list[Any]]]) -> str:
    (error, owners), kinds = group[0], {error["type"] for error, _ in group}
    if "unexpected_keyword_argument" in kinds:
        return f"unknown key; {_nearest_key(key, owners)}"
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        return "is missing; give it a value"
    value = error["input"]
    if error["type"] == "union_tag_invalid":
        value = value["name"]
    wanted = list(dict.fromkeys(_wanted(error, owners) for error, owners in group))
    remedy = f"; {REMEDIES[key]}" if key in REMEDIES else ""
    if None in wanted:
        own = error["msg"].removeprefix("Value error, ")
        got = "" if "got " in own or isinstance(value, Mapping) else f", got {_show(value)}"
        return f"{own}{got}{remedy}"
    expected = " or ".join(map(str, wanted))
    if isinstance(value, str) and (near := _near(value, re.findall(r"'([^']+)'", expected))):
        remedy = f"; did you mean {near!r}?{remedy}"
    if value is None:
        remedy = f"; leave the key out for its default{remedy}"
    if isinstance(value, float) and value.is_integer() and "int_type" in kinds:
        remedy = f"; write {int(value)}{remedy}"
    return f"got {_show(value)}, expected {expected}{remedy}"


def _wanted(error: Any, owners: Sequence[Any]) -> str | None:
    """What an error of pydantic's expected, in words; None where it brings its own message."""
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        keys = dict.fromkeys(name for owner in owners for name in _hints(owner))
        text = "text or " * isinstance(error["loc"][-1], int)
        return f"{text}keys ({', '.join(list(keys)[:4])}, ...)"
    if error["type"] == "missing":
        return "a value more"
    template, limits = EXPECTED.get(error["type"]), error.get("ctx", {})
    plain = {k: f"{v:g}" if isinstance(v, float) else v for k, v in limits.items()}
    return template and template.format(**plain)


def _nearest_key(key: str, owners: Sequence[Any]) -> str:
    """Of the same record, or the same name in another section."""
    first, *_, last = [*key.split("."), key.split(".")[-1]]
    others = [kind.name for kind in _records(first) if last in _hints(kind)]
    if first in VARIANTS and others:
        return f"it belongs to {first}.name {others[0]!r}: set that too"
    known = list(dict.fromkeys(name for owner in owners for name in _hints(owner)))
    if near := _near(last, known):
        return f"did you mean {near!r}?"
    for other in _hints(Config):
        if other != first and any(last in _hints(record) for record in _records(other)):
            return f"did you mean '{other}.{last}'?"
    return f"known keys: {', '.join(known)}"


def _near(word: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def _show(value: Any) -> str:
    """A value as YAML has it, cut."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""Sections of what goes in: the run, the model and its processes, the questions, the prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainSerializer
from pydantic.dataclasses import dataclass

from vpgea_fast.values import (
    STRICT,
    Minutes,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
    Switches,
)

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

# After the two prompts of arXiv 2509.22637, appendix E, in words of our own: PA teaches, PB finds
# the thoughts that led to a solution. There the solution begins the reply; here the turn holds it.
TEACHERS = {
    "explain": (
        "{question}\n\nA correct solution of this problem:\n\n{solution}\n\n"
        "Teach how it is found. Think the problem through in full, so that a reader of these "
        "thoughts alone could reach this solution: say why each step is taken, look at what may "
        "be doubted, and end where the solution ends. Then state it briefly. "
        r"Put the final answer within \boxed{}."
    ),
    "reconstruct": (
        "{question}\n\nIts correct solution:\n\n{solution}\n\n"
        "Reconstruct the reasoning between this question and its solution, as it would go in the "
        "mind of someone who does not have the solution yet. In the first person: look at the "
        "question, try, doubt, check, go back where it is needed, and arrive step by step. Never "
        r"say that a solution was given. Put the final answer within \boxed{}."
    ),
}
"""Templates of a teacher that is shown a whole solution, by name."""


def _named(template: str) -> str:
    return TEACHERS.get(template, template)


Teacher = Annotated[str, AfterValidator(_named)]
"""A template, or the name of one: a run's configuration keeps the text."""


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
    # Free text: which numbers exist is the machine's to say, when a run starts.
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that the optimiser updates (float64 for a float64 forward). bfloat16
    halves their memory and needs optim.stochastic_rounding: at a rate of 1e-6 a rounded update is
    lost."""
    # Memory against time: `full` runs nearly all of a layer's forward twice.
    activation_checkpointing: Literal["none", "selective", "full"] | None = None
    """What a layer keeps for its backward. `full`: its input, and the layer runs again.
    `selective`: also attention's output, queries, keys and values, and the gate of the MLP. `none`:
    everything. null: on CUDA `selective` where the estimated memory has room for it, else `full`
    (the run says which)."""
    compile: bool = False
    """Compile all decoder layers with torch.compile, as one graph; with the engine hf also the
    forward that draws a token. Half a minute at the start of a small run on a CPU."""
    liger: Literal["auto", "always", "never"] = "auto"
    """Use Liger's RMSNorm, RoPE and SwiGLU. `auto`: on CUDA when liger-kernel is installed."""
    reference: Literal["device", "disk"] = "device"
    """Where the frozen reference policy lies, if the objective reads one. `device`: beside the
    policy, in shards where that is. `disk`: read anew in every step, then dropped."""
    reference_path: PathText | None = None
    """The model that the reference policy is, of the shapes and the vocabulary of `path`. null:
    that of `path`, with which the run began, also after a resume."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Attention over packed documents. `flash`: flash-attn. `varlen`: torch's varlen_attn (CUDA).
    `sdpa`: one call per document, on any device. `auto`: the first of these that runs here."""

    @property
    def has_masters(self) -> bool:
        """Whether the forward's dtype is narrower than that of the weights that are updated."""
        return self.dtype == "bfloat16" and self.master_dtype == "float32"


@dataclass(frozen=True, config=STRICT)
class PosteriorConfig:
    """The second policy of an objective that has one: `vr` with `share_params false`."""

    path: PathText | None = None
    """The model that the posterior policy begins from, of the shapes and the vocabulary of
    model.path. null: that of model.path. Dtype and placement are those of the section model."""
    lr: PositiveFloat | None = None
    """Its learning rate after the warm-up; null: optim.lr. The rest is that of the section
    optim."""


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """How the model lies on the processes that torchrun starts; one process needs none of it."""

    shard: Literal["auto", "always", "never"] = "auto"
    """Shard the model with FSDP2. `auto`: with more than one process. One device has the whole
    weights in model.dtype, so no forward copies one, and float32 masters beside them."""
    # Between nodes a gather of every layer is slow; replicas exchange gradients alone, once a step.
    replicas: PositiveInt = 1
    """Number of HSDP replicas, each sharded over world_size / replicas processes. One replica per
    node keeps the gathers inside it."""
    accumulate: Literal["sharded", "unsharded"] | None = None
    """Gradients between micro-batches. `sharded`: reduced into shards each time. `unsharded`: kept
    whole on every process and reduced once, at 4 bytes per parameter. The head is always unsharded.
    null: on CUDA `unsharded` where the estimated memory has room for it, and with bfloat16 masters,
    else `sharded` (the run says which)."""
    tensor: Literal["none", "head"] = "none"
    """Cut over the processes instead of gathered. `head`: each process keeps its share of the
    vocabulary and its gradient, and computes them for the rows of all processes. It saves memory,
    not time."""
    cpu_offload: bool = False
    """Keep in host memory what the forward does not read. On one GPU: moments and float32 masters,
    updated in blocks; the weights stay on the GPU in model.dtype, and gradients in float32. On
    several, or with parallel.shard `always`: weights, gradients and optimiser states, between
    uses."""
    timeout_minutes: Minutes = 30.0
    """End the job when a collective waits longer than this. At 80 % of it every process writes its
    stacks to stderr."""

    def sharded(self, processes: int) -> bool:
        """Say whether FSDP2 cuts the model."""
        if self.shard != "auto":
            return self.shard == "always"
        # On one device FSDP2 would copy every weight for every micro-batch, twice.
        return processes > 1

    def hosted(self, processes: int) -> bool:
        """Say whether one device has the whole weights, and host memory the optimiser's states."""
        return self.cpu_offload and not self.sharded(processes)

    def in_parts(self, processes: int, *, cuda: bool) -> bool:
        """Say whether a model is read tensor by tensor to where it lies, and never whole into host
        memory: not all can be."""
        return self.sharded(processes) or self.cpu_offload or (cuda and self.shard == "auto")


BENCHMARK_KEYS = ("subject_key", "level_key", "samples", "student")
"""Keys of a file that only an evaluation reads."""


@dataclass(frozen=True, config=STRICT)
class DataFile:
    """One entry of data.train or eval.data: a path, or a mapping. A key that is not given is that
    of the section `data`; an empty text there means none."""

    path: PathText
    """A file (docs/data.md has the formats), a directory, or `hub:owner/name[/config][:split]`."""
    # These two stand in a file alone; the rest may stand in the section too.
    name: str | None = None
    """Name of the benchmark; also put before ids that two files share. Default: the file's name."""
    weight: PositiveFloat | None = None
    """Share of a step's questions, relative to the other files' weights (data.train only)."""
    # Instead of the keys of the section `data`, for files of another shape.
    question_key: str | None = None
    """For this file, instead of data.question_key."""
    answer_key: str | None = None
    """For this file, instead of data.answer_key."""
    id_key: str | None = None
    """For this file, instead of data.id_key."""
    variants_key: str | None = None
    """For this file, instead of data.variants_key."""
    response_key: str | None = None
    """For this file, instead of data.response_key."""
    solution_key: str | None = None
    """For this file, instead of data.solution_key."""
    choices_key: str | tuple[str, ...] | None = None
    """For this file, instead of data.choices_key."""
    choices_answer: Literal["auto", "letter", "index", "index_from_1", "text"] | None = None
    """For this file, instead of data.choices_answer."""
    choices_seed: NonNegativeInt | None = None
    """For this file, instead of data.choices_seed."""
    limit: PositiveInt | None = None
    """Read at most this many rows of the file; default: data.limit, in eval.data eval.limit."""
    # Of a benchmark alone.
    subject_key: str | None = None
    """Key of a question's subject, which records of an evaluation keep (eval.data only)."""
    level_key: str | None = None
    """Key of a question's difficulty, which records of an evaluation keep (eval.data only)."""
    samples: NonNegativeInt | None = None
    """For this benchmark, instead of eval.samples (eval.data only)."""
    student: str | None = None
    """For this benchmark, instead of prompt.student (eval.data only)."""

    @property
    def label(self) -> str:
        # What ids, weights and results are told apart by.
        return self.name or Path(self.path).stem


def _written(files: tuple[DataFile, ...]) -> Any:
    """Write files as `resolve` reads them, as short as possible: a path alone as text."""
    # In three passes: what is given, a path alone as text, and tuples as YAML's lists.
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
    # Where a row has its parts. Data sets name them as they like, and none is rewritten here.
    question_key: str = "question"
    """Key of the question's text, or of chat messages with one user turn. `{Body} {Question}` joins
    two keys."""
    answer_key: str = "answer"
    """Key of the final answer. Of a worked solution, the answer is what follows the last `####` or
    what its last \\boxed{} holds, and the run says so."""
    id_key: str = "id"
    """Key of the question's id; a row without one is called row-N."""
    variants_key: str | None = None
    """Key of a list of other spellings of the answer. U is then the logsumexp over all of them. An
    answer is right that `verify` takes for one of them, in training and in an evaluation."""
    response_key: str | None = None
    """Key of a worked solution or a whole response, or of a list of them, which the objective sft
    imitates. Text up to prompt.think_close is the thought. Without it all is thought, and the
    answer follows as prompt.answer_cue and answer_target spell it. `{think}</think>{solution}`
    joins two keys."""
    solution_key: str | None = None
    """Key of a worked solution, which prompt.teacher shows as `{solution}`."""
    choices_key: str | tuple[str, ...] | None = None
    """Key of a question's choices, shown with letters; the letter is the answer. A list of keys,
    one per choice, puts the right one first where answer_key has none or is the first; they are
    then shuffled. An empty text leaves choices out."""
    choices_answer: Literal["auto", "letter", "index", "index_from_1", "text"] = "auto"
    """What answer_key holds. `auto`: a letter, the text of a choice, or an index from 0. With
    `auto` a row without choices has a free answer; else it is dropped, or an error (bad_answer)."""
    choices_seed: NonNegativeInt | None = None
    """Shuffle the choices of each question by this seed and its id; null: the published order."""
    # Which rows are trained on; what is dropped is counted by its reason.
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
        for file in self.train:
            alone = next((key for key in BENCHMARK_KEYS if getattr(file, key) is not None), None)
            if alone is not None:
                raise ValueError(f"data.train: {file.path} has {alone}, which is for eval.data")
        # A file without a weight beside weighted ones could mean 1, none, or its size.
        weighted = [file.weight is not None for file in self.train]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"data.train: {weighted.count(False)} of {len(self.train)} files have no weight; "
                "give every file one, or none (then questions come by the size of the files)"
            )
        # A file's name tells its questions apart, in ids and in weights.
        names = [file.label for file in self.train]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"data.train names two files {twice!r}; give one another `name`")

    def filled(self, file: DataFile) -> DataFile:
        """Return `file` with what it leaves open taken from this section."""
        # Keys of the same name in both records; `name`, `weight` and `path` stand in a file alone.
        mine = {
            k: getattr(self, k) for k, v in vars(file).items() if v is None and hasattr(self, k)
        }
        return dataclasses.replace(file, **mine)

    @property
    def weights(self) -> dict[str, float] | None:
        """The weight of each file by its name; None: questions come by the size of the files."""
        # With one file every question is its own: a weight has nothing to be compared with.
        weights = {file.label: file.weight for file in self.train if file.weight is not None}
        return weights if len(weights) > 1 else None


@dataclass(frozen=True, config=STRICT)
class PromptConfig:
    student: str = STUDENT_TEMPLATE
    """Template of the student's prompt. `{question}` is its field, so the student never sees the
    answer. An objective may give each path more (`Draws.fields`)."""
    teacher: Teacher = TEACHER_TEMPLATE
    """Template of the teacher's prompt: `{question}`, `{answer}`, `{solution}` (data.solution_key),
    and an objective's fields. `explain` and `reconstruct` are names of two templates that show the
    solution, and become their text."""
    teacher_role: Literal["user", "system"] = "user"
    """Where the teacher's words beyond the student prompt go. R1 models advise against a system
    prompt."""
    # Where a thought begins and ends.
    think_open: str = "<think>"
    """Tag that opens a thought."""
    think_close: str = "</think>"
    """Tag that closes a thought. Where the model spells it with several tokens, a thought ends at
    the first token with which its text holds the tag."""
    think_prefix: str = "<think>\n"
    """Text that both views must end with; appended where the chat template does not end so."""
    # What U scores behind the thought: log P of the target's tokens, with the cue as context.
    answer_cue: str = "\n\n**Final Answer**\n\\boxed"
    """Text between the closed thought and the scored answer."""
    answer_target: str = "{{answer}}"
    """Spelling of the reference answer after the cue; by default `{4}` for the answer 4.
    `{question}` and `{answer}` are the only fields. Other braces are themselves, but a name in
    braces that nothing fills is refused."""
    answer_words: bool = True
    """Where a thought is searched for the answer (length reward `lc_r1`, leak guard
    `early_answer`): as whole words and numbers, so 7 is not in 17, 7.5 or -7. False: also inside
    others, where the data's digits stand side by side."""
    chat_template_kwargs: Switches = Field(default_factory=dict)
    """Switches of the model's chat template, for both views, e.g. {enable_thinking: true}."""

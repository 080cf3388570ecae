"""The arguments of `VPGEATrainer`: the Trainer's own, the method's by TRL's names, and all else
that this project can set, in its own sections.

    VPGEAConfig -> check_args -> sections -> Config, which every stage below the Trainer reads
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from vpgea_fast.config import Config, ConfigError, resolve

OWN = {
    "rollout": {
        "max_new_tokens": "max_completion_length",
        "max_answer_tokens": "max_answer_length",
        "temperature": "temperature",
        "top_p": "top_p",
        "max_batch": "generation_batch_size",
    },
    "objective": {
        "group_size": "num_generations",
        "prior_samples": "num_prior_generations",
        "alpha": "alpha",
        "beta": "beta",
    },
    "prompt": {"chat_template_kwargs": "chat_template_kwargs"},
    "eval": {"samples": "num_generations_eval"},
    "data": {"max_prompt_tokens": "max_prompt_length"},
}
"""Section -> its keys that have an argument of their own, and the name of that."""
FREE = ("rollout", "objective", "prompt", "eval", "data", "verify", "scoring", "loss")
"""Sections that `sections` may have; the others are about runs of `vpgea train`."""
UNREAD = {
    "data": ("train", "limit", "dropped_file"),
    "eval": ("data", "every", "records", "limit"),
    "rollout": ("importance_cap", "probe_every", "probe_tolerance"),
}
"""Keys about files, of which there are none, and about engines beside the model that is trained."""

REFUSED: dict[str, tuple[Any, str]] = {
    "use_vllm": (False, "the model that is trained samples; `vpgea train` has engine.name vllm"),
    "deepspeed": (None, "use DDP, or `vpgea train`, which shards by itself"),
    "torch_compile": (
        False,
        "compile the layers, each by its own .compile()",
    ),
    "use_liger_kernel": (False, "it replaces the forward that the loss is made in"),
    "neftune_noise_alpha": (None, "a path would be scored by another model than drew it"),
    "label_smoothing_factor": (0.0, "the loss has no labels to smooth"),
    "auto_find_batch_size": (False, "lower micro_batch_tokens, which no number hangs on"),
    "include_num_input_tokens_seen": ("no", "see tokens_generated and tokens_trained in the log"),
    "bf16_full_eval": (False, "an evaluation has the precision of the training"),
    "fp16_full_eval": (False, "an evaluation has the precision of the training"),
}
"""Arguments that cannot be served: the value that is, and what to do."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}  # what HfArgumentParser and TrlParser show


@dataclass
class VPGEAConfig(TrainingArguments):
    """Arguments of `VPGEATrainer`: those of `transformers.TrainingArguments`, and these.

    A step has per_device_train_batch_size x processes x gradient_accumulation_steps questions, each
    with num_generations and num_prior_generations paths. How many of these go through the model at
    once is micro_batch_tokens, and no number hangs on it.

    ValueError: an argument that cannot be served, a section or key that is unknown or not free.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        *("sections", "chat_template_kwargs", "model_init_kwargs"),
    ]

    # The Trainer's, with TRL's defaults.
    learning_rate: float = field(default=1e-6, metadata=_help("Learning rate after the warm-up."))
    logging_steps: float = field(
        default=10, metadata=_help("Steps between two logs; a share of all steps below 1.")
    )
    gradient_checkpointing: bool = field(
        default=True, metadata=_help("Run layers again in the backward, for memory.")
    )
    bf16: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata=_help("Autocast to bfloat16; unset: unless fp16 is set.")
    )
    remove_unused_columns: bool = field(
        default=False, metadata=_help("Columns stay: reward functions read them.")
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=_help(
            "Keyword arguments of from_pretrained, where the model is given by its name."
        ),
    )
    num_generations: int = field(
        default=8, metadata=_help("G, paths of a question from the teacher's prompt, 2 or more.")
    )
    num_prior_generations: int = field(
        default=8, metadata=_help("N, paths of a question from the student's prompt.")
    )
    num_generations_eval: int = field(
        default=1, metadata=_help("Sampled answers per question of an evaluation; 0: none.")
    )
    max_prompt_length: int = field(
        default=2048, metadata=_help("Tokens of the longest prompt; none is cut.")
    )
    max_completion_length: int = field(default=8192, metadata=_help("Token limit of a thought."))
    max_answer_length: int = field(
        default=1024, metadata=_help("Token limit of the answer behind a thought.")
    )
    generation_batch_size: int = field(
        default=256, metadata=_help("Paths decoded side by side, per process.")
    )
    temperature: float = field(
        default=1.0, metadata=_help("Sampling temperature of the paths; the loss uses it too.")
    )
    top_p: float = field(
        default=1.0,
        metadata=_help("Nucleus of the sampling; below 1 the gradient is another policy's."),
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Switches of the chat template, for both prompts.")
    )
    alpha: float = field(
        default=0.5, metadata=_help("Exponent of the length factor; 0 turns it off.")
    )
    beta: float = field(
        default=0.5, metadata=_help("Weight of the distillation against the policy gradient.")
    )
    micro_batch_tokens: int = field(default=16384, metadata=_help("Packed tokens per forward."))
    sections: dict[str, Any] | str | None = field(
        default=None,
        metadata=_help(
            "Keys of this project's configuration, by section: objective, prompt, rollout, "
            "scoring, verify, eval, data, loss; docs/configuration.md has them all."
        ),
    )
    use_vllm: bool = field(default=False, metadata=_help("Not served."))

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16  # pyright: ignore[reportIncompatibleVariableOverride]
        super().__post_init__()
        check_args(self)
        # For its errors; the trainer makes it again.
        as_config(self)


def check_args(args: VPGEAConfig) -> None:
    """Refuse what a Trainer may be asked for and this one cannot do. Errors: ValueError."""
    # With a default: not every transformers has all of them.
    for name, (served, remedy) in REFUSED.items():
        if (got := getattr(args, name, served)) != served:
            raise ValueError(f"{name}: got {got!r}, expected {served!r}; {remedy}")
    if args.fsdp:
        raise ValueError(f"fsdp: got {args.fsdp!r}, expected none; {REFUSED['deepspeed'][1]}")
    order = getattr(args, "train_sampling_strategy", "random")  # of a late transformers alone
    if order not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy: got {order!r}, expected 'random' or 'sequential'; the "
            "lengths of paths are not known beforehand"
        )
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "accelerator_config: got dispatch_batches true, expected false; questions are text"
        )


def as_config(args: VPGEAConfig) -> Config:
    """The configuration that the stages below the Trainer read. Errors: ConfigError."""
    tree: dict[str, dict[str, Any]] = {name: {} for name in FREE}
    for name, keys in _free(args).items():
        tree[name] |= keys
    for section, keys in OWN.items():
        for key, argument in keys.items():
            tree[section][key] = getattr(args, argument)
    tree["prompt"]["chat_template_kwargs"] = args.chat_template_kwargs or {}
    tree["objective"].setdefault("name", "vpgea")
    # By TRL's names, where no key says otherwise.
    tree["data"] = {"question_key": "prompt", **tree["data"]}
    tree["eval"] = {"max_new_tokens": args.max_completion_length, **tree["eval"]}
    tree["run"] = {"seed": args.seed}
    # Which questions a step has is the Trainer's to say.
    tree["train"] = {"micro_batch_tokens": args.micro_batch_tokens, "questions_per_step": 1}
    with in_arguments():
        return resolve(tree, "VPGEAConfig")


@contextmanager
def in_arguments() -> Iterator[None]:
    """Errors of the stages below with the names that their keys have here."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for section, keys in OWN.items():
            for key, argument in keys.items():
                text = text.replace(f"{section}.{key}", argument)
        # A record of several complaints stays one, each with its line.
        head, _, rest = text.partition(":\n  ")
        text = f"{head}: {rest}" if rest and "\n" not in rest else text
        raise (error if text == str(error) else type(error)(text)) from error


def _free(args: VPGEAConfig) -> Mapping[str, Mapping[str, Any]]:
    """`sections`, without a key that has another place. Errors: ConfigError."""
    given = args.sections or {}
    if not isinstance(given, Mapping) or not all(isinstance(x, Mapping) for x in given.values()):
        raise ConfigError(
            f"sections: got {given!r:.80}, expected sections of keys, as in {{'objective': "
            "{'preset': 'robust'}}"
        )
    for name, keys in given.items():
        # Of the rest the Trainer has its own: a second place would be read by nobody.
        if name not in FREE:
            raise ConfigError(
                f"sections: got {name!r}, expected some of {', '.join(FREE)}; the rest is the "
                "Trainer's, by its own arguments"
            )
        for key in keys:
            # Of two places for one number neither can win in silence.
            if argument := OWN.get(name, {}).get(key):
                raise ConfigError(
                    f"sections: got {name}.{key}, which is an argument; set {argument}"
                )
            # Taken, it would look as if it did something.
            if key in UNREAD.get(name, ()):
                raise ConfigError(
                    f"sections: got {name}.{key}, which a Trainer does not read; leave it out"
                )
    # The streams, the logs and `completions/*` are those of this method.
    if given.get("objective", {}).get("name", "vpgea") != "vpgea":
        raise ConfigError(
            f"sections: got objective.name {given['objective']['name']!r}, expected 'vpgea'; TRL "
            "has trainers of other methods, and `vpgea train` all of them"
        )
    return given

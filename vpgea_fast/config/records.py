"""Sections of the training, and `Config`: the record of all sections, with rules between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vpgea_fast.config.inputs import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PosteriorConfig,
    PromptConfig,
    RunConfig,
)
from vpgea_fast.config.method import (
    EngineConfig,
    HfEngineConfig,
    ReplayEngineConfig,
    RolloutConfig,
    ScoringConfig,
    VerifyConfig,
    VllmEngineConfig,
)
from vpgea_fast.config.outputs import CheckpointConfig, EvalConfig, MetricsConfig
from vpgea_fast.objectives import DEFAULT, ObjectiveConfig, Recording, scores_answers
from vpgea_fast.values import (
    STRICT,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


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
    # A pure function of the step: a resumed run needs no state of it.
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
    """Steps of the run: one rollout batch each, with one update per minibatch and epoch."""
    max_tokens: PositiveInt | None = None
    """End after the step in which the run's sampled tokens (tokens_generated) reach this, if
    train.steps are not over before; null: never. Needs optim.schedule constant."""
    questions_per_step: PositiveInt = 64
    """Questions per step, over all processes."""
    # Updates per rollout. More than one costs forwards: log-probs before each of them.
    minibatches: PositiveInt = 1
    """Split the questions of a step into this many shares, with an update each."""
    epochs: PositiveInt = 1
    """Go through the paths of a step this many times. Above 1, and with minibatches, an objective
    with clip_low and clip_high corrects for the policy that moves away from the paths. Supervised
    ones, and what VPG-EA distils, imitate a fixed sample as it is."""
    # Stages of a recipe with several models: each run is of one.
    record: Literal["paths", "weights"] | None = None
    """Train nothing, and write every path to paths.jsonl, for engine.name replay. `paths`: those
    that the objective draws, unscored. `weights`: also what they score and weigh. The last step of
    a pass over the questions has those that are left."""
    resample_rounds: NonNegativeInt = 0
    """Replace questions without a gradient, at most this many times per step (0: never). Dynamic
    sampling of DAPO, arXiv 2503.14476."""
    # Memory of a forward, and with it the number of gathers of a sharded model.
    micro_batch_tokens: PositiveInt = 16384
    """Packed tokens per forward that trains; at least the longest row that may come."""
    # Without a backward nothing is kept but one layer's tensors.
    score_tokens: PositiveInt | None = None
    """Packed tokens per forward without gradients; at least the longest row that may come. null:
    1, 2, 4 or 8 times train.micro_batch_tokens, the most that needs no more memory than training
    does (the run says how many)."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step to profile, e.g. [2, 4]. Their trace, of the main process, goes into the
    run's directory; its longest kernels and gaps are printed. Host memory holds every operation of
    these steps meanwhile. null: none."""
    # When a run that learns nothing, or something wrong, ends itself.
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

    def __post_init__(self) -> None:
        first, last = self.profile_steps or (1, 1)
        if not first <= last <= self.steps:
            raise ValueError(
                f"profile_steps: got [{first}, {last}], expected the first and the last of some of "
                f"the {self.steps} steps (train.steps)"
            )

    @property
    def updates(self) -> int:
        """Optimiser steps per rollout batch."""
        return self.minibatches * self.epochs


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
    """What draws the paths. `name` chooses the engine, and with it the other keys."""
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    """Who judges answers, in training and evaluation alike."""
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    """How U, the worth of a path, is measured."""
    objective: ObjectiveConfig = Field(default_factory=DEFAULT)
    """The method: what is drawn, and the weights of the paths. `name` chooses it, and with it the
    other keys."""
    loss: LossConfig = Field(default_factory=LossConfig)
    """Backend of the fused losses."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimiser and learning rate."""
    posterior: PosteriorConfig = Field(default_factory=PosteriorConfig)
    """The posterior policy, where the objective trains one beside the policy."""
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
        """Whether vLLM samples on the devices of the training processes, not at a server."""
        return isinstance(self.engine, VllmEngineConfig) and self.engine.server is None

    @property
    def samples_itself(self) -> bool:
        """Whether the trained module samples, or a copy beside a sharded one: all that is drawn
        (hf), or all but the paths (replay)."""
        return isinstance(self.engine, (HfEngineConfig, ReplayEngineConfig))

    @property
    def asked(self) -> Config:
        """The configuration as the stages of a run read it: where it only records, its objective
        trains nothing, and no weights are evaluated or exported."""
        if self.train.record is None:
            return self
        return replace(
            self,
            objective=Recording(self.objective, weighed=self.train.record == "weights"),
            eval=replace(self.eval, data=()),
            checkpoint=replace(self.checkpoint, keep_best=None, export=False),
        )

    @property
    def two_policies(self) -> bool:
        """Whether a posterior policy is trained beside the policy, with weights of its own."""
        return self.objective.draws().posterior_who == "posterior"

    @property
    def draws_paths(self) -> bool:
        """Whether a step samples its paths; responses of the data and recorded paths are read."""
        return not self.objective.draws().given and self.engine.name != "replay"

    @property
    def answers_behind(self) -> bool:
        """Whether answers are sampled behind finished thoughts, to score these."""
        scored = scores_answers(self.objective) and self.scoring.u_source == "accuracy"
        return scored or self.objective.draws().attempts

    @property
    def replay(self) -> ReplayEngineConfig:
        """The engine where it replays; ValueError for a reader that has not asked."""
        if isinstance(self.engine, ReplayEngineConfig):
            return self.engine
        raise ValueError(f"engine.name: got {self.engine.name!r}, expected 'replay'; set it")

    @property
    def processes_per_engine(self) -> int:
        """Number of training processes that share one engine: with vLLM here its tensor_parallel.

        hf has an engine on each process; a server's devices are its own.
        """
        return self.vllm.tensor_parallel if self.colocated else 1

    @property
    def vllm(self) -> VllmEngineConfig:
        """The engine where it is vLLM; ValueError for a reader that has not asked."""
        if isinstance(self.engine, VllmEngineConfig):
            return self.engine
        raise ValueError(f"engine.name: got {self.engine.name!r}, expected 'vllm'; set it")

    def __post_init__(self) -> None:
        # By resolved paths: data/../data/train.jsonl is the same file.
        target = self.data.dropped_file
        files = [file.path for file in (*self.data.train, *self.eval.data)]
        if target is not None and Path(target).resolve() in [Path(f).resolve() for f in files]:
            raise ValueError(
                f"data.dropped_file is {target!r}, which questions are read from; give a file of "
                "its own: it is written anew"
            )
        parts, questions = self.train.minibatches, self.train.questions_per_step
        # An update without a question would be counted, logged and change nothing.
        if parts > questions:
            raise ValueError(
                f"train.minibatches is {parts}, but a step has {questions} questions "
                "(train.questions_per_step); expected at most that many"
            )
        # Without an answer no path could be right, and the run would train on nothing.
        draws = self.objective.draws()
        if (draws.verified or draws.answers) and not self.rollout.full_answer:
            does = "verifies" if draws.verified else "trains"
            other = "choose another reward" if draws.verified else "train the thought alone"
            raise ValueError(
                f"objective {self.objective.name!r} {does} sampled answers, but "
                f"rollout.full_answer is false; set it to true or {other}"
            )
        if self.parallel.tensor == "head" and self.loss.backend not in ("auto", "torch"):
            raise ValueError(
                f"parallel.tensor is 'head', but loss.backend is {self.loss.backend!r}, which "
                "takes whole heads; set it to auto or torch"
            )
        self._check_target()
        self._check_record()
        self._check_posterior()
        # Its likelihood would be compared with a baseline of sampled answers.
        early = any(score.view == "early" for score in self.objective.needs())
        if early and self.scoring.u_source == "accuracy":
            raise ValueError(
                f"objective {self.objective.name!r} scores thoughts cut before they state the "
                "answer, but scoring.u_source is 'accuracy'; set it to likelihood, or choose "
                "another leak_guard"
            )
        if draws.u_norm and self.scoring.u_source == "accuracy":
            raise ValueError(
                f"objective {self.objective.name!r} reads log-likelihoods of the reference answer, "
                "but scoring.u_source is 'accuracy'; set it to likelihood"
            )
        self._check_solution()
        self._check_overlong()
        # NaN as a ratio would be a gradient of NaN.
        if draws.given and self.rollout.importance_cap is not None:
            raise ValueError(
                f"objective {self.objective.name!r} trains responses of the data, which no engine "
                f"drew, with rollout.importance_cap {self.rollout.importance_cap}; set it to null"
            )
        if draws.given and self.train.max_tokens is not None:
            raise ValueError(
                f"train.max_tokens {self.train.max_tokens} is never reached: objective "
                f"{self.objective.name!r} trains responses of the data and samples no token; set "
                "it to null, and train.steps"
            )
        # The own engine gives log-probs of the whole distribution even then.
        if self.engine.name == "vllm" and self.rollout.top_p < 1:
            raise ValueError(
                f"rollout.top_p is {self.rollout.top_p}, but vLLM gives log-probs of the cut "
                "distribution then, and the gradient assumes paths of the whole one; set it to 1.0 "
                "(an evaluation may cut: eval.top_p)"
            )
        if self.engine.name == "replay" and not self.replay.paths:
            raise ValueError(
                "engine.paths: got no file with engine.name 'replay', expected the paths.jsonl of "
                "a run; give one or more"
            )
        self._check_keep_best()
        if self.train.max_tokens is not None and self.optim.schedule != "constant":
            raise ValueError(
                f"optim.schedule {self.optim.schedule!r} falls over train.steps, and "
                "train.max_tokens ends the run anywhere on that way; set optim.schedule constant"
            )
        self._check_dtypes()

    def _check_dtypes(self) -> None:
        # Either one alone is a mistake that shows only as a model that does not learn.
        rounded = self.model.master_dtype == "bfloat16"
        if rounded != self.optim.stochastic_rounding:
            raise ValueError(
                f"model.master_dtype is {self.model.master_dtype!r} and optim.stochastic_rounding "
                f"{self.optim.stochastic_rounding}: bfloat16 weights lose updates of 1e-6 unless "
                "rounded stochastically, others are not rounded; set both or neither"
            )
        # The weights hold no more than bfloat16: a wider forward would only look exact.
        if rounded and self.model.dtype != "bfloat16":
            raise ValueError(
                f"model.master_dtype 'bfloat16' needs model.dtype 'bfloat16', got "
                f"{self.model.dtype!r}"
            )

    def _check_record(self) -> None:
        """ValueError where paths are to be recorded, or recorded ones read, and cannot be."""
        draws, who = self.objective.draws(), f"objective {self.objective.name!r}"
        if self.train.record and self.train.resample_rounds:
            raise ValueError(
                f"train.record {self.train.record!r} trains no question, so train.resample_rounds "
                f"{self.train.resample_rounds} would replace all of them; set it to 0"
            )
        # Each file has epochs of its own, so no step ends a pass over all of them.
        if self.train.record and self.data.weights is not None:
            raise ValueError(
                f"train.record {self.train.record!r} records a pass over all questions, and "
                "data.train has weights; leave them out"
            )
        if not draws.recorded:
            return
        if self.engine.name != "replay":
            raise ValueError(
                f"{who} trains by recorded weights, and engine.name {self.engine.name!r} draws "
                "paths that have none; set engine.name replay and engine.paths, or weights computed"
            )
        # Its factor would be of another model's log-probs.
        if self.rollout.importance_cap is not None:
            raise ValueError(
                f"{who} imitates paths that another model drew, with rollout.importance_cap "
                f"{self.rollout.importance_cap}; set it to null"
            )

    def _check_posterior(self) -> None:
        """ValueError for keys of a posterior policy that there is not, and where none can be."""
        keys = {"path": self.posterior.path, "lr": self.posterior.lr}
        given = next((key for key, value in keys.items() if value is not None), None)
        if given is not None and not self.two_policies:
            raise ValueError(
                f"posterior.{given}: got {keys[given]!r}, but objective {self.objective.name!r} "
                "trains one policy; set objective.share_params false (vr), or leave it out"
            )
        if self.two_policies and self.engine.name == "replay":
            raise ValueError(
                "engine.name: got 'replay' with a posterior policy, which recorded paths were not "
                "drawn from; train the two models apart (objective vr_phi, then vr_theta), or set "
                "engine.name hf or vllm"
            )

    def _check_solution(self) -> None:
        """ValueError for a solution that the teacher is to be shown, and cannot."""
        if "{solution}" not in self.prompt.teacher:
            return
        lacks = [f.label for f in self.data.train if not self.data.filled(f).solution_key]
        if lacks:
            raise ValueError(
                f"prompt.teacher shows {{solution}}, but {', '.join(lacks)} has no "
                "data.solution_key; set it, or show {answer} alone"
            )
        # A wrong answer beside the right solution would be no wrong hint.
        if any(score.view == "counterfactual" for score in self.objective.needs()):
            raise ValueError(
                f"prompt.teacher shows {{solution}}, but objective {self.objective.name!r} needs a "
                "prompt with a wrong answer, beside which no solution is wrong; choose another "
                "leak_guard, or show {answer} alone"
            )

    def _check_overlong(self) -> None:
        """ValueError for a soft punishment that begins before the first token."""
        rollout, cache = self.rollout, getattr(self.objective, "overlong_cache", 0)
        limit = rollout.max_new_tokens + rollout.full_answer * rollout.max_answer_tokens
        if cache > limit:
            raise ValueError(
                f"objective.overlong_cache: got {cache}, expected at most the {limit} tokens of a "
                "path (rollout.max_new_tokens, and max_answer_tokens with full_answer): every path "
                "would be punished; lower it"
            )

    def _check_target(self) -> None:
        """ValueError where what is trained behind the thoughts is not what U measures."""
        draws, who = self.objective.draws(), f"objective {self.objective.name!r}"
        # One pass of the head has one temperature, and a likelihood is one at 1.
        if (draws.targets or draws.given) and self.rollout.temperature != 1:
            what = "the data's responses" if draws.given else "the reference answer"
            raise ValueError(
                f"{who} trains the likelihood of {what}, at temperature 1, with "
                f"rollout.temperature {self.rollout.temperature}; set it to 1.0"
                + ("" if draws.given else ", or train no target")
            )
        if not draws.by_likelihood:
            return
        files = [file.variants_key for file in self.data.train]
        variants = next((key for key in (self.data.variants_key, *files) if key), None)
        # grad P = P grad log P of one text: of a mean, a share of samples, or a sum over spellings
        # the gradient is another one, and no row has it.
        for key, got, want in (
            ("scoring.u_norm", draws.u_norm or self.scoring.u_norm, "sum"),
            ("scoring.u_source", self.scoring.u_source, "likelihood"),
            ("data.variants_key", variants, None),
        ):
            if got != want:
                raise ValueError(
                    f"{who} weighs the reference answer that it trains by its likelihood R, which "
                    f"{key} {got!r} makes another number; set {key} {want or 'null'}, or train "
                    "no target"
                )

    def _check_keep_best(self) -> None:
        best = self.checkpoint.keep_best
        if best is None:
            return
        # The measure's name begins with the mode that it needs.
        drawn = self.eval.greedy if best.startswith("greedy") else self.eval.samples
        wanting = {"eval.data": self.eval.data, "eval.every": self.eval.every}
        wanting["eval.greedy or eval.samples"] = drawn
        # The first that is missing: one remedy a line.
        lacks = next((key for key, value in wanting.items() if not value), None)
        if lacks is not None:
            raise ValueError(
                f"checkpoint.keep_best {best!r} chooses by an evaluation while training, and "
                f"{lacks} asks for none; set it, or checkpoint.keep_best null"
            )

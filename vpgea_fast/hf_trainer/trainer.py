"""`VPGEATrainer`: Hugging Face's loop, optimiser, logs, callbacks and checkpoints around the method
of this project.

    dataloader -> ids of a step's questions, from all processes -> Method.draw: rows
    -> forward and backward of each packed batch in the wrapped model -> the Trainer's update
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from vpgea_fast.distributed import World
from vpgea_fast.hf_trainer.config import VPGEAConfig, as_config, in_arguments
from vpgea_fast.hf_trainer.method import Method, check_model
from vpgea_fast.hf_trainer.questions import (
    Asked,
    RewardFunc,
    RewardJudge,
    evaluation_questions,
    training_questions,
)
from vpgea_fast.intake import ModelText
from vpgea_fast.integrations.hosts import imported
from vpgea_fast.integrations.packed import PackedLoss, packed_loss
from vpgea_fast.model_dir import check_vocabulary
from vpgea_fast.prompts import Prompter
from vpgea_fast.types import PackedBatch, PromptedQuestion
from vpgea_fast.verify import Verifier

PEFT = "peft>=0.21"


class VPGEATrainer(Trainer):
    """Train a causal LM by VPG-EA, by the conventions of TRL's trainers.

    model: a causal LM of transformers or PEFT, or a name for `from_pretrained`. Its dropout is
        turned off, since paths are scored by the model that draws them.
    args: `VPGEAConfig`; None: its defaults.
    train_dataset: rows with a column `prompt`, text or one user turn, and `answer`, the reference
        answer. None: only to evaluate. Other names: `sections` of the arguments.
    eval_dataset: the same, or several by name; `evaluate` gives accuracy, tokens and eps3.
    processing_class: a tokenizer with a chat template; None: the model's.
    reward_func: judges answers in place of math-verify, 1 right and 0 wrong, by TRL's signature.
    callbacks, optimizers: the Trainer's. peft_config: an adapter to train instead of the model.

    ValueError, in one line: arguments, columns, rows, templates and models that cannot be used;
    DataParallel, FSDP and DeepSpeed.
    """

    def __init__(
        self,
        model: Any,
        args: VPGEAConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_func: RewardFunc | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = _checked(args, train_dataset, eval_dataset, reward_func)
        cfg, world = as_config(args), _world(args)
        set_seed(args.seed)  # before an adapter is drawn
        model, name = _open(model, args, peft_config)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(name)
        with in_arguments(), ExitStack() as undo:
            check_model(model)
            check_vocabulary(tokenizer, model.config, name or type(model).__name__)
            verifier = undo.enter_context(Verifier.configured(cfg.verify, world))
            text = ModelText(tokenizer, Prompter(tokenizer, cfg.prompt), model.config)
            self._reading = cfg, text.prompter, verifier.accepts_itself
            trained, evaluated = self._questions(train_dataset), self._benchmarks(eval_dataset)
            super().__init__(
                model=model,
                args=args,
                data_collator=_uncollated,
                train_dataset=trained,  # pyright: ignore[reportArgumentType]
                eval_dataset=evaluated,
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
            )
            self._check_placement()
            judge = None
            if reward_func is not None:
                judge = RewardJudge(reward_func, text.decode, world, cfg.data.question_key)
            given: dict[str, Any] = {"world": world, "text": text, "verifier": verifier}
            self.method = Method(cfg, model=model, **given, judge=judge, autocast=_half(args))
            self.method.train_on(trained)
            for asked in evaluated.values() if isinstance(evaluated, dict) else [evaluated]:
                if asked is not None:
                    self.method.evaluator(asked)  # for its errors: now, and not after an hour
            undo.pop_all()
        weakref.finalize(self, verifier.close)
        self._pending: list[Mapping[str, Any]] = []  # metrics of the steps since the last log
        self._flops = 0.0

    # --- a step -----------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The questions of a whole step as its last micro-batch; the others are empty.

        Generation has all of them at once, and the update is planned over what it drew.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, items
        # In the order of the sampler, however many processes there are.
        parts = self.method.world.gather(batches)
        ids = [id_ for batch in zip_longest(*parts, fillvalue=[]) for part in batch for id_ in part]
        asked: Any = self.train_dataset
        # A sampler may repeat questions at the end of an epoch; in a step each counts once.
        step = [asked.prompted[id_] for id_ in dict.fromkeys(ids)]
        return [*([] for _ in batches[1:]), step], None

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Draw the paths of a step and add the gradient of its rows; the loss, constants included.

        The Trainer's micro-batches before the last have nothing to do.
        """
        del num_items_in_batch  # the coefficients hold the normaliser
        questions: Sequence[PromptedQuestion] = inputs
        loss = torch.zeros((), device=self.args.device)
        if not questions:
            return loss
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # pyright: ignore
        drawn = self.method.draw(questions, self.state.global_step)

        def backward(batch: PackedBatch, last: bool) -> torch.Tensor:
            # Reduced over the processes once, with the last batch.
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    part, out = self.compute_loss(model, {"batch": batch}, return_outputs=True)
                self.accelerator.backward(part)
            return out.logp

        with drawn.timer("train"):
            logps = self.method.passes(backward, drawn.rows) if drawn.rows else []
        found = self.method.metrics(drawn, logps)
        self._pending.append(found)
        lengths = [row.tokens - 1 for row in drawn.rows]
        self._flops = self.method.passes.flops.rows(lengths) / self.method.world.size
        return loss + found["loss"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted log-probs of `inputs["batch"]`, a `PackedBatch` of this process, times the
        number of processes: wrappers average gradients. With `return_outputs` the log-probs too."""
        del num_items_in_batch
        out: PackedLoss = packed_loss(
            model,
            inputs["batch"],
            temperature=self.method.cfg.rollout.temperature,
            world_size=self.method.world.size,
            backend=self.method.cfg.loss.backend,
        )
        return (out.loss, out) if return_outputs else out.loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Of the update of the step that `inputs` are, on this process; draws are not counted."""
        return int(self._flops) if inputs else 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a log of training the means of what its steps said of themselves."""
        if "loss" in logs:
            logs = {**_means(self._pending), **logs}
            self._pending.clear()
        super().log(logs, start_time)

    # --- an evaluation ----------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answer the questions of `dataloader.dataset` and judge the answers: sampled_acc,
        sampled_tokens, greedy_eps3 and so on, each behind the prefix. There is no loss."""
        del description, prediction_loss_only, ignore_keys
        asked: Any = self._benchmark(dataloader.dataset, metric_key_prefix)
        found = self.method.evaluate(asked)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        return EvalLoopOutput(None, None, metrics, len(asked))  # pyright: ignore

    def _questions(self, dataset: Any) -> Asked | None:
        if dataset is None:
            return None
        return training_questions(dataset, "train_dataset", *self._reading)

    def _benchmarks(self, dataset: Any) -> Any:
        """The Trainer's eval_dataset as questions: one, several by name, or None."""
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            return {name: self._benchmark(rows, f"eval_{name}") for name, rows in dataset.items()}
        return self._benchmark(dataset, "eval_dataset")

    def _benchmark(self, rows: Any, name: str) -> Asked:
        if isinstance(rows, Asked) and rows.benchmark is not None:
            return rows
        return evaluation_questions(getattr(rows, "rows", rows), name, *self._reading)

    def _check_placement(self) -> None:
        """ValueError where the model is not whole on every process."""
        on = {
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "DataParallel": self.args.n_gpu > 1,
        }
        found = [name for name, used in on.items() if used]
        if found:
            raise ValueError(
                f"VPGEATrainer: got {found[0]}, expected one process, or DDP (torchrun, accelerate "
                "launch); `vpgea train` shards a model that does not fit"
            )


def _checked(args: Any, train_dataset: Any, eval_dataset: Any, reward_func: Any) -> VPGEAConfig:
    if train_dataset is None and eval_dataset is None:
        raise ValueError("train_dataset: got none, and no eval_dataset; give one of them")
    if args is not None and not isinstance(args, VPGEAConfig):
        raise ValueError(f"args: got {type(args).__name__}, expected a VPGEAConfig")
    if reward_func is not None and not callable(reward_func):
        raise ValueError(
            f"reward_func: got {type(reward_func).__name__}, expected one function that judges "
            "answers, 1 right and 0 wrong"
        )
    return args or VPGEAConfig("vpgea_output")


def _world(args: VPGEAConfig) -> World:
    """The processes that accelerate has connected; host data goes over gloo."""
    if args.world_size == 1:
        return World(args.device)
    timeout = timedelta(seconds=args.ddp_timeout)
    group: Any = dist.new_group(backend="gloo", timeout=timeout)
    size, rank = args.world_size, args.process_index
    return World(args.device, rank=rank, size=size, group=group, timeout=timeout)


def _open(model: Any, args: VPGEAConfig, peft_config: Any) -> tuple[Any, str]:
    """The model, and the name that its tokenizer has."""
    if isinstance(model, str):
        given: Any = args.model_init_kwargs or {}
        model = AutoModelForCausalLM.from_pretrained(model, **given)
    elif args.model_init_kwargs:
        raise ValueError("model_init_kwargs: got some beside a model that is made; leave them out")
    name = getattr(model.config, "_name_or_path", "")
    if peft_config is not None:
        peft: Any = imported("peft", PEFT)
        if isinstance(model, peft.PeftModel):
            raise ValueError(
                f"peft_config: got one beside a {type(model).__name__}, which has adapters; leave "
                "it out, or pass the model below it"
            )
        model = peft.get_peft_model(model, peft_config)
    return model, name


def _uncollated(ids: list[str]) -> Any:
    return ids


def _half(args: VPGEAConfig) -> torch.dtype | None:
    """What accelerate's autocast computes in; None: it is off."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def _means(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each number over the steps that have it."""
    keys = dict.fromkeys(key for step in steps for key in step if key != "loss")
    found = {key: [step[key] for step in steps if step.get(key) is not None] for key in keys}
    return {key: sum(values) / len(values) for key, values in found.items() if values}

"""The reference policy: a frozen model that the policy is held to. It scores rows, and draws paths.

    model.reference_path, else model.path -> a policy without optimiser or gradients, cut like the
    trained one -> log-probs of rows at rollout.temperature | paths in the student view

    model.reference: device   loaded once, beside the policy
    model.reference: disk     read from its files for each use, and dropped

A resumed run reads the same files: its checkpoints hold the policy alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers.utils import logging

from vpgea_fast.config import Config
from vpgea_fast.distributed import World, reshard
from vpgea_fast.model import Policy, frozen, load_policy
from vpgea_fast.model_dir import ModelError, load_tokenizer
from vpgea_fast.objectives import reads_reference
from vpgea_fast.passes import Passes
from vpgea_fast.rollout.engine import Sampling
from vpgea_fast.rollout.turns import Turns
from vpgea_fast.types import Path, SampleRequest, TrainRow
from vpgea_fast.weights import load_config, without_storage

T = TypeVar("T")


class Reference:
    """The frozen model of a run. Every use is a collective, and from `disk` it reads the model.

    Errors: ModelError, as `load_policy`.
    """

    def __init__(self, cfg: Config, world: World, passes: Passes) -> None:
        self.cfg, self.world, self.passes = cfg, world, passes
        self._loaded = self._load() if cfg.model.reference == "device" else None

    def logprobs(self, rows: Sequence[TrainRow]) -> list[torch.Tensor]:
        """Log-probs of every row's tokens under the reference, as `Passes` gives them."""
        # That of the draw: the KL compares with the policy's log-probs at the same one.
        passes, temperature = self.passes.scoring, self.cfg.rollout.temperature

        def score(model: Policy) -> list[torch.Tensor]:
            return passes(lambda batch, _: model.logprob(batch, temperature=temperature), rows)

        return self._at_hand(score)

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Callable[[int], None],
        *,
        turns: Turns,
    ) -> list[Path]:
        """Draw a path of the reference for each request: its turn at the engine."""
        # Probed when it has the policy's again: paths of the reference's weights would be trained
        # on as the policy's own.
        with turns.lent(check=True) as hand_over:

            def draw(model: Policy) -> list[Path]:
                hand_over("reference", model)
                return turns.engine.generate(requests, sampling, progress)

            # The model is gone, where it is read anew, before the policy's weights come.
            return self._at_hand(draw)

    def close(self) -> None:
        """Drop the model."""
        self._loaded = None

    def _at_hand(self, use: Callable[[Policy], T]) -> T:
        """Use the model, which takes no more memory afterwards than before."""
        if (model := self._loaded) is None:
            with _no_bar():  # one a step, across the lines of the console
                model = self._load()
        found = use(model)
        # Else its head, embedding and root stay gathered on every process.
        reshard(model)
        if self._loaded is None:
            del model
            # FSDP's units refer to each other, and vLLM cannot use what torch's allocator keeps.
            gc.collect()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
        return found

    def _load(self) -> Policy:
        cfg = self.cfg
        # In the forward's dtype, as the policy's weights are: the log-probs are its bits where the
        # weights are.
        how = replace(
            frozen(cfg.model),
            path=reference_path(cfg),
            # What is read anew each time would be compiled anew.
            compile=cfg.model.compile and cfg.model.reference == "device",
        )
        model = load_policy(how, self.world, cfg.parallel, backend=cfg.loss.backend)
        return model.requires_grad_(False)


def reference_path(cfg: Config) -> str:
    """Say where the reference's weights lie: those that the policy starts from, unless told."""
    return cfg.model.reference_path or cfg.model.path


def check_models(cfg: Config, model_config: Any, tokenizer: Any) -> None:
    """Refuse, before a weight is loaded, a reference or posterior policy of other shapes than the
    policy, or of another vocabulary.

    Nothing is read of a model that the objective does not ask for, or that begins from the policy's
    own weights. Errors: ModelError.
    """
    if reads_reference(cfg.objective):
        _require_alike(cfg, "model.reference_path", model_config, tokenizer)
    if cfg.two_policies:
        _require_alike(cfg, "posterior.path", model_config, tokenizer)


def _require_alike(cfg: Config, key: str, model_config: Any, tokenizer: Any) -> None:
    """Refuse the model of `key` (`section.name`) where it has other shapes or another vocabulary
    than that of model.path; nothing is read where it is null. Errors: ModelError."""
    section, name = key.split(".")
    if (path := getattr(getattr(cfg, section), name)) is None:
        return
    where = f"{key}: got {path}"
    # Modules without storage: config.json alone gives the shapes, and the dtype plays no part.
    outlines = [without_storage(cfg.model.path, torch.float32, model_config)]
    outlines.append(without_storage(path, torch.float32, load_config(path)))
    ours, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in outlines)
    # Pairs of one side alone: a name that the other lacks, or has in another shape.
    if other := sorted(dict(ours.items() ^ theirs.items())):
        name = other[0]
        raise ModelError(
            f"{where}, whose {name} is {theirs.get(name, 'missing')}, but that of model.path is "
            f"{ours.get(name, 'missing')}; expected a model of the same shapes: give one, or null"
        )
    # Equal shapes alone do not make equal ids: R1's distillates number their tags anew.
    spelled, vocabulary = load_tokenizer(path).get_vocab(), tokenizer.get_vocab()
    if differing := dict(spelled.items() ^ vocabulary.items()):
        raise ModelError(
            f"{where}, whose tokenizer numbers {len(differing)} tokens otherwise than that of "
            f"model.path ({min(differing)!r}, ...); expected the same vocabulary: give a model of "
            "the same family, or null"
        )


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers' bar of the weights that it loads is off within."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

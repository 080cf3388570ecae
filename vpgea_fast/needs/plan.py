"""A configuration, the machines that it is planned for, and what is known of its data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpgea_fast import attention
from vpgea_fast.check import Target, draws, longest
from vpgea_fast.config import Config, DataFile
from vpgea_fast.data import Benchmark
from vpgea_fast.estimate import ModelShape, model_shape
from vpgea_fast.rollout.factory import positions
from vpgea_fast.types import PromptedQuestion


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration on the machines that it is planned for, and what is known of its data.

    prompt, row  tokens of the longest prompt, and of the longest row that is trained or scored
    context      tokens of the longest path that may be drawn
    mean_prompt  of the training questions, both views
    answers      that one evaluation draws
    left_out     files of eval.data that could not be asked for; `answers` counts them by their
                 limit, a file without one as nothing
    """

    cfg: Config
    model: Any
    on: Target
    shape: ModelShape
    prompt: int
    row: int
    context: int
    mean_prompt: float
    answers: int
    left_out: tuple[DataFile, ...]

    @property
    def room(self) -> int:
        """Tokens that one path in vLLM's cache may have."""
        # vLLM plans its cache for the longest path that it might be asked for, drawn or not.
        most = self.cfg.vllm.context or positions(self.cfg)
        return min(most, attention.positions(self.model)[0] or sys.maxsize)

    @property
    def is_share(self) -> bool:
        """Whether vLLM gets a share of the device, and what its weights leave of it is cache."""
        return self.on.cuda and self.cfg.vllm.kv_cache_gib is None


def plan_of(
    cfg: Config,
    model_config: Any,
    questions: Sequence[PromptedQuestion],
    *,
    benchmarks: Mapping[str, Benchmark],
    on: Target,
) -> Plan:
    prompt, row = longest(cfg, questions)
    # The engine's room is planned for the longest, the hours for the mean.
    context = max(asked + new for _, asked, new in draws(cfg, questions, benchmarks))
    left_out = tuple(file for file in cfg.eval.data if file.label not in benchmarks)
    if left_out:  # an evaluation refuses longer prompts
        most = cfg.data.max_prompt_tokens + cfg.eval.most(cfg.rollout.max_answer_tokens)
        context = max(context, most)
    evaluated = sum(len(b.questions) * cfg.eval.answers(b.samples) for b in benchmarks.values())
    evaluated += sum(
        (file.limit or cfg.eval.limit or 0) * cfg.eval.answers(file.samples) for file in left_out
    )
    # Half of the paths have the longer teacher's prompt; close enough where they have not.
    lengths = [(q.student_ids.numel() + q.teacher_ids.numel()) / 2 for q in questions]
    return Plan(
        cfg=cfg,
        model=model_config,
        on=on,
        shape=model_shape(model_config),
        prompt=prompt,
        row=row,
        context=context,
        mean_prompt=sum(lengths) / len(lengths) if lengths else cfg.data.max_prompt_tokens,
        answers=evaluated,
        left_out=left_out,
    )

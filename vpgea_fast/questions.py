"""What an objective asks of a run's questions beside their prompts: responses, wrong answers.

`check_questions` asks for all of it before any weight is read; `collect.py` asks step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from vpgea_fast.config import Config
from vpgea_fast.data import round_questions
from vpgea_fast.scoring import wrong_answers
from vpgea_fast.types import PromptedQuestion, Question

Responses = Callable[[Sequence[PromptedQuestion]], list[list[tuple[torch.Tensor, torch.Tensor]]]]
"""Questions -> the responses that the data gives, each as ids of thought and answer."""
Verify = Callable[[list[tuple[str, str]]], list[bool]]
"""Pairs of reference answer and text -> which are right."""
Prompt = Callable[[Sequence[Question], Sequence[Mapping[str, str]]], list[PromptedQuestion]]
"""Questions, the values of an objective's fields for each -> both prompts of each."""


def check_questions(
    cfg: Config,
    questions: Sequence[PromptedQuestion],
    *,
    prompt: Prompt,
    responses: Responses,
    verify: Verify,
) -> None:
    """Raise ValueError for questions that no step, or not the first, could be made of: before any
    weight is read. A collective where `verify` is one."""
    first = round_questions(cfg, questions, step=0)
    if any(score.view == "counterfactual" for score in cfg.objective.needs()):
        # For its error: questions that share one answer have no wrong one.
        misled(cfg, first, questions, step=0, prompt=prompt, verify=verify)
    if cfg.objective.draws().given:
        # Of all questions: a run may come to the last of them after hours.
        given_responses(cfg, questions, responses)


def given_responses(
    cfg: Config, questions: Sequence[PromptedQuestion], responses: Responses
) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The responses that the data gives to each question, by its id, as thought and answer.

    ValueError for questions with too few, or with one that is longer than a drawn path may be.
    """
    count, rollout, known = cfg.objective.draws().prior, cfg.rollout, {}
    few, long = list[str](), list[tuple[str, int, str]]()
    for q, found in zip(questions, responses(questions), strict=True):
        where = q.question.place or f"question {q.question.id!r}"
        if len(found) < count:
            few.append(f"{where}: got {len(found)} responses, expected {count}")
        for z_ids, answer_ids in found[:count]:
            # Cut, it would teach never to stop.
            if z_ids.numel() > rollout.max_new_tokens:
                long.append((where, z_ids.numel(), "max_new_tokens"))
            elif rollout.full_answer and answer_ids.numel() > rollout.max_answer_tokens:
                long.append((where, answer_ids.numel(), "max_answer_tokens"))
        known[q.question.id] = found
    if few:
        key = cfg.data.response_key or "not set"
        raise ValueError(
            f"{few[0]} ({len(few)} of {len(questions)} questions have too few); set "
            f"data.response_key to what holds them, now {key}, or take these rows out"
        )
    if long:
        where, tokens, key = long[0]
        most = max(n for _, n, k in long if k == key)
        raise ValueError(
            f"{where}: a part of its response has {tokens} tokens, expected at most "
            f"{getattr(rollout, key)} ({len(long)} responses of {len(questions)} questions are too "
            f"long, this part of one has {most}); raise rollout.{key}, or take these rows out"
        )
    return known


def misled(
    cfg: Config,
    questions: Sequence[PromptedQuestion],
    pool: Sequence[PromptedQuestion],
    *,
    step: int,
    prompt: Prompt,
    verify: Verify,
) -> list[PromptedQuestion]:
    """The questions with a wrong answer each, in the teacher's prompt: that of another question of
    `pool`, a function of (seed, step, question). ValueError where there is none."""
    # Paths of a question share its prompts, unless an objective gave them fields.
    keys = [(q.question.id, (*q.fields.items(),)) for q in questions]
    distinct = dict(zip(keys, questions, strict=True))
    wrong = wrong_answers(
        [q.question for q in distinct.values()],
        sorted({q.question.answer for q in pool}),
        seed=f"{cfg.run.seed}/{step}",
        verify=verify,
    )
    fields = [dict(q.fields) for q in distinct.values()]
    found = dict(zip(distinct, prompt(wrong, fields), strict=True))
    return [found[key] for key in keys]

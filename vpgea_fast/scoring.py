"""Cross-view scoring: how likely a thought makes the reference answer in the *student* view.

    S(x) + z (+ think-close if the thought was cut) + cue + target
    U = sum over the target of log p, at temperature 1

The trunk runs over the whole sequence, the head over the target rows only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from vpgea_fast.spans import Tag, tokens_before
from vpgea_fast.types import Path, PromptedQuestion, Question, TrainRow, View

RowsFn = Callable[[Sequence[TrainRow]], list[torch.Tensor]]
"""Rows -> per-token log-probs of each, (len,) float64: `run_rows` with its model filled in."""
WRONG_ANSWERS, MORE_ANSWERS = 4, 256
"""Answers of other questions that are tried as a wrong one, and where none of these is."""


def answer_likelihood(
    row_logprobs: RowsFn,
    paths: Sequence[tuple[PromptedQuestion, Path]],
    *,
    u_norm: str = "sum",
    view: View | tuple[View, ...] = "student",
) -> torch.Tensor:
    """Score U = log P(y*|x, z) of every path, (len(paths),) float64 in nats, under one view or each
    under its own.

    Sums (or averages) over the target tokens, then takes logsumexp over the accepted spellings.
    """
    views = view if isinstance(view, tuple) else (view,) * len(paths)
    rows = [
        score_row(
            torch.cat([after_thought(question, own, path), question.cue_ids]),
            ids,
        )
        for own, (question, path) in zip(views, paths, strict=True)
        # Spellings lie side by side; `split` below takes them apart again.
        for ids in (question.target_ids, *question.variant_ids)
    ]
    # A mean is no likelihood any more, but does not punish a long target for its length.
    reduce = torch.sum if u_norm == "sum" else torch.mean
    scores = [reduce(logps) for logps in row_logprobs(rows)]
    # torch.stack takes no empty list, and a process may have no path in a step.
    if not scores:
        return torch.zeros(0, dtype=torch.float64)
    spellings = [1 + len(question.variant_ids) for question, _ in paths]
    return torch.stack([part.logsumexp(0) for part in torch.stack(scores).split(spellings)])


def after_thought(question: PromptedQuestion, view: View, path: Path) -> torch.Tensor:
    """Join the context and z, and close a thought that was cut."""
    # Still open the cue would read as more thought, and U of a cut path would mean nothing.
    close = [] if path.closed else [question.close_ids]
    return torch.cat([question.context(view), path.z_ids, *close])


def answers_correct(
    paths: Sequence[Path],
    golds: Sequence[tuple[str, ...]],
    *,
    decode: Callable[[torch.Tensor], str],
    verify: Callable[[list[tuple[str, str]]], list[bool]],
    tag: Tag | None = None,
) -> torch.Tensor:
    """Judge every path, (len(paths),) float64: 1.0 for a right answer, else 0.0.

    `golds` holds the accepted spellings of each path's answer (`Question.spellings`).
    Only the text behind a closed thought is an answer; `tag` as in `answer_text`.
    """
    # A cut thought is not even decoded: a checker must not find an answer inside a thought.
    closed = [number for number, path in enumerate(paths) if path.closed]
    texts = [(golds[number], answer_text(paths[number], decode, tag)) for number in closed]
    correct = torch.zeros(len(paths), dtype=torch.float64)
    correct[closed] = torch.tensor(verify_any(texts, verify), dtype=torch.float64)
    return correct


def verify_any(
    pairs: Sequence[tuple[tuple[str, ...], str]],
    verify: Callable[[list[tuple[str, str]]], list[bool]],
) -> list[bool]:
    """Tell whether each text states one spelling of its answer; a collective as `verify` is."""
    right = verify([(gold, text) for (gold, *_), text in pairs])
    # Others are asked of what the first did not take: most texts need one verdict.
    rest = [place for place, found in enumerate(right) if not found and len(pairs[place][0]) > 1]
    if rest:
        more = verify_any([(pairs[place][0][1:], pairs[place][1]) for place in rest], verify)
        for place, found in zip(rest, more, strict=True):
            right[place] = found
    return right


def answer_text(path: Path, decode: Callable[[torch.Tensor], str], tag: Tag | None) -> str:
    """Decode what follows a closed thought. Where a tag of several tokens closed it, the last of
    them may hold the answer's first letters."""
    if tag is not None:
        text = decode(torch.cat([path.z_ids[-tag.reach :], path.answer_ids]))
        # The first: a tag within the answer is the answer's own.
        _, found, rest = text.partition(tag.text)
        if found:
            return rest
    return decode(path.answer_ids)


def thought_text(path: Path, decode: Callable[[torch.Tensor], str], tag: Tag | None) -> str:
    """Decode a thought without its close: its last token, or the tag of several tokens."""
    ids = path.z_ids
    if not path.closed:
        return decode(ids)
    if tag is None:
        return decode(ids[:-1])
    # The first letters of the tag may lie in a token of the thought.
    text, found, _ = decode(ids).rpartition(tag.text)
    if found:
        return text
    # A tag with a special token in it is in no text of `decode`.
    shown = tag.decode(ids)
    count = tokens_before(ids, tag.decode, shown, shown.index(tag.text))
    return decode(ids[:count]) + tag.decode(ids[count:]).partition(tag.text)[0]


def wrong_answers(
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    seed: str,
    verify: Callable[[list[tuple[str, str]]], list[bool]],
) -> list[Question]:
    """Each question with one of the other `answers` in place of its own: a function of its id and
    the seed. ValueError where none of those drawn is wrong."""
    drawn = []
    for question in questions:
        right = {*question.spellings}
        rng = random.Random(f"{seed}/{question.id}/counterfactual")
        some = rng.sample(answers, min(len(answers), WRONG_ANSWERS))
        drawn.append([answer for answer in some if answer not in right])
    # Judged, since another spelling of the right answer is not wrong.
    pairs = list(zip(questions, drawn, strict=True))
    texts = [(q.spellings, rf"\boxed{{{answer}}}") for q, some in pairs for answer in some]
    same = iter(verify_any(texts, verify))
    wrong = []
    for question, some in pairs:
        found = [answer for answer in some if not next(same)]
        if not found:  # all drawn were other spellings: ask for more of them
            right = {*question.spellings, *some}
            rest = [answer for answer in answers if answer not in right][:MORE_ANSWERS]
            asked = [(question.spellings, rf"\boxed{{{answer}}}") for answer in rest]
            judged = verify_any(asked, verify)
            found = [answer for answer, right in zip(rest, judged, strict=True) if not right]
        if not found:
            raise ValueError(
                f"question {question.id!r}: no other question's answer is a wrong one for it, as a "
                "counterfactual prompt must hold; give more questions, or objective.leak_guard none"
            )
        wrong.append(replace(question, answer=found[0], variants=()))
    return wrong


def accuracy_utility(correct_PJ: torch.Tensor) -> torch.Tensor:
    """Turn sampled answers into U = log((sum correct + 1/2) / (J + 1)), (P,) float64.

    correct_PJ (P, J) 0 or 1: J answers sampled after each thought. With several right answers a
    likelihood of one of them understates a thought (arXiv 2509.22637, theorem 1).
    """
    # The half keeps the logarithm finite where all J answers are wrong.
    return torch.log((correct_PJ.double().sum(dim=1) + 0.5) / (correct_PJ.shape[1] + 1))


def score_row(context_ids: torch.Tensor, token_ids: torch.Tensor) -> TrainRow:
    """Make a row that is scored and never trained, so its coefficients are ones."""
    return TrainRow(
        context_ids=context_ids,
        token_ids=token_ids,
        coef=torch.ones(token_ids.numel()),
        stream="prior",
        view="student",
    )

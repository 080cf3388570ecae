"""Measures over the records of an evaluation: one implementation for runs, tables and comparisons.

    samples -> Answers (a row per question, a column per draw) -> numbers and 95 % intervals

An interval is the percentile bootstrap over questions: the draws of one are not independent. The
same records have the same intervals everywhere, whatever the order of lines, files or questions.
Q questions, K draws of each, R resamples.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vpgea_fast.evaluation.records import Sample, SampleError
from vpgea_fast.metrics import eps3, eps3_mean

BOOTSTRAP = 1000
"""Resamples behind an interval."""
AES_WEIGHTS = (1.0, 3.0, 5.0)
"""alpha, beta and gamma of AES: of length, of a gain and of a loss in accuracy."""
CHUNK = 2**22
"""Numbers that a resampling gathers at a time: 32 MB."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to one benchmark in one mode, all (Q, K).

    correct_QK  float64 of 1.0 and 0.0
    tokens_QK   int64, thought and answer, cut samples included
    cut_QK, error_QK  bool: ended by the token limit; given up by the engine
    votes_QK    int64: draws of a question with one number have one canonical prediction; -1: none
    subjects, levels, golds  of each question; None where the data has none
    """

    questions: tuple[str, ...]
    correct_QK: Tensor
    tokens_QK: Tensor
    cut_QK: Tensor
    error_QK: Tensor
    votes_QK: Tensor
    subjects: tuple[str | None, ...] = ()
    levels: tuple[str | None, ...] = ()
    golds: tuple[str, ...] = ()

    def select(self, rows: Sequence[int]) -> Answers:
        """Keep some questions, in the order of `rows`."""
        picked = torch.tensor(rows, dtype=torch.int64)
        chosen = {
            name: value[picked] if isinstance(value, Tensor) else tuple(value[i] for i in rows)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) or value
        }
        return replace(self, **chosen)


def collect(
    samples: Iterable[Sample], order: Sequence[str] | None = None, *, unfinished: bool = False
) -> Answers:
    """Arrange the samples of one benchmark and mode; questions by `order`, else by their ids.

    Samples are read once and not kept. A question that lacks draws of the others is a SampleError,
    or, with `unfinished`, left out.
    """
    rows: dict[str, dict[int, tuple[Any, ...]]] = defaultdict(dict)
    facts: dict[str, tuple[Any, ...]] = {}
    for s in samples:
        rows[s.question_id][s.index] = (s.correct, s.tokens, s.finish, s.prediction)
        # One file says 3 and another "3", and mean the same level.
        level = None if s.level is None else str(s.level)
        facts.setdefault(s.question_id, (s.subject, level, s.gold))
    # The most that any question has: one with fewer is not finished.
    draws = range(max(map(len, rows.values()), default=0))
    whole = {name for name, row in rows.items() if row.keys() == set(draws)}
    names = [name for name in (sorted(rows) if order is None else order) if name in whole]
    _require(rows, whole, order, len(draws), unfinished=unfinished)
    # Q x K cells in the order of questions and of draws, whatever the order of the lines.
    cells = [[rows[name][index] for index in draws] for name in names]
    subjects, levels, golds = zip(*(facts[name] for name in names), strict=True)
    return Answers(
        questions=tuple(names),
        correct_QK=torch.tensor([[c[0] for c in row] for row in cells], dtype=torch.float64),
        tokens_QK=torch.tensor([[c[1] for c in row] for row in cells]),
        cut_QK=torch.tensor([[c[2] == "length" for c in row] for row in cells]),
        error_QK=torch.tensor([[c[2] == "error" for c in row] for row in cells]),
        votes_QK=torch.tensor([list(_votes([c[3] for c in row])) for row in cells]),
        subjects=subjects,
        levels=levels,
        golds=golds,
    )


def collect_all(
    samples: Iterable[Sample], *, unfinished: bool = False
) -> dict[str, dict[str, Answers]]:
    """Arrange the samples of a whole evaluation: {mode: {benchmark: answers}}."""
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        # Without ids and texts, which are nearly all of a record: 100,000 take 50 MB.
        lean = replace(sample, ids=(), text="", answer_text="")
        groups[sample.mode, sample.benchmark].append(lean)
    arranged: dict[str, dict[str, Answers]] = {}
    for (mode, name), group in groups.items():
        arranged.setdefault(mode, {})[name] = collect(group, unfinished=unfinished)
    return arranged


def _require(
    rows: Mapping[str, Mapping[int, object]],
    whole: set[str],
    order: Sequence[str] | None,
    draws: int,
    *,
    unfinished: bool,
) -> None:
    """Refuse what makes no rectangle, in one line."""
    if not rows:
        raise SampleError("there is no sample; an evaluation needs at least one")
    wanted = set(rows) if order is None else set(order)
    amiss = sorted((wanted - whole) | (rows.keys() - wanted))
    if amiss and not (unfinished and whole):
        name = amiss[0]
        raise SampleError(
            f"question {name!r} has {len(rows.get(name, ()))} of {draws} answers, and it is one of "
            f"{len(amiss)}; the evaluation is not finished: go on with --resume"
        )


def _votes(predictions: Sequence[str | None]) -> Iterator[int]:
    seen: dict[str, int] = {}
    for prediction in predictions:
        # A sample that was cut, or answers nothing, does not vote.
        yield -1 if prediction is None else seen.setdefault(prediction, len(seen))


def measure(benchmarks: Mapping[str, Answers]) -> dict[str, Any]:
    """Measure an evaluation in one mode: means over the benchmarks, and each benchmark's.

    acc          0..1, avg@K: the mean over K draws; acc_low, acc_high its interval over questions
    tokens       mean generated, thought and answer, cut samples included
    truncated    share of samples that were cut; errors, the number that the engine gave up
    n, questions samples; questions
    eps3         mean over benchmarks of ACC^2 / tokens
    eps3_mean    (mean ACC)^2 / mean tokens
    benchmarks   the same for each, without eps3_mean
    """
    parts, resampled = {}, []
    for name, answers in benchmarks.items():
        correct_QK, tokens_QK = answers.correct_QK, answers.tokens_QK
        means_R = _resampled(name, answers)[:, 0]
        resampled.append(means_R)
        # Integers: the sum does not depend on the order of the samples.
        acc, tokens = correct_QK.mean().item(), tokens_QK.sum().item() / tokens_QK.numel()
        parts[name] = {
            "acc": acc,
            **_named("acc", interval(means_R)),
            "tokens": tokens,
            "eps3": eps3(acc, tokens),
            "truncated": answers.cut_QK.sum().item() / answers.cut_QK.numel(),
            "errors": int(answers.error_QK.sum()),
            "n": correct_QK.numel(),
            "questions": len(answers.questions),
        }
    # Benchmarks count alike, whatever their size, in the mean and in its interval.
    whole = _aggregate(list(parts.values()))
    acc = interval(torch.stack(resampled).mean(dim=0))
    return {**whole, **_named("acc", acc), "benchmarks": parts}


def _aggregate(parts: list[dict[str, float]]) -> dict[str, Any]:
    """Average the measures of all benchmarks, and add up their counts."""
    # Both, because the paper does not say which of the two it prints.
    mean_of_ratios, ratio_of_means = eps3_mean([(part["acc"], part["tokens"]) for part in parts])
    return {
        **{k: math.fsum(p[k] for p in parts) / len(parts) for k in ("acc", "tokens", "truncated")},
        "eps3": mean_of_ratios,
        "eps3_mean": ratio_of_means,
        **{k: sum(int(part[k]) for part in parts) for k in ("n", "questions", "errors")},
    }


def _named(name: str, edges: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": edges[0], f"{name}_high": edges[1]}


def resample(values_QC: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the questions BOOTSTRAP times with replacement: the columns' means, (R, C) float64.

    Columns are drawn together: a ratio or a difference of them is of the same questions.
    """
    count, columns = values_QC.shape
    # (R, Q) int64: 1,000 x 1,319 of GSM8K's test are 10 MB.
    picks_RQ = torch.randint(count, (BOOTSTRAP, count), generator=generator)
    # By columns: rows of one column lie side by side, as a sum over questions reads them.
    means = [
        torch.cat([column_Q[picks].mean(dim=1) for picks in picks_RQ.split(_rows(count))])
        for column_Q in values_QC.t().contiguous()
    ]
    return torch.stack(means, dim=1) if columns else picks_RQ.new_zeros(BOOTSTRAP, 0).double()


def _rows(count: int) -> int:
    return max(1, CHUNK // count)


def interval(values_R: Tensor) -> tuple[float, float]:
    """Take the 95 % percentile interval."""
    # At an accuracy of 0 or 1 all resamples agree, and it has no width.
    edges = torch.tensor([0.025, 0.975], dtype=values_R.dtype)
    low, high = values_R.quantile(edges).tolist()
    return low, high


def statistics(accs_BR: Tensor, tokens_BR: Tensor) -> dict[str, Tensor]:
    """Accuracy, tokens and eps3 of B benchmarks, then of their mean: each (B + 1, R).

    R resamples, or one column of the numbers themselves. The mean's `eps3` is the mean of ratios,
    its `eps3_mean` the ratio of means, as in `eps3_mean`; of a benchmark the two are one number.
    """
    acc, tokens = (torch.cat([x, x.mean(dim=0, keepdim=True)]) for x in (accs_BR, tokens_BR))
    # Its last row is (mean ACC)^2 / mean tokens, the ratio of means.
    ratios = (100 * acc).square() / tokens
    eps3 = torch.cat([ratios[:-1], ratios[:-1].mean(dim=0, keepdim=True)])
    return {"acc": acc, "tokens": tokens, "eps3": eps3, "eps3_mean": ratios}


def question_means(benchmarks: Mapping[str, Answers]) -> tuple[Tensor, Tensor]:
    """Accuracy and tokens of every benchmark: two (B, 1) float64."""
    means = [(a.correct_QK.mean(), a.tokens_QK.double().mean()) for a in benchmarks.values()]
    accs, tokens = zip(*means, strict=True)
    return torch.stack(accs)[:, None], torch.stack(tokens)[:, None]


def _resampled(name: str, answers: Answers) -> Tensor:
    """Accuracy and tokens of every resample of a benchmark, (R, 2) float64.

    Its name and its question ids alone decide which questions these are. So two evaluations of them
    are paired, and two benchmarks are resampled independently of each other.
    """
    correct_QK, tokens_QK = answers.correct_QK, answers.tokens_QK
    means_Q2 = torch.stack([correct_QK.mean(dim=1), tokens_QK.double().mean(dim=1)], dim=1)
    # Resample r draws the same ids from any file, whatever the order of its rows.
    by_id = sorted(range(len(answers.questions)), key=answers.questions.__getitem__)
    # A file's name may hold bytes that are no text.
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return resample(means_Q2[by_id], generator)


def resampled_means(benchmarks: Mapping[str, Answers]) -> tuple[Tensor, Tensor]:
    """Accuracy and tokens of every resample of every benchmark, two (B, R) float64."""
    both_BRC = torch.stack([_resampled(name, answers) for name, answers in benchmarks.items()])
    return both_BRC[..., 0], both_BRC[..., 1]


def intervals(benchmarks: Mapping[str, Answers]) -> dict[str, dict[str, tuple[float, float]]]:
    """Intervals of `statistics` by benchmark, and of their mean under "mean".

    Accuracy and tokens are of the same resampled questions, so eps3's intervals are paired.
    """
    found = statistics(*resampled_means(benchmarks))
    return {
        name: {key: interval(values[row]) for key, values in found.items()}
        for row, name in enumerate([*benchmarks, "mean"])
    }


def pass_at(correct_QK: Tensor, k: int) -> Tensor:
    """Unbiased pass@k of every question, (Q,) float64: 1 - C(n - c, k) / C(n, k) of n = K draws.

    As a product of k ratios, which cannot overflow (Codex, arXiv 2107.03374, section 2.1).
    ValueError for k beyond K.
    """
    draws = correct_QK.shape[1]
    if not 1 <= k <= draws:
        raise ValueError(f"pass@{k}: got {draws} answers a question, expected 1 <= k <= {draws}")
    wrong_Q1 = draws - correct_QK.sum(dim=1, keepdim=True)
    taken = torch.arange(k, dtype=torch.float64)
    # No factor below 0: fewer wrong draws than k always leave a right one.
    return 1 - ((wrong_Q1 - taken).clamp(min=0) / (draws - taken)).prod(dim=1)


def majority(answers: Answers, k: int | None = None) -> Tensor:
    """Score maj@k of every question, (Q,) float64: whether the most frequent prediction is right.

    Of the first k draws (None: all). Draws vote by the checker's canonical prediction; one without
    a prediction does not vote, and a question without a vote scores 0. Predictions that tie share:
    the score is the share of them that is right, as a fair pick among them has on average.
    """
    draws = answers.votes_QK.shape[1]
    k = draws if k is None else k
    if not 1 <= k <= draws:
        raise ValueError(f"maj@{k}: got {draws} answers a question, expected 1 <= k <= {draws}")
    votes_Qk, correct_Qk = answers.votes_QK[:, :k], answers.correct_QK[:, :k]
    cast_Qk = votes_Qk >= 0
    # (Q, k) agreeing draws, itself included; a loop over k holds (Q, k) and no (Q, k, k).
    counts_Qk = torch.zeros_like(votes_Qk)
    for draw in range(k):
        counts_Qk += votes_Qk == votes_Qk[:, draw : draw + 1]
    counts_Qk = counts_Qk * cast_Qk
    # Tied predictions have as many draws each, so a mean over draws is one over predictions.
    leads_Qk = cast_Qk & (counts_Qk == counts_Qk.amax(dim=1, keepdim=True))
    return (correct_Qk * leads_Qk).sum(dim=1) / leads_Qk.sum(dim=1).clamp(min=1)


def budgets(answers: Answers) -> list[int]:
    """List the powers of two from 64 up to the first that holds the longest answer."""
    top = max(64, int(answers.tokens_QK.max()))
    return [2**p for p in range(6, math.ceil(math.log2(top)) + 1)]


def budget_curve(answers: Answers, limits: Sequence[int]) -> list[tuple[int, float]]:
    """(limit, accuracy) where an answer counts only if it took at most `limit` tokens."""
    # Sorted once: each limit is a binary search then.
    right = answers.tokens_QK[answers.correct_QK > 0].sort().values
    within = torch.searchsorted(right, torch.tensor(limits), right=True)
    total = answers.correct_QK.numel()
    return [(limit, n / total) for limit, n in zip(limits, within.tolist(), strict=True)]


def tokens_per_correct(answers: Answers) -> float:
    """Tokens of all answers for each right one; infinite without any."""
    right = answers.correct_QK.sum().item()
    return answers.tokens_QK.sum().item() / right if right else math.inf


def aes(
    acc: Tensor,
    tokens: Tensor,
    *,
    base: tuple[Tensor, Tensor],
    weights: tuple[float, float, float] = AES_WEIGHTS,
) -> Tensor:
    """Accuracy-Efficiency Score of O1-Pruner (arXiv 2501.12570, section 5.1) against a base's
    (acc, tokens).

    alpha dL + beta |dA| where accuracy holds, alpha dL - gamma |dA| where it falls; dL is the
    relative saving of tokens, dA the relative change of accuracy; defaults 1, 3 and 5 as there. The
    gains in its table 2 agree; its falls are printed as alpha dL + beta |dA|, against its formula.
    Others weigh otherwise, so compare within one table. Not finite for a base without a right
    answer.

    >>> half, few = torch.tensor(0.5), torch.tensor(500.0)
    >>> aes(half, few, base=(half, 2 * few)).item()
    0.5
    """
    saved, change = 1 - tokens / base[1], acc / base[0] - 1
    length, gain, loss = weights
    # A fall is negative, so gamma times it takes off.
    return length * saved + torch.where(change >= 0, gain, loss) * change


def groups(answers: Answers, by: str) -> dict[str, dict[str, float]]:
    """Measure the questions of every subject or level (`by`) apart; {} where the data has none."""
    labels = {"subject": answers.subjects, "level": answers.levels}[by]
    rows: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        if label is not None:
            rows[label].append(row)
    return {
        # The label seeds its resamples: subjects are drawn independently of each other.
        label: measure({label: answers.select(rows[label])})["benchmarks"][label]
        for label in sorted(rows)
    }


def details(answers: Answers) -> dict[str, Any]:
    """Measure what one benchmark's records tell beyond `measure`: by k, budget, subject, level."""
    draws = answers.correct_QK.shape[1]
    # K itself too, where it is no power of two.
    powers = sorted({2**p for p in range(draws.bit_length())} | {draws})
    return {
        "pass_at": {k: pass_at(answers.correct_QK, k).mean().item() for k in powers},
        "maj_at": {k: majority(answers, k).mean().item() for k in powers},
        "budget": budget_curve(answers, budgets(answers)),
        "tokens_per_correct": tokens_per_correct(answers),
        "subjects": groups(answers, "subject"),
        "levels": groups(answers, "level"),
    }

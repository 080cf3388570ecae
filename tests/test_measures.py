"""Measures over records: against enumeration, by hand, and whatever the order of the lines."""

import itertools
import math
import random
from collections import Counter
from functools import partial
from statistics import fmean

import pytest
import torch

from vpgea_fast.evaluation import measures
from vpgea_fast.evaluation.measures import (
    BOOTSTRAP,
    aes,
    budget_curve,
    budgets,
    collect,
    collect_all,
    details,
    intervals,
    majority,
    measure,
    pass_at,
    question_means,
    resample,
    resampled_means,
    statistics,
    tokens_per_correct,
)
from vpgea_fast.evaluation.records import Sample, SampleError
from vpgea_fast.metrics import eps3_mean


def sample(
    question, index, *, correct=0, tokens=10, prediction: str | None = "x", **values
) -> Sample:
    known = {"benchmark": "b", "mode": "sampled", "finish": "stop", "gold": "1", **values}
    return Sample(
        question_id=question,
        index=index,
        seed=0,
        ids=(1,) * tokens,
        text="",
        answer_text="",
        prediction=prediction,
        tokens=tokens,
        thought_tokens=0,
        correct=correct,
        **known,
    )


def drawn(questions, draws, seed=0, **values):
    rng = random.Random(seed)
    return [
        sample(
            f"q{q}",
            k,
            correct=int(rng.random() < q / questions),
            tokens=rng.randrange(1, 900),
            prediction=rng.choice(["1", "2", "3", None]),
            finish=rng.choice(["stop", "stop", "length", "error"]),
            level=q % 3,
            subject="odd" if q % 2 else None,
            **values,
        )
        for q in range(questions)
        for k in range(draws)
    ]


def test_lines_in_any_order_say_the_same():
    samples = drawn(20, 4)
    expected, details_expected = measure({"b": collect(samples)}), details(collect(samples))
    random.Random(1).shuffle(samples)
    assert measure({"b": collect(samples)}) == expected
    assert details(collect(samples)) == details_expected
    assert expected["acc"] == fmean(s.correct for s in samples)
    assert expected["tokens"] == math.fsum(s.tokens for s in samples) / 80
    assert expected["truncated"] == sum(s.finish == "length" for s in samples) / 80
    assert expected["errors"] == sum(s.finish == "error" for s in samples)


def test_questions_stand_in_the_order_that_is_asked_for():
    samples = drawn(5, 2)
    order = ["q3", "q0", "q4", "q1", "q2"]
    answers = collect(samples, order)
    assert answers.questions == tuple(order)
    assert answers.tokens_QK[0].tolist() == [s.tokens for s in samples if s.question_id == "q3"]
    assert answers.levels == ("0", "0", "1", "1", "2")
    assert answers.subjects == ("odd", None, None, "odd", None)


def test_an_unfinished_evaluation_is_refused_or_cut_to_whole_questions():
    samples = drawn(5, 3)[:-1]
    with pytest.raises(SampleError, match=r"'q4' has 2 of 3 answers.*--resume"):
        collect(samples)
    assert collect(samples, unfinished=True).questions == ("q0", "q1", "q2", "q3")
    with pytest.raises(SampleError, match="'q9' has 0 of 3 answers"):
        collect(drawn(2, 3), ["q0", "q1", "q9"])
    with pytest.raises(SampleError, match="'q1' has 3 of 3"):
        collect(drawn(2, 3), ["q0"])
    for order in (None, ["q0"]):
        with pytest.raises(SampleError, match="there is no sample"):
            collect([], order, unfinished=True)


@pytest.mark.parametrize("draws", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_subsets(draws):
    rows = list(itertools.product([0.0, 1.0], repeat=draws))
    for k in range(1, draws + 1):
        brute = [fmean(max(s) for s in itertools.combinations(row, k)) for row in rows]
        found = pass_at(torch.tensor(rows, dtype=torch.float64), k).tolist()
        assert found == pytest.approx(brute, abs=1e-14)


def test_pass_at_k_holds_where_binomials_overflow():
    correct = torch.zeros(1, 5000, dtype=torch.float64)
    correct[0, :7] = 1
    exact = 1 - math.comb(4993, 1000) / math.comb(5000, 1000)
    assert pass_at(correct, 1000).item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_draws_is_refused(k):
    answers = collect(drawn(2, 2))
    with pytest.raises(ValueError, match=rf"pass@{k}: got 2 answers"):
        pass_at(answers.correct_QK, k)
    with pytest.raises(ValueError, match=rf"maj@{k}: got 2 answers"):
        majority(answers, k)


def brute_majority(predictions, gold):
    votes = Counter(p for p in predictions if p is not None)
    leaders = [p for p in votes if votes[p] == max(votes.values())]
    return sum(p == gold for p in leaders) / max(1, len(leaders))


def test_majority_against_every_vote_of_four():
    """Three predictions and none, all 256 ways, every k: ties share, no vote scores 0."""
    ways = list(itertools.product([None, "1", "2", "3"], repeat=4))
    answers = collect(
        [
            sample(f"{q:03}", k, prediction=p, correct=int(p == "1"))
            for q, way in enumerate(ways)
            for k, p in enumerate(way)
        ]
    )
    brute = {k: [brute_majority(way[:k], "1") for way in ways] for k in range(1, 5)}
    assert {k: majority(answers, k).tolist() for k in brute} == brute
    assert majority(answers).tolist() == brute[4]
    assert {0.0, 1 / 3, 0.5, 1.0} == set(brute[4])


def test_budgets_by_hand():
    answers = collect(
        [
            sample("a", 0, correct=1, tokens=64),
            sample("a", 1, correct=1, tokens=65),
            sample("b", 0, correct=0, tokens=1),
            sample("b", 1, correct=1, tokens=257),
        ]
    )
    assert budgets(answers) == [64, 128, 256, 512]
    assert budget_curve(answers, budgets(answers)) == [
        (64, 0.25),
        (128, 0.5),
        (256, 0.5),
        (512, 0.75),
    ]
    assert budgets(collect([sample("a", 0, tokens=0)])) == [64]
    assert tokens_per_correct(answers) == (64 + 65 + 1 + 257) / 3
    assert tokens_per_correct(collect([sample("a", 0)])) == math.inf


def test_aes_by_hand():
    """Half the tokens at held accuracy is 0.5; a fall weighs five times, a rise three times."""
    number = partial(torch.tensor, dtype=torch.float64)
    base = (number(0.5), number(1000))
    acc, tokens = number([0.5, 0.55, 0.45]), number([500, 1000, 1200])
    expected = [0.5, 3 * 0.1, -0.2 - 5 * 0.1]
    assert aes(acc, tokens, base=base).tolist() == pytest.approx(expected)
    assert aes(acc, tokens, base=base, weights=(1, 5, 10))[2].item() == pytest.approx(-1.2)
    assert not aes(acc, tokens, base=(number(0), number(1000))).isfinite().any()


def test_aes_is_that_of_its_paper():
    """O1-Pruner, table 2, Marco-o1-7B on MATH, GSM8K and GaoKao: base and method, and their AES."""
    number = partial(torch.tensor, dtype=torch.float64)
    base = number([0.738, 0.892, 0.571]), number([1156, 530, 1112])
    acc, tokens = number([0.775, 0.914, 0.616]), number([657, 343, 664])
    found = aes(acc, tokens, base=base)
    assert [round(value, 2) for value in found.tolist()] == [0.58, 0.43, 0.64]
    # Fast-solving prompt on MATH, printed as 0.15: its fall of 3.8 % is added there, by 3.
    prompt = partial(aes, number(0.71), number(1113), base=(base[0][0], base[1][0]))
    assert round(prompt(weights=(1, 3, -3)).item(), 2) == 0.15
    assert round(prompt().item(), 2) == -0.15


def test_groups_measure_their_own_questions():
    samples = drawn(12, 3)
    found = details(collect(samples))
    assert found["subjects"].keys() == {"odd"}
    assert found["levels"].keys() == {"0", "1", "2"}
    for level, part in found["levels"].items():
        own = [s for s in samples if str(s.level) == level]
        assert part == measure({level: collect(own)})["benchmarks"][level]
    assert sum(part["n"] for part in found["levels"].values()) == 36


def test_samples_are_sorted_into_modes_and_benchmarks():
    samples = [*drawn(3, 2), *drawn(4, 1, mode="greedy"), *drawn(2, 2, benchmark="c")]
    found = collect_all(samples)
    sizes = {(m, b): tuple(a.correct_QK.shape) for m, bs in found.items() for b, a in bs.items()}
    assert sizes == {("sampled", "b"): (3, 2), ("sampled", "c"): (2, 2), ("greedy", "b"): (4, 1)}


def test_columns_are_resampled_together(monkeypatch):
    values = torch.rand(50, 1, dtype=torch.float64).repeat(1, 2)
    values[:, 1] = 1 - values[:, 0]
    means = resample(values, torch.Generator().manual_seed(0))
    torch.testing.assert_close(means.sum(dim=1), torch.ones(BOOTSTRAP, dtype=torch.float64))
    monkeypatch.setattr(measures, "CHUNK", 120)
    assert torch.equal(resample(values, torch.Generator().manual_seed(0)), means)


def test_two_evaluations_of_the_same_questions_are_paired():
    """The difference of equal evaluations has no width, however wide each interval is."""
    first, second = ({"b": collect(drawn(30, 2)), "c": collect(drawn(9, 2))} for _ in range(2))
    for one, other in zip(resampled_means(first), resampled_means(second), strict=True):
        assert torch.equal(one, other)
        assert (one.std(dim=1) > 0).all()


def test_intervals_are_of_names_and_questions_alone():
    """Not of the order of either; benchmarks of the same ids are resampled independently."""
    ids = [f"q{q}" for q in range(20)]
    samples = drawn(20, 2), drawn(20, 2, seed=1)
    one = {name: collect(part) for name, part in zip("bc", samples, strict=True)}
    other = {name: collect(part, ids[::-1]) for name, part in zip("cb", samples[::-1], strict=True)}
    assert other["b"].questions != one["b"].questions
    assert measure(one)["benchmarks"] == measure(other)["benchmarks"]
    for key in ("acc_low", "acc_high"):
        assert measure(one)[key] == pytest.approx(measure(other)[key], abs=1e-15)
    same = {name: collect(samples[0]) for name in "bc"}
    accs, _ = resampled_means(same)
    assert not torch.equal(accs[0], accs[1])
    # Correlated resamples would make the mean's interval too wide by sqrt(2).
    assert abs(torch.corrcoef(accs)[0, 1]) < 0.15


def test_intervals_hold_their_numbers():
    """Both aggregations; the interval of accuracy is that of `measure`, drawn from one seed."""
    benchmarks = {"b": collect(drawn(60, 4)), "c": collect(drawn(40, 4, seed=3))}
    found, whole = intervals(benchmarks), measure(benchmarks)
    points = statistics(*question_means(benchmarks))
    pairs = [(part["acc"], part["tokens"]) for part in whole["benchmarks"].values()]
    assert (whole["eps3"], whole["eps3_mean"]) == eps3_mean(pairs)
    parts = [*whole["benchmarks"].values(), whole]
    for row, (name, part) in enumerate(zip(["b", "c", "mean"], parts, strict=True)):
        for key, (low, high) in found[name].items():
            value = part.get(key, part["eps3"])
            assert points[key][row].item() == pytest.approx(value, rel=1e-12)
            assert low < value < high
        assert found[name]["acc"] == (part["acc_low"], part["acc_high"])
    # Each resample against the scalar definitions.
    accs, tokens = resampled_means(benchmarks)
    both = statistics(accs, tokens)
    for r in (0, 17, BOOTSTRAP - 1):
        pairs = list(zip(accs[:, r].tolist(), tokens[:, r].tolist(), strict=True))
        last = both["eps3"][-1, r].item(), both["eps3_mean"][-1, r].item()
        assert last == pytest.approx(eps3_mean(pairs), rel=1e-12)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 evaluations of 100 questions, each right with its own probability, about 95 %."""
    generator, hits = torch.Generator().manual_seed(4), 0
    for trial in range(200):
        chance = torch.rand(100, 1, generator=generator, dtype=torch.float64)
        correct = torch.bernoulli(chance.expand(100, 4), generator=generator)
        draw = torch.Generator().manual_seed(trial)
        low, high = measures.interval(resample(correct.mean(dim=1, keepdim=True), draw)[:, 0])
        hits += low <= 0.5 <= high
    # 190 expected, standard deviation 3.1.
    assert 178 <= hits <= 199

"""Seconds from the records of an evaluation to its numbers, at the size of MMLU-Pro.

    python benchmarks/evaluation_bench.py             # 12,032 questions once, and 12,500 x 8

The records are synthetic: MMLU-Pro's 14 subjects, ten letters, thoughts of 200 to 2,000 tokens.
Read: the file, checked line by line. Measured: all of `measure`, `details` and both intervals.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vpgea_fast.evaluation.measures import collect_all, details, intervals, measure
from vpgea_fast.evaluation.records import SAMPLES, Sample, line, read_samples

SIZES = ((12_032, 1), (12_500, 8))
"""Questions and answers of each."""


def synthetic(questions: int, draws: int, tokens: tuple[int, int]) -> Iterator[Sample]:
    rng = random.Random(0)
    for number in range(questions):
        gold, chance = rng.choice("ABCDEFGHIJ"), rng.random()
        for index in range(draws):
            correct = int(rng.random() < chance)
            ids = tuple(rng.choices(range(150_000), k=rng.randint(*tokens)))
            yield Sample(
                benchmark="mmlu_pro",
                mode="sampled",
                question_id=f"{number}",
                index=index,
                seed=rng.getrandbits(62),
                ids=ids,
                # Four characters a token, as English has.
                text="word" * len(ids),
                answer_text="The answer is \\boxed{A}.",
                prediction=gold if correct else rng.choice("ABCDEFGHIJ"),
                gold=gold,
                tokens=len(ids),
                thought_tokens=len(ids) - 8,
                finish="stop",
                correct=correct,
                subject=f"subject {number % 14}",
            )


def time_one(questions: int, draws: int, tokens: tuple[int, int]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SAMPLES
        with path.open("w") as file:
            file.writelines(map(line, synthetic(questions, draws, tokens)))
        size, begin = path.stat().st_size, time.perf_counter()
        benchmarks = collect_all(read_samples(path))["sampled"]
        read = time.perf_counter()
        measure(benchmarks)
        intervals(benchmarks)
        for answers in benchmarks.values():
            details(answers)
        done = time.perf_counter()
    return {"megabytes": size / 1e6, "read_s": read - begin, "measure_s": done - read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", metavar="QUESTIONSxDRAWS", help="default: both")
    parser.add_argument("--tokens", default="200:2000", help="fewest:most of an answer")
    args = parser.parse_args()
    sizes = [tuple(map(int, s.split("x"))) for s in args.sizes] if args.sizes else SIZES
    low, high = map(int, args.tokens.split(":"))
    print(
        f"{'records':>10}{'MB':>8}{'read s':>9}{'measure s':>11}  {torch.get_num_threads()} threads"
    )
    for questions, draws in sizes:
        found = time_one(questions, draws, (low, high))
        print(
            f"{questions * draws:>10,}{found['megabytes']:>8.0f}{found['read_s']:>9.1f}"
            f"{found['measure_s']:>11.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Which questions a step works on: a pure function of (seed, step, round), so there is no state."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from vpgea_fast.config import Config
from vpgea_fast.data.files import DataError


class Filed(Protocol):
    """What a mixture asks of a question: the name of its file."""

    @property
    def file(self) -> str: ...


Item = TypeVar("Item", bound=Filed)


def step_questions(
    questions: Sequence[Item],
    *,
    seed: int | str,
    step: int,
    batch: int,
    weights: Mapping[str, float] | None = None,
    rest: bool = False,
) -> list[Item]:
    """The questions of step 0, 1, ...: a pure function of its arguments, so there is no state.

    An epoch is a permutation drawn from (seed, epoch) and cut into floor(n / batch) batches. The
    n mod batch questions at its end sit that epoch out, so that no batch holds a question twice.
    With `rest` they are a last, smaller batch. With `weights` (of files, by name) every file has
    its share of each step and epochs of its own.
    """
    # Each file has a seed and epochs of its own: a changed weight reorders no other file.
    if weights is not None:
        shares = step_shares(weights, batch)
        files = {name: [q for q in questions if q.file == name] for name in shares}
        for name, count in shares.items():
            if count > len(files[name]):
                raise DataError(
                    f"data.train: by its weight {name!r} gives {count} questions a step and holds "
                    f"{len(files[name])}; lower its weight, or train.questions_per_step"
                )
        return [
            item
            for name, count in shares.items()
            for item in step_questions(files[name], seed=f"{seed}/{name}", step=step, batch=count)
        ]
    if not 1 <= batch <= len(questions):
        raise DataError(
            f"a step takes {batch} questions and the data set holds {len(questions)}; set "
            f"train.questions_per_step to 1..{len(questions)}, or give more data"
        )
    # Each permutation leaves out others, so no question stays out for good.
    epoch, index = divmod(step, -(-len(questions) // batch) if rest else len(questions) // batch)
    order = _permutation(f"{seed}/{epoch}", len(questions))
    return [questions[i] for i in order[index * batch : (index + 1) * batch]]


@functools.lru_cache(maxsize=8)
def _permutation(seed: str, count: int) -> tuple[int, ...]:
    # Drawn from its seed whenever it is asked for: no state to save, and a resumed run needs none.
    order = list(range(count))
    random.Random(seed).shuffle(order)  # 40,000 questions: 20 ms
    return tuple(order)


def round_questions(
    cfg: Config, questions: Sequence[Item], *, step: int, round_: int = 0
) -> list[Item]:
    """The questions of a step of a run, or those of a later round, which may replace some."""
    return step_questions(
        questions,
        seed=f"{cfg.run.seed}/{round_}",
        step=step,
        batch=cfg.train.questions_per_step,
        weights=cfg.data.weights,
        # A record that lacks a question would end the run that reads it.
        rest=cfg.train.record is not None,
    )


def step_shares(weights: Mapping[str, float], batch: int) -> dict[str, int]:
    """How many of a step's questions come from each file: largest remainders, so the same at every
    step, and each within one question of its share.

    >>> step_shares({"gsm8k": 3, "math": 1}, 6)
    {'gsm8k': 5, 'math': 1}
    """
    total = sum(weights.values())
    exact = {name: batch * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    # Hamilton's method: the questions that rounding down left go to the largest remainders.
    rest = sorted(exact, key=lambda name: shares[name] - exact[name])  # stable: ties by order
    for name in rest[: batch - sum(shares.values())]:
        shares[name] += 1
    # A file that gives nothing would be left out of the training in silence.
    none = next((name for name, count in shares.items() if count == 0), None)
    if none is not None:
        raise DataError(
            f"data.train: of {batch} questions a step {none!r} would give none by its weight "
            f"({exact[none]:.2g}); raise its weight, or train.questions_per_step"
        )
    return shares

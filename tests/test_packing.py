"""Rows -> packed batches: nothing lost, nothing padded, nothing cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vpgea_fast.packing import drop_zero_rows, pack, pack_rows, plan_batches
from vpgea_fast.types import TrainRow


def row(context, tokens, coef=1.0):
    coefs = torch.full((len(tokens),), coef, dtype=torch.float64)
    return TrainRow(torch.tensor(context), torch.tensor(tokens), coefs, "prior", "student")


def test_two_rows_by_hand():
    batch = pack_rows([row([1, 5], [4, 9], 0.5), row([7], [8], -2.0)])
    assert batch.input_ids.tolist() == [1, 5, 4, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.seqlens == (3, 1)
    assert batch.logit_index.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [4, 9, 8]
    assert batch.coef.tolist() == [0.5, 0.5, -2.0]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 64))
def test_a_plan_holds_every_row_once_within_the_budget(lengths, budget):
    plan = plan_batches(lengths, budget)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    # first-fit: no two batches could have been one
    totals = sorted(sum(lengths[i] for i in batch) for batch in plan)
    assert len(totals) < 2 or totals[0] + totals[1] > budget


def test_a_row_longer_than_the_budget_is_alone_and_whole():
    rows = [row([1], list(range(20))), row([1], [2])]
    (long, members), (short, _) = pack(rows, budget=4)
    assert members == [0]
    assert long.targets.tolist() == list(range(20))
    assert short.seqlens == (1,)


def test_rows_without_a_coefficient_do_not_exist():
    kept = row([1], [2, 3], 0.1)
    partly = TrainRow(
        torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([0.0, 1.0]), "prior", "student"
    )
    assert drop_zero_rows([row([1], [2], 0.0), kept, row([1], []), partly]) == [kept, partly]


@pytest.mark.parametrize("bad", [row([], [1]), row([1], [])])
def test_an_empty_row_is_refused(bad):
    with pytest.raises(
        ValueError, match="row 1: expected at least one context token and one token"
    ):
        pack_rows([row([1], [2]), bad])


def test_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="expected at least 1 token, got 0"):
        plan_batches([1], 0)

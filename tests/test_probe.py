"""When the probe of a hand-over stops a run, and when it must not: log-probs by hand, and a run."""

import json
from pathlib import Path

import pytest
import torch

from vpgea_fast import config
from vpgea_fast.rollout.engine import RolloutError, Usage
from vpgea_fast.rollout.probe import TOKENS, SyncProbe
from vpgea_fast.trainer import fit
from vpgea_fast.types import Path as DrawnPath

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
ULP = 2.0**-24  # of a float32 log-prob between 0.5 and 1
PROMPTS = [torch.tensor([1, 2]), torch.tensor([1, 2, 3])]
NONE = torch.zeros(0, dtype=torch.int64)


class Sides:
    """Both sides of a probe: log-probs (engines, prompts, tokens) that a test moves as it likes."""

    def __init__(self, engines=1, dtype=torch.float32, tolerance=None, apart=None):
        shape = (engines, len(PROMPTS), TOKENS)
        generator = torch.Generator().manual_seed(0)
        self.trainer = -0.5 - 0.4 * torch.rand(shape, generator=generator)
        self.drawn = self.trainer + ULP * torch.randint(-4, 5, shape, generator=generator)
        self.ids = torch.zeros(shape, dtype=torch.int64)
        self.apart = apart  # how far another policy's log-probs are from these; None: there is none
        self.probe = SyncProbe(
            self,  # type: ignore[arg-type]
            self.score,
            PROMPTS,
            engines=engines,
            limit=100,
            dtype=dtype,
            tolerance=tolerance,
            policies=("policy",) if apart is None else ("policy", "posterior"),
        )
        self.probe()

    def score(self, rows):
        own = [*self.trainer.flatten(0, 1)]
        moved = {"policy": 0.0, "posterior": self.apart}
        return [logps + moved[row.who] for logps, row in zip(own * 2, rows, strict=False)]

    def generate(self, requests, _):
        columns = zip(requests, self.ids.flatten(0, 1), self.drawn.flatten(0, 1), strict=True)
        return [
            DrawnPath(
                question_id=r.question_id,
                stream=r.stream,
                index=r.index,
                z_ids=ids,
                logps=logps,
                answer_ids=NONE,
                closed=False,
                finish="length",
            )
            for r, ids, logps in columns
        ]

    def usage(self):
        return Usage()


def noise(like, size):
    return size * (torch.rand(like.shape, generator=torch.Generator().manual_seed(1)) - 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trainer_may_round_otherwise_while_the_engine_stands_still(dtype):
    """A rounding to and fro at every probe, in one engine's log-probs none: no sum of them."""
    sides = Sides(dtype=dtype)
    size = {torch.float32: 8 * ULP, torch.bfloat16: 0.01}[dtype]
    still = sides.trainer.clone()
    for step in range(50):
        sides.trainer = still + (-1) ** step * noise(still, size)
        assert sides.probe()["probe_mean"] > 0


def test_a_skip_is_found_where_the_tolerance_does_not_see_it():
    sides = Sides()
    sides.trainer = sides.trainer - 1e-5
    with pytest.raises(RolloutError, match=r"engine of process 0 did not take over .*same bits"):
        sides.probe()


def test_a_skip_is_found_in_bfloat16_below_the_tolerance():
    sides = Sides(dtype=torch.bfloat16)
    sides.trainer = sides.trainer - 0.01
    with pytest.raises(RolloutError, match=r"moved since by a mean of 0\.01, .* explains 0\.006"):
        sides.probe()


def test_the_rule_scales_with_the_gap_of_engine_and_trainer():
    """A gap of 1e-5: a move of 3e-5 may be rounding, one of 5e-5 may not."""
    sides = Sides()
    sides.drawn = sides.trainer + 1e-5
    sides.probe()
    sides.trainer = sides.trainer - 3e-5
    sides.probe()
    sides.trainer = sides.trainer - 2e-5
    with pytest.raises(RolloutError, match="same bits"):
        sides.probe()


def test_quiet_updates_add_up_until_the_skip_shows():
    """1e-6 a step: 8 eps of float32 are 0.95e-6, so 4 of them are passed at the fourth."""
    sides = Sides()
    for _ in range(3):
        sides.trainer = sides.trainer - 1e-6
        sides.probe()
    sides.trainer = sides.trainer - 1e-6
    with pytest.raises(RolloutError, match="same bits"):
        sides.probe()


def test_an_engine_that_follows_late_starts_the_count_anew():
    """Three quiet skips, a hand-over that arrives, three more: the engine was right in between."""
    sides = Sides()
    for _ in range(3):
        for _ in range(3):
            sides.trainer = sides.trainer - 1e-6
            sides.probe()
        sides.drawn = sides.trainer + ULP
        sides.probe()


def test_new_tokens_are_new_bits():
    sides = Sides()
    sides.trainer = sides.trainer - 1e-5
    sides.ids = sides.ids + 1
    sides.probe()


def test_one_engine_of_two_is_named():
    """And no request of the other one excuses it."""
    sides = Sides(engines=2)
    sides.trainer = sides.trainer - 1e-5
    sides.drawn = torch.stack([sides.drawn[0] - 1e-5, sides.drawn[1]])
    with pytest.raises(RolloutError, match="engine of process 1 did not"):
        sides.probe()


def test_one_request_of_the_same_bits_is_no_skip():
    """What stopped healthy runs: the engine's other prompt has moved with the trainer's."""
    sides = Sides()
    sides.trainer = sides.trainer - 1e-5
    sides.drawn = torch.stack([sides.drawn[0, 0], sides.drawn[0, 1] - 1e-5])[None]
    sides.probe()


def test_a_gap_above_the_tolerance_is_a_partial_hand_over():
    for tolerance, allowed in ((None, "0.0001"), (2e-4, "0.0002")):
        sides = Sides(tolerance=tolerance)
        sides.drawn = sides.trainer + 3e-4
        with pytest.raises(RolloutError, match=f"engine and trainer disagree.*allowed {allowed}"):
            sides.probe()


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 2e-5), (torch.bfloat16, 0.02)])
def test_a_swapped_engine_is_found_below_the_tolerance(dtype, apart):
    """Of two policies that are hardly apart; whose weights are there is what counts, at each."""
    sides = Sides(engines=2, dtype=dtype, apart=apart)
    right = sides.drawn
    sides.drawn = torch.stack([right[0], right[1] + apart])
    with pytest.raises(
        RolloutError, match="process 1 has the weights of the posterior where those"
    ):
        sides.probe("policy")
    sides.drawn = right + apart
    assert sides.probe("posterior")["probe_mean"] < apart
    sides.drawn = torch.stack([right[0], right[1] + apart])
    with pytest.raises(
        RolloutError, match="process 0 has the weights of the policy where those of"
    ):
        sides.probe("posterior")


def test_two_policies_within_a_rounding_are_not_told_apart_and_each_has_its_own_baseline():
    sides = Sides(apart=ULP)
    for who in ("policy", "posterior", "policy", "posterior"):
        sides.probe(who)
    # The policy moves and its engine follows; the posterior's bits are those of its own probe.
    sides.trainer = sides.trainer - 1e-5
    sides.drawn = sides.drawn - 1e-5
    sides.probe("policy")
    sides.drawn = sides.drawn + 1e-5
    with pytest.raises(RolloutError, match="same bits"):
        sides.probe("posterior")


@pytest.mark.slow
def test_a_rate_that_moves_less_than_a_rounding_is_healthy(tiny_words, tmp_path):
    """Forty steps at 1e-8: the trainer's log-probs move by an ulp here and there, the engine's (a
    copy of the sharded model) elsewhere."""
    words = tiny_words(
        {
            "parallel.shard": "always",
            "optim.lr": 1e-8,
            "train.steps": 40,
            "train.questions_per_step": 2,
            "objective.group_size": 4,
            "objective.prior_samples": 2,
            "metrics.compare": "null",
            "metrics.diag_every": 0,
            "checkpoint.export": "false",
        }
    )
    assert fit(config.load(TINY, words("run")))
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(records) == 40
    assert max(json.loads(line)["probe_max"] for line in records) < 1e-4

"""The step's numbers by hand."""

import math
from dataclasses import replace

import pytest
import torch
from batches import prompted, sampled, scored, weights_of, whole

from vpgea_fast import diagnostics
from vpgea_fast.losses import vpgea_loss
from vpgea_fast.metrics import ModelFlops
from vpgea_fast.objectives import Vpgea
from vpgea_fast.rows import Scale, build_rows
from vpgea_fast.scoring import score_row
from vpgea_fast.types import Attempt, TrainRow

ids = torch.tensor


def path(stream, i, length, closed=True):
    return sampled(
        torch.arange(length) + 20,
        stream=stream,
        index=i,
        logps=torch.full((length,), -0.5),
        answer_ids=ids([1, 2]),
        closed=closed,
    )


@pytest.fixture
def batch():
    question = prompted(student=[3, 4], teacher=[3, 4, 5], cue=[6], target=[7])
    posterior = ((path("posterior", 0, 4), path("posterior", 1, 8, closed=False)),)
    prior = ((path("prior", 0, 10), path("prior", 1, 6)),)
    return whole(
        [question],
        scored(posterior, [[-1.0, -3.0]], correct=[[1, 0]]),
        scored(prior, [[-2.0, -4.0]], correct=[[0, 1]]),
    )


def test_lengths_utilities_and_accuracies(batch):
    metrics = diagnostics.batch_metrics(batch)
    assert (metrics["len_prior"], metrics["len_post"]) == (8.0, 6.0)
    assert (metrics["trunc_prior"], metrics["trunc_post"]) == (0.0, 0.5)
    assert (metrics["u_prior"], metrics["u_post"], metrics["u_post_p50"]) == (-3.0, -2.0, -2.0)
    assert (metrics["acc_student"], metrics["acc_teacher"]) == (0.5, 0.5)
    assert metrics["eps3_student"] == pytest.approx(50.0**2 / 10)  # 8 thought and 2 answer tokens


def test_nothing_is_claimed_about_answers_that_were_not_verified(batch):
    unknown = torch.full((1, 2), math.nan, dtype=torch.float64)
    metrics = diagnostics.batch_metrics(
        replace(batch, prior=replace(batch.prior, correct_BP=unknown))
    )
    assert "acc_student" not in metrics
    assert "eps3_student" not in metrics


def test_view_divergence_and_elbo(batch):
    # log q is -0.5 a token; the first path is 1 nat a token less likely for the student, the second
    # has one token of 6 nats
    teacher = [torch.tensor([[-0.5] * n, [0.25] * n]) for n in (4, 8)]
    student = [torch.tensor([[-1.5] * 4, [1.0] * 4]), torch.tensor([[-0.5] * 8, [0.4] * 8])]
    student[1][0, 3] = -6.5
    coefs = Vpgea(alpha=0.5).terms(batch, {})
    values = coefs.path_scores["posterior"]["log_utility"]
    metrics = diagnostics.view_divergence(teacher, student, values)
    assert metrics["entropy_teacher"] == pytest.approx(0.25)
    assert metrics["entropy_student"] == pytest.approx((4 * 1.0 + 8 * 0.4) / 12)
    assert metrics["kl_q_pi"] == pytest.approx((4 + 6) / 12)
    assert metrics["kl_q_pi_max"] == pytest.approx(6.0)
    assert metrics["hint_token_rate"] == 0.0
    log_eta = [0.5 * math.log(8 / 4), 0.5 * math.log(8 / 8)]
    assert metrics["elbo"] == pytest.approx(
        ((-1 + log_eta[0]) + (-3 + log_eta[1])) / 2 - (4 + 6) / 2
    )


def test_the_elbo_has_the_alpha_that_made_the_utilities(batch):
    """At alpha = 0 there is no length in it; a schedule of alpha has nobody else to tell."""
    same = [torch.zeros(2, n) for n in (4, 8)]
    for alpha, expected in ((0.0, -2.0), (1.0, -2.0 + 0.5 * math.log(2))):
        coefs = Vpgea(alpha=alpha).terms(batch, {})
        values = coefs.path_scores["posterior"]["log_utility"]
        elbo = diagnostics.view_divergence(same, same, values)["elbo"]
        assert elbo == pytest.approx(expected, abs=1e-14)


def test_a_switch_of_mode_is_no_hint_token_and_a_spelled_answer_is():
    """10 tokens a path; gaps above 5 nats: one in the first path, three in the second."""
    teacher, student = torch.zeros(2, 2, 10), torch.zeros(2, 2, 10)
    student[0, 0, 0], student[1, 0, 2:5] = -12.0, -6.0
    student[1, 0, 7] = -5.0  # not above
    rate = diagnostics.view_divergence([*teacher], [*student], torch.zeros(1, 2))["hint_token_rate"]
    assert rate == 2 / 20
    only = diagnostics.view_divergence([teacher[0]], [student[0]], torch.zeros(1, 1))
    assert (only["hint_token_rate"], only["kl_q_pi_max"]) == (0.0, 12.0)


def test_a_nan_log_prob_is_not_hidden_by_a_maximum():
    student = torch.zeros(2, 4)
    student[0, 2] = math.nan
    with pytest.raises(ValueError, match="expected finite values"):
        diagnostics.view_divergence([torch.zeros(2, 4)], [student], torch.zeros(1, 1))


def test_early_answers_are_found_in_the_first_fifth(batch):
    # answer "7": the first path has no first fifth, the second one of one token
    assert diagnostics.early_answer_rate(batch, lambda z: "so 17" if z.numel() else "") == 0.5
    assert diagnostics.early_answer_rate(batch, lambda z: str(z.tolist())) == 0.0


def test_row_metrics_split_the_loss_and_see_the_mismatch():
    coef = torch.tensor([-2.0, -2.0], dtype=torch.float64)
    drawn = torch.tensor([-1.0, -1.0])
    ids_of = {"context_ids": ids([1]), "token_ids": ids([2, 3])}
    both = {**ids_of, "stream": "posterior", "sample_logps": drawn}
    own = TrainRow(**both, coef=coef, view="teacher")
    distilled = TrainRow(**both, coef=coef / 2, view="student", term="distill", distilled=True)
    metrics = diagnostics.row_metrics(
        [own, distilled], [ids([-1.0, -1.25]).double(), ids([-3.0, -4.0]).double()]
    )
    assert metrics["loss_pg"] == pytest.approx(-2 * -2.25)
    assert metrics["loss_distill"] == pytest.approx(-1 * (-7.0 - -2.0))  # the sampler's log q
    assert metrics["loss"] == pytest.approx(4.5 + 5.0)
    assert metrics["mismatch_max"] == pytest.approx(0.25)
    assert metrics["mismatch_mean"] == pytest.approx((1 + math.exp(0.25)) / 2)
    ratios = (metrics["mismatch_ratio_min"], metrics["mismatch_ratio_max"])
    assert ratios == pytest.approx((math.exp(-0.25), 1.0))
    assert metrics["mismatch_outside"] == 0.5
    assert metrics["kl_gated"] == pytest.approx((2 + 3) / 2)


@pytest.mark.parametrize("norm", ["seq_sum", "const", "seq_mean", "token_mean"])
@pytest.mark.parametrize("gate", ["indicator", "relu"])
def test_the_logged_loss_is_that_of_vpgea_loss(norm, gate):
    """The same paths, float64: 1e-12, some hundred roundings of path log-probs of 20 nats."""
    generator = torch.Generator().manual_seed(5)
    lengths, beta, constant, vocabulary = ((4, 7, 2), (5, 3, 9)), 0.7, 6.0, 11
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    batch = random_batch(lengths, draw, vocabulary)
    cfg = Vpgea(beta=beta, gate=gate)
    coefs = cfg.terms(batch, {})
    advantage_S = -weights_of(coefs)["posterior", "teacher"].flatten()
    assert (advantage_S > 0).any()
    rows = build_rows(batch, coefs, Scale(norm=norm, constant=constant))
    length_S = ids(lengths).flatten()
    hidden = {view: draw(int(length_S.sum()), 8) for view in ("teacher", "student")}
    weight_VD = draw(vocabulary, 8)
    tokens = torch.cat([path.z_ids for _, path in batch.pairs("posterior")])
    places = torch.arange(tokens.numel()).split(length_S.tolist())

    def logged(views):
        logps = []
        for row in rows:
            assert row.path is not None
            at = places[3 * int(row.path[0]) + row.path[2]]
            logits = views[row.view][at] @ weight_VD.T
            logps.append(logits.log_softmax(1).gather(1, row.token_ids[:, None])[:, 0])
        return diagnostics.row_metrics(rows, logps)

    paths = length_S.numel()
    weight_S = {
        "seq_sum": torch.full((paths,), 1 / paths, dtype=torch.float64),
        "const": torch.full((paths,), 1 / (paths * constant), dtype=torch.float64),
        "seq_mean": 1 / (paths * length_S.double()),
        "token_mean": torch.full((paths,), 1 / int(length_S.sum()), dtype=torch.float64),
    }[norm]
    # relu: the distillation weighs beta A where the indicator has beta; one path at a time
    expected = [
        vpgea_loss(
            hidden["teacher"][at],
            hidden["student"][at],
            weight_VD,
            tokens[at],
            ids([0, at.numel()]),
            advantage_S[s : s + 1],
            weight_S=weight_S[s : s + 1],
            beta=beta * (max(0.0, advantage_S[s].item()) if gate == "relu" else 1.0),
        )
        for s, at in enumerate(places)
    ]
    relu = [max(0.0, a) if gate == "relu" else 1.0 for a in advantage_S.tolist()]
    metrics = logged(hidden)
    parts = {
        "loss": sum(e.loss.item() for e in expected),
        "loss_pg": sum(e.pg_loss.item() for e in expected),
        "loss_distill": sum(
            beta * r * e.distill_loss.item() for e, r in zip(expected, relu, strict=True)
        ),
    }
    assert {key: metrics[key] for key in parts} == pytest.approx(parts, rel=1e-12, abs=1e-12)
    assert logged(dict.fromkeys(hidden, hidden["teacher"]))["loss_distill"] == 0.0


def random_batch(lengths, draw, vocabulary):
    """Questions named 0, 1, ... whose sampler has other log-probs than any trainer."""

    def groups(stream):
        def one(b, i, n):
            z = draw(n, vocabulary).argmax(1)
            logps = draw(n) - 3
            return sampled(z, question_id=str(b), stream=stream, index=i, logps=logps)

        return tuple(
            tuple(one(b, i, n) for i, n in enumerate(row)) for b, row in enumerate(lengths)
        )

    def question(b):
        return prompted(str(b), student=[3, 4], teacher=[3, 4, 5], cue=[6], target=[7])

    posterior, prior = groups("posterior"), groups("prior")
    shape = len(lengths), len(lengths[0])
    return whole(
        [question(b) for b in range(len(lengths))],
        scored(posterior, draw(*shape)),
        scored(prior, draw(*shape) - 1),
    )


def test_a_distilled_row_without_its_own_log_probs_has_no_loss():
    row = TrainRow(
        context_ids=ids([1]),
        token_ids=ids([2, 3]),
        coef=-torch.ones(2),
        stream="posterior",
        view="student",
        distilled=True,
    )
    with pytest.raises(ValueError, match="posterior path in the student view alone"):
        diagnostics.row_metrics([row], [torch.zeros(2)])
    assert diagnostics.row_metrics([], []) == {"loss": 0.0, "loss_pg": 0.0, "loss_distill": 0.0}


def test_the_loss_of_a_distilled_row_whose_sampler_is_not_known_is_no_number():
    """Without its constant it would be another formula's, under the same name."""
    rows = [
        TrainRow(
            context_ids=ids([1]),
            token_ids=ids([2, 3]),
            coef=-torch.ones(2),
            stream="posterior",
            view="student",
            term="distill",
            distilled=True,
            sample_logps=torch.tensor([-1.0, last]),
        )
        for last in (-1.0, math.nan)
    ]
    metrics = diagnostics.row_metrics(rows, [torch.tensor([-2.0, -2.5])] * 2)
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["loss_distill"])
    assert (metrics["loss_pg"], metrics["kl_gated"]) == (0.0, 1.25)


def test_tokens_trained_and_gated_off_add_up(batch):
    coefs = Vpgea().terms(batch, {})
    rows = build_rows(batch, coefs, Scale())
    work = diagnostics.work_metrics(batch, coefs, rows, seconds={"time_train_s": 2.0})
    assert work["tokens_per_s"] == (work["tokens_generated"] + work["tokens_trained"]) / 2
    assert work["tokens_generated"] == (4 + 8 + 10 + 6) + 4 * 2
    # teacher view 3 + 4 and 3 + 8, student view 2 + 4; gated off: 2 + 8
    assert (work["tokens_trained"], work["tokens_gated_off"]) == (7 + 11 + 6, 10)


def test_speed_of_an_update_by_hand():
    flops = ModelFlops(decoder=10, head=2, width=1)
    rows = [score_row(ids([1] * 3), ids([2] * n)) for n in (2, 5)]
    # 3 + n - 1 tokens go through the decoder, n through the head
    done = 6 * (10 * 4 + 2 * 2 + 4**2) + 6 * (10 * 7 + 2 * 5 + 7**2)
    speed = diagnostics.speed_metrics(rows, flops, seconds=2.0, device="NVIDIA H200", devices=4)
    assert speed["train_tokens_per_s"] == (5 + 8) / 2
    assert speed["mfu"] == pytest.approx(done / (2 * 4 * 989.5e12), rel=1e-12)
    assert (
        diagnostics.speed_metrics(rows, flops, seconds=2.0, device="cpu", devices=1)["mfu"] is None
    )
    plan = diagnostics.plan_metrics([[[0], [1]], [[], []]], rows, flops)
    assert (plan["plan_rounds"], plan["plan_dummy_tokens"]) == (2, 2)
    assert plan["plan_flops_imbalance"] == 2.0


ANSWERS = [([7], True), ([8, 1], False), ([7], True)]


def test_path_records_hold_scores_and_ids(batch):
    coefs = Vpgea().terms(batch, {})
    # The second has answers behind its thought: three, two of them alike.
    made = [Attempt(ids=torch.tensor(ids), right=right) for ids, right in ANSWERS]
    first = replace(batch.prior.paths[0][0], attempts=tuple(made))
    paths = ((first, *batch.prior.paths[0][1:]), *batch.prior.paths[1:])
    batch = replace(batch, prior=replace(batch.prior, paths=paths))
    asked = {"step": 3, "limit": 1, "temperature": 0.5, "answer_temperature": 0.7}
    records = diagnostics.path_records(batch, coefs, lambda z: f"<{z.numel()}>", **asked)
    assert [r["temperature"] for r in records] == [0.5, 0.5]
    names = ("attempt_ids", "attempt_right", "attempts", "answer_temperature")
    assert [records[1][name] for name in names] == [[[7], [8, 1]], [True, False], [0, 1, 0], 0.7]
    assert not {*names} & records[0].keys()
    assert [(r["stream"], r["length"], r["correct"], r["text"], r["answer"]) for r in records] == [
        ("posterior", 4, True, "<4>", "<2>"),
        ("prior", 10, False, "<10>", "<2>"),
    ]
    assert records[0]["ids"] == [20, 21, 22, 23]
    assert records[0]["advantage"] == pytest.approx(1.0, abs=1e-5)
    assert records[0]["reward"] == pytest.approx(2.0)

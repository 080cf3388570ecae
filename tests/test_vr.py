"""Variational Reasoning (arXiv 2509.22637) against its formulas: every update of a real trainer,
and bounds, weights and variances by enumeration."""

import itertools
import json
import math
import random
import re
from dataclasses import fields, replace
from pathlib import Path

import oracle
import pytest
import torch
from batches import losing, prompted, sampled, scored, whole
from ranks import run_ranks
from runs import ONE_UPDATE
from test_formulas import EPOCHS, PARTS, TINY, B, C, P, gaps, logps_of

from vpgea_fast import config
from vpgea_fast.check import unread_keys
from vpgea_fast.cli import main
from vpgea_fast.config.inputs import TEACHERS
from vpgea_fast.intake import ALONE, open_text, read
from vpgea_fast.objectives import Keys, Vr, VrPhi, VrTheta, check_terms
from vpgea_fast.objectives.bounds import log_mean, shares
from vpgea_fast.objectives.guards import VIEWS, views
from vpgea_fast.rows import Scale, build_rows
from vpgea_fast.tiny import make_tiny
from vpgea_fast.trainer import Trainer
from vpgea_fast.types import Attempt
from vpgea_fast.updates import plain, revived

ids = torch.tensor
J = 3


class Variational:
    """The loss of one update of a step, as the paper writes it: over full logits, with nothing of
    the trainer's but token ids, verdicts and weights."""

    def __init__(self, cfg, batch, model, *_, **_place):
        self.keys, self.batch = cfg.objective, batch
        self.temperature, self.updates = cfg.rollout.temperature, cfg.train.minibatches
        name = self.keys.name
        self.parts = [self.theta] * (name != "vr_phi") + [self.phi] * (name != "vr_theta")
        with torch.no_grad():
            if self.theta in self.parts:
                self.weights = [self.shares(model, b) for b in range(B)]
            if self.phi in self.parts:
                self.learn(model)

    def thought(self, model, b, path, view):
        question = self.batch.questions[b]
        context = question.student_ids if view == "student" else question.teacher_ids
        return logps_of(model, context, path.z_ids, self.temperature)

    def reference_answer(self, model, b, path):
        question = self.batch.questions[b]
        context = torch.cat([question.student_ids, path.z_ids, question.cue_ids])
        return logps_of(model, context, question.target_ids)

    def right_answers(self, model, b, path):
        """log p of each sampled answer that is right."""
        context = torch.cat([self.batch.questions[b].student_ids, path.z_ids])
        right = [a.ids for a in path.attempts if a.right]
        return [logps_of(model, context, ids, self.temperature).sum() for ids in right]

    def factor(self, model, b, path):
        """f of a path."""
        if not path.closed:
            return 0.0
        if self.keys.estimator == "accuracy":
            assert len(path.attempts) == J
            return sum(a.right for a in path.attempts) / J
        log_y = self.reference_answer(model, b, path)
        return float((log_y.sum() if self.keys.estimator == "likelihood" else log_y.mean()).exp())

    def ratio(self, model, b, path):
        """log pi - log q, with the gradient of pi."""
        log_pi, log_q = (self.thought(model, b, path, view) for view in ("student", "teacher"))
        gap = log_pi - log_q.detach()
        return gap.sum() if self.keys.thought_ratio == "exact" else gap.mean()

    def shares(self, model, b):
        """Self-normalised weights; divided by the largest before they are numbers."""
        paths = self.batch.posterior.paths[b]
        factors = [self.factor(model, b, path) for path in paths]
        logs = [float(self.ratio(model, b, path)) for path in paths]
        rho = [f * math.exp(log - max(logs)) for f, log in zip(factors, logs, strict=True)]
        return [r / sum(rho) if sum(rho) else 0.0 for r in rho]

    def learn(self, model):
        """What each path of phi is worth to it, and its log-probs under the first policy."""
        forward = self.keys.phi == "forward_kl"
        stream = self.batch.prior if forward else self.batch.posterior
        gains = {"forward_kl": self.forward, "reverse_kl": self.reverse, "iwae": self.bound}
        self.own = []
        for b, paths in enumerate(stream.paths):
            worth = gains[self.keys.phi](model, b, paths)
            old = [self.thought(model, b, path, "teacher") for path in paths]
            self.own.append(list(zip(paths, worth, old, strict=True)))

    def forward(self, model, b, paths):
        factors = [self.factor(model, b, path) for path in paths]
        return [f / sum(factors) if sum(factors) else 0.0 for f in factors]

    def reverse(self, model, b, paths):
        """The integrand of the ELBO, against the others of the question; a mean over paths."""
        floor = math.exp(self.keys.u_min)
        logs = [
            math.log(max(self.factor(model, b, path), floor)) + float(self.ratio(model, b, path))
            for path in paths
        ]
        return [(own - (sum(logs) - own) / (P - 1)) / P for own in logs]

    def bound(self, model, b, paths):
        """log (1/K) sum rho - rho_k / sum rho, divided by the largest as `shares` is."""
        factors = [self.factor(model, b, path) for path in paths]
        logs = [float(self.ratio(model, b, path)) for path in paths]
        rho = [f * math.exp(log - max(logs)) for f, log in zip(factors, logs, strict=True)]
        if not sum(rho):
            return [0.0] * P
        log_mean = max(logs) + math.log(sum(rho) / P)
        return [log_mean - r / sum(rho) for r in rho]

    def loss(self, model, part, found):
        losses = [p.sum() * 0 for p in model.parameters()]
        for b in range(part * B // self.updates, (part + 1) * B // self.updates):
            if self.batch.lost_B[b]:
                found["kinds"].add("lost")
                continue
            for term in self.parts:
                losses += term(model, b, found)
        return self.updates / (B * C) * torch.stack(losses).sum()

    def theta(self, model, b, found):
        if not any(self.weights[b]):
            found["kinds"].add("skipped")
        for path, weight in zip(self.batch.posterior.paths[b], self.weights[b], strict=True):
            if not weight:
                found["kinds"].add("none is right" if path.closed else "cut")
                continue
            found["kinds"].add("weighed" if weight < 1 else "alone")
            answers = self.right_answers(model, b, path)
            if not self.keys.trains_sampled:
                answers = [self.reference_answer(model, b, path).sum()]
            answer = sum(answers) / len(answers)
            yield -weight * (self.thought(model, b, path, "student").sum() + answer)

    def phi(self, model, b, found):
        share = getattr(self.keys, "phi_weight", 1.0)
        for path, worth, old in self.own[b]:
            if not worth:
                found["kinds"].add("unused")
                continue
            found["kinds"].add("learnt" if worth > 0 else "unlearnt")
            now = self.thought(model, b, path, "teacher")
            if self.keys.phi == "forward_kl":
                yield -share * worth * now.sum()
                continue
            low, high = 1 - self.keys.clip_low, 1 + self.keys.clip_high
            r = (now - old).exp()
            found["above"] += int(((r > high) & (worth > 0)).sum())
            found["below"] += int(((r < low) & (worth < 0)).sum())
            yield -share * torch.minimum(r * worth, r.clamp(low, high) * worth).sum()


class Bound(Variational):
    """- L_K itself: autograd finds weights and gradients alone."""

    def loss(self, model, part, found):
        assert part == 0  # the weights of a later update are those of the first
        losses = []
        for b in range(B):
            paths = [path for path in self.batch.posterior.paths[b] if path.closed]
            found["kinds"].add("whole" if len(paths) == P else "cut")
            logs = [
                self.ratio(model, b, path) + self.reference_answer(model, b, path).sum()
                for path in paths
            ]
            losses.append(-(torch.stack(logs).logsumexp(0) - math.log(P)))
        return torch.stack(losses).sum() / (B * C)


SHORT = {"rollout.max_new_tokens": 72, "train.minibatches": PARTS, "train.epochs": EPOCHS}
ONE = {"rollout.max_new_tokens": 240, "train.minibatches": 1, "train.epochs": 1}
LIKELY = {"rollout.temperature": 1.0}
# Some answers behind a thought are wrong, and of some thoughts all.
MIXED = {"rollout.temperature": 0.8, "scoring.answer_temperature": 2.6}
CASES = {
    "theta, accuracy": ({"thought_ratio": "geometric"}, SHORT | MIXED),
    "theta, accuracy, exact, reference": (
        {"thought_ratio": "exact", "answer": "reference"},
        SHORT | MIXED | LIKELY,
    ),
    "theta, gml": ({"estimator": "gml"}, SHORT | LIKELY),
    "theta, gml, exact, lost": ({"estimator": "gml", "thought_ratio": "exact"}, SHORT | LIKELY),
    "theta, likelihood": ({"estimator": "likelihood"}, SHORT | LIKELY),
    "theta, bound": ({"estimator": "likelihood", "thought_ratio": "exact"}, ONE | LIKELY),
    "phi, accuracy": ({}, SHORT | MIXED),
    "phi, likelihood, lost": ({"estimator": "likelihood"}, SHORT | LIKELY),
    "phi, reverse": (
        {"phi": "reverse_kl", "estimator": "likelihood", "thought_ratio": "exact", "u_min": -5.0},
        SHORT | LIKELY,
    ),
    "phi, reverse, accuracy": ({"phi": "reverse_kl"}, SHORT | MIXED),
    "phi, iwae": ({"phi": "iwae", "estimator": "gml"}, SHORT | LIKELY),
    "vr, accuracy": ({"phi_weight": 0.4, "prior_samples": 3}, SHORT | MIXED),
    "vr, gml, iwae": (
        {"phi": "iwae", "estimator": "gml", "thought_ratio": "exact"},
        SHORT | LIKELY,
    ),
}
# A run of two seconds each: what these cover in part is slow.
QUICK = {"theta, gml", "theta, bound", "phi, reverse", "phi, iwae", "vr, accuracy"}


def words_of(name, keys, settings, tiny_words):
    fixed = {
        **ONE_UPDATE,
        "objective": name,
        "objective.group_size": P,
        "objective.norm_constant": C,
        "scoring.answer_samples": J,
        "train.questions_per_step": B,
    }
    own = {f"objective.{key}": value for key, value in keys.items()}
    return tiny_words({**fixed, "objective.norm": "const", **own, **settings})("run")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if size == 1 and name in QUICK else pytest.mark.slow)
        for name, size in [*((name, 1) for name in CASES), ("vr, accuracy", 2)]
    ],
)
def test_every_update_is_the_gradient_of_its_formula(name, size, tiny_words):
    keys, settings = CASES[name]
    what, bound = name.split(", ")[0], name.endswith("bound")
    method = {"vr": "vr", "theta": "vr_theta", "phi": "vr_phi"}[what]
    words = words_of(method, keys, settings, tiny_words)
    found = run_ranks(gaps, words, name, Bound if bound else Variational, size=size)[0]
    made = [gap for gap in found["gaps"] if gap is not None]
    assert len(made) >= len(found["gaps"]) / 2
    assert max(made) <= 1e-9, found
    kinds = set(found["kinds"])
    assert ("lost" in kinds) == ("lost" in name)
    if bound:  # the loss is a surrogate with its gradient
        assert "whole" in kinds
        return
    # Of later updates the logged loss leaves out nothing but what is clipped.
    assert max(found["losses"]) <= 1e-9, found
    if what != "phi":
        assert {"cut", "weighed"} <= kinds
        assert ("none is right" in kinds) == ("accuracy" in name)
    if what != "theta":
        assert {"forward_kl": "learnt"}.get(keys.get("phi", "forward_kl"), "unlearnt") in kinds
    if keys.get("phi") == "reverse_kl":
        assert "learnt" in kinds
        assert found["above"] > 0
        assert found["below"] > 0


# --- by hand -----------------------------------------------------------------------------------


def theta(**keys):
    return VrTheta(**keys)


def phi(**keys):
    return VrPhi(**keys)


def question(name="q"):
    return prompted(name, student=[3], teacher=[3, 4, 44], cue=[5], target=[6])


def hinted(gaps, *, name="q", right=None, closed=None, length=2, stream="posterior"):
    """Paths of a question and the log-probs of both views: `gaps` are log pi - log q of each one's
    tokens. `right`: ids and verdicts of the attempts of each."""
    count = len(gaps)
    right, closed = right or [()] * count, closed or [True] * count
    tokens = [torch.arange(10, 10 + length) for _ in gaps]
    paths = tuple(
        sampled(
            z,
            question_id=name,
            stream=stream,
            index=i,
            closed=c,
            attempts=attempts(*r),
            share=1 / count,
        )
        for i, (z, c, r) in enumerate(zip(tokens, closed, right, strict=True))
    )
    teacher, student = (
        {
            path.key: share * torch.tensor(gap).double()
            for path, gap in zip(paths, gaps, strict=True)
        }
        for share in (-0.5, 0.5)
    )
    return paths, dict(zip(VIEWS, (teacher, student), strict=True))


def attempts(*answers):
    return tuple(Attempt(ids=ids(tokens).long(), right=right) for tokens, right in answers)


def batch_of(groups, u=None):
    """A batch of the questions that `hinted` made, with U of their paths."""
    paths = tuple(group for group, _ in groups)
    logps = {view: {k: v for _, one in groups for k, v in one[view].items()} for view in VIEWS}
    u = torch.full((len(paths), len(paths[0])), math.nan) if u is None else u
    questions = [question(group[0].question_id) for group in paths]
    streams = [scored(paths, u), scored(tuple(() for _ in paths), torch.zeros(len(paths), 0))]
    if paths[0][0].stream == "prior":
        streams.reverse()
    return replace(whole(questions, *streams), logps=logps)


YES, NO = ([7], True), ([8], False)
STREAMS = ("posterior", "prior")


def theta_weights(cfg, batch):
    found = {term.name: term.weight_BP for term in cfg.terms(batch, {}).parts}
    assert torch.equal(found["theta"], found["answer"])
    return found["theta"].tolist()


def test_weights_of_theta_by_hand():
    """log rho of the paths: the ratio over two tokens whole or their mean, and log f."""
    gaps = [[-1.0, -3.0], [0.5, 0.5], [0.0, 0.0]]
    one = batch_of([hinted(gaps, right=[(YES, NO), (YES, YES), (NO, NO)])])
    for ratio, logs in (("exact", (-4.0, 1.0)), ("geometric", (-2.0, 0.5))):
        rho = [0.5 * math.exp(logs[0]), math.exp(logs[1]), 0.0]
        cfg = theta(group_size=3, thought_ratio=ratio)
        (weights,) = theta_weights(cfg, one)
        assert weights == pytest.approx([-3 * r / sum(rho) for r in rho], abs=1e-14)
    u = torch.tensor([[-2.0, -1.0, -7.0]]).double()
    keys = {"group_size": 3, "thought_ratio": "exact"}
    rho = [math.exp(a + b) for a, b in zip((-4.0, 1.0, 0.0), (-2.0, -1.0, -7.0), strict=True)]
    for estimator in ("gml", "likelihood"):  # the trainer scores U as `u_norm` says
        cfg = theta(estimator=estimator, **keys)
        assert cfg.draws().u_norm == {"gml": "mean", "likelihood": "sum"}[estimator]
        (weights,) = theta_weights(cfg, batch_of([hinted(gaps)], u))
        assert weights == pytest.approx([-3 * r / sum(rho) for r in rho], abs=1e-14)


def test_log_weights_of_minus_two_thousand_are_compared_in_log_space():
    """Every rho is 0 as a number; the shares are not."""
    gaps = [[-1500.0, -500.0], [-1500.0, -501.0], [900.0, -2902.0]]
    cfg = theta(estimator="likelihood", thought_ratio="exact", group_size=3)
    u = torch.tensor([[0.0, 0.0, 0.0]]).double()
    (weights,) = theta_weights(cfg, batch_of([hinted(gaps)], u))
    parts = [1.0, math.exp(-1), math.exp(-2)]
    assert weights == pytest.approx([-3 * p / sum(parts) for p in parts], abs=1e-12)
    log_rho = cfg.log_rho(batch_of([hinted(gaps)], u))
    assert log_mean(log_rho).item() == pytest.approx(-2000 + math.log(sum(parts) / 3), abs=1e-12)
    # One path at 0 beside them takes all, and -2000 is no NaN.
    assert shares(torch.tensor([[-2000.0, 0.0]]).double()).tolist() == [[0.0, 1.0]]


def test_a_question_without_a_right_answer_is_skipped_and_counted():
    """Of three questions: none right; the right one was cut; one right."""
    gaps = [[1.0, 1.0], [0.0, 0.0]]
    groups = [
        hinted(gaps, name="none", right=[(NO,), (NO,)]),
        hinted(gaps, name="cut", right=[(YES,), (NO,)], closed=[False, True]),
        hinted(gaps, name="one", right=[(NO,), (YES,)]),
    ]
    out = theta(group_size=2).terms(batch_of(groups), {})
    assert [term.weight_BP.tolist() for term in out.parts] == [[[0, 0], [0, 0], [0, -2]]] * 2
    assert out.alive.tolist() == [False, False, True]
    assert out.metrics["groups_all_rejected"] == 2
    rows = build_rows(batch_of(groups), out, Scale(norm="seq_sum"))
    assert {row.path for row in rows} == {("one", "posterior", 1)}


def test_one_path_has_a_weight_of_one_and_the_run_says_so():
    for cfg in (theta(group_size=2), phi(group_size=2), Vr(), phi(group_size=1, phi="reverse_kl")):
        assert list(cfg.notes()) == []
    for cfg in (theta(group_size=1), phi(group_size=1), Vr(group_size=1, phi="iwae")):
        (note,) = cfg.notes()
        assert "group_size 1: the weight of a single path is 1" in note
    (note,) = Vr(prior_samples=1).notes()
    assert "prior_samples 1" in note
    for gap in (-2000.0, 3.0):
        one = batch_of([hinted([[gap, 0.0]], right=[(YES, NO)])])
        assert theta_weights(theta(group_size=1), one) == [[-1.0]]


def test_rows_of_theta_stand_behind_the_students_prompt_and_equal_answers_share_one():
    """Of four attempts three are right, two of them alike: rows of 2/3 and 1/3 of the weight."""
    right = [(([7, 1], True), ([8, 1], True), NO, ([7, 1], True)), (NO,)]
    one = batch_of([hinted([[0.0, 0.0]] * 2, right=right)])
    cfg, scale = theta(group_size=2, norm="seq_sum"), Scale(norm="seq_sum")
    rows = build_rows(one, cfg.terms(one, {}), scale)
    assert [(row.term, row.context_ids.tolist(), row.token_ids.tolist()) for row in rows] == [
        ("theta", [3], [10, 11]),
        ("answer", [3, 10, 11], [7, 1]),
        ("answer", [3, 10, 11], [8, 1]),
    ]
    coefs = [row.coef.tolist() for row in rows]
    assert coefs == [[-1.0] * 2, pytest.approx([-2 / 3] * 2), pytest.approx([-1 / 3] * 2)]
    for most, shares_of in ((1, [1.0]), (2, [0.5, 0.5])):
        few = replace(cfg, answer_rows=most)
        own = [row for row in build_rows(one, few.terms(one, {}), scale) if row.term == "answer"]
        assert [row.token_ids.tolist() for row in own] == [[7, 1], [8, 1]][:most]
        assert [-row.coef[0].item() for row in own] == shares_of
    # The hint's tokens, 4 and 44, are in no row, whatever is trained behind the thought.
    u = torch.zeros(1, 2).double()
    for estimator, answer in itertools.product(
        ("accuracy", "gml", "likelihood"), ("sampled", "reference")
    ):
        cfg = theta(group_size=2, estimator=estimator, answer=answer)
        likely = batch_of([hinted([[0.0, 0.0]] * 2, right=right)], u)
        rows = build_rows(likely, cfg.terms(likely, {}), scale)
        assert {row.term for row in rows} == {"theta", "answer"}
        for row in rows:
            assert row.view == "student"
            assert not {4, 44} & {*row.context_ids.tolist(), *row.token_ids.tolist()}


def test_what_the_paths_show_by_hand():
    """Two questions of two hinted paths of two tokens; one question has no right answer."""
    gaps = [[-1.0, -3.0], [0.5, 0.5]]
    groups = [
        hinted(gaps, name="some", right=[(YES, NO), (YES, YES)]),
        hinted(gaps, name="none", right=[(NO, NO), (NO, NO)]),
    ]
    out = theta(group_size=2).terms(batch_of(groups), {})
    whole_rho = [math.log(0.5) - 4.0, 1.0]
    trained = [0.5 * math.exp(-2.0), math.exp(0.5)]
    share = [r / sum(trained) for r in trained]
    expected = {
        "vr_elbo": sum(whole_rho) / 2,
        "vr_bound": math.log(sum(map(math.exp, whole_rho)) / 2),
        "vr_log_ratio": (-2.0 + 0.5) / 2,
        "vr_answered": (0.5 + 1.0) / 4,
        "vr_answered_none": 0.5,
        "vr_answered_all": 0.25,
        "vr_ess": 1 / sum(s**2 for s in share),
        "vr_share_max": share[1],
        "groups_all_rejected": 1,
        "groups_zero_var": 1,
    }
    assert out.metrics == pytest.approx(expected, abs=1e-14)
    found = {key: values.tolist() for key, values in out.path_scores["posterior"].items()}
    assert found["share"] == [pytest.approx(share), [0.0, 0.0]]
    assert found["answered"] == [[0.5, 1.0], [0.0, 0.0]]
    assert found["log_ratio"] == [[-4.0, 1.0]] * 2
    # None is worth anything: no mean, and nothing that JSON has no number for.
    bare = theta(group_size=2).terms(batch_of(groups[1:]), {}).metrics
    assert [bare[key] for key in ("vr_elbo", "vr_bound", "vr_ess", "vr_share_max")] == [None] * 4
    own = batch_of([hinted(gaps, stream="prior", right=[(YES, NO), (YES, YES)])])
    found = phi(group_size=2).terms(own, {}).metrics
    expected = {
        "vr_phi_answered": 0.75,
        "vr_phi_answered_none": 0.0,
        "vr_phi_answered_all": 0.5,
        "vr_phi_ess": 1 / (1 / 9 + 4 / 9),
        "vr_phi_share_max": 2 / 3,
        "vr_phi_skipped": 0,
        "groups_all_rejected": 0,
        "groups_zero_var": 0,
    }
    assert found == pytest.approx(expected, abs=1e-14)


def test_weights_of_phi_by_hand():
    """Three paths: of the student's by accuracy alone; of the hinted by the bound and the ELBO."""
    gaps = [[-1.0, -3.0], [0.5, 0.5], [0.0, 0.0]]
    right = [(YES, NO), (YES, YES), (NO, NO)]
    own = batch_of([hinted(gaps, stream="prior", right=right)])
    (term,) = phi(group_size=3).terms(own, {}).parts
    assert (term.stream, term.view, term.part) == ("prior", "teacher", "thought")
    assert term.weight_BP.tolist() == [pytest.approx([-3 * w for w in (1 / 3, 2 / 3, 0.0)])]
    # None is right: no weight, and counted.
    wrong = batch_of([hinted(gaps, stream="prior", right=[(NO, NO)] * 3)])
    out = phi(group_size=3).terms(wrong, {})
    assert (out.parts[0].weight_BP.tolist(), out.alive.tolist()) == ([[0, 0, 0]], [False])
    assert out.metrics["groups_all_rejected"] == 1
    one = batch_of([hinted(gaps, right=right)])
    cfg = phi(group_size=3, phi="iwae", thought_ratio="exact")
    rho = [0.5 * math.exp(-4), math.exp(1), 0.0]
    log_mean_rho = math.log(sum(rho) / 3)
    (term,) = cfg.terms(one, {}).parts
    expected = [-3 * (log_mean_rho - r / sum(rho)) for r in rho]
    assert (term.stream, term.view) == ("posterior", "teacher")
    assert term.weight_BP.tolist() == [pytest.approx(expected)]
    cfg = phi(group_size=3, phi="reverse_kl", thought_ratio="exact", u_min=-6.0)
    r = [math.log(0.5) - 4, 1.0, -6.0]
    (term,) = cfg.terms(one, {}).parts
    assert term.weight_BP.tolist() == [pytest.approx([(sum(r) - x) / 2 - x for x in r])]


def test_both_parts_share_a_step_and_no_row_of_theta_holds_the_hint():
    gaps = [[0.0, 0.0]] * 2
    (post, logps), (prior, _) = (hinted(gaps, stream=s, right=[(YES,), (NO,)]) for s in STREAMS)
    one = batch_of([(post, logps)])
    one = replace(one, prior=scored((prior,), torch.zeros(1, 2)))
    cfg = Vr(group_size=2, prior_samples=2, phi_weight=0.25, norm="seq_sum")
    rows = build_rows(one, cfg.terms(one, {}), Scale(norm="seq_sum"))
    assert [(row.term, row.context_ids.tolist(), row.coef[0].item()) for row in rows] == [
        ("theta", [3], -1.0),
        ("answer", [3, 10, 11], -1.0),
        ("phi", [3, 4, 44], -0.25),
    ]
    assert [row.path for row in rows] == [("q", s, 0) for s in ("posterior", "posterior", "prior")]


def test_attempts_are_kept_between_two_updates_and_refused_where_nobody_trains_them_so():
    cfg = theta(group_size=2)
    one = batch_of([hinted([[0.0, 0.0]] * 2, right=[(YES, NO), ()])])
    again = revived(plain(one))
    (first, second) = again.posterior.flat
    assert [(a.ids.tolist(), a.right) for a in first.attempts] == [([7], True), ([8], False)]
    assert second.attempts == ()
    assert again.posterior.accuracy.tolist() == [[0.5, 0.0]]
    terms = cfg.terms(one, {})
    for wrong, said in (
        ({"view": "teacher"}, "attempts are sampled behind the policy's thoughts"),
        ({"factors": {}}, "attempts are sampled behind the policy's thoughts"),
        ({"first": 9}, "trains 9 right attempts of a path, but draws\\(\\) asks for 8"),
        ({"first": None}, "trains all right attempts of a path, but"),
    ):
        bad = replace(terms, parts=(replace(terms.parts[1], **wrong),))
        with pytest.raises(ValueError, match=said):
            check_terms(cfg, bad, one)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"u_min": -3.0}, "u_min: got -3.0, which changes nothing with phi 'forward_kl'"),
        ({"u_min": -3.0, "phi": "iwae"}, "u_min: got -3.0, which changes nothing with phi 'iwae'"),
        # A rule of all objectives.
        (
            {"norm": "seq_sum", "norm_constant": 3.0},
            "norm_constant: got 3.0, which changes nothing",
        ),
        (
            {"thought_ratio": "exact"},
            "thought_ratio: got 'exact', which changes nothing with phi 'forward_kl'",
        ),
    ],
)
def test_keys_of_phi_that_nothing_would_read_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        phi(**keys)


def with_paths(batch, change):
    """The batch with `change(place)` put into every hinted path."""
    groups = tuple(
        tuple(replace(path, **change(i)) for i, path in enumerate(group))
        for group in batch.posterior.paths
    )
    return replace(batch, posterior=replace(batch.posterior, paths=groups))


def test_recorded_weights_are_taken_as_they_stand():
    """Of three paths; the best one alone, the first of equals; none right."""
    one = batch_of([hinted([[0.0, 0.0]] * 3, right=[(YES,)] * 3)])
    for keep, own, expected in (
        ("all", (0.2, 0.5, 0.3), [-0.6, -1.5, -0.9]),
        ("best", (0.4, 0.2, 0.4), [-3, 0, 0]),
        ("best", (0.0, 0.0, 0.0), [0, 0, 0]),
    ):
        recorded = with_paths(one, lambda i, own=own: {"share": own[i]})
        out = theta(weights="recorded", keep=keep, group_size=3).terms(recorded, {})
        assert [term.name for term in out.parts] == ["theta", "answer"]
        for term in out.parts:
            assert term.weight_BP.tolist() == [pytest.approx(expected, abs=1e-14)]
        assert out.metrics["groups_all_rejected"] == (not any(own))
    cfg = theta(weights="recorded", group_size=3)
    assert cfg.needs() == frozenset()
    with pytest.raises(ValueError, match=r"path \('q', 'posterior', 1\) has no share; give the"):
        cfg.terms(with_paths(one, lambda i: {"share": None if i == 1 else 0.5}), {})
    with pytest.raises(ValueError, match=r"question .q. add up to 0\.6, expected 1; set group"):
        cfg.terms(with_paths(one, lambda _: {"share": 0.2}), {})


def test_the_ratio_may_be_of_recorded_log_probs():
    """log pi of the model less what the sampler said, summed over two tokens."""
    one = batch_of([hinted([[1.0, -2.0]] * 2, right=[(YES,)] * 2)])
    logps = {"logps": torch.tensor([-0.25, -0.5])}
    cfg = theta(log_q="recorded", group_size=2, thought_ratio="exact")
    assert cfg.needs() == frozenset(VIEWS[1:])
    ratio = cfg.ratio(with_paths(one, lambda _: logps))
    log_pi = one.logps[VIEWS[1]]["q", "posterior", 0].sum().item()
    assert ratio.tolist() == [[log_pi + 0.75] * 2]
    lacks = {"logps": torch.tensor([-0.25, math.nan])}
    with pytest.raises(ValueError, match="has no log-probs of its sampler; record them"):
        cfg.terms(with_paths(one, lambda _: lacks), {})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objective.weights", "recorded"], "engine.name 'hf' draws paths that have none; set"),
        (["--objective.originals", "1"], "weights: got 'computed' with originals 1, which would"),
        (
            ["--train.record", "paths", "--train.resample_rounds", "1"],
            "train.resample_rounds 1 would replace all of them; set it to 0",
        ),
        (
            [
                *("--objective.weights", "recorded", "--rollout.importance_cap", "2"),
                *("--engine", "replay", "--engine.paths", "[a.jsonl]"),
            ],
            "imitates paths that another model drew, with rollout.importance_cap 2",
        ),
    ],
)
def test_what_cannot_be_recorded_or_read_is_refused(more, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        config.load(TINY, ["--objective", "vr_theta", *more])


OTHERS = {
    "share_params": (True, False),
    "estimator": ("accuracy", "gml", "likelihood"),
    "thought_ratio": ("geometric", "exact"),
    "answer": (None, "sampled", "reference"),
    "answer_rows": (8, 1),
    "phi": ("forward_kl", "reverse_kl", "iwae"),
    "u_min": (-20.0, -0.5),
    "clip_low": (0.2, 0.6),
    "clip_high": (0.2, 0.6),
    "group_size": (1, 2, 3),
    "prior_samples": (8, 3),
    "phi_weight": (1.0, 0.5),
    "log_q": ("policy", "recorded"),
    "weights": ("computed", "recorded"),
    "keep": ("all", "best"),
    "originals": (0, 1),
}
"""Values of every key of Variational Reasoning's own; those of all methods are tested with them."""


def made_of(objective, batch):
    """All that a step makes of an objective: what it draws, and losses of moved log-probs."""
    found = [objective.draws(), objective.needs()]
    who = objective.draws().posterior_who
    own = {views(who)[0]: batch.logps[VIEWS[0]]}
    batch = replace(batch, posterior_who=who, logps={**batch.logps, **own})
    terms = objective.terms(batch, {})
    for several in (False, True):
        for row in build_rows(batch, terms, Scale(norm="seq_sum"), several=several):
            old = torch.linspace(-2, -1, row.token_ids.numel()).double()
            row, now = replace(row, old=old), old * torch.linspace(1.3, 0.7, len(old)).double()
            found.append((row.term, row.path, row.loss(now).tolist(), row.at(now).coef.tolist()))
    return found


def both_streams(paths):
    """Two questions with so many paths of each stream, which differ in all that a weight may read:
    what is worth little in one is worth much in the other."""
    # By the ratio per token the first is best in the question `low`, by the whole one the second.
    gaps = torch.tensor([[0.0, -0.1], [0.5, 0.4], [0.1, 0.0]])[:paths]
    right = [(YES, ([7, 1], True)), (YES, NO), (NO, NO)]
    u = torch.tensor([[-0.4, -1.2, -2.5], [-0.9, -1.5, -0.1]]).double()[:, :paths]
    ours, theirs = (
        batch_of(
            [
                hinted((gaps + more).tolist(), name=name, right=own[:paths], stream=stream)
                for name, more, own in (("low", 0.0, right), ("high", 3.0, [*right[1:], right[0]]))
            ],
            u,
        )
        for stream in reversed(STREAMS)
    )
    return replace(theirs, prior=ours.prior)


def drawn(kind, rng, default):
    """Half of a method's keys by chance, this one at its default, of which none is idle."""
    own = [key for key in OTHERS if key in kind.__dataclass_fields__ and key != default]
    while True:
        try:
            return kind(**{key: rng.choice(OTHERS[key]) for key in own if rng.random() < 0.5})
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("kind", "idle"),
    [
        (VrTheta, {"thought_ratio", "answer_rows", "keep", "log_q", "estimator"}),
        (VrPhi, {"thought_ratio", "u_min", "clip_low", "clip_high"}),
        (
            Vr,
            {"thought_ratio", "answer_rows", "u_min", "clip_low", "clip_high", "prior_samples"}
            | {"phi_weight"},
        ),
    ],
)
def test_every_key_changes_what_a_step_makes_or_is_refused(kind, idle, monkeypatch):
    rng, refused = random.Random(0), set()
    own = {f.name for f in fields(kind)} - {f.name for f in fields(Keys)}
    assert own <= {*OTHERS}
    for key, _ in itertools.product(sorted(own), range(20)):
        plain = drawn(kind, rng, key)
        others = [v for v in OTHERS[key] if v != getattr(plain, key)]
        if key == "answer":  # null stands for one of the two others
            others = ["reference" if plain.trains_sampled else "sampled"]
        batch = both_streams(min(3, plain.group_size))
        before = made_of(plain, batch)
        for value in others:
            said = None
            try:
                replace(plain, **{key: value})
            except ValueError as error:
                said = str(error)
            if said and f"{key}: got " not in said:  # it makes another key idle
                continue
            with monkeypatch.context() as free:
                free.setattr("vpgea_fast.objectives.base.refuse_unread", lambda _: None)
                after = made_of(replace(plain, **{key: value}), batch)
            assert (after == before) == bool(said), (plain, key, value, said)
            refused |= {key} if said else set()
    assert refused == idle


def test_a_likelihood_is_not_that_of_sampled_answers():
    words = ["--objective", "vr_theta", "--scoring.u_source", "accuracy"]
    config.load(TINY, words)
    with pytest.raises(ValueError, match="reads log-likelihoods of the reference answer"):
        config.load(TINY, [*words, "--objective.estimator", "gml"])
    # The bound's own gradient is that of one spelling; scoring.u_norm is not what sums its tokens.
    bound = ["--objective", "vr_theta", "--objective.estimator", "likelihood"]
    config.load(TINY, [*bound, "--scoring.u_norm", "mean"])
    with pytest.raises(ValueError, match=r"which data.variants_key 'others' makes another"):
        config.load(TINY, [*bound, "--data.variants_key", "others"])


def test_keys_of_sampled_answers_are_read_where_thoughts_are_answered():
    words = ["--scoring.answer_samples", "4", "--scoring.answer_temperature", "0.9"]
    assert [*unread_keys(config.load(TINY, ["--objective", "vr", *words]))] == []
    gml = ["--objective", "vr", "--objective.estimator", "gml", "--scoring.u_norm", "mean", *words]
    said = [*unread_keys(config.load(TINY, gml))]
    assert [line.split(" ")[0] for line in said] == [
        *("scoring.u_norm", "scoring.answer_samples", "scoring.answer_temperature")
    ]
    assert "the objective says itself how U is summed" in said[0]
    # As many are trained as are drawn, unless the key is lower.
    for rows, said in ((3, []), (4, ["objective.answer_rows 4 changes nothing"])):
        cfg = config.load(TINY, ["--objective", "vr", *words, f"--objective.answer_rows={rows}"])
        assert [line.split(":")[0] for line in unread_keys(cfg)] == said


def test_thoughts_that_were_all_cut_are_answered_by_nobody(tiny_words):
    """Of a real run: no answer is drawn behind them, and no parameter moves."""
    settings = {"rollout.max_new_tokens": 2, "rollout.full_answer": "false", "train.steps": 1}
    words = words_of("vr_theta", {}, {**settings, "metrics.diag_every": 1}, tiny_words)
    with Trainer(config.load(TINY, words)) as trainer:
        before = [p.clone() for p in trainer.stages.policy.parameters()]
        stats = trainer.train_step()
        assert stats.skipped == "no path has a gradient"
        assert all(map(torch.equal, before, trainer.stages.policy.parameters()))
    found = stats.metrics
    assert (found["groups_all_rejected"], found["skipped"], found["trunc_post"]) == (B, 1, 1.0)


def give_up_an_answer(engine):
    """First come the paths of both streams, then the answers behind the hinted ones."""
    drawn, calls = engine.generate, []

    def generate(requests, *rest):
        calls.append(requests)
        paths = drawn(requests, *rest)
        return [losing(paths[0]), *paths[1:]] if len(calls) == 2 else paths

    engine.generate = generate
    return calls


def id_of(row):
    return row.path[0]


def test_a_question_whose_answer_the_engine_gave_up_is_left_out(tiny_words):
    words = words_of("vr", {"prior_samples": 2}, {"rollout.max_new_tokens": 240}, tiny_words)
    with Trainer(config.load(TINY, words)) as trainer:
        calls = give_up_an_answer(trainer.stages.engine)
        rollout = trainer.draw()
    lost = calls[1][0].question_id
    places = [q.question.id for q in rollout.batch.questions]
    assert rollout.batch.lost_B.tolist() == [int(name == lost) for name in places]
    assert set(map(id_of, rollout.rows)) == {*places} - {lost}
    assert {row.term for row in rollout.rows} == {"theta", "answer", "phi"}
    # Of a real run: contexts of theta are the student's, whatever drew the thought.
    student = {q.question.id: q.student_ids.tolist() for q in rollout.batch.questions}
    for row in rollout.rows:
        own = student[id_of(row)]
        shown = row.context_ids[: len(own)].tolist() == own
        assert shown == (row.term != "phi") == (row.view == "student")


# --- a whole solution as the hint --------------------------------------------------------------

SHOWN = [
    "--objective",
    "vr_phi",
    "--data.solution_key",
    "solution",
    "--data.max_prompt_tokens",
    "400",
]


def intake_of(cfg):
    return read(cfg, open_text(cfg), lambda answers: [True] * len(answers), ALONE)


def test_the_teacher_alone_is_shown_the_solution(tiny_words, tiny_world):
    words = tiny_words({})("run", *SHOWN, "--prompt.teacher", "{question} hint {solution}")
    cfg = config.load(TINY, words)
    rows = [json.loads(line) for line in Path(tiny_world.train_path).read_text().splitlines()]
    intake = intake_of(cfg)
    assert len(intake.questions) == len(rows)
    for q, row in zip(intake.questions, rows, strict=True):
        student, teacher = (intake.text.decode(q.context(v)) for v in ("student", "teacher"))
        assert row["solution"] in teacher
        assert row["solution"] not in student
    plain = config.load(
        TINY, [*words, "--data.solution_key", "null", "--prompt.teacher", "{question}"]
    )
    without = intake_of(plain)
    assert without.fingerprint != intake.fingerprint


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"solution": ""}, "line 1: got no solution under data.solution_key"),
        ({}, "line 1: got no solution under data.solution_key"),
        ({"solution": 7}, "line 1: expected a solution under 'solution', a text, got 7"),
        ({"solution": "</think> 7"}, "1 of 1 questions spell a special token of this model"),
    ],
)
def test_a_row_whose_solution_cannot_be_shown_is_refused(row, said, tiny_words, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "3 + 4 = ?", "answer": "7", **row}))
    words = tiny_words(
        {"data.train": file, "data.response_key": "null", "prompt.teacher": "{question} {solution}"}
    )("run", *SHOWN)
    cfg = config.load(TINY, words)
    with pytest.raises(ValueError, match=re.escape(said)):
        intake_of(cfg)


def test_a_solution_that_no_key_gives_or_that_contradicts_a_guard_is_refused(tiny_words):
    solution = ["--prompt.teacher", "{question} {solution}"]
    with pytest.raises(ValueError, match=r"shows {solution}, but train has no data.solution_key"):
        config.load(TINY, solution)
    with pytest.raises(ValueError, match="beside which no solution is wrong"):
        config.load(TINY, [*solution, *SHOWN[2:]])  # the preset has the counterfactual guard
    leaks = ["--prompt.student", "{question} {solution}"]
    cfg = config.load(TINY, tiny_words({})("run", *SHOWN, *leaks))
    with pytest.raises(ValueError, match=r"has the field {solution}, which would show the answer"):
        open_text(cfg)


def test_the_named_templates_become_their_text():
    for name, text in TEACHERS.items():
        cfg = config.load(TINY, [*SHOWN, "--prompt.teacher", name])
        assert cfg.prompt.teacher == text
        assert config.resolve(config.as_dict(cfg)) == cfg
        assert all(field in text for field in ("{question}", "{solution}", r"\boxed{}"))


# --- bounds by enumeration ---------------------------------------------------------------------


def tabular(seed=0):
    """Logits of both views, and log f, of every trace of a small autoregressive model."""
    traces = oracle.tabular_traces()
    made = torch.Generator().manual_seed(seed)
    shape = 2, traces.n_contexts, 3
    student, teacher = torch.randn(shape, generator=made, dtype=torch.float64).unbind()
    log_f = -3 * torch.rand(len(traces.length_Z), generator=made, dtype=torch.float64)
    return traces, student.requires_grad_(), teacher, log_f


def drawn_batch(traces, student, teacher, log_f, draw_XK, stream="posterior"):
    """Every draw of K traces as a question of its own: their log-probs under both views."""
    views = [oracle.token_logps(table.detach(), traces) for table in (teacher, student)]
    groups = []
    for x, draw in enumerate(draw_XK.tolist()):
        lengths = [int(traces.length_Z[z]) for z in draw]
        paths = tuple(
            sampled(traces.token_ZT[z, :n], question_id=f"q{x}", index=i, stream=stream)
            for i, (z, n) in enumerate(zip(draw, lengths, strict=True))
        )
        logps = {
            view: {p.key: table[z, :n] for p, z, n in zip(paths, draw, lengths, strict=True)}
            for view, table in zip(VIEWS, views, strict=True)
        }
        groups.append((paths, logps))
    return batch_of(groups, log_f[draw_XK])


def test_bounds_rise_with_every_path_and_stay_below_the_likelihood():
    """L_1 <= ... <= L_4 <= log P, over all draws of a tabular model; L_1 is the ELBO."""
    world = tabular()
    traces, student, teacher, log_f = world
    cfg = theta(estimator="likelihood", thought_ratio="exact", group_size=15)
    (log_rho,) = cfg.log_rho(drawn_batch(*world, torch.arange(15)[None]))
    log_pi, log_q = (oracle.token_logps(table, traces).sum(1) for table in (student, teacher))
    bounds = [
        (log_q[draw].sum(1).exp() * log_mean(log_rho[draw])).sum().item()
        for draw in (oracle.tuples(15, size) for size in (1, 2, 3, 4))
    ]
    elbo = (log_q.exp() * (log_f + log_pi - log_q)).sum().item()
    assert bounds[0] == pytest.approx(elbo, abs=1e-12)
    for size, bound in enumerate(bounds[:3], start=1):
        exact = oracle.iwae_bound(log_f + log_pi - log_q, log_q, size).item()
        assert bound == pytest.approx(exact, abs=1e-12)
    log_p = (log_pi + log_f).logsumexp(0).item()
    assert all(low < high for low, high in itertools.pairwise([*bounds, log_p]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_update_of_theta_is_the_gradient_of_the_bound(size):
    """Weights of every draw, with its probability: d L_K / d theta, the answer's term aside."""
    world = tabular(1)
    traces, student, teacher, log_f = world
    draw = oracle.tuples(15, size)
    ratio = {} if size == 1 else {"thought_ratio": "exact"}  # of a single path nothing reads it
    cfg = theta(estimator="likelihood", group_size=size, **ratio)
    (term, _) = cfg.terms(drawn_batch(*world, draw), {}).parts
    log_pi, log_q = (oracle.token_logps(table, traces).sum(1) for table in (student, teacher))
    probability = log_q[draw].sum(1, keepdim=True).exp()
    update = (probability * term.weight_BP / size * log_pi[draw]).sum()
    bound = oracle.iwae_bound(log_f + log_pi - log_q, log_q, size)
    ours, theirs = (torch.autograd.grad(f, student, retain_graph=True)[0] for f in (-update, bound))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["iwae", "reverse_kl"])
def test_the_mean_update_of_phi_is_the_gradient_of_its_bound(form):
    """Over all draws of three: that of L_3, and of the ELBO whatever the baseline."""
    traces, student, teacher, log_f = tabular(2)
    teacher.requires_grad_()
    draw = oracle.tuples(15, 3)
    cfg = phi(estimator="likelihood", thought_ratio="exact", group_size=3, phi=form)
    batch = drawn_batch(traces, student, teacher, log_f, draw)
    (term,) = cfg.terms(batch, {}).parts
    log_pi, log_q = (oracle.token_logps(table, traces).sum(1) for table in (student, teacher))
    probability = log_q[draw].sum(1, keepdim=True).exp().detach()
    update = (probability * term.weight_BP / 3 * log_q[draw]).sum()
    size = 3 if form == "iwae" else 1
    bound = oracle.iwae_bound(log_f + log_pi - log_q, log_q, size)
    ours, theirs = (torch.autograd.grad(f, teacher, retain_graph=True)[0] for f in (-update, bound))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_forward_kl_is_biased_by_few_paths_and_blind_with_one():
    """Mean updates of phi over all draws of M paths of pi, against - grad KL(P(z|x, Y) || q)."""
    traces, student, teacher, log_f = tabular(3)
    teacher.requires_grad_()
    log_pi, log_q = (oracle.token_logps(table, traces).sum(1) for table in (student, teacher))
    log_pi = log_pi.detach()

    def gradient(weight_Z):
        return torch.autograd.grad((weight_Z * log_q).sum(), teacher, retain_graph=True)[0]

    def mean_weight(size):
        draw = oracle.tuples(15, size)
        cfg = phi(estimator="likelihood", group_size=size)
        batch = drawn_batch(traces, student, teacher, log_f, draw, stream="prior")
        (term,) = cfg.terms(batch, {}).parts
        weight = log_pi[draw].sum(1, keepdim=True).exp() * -term.weight_BP / size
        return torch.zeros(15).double().index_add(0, draw.flatten(), weight.flatten())

    exact = gradient((log_pi + log_f).softmax(0))
    means = [gradient(mean_weight(size)) for size in (1, 2, 3)]
    errors = [(mean - exact).norm().item() for mean in means]
    assert errors[0] > 1.5 * errors[1] > 1.5**1.5 * errors[2]
    # One path has a weight of 1: phi imitates pi, right or wrong.
    torch.testing.assert_close(means[0], gradient(log_pi.exp()), rtol=0, atol=1e-14)


@pytest.mark.parametrize("spellings", [2, 5])
def test_theorem_1_the_variances_of_both_estimators(spellings):
    """P(right) = p over several right answers. The likelihood of one of them, drawn evenly, times
    their number: variance at most (|Y| - 1) p^2, where one answer has all of p. A verified sample:
    p (1 - p), and a J-th of it with J samples."""
    for p in (0.1, 1 / spellings, 0.7):
        shares = [torch.ones(spellings).double() / spellings, torch.eye(spellings).double()[0]]
        shares += [(shares[0] + n * shares[1]) / (1 + n) for n in (0.5, 2.0)]
        variances = []
        for share in shares:
            estimate = spellings * p * share
            assert estimate.mean().item() == pytest.approx(p)
            variances.append(((estimate - p) ** 2).mean().item())
        like = (spellings - 1) * p**2
        assert max(variances) == variances[1] == pytest.approx(like)
        # The estimator of the product, over every outcome of J answers.
        outcomes = torch.tensor(list(itertools.product([True, False], repeat=J)))
        groups = [
            hinted([[0.0]], name=f"q{i}", right=[[([7], r) for r in outcome]], length=1)
            for i, outcome in enumerate(outcomes.tolist())
        ]
        estimate = batch_of(groups).posterior.accuracy[:, 0]
        right = outcomes.double()
        probability = (p * right + (1 - p) * (1 - right)).prod(1)
        mean = (probability * estimate).sum().item()
        variance = (probability * (estimate - mean) ** 2).sum().item()
        assert mean == pytest.approx(p)
        assert variance == pytest.approx(p * (1 - p) / J)
        assert (J * variance <= like + 1e-12) == (p >= 1 / spellings - 1e-12)


# --- the tiny world ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vr_tiny_answers_better_than_its_base_at_no_more_tokens(seed, tmp_path, capsys):
    """By the paired interval of sampled answers to the 400 held-out questions that picked none of
    its settings, as in benchmarks/vr_tiny.py."""
    world = make_tiny(tmp_path / "world")
    # By turns: the first of two picks.
    lines = world.test_path.read_text().splitlines(keepends=True)
    world.test_path.write_text("".join(lines[1::2]))
    settings = {
        "run.seed": seed,
        "run.dir": tmp_path / "run",
        "model.path": world.base_dir,
        "data.train": world.train_path,
        "eval.data": f"[{world.test_path}]",
        "eval.greedy": "false",
        "eval.records": "true",
        "checkpoint.export": "false",
        "metrics.diag_every": 0,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert main(["train", "vr-tiny", *words]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "run"), "--format", "json"]) == 0
    (_, trained) = json.loads(capsys.readouterr().out)["rows"]
    change = trained["against"]["mean"]
    assert change["acc"]["low"] > 0
    assert change["tokens"]["value"] <= 0


def test_the_committed_benchmark_bears_the_claim():
    """Its numbers on docs/vr.md are held by benchmarks/page_numbers.yaml."""
    root = Path(__file__).parents[1]
    found = json.loads((root / "benchmarks/results/vr_tiny.json").read_text(encoding="utf-8"))
    changes = [run["change"] for run in found["seeds"]]
    assert [run["seed"] for run in found["seeds"]] == [0, 1, 2]
    assert min(change["acc"]["low"] for change in changes) > 0
    assert max(change["tokens"]["high"] for change in changes) < 0
    picked = config.load(root / "configs/vr-tiny.yaml").optim.lr
    assert (found["picked"]["method"], found["picked"]["lr"]) == ("as configured", picked)

"""Two policies, each with weights and optimiser of its own: their updates against the formulas, who
draws, who is trained, and what is kept of both."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from runs import ONE_UPDATE, recorded
from test_formulas import TINY, B, C, P, Witness, compared, facts_of, two_models, whole, wide_norm
from test_vr import LIKELY, MIXED, SHORT, YES, J, Variational, batch_of, hinted

from vpgea_fast import config
from vpgea_fast.checkpoint import CheckpointError, load_checkpoint, open_checkpoint, put_weights
from vpgea_fast.distributed import World, full_weights
from vpgea_fast.model import load_policy
from vpgea_fast.model_dir import ModelError
from vpgea_fast.objectives import Vr
from vpgea_fast.objectives.guards import VIEWS, views
from vpgea_fast.policies import posterior_model
from vpgea_fast.rollout.engine import RolloutError
from vpgea_fast.rows import Scale, build_rows, checksum, drawn_rows
from vpgea_fast.trainer import Trainer

WHO = ("policy", "posterior")


@pytest.fixture(scope="module")
def other(tiny_world, tmp_path_factory):
    """A model of the base's shapes and vocabulary, with other weights."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_world.base_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.02 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_world.base_dir) / name, path / name)
    return path


@pytest.fixture
def words(tiny_words):
    """Command-line words of a run of two policies."""

    def make(name, **settings):
        fixed = {
            **ONE_UPDATE,
            "objective": "vr",
            "objective.share_params": "false",
            "objective.group_size": P,
            "objective.prior_samples": 3,
            "objective.norm": "const",
            "objective.norm_constant": C,
            "scoring.answer_samples": J,
            "train.questions_per_step": B,
            "optim.warmup_steps": 0,
        }
        return tiny_words({**fixed, **settings})(name)

    return make


def weights_of(trainer):
    """Every weight of both policies, by policy and name."""
    return {
        f"{who}.{name}": weight.clone()
        for who in WHO
        for name, weight in full_weights(trainer.stages.policies[who].policy, torch.float64)
    }


def changed(before, after):
    """The policies that have moved by a bit."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


# --- formulas ----------------------------------------------------------------------------------


class Two(torch.nn.Module):
    """Both models as one: the policy where nobody says whose log-probs are meant."""

    def __init__(self, policy, posterior):
        super().__init__()
        self.policy, self.posterior = policy, posterior

    def forward(self, ids):
        return self.policy(ids)


class Apart(Variational):
    """pi is the policy behind the student's prompt, q the posterior policy behind the teacher's."""

    def thought(self, model, b, path, view):
        return super().thought(getattr(model, WHO[view == "teacher"]), b, path, view)


class Both(Witness):
    """Keeps weights and gradients of both policies."""

    def update(self, rows, scored):
        weights = weights_of(self)
        self.seen[-1][1].append((weights, {name: torch.zeros(()) for name in weights}, {}))
        metrics, reason = Trainer.update(self, rows, scored)
        self.seen[-1][1][-1][2].update(metrics)
        return metrics, reason

    def accumulate(self, rows, plan=None):
        logps = self.adds(rows, plan)
        self.stages.policies.reshard()
        for who in WHO:
            named = self.stages.policies[who].policy.causal_lm.named_parameters()
            found = {f"{who}.{name}": whole(p.grad) for name, p in named if p.grad is not None}
            self.seen[-1][1][-1][1].update(found)
        return logps


def apart(words):
    """What the updates of a run of two policies are found to be, against the formula."""
    from transformers.models.qwen2 import modeling_qwen2

    modeling_qwen2.Qwen2RMSNorm.forward = wide_norm
    with Both(config.load(TINY, words)) as made:
        made.make()
        seen, facts = made.seen, facts_of(made)
    if made.world.rank:
        return None
    (first, second), (reference, _) = two_models(made.cfg), two_models(made.cfg)
    return compared(made.cfg, seen, facts, (reference, Two(first, second)), Apart)


FORMS = {
    "accuracy": {},
    "gml, exact": {"objective.estimator": "gml", "objective.thought_ratio": "exact"},
    "reverse": {
        "objective.phi": "reverse_kl",
        "objective.estimator": "likelihood",
        "objective.u_min": -5.0,
    },
    "iwae": {"objective.phi": "iwae", "objective.estimator": "gml"},
}


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("accuracy", 1),
        *(
            pytest.param(form, size, marks=pytest.mark.slow)
            for form, size in [("gml, exact", 1), ("reverse", 1), ("iwae", 1), ("accuracy", 2)]
        ),
    ],
)
def test_every_update_is_the_gradient_of_the_formula_with_two_models(form, size, words, other):
    """The ratio takes the posterior policy's log-probs for q and the policy's for pi, which differ
    from the first step on; the gradient of each is that of its own part."""
    keys = FORMS[form]
    if "objective.phi" in keys:  # whose hinted paths are theta's
        keys = {**keys, "objective.prior_samples": 8}
    how = SHORT | (MIXED if form == "accuracy" else LIKELY)
    run = words("run", **{**keys, **how, "posterior.path": other, "posterior.lr": 3e-3})
    found = run_ranks(apart, run, size=size)[0]
    made = [gap for gap in found["gaps"] if gap is not None]
    assert len(made) >= len(found["gaps"]) / 2
    assert max(made) <= 1e-9, found
    assert max(found["losses"]) <= 1e-9, found
    assert "weighed" in found["kinds"]
    assert {"forward_kl": "learnt"}.get(keys.get("objective.phi", "forward_kl"), "unlearnt") in (
        found["kinds"]
    )


def test_rows_say_whose_weights_they_train_and_whose_drew_their_path():
    """The ratio is of the posterior policy's log-probs. A sampler's log-probs stand beside the rows
    of the weights and the prompt that drew the path, and in no others."""
    paths, logps = hinted([[0.0, 0.0], [2.0, 2.0]], right=[(YES,), (YES,)])
    own, student = views("posterior")
    batch = batch_of([(paths, logps)])
    # Those of the policy itself behind the teacher's prompt are there too, and nobody's business.
    odd = {key: value - 9.0 * (key[2] == 0) for key, value in logps[VIEWS[0]].items()}
    known = {own: logps[VIEWS[0]], student: logps[VIEWS[1]], VIEWS[0]: odd}
    batch = replace(batch, posterior_who="posterior", logps=known)
    keys = Vr(share_params=False, group_size=2, phi="iwae", norm="seq_sum")
    terms, scale = keys.terms(batch, {}), Scale(norm="seq_sum")
    rows = build_rows(batch, terms, scale)
    shares = torch.tensor([0.0, 2.0]).softmax(0)
    assert [row.coef[0].item() for row in rows if row.term == "theta"] == pytest.approx(
        (-shares).tolist()
    )
    told = {(row.term, row.view, row.who, row.sample_logps is not None) for row in rows}
    assert told == {
        ("theta", "student", "policy", False),
        ("answer", "student", "policy", False),
        ("phi", "teacher", "posterior", True),
    }
    drew = drawn_rows(batch, terms).values()
    assert {(row.view, row.who) for row in drew} == {("teacher", "posterior")}
    # Where the policy drew them, the posterior policy's rows are no measure of the sampler.
    others = build_rows(replace(batch, posterior_who="policy"), terms, scale)
    assert not any(row.sample_logps is not None for row in others)
    # Two processes that disagree about it would train other models.
    assert checksum(rows) != checksum([replace(row, who="policy") for row in rows])


def gradients(trainer, rows):
    """The gradient of these rows, by policy and name; zero where none is."""
    trainer.stages.gradients.accumulate(rows)
    found = {}
    for who, learner in trainer.stages.policies.learners.items():
        for name, weight in learner.policy.causal_lm.named_parameters():
            grad = weight.grad
            found[who, name] = torch.zeros_like(weight) if grad is None else grad.clone()
    trainer.stages.policies.drop_gradients()
    return found


def test_with_equal_weights_both_gradients_add_up_to_the_shared_one(words):
    """The same paths are drawn, since the models are equal; each part has its own gradient."""
    how = SHORT | MIXED | {"train.minibatches": 1, "train.epochs": 1}
    found = {}
    for share in ("true", "false"):
        run = words(share, **{**how, "objective.share_params": share})
        with Trainer(config.load(TINY, run)) as trainer:
            rollout = trainer.draw()
            (rows,) = rollout.updates
            found[share] = [(row.term, row.context_ids, row.token_ids, row.coef) for row in rows]
            assert {row.who for row in rows} == ({"policy"} if share == "true" else {*WHO})
            assert {row.term for row in rows if row.who == "posterior"} <= {"phi"}
            found[share, "sum"] = gradients(trainer, rows)
            if share == "false":
                student = {q.question.id: q.student_ids for q in rollout.batch.questions}
                # No token that only the teacher saw is in a row of theta.
                for row in rows:
                    if row.who == "policy":
                        prompt = student[row.path[0]]
                        assert torch.equal(row.context_ids[: len(prompt)], prompt)
                        path = next(p for p in rollout.batch.posterior.flat if p.key == row.path)
                        behind = torch.cat([row.context_ids, row.token_ids])[len(prompt) :]
                        assert torch.equal(behind[: path.z_ids.numel()], path.z_ids)
                        rest = behind[path.z_ids.numel() :].tolist()
                        assert rest in [[], *(a.ids.tolist() for a in path.attempts if a.right)]
    for (term, *ours), (other, *theirs) in zip(found["true"], found["false"], strict=True):
        assert term == other
        assert all(map(torch.equal, ours, theirs))
    shared, own = found["true", "sum"], found["false", "sum"]
    for name in {name for _, name in shared}:
        added = own["policy", name] + own["posterior", name]
        apart = (added - shared["policy", name]).norm() / shared["policy", name].norm()
        assert apart <= 1e-9, name
        assert own["policy", name].norm() > 0
        assert own["posterior", name].norm() > 0


# --- updates -----------------------------------------------------------------------------------


def test_a_policy_without_rows_and_both_of_a_broken_one_stay_as_they_are(words, other):
    """To the bit: weights and optimiser states; a norm that is not finite skips both."""
    run = words("run", **{**SHORT, **MIXED, "posterior.path": other})
    with Trainer(config.load(TINY, run)) as trainer:
        rows = trainer.draw().updates[0]
        policies = trainer.stages.policies
        assert changed(weights_of(trainer), weights_of(trainer)) == set()
        for who in WHO:
            before = weights_of(trainer)
            metrics, reason = trainer.update([row for row in rows if row.who == who], [])
            assert reason is None
            assert changed(before, weights_of(trainer)) == {who}
            norms = metrics["grad_norm"], metrics["grad_norm_posterior"]
            assert [norm > 0 for norm in norms] == [who == "policy", who == "posterior"]
        assert metrics["lr_posterior"] == metrics["lr"] == 1e-3
        for who in WHO:
            before = weights_of(trainer)
            states = {w: [*policies[w].optimizer.state.values()] for w in WHO}
            counts = {w: [float(s["step"]) for s in states[w]] for w in WHO}
            broken = [
                replace(row, coef=row.coef * math.nan) if row.who == who else row for row in rows
            ]
            metrics, reason = trainer.update(broken, [])
            assert reason == "the gradient norm is nan"
            assert metrics["skipped"] == 1
            assert changed(before, weights_of(trainer)) == set()
            assert {w: [float(s["step"]) for s in states[w]] for w in WHO} == counts


# --- the engine --------------------------------------------------------------------------------


def alike(some, others):
    """Whether paths have the same tokens, drawn with the same log-probs."""
    # Models that are 2 % apart mostly draw the same tokens of the same seeds.
    return all(
        torch.equal(a.response_ids, b.response_ids) and torch.allclose(a.logps, b.logps, atol=1e-5)
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("shard", ["never", "always"])
def test_each_stream_is_drawn_from_its_policy_and_a_swapped_engine_is_found(shard, words, other):
    """By a whole module, and by a copy beside a sharded one, which is given all weights anew."""
    run = words("run", **{"posterior.path": other, "parallel.shard": shard})
    run_ranks(turn, run, size=1 if shard == "never" else 2)


def turn(words):
    with Trainer(config.load(TINY, words)) as trainer:
        stages = trainer.stages
        collector, turns, policies = stages.collector, stages.turns, stages.policies
        questions = collector.questions[:2]
        posterior, prior = (
            [path for group in groups for path in group]
            for groups in collector.sample(questions, 9)
        )
        assert turns.holds == "policy"
        # What each policy draws alone, of the same requests.
        for who in WHO:
            with turns.lent() as hand_over:
                hand_over(who, policies[who].policy)
                requests = collector._requests(questions, 9, collector.draws.plan[:2])
                alone = turns.engine.generate(requests, collector.sampling)
            of = {s: [p for p in alone if p.stream == s] for s in ("posterior", "prior")}
            assert alike(of["posterior"], posterior) == (who == "posterior")
            assert alike(of["prior"], prior) == (who == "policy")
        # An engine that was given the other's weights under the name of the first.
        turns.give("policy", policies["posterior"].policy, check=False)
        turns.require("policy")
        with pytest.raises(RolloutError, match="has the weights of the posterior where those of"):
            turns.probe("policy")
        turns.give("posterior", policies["posterior"].policy, check=True)
        with pytest.raises(RolloutError, match="holds the weights of the posterior, expected"):
            trainer.evaluate(0)  # a benchmark asks the reasoning model
        turns.give(check=True)
        turns.require("policy")


# --- checkpoints -------------------------------------------------------------------------------

STEPS = {"train.steps": 2, "checkpoint.save_every": 1, "checkpoint.keep_last": 2}
BETWEEN = SHORT | MIXED


def run_to_the_end(words, *more, resume=False):
    with Trainer(config.load(TINY, [*words, *more]), resume=resume) as trainer:
        while not trainer.over:
            trainer.finish_step(trainer.train_step())
    return trainer.cfg.run.dir


def tensors(run, step):
    return open_checkpoint(run, step, world=World(torch.device("cpu"))).tensors()


def test_a_resumed_run_is_bitwise_the_run_of_both_policies(words, other):
    run = words("run", **STEPS, **MIXED, **{"posterior.path": other})
    where = Path(run_to_the_end(run))
    last, lines = tensors(where, 2), recorded(where)
    names = {name.split(".")[0] for name in last}
    assert names == {"model", "optimizer", "posterior"}
    own = {name.removeprefix("posterior.") for name in last if name.startswith("posterior.")}
    assert own == {name for name in last if not name.startswith("posterior.")}
    first = tensors(where, 1)
    assert {n.split(".")[0] for n in last if not torch.equal(first[n], last[n])} == names
    shutil.rmtree(where / "checkpoints/step_2")
    run_to_the_end(run, resume=True)
    again = tensors(where, 2)
    assert last.keys() == again.keys()
    assert all(torch.equal(last[name], again[name]) for name in last)
    assert recorded(where) == lines
    # Each alone, into a model of its shapes.
    cfg = config.load(TINY, run)
    found = open_checkpoint(where, 2, world=World(torch.device("cpu")))
    for who, prefix in (("policy", ""), ("posterior", "posterior.")):
        policy = load_policy(posterior_model(cfg))
        put_weights(found, policy, world=World(torch.device("cpu")), who=who)
        for name, weight in full_weights(policy):
            assert torch.equal(weight, last[f"{prefix}model.{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", ["sharded", "unsharded"])
def test_two_processes_train_what_one_does(accumulate, words, other):
    """Both models in shards, each gathered for its own passes and its turn at the engine."""
    how = {**STEPS, **MIXED, "posterior.path": other, "posterior.lr": 2e-3}
    one = run_to_the_end(words("one", **how))
    two = words("two", **how, **{"parallel.accumulate": accumulate})
    two = run_ranks(run_to_the_end, two)[0]
    lines, ours = recorded(one), recorded(two)
    for mine, its in zip(ours, lines, strict=True):
        for key in ("loss", "loss_phi", "loss_theta", "grad_norm", "grad_norm_posterior", "vr_ess"):
            assert mine[key] == pytest.approx(its[key], rel=1e-9), key
        assert mine["lr_posterior"] == 2 * mine["lr"]
        assert mine["grad_norm"] > 0
        assert mine["grad_norm_posterior"] > 0
        assert mine["probe_mean"] <= 1e-4
    weights, found = tensors(one, 2), tensors(two, 2)
    assert found.keys() == weights.keys()
    apart = {n: float((found[n] - weights[n]).abs().max()) for n in weights if "model." in n}
    # Adam divides a gradient by its own size, so a rounding of a tiny one moves a weight by more.
    assert max(apart.values()) <= 1e-6, apart


def test_a_checkpoint_of_another_number_of_policies_is_refused(words):
    """In one line, and before any weight has changed; one of a single policy is read as ever."""
    one = words("one", **{"objective.share_params": "true", "rollout.max_new_tokens": 24})
    where = run_to_the_end(one)
    world = World(torch.device("cpu"))
    two = words("two", **{"rollout.max_new_tokens": 24})
    with Trainer(config.load(TINY, two)) as trainer:
        kept, before = trainer.stages.policies.kept(), weights_of(trainer)
        with pytest.raises(CheckpointError, match=r"holds no posterior policy, and this run has"):
            load_checkpoint(where, world=world, **kept)
        assert changed(before, weights_of(trainer)) == set()
        with pytest.raises(CheckpointError, match="one policy and no posterior policy"):
            put_weights(
                open_checkpoint(where, 1, world=world),
                trainer.stages.policy,
                world=world,
                who="posterior",
            )
        assert load_checkpoint(where, world=world, **{**kept, "posterior": None}) is not None
        trainer.save()
        with pytest.raises(CheckpointError, match=r"holds a posterior policy, and this run has no"):
            load_checkpoint(trainer.cfg.run.dir, world=world, **{**kept, "posterior": None})


# --- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective": "vr_theta", "objective.share_params": "false"}, "share_params"),
        ({"objective": "grpo", "objective.share_params": "false"}, "share_params"),
        (
            {"objective": "vr", "posterior.lr": "1e-6"},
            "posterior.lr: got 1e-06, but objective 'vr' trains one policy; set",
        ),
        ({"objective": "vr_phi", "posterior.path": "x"}, "posterior.path: got 'x', but objective"),
        (
            {"objective": "vr", "objective.share_params": "false", "objective.phi_weight": "0.5"},
            "phi_weight: got 0.5, which changes nothing with share_params False",
        ),
        (
            {"objective": "vr", "objective.share_params": "false", "engine": "replay"},
            "engine.name: got 'replay' with a posterior policy",
        ),
    ],
)
def test_keys_of_a_policy_that_there_is_not_are_refused(given, said):
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    if given.get("engine") == "replay":
        words += ["--engine.paths", "[x.jsonl]"]
    with pytest.raises(ValueError, match=said.replace("(", r"\(")) as caught:
        config.load(TINY, words)
    assert len(str(caught.value).splitlines()) <= 2  # the second is the problem, of one line


def test_a_posterior_policy_of_other_shapes_is_refused(words, tmp_path, tiny_world, random_qwen2):
    odd = tmp_path / "odd"
    random_qwen2(hidden=64).save_pretrained(odd)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_world.base_dir) / name, odd / name)
    with pytest.raises(ModelError, match=r"posterior\.path: got .*odd, whose"):
        Trainer(config.load(TINY, words("run", **{"posterior.path": odd})))
    assert not (tmp_path / "run").exists()


def test_the_scores_and_terms_of_two_policies_say_whose_they_are():
    keys = Vr(share_params=False, group_size=2)
    assert {(s.view, s.who) for s in keys.needs() if s.part == "thought"} == {
        ("teacher", "posterior"),
        ("student", "policy"),
    }
    assert keys.draws().posterior_who == "posterior"
    assert Vr().draws().posterior_who == "policy"

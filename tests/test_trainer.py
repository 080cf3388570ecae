"""The whole run: end to end, repeatable, resumable, and honest about what it could not do."""

import copy
import gc
import json
import math
import os
import random
import shutil
import signal
import time
import weakref
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import losing
from ranks import Program, run_ranks
from runs import recorded, words_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpgea_fast import checkpoint, config, diagnostics
from vpgea_fast.distributed import Stopped, World
from vpgea_fast.metrics import PhaseTimer
from vpgea_fast.objectives import Vpgea
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.rows import Scale, build_rows
from vpgea_fast.run_dir import export_step, rate_changes
from vpgea_fast.trainer import Ending, Trainer, TrainingError, fit

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"


SMALL = {
    "train.questions_per_step": 2,
    "objective.group_size": 4,
    "objective.prior_samples": 2,
    "train.steps": 4,
    "rollout.max_new_tokens": 24,
    "eval.max_new_tokens": 24,
    "metrics.compare": "null",
}
"""Most of the time goes into sampling: room for concise chains alone, of at most 22 tokens."""
LONGER = ["--rollout.max_new_tokens", "48"]
AS_TRAINED = ["--rollout.max_new_tokens", "240"]
JUDGED = ["--eval.max_new_tokens", "240"]
"""An evaluation that finds right answers: of the base's long chains."""


@pytest.fixture
def words(tiny_words, tiny_world):
    """Command-line words for a small run of the tiny task: `words("name", "--a.b", "c")`."""
    given = tiny_words({"eval.data": f"[{tiny_world.test_path}]", "eval.limit": 8, **SMALL})

    def make(name, *more):
        found = given(name, *more)
        if "grpo" in more:  # which has no such key
            skip = found.index("--objective.prior_samples")
            del found[skip : skip + 2]
        return found

    return make


@pytest.fixture(scope="module")
def _finished(tiny_world, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    test = {"eval.data": f"[{tiny_world.test_path}]", "eval.limit": 2}
    settings = {**test, "checkpoint.save_every": 2, **SMALL}
    assert fit(config.load(TINY, words_of(settings, tiny_world, run)))
    return run


@pytest.fixture
def finished(_finished, tmp_path):
    """A copy of one finished run: four steps, saved at 2 and 4, evaluated before and after."""
    return shutil.copytree(_finished, tmp_path / "run")


def resume(run, *more):
    """Go on with a run, which may be a copy: a configuration holds the path of its run."""
    moved = ["--run.dir", str(run), *map(str, more)]
    return fit(config.load(run / "config.yaml", moved), resume=True)


def lines(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


def command(words):
    from vpgea_fast.cli import main

    return main(words)


def train(words):
    """`vpgea train` in a process of its own."""
    assert run_ranks(command, ["train", *map(str, words)], size=1, timeout_s=280) == [0]


def newest(run_dir):
    saved = checkpoint.find_checkpoint(run_dir, world=World(torch.device("cpu")))
    assert saved is not None
    return saved


def same_state(a, b):
    a, b = newest(a), newest(b)
    assert a.step == b.step
    assert a.trainer_state["method"] == b.trainer_state["method"]
    mine, its = a.tensors(), b.tensors()
    assert mine.keys() == its.keys()
    assert all(torch.equal(tensor, its[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(
    "objective",
    [
        JUDGED,
        [
            "--objective.preset",
            "paper",
            "--objective.gate",
            "relu",
            "--rollout.full_answer",
            "false",
        ],
        ["--objective.name", "grpo", "--objective.alpha", "0.5", *AS_TRAINED],
        ["--objective.name", "grpo", "--objective.reward", "likelihood", *AS_TRAINED],
        ["--objective.verify", "gate", "--objective.norm", "token_mean", "--eval.every", "2"],
        ["--scoring.u_source", "accuracy", "--train.resample_rounds", "2"],
    ],
    ids=["robust", "paper-relu", "grpo-length", "grpo-likelihood", "verified", "resampled"],
)
def test_a_run_from_end_to_end(words, tmp_path, objective, capsys):
    keep = [] if "grpo" not in objective else ["--objective.group_size", "4"]
    shown = ["--metrics.compare", "tiny_demo", "--metrics.figure", "true"]
    given = words("run", *objective, *keep, *AS_TRAINED, *shown)
    cfg = config.load(TINY, given)
    assert fit(cfg)
    run = tmp_path / "run"
    assert config.load(run / "config.yaml") == cfg
    assert {"commit", "torch", "transformers", "loss_backend", "attention", "run_device"} <= {
        *json.loads((run / "environment.json").read_text())
    }
    records = lines(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    always = {"len_prior", "trunc_prior", "lr", "loss", "grad_norm", "groups_all_rejected"}
    always |= {"groups_zero_var", "std_s", "net_token_push", "accept_rate", "peak_memory_mib"}
    always |= {"tokens_trained", "tokens_gated_off", "time_rollout_s", "time_train_s"}
    always |= {"train_tokens_per_s", "mfu"}
    if cfg.objective.name == "vpgea":
        always |= {"len_post", "u_prior", "u_post", "u_post_p10", "gate_rate", "adv_post"}
        always |= {"cov_ls", "prop1_gap", "e_qstar_s", "share_cov_negative"}
        assert {"kl_q_pi", "kl_q_pi_max", "hint_token_rate", "elbo"} <= {*records[0]}
        assert {"entropy_teacher", "entropy_student", "early_answer_rate", "grad_norm_pg"} <= {
            *records[0]
        }
    for record in records:
        assert always <= {*record}
        assert all(
            v is None or not isinstance(v, float) or math.isfinite(v) for v in record.values()
        )
    assert any(record["skipped"] == 0 and record["grad_norm"] > 0 for record in records)
    assert all(
        (record.get("plan_rounds", 0) > 0) == bool(record["tokens_trained"]) for record in records
    )
    if cfg.rollout.full_answer:
        assert all(0 <= record["acc_student"] <= 1 for record in records)
    if cfg.eval.every:
        assert [record.get("eval_step") for record in records] == [None, None, 2, None]
        assert 0 <= records[2]["eval_sampled_acc"] <= 1
    assert all({"stream", "ids", "text", "length", "u"} <= {*r} for r in lines(run, "paths.jsonl"))
    assert set(json.loads((run / "eval.json").read_text())) == {"before", "after"}
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "training.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "student prompt: <s><|user|>" in shown
    assert "constructed task: it shows the mechanism" in shown
    assert ("teacher prompt:" in shown) == (cfg.objective.name == "vpgea")

    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    saved = newest(run).tensors()
    assert all(torch.equal(p, saved[f"model.{name}"]) for name, p in exported.named_parameters())
    assert AutoTokenizer.from_pretrained(run / "export").chat_template
    texts = [path.read_text() for path in (run / "export").glob("*.json*")]
    assert not any("{answer}" in text for text in texts)


def test_a_run_that_has_ended_holds_no_model(words):
    """Its memory is free for what a program does next, while it still has the trainer."""
    cfg = config.load(TINY, words("run", "--train.steps", "1", "--eval.limit", "1"))
    with Trainer(cfg) as trainer:
        weights = [weakref.ref(weight) for weight in trainer.stages.policy.parameters()]
        trainer.evaluations.once("before")
        trainer.finish_step(trainer.train_step())
        gc.collect()
        assert all(weight() is not None for weight in weights)
    gc.collect()
    assert [weight for weight in weights if weight() is not None] == []


def test_same_seed_same_run_and_another_seed_another(words, finished, tmp_path):
    for name, *more in (("b",), ("c", "--run.seed", "1", "--train.steps", "1")):
        assert fit(config.load(TINY, words(name, *more, "--eval.limit", "2")))
    assert recorded(finished) == recorded(tmp_path / "b")
    runs = (finished, tmp_path / "b", tmp_path / "c")
    paths = [(run / "paths.jsonl").read_bytes() for run in runs]
    assert paths[0] == paths[1]
    assert paths[2]
    assert not paths[0].startswith(paths[2])
    same_state(finished, tmp_path / "b")


@pytest.mark.parametrize("half", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_is_its_half_and_a_new_process_and_the_rest(words, tmp_path, half):
    # a decaying schedule ends with train.steps, which differs here; the killed run below has one
    save_every = ["--checkpoint.save_every", str(min(half, 10))]
    more = ["--eval.data", "[]", *save_every, "--optim.warmup_steps", "3"]
    more += ["--optim.schedule", "constant"]
    train([TINY, *words("straight", *more, "--train.steps", str(2 * half))])
    train([TINY, *words("parts", *more, "--train.steps", str(half))])
    train(["--resume", tmp_path / "parts", "--train.steps", str(2 * half)])
    assert recorded(tmp_path / "straight") == recorded(tmp_path / "parts")
    straight, parts = (
        (tmp_path / name / "paths.jsonl").read_bytes() for name in ("straight", "parts")
    )
    assert straight == parts
    same_state(tmp_path / "straight", tmp_path / "parts")
    assert sum(record["skipped"] for record in lines(tmp_path / "parts")) < half


# Measured anew, or on the next stage, between two saves: a step that is lost is counted again.
KEEPING = {
    "think_prune": {"limits": "[52,50,48,46,44]", "steps": "3"},
    "laser_d": {"every": "3", "grid": "4"},
    "laser_de": {"every": "3", "grid": "4"},
}
"""Length rewards with a state."""


# Quick ones: test_durability.py kills at every operation, test_between_updates.py within a step.
@pytest.mark.slow
@pytest.mark.parametrize("state", [None, *KEEPING])
def test_killed_at_random_moments(words, tmp_path, state):
    """kill -9 anywhere: the next process goes on by itself and loses at most save_every steps. What
    an objective keeps from step to step is that of a run that nobody killed."""
    kills, steps = 3, 30
    more = ["--eval.every", "4", "--eval.greedy", "false", "--eval.limit", "4"]
    if state:
        more += ["--objective.name", "grpo", *AS_TRAINED]
        for key, value in {"name": state, **KEEPING[state]}.items():
            more += [f"--objective.length_reward.{key}", value]
    more += ["--checkpoint.save_every", "2", "--train.steps", str(steps)]
    train([TINY, *words("whole", *more)])
    run, generator = tmp_path / "killed", random.Random(7)
    start: list = [TINY, *words("killed", *more)]
    for _ in range(kills):
        seen = len(lines(run)) if (run / "metrics.jsonl").exists() else 0
        process = Program("-m", "vpgea_fast.cli", "train", *start)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "metrics.jsonl").exists() and len(lines_so_far(run)) > seen + 1:
                break
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.8))
        process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0), errors
        reached = lines_so_far(run)[-1]["step"]
        # a look from outside: opening the checkpoint would also clean up
        saved = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")]
        assert reached - max(saved, default=0) <= 2
        start = ["--resume", run]
    train(start)
    assert recorded(run) == recorded(tmp_path / "whole")
    assert (run / "paths.jsonl").read_bytes() == (tmp_path / "whole/paths.jsonl").read_bytes()
    assert sum("eval_step" in record for record in lines(run)) == (steps - 1) // 4
    same_state(run, tmp_path / "whole")
    limits = {record.get("length_limit") for record in lines(run)}
    assert len(limits) >= 3 if state else limits == {None}


def lines_so_far(run):
    """Whole lines of a file that another process may be writing."""
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_sigterm_saves_and_says_how_to_go_on(words, tmp_path):
    more = ["--eval.data", "[]", "--checkpoint.save_every", "1000", "--train.steps", "1000"]
    run = tmp_path / "stopped"
    process = Program("-m", "vpgea_fast.cli", "train", TINY, *words("stopped", *more))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(lines_so_far(run)) >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    said = [line for line in out.splitlines() if line.startswith(("SIGTERM", "stopped"))]
    assert said[0] == "SIGTERM: saves before it ends, which may take a step"  # heard at once
    assert said[1].endswith(f"--resume {run}")
    assert len(said) == 2
    step = newest(run).step
    assert step == lines(run)[-1]["step"] >= 3
    last = ["--resume", str(run), "--train.steps", str(step + 1)]
    process = Program("-m", "vpgea_fast.cli", "train", *last)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"\ngoes on after step {step}\n" in f"\n{out}"


def test_an_all_gated_step_makes_no_update(words, tmp_path):
    cfg = config.load(TINY, words("run", "--eval.data", "[]", "--objective.std_gate", "1e9"))
    with Trainer(cfg) as trainer:
        before = {name: p.clone() for name, p in trainer.stages.policy.named_parameters()}
        stats = trainer.train_step()
        trainer.finish_step(stats)
        assert stats.skipped == "no path has a gradient"
        assert stats.metrics["tokens_trained"] == 0
        assert all(
            torch.equal(p, before[name]) for name, p in trainer.stages.policy.named_parameters()
        )
        assert not trainer.stages.optimizer.state
    assert lines(tmp_path / "run")[0]["skipped"] == 1


def test_a_run_that_makes_no_update_saves_evaluates_exports_and_ends(words, tmp_path, capsys):
    few = ["--eval.limit", "2", "--eval.greedy", "false", "--train.idle_stop", "3"]
    few += ["--train.idle_alarm", "2", "--train.steps", "9"]
    cfg = config.load(TINY, words("run", *few, "--objective.std_gate", "1e9"))
    assert fit(cfg) is Ending.HALTED
    run, shown = tmp_path / "run", capsys.readouterr().out
    assert "alarm at step 2: no update for 2 steps in a row (2 x " in shown
    assert "ended after step 3, before train.steps: no update for 3 steps in a row (3 x" in shown
    assert newest(run).step == 3
    assert json.loads((run / "eval.json").read_text())["after"]["step"] == 3
    assert (run / "export/config.json").exists()
    assert "stopped at step 3: no update" in (run / "report.html").read_text()
    more = ["--checkpoint.export", "false", "--train.steps", "5"]
    assert fit(config.load(run / "config.yaml", more), resume=True) is Ending.DONE
    assert newest(run).step == 5  # another chance, of three steps


def test_an_engine_that_is_far_from_the_trainer_ends_the_run(words, monkeypatch, tmp_path):
    generate = HFEngine.generate

    def off(*args):
        return [replace(path, logps=path.logps + 1.0) for path in generate(*args)]

    monkeypatch.setattr(HFEngine, "generate", off)
    more = ["--eval.data", "[]", "--checkpoint.export", "false", "--train.steps", "9"]
    assert fit(config.load(TINY, words("run", *more))) is Ending.HALTED
    means = [record["mismatch_mean"] for record in lines(tmp_path / "run")]
    assert [mean > 2 for mean in means][-3:] == [True] * 3
    assert newest(tmp_path / "run").step == len(means) < 9
    assert "train.mismatch_stop (2) for 3 steps" in (tmp_path / "run/report.html").read_text()


def test_the_step_counts_its_own_prompts_and_logs_the_loss_of_its_views(words):
    """An evaluation before the step draws with the same engine; its prompts are not the step's.

    2 questions x (4 + 2) paths: of 12 prompts, 4 are the first of their view and question."""
    changes = (
        "--objective.norm",
        "seq_sum",
        "--objective.preset",
        "paper",
        "--rollout.max_batch",
        "64",
    )
    rates = []
    for evaluate in (False, True):
        with Trainer(config.load(TINY, words(f"run{evaluate}", *changes))) as trainer:
            if evaluate:
                trainer.stages.evaluator.run()
            stats = trainer.train_step().metrics
            rates.append(stats["prefix_hit_rate"])
    assert rates[0] == rates[1] > 0.5
    assert stats["loss"] == pytest.approx(stats["loss_pg"] + stats["loss_distill"], abs=1e-12)
    # beta, 1/(B G) and nats: kl_gated is the same difference, by token
    assert stats["loss_distill"] * stats["kl_gated"] > 0


@pytest.mark.parametrize("key", ["len_post", "loss"])
def test_an_objective_cannot_overwrite_a_metric_of_the_step(words, monkeypatch, key):
    real = Vpgea.terms

    def naming_it(*args):
        terms = real(*args)
        return replace(terms, metrics={**terms.metrics, key: -1.0})

    monkeypatch.setattr(Vpgea, "terms", naming_it)
    with (
        Trainer(config.load(TINY, words("run", "--eval.data", "[]"))) as trainer,
        pytest.raises(ValueError, match=f"metrics: got {key} twice"),
    ):
        trainer.train_step()


def test_non_finite_gradients_stop_the_run_and_never_reach_a_checkpoint(words, tmp_path):
    cfg = config.load(
        TINY,
        words("run", "--eval.data", "[]", "--train.steps", "50", "--checkpoint.save_every", "1"),
    )
    with Trainer(cfg) as trainer:
        trainer.finish_step(trainer.train_step())
        good = {name: p.clone() for name, p in trainer.stages.policy.named_parameters()}
        next(trainer.stages.policy.parameters()).register_hook(lambda grad: grad * math.nan)

        def go_on():
            for _ in range(45):
                trainer.finish_step(trainer.train_step())

        with pytest.raises(TrainingError, match="5 non-finite gradients in a row"):
            go_on()
        assert all(
            torch.equal(p, good[name]) for name, p in trainer.stages.policy.named_parameters()
        )
    saved = newest(tmp_path / "run").tensors()
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_reference_and_torch_losses_train_alike(words, tmp_path, count):
    """The same samples; 1e-5 relative, about 100 roundings of float32. A loss is what
    is left of path log-probs of about 100 nats, so 2e-5 nats there."""
    backends = ("reference", "torch")
    for name in backends:
        given = words(
            name, "--loss.backend", name, "--eval.data", "[]", "--train.steps", str(count)
        )
        assert fit(config.load(TINY, given))
        facts = json.loads((tmp_path / name / "environment.json").read_text())
        assert (facts["loss_backend"], facts["loss_backend_reason"]) == (name, "asked for")
    paths = [[path["ids"] for path in lines(tmp_path / name, "paths.jsonl")] for name in backends]
    assert paths[0] == paths[1]
    assert sum(record["skipped"] == 0 for record in lines(tmp_path / "torch")) >= count // 2
    for a, b in zip(lines(tmp_path / "reference"), lines(tmp_path / "torch"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        for key in ("grad_norm", "u_post", "u_prior"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key


class RecordingEngine:
    """The engine protocol in front of a real engine; remembers what was asked for."""

    def __init__(self, engine):
        self.engine, self.requests = engine, []

    def generate(self, requests, sampling, on_progress=None):
        self.requests += requests
        return self.engine.generate(requests, sampling, on_progress)

    def check(self, requests, sampling):
        self.engine.check(requests, sampling)

    def close(self):
        self.engine.close()


def test_no_teacher_prompt_reaches_an_evaluation_or_a_student_row(words):
    cfg = config.load(TINY, words("run"))
    with Trainer(cfg) as trainer:
        engine = RecordingEngine(trainer.stages.engine)
        trainer.stages.collector.engine = trainer.stages.evaluator.engine = engine
        trainer.stages.evaluator.run()
        hint = trainer.stages.intake.text.tokenizer(" hint", add_special_tokens=False)["input_ids"][
            0
        ]
        assert len(engine.requests) == 16
        assert all(hint not in request.prompt_ids.tolist() for request in engine.requests)
        questions = trainer.stages.intake.questions[:2]
        posterior, prior = trainer.stages.collector.sample(questions, step=0)
        asked = engine.requests[16:]
        assert all((hint in r.prompt_ids.tolist()) == (r.stream == "posterior") for r in asked)
        batch = trainer.stages.collector.score(questions, posterior, prior, step=0)
        rows = build_rows(batch, cfg.objective.terms(batch, {}), Scale())
        assert {row.view for row in rows} == {"teacher", "student"}
        assert all((hint in r.context_ids.tolist()) == (r.view == "teacher") for r in rows)
        assert batch.posterior.u_BP.shape == (2, 4)
        assert batch.prior.u_BP.shape == (2, 2)


def test_a_counterfactual_is_the_thought_behind_another_questions_answer(words):
    """Against a dense float64 forward of the prompt that the wrong answer makes."""
    cfg = config.load(TINY, words("run"))
    with Trainer(cfg) as trainer:
        collector, text = trainer.stages.collector, trainer.stages.intake.text
        questions = trainer.stages.intake.questions[:3]
        posterior, prior = collector.sample(questions, step=0)
        batch = collector.score(questions, posterior, prior, step=0)
        own, other = cfg.objective.guard_scores()
        hint = text.tokenizer(" hint", add_special_tokens=False)["input_ids"][0]
        wrong = set()
        for step in (0, 0, 1):
            misled = collector._misled(questions, step)
            for right, q in zip(questions, misled, strict=True):
                # The hint's digit, and no other token of the prompt, is another.
                place = right.teacher_ids.tolist().index(hint)
                differs = (q.teacher_ids != right.teacher_ids).nonzero().flatten().tolist()
                assert len(differs) == 1
                assert differs[0] > place
                assert q.question.answer != right.question.answer
            wrong.add(tuple(q.question.answer for q in misled))
        assert len(wrong) == 2  # a function of the step
        model = copy.deepcopy(trainer.stages.policy.causal_lm).double()
        misled = collector._misled(questions, 0)
        for score, asked in ((own, questions), (other, misled)):
            for q, group in zip(asked, posterior, strict=True):
                for path in group:
                    ids = torch.cat([q.teacher_ids, path.z_ids])[None]
                    logits = model(ids, use_cache=False).logits[0, -len(path.z_ids) - 1 : -1]
                    dense = logits.log_softmax(-1).gather(-1, path.z_ids[:, None])[:, 0]
                    got = batch.logps[score][path.key]
                    assert torch.allclose(got, dense.detach(), rtol=0, atol=1e-4)


def test_an_early_answer_is_cut_off_and_the_rest_scored_by_itself(words):
    """Against a dense float64 forward of the thought up to the answer, closed there."""
    cfg = config.load(TINY, words("run", "--objective.leak_guard", "early_answer", *LONGER))
    with Trainer(cfg) as trainer:
        collector = trainer.stages.collector
        questions = trainer.stages.intake.questions[:4]
        batch = collector.score(questions, *collector.sample(questions, step=0), step=0)
        (score,) = (s for s in cfg.objective.needs() if s.view == "early")
        model, close = (
            copy.deepcopy(trainer.stages.policy.causal_lm).double(),
            collector.sampling.think_close_id,
        )
        found = set()
        for q, path in batch.pairs("posterior"):
            # A digit is a token of the tiny task.
            words = [collector.decode(token[None]) for token in path.z_ids]
            starts = [i for i, word in enumerate(words) if word == q.question.answer]
            cut = bool(starts) and 2 * starts[0] < len(words)
            found.add(cut)
            got = batch.logps[score][path.key]
            assert got.numel() == cut
            if cut:
                end = [path.z_ids[: starts[0]], torch.tensor([close]), q.cue_ids, q.target_ids]
                ids, n = torch.cat([q.student_ids, *end])[None], q.target_ids.numel()
                logits = model(ids, use_cache=False).logits[0, -n - 1 : -1]
                dense = logits.log_softmax(-1).gather(-1, q.target_ids[:, None]).sum()
                assert got.item() == pytest.approx(dense.item(), abs=1e-4)
        assert found == {True, False}


def test_a_data_set_with_one_answer_has_no_counterfactual(words, tmp_path):
    file = tmp_path / "one.jsonl"
    rows = [{"id": f"q{i}", "question": "4 A+three B-five", "answer": "2"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config.load(TINY, words("run", "--data.train", str(file)))
    with pytest.raises(ValueError, match="no other question's answer is a wrong one"), Trainer(cfg):
        pass


def test_the_best_checkpoint_is_kept_and_exported(words, tmp_path, capsys):
    """The same after a kill: which step is the best is in the files."""
    more = ["--eval.every", "2", "--eval.greedy", "false", "--checkpoint.keep_last", "1"]
    more += ["--checkpoint.save_every", "3", "--checkpoint.keep_best", "sampled_acc"]
    more += ["--optim.lr", "0.003", "--optim.warmup_steps", "0"]  # ruined by step 6
    more += ["--optim.schedule", "constant", *JUDGED]
    assert fit(config.load(TINY, words("straight", *more, "--train.steps", "8")))
    run, shown = tmp_path / "straight", capsys.readouterr().out
    points = {r["eval_step"]: r["eval_sampled_acc"] for r in lines(run) if "eval_step" in r}
    points[8] = json.loads((run / "eval.json").read_text())["after"]["sampled"]["acc"]
    assert [*points] == [2, 4, 6, 8]
    best = max(points, key=lambda step: (points[step], step))
    assert best < 8, points
    assert checkpoint.saved_steps(run) == [best, 8]
    assert f"best by sampled_acc: step {best} " in shown
    assert fit(config.load(TINY, words("parts", *more, "--train.steps", "5")))
    (tmp_path / "parts/metrics.jsonl").write_text("")  # the checkpoint knows it, too
    points[5] = json.loads((tmp_path / "parts/eval.json").read_text())["after"]["sampled"]["acc"]
    kept = max(points, key=lambda step: (points[step], step))
    onward = config.load(tmp_path / "parts/config.yaml", ["--train.steps", "8"])
    assert fit(onward, resume=True)
    assert checkpoint.saved_steps(tmp_path / "parts") == [kept, 8]

    out = export_step(run, "best")
    assert out == run / f"export_step_{best}"
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    saved = checkpoint.open_checkpoint(run, best, world=World(torch.device("cpu"))).tensors()
    assert all(torch.equal(p, saved[f"model.{name}"]) for name, p in exported.named_parameters())
    again = export_step(run, 8, tmp_path / "eight")
    assert (again / "model.safetensors").read_bytes() == (
        run / "export/model.safetensors"
    ).read_bytes()
    assert {p.name for p in again.iterdir()} == {p.name for p in (run / "export").iterdir()}
    with pytest.raises(checkpoint.CheckpointError, match="eight is not empty"):
        export_step(run, "last", tmp_path / "eight")


def test_an_existing_run_is_never_overwritten(finished):
    before = contents(finished)
    with pytest.raises(checkpoint.CheckpointError, match="--resume"):
        fit(config.load(finished / "config.yaml", ["--run.dir", str(finished)]))
    assert contents(finished) == before


def test_a_stop_in_an_evaluation_loses_nothing(words, tmp_path):
    more = ["--eval.every", "2", "--eval.greedy", "false"]
    assert fit(config.load(TINY, words("whole", *more)))
    cfg = config.load(TINY, words("stopped", *more))
    with Trainer(cfg) as trainer:
        trainer.evaluations.once("before")
        for _ in range(2):
            trainer.finish_step(trainer.train_step())
        trainer.stop.requested = True
        with pytest.raises(Stopped):
            trainer.train_step()
        trainer.save()
    assert fit(config.load(tmp_path / "stopped/config.yaml"), resume=True)
    assert recorded(tmp_path / "stopped") == recorded(tmp_path / "whole")
    same_state(tmp_path / "stopped", tmp_path / "whole")


def test_a_resumed_run_stays_the_same_run(finished):
    before = (finished / "config.yaml").read_bytes()
    refused = {
        "objective.alpha": 0.7,
        "eval.samples": 3,
        "run.seed": 5,
        "rollout.temperature": 0.9,
        "rollout.top_p": 0.9,
        "rollout.max_new_tokens": 99,
        "rollout.full_answer": False,
        "rollout.max_answer_tokens": 9,
        "rollout.importance_cap": 2,
    }
    # Of a run that has made its steps, no step would have the new rate.
    refused["optim.lr"] = 0.5
    messages = {key: f"--resume would change {key} from " for key in refused}
    messages["optim.lr"] += ".* or give more train.steps: none of the run's 4 steps is left"
    for key, value in {**refused, "train.steps": 1}.items():
        message = messages.get(key, "4 steps are made already")
        with pytest.raises(checkpoint.CheckpointError, match=message):
            resume(finished, f"--{key}", value)
        assert (finished / "config.yaml").read_bytes() == before


def contents(run):
    return {
        path: path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.filterwarnings("ignore:.*falling back")
def test_a_run_without_its_checkpoints_stops_and_keeps_its_logs(finished):
    run = finished
    (run / "checkpoints/step_2/state.json").write_text("{")
    os.truncate(run / "checkpoints/step_4/__0_0.distcp", 9)
    for lost in ("damaged: step_2, step_4", "gone"):
        before = contents(run)
        with pytest.raises(checkpoint.CheckpointError, match=f"its checkpoints are {lost}"):
            resume(run, "--train.steps", 5)
        assert contents(run) == before
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert len(lines(run)) == 4


def test_what_a_resume_cuts_from_the_logs_is_said_and_kept(finished, capsys):
    run = finished
    (run / "training.png").write_bytes(b"of fewer steps")
    for name, wrong in (("metrics", '{"step": null}\n'), ("paths", '{"step": 2, "te\n')):
        rows = (run / f"{name}.jsonl").read_text().splitlines(keepends=True)
        two = next(i for i, row in enumerate(rows) if json.loads(row)["step"] == 2)
        late = json.dumps({"step": 5}) + "\n"
        (run / f"{name}.jsonl").write_text("".join([*rows[:two], wrong, *rows[two + 1 :], late]))
    capsys.readouterr()
    assert resume(run)
    assert not (run / "training.png").exists()
    shown = capsys.readouterr().out
    for name in ("metrics", "paths"):
        path, aside = run / f"{name}.jsonl", run / f"{name}.dropped.jsonl"
        assert f"{path}: lines taken out: 1 of steps after 4" in shown
        assert f"{path}: lines taken out: 1 damaged (the first was line" in shown
        assert len(aside.read_text().splitlines()) == 2
    assert f"{run / 'metrics.jsonl'}: no line of steps 2\n" in shown
    assert f"{run / 'paths.jsonl'}: not all lines of steps" not in shown  # step 2 counts no more
    (run / "paths.jsonl").write_text("".join(rows[:-1]))  # as the straight run left it, but one
    assert resume(run)
    assert f"{run / 'paths.jsonl'}: not all lines of steps 4\n" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"before": [1]}', '{"before": {"step": null}}'])
def test_a_damaged_evaluation_stops_a_resume_before_anything_changes(finished, text):
    (finished / "eval.json").write_text(text)
    before = contents(finished)
    with pytest.raises(ValueError, match=r"eval\.json.*remove it"):
        resume(finished, "--train.steps", 5)
    assert contents(finished) == before


def test_what_a_resume_may_change_is_said_and_kept(words, tmp_path, capsys):
    run = tmp_path / "run"
    assert fit(config.load(TINY, words("run", "--eval.data", "[]", "--train.steps", "1")))
    more = ["--train.steps", "2", "--eval.data", words("x")[words("x").index("--eval.data") + 1]]
    assert fit(config.load(run / "config.yaml", more), resume=True)
    shown = capsys.readouterr().out
    assert "changed at step 1: train.steps 1 -> 2" in shown
    assert "no evaluation before training" in shown
    assert set(json.loads((run / "eval.json").read_text())) == {"after"}
    assert config.load(run / "config.until_step_1.yaml").train.steps == 1


def test_a_resume_is_held_against_what_its_checkpoint_rests_on(words, tmp_path, capsys):
    """config.yaml may be edited between a stop and the resume; it is no witness."""
    run = tmp_path / "run"
    schedule = ["--optim.schedule", "cosine", "--optim.warmup_steps", "0", "--optim.lr", "1e-3"]
    start = words("run", "--eval.data", "[]", "--data.limit", "9", "--train.steps", "2", *schedule)
    assert fit(config.load(TINY, start))
    file = run / "config.yaml"
    kept = file.read_text()
    for old, new, said in [
        ("seed: 0", "seed: 7", "would change run.seed from 0 to 7, on which"),
        ("teacher_role: user", "teacher_role: system", 'role from "user" to "system", on which'),
    ]:
        assert old in kept
        file.write_text(kept.replace(old, new, 1))
        with pytest.raises(checkpoint.CheckpointError, match=said):
            fit(config.load(file, ["--train.steps", "3"]), resume=True)
        assert file.read_text() == kept.replace(old, new, 1)
    edited = kept.replace("lr: 0.001", "lr: 0.002").replace("steps: 2", "steps: 3")
    file.write_text(edited.replace("workers: 1", "workers: 2"))
    capsys.readouterr()
    assert fit(config.load(file), resume=True)
    shown = capsys.readouterr().out
    for said in ("optim.lr 0.001 -> 0.002", "train.steps 2 -> 3", "verify.workers 1 -> 2"):
        assert f"changed at step 2: {said}" in shown
    last, now = (lines(run)[step]["lr"] for step in (1, 2))
    assert now == pytest.approx(0.002 * 0.5 * (1 + math.cos(2 / 3 * math.pi)))
    assert f"learning rate: {last:.3g} at step 2, {now:.3g} at step 3; without the change" in shown
    assert config.load(run / "config.until_step_2.yaml") == config.load(TINY, start)
    assert newest(run).trainer_state["config"] == config.as_dict(config.load(file))


def test_a_checkpoint_without_its_configuration_is_taken_with_a_word(finished, capsys):
    """As an older version wrote it."""
    run = finished
    folder = run / "checkpoints/step_4"
    state = json.loads((folder / "state.json").read_text())
    del state["trainer_state"]["config"]
    raw = json.dumps(state).encode()
    (folder / "state.json").write_bytes(raw)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(raw), "crc32": zlib.crc32(raw)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert resume(run, "--train.steps", 5)
    shown = capsys.readouterr().out
    assert f"{folder} does not say with which configuration its steps were made" in shown
    assert "changed at step 4: train.steps 4 -> 5" in shown
    assert config.load(run / "config.until_step_4.yaml").train.steps == 4
    assert "config" in newest(run).trainer_state


@pytest.mark.parametrize(
    ("before", "after", "step", "said"),
    [
        ({}, {"lr": 2e-3}, 5, "0.001 at step 5, 0.002 at step 6; without the change 0.001"),
        ({}, {"steps": 20}, 5, None),
        ({}, {"steps": 20}, 10, None),
        ({"schedule": "linear"}, {"steps": 20}, 5, "0.0006 at step 5, 0.00075 at step 6; without "),
        (
            {"schedule": "cosine"},
            {"steps": 20},
            10,
            "2.45e-05 at step 10, 0.0005 at step 11; without the change the run had ended",
        ),
        (
            {},
            {"warmup_steps": 8},
            5,
            "0.001 at step 5, 0.00075 at step 6; without the change 0.001",
        ),
        ({}, {"schedule": "linear", "steps": 5}, 5, None),
    ],
)
def test_a_resume_says_what_becomes_of_the_rate(before, after, step, said):
    def cfg(keys):
        optim = {"lr": 1e-3, "warmup_steps": 0, **keys}
        steps = optim.pop("steps", 10)
        return config.resolve({"optim": optim, "train": {"steps": steps}})

    found = rate_changes(cfg(before), cfg({**before, **after}), step)
    assert len(found) == (said is not None)
    assert not said or said in found[0]


def test_a_resume_may_change_how_paths_are_drawn_not_which(finished, capsys):
    """What the messages of a lost engine and of a probe advise."""
    more = ["--rollout.max_batch", "5", "--rollout.probe_every", "2"]
    more += ["--rollout.probe_tolerance", "0.1", "--train.steps", "5"]
    assert resume(finished, *more)
    shown = capsys.readouterr().out
    assert "changed at step 4: rollout.max_batch 192 -> 5" in shown
    assert "changed at step 4: rollout.probe_tolerance null -> 0.1" in shown
    assert [record["step"] for record in lines(finished)] == [1, 2, 3, 4, 5]


def test_other_questions_under_the_same_name_are_another_run(words, tmp_path, tiny_world):
    data = tmp_path / "train.jsonl"
    rows = tiny_world.train_path.read_text().splitlines(keepends=True)
    data.write_text("".join(rows[:20]))
    given = words("run", "--data.train", str(data), "--eval.data", "[]", "--train.steps", "1")
    assert fit(config.load(TINY, given))
    data.write_text("".join(rows[1:21]))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"not those that the run began with, by .*state\.json"
    ):
        fit(config.load(tmp_path / "run/config.yaml", ["--train.steps", "5"]), resume=True)


def test_a_start_that_fails_leaves_nothing_behind(words, tmp_path):
    cfg = config.load(TINY, words("run", "--data.train", str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="none"):
        fit(cfg)
    assert not (tmp_path / "run").exists()


def test_no_room_for_the_answer_is_found_before_anything_is_drawn(words, tmp_path):
    for key in ("rollout", "eval"):
        cfg = config.load(TINY, words("run", f"--{key}.max_new_tokens", "505"))
        with pytest.raises(ValueError, match="max_position_embeddings"):
            fit(cfg)
        assert not (tmp_path / "run").exists()


def test_more_questions_than_data(words, tmp_path):
    cfg = config.load(TINY, words("run", "--data.limit", "4", "--train.questions_per_step", "5"))
    with pytest.raises(ValueError, match="questions_per_step"):
        fit(replace(cfg, eval=replace(cfg.eval, data=())))
    assert not (tmp_path / "run").exists()


def test_dead_questions_make_room_for_others(words):
    def collect(name, **more):
        fixed = {"eval.data": "[]", "train.questions_per_step": "6", **more}
        given = words(name, *(w for key, value in fixed.items() for w in (f"--{key}", str(value))))
        with Trainer(config.load(TINY, given)) as trainer:
            batch, coefs = trainer.stages.collector.collect(0, PhaseTimer(), {})
        spread = coefs.path_scores["posterior"]["utility"].std(dim=1, correction=0)
        return [q.question.id for q in batch.questions], coefs.alive, spread

    _, _, spread = collect("all", **{"objective.std_gate": 0.0})
    gate = {"objective.std_gate": spread.median().item() + 1e-6}  # shuts half of the groups
    first, alive, _ = collect("gated", **gate)
    resampled, later, _ = collect("resampled", **gate, **{"train.resample_rounds": 3})
    assert 0 < alive.sum() < 6
    assert later.sum() > alive.sum()
    assert len(set(resampled)) == 6
    survivors = [name for name, ok in zip(first, alive.tolist(), strict=True) if ok]
    assert resampled[: len(survivors)] == survivors


def test_a_mixture_keeps_its_shares_when_dead_questions_make_room(words, tiny_world, tmp_path):
    """Every group is dead (the gate is above any spread), so that every round replaces all."""
    lines = Path(tiny_world.train_path).read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"one": lines[:40], "two": lines[40:80]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    train = ", ".join(f"{{path: {tmp_path}/{name}.jsonl, weight: 1}}" for name in files)
    given = {
        "data.train": f"[{train}]",
        "eval.data": "[]",
        "train.questions_per_step": "4",
        "train.resample_rounds": "1",
        "objective.std_gate": "1e9",
    }
    cfg = config.load(TINY, words("mix", *(w for k, v in given.items() for w in (f"--{k}", v))))
    with Trainer(cfg) as trainer:
        batch, coefs = trainer.stages.collector.collect(0, PhaseTimer(), {})
    assert not coefs.alive.any()
    assert coefs.metrics["tokens_replaced"] > 0
    assert sorted(q.file for q in batch.questions) == ["one", "one", "two", "two"]


def test_stream_norms_leave_the_update_as_it_is(words, tmp_path):
    for name, every in (("with", "1"), ("without", "0")):
        given = words(name, "--eval.data", "[]", "--metrics.diag_every", every)
        assert fit(config.load(TINY, given))
    same_state(tmp_path / "with", tmp_path / "without")
    record = next(r for r in lines(tmp_path / "with") if "grad_norm_distill" in r)
    parts = record["grad_norm_pg"], record["grad_norm_distill"]
    assert abs(parts[0] - parts[1]) <= record["grad_norm"] + 1e-6 <= sum(parts) + 2e-6


def test_saves_in_the_background_change_nothing(words, tmp_path):
    for name, background in (("aside", "true"), ("waited", "false")):
        given = words(name, "--eval.data", "[]", "--checkpoint.background", background)
        assert fit(config.load(TINY, [*given, "--checkpoint.save_every", "1"]))
    assert recorded(tmp_path / "aside") == recorded(tmp_path / "waited")
    same_state(tmp_path / "aside", tmp_path / "waited")
    assert sorted(path.name for path in (tmp_path / "aside/checkpoints").iterdir()) == [
        "step_3",
        "step_4",
    ]


def test_a_run_saves_by_the_clock_and_stops_before_its_time_is_over(words, tmp_path):
    more = ["--eval.data", "[]", "--checkpoint.save_every", "100", "--checkpoint.keep_last", "9"]
    more += ["--train.steps", "3", "--checkpoint.export", "false"]
    saves = words("saves", *more, "--checkpoint.save_minutes", "1e-6")
    assert fit(config.load(TINY, saves))
    assert {p.name for p in (tmp_path / "saves/checkpoints").iterdir()} == {
        *(f"step_{n}" for n in (1, 2, 3))
    }
    limited = words("limited", *more, "--run.max_minutes", "1e-4")
    assert fit(config.load(TINY, limited)) is Ending.STOPPED  # and saved, as by SIGTERM
    assert not lines(tmp_path / "limited")
    resumed = config.load(tmp_path / "limited/config.yaml", ["--run.max_minutes", "60"])
    assert fit(resumed, resume=True)
    assert recorded(tmp_path / "limited") == recorded(tmp_path / "saves")


def test_a_path_that_the_engine_gave_up_costs_its_question_alone(words, monkeypatch):
    """The other questions' weights stay, and all means are theirs: a lost path is no wrong, short
    or rejected one."""
    given = words("run", "--train.questions_per_step", "3", *LONGER)
    with Trainer(config.load(TINY, given)) as trainer:
        batch, full = trainer.stages.collector.collect(0, PhaseTimer(), {})
        generate = HFEngine.generate

        def give_up_the_first(*args):
            first, *others = generate(*args)
            return [losing(first), *others]

        monkeypatch.setattr(HFEngine, "generate", give_up_the_first)
        part, rest = trainer.stages.collector.collect(0, PhaseTimer(), {})
        others = batch.select([1, 2])
        alone = trainer.cfg.objective.terms(others, {})
        diverged = trainer.stages.measure.view_divergence(others, alone)
        stats = trainer.train_step()
    assert (full.metrics["groups_dropped"], full.metrics["paths_error"]) == (0, 0)
    assert (rest.metrics["groups_dropped"], rest.metrics["paths_error"]) == (1, 1)
    for term, complete in zip(rest.parts, full.parts, strict=True):
        assert not term.weight_BP[0].any()
        assert torch.equal(term.weight_BP[1:], complete.weight_BP[1:])
    assert full.parts[0].weight_BP[0].any()
    assert part.whole is not None
    assert [q.question.id for q in part.whole.questions] == [
        q.question.id for q in others.questions
    ]
    means = {**alone.metrics, **diagnostics.batch_metrics(others), **diverged}
    assert {"acc_student", "len_prior", "trunc_post", "accept_rate", "adv_post", "elbo"} <= {*means}
    assert {key: stats.metrics[key] for key in means} == pytest.approx(means, rel=1e-4)
    assert stats.metrics["tokens_generated"] == part.tokens > others.tokens


@pytest.mark.parametrize("objective", ["vpgea", "grpo"])
def test_a_step_that_lost_all_goes_by_with_its_cause(words, monkeypatch, tmp_path, objective):
    """No update, no mean, one alarm; what it cost is counted, console and report cope."""
    more = {"vpgea": [], "grpo": ["--objective.name", "grpo", "--train.resample_rounds", "1"]}
    given = words("run", "--eval.data", "[]", *more[objective], "--train.steps", "7")
    generate = HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda *args: [*map(losing, generate(*args))])
    with Trainer(config.load(TINY, given)) as trainer:
        before = [p.clone() for p in trainer.stages.policy.parameters()]
        said = []
        trainer.say = said.append
        for _ in range(7):
            trainer.finish_step(trainer.train_step())
        assert all(map(torch.equal, before, trainer.stages.policy.parameters()))
        trainer.finish_run()
    expected = "no update, the engine gave up a path of every question; see engine.timeout_s"
    (alarm,) = [text for text in said if "alarm" in text]
    assert "5 x the engine gave up a path of every question" in alarm
    said.remove(alarm)
    assert said[:7] == [f"step {step}: {expected}" for step in range(1, 8)]
    # Two questions of GRPO's are replaced by two others, which are lost too.
    questions, paths = {"vpgea": (2, 6), "grpo": (4, 4)}[objective]
    for record in lines(tmp_path / "run"):
        assert (record["groups_dropped"], record["skipped"]) == (questions, 1)
        assert record["paths_error"] == questions * paths
        means = ("acc_", "eps3_", "len_", "trunc_", "u_p", "accept", "adv_", "kl_", "elbo")
        assert not [key for key in record if key.startswith(means)]
    assert "Alarms" in (tmp_path / "run/report.html").read_text()


def test_a_lost_answer_drops_its_question(words, monkeypatch):
    """u_source accuracy: the thoughts are whole, an answer after one of them is not."""
    more = ["--scoring.u_source", "accuracy", "--scoring.answer_samples", "2"]
    with Trainer(config.load(TINY, words("run", *more))) as trainer:
        generate, calls = HFEngine.generate, []

        def give_up_an_answer(*args):
            calls.append(1)
            first, *others = generate(*args)
            return [losing(first) if len(calls) == 2 else first, *others]

        monkeypatch.setattr(HFEngine, "generate", give_up_an_answer)
        batch, coefs = trainer.stages.collector.collect(0, PhaseTimer(), {})
    assert batch.lost_B.tolist() == [1, 0]
    assert (coefs.metrics["groups_dropped"], coefs.metrics["paths_error"]) == (1, 1)
    assert not any(part.weight_BP[0].any() for part in coefs.parts)


HELD = ["--objective", "grpo", "--objective.kl_coef", "0.1", "--optim.lr", "0.003"]
HELD += ["--train.minibatches", "2", "--train.epochs", "2", "--eval.data", "[]", *LONGER]


def test_a_reference_policy_stays_the_one_that_the_run_began_with(tiny_words, tmp_path):
    """On the device, read anew from disk, and after a resume: the same numbers, bit for bit."""
    words = tiny_words({k: v for k, v in SMALL.items() if k != "objective.prior_samples"})
    steps = ["--train.steps", "3", "--optim.warmup_steps", "0", "--objective.group_size", "4"]
    for name, more in {"device": [], "disk": ["--model.reference", "disk"]}.items():
        fit(config.load(TINY, words(name, *HELD, *steps, *more)))
    fit(config.load(TINY, words("cut", *HELD, *steps[2:], "--train.steps", "2")))
    cut = tmp_path / "cut"
    fit(config.load(cut / "config.yaml", ["--train.steps", "3"]), resume=True)
    runs = {name: lines(tmp_path / name) for name in ("device", "disk", "cut")}
    for name in ("loss", "grad_norm", "kl_reference", "clipped"):
        values = {run: [line.get(name) for line in steps] for run, steps in runs.items()}
        assert values["device"] == values["disk"], name
        # The schedule spans the steps that were asked for first; up to there the runs are one.
        assert values["cut"][0] == values["device"][0], name
    kl = [line["kl_reference"] for line in runs["device"]]
    assert kl[0] == 0.0
    assert 0.0 < kl[1] < kl[2]
    assert runs["cut"][2]["kl_reference"] > 0.0


def test_a_stop_request_is_heard_while_answers_are_sampled(words):
    more = ["--scoring.u_source", "accuracy", "--scoring.answer_samples", "2"]
    with Trainer(config.load(TINY, words("run", *more))) as trainer:
        questions = trainer.stages.intake.questions[:2]
        paths = trainer.stages.collector.sample(questions, step=0)
        trainer.stop.requested = True
        with pytest.raises(Stopped):
            trainer.stages.collector.score(questions, *paths, step=0)


def test_importance_weights_are_factors_of_every_coefficient(words):
    """Bitwise. The sampler is the trained module itself: ratios of 1 within float32."""
    rows = {}
    for name, more in {"plain": [], "weighed": ["--rollout.importance_cap", "2"]}.items():
        with Trainer(config.load(TINY, words(name, *more))) as trainer:
            batch, coefs = trainer.stages.collector.collect(0, PhaseTimer(), {})
            ratios, _ = trainer.stages.measure.importance(batch, coefs)
            rows[name] = build_rows(batch, coefs, Scale.of(trainer.cfg), ratios=ratios)
            known = ratios
    assert len(rows["plain"]) == len(rows["weighed"]) > 0
    for plain, weighed in zip(rows["plain"], rows["weighed"], strict=True):
        ratio = known[weighed.path][: weighed.token_ids.numel()]
        assert torch.equal(weighed.coef, plain.coef * ratio)
        assert ratio.ne(1).any()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=0)

"""Evaluation: the numbers by hand on known paths, and a real model that sees student prompts only.

Two benchmarks of two questions, two samples each; `S` scripts what the engine returns:

    short   q1: right 4 tokens, wrong 6     q2: right 4, right 2     acc 3/4, tokens 4
    long    q1: wrong 10, cut 20            q2: right 10, wrong 40   acc 1/4, tokens 20
"""

import json
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch

from vpgea_fast import config
from vpgea_fast.config import Config, DataConfig, DataFile, EvalConfig, PromptConfig
from vpgea_fast.data import load_benchmarks
from vpgea_fast.evaluate import Evaluator, evaluate_model, make_sampling, result_table
from vpgea_fast.model import load_policy
from vpgea_fast.model_dir import load_tokenizer
from vpgea_fast.prompts import Prompter
from vpgea_fast.rollout.engine import Sampling
from vpgea_fast.rollout.hf import HFEngine
from vpgea_fast.types import Path
from vpgea_fast.verify import Verifier
from vpgea_fast.weights import model_digest

TINY = FilePath(__file__).parents[1] / "configs/tiny.yaml"
RIGHT, WRONG, CLOSE = 7, 8, 5
S = {
    "1 A+two": [(RIGHT, 4, "stop"), (WRONG, 6, "stop")],
    "2 A+two": [(RIGHT, 4, "stop"), (RIGHT, 2, "stop")],
    "3 A+two": [(WRONG, 10, "stop"), (RIGHT, 20, "length")],
    "4 A+two": [(RIGHT, 10, "stop"), (WRONG, 40, "stop")],
}


class Scripted:
    """An engine that returns the paths of `S`, and remembers what it was asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def generate(self, requests, sampling, on_progress=None):
        self.asked.append((requests, sampling))
        if on_progress:
            on_progress(len(requests))
        return [self.path(request) for request in requests]

    def check(self, requests, sampling):
        assert requests
        assert sampling.full_answer

    def load_weights(self, named):
        raise AssertionError(f"an evaluation loads no weights, got {named}")

    def close(self):
        self.asked.clear()

    def path(self, request):
        text = self.tokenizer.decode(request.prompt_ids)
        answer, tokens, finish = next(paths for q, paths in S.items() if q in text)[request.index]
        closed = finish == "stop"  # the thought of a cut path never closed
        z_ids = torch.full((tokens - closed,), CLOSE)
        return Path(
            question_id=request.question_id,
            stream=request.stream,
            index=request.index,
            z_ids=z_ids,
            logps=torch.zeros(len(z_ids)),
            answer_ids=torch.tensor([answer] if closed else []),
            closed=closed,
            finish=finish,
        )


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout_s=20.0) as verifier:
        yield verifier


@pytest.fixture
def files(tmp_path):
    texts = list(S)
    for name, pair in (("short", texts[:2]), ("long", texts[2:])):
        rows = [{"question": text, "answer": "7"} for text in pair]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(tmp_path / "short.jsonl"), str(tmp_path / "long.jsonl")]


@pytest.fixture
def build(verifier, tiny_tokenizer):
    """An evaluator with a scripted engine: `build(files, samples=2)`."""

    def make(files, longest=100, **settings):
        prompt = PromptConfig(student="{question}", think_prefix="<think>")
        fixed = {"samples": 2, "greedy": False, "max_new_tokens": 50}
        cfg = Config(
            data=DataConfig(max_prompt_tokens=longest),
            prompt=prompt,
            eval=EvalConfig(data=tuple(map(DataFile, files)), **(fixed | settings)),
        )
        prompter = Prompter(tiny_tokenizer, prompt)
        return Evaluator(
            cfg,
            engine=Scripted(tiny_tokenizer),
            benchmarks=load_benchmarks(
                cfg.eval, cfg.data, prompter, parseable=verifier.accepts_itself
            ),
            sampling=Sampling(max_new_tokens=3, think_close_id=CLOSE, eos_ids=(2,)),
            decode=lambda ids: rf"\boxed{{{ids.item()}}}",
            verifier=verifier,
        )

    return make


def test_a_models_digest_sees_layers_between_frozen_ends_and_the_tokenizer(tmp_path):
    """Embedding and norm, at the ends of the file, are those of the base: one layer of 32 moved."""
    weights = bytearray(16 << 20)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "merges.txt").write_text("a b\n")
    found = {model_digest(str(tmp_path))}
    weights[7 << 20 : (7 << 20) + (1 << 19)] = b"\x01" * (1 << 19)
    (tmp_path / "model.safetensors").write_bytes(weights)
    found.add(model_digest(str(tmp_path)))
    (tmp_path / "merges.txt").write_text("a c\n")
    found.add(model_digest(str(tmp_path)))
    (tmp_path / "README.md").write_text("a model\n")
    found.add(model_digest(str(tmp_path)))
    assert len(found) == 3
    assert model_digest("owner/name") == "owner/name"


def test_the_numbers_by_hand(build, files):
    found = build(files).run()["sampled"]
    short, long = found["benchmarks"]["short"], found["benchmarks"]["long"]
    assert (short["acc"], short["tokens"], short["truncated"]) == (0.75, 4.0, 0.0)
    assert (long["acc"], long["tokens"], long["truncated"]) == (0.25, 20.0, 0.25)
    assert (short["eps3"], long["eps3"]) == (75**2 / 4, 25**2 / 20)
    assert found["eps3"] == (75**2 / 4 + 25**2 / 20) / 2
    assert found["eps3_mean"] == 50**2 / 12
    assert (found["acc"], found["tokens"], found["truncated"]) == (0.5, 12.0, 0.125)
    assert (found["n"], found["questions"], found["dropped"]) == (8, 4, 0)
    headers, rows = result_table({"sampled": found})
    assert [row[0] for row in rows] == ["short", "long", "mean"]
    assert dict(zip(headers, rows[2], strict=True))["eps3 of means"] == "208"


def test_the_interval_resamples_questions_not_answers(build, files):
    """Exactly: the mean of 2 draws of {1/2, 1} is 1/2, 3/4, 1 with 1/4, 1/2, 1/4."""
    found = build(files).run()["sampled"]
    short, long = found["benchmarks"]["short"], found["benchmarks"]["long"]
    assert (short["acc_low"], short["acc_high"]) == (0.5, 1.0)
    assert (long["acc_low"], long["acc_high"]) == (0.0, 0.5)
    # the mean of the two falls to 1/4 or rises to 3/4 with probability 1/16 each: above 2.5 %
    assert (found["acc_low"], found["acc_high"]) == (0.25, 0.75)


def test_the_interval_of_a_mean_is_narrower_than_the_mean_of_intervals(build, tmp_path):
    """Four benchmarks of the questions {0, 1}-right: all four at 0 has probability 1/256."""
    files = []
    for name in "abcd":
        rows = [{"question": "2 A+two", "answer": answer} for answer in ("7", "9")]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        files.append(str(file))
    found = build(files).run()["sampled"]
    parts = found["benchmarks"].values()
    assert all((part["acc_low"], part["acc_high"]) == (0.0, 1.0) for part in parts)
    assert (found["acc_low"], found["acc_high"]) == (0.125, 0.875)


def test_modes_settings_and_progress(build, files):
    evaluator = build(files, greedy=True, temperature=0.6, top_p=0.95, max_new_tokens=30)
    counted = []
    found = evaluator.run(counted.append)
    assert sum(counted) == evaluator.samples == 12
    assert found["greedy"]["n"] == 4
    assert found["greedy"]["acc"] == 0.75  # first samples: right, right, wrong, right
    asked = [(s.temperature, s.top_p, s.max_new_tokens, s.full_answer)
             for _, s in evaluator.engine.asked]  # fmt: skip
    assert asked == [(0.6, 0.95, 30, True)] * 2 + [(0.0, 1.0, 30, True)] * 2
    assert set(build(files, samples=0, greedy=True).run()) == {"greedy"}
    with pytest.raises(ValueError, match="no answer would be drawn"):
        build(files, samples=0)


def test_only_student_prompts_are_sampled(build, files, tmp_path, tiny_tokenizer):
    """Other answers, the same requests, seeds included."""
    evaluator = build(files)
    evaluator.run()
    other = tmp_path / "other"
    other.mkdir()
    for file in files:
        text = (tmp_path / file).read_text().replace('"7"', '"3"')
        (other / file.rpartition("/")[2]).write_text(text)
    changed = build([str(other / "short.jsonl"), str(other / "long.jsonl")])
    changed.run()
    hint = tiny_tokenizer(" hint", add_special_tokens=False)["input_ids"]
    for (asked, _), (again, _) in zip(evaluator.engine.asked, changed.engine.asked, strict=True):
        for a, b in zip(asked, again, strict=True):
            assert torch.equal(a.prompt_ids, b.prompt_ids)
            assert (a.seed, a.stream) == (b.seed, "prior")
            assert not set(hint) & set(a.prompt_ids.tolist())
        assert len({request.seed for request in asked}) == len(asked)


def test_no_question_leaves_in_silence(build, files, tmp_path):
    file = tmp_path / "short.jsonl"
    file.write_text(file.read_text() + '\n{"question": "3 A+two", "answer": ""}')
    evaluator = build(files)
    assert "short: 2 questions, 1 dropped (empty answer)" in evaluator.describe()
    assert evaluator.run()["sampled"]["benchmarks"]["short"]["dropped"] == 1
    with pytest.raises(ValueError, match="the first is question 'row-1'"):
        build(files, longest=evaluator.benchmarks["short"].questions[0][1].numel() - 1)
    with pytest.raises(ValueError, match="two benchmarks 'short'"):
        build([files[0], files[0]])


@pytest.fixture
def cfg(tiny_world):
    words = ["--model.path", str(tiny_world.base_dir), "--eval.limit", "6", "--eval.samples", "2"]
    words += ["--verify.name", "number"]
    return config.load(TINY, [*words, "--eval.data", f"[{tiny_world.test_path}]"])


def test_a_real_model_twice_the_same_and_another_seed_not(cfg):
    first = evaluate_model(cfg)
    assert evaluate_model(cfg) == first
    other = evaluate_model(replace(cfg, eval=replace(cfg.eval, seed=1)))
    assert other["sampled"]["tokens"] != first["sampled"]["tokens"]
    answers = ("acc", "tokens", "truncated")
    assert [other["greedy"][k] for k in answers] == [first["greedy"][k] for k in answers]


def test_a_cap_cuts_is_counted_and_makes_answers_wrong(cfg):
    """Thoughts of the tiny base have more than 3 tokens: all are cut there, in both modes."""
    found = evaluate_model(replace(cfg, eval=replace(cfg.eval, max_new_tokens=3)))
    for mode in ("sampled", "greedy"):
        assert (found[mode]["acc"], found[mode]["truncated"]) == (0.0, 1.0)
        assert found[mode]["tokens"] == 3.0
        assert found[mode]["eps3"] == 0.0


def test_a_tokenizer_of_another_model_is_refused(tiny_world, random_qwen2, cfg):
    tokenizer = load_tokenizer(str(tiny_world.base_dir))
    with pytest.raises(ValueError, match="the model embeds 4 tokens"):
        make_sampling(
            cfg.rollout, Prompter(tokenizer, cfg.prompt), tokenizer, random_qwen2(vocab=4)
        )


def test_the_batch_width_changes_no_greedy_answer(cfg):
    """An engine of 2 rows against one of 192: the same greedy paths."""
    policy = load_policy(cfg.model)
    tokenizer = load_tokenizer(cfg.model.path)
    prompter = Prompter(tokenizer, cfg.prompt)
    with Verifier(timeout_s=20.0) as verifier:
        benchmarks = load_benchmarks(
            cfg.eval, cfg.data, prompter, parseable=verifier.accepts_itself
        )
        results = [
            Evaluator(
                replace(cfg, eval=replace(cfg.eval, samples=0)),
                engine=HFEngine(policy.causal_lm, max_batch=rows),
                benchmarks=benchmarks,
                sampling=make_sampling(cfg.rollout, prompter, tokenizer, policy.causal_lm),
                decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                verifier=verifier,
            ).run()
            for rows in (2, 192)
        ]
    assert results[0] == results[1]

"""lm-eval scores the same generations alike, wherever its metric is the same as ours.

Its own tasks run through its own evaluator: prompts, filters and metrics of the shipped files, with
the questions from a file and the answers from a list. `make test-vllm` installs it.
"""

import itertools
import json
import os
import random
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from statistics import fmean

import pytest
from test_measures import sample

from vpgea_fast.config import VerifyConfig
from vpgea_fast.evaluation.measures import collect, majority, measure
from vpgea_fast.verify import Verifier

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # of its many imports


def score(task, folder, rows, answers, filters, **changes):
    """Each document's exact_match by lm-eval: `answers[i]` are the draws of document i."""
    lm_eval = import_module("lm_eval")  # no import that pyright would look for
    LM = import_module("lm_eval.api.model").LM
    manager = import_module("lm_eval.tasks").TaskManager

    class Recorded(LM):
        def generate_until(self, requests):
            left = {doc: iter(texts) for doc, texts in enumerate(answers)}
            return [next(left[request.doc_id]) for request in requests]

        loglikelihood = loglikelihood_rolling = generate_until

    data, tasks = folder / "rows.jsonl", folder / "tasks"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / task),
        "task": "recorded",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **dict.fromkeys(("training_split", "fewshot_split", "fewshot_config", "tag")),
        "num_fewshot": 0,
        **changes,
    }
    tasks.mkdir()
    # JSON is YAML.
    (tasks / "recorded.yaml").write_text(json.dumps(own))
    found = lm_eval.simple_evaluate(
        Recorded(),
        tasks=["recorded"],
        task_manager=manager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = [s for s in found["samples"]["recorded"] if s["filter"] == filters]
    samples.sort(key=lambda s: s["doc_id"])
    mean = found["results"]["recorded"][f"exact_match,{filters}"]
    return [s["exact_match"] for s in samples], mean


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def judged(checker, golds, texts):
    with Verifier.configured(VerifyConfig(name=checker)) as verifier:
        return verifier.verify(list(zip(golds, texts, strict=True)))


def records(golds, texts, verdicts):
    return [
        sample(f"{doc:03}", 0, correct=int(v), gold=gold, tokens=len(text))
        for doc, (gold, text, v) in enumerate(zip(golds, texts, verdicts, strict=True))
    ]


def agree(expected, mean, samples):
    assert len(expected) == len(samples) > 20
    assert [int(value) for value in expected] == [s.correct for s in samples]
    assert 0.2 < mean < 0.8
    assert measure({"b": collect(samples)})["acc"] == pytest.approx(mean, abs=1e-12)


NUMBERS = ("18", "-3", "1200", "540", "7", "0", "25", "1000000")


@pytest.mark.parametrize("checker", ["number", "math"])
def test_gsm8k(tmp_path, checker):
    """strict-match: what follows ####; right, wrong, thousands apart, and no answer."""
    pairs = [(g, f"So it is.\n#### {n}") for g, n in itertools.product(NUMBERS, repeat=2)]
    pairs += [(n, f"#### {int(n):,}") for n in NUMBERS] + [
        (n, f"A.\n#### {n}") for n in NUMBERS
    ] * 2
    pairs += [(n, "I cannot say.") for n in NUMBERS] + [("18", "")]
    golds, texts = zip(*pairs, strict=True)
    rows = [{"question": str(i), "answer": f"Work.\n#### {g}"} for i, g in enumerate(golds)]
    keys = [[t] for t in texts]
    expected, mean = score("gsm8k/gsm8k.yaml", tmp_path, rows, keys, "strict-match")
    agree(expected, mean, records(golds, texts, judged(checker, golds, texts)))


def test_aime(tmp_path):
    rng = random.Random(0)
    golds = [str(rng.randrange(1000)) for _ in range(60)]
    texts = [rf"The result is \boxed{{{g if rng.random() < 0.6 else 7}}}." for g in golds]
    # Far apart: boxes that stand close together are one answer to our checker.
    texts[:3] = ["", "Nothing.", rf"\boxed{{5}}. {'No. ' * 50}\boxed{{{golds[2]}}}"]
    rows = [{"Problem": str(i), "Answer": g} for i, g in enumerate(golds)]
    expected, mean = score("aime/aime24.yaml", tmp_path, rows, [[t] for t in texts], "none")
    agree(expected, mean, records(golds, texts, judged("math", golds, texts)))


def test_letters(tmp_path):
    """MMLU-Pro's own pattern and the checker of letters, over every pair of A to J."""
    pairs = [*itertools.product("ABCDEFGHIJ", repeat=2), *[(c, c) for c in "ABCDEFGHIJ"] * 6]
    golds, texts = [g for g, _ in pairs], [f"The answer is ({t})." for _, t in pairs]
    texts[:2] = ["", "No idea"]
    rows = [
        {"question": str(i), "options": ["x"] * 10, "answer": g, "cot_content": ""}
        for i, g in enumerate(golds)
    ]
    expected, mean = score(
        "mmlu_pro/_default_template_yaml",
        tmp_path,
        rows,
        [[t] for t in texts],
        "custom-extract",
        doc_to_text="{{question}}",
    )
    agree(expected, mean, records(golds, texts, judged("letter", golds, texts)))


def test_majority(tmp_path):
    """maj@8 of self-consistency where no predictions tie; of a tie it takes the first."""
    rng, draws = random.Random(3), 8
    golds, texts, predictions = [], [], []
    for _ in range(60):
        gold = rng.choice(NUMBERS)
        given = [gold if rng.random() < 0.4 else rng.choice(NUMBERS) for _ in range(draws)]
        golds.append(gold)
        predictions.append(given)
        texts.append([f"Work. The answer is {n}." for n in given])
    rows = [{"question": str(i), "answer": f"#### {g}"} for i, g in enumerate(golds)]
    found, _ = score(
        "gsm8k/gsm8k-cot-self-consistency.yaml", tmp_path, rows, texts, "maj@8", repeats=draws
    )
    ours = majority(
        collect(
            [
                sample(f"{q:03}", k, prediction=p, correct=int(p == golds[q]))
                for q, row in enumerate(predictions)
                for k, p in enumerate(row)
            ]
        )
    ).tolist()
    ties = defaultdict(list)
    for value, score_, row in zip(found, ours, predictions, strict=True):
        counts = sorted((row.count(p) for p in set(row)), reverse=True)
        ties[len(counts) > 1 and counts[0] == counts[1]].append((value, score_))
    assert len(ties[False]) > 30
    assert all(value == score_ for value, score_ in ties[False])
    assert 0.2 < fmean(value for value, _ in ties[False]) < 0.99
    # Of a tie lm-eval takes what it saw first: 0 or 1 where ours is a share.
    assert all(score_ < 1 for _, score_ in ties[True])

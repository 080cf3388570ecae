"""The papers' benchmarks: their protocol, their files as published, and letters that stay."""

import csv
import json
import os
from pathlib import Path

import pytest

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.config import DataConfig
from vpgea_fast.data import DataError, load_questions
from vpgea_fast.evaluation.records import read_header, read_samples
from vpgea_fast.evaluation.suites import CHOICE, MISSING, SETS, SUITES, suite_files
from vpgea_fast.verify import Verifier
from vpgea_fast.verify.predictions import prediction

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
REAL = {"gsm8k": 1319, "math500": 500, "aime24": 30, "amc23": 40, "olympiadbench": 675}


@pytest.fixture
def published():
    folder = os.environ.get("VPGEA_DATA")
    if folder is None:
        pytest.skip("needs the published data sets: set VPGEA_DATA to their folder")
    return Path(folder)


def test_a_suite_is_entries_of_eval_data_by_the_protocol():
    """k of METHOD: AIME avg@32, MATH-500 avg@4, GSM8K and MMLU-Pro avg@1, GPQA-Diamond avg@8."""
    entries, lacking = suite_files("paper", [])
    assert {e.name: e.samples for e in entries} == {
        "gsm8k": 1,
        "math500": 4,
        "aime24": 32,
        "aime25": 32,
        "gpqa_diamond": 8,
        "mmlu_pro": 1,
    }
    assert not lacking
    assert {e.path for e in entries} >= {
        "hub:openai/gsm8k/main:test",
        "hub:TIGER-Lab/MMLU-Pro:test",
    }
    asked = {e.name: e.student for e in entries if e.student is not None}
    assert asked == {
        "gpqa_diamond": CHOICE.replace("{letters}", "ABCD"),
        "mmlu_pro": CHOICE.replace("{letters}", "ABCDEFGHIJ"),
    }
    assert all(e.samples is None for e in suite_files("paper", [], samples=False)[0])
    assert {e.limit for e in suite_files("quick", [])[0]} == {100}
    assert "livecodebench is not served yet" in suite_files("vr", [])[1][0]
    assert {name for names in SUITES.values() for name in names} == set(SETS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("papr", "did you mean 'paper'"),
        ("gsm8k,math", "did you mean 'math500'"),
        (next(iter(MISSING)), "not served yet"),
        ("aime24,", "got ''"),
    ],
)
def test_a_name_that_is_none_is_refused(words, said):
    with pytest.raises(DataError, match=said):
        suite_files(words, [])


@pytest.fixture
def real(published):
    """Every question of the published files, by suite."""
    entries, _ = suite_files(",".join(REAL), [published])
    return {entry.name: load_questions(entry, DataConfig()) for entry in entries}


@pytest.mark.slow
def test_real_golds_all_accept_themselves(real):
    golds = [question.answer for part in real.values() for question in part.questions]
    assert len(golds) == 2564
    with Verifier(workers=2) as verifier:
        assert all(verifier.accepts_itself(golds))


def test_real_questions_are_all_there_with_subject_and_level(real):
    assert {name: len(part.questions) for name, part in real.items()} == REAL
    assert not any(part.drops for part in real.values())
    assert {q.level for q in real["math500"].questions} == {1, 2, 3, 4, 5}
    assert len({q.subject for q in real["math500"].questions}) == 7
    assert {q.subject for q in real["olympiadbench"].questions} == {
        "Algebra",
        "Combinatorics",
        "Geometry",
        "Number Theory",
    }


def test_real_questions_through_the_whole_path(published, r1_model_dir, tmp_path, capsys):
    """Two questions of each, two answers: from the published rows to records and the table."""
    out = tmp_path / "out"
    words = [r1_model_dir, "--suite", ",".join(REAL), "--from", published, "--out", out]
    words += ["--eval.limit", 2, "--eval.samples", 2, "--eval.max_new_tokens", 8]
    words += ["--rollout.max_answer_tokens", 4, "--model.device", "cpu"]
    words += ["--model.dtype", "float32"]
    assert main(["eval", *map(str, words)]) == 0
    samples = list(read_samples(out))
    assert {name: sum(s.benchmark == name for s in samples) for name in REAL} == dict.fromkeys(
        REAL, 4
    )
    header = read_header(out)
    assert header["settings"]["sampling"] == {
        "temperature": 0.6,
        "top_p": 0.95,
        "max_new_tokens": 8,
        "max_answer_tokens": 4,
    }
    assert header["settings"]["k"]["greedy"] == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in REAL)
    first = next(s for s in samples if s.benchmark == "math500")
    assert (first.subject, type(first.level)) == ("Precalculus", int)


@pytest.fixture
def choices(tmp_path):
    """GPQA-Diamond and MMLU-Pro in their published shapes."""
    rows = [
        {
            "Question": f"Which is {n}?",
            "Correct Answer": f"right {n}",
            **{f"Incorrect Answer {i}": f"wrong {n} {i}" for i in (1, 2, 3)},
            "Record ID": f"rec{n}",
            "High-level domain": "Physics",
            "Writer's Difficulty Estimate": "Hard",
        }
        for n in range(40)
    ]
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pro = {"question": "Which?", "options": [f"o{i}" for i in range(10)], "answer": "J"}
    pro |= {"question_id": 7, "answer_index": 9, "category": "law"}
    (tmp_path / "mmlu_pro.jsonl").write_text(json.dumps(pro) + "\n")
    return tmp_path


def test_choices_have_letters_and_a_shuffle_that_stays(choices):
    entries, _ = suite_files("gpqa_diamond,mmlu_pro", [choices])
    gpqa, pro = (load_questions(entry, DataConfig()) for entry in entries)
    for n, question in enumerate(gpqa.questions):
        assert f"\n{question.answer}. right {n}" in question.text
        assert all(f"\n{letter}. " in question.text for letter in "ABCD")
    letters = [question.answer for question in gpqa.questions]
    assert set(letters) == set("ABCD")
    # Its id decides: fewer rows move no letter.
    few = load_questions(config.DataConfig().filled(entries[0]), DataConfig(limit=5))
    assert [question.answer for question in few.questions] == letters[: len(few.questions)]
    [question] = pro.questions
    assert (question.answer, question.id, question.subject) == ("J", "7", "law")
    assert question.text.endswith("\nJ. o9")


def test_a_benchmark_is_asked_by_its_own_template(choices, r1_model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    words = [r1_model_dir, "--suite", "gpqa_diamond", "--from", choices, "--out", out]
    words += ["--eval.limit", 1, "--eval.samples", 1, "--eval.max_new_tokens", 4]
    words += ["--rollout.max_answer_tokens", 4, "--model.device", "cpu", "--model.dtype", "float32"]
    assert main(["eval", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert "Answer: $LETTER' (without quotes) where LETTER is one of ABCD." in shown
    assert "within \\boxed" not in shown


def test_keys_of_a_benchmark_are_refused_in_training_files():
    for key, value in (("samples", 4), ("student", "{question}"), ("level_key", "level")):
        with pytest.raises(config.ConfigError, match=f"has {key}, which is for eval.data"):
            config.resolve({"data": {"train": {"path": "x.jsonl", key: value}}})


@pytest.mark.parametrize(
    ("checker", "text", "read"),
    [
        ("math", r"So \boxed{\frac{1}{2}}.", "1/2"),
        ("math", r"\boxed{0.50}", "1/2"),
        ("math", r"\boxed{1{,}000}", "1000"),
        ("math", r"\boxed{x + 1}", "x+1"),
        ("math", r"\boxed{x+1}", "x+1"),
        ("math", "The answer is 12.", "12"),
        ("math", "first 3 and then 4 remain, as shown above in some longer prose of words.", "4"),
        ("math", "Answer: C", "C"),
        ("letter", "Answer: (C)", "C"),
        ("letter", "I do not know", None),
        ("number", r"\boxed{50\%}", "1/2"),
        ("text", r"\boxed{\text{Even}}", "even"),
        ("math", "", None),
        (
            "math",
            "nothing that could be one, and no number in all of this long sentence here",
            None,
        ),
    ],
)
def test_the_answer_of_a_text_in_one_spelling(checker, text, read):
    assert prediction(checker, text) == read

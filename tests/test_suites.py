"""The papers' benchmarks: their protocol, their files as published, and letters that stay."""

import csv
import itertools
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

import pytest
from test_measures import sample

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.config import DataConfig
from vpgea_fast.data import DataError, load_questions
from vpgea_fast.evaluation.measures import collect, majority, pass_at
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
    assert all(e.samples is None for e in suite_files("paper", [], ["eval.samples"])[0])
    assert {e.limit for e in suite_files("quick", [])[0]} == {100}
    # The words of a command line win.
    own = suite_files("quick", [], ["eval.limit"])[0]
    assert [(e.limit, e.samples) for e in own] == [(None, 1), (None, 4), (None, 4)]
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


@pytest.mark.slow
def test_all_real_questions_through_the_whole_path(published, r1_model_dir, tmp_path):
    """Every question once; the integers are those of the published rows."""
    out = tmp_path / "out"
    words = [r1_model_dir, "--suite", ",".join(REAL), "--from", published, "--out", out]
    words += ["--eval.samples", 1, "--eval.max_new_tokens", 4, "--rollout.max_answer_tokens", 4]
    # A token of this tokenizer is about a byte, and two prompts have 4,400.
    file = Path(r1_model_dir) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 8192}))
    words += ["--data.max_prompt_tokens", 5000, "--model.device", "cpu", "--model.dtype", "float32"]
    assert main(["eval", *map(str, words)]) == 0
    found = {name: {} for name in REAL}
    for s in read_samples(out):
        assert s.question_id not in found[s.benchmark]
        found[s.benchmark][s.question_id] = s.gold
    assert {name: len(golds) for name, golds in found.items()} == REAL
    header = read_header(out)["benchmarks"]
    assert {name: (part["questions"], part["dropped"]) for name, part in header.items()} == {
        name: (count, 0) for name, count in REAL.items()
    }
    result = json.loads((out / "result.json").read_text())["sampled"]["benchmarks"]
    assert {name: part["n"] for name, part in result.items()} == REAL
    rows = {
        "gsm8k": ("gsm8k_test", lambda row: row["answer"].rpartition("####")[2].strip()),
        "aime24": ("aime24", lambda row: row["answer"]),
        "amc23": ("amc23", lambda row: str(int(row["answer"]))),
    }
    for name, (file, gold) in rows.items():
        lines = (published / f"{file}.jsonl").read_text("utf-8").splitlines()
        golds = [gold(json.loads(line)).replace(",", "") for line in lines]
        assert sorted(found[name].values()) == sorted(golds), name


def test_real_questions_through_the_whole_path(published, r1_model_dir, tmp_path, capsys):
    """Two questions of each, two answers: from the published rows to records and the table."""
    out = tmp_path / "out"
    words = [r1_model_dir, "--suite", ",".join(REAL), "--from", published, "--out", out]
    words += ["--eval.limit", 2, "--eval.samples", 2, "--eval.max_new_tokens", 8]
    words += ["--rollout.max_answer_tokens", 4, "--model.device", "cpu"]
    words += ["--model.dtype", "float32"]
    assert main(["eval", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert "a thought of at most 8 tokens, an answer of 4" in shown
    assert all(f"  {name} " in shown for name in REAL)
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


def test_a_suite_limits_thought_and_answer_together(published, r1_model_dir, tmp_path, capsys):
    """As the papers do; the configuration's limit of answers is not read."""
    out = tmp_path / "out"
    words = [r1_model_dir, "--suite", "aime24", "--from", published, "--out", out]
    words += ["--eval.limit", 2, "--eval.samples", 8, "--eval.max_new_tokens", 9]
    assert main(["eval", *map(str, words), "--model.device", "cpu"]) == 0
    assert "a thought of at most 9 tokens with its answer" in capsys.readouterr().out
    assert read_header(out)["settings"]["sampling"] == {
        "temperature": 0.6,
        "top_p": 0.95,
        "max_new_tokens": 9,
        "max_answer_tokens": None,
    }
    samples = list(read_samples(out))
    assert max(s.tokens for s in samples) <= 9


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


CHOICES = {
    "mmlu_stem_head": ("choices", "answer", lambda row: row["choices"][row["answer"]]),
    "aqua_head": (
        "options",
        "correct",
        lambda row: row["options"]["ABCDE".index(row["correct"])].partition(")")[2],
    ),
}
"""Of the published files with choices: their keys, and the text of the right choice."""


@pytest.mark.parametrize("name", CHOICES)
def test_letters_of_published_choices(name, published):
    """The letter is that of the right text, also after a shuffle, which stays; each is accepted
    where it is right, and nowhere else."""
    choices_key, answer_key, right = CHOICES[name]
    rows = [
        json.loads(line) for line in (published / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]

    def read(limit=None, **more):
        file = config.DataFile(
            str(published / f"{name}.jsonl"),
            choices_key=choices_key,
            answer_key=answer_key,
            limit=limit,
            **more,
        )
        return load_questions(file, DataConfig()).questions

    plain, mixed = read(), read(choices_seed=0)
    assert len(plain) == len(mixed) == len(rows)
    for row, question in zip(rows * 2, [*plain, *mixed], strict=True):
        shown = question.text.rpartition(f"\n{question.answer}. ")[2]
        assert shown.split("\n")[0].split() == right(row).split("\n")[0].split(), question.id
    letters = [question.answer for question in mixed]
    assert letters == [question.answer for question in read(choices_seed=0)]
    assert letters[:30] == [question.answer for question in read(limit=30, choices_seed=0)]
    assert letters != [question.answer for question in read(choices_seed=1)]
    assert letters != [question.answer for question in plain]
    for checker in ("math", "letter"):
        with Verifier(name=checker) as verifier:
            asked = [(gold, f"Work.\nAnswer: {said}") for gold in letters[:40] for said in "ABCDE"]
            assert verifier.verify(asked) == [g == text[-1] for g, text in asked]


def test_real_answers_vote(published):
    """Of published responses to one gold, taken as draws of a question: one spelling has one
    verdict, the right ones have one spelling, and maj@k and pass@k are those of counting."""
    lines = (published / "verify_labelled.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    with Verifier() as verifier:
        verdicts = verifier.verify([(row["gold"], row["response"]) for row in rows])
    draws = defaultdict(list)
    for row, verdict in zip(rows, verdicts, strict=True):
        draws[row["gold"]].append((prediction("math", row["response"]), verdict))
    assert len({(g, p) for g, row in draws.items() for p, _ in row}) == len(
        {(g, p, v) for g, row in draws.items() for p, v in row}
    )
    assert all(len({p for p, v in row if v}) <= 1 for row in draws.values())
    many = {gold: row[:5] for gold, row in draws.items() if len(row) >= 5}
    assert len(many) > 30
    answers = collect(
        sample(gold, index, prediction=p, correct=int(v))
        for gold, row in many.items()
        for index, (p, v) in enumerate(row)
    )
    for k in range(1, 6):
        shares = []
        for gold in answers.questions:
            votes = Counter(p for p, _ in many[gold][:k])
            first = [p for p in votes if votes[p] == max(votes.values())]
            shares.append(fmean((p, True) in many[gold] for p in first))
        assert majority(answers, k).tolist() == pytest.approx(shares)
        brute = [
            fmean(any(v for _, v in some) for some in itertools.combinations(many[gold], k))
            for gold in answers.questions
        ]
        assert pass_at(answers.correct_QK, k).tolist() == pytest.approx(brute)


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


CHOSEN = (
    "Answer: C",
    "Answer: (C)",
    "**Answer: C**",
    "The answer is (C).",
    r"\boxed{C}",
    r"\boxed{\text{(C)}}",
    r"\boxed{\text{C. none of these}}",
    r"\boxed{c}",
    "Answer: C. maintain the population",
    "Answer: c",
    "C",
    "Answer: (B) or (C)",
    "Answer: D",
    "I do not know",
)


@pytest.mark.parametrize("checker", ["math", "letter"])
def test_a_choice_is_right_where_its_letter_is_that_of_the_gold(checker):
    """However it is written, draws of one choice vote together, and right ones for the gold."""
    with Verifier(name=checker) as verifier:
        right = verifier.verify([("C", text) for text in CHOSEN])
    assert sum(right) >= 9
    assert right == [prediction(checker, text, "C") == "C" for text in CHOSEN]


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

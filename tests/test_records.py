"""Records of an evaluation: what is written comes back, and what is damaged says where."""

import json

import pytest

from vpgea_fast.evaluation.records import (
    HEADER,
    SAMPLES,
    Sample,
    SampleError,
    line,
    read_header,
    read_samples,
    whole_bytes,
)

ONE = Sample(
    benchmark="gsm8k",
    mode="sampled",
    question_id="row-1",
    index=0,
    seed=2**62 + 1,
    ids=(4, 9, 7),
    text="two</think> \\boxed{2}\u2028\n",
    answer_text=" \\boxed{2}",
    prediction="2",
    gold="2",
    tokens=3,
    thought_tokens=2,
    finish="stop",
    correct=1,
)
CUT = {"ids": (), "tokens": 0, "thought_tokens": 0, "prediction": None, "correct": 0}


def changed(**values):
    return Sample(**{**json.loads(line(ONE)), "ids": ONE.ids, **values})


def write(folder, *lines):
    (folder / SAMPLES).write_text("".join(lines))
    return folder / SAMPLES


def test_samples_come_back(tmp_path):
    samples = [
        ONE,
        changed(index=1, finish="error", answer_text="", text="", **CUT),
        changed(mode="greedy", subject="algebra", level=5),
        changed(benchmark="aime24", level="Level 5", gold="\ud800 half a pair"),
    ]
    path = write(tmp_path, *map(line, samples))
    assert list(read_samples(path)) == list(read_samples(tmp_path)) == samples
    assert all(line(sample).count("\n") == 1 for sample in samples)


@pytest.mark.parametrize("kept", [1, 0.5, -1])
def test_a_torn_last_line_is_dropped_with_a_note(tmp_path, kept):
    """Also one that lacks its newline alone: what is appended behind it would join it."""
    second = line(changed(index=1))
    cut = second[: kept if isinstance(kept, int) else int(kept * len(second))]
    path, notes = write(tmp_path, line(ONE), cut), []
    assert list(read_samples(path, notes.append)) == [ONE]
    assert len(notes) == 1
    assert "line 2: not finished" in notes[0]
    assert whole_bytes(path) == len(line(ONE))


WRONG = {
    "benchmark": 3,
    "mode": "warm",
    "question_id": None,
    "index": -1,
    "seed": 1.5,
    "ids": [4, True, 7],
    "text": None,
    "answer_text": 0,
    "prediction": 2,
    "gold": None,
    "tokens": 4,
    "thought_tokens": 4,
    "finish": "end",
    "correct": True,
    "subject": 1,
    "level": 0.5,
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_refused_with_its_place(tmp_path, key):
    record = json.loads(line(ONE))
    assert record.keys() == WRONG.keys()
    write(tmp_path, line(ONE), json.dumps({**record, "index": 1, key: WRONG[key]}) + "\n")
    with pytest.raises(SampleError, match=rf"line 2: {key}: got .*--resume") as refusal:
        list(read_samples(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[" * 20_000, "not JSON"),
        ("[1]", "got a list"),
        (line(ONE)[:-1].replace('"gold"', '"golds"'), "lacks 'gold'"),
        (line(ONE)[:-2] + ', "zeta": 1}', "has an unknown 'zeta'"),
        (line(ONE)[:-1], "a second sample of"),
    ],
)
def test_a_line_that_is_no_sample_is_refused(tmp_path, text, why):
    write(tmp_path, line(ONE), text + "\n", line(changed(index=1)))
    with pytest.raises(SampleError, match=rf"line 2: {why}"):
        list(read_samples(tmp_path))


def test_no_file_is_refused(tmp_path):
    with pytest.raises(SampleError, match="is not there"):
        list(read_samples(tmp_path))
    with pytest.raises(SampleError, match=r"eval\.json is not there"):
        read_header(tmp_path)


GOOD = {"schema": 1, "model": {}, "settings": {}, "benchmarks": {"gsm8k": {}}}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "got no schema"),
        (json.dumps({"before": {}}), "got no schema"),
        (json.dumps({**GOOD, "schema": 2}), "got schema 2, expected 1"),
        (json.dumps({**GOOD, "model": "m"}), "got 'm', expected keys and values"),
        (json.dumps({**GOOD, "benchmarks": {"gsm8k": 3}}), "got 3, expected keys and values"),
        (json.dumps({"schema": 1}), "got None, expected keys and values"),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, text, why):
    (tmp_path / HEADER).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SampleError, match=why):
        read_header(tmp_path)


def test_a_header_comes_back(tmp_path):
    (tmp_path / HEADER).write_text(json.dumps(GOOD))
    assert read_header(tmp_path) == GOOD

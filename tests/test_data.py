"""Questions in, each defect named with its place; and a data order without state."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpgea_fast.config import DataConfig
from vpgea_fast.data import DataError, load_questions, normalise_answer, step_questions
from vpgea_fast.types import Question

GOOD = {"question": "2 + 2 = ?", "answer": "4"}


def jsonl(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "data.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_jsonl(tmp_path: Path):
    source = jsonl(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps({"id": 17, **GOOD}).encode(),
        b"",
        {"question": "\u221a2 \u00b7 \u221a2?\n", "answer": 2, "level": None},
        {"id": "", "question": "half {of} one", "answer": 0.5},
        {"id": None, "question": "204 as a float", "answer": 204.0},
    )
    loaded = load_questions(source, DataConfig())
    assert loaded.questions == (
        Question("17", "2 + 2 = ?", "4"),
        Question("row-3", "\u221a2 \u00b7 \u221a2?\n", "2"),
        Question("row-4", "half {of} one", "0.5"),
        Question("row-5", "204 as a float", "204"),
    )
    assert loaded.dropped == {}


def test_keys_and_limit_come_from_the_configuration(tmp_path: Path):
    rows = [{"problem": f"p{i}", "solution": i, "name": f"n{i}"} for i in range(5)]
    cfg = DataConfig(question_key="problem", answer_key="solution", id_key="name", limit=3)
    loaded = load_questions(jsonl(tmp_path, *rows, b"never read"), cfg)
    assert loaded.questions == tuple(Question(f"n{i}", f"p{i}", str(i)) for i in range(3))


def test_parquet_directories_and_jsonl_give_the_same_questions(tmp_path: Path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    rows = [{"question": f"q{i}", "answer": f"${i}$"} for i in range(2500)]
    table = pa.Table.from_pylist(rows)
    (tmp_path / "files").mkdir()
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "files" / "train.parquet")
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    expected = load_questions(jsonl(tmp_path, *rows), DataConfig())
    assert expected.questions[7] == Question("row-8", "q7", "7")
    for name in ("a.parquet", "files", "saved", "splits"):
        assert load_questions(str(tmp_path / name), DataConfig()) == expected


def test_a_null_in_a_table_is_an_empty_answer(tmp_path: Path):
    table = pa.table({"question": ["a", "b", "c"], "answer": [204.0, None, float("nan")]})
    pq.write_table(table, tmp_path / "a.parquet")
    loaded = load_questions(str(tmp_path / "a.parquet"), DataConfig())
    assert loaded.questions == (Question("row-1", "a", "204"),)
    assert loaded.dropped == {"empty answer": 2}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"question": "a", "answer": 4', r"line 3: Expecting ',' delimiter at column 30"),
        (b"[1, 2]", "line 3: a list instead of an object"),
        (b"[" * 100_000, "line 3: maximum recursion"),
        (b'{"question": "\xff", "answer": 4}', "line 3: 'utf-8' codec .* UTF-8"),
        ({"question": "a"}, r"line 3: no key 'answer' among \['question'\]; set data.answer_key"),
        ({"answer": "4", "q": "a"}, "line 3: no key 'question' .* set data.question_key"),
        ({"question": " ", "answer": "4"}, "line 3: expected the text of a question .* got ' '"),
        ({"question": None, "answer": "4"}, "line 3: expected the text of a question"),
        (
            {"question": "a", "answer": ["4", "5"]},
            r"line 3: expected an answer .* got \['4', '5'\]",
        ),
        ({"question": "a", "answer": True}, "line 3: expected an answer"),
        ({"id": "row-1", **GOOD}, "line 3: the id 'row-1' stands at .*line 1 already"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, message: str):
    with pytest.raises(DataError, match=message):
        load_questions(jsonl(tmp_path, GOOD, b"", bad, GOOD), DataConfig())


@pytest.mark.parametrize("rows", [(), (b"", b" \n")])
def test_an_empty_file_is_an_error(tmp_path: Path, rows: tuple):
    with pytest.raises(DataError, match=r"data\.jsonl is empty"):
        load_questions(jsonl(tmp_path, *rows), DataConfig())


def test_a_missing_or_unreadable_source_is_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    (tmp_path / "folder").mkdir()
    for source, message in [
        ("none.jsonl", r"there is no file .*none\.jsonl; expected a JSONL file"),
        ("a.parquet", r"a\.parquet is not a readable parquet file"),
        ("folder", "folder: "),
    ]:
        with pytest.raises(DataError, match=message):
            load_questions(str(tmp_path / source), DataConfig())
    with pytest.raises(DataError, match=r"expected hub:owner/name\[/config\]\[:split\], got"):
        load_questions("hub:gsm8k", DataConfig())


def test_unusable_answers_are_dropped_with_a_count_or_an_error(tmp_path: Path):
    answers = ["4", "", " $ $. ", None, "?", "5", "x="]
    source = jsonl(tmp_path, *({"question": "a", "answer": a} for a in answers))

    def parseable(golds: list[str]) -> list[bool]:
        assert golds == ["4", "?", "5", "x="]
        return [True, False, True, False]

    loaded = load_questions(source, DataConfig(), parseable=parseable)
    assert [question.id for question in loaded.questions] == ["row-1", "row-6"]
    assert loaded.dropped == {"empty answer": 3, "unparseable answer": 2}
    assert len(load_questions(source, DataConfig()).questions) == 4

    strict = DataConfig(bad_answer="error")
    with pytest.raises(
        DataError, match=r"line 2: empty answer '' under 'answer' \(5 such in all\)"
    ):
        load_questions(source, strict, parseable=parseable)
    only_bad = jsonl(tmp_path, GOOD, {"question": "a", "answer": "?"})
    with pytest.raises(DataError, match=r"line 2: unparseable answer '\?'"):
        load_questions(only_bad, strict, parseable=lambda golds: [gold != "?" for gold in golds])
    with pytest.raises(DataError, match=r"all 2 questions .*data\.answer_key"):
        load_questions(only_bad, DataConfig(), parseable=lambda golds: [False] * len(golds))


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("204", "204"),
        ("  204 . ", "204"),
        ("$204$.", "204"),
        ("$$x = \\frac{3}{4}.$$", "x = \\frac{3}{4}"),
        ("$3$ and $4$", "3 and 4"),
        (r"\$18", r"\$18"),
        (r"$\$18$", r"\$18"),
        ("$18", "18"),
        (r"\(x+1\)", "x+1"),
        ("\\[\nx+1\n\\]", "x+1"),
        (r"\(1\) and \(2\)", "1 and 2"),
        (r"\boxed{204}", "204"),
        (r"$\boxed{\boxed{\frac{3}{4}}}$", r"\frac{3}{4}"),
        (r"\boxed{1} or \boxed{2}", r"\boxed{1} or \boxed{2}"),
        (r"\boxed{1", r"\boxed{1"),
        (r"\left(3, 4\right]", "(3, 4]"),
        (r"\left\{1\right\}", r"\{1\}"),
        (r"\left. x \right|_0^1", r"\left. x \right|_0^1"),
        (r"x \leftarrow \left\{ y \right.", r"x \leftarrow \left\{ y \right."),
        (r"\begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix}",) * 2,
        (r"0.\overline{3}", r"0.\overline{3}"),
        ("1,000", "1,000"),
        (r"\text{(A)}", r"\text{(A)}"),
        ("", ""),
        ("$ . $", ""),
    ],
)
def test_normalise_answer(raw: str, plain: str):
    assert normalise_answer(raw) == plain
    assert normalise_answer(plain) == plain


def many(n: int) -> list[Question]:
    return [Question(f"q{i}", f"text {i}", "4") for i in range(n)]


@pytest.mark.parametrize(("n", "batch"), [(1, 1), (16, 16), (17, 5), (40, 8)])
def test_an_epoch_visits_every_question_at_most_once(n: int, batch: int):
    questions, per_epoch = many(n), n // batch
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        batches = [step_questions(questions, seed=3, step=s, batch=batch) for s in steps]
        assert [len(b) for b in batches] == [batch] * per_epoch
        assert len({q.id for b in batches for q in b}) == batch * per_epoch


def test_the_order_depends_on_seed_and_step_alone():
    questions = many(40)
    order = [step_questions(questions, seed=1, step=s, batch=8) for s in range(20)]
    for step in (13, 0, 7):
        assert step_questions(tuple(questions), seed=1, step=step, batch=8) == order[step]
    assert order[0] != order[5]  # the next epoch is another permutation
    assert step_questions(questions, seed=2, step=0, batch=8) != order[0]
    # Pinned: a resumed run must find its order again, on another machine and Python too.
    pinned = [question.id for question in step_questions(many(10), seed=0, step=7, batch=4)]
    assert pinned == ["q4", "q9", "q7", "q3"]


def test_no_question_is_favoured_by_a_ragged_end():
    questions = many(7)
    batches = [step_questions(questions, seed=0, step=s, batch=3) for s in range(2 * 700)]
    counts = Counter(question.id for batch in batches for question in batch)
    # 700 epochs of 6 among 7: 600 each; the standard deviation is sqrt(700 * 6/7 * 1/7) = 9.3.
    assert all(abs(count - 600) < 45 for count in counts.values())


@pytest.mark.parametrize("batch", [0, 5])
def test_an_impossible_batch_names_both_numbers(batch: int):
    with pytest.raises(DataError, match=rf"takes {batch} questions and the data set holds 4"):
        step_questions(many(4), seed=0, step=0, batch=batch)

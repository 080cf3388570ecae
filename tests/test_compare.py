"""`vpgea compare`: numbers by hand, pairs of questions, refusals in one line, three formats."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from test_measures import sample

from vpgea_fast.cli import main
from vpgea_fast.evaluation.compare import compare, open_evaluations
from vpgea_fast.evaluation.published import TABLES, plain, shared
from vpgea_fast.evaluation.records import HEADER, SAMPLES, SampleError, line
from vpgea_fast.evaluation.tables import grids, latex, markdown
from vpgea_fast.metrics import eps3, eps3_mean


def header(sizes, draws, *, greedy=0, **settings):
    return {
        "schema": 1,
        "model": {"path": "m", "fingerprint": "f"},
        "settings": {"k": {"sampled": draws, "greedy": greedy}, "seed": 0, **settings},
        "benchmarks": {
            name: {"fingerprint": name, "questions": size, "dropped": 0}
            for name, size in sizes.items()
        },
    }


def drawn(sizes, draws, *, chance=0.5, tokens=400, seed=0, **values):
    rng = random.Random(seed)
    return [
        sample(
            f"q{q}",
            k,
            benchmark=name,
            correct=int(rng.random() < chance),
            tokens=rng.randrange(1, 2 * tokens),
            **values,
        )
        for name, size in sizes.items()
        for q in range(size)
        for k in range(draws)
    ]


def write(folder, samples, head):
    folder.mkdir(parents=True)
    (folder / HEADER).write_text(json.dumps(head))
    (folder / SAMPLES).write_text("".join(map(line, samples)))
    return folder


SIZES = {"gsm8k": 40, "aime24": 30}


@pytest.fixture
def three(tmp_path):
    """A base, a model with half the tokens at held accuracy, and one that is better."""
    for name, chance, tokens in (("base", 0.5, 400), ("short", 0.5, 200), ("good", 0.9, 400)):
        samples = drawn(SIZES, 4, chance=chance, tokens=tokens, seed=1)
        write(tmp_path / name, samples, header(SIZES, 4))
    return tmp_path


def opened(*folders, common=False):
    notes = []
    return open_evaluations(list(map(str, folders)), common=common, note=notes.append), notes


def test_numbers_by_hand(three):
    found, _ = opened(*(three / name for name in ("base", "short", "good")))
    result = compare(found)
    assert [row["name"] for row in result["rows"]] == ["base", "short", "good"]
    assert result["mode"] == "sampled"
    samples = drawn(SIZES, 4, chance=0.9, seed=1)
    good, base = result["rows"][2], result["rows"][0]
    for name in SIZES:
        own = [s for s in samples if s.benchmark == name]
        acc, tokens = fmean(s.correct for s in own), fmean(s.tokens for s in own)
        assert good["benchmarks"][name]["acc"] == pytest.approx(acc)
        assert good["benchmarks"][name]["eps3"] == pytest.approx(eps3(acc, tokens))
        change = good["against"][name]
        assert change["acc"]["value"] == pytest.approx(acc - base["benchmarks"][name]["acc"])
        ratio = eps3(acc, tokens) / base["benchmarks"][name]["eps3"] - 1
        assert change["eps3"]["value"] == pytest.approx(ratio)
        assert change["eps3"] == change["eps3_mean"]
    pairs = [[(p["acc"], p["tokens"]) for p in row["benchmarks"].values()] for row in (good, base)]
    new, old = map(eps3_mean, pairs)
    for key, value in zip(("eps3", "eps3_mean"), zip(new, old, strict=True), strict=True):
        assert good["mean"][key] == pytest.approx(value[0])
        assert good["against"]["mean"][key]["value"] == pytest.approx(value[0] / value[1] - 1)
    # The same questions are right, with about half the tokens: AES is the saving alone.
    short = result["rows"][1]["against"]["mean"]
    assert short["acc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert short["aes"]["value"] == pytest.approx(-short["tokens"]["value"])
    assert short["tokens"]["low"] < -0.4 < -0.3 < short["tokens"]["high"] + 0.2


def test_a_paired_interval_is_narrower_than_that_of_either(tmp_path):
    """One question in forty changes: the difference is sure to a few points, accuracy is not."""
    base = drawn({"b": 40}, 1)
    wrong = next(s for s in base if not s.correct)
    better = [replace(s, correct=1) if s is wrong else s for s in base]
    for name, samples in (("a", base), ("b", better)):
        write(tmp_path / name, samples, header({"b": 40}, 1))
    rows = compare(opened(tmp_path / "a", tmp_path / "b")[0])["rows"]
    change, alone = rows[1]["against"]["b"]["acc"], rows[0]["benchmarks"]["b"]["intervals"]["acc"]
    assert change["value"] == pytest.approx(1 / 40)
    assert change["low"] == 0
    assert change["high"] <= 4 / 40
    assert alone[1] - alone[0] > 0.25


def test_the_order_of_lines_and_benchmarks_changes_nothing(three, tmp_path):
    samples = drawn(SIZES, 4, chance=0.9, seed=1)
    random.Random(2).shuffle(samples)
    write(tmp_path / "mixed", samples, header(SIZES, 4))
    both = [compare(opened(three / "base", f"x={three / n}")[0]) for n in ("good", "mixed")]
    assert both[0] == both[1]


UNLIKE = {
    "settings.seed": {"seed": 1},
    "settings.k.sampled": {"draws": 2},
    "benchmarks.gsm8k.questions": {"sizes": {"gsm8k": 39, "aime24": 30}},
    "benchmarks.aime24.dropped": {"sizes": {"gsm8k": 40}},
}


@pytest.mark.parametrize("key", UNLIKE)
def test_unlike_settings_and_sets_are_refused(three, key):
    """With --common what both have is compared, and what is unlike stands below the table."""
    changed = {"sizes": SIZES, "draws": 4, **UNLIKE[key]}
    sizes, draws = changed.pop("sizes"), changed.pop("draws")
    other = write(three / "other", drawn(sizes, draws), header(sizes, draws, **changed))
    with pytest.raises(SampleError, match=rf"differ in {key} .*--common") as refusal:
        compare(opened(three / "base", other)[0])
    assert "\n" not in str(refusal.value)
    result = compare(opened(three / "base", other, common=True)[0], common=True)
    assert result["questions"] == {n: min(size, SIZES[n]) for n, size in sizes.items()}
    assert result["notes"][0].startswith(f"base and other differ in {key}")


def test_questions_of_one_id_and_another_answer_are_two(three):
    samples = [
        replace(s, gold="2") if s.question_id in ("q0", "q1") else s for s in drawn(SIZES, 4)
    ]
    other = write(three / "other", samples, header(SIZES, 4))
    with pytest.raises(SampleError, match="gsm8k: only 38 questions are common"):
        compare(opened(three / "base", other)[0])
    result = compare(opened(three / "base", other, common=True)[0], common=True)
    assert result["questions"] == {"gsm8k": 38, "aime24": 28}
    away = write(three / "away", drawn({"x": 3}, 4), header({"x": 3}, 4))
    with pytest.raises(SampleError, match="no question is common"):
        compare(opened(three / "base", away, common=True)[0], common=True)


@pytest.mark.parametrize("lost", ["a question", "a draw of one", "a draw of all", "a benchmark"])
def test_an_unfinished_evaluation_is_refused_and_partly_used(three, lost):
    keep = {
        "a question": lambda s: s.question_id != "q29" or s.benchmark != "aime24",
        "a draw of one": lambda s: s.key != ("aime24", "sampled", "q29", 3),
        "a draw of all": lambda s: s.index < 3,
        "a benchmark": lambda s: s.benchmark != "aime24",
    }[lost]
    samples = [s for s in drawn(SIZES, 4) if keep(s)]
    other = write(three / "other", samples, header(SIZES, 4))
    with pytest.raises(SampleError, match=r"other: .*--resume"):
        opened(three / "base", other)
    aime = {"a draw of all": 30, "a benchmark": None}.get(lost, 29)
    result = compare(opened(three / "base", other, common=True)[0], common=True)
    assert result["questions"].get("aime24") == aime


def test_modes(three):
    both = [*drawn(SIZES, 4), *drawn(SIZES, 1, mode="greedy")]
    for name in ("one", "two"):
        write(three / name, both, header(SIZES, 4, greedy=1))
    found, _ = opened(three / "one", three / "two")
    assert compare(found)["mode"] == "sampled"
    greedy = compare(found, mode="greedy")
    assert greedy["rows"][0]["benchmarks"]["gsm8k"]["k"] == 1
    warm, _ = opened(three / "base", three / "good")
    with pytest.raises(SampleError, match="base has no greedy answers"):
        compare(warm, mode="greedy")
    cold = write(three / "cold", drawn(SIZES, 1, mode="greedy"), header(SIZES, 4, greedy=1))
    with pytest.raises(SampleError, match="no mode is common to all"):
        compare(opened(cold, three / "base")[0])


def test_a_run_gives_every_evaluation_that_it_holds(tmp_path):
    for step in (100, 20):
        folder = tmp_path / f"run/evaluations/step-{step}"
        write(folder, drawn({"b": 3}, 1), header({"b": 3}, 1))
    found, _ = opened(tmp_path / "run")
    names = [evaluation.name for evaluation in found]
    assert names == ["run/evaluations/step-20", "run/evaluations/step-100"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["base", "base"], "two evaluations are called 'base'"),
        (["base", "nowhere"], "is no folder"),
        (["base", "empty"], "holds no samples.jsonl"),
        (["base", "=x"], "expected FOLDER or NAME=FOLDER"),
        (["base", "headless"], "eval.json is not there"),
        (["base", "nothing"], "there is no sample"),
        (["base", "foreign"], "a sample is of 'b'"),
        (["base", "damaged"], "line 1: not JSON"),
        (["base", "good", "--out", "base/eval.json"], "--out base/eval.json: File exists; give"),
        (["base", "unplanned"], "gsm8k has greedy answers, of which eval.json plans none"),
    ],
)
def test_refusals_take_one_line(three, words, why, monkeypatch, capsys):
    monkeypatch.chdir(three)
    (three / "empty").mkdir()
    head = header(SIZES, 4)
    (write(three / "headless", [], head) / HEADER).unlink()
    write(three / "nothing", [], head)
    write(three / "foreign", drawn({**SIZES, "b": 1}, 4), head)
    write(three / "unplanned", [*drawn(SIZES, 4), *drawn(SIZES, 1, mode="greedy")], head)
    (write(three / "damaged", [], head) / SAMPLES).write_text("{\n")
    assert main(["compare", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert why in said.err


def test_one_evaluation_stands_beside_the_published_figures(three, monkeypatch, capsys):
    monkeypatch.chdir(three)
    assert main(["compare", "base"]) == 0
    text = capsys.readouterr().out
    assert "### Results" in text
    assert "### Draws" in text
    assert "Differences" not in text
    assert "VPG-EA 7B | 92.0 |" in text
    whole = compare(opened(three / "base", three / "good")[0])["rows"][0]
    assert compare(opened(three / "base")[0])["rows"] == [whole]


def test_the_command_writes_three_formats(three, monkeypatch, capsys):
    monkeypatch.chdir(three)
    words = ["compare", "base", "it_s 50% | $x=good", "--out", "out"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert (three / "out/comparison.md").read_text() == text
    result = json.loads((three / "out/comparison.json").read_text())
    # As printed: this table's cells are the JSON's numbers.
    row = result["rows"][0]
    parts = [*row["benchmarks"].values(), row["mean"]]
    cells = [f"{100 * p['acc']:.1f} | {p['tokens']:.0f} | {p['eps3']:.3g}" for p in parts]
    assert f"| base | {' | '.join(cells)} | {row['mean']['eps3_mean']:.3g} |" in text
    assert "VPG-EA 7B | 92.0 | - | - | 56.7 | - | - |" in text
    tables = [part for part in text.split("\n") if part.startswith("|")]
    assert all(line.replace(r"\|", "").count("|") >= 3 for line in tables)
    tex = (three / "out/comparison.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\bottomrule") == text.count("### ")
    assert r"it\_s 50\% \textbar{} \$x &" in tex
    assert main(["compare", "base", "good", "--format", "json", "--no-published"]) == 0
    assert json.loads(capsys.readouterr().out)["published"] == {}


def test_what_eval_wrote_is_read_and_compared(tiny_world, tmp_path, capsys):
    """The numbers of its closing table, from its records alone."""
    config = Path(__file__).parents[1] / "configs/tiny.yaml"
    asked = ["eval", tiny_world.base_dir, tiny_world.test_path, "--config", config]
    keys = ["--eval.limit", 8, "--eval.samples", 2, "--verify.name", "number"]
    words = list(map(str, [*asked, *keys, "--out", tmp_path / "one"]))
    assert main(words) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    # What one evaluation tells of its draws stands below its closing table.
    shown = capsys.readouterr().out
    headers = "answers benchmark k avg@k % pass@k % maj@k % tokens per right answer eps3 cut %"
    assert headers in " ".join(shown.split())
    assert "maj@k: predictions that tie share" in shown
    for mode in ("sampled", "greedy"):
        compared = ["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--mode", mode]
        assert main([*compared, "--format", "json"]) == 0
        row = json.loads(capsys.readouterr().out)["rows"][1]
        told = json.loads((tmp_path / "one/result.json").read_text())[mode]
        (part,) = told["benchmarks"].values()
        ((name, found),) = row["benchmarks"].items()
        same = ("acc", "tokens", "eps3", "truncated", "errors", "n", "questions")
        same += ("acc_low", "acc_high")
        assert found["intervals"]["acc"] == [part["acc_low"], part["acc_high"]]
        details = json.loads((tmp_path / "one/result.json").read_text())["details"][mode]
        assert details == {key: row[key] for key in ("benchmarks", "mean")}
        assert all(row["mean"][key] == told[key] for key in ("acc_low", "acc_high", "eps3_mean"))
        assert {key: found[key] for key in same} == {key: part[key] for key in same}
        changes = row["against"][name]
        assert changes["tokens"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_base_without_a_right_answer_has_no_ratios(tmp_path):
    for name, chance in (("a", 0), ("b", 0.5)):
        write(tmp_path / name, drawn({"b": 9}, 2, chance=chance), header({"b": 9}, 2))
    result = compare(opened(tmp_path / "a", tmp_path / "b")[0])
    change = result["rows"][1]["against"]["b"]
    assert change["eps3"] == change["aes"] == {"value": None, "low": None, "high": None}
    assert change["acc"]["value"] > 0
    assert result["rows"][0]["benchmarks"]["b"]["tokens_per_correct"] is None
    laid = grids(result)
    assert json.dumps(result, allow_nan=False)
    assert "| b | b | +" in markdown(laid)
    assert "| - | - | - |" in markdown(laid)
    assert latex(laid)


def test_published_figures_are_those_of_the_tables():
    """Numbers as the papers print them; eps3 as METHOD's own division gives."""
    assert sum(len(table.rows) for table in TABLES.values()) == 1 + 20 + 14 + 12 + 13 + 16 + 10 + 26
    figures = shared(["MATH-500", "AIME 2024", "tiny"])
    assert figures["VPG-EA"]["rows"][0]["benchmarks"]["MATH-500"]["acc"] == pytest.approx(0.93)
    assert figures["VPG-EA"]["rows"][0]["benchmarks"]["AIME 2024"]["acc"] == pytest.approx(
        17 / 30, abs=1e-4
    )
    last = figures["T1"]["rows"][-1]
    assert (last["size"], last["method"]) == ("7B", "AdaptThink d=0.05")
    assert last["benchmarks"]["AIME 2024"]["tokens"] == 8599
    assert round(last["benchmarks"]["MATH-500"]["eps3"], 2) == 4.51
    assert all(0 < acc <= 100 for t in TABLES.values() for *_, c in t.rows for acc, _ in c.values())
    assert shared(["tiny"]) == {}
    assert {plain(n) for n in ("aime_2024", "AIME24")} == {"aime24"}

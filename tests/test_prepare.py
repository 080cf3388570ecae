"""`vpgea data`: published data sets as files, the check against evaluations, pass rates."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow
import pytest
import torch
from pyarrow import parquet
from ranks import Program
from test_evaluate import Scripted

from vpgea_fast import config, strict_yaml
from vpgea_fast.cli import main
from vpgea_fast.config import Config, DataConfig, EvalConfig
from vpgea_fast.data import load_questions
from vpgea_fast.data.recipes import MATH, MATH_ROWS, RECIPES
from vpgea_fast.evaluate import Evaluator
from vpgea_fast.prepare.overlap import Overlap
from vpgea_fast.prepare.pass_rates import Rate, _block
from vpgea_fast.rollout.engine import Sampling
from vpgea_fast.types import Question
from vpgea_fast.verify import Verifier

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
WORDS = "a train leaves the old station at noon and drives north past two quiet lakes".split()


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def shards(folder, split, parts):
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts):
        name = f"{split}-{i:05}-of-{len(parts):05}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / name)


def gsm8k(number, text=None):
    question = text or f"Ann has {number} apples and eats one. How many are left?"
    return {"question": question, "answer": f"{number}-1=<<{number}-1>> it is\n#### {number - 1:,}"}


@pytest.fixture
def hub_folder(tmp_path):
    """openai/gsm8k in small, as a clone of it lies on a disk: 5 training rows in two files."""
    folder = tmp_path / "hub/gsm8k"
    made = [gsm8k(n) for n in (11, 12, 1301, 14, 15)]
    made[3]["answer"] = (
        "nothing is left, as far as one can see here, so the story ends with no mark"
    )
    shards(folder / "main", "train", [made[:2], made[2:]])
    shards(folder / "main", "test", [[gsm8k(21), gsm8k(22)]])
    paths = [{"split": s, "path": f"main/{s}-*"} for s in ("train", "test")]
    card = strict_yaml.dump({"configs": [{"config_name": "main", "data_files": paths}]})
    (folder / "README.md").write_text(f"---\n{card}---\n# Grade School Math\n")
    return folder


@pytest.fixture
def said(capsys, errors_in):
    """Runs `vpgea data` and returns what it printed; with `refused` its one line of error."""

    def run(*words, refused=False):
        status = main(["data", *map(str, words)])
        printed = capsys.readouterr()
        assert status == (2 if refused else 0), printed.err
        if refused:
            errors = errors_in(printed.err)
            assert len(errors) == 1
            assert errors[0].startswith("vpgea: ")
        return printed.err if refused else printed.out

    return run


def settings(printed):
    """What a configuration makes of the lines that were printed for it at the end."""
    return config.resolve(strict_yaml.parse(printed.partition("for a configuration:\n")[2]))


def test_a_hub_shaped_folder(hub_folder, said, tmp_path):
    import datasets

    out = tmp_path / "out"
    printed = said("gsm8k", "--from", hub_folder.parent, "--out", out)
    train = rows(out / "train.jsonl")
    assert train[0] == {
        "id": "gsm8k-train-1",
        "question": "Ann has 11 apples and eats one. How many are left?",
        "answer": "10",
    }
    assert [(row["id"], row["answer"]) for row in train[1:]] == [
        ("gsm8k-train-2", "11"),
        ("gsm8k-train-3", "1300"),
        ("gsm8k-train-5", "14"),
    ]
    (lost,) = rows(out / "dropped.jsonl")
    assert (lost["id"], lost["reason"]) == ("gsm8k-train-4", "worked solution")
    assert lost["place"].endswith("main/train-00001-of-00002.parquet, row 2")
    assert "train: 5 read, 4 kept, 1 dropped (1 worked solution)" in printed
    assert "gsm8k train: 7473 rows were published, 5 are here" in printed
    assert "what follows the last ####" in printed
    cfg = settings(printed)
    loaded = load_questions(cfg.data.train[0], DataConfig())
    assert [q.answer for q in loaded.questions] == [row["answer"] for row in train]
    assert not loaded.drops
    assert cfg.eval.data[0].path == str(out / "test.jsonl")
    assert [row["id"] for row in rows(out / "test.jsonl")] == ["gsm8k-test-1", "gsm8k-test-2"]
    # the folder is what `datasets` takes for a repository
    held = datasets.load_dataset(str(hub_folder), "main", split="train", cache_dir=str(tmp_path))
    assert [row["question"] for row in held][:3] == [row["question"] for row in train][:3]


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as `datasets` asks for, over the folder `root`."""

    root: Path
    commit = "c" * 40

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        words = urlsplit(self.path).path.strip("/").split("/")
        if words == [""]:  # whether anybody is here
            return self.answer(b"")
        if words[0] == "datasets":  # datasets/owner/name/resolve/REVISION/PATH
            file = self.root.joinpath(*words[1:3], *words[5:])
            if file.is_file():
                held = {"ETag": f'"{words[-1]}"', "X_Repo_Commit": self.commit}
                return self.answer(file.read_bytes(), **held)
        elif words[1] == "datasets":  # api/datasets/owner/name[/tree/REVISION/PATH]
            repository = self.root.joinpath(*words[2:4])
            if words[4:5] == ["tree"]:
                below = repository.joinpath(*words[6:])
                if below.is_dir():
                    return self.json([self.entry(repository, f) for f in below.iterdir()])
            else:
                names = [self.entry(repository, f)["path"] for f in repository.rglob("*.*")]
                siblings = [{"rfilename": name} for name in names]
                found = {"id": "/".join(words[2:4]), "sha": self.commit, "siblings": siblings}
                return self.json(found)
        return self.answer(b"", status=404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def entry(self, repository, file):
        path = file.relative_to(repository).as_posix()
        kind = "directory" if file.is_dir() else "file"
        return {"type": kind, "path": path, "size": file.stat().st_size, "oid": path}

    def json(self, value):
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_from_the_hub(hub_folder, said, tmp_path):
    """`datasets` loads from a server here as from the Hub; the files are those of the folder."""
    (tmp_path / "root").mkdir()
    hub_folder.rename(tmp_path / "root/gsm8k")
    (tmp_path / "root").rename(tmp_path / "hub/openai")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"root": tmp_path / "hub"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    around = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    around |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "no_proxy": "127.0.0.1"}
    around |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "vpgea_fast.cli", "data", "gsm8k", "--out", tmp_path / "a"]
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=200)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "gsm8k train: 5 rows from hub:openai/gsm8k/main:train" in done.stdout
    said("gsm8k", "--from", tmp_path / "hub", "--out", tmp_path / "b")
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_files_that_are_there_are_kept(hub_folder, said, tmp_path):
    words = "gsm8k", "--from", hub_folder, "--out", tmp_path / "out"
    said(*words)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert said(*words).count("(unchanged)") == 4
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out/test.jsonl").write_text("mine")
    assert "test.jsonl is there and would change; give another --out" in said(*words, refused=True)
    assert (tmp_path / "out/test.jsonl").read_text() == "mine"
    said(*words, "--overwrite")
    assert len(rows(tmp_path / "out/test.jsonl")) == 2
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in before}


def test_math_without_the_500(said, tmp_path):
    """Rows of all 14 files; what MATH-500 holds stays out of training, others keep their number."""
    for config_name in MATH_ROWS:
        for split in ("train", "test"):
            made = [
                {
                    "problem": f"Of {config_name} in {split}: find {n}.",
                    "level": "Level 1",
                    "type": config_name,
                    "solution": rf"Look: it is $\boxed{{{n}}}$.",
                }
                for n in range(1, 4)
            ]
            shards(tmp_path / f"hendrycks_math/{config_name}", split, [made])
    held = {"problem": "Of geometry in  test: find 2.", "answer": "2", "unique_id": "test/g/2.json"}
    write(tmp_path / "MATH-500/test.jsonl", [held])
    printed = said("math", "--from", tmp_path, "--out", tmp_path / "out")
    assert r"math train: 42 answers: what the last \boxed{} holds" in printed
    train = rows(tmp_path / "out/train.jsonl")
    assert "train: 42 read, 41 kept, 1 dropped (1 in the test split)" in printed
    assert train[0]["id"] == "math-algebra-train-1"
    ids = [row["id"] for row in train]
    assert [i for i in ids if "geometry-test" in i] == [
        "math-geometry-test-1",
        "math-geometry-test-3",
    ]
    assert {row["answer"] for row in train} == {"1", "2", "3"}
    assert rows(tmp_path / "out/test.jsonl")[0]["id"] == "math-test/g/2.json"
    assert sum(source.rows for source in MATH) == 12_500
    (tmp_path / "hendrycks_math/prealgebra/train-00000-of-00001.parquet").unlink()
    error = said("math", "--from", tmp_path, "--out", tmp_path / "b", refused=True)
    assert "prealgebra/train-*.parquet (also below hendrycks_math/) and found only a part" in error


def test_one_file_for_two_splits(said, tmp_path):
    made = [
        {"Body": f"Tom has {n} pens.", "Question": "How many?", "Answer": float(n), "ID": f"c-{n}"}
        for n in range(1, 703)
    ]
    write(tmp_path / "svamp.jsonl", made)
    printed = said("svamp", "--from", tmp_path, "--out", tmp_path / "out")
    assert "svamp.jsonl, rows 1 to 700\n" in printed
    assert "svamp.jsonl, rows 701 to its end\n" in printed
    train, test = (rows(tmp_path / f"out/{name}.jsonl") for name in ("train", "test"))
    assert (len(train), train[-1]["id"], train[-1]["answer"]) == (700, "svamp-c-700", "700")
    assert [row["id"] for row in test] == ["svamp-c-701", "svamp-c-702"]
    assert test[0]["question"] == "Tom has 701 pens. How many?"


def planted(found, text):
    return found.match(text).question.id if found.match(text) else None


def test_thirteen_words_are_one_question_and_twelve_are_not():
    held = Question(id="e1", text=f"First, {' '.join(WORDS)}; when is it back?", answer="1")
    found = Overlap([("test.jsonl", [held, Question(id="e2", text="Compute 3 + 4.", answer="7")])])
    assert planted(found, held.text) == "e1"
    assert planted(found, f"Long ago {'-- '.join(WORDS[1:14]).upper()} and more words came") == "e1"
    assert found.match("so " + " ".join(WORDS[1:14])).shared == " ".join(WORDS[1:14])
    assert planted(found, f"Long ago {' '.join(WORDS[1:13])} and many more words came then") is None
    assert (
        planted(found, " ".join(WORDS[1:13])) is None
    )  # below 13 words: the whole text or nothing
    assert planted(found, "compute $3+4$") == "e2"
    assert planted(found, "Compute 3 - 4.") is None
    assert planted(found, "Compute 3.4") is None


def test_contaminated_rows_are_left_out_and_listed(said, tmp_path):
    text = " ".join(WORDS)
    made = [
        {"problem": text, "answer": "1"},
        {"problem": f"One day {text} where is it?", "answer": "2"},
        {"problem": f"One day {' '.join(WORDS[:12])} where is it now, then?", "answer": "3"},
        {"problem": "Unlike all else", "answer": "4"},
    ]
    (tmp_path / "deepscaler.json").write_text(json.dumps(made))
    against = write(tmp_path / "held.jsonl", [{"id": "h", "problem": text, "final": "9"}])
    words = "deepscaler", "--from", tmp_path, "--out", tmp_path / "out"
    entry = f"{{path: {against}, question_key: problem, answer_key: final}}"
    printed = said(*words, "--against", entry)
    assert "train: 4 read, 2 kept, 2 dropped (2 contaminated)" in printed
    assert [row["answer"] for row in rows(tmp_path / "out/train.jsonl")] == ["3", "4"]
    copies = rows(tmp_path / "out/contaminated.jsonl")
    assert [row["id"] for row in copies] == ["deepscaler-train-1", "deepscaler-train-2"]
    assert copies[1]["evaluation"] == {"file": str(against), "id": "h", "question": text}
    assert copies[1]["shared"] == " ".join(WORDS[:13])
    alone = said(*words[:-1], tmp_path / "alone")
    assert "compared with no evaluation: give one with --against FILE" in alone
    assert len(rows(tmp_path / "alone/train.jsonl")) == 4


def test_names_on_the_hub():
    names = {
        source.hub_path
        for recipe in RECIPES.values()
        for ways in recipe.values()
        for source in ways[0]
        if source.config in (None, "main", "algebra")
    }
    assert names == {
        "hub:openai/gsm8k/main:train",
        "hub:openai/gsm8k/main:test",
        "hub:EleutherAI/hendrycks_math/algebra:train",
        "hub:EleutherAI/hendrycks_math/algebra:test",
        "hub:HuggingFaceH4/MATH-500:test",
        "hub:agentica-org/DeepScaleR-Preview-Dataset:train",
        "hub:HuggingFaceH4/aime_2024:train",
        "hub:math-ai/aime25:test",
        "hub:ChilleD/SVAMP:train",
        "hub:ChilleD/SVAMP:test",
    }


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["gsmk"], "got 'gsmk'; did you mean 'gsm8k'? known: gsm8k, math, math500, deepscaler"),
        (["gsm8k"], "openai/gsm8k does not come from the Hub (Couldn't reach"),
        (["gsm8k"], "vpgea data gsm8k --from FOLDER with main/train-*.parquet, or gsm8k_train"),
        (["gsm8k", "--from", "."], "for main/train-*.parquet, or gsm8k_train.jsonl"),
        (["gsm8k", "--from", "none"], "--from none: expected a folder that holds gsm8k train"),
        (["aime24", "--model", "m"], "aime24 has no training questions"),
        (["gsm8k", "--keep", "0.1:0.9"], "--keep and --samples need --model"),
        (["gsm8k", "--keep", "0.9:0.1"], "got '0.9:0.1', expected LOW:HIGH within 0:1"),
        (["gsm8k", "--keep", "0.5"], "got '0.5', expected LOW:HIGH"),
        (["gsm8k", "--eval.samples", "0"], "a pass rate needs one sample or more"),
        (["gsm8k", "--model", "./none"], "no model directory at ./none"),
        (["gsm8k", "--from", "hub", "--out", "hub/f"], "--out hub/f is a file"),
        (["gsm8k", "--from", "hub", "--against", "none.jsonl"], "there is no file none.jsonl"),
        (["gsm8k", "--from", "hub", "--against", "hub/gsm8k/main/"], "stand in an evaluation too"),
    ],
)
@pytest.mark.usefixtures("hub_folder")
def test_a_wrong_order_is_one_line_and_leaves_nothing(words, wanted, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub/f").touch()
    if "hub/gsm8k/main/" in words:
        words = [*words[:-1], write(tmp_path / "hub/all.jsonl", [gsm8k(n) for n in range(9, 1400)])]
    before = set(tmp_path.rglob("*"))
    assert wanted in said(*words, refused=True)
    assert set(tmp_path.rglob("*")) == before


def test_a_shard_that_is_missing(said, hub_folder, tmp_path):
    (hub_folder / "main/train-00000-of-00002.parquet").unlink()
    error = said("gsm8k", "--from", hub_folder, "--out", tmp_path / "out", refused=True)
    assert "1 of 2 files are there; copy them all" in error


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("gsm8k", 7473, 1319), ("math500", 0, 500), ("aime24", 0, 30), ("svamp", 700, 300)],
)
def test_published_files(name, train, test, said, tmp_path):
    folder = os.environ.get("VPGEA_DATA")
    if not folder:
        pytest.skip("needs the published data sets: set VPGEA_DATA to their folder")
    printed = said(name, "--from", folder, "--out", tmp_path / "out")
    assert "were published" not in printed
    assert f"test: {test} read, {test} kept, 0 dropped" in printed
    assert len(rows(tmp_path / "out/test.jsonl")) == test
    counts = re.search(r"train: (\d+) read, (\d+) kept, (\d+) dropped", printed)
    if not train:
        assert counts is None
        return
    read, kept, dropped = map(int, counts.groups())
    assert (read, kept + dropped) == (train, train)
    assert dropped == len(rows(tmp_path / "out/contaminated.jsonl"))
    # by hand: 4 rows of GSM8K share a run with its test, and SVAMP varies its own bodies
    assert dropped == {"gsm8k": 4, "svamp": 158}[name]


@pytest.fixture
def tiny_order(tiny_world, tmp_path):
    """Words of an order for 16 questions of the tiny task, 4 answers each, in blocks of 4."""
    source = tmp_path / "source"
    if not source.exists():
        write(source / "gsm8k_train.jsonl", rows(tiny_world.train_path)[:16])
        write(source / "gsm8k_test.jsonl", rows(tiny_world.test_path)[:2])

    def words(out, *more):
        fixed = "gsm8k", "--from", source, "--out", out, "--config", TINY
        model = "--model", tiny_world.base_dir, "--samples", "4", "--rollout.max_batch", "4"
        model += "--verify.name", "number"
        return [str(word) for word in (*fixed, *model, *more)]

    return words


def test_the_difficulty_filter(tiny_order, tiny_world, said, tmp_path, capsys):
    """One block, so the answers are those of an evaluation of the same file, to the last one."""
    out = tmp_path / "out"
    more = "--rollout.max_batch", "16", "--eval.temperature", "1.3"
    printed = said(*tiny_order(out, "--keep", "0.5:0.75", *more))
    header, *rates = rows(out / "pass_rates.jsonl")
    assert header["block"] == len(rates) == 16
    kept = rows(out / "train-0.5-0.75.jsonl")
    inside = [rate["id"] for rate in rates if 0.5 <= rate["right"] / rate["drawn"] <= 0.75]
    assert [row["id"] for row in kept] == inside
    assert 0 < len(kept) < 16
    assert {row["pass_rate"] for row in kept} <= {0.5, 0.75}
    assert settings(printed).data.train[0].path == str(out / "train-0.5-0.75.jsonl")
    shown = dict(re.findall(r"^ +([\d.]+) +(\d+) +\d+ +#+", printed, re.M))
    counted = [rate["right"] / 4 for rate in rates]
    assert shown == {f"{value:.3g}": str(counted.count(value)) for value in set(counted)}

    found = tmp_path / "evaluation"
    settings_words = ["--config", str(TINY), "--out", str(found), "--eval.greedy", "false"]
    settings_words += ["--eval.samples", "4", "--verify.name", "number", *more]
    assert main(["eval", str(tiny_world.base_dir), str(out / "train.jsonl"), *settings_words]) == 0
    capsys.readouterr()
    result = json.loads((found / "result.json").read_text())["sampled"]
    assert result["acc"] == sum(rate["right"] for rate in rates) / 64
    assert result["tokens"] == pytest.approx(sum(rate["tokens"] for rate in rates) / 16, abs=1e-3)

    file = out / "pass_rates.jsonl"  # as an older version wrote it
    old = file.read_text().replace('"engine.name"', '"rollout.engine"', 1)
    file.write_text(old.replace('"eval.joint_limit": false, ', "", 1))
    assert "rollout.engine" in rows(file)[0]
    assert "eval.joint_limit" not in rows(file)[0]
    narrow = said(*tiny_order(out, "--keep", "0.6:0.8", *more))  # nothing is drawn again
    assert "student prompt" not in narrow
    assert {row["pass_rate"] for row in rows(out / "train-0.6-0.8.jsonl")} == {0.75}
    none = said(*tiny_order(out, "--keep", "0.01:0.02", *more), refused=True)
    assert "none of 16 questions has a pass rate from 0.01 to 0.02; widen --keep" in none
    other = said(*tiny_order(out, *more, "--eval.seed", "1"), refused=True)
    assert "drawn with other settings (eval.seed: 0 there, 1 now)" in other


def test_prompts_that_a_run_drops_have_no_rate(tiny_order, said, tmp_path):
    printed = said(*tiny_order(tmp_path / "out", "--data.max_prompt_tokens", "10"))
    rates = rows(tmp_path / "out/pass_rates.jsonl")[1:]
    long = [rate for rate in rates if rate["why"] == "longer than 10 tokens"]
    assert 0 < len(long) < 16
    assert all(rate["drawn"] == 0 for rate in long)
    assert re.search(rf"longer than 10 tokens +{len(long)} +0", printed)
    none = said(
        *tiny_order(tmp_path / "none", "--data.max_prompt_tokens", "2", "--keep", "0:1"),
        refused=True,
    )
    assert "none of 16 questions has a pass rate from 0 to 1" in none


class Lossy(Scripted):
    """Gives the second answer of each question up."""

    def path(self, request):
        path = super().path(request)
        return replace(path, finish="error") if request.index == 1 else path


def test_answers_that_an_engine_gave_up_count_for_nothing(tiny_tokenizer):
    """By the script of test_evaluate.py: right 4 tokens, wrong 6; and wrong 10, cut 20."""
    with Verifier() as verifier:
        evaluator = Evaluator(
            Config(eval=EvalConfig(samples=2)),
            engine=Lossy(tiny_tokenizer),
            benchmarks={},
            sampling=Sampling(max_new_tokens=3, think_close_id=5, eos_ids=(2,)),
            decode=lambda ids: rf"\boxed{{{ids.item()}}}",
            verifier=verifier,
        )
        texts = "1 A+two", "3 A+two"
        asked = [
            (
                Question(id=text, text=text, answer="7"),
                torch.tensor(tiny_tokenizer(text)["input_ids"]),
            )
            for text in texts
        ]
        left = Rate("long", why="longer than 10 tokens")
        found = _block(evaluator, [asked[0], left, asked[1]], lambda _: None)
    assert found == [Rate(texts[0], 1, 1, 4.0), left, Rate(texts[1], 0, 1, 10.0)]
    assert Rate("lost").value is None


def killed_at(words, file, count):
    """Kill -9 as soon as `count` lines stand in the file; the bytes that it holds then."""
    process = Program("-m", "vpgea_fast.cli", "data", *words)
    while not (file.exists() and file.read_bytes().count(b"\n") >= count):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    return file.read_bytes()


def test_a_killed_filter_goes_on_where_it_was(tiny_order, said, tmp_path):
    """Whatever a kill leaves: the same bytes as undisturbed, and no block is drawn twice."""
    keep = "--keep", "0:0.9", "--eval.max_new_tokens", "96"
    said(*tiny_order(tmp_path / "whole", *keep))
    whole = (tmp_path / "whole/pass_rates.jsonl").read_bytes()
    file = tmp_path / "cut/pass_rates.jsonl"
    words = tiny_order(tmp_path / "cut", *keep)
    left = killed_at(words, file, 5)
    assert left
    assert whole.startswith(left)
    lines = left.count(b"\n") - 1
    torn = left + whole[len(left) :][:250]  # a block that was half written
    file.write_bytes(torn)
    kept = (torn.count(b"\n") - 1) // 4 * 4
    assert lines <= kept < 16
    printed = said(*words)
    assert f"goes on behind {kept} of 16 questions" in printed
    assert f"train: {16 - kept} questions" in printed  # what this process drew
    assert file.read_bytes() == whole
    names = "train-0-0.9.jsonl", "train.jsonl", "test.jsonl", "dropped.jsonl"
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    file.write_bytes(whole[:-40] + b"x" * 39 + b"\n")
    assert "line 17: b'" in said(*words, refused=True)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_filters_do_not_share_a_file(tiny_order, said, tmp_path):
    file = tmp_path / "out/pass_rates.jsonl"
    file.parent.mkdir()
    command, pipe = [sys.executable, "-c", HOLD, str(file)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"held\n"
        assert "another process writes it" in said(*tiny_order(tmp_path / "out"), refused=True)


@pytest.mark.slow
def test_killed_ten_times(tiny_order, said, tmp_path):
    said(*tiny_order(tmp_path / "whole"))
    whole = (tmp_path / "whole/pass_rates.jsonl").read_bytes()
    file, words = tmp_path / "cut/pass_rates.jsonl", tiny_order(tmp_path / "cut")
    for count in (1, 5, 5, 6, 9, 9, 10, 13, 13, 13):
        assert whole.startswith(killed_at(words, file, count)), count
    said(*words)
    assert file.read_bytes() == whole

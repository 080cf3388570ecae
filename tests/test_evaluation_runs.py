"""Evaluations kept as records: killed anywhere and resumed, shared by processes, and refused.

What a kill leaves is a prefix of the bytes of samples.jsonl (and of times.jsonl), so the runs here
are cut at random bytes; one is killed for real.
"""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from ranks import Program, run_ranks

from vpgea_fast import config
from vpgea_fast.cli import main
from vpgea_fast.cli.processes import LOST, run_processes
from vpgea_fast.evaluation.folder import Folder
from vpgea_fast.evaluation.records import SampleError, read_header, read_samples
from vpgea_fast.rollout.engine import EngineBase
from vpgea_fast.trainer import fit

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
# 12 questions: 24 sampled answers in waves of 7, and 12 greedy ones.
SMALL = {"eval.limit": 12, "eval.samples": 2, "rollout.max_batch": 7, "verify.name": "number"}
ANSWERS = 36


def words_of(world, *words, data=None, model=None, **keys):
    """Words of an evaluation; a key with `__` for its dot."""
    settings = SMALL | {key.replace("__", "."): value for key, value in keys.items()}
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    asked = [model or world.base_dir, data or world.test_path, "--config", TINY]
    return ["eval", *map(str, [*asked, *options, *words])]


def evaluate(world, *words, **more):
    return main(words_of(world, *words, **more))


def records(folder):
    return sorted((folder / "samples.jsonl").read_bytes().splitlines())


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory):
    """The folder of an evaluation that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate(tiny_world, "--out", out) == 0
    return out


@pytest.fixture
def cut(whole, tmp_path):
    """A copy of it as a kill leaves it: the first bytes of its records."""

    def make(size, times=None):
        out = tmp_path / "cut"
        shutil.copytree(whole, out)
        (out / "result.json").unlink()
        for name, count in (("samples.jsonl", size), ("times.jsonl", times)):
            with (out / name).open("r+b") as file:
                file.truncate(count if count is not None else file.seek(0, 2) * size // 60_000)
        return out

    return make


@pytest.fixture
def refused(capsys):
    def read(status):
        printed = capsys.readouterr()
        assert (status, printed.err.count("\n")) == (2, 1), printed.err
        assert printed.err.startswith("vpgea: ")
        return printed.err

    return read


def test_every_answer_is_a_record_and_the_table_is_theirs(tiny_world, whole, capsys):
    samples = list(read_samples(whole))
    assert len({sample.key for sample in samples}) == len(samples) == ANSWERS
    result = json.loads((whole / "result.json").read_text())
    for mode in ("sampled", "greedy"):
        own = [sample for sample in samples if sample.mode == mode]
        part = result[mode]["benchmarks"]["test"]
        assert part["n"] == len(own)
        assert part["acc"] == sum(sample.correct for sample in own) / len(own)
        assert part["tokens"] == sum(sample.tokens for sample in own) / len(own)
    for sample in samples:
        assert sample.text.endswith(sample.answer_text)
        if sample.correct:
            assert sample.prediction == sample.gold
    timed = [json.loads(line) for line in (whole / "times.jsonl").read_text().splitlines()]
    keys = {(t["benchmark"], t["mode"], t["question_id"], t["index"]) for t in timed}
    assert keys == {sample.key for sample in samples}
    assert all(t["seconds"] > 0 for t in timed)
    # Without a folder the same table is printed.
    capsys.readouterr()
    assert evaluate(tiny_world) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  test ")]
    assert [row.split()[3:5] for row in rows] == [
        [str(result[mode]["n"]), f"{100 * result[mode]['acc']:.1f}"]
        for mode in ("sampled", "greedy")
    ]


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_moment_and_resumed(seed, tiny_world, whole, cut, capsys):
    size = (whole / "samples.jsonl").stat().st_size
    out = cut(random.Random(seed).randrange(size))
    before = (out / "samples.jsonl").read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert evaluate(tiny_world, "--out", out, "--resume") == 0
    assert records(out) == records(whole)
    # What was there stays where it was: a reader may have read it.
    assert (out / "samples.jsonl").read_bytes().startswith(kept)
    said = capsys.readouterr().out
    assert ("torn last line" in said) == (kept != before)
    assert "differ from their records" not in said
    assert (
        json.loads((out / "result.json").read_text())["sampled"]
        == (json.loads((whole / "result.json").read_text())["sampled"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.3, 0.8])
def test_killed_for_real_it_is_readable_and_goes_on(share, tiny_world, whole, tmp_path):
    out = tmp_path / "out"
    program = Program("-m", "vpgea_fast.cli", *words_of(tiny_world, "--out", out))
    wait_for_bytes(program, out, share * (whole / "samples.jsonl").stat().st_size)
    program.send_signal(signal.SIGKILL)
    program.communicate()
    assert program.returncode == -9
    drawn = len(list(read_samples(out, lambda _: None)))
    assert 0 < drawn < ANSWERS
    assert evaluate(tiny_world, "--out", out, "--resume") == 0
    assert records(out) == records(whole)


def test_two_processes_write_the_records_of_one(tiny_world, whole, tmp_path):
    out = tmp_path / "out"
    words = words_of(tiny_world, "--model.device", "cpu", "--out", out)
    assert run_ranks(main, words, size=2) == [0, 0]
    assert records(out) == records(whole)
    assert sorted(contents(out)) == ["eval.json", "result.json", "samples.jsonl", "times.jsonl"]
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (out, whole))
    assert (ours["sampled"], ours["greedy"]) == (theirs["sampled"], theirs["greedy"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("when", ["before an answer", "between two", "without --out"])
def test_a_signal_says_what_is_kept_and_how_to_go_on(
    number, when, tiny_world, whole, tmp_path, monkeypatch, capsys
):
    out, looks = tmp_path / "out", []
    stream = EngineBase.stream

    def interrupted(self, *asked):
        for look in stream(self, *asked):
            looks.append(look)
            if when != "between two" or (out / "samples.jsonl").stat().st_size:
                os.kill(os.getpid(), number)
            yield look

    def early(*_):  # while the model is read; as the import of an extension raises it anew
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    if when == "before an answer":
        monkeypatch.setattr("vpgea_fast.evaluate.load_policy", early)
    monkeypatch.setattr(EngineBase, "stream", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    words = [] if when == "without --out" else ["--out", out]
    assert evaluate(tiny_world, *words) == 128 + number
    assert signal.getsignal(signal.SIGTERM) is before
    said = {
        "before an answer": "no answer was drawn yet: the same command begins again",
        "between two": f"the answers so far are kept in {out}: the same command goes on with "
        "--resume",
        "without --out": "without --out no answer is kept; give it, and --resume goes on",
    }
    assert capsys.readouterr().err == f"vpgea: stopped; {said[when]}\n"
    assert bool(looks) == (when != "before an answer")
    if when == "between two":
        monkeypatch.undo()
        assert 0 < len(list(read_samples(out))) < ANSWERS
        assert evaluate(tiny_world, *words, "--resume") == 0
        assert records(out) == records(whole)


def wait_for_bytes(program, folder, count=0):
    """Wait until the answers of a program in a folder take more bytes than `count`."""
    while program.poll() is None:
        with contextlib.suppress(OSError):
            if sum(file.stat().st_size for file in folder.glob("samples*.jsonl")) > count:
                return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_command_that_started_them(number, tiny_world, whole, tmp_path):
    out = tmp_path / "out"
    words = words_of(tiny_world, "--out", out, "--processes", 2)
    program = Program("-m", "vpgea_fast.cli", *words)
    wait_for_bytes(program, out)
    children = children_of(program.pid)
    assert len(children) == 2
    program.send_signal(number)
    program.communicate()
    assert program.returncode == (-number if number == signal.SIGKILL else 128 + number)
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, children))
    assert evaluate(tiny_world, "--out", out, "--resume") == 0
    assert records(out) == records(whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_is_named(rank, tiny_world, whole, tmp_path):
    out = tmp_path / "out"
    program = Program("-m", "vpgea_fast.cli", *words_of(tiny_world, "--out", out, "--processes", 2))
    wait_for_bytes(program, out)
    os.kill(children_of(program.pid)[rank], signal.SIGKILL)
    _, said = program.communicate()
    assert program.returncode == 128 + signal.SIGKILL
    kept = f"the answers so far are kept in {out}: the same command goes on with --resume"
    assert said == f"vpgea: process {rank} was ended by SIGKILL; {kept}\n"
    assert evaluate(tiny_world, "--out", out, "--resume") == 0
    assert records(out) == records(whole)


def test_processes_that_lost_each_other_do_not_end_in_silence(monkeypatch, capfd):
    """Each leaves the telling to the others: a broken network, or a time-out of gloo."""
    silent = [sys.executable, "-S", "-c", f"raise SystemExit({LOST})"]
    monkeypatch.setattr("vpgea_fast.bound.bound_command", lambda _: silent)
    assert run_processes([], 2, lambda: "do this") == LOST
    assert capfd.readouterr().err == "vpgea: the processes lost each other; do this\n"


def children_of(process):
    words = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(word) for word in words]


def alive(process):
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{process}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


@pytest.mark.slow
def test_processes_are_started_by_the_command(tiny_world, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    assert evaluate(tiny_world, "--out", out, "--processes", 2) == 0
    assert records(out) == records(whole)
    assert evaluate(tiny_world, "--out", out, "--resume", "--processes=2", eval__seed=1) == 2


def test_what_other_processes_left_is_joined_once(tiny_world, whole, cut):
    """Killed while it joined: the part of process 1 is there still, a part of it copied."""
    lines = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
    out = cut(sum(map(len, lines[:12])))
    (out / "samples.1.jsonl").write_bytes(b"".join(lines[8:20]) + lines[20][:30])
    (out / "times.1.jsonl").write_bytes(b"")
    assert evaluate(tiny_world, "--out", out, "--resume") == 0
    assert records(out) == records(whole)
    assert (out / "samples.jsonl").read_bytes().startswith(b"".join(lines[:20]))
    assert not (out / "samples.1.jsonl").exists()


@pytest.fixture
def other_model(tiny_world, tmp_path):
    model = shutil.copytree(tiny_world.base_dir, tmp_path / "other")
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x00\x01")
    return model


def test_records_of_another_evaluation_are_refused_and_stay(
    tiny_world, whole, other_model, tmp_path, refused
):
    rows = tiny_world.test_path.read_text().splitlines(keepends=True)
    questions = tmp_path / "test.jsonl"
    questions.write_text("".join([rows[0].replace("0000", "000x"), *rows[1:]]))
    cases = [
        ({"eval__seed": 1}, "another settings.seed: 0 there, 1 now"),
        ({"eval__temperature": 0.5}, "another settings.sampling.temperature: 1.0 there, 0.5 now"),
        ({"rollout__max_batch": 8}, "another settings.engine.wave: 7 there, 8 now"),
        ({"eval__samples": 3}, "another settings.k.sampled: 2 there, 3 now"),
        ({"verify__name": "math"}, "another settings.checker.name"),
        ({"model": other_model}, "another model.fingerprint"),
        ({"data": questions}, "another benchmarks.test.fingerprint"),
    ]
    before = contents(whole)
    for other, said in cases:
        assert said in refused(evaluate(tiny_world, "--out", whole, "--resume", **other))
        assert contents(whole) == before
    assert "holds an evaluation; go on with --resume" in refused(
        evaluate(tiny_world, "--out", whole)
    )
    assert contents(whole) == before


def test_damaged_records_are_refused_and_stay(tiny_world, cut, refused):
    out = cut(20_000, 0)
    file = out / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"{]\n" + lines[1])
    before = file.read_bytes()
    assert "line 2: not JSON" in refused(evaluate(tiny_world, "--out", out, "--resume"))
    assert file.read_bytes() == before
    file.write_bytes(lines[0] + lines[0])
    assert "line 2: a second sample" in refused(evaluate(tiny_world, "--out", out, "--resume"))
    held = (out / "eval.json").read_bytes()
    (out / "eval.json").unlink()
    said = refused(evaluate(tiny_world, "--out", out, "--resume"))
    assert "samples.jsonl is there without eval.json" in said
    assert file.read_bytes() == lines[0] + lines[0]
    (out / "eval.json").write_bytes(held)
    file.unlink()
    file.mkdir()
    assert "samples.jsonl is no file" in refused(evaluate(tiny_world, "--out", out, "--resume"))


@pytest.mark.parametrize(
    ("part", "key", "value", "what"),
    [
        ("samples.jsonl", "question_id", "test-9999", "question, or more answers to it"),
        ("samples.jsonl", "index", 2, "question, or more answers to it"),
        ("samples.1.jsonl", "benchmark", "tost", "question, or more answers to it"),
        ("samples.jsonl", "seed", 1, "seed or gold"),
        ("samples.1.jsonl", "gold", "-1", "seed or gold"),
    ],
)
def test_records_that_the_plan_does_not_have_are_refused_and_stay(
    part, key, value, what, tiny_world, cut, refused
):
    """Under the right eval.json: the file of another evaluation, of process 0 or another."""
    out = cut(20_000, 0)
    first = json.loads((out / "samples.jsonl").read_bytes().splitlines()[0])
    (out / "samples.jsonl").write_bytes(b"")
    (out / part).write_text(json.dumps({**first, key: value}) + "\n{torn")
    before = contents(out)
    said = refused(evaluate(tiny_world, "--out", out, "--resume"))
    assert f"{part}: the record" in said
    assert f"is of another evaluation: another {what}" in said
    assert contents(out) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
@pytest.mark.parametrize("full", ["samples.jsonl", "times.jsonl"])
def test_a_full_disk_is_one_line(full, whole, tmp_path):
    sample = next(iter(read_samples(whole)))
    (tmp_path / full).symlink_to("/dev/full")
    folder = Folder(tmp_path, 0, {})
    with pytest.raises(SampleError, match="No space left on device; make room, and go on with"):
        folder.append([(sample, 1.0)])
    folder.close()


def test_one_process_writes_a_folder(tiny_world, cut, refused):
    out = cut(20_000, 0)
    before = contents(out)
    with (out / "samples.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = refused(evaluate(tiny_world, "--out", out, "--resume"))
    assert "another process writes it" in said
    assert contents(out) == before


def test_what_cannot_be_evaluated_leaves_no_folder(tiny_world, tmp_path, refused):
    out, empty = tmp_path / "out", tmp_path / "empty.jsonl"
    empty.write_text("")
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"question": "1 A+two", "answer": ""}\n')
    bare = shutil.copytree(tiny_world.base_dir, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "empty" in refused(evaluate(tiny_world, "--out", out, data=empty))
    assert "unusable answer" in refused(evaluate(tiny_world, "--out", out, data=blank))
    assert "tokenizer" in refused(evaluate(tiny_world, "--out", out, model=bare))
    assert "is a file; expected a folder" in refused(evaluate(tiny_world, "--out", empty))
    assert "parent is not there" in refused(evaluate(tiny_world, "--out", out / "in" / "it"))
    assert "--resume goes on" in refused(evaluate(tiny_world, "--resume"))
    assert not out.exists()
    if Path("/proc/self").exists():  # where root cannot write either
        assert "nothing can be written there" in refused(evaluate(tiny_world, "--out", "/proc/out"))


def test_answers_that_nobody_can_read_and_questions_without_one(tiny_world, tmp_path):
    """Cut thoughts have no answer, whatever they say; a gold that is none is counted."""
    data = tmp_path / "some.jsonl"
    rows = tiny_world.test_path.read_text().splitlines(keepends=True)[:4]
    data.write_text("".join(rows) + '{"question": "1 A+two", "answer": ""}\n')
    out = tmp_path / "out"
    assert evaluate(tiny_world, "--out", out, data=data, eval__max_new_tokens=3) == 0
    samples = list(read_samples(out))
    assert len(samples) == 12
    assert {(s.prediction, s.correct, s.answer_text, s.finish) for s in samples} == {
        (None, 0, "", "length")
    }
    header = read_header(out)
    assert header["benchmarks"]["some"]["dropped"] == 1
    assert header["settings"]["k"] == {"sampled": 2, "greedy": 1}


def test_answers_that_nobody_judges_in_time_are_told(tiny_world, tmp_path, capsys):
    out = tmp_path / "out"
    keys = {"verify__name": "math", "verify__timeout_s": 0.0001, "eval__greedy": "false"}
    assert evaluate(tiny_world, "--out", out, eval__limit=1, **keys) == 0
    said = " ".join(capsys.readouterr().out.split())
    # Both draws give one answer, which is judged once.
    assert "verdicts that are missing, whose answers count as wrong: 1; judging took more" in said
    assert {sample.correct for sample in read_samples(out)} == {0}


ARROW = re.compile(r"\S+ -> (\S+)")


def test_a_run_keeps_the_answers_of_its_evaluations(tiny_words, tiny_world, tmp_path, capsys):
    """The same numbers as its eval.json and its closing table have, and as `vpgea eval` gives of
    its export."""
    words = tiny_words({"train.steps": 1, "train.questions_per_step": 2, "metrics.compare": "null"})
    test = ["--eval.data", f"[{tiny_world.test_path}]", "--eval.records", "true"]
    keys = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    assert fit(config.load(TINY, words("run", *test, *keys)))
    run, out = tmp_path / "run", tmp_path / "out"
    assert {f.name for f in (run / "evals").iterdir()} == {"step_0", "step_1"}
    known = json.loads((run / "eval.json").read_text())
    for when, step in (("before", 0), ("after", 1)):
        samples = list(read_samples(run / "evals" / f"step_{step}"))
        own = [sample.correct for sample in samples if sample.mode == "sampled"]
        assert known[when]["sampled"]["benchmarks"]["test"]["acc"] == sum(own) / len(own)
    closing = [row for row in capsys.readouterr().out.splitlines() if "this run:" in row]
    assert main(["eval", str(run / "export"), str(tiny_world.test_path), "--out", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    modes = ("sampled", "greedy")
    for mode, theirs in zip(modes, closing, strict=True):
        ours = next(row.split() for row in shown if row.split()[:2] == ["test", mode])
        acc, tokens, ratio, cut = ARROW.findall(theirs)
        assert mode in theirs.split()
        assert [ours[4], *ours[8:10], ours[11]] == [acc, tokens, ratio, cut]
        assert " ".join(ours[5:8]) in theirs
        assert ours[3] == theirs.split()[-1]
    result = json.loads((out / "result.json").read_text())
    assert {mode: result[mode] for mode in modes} == {mode: known["after"][mode] for mode in modes}
    assert records(out) == records(run / "evals/step_1")

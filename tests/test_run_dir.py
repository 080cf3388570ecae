"""The run directory: claimed by one process, never overwritten, its logs cut at a resume."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from vpgea_fast import config
from vpgea_fast.checkpoint import (
    CheckpointError,
    claim_run_dir,
    truncate_jsonl,
    write_text,
)
from vpgea_fast.intake import ALONE
from vpgea_fast.metrics import Alarms
from vpgea_fast.run_dir import RunDir


def test_truncate_keeps_bytes_and_puts_aside_what_it_takes_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1, "x": 0.1}\n', '{"note":  "é", "step": 2}\n']
    odd = ['{"step": null}\n', "[1]\n", '{"x": 1}\n', "[" * 9999 + "\n", '{"step": true}\n']
    later, twice, torn = ['{"step": 3}\n', '{"step": 9}\n'], ['{"step": 1}\n'], ['{"step": 2, "x']
    raw = "".join([kept[0], *odd, kept[1], *later, *twice, *torn])
    path.write_text(raw, "utf-8")
    cut = truncate_jsonl(path, upto=2, once=True)
    assert path.read_text("utf-8") == "".join(kept)
    assert (cut.later, cut.damaged) == (2, [2, 3, 4, 5, 6, 10, 11])
    assert dict(cut.lines) == {1: 1, 2: 1}
    aside = tmp_path / "metrics.dropped.jsonl"
    assert aside.read_text("utf-8") == "".join([*odd, *later, *twice, *torn, "\n"])
    first, second = cut.words(path, 2)
    assert first.startswith(f"{path}: lines taken out: 2 of steps after 2")
    assert "7 damaged (the first was line 2)" in second
    assert f"kept in {aside}" in second
    for name in ("metrics.jsonl", "missing.jsonl"):
        cut = truncate_jsonl(tmp_path / name, upto=2)
        assert cut.words(path, 2) == []
    assert sorted(tmp_path.iterdir()) == [aside, path]


def test_a_step_has_many_paths(tmp_path):
    path = tmp_path / "paths.jsonl"
    path.write_text('{"step": 1}\n' * 3)
    assert truncate_jsonl(path, upto=1).lines == {1: 3}


@pytest.mark.parametrize("lost", [1, 2])
def test_a_step_without_metrics_is_not_also_one_without_paths(lost, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {3 - lost}, "paths_written": 1}}\n')
    (tmp_path / "paths.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    run = RunDir(config.resolve({"run": {"dir": str(tmp_path)}}), ALONE)
    run._cut_logs(2, Alarms())
    assert run.notices == [f"{tmp_path / 'metrics.jsonl'}: no line of steps {lost}"]


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "eval.json"
    for text in ("first", "é" * 9):
        write_text(path, text)
        assert path.read_text("utf-8") == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["eval.json"]


def test_rewriting_on_a_full_disk_leaves_the_file(tmp_path):
    path = tmp_path / "paths.jsonl"
    path.write_text('{"step": 1}\n' * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot rewrite"):
            truncate_jsonl(path, upto=1)
        with pytest.raises(CheckpointError, match="cannot write"):
            write_text(path, "x" * 6_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 12_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["paths.jsonl"]


def test_an_existing_run_is_never_overwritten(tmp_path):
    run_dir = tmp_path / "a" / "run"
    with claim_run_dir(run_dir):
        pass
    with claim_run_dir(run_dir):  # claimed but never begun
        (run_dir / "config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match=r"never overwritten.*--resume .*run.*--run\.dir"):
        claim_run_dir(run_dir)
    with claim_run_dir(run_dir, resume=True):
        assert (run_dir / "config.yaml").exists()


def test_a_folder_in_the_place_of_a_log_is_refused_before_anything_changes(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "paths.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"paths\.jsonl is a directory, expected a file"):
        claim_run_dir(tmp_path, resume=True)
    assert not (tmp_path / ".lock").exists()


def test_a_start_that_failed_leaves_nothing_and_one_that_wrote_stays(tmp_path):
    for name in ("failed", "wrote"):
        claim = claim_run_dir(tmp_path / name)
        if name == "wrote":
            (tmp_path / name / "config.yaml").touch()
        claim.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["wrote"]


def test_a_start_that_failed_takes_back_what_it_made_and_no_more(tmp_path):
    claim_run_dir(tmp_path / "a/b/run").abandon()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    for there in ("elsewhere", "link", "elsewhere/../link"):
        claim_run_dir(tmp_path / there).abandon()
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "link"]


def test_directories_that_cannot_be_runs(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        claim_run_dir(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot write .*writable --run\.dir"):
        claim_run_dir(tmp_path / "file" / "run")
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"is no run .*without --resume"):
            claim_run_dir(missing, resume=True)


def test_two_processes_never_write_one_run(tmp_path):
    hold = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1], 'a+')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-S", "-c", hold, str(tmp_path / ".lock")]
    (tmp_path / "config.yaml").touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=r"cannot lock .*process unknown"):
            claim_run_dir(tmp_path, resume=True)
        other.send_signal(signal.SIGKILL)
    with claim_run_dir(tmp_path, resume=True):  # a killed owner needs no cleaning
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "BlockingIOError" in refused.stderr
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"

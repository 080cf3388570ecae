"""The scripts of examples/ run as a user would run them, and print what they promise."""

import contextlib
import io
import json
import math
import os
import re
import runpy
from pathlib import Path

import pytest
from ranks import Program, run_ranks

pytestmark = pytest.mark.around
FOLDER = Path(__file__).parents[1] / "examples"


def run(name, *words, cwd, strict=True):
    program = Program(FOLDER / name, *words, cwd=cwd, strict=strict)
    printed, errors = program.communicate()
    assert program.returncode == 0, errors
    return printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the folder of the run on one's own data, what its script printed)."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "yours", run("train_on_your_data.py", "yours", cwd=folder)


def records(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text("utf-8").splitlines()]


def test_train_on_your_data(trained):
    folder, printed = trained
    heard = re.findall(r"^step (\d): loss (\S+)$", printed, re.M)
    metrics = records(folder / "run", "metrics.jsonl")
    assert heard == [(str(step["step"]), f"{step['loss']:.3f}") for step in metrics]
    assert len(heard) == 3
    assert printed.endswith("DONE: yours/run\n")
    written = (folder / "mine.jsonl").read_text("utf-8").splitlines()
    drawn = {path["question_id"] for path in records(folder / "run", "paths.jsonl")}
    assert 2 <= len(drawn) <= len(written) == 3
    assert (folder / "run/export/model.safetensors").is_file()


def test_read_a_runs_records(trained):
    folder, _ = trained
    printed = run("read_a_runs_records.py", folder / "run", cwd=folder).splitlines()
    paths = records(folder / "run", "paths.jsonl")
    for stream in ("posterior", "prior"):
        lengths = [path["length"] for path in paths if path["stream"] == stream]
        mean = sum(lengths) / len(lengths)
        assert f"{stream}: {len(lengths)} paths, {mean:.1f} tokens on average" in printed
    known = json.loads((folder / "run/eval.json").read_text("utf-8"))
    after = known["after"]["sampled"]
    assert (
        printed[-1] == f"after: {100 * after['acc']:.1f} % right with {after['tokens']:.1f} tokens"
    )
    assert [line[:6] for line in printed[:3]] == ["step 1", "step 2", "step 3"]


def test_one_loss_in_a_plain_loop(tmp_path):
    """Chance earns 1/16; after 200 steps nearly every token is right."""
    printed = run("one_loss_in_a_plain_loop.py", cwd=tmp_path)
    rewards = dict(re.findall(r"^step (\d+): reward (\S+), loss \S+$", printed, re.M))
    assert list(rewards) == ["1", "100", "200"]
    assert float(rewards["1"]) < 0.2
    assert float(rewards["200"]) > 0.9


@pytest.mark.hosts
def test_trl_vpgea(tmp_path):
    printed = run("trl_vpgea.py", "here", cwd=tmp_path)
    losses = re.findall(r"'loss': '([^']+)'.*?'epoch': '([^']+)'", printed)
    assert [float(epoch) for _, epoch in losses] == [0.5, 1.0, 1.5]
    assert all(-10 < float(loss) < 10 for loss, _ in losses)
    assert re.search(r"^[01]\.\d\d right, \d+\.\d tokens$", printed, re.M)
    assert (tmp_path / "here/out/checkpoint-3/model.safetensors").is_file()


# --- other trainers -------------------------------------------------------------------------------

CHANCE = math.log(64)  # of the vocabulary of these scripts; a token follows from the one before it


def last_loss(printed):
    return float(re.findall(r"loss (\d+\.\d+)", printed)[-1])


def on_two_ranks(cwd):
    os.chdir(cwd)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(FOLDER / "accelerate_ddp.py"), run_name="__main__")
    return printed.getvalue()


@pytest.mark.hosts
@pytest.mark.parametrize(
    "name",
    [
        "hf_trainer.py",
        "trl_sft.py",
        "accelerate_ddp.py",
        pytest.param("lightning_module.py", marks=pytest.mark.hosts("lightning")),
        pytest.param("peft_lora.py", marks=pytest.mark.hosts("peft")),
    ],
)
def test_another_trainer_learns_with_our_loss(name, tmp_path):
    # Lightning warns of what it would do otherwise: workers, intervals.
    printed = run(name, cwd=tmp_path, strict=name != "lightning_module.py")
    assert last_loss(printed) < CHANCE / 4
    if name == "peft_lora.py":
        assert "adapters that moved: 7, the head's: 1" in printed


@pytest.mark.hosts
def test_accelerate_on_two_ranks(tmp_path):
    """Only the first one speaks."""
    first, second = run_ranks(on_two_ranks, str(tmp_path))
    assert last_loss(first) < CHANCE / 4
    assert second == ""


def test_every_example_is_short_and_named_on_a_page():
    scripts = sorted(FOLDER.glob("*.py"))
    pages = [FOLDER.parent / name for name in ("README.md", "docs/hosts.md")]
    text = "".join(page.read_text("utf-8") for page in pages)
    assert len(scripts) == 9
    for script in scripts:
        assert 20 <= len(script.read_text("utf-8").splitlines()) <= 50, script.name
        assert f"examples/{script.name}" in text

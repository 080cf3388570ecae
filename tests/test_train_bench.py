"""benchmarks/train_bench.py in process, on a few short rows: what it refuses, counts and writes."""

import csv
import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch

from vpgea_fast.metrics import model_flops
from vpgea_fast.packing import drop_zero_rows
from vpgea_fast.types import TrainRow

pytestmark = pytest.mark.around

ROOT = Path(__file__).parents[1]
FAST = ("--rows", "16", "--check-rows", "8", "--mean-length", "12", "--budget", "96")
ONCE = ("--repeats", "1", "--warmup", "0", "--layers", "1")
VARIANTS = ("gated", "ungated", "padded", "padded sorted")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("train_bench")


@pytest.fixture
def variants(bench):
    return importlib.import_module(bench.make_rows.__module__)


@pytest.fixture
def run(bench, tmp_path):
    """main(words) -> (exit status, the JSON or None)."""

    def call(*words):
        path = tmp_path / "result.json"
        status = bench.main([*FAST, *ONCE, "--out", str(path), *words])
        return status, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    return call


def matrices(hidden, kv, mlp):
    """Of one Qwen2 layer: query and output, key and value, the MLP."""
    return 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp


def test_it_checks_then_times_and_writes_all_files(run, bench, tmp_path, capsys):
    status, result = run("--profile", str(tmp_path / "trace.json"))
    text = capsys.readouterr().out
    assert status == 0
    assert text.index("gaps to the gated loop") < text.index("one update of 8 paths")
    assert result["environment"]["device"] == "cpu"
    assert result["environment"]["torch"] == torch.__version__
    records = {record["variant"]: record for record in result["records"]}
    assert [*records] == [*VARIANTS, "TRL"]
    assert records["TRL"]["status"] in ("ok", "skipped")
    assert records["TRL"]["status"] == "ok" or records["TRL"]["reason"] == "trl is not installed"

    rows = bench.rows_for(bench.arguments(FAST), 16)
    kept = drop_zero_rows(rows)
    zero = sum(row.tokens - 1 for row in rows if not row.coef.any())
    assert records["ungated"]["tokens"] - records["gated"]["tokens"] == zero > 0
    decoder, head, width = matrices(128, 64, 384), 2003 * 128, 128
    for name in VARIANTS:
        record, given = records[name], rows if name == "ungated" else kept
        assert record["status"] == "ok"
        assert record["error_logp"] <= 5e-6
        assert record["error_gradient"] <= 1e-6
        assert record["tokens"] == sum(row.tokens - 1 for row in given)
        assert (record["tokens_run"] > record["tokens"]) == name.startswith("padded")
        assert record["micro_batches"] >= record["tokens_run"] / 96
        assert record["paths_per_s"] * record["p50_s"] == pytest.approx(8)
        useful = record["useful_tokens_per_s"] * record["p50_s"]
        assert useful == pytest.approx(records["gated"]["tokens"])
        # the head has no work on rows without a coefficient
        lengths = [row.tokens - 1 for row in given]
        done = 6 * (decoder * sum(lengths) + width * sum(n * n for n in lengths))
        done += 6 * head * sum(row.token_ids.numel() for row in kept)
        assert record["tflops"] * 1e12 * record["p50_s"] == pytest.approx(done, rel=1e-9)
        assert record["mfu"] is None
        phases = [record[f"{phase}_s"] for phase in bench.PHASES]
        assert all(seconds > 0 for seconds in phases)
        assert 0.3 * record["p50_s"] < sum(phases) <= record["p50_s"]
        assert record["head_share"] == pytest.approx(record["head_loss_s"] / sum(phases))
        assert record["times_gated"] == record["p50_s"] / records["gated"]["p50_s"]
        states = 4 * 3 * (decoder + 2 * head)
        assert 1 < record["peak_mib"] * 2**20 / states < 8
    assert result["packing"]["rows"] == 4096
    assert result["estimate"]["measured_mib"] == records["gated"]["peak_mib"]

    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert any(event["name"] == "aten::mm" for event in trace["traceEvents"])
    assert len(result["profile"]["operations"]) == 3
    assert 0 < sum(operation["share"] for operation in result["profile"]["operations"]) <= 1
    with (tmp_path / "result.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 5
    assert matplotlib.image.imread(tmp_path / "result.png")[..., :3].std() > 0.01


def test_what_the_reuse_of_the_scoring_forward_could_save(run, bench):
    words = ("--variants", "gated", "--checkpointing", "full", "--gate-rate", "1")
    status, result = run(*words)
    assert status == 0
    rows = bench.rows_for(bench.arguments([*FAST, "--gate-rate", "1"]), 16)
    decoder, head, width = matrices(128, 64, 384), 2003 * 128, 128
    forward = [2 * (decoder * n + width * n * n) for n in (row.tokens - 1 for row in rows)]
    student = [f for f, row in zip(forward, rows, strict=True) if row.distilled]
    step = 4 * sum(forward) + 6 * head * sum(row.token_ids.numel() for row in rows)
    found = result["reuse_bound"]
    assert found["share_model"] == pytest.approx(sum(student) / step)
    scored = sum(row.tokens - 1 for row in rows if row.distilled)
    assert found["kept_gib"] * 2**30 == pytest.approx(128 * 4 * scored)
    assert 0 < found["share_measured"] < 1


@pytest.mark.parametrize("broken", ["padded", "ungated"])
def test_nothing_is_timed_when_a_variant_is_wrong(
    run, bench, variants, monkeypatch, broken, capsys
):
    if broken == "padded":
        right = variants.pad_rows

        def late(*args, **options):
            batch = right(*args, **options)
            return replace(batch, logit_index=batch.logit_index.roll(1))

        monkeypatch.setattr(variants, "pad_rows", late)
    else:
        right = bench.rows_of
        monkeypatch.setattr(
            bench, "rows_of", lambda name, rows: right(name, rows)[name == "ungated" :]
        )
    status, result = run("--variants", "gated", broken)
    assert status == 1
    assert result is None
    text = capsys.readouterr().out
    assert f"nothing is timed: {broken} must be right first" in text
    assert "error_gradient" in text.replace("\n", "")


def test_rows_are_those_of_the_method(variants):
    rows = variants.make_rows(
        64, mean=100, sigma=0.5, budget=4096, gate_rate=0.25, vocabulary=50, seed=3
    )
    teacher, student = rows[:64], rows[64:]
    assert all(not row.distilled and row.view == "teacher" and row.coef.all() for row in teacher)
    assert all(row.distilled and row.stream == "posterior" for row in student)
    kept = [row for row in student if row.coef.any()]
    assert len(kept) == 16
    assert len(drop_zero_rows(rows)) == 80
    for own, other in zip(teacher, student, strict=True):
        assert torch.equal(own.token_ids, other.token_ids)
        # a path above the mean is made likelier, and then the student follows it
        assert bool(own.coef[0] < 0) == bool(other.coef.any())
        assert own.coef.unique().numel() == 1
        assert own.tokens - 1 <= 4096
    mean = sum(row.token_ids.numel() for row in teacher) / 64
    assert mean == pytest.approx(100, rel=0.2)
    short = variants.make_rows(8, mean=90, sigma=1, budget=100, gate_rate=1, vocabulary=50)
    assert max(row.tokens - 1 for row in short) <= 100


def test_two_padded_rows_by_hand(variants):
    ids = torch.tensor
    rows = [
        TrainRow(
            context_ids=ids([1, 5]),
            token_ids=ids([4, 9]),
            coef=ids([0.5, 0.5]),
            stream="prior",
            view="student",
        ),
        TrainRow(
            context_ids=ids([7]),
            token_ids=ids([8]),
            coef=ids([-2.0]),
            stream="prior",
            view="student",
        ),
    ]
    batch = variants.pad_rows(rows, 4, masked=True)
    assert batch.input_ids.tolist() == [[1, 5, 4, 0], [7, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.logit_index.tolist() == [1, 2, 4]
    assert (batch.targets.tolist(), batch.coef.tolist()) == ([4, 9, 8], [0.5, 0.5, -2.0])
    assert variants.pad_rows(rows, 3, masked=False).mask is None
    dummy = variants.pad_rows([], 4, masked=True)
    assert (dummy.input_ids.tolist(), dummy.coef.tolist()) == ([[0]], [0.0])


@pytest.mark.parametrize("layout", ["padded", "padded sorted"])
def test_padded_batches_hold_every_row_within_the_budget(variants, layout):
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(61)]
    plan = variants.padded_plan(lengths, 256, layout)
    assert sorted(i for batch in plan for i in batch) == list(range(61))
    width = [max(lengths) if layout == "padded" else max(lengths[i] for i in b) for b in plan]
    assert all(len(batch) * w <= 256 for batch, w in zip(plan, width, strict=True))
    run = sum(len(batch) * w for batch, w in zip(plan, width, strict=True))
    assert run >= sum(lengths)
    if layout == "padded sorted":
        assert run <= 1.1 * sum(lengths)


def test_idle_gaps_are_those_of_all_streams_together(bench):
    def kernel(name, start, length):
        return {"name": name, "ts": start, "dur": length}

    busy = [
        kernel("a", 0, 100),
        kernel("copy", 50, 250),  # another stream covers the gap behind a
        kernel("b", 120, 10),
        kernel("c", 1300, 200),
        kernel("d", 1501, 10),
    ]
    assert bench.gaps_of(busy) == [
        {"ms": 1.0, "after": "copy", "before": "c"},
        {"ms": 0.001, "after": "c", "before": "d"},
    ]
    assert bench.gaps_of([]) == []


def test_packing_is_timed_with_its_balance(bench):
    flops = model_flops(bench.make_config(bench.arguments(FAST), layers=1))
    found = bench.time_packing(flops, rows=64, ranks=2, budget=8192, repeats=1)
    assert 0 < found["plan_seconds"] < 10
    assert 0 < found["pack_seconds"] < 10
    assert 1 <= found["flops_imbalance"] <= found["flops_waiting"] <= 1.2
    assert found["rank_tokens"] > 64 * 1024 / 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gate-rate", "0"], "expected a share in (0, 1]"),
        (["--layers", "4"], "expected 1 to the model's 3"),
        (["--budget", "8"], "expected the mean length or more"),
        (["--rows", "7"], "expected even numbers"),
        (["--variants", "padded"], "expected gated among them"),
        (["--model", "qwen2.5-7b"], "does not fit this machine's memory; take fewer --layers"),
        (["--optimizer", "sgd"], "optim"),
    ],
)
def test_bad_words_say_what_to_do(bench, capsys, words, said, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: 2**34)
    with pytest.raises(SystemExit):
        bench.main(words)
    assert said in capsys.readouterr().err


def test_bfloat16_is_within_its_budget(run):
    status, result = run("--dtype", "bfloat16", "--variants", *VARIANTS)
    assert status == 0
    assert all(0 <= record["error_gradient"] <= 2e-2 for record in result["records"])
    assert result["records"][1]["error_gradient"] > 0


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
@pytest.mark.filterwarnings("default")
def test_the_gradient_of_trl_is_ours(run):
    status, result = run("--variants", "gated", "TRL")
    record = result["records"][1]
    assert status == 0
    assert record["status"] == "ok", record["reason"]
    assert record["error_gradient"] <= 1e-5
    assert record["tokens_run"] > record["tokens"]
    assert record["p50_s"] > 0


@pytest.mark.slow
def test_two_processes_share_the_rows(tmp_path):
    out = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(ROOT / "benchmarks/train_bench.py"), *FAST, *ONCE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["processes"] == 2
    for record in result["records"][:4]:
        assert record["status"] == "ok"
        assert record["tokens_run"] >= record["tokens"]
        assert (record["tokens_run"] == record["tokens"]) == ("padded" not in record["variant"])
    assert result["records"][4]["status"] == "skipped"


@pytest.mark.gpu
def test_a_gpu_gives_mfu_and_a_trace_of_its_kernels(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("train_bench")
    out, trace = tmp_path / "gpu.json", tmp_path / "trace.json"
    words = [*ONCE, "--variants", *VARIANTS, "--out", str(out), "--profile", str(trace)]
    assert bench.main(words) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    known = bench.mfu(1.0, 1.0, torch.cuda.get_device_name()) is not None
    assert all((record["mfu"] is not None) == known for record in result["records"])
    assert result["profile"]["gaps"]

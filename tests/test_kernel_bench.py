"""benchmarks/kernel_bench.py in process, on tiny shapes: what it refuses, writes and says."""

import csv
import functools
import importlib
import importlib.util
import json
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch

pytestmark = pytest.mark.around

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = "64,16,101"
FAST = ("--repeats", "2", "--warmup", "0", "--providers", "torch", "reference", "eager torch")
FORWARD = 2 * 64 * 16 * 101


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernel_bench")


@pytest.fixture
def run(bench, tmp_path):
    """main(words) -> (exit status, the JSON)."""

    def call(*words, out="result.json"):
        path = tmp_path / out
        status = bench.main(["--shape", SHAPE, "--no-static", "--out", str(path), *words])
        return status, json.loads(path.read_text(encoding="utf-8"))

    return call


def of(result, **wanted):
    return [r for r in result["records"] if all(r[k] == v for k, v in wanted.items())]


def test_every_op_checks_before_it_times_and_writes_all_files(run, tmp_path, capsys):
    status, result = run(*FAST, "--sweep", "32")
    text = capsys.readouterr().out
    assert status == 0
    assert result["environment"]["device"] == "cpu"
    assert result["environment"]["torch"] == torch.__version__
    for op in ("linear_logprob", "weighted", "two_stream", "group_advantage", "gated_kl"):
        records = of(result, op=op)
        checked = [i for i, r in enumerate(records) if r["mode"] == "correctness"]
        timed = [i for i, r in enumerate(records) if r["p50_ms"]]
        assert checked[0] < timed[0]
        assert text.index(f"{op}: errors" if op != "two_stream" else f"{op}, gate") < text.index(
            f"{op}: N, D, V"
        )
        assert all(r["error_max"] <= 1e-4 for r in of(result, op=op, mode="correctness"))
    for mode in ("forward", "backward", "full", "scoring"):
        (row,) = of(result, op="linear_logprob", provider="torch", mode=mode, rows=64)
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        gemms = {"forward": 1, "backward": 2, "full": 3, "scoring": 1}[mode]
        flop = row["tflops"] * 1e12 * row["p50_ms"] / 1e3
        assert flop == pytest.approx(gemms * FORWARD, rel=1e-6)
        assert row["percent_of_mm"] > 0
    (one_pass,) = of(result, op="weighted", provider="torch", mode="backward", rows=64)
    assert one_pass["tflops"] is None, "a scaling has no rate"
    assert {r["gate"] for r in of(result, op="two_stream", mode="full")} == {1.0, 0.5, 0.25}
    with (tmp_path / "result.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(result["records"])
    image = matplotlib.image.imread(tmp_path / "result.png")
    assert image[..., :3].std() > 0.01


def test_ratios_to_eager_and_launches(run, capsys):
    """In eager torch the group scores are exactly 34 operations, the sums of the paths 10."""
    _, result = run(*FAST, "--op", "weighted", "group_advantage", "gated_kl", "--modes", "full")
    rows = {r["provider"]: r for r in of(result, op="weighted", mode="full", rows=64)}
    assert rows["eager torch"]["time_of_eager"] == rows["eager torch"]["peak_of_eager"] == 1
    for ours, share in (("p50_ms", "time_of_eager"), ("peak_mib", "peak_of_eager")):
        expected = rows["torch"][ours] / rows["eager torch"][ours]
        assert rows["torch"][share] == pytest.approx(expected)
    _, result = run(*FAST, "--op", "group_advantage", "gated_kl", "--modes", "forward")
    counts = {r["op"]: r["launches"] for r in of(result, provider="eager torch", rows=64)}
    counts = {op: n for op, n in counts.items() if n}
    assert counts == {"group_advantage": 34, "gated_kl": 10}
    assert "launches" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_without_a_gpu_the_static_report_follows(bench, tmp_path, capsys):
    words = (*FAST, "--op", "weighted", "--modes", "full", "--out", str(tmp_path / "x.json"))
    assert bench.main(["--shape", SHAPE, *words]) == 0
    text = capsys.readouterr().out
    assert text.index("weighted: N, D, V") < text.index("gemm_exp: train")


def test_gated_rows_are_not_counted_as_work(run):
    _, result = run(*FAST, "--op", "two_stream", "--sweep", "64")
    for row in of(result, provider="torch", mode="full", rows=64):
        flop = row["tflops"] * 1e12 * row["p50_ms"] / 1e3
        assert flop == pytest.approx(3 * FORWARD * (1 + row["gate"]), rel=1e-6)


def test_memory_of_the_full_logits_is_seen(bench):
    args = bench.arguments(["--shape", "256,16,4096"])
    case = bench.head_case("weighted", args.shape, None, args)
    logits, gradients = 4 * 256 * 4096, sum(x.nbytes for x in case.leaves)
    eager = next(p for p in bench.PROVIDERS if p.name == "eager torch" and "weighted" in p.ops)
    chunked = next(p for p in bench.PROVIDERS if p.name == "torch")
    peaks = [
        bench.peak_bytes(bench.Job(p.call, c, "full"), args.device)
        for p, c in ((eager, case), (chunked, replace(case, chunk_bytes=logits // 8)))
    ]
    assert 2 * logits + gradients <= peaks[0] <= 4 * logits + gradients
    assert peaks[1] <= logits // 8 + gradients + 256 * 16 * 64


@pytest.mark.parametrize("ours", [False, True])
def test_a_wrong_provider_is_refused_and_not_timed(run, bench, monkeypatch, ours, capsys):
    def call(case):
        logp = torch.log_softmax(case.hidden @ case.weight.T, 1).gather(1, case.targets[:, None])
        return case.coef @ logp[:, 0], 1.01 * logp[:, 0]

    wrong = bench.Provider("wrong", call, ours=ours)
    monkeypatch.setattr(bench, "PROVIDERS", [*bench.PROVIDERS, wrong])
    status, result = run("--op", "weighted", "--providers", "torch", "eager torch", "wrong")
    (row,) = of(result, provider="wrong")
    assert (row["status"], row["mode"]) == ("refused", "correctness")
    assert "error_max" in row["reason"]
    assert row["error_dx"] < 1e-5
    assert "refused" in capsys.readouterr().out
    assert status == int(ours), "only our own providers fail the run"


def test_wrong_and_missing_gradients_are_refused(run, bench, monkeypatch):
    chunked = next(p.call for p in bench.PROVIDERS if p.name == "torch")

    def scaled(case):
        loss, value = chunked(case)
        return 1.001 * loss, value

    def empty(case):
        loss, value = chunked(case)
        return loss * float("nan"), value

    extra = [bench.Provider("scaled", scaled), bench.Provider("nan", empty)]
    monkeypatch.setattr(bench, "PROVIDERS", [*bench.PROVIDERS, *extra])
    words = ("--op", "weighted", "--sweep", "64", "--providers", "eager torch", "scaled", "nan")
    _, result = run(*words)
    assert "error_dx" in of(result, provider="scaled")[0]["reason"]
    assert of(result, provider="nan")[0]["status"] == "refused"


def test_what_cannot_run_says_why(run, bench, monkeypatch):
    def out_of_memory(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(_):
        raise RuntimeError("no kernel image")

    extra = [
        bench.Provider("absent", broken, needs="no_such_module_here"),
        bench.Provider("device", broken, cuda=True),
        bench.Provider("greedy", out_of_memory),
        bench.Provider("broken", broken),
        bench.Provider("dense", broken, dense=True),
        bench.Provider("scalar", broken, mean_only=True),
    ]
    monkeypatch.setattr(bench, "PROVIDERS", extra)
    status, result = run("--op", "linear_logprob", "--memory-gib", "0.00001")
    assert status == 0
    found = {r["provider"]: (r["status"], r["reason"]) for r in result["records"]}
    assert found["absent"] == ("skipped", "no_such_module_here is not installed")
    assert found["device"] == ("skipped", "needs CUDA")
    assert found["greedy"] == ("OOM", "out of memory")
    assert found["broken"] == ("failed", "RuntimeError: no kernel image")
    assert found["dense"][0] == "skipped"
    assert "--memory-gib" in found["dense"][1]
    assert "no per-token coefficients" in found["scalar"][1]


def test_every_peer_of_this_machine_runs_or_says_why(run):
    words = ("--op", "weighted", "--modes", "full", "--sweep", "64", "--repeats", "1", "--warmup")
    peers = ("torch LCE", "torch LCE mean", "Liger FLCE", "Liger FLSCE", "Liger GRPO", "CCE exact")
    status, result = run(*words, "0", "--providers", "eager torch", *peers, "QuACK", "TRL chunked")
    assert status == 0
    for name in (*peers, "QuACK", "TRL chunked"):
        rows = of(result, provider=name)
        assert {r["status"] for r in rows} <= {"ok", "skipped"}, rows
        assert all(r["reason"] for r in rows if r["status"] == "skipped")


def test_compare_gives_the_ratio_to_an_earlier_result(run, tmp_path, capsys):
    words = ("--op", "weighted", "--modes", "full", "--sweep", "64", *FAST)
    _, before = run(*words)
    slower = tmp_path / "slower.json"
    for row in before["records"]:
        row["p50_ms"] = row["p50_ms"] and 1000.0
    slower.write_text(json.dumps(before), encoding="utf-8")
    _, after = run(*words, "--compare", str(slower), out="after.json")
    timed = [r for r in after["records"] if r["p50_ms"]]
    assert len(timed) == 3
    assert all(r["ratio"] == pytest.approx(r["p50_ms"] / 1000) for r in timed)
    text = capsys.readouterr().out
    assert f"x before: 3 rows of {slower}" in text.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "100,8"], "expected N,D,V or one of qwen2.5-7b"),
        (["--shape", "100,8,50"], "multiples of 8"),
        (["--providers", "nobody"], "expected some of 'triton', 'cublas'"),
    ],
)
def test_bad_words_say_what_to_do(bench, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    assert said in f"{stop.value}{capsys.readouterr().err}"


def test_a_cpu_takes_a_model_shape_at_an_eighth(bench):
    args = bench.arguments(["--shape", "qwen2.5-7b"])
    assert args.shape == (2048, 448, 19008)
    assert "/ 8" in args.note


@pytest.mark.serial
def test_torch_mm_is_repeated_until_it_lasts_as_long_as_the_median_contender(bench):
    """A burst runs at boost clock; what takes six times as long does not."""

    class Sleeper(bench.Job):
        def __init__(self, seconds):
            self.loss, self.seconds = None, seconds

        def prepare(self):
            pass

        def __call__(self):
            time.sleep(self.seconds)

    args = bench.arguments(["--shape", SHAPE, "--warmup", "0"])
    jobs = {"torch.mm": Sleeper(0.03), "quick": Sleeper(0.0), "slow": Sleeper(0.18)}
    assert 2 <= bench.mm_times(jobs | {"slower": Sleeper(0.3)}, args) <= 6  # 6 on a quiet machine
    assert bench.mm_times({"torch.mm": jobs["slow"], "quick": jobs["quick"]}, args) == 1
    assert bench.mm_times({"torch.mm": jobs["slow"]}, args) == 1
    case = bench.head_case("weighted", args.shape, None, args)
    counts = [
        bench.launches(
            bench.Job(functools.partial(bench.mm, times=n), case, "scoring"), args.device
        )
        for n in (1, 4)
    ]
    assert counts[1] == 4 * counts[0]


SMI = """#!{python} -S
import pathlib, sys, time
print("1980, 690.50\\n1755, [N/A]\\n1800, 650.25", flush=True)
pathlib.Path("{words}").write_text(" ".join(sys.argv[1:]))
time.sleep(60)
"""


def test_clock_and_power_are_watched_while_the_block_runs(bench, monkeypatch, tmp_path):
    cuda, words = torch.device("cuda", 0), tmp_path / "words"
    nothing = dict.fromkeys(("sm_mhz", "sm_mhz_low", "watts"))
    with bench.watched(torch.device("cpu")) as seen:
        pass
    assert seen == nothing
    monkeypatch.setenv("PATH", str(tmp_path))
    with bench.watched(cuda) as seen:  # no nvidia-smi
        pass
    assert seen == nothing
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(python=sys.executable, words=words))
    program.chmod(0o755)
    properties = types.SimpleNamespace(uuid="ab-cd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    with bench.watched(cuda) as seen:
        end = time.monotonic() + 20
        while not words.exists() and time.monotonic() < end:
            time.sleep(0.05)
        start = time.monotonic()
    assert time.monotonic() - start < 20, "the block's end stops it"
    assert seen == {"sm_mhz": 1800, "sm_mhz_low": 1755, "watts": (690.5 + 650.25) / 2}
    asked = words.read_text()
    assert "--query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits" in asked
    assert "--id=GPU-ab-cd" in asked


def test_who_is_stopped_keeps_the_tables_that_were_done(bench, monkeypatch, tmp_path):
    chunked = next(p.call for p in bench.PROVIDERS if p.name == "torch")

    def stopped(case):
        if case.op == "weighted":
            raise KeyboardInterrupt
        return chunked(case)

    monkeypatch.setattr(bench, "PROVIDERS", [bench.Provider("stopped", stopped)])
    out = tmp_path / "result.json"
    words = ["--shape", SHAPE, "--op", "linear_logprob", "weighted", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        bench.main([*words, "--no-static", "--repeats", "1", "--warmup", "0"])
    records = json.loads(out.read_text(encoding="utf-8"))["records"]
    assert {r["op"] for r in records} == {"linear_logprob"}
    assert {r["mode"] for r in records if r["p50_ms"]} == set(bench.HEAD_MODES)

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
NAMES = ("torch", "reference", "eager torch")
FAST = ("--repeats", "2", "--warmup", "0", "--providers", *NAMES)
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
        status = bench.main(["--shape", SHAPE, "--out", str(path), *words])
        return status, json.loads(path.read_text(encoding="utf-8"))

    return call


def of(result, **wanted):
    return [r for r in result["records"] if all(r[k] == v for k, v in wanted.items())]


def test_every_op_checks_before_it_times_and_writes_all_files(run, bench, tmp_path, capsys):
    every = ("--op", *bench.MODES, "--modes", *bench.HEAD_MODES)
    status, result = run(*FAST, *every, "--sweep", "32", "--profile", str(tmp_path / "trace.json"))
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
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    ranges = {e["name"] for e in trace if e.get("cat") == "user_annotation"}
    gates = [f"two_stream, gate {gate}" for gate in (1, 0.5, 0.25)]
    heads = [f"{op}: {p}" for op in ("linear_logprob", "weighted", *gates) for p in NAMES]
    assert {*heads, "group_advantage: eager torch", "gated_kl: eager torch"} <= ranges
    (one,) = [e for e in trace if e["name"] == "weighted: eager torch" and e.get("ph") == "X"]
    inside = [e for e in trace if e.get("ph") == "X" and 0 <= e["ts"] - one["ts"] < one["dur"]]
    assert [e["name"] for e in inside].count("aten::mm") == 3, "logits, dX and dW"


def test_ratios_to_eager_and_launches(run, capsys):
    """In eager torch the group scores are exactly 34 operations, the sums of the paths 10."""
    _, result = run(*FAST, "--op", "weighted", "group_advantage", "gated_kl")
    rows = {r["provider"]: r for r in of(result, op="weighted", mode="full", rows=64)}
    assert rows["eager torch"]["time_of_eager"] == rows["eager torch"]["peak_of_eager"] == 1
    for ours, share in (("p50_ms", "time_of_eager"), ("peak_mib", "peak_of_eager")):
        expected = rows["torch"][ours] / rows["eager torch"][ours]
        assert rows["torch"][share] == pytest.approx(expected)
    counts = {r["op"]: r["launches"] for r in of(result, provider="eager torch", rows=64)}
    counts = {op: n for op, n in counts.items() if n}
    assert counts == {"group_advantage": 34, "gated_kl": 10}
    assert "launches" in capsys.readouterr().out


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
    words = ("--sweep", "64", "--repeats", "1", "--warmup", "0")
    status, result = run(*words, "--providers", "torch", "eager torch", "wrong")
    (row,) = of(result, provider="wrong")
    assert (row["status"], row["mode"]) == ("refused", "correctness")
    assert "error_max" in row["reason"]
    assert row["error_dx"] < 1e-5
    assert (
        "refused  weighted  wrong: wrong numbers, not timed: error_max" in capsys.readouterr().out
    )
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
    words = ("--sweep", "64", "--providers", "eager torch", "scaled", "nan")
    _, result = run(*words, "--repeats", "1", "--warmup", "0")
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


PEERS = {
    "torch LCE": "torch",
    "torch LCE mean": "torch",
    "TRL chunked": "trl",
    "Liger FLCE": "liger_kernel",
    "CCE exact": "cut_cross_entropy",
    "QuACK": "quack",
}
"""Two of torch's, one that runs on a CPU, and those that want CUDA; with the module of each."""


def test_every_peer_of_this_machine_is_right_or_says_why_it_is_not_there(run, capsys):
    words = ("--sweep", "64", "--repeats", "1", "--warmup", "0", "--providers", "eager torch")
    status, result = run(*words, *PEERS)
    assert status == 0
    text = capsys.readouterr().out
    lce = "torch.nn.LinearCrossEntropyOptions"
    for name, module in PEERS.items():
        why = None if module in ("torch", "trl") else "needs CUDA"
        if importlib.util.find_spec(module) is None:
            why = f"{module} is not installed"
        elif module == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            why = f"torch {torch.__version__} has no {lce}"
        rows = of(result, provider=name)
        if why is None:
            assert {r["status"] for r in rows} == {"ok"}
            assert max(rows[0]["error_dx"], rows[0]["error_dw"]) <= 1e-5, "held to float64"
            assert rows[-1]["p50_ms"] > 0
        else:
            assert [(r["status"], r["reason"]) for r in rows] == [("skipped", why)]
            (line,) = [x for x in text.splitlines() if x.endswith(why) and name in x]
            assert line.startswith("skipped  weighted  ")


def test_a_torch_or_a_trl_that_is_too_old_is_left_out_with_its_reason(bench, monkeypatch):
    """torch 2.11 has no LinearCrossEntropyOptions; before 1.16 TRL had no `trl.kernels`."""
    args = bench.arguments(["--shape", SHAPE])
    by_name = {p.name: p for p in bench.PROVIDERS}
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    for name in ("torch LCE", "torch LCE mean"):
        why = bench.unavailable(by_name[name], "weighted", args.shape, args)
        assert why == f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions"
    for name in ("trl", "trl.kernels"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    case = bench.head_case("weighted", (8, 4, 11), None, args)
    found = bench.check([by_name["TRL chunked"]], case, args)["TRL chunked"]
    assert found[:2] == ("skipped", "no trl.kernels.ChunkedLogProbFunction; TRL 1.16.0 has it")


def test_compare_gives_the_ratio_to_an_earlier_result(run, tmp_path, capsys):
    words = ("--sweep", "64", *FAST)
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
        (["--out", "."], "--out: got the folder ., expected a file in it"),
        (["--profile", "."], "--profile: got the folder ., expected a file in it"),
    ],
)
def test_bad_words_say_what_to_do(bench, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    assert said in f"{stop.value}{capsys.readouterr().err}"


def test_without_words_it_is_sized_for_the_device(bench, monkeypatch):
    args = bench.arguments([])
    assert (args.shape, args.sweep) == ((2048, 512, 32768), [128, 512, 2048])
    assert (args.op, args.modes, args.dtype_name) == (["weighted"], None, "fp32")
    assert "two minutes" in args.note
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = bench.arguments([])
    assert (args.shape, args.sweep) == ((16384, 3584, 152064), [1024, 4096, 16384])
    assert (args.op, args.modes) == (list(bench.MODES), list(bench.HEAD_MODES))
    assert not args.note


def made(provider, p50, peak, **others):
    """A record as a run has it; 4 % of spread to both sides, a GEMM rate of twice eager's."""
    row = {"op": "weighted", "gate": None, "mode": "full", "rows": 2048, "hidden": 512}
    row |= {"vocabulary": 32768, "dtype": "fp32", "provider": provider, "status": "ok"}
    row |= {"p20_ms": 0.96 * p50, "p50_ms": p50, "p80_ms": 1.04 * p50, "peak_mib": peak}
    flop = 6 * row["rows"] * row["hidden"] * row["vocabulary"]
    row |= {"tflops": flop / p50 / 1e9, "percent_of_mm": 100 * 600 / p50, "reason": None}
    return row | others


def test_it_ends_in_words(bench):
    """Who is fastest, by how much, at which peak; who had an easier problem; who was wrong."""
    empty = {"p50_ms": None, "peak_mib": None, "mode": "correctness"}
    records = [
        made("torch", 1000.0, 112.0),
        made("torch", 10.0, 11.0, rows=128),
        made("torch, dW out", 1010.0, 80.0),
        made("eager torch", 1250.0, 768.0),
        made("TRL chunked", 1030.0, 300.0),
        made("torch LCE", 1500.0, 70.0),
        made("torch LCE mean", 900.0, 66.0),
        made("QuACK", 1.0, 1.0, **empty, status="refused", reason="error_dw 3.0e-02 > 1.0e-05"),
        made("CCE exact", 1.0, 1.0, **empty, status="OOM", reason="out of memory"),
    ]
    assert bench.closing_words(records, bench.PROVIDERS, 2048) == [
        "weighted, full, N, D, V = 2048, 512, 32768, fp32:",
        "  torch is fastest: 1000 ms, peak 112 MiB.",
        "  TRL chunked takes 1.03 times as long, peak 300 MiB, within the spread of the samples.",
        "  eager torch takes 1.25 times as long, peak 768 MiB.",
        "  torch LCE has the smallest peak: 70 MiB, in 1.50 times its time.",
        "  torch LCE mean, with one coefficient for all rows: 0.90 times its time, peak 66 MiB.",
        "refused  weighted  QuACK: wrong numbers, not timed: error_dw 3.0e-02 > 1.0e-05",
        "OOM  weighted  CCE exact: out of memory",
    ]
    ours_second = [made("CCE exact", 500.0, 90.0), made("torch", 750.0, 112.0)]
    assert bench.closing_words(ours_second, bench.PROVIDERS, 2048)[1:] == [
        "  CCE exact is fastest: 500 ms, peak 90 MiB.",
        "  torch takes 1.50 times as long, peak 112 MiB.",
    ]
    alone = bench.closing_words([made("torch LCE mean", 900.0, 66.0)], bench.PROVIDERS, 2048)
    assert alone[1:] == [
        "  torch LCE mean, with one coefficient for all rows: 900 ms, peak 66 MiB."
    ]


def test_a_provider_has_one_colour_in_every_panel_and_no_panel_is_empty(bench):
    report = importlib.import_module("kernel_report")
    names = {p.name for p in bench.PROVIDERS}
    assert names == {*report.COLOURS}
    assert len({*report.COLOURS.values()}) == len(names)
    whole = {"op": "two_stream", "mode": "full", "gate": 0.5}
    scores = {"op": "group_advantage", "mode": "forward", "hidden": None, "vocabulary": None}
    scores |= {"tflops": None, "percent_of_mm": None}
    records = [
        *(made("torch", n, n / 10, rows=n) for n in (128, 512, 2048)),
        *(made("eager torch", 2 * n, n, rows=n) for n in (128, 512, 2048)),
        *(made("eager torch", 3 * n, n, rows=n, **whole) for n in (128, 2048)),
        made("eager torch", 9.0, 7.0, **{**whole, "gate": 1.0}),
        made("eager torch", 0.5, None, **scores),
        made("torch", 4.0, 5.0, mode="scoring"),
    ]
    figure = report.figure_of(records, "a CPU")
    shown = [axes.get_ylabel() for axes in figure.axes]
    head = ["time, ms", "peak memory, MiB", "useful rate, TF/s"]
    assert shown == [*head, *head, "time, ms"], "the group ops have no head, so no rate"
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == [
        "weighted, full, D = 512, V = 32768, fp32",
        "two_stream, gate 0.5, full, D = 512, V = 32768, fp32",
        "group_advantage, forward, fp32",
    ]
    assert "a CPU" in figure.get_suptitle()
    lines = {(i, x.get_label()): x for i, axes in enumerate(figure.axes) for x in axes.get_lines()}
    for (_, name), line in lines.items():
        assert line.get_color() == report.COLOURS.get(name, "black")
    for name, panels in (("torch", {0, 1, 2}), ("eager torch", {*range(7)})):
        assert {i for i, label in lines if label == name} == panels
    assert [*lines[0, "torch"].get_ydata()] == [128, 512, 2048]
    assert [*lines[0, "floor: the GEMMs at torch.mm's rate"].get_ydata()] == [600] * 3
    gradients = [4 * (n + 32768) * 512 / 2**20 for n in (128, 512, 2048)]
    assert [*lines[1, "floor: dX and dW"].get_ydata()] == gradients
    rate = 6 * 2048 * 512 * 32768 / 600 / 1e9
    assert lines[2, "rate of torch.mm"].get_ydata()[-1] == pytest.approx(rate)
    figure.canvas.draw()
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["128", "512", "2048"]
    texts = {t.get_text() for axes in figure.axes for t in axes.get_yticklabels()}
    assert not any("$" in text or "e" in text for text in texts), "no powers of ten"
    (legend,) = figure.legends
    assert {t.get_text() for t in legend.get_texts()} == {name for _, name in lines}


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
        bench.main([*words, "--modes", *bench.HEAD_MODES, "--repeats", "1", "--warmup", "0"])
    records = json.loads(out.read_text(encoding="utf-8"))["records"]
    assert {r["op"] for r in records} == {"linear_logprob"}
    assert {r["mode"] for r in records if r["p50_ms"]} == set(bench.HEAD_MODES)

"""benchmarks/on_gpu.py without a GPU: its parts, what it writes down, and the aims' arithmetic."""

import collections
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vpgea_fast import config

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("on_gpu")


def test_without_a_gpu_it_lists_and_measures_nothing(on_gpu, capsys):
    assert on_gpu.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in text.splitlines() if line[0] != " "] == [
        *("dense", "sweep", "tests", "two_stream", "group", "sanitizer", "tiny"),
        *("train", "train_run", "train_long", "train_attention", "vllm"),
    ]
    assert on_gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    seconds = collections.Counter()  # a borrowed device's time, three times
    for part in on_gpu.PARTS:
        kind = part.name.split("_")[0]
        seconds[kind if kind in ("train", "vllm") else "kernels"] += part.seconds
    assert max(seconds.values()) <= 15 * 60
    assert all(part.seconds < on_gpu.LIMIT_S for part in on_gpu.PARTS)


def test_every_benchmark_of_a_part_takes_its_words(on_gpu, monkeypatch):
    """Names of providers, options and files: a typing error here would cost device time."""
    pytest.importorskip("triton")
    benches = ("kernel_bench", "tile_sweep", "train_bench", "rollout_bench")
    scripts = {name: importlib.import_module(name) for name in benches}
    monkeypatch.setattr(scripts["train_bench"], "free_memory", lambda: 2**40)
    seen = []
    for part in on_gpu.PARTS:
        for command in part.commands:
            _, script, *words = on_gpu.shlex.split(command.format(**dict.fromkeys(PLACES, "x")))
            if (name := Path(script).stem) in scripts:
                seen.append(scripts[name].arguments(words).out.stem)
            if words[:1] == ["vpgea_fast.cli"] and words[2].endswith(".yaml"):
                config.load(ROOT / words[2], words[3:])
    assert seen == [name for part in on_gpu.PARTS for name in part.results]
    shards = importlib.import_module("test_kernels_interpret").SHARDS
    assert tuple(shards) == on_gpu.SHARDS


PLACES = ("python", "scratch", "sanitizer")


def test_a_part_tells_how_it_ended(on_gpu, tmp_path, monkeypatch):
    python = "{python} -c"
    good = on_gpu.Part(
        "good",
        1,
        (
            f"{python} \"open('{{scratch}}/made.json', 'w').write('[1]')\"",
            f'{python} "import vpgea_fast; print(vpgea_fast.__file__)"',
        ),
        ("made", "missing"),
    )
    done = on_gpu.run(good, tmp_path, 60)
    assert done["status"] == "ok"
    assert done["results"] == {"made": [1], "missing": None}
    assert str(BENCHMARKS.parent) in done["commands"][1]["tail"]

    bad = on_gpu.Part("bad", 1, (f'{python} "raise SystemExit(3)"', f'{python} "print(7)"'))
    for part in (bad, replace(bad, together=True)):
        done = on_gpu.run(part, tmp_path, 60)
        assert done["status"] == "failed"
        assert [c["exit"] for c in done["commands"]] == [3, 0]
        assert done["commands"][1]["tail"] == "7\n"
    slow = on_gpu.Part("slow", 1, (f'{python} "import time; time.sleep(60)"',))
    assert on_gpu.run(slow, tmp_path, 2)["commands"][0]["exit"] == 124
    assert on_gpu.run(replace(slow, seconds=90), tmp_path, 2)["status"] == "no time"
    monkeypatch.setattr(on_gpu, "sanitizer", lambda: None)
    check = on_gpu.Part("check", 1, ("{sanitizer} {python}",))
    assert on_gpu.run(check, tmp_path, 60)["status"] == "skipped"


def test_a_run_goes_on_where_the_last_one_stopped(on_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "environment", lambda: {"commit": None, "device": "H200"})
    count = f"open(r'{tmp_path}/count', 'a').write('x')"
    parts = [on_gpu.Part(name, need, (f'{{python}} -c "{count}"',)) for name, need in NEEDS]
    monkeypatch.setattr(on_gpu, "PARTS", tuple(parts))
    words = ["--out", str(tmp_path / "out.json"), "--scratch", str(tmp_path), "--commit", "abc"]
    assert on_gpu.main([*words, "--minutes", "1"]) == 0
    assert "no time for long" in capsys.readouterr().out
    assert on_gpu.main([*words, "--minutes", "3"]) == 0
    assert (tmp_path / "count").read_text() == "xx"
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["commit"], result["device"]) == ("abc", "H200")
    assert {name: part["status"] for name, part in result["parts"].items()} == {
        "short": "ok",
        "long": "ok",
    }
    assert sys.executable in result["parts"]["long"]["commands"][0]["command"]


NEEDS = (("short", 1), ("long", 120))


def test_aims_are_ratios_of_the_same_run(on_gpu):
    def row(provider, ms, rows=16384, mode="full", gate=None, mib=None):
        row = {"provider": provider, "p50_ms": ms, "rows": rows, "mode": mode, "gate": gate}
        return row | {"transient_mib": mib}

    weighted = [
        *(row("triton", 72.0), row("triton, dW out", 19.0, rows=4096, mib=1300.0)),
        *(row("cublas", 80.0), row("Liger FLSCE", 100.0), row("Liger FLCE", 140.0)),
        row("QuACK", None),
    ]
    streams = [row("triton", 140.0, gate=1.0), row("triton", 105.0, gate=0.5)]
    done = {
        "dense": {
            "results": {
                "weighted": {"records": weighted},
                "logprob": {"records": [row("triton", 29.0, mode="forward")]},
            }
        },
        "two_stream": {"results": {"two_stream": {"records": streams}}},
    }
    found = {aim["name"]: (aim["value"], aim["holds"]) for aim in on_gpu.aims(done)}
    assert found["triton: forward, ms"] == (29.0, False)
    assert found["triton: forward + backward, ms"] == (72.0, True)
    assert found["cublas: forward + backward, ms"] == (80.0, False)
    assert found["triton: two streams, gate 0.5 / dense"] == (0.75, True)
    assert found["triton: times as fast as Liger FLSCE"] == (pytest.approx(100 / 72), True)
    assert found["cublas: times as fast as Liger FLCE"] == (1.75, False)
    assert found["triton: times as fast as QuACK"] == (None, None)
    assert found["triton: transient memory at 4096 rows, MiB"] == (1300.0, True)
    assert on_gpu.aims({})[0]["holds"] is None


def test_aims_of_the_train_phase(on_gpu):
    records = [
        {"variant": "gated", "mfu": 0.4, "paths_per_s": 2.6, "head_share": 0.05},
        {"variant": "ungated", "paths_per_s": 2.0},
        {"variant": "padded", "times_gated": 1.2},
    ]
    result = {"records": records, "estimate": {"mib": 80.0, "measured_mib": 100.0}}
    done = {"train": {"results": {"train_7b": result}}}
    found = {aim["name"]: (aim["value"], aim["holds"]) for aim in on_gpu.aims(done)}
    assert found["train_7b: MFU"] == (0.4, True)
    assert found["train_7b: times as fast as the padded loop"] == (1.2, False)
    assert found["train_7b: paths per second, gate 0.5 / dense"] == (1.3, True)
    assert found["train_7b: share of head and loss"] == (0.05, True)
    assert found["train_7b: estimate beside measured peak"] == (pytest.approx(0.2), False)
    assert found["train_7b_32k: MFU"] == (None, None)


def test_the_waiting_list_names_every_part(on_gpu):
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert [part.name for part in on_gpu.PARTS if f"| `{part.name}` |" not in text] == []


def test_the_sweep_lists_its_tiles(on_gpu, capsys):
    del on_gpu
    pytest.importorskip("triton")
    sweep = importlib.import_module("tile_sweep")
    assert sweep.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(sweep.TILES)
    assert sweep.main(["--shape", "8,8,8"]) == 2
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.slow
def test_the_sweep_checks_and_times_every_variant_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "tile_sweep.py"), "--shape", "64,32,300", "--rows"]
    words = [*"64 --chunks 32 64 --repeats 1 --warmup 0 --out".split(), str(tmp_path / "out.json")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    subprocess.run([*command, *words], env=environment, check=True, capture_output=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["gemm_exp"]["best"]
    assert {r["status"] for r in result["records"]} == {"ok"}
    steps = [r["step"] for r in result["records"]]
    assert list(dict.fromkeys(steps)) == ["1 logits", "2 gemm_exp", "3 dX", "4 dW", "5 passes"]

"""benchmarks/on_gpu.py without a GPU: its parts, what it writes down, and the aims' arithmetic."""

import collections
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from vpgea_fast import config
from vpgea_fast.check import Target, check_config
from vpgea_fast.estimate import RESERVE, estimate_memory, model_shape

pytestmark = pytest.mark.around

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
        *("sweep", "dense", "train", "tests", "two_stream", "group", "kernels", "step", "scale"),
        *("sanitizer", "tiny", "one_gpu", "train_rest", "train_run", "train_long"),
        *("train_attention", "vllm"),
    ]
    assert on_gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    seconds = collections.Counter()  # a borrowed device's time, three times
    for part in on_gpu.PARTS:
        kind = part.name.split("_")[0]
        steps = kind in ("step", "scale", "one")
        known = kind if kind in ("train", "vllm") else "steps" if steps else "kernels"
        seconds[known] += part.seconds
    assert max(seconds.values()) <= 19 * 60
    assert all(part.seconds < part.limit_s < 600 for part in on_gpu.PARTS)
    assert text.count("stopped at") == len(on_gpu.PARTS)


@pytest.fixture
def card(on_gpu, monkeypatch):
    """A device of 80 GB, as far as on_gpu.py asks, and what it writes down of the place."""
    del on_gpu  # says that there is none
    properties = types.SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    place = {"commit": None, "device": "H200"}
    monkeypatch.setattr("vpgea_fast.metrics.environment", lambda: dict(place))


def words_of(on_gpu, *, small):
    """(part, command split into words) as a card below or above 100 GB has them."""
    for part in on_gpu.PARTS:
        places = {**PLACES, "fits": part.fits[not small]}
        for command in part.commands:
            yield part, on_gpu.shlex.split(command.format(**places))


@pytest.mark.parametrize("small", [False, True])
def test_every_benchmark_of_a_part_takes_its_words(on_gpu, monkeypatch, small):
    """Names of providers, options and files: a typing error here would cost device time."""
    pytest.importorskip("triton")
    benches = ("kernel_bench", "tile_sweep", "train_bench", "rollout_bench", "step_bench")
    benches = (*benches, "scale_bench")
    scripts = {name: importlib.import_module(name) for name in benches}
    for name in ("train_bench", "step_bench"):
        monkeypatch.setattr(scripts[name], "free_memory", lambda: 2**40)
    seen = []
    for _, (_, script, *words) in words_of(on_gpu, small=small):
        if (name := Path(script).stem) in scripts:
            words += ["--dtype", "bfloat16"] if name == "train_bench" else []  # a GPU's default
            seen.append(scripts[name].arguments(words).out.stem)
        if words[:1] == ["vpgea_fast.cli"] and words[2].endswith(".yaml"):
            config.load(ROOT / words[2], words[3:])
    assert seen == [name for part in on_gpu.PARTS for name in part.results]
    shards = importlib.import_module("test_kernels_interpret").SHARDS
    assert tuple(shards) == on_gpu.SHARDS


PLACES = dict.fromkeys(("python", "scratch", "sanitizer", "tests", "heads"), "x") | {
    "flash": "flash",
    "trl": "",
}
CARDS = {True: 80e9, False: 141e9}
GIB = 2**30


@pytest.mark.parametrize("small", [True, False])
def test_every_part_that_trains_fits_its_card(on_gpu, monkeypatch, small):
    """By the estimator, with its reserve, on 80 and on 141 decimal GB. (The kernels' parts run out
    of memory in other libraries at most, and then say so.)"""
    bench = importlib.import_module("train_bench")
    models = importlib.import_module("train_variants").MODELS
    monkeypatch.setattr(bench, "free_memory", lambda: 2**40)
    world = types.SimpleNamespace(size=1, device=torch.device("cuda"))
    peaks = {}
    for part, (_, script, *words) in words_of(on_gpu, small=small):
        if Path(script).stem == "train_bench":
            args = bench.arguments([*words, "--dtype", "bfloat16"])
            hf = bench.make_config(args, layers=args.layers)
            check_config(args.cfg, hf, 1, on=Target(1, CARDS[small], cuda=True, here=False))
            peak = bench.estimated_mib(hf, args, world)[0] / 1024
        elif words[:2] == ["vpgea_fast.cli", "train"] and "configs/7b-1gpu.yaml" in words:
            cfg = config.load(ROOT / "configs/7b-1gpu.yaml", words[3:])
            model = "qwen2.5-7b" if "x/run_7b" in words else "qwen2.5-1.5b"
            prompt = cfg.data.max_prompt_tokens
            context = prompt + cfg.rollout.max_new_tokens
            shape = model_shape(Qwen2Config(**models[model]))
            peak = estimate_memory(shape, cfg, context=context, prompt=prompt).peak / GIB
        else:
            continue
        peaks.setdefault(part.name, []).append(peak)
    trained = ("train", "one_gpu", "train_rest", "train_run", "train_long", "train_attention")
    assert tuple(peaks) == trained
    assert {name: len(found) for name, found in peaks.items()} == {
        **dict.fromkeys(("train", "train_rest", "train_long"), 1),
        "train_run": 2,
        "train_attention": 3,
        "one_gpu": 3,
    }
    limit = (1 - RESERVE) * CARDS[small] / GIB
    assert all(peak <= limit for found in peaks.values() for peak in found), (limit, peaks)


def test_a_part_tells_how_it_ended(on_gpu, tmp_path, monkeypatch):
    python = "{python} -c"
    good = on_gpu.Part(
        "good",
        1,
        (
            f"{python} \"open('{{scratch}}/made.json', 'w').write('[1]')\"",
            f'{python} "import vpgea_fast; print(vpgea_fast.__file__)"',
        ),
        ("made",),
    )
    done = on_gpu.run(good, tmp_path, 60)
    assert done["status"] == "ok"
    assert done["results"] == {"made": [1]}
    assert str(BENCHMARKS.parent) in done["commands"][1]["tail"]
    for text in ("[]", "", "{", '{"records": []}'):
        (tmp_path / "missing.json").write_text('["of an earlier run"]')
        (tmp_path / "write.py").write_text(f"open(r'{tmp_path}/made.json', 'w').write('{text}')")
        part = on_gpu.Part("lost", 1, ("{python} {scratch}/write.py",), ("made", "missing"))
        done = on_gpu.run(part, tmp_path, 60)
        assert done["status"] == "failed", text
        assert done["reason"] == "no result in made.json; no result in missing.json"
        assert done["commands"][0]["exit"] == 0

    bad = on_gpu.Part("bad", 1, (f'{python} "raise SystemExit(3)"', f'{python} "print(7)"'))
    for part in (bad, replace(bad, together=True)):
        done = on_gpu.run(part, tmp_path, 60)
        assert done["status"] == "failed"
        assert [c["exit"] for c in done["commands"]] == [3, 0]
        assert done["commands"][1]["tail"] == "7\n"
    slow = on_gpu.Part("slow", 1, (f'{python} "import time; time.sleep(60)"',))
    assert on_gpu.run(replace(slow, seconds=90), tmp_path, 2)["status"] == "no time"
    monkeypatch.setattr(on_gpu, "sanitizer", lambda: None)
    check = on_gpu.Part("check", 1, ("{sanitizer} {python}",))
    skipped = on_gpu.run(check, tmp_path, 60)
    assert skipped == {"status": "skipped", "reason": on_gpu.ABSENT["sanitizer"]}
    monkeypatch.setattr(on_gpu, "TRL", ("trl", "no_such_package"))
    check = on_gpu.Part("step", 1, ("{trl}{python} -c 1",))
    assert on_gpu.run(check, tmp_path, 60)["reason"].startswith("needs trl, accelerate")


SLEEPER = """
import pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(folder / "made.json").write_text(f"[{child.pid}]")
time.sleep(60)
"""


def test_a_part_that_is_stopped_for_time_keeps_what_it_had_and_leaves_nothing_running(
    on_gpu, tmp_path
):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    part = on_gpu.Part("slow", 1, ("{python} {scratch}/sleeper.py {scratch}",), ("made", "later"))
    done = on_gpu.run(part, tmp_path, 3)
    assert done["status"] == "failed"
    assert re.match(r"stopped after \d s; exit status 124 of.*no result in later", done["reason"])
    (child,) = done["results"]["made"]
    for _ in range(100):  # a killed process waits for its new parent to collect it
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the command's own child outlived it")


@pytest.mark.usefixtures("card")
def test_a_run_goes_on_where_the_last_one_stopped(on_gpu, tmp_path, monkeypatch, capsys):
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


@pytest.mark.usefixtures("card")
def test_a_part_that_failed_is_run_again_when_asked(on_gpu, tmp_path, monkeypatch):
    code = f"import os; raise SystemExit(not os.path.exists(r'{tmp_path}/mended'))"
    monkeypatch.setattr(on_gpu, "PARTS", (on_gpu.Part("one", 1, (f'{{python}} -c "{code}"',)),))
    words = ["--out", str(tmp_path / "out.json"), "--scratch", str(tmp_path)]
    assert on_gpu.main(words) == 1
    (tmp_path / "mended").touch()
    assert on_gpu.main(words) == 1
    assert on_gpu.main([*words, "--again"]) == 0


NEEDS = (("short", 1), ("long", 120))


def test_aims_are_ratios_of_the_same_run(on_gpu):
    def row(provider, ms, rows=16384, mode="full", gate=None, mib=None):
        row = {"provider": provider, "p50_ms": ms, "rows": rows, "mode": mode, "gate": gate}
        return row | {"transient_mib": mib}

    weighted = [
        *(row("triton", 79.0), row("triton, dW out", 77.0)),
        row("triton, dW out", 19.0, rows=4096, mib=1300.0),
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
    assert found["triton: forward + backward, dW into float32, ms"] == (77.0, True)
    assert found["triton: forward + backward, dW made, cast and scaled, ms"] == (79.0, True)
    assert found["cublas: forward + backward, dW into float32, ms"] == (None, None)
    assert found["cublas: forward + backward, dW made, cast and scaled, ms"] == (80.0, False)
    assert found["triton: two streams, gate 0.5 / dense"] == (0.75, True)
    assert found["triton: times as fast as Liger FLSCE"] == (pytest.approx(100 / 79), True)
    assert found["cublas: times as fast as Liger FLCE"] == (1.75, False)
    assert found["triton: times as fast as QuACK"] == (None, None)
    assert found["triton: transient memory at 4096 rows, MiB"] == (1300.0, True)
    assert on_gpu.aims({})[0]["holds"] is None


def test_aims_of_the_train_phase(on_gpu):
    records = [
        {"variant": "gated", "mfu": 0.4, "paths_per_s": 9.9, "head_share": 0.05},
        {"variant": "padded", "times_gated": 1.2},
    ]
    result = {"records": records, "estimate": {"mib": 80.0, "measured_mib": 100.0}}
    rest = [
        {"variant": "gated", "paths_per_s": 2.6},
        {"variant": "ungated", "paths_per_s": 2.0},
    ]
    done = {
        "train": {"results": {"train_7b": result}},
        "train_rest": {"results": {"train_7b_rest": {"records": rest}}},
    }
    found = {aim["name"]: (aim["value"], aim["holds"]) for aim in on_gpu.aims(done)}
    assert found["train_7b: MFU"] == (0.4, True)
    assert found["train_7b: times as fast as the padded loop"] == (1.2, False)
    assert found["train_7b: paths per second, gate 0.5 / dense"] == (1.3, True)
    assert found["train_7b: share of head and loss"] == (0.05, True)
    assert found["train_7b: estimate beside measured peak"] == (pytest.approx(0.2), False)
    assert found["train_7b_32k: MFU"] == (None, None)


def test_aims_of_the_benches_that_run_as_their_pages_say(on_gpu):
    aims = importlib.import_module("gpu_aims")
    kernel = importlib.import_module("kernel_providers")
    assert {*aims.OURS} == {p.name for p in kernel.PROVIDERS if p.backend}
    row = {"op": "weighted", "mode": "full", "rows": 16384, "status": "ok"}
    rows = [
        row | {"provider": "triton", "p50_ms": 80.0},
        row | {"provider": "cublas", "p50_ms": 70.0},
        row | {"provider": "QuACK", "p50_ms": 88.0},
        row | {"provider": "wrong", "p50_ms": 8.0, "status": "refused"},
        row | {"provider": "small", "p50_ms": 5.0, "rows": 1024},
    ]
    done = {
        "sweep": {"results": {"tile_sweep": {"gemm_exp": {"tflops": 700.0}}}},
        "kernels": {"results": {"kernel_bench": {"records": rows}}},
        "step": {"results": {"step_1.5b": {"faster": 1.4, "added_of_trl": 0.7}}},
        "scale": {"results": {"scale": {"slopes": {"length": {"train": 0.9}, "x": {}}}}},
        "one_gpu": {
            "results": {
                "one_gpu_resident": {"records": [{"p50_s": 9.5, "mfu": 0.4}]},
                "one_gpu_offload": {"records": [{"p50_s": 10.0, "mfu": 0.38}]},
                "one_gpu_selective": {"records": [{"p50_s": 9.0, "mfu": 0.43}]},
            }
        },
    }
    found = {aim["name"]: aim for aim in on_gpu.aims(done, "NVIDIA H200")}
    assert found["gemm_exp, TF/s"]["verdict"] == "as expected, aim >= 690 holds"
    assert found[aims.PEER]["value"] == pytest.approx(1.1)
    assert found["step_1.5b: TRL's seconds / ours"]["value"] == 1.4
    added = found["step_1.5b: added memory / TRL's"]
    assert added["verdict"] == "as expected, aim <= 0.5 missed"
    assert found[aims.SLOPE]["value"] == 0.9
    assert found[aims.OFFLOADED]["value"] == pytest.approx(0.95)
    assert found[aims.OFFLOADED]["verdict"] == "as expected, aim >= 0.9 holds"
    assert found[aims.SELECTIVE]["value"] == pytest.approx(0.43 / 0.4)
    assert found[aims.SELECTIVE_MFU]["value"] == 0.43
    assert on_gpu.aims({}, "NVIDIA H200")[0]["verdict"] == "not measured"


def test_the_table_holds_what_was_expected_beside_what_was_measured(on_gpu, monkeypatch):
    """By the card: 77 ms of an H200 are its own expectation, not an A100's."""
    aims = importlib.import_module("gpu_aims")
    row = {"provider": "triton, dW out", "p50_ms": 75.0, "rows": 16384, "mode": "full"}
    done = {"dense": {"results": {"weighted": {"records": [row | {"transient_mib": None}]}}}}
    name = f"triton: {aims.INTO}"
    lines = {card: on_gpu.table(on_gpu.aims(done, card)) for card in ("H200", "H100 SXM", "A100")}
    of = {card: next(x for x in found if x.startswith(name)) for card, found in lines.items()}
    columns = of["H200"].removeprefix(name).split()
    assert columns == "77 72 to 84 75 as expected, aim <= 78 holds".split()
    assert of["H100 SXM"].removeprefix(name).split()[:4] == ["79", "73", "to", "87"]
    assert of["A100"].removeprefix(name).split() == "- - 75 aim <= 78 holds".split()
    assert len(lines["A100"]) == 1 + len(on_gpu.aims({}))
    for value, words in ((71.9, "below expected"), (84.1, "above expected")):
        records = [row | {"p50_ms": value, "transient_mib": None}]
        done["dense"]["results"]["weighted"]["records"] = records
        (aim,) = (aim for aim in on_gpu.aims(done, "H200") if aim["name"] == name)
        assert aim["verdict"].split(", ")[0] == words
    monkeypatch.setattr(aims.importlib.util, "find_spec", lambda _: object())
    mfu = next(a for a in on_gpu.aims({}, "NVIDIA H200") if a["name"] == "train_7b: MFU")
    assert mfu["expected"] == (0.48, 0.44, 0.52)
    more = next(a for a in on_gpu.aims({}, "NVIDIA H200") if a["name"] == aims.SELECTIVE_MFU)
    assert more["expected"] == (0.528, 0.484, 0.572)


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
    row = {"step": "2 gemm_exp", "status": "ok", "name": "E stored"}
    for rate, goes in ((580.0, False), (600.0, True)):  # break-even with the cuBLAS head
        assert sweep.verdict([row | {"tflops": rate}])["go"] == goes


# --- from end to end, the device and the commands at its edge stubbed ---------------------------

DEVICE = """
import runpy, sys, types, torch
memory, python, script = float(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.argv = sys.argv[3:]
sys.executable = python
sys.path.insert(0, script.rpartition("/")[0])
properties = types.SimpleNamespace(total_memory=memory)
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda *_: properties
torch.cuda.get_device_name = lambda *_: "NVIDIA stub"
torch.cuda.device_count = lambda: 1
runpy.run_path(script, run_name="__main__")
"""
STAND_IN = """#!{python} -S
import json, pathlib, sys
words = sys.argv[1:]
if "--out" in words:
    path = pathlib.Path(words[words.index("--out") + 1])
    result = {result} | {{"cwd": str(pathlib.Path.cwd())}}
    if path.stem != "group":
        path.write_text("" if path.stem == "two_stream" else json.dumps(result))
"""
ROW = dict.fromkeys(("provider", "mode", "rows", "gate", "variant", "p50_ms", "transient_mib"))


@pytest.fixture
def borrowed(tmp_path):
    """A copy of the sources without .git, another directory to stand in, and a stand-in for python
    that writes the JSON of --out: none of `group`, an empty one of `two_stream`."""
    copy = tmp_path / "a copy"
    for folder in ("benchmarks", "vpgea_fast", "kernels", "tests", "configs"):
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    elsewhere, python = tmp_path / "else where", tmp_path / "python"
    elsewhere.mkdir()
    text = STAND_IN.format(python=sys.executable, result={"records": [ROW]})
    python.write_text(text)
    python.chmod(0o755)

    def run(*words, memory=80e9):
        script = str(copy / "benchmarks" / "on_gpu.py")
        command = [sys.executable, "-c", DEVICE, str(memory), str(python), script, *words]
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        path = elsewhere / "runs" / "on_gpu.json"
        return done, json.loads(path.read_text()) if path.exists() else None

    run.copy, run.elsewhere = copy, elsewhere
    return run


def test_from_another_directory_without_git_and_on_a_small_card(on_gpu, borrowed):
    names = ("sweep", "dense", "tests", "two_stream", "group", "train", "train_long")
    done, result = borrowed("--only", *names, "--minutes", "60", "--commit")
    assert done.returncode == 1, done.stderr
    assert result["commit"] == "unknown"
    assert result["tree"] == on_gpu.tree(), "the copy's digest is the checkout's"
    assert result["status"] == {
        **dict.fromkeys(("sweep", "dense", "tests", "train", "train_long"), "ok"),
        "two_stream": "failed",
        "group": "failed",
    }
    parts = result["parts"]
    assert parts["two_stream"]["reason"] == "no result in two_stream.json"
    assert "on_gpu: group: failed  no result in group.json" in done.stdout
    assert parts["sweep"]["results"]["tile_sweep"]["cwd"] == str(borrowed.copy)
    assert (borrowed.elsewhere / "runs/on_gpu/tile_sweep.json").is_file()
    for name in ("train", "train_long"):
        (command,) = parts[name]["commands"]
        assert "--layers 18 --master-dtype bfloat16 --accumulate unsharded" in command["command"]
    assert "tests/test_losses.py" in parts["tests"]["commands"][0]["command"]
    assert parts["tests"]["left_out"] == {}
    # The next call does what is missing, and each part says which sources it ran.
    (borrowed.copy / "benchmarks/new.py").touch()
    done, again = borrowed("--only", *names, "tiny", "--minutes", "60", "--commit", "")
    assert done.returncode == 1
    tiny = again["parts"].pop("tiny")
    assert tiny["status"] == "ok"
    assert again["parts"] == parts
    assert again["commit"] == "unknown"
    assert again["tree"] == tiny["tree"] != parts["sweep"]["tree"] == result["tree"]


def test_a_large_card_trains_the_whole_model(borrowed):
    words = ("--only", "train", "--minutes", "60", "--commit", "abc")
    done, result = borrowed(*words, memory=141e9)
    assert done.returncode == 0, done.stderr
    assert result["commit"] == "abc"
    assert "--layers" not in result["parts"]["train"]["commands"][0]["command"]


# --- a bare machine -------------------------------------------------------------------------------


@pytest.fixture
def bare(on_gpu):
    del on_gpu
    return importlib.import_module("bare_machine")


def test_the_wheels_are_pinned_and_leave_torch_alone(bare, on_gpu, monkeypatch, tmp_path, capsys):
    """pip is a stand-in that notes its words: the network is not for tests."""
    pip = tmp_path / "python"
    note = f"open(r'{tmp_path}/words', 'w').write(chr(10).join(sys.argv[1:]))"
    make = "open(sys.argv[sys.argv.index('--dest') + 1] + '/a.whl', 'w').write('x' * 2**20)"
    pip.write_text(f"#!{sys.executable} -S\nimport sys\n{note}\n{make}\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    assert on_gpu.main(["wheels", str(tmp_path)]) == 0
    assert f"1 wheels, 1.0 MiB, in {tmp_path}" in capsys.readouterr().out
    words = (tmp_path / "words").read_text().split("\n")
    assert words[:3] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "--python-version", "3.12"} <= set(words)
    pinned = [word for word in words if "==" in word]
    assert len(pinned) == len(bare.CARRIED)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(pinned) <= set(lines)
    names = {word.partition("==")[0].lower() for word in pinned}
    heavy = {"torch", "triton", "transformers", "numpy", "pyarrow", "pandas", "datasets"}
    assert not names & heavy
    assert {"pydantic", "math-verify", "pytest", "liger_kernel", "matplotlib"} <= names


def test_what_is_missing_is_told_in_one_line(bare, monkeypatch):
    assert set(bare.missing()) <= {"liger_kernel"}  # `make test` installs all but this
    real = bare.importlib.util.find_spec
    monkeypatch.setattr(
        bare.importlib.util, "find_spec", lambda n: None if n in ("pydantic", "PIL") else real(n)
    )
    names = [name for name in bare.missing() if name != "liger_kernel"]
    assert names == ["pillow", "pydantic"]
    line = bare.advice(names, "wheels")
    assert "\n" not in line
    assert line.endswith("pip install --no-index --find-links wheels pillow pydantic")


def test_only_tests_that_can_be_imported_are_chosen(bare):
    files = sorted((ROOT / "tests").glob("test_*.py"))
    good, left_out = bare.runnable(files, [])
    assert (good, left_out) == (files, {})
    good, left_out = bare.runnable(files, ["pydantic", "math-verify", "liger_kernel"])
    assert ROOT / "tests/test_losses.py" in good
    assert ROOT / "tests/test_kernels_interpret.py" in good
    assert left_out["tests/test_model.py"] == "needs pydantic"
    assert left_out["tests/test_trainer.py"] == "needs math-verify, pydantic"
    assert left_out["tests/test_train_bench.py"] == "needs pydantic"  # by import_module
    good, left_out = bare.runnable(files, ["hypothesis"])
    assert good == []  # conftest.py imports it
    assert set(left_out.values()) == {"needs hypothesis"}


@pytest.mark.slow
def test_the_chosen_tests_collect_without_what_is_missing(bare):
    """For real: pytest with pydantic and math-verify hidden collects every file that is chosen."""
    hide = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(',')))"
    code = f"{hide}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    files = [f for f in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in f.read_text()]
    good, _ = bare.runnable(files, ["pydantic", "math-verify"])
    words = ["-q", "--collect-only", "-m", "", "-p", "no:cacheprovider", *map(str, good)]
    done = subprocess.run(
        [sys.executable, "-c", code, "pydantic,pydantic_core,math_verify", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert len(good) >= 4
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


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

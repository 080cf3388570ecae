"""A trace of chosen steps, and what is said of it."""

import gzip
import json
from pathlib import Path

import pytest

from vpgea_fast import config
from vpgea_fast.profiling import told
from vpgea_fast.trainer import fit

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
SMALL = {
    "train.questions_per_step": 2,
    "objective.group_size": 2,
    "train.steps": 3,
    "rollout.max_new_tokens": 24,
    "checkpoint.export": "false",
    "metrics.diag_every": 0,
    "metrics.compare": "null",
}


def event(kind, name, begin, end, thread=1):
    """An event as a Chrome trace has it; times in milliseconds."""
    times = {"ts": 1000 * begin, "dur": 1000 * (end - begin)}
    return {"ph": "X", "cat": kind, "name": name, "pid": 1, "tid": thread, **times}


PHASES = [
    event("user_annotation", "phase: rollout", 0, 100),
    event("user_annotation", "phase: train", 100, 300),
    event("user_annotation", "Optimizer.step", 100, 300),
    event("gpu_user_annotation", "phase: train", 0, 300),
    {"ph": "M", "name": "process_name"},
]


def test_kernels_of_all_streams_and_the_gaps_between_them():
    """Two overlap; what the CPU does meanwhile is not asked."""
    kernels = [
        event("kernel", "gemm", 120, 180),
        event("kernel", "gemm", 10, 30),
        event("kernel", "norm", 20, 50, thread=2),
        event("gpu_memcpy", "Memcpy HtoD", 290, 295),
        event("cpu_op", "aten::mm", 0, 300),
    ]
    assert [*told([*PHASES, *kernels])] == [
        "  0.285 s, 36.8% of it in kernels; the longest kernels:",
        "        80.000 ms  28.1%       2 x gemm (in train, 75%)",
        "        30.000 ms  10.5%       1 x norm (in rollout)",
        "         5.000 ms   1.8%       1 x Memcpy HtoD (in train)",
        "  the longest gaps between kernels:",
        "       110.000 ms in train, after gemm, before Memcpy HtoD",
        "        70.000 ms in rollout, after norm, before gemm",
    ]


def test_operators_stand_for_kernels_each_without_those_that_it_calls():
    operators = [
        event("cpu_op", "aten::mm", 10, 90),
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::t", 0, 10),
        event("cpu_op", "aten::mm", 350, 360),
        event("cpu_op", "aten::mm", 0, 5, thread=2),
    ]
    assert [*told([*PHASES, *operators])] == [
        "  0.360 s, 30.6% of it in operators; the longest operators:",
        "        95.000 ms  26.4%       3 x aten::mm (in rollout, 89%)",
        "        10.000 ms   2.8%       1 x aten::linear (in rollout)",
        "        10.000 ms   2.8%       1 x aten::t (in rollout)",
        "  the longest gaps between operators:",
        "       250.000 ms in train, after aten::linear, before aten::mm",
    ]
    assert [*told(PHASES)] == ["  nothing was computed in these steps"]


def test_ten_are_named_the_longest_first():
    kernels = [event("kernel", f"k{i}", 100 * i, 100 * i + 1 + i) for i in range(15)]
    lines = [*told(kernels)]
    assert [line.split(" x ")[1] for line in lines[1:11]] == [
        f"k{i} (in no phase)" for i in range(14, 4, -1)
    ]
    assert [line.split()[-1] for line in lines[12:]] == [f"k{i}" for i in range(1, 11)]


def test_a_run_traces_the_steps_that_are_asked_for(tiny_words, tmp_path, capsys):
    words = tiny_words({**SMALL, "train.profile_steps": "[2, 2]"})("run")
    assert fit(config.load(TINY, words))
    shown = capsys.readouterr().out
    file = tmp_path / "run/trace_2_2.json.gz"
    with gzip.open(file, "rt") as text:
        events = json.load(text)["traceEvents"]
    # Of one step, not of the three.
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert names.count("phase: train") == names.count("phase: rollout") == 1
    _, said = shown.split(f"profile: {file}")
    assert "in operators; the longest operators:" in said
    longest, gaps = said.split("the longest gaps between operators:")
    assert sum(" x " in line for line in longest.splitlines()) == 10
    assert sum(" ms in " in line for line in gaps.splitlines()) == 10
    assert "(in rollout" in longest
    assert not list((tmp_path / "run").glob("trace_1*"))


@pytest.mark.parametrize("steps", [[3, 2], [2, 4], [4, 4]])
def test_steps_that_there_are_not_are_refused(steps):
    with pytest.raises(config.ConfigError, match=r"profile_steps: got \[.*the 3 steps"):
        config.resolve({"train": {"steps": 3, "profile_steps": steps}})
    assert config.resolve({"train": {"steps": 3, "profile_steps": [3, 3]}})

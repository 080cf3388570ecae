"""The Triton heads compiled ahead of time for sm_90: what the compiler made of them, without a GPU.

In a process of its own: triton must be imported without TRITON_INTERPRET.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED_LIMIT = 232448
"""Bytes of shared memory that one program may have on sm_90."""
OFFSETS64 = {
    "gemm_exp": 2,
    "target_logit": 2,
    "reduce_rows": 2,
    "gradient_operands": 3,
    "row_gradient": 2,
}
"""Pointers of a kernel into something that may have more than 2^31 elements, where not just one."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def report(tmp_path, compiled_dir):
    """`report("--arch", "90")`: the rows that benchmarks/static_report.py writes, by kernel name:
    (GEMMs, the others). Every kernel is compiled, so one that only the interpreter accepts fails.
    """
    return functools.partial(static_report, tmp_path / "static.json", compiled_dir)


def static_report(file, compiled_dir, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(compiled_dir)}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "static_report.py", *arguments, "--json", file],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["kernel"]: row for row in json.loads(file.read_text())["kernels"]}
    assert all(name in done.stdout for name in rows)
    for name, row in rows.items():
        if row["dtype"] != "fp32":
            assert (row["spills"], row["stack"]) == (0, 0), name
        assert row["stride32"] == 0, f"{name}: an address ends at 2^31 elements"
        assert row["offset64"] >= OFFSETS64.get(name.partition(":")[0].partition(",")[0], 1), name
    gemms = {name for name in rows if name.startswith("gemm_exp")}
    return {k: rows[k] for k in gemms}, {k: rows[k] for k in rows.keys() - gemms}


def assert_wide(others):
    """The passes over the logits move 16 bytes a thread: they are bound by the memory's rate."""
    passes = {name: row for name, row in others.items() if name.startswith("row_")}
    assert len(passes) == 7
    for name, row in passes.items():
        assert row["wide_loads"] > 0, name
        assert (row["wide_stores"] > 0) == name.startswith("row_gradient"), name


def test_sm90_uses_tensor_cores_and_tma_without_spilling(report):
    gemms, others = report("--arch", "90")
    assert_wide(others)
    assert len(gemms) == 9
    for name, row in gemms.items():
        assert row["hgmma"] > 0, name
        assert row["hmma"] == 0, name
        assert row["tma_loads"] > 0, name
        assert (row["tma_stores"] > 0) == ("train" in name or "store" in name), name
        assert row["shared"] <= SHARED_LIMIT, name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["100", "80"])
def test_other_devices_compile_without_spilling(report, arch):
    gemms, others = report("--arch", arch)
    assert_wide(others)
    for name, row in gemms.items():
        assert row["tcgen05" if arch == "100" else "hmma"] > 0, name


@pytest.mark.slow
def test_float32_and_float16_compile(report):
    """float32 runs on CUDA cores: no tensor-core instruction may round its products to TF32."""
    gemms, _ = report("--dtype", "fp32")
    assert all(row["hgmma"] == row["hmma"] == 0 for row in gemms.values())
    gemms, others = report("--dtype", "fp16")
    assert all(row["hgmma"] > 0 for row in gemms.values())
    assert_wide(others)

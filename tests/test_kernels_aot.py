"""The Triton heads compiled ahead of time for sm_90: what the compiler made of them, without a GPU.

In a process of its own: triton must be imported without TRITON_INTERPRET.
"""

import functools
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED_LIMIT = 232448
"""Bytes of shared memory that one program may have on sm_90."""
REGISTERS = 240
"""Of a thread, for 255: what a patch of the compiler may add before it spills."""
STEP = 128
"""Instructions around four HGMMA: two warps of a scheduler issue them in a quarter of the 1024
cycles that the tensor cores need."""
EPILOGUE = {"train": 6, "train, tail": 6, "score": 6, "train, bias": 5, "score, bias": 5}
"""Instructions per element where no target is. A scaling, an exponential, a sum and half a packing
are 3.5, the next tile's zeros 1. A bias takes the place of these zeros, at the head of the next
tile: another 1, in code that the first tile runs too, which is not counted. The 2048 cycles of a
tile's exponentials hide 8."""
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


def rows_of(root, file, compiled_dir, *arguments):
    """What the report in the tree `root` writes of the kernels there, by name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(compiled_dir)}
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "static_report.py", *arguments, "--json", file],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["kernel"]: row for row in json.loads(file.read_text())["kernels"]}
    assert all(name in done.stdout for name in rows)
    return rows


def static_report(file, compiled_dir, *arguments):
    rows = rows_of(ROOT, file, compiled_dir, *arguments)
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


def gates(name, row):
    """What must hold of a GEMM on sm_90, by name."""
    holds = {
        "spills": (row["spills"], row["stack"]) == (0, 0),
        "registers": row["registers"] <= REGISTERS,
        "step": 0 < row["step"] <= STEP,
    }
    most = EPILOGUE.get(name.removeprefix("gemm_exp: "))
    if most is not None:
        holds["instructions"] = 3.5 < row["epilogue"] <= most
        # A thread has 128 elements: a mask of each is two instructions, and shows on the other way.
        holds["masks"] = row["masks"] < 16
        holds["all masks"] = row["all_masks"] >= 256
    return holds


def test_sm90_uses_tensor_cores_and_tma_without_spilling(report):
    gemms, others = report("--arch", "90")
    assert_wide(others)
    assert len(gemms) == 10
    for name, row in gemms.items():
        assert row["hgmma"] > 0, name
        assert row["hmma"] == 0, name
        assert row["tma_loads"] > 0, name
        assert (row["tma_stores"] > 0) == ("train" in name or "store" in name), name
        assert row["shared"] <= SHARED_LIMIT, name
        assert all(gates(name, row).values()), (gates(name, row), row)
    assert gemms.keys() >= {f"gemm_exp: {variant}" for variant in EPILOGUE}


MUTATIONS = {
    "mask on every way": ("    if masked:\n", "    if True:\n", {"instructions", "masks"}),
    # Both halves of the accumulator, 128 registers, live through both epilogues.
    "sum behind the halves": (
        "DTYPE=DTYPE,\n            )\n\n\n",
        (
            "DTYPE=DTYPE,\n            )\n"
            "        tl.store(sum_ptr + tl.arange(0, BLOCK_M), tl.sum(total, 1))\n\n\n"
        ),
        {"registers", "spills"},
    ),
}
"""A part of linear_logprob.py, what it becomes, and the gates that must find it."""


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_worse_kernel_is_found(mutation, tmp_path, compiled_dir):
    """A gate that no kernel fails would prove nothing of those that pass: one compile each."""
    part, instead, expected = MUTATIONS[mutation]
    for folder in ("benchmarks", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results"))
    (tmp_path / "vpgea_fast").mkdir()
    (tmp_path / "vpgea_fast" / "__init__.py").touch()
    (tmp_path / "vpgea_fast" / "kernels").symlink_to("../kernels")
    file = tmp_path / "kernels" / "linear_logprob.py"
    source = file.read_text()
    assert source.count(part) == 1
    file.write_text(source.replace(part, instead))
    only = ("--only", "gemm_exp: train")
    rows = rows_of(tmp_path, tmp_path / "static.json", compiled_dir, *only)
    (name,) = rows
    failed = {gate for gate, holds in gates(name, rows[name]).items() if not holds}
    assert failed >= expected, rows


LISTING = """
        /*0000*/                   MOV R0, RZ ;
.L_x_0:
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   ISETP.NE.AND P0, PT, R1, RZ, PT ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   FFMA R24, R24, R6.reuse, -R7.reuse ;
        /*0060*/              {skip} BRA `(.L_x_2) ;
        /*0070*/                   ISETP.NE.U32.AND P1, PT, R69, R62, PT ;
        /*0080*/                   FSEL R24, R24, -INF , P1 ;
.L_x_2:
        /*0090*/                   MUFU.EX2 R24, R24 ;
.L_x_1:
        /*00a0*/              @!P2 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
"""


def test_masks_are_counted_on_the_way_that_meets_them(monkeypatch):
    """With a branch around them they are on the longer way; without one on every way."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    machine_code = importlib.import_module("machine_code")
    branched = machine_code.epilogue_of(LISTING.replace("{skip}", "@!P3"))
    assert branched == machine_code.Epilogue(fast=3, masks=0, all_masks=2, step=4)
    straight = LISTING.replace("              {skip} BRA `(.L_x_2)", "                   NOP")
    assert machine_code.epilogue_of(straight) == machine_code.Epilogue(5, 2, 2, 4)
    assert machine_code.epilogue_of("        /*0000*/    MOV R0, RZ ;") is None
    with pytest.raises(ValueError, match="got 0 waits"):
        machine_code.epilogue_of(LISTING.replace("gsb0, 0x0", "gsb0, 0x1"))


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

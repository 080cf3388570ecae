"""What the compiler makes of each Triton kernel, without a GPU: registers, spills, shared memory.

    python benchmarks/static_report.py [--arch 90 100 80] [--dtype bf16] [--only NAME] [--json FILE]

Every launch of `kernels/` is compiled ahead of time as it would be on a large head, then read back:
`cuobjdump -res-usage` for registers and stack, `nvdisasm` for spills, the tensor-core (HGMMA, HMMA,
UTCxMMA) and TMA (UTMALDG, UTMASTG) instructions, and the loads and stores of 16 bytes a thread
(LDG, STG, LDGSTS .128). The Triton code says how wide addresses are: offset64 counts 64-bit offsets
of pointers, stride32 32-bit products with a stride or a number of rows, which end at 2^31 elements.

On sm_90 machine_code.py follows the way of a thread from tile to tile of a GEMM: `epilogue` counts
the instructions per element of E where no target is, `masks` the compares and selects among them,
`all_masks` those of the tiles with targets too, and `step` the instructions of one step of the
product. Other kernels and devices have 0 there.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from machine_code import epilogue_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vpgea_fast.kernels import cublas
from vpgea_fast.kernels import group_kernels as group
from vpgea_fast.kernels import linear_logprob as head
from vpgea_fast.kernels._tiling import TRITON_DTYPE, tile_for
from vpgea_fast.kernels.contract import LogitShape

SHARED_LIMIT = 232448
"""Bytes of shared memory that one program may have on sm_90 and sm_100."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GEMMS = {
    "train": {"STORE": True},
    "train, tail": {"STORE": True, "TAIL": True},
    "train, bias": {"STORE": True, "BIAS": True},
    "train, softcap and bias": {"STORE": True, "CAP": True, "BIAS": True},
    "score": {},
    "score, bias": {"BIAS": True},
    "score, entropy": {"ENTROPY": True},
    "score, softcap and bias": {"CAP": True, "BIAS": True},
    "redo, peak": {"PEAK": True, "FLAGGED": True},
    "redo, store": {"STORE": True, "FLAGGED": True},
}

_STRIDED = r"[^:]*%(?:\w*stride|n_rows)\b[^:]*"
_REDUCE = {"BLOCK_M": 128, "BLOCK_N": 32, "ENTROPY": True}
_TARGET = {"BLOCK_M": 16, "BLOCK_D": 128, "TILE_M": 128, "HALF_N": 128}
_OPERANDS = {"SCALED": True, "BLOCK_M": 8, "BLOCK_D": 512}
SMALL = {
    "target_logit": (head._target_logit, {"BIAS": False, "CAP": False, **_TARGET}),
    "target_logit, softcap and bias": (
        head._target_logit,
        {"BIAS": True, "CAP": True, **_TARGET},
    ),
    "reduce_rows": (head._reduce_rows, {"PEAK": False, "FLAGGED": False, "BITS": 0, **_REDUCE}),
    "reduce_rows, redo": (
        head._reduce_rows,
        {"PEAK": True, "FLAGGED": True, "BITS": 0, **_REDUCE},
    ),
    "reduce_rows, fp16": (
        head._reduce_rows,
        {"PEAK": True, "FLAGGED": False, "BITS": head.FP16_BITS, **_REDUCE},
    ),
    "gradient_operands": (head._gradient_operands, {"LIFT": False, "SLOPE": False, **_OPERANDS}),
    "gradient_operands, lse and softcap": (
        head._gradient_operands,
        {"LIFT": True, "SLOPE": True, **_OPERANDS},
    ),
    "bias_gradient": (head._bias_gradient, {"BLOCK_M": 64, "BLOCK_N": 128}),
}


_ROW = {"ROWS": 1, "BLOCK": 4096}
_PLAIN = {"BIAS": False, "CAP": False, "ENTROPY": False, **_ROW}
_FULL = {"BIAS": True, "CAP": True, "ENTROPY": True, **_ROW}
ROWS = {
    "row_statistics": (cublas.row_statistics, "fp32", _PLAIN),
    "row_statistics, entropy": (cublas.row_statistics, "fp32", {**_PLAIN, "ENTROPY": True}),
    "row_statistics, all": (cublas.row_statistics, "fp32", _FULL),
    "row_statistics, half logits": (cublas.row_statistics, "half", _PLAIN),
    "row_gradient": (cublas.row_gradient, "fp32", _PLAIN),
    "row_gradient, all": (cublas.row_gradient, "fp32", _FULL),
    "row_gradient, half logits": (cublas.row_gradient, "half", _PLAIN),
}


_ANSWERS = {
    "logp_ptr": "*fp32",
    "len_post_ptr": "*i64",
    "len_prior_ptr": "*i64",
    "post_ptr": "*fp64",
    "prior_ptr": "*fp64",
    "base_ptr": "*fp64",
    "gate_ptr": "*i1",
    "replaced_ptr": "*i32",
    "n_answer_tokens": "i32",
    "n_tokens": "i32",
}
_OPTIONAL = {
    "cu_answers_ptr": "*i32",
    "accept_ptr": "*i1",
    "weight_ptr": "*fp32",
    "cu_paths_ptr": "*i32",
    "coef_post_ptr": "*fp32",
    "coef_prior_ptr": "*fp32",
}
_PATHS = {
    **dict.fromkeys("logq_ptr logp_ptr advantage_ptr logq_out_ptr logp_out_ptr".split(), "*fp32"),
    **dict.fromkeys("n_sequences n_tokens n_prior_tokens n_prior".split(), "i32"),
    "cu_ptr": "*i32",
    "gate_ptr": "*i1",
    "kl_ptr": "*fp32",
}
_PARTS = {
    **dict.fromkeys("logq_ptr kl_ptr advantage_ptr weight_ptr parts_ptr".split(), "*fp32"),
    "n_sequences": "i32",
}


def _group(group_size: int, n_prior: int, **options: Any) -> dict[str, Any]:
    """Constants of the group kernel: all options on, none of them a float32 number."""
    return {
        "ALPHA": 0.6,
        "LME": True,
        "REWARD": "likelihood_mix",
        "R_MARGIN": 0.0,
        "U_MIN": -20.1,
        "CLAMP_U": True,
        "ETA_LOW": 0.3,
        "ETA_HIGH": 4.1,
        "EPS": 1e-6,
        "DDOF": 0,
        "STD_GATE": 0.05,
        "BETA": 0.7,
        "TILE": group.TILE,
        "G": group_size,
        "N": n_prior,
        "G_PAD": triton.next_power_of_2(group_size),
        "N_PAD": triton.next_power_of_2(n_prior),
        **options,
    }


_PAPER = {"LME": False, "REWARD": "paper", "R_MARGIN": 0.1, "CLAMP_U": False, "BETA": 0.0}
_TILE = {"BLOCK": group.TILE}
GROUPS = {
    "group_advantage, 32 + 16": (
        group.group_advantage_kernel,
        _ANSWERS | _OPTIONAL,
        _group(32, 16),
    ),
    "group_advantage, 8 + 8": (group.group_advantage_kernel, _ANSWERS | _OPTIONAL, _group(8, 8)),
    "group_advantage, 2 + 1": (group.group_advantage_kernel, _ANSWERS | _OPTIONAL, _group(2, 1)),
    "group_advantage, 8 + 1, paper, U given": (
        group.group_advantage_kernel,
        _ANSWERS,
        _group(8, 1, **_PAPER, ETA_LOW=None, ETA_HIGH=None),
    ),
    "path_sums": (group.path_sums_kernel, _PATHS, _TILE),
    "path_sums, some prior rows": (
        group.path_sums_kernel,
        _PATHS | {"index_ptr": "*i64", "gate_in_ptr": "*i1"},
        _TILE,
    ),
    "loss_parts": (group.loss_parts_kernel, _PARTS, _TILE),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture; counts are of instructions in its machine code."""

    kernel: str
    arch: int
    dtype: str
    registers: int
    stack: int
    spills: int
    shared: int
    hgmma: int
    hmma: int
    tcgen05: int
    tma_loads: int
    tma_stores: int
    wide_loads: int
    wide_stores: int
    offset64: int
    stride32: int
    epilogue: float
    masks: int
    all_masks: int
    step: int


def compile_gemm(variant: str, arch: int, dtype: str) -> Compiled:
    """`_gemm_exp` in one of the variants of GEMMS."""
    flags = {"STORE": False, "PEAK": False, "FLAGGED": False, "CAP": False}
    flags |= {"ENTROPY": False, "TAIL": False, **GEMMS[variant]}
    biased = flags.pop("BIAS", False)
    tile = tile_for(DTYPES[dtype], divmod(arch, 10), capped=flags["CAP"])
    tma = arch >= 90
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    constants = {
        **flags,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": tile.group_m,
        "TMA": tma,
        "DTYPE": TRITON_DTYPE[DTYPES[dtype]],
    }
    pointer = f"*{dtype}"
    types = {
        "hidden": f"tensordesc<{dtype}[{m}, {k}]>" if tma else pointer,
        "weight": f"tensordesc<{dtype}[{n}, {k}]>" if tma else pointer,
        "exps": f"tensordesc<{dtype}[{m}, {n // 2}]>" if tma else pointer,
        "target_ptr": "*i32",
        "flag_ptr": "*i32",
        "holds_ptr": "*i8",
    }
    for name in "n_rows vocabulary width hidden_stride weight_stride exps_stride".split():
        types[name] = "i32"
    absent = {"exps": not flags["STORE"], "bias_ptr": not biased}
    constants |= {name: None for name, gone in absent.items() if gone}
    return _compile(
        name_of(compile_gemm, variant),
        head._gemm_exp,
        types,
        constants,
        arch,
        dtype,
        tile.stages,
        tile.warps,
        elements=m * n // (32 * tile.warps),
    )


def compile_small(variant: str, arch: int, dtype: str) -> Compiled:
    """One of the kernels around the GEMM, in one of the variants of SMALL."""
    kernel, flags = SMALL[variant]
    types = {"target_ptr": "*i32", "flag_ptr": "*i32", "holds_ptr": "*i8"}
    for name in "hidden_ptr weight_ptr bias_ptr exps_ptr scaled_ptr".split():
        types[name] = f"*{dtype}"
    sizes = "n_rows width halves vocabulary tiles_n hidden_stride weight_stride exps_stride"
    for name in sizes.split():
        types[name] = "i32"
    constants = dict(flags)
    if "DTYPE" in kernel.arg_names:
        constants["DTYPE"] = TRITON_DTYPE[DTYPES[dtype]]
    return _compile(variant, kernel, types, constants, arch, dtype, stages=3, warps=4)


def compile_rows(variant: str, arch: int, dtype: str) -> Compiled:
    """One of the passes over the logits of the cuBLAS head, in one of the variants of ROWS."""
    kernel, logits, flags = ROWS[variant]
    logits = dtype if logits == "half" else logits
    types = {"logits_ptr": f"*{logits}", "dlogits_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
    types |= {"target_ptr": "*i32"}
    for name in "n_rows vocabulary logits_stride dlogits_stride".split():
        types[name] = "i32"
    constants = dict(flags)
    if not flags["BIAS"]:
        constants["bias_ptr"] = None
    if "DTYPE" in kernel.arg_names:
        constants["DTYPE"] = TRITON_DTYPE[DTYPES[dtype]]
        constants["NARROWS"] = logits != dtype
    return _compile(variant, kernel, types, constants, arch, dtype, stages=3, warps=cublas.WARPS)


def build_group(variant: str, arch: int) -> Any:
    """One of the group kernels, in one of the variants of GROUPS; fused multiply-adds are off."""
    kernel, types, constants = GROUPS[variant]
    absent = dict.fromkeys(set(kernel.arg_names) - types.keys())
    return build(kernel, types, absent | constants, arch, stages=3, warps=4, fusion=False)


def compile_group(variant: str, arch: int, dtype: str) -> Compiled:
    return read(variant, build_group(variant, arch), arch, dtype)


def _compile(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    dtype: str,
    stages: int,
    warps: int,
    elements: int = 0,
) -> Compiled:
    types, constants = _shaped(kernel, types, constants)
    built = build(kernel, types, constants, arch, stages=stages, warps=warps, fusion=True)
    return read(name, built, arch, dtype, elements)


def _shaped(
    kernel: Any, types: dict[str, Any], constants: dict[Any, Any]
) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Turns the flag CAP into the type of a LogitShape: without a cap its None is a constant."""
    rest = dict(constants)
    capped = rest.pop("CAP", None)
    if capped is None:
        return types, rest
    if not capped:
        rest[kernel.arg_names.index("shape"), 1] = None
    shape = LogitShape("fp32", "fp32" if capped else "constexpr")
    return types | {"shape": shape}, rest


def build(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    *,
    stages: int,
    warps: int,
    fusion: bool,
) -> Any:
    """Compiled as at a launch: pointers and the sizes that Triton specialises are multiples of 16.

    Pointers default to float32.
    """
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "*fp32")
        for argument in kernel.arg_names
    }
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(kernel.params)
        if str(signature[parameter.name]).startswith("*")
        or (signature[parameter.name] == "i32" and not parameter.do_not_specialize)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def read(name: str, built: Any, arch: int, dtype: str, elements: int = 0) -> Compiled:
    """What the compiler made, from its machine code and its Triton code.

    elements: of a GEMM's tile that one thread has; 0 of other kernels.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        # The flow of data takes a third of its time; instructions are counted, and the same.
        code = _tool("nvdisasm", "-c", "--no-dataflow", file.name)

    ttir = built.asm["ttir"]

    def used(key: str) -> int:
        found = re.search(rf"\b{key}:(\d+)", usage)
        if found is None:
            raise ValueError(f"cuobjdump -res-usage names no {key}: got {usage!r}")
        return int(found.group(1))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    path = epilogue_of(code) if elements else None
    return Compiled(
        kernel=name,
        arch=arch,
        dtype=dtype,
        registers=used("REG"),
        stack=used("STACK"),
        spills=count(r"\b(?:LDL|STL)\b"),
        shared=built.metadata.shared,
        hgmma=count(r"\bHGMMA\b"),
        hmma=count(r"\bHMMA\b"),
        tcgen05=count(r"\bUTC\w*MMA\b"),
        tma_loads=count(r"\bUTMALDG\b"),
        tma_stores=count(r"\bUTMASTG\b"),
        wide_loads=count(r"\b(?:LDG|LDGSTS)\S*\.128\b"),
        wide_stores=count(r"\bSTG\S*\.128\b"),
        offset64=len(re.findall(r"tt\.addptr .* : .*, (?:tensor<[\dx]+)?i64", ttir)),
        stride32=len(re.findall(rf"arith\.muli {_STRIDED} : (?:tensor<[\dx]+)?i32", ttir)),
        epilogue=round(path.fast / elements, 2) if path else 0.0,
        masks=path.masks if path else 0,
        all_masks=path.all_masks if path else 0,
        step=path.step if path else 0,
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def table(rows: list[Compiled]) -> str:
    """One line a kernel, under the field names."""
    lines = [list(asdict(rows[0])), *([str(x) for x in asdict(row).values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def name_of(compile_one: Any, variant: str) -> str:
    """As in the table: the variants of the GEMM carry its name."""
    return f"gemm_exp: {variant}" if compile_one is compile_gemm else variant


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="90, 100, 80")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=sorted(DTYPES))
    parser.add_argument("--only", metavar="NAME", help="one kernel, such as 'gemm_exp: train'")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    heads = ((compile_gemm, GEMMS), (compile_small, SMALL), (compile_rows, ROWS))
    names = [
        name_of(compile_one, variant) for compile_one, variants in heads for variant in variants
    ]
    if options.only is not None and options.only not in (*names, *GROUPS):
        parser.error(
            f"--only: got {options.only!r}, expected one of {', '.join((*names, *GROUPS))}"
        )
    rows = []
    for arch in options.arch:
        rows += [
            compile_one(variant, arch, dtype)
            for dtype in options.dtype
            for compile_one, variants in heads
            for variant in variants
            if options.only in (None, name_of(compile_one, variant))
        ]
        rows += [
            compile_group(variant, arch, "fp64")
            for variant in GROUPS
            if options.only in (None, variant)
        ]
    print(f"triton {triton.__version__}\n{table(rows)}")
    if options.json:
        rendered = {"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(rendered, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

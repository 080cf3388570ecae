"""A borrowed machine that has torch, Triton and transformers and no network: what it lacks.

The wheels are the pins of constraints.txt for Python 3.12 on Linux, carried in a folder: 31 MB, so
without datasets, pyarrow and pandas (80 MB; only parquet files and the Hub need them), without
flash-attn, and without anything that a CUDA build of torch, Triton or transformers brings.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.12"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
CARRIED = {
    "annotated-types": "annotated_types",
    "antlr4-python3-runtime": "antlr4",
    "contourpy": "contourpy",
    "cycler": "cycler",
    "fonttools": "fontTools",
    "hypothesis": "hypothesis",
    "iniconfig": "iniconfig",
    "Jinja2": "jinja2",
    "kiwisolver": "kiwisolver",
    "latex2sympy2_extended": "latex2sympy2_extended",
    "liger_kernel": "liger_kernel",
    "markdown-it-py": "markdown_it",
    "MarkupSafe": "markupsafe",
    "math-verify": "math_verify",
    "matplotlib": "matplotlib",
    "mdurl": "mdurl",
    "packaging": "packaging",
    "pillow": "PIL",
    "pluggy": "pluggy",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic_core",
    "Pygments": "pygments",
    "pyparsing": "pyparsing",
    "pytest": "pytest",
    "pytest-timeout": "pytest_timeout",
    "python-dateutil": "dateutil",
    "PyYAML": "yaml",
    "rich": "rich",
    "sortedcontainers": "sortedcontainers",
    "typing_extensions": "typing_extensions",
    "typing-inspection": "typing_inspection",
    "tzdata": "tzdata",
}
"""Distribution -> the module that it gives; closed under requirements, torch's and transformers'
aside. What is there but too old for another, as typing_extensions may be, pip takes from here."""
OPTIONAL = ("liger_kernel",)
"""Makes the training faster; nothing fails without it."""


def missing() -> list[str]:
    """Distributions of CARRIED that are not installed here."""
    return [name for name, module in CARRIED.items() if importlib.util.find_spec(module) is None]


def advice(names: Sequence[str], folder: str = "DIR") -> str:
    """One line: what is missing and how to install it from a folder of wheels."""
    words = " ".join(names)
    return (
        f"missing here: {words}; carry them from a machine with a network (python "
        f"benchmarks/on_gpu.py wheels {folder}), then: pip install --no-index "
        f"--find-links {folder} {words}"
    )


def pins() -> list[str]:
    """`name==version` of every carried distribution, from constraints.txt. Errors: ValueError."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    known = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    if unknown := sorted(CARRIED.keys() - known.keys()):
        raise ValueError(
            f"constraints.txt pins no {', '.join(unknown)}; add the pins, or mend CARRIED"
        )
    return [f"{name}=={known[name]}" for name in CARRIED]


def download(folder: Path) -> int:
    """Fetch the wheels with pip; print their number, their size and what to do with them. The exit
    status is pip's."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, "--dest", str(folder), *pins()], check=False)
    if done.returncode:
        return done.returncode
    sizes = [path.stat().st_size for path in folder.glob("*.whl")]
    print(f"on_gpu: {len(sizes)} wheels, {sum(sizes) / 2**20:.1f} MiB, in {folder}")
    print(
        f"on_gpu: there, with Python {PYTHON}: pip install --no-index --find-links {folder} NAMES; "
        "on_gpu.py says which NAMES are missing"
    )
    return 0


# --- tests that can run ---------------------------------------------------------------------------


def runnable(files: Sequence[Path], absent: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Test files that import nothing of `absent`, and for each of the others what it needs.

    Imports inside functions count too, but for those of conftest.py, whose fixtures few tests ask
    for. pytest reads conftest.py and its configuration first: without hypothesis and
    pytest-timeout no test runs.
    """
    gone = {CARRIED[name]: name for name in absent if name not in OPTIONAL}
    conftest = ROOT / "tests" / "conftest.py"
    always = {"pytest", "pytest_timeout"} | _imported(conftest, deep=False)
    good, left_out = [], {}
    for file in files:
        lacks = sorted(gone[m] for m in (always | _closure(file)) & gone.keys())
        if lacks:
            left_out[file.relative_to(ROOT).as_posix()] = f"needs {', '.join(lacks)}"
        else:
            good.append(file)
    return good, left_out


def _closure(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports, itself or by files of this project."""
    seen, waiting, names = set(), [file], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        # What a package imports in a function is what it offers on demand: few tests ask for it.
        for name in _imported(current, deep=current.name != "__init__.py"):
            names.add(name.partition(".")[0])
            waiting += _files(name)
    return names


@functools.cache
def _files(module: str) -> list[Path]:
    """Of this project: the module's, and those of the packages around it."""
    parts = module.split(".")
    roots = (ROOT, ROOT / "tests", ROOT / "benchmarks")
    paths = [root.joinpath(*parts[: n + 1]) for n in range(len(parts)) for root in roots]
    files = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return [file for file in files if file.is_file()]


@functools.cache
def _imported(file: Path, *, deep: bool) -> frozenset[str]:
    """Dotted names that a file imports; without `deep` only what is imported with the file."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("with_name"):
            program = str(getattr(node.args[0], "value", ""))  # a file beside it, run as a program
            if program.endswith(".py"):
                beside = file.with_name(program).relative_to(ROOT).with_suffix("")
                names.add(".".join(beside.parts))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        elif deep or not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)
    return frozenset(names)

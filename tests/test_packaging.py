"""The sdist and the wheel, installed in an empty environment outside the tree, import and compute.

Each is installed by pip into a new virtual environment that holds nothing else; torch comes in
through a path file that names this environment's site-packages (path files found there are not
followed, so an editable install of the project stays invisible). Both are tried without and with
the Hugging Face package `kernels`, whose name the root folder kernels/ shares.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", ".*cache", ".hypothesis", "*.egg-info", "build", "dist", "runs"
)
# argv: the environment's own site-packages, whether `kernels` is installed.
CHECK = """
import sys
import importlib.util
import vpgea_fast.kernels.reference as reference
import vpgea_fast.losses as losses
import torch

home, has_kernels = sys.argv[1], sys.argv[2] == "True"
for module in (reference, losses):
    assert module.__file__.startswith(home), module.__file__
spec = importlib.util.find_spec("kernels")
assert (spec is not None) == has_kernels, spec
if has_kernels:
    import kernels
    assert kernels.__file__.startswith(home) and kernels.get_kernel, kernels.__file__

hidden_TD, weight_VD = torch.randn(3, 4), torch.randn(5, 4)
targets_T = torch.tensor([0, 4, -100])
out = losses.linear_logprob(hidden_TD, weight_VD, targets_T, backend="reference")
expected_T = (hidden_TD[:2] @ weight_VD.T).log_softmax(-1)[[0, 1], [0, 4]]
torch.testing.assert_close(out.logp, torch.cat([expected_T, torch.zeros(1)]))
"""


def not_source(folder: str, names: list[str]) -> set[str]:
    """What .gitignore names; `data` is questions at the root, and a room in the package."""
    return NOT_SOURCE(folder, names) | ({"data"} if Path(folder) == ROOT else set())


def run(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{"sdist": file, "wheel": file}, the wheel built from the sdist, neither from this tree."""
    folder = tmp_path_factory.mktemp("packaging")
    tree, out = folder / "tree", folder / "dist"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=not_source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=folder)
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


@pytest.fixture(scope="module")
def kernels_wheel(tmp_path_factory):
    """The pinned Hugging Face package `kernels`; no index that has it is a failure, not a skip."""
    folder = tmp_path_factory.mktemp("huggingface")
    pip = [sys.executable, "-m", "pip"]
    pins = ["-c", ROOT / "constraints.txt"]
    run(*pip, "download", "--quiet", "--no-deps", *pins, "kernels", cwd=folder)
    return next(folder.glob("kernels-*.whl"))


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_installed_outside_the_tree_with_and_without_kernels(built, kind, kernels_wheel, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, symlinks=True)
    home = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(environment)}))
    (home / "torch.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]

    run(*install, "--no-build-isolation", built[kind], cwd=tmp_path)
    run(python, "-c", CHECK, home, False, cwd=tmp_path)
    run(*install, kernels_wheel, cwd=tmp_path)
    run(python, "-c", CHECK, home, True, cwd=tmp_path)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    tracked = [path for path in (ROOT / "vpgea_fast").rglob("*") if "tiny_base" in path.parts]
    tracked += [path for path in (ROOT / "vpgea_fast").rglob("*.py") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in tracked if path.is_file()}
    expected |= {f"vpgea_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected |= {"vpgea_fast/py.typed"}
    expected |= {f"vpgea_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").glob("README.md")}
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected, "list every package and data file in setup.py"


def test_the_sdist_holds_the_tests_and_no_output(built):
    with tarfile.open(built["sdist"]) as sdist:
        paths = {PurePosixPath(*PurePosixPath(name).parts[1:]) for name in sdist.getnames()}
    wanted = {"setup.py", "constraints.txt", "Makefile", "LICENSE", "tests/conftest.py"}
    assert {PurePosixPath(name) for name in wanted} <= paths
    roots = {path.parts[0] for path in paths if path.parts}
    assert not roots & {"data", "runs", "build", ".venv", ".git"}


def test_constraints_pin_every_direct_requirement(built):
    """So that `make` installs the same stack every time; it installs no extra but dev."""
    with zipfile.ZipFile(built["wheel"]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    wanted = [Requirement(line[15:]) for line in lines if line.startswith("Requires-Dist: ")]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": "dev"})]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pinned = {canonicalize_name(Requirement(line).name) for line in pins}
    assert {"torch", "transformers", "pytest"} <= {r.name for r in wanted}
    assert [r.name for r in wanted if canonicalize_name(r.name) not in pinned] == []


def test_the_script_of_a_clean_clone_runs_every_target_and_finds_the_data_beside_it(tmp_path):
    """`make` is a stand-in that notes its words and VPGEA_DATA; one that fails ends the script."""
    clone, noted = tmp_path / "clone", tmp_path / "noted"
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(f'#!/bin/sh\necho "$* ${{VPGEA_DATA-unset}}" >> {noted}\ntest "$*" != "$BAD"\n')
    make.chmod(0o755)
    around = {k: v for k, v in os.environ.items() if k != "VPGEA_DATA"}
    around["PATH"] = f"{make.parent}:{around['PATH']}"

    def run(**more):
        noted.unlink(missing_ok=True)
        done = subprocess.run([clone / ".ci" / "run"], env=around | more, cwd="/", check=False)
        return done.returncode, noted.read_text().splitlines()

    targets = ["test", "test-triton36", "test-vllm"]
    assert run() == (0, [f"{target} unset" for target in targets])
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert run() == (0, [f"{target} {tmp_path}/shared/data" for target in targets])
    assert run(VPGEA_DATA="/mine")[1] == [f"{target} /mine" for target in targets]
    code, lines = run(BAD="test-triton36")
    assert code != 0
    assert len(lines) == 2

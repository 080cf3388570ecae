"""The Triton heads, run by Triton's interpreter on a CPU, and by a GPU where there is one.

TRITON_INTERPRET is read when triton is imported, so each has a process of its own; the
ahead-of-time tests (test_kernels_aot.py) need one without it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("*.py"))
HEADS = HERE / "interpreted" / "linear_logprob.py"
"""The only one with tensors that follow the device."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(file, *words, interpret=True):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(HERE.parent),
        **({"TRITON_INTERPRET": "1"} if interpret else {}),
    }
    done = subprocess.run(
        [*command, *words], env=environment, cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    run(file, "-x")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter_at_length(file):
    run(file, "-m", "slow and not gpu")


SHARDS = {
    "float32": "triton and dtype0",
    "bfloat16": "triton and dtype1",
    "float16": "triton and dtype2",
    "others": "triton and not dtype",
    "cublas": "cublas",
}
"""Most of the time goes into compiling, so a machine with many cores runs them side by side."""


@pytest.mark.gpu
@pytest.mark.timeout(540)
@pytest.mark.parametrize("shard", SHARDS)
def test_on_the_device(shard):
    run(HEADS, "-m", "", "--tb=short", "-k", SHARDS[shard], interpret=False)


COLLECT = """
import sys
import pytest
from _pytest.mark import deselect_by_keyword, deselect_by_mark

file, *selections = sys.argv[1:]


class Selections:
    # First: before pytest itself drops what this run does not select, which is nothing.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items, config):
        for marker, words in zip(selections[::2], selections[1::2], strict=True):
            found = [*items]
            config.option.markexpr, config.option.keyword = marker, words
            deselect_by_mark(found, config)
            deselect_by_keyword(found, config)
            assert found, (marker, words)
        config.option.markexpr = config.option.keyword = ""


words = ["-q", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "", file]
assert pytest.main(words, [Selections()]) == 0
"""


def test_every_selection_finds_a_test():
    """pytest fails a run that selects nothing, which only a GPU, or a slow run, would show."""
    selections = [("slow and not gpu", ""), *(("", words) for words in SHARDS.values())]
    command = [sys.executable, "-c", COLLECT, str(HEADS), *sum(selections, ())]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

"""The Triton kernels, run by Triton's interpreter on a CPU, and by a GPU where there is one.

TRITON_INTERPRET is read when triton is imported, so each has a process of its own; the
ahead-of-time tests (test_kernels_aot.py) need one without it.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("*.py"))
HEADS = HERE / "interpreted" / "linear_logprob.py"
"""The only one with tensors that follow the device."""
GROUPS = HERE / "test_group_kernels.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(*words, interpret=True, program=("-m", "pytest")):
    """Run pytest in a process of its own; how many tests passed."""
    command = [sys.executable, *program, "-q", "-p", "no:cacheprovider", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(HERE.parent),
        **({"TRITON_INTERPRET": "1"} if interpret else {}),
    }
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.findall(r"(\d+) passed", done.stdout)[-1])


SHARDS = {
    "float32": "triton and dtype0",
    "bfloat16": "triton and dtype1",
    "float16": "triton and dtype2",
    "others": "triton and not dtype",
    "cublas": "cublas",
}
"""Most of the time goes into compiling, so a machine with many cores runs them side by side."""
SELECTIONS = [("slow and not gpu", ""), *(("", words) for words in SHARDS.values())]
CHECKED = f"""
import sys
import pytest
from _pytest.mark import deselect_by_keyword, deselect_by_mark

class Selections:
    # First: before pytest itself drops what this run does not select.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items, config):
        given = config.option.markexpr, config.option.keyword
        for marker, words in {SELECTIONS}:
            found = [item for item in items if str(item.path) == {str(HEADS)!r}]
            config.option.markexpr, config.option.keyword = marker, words
            deselect_by_mark(found, config)
            deselect_by_keyword(found, config)
            assert found, (marker, words)
        config.option.markexpr, config.option.keyword = given

sys.exit(pytest.main(sys.argv[1:], [Selections()]))
"""
"""pytest fails a run that selects nothing, which only a GPU, or a slow run, would show."""


@pytest.mark.around
def test_in_the_interpreter():
    """All files in one process, whose imports are 8 s; every selection below finds a test."""
    assert run(*FILES, GROUPS, "-x", program=("-c", CHECKED)) > 80


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter_at_length(file):
    run(file, "-m", "slow and not gpu")


@pytest.mark.gpu
@pytest.mark.timeout(540)
@pytest.mark.parametrize("shard", SHARDS)
def test_on_the_device(shard):
    run(HEADS, "-m", "", "--tb=short", "-k", SHARDS[shard], interpret=False)

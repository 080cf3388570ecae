"""The examples in docstrings say what the code does."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vpgea_fast"


def modules():
    """Files that hold an example, by module name; the kernels are reached through their link."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    with_examples = {file for file in files if ">>> " in file.read_text(encoding="utf-8")}
    parts = [file.relative_to(PACKAGE.parent).with_suffix("").parts for file in with_examples]
    return sorted(".".join(part for part in words if part != "__init__") for words in parts)


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0

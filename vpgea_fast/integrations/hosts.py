"""What every adapter to another trainer shares: the versions it was tested with, and its switch."""

from __future__ import annotations

import importlib
import types
import warnings
from collections.abc import Callable
from typing import Self

from packaging.requirements import Requirement


class Switch:
    """Something that is on. `disable()`, or the end of a `with`, turns it off; off twice is off."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def disable(self) -> None:
        """Give the host its own functions back."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


def imported(path: str, tested: str) -> types.ModuleType:
    """A module of the host. ImportError, with what to install, where it cannot be imported."""
    try:
        return importlib.import_module(path)
    except ImportError as error:
        name = Requirement(tested).name
        raise ImportError(f"{name} is not there ({error}): pip install '{tested}'") from error


def check_version(tested: str, version: str) -> None:
    """Warn (UserWarning, of the caller of `enable`) where `tested`, "trl>=1.16,<1.17", is unmet."""
    requirement = Requirement(tested)
    if not requirement.specifier.contains(version, prereleases=True):
        warnings.warn(
            f"{requirement.name} {version} is not tested with vpgea_fast: {tested} is. Compare a "
            "step with and without it, or install that",
            stacklevel=4,
        )


def changed(tested: str, version: str, what: str) -> RuntimeError:
    """The error of a host in which what an adapter replaces is not what it was."""
    name = Requirement(tested).name
    return RuntimeError(
        f"{name} {version}: {what}, so its head cannot be replaced; install '{tested}'"
    )

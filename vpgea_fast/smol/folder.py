"""A directory that appears complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SmolError(ValueError):
    """A model or problems that cannot be made; the message says what was got and what to do."""


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Make a directory beside `out` and give it that name when the block ends without an error."""
    # Beside, and renamed when complete: a kill never leaves half of it under its name.
    aside = out.parent / f".{out.name}.{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(out)  # also onto an empty directory; POSIX refuses one that has filled
    except OSError as error:
        raise SmolError(
            f"cannot write {out}: {error.strerror or error}; give a directory that can be "
            "written, on a disk with room"
        ) from error
    finally:
        # Nothing is there after the rename: this is for a try that failed.
        shutil.rmtree(aside, ignore_errors=True)


def filled(out: Path) -> bool:
    """Whether something is there: an empty directory is as good as none."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))

"""A directory that appears complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(out: Path, *, what: str = "", error: type[ValueError] = ValueError) -> Iterator[Path]:
    """Make a directory beside `out` and give it that name when the block ends without an error.

    `error` for one that cannot be written; `what` it is, for the message.
    """
    # Beside, and renamed when complete: a kill never leaves half of it under its name.
    aside = out.parent / f".{out.name}.{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(out)  # also onto an empty directory; POSIX refuses one that has filled
    except OSError as fault:
        raise error(
            f"cannot write {what}{out}: {fault.strerror or fault}; give a directory that can be "
            "written, on a disk with room"
        ) from fault
    finally:
        # Nothing is there after the rename: this is for a try that failed.
        shutil.rmtree(aside, ignore_errors=True)


def filled(out: Path) -> bool:
    """Whether something is there: an empty directory is as good as none."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))

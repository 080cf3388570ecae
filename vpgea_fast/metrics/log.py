"""What a run writes: metrics.jsonl and paths.jsonl, and how they are read again.

Metrics are a flat dict per step: what `MetricsWriter` writes, `Console` prints from and `Alarms`
watches, so a replay of metrics.jsonl puts all of them back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

METRICS, PATHS = "metrics.jsonl", "paths.jsonl"

KEY = re.compile(r"[a-z][a-z0-9_]*")

MAX_SPANS = 8  # gaps that a message lists before it only counts them


class MetricsWriter:
    """Appends to metrics.jsonl and paths.jsonl, flushed: a kill costs the last line at most.

    NaN and infinity, which JSON does not have, become null.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        # Append: a resumed run goes on behind the lines that `truncate_jsonl` left.
        self._metrics = (self.run_dir / METRICS).open("a", encoding="utf-8")
        self._paths = (self.run_dir / PATHS).open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """One step's line. ValueError for a name that is not snake_case ASCII."""
        wrong = [key for key in record if not KEY.fullmatch(key)]
        if wrong:
            raise ValueError(f"metric names: got {wrong}, expected snake_case ASCII like kl_q_pi")
        self._append(self._metrics, [record])

    def write_paths(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._append(self._paths, records)

    def _append(self, file: TextIO, records: Sequence[Mapping[str, Any]]) -> None:
        # All lines before the first byte: a value that JSON lacks leaves the file as it was.
        lines = [json.dumps(_json_ready(record), allow_nan=False) + "\n" for record in records]
        try:
            file.write("".join(lines))
            # To the kernel, not to the disk: only a power cut loses what was flushed.
            file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot append to {file.name} ({error.strerror}); free disk space and go on with "
                f"--resume {self.run_dir}",
            ) from error

    def close(self) -> None:
        self._metrics.close()
        self._paths.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_steps(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics.jsonl; none without the file. An unfinished last line, of
    a live or a killed run, is left out.

    Raises ValueError with file and line number for anything else that is no step's JSON object.
    """
    path = Path(run_dir) / METRICS
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"{path}: got a directory, expected the lines of the steps; move it away")
    remedy = "delete the line, or let --resume take it out"
    # Bytes: a torn last line may end inside a character.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):  # its writer lives, or was killed in the middle of it
                    return
                raise ValueError(f"{where}: not JSON ({error}); {remedy}") from error
            step = record.get("step") if isinstance(record, dict) else None
            # bool is an int to Python; a step beyond int32 would make missing_steps run for hours
            if type(step) is not int or not 0 <= step < 2**31:
                got = f"step {step!r}" if isinstance(record, dict) else f"a {type(record).__name__}"
                raise ValueError(f"{where}: got {got}, expected an object of a step; {remedy}")
            yield record


def missing_steps(seen: Collection[int], upto: int) -> str:
    """Which of the steps 1 to `upto` are not in `seen`, in words; "" where none is missing.

    >>> missing_steps({1, 2, 4, 8}, 9)
    '3, 5 to 7, 9'
    """
    spans: list[list[int]] = []
    for step in range(1, upto + 1):
        if step in seen:
            continue
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    words = [f"{a}" if a == b else f"{a} to {b}" for a, b in spans]
    more = [f"{len(words) - MAX_SPANS} more gaps"] if len(words) > MAX_SPANS else []
    return ", ".join(words[:MAX_SPANS] + more)


def finite(value: Any) -> float | None:
    """`value` as a float, or None for what has none: None, NaN, infinity, text."""
    # bool is an int to Python, and no measurement.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _json_ready(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    return value

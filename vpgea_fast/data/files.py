"""Rows of a source, numbered: a file of one of the KINDS, a directory, or the Hub.

What a file holds decides where its suffix leaves it open (`.json`). Numbers keep every digit. What
cannot be read is a DataError with the file and the line or row: never another error.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

from vpgea_fast import hub
from vpgea_fast.config import one_line

HUB = re.compile(r"hub:(?P<name>[^/:]+/[^/:]+)(/(?P<config>[^:]+))?(:(?P<split>.+))?")
KINDS = "a JSONL file, .json, .csv, .tsv, .parquet, a directory, or hub:owner/name[/config][:split]"
FIELD_LIMIT = 1 << 24  # characters of a CSV cell; Python's own limit is 131,072
CONTAINERS = ("data", "rows", "examples", "questions", "problems", "instances", "items")
"""Keys under which one JSON object may hold the list of rows."""
MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
}

Row = Mapping[str, Any]


class DataError(ValueError):
    """Data that cannot be used; the message says where, what was got and what to do."""


def open_rows(source: str) -> tuple[str, Iterator[tuple[int, Row]]]:
    """What a row is called there ("line" or "row"), and the numbered rows."""
    path = Path(source).expanduser() if source.startswith("~/") else Path(source)
    if source.startswith("hub:"):
        return "row", enumerate(_hub_rows(source), 1)
    if path.is_dir():
        return "row", enumerate(_directory_rows(path), 1)
    if not path.is_file():
        raise DataError(f"there is no file {source}; expected {KINDS}")
    try:
        with path.open("rb") as file:
            # Enough for every magic number, and for the first zero of UTF-16 or a binary.
            head = file.read(1 << 16)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; see its rights") from error
    suffix = path.suffix.lower()
    # By content too: downloads often lose their suffix.
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return "row", enumerate(_parquet_rows(path), 1)
    _check_text(path, head)
    if suffix in (".csv", ".tsv"):
        return "line", _table_lines(path, "," if suffix == ".csv" else "\t")
    return _json_rows(path)


def _check_text(path: Path, head: bytes) -> None:
    what = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if what is None and b"\0" in head:
        what = f"binary or UTF-16 (a zero at byte {head.index(0)})"
    if what is not None:
        raise DataError(f"{path} is {what}; expected {KINDS}, its text in UTF-8")


def _json_rows(path: Path) -> tuple[str, Iterator[tuple[int, Row]]]:
    """JSONL, or one JSON text: an array of objects, or an object that holds one.

    JSONL is read line by line, so that `limit` rows of a large file cost no more than that.
    """
    with path.open("rb") as file:
        # Two lines tell JSONL from one JSON text, whatever the size of the file.
        first, second = (*islice((line for line in file if line.strip()), 2), b"", b"")[:2]
    start = first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    whole = first.rstrip().endswith(b"}")  # a line that is an object
    if start == b"[":
        return "row", enumerate(_objects(path, _whole(path)), 1)
    # An object over several lines, or one object alone: either may hold the rows under a key.
    if start == b"{" and not (whole and second):
        try:
            value = _whole(path)
        # A .jsonl whose first line is damaged: the reader of lines names that line.
        except DataError:
            if not whole and path.suffix.lower() == ".json":
                raise
        else:
            held = _held(path, value)
            if held is not None or not whole:
                return "row", enumerate(_objects(path, held or [value]), 1)
    return "line", _json_lines(path)


def _whole(path: Path) -> Any:
    return _loads(path.read_bytes(), place=str(path), numbered=True)


def _held(path: Path, value: Mapping[str, Any]) -> list[Any] | None:
    """The rows that one JSON object holds under a key of CONTAINERS, if it does."""
    # Two lists may be train and test: nobody knows which is meant.
    held = [key for key in CONTAINERS if _is_table(value.get(key))]
    if len(held) > 1:
        raise DataError(
            f"{path} is one JSON object with the lists {held}; put the rows to use in a file of "
            "their own"
        )
    return value[held[0]] if held else None


def _objects(path: Path, rows: list[Any]) -> list[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number}: a {type(row).__name__} instead of an object: "
                f"{str(row)[:60]!r}; expected an array of JSON objects, or one object a line"
            )
    return rows


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}, line {number}"
                row = _loads(line.rstrip(), place=place)
                if not isinstance(row, dict):
                    raise DataError(
                        f"{place}: a {type(row).__name__} instead of an object: {line[:60]!r}; "
                        "expected one JSON object a line"
                    )
                yield number, row


def _loads(text: bytes, *, place: str, numbered: bool = False) -> Any:
    """JSON whose numbers keep all digits; `numbered`: errors also say the line of `text`."""
    try:
        return json.loads(text.decode("utf-8-sig"), parse_float=_decimal, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place += f", line {error.lineno}" * numbered
        # Some messages end in the word: `Unterminated string starting at`.
        wrong = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        # The message shows the line, not the head of a file of gigabytes.
        text = text.split(b"\n")[error.lineno - 1] if numbered else text
    except UnicodeDecodeError as error:
        number = text.count(b"\n", 0, error.start)
        place += f", line {number + 1}" * numbered
        wrong, text = str(error), text.split(b"\n")[number]
    except (ValueError, RecursionError) as error:
        wrong = str(error)
    raise DataError(
        f"{place}: {wrong}: {text[:60]!r}; expected JSON objects, one a line or in one array, "
        "in UTF-8"
    )


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent of twenty digits
        raise ValueError(f"the number {text[:40]} is out of every range") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    # json keeps the last of two equal keys and says nothing.
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return record


def _table_lines(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Rows of CSV or TSV, numbered by the line where each begins."""
    # A limit of the process: worked solutions exceed Python's own.
    csv.field_size_limit(FIELD_LIMIT)
    reader, number = None, 1
    try:
        with path.open("rb") as file:
            lines = (line.decode("utf-8") for line in file)  # so that an error knows its line
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            keys: list[str] = []
            for cells in reader:
                # A quoted cell may hold line breaks, so a row begins where the last one ended.
                place, number = number, reader.line_num + 1
                if not keys and cells:
                    keys = _header(path, cells)
                elif cells:
                    if len(cells) != len(keys):
                        raise DataError(
                            f"{path}, line {place}: got {len(cells)} fields, expected the "
                            f"{len(keys)} of the header ({keys}); repair the line, or quote what "
                            f"holds a {delimiter!r}"
                        )
                    yield place, dict(zip(keys, cells, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}, line {number}: {error}; expected {path.suffix[1:].upper()} in UTF-8"
        ) from error


def _header(path: Path, cells: list[str]) -> list[str]:
    keys = [cell.strip().removeprefix("\ufeff") for cell in cells]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(
            f"{path}, line 1: two columns are called {twice!r}; expected a header with one name "
            "a column"
        )
    return keys


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from _batch_rows(batch)
    except (ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"{path} is not a readable parquet file: {one_line(error)}; write it again"
        ) from error


def _batch_rows(batch: Any) -> Iterator[Row]:
    """Rows of an Arrow table as Python values; of narrow floats, each with its own spelling."""
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise DataError(f"two columns of one name among {names}")
    # By the type's name, so that floats inside lists and structs are found too.
    narrow = {f.name: f.type for f in batch.schema if re.search(r"\b(half)?float\b", str(f.type))}
    for row in batch.to_pylist():
        yield {**row, **{name: _narrow(row[name], kind) for name, kind in narrow.items()}}


def _narrow(value: Any, kind: Any) -> Any:
    """A float32 0.1 becomes float64 0.10000000149011612: numpy's scalar still prints 0.1."""
    import numpy as np
    from pyarrow import types

    if value is None:
        return None
    if types.is_float32(kind) or types.is_float16(kind):
        return (np.float32 if types.is_float32(kind) else np.float16)(value)
    if types.is_struct(kind):
        return {f.name: _narrow(value[f.name], f.type) for f in kind.fields}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_narrow(item, kind.value_type) for item in value]
    return value


def _directory_rows(path: Path) -> Iterator[Row]:
    """A directory that `datasets` saved, or one of data files; of several splits `train`."""
    import datasets

    def load() -> Any:
        # The two marks of save_to_disk; any other directory is one of data files.
        if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), split="train")
        saved = datasets.load_from_disk(str(path))
        return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved

    return _dataset_rows(load, str(path), "a split `train` in the directory")


def _hub_rows(source: str) -> Iterator[Row]:
    parts = HUB.fullmatch(source)
    if parts is None:
        raise DataError(f"expected hub:owner/name[/config][:split], got {source!r}")
    # Its library would try every file six times.
    if hub.silent():
        raise DataError(
            f"{source}: the Hub does not answer; give a copy as a file (of a suite: --from "
            "FOLDER), or set HF_HUB_OFFLINE=1 if it lies in the cache of the Hub"
        )

    def load() -> Any:
        import datasets

        split = parts["split"] or "train"
        return datasets.load_dataset(parts["name"], parts["config"], split=split)

    expected = (
        "hub:owner/name[/config][:split] of a data set that can be reached, or take a copy of it "
        "as a file"
    )
    return _dataset_rows(load, source, expected)


def _dataset_rows(load: Any, source: str, expected: str) -> Iterator[Row]:
    try:
        # In blocks of 1,024: `limit` rows of a large data set cost no more than that.
        tables: Iterable[Any] = load().with_format("arrow").iter(1024)
        for table in tables:
            yield from _batch_rows(table)
    except Exception as error:  # datasets passes on what pandas, fsspec, httpx and Arrow raise
        raise DataError(f"{source}: {one_line(error)}; expected {expected}") from error

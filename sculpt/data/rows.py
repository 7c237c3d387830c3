"""Read rows, each with its place: JSON lines, a JSON list, CSV, a saved `datasets` folder.

Files are read as UTF-8. A byte that is not UTF-8 is kept as a lone surrogate, so that only the row
it is in is bad, and can be named by its line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sculpt.data.examples import DataError

FILES = (".jsonl", ".ndjson", ".json", ".csv")


@dataclass(frozen=True)
class Row:
    """What one row holds, and where it is, as "file:line"."""

    where: str
    values: dict[str, Any]


@dataclass
class BadRows:
    """What to do with a row that cannot be used: stop, or, if `skip` is set, list it in `found`."""

    skip: bool = False
    found: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """Raises `DataError` unless bad rows are skipped."""
        if not self.skip:
            raise DataError(f"{where}: {reason} (--skip-bad-rows leaves such rows out)")
        self.found.append(f"{where}: {reason}")


def read_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """Rows of the file at `path`, or of a folder that `datasets` saved.

    Raises `DataError` for a file that is missing, empty or of no known kind, and as `bad` says.
    """
    if path.is_dir():
        rows = _saved_dataset(path)
    elif not path.is_file():
        raise DataError(f"{path}: no such file")
    elif path.suffix not in FILES:
        raise DataError(f"{path}: expected a file that ends in one of {', '.join(FILES)}")
    else:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path}:1: UTF-16 text; save it as UTF-8")
        text = content.decode("utf-8-sig", errors="surrogateescape")
        if not text.strip():
            raise DataError(f"{path}: the file is empty")
        read = {".json": _json_list, ".csv": _csv}.get(path.suffix, _json_lines)
        rows = read(path, text, bad)
    row = None
    for row in rows:
        if _is_text(row.values):
            yield row
        else:
            bad.add(row.where, "not UTF-8 text")
    if row is None and not bad.found:
        raise DataError(f"{path}: no rows")


class _Decoder(json.JSONDecoder):
    """Knows which names an object of the last document has twice; `json` takes the last value."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._named)
        self.twice: list[str] = []

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.twice = []
        return super().raw_decode(s, idx)

    def _named(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.twice += _twice([name for name, _ in pairs])
        return dict(pairs)


def _json_lines(path: Path, text: str, bad: BadRows) -> Iterator[Row]:
    decoder = _Decoder()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = decoder.decode(line)
        except json.JSONDecodeError as error:
            bad.add(where, f"not JSON: {error.msg}, column {error.colno}")
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            bad.add(where, f"JSON that cannot be read: {error}")
        else:
            yield from _object(where, values, decoder.twice, bad)


def _json_list(path: Path, text: str, bad: BadRows) -> Iterator[Row]:
    """Elements one by one, so that each is known by the line where it starts."""
    decoder = _Decoder()
    place, line, counted = _skip_space(text, 0), 1, 0
    if text[place] != "[":
        raise DataError(f"{path}:1: expected a JSON list of rows; one object a line goes in .jsonl")
    place = _skip_space(text, place + 1)
    while text[place : place + 1] not in ("]", ""):
        line, counted = line + text.count("\n", counted, place), place
        try:
            values, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: JSON that cannot be read: {error}") from None
        yield from _object(f"{path}:{line}", values, decoder.twice, bad)
        place = _skip_space(text, place)
        if text[place : place + 1] == ",":
            place = _skip_space(text, place + 1)
        elif text[place : place + 1] != "]":
            break
    if text[place : place + 1] != "]":
        line += text.count("\n", counted, place)
        raise DataError(f"{path}:{line}: not JSON: the list ends before its ]")


def _csv(path: Path, text: str, bad: BadRows) -> Iterator[Row]:
    # Rows end with \n, \r\n or \r alone: `splitlines` knows eight more ends, which are text here.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # it refuses long documents
    line, columns = 0, list[str]()
    try:
        for values in reader:
            where, line = f"{path}:{line + 1}", reader.line_num
            if not values:
                continue
            if not columns:
                columns = values
                if twice := _twice([name for name in columns if name]):
                    raise DataError(f"{where}: two columns are called {twice[0]!r}")
            elif len(values) != len(columns):
                bad.add(where, f"expected {len(columns)} columns, as in the first line")
            else:
                yield Row(where, dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{line + 1}: not CSV: {error}") from None


def _saved_dataset(path: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{path} is a folder: reading what `datasets` saved needs it: pip install datasets"
        ) from None
    try:
        table = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: {error}") from None
    if isinstance(table, datasets.DatasetDict):
        raise DataError(f"{path} holds the splits {sorted(table)}: name one, as {path}/<split>")
    for index, values in enumerate(table):
        yield Row(f"{path}: row {index}", dict(values))


def _object(where: str, values: Any, twice: Sequence[str], bad: BadRows) -> Iterator[Row]:
    if not isinstance(values, dict):
        bad.add(where, f"expected an object with named values, got {type(values).__name__}")
    elif twice:
        bad.add(where, f"{twice[0]!r} is given twice")
    else:
        yield Row(where, values)


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _is_text(value: Any) -> bool:
    """No lone surrogate anywhere: neither a byte that was not UTF-8 nor half of an escaped pair."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return False
    if isinstance(value, dict):
        return all(_is_text(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(_is_text(item) for item in value)
    return True

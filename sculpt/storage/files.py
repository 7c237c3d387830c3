"""Write files and directories so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure it is removed.

    The temporary name keeps the suffix of `path`, for writers that pick the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it is renamed to `path`.

    `path` must not exist, be empty, or be the work of another process that finished first, in
    which case the temporary directory is dropped and the finished one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir() or not any(path.iterdir()):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """The same file, or folder of files, under another name; a copy where links do not work."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir()
        for file in source.iterdir():
            link(file, target / file.name)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def flush(path: Path) -> None:
    """Wait until the disk has the file or folder, where the system lets us ask for it."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with NaN as null, through a temporary file."""
    with replacing_file(path) as temporary:
        temporary.write_text(
            json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )


def without_nan(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity as None, paths as text, tuples as lists."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return `path`, calling `build(temporary_directory)` first when it does not exist."""
    if not path.is_dir():
        with replacing_directory(path) as temporary:
            build(temporary)
    return path

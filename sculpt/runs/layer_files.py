"""What each layer got in a task, as files of the run directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sculpt.storage.files import replacing_file
from sculpt.task.table import TaskRow, table_of

RANKS = "ranks"


def file_of(task: int, name: str) -> str:
    """Of a task, by its number from 0 and its name, without the suffix."""
    return f"{task + 1:02d}-{name.replace('/', '-')}"


def write_text(path: Path, text: str) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def adapted(rows: Sequence[TaskRow]) -> bool:
    """Whether the ranks follow an importance; NaN is what `None` becomes in a checkpoint."""
    return any(r.importance is not None and not math.isnan(r.importance) for r in rows)


def write_ranks(folder: Path, file: str, rows: Sequence[TaskRow]) -> None:
    """`ranks/FILE.txt`, where ranks adapt: every matrix with its importance and its ranks."""
    if adapted(rows):
        write_text(folder / RANKS / f"{file}.txt", table_of(rows))

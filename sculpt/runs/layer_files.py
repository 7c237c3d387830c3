"""What each layer got in a task and what room it has left, as files of the run directory."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sculpt.messages import SculptWarning
from sculpt.storage.files import replacing_file
from sculpt.task.table import TaskRow, table_of

RANKS, ROOM = "ranks", "room"


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


def draw_ranks(folder: Path, names: Sequence[str], chosen: Sequence[Sequence[Any]]) -> None:
    """`ranks/FILE.png` of every task whose ranks adapt.

    chosen: `[task][matrix]`, the fields of `TaskRow`.
    """
    tasks = [[TaskRow(**row) for row in rows] for rows in chosen]
    if not any(map(adapted, tasks)):
        return
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn(
            f"matplotlib is not installed: {folder / RANKS} has tables and no pictures",
            SculptWarning,
            stacklevel=2,
        )
        return
    from sculpt.report.plots import plot_ranks

    for task, (name, rows) in enumerate(zip(names, tasks, strict=True)):
        if adapted(rows):
            path = folder / RANKS / f"{file_of(task, name)}.png"
            plot_ranks(rows, path, f"What each layer got for {name!r}")


def write_room(folder: Path, file: str, room: str) -> None:
    """`room/FILE.txt`, where tasks accumulate: what each took, what is left, the forecast."""
    if room:
        write_text(folder / ROOM / f"{file}.txt", room)

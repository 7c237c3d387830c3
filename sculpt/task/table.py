"""The table shown at the start of a task: every matrix, and every parameter left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sculpt.adaptive.importance import Importance
from sculpt.messages import text_table
from sculpt.task.matrix import Matrix


@dataclass(frozen=True)
class TaskRow:
    """One target.

    Attributes:
        shape: `(m, n)`, or `(count, m, n)` for a stack.
        preserved, trainable_rank: `h` and `t = min(m, n) - h`.
        trainable_elements: numbers that the optimizer moves.
        energy: share of `‖W‖²_F` in the preserved directions; the least of a stack.
        method: how its subspaces were found.
        importance: of the layer, 1 in the mean; `None` for uniform ranks, and where `note` says why
            there is none. by: the measure of importance.
    """

    name: str
    shape: tuple[int, ...]
    preserved: int
    trainable_rank: int
    trainable_elements: int
    energy: float
    method: str
    importance: float | None = None
    note: str = ""
    by: str = ""

    @classmethod
    def of(cls, matrix: Matrix, importance: Importance | None = None) -> TaskRow:
        target, bases = matrix.target, matrix.bases
        return cls(
            target.name,
            target.shape,
            target.preserved,
            target.trainable_rank,
            matrix.trained.numel(),
            bases.energy,
            bases.method,
            None if importance is None else importance.value,
            "" if importance is None else importance.note,
            "" if importance is None else importance.by,
        )


@dataclass(frozen=True)
class TaskTable:
    """What `begin_task` chose: a row per matrix, and each parameter left out with the reason.

    `others` are those left-out parameters that train all the same, outside of any guarantee.
    """

    task: str | None
    rows: list[TaskRow]
    left_out: dict[str, str]
    seconds: float
    others: list[str]

    @property
    def trainable_elements(self) -> int:
        return sum(row.trainable_elements for row in self.rows)

    @property
    def dense_elements(self) -> int:
        """Elements of the sculpted matrices."""
        return sum(math.prod(row.shape) for row in self.rows)

    def __str__(self) -> str:
        title = f"Task {self.task!r}: " if self.task else ""
        share = self.trainable_elements / self.dense_elements
        header = (
            f"{title}{len(self.rows)} matrices, {self.trainable_elements:,} trainable elements "
            f"({share:.1%} of {self.dense_elements:,} weights), subspaces in {self.seconds:.1f} s"
        )
        table = table_of(self.rows)
        left_out = "\n".join(
            f"  {name}: {'trains unprotected, ' if name in self.others else ''}{reason}"
            for name, reason in self.left_out.items()
        )
        return f"{header}\n{table}\nLeft out ({len(self.left_out)}):\n{left_out or '  nothing'}"


def table_of(rows: Sequence[TaskRow]) -> str:
    """A line for each matrix: what was chosen for it, and why."""
    columns: dict[str, Callable[[TaskRow], str]] = {
        "matrix": lambda row: row.name,
        "shape": lambda row: " x ".join(map(str, row.shape)),
        "preserved": lambda row: str(row.preserved),
        "trainable": lambda row: str(row.trainable_rank),
        "elements": lambda row: f"{row.trainable_elements:,}",
        "energy kept": lambda row: f"{row.energy:.4f}",
        "method": lambda row: row.method,
    }
    if any(row.importance is not None for row in rows):
        by = next((row.by for row in rows if row.by), "")
        columns[f"importance ({by})" if by else "importance"] = lambda row: (
            "-" if row.importance is None else f"{row.importance:.3f}"
        )
    if any(row.note for row in rows):
        columns["note"] = lambda row: row.note
    cells = [[show(row) for show in columns.values()] for row in rows]
    return text_table(list(columns), cells)

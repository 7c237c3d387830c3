"""The table shown at the start of a task: every matrix, and every parameter left out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sculpt.matrices import Matrix
from sculpt.tables import text_table


@dataclass(frozen=True)
class TaskRow:
    """One target.

    Attributes:
        shape: `(m, n)`, or `(count, m, n)` for a stack.
        preserved, trainable_rank: `h` and `t = min(m, n) - h`.
        trainable_elements: numbers that the optimizer moves.
        energy: share of `‖W‖²_F` in the preserved directions; the least of a stack.
        method: how its subspaces were found.
    """

    name: str
    shape: tuple[int, ...]
    preserved: int
    trainable_rank: int
    trainable_elements: int
    energy: float
    method: str

    @classmethod
    def of(cls, matrix: Matrix) -> TaskRow:
        target, bases = matrix.target, matrix.bases
        return cls(
            target.name,
            target.shape,
            target.preserved,
            target.trainable_rank,
            matrix.trained.numel(),
            bases.energy,
            bases.method,
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
        table = text_table(
            ("matrix", "shape", "preserved", "trainable", "elements", "energy kept", "method"),
            [
                (
                    row.name,
                    " x ".join(map(str, row.shape)),
                    str(row.preserved),
                    str(row.trainable_rank),
                    f"{row.trainable_elements:,}",
                    f"{row.energy:.4f}",
                    row.method,
                )
                for row in self.rows
            ],
        )
        left_out = "\n".join(
            f"  {name}: {'trains unprotected, ' if name in self.others else ''}{reason}"
            for name, reason in self.left_out.items()
        )
        return f"{header}\n{table}\nLeft out ({len(self.left_out)}):\n{left_out or '  nothing'}"

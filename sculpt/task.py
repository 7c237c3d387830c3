"""What a task holds while it runs: one record per matrix, and the table shown at its start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt.linear import CompactLinear
from sculpt.tables import text_table


@dataclass
class Sculpted:
    """One matrix during a task.

    Attributes:
        module: the layer; its weight is current, its coordinates train.
        original: `W₀` `(m, n)`, the weight before the task, in its own dtype.
        folded: for weights that follow by increments: the coordinates already in the weight.
    """

    name: str
    module: CompactLinear
    preserved: int
    original: Tensor
    folded: Tensor | None

    def truth(self) -> Tensor:
        """`W₀ + U C Vᵀ` rounded once, to float32 or the wider dtype of the weight."""
        module = self.module
        U, V, C = module.sculpt_U, module.sculpt_V, module.sculpt_C.detach()
        base = self.original.to(U.device, U.dtype)
        return torch.addmm(base, U @ C, V.mT)


@dataclass(frozen=True)
class TaskRow:
    """One target.

    Attributes:
        shape: `(m, n)`.
        preserved, trainable_rank: `h` and `t = min(m, n) - h`.
        energy: share of `‖W‖²_F` in the preserved directions.
        method: how its subspaces were found.
    """

    name: str
    shape: tuple[int, int]
    preserved: int
    trainable_rank: int
    energy: float
    method: str

    @property
    def trainable_elements(self) -> int:
        return self.trainable_rank**2


@dataclass(frozen=True)
class TaskTable:
    """What `begin_task` chose: a row per matrix, and each parameter left out with the reason."""

    task: str | None
    rows: list[TaskRow]
    left_out: dict[str, str]
    seconds: float

    @property
    def trainable_elements(self) -> int:
        return sum(row.trainable_elements for row in self.rows)

    @property
    def dense_elements(self) -> int:
        """Elements of the sculpted matrices."""
        return sum(row.shape[0] * row.shape[1] for row in self.rows)

    def __str__(self) -> str:
        title = f"Task {self.task!r}: " if self.task else ""
        share = self.trainable_elements / self.dense_elements
        header = (
            f"{title}{len(self.rows)} matrices, {self.trainable_elements:,} trainable coordinates "
            f"({share:.1%} of {self.dense_elements:,} weights), subspaces in {self.seconds:.1f} s"
        )
        table = text_table(
            ("matrix", "shape", "preserved", "trainable", "elements", "energy kept", "method"),
            [
                (
                    row.name,
                    f"{row.shape[0]} x {row.shape[1]}",
                    str(row.preserved),
                    str(row.trainable_rank),
                    f"{row.trainable_elements:,}",
                    f"{row.energy:.4f}",
                    row.method,
                )
                for row in self.rows
            ],
        )
        left_out = "\n".join(f"  {name}: {reason}" for name, reason in self.left_out.items())
        return f"{header}\n{table}\nLeft out ({len(self.left_out)}):\n{left_out or '  nothing'}"

"""From the matrices of a running task to its certificate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

from sculpt.certificate import Certificate, LeakRow, measure, severity
from sculpt.distributed.processes import Processes
from sculpt.distributed.shares import rounds
from sculpt.matrices import LOW_PRECISION, Matrix
from sculpt_kernels import split


def certify(
    matrices: list[Matrix],
    constraint: str,
    task: str | None,
    others: tuple[str, ...],
    processes: Processes,
    *,
    independent: bool,
    progress: Callable[[int, int, str], None] | None,
) -> Certificate:
    """Measure each matrix, every process some of them; see `Sculptor.verify`."""
    rows: dict[int, LeakRow] = {}
    for indices in rounds([matrix.target.shape for matrix in matrices], processes.size):
        mine = indices[processes.rank]
        row = None if mine is None else asdict(_row(matrices[mine], constraint, independent))
        for index, values in zip(indices, processes.tell(row), strict=True):
            if index is not None:
                rows[index] = LeakRow(**values)
                if progress is not None:
                    progress(len(rows), len(matrices), matrices[index].name)
    ordered = [rows[index] for index in range(len(matrices))]
    return Certificate(ordered, task, "recomputed" if independent else "complement", others)


def _row(matrix: Matrix, constraint: str, independent: bool) -> LeakRow:
    """The leak of a matrix; of a stack, that of its worst member."""
    before, weight = matrix.before(), matrix.weight
    truth = matrix.truth() if weight.dtype in LOW_PRECISION else weight
    stored = weight if truth.dtype != weight.dtype else None
    sides = None if independent else matrix.protected()
    rows = []
    for at in [...] if weight.ndim == 2 else range(len(weight)):
        if sides is None:
            high = split(before[at].double(), rank=matrix.target.preserved, part="high")
            left, right = (high.U, True), (high.V, True)
        else:
            left, right = (
                (torch.linalg.qr(basis[at].double()).Q, protected) for basis, protected in sides
            )
        name = matrix.name if at is ... else f"{matrix.name}[{at}]"
        rows.append(
            measure(
                name,
                before[at],
                truth[at],
                left,
                right,
                stored=None if stored is None else stored[at],
                constraint=constraint,
            )
        )
    return max(rows, key=severity)

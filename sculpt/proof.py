"""From the matrices of a running task to its certificate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sculpt.certificate import Certificate, LeakRow, measure, severity
from sculpt.matrices import LOW_PRECISION, Matrix
from sculpt_kernels import split


def certify(
    matrices: list[Matrix],
    constraint: str,
    task: str | None,
    others: tuple[str, ...],
    *,
    independent: bool,
    progress: Callable[[int, int, str], None] | None,
) -> Certificate:
    """Measure each matrix; see `Sculptor.verify`."""
    rows = []
    for done, matrix in enumerate(matrices, start=1):
        rows.append(_row(matrix, constraint, independent))
        if progress is not None:
            progress(done, len(matrices), matrix.name)
    return Certificate(rows, task, "recomputed" if independent else "complement", others)


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

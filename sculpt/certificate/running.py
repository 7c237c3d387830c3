"""From the matrices of a running task to its certificate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from sculpt.certificate.leak import Certificate, LeakRow, measure, severity
from sculpt.curvature.memory import Memory
from sculpt.distributed.processes import Processes, rounds
from sculpt.distributed.sharding import whole
from sculpt.task.matrix import Matrix, Side
from sculpt.task.targets import LOW_PRECISION
from sculpt_kernels import Subspace, is_divided, split


def certify(
    matrices: list[Matrix],
    constraint: str,
    task: str | None,
    others: tuple[str, ...],
    memory: Memory,
    processes: Processes,
    *,
    independent: bool,
    progress: Callable[[int, int, str], None] | None,
) -> Certificate:
    """Measure each matrix, every process some of them; see `Sculptor.verify`."""
    rows: dict[int, LeakRow] = {}
    for indices in rounds([matrix.target.shape for matrix in matrices], processes.size):
        own = None
        for owner, index in enumerate(indices):
            if index is not None and (
                owner == processes.rank or is_divided(matrices[index].weight)
            ):
                passing = Evidence.of(matrices[index], independent)
                own = passing if owner == processes.rank else own
        row = None
        if own is not None:
            row = asdict(_row(own, constraint, memory))
        for index, values in zip(indices, processes.tell(row), strict=True):
            if index is not None:
                rows[index] = LeakRow(**values)
                if progress is not None:
                    progress(len(rows), len(matrices), matrices[index].name)
    ordered = [rows[index] for index in range(len(matrices))]
    return Certificate(ordered, task, "recomputed" if independent else "complement", others)


@dataclass(frozen=True)
class Evidence:
    """What is judged of a matrix, whole on this process.

    Attributes:
        before, weight: `W₀`, `W` `(..., m, n)`; truth: what `W` stands for, where that is more.
        roundings: see `rounding_bound`.
        sides: bases of the left and the right side; `None`: to be found again, at rank `preserved`.
    """

    target: str
    before: Tensor
    weight: Tensor
    truth: Tensor | None
    roundings: int | None
    sides: tuple[Side, Side] | None
    preserved: int

    @classmethod
    def of(cls, matrix: Matrix, independent: bool) -> Evidence:
        weight = matrix.weight
        truth = matrix.truth() if weight.dtype in LOW_PRECISION else None
        sides = None
        if not independent:
            (U, of_U), (V, of_V) = matrix.protected()
            sides = ((whole(U), of_U), (whole(V), of_V))
        return cls(
            matrix.name,
            whole(matrix.before()),
            whole(weight),
            None if truth is None else whole(truth),
            matrix.roundings(),
            sides,
            matrix.target.preserved,
        )


def _row(matrix: Evidence, constraint: str, memory: Memory) -> LeakRow:
    """The leak of a matrix; of a stack, that of its worst member."""
    weight, truth = matrix.weight, matrix.truth
    rows = []
    for at in [...] if weight.ndim == 2 else range(len(weight)):
        if matrix.sides is None:
            high = _leading(matrix.before[at].double(), matrix.preserved)
            left, right = (high.U, True), (high.V, True)
        else:
            left, right = (
                (torch.linalg.qr(basis[at].double()).Q, protected)
                for basis, protected in matrix.sides
            )
        name = matrix.target if at is ... else f"{matrix.target}[{at}]"
        rows.append(
            measure(
                name,
                matrix.before[at],
                weight[at] if truth is None else truth[at],
                left,
                right,
                stored=None if truth is None else weight[at],
                roundings=matrix.roundings,
                constraint=constraint,
            )
        )
    worst = max(rows, key=severity)
    outputs = memory.outputs(matrix.target, matrix.before)
    if outputs is None:
        return worst
    change = (weight if truth is None else truth).double() - matrix.before
    moved = memory.outputs(matrix.target, change)
    assert moved is not None
    return replace(worst, outputs=float((moved / outputs).nan_to_num(0.0).max()))


def _leading(W: Tensor, preserved: int) -> Subspace:
    """Leading singular subspaces, of directions that have energy: no others can be found again."""
    high = split(W, rank=preserved, part="high")
    energies = (W @ high.V).norm(dim=0)
    found = energies > max(W.shape) * torch.finfo(W.dtype).eps * W.norm()
    return replace(high, U=high.U[:, found], V=high.V[:, found])

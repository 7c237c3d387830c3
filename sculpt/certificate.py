"""Proof that nothing protected moved: the leak of each matrix's `ΔW`, from the weights alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sculpt.tables import text_table

EXACT = 1e-6


@dataclass(frozen=True)
class LeakRow:
    """One matrix: shares of `‖ΔW‖_F` where it must not be, computed in float64.

    Attributes:
        left, right, core: `‖P_U ΔW‖`, `‖ΔW P_V‖`, `‖P_U ΔW P_V‖` over `‖ΔW‖`, where `P_U`, `P_V`
            project onto the protected subspaces.
        floor: `u ‖W‖ / ‖ΔW‖` with the unit roundoff `u` (2⁻²⁴ for float32): what one rounding of
            the weights leaves; no method can be relied on to do better than this.
        change: `‖ΔW‖ / ‖W‖`.
        rounding: for bfloat16 and float16, distance of the weights from the float32 truth
            `W₀ + U C Vᵀ` over `‖ΔW‖`; 0 otherwise, where the weights themselves are judged.
        constraint: which one is judged.
    """

    name: str
    left: float
    right: float
    core: float
    floor: float
    change: float
    rounding: float
    constraint: str = "strict"

    @property
    def leak(self) -> float:
        """What the constraint forbids: the larger of the two sides, or the core."""
        return self.core if self.constraint == "core" else max(self.left, self.right)

    @property
    def limit(self) -> float:
        """`1e-6`, or twice the rounding floor where that is larger."""
        return max(EXACT, 2 * self.floor)

    @property
    def ok(self) -> bool:
        return self.leak <= self.limit


@dataclass(frozen=True)
class Certificate:
    """Leak of every sculpted matrix over one task.

    Attributes:
        rows: one per matrix.
        task: name of the task, if it has one.
        protected: what was taken for the protected subspace: "complement" (all outside the
            trainable one) or "recomputed" (a fresh decomposition of the weights before the task).
        unprotected: parameters that were trained outside of the guarantee.
    """

    rows: list[LeakRow]
    task: str | None
    protected: str
    unprotected: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Every matrix is within its limit."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> LeakRow:
        """The matrix that is nearest to, or furthest beyond, its limit."""
        return max(self.rows, key=severity)

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "protected": self.protected,
            "ok": self.ok,
            "unprotected": list(self.unprotected),
            "worst": _row_dict(self.worst),
            "rows": [_row_dict(row) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """The inverse of `to_dict`; what was infinite is null there."""
        names = [item.name for item in fields(LeakRow)]
        rows = []
        for row in values["rows"]:
            found: list[Any] = [math.inf if row[name] is None else row[name] for name in names]
            rows.append(LeakRow(*found))
        return cls(rows, values["task"], values["protected"], tuple(values["unprotected"]))

    def __str__(self) -> str:
        worst = self.worst
        verdict = "holds" if self.ok else "is BROKEN"
        header = (
            f"The constraint {verdict} for {len(self.rows)} matrices"
            + (f" of task {self.task!r}" if self.task else "")
            + f". Worst leak {worst.leak:.2e} (limit {worst.limit:.2e}, rounding floor "
            f"{worst.floor:.2e}) in {worst.name}."
        )
        if self.unprotected:
            header += (
                f"\n{len(self.unprotected)} other parameters were trained and are outside of this "
                f"guarantee: {', '.join(self.unprotected[:3])}"
                + (", ..." if len(self.unprotected) > 3 else "")
            )
        return f"{header}\n{self.table()}"

    def table(self, most: int = 5) -> str:
        """The `most` worst matrices as a table."""
        ranked = sorted(self.rows, key=severity, reverse=True)
        return text_table(
            ("matrix", "‖ΔW‖/‖W‖", "left", "right", "core", "floor", "ok"),
            [
                (
                    row.name,
                    *(f"{x:.2e}" for x in (row.change, row.left, row.right, row.core, row.floor)),
                    "yes" if row.ok else "NO",
                )
                for row in ranked[:most]
            ],
            note=f"{len(ranked) - most} more matrices, all nearer to zero"
            if len(ranked) > most
            else "",
        )


def measure(
    name: str,
    before: Tensor,
    after: Tensor,
    left: tuple[Tensor, bool],
    right: tuple[Tensor, bool],
    *,
    stored: Tensor | None = None,
    constraint: str = "strict",
) -> LeakRow:
    """Leak of `after - before` `(m, n)` in float64.

    `left` and `right` are a basis with orthonormal columns in float64 and whether it spans the
    *protected* subspace (True) or its complement (False). `stored` are the low-precision weights
    whose float32 truth is `after`.
    """
    W0 = before.double()
    delta = after.double() - W0
    norm = float(torch.linalg.matrix_norm(delta))
    weight = float(torch.linalg.matrix_norm(W0))
    if norm == 0:
        return LeakRow(name, 0.0, 0.0, 0.0, math.inf, 0.0, 0.0, constraint)
    in_left = _component(delta, *left)
    in_right = _component(delta.mT, *right).mT
    in_both = _component(in_right, *left)
    unit = torch.finfo(after.dtype).eps / 2
    rounding = 0.0
    if stored is not None:
        rounding = float(torch.linalg.matrix_norm(stored.double() - after.double())) / norm
    in_left_share, in_right_share, in_both_share = (
        float(torch.linalg.matrix_norm(X)) / norm for X in (in_left, in_right, in_both)
    )
    return LeakRow(
        name,
        left=in_left_share,
        right=in_right_share,
        core=in_both_share,
        floor=unit * weight / norm,
        change=norm / weight,
        rounding=rounding,
        constraint=constraint,
    )


def _component(D: Tensor, basis: Tensor, protected: bool) -> Tensor:
    inside = basis @ (basis.mT @ D)
    return inside if protected else D - inside


def _row_dict(row: LeakRow) -> dict[str, Any]:
    numbers = {**asdict(row), "leak": row.leak, "limit": row.limit}
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in numbers.items()
    }
    return {**finite, "ok": row.ok}


def severity(row: LeakRow) -> float:
    """How near a matrix is to its limit, 1 at the limit; infinite where nothing was measured."""
    value = row.leak / row.limit
    return math.inf if math.isnan(value) else value

"""Proof that nothing protected moved: the leak of each matrix's `ΔW`, and how it is rounded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sculpt.distributed.sharding import whole
from sculpt.messages import some, text_table

EXACT = 1e-6
STORED = "stored"


@dataclass(frozen=True)
class LeakRow:
    """One matrix: shares of `‖ΔW‖_F` where it must not be, computed in float64.

    Attributes:
        left, right, core: `‖P_U ΔW‖`, `‖ΔW P_V‖`, `‖P_U ΔW P_V‖` over `‖ΔW‖`, where `P_U`, `P_V`
            project onto the protected subspaces.
        floor: `u ‖W‖ / ‖ΔW‖` with the unit roundoff `u` (2⁻²⁴ for float32): what one rounding of
            the weights leaves; no method can be relied on to do better than this.
        change: `‖ΔW‖ / ‖W‖`.
        rounding: for bfloat16 and float16, distance of the stored weights from the float32 truth
            `W₀ + ΔW` over `‖ΔW‖`, or where that is not known from what is allowed; 0 otherwise,
            where the weights themselves are judged.
        constraint: which one is judged.
        rounding_limit: the distance that rounding explains, see `rounding_bound`.
        outputs: how far the outputs of the layer moved on the rows that are protected:
            `tr(ΔW A ΔWᵀ) / tr(W₀ A W₀ᵀ)` with the second moment `A` of its inputs there; infinite
            where that is not known.
    """

    name: str
    left: float
    right: float
    core: float
    floor: float
    change: float
    rounding: float
    constraint: str = "strict"
    rounding_limit: float = math.inf
    outputs: float = math.inf

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
        return self.leak <= self.limit and self.rounding <= self.rounding_limit


@dataclass(frozen=True)
class Certificate:
    """Leak of every sculpted matrix over one task.

    Attributes:
        rows: one per matrix.
        task: name of the task, if it has one.
        protected: what was taken for the protected subspace: "complement" (all outside the
            trainable one), "recomputed" (a fresh decomposition of the weights before the task), or
            "stored" (the same, from files, where nothing but rounded weights is known).
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
    def unmoved(self) -> list[str]:
        """Matrices that are what they were, bit by bit: no gradient has reached them."""
        return [row.name for row in self.rows if row.change == 0]

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
            found = {name: row[name] for name in names if row.get(name) is not None}
            infinite = {name: math.inf for name in names if name not in found}
            rows.append(LeakRow(**infinite | found))
        return cls(rows, values["task"], values["protected"], tuple(values["unprotected"]))

    def __str__(self) -> str:
        return f"{self.header('holds' if self.ok else 'is BROKEN')}\n{self.table()}"

    def header(self, verdict: str) -> str:
        """What was judged, the worst of it, and what is outside of the guarantee."""
        worst = self.worst
        header = (
            f"The constraint {verdict} for {len(self.rows)} matrices"
            + (f" of task {self.task!r}" if self.task else "")
            + f". Worst leak {worst.leak:.2e} (limit {worst.limit:.2e}, rounding floor "
            f"{worst.floor:.2e}) in {worst.name}."
        )
        rounded = [row for row in self.rows if math.isfinite(row.rounding_limit)]
        if rounded:
            far = max(rounded, key=lambda row: row.rounding / row.rounding_limit)
            share = f"{far.rounding / far.rounding_limit:.2f}"
            header += "\n" + (
                "These are 16-bit weights: at most "
                f"{share} of what rounding explains lies outside of what may change ({far.name})."
                if self.protected == STORED
                else "This is the leak of the float32 weights W₀ + ΔW. The stored 16-bit ones are "
                f"at most {share} of the distance from them that rounding explains ({far.name})."
            )
        moved = [row for row in self.rows if math.isfinite(row.outputs)]
        if moved:
            most = max(moved, key=lambda row: row.outputs)
            header += (
                f"\nOn the rows that are protected the outputs of the layers moved by "
                f"{most.outputs:.1e} of their squares at most ({most.name})."
            )
        if self.unmoved:
            header += (
                f"\n{len(self.unmoved)} matrices did not move, no gradient has reached them: "
                f"{some(self.unmoved)}"
            )
        if self.unprotected:
            header += (
                f"\n{len(self.unprotected)} other parameters were trained and are outside of this "
                f"guarantee: {some(self.unprotected)}"
            )
        return header

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
    roundings: int | None = None,
    constraint: str = "strict",
) -> LeakRow:
    """Leak of `after - before` `(m, n)` in float64.

    `left` and `right` are a basis with orthonormal columns in float64 and whether it spans the
    *protected* subspace (True) or its complement (False). `stored` are the low-precision weights
    whose float32 truth is `after`, and that were rounded as `rounding_bound` has it.
    """
    W0 = before.double()
    delta = after.double() - W0
    norm = float(torch.linalg.matrix_norm(delta))
    rounding, limit = 0.0, math.inf
    if stored is not None:
        rounding = float(torch.linalg.matrix_norm(stored.double() - after.double()))
        limit = rounding_bound(stored, roundings)
    if norm == 0 and rounding <= limit:
        return LeakRow(name, 0.0, 0.0, 0.0, math.inf, 0.0, 0.0, constraint)
    weight = max(float(torch.linalg.matrix_norm(W)) for W in (W0, after.double()))
    in_left = _component(delta, *left)
    in_right = _component(delta.mT, *right).mT
    in_both = _component(in_right, *left)
    sizes = (float(torch.linalg.matrix_norm(X)) for X in (in_left, in_right, in_both))
    return leak_row(
        name,
        *sizes,
        change=norm,
        weight=weight,
        dtype=after.dtype,
        constraint=constraint,
        rounding=rounding,
        rounding_limit=limit,
    )


def leak_row(
    name: str,
    left: float,
    right: float,
    core: float,
    *,
    change: float,
    weight: float,
    dtype: torch.dtype,
    constraint: str,
    rounding: float = 0.0,
    rounding_limit: float = math.inf,
) -> LeakRow:
    """The shares of `change = ‖ΔW‖` that `left`, `right`, `core` and `rounding` are.

    weight: the larger of `‖W‖` before and after, since weights before may be zero; dtype: that of
    the weights that are judged.
    """
    norm = max(change, torch.finfo(torch.float64).tiny)
    return LeakRow(
        name,
        left=left / norm,
        right=right / norm,
        core=core / norm,
        floor=torch.finfo(dtype).eps / 2 * weight / norm,
        change=norm / weight,
        rounding=rounding / norm,
        constraint=constraint,
        rounding_limit=rounding_limit / norm,
    )


def rounding_bound(W: Tensor, random: int | None = None) -> float:
    """How far `W` may be from what it was rounded from, in Frobenius norm.

    One rounding to nearest changes an element by half the spacing `s` of numbers there at most.
    `random` roundings up or down that are right in the mean are independent errors of variance at
    most `s²/4`, so

        E ‖error‖² <= random/4 Σ s²      with a spread of about      random/4 √(Σ s⁴)

    of which ten are allowed for.
    """
    sizes = spacing(W.detach(), W.dtype)
    square = float(whole(torch.linalg.vector_norm(sizes))) ** 2
    if random is None:
        return math.sqrt(square) / 2
    fourth = float(whole(torch.linalg.vector_norm(sizes, ord=4))) ** 4
    return math.sqrt(random * (square + 10 * math.sqrt(fourth))) / 2


def spacing(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next larger number of `dtype`, for every element of `W`, at least float32."""
    info = torch.finfo(dtype)
    sizes = W.to(torch.promote_types(W.dtype, torch.float32)).abs()
    # Below the smallest normal number the spacing is constant.
    exponent = torch.frexp(sizes.clamp_min(info.tiny)).exponent
    return torch.ldexp(torch.full_like(sizes, info.eps / 2), exponent)


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
    """How near a matrix is to its limits, 1 at the limit; infinite where nothing was measured."""
    values = (row.leak / row.limit, row.rounding / row.rounding_limit)
    return math.inf if any(map(math.isnan, values)) else max(values)

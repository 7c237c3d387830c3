"""Projections in two sweeps over row panels: the CPU's way, without an `m x n` temporary.

The first sweep gathers the small products that need the whole matrix, the second computes each
row panel of the result from that panel alone. Panels come from a `Source`, so the same code
projects a matrix in place, a low-precision one through float32 with one rounding, and the step of
an optimizer that exists only panel by panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sculpt_kernels.plan.projections import arrange, kind_of
from sculpt_kernels.products import compute_dtype, product, row_panels, view_panels


class Source(Protocol):
    """A matrix that is read and written in row panels of the dtype of the computation."""

    shape: tuple[int, int]

    def panels(self) -> Iterator[slice]:
        """Row ranges, in order."""

    def load(self, rows: slice) -> Tensor:
        """The panel, for the first time; a result that may be changed."""

    def reload(self, rows: slice) -> Tensor:
        """The same panel once more."""

    def store(self, rows: slice, panel: Tensor) -> None:
        """Write the result for these rows."""


class InPlace:
    """A float32 or float64 matrix: panels are views of it."""

    def __init__(self, G: Tensor) -> None:
        self.G = G
        self.shape = (G.shape[0], G.shape[1])

    def panels(self) -> Iterator[slice]:
        return view_panels(self.shape[0])

    def load(self, rows: slice) -> Tensor:
        return self.G[rows]

    def reload(self, rows: slice) -> Tensor:
        return self.G[rows]

    def store(self, rows: slice, panel: Tensor) -> None:
        if panel.data_ptr() != self.G[rows].data_ptr():
            self.G[rows] = panel


class Converted:
    """A low-precision matrix, converted panel by panel; the result is rounded once."""

    def __init__(self, G: Tensor) -> None:
        self.G = G
        self.shape = (G.shape[0], G.shape[1])
        self.wide = compute_dtype(G.dtype)

    def panels(self) -> Iterator[slice]:
        return row_panels(*self.shape)

    def load(self, rows: slice) -> Tensor:
        return self.G[rows].to(self.wide, copy=True)

    reload = load

    def store(self, rows: slice, panel: Tensor) -> None:
        self.G[rows] = panel


def project_matrix(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    complement: str = "none",
    exact: bool = False,
) -> None:
    """Project one matrix `G` `(m, n)` in place."""
    if G.stride(0) == 1 and G.stride(1) != 1:
        # Rows of a column-major matrix are far apart in memory; its columns are not.
        G, U, V = G.t(), V, U
        form, complement = _MIRROR.get(form, form), _MIRROR.get(complement, complement)
    wide = compute_dtype(G.dtype)
    source: Source = InPlace(G) if G.dtype == wide else Converted(G)
    project_source(source, U, V, form, complement, wide, exact=exact)


_MIRROR = {"left": "right", "right": "left"}


def project_source(
    source: Source,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    complement: str,
    wide: torch.dtype,
    *,
    exact: bool = False,
) -> None:
    """Project what `source` yields.

    `exact` uses `(UᵀU)⁻¹` and `(VᵀV)⁻¹`: the bases were rounded, so `UUᵀ` is a projector only up
    to their rounding, `U(UᵀU)⁻¹Uᵀ` is one.
    """
    left = None if U is None else _Left(U, wide, exact)
    right = None if V is None else _Right(V.to(wide), exact)
    if left is None:
        assert right is not None
        _right_side(source, right, complement == "right")
    elif right is None:
        _take_rows(source, left, _gather(source, left), complement == "left")
    elif kind_of(form, complement) == "sides":
        _both_sides(source, left, right, complement == "both")
    elif complement in ("left", "right"):
        _one_complement(source, left, right, complement, form == "strict")
    else:
        a, b = left.columns, right.columns
        left_first = arrange(form, complement, *source.shape, a, b, False).transposed
        _core(source, left, right, left_first, form == "strict")


class _Left:
    """The left basis, converted a panel of rows at a time. `B B⁺` projects onto its span."""

    def __init__(self, B: Tensor, wide: torch.dtype, exact: bool) -> None:
        self.B, self.wide = B, wide
        self.columns = B.shape[1]
        self.pseudo = dual_basis(B.to(wide)) if exact and B.shape[1] else B

    def basis(self, rows: slice) -> Tensor:
        return self.B[rows].to(self.wide)

    def dual(self, rows: slice) -> Tensor:
        return self.pseudo[rows].to(self.wide).t()


class _Right:
    """The right basis: every panel needs all of it."""

    def __init__(self, B: Tensor, exact: bool) -> None:
        self.columns = B.shape[1]
        self.spread = B.t()
        self.dual = dual_basis(B) if exact and B.shape[1] else B


def dual_basis(B: Tensor) -> Tensor:
    """`B (BᵀB)⁻¹` of a nearly orthonormal `B` in its own dtype."""
    gram = B.mT @ B
    return torch.cholesky_solve(B.mT, torch.linalg.cholesky(gram)).mT


def _gather(source: Source, left: _Left) -> Tensor:
    """`UᵀG`, `(a, n)`."""
    total = None
    for rows in source.panels():
        part = left.dual(rows)
        panel = source.load(rows)
        total = product(part, panel) if total is None else total.addmm_(part, panel)
    assert total is not None
    return total


def _gather_core(source: Source, left: _Left, right: _Right, Y: Tensor | None = None) -> Tensor:
    """`UᵀGV`, `(a, b)`; keeps `GV` in `Y` where asked."""
    total = None
    for rows in source.panels():
        thin = product(source.load(rows), right.dual)
        if Y is not None:
            Y[rows] = thin
        part = left.dual(rows)
        total = torch.mm(part, thin) if total is None else total.addmm_(part, thin)
    assert total is not None
    return total


def _core(source: Source, left: _Left, right: _Right, left_first: bool, keep: bool) -> None:
    """`G - U C Vᵀ` with `C = UᵀGV`, or `U C Vᵀ` alone for complements.

    The side that is contracted first is expanded last.
    """
    if left_first:
        core = torch.mm(_gather(source, left), right.dual)
        _take_rows(source, left, torch.mm(core, right.spread), keep)
        return
    core = _gather_core(source, left, right)
    for rows in source.panels():
        beside = torch.mm(left.basis(rows), core)
        if keep:
            source.store(rows, torch.mm(beside, right.spread))
        else:
            source.store(rows, source.reload(rows).addmm_(beside, right.spread, alpha=-1))


def _take_rows(source: Source, left: _Left, B: Tensor, keep: bool) -> None:
    """`G - U B` or `U B`, for `B` `(a, n)`."""
    for rows in source.panels():
        if keep:
            source.store(rows, torch.mm(left.basis(rows), B))
        else:
            source.store(rows, source.reload(rows).addmm_(left.basis(rows), B, alpha=-1))


def _one_complement(
    source: Source, left: _Left, right: _Right, complement: str, strict: bool
) -> None:
    """Forms whose `left` or `right` basis spans what is kept, the other what is removed.

    `left`: with `Y = GV`, `core` is `G - (Y - U UᵀY) Vᵀ`; with `X = UᵀG`, `strict` is
    `U (X - X V Vᵀ)`. `right` mirrors them.
    """
    if (complement == "left") == strict:
        rest = _gather(source, left)
        rest.addmm_(torch.mm(rest, right.dual), right.spread, alpha=-1)
        _take_rows(source, left, rest, keep=strict)
        return
    Y = right.dual.new_empty(source.shape[0], right.columns)
    core = _gather_core(source, left, right, Y)
    for rows in source.panels():
        beside = Y[rows].addmm_(left.basis(rows), core, alpha=-1)
        if strict:
            source.store(rows, torch.mm(beside, right.spread))
        else:
            source.store(rows, source.reload(rows).addmm_(beside, right.spread, alpha=-1))


def _both_sides(source: Source, left: _Left, right: _Right, keep: bool) -> None:
    """With `X = UᵀG` and `R = G - U X`: `R - (R V) Vᵀ`, or `U X + (R V) Vᵀ` for complements."""
    kept = _gather(source, left)
    for rows in source.panels():
        panel = source.reload(rows)
        part = torch.mm(left.basis(rows), kept) if keep else None
        rest = (
            panel.sub_(part) if part is not None else panel.addmm_(left.basis(rows), kept, alpha=-1)
        )
        thin = product(rest, right.dual)
        if part is None:
            source.store(rows, rest.addmm_(thin, right.spread, alpha=-1))
        else:
            source.store(rows, part.addmm_(thin, right.spread))


def _right_side(source: Source, right: _Right, keep: bool) -> None:
    """`G - (G V) Vᵀ`, or `(G V) Vᵀ` for a complement; each row on its own."""
    for rows in source.panels():
        panel = source.load(rows)
        thin = product(panel, right.dual)
        if keep:
            source.store(rows, product(thin, right.spread))
        else:
            source.store(rows, panel.addmm_(thin, right.spread, alpha=-1))

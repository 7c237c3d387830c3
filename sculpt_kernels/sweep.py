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

from sculpt_kernels.panels import compute_dtype, product, row_panels, view_panels
from sculpt_kernels.plan import arrange, kind_of


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
    """Any matrix, converted panel by panel; the result is rounded once, into `out`."""

    def __init__(self, G: Tensor, out: Tensor) -> None:
        self.G, self.out = G, out
        self.shape = (G.shape[0], G.shape[1])
        self.wide = compute_dtype(G.dtype)

    def panels(self) -> Iterator[slice]:
        return row_panels(*self.shape)

    def load(self, rows: slice) -> Tensor:
        return self.G[rows].to(self.wide, copy=True)

    reload = load

    def store(self, rows: slice, panel: Tensor) -> None:
        self.out[rows] = panel


def project_matrix(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    complement: str = "none",
    exact: bool = False,
    out: Tensor | None = None,
) -> None:
    """Project one matrix `G` `(m, n)` in place, or into `out`."""
    transposed = is_transposed(G, U, V, form, complement)
    if transposed:
        G, U, V = G.mT, V, U
        out = None if out is None else out.mT
    wide = compute_dtype(G.dtype)
    if out is None and G.dtype == wide:
        source: Source = InPlace(G)
    else:
        source = Converted(G, G if out is None else out)
    project_source(source, U, V, form, complement, wide, transposed=transposed, exact=exact)


def is_transposed(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str, complement: str
) -> bool:
    a = 0 if U is None else U.shape[1]
    b = 0 if V is None else V.shape[1]
    return arrange(form, complement, G.shape[0], G.shape[1], a, b, False).transposed


def project_source(
    source: Source,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    complement: str,
    wide: torch.dtype,
    *,
    transposed: bool = False,
    exact: bool = False,
) -> None:
    """Project what `source` yields; `transposed` tells that it and the bases are swapped already.

    `exact` uses `(UᵀU)⁻¹` and `(VᵀV)⁻¹`: the bases were rounded, so `UUᵀ` is a projector only up
    to their rounding, `U(UᵀU)⁻¹Uᵀ` is one.
    """
    near, far = ("right", "left") if transposed else ("left", "right")
    keep_left = complement in (near, "both")
    keep_right = complement in (far, "both")
    left = None if U is None else _Left(U, wide, exact)
    right = None if V is None else _Right(V.to(wide), exact)
    kind = kind_of(form, complement)
    if kind == "side":
        assert right is not None
        _one_side(source, right, keep_right)
        return
    assert left is not None
    assert right is not None
    if kind == "sides":
        _both_sides(source, left, right, keep_left)
    elif kind == "kept":
        _kept_rows(source, left, right)
    elif form == "strict":
        _keep_core(source, left, right)
    elif keep_left:
        _remove_core_beside(source, left, right)
    else:
        _remove_core(source, left, right)


class _Left:
    """The left basis, converted a panel of rows at a time. `B B⁺` projects onto its span."""

    def __init__(self, B: Tensor, wide: torch.dtype, exact: bool) -> None:
        self.B, self.wide = B, wide
        self.pseudo = dual_basis(B.to(wide)) if exact and B.shape[1] else B

    def basis(self, rows: slice) -> Tensor:
        return self.B[rows].to(self.wide)

    def dual(self, rows: slice) -> Tensor:
        return self.pseudo[rows].to(self.wide).t()


class _Right:
    """The right basis: every panel needs all of it."""

    def __init__(self, B: Tensor, exact: bool) -> None:
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


def _remove_core(source: Source, left: _Left, right: _Right) -> None:
    """`G - (U C) Vᵀ` with `C = UᵀGV`."""
    core = _gather_core(source, left, right)
    for rows in source.panels():
        panel = source.reload(rows)
        panel.addmm_(torch.mm(left.basis(rows), core), right.spread, alpha=-1)
        source.store(rows, panel)


def _remove_core_beside(source: Source, left: _Left, right: _Right) -> None:
    """`G - (GV - U C) Vᵀ`: the left side is removed outside the span of `U`."""
    Y = right.dual.new_empty(source.shape[0], right.dual.shape[1])
    core = _gather_core(source, left, right, Y)
    for rows in source.panels():
        panel = source.reload(rows)
        beside = Y[rows].addmm_(left.basis(rows), core, alpha=-1)
        source.store(rows, panel.addmm_(beside, right.spread, alpha=-1))


def _keep_core(source: Source, left: _Left, right: _Right) -> None:
    """`(U C) Vᵀ` with `C = UᵀGV`."""
    core = _gather_core(source, left, right)
    for rows in source.panels():
        source.store(rows, torch.mm(torch.mm(left.basis(rows), core), right.spread))


def _kept_rows(source: Source, left: _Left, right: _Right) -> None:
    """`U (X - X V Vᵀ)` with `X = UᵀG`."""
    kept = _gather(source, left)
    kept.addmm_(torch.mm(kept, right.dual), right.spread, alpha=-1)
    for rows in source.panels():
        source.store(rows, torch.mm(left.basis(rows), kept))


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


def _one_side(source: Source, right: _Right, keep: bool) -> None:
    """`G - (G V) Vᵀ`, or `(G V) Vᵀ` for a complement; each row on its own."""
    for rows in source.panels():
        panel = source.load(rows)
        thin = product(panel, right.dual)
        if keep:
            source.store(rows, product(thin, right.spread))
        else:
            source.store(rows, panel.addmm_(thin, right.spread, alpha=-1))

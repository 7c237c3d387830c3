"""Projections in two passes over panels of rows: the CPU's way, without an `m x n` temporary.

The first pass gathers the small products that need the whole matrix, the second computes each
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
from sculpt_kernels.products import compute_dtype, panels_of, product, view_panels


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
        return panels_of(*self.shape)

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
) -> None:
    """Project one matrix `G` `(m, n)` in place."""
    if G.stride(0) == 1 and G.stride(1) != 1:
        # Rows of a column-major matrix are far apart in memory; its columns are not.
        G, U, V = G.t(), V, U
        form, complement = _MIRROR.get(form, form), _MIRROR.get(complement, complement)
    wide = compute_dtype(G.dtype)
    source: Source = InPlace(G) if G.dtype == wide else Converted(G)
    project_source(source, U, V, form, complement, wide)


_MIRROR = {"left": "right", "right": "left"}


def project_source(
    source: Source,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    complement: str,
    wide: torch.dtype,
) -> None:
    """Project what `source` yields."""
    left = None if U is None else _Left(U, wide)
    right = None if V is None else V.to(wide)
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
        a, b = left.columns, right.shape[1]
        left_first = arrange(form, complement, *source.shape, a, b, False).transposed
        _core(source, left, right, left_first, form == "strict")


class _Left:
    """The left basis, converted a panel of rows at a time; the right one is needed whole."""

    def __init__(self, B: Tensor, wide: torch.dtype) -> None:
        self.B, self.wide = B, wide
        self.columns = B.shape[1]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.B[rows].to(self.wide)


def _gather(source: Source, left: _Left) -> Tensor:
    """`UᵀG`, `(a, n)`."""
    total = None
    for rows in source.panels():
        part = left[rows].t()
        panel = source.load(rows)
        total = product(part, panel) if total is None else total.addmm_(part, panel)
    assert total is not None
    return total


def _gather_core(source: Source, left: _Left, right: Tensor, Y: Tensor | None = None) -> Tensor:
    """`UᵀGV`, `(a, b)`; keeps `GV` in `Y` where asked."""
    total = None
    for rows in source.panels():
        thin = product(source.load(rows), right)
        if Y is not None:
            Y[rows] = thin
        part = left[rows].t()
        total = torch.mm(part, thin) if total is None else total.addmm_(part, thin)
    assert total is not None
    return total


def _core(source: Source, left: _Left, right: Tensor, left_first: bool, keep: bool) -> None:
    """`G - U C Vᵀ` with `C = UᵀGV`, or `U C Vᵀ` alone for complements.

    The side that is contracted first is expanded last.
    """
    if left_first:
        core = torch.mm(_gather(source, left), right)
        _take_rows(source, left, torch.mm(core, right.t()), keep)
        return
    core = _gather_core(source, left, right)
    for rows in source.panels():
        _put(source, rows, torch.mm(left[rows], core), right.t(), keep)


def _take_rows(source: Source, left: _Left, B: Tensor, keep: bool) -> None:
    """`G - U B` or `U B`, for `B` `(a, n)`."""
    for rows in source.panels():
        _put(source, rows, left[rows], B, keep)


def _put(source: Source, rows: slice, A: Tensor, B: Tensor, keep: bool) -> None:
    """These rows of `G - A B`, or of `A B` alone."""
    if keep:
        source.store(rows, torch.mm(A, B))
    else:
        source.store(rows, source.reload(rows).addmm_(A, B, alpha=-1))


def _one_complement(
    source: Source, left: _Left, right: Tensor, complement: str, strict: bool
) -> None:
    """Forms whose `left` or `right` basis spans what is kept, the other what is removed.

    `left`: with `Y = GV`, `core` is `G - (Y - U UᵀY) Vᵀ`; with `X = UᵀG`, `strict` is
    `U (X - X V Vᵀ)`. `right` mirrors them.
    """
    if (complement == "left") == strict:
        rest = _gather(source, left)
        rest.addmm_(torch.mm(rest, right), right.t(), alpha=-1)
        _take_rows(source, left, rest, keep=strict)
        return
    Y = right.new_empty(source.shape[0], right.shape[1])
    core = _gather_core(source, left, right, Y)
    for rows in source.panels():
        beside = Y[rows].addmm_(left[rows], core, alpha=-1)
        _put(source, rows, beside, right.t(), keep=strict)


def _both_sides(source: Source, left: _Left, right: Tensor, keep: bool) -> None:
    """With `X = UᵀG` and `R = G - U X`: `R - (R V) Vᵀ`, or `U X + (R V) Vᵀ` for complements."""
    kept = _gather(source, left)
    for rows in source.panels():
        panel = source.reload(rows)
        part = torch.mm(left[rows], kept) if keep else None
        rest = panel.sub_(part) if part is not None else panel.addmm_(left[rows], kept, alpha=-1)
        thin = product(rest, right)
        if part is None:
            source.store(rows, rest.addmm_(thin, right.t(), alpha=-1))
        else:
            source.store(rows, part.addmm_(thin, right.t()))


def _right_side(source: Source, right: Tensor, keep: bool) -> None:
    """`G - (G V) Vᵀ`, or `(G V) Vᵀ` for a complement; each row on its own."""
    for rows in source.panels():
        panel = source.load(rows)
        thin = product(panel, right)
        if keep:
            source.store(rows, product(thin, right.t()))
        else:
            source.store(rows, panel.addmm_(thin, right.t(), alpha=-1))

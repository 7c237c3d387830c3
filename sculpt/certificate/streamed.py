"""The leak of one matrix too large to be held as often as a decomposition would need it.

Notation: `W₀`, `W₁` are `m x n` before and after, turned so that `m <= n`; `D = W₁ - W₀`; panels
are blocks of their columns. With `S = W₀W₀ᵀ = U Λ Uᵀ` `(m, m)` and the `h` leading eigenvectors
`U_h`, the leading right singular vectors are `V_h = W₀ᵀ U_h Λ_h^-½`, so that

    U_hᵀ D = [U_hᵀ D_panel ...]           and           D V_h = Σ D_panel (W₀ᵀ_panel U_h Λ_h^-½)

and nothing of size `n` is ever formed. All in float64; `24 m²` bytes at the most, while `S` is
decomposed in place, and a few panels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sculpt.certificate.leak import LeakRow, leak_row, spacing

PANEL_BYTES = 24 * 2**20


def bytes_for(short_side: int) -> int:
    """Largest memory for a matrix whose short side is so long: the decomposition and panels."""
    return 24 * short_side**2 + 6 * PANEL_BYTES


Panel = Callable[[int, int], Tensor]
"""Columns `start` to `stop` of the matrix, turned so that it is wide: `(m, stop - start)`."""


def streamed_leak(
    name: str,
    shape: tuple[int, int],
    preserved: int,
    before: Panel,
    after: Panel,
    *,
    turned: bool = False,
    dtype: torch.dtype,
    constraint: str = "strict",
) -> LeakRow:
    """Leak of `after - before` into the leading `preserved` singular directions of `before`.

    Directions of `before` that have no energy to float64 (`λ <= m ε λ₁`) are not protected: nothing
    tells them from one another.

    Args:
        shape: `(m, n)` with `m <= n`.
        before, after: give the panels.
        turned: the matrix on disk is the transpose; left and right are then those on disk.
        dtype: of the weights after; 16-bit ones may lie outside by what rounding explains.
        constraint: which one is judged.

    Raises:
        ValueError: a value is not finite.
    """
    m, n = shape
    width = max(1, PANEL_BYTES // (8 * m))

    def panels() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, n, width):
            stop = min(n, start + width)
            W = before(start, stop).double()
            yield W, after(start, stop).double() - W

    S, before_norm, after_norm, change, spaced = _gram(panels(), dtype)
    for which, total in (("before", before_norm), ("after", after_norm)):
        if not math.isfinite(total):
            raise ValueError(f"{name} holds values that are not finite, {which} training")
    if change == 0:
        return LeakRow(name, 0.0, 0.0, 0.0, math.inf, 0.0, 0.0, constraint)

    values = S.new_empty(m)
    vectors = S.mT  # column-major, so that the decomposition can take the place of S
    torch.linalg.eigh(vectors, out=(values, vectors))
    resolved = int((values > m * torch.finfo(S.dtype).eps * values[-1]).sum())
    leading = slice(m - min(preserved, resolved), m)
    U, roots = vectors[:, leading], values[leading].sqrt()

    left = 0.0
    DV = torch.zeros_like(U)
    for W, D in panels():
        left += float((U.mT @ D).square().sum())
        DV.addmm_(D, (W.mT @ U).div_(roots))
    sides = (math.sqrt(left), float(torch.linalg.matrix_norm(DV)))
    core = float(torch.linalg.matrix_norm(U.mT @ DV))
    # What lies on both sides counts once.
    outside = core if constraint == "core" else math.sqrt(sum(x**2 for x in sides) - core**2)
    rounded = dtype.itemsize < 4
    on_left, on_right = reversed(sides) if turned else sides
    return leak_row(
        name,
        on_left,
        on_right,
        core,
        change=math.sqrt(change),
        weight=math.sqrt(max(before_norm, after_norm)),
        dtype=dtype,
        constraint=constraint,
        rounding=outside if rounded else 0.0,
        rounding_limit=math.sqrt(spaced) / 2 if rounded else math.inf,
    )


def _gram(
    panels: Iterator[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, float, float, float, float]:
    """`W₀W₀ᵀ`, `‖W₀‖²`, `‖W₁‖²`, `‖D‖²`, and the squared spacing of numbers at all of `W₁`.

    No panel is alive when this returns.
    """
    S: Tensor | None = None
    before = after = change = spaced = 0.0
    for W, D in panels:
        if S is None:
            S = W.new_zeros(W.shape[0], W.shape[0])
        S.addmm_(W, W.mT)
        before += float(W.square().sum())
        change += float(D.square().sum())
        after += float(D.add_(W).square().sum())
        spaced += float(spacing(D, dtype).square().sum())
    assert S is not None
    return S, before, after, change, spaced

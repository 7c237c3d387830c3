"""Random matrices and bases for tests, and the projection written out with dense projectors."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest relative error of one rounding; its root mean square is below half of that.
EPS = {
    dtype: torch.finfo(dtype).eps / 2
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
DTYPES = tuple(EPS)
COMPLEMENTS = {
    "core": ("none", "left", "right", "both"),
    "strict": ("none", "left", "right", "both"),
    "left": ("none", "left"),
    "right": ("none", "right"),
}
FORMS = tuple(COMPLEMENTS)


def gaussian(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def basis(n: int, r: int, *batch: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Orthonormal columns, row-major, rounded to `dtype`."""
    return torch.linalg.qr(gaussian(*batch, n, r, seed=seed)).Q.to(dtype).contiguous()


def sides(form: str, U: Tensor, V: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The bases that a form takes."""
    return (None if form == "right" else U), (None if form == "left" else V)


def projected(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    complement: str = "none",
    exact: bool = False,
) -> Tensor:
    """The projection in float64 by dense `m x m` and `n x n` projectors."""

    def projector(B: Tensor | None, size: int, kept: bool) -> Tensor:
        eye = torch.eye(size, dtype=torch.float64)
        if B is None:
            return torch.zeros_like(eye)
        B = B.double()
        dual = B @ torch.linalg.inv(B.mT @ B) if exact and B.shape[-1] else B
        P = B @ dual.mT
        return eye - P if kept else P

    G = G.double()
    P = projector(U, G.shape[-2], complement in ("left", "both"))
    Q = projector(V, G.shape[-1], complement in ("right", "both"))
    if form == "core":
        return G - P @ G @ Q
    return (G - P @ G) - (G - P @ G) @ Q


def error(got: Tensor, want: Tensor) -> float:
    """`‖got - want‖ / ‖want‖` in float64; infinite where anything is NaN."""
    difference = float((got.double() - want).norm())
    scale = float(want.norm())
    if difference != difference:
        return float("inf")
    return difference / scale if scale else difference

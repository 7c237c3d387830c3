"""The specification: every operation of the package as a few lines of torch.

Nothing here is fast. Each function says in code what the formula says on paper, works on any
floating dtype and any leading batch dimensions, and changes none of its arguments. Every fast path
is tested against these in float64 from the same rounded inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(G: Tensor, U: Tensor | None, V: Tensor | None, form: str = "core") -> Tensor:
    """`G - U(UᵀGV)Vᵀ`, `(I-UUᵀ)G(I-VVᵀ)`, `(I-UUᵀ)G` or `G(I-VVᵀ)`."""
    if form == "core":
        assert U is not None
        assert V is not None
        return G - U @ (U.mT @ G @ V) @ V.mT
    if form in ("strict", "left"):
        assert U is not None
        G = G - U @ (U.mT @ G)
    if form in ("strict", "right"):
        assert V is not None
        G = G - (G @ V) @ V.mT
    return G


def compress(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """`UᵀGV`."""
    return U.mT @ G @ V


def expand_add(W: Tensor, C: Tensor, U: Tensor, V: Tensor, alpha: float = 1.0) -> Tensor:
    """`W + alpha U C Vᵀ`."""
    return W + alpha * (U @ C @ V.mT)


def linear_gradients(
    x: Tensor, W: Tensor, dy: Tensor, U: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`dx, dbias, dC` of `y = x (W + U C Vᵀ)ᵀ + bias` for `x` `(T, n)` and `dy` `(T, m)`."""
    dW = dy.mT @ x
    return dy @ W, dy.sum(0), U.mT @ dW @ V


def split(W: Tensor, rank: int, part: str) -> tuple[Tensor, Tensor]:
    """Leading (`high`) or trailing (`low`) singular vectors of `W`, as columns."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    columns = slice(None, rank) if part == "high" else slice(rank, None)
    return U[..., columns], Vh.mT[..., columns]


def leak(delta: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`‖UᵀΔV‖/‖Δ‖`, `‖UᵀΔ‖/‖Δ‖`, `‖ΔV‖/‖Δ‖` in float64, one triple per matrix."""
    D, U, V = delta.double(), U.double(), V.double()
    norm = torch.linalg.matrix_norm(D)
    parts = (U.mT @ D @ V, U.mT @ D, D @ V)
    core, left, right = (torch.linalg.matrix_norm(part) / norm for part in parts)
    return core, left, right

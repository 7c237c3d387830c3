"""Exact projections of low-precision matrices from low-precision products, for accelerators.

Rounding an orthonormal basis to bfloat16 costs 1e-3 of orthonormality, and rounding an intermediate
result costs as much again. Both are avoided without a float32 product of full size:

- `B (BᵀB)⁻¹ Bᵀ` is an exact projector onto the span of the rounded basis; only the small core
  product is corrected, in float32;
- an intermediate result is kept as the sum of two bfloat16 matrices, `hi + lo`, which carry 16 of
  float32's 24 bits, so products with it are two products of the library.

About 1.5 times the arithmetic of the plain chain at the same basis memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels.plan.projections import arrange
from sculpt_kernels.products import matrices
from sculpt_kernels.projection import panels


def project_(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str, complement: str = "none"
) -> None:
    """Project low-precision `G` `(..., m, n)` in place, exact up to the rounding of the result.

    `core` without complements goes through split products; the other forms through float32 panels.
    """
    for X, A, B in matrices(G, U, V):
        assert X is not None
        if form == "core" and complement == "none":
            assert A is not None
            assert B is not None
            _remove_core(X, A, B)
        else:
            panels.project_matrix(X, A, B, form, complement, exact=True)


def _remove_core(G: Tensor, U: Tensor, V: Tensor) -> None:
    m, n = G.shape
    if arrange("core", "none", m, n, U.shape[1], V.shape[1], True).transposed:
        G, U, V = G.mT, V, U
    Y = product(G, V)
    core = gram_inverse(U) @ product_split(U.mT, Y) @ gram_inverse(V)
    high, low = split(product_split(U, core), G.dtype)
    # One update of twice the depth, so that the result is rounded once.
    G.addmm_(torch.cat((high, low), 1), torch.cat((V, V), 1).mT, alpha=-1)


def product(A: Tensor, B: Tensor) -> Tensor:
    """`A B` of low-precision matrices, accumulated and returned in float32."""
    if A.is_cuda:
        return torch.mm(A, B, out_dtype=torch.float32)
    return torch.mm(A.float(), B.float())


def product_split(A: Tensor, X: Tensor) -> Tensor:
    """`A X` for low-precision `A` and float32 `X`, which is split in two parts."""
    high, low = split(X, A.dtype)
    return product(A, high) + product(A, low)


def split(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`hi + lo = X` up to the square of the rounding of `dtype`."""
    high = X.to(dtype)
    return high, (X - high.float()).to(dtype)


def gram_inverse(B: Tensor) -> Tensor:
    """`(BᵀB)⁻¹` in float32."""
    return torch.cholesky_inverse(torch.linalg.cholesky(product(B.mT, B)))

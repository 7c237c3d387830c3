"""Orthonormal bases of a column span, by the cheapest algorithm that the conditioning allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.panels import compute_dtype


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal basis of the column span of `Y`.

    CholeskyQR2 (two passes of Gram, Cholesky, triangular solve: GEMM speed, safe while
    `cond(Y) < eps^-1/2`); where that fails, shifted CholeskyQR3 (Fukaya, Kannan, Nakatsukasa,
    Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42, 2020; safe to about `1/eps`); where that fails
    too, Householder QR. The result is measured before it is accepted.

    Args:
        Y: `(..., n, r)` with `r <= n`, any floating dtype.

    Returns:
        `(..., n, r)` in the dtype of `Y`, row-major; `max |QᵀQ - I|` within rounding of that dtype.
        Columns of a rank-deficient `Y` are completed to an orthonormal set.

    Raises:
        TypeError, ValueError: not a floating matrix, more columns than rows, or not finite.
    """
    return orthonormalize_with_method(Y)[0]


def orthonormalize_with_method(Y: Tensor) -> tuple[Tensor, str]:
    """As `orthonormalize`; also name the algorithm that succeeded."""
    checks.matrix("Y", Y, like="(..., n, r)")
    if Y.shape[-1] > Y.shape[-2]:
        raise ValueError(f"Y must have at most as many columns as rows; got {checks.describe(Y)}")
    checks.finite("Y", Y)
    A = Y.to(compute_dtype(Y.dtype))
    if A.numel() == 0:
        return torch.empty_like(Y, memory_format=torch.contiguous_format), "cholesky-qr2"
    # Columns of one length: scaling changes no span, and the Gram matrix is as well
    # conditioned as a diagonal scaling can make it, within sqrt(r) of the best.
    norms = torch.linalg.vector_norm(A, dim=-2, keepdim=True)
    A = A / torch.where(norms > 0, norms, 1)
    for method, passes in (
        ("cholesky-qr2", (0.0, 0.0)),
        ("shifted-cholesky-qr3", (_shift(A), 0.0, 0.0)),
    ):
        Q = _cholesky_qr(A, passes)
        if Q is not None and _is_orthonormal(Q):
            return Q.to(Y.dtype).contiguous(), method
    return torch.linalg.qr(A).Q.to(Y.dtype).contiguous(), "householder"


def _shift(A: Tensor) -> float:
    """`11 (nr + r(r+1)) eps ‖A‖²` for unit columns, where `‖A‖² <= r`; the source is above."""
    n, r = A.shape[-2:]
    return 11 * (n * r + r * (r + 1)) * torch.finfo(A.dtype).eps * r


def _cholesky_qr(A: Tensor, shifts: tuple[float, ...]) -> Tensor | None:
    for shift in shifts:
        gram = A.mT @ A
        if shift:
            gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        L, info = torch.linalg.cholesky_ex(gram)
        if bool(info.any()):
            return None
        A = torch.linalg.solve_triangular(L.mT, A, upper=True, left=False)
    return A


def _is_orthonormal(Q: Tensor) -> bool:
    r = Q.shape[-1]
    defect = (Q.mT @ Q - torch.eye(r, dtype=Q.dtype, device=Q.device)).abs().amax()
    return bool(defect <= 8 * torch.finfo(Q.dtype).eps * max(1.0, math.sqrt(r)))

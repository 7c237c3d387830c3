"""Orthonormal bases of a column span, by the cheapest algorithm that the conditioning allows."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.operation import operation
from sculpt_kernels.products import compute_dtype
from sculpt_kernels.subspaces.symmetric import symmetric_product


@operation()
def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal basis of the column span of `Y`.

    By the cheapest algorithm that is safe: CholeskyQR (passes of Gram, Cholesky, triangular solve:
    GEMM speed, safe while `cond(Y) < eps^-1/2`); where that fails, shifted CholeskyQR3 (Fukaya,
    Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42, 2020; safe to about
    `1/eps`); where that fails too, Householder QR. A pass that leaves the columns nearly
    orthonormal is followed by a step to the nearest orthonormal basis, whose error is known from
    what is measured before it; columns that are nearly orthogonal as they come need that step only.

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
        return torch.empty_like(Y, memory_format=torch.contiguous_format), "polar"
    # Columns of about one length: scaling changes no span, and the Gram matrix is as well
    # conditioned as a diagonal scaling can make it, within sqrt(r) of the best.
    norms = torch.linalg.vector_norm(A, dim=-2, keepdim=True)
    if bool(((norms < 0.5) | (norms > 2)).any()):
        A = A / torch.where(norms > 0, norms, 1)
    first = symmetric_product(A.mT)
    for method, shifts in (
        ("polar", ()),
        ("cholesky-qr2", (False, False)),
        ("shifted-cholesky-qr3", (True, False, False)),
    ):
        Q = _cholesky_qr(A, first, shifts)
        if Q is not None:
            return Q.to(Y.dtype).contiguous(), method
    return torch.linalg.qr(A).Q.to(Y.dtype).contiguous(), "householder"


def _shift(A: Tensor, gram: Tensor) -> Tensor:
    """`11 (nr + r(r+1)) eps ‖A‖²` `(...)`, with `‖A‖²` bounded by the trace; source as above."""
    n, r = A.shape[-2:]
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return 11 * (n * r + r * (r + 1)) * torch.finfo(A.dtype).eps * trace


def _cholesky_qr(A: Tensor, gram: Tensor, shifts: tuple[bool, ...]) -> Tensor | None:
    """Up to one Cholesky pass per shift, until a polar step can finish; `None` if none can."""
    Q = _polar_step(A, gram) if not shifts else None
    for shift in shifts:
        A = cholesky_pass(A, gram, _shift(A, gram) if shift else None)
        gram = symmetric_product(A.mT)
        # NaN after a failed Cholesky factorization; no later pass would mend it.
        if not bool(torch.isfinite(gram).all()):
            return None
        Q = _polar_step(A, gram)
        if Q is not None:
            break
    return Q


def cholesky_pass(A: Tensor, gram: Tensor, shift: Tensor | None = None) -> Tensor:
    """`A R⁻¹` with `RᵀR = AᵀA + shift I`; NaN where that is not positive definite. No host sync."""
    if shift is not None:
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        gram = gram + shift[..., None, None] * eye
    L, info = torch.linalg.cholesky_ex(gram)
    L = torch.where((info == 0)[..., None, None], L, torch.nan)
    Q: Tensor = torch.linalg.solve_triangular(L.mT, A, upper=True, left=False)
    return Q


def _polar_step(A: Tensor, gram: Tensor) -> Tensor | None:
    """`A (AᵀA)^-½`, the nearest orthonormal basis, where `AᵀA = I + E` with small `E`; else `None`.

    `A` itself where `E` is rounding. Otherwise the series `I - E/2 + 3E²/8`, which leaves a defect
    of `5E³/8`, at most `5/8 ‖E²‖_F^1.5`: within two roundings, or the step is refused.
    """
    E = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    r = E.shape[-1]
    if bool(E.abs().amax() <= 2 * torch.finfo(E.dtype).eps * r**0.5):
        return A
    allowed = (16 / 5 * torch.finfo(E.dtype).eps) ** (2 / 3)
    # Cheap and necessary: ‖E‖²_F <= √r ‖E²‖_F.
    if not bool((E.square().sum((-2, -1)) <= r**0.5 * allowed).all()):
        return None
    E2 = symmetric_product(E)
    if not bool((torch.linalg.matrix_norm(E2) <= allowed).all()):
        return None
    T = torch.eye(r, dtype=E.dtype, device=E.device) - E / 2 + 3 / 8 * E2
    return A @ T

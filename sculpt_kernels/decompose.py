"""The algorithms behind `split`: from a matrix to its leading or trailing singular bases.

Each takes a wide `A` `(..., m, n)`, `m <= n`, in float32 or float64, a `Request`, and returns
`Parts`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sculpt_kernels.basis import orthonormalize
from sculpt_kernels.quadrature import density
from sculpt_kernels.randomized import settled_rsvd
from sculpt_kernels.spectral import leading_eigenvectors


@dataclass(frozen=True)
class Request:
    """What to find: a preserved `rank` or the least one for an `energy`, which part, which seed."""

    rank: int | None
    energy: float | None
    part: str
    seed: int

    def choose(self, share: Tensor) -> int:
        """Preserved rank, given the share of energy in the leading 1, 2, ... directions."""
        if self.rank is not None:
            return self.rank
        assert self.energy is not None
        return int((share < self.energy).sum(-1).max()) + 1

    def columns(self, h: int) -> slice:
        return slice(None, h) if self.part == "high" else slice(h, None)


@dataclass(frozen=True)
class Parts:
    """Bases `U` `(..., m, t)`, `V` `(..., n, t)`; see `Subspace` for the others."""

    U: Tensor
    V: Tensor
    rank: int
    energy: float
    method: str
    converged: bool = True


def svd(A: Tensor, request: Request) -> Parts:
    """`torch.linalg.svd`, whole."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    share = _shares(S.square())
    h = request.choose(share)
    columns = request.columns(h)
    return Parts(U[..., columns], Vh.mT[..., columns], h, _kept(share, h), "svd")


def gram(A: Tensor, request: Request) -> Parts:
    """Eigenvectors of `A Aᵀ`; the long side by one product.

    In the dtype of `A`, and again in float64 where the gap at the cut is below what float32
    resolves: forming the Gram matrix leaves an error of about `eps λ₁` in each eigenvalue.
    """
    values, vectors = torch.linalg.eigh(A @ A.mT)
    squares, U = values.flip(-1).clamp_min(0), vectors.flip(-1)
    share = _shares(squares)
    h = request.choose(share)
    if A.dtype == torch.float32 and 0 < h < A.shape[-2]:
        gap = squares[..., h - 1] - squares[..., h]
        if bool((gap < 32 * torch.finfo(A.dtype).eps * squares[..., 0]).any()):
            exact = gram(A.double(), request)
            return replace(exact, U=exact.U.to(A.dtype), V=exact.V.to(A.dtype))
    V = _long_side(A, U, squares, h, request)
    return Parts(U[..., request.columns(h)], V, h, _kept(share, h), "gram")


def _long_side(A: Tensor, U: Tensor, squares: Tensor, h: int, request: Request) -> Tensor:
    """Right basis of the part whose left basis is in `U`, orthogonal to that of the other part.

    The columns of `AᵀU` are orthogonal up to rounding, which counts by `κ = λ₁ / sqrt(λ_h λ_k)`.
    Where that is not small, one step takes the leading directions out of the trailing ones, with
    `V_h` in the implicit form `AᵀU_h Λ_h^-½`. A column that loses half of its length in that step
    was rounding noise, from a singular value of about zero: a Householder QR of all columns in
    falling order makes such a one orthogonal to all that came before it. So it does where the
    leading singular values themselves are not resolved.
    """
    columns = request.columns(h)
    eps = torch.finfo(A.dtype).eps
    last = squares[..., max(h, 1) - 1]
    if not bool((last > 8 * A.shape[-2] * eps * squares[..., 0]).all()):
        return _ordered_qr(A, U)[..., columns]
    B = A.mT @ U[..., columns]
    if request.part == "high" or h == 0:
        return orthonormalize(B)
    kappa = squares[..., 0] / (last * squares[..., -1]).sqrt()
    if not bool((kappa <= eps ** (-1 / 3) / 6).all()):
        high = U[..., :h]
        inner = (high.mT @ (A @ B)) / squares[..., :h].unsqueeze(-1)
        cleaned = B - A.mT @ (high @ inner)
        before, after = (torch.linalg.vector_norm(X, dim=-2) for X in (B, cleaned))
        if not bool(((after >= before / 2) & (after > 0)).all()):
            return _ordered_qr(A, U)[..., columns]
        B = cleaned
    return orthonormalize(B)


def _ordered_qr(A: Tensor, U: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(A.mT @ U).Q
    return Q


def range_(A: Tensor, request: Request) -> Parts:
    """Randomized range finder that iterates until the captured energy settles.

    For a rank by energy the sketch is doubled until it holds that share.
    """
    k = A.shape[-2]
    total = A.square().sum((-2, -1)).unsqueeze(-1)
    width = request.rank if request.rank is not None else max(1, k // 16)
    while True:
        U, S, V, converged = settled_rsvd(A, width, request.seed)
        share = torch.where(total > 0, S.square().cumsum(-1) / total, 1.0).clamp_max(1.0)
        reached = request.energy is None or bool((share[..., -1] >= request.energy).all())
        if reached or width == k:
            break
        width = min(k, 2 * width)
    h = min(request.choose(share), k)
    if h < width:
        U, V = U[..., :h], V[..., :h]
    energy = _kept(share, h)
    if request.part == "low":
        U, V = _complement(A, U, V)
    return Parts(U, V, h, energy, "range", converged and reached)


def _complement(A: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Trailing bases from leading ones: the rest of the short side, and its image without `V`."""
    h = U.shape[-1]
    low = torch.linalg.qr(U, mode="complete").Q[..., h:]
    image = A.mT @ low
    image = image - V @ (V.mT @ image)
    # Columns of `V` first, so that directions without energy are completed away from them.
    both = torch.linalg.qr(torch.cat([V, image], -1)).Q
    return low, both[..., h:]


# An invariant subspace to this accuracy separates eigenvalues 1e-4 λ₁ apart to about 1e-6.
INVARIANT = {torch.float32: 1e-5, torch.float64: 1e-10}


def spectral(A: Tensor, request: Request) -> Parts:
    """Matrix products only; `gram` instead where the result is not an invariant subspace.

    That happens where the cut goes through a cluster of (almost) equal eigenvalues, and the method
    is then said to be `gram`.
    """
    S = A @ A.mT
    k = A.shape[-2]
    h = request.rank
    if h is None:
        assert request.energy is not None
        estimate, error = density(S, request.seed).rank_for(request.energy)
        # On the safe side by twice the standard error of the quadrature.
        h = min(k, int((estimate + 2 * error).max().ceil()))
    fixed = replace(request, rank=h)
    if not 0 < h < k or k < 64:
        return gram(A, fixed)
    Q, residual = leading_eigenvectors(S, h, request.seed)
    if not bool((residual <= INVARIANT[A.dtype]).all()):
        return gram(A, fixed)
    total = A.square().sum((-2, -1))
    image = A.mT @ Q
    kept = image.square().sum((-2, -1)) / total
    V = orthonormalize(image)
    U = Q
    if request.part == "low":
        U, V = _complement(A, Q, V)
    return Parts(U, V, h, float(kept.min().clamp_max(1.0)), "spectral")


ALGORITHMS = {"svd": svd, "gram": gram, "range": range_, "spectral": spectral}


def choose_method(shape: tuple[int, ...], device: torch.device) -> str:
    """The algorithm of `method="auto"`.

    On CPU `gram` won every measured shape from 64 to 2752. On GPU an eigendecomposition is a chain
    of small kernels and a loop over the batch, products are what the device is made for: from 1024
    on `spectral` is predicted to win.
    """
    return "spectral" if device.type == "cuda" and min(shape[-2:]) >= 1024 else "gram"


def _shares(squares: Tensor) -> Tensor:
    """Share of energy in the leading 1, 2, ... directions; a zero matrix has none to lose."""
    total = squares.sum(-1, keepdim=True)
    return torch.where(total > 0, squares.cumsum(-1) / total, 1.0)


def _kept(share: Tensor, h: int) -> float:
    return float(share[..., h - 1].min()) if h else 0.0

"""Right singular bases from left ones: products, and as much repair as rounding asks for.

`A` `(..., k, n)` is wide, `U` `(..., k, k)` are its left singular vectors in falling order of
`squares` `(..., k)`, the squared singular values, all with the rounding of an eigendecomposition of
`A Aᵀ`. The right vectors are `AᵀU Λ^-½`. Rounding leaves errors of about `eps λ₁ / sqrt(λ_i λ_j)`
in their inner products, which may be much where singular values are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels.subspaces.basis import orthonormalize, orthonormalize_with_method
from sculpt_kernels.subspaces.sketch import DEFAULT_SEED, sketch

# Random probes of a norm. The probability that it is twice what they show is below 1e-5.
PROBES = 32
# Elements of a matrix that is not worth making probes for.
SMALL = 2**16
# Of the unit `eps k^½` of orthonormality; a basis may have 50, so twice as much is still within it.
ALLOWED = 24.0
# Elements of a matrix for which a Householder QR costs less than anything built to avoid it.
DIRECT = 2**18


def numerical_rank(A: Tensor, U: Tensor, squares: Tensor) -> int:
    """Number of leading directions beyond which `A` is zero up to rounding; `k` if there is none.

    Also `k` where values in between leave it open, or where the matrices of a batch differ.
    """
    k = A.shape[-2]
    eps = torch.finfo(A.dtype).eps
    known = squares > _unresolved(squares)
    if bool(known[..., -1].all()):
        return k
    counts = known.sum(-1)
    rank = int(counts.min())
    if rank != int(counts.max()) or not bool(
        (squares[..., rank] <= 32 * eps * squares[..., 0]).all()
    ):
        return k
    rest = U[..., rank:]
    image = A.mT @ _probed(rest)
    # An error of U, not of A, where the image is in the leading directions.
    image = without_leading(A, U[..., :rank], squares[..., :rank], image)
    found = torch.linalg.matrix_norm(image)
    rounding = eps * (k - rank) ** 0.5 * torch.linalg.matrix_norm(A)
    return rank if bool((found <= rounding).all()) else k


def _unresolved(squares: Tensor) -> Tensor:
    """Squared singular values up to this `(..., 1)` are as good as unknown."""
    return 8 * squares.shape[-1] * torch.finfo(squares.dtype).eps * squares[..., :1]


def _probed(X: Tensor) -> Tensor:
    """A matrix of few columns that has the norm of `X` on average, and so in each row; or `X`."""
    if X.shape[-2] * X.shape[-1] <= SMALL:
        return X
    signs = sketch(X.shape[-1], PROBES, DEFAULT_SEED, dtype=X.dtype, device=X.device)
    probes: Tensor = signs / (8 * PROBES) ** 0.5
    return X @ probes


def right_vectors(A: Tensor, U: Tensor, squares: Tensor, h: int, part: str, rank: int) -> Tensor:
    """Right basis of one part of a split at `h`, orthogonal to that of the other part.

    `rank` is the numerical rank. The columns beyond it are any that complete the others: those of
    the trailing part come first, so that nobody needs the leading ones in order to find them.
    """
    k = A.shape[-2]
    if rank == k or (part == "high" and h <= rank):
        return _images(A, U, squares, h, part)
    leading = U[..., :rank], squares[..., :rank]
    free = completion(A, *leading, min(k - h, k - rank))
    if free is None:
        return _ordered_qr(A, U, h, part)
    if part == "low":
        return free if h >= rank else torch.cat([_images(A, *leading, h, part), free], -1)
    known = _images(A, *leading, rank, part) if rank else free[..., :0]
    # Householder vectors of columns of zeros complete those before them.
    zeros = known.new_zeros(*known.shape[:-1], h - rank)
    Q = torch.linalg.qr(torch.cat([known, free, zeros], -1)).Q
    return torch.cat([known, Q[..., k - (h - rank) :]], -1)


def _images(A: Tensor, U: Tensor, squares: Tensor, h: int, part: str) -> Tensor:
    """As `right_vectors`, of the vectors in `U`, which may be short of some at the end.

    Trailing columns are measured against the leading ones and cleaned where rounding is more than
    orthonormality leaves room for. Where that does not help, because trailing columns are noise, a
    Householder QR makes them orthogonal to the leading basis as it is returned; and one in falling
    order gives all columns where the leading singular values themselves are not resolved.
    """
    k = A.shape[-2]
    last = squares[..., max(h, 1) - 1]
    if not bool((last > _unresolved(squares)[..., 0]).all()):
        return _ordered_qr(A, U, h, part)
    # Of length one, but for columns of noise.
    floor = 16 * torch.finfo(A.dtype).eps * (k * squares[..., :1]).sqrt()

    def images(columns: slice) -> Tensor:
        lengths = torch.maximum(squares[..., columns].sqrt(), floor)
        return A.mT @ (U[..., columns] / lengths.unsqueeze(-2))

    if part == "high":
        return orthonormalize(images(slice(h)))
    B = images(slice(h, None))
    kappa = squares[..., 0] / (last * squares[..., -1]).sqrt()
    if h == 0 or bool((kappa <= 4 * k**0.5).all()):
        return orthonormalize(B)
    high = U[..., :h], squares[..., :h]
    lengths = torch.linalg.vector_norm(B, dim=-2)
    rounds = [ALLOWED, ALLOWED / 4, ALLOWED / 4]
    if not bool(((lengths > 0.5) & (lengths < 1.5)).all()):
        B = without_leading(A, *high, B)
        del rounds[0]
    Q = _settled(A, *high, B, rounds)
    if Q is None:
        Q = torch.linalg.qr(torch.cat([orthonormalize(images(slice(h))), B], -1)).Q[..., h:]
    return Q


def _settled(
    A: Tensor, U: Tensor, squares: Tensor, B: Tensor, rounds: list[float]
) -> Tensor | None:
    """Orthonormal basis of the span of `B` without leading directions; `None` for dependent ones.

    Each round leaves of them what rounding in the one before it made of the condition of `B`, and
    ends it where that is within what the round allows.
    """
    for allowed in rounds:
        B, method = orthonormalize_with_method(B)
        if method == "householder":
            return None
        if apart(A, U, squares, B, allowed):
            return B
        B = without_leading(A, U, squares, B)
    return None


def _ordered_qr(A: Tensor, U: Tensor, h: int, part: str) -> Tensor:
    Q: Tensor = torch.linalg.qr(A.mT @ U).Q
    return Q[..., :h] if part == "high" else Q[..., h:]


def without_leading(A: Tensor, U: Tensor, squares: Tensor, B: Tensor) -> Tensor:
    """`(I - V Vᵀ) B` with `V` in the implicit form `AᵀU Λ^-½`; `B` is `(..., n, c)`."""
    return B - A.mT @ (U @ ((U.mT @ (A @ B)) / squares.unsqueeze(-1)))


def apart(A: Tensor, U: Tensor, squares: Tensor, B: Tensor, allowed: float) -> bool:
    """Whether each row of `VᵀB`, `V = AᵀU Λ^-½`, is within `allowed` units: measured by probes."""
    shadow = U.mT @ (A @ _probed(B))
    rows = torch.linalg.vector_norm(shadow, dim=-1)
    unit = torch.finfo(A.dtype).eps * A.shape[-2] ** 0.5
    return bool((rows <= allowed * unit * squares.sqrt()).all())


def completion(A: Tensor, U: Tensor, squares: Tensor, count: int) -> Tensor | None:
    """`count` orthonormal columns orthogonal to the rows of `A`, whose singular vectors are `U`.

    Unit vectors without what they have in common with the rows, taken where the columns of `A` are
    shortest. `None` where those are too close to being linearly dependent, as they are where they
    have hardly more dimensions than columns; and where it is not worth while.
    """
    if A.shape[-2] * A.shape[-1] <= DIRECT or A.shape[-1] - U.shape[-1] < 1.25 * count:
        return None
    order = A.square().sum(-2).argsort(dim=-1, stable=True)[..., None, :count]
    B = A.new_zeros(*A.shape[:-2], A.shape[-1], count).scatter(-2, order, 1)
    # Of a unit vector the image is a column: one product less.
    image = A.gather(-1, order.expand(*A.shape[:-1], count))
    B = B - A.mT @ (U @ ((U.mT @ image) / squares.unsqueeze(-1)))
    return _settled(A, U, squares, B, 3 * [ALLOWED / 4])

"""The algorithms behind `split`: from a matrix to its leading or trailing singular bases.

Each takes a wide `A` `(..., m, n)`, `m <= n`, in float32 or float64, a `Request`, and returns
a `Subspace`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sculpt_kernels.subspaces.basis import orthonormalize
from sculpt_kernels.subspaces.quadrature import density
from sculpt_kernels.subspaces.randomized import settled_rsvd
from sculpt_kernels.subspaces.right_basis import numerical_rank, right_vectors
from sculpt_kernels.subspaces.spectral import invariant_subspace
from sculpt_kernels.subspaces.symmetric import symmetric_product


@dataclass(frozen=True)
class Request:
    """What to find: a preserved `rank` or the least one for an `energy`, and which part.

    `dtype` is that of the result, `seed` that of the random methods.
    """

    rank: int | None
    energy: float | None
    part: str
    seed: int
    dtype: torch.dtype

    def choose(self, share: Tensor) -> int:
        """Preserved rank, given the share of energy in the leading 1, 2, ... directions."""
        if self.rank is not None:
            return self.rank
        assert self.energy is not None
        return int((share < self.energy).sum(-1).max()) + 1

    def columns(self, h: int) -> slice:
        return slice(None, h) if self.part == "high" else slice(h, None)


@dataclass(frozen=True)
class Subspace:
    """Singular subspaces of a matrix `W` `(..., m, n)` with `k = min(m, n)`.

    Attributes:
        U: `(..., m, t)` left basis, V: `(..., n, t)` right basis; orthonormal columns, row-major;
            the dtype of `W`, float32 for bfloat16 and float16. `t = rank` for `part="high"`,
            `t = k - rank` for `part="low"`.
        rank: preserved rank `h`.
        part: `"high"` (leading, preserved) or `"low"` (trailing, trainable).
        energy: share of `‖W‖²_F` in the leading `h` directions that were found, measured; the
            smallest one of a batch. 1 for a zero matrix, which has none to lose.
        method: algorithm that was used; `"spectral and gram"` where a batch needed both.
        converged: `"range"` only: whether the captured energy settled and, for a rank by energy,
            reached what was asked. Always true otherwise.
        rank_error: standard error of a `rank` that was chosen by energy from a quadrature; the rank
            is twice that on the safe side. 0 where it comes from singular values.
    """

    U: Tensor
    V: Tensor
    rank: int
    part: str
    energy: float
    method: str
    converged: bool = True
    rank_error: float = 0.0


def svd(A: Tensor, request: Request) -> Subspace:
    """`torch.linalg.svd`, whole."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    share = _shares(S.square())
    h = request.choose(share)
    columns = request.columns(h)
    energy = _kept(share, h)
    return Subspace(U[..., columns], Vh.mT[..., columns], h, request.part, energy, "svd")


def gram(A: Tensor, request: Request) -> Subspace:
    """Eigenvectors of `A Aᵀ`; the right vectors by one product.

    In the dtype of `A`. Forming the Gram matrix leaves an error of about `eps λ₁` in each
    eigenvalue: where float32 does not resolve the gap at the cut, the vectors next to it are
    separated in float64 by a Rayleigh-Ritz step; and where that is not enough, because too many are
    close, all is done again in float64, unless the values at the cut are so close that the rounding
    of a float32 matrix alone decides between them.
    """
    values, vectors = torch.linalg.eigh(symmetric_product(A, lower=True))
    squares, U = values.flip(-1).clamp_min(0), vectors.flip(-1)
    share = _shares(squares)
    h = request.choose(share)
    rank = numerical_rank(A, U, squares)
    if A.dtype == torch.float32 and 0 < h < A.shape[-2] and h <= rank:
        noise = 32 * torch.finfo(A.dtype).eps * squares[..., :1]
        if bool((squares[..., h - 1 : h] - squares[..., h : h + 1] < noise).any()):
            near, resolved = _window(squares, h, noise)
            squares, U = _separated(A, squares, U, near)
            if not resolved and _determined(squares, h):
                exact = gram(A.double(), request)
                return replace(exact, U=exact.U.to(A.dtype), V=exact.V.to(A.dtype))
    V = right_vectors(A, U, squares, h, request.part, rank)
    U = U[..., request.columns(h)]
    return Subspace(U, V, h, request.part, _kept(share, h), "gram")


# Vectors on either side of the cut that a Rayleigh-Ritz step separates: at least, and in doubt; at
# most of few, and as a share of many.
LEAST_WINDOW, WINDOW, WINDOW_SHARE = 8, 32, 1 / 16


def _window(squares: Tensor, h: int, noise: Tensor) -> tuple[slice, bool]:
    """The vectors to separate, and whether what is left mixed is then far enough apart.

    That is what lies above them with what lies below the cut, and what lies below them with what
    lies above the cut: by twice as many values as are within the noise.
    """
    above = int((squares[..., :h] - squares[..., h : h + 1] < noise).sum(-1).max())
    below = int((squares[..., h - 1 : h] - squares[..., h:] < noise).sum(-1).max())
    most = max(WINDOW, int(WINDOW_SHARE * squares.shape[-1]))
    if max(above, below) > most:
        return slice(max(0, h - LEAST_WINDOW), h + LEAST_WINDOW), False
    above, below = (max(LEAST_WINDOW, 2 * count) for count in (above, below))
    return slice(max(0, h - above), h + below), True


def _determined(squares: Tensor, h: int) -> bool:
    """Whether some matrix of the batch tells its singular values at the cut apart."""
    values = squares.sqrt()
    eps = torch.finfo(squares.dtype).eps
    return bool((values[..., h - 1] - values[..., h] > eps * values[..., 0]).any())


def _separated(A: Tensor, squares: Tensor, U: Tensor, near: slice) -> tuple[Tensor, Tensor]:
    """`squares` and `U` with those that are `near` replaced by what is best within their span."""
    inside, turned = _ritz(A, U[..., near])

    def placed(X: Tensor, part: Tensor) -> Tensor:
        return torch.cat([X[..., : near.start], part, X[..., near.stop :]], -1)

    return placed(squares, inside), placed(U, turned)


def _ritz(A: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values and left vectors of `A` within the span of `U`, falling.

    In float64 throughout: a basis orthonormal to float32 only would mix what is being separated.
    """
    basis = orthonormalize(U.double())
    image = A.mT.double() @ basis
    values, turn = torch.linalg.eigh(image.mT @ image)
    return values.flip(-1).clamp_min(0).to(U.dtype), (basis @ turn.flip(-1)).to(U.dtype)


def range_(A: Tensor, request: Request) -> Subspace:
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
    return Subspace(U, V, h, request.part, energy, "range", converged and reached)


def _complement(A: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Trailing bases from leading ones: the rest of the short side, and its image without `V`."""
    h = U.shape[-1]
    low = torch.linalg.qr(U, mode="complete").Q[..., h:]
    image = A.mT @ low
    image = image - V @ (V.mT @ image)
    # Columns of `V` first, so that directions without energy are completed away from them.
    both = torch.linalg.qr(torch.cat([V, image], -1)).Q
    return low, both[..., h:]


# Smallest matrix for which a few percent of the eigenvalues are enough for a margin.
SMALLEST_SPECTRAL = 64
# Elements of the Gram matrices that are worked on at a time; each takes a dozen float64 copies.
GROUP_ELEMENTS = 2**26


def spectral(A: Tensor, request: Request) -> Subspace:
    """Matrix products, in float64; `gram` instead for those matrices where the result is off.

    That happens where the cut goes through a cluster of (almost) equal eigenvalues or values of
    about zero, or where the quadrature missed. float64 because the span is only as good as the Gram
    matrix, and because on the devices that this method is for float64 products run at the rate of
    float32 ones.
    """
    *batch, k, n = A.shape
    exact = A.double().reshape(-1, k, n)
    matrices = torch.split(exact, max(1, GROUP_ELEMENTS // k**2))
    grams = [symmetric_product(X) for X in matrices]
    h, uncertain = request.rank, 0.0
    if h is None:
        assert request.energy is not None
        found = [density(S, request.seed).rank_for(request.energy) for S in grams]
        rank, error = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        # On the safe side by twice the standard error of the quadrature.
        h = min(k, int((rank + 2 * error).max().ceil()))
        uncertain = float(error.max())
    request = replace(request, rank=h)
    if not 0 < h < k or k < SMALLEST_SPECTRAL:
        return replace(gram(A, request), rank_error=uncertain)
    bases = [_spectral(X, S, h, request) for X, S in zip(matrices, grams, strict=True)]
    U, V, kept, good = (torch.cat(tensors) for tensors in zip(*bases, strict=True))
    redone = (~good).nonzero().flatten().tolist()
    for index in redone:
        other = gram(exact[index], request)
        U[index], V[index], kept[index] = other.U, other.V, other.energy
    names = ["spectral"] * (len(redone) < len(exact)) + ["gram"] * bool(redone)
    return Subspace(
        U.reshape(*batch, k, -1).to(A.dtype),
        V.reshape(*batch, n, -1).to(A.dtype),
        h,
        request.part,
        float(kept.min()),
        " and ".join(names),
        rank_error=uncertain,
    )


# Angle up to which a span counts as found, and part outside it up to which it is invariant.
SHARP = 1e-5
INVARIANT = 1e-12


def _spectral(A: Tensor, S: Tensor, h: int, request: Request) -> tuple[Tensor, ...]:
    """`U`, `V`, share of energy, and whether both bases are as they should be."""
    high = request.part == "high"
    k = S.shape[-1]
    U, above, below = invariant_subspace(S, h if high else k - h, high, request.seed)
    image = A.mT @ U.nan_to_num()
    total = A.square().sum((-2, -1))
    share = image.square().sum((-2, -1)) / torch.where(total > 0, total, 1)
    V = orthonormalize(image if high else _cleaned(A, S, U.nan_to_num(), image))
    SU, AV = S @ U, A @ V
    residual, crossing = (torch.linalg.matrix_norm(X - U @ (U.mT @ X)) for X in (SU, AV))
    scale = torch.linalg.matrix_norm(S)
    eps = torch.finfo(request.dtype).eps
    # By Davis and Kahan the angle to the exact span is at most the residual over the gap.
    good = residual <= torch.minimum(SHARP * (above - below), INVARIANT * scale)
    good &= above > k * torch.finfo(S.dtype).eps * scale
    if not high:
        # ‖Σ_h V_hᵀ V‖: what V has in common with the leading right vectors, times their values.
        good &= crossing <= 50 * eps * k**0.5 * above.clamp_min(0).sqrt()
    return U, V, (share if high else 1 - share).clamp(0, 1), good


def _cleaned(A: Tensor, S: Tensor, U: Tensor, image: Tensor) -> Tensor:
    """`AᵀU` of trailing `U` without what rounding left in it of the leading right vectors.

    `B - AᵀX` with `X` in the leading left span such that `A (B - AᵀX)` is in the trailing one:
    `S X = (I - UUᵀ) A B`, where `S` may be lifted on the span of `U` at will.
    """
    outside = A @ image
    outside = outside - U @ (U.mT @ outside)
    lifted = S + torch.linalg.matrix_norm(S)[..., None, None] * symmetric_product(U)
    L, info = torch.linalg.cholesky_ex(lifted)
    cleaned = image - A.mT @ torch.cholesky_solve(outside, L)
    return torch.where((info == 0)[..., None, None], cleaned, image)


ALGORITHMS = {"svd": svd, "gram": gram, "range": range_, "spectral": spectral}


def _shares(squares: Tensor) -> Tensor:
    """Share of energy in the leading 1, 2, ... directions; a zero matrix has none to lose."""
    total = squares.sum(-1, keepdim=True)
    return torch.where(total > 0, squares.cumsum(-1) / total, 1.0)


def _kept(share: Tensor, h: int) -> float:
    return float(share[..., h - 1].min()) if h else 0.0

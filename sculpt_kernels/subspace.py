"""Splitting a weight matrix into its leading and its trailing singular subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.panels import compute_dtype

METHODS = ("auto", "svd", "gram")


@dataclass(frozen=True)
class Subspace:
    """Singular subspaces of a matrix `W` `(..., m, n)` with `k = min(m, n)`.

    Attributes:
        U: `(..., m, t)` left basis, V: `(..., n, t)` right basis; orthonormal columns, row-major;
            the dtype of `W`, float32 for bfloat16 and float16. `t = rank` for `part="high"`,
            `t = k - rank` for `part="low"`.
        rank: preserved rank `h`.
        part: `"high"` (leading, preserved) or `"low"` (trailing, trainable).
        energy: share of `‖W‖²_F` in the leading `h` directions; the smallest one of a batch.
        method: algorithm that was used.
    """

    U: Tensor
    V: Tensor
    rank: int
    part: str
    energy: float
    method: str


def split(
    W: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    part: str = "low",
    method: str = "auto",
    generator: torch.Generator | None = None,
) -> Subspace:
    """Leading or trailing singular subspace of `W`.

    `"gram"` takes the eigenvectors of the smaller Gram matrix in float64 and obtains the long side
    by one product and a Householder QR in order of falling singular value, so that both parts are
    orthonormal and orthogonal to each other also where singular values are zero or repeated.
    `"svd"` is `torch.linalg.svd`. `"auto"` takes `"gram"`.

    Args:
        W: `(..., m, n)`, finite.
        rank: preserved rank `h`, `0 <= h <= min(m, n)`. Exactly one of `rank` and `energy`.
        energy: in (0, 1): the smallest `h` that keeps that share of `‖W‖²_F` (for a batch: of
            every matrix).
        part: `"low"` for the trailing `min(m, n) - h` directions, `"high"` for the leading `h`.
        method: `"auto"`, `"svd"` or `"gram"`.
        generator: not used by these deterministic methods.

    Raises:
        TypeError, ValueError: an argument does not fit, or `W` is not finite.
    """
    checks.matrix("W", W)
    if 0 in W.shape:
        raise ValueError(f"W must not be empty; got {checks.describe(W)}")
    checks.choice("part", part, checks.PARTS)
    checks.choice("method", method, METHODS)
    k = min(W.shape[-2:])
    if (rank is None) == (energy is None):
        raise ValueError(
            f"exactly one of rank and energy must be given; got rank={rank!r}, energy={energy!r}"
        )
    if rank is not None:
        checks.rank_in("rank", rank, k)
    if energy is not None:
        checks.fraction("energy", energy)
    checks.finite("W", W)

    used = "gram" if method == "auto" else method
    A = W.detach().double()
    U, squares, V = _svd(A) if used == "svd" else _gram(A)
    total = squares.sum(-1, keepdim=True)
    # A zero matrix has no energy to lose: any rank keeps all of it.
    share = torch.where(total > 0, squares.cumsum(-1) / total, 1.0)
    h = rank if rank is not None else _rank_for(share, energy)
    columns = slice(None, h) if part == "high" else slice(h, None)
    dtype = compute_dtype(W.dtype)
    return Subspace(
        U=U[..., columns].to(dtype).contiguous(),
        V=V[..., columns].to(dtype).contiguous(),
        rank=h,
        part=part,
        energy=float(share[..., h - 1].min()) if h else float((total == 0).all()),
        method=used,
    )


def _rank_for(share: Tensor, energy: float | None) -> int:
    assert energy is not None
    return int((share < energy).sum(-1).max()) + 1


def _svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, S.square(), Vh.mT


def _gram(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if A.shape[-2] > A.shape[-1]:
        V, squares, U = _gram(A.mT)
        return U, squares, V
    values, vectors = torch.linalg.eigh(A @ A.mT)
    U = vectors.flip(-1)
    # Householder QR works column by column in falling order: a column of rounding noise, from a
    # zero singular value, ends up orthogonal to all that came before it.
    V = torch.linalg.qr(A.mT @ U).Q
    return U, values.flip(-1).clamp_min(0), V

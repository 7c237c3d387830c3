"""Leading or trailing eigenvectors from matrix products: a sign iteration, then a smaller problem.

The spectral projector of `S` at a shift `μ` is `(I + sign(S - μI)) / 2`. Its iteration needs as
many steps as `μ` is near to an eigenvalue, and the shift that splits off exactly `count` of them is
not known. So the shift is set a few percent of the eigenvalues beyond the cut, where a quadrature
of the spectrum says; the range of that projector, a few columns wider than its rank, contains the
wanted eigenvectors and is invariant, and what is left is the same problem on a matrix a fraction of
the size. Spectral divide and conquer, after Nakatsukasa and Higham, "Stable and efficient spectral
divide and conquer algorithms for the symmetric eigenvalue decomposition and the SVD", SIAM J. Sci.
Comput. 35 (2013), on one branch only and without their exact rank: columns beyond the rank of the
projector are other vectors of its complement, which lies on one side of the cut and so is told
apart by the smaller problem.

Nothing here waits for the device, but for the check that `torch.linalg.eigh` makes of its own
result, on small matrices.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sculpt_kernels.subspaces.basis import cholesky_pass
from sculpt_kernels.subspaces.quadrature import density
from sculpt_kernels.subspaces.sketch import sketch
from sculpt_kernels.subspaces.symmetric import symmetric_product

# Share of k by which the shift is moved beyond the cut; the error of the quadrature is below it.
MARGIN = 0.05
# Relative distance from the shift at which the sign iteration must have converged.
RESOLUTION = 1e-4
# What the sign iteration leaves of the wrong side, and what is left of it on purpose: a range
# wider than the rank must not be singular.
REMNANT = 1e-2
# Applications of the projector, each of which takes the wrong side down by 2 REMNANT.
APPLICATIONS = 9
# Largest matrix that goes to the library's eigensolver.
DIRECT = 640


def invariant_subspace(
    S: Tensor, count: int, leading: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal basis of the span of `count` extreme eigenvectors of `S`, by products.

    Args:
        S: `(..., k, k)`, symmetric positive semi-definite, float64.
        count: `0 < count < k`, the number of eigenvectors.
        leading: those of the largest eigenvalues, else those of the smallest.
        seed: of the random probes.

    Returns:
        The basis `(..., k, count)`, and the eigenvalues above and below the cut `(...)`. Where the
        quadrature missed by more than its margin, the basis is not invariant: measure it. It is NaN
        where a Cholesky factorization failed.
    """
    k = S.shape[-1]
    # The smaller side is found, whichever is asked for, so that both parts of a split agree.
    if 2 * count > k or (2 * count == k and not leading):
        other, above, below = invariant_subspace(S, k - count, not leading, seed)
        return complement(other, seed), above, below
    margin = margin_of(k)
    spectrum = density(S, seed)
    beyond = count + margin if leading else k - count - margin
    shift = spectrum.threshold(torch.full_like(S[..., 0, 0], beyond))
    sign = _sign(S, shift, spectrum.nodes[..., -1].amax(-1))
    width = width_of(count, margin)
    C = _range(sign if leading else -sign, width, seed + 1)
    inside = symmetric_product(C.mT, S @ C)
    if width > DIRECT:
        B, above, below = invariant_subspace(inside, count, leading, seed + 2)
        return C @ B, above, below
    values, vectors = torch.linalg.eigh(inside)
    at = width - count if leading else count
    columns = slice(at, None) if leading else slice(None, at)
    return C @ vectors[..., columns], values[..., at], values[..., at - 1]


def margin_of(k: int) -> float:
    """Eigenvalues between the cut and the shift, of `k`."""
    return max(MARGIN * k, 8.0)


def width_of(count: int, margin: float) -> int:
    """Columns that hold `count` vectors, the margin, and as much again for the error."""
    return math.ceil(count + 2 * margin)


def complement(Q: Tensor, seed: int) -> Tensor:
    """Orthonormal basis `(..., k, k - r)` of all that is orthogonal to `Q` `(..., k, r)`."""
    k, r = Q.shape[-2:]
    Y = sketch(k, k - r, seed, dtype=Q.dtype, device=Q.device).expand(*Q.shape[:-1], k - r)
    # The second pass mends what cancellation in the first one left of Q.
    for _ in range(2):
        Y = Y - Q @ (Q.mT @ Y)
        Y = _orthonormal(Y)
    return Y


def _orthonormal(Y: Tensor) -> Tensor:
    """CholeskyQR2 without a look at the result; NaN where it fails."""
    Y = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True)
    for _ in range(2):
        Y = cholesky_pass(Y, symmetric_product(Y.mT))
    return Y


def _range(sign: Tensor, width: int, seed: int) -> Tensor:
    """Basis `(..., k, width)` that contains the range of the projector `(I + sign) / 2`."""
    k = sign.shape[-1]
    eye = torch.eye(k, dtype=sign.dtype, device=sign.device)
    P = sign / 2 + (0.5 + REMNANT) * eye
    C = sketch(k, width, seed, dtype=sign.dtype, device=sign.device)
    for step in range(APPLICATIONS):
        # Three applications between passes keep the condition far from what Cholesky cannot take.
        if step in (3, 6):
            C = cholesky_pass(C, symmetric_product(C.mT))
        C = P @ C
    return _orthonormal(C)


def _sign(S: Tensor, shift: Tensor, largest: Tensor) -> Tensor:
    """`sign(S - μI)`, within `REMNANT`, by odd quintics: three symmetric products a step."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    # The largest Ritz value is a lower bound of the norm, tight to far less than this.
    scale = 1.05 * torch.maximum(largest - shift, shift)[..., None, None]
    X = (S - shift[..., None, None] * eye) / scale.clamp_min(torch.finfo(S.dtype).tiny)
    for a, b, c in polynomials(RESOLUTION, REMNANT):
        X2 = symmetric_product(X)
        inner = c * symmetric_product(X2) + b * X2 + a * eye
        X = symmetric_product(X, inner)
        X = (X + X.mT) / 2
    return X


@lru_cache
def polynomials(lower: float, accuracy: float) -> tuple[tuple[float, float, float], ...]:
    """Odd quintics `ax + bx³ + cx⁵` whose composition brings `[lower, 1]` to 1 within `accuracy`.

    Each is the best uniform approximation of 1 on the interval that the ones before it leave
    (Amsel, Persson, Musco, Gower, "The Polar Express", arXiv 2505.16932: this greedy choice is
    optimal for the composition). Found by Remez exchange, on intervals that reach a little beyond
    the largest value, so that rounding cannot push it out of them.
    """
    steps = []
    low, high = lower, 1.0
    while max(1 - low, high - 1) > accuracy:
        a, b, c = _best_quintic(low, 1.01 * high)
        steps.append((a, b, c))
        x = np.linspace(low, high, 20_001)
        y = x * (a + b * x**2 + c * x**4)
        low, high = float(y.min()), float(y.max())
    return tuple(steps)


def _best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Best uniform approximation of 1 on `[low, high]`, equioscillating in four points."""
    q, r = low + (high - low) / 4, low + 3 * (high - low) / 4
    a = b = c = 0.0
    for _ in range(100):
        x = np.array([low, q, r, high])
        rows = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, _ = np.linalg.solve(rows, np.ones(4))
        # Extrema of the polynomial: roots of a + 3b x² + 5c x⁴.
        root = np.sqrt(9 * b**2 - 20 * a * c)
        new_q, new_r = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
        new_q, new_r = min(new_q, new_r), max(new_q, new_r)
        if abs(new_q - q) + abs(new_r - r) < 1e-15:
            break
        q, r = new_q, new_r
    return float(a), float(b), float(c)

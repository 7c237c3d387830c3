"""A basis of the leading eigenvectors from matrix products: sign iterations and one narrow slab.

The spectral projector of `S` at a shift `μ` is `(I + sign(S - μI)) / 2`. Its iteration needs as
many steps as `μ` is near to an eigenvalue, and the shift that splits off exactly `h` of them is not
known. So the cut is bracketed: shifts `μ₋ < μ₊` with a few more and a few fewer than `h`
eigenvalues above them come from a quadrature of the spectrum, both projectors are cheap because
neither has to resolve the cut, and the directions between them, a slab a few percent of `k` wide,
are separated exactly by a Rayleigh-Ritz step on a small matrix.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sculpt_kernels.basis import orthonormalize
from sculpt_kernels.quadrature import density
from sculpt_kernels.sketch import sketch

# Share of k by which each shift is moved away from the cut, beyond the error of the quadrature.
MARGIN = 0.04
# Columns of the slab as a share of k: both margins, and as much again for the error.
SLAB = 0.16
# Relative distance from a shift at which the sign iteration must have converged.
RESOLUTION = 1e-4


def leading_eigenvectors(S: Tensor, h: int, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the span of the `h` leading eigenvectors of `S`, by products alone.

    Args:
        S: `(..., k, k)`, symmetric positive semi-definite, float32 or float64.
        h: `0 < h < k`, the number of eigenvectors.
        seed: of the random probes.

    Returns:
        The basis `(..., k, h)` and the residual `‖(I - QQᵀ) S Q‖_F / ‖S‖_F` `(...)`, which is zero
        for an invariant subspace and says how far the result is from one.
    """
    k = S.shape[-1]
    spectrum = density(S, seed)
    margin = max(MARGIN * k, 8.0)
    counts = (min(h + margin, k - 0.5), max(h - margin, 0.5))
    shifts = torch.stack(
        [spectrum.threshold(torch.full_like(S[..., 0, 0], count)) for count in counts]
    )
    largest = spectrum.nodes[..., -1].amax(-1)
    outer, inner = _projector(S.expand(2, *S.shape), shifts, largest)

    width = min(k, int(np.ceil(max(SLAB * k, 4 * margin))))
    Z, member = _slab_basis(outer - inner, width, seed + 1)
    core = inner - Z @ (Z.mT @ inner)
    core = _purify(core - (core @ Z) @ Z.mT, 3)
    # How many of the slab belong above the cut: h less what lies above the slab altogether.
    missing = h - core.diagonal(dim1=-2, dim2=-1).sum(-1)

    inside = Z.mT @ (S @ Z)
    inside = (inside + inside.mT) / 2 + torch.diag_embed((member - 1) * largest.unsqueeze(-1))
    Z = Z @ torch.linalg.eigh(inside).eigenvectors
    index = torch.arange(width, device=S.device)
    chosen = (index >= width - missing.round().unsqueeze(-1)).to(S.dtype)
    P = _purify(core + (Z * chosen.unsqueeze(-2)) @ Z.mT, 2)
    Q = orthonormalize(P @ sketch(k, h, seed + 2, dtype=S.dtype, device=S.device))
    SQ = S @ Q
    residual = torch.linalg.matrix_norm(SQ - Q @ (Q.mT @ SQ)) / torch.linalg.matrix_norm(S)
    return Q, residual


def _slab_basis(slab: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Range of a near-projector of rank below `width`: `(..., k, width)`, unused columns zero.

    Also returns which columns are used, as 0 and 1 `(..., width)`.
    """
    k = slab.shape[-1]
    omega = sketch(k, 2 * width, seed, dtype=slab.dtype, device=slab.device)
    # Beyond its rank the sketch of a projector is empty: other directions keep it well conditioned.
    filling = torch.finfo(slab.dtype).eps ** 0.4 * omega[:, width:]
    Z = orthonormalize(slab @ omega[:, :width] + filling)
    overlap = Z.mT @ (slab @ Z)
    weights, vectors = torch.linalg.eigh((overlap + overlap.mT) / 2)
    member = (weights > 0.5).to(slab.dtype)
    # The slab itself takes the filling out again.
    Z = slab @ (Z @ vectors * member.unsqueeze(-2))
    norms = torch.linalg.vector_norm(Z, dim=-2, keepdim=True)
    return Z / torch.where(norms > 0, norms, 1), member


def _purify(P: Tensor, steps: int) -> Tensor:
    """Push the eigenvalues of a near-projector to 0 and 1 (McWeeny's polynomial `3P² - 2P³`)."""
    for _ in range(steps):
        P2 = P @ P
        P = 3 * P2 - 2 * P2 @ P
    return P


def _projector(S: Tensor, shift: Tensor, largest: Tensor) -> Tensor:
    """`(I + sign(S - μI)) / 2` by odd quintic polynomials, three symmetric products a step."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    # The largest Ritz value is a lower bound of the norm, tight to far less than this.
    scale = 1.05 * torch.maximum(largest - shift, shift)[..., None, None]
    X = (S - shift[..., None, None] * eye) / scale.clamp_min(torch.finfo(S.dtype).tiny)
    for a, b, c in polynomials(RESOLUTION, torch.finfo(S.dtype).eps):
        X2 = X @ X
        X = X @ (a * eye + b * X2 + c * (X2 @ X2))
        X = (X + X.mT) / 2
    return (eye + X) / 2


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
    while high - low > 1e-2:
        a, b, c = _best_quintic(low, 1.01 * high)
        steps.append((a, b, c))
        x = np.linspace(low, high, 20_001)
        y = x * (a + b * x**2 + c * x**4)
        low, high = float(y.min()), float(y.max())
    # The quintic of Newton's family converges cubically from here.
    error = max(1 - low, high - 1)
    while error > accuracy:
        steps.append((1.875, -1.25, 0.375))
        error = 4 * error**3
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

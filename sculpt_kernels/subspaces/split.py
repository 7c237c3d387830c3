"""Splitting a weight matrix into its leading and its trailing singular subspace."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.operation import operation
from sculpt_kernels.products import compute_dtype
from sculpt_kernels.subspaces.methods import ALGORITHMS, Request, Subspace
from sculpt_kernels.subspaces.sketch import seed_from

METHODS = ("auto", *ALGORITHMS)
# On a GPU an eigendecomposition waits for one column after the other; `spectral` multiplies.
SPECTRAL_ON_GPU = 1024


@operation()
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

    | method       | how                                                        | deterministic |
    |--------------|------------------------------------------------------------|---------------|
    | `"svd"`      | `torch.linalg.svd`                                         | yes           |
    | `"gram"`     | eigenvectors of the smaller Gram matrix, then one product  | yes           |
    | `"spectral"` | spectral projectors, matrix products only                  | by seed       |
    | `"range"`    | randomized range finder, for few leading directions        | by seed       |
    | `"auto"`     | chooses by shape and device; the result says what it was   | by seed       |

    `"spectral"` computes in float64, and its span is exact to 1e-5 or better: it falls back to
    `"gram"`, for those matrices of a batch, where the cut divides (almost) equal singular values.
    The others compute in the dtype of `W`, float32 for bfloat16 and float16. Pass `W.double()`
    where the span itself must be exact: neighbouring directions across the cut mix by about
    `eps σ₁² / (σ_h² - σ_{h+1}²)`, at no loss of energy.

    Args:
        W: `(..., m, n)`, finite.
        rank: preserved rank `h`, `0 <= h <= min(m, n)`. Exactly one of `rank` and `energy`.
        energy: in (0, 1): the smallest `h` that keeps that share of `‖W‖²_F` (for a batch: of
            every matrix). From eigenvalues for `svd` and `gram`; from the singular values found for
            `range`; for `spectral` from a quadrature, two of its standard errors on the safe side.
        part: `"low"` for the trailing `min(m, n) - h` directions, `"high"` for the leading `h`.
        method: see above.
        generator: source of the seed of random methods; without it the seed is fixed.

    Raises:
        TypeError, ValueError: an argument does not fit, or `W` is not finite.
    """
    checks.matrix("W", W)
    if 0 in W.shape:
        raise ValueError(f"W must not be empty; got {checks.describe(W)}")
    checks.one_of("part", part, checks.PARTS)
    checks.one_of("method", method, METHODS)
    if (rank is None) == (energy is None):
        raise ValueError(
            f"exactly one of rank and energy must be given; got rank={rank!r}, energy={energy!r}"
        )
    if rank is not None:
        checks.rank_in("rank", rank, min(W.shape[-2:]))
    if energy is not None:
        checks.fraction("energy", energy)
    checks.finite("W", W)

    A = W.detach().to(compute_dtype(W.dtype))
    # Squares must neither overflow nor vanish; a scale changes no subspace.
    largest = torch.maximum(A.amax((-2, -1), keepdim=True), -A.amin((-2, -1), keepdim=True))
    scale = torch.where(largest > 0, largest, 1)
    if bool(((scale < 1e-6) | (scale > 1e6)).any()):
        A = A / scale
    tall = A.shape[-2] > A.shape[-1]
    used = _fastest(min(A.shape[-2:]), A.device) if method == "auto" else method
    request = Request(rank, energy, part, seed_from(generator), A.dtype)
    found = ALGORITHMS[used](A.mT if tall else A, request)
    U, V = (found.V, found.U) if tall else (found.U, found.V)
    kept = found.energy if bool((largest > 0).any()) else 1.0
    return replace(found, U=U.contiguous(), V=V.contiguous(), energy=kept)


def _fastest(k: int, device: torch.device) -> str:
    """The fastest method whose subspaces are optimal, for matrices with a short side of `k`."""
    return "spectral" if device.type == "cuda" and k >= SPECTRAL_ON_GPU else "gram"

"""Randomized range finding and SVD: leading subspaces from a few products with `A`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.operation import operation
from sculpt_kernels.products import compute_dtype
from sculpt_kernels.subspaces.basis import orthonormalize
from sculpt_kernels.subspaces.sketch import seed_from, sketch


@operation()
def range_finder(
    A: Tensor,
    rank: int,
    *,
    oversample: int | None = None,
    power_iters: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Orthonormal basis of an approximation to the leading left singular subspace of `A`.

    Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithm
    4.4 with re-orthonormalisation after every product: `Q = orth((A Aᵀ)^q A Ω)`, cut from
    `rank + oversample` to `rank` columns by a Rayleigh-Ritz step. Without power iterations
    `E ‖A - QQᵀA‖_F <= (1 + r / (p - 1))^½ (Σ_{j>r} σ_j²)^½` holds for `r + p` columns (theorem
    10.5). Spectra of language models are flat: `q = 0` loses much, see `Subspace.energy` for what a
    split captured.

    Args:
        A: `(..., m, n)`, finite, any floating dtype; computed in float32 or wider.
        rank: `0 <= rank <= min(m, n)`.
        oversample: extra columns `p` while iterating; default `max(8, rank // 4)`.
        power_iters: `q`; each costs two products with `A`.
        generator: source of the seed; the same seed gives the same test matrix on every device.
            Without it the seed is fixed.

    Returns:
        `(..., m, rank)`, orthonormal columns, leading direction first, float32 or wider.

    Raises:
        TypeError, ValueError: an argument does not fit, or `A` is not finite.
    """
    return rsvd(A, rank, oversample=oversample, power_iters=power_iters, generator=generator)[0]


@operation()
def rsvd(
    A: Tensor,
    rank: int,
    *,
    oversample: int | None = None,
    power_iters: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Randomized truncated SVD, `A ≈ U diag(S) Vᵀ`; method, arguments and errors as `range_finder`.

    Returns:
        `U` `(..., m, rank)`, `S` `(..., rank)` falling, `V` `(..., n, rank)`.
    """
    checks.matrix("A", A)
    k = min(A.shape[-2:])
    checks.rank_in("rank", rank, k)
    _check_count("power_iters", power_iters)
    if oversample is not None:
        _check_count("oversample", oversample)
    checks.finite("A", A)
    A = A.detach().to(compute_dtype(A.dtype))
    if A.shape[-2] > A.shape[-1]:
        V, S, U = _rsvd(A.mT, rank, oversample, power_iters, seed_from(generator))
        return U, S, V
    return _rsvd(A, rank, oversample, power_iters, seed_from(generator))


def _rsvd(
    A: Tensor, rank: int, oversample: int | None, power_iters: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`A` is wide, so that the sketch works on the short side."""
    Q = _sketched(A, rank, oversample, seed)
    for _ in range(power_iters):
        Q = orthonormalize(A @ orthonormalize(A.mT @ Q))
    return _truncated(A, Q, rank)


# Power iterations go on until one of them adds less than this share to the captured energy.
SETTLED = 1e-4
MOST_POWER_ITERS = 16


def settled_rsvd(A: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """As `rsvd` of a wide `A`, with as many power iterations as the captured energy asks for.

    The last value says whether an iteration added less than `SETTLED` of it before
    `MOST_POWER_ITERS`.
    """
    Q = _sketched(A, rank, None, seed)
    captured = torch.zeros_like(A[..., 0, 0])
    settled = False
    for _ in range(MOST_POWER_ITERS):
        image = A.mT @ Q
        energy = image.square().sum((-2, -1))
        settled = bool((energy - captured <= SETTLED * energy).all())
        if settled:
            break
        captured = energy
        Q = orthonormalize(A @ orthonormalize(image))
    return *_truncated(A, Q, rank), settled


def _sketched(A: Tensor, rank: int, oversample: int | None, seed: int) -> Tensor:
    m, n = A.shape[-2:]
    width = min(rank + (max(8, rank // 4) if oversample is None else oversample), m)
    return orthonormalize(A @ sketch(n, width, seed, dtype=A.dtype, device=A.device))


def _truncated(A: Tensor, Q: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz: the best `rank` directions inside the span of `Q`."""
    left, S, right = torch.linalg.svd(Q.mT @ A, full_matrices=False)
    U = Q @ left[..., :rank]
    return U.contiguous(), S[..., :rank].contiguous(), right.mT[..., :rank].contiguous()


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int of at least 0; got {checks.describe(value)}")

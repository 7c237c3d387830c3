"""`W <- round(base + alpha U C Vᵀ)`: the weight brought up to date with its coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sculpt_kernels.triton.update import update_, update_many_


def expand_add_(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    alpha: float | Tensor = 1.0,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """`sculpt_kernels.expand_add_`, for dtypes up to float32.

    With 16-bit bases `C` and the small product are kept as two 16-bit parts each, so that the sum
    is formed in float32 accuracy. The small product goes on the shorter side of `W`. Bytes: one
    read and one write of `W`, the factors. FLOPs: `2 min(m, n) r s + 2 m n max`, `max` the rank
    that stays, twice for 16-bit bases.
    """
    if W.numel() == 0:
        return W
    if C.numel() == 0:
        basis = V if U is None else U
        assert basis is not None
        return update_(
            W, basis.new_empty(W.shape[-2], 0), basis.new_empty(W.shape[-1], 0), alpha=alpha,
            base=base, rounding=rounding, seed=seed,
        )  # fmt: skip
    A, B, A2, B2 = _factors(W, C, U, V)
    return update_(W, A, B, A2=A2, B2=B2, alpha=alpha, base=base, rounding=rounding, seed=seed)


# Small products of one launch together take no more than this.
WORKSPACE = 2**26


def expand_add_many_(
    Ws: Sequence[Tensor],
    Cs: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    alpha: float | Tensor = 1.0,
    rounding: str = "nearest",
    seeds: Tensor | None = None,
    bases: Sequence[Tensor] | None = None,
) -> None:
    """`expand_add_` of many matrices, those of one layout in common launches.

    `Ws[i]` `(m, n)`, `Cs[i]` `(r, s)`, `Us[i]` `(m, r)` or `None`, `Vs[i]` `(n, s)` or `None`.
    Addresses of weights, bases and originals are tables that are kept for the next call with the
    same tensors; the small products are stacked, as many as fit into `WORKSPACE` bytes.
    """
    starts = Ws if bases is None else bases
    groups: dict[Any, list[int]] = {}
    for i, (W, C, U, V) in enumerate(zip(Ws, Cs, Us, Vs, strict=True)):
        laid_out = [X for X in (W, starts[i], U, V) if X is not None]
        aligned = all(X.data_ptr() % 16 == 0 for X in laid_out)
        alone = -1 if aligned and C.numel() and W.ndim == 2 and W.numel() else i
        layout = tuple((X.shape, X.stride(), X.dtype) for X in laid_out)
        groups.setdefault((layout, C.shape, U is None, V is None, W.device, alone), []).append(i)
    for members in groups.values():
        W, C = Ws[members[0]], Cs[members[0]]
        bytes_each = max(1, 8 * min(W.shape[-2:]) * max(C.shape[-2:]))
        size = max(1, WORKSPACE // bytes_each)
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            weights, cores, origins = ([X[i] for i in chosen] for X in (Ws, Cs, starts))
            left, right = ([B[i] for i in chosen] for B in (Us, Vs))
            draws = None if seeds is None else [seeds[i] for i in chosen]
            if len(chosen) > 1:
                _together(weights, cores, left, right, origins, alpha, rounding, draws)
            else:
                seed = None if draws is None else draws[0]
                expand_add_(
                    weights[0], cores[0], left[0], right[0], alpha, rounding, seed, origins[0]
                )


def _together(
    Ws: list[Tensor],
    Cs: list[Tensor],
    Us: list[Tensor | None],
    Vs: list[Tensor | None],
    bases: list[Tensor],
    alpha: float | Tensor,
    rounding: str,
    seeds: list[Tensor] | None,
) -> None:
    """Matrices of one layout, one launch after their small products."""
    factors = [_factors(*each) for each in zip(Ws, Cs, Us, Vs, strict=True)]
    left = _product_goes_left(Ws[0], Us[0], Vs[0])

    def side(index: int, stacked: bool) -> Any:
        """One factor of all: the small products stacked, the bases where they are."""
        found = [each[index] for each in factors]
        return None if found[0] is None else torch.stack(found) if stacked else found

    A, B, A2, B2 = (side(index, (index % 2 == 0) == left) for index in range(4))
    update_many_(
        Ws, A, B, A2=A2, B2=B2, alpha=alpha, bases=bases, rounding=rounding,
        seeds=None if seeds is None else torch.stack(seeds),
    )  # fmt: skip


def _product_goes_left(W: Tensor, U: Tensor | None, V: Tensor | None) -> bool:
    """Whether `U C` is formed, on the shorter side; an identity is no factor to keep."""
    return U is None or (V is not None and W.shape[-2] <= W.shape[-1])


def _factors(W: Tensor, C: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Any, ...]:
    """`A`, `B`, `A2`, `B2` with `U C Vᵀ = A Bᵀ + A2 B2ᵀ`; the last two are `None` for float32."""
    if _product_goes_left(W, U, V):
        assert V is not None
        A, A2 = _small_product(U, C, V.dtype)
        return A, V, A2, None if A2 is None else V
    assert U is not None
    B, B2 = _small_product(V, C.mT, U.dtype)
    return U, B, None if B2 is None else U, B2


def _small_product(U: Tensor | None, C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`U C` in `dtype`, that of the bases, for 16 bits as two parts that add up to it.

    `U = None` is the identity.
    """
    if dtype == torch.float32:
        return C.float() if U is None else U @ C.float(), None
    high, low = _split(C, dtype)
    if U is None:
        return high, low
    batch = C.shape[:-2] if C.ndim > 2 else U.shape[:-2]
    product = U.new_empty(*batch, U.shape[-2], C.shape[-1], dtype=torch.float32)
    update_(product, U, high.mT, A2=U, B2=low.mT, keep=False)
    return _split(product, dtype)


def _split(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`high + low = X` to twice the precision of `dtype`."""
    high = X.to(dtype)
    return high, (X - high).to(dtype)

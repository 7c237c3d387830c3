"""`W <- round(base + alpha U C Vᵀ)`: the weight brought up to date with its coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels.kernels import host
from sculpt_kernels.kernels.config import TileConfig
from sculpt_kernels.kernels.update import update_


def supports(
    W: Tensor, C: Tensor, U: Tensor | None, V: Tensor | None, base: Tensor | None = None
) -> str | None:
    """`None` if `expand_add_` can run on these, else the reason."""
    return host.unsupported(W, C, U, V, base)


def expand_add_(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    alpha: float | Tensor = 1.0,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    base: Tensor | None = None,
    *,
    precision: str = "exact",
    config: TileConfig | None = None,
) -> Tensor:
    """`W <- round(base + alpha U C Vᵀ)`, with `base = W` by default; in place, returns `W`.

    Args:
        W: `(..., m, n)`, float32, bfloat16 or float16, any strides.
        C: `(..., r, s)`, float32, bfloat16 or float16.
        U: `(..., m, r)`; V: `(..., n, s)`: one dtype, that of `W` or float32; two-dimensional
            to share over the batch. One of them may be `None`, the identity.
        alpha: a number or a 0-d tensor.
        rounding: `"nearest"`, or `"stochastic"` for 16-bit `W`, with `seed`, an int or a 0-d int64
            tensor. The random bits depend on seed and position only.
        base: `(..., m, n)`, dtype of `W` or float32: start from these values, not from `W`.
        precision: with 16-bit bases, `"exact"` keeps `C` and the small product as two 16-bit
            parts each, so that the sum is formed in float32 accuracy; `"fast"` rounds both to 16
            bits and does half the FLOPs.

    The small product goes on the shorter side of `W`. Bytes: one read and one write of `W`, the
    factors. FLOPs: `2 min(m, n) r s + 2 m n max`, `max` the rank that stays, twice for `"exact"`.
    """
    if W.numel() == 0:
        return W
    basis = V if U is None else U
    assert basis is not None
    if C.numel() == 0:
        return update_(
            W, basis.new_empty(W.shape[-2], 0), basis.new_empty(W.shape[-1], 0), alpha=alpha,
            base=base, rounding=rounding, seed=seed, config=config,
        )  # fmt: skip
    if U is None or (V is not None and W.shape[-2] <= W.shape[-1]):
        assert V is not None
        A, A2 = _small_product(U, C, V.dtype, precision)
        B, B2 = V, V
    else:
        A, A2 = U, U
        B, B2 = _small_product(V, C.mT, U.dtype, precision)
    once = A is A2 and B is B2
    return update_(
        W, A, B, A2=None if once else A2, B2=None if once else B2, alpha=alpha, base=base,
        rounding=rounding, seed=seed, config=config,
    )  # fmt: skip


def _small_product(
    U: Tensor | None, C: Tensor, dtype: torch.dtype, precision: str
) -> tuple[Tensor, Tensor]:
    """`U C` in `dtype`, that of the bases, as two parts that add up to it; one twice for one.

    `U = None` is the identity.
    """
    if dtype == torch.float32:
        product = C.float() if U is None else U @ C.float()
        return product, product
    if precision == "fast":
        product = C.to(dtype) if U is None else U @ C.to(dtype)
        return product, product
    high, low = split(C, dtype)
    if U is None:
        return high, low
    batch = C.shape[:-2] if C.ndim > 2 else U.shape[:-2]
    product = U.new_empty(*batch, U.shape[-2], C.shape[-1], dtype=torch.float32)
    update_(product, U, high.mT, A2=U, B2=low.mT, keep=False)
    return split(product, dtype)


def split(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`high + low = X` to twice the precision of `dtype`."""
    high = X.to(dtype)
    return high, (X - high).to(dtype)

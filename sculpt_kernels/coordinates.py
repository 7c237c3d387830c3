"""Between a weight matrix and its coordinates in a pair of bases: `C = UᵀGV`, `W += αUCVᵀ`."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.backend import choose
from sculpt_kernels.panels import compute_dtype, matrices, row_panels
from sculpt_kernels.rounding import stochastic_round


def compress(
    G: Tensor,
    U: Tensor,
    V: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Coordinates `Uᵀ G V` of `G` in the bases `U`, `V`.

    Args:
        G: `(..., m, n)`, any strides.
        U: `(..., m, r)`; V: `(..., n, s)`; dtype and device of `G`; two-dimensional to share.
        out_dtype: dtype of the result; float64 inputs are accumulated in float64.

    Returns:
        `(..., r, s)` in `out_dtype`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.projection(G, U, V, "core")
    if out_dtype not in checks.FLOATS:
        raise TypeError(f"out_dtype must be a floating dtype; got {checks.describe(out_dtype)}")
    choose(backend, U.device, lambda: "no Triton kernel for this yet")
    wide = compute_dtype(G.dtype)
    out = G.new_empty(*G.shape[:-2], U.shape[-1], V.shape[-1], dtype=out_dtype)
    for core, X, A, B in matrices(out, G, U, V):
        assert core is not None
        assert X is not None
        assert A is not None
        assert B is not None
        core.copy_(_compress_matrix(X, A, B, wide))
    return out


def _compress_matrix(G: Tensor, U: Tensor, V: Tensor, wide: torch.dtype) -> Tensor:
    if G.shape[0] > G.shape[1]:
        return _compress_matrix(G.mT, V, U, wide).mT
    if G.dtype == wide:
        return U.mT @ (G @ V)
    U, V = U.to(wide), V.to(wide)
    core = torch.zeros(U.shape[1], V.shape[1], dtype=wide, device=G.device)
    for rows in row_panels(*G.shape):
        core.addmm_(U[rows].mT, G[rows].to(wide) @ V)
    return core


def expand_add_(
    W: Tensor,
    C: Tensor,
    U: Tensor,
    V: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    base: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`W += alpha U C Vᵀ` in place; with `base`, `W = base + alpha U C Vᵀ`. Returns `W`.

    The sum is formed in float32 (float64 for float64 `W`) and rounded once. `"stochastic"` rounds
    up or down at random so that the mean is exact; equal seeds give equal bits on every backend.

    Args:
        W: `(..., m, n)`, any strides; written in place.
        C: `(..., r, s)`, any floating dtype.
        U: `(..., m, r)`; V: `(..., n, s)`; the dtype of `W` or float32, both alike.
        alpha: a number or a 0-d tensor.
        rounding: `"nearest"`, or `"stochastic"` for bfloat16 and float16 `W`.
        seed: 64-bit int or 0-d int64 tensor; required by and only for `"stochastic"`.
        base: `(..., m, n)`, dtype of `W` or float32: start from these values, not from `W`.

    Raises:
        TypeError, ValueError: an argument does not fit; raised before `W` is changed.
        RuntimeError: the backend cannot run here.
    """
    checks.matrix("W", W)
    checks.basis("U", U, "W", W, "left")
    checks.basis("V", V, "W", W, "right")
    checks.coordinates("C", C, U, V, W)
    checks.same_device(W=W, C=C, U=U, V=V, base=base)
    checks.same_dtype(U=U, V=V)
    checks.choice("rounding", rounding, checks.ROUNDINGS)
    _check_source("U and V", U, W)
    if base is not None:
        checks.matrix("base", base)
        _check_source("base", base, W)
        if base.shape != W.shape:
            raise ValueError(
                f"base must have the shape {tuple(W.shape)} of W; got {checks.describe(base)}"
            )
    _check_seed(rounding, seed, W)
    checks.writable("W", W)
    checks.no_overlap("W", W, C=C, U=U, V=V, base=base)
    choose(backend, U.device, lambda: "no Triton kernel for this yet")

    with torch.no_grad():
        wide = compute_dtype(W.dtype)
        scaled = C.to(wide) * alpha
        for index, (X, core, A, B, start) in enumerate(matrices(W, scaled, U, V, base)):
            assert X is not None
            assert core is not None
            assert A is not None
            assert B is not None
            key = seed if rounding == "stochastic" else None
            _expand_add_matrix(X, core, A.to(wide), B.to(wide), start, key, index * W.shape[-2])
    return W


def _expand_add_matrix(
    W: Tensor,
    C: Tensor,
    U: Tensor,
    V: Tensor,
    base: Tensor | None,
    seed: int | Tensor | None,
    row0: int,
) -> None:
    m, n = W.shape
    if W.numel() == 0:
        return
    if C.numel() == 0:
        C, U, V = C.new_zeros(1, 1), U.new_zeros(m, 1), V.new_zeros(n, 1)
    if W.dtype == C.dtype:
        if base is not None:
            W.copy_(base)
        if m <= n:
            W.addmm_(U @ C, V.mT)
        else:
            W.addmm_(U, C @ V.mT)
        return
    source = W if base is None else base
    right = C @ V.mT
    for rows in row_panels(m, n):
        total = torch.addmm(source[rows].to(C.dtype), U[rows], right)
        if seed is None:
            W[rows] = total.to(W.dtype)
        else:
            W[rows] = stochastic_round(total, W.dtype, seed, row0=row0 + rows.start)


def _check_source(name: str, X: Tensor, W: Tensor) -> None:
    if X.dtype not in (W.dtype, compute_dtype(W.dtype)):
        raise TypeError(
            f"{name} must have the dtype {checks.dtype_name(W.dtype)} of W or "
            f"{checks.dtype_name(compute_dtype(W.dtype))}; got {checks.describe(X)}"
        )


def _check_seed(rounding: str, seed: int | Tensor | None, W: Tensor) -> None:
    if rounding == "nearest":
        if seed is not None:
            raise ValueError(f"seed is only for rounding='stochastic'; got seed={seed!r}")
        return
    if W.dtype not in checks.LOW_PRECISION:
        raise TypeError(
            "rounding='stochastic' is for bfloat16 and float16; "
            f"W is {checks.dtype_name(W.dtype)}, which needs none"
        )
    if isinstance(seed, Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or a 0-d int64 tensor; got {seed!r}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"rounding='stochastic' needs seed, an int or a 0-d int64 tensor; got {seed!r}"
        )

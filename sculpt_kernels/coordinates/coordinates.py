"""Between a weight matrix and its coordinates in a pair of bases: `C = UᵀGV`, `W += αUCVᵀ`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sculpt_kernels import checks, shards
from sculpt_kernels.dispatch import choose, unsupported
from sculpt_kernels.operation import is_traced, number_and_tensor, operation
from sculpt_kernels.plan.projections import SMALL_RANK, arrange
from sculpt_kernels.products import compute_dtype, matrices, panels_of, product
from sculpt_kernels.rounding import store

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@operation()
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
        G: `(..., m, n)`, any strides; a `DTensor` too (its coordinates are whole on each process).
        U: `(..., m, r)`; V: `(..., n, s)`; dtype and device of `G`; two-dimensional to share.
        out_dtype: dtype of the result; float64 inputs are accumulated in float64.

    Returns:
        `(..., r, s)` in `out_dtype`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if shards.is_divided(G):
        return shards.compress(G, U, V, out_dtype)
    if is_traced(G):
        result: Tensor = torch.ops.sculpt_kernels.compress(G, U, V, out_dtype, backend)
        return result
    checks.projection(G, U, V, "core")
    checks.out_dtype(out_dtype, torch.float32)
    out = G.new_empty(*G.shape[:-2], U.shape[-1], V.shape[-1], dtype=out_dtype)
    chosen = choose(backend, G.device, lambda: _refused(G, U, V))
    if G.is_meta:
        return out
    with torch.no_grad():
        if chosen == "triton":
            from sculpt_kernels.coordinates import triton_compress

            return triton_compress.compress(G, U, V, out)
        for core, X, A, B in matrices(out, G, U, V):
            assert core is not None
            assert X is not None
            assert A is not None
            assert B is not None
            core.copy_(_compress_matrix(X, A, B))
    return out


def _refused(G: Tensor, U: Tensor, V: Tensor) -> str | None:
    """Why the Triton kernel cannot take these, or `None`."""
    if max(U.shape[-1], V.shape[-1]) > SMALL_RANK:
        return f"the Triton kernels are for ranks up to {SMALL_RANK}"
    return unsupported(G, U, V)


def _compress_matrix(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    r, s = U.shape[1], V.shape[1]
    wide = compute_dtype(G.dtype)
    if G.numel() == 0 or r == 0 or s == 0:
        return torch.zeros(r, s, dtype=wide, device=G.device)
    if arrange("core", "none", *G.shape, r, s, False).transposed:
        G, U, V = G.mT, V, U
        return _gather(G, U, V.to(wide), wide).mT
    return _gather(G, U, V.to(wide), wide)


def _gather(G: Tensor, U: Tensor, V: Tensor, wide: torch.dtype) -> Tensor:
    """`Uᵀ(GV)` in the wide dtype, converting one row panel at a time."""
    if G.dtype == wide:
        return torch.mm(U.t(), product(G, V))
    core = torch.zeros(U.shape[1], V.shape[1], dtype=wide, device=G.device)
    for rows in panels_of(*G.shape):
        core.addmm_(U[rows].to(wide).t(), product(G[rows].to(wide), V))
    return core


@operation()
def expand_add_(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
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
        W: `(..., m, n)`, any strides; written in place. A `DTensor` is written shard by shard, with
            other random bits in every shard; the others may be divided too.
        C: `(..., r, s)`, any floating dtype.
        U: `(..., m, r)`; V: `(..., n, s)`; the dtype of `W` or float32, both alike. One of them
            may be `None`, the identity: `r = m`, or `s = n`.
        alpha: a number or a 0-d tensor.
        rounding: `"nearest"`, or `"stochastic"` for bfloat16 and float16 `W`.
        seed: 64-bit int or 0-d int64 tensor; required by and only for `"stochastic"`.
        base: `(..., m, n)`, dtype of `W` or float32: start from these values, not from `W`.

    Raises:
        TypeError, ValueError: an argument does not fit, or a basis on the CPU holds NaN; raised
            before `W` is changed.
        RuntimeError: the backend cannot run here.
    """
    if shards.is_divided(W):
        _expand_add_shard(W, C, U, V, alpha, rounding, seed, base, backend)
        return W
    if is_traced(W):
        torch.ops.sculpt_kernels.expand_add_(
            W, C, U, V, *number_and_tensor(alpha), rounding, *number_and_tensor(seed), base,
            backend,
        )  # fmt: skip
        return W
    check_expand_add(W, C, U, V, alpha, rounding, seed, base)
    chosen = expand_add_backend(backend, W, C, U, V, rounding, base)
    run_expand_add(chosen, W, C, U, V, alpha, rounding, seed, base)
    return W


def expand_add_backend(
    backend: str,
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    rounding: str,
    base: Tensor | None,
) -> str:
    """Which implementation takes these arguments, which have been checked."""
    return choose(backend, W.device, lambda: unsupported(W, C, U, V, base), rounding)


@torch.no_grad()
def run_expand_add(
    chosen: str,
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    alpha: float | Tensor,
    rounding: str,
    seed: int | Tensor | None,
    base: Tensor | None,
) -> None:
    """`expand_add_` by the chosen implementation; the arguments have been checked."""
    if W.is_meta or W.numel() == 0:
        return
    if chosen == "triton":
        from sculpt_kernels.coordinates import triton_expand

        triton_expand.expand_add_(W, C, U, V, alpha, rounding, seed, base)
        return
    scaled = C.to(compute_dtype(W.dtype)) * alpha
    for index, (X, core, A, B, start) in enumerate(matrices(W, scaled, U, V, base)):
        assert X is not None
        assert core is not None
        _expand_add_matrix(X, core, A, B, start, seed, index * W.shape[-2], chosen)


@torch.no_grad()
def _expand_add_shard(
    W: DTensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    alpha: float | Tensor,
    rounding: str,
    seed: int | Tensor | None,
    base: Tensor | None,
    backend: str,
) -> None:
    """Each process changes its shard; what travels is `C`, and the basis of the side that is whole.

    What is elsewhere than the shard, which may be offloaded, follows it.
    """
    checks.matrix("W", W)
    checks.bases_and_coordinates(W, U, V, C)
    checks.scalar("alpha", alpha, W)
    checks.rounding(rounding, seed, "W", W)
    if base is not None and base.shape != W.shape:
        raise ValueError(f"base must have the shape {tuple(W.shape)}; got {tuple(base.shape)}")
    division = shards.Division.of("W", W)
    X = W.to_local()
    checks.writable("W", X)
    left, core, right = (
        None if part is None else part.to(X.device) for part in division.factors(U, C, V)
    )
    assert core is not None
    if base is not None:
        base = division.along(base, division.axis).to(X.device)
    if seed is not None:
        seed = seed + division.coordinate
    chosen = expand_add_backend(backend, X, core, left, right, rounding, base)
    run_expand_add(chosen, X, core, left, right, alpha, rounding, seed, base)


def check_expand_add(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    alpha: float | Tensor,
    rounding: str,
    seed: int | Tensor | None,
    base: Tensor | None,
) -> None:
    """Refuse arguments that `expand_add_` cannot take, before anything is changed."""
    checks.matrix("W", W)
    checks.bases_and_coordinates(W, U, V, C)
    if U is None and V is None:
        raise ValueError("U and V must not both be None; for W += alpha C use W.add_(C, alpha=...)")
    checks.no_wrapper(W=W, C=C, U=U, V=V, base=base)
    checks.same_device(W=W, C=C, U=U, V=V, base=base)
    if U is not None and V is not None:
        checks.same_dtype(U=U, V=V)
    for name, B in (("U", U), ("V", V)):
        if B is not None:
            _check_source(name, B, W)
            checks.free_of_nan(name, B)
    if base is not None:
        checks.matrix("base", base)
        _check_source("base", base, W)
        if base.shape != W.shape:
            raise ValueError(
                f"base must have the shape {tuple(W.shape)} of W; got {checks.describe(base)}"
            )
    checks.scalar("alpha", alpha, W)
    checks.rounding(rounding, seed, "W", W)
    checks.writable("W", W)
    checks.no_overlap("W", W, C=C, U=U, V=V, base=base)


def _expand_add_matrix(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    base: Tensor | None,
    seed: int | Tensor | None,
    row0: int,
    backend: str,
) -> None:
    m, n = W.shape
    wide = C.dtype
    empty = C.numel() == 0
    V = None if V is None else V.to(wide)
    both = U is not None and V is not None and not empty
    if both and arrange("core", "none", m, n, *C.shape, False).transposed:
        assert V is not None
        C, V = torch.mm(C, V.t()), None
    if W.dtype == wide:
        # Products come first: where they find no memory, `W` is still as it was.
        factors = None if empty else _factors(C, None if U is None else U.to(wide), V)
        if base is not None:
            W.copy_(base)
        if factors is not None:
            W.addmm_(*factors)
        return
    source = W if base is None else base
    for rows in panels_of(m, n):
        total = source[rows].to(wide, copy=True)
        if not empty:
            core, A = (C[rows], None) if U is None else (C, U[rows].to(wide))
            total.addmm_(*_factors(core, A, V))
        store(W[rows], total, seed, row0 + rows.start, backend)


def _factors(C: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is `U C Vᵀ`."""
    if V is None:
        assert U is not None
        return U, C
    return C if U is None else torch.mm(U, C), V.t()


def _check_source(name: str, X: Tensor, W: Tensor) -> None:
    if X.dtype not in (W.dtype, compute_dtype(W.dtype)):
        raise TypeError(
            f"{name} must have the dtype {checks.dtype_name(W.dtype)} of W or "
            f"{checks.dtype_name(compute_dtype(W.dtype))}; got {checks.describe(X)}"
        )

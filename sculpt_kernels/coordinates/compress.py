"""Coordinates of a matrix in a pair of bases: `C = UᵀGV`."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels import checks, shards
from sculpt_kernels.dispatch import choose, unsupported
from sculpt_kernels.operation import is_traced, operation
from sculpt_kernels.plan.projections import SMALL_RANK, arrange
from sculpt_kernels.products import compute_dtype, matrices, panels_of, product


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
    checks.floating("out_dtype", out_dtype)
    out = G.new_empty(*G.shape[:-2], U.shape[-1], V.shape[-1], dtype=out_dtype)
    chosen = choose(backend, G.device, lambda: _refused(G, U, V))
    if G.is_meta:
        return out
    with torch.no_grad():
        if chosen == "triton":
            from sculpt_kernels.coordinates import triton_compress

            return triton_compress.compress(G, U, V, out)
        for core, X, A, B in matrices(out, G, U, V):
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

"""Projections as one low-rank update by library products: the way of accelerators.

Every form is `G <- beta G + A B` with thin factors, so a GEMM library reads and writes `G` once and
rounds once. Works on batches; low precision is multiplied as it is, accumulated in float32 by the
library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels.plan.projections import arrange, kind_of


def project_batch(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str, complement: str = "none"
) -> None:
    """Project `G` `(..., m, n)` in place by library products."""
    a = 0 if U is None else U.shape[-1]
    b = 0 if V is None else V.shape[-1]
    transposed = arrange(form, complement, G.shape[-2], G.shape[-1], a, b, True).transposed
    if transposed:
        G, U, V = G.mT, V, U
    A, B, beta, alpha = factors(G, U, V, form, complement, transposed)
    update(G, A, B, beta=beta, alpha=alpha)


def factors(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str, complement: str, transposed: bool
) -> tuple[Tensor, Tensor, int, int]:
    """`A` `(..., m, p)`, `B` `(..., p, n)`, `beta`, `alpha` of `beta G + alpha A B`.

    For `transposed` the arguments are swapped already; `complement` still names the sides of the
    original matrix.
    """
    kind = kind_of(form, complement)
    near = "right" if transposed else "left"
    if kind == "side":
        assert V is not None
        keep = complement != "none"
        return G @ V, V.mT, int(not keep), 1 if keep else -1
    assert U is not None
    assert V is not None
    if kind == "kept":
        kept = U.mT @ G
        return U, _add(kept, kept @ V, V.mT, -1), 0, 1
    Y = G @ V
    core = U.mT @ Y
    if kind == "core":
        if form == "strict":
            return U @ core, V.mT, 0, 1
        if complement == near:
            return _add(Y, U, core, -1), V.mT, 1, -1
        return U @ core, V.mT, 1, -1
    # Both sides in one update of depth a + b: U X + (Y - U C) Vᵀ is what both sides remove, or,
    # given complements, what remains.
    U, V = _batched(U, G), _batched(V, G)
    A = torch.cat((U, _add(Y, U, core, -1)), -1)
    B = torch.cat((U.mT @ G, V.mT), -2)
    return (A, B, 0, 1) if form == "core" else (A, B, 1, -1)


def update(G: Tensor, A: Tensor, B: Tensor, *, beta: int, alpha: int) -> None:
    """`G <- beta G + alpha A B` in place, `alpha = 1` where `beta = 0`."""
    if G.ndim == 2:
        if beta:
            G.addmm_(A, B, alpha=alpha)
        else:
            torch.mm(A, B, out=G)
        return
    # A view that cannot be flattened (or written through by `out=`) is taken batch by batch.
    A, B = _batched(A, G), _batched(B, G)
    if G.ndim == 3:
        if beta:
            G.baddbmm_(A, B, alpha=alpha)
        else:
            torch.bmm(A, B, out=G)
        return
    for i in range(G.shape[0]):
        update(G[i], A[i], B[i], beta=beta, alpha=alpha)


def _add(X: Tensor, A: Tensor, B: Tensor, alpha: int) -> Tensor:
    """`X + alpha A B`, with one rounding where the library can."""
    if X.ndim == 2:
        return X.addmm_(A, B, alpha=alpha)
    return X.add_(A @ B, alpha=alpha)


def _batched(B: Tensor, G: Tensor) -> Tensor:
    return B.expand(*G.shape[:-2], *B.shape[-2:])

"""Projections of a matrix away from a left and a right subspace: validation and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.backend import require
from sculpt_kernels.panels import compute_dtype, matrices, row_panels


def project_(
    G: Tensor,
    U: Tensor | None = None,
    V: Tensor | None = None,
    *,
    form: str = "core",
    backend: str = "auto",
    check: bool = False,
) -> Tensor:
    """Project `G` in place away from the subspaces spanned by `U` and `V`; return `G`.

    | form       | result                     | what vanishes        |
    |------------|----------------------------|----------------------|
    | `"core"`   | `G - U (Uᵀ G V) Vᵀ`        | `Uᵀ G V`             |
    | `"strict"` | `(I - UUᵀ) G (I - VVᵀ)`    | `Uᵀ G` and `G V`     |
    | `"left"`   | `(I - UUᵀ) G`              | `Uᵀ G`               |
    | `"right"`  | `G (I - VVᵀ)`              | `G V`                |

    `core` is the projection of "Sculpting Subspaces" (arXiv 2504.07097).

    Args:
        G: `(..., m, n)`, float64, float32, bfloat16 or float16, any strides; written in place.
        U: `(..., m, r)`, orthonormal columns, dtype and device of `G`; two-dimensional to share one
            basis over a batch; `None` for `form="right"`. `r = 0` leaves that side alone.
        V: `(..., n, s)`, likewise for the right side; `None` for `form="left"`. `r != s` is legal.
        form: the projection, see above.
        backend: `"auto"`, `"triton"`, `"native"` or `"torch"`.
        check: measure `‖UᵀU - I‖` and `‖VᵀV - I‖` first and refuse bases that are not orthonormal.

    Returns:
        `G` itself. Accumulation is never below float32.

    Raises:
        TypeError, ValueError: an argument does not fit; raised before `G` is changed.
        RuntimeError: the backend cannot run here.
    """
    left, right = checks.projection(G, U, V, form, check=check)
    checks.writable("G", G)
    checks.no_overlap("G", G, U=left, V=right)
    require(backend)
    for X, A, B in matrices(G, left, right):
        assert X is not None
        _project_matrix(X, A, B, form)
    return G


def project(
    G: Tensor,
    U: Tensor | None = None,
    V: Tensor | None = None,
    *,
    form: str = "core",
    backend: str = "auto",
    check: bool = False,
) -> Tensor:
    """Return the projection of `G` as a new tensor; arguments and errors as `project_`."""
    checks.projection(G, U, V, form, check=check)
    out = G.detach().clone()
    return project_(out, U, V, form=form, backend=backend)


def _project_matrix(G: Tensor, U: Tensor | None, V: Tensor | None, form: str) -> None:
    """One matrix, in place, by the torch backend."""
    if G.numel() == 0:
        return
    if form == "core":
        assert U is not None
        assert V is not None
        if U.shape[1] and V.shape[1]:
            _remove_core(G, U, V)
        return
    if U is not None and U.shape[1]:
        _remove_left(G, U)
    if V is not None and V.shape[1]:
        # (GV)Vᵀ is the left form of Gᵀ, and a transposed view writes through.
        _remove_left(G.mT, V)


def _remove_core(G: Tensor, U: Tensor, V: Tensor) -> None:
    """`G -= U(UᵀGV)Vᵀ`, contracting the long side first."""
    if G.shape[0] > G.shape[1]:
        G, U, V = G.mT, V, U
    if G.dtype not in checks.LOW_PRECISION:
        G.addmm_(U @ (U.mT @ (G @ V)), V.mT, alpha=-1)
        return
    wide = compute_dtype(G.dtype)
    U, V = U.to(wide), V.to(wide)
    core = torch.zeros(U.shape[1], V.shape[1], dtype=wide, device=G.device)
    for rows in row_panels(*G.shape):
        core.addmm_(U[rows].mT, G[rows].to(wide) @ V)
    for rows in row_panels(*G.shape):
        G[rows] = torch.addmm(G[rows].to(wide), U[rows] @ core, V.mT, alpha=-1).to(G.dtype)


def _remove_left(G: Tensor, U: Tensor) -> None:
    """`G -= U(UᵀG)`."""
    if G.dtype not in checks.LOW_PRECISION:
        G.addmm_(U, U.mT @ G, alpha=-1)
        return
    wide = compute_dtype(G.dtype)
    U = U.to(wide)
    # Column panels: each needs only itself, so one pass reads and writes it.
    for columns in row_panels(G.shape[1], G.shape[0]):
        panel = G[:, columns].to(wide)
        G[:, columns] = panel.addmm_(U, U.mT @ panel, alpha=-1).to(G.dtype)

"""Projections of a matrix away from a left and a right subspace: validation and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sculpt_kernels import checks, dispatch, shards
from sculpt_kernels.operation import is_traced, operation
from sculpt_kernels.plan.projections import SMALL_RANK, simplified
from sculpt_kernels.products import has_fast_products, matrices
from sculpt_kernels.projection import library, row_panels, small


@operation()
def project_(
    G: Tensor,
    U: Tensor | None = None,
    V: Tensor | None = None,
    *,
    form: str = "core",
    backend: str = "auto",
    complement: str = "none",
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
        G: `(..., m, n)`, float64, float32, bfloat16 or float16, any strides; written in place. A
            `DTensor` that is divided along one dimension is projected where it is.
        U: `(..., m, r)`, orthonormal columns, dtype and device of `G`; two-dimensional to share one
            basis over a batch; `None` for `form="right"`. `r = 0` leaves that side alone.
        V: `(..., n, s)`, likewise for the right side; `None` for `form="left"`. `r != s` is legal.
            On the CPU bases with NaN are refused; elsewhere looking would wait for the device.
        form: the projection, see above.
        backend: `"auto"`, `"triton"`, `"native"` or `"torch"`.
        complement: sides whose basis spans what is *kept*, `"none"`, `"left"`, `"right"` or
            `"both"`: `UUᵀ` above becomes `I - UUᵀ` for the left side, likewise `V`. Cheaper for
            large removed ranks; `plan` tells from where on.

    Returns:
        `G` itself. Accumulation is never below float32.

    Raises:
        TypeError, ValueError: an argument does not fit; raised before `G` is changed.
        RuntimeError: the backend cannot run here.
    """
    if shards.is_divided(G):
        if backend not in ("auto", "torch"):
            raise ValueError(f"a DTensor takes backend 'auto' or 'torch'; got {backend!r}")
        shards.project_(G, U, V, form, complement)
        return G
    if is_traced(G):
        torch.ops.sculpt_kernels.project_(G, U, V, form, backend, complement)
        return G
    plain = complement == "none" and backend in ("auto", "torch")
    if plain and small.project_(G, U, V, form):
        return G
    _check_in_place(G, U, V, form, complement)
    _run(G, U, V, form, backend, complement)
    return G


def _check_in_place(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str, complement: str
) -> None:
    checks.projection(G, U, V, form, complement=complement)
    checks.writable("G", G)
    checks.no_overlap("G", G, U=U, V=V)


@operation()
def project(
    G: Tensor,
    U: Tensor | None = None,
    V: Tensor | None = None,
    *,
    form: str = "core",
    backend: str = "auto",
    complement: str = "none",
) -> Tensor:
    """Return the projection of `G` as a new tensor; arguments and errors as `project_`.

    Returns:
        `(..., m, n)`, detached from autograd.
    """
    if shards.is_divided(G):
        copy = G.detach().clone()
        return project_(copy, U, V, form=form, backend=backend, complement=complement)
    if is_traced(G):
        result: Tensor = torch.ops.sculpt_kernels.project(G, U, V, form, backend, complement)
        return result
    checks.projection(G, U, V, form, complement=complement)
    out = G.detach().clone()
    _run(out, U, V, form, backend, complement)
    return out


@operation()
def project_many_(
    Gs: Sequence[Tensor],
    Us: Sequence[Tensor | None] | None = None,
    Vs: Sequence[Tensor | None] | None = None,
    *,
    form: str = "core",
    backend: str = "auto",
    complement: str = "none",
) -> None:
    """Project every matrix of a list in place, as `project_` does for one.

    Matrices of one shape, dtype and rank go into one kernel launch where a kernel does that.

    Args:
        Gs: matrices of any shapes and dtypes; Us, Vs: their bases, lists of the same length, or
            `None` where the form does not use that side.
        Others: as for `project_`.

    Raises:
        TypeError, ValueError: an argument does not fit (named with its index), two of the matrices
            share memory, or the lists differ in length; raised before any matrix is changed.
        RuntimeError: the backend cannot run here.
    """
    Gs = checks.tensor_list("Gs", Gs)
    Us = [None] * len(Gs) if Us is None else list(Us)
    Vs = [None] * len(Gs) if Vs is None else list(Vs)
    for name, bases in (("Us", Us), ("Vs", Vs)):
        if len(bases) != len(Gs):
            raise ValueError(
                f"{name} must have one basis for each of the {len(Gs)} matrices of Gs; "
                f"got {len(bases)}"
            )
    if any(is_traced(G) for G in Gs):
        torch.ops.sculpt_kernels.project_many_(Gs, Us, Vs, form, backend, complement)
        return
    triples = list(zip(Gs, Us, Vs, strict=True))
    chosen = []
    for i, (G, U, V) in enumerate(triples):
        with checks.within(f"matrix {i} of Gs"):
            _check_in_place(G, U, V, form, complement)
        # A named backend that cannot take one of them is an error before any is changed.
        chosen.append(_choose(backend, G, U, V, complement))
    checks.disjoint("Gs", Gs)
    together = [
        i
        for i, (G, U, V) in enumerate(triples)
        if chosen[i] == "triton" and G.ndim == 2 and G.numel() and _ranks(U, V)[0] > 0
    ]
    if together:
        from sculpt_kernels.projection import triton

        with torch.no_grad():
            triton.project_many_([triples[i] for i in together], form)
    for i in sorted({*range(len(Gs))} - {*together}):
        G, U, V = triples[i]
        _run(G, U, V, form, backend, complement)


def _ranks(U: Tensor | None, V: Tensor | None) -> tuple[int, int]:
    """Least and largest number of columns."""
    columns = [B.shape[-1] for B in (U, V) if B is not None]
    return min(columns), max(columns)


def _choose(backend: str, G: Tensor, U: Tensor | None, V: Tensor | None, complement: str) -> str:
    """The implementation that takes these arguments, which have been checked."""

    def refused() -> str | None:
        if complement != "none":
            return f"the Triton kernels take no complement={complement!r}"
        if _ranks(U, V)[1] > SMALL_RANK:
            return f"the Triton kernels are for ranks up to {SMALL_RANK}; got {_ranks(U, V)[1]}"
        return dispatch.unsupported(G, U, V)

    return dispatch.choose(backend, G.device, refused)


def _run(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str, backend: str, complement: str
) -> None:
    """Valid arguments, in place."""
    if G.is_meta:
        return
    chosen = _choose(backend, G, U, V, complement)
    if complement == "none" and _ranks(U, V)[0] == 0:
        r, s = (0 if B is None else B.shape[-1] for B in (U, V))
        left = simplified(form, r, s)
        if left is None:
            return
        form = left
        U = None if form == "right" else U
        V = None if form == "left" else V
    if G.numel() == 0:
        return
    with torch.no_grad():
        if chosen == "triton":
            from sculpt_kernels.projection import triton

            triton.project_(G, U, V, form)
        elif not G.is_cpu or _is_fast(G):
            library.project_batch(G, U, V, form, complement)
        else:
            for X, A, B in matrices(G, U, V):
                row_panels.project_matrix(X, A, B, form, complement)


def _is_fast(G: Tensor) -> bool:
    """Whether the CPU's library takes a low-precision matrix as it is, without a copy."""
    if G.dtype not in checks.LOW_PRECISION or not has_fast_products(G.dtype, "cpu"):
        return False
    return G.stride(-1) == 1 or G.stride(-2) == 1

"""Projections of a matrix away from a left and a right subspace: validation and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sculpt_kernels import checks, quick_checks, shards, triton_backend
from sculpt_kernels.dispatch import choose
from sculpt_kernels.doors import door
from sculpt_kernels.plan.projections import simplified
from sculpt_kernels.products import (
    REORDERED,
    SMALL_CORE,
    THIN,
    VIEW_ROWS,
    has_fast_products,
    matrices,
    product,
)
from sculpt_kernels.projection import library, panels, split_precision
from sculpt_kernels.tracing import is_traced


@door()
def project_(
    G: Tensor,
    U: Tensor | None = None,
    V: Tensor | None = None,
    *,
    form: str = "core",
    backend: str = "auto",
    check: bool = False,
    complement: str = "none",
    precision: str = "standard",
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
        form: the projection, see above.
        backend: `"auto"`, `"triton"`, `"native"` or `"torch"`.
        check: measure `‖UᵀU - I‖` and `‖VᵀV - I‖` first and refuse bases that are not orthonormal.
            On the CPU bases with NaN are refused always; elsewhere looking would wait for the
            device.
        complement: sides whose basis spans what is *kept*, `"none"`, `"left"`, `"right"` or
            `"both"`: `UUᵀ` above becomes `I - UUᵀ` for the left side, likewise `V`. Cheaper for
            large removed ranks; `plan` tells from where on.
        precision: `"standard"`, or `"exact"` to correct for the rounding of the bases
            (`U(UᵀU)⁻¹Uᵀ` in place of `UUᵀ`) and of the intermediate results: what is left in the
            removed subspace is the rounding of `G` itself.

    Returns:
        `G` itself. Accumulation is never below float32.

    Raises:
        TypeError, ValueError: an argument does not fit; raised before `G` is changed.
        RuntimeError: the backend cannot run here.
    """
    if shards.is_divided(G):
        _refuse_divided(backend, check, precision)
        shards.project_(G, U, V, form, complement)
        return G
    if is_traced(G):
        torch.ops.sculpt_kernels.project_(G, U, V, form, backend, check, complement, precision)
        return G
    if (
        complement == "none"
        and precision == "standard"
        and not check
        and backend in ("auto", "torch")
        and (_remove_core(G, U, V) if form == "core" else _at_once(G, U, V, form))
    ):
        return G
    left, right = checks.projection(G, U, V, form, complement=complement, check=check)
    checks.writable("G", G)
    checks.no_overlap("G", G, U=left, V=right)
    if precision != "standard":
        checks.choice("precision", precision, checks.PRECISIONS)
    _run(G, left, right, form, backend, complement, precision)
    return G


def _refuse_divided(backend: str, check: bool, precision: str) -> None:
    """What shards do not have."""
    if backend not in ("auto", "torch") or check or precision != "standard":
        raise ValueError(
            "a DTensor takes backend 'auto' or 'torch', check=False and precision='standard'; "
            f"got {backend!r}, {check!r} and {precision!r}"
        )


@door()
def project(
    G: Tensor,
    U: Tensor | None = None,
    V: Tensor | None = None,
    *,
    form: str = "core",
    backend: str = "auto",
    check: bool = False,
    complement: str = "none",
    precision: str = "standard",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the projection of `G` as a new tensor; arguments and errors as `project_`.

    Args:
        out_dtype: dtype of the result and of the arithmetic, default that of `G`. With
            `precision="exact"` and float32, a bfloat16 `G` leaves about 4e-6 of its share in the
            span of bfloat16 bases, where bfloat16 results leave their own rounding.

    Returns:
        `(..., m, n)`, detached from autograd.
    """
    if shards.is_divided(G):
        _refuse_divided(backend, check, precision)
        copy = G.detach().to(checks.out_dtype(out_dtype, G.dtype), copy=True)
        assert shards.is_divided(copy)
        shards.project_(copy, U, V, form, complement)
        return copy
    if is_traced(G):
        result: Tensor = torch.ops.sculpt_kernels.project(
            G, U, V, form, backend, check, complement, precision, out_dtype
        )
        return result
    left, right = checks.projection(G, U, V, form, complement=complement, check=check)
    checks.choice("precision", precision, checks.PRECISIONS)
    dtype = checks.out_dtype(out_dtype, G.dtype)
    out = G.detach().to(dtype, copy=True)
    if dtype != G.dtype:
        left = None if left is None else left.to(dtype)
        right = None if right is None else right.to(dtype)
    _run(out, left, right, form, backend, complement, precision)
    return out


@door()
def project_many_(
    Gs: Sequence[Tensor],
    Us: Sequence[Tensor | None] | None = None,
    Vs: Sequence[Tensor | None] | None = None,
    *,
    form: str = "core",
    backend: str = "auto",
    check: bool = False,
    complement: str = "none",
    precision: str = "standard",
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
        torch.ops.sculpt_kernels.project_many_(
            Gs, Us, Vs, form, backend, check, complement, precision
        )
        return
    checks.choice("precision", precision, checks.PRECISIONS)
    for i, (G, U, V) in enumerate(zip(Gs, Us, Vs, strict=True)):
        with checks.within(f"matrix {i} of Gs"):
            left, right = checks.projection(G, U, V, form, complement=complement, check=check)
            checks.writable("G", G)
            checks.no_overlap("G", G, U=left, V=right)
    checks.disjoint("Gs", Gs)
    rest: Sequence[int] = range(len(Gs))
    if backend not in ("auto", "torch"):
        # A named backend that cannot take one of them is an error before any is changed.
        for G, U, V in zip(Gs, Us, Vs, strict=True):
            reason = partial(triton_backend.project_reason, G, U, V, complement, precision, backend)
            choose(backend, G.device, reason)
    if complement == "none":
        rest = triton_backend.project_many_(Gs, Us, Vs, form, precision, backend)
    for i in rest:
        _run(Gs[i], Us[i], Vs[i], form, backend, complement, precision)


def _run(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    backend: str,
    complement: str,
    precision: str,
) -> None:
    """Valid arguments, in place."""
    if G.is_meta:
        return
    if complement == "none":
        r = 0 if U is None else U.shape[-1]
        s = 0 if V is None else V.shape[-1]
        if r == 0 or s == 0:
            left = simplified(form, r, s)
            if left is None:
                choose(backend, G.device, lambda: None)
                return
            form = left
            U = None if form == "right" else U
            V = None if form == "left" else V
    exact = precision == "exact"
    chosen = choose(
        backend,
        G.device,
        lambda: triton_backend.project_reason(G, U, V, complement, precision, backend),
    )
    if G.numel() == 0:
        return
    with torch.no_grad():
        if chosen == "triton":
            triton_backend.project_(G, U, V, form, precision)
        elif exact and not G.is_cpu and G.dtype in checks.LOW_PRECISION:
            split_precision.project_(G, U, V, form, complement)
        elif G.is_cpu:
            _on_cpu(G, U, V, form, complement, exact)
        elif exact:
            for X, A, B in matrices(G, U, V):
                assert X is not None
                panels.project_matrix(X, A, B, form, complement, exact)
        else:
            library.project_batch(G, U, V, form, complement)


def _on_cpu(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str, complement: str, exact: bool
) -> None:
    fast = has_fast_products(G.dtype, "cpu")
    if G.dtype in checks.LOW_PRECISION and fast and not exact and _library_layout(G):
        library.project_batch(G, U, V, form, complement)
        return
    for X, A, B in matrices(G, U, V):
        assert X is not None
        panels.project_matrix(X, A, B, form, complement, exact)


def _at_once(G: Tensor, U: Tensor | None, V: Tensor | None, form: str) -> bool:
    """The products of `sweep` for small matrices, where checks and calls count; `False`: not done.

    Every form but `core`, which `_remove_core` does. Whatever is out of the ordinary is left,
    unchanged, to the full checks: the first product refuses what does not fit. So is NaN in a
    product: from `G` it may pass, it is the caller's to see; from a basis it may not.
    """
    if (
        form not in ("strict", "left", "right")
        or (U is None) != (form == "right")
        or (V is None) != (form == "left")
    ):
        return False
    bases = [B for B in (U, V) if B is not None]
    if not quick_checks.plainly_apart(G, *bases) or not _multiplies(G):
        return False
    if form == "strict" and (V is None or not quick_checks.plainly_fits(V, G)):
        return False  # the second side is multiplied when the first has changed `G` already
    thin = _contracted(G, U, V)
    if thin is None:
        return False
    if U is None:
        assert V is not None
        G.addmm_(thin, V.t(), alpha=-1)
        return True
    G.addmm_(U, thin, alpha=-1)
    del thin
    if V is not None:
        G.addmm_(product(G, V), V.t(), alpha=-1)
    return True


def _contracted(G: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor | None:
    """`UᵀG`, or `GV` without `U`; `None` where the basis does not fit or NaN comes out."""
    B = V if U is None else U
    assert B is not None
    try:
        size, rank = B.shape
        if not 0 < rank <= size:
            return None
        thin = product(G, B) if U is None else torch.mm(B.t(), G)
        return None if quick_checks.holds_nan(thin) else thin
    except (RuntimeError, ValueError):
        return None


def _remove_core(G: Any, U: Any, V: Any) -> bool:
    """`G - U (UᵀGV) Vᵀ` for small matrices as in `_at_once`, in the order of `arrange`.

    What does not fit is refused by the first two products, before anything is changed. Each
    intermediate is let go before the next comes: more of them at once would grow the heap past
    what the allocator keeps, and every call would have to fetch its pages anew.
    """
    if not quick_checks.plainly_apart(G, U, V) or not _multiplies(G):
        return False
    mm = torch.mm
    try:
        (m, n), (_, r), (_, s) = G.shape, U.shape, V.shape
        if not (0 < r <= m and 0 < s <= n):
            return False
        right_first = s * m * (n + r) <= r * n * (m + s)
        if not right_first and G.dtype is torch.bfloat16 and m * n >= REORDERED:
            # As the right factor, all of G is laid out anew: that costs 20 products an element.
            right_first = s * m * (n + r) <= r * n * (m + s) + 20 * m * n
        # A bfloat16 product costs the library longer to set up than a small one in float32.
        small = (
            r * s * (m if right_first else n) <= SMALL_CORE
            and G.dtype is torch.bfloat16
            and U.dtype is V.dtype
        )
        if right_first:
            # As `product` lays it out, without looking: both factors are row-major here.
            thin = mm(V.t(), G.t()).t() if s <= THIN and s < m else mm(G, V)
            if small:
                U, thin = U.float(), thin.float()
            core = mm(U.t(), thin)
        else:
            thin = mm(U.t(), G)
            B = V.float() if small else V
            core = mm(thin.float() if small else thin, B)
        if quick_checks.holds_nan(core):
            return False
    except (RuntimeError, ValueError):
        return False
    del thin
    if right_first:
        beside = mm(U, core)
        del core
        G.addmm_(beside.to(G.dtype) if small else beside, V.t(), alpha=-1)
    else:
        below = mm(core, B.t())
        del core
        G.addmm_(U, below.to(G.dtype) if small else below, alpha=-1)
    return True


def _multiplies(G: Tensor) -> bool:
    """Whether the library multiplies with all of `G` at full speed, in its own dtype."""
    dtype = G.dtype
    if dtype is torch.float32 or dtype is torch.float64:
        return max(G.shape) <= VIEW_ROWS
    return has_fast_products(dtype, "cpu")


def _library_layout(G: Tensor) -> bool:
    """Rows or columns are contiguous, so that the library takes the matrix without a copy."""
    return G.stride(-1) == 1 or G.stride(-2) == 1

"""Projections of small matrices on the CPU, where the full checks and calls would show.

A microsecond or two decides the plain case: contiguous tensors, apart in memory, free of autograd.
`False` only means that nothing was done and the full checks must look: the first product refuses
what does not fit. So is NaN in a product: from the matrix it may pass, from a basis it may not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sculpt_kernels.products import (
    REORDERED,
    SMALL_CORE,
    THIN,
    VIEW_ROWS,
    has_fast_products,
    product,
)


def project_(G: Any, U: Any, V: Any, form: Any) -> bool:
    """Project `G` in place, unless it or a basis is out of the ordinary; whether that was done."""
    if form == "core":
        return _remove_core(G, U, V)
    if (
        form not in ("strict", "left", "right")
        or (U is None) != (form == "right")
        or (V is None) != (form == "left")
    ):
        return False
    bases = [B for B in (U, V) if B is not None]
    if not _plainly_apart(G, *bases) or not _multiplies(G):
        return False
    if form == "strict" and not _plainly_fits(V, G):
        return False  # the second side is multiplied when the first has changed `G` already
    try:
        size, rank = bases[0].shape
        if not 0 < rank <= size:
            return False
        thin = product(G, V) if U is None else torch.mm(U.t(), G)
        if _holds_nan(thin):
            return False
    except (RuntimeError, ValueError):
        return False
    if U is None:
        G.addmm_(thin, V.t(), alpha=-1)
        return True
    G.addmm_(U, thin, alpha=-1)
    del thin
    if V is not None:
        G.addmm_(product(G, V), V.t(), alpha=-1)
    return True


def _remove_core(G: Any, U: Any, V: Any) -> bool:
    """`G - U (UᵀGV) Vᵀ`, in the order of `arrange`.

    What does not fit is refused by the first two products, before anything is changed. Each
    intermediate is let go before the next comes: more of them at once would grow the heap past
    what the allocator keeps, and every call would have to fetch its pages anew.
    """
    if not _plainly_apart(G, U, V) or not _multiplies(G):
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
        if _holds_nan(core):
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


def _plainly_apart(G: Any, *bases: Any) -> bool:
    """Whether plain contiguous bases may be multiplied into `G`, on the CPU, in place."""
    if type(G) is not Tensor or G.requires_grad or not (G.is_cpu and G.is_contiguous()):
        return False
    start = G.data_ptr()
    end = start + G.nbytes
    for B in bases:
        if type(B) is not Tensor or B.requires_grad or not B.is_contiguous():
            return False
        other = B.data_ptr()
        if other < end and start < other + B.nbytes:
            return False
    return True


def _plainly_fits(V: Tensor, G: Tensor) -> bool:
    """Whether a right basis that is `_plainly_apart` fits `G` in all else, and holds no NaN."""
    if V.ndim != 2 or G.ndim != 2 or V.dtype is not G.dtype or not V.is_cpu:
        return False
    size, rank = V.shape
    return size == G.shape[1] and 0 < rank <= size and not _holds_nan(V)


def _holds_nan(X: Tensor) -> bool:
    """Whether any element of `X`, not empty, on the CPU, is NaN."""
    if X.numel() <= 1024:
        return not torch.equal(X, X)  # the least to set up, but one element at a time
    largest = X.max().item()
    return largest != largest


def _multiplies(G: Tensor) -> bool:
    """Whether the library multiplies with all of `G` at full speed, in its own dtype."""
    dtype = G.dtype
    if dtype is torch.float32 or dtype is torch.float64:
        return max(G.shape) <= VIEW_ROWS
    return has_fast_products(dtype, "cpu")

"""Row panels: how the torch backend works on a CPU without an `m x n` temporary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# A panel must be tall enough for the products to run at the library's speed (the other factor is
# packed once per panel); narrow matrices take more rows, so that a panel is worth its calls.
PANEL_ROWS = 256
PANEL_ELEMENTS = 2**17
# Products of matrices that need no conversion write no panel, only `rows x rank`: larger is better.
VIEW_ROWS = 4096
# Results with fewer columns than this are computed as their transpose.
THIN = 32
# `rows x rank x rank` up to which products with a core of bfloat16 matrices run in float32.
SMALL_CORE = 2**18
# Elements from which a bfloat16 matrix does not stay in a cache while the library lays it out.
REORDERED = 2**22


def panels_of(m: int, n: int) -> Iterator[slice]:
    """Consecutive row ranges of an `m x n` matrix that is converted panel by panel."""
    return _ranges(m, max(PANEL_ROWS, PANEL_ELEMENTS // max(1, n)))


def view_panels(m: int) -> Iterator[slice]:
    """Consecutive row ranges of a matrix that is used as it is."""
    return _ranges(m, VIEW_ROWS)


def _ranges(m: int, rows: int) -> Iterator[slice]:
    for start in range(0, m, rows):
        yield slice(start, min(m, start + rows))


def matrices(X: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Each matrix of a batch as a view, with the matching (or shared) matrix of the others."""
    if X.ndim == 2:
        yield (X, *others)
        return
    for at in itertools.product(*(range(size) for size in X.shape[:-2])):
        yield (X[at], *(Y[at] if Y is not None and Y.ndim > 2 else Y for Y in others))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation is never below float32."""
    return torch.promote_types(dtype, torch.float32)


@lru_cache(maxsize=64)
def has_fast_products(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the library multiplies matrices of this dtype at full speed, without conversion.

    float32 and float64 everywhere; low precision on accelerators, and bfloat16 on CPUs with the
    instructions for it. Without them a bfloat16 product is tens of times slower than float32.
    """
    if dtype in (torch.float32, torch.float64) or device_type != "cpu":
        return True
    if dtype != torch.bfloat16:
        return False
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def product(A: Tensor, B: Tensor) -> Tensor:
    """`A B`, laid out as the library computes it fastest.

    A result with few columns is computed as its transpose, up to four times faster; otherwise the
    result takes the layout of the larger factor, because thin products that change from column-
    to row-major are slow too.
    """
    rows, columns = A.shape[0], B.shape[1]
    if min(rows, columns) <= THIN:
        turned = columns < rows
    else:
        larger = A if rows >= columns else B
        turned = larger.stride(0) == 1 and larger.stride(1) != 1
    return torch.mm(B.t(), A.t()).t() if turned else torch.mm(A, B)

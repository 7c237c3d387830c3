"""Row panels: how the torch backend works on low precision without an `m x n` temporary."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

# 2**18 float32 elements are 1 MiB: a panel and its update stay in a core's cache.
PANEL_ELEMENTS = 2**18


def row_panels(m: int, n: int) -> Iterator[slice]:
    """Consecutive row ranges of an `m x n` matrix, each of about `PANEL_ELEMENTS` elements."""
    rows = max(1, PANEL_ELEMENTS // max(1, n))
    for start in range(0, m, rows):
        yield slice(start, min(m, start + rows))


def matrices(X: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Each matrix of a batch as a view, with the matching (or shared) matrix of the others."""
    if X.ndim == 2:
        yield (X, *others)
        return
    for at in product(*(range(size) for size in X.shape[:-2])):
        yield (X[at], *(Y[at] if Y is not None and Y.ndim > 2 else Y for Y in others))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation is never below float32."""
    return torch.promote_types(dtype, torch.float32)

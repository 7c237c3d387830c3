"""Checks of a microsecond or two, for matrices so small that the full ones would show.

They decide the plain case; `False` only means that `sculpt_kernels.checks` must look.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def plainly_apart(G: Any, *bases: Any) -> bool:
    """Whether the bases may be multiplied into `G` in place, as far as memory tells.

    Plain contiguous tensors, `G` on the CPU, apart in memory, free of autograd; decided in a
    microsecond or two. `False` only means that the full checks must look.
    """
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


def plainly_fits(V: Tensor, G: Tensor) -> bool:
    """Whether a right basis that is `plainly_apart` fits `G` in all else, and holds no NaN."""
    if V.ndim != 2 or G.ndim != 2 or V.dtype is not G.dtype or not V.is_cpu:
        return False
    size, rank = V.shape
    return size == G.shape[1] and 0 < rank <= size and not holds_nan(V)


def holds_nan(X: Tensor) -> bool:
    """Whether any element of `X`, not empty, on the CPU, is NaN."""
    if X.numel() <= 1024:
        return not torch.equal(X, X)  # the least to set up, but one element at a time
    largest = X.max().item()
    return largest != largest

"""Matrix products whose result is symmetric: only one triangle of blocks is multiplied.

With `p` block rows the products are `(p + 1) / 2p` of a full one: 0.625 with four. They are the
library's, at its speed and in every dtype, float64 on tensor cores among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a block: large enough for a product at full speed.
BLOCK_ROWS = {"cpu": 256, "cuda": 1024}


def symmetric_product(A: Tensor, B: Tensor | None = None, *, lower: bool = False) -> Tensor:
    """`A B` `(..., k, k)` where that is symmetric; without `B`, `A Aᵀ`.

    Args:
        A: `(..., k, n)`, any strides.
        B: `(..., n, k)`, such that `A B` is symmetric, as a product of two polynomials in one
            symmetric matrix is. It is not checked.
        lower: leave the blocks above the diagonal undefined, for routines that read one triangle.

    Returns:
        The product, exactly symmetric off the diagonal blocks.
    """
    if B is None:
        B = A.mT
    k = A.shape[-2]
    rows = BLOCK_ROWS.get(A.device.type, BLOCK_ROWS["cuda"])
    if k <= rows:
        return A @ B
    out = A.new_empty(*A.shape[:-1], k)
    for start in range(0, k, rows):
        block = slice(start, min(k, start + rows))
        until = slice(block.stop)
        torch.matmul(A[..., block, :], B[..., until], out=out[..., block, until])
        if start and not lower:
            out[..., :start, block] = out[..., block, :start].mT
    return out

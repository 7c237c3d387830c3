"""Coordinates `Uᵀ G V` at small ranks: one pass over `G`, and the ordered sum of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels.projection.triton import Operands, reduce
from sculpt_kernels.triton import launcher


def compress(G: Tensor, U: Tensor, V: Tensor, out: Tensor) -> Tensor:
    """`out <- Uᵀ G V` at ranks up to 128; returns `out`, of any floating dtype and strides.

    16-bit products `G V` enter the second product as two 16-bit parts, so that the coordinates are
    as accurate as float32 accumulation allows.

    Bytes: one read of `G`, the bases, `4 r s` written and read for each of about 264 programs.
    FLOPs: `2 m n s`, and `2 m r s` (16-bit: twice that) for each chunk of columns.
    """
    if out.numel() == 0:
        return out
    if G.numel() == 0:
        return out.zero_()
    for _, (g, u, v, c) in launcher.batches(G, U, V, out):
        # The kernel walks along rows; (Uᵀ G V)ᵀ = Vᵀ Gᵀ U.
        if g.stride(-1) != 1 and g.stride(-2) == 1:
            g, u, v, c = g.mT, v, u, c.mT
        operands = Operands(g, u, v, "core")
        if g.dtype == torch.float32:
            Y, _, _ = reduce(operands, 1, False, exact=False)
            c.copy_(u.mT @ Y)
        else:
            _, _, C = reduce(operands, 0, True, exact=True)
            c.copy_(C.sum(1))
    return out

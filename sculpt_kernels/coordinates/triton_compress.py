"""Coordinates `Uᵀ G V` at small ranks: one pass over `G`, and the ordered sum of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels.projection import triton as project
from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.tiles import TileConfig


def supports(G: Tensor, U: Tensor, V: Tensor) -> str | None:
    """`None` if `compress` can run on these, else the reason."""
    return project.supports(G, U, V)


def compress(
    G: Tensor, U: Tensor, V: Tensor, out: Tensor, *, config: TileConfig | None = None
) -> Tensor:
    """`out <- Uᵀ G V` at ranks up to 128; returns `out`.

    Args:
        G: `(..., m, n)`, float32, bfloat16 or float16, any strides.
        U: `(..., m, r)`; V: `(..., n, s)`, dtype of `G`; two-dimensional to share over the batch.
        out: `(..., r, s)`, any floating dtype and strides; accumulated in float32.
        config: tile configuration, instead of the table's.

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
        _compress(g, u, v, c, config)
    return out


def _compress(G: Tensor, U: Tensor, V: Tensor, out: Tensor, config: TileConfig | None) -> None:
    operands = project.Operands(G, U, V, "core", None)
    if G.dtype == torch.float32:
        Y, _, _ = project.reduce(operands, 1, False, False, config)
        out.copy_(U.mT @ Y)
    else:
        _, _, C = project.reduce(operands, 0, True, True, config)
        out.copy_(C.sum(1))

"""Coordinates `Uᵀ G V` at small ranks: one pass over `G`, and the ordered sum of its parts."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sculpt_kernels.kernels import common, project
from sculpt_kernels.kernels.config import TileConfig
from sculpt_kernels.kernels.strips import reduce_kernel


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
    for _, (g, u, v, c) in common.batches(G, U, V, out):
        # The kernel walks along rows; (Uᵀ G V)ᵀ = Vᵀ Gᵀ U.
        if g.stride(-1) != 1 and g.stride(-2) == 1:
            g, u, v, c = g.mT, v, u, c.mT
        _compress(g, u, v, c, config)
    return out


def _compress(G: Tensor, U: Tensor, V: Tensor, out: Tensor, config: TileConfig | None) -> None:
    count, m, n = G.shape
    config = common.choose("reduce", G.dtype, G.device, config)
    chunk = project.chunk_length(count, m, n, config)
    parts = triton.cdiv(m, config.block_m) * triton.cdiv(n, chunk)
    C = G.new_empty(count, parts, U.shape[-1], V.shape[-1], dtype=torch.float32)
    nothing = G.new_empty(0)
    common.launch(
        reduce_kernel,
        count * parts,
        config,
        G.device,
        Y=nothing,
        Z=nothing,
        C=C,
        chunk=chunk,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        **project.arguments(
            G, U, V, None, m, n, core=True, sides=0, exact=G.dtype != torch.float32
        ),
    )
    out.copy_(C.sum(1))

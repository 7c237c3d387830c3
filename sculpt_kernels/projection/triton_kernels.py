# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device code of the small-rank projections: a program owns a block of rows and walks along it."""

from __future__ import annotations

import triton
import triton.language as tl

from sculpt_kernels.triton.common import (
    dot,
    inside,
    load_tile,
    matrix,
    offsets,
    split_dot,
)


@triton.jit
def _rows_product(
    G, V, rows, m, start, stop, s,
    stride_gm, stride_gn, stride_vn, stride_vs,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """`G[rows, start:stop] V[start:stop]`, float32."""
    acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)  # [BLOCK_M, RANK]
    ranks = tl.arange(0, RANK)
    inner = start + tl.arange(0, BLOCK_K)
    g_at = G + offsets(rows, inner, stride_gm, stride_gn)
    v_at = V + offsets(inner, ranks, stride_vn, stride_vs)
    g_step = tl.full((), BLOCK_K, tl.int64) * stride_gn
    v_step = tl.full((), BLOCK_K, tl.int64) * stride_vn
    for at in range(start, stop, BLOCK_K):
        columns = at + tl.arange(0, BLOCK_K)
        g = tl.load(g_at, mask=inside(rows, columns, m, stop), other=0.0)
        v = tl.load(v_at, mask=inside(columns, ranks, stop, s), other=0.0)
        acc = dot(g, v, acc, PRECISION)
        g_at += g_step
        v_at += v_step
    return acc


@triton.jit
def reduce_kernel(
    G, U, V,  # [L, m, n], [L, m, r], [L, n, s]
    Y, Z, C,  # [L, m, s], [L, n, r], [L, parts, r, s], contiguous
    m, n, r, s, chunk,
    stride_gl, stride_gm, stride_gn,
    stride_ul, stride_um, stride_ur,
    stride_vl, stride_vn, stride_vs,
    CORE: tl.constexpr, SIDES: tl.constexpr, EXACT: tl.constexpr,
    TABLE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT_RANK: tl.constexpr, RIGHT_RANK: tl.constexpr,
):  # fmt: skip
    """`Y = G V` and the parts of `C = Uᵀ Y`, by blocks of rows; `Z = Gᵀ U`, by blocks of columns.

    A part of C, which is float32, is one block of rows over one chunk of columns. SIDES 0 keeps C
    alone, 1 keeps Y, 2 keeps Y and Z. EXACT multiplies both 16-bit parts of Y into C.
    Bytes: one read of G (two for SIDES 2), the bases, `4 r s` for each part.
    FLOPs: `2 m n s`, `2 m r s` for each chunk with CORE, `2 m n r` with SIDES 2.
    """
    blocks = tl.cdiv(m, BLOCK_M)
    chunks = tl.cdiv(n, chunk)
    programs = blocks * chunks
    if SIDES == 2:
        programs += tl.cdiv(n, BLOCK_M)
    index = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    g = matrix(G, index, stride_gl, TABLE, DTYPE)
    long_index = index.to(tl.int64)
    left_ranks = tl.arange(0, LEFT_RANK)
    right_ranks = tl.arange(0, RIGHT_RANK)
    if program < blocks * chunks:
        v = matrix(V, index, stride_vl, TABLE, DTYPE)
        rows = program // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
        start = program % chunks * chunk
        y = _rows_product(
            g, v, rows, m, start, min(n, start + chunk), s,
            stride_gm, stride_gn, stride_vn, stride_vs, PRECISION, BLOCK_M, BLOCK_K, RIGHT_RANK,
        )  # fmt: skip
        if SIDES >= 1:
            y_at = Y + long_index * m * s + offsets(rows, right_ranks, s, 1)
            tl.store(y_at, y.to(Y.dtype.element_ty), mask=inside(rows, right_ranks, m, s))
        if CORE:
            u = matrix(U, index, stride_ul, TABLE, DTYPE)
            b_u = load_tile(u, left_ranks, rows, r, m, stride_ur, stride_um)
            core = tl.zeros((LEFT_RANK, RIGHT_RANK), dtype=tl.float32)
            core = split_dot(b_u, y, core, EXACT, PRECISION)
            c_at = C + (long_index * blocks * chunks + program) * r * s
            c_at += offsets(left_ranks, right_ranks, s, 1)
            tl.store(c_at, core, mask=inside(left_ranks, right_ranks, r, s))
    elif SIDES == 2:
        z_u = matrix(U, index, stride_ul, TABLE, DTYPE)
        columns = (program - blocks * chunks) * BLOCK_M + tl.arange(0, BLOCK_M)
        z = _rows_product(
            g, z_u, columns, n, 0, m, r,
            stride_gn, stride_gm, stride_um, stride_ur, PRECISION, BLOCK_M, BLOCK_K, LEFT_RANK,
        )  # fmt: skip
        z_at = Z + long_index * n * r + offsets(columns, left_ranks, r, 1)
        tl.store(z_at, z.to(Z.dtype.element_ty), mask=inside(columns, left_ranks, n, r))


@triton.jit
def apply_kernel(
    G, U, V,  # [L, m, n], [L, m, r], [L, n, s]
    Y, Z, C,  # [L, m, s], [L, n, r], [L, parts, r, s], contiguous
    m, n, r, s, parts, chunk,
    stride_gl, stride_gm, stride_gn,
    stride_ul, stride_um, stride_ur,
    stride_vl, stride_vn, stride_vs,
    CORE: tl.constexpr, SIDES: tl.constexpr,
    TABLE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT_RANK: tl.constexpr, RIGHT_RANK: tl.constexpr,
):  # fmt: skip
    """`G -= F Vᵀ (+ U Zᵀ)` with `F = U C`, `Y` or `Y - U C`: a block of rows, tile by tile.

    The parts of C are added up in order.
    Bytes: one read and one write of G, the bases. FLOPs: `2 m n s`, `2 m r s` for each chunk with
    CORE, `2 m n r` with SIDES 2.
    """
    programs = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, chunk)
    chunks = tl.cdiv(n, chunk)
    index = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    long_index = index.to(tl.int64)
    g = matrix(G, index, stride_gl, TABLE, DTYPE)
    v = matrix(V, index, stride_vl, TABLE, DTYPE)
    rows = program // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    start = program % chunks * chunk
    left_ranks = tl.arange(0, LEFT_RANK)
    right_ranks = tl.arange(0, RIGHT_RANK)

    factor = tl.zeros((BLOCK_M, RIGHT_RANK), dtype=tl.float32)
    if CORE:
        u = matrix(U, index, stride_ul, TABLE, DTYPE)
        b_u = load_tile(u, rows, left_ranks, m, r, stride_um, stride_ur)
        core_at = C + long_index * parts * r * s + offsets(left_ranks, right_ranks, s, 1)
        core_mask = inside(left_ranks, right_ranks, r, s)
        core = tl.load(core_at, mask=core_mask, other=0.0)
        for _ in range(1, parts):
            core_at += r * s
            core += tl.load(core_at, mask=core_mask, other=0.0)
        factor = dot(b_u, core.to(DTYPE), factor, PRECISION)  # [BLOCK_M, RIGHT_RANK]
    if SIDES >= 1:
        y = load_tile(Y + long_index * m * s, rows, right_ranks, m, s, s, 1).to(tl.float32)
        factor = y - factor
    rounded = factor.to(DTYPE)

    for at in range(start, min(n, start + chunk), BLOCK_N):
        columns = at + tl.arange(0, BLOCK_N)
        b_v = load_tile(v, right_ranks, columns, s, n, stride_vs, stride_vn)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = dot(rounded, b_v, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
        if SIDES == 2:
            z = load_tile(Z + long_index * n * r, left_ranks, columns, r, n, 1, r)
            acc = dot(b_u, z, acc, PRECISION)
        mask = inside(rows, columns, m, n)
        g_at = g + offsets(rows, columns, stride_gm, stride_gn)
        tile = tl.load(g_at, mask=mask, other=0.0).to(tl.float32) - acc
        tl.store(g_at, tile.to(DTYPE), mask=mask)

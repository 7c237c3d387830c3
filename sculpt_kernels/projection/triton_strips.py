# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device code of the small-rank projections: a program owns a strip of rows and walks along it."""

from __future__ import annotations

import triton
import triton.language as tl

from sculpt_kernels.triton.common import (
    accumulate,
    dot,
    inside,
    load_tile,
    matrix,
    offsets,
    split_dot,
    tile_of,
)


@triton.jit
def _strip_product(
    G,
    V,
    rows,
    m,
    start,
    stop,
    s,
    stride_gm,
    stride_gn,
    stride_vn,
    stride_vs,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
):
    """`G[rows, start:stop] V[start:stop]`, float32 `(BLOCK_M, RANK)`."""
    acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
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
    G,
    U,
    V,
    Y,
    Z,
    C,
    m,
    n,
    r,
    s,
    chunk,
    stride_gl,
    stride_gm,
    stride_gn,
    stride_ul,
    stride_um,
    stride_ur,
    stride_vl,
    stride_vn,
    stride_vs,
    CORE: tl.constexpr,
    SIDES: tl.constexpr,
    EXACT: tl.constexpr,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEFT_RANK: tl.constexpr,
    RIGHT_RANK: tl.constexpr,
):
    """`Y = G V` and the parts of `C = Uᵀ Y`, by strips of rows; `Z = Gᵀ U`, by strips of columns.

    Shapes: G `(L, m, n)`, U `(L, m, r)`, V `(L, n, s)`; Y `(L, m, s)`, Z `(L, n, r)` and C
    `(L, parts, r, s)` contiguous, C float32. A part of C is one strip of rows over one chunk of
    columns. SIDES 0 keeps C alone, 1 keeps Y, 2 keeps Y and Z.
    Bytes: one read of G (two for SIDES 2), the bases, `4 r s` for each part.
    FLOPs: `2 m n s`, `2 m r s` for each chunk with CORE, `2 m n r` with SIDES 2.
    """
    strips = tl.cdiv(m, BLOCK_M)
    chunks = tl.cdiv(n, chunk)
    programs = strips * chunks
    if SIDES == 2:
        programs += tl.cdiv(n, BLOCK_M)
    index = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    g = matrix(G, index, stride_gl, TABLE, DTYPE)
    long_index = index.to(tl.int64)
    left_ranks = tl.arange(0, LEFT_RANK)
    right_ranks = tl.arange(0, RIGHT_RANK)
    if program < strips * chunks:
        v = matrix(V, index, stride_vl, TABLE, DTYPE)
        rows = program // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
        start = program % chunks * chunk
        y = _strip_product(
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
            c_at = C + (long_index * strips * chunks + program) * r * s
            c_at += offsets(left_ranks, right_ranks, s, 1)
            tl.store(c_at, core, mask=inside(left_ranks, right_ranks, r, s))
    elif SIDES == 2:
        z_u = matrix(U, index, stride_ul, TABLE, DTYPE)
        columns = (program - strips * chunks) * BLOCK_M + tl.arange(0, BLOCK_M)
        z = _strip_product(
            g, z_u, columns, n, 0, m, r,
            stride_gn, stride_gm, stride_um, stride_ur, PRECISION, BLOCK_M, BLOCK_K, LEFT_RANK,
        )  # fmt: skip
        z_at = Z + long_index * n * r + offsets(columns, left_ranks, r, 1)
        tl.store(z_at, z.to(Z.dtype.element_ty), mask=inside(columns, left_ranks, n, r))


@triton.jit
def apply_kernel(
    G,
    U,
    V,
    Y,
    Z,
    C,
    m,
    n,
    r,
    s,
    parts,
    chunk,
    stride_gl,
    stride_gm,
    stride_gn,
    stride_ul,
    stride_um,
    stride_ur,
    stride_vl,
    stride_vn,
    stride_vs,
    CORE: tl.constexpr,
    SIDES: tl.constexpr,
    EXACT: tl.constexpr,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT_RANK: tl.constexpr,
    RIGHT_RANK: tl.constexpr,
):
    """`G -= F Vᵀ (+ U Zᵀ)` with `F = U C`, `Y` or `Y - U C`: a strip of rows, tile by tile.

    Shapes as in `reduce_kernel`; C `(L, parts, r, s)` is added up in order.
    Bytes: one read and one write of G, the bases. FLOPs: `2 m n s`, `2 m r s` for each chunk with
    CORE, `2 m n r` with SIDES 2.
    """
    strips = tl.cdiv(m, BLOCK_M)
    chunks = tl.cdiv(n, chunk)
    index = tl.program_id(0) // (strips * chunks)
    program = tl.program_id(0) % (strips * chunks)
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
        factor = split_dot(b_u, core, factor, EXACT, PRECISION)
    if SIDES >= 1:
        y = load_tile(Y + long_index * m * s, rows, right_ranks, m, s, s, 1).to(tl.float32)
        factor = y - factor
    high = factor.to(DTYPE)
    low = (factor - high.to(tl.float32)).to(DTYPE)

    for at in range(start, min(n, start + chunk), BLOCK_N):
        columns = at + tl.arange(0, BLOCK_N)
        b_v = load_tile(v, right_ranks, columns, s, n, stride_vs, stride_vn)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = dot(high, b_v, acc, PRECISION)
        if EXACT:
            acc = dot(low, b_v, acc, PRECISION)
        if SIDES == 2:
            z = load_tile(Z + long_index * n * r, left_ranks, columns, r, n, 1, r)
            acc = split_dot(b_u, z.to(tl.float32), acc, EXACT, PRECISION)
        mask = inside(rows, columns, m, n)
        g_at = g + offsets(rows, columns, stride_gm, stride_gn)
        tile = tl.load(g_at, mask=mask, other=0.0).to(tl.float32) - acc
        tl.store(g_at, tile.to(DTYPE), mask=mask)


@triton.jit
def subtract_kernel(
    G,
    U,
    V,
    Y,
    Z,
    m,
    n,
    r,
    s,
    stride_gl,
    stride_gm,
    stride_gn,
    stride_ul,
    stride_um,
    stride_ur,
    stride_vl,
    stride_vn,
    stride_vs,
    SIDES: tl.constexpr,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`G -= Y Vᵀ (+ U Zᵀ)`, one tile of one matrix: `apply_kernel` for float32.

    Multiplying float32 without tensor cores keeps operands in registers, so the ranks come in
    steps of BLOCK_K, and the products with the core are the library's.
    Bytes: one read and one write of G, the factors. FLOPs: `2 m n s`, `2 m n r` with SIDES 2.
    """
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    index = tl.program_id(0) // tiles
    tile_m, tile_n = tile_of(tl.program_id(0) % tiles, m, n, BLOCK_M, BLOCK_N, GROUP_M)
    long_index = index.to(tl.int64)
    g = matrix(G, index, stride_gl, TABLE, DTYPE)
    v = matrix(V, index, stride_vl, TABLE, DTYPE)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate(
        acc, Y + long_index * m * s, v, rows, columns, m, n, s,
        s, 1, stride_vn, stride_vs, PRECISION, BLOCK_K,
    )  # fmt: skip
    if SIDES == 2:
        u = matrix(U, index, stride_ul, TABLE, DTYPE)
        acc = accumulate(
            acc, u, Z + long_index * n * r, rows, columns, m, n, r,
            stride_um, stride_ur, r, 1, PRECISION, BLOCK_K,
        )  # fmt: skip
    mask = inside(rows, columns, m, n)
    g_at = g + offsets(rows, columns, stride_gm, stride_gn)
    tile = tl.load(g_at, mask=mask, other=0.0) - acc
    tl.store(g_at, tile, mask=mask)

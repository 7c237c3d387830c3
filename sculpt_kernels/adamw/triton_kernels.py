# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device code of AdamW: the direction of a step, and the step behind the last product."""

from __future__ import annotations

import triton
import triton.language as tl

from sculpt_kernels.triton.common import (
    accumulate,
    corner,
    eighths,
    halves,
    inside,
    integer,
    matrix,
    offsets,
    quarters,
    scalar,
    store_rounded,
    tile_of,
    within,
)


@triton.jit
def _complement(beta):
    """`1 - beta` in float64: given as that number, or `beta` as a 0-d tensor."""
    if beta.dtype.is_ptr():
        return 1.0 - tl.load(beta).to(tl.float64)
    else:
        return beta.to(tl.float64)


@triton.jit
def _power(base, exponent):
    """`base ** exponent` by squaring, in float64: float32 loses `1 - beta ** step`."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        if exponent % 2 == 1:
            result *= base
        base *= base
        exponent = exponent // 2
    return result


@triton.jit
def _corrections(rest1, rest2, step):
    """Factors `a`, `b` with `m̂ / (sqrt(v̂) + eps) = a m / (sqrt(v) + b eps)`."""
    count = integer(step)
    first = 1.0 - _power(1.0 - rest1, count)
    second = 1.0 - _power(1.0 - rest2, count)
    root = tl.sqrt(second.to(tl.float32))
    return root / first.to(tl.float32), root


@triton.jit
def _moments(M, S, gradient, mask, at_m, at_s, rest1, rest2):
    """Update both moments in place; return them in float32."""
    # Read and written once: they must not push the factors and the gradient out of L2.
    m = tl.load(M + at_m, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    s = tl.load(S + at_s, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    m += rest1 * (gradient - m)
    s += rest2 * (gradient * gradient - s)
    tl.store(M + at_m, m.to(M.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    tl.store(S + at_s, s.to(S.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    return m, s


@triton.jit(do_not_specialize=["step"])
def direction_kernel(
    D, W, G, M, S,  # [L, m, n]
    rest1, rest2, eps, weight_decay, step,
    m, n,
    stride_dl, stride_dm, stride_dn,
    stride_wl, stride_wm, stride_wn,
    stride_gl, stride_gm, stride_gn,
    stride_ml, stride_mm, stride_mn,
    stride_sl, stride_sm, stride_sn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Moments, and `D = m̂ / (sqrt(v̂) + eps) + weight_decay W`.

    Bytes per element: G, W and both moments read, both moments and D written. FLOPs: about 15.
    """
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_n
    index = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = inside(rows, columns, m, n)
    wide1, wide2 = _complement(rest1), _complement(rest2)
    lift, root = _corrections(wide1, wide2, step)
    g = matrix(G, index, stride_gl, False, None) + offsets(rows, columns, stride_gm, stride_gn)
    gradient = tl.load(g, mask=mask, other=0.0).to(tl.float32)
    first, second = _moments(
        matrix(M, index, stride_ml, False, None),
        matrix(S, index, stride_sl, False, None),
        gradient,
        mask,
        offsets(rows, columns, stride_mm, stride_mn),
        offsets(rows, columns, stride_sm, stride_sn),
        wide1.to(tl.float32),
        wide2.to(tl.float32),
    )
    direction = lift * first / (tl.sqrt(second) + root * scalar(eps))
    w = matrix(W, index, stride_wl, False, None) + offsets(rows, columns, stride_wm, stride_wn)
    direction += scalar(weight_decay) * tl.load(w, mask=mask, other=0.0).to(tl.float32)
    d = matrix(D, index, stride_dl, False, None) + offsets(rows, columns, stride_dm, stride_dn)
    tl.store(d, direction.to(D.dtype.element_ty), mask=mask)


@triton.jit
def _step(
    W, G, M, S, K, acc,
    lr, rest1, rest2, eps, decay, seed,
    index, row, column, m, n,
    stride_wm, stride_wn, stride_gm, stride_gn, stride_mm, stride_mn,
    stride_sm, stride_sn, stride_km, stride_kn,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, STOCHASTIC: tl.constexpr,
    NEAR: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    mask = inside(rows, columns, m, n)
    g = corner(G, row, column, stride_gm, stride_gn)
    g += within(stride_gm, stride_gn, NEAR, VECTOR, BLOCK_M, BLOCK_N)
    update = tl.load(g, mask=mask, other=0.0).to(tl.float32) - acc
    if GRADIENT:
        first, second = _moments(
            corner(M, row, column, stride_mm, stride_mn),
            corner(S, row, column, stride_sm, stride_sn),
            update,
            mask,
            within(stride_mm, stride_mn, NEAR, VECTOR, BLOCK_M, BLOCK_N),
            within(stride_sm, stride_sn, NEAR, VECTOR, BLOCK_M, BLOCK_N),
            rest1,
            rest2,
        )
        update = first / (tl.sqrt(second) + eps)
    w_at = corner(W, row, column, stride_wm, stride_wn)
    w_at += within(stride_wm, stride_wn, NEAR, VECTOR, BLOCK_M, BLOCK_N)
    w = tl.load(w_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if GRADIENT:
        w *= decay
    w -= lr * update
    top = index.to(tl.int64) * m + row
    store_rounded(w_at, w, mask, top, column, n, seed, STOCHASTIC and not COPY, BLOCK_M, BLOCK_N)
    if COPY:
        k_at = corner(K, row, column, stride_km, stride_kn)
        k_at += within(stride_km, stride_kn, NEAR, VECTOR, BLOCK_M, BLOCK_N)
        store_rounded(k_at, w, mask, top, column, n, seed, STOCHASTIC, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["step", "seed", "first_matrix"])
def step_kernel(
    W, G, M, S, K,  # [L, m, n]; K is the low-precision copy
    A, B,  # [L, m, k], [L, n, k]
    A2, B2,  # [L, m, k2], [L, n, k2]
    lr, rest1, rest2, eps, weight_decay, step, seed, first_matrix,
    m, n, k, k2,
    stride_wl, stride_wm, stride_wn,
    stride_gl, stride_gm, stride_gn,
    stride_ml, stride_mm, stride_mn,
    stride_sl, stride_sm, stride_sn,
    stride_kl, stride_km, stride_kn,
    stride_al, stride_am, stride_ak,
    stride_bl, stride_bn, stride_bk,
    stride_a2l, stride_a2m, stride_a2k,
    stride_b2l, stride_b2n, stride_b2k,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, ALIKE: tl.constexpr,
    NEAR: tl.constexpr, VECTOR: tl.constexpr,
    SEGMENTS: tl.constexpr, STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """`P = G - A Bᵀ - A2 B2ᵀ`, then the step, one tile of one matrix.

    GRADIENT: moments of `P`, `W <- (1 - lr weight_decay) W - lr m̂ / (sqrt(v̂) + eps)`.
    Otherwise G is the direction of the step: `W <- W - lr P`.

    Bytes per element: G read, W read and written, K written; with GRADIENT both moments read and
    written. FLOPs: `2 m n (k + k2)`.
    """
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    index = tl.program_id(0) // tiles
    tile_m, tile_n = tile_of(tl.program_id(0) % tiles, m, n, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m * BLOCK_M
    column = tile_n * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if SEGMENTS >= 1:
        a = matrix(A, index, stride_al, False, None)
        b = matrix(B, index, stride_bl, False, None)
        acc = accumulate(
            acc, a, b, rows, columns, m, n, k,
            stride_am, stride_ak, stride_bn, stride_bk, PRECISION, BLOCK_K,
        )  # fmt: skip
    if SEGMENTS == 2:
        a = matrix(A2, index, stride_a2l, False, None)
        b = matrix(B2, index, stride_b2l, False, None)
        acc = accumulate(
            acc, a, b, rows, columns, m, n, k2,
            stride_a2m, stride_a2k, stride_b2n, stride_b2k, PRECISION, BLOCK_K,
        )  # fmt: skip

    if ALIKE:
        # One set of addresses instead of five: what lets the epilogue fit its registers.
        stride_gm = stride_wm
        stride_gn = stride_wn
        stride_mm = stride_wm
        stride_mn = stride_wn
        stride_sm = stride_wm
        stride_sn = stride_wn
        stride_km = stride_wm
        stride_kn = stride_wn
    # Scalars come after the product: they would hold registers through it.
    wide1, wide2 = _complement(rest1), _complement(rest2)
    rate = scalar(lr)
    small = scalar(eps)
    decay = 1.0 - rate * scalar(weight_decay)
    if GRADIENT:
        lift, root = _corrections(wide1, wide2, step)
        rate *= lift
        small *= root
    rest1 = wide1.to(tl.float32)
    rest2 = wide2.to(tl.float32)
    key = integer(seed)
    count = first_matrix + index
    w = matrix(W, index, stride_wl, False, None)
    g = matrix(G, index, stride_gl, False, None)
    f = matrix(M, index, stride_ml, False, None)
    s = matrix(S, index, stride_sl, False, None)
    c = matrix(K, index, stride_kl, False, None)
    PART: tl.constexpr = BLOCK_N // SUBTILES
    # A column part at a time: the epilogue of a whole tile would not fit the registers.
    if SUBTILES == 8:
        pieces = eighths(acc, BLOCK_M, BLOCK_N)
    elif SUBTILES == 4:
        pieces = quarters(acc, BLOCK_M, BLOCK_N)
    elif SUBTILES == 2:
        pieces = halves(acc, BLOCK_M, BLOCK_N)
    else:
        pieces = (acc,)
    for part in tl.static_range(SUBTILES):
        _step(
            w, g, f, s, c, pieces[part], rate, rest1, rest2, small, decay, key,
            count, row, column + part * PART, m, n, stride_wm, stride_wn, stride_gm, stride_gn,
            stride_mm, stride_mn, stride_sm, stride_sn, stride_km, stride_kn,
            GRADIENT, COPY, STOCHASTIC, NEAR, VECTOR, BLOCK_M, PART,
        )  # fmt: skip

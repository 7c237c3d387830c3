# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device code that the kernels share: tile maps, 64-bit offsets, products, rounding."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads TRITON_INTERPRET when it decorates a kernel, so this holds for the whole process.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def offsets(rows, columns, stride_row, stride_column):
    """Element offsets of a tile, in int64: a matrix may have more than 2**31 elements."""
    down = rows.to(tl.int64)[:, None] * stride_row
    return down + columns.to(tl.int64)[None, :] * stride_column


@triton.jit
def corner(X, row, column, stride_row, stride_column):
    """Address of a tile's first element, in int64 as in `offsets`."""
    return X + (row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column)


@triton.jit
def within(
    stride_row, stride_column,
    NEAR: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Offsets from a tile's first element; NEAR says that they fit int32, in half the registers.

    VECTOR consecutive elements go to one thread. Where it is the same for tensors of different
    dtypes, the compiler lays them out alike and moves nothing between threads.
    """
    rows = tl.arange(0, BLOCK_M)
    columns = tl.max_contiguous(tl.arange(0, BLOCK_N), VECTOR)
    if not NEAR:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return rows[:, None] * stride_row + columns[None, :] * stride_column


@triton.jit
def inside(rows, columns, m, n):
    """Which elements of a tile lie in an `m x n` matrix."""
    return (rows < m)[:, None] & (columns < n)[None, :]


@triton.jit
def load_tile(X, rows, columns, m, n, stride_row, stride_column):
    """A tile of an `m x n` matrix, zero beyond its edges."""
    at = X + offsets(rows, columns, stride_row, stride_column)
    return tl.load(at, mask=inside(rows, columns, m, n), other=0.0)


@triton.jit
def matrix(X, index, stride, TABLE: tl.constexpr, DTYPE: tl.constexpr):
    """Address of matrix `index`: of a batch by its stride, or from a table of int64 addresses."""
    if TABLE:
        address = tl.load(X + index).to(tl.pointer_type(DTYPE))
        # An address from memory has no known alignment, and without it every load is scalar;
        # the launcher puts only aligned tensors into a table.
        return tl.multiple_of(address, 16)
    else:
        return X + tl.cast(index, tl.int64) * stride


@triton.jit
def tile_of(index, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile; GROUP_M rows of tiles are visited together, for L2."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first = index // per_group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    within = index % per_group
    return first + within % height, within // height


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a b` in float32."""
    if _UPCAST:
        # The interpreter would multiply the bit patterns of bfloat16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def split_dot(a, wide, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + a wide` for float32 `wide`: rounded to the dtype of `a`, or as two such parts."""
    high = wide.to(a.dtype)
    acc = dot(a, high, acc, PRECISION)
    if EXACT:
        low = (wide - high.to(tl.float32)).to(a.dtype)
        acc = dot(a, low, acc, PRECISION)
    return acc


@triton.jit
def accumulate(
    acc, A, B, rows, columns, m, n, k,
    stride_am, stride_ak, stride_bn, stride_bk,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc + A[rows] B[columns]ᵀ` for `A` `(m, k)` and `B` `(n, k)`."""
    inner = tl.arange(0, BLOCK_K)
    a_at = A + offsets(rows, inner, stride_am, stride_ak)
    b_at = B + offsets(inner, columns, stride_bk, stride_bn)
    a_step = tl.full((), BLOCK_K, tl.int64) * stride_ak
    b_step = tl.full((), BLOCK_K, tl.int64) * stride_bk
    for start in range(0, k, BLOCK_K):
        left = k - start
        a = tl.load(a_at, mask=inside(rows, inner, m, left), other=0.0)
        b = tl.load(b_at, mask=inside(inner, columns, left, n), other=0.0)
        acc = dot(a, b, acc, PRECISION)
        a_at += a_step
        b_at += b_step
    return acc


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """Left and right half of the columns of `x` `(M, N)`."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def quarters(x, M: tl.constexpr, N: tl.constexpr):
    """Four parts of the columns of `x` `(M, N)`, from left to right."""
    left, right = halves(x, M, N)
    a, b = halves(left, M, N // 2)
    c, d = halves(right, M, N // 2)
    return a, b, c, d


@triton.jit
def eighths(x, M: tl.constexpr, N: tl.constexpr):
    """Eight parts of the columns of `x` `(M, N)`, from left to right."""
    left, right = halves(x, M, N)
    a, b, c, d = quarters(left, M, N // 2)
    e, f, g, h = quarters(right, M, N // 2)
    return a, b, c, d, e, f, g, h


@triton.jit
def scalar(x):
    """A float32 scalar that was passed as a number or as a 0-d tensor."""
    if x.dtype.is_ptr():
        return tl.load(x).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def integer(x):
    """As `scalar`, for int64."""
    if x.dtype.is_ptr():
        return tl.load(x).to(tl.int64)
    else:
        return x.to(tl.int64)


@triton.jit
def random_bits(row, column, n, seed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """16 random bits for each element of the tile at `row`, `column` (a multiple of 8).

    The generator and its layout are those of `sculpt_kernels.rounding`: one Philox call for eight
    consecutive elements of a row, rows counted through the batch.
    """
    groups = (n + 7) // 8
    rows = row + tl.arange(0, BLOCK_M)
    counter = offsets(rows, column // 8 + tl.arange(0, BLOCK_N // 8), groups, 1)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    # Lane = 4 * (word // 2) + 2 * (word % 2) + half: joined from the inside out, then reordered.
    first = tl.join(tl.join(w0 & 0xFFFF, w0 >> 16), tl.join(w1 & 0xFFFF, w1 >> 16))
    second = tl.join(tl.join(w2 & 0xFFFF, w2 >> 16), tl.join(w3 & 0xFFFF, w3 >> 16))
    lanes = tl.permute(tl.join(first, second), (0, 1, 4, 3, 2))
    return tl.reshape(lanes, (BLOCK_M, BLOCK_N)).to(tl.int32)


@triton.jit
def stochastic(x, bits, DTYPE: tl.constexpr):
    """Float32 `x` on the grid of `DTYPE`, up or down by 16 random bits; still float32."""
    raw = x.to(tl.int32, bitcast=True)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        rounded = (raw + bits) & -65536
    else:
        rounded = (raw + (bits >> 3)) & -8192
        # Below 2**-14 float16 has a fixed spacing of 2**-24; every step here is exact.
        steps = tl.abs(x) * 16777216.0
        down = tl.floor(steps)
        up = ((steps - down) * 65536.0 > bits.to(tl.float32)).to(tl.float32)
        subnormal = ((down + up) * 5.9604644775390625e-08).to(tl.int32, bitcast=True)
        signed = subnormal | (raw & -2147483648)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, signed, rounded)
    finite = (raw & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, raw).to(tl.float32, bitcast=True)


@triton.jit
def store_rounded(
    at, x, mask, row, column, n, seed,
    STOCHASTIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store float32 `x` in the dtype of `at`, rounded to nearest or stochastically."""
    dtype: tl.constexpr = at.dtype.element_ty
    if STOCHASTIC:
        # The low bits are cut already, so the cast below is exact.
        x = stochastic(x, random_bits(row, column, n, seed, BLOCK_M, BLOCK_N), dtype)
    tl.store(at, x.to(dtype), mask=mask)

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The last pass of every operation: a low-rank product added to a matrix and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.common import (
    accumulate,
    halves,
    inside,
    integer,
    matrix,
    offsets,
    scalar,
    store_rounded,
    tile_of,
)


@triton.jit
def _finish(
    X, S, acc, alpha, seed, index, row, column, m, n,
    stride_xm, stride_xn, stride_sm, stride_sn,
    SOURCE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    mask = inside(rows, columns, m, n)
    total = acc * alpha  # [BLOCK_M, BLOCK_N]
    if SOURCE:
        source = tl.load(S + offsets(rows, columns, stride_sm, stride_sn), mask=mask, other=0.0)
        total += source.to(tl.float32)
    at = X + offsets(rows, columns, stride_xm, stride_xn)
    first = index.to(tl.int64) * m + row
    store_rounded(at, total, mask, first, column, n, seed, STOCHASTIC, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["seed", "first_matrix"])
def update_kernel(
    X, S,  # [L, m, n]
    A, B,  # [L, m, k], [L, n, k]
    A2, B2,  # [L, m, k2], [L, n, k2]
    alpha, seed, first_matrix,
    m, n, k, k2,
    stride_xl, stride_xm, stride_xn,
    stride_sl, stride_sm, stride_sn,
    stride_al, stride_am, stride_ak,
    stride_bl, stride_bn, stride_bk,
    stride_a2l, stride_a2m, stride_a2k,
    stride_b2l, stride_b2n, stride_b2k,
    SOURCE: tl.constexpr, SEGMENTS: tl.constexpr, STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    TABLE: tl.constexpr, TABLE_A: tl.constexpr, TABLE_B: tl.constexpr,
    X_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, B_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """`X <- round(S + alpha (A Bᵀ + A2 B2ᵀ))`, each program one tile of one matrix.

    With TABLE, X and S are tables of addresses of matrices that lie anywhere, and seeds an array;
    TABLE_A and TABLE_B say the same of the factors, which have the dtype B_DTYPE.
    Bytes: `m n` of X, and of S where there is one, and the factors, which stay in L2.
    FLOPs: `2 m n (k + k2)`.
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
        a = matrix(A, index, stride_al, TABLE_A, B_DTYPE)
        b = matrix(B, index, stride_bl, TABLE_B, B_DTYPE)
        acc = accumulate(
            acc, a, b, rows, columns, m, n, k,
            stride_am, stride_ak, stride_bn, stride_bk, PRECISION, BLOCK_K,
        )  # fmt: skip
    if SEGMENTS == 2:
        a = matrix(A2, index, stride_a2l, TABLE_A, B_DTYPE)
        b = matrix(B2, index, stride_b2l, TABLE_B, B_DTYPE)
        acc = accumulate(
            acc, a, b, rows, columns, m, n, k2,
            stride_a2m, stride_a2k, stride_b2n, stride_b2k, PRECISION, BLOCK_K,
        )  # fmt: skip
    x = matrix(X, index, stride_xl, TABLE, X_DTYPE)
    s = x
    if SOURCE:
        s = matrix(S, index, stride_sl, TABLE, S_DTYPE)
    factor = scalar(alpha)
    if TABLE:
        # Every matrix has a seed of its own, and counts its rows from 0.
        key = 0
        if STOCHASTIC:
            key = tl.load(seed + index)
        count = index * 0
    else:
        key = integer(seed)
        count = first_matrix + index
    # Written out: a loop over parts would need them to be indexable.
    if SUBTILES == 1:
        _finish(
            x, s, acc, factor, key, count, row, column, m, n,
            stride_xm, stride_xn, stride_sm, stride_sn, SOURCE, STOCHASTIC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        tl.static_assert(SUBTILES == 2)
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        _finish(
            x, s, left, factor, key, count, row, column, m, n,
            stride_xm, stride_xn, stride_sm, stride_sn, SOURCE, STOCHASTIC, BLOCK_M, HALF,
        )  # fmt: skip
        _finish(
            x, s, right, factor, key, count, row, column + HALF, m, n,
            stride_xm, stride_xn, stride_sm, stride_sn, SOURCE, STOCHASTIC, BLOCK_M, HALF,
        )  # fmt: skip


def update_(
    X: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    A2: Tensor | None = None,
    B2: Tensor | None = None,
    base: Tensor | None = None,
    keep: bool = True,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
) -> Tensor:
    """`X <- round(X + alpha (A Bᵀ + A2 B2ᵀ))` in one pass; returns `X`.

    Accumulates in float32 and rounds once. Two pairs of factors make a rank-2r update without
    concatenating them.

    Args:
        X: `(..., m, n)`, float32, bfloat16 or float16, any strides; written in place.
        A, A2: `(..., m, k)`, `(..., m, k2)`; B, B2: `(..., n, k)`, `(..., n, k2)`; one dtype,
            that of `X` or another; two-dimensional to share over a batch; any strides.
        base: `(..., m, n)`: start from these values; `keep=False`: from zero.
        rounding, seed: as for `expand_add_`.
    """
    if X.numel() == 0:
        return X
    source = X if base is None else base
    second = (A, B) if A2 is None or B2 is None else (A2, B2)
    for first, views in launcher.batches(X, source, A, B, *second):
        _launch(
            dict(zip(("x", "s", "a", "b", "a2", "b2"), views, strict=True)),
            len(views[0]),
            alpha=launcher.number(alpha, X.device),
            seed=launcher.whole(0 if seed is None else seed, X.device),
            first_matrix=first,
            SOURCE=keep or base is not None,
            SEGMENTS=0 if not A.shape[-1] else 1 if A2 is None else 2,
            STOCHASTIC=rounding == "stochastic",
        )
    return X


def update_many_(
    Xs: Sequence[Tensor],
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    *,
    alpha: float | Tensor,
    A2: Tensor | Sequence[Tensor] | None = None,
    B2: Tensor | Sequence[Tensor] | None = None,
    bases: Sequence[Tensor] | None = None,
    rounding: str = "nearest",
    seeds: Tensor | None = None,
) -> None:
    """`update_` of many matrices of one layout in one launch, each where it lies.

    Args:
        Xs: `(m, n)` each, of one dtype and one set of strides, aligned to 16 bytes.
        A, A2: one `(count, m, k)` tensor, or `(m, k)` each; B, B2: likewise with `n`. Lists have
            one set of strides and are aligned to 16 bytes.
        bases: as `Xs`, or `None` for `Xs` themselves.
        seeds: `(count,)`, int64, on the device, for `"stochastic"`.
    """
    device = Xs[0].device
    second = (A, B) if A2 is None or B2 is None else (A2, B2)
    values = (Xs, Xs if bases is None else bases, A, B, *second)
    listed = [X if isinstance(X, Tensor) else launcher.Listed.of(X) for X in values]
    columns = A.shape[-1] if isinstance(A, Tensor) else A[0].shape[-1]
    _launch(
        dict(zip(("x", "s", "a", "b", "a2", "b2"), listed, strict=True)),
        len(Xs),
        alpha=launcher.number(alpha, device),
        seed=launcher.whole(0, device) if seeds is None else seeds,
        first_matrix=0,
        SOURCE=True,
        SEGMENTS=0 if not columns else 1 if A2 is None else 2,
        STOCHASTIC=rounding == "stochastic",
    )


def _launch(operands: dict[str, Any], count: int, **arguments: Any) -> None:
    """Launch the kernel on `count` matrices; operands are tensors `(count, ...)` or `Listed`."""
    tables = {k: isinstance(X, launcher.Listed) for k, X in operands.items()}
    layouts = {k: X.first if tables[k] else X for k, X in operands.items()}
    x, a, b = layouts["x"], layouts["a"], layouts["b"]
    config = launcher.choose("update", a.dtype, x.device)
    launcher.launch(
        update_kernel,
        count * launcher.tile_count(config, x[:1]),
        config,
        x.device,
        m=x.shape[1],
        n=x.shape[2],
        k=a.shape[2],
        k2=layouts["a2"].shape[2],
        **launcher.operands(update_kernel, **operands),
        **arguments,
        PRECISION=launcher.input_precision(a.dtype),
        TABLE=tables["x"],
        TABLE_A=tables["a"],
        TABLE_B=tables["b"],
        X_DTYPE=launcher.TRITON_DTYPES[x.dtype],
        S_DTYPE=launcher.TRITON_DTYPES[layouts["s"].dtype],
        B_DTYPE=launcher.TRITON_DTYPES[b.dtype],
    )

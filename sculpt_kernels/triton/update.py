# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The last pass of every operation: a low-rank product added to a matrix and rounded once."""

from __future__ import annotations

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
from sculpt_kernels.triton.tiles import TileConfig


@triton.jit
def _finish(
    X,
    S,
    acc,
    alpha,
    seed,
    index,
    row,
    column,
    m,
    n,
    stride_xm,
    stride_xn,
    stride_sm,
    stride_sn,
    SOURCE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    mask = inside(rows, columns, m, n)
    total = acc * alpha
    if SOURCE:
        source = tl.load(S + offsets(rows, columns, stride_sm, stride_sn), mask=mask, other=0.0)
        total += source.to(tl.float32)
    at = X + offsets(rows, columns, stride_xm, stride_xn)
    first = index.to(tl.int64) * m + row
    store_rounded(at, total, mask, first, column, n, seed, STOCHASTIC, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["seed", "first_matrix"])
def update_kernel(
    X,
    S,
    A,
    B,
    A2,
    B2,
    alpha,
    seed,
    first_matrix,
    m,
    n,
    k,
    k2,
    stride_xl,
    stride_xm,
    stride_xn,
    stride_sl,
    stride_sm,
    stride_sn,
    stride_al,
    stride_am,
    stride_ak,
    stride_bl,
    stride_bn,
    stride_bk,
    stride_a2l,
    stride_a2m,
    stride_a2k,
    stride_b2l,
    stride_b2n,
    stride_b2k,
    SOURCE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    TABLE: tl.constexpr,
    TABLE_A: tl.constexpr,
    TABLE_B: tl.constexpr,
    X_DTYPE: tl.constexpr,
    S_DTYPE: tl.constexpr,
    B_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """`X <- round(S + alpha (A Bᵀ + A2 B2ᵀ))`, each program one tile of one matrix.

    Shapes: X, S `(L, m, n)`; A `(L, m, k)`, B `(L, n, k)`; A2 `(L, m, k2)`, B2 `(L, n, k2)`.
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


def supports(X: Tensor, A: Tensor, B: Tensor, base: Tensor | None = None) -> str | None:
    """`None` if `update_` can run on these, else the reason."""
    if A.dtype != B.dtype:
        return f"the factors must have one dtype; got {A.dtype} and {B.dtype}"
    return launcher.unsupported(X, A, B, base)


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
    config: TileConfig | None = None,
) -> Tensor:
    """`X <- round(X + alpha (A Bᵀ + A2 B2ᵀ))` in one pass; returns `X`.

    Accumulates in float32 and rounds once. Two pairs of factors make a rank-2r update without
    concatenating them.

    Args:
        X: `(..., m, n)`, float32, bfloat16 or float16, any strides; written in place.
        A, A2: `(..., m, k)`, `(..., m, k2)`; B, B2: `(..., n, k)`, `(..., n, k2)`; one dtype,
            that of `X` or another; two-dimensional to share over a batch; any strides.
        alpha: a number or a 0-d tensor on the device of `X`.
        base: `(..., m, n)`: start from these values, not from `X`.
        keep: `False` starts from zero, neither reading `X` nor a base.
        rounding: `"nearest"`, or `"stochastic"` for 16-bit `X`, with `seed`, an int or a 0-d int64
            tensor; the bits are those of `sculpt_kernels.rounding`.
        config: tile configuration, instead of the table's.

    Bytes: `2 m n` elements of `X` (with `base` one read of it and one write), and the factors.
    FLOPs: `2 m n (k + k2)`.
    """
    if X.numel() == 0:
        return X
    source = X if base is None else base
    config = launcher.choose("update", A.dtype, X.device, config)
    segments = 2 if A2 is not None and A2.shape[-1] else 1 if A.shape[-1] else 0
    if segments == 2 and not A.shape[-1]:
        assert A2 is not None
        A, B, A2, B2, segments = A2, B2, None, None, 1  # type: ignore[assignment]
    if segments < 2:
        A2, B2 = A, B
    for first, operands in launcher.batches(X, source, A, B, A2, B2):
        launch(
            dict(zip(OPERANDS, operands, strict=True)),
            len(operands[0]),
            config,
            alpha=launcher.number(alpha, X.device),
            seed=launcher.whole(0 if seed is None else seed, X.device),
            first_matrix=first,
            SOURCE=keep or base is not None,
            SEGMENTS=segments,
            STOCHASTIC=rounding == "stochastic",
        )
    return X


OPERANDS = ("x", "s", "a", "b", "a2", "b2")


def launch(operands: dict[str, Any], count: int, config: TileConfig, **arguments: Any) -> None:
    """Launch the kernel on `count` matrices; operands are tensors `(count, ...)` or `Listed`."""
    layouts = {k: X.first if isinstance(X, launcher.Listed) else X for k, X in operands.items()}
    x, a, b = layouts["x"], layouts["a"], layouts["b"]
    _, m, n = x.shape
    axes = {"x": "lmn", "s": "lmn", "a": "lmk", "b": "lnk", "a2": "lmk", "b2": "lnk"}
    for name in OPERANDS:
        arguments |= strides(name, axes[name], layouts[name])
        value = operands[name]
        arguments[name.upper()] = value.addresses if isinstance(value, launcher.Listed) else value
    launcher.launch(
        update_kernel,
        count * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        config,
        x.device,
        m=m,
        n=n,
        k=a.shape[2],
        k2=layouts["a2"].shape[2],
        **arguments,
        PRECISION=launcher.input_precision(a.dtype),
        TABLE=isinstance(operands["x"], launcher.Listed),
        TABLE_A=isinstance(operands["a"], launcher.Listed),
        TABLE_B=isinstance(operands["b"], launcher.Listed),
        X_DTYPE=launcher.triton_dtype(x.dtype),
        S_DTYPE=launcher.triton_dtype(layouts["s"].dtype),
        B_DTYPE=launcher.triton_dtype(b.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        SUBTILES=config.subtiles,
    )


def strides(name: str, axes: str, X: Tensor) -> dict[str, int]:
    """Kernel arguments `stride_<name><axis>`; the stride of a single matrix is 0."""
    values = (X.stride(0) if X.shape[0] > 1 else 0, *X.stride()[1:])
    return {f"stride_{name}{axis}": value for axis, value in zip(axes, values, strict=True)}


def factors(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`A, B, A2, B2` with `P(G) = G - A Bᵀ - A2 B2ᵀ`: plain matrix products, by the library.

    The long side of `G` is contracted first. `strict` reads `G` twice and needs no third product
    with it: `P(G) = G - U (UᵀG) - (GV - U UᵀGV) Vᵀ`.
    """
    if form in ("core", "strict"):
        assert U is not None
        assert V is not None
        if not U.shape[-1]:
            return (U, _none(V), None, None) if form == "core" else factors(G, None, V, "right")
        if not V.shape[-1]:
            return (_none(U), V, None, None) if form == "core" else factors(G, U, None, "left")
    if form == "left":
        assert U is not None
        return U, G.mT @ U, None, None
    if form == "right":
        assert V is not None
        return G @ V, V, None, None
    assert U is not None
    assert V is not None
    if form == "core":
        if G.shape[-2] <= G.shape[-1]:
            return U @ (U.mT @ (G @ V)), V, None, None
        return U, V @ (V.mT @ (G.mT @ U)), None, None
    right = G @ V
    return U, G.mT @ U, right - U @ (U.mT @ right), V


def _none(B: Tensor) -> Tensor:
    return B[..., :0]


def project_large_(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    *,
    config: TileConfig | None = None,
) -> Tensor:
    """The projections at any rank, in place: `factors` by the library, then one fused pass.

    Args: `G` `(..., m, n)`, `U` `(..., m, r)`, `V` `(..., n, s)` of one dtype; `None` where the
    form has no such side.

    Bytes: three passes over `G` for the one-sided forms and `core`, four for `strict`.
    FLOPs, for `r = s`: `4 r m n + 4 r² min(m, n)` for `core`, `8 r m n + 4 r² m` for `strict`.
    """
    if G.numel() == 0:
        return G
    A, B, A2, B2 = factors(G, U, V, form)
    return update_(G, A, B, A2=A2, B2=B2, alpha=-1.0, config=config)

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""What the kernels share: tile maps, 64-bit offsets, products, rounding, and the way to launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sculpt_kernels.kernels import config as configs
from sculpt_kernels.kernels.config import TileConfig

# Triton reads TRITON_INTERPRET when it decorates a kernel, so this holds for the whole process.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_UPCAST = tl.constexpr(INTERPRETED)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ---- device code


@triton.jit
def offsets(rows, columns, stride_row, stride_column):
    """Element offsets of a tile, in int64: a matrix may have more than 2**31 elements."""
    down = rows.to(tl.int64)[:, None] * stride_row
    return down + columns.to(tl.int64)[None, :] * stride_column


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
    acc,
    A,
    B,
    rows,
    columns,
    m,
    n,
    k,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
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
def scalar(x):
    """A float32 scalar that was passed as a number or as a 0-d tensor."""
    x = tl.to_tensor(x)
    if x.dtype.is_ptr():
        return tl.load(x).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def integer(x):
    """As `scalar`, for int64."""
    x = tl.to_tensor(x)
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
    at,
    x,
    mask,
    row,
    column,
    n,
    seed,
    STOCHASTIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store float32 `x` in the dtype of `at`, rounded to nearest or stochastically."""
    dtype: tl.constexpr = at.dtype.element_ty
    if STOCHASTIC:
        # The low bits are cut already, so the cast below is exact.
        x = stochastic(x, random_bits(row, column, n, seed, BLOCK_M, BLOCK_N), dtype)
    tl.store(at, x.to(dtype), mask=mask)


# ---- launching


@dataclass(frozen=True)
class Launch:
    """One launch, as a launcher asked for it."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]


_recorded: list[Launch] | None = None


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; offline compilation sees what a device would."""
    global _recorded
    _recorded, launches = [], _recorded
    try:
        yield _recorded
    finally:
        _recorded = launches


def launch(
    kernel: Any, programs: int, config: TileConfig, device: torch.device, **arguments: Any
) -> None:
    """Run `programs` programs of `kernel` on `device`."""
    if programs == 0:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, arguments, config.options()))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments, **config.options())


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no kernel can run on these tensors: their device or dtype; `None` if one can."""
    for X in tensors:
        if X is None:
            continue
        if X.dtype not in DTYPES:
            return f"the Triton kernels have no {str(X.dtype).removeprefix('torch.')}"
        if X.device.type == "cuda":
            if capability(X.device) < (8, 0):
                return "the Triton kernels need compute capability 8.0 or newer"
        elif not INTERPRETED:
            return f"the Triton kernels run on CUDA devices; the tensors are on {X.device}"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of the target while launches are recorded or interpreted."""
    if device.type == "cuda":
        return _device_capability(device.index or 0)
    return target_capability


target_capability = (9, 0)


@lru_cache
def _device_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def input_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as `torch.set_float32_matmul_precision` says."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def choose(
    kernel: str, dtype: torch.dtype, device: torch.device, config: TileConfig | None
) -> TileConfig:
    return configs.choose(kernel, dtype, capability(device)) if config is None else config


def triton_dtype(dtype: torch.dtype) -> Any:
    return _TRITON_DTYPES[dtype]


def number(x: float | Tensor, device: torch.device) -> float | Tensor:
    """A scalar as a kernel takes it: a 0-d tensor on its device stays there, without a wait."""
    if isinstance(x, Tensor):
        return x if x.device == device else float(x)
    return float(x)


def seed_argument(seed: int | Tensor | None, device: torch.device) -> int | Tensor:
    """The 64-bit key as a signed integer, or as the 0-d tensor it is."""
    if isinstance(seed, Tensor):
        return seed if seed.device == device else int(seed)
    return ((seed or 0) + 2**63) % 2**64 - 2**63


def batches(X: Tensor, *others: Tensor | None) -> Iterator[tuple[int, list[Any]]]:
    """Three-dimensional views of `X` and of what goes with it, without a copy.

    Yields the index of the first matrix and the views. One group, unless the batch dimensions of
    an operand do not merge into one stride. Two-dimensional operands are shared by stride 0.
    """
    yield from _batches(X, others, 0)


def _batches(X: Tensor, others: tuple[Tensor | None, ...], first: int) -> Iterator[Any]:
    views = [_three(X, X), *(None if Y is None else _three(Y, X) for Y in others)]
    if all(view is not None or Y is None for view, Y in zip(views, (X, *others), strict=True)):
        yield first, views
        return
    below = X[0].numel() // max(1, X.shape[-1] * X.shape[-2])
    for index in range(X.shape[0]):
        inner = tuple(Y if Y is None or Y.ndim == 2 else Y[index] for Y in others)
        yield from _batches(X[index], inner, first + index * below)


def _three(Y: Tensor, X: Tensor) -> Tensor | None:
    count = X.shape[:-2].numel()
    if Y.ndim == 2:
        return Y.expand(count, *Y.shape)
    try:
        return Y.view(count, *Y.shape[-2:])
    except RuntimeError:
        return None

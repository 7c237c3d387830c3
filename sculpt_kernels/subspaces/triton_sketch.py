# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The random test matrix of `sculpt_kernels.subspaces.sketch`, bit for bit, in one launch.

It takes microseconds, against some 170 launches of elementwise torch operations on int64. It is not
fused into the product with it: every row of tiles would draw the whole matrix again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.common import inside, integer, offsets


@triton.jit
def _set_bits(x):
    """Number of ones of a uint32, by sums over pairs, nibbles and bytes."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["seed", "first_row"])
def sketch_kernel(
    X, seed, first_row, n, columns, stride_xn, stride_xc,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`X[i, j] <- ones in word j mod 4 of Philox(first_row + i, j // 4) - 16`.

    Shapes: X `(n, columns)`. Bytes: one write of X. One generator call for four elements.
    """
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    column = tl.program_id(0) % tiles_n * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    counter = integer(first_row) + offsets(rows, tl.arange(0, BLOCK_N // 4), 1, 0)
    group = column // 4 + tl.arange(0, BLOCK_N // 4)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    index = zero + group[None, :].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(integer(seed), low, high, index, zero)
    # Joined so that, flattened, the words come in order.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    values = _set_bits(tl.reshape(words, (BLOCK_M, BLOCK_N))) - 16
    at_columns = column + tl.arange(0, BLOCK_N)
    at = X + offsets(rows, at_columns, stride_xn, stride_xc)
    mask = inside(rows, at_columns, n, columns)
    tl.store(at, values.to(tl.float32).to(X.dtype.element_ty), mask=mask)


def sketch(out: Tensor, seed: int, row0: int) -> Tensor:
    """Fill `out` `(n, columns)`, any floating dtype and strides, with rows `row0 ...` of `seed`.

    Every value is an integer of at most 16 in magnitude, exact in every dtype.
    """
    n, columns = out.shape
    config = launcher.choose("sketch", out.dtype, out.device)
    launcher.launch(
        sketch_kernel,
        launcher.tile_count(config, out[None]),
        config,
        out.device,
        X=out,
        seed=launcher.whole(seed, out.device),
        first_row=launcher.whole(row0, out.device),
        n=n,
        columns=columns,
        stride_xn=out.stride(0),
        stride_xc=out.stride(1),
    )
    return out

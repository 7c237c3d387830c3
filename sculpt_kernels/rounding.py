"""Stochastic rounding to bfloat16 and float16 with a counter-based generator.

The random bits of an element depend on the seed and on the element's position alone, never on tile
sizes, threads or devices, so every backend that offers stochastic rounding gives the same bits.

Generator: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC'11). One call serves eight consecutive elements of a row: the counter is
`row * ceil(n / 8) + column // 8` (64 bits, low word first), the key is the 64-bit seed, and lane
`column % 8` takes the low or high half of word `lane // 2`. Rows count through the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels import checks, native

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
LANES = 8


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten Philox rounds on 32-bit words held in int64 tensors; returns four words likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps both 32-bit halves exact.
        p0, p1 = c0 * _ROUND[0], c2 * _ROUND[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(
    rows: int,
    columns: int,
    seed: int | Tensor,
    row0: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """16 random bits for each element of `rows` rows from `row0` on, int32."""
    groups = -(-columns // LANES)
    row = torch.arange(row0, row0 + rows, device=device)
    index = row[:, None] * groups + torch.arange(groups, device=device)
    zero = torch.zeros_like(index)
    words = philox4x32(
        (index & _MASK, (index >> 32) & _MASK, zero, zero), (seed & _MASK, (seed >> 32) & _MASK)
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).to(torch.int32).view(rows, -1)[:, :columns]


def store(
    out: Tensor, x: Tensor, seed: int | Tensor | None, row0: int = 0, backend: str = "torch"
) -> None:
    """Write `x` into `out`, rounded to nearest, or stochastically where there is a seed.

    Row 0 of both is row `row0` of the matrix, or the batch, that they are part of. `backend` is
    `"native"` or `"torch"`, which give the same bits.
    """
    if seed is None:
        out.copy_(x)
    elif backend == "native":
        native.round_(out, x, seed, row0)
    else:
        out.copy_(stochastic_round(x, out.dtype, seed, row0))


def stochastic_round(x: Tensor, dtype: torch.dtype, seed: int | Tensor, row0: int = 0) -> Tensor:
    """Round float32 `x` `(rows, n)` to bfloat16 or float16, up or down at random, unbiased.

    The probability of rounding away from zero is the distance to the neighbour towards zero in
    units of the spacing, to 16 bits (13 bits for float16 normals). NaN and infinities stay.
    `row0` is the row of the matrix that `x` starts at, so that panels give the bits of the whole.
    """
    if dtype not in checks.LOW_PRECISION:
        raise TypeError(
            "rounding='stochastic' is for bfloat16 and float16; "
            f"got {checks.dtype_name(dtype)}, which needs none"
        )
    bits = random_bits(x.shape[0], x.shape[1], seed, row0, x.device)
    x = x.float()
    raw = x.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = _add_below(raw, bits, 16)
    else:
        rounded = _add_below(raw, bits >> 3, 13)
        # Below 2**-14 float16 has a fixed spacing of 2**-24; every step here is exact.
        steps = x.abs() * 2.0**24
        down = steps.floor()
        up = (steps - down) * 2.0**16 > bits.to(torch.float32)
        subnormal = torch.copysign((down + up) * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, subnormal.view(torch.int32), rounded)
    kept = torch.where(torch.isfinite(x), rounded, raw)
    return kept.view(torch.float32).to(dtype)


def _add_below(raw: Tensor, bits: Tensor, width: int) -> Tensor:
    """Add random bits below the kept mantissa and cut: magnitude up with the right probability."""
    return (raw + bits) & -(1 << width)

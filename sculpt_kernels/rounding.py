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

from sculpt_kernels import checks

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


def random_bits(rows: int, n: int, seed: int | Tensor, *, row0: int = 0, device: object) -> Tensor:
    """16 random bits for each element of rows `row0 .. row0 + rows`, int32 `(rows, n)`."""
    groups = -(-n // LANES)
    index = torch.arange(row0 * groups, (row0 + rows) * groups, device=device)  # type: ignore[call-overload]
    zero = torch.zeros_like(index)
    words = philox4x32(
        (index & _MASK, (index >> 32) & _MASK, zero, zero), (seed & _MASK, (seed >> 32) & _MASK)
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, dim=-1).to(torch.int32)
    return bits.view(rows, groups * LANES)[:, :n]


def stochastic_round(x: Tensor, dtype: torch.dtype, seed: int | Tensor, *, row0: int = 0) -> Tensor:
    """Round float32 `x` `(rows, n)` to bfloat16 or float16, up or down at random, unbiased.

    The probability of rounding away from zero is the distance to the neighbour towards zero in
    units of the spacing, to 16 bits (13 bits for float16 normals). NaN and infinities stay.
    `row0` is the index of the first row, so that panels give the bits of the whole.
    """
    bits = random_bits(x.shape[0], x.shape[1], seed, row0=row0, device=x.device)
    raw = x.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = _add_below(raw, bits, 16)
    elif dtype == torch.float16:
        rounded = _add_below(raw, bits >> 3, 13)
        # Below 2**-14 float16 has a fixed spacing of 2**-24; every step here is exact.
        steps = x.abs() * 2.0**24
        down = steps.floor()
        up = (steps - down) * 2.0**16 > bits.to(torch.float32)
        subnormal = torch.copysign((down + up) * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, subnormal.view(torch.int32), rounded)
    else:
        raise TypeError(
            "rounding='stochastic' is for bfloat16 and float16; "
            f"got {checks.dtype_name(dtype)}, which needs none"
        )
    kept = torch.where(torch.isfinite(x), rounded, raw)
    return kept.view(torch.float32).to(dtype)


def _add_below(raw: Tensor, bits: Tensor, width: int) -> Tensor:
    """Add random bits below the kept mantissa and cut: magnitude up with the right probability."""
    return (raw + bits) & -(1 << width)

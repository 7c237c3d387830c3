"""A random test matrix that is the same everywhere: CPU, GPU, whole or in shards.

Entry `(i, j)` depends on the seed and on its position alone: Philox word `j mod 4` of the counter
`(i, j // 4)`, its number of set bits minus 16. A sum of 32 fair bits is symmetric, has variance 8
and is as good as normal (excess kurtosis -1/16); and being a small integer it is exact in every
floating dtype, where the logarithms and cosines of a Gaussian generator differ between devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels import dispatch
from sculpt_kernels.rounding import philox4x32

DEFAULT_SEED = 0x5C01D7


def sketch(
    n: int, columns: int, seed: int, *, row0: int = 0, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Rows `row0 .. row0 + n` of the test matrix of `seed`, `(n, columns)`.

    A matrix with more columns starts with the columns of the narrower one.
    """
    if dispatch.choose("auto", device, lambda: None) == "triton":
        from sculpt_kernels.subspaces import triton_sketch

        out = torch.empty(n, columns, dtype=dtype, device=device)
        return triton_sketch.sketch(out, seed, row0)
    groups = -(-columns // 4)
    rows = torch.arange(row0, row0 + n, device=device)[:, None].expand(n, groups)
    group = torch.arange(groups, device=device)[None, :].expand(n, groups)
    zero = torch.zeros_like(group)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = philox4x32((rows & 0xFFFFFFFF, rows >> 32, group, zero), key)
    bits = _set_bits(torch.stack(words, dim=-1)).reshape(n, 4 * groups)[:, :columns]
    return (bits - 16).to(dtype)


def seed_from(generator: torch.Generator | None) -> int:
    """A 62-bit seed drawn from `generator`; a fixed one without it, so that results repeat."""
    if generator is None:
        return DEFAULT_SEED
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _set_bits(x: Tensor) -> Tensor:
    """Number of ones among the low 32 bits, by sums over pairs, nibbles and bytes."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF

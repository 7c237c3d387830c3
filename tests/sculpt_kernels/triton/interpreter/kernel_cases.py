"""Operands for the kernels, framed by NaN and in any layout; how far results may be off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sculpt_kernels.triton.tiles import TABLE, TileConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = ("core", "strict", "left", "right")
LAYOUTS = ("rows", "columns", "strided")

# Several small tiles in every direction, none of which divides the matrices of the tests.
TILE = TileConfig(32, 16, 16, warps=4, stages=2, group_m=2)
ROWS = TileConfig(16, 32, 16, warps=4, stages=2)


def use_tiles(monkeypatch: pytest.MonkeyPatch, **configs: TileConfig) -> None:
    """Let kernels run with these configurations instead of the table's."""
    for name, config in configs.items():
        for is_16_bit in (False, True):
            monkeypatch.setitem(TABLE, (name.replace("_", " "), is_16_bit), (config,))


# ‖error‖ / ‖result‖. The interpreter cuts bfloat16 where a device rounds to nearest, which doubles
# the error of each rounding to 2**-7.
BOUNDS = {torch.float32: 5e-7, torch.float16: 8e-4, torch.bfloat16: 8e-3}


def orthonormal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64)).Q.to(dtype)


class Framed:
    """A tensor inside a larger one that is NaN everywhere else.

    A read beyond an edge brings in NaN; a write beyond an edge leaves something else there.
    """

    def __init__(self, values: Tensor, layout: str = "rows") -> None:
        *batch, m, n = values.shape
        pad, step = 5, 2 if layout == "strided" else 1
        self.memory = torch.full((*batch, m + 2 * pad, step * n + 2 * pad), float("nan"))
        self.memory = self.memory.to(values.dtype)
        if layout == "columns":
            self.memory = self.memory.mT.contiguous().mT
        self.inside = (..., slice(pad, pad + m), slice(pad, pad + step * n, step))
        self.tensor = self.memory[self.inside]
        self.tensor.copy_(values)

    def check_frame(self) -> None:
        frame = torch.ones(self.memory.shape, dtype=torch.bool)
        frame[self.inside] = False
        assert self.memory[frame].isnan().all(), "the kernel wrote beyond the edges of its operand"
        assert not self.tensor.isnan().any(), "the kernel read beyond the edges of its operands"


def error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


def sides(form: str, U: Tensor, V: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (U if form != "right" else None), (V if form != "left" else None)

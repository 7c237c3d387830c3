"""The sketch kernel gives the bits of the torch backend, wherever it is cut."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LAYOUTS, Framed, use_tiles

from sculpt_kernels.subspaces.sketch import sketch as sketch_torch
from sculpt_kernels.subspaces.triton_sketch import sketch
from sculpt_kernels.triton.tiles import TileConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("row0", "seed"), [(0, 0), (7, 2**61 + 12345), (2**33 + 1, 99)])
def test_equals_the_torch_backend_bit_for_bit(dtype, layout, row0, seed, small_tiles):
    out = Framed(torch.zeros(45, 37).to(dtype), layout)
    sketch(out.tensor, seed, row0)
    assert torch.equal(out.tensor, sketch_torch(45, 37, seed, row0=row0, dtype=dtype, device=CPU))
    out.check_frame()


def test_tiles_do_not_matter_and_nothing_is_drawn_for_nothing(monkeypatch):
    whole = sketch(torch.empty(40, 100), 3, 0)
    for config in (TileConfig(16, 16, 16, 4, 1), TileConfig(64, 32, 16, 4, 1)):
        use_tiles(monkeypatch, sketch=config)
        assert torch.equal(sketch(torch.empty(40, 100), 3, 0), whole)
    for shape in ((0, 4), (4, 0)):
        sketch(torch.empty(shape), 1, 0)

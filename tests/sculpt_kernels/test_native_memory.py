"""Not a byte outside of the tensors: every operand lies against a page that may not be touched."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
import torch
from matrices import gaussian
from torch import Tensor

from sculpt_kernels import expand_add_, native
from sculpt_kernels.rounding import stochastic_round

pytestmark = pytest.mark.usefixtures("library")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(1, 1), (3, 7), (33, 65), (40, 530), (300, 17)]
NO_ACCESS = 0


class Fence:
    """Memory whose last (or first) byte lies against a page without access."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []
        self.libc = ctypes.CDLL(None, use_errno=True)

    def memory(self, size: int, at_end: bool, align: int) -> int:
        page = mmap.PAGESIZE
        pages = -(-max(size, 1) // page)
        mapped = mmap.mmap(-1, (pages + 2) * page)
        self.maps.append(mapped)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        for guard in (start, start + (pages + 1) * page):
            if self.libc.mprotect(ctypes.c_void_p(guard), page, NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")
        room = pages * page - size if at_end else 0
        return start + page + room // align * align

    def put(self, X: Tensor, at_end: bool) -> Tensor:
        """A contiguous copy of `X` against the fence."""
        size = X.numel() * X.element_size()
        if size == 0:
            return X.clone()
        address = self.memory(size, at_end, X.element_size())
        view = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=X.dtype)
        return view.view(X.shape).copy_(X)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_round(m: int, n: int, dtype: torch.dtype, at_end: bool) -> None:
    fence = Fence()
    x = gaussian(m, n, dtype=FP32)
    want = stochastic_round(x, dtype, 3)
    out = fence.put(torch.zeros_like(want), at_end)
    native.round_(out, fence.put(x, at_end), 3, 0)
    assert torch.equal(out, want)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_addresses_that_are_aligned_to_nothing(offset: int, library: native.Library) -> None:
    x, out = gaussian(5, 77, dtype=FP32), torch.empty(5, 77, dtype=BF16)
    buffer = bytearray(x.numel() * 4 + 8)
    raw = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    ctypes.memmove(ctypes.addressof(raw) + offset, x.data_ptr(), x.numel() * 4)
    moved = native.Matrix(ctypes.addressof(raw) + offset, 77, 1)
    library.round(native.Matrix.of(out), 1, moved, 5, 77, 0, 3)
    assert torch.equal(out, stochastic_round(x, BF16, 3))


def test_empty_matrices_are_left_alone() -> None:
    for m, n in ((0, 4), (4, 0), (0, 0)):
        W = torch.empty(m, n, dtype=BF16)
        U, V, C = torch.empty(m, 0), torch.empty(n, 0), torch.empty(0, 0)
        options: dict[str, Any] = {"rounding": "stochastic", "seed": 1, "backend": "native"}
        assert expand_add_(W, C, U, V, **options) is W

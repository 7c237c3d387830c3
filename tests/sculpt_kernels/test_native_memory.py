"""Not a byte outside of the tensors: every operand lies against a page that may not be touched."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
import torch
from matrices import FORMS, basis, gaussian, sides
from torch import Tensor

from sculpt_kernels import expand_add_, native, project_adamw_

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


@pytest.fixture
def fence(monkeypatch: pytest.MonkeyPatch) -> Fence:
    """The workspace is fenced too, to the size that was asked for."""
    made = Fence()
    original = native.Library.workspace

    def workspace(self: native.Library, products: native.Products) -> Any:
        original(self, products)
        products.workspace = made.memory(products.workspace_floats * 4, True, 64)

    monkeypatch.setattr(native.Library, "workspace", workspace)
    return made


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_expand_add(m: int, n: int, at_end: bool, fence: Fence, isa: str) -> None:
    r, s = min(3, m), min(2, n)
    for dtype, seed in ((FP32, None), (BF16, None), (BF16, 3), (FP16, 3)):
        W, base = gaussian(m, n, dtype=dtype), gaussian(m, n, dtype=dtype, seed=8)
        C, U, V = gaussian(r, s, dtype=FP32), basis(m, r, dtype=FP32), basis(n, s, dtype=FP32)
        options: dict[str, Any] = {"backend": "native"}
        if seed is not None:
            options |= {"rounding": "stochastic", "seed": seed}
        plain = expand_add_(W.clone(), C, U, V, base=base, **options)
        w, b, c, u, v = (fence.put(X, at_end) for X in (W, base, C, U, V))
        assert torch.equal(expand_add_(w, c, u, v, base=b, **options), plain)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_project_adamw(m: int, n: int, form: str, at_end: bool, fence: Fence) -> None:
    r, s = min(3, m), min(2, n)
    for low, project in ((FP32, "update"), (BF16, "gradient"), (FP16, "update")):
        U, V = sides(form, basis(m, r, dtype=FP32), basis(n, s, dtype=FP32))
        dtypes = (FP32, low, FP32, low, BF16)
        state = [gaussian(m, n, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
        state[3].square_()
        fenced = [fence.put(X, at_end) for X in state]
        bases = [None if B is None else fence.put(B, at_end) for B in (U, V)]
        for tensors, (u, v) in ((state, (U, V)), (fenced, bases)):
            W, G, exp_avg, exp_avg_sq, copy = tensors
            project_adamw_(
                W, G, exp_avg, exp_avg_sq, u, v, form=form, project=project, lr=1e-2, step=2,
                copy=copy, rounding="stochastic", seed=1, backend="native",
            )  # fmt: skip
        for got, want in zip(fenced, state, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_addresses_that_are_aligned_to_nothing(offset: int, library: native.Library) -> None:
    x = gaussian(5, 77, dtype=FP32)
    buffer = bytearray(x.numel() * 4 + 8)
    raw = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    out = native.Matrix(ctypes.addressof(raw) + offset, 77, 1, native.DTYPES[FP32])
    library.round(out, native.describe(x), 5, 77, native.Rounding())
    back = torch.empty_like(x)
    library.round(native.describe(back), out, 5, 77, native.Rounding())
    assert torch.equal(back, x)
    assert bytes(buffer[:offset]) == bytes(offset)
    assert bytes(buffer[offset + x.numel() * 4 :]) == bytes(8 - offset)


def test_empty_matrices_are_left_alone() -> None:
    for m, n in ((0, 4), (4, 0), (0, 0)):
        W = torch.empty(m, n, dtype=BF16)
        U, V, C = torch.empty(m, 0), torch.empty(n, 0), torch.empty(0, 0)
        assert expand_add_(W, C, U, V, backend="native") is W
        state = [torch.empty(m, n) for _ in range(4)]
        project_adamw_(*state, U, V, lr=1e-3, step=1, backend="native")

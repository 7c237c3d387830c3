"""The four projections, and the coordinates."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BOUNDS,
    DTYPES,
    FORMS,
    LAYOUTS,
    Framed,
    error,
    orthonormal,
    sides,
    use_tiles,
)
from torch import Tensor

from sculpt_kernels import reference
from sculpt_kernels.coordinates import triton_compress as compress
from sculpt_kernels.projection import triton as project
from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.tiles import TileConfig

pytestmark = pytest.mark.usefixtures("small_tiles")

LOW = (torch.float16, torch.bfloat16)


def truth(G: Tensor, U: Tensor, V: Tensor, form: str) -> Tensor:
    return reference.project(G.double(), U.double(), V.double(), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_layouts_and_dtypes(form: str, layout: str, dtype: torch.dtype) -> None:
    G = Framed(torch.randn(50, 41).to(dtype), layout)
    U = Framed(orthonormal(50, 5, dtype=dtype), layout)
    V = Framed(orthonormal(41, 9, dtype=dtype), layout)
    want = truth(G.tensor, U.tensor, V.tensor, form)
    left, right = sides(form, U.tensor, V.tensor)
    result = project.project_(G.tensor, left, right, form)
    assert result is G.tensor
    assert error(result, want) < BOUNDS[dtype]
    G.check_frame()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_batches(form: str, shared: bool) -> None:
    batch = () if shared else (2, 2)
    # A batch whose dimensions do not merge into one stride.
    G = torch.randn(2, 3, 20, 33)[:, :2]
    U, V = orthonormal(*batch, 20, 3, dtype=G.dtype), orthonormal(*batch, 33, 4, dtype=G.dtype)
    want = truth(G, U, V, form)
    project.project_(G, *sides(form, U, V), form)
    assert error(G, want) < BOUNDS[G.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("r", "s"), [(1, 1), (24, 24), (24, 31)])
def test_ranks_from_one_to_all(form: str, r: int, s: int, dtype: torch.dtype) -> None:
    G = torch.randn(24, 31).to(dtype)
    U, V = orthonormal(24, r, dtype=dtype), orthonormal(31, s, dtype=dtype)
    want, before = truth(G, U, V, form), G.double()
    project.project_(G, *sides(form, U, V), form)
    assert (G.double() - want).norm() < BOUNDS[dtype] * before.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (1, 1)])
def test_degenerate_shapes(form: str, shape: tuple[int, int]) -> None:
    m, n = shape
    G = torch.randn(m, n)
    U, V = orthonormal(m, min(m, 1), dtype=G.dtype), orthonormal(n, min(n, 1), dtype=G.dtype)
    project.project_(G, *sides(form, U, V), form)
    assert (G.abs() < 1e-6).all()


def test_parts_are_added_by_the_library_or_by_the_second_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    G = torch.randn(130, 24).half()
    U, V = orthonormal(130, 4, dtype=G.dtype), orthonormal(24, 5, dtype=G.dtype)
    want = truth(G, U, V, "core")
    for rows in (64, 16):  # few parts, many parts
        use_tiles(monkeypatch, reduce=TileConfig(rows, 16, 16, 4, 2))
        assert error(project.project_(G.clone(), U, V, "core"), want) < BOUNDS[G.dtype]


def test_columns_are_divided_where_rows_are_few() -> None:
    assert project.chunk_length(1, 4096, 4096, 64, 64) == 1024
    assert project.chunk_length(64, 4096, 4096, 64, 64) == 4096
    G = torch.randn(17, 2100).half()
    U, V = orthonormal(17, 4, dtype=G.dtype), orthonormal(2100, 5, dtype=G.dtype)
    want = truth(G, U, V, "core")
    project.project_(G, U, V, "core")
    assert error(G, want) < BOUNDS[G.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_many_matrices_where_they_lie(form: str, dtype: torch.dtype) -> None:
    memory = torch.full((6, 40, 64), float("nan")).to(dtype)
    # Two alike, one in another layout, one that is not aligned to 16 bytes.
    Gs = [memory[0, :20, :33], memory[2, :20, :33], memory[3].mT[:20, :33], memory[4, :20, 1:34]]
    for G in Gs:
        G.copy_(torch.randn(20, 33))
    Us = [orthonormal(20, 3, dtype=dtype).contiguous() for _ in Gs]
    Vs = [orthonormal(33, 4, dtype=dtype).contiguous() for _ in Gs]
    wants = [truth(*operands, form) for operands in zip(Gs, Us, Vs, strict=True)]
    triples = [(G, *sides(form, U, V)) for G, U, V in zip(Gs, Us, Vs, strict=True)]
    project.project_many_(triples, form)
    for G, want in zip(Gs, wants, strict=True):
        assert error(G, want) < BOUNDS[dtype]
    written = sum(G.numel() for G in Gs)
    assert int(memory.isnan().sum()) == memory.numel() - written


def test_tables_of_addresses_are_built_once() -> None:
    launcher._address_table.cache_clear()
    Gs = [torch.randn(16, 16) for _ in range(2)]
    B = [orthonormal(16, 2, dtype=torch.float32).contiguous() for _ in Gs]
    for _ in range(3):
        project.project_many_(list(zip(Gs, B, B, strict=True)), "core")
    assert launcher._address_table.cache_info().misses == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_coordinates(layout: str, dtype: torch.dtype) -> None:
    G = Framed(torch.randn(2, 50, 41).to(dtype), layout)
    U, V = orthonormal(2, 50, 5, dtype=dtype), orthonormal(41, 9, dtype=dtype)
    out = Framed(torch.zeros(2, 5, 9), layout)
    compress.compress(G.tensor, U, V, out.tensor)
    want = reference.compress(G.tensor.double(), U.double(), V.double())
    # Both parts of G V are kept: the cut bfloat16 parts leave 2**-14 together.
    assert error(out.tensor, want) < (5e-5 if dtype == torch.bfloat16 else 1e-6)
    out.check_frame()


def test_coordinates_of_nothing() -> None:
    out = torch.full((3, 4), float("nan"))
    compress.compress(torch.randn(3, 0), torch.eye(3), torch.randn(0, 4), out)
    assert (out == 0).all()
    assert (
        compress.compress(torch.randn(3, 5), torch.eye(3), torch.ones(5, 0), out[:, :0]).shape[1]
        == 0
    )

"""The four projections at small and at any rank, and the coordinates."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BOUNDS,
    DTYPES,
    FORMS,
    LAYOUTS,
    STRIP,
    TILE,
    Framed,
    error,
    orthonormal,
    sides,
)
from torch import Tensor

from sculpt_kernels import reference
from sculpt_kernels.coordinates import triton_compress as compress
from sculpt_kernels.projection import triton as project
from sculpt_kernels.triton import launcher, update
from sculpt_kernels.triton.tiles import SMALL_RANK, TileConfig

CONFIGS = {"reduce_config": TILE, "apply_config": STRIP}
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
    result = project.project_(G.tensor, left, right, form, **CONFIGS)
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
    project.project_(G, *sides(form, U, V), form, **CONFIGS)
    assert error(G, want) < BOUNDS[G.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("r", "s"), [(0, 0), (0, 3), (3, 0), (1, 1), (24, 24), (24, 31)])
def test_ranks_from_none_to_all(form: str, r: int, s: int, dtype: torch.dtype) -> None:
    G = torch.randn(24, 31).to(dtype)
    U, V = orthonormal(24, r, dtype=dtype), orthonormal(31, s, dtype=dtype)
    want, before = truth(G, U, V, form), G.double()
    project.project_(G, *sides(form, U, V), form, **CONFIGS)
    assert (G.double() - want).norm() < BOUNDS[dtype] * before.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (1, 1)])
def test_degenerate_shapes(form: str, shape: tuple[int, int]) -> None:
    m, n = shape
    G = torch.randn(m, n)
    U, V = orthonormal(m, min(m, 1), dtype=G.dtype), orthonormal(n, min(n, 1), dtype=G.dtype)
    project.project_(G, *sides(form, U, V), form, **CONFIGS)
    assert (G.abs() < 1e-6).all()


def test_parts_are_added_by_the_library_or_by_the_second_launch() -> None:
    G = torch.randn(130, 24).half()
    U, V = orthonormal(130, 4, dtype=G.dtype), orthonormal(24, 5, dtype=G.dtype)
    want = truth(G, U, V, "core")
    few = project.project_(G.clone(), U, V, "core", reduce_config=TileConfig(64, 16, 16, 4, 2))
    many = project.project_(G.clone(), U, V, "core", reduce_config=TileConfig(16, 16, 16, 4, 2))
    assert error(few, want) < BOUNDS[G.dtype]
    assert error(many, want) < BOUNDS[G.dtype]


def test_columns_are_divided_where_strips_are_few() -> None:
    assert project.chunk_length(1, 4096, 4096, 64, 64) == 1024
    assert project.chunk_length(64, 4096, 4096, 64, 64) == 4096
    G = torch.randn(17, 2100).half()
    U, V = orthonormal(17, 4, dtype=G.dtype), orthonormal(2100, 5, dtype=G.dtype)
    want = truth(G, U, V, "core")
    wide = TileConfig(32, 256, 512, 4, 2)
    project.project_(G, U, V, "core", reduce_config=wide, apply_config=wide)
    assert error(G, want) < BOUNDS[G.dtype]


@pytest.mark.parametrize("form", FORMS)
def test_the_default_configurations(form: str) -> None:
    G = torch.randn(70, 140).half()
    U, V = orthonormal(70, 20, dtype=G.dtype), orthonormal(140, 33, dtype=G.dtype)
    want = truth(G, U, V, form)
    project.project_(G, *sides(form, U, V), form)
    assert error(G, want) < BOUNDS[G.dtype]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_exact_projects_on_the_span_of_the_rounded_basis(form: str, dtype: torch.dtype) -> None:
    G = torch.randn(40, 48).to(dtype)
    # Far from orthonormal, so that only the corrected projector is one.
    U, V = (1.1 * orthonormal(size, 6, dtype=torch.float64) for size in (40, 48))
    U, V = U.to(dtype), V.to(dtype)
    want = truth(G, *(torch.linalg.qr(B.double()).Q for B in (U, V)), form)
    for many in (False, True):
        X = [G.clone(), G.clone()]
        left, right = sides(form, U, V)
        if many:
            project.project_many_(X, [left] * 2, [right] * 2, form, precision="exact", **CONFIGS)
        else:
            project.project_(X[0], left, right, form, precision="exact", **CONFIGS)
        # One rounding of the result, and nothing else.
        assert error(X[0], want) < (2.5e-4 if dtype == torch.float16 else 4e-3)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_exact_finds_what_little_lies_outside(form: str, dtype: torch.dtype) -> None:
    """All but the rounding of `G` is protected, so an error of 16 bits would be all of the rest."""
    U, V = (orthonormal(size, 6, dtype=dtype) for size in (40, 48))
    G = (U.double() @ torch.randn(6, 6).double() @ V.double().mT).to(dtype)
    want = truth(G, *(torch.linalg.qr(B.double()).Q for B in (U, V)), form)
    project.project_(G, *sides(form, U, V), form, precision="exact", **CONFIGS)
    assert error(G, want) < 0.03


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
    lefts, rights = zip(*(sides(form, U, V) for U, V in zip(Us, Vs, strict=True)), strict=True)
    project.project_many_(Gs, lefts, rights, form, **CONFIGS)
    for G, want in zip(Gs, wants, strict=True):
        assert error(G, want) < BOUNDS[dtype]
    written = sum(G.numel() for G in Gs)
    assert int(memory.isnan().sum()) == memory.numel() - written


def test_tables_of_addresses_are_built_once() -> None:
    launcher._address_table.cache_clear()
    Gs = [torch.randn(16, 16) for _ in range(2)]
    B = [orthonormal(16, 2, dtype=torch.float32).contiguous() for _ in Gs]
    for _ in range(3):
        project.project_many_(Gs, B, B, "core", **CONFIGS)
    assert launcher._address_table.cache_info().misses == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(50, 41), (41, 50)])
def test_any_rank(form: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    G = Framed(torch.randn(2, m, n).to(dtype))
    U, V = orthonormal(2, m, 37, dtype=dtype), orthonormal(n, 20, dtype=dtype)
    want, before = truth(G.tensor, U, V, form), G.tensor.double().norm()
    update.project_large_(G.tensor, *sides(form, U, V), form, config=TILE)
    assert (G.tensor.double() - want).norm() < BOUNDS[dtype] * before
    G.check_frame()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("r", "s"), [(0, 0), (0, 3), (3, 0), (24, 31)])
def test_any_rank_from_none_to_all(form: str, r: int, s: int) -> None:
    G = torch.randn(24, 31)
    U, V = orthonormal(24, r, dtype=G.dtype), orthonormal(31, s, dtype=G.dtype)
    want, before = truth(G, U, V, form), G.double()
    update.project_large_(G, *sides(form, U, V), form, config=TILE)
    assert (G.double() - want).norm() < BOUNDS[G.dtype] * before.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_coordinates(layout: str, dtype: torch.dtype) -> None:
    G = Framed(torch.randn(2, 50, 41).to(dtype), layout)
    U, V = orthonormal(2, 50, 5, dtype=dtype), orthonormal(41, 9, dtype=dtype)
    out = Framed(torch.zeros(2, 5, 9), layout)
    compress.compress(G.tensor, U, V, out.tensor, config=TILE)
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


def test_what_cannot_run_says_why() -> None:
    G, B = torch.randn(256, 256), torch.randn(256, SMALL_RANK + 1)
    assert project.supports(G, B[:, :SMALL_RANK], None) is None
    assert "up to 128 columns; V has 129" in str(project.supports(G, None, B))
    assert "float64" in str(project.supports(G.double(), None, None))
    assert "float32 needs no correction" in str(project.supports(G, None, None, precision="exact"))

"""Matrices that span more than 2**31 elements: every address is formed in 64 bits."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import BOUNDS, FORMS, error, orthonormal, sides
from torch import Tensor

from sculpt_kernels import reference
from sculpt_kernels.adamw import triton as adamw
from sculpt_kernels.coordinates import triton_compress as compress
from sculpt_kernels.projection import triton as project
from sculpt_kernels.triton import common, update

pytestmark = pytest.mark.usefixtures("small_tiles")

STRIDE = 2**30


@triton.jit
def _probe(Offsets, Corner, Within, stride, row, BLOCK: tl.constexpr):
    """What the kernels add to an address, written down instead."""
    lanes = tl.arange(0, BLOCK)
    at = lanes[:, None] * BLOCK + lanes[None, :]
    rows = tl.load(row) + lanes
    tl.store(Offsets + at, common.offsets(rows, rows, stride, 1))
    tl.store(Corner, common.corner(0, tl.load(row), tl.load(row), stride, 1))
    tl.store(Within + at, common.within(stride, 1, False, 4, BLOCK, BLOCK))


@pytest.mark.parametrize("row", [0, 5, 2**20])
def test_offsets_are_64_bits_wide(row: int) -> None:
    offsets, within = (torch.zeros(4, 4, dtype=torch.int64) for _ in range(2))
    corner = torch.zeros((), dtype=torch.int64)
    _probe[(1,)](offsets, corner, within, STRIDE, torch.tensor(row, dtype=torch.int32), BLOCK=4)
    lanes = torch.arange(4)
    rows = row + lanes
    assert torch.equal(offsets, rows[:, None] * STRIDE + rows[None, :])
    assert int(corner) == row * STRIDE + row
    assert torch.equal(within, lanes[:, None] * STRIDE + lanes[None, :])


def sparse(rows: int, columns: int, stride: int) -> Tensor:
    """A float16 matrix with rows `stride` elements apart, of which only what is used exists."""
    size = 2 * ((rows - 1) * stride + columns)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as refused:
        pytest.skip(f"no {size / 2**30:.0f} GiB of address space: {refused}")
    flat: Any = torch.frombuffer(memory, dtype=torch.float16)
    return flat.as_strided((rows, columns), (stride, 1))


@pytest.fixture
def far() -> Tensor:
    """Three rows, the last one 2**31 elements from the first."""
    return sparse(3, 20, STRIDE).copy_(torch.randn(3, 20))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
def test_project_beyond_two_billion_elements(form: str, transposed: bool, far: Tensor) -> None:
    G = far.mT if transposed else far
    U, V = (orthonormal(size, 2, dtype=G.dtype) for size in G.shape)
    want = reference.project(G.double(), U.double(), V.double(), form)
    project.project_(G, *sides(form, U, V), form)
    assert error(G, want) < BOUNDS[G.dtype]


def test_other_kernels_beyond_two_billion_elements(far: Tensor) -> None:
    U, V = orthonormal(3, 2, dtype=far.dtype), orthonormal(20, 2, dtype=far.dtype)
    out = compress.compress(far, U, V, torch.zeros(2, 2))
    assert error(out, reference.compress(far.double(), U.double(), V.double())) < 1e-5
    want = far.double() + U.double() @ V.double().mT
    update.update_(far, U, V)
    assert error(far, want) < BOUNDS[far.dtype]
    others = [torch.rand(3, 20) for _ in range(3)]
    near = [far.clone(memory_format=torch.contiguous_format), *(X.clone() for X in others)]
    step: dict[str, Any] = {
        "form": "core", "project": "gradient", "lr": 0.1, "betas": (0.9, 0.99),
        "eps": 1e-3, "weight_decay": 0.1, "step": 3,
    }  # fmt: skip
    adamw.project_adamw_(far, others[0].half(), *others[1:], U, V, **step)
    adamw.project_adamw_(near[0], near[1].half(), *near[2:], U, V, **step)
    assert torch.equal(far, near[0])
    assert torch.equal(others[1], near[2])


@pytest.mark.parametrize("form", FORMS)
def test_one_step_of_a_walk_may_pass_two_billion_elements(form: str) -> None:
    # Sixteen rows, the step along the contracted side, are 2**31 elements.
    G = sparse(20, 18, STRIDE // 8).copy_(torch.randn(20, 18))
    U, V = (orthonormal(size, 2, dtype=G.dtype) for size in G.shape)
    want = reference.project(G.double(), U.double(), V.double(), form)
    project.project_(G, *sides(form, U, V), form)
    assert error(G, want) < BOUNDS[G.dtype]
    A, B = G.mT, torch.randn(5, 20).half()
    X = update.update_(torch.zeros(18, 5), A, B)
    assert error(X, A.double() @ B.double().mT) < 1e-6
    X = update.update_(torch.zeros(5, 18), B, A)
    assert error(X, B.double() @ A.double().mT) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_matrices_of_a_batch_may_be_two_billion_elements_apart(form: str) -> None:
    G = sparse(3, 20, STRIDE).view(3, 4, 5).copy_(torch.randn(3, 4, 5))
    U, V = (orthonormal(3, size, 2, dtype=G.dtype) for size in G.shape[1:])
    want = reference.project(G.double(), U.double(), V.double(), form)
    project.project_(G, *sides(form, U, V), form)
    assert error(G, want) < BOUNDS[G.dtype]
    want = G.double() + U.double() @ V.double().mT
    update.update_(G, U, V)
    assert error(G, want) < BOUNDS[G.dtype]

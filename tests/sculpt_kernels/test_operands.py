"""Operands whose elements share an address, and those that only look as if they did."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import basis, gaussian
from torch import Tensor

from sculpt_kernels import (
    compress,
    expand_add_,
    expand_add_many_,
    project,
    project_,
    project_adamw_,
    project_many_,
)
from sculpt_kernels.addresses import overlaps_itself

M, N, R, S = 8, 12, 3, 4


def operands() -> dict[str, Tensor]:
    shaped = {name: gaussian(M, N, seed=i) for i, name in enumerate(("G", "W", "exp_avg", "base"))}
    return shaped | {
        "exp_avg_sq": gaussian(M, N, seed=4).square(),
        "copy": torch.zeros(M, N, dtype=torch.bfloat16),
        "U": basis(M, R),
        "V": basis(N, S),
        "C": gaussian(R, S, seed=5),
    }


# Every operation, the operands that it takes, and those of them that it writes.
OPERATIONS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str, str]] = {
    "project_": (lambda o: project_(o["G"], o["U"], o["V"], form="strict"), "G U V", "G"),
    "project": (lambda o: project(o["G"], o["U"], o["V"]), "G U V", ""),
    "project_many_": (
        lambda o: project_many_([torch.zeros(M, N).double(), o["G"]], [o["U"]] * 2, [o["V"]] * 2),
        "G U V",
        "G",
    ),
    "compress": (lambda o: compress(o["G"], o["U"], o["V"]), "G U V", ""),
    "expand_add_": (
        lambda o: expand_add_(o["W"], o["C"], o["U"], o["V"], base=o["base"]),
        "W C U V base",
        "W",
    ),
    "expand_add_many_": (
        lambda o: expand_add_many_(
            [torch.zeros(M, N).double(), o["W"]], [o["C"]] * 2, [o["U"]] * 2, [o["V"]] * 2
        ),
        "W C U V",
        "W",
    ),
    "project_adamw_": (
        lambda o: project_adamw_(
            o["W"], o["G"], o["exp_avg"], o["exp_avg_sq"], o["U"], o["V"], copy=o["copy"],
            lr=1e-2, step=2,
        ),
        "W G exp_avg exp_avg_sq copy U V",
        "W exp_avg exp_avg_sq copy",
    ),
}  # fmt: skip
WRITTEN = [(name, each) for name, (_, _, written) in OPERATIONS.items() for each in written.split()]


def overlapping(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """By listing every address."""
    sums = [0]
    for size, stride in zip(shape, strides, strict=True):
        sums = [total + i * stride for total in sums for i in range(size)]
    return len(set(sums)) < len(sums)


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    return torch.zeros(10_000, dtype=torch.float64).as_strided(shape, strides)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=4))
def test_overlap_is_told_exactly(dims):
    shape, strides = (tuple(each) for each in zip(*dims, strict=True))
    assert overlaps_itself(strided(shape, strides)) == overlapping(shape, strides)


def test_overlap_of_all_small_layouts():
    for shape in itertools.product((1, 2, 3, 4), repeat=3):
        for strides in itertools.product((0, 1, 2, 3, 5, 7), repeat=3):
            assert overlaps_itself(strided(shape, strides)) == overlapping(shape, strides)


@pytest.mark.parametrize("strides", [(1, 1), (N - 1, 1), (2, 3), (0, 1), (1, M - 1)], ids=str)
@pytest.mark.parametrize(("name", "operand"), WRITTEN)
def test_matrices_that_overlap_themselves_are_refused(name, operand, strides):
    given, before = operands(), operands()
    memory = torch.arange(200).to(given[operand].dtype)
    given[operand] = memory.as_strided((M, N), strides)
    with pytest.raises(ValueError, match=f"{operand} must not be an expanded or overlapping"):
        OPERATIONS[name][0](given)
    assert torch.equal(memory, torch.arange(200).to(memory.dtype))
    for key, value in before.items():
        assert key == operand or torch.equal(given[key], value), key


@pytest.mark.parametrize("strides", [(1, M), (2 * N, 2), (13, 8), (3 * N, 1)], ids=str)
@pytest.mark.parametrize(("name", "operand"), WRITTEN)
def test_other_strides_are_written_through(name, operand, strides):
    call = OPERATIONS[name][0]
    plain, given = operands(), operands()
    laid_out = torch.zeros(400, dtype=plain[operand].dtype).as_strided((M, N), strides)
    given[operand] = laid_out.copy_(plain[operand])
    call(given), call(plain)
    for key, value in plain.items():
        torch.testing.assert_close(given[key], value)

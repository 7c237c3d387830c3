"""Operands that are no ordinary tensors: subclasses, and elements that share an address."""

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
from torch.utils._pytree import tree_map

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
TAKEN = [(name, operand) for name, (_, taken, _) in OPERATIONS.items() for operand in taken.split()]
WRITTEN = [(name, each) for name, (_, _, written) in OPERATIONS.items() for each in written.split()]


class Plain(Tensor):
    """A name of its own and nothing more, like `torch.nn.Buffer`."""


class Logged(Tensor):
    """Functions of torch pass through it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(Tensor):
    """Elements are elsewhere; every operator computes on a copy of them."""

    elements: Tensor

    @staticmethod
    def __new__(cls, X: Tensor) -> Wrapper:
        wrapper = Tensor._make_wrapper_subclass(cls, X.shape, dtype=X.dtype, strides=X.stride())
        wrapper.elements = X
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def copied(X: Any) -> Any:
            return X.elements.clone() if isinstance(X, Wrapper) else X

        return func(*tree_map(copied, args), **tree_map(copied, kwargs or {}))


class Loop(Tensor):
    """Passes every operator on to itself."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Plain, Logged, torch.nn.Parameter])
@pytest.mark.parametrize(("name", "operand"), TAKEN)
def test_plain_subclasses_are_the_tensors_they_are(name, operand, kind):
    call = OPERATIONS[name][0]
    plain, given = operands(), operands()
    if kind is torch.nn.Parameter:
        given[operand] = torch.nn.Parameter(given[operand], requires_grad=False)
    else:
        given[operand] = given[operand].as_subclass(kind)
    out, want = call(given), call(plain)
    assert (out is None) == (want is None)
    if want is not None:
        assert torch.equal(out.as_subclass(Tensor), want)
    for key, value in plain.items():
        assert torch.equal(given[key].as_subclass(Tensor), value), key


@pytest.mark.parametrize("kind", [Wrapper, Loop])
@pytest.mark.parametrize(("name", "operand"), TAKEN)
def test_subclasses_that_dispatch_are_refused(name, operand, kind):
    given, before = operands(), operands()
    X = given[operand]
    given[operand] = Wrapper(X) if kind is Wrapper else X.as_subclass(Loop)
    message = f"{operand} must be a plain tensor; got a {kind.__name__}.*pass the tensor that"
    with pytest.raises(TypeError, match=message):
        OPERATIONS[name][0](given)
    given[operand] = X
    for key, value in before.items():
        assert torch.equal(given[key], value), key


def test_operators_take_plain_subclasses_too():
    o = operands()
    G = o["G"].clone().as_subclass(Plain)
    torch.ops.sculpt_kernels.project_(G, o["U"], o["V"], "core", "auto", "none")
    assert torch.equal(G.as_subclass(Tensor), project_(o["G"], o["U"], o["V"]))


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

"""Public operations: no autocast inside them, and no transform that they do not follow."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from matrices import DTYPES, basis, gaussian
from torch import Tensor
from torch.autograd import forward_ad

import sculpt_kernels as kernels
from sculpt_kernels import operation as operations
from sculpt_kernels import reference

M, N, R, S = 8, 12, 3, 4


class Operands:
    """Fresh operands of every kind in one dtype."""

    def __init__(self, dtype: torch.dtype, directory: Any = None) -> None:
        self.directory = directory
        self.G, self.W = (gaussian(M, N, dtype=dtype, seed=seed) for seed in (0, 1))
        self.moments = gaussian(M, N, dtype=dtype, seed=2), gaussian(M, N, dtype=dtype).square()
        self.U, self.V = basis(M, R, dtype=dtype), basis(N, S, dtype=dtype)
        self.C = gaussian(R, S, dtype=dtype, seed=3)
        self.x, self.dy = gaussian(5, N, dtype=dtype, seed=4), gaussian(5, M, dtype=dtype, seed=5)
        self.ids = torch.tensor([0, 7, 7, 2, 1])


STEP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "step": 3}

# Every public operation that computes, on the operands of `o`.
OPERATIONS: dict[str, Callable[[Operands], Any]] = {
    "compress": lambda o: kernels.compress(o.G, o.U, o.V, out_dtype=o.G.dtype),
    "expand_add_": lambda o: kernels.expand_add_(o.W, o.C, o.U, o.V, alpha=0.5),
    "expand_add_many_": lambda o: kernels.expand_add_many_(
        [o.W, o.G], [o.C, o.C], [o.U, o.U], [o.V, o.V]
    ),
    "leak": lambda o: kernels.leak(o.G, o.U, o.V),
    "orthonormalize": lambda o: kernels.orthonormalize(o.G.mT),
    "project": lambda o: [
        kernels.project(o.G, o.U, o.V),
        kernels.project(o.G, o.U, o.V, form="strict", complement="left"),
    ],
    "project_": lambda o: [
        kernels.project_(o.G, o.U, o.V),
        kernels.project_(o.W, o.U, form="left"),
    ],
    "project_adamw_": lambda o: [
        kernels.project_adamw_(o.W, o.G, *o.moments, o.U, o.V, **STEP),
        kernels.project_adamw_(o.W, o.G, *o.moments, o.U, o.V, project="gradient", **STEP),
    ],
    "project_many_": lambda o: kernels.project_many_([o.G, o.W], [o.U, o.U], [o.V, o.V]),
    "range_finder": lambda o: kernels.range_finder(o.G, R),
    "rsvd": lambda o: kernels.rsvd(o.G, R),
    "split": lambda o: [
        kernels.split(o.G, rank=R, method=method) for method in ("svd", "gram", "range", "spectral")
    ],
    "SubspaceCache": lambda o: kernels.SubspaceCache(o.directory).split(o.G, rank=R),
    "reference.adamw_direction": lambda o: reference.adamw_direction(
        o.G, *o.moments, betas=(0.9, 0.99), eps=1e-8, step=3
    ),
    "reference.compress": lambda o: reference.compress(o.G, o.U, o.V),
    "reference.embedding_gradient": lambda o: reference.embedding_gradient(
        o.ids, o.x, o.W, o.U, o.V
    ),
    "reference.expand_add": lambda o: reference.expand_add(o.W, o.C, o.U, o.V),
    "reference.leak": lambda o: reference.leak(o.G, o.U, o.V),
    "reference.linear_gradients": lambda o: reference.linear_gradients(o.x, o.W, o.dy, o.U, o.V),
    "reference.project": lambda o: reference.project(o.G, o.U, o.V),
    "reference.project_adamw": lambda o: reference.project_adamw(
        o.W, o.G, *o.moments, o.U, o.V, **STEP
    ),
    "reference.split": lambda o: reference.split(o.G, R, "low"),
}
# What follows autocast by design.
LAYERS: dict[str, Callable[[Operands], Tensor]] = {
    "compact_embedding": lambda o: kernels.compact_embedding(o.ids, o.W, o.U, o.V, o.C),
    "compact_linear": lambda o: kernels.compact_linear(o.x, o.W, None, o.U, o.V, o.C),
    "compact_weight": lambda o: kernels.compact_weight(o.W, o.U, o.V, o.C),
}
# What multiplies nothing.
PLANS = {"Plan", "backends", "is_divided", "plan"}
RESULTS = {"Leak", "Subspace"}


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, float):
        yield torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value):
        yield from tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])


def outcome(
    operation: Callable[[Operands], Any], dtype: torch.dtype, folder: Any = None
) -> list[Tensor]:
    """What comes out, and the operands afterwards."""
    operands = Operands(dtype, folder)
    out = operation(operands)
    return [X.clone() for X in tensors_in([out, *vars(operands).values()])]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True)
    )


def test_every_public_name_is_listed_here():
    listed = {name for name in OPERATIONS if not name.startswith("reference.")}
    public = set(kernels.__all__) - {"reference"}
    assert listed | set(LAYERS) | PLANS | RESULTS == public
    specified = {
        f"reference.{name}"
        for name, value in vars(reference).items()
        if inspect.isfunction(value)
        and value.__module__ == reference.__name__
        and not name.startswith("_")
    }
    assert specified == {name for name in OPERATIONS if name.startswith("reference.")}


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_inside_autocast_are_those_outside(name, dtype, autocast, tmp_path):
    if name == "reference.split" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("torch has no SVD in this dtype")
    want = outcome(OPERATIONS[name], dtype, tmp_path / "outside")
    with torch.autocast("cpu", dtype=autocast):
        got = outcome(OPERATIONS[name], dtype, tmp_path / "inside")
        assert torch.is_autocast_enabled("cpu")
    assert same(got, want)


def test_autocast_is_off_on_every_device(monkeypatch):
    @operations.operation()
    def enabled() -> list[bool]:
        return [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]

    monkeypatch.setattr(operations, "_AUTOCASTING", ("cpu", "cuda"))
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu"):
            assert enabled() == [False, False]
            assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", before)


# Values that decide what is computed next break a graph; the range finder is `rsvd`.
BROKEN = ("leak", "orthonormalize", "rsvd", "split")
COMPILED = [name for name in OPERATIONS if name not in ("SubspaceCache", "range_finder")]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_results_inside_autocast_are_those_outside(name, inside):
    want = outcome(OPERATIONS[name], torch.float32)

    def call(operands: Operands) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return OPERATIONS[name](operands)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=name not in BROKEN)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        got = outcome(compiled, torch.float32)
    assert same(got, want)


def forward_mode(function: Callable[[Tensor], Any], value: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(value, value.clone()))


def first(value: Any) -> Tensor:
    return next(tensors_in(value))


TRANSFORMS: dict[str, tuple[Callable[[Callable[[Tensor], Any], Tensor], Any], str]] = {
    "vmap": (lambda f, X: torch.vmap(f)(X.expand(2, *X.shape).clone()), "torch.func.vmap"),
    "grad": (lambda f, X: torch.func.grad(lambda X: first(f(X)).sum())(X), "torch.func.grad"),
    "jvp": (lambda f, X: torch.func.jvp(lambda X: first(f(X)), (X,), (X,)), "torch.func.jvp"),
    "hessian": (lambda f, X: torch.func.hessian(lambda X: first(f(X)).sum())(X), "torch.func"),
    "forward mode": (forward_mode, "forward-mode differentiation"),
}
WRITTEN = ("expand_add_", "expand_add_many_", "project_adamw_")
FOLLOWED = [
    *((name, "W" if name in WRITTEN else "G") for name in OPERATIONS if name != "SubspaceCache"),
    *(("project_", "U"), ("compress", "V"), ("project_many_", "U"), ("project_adamw_", "V")),
    *(("expand_add_", "C"), ("expand_add_many_", "C"), ("compact_linear", "x")),
    *((name, "C") for name in LAYERS),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("name", "operand"), [f for f in FOLLOWED if "reference" not in f[0]])
def test_transforms_are_refused_by_name(name, operand, transform):
    apply, words = TRANSFORMS[transform]
    operands = Operands(torch.float32)

    def call(value: Tensor) -> Any:
        setattr(operands, operand, value)
        return (OPERATIONS | LAYERS)[name](operands)

    with pytest.raises(NotImplementedError, match=f"^{name} does not support {words}"):
        apply(call, getattr(operands, operand))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
@pytest.mark.parametrize("name", ["project", "compact_weight"])
def test_transforms_that_follow_other_tensors_are_refused(name, transform):
    apply, words = TRANSFORMS[transform]
    operands = Operands(torch.float32)
    with pytest.raises(NotImplementedError, match=f"^{name} does not support {words}"):
        apply(lambda X: X * first((OPERATIONS | LAYERS)[name](operands)), torch.ones(()))


def test_forward_mode_of_other_tensors_passes():
    o = Operands(torch.float32)
    want = reference.project(o.G, o.U, o.V)
    out = forward_mode(
        lambda X: forward_ad.unpack_dual(X * kernels.project(o.G, o.U, o.V)), torch.ones(())
    )
    torch.testing.assert_close(out.tangent, want)


def test_functionalization_passes():
    o = Operands(torch.float32)
    got = torch.func.functionalize(lambda G: kernels.project_(G, o.U, o.V))(o.G.clone())
    torch.testing.assert_close(got, kernels.project_(o.G, o.U, o.V))


def test_the_reference_can_be_transformed():
    o = Operands(torch.float64)
    Gs = gaussian(3, M, N)
    batched = torch.vmap(lambda G: reference.project(G, o.U, o.V))(Gs)
    torch.testing.assert_close(batched, reference.project(Gs, o.U, o.V))
    gradient = torch.func.grad(lambda G: reference.project(G, o.U, o.V).square().sum())(o.G)
    torch.testing.assert_close(gradient, 2 * reference.project(o.G, o.U, o.V))


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward_is_refused_by_name(name):
    o = Operands(torch.float64)
    o.C.requires_grad_()
    loss = LAYERS[name](o).square().sum()
    with pytest.raises(NotImplementedError, match=f"^{name} does not support double backward"):
        torch.autograd.grad(loss, o.C, create_graph=True)


@pytest.mark.parametrize("name", ["compact_embedding", "compact_linear"])
def test_gradients_in_batches_are_refused_by_name(name):
    o = Operands(torch.float64)
    o.C.requires_grad_()
    y = LAYERS[name](o)
    with pytest.raises(NotImplementedError, match=f"^{name} does not support torch.vmap over"):
        torch.autograd.grad(y, o.C, torch.ones(2, *y.shape), is_grads_batched=True)


def test_gradients_of_a_weight_in_batches():
    o = Operands(torch.float64)
    o.C.requires_grad_()
    y = LAYERS["compact_weight"](o)
    dWs = gaussian(3, M, N, seed=7)
    (dCs,) = torch.autograd.grad(y, o.C, dWs, is_grads_batched=True)
    torch.testing.assert_close(dCs, reference.compress(dWs, o.U, o.V))

"""The operators: contract, fake tensors, compilation; eager calls that never reach them."""

from __future__ import annotations

import timeit

import pytest
import torch
from matrices import FORMS, basis, gaussian, sides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from sculpt_kernels import (
    compress,
    expand_add_,
    expand_add_many_,
    project,
    project_,
    project_adamw_,
    project_many_,
)

OPS = torch.ops.sculpt_kernels
M, N, R, S = 8, 12, 3, 4


def tensors(count=1, dtype=torch.float32):
    U, V = basis(M, R, dtype=dtype), basis(N, S, dtype=dtype)
    return [gaussian(M, N, dtype=dtype, seed=i) for i in range(count)], U, V


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_operators(form, dtype):
    (G, H), U, V = tensors(2, dtype)
    A, B = sides(form, U, V)
    rest = (form, "auto", "none")
    opcheck(OPS.project_.default, (G, A, B, *rest))
    opcheck(OPS.project.default, (G, A, B, *rest))
    opcheck(OPS.project_many_.default, ([G, H], [A, A], [B, B], *rest))


def test_coordinate_operators():
    (G,), U, V = tensors()
    C = gaussian(R, S, dtype=torch.float32)
    opcheck(OPS.compress.default, (G, U, V, torch.float32, "auto"))
    opcheck(OPS.compress.default, (G, U, V, torch.bfloat16, "auto"))
    opcheck(
        OPS.expand_add_.default,
        (G, C, U, V, 0.5, None, "nearest", None, None, None, "auto"),
    )
    low = G.bfloat16()
    seed, alpha = torch.tensor(3), torch.tensor(0.5)
    opcheck(
        OPS.expand_add_.default, (low, C, U, V, 0.0, alpha, "stochastic", None, seed, G, "auto")
    )


def test_list_of_weights_operator():
    (G, H), U, V = tensors(2)
    C = gaussian(R, S, dtype=torch.float32)
    lists = ([G, H], [C, C], [U, U], [V, V])
    opcheck(OPS.expand_add_many_.default, (*lists, 0.5, None, "nearest", None, [], "auto"))
    low = [G.bfloat16(), H.bfloat16()]
    opcheck(
        OPS.expand_add_many_.default,
        (low, *lists[1:], 0.5, None, "stochastic", torch.tensor([1, 2]), [G, H], "auto"),
    )


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_adamw_operator(project):
    (W, G, exp_avg, exp_avg_sq), U, V = tensors(4)
    copy = torch.zeros(M, N, dtype=torch.bfloat16)
    lr, step = torch.tensor(1e-3), torch.tensor(2)
    state = (W, G, exp_avg, exp_avg_sq.square(), U, V, "core", project)
    betas = (0.9, None, 0.999, None)
    for scalars in (
        (1e-3, None, *betas, 1e-8, None, 0.1, None, 2, None),
        (0.0, lr, *betas, 1e-8, None, 0.1, None, None, step),
    ):
        opcheck(
            OPS.project_adamw_.default,
            (*state, *scalars, "none", copy, "nearest", None, None, "auto"),
        )


def steps(Gs, W, exp_avg, exp_avg_sq, low, U, V, C, lr):
    for G in Gs:
        project_(G, U, V, form="strict")
    project_many_(Gs, [U] * len(Gs), [V] * len(Gs))
    kept = project(Gs[0] * 2, U, None, form="left", complement="left")
    C = C + compress(Gs[0], U, V)
    expand_add_(W, C, U, V, alpha=lr)
    expand_add_(low, C, U, V, rounding="stochastic", seed=5)
    expand_add_many_([W, low], [C, C], [U, U], [V, V])
    project_adamw_(W, Gs[1], exp_avg, exp_avg_sq, U, V, lr=lr, step=3)
    project_adamw_(W, kept, exp_avg, exp_avg_sq, U, V, project="gradient", lr=1e-2, step=4)
    return C, kept


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_loop_of_calls_compiles_into_one_graph(dynamic):
    def fresh():
        Gs, U, V = tensors(6)
        W, exp_avg, exp_avg_sq, low = Gs[2], Gs[3], Gs[4].square(), Gs[5].bfloat16()
        C = gaussian(R, S, dtype=torch.float32, seed=9)
        return Gs[:2], W, exp_avg, exp_avg_sq, low, U, V, C, torch.tensor(1e-2)

    eager, traced = fresh(), fresh()
    want = steps(*eager)
    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got = compiled(*traced)
    torch.testing.assert_close(got, want)
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_fake_and_meta_tensors():
    with FakeTensorMode():
        G, U, V = torch.empty(2, M, N), torch.empty(M, R), torch.empty(N, S)
        assert project_(G, U, V) is G
        assert project(G, U, V).shape == G.shape
        assert compress(G, U, V).shape == (2, R, S)
        expand_add_(G, torch.empty(R, S), U, V)
        project_adamw_(G, G.clone(), G.clone(), G.clone(), U, V, lr=1e-3, step=1)
        project_many_([G, G.clone()], [U, U], [V, V])
    meta = [torch.empty(shape, device="meta") for shape in ((M, N), (M, R), (N, S))]
    assert project_(*meta) is meta[0]
    assert project(*meta).shape == (M, N)
    assert compress(*meta).is_meta
    expand_add_(meta[0], torch.empty(R, S, device="meta"), *meta[1:])
    with pytest.raises(ValueError, match="U must have shape"):
        project_(meta[0], meta[2], meta[1])


def test_parameters_are_plain_tensors():
    (G,), U, V = tensors()
    W = torch.nn.Parameter(G.clone())
    with torch.no_grad():
        project_(W, U, V)
    torch.testing.assert_close(W.detach(), project(G, U, V))


def test_eager_calls_do_not_pay_for_the_operator():
    """The operator costs over 50 microseconds here; an eager call adds a few to its products."""
    (G,), U, V = tensors()

    def products():
        G.addmm_(U @ (U.T @ (G @ V)), V.T, alpha=-1)

    def seconds(function):
        return min(timeit.repeat(function, number=200, repeat=9)) / 200

    def operator():
        OPS.project_(G, U, V, "core", "auto", "none")

    bare = seconds(products)
    assert seconds(lambda: project_(G, U, V)) - bare < 0.5 * (seconds(operator) - bare)

"""orthonormalize: orthonormal, same span, the cheapest algorithm that is safe."""

from __future__ import annotations

import pytest
import torch

from sculpt_kernels import orthonormalize
from sculpt_kernels.subspaces.basis import orthonormalize_with_method


def defect(Q: torch.Tensor) -> float:
    r = Q.shape[-1]
    return float((Q.mT.double() @ Q.double() - torch.eye(r, dtype=torch.float64)).abs().amax())


def conditioned(n: int, r: int, cond: float, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    A = torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64)).Q
    B = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64)).Q
    return (A * torch.logspace(0, -float(torch.tensor(cond).log10()), r).double() @ B.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("cond_in_eps", "expected"),
    [(0.1, "cholesky-qr2"), (0.8, "shifted-cholesky-qr3"), (None, "householder")],
)
def test_picks_the_cheapest_safe_algorithm(dtype, cond_in_eps, expected):
    eps = torch.finfo(dtype).eps
    if cond_in_eps is None:
        Y = torch.ones(60, 20, dtype=dtype)
    else:
        Y = conditioned(60, 20, eps**-cond_in_eps, dtype)
    Q, method = orthonormalize_with_method(Y)
    assert method == expected
    assert defect(Q) <= 50 * eps * 20**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cond_in_eps", [0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.9, 1.0, 1.2])
def test_orthonormal_whatever_the_conditioning(dtype, cond_in_eps):
    eps = torch.finfo(dtype).eps
    assert defect(orthonormalize(conditioned(60, 20, eps**-cond_in_eps, dtype))) <= 40 * eps


def test_a_cholesky_that_succeeds_without_orthogonality_is_not_accepted():
    # At cond(Y) about 1e5 one in a hundred float32 CholeskyQR2 runs ends above the bound.
    methods = set()
    for seed in range(300):
        g = torch.Generator().manual_seed(seed)
        r = int(torch.randint(5, 60, (), generator=g))
        n = r + int(torch.randint(0, 200, (), generator=g))
        A = torch.linalg.qr(torch.randn(n, r, generator=g)).Q
        B = torch.linalg.qr(torch.randn(r, r, generator=g)).Q
        cond = 1.5 + 4 * float(torch.rand((), generator=g))
        Q, method = orthonormalize_with_method((A * torch.logspace(0, -cond, r)) @ B.T)
        methods.add(method)
        assert defect(Q) <= 4e-6
    assert len(methods) > 1


@pytest.mark.parametrize("shape", [(9, 4), (5, 5), (7, 1), (3, 0), (2, 3, 8, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_orthonormal_with_the_same_span(shape, dtype):
    g = torch.Generator().manual_seed(0)
    Y = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    Q = orthonormalize(Y)
    assert Q.shape == Y.shape
    assert Q.dtype == dtype
    assert Q.is_contiguous()
    if shape[-1] == 0:
        return
    eps = torch.finfo(dtype).eps
    assert defect(Q) <= 50 * eps * shape[-1] ** 0.5
    outside = Y.double() - Q.double() @ (Q.double().mT @ Y.double())
    assert float(outside.norm()) <= 50 * eps * float(Y.double().norm())


def test_column_scales_do_not_matter():
    g = torch.Generator().manual_seed(0)
    Y = torch.randn(40, 10, generator=g) * torch.logspace(-15, 15, 10)
    Q, method = orthonormalize_with_method(Y)
    assert method == "cholesky-qr2"
    assert defect(Q) <= 50 * torch.finfo(torch.float32).eps * 10**0.5


@pytest.mark.parametrize("Y", [torch.zeros(6, 3), torch.ones(6, 3)])
def test_rank_deficient_columns_are_completed(Y):
    assert defect(orthonormalize(Y)) <= 1e-6


@pytest.mark.parametrize(
    ("Y", "message"),
    [
        (torch.zeros(3, 4), "at most as many columns"),
        (torch.full((4, 2), float("nan")), "8 NaN or infinite"),
        (torch.zeros(4), r"shape \(..., n, r\)"),
    ],
)
def test_bad_values_are_named(Y, message):
    with pytest.raises(ValueError, match=message):
        orthonormalize(Y)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int64"):
        orthonormalize(torch.ones(4, 2, dtype=torch.int64))

"""Symmetric products, the sign iteration, and invariant subspaces from products alone."""

from __future__ import annotations

import pytest
import torch
from spectra import SPECTRA, planted
from torch.utils._python_dispatch import TorchDispatchMode

from sculpt_kernels import split
from sculpt_kernels.subspaces import methods, spectral, symmetric
from sculpt_kernels.subspaces.spectral import invariant_subspace, polynomials
from sculpt_kernels.subspaces.symmetric import symmetric_product


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (2, 3, 33, 20), (5, 4), (16, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_one_triangle(monkeypatch, shape, transposed):
    monkeypatch.setattr(symmetric, "BLOCK_ROWS", {"cpu": 16, "cuda": 16})
    A = torch.randn(shape, dtype=torch.float64)
    A = A.mT if transposed else A
    full = symmetric_product(A)
    torch.testing.assert_close(full, A @ A.mT, rtol=0, atol=1e-12)
    assert torch.equal(symmetric_product(A, lower=True).tril(), full.tril())
    torch.testing.assert_close(symmetric_product(full, full @ full), full @ full @ full)


def test_symmetric_products_multiply_one_triangle(monkeypatch):
    monkeypatch.setattr(symmetric, "BLOCK_ROWS", {"cpu": 16, "cuda": 16})
    elements = []
    real = torch.matmul

    def counting(A, B, out):
        elements.append(out.numel())
        return real(A, B, out=out)

    monkeypatch.setattr(torch, "matmul", counting)
    symmetric_product(torch.randn(64, 10))
    assert sum(elements) == 64 * 64 * 5 / 8


def test_polynomials_reach_one_from_everywhere_in_the_interval():
    for accuracy, most in ((1e-2, 8), (1e-6, 10)):
        x = torch.logspace(-4, 0, 10_000, dtype=torch.float64)
        for a, b, c in polynomials(1e-4, accuracy):
            x = x * (a + b * x**2 + c * x**4)
        assert float((x - 1).abs().max()) <= accuracy * 1.01
        assert len(polynomials(1e-4, accuracy)) <= most


def gaussian(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spiked(k: int) -> torch.Tensor:
    """A random bulk below twenty large values, as weights of language models have it."""
    U, V = (torch.linalg.qr(gaussian(size, 20)).Q for size in (k, 2 * k))
    return gaussian(k, 2 * k) / (2 * k) ** 0.5 + (U * torch.linspace(16, 3, 20)) @ V.T


MATRICES = {
    "square": lambda: gaussian(300, 300),
    "marchenko-pastur": lambda: gaussian(300, 600),
    "spiked": lambda: spiked(300),
    "power law": lambda: planted(300, 300, SPECTRA["power law"](300)),
}


@pytest.mark.parametrize("direct", [640, 64])
@pytest.mark.parametrize("h", [16, 150, 225, 290])
@pytest.mark.parametrize("kind", MATRICES)
def test_span_is_exact_to_what_rounding_and_the_gap_allow(monkeypatch, kind, h, direct):
    monkeypatch.setattr(spectral, "DIRECT", direct)
    W = MATRICES[kind]()
    S = W @ W.T
    k = S.shape[0]
    values, vectors = torch.linalg.eigh(S)
    cut = k - h
    for leading in (True, False):
        exact = vectors[:, cut:] if leading else vectors[:, :cut]
        Q, above, below = invariant_subspace(S, exact.shape[1], leading, seed=0)
        eye = torch.eye(exact.shape[1], dtype=S.dtype)
        assert float((Q.T @ Q - eye).abs().max()) <= 50 * 2.0**-52 * k**0.5
        torch.testing.assert_close(above, values[cut], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(below, values[cut - 1], rtol=1e-9, atol=1e-12)
        # Backward stable: as of a matrix within rounding of S, by Davis and Kahan.
        error = float(torch.linalg.norm(Q - exact @ (exact.T @ Q)))
        relative_gap = float((above - below) / values[-1])
        assert error <= 50 * k * 2.0**-52 / relative_gap
        assert relative_gap < 1e-4 or error <= 1e-5
    # The same split from either side.
    parts = [invariant_subspace(S, c, part, 0)[0] for c, part in ((h, True), (cut, False))]
    assert float((parts[0].T @ parts[1]).abs().max()) <= 1e-12


def test_a_count_that_is_not_resolved_shows_in_the_residual():
    # Most eigenvalues lie within 1e-4 of the shift and of each other, but are not equal.
    W = planted(300, 300, SPECTRA["steep"](300))
    found = split(W, rank=250, method="spectral")
    assert found.method == "gram"
    exact = split(W, rank=250, method="svd")
    assert float((found.U - exact.U @ (exact.U.T @ found.U)).norm()) <= 1e-2


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation_inside():
    S = torch.stack([W @ W.T for W in (gaussian(600, 700), spiked(600))])
    with NoWaiting():
        Q, above, below = invariant_subspace(S, 150, False, seed=0)
    residual = torch.linalg.matrix_norm(S @ Q - Q @ (Q.mT @ (S @ Q)))
    assert bool((residual <= 1e-12 * torch.linalg.matrix_norm(S)).all())
    assert bool((above > below).all())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        float(S[0, 0, 0])


def test_split_falls_back_where_the_cut_divides_equal_values():
    S = torch.where(torch.arange(256) < 131, 1.0, 0.1)
    found = split(planted(256, 256, S), rank=192, method="spectral")
    assert found.method == "gram"
    assert found.energy == pytest.approx((131 + 61 * 0.01) / (131 + 125 * 0.01))


def test_split_by_energy_keeps_at_least_that_share():
    W = gaussian(128, 200)
    found = split(W, energy=0.9, part="high", method="spectral")
    exact = split(W, energy=0.9, part="high", method="svd")
    assert found.method == "spectral"
    assert found.energy >= 0.9
    assert exact.rank <= found.rank <= exact.rank + 0.1 * 128
    assert abs(found.rank - 2 * found.rank_error - exact.rank) <= 3 * found.rank_error + 1
    assert 0 < found.rank_error <= 0.05 * 128
    assert exact.rank_error == 0


@pytest.mark.parametrize("group", [2**26, 1])
@pytest.mark.parametrize("part", ["low", "high"])
def test_a_batch_is_as_its_matrices_and_only_what_is_off_is_done_again(monkeypatch, part, group):
    monkeypatch.setattr(methods, "GROUP_ELEMENTS", group)
    equal = planted(96, 128, torch.where(torch.arange(96) < 40, 1.0, 0.1))
    W = torch.stack([gaussian(96, 128), equal, spiked(96)[:, :128]])
    found = split(W, rank=60, part=part, method="spectral")
    assert found.method == "spectral and gram"
    for index in (0, 2):
        exact = split(W[index], rank=60, part=part, method="svd")
        for B, C in ((found.U[index], exact.U), (found.V[index], exact.V)):
            assert float((B - C @ (C.T @ B)).norm()) <= 1e-9
    again = split(W[1], rank=60, part=part, method="gram")
    assert float((found.U[1] - again.U @ (again.U.T @ found.U[1])).norm()) <= 1e-9
    assert split(W[::2], rank=60, part=part, method="spectral").method == "spectral"


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6])
def test_right_vectors_stay_apart_however_small_the_trailing_values(smallest):
    W = planted(96, 128, torch.logspace(0, torch.tensor(smallest).log10(), 96))
    high, low = (split(W, rank=48, part=part, method="spectral") for part in ("high", "low"))
    for B, D in ((high.U, low.U), (high.V, low.V)):
        both = torch.cat([B, D], -1)
        defect = float((both.T @ both - torch.eye(96, dtype=W.dtype)).abs().max())
        assert defect <= 50 * 2.0**-52 * 96**0.5

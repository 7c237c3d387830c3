"""Right bases from left ones: what is zero up to rounding, and what is measured by probes."""

from __future__ import annotations

import pytest
import torch
from spectra import planted

from sculpt_kernels import split
from sculpt_kernels.subspaces import methods, right_basis


@pytest.fixture(autouse=True, params=[0, 2**30], ids=["products", "direct"])
def direct(request, monkeypatch):
    """Small matrices are treated like large ones, and like small ones."""
    monkeypatch.setattr(right_basis, "DIRECT", request.param)
    return request.param


EYE = {k: torch.eye(k, dtype=torch.float64) for k in (60, 90, 96)}


def of_rank(k: int, n: int, rank: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Singular values between 2 and 1, then zeros."""
    S = torch.zeros(k, dtype=torch.float64)
    S[:rank] = torch.linspace(2, 1, rank)
    if kind == "dense":
        return planted(k, n, S).to(dtype)
    W = torch.zeros(k, n, dtype=dtype)
    # Singular vectors that are unit vectors, the right ones in the last columns.
    W[torch.arange(k), torch.arange(n - k, n).flip(0)] = S.to(dtype)
    return W


def assert_parts(W: torch.Tensor, h: int, method: str = "gram") -> None:
    k = min(W.shape)
    high, low = (split(W, rank=h, part=part, method=method) for part in ("high", "low"))
    bound = 50 * torch.finfo(W.dtype).eps * k**0.5
    for B, D in ((high.U, low.U), (high.V, low.V)):
        both = torch.cat([B, D], -1).double()
        assert both.shape[-1] == k
        assert float((both.T @ both - EYE[k]).abs().max()) <= bound
    exact = W.double()
    whole = float(torch.linalg.matrix_norm(exact))
    values = torch.linalg.svdvals(exact)
    best = float(torch.linalg.vector_norm(values[:h]))
    captured = float(torch.linalg.matrix_norm(high.U.double().T @ exact @ high.V.double()))
    assert captured >= best * (1 - 1e-6)
    # What the trailing part holds: no more than the values it is for.
    rest = float(torch.linalg.vector_norm(values[h:]))
    for image in (low.U.double().T @ exact, exact @ low.V.double()):
        assert float(torch.linalg.matrix_norm(image)) <= rest + bound * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "unit vectors"])
@pytest.mark.parametrize(("m", "n"), [(90, 130), (96, 96), (130, 90)])
@pytest.mark.parametrize(
    ("rank", "h"), [(40, 20), (40, 40), (40, 70), (40, 89), (89, 60), (1, 0), (88, 89)]
)
def test_exact_rank(m, n, rank, h, kind, dtype):
    W = of_rank(min(m, n), max(m, n), rank, kind, dtype)
    assert_parts(W if m <= n else W.T, h)


@pytest.mark.parametrize("h", [0, 30, 60])
def test_no_value_at_all(h):
    assert_parts(torch.zeros(60, 80), h)


def test_trailing_part_of_a_matrix_of_lower_rank_costs_no_qr(direct, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a Householder QR")

    W = of_rank(90, 130, 40, "dense", torch.float32)
    if not direct:
        monkeypatch.setattr(torch.linalg, "qr", refuse)
    for h in (20, 40, 70):
        split(W, rank=h, method="gram")


def test_dependent_unit_vectors_are_noticed(monkeypatch):
    """Rows that look alike to the choice of columns: all of one length, and yet unit vectors."""
    W = torch.zeros(60, 60)
    W[:30, :30] = torch.eye(30)
    chosen = []
    real = right_basis.completion
    monkeypatch.setattr(torch.Tensor, "argsort", lambda X, **keywords: torch.arange(60))
    monkeypatch.setattr(
        right_basis, "completion", lambda *given: chosen.append(real(*given)) or chosen[-1]
    )
    assert_parts(W, 40)
    assert chosen == [None, None]


def test_a_batch_of_different_ranks():
    W = torch.stack([of_rank(60, 80, rank, "dense", torch.float32) for rank in (20, 50)])
    high, low = (split(W, rank=30, part=part, method="gram") for part in ("high", "low"))
    for B, D in ((high.U, low.U), (high.V, low.V)):
        both = torch.cat([B, D], -1).double()
        assert float((both.mT @ both - EYE[60]).abs().max()) <= 50 * 1.2e-7 * 60**0.5


def eigen(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, U = torch.linalg.eigh(W @ W.mT)
    return U.flip(-1), values.flip(-1).clamp_min(0)


@pytest.mark.parametrize("small", [0, 2**30])
@pytest.mark.parametrize(
    ("tail", "expected"),
    [([], 90), ([0.0] * 50, 40), ([1e-5] + [0.0] * 49, 90), ([1e-5] * 50, 90), ([0.3], 90)],
)
def test_numerical_rank(tail, expected, small, monkeypatch):
    monkeypatch.setattr(right_basis, "SMALL", small)
    S = torch.cat([torch.linspace(2, 1, 90 - len(tail)), torch.tensor(tail)])
    W = planted(90, 130, S).float()
    assert right_basis.numerical_rank(W, *eigen(W)) == expected
    assert right_basis.numerical_rank(torch.stack([W, W]), *eigen(torch.stack([W, W]))) == expected


@pytest.mark.parametrize("small", [0, 2**30])
@pytest.mark.parametrize(("share", "expected"), [(0.1, True), (4.0, False)])
def test_apart_sees_one_pair_of_columns(share, expected, small, monkeypatch):
    monkeypatch.setattr(right_basis, "SMALL", small)
    W = planted(90, 130, torch.linspace(2, 1, 90))
    U, squares = eigen(W)
    V = (W.T @ U) / squares.sqrt()
    B = V[:, 60:].clone()
    eps = torch.finfo(torch.float64).eps
    assert right_basis.apart(W, U[:, :60], squares[:60], B, 24)
    B[:, 7] += share * 24 * eps * 90**0.5 * V[:, 31]
    assert right_basis.apart(W, U[:, :60], squares[:60], B, 24) is expected


def test_bases_agree_where_trailing_columns_are_mostly_noise():
    """Products of square Gaussian factors: small values, then one that is zero."""
    g = torch.Generator().manual_seed(18)
    L, R = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((60, 59), (59, 60)))
    W = (L @ R).float()
    for h in (5, 45, 53, 56, 59):
        assert_parts(W, h)


@pytest.mark.parametrize("exponent", range(1, 14, 2))
def test_equal_small_values_on_both_sides_of_the_cut(exponent):
    S = torch.ones(60, dtype=torch.float64)
    S[20:] = 10.0**-exponent
    assert_parts(planted(60, 80, S), 40)


@pytest.mark.parametrize("skipped", [True, False])
def test_leading_directions_are_taken_out_where_they_are_found(skipped, monkeypatch):
    """Values that span a factor of 12: more rounding than allowed for, unmeasured."""
    cleaned = []
    real = right_basis.without_leading
    monkeypatch.setattr(
        right_basis, "without_leading", lambda *given: cleaned.append(1) or real(*given)
    )
    if not skipped:
        monkeypatch.setattr(right_basis, "ALLOWED", 1e-3)
    W = planted(96, 140, torch.linspace(1, 0.08, 96)).float()
    assert_parts(W, 72)
    assert bool(cleaned) is not skipped


def test_a_dense_cut_is_separated_in_a_window_of_its_size(monkeypatch):
    monkeypatch.setattr(methods, "WINDOW", 4)
    monkeypatch.setattr(methods, "WINDOW_SHARE", 1 / 8)
    S = torch.linspace(2, 1, 96).double()
    # Ten values above the cut within what float32 does not tell apart, all of them different.
    S[62:72] = S[72] + torch.linspace(4e-6, 4e-7, 10)
    W = planted(96, 140, S).float()
    calls = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda X: calls.append(X.shape[-1]) or real(X))
    low = split(W, rank=72, part="low", method="gram")
    assert calls == [96, 20 + methods.LEAST_WINDOW]
    U, _, _ = torch.linalg.svd(W.double())
    assert float((U[:, :72].T @ low.U.double()).abs().max()) <= 1e-2

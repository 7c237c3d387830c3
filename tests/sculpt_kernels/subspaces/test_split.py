"""split: captured energy, orthonormality, complement, ranks by energy; leak."""

from __future__ import annotations

import pytest
import torch
from spectra import SPECTRA, planted

from sculpt_kernels import leak, reference, split


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["gram", "svd", "spectral"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(40, 40), (64, 24), (80, 120)])
def test_parts_are_orthonormal_complementary_and_optimal(method, spectrum, m, n, dtype):
    k = min(m, n)
    S = SPECTRA[spectrum](k).double()
    W = planted(m, n, S).to(dtype)
    h = k // 2
    high = split(W, rank=h, part="high", method=method)
    low = split(W, rank=h, part="low", method=method)
    assert (high.U.shape, high.V.shape) == ((m, h), (n, h))
    assert (low.U.shape, low.V.shape) == ((m, k - h), (n, k - h))
    eps = torch.finfo(dtype).eps
    bound = 50 * eps * k**0.5
    for B, D in ((high.U, low.U), (high.V, low.V)):
        both = torch.cat([B, D], -1).double()
        assert float((both.T @ both - torch.eye(k, dtype=torch.float64)).abs().max()) <= bound
        assert B.is_contiguous()
    # The best rank-h share of the energy, from the exact spectrum of the rounded matrix.
    squares = torch.linalg.svdvals(W.double()).square()
    best = float(squares[:h].sum())
    captured = float((high.U.double().T @ W.double() @ high.V.double()).square().sum())
    assert captured >= (1 - 1e-6) * best
    if best > 0:
        assert high.energy == pytest.approx(best / float(squares.sum()), abs=2 * k * eps)


def test_gram_agrees_with_the_reference_where_the_gap_is_wide():
    S = torch.cat([torch.linspace(2, 1.5, 10), torch.linspace(0.5, 0.1, 14)])
    W = planted(24, 40, S)
    low = split(W, rank=10, part="low", method="gram")
    U, V = reference.split(W, 10, "low")
    assert float((low.U @ low.U.T - U @ U.T).abs().max()) <= 1e-12
    assert float((low.V @ low.V.T - V @ V.T).abs().max()) <= 1e-12


@pytest.mark.parametrize("part", ["high", "low"])
def test_float32_gram_turns_to_float64_where_float32_does_not_resolve_the_cut(part):
    # Squared, the values at the cut are 1e-9 of the largest: lost in a float32 Gram matrix.
    W = planted(48, 64, torch.logspace(0, -6, 48)).float()
    found = split(W, rank=36, part=part, method="gram")
    U, V = reference.split(W.double(), 36, part)
    for B, exact in ((found.U, U), (found.V, V)):
        cosines = (exact.T @ B.double()).square().sum() / B.shape[1]
        assert float(1 - cosines) <= 1e-4


@pytest.mark.parametrize("part", ["high", "low"])
def test_a_ritz_step_separates_what_float32_mixes_at_the_cut(part, monkeypatch):
    """A gap that float32 does not resolve, but few values nearby: no second decomposition."""
    S = torch.linspace(2, 1, 200).double()
    S[150] = S[149] * (1 - 1e-6)
    W = planted(200, 260, S).float()
    monkeypatch.setattr(torch.Tensor, "double", lambda X: count(X))
    whole = []
    real = torch.Tensor.to

    def count(X):
        whole.append(tuple(X.shape))
        return real(X, torch.float64)

    found = split(W, rank=150, part=part, method="gram")
    # The long side once, with the vectors of the window; no Gram matrix of its own.
    assert set(whole) == {(200, 16), (260, 200)}
    monkeypatch.undo()
    U, V = reference.split(W.double(), 150, part)
    for B, exact in ((found.U, U), (found.V, V)):
        assert float((B.double() - exact @ (exact.T @ B.double())).norm()) <= 1e-3


def test_gram_is_not_done_twice_for_a_cut_that_rounding_decides(monkeypatch):
    calls = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda S: calls.append(S.dtype) or real(S))
    equal = planted(150, 200, torch.where(torch.arange(150) < 50, 1.0, 0.2)).float()
    split(equal, rank=100, method="gram")
    assert calls == [torch.float32, torch.float64]  # the second one within the window
    calls.clear()
    split(planted(150, 200, torch.logspace(0, -6, 150)).float(), rank=100, method="gram")
    assert calls == [torch.float32, torch.float64, torch.float64]


@pytest.mark.parametrize("method", ["gram", "svd", "spectral"])
@pytest.mark.parametrize("nonzero", [0, 3, 10, 40])
def test_columns_that_are_exactly_zero(nonzero, method):
    W = torch.zeros(80, 90)
    W.diagonal()[:nonzero] = torch.arange(nonzero, 0, -1).float()
    parts = [split(W, rank=3, part=part, method=method) for part in ("high", "low")]
    for side in ("U", "V"):
        both = torch.cat([getattr(found, side) for found in parts], -1)
        torch.testing.assert_close(both.T @ both, torch.eye(80), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("spiked", [False, True])
def test_right_bases_of_both_parts_are_orthogonal_at_any_condition(dtype, smallest, spiked):
    k = 160
    S = torch.logspace(0, torch.tensor(smallest).log10(), k).double()
    if spiked:
        S[:3] *= 10
    W = planted(k, 200, S).to(dtype)
    high, low = (split(W, rank=120, part=part, method="gram") for part in ("high", "low"))
    bound = 50 * torch.finfo(dtype).eps * k**0.5
    for B, D in ((high.U, low.U), (high.V, low.V)):
        both = torch.cat([B, D], -1).double()
        assert float((both.T @ both - torch.eye(k, dtype=torch.float64)).abs().max()) <= bound


@pytest.mark.parametrize("method", ["gram", "svd", "spectral", "range"])
def test_a_matrix_and_its_transpose_agree(method):
    S = torch.cat([torch.linspace(2, 1.5, 60), torch.linspace(0.01, 0.005, 20)])
    W = planted(80, 120, S).float()
    one, two = (split(X, rank=60, method=method) for X in (W, W.T))
    assert one.rank == two.rank
    assert one.energy == pytest.approx(two.energy, abs=1e-6)
    assert float((one.U @ one.U.T - two.V @ two.V.T).abs().max()) <= 1e-5
    assert float((one.V @ one.V.T - two.U @ two.U.T).abs().max()) <= 1e-5


@pytest.mark.parametrize("method", ["gram", "svd", "spectral", "range"])
@pytest.mark.parametrize("rank", [0, 1, 23, 24])
def test_bounds_of_the_rank(rank, method):
    W = planted(24, 40, SPECTRA["power law"](24))
    low = split(W, rank=rank, method=method)
    high = split(W, rank=rank, part="high", method=method)
    assert low.U.shape[1] == 24 - rank
    assert high.V.shape[1] == rank
    assert (high.energy == 0.0) == (rank == 0)
    assert (high.energy == pytest.approx(1.0, abs=1e-12)) == (rank == 24)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999])
def test_energy_gives_the_smallest_rank(energy):
    squares = (SPECTRA["power law"](32).double()) ** 2
    W = planted(32, 48, squares.sqrt())
    found = split(W, energy=energy)
    share = squares.cumsum(0) / squares.sum()
    assert share[found.rank - 1] >= energy - 1e-12
    assert found.rank == 1 or share[found.rank - 2] < energy
    assert found.energy >= energy - 1e-12


@pytest.mark.parametrize("method", ["gram", "svd", "spectral", "range"])
@pytest.mark.parametrize("rank", [0, 2, 4])
def test_zero_matrix_keeps_all_its_energy_at_any_rank(rank, method):
    found = split(torch.zeros(6, 4), rank=rank, method=method)
    assert found.energy == 1.0
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(4 - rank))


@pytest.mark.parametrize("method", ["gram", "svd", "spectral", "range"])
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_a_single_row_or_column(shape, method):
    W = torch.randn(*shape)
    assert split(W, rank=1, method=method).U.shape == (shape[0], 0)
    low = split(W, rank=0, method=method)
    torch.testing.assert_close((low.U @ (low.U.T @ W @ low.V) @ low.V.T), W)


def test_batch_is_split_matrix_by_matrix():
    W = torch.stack(
        [planted(12, 20, SPECTRA["power law"](12)), planted(12, 20, SPECTRA["steep"](12))]
    )
    both = split(W.unsqueeze(0), rank=5)
    assert both.U.shape == (1, 2, 12, 7)
    for index in range(2):
        one = split(W[index], rank=5)
        U = both.U[0, index]
        assert float((U @ U.T - one.U @ one.U.T).abs().max()) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_get_float32_bases(dtype):
    low = split(torch.randn(10, 14).to(dtype), rank=4)
    assert low.U.dtype == low.V.dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"W": torch.ones(3, 4, dtype=torch.int32), "rank": 1}, TypeError, "int32"),
        ({"W": torch.ones(4), "rank": 1}, ValueError, "shape"),
        ({"W": torch.zeros(0, 4), "rank": 0}, ValueError, "empty"),
        ({"rank": 5}, ValueError, r"min\(m, n\) = 3; got 5"),
        ({"rank": -1}, ValueError, "got -1"),
        ({"rank": 2.0}, TypeError, "2.0"),
        ({"rank": True}, TypeError, "True"),
        ({"energy": 1}, TypeError, "float"),
        ({"energy": 1.0}, ValueError, "strictly between"),
        ({"rank": 1, "energy": 0.5}, ValueError, "exactly one"),
        ({}, ValueError, "exactly one"),
        ({"rank": 1, "part": "middle"}, ValueError, "'low', 'high'"),
        ({"rank": 1, "method": "magic"}, ValueError, "'gram'"),
        ({"W": torch.full((3, 4), float("inf")), "rank": 1}, ValueError, "12 NaN or infinite"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    arguments = {"W": torch.ones(3, 4), **kwargs}
    with pytest.raises(error, match=message):
        split(arguments.pop("W"), **arguments)


def test_leak_of_known_updates():
    U, V = torch.eye(4, dtype=torch.float64)[:, :1], torch.eye(5, dtype=torch.float64)[:, :2]
    delta = torch.zeros(4, 5, dtype=torch.float64)
    delta[0, 0], delta[0, 4], delta[3, 1], delta[2, 3] = 1.0, 2.0, 2.0, 4.0
    found = leak(delta, U, V)
    assert found.core == pytest.approx(1 / 5)
    assert found.left == pytest.approx(5**0.5 / 5)
    assert found.right == pytest.approx(5**0.5 / 5)
    assert found.strict == found.left


def test_leak_takes_the_worst_of_a_batch_and_zero_leaks_nothing():
    U, V = torch.eye(3)[:, :1], torch.eye(3)[:, :1]
    delta = torch.zeros(2, 3, 3)
    assert leak(delta, U, V).left == 0.0
    delta[1, 0, 2] = 1.0
    assert leak(delta, U, V).left == pytest.approx(1.0)
    assert leak(delta, U, V).core == 0.0
    with pytest.raises(ValueError, match="delta must be finite"):
        leak(delta / 0, U, V)

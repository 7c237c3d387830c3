"""Sketch, range finder, randomized SVD and quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import SPECTRA, planted

from sculpt_kernels import range_finder, rsvd, split
from sculpt_kernels.subspaces.quadrature import density
from sculpt_kernels.subspaces.sketch import sketch

CPU = torch.device("cpu")


def test_sketch_depends_on_position_alone():
    whole = sketch(40, 30, 7, dtype=torch.float32, device=CPU)
    shard = sketch(10, 11, 7, row0=20, dtype=torch.float64, device=CPU)
    assert torch.equal(shard.float(), whole[20:30, :11])
    assert not torch.equal(whole, sketch(40, 30, 8, dtype=torch.float32, device=CPU))
    # Philox of counter 0 and key 0, a published test vector.
    first = sketch(1, 4, 0, dtype=torch.bfloat16, device=CPU)[0] + 16
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert first.tolist() == [bin(word).count("1") for word in words]


def test_sketch_has_the_moments_of_a_normal_variable():
    x = sketch(1000, 1000, 3, dtype=torch.float64, device=CPU) / math.sqrt(8)
    n = x.numel()
    assert abs(float(x.mean())) < 5 / math.sqrt(n)
    assert abs(float(x.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(x.pow(4).mean()) - (3 - 1 / 16)) < 5 * math.sqrt(96 / n)
    correlation = float((x[:, :-1] * x[:, 1:]).mean())
    assert abs(correlation) < 5 / math.sqrt(n)


@pytest.mark.parametrize("rank", [0, 1, 5, 24])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24)])
def test_exactly_low_rank_matrices_are_recovered(rank, m, n):
    S = torch.where(torch.arange(24) < rank, torch.arange(24, 0, -1), 0).double()
    A = planted(m, n, S)
    U, values, V = rsvd(A, rank)
    assert (U.shape, values.shape, V.shape) == ((m, rank), (rank,), (n, rank))
    torch.testing.assert_close(values, S[:rank], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(U * values @ V.T, A, rtol=0, atol=1e-11)
    Q = range_finder(A, rank)
    torch.testing.assert_close(Q @ (Q.T @ A), A, rtol=0, atol=1e-11)


@pytest.mark.parametrize("spectrum", ["power law", "flat with spikes", "steep"])
def test_mean_error_is_within_the_bound_of_theorem_10_5(spectrum):
    """`E ‖A - QQᵀA‖_F <= (1 + r / (p - 1))^½ (Σ_{j>r} σ_j²)^½` (Halko, Martinsson, Tropp 2011)."""
    S = SPECTRA[spectrum](60).double()
    A = planted(60, 80, S)
    r, p = 10, 6
    tail = float(S[r:].square().sum().sqrt())
    errors = []
    for seed in range(20):
        Q = torch.linalg.qr(A @ sketch(80, r + p, seed, dtype=A.dtype, device=CPU)).Q
        errors.append(float(torch.linalg.norm(A - Q @ (Q.T @ A))))
    assert sum(errors) / len(errors) <= math.sqrt(1 + r / (p - 1)) * tail
    for power_iters, factor in ((0, math.sqrt(1 + r / (p - 1))), (2, 1.2)):
        Q = range_finder(A, r, oversample=p, power_iters=power_iters)
        # Cut back to r columns, the triangle inequality adds at most the optimal error once.
        error = float(torch.linalg.norm(A - Q @ (Q.T @ A)))
        assert error <= (factor + (power_iters == 0)) * tail


def test_power_iterations_and_seeds():
    A = planted(80, 100, SPECTRA["power law"](80))
    captured = [float(rsvd(A, 16, power_iters=q)[1].square().sum()) for q in (0, 1, 2, 4)]
    assert captured == sorted(captured)
    assert captured[-1] <= float(SPECTRA["power law"](80)[:16].double().square().sum())
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, same, other = (rsvd(A, 16, power_iters=0, generator=g)[0] for g in seeds)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_batch_is_as_its_matrices():
    A = torch.stack([planted(20, 30, SPECTRA[name](20)) for name in ("power law", "steep")])
    U, S, V = rsvd(A, 4)
    for index in range(2):
        one = rsvd(A[index], 4)
        torch.testing.assert_close(S[index], one[1])
        torch.testing.assert_close(U[index] @ U[index].T, one[0] @ one[0].T)
        torch.testing.assert_close(V[index] @ V[index].T, one[2] @ one[2].T)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rank": 5}, ValueError, r"between 0 and min\(m, n\) = 4; got 5"),
        ({"rank": 1.5}, TypeError, "rank must be an int"),
        ({"rank": 2, "power_iters": -1}, ValueError, "power_iters must be an int of at least 0"),
        ({"rank": 2, "oversample": 0.5}, ValueError, "oversample must be an int of at least 0"),
        ({"rank": 2, "A": torch.full((4, 6), math.nan)}, ValueError, "24 NaN or infinite"),
        ({"rank": 2, "A": torch.ones(4, 6, dtype=torch.int8)}, TypeError, "int8"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    arguments = {"A": torch.ones(4, 6), **kwargs}
    for function in (rsvd, range_finder):
        with pytest.raises(error, match=message):
            function(arguments["A"], **{k: v for k, v in arguments.items() if k != "A"})


@pytest.mark.parametrize("spectrum", ["power law", "flat with spikes"])
def test_range_split_measures_what_it_captures(spectrum):
    S = SPECTRA[spectrum](96).double()
    W = planted(96, 128, S)
    high = split(W, rank=6, part="high", method="range")
    low = split(W, rank=6, part="low", method="range")
    captured = float((high.U.T @ W @ high.V).square().sum() / W.square().sum())
    assert high.method == "range"
    assert high.converged
    assert high.energy == pytest.approx(captured, abs=1e-9)
    assert captured >= 0.95 * float(S[:6].square().sum() / S.square().sum())
    for B, D in ((high.U, low.U), (high.V, low.V)):
        both = torch.cat([B, D], -1)
        torch.testing.assert_close(both.T @ both, torch.eye(96, dtype=W.dtype), rtol=0, atol=1e-12)


def test_range_split_by_energy_reaches_it_or_says_so():
    W = planted(64, 80, SPECTRA["steep"](64))
    found = split(W, energy=0.99, part="high", method="range")
    exact = split(W, energy=0.99, part="high", method="svd")
    assert found.converged
    assert found.energy >= 0.99
    assert exact.rank <= found.rank <= exact.rank + 1


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_quadrature_counts_eigenvalues_and_energy(spectrum):
    k = 128
    S = SPECTRA[spectrum](k).double()
    W = planted(k, k, S)
    found = density(W @ W.T, seed=1)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(10, dtype=W.dtype))
    squares = S.square()
    if spectrum == "power law":
        for count in (8, 32, 64, 100):
            at = found.threshold(torch.tensor(float(count), dtype=W.dtype))
            assert abs(int((squares > at).sum()) - count) <= 0.05 * k
    if spectrum == "flat with spikes":
        share = squares.cumsum(0) / squares.sum()
        exact = int((share < 0.9).sum()) + 1
        rank, error = found.rank_for(0.9)
        assert abs(float(rank) - exact) <= 3 * float(error)
        assert float(error) <= 0.1 * k


def test_squares_neither_overflow_nor_vanish():
    W = planted(12, 16, SPECTRA["power law"](12)).float()
    for scale in (1e30, 1e-30):
        found = split(W * scale, rank=5, method="gram")
        torch.testing.assert_close(found.U @ found.U.T, (U := split(W, rank=5).U) @ U.T)

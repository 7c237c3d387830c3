"""Stochastic rounding: the generator's published vectors, unbiased, the same bits in any panels."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import basis, gaussian

from sculpt_kernels import expand_add_, products
from sculpt_kernels.rounding import philox4x32, random_bits, stochastic_round

LOW = (torch.bfloat16, torch.float16)


# The known-answer vectors of the Random123 distribution for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, want):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == want


def test_bits_are_laid_out_as_documented():
    seed = 0x0123456789ABCDEF
    bits = random_bits(3, 20, seed)
    groups = 3
    for row, column in ((0, 0), (0, 7), (1, 8), (2, 19)):
        counter = row * groups + column // 8
        words = philox4x32(
            (torch.tensor([counter]), *(torch.zeros(1, dtype=torch.int64) for _ in range(3))),
            (seed & 0xFFFFFFFF, seed >> 32),
        )
        lane = column % 8
        word = int(words[lane // 2])
        assert int(bits[row, column]) == (word >> 16 if lane % 2 else word & 0xFFFF)


def test_bits_of_rows_are_those_of_the_whole():
    whole = random_bits(9, 21, 7)
    for top, rows in ((0, 9), (3, 4), (8, 1)):
        assert torch.equal(random_bits(rows, 21, 7, top), whole[top : top + rows])


def test_rows_beyond_32_bits_have_their_own_bits():
    far = random_bits(1, 8, 3, row0=2**33)
    assert not torch.equal(far, random_bits(1, 8, 3, row0=0))
    assert not torch.equal(far, random_bits(1, 8, 3, row0=2**32))


def test_negative_and_tensor_seeds():
    for seed in (-1, 2**62, 0):
        assert torch.equal(random_bits(2, 9, seed), random_bits(2, 9, torch.tensor(seed)))
    assert not torch.equal(random_bits(2, 9, 1), random_bits(2, 9, 1 + 2**32))


@pytest.mark.parametrize("dtype", LOW)
def test_values_of_the_dtype_stay(dtype):
    x = gaussian(40, 50, dtype=dtype)
    specials = [0.0, -0.0, math.inf, -math.inf, 2.0**-24 if dtype == torch.float16 else 2.0**-130]
    x[0, : len(specials)] = torch.tensor(specials, dtype=dtype)
    for seed in range(4):
        rounded = stochastic_round(x.float(), dtype, seed)
        assert torch.equal(rounded.view(torch.int16), x.view(torch.int16))
    x = torch.full((2, 9), math.nan)
    assert stochastic_round(x, dtype, 0).isnan().all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("scale", [1.0, 3e-4, 2e-6])
def test_result_is_a_neighbour_and_the_mean_is_unbiased(dtype, scale):
    x = (gaussian(32, 48, dtype=torch.float32) * scale).clamp(-6e4, 6e4)
    draws = 600
    total = torch.zeros(32, 48, dtype=torch.float64)
    for seed in range(draws):
        y = stochastic_round(x, dtype, seed)
        total += y.double()
        if seed < 3:
            nearest = x.to(dtype)
            spacing = (torch.nextafter(nearest, torch.full_like(nearest, math.inf)).double()
                       - nearest.double()).abs()  # fmt: skip
            assert ((y.double() - x.double()).abs() < 2 * spacing).all()
            assert not torch.equal(y, nearest)
    # Each draw misses by at most one spacing; the mean of all elements' errors, in units of the
    # spacing, has deviation below 1 / (2 sqrt(draws * elements)).
    nearest = x.to(dtype).double().abs()
    digits = 8 if dtype == torch.bfloat16 else 11
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    spacing = (2.0 ** (nearest.clamp_min(1e-30).log2().floor() - digits + 1)).clamp_min(smallest)
    errors = (total / draws - x.double()) / spacing
    assert abs(float((errors * x.sign()).mean())) < 5 * 0.5 / math.sqrt(draws * x.numel()) + 2e-4
    assert float(errors.abs().max()) < 6 * 0.5 / math.sqrt(draws)


@pytest.mark.parametrize("dtype", LOW)
def test_same_seed_same_bits_whatever_the_panels(dtype, monkeypatch):
    m, n, r = 30, 37, 5
    W = gaussian(m, n, dtype=dtype)
    U, V = basis(m, r, dtype=dtype), basis(n, r, dtype=dtype)
    C = gaussian(r, r, dtype=torch.float32) * 1e-2
    monkeypatch.setattr(products, "PANEL_ELEMENTS", 1)
    # Without coordinates the sum is `base` itself, so only the random bits can differ.
    base = gaussian(m, n, dtype=torch.float32)
    sums, copies = [], []
    for rows in (1, 7, 30, 1000):
        monkeypatch.setattr(products, "PANEL_ROWS", rows)
        options = {"rounding": "stochastic", "seed": 11}
        copies.append(expand_add_(W.clone(), 0 * C, U, V, base=base, **options))
        sums.append(expand_add_(W.clone(), C, U, V, **options))
    want = stochastic_round(base, dtype, 11)
    assert all(torch.equal(copy, want) for copy in copies)
    # A sum may differ in the last bit of float32 where a panel has another shape.
    assert all((other != sums[0]).double().mean() < 1e-2 for other in sums[1:])
    again = expand_add_(W.clone(), C, U, V, rounding="stochastic", seed=torch.tensor(11))
    assert torch.equal(again, sums[-1])
    other = expand_add_(W.clone(), C, U, V, rounding="stochastic", seed=12)
    assert (other != sums[-1]).double().mean() > 0.05


def test_rounding_refuses_dtypes_that_need_none():
    with pytest.raises(TypeError, match="which needs none"):
        stochastic_round(torch.zeros(2, 2), torch.float32, 0)

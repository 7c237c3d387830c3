"""compress, expand_add_: values in every dtype and layout, rounding, base, scalars."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import DTYPES, EPS, basis, error, gaussian
from torch.utils.flop_counter import FlopCounterMode

from sculpt_kernels import compress, expand_add_, expand_add_many_, products, reference

SHAPES = [(33, 47, 5, 9), (47, 33, 11, 4), (40, 40, 40, 40), (1, 7, 1, 2), (300, 20, 8, 8)]
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    monkeypatch.setattr(products, "PANEL_ELEMENTS", 256)
    monkeypatch.setattr(products, "PANEL_ROWS", 8)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def views(X):
    """The matrix as it is, transposed in memory, and as part of a larger one."""
    yield X.clone()
    yield X.mT.clone(memory_format=torch.contiguous_format).mT
    larger = X.new_full((*X.shape[:-2], X.shape[-2] + 2, 2 * X.shape[-1]), math.nan)
    part = larger[..., 1:-1, ::2]
    yield part.copy_(X)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress(dtype):
    for m, n, r, s in SHAPES:
        G, U, V = gaussian(m, n, dtype=dtype), basis(m, r, dtype=dtype), basis(n, s, dtype=dtype)
        want = reference.compress(G.double(), U.double(), V.double())
        # Accumulated in float32 or better: the error is one of sums, relative to the whole matrix.
        limit = 8 * math.sqrt(max(m, n)) * EPS[wide(dtype)] * float(G.double().norm())
        for X in views(G):
            got = compress(X, U.T.contiguous().T, V, out_dtype=wide(dtype))
            assert got.shape == (r, s)
            assert float((got.double() - want).norm()) <= limit
        assert compress(G, U, V).dtype == torch.float32
        rounded = compress(G, U, V, out_dtype=torch.bfloat16)
        assert error(rounded, want) <= 2 * EPS[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_batches_and_empty_ranks(dtype):
    G = gaussian(2, 3, 9, 13, dtype=dtype)
    U, V = basis(9, 4, 2, 3, dtype=dtype), basis(13, 5, dtype=dtype)
    got = compress(G, U, V)
    torch.testing.assert_close(got, (U.double().mT @ G.double() @ V.double()).float())
    assert compress(G, U[..., :0], V).shape == (2, 3, 0, 5)
    assert torch.equal(compress(G[..., :0], U, V[:0, :0]), torch.zeros(2, 3, 4, 0))


@pytest.mark.parametrize("base_kind", ["none", "same", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_add(dtype, base_kind):
    for m, n, r, s in SHAPES:
        W, U, V = gaussian(m, n, dtype=dtype), basis(m, r, dtype=dtype), basis(n, s, dtype=dtype)
        C = gaussian(r, s, dtype=torch.float32, seed=5)
        base = {"none": None, "same": W + 1, "wide": gaussian(m, n, dtype=wide(dtype), seed=6)}[
            base_kind
        ]
        start = W if base is None else base
        want = reference.expand_add(start.double(), C.double(), U.double(), V.double(), -0.25)
        limit = EPS[dtype] + 16 * math.sqrt(max(r, s)) * EPS[wide(dtype)]
        for X in views(W):
            for alpha in (-0.25, torch.tensor(-0.25)):
                if base is not None:
                    X.fill_(math.nan)  # must not be read
                else:
                    X.copy_(W)
                assert expand_add_(X, C, U, V, alpha=alpha, base=base) is X
                assert error(X, want) <= limit


@pytest.mark.parametrize("missing", ["U", "V"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_basis_is_the_identity(dtype, missing):
    """The same as with the identity written out, whatever the layout, the base and the batch."""
    for m, n, r, _ in SHAPES:
        W = gaussian(2, m, n, dtype=dtype)
        size, other = (m, n) if missing == "U" else (n, m)
        B = basis(other, min(r, other), dtype=wide(dtype))
        C = gaussian(2, size, B.shape[1], dtype=torch.float32, seed=3)
        eye = torch.eye(size, dtype=B.dtype)
        U, V, core = (None, B, C) if missing == "U" else (B, None, C.mT)
        want = reference.expand_add(
            W.double(),
            core.double(),
            (eye if U is None else U).double(),
            (eye if V is None else V).double(),
            0.5,
        )
        limit = EPS[dtype] + 16 * math.sqrt(B.shape[1]) * EPS[wide(dtype)]
        for X in views(W):
            X.copy_(W)
            assert error(expand_add_(X, core, U, V, alpha=0.5), want) <= limit
        poisoned = torch.full_like(W, math.nan)
        assert error(expand_add_(poisoned, core, U, V, alpha=0.5, base=W), want) <= limit
        if dtype in LOW:
            drawn = [
                expand_add_(W.clone(), core, *bases, rounding="stochastic", seed=7)
                for bases in ((U, V), (eye if U is None else U, eye if V is None else V))
            ]
            assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="U and V must not both be None"):
        expand_add_(W, torch.zeros(m, n), None, None)
    with pytest.raises(
        ValueError, match=rf"C must have shape .*{'r' if missing == 'U' else 's'} ="
    ):
        expand_add_(W, core[..., :-1, :] if missing == "U" else core[..., :-1], U, V)


@pytest.mark.parametrize("dtype", LOW)
def test_expand_add_with_float32_bases_rounds_once(dtype):
    W = gaussian(31, 45, dtype=dtype)
    U, V = basis(31, 6, dtype=torch.float32), basis(45, 6, dtype=torch.float32)
    C = gaussian(6, 6, dtype=torch.float32)
    want = reference.expand_add(W.double(), C.double(), U.double(), V.double())
    got = expand_add_(W.clone(), C, U, V)
    assert (got == want.to(dtype)).double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_add_without_coordinates(dtype):
    W = gaussian(6, 8, dtype=dtype)
    U, V = torch.zeros(6, 0, dtype=dtype), basis(8, 3, dtype=dtype)
    C = torch.zeros(0, 3)
    assert torch.equal(expand_add_(W.clone(), C, U, V), W)
    base = gaussian(6, 8, dtype=wide(dtype), seed=3)
    assert torch.equal(expand_add_(W.clone(), C, U, V, base=base), base.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(300, 40), (40, 300)])
def test_expand_add_takes_the_cheaper_order(m, n, dtype):
    r = 8
    W, U, V = gaussian(m, n, dtype=dtype), basis(m, r, dtype=dtype), basis(n, r, dtype=dtype)
    with FlopCounterMode(display=False) as counted:
        expand_add_(W, gaussian(r, r, dtype=torch.float32), U, V, backend="torch")
    # The product that goes into W in place is not counted, and is the same in both orders.
    assert counted.get_total_flops() == 2 * r * r * min(m, n)


@pytest.mark.parametrize("dtype", LOW)
def test_expand_add_batches_have_their_own_random_bits(dtype):
    W = torch.zeros(3, 9, 14, dtype=dtype)
    U, V = basis(9, 4, dtype=dtype), basis(14, 4, dtype=dtype)
    C = gaussian(4, 4, dtype=torch.float32)
    got = expand_add_(W, C, U, V, rounding="stochastic", seed=1)
    assert not torch.equal(got[0], got[1])
    exact = (U.double() @ C.double() @ V.double().T).expand(3, 9, 14)
    assert ((got.double() - exact).abs() <= 2 * EPS[dtype] * exact.abs() + 1e-7).all()


def test_small_steps_survive_stochastic_rounding_and_not_nearest():
    """A step below half a spacing of bfloat16 is lost by nearest and kept on average."""
    m = n = 32
    U, V = basis(m, m, dtype=torch.float32), basis(n, n, dtype=torch.float32)
    W0 = torch.ones(m, n, dtype=torch.bfloat16)
    C = U.T @ torch.full((m, n), 2.0**-11) @ V
    near, random = W0.clone(), W0.clone()
    for step in range(64):
        expand_add_(near, C, U, V)
        expand_add_(random, C, U, V, rounding="stochastic", seed=step)
    assert torch.equal(near, W0)
    moved = float((random.double() - 1).mean())
    assert moved == pytest.approx(64 * 2.0**-11, rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_weights_as_one_by_one(dtype):
    shapes = SHAPES[:3]
    stochastic = dtype in LOW
    Ws = [gaussian(m, n, dtype=dtype) for m, n, _, _ in shapes]
    Us = [basis(m, r, dtype=wide(dtype)) for m, _, r, _ in shapes]
    Vs = [basis(n, s, dtype=wide(dtype)) for _, n, _, s in shapes]
    Cs = [gaussian(r, s, dtype=torch.float32) for _, _, r, s in shapes]
    bases = [gaussian(m, n, dtype=dtype, seed=4) for m, n, _, _ in shapes]
    seeds = torch.tensor([3, 2**40, -1]) if stochastic else None
    options = {"rounding": "stochastic"} if stochastic else {}
    for starts in (None, bases):
        expected = []
        for i, W in enumerate(Ws):
            seed = {} if seeds is None else {"seed": seeds[i]}
            base = None if starts is None else starts[i]
            one = expand_add_(
                W.clone(), Cs[i], Us[i], Vs[i], alpha=0.5, base=base, **seed, **options
            )
            expected.append(one)
        got = [W.clone() for W in Ws]
        expand_add_many_(got, Cs, Us, Vs, alpha=0.5, bases=starts, seeds=seeds, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    expand_add_many_([], [], [], [])


def test_many_weights_are_checked_before_any_is_changed():
    Ws = [gaussian(6, 5), gaussian(6, 5, seed=1)]
    before = [W.clone() for W in Ws]
    Us, Vs, Cs = [basis(6, 2)] * 2, [basis(5, 3)] * 2, [gaussian(2, 3)] * 2
    with pytest.raises(ValueError, match="matrix 1: C must have shape"):
        expand_add_many_(Ws, [Cs[0], Cs[0].T], Us, Vs)
    with pytest.raises(ValueError, match=r"Cs must have 2 entries, one for each of Ws; got 1"):
        expand_add_many_(Ws, Cs[:1], Us, Vs)
    with pytest.raises(ValueError, match=r"seeds must have shape \(2,\)"):
        expand_add_many_(Ws, Cs, Us, Vs, seeds=torch.tensor(3))
    with pytest.raises(ValueError, match="overlapping matrices 0 and 1"):
        expand_add_many_([Ws[0], Ws[0]], Cs, Us, Vs)
    with pytest.raises(ValueError, match="matrix 0: seed is only for"):
        expand_add_many_(Ws, Cs, Us, Vs, seeds=torch.tensor([1, 2]))
    assert all(torch.equal(a, b) for a, b in zip(Ws, before, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_compress_undoes_expand(m, n, share, dtype, seed):
    r, s = round(share[0] * m), round(share[1] * n)
    U, V = basis(m, r, dtype=dtype, seed=seed), basis(n, s, dtype=dtype, seed=seed + 1)
    C = gaussian(r, s, dtype=wide(dtype), seed=seed)
    W = expand_add_(torch.zeros(m, n, dtype=dtype), C, U, V)
    back = compress(W, U, V, out_dtype=wide(dtype))
    assert float((back - C).norm()) <= 8 * EPS[dtype] * math.sqrt(m + n) * float(C.norm()) + 1e-30

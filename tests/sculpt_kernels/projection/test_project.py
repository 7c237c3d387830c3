"""project, project_: values in every form, dtype and layout against dense float64 projectors."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import COMPLEMENTS, DTYPES, EPS, FORMS, basis, error, gaussian, projected, sides

from bench.memory import peak
from sculpt_kernels import products as ways
from sculpt_kernels import project, project_, project_many_

SHAPES = [(33, 47), (47, 33), (40, 40), (1, 7), (7, 1), (300, 20)]
CASES = [(form, complement) for form in FORMS for complement in COMPLEMENTS[form]]


def bound(dtype, m, n, r, s):
    """Rounding of the result and of four intermediates, and of sums of up to `depth` terms.

    Projectors do not enlarge an error, so the parts add up, each half a rounding in the root mean
    square; sums are accumulated in float32 or better, their error grows like the root of their
    length.
    """
    wide = torch.promote_types(dtype, torch.float32)
    depth = max(m, n, r, s, 1)
    return 2.5 * EPS[dtype] + 16 * math.sqrt(depth) * EPS[wide]


def chain(G, U, V, form):
    """torch's own best lines, in the dtype of the arguments."""
    G = G.clone()
    if form == "core":
        return G.addmm_(U @ (U.T @ (G @ V)), V.T, alpha=-1)
    if form in ("strict", "left"):
        G.addmm_(U, U.T @ G, alpha=-1)
    if form in ("strict", "right"):
        G.addmm_(G @ V, V.T, alpha=-1)
    return G


def multiply_fast(monkeypatch, fast):
    for name in ("project", "small"):
        module = importlib.import_module(f"sculpt_kernels.projection.{name}")
        monkeypatch.setattr(module, "has_fast_products", lambda *_: fast)


@pytest.fixture(params=["library products", "converted panels"])
def products(request, monkeypatch):
    """Both ways of multiplying low precision, whatever this processor is good at."""
    multiply_fast(monkeypatch, request.param == "library products")
    monkeypatch.setattr(ways, "PANEL_ELEMENTS", 512)
    monkeypatch.setattr(ways, "PANEL_ROWS", 8)
    monkeypatch.setattr(ways, "VIEW_ROWS", 16)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "complement"), CASES)
def test_values(form, complement, dtype, products):
    for seed, (m, n) in enumerate(SHAPES):
        r, s = (max(1, m // 4), max(1, n // 3)) if (m + n) % 2 else (max(1, m // 2), n // 5)
        G = gaussian(m, n, dtype=dtype, seed=seed)
        U, V = sides(form, basis(m, r, dtype=dtype), basis(n, s, dtype=dtype))
        want = projected(G, U, V, form, complement)
        scale = float(G.double().norm() / want.norm()) if float(want.norm()) else 1.0
        limit = bound(dtype, m, n, r, s) * max(1.0, scale)
        got = G.clone()
        assert project_(got, U, V, form=form, complement=complement) is got
        assert error(got, want) <= limit, (m, n)
        before = G.clone()
        fresh = project(G, U, V, form=form, complement=complement)
        assert fresh.dtype == dtype
        assert error(fresh, want) <= limit
        assert torch.equal(G, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_not_less_accurate_than_torch(form, dtype, products):
    for m, n, r in ((96, 160, 24), (160, 96, 48)):
        G = gaussian(m, n, dtype=dtype)
        U, V = sides(form, basis(m, r, dtype=dtype), basis(n, r, dtype=dtype))
        want = projected(G, U, V, form)
        own = error(project(G, U, V, form=form), want)
        assert own <= 2 * error(chain(G, U, V, form), want) + EPS[dtype] / 8


def layouts(X):
    """The same matrix behind different strides, each with the buffer it lives in."""
    m, n = X.shape
    plain = X.clone()
    yield "contiguous", plain, plain
    turned = X.T.contiguous()
    yield "transposed", turned.T, turned
    wide = X.new_full((m + 3, n + 5), 7.0)
    wide[1 : m + 1, 2 : n + 2] = X
    yield "sliced", wide[1 : m + 1, 2 : n + 2], wide
    sparse = X.new_full((2 * m, 3 * n), 7.0)
    sparse[::2, ::3] = X
    yield "every other", sparse[::2, ::3], sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "complement"), CASES)
def test_any_strides_and_nothing_beside_the_matrix_changes(form, complement, dtype, products):
    m, n, r, s = 37, 26, 9, 7
    G = gaussian(m, n, dtype=dtype)
    U0, V0 = basis(m, r, dtype=dtype), basis(n, s, dtype=dtype)
    want = projected(G, *sides(form, U0, V0), form, complement)
    limit = bound(dtype, m, n, r, s) * max(1.0, float(G.double().norm() / want.norm()))
    for name, view, buffer in layouts(G):
        for _, U, _ in layouts(U0):
            for _, V, _ in layouts(V0):
                view.copy_(G)
                project_(view, *sides(form, U, V), form=form, complement=complement)
                assert error(view, want) <= limit, name
        rest = buffer.numel() - view.numel()
        assert int((buffer == 7.0).sum()) >= rest, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("form", "complement"), CASES)
def test_batches_with_own_and_shared_bases(form, complement, dtype, products):
    m, n = 12, 15
    G = gaussian(2, 3, m, n, dtype=dtype)
    for U, V in (
        (basis(m, 4, 2, 3, dtype=dtype), basis(n, 5, 2, 3, dtype=dtype)),
        (basis(m, 4, dtype=dtype), basis(n, 5, dtype=dtype)),
        (basis(m, 4, dtype=dtype), basis(n, 5, 2, 3, dtype=dtype)),
    ):
        A, B = sides(form, U, V)
        got = project(G, A, B, form=form, complement=complement)
        view = G.transpose(0, 1).contiguous().transpose(0, 1)
        project_(view, A, B, form=form, complement=complement)
        for i in range(2):
            for j in range(3):
                a, b = (X[i, j] if X is not None and X.ndim == 4 else X for X in (A, B))
                want = projected(G[i, j], a, b, form, complement)
                limit = bound(dtype, m, n, 4, 5) * max(1.0, float(G[i, j].norm() / want.norm()))
                assert error(got[i, j], want) <= limit
                assert error(view[i, j], want) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "complement"), CASES)
def test_rank_zero_one_and_full(form, complement, dtype, products):
    m, n = 10, 14
    G = gaussian(m, n, dtype=dtype)
    for r, s in ((0, 0), (0, 3), (3, 0), (1, 1), (m, 5), (5, n), (m, n)):
        U, V = sides(form, basis(m, r, dtype=dtype), basis(n, s, dtype=dtype))
        want = projected(G, U, V, form, complement)
        got = project(G, U, V, form=form, complement=complement)
        difference = float((got.double() - want).norm() / G.double().norm())
        assert difference <= bound(dtype, m, n, r, s), (r, s)
        if complement == "none" and r == s == 0:
            assert torch.equal(got, G)


def test_empty_matrices():
    for m, n in ((0, 5), (5, 0), (0, 0)):
        G = torch.zeros(m, n)
        for form in FORMS:
            U, V = sides(form, torch.zeros(m, 0), torch.zeros(n, 0))
            assert project_(G, U, V, form=form).shape == (m, n)
    batch = torch.zeros(0, 4, 5)
    assert project(batch, basis(4, 2).float(), basis(5, 2).float()).shape == (0, 4, 5)


@pytest.mark.parametrize("panel", [1, 3, 10, 1000])
def test_panel_edges(panel, monkeypatch):
    monkeypatch.setattr(ways, "PANEL_ELEMENTS", 1)
    monkeypatch.setattr(ways, "PANEL_ROWS", panel)
    monkeypatch.setattr(ways, "VIEW_ROWS", panel)
    for dtype in (torch.float32, torch.float16):
        G = gaussian(19, 23, dtype=dtype)
        U, V = basis(19, 4, dtype=dtype), basis(23, 5, dtype=dtype)
        for form, complement in CASES:
            bases = sides(form, U, V)
            want = projected(G, *bases, form, complement)
            scale = max(1.0, float(G.double().norm() / want.norm()))
            for X in (G.clone(), G.T.contiguous().T):
                got = project_(X, *bases, form=form, complement=complement)
                assert error(got, want) <= bound(dtype, 19, 23, 4, 5) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_converted_panels_round_once(form, dtype, monkeypatch):
    """In float32 until the end: off the rounded truth only where that lies between two values."""
    multiply_fast(monkeypatch, False)
    m, n = 64, 80
    G, U, V = gaussian(m, n, dtype=dtype), basis(m, 20, dtype=dtype), basis(n, 20, dtype=dtype)
    want = projected(G, *sides(form, U, V), form)
    got = project(G, *sides(form, U, V), form=form)
    assert (got == want.to(dtype)).double().mean() > 0.99


sizes = st.integers(1, 24)


@settings(max_examples=60, deadline=None)
@given(
    m=sizes,
    n=sizes,
    ranks=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    case=st.sampled_from(CASES),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_is_an_orthogonal_projection(m, n, ranks, case, dtype, seed):
    form, complement = case
    r, s = round(ranks[0] * m), round(ranks[1] * n)
    U, V = sides(form, basis(m, r, dtype=dtype, seed=seed), basis(n, s, dtype=dtype, seed=seed + 1))
    # Rounded bases are orthonormal up to their rounding, and so are projections by them.
    tolerance = 12 * EPS[dtype] * math.sqrt(max(r, s, 1)) + 1e-14

    def P(X):
        return project(X, U, V, form=form, complement=complement)

    G, H = gaussian(m, n, dtype=dtype, seed=seed), gaussian(m, n, dtype=dtype, seed=seed + 2)
    PG, PH = P(G), P(H)
    size = float(G.double().norm())
    both = size * float(H.double().norm())

    def norm(X):
        return float(X.double().norm())

    # Idempotent, self-adjoint, linear, never longer.
    assert norm(P(PG).double() - PG.double()) <= tolerance * size
    inner = (PG.double() * H.double()).sum() - (G.double() * PH.double()).sum()
    assert abs(float(inner)) <= tolerance * both
    combined = P((2 * G.double() - H.double()).to(dtype))
    parts = 2 * PG.double() - PH.double()
    assert norm(combined.double() - parts) <= tolerance * (2 * size + norm(H))
    assert norm(PG) <= (1 + tolerance) * size
    # What is removed is gone, what is kept is untouched.
    left, right = (None if B is None else B.double() for B in (U, V))
    removed = PG.double()
    if form != "right":
        part = left @ (left.T @ removed)
        removed_left = removed - part if complement in ("left", "both") else part
    if form != "left":
        part = (removed @ right) @ right.T
        removed_right = removed - part if complement in ("right", "both") else part
    if form in ("strict", "left"):
        assert norm(removed_left) <= tolerance * size
    if form in ("strict", "right"):
        assert norm(removed_right) <= tolerance * size
    if form == "core":
        part = (removed_left @ right) @ right.T
        inside = removed_left - part if complement in ("right", "both") else part
        assert norm(inside) <= tolerance * size
    allowed = projected(G, U, V, form, complement).to(dtype)
    assert norm(P(allowed).double() - allowed.double()) <= tolerance * size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_temporary_of_the_size_of_the_matrix(form, dtype, monkeypatch):
    multiply_fast(monkeypatch, False)
    m, n, r = 1536, 2048, 384
    G = gaussian(m, n, dtype=dtype)
    U, V = sides(form, basis(m, r, dtype=dtype), basis(n, r, dtype=dtype))
    taken = peak(lambda: project_(G, U, V, form=form))
    wide = 4 * m * n
    assert taken.largest <= wide / 2
    assert taken.total <= 0.9 * wide


def test_nan_in_the_matrix_is_the_callers_and_passes():
    G = gaussian(6, 8, dtype=torch.float32)
    G[2, 3] = math.nan
    project_(G, basis(6, 2, dtype=torch.float32), basis(8, 2, dtype=torch.float32))
    assert G.isnan().any()


def test_many_matches_one_by_one():
    shapes = [(12, 20), (20, 12), (12, 20), (8, 8), (12, 20)]
    for form, complement in CASES:
        Gs = [gaussian(m, n, seed=i) for i, (m, n) in enumerate(shapes)]
        Us = [None if form == "right" else basis(m, 3, seed=i) for i, (m, _) in enumerate(shapes)]
        Vs = [None if form == "left" else basis(n, 4, seed=i) for i, (_, n) in enumerate(shapes)]
        want = [
            project(G, U, V, form=form, complement=complement)
            for G, U, V in zip(Gs, Us, Vs, strict=True)
        ]
        project_many_(Gs, Us, Vs, form=form, complement=complement)
        for G, expected in zip(Gs, want, strict=True):
            torch.testing.assert_close(G, expected)
    project_many_([], [], [])
    G = gaussian(6, 9)
    project_many_([G], [basis(6, 2)], None, form="left")

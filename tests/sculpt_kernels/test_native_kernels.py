"""The native kernels against the reference, against torch's bits, and against themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from matrices import EPS, FORMS, basis, error, gaussian, sides
from torch import Tensor

from sculpt_kernels import expand_add_, native, native_backend, project_adamw_, reference
from sculpt_kernels.rounding import stochastic_round

pytestmark = pytest.mark.usefixtures("library")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Ragged, thin, wide, one row, one column, more than one tile of 256 x 512 each way.
SHAPES = [(21, 34), (34, 21), (1, 5), (7, 1), (300, 40), (40, 1030), (270, 540)]
OPTIONS: dict[str, Any] = {
    "lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "step": 4
}  # fmt: skip


@pytest.fixture(params=["rows", "blas"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Torch's products of row-major panels, and what there is without them."""
    if request.param == "blas":
        monkeypatch.setattr(native.Library, "row_gemm", lambda *_: 0)
    return str(request.param)


def ranks(m: int, n: int) -> list[tuple[int, int]]:
    k = min(m, n)
    return [(0, 0), (1, 1), (min(5, m), min(3, n)), (k, k)]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_expand_add(m: int, n: int, dtype: torch.dtype) -> None:
    for r, s in ranks(m, n):
        W, C = gaussian(m, n, dtype=dtype), gaussian(r, s, dtype=FP32, seed=3)
        U, V = basis(m, r, dtype=dtype), basis(n, s, dtype=dtype)
        want = reference.expand_add(*(X.double() for X in (W, C, U, V)), alpha=0.5)
        torchs, ours = (
            error(expand_add_(W.clone(), C, U, V, alpha=0.5, backend=backend), want)
            for backend in ("torch", "native")
        )
        assert ours <= 2 * torchs + EPS[FP32]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("project", ["update", "gradient"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_project_adamw(m: int, n: int, form: str, project: str) -> None:
    for (r, s), basis_dtype, state_dtype in (
        *((rs, FP32, FP32) for rs in ranks(m, n)),
        (ranks(m, n)[2], BF16, FP32),
        (ranks(m, n)[2], FP16, BF16),
    ):
        U, V = sides(form, basis(m, r, dtype=basis_dtype), basis(n, s, dtype=basis_dtype))
        W, exp_avg, exp_avg_sq = (gaussian(m, n, dtype=state_dtype, seed=i) for i in range(3))
        exp_avg_sq.square_().add_(0.1)  # a step divides by its root
        G = gaussian(m, n, dtype=basis_dtype, seed=7)
        wide = [X if X is None else X.double() for X in (W, G, exp_avg, exp_avg_sq, U, V)]
        want = reference.project_adamw(*wide, form=form, project=project, **OPTIONS)
        errors = {}
        for backend in ("torch", "native"):
            w, g, a, b = (X.clone() for X in (W, G, exp_avg, exp_avg_sq))
            copy = torch.full_like(W, float("nan"), dtype=BF16)
            project_adamw_(
                w, g, a, b, U, V, form=form, project=project, copy=copy, backend=backend,
                **OPTIONS,
            )  # fmt: skip
            assert torch.equal(g, G)
            errors[backend] = [error(X, Y) for X, Y in zip((w, a, b), want, strict=True)]
            errors[backend].append(error(copy, want[0]))
        for ours, torchs in zip(errors["native"], errors["torch"], strict=True):
            assert ours <= 2 * torchs + 8 * EPS[FP32]


def projected(G: Tensor, U: Tensor, V: Tensor, form: str) -> Tensor:
    """The first moment of a step without memory: the projected gradient itself."""
    state = [torch.zeros(G.shape), G, torch.zeros(G.shape), torch.zeros(G.shape)]
    project_adamw_(
        *state, U, V, form=form, project="gradient", betas=(0.0, 0.0), lr=0.0, step=1,
        backend="native",
    )  # fmt: skip
    return state[2]


@pytest.mark.parametrize("form", ["core", "strict"])
@pytest.mark.parametrize("n", [530, 531])
def test_bfloat16_products_lose_nothing(form: str, n: int) -> None:
    G = gaussian(40, n, dtype=BF16)
    for dtype in (BF16, FP32):  # bases that are bfloat16 numbers, and bases that are none
        U, V = basis(40, 6, dtype=dtype), basis(n, 5, dtype=dtype)
        want = reference.project(*(X.double() for X in (G, U, V)), form)
        assert error(projected(G, U.float(), V.float(), form), want) <= 8 * EPS[FP32]
        strided = torch.zeros(40, 2 * n, dtype=BF16)[:, ::2].copy_(G)
        assert error(projected(strided, U, V, form), want) <= 8 * EPS[FP32]


def test_products_are_left_to_the_blas_where_torch_has_none(
    library: native.Library,
) -> None:
    G, U, V = gaussian(40, 70, dtype=BF16), basis(40, 6, dtype=BF16), basis(70, 5, dtype=BF16)
    want = projected(G, U, V, "core")
    torch._C._set_mkldnn_enabled(False)
    try:
        assert library.row_gemm(FP32) == library.row_gemm(BF16) == 0
        assert error(projected(G, U, V, "core"), want.double()) <= 8 * EPS[FP32]
    finally:
        torch._C._set_mkldnn_enabled(True)


def exact_case(dtype: torch.dtype, *batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Small integers, so that every order of summation gives the same float32 total."""
    generator = torch.Generator().manual_seed(5)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).double()

    W = gaussian(*batch, 37, 45).mul(64).round().div(8).to(dtype)
    U, V = whole(*batch, 37, 4).to(dtype), whole(*batch, 45, 6).to(dtype)
    return W, whole(*batch, 4, 6).float() / 2**13, U, V


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("seed", [0, 2**63 + 11, -5])
def test_stochastic_rounding_has_the_bits_of_torch(dtype: torch.dtype, seed: int) -> None:
    for batch in ((), (2, 3)):
        W, C, U, V = exact_case(dtype, *batch)
        ours, torchs, nearest = (
            expand_add_(W.clone(), C, U, V, backend=backend, **options)
            for backend, options in (
                ("native", {"rounding": "stochastic", "seed": seed}),
                ("torch", {"rounding": "stochastic", "seed": seed}),
                ("torch", {}),
            )
        )
        assert torch.equal(ours, torchs)
        assert not torch.equal(ours, nearest)


@pytest.mark.parametrize("target", ["W", "copy"])
def test_the_step_is_rounded_stochastically_where_asked(target: str) -> None:
    # Moments of zero and powers of two leave a step that is exact in every order.
    W = gaussian(2, 9, 70, dtype=BF16 if target == "W" else FP32)
    zero, U, V = torch.zeros(2, 9, 70), basis(9, 0, dtype=FP32), basis(70, 0, dtype=FP32)
    results = []
    for backend in ("native", "torch"):
        w, copy = W.clone(), torch.zeros_like(W, dtype=BF16) if target == "copy" else None
        project_adamw_(
            w, zero, zero.clone(), zero.clone(), U, V, lr=2.0**-4, weight_decay=2.0**-4, step=1,
            copy=copy, rounding="stochastic", seed=9, backend=backend,
        )  # fmt: skip
        results.append((w, w if copy is None else copy))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)


def test_a_step_is_made_of_the_moments_that_are_stored() -> None:
    W, exp_avg, exp_avg_sq = torch.zeros(3, 20), torch.zeros(3, 20, dtype=BF16), torch.zeros(3, 20)
    G, U, V = torch.full((3, 20), 1 + 2.0**-10), torch.zeros(3, 0), torch.zeros(20, 0)
    project_adamw_(
        W, G, exp_avg, exp_avg_sq, U, V, project="gradient", lr=1.0, betas=(0.0, 0.0), eps=0.0,
        step=1, backend="native",
    )  # fmt: skip
    torch.testing.assert_close(W, -exp_avg.float() / G, rtol=2e-7, atol=0)  # 1 is stored, not G


def special_values() -> Tensor:
    """All kinds of float32: ties, subnormals of every dtype, both ends, infinities, NaN."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(-(2**31), 2**31, (3000,), generator=generator).to(torch.int32)
    every = torch.arange(2**16, dtype=torch.int32)
    decoded = [every.to(torch.int16).view(dtype).float() for dtype in (BF16, FP16)]
    ties = [x + (x.abs() * 2.0**-9) for x in decoded] + [x + (x.abs() * 2.0**-12) for x in decoded]
    small = torch.linspace(-1e-4, 1e-4, 4001)
    return torch.cat([raw.view(FP32), *decoded, *ties, small, torch.tensor([65519.0, 65520.0])])


def converted(library: native.Library, x: Tensor, out: Tensor, seed: int | None) -> Tensor:
    rounding = native.Rounding(0, 0 if seed is None else seed, int(seed is not None))
    library.round(native.describe(out), native.describe(x), *out.shape, rounding)
    return out


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_conversions_are_those_of_torch(
    dtype: torch.dtype, library: native.Library, isa: str
) -> None:
    x = special_values()[None].repeat(2, 1)
    torch.testing.assert_close(
        converted(library, x, torch.empty_like(x, dtype=dtype), None), x.to(dtype),
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip
    low = x.to(dtype)
    back = converted(library, low, torch.empty_like(x), None)
    torch.testing.assert_close(back, low.float(), rtol=0, atol=0, equal_nan=True)
    if dtype == FP32:
        return
    ours = converted(library, x, torch.empty_like(x, dtype=dtype), 77)
    torchs = stochastic_round(x, dtype, 77)
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)


def run_everything() -> list[Tensor]:
    """Results of both operations on values with many roundings."""
    results = []
    for m, n, form in ((700, 1100, "core"), (1100, 700, "core"), (521, 600, "strict")):
        U, V = basis(m, 33, dtype=FP32), basis(n, 29, dtype=FP32)
        W = gaussian(m, n, dtype=BF16)
        C = gaussian(33, 29, dtype=FP32)
        results.append(expand_add_(W, C, U, V, rounding="stochastic", seed=4, backend="native"))
        for project in ("update", "gradient"):
            state = [gaussian(m, n, dtype=FP32, seed=i) for i in range(4)]
            state[3].square_()
            project_adamw_(*state, U, V, form=form, project=project, backend="native", **OPTIONS)
            results += state
    return results


@pytest.mark.usefixtures("threads", "products")
def test_threads_and_panels_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    want = run_everything()
    for count, rows in itertools.product((1, 2, 5), (0, 96, 320)):
        torch.set_num_threads(count)
        monkeypatch.setattr(native_backend, "PANEL_ROWS", rows)
        for got, expected in zip(run_everything(), want, strict=True):
            assert torch.equal(got, expected), f"{count} threads, panels of {rows} rows"


def test_instruction_sets_change_no_bit(library: native.Library, isa: str) -> None:
    got = run_everything()
    library.use_isa("scalar")
    for ours, scalar in zip(got, run_everything(), strict=True):
        assert torch.equal(ours, scalar)


def test_strides_of_every_kind() -> None:
    m, n = 40, 30
    U, V = basis(m, 4, dtype=FP32).t().contiguous().t(), basis(60, 8, dtype=FP32)[::2, ::2]
    C = gaussian(4, 4, dtype=FP32).t()
    plain = gaussian(m, n, dtype=BF16)
    buffer = torch.zeros(2 * m, 3 * n, dtype=BF16)
    column_major = plain.t().contiguous().t()
    view = buffer[::2, 1::3]
    view.copy_(plain)
    before = buffer.clone()
    want = expand_add_(plain.clone(), C, U, V, backend="native")
    assert torch.equal(expand_add_(column_major, C, U, V, backend="native"), want)
    assert torch.equal(expand_add_(view, C, U, V, backend="native"), want)
    before[::2, 1::3] = want
    assert torch.equal(buffer, before)


def test_no_temporary_of_the_size_of_the_matrix(library: native.Library) -> None:
    m = n = 4096
    r = 128
    W, U, V = (torch.empty(shape, dtype=FP32) for shape in ((m, n), (m, r), (n, r)))
    products = native_backend._products(W, U, V, "core")
    library.workspace(products)
    tiles = products.threads * 520 * 520
    assert products.workspace_floats <= 3 * m * r + r * r + tiles


STATES = {
    "float32": (FP32, FP32, FP32),
    "bfloat16 gradients": (FP32, BF16, BF16),
    "float16 gradients": (FP32, FP16, FP16),
    "bfloat16": (BF16, BF16, BF16),
}


@pytest.mark.parametrize("project", ["gradient", "update"])
@pytest.mark.parametrize("state", STATES)
def test_auto_takes_the_step(state: str, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(native_backend, "project_adamw_", lambda *_, **__: calls.append("native"))
    kept, gradient, bases = STATES[state]
    W, exp_avg, exp_avg_sq = (torch.zeros(16, 24, dtype=kept) for _ in range(3))
    G = gaussian(16, 24, dtype=gradient)
    U, V = basis(16, 2, dtype=bases), basis(24, 3, dtype=bases)
    options: dict[str, Any] = {"project": project, "lr": 1e-3, "step": 1}
    for form in FORMS:
        project_adamw_(W, G, exp_avg, exp_avg_sq, *sides(form, U, V), form=form, **options)
    assert calls == ["native"] * len(FORMS)
    # What it does not do at all, or not fast: complements, float64, rows with gaps.
    project_adamw_(W, G, exp_avg, exp_avg_sq, U, V, complement="left", **options)
    project_adamw_(*(X.double() for X in (W, G, exp_avg, exp_avg_sq, U, V)), **options)
    project_adamw_(W.t(), G.t(), exp_avg.t(), exp_avg_sq.t(), V, U, **options)
    assert calls == ["native"] * len(FORMS)


def test_auto_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(native_backend, "expand_add_", lambda *_: calls.append("native"))
    W, C = gaussian(16, 16, dtype=BF16), gaussian(2, 2, dtype=FP32)
    U, V = basis(16, 2, dtype=BF16), basis(16, 2, dtype=BF16)
    expand_add_(W, C, U, V, rounding="stochastic", seed=1)
    expand_add_(W, C, U, V)
    assert calls == ["native", "native"]
    expand_add_(*(X.float() for X in (W, C, U, V)))
    expand_add_(W.t(), C, U, V, rounding="stochastic", seed=1)
    wide = [X.double() for X in (W, C, U, V)]
    expand_add_(*wide)
    assert calls == ["native", "native"]
    with pytest.raises(RuntimeError, match="no float64"):
        expand_add_(*wide, backend="native")
    with pytest.raises(RuntimeError, match="need both bases"):
        expand_add_(W, gaussian(16, 2, dtype=FP32), None, V, backend="native")

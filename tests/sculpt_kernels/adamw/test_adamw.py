"""project_adamw_: the documented formulas, torch's AdamW as the special case, exactness."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from matrices import COMPLEMENTS, EPS, FORMS, basis, error, gaussian, sides

from sculpt_kernels import leak, products, project_adamw_, reference

CASES = [(form, complement) for form in FORMS for complement in COMPLEMENTS[form]]
OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "step": 4}
NAMES = ("W", "G", "exp_avg", "exp_avg_sq")


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    monkeypatch.setattr(products, "PANEL_ELEMENTS", 64)
    monkeypatch.setattr(products, "PANEL_ROWS", 8)


def state(*shape, dtypes=(torch.float64,) * 4, seed=0):
    tensors = [gaussian(*shape, dtype=dtype, seed=seed + i) for i, dtype in enumerate(dtypes)]
    tensors[3].square_()
    return tensors


@pytest.mark.parametrize("project", ["update", "gradient"])
@pytest.mark.parametrize(("form", "complement"), CASES)
@pytest.mark.parametrize(("m", "n"), [(21, 34), (34, 21)])
def test_formulas(m, n, form, complement, project):
    U, V = sides(form, basis(m, 5), basis(n, 7))
    given = state(m, n)
    want = reference.project_adamw(
        *given, U, V, form=form, complement=complement, project=project, **OPTIONS
    )
    W, G, exp_avg, exp_avg_sq = (X.clone() for X in given)
    result = project_adamw_(
        W, G, exp_avg, exp_avg_sq, U, V,
        form=form, complement=complement, project=project, **OPTIONS,
    )  # fmt: skip
    assert result is W
    assert torch.equal(G, given[1])
    for got, expected in zip((W, exp_avg, exp_avg_sq), want, strict=True):
        assert error(got, expected) <= 1e-13


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_without_ranks_it_is_torch_adamw(project):
    m, n = 17, 26
    W, _, exp_avg, exp_avg_sq = state(m, n)
    exp_avg.zero_()
    exp_avg_sq.zero_()
    parameter = torch.nn.Parameter(W.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    U, V = basis(m, 0), basis(n, 0)
    for step in range(1, 6):
        gradient = gaussian(m, n, seed=step)
        parameter.grad = gradient.clone()
        optimizer.step()
        project_adamw_(
            W, gradient, exp_avg, exp_avg_sq, U, V,
            project=project, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, step=step,
        )  # fmt: skip
    torch.testing.assert_close(W, parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["core", "strict"])
def test_update_is_exact_where_gradient_leaks(form):
    m, n, r = 40, 60, 20
    U, V = basis(m, r, dtype=torch.float32), basis(n, r, dtype=torch.float32)
    moved = {}
    for project in ("update", "gradient"):
        W, _, exp_avg, exp_avg_sq = state(m, n, dtypes=(torch.float32,) * 4)
        start = W.clone()
        exp_avg.zero_()
        exp_avg_sq.zero_()
        for step in range(1, 4):
            G = gaussian(m, n, dtype=torch.float32, seed=step)
            project_adamw_(
                W, G, exp_avg, exp_avg_sq, U, V,
                form=form, project=project, lr=1e-1, step=step,
                weight_decay=0.1 if project == "update" else 0.0,  # which leaks of itself
            )  # fmt: skip
        found = leak(W - start, U, V)
        moved[project] = found.core if form == "core" else found.strict
    assert moved["update"] < 1e-5
    assert 0.1 < moved["gradient"] < 0.4


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_scalars_may_be_tensors(project):
    m, n = 9, 14
    U, V = basis(m, 3), basis(n, 4)
    plain, tensors = state(m, n), state(m, n)
    project_adamw_(*plain, U, V, project=project, **OPTIONS)
    project_adamw_(
        *tensors, U, V, project=project,
        lr=torch.tensor(3e-2, dtype=torch.float64),
        betas=(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64)),
        eps=torch.tensor(1e-6, dtype=torch.float64),
        weight_decay=torch.tensor(0.1, dtype=torch.float64),
        step=torch.tensor(4),
    )  # fmt: skip
    for a, b in zip(plain, tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("project", ["update", "gradient"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32, torch.float32, torch.float16),
    ],
)
def test_mixed_precision(dtypes, project):
    m, n = 24, 50
    given = state(m, n, dtypes=dtypes[:4])
    U, V = basis(m, 6, dtype=dtypes[4]), basis(n, 8, dtype=dtypes[4])
    want = reference.project_adamw(
        *(X.double() for X in given), U.double(), V.double(),
        form="strict", project=project, **OPTIONS,
    )  # fmt: skip
    copy = torch.full((m, n), math.nan, dtype=torch.bfloat16)
    W, G, exp_avg, exp_avg_sq = (X.clone() for X in given)
    project_adamw_(
        W, G, exp_avg, exp_avg_sq, U, V, form="strict", project=project, copy=copy, **OPTIONS
    )
    for X, expected in zip((W, exp_avg, exp_avg_sq), want, strict=True):
        # The step is computed from moments as they are stored, so their rounding enters too.
        limit = 2 * max(EPS[X.dtype], EPS[exp_avg.dtype]) + 1e-6
        assert error(X, expected) <= limit
    if dtypes[0] != torch.float16:
        assert torch.equal(copy, W.bfloat16())
    assert error(copy, want[0]) <= 2 * EPS[torch.bfloat16]


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_stochastic_rounding_of_the_copy_or_of_the_weights(shape, monkeypatch):
    m, n = shape
    U, V = basis(m, 4, dtype=torch.float32), basis(n, 4, dtype=torch.float32)
    results = []
    for rows in (1, 8, 100):
        monkeypatch.setattr(products, "PANEL_ROWS", rows)
        monkeypatch.setattr(products, "PANEL_ELEMENTS", 1)
        tensors = state(m, n, dtypes=(torch.float32,) * 4)
        copy = torch.zeros(m, n, dtype=torch.bfloat16)
        options = OPTIONS | {"rounding": "stochastic", "seed": 9, "form": "core"}
        project_adamw_(*tensors, U, V, copy=copy, **options)
        results.append((tensors[0], copy))
    for W, copy in results[1:]:
        torch.testing.assert_close(W, results[0][0])
        # Sums of another order may fall on the other side of a rounding threshold, rarely.
        assert (copy != results[0][1]).double().mean() < 1e-2
    W, copy = results[0]
    from sculpt_kernels.rounding import stochastic_round

    assert torch.equal(copy, stochastic_round(W, torch.bfloat16, 9))
    alone = state(m, n, dtypes=(torch.bfloat16, *(torch.float32,) * 3))
    before = alone[0].clone()
    project_adamw_(*alone, U, V, **(OPTIONS | {"lr": 1e-5, "rounding": "stochastic", "seed": 2}))
    changed = (alone[0] != before).double().mean()
    assert 0 < changed < 0.2


def test_batches_and_strides():
    m, n = 8, 11
    U, V = basis(m, 3), basis(n, 2, 2)
    given = state(2, m, n)
    want = [reference.project_adamw(*(X[i] for X in given), U, V[i], **OPTIONS) for i in range(2)]
    views = [X.mT.contiguous().mT for X in given]
    project_adamw_(*views, U, V, **OPTIONS)
    for i in range(2):
        for got, expected in zip((views[0], views[2], views[3]), want[i], strict=True):
            assert error(got[i], expected) <= 1e-13


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_whole_matrices_as_on_an_accelerator(project):
    """The path for devices other than the CPU, run on the CPU."""
    module = importlib.import_module("sculpt_kernels.adamw.adamw")
    m, n = 12, 18
    for form, complement in CASES:
        U, V = sides(form, basis(m, 3), basis(n, 4))
        given = state(m, n)
        want = reference.project_adamw(
            *given, U, V, form=form, complement=complement, project=project, **OPTIONS
        )
        scalars = module.Step(3e-2, 0.8, 0.95, 1e-6, 0.1, 4)
        held = module._State(*given, None, scalars, None, 0)
        module._on_device(held, U, V, form, complement, project)
        for got, expected in zip((given[0], given[2], given[3]), want, strict=True):
            assert error(got, expected) <= 1e-13


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_whole_matrices_read_no_scalar_of_the_device(project):
    """As a captured graph demands: on meta tensors a value that is read is an error."""
    module = importlib.import_module("sculpt_kernels.adamw.adamw")

    def of(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    scalars = module.Step(of(), of(), of(), of(), of(), of(dtype=torch.int64))
    for dtype in (torch.float32, torch.bfloat16):
        state = [of(12, 18, dtype=dtype) for _ in range(4)]
        copy, seed = of(12, 18, dtype=torch.bfloat16), of(dtype=torch.int64)
        held = module._State(*state, copy, scalars, seed, 0)
        module._on_device(held, of(12, 3), of(18, 4), "core", "none", project)

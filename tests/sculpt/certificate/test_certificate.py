"""What certificates look at: leaks, and whether stored weights are where rounding puts them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from sculpt import Certificate, SculptConfig, Sculptor
from sculpt.certificate.leak import rounding_bound
from sculpt_kernels import split
from sculpt_kernels.rounding import stochastic_round
from tests.sculpt.small_models import ENGINES, begin

X = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
LOW = ENGINES | {"recompute": {"weight_update": "recompute"}}


def trained(dtype: torch.dtype, steps: int = 20, lr: float = 1e-3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 12)).to(dtype)
    sculptor, optimizer = begin(model, SculptConfig(**options), lr=lr, weight_decay=0.0)
    x = X.to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).float().square().mean().backward()
        optimizer.step()
    return model, sculptor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("random", [None, 1, 30])
def test_what_rounding_leaves_is_within_its_bound(random, dtype):
    """And not far within: a bound ten times as large would hide a lot."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 2), (40, 30), (300, 200)):
        truth = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
            -8, 3, shape, generator=generator
        )
        stored = truth.to(dtype)
        if random is not None:
            for step in range(random):
                step_size = 1e-3 * torch.randn(shape, generator=generator) * truth.abs()
                truth = truth + step_size
                stored = stochastic_round(stored.float() + step_size, dtype, seed=step)
        far = float((stored.float() - truth).norm())
        bound = rounding_bound(stored, random)
        assert far <= bound
        if shape[0] > 3:
            assert far > bound / 8


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", LOW)
def test_stored_weights_that_are_elsewhere_break_the_certificate(engine, dtype, independent):
    model, sculptor = trained(dtype, **LOW[engine])
    certificate = sculptor.verify(independent=independent)
    assert certificate.ok, str(certificate)
    assert all(row.rounding <= row.rounding_limit < math.inf for row in certificate.rows)
    assert "The stored 16-bit ones are at most" in str(certificate)
    weight = model[2]._parameters["weight"]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    weight.data.add_((0.3 * weight.detach().abs() * noise).to(dtype))
    certificate = sculptor.verify(independent=independent)
    assert not certificate.ok
    assert certificate.worst.name == "2"
    assert certificate.worst.leak <= certificate.worst.limit  # The truth is what it was.
    assert certificate.worst.rounding > certificate.worst.rounding_limit
    assert "is BROKEN" in str(certificate)
    written = json.loads(json.dumps(certificate.to_dict()))
    assert Certificate.from_dict(written).to_dict() == written


def test_an_independent_certificate_trusts_no_basis():
    """Bases of another matrix: what is inside of them is not outside of what must stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32))
    low = split(torch.randn(32, 20), rank=15)
    sculptor = Sculptor(model, SculptConfig())
    sculptor.begin_task(subspaces={"0": low})
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3)
    sculptor.attach(optimizer)
    model(X).square().mean().backward()
    optimizer.step()
    assert sculptor.verify().ok
    assert not sculptor.verify(independent=True).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["update", "core", "gradient"])
@pytest.mark.filterwarnings("ignore:engine='gradient'")
def test_small_steps_of_16_bit_weights_add_up(engine, dtype):
    """Twenty steps at 1e-5 move as far as those of float32 weights."""
    options = {"constraint": "core"} if engine == "core" else {"engine": engine}
    distances = []
    for kind in (torch.float32, dtype):
        _, sculptor = trained(kind, lr=1e-5, **options)
        matrices = sculptor._task.matrices.values()
        moved = [float((m.truth() - m.before().float()).norm()) for m in matrices]
        distances.append(math.hypot(*moved))
        if engine != "gradient":
            assert sculptor.verify().ok
        sculptor.end_task()
    assert distances[1] == pytest.approx(distances[0], rel=0.05)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", LOW)
@pytest.mark.parametrize("rank", [0, 2])
def test_weights_without_energy(rank, engine, dtype, independent):
    """As LoRA's `B` and the heads of diffusion models are at first: all zero, or of low rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 32), nn.Linear(32, 12)).to(dtype)
    with torch.no_grad():
        left, right = torch.randn(32, rank), torch.randn(rank, 32)
        model[1].weight.copy_((left @ right).to(dtype))
    sculptor = Sculptor(model, SculptConfig(**LOW[engine]))
    table = sculptor.begin_task()
    assert all(math.isfinite(row.energy) for row in table.rows)
    assert sculptor.verify(independent=independent).ok
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3)
    sculptor.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X.to(dtype)) - 1).float().square().mean().backward()
        optimizer.step()
    certificate = sculptor.verify(independent=independent)
    assert certificate.ok, str(certificate)
    assert all(math.isfinite(row.change) for row in certificate.rows)
    row = next(row for row in certificate.rows if row.name == "1")
    assert row.change > (0.5 if rank == 0 else 1e-4)
    sculptor.end_task()

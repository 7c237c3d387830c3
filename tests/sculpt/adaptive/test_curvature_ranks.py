"""Ranks by the curvature of what is protected, under one budget."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sculpt import AdaptiveRanks, SculptConfig, Sculptor


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = (40, 56, 56, 24)
    layers = [nn.Linear(n, m) for n, m in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def begun(
    constraint: str = "strict", **ranks: object
) -> tuple[Sculptor, dict[str, int], dict[str, float | None]]:
    """Ranks `t` by name, after inputs that use few directions were protected."""
    adaptive = AdaptiveRanks(trr=0.75, **ranks)
    sculptor = Sculptor(model(), SculptConfig(ranks=adaptive, constraint=constraint))
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(256, 40, generator=generator) * torch.logspace(0, -2, 40)
    sculptor.protect([lambda model: (model(X) * torch.linspace(0.1, 1, 24)).square().sum()])
    rows = sculptor.begin_task().rows
    return sculptor, {r.name: r.trainable_rank for r in rows}, {r.name: r.importance for r in rows}


def shares(F: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(F.double()).clamp_min(0).cumsum(0) / F.double().trace()


def added(sculptor: Sculptor, name: str, t: int) -> float:
    """What the trailing direction `t` adds to `tr S_l tr A_l`, for each number that it trains."""
    left, right = sculptor.memory.of(name)
    A, S = right.total / right.count, left.total
    both = shares(S)[: min(len(S), len(A))] * shares(A)[: min(len(S), len(A))]
    more = both[t - 1] - (both[t - 2] if t > 1 else 0)
    return float(A.trace() * S.trace() * more) / (2 * t - 1)


def test_no_direction_that_is_left_out_costs_less_than_one_that_trains() -> None:
    sculptor, ranks, importance = begun(trainable_elements=900)
    assert sum(t**2 for t in ranks.values()) == pytest.approx(900, rel=0.01)
    last = {name: added(sculptor, name, t) for name, t in ranks.items()}
    next_one = {name: added(sculptor, name, t + 1) for name, t in ranks.items()}
    # To one direction of a layer: the budget ends within a layer.
    assert sorted(last.values())[-2] <= min(next_one.values()) * (1 + 1e-6)
    assert len(set(ranks.values())) > 1
    assert math.fsum(importance.values()) / 3 == pytest.approx(1)


def test_the_energy_is_that_of_the_curvature() -> None:
    sculptor, ranks, _ = begun(protected_energy=0.999)
    whole = touched = 0.0
    for name, t in ranks.items():
        left, right = sculptor.memory.of(name)
        curvature = float(left.total.trace() * right.total.trace() / right.count)
        whole += curvature
        touched += curvature * float(shares(left.total)[t - 1] * shares(right.total)[t - 1])
    # To one direction of one layer.
    step = max(added(sculptor, name, t) * (2 * t - 1) for name, t in ranks.items()) / whole
    assert abs(1 - touched / whole - 0.999) <= step < 0.001


def test_without_a_budget_as_many_numbers_train_as_at_uniform_ranks() -> None:
    _, ranks, _ = begun()
    uniform = [k - math.floor(0.75 * k) for k in (40, 56, 24)]
    assert abs(sum(t**2 for t in ranks.values()) - sum(t**2 for t in uniform)) <= max(
        ranks.values()
    )
    assert list(ranks.values()) != uniform


def test_no_layer_retains_less_than_the_least() -> None:
    _, ranks, _ = begun(mrr=0.5, trainable_elements=1100)
    most = [k - math.ceil(0.5 * k) for k in (40, 56, 24)]
    assert all(t <= m for t, m in zip(ranks.values(), most, strict=True))
    assert ranks["0"] == most[0] or ranks["2"] == most[1]


def test_before_anything_is_protected_all_layers_retain_trr() -> None:
    ranks = AdaptiveRanks(trr=0.75, importance="curvature")
    rows = Sculptor(model(), SculptConfig(ranks=ranks)).begin_task().rows
    assert [row.preserved for row in rows] == [math.floor(0.75 * k) for k in (40, 56, 24)]
    assert {row.note for row in rows} == {"no row that is protected has reached it: retains trr"}


def test_the_core_form_leaves_a_stated_energy_of_both_sides() -> None:
    sculptor, ranks, _ = begun(protected_energy=0.9, constraint="core")
    whole = kept = 0.0
    steps = []
    for name, t in ranks.items():
        left, right = sculptor.memory.of(name)
        h = min(len(left.total), len(right.total)) - t
        curvature = float(left.total.trace() * right.total.trace() / right.count)
        whole += curvature
        leading = [
            1 - shares(F.total)[len(F.total) - r - 1] for F in (left, right) for r in (h, h + 1)
        ]
        kept += curvature * float(leading[0] * leading[2])
        steps.append(curvature * float(leading[1] * leading[3] - leading[0] * leading[2]))
    assert abs(kept / whole - 0.9) <= max(steps) / whole < 0.05
    matrices = sculptor._task.matrices
    assert {name: m.bases.U.shape[-1] for name, m in matrices.items()} == {
        name: min(m.target.shape) - ranks[name] for name, m in matrices.items()
    }

"""Directions that earlier tasks hardly use, and how long they last."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sculpt import SculptConfig, Sculptor


def test_cheap_directions_are_those_outside_of_what_tasks_use() -> None:
    """Each task uses 6 of 40 inputs and all outputs alike."""
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=0.25))
    with pytest.raises(ValueError, match="nothing is protected"):
        sculptor.capacity()
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    for task in range(3):
        x = torch.randn(200, 6, generator=generator) @ basis[6 * task : 6 * task + 6]
        y = torch.randn(200, 40, generator=generator)
        sculptor.protect([lambda model, x=x, y=y: (model(x) * y).sum()], f"task {task}")
        [row] = sculptor.capacity(limit=1e-6).rows
        used = 6 * (task + 1)
        assert (row.k, row.trains) == (40, 10)
        # k - 1 directions train at most.
        assert row.cheap == 40 - used
        assert row.tasks == pytest.approx((40 - used - 10) / 6)
    found = sculptor.capacity(limit=1e-6)
    assert found.tasks == row.tasks
    assert "suffice for 2.0 more, in half of the layers" in str(found)
    assert "1e-06 of what they use" in str(found)
    with pytest.raises(ValueError, match=r"limit must be a share in \(0, 1\); got 1.5"):
        sculptor.capacity(1.5)
    assert math.isfinite(found.tasks)

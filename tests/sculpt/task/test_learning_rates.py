"""A learning rate is that of dense weights for whatever normalises each element of its steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sculpt import SculptConfig, Sculptor
from tests.sculpt.task.test_engines import Lion
from tests.sculpt.test_sculptor import moved, small_model, train


def by_hand(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 1e-3
    return optimizer


def scheduled(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    return optimizer


NORMALISING = {
    "by hand": by_hand,
    "scheduled": scheduled,
    "lion": lambda trained: Lion(trained, lr=1e-3),
    "adafactor": lambda trained: torch.optim.Adafactor(trained, lr=1e-3, eps=(None, 1.0)),
    "rmsprop": lambda trained: torch.optim.RMSprop(trained, lr=1e-3),
}


@pytest.mark.parametrize("name", NORMALISING)
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_optimizers_that_normalise_each_element_move_as_far_as_on_dense_weights(name, ratio):
    distances = []
    for sculpted in (True, False):
        model = small_model()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=ratio))
        if sculpted:
            sculptor.begin_task()
        # All parameters: what is frozen among them is left alone.
        optimizer = NORMALISING[name](list(model.parameters()))
        if sculpted:
            sculptor.attach(optimizer)
        train(model, optimizer, 1)
        distances.append(moved(model, before))
    assert distances[0] == pytest.approx(distances[1], rel=0.05)


@pytest.mark.parametrize("shape", [(96, 96), (192, 96), (96, 192)])
def test_a_gradient_without_a_preferred_direction_keeps_its_norm(shape):
    """So that a clipped norm means what it meant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*reversed(shape), bias=False))
    sculptor = Sculptor(model, SculptConfig())
    sculptor.begin_task()
    x, dy = (torch.randn(1000, size) for size in reversed(shape))
    (model(x) * dy).sum().backward()
    (C,) = sculptor.parameters()
    assert float(C.grad.norm()) == pytest.approx(float((dy.mT @ x).norm()), rel=0.1)

"""A task that is given up leaves the weights from before it, bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sculpt
from sculpt import SculptConfig, Sculptor
from tests.sculpt.small_models import ENGINES, KINDS, begin

WAYS = ENGINES | {"on disk": {"originals": "disk"}}


def trained(model: nn.Module, loss, **options) -> Sculptor:
    sculptor, optimizer = begin(model, SculptConfig(**options), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return sculptor


def small(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model, torch.randn(6, 12).to(dtype)


@pytest.mark.parametrize("by", ["the sculptor", "the model", "a part of the model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", WAYS)
def test_weights_flags_and_classes_are_those_from_before(engine, dtype, by):
    model, x = small(dtype)
    outer = nn.Sequential(model)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    sculptor = trained(model, lambda: model(x).float().square().mean(), **WAYS[engine])
    assert not all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    if by == "the sculptor":
        sculptor.undo_task()
    else:
        sculpt.abandon(model if by == "the model" else outer)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    with pytest.raises(RuntimeError, match="no task is running"):
        sculptor.end_task()
    with pytest.raises(RuntimeError, match="nothing to abandon"):
        sculpt.abandon(model)
    model.double()  # Free to move again.
    again = Sculptor(model.to(dtype), SculptConfig(**WAYS[engine]))
    again.begin_task()
    again.end_task()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer(name):
    kind = KINDS[name]
    model = kind.build()
    before = copy.deepcopy(model.state_dict())
    sculptor = trained(model, lambda: kind.loss(model), target_modules=kind.targets)
    assert sculptor.verify(independent=True).ok
    sculpt.abandon(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_what_was_written_or_replaced_does_not_matter():
    model, x = small(torch.float32)
    before = copy.deepcopy(model.state_dict())
    trained(model, lambda: model(x).square().mean())
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    model[2].weight = nn.Parameter(torch.zeros(8, 20))
    sculpt.abandon(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_what_trained_outside_of_the_guarantee_stays_with_a_warning():
    model, x = small(torch.float32)
    bias = model[2].bias.detach().clone()
    sculptor = trained(model, lambda: model(x).square().mean(), others="train")
    with pytest.warns(UserWarning, match=r"1 parameters that others='train' .*: 2.bias"):
        sculptor.undo_task()
    assert not torch.equal(model[2].bias, bias)

"""Optimizers of the task before, or from before the task, do not step in silence."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sculpt import SculptConfig, Sculptor
from sculpt.task import guards
from tests.sculpt.small_models import begin

ENDED = "SGD holds coordinates of a task that has ended and no coordinates of the task that is"
X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def steps(model, optimizer, count: int = 1) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def guard_count() -> int:
    return len(guards._guards)


@pytest.mark.parametrize("coordinates", ["thin", "full"])
@pytest.mark.parametrize("attached", [False, True])
def test_the_optimizer_of_the_task_before(coordinates, attached):
    model = model_of()
    sculptor = Sculptor(model, SculptConfig(coordinates=coordinates))
    sculptor.begin_task()
    old = sgd(sculptor.parameters())
    if attached:
        sculptor.attach(old)
    steps(model, old)
    sculptor.update_weights()
    sculptor.end_task()
    sculptor.begin_task()
    before = [value.clone() for value in model.state_dict().values()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{ENDED}.*sculptor.parameters\(\), after begin"):
            steps(model, old)
    assert all(map(torch.equal, before, model.state_dict().values()))
    # With the right one attached, a step of the wrong one is found too.
    new = sgd(sculptor.parameters())
    sculptor.attach(new)
    with pytest.raises(RuntimeError, match=ENDED):
        steps(model, old)
    steps(model, new)
    assert not torch.equal(before[0], model[0].weight)
    sculptor.end_task()


def test_an_attached_optimizer_whose_task_is_over():
    model = model_of()
    sculptor, optimizer = begin(model, SculptConfig(), torch.optim.SGD, lr=0.1)
    steps(model, optimizer)
    sculptor.end_task()
    weight = model[2].weight.detach().clone()
    with pytest.raises(RuntimeError, match="whose coordinates this SGD holds has ended"):
        optimizer.step()
    assert torch.equal(model[2].weight, weight)
    # What else it holds goes on, also while a task is running in another model.
    other = Sculptor(model_of(), SculptConfig())
    other.begin_task()
    head = nn.Linear(8, 1)
    optimizer.add_param_group({"params": head.parameters()})
    before = head.weight.detach().clone()
    head(model(X)).sum().backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)
    other.end_task()


@pytest.mark.parametrize("engine", ["compact", "update"])
def test_an_optimizer_from_before_the_task(engine):
    model = model_of()
    early = sgd(model.parameters())
    sculptor = Sculptor(model, SculptConfig(engine=engine))
    sculptor.begin_task()
    if engine == "update":  # It trains the weights themselves.
        sculptor.attach(early)
        steps(model, early)
        sculptor.end_task()
        steps(model, early)
        return
    with pytest.raises(RuntimeError, match=r"the weight of '0', which begin_task\(\) froze"):
        steps(model, early)
    # The same one, with coordinates added to it.
    early.add_param_group({"params": sculptor.parameters()})
    sculptor.attach(early)
    steps(model, early, 2)
    assert sculptor.verify().ok
    sculptor.end_task()


def test_optimizers_of_others_are_left_alone():
    head = nn.Linear(8, 1)
    model = model_of()
    both = sgd([*model.parameters(), *head.parameters()])
    foreign = sgd(nn.Linear(3, 3).parameters())
    sculptor = Sculptor(model, SculptConfig())
    sculptor.begin_task()
    foreign.step()
    mine = sgd(sculptor.parameters())
    # By hand, and then by an attached one: what steps beside it trains a head.
    for attach in (False, True):
        if attach:
            sculptor.attach(mine)
        for _ in range(2):
            both.zero_grad()
            mine.zero_grad()
            head(model(X)).square().mean().backward()
            mine.step()
            if not attach:
                sculptor.update_weights()
            both.step()
            foreign.step()
    assert sculptor.verify().ok
    sculptor.end_task()


def test_all_parameters_of_the_model_by_hand():
    """They are coordinates and what is frozen."""
    model = model_of()
    sculptor = Sculptor(model, SculptConfig())
    sculptor.begin_task()
    optimizer = sgd(model.parameters())
    for _ in range(2):
        steps(model, optimizer)
        sculptor.update_weights()
    assert sculptor.verify().ok
    sculptor.end_task()


def test_no_optimizer_is_checked_without_a_running_task():
    gc.collect()
    before = guard_count()
    model = model_of()
    sculptor = Sculptor(model, SculptConfig())
    sculptor.begin_task()
    assert guard_count() == before + 1
    sculptor.end_task()
    assert guard_count() == before
    # A task that is given up leaves nothing behind, attached optimizer and model included.
    sculptor.begin_task()
    optimizer = sgd(sculptor.parameters())
    sculptor.attach(optimizer)
    steps(model, optimizer)
    weight = ref(model[0].weight)
    del sculptor, optimizer, model
    gc.collect()
    assert guard_count() == before
    assert weight() is None


def test_a_task_may_be_forgotten_in_the_midst_of_a_step():
    """Garbage is collected at any time, between the hooks of another optimizer too."""
    sculptor = begin(model_of(), SculptConfig(), torch.optim.SGD, lr=0.1)[0]
    forgotten = ref(sculptor)
    sculptor.itself = sculptor
    del sculptor
    hooks = (lambda *_: gc.collect() and None, lambda *_: None)  # There is one to come yet.
    handles = [register_optimizer_step_pre_hook(hook) for hook in hooks]
    try:
        sgd(nn.Linear(3, 3).parameters()).step()
    finally:
        for handle in handles:
            handle.remove()
    assert forgotten() is None

"""What others write into the weights of a running task is taken up, or refused; never dropped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sculpt import SculptConfig, Sculptor
from sculpt.certificate.leak import rounding_bound
from sculpt.task.matrix import WeightChangedError
from tests.sculpt.small_models import begin

X = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 12, generator=torch.Generator().manual_seed(2))
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "full": (torch.float32, {"coordinates": "full"}),
    "bf16": (torch.bfloat16, {}),
    "bf16, recompute": (torch.bfloat16, {"weight_update": "recompute"}),
    "bf16, update": (torch.bfloat16, {"engine": "update"}),
    "bf16, core": (torch.bfloat16, {"constraint": "core"}),
    "update": (torch.float32, {"engine": "update"}),
    "core": (torch.float32, {"constraint": "core"}),
}


def begun(kind: str, lr: float = 1e-3) -> tuple[nn.Module, Sculptor, torch.optim.Optimizer]:
    dtype, options = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 12))
    config = SculptConfig(**options)
    return model.to(dtype), *begin(model.to(dtype), config, lr=lr, weight_decay=0.0)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(count):
        optimizer.zero_grad()
        (model(X.to(dtype)) - Y.to(dtype)).float().square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def far_in_roundings(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest distance of two weights, as a multiple of what rounding them leaves."""
    return max(float((a[n].double() - b[n].double()).norm()) / rounding_bound(a[n]) for n in a)


def by_state_dict(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(saved)


@torch.no_grad()
def in_place(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in saved:
            parameter.copy_(saved[name])


def through_data(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in saved:
            parameter.data.copy_(saved[name])


def by_assignment(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    for index in (0, 2, 3):
        model[index].weight.data = saved[f"{index}.weight"].clone()


WRITERS = {
    "load_state_dict": by_state_dict,
    "copy_": in_place,
    ".data.copy_": through_data,
    ".data =": by_assignment,
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_weights_are_kept(kind, write):
    """The idiom: copy the best state, go on, load it again, end the task."""
    model, sculptor, optimizer = begun(kind)
    steps(model, optimizer, 8)
    best = copy.deepcopy(model.state_dict())
    best_truth = {m.name: m.truth().clone() for m in sculptor._task.matrices.values()}
    steps(model, optimizer, 8)
    last = weights(model)
    WRITERS[write](model, best)
    assert sculptor.verify().ok, str(sculptor.verify())
    sculptor.end_task()
    after = weights(model)
    if KINDS[kind][0] == torch.bfloat16 and "," not in kind:
        # Eight random roundings, of which a part lies in the free directions, and one to nearest.
        for name, truth in best_truth.items():
            ours, theirs = (state[f"{name}.weight"].float() for state in (after, last))
            far = float((ours - truth).norm())
            assert far < rounding_bound(truth.bfloat16(), 8)
            assert far < float((theirs - truth).norm()) / 2
    elif "update" in kind or "core" in kind:  # Projected once more, from the weights before.
        assert far_in_roundings(after, best) < 2
    else:
        assert all(torch.equal(after[name], best[name]) for name in best)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_what_was_written(kind, write):
    """As it would have gone on from there, but for the moments of the optimizer."""
    ends = []
    for rolled_back in (True, False):
        model, sculptor, optimizer = begun(kind)
        steps(model, optimizer, 5)
        saved = weights(model)
        if rolled_back:
            steps(model, optimizer, 5)
            WRITERS[write](model, saved)
        optimizer.state.clear()
        steps(model, optimizer, 3)
        assert sculptor.verify().ok, str(sculptor.verify())
        sculptor.end_task()
        ends.append(weights(model))
    assert far_in_roundings(*ends) < 16


FOREIGN = {
    "other weights": lambda model: model.load_state_dict(
        {n: torch.randn_like(v) for n, v in model.state_dict().items()}
    ),
    "an edit": lambda model: model[2]._parameters["weight"].data[3].add_(0.1),
    "an edit that counts": lambda model: model[2]._parameters["weight"][3].add_(0.1),
}


@pytest.mark.parametrize("how", FOREIGN)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_task_cannot_have_done_is_refused(kind, how):
    model, sculptor, optimizer = begun(kind)
    steps(model, optimizer, 3)
    good = weights(model)
    with torch.no_grad():
        FOREIGN[how](model)
    bad = weights(model)
    assert not sculptor.verify().ok
    for call in (sculptor.end_task, sculptor.end_task):
        with pytest.raises(WeightChangedError, match=r"the weight of '\d' was written to during"):
            call()
    if how != "an edit":  # Through `.data`, which no version counts.
        with pytest.raises(WeightChangedError):
            steps(model, optimizer, 1)
    assert all(torch.equal(value, bad[name]) for name, value in weights(model).items())
    # What belongs to the task makes it good.
    model.load_state_dict(good)
    assert sculptor.verify().ok
    steps(model, optimizer, 1)
    sculptor.end_task()


def test_weights_that_are_loaded_as_they_are_change_nothing():
    for kind in KINDS:
        ends = []
        for loads in (False, True):
            model, sculptor, optimizer = begun(kind)
            for _ in range(3):
                steps(model, optimizer, 1)
                if loads:
                    model.load_state_dict(weights(model))
            sculptor.end_task()
            ends.append(weights(model))
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), kind


@pytest.mark.parametrize("kind", ["float32", "full", "bf16, recompute", "update"])
def test_an_average_of_weights_is_copied_back(kind):
    model, sculptor, optimizer = begun(kind)
    dtype = next(model.parameters()).dtype
    shadow = {name: value.float() for name, value in weights(model).items()}
    for _ in range(12):
        steps(model, optimizer, 1)
        for name, value in model.state_dict().items():
            shadow[name].lerp_(value.float(), 0.2)
    through_data(model, {name: value.to(dtype) for name, value in shadow.items()})
    assert sculptor.verify().ok
    sculptor.end_task()
    expected = {name: value.to(dtype) for name, value in shadow.items()}
    assert far_in_roundings(weights(model), expected) < 4


@pytest.mark.parametrize("kind", ["float32", "bf16", "bf16, update"])
def test_all_parameters_rolled_back_together(kind):
    """Coordinates and weights, as a list of the model's parameters has them."""
    model, sculptor, optimizer = begun(kind)
    steps(model, optimizer, 4)
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    best = weights(model)
    steps(model, optimizer, 4)
    for parameter, value in zip(model.parameters(), saved, strict=True):
        parameter.data.copy_(value)
    assert sculptor.verify().ok
    truths = {m.name: m.truth() for m in sculptor._task.matrices.values()}
    sculptor.end_task()
    for name, truth in truths.items():
        after = weights(model)[f"{name}.weight"]
        assert torch.equal(after, truth.to(after.dtype))
    if kind != "bf16":
        assert all(torch.equal(value, best[name]) for name, value in weights(model).items())

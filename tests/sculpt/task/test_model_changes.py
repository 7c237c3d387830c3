"""Whatever moves, replaces or copies a model with a running task is refused or followed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import sculpt
from sculpt import SculptConfig, Sculptor
from tests.sculpt.small_models import ENGINES, begin

PLAIN = (nn.LayerNorm(12), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def sculpted(dtype=torch.float32, **options) -> tuple[nn.Module, Sculptor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))
    sculptor = Sculptor(model.to(dtype), SculptConfig(**options))
    sculptor.begin_task()
    return model, sculptor


def layout(model) -> list:
    return [(p.dtype, p.device) for p in model.parameters()]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_moved_model_is_refused_before_anything_moves(engine, wrapped):
    model, sculptor = sculpted(**ENGINES[engine])
    outer = nn.Sequential(model) if wrapped else model
    before = layout(outer)
    for move in (outer.half, outer.double, lambda: outer.to("meta"), outer.bfloat16):
        with pytest.raises(RuntimeError, match=r"cannot go from torch.float32 on cpu to"):
            move()
        assert layout(outer) == before
    assert outer.float().to("cpu") is outer
    sculptor.end_task()
    assert "_apply" not in vars(model)
    outer.half()
    assert {dtype for dtype, _ in layout(outer)} == {torch.float16}


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_and_pickles_hold_themselves(engine):
    model, _ = sculpted(**ENGINES[engine])
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert vars(other)["_apply"].model is other
        assert {id(p) for p in vars(other)["_apply"].parameters} <= {
            id(p) for p in other.parameters()
        }
        with pytest.raises(RuntimeError, match="cannot go from"):
            other.half()
        with pytest.raises(RuntimeError, match=r"copied while a task was running.*state_dict\(\)"):
            sculpt.abandon(other)
        nn.Sequential(*copy.deepcopy(PLAIN)).load_state_dict(other.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_went_elsewhere_by_themselves_are_found(engine):
    model, sculptor = sculpted(**ENGINES[engine])
    optimizer = torch.optim.SGD(sculptor.parameters(), lr=0.1)
    sculptor.attach(optimizer)
    model(torch.randn(3, 12)).square().mean().backward()
    weight = model[1]._parameters["weight"]
    weight.requires_grad_(False)
    values = weight.data
    model[1].weight.data = values.half()
    with pytest.raises(RuntimeError, match=r"'1' was torch.float32 on cpu .* torch.float16 on cpu"):
        sculptor.verify()
    model[1].weight.data = values
    model[1].weight = nn.Parameter(torch.zeros(20, 12), requires_grad=False)
    with pytest.raises(RuntimeError, match="weight of '1' was replaced"):
        sculptor.end_task()
    model[1].weight = weight
    sculptor.end_task()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def steps(model, optimizer, count: int = 1) -> None:
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_replaced_module_is_found_before_the_step(engine):
    inner, sculptor = sculpted(**ENGINES[engine])
    sculptor.end_task()
    model = nn.ModuleDict({"body": inner, "head": nn.Linear(8, 4)})
    model.forward = lambda x: model["head"](model["body"](x))
    sculptor, optimizer = begin(model, SculptConfig(**ENGINES[engine]), lr=1e-3)
    steps(model, optimizer)
    coordinates = [p.detach().clone() for p in sculptor.parameters()]
    trained, head, body = model["body"][3], model["head"], model["body"]
    changes = (
        ("body.3", lambda: model["body"].__setitem__(3, nn.Linear(20, 8))),
        ("body.1", lambda: model.__setitem__("body", copy.deepcopy(nn.Sequential(*PLAIN)))),
        ("head", lambda: model.pop("head") and setattr(model, "forward", model["body"].forward)),
    )
    forward = model.forward
    for name, change in changes:
        change()
        instead = "nothing" if name == "head" else "another Linear"
        message = rf"'{name}', the Linear that this task trains, .* and {instead} is in its place"
        for call in (lambda: steps(model, optimizer), sculptor.verify, sculptor.end_task):
            with pytest.raises(RuntimeError, match=message):
                call()
        for parameter, was in zip(sculptor._task.matrices.values(), coordinates, strict=True):
            assert torch.equal(parameter.trained.detach(), was)
        body[3] = trained
        model.forward = forward
        model.update({"body": body, "head": head})
    steps(model, optimizer)
    assert sculptor.verify().ok
    sculptor.end_task()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrapped_module_goes_on_training(engine):
    model, sculptor = sculpted(**ENGINES[engine])
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3)
    sculptor.attach(optimizer)
    trained = model[3]
    model[3] = Wrapped(trained)
    steps(model, optimizer, 2)
    assert sculptor.verify().ok
    model[3] = Wrapped(nn.Linear(20, 8))
    with pytest.raises(RuntimeError, match=r"'3', the Linear .* another Wrapped is in its place"):
        steps(model, optimizer)
    model[3] = trained
    steps(model, optimizer)
    sculptor.end_task()


@pytest.mark.parametrize("engine", ENGINES)
def test_one_task_at_a_time(engine):
    model, sculptor = sculpted(**ENGINES[engine])
    for other in (model, copy.deepcopy(model), nn.Sequential(model)):
        with pytest.raises(RuntimeError, match=r"a task is running in .*call end_task\(\)"):
            Sculptor(other, SculptConfig())
    sculptor.end_task()
    Sculptor(model, SculptConfig()).begin_task()


def test_inference_mode_cannot_begin_a_task():
    model = nn.Linear(12, 20)
    sculptor = Sculptor(model, SculptConfig())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of inference_mode"):
        sculptor.begin_task()
    assert type(model) is nn.Linear
    sculptor.begin_task()

"""Optimizers that put parameters into flat buffers, as DeepSpeed's ZeRO stages do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sculpt import SculptConfig, Sculptor
from tests.sculpt.task.test_engines import model_of

STEPS = 5


class DeepSpeedZeroOptimizer:
    """What matters here of ZeRO-1 and ZeRO-2: parameters are views, the optimizer has the whole.

    Like the original it is no `torch.optim.Optimizer`, and what it writes is counted nowhere.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.parameters = base.param_groups[0]["params"]
        flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.buffer, begin = flat, 0
        for p in self.parameters:
            p.data = flat[begin : begin + p.numel()].view_as(p)
            begin += p.numel()
        self.master = flat.clone().requires_grad_()
        base.param_groups[0]["params"] = [self.master]

    def step(self) -> None:
        self.master.grad = torch.cat([p.grad.reshape(-1) for p in self.parameters])
        self.base.step()
        self.buffer.copy_(self.master.detach())
        for p in self.parameters:
            p.grad = None


def begun() -> tuple[nn.Module, Sculptor, torch.optim.Optimizer]:
    model = model_of()
    sculptor = Sculptor(model, SculptConfig(target_modules=["2", "4", "5"]))
    sculptor.begin_task()
    return model, sculptor, torch.optim.AdamW(sculptor.parameters(), lr=0.01)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(4, 16, generator=generator)).square().mean().backward()


def test_weights_follow_where_the_loop_says_so() -> None:
    plain, sculptor, optimizer = begun()
    sculptor.attach(optimizer)
    for step in range(STEPS):
        backward(plain, step)
        optimizer.step()
        optimizer.zero_grad()
    sculptor.end_task()

    model, sculptor, optimizer = begun()
    engine = DeepSpeedZeroOptimizer(optimizer)
    for step in range(STEPS):
        backward(model, step)
        engine.step()
        sculptor.update_weights()
    assert sculptor.verify().ok
    sculptor.end_task()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)


def test_weights_that_were_left_behind_are_noticed() -> None:
    model, _, optimizer = begun()
    engine = DeepSpeedZeroOptimizer(optimizer)
    backward(model, 0)
    engine.step()
    with pytest.raises(RuntimeError, match=r"its weight has not followed.*update_weights\(\)"):
        backward(model, 1)


def test_it_is_not_attached() -> None:
    model, sculptor, optimizer = begun()
    engine = DeepSpeedZeroOptimizer(optimizer)
    with pytest.raises(TypeError, match=r"got DeepSpeedZeroOptimizer.*after each engine\.step"):
        sculptor.attach(engine)
    with pytest.raises(ValueError, match=r"holds 0 of the 3.*flat buffers, as DeepSpeed does"):
        sculptor.attach(optimizer)
    model, sculptor, optimizer = begun()
    sculptor.attach(optimizer)
    engine = DeepSpeedZeroOptimizer(optimizer)
    backward(model, 0)
    with pytest.raises(ValueError, match=r"holds 0 of the 3.*flat buffers, as DeepSpeed does"):
        engine.step()


def test_the_third_stage_is_refused_before_and_during_a_task() -> None:
    model = model_of()
    model[2].weight.ds_id = 0
    with pytest.raises(ValueError, match=r"2\.weight is partitioned by DeepSpeed ZeRO-3"):
        Sculptor(model, SculptConfig(target_modules=["2"])).begin_task()
    model, sculptor, _ = begun()
    model[2]._parameters["weight"].ds_id = 0
    with pytest.raises(RuntimeError, match=r"'2' was partitioned by DeepSpeed ZeRO-3"):
        sculptor.update_weights()


def test_coordinates_stay_in_float32() -> None:
    _, sculptor, _ = begun()
    coordinates = sculptor.parameters()[0]
    coordinates.data = coordinates.data.bfloat16()
    with pytest.raises(RuntimeError, match=r"'2' were converted from torch\.float32 to torch\.bf"):
        sculptor.update_weights()

"""Steps that fail half way, or must not be taken: weights and coordinates stay together."""

from __future__ import annotations

import pytest
import torch

from sculpt import SculptConfig
from sculpt.task import compact, projected
from tests.sculpt.small_models import begin
from tests.sculpt.task.test_engines import ENGINES, fit, inputs, model_of


def fails_at(patch: pytest.MonkeyPatch, failing: int) -> None:
    """The fold of matrix number `failing` finds no memory."""
    whole, calls = compact.expand_add_many_, iter(range(100))

    def fails(*args, **kwargs):
        if next(calls) == failing:
            raise torch.OutOfMemoryError("no memory left")
        return whole(*args, **kwargs)

    patch.setattr(compact, "expand_add_many_", fails)


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failing_fold_leaves_the_weights_as_before_the_step(monkeypatch, failing):
    model = model_of()
    sculptor, optimizer = begin(model, SculptConfig(), lr=1e-3)
    fit(model, optimizer, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coordinates = [p.detach().clone() for p in sculptor.parameters()]
    fails_at(monkeypatch, failing)
    with pytest.raises(torch.OutOfMemoryError):
        fit(model, optimizer, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, was in zip(sculptor.parameters(), coordinates, strict=True):
        assert torch.equal(parameter, was)
    fit(model, optimizer, 1)
    assert sculptor.verify().ok


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failing_fold_of_16_bit_weights_loses_no_weight_its_coordinates(monkeypatch, failing):
    """What was rounded at random stays, with the coordinates it was rounded from."""
    model = model_of(torch.bfloat16)
    sculptor, optimizer = begin(model, SculptConfig(), lr=1e-3)
    fit(model, optimizer, 3)
    before = [p.detach().clone() for p in sculptor.parameters()]
    weights = [m.weight.clone() for m in sculptor._task.matrices.values()]
    with monkeypatch.context() as patch:
        fails_at(patch, failing)
        with pytest.raises(torch.OutOfMemoryError):
            fit(model, optimizer, 1)
    for index, matrix in enumerate(sculptor._task.matrices.values()):
        assert torch.equal(matrix.trained, before[index]) == (index >= failing)
        assert torch.equal(matrix.weight, weights[index]) == (index >= failing)
    fit(model, optimizer, 1)
    assert sculptor.verify().ok
    for matrix in sculptor._task.matrices.values():
        truth = matrix.truth()
        spacing = torch.finfo(torch.bfloat16).eps * truth.abs().clamp_min(2.0**-8)
        # One rounding, of at most one spacing, for each of the steps.
        assert bool(((matrix.weight.float() - truth).abs() <= 5 * spacing).all())


@pytest.mark.parametrize("constraint", ["strict", "core"])
def test_a_failing_projection_is_made_good_by_the_next_one(monkeypatch, constraint):
    model = model_of()
    config = SculptConfig(engine="update", constraint=constraint)
    sculptor, optimizer = begin(model, config, lr=1e-3)
    fit(model, optimizer, 2)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(projected, "project_", fails)
        with pytest.raises(torch.OutOfMemoryError):
            fit(model, optimizer, 1)
    sculptor.update_weights()
    assert sculptor.verify().ok
    fit(model, optimizer, 1)
    assert sculptor.verify(independent=True).ok


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:a step was left out")
def test_a_gradient_that_overflows_halves_the_scale_and_moves_nothing(engine, fused):
    model = model_of()
    sculptor, optimizer = begin(model, SculptConfig(**ENGINES[engine]), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    x, y = inputs(torch.float32)
    scales, moved = [], []
    for factor in (1.0, float("inf"), 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        pairs = zip(before, model.parameters(), strict=True)
        moved.append(not all(torch.equal(a, b) for a, b in pairs))
    assert moved == [True, False, True]
    assert scales == [2.0**11, 2.0**10, 2.0**11]
    assert sculptor.verify().ok

"""What an attached optimizer does around its steps, with and without a closure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sculpt import SculptConfig
from tests.sculpt.small_models import ENGINES, begin


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).double()


def closure_of(model, optimizer, scale: float = 1.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 12, generator=generator, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = scale * (model(x) - 1).square().mean()
        loss.backward()
        return loss

    return closure


def values(model) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


WAYS = {
    "plain": lambda optimizer, closure: (closure(), optimizer.step()),
    "closure": lambda optimizer, closure: optimizer.step(closure),
    "closure by name": lambda optimizer, closure: optimizer.step(closure=closure),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_gives_the_steps_of_a_plain_loop(engine):
    results = []
    for step in WAYS.values():
        model = make()
        sculptor, optimizer = begin(model, SculptConfig(**ENGINES[engine]), lr=1e-3)
        for _ in range(3):
            step(optimizer, closure_of(model, optimizer))
        assert sculptor.verify().ok
        results.append(values(model))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_that_is_called_many_times_computes_with_current_weights(engine, search):
    model = make()
    config = SculptConfig(**ENGINES[engine])
    options = {"lr": 0.3, "max_iter": 6, "line_search_fn": search}
    sculptor, optimizer = begin(model, config, torch.optim.LBFGS, **options)
    closure = closure_of(model, optimizer)
    first = float(closure().detach())
    for _ in range(3):
        optimizer.step(closure)
    # A curvature that was measured outside of what is allowed is no use to projected steps.
    if engine in ("compact", "full"):
        assert float(closure().detach()) < 0.9 * first
    certificate = sculptor.verify(independent=True)
    assert certificate.ok, str(certificate)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_without_finite_gradients_changes_nothing(engine, way):
    model = make()
    config = SculptConfig(**ENGINES[engine])
    sculptor, optimizer = begin(model, config, lr=1e-3, weight_decay=0.1)
    WAYS[way](optimizer, closure_of(model, optimizer))
    before = values(model)
    state = {k: v.clone() for k, v in optimizer.state[sculptor.parameters()[0]].items()}
    with pytest.warns(UserWarning, match=r"a step was left out.*1 so far"):
        WAYS[way](optimizer, closure_of(model, optimizer, float("nan")))
    assert sculptor.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
    after = optimizer.state[sculptor.parameters()[0]]
    assert all(torch.equal(after[key], value) for key, value in state.items())
    WAYS[way](optimizer, closure_of(model, optimizer))
    assert not all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


class Twice(torch.optim.Optimizer):
    """Evaluates its closure twice and moves at the end, along all gradients that there were."""

    def step(self, closure):
        params = self.param_groups[0]["params"]
        found = []
        for _ in range(2):
            with torch.enable_grad():
                closure()
            found.append([None if p.grad is None else p.grad.clone() for p in params])
        with torch.no_grad():
            for gradients in found:
                for p, gradient in zip(params, gradients, strict=True):
                    if gradient is not None:
                        p.sub_(gradient, alpha=0.1)


@pytest.mark.parametrize("finite", ["first", "second"])
def test_weights_follow_what_any_finite_evaluation_moved(finite):
    model = make()
    sculptor, optimizer = begin(model, SculptConfig(), Twice, defaults={})
    good, bad = closure_of(model, optimizer), closure_of(model, optimizer, float("nan"))
    order = iter((good, bad) if finite == "first" else (bad, good))
    before = values(model)
    with pytest.warns(UserWarning, match="a step was left out"):
        optimizer.step(lambda: next(order)())
    assert not any(torch.equal(a, b) for a, b in zip(before[::2], values(model)[::2], strict=True))
    good()  # The weights have followed.
    assert sculptor.verify(independent=True).ok


def test_steps_that_are_not_finite_are_taken_where_that_is_wanted():
    model = make()
    config = SculptConfig(skip_nonfinite=False)
    sculptor, optimizer = begin(model, config, torch.optim.SGD, lr=0.1)
    closure_of(model, optimizer, float("nan"))()
    optimizer.step()
    assert sculptor.skipped_steps == 0
    assert not model[0].weight.isfinite().any()


def test_an_optimizer_that_lost_coordinates_before_its_first_step():
    model = make()
    _, optimizer = begin(model, SculptConfig(), torch.optim.SGD, lr=0.1)
    optimizer.param_groups[0]["params"].pop()
    closure_of(model, optimizer)()
    with pytest.raises(ValueError, match=r"holds 1 of the 2 .*first missing: '2'"):
        optimizer.step()

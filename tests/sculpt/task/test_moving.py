"""Coordinates that others move: the weights follow by themselves, or somebody says what to call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sculpt import SculptConfig, Sculptor

X = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 12, generator=torch.Generator().manual_seed(2))
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "full": (torch.float32, {"coordinates": "full"}),
    "bf16": (torch.bfloat16, {}),
    "bf16, core": (torch.bfloat16, {"constraint": "core"}),
}
ALL = KINDS | {"update": (torch.float32, {"engine": "update"})}


def begun(
    kind: str = "float32", make: Any = torch.optim.AdamW, lr: float = 1e-3
) -> tuple[nn.Module, Sculptor, torch.optim.Optimizer]:
    """A task with an optimizer that is not attached yet."""
    dtype, options = ALL[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 12)).to(dtype)
    sculptor = Sculptor(model, SculptConfig(**options))
    sculptor.begin_task()
    return model, sculptor, make(sculptor.parameters(), lr=lr)


def attached(*kind: Any, **options: Any) -> tuple[nn.Module, Sculptor, torch.optim.Optimizer]:
    model, sculptor, optimizer = begun(*kind, **options)
    sculptor.attach(optimizer)
    return model, sculptor, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def loss_of(model: nn.Module) -> torch.Tensor:
    dtype = next(iter(model.parameters())).dtype
    return (model(X.to(dtype)) - Y.to(dtype)).float().square().mean()


def current(sculptor: Sculptor) -> bool:
    """Every weight is that of its coordinates, but for rounding."""
    for matrix in sculptor._task.matrices.values():
        far = float((matrix.weight.float() - matrix.truth()).norm())
        spacing = torch.finfo(matrix.weight.dtype).eps
        if far > 4 * spacing * float(matrix.weight.float().norm()):
            return False
    return True


def swap_in_place(parameters: Any, values: Any) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def swap_data(parameters: Any, values: Any) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


@pytest.mark.parametrize("swap", [swap_in_place, swap_data])
@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_swapped_in_around_an_evaluation(kind, swap):
    model, sculptor, optimizer = attached(kind, lr=3e-3)
    trained = sculptor.parameters()
    average = [parameter.detach().clone() for parameter in trained]
    for _ in range(6):
        model.train()
        step(model, optimizer)
        for mean, parameter in zip(average, trained, strict=True):
            mean.lerp_(parameter.detach(), 0.3)
        aside = [parameter.detach().clone() for parameter in trained]
        swap(trained, average)
        model.eval()
        with torch.no_grad():
            loss_of(model)
            assert current(sculptor)
        swap(trained, aside)
    model.train()
    loss_of(model)
    assert current(sculptor)
    assert sculptor.verify().ok
    sculptor.end_task()


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al., arXiv 2010.01412) around another optimizer."""

    def __init__(self, params, base=torch.optim.SGD, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm(grads)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad, alpha=float(group["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p].pop("old")
        self.base.step()

    @torch.no_grad()
    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("form", ["closure", "two calls"])
@pytest.mark.parametrize("kind", KINDS)
def test_sharpness_aware_steps_look_at_the_weights_that_they_ask_for(kind, form):
    model, sculptor, optimizer = begun(kind, Sam)
    sculptor.attach(optimizer if form == "closure" else optimizer.base)
    losses = []

    def closure() -> None:
        loss = loss_of(model)
        loss.backward()
        losses.append(float(loss.detach()))
        assert current(sculptor)

    for _ in range(4):
        optimizer.zero_grad()
        closure()
        if form == "closure":
            optimizer.step(closure)
        else:
            optimizer.first_step()
            closure()
            optimizer.second_step()
        assert losses[-1] > losses[-2]  # The first step climbs.
    assert losses[-2] < losses[0]
    assert sculptor.verify().ok


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_a_compiled_model_loses_one_step_at_most(kind, compiles):
    """The check before a forward is not compiled; the next step is refused."""
    model, sculptor, optimizer = begun(kind, torch.optim.SGD, lr=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
    message = r"'[02]' (was changed by a step|has changed and nothing).*Call sculptor.attach"
    loss_of(compiled).backward()
    optimizer.step()
    before = [p.detach().clone() for p in sculptor.parameters()]
    with pytest.raises(RuntimeError, match=message):
        loss_of(compiled).backward() or optimizer.step()
    for parameter, was in zip(sculptor.parameters(), before, strict=True):
        assert torch.equal(parameter, was)
    sculptor.update_weights()
    sculptor.attach(optimizer)
    step(compiled, optimizer)
    assert sculptor.verify().ok


def test_a_state_of_accelerate_is_taken_up_in_a_running_task(tmp_path):
    """`save_state`, more steps, `load_state`: as if the steps had never been."""

    def end(detour: int) -> dict[str, torch.Tensor]:
        accelerator = Accelerator(cpu=True)
        model, sculptor, optimizer = begun()
        prepared, made = accelerator.prepare(model, optimizer)
        sculptor.attach(made)
        with pytest.raises(RuntimeError, match="attached already"):
            sculptor.attach(optimizer)

        def steps(count: int) -> None:
            for _ in range(count):
                made.zero_grad()
                accelerator.backward(loss_of(prepared))
                made.step()

        steps(3)
        accelerator.save_state(str(tmp_path / str(detour)))
        steps(detour)
        accelerator.load_state(str(tmp_path / str(detour)))
        steps(3)
        assert sculptor.verify().ok
        sculptor.end_task()
        return model.state_dict()

    straight, back = end(0), end(3)
    for name, value in straight.items():
        torch.testing.assert_close(value, back[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_a_plain_checkpoint_does_not_pass_for_a_running_task(when, tmp_path):
    """Weights and optimizer alone, in a process that begins the task anew."""
    model, sculptor, optimizer = attached()
    for _ in range(3):
        step(model, optimizer)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    sculptor.save(tmp_path / "sculptor")

    weights, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    again, other, _ = begun()
    other.end_task()
    again.load_state_dict(weights)
    other.begin_task()
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-3)
    message = r"state is of another task.*sculptor.save\(path\) and Sculptor.load"
    if when == "before attach":
        fresh.load_state_dict(copy.deepcopy(state))
        with pytest.raises(ValueError, match=message):
            other.attach(fresh)
    else:
        other.attach(fresh)
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(copy.deepcopy(state))
        # A state without any mark is that of dense weights.
        for group in state["param_groups"]:
            group.pop("sculpt_task")
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(copy.deepcopy(state))
    other.end_task()
    # The right way.
    again.load_state_dict(weights)
    resumed = Sculptor.load(again, tmp_path / "sculptor")
    fresh = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    fresh.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True)[1])
    resumed.attach(fresh)
    for either, chosen in ((model, optimizer), (again, fresh)):
        step(either, chosen)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize("kind", ALL)
def test_a_whole_loop_inside_autocast(kind):
    """Steps, loads, certificates and subspaces have the bits that they have outside of it."""

    def end(everything: bool) -> tuple[Any, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=everything):
            model, sculptor, optimizer = attached(kind)
            for number in range(6):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if number == 2:
                    saved = {n: v.clone() for n, v in model.state_dict().items()}
                if number == 4:
                    model.load_state_dict(saved)
            certificates = [sculptor.verify(), sculptor.verify(independent=True)]
            assert all(certificate.ok for certificate in certificates)
            sculptor.end_task()
        return [certificate.to_dict() for certificate in certificates], model.state_dict()

    outside, inside = end(False), end(True)
    assert inside[0] == outside[0]
    assert all(torch.equal(value, inside[1][name]) for name, value in outside[1].items())


@pytest.mark.filterwarnings("ignore:a step was left out")
@pytest.mark.parametrize("left_out", [0, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_that_change_nothing_end_in_an_error(reduction, left_out):
    model, sculptor, optimizer = attached()
    labels = torch.full((16,), -100)
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), labels, reduction=reduction)
        (model(X).sum() * float("nan") if left_out else loss).backward()
        optimizer.step()
    message = rf"none of the 2 steps .* {left_out} were left out.*Are all labels masked"
    for call in (sculptor.verify, sculptor.end_task):
        with pytest.raises(RuntimeError, match=message):
            call()
    sculptor.undo_task()
    assert type(model[0]) is nn.Linear


def test_no_step_and_a_rate_of_zero_are_no_error():
    model, sculptor, optimizer = begun(lr=0.0)
    assert sculptor.verify().ok
    sculptor.attach(optimizer)
    step(model, optimizer)
    assert sculptor.verify().unmoved == ["0", "2"]
    sculptor.end_task()

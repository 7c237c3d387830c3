"""A step can be captured in a CUDA graph: no value and no copy goes to the host.

On tensors without values: whoever looks at one gets an error.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sculpt import SculptConfig, Sculptor
from sculpt.task import engines
from sculpt.task.bases import Bases
from sculpt.task.running import RunningTask
from sculpt.task.targets import find_targets
from tests.sculpt.small_models import ENGINES

WIDTHS = (12, 20, 20, 8)
MORE = {"recompute": {"weight_update": "recompute"}, "gradient": {"engine": "gradient"}}
OPTIMIZERS = {
    "fused AdamW": lambda trained: torch.optim.AdamW(trained, fused=True, capturable=True),
    "AdamW": lambda trained: torch.optim.AdamW(trained, capturable=True),
    "SGD": lambda trained: torch.optim.SGD(trained, lr=0.1, momentum=0.9),
}


class NoTransfers(TorchDispatchMode):
    """Refuses what a captured stream cannot do: copies between host and device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, *(kwargs or {}).values(), result) if torch.is_tensor(t)]
        if "copy" in func._schema.name and len({t.device.type for t in tensors}) > 1:
            raise AssertionError(f"{func} between host and device")
        return result


FAKE = FakeTensorMode()


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return FakeTensor(FAKE, torch.empty(shape, dtype=dtype, device="meta"), "graphed:0")


class Captured:
    """A running task of a model whose tensors have no values, as if on a CUDA device."""

    def __init__(self, monkeypatch, dtype: torch.dtype, options: dict) -> None:
        monkeypatch.setattr("sculpt.task.attachment.is_captured", lambda optimizer: True)
        # As on a CUDA device.
        groups = engines.groups
        monkeypatch.setattr(engines, "groups", lambda matrices, _: groups(matrices, True))
        layers = [nn.Linear(n, m) for n, m in pairwise(WIDTHS)]
        self.model = nn.Sequential(*(x for layer in layers for x in (layer, nn.Tanh())))
        config = SculptConfig(unfreeze_rank_ratio=0.25, **options)
        self.sculptor = Sculptor(self.model, config)
        targets = find_targets(self.model, config).chosen
        for module in layers:
            for name, parameter in list(module._parameters.items()):
                module._parameters[name] = nn.Parameter(on_device(*parameter.shape, dtype=dtype))
        with FAKE:
            bases = [self.bases_of(target, config) for target in targets]
            self.sculptor._start(RunningTask(self.model, config, targets, bases, None, None))

    def bases_of(self, target, config) -> Bases:
        (m, n), t = target.shape, target.trainable_rank
        wide = torch.float32
        if config.chosen_engine != "compact":
            U, V = (on_device(size, min(m, n) - t, dtype=wide) for size in (m, n))
            return Bases(U, V, None, "none", 1.0, "given")
        U, V = (on_device(size, t, dtype=wide) for size in (m, n))
        if config.coordinates == "thin" or m == n:
            return Bases(U, V, None, "none", 1.0, "given")
        high = on_device(max(m, n), min(m, n) - t, dtype=wide)
        return Bases(None if m > n else U, V if m > n else None, high, "none", 1.0, "given")

    def step(self, optimizer) -> None:
        x = on_device(6, WIDTHS[0], dtype=self.model[0].weight.dtype)
        with FAKE, NoTransfers():
            loss = self.model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.filterwarnings("ignore:engine='gradient'")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES | MORE)
def test_a_captured_step_looks_at_no_value(monkeypatch, engine, dtype, optimizer):
    task = Captured(monkeypatch, dtype, (ENGINES | MORE)[engine])
    made = OPTIMIZERS[optimizer](task.sculptor.parameters())
    task.sculptor.attach(made)
    task.step(made)
    task.step(made)


def test_values_that_are_looked_at_are_found(monkeypatch):
    """Outside of a graph the host asks whether the gradients are finite."""
    task = Captured(monkeypatch, torch.float32, {})
    made = torch.optim.SGD(task.sculptor.parameters(), lr=0.1)
    task.sculptor.attach(made)
    monkeypatch.setattr("sculpt.task.attachment.is_captured", lambda optimizer: False)
    with pytest.raises(DataDependentOutputException):
        task.step(made)


def test_copies_from_the_host_are_found():
    with FAKE, NoTransfers(), pytest.raises(AssertionError, match="between host and device"):
        on_device(3).copy_(torch.ones(3))

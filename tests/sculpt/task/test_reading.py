"""A weight that is read past its layer's `forward` trains as one that is not."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

from sculpt import SculptConfig, Sculptor
from sculpt.task.targets import find_targets
from tests.sculpt.small_models import begin, projected


class Penalised(nn.Module):
    """Uses weights in their layers and beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.c = Conv1D(12, 12)

    def forward(self, x):
        h = self.a(x) + F.linear(x, self.b.weight)
        return self.b(self.c(h)) + h @ self.c.weight + self.a.weight.square().sum()


class Autoencoder(nn.Module):
    """Looks rows up, and speaks through the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(30, 12)
        self.mix = nn.Linear(12, 12)

    def forward(self, x):
        ids = (x[:, 0].abs() * 100).long() % 30
        return F.linear(self.mix(self.wte(ids)), self.wte.weight)


def partially(model: nn.Module) -> nn.Module:
    """What monkeypatches leave: a function on the instance that reads the weight."""
    for layer in (model[0], model[2]):
        layer.forward = partial(lambda layer, x: F.linear(x, layer.weight, layer.bias), layer)
    return model


def hooked(model: nn.Module) -> nn.Module:
    """What accelerate leaves where a device map spreads a model."""
    for layer in (model[0], model[2]):
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    return model


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "beside their layers": (Penalised, {"target_modules": ["a", "b", "c"]}),
    "custom tied head": (Autoencoder, {"target_modules": ["wte", "mix"]}),
    "attention": (
        lambda: nn.MultiheadAttention(12, 2),
        {"target_modules": ["out_proj"], "unfreeze_rank_ratio": 0.5},
    ),
    "functions on instances": (lambda: partially(plain()), {}),
    "accelerate's hooks": (lambda: hooked(plain()), {}),
    "mamba": (
        lambda: MambaForCausalLM(
            MambaConfig(
                vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=6
            )
        ),
        {"target_modules": ["dt_proj", "in_proj", "x_proj"]},
    ),
}


def loss_of(model: nn.Module) -> torch.Tensor:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    parameter = next(model.parameters())
    if hasattr(model, "config"):
        ids = torch.arange(12).view(2, 6) % 40
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    x = x.to(parameter.dtype)
    out = model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)
    return (out - 1).square().mean()


@pytest.mark.parametrize("coordinates", ["thin", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_dense_weight_projected(name, coordinates):
    make, options = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    config = SculptConfig(coordinates=coordinates, **options)
    dense = copy.deepcopy(model)
    targets = {target.name: target for target in find_targets(dense, config).chosen}
    loss_of(dense).backward()
    sculptor = Sculptor(model, config)
    sculptor.begin_task()
    loss = loss_of(model)
    loss.backward()
    for matrix in sculptor._task.matrices.values():
        target, state = targets[matrix.name], matrix.state
        # A hook holds the layer that it was put on, of which this is a copy.
        G = target.oriented(target.parameter.grad)
        expected = state.scale * projected(matrix, G)
        assert float(expected.norm()) > 1e-8
        atol = 1e-9 * float(expected.abs().max())
        torch.testing.assert_close(state.C.grad, expected, rtol=1e-9, atol=atol)


def test_what_is_read_is_the_parameter_for_whoever_writes():
    model = plain()
    sculptor = Sculptor(model, SculptConfig())
    sculptor.begin_task()
    layer = model[0]
    parameter = layer._parameters["weight"]
    with torch.no_grad():
        assert layer.weight is parameter
    assert layer.weight.requires_grad
    assert not layer.weight.is_leaf
    assert torch.equal(layer.weight, parameter)
    values = parameter.detach().clone()
    layer.weight.data = values
    assert parameter.data_ptr() == values.data_ptr()
    with pytest.raises(RuntimeError, match=r"in-?place"):
        layer.weight.add_(1.0)
    sculptor.end_task()
    assert layer.weight is parameter
    assert parameter.requires_grad


def test_reading_compiles_without_a_graph_break():
    torch.manual_seed(0)
    model = Penalised()
    sculptor = Sculptor(model, SculptConfig(target_modules=["a", "b", "c"]))
    sculptor.begin_task()
    x = torch.randn(5, 12)
    eager = torch.autograd.grad(model(x).square().mean(), sculptor.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(x).square().mean(), sculptor.parameters())
    torch.testing.assert_close(again, eager)


class Unreachable(nn.Module):
    """Computes with a weight that it took from its layer once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.taken = [self.b.weight]

    def forward(self, x):
        return F.linear(self.a(x), self.taken[0])


def test_matrices_without_a_gradient_are_named():
    model = Unreachable()
    sculptor, optimizer = begin(model, SculptConfig(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        if step == 0:
            with pytest.warns(UserWarning, match=r"no gradient reached 1 of 2 matrices .*: b\."):
                optimizer.step()
        else:
            optimizer.step()
    certificate = sculptor.verify()
    assert certificate.unmoved == ["b"]
    assert "1 matrices did not move, no gradient has reached them: b" in str(certificate)
    sculptor.end_task()

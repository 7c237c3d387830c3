"""Every common layer trains through coordinates exactly as its dense self, projected."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sculpt import SculptConfig, Sculptor
from sculpt.task.targets import find_targets
from tests.sculpt.small_models import KINDS, projected, projected_sgd


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("coordinates", ["thin", "full"])
def test_gradients_and_steps_are_those_of_the_dense_layer(name, coordinates):
    kind = KINDS[name]
    model = kind.build(torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = SculptConfig(
        unfreeze_rank_ratio=0.5, target_modules=kind.targets, coordinates=coordinates
    )
    dense = copy.deepcopy(model)
    dense_targets = {target.name: target for target in find_targets(dense, config).chosen}
    sculptor = Sculptor(model, config)
    table = sculptor.begin_task()
    assert len(table.rows) == kind.count == len(dense_targets)
    assert list(model.state_dict()) == list(before)

    kind.loss(model).backward()
    for parameter in dense.parameters():
        parameter.requires_grad_(True)
    kind.loss(dense).backward()
    steps = {}
    for matrix in sculptor._task.matrices.values():
        target = dense_targets[matrix.name]
        G = target.oriented(target.parameter.grad)
        expected, bases = projected(matrix, G), matrix.bases
        C = matrix.trained.grad
        torch.testing.assert_close(C, matrix.state.scale * expected, rtol=1e-9, atol=1e-12)
        step = expected if bases.U is None else bases.U @ expected
        steps[matrix.name] = step if bases.V is None else step @ bases.V.mT
    assert any(float(step.norm()) > 1e-6 for step in steps.values())

    optimizer = projected_sgd(sculptor, lr=0.1)
    sculptor.attach(optimizer)
    optimizer.step()
    certificate = sculptor.verify(independent=True)
    assert certificate.ok, str(certificate)
    for matrix in sculptor._task.matrices.values():
        moved = matrix.weight - matrix.before()
        torch.testing.assert_close(moved, -0.1 * steps[matrix.name], rtol=1e-8, atol=1e-12)
    sculptor.end_task()
    assert {type(m) for m in model.modules()} == {type(m) for m in dense.modules()}
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[k].shape == before[k].shape and after[k].dtype == before[k].dtype
               for k in before)  # fmt: skip


def test_tied_weights_share_one_set_of_coordinates():
    kind = KINDS["tied head and embedding"]
    model = kind.build()
    sculptor = Sculptor(model, SculptConfig(target_modules=kind.targets))
    sculptor.begin_task()
    assert model.lm_head.sculpt_C is model.model.embed_tokens.sculpt_C
    assert len([p for p in model.parameters() if p.requires_grad]) == 1
    sculptor.end_task()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.model.embed_tokens) is nn.Embedding


def test_an_expert_stack_by_name_of_its_parameter():
    model = KINDS["mixtral experts"].build()
    chosen = find_targets(model, SculptConfig(target_modules=["experts.down_proj"])).chosen
    assert [target.name for target in chosen] == ["model.layers.0.mlp.experts.down_proj"]
    assert chosen[0].shape == (3, 16, 24)


def sculpted(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False)).to(dtype)
    sculptor = Sculptor(model, SculptConfig(**options))
    sculptor.begin_task()
    return model, sculptor


def gradients(model, run) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    run().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("coordinates", ["thin", "full"])
def test_checkpointing_compiling_and_twofold_use(coordinates):
    model, _ = sculpted(coordinates=coordinates)
    x = torch.randn(5, 12, requires_grad=True)
    plain = gradients(model, lambda: model(x).square().mean())
    for reentrant in (True, False):
        again = gradients(
            model, lambda r=reentrant: checkpoint(model, x, use_reentrant=r).square().mean()
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = gradients(model, lambda: compiled(x).square().mean())
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    twice = gradients(model, lambda: model(x).square().mean() + model(x).square().mean())
    for a, b in zip(plain, twice, strict=True):
        torch.testing.assert_close(2 * a, b)
    # An input that needs no gradient gets none, and changes no other.
    frozen = gradients(model, lambda: model(x.detach()).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(plain, frozen, strict=True))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model(x.clone()))
    with torch.no_grad():
        assert not model(x).requires_grad


def test_autocast_gives_what_autocast_gives_the_dense_layer():
    model, sculptor = sculpted()
    dense = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))
    dense.load_state_dict(model.state_dict())
    x = torch.randn(6, 12)
    results = []
    for either in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            y = either(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        results.append(y)
    assert torch.equal(*results)
    for matrix, layer in zip(sculptor._task.matrices.values(), (dense[0], dense[2]), strict=True):
        C, U, V = matrix.trained, matrix.bases.U, matrix.bases.V
        assert C.grad.dtype == torch.float32
        # A product of bfloat16 operands more, on either side.
        expected = matrix.state.scale * (U.mT @ layer.weight.grad @ V)
        error = float((C.grad - expected).norm() / expected.norm())
        assert error < 3 * torch.finfo(torch.bfloat16).eps
    sculptor.end_task()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), results[0])


@pytest.mark.parametrize("coordinates", ["thin", "full"])
@pytest.mark.parametrize("kind", ["conv1d", "embedding", "stack"])
def test_other_layers_compile_without_a_graph_break(kind, coordinates):
    torch.manual_seed(0)
    layer: nn.Module = {"conv1d": Conv1D(20, 12), "embedding": nn.Embedding(20, 12)}.get(
        kind, Stack()
    )
    model = nn.ModuleDict({"a": layer})
    sculptor = Sculptor(model, SculptConfig(target_modules=["a"], coordinates=coordinates))
    sculptor.begin_task()
    x = torch.arange(6) if kind == "embedding" else torch.randn(3, 12)

    def loss(module: nn.Module) -> torch.Tensor:
        return module(x).square().mean()

    plain = gradients(model, lambda: loss(layer))
    assert len(plain) == 1
    assert float(plain[0].norm()) > 0
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, lambda: loss(compiled)), plain)


class Stack(nn.Module):
    """Two matrices, each applied to every row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 20, 12))

    def forward(self, x):
        return torch.einsum("emn,tn->etm", self.weight, x)


def test_saved_activations_are_coordinates_not_inputs():
    model, _ = sculpted(unfreeze_rank_ratio=0.25)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(50, 12))
    shapes = [tuple(t.shape) for t in saved if t.shape[0] == 50]
    # x V of both layers and the tanh, never the inputs of 12 and 20 columns but for the tanh's own.
    assert sorted(shapes) == [(50, 2), (50, 3), (50, 20)]

"""The life cycle: exact by construction, plain afterwards, again and again in one process."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sculpt import SculptConfig, Sculptor
from sculpt_kernels import Subspace, split
from tests.sculpt.small_models import begin


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 12)
    )
    return layers.to(dtype)


def data(model: nn.Module, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    dtype = model[0].weight.dtype
    return torch.randn(16, 20, generator=g).to(dtype), torch.randn(16, 12, generator=g).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list:
    x, y = data(model, seed)
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).to(torch.promote_types(y.dtype, torch.float32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def layout(model: nn.Module) -> dict:
    return {name: (t.shape, t.dtype, t.stride()) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_is_outside_of_the_leading_singular_vectors(dtype):
    model = small_model(dtype)
    before = {
        n: m.weight.detach().clone() for n, m in model.named_children() if list(m.parameters())
    }
    sculptor, optimizer = begin(model, SculptConfig(unfreeze_rank_ratio=0.25), lr=1e-3)
    losses = train(model, optimizer, 50)
    for matrix in sculptor._task.matrices.values():
        assert torch.equal(matrix.weight, matrix.truth())  # No rounding from step to step.
    certificates = [sculptor.verify(), sculptor.verify(independent=True)]
    stepped = {name: value.clone() for name, value in model.state_dict().items()}
    sculptor.end_task()
    assert all(torch.equal(value, stepped[n]) for n, value in model.state_dict().items())

    assert losses[-1] < losses[0]
    for certificate in certificates:
        assert certificate.ok, str(certificate)
    # The same by hand: weights before and after, leading singular vectors by SVD in float64.
    unit = torch.finfo(dtype).eps / 2
    for layer, W0 in before.items():
        W0 = W0.double()
        delta = getattr(model, layer).weight.detach().double() - W0
        assert float(delta.norm()) > 1e-4 * float(W0.norm())
        U, _, Vh = torch.linalg.svd(W0, full_matrices=False)
        h = math.floor(0.75 * min(W0.shape))
        limit = max(
            1e-6 if dtype == torch.float32 else 1e-13, 2 * unit * float(W0.norm() / delta.norm())
        )
        assert float((U[:, :h].T @ delta).norm() / delta.norm()) <= limit
        assert float((delta @ Vh[:h].T).norm() / delta.norm()) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_tasks_in_one_process_leave_a_plain_model(dtype):
    model = small_model(dtype)
    was = layout(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=0.5))
    deltas = []
    for task in range(3):
        W0 = model[2].weight.detach().clone()
        table = sculptor.begin_task(name=f"task {task}")
        assert layout(model) == was
        assert table.trainable_elements == 10**2 + 16**2 + 6**2
        optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3)
        sculptor.attach(optimizer)
        train(model, optimizer, 20, seed=task)
        assert sculptor.verify().ok
        assert sculptor.verify().task == f"task {task}"
        sculptor.end_task()
        deltas.append(model[2].weight.detach().double() - W0.double())
        assert layout(model) == was
        assert type(model[2]) is nn.Linear
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert not model[2]._non_persistent_buffers_set
    # What the first task learned is still there: later updates did not undo it.
    total = model[2].weight.detach().double() - small_model(dtype)[2].weight.detach().double()
    torch.testing.assert_close(total, sum(deltas))
    kept = float((total * deltas[0]).sum() / deltas[0].square().sum())
    assert kept > 0.5


def test_begin_task_changes_nothing_when_a_weight_is_not_finite():
    model = small_model()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    state = copy.deepcopy(model.state_dict())
    sculptor = Sculptor(model, SculptConfig())
    with pytest.raises(ValueError, match=r"4\.weight cannot be split: W must be finite; got 1 NaN"):
        sculptor.begin_task()
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) or name == "4.weight"


def test_given_subspaces_are_used_and_checked():
    model = small_model()
    sculptor = Sculptor(model, SculptConfig(target_modules=["2"]))
    low = split(model[2].weight, rank=24)
    turned = Subspace(low.U, low.V, 24, "low", low.energy, "given")
    assert sculptor.begin_task(subspaces={"2": turned}).rows[0].method == "given"
    assert model[2].sculpt["weight"].U is low.U
    sculptor.end_task()
    wrong = {
        "shape": (low.U[:, :-1], low.V),
        "float64": (low.U.double(), low.V.double()),
        "transposed": (low.U.T, low.V),
    }
    for U, V in wrong.values():
        with pytest.raises(ValueError, match=r"subspaces\['2'\]\.U must be \(32, 8\)"):
            sculptor.begin_task(subspaces={"2": Subspace(U, V, 24, "low", 0.5, "given")})
        assert type(model[2]) is nn.Linear
    with pytest.raises(ValueError, match="part 'low'"):
        sculptor.begin_task(subspaces={"2": split(model[2].weight, rank=24, part="high")})
    with pytest.raises(ValueError, match="'nope', which is no target"):
        sculptor.begin_task(subspaces={"nope": low})


def test_order_of_calls_is_checked():
    model = small_model()
    sculptor = Sculptor(model, SculptConfig(subspaces="weights"))
    for call in (sculptor.end_task, sculptor.verify, sculptor.parameters):
        with pytest.raises(RuntimeError, match="call begin_task"):
            call()
    with pytest.raises(ValueError, match="calibration"):
        sculptor.begin_task(calibration=[1])
    sculptor.begin_task()
    with pytest.raises(RuntimeError, match="call end_task"):
        sculptor.begin_task()
    with pytest.raises(ValueError, match=r"holds 1 of the 3 .*first missing: '2'"):
        sculptor.attach(torch.optim.AdamW(sculptor.parameters()[:1]))
    optimizer = torch.optim.AdamW(sculptor.parameters())
    sculptor.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        sculptor.attach(optimizer)


def moved(model: nn.Module, before: dict) -> dict:
    return {n: float((t - before[n]).norm()) for n, t in model.state_dict().items() if t.ndim == 2}


@pytest.mark.parametrize("coordinates", ["thin", "full"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_a_dense_rate_moves_weights_as_far_as_dense_adamw(coordinates, ratio):
    """Full coordinates lose what of a step lies in the preserved directions of the longer side."""
    model, dense = small_model(), small_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = SculptConfig(unfreeze_rank_ratio=ratio, coordinates=coordinates)
    _, optimizer = begin(model, config, lr=1e-3, weight_decay=0.0)
    train(model, optimizer, 1)
    train(dense, torch.optim.AdamW(dense.parameters(), lr=1e-3, weight_decay=0.0), 1)
    for name, far in moved(dense, before).items():
        least = 0.99 if coordinates == "thin" else 0.8
        assert least * far < moved(model, before)[name] < 1.01 * far


def test_weight_decay_pulls_toward_the_weights_before_the_task():
    """At the rate of dense weights: a step without gradients takes `lr * decay` of the change."""
    model = small_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    sculptor, optimizer = begin(model, SculptConfig(), torch.optim.SGD, lr=0.03)
    train(model, optimizer, 5)
    far = {n: t - before[n] for n, t in model.state_dict().items() if t.ndim == 2}
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.4)
    for parameter in sculptor.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, change in far.items():
        expected = before[name] + 0.8 * change
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=1e-6)


def test_the_table_lists_every_parameter():
    model = small_model()
    table = Sculptor(model, SculptConfig(target_modules=["0", "2"])).begin_task(name="first")
    text = str(table)
    assert "Task 'first': 2 matrices" in text
    for name, _ in small_model().named_parameters():
        assert name.removesuffix(".weight") in text
    assert "4.weight: not in target_modules" in text
    assert table.dense_elements == 20 * 32 + 32 * 32


def test_subspaces_are_kept_and_reused(tmp_path):
    config = SculptConfig(subspace_cache=tmp_path)
    bases = []
    for _ in range(2):
        model = small_model()
        Sculptor(model, config).begin_task()
        bases.append(model[2].sculpt["weight"].U)
        assert len(list(tmp_path.iterdir())) == 3
    assert torch.equal(*bases)

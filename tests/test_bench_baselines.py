"""Each baseline does what its paper says, on the interface of a run's methods."""

from __future__ import annotations

import sys
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import run_config
from torch import Tensor, nn

from bench.baselines import BASELINES
from bench.baselines.olora import orthogonality
from sculpt.models.encoding import IGNORED, Encoded
from sculpt.report.page import report
from sculpt.report.results import tables
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunError
from sculpt.runs.prepare import Prepared
from sculpt.runs.start import run


def config_of(folder: Path, method: str, **changes: Any) -> RunConfig:
    """Of a run of two tasks of four rows each."""
    return run_config(folder, method=BASELINES.get(method, method), **changes)


def prepared(folder: Path, method: str, **changes: Any) -> Any:
    """The strategy of such a run."""
    return Prepared(config_of(folder, method, **changes)).strategy


def nobody(done: int, total: int) -> None:
    """Told of progress."""


def train(strategy: Any, task: int, steps: int = 3) -> None:
    """A few steps, the task left running."""
    optimizer = strategy.begin_task(task, nobody)
    for batch in islice(strategy.batches(task, skip=0), steps):
        loss, _ = strategy.setting.learner.loss(batch)
        loss.backward()
        strategy.add_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def weights(strategy: Any) -> dict[str, Tensor]:
    return {t.name: t.parameter.detach().clone() for t in strategy.targets}


def row_ids(rows: Any) -> list[tuple[int, ...]]:
    return [row.ids for row in rows]


def test_orthogonality_by_hand() -> None:
    earlier = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    current = torch.tensor([[3.0, -4.0]], requires_grad=True)
    loss = orthogonality(earlier, current)
    # A_i A_tᵀ = (3, -8, -1), and the gradient is the sum of the rows of A_i with these signs.
    assert loss.item() == 12
    loss.backward()
    assert current.grad.tolist() == [[1.0 - 0.0 - 1.0, 0.0 - 2.0 - 1.0]]


def test_olora_pulls_away_from_all_earlier_adapters(tmp_path: Path) -> None:
    strategy = prepared(tmp_path, "olora", options={"rank": 2, "orthogonality": 0.25})
    earlier = []
    for task in (0, 1):
        train(strategy, task)
        earlier.append([layer.lora_A["default"].weight for layer in strategy.layers().values()])
        strategy.end_task(task)
    strategy.begin_task(1, nobody)
    strategy.add_gradients()
    for place, layer in enumerate(strategy.layers().values()):
        A = layer.lora_A["default"].weight
        expected = sum(
            0.25 * torch.sign(old[place] @ A.mT).mT @ old[place].detach() for old in earlier
        )
        torch.testing.assert_close(A.grad, expected)
        assert layer.lora_B["default"].weight.grad is None


def log_likelihood(model: nn.Module, row: Encoded) -> Tensor:
    """Of the learned tokens of a causal row, from the logits alone."""
    logits = model(input_ids=torch.tensor([row.ids[:-1]])).logits[0].log_softmax(-1)
    pairs = [(place, label) for place, label in enumerate(row.labels[1:]) if label != IGNORED]
    return torch.stack([logits[place, label] for place, label in pairs]).sum()


def test_fisher_is_the_mean_of_squared_gradients_of_the_log_likelihood(tmp_path: Path) -> None:
    strategy = prepared(tmp_path, "ewc")
    strategy.begin_task(0, nobody)
    rows, weight = strategy.setting.rows[0], strategy.weights[3]
    squares = [
        torch.autograd.grad(log_likelihood(strategy.model, row), weight)[0] ** 2 for row in rows
    ]
    torch.testing.assert_close(strategy.fisher(0)[3], torch.stack(squares).mean(0))


def test_ewc_adds_lambda_fisher_times_what_has_moved_of_every_task(tmp_path: Path) -> None:
    strategy = prepared(tmp_path, "ewc", options={"strength": 30.0})
    known = []
    for task in (0, 1):
        train(strategy, task)
        known.append((strategy.fisher(task), [w.detach().clone() for w in strategy.weights]))
        strategy.end_task(task)
    strategy.begin_task(1, nobody)
    for weight in strategy.weights:
        with torch.no_grad():
            weight.add_(0.01 * torch.randn_like(weight))
        weight.grad = torch.ones_like(weight)
    strategy.add_gradients()
    for place, weight in enumerate(strategy.weights):
        pull = sum(30.0 * fisher[place] * (weight - at[place]) for fisher, at in known)
        torch.testing.assert_close(weight.grad, 1 + pull.detach())


def test_l2sp_pulls_to_the_weights_before_the_first_task_and_a_head_to_zero(
    tmp_path: Path,
) -> None:
    strategy = prepared(tmp_path, "l2sp", options={"strength": 0.3, "head_strength": 0.7})
    first = weights(strategy)
    train(strategy, 0)
    strategy.end_task(0)
    head = nn.Parameter(torch.tensor([2.0]))
    strategy.free.append(head)
    strategy.begin_task(1, nobody)
    for parameter in (*strategy.weights, head):
        parameter.grad = torch.ones_like(parameter)
    strategy.add_gradients()
    for target in strategy.targets:
        moved = target.parameter - first[target.name]
        assert moved.abs().max() > 0
        torch.testing.assert_close(target.parameter.grad, 1 + 0.3 * moved.detach())
    assert head.grad.item() == pytest.approx(1 + 0.7 * 2)


def test_frozen_answers_as_the_model_always_did(tmp_path: Path) -> None:
    results = run(config_of(tmp_path, "frozen"))
    result = results.methods[BASELINES["frozen"]]
    assert result.generated[0][0] == result.generated[1][0]
    assert result.trainable_elements == 0
    assert result.losses == [[], []]
    console = Console(width=150, record=True, file=StringIO())
    console.print(tables(results))
    assert "nan" not in console.export_text()
    assert "frozen" in report([tmp_path / "run"], with_spectra=False)


def test_lora_freezes_the_weight_and_adds_its_scaled_product(tmp_path: Path) -> None:
    strategy = prepared(tmp_path, "lora", options={"rank": 3, "scaling": 1.5})
    before = weights(strategy)
    train(strategy, 0)
    layers = strategy.layers()
    products = {}
    for name, layer in layers.items():
        A, B = (f["default"].weight.detach().clone() for f in (layer.lora_A, layer.lora_B))
        assert A.shape[0] == B.shape[1] == 3
        assert torch.equal(layer.base_layer.weight, before[name])
        products[name] = 1.5 * B @ A
    plain = strategy.plain_state()
    assert all(torch.equal(plain[f"{name}.weight"], before[name]) for name in before)
    strategy.end_task(0)
    for target in strategy.targets:
        moved = target.parameter - before[target.name]
        torch.testing.assert_close(moved, products[target.name], atol=1e-6, rtol=1e-4)
        assert moved.abs().max() > 0
    assert set(strategy.model.state_dict()) == set(plain)
    assert not any(parameter.requires_grad for parameter in strategy.model.parameters())


def test_osf_projects_gradients_off_the_leading_directions(tmp_path: Path) -> None:
    strategy = prepared(tmp_path, "osf")
    before = weights(strategy)
    strategy.begin_task(0, nobody)
    loss, _ = strategy.setting.learner.loss(strategy.setting.rows[0][:2])
    loss.backward()
    for target in strategy.targets:
        layer = strategy.model.get_submodule(target.name)
        U, _, Vh = torch.linalg.svd(before[target.name].double(), full_matrices=False)
        low = layer.osf_svd_params["default"]
        h = target.preserved
        assert low["U_low"].shape[1] == target.trainable_rank
        for gradient, high in (
            (low["U_low"].grad.double(), U[:, :h]),
            (low["V_low"].grad.double().mT, Vh[:h].mT),
        ):
            assert gradient.norm() > 0
            assert (high.mT @ gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("method", ["lora", "osf", "olora"])
def test_a_matched_budget_trains_as_many_values_as_sculpt(tmp_path: Path, method: str) -> None:
    sculpt = {"unfreeze_rank_ratio": 0.5}
    strategy = prepared(tmp_path, method, options={"budget": "match"}, sculpt=sculpt)
    own = sum(strategy.cost(target).trainable for target in strategy.targets)
    wanted = sum(target.trainable_rank**2 for target in strategy.targets)
    (group,) = strategy.begin_task(0, nobody).param_groups
    assert sum(parameter.numel() for parameter in group["params"]) == own
    # Whole ranks: half a rank of every matrix at the most.
    off = sum(0.5 * (sum(target.shape) + 1) for target in strategy.targets)
    assert abs(own - wanted) <= off


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"rank": 4, "budget": "match"}, "rank=4 and budget='match'"),
        ("olora", {"strength": 4.0}, r"options\.strength\n  Extra inputs"),
        ("ewc", {"strength": -1.0}, r"options\.strength"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, method, options=options)


def test_what_an_adapter_needs_and_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' is .*: leave it out"):
        prepared(tmp_path, "osf", sculpt={"target_modules": ["embed_tokens"]})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match="OSF': peft is not installed: pip install peft"):
        prepared(tmp_path, "osf")


@pytest.mark.parametrize("method", ["plain", "sculpt", "lora", "ewc"])
def test_no_method_trains_what_is_excluded(tmp_path: Path, method: str) -> None:
    strategy = prepared(tmp_path, method, sculpt={"exclude_modules": ["q_proj", "lm_head"]})
    assert strategy.targets
    assert not any("q_proj" in target.name for target in strategy.targets)
    before = {name: value.clone() for name, value in strategy.model.state_dict().items()}
    train(strategy, 0)
    strategy.end_task(0)
    after = strategy.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {f"{target.name}.weight" for target in strategy.targets}

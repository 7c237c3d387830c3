"""What is loaded into a divided model during a task is taken up, or refused, on every process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from launch import launch
from tasks import network, refused, started, steps
from test_shards import by_columns, divided, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)

from sculpt import SculptConfig, abandon
from sculpt.certificate.leak import rounding_bound
from sculpt.task.matrix import WeightChangedError

CASES: dict[str, tuple[torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "compact": (torch.float32, {}, {}),
    "all coordinates": (torch.float32, {"coordinates": "full"}, {}),
    "columns": (torch.float32, {}, {"shard_placement_fn": by_columns}),
    "columns, all coordinates": (
        torch.float32,
        {"coordinates": "full"},
        {"shard_placement_fn": by_columns},
    ),
    "update": (torch.float32, {"engine": "update"}, {}),
    "bf16": (torch.bfloat16, {"weight_update": "recompute"}, {}),
    "bf16, core": (torch.bfloat16, {"constraint": "core"}, {}),
}


def by_distributed_checkpoint(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    set_model_state_dict(model, best)


def by_state_dict(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(best)


def in_place(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in best:
                weight.copy_(best[name])


def through_data(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    for name, weight in model.named_parameters():
        if name in best:
            weight.data.copy_(best[name])


LOADS = (by_distributed_checkpoint, by_state_dict)
WRITERS = (*LOADS, in_place, through_data)


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """In roundings of the weights."""
    return max(float((a[n].double() - b[n].double()).norm()) / rounding_bound(a[n]) for n in a)


def kept(names):
    """What is written is what stays, not what steps had made of it."""
    for name, write in itertools.product(names, WRITERS):
        dtype, options, sharding = CASES[name]
        model = divided(dtype=dtype, **sharding)
        sculptor, optimizer = started(model, SculptConfig(**options), lr=3e-3)
        steps(model, optimizer, 0, 4)
        best = {n: v.clone() for n, v in get_model_state_dict(model).items()}
        steps(model, optimizer, 4, 8)
        last = whole(model.state_dict())
        write(model, best)
        assert sculptor.verify().ok, str(sculptor.verify())
        sculptor.end_task()
        matrices = {n: v for n, v in whole(model.state_dict()).items() if v.ndim == 2}
        assert far(matrices, whole(best)) < 2, (name, write.__name__)
        assert far(matrices, last) > 8, (name, write.__name__)


@pytest.mark.parametrize("size", [2, 3])
def test_the_best_weights_are_kept(size, tmp_path):
    launch(size, kept, tmp_path, list(CASES) if size == 2 else ["compact", "all coordinates"])


def rolled_back():
    """Steps that a load takes back leave no trace in where training goes on from it."""
    for name, load in itertools.product(CASES, LOADS):
        dtype, options, sharding = CASES[name]
        ends = []
        for detour in (4, 0):
            model = divided(dtype=dtype, **sharding)
            sculptor, optimizer = started(model, SculptConfig(**options), lr=3e-3)
            steps(model, optimizer, 0, 3)
            saved = {n: v.clone() for n, v in get_model_state_dict(model).items()}
            steps(model, optimizer, 3, 3 + detour)
            load(model, saved)
            optimizer.state.clear()
            steps(model, optimizer, 7, 9)
            assert sculptor.verify().ok, str(sculptor.verify())
            sculptor.end_task()
            ends.append({n: v for n, v in whole(model.state_dict()).items() if v.ndim == 2})
        assert far(*ends) < 16, (name, load.__name__)


def test_training_goes_on_from_what_was_loaded(tmp_path):
    launch(2, rolled_back, tmp_path)


def refused_and_undone():
    for name in ("compact", "update", "bf16, core"):
        dtype, options, sharding = CASES[name]
        model = divided(dtype=dtype, **sharding)
        before = whole(model.state_dict())
        sculptor, optimizer = started(model, SculptConfig(**options), lr=3e-3)
        steps(model, optimizer, 0, 2)
        other = {n: v + 0.1 for n, v in get_model_state_dict(model).items()}
        set_model_state_dict(model, other)
        assert not sculptor.verify().ok
        refused("was written to during the task", sculptor.end_task, WeightChangedError)
        abandon(model)
        after = whole(model.state_dict())
        assert all(torch.equal(after[n], v) for n, v in before.items() if v.ndim == 2)
        assert type(network()[0]) in type(model[0]).__mro__


def test_other_weights_are_refused_and_the_task_can_be_undone(tmp_path):
    launch(2, refused_and_undone, tmp_path)

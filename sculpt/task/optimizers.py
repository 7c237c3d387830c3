"""What an optimizer holds, and of which task its state is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch.optim.optimizer import Optimizer

TASK = "sculpt_task"
"""The key of a parameter group under which the task is noted whose coordinates it holds."""


def held_by(optimizer: Optimizer) -> list[Any]:
    """The parameters of all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def innermost(optimizer: Any) -> Any:
    """The optimizer that steps, where accelerate has wrapped it."""
    while isinstance(optimizer, Optimizer) and isinstance(
        vars(optimizer).get("optimizer"), Optimizer
    ):
        optimizer = vars(optimizer)["optimizer"]
    return optimizer


def mark_task(optimizer: Optimizer, coordinates: Collection[int], task: int) -> None:
    """Note in groups that hold `coordinates`, and so in `state_dict()`, of which task they are."""
    for group in optimizer.param_groups:
        if any(id(parameter) in coordinates for parameter in group["params"]):
            group[TASK] = task


def check_task(state: Mapping[str, Any], task: int, *, loaded: bool) -> None:
    """Raise `ValueError` where the state of an optimizer is that of another task.

    Args:
        state: has `param_groups`, as an optimizer and its `state_dict()` do.
        loaded: groups without a mark are of another task as well.
    """
    marks = {group.get(TASK) for group in state["param_groups"]}
    if marks & {task} or (marks == {None} and not loaded):
        return
    raise ValueError(
        "the optimizer's state is of another task than the one that is running: its moments belong "
        "to other coordinates. Weights and optimizer alone do not bring a running task back, "
        "sculptor.save(path) and Sculptor.load(model, path) do; a new task takes a new optimizer"
    )
